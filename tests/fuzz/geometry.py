"""Random convolutions at the edges of what exists: drawn by seed and number, so that any of them can be drawn again."""

from __future__ import annotations

import ctypes
import functools
import mmap
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from r3d_kernels.problems import ConvProblem, ProblemTensors

__all__ = ["Case", "draw", "edges"]

_CHANNELS = (1, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 45, 64, 65)
_SIZES = (1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 16, 17, 20)
_MOST_MACS, _USUAL_MACS = 3_000_000, 400_000
_POISONS = (float("nan"), float("inf"), float("-inf"))


@dataclass(frozen=True)
class Case:
    """A problem and how its tensors come."""

    number: str  # "seed:index", which draws it again
    problem: ConvProblem
    dtype: torch.dtype
    layout: str  # of x and the residual: "channels_last", "contiguous", "sliced"
    weight_layout: str  # "contiguous" or "channels_last"
    poison: tuple[str, float] | None  # which tensor holds one NaN or infinity
    tuned: bool  # whether the call through the API measures
    guard: str | None  # what lies right "before" or "behind" x, weight and residual may not be touched
    memory: str  # R3D_KERNELS_MEMORY
    threads: int

    def __str__(self) -> str:
        poison = "" if self.poison is None else f", {self.poison[1]} in {self.poison[0]}"
        dtype = str(self.dtype).removeprefix("torch.")
        how = "" if self.guard is None else f", a guard {self.guard}"
        how += f", memory {self.memory}, {self.threads} threads{poison}"
        return f"{self.number} {self.problem} {dtype}, x {self.layout}, weight {self.weight_layout}{how}"

    def tensors(self) -> ProblemTensors:
        seed = random.Random(self.number).getrandbits(31)  # not hash(): another one in every process
        t = self.problem.tensors(self.dtype, seed=seed, param_dtype=torch.float32)
        x, weight, residual = _laid_out(t.x, self.layout), t.weight, t.residual
        weight = weight.contiguous(
            memory_format=torch.channels_last_3d
            if self.weight_layout == "channels_last"
            else torch.contiguous_format
        )
        residual = None if residual is None else _laid_out(residual, self.layout)
        if self.poison is not None:
            name, value = self.poison
            target = {"x": x, "weight": weight, "residual": residual}[name]
            if target is not None and target.numel():
                at = random.Random(self.number).randrange(target.numel())
                place = []
                for size in reversed(target.shape):
                    place.append(at % size)
                    at //= size
                target[tuple(reversed(place))] = value
        if self.guard is not None:
            x, weight = _guarded(x, self.guard), _guarded(weight, self.guard)
            residual = None if residual is None else _guarded(residual, self.guard)
        return ProblemTensors(x, weight, t.gamma, t.beta, t.running_mean, t.running_var, t.eps, residual)


def _laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values. "sliced" lies inside a larger tensor of NaN: whoever reads beyond its edge shows it."""
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last_3d)
    if layout == "contiguous":
        return t.contiguous()
    around = t.new_full([s + 2 for s in t.shape], float("nan"))
    inside = around[tuple(slice(1, s + 1) for s in t.shape)]
    return inside.copy_(t)


@functools.cache
def _mprotect():
    call = ctypes.CDLL(None, use_errno=True).mprotect
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return call


def _guarded(t: Tensor, side: str) -> Tensor:
    """The same tensor in pages of its own, beside one that ends the process when it is read or written."""
    dense = t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last_3d)
    if not t.numel() or not dense:
        return t
    page, size = mmap.PAGESIZE, t.numel() * t.element_size()
    inside = -(-size // page) * page
    memory = mmap.mmap(-1, inside + 2 * page)
    first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for at in (first, first + page + inside):
        if _mprotect()(at, page, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = page if side == "before" else page + inside - size
    flat = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=offset)  # keeps the pages
    return flat.as_strided(t.shape, t.stride()).copy_(t)


def edges(p: ConvProblem) -> list[str]:
    """By name, what of a problem networks do not have: what wrong results have in common."""
    sizes, axes = (p.d, p.h, p.w), list(zip(p.kernel, p.stride, p.padding, p.dilation, strict=True))
    beyond = any(f > size for f, size in zip(p.kernel, sizes, strict=True))
    found = {
        "dilation": max(p.dilation) > 1,
        "one tap, padding, stride and dilation": any(f == 1 and q and s > 1 and d > 1 for f, s, q, d in axes),
        "padding of a one-tap axis": any(f == 1 and q for f, _, q, _ in axes),
        "padding of the kernel or more": any(f > 1 and q >= f for f, _, q, _ in axes),
        "padding beyond half the kernel": any(f > 1 and f > q > f // 2 for f, _, q, _ in axes),
        "stride beyond the kernel": any(s > f > 1 for f, s, _, _ in axes),
        "kernel beyond the input": beyond,
        "one input channel": p.c == 1,
        "one output channel": p.k == 1,
        "output one wide, stride": p.out_size[2] == 1 and p.stride[2] > 1,
        "groups": 1 < p.groups < p.c,
        "depthwise": p.groups == p.c > 1,
    }
    return [name for name, has in found.items() if has]


def _axis(r: random.Random, kernel: int) -> tuple[int, int, int, int]:
    """kernel, stride, padding, dilation; of one-tap axes and of padding beyond the kernel more than networks have."""
    stride = r.choice((1, 1, 1, 2, 2, 3, 4))
    dilation = r.choice((1, 1, 1, 1, 2, 3))
    usual = dilation * (kernel - 1) // 2
    padding = r.choice((usual, usual, usual, 0, 1, 2, kernel, kernel + r.randint(1, 3)))
    return kernel, stride, padding, dilation


_NETWORK = (  # kernel, stride, padding of layers in networks
    ((3, 3, 3), (1, 1, 1), (1, 1, 1)),
    ((3, 3, 3), (2, 2, 2), (1, 1, 1)),
    ((1, 3, 3), (1, 1, 1), (0, 1, 1)),
    ((1, 3, 3), (1, 2, 2), (0, 1, 1)),
    ((3, 1, 1), (1, 1, 1), (1, 0, 0)),
    ((3, 1, 1), (2, 1, 1), (1, 0, 0)),
    ((1, 1, 1), (1, 1, 1), (0, 0, 0)),
    ((1, 1, 1), (2, 2, 2), (0, 0, 0)),
    ((7, 7, 7), (1, 2, 2), (3, 3, 3)),
    ((7, 7, 7), (2, 2, 2), (3, 3, 3)),
    ((3, 7, 7), (1, 2, 2), (1, 3, 3)),
    ((5, 7, 7), (1, 2, 2), (2, 3, 3)),
)


def _problem(r: random.Random) -> ConvProblem | None:
    groups, channels = 1, _CHANNELS
    if r.random() < 0.35:
        kernel, stride, padding = r.choice(_NETWORK)
        dilation = (1, 1, 1)
        if kernel[2] >= 5:
            channels = (1, 2, 3, 4)
    else:
        taps = [r.choice((1, 1, 2, 3, 3, 3, 4, 5, 7)) for _ in range(3)]
        if r.random() < 0.4:
            taps = taps[:1] * 3
        axes = [_axis(r, f) for f in taps]
        if r.random() < 0.4:
            axes = axes[:1] * 3
        kernel, stride, padding, dilation = (tuple(v) for v in zip(*axes, strict=True))
        groups = r.choice((1, 1, 1, 1, 1, 2, 3))
    c, k = r.choice(channels) * groups, r.choice(_CHANNELS) * groups
    if r.random() < 0.04:
        groups = c  # depthwise
        k = c * r.choice((1, 2))
    size = [r.choice(_SIZES) for _ in range(3)]
    if r.random() < 0.2:
        size[2] = r.choice((1, 2, 3))  # outputs one wide
    try:
        p = ConvProblem(
            r.choice((1, 1, 1, 2, 3, 0)),
            c,
            *size,
            k,
            kernel,
            stride,
            padding,
            dilation,
            groups,
            r.random() < 0.4,
            r.choice((None, "relu")),
        ).validate()
    except ValueError:
        return None
    most = _MOST_MACS if r.random() < 0.1 else _USUAL_MACS
    small = max(p.n * c * p.d * p.h * p.w, p.n * k * p.out_size[0] * p.out_size[1] * p.out_size[2]) < 300_000
    return p if p.macs <= most and small else None


def draw(seed: int, index: int) -> Case:
    """Case `index` of a seed."""
    number = f"{seed}:{index}"
    r = random.Random(number)
    problem = None
    while problem is None:
        problem = _problem(r)
    poisoned = ["x", "weight"] + (["residual"] if problem.residual else [])
    return Case(
        number,
        problem,
        r.choice((torch.float32, torch.float32, torch.float32, torch.bfloat16)),
        r.choice(("channels_last", "channels_last", "contiguous", "sliced")),
        r.choice(("contiguous", "contiguous", "channels_last")),
        (r.choice(poisoned), r.choice(_POISONS)) if r.random() < 0.12 else None,
        r.random() < 0.1,
        r.choice((None, "before", "behind", "behind")),
        r.choice(("lean", "lean", "fast")),
        r.choice((1, 1, 1, 1, 1, 1, 1, 2, 3)),
    )
