"""Max-pooling, the global average and the classifier's head over channels-last tensors, in Triton.

The operations are `torch.library.triton_op`s: called, they go the short way of `launch.Launch`; under torch.compile
inductor sees their kernels and launches them from its own code, without an operation around them. That is cheap here,
because nothing about these launches is measured: grids and tiles follow from the sizes, symbolic ones too. `conv3d.py`
and `norm.py` say why theirs are opaque.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.library import CustomOpDef, custom_op, triton_op, wrap_triton

from r3d_kernels import _check
from r3d_kernels.triton.backend import interpreted
from r3d_kernels.triton.launch import Launch, channels_last, check_operand, empty, on_device

__all__ = ["avg_pool_linear", "global_avg_pool3d", "max_pool3d"]


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
    first = tl.program_id(0)
    if WIDE:
        first = first.to(tl.int64)
    m = first * BM + tl.arange(0, BM)
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


@triton.jit
def _linear(
    means_ptr,  # float32 [N, C]
    w_ptr,  # [K, C]
    b_ptr,
    y_ptr,  # [N, K]
    C,
    K,
    HAS_BIAS: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
):
    """BK classes of a sample: products and sums in float32, rounded once."""
    n = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    k_ok = k < K
    acc = tl.zeros((BK, BC), tl.float32)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        c_ok = c < C
        mean = tl.load(means_ptr + n * C + c, mask=c_ok, other=0.0)
        w = tl.load(w_ptr + k[:, None] * C + c[None, :], mask=k_ok[:, None] & c_ok[None, :], other=0.0)
        acc += w.to(tl.float32) * mean[None, :]
    y = tl.sum(acc, axis=1)
    if HAS_BIAS:
        y += tl.load(b_ptr + k, mask=k_ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + n * K + k, y.to(y_ptr.dtype.element_ty), mask=k_ok)


# ---- launches ----

# Each: (grid, sizes, constants and options), of integers or of the symbolic ones of a trace.
_Plan = tuple[tuple[int, ...], tuple[int, ...], dict[str, object]]


def _columns(c: int) -> int:
    """Channels of a tile; comparisons, because c may be symbolic."""
    return 16 if c <= 16 else 32 if c <= 32 else 64


def _plan_max_pool(m: int, c: int, geometry: tuple[int, ...], wide: bool) -> _Plan:
    bc = _columns(c)
    bm = 2048 // bc
    return (-(-m // bm), -(-c // bc)), (m, c, *geometry), {"WIDE": wide, "BM": bm, "BC": bc, "num_warps": 4}


def _plan_average(n: int, c: int, size: int) -> _Plan:
    bc = _columns(c)
    return (n, -(-c // bc)), (c, size), {"BM": 32, "BC": bc, "num_warps": 4}


def _plan_linear(n: int, c: int, k: int, bias: bool) -> _Plan:
    return (n, -(-k // 16)), (c, k), {"HAS_BIAS": bias, "BK": 16, "BC": 128, "num_warps": 4}


@lru_cache(maxsize=1024)
def _max_pool_launch(m: int, c: int, geometry: tuple[int, ...], wide: bool) -> Launch:
    return Launch(_max_pool, *_plan_max_pool(m, c, geometry, wide))


@lru_cache(maxsize=1024)
def _average_launch(n: int, c: int, size: int) -> Launch:
    return Launch(_average, *_plan_average(n, c, size))


@lru_cache(maxsize=1024)
def _linear_launch(n: int, c: int, k: int, bias: bool) -> Launch:
    return Launch(_linear, *_plan_linear(n, c, k, bias))


def _visible(name: str) -> Callable[[Callable[..., Tensor]], CustomOpDef]:
    """A `triton_op`; opaque under the interpreter, which has only Python to show."""

    def register(function: Callable[..., Tensor]) -> CustomOpDef:
        if not interpreted():
            return triton_op(name, function, mutates_args=())
        operation = custom_op(name, function, mutates_args=())
        operation.register_fake(function)
        return operation

    return register


def _has_data(x: Tensor) -> bool:
    """False for what is traced: its kernels are shown to the compiler."""
    return type(x) in (Tensor, torch.nn.Parameter)


# ---- operations ----


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
        RuntimeError: for a first call inside the capture of a CUDA graph.
    """
    window = _check.pool_window(x, kernel_size, stride, padding)
    return torch.ops.r3d_kernels.triton_max_pool3d(x, *window)


@_visible("r3d_kernels::triton_max_pool3d")
def _max_pool3d(
    x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    check_operand(x, "x")
    if _has_data(x):
        kernel_size, stride, padding = _check.pool_window(x, kernel_size, stride, padding)
    return run_max_pool3d(x, kernel_size, stride, padding)


def run_max_pool3d(
    x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """`max_pool3d`, of what is known to fit."""
    n, c, *space = x.shape
    axes = zip(space, kernel_size, stride, padding, strict=True)
    size = [(i + 2 * p - k) // s + 1 for i, k, s, p in axes]
    y = empty((n, c, *size), x)
    m = n * math.prod(size)
    if isinstance(x, FakeTensor) or m * c == 0:
        return y
    x = channels_last(x)
    geometry = (*space, *size, *stride, *padding, *kernel_size)
    wide = max(x.numel(), y.numel()) >= 2**31 - 2**16
    if not _has_data(x):
        grid, sizes, constants = _plan_max_pool(m, c, geometry, wide)
        wrap_triton(_max_pool)[grid](x, y, *sizes, **constants)
        return y
    with on_device(x):
        _max_pool_launch(m, c, geometry, wide)(x, y)
    return y


def global_avg_pool3d(x: Tensor) -> Tensor:
    """The mean over D, H and W. No gradient flows.

    Args:
        x: [N, C, D, H, W], float32, bfloat16 or float16, on a GPU.

    Returns:
        [N, C] of x's dtype; summed in float32 and rounded once.

    Raises:
        TypeError, ValueError: for wrong arguments, by name.
        RuntimeError: for a first call inside the capture of a CUDA graph.
    """
    return torch.ops.r3d_kernels.triton_global_avg_pool3d(_check.only_batch_empty(x))


def _mean(x: Tensor, y: Tensor) -> None:
    """Into y [N, C]."""
    n, c, *space = x.shape
    x = channels_last(x)
    if not _has_data(x):
        grid, sizes, constants = _plan_average(n, c, math.prod(space))
        wrap_triton(_average)[grid](x, y, *sizes, **constants)
    else:
        _average_launch(n, c, math.prod(space))(x, y)


@_visible("r3d_kernels::triton_global_avg_pool3d")
def _global_avg_pool3d(x: Tensor) -> Tensor:
    check_operand(x, "x")
    _check.only_batch_empty(x)
    y = x.new_empty(x.shape[:2])
    if isinstance(x, FakeTensor) or x.shape[0] == 0:
        return y
    with on_device(x):
        _mean(x, y)
    return y


def avg_pool_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear(mean of x over D, H, W)``. No gradient flows.

    Args:
        x: [N, C, D, H, W], float32, bfloat16 or float16, on a GPU.
        weight: [classes, C], dtype of x.
        bias: [classes], dtype of x, or None.

    Returns:
        [N, classes] of x's dtype; averaged and multiplied in float32 and rounded once.

    Raises:
        TypeError, ValueError: for arguments that do not fit together, by name.
        RuntimeError: for a first call inside the capture of a CUDA graph.
    """
    _check.head(x, weight, bias)
    return torch.ops.r3d_kernels.triton_avg_pool_linear(x, weight, bias)


@_visible("r3d_kernels::triton_avg_pool_linear")
def _avg_pool_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_operand(x, "x")
    _check.head(x, weight, bias)
    return run_avg_pool_linear(x, weight, bias)


def run_avg_pool_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`avg_pool_linear`, of what is known to fit."""
    (n, c), k = x.shape[:2], weight.shape[0]
    y = x.new_empty((n, k))
    if isinstance(x, FakeTensor) or n * k == 0:
        return y
    means = x.new_empty((n, c), dtype=torch.float32)
    weight = weight.contiguous()
    b = y if bias is None else bias.contiguous()  # what is None is not read
    with on_device(x):
        _mean(x, means)
        if not _has_data(x):
            grid, sizes, constants = _plan_linear(n, c, k, bias is not None)
            wrap_triton(_linear)[grid](means, weight, b, y, *sizes, **constants)
        else:
            _linear_launch(n, c, k, bias is not None)(means, weight, b, y)
    return y
