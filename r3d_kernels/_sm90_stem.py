"""The Hopper convolution of few channels as one of the kernels that `backends` chooses from."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from r3d_kernels._sm90 import why_no_hopper

if TYPE_CHECKING:
    from r3d_kernels._kernel import Layer, Request
    from r3d_kernels.ops.clip import ClipSource

__all__ = ["WINDOWS", "PooledSm90Stem", "Sm90Stem"]


Triple = tuple[int, int, int]

WINDOWS: dict[int, tuple[Triple, Triple, Triple]] = {
    1: ((1, 3, 3), (1, 2, 2), (0, 1, 1)),
    3: ((3, 3, 3), (2, 2, 2), (1, 1, 1)),
}
"""Frames of a window -> kernel, stride and padding of the max-pools that the kernel has: those of ResNets' stems."""


class Sm90Stem:
    """Our stem on wgmma (csrc/cuda/conv3d_sm90_stem.cu): few channels, any clip, weights unfolded.

    A value that is no number or infinite can show in the outputs next to those whose windows it is in: windows are
    multiplied as wide as whole units of memory, with zeros behind the filter.
    """

    name = "wgmma stem"
    backend = "cuda"
    private = True  # tried once before it may be chosen
    compared = True  # and held against the stock layers then

    pool_frames = 0

    def can_run(self, request: Request) -> str | None:
        p = request.problem
        if (why_not := why_no_hopper(request)) is not None:
            return why_not
        if p.residual:
            return "adds no residual"
        geometry = (p.in_shape, p.weight_shape, p.stride, p.padding, p.dilation)
        refuses = torch.ops.r3d_kernels.conv3d_sm90_stem_refuses
        why_not = refuses(*geometry, request.dtype, self.pool_frames)
        return why_not or self._unproven(request.device)

    @staticmethod
    def _unproven(device: torch.device) -> str | None:
        from r3d_kernels.ops import conv3d_sm90, conv3d_sm90_stem

        index = torch.cuda.current_device() if device.index is None else device.index
        if index not in conv3d_sm90_stem.proven and torch.cuda.is_current_stream_capturing():
            return "is not tried for the first time while a CUDA graph is captured"
        if conv3d_sm90_stem.proven_stem(index):
            return None
        return conv3d_sm90.refused.get(index, "gave wrong results on a small convolution on this GPU")

    def pack_key(self, request: Request) -> Hashable:
        return request.dtype, request.problem.stride

    def pack(self, layer: Layer, request: Request) -> Any:
        from r3d_kernels.ops.conv3d_sm90_stem import pack

        p = request.problem
        layout = torch.ops.r3d_kernels.conv3d_sm90_stem_layout(p.weight_shape, p.stride)
        scale = torch.ones_like(layer.shift) if layer.scale is None else layer.scale
        return pack(layer.weight.to(request.dtype), layout), scale.float(), layer.shift.float()

    def run(self, pack: Any, x: Tensor, residual: Tensor | None, request: Request) -> Tensor:
        return self._run(pack, x, None, None, request)

    def run_clip(self, pack: Any, clip: Tensor, source: ClipSource, request: Request) -> Tensor:
        """Reads the clip where the decoder left it: normalised on the way to the rows that it copies x to anyway."""
        return self._run(pack, clip, source.scale, source.shift, request)

    def with_pool(self, request: Request, frames: int) -> PooledSm90Stem | None:
        """The kernel with a max-pool behind it, where it can run that."""
        pooled = PooledSm90Stem(frames)
        return pooled if pooled.can_run(request) is None else None

    def remembers(self, request: Request) -> list[tuple[str, str]]:
        from r3d_kernels import _pooled, backends

        asked = backends.current_backend()
        return [_pooled.cache_key(request, asked, frames) for frames in _pooled.WINDOWS]

    def _run(
        self, pack: Any, x: Tensor, scale: Tensor | None, shift: Tensor | None, request: Request
    ) -> Tensor:
        p = request.problem
        geometry = (p.k, p.kernel, p.stride, p.padding, p.activation or "none")
        return torch.ops.r3d_kernels.conv3d_sm90_stem(x, scale, shift, *pack, *geometry, -1, self.pool_frames)


class PooledSm90Stem(Sm90Stem):
    """The same with a max-pool in the kernel: what the convolution makes never leaves shared memory."""

    name = "wgmma stem with max-pool"
    packs_of = Sm90Stem.name

    def __init__(self, frames: int) -> None:
        self.pool_frames = frames
