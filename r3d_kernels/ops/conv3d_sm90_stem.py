"""`torch.ops.r3d_kernels.conv3d_sm90_stem`, the Hopper convolution of few channels: its weights and its fake.

It is called through `backends`; nothing here is for users.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from r3d_kernels import _extension
from r3d_kernels._sm90_stem import WINDOWS
from r3d_kernels.ops._flops import flop_formula
from r3d_kernels.ops.conv3d_sm90 import tried

__all__ = ["CHANNELS", "KINDS", "pack", "proven", "proven_stem", "trial_error"]

CHANNELS = 64  # of a tile: csrc/cuda/conv3d_sm90_stem.h
KINDS = 3  # of tiles


def pack(weight: Tensor, layout: Sequence[int]) -> Tensor:
    """[K, C, T, R, S] as the kernel reads it, zeros where a window is wider than the filter.

    Args:
        layout: slots of a pixel, filter rows in them, such groups of rows, units of a window: what
            ``torch.ops.r3d_kernels.conv3d_sm90_stem_layout`` says.

    Returns:
        [K / 64 rounded up, T, row groups, units, 64, 8]
    """
    slots, group, row_groups, units = layout
    k, c, t, r, s = weight.shape
    pixels = 8 // slots  # of a unit
    tiles = -(-k // CHANNELS)
    more = (0, units * pixels - s, 0, row_groups * group - r, 0, 0, 0, 0, 0, tiles * CHANNELS - k)
    w = F.pad(weight, more).view(tiles, CHANNELS, c, t, row_groups, group, units, pixels)
    w = w.permute(0, 3, 4, 6, 1, 7, 5, 2).reshape(tiles, t, row_groups, units, CHANNELS, pixels, group * c)
    return F.pad(w, (0, slots - group * c)).reshape(tiles, t, row_groups, units, CHANNELS, 8).contiguous()


_TRIAL = {"stride": (1, 2, 2), "padding": (1, 3, 2)}


def trial_error(dtype: torch.dtype, kind: int, device: torch.device | str = "cuda", op=None) -> float:
    """The largest error of one kind of tile, relative to what rounding allows, on a small stem against float64.

    Three channels, three different paddings, tails of rows and channels, two samples, ReLU. At most 1 where the kernel
    works; NaN is infinity here, and so are other maxima than torch's where it pools.
    """
    op = op or torch.ops.r3d_kernels.conv3d_sm90_stem
    g = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        # neither on the default device nor of the default dtype: a user may have set both
        return torch.randn(shape, generator=g, device="cpu", dtype=torch.float32)

    x, weight = normal(2, 3, 4, 19, 60).to(dtype), (normal(69, 3, 3, 7, 5) / 315**0.5).to(dtype)
    scale, bias = normal(69), normal(69)

    def conv(a: Tensor, b: Tensor) -> Tensor:
        return F.conv3d(a.double(), b.double(), None, *_TRIAL.values())

    wide = (1, -1, 1, 1, 1)
    want = (conv(x, weight) * scale.double().view(wide) + bias.double().view(wide)).relu()
    size = conv(x.abs(), weight.abs()) * scale.double().abs().view(wide) + 5
    layout = torch.ops.r3d_kernels.conv3d_sm90_stem_layout(weight.shape, _TRIAL["stride"])
    operands = tuple(t.to(device) for t in (pack(weight, layout), scale, bias))

    def run(pool_frames: int) -> Tensor:
        steps = (69, (3, 7, 5), *_TRIAL.values(), "relu", kind, pool_frames)
        return op(x.to(device), None, None, *operands, *steps).cpu().double()

    y = run(0)
    if not all(torch.equal(F.max_pool3d(y, *window), run(frames)) for frames, window in WINDOWS.items()):
        return float("inf")
    allowed = 3e-6 * size + torch.finfo(dtype).eps / 2 * 1.001 * want
    return ((y - want).abs() / allowed).nan_to_num(float("inf")).max().item()


proven: dict[int, bool] = {}
"""Index of a GPU -> what `proven_stem` found."""


def proven_stem(index: int) -> bool:
    """Whether the kernel computes what it should on this GPU: tried once in a process, as `proven_tiles` does."""
    if index not in proven:
        device = torch.device("cuda", index)
        good = tried(device, lambda: int(_works(device)))
        if good is None:
            return False
        proven[index] = bool(good)
    return proven[index]


def _works(device: torch.device) -> bool:
    try:
        return all(
            trial_error(dtype, kind, device) <= 1
            for dtype in (torch.bfloat16, torch.float16)
            for kind in range(KINDS)
        )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return False


if _extension.has_cuda:

    @torch.library.register_fake("r3d_kernels::conv3d_sm90_stem")
    def _(
        x: Tensor,
        clip_scale: Tensor | None,
        clip_shift: Tensor | None,
        packed: Tensor,
        scale: Tensor,
        bias: Tensor,
        out_channels: int,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        activation: str,
        kind: int = -1,
        pool_frames: int = 0,
    ) -> Tensor:
        torch._check(x.dim() == 5, lambda: f"x: expected 5 dimensions [N, C, D, H, W], got shape {x.shape}")
        size = [
            (i + 2 * p - f) // s + 1
            for i, f, s, p in zip(x.shape[2:], kernel_size, stride, padding, strict=True)
        ]
        if pool_frames:
            window = zip(size, *WINDOWS[pool_frames], strict=True)
            size = [(i + 2 * p - f) // s + 1 for i, f, s, p in window]
        shape = (x.shape[0], out_channels + -out_channels % 8, *size)
        y = torch.empty(shape, dtype=packed.dtype, device=x.device, memory_format=torch.channels_last_3d)
        return y.narrow(1, 0, out_channels)

    @flop_formula(torch.ops.r3d_kernels.conv3d_sm90_stem)
    def _flops(
        x, clip_scale, clip_shift, packed, scale, bias, k, kernel, *args, out_shape=None, **kwargs
    ) -> int:
        return 2 * x[1] * math.prod(kernel) * math.prod(out_shape)
