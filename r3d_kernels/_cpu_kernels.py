"""Our C++ kernels as choices of `backends`: what each can run, and a rough idea of how long it takes."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from r3d_kernels import _extension, _keeping
from r3d_kernels._kernel import Kernel, Layer, Request, Work, describe, fp32_mode, is_alias, memory_mode
from r3d_kernels.problems import ConvProblem

_BYTES_A_CYCLE = 6.0  # weights from beyond L2, per core


class DirectCpu:
    """Our C++ direct convolution: channels-last, register-tiled, float32 accumulation (csrc/cpu/conv3d_*).

    Reads the parameter itself: nothing is packed. bfloat16 products on processors that have them.
    """

    name = "direct"
    backend = "cpu"
    copies_weights = False

    def can_run(self, request: Request) -> str | None:
        if request.device.type != "cpu":
            return f"needs a CPU tensor, got {request.device.type}"
        if _extension.error is not None:
            return f"the compiled library is missing ({_extension.error})"
        if request.dtype not in (torch.float32, torch.bfloat16):
            return f"has float32 and bfloat16 only, got {request.dtype}"
        if request.problem.groups != 1:
            return f"has groups=1 only, got {request.problem.groups}"
        return None

    def pack_key(self, request: Request) -> Hashable:
        return request.dtype

    def pack(self, layer: Layer, request: Request) -> Any:
        scale = None if layer.scale is None else layer.scale.float()
        weight = layer.weight.to(request.dtype)
        if not weight.is_contiguous(memory_format=torch.channels_last_3d):  # both are read as they are
            weight = weight.contiguous()
        return weight, scale, layer.shift.float()

    def reads_weight(self, pack: Any, layer: Layer) -> bool:
        return is_alias(pack[0], layer.weight)

    def run(self, pack: Any, x: Tensor, residual: Tensor | None, request: Request) -> Tensor:
        p = request.problem
        return torch.ops.r3d_kernels.conv3d_direct(
            x, *pack, residual, p.stride, p.padding, p.dilation, p.activation or "none"
        )

    def cycles(self, request: Request) -> float:
        """A rough prediction for one thread, for comparing our CPU kernels with one another.

        Not for `request.threads`: an unmeasured choice, and so the bits, must not depend on them.
        """
        p = request.problem
        work = p.macs_inside / (2 * _vector_lanes() * 0.9)
        return work + p.c * p.k * math.prod(p.kernel) * 4 / _BYTES_A_CYCLE


class KeptCpu(DirectCpu):
    """The direct convolution of few pixels with weights that were turned once and are kept.

    With very few pixels, planes of taps that only meet padding are left out. In lean memory mode only float32 layers
    at batch 1 keep weights, and all of a process no more than `_keeping.LEAN` bytes, first come, first served.
    """

    name = "direct kept"
    _MOST_PIXELS = 1024  # with more, turning is too small a part of the work
    _FEW_PIXELS = 512  # kFewPixels in csrc/cpu/conv3d_kernel.inl

    def can_run(self, request: Request) -> str | None:
        why_not = super().can_run(request)
        if why_not is not None:
            return why_not
        p = request.problem
        if not 0 < p.n * math.prod(p.out_size) <= self._MOST_PIXELS:
            return f"is for 1 to {self._MOST_PIXELS} output pixels, got {p.n * math.prod(p.out_size)}"
        if math.prod(p.kernel) > 32:
            return f"is for kernels of at most 32 taps, got {p.kernel}"
        if memory_mode() == "lean" and request.dtype != torch.float32:
            return "keeps float32 weights only (R3D_KERNELS_MEMORY=fast allows others)"
        if memory_mode() == "lean" and p.n > 1:  # our outputs, which wait for the next call, take the room
            return f"keeps weights for one clip at a time, got {p.n} (R3D_KERNELS_MEMORY=fast allows more)"
        size = self._bytes(request)
        if not _keeping.shared.fits(size, self._limit()):
            return (
                f"would keep {size >> 20} MiB beside {_keeping.shared.held >> 20} MiB that other layers keep "
                "(R3D_KERNELS_MEMORY=fast allows it)"
            )
        return None

    @staticmethod
    def _limit() -> int | None:
        return _keeping.LEAN if memory_mode() == "lean" else None

    @staticmethod
    def _bytes(request: Request) -> int:
        p = request.problem
        planes = p.kernel[0]
        if p.n * math.prod(p.out_size) <= KeptCpu._FEW_PIXELS:
            planes = sum(
                any(
                    0 <= o * p.stride[0] - p.padding[0] + t * p.dilation[0] < p.d
                    for o in range(p.out_size[0])
                )
                for t in range(p.kernel[0])
            )
        return planes * p.kernel[1] * p.kernel[2] * p.c * p.k * request.dtype.itemsize

    def pack_key(self, request: Request) -> Hashable:
        p = request.problem
        geometry = (p.in_shape, p.stride, p.padding, p.dilation)
        return request.dtype, geometry, request.threads, describe()["isa"], memory_mode()

    def pack(self, layer: Layer, request: Request) -> Any:
        p = request.problem
        weight, *rest = super().pack(layer, request)
        reservation = _keeping.shared.reserve(self._bytes(request), self._limit())
        kept = None
        if reservation is not None:  # another thread may have been quicker
            kept = torch.ops.r3d_kernels.conv3d_keep(weight, p.in_shape, p.stride, p.padding, p.dilation)
        return weight, *rest, kept if kept is not None and kept.numel() else None, reservation

    def reads_weight(self, pack: Any, layer: Layer) -> bool:
        return pack[3] is None and super().reads_weight(pack, layer)

    def run(self, pack: Any, x: Tensor, residual: Tensor | None, request: Request) -> Tensor:
        p = request.problem
        *parameters, kept, _ = pack
        return torch.ops.r3d_kernels.conv3d_direct(
            x, *parameters, residual, p.stride, p.padding, p.dilation, p.activation or "none", kept
        )

    def cycles(self, request: Request) -> float:
        work = request.problem.macs_inside / (2 * _vector_lanes() * 0.9)
        return work + self._bytes(request) / (2 * _BYTES_A_CYCLE)


def _vector_lanes() -> int:
    """float32 lanes of the vectors that our CPU kernels use."""
    return {"scalar": 4, "avx2": 8}.get(describe()["isa"], 16)


def _tile_inputs(m: int) -> int:
    """Inputs that a Winograd tile with m outputs along an axis reads there."""
    return 1 if m == 1 else m + 2


class WinogradCpu(DirectCpu):
    """Our C++ Winograd convolution for 3-tap kernels of stride 1 or 2 (csrc/cpu/winograd*): fewer multiplications.

    Args:
        tile: outputs of a tile along depth, height and width; 1 where the kernel is 1.
        stride: along every axis that has a kernel.
    """

    def __init__(self, tile: tuple[int, int, int], stride: int = 1) -> None:
        self.tile = tile
        self.stride = stride
        self.name = f"winograd F({','.join(map(str, tile))})" + (f" s{stride}" if stride > 1 else "")

    def can_run(self, request: Request) -> str | None:
        why_not = super().can_run(request)
        if why_not is not None:
            return why_not
        p = request.problem
        if p.kernel != tuple(1 if m == 1 else 3 for m in self.tile):
            return f"the tile is not for kernel {p.kernel}"
        stride = tuple(1 if m == 1 else self.stride for m in self.tile)
        if p.stride != stride or p.dilation != (1, 1, 1):
            return f"needs stride {stride} and dilation 1"
        if fp32_mode() == "strict" and request.dtype == torch.float32:
            if 4 in self.tile:
                return "tiles of 4 outputs are outside R3D_KERNELS_FP32=strict"
            if self._edge(p):
                return "two planes in three products are outside R3D_KERNELS_FP32=strict"
        return None

    def run(self, pack: Any, x: Tensor, residual: Tensor | None, request: Request) -> Tensor:
        p = request.problem
        return torch.ops.r3d_kernels.conv3d_winograd(
            x, *pack, residual, p.stride, p.padding, p.activation or "none", self.tile
        )

    def work(self, request: Request) -> Work:
        p = request.problem
        return Work(self._tiles(p) * self._points(p) * p.c * p.k, p.bytes(request.dtype), torch.float32)

    def _points(self, p: ConvProblem) -> int:
        """Products of a tile, for each pair of channels."""
        along = [_tile_inputs(m) if m == 1 or self.stride == 1 else 2 * m + 1 for m in self.tile]
        return math.prod(along) * 3 // 4 if self._edge(p) else math.prod(along)

    def _filters(self, p: ConvProblem) -> int:
        """Transformed weights for each pair of channels: all products that a stride skips share one."""
        filters = math.prod(map(_tile_inputs, self.tile))
        return filters * 3 // 4 if self._edge(p) else filters

    def _edge(self, p: ConvProblem) -> bool:
        """Two planes of depth with padding around them take three products instead of four (csrc/cpu/winograd.h)."""
        return self.tile[0] == 2 and self.stride == 1 and (p.d, p.kernel[0], p.padding[0]) == (2, 3, 1)

    def _tiles(self, p: ConvProblem) -> int:
        return p.n * math.prod(-(-size // m) for size, m in zip(p.out_size, self.tile, strict=True))

    def cycles(self, request: Request) -> float:
        p, lanes = request.problem, _vector_lanes()
        tiles = self._tiles(p)
        points = self._points(p)
        transforms = 10 * points * tiles * (p.c + p.k) + 6 * self._filters(p) * p.c * p.k
        weights = math.prod(p.kernel) * p.c * p.k * request.dtype.itemsize / _BYTES_A_CYCLE
        return tiles * points * p.c * p.k / (2 * lanes) + transforms / lanes + weights


class AmxCpu(DirectCpu):
    """Our C++ implicit GEMM on matrix tiles (csrc/cpu/tiles*): reads the parameter itself, nothing is packed.

    float32 is split into three bfloat16 slices whose six products keep its accuracy. Two slices (three products, error
    about 4e-6) with `torch.set_float32_matmul_precision("high")`, one with "medium".

    Args:
        tile: outputs of a Winograd tile along depth and height; 1 elsewhere.
    """

    def __init__(self, tile: tuple[int, int, int]) -> None:
        self.tile = tile
        self.name = "AMX" if tile == (1, 1, 1) else f"AMX F({','.join(map(str, tile))})"

    def can_run(self, request: Request) -> str | None:
        why_not = super().can_run(request)
        if why_not is not None:
            return why_not
        if describe()["isa"] != "amx":
            return "this processor has no AMX tiles, or R3D_KERNELS_ISA leaves them out"
        p = request.problem
        if math.prod(p.kernel) > 1024:
            return f"takes kernels of at most 1024 taps, got {p.kernel}"
        for m, kernel, stride, dilation in zip(self.tile, p.kernel, p.stride, p.dilation, strict=True):
            if m > 1 and (kernel, stride, dilation) != (3, 1, 1):
                return f"the tile is not for kernel {p.kernel}, stride {p.stride}, dilation {p.dilation}"
        if self.tile != (1, 1, 1):
            if max(p.kernel[:2]) > 3:
                return f"the tile is not for kernel {p.kernel}"
            if request.dtype == torch.bfloat16:
                return "transformed values would be rounded to bfloat16"
            if self._slices(request) == 1:
                return "tiles are for float32 accuracy"
            if 4 in self.tile and fp32_mode() == "strict":
                return "tiles of 4 outputs are outside R3D_KERNELS_FP32=strict"
        return None

    @staticmethod
    def _slices(request: Request) -> int:
        if request.dtype == torch.bfloat16:
            return 1
        if fp32_mode() == "strict":
            return 3
        return {"high": 2, "medium": 1}.get(torch.get_float32_matmul_precision(), 3)

    def run(self, pack: Any, x: Tensor, residual: Tensor | None, request: Request) -> Tensor:
        p = request.problem
        return torch.ops.r3d_kernels.conv3d_tiles(
            x,
            *pack,
            residual,
            p.stride,
            p.padding,
            p.dilation,
            p.activation or "none",
            self._slices(request),
            self.tile,
        )

    def work(self, request: Request) -> Work:
        p, slices = request.problem, self._slices(request)
        points = math.prod(map(_tile_inputs, self.tile))
        kernel = math.prod(1 if m > 1 else k for m, k in zip(self.tile, p.kernel, strict=True))
        outputs = p.n * math.prod(-(-size // m) for size, m in zip(p.out_size, self.tile, strict=True))
        macs = p.macs_inside if points == 1 else outputs * points * kernel * p.c * p.k
        return Work(macs * slices * (slices + 1) // 2, p.bytes(request.dtype), torch.bfloat16)

    def cycles(self, request: Request) -> float:
        p, slices = request.problem, self._slices(request)
        products = slices * (slices + 1) / 2
        points = math.prod(map(_tile_inputs, self.tile))
        saved = math.prod(3 if m > 1 else 1 for m in self.tile) * math.prod(
            size / -(-size // m) for m, size in zip(self.tile, p.out_size, strict=True)
        ) / points  # fmt: skip
        steps = -(-p.c // 32) * 32 / p.c if p.c >= 32 or p.kernel[2] == 1 else 1.3
        products_of_all = p.macs * steps / saved * products / (512 * 0.6)
        spread = p.c * p.k * math.prod(p.kernel) * points / math.prod(3 if m > 1 else 1 for m in self.tile)
        pixels = p.n * p.c * p.d * p.h * p.w
        blocks = max(1.0, pixels * slices * 2 / 2**19)
        transformed = pixels * slices * points / math.prod(self.tile)
        return products_of_all + blocks * spread * (0.3 + 0.2 * slices) + transformed


_STEM_TILES = {1: (1,), 3: (2, 4, 8), 4: (2, 4, 8), 5: (2, 4, 6), 6: (2, 4), 7: (2, 4, 6)}  # by taps
# More than 3.3e-6, a third of what the logits of a whole network may have, or no faster than a finer one.
_COARSE_STEMS = {(3, 4): (8,), (4, 4): (8,), (7, 4): (6,)}  # by taps and rows
_SHORT_SUM = 9  # rows and columns of the kernel times input channels
# Of 7x7 and larger, whose stock error is larger too
_STRICT_STEMS = {1: (1,), 3: (2, 4), 4: (2, 4), 5: (2,), 6: (2,)}


class StemCpu(DirectCpu):
    """Our C++ convolution for stems (csrc/cpu/stem*): Toom-Cook along depth and height; reads the parameter.

    Args:
        tile: output frames that share their multiplications.
        rows: output rows that do: 1, or 4 for kernels of 7 with a stride of 2 along height.
    """

    def __init__(self, tile: int, rows: int = 1) -> None:
        self.tile, self.rows = tile, rows
        self.name = f"stem F({tile})" if rows == 1 else f"stem F({tile},{rows})"

    def can_run(self, request: Request) -> str | None:
        why_not = super().can_run(request)
        if why_not is not None:
            return why_not
        p = request.problem
        if p.c > 4:
            return f"is for stems of at most 4 input channels, got {p.c}"
        if p.dilation != (1, 1, 1):
            return "needs dilation 1"
        if p.stride[0] > 2:
            return f"needs a stride of 1 or 2 along depth, got {p.stride[0]}"
        if p.kernel[0] > 7 or (self._taps(p) < 3 and (p.kernel[0], p.stride[0]) != (1, 1)):
            return f"is not for kernel {p.kernel} with stride {p.stride}"
        if self.tile not in _STEM_TILES[self._taps(p)]:
            return f"the tile is not for {self._taps(p)} taps along depth"
        if self.rows > 1 and (p.kernel[1], p.stride[1]) != (7, 2):
            return "needs a kernel of 7 with a stride of 2 along height"
        if request.dtype == torch.float32 and fp32_mode() == "strict" and not self._exact(p):
            return "the tile is outside R3D_KERNELS_FP32=strict"
        coarse = self.tile in _COARSE_STEMS.get((self._taps(p), self.rows), ())
        # Too short sums, or too few outputs, to average these tiles' errors: up to 7.7e-6 (tests/fuzz)
        coarse |= self.tile >= 6 and math.prod(p.kernel[1:]) * p.c < _SHORT_SUM
        coarse |= self.tile >= 6 and p.k < 4
        if request.dtype == torch.float32 and coarse and torch.get_float32_matmul_precision() == "highest":
            return "the tile is for float32_matmul_precision 'high' or 'medium'"
        return None

    def run(self, pack: Any, x: Tensor, residual: Tensor | None, request: Request) -> Tensor:
        p = request.problem
        return torch.ops.r3d_kernels.conv3d_stem(
            x, *pack, residual, p.stride, p.padding, p.activation or "none", self.tile, self.rows
        )

    @staticmethod
    def _taps(p: ConvProblem) -> int:
        return -(-p.kernel[0] // p.stride[0])  # the frames that a stride skips are taken for channels

    def _exact(self, p: ConvProblem) -> bool:
        """Within twice the error of the stock layer."""
        if self.rows > 1:
            return False
        if p.kernel[1] * p.kernel[2] < 49:
            return (self.tile, self._taps(p)) in ((1, 1), (2, 3))
        return self.tile in _STRICT_STEMS.get(self._taps(p), ())

    def _products(self, p: ConvProblem) -> int:
        """Pairs of an input and a filter point for all pixels of one channel."""
        frames = -(-p.out_size[0] // self.tile) * (self.tile + self._taps(p) - 1)
        # Seven rows of stride 2 are 4 taps and 3.
        rows = p.out_size[1] if self.rows == 1 else -(-p.out_size[1] // self.rows) * (2 * self.rows + 5)
        return p.n * frames * rows * p.out_size[2]

    def _steps(self, p: ConvProblem) -> int:
        """Multiplications of a product."""
        return p.c * p.stride[0] * p.kernel[2] * (p.kernel[1] if self.rows == 1 else 1)

    def work(self, request: Request) -> Work:
        p = request.problem
        macs = self._products(p) * p.k * self._steps(p)
        return Work(macs, p.bytes(request.dtype), torch.float32)

    def cycles(self, request: Request) -> float:
        p, lanes = request.problem, _vector_lanes()
        columns = -(-p.k // lanes) * lanes
        products = self._products(p) * columns * self._steps(p) / (2 * lanes * 0.9)
        points = self.tile + self._taps(p) - 1
        weights = (
            points * self._taps(p) * p.c * p.stride[0] * p.kernel[1] * p.kernel[2] * columns
        )  # in float64
        transformed = self._products(p) * ((4 if self.rows == 1 else 8) * columns + 8 * p.c) / lanes
        return products + transformed + weights


_TILES = ((2, 2, 2), (2, 4, 4), (4, 4, 4), (1, 2, 2), (1, 4, 4), (2, 1, 1), (4, 1, 1))
_STRIDED_TILES = ((2, 2, 2), (4, 2, 2), (1, 2, 2), (1, 4, 4))
_AMX_TILES = ((1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 1), (1, 4, 1), (2, 2, 1))
CPU_KERNELS: list[Kernel] = [
    DirectCpu(),
    KeptCpu(),
    *map(WinogradCpu, _TILES),
    *(WinogradCpu(tile, stride=2) for tile in _STRIDED_TILES),
    *map(AmxCpu, _AMX_TILES),
    *map(StemCpu, (2, 4, 6, 8)),
    *(StemCpu(frames, rows=4) for frames in (1, 4, 6, 8)),
]
