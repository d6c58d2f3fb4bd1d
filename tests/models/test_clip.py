"""A decoder's uint8 clip given to a network as it is: normalised there, by the numbers that belong to the weights."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from numerics import relative_error
from torch import nn

import r3d_kernels as r3d
from r3d_kernels import _extension, backends, graphs
from r3d_kernels.models import PRESETS
from r3d_kernels.nn import clip_conv_bn_act
from r3d_kernels.ops.clip import ClipSource, normalized_clip

MEAN, STD = (110.2, 100.6, 96.9), (58.4, 57.2, 57.5)
WIDE = (1, -1, 1, 1, 1)


def raw_clip(n: int = 1, channels: int = 3, frames: int = 5, size: int = 24, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, frames, size, size), generator=g, dtype=torch.uint8)


def network(stem: str = "hara", seed: int = 0, **arguments) -> r3d.ResNet3D:
    torch.manual_seed(seed)
    convolutions = "2+1d" if stem == "r2plus1d" else "3d"
    arguments = {"clip_mean": MEAN, "clip_std": STD, **arguments}
    model = r3d.ResNet3D(7, depth=10, stem=stem, widen_factor=0.25, convolutions=convolutions, **arguments)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean, 0, 0.1)
    return model.eval()


def exact(model: nn.Module, clip: torch.Tensor, mean=MEAN, std=STD) -> torch.Tensor:
    """float64 throughout, normalised here."""
    wide = copy.deepcopy(model).double()
    wide.fused = False
    mean, std = (torch.tensor(v, dtype=torch.float64).view(WIDE) for v in (mean, std))
    with torch.no_grad():
        return wide((clip.double() - mean) / std)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("stem", ["hara", "seed18", "torchvision", "r2plus1d"])
def test_against_float64(stem, fused):
    model = network(stem, fused=fused)
    for clip in (raw_clip(), raw_clip(2, size=19)):
        want = exact(model, clip)
        with torch.inference_mode():
            y = model(clip)
            assert y.dtype == torch.float32
            assert relative_error(y, want) < 1e-5
            # A clip that was prepared elsewhere is taken as it is.
            prepared = normalized_clip(clip, MEAN, STD, torch.float32)
            assert relative_error(model(prepared), want) < 1e-5
            assert model.features(clip).keys() == {"stem", "layer1", "layer2", "layer3", "layer4"}
            assert relative_error(model.forward_head(model.forward_features(clip)), want) < 1e-5


@pytest.mark.parametrize("fused", [False, True])
def test_any_layout(fused):
    model, clip = network(fused=fused), raw_clip(2)
    want = exact(model, clip)
    frames = clip.permute(0, 2, 3, 4, 1).contiguous()  # [N, T, H, W, 3], as decoders give it
    for x in (
        frames.permute(0, 4, 1, 2, 3),
        torch.cat([clip, clip], 4)[..., :24],
        clip.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        with torch.inference_mode():
            assert relative_error(model(x), want) < 1e-5


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype, fused):
    model, clip = network(fused=fused).to(dtype), raw_clip()
    want = exact(model, clip)
    with torch.inference_mode():
        y = model(clip)
        prepared = model(normalized_clip(clip, MEAN, STD, dtype))
    assert y.dtype == dtype
    assert torch.equal(y, prepared)
    assert relative_error(y, want) < (0.1 if dtype == torch.bfloat16 else 1e-12)


def test_one_channel_an_empty_batch_and_autocast():
    model = network(in_channels=1, clip_mean=[30.0], clip_std=[20.0], fused=True)
    clip = raw_clip(channels=1)
    with torch.inference_mode():
        assert relative_error(model(clip), exact(model, clip, [30.0], [20.0])) < 1e-5
        assert model(clip[:0]).shape == (0, 7)
        with torch.autocast("cpu", torch.bfloat16):
            assert relative_error(model(clip), exact(model, clip, [30.0], [20.0])) < 0.1


@pytest.mark.parametrize(
    ("mean", "std"), [(None, None), (MEAN, None), (None, STD)], ids=["neither", "mean", "std"]
)
def test_what_is_not_given_is_0_and_1(mean, std):
    model, clip = network(clip_mean=mean, clip_std=std), raw_clip()
    want = exact(model, clip, mean or [0.0] * 3, std or [1.0] * 3)
    for model.fused in (False, True):
        with torch.inference_mode():
            assert relative_error(model(clip), want) < 1e-5


def test_padding_is_zero_behind_the_normalisation():
    """Folded into the weights, the mean would make it -mean / std."""
    model = network(clip_mean=[1000.0] * 3, clip_std=[2.0] * 3)
    clip = raw_clip()
    want = exact(model, clip, [1000.0] * 3, [2.0] * 3)
    for model.fused in (False, True):
        with torch.inference_mode():
            assert relative_error(model(clip), want) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"clip_mean": [1.0, 2.0]}, ValueError, "clip_mean: expected 3 numbers, one a channel, got 2"),
        ({"clip_std": [1.0, -2.0, 1.0]}, ValueError, r"clip_std: expected finite numbers > 0, got \[1.0, -2.0"),
        ({"clip_std": [1.0, 0.0, 1.0]}, ValueError, "clip_std: expected finite numbers > 0"),
        ({"clip_mean": [1.0, float("nan"), 1.0]}, ValueError, "clip_mean: expected finite numbers, got"),
        ({"clip_mean": 0.5}, TypeError, "clip_mean: expected 3 numbers, one a channel, or None, got 0.5"),
        ({"clip_mean": ["a", "b", "c"]}, TypeError, "clip_mean: expected 3 numbers, one a channel, got"),
        ({"clip_std": "imagenet"}, TypeError, "clip_std: expected 3 numbers, one a channel, or None, got 'imagenet'"),
    ],
)  # fmt: skip
def test_wrong_numbers(arguments, error, message):
    with pytest.raises(error, match=message):
        network(**arguments)
    model = network()
    for name, value in arguments.items():
        with pytest.raises(error, match=message):
            setattr(model, name, value)
    assert (model.clip_mean, model.clip_std) == (MEAN, STD)


def test_wrong_clips():
    model = network()
    with pytest.raises(
        TypeError, match=r"x: expected torch.float32, .* or uint8 as a decoder's, got torch.int64"
    ):
        model(raw_clip().long())
    with pytest.raises(ValueError, match="expected 3 channels"):
        model(raw_clip(channels=1))


def test_it_is_no_state():
    model = network()
    plain = network(clip_mean=None, clip_std=None)
    assert model.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(model.state_dict())
    assert plain.clip_mean is None
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert (twin.clip_mean, twin.clip_std) == (MEAN, STD)
    old = pickle.loads(pickle.dumps(model))
    del old.__dict__["_clip_mean"], old.__dict__["_clip_std"]  # of a version without it
    assert old.clip_mean is old.clip_std is None
    model.clip_mean = model.clip_std = None
    clip = raw_clip()
    with torch.inference_mode():
        assert torch.equal(model(clip), model(clip.float()))


# ---- what belongs to a checkpoint


def saved(model: nn.Module, foreign: bool) -> object:
    buffer = io.BytesIO()
    state = model.state_dict()
    torch.save(dict(state) if foreign else state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize(("stem", "family"), [("hara", "hara"), ("torchvision", "torchvision")])
def test_a_foreign_checkpoint_brings_its_family_s(stem, family):
    weights = saved(network(stem), foreign=True)
    facts = PRESETS[family]
    model = r3d.load_checkpoint(None, weights)
    assert model.clip_mean == pytest.approx([255 * v for v in facts.mean])
    assert model.clip_std == pytest.approx([255 * v for v in facts.std])
    assert model.loaded_from.preset == facts
    given = network(stem)
    assert r3d.load_checkpoint(given, weights).clip_mean == model.clip_mean  # with the weights, as the preset
    asked = r3d.load_checkpoint(None, weights, clip_mean=[1, 2, 3])
    assert asked.clip_mean == (1.0, 2.0, 3.0)
    assert asked.clip_std == model.clip_std


def test_the_first_hara_networks_take_0_to_255_less_a_mean():
    state = {f"module.{k}": v for k, v in network("hara").state_dict().items()}
    model = r3d.load_checkpoint(None, {"arch": "resnet-10", "state_dict": state})
    assert model.loaded_from.layout == "hara2018"
    assert model.clip_mean == pytest.approx((114.7748, 107.7354, 99.4750))
    assert model.clip_std == pytest.approx((1.0, 1.0, 1.0))


def test_volumes_of_one_channel_are_nobody_s_business():
    model = network(in_channels=1, clip_mean=None, clip_std=None)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("fc.")}
    model = r3d.load_checkpoint(None, state)
    assert model.loaded_from.layout == "medicalnet"
    assert model.clip_mean is model.clip_std is None


def test_our_own_checkpoints_bring_what_they_were_saved_with():
    for mean, std in ((MEAN, STD), (MEAN, None), (None, None)):
        state = saved(network(clip_mean=mean, clip_std=std), foreign=False)
        model = r3d.load_checkpoint(None, state)
        assert (model.clip_mean, model.clip_std) == (mean, std)
        assert model.loaded_from.layout == "r3d_kernels"
    state._metadata[""]["r3d_kernels"].pop("clip")  # as an older version wrote it
    assert r3d.load_checkpoint(network(), state).clip_mean == MEAN
    state._metadata[""]["r3d_kernels"]["clip"] = ((1.0,), None)
    with pytest.raises(ValueError, match="saved with the weights: clip_mean: expected 3 numbers"):
        r3d.load_checkpoint(None, state)


def test_create_model_keeps_what_the_caller_says():
    weights = saved(r3d.create_model("hara_r3d_18", widen_factor=0.125, num_classes=3), foreign=True)
    arguments = {"weights": weights, "widen_factor": 0.125}
    assert r3d.create_model("hara_r3d_18", **arguments).clip_mean == pytest.approx(
        [255 * v for v in PRESETS["hara"].mean]
    )
    model = r3d.create_model("hara_r3d_18", **arguments, clip_mean=[0, 0, 0], clip_std=None)
    assert (model.clip_mean, model.clip_std) == ((0.0, 0.0, 0.0), None)


# ---- with everything else


def test_torch_compile_and_training():
    model, clip = network(fused=True), raw_clip()
    want = exact(model, clip)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert relative_error(compiled(clip), want) < 1e-5
    model.train()
    loss = model(raw_clip(2)).square().sum()
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_fake_tensors_leave_nothing_behind():
    from torch._subclasses.fake_tensor import FakeTensorMode

    mean, std = (17.25, 3.5, 2.125), (9.0, 8.0, 7.0)  # of this test alone
    with FakeTensorMode():
        y = normalized_clip(torch.empty(1, 3, 2, 4, 4, dtype=torch.uint8), mean, std, torch.float32)
        assert y.dtype == torch.float32
    clip = raw_clip()
    y = normalized_clip(clip, mean, std, torch.float32)
    mean, std = (torch.tensor(v).view(WIDE) for v in (mean, std))
    torch.testing.assert_close(y, (clip - mean) / std, rtol=1e-6, atol=1e-6)


def test_a_graph_is_captured_again_when_the_numbers_change(monkeypatch):
    class Recorded:
        def __init__(self, model, example):
            self.model = copy.deepcopy(model)

        def replay(self, x):
            return self.model(x)

        def release(self):
            released.append(self)

    released = []
    monkeypatch.setattr(graphs, "_Captured", Recorded)
    monkeypatch.setattr(graphs, "_require_cuda", lambda example: None)
    model, clip = network(), raw_clip()
    for call in (model.graphed(clip), graphs.graphed(nn.Sequential(model).eval(), clip)):
        first = call(clip)
        model.clip_mean = (1.0, 2.0, 3.0)
        assert not torch.equal(call(clip), first)
        model.clip_mean = MEAN
        assert torch.equal(call(clip), first)
    assert len(released) == 4  # each change of the numbers drops a graph


# ---- the way through the layer on a GPU, with kernels of the CPU in place of its own


@pytest.mark.skipif(_extension.error is not None, reason="the compiled library is missing")
@pytest.mark.parametrize("reads_clips", [True, False])
def test_a_kernel_that_reads_clips_gets_the_clip_itself(monkeypatch, reads_clips):
    seen = []

    class Plain(backends.Stock):
        name = "stands in"

        def run(self, pack, x, residual, request):
            seen.append(x.dtype)
            return super().run(pack, x, residual, request)

    class Reader(Plain):
        def run_clip(self, pack, clip, source, request):
            seen.append(clip.dtype)
            shape = [v.view(WIDE) for v in (source.scale, source.shift)]
            x = (clip * shape[0] + shape[1]).to(source.dtype)
            return backends.Stock.run(self, pack, x, None, request)

    monkeypatch.setattr(backends, "KERNELS", [Reader() if reads_clips else Plain()])
    monkeypatch.setattr(_extension, "runs_cuda", lambda x: True)
    monkeypatch.setattr(ClipSource, "convert", lambda self, x: normalized_clip(x, MEAN, STD, self.dtype))
    torch.manual_seed(0)
    conv, bn = nn.Conv3d(3, 8, 3, padding=1, bias=False).eval(), nn.BatchNorm3d(8).eval()
    clip = raw_clip()
    x = (clip.double() - torch.tensor(MEAN).double().view(WIDE)) / torch.tensor(STD).double().view(WIDE)
    want = copy.deepcopy(bn).double()(copy.deepcopy(conv).double()(x)).relu()
    with torch.inference_mode():
        for _ in range(2):
            assert relative_error(clip_conv_bn_act(clip, MEAN, STD, conv, bn), want) < 1e-6
    assert seen == [torch.uint8 if reads_clips else torch.float32] * 2
    seen.clear()
    with torch.no_grad(), torch.inference_mode(False):
        y = clip_conv_bn_act(clip, None, STD, conv, bn, fused=False)
    assert y.shape == want.shape
    assert not seen
