"""Pooling in Triton against torch, bit by bit where nothing is rounded; run by the interpreter on CPU tensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_keeps_promise

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


def test_opcheck() -> None:
    x = torch.randn(2, 5, 4, 6, 6)
    ops = torch.ops.r3d_kernels
    torch.library.opcheck(ops.triton_max_pool3d, (x, [3, 3, 3], [2, 2, 2], [1, 1, 1]))
    torch.library.opcheck(ops.triton_global_avg_pool3d, (x,))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3, 4), 2), ValueError, r"x: expected \[N, C, D, H, W\].*\[3, 4\]"),
        ((torch.zeros(1, 2, 4, 4, 4).double(), 2), TypeError, "x: expected float32, bfloat16 or float16"),
        ((torch.zeros(1, 2, 4, 4, 4), 0), ValueError, "kernel_size: expected integers >= 1"),
        ((torch.zeros(1, 2, 4, 4, 4), 2, 0), ValueError, "stride: expected integers >= 1"),
        ((torch.zeros(1, 2, 4, 4, 4), 2, 1, -1), ValueError, "padding: expected integers >= 0"),
        ((torch.zeros(1, 2, 4, 4, 4), 3, 1, 2), ValueError, "padding: expected at most half of kernel_size"),
        ((torch.zeros(1, 2, 2, 4, 4), 3), ValueError, "kernel_size: the window.*does not fit"),
        ((torch.zeros(1, 2, 4, 4, 4), (1, 2)), TypeError, "kernel_size: expected an int or three ints"),
    ],
)
def test_wrong_input(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        pool.max_pool3d(*arguments)
