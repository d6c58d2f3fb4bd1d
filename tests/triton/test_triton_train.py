"""Training through the Triton kernels against the stock modules and float64, in the interpreter on CPU tensors."""

from __future__ import annotations

import copy

import pytest
import torch
from numerics import assert_keeps_promise, relative_error
from torch import nn

import r3d_kernels as r3d
from r3d_kernels import nn as layers

pytestmark = pytest.mark.usefixtures("interpreter")


@pytest.fixture
def through_triton(monkeypatch):
    """How many blocks went through Triton."""
    calls = []
    real = layers._train_through_triton
    monkeypatch.setattr(layers, "_train_through_triton", lambda *a: calls.append(1) or real(*a))
    return calls


def step(layer: nn.Module, x: torch.Tensor, residual: torch.Tensor | None, dy: torch.Tensor):
    leaves = [None if t is None else t.clone().requires_grad_() for t in (x, residual)]
    y = layer(*leaves)
    y.backward(dy.to(y.dtype))
    grads = [t.grad for t in leaves if t is not None] + [p.grad for p in layer.parameters()]
    return y.detach(), grads, [b.clone() for b in layer.buffers()]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
@pytest.mark.parametrize("momentum", [0.1, None, 1.0], ids=str)
@pytest.mark.parametrize(
    ("activation", "with_residual", "bias"), [("relu", True, False), (None, False, True)]
)
def test_a_block_trains_as_the_modules_do(
    dtype, momentum, activation, with_residual, bias, through_triton
) -> None:
    """Output, every gradient and the running statistics, two steps one after the other."""
    ours = r3d.ConvBNAct3d(5, 7, 3, 2, 1, bias=bias, momentum=momentum, activation=activation, dtype=dtype)
    with torch.no_grad():
        ours.bn.weight.uniform_(0.5, 1.5)
        ours.bn.bias.normal_()
    stock, exact = copy.deepcopy(ours), copy.deepcopy(ours).double()
    for _ in range(2):
        for layer in (ours, stock, exact):
            layer.zero_grad(set_to_none=True)
        x, dy = torch.randn(2, 5, 3, 7, 5).to(dtype), torch.randn(2, 7, 2, 4, 3).to(dtype)
        residual = torch.randn(dy.shape).to(dtype) if with_residual else None
        with r3d.backend("triton"):
            y, grads, statistics = step(ours, x, residual, dy)
        y_stock, grads_stock, _ = step(stock, x, residual, dy)
        wide = None if residual is None else residual.double()
        y_exact, grads_exact, statistics_exact = step(exact, x.double(), wide, dy.double())
        assert y.dtype == dtype
        assert_keeps_promise(y, y_exact, y_stock)
        for got, other, want in zip(grads, grads_stock, grads_exact, strict=True):
            assert got.dtype == dtype
            # half precision moves the edge of the ReLU in both; the bias before a batch norm has no gradient but noise
            size = max(want.norm().item(), dy.double().norm().item())
            noise = (other.double() - want).norm().item() / size
            limit = 3 * noise + 4 * torch.finfo(dtype).eps
            assert (got.double() - want).norm().item() / size <= limit
        for got, want in zip(statistics, statistics_exact, strict=True):
            assert got.dtype == (torch.int64 if want.dtype == torch.int64 else dtype)
            # a mean near zero is the difference of large sums
            assert relative_error(got.double(), want.double()) <= max(5e-6, 4 * torch.finfo(dtype).eps)
    assert int(ours.bn.num_batches_tracked) == 2
    assert len(through_triton) == 2


def test_without_running_statistics(through_triton) -> None:
    """track_running_stats=False takes the batch's in evaluation too, and updates nothing."""
    conv, bn = nn.Conv3d(4, 6, 1), nn.BatchNorm3d(6, affine=False, track_running_stats=False).eval()
    x = torch.randn(2, 4, 2, 3, 3)
    with r3d.backend("triton"):
        y = layers.conv_bn_act(x, conv, bn)
    assert_keeps_promise(y, torch.relu(copy.deepcopy(bn).double()(copy.deepcopy(conv).double()(x.double()))))
    assert through_triton


def test_autocast(through_triton) -> None:
    layer = r3d.ConvBNAct3d(4, 6, 3, padding=1)
    stock = copy.deepcopy(layer)
    x = torch.randn(2, 4, 2, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        with r3d.backend("triton"):
            y = layer(x)
        want = stock(x)
    assert y.dtype == want.dtype == torch.bfloat16
    assert relative_error(y.detach(), want.detach().double()) < 0.02
    for result in (y, want):
        result.float().square().sum().backward()
    assert layer.conv.weight.grad.dtype == torch.float32
    assert relative_error(layer.conv.weight.grad, stock.conv.weight.grad.double()) < 0.05
    assert through_triton


def test_stock_runs_wherever_it_has_to(through_triton) -> None:
    x = torch.randn(2, 4, 2, 3, 3)
    make = lambda: r3d.ConvBNAct3d(4, 6, 1)  # noqa: E731
    make()(x)  # nobody asked for Triton
    with r3d.backend("triton"):
        synchronised = nn.SyncBatchNorm(6).eval()
        layers.conv_bn_act(x, nn.Conv3d(4, 6, 1), synchronised)
        layers.conv_bn_act(x, nn.Conv3d(4, 6, 1), None)
        layers.conv_bn_act(x, nn.Conv3d(4, 6, 1), nn.BatchNorm3d(6), fused=False)
        layers.conv_bn_act(x, nn.Conv3d(4, 6, 1), nn.BatchNorm3d(6).eval())  # frozen statistics
        hooked = make()
        hooked.bn.register_forward_hook(lambda *a: None)
        hooked(x)
        make().double()(x.double())
        layers.conv_bn_act(x, nn.Conv3d(4, 6, 3, padding=1, padding_mode="circular"), nn.BatchNorm3d(6))
    assert not through_triton


def test_a_network_trains(through_triton) -> None:
    """Loss, every gradient and every statistic of a small network, against float64."""
    ours = r3d.ResNet3D(3, depth=10, widen_factor=0.125, fused=True)
    exact = copy.deepcopy(ours).double()
    x, labels = torch.randn(2, 3, 4, 20, 20), torch.tensor([0, 2])
    with r3d.backend("triton"), torch.backends.cudnn.flags(allow_tf32=False):
        nn.functional.cross_entropy(ours(x), labels).backward()
    nn.functional.cross_entropy(exact(x.double()), labels).backward()
    assert len(through_triton) == sum(isinstance(m, nn.BatchNorm3d) for m in ours.modules())
    for (name, p), q in zip(ours.named_parameters(), exact.parameters(), strict=True):
        # float32 through batch norms over a few values: far from rounding, and far from wrong
        assert relative_error(p.grad, q.grad) < 1e-3, name
    for (name, b), c in zip(ours.named_buffers(), exact.buffers(), strict=True):
        assert relative_error(b.double(), c.double()) < 1e-5, name
