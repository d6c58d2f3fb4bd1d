"""3-D max-pooling over channels-last tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from r3d_kernels import _check, _extension, reference
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
        [N, C, D', H', W'], channels_last_3d where our kernel ran (float32 and bfloat16, on a GPU float16 too,
            no gradient needed).

    Raises:
        TypeError, ValueError: for wrong arguments, by name.
    """
    _check.tensor(x, "x")
    if x.dim() != 5:
        raise ValueError(f"x: expected 5 dimensions [N, C, D, H, W], got shape {list(x.shape)}")
    kernel = _check.triple(kernel_size, "kernel_size")
    steps = kernel if stride is None else _check.triple(stride, "stride")
    pads = _check.triple(padding, "padding")
    for name, values, least in (("kernel_size", kernel, 1), ("stride", steps, 1), ("padding", pads, 0)):
        if min(values) < least:
            raise ValueError(f"{name}: expected integers >= {least}, got {list(values)}")
    if any(2 * p > k for p, k in zip(pads, kernel, strict=True)):
        raise ValueError(f"padding: expected at most half of kernel_size {list(kernel)}, got {list(pads)}")
    if any(i + 2 * p < k for i, p, k in zip(x.shape[2:], pads, kernel, strict=True)):
        raise ValueError(
            f"kernel_size: the window {list(kernel)} does not fit into input {list(x.shape[2:])} "
            f"with padding {list(pads)}"
        )
    if not is_plain(x) or not _extension.takes(x) or needs_gradient(x):
        return reference.max_pool3d(x, kernel, steps, pads)
    return torch.ops.r3d_kernels.max_pool3d(x, kernel, steps, pads)


if _extension.error is None:

    @torch.library.register_fake("r3d_kernels::max_pool3d")
    def _(x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
        size = [
            (i + 2 * p - k) // s + 1
            for i, k, s, p in zip(x.shape[2:], kernel_size, stride, padding, strict=True)
        ]
        shape = (x.shape[0], x.shape[1], *size)
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
