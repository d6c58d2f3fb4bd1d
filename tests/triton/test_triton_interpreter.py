"""The mended interpreter: each fault of Triton's own that it hides is shown on a kernel of three lines."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.usefixtures("interpreter")


@triton.jit
def _cast(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(tl.float32).to(tl.bfloat16))


@triton.jit
def _widen(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(tl.float32))


@triton.jit
def _dot(a_ptr, b_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    tl.store(y_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@triton.jit
def _count(y_ptr, n):
    total = 0
    for _ in range(0, n):
        total += 1
    tl.store(y_ptr, total)


def _values(size: int) -> torch.Tensor:
    """Normal numbers, ties between two bfloat16 values, infinities and NaN."""
    x = torch.randn(size)
    ties = (x[: size // 2].bfloat16().float().view(torch.int32) + 0x8000).view(torch.float32)
    x[: size // 2] = ties
    x[-4:] = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0])
    return x


def test_rounding_is_to_nearest_even() -> None:
    x = _values(256)
    y = torch.empty(256, dtype=torch.bfloat16)
    _cast[(1,)](x, y, BLOCK=256)
    assert torch.equal(y.nan_to_num(nan=7.0), x.bfloat16().nan_to_num(nan=7.0))
    assert y.isnan().sum() == 1
    truncated = (x.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    assert not torch.equal(y[:128], truncated[:128])  # what the interpreter does by itself


def test_widening_is_exact() -> None:
    x = _values(256).bfloat16()
    y = torch.empty(256)
    _widen[(1,)](x, y, BLOCK=256)
    assert torch.equal(y.nan_to_num(nan=7.0), x.float().nan_to_num(nan=7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dot(dtype: torch.dtype) -> None:
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 16).to(dtype)
    y = torch.empty(16, 16)
    _dot[(1,)](a, b, y, BLOCK=16)
    want = a.double() @ b.double()
    assert (y.double() - want).norm() <= 1e-6 * want.norm()


def test_a_scalar_bounds_a_loop() -> None:
    y = torch.zeros(1, dtype=torch.int32)
    _count[(1,)](y, 5)
    assert y.item() == 5


def test_the_process_is_interpreted() -> None:
    """Else everything here would pass by not running."""
    assert type(_dot).__name__ == "InterpretedFunction"
