"""The Hopper convolution on paper: what each layer of a network asks of the GPU, and what may come out.

    python benchmarks/gpu_paper.py --networks r3d_18,r3d_50,hara_r3d_50 --batches 1,8,32

No GPU is needed and nothing is measured. Tiles, splits and clocks come from the rule that the kernel itself chooses by
(csrc/cuda/conv3d_sm90.h; tests/cuda/test_gpu_paper.py holds the two together), whose constants are fitted to benchmarks
of an H100 SXM; 'share' is of the 790 TFLOP/s that large bfloat16 matrix products reach there and on an H200. Layers
that the kernel does not take stand there without a prediction. Channels that are no multiple of 8 move as if they were.

Behind the table of a network whose stem has a max-pool stands what it saves to compute both in one kernel: the stem's
output is then neither written nor read again, only the maxima of every tile's rows are, for the tiles beside it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from r3d_kernels.models import create_model
from r3d_kernels.ops.conv3d_sm90 import TILES
from r3d_kernels.problems import LAYER_INPUT, ConvProblem, network_problems, unique

SMS = 132
RATE = 790e12  # FLOP/s of large bfloat16 products on one H200, and on one H100 SXM
COPY = 2.99e12  # bytes/s read and written on the H100
CLOCK = 1.7e9  # of its multiprocessors under load
CALL = 2e-6  # seconds of a kernel that does nothing

# csrc/cuda/conv3d_sm90.h
CONSUMERS, DEPTH, SHARED, CONTROL = 2, 64, 227 << 10, 1024
FEWEST_CHANNELS = 16  # of r3d_kernels/_sm90.py
FLOPS_PER_CLOCK, SHARED_PER_CLOCK, L2_PER_CLOCK, L2_MOST = 4096, 128, 36, 48
PIXEL_BYTES, WEIGHT_BYTES, ROW_OUTSIDE, ROW_PARTLY = 128, 72, 10, 4
LATENCY, TILE_OVERHEAD, OUTPUTS_PER_CLOCK = 1400, 1000, 10
JOIN, JOIN_PER_CLOCK, SMALLEST_PART = 10000, 64, 4
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Layout:
    """Shared memory of one tile."""

    slices: int
    slice_pixels: int  # wgmma's N
    slice_channels: int
    stage_bytes: int  # all that a step loads
    stages: int
    weight_stages: int  # of one tap each, where weights have a ring of their own; else 0
    shared_bytes: int


def layout(tile: tuple[int, int, int]) -> Layout:
    pixels, channels, taps = tile
    slices = 2 if channels == 64 else 1
    pixel_bytes, weight_bytes = pixels * DEPTH * 2, channels * DEPTH * 2
    stage = pixel_bytes + taps * weight_bytes
    staging = pixels * channels * 2
    control = CONTROL + (128 * CONSUMERS * 16 if taps > 1 else 0)
    room = SHARED - control - staging
    stages, weight_stages, ring = min(8, room // stage), 0, 0
    if taps > 1:
        stages = max(3 if 3 * pixel_bytes + (taps + 1) * weight_bytes <= room else 2, stages)
        weight_stages = min(16, (room - stages * pixel_bytes) // weight_bytes)
        ring = stages * pixel_bytes + weight_stages * weight_bytes
    ring = ring or stages * stage
    return Layout(
        slices,
        pixels // slices,
        channels * slices // CONSUMERS,
        stage,
        stages,
        weight_stages,
        ring + staging + control,
    )


def spare_clocks(tile: tuple[int, int, int], latency: int = 900) -> int:
    """Clocks between the arrival of a load and its use, in a block that never waits; below zero it does.

    A stage is loaded again once it has been read. `latency`: of a load from L2, before its first byte.
    """
    pixels, channels, taps = tile
    part, clocks = layout(tile), step(tile).cycles
    if not part.weight_stages:
        return (part.stages - 1) * clocks - latency - ceil_div(part.stage_bytes, L2_PER_CLOCK)
    # Loads are asked for in their order: none of pixels before the weights in front of it.
    tap = clocks // taps
    behind = min((part.stages - 1) * clocks, (part.weight_stages - 1) * tap)
    return behind - latency - ceil_div(max(pixels, channels) * DEPTH * 2, L2_PER_CLOCK)


@dataclass(frozen=True)
class Load:
    """What an average step loads."""

    pixels: int  # rows of 64 channels that are there
    weights: int
    zeros: int = 0  # clocks that TMA spends on what is not there

    @property
    def bytes(self) -> int:
        """Those that L2 is asked for: weights are sent once to several."""
        return PIXEL_BYTES * self.pixels + WEIGHT_BYTES * self.weights


def load(p: ConvProblem, tile: tuple[int, int, int], rows: int, channel_tiles: int) -> Load:
    pixels, channels, taps = tile
    if taps > 1:
        pixels = layout(tile).slices * rows * (p.out_size[2] + (p.kernel[2] - 1) * p.dilation[2])
    weights = ceil_div(p.k * taps, channel_tiles)
    zeros = ROW_OUTSIDE * (channels * taps - weights)
    if p.c % DEPTH:
        zeros += ROW_PARTLY * (pixels + weights) // ceil_div(p.c, DEPTH)
    return Load(pixels, weights, zeros)


@dataclass(frozen=True)
class Step:
    """Clocks of one step of 64 channels, by what they are spent on, all at the same time."""

    products: int
    shared: int
    loads: int  # L2, and TMA where it fills with zeros
    latency: int  # of a stage on its way while the others are read

    @property
    def cycles(self) -> int:
        return max(self.products, self.shared, self.loads, self.latency)

    @property
    def limit(self) -> str:
        return max(("products", "shared", "loads", "latency"), key=lambda name: getattr(self, name))


def step(tile: tuple[int, int, int], loaded: Load | None = None, busy: int = SMS, sms: int = SMS) -> Step:
    """`loaded`: a whole tile, if not said; `busy` of the multiprocessors work."""
    pixels, channels, taps = tile
    part = layout(tile)
    loaded = loaded or Load(pixels, channels * taps)
    wgmmas = CONSUMERS * (part.slice_channels // 64) * taps * (DEPTH // 16)
    shared = wgmmas * 32 * (64 + part.slice_pixels) + part.stage_bytes // 2
    loads = loaded.zeros + max(
        ceil_div(loaded.bytes, L2_MOST), ceil_div(loaded.bytes * busy, L2_PER_CLOCK * sms)
    )
    ahead = pixels * DEPTH * 2 if taps > 1 else part.stage_bytes
    return Step(
        ceil_div(2 * pixels * channels * DEPTH * taps, FLOPS_PER_CLOCK),
        ceil_div(shared, SHARED_PER_CLOCK),
        loads,
        ceil_div(LATENCY + loads * ahead // part.stage_bytes, part.stages - 1),
    )


@dataclass(frozen=True)
class Plan:
    """How a convolution is cut, and the clocks that this is expected to take."""

    tile: int
    split: int
    pixel_tiles: int
    channel_tiles: int
    steps: int
    cycles: int
    step: Step  # of a block among as many as there are

    @property
    def tiles(self) -> int:
        return self.pixel_tiles * self.channel_tiles * self.split


def plan_for(p: ConvProblem, index: int, split: int, sms: int = SMS) -> Plan | None:
    """None where the tile or the split does not fit."""
    tile = pixels, channels, taps = TILES[index]
    part = layout(tile)
    depth, height, width = p.out_size
    rows = 0
    if taps > 1:
        padded = width + (p.kernel[2] - 1) * p.dilation[2]
        if p.kernel[2] != taps or p.stride[2] != 1 or padded > part.slice_pixels:
            return None
        rows = part.slice_pixels // padded
    steps = p.kernel[0] * p.kernel[1] * p.kernel[2] // taps * ceil_div(p.c, DEPTH)
    if split > 1 and steps < split * SMALLEST_PART:
        return None
    if taps > 1:
        pixel_tiles = ceil_div(p.n * depth * height, part.slices * rows)
    else:
        pixel_tiles = ceil_div(p.n * depth * height * width, pixels)
    channel_tiles = ceil_div(p.k, channels)
    outputs = pixels * channels
    ends = TILE_OVERHEAD + outputs // OUTPUTS_PER_CLOCK
    if split > 1:
        ends += JOIN + ceil_div((1 + split) * outputs * 4, JOIN_PER_CLOCK)
    tiles, loaded = pixel_tiles * channel_tiles * split, load(p, tile, rows, channel_tiles)
    cycles = 0
    for count, busy in ((tiles // sms, sms), (1, tiles % sms)):  # the last wave has what the others leave
        if count and busy:
            cycles += count * (ends + ceil_div(steps, split) * step(tile, loaded, busy, sms).cycles)
    first = step(tile, loaded, min(tiles, sms), sms)
    return Plan(index, split, pixel_tiles, channel_tiles, steps, cycles, first)


def plan(p: ConvProblem, sms: int = SMS) -> Plan:
    """What the kernel would choose: the fewest clocks; the first of equals."""
    plans = [plan_for(p, index, split, sms) for index in range(len(TILES)) for split in SPLITS]
    return min((found for found in plans if found is not None), key=lambda found: found.cycles)


@dataclass(frozen=True)
class Row:
    """One layer of the table."""

    layer: str
    problem: ConvProblem
    count: int  # layers of this geometry in the network
    plan: Plan | None  # None: not for this kernel

    @property
    def flops(self) -> int:
        p = self.problem
        macs = p.n * p.k * p.c
        for size in (*p.out_size, *p.kernel):
            macs *= size
        return 2 * macs

    @property
    def bytes(self) -> int:
        """The least that memory sees, in a two-byte dtype: input, weights and residual read once, output written.

        Planes and rows that a stride leaves out are not read; pixels of a row are, as L2 fetches 256 bytes at a time.
        """
        p = self.problem
        c, k = 8 * ceil_div(p.c, 8), 8 * ceil_div(p.k, 8)
        x = p.n * c * p.w
        for axis, size in enumerate((p.d, p.h)):
            x *= min(size, p.out_size[axis] * p.kernel[axis]) if p.kernel[axis] < p.stride[axis] else size
        y = p.n * k * p.out_size[0] * p.out_size[1] * p.out_size[2]
        weights = p.k * c * p.kernel[0] * p.kernel[1] * p.kernel[2]
        return 2 * (x + weights + y * (2 if p.residual else 1))

    @property
    def seconds(self) -> float:
        """The slower of the kernel's clocks and memory, and the start."""
        assert self.plan is not None
        return CALL + max(self.plan.cycles / CLOCK, self.bytes / COPY)

    @property
    def share(self) -> float:
        return self.flops / self.seconds / RATE

    @property
    def limit(self) -> str:
        assert self.plan is not None
        return "memory" if self.bytes / COPY > self.plan.cycles / CLOCK else self.plan.step.limit


def rows(network: str, batch: int, sms: int = SMS) -> list[Row]:
    """The distinct layers of a network, named after the first of their kind."""
    with torch.device("meta"):
        model = create_model(network)
    problems = network_problems(model, (batch, *LAYER_INPUT[1:]))
    names = {}
    for name, problem in problems:
        names.setdefault(problem, name)
    return [
        Row(names[problem], problem, count, None if problem.c < FEWEST_CHANNELS else plan(problem, sms))
        for problem, count in unique(problems)
    ]


@dataclass(frozen=True)
class FusedPool:
    """A stem's convolution with its max-pool in one kernel, against one after the other."""

    slice_rows: int  # of a consumer
    left: (
        float  # bytes that slices leave for each other, of the bytes that the convolution would have written
    )
    separate: float  # seconds
    fused: float
    network: float  # seconds of all layers, one after the other

    @property
    def gain(self) -> float:
        return (self.separate - self.fused) / self.network


def stem_slice_rows(p: ConvProblem, positions: int = 240) -> int:
    """Output rows of a consumer of csrc/cuda/conv3d_sm90_stem.cu; test_gpu_paper.py holds the two together."""
    out_h, out_w = p.out_size[1:]
    last = (out_w - 1) * p.stride[2] + p.kernel[2] - p.padding[2]
    pitch = max(-(-max(p.w + p.padding[2], last) // p.stride[2]), out_w)
    return min((positions - out_w) // pitch + 1, out_h)


def fused_pool(network: str, batch: int, sms: int = SMS) -> FusedPool | None:
    """What the max-pool in the stem's kernel saves; None where the stem has none.

    Products at RATE, all else at COPY. A slice leaves the maxima of its rows in memory, and each pooled plane reads
    those of the planes in its windows.
    """
    with torch.device("meta"):
        pool = create_model(network).maxpool
    if pool is None:
        return None
    found = rows(network, batch, sms)
    stem = found[0]
    p, size = stem.problem, stem.problem.out_size
    window = list(zip(size, pool.kernel_size, pool.stride, pool.padding, strict=True))
    out = [(i + 2 * pad - k) // s + 1 for i, k, s, pad in window]
    x, y, pooled = (2 * p.n * c for c in (p.c * p.d * p.h * p.w, p.k * math.prod(size), p.k * math.prod(out)))
    multiply = stem.flops / RATE
    separate = max(multiply, (x + y) / COPY) + (y + pooled) / COPY
    slice_rows = stem_slice_rows(p)
    slices = -(-size[1] // slice_rows)
    plane = 2 * p.k * slices * ((slice_rows + 1) // 2 + 1) * out[2]
    depth, kernel, stride, padding = window[0]
    read = sum(
        min(q * stride - padding + kernel, depth) - max(q * stride - padding, 0) for q in range(out[0])
    )
    fused = max(multiply, (x + p.n * plane * (depth + read) + pooled) / COPY)
    rest = sum(row.seconds * row.count for row in found[1:])
    return FusedPool(slice_rows, p.n * plane * depth / y, separate, fused, separate + rest)


HEAD = (
    f"{'layer':<24}{'problem':<46}{'x':>3}{'GFLOP':>9}{'MB':>8}  {'tile':<13}{'split':>5}{'tiles':>7}{'waves':>7}"
    f"{'smem/wgmma':>12}{'B/clk':>7}{'L2 B/clk':>9}{'us':>9}{'share':>7}  limit"
)


def line(row: Row, sms: int = SMS) -> str:
    start = (
        f"{row.layer:<24}{row.problem!s:<46}{row.count:>3}{row.flops / 1e9:>9.2f}{row.bytes / 1e6:>8.1f}  "
    )
    if row.plan is None:
        return start + "another kernel's"
    tile = TILES[row.plan.tile]
    clocks, part = row.plan.step, layout(tile)
    wgmma = 32 * (64 + part.slice_pixels)  # bytes that one of 64 x N x 16 reads; it takes N / 2 clocks
    name = f"{tile[0]}x{tile[1]}" + (f" /{tile[2]}" if tile[2] > 1 else "")
    return start + (
        f"{name:<13}{row.plan.split:>5}{row.plan.tiles:>7}{row.plan.tiles / sms:>7.2f}"
        f"{f'{wgmma} B':>12}{clocks.shared * SHARED_PER_CLOCK / clocks.products:>7.0f}"
        f"{part.stage_bytes / clocks.products:>9.0f}{row.seconds * 1e6:>9.1f}{row.share:>7.0%}  {row.limit}"
    )


def table(network: str, batch: int, sms: int = SMS) -> list[str]:
    found = rows(network, batch, sms)
    ours = [row for row in found if row.plan is not None]
    seconds = sum(row.seconds * row.count for row in ours)
    flops = sum(row.flops * row.count for row in ours)
    left = sum(row.flops * row.count for row in found) - flops
    pool = fused_pool(network, batch, sms)
    return [
        f"{network}, batch {batch}, {sms} multiprocessors (predicted, not measured)",
        HEAD,
        *(line(row, sms) for row in found),
        f"together {flops / 1e9:.1f} GFLOP in {seconds * 1e6:.0f} us: {flops / seconds / RATE:.0%} of 790 TFLOP/s, "
        f"{batch / seconds:.0f} clips/s without the {left / 1e9:.1f} GFLOP of other kernels, pools and head",
        *([] if pool is None else [_pool_line(pool)]),
    ]


def _pool_line(pool: FusedPool) -> str:
    return (
        f"stem and max-pool: {pool.separate * 1e6:.1f} us one after the other, {pool.fused * 1e6:.1f} us in one kernel "
        f"({pool.slice_rows} rows a slice, which leaves {pool.left:.0%} of its outputs in memory): "
        f"{pool.gain:+.1%} of the network's time saved"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--networks", default="r3d_18,r3d_50,hara_r3d_50", help="default: %(default)s")
    parser.add_argument("--batches", default="1,8,32", help="default: %(default)s")
    parser.add_argument("--sms", type=int, default=SMS, help="multiprocessors (default: %(default)s)")
    args = parser.parse_args(argv)
    for network in args.networks.split(","):
        for batch in args.batches.split(","):
            print("\n".join(table(network.strip(), int(batch), args.sms)), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
