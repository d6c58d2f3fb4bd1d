"""Our tensor-core convolution for compute capability 8.0 and later, as a choice of `backends`."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from r3d_kernels import _extension
from r3d_kernels._kernel import fp32_mode

if TYPE_CHECKING:
    from r3d_kernels._kernel import Layer, Request
    from r3d_kernels.ops.clip import ClipSource


TILES = ("128x128", "128x64", "64x64")  # pixels x output channels, in the order of csrc/cuda/conv3d_sm80.h


def tf32_allowed() -> bool:
    """Whether torch's switches allow TF32 in float32 convolutions."""
    precision = getattr(getattr(torch.backends.cudnn, "conv", None), "fp32_precision", None)
    # Where the newer switch exists, reading the older one may raise.
    return precision == "tf32" if precision is not None else torch.backends.cudnn.allow_tf32


class TensorCoreSm80:
    """Our implicit-GEMM convolution with mma.sync, everything behind it fused in float32 (csrc/cuda/conv3d_sm80.cu).

    The weights stay as they are: batch norm's scale is applied to the float32 sum, so that nothing is rounded twice.
    Channels that make no whole multiple of 16 bytes lie in pixels that do: outputs are ``[:, :K]`` of such a tensor,
    and an input is read in place where it is one, that is behind a layer of this kernel or of `Sm90Cuda`.

    Args:
        tile: one of `TILES`, or None for the one that is predicted to be the fastest.
    """

    backend = "cuda"
    private = True  # tried once before it may be chosen: the build may lack code for this very GPU
    compared = True  # and held against the stock layers then

    def __init__(self, tile: str | None = None) -> None:
        self.name = "sm80" if tile is None else f"sm80 {tile}"
        self.tile = -1 if tile is None else TILES.index(tile)

    def can_run(self, request: Request) -> str | None:
        p = request.problem
        if request.device.type != "cuda":
            return f"needs a CUDA tensor, got {request.device.type}"
        if not _extension.has_cuda:
            return "the CUDA kernels were not compiled (no nvcc at build time)"
        if request.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"has float32 (TF32), bfloat16 and float16 only, got {request.dtype}"
        if request.dtype == torch.float32 and fp32_mode() == "strict":
            return "TF32 is outside R3D_KERNELS_FP32=strict"
        if request.dtype == torch.float32 and not tf32_allowed():
            return "torch's switches do not allow TF32, and tensor cores have no float32"
        if p.groups != 1:
            return f"has groups=1 only, got {p.groups}"
        if not _extension.capable(request.device.index):
            return "needs a GPU of compute capability 8.0 or later"
        geometry = (
            [p.n, p.c, p.d, p.h, p.w],
            [p.k, p.c, *p.kernel],
            request.dtype,
            p.stride,
            p.padding,
            p.dilation,
        )
        why_not = torch.ops.r3d_kernels.conv3d_sm80_refuses(*geometry)
        return why_not or self._not_worth_a_measurement(geometry, request.device.index)

    def _not_worth_a_measurement(self, geometry: tuple, device: int | None) -> str | None:
        if self.tile < 0:
            return None
        sms = _extension.multiprocessors(device)
        choose = torch.ops.r3d_kernels.conv3d_sm80_choice
        best, own = choose(*geometry, sms), choose(*geometry, sms, self.tile)
        if not own:
            return "the tile leaves no room for the offsets of this many taps"
        if own[0] == best[0]:
            return "is what 'sm80' takes here"
        return "predicted to be far slower" if own[2] > 1.6 * best[2] else None

    def pack_key(self, request: Request) -> Hashable:
        p = request.problem
        return request.dtype, p.stride, p.dilation

    def pack(self, layer: Layer, request: Request) -> Any:
        p = request.problem
        weight = layer.weight if layer.weight.dtype == torch.float32 else layer.weight.to(request.dtype)
        packed = torch.ops.r3d_kernels.conv3d_sm80_pack(weight, request.dtype, p.stride, p.dilation)
        return packed, None if layer.scale is None else layer.scale.float(), layer.shift.float()

    def run(self, pack: Any, x: Tensor, residual: Tensor | None, request: Request) -> Tensor:
        return torch.ops.r3d_kernels.conv3d_sm80(x, *pack, residual, *self._geometry(request))

    def run_clip(self, pack: Any, clip: Tensor, source: ClipSource, request: Request) -> Tensor:
        """Reads the clip where the decoder left it: normalised on the way to the rows that it copies x to anyway."""
        return torch.ops.r3d_kernels.conv3d_sm80_clip(
            clip, source.scale, source.shift, *pack, *self._geometry(request)
        )

    def _geometry(self, request: Request) -> tuple:
        p = request.problem
        return p.k, p.kernel, p.stride, p.padding, p.dilation, p.activation or "none", self.tile
