"""Where a module is not as torch made it, a fused layer does what the stock modules do, errors included."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

import r3d_kernels as r3d
from r3d_kernels import ops
from r3d_kernels._kernel import Layer, Request
from r3d_kernels._torch_kernels import OneDnn
from r3d_kernels.nn import avg_pool_linear, conv_bn_act, max_pool3d
from r3d_kernels.problems import ConvProblem


def _layer(**kwargs) -> r3d.ConvBNAct3d:
    return r3d.ConvBNAct3d(4, 6, 3, padding=1, **kwargs).eval()


X = torch.randn(2, 4, 3, 5, 5, generator=torch.Generator().manual_seed(3))


def _outcome(layer: nn.Module, fused: bool, x: torch.Tensor = X) -> torch.Tensor | type[Exception]:
    layer.fused = fused
    try:
        with torch.inference_mode():
            return layer(x)
    except Exception as e:
        return type(e)


def _fast_weight(m: r3d.ConvBNAct3d) -> None:
    weight = m.conv.weight.detach() * 2
    del m.conv.weight
    m.conv.weight = weight


def _bias_as_attribute(m: r3d.ConvBNAct3d) -> None:
    del m.conv.bias
    m.conv.bias = torch.ones(6)


def _statistic_as_parameter(m: r3d.ConvBNAct3d) -> None:
    mean = m.bn.running_mean
    del m.bn.running_mean
    m.bn.running_mean = nn.Parameter(mean + 1)


def _gamma_as_attribute(m: r3d.ConvBNAct3d) -> None:
    del m.bn.weight
    m.bn.weight = torch.full((6,), 2.0)


def _own_forward(part: str, name: str = "forward"):
    def change(m: r3d.ConvBNAct3d) -> None:
        module = getattr(m, part)
        real = getattr(module, name)
        setattr(module, name, lambda *args: real(*args) * 1.5)

    return change


STATES = {
    "fast weights": _fast_weight,
    "bias as an attribute": _bias_as_attribute,
    "statistic as a parameter": _statistic_as_parameter,
    "gamma as an attribute": _gamma_as_attribute,
    "one statistic": lambda m: setattr(m.bn, "running_var", None),
    "no statistics": lambda m: (setattr(m.bn, "running_mean", None), setattr(m.bn, "running_var", None)),
    "narrow norm": lambda m: setattr(m, "bn", nn.BatchNorm3d(5).eval()),
    "wide norm": lambda m: setattr(m, "bn", nn.BatchNorm3d(7).eval()),
    "bfloat16 norm": lambda m: m.bn.bfloat16(),
    "conv.forward": _own_forward("conv"),
    "conv._conv_forward": _own_forward("conv", "_conv_forward"),
    "bn.forward": _own_forward("bn"),
    "conv hook": lambda m: m.conv.register_forward_hook(lambda mod, args, y: y * 1.5),
    "bn pre-hook": lambda m: m.bn.register_forward_pre_hook(lambda mod, args: (args[0] * 1.5,)),
}


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("state", STATES)
def test_states(state: str, called_before: bool) -> None:
    layer = _layer(bias=True)
    before = _outcome(layer, True) if called_before else None
    STATES[state](layer)
    want, got = _outcome(layer, False), _outcome(layer, True)
    if isinstance(want, type):
        assert got is want
    else:
        torch.testing.assert_close(got, want)
        assert before is None or state in ("bfloat16 norm",) or not torch.allclose(before, got)


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook"])
def test_global_hooks_see_every_module(kind: str) -> None:
    model = r3d.ResNet3D(3, depth=10, stem="torchvision", fused=True, widen_factor=0.1).eval()
    clip, seen = torch.randn(1, 3, 4, 16, 16), []
    with torch.inference_mode():
        model(clip)
        handle = getattr(torch_module, f"register_module_{kind}")(lambda m, *args: seen.append(type(m)))
        try:
            model(clip)
            with_fused = list(seen)
        finally:
            handle.remove()
        seen.clear()
        model(clip)
    assert with_fused.count(nn.Conv3d) == sum(isinstance(m, nn.Conv3d) for m in model.modules())
    assert with_fused.count(nn.BatchNorm3d) == sum(isinstance(m, nn.BatchNorm3d) for m in model.modules())
    assert nn.ReLU in with_fused
    assert not seen


@pytest.mark.parametrize(
    "where", ["stem.2", "layer1.0.conv1.2", "layer1.0.conv1", "layer2.0.downsample", "avgpool", "fc"]
)
def test_a_replaced_forward_inside_a_network_is_called(where: str) -> None:
    model = r3d.ResNet3D(3, depth=10, stem="torchvision", fused=True, widen_factor=0.1).eval()
    clip = torch.randn(1, 3, 4, 16, 16)
    with torch.inference_mode():
        before = model(clip)
        part = model.get_submodule(where)
        part.forward = lambda x, real=part.forward: real(x) * 1.5
        after = model(clip)
        del part.forward
        assert not torch.allclose(before, after)
        torch.testing.assert_close(model(clip), before)


def test_a_patched_class_is_called(monkeypatch) -> None:
    layer, real = _layer(), nn.Conv3d.forward
    before = _outcome(layer, True)
    monkeypatch.setattr(nn.Conv3d, "forward", lambda self, x: real(self, x) * 1.5)
    assert not torch.allclose(_outcome(layer, True), before)
    torch.testing.assert_close(_outcome(layer, True), _outcome(layer, False))


def test_no_batch_axis() -> None:
    conv = nn.Conv3d(4, 6, 3)
    with torch.inference_mode():
        torch.testing.assert_close(conv_bn_act(X[0], conv, None), F.relu(conv(X[0])))


def test_tangents_pass() -> None:
    layer, fc, pool = _layer(), nn.Linear(6, 2), nn.MaxPool3d(2)

    def run(x: torch.Tensor, fused: bool) -> torch.Tensor:
        y = conv_bn_act(x, layer.conv, layer.bn, fused=fused)
        return avg_pool_linear(max_pool3d(y, pool, fused=fused), fc, fused=fused)

    v = torch.randn_like(X)
    with torch.no_grad(), forward_ad.dual_level():
        run(X, True)
        dual = forward_ad.make_dual(X, v)
        ours, stock = (forward_ad.unpack_dual(run(dual, fused)) for fused in (True, False))
        functional = ops.conv3d_bn_act(
            dual, layer.conv.weight, layer.bn.running_mean, layer.bn.running_var, None, None, 1e-5, padding=1
        )
        assert forward_ad.unpack_dual(functional).tangent is not None
    torch.testing.assert_close(ours.tangent, stock.tangent)
    torch.testing.assert_close(ours.primal, stock.primal)


@pytest.mark.parametrize("size", [0, 16])
@pytest.mark.parametrize("what", ["weight", "x", "running_mean", "residual"])
def test_freed_storage_is_an_error(what: str, size: int) -> None:
    layer, x, residual = _layer(), X.clone(), torch.randn(2, 6, 3, 5, 5)
    with torch.inference_mode():
        layer(x, residual)
        t = {
            "weight": layer.conv.weight,
            "x": x,
            "running_mean": layer.bn.running_mean,
            "residual": residual,
        }[what]
        t.untyped_storage().resize_(size)
        with pytest.raises(RuntimeError, match=r"data is in memory|not allocated"):
            layer(x, residual)


def test_a_weight_used_by_the_functional_form_can_be_swapped() -> None:
    weight, mean, var = torch.randn(6, 4, 3, 3, 3), torch.zeros(6), torch.ones(6)

    def run() -> torch.Tensor:
        with torch.inference_mode():
            return ops.conv3d_bn_act(X, weight, mean, var, None, None, 1e-5, activation=None)

    run()
    other = torch.randn_like(weight)
    want = F.conv3d(X, other) / (1 + 1e-5) ** 0.5
    torch.utils.swap_tensors(weight, other)
    torch.testing.assert_close(run(), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", ["", "+res"])
def test_nan_passes_onednn(dtype: torch.dtype, residual: str) -> None:
    p = ConvProblem.parse(f"n1c8d4h6w6k16f3s1p1{residual}+relu")
    request, kernel = Request(p, dtype, torch.device("cpu"), 1), OneDnn()
    if kernel.can_run(request) is not None:
        assert dtype == torch.bfloat16  # older processors have none
        return
    t = p.tensors(dtype, param_dtype=torch.float32)
    t.x[0, 3, 2, 3, 3] = float("nan")
    norm = (t.running_mean, t.running_var, t.gamma, t.beta, t.eps)
    with torch.no_grad():
        y = kernel.run(kernel.pack(Layer.of(t.weight, None, norm), request), t.x, t.residual, request)
    assert torch.equal(y.isnan(), p.reference(t).isnan())
    assert y.isnan().any()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("memory", ["lean", "fast"])
@pytest.mark.parametrize("channel", [0, 1, 17])
def test_a_third_of_a_large_weight_through_data(
    channel: int, memory: str, autocast: bool, monkeypatch
) -> None:
    """Places at a fixed step all lay on channel 0 of such a weight."""
    monkeypatch.setenv("R3D_KERNELS_MEMORY", memory)
    layer = r3d.ConvBNAct3d(128, 128, 3, padding=1).eval()
    x = torch.randn(1, 128, 1, 4, 4)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        before = layer(x)
        layer.conv.weight.data[:, channel::3] *= 0.2
        after = layer(x)
        fresh = copy.deepcopy(layer)(x)
    assert not torch.equal(before, after)
    assert torch.equal(after, fresh)
