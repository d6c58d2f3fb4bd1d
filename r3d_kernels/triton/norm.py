"""Batch norm with the statistics of the batch, residual and ReLU, forward and backward, over channels-last tensors.

Two passes each way: one over x for the statistics and one that writes y; one over x, y and dy for the sums and one
that writes dx and dresidual. y tells where the ReLU let something through; without a residual it follows from x, and is
not read. Statistics are sums of differences from a mean of a few of the data, merged by the parallel algorithm of Chan,
Golub and LeVeque ("Algorithms for computing the sample variance", 1983), so that a mean far above the standard
deviation costs no digits. Sums are float32 in a fixed order: the same call gives the same bits.

With two bytes a value arithmetic counts: what is done for each tile (reductions, masks, square roots) took longer than
the tile's way from memory. A pass that writes goes backwards through the tensors, since what the pass before it read
last is still in the L2 cache.

The operations are opaque to torch.compile and no `torch.library.triton_op`: that would put the launches into the graph,
which saves the dispatch of an operation (benchmarks/launch_overhead.py) and nothing on the GPU, since inductor fuses
nothing into them. In return the parts and grids, which follow from the sizes, would make a new graph of every size
where one with symbolic sizes serves all, and what runs under torch.compile would no longer be what the interpreter
proves.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from r3d_kernels import _check
from r3d_kernels.ops.conv3d import needs_gradient
from r3d_kernels.triton.launch import Launch, channels_last, check_operand, is_bare, on_device

__all__ = ["batch_norm_act"]

# Of a pass that sums, by bytes of a value: rows of a tile of 64 channels, and programs. All are there at once on the
# 132 multiprocessors of an H200 (as many on each as registers allow), so that the pass goes through the tensors in
# order. Each has its next tile on the way while it adds one up: 40 KiB a multiprocessor and more, where 4.8 TB/s and
# three quarters of a microsecond want about 30.
_STATISTICS = {2: (64, 5 * 132), 4: (64, 4 * 132)}
_GRADIENT_SUMS = {2: (32, 5 * 132), 4: (32, 4 * 132)}
# Of a pass that writes: rows of a tile. A program takes the same bytes whatever the type.
_WRITING = {2: 128, 4: 64}


# ---- kernels: x is [M, C], pixels by channels ----
#
# A part is every `parts`-th tile of BM rows. Sums are kept for BM * BC / FOLD rows of a tile, which a thread adds up
# among its own values; threads meet once, behind the loop. Whole tiles need no mask of rows, and where BC divides C
# (EVEN) none of columns. What a mask leaves out of a load is undefined, and neither stored nor added.


@triton.jit
def _offsets(C, cols, BM: tl.constexpr):
    """Of a tile, from its first row."""
    return (tl.arange(0, BM) * C)[:, None] + cols[None, :]


@triton.jit
def _at(ptr, tile, C, BM: tl.constexpr):
    """The first row of a tile, which may be beyond 2^31 values."""
    return ptr + (tile * BM).to(tl.int64) * C


@triton.jit
def _whole(ptr, tile, tiles, C, cols, offsets, BM: tl.constexpr, EVEN: tl.constexpr):
    """A tile of rows that are all there; undefined from the number of `tiles` on."""
    mask = tile + tl.zeros((1, 1), tl.int32) < tiles  # the interpreter makes no mask of a number
    if not EVEN:
        mask = mask & (cols < C)[None, :]
    return tl.load(_at(ptr, tile, C, BM) + offsets, mask=mask)


@triton.jit
def _there(tile, M, C, cols, BM: tl.constexpr, EVEN: tl.constexpr):
    """The mask of a tile that may end beyond the last row."""
    mask = (tile * BM + tl.arange(0, BM) < M)[:, None]
    if not EVEN:
        mask = mask & (cols < C)[None, :]
    return mask


@triton.jit
def _fold(x, FOLD: tl.constexpr):
    """Adds up the rows of a tile that one thread holds."""
    return tl.sum(tl.reshape(x, (FOLD, x.shape[0] // FOLD, x.shape[1])), axis=0)


@triton.jit
def _rows_of(part, parts, M, BM: tl.constexpr):
    """The rows of a part: its whole tiles, and what is left behind the last whole one of all."""
    tiles = M // BM
    return (tiles - part + parts - 1) // parts * BM + tl.where(part == tiles % parts, M - tiles * BM, 0)


@triton.jit(do_not_specialize=["M", "parts"])
def _statistics(
    x_ptr,
    mean_ptr,  # float32 [parts, C]: less the first row
    var_ptr,  # float32 [parts, C]: sums of squared differences from the part's mean
    M,
    C,
    parts,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Mean and squared differences of a part of the rows.

    Differences are taken from the mean of the part's first tile. Its rows are among the data: that mean is at most
    sqrt(n / BM) deviations of the part from the mean of its n rows, so that the difference of sums at the end loses a
    factor of 1 + n / BM at worst, and next to nothing where the first tile is like the others.
    """
    part = tl.program_id(0)
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    offsets = _offsets(C, cols, BM)
    tiles = M // BM
    x = tl.load(_at(x_ptr, part, C, BM) + offsets, mask=_there(part, M, C, cols, BM, EVEN), other=0.0)
    pivot = tl.sum(x.to(tl.float32), axis=0) / tl.minimum(M - part * BM, BM).to(tl.float32)
    sums = tl.zeros((BM // FOLD, BC), tl.float32)
    squares = tl.zeros((BM // FOLD, BC), tl.float32)
    for tile in range(part, tiles, parts):
        following = _whole(x_ptr, tile + parts, tiles, C, cols, offsets, BM, EVEN)
        apart = x.to(tl.float32) - pivot[None, :]
        sums += _fold(apart, FOLD)
        squares += _fold(apart * apart, FOLD)
        x = following
    if part == tiles % parts:
        mask = _there(tiles, M, C, cols, BM, EVEN)
        x = tl.load(_at(x_ptr, tiles, C, BM) + offsets, mask=mask, other=0.0)
        apart = tl.where(mask, x.to(tl.float32) - pivot[None, :], 0.0)
        sums += _fold(apart, FOLD)
        squares += _fold(apart * apart, FOLD)
    total = tl.sum(sums, axis=0)
    mean = total / _rows_of(part, parts, M, BM).to(tl.float32)
    square = tl.sum(squares, axis=0) - total * mean
    square = tl.where(square < 0.0, 0.0, square)  # rounding; not a number stays one
    # All means are kept as differences from one row, which is among the data as well: the mean may be far from zero.
    first = tl.load(x_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    tl.store(mean_ptr + part * C + cols, (pivot - first) + mean, mask=cols < C)
    tl.store(var_ptr + part * C + cols, square, mask=cols < C)


@triton.jit(do_not_specialize=["M", "parts"])
def _merge_statistics(
    x_ptr,
    mean_ptr,
    var_ptr,
    out_ptr,  # float32 [2, C]: mean, variance over M
    M,
    C,
    parts,
    BM: tl.constexpr,
    PARTS: tl.constexpr,
    BC: tl.constexpr,
):
    """The statistics of all parts together."""
    part = tl.arange(0, PARTS)
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    c_ok = cols < C
    mask = (part < parts)[:, None] & c_ok[None, :]
    offsets = (part * C)[:, None] + cols[None, :]
    pivot = tl.load(x_ptr + cols, mask=c_ok, other=0.0).to(tl.float32)
    means = tl.load(mean_ptr + offsets, mask=mask, other=0.0)
    squares = tl.load(var_ptr + offsets, mask=mask, other=0.0)
    counts = tl.where(part < parts, _rows_of(part, parts, M, BM), 0).to(tl.float32)[:, None]
    total = M.to(tl.float32)
    mean = tl.sum(means * counts, axis=0) / total
    apart = means - mean[None, :]
    var = (tl.sum(squares, axis=0) + tl.sum(apart * apart * counts, axis=0)) / total
    tl.store(out_ptr + cols, pivot + mean, mask=c_ok)
    tl.store(out_ptr + C + cols, var, mask=c_ok)


@triton.jit(do_not_specialize=["M", "eps"])
def _apply(
    x_ptr,
    mean_ptr,  # float32 [2, C]: mean, variance
    gamma_ptr,
    beta_ptr,
    res_ptr,
    y_ptr,
    M,
    C,
    eps,
    AFFINE: tl.constexpr,
    HAS_RES: tl.constexpr,
    RELU: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """y = act((x - mean) / sqrt(variance + eps) * gamma + beta + residual)"""
    tile = _last_first()
    if EVEN and (tile + 1) * BM <= M:
        _apply_to(
            *(x_ptr, mean_ptr, gamma_ptr, beta_ptr, res_ptr, y_ptr),
            *(tile, M, C, eps, AFFINE, HAS_RES, RELU, True, EVEN, BM, BC),
        )
    else:
        _apply_to(
            *(x_ptr, mean_ptr, gamma_ptr, beta_ptr, res_ptr, y_ptr),
            *(tile, M, C, eps, AFFINE, HAS_RES, RELU, False, EVEN, BM, BC),
        )


@triton.jit
def _apply_to(
    x_ptr,
    mean_ptr,
    gamma_ptr,
    beta_ptr,
    res_ptr,
    y_ptr,
    tile,
    M,
    C,
    eps,
    AFFINE: tl.constexpr,
    HAS_RES: tl.constexpr,
    RELU: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """A tile; all its loads come first: a mask for each would make the compiler put some of them behind others."""
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    offsets = _offsets(C, cols, BM)
    mask = None if WHOLE else _there(tile, M, C, cols, BM, EVEN)
    x = tl.load(_at(x_ptr, tile, C, BM) + offsets, mask=mask)
    if HAS_RES:
        res = tl.load(_at(res_ptr, tile, C, BM) + offsets, mask=mask)
    mean, _, factor, shift = _columns(mean_ptr, gamma_ptr, beta_ptr, C, cols, eps, AFFINE, EVEN)
    # (x - mean) first: x * factor + shift would lose what a large mean cancels
    y = (x.to(tl.float32) - mean[None, :]) * factor[None, :] + shift[None, :]
    if HAS_RES:
        y += res.to(tl.float32)
    if RELU:
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(_at(y_ptr, tile, C, BM) + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _last_first():
    """The tile of a program, in the order opposite to that of the pass before."""
    return tl.num_programs(0) - 1 - tl.program_id(0)


@triton.jit
def _vector(ptr, C, cols, EVEN: tl.constexpr):
    return tl.load(ptr + cols, mask=None if EVEN else cols < C)


@triton.jit
def _columns(mean_ptr, gamma_ptr, beta_ptr, C, cols, eps, AFFINE: tl.constexpr, EVEN: tl.constexpr):
    """Mean, 1 / deviation, what (x - mean) is multiplied by, and what is added."""
    mean = _vector(mean_ptr, C, cols, EVEN)
    scale = tl.rsqrt(_vector(mean_ptr + C, C, cols, EVEN) + eps)
    if AFFINE:
        factor = scale * _vector(gamma_ptr, C, cols, EVEN)
        shift = _vector(beta_ptr, C, cols, EVEN)
    else:
        factor = scale
        shift = tl.zeros(scale.shape, tl.float32)
    return mean, scale, factor, shift


@triton.jit
def _before_relu(dy, x, y, apart, factor, shift, RELU: tl.constexpr):
    """dz: dy where the ReLU let something through, 0 elsewhere."""
    dz = dy.to(tl.float32)
    if RELU == "y":
        dz = tl.where(y.to(tl.float32) > 0.0, dz, 0.0)
    elif RELU == "x":
        y = apart * factor[None, :] + shift[None, :]
        # y was rounded: float16 makes 0 of half its least number, and bfloat16 only of what is next to float32's.
        # As a comparison, because the compiler takes a cast there and back for nothing.
        least: tl.constexpr = 2.9802322387695312e-08 if x.dtype == tl.float16 else 0.0
        dz = tl.where(y > least, dz, 0.0)
    return dz


@triton.jit(do_not_specialize=["M", "parts", "eps"])
def _gradient_sums(
    x_ptr,
    y_ptr,
    dy_ptr,
    mean_ptr,
    gamma_ptr,
    beta_ptr,
    sums_ptr,  # float32 [2, parts, C]: of dz, and of dz * normalised x
    M,
    C,
    parts,
    eps,
    AFFINE: tl.constexpr,
    RELU: tl.constexpr,  # "": none; "y", "x": what tells where it let something through
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    FOLD: tl.constexpr,
):
    part = tl.program_id(0)
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    offsets = _offsets(C, cols, BM)
    tiles = M // BM
    x = _whole(x_ptr, part, tiles, C, cols, offsets, BM, EVEN)
    y = x
    dy = _whole(dy_ptr, part, tiles, C, cols, offsets, BM, EVEN)
    if RELU == "y":
        y = _whole(y_ptr, part, tiles, C, cols, offsets, BM, EVEN)
    mean, scale, factor, shift = _columns(mean_ptr, gamma_ptr, beta_ptr, C, cols, eps, AFFINE, EVEN)
    dbeta = tl.zeros((BM // FOLD, BC), tl.float32)
    dgamma = tl.zeros((BM // FOLD, BC), tl.float32)
    for tile in range(part, tiles, parts):
        next_x = _whole(x_ptr, tile + parts, tiles, C, cols, offsets, BM, EVEN)
        next_y = next_x
        next_dy = _whole(dy_ptr, tile + parts, tiles, C, cols, offsets, BM, EVEN)
        if RELU == "y":
            next_y = _whole(y_ptr, tile + parts, tiles, C, cols, offsets, BM, EVEN)
        apart = x.to(tl.float32) - mean[None, :]
        dz = _before_relu(dy, x, y, apart, factor, shift, RELU)
        dbeta += _fold(dz, FOLD)
        dgamma += _fold(dz * apart, FOLD)
        x, y, dy = next_x, next_y, next_dy
    if part == tiles % parts:
        mask = _there(tiles, M, C, cols, BM, EVEN)
        x = tl.load(_at(x_ptr, tiles, C, BM) + offsets, mask=mask, other=0.0)
        y = x
        dy = tl.load(_at(dy_ptr, tiles, C, BM) + offsets, mask=mask, other=0.0)  # which adds nothing
        if RELU == "y":
            y = tl.load(_at(y_ptr, tiles, C, BM) + offsets, mask=mask, other=0.0)
        apart = x.to(tl.float32) - mean[None, :]
        dz = _before_relu(dy, x, y, apart, factor, shift, RELU)
        dbeta += _fold(dz, FOLD)
        dgamma += _fold(dz * apart, FOLD)
    tl.store(sums_ptr + part * C + cols, tl.sum(dbeta, axis=0), mask=cols < C)
    tl.store(sums_ptr + (parts + part) * C + cols, tl.sum(dgamma, axis=0) * scale, mask=cols < C)


@triton.jit(do_not_specialize=["parts"])
def _merge_sums(sums_ptr, grads_ptr, C, parts, PARTS: tl.constexpr, BC: tl.constexpr):
    """[2, parts, C] to [2, C]"""
    part = tl.arange(0, PARTS)
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    which = tl.program_id(1)
    mask = (part < parts)[:, None] & (cols < C)[None, :]
    sums = tl.load(sums_ptr + ((which * parts + part) * C)[:, None] + cols[None, :], mask=mask, other=0.0)
    tl.store(grads_ptr + which * C + cols, tl.sum(sums, axis=0), mask=cols < C)


@triton.jit(do_not_specialize=["M", "eps"])
def _input_gradient(
    x_ptr,
    y_ptr,
    dy_ptr,
    mean_ptr,
    gamma_ptr,
    beta_ptr,
    grads_ptr,  # float32 [2, C]: dbeta, dgamma
    dx_ptr,
    dres_ptr,
    M,
    C,
    eps,
    AFFINE: tl.constexpr,
    HAS_RES: tl.constexpr,
    RELU: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """dx = gamma * scale * (dz - (dbeta + normalised x * dgamma) / M), dresidual = dz"""
    tile = _last_first()
    if EVEN and (tile + 1) * BM <= M:
        _input_gradient_of(
            *(x_ptr, y_ptr, dy_ptr, mean_ptr, gamma_ptr, beta_ptr, grads_ptr, dx_ptr, dres_ptr),
            *(tile, M, C, eps, AFFINE, HAS_RES, RELU, True, EVEN, BM, BC),
        )
    else:
        _input_gradient_of(
            *(x_ptr, y_ptr, dy_ptr, mean_ptr, gamma_ptr, beta_ptr, grads_ptr, dx_ptr, dres_ptr),
            *(tile, M, C, eps, AFFINE, HAS_RES, RELU, False, EVEN, BM, BC),
        )


@triton.jit
def _input_gradient_of(
    x_ptr,
    y_ptr,
    dy_ptr,
    mean_ptr,
    gamma_ptr,
    beta_ptr,
    grads_ptr,
    dx_ptr,
    dres_ptr,
    tile,
    M,
    C,
    eps,
    AFFINE: tl.constexpr,
    HAS_RES: tl.constexpr,
    RELU: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    offsets = _offsets(C, cols, BM)
    mask = None if WHOLE else _there(tile, M, C, cols, BM, EVEN)
    x = tl.load(_at(x_ptr, tile, C, BM) + offsets, mask=mask)
    y = x
    dy = tl.load(_at(dy_ptr, tile, C, BM) + offsets, mask=mask)
    if RELU == "y":
        y = tl.load(_at(y_ptr, tile, C, BM) + offsets, mask=mask)
    mean, scale, factor, shift = _columns(mean_ptr, gamma_ptr, beta_ptr, C, cols, eps, AFFINE, EVEN)
    share = 1.0 / M.to(tl.float32)
    constant = _vector(grads_ptr, C, cols, EVEN) * share
    slope = _vector(grads_ptr + C, C, cols, EVEN) * share * scale
    apart = x.to(tl.float32) - mean[None, :]
    dz = _before_relu(dy, x, y, apart, factor, shift, RELU)
    if HAS_RES:
        tl.store(_at(dres_ptr, tile, C, BM) + offsets, dz.to(dres_ptr.dtype.element_ty), mask=mask)
    dx = (dz - constant[None, :] - apart * slope[None, :]) * factor[None, :]
    tl.store(_at(dx_ptr, tile, C, BM) + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)


# ---- launches ----


class _Plan:
    """Grids and sizes for one shape and size of a value."""

    def __init__(self, shape: tuple[int, ...], size: int) -> None:
        n, self.c, *space = shape
        self.m = n * space[0] * space[1] * space[2]
        if self.m >= 2**31 - 2**17:  # rows of tiles that are asked for, and not there
            raise ValueError(f"x: expected fewer than 2^31 pixels, got {self.m}")
        self.bc = min(64, max(16, triton.next_power_of_2(self.c)))
        self.blocks = triton.cdiv(self.c, self.bc)
        self.merge = triton.cdiv(self.c, 8)
        self.even = self.c % self.bc == 0
        self.statistics = self._summing(*_STATISTICS[size])
        self.gradients = self._summing(*_GRADIENT_SUMS[size])
        rows = _WRITING[size]
        if self.m // rows * self.blocks < 4 * 132:  # too few programs for the machine
            rows = 64
        self.elements = (triton.cdiv(self.m, rows), self.blocks)
        self.tiles = {"EVEN": self.even, "BM": rows, "BC": self.bc, "num_warps": 4}

    def _summing(self, rows: int, programs: int) -> _Summing:
        rows *= 64 // self.bc
        # At least 128 rows a part; what is left for the last kernel to add stays small.
        parts = max(1, min(programs // self.blocks, self.m // max(128, rows)))
        fold = rows * self.bc // 1024  # 8 sums a thread
        tiles = {"EVEN": self.even, "BM": rows, "BC": self.bc, "FOLD": fold, "num_warps": 4}
        merging = {"PARTS": triton.next_power_of_2(parts), "BC": 8, "num_warps": 4}
        return _Summing(parts, (parts, self.blocks), tiles, merging)


class _Summing(NamedTuple):
    """A pass that sums in parts."""

    parts: int
    grid: tuple[int, int]
    tiles: dict[str, Any]
    merging: dict[str, Any]


_plan = lru_cache(maxsize=1024)(_Plan)


class _Forward:
    """The launches of a forward pass, prepared once."""

    def __init__(
        self, shape: tuple[int, ...], size: int, eps: float, affine: bool, residual: bool, relu: bool
    ) -> None:
        p = _plan(shape, size)
        s = p.statistics
        self.part_shape, self.c = (s.parts, p.c), p.c
        self.statistics = Launch(_statistics, s.grid, (p.m, p.c, s.parts), s.tiles)
        merging = {"BM": s.tiles["BM"], **s.merging}
        self.merge = Launch(_merge_statistics, (p.merge,), (p.m, p.c, s.parts), merging)
        how = {"AFFINE": affine, "HAS_RES": residual, "RELU": relu, **p.tiles}
        self.apply = Launch(_apply, p.elements, (p.m, p.c, eps), how)


class _Backward:
    """The launches of a backward pass, prepared once."""

    def __init__(
        self, shape: tuple[int, ...], size: int, eps: float, affine: bool, residual: bool, relu: str
    ) -> None:
        p = _plan(shape, size)
        s = p.gradients
        self.parts_shape, self.c = (2, s.parts, p.c), p.c
        how = {"AFFINE": affine, "RELU": relu, **s.tiles}
        self.sums = Launch(_gradient_sums, s.grid, (p.m, p.c, s.parts, eps), how)
        self.merge = Launch(_merge_sums, (p.merge, 2), (p.c, s.parts), s.merging)
        how = {"AFFINE": affine, "HAS_RES": residual, "RELU": relu, **p.tiles}
        self.gradient = Launch(_input_gradient, p.elements, (p.m, p.c, eps), how)


_forward = lru_cache(maxsize=1024)(_Forward)
_backward_of = lru_cache(maxsize=1024)(_Backward)


def batch_norm_act(
    x: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str | None = "relu",
) -> tuple[Tensor, Tensor, Tensor]:
    """``act(batch_norm(x) + residual)`` with the statistics of this batch; y is differentiable.

    Args:
        x: [N, C, D, H, W], float32, bfloat16 or float16, on a GPU, more than one value a channel.
        gamma, beta: float32 [C], or both None.
        residual: as x, or None.
        eps: added to the variance.
        activation: "relu" or None.

    Returns:
        y, as x and channels_last_3d, computed in float32 and rounded once; mean and biased variance, float32 [C], for
        running statistics (no gradient flows through them).

    Raises:
        TypeError, ValueError: for arguments that do not fit together, by name.
        RuntimeError: for a first call, or a first backward, inside the capture of a CUDA graph.
    """
    act = _check.activation(activation)
    _check.tensor(x, "x")
    if not isinstance(eps, (int, float)) or not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps!r}")
    operands = (x, gamma, beta, residual)
    if not is_bare(*operands):
        y, statistics = torch.ops.r3d_kernels.triton_batch_norm_act(*operands, float(eps), act)
        mean, var = statistics.detach().unbind(0)
    elif needs_gradient(*operands):
        y, statistics = _BatchNormAct.apply(*operands, float(eps), act)
        mean, var = statistics.unbind(0)
    else:
        y, statistics = _run(*operands, float(eps), act)
        mean, var = statistics.unbind(0)
    return y, mean, var


def _checked(x: Tensor, gamma: Tensor | None, beta: Tensor | None, residual: Tensor | None) -> None:
    check_operand(x, "x")
    if x.dim() != 5:
        raise ValueError(f"x: expected 5 dimensions [N, C, D, H, W], got shape {list(x.shape)}")
    if x.numel() // max(x.shape[1], 1) < 2:
        raise ValueError(f"x: expected more than one value for each channel, got shape {list(x.shape)}")
    if (gamma is None) != (beta is None):
        raise ValueError(
            "gamma: expected both gamma and beta or neither, got only "
            + ("beta" if gamma is None else "gamma")
        )
    for name, t in (("gamma", gamma), ("beta", beta)):
        if t is not None:
            _check.vector(t, name, x.shape[1], x.device)
            if t.dtype != torch.float32:
                raise TypeError(f"{name}: expected torch.float32, got {t.dtype}")
    if residual is not None:
        _check.same_dtype(residual, "residual", x.dtype)
        _check.same_device(residual, "residual", x.device)
        if residual.shape != x.shape:
            raise ValueError(f"residual: expected shape {list(x.shape)}, got {list(residual.shape)}")


def _run(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, residual: Tensor | None, eps: float, activation: str
) -> tuple[Tensor, Tensor]:
    """y, and mean and variance as [2, C]."""
    _checked(x, gamma, beta, residual)
    affine, has_res = gamma is not None, residual is not None
    run = _forward(tuple(x.shape), x.element_size(), eps, affine, has_res, activation == "relu")
    x = channels_last(x)
    y = torch.empty_like(x, memory_format=torch.channels_last_3d)
    statistics = torch.empty((2, run.c), dtype=torch.float32, device=x.device)
    means, squares = (torch.empty(run.part_shape, dtype=torch.float32, device=x.device) for _ in range(2))
    gamma, beta = (gamma.contiguous(), beta.contiguous()) if affine else (statistics, statistics)
    with on_device(x):
        run.statistics(x, means, squares)
        run.merge(x, means, squares, statistics)
        run.apply(x, statistics, gamma, beta, channels_last(residual) if has_res else x, y)
    return y, statistics


_batch_norm_act = torch.library.custom_op(
    "r3d_kernels::triton_batch_norm_act",
    _run,
    mutates_args=(),
    schema="(Tensor x, Tensor? gamma, Tensor? beta, Tensor? residual, float eps, str activation) -> (Tensor, Tensor)",
)


@_batch_norm_act.register_fake
def _(x, gamma, beta, residual, eps, activation):
    y = torch.empty_like(x, memory_format=torch.channels_last_3d)
    return y, x.new_empty((2, x.shape[1]), dtype=torch.float32)


def _run_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    statistics: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    relu: bool,
    residual: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y is asked for behind a ReLU and a residual; the gradients of beta and gamma come as one [2, C]."""
    check_operand(x, "x")
    affine, has_y = gamma is not None, y is not None
    if relu and residual and not has_y:
        raise ValueError("y: expected a tensor where there were a residual and a ReLU, got None")
    mask = "" if not relu else "y" if has_y else "x"
    run = _backward_of(tuple(x.shape), x.element_size(), eps, affine, residual, mask)
    x, dy = channels_last(x), channels_last(dy)
    y = channels_last(y) if mask == "y" else x
    dx = torch.empty_like(x, memory_format=torch.channels_last_3d)
    dres = torch.empty_like(dx) if residual else x.new_empty(0)
    grads = torch.empty((2, run.c), dtype=torch.float32, device=x.device)
    sums = torch.empty(run.parts_shape, dtype=torch.float32, device=x.device)
    with on_device(x):
        gamma, beta = (gamma.contiguous(), beta.contiguous()) if affine else (grads, grads)
        run.sums(x, y, dy, statistics, gamma, beta, sums)
        run.merge(sums, grads)
        run.gradient(x, y, dy, statistics, gamma, beta, grads, dx, dres if residual else dx)
    return dx, dres, grads


_batch_norm_act_backward = torch.library.custom_op(
    "r3d_kernels::triton_batch_norm_act_backward",
    _run_backward,
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor? y, Tensor statistics, Tensor? gamma, Tensor? beta, bool relu, bool residual, "
    "float eps) -> (Tensor, Tensor, Tensor)",
)


@_batch_norm_act_backward.register_fake
def _(dy, x, y, statistics, gamma, beta, relu, residual, eps):
    dx = torch.empty_like(x, memory_format=torch.channels_last_3d)
    dres = torch.empty_like(dx) if residual else x.new_empty(0)
    return dx, dres, x.new_empty((2, x.shape[1]), dtype=torch.float32)


def _setup_context(ctx, inputs, output) -> None:
    x, gamma, beta, residual, eps, activation = inputs
    y, statistics = output
    ctx.relu, ctx.residual, ctx.eps = activation == "relu", residual is not None, eps
    ctx.save_for_backward(x, y if ctx.relu and ctx.residual else None, statistics, gamma, beta)
    ctx.mark_non_differentiable(statistics)


def _backward(ctx, dy: Tensor, _: Tensor | None):
    x, y, statistics, gamma, beta = ctx.saved_tensors
    # With gradients on, somebody wants those of the gradients, which the operation says it has not.
    bare = not torch.is_grad_enabled() and is_bare(dy, x)
    run = _run_backward if bare else torch.ops.r3d_kernels.triton_batch_norm_act_backward
    dx, dres, grads = run(dy, x, y, statistics, gamma, beta, ctx.relu, ctx.residual, ctx.eps)
    dbeta, dgamma = (None, None) if gamma is None else grads.unbind(0)
    return dx, dgamma, dbeta, dres if ctx.residual else None, None, None


_batch_norm_act.register_autograd(_backward, setup_context=_setup_context)


class _BatchNormAct(torch.autograd.Function):
    """The operation's gradient without the operation."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _run(*inputs)
        _setup_context(ctx, inputs, output)
        ctx.set_materialize_grads(False)  # or a kernel would write zeros for the statistics, which have none
        return output

    @staticmethod
    def backward(ctx, dy: Tensor | None, _: Tensor | None):
        return (None,) * 6 if dy is None else _backward(ctx, dy, _)
