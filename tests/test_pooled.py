"""A layer and the max-pool behind it: which way is taken, on CPU tensors that pass for a GPU's."""

from __future__ import annotations

import json
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import r3d_kernels as r3d
from r3d_kernels import _extension, _pooled, backends, tuning
from r3d_kernels import nn as layers
from r3d_kernels._layer import layer_packs, state_of
from r3d_kernels._pooled import WINDOWS

pytestmark = pytest.mark.skipif(_extension.error is not None, reason="the compiled library is missing")

X = torch.randn(2, 3, 4, 9, 10, generator=torch.Generator().manual_seed(0))


class Stem(backends.Stock):
    """A kernel that can have a max-pool with it, and counts its calls."""

    name = "stem"
    made = 0

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def pack(self, layer, request):
        Stem.made += 1
        return super().pack(layer, request)

    def run(self, pack, x, residual, request):
        self.calls.append(self.name)
        return super().run(pack, x, residual, request)

    def with_pool(self, request, frames):
        return PooledStem(self.calls, frames)


class PooledStem(Stem):
    name = "stem with max-pool"
    packs_of = "stem"
    wrong = 0.0

    def __init__(self, calls: list[str], frames: int) -> None:
        super().__init__(calls)
        self.frames = frames

    def run(self, pack, x, residual, request):
        return F.max_pool3d(super().run(pack, x, residual, request), *WINDOWS[self.frames]) + self.wrong


@pytest.fixture
def calls(monkeypatch, tmp_path) -> list[str]:
    """What the kernels ran; `seconds` of each decide."""
    made: list[str] = []
    monkeypatch.setattr(backends, "KERNELS", [Stem(made)])
    monkeypatch.setattr(layers, "_joined_frames", frames_on_any_device)
    monkeypatch.setenv("R3D_KERNELS_TUNE", "1")
    monkeypatch.setenv("R3D_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "shared", tuning.TuningCache())
    times(monkeypatch, made, {"stem": 2.0, "stem with max-pool": 1.0})
    return made


def frames_on_any_device(x, pool) -> int:
    return _pooled.frames_of(
        *(layers._check.triple(v, "") for v in (pool.kernel_size, pool.stride, pool.padding))
    )


def times(monkeypatch, made: list[str], seconds: dict[str, float]) -> None:
    def measure(call) -> float:
        before = len(made)
        call()
        return seconds[made[before]]

    monkeypatch.setattr(tuning, "gpu_seconds", measure)


def stem(k: int = 6) -> tuple[nn.Conv3d, nn.BatchNorm3d]:
    torch.manual_seed(1)
    conv, bn = nn.Conv3d(3, k, 3, (1, 2, 1), 1, bias=False).eval(), nn.BatchNorm3d(k).eval()
    with torch.no_grad():
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
    return conv, bn


def pool_of(frames: int) -> nn.MaxPool3d:
    return nn.MaxPool3d(*WINDOWS[frames])


def stock(conv, bn, pool, x=X):
    with torch.no_grad():
        return pool(F.relu(bn(conv(x))))


@pytest.mark.parametrize("frames", WINDOWS)
@pytest.mark.parametrize("fastest", ["stem", "stem with max-pool"])
def test_the_faster_way_is_measured_once_and_remembered(
    monkeypatch, calls, tmp_path, frames, fastest
) -> None:
    times(monkeypatch, calls, {"stem": 2.0, "stem with max-pool": 2.0} | {fastest: 1.0})
    parts, pool = stem(), pool_of(frames)
    with torch.no_grad():
        for _ in range(3):
            calls.clear()
            assert torch.equal(layers.conv_bn_act(X, *parts, pool=pool), stock(*parts, pool))
    assert calls == [fastest], "nothing is measured or asked twice"
    (written,) = json.loads((tmp_path / "tuning-v1.json").read_text())["machines"].values()
    ((key, entry),) = written.items()
    assert key.endswith(f" + max-pool of {frames} frames")
    assert entry["kernel"] == fastest
    monkeypatch.setattr(tuning, "shared", tuning.TuningCache())
    monkeypatch.setattr(tuning, "gpu_seconds", lambda call: pytest.fail("measured again"))
    calls.clear()
    with torch.no_grad():
        layers.conv_bn_act(X, *stem(), pool=pool)
    assert calls == [fastest]


def test_one_kernel_wins_within_the_noise(monkeypatch, calls) -> None:
    times(monkeypatch, calls, {"stem": 1.0, "stem with max-pool": 1.02})
    with torch.no_grad():
        layers.conv_bn_act(X, *stem(), pool=pool_of(3))
        layers.conv_bn_act(X, *stem(), pool=pool_of(3))
    assert calls[-1] == "stem with max-pool"


def test_a_wrong_result_is_not_used(monkeypatch, calls, caplog) -> None:
    monkeypatch.setattr(PooledStem, "wrong", 1e-3)
    parts, pool = stem(), pool_of(3)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "r3d_kernels"):
        for _ in range(2):
            assert torch.equal(layers.conv_bn_act(X, *parts, pool=pool), stock(*parts, pool))
    assert "stem with max-pool is not used, its result is wrong" in caplog.text
    assert calls[-1] == "stem"


def test_nan_is_no_difference(calls) -> None:
    x = X.clone()
    x[0, 0, 1, 4, 4] = float("nan")
    with torch.no_grad():
        y = layers.conv_bn_act(x, *stem(), pool=pool_of(3))
    assert calls[-1] == "stem with max-pool"
    assert bool(y.isnan().any())


def test_nothing_is_measured_where_it_must_not_be(monkeypatch, calls) -> None:
    monkeypatch.setattr(tuning, "gpu_seconds", lambda call: pytest.fail("measured"))
    parts, pool = stem(), pool_of(1)
    with torch.no_grad():
        y = layers.conv_bn_act(X[:0], *parts, pool=pool)
        assert list(y.shape) == [0, 6, 4, 3, 5]
        monkeypatch.setattr(backends, "capturing", lambda device: True)
        assert torch.equal(layers.conv_bn_act(X, *parts, pool=pool), stock(*parts, pool))
        monkeypatch.setattr(backends, "capturing", lambda device: False)
        monkeypatch.setenv("R3D_KERNELS_TUNE", "0")
        assert torch.equal(layers.conv_bn_act(X[:1], *parts, pool=pool), stock(*parts, pool, X[:1]))
    assert "stem with max-pool" not in calls


def test_the_layer_alone_and_pooled_share_what_is_packed(monkeypatch, calls) -> None:
    monkeypatch.setattr(Stem, "made", 0)
    parts = stem()
    with torch.no_grad():
        for frames in (3, 1, 0, 3):
            pool = pool_of(frames) if frames else None
            y = layers.conv_bn_act(X, *parts, pool=pool)
            assert torch.equal(y, stock(*parts, pool or nn.Identity()))
        assert Stem.made == 1
        assert len({id(pack) for pack in layer_packs(parts[0])}) == 1
        parts[0].weight.mul_(-1)  # and it follows
        assert torch.equal(layers.conv_bn_act(X, *parts, pool=pool_of(3)), stock(*parts, pool_of(3)))
    assert Stem.made == 2
    reasons = {choice.kernel.name: choice.reason for _, choice in state_of(parts[0]).plans()}
    assert (
        "with the max-pool: stem 2000000 us, stem with max-pool 1000000 us" in reasons["stem with max-pool"]
    )


def test_a_kernel_without_a_pool_is_followed_by_one(monkeypatch) -> None:
    monkeypatch.setattr(layers, "_joined_frames", frames_on_any_device)
    monkeypatch.setattr(backends, "KERNELS", [backends.Stock()])
    parts = stem()
    with torch.no_grad():
        for frames in WINDOWS:
            for _ in range(2):
                y = layers.conv_bn_act(X, *parts, pool=pool_of(frames))
                assert torch.equal(y, stock(*parts, pool_of(frames)))
    names = {choice.kernel.name for _, choice in state_of(parts[0]).plans()}
    assert names == {"stock"}


def test_clips_reach_a_kernel_that_reads_them() -> None:
    class Reads(backends.Stock):
        def run_clip(self, pack, clip, source, request):
            return clip.float() * source

    clip = torch.randint(0, 256, (1, 2, 3, 5, 5), dtype=torch.uint8)
    apart = _pooled.Apart(Reads(), 3)
    assert torch.equal(apart.run_clip(None, clip, 2.0, None), F.max_pool3d(clip.float() * 2, *WINDOWS[3]))
    assert not hasattr(_pooled.Apart(backends.Stock(), 3), "run_clip")


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool3d(3, 2, 1, ceil_mode=True),
        nn.MaxPool3d(2),
        nn.MaxPool3d(3, 2, 1, dilation=2),
        nn.MaxPool3d((3, 3, 3), (2, 2, 1), (1, 1, 1)),
    ],
)
def test_other_pools_are_left_alone(pool) -> None:
    parts = stem()
    with torch.no_grad():
        y = layers.conv_bn_act(X, *parts, pool=pool)
    torch.testing.assert_close(y, stock(*parts, pool), rtol=1e-5, atol=1e-5)


class OnGpu:
    is_cuda = True


def test_which_pools_may_be_joined() -> None:
    joined = {
        "3": nn.MaxPool3d(3, 2, 1),
        "1": nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
    }
    for frames, pool in joined.items():
        assert layers._joined_frames(OnGpu(), pool) == int(frames)
        assert layers._joined_frames(X, pool) == 0
    hooked = nn.MaxPool3d(3, 2, 1)
    hooked.register_forward_hook(lambda *args: None)
    others = (
        hooked,
        nn.MaxPool3d(3, 2, 1, ceil_mode=True),
        nn.MaxPool3d(3, 2, 1, dilation=2),
        nn.MaxPool3d(3, 2, 1, return_indices=True),
        nn.MaxPool3d(3, 2, 0),
        nn.MaxPool3d(3, (1, 2, 2), 1),
        type("Mine", (nn.MaxPool3d,), {})(3, 2, 1),
    )
    assert [layers._joined_frames(OnGpu(), pool) for pool in others] == [0] * len(others)


def test_a_layer_in_training_or_with_hooks_runs_its_modules(calls) -> None:
    conv, bn = stem()
    y = layers.conv_bn_act(X, conv, bn.train(), pool=pool_of(3))
    y.sum().backward()
    assert conv.weight.grad is not None
    seen = []
    bn.eval().register_forward_hook(lambda *args: seen.append(1))
    with torch.no_grad():
        layers.conv_bn_act(X, conv, bn, pool=pool_of(3))
    assert seen
    assert calls == []


@pytest.mark.parametrize("stem_name", ["hara", "seed18"])
def test_a_network_with_a_joined_pool(monkeypatch, calls, stem_name) -> None:
    model = r3d.ResNet3D(5, depth=10, stem=stem_name, fused=True).eval()
    clip = torch.randn(1, 3, 8, 32, 32)
    with torch.no_grad():
        y = model(clip)
        model.fused = False
        torch.testing.assert_close(y, model(clip), rtol=1e-4, atol=1e-4)
    kernels = {record.layer: record.kernel for record in r3d.explain(model)}
    assert kernels["conv1"] == "stem with max-pool"
    assert set(kernels.values()) == {"stem", "stem with max-pool"}
