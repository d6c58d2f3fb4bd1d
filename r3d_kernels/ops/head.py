"""Global average pool and the linear layer behind it."""

from __future__ import annotations

import torch
from torch import Tensor

from r3d_kernels import _check, _extension, reference
from r3d_kernels.ops.conv3d import is_plain, needs_gradient

__all__ = ["avg_pool_linear"]


def avg_pool_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear(mean of x over D, H, W)``

    Args:
        x: [N, C, D, H, W], any floating dtype.
        weight: [classes, C], dtype of x.
        bias: [classes], dtype of x, or None.

    Returns:
        [N, classes] of x's dtype. bfloat16 and float16 are averaged and multiplied in float32 and rounded once.

    Raises:
        TypeError, ValueError: for wrong arguments, by name.
    """
    _check.tensor(x, "x")
    _check.tensor(weight, "weight")
    if x.dim() != 5 or min(x.shape[1:]) < 1:
        raise ValueError(f"x: expected [N, C, D, H, W], empty in N only, got shape {list(x.shape)}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight: expected shape [classes, {x.shape[1]}], got {list(weight.shape)}")
    _check.same_dtype(weight, "weight", x.dtype)
    _check.same_device(weight, "weight", x.device)
    if bias is not None:
        _check.vector(bias, "bias", weight.shape[0], x.device)
        _check.same_dtype(bias, "bias", x.dtype)
    if not is_plain(x, weight, bias) or not _extension.takes(x) or needs_gradient(x, weight, bias):
        return reference.avg_pool_linear(x, weight, bias)
    return torch.ops.r3d_kernels.avg_pool_linear(x, weight, bias)


if _extension.error is None:

    @torch.library.register_fake("r3d_kernels::avg_pool_linear")
    def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return x.new_empty((x.shape[0], weight.shape[0]))
