"""3-D max-pooling over channels-last tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from r3d_kernels import _check, _extension, _pools, reference
from r3d_kernels.ops.conv3d import is_plain, needs_gradient

__all__ = ["max_pool3d"]


def max_pool3d(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
) -> Tensor:
    """Maximum over windows; NaN wins, as in torch.

    Args:
        x: [N, C, D, H, W], any floating dtype.
        kernel_size, stride, padding: an int or three (depth, height, width); stride is kernel_size by default,
            padding at most half of kernel_size.

    Returns:
        [N, C, D', H', W'], channels_last_3d where a kernel of ours ran (float32 and bfloat16, on a GPU float16 too,
            no gradient needed). On a GPU the fastest is measured once, ours in CUDA and in Triton and torch's own.

    Raises:
        TypeError, ValueError: for wrong arguments, by name.
    """
    kernel, steps, pads = _check.pool_window(x, kernel_size, stride, padding)
    if not is_plain(x) or needs_gradient(x):
        return reference.max_pool3d(x, kernel, steps, pads)
    return _pools.max_pool3d(x, kernel, steps, pads)


if _extension.error is None:

    @torch.library.register_fake("r3d_kernels::max_pool3d")
    def _(x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
        size = [
            (i + 2 * p - k) // s + 1
            for i, k, s, p in zip(x.shape[2:], kernel_size, stride, padding, strict=True)
        ]
        shape = (x.shape[0], x.shape[1], *size)
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
