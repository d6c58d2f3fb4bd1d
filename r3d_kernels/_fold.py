"""Batch norm folded into the convolution before it, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def scale_and_shift(
    running_mean: Tensor,
    running_var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    conv_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(scale, shift), both float64 [K] on the statistics' device: bn(conv + conv_bias) = conv*scale + shift.

    eps is the layer's own: families differ (1e-5, but 1e-3 in MMAction2's R(2+1)D).
    """
    mean, var = running_mean.detach().double(), running_var.detach().double()
    scale = (var + eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma.detach().double()
    if conv_bias is not None:
        mean = mean - conv_bias.detach().double()
    shift = -mean * scale
    if beta is not None:
        shift = shift + beta.detach().double()
    return scale, shift


def identity(out_channels: int, conv_bias: Tensor | None, device: torch.device) -> tuple[None, Tensor]:
    """The same pair for a convolution without batch norm; no scale at all."""
    if conv_bias is not None:
        return None, conv_bias.detach().double()
    return None, torch.zeros(out_channels, dtype=torch.float64, device=device)
