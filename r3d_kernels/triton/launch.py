"""How the convolution kernels are called: arguments and grids are worked out once for each geometry.

Tensors here are channels-last in memory whatever their strides say; nothing is checked (`conv3d.py` does).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from r3d_kernels.problems import ConvProblem
from r3d_kernels.triton import config as configs
from r3d_kernels.triton import kernels
from r3d_kernels.triton.backend import interpreted
from r3d_kernels.triton.config import Config

__all__ = ["Forward", "InputGrad", "WeightGrad", "channels_last", "check_operand", "on_device"]

_INT32 = 2**31


def check_operand(x: Tensor, argument: str) -> None:
    """A dtype that the kernels have, in a place where they can run."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{argument}: expected float32, bfloat16 or float16, got {x.dtype}")
    if not x.is_cuda and not (x.is_cpu and interpreted()):
        raise ValueError(f"{argument}: expected a CUDA tensor, got one on {x.device}")


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


def empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last_3d)


@contextlib.contextmanager
def on_device(x: Tensor) -> Iterator[None]:
    """Triton launches on the current device: makes it the tensor's."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            yield
    else:
        yield


def _wide(*shapes: tuple[int, ...]) -> bool:
    """Whether offsets need 64 bits; two samples of slack, because some are formed of pixels that are never read."""
    return any(math.prod(s) + 2 * math.prod(s[1:]) >= _INT32 for s in shapes)


class Forward:
    """y = act(conv(x, weight) * scale + bias + residual) for one geometry, dtype and configuration.

    Called with x, weight, scale, bias and residual (None where the constructor was told so). [N, C, D, H, W] and
    [K, C / groups, T, R, S], both channels-last in memory; scale and bias float32 [K].
    """

    def __init__(
        self, problem: ConvProblem, config: Config, precision: str, *, has_scale: bool, has_bias: bool
    ) -> None:
        p, config = problem, config.fitted(problem)
        self.problem, self.config = problem, config
        self.out_shape = p.out_shape
        c, k = p.c // p.groups, p.k // p.groups
        taps = math.prod(p.kernel)
        m = p.n * math.prod(p.out_size)
        meta: dict[str, Any] = {
            "HAS_SCALE": has_scale,
            "HAS_BIAS": has_bias,
            "HAS_RES": p.residual,
            "RELU": p.activation == "relu",
        }
        common = {
            "WIDE": _wide(p.in_shape, p.out_shape),
            "PRECISION": "ieee" if precision == "half" else precision,
            "BN": config.bn,
            "BK": config.bk,
            "GROUP": config.group,
            "num_warps": config.warps,
            "num_stages": config.stages,
        }
        geometry = (p.d, p.h, p.w, *p.out_size, *p.stride, *p.padding, *p.dilation)
        tiles_n = triton.cdiv(k, config.bn)
        self.parts = 1
        self.box: tuple[int, int, int] | None = None
        t, r, s = p.kernel
        if config.kernel == "packed":
            self.grid = (triton.cdiv(m, config.bm) * tiles_n, p.groups)
            self.ints: tuple[int, ...] = (m, k, p.c, p.k, *geometry, taps * c, k * taps * c)
            self.meta = dict(meta, **common, BM=config.bm, C=c, T=t, R=r, S=s)
            self.kernel = kernels.conv3d_packed[self.grid]
        elif config.kernel == "tiled":
            if max(p.kernel) > configs.MAX_TAPS:
                raise ValueError(
                    f"config: {config} takes kernels of at most {configs.MAX_TAPS} taps an axis, got {p.kernel}"
                )
            steps = taps * triton.cdiv(c, config.bk)
            per_part = triton.cdiv(steps, config.split)
            self.parts = triton.cdiv(steps, per_part)  # no part is empty
            self.grid = (triton.cdiv(m, config.bm) * tiles_n, p.groups, self.parts)
            od, oh, ow = p.out_size
            places = (od * oh * ow * p.k, oh * ow * p.k, ow * p.k, p.k, 0)
            self.ints = (
                *(m, c, k, p.c, p.k, *geometry),
                *(taps * c, c, k * taps * c, r * s, s, 1, 0, *places, per_part),
            )
            self.meta = dict(
                meta,
                **common,
                T=t,
                R=r,
                S=s,
                POINTWISE=configs.is_pointwise(p),
                ROWS_SUM=False,
                EVEN_C=c % config.bk == 0,
                DENSE=True,
                SPLIT=self.parts > 1,
                BM=config.bm,
            )
            self.kernel = kernels.conv3d_tiled[self.grid]
        else:
            self.box = configs.boxes_of(config, p)
            if self.box is None:
                raise ValueError(
                    f"config: no box of {config.bm} outputs fits {p.out_size} without too much waste"
                )
            bd, bh, bw = self.box
            boxes = [triton.cdiv(o, b) for o, b in zip(p.out_size, self.box, strict=True)]
            self.grid = (p.n * math.prod(boxes) * tiles_n,)
            self.ints = (p.n, c, k, p.k, *p.out_size, *p.padding, *p.dilation)
            self.meta = dict(meta, **common, T=t, R=r, S=s, BD=bd, BH=bh, BW=bw)
            self.kernel = kernels.conv3d_boxes[self.grid]
        if self.parts > 1:
            self.reduce_grid = (triton.cdiv(m, 32), triton.cdiv(p.k, 64))
            self.reduce = kernels.reduce_parts[self.reduce_grid]
            self.reduce_ints = (m, p.k, self.parts)
            self.reduce_meta = dict(meta, BM=32, BN=64, num_warps=4)
            self.part_shape = (self.parts, m, p.k)

    def __call__(
        self, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        y = empty(self.out_shape, x)
        if self.out_shape[0] == 0:
            return y
        # What is None is not read; any pointer will do.
        tail = (
            y if scale is None else scale,
            y if bias is None else bias,
            y if residual is None else residual,
            y,
        )
        with on_device(x):
            if self.box is not None:
                self.kernel(*self._descriptors(x, weight), *tail, *self.ints, **self.meta)
            elif self.config.kernel == "packed":
                self.kernel(x, weight, *tail, *self.ints, **self.meta)
            elif self.parts == 1:
                self.kernel(x, weight, *tail, y, *self.ints, **self.meta)
            else:
                part = torch.empty(self.part_shape, dtype=torch.float32, device=x.device)
                self.kernel(x, weight, *tail, part, *self.ints, **self.meta)
                self.reduce(part, *tail, *self.reduce_ints, **self.reduce_meta)
        return y

    def _descriptors(self, x: Tensor, weight: Tensor) -> tuple[TensorDescriptor, TensorDescriptor]:
        # the TMA unit wants 16-byte addresses: a slice of a larger tensor may lie elsewhere
        if x.data_ptr() % 16:
            x = x.clone(memory_format=torch.channels_last_3d)
        if weight.data_ptr() % 16:
            weight = weight.clone(memory_format=torch.channels_last_3d)
        p, c, bk = self.problem, self.config, self.config.bk
        assert self.box is not None
        taps = math.prod(p.kernel)
        rows, planes = p.w * p.c, p.h * p.w * p.c
        return (
            TensorDescriptor(
                x,
                [p.n, p.d, p.h, p.w, p.c],
                [p.d * planes, planes, rows, p.c, 1],
                [1, *self.box, bk],
            ),
            TensorDescriptor(weight, [p.k, taps, p.c], [taps * p.c, p.c, 1], [c.bn, 1, bk]),
        )


@dataclasses.dataclass(frozen=True)
class _Axis:
    """The inputs of one remainder of the stride, along one axis: a convolution of dy with every step-th tap."""

    first: int  # input position of its first output
    count: int
    taps: int
    first_tap: int
    step: int  # between taps
    padding: int
    dilation: int


def _axes(size: int, kernel: int, stride: int, padding: int, dilation: int) -> list[_Axis]:
    """dx at position q reads dy at (q + padding - tap * dilation) / stride, where that is whole."""
    step = stride // math.gcd(stride, dilation)
    found = []
    for remainder in range(min(stride, size)):
        taps = [t for t in range(kernel) if (remainder + padding - t * dilation) % stride == 0]
        first = taps[0] if taps else 0
        found.append(
            _Axis(
                remainder,
                -(-(size - remainder) // stride),
                len(taps),
                first,
                step,
                -((remainder + padding - first * dilation) // stride),
                -(step * dilation // stride),
            )
        )
    return found


class InputGrad:
    """dx of a convolution for one geometry, dtype and configuration: one launch for each remainder of the stride.

    Called with dy [N, K, D', H', W'] and weight [K, C / groups, T, R, S], channels-last in memory.
    """

    def __init__(self, problem: ConvProblem, config: Config, precision: str) -> None:
        p = problem
        self.shape = p.in_shape
        c, k = p.c // p.groups, p.k // p.groups
        taps = math.prod(p.kernel)
        _, r, s = p.kernel
        plane = p.h * p.w * p.c
        # dy's channels are summed over and x's are the outputs
        mirrored = dataclasses.replace(p, c=p.k, k=p.c)
        config = config.fitted(mirrored)
        parts = itertools.product(
            *(
                _axes(*axis)
                for axis in zip((p.d, p.h, p.w), p.kernel, p.stride, p.padding, p.dilation, strict=True)
            )
        )
        self.launches: list[tuple[Callable[..., Any], tuple[int, ...], dict[str, Any]]] = []
        self.holes = False  # some positions are read by no tap
        for d, h, w in parts:
            if 0 in (d.taps, h.taps, w.taps):
                self.holes = True
                continue
            if max(d.taps, h.taps, w.taps) > configs.MAX_TAPS:
                raise ValueError(
                    f"kernel_size: expected at most {configs.MAX_TAPS} taps an axis, got {list(p.kernel)}"
                )
            m = p.n * d.count * h.count * w.count
            first = (d.first * p.h * p.w + h.first * p.w + w.first) * p.c
            ints = (
                *(m, k, c, p.k, p.c, *p.out_size, d.count, h.count, w.count, 1, 1, 1),
                *(d.padding, h.padding, w.padding, d.dilation, h.dilation, w.dilation),
                *(taps * c, c, k * taps * c, d.step * r * s, h.step * s, w.step),
                (d.first_tap * r + h.first_tap) * s + w.first_tap,
                *(p.d * plane, p.stride[0] * plane, p.stride[1] * p.w * p.c, p.stride[2] * p.c, first),
                d.taps * h.taps * w.taps * triton.cdiv(k, config.bk),
            )
            meta = {
                "T": d.taps,
                "R": h.taps,
                "S": w.taps,
                "POINTWISE": taps == 1 and p.stride == (1, 1, 1) and p.padding == (0, 0, 0),
                "ROWS_SUM": True,
                "EVEN_C": k % config.bk == 0,
                "DENSE": p.stride == (1, 1, 1),
                "SPLIT": False,
                "HAS_SCALE": False,
                "HAS_BIAS": False,
                "HAS_RES": False,
                "RELU": False,
                "WIDE": _wide(p.in_shape, p.out_shape),
                "PRECISION": "ieee" if precision == "half" else precision,
                "BM": config.bm,
                "BN": config.bn,
                "BK": config.bk,
                "GROUP": config.group,
                "num_warps": config.warps,
                "num_stages": config.stages,
            }
            grid = (triton.cdiv(m, config.bm) * triton.cdiv(c, config.bn), p.groups, 1)
            self.launches.append((kernels.conv3d_tiled[grid], ints, meta))

    def __call__(self, dy: Tensor, weight: Tensor) -> Tensor:
        dx = empty(self.shape, dy)
        if self.holes:
            dx.zero_()
        if self.shape[0]:
            with on_device(dy):
                for kernel, ints, meta in self.launches:
                    kernel(dy, weight, dx, dx, dx, dx, dx, *ints, **meta)
        return dx


class WeightGrad:
    """dw of a convolution for one geometry, dtype and tile: float32 sums over parts of the pixels, added in order.

    Called with x and dy, channels-last in memory; returns [K, C / groups, T, R, S], channels-last in memory.
    """

    def __init__(self, problem: ConvProblem, precision: str, multiprocessors: int) -> None:
        p = problem
        c, k = p.c // p.groups, p.k // p.groups
        one_tap = c >= 16
        bm, bn, bk, warps, stages = configs.WEIGHT_GRAD[precision, not one_tap]
        taps = math.prod(p.kernel)
        m = p.n * math.prod(p.out_size)
        if m >= _INT32 - bm:
            raise ValueError(f"x: expected fewer than 2^31 output pixels for a weight gradient, got {m}")
        columns = taps * triton.cdiv(c, bn) if one_tap else triton.cdiv(taps * c, bn)
        tiles = triton.cdiv(k, bk) * columns
        # Two waves of programs, at most 64 parts, and 8 steps a part: fewer would be all filling and draining.
        parts = max(1, min(64, 2 * multiprocessors // (tiles * p.groups), m // (8 * bm)))
        per_part = triton.cdiv(triton.cdiv(max(m, 1), parts), bm) * bm
        self.parts = max(1, triton.cdiv(m, per_part))
        self.shape = p.weight_shape
        self.size = math.prod(p.weight_shape)
        self.empty = m == 0
        self.kernel = kernels.conv3d_weight_grad[(tiles, p.groups, self.parts)]
        geometry = (p.d, p.h, p.w, *p.out_size, *p.stride, *p.padding, *p.dilation)
        self.ints = (m, c, k, p.c, p.k, *geometry, self.size, per_part)
        t, r, s = p.kernel
        self.meta = {
            "T": t,
            "R": r,
            "S": s,
            "ONE_TAP": one_tap,
            "WIDE": _wide(p.in_shape, p.out_shape),
            "PRECISION": "ieee" if precision == "half" else precision,
            "BM": bm,
            "BN": bn,
            "BK": bk,
            "num_warps": warps,
            "num_stages": stages,
        }
        self.sum = kernels.sum_parts[(triton.cdiv(self.size, 1024),)]

    def __call__(self, x: Tensor, dy: Tensor) -> Tensor:
        dw = empty(self.shape, x)
        if self.empty:
            return dw.zero_()
        with on_device(x):
            if self.parts == 1:
                self.kernel(x, dy, dw, *self.ints, **self.meta)
            else:
                part = torch.empty((self.parts, self.size), dtype=torch.float32, device=x.device)
                self.kernel(x, dy, part, *self.ints, **self.meta)
                self.sum(part, dw, self.size, self.parts, BLOCK=1024, num_warps=4)
        return dw
