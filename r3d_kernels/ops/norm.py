"""Batch norm with given scale and shift, residual and activation, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from r3d_kernels import _check, _extension, reference
from r3d_kernels.ops.conv3d import is_plain, needs_gradient

__all__ = ["bn_act"]


def bn_act(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    activation: str | None = "relu",
) -> Tensor:
    """``act(x * scale + shift + residual)``, in one pass over memory.

    Args:
        x: [N, C, D, H, W]; our kernels take float32 and bfloat16 on a CPU, and float16 too on a GPU.
        scale, shift: float32 [C].
        residual: as x, or None.
        activation: "relu" or None.

    Returns:
        As x, channels_last_3d where our kernel ran; computed in float32 and rounded once.

    Raises:
        TypeError, ValueError: for wrong arguments, by name.
    """
    _check.tensor(x, "x")
    if x.dim() != 5:
        raise ValueError(f"x: expected 5 dimensions [N, C, D, H, W], got shape {list(x.shape)}")
    act = _check.activation(activation)
    for name, t in (("scale", scale), ("shift", shift)):
        _check.vector(t, name, x.shape[1], x.device)
        if t.dtype != torch.float32 and x.dtype != torch.float64:
            raise TypeError(f"{name}: expected torch.float32, got {t.dtype}")
    if residual is not None:
        _check.tensor(residual, "residual")
        _check.same_dtype(residual, "residual", x.dtype)
        _check.same_device(residual, "residual", x.device)
        if residual.shape != x.shape:
            raise ValueError(f"residual: expected shape {list(x.shape)}, got {list(residual.shape)}")
    tensors = (x, scale, shift, residual)
    if not is_plain(*tensors) or not _extension.takes(x) or needs_gradient(*tensors):
        return reference.bn_act(x, scale, shift, residual, activation)
    return torch.ops.r3d_kernels.bn_act(x, scale, shift, residual, act)


if _extension.error is None:

    @torch.library.register_fake("r3d_kernels::bn_act")
    def _(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
