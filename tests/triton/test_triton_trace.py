"""The operations as the compiler sees them on a GPU that is not here: fake CUDA tensors, traced and never run."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from r3d_kernels.triton import conv3d, norm, pool


def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def ours(graph: torch.fx.GraphModule) -> list[str]:
    return [
        n.target.name().partition("::")[2].removeprefix("triton_")
        for n in graph.graph.nodes
        if getattr(n.target, "namespace", "") == "r3d_kernels"
    ]


def block(x, weight, gamma, beta, residual):
    y = conv3d.conv3d(x, weight, stride=2, padding=1)
    y, mean, var = norm.batch_norm_act(y, gamma, beta, residual)
    return y, mean, var


def gradients(*operands):
    y, _, _ = block(*operands)
    return torch.autograd.grad(y.float().square().sum(), operands)


def operands(dtype: torch.dtype, make) -> tuple[torch.Tensor, ...]:
    return (
        *(make(2, 5, 4, 9, 9, dtype=dtype), make(7, 5, 3, 3, 3, dtype=dtype)),
        *(make(7, dtype=torch.float32), make(7, dtype=torch.float32)),
        make(2, 7, 2, 5, 5, dtype=dtype),
    )


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@dtypes
def test_a_training_block_is_five_operations(dtype: torch.dtype) -> None:
    """On CPU tensors: torch's autograd wants a driver for fake CUDA tensors."""
    leaves = [t.requires_grad_() for t in operands(dtype, torch.empty)]
    graph = make_fx(gradients, tracing_mode="fake")(*leaves)
    assert ours(graph) == [
        "conv3d",
        "batch_norm_act",
        "batch_norm_act_backward",
        "conv3d_input_grad",
        "conv3d_weight_grad",
    ]
    outputs = next(n for n in graph.graph.nodes if n.op == "output").args[0]
    for node, leaf in zip(outputs, leaves, strict=True):
        assert node.meta["val"].shape == leaf.shape
        assert node.meta["val"].dtype == leaf.dtype


@dtypes
def test_on_a_gpu_everything_stays_there(dtype: torch.dtype) -> None:
    with FakeTensorMode(), torch.no_grad():
        x, weight, gamma, beta, residual = operands(dtype, on_gpu)
        y, mean, var = block(x, weight, gamma, beta, residual)
        geometry = ([2, 2, 2], [1, 1, 1], [1, 1, 1], 1)
        ops = torch.ops.r3d_kernels
        dx = ops.triton_conv3d_input_grad(y, weight, x.shape, *geometry)
        dw = ops.triton_conv3d_weight_grad(x, y, weight.shape, *geometry)
        statistics = on_gpu(2, 7, dtype=torch.float32)
        dy, dres, grads = ops.triton_batch_norm_act_backward(
            y, y, y, statistics, gamma, beta, True, True, 1e-5
        )
    for got, like in ((y, residual), (dx, x), (dw, weight), (dy, residual), (dres, residual)):
        assert (got.device.type, got.shape, got.dtype) == ("cuda", like.shape, dtype)
        assert got.is_contiguous(memory_format=torch.channels_last_3d)
    for got, shape in ((mean, (7,)), (var, (7,)), (grads, (2, 7))):
        assert (got.device.type, got.shape, got.dtype) == ("cuda", shape, torch.float32)


def test_inference_is_traced_too() -> None:
    def f(x, weight, scale, bias):
        y = conv3d.conv3d(x, weight, scale, bias, padding=1, activation="relu")
        return pool.global_avg_pool3d(pool.max_pool3d(y, 3, 2, 1))

    with FakeTensorMode(), torch.no_grad():
        vectors = [on_gpu(7, dtype=torch.float32) for _ in range(2)]
        arguments = (on_gpu(2, 5, 4, 9, 9), on_gpu(7, 5, 3, 3, 3), *vectors)
        assert f(*arguments).shape == (2, 7)
        graph = make_fx(f)(*arguments)
    assert ours(graph) == ["conv3d", "max_pool3d", "global_avg_pool3d"]


def test_sizes_stay_symbolic() -> None:
    """A launch is planned for its sizes when it runs: the graph is not one of these sizes."""

    def f(x, weight, gamma, beta):
        y = conv3d.conv3d(x, weight, stride=2, padding=1)
        return norm.batch_norm_act(y, gamma, beta)[0]

    arguments = (torch.empty(2, 5, 4, 9, 8), torch.empty(7, 5, 3, 3, 3), torch.empty(7), torch.empty(7))
    graph = make_fx(f, tracing_mode="symbolic")(*arguments)
    value = next(n for n in graph.graph.nodes if n.op == "output").args[0].meta["val"]
    assert all(isinstance(size, torch.SymInt) for size in (value.shape[0], *value.shape[2:]))
