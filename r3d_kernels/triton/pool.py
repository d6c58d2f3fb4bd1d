"""Max-pooling and the global average over channels-last tensors, in Triton."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from r3d_kernels import _check
from r3d_kernels.triton.launch import Launch, channels_last, check_operand, empty, on_device

__all__ = ["global_avg_pool3d", "max_pool3d"]


@triton.jit(
    do_not_specialize=[
        "M",
        "D",
        "H",
        "W",
        "OD",
        "OH",
        "OW",
        "sd",
        "sh",
        "sw",
        "pd",
        "ph",
        "pw",
        "T",
        "R",
        "S",
    ]
)
def _max_pool(
    x_ptr,
    y_ptr,
    M,  # output pixels
    C,
    D,
    H,
    W,
    OD,
    OH,
    OW,
    sd,
    sh,
    sw,
    pd,
    ph,
    pw,
    T,
    R,
    S,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    if WIDE:
        m = m.to(tl.int64)
    m_ok = m < M
    c_ok = (cols < C)[None, :]
    row = m // OW
    plane = row // OH
    n = plane // OD
    d0 = (plane - n * OD) * sd - pd
    h0 = (row - plane * OH) * sh - ph
    w0 = (m - row * OW) * sw - pw
    best = tl.full((BM, BC), float("-inf"), tl.float32)
    for i in range(0, T * R * S):
        t = i // (R * S)
        d = d0 + t
        h = h0 + (i // S - t * R)
        w = w0 + i % S
        mask = m_ok & (d >= 0) & (d < D) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        x_rows = (((n * D + d) * H + h) * W + w) * C
        x = tl.load(x_ptr + x_rows[:, None] + cols[None, :], mask=mask[:, None] & c_ok, other=float("-inf"))
        x = x.to(tl.float32)
        best = tl.where((x > best) | (x != x), x, best)  # a NaN wins and stays
    tl.store(
        y_ptr + (m * C)[:, None] + cols[None, :], best.to(y_ptr.dtype.element_ty), mask=m_ok[:, None] & c_ok
    )


@triton.jit(do_not_specialize=["size"])
def _average(x_ptr, y_ptr, C, size, BM: tl.constexpr, BC: tl.constexpr):
    """The mean of [size, C] for each sample."""
    n = tl.program_id(0)
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    x_ptr += n.to(tl.int64) * size * C
    acc = tl.zeros((BM, BC), tl.float32)
    for start in range(0, size, BM):
        rows = start + tl.arange(0, BM)
        mask = (rows < size)[:, None] & (cols < C)[None, :]
        acc += tl.load(x_ptr + (rows.to(tl.int64) * C)[:, None] + cols[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
    y = tl.sum(acc, axis=0) / size
    tl.store(y_ptr + n * C + cols, y.to(y_ptr.dtype.element_ty), mask=cols < C)


def _checked(x: Tensor) -> None:
    check_operand(x, "x")
    if x.dim() != 5 or min(x.shape[1:]) < 1:
        raise ValueError(f"x: expected [N, C, D, H, W], empty in N only, got shape {list(x.shape)}")


def max_pool3d(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
) -> Tensor:
    """Maximum over windows; NaN wins, as in torch. No gradient flows.

    Args:
        x: [N, C, D, H, W], float32, bfloat16 or float16, on a GPU.
        kernel_size, stride, padding: an int or three (depth, height, width); stride is kernel_size by default,
            padding at most half of kernel_size.

    Returns:
        [N, C, D', H', W'] of x's dtype, channels_last_3d.

    Raises:
        TypeError, ValueError: for wrong arguments, by name.
    """
    _check.tensor(x, "x")
    kernel = _check.triple(kernel_size, "kernel_size")
    steps = kernel if stride is None else _check.triple(stride, "stride")
    return torch.ops.r3d_kernels.triton_max_pool3d(x, kernel, steps, _check.triple(padding, "padding"))


def _pooled(sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]):
    return [(i + 2 * p - k) // s + 1 for i, k, s, p in zip(sizes, kernel, stride, padding, strict=True)]


@torch.library.custom_op(
    "r3d_kernels::triton_max_pool3d",
    mutates_args=(),
    schema="(Tensor x, int[] kernel_size, int[] stride, int[] padding) -> Tensor",
)
def _max_pool3d(x, kernel_size, stride, padding):
    _checked(x)
    for name, values, least in (
        ("kernel_size", kernel_size, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
    ):
        if min(values) < least:
            raise ValueError(f"{name}: expected integers >= {least}, got {list(values)}")
    if any(2 * p > k for p, k in zip(padding, kernel_size, strict=True)):
        raise ValueError(
            f"padding: expected at most half of kernel_size {list(kernel_size)}, got {list(padding)}"
        )
    size = _pooled(x.shape[2:], kernel_size, stride, padding)
    if min(size) < 1:
        raise ValueError(
            f"kernel_size: the window {list(kernel_size)} does not fit into input {list(x.shape[2:])} "
            f"with padding {list(padding)}"
        )
    n, c, *space = x.shape
    y = empty((n, c, *size), x)
    m = n * math.prod(size)
    if m:
        x = channels_last(x)
        wide = max(x.numel(), y.numel()) >= 2**31 - 2**16
        with on_device(x):
            _max_pool_launch(m, c, (*space, *size, *stride, *padding, *kernel_size), wide)(x, y)
    return y


@lru_cache(maxsize=1024)
def _max_pool_launch(m: int, c: int, geometry: tuple[int, ...], wide: bool) -> Launch:
    bc = min(64, max(16, triton.next_power_of_2(c)))
    bm = 2048 // bc
    grid = (triton.cdiv(m, bm), triton.cdiv(c, bc))
    return Launch(_max_pool, grid, (m, c, *geometry), {"WIDE": wide, "BM": bm, "BC": bc, "num_warps": 4})


@_max_pool3d.register_fake
def _(x, kernel_size, stride, padding):
    size = _pooled(x.shape[2:], kernel_size, stride, padding)
    return torch.empty(
        (*x.shape[:2], *size), dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d
    )


def global_avg_pool3d(x: Tensor) -> Tensor:
    """The mean over D, H and W. No gradient flows.

    Args:
        x: [N, C, D, H, W], float32, bfloat16 or float16, on a GPU.

    Returns:
        [N, C] of x's dtype; summed in float32 and rounded once.

    Raises:
        TypeError, ValueError: for wrong arguments, by name.
    """
    return torch.ops.r3d_kernels.triton_global_avg_pool3d(_check.tensor(x, "x"))


@torch.library.custom_op(
    "r3d_kernels::triton_global_avg_pool3d", mutates_args=(), schema="(Tensor x) -> Tensor"
)
def _global_avg_pool3d(x):
    _checked(x)
    n, c, *space = x.shape
    y = x.new_empty((n, c))
    if n:
        x = channels_last(x)
        with on_device(x):
            _average_launch(n, c, math.prod(space))(x, y)
    return y


@lru_cache(maxsize=1024)
def _average_launch(n: int, c: int, size: int) -> Launch:
    bc = min(64, max(16, triton.next_power_of_2(c)))
    return Launch(_average, (n, triton.cdiv(c, bc)), (c, size), {"BM": 32, "BC": bc, "num_warps": 4})


@_global_avg_pool3d.register_fake
def _(x):
    return x.new_empty(x.shape[:2])
