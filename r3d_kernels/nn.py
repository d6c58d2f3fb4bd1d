"""Fused layers for 3-D ResNets."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["avg_pool_linear", "conv_bn_act", "max_pool3d"]


def conv_bn_act(
    x: Tensor,
    conv: nn.Conv3d,
    bn: nn.BatchNorm3d | None,
    *,
    activation: str | None = "relu",
    residual: Tensor | None = None,
    fused: bool = True,
) -> Tensor:
    y = conv(x)
    if bn is not None:
        y = bn(y)
    if residual is not None:
        y = y + residual
    if activation == "relu":
        y = F.relu(y)
    return y


def max_pool3d(x: Tensor, pool: nn.MaxPool3d, *, fused: bool = True) -> Tensor:
    return pool(x)


def avg_pool_linear(x: Tensor, fc: nn.Linear, *, fused: bool = True) -> Tensor:
    return fc(F.adaptive_avg_pool3d(x, 1).flatten(1))
