"""`r3d.verify`: right layers pass, a wrong one shows as itself, and the model is left as it was."""

from __future__ import annotations

import copy
import json
import re
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

import r3d_kernels as r3d
from r3d_kernels import _extension, _pooled, backends, verifying
from r3d_kernels import nn as layers
from r3d_kernels.ops.clip import ClipSource, normalized_clip
from r3d_kernels.problems import ConvProblem

MEAN, STD = (110.8, 103.3, 96.3), (70.6, 69.2, 69.8)


def small(depth: int = 10, stem: str = "hara", *, dtype: torch.dtype = torch.float32, **more) -> r3d.ResNet3D:
    """A narrow fused network with norms that are not the identity."""
    model = r3d.ResNet3D(5, depth=depth, stem=stem, widen_factor=0.25, fused=True, **more)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.6, 1.2)
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.6, 1.6)
    return model.eval().to(dtype)


def clip(n: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, 3, 6, 24, 24).to(dtype)


class Wrong(backends.Stock):
    """The stock layers, spoilt; preferred where a layer's problem is one of its own."""

    name = "wrong"

    def __init__(self, spoil, its_own=lambda p: p.kernel == (3, 3, 3) and p.stride == (2, 2, 2)) -> None:
        self.spoil, self.its_own = spoil, its_own

    def can_run(self, request):
        return None if self.its_own(request.problem) else "another layer"

    def run(self, *args):
        return self.spoil(super().run(*args))


@pytest.fixture
def plant(monkeypatch):
    return lambda *args: monkeypatch.setattr(backends, "KERNELS", [Wrong(*args), backends.Stock()])


# -- right layers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("depth", "stem", "more"),
    [
        (10, "hara", {}),
        (18, "torchvision", {"shortcut_type": "A"}),
        (50, "seed18", {"zero_init_residual": True}),
        (18, "r2plus1d", {"convolutions": "2+1d"}),
    ],
)
def test_right_networks(depth, stem, more, dtype) -> None:
    model, x = small(depth, stem, dtype=dtype, **more), clip(2, dtype)
    report = r3d.verify(model, x)
    assert report.ok, str(report)
    assert not report.failed
    convolutions = [name for name, m in model.named_modules() if isinstance(m, nn.Conv3d)]
    assert sorted(row.layer for row in report.layers) == sorted(convolutions)
    told = {(r.layer, r.problem, r.dtype, r.backend, r.kernel) for r in r3d.explain(model)}
    assert {(r.layer, r.problem, r.dtype, r.backend, r.kernel) for r in report.layers} == told
    for row in report.layers:
        assert 0 <= row.error <= row.allowed
        if dtype == torch.float32:
            assert row.allowed == 5e-6
        else:
            assert row.allowed == 2 * row.stock_error + 2**-8
            assert 1e-4 < row.error < 1e-2
    assert report.network.shape == (2, 5)
    assert report.network.top1 == (2, 2)
    assert report.network.dtype == str(dtype).removeprefix("torch.")
    assert report.network.allowed == (
        1e-5 if dtype == torch.float32 else 2 * report.network.stock_error + 2**-8
    )


def test_rows_come_in_the_order_in_which_layers_run() -> None:
    names = [row.layer for row in r3d.verify(small(), clip(1)).layers]
    assert names[:5] == [
        "conv1",
        "layer1.0.conv1",
        "layer1.0.conv2",
        "layer2.0.conv1",
        "layer2.0.downsample.0",
    ]


def test_2018_network() -> None:
    model = r3d.ResNet(r3d.Bottleneck, [1, 1, 1, 1], 32, 16, num_classes=3, fused=True).eval()
    report = r3d.verify(model, torch.randn(1, 3, 16, 32, 32))
    assert report.ok, str(report)
    assert len(report.layers) == 17


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_raw_clips(dtype) -> None:
    model = small(clip_mean=MEAN, clip_std=STD, dtype=dtype)
    report = r3d.verify(model, torch.randint(256, (2, 3, 6, 24, 24), dtype=torch.uint8))
    assert report.ok, str(report)
    assert report.input == "2x3x6x24x24 uint8"
    assert report.layers[0].dtype == str(dtype).removeprefix("torch.")
    # float64 has the clip as the decoder left it: bfloat16 rounds it once more
    assert report.layers[0].stock_error > (0 if dtype == torch.float32 else 1e-3)


class OwnNetwork(nn.Module):
    """Somebody's network with our layers in it; what it returns is up to `returns`."""

    def __init__(self, returns=lambda y: y) -> None:
        super().__init__()
        self.first = r3d.ConvBNAct3d(3, 8, 3, padding=1)
        self.second = r3d.ConvBNAct3d(8, 8, 3, padding=1, bias=True)
        self.returns = returns
        self.eval()

    def forward(self, x):
        y = self.first(x)
        return self.returns(self.second(y, residual=y))


def test_layers_in_a_network_of_somebody_else() -> None:
    report = r3d.verify(OwnNetwork(), clip())
    assert report.ok, str(report)
    assert [row.layer for row in report.layers] == ["first.conv", "second.conv"]
    assert report.layers[1].problem == "n2c8d6h24w24k8f3s1p1+res+relu"
    assert report.network.shape == (2, 8, 6, 24, 24)
    assert report.network.top1 is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_dtypes_that_stock_kernels_run(dtype) -> None:
    report = r3d.verify(OwnNetwork().to(dtype), clip(1, dtype))
    assert report.ok, str(report)
    assert {row.kernel for row in report.layers} == {"stock"}


def test_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        report = r3d.verify(small(), clip())
    assert report.ok, str(report)
    assert {row.dtype for row in report.layers} == {"bfloat16"} == {report.network.dtype}
    assert report.network.stock_error > 1e-4


def test_autocast_where_stock_bfloat16_is_not_called() -> None:
    model = small(layer_strides=(1, 2, 1, 1), layer_dilations=(1, 1, 2, 4))
    with torch.autocast("cpu", torch.bfloat16):
        report = r3d.verify(model, clip(1))
    assert report.ok, str(report)
    (row,) = (row for row in report.layers if row.layer == "layer4.0.conv2")
    assert "bfloat16 is unsafe here" in row.note
    assert row.stock_error > 1e-3, "rounded as bfloat16 is"


def test_inference_mode() -> None:
    with torch.inference_mode():
        assert r3d.verify(small(), clip()).ok


@pytest.mark.parametrize("within", [False, True])
def test_compiled_models_run_eagerly(within) -> None:
    model, x = small(), clip(1)
    compiled = torch.compile(model, backend="eager")
    if within:
        compiled = nn.Sequential(compiled).eval()
    report = r3d.verify(compiled, x)
    assert report.ok
    assert [row.layer for row in report.layers][:2] == [
        f"{'0.' * within}{name}" for name in ("conv1", "layer1.0.conv1")
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype) -> None:
    model = small(clip_mean=MEAN, clip_std=STD, dtype=dtype).cuda()
    for x in (
        clip(2, dtype).cuda(),
        torch.randint(256, (2, 3, 6, 24, 24), dtype=torch.uint8, device="cuda"),
    ):
        report = r3d.verify(model, x)
        assert report.ok, str(report)
        assert "?" not in {row.kernel for row in report.layers}


# -- wrong ones --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1 + 1e-5), (torch.bfloat16, 1.05)])
def test_a_wrong_kernel_shows_as_its_layers(plant, dtype, factor) -> None:
    plant(lambda y: y * factor)
    report = r3d.verify(small(18, dtype=dtype), clip(2, dtype))
    assert not report.ok
    strided = [f"layer{i}.0.conv1" for i in (2, 3, 4)]
    assert [row.layer for row in report.failed] == strided
    assert {row.kernel for row in report.failed} == {"wrong"}
    assert report.worst in report.failed
    for row in report.failed:
        assert row.error == pytest.approx(factor - 1, rel=0.2)
    assert (
        "FAILED: the promise is missed by layer2.0.conv1, layer3.0.conv1, layer4.0.conv1" in report.summary()
    )


def test_a_wrong_stem_with_a_pool(plant) -> None:
    plant(lambda y: y.flip(2), lambda p: p.c == 3)
    report = r3d.verify(small(), clip())
    assert [row.layer for row in report.failed] == ["conv1"]
    assert not report.network.ok
    assert "and the network" not in report.summary()
    assert report.summary().endswith("missed by conv1, the network")


def test_a_wrong_residual_is_found(plant) -> None:
    plant(lambda y: y + 1e-3, lambda p: p.residual and p.k == 16)
    report = r3d.verify(small(18), clip())
    assert [row.layer for row in report.failed] == ["layer1.0.conv2", "layer1.1.conv2"]


def test_one_wrong_sample_is_enough(plant) -> None:
    def spoil(y):
        y[1] *= 1.001
        return y

    plant(spoil)
    assert len(r3d.verify(small(), clip(3)).failed) == 3


def test_not_a_number_is_told(plant) -> None:
    def spoil(y):
        y.view(-1)[0] = float("nan")
        return y

    plant(spoil, lambda p: p.k == 128)  # layer4
    report = r3d.verify(small(), clip())
    assert [row.layer for row in report.failed] == [
        "layer4.0.conv1",
        "layer4.0.downsample.0",
        "layer4.0.conv2",
    ]
    assert report.failed[0].note == "not finite: ours 1 of 256"
    assert "input 1 of 256, residual 1 of 256" in report.failed[-1].note
    assert report.network.note.startswith("not finite: output ")
    told = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert told["layers"][-1]["error"] is None
    assert told["layers"][-1]["ok"] is told["ok"] is False


def test_not_a_number_in_the_example_is_told() -> None:
    x = clip()
    x[0, 0, 0, 0, 0] = float("inf")
    report = r3d.verify(small(), x)
    assert not report.ok
    assert "not finite: input 1 of 20736, ours " in report.layers[0].note
    assert ", stock " in report.layers[0].note


@pytest.mark.parametrize(
    ("spoil", "note"),
    [
        (lambda y: y[:, :, :1], "the output has shape [1, 32, 1, 3, 3], expected "),
        (lambda y: y[:1], "the output has 1 samples, expected 2"),
        (lambda y: y.double(), "returned torch.float64, expected torch.float32"),
    ],
)
def test_wrong_shapes_and_dtypes_are_told(plant, spoil, note) -> None:
    model = nn.Sequential(r3d.ConvBNAct3d(3, 32, 3, stride=2, padding=1)).eval()
    plant(spoil)
    (row,) = r3d.verify(model, torch.randn(2, 3, 6, 6, 6)).layers
    assert not row.ok
    assert note in row.note


def test_wrong_stock_bfloat16_excuses_nothing(plant, monkeypatch) -> None:
    """A convolution of torch's that is wrong, as pytorch#169688 is: fused layers do not call it."""
    right = nn.Conv3d.forward

    def wrong(self, x):
        y = right(self, x)
        return y if y.dtype != torch.bfloat16 else y.roll(1, -1)

    monkeypatch.setattr(nn.Conv3d, "forward", wrong)
    monkeypatch.setattr(r3d.nn, "_CONV", wrong)  # torch's own, not somebody's: else stock layers would run
    model, x = OwnNetwork().to(torch.bfloat16), clip(1, torch.bfloat16)
    report = r3d.verify(model, x)
    assert report.ok, str(report)
    for row in report.layers:
        assert row.stock_error > 0.1
        assert row.allowed < 0.02
        assert row.note == "stock bfloat16 is wrong here: measured by one that sums in float32"
    assert report.network.allowed == 0.2
    plant(lambda y: y * 1.05, lambda p: True)
    assert len(r3d.verify(OwnNetwork().to(torch.bfloat16), x).failed) == 2


def test_stock_bfloat16_is_not_called_where_it_corrupts_memory(monkeypatch) -> None:
    right, called = nn.Conv3d.forward, []

    def watched(self, x):
        called.append((ConvProblem.from_module(self, x.shape), x.dtype))
        return right(self, x)

    monkeypatch.setattr(nn.Conv3d, "forward", watched)
    monkeypatch.setattr(r3d.nn, "_CONV", watched)  # else stock layers would run
    model = small(layer_strides=(1, 2, 1, 1), layer_dilations=(1, 1, 2, 4), dtype=torch.bfloat16)
    report = r3d.verify(model, clip(1, torch.bfloat16))
    assert report.ok, str(report)
    noted = [row.layer for row in report.layers if "bfloat16 is unsafe here" in row.note]
    assert {"layer3.0.conv2", "layer4.0.conv2"} <= set(noted)
    assert len(called) > 2 * (len(report.layers) - len(noted))
    assert not any(p.torch_bf16_is_unsafe() for p, dtype in called if dtype == torch.bfloat16)


def test_what_the_stock_modules_miss_too_is_told(monkeypatch) -> None:
    """Layers that cancel, say: here all of torch's own float32 is off, but float64 is not."""
    right = torch.nn.functional.conv3d

    def off(x, *args, **kwargs):
        return right(x, *args, **kwargs) * (1 + 1e-4 * (x.dtype == torch.float32))

    monkeypatch.setattr(torch.nn.functional, "conv3d", off)
    with r3d.backend("torch"):
        monkeypatch.setattr(backends, "KERNELS", [backends.Stock()])
        report = r3d.verify(OwnNetwork(), clip(1))
    assert {row.note for row in report.layers} == {"the stock modules miss it too"} == {report.network.note}
    assert not report.ok


# -- what is told instead of compared ----------------------------------------------------------------------


def test_layers_that_ran_through_their_modules(plant) -> None:
    model, seen = small(18), []
    model.layer2[0].conv1.register_forward_hook(lambda module, args, y: seen.append(y))
    model.layer3[1].fused = False
    report = r3d.verify(model, clip())
    assert report.ok, str(report)
    stock = {row.layer: row for row in report.layers if row.allowed is None}
    assert {name: row.note for name, row in stock.items()} == {
        "layer2.0.conv1": "a hook wants to see the intermediate result, or a forward was replaced",
        "layer3.1.conv1": "fused=False",
        "layer3.1.conv2": "fused=False",
    }
    assert all(row.kernel == "" and row.error is None for row in stock.values())
    assert report.summary().startswith("OK: 17 of 20 layers were compared")
    assert str(report).count("stock modules") == 3
    assert seen[0].dtype == torch.float32


def test_norms_that_take_the_statistics_of_the_batch() -> None:
    model = small()
    model.layer4[0].bn1 = nn.BatchNorm3d(128, track_running_stats=False).eval()
    report = r3d.verify(model, clip())
    assert report.ok, str(report)
    (row,) = (row for row in report.layers if row.allowed is None)
    assert (row.layer, row.note) == ("layer4.0.conv1", "batch norm uses the statistics of the batch")
    assert report.network.allowed is not None


def test_empty_batch() -> None:
    report = r3d.verify(small(), clip(0))
    assert report.ok
    assert {row.note for row in (*report.layers, report.network)} == {
        "the batch is empty: nothing to compare"
    }
    assert report.summary() == "OK, but no layer was compared: see the notes"
    assert report.worst is None


def test_modules_that_are_less_exact_in_the_layers_layout() -> None:
    class Sloppy(nn.Module):
        def forward(self, x):
            return x * (1 + 1e-4) if x.is_contiguous(memory_format=torch.channels_last_3d) else x

    model = nn.Sequential(r3d.ConvBNAct3d(3, 8, 3, padding=1), Sloppy()).eval()
    report = r3d.verify(model, clip())
    assert not report.ok
    assert not report.failed
    assert re.search(r"the stock modules have 1\.0e-04 in channels_last_3d", report.network.note)
    assert "the network" in report.summary()


def test_what_a_network_may_return() -> None:
    assert r3d.verify(OwnNetwork(lambda y: {"out": y, "why": "text"}), clip(1)).network.allowed == 1e-5
    network = r3d.verify(OwnNetwork(lambda y: (y, y)), clip(1)).network
    assert (network.ok, network.allowed) == (True, None)
    assert network.note == "not compared: the model returns 2 tensors, not one of floating numbers"
    report = r3d.verify(OwnNetwork(lambda y: y @ torch.ones(24, 2)), clip(1))
    assert report.ok
    assert report.network.note.startswith("not compared: it does not run in float64 (")


@pytest.mark.parametrize("returns", [lambda y: y - y.mean(0), lambda y: y.flatten(0, 1)[:2]])
def test_samples_that_depend_on_each_other(returns) -> None:
    report = r3d.verify(OwnNetwork(returns), clip())
    assert report.ok, str(report)
    assert report.network.allowed == 1e-5


@pytest.mark.parametrize("option", ["return_indices", "ceil_mode", "hook"])
def test_pools_that_are_modules_of_their_own(option) -> None:
    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv3d(3, 8, 3), nn.MaxPool3d(3, 2)

        def forward(self, x):
            y = layers.conv_bn_act(x, self.conv, None, pool=self.pool)
            return y[0] if option == "return_indices" else y

    model, seen = Stem().eval(), []
    if option == "hook":
        model.pool.register_forward_hook(lambda module, args, y: seen.append(y.shape) or 2 * y)
    else:
        setattr(model.pool, option, True)
    report = r3d.verify(model, clip())
    assert report.ok, str(report)
    assert report.network.allowed == 1e-5
    assert len(seen) == (3 + 1 if option == "hook" else 0)  # as it is, stock, two samples in float64


# -- what only a GPU does, on CPU tensors that pass for its own ----------------------------------------------


@pytest.mark.skipif(_extension.error is not None, reason="the compiled library is missing")
def test_a_kernel_that_pools_and_reads_clips(monkeypatch) -> None:
    class Pooled(backends.Stock):
        name = "reads and pools"
        wrong = 0.0

        def run_clip(self, pack, clip, source, request):
            x = normalized_clip(clip, MEAN, STD, source.dtype)
            return nn.functional.max_pool3d(self.run(pack, x, None, request), 3, 2, 1) + self.wrong

    def always(choice, *args):
        return replace(choice, kernel=Pooled())

    monkeypatch.setattr(backends, "KERNELS", [backends.Stock()])
    monkeypatch.setattr(_extension, "runs_cuda", lambda x: True)
    monkeypatch.setattr(ClipSource, "convert", lambda self, x: normalized_clip(x, MEAN, STD, self.dtype))
    monkeypatch.setattr(layers, "_joined_frames", lambda x, pool: 3)
    monkeypatch.setattr(_pooled, "choose", always)
    model = small(clip_mean=MEAN, clip_std=STD)
    x = torch.randint(256, (2, 3, 6, 24, 24), dtype=torch.uint8)
    report = r3d.verify(model, x)
    assert report.ok, str(report)
    assert [row.kernel for row in report.layers[:2]] == ["reads and pools", "stock"]
    monkeypatch.setattr(Pooled, "wrong", 1e-4)
    assert [row.layer for row in r3d.verify(model, x).failed] == ["conv1"]


# -- the promise -------------------------------------------------------------------------------------------


def test_allowed(monkeypatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    allowed, f32 = verifying.allowed, torch.float32

    def both(stock, device):
        return allowed(f32, stock, device), allowed(f32, stock, device, network=True)

    assert both(1.0, cpu) == (5e-6, 1e-5)
    monkeypatch.setattr(backends, "tf32_allowed", lambda: False)
    assert both(1.0, gpu) == (5e-6, 1e-5)
    monkeypatch.setattr(backends, "tf32_allowed", lambda: True)
    assert both(3e-4, gpu) == (1e-3, pytest.approx(1.6e-3))
    assert both(3e-4, cpu) == (5e-6, 1e-5)
    monkeypatch.setenv("R3D_KERNELS_FP32", "strict")
    assert both(1e-7, cpu) == (1e-6, 1e-5)
    assert both(2e-6, cpu) == (4e-6, 1e-5)
    assert both(0.0, cpu) == (1e-6, 1e-5)
    assert both(3e-4, gpu) == (6e-4, 6e-4)
    monkeypatch.delenv("R3D_KERNELS_FP32")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert both(0.0, cpu) == (1e-2, 5e-2)
        torch.set_float32_matmul_precision("high")
        assert both(0.0, cpu) == (3e-5, 1e-4)
    finally:
        torch.set_float32_matmul_precision(before)
    assert allowed(torch.bfloat16, 1e-3, cpu) == 2e-3 + 2**-8
    assert allowed(torch.float16, 1e-3, gpu, network=True) == 2e-3 + 2**-11
    assert allowed(torch.bfloat16, float("nan"), cpu) == 0.2


def test_strict(monkeypatch) -> None:
    monkeypatch.setenv("R3D_KERNELS_FP32", "strict")
    report = r3d.verify(small(18), clip())
    assert report.ok, str(report)
    for row in report.layers:
        assert row.allowed == max(2 * row.stock_error, 1e-6)


# -- the model is left as it was -----------------------------------------------------------------------------


def fingerprint(model: nn.Module) -> list:
    found = []
    for name, module in model.named_modules():
        own = {k: v for k, v in vars(module).items() if k != "_r3d_layer_state"}
        tensors = {**own.pop("_parameters"), **own.pop("_buffers")}
        versions = [
            (k, id(t), t._version, t.data_ptr(), t.requires_grad) for k, t in tensors.items() if t is not None
        ]
        found.append((name, id(module), versions, {k: repr(v) for k, v in own.items()}))
    return found


class Stop(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails) -> None:
    model, x = small(), clip()
    model.layer1[0].bn1.register_forward_hook(lambda *args: None)

    def stop(module, args):
        if fails:
            raise Stop

    model.layer3.register_forward_pre_hook(stop)
    values = copy.deepcopy(model.state_dict())
    before, input_before = fingerprint(model), x.clone()
    if fails:
        with pytest.raises(Stop):
            r3d.verify(model, x)
    else:
        assert r3d.verify(model, x).ok
    assert fingerprint(model) == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert torch.equal(x, input_before)
    assert layers._observer.get() is None
    assert torch.is_grad_enabled()


def test_layers_run_as_they_do_unseen() -> None:
    model, x = small(), clip()
    seen = []
    model.fc.register_forward_hook(lambda module, args, y: seen.append(y))
    with torch.no_grad():
        want = model(x)
    assert r3d.verify(model, x).ok
    assert torch.equal(seen[1], want)


def test_only_this_thread_is_looked_at() -> None:
    wanted, reports, stop = {"a": 10, "b": 18}, {}, threading.Event()
    models = {name: small(depth) for name, depth in wanted.items()}
    shared, x = small(18, "torchvision"), clip(1)
    models["c"] = models["d"] = shared

    def look(name):
        reports[name] = r3d.verify(models[name], x)

    def run():
        with torch.no_grad():
            while not stop.is_set():
                shared(x)

    others = threading.Thread(target=run)
    others.start()
    threads = [threading.Thread(target=look, args=(name,)) for name in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    others.join()
    assert {name: len(report.layers) for name, report in reports.items()} == {
        "a": 12,
        "b": 20,
        "c": 20,
        "d": 20,
    }
    assert all(report.ok for report in reports.values())


def test_stock_copy() -> None:
    model = small(18)
    model.layer2[1].fused = False
    stock = verifying.stock_copy(model)
    assert not any(getattr(m, "fused", False) for m in stock.modules())
    assert model.fused
    assert not model.layer2[1].fused
    with torch.no_grad():
        stock(clip(1))
    assert r3d.explain(stock) == []


# -- the report --------------------------------------------------------------------------------------------


def test_text_and_json(plant) -> None:
    plant(lambda y: y * 1.01)
    report = r3d.verify(small(), clip())
    title, _, header, *rows, _, summary = str(report).splitlines()
    assert title == f"fused against float64: 2x3x6x24x24 float32 on cpu, torch {torch.__version__}"
    assert header.split() == ["layer", "problem", "dtype", "kernel", "error", "stock", "allowed", "used"]
    assert len(rows) == 13
    assert [row.split()[1] for row in rows] == [row.layer for row in report.layers] + ["network"]
    failed = [row for row in rows if row.startswith("FAIL")]
    assert len(failed) == 4  # three layers and the network
    assert failed[0].split()[4:6] == ["wrong", "1.0e-02"]
    assert re.search(r"  [12]\d\d\dx", failed[0])
    assert sum(row.endswith("  worst") for row in rows) == 1
    assert len({row.find("float32") for row in rows}) == 1, "aligned"
    assert not any(line != line.rstrip() for line in rows)
    assert summary == report.summary()

    told = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert told == report.to_dict()
    assert told["ok"] is False
    assert told["device"] == "cpu"
    assert told["threads"] == torch.get_num_threads()
    assert len(told["layers"]) == 12
    assert told["layers"][3] == {
        "layer": "layer2.0.conv1",
        "problem": "n2c16d3h6w6k32f3s2p1+relu",
        "dtype": "float32",
        "backend": "torch",
        "kernel": "wrong",
        "error": pytest.approx(0.01, rel=0.01),
        "stock_error": pytest.approx(3e-7, rel=0.9),
        "allowed": 5e-6,
        "ok": False,
        "note": "",
    }
    assert set(told["network"]) == {
        "shape",
        "dtype",
        "error",
        "stock_error",
        "allowed",
        "ok",
        "top1",
        "note",
    }
    assert told["network"]["shape"] == [2, 5]


def test_report_cannot_be_changed() -> None:
    report = r3d.verify(OwnNetwork(), clip(1))
    for part in (report, report.layers[0], report.network):
        with pytest.raises(AttributeError):
            part.ok = True


# -- arguments ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "x", "error", "message"),
    [
        (lambda: lambda x: x, clip, TypeError, "model: expected an nn.Module, got function"),
        (small, lambda: [1.0], TypeError, "example_input: expected a tensor, got list"),
        (lambda: small().train(), clip, ValueError, "model: expected evaluation mode, got training mode"),
        (
            small,
            lambda: clip().to("meta"),
            ValueError,
            "example_input: expected a tensor on cpu, where the parameters are, got one on meta",
        ),
        (
            lambda: r3d.ResNet3D(3, depth=10).eval(),
            clip,
            ValueError,
            "model: expected layers that run fused, found none: set model.fused = True",
        ),
        (lambda: nn.Conv3d(3, 3, 1).eval(), clip, ValueError, "model: expected layers that run fused"),
        (small, lambda: clip()[:, :2], ValueError, "x: expected 3 channels"),
        (small, lambda: clip().double(), TypeError, "x: expected torch.float32"),
    ],
)
def test_arguments(model, x, error, message) -> None:
    with pytest.raises(error) as info:
        r3d.verify(model(), x())
    assert str(info.value).startswith(message)
    assert layers._observer.get() is None
