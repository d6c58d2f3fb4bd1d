"""The tensor-core convolution for compute capability 8.0 and later (csrc/cuda/conv3d_sm80*.cu): its fakes.

It is called through `backends`; nothing here is for users.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from r3d_kernels import _extension
from r3d_kernels.ops._flops import flop_formula


def _output(
    x: Tensor,
    dtype: torch.dtype,
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
    # a pixel begins at every multiple of 16 bytes
    shape = (x.shape[0], out_channels + -out_channels % (16 // dtype.itemsize), *size)
    y = torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last_3d)
    return y.narrow(1, 0, out_channels)


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
        *args,
        **kwargs,
    ) -> Tensor:
        return _output(x, x.dtype, *args, **kwargs)

    @torch.library.register_fake("r3d_kernels::conv3d_sm80_clip")
    def _(
        x: Tensor,
        clip_scale: Tensor | None,
        clip_shift: Tensor | None,
        packed: Tensor,
        scale: Tensor | None,
        bias: Tensor,
        *args,
        **kwargs,
    ) -> Tensor:
        return _output(x, packed.dtype, *args, **kwargs)

    @flop_formula(torch.ops.r3d_kernels.conv3d_sm80)
    def _flops(x, packed, scale, bias, residual, k, kernel, *args, out_shape=None, **kwargs) -> int:
        return 2 * x[1] * math.prod(kernel) * math.prod(out_shape)

    @flop_formula(torch.ops.r3d_kernels.conv3d_sm80_clip)
    def _clip_flops(
        x, clip_scale, clip_shift, packed, scale, bias, k, kernel, *args, out_shape=None, **kwargs
    ) -> int:
        return 2 * x[1] * math.prod(kernel) * math.prod(out_shape)
