"""Pure-torch twins of the ops: what they compute, in as few lines as possible, in any dtype and on any device.

Called with float64 tensors these are the oracle that every kernel is judged against. They differentiate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["avg_pool_linear", "bn_act", "conv3d_bias_act", "conv3d_bn_act", "max_pool3d"]


def _finish(y: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    if residual is not None:
        y = y + residual
    return F.relu(y) if activation == "relu" else y


def conv3d_bias_act(
    x: Tensor,  # [N, C, D, H, W]
    weight: Tensor,  # [K, C/groups, T, R, S]
    bias: Tensor | None = None,  # [K]
    residual: Tensor | None = None,  # [N, K, D', H', W']
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    activation: str | None = "relu",
) -> Tensor:
    """act(conv3d(x, weight) + bias + residual)"""
    return _finish(F.conv3d(x, weight, bias, stride, padding, dilation, groups), residual, activation)


def conv3d_bn_act(
    x: Tensor,  # [N, C, D, H, W]
    weight: Tensor,  # [K, C/groups, T, R, S]
    running_mean: Tensor,  # [K]
    running_var: Tensor,  # [K]
    gamma: Tensor | None,  # [K]
    beta: Tensor | None,  # [K]
    eps: float,
    *,
    residual: Tensor | None = None,  # [N, K, D', H', W']
    activation: str | None = "relu",
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """act(batch_norm(conv3d(x, weight)) + residual), with the running statistics"""
    y = F.conv3d(x, weight, None, stride, padding, dilation, groups)
    y = F.batch_norm(y, running_mean, running_var, gamma, beta, False, 0.0, eps)
    return _finish(y, residual, activation)


def bn_act(
    x: Tensor,  # [N, C, D, H, W]
    scale: Tensor,  # [C]
    shift: Tensor,  # [C]
    residual: Tensor | None = None,  # as x
    activation: str | None = "relu",
) -> Tensor:
    """act(x * scale + shift + residual), computed in at least float32"""
    wide = torch.promote_types(x.dtype, torch.float32)
    shape = (1, -1, 1, 1, 1)
    y = x.to(wide) * scale.to(wide).view(shape) + shift.to(wide).view(shape)
    return _finish(y, None if residual is None else residual.to(wide), activation).to(x.dtype)


def max_pool3d(
    x: Tensor, kernel_size: int | Sequence[int], stride: int | Sequence[int], padding: int | Sequence[int] = 0
) -> Tensor:
    """F.max_pool3d"""
    return F.max_pool3d(x, kernel_size, stride, padding)


def avg_pool_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """linear(mean of x over D, H, W)"""
    return F.linear(x.mean((2, 3, 4)), weight, bias)
