"""The tensor-core convolution for compute capability 8.0 and later (csrc/cuda/conv3d_sm80*.cu), and what feeds it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from r3d_kernels import _check, _extension
from r3d_kernels.ops._flops import flop_formula

__all__ = ["clip_channels_last"]


def clip_channels_last(
    clip: Tensor,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``(clip - mean) / std`` in one pass from a decoder's layout to the one that our layers want.

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
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != clip.shape[1]:
            raise ValueError(f"{name}: expected {clip.shape[1]} numbers, one a channel, got {len(values)}")
    if std is not None and not all(s > 0 and math.isfinite(s) for s in std):
        raise ValueError(f"std: expected finite numbers > 0, got {list(std)}")
    scale = None if std is None else torch.tensor([1 / s for s in std], device=clip.device)
    shift = None
    if mean is not None:
        factors = std if std is not None else [1.0] * len(mean)
        shift = torch.tensor([-m / s for m, s in zip(mean, factors, strict=True)], device=clip.device)
    kernels = (torch.uint8, torch.float32, torch.bfloat16, torch.float16)
    if clip.dtype in kernels and dtype in kernels[1:] and _extension.runs_cuda(clip):
        return torch.ops.r3d_kernels.clip_channels_last(clip, scale, shift, dtype)
    shape = (1, -1, 1, 1, 1)
    y = clip.to(torch.promote_types(dtype, torch.float32))
    y = y if scale is None else y * scale.view(shape)
    y = y if shift is None else y + shift.view(shape)
    return y.to(dtype).contiguous(memory_format=torch.channels_last_3d)


if _extension.has_cuda:

    @torch.library.register_fake("r3d_kernels::conv3d_sm80_pack")
    def _(weight: Tensor, dtype: torch.dtype, stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
        row = torch.ops.r3d_kernels.conv3d_sm80_row(list(weight.shape), dtype, stride, dilation)
        return weight.new_empty((weight.shape[0], row), dtype=dtype)

    @torch.library.register_fake("r3d_kernels::conv3d_sm80")
    def _(
        x: Tensor,
        packed: Tensor,
        scale: Tensor | None,
        bias: Tensor,
        residual: Tensor | None,
        out_channels: int,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        activation: str,
        tile: int = -1,
    ) -> Tensor:
        torch._check(x.dim() == 5, lambda: f"x: expected 5 dimensions [N, C, D, H, W], got shape {x.shape}")
        size = [
            (i + 2 * p - d * (f - 1) - 1) // s + 1
            for i, f, s, p, d in zip(x.shape[2:], kernel_size, stride, padding, dilation, strict=True)
        ]
        shape = (x.shape[0], out_channels, *size)
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)

    @torch.library.register_fake("r3d_kernels::clip_channels_last")
    def _(x: Tensor, scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
        return torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=torch.channels_last_3d)

    @flop_formula(torch.ops.r3d_kernels.conv3d_sm80)
    def _flops(x, packed, scale, bias, residual, k, kernel, *args, out_shape=None, **kwargs) -> int:
        return 2 * x[1] * math.prod(kernel) * math.prod(out_shape)
