"""Tile configurations: what a kernel may be compiled as, which ones a layer tries, and which it takes untried.

Nothing here needs Triton. The defaults were chosen from what the compiler makes of them (no spills, tensor cores,
shared memory: tests/triton/test_triton_aot.py); their speed was not measured.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from functools import cache

import torch

from r3d_kernels.problems import ConvProblem

__all__ = [
    "Config",
    "Machine",
    "candidates",
    "default",
    "input_grads",
    "machine",
    "precision_of",
    "shape_class",
    "shipped",
    "shipped_input_grads",
    "shipped_weight_grads",
    "weight_grads",
]

_TEXT = re.compile(r"(tiled|packed|rows|boxes|pixels|strips) (\d+)x(\d+)x(\d+) w(\d+) s(\d+) g(\d+) k(\d+)")
MAX_TAPS = (
    31  # of an axis: the tiled kernel keeps a bit for each, and shifts by their number when it is through
)
MAX_GROUPS = 65535  # programs along the second axis of a grid
PACKED_BELOW = 16  # channels: fewer than a tensor core multiplies at once


@dataclass(frozen=True)
class Config:
    """How one convolution kernel is compiled and launched; prints as `tiled 128x64x64 w4 s3 g8 k1`.

    `kernel` is "tiled", "packed" (taps and channels in one axis), "rows" (a row of taps and its channels in one),
    "boxes" (tensor descriptors), or for weight gradients, whose sum runs over output pixels, "pixels" or "strips" (the
    columns of a tile are a row of taps).
    """

    kernel: str
    bm: int  # output pixels of a tile; weight gradients: of a step of the sum
    bn: int  # output channels of a tile; weight gradients: columns, channels of x
    bk: int  # channels of a step of the sum; weight gradients: rows, channels of y
    warps: int
    stages: int  # of the software pipeline
    group: int = 8  # rows of tiles that share their operands in L2
    split: int = 1  # programs that share one tile's sum

    def __str__(self) -> str:
        tile = f"{self.bm}x{self.bn}x{self.bk}"
        return f"{self.kernel} {tile} w{self.warps} s{self.stages} g{self.group} k{self.split}"

    @classmethod
    def parse(cls, text: str) -> Config:
        """The configuration that `str` printed as `text`; ValueError for any other text."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f"config: expected a text like 'tiled 128x64x64 w4 s3 g8 k1', got {text!r}")
        return cls(match[1], *map(int, match.groups()[1:]))

    @property
    def over_pixels(self) -> bool:
        """Whether it is a weight gradient's."""
        return self.kernel in ("pixels", "strips")

    def shared(self, itemsize: int) -> int:
        """Bytes of shared memory that the pipeline needs."""
        summed, rows, columns = (
            (self.bm, self.bk, self.bn) if self.over_pixels else (self.bk, self.bm, self.bn)
        )
        return self.stages * (rows + columns) * summed * itemsize

    def fitted(self, problem: ConvProblem) -> Config:
        """Without the parts of a tile that would lie beyond the problem; 16 is the least of a tensor core."""
        c, k = problem.c // problem.groups, problem.k // problem.groups
        if self.kernel == "packed" or (self.kernel == "pixels" and c < PACKED_BELOW):
            c *= math.prod(problem.kernel)
        if self.kernel in ("rows", "strips"):
            c = padded_channels(c) * problem.kernel[2]
        c, k = _power_of_two(c), _power_of_two(k)
        columns, rows = (c, k) if self.over_pixels else (k, c)
        return dataclasses.replace(self, bn=min(self.bn, columns), bk=min(self.bk, rows))


def _power_of_two(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


@dataclass(frozen=True)
class Machine:
    """What the choice of a configuration depends on."""

    arch: int  # compute capability, 80 for 8.0
    multiprocessors: int
    shared: int  # bytes of shared memory that a program may use


_SHARED = {80: 166912, 87: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 103: 232448}


@cache
def machine(device: torch.device) -> Machine:
    """The GPU, or for the CPU (Triton's interpreter) something like an A100."""
    if device.type != "cuda":
        return Machine(80, 108, _SHARED[80])
    properties = torch.cuda.get_device_properties(device)
    arch = 10 * properties.major + properties.minor
    return Machine(arch, properties.multi_processor_count, _SHARED.get(arch, 101376))


def precision_of(dtype: torch.dtype) -> str:
    """What tl.dot computes in: "tf32" or "ieee" for float32, as torch's switch for convolutions says; else "half"."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if _tf32_allowed() else "ieee"


def _tf32_allowed() -> bool:
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:  # the newer switch was set, and torch refuses to answer through the older one
        return torch.backends.cudnn.conv.fp32_precision == "tf32"


def shape_class(problem: ConvProblem) -> str:
    """Convolutions that want the same tiles: "packed", "odd", "late", "narrow", "pointwise" or "wide"."""
    c, k = problem.c // problem.groups, problem.k // problem.groups
    pointwise = is_pointwise(problem)
    if (c < PACKED_BELOW and not pointwise and problem.kernel != (1, 1, 1)) or max(problem.kernel) > MAX_TAPS:
        return "packed"
    if c % 16:  # nothing is aligned: every element is loaded by itself, with an address of its own
        return "odd"
    if problem.n * math.prod(problem.out_size) <= 4096:
        return "late"
    if k <= 64:
        return "narrow"
    return "pointwise" if pointwise else "wide"


def is_pointwise(problem: ConvProblem) -> bool:
    """A matrix product of pixels and channels: one tap, stride 1, no padding."""
    return (problem.kernel, problem.stride, problem.padding) == ((1, 1, 1), (1, 1, 1), (0, 0, 0))


# The shipped table: (precision, class) -> configurations, the first is the default. A text may end in
# the compute capabilities that it is for ("@90-99"); where that rules the first out, the next one is the default.
_TABLE: dict[tuple[str, str], tuple[str, ...]] = {
    ("half", "wide"): (
        "tiled 128x128x64 w8 s3 g8 k1",
        "tiled 128x128x32 w8 s4 g8 k1",
        "tiled 128x64x64 w4 s3 g8 k1",
        "tiled 64x128x64 w4 s3 g8 k1",
        "tiled 128x256x64 w8 s3 g8 k1 @90-",
        "tiled 256x128x64 w8 s3 g8 k1 @90-99",
        "boxes 128x128x64 w8 s3 g8 k1 @90-",
        "boxes 128x256x64 w8 s3 g8 k1 @100-",  # on 9.0 wrong results, seen on an H200 with Triton 3.6
    ),
    ("half", "narrow"): (
        "tiled 128x64x64 w4 s3 g8 k1",
        "tiled 128x64x32 w4 s4 g8 k1",
        "tiled 256x64x32 w8 s3 g8 k1",
        "tiled 64x64x64 w4 s4 g8 k1",
        "boxes 128x64x64 w4 s4 g8 k1 @90-",
        "boxes 256x64x64 w8 s3 g8 k1 @90-",
    ),
    ("half", "pointwise"): (
        "tiled 128x128x64 w8 s3 g8 k1",
        "tiled 128x128x32 w8 s4 g8 k1",
        "tiled 64x128x64 w4 s3 g8 k1",
        "tiled 128x256x64 w8 s3 g8 k1 @90-",
        "boxes 128x128x64 w8 s3 g8 k1 @90-",
        "boxes 128x256x64 w8 s3 g8 k1 @100-",  # on 9.0 wrong results, seen on an H200 with Triton 3.6
    ),
    ("half", "late"): (
        "tiled 64x64x64 w4 s4 g8 k1",
        "tiled 64x128x64 w4 s3 g8 k1",
        "tiled 128x64x64 w4 s3 g8 k1",
        "tiled 32x64x64 w4 s4 g8 k1",
        "boxes 64x128x64 w4 s4 g8 k1 @90-",
    ),
    # "rows" takes what stems have; "packed" whatever else there is
    ("half", "packed"): (
        "rows 128x64x32 w8 s3 g8 k1",
        "rows 128x64x32 w4 s3 g8 k1",
        "rows 64x64x32 w4 s3 g8 k1",
        "packed 128x64x32 w8 s2 g8 k1",
        "packed 64x64x32 w4 s2 g8 k1",
    ),
    ("half", "odd"): ("tiled 64x64x32 w8 s2 g8 k1", "tiled 128x64x32 w8 s2 g8 k1"),
    # What spills on 10.0 with Triton 3.7 or 3.8 is not tried there: 128x128 and boxes here, eight warps in ieee below.
    ("tf32", "wide"): (
        "tiled 128x128x32 w8 s3 g8 k1 @-99",
        "tiled 128x128x32 w8 s3 g8 k1 @120-",
        "tiled 128x64x32 w4 s3 g8 k1",
        "tiled 64x128x32 w4 s3 g8 k1",
        "tiled 64x64x32 w4 s4 g8 k1",
        "boxes 128x128x32 w8 s3 g8 k1 @90-99",
    ),
    ("tf32", "narrow"): (
        "tiled 128x64x32 w4 s3 g8 k1",
        "tiled 64x64x32 w4 s4 g8 k1",
        "boxes 128x64x32 w4 s4 g8 k1 @90-99",
    ),
    ("tf32", "pointwise"): (
        "tiled 128x128x32 w8 s3 g8 k1 @-99",
        "tiled 128x128x32 w8 s3 g8 k1 @120-",
        "tiled 64x128x32 w4 s3 g8 k1",
        "boxes 128x128x32 w8 s3 g8 k1 @90-99",
    ),
    ("tf32", "late"): (
        "tiled 64x64x32 w4 s4 g8 k1",
        "tiled 32x64x32 w4 s4 g8 k1",
    ),
    ("tf32", "packed"): (
        "rows 128x64x32 w8 s3 g8 k1",
        "rows 128x64x32 w4 s3 g8 k1",
        "packed 128x64x32 w8 s2 g8 k1",
        "packed 64x64x32 w4 s2 g8 k1",
    ),
    ("tf32", "odd"): (
        "tiled 64x64x32 w8 s2 g8 k1",
        "tiled 64x64x16 w4 s2 g8 k1 @-85",  # spills on 8.6
        "tiled 64x64x16 w4 s2 g8 k1 @90-",
    ),
    ("ieee", "odd"): ("tiled 64x64x16 w8 s2 g8 k1",),
    ("ieee", "wide"): ("tiled 64x64x16 w4 s3 g8 k1", "tiled 64x64x16 w8 s3 g8 k1 @-99"),
    ("ieee", "narrow"): ("tiled 64x64x16 w4 s3 g8 k1", "tiled 64x64x16 w8 s3 g8 k1 @-99"),
    ("ieee", "pointwise"): ("tiled 64x64x16 w4 s3 g8 k1", "tiled 64x64x16 w8 s3 g8 k1"),
    ("ieee", "late"): ("tiled 64x64x16 w4 s3 g8 k1", "tiled 32x32x16 w4 s3 g8 k1"),
    ("ieee", "packed"): (
        "rows 64x64x32 w8 s2 g8 k1",
        "packed 64x64x16 w4 s2 g8 k1",
        "packed 32x64x16 w4 s2 g8 k1",
    ),
}

# Input gradients: the same for the mirrored problem, whose sum runs over y's channels.
_INPUT_GRAD: dict[tuple[str, str], tuple[str, ...]] = {
    ("half", "wide"): (
        "tiled 128x128x64 w8 s3 g8 k1",
        "tiled 128x128x32 w8 s4 g8 k1",
        "tiled 64x128x64 w4 s3 g8 k1 @90-",  # spills on 8.0
        "tiled 128x256x64 w8 s3 g8 k1 @90-",
    ),
    ("half", "narrow"): (
        "tiled 128x64x64 w4 s3 g8 k1",
        "tiled 128x64x32 w4 s4 g8 k1",
        "tiled 64x64x64 w4 s4 g8 k1",
    ),
    ("half", "late"): (
        "tiled 64x64x64 w4 s4 g8 k1",
        "tiled 64x128x64 w4 s3 g8 k1",
        "tiled 32x64x64 w4 s4 g8 k1 @-89",  # spills on 9.0 with Triton 3.7 and 3.8
        "tiled 32x64x64 w4 s4 g8 k1 @100-",
    ),
    ("half", "odd"): ("tiled 64x64x32 w8 s2 g8 k1", "tiled 128x64x32 w8 s2 g8 k1"),
    ("tf32", "wide"): (
        "tiled 128x128x32 w8 s3 g8 k1 @-99",
        "tiled 128x128x32 w8 s3 g8 k1 @120-",
        "tiled 128x64x32 w4 s3 g8 k1",
        "tiled 64x64x32 w4 s4 g8 k1",
    ),
    ("tf32", "narrow"): ("tiled 128x64x32 w4 s3 g8 k1", "tiled 64x64x32 w4 s4 g8 k1 @-99"),  # spills on 10.0
    ("tf32", "late"): (
        "tiled 64x64x32 w4 s4 g8 k1 @-99",
        "tiled 64x64x32 w8 s4 g8 k1 @100-119",  # four warps spill
        "tiled 64x64x32 w4 s4 g8 k1 @120-",
        "tiled 32x64x32 w4 s4 g8 k1",
    ),
    ("tf32", "odd"): ("tiled 64x64x32 w8 s2 g8 k1", "tiled 64x64x16 w4 s2 g8 k1"),
    # with four warps it spills on 10.0
    ("ieee", "wide"): ("tiled 64x64x16 w8 s3 g8 k1", "tiled 64x64x16 w4 s3 g8 k1 @-99"),
    ("ieee", "narrow"): ("tiled 64x64x16 w8 s3 g8 k1", "tiled 64x64x16 w4 s3 g8 k1 @-99"),
    ("ieee", "late"): ("tiled 64x64x16 w8 s3 g8 k1", "tiled 32x32x16 w4 s3 g8 k1"),
    ("ieee", "odd"): ("tiled 64x64x16 w8 s3 g8 k1",),
}

# Weight gradients: (precision, few channels of x).
_WEIGHT_GRAD: dict[tuple[str, bool], tuple[str, ...]] = {
    ("half", False): (
        "pixels 64x128x128 w8 s3 g8 k1",
        "pixels 64x64x64 w4 s3 g8 k1",
        "pixels 64x128x256 w8 s3 g8 k1 @90-119",  # spills on 12.0
        "pixels 32x64x128 w4 s4 g8 k1",
    ),
    ("half", True): (
        "strips 64x32x64 w4 s3 g8 k1",
        "strips 32x32x64 w4 s4 g8 k1",
        "pixels 32x64x64 w4 s3 g8 k1",  # 64 pixels spill with Triton 3.6
        "pixels 32x32x64 w4 s3 g8 k1",
    ),
    ("tf32", False): (
        "pixels 32x128x128 w8 s3 g8 k1 @90-",
        "pixels 32x64x64 w4 s3 g8 k1",
        "pixels 32x32x64 w4 s4 g8 k1",
    ),
    ("tf32", True): (
        "strips 32x32x64 w4 s3 g8 k1",
        "pixels 32x32x64 w4 s3 g8 k1 @-99",  # spills on 10.0 with Triton 3.8
        "pixels 16x32x64 w4 s3 g8 k1",
    ),
    ("ieee", False): ("pixels 16x32x32 w4 s2 g8 k1", "pixels 16x32x64 w8 s2 g8 k1"),
    ("ieee", True): (
        "strips 16x32x32 w4 s2 g8 k1",
        "pixels 16x32x32 w4 s2 g8 k1",
        "pixels 16x16x32 w4 s2 g8 k1",
    ),
}


@cache
def shipped(precision: str, name: str, arch: int) -> tuple[Config, ...]:
    """The table's configurations for a compute capability, the default first."""
    return _for_arch(_TABLE[precision, name], arch)


@cache
def shipped_input_grads(precision: str, name: str, arch: int) -> tuple[Config, ...]:
    """The same for input gradients: "wide", "narrow", "late" or "odd"."""
    return _for_arch(_INPUT_GRAD[precision, name], arch)


@cache
def shipped_weight_grads(precision: str, few: bool, arch: int) -> tuple[Config, ...]:
    """The same for weight gradients, of few channels of x or of many."""
    return _for_arch(_WEIGHT_GRAD[precision, few], arch)


def _for_arch(texts: tuple[str, ...], arch: int) -> tuple[Config, ...]:
    configs = []
    for text in texts:
        text, _, span = text.partition(" @")
        least, _, most = span.partition("-")
        if int(least or 0) <= arch <= int(most or 999):
            configs.append(Config.parse(text))
    return tuple(configs)


def flat(problem: ConvProblem) -> ConvProblem:
    """A matrix product as one row of pixels, whatever they are to each other; any other problem as it is."""
    p = problem
    return dataclasses.replace(p, n=1, d=1, h=1, w=p.n * p.d * p.h * p.w) if is_pointwise(p) and p.n else p


def boxes_of(config: Config, problem: ConvProblem) -> tuple[int, int, int] | None:
    """The box (depth, height, width) of `config.bm` outputs that wastes the least, or None where none fits well."""
    problem = flat(problem)
    best, least = None, 1.25  # a quarter more than the outputs is what faster copies may pay for
    out = problem.out_size
    for d in range(config.bm.bit_length()):
        for h in range(config.bm.bit_length() - d):
            box = (1 << d, 1 << h, config.bm >> d >> h)
            computed = math.prod(-(-o // b) * b for o, b in zip(out, box, strict=True))
            waste = computed / math.prod(out)
            if waste < least and max(box) <= 256:
                best, least = box, waste
    return best


def why_no_boxes(problem: ConvProblem, dtype: torch.dtype) -> str | None:
    """None, or why tensor descriptors cannot load the operands of this problem."""
    if problem.stride != (1, 1, 1):
        return "needs stride 1"
    if problem.groups != 1:
        return "has groups=1 only"
    if problem.c * dtype.itemsize % 16:
        return "needs pixels of a multiple of 16 bytes"
    if max(flat(problem).in_shape) >= 2**31 - 512:  # a tile may reach a little beyond
        return "needs coordinates of 32 bits"
    return None


def padded_channels(c: int) -> int:
    """The power of two that makes a pixel whole words, at least two: asynchronous copies are of 4, 8 or 16 bytes."""
    return max(2, 1 << (c - 1).bit_length())


def why_no_rows(problem: ConvProblem) -> str | None:
    """None, or why rows of taps do not lie side by side in x."""
    if problem.groups != 1:
        return "has groups=1 only"
    if problem.dilation[2] != 1:
        return "needs dilation 1 along the width"
    if max(problem.kernel[:2]) > MAX_TAPS:
        return f"takes at most {MAX_TAPS} taps along depth and height"
    return None


def _usable(config: Config, problem: ConvProblem, dtype: torch.dtype, where: Machine) -> bool:
    if config.shared(dtype.itemsize) > where.shared:
        return False
    if config.kernel == "rows":
        row = padded_channels(problem.c) * problem.kernel[2]
        return why_no_rows(problem) is None and row <= config.bk
    if config.kernel != "boxes":
        return True
    return why_no_boxes(problem, dtype) is None and boxes_of(config, problem) is not None


def _split(config: Config, problem: ConvProblem, where: Machine) -> Config:
    """Shares the sum of each tile among programs where there are too few tiles for the multiprocessors."""
    if config.kernel != "tiled":
        return config
    p = problem
    pixels, taps = p.n * math.prod(p.out_size), math.prod(p.kernel)
    return _split_over(config, pixels, p.k // p.groups, p.c // p.groups, p.groups, taps, where)


def _split_over(
    config: Config, pixels: int, columns: int, summed: int, groups: int, taps: int, where: Machine
) -> Config:
    tiles = -(-pixels // config.bm) * -(-columns // config.bn) * groups
    steps = taps * -(-summed // config.bk)
    split = 1
    # A part has at least 8 steps, or filling and draining the pipeline would be most of it.
    while split < 16 and 2 * split * tiles <= where.multiprocessors and steps >= 16 * split:
        split *= 2
    return dataclasses.replace(config, split=split)


def _within(config: Config, itemsize: int, where: Machine) -> Config:
    """With fewer stages where they would not fit into shared memory."""
    while config.shared(itemsize) > where.shared and config.stages > 2:
        config = dataclasses.replace(config, stages=config.stages - 1)
    return config


def candidates(problem: ConvProblem, dtype: torch.dtype, precision: str, where: Machine) -> list[Config]:
    """What a layer tries, the default first; each with the split that fills the machine, and late ones without too."""
    name = shape_class(problem)
    found: list[Config] = []
    for config in shipped(precision, name, where.arch):
        config = _within(config.fitted(problem), dtype.itemsize, where)
        if _usable(config, problem, dtype, where):
            shared = _split(config, problem, where)
            found += [shared] if shared == config else [shared, config]
    return list(dict.fromkeys(found))


def default(problem: ConvProblem, dtype: torch.dtype, precision: str, where: Machine) -> Config:
    """What a layer runs with when nothing was measured."""
    return candidates(problem, dtype, precision, where)[0]


def input_grad_class(problem: ConvProblem) -> str:
    """Input gradients that want the same tiles."""
    if problem.k // problem.groups % 16:
        return "odd"
    if problem.n * problem.d * problem.h * problem.w <= 4096:
        return "late"
    return "narrow" if problem.c // problem.groups <= 64 else "wide"


def input_grads(problem: ConvProblem, dtype: torch.dtype, precision: str, where: Machine) -> list[Config]:
    """What an input gradient tries, the default first.

    Its sum is split as a layer's is, but for strides: their gradients lie apart, and are a launch for each remainder.
    """
    p, found = problem, []
    pixels, taps = p.n * p.d * p.h * p.w, math.prod(p.kernel)
    for config in shipped_input_grads(precision, input_grad_class(p), where.arch):
        config = config.fitted(dataclasses.replace(p, c=p.k, k=p.c))
        config = _within(config, dtype.itemsize, where)
        if config.shared(dtype.itemsize) > where.shared:
            continue
        if p.stride == (1, 1, 1):
            shared = _split_over(config, pixels, p.c // p.groups, p.k // p.groups, p.groups, taps, where)
            found += [shared] if shared == config else [shared, config]
        else:
            found.append(config)
    return list(dict.fromkeys(found))


def weight_grads(problem: ConvProblem, dtype: torch.dtype, precision: str, where: Machine) -> list[Config]:
    """What a weight gradient tries, the default first: each tile with the parts that fill the machine twice."""
    p, found = problem, []
    pixels = p.n * math.prod(p.out_size)
    for config in shipped_weight_grads(precision, p.c // p.groups < PACKED_BELOW, where.arch):
        config = _within(config.fitted(p), dtype.itemsize, where)
        if config.shared(dtype.itemsize) > where.shared:
            continue
        if config.kernel == "strips" and (
            why_no_rows(p) is not None or padded_channels(p.c) * p.kernel[2] > config.bn
        ):
            continue
        tiles = -(-(p.k // p.groups) // config.bk) * column_tiles(config, p) * p.groups
        # At most 64 parts, and 8 steps a part: fewer would be all filling and draining.
        most = max(1, min(64, pixels // (8 * config.bm)))
        parts = min(most, max(1, 2 * where.multiprocessors // tiles))
        found.append(dataclasses.replace(config, split=parts))
        if len(found) == 1:
            found.append(dataclasses.replace(config, split=min(most, 2 * parts)))
    return list(dict.fromkeys(found))


def column_tiles(config: Config, problem: ConvProblem) -> int:
    """Tiles side by side that a weight gradient has for all taps and channels of x."""
    c, taps = problem.c // problem.groups, math.prod(problem.kernel)
    if config.kernel == "strips":
        return taps // problem.kernel[2]
    return -(-taps * c // config.bn) if c < PACKED_BELOW else taps * -(-c // config.bn)
