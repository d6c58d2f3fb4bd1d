"""The Hopper convolution as one of the kernels that `backends` chooses from."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from r3d_kernels import _extension

if TYPE_CHECKING:
    from r3d_kernels._kernel import Layer, Request

__all__ = ["TILES", "Sm90Cuda", "why_no_hopper"]

# Pixels and channels of a tile, and the filter taps that share a load of pixels: csrc/cuda/conv3d_sm90.h.
TILES = (
    (240, 128, 3),
    (352, 64, 3),
    (480, 64, 3),
    (128, 64, 3),
    (256, 128, 1),
    (128, 256, 1),
    (384, 64, 1),
    (256, 64, 1),
    (128, 128, 1),
    (64, 256, 1),
    (128, 64, 1),
    (64, 128, 1),
    (64, 64, 1),
)

_FEWEST_CHANNELS = 16  # a quarter of a step, which always multiplies 64
# Times the best estimate. On an H100 (benchmarks/results/h100/gpu_report_2.json), estimates of tiles that are any good
# were mostly within a tenth of what was measured, either way; that of a layer's fastest tile was at most 1.247 times
# the best. (Not where memory is the limit: all tiles take the same there.) These are the layers that the estimates were
# fitted to: others may need more.
_WORTH_A_TRY = 1.25


def why_no_hopper(request: Request) -> str | None:
    """None, or why no Hopper kernel of ours runs the request."""
    from r3d_kernels import backends  # it imports this module

    if request.device.type != "cuda":
        return f"needs a CUDA tensor, got {request.device.type}"
    if not any(arch.startswith("9.0a") for arch in backends.describe()["cuda_archs"]):
        return "was not compiled for 9.0a"
    if not torch.cuda.is_available():
        return "there is no CUDA device here"
    if torch.cuda.get_device_capability(request.device) != (9, 0):
        return "needs a GPU of compute capability 9.0"
    if request.dtype not in (torch.bfloat16, torch.float16):
        return f"has bfloat16 and float16 only, got {request.dtype}"
    return f"has groups=1 only, got {request.problem.groups}" if request.problem.groups != 1 else None


class Sm90Cuda:
    """Our implicit GEMM on TMA and wgmma (csrc/cuda/conv3d_sm90.cu). Weights stay unfolded: it scales in float32.

    Channels that are no multiple of 8 lie in pixels of whole 16 bytes: weights are packed so, outputs are
    ``[:, :K]`` of such a tensor, and an input is read in place where it is one, that is behind a layer of this kernel.

    Args:
        tile: index into `TILES`, or None for the one that is predicted to be the fastest.
    """

    backend = "cuda"
    # The trial of every tile is of one small geometry: each layer is tried too, and held against the stock layers.
    private = True
    compared = True

    def __init__(self, tile: int | None = None) -> None:
        self.tile = tile
        self.quiet = tile is not None
        self.name = "wgmma" if tile is None else "wgmma " + "x".join(map(str, TILES[tile]))

    def can_run(self, request: Request) -> str | None:
        p = request.problem
        if (why_not := why_no_hopper(request)) is not None:
            return why_not
        if p.c < _FEWEST_CHANNELS:
            return f"multiplies 64 channels at a time, more than it is worth for {p.c}"
        why_not = torch.ops.r3d_kernels.conv3d_sm90_refuses(
            p.in_shape, p.weight_shape, p.stride, p.padding, p.dilation, request.dtype
        )
        return why_not or self._unproven(request) or self._not_worth_a_measurement(request)

    @staticmethod
    def _index(device: torch.device) -> int:
        return torch.cuda.current_device() if device.index is None else device.index

    @staticmethod
    def _padded(request: Request) -> bool:
        return request.problem.c % 8 != 0 or request.problem.k % 8 != 0

    def _unproven(self, request: Request) -> str | None:
        from r3d_kernels.ops import conv3d_sm90

        index, padded = self._index(request.device), self._padded(request)
        if (index, padded) not in conv3d_sm90.proven and torch.cuda.is_current_stream_capturing():
            return "is not tried for the first time while a CUDA graph is captured"
        if not conv3d_sm90.proven_tiles(index, padded):
            if (why_not := conv3d_sm90.refused.get(index)) is not None:
                return why_not
            return "gave wrong results on a small convolution on this GPU"
        return None

    def _tiles(self, request: Request) -> int:
        """Bits of those that may run."""
        from r3d_kernels.ops import conv3d_sm90

        proven = conv3d_sm90.proven_tiles(self._index(request.device), self._padded(request))
        return proven if self.tile is None else proven & 1 << self.tile

    def _not_worth_a_measurement(self, request: Request) -> str | None:
        if self.tile is None:
            return None
        p, sms = request.problem, _extension.multiprocessors(self._index(request.device))
        geometry = (p.in_shape, p.weight_shape, p.stride, p.padding, p.dilation, sms)
        mine = self._tiles(request)
        own = torch.ops.r3d_kernels.conv3d_sm90_choice(*geometry, mine) if mine else None
        if not own:
            return (
                "the tile does not fit" if mine else "gave wrong results on a small convolution on this GPU"
            )
        best = torch.ops.r3d_kernels.conv3d_sm90_choice(*geometry, Sm90Cuda()._tiles(request))
        if own[0] == best[0]:
            return "is what 'wgmma' takes here"
        return "predicted to be far slower" if own[2] > _WORTH_A_TRY * best[2] else None

    def pack_key(self, request: Request) -> Hashable:
        return request.dtype, self._padded(request)

    def pack(self, layer: Layer, request: Request) -> Any:
        # [K, T, R, S, C] in memory, C at a multiple of 8
        c = request.problem.c
        weight = F.pad(layer.weight.to(request.dtype), (0,) * 7 + (-c % 8,)) if c % 8 else layer.weight
        weight = weight.to(request.dtype).contiguous(memory_format=torch.channels_last_3d)[:, :c]
        scale = torch.ones_like(layer.shift) if layer.scale is None else layer.scale
        return weight, scale.float(), layer.shift.float(), self._tiles(request)

    def run(self, pack: Any, x: Tensor, residual: Tensor | None, request: Request) -> Tensor:
        p = request.problem
        weight, scale, shift, tiles = pack
        activation = p.activation or "none"
        return torch.ops.r3d_kernels.conv3d_sm90(
            x, weight, scale, shift, residual, p.stride, p.padding, p.dilation, activation, tiles
        )
