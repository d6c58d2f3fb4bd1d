"""Global average pool and the linear layer behind it."""

from __future__ import annotations

import torch
from torch import Tensor

from r3d_kernels import _check, _extension, _pools, reference
from r3d_kernels.ops.conv3d import is_plain, needs_gradient

__all__ = ["avg_pool_linear"]


def avg_pool_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear(mean of x over D, H, W)``

    Args:
        x: [N, C, D, H, W], any floating dtype.
        weight: [classes, C], dtype of x.
        bias: [classes], dtype of x, or None.

    Returns:
        [N, classes] of x's dtype. Our kernels average and multiply bfloat16 and float16 in float32 and round once; on
        a GPU the fastest is measured once, ours in CUDA and in Triton and torch's own.

    Raises:
        TypeError, ValueError: for wrong arguments, by name.
    """
    _check.head(x, weight, bias)
    if not is_plain(x, weight, bias) or needs_gradient(x, weight, bias):
        return reference.avg_pool_linear(x, weight, bias)
    return _pools.avg_pool_linear(x, weight, bias)


if _extension.error is None:

    @torch.library.register_fake("r3d_kernels::avg_pool_linear")
    def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return x.new_empty((x.shape[0], weight.shape[0]))
