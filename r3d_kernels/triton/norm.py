"""Batch norm with the statistics of the batch, residual and ReLU, forward and backward, over channels-last tensors.

Two passes each way: one over x for the statistics and one that writes y; one over x, y and dy for the sums and one
that writes dx and dresidual. y tells where the ReLU let something through; without a residual it follows from x, and is
not read. Statistics are merged by the parallel algorithm of Chan, Golub and LeVeque ("Algorithms
for computing the sample variance", 1983), so that a mean far above the standard deviation costs no digits. Sums are
float32 in a fixed order: the same call gives the same bits.

The operations are opaque to torch.compile and no `torch.library.triton_op`: that would put the launches into the graph,
which saves the dispatch of an operation (benchmarks/launch_overhead.py) and nothing on the GPU, since inductor fuses
nothing into them. In return the parts and grids, which follow from the sizes, would make a new graph of every size
where one with symbolic sizes serves all, and what runs under torch.compile would no longer be what the interpreter
proves.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from r3d_kernels import _check
from r3d_kernels.ops.conv3d import needs_gradient
from r3d_kernels.triton.launch import Launch, channels_last, check_operand, is_bare, on_device

__all__ = ["batch_norm_act"]

# Programs of a pass that sums. A program has one tile under way while it adds up another, and a fast memory wants more
# bytes under way than a few programs a multiprocessor have: about 20 KiB on an H200 (4.8 TB/s, half a microsecond).
_PROGRAMS = 1024
_ROWS = 64  # of a tile: the rows of a program are read in tiles


# ---- kernels: x is [M, C], pixels by channels ----


@triton.jit
def _tile_of(start, end, cols, C, BM: tl.constexpr, WIDE: tl.constexpr):
    rows = start + tl.arange(0, BM)
    mask = (rows < end)[:, None] & (cols < C)[None, :]
    if WIDE:
        rows = rows.to(tl.int64)
    return (rows * C)[:, None] + cols[None, :], mask


@triton.jit(do_not_specialize=["M", "per_part"])
def _statistics(
    x_ptr,
    mean_ptr,  # float32 [parts, C]: less the first row
    var_ptr,  # float32 [parts, C]: sums of squared differences from the part's mean
    M,
    C,
    per_part,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """Mean and squared differences of a part of the rows."""
    part = tl.program_id(0)
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    begin = part * per_part
    end = tl.minimum(begin + per_part, M)
    mean = tl.zeros((BC,), tl.float32)
    squares = tl.zeros((BC,), tl.float32)
    # All parts take differences from the first row: the mean may be far from zero. That row is among the data, so it is
    # at most sqrt(M) deviations from the mean.
    pivot = tl.load(x_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    for start in range(begin, end, BM):
        offsets, mask = _tile_of(start, end, cols, C, BM, WIDE)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        count = tl.minimum(end - start, BM).to(tl.float32)
        before = (start - begin).to(tl.float32)
        shifted = tl.where(mask, x - pivot[None, :], 0.0)
        tile_mean = tl.sum(shifted, axis=0) / count
        apart = tl.where(mask, shifted - tile_mean[None, :], 0.0)
        delta = tile_mean - mean
        share = count / (before + count)
        mean += delta * share
        squares += tl.sum(apart * apart, axis=0) + delta * delta * (before * share)
    tl.store(mean_ptr + part * C + cols, mean, mask=cols < C)
    tl.store(var_ptr + part * C + cols, squares, mask=cols < C)


@triton.jit(do_not_specialize=["M", "parts", "per_part"])
def _merge_statistics(
    x_ptr,
    mean_ptr,
    var_ptr,
    out_ptr,  # float32 [2, C]: mean, variance over M
    M,
    C,
    parts,
    per_part,
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
    counts = tl.where(part < parts, tl.minimum(M - part * per_part, per_part), 0).to(tl.float32)[:, None]
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
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """y = act((x - mean) / sqrt(variance + eps) * gamma + beta + residual)"""
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    c_ok = cols < C
    offsets, mask = _tile_of(tl.program_id(0) * BM, M, cols, C, BM, WIDE)
    mean = tl.load(mean_ptr + cols, mask=c_ok, other=0.0)
    scale = 1.0 / tl.sqrt(tl.load(mean_ptr + C + cols, mask=c_ok, other=1.0) + eps)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    scale, shift = _affine(gamma_ptr, beta_ptr, cols, c_ok, scale, AFFINE)
    # (x - mean) first: x * scale + shift would lose what a large mean cancels
    y = (x - mean[None, :]) * scale[None, :] + shift[None, :]
    if HAS_RES:
        y += tl.load(res_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        y = tl.where(y < 0.0, 0.0, y)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _affine(gamma_ptr, beta_ptr, cols, c_ok, scale, AFFINE: tl.constexpr):
    """What (x - mean) is multiplied by, and what is added."""
    if AFFINE:
        scale *= tl.load(gamma_ptr + cols, mask=c_ok, other=0.0)
        shift = tl.load(beta_ptr + cols, mask=c_ok, other=0.0)
    else:
        shift = tl.zeros(scale.shape, tl.float32)
    return scale, shift


@triton.jit
def _before_relu(dy_ptr, x_ptr, y_ptr, offsets, mask, apart, scale, shift, RELU: tl.constexpr):
    """dz: dy where the ReLU let something through, 0 elsewhere."""
    dz = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if RELU == "y":
        dz = tl.where(tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32) > 0.0, dz, 0.0)
    elif RELU == "x":
        y = apart * scale[None, :] + shift[None, :]
        dz = tl.where(y.to(x_ptr.dtype.element_ty).to(tl.float32) > 0.0, dz, 0.0)  # rounded as y was
    return dz


@triton.jit(do_not_specialize=["M", "per_part", "eps"])
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
    per_part,
    eps,
    AFFINE: tl.constexpr,
    RELU: tl.constexpr,  # "": none; "y", "x": what tells where it let something through
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    part = tl.program_id(0)
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    c_ok = cols < C
    begin = part * per_part
    end = tl.minimum(begin + per_part, M)
    mean = tl.load(mean_ptr + cols, mask=c_ok, other=0.0)
    scale = 1.0 / tl.sqrt(tl.load(mean_ptr + C + cols, mask=c_ok, other=1.0) + eps)
    factor, shift = _affine(gamma_ptr, beta_ptr, cols, c_ok, scale, AFFINE)
    dbeta = tl.zeros((BC,), tl.float32)
    dgamma = tl.zeros((BC,), tl.float32)
    for start in range(begin, end, BM):
        offsets, mask = _tile_of(start, end, cols, C, BM, WIDE)
        apart = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
        dz = _before_relu(dy_ptr, x_ptr, y_ptr, offsets, mask, apart, factor, shift, RELU)
        dbeta += tl.sum(dz, axis=0)
        dgamma += tl.sum(dz * (apart * scale[None, :]), axis=0)
    tl.store(sums_ptr + part * C + cols, dbeta, mask=c_ok)
    tl.store(sums_ptr + (parts + part) * C + cols, dgamma, mask=c_ok)


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
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """dx = gamma * scale * (dz - (dbeta + normalised x * dgamma) / M), dresidual = dz"""
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    c_ok = cols < C
    offsets, mask = _tile_of(tl.program_id(0) * BM, M, cols, C, BM, WIDE)
    mean = tl.load(mean_ptr + cols, mask=c_ok, other=0.0)
    scale = 1.0 / tl.sqrt(tl.load(mean_ptr + C + cols, mask=c_ok, other=1.0) + eps)
    rows = M.to(tl.float32)
    dbeta = tl.load(grads_ptr + cols, mask=c_ok, other=0.0) / rows
    dgamma = tl.load(grads_ptr + C + cols, mask=c_ok, other=0.0) / rows
    factor, shift = _affine(gamma_ptr, beta_ptr, cols, c_ok, scale, AFFINE)
    apart = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
    dz = _before_relu(dy_ptr, x_ptr, y_ptr, offsets, mask, apart, factor, shift, RELU)
    if HAS_RES:
        tl.store(dres_ptr + offsets, dz.to(dres_ptr.dtype.element_ty), mask=mask)
    normal = apart * scale[None, :]
    dx = (dz - dbeta[None, :] - normal * dgamma[None, :]) * factor[None, :]
    tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)


# ---- launches ----


class _Plan:
    """Grids and sizes for one shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        n, self.c, *space = shape
        self.m = n * space[0] * space[1] * space[2]
        if self.m >= 2**31 - _PROGRAMS * _ROWS:  # the last part may end as far beyond
            raise ValueError(f"x: expected fewer than 2^31 pixels, got {self.m}")
        self.wide = self.m * self.c >= 2**31
        self.bc = min(64, max(16, triton.next_power_of_2(self.c)))
        blocks = triton.cdiv(self.c, self.bc)
        # At least two tiles a part; what is left for the last kernel to add stays small.
        parts = max(1, min(_PROGRAMS // blocks, self.m // (2 * _ROWS)))
        self.per_part = triton.cdiv(triton.cdiv(self.m, parts), _ROWS) * _ROWS
        self.parts = triton.cdiv(self.m, self.per_part)
        self.sums = (self.parts, blocks)
        self.merge = triton.cdiv(self.c, 8)
        self.elements = (triton.cdiv(self.m, _ROWS), blocks)
        self.tiles = {"WIDE": self.wide, "BM": _ROWS, "BC": self.bc, "num_warps": 4}
        self.merging = {"PARTS": triton.next_power_of_2(self.parts), "BC": 8, "num_warps": 4}


_plan = lru_cache(maxsize=1024)(_Plan)


class _Forward:
    """The launches of a forward pass, prepared once."""

    def __init__(self, shape: tuple[int, ...], eps: float, affine: bool, residual: bool, relu: bool) -> None:
        p = _plan(shape)
        self.part_shape, self.c = (p.parts, p.c), p.c
        self.statistics = Launch(_statistics, p.sums, (p.m, p.c, p.per_part), p.tiles)
        sizes = (p.m, p.c, p.parts, p.per_part)
        self.merge = Launch(_merge_statistics, (p.merge,), sizes, p.merging)
        how = {"AFFINE": affine, "HAS_RES": residual, "RELU": relu, **p.tiles}
        self.apply = Launch(_apply, p.elements, (p.m, p.c, eps), how)


class _Backward:
    """The launches of a backward pass, prepared once."""

    def __init__(self, shape: tuple[int, ...], eps: float, affine: bool, residual: bool, relu: str) -> None:
        p = _plan(shape)
        self.parts_shape, self.c = (2, p.parts, p.c), p.c
        sizes = (p.m, p.c, p.parts, p.per_part, eps)
        self.sums = Launch(_gradient_sums, p.sums, sizes, {"AFFINE": affine, "RELU": relu, **p.tiles})
        self.merge = Launch(_merge_sums, (p.merge, 2), (p.c, p.parts), p.merging)
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
    run = _forward(tuple(x.shape), eps, affine, has_res, activation == "relu")
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
    run = _backward_of(tuple(x.shape), eps, affine, residual, mask)
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
