"""Pooling in Triton against torch, bit by bit where nothing is rounded; run by the interpreter on CPU tensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_keeps_promise, relative_error

import r3d_kernels as r3d
from r3d_kernels import nn as layers
from r3d_kernels import ops, reference
from r3d_kernels.triton import pool

pytestmark = pytest.mark.usefixtures("interpreter")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])


@dtypes
@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "padding"),
    [
        ((2, 64, 4, 12, 11), 3, 2, 1),  # the 2018 stem
        ((1, 17, 3, 9, 10), (1, 3, 3), (1, 2, 2), (0, 1, 1)),
        ((2, 3, 5, 5, 5), 2, None, 0),
        ((1, 7, 6, 7, 5), (2, 3, 4), (3, 1, 2), (1, 1, 2)),
        ((1, 130, 1, 3, 3), 1, 1, 0),
        ((0, 8, 4, 4, 4), 2, 2, 0),
    ],
)
def test_max_pool(shape, kernel, stride, padding, dtype) -> None:
    x = torch.randn(shape).to(dtype)
    y = pool.max_pool3d(x, kernel, stride, padding)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(y, F.max_pool3d(x, kernel, stride, padding))


@dtypes
def test_not_a_number_wins(dtype: torch.dtype) -> None:
    x = torch.randn(1, 5, 4, 6, 6).to(dtype)
    x[0, 2, 1, 2, 3] = float("nan")
    x[0, 3, :2] = float("-inf")
    y, want = pool.max_pool3d(x, 3, 2, 1), F.max_pool3d(x, 3, 2, 1)
    assert want.isnan().any()
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y.nan_to_num(), want.nan_to_num())


@dtypes
@pytest.mark.parametrize("shape", [(2, 64, 2, 7, 7), (3, 7, 1, 1, 1), (1, 130, 3, 5, 7), (0, 8, 2, 2, 2)])
def test_global_average(shape, dtype) -> None:
    x = (torch.randn(shape) + 1).to(dtype)
    y = pool.global_avg_pool3d(x)
    assert y.dtype == dtype
    assert_keeps_promise(y, x.double().mean((2, 3, 4)))


@dtypes
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("shape", "classes"),
    [((2, 64, 2, 7, 7), 10), ((3, 7, 1, 1, 1), 1), ((1, 230, 1, 3, 3), 33), ((0, 8, 2, 2, 2), 5)],
)
def test_head(shape, classes, bias, dtype) -> None:
    """Averaged and multiplied in float32, rounded once: within the rounding of the output."""
    x = (torch.randn(shape) + 1).to(dtype)
    weight = (torch.randn(classes, shape[1]) / shape[1] ** 0.5).to(dtype)
    b = torch.randn(classes).to(dtype) if bias else None
    y = pool.avg_pool_linear(x, weight, b)
    assert y.dtype == dtype
    exact = reference.avg_pool_linear(x.double(), weight.double(), None if b is None else b.double())
    assert_keeps_promise(y, exact)


def test_head_of_strided_parameters() -> None:
    x, weight, bias = torch.randn(2, 20, 2, 3, 3), torch.randn(20, 9), torch.randn(18)
    want = pool.avg_pool_linear(x, weight.t().contiguous(), bias[::2].contiguous())
    assert torch.equal(pool.avg_pool_linear(x.contiguous(), weight.t(), bias[::2]), want)


def test_opcheck() -> None:
    x = torch.randn(2, 5, 4, 6, 6)
    ops = torch.ops.r3d_kernels
    for bias in (None, torch.randn(3)):
        torch.library.opcheck(ops.triton_avg_pool_linear, (x, torch.randn(3, 5), bias))
    torch.library.opcheck(ops.triton_max_pool3d, (x, [3, 3, 3], [2, 2, 2], [1, 1, 1]))
    torch.library.opcheck(ops.triton_global_avg_pool3d, (x,))


X = torch.zeros(1, 2, 4, 4, 4)
WRONG_POOLS = {
    "rank": (torch.zeros(3, 4), 2),
    "no tensor": ([1.0], 2),
    "kernel": (X, 0),
    "stride": (X, 2, 0),
    "padding": (X, 2, 1, -1),
    "half": (X, 3, 1, 2),
    "window": (X[:, :, :2], 3),
    "two": (X, (1, 2)),
    "text": (X, "3"),
}
WRONG_HEADS = {
    "rank": (X[0], torch.zeros(3, 2)),
    "empty": (X[:, :, :0], torch.zeros(3, 2)),
    "no tensor": (X, None),
    "weight": (X, torch.zeros(3, 4)),
    "dtype": (X, torch.zeros(3, 2).half()),
    "bias": (X, torch.zeros(3, 2), torch.zeros(4)),
    "bias's dtype": (X, torch.zeros(3, 2), torch.zeros(3).half()),
}


@pytest.mark.parametrize(
    ("call", "twin", "arguments"),
    [(pool.max_pool3d, ops.max_pool3d, a) for a in WRONG_POOLS.values()]
    + [(pool.avg_pool_linear, ops.avg_pool_linear, a) for a in WRONG_HEADS.values()],
    ids=[*WRONG_POOLS, *(f"head {name}" for name in WRONG_HEADS)],
)
def test_wrong_input_is_refused_in_the_words_of_the_other_kernels(call, twin, arguments) -> None:
    with pytest.raises((TypeError, ValueError)) as theirs:
        twin(*arguments)
    with pytest.raises(theirs.type) as ours:
        call(*arguments)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("call", [lambda x: pool.max_pool3d(x, 2), pool.global_avg_pool3d])
def test_wrong_dtype(call) -> None:
    with pytest.raises(TypeError, match=r"x: expected float32, bfloat16 or float16, got torch\.float64"):
        call(X.double())


# ---- through the package's own ops and models ----


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """Which of ours in Triton ran."""
    names = []
    for name in ("run_max_pool3d", "run_avg_pool_linear"):
        real = getattr(pool, name)
        monkeypatch.setattr(pool, name, lambda *a, name=name, real=real: names.append(name) or real(*a))
    return names


@dtypes
def test_asked_for_by_the_backend(dtype: torch.dtype, ran) -> None:
    x = torch.randn(2, 6, 4, 6, 6).to(dtype)
    weight, bias = torch.randn(3, 6).to(dtype), torch.randn(3).to(dtype)
    y, logits = ops.max_pool3d(x, 3, 2, 1), ops.avg_pool_linear(x, weight, bias)
    assert ran == []
    with r3d.backend("triton"):
        assert torch.equal(ops.max_pool3d(x, 3, 2, 1), y)
        ours = ops.avg_pool_linear(x, weight, bias)
        assert ran == ["run_max_pool3d", "run_avg_pool_linear"]
        ops.max_pool3d(x.double(), 2)  # which it does not have
        ops.max_pool3d(x.requires_grad_(), 2).sum().backward()  # nor gradients
    assert len(ran) == 2
    exact = reference.avg_pool_linear(x.double(), weight.double(), bias.double())
    assert_keeps_promise(ours, exact)
    assert_keeps_promise(logits, exact)


def test_the_layers_of_a_network_go_the_same_way(ran) -> None:
    x, pools, fc = torch.randn(1, 6, 4, 8, 8), torch.nn.MaxPool3d(3, 2, 1), torch.nn.Linear(6, 3)
    with torch.inference_mode():
        want = layers.avg_pool_linear(layers.max_pool3d(x, pools), fc)
        assert ran == []
        with r3d.backend("triton"):
            y = layers.avg_pool_linear(layers.max_pool3d(x, pools), fc)
            assert ran == ["run_max_pool3d", "run_avg_pool_linear"]
            layers.avg_pool_linear(layers.max_pool3d(x, pools, fused=False), fc, fused=False)
    assert len(ran) == 2
    assert relative_error(y, want.double()) < 1e-6
