"""torch.compile: fused layers stay fused, one operator each, and do in its graphs what they do in eager calls."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from numerics import relative_error
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import r3d_kernels as r3d
from r3d_kernels import _extension, backends
from r3d_kernels._layer import state_of_weight
from r3d_kernels._sm90_stem import WINDOWS
from r3d_kernels.nn import avg_pool_linear, max_pool3d

pytestmark = pytest.mark.skipif(_extension.error is not None, reason="the compiled library is missing")

LAYER = "r3d_kernels.conv3d_bn_act.default"
STOCK = ("convolution", "batch_norm", "conv3d", "relu", "max_pool", "mean")


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Recorded:
    """A backend that keeps what ATen graphs call, and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[list[str]] = []
        self._backend = aot_autograd(fw_compiler=self._keep)

    def _keep(self, graph: torch.fx.GraphModule, example: object) -> Callable[..., Any]:
        self.graphs.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return make_boxed_func(graph.forward)

    def __call__(self, graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> Callable[..., Any]:
        return self._backend(graph, example)


def compiled(f: Callable[..., Any], **kwargs: Any) -> tuple[Callable[..., Any], Recorded]:
    recorded = Recorded()
    return torch.compile(f, backend=recorded, fullgraph=True, **kwargs), recorded


def randomized(model: nn.Module) -> nn.Module:
    """In evaluation mode, with statistics that matter."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm3d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
            nn.init.normal_(m.bias)
            nn.init.normal_(m.running_mean)
    return model.eval()


def make_layer(c: int = 5, k: int = 12, kernel: int = 3, **kwargs: Any) -> r3d.ConvBNAct3d:
    return randomized(r3d.ConvBNAct3d(c, k, kernel, padding=kernel // 2, **kwargs))


def network(stem: str = "torchvision", **kwargs: Any) -> r3d.ResNet3D:
    if stem == "r2plus1d":
        kwargs["convolutions"] = "2+1d"
    return randomized(r3d.ResNet3D(7, stem=stem, depth=10, widen_factor=0.125, fused=True, **kwargs))


def block() -> r3d.BasicBlock:
    shortcut = nn.Sequential(nn.Conv3d(5, 8, 1, 2, bias=False), nn.BatchNorm3d(8))
    model = r3d.BasicBlock(5, 8, 2, shortcut)
    model.fused = True
    return randomized(model)


def convolutions(model: nn.Module) -> int:
    return sum(isinstance(m, nn.Conv3d) for m in model.modules())


X = torch.randn(2, 5, 3, 6, 6, generator=torch.Generator().manual_seed(1))
CLIP = torch.randn(1, 3, 5, 24, 24, generator=torch.Generator().manual_seed(2))


def assert_fused(calls: list[str], layers: int) -> None:
    assert calls.count(LAYER) == layers
    assert not [call for call in calls if call.startswith("aten") and any(s in call for s in STOCK)]


# ---- one operator a layer, and the same bits -------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: network("hara", shortcut_type="A"),
        lambda: network("seed18"),
        lambda: network("torchvision"),
        lambda: network("r2plus1d"),
        lambda: randomized(r3d.ResNet(r3d.Bottleneck, [1, 1, 1, 1], 24, 5, num_classes=7, fused=True)),
    ],
    ids=["hara, shortcut A", "seed18", "torchvision", "r2plus1d", "ResNet of bottlenecks"],
)
def test_networks(make) -> None:
    model = make()
    f, recorded = compiled(model)
    with torch.inference_mode():
        y = f(CLIP)
        records = r3d.explain(model)
        assert len(records) == len({r.layer for r in records}) == convolutions(model)
        assert [(r.layer, r.kernel) for r in r3d.explain(f)] == [
            (f"_orig_mod.{r.layer}", r.kernel) for r in records
        ]
        assert torch.equal(y, model(CLIP))
        assert r3d.explain(model) == records  # once, though it ran both ways
    (calls,) = recorded.graphs
    assert_fused(calls, convolutions(model))
    assert ("r3d_kernels.max_pool3d.default" in calls) == (model.maxpool is not None)
    assert calls.count("r3d_kernels.avg_pool_linear.default") == 1
    for record in records:
        assert record.backend == "cpu", record


def test_inductor() -> None:
    model = network("hara")
    with torch.no_grad():
        want = model(CLIP)
        assert torch.equal(torch.compile(model, fullgraph=True)(CLIP), want)
        torch._dynamo.reset()
        # The parameters become constants of its code: still the ones that the layers know.
        frozen = torch.compile(model, fullgraph=True, options={"freezing": True})
        assert torch.equal(frozen(CLIP), want)
        before = state_of_weight(model.conv1.weight).plans()
        assert torch.equal(frozen(CLIP), want)
        assert before == state_of_weight(model.conv1.weight).plans()
        assert len(before) == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("residual", [False, True])
def test_autocast(mode, residual) -> None:
    layer = make_layer()
    arguments = (X, torch.randn(2, 12, 3, 6, 6)) if residual else (X,)
    f, recorded = compiled(layer)
    with mode(), torch.autocast("cpu", torch.bfloat16):
        y = f(*arguments)
        assert torch.equal(y, layer(*arguments))
    assert y.dtype == torch.bfloat16
    assert_fused(*recorded.graphs, layers=1)
    with mode():
        assert f(*arguments).dtype == torch.float32


def test_functions() -> None:
    """The functional form, in place of modules; the weight need not be a parameter."""
    weight, mean, var = torch.randn(12, 5, 3, 3, 3), torch.randn(12), torch.rand(12) + 0.5
    fc = nn.Linear(12, 7)

    def f(x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        y = r3d.ops.conv3d_bn_act(x, weight, mean, var, None, None, 1e-3, residual=r, padding=1)
        y = max_pool3d(y, nn.MaxPool3d(3, 2, 1))
        return avg_pool_linear(r3d.ops.bn_act(y, var, mean), fc)

    g, recorded = compiled(f)
    with torch.no_grad():
        r = torch.randn(2, 12, 3, 6, 6)
        assert torch.equal(g(X, r), f(X, r))
    assert_fused(*recorded.graphs, layers=1)
    assert len(recorded.graphs[0]) == 4
    assert state_of_weight(weight).plans()


def test_other_modules() -> None:
    """No norm, a bias, groups, a dtype that only the stock layers have: what an eager layer takes, a graph takes."""
    from r3d_kernels.nn import conv_bn_act

    conv = nn.Conv3d(4, 6, 3, padding=1, groups=2).double().eval()
    f, recorded = compiled(lambda x: conv_bn_act(x, conv, None, activation=None))
    x = torch.randn(1, 4, 3, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(f(x), conv(x))
        assert f(x).is_contiguous(memory_format=torch.channels_last_3d)
    assert_fused(*recorded.graphs, layers=1)


def test_decoded_clips() -> None:
    """uint8: normalised by torch's operators on a CPU, and then as any clip."""
    model = network("hara", clip_mean=(110.0, 103.0, 96.0), clip_std=(70.0, 69.0, 68.0))
    clip = torch.randint(256, (1, 5, 24, 24, 3), dtype=torch.uint8).permute(0, 4, 1, 2, 3)
    f, recorded = compiled(model)
    with torch.inference_mode():
        assert torch.equal(f(clip), model(clip))
    assert_fused(*recorded.graphs, layers=convolutions(model))


# ---- sizes -----------------------------------------------------------------------------------------------


def test_batches() -> None:
    model = network()
    f, recorded = compiled(model, dynamic=True)
    with torch.inference_mode():
        for n in (2, 3, 5):
            clip = torch.randn(n, *CLIP.shape[1:])
            assert torch.equal(f(clip), model(clip))
    assert_fused(*recorded.graphs, layers=convolutions(model))


def test_batches_that_come_as_a_surprise() -> None:
    model = block()
    f, recorded = compiled(model)
    with torch.inference_mode():
        for n in (2, 3, 5, 1, 0, 4):
            x = torch.randn(n, *X.shape[1:])
            assert torch.equal(f(x), model(x))
    assert len(recorded.graphs) <= 4  # one size, any size, and those that torch takes apart: 1 and 0
    for calls in recorded.graphs:
        assert_fused(calls, 3)


def test_frames_and_places() -> None:
    layer = make_layer()
    f, recorded = compiled(layer, dynamic=True)
    with torch.inference_mode():
        for size in ((3, 6, 7), (4, 5, 9), (7, 9, 9)):  # sizes equal at first would be taken for one
            x = torch.randn(2, 5, *size)
            assert torch.equal(f(x), layer(x))
    assert len(recorded.graphs) == 1


# ---- parameters ------------------------------------------------------------------------------------------


def _step(layer: r3d.ConvBNAct3d) -> None:
    layer.train()
    optimizer = torch.optim.SGD(layer.parameters(), 0.5)
    layer(X).square().mean().backward()
    optimizer.step()
    layer.eval()


def _in_place(layer: r3d.ConvBNAct3d) -> None:
    with torch.no_grad():
        layer.conv.weight[3, 1, 2, 0, 1] += 1.0


CHANGES = {
    "load_state_dict": lambda m: m.load_state_dict(make_layer().state_dict()),
    "an optimizer's step": _step,
    "one element": _in_place,
    "running_var": lambda m: m.bn.running_var.mul_(2.0),
    "weight.data": lambda m: m.conv.weight.data.mul_(0.5),
    "weight.data =": lambda m: setattr(m.conv.weight, "data", torch.randn_like(m.conv.weight)),
    "a new parameter": lambda m: setattr(m.conv, "weight", nn.Parameter(torch.randn_like(m.conv.weight))),
    "eps": lambda m: setattr(m.bn, "eps", 0.5),
    "a bias": lambda m: setattr(m.conv, "bias", nn.Parameter(torch.randn(12))),
    "float64": lambda m: m.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_followed(change) -> None:
    layer = make_layer()
    f, recorded = compiled(layer)
    with torch.no_grad():
        before = f(X)
    CHANGES[change](layer)
    x = X.to(layer.conv.weight.dtype)
    with torch.no_grad():
        after = f(x)
        assert torch.equal(after, layer(x))
    assert not torch.equal(before, after)
    for calls in recorded.graphs:
        assert_fused(calls, 1)


def test_layers_that_share_a_graph() -> None:
    """Equal layers are compiled once: what the operator remembers belongs to the weight, not to the graph."""
    layers = [make_layer(5, 5) for _ in range(3)]
    layers.append(copy.deepcopy(layers[0]))
    with torch.no_grad():
        layers[3].conv.weight.mul_(3)
    recorded = Recorded()
    calls = [torch.compile(layer, backend=recorded, fullgraph=True) for layer in layers]
    with torch.no_grad():
        for _ in range(2):
            for call, layer in zip(calls, layers, strict=True):
                assert torch.equal(call(X), layer(X))
    assert len(recorded.graphs) == 1
    assert len({id(state_of_weight(layer.conv.weight)) for layer in layers}) == 4


def test_two_networks_and_a_copy() -> None:
    first, second = network(), network("hara")
    third = copy.deepcopy(first)
    with torch.no_grad():
        third.stem[0].weight.mul_(-1)
    with torch.inference_mode():
        calls = [(torch.compile(m, backend="eager", fullgraph=True), m) for m in (first, second, third)]
        for _ in range(2):
            for f, model in calls:
                assert torch.equal(f(CLIP), model(CLIP))
        assert len({f(CLIP).sum().item() for f, _ in calls}) == 3
    for model in (first, second, third):
        assert len(r3d.explain(model)) == convolutions(model)


def test_nothing_is_kept_alive() -> None:
    layer = make_layer()
    with torch.no_grad():
        torch.compile(layer, backend="aot_eager", fullgraph=True)(X)
    gone = [weakref.ref(t) for t in (layer, layer.conv.weight, state_of_weight(layer.conv.weight))]
    del layer
    torch._dynamo.reset()
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3


# ---- where the stock layers run --------------------------------------------------------------------------


def test_gradients() -> None:
    model = block()
    twin = copy.deepcopy(model)
    f, recorded = compiled(model)
    for call, m in ((f, model), (twin, twin)):
        m.train()
        call(X).square().sum().backward()
        m.eval()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert torch.equal(model.bn1.running_var, twin.bn1.running_var)
    inputs = [X.clone().requires_grad_() for _ in range(2)]
    for call, x in zip((f, twin), inputs, strict=True):
        call(x).square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-4)
    assert not any(LAYER in calls for calls in recorded.graphs)
    assert not r3d.explain(model)
    with torch.no_grad():  # and back
        assert torch.equal(f(X), model(X))
    assert_fused(recorded.graphs[-1], 3)


def test_frozen_parameters_need_no_gradient() -> None:
    layer = make_layer().requires_grad_(False)
    f, recorded = compiled(layer)
    assert torch.is_grad_enabled()
    assert torch.equal(f(X), layer(X))
    assert_fused(*recorded.graphs, layers=1)


def test_unfused() -> None:
    layer = make_layer(fused=False)
    f, recorded = compiled(layer)
    with torch.no_grad():
        f(X)
        assert LAYER not in recorded.graphs[0]
        layer.fused = True
        assert torch.equal(f(X), layer(X))
    assert_fused(recorded.graphs[1], 1)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_are_free_of_us(strict) -> None:
    model = network("hara")
    with torch.no_grad():
        program = torch.export.export(model, (CLIP,), strict=strict)
        called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
        assert not [name for name in called if "r3d" in name]
        assert any("conv3d" in name for name in called)
        assert relative_error(program.module()(CLIP), model(CLIP).double()) < 1e-5


def test_transforms_inside() -> None:
    layer = make_layer()
    f, recorded = compiled(lambda x: torch.vmap(lambda v: layer(v[None])[0])(x))
    g = torch.compile(
        lambda x: torch.func.grad(lambda v: layer(v).sum())(x), backend=recorded, fullgraph=True
    )
    with torch.no_grad():
        assert relative_error(f(X), layer(X).double()) < 1e-5
        assert g(X).shape == X.shape
    assert not any(LAYER in calls for calls in recorded.graphs)


def test_hooks_and_traces() -> None:
    layer, seen = make_layer(), []
    with torch.no_grad():
        traced = torch.jit.trace(layer, (X,))
        assert "conv3d_bn_act" not in str(traced.inlined_graph)
        assert relative_error(traced(X), layer(X).double()) < 1e-5
        layer.bn.register_forward_hook(lambda *args: seen.append(1))
        torch.compile(layer, backend="eager")(X)
    assert seen


# ---- which backend, and what it says ---------------------------------------------------------------------


def test_backend_is_read_when_the_graph_runs() -> None:
    layer = make_layer()
    f, recorded = compiled(layer)
    with torch.inference_mode():
        f(X)
        with r3d.backend("torch"):
            y = f(X)
            assert torch.equal(y, layer(X))
    assert {r.backend for r in r3d.explain(layer)} == {"cpu", "torch"}
    assert len(recorded.graphs) == 1


def test_backend_block_inside() -> None:
    """The block breaks the graph; what it asks for holds all the same."""
    layer = make_layer()

    def f(x: torch.Tensor) -> torch.Tensor:
        with r3d.backend("torch"):
            return layer(x) + 1

    with torch.inference_mode():
        y = torch.compile(f, backend="aot_eager")(X)
        assert torch.equal(y, f(X))
    assert {r.backend for r in r3d.explain(layer)} == {"torch"}
    assert backends.current_backend() == "auto"


def test_measured_once(monkeypatch, tmp_path) -> None:
    from r3d_kernels import tuning

    monkeypatch.setenv("R3D_KERNELS_TUNE", "1")
    monkeypatch.setenv("R3D_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "shared", tuning.TuningCache())
    layer = make_layer()
    f, _ = compiled(layer)
    with torch.inference_mode():
        f(X)
        (record,) = r3d.explain(layer)
        assert record.reason.startswith("measured:")
        assert len(record.timings) > 1
        monkeypatch.setattr(backends, "measure", None)  # not again
        assert torch.equal(f(X), f(X))
        layer(X)


def test_wrong_input() -> None:
    layer = make_layer()
    with torch.inference_mode():
        for x, error, message in (
            (X[:, :4], ValueError, "x: expected 5 channels"),
            (X.double(), TypeError, "x: expected torch.float32, the dtype of the parameters"),
        ):
            with pytest.raises(error, match=message):
                torch.compile(layer, backend="aot_eager")(x)


# ---- the operator ----------------------------------------------------------------------------------------


def operands(
    layer: r3d.ConvBNAct3d, x: torch.Tensor, residual: torch.Tensor | None = None
) -> tuple[Any, ...]:
    conv, bn = layer.conv, layer.bn
    norm = [t.detach() for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias)]
    geometry = (list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)
    return (x, conv.weight.detach(), None, norm, bn.eps, residual, *geometry, "relu", None, None, None)


@pytest.mark.parametrize(
    "x", [X, X[:1, :1, :, :1], X[:, :, :1].bfloat16(), X[:0]], ids=lambda x: str(list(x.shape))
)
def test_opcheck(x) -> None:
    layer = make_layer(x.shape[1], 1 if x.shape[1] == 1 else 12).to(x.dtype)
    with torch.no_grad():
        shape = layer(x).shape
    for residual in (None, torch.randn(shape).to(x.dtype)):
        for pool_frames in (0, 1, 3):
            arguments = (*operands(layer, x, residual), pool_frames)
            torch.library.opcheck(torch.ops.r3d_kernels.conv3d_bn_act.default, arguments)


@pytest.mark.parametrize("shape", [(2, 5, 3, 6, 6), (1, 5, 1, 1, 4), (1, 5, 3, 6, 6)])
def test_strides_are_those_of_the_fake(monkeypatch, shape) -> None:
    """A kernel may leave gaps between the pixels, as the Hopper one does, and the stock layers any format."""

    class Gaps(backends.Stock):
        name = "gaps"

        def run(self, pack, x, residual, request):
            y = super().run(pack, x, residual, request)
            wide = y.new_full((y.shape[0], *y.shape[2:], y.shape[1] + 3), float("nan"))
            wide[..., : y.shape[1]] = y.permute(0, 2, 3, 4, 1)
            return wide[..., : y.shape[1]].permute(0, 4, 1, 2, 3)

    x = torch.randn(shape)
    for kernel in (Gaps(), backends.Stock()):
        monkeypatch.setattr(backends, "KERNELS", [kernel])
        for k in (1, 13):
            layer = make_layer(5, k)
            real = operands(layer, x)
            for frames in (0, 1, 3):
                y = torch.ops.r3d_kernels.conv3d_bn_act(*real, frames)
                with FakeTensorMode() as mode:
                    fakes = tree_map_only(torch.Tensor, mode.from_tensor, real)
                    fake = torch.ops.r3d_kernels.conv3d_bn_act(*fakes, frames)
                assert (y.shape, y.stride(), y.dtype) == (fake.shape, fake.stride(), fake.dtype)
                with torch.no_grad():
                    want = layer(x)
                assert torch.equal(y, F.max_pool3d(want, *WINDOWS[frames]) if frames else want)


def test_flops_are_counted() -> None:
    layer, counts = make_layer(), []
    arguments = operands(layer, X)
    op = torch.ops.r3d_kernels.conv3d_bn_act
    with torch.no_grad():
        for call in (lambda: layer(X), lambda: op(*arguments), lambda: op(*arguments, 3)):
            with FlopCounterMode(display=False) as counter:
                call()
            counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == counts[2] > 0


# ---- a GPU -----------------------------------------------------------------------------------------------


def test_traced_for_a_gpu(monkeypatch) -> None:
    """Without one: tensors that only say that they are on a GPU, and a clip that the stem's kernel normalises."""
    monkeypatch.setattr(_extension, "has_cuda", True)
    monkeypatch.setattr(_extension, "_is_capable", lambda index: True)
    model = network("hara", dtype=torch.bfloat16, clip_mean=(1.0, 2.0, 3.0))
    graphs: list[list[torch.fx.Node]] = []

    def keep(graph: torch.fx.GraphModule, example: object) -> Callable[..., Any]:
        graphs.append([n for n in graph.graph.nodes if n.op not in ("placeholder", "output")])
        return graph

    with FakeTensorMode(), torch.no_grad():
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, t in tensors.items():
                    if t is not None:
                        fake = torch.empty(t.shape, dtype=t.dtype, device="cuda")
                        tensors[name] = nn.Parameter(fake) if isinstance(t, nn.Parameter) else fake
        f = torch.compile(model, backend=keep, fullgraph=True)
        for dtype in (torch.bfloat16, torch.uint8):
            y = f(torch.empty(CLIP.shape, dtype=dtype, device="cuda"))
            assert (y.device.type, y.dtype, list(y.shape)) == ("cuda", torch.bfloat16, [1, 7])
    for nodes, clip in zip(
        graphs, ((None, None, None), ((1.0, 2.0, 3.0), None, torch.bfloat16)), strict=True
    ):
        names = [str(n.target) for n in nodes]
        assert names.pop() == "r3d_kernels.avg_pool_linear"
        assert names == ["r3d_kernels.conv3d_bn_act"] * convolutions(model)
        assert nodes[0].args[-4:] == (*clip, 3)  # the stem has the max-pool with it
        assert all(node.args[-1] == 0 for node in nodes[1:-1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_on_a_gpu(mode) -> None:
    """inductor's own CUDA graphs must neither hold old weights nor be disturbed by what a first call measures."""
    model = network("hara", clip_mean=(110.0, 103.0, 96.0)).to("cuda", torch.bfloat16)
    f = torch.compile(model, mode=mode, fullgraph=True)
    with torch.no_grad():
        for clip in (CLIP.to("cuda", torch.bfloat16), (CLIP.cuda() * 50 + 100).clamp(0, 255).byte()):
            for _ in range(3):
                assert torch.equal(f(clip).clone(), model(clip))
            model.conv1.weight.mul_(-1)
            model.layer1[0].bn1.running_mean.add_(1)
            for _ in range(3):
                assert torch.equal(f(clip).clone(), model(clip))
    assert len({r.layer for r in r3d.explain(model)}) == convolutions(model)
