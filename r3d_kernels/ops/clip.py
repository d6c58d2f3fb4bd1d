"""A decoder's clip on its way to a network: ``(clip - mean) / std``, in one pass where it can be."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from r3d_kernels import _check, _extension
from r3d_kernels.ops.conv3d import is_plain

__all__ = ["ClipSource", "channel_values", "clip_channels_last", "normalized_clip"]

Values = tuple[float, ...]

_READABLE = (torch.uint8, torch.float32, torch.bfloat16, torch.float16)


def channel_values(
    values: Sequence[float] | None, name: str, channels: int, *, positive: bool = False
) -> Values | None:
    """`values` as one float a channel, or a TypeError / ValueError that names the argument."""
    if values is None:
        return None
    if isinstance(values, Tensor):
        values = values.tolist()
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise TypeError(f"{name}: expected {channels} numbers, one a channel, or None, got {values!r}")
    if any(isinstance(v, bool) or not isinstance(v, numbers.Real) for v in values):
        raise TypeError(f"{name}: expected {channels} numbers, one a channel, got {list(values)!r}")
    if len(values) != channels:
        raise ValueError(f"{name}: expected {channels} numbers, one a channel, got {len(values)}")
    if not all(math.isfinite(v) and (v > 0 or not positive) for v in values):
        raise ValueError(f"{name}: expected finite numbers{' > 0' if positive else ''}, got {list(values)}")
    return tuple(float(v) for v in values)


def _tensor(values: Values, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # for training too
        return torch.tensor(values, device=device, dtype=dtype)


# Never dropped: CUDA graphs hold the addresses, and making one inside a capture would wait for the host.
_kept = cache(_tensor)


def _scale_and_shift(
    clip: Tensor, mean: Values | None, std: Values | None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor | None, Tensor | None]:
    """[C] each: (clip - mean) / std = clip * scale + shift."""
    # A fake tensor must not be kept for real clips.
    make = _kept if is_plain(clip) and not torch.compiler.is_compiling() else _tensor
    scale = None if std is None else make(tuple(1 / s for s in std), clip.device, dtype)
    if mean is None:
        return scale, None
    shift = tuple(-m / s for m, s in zip(mean, std or (1.0,) * len(mean), strict=True))
    return scale, make(shift, clip.device, dtype)


class ClipSource(NamedTuple):
    """How a kernel that reads a clip itself has to take it: clip * scale + shift, as `dtype`."""

    scale: Tensor | None  # float32 [C]
    shift: Tensor | None
    dtype: torch.dtype

    @classmethod
    def of(cls, clip: Tensor, mean: Values | None, std: Values | None, dtype: torch.dtype) -> ClipSource:
        return cls(*_scale_and_shift(clip, mean, std), dtype)

    def convert(self, clip: Tensor) -> Tensor:
        """For a kernel that does not: a pass of its own, to channels_last_3d."""
        return torch.ops.r3d_kernels.clip_channels_last(clip, self.scale, self.shift, self.dtype)


def normalized_clip(clip: Tensor, mean: Values | None, std: Values | None, dtype: torch.dtype) -> Tensor:
    """``(clip - mean) / std`` by torch's own operators, computed in float32 at least and rounded once.

    Keeps the clip's memory format. No checks: `mean` and `std` are what `channel_values` returned.
    """
    wide = torch.promote_types(dtype, torch.float32)
    scale, shift = (
        None if t is None else t.view(1, -1, 1, 1, 1) for t in _scale_and_shift(clip, mean, std, wide)
    )
    y = clip.to(wide)
    if scale is not None and shift is not None:
        y = torch.addcmul(shift, y, scale)
    elif scale is not None:
        y = y * scale
    elif shift is not None:
        y = y + shift
    return y.to(dtype)


def clip_channels_last(
    clip: Tensor,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``(clip - mean) / std`` in one pass from a decoder's layout to the one that our layers want.

    A network does this itself where it is given a uint8 clip: see `ResNet3D`, ``clip_mean`` and ``clip_std``.

    Args:
        clip: [N, C, D, H, W], uint8 or floating, any strides.
        mean, std: one number a channel, in the clip's own units (0 to 255 for uint8); 0 and 1 by default.
        dtype: of the result.

    Returns:
        [N, C, D, H, W] of `dtype`, channels_last_3d; computed in float32 and rounded once.

    Raises:
        TypeError, ValueError: for wrong arguments, by name.
    """
    _check.tensor(clip, "clip")
    if clip.dim() != 5:
        raise ValueError(f"clip: expected 5 dimensions [N, C, D, H, W], got shape {list(clip.shape)}")
    mean = channel_values(mean, "mean", clip.shape[1])
    std = channel_values(std, "std", clip.shape[1], positive=True)
    if clip.dtype in _READABLE and dtype in _READABLE[1:] and _extension.runs_cuda(clip):
        return ClipSource.of(clip, mean, std, dtype).convert(clip)
    return normalized_clip(clip, mean, std, dtype).contiguous(memory_format=torch.channels_last_3d)


if _extension.has_cuda:

    @torch.library.register_fake("r3d_kernels::clip_channels_last")
    def _(x: Tensor, scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
        return torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=torch.channels_last_3d)
