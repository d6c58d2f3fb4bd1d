"""Error of every CPU algorithm against float64, per kernel shape and number of channels.

    python benchmarks/accuracy.py --json accuracy.json

Inputs are rectified normals, weights are scaled so that outputs are of order one. A figure is the relative L2 error of
the bare convolution, beside that of the stock layer on the same data.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import machine, relative_error, write_json

from r3d_kernels import ops

# outputs of a Winograd tile along depth, height and width
WINOGRAD = {
    (3, 3, 3): ((2, 2, 2), (2, 4, 4), (4, 4, 4)),
    (1, 3, 3): ((1, 2, 2), (1, 4, 4)),
    (3, 1, 1): ((2, 1, 1), (4, 1, 1)),
    (1, 1, 1): (),
}
STRIDED = {(3, 3, 3): ((2, 2, 2), (4, 2, 2)), (1, 3, 3): ((1, 2, 2), (1, 4, 4))}  # with a stride of 2
# stems: kernel -> output frames of a tile
STEMS = {(1, 7, 7): (1,), (7, 7, 7): (2, 4, 6), (5, 7, 7): (2, 4, 6), (3, 7, 7): (2, 4, 8)}
# matrix tiles: (outputs of a Winograd tile, slices of an operand); without AMX they run in plain loops
TILES = {
    (3, 3, 3): (
        ((1, 1, 1), 3),
        ((2, 1, 1), 3),
        ((4, 1, 1), 3),
        ((1, 4, 1), 3),
        ((2, 2, 1), 3),
        ((1, 1, 1), 2),
    ),
    (1, 3, 3): (((1, 1, 1), 3), ((1, 2, 1), 3), ((1, 4, 1), 3), ((1, 1, 1), 2)),
    (3, 1, 1): (((1, 1, 1), 3), ((2, 1, 1), 3), ((4, 1, 1), 3), ((1, 1, 1), 2)),
    (1, 1, 1): (((1, 1, 1), 3), ((1, 1, 1), 2)),
}
TWO_FRAMES = ((2, 2, 2), (2, 4, 4))  # those with products of their own where an input has just two
CHANNELS = (64, 128, 256, 512)
SIZE = (4, 14, 14)
FEW_PIXELS = 512  # sums of kept weights are as long as the others beyond that


def measure_strided(kernel: tuple[int, int, int], c: int) -> dict[str, float]:
    """As `measure_one`, with stride 2 along the axes that have a kernel."""
    return measure_one(kernel, c, stride=2)


def measure_two_frames(kernel: tuple[int, int, int], c: int) -> dict[str, float]:
    """As `measure_one`, of an input two frames deep."""
    return measure_one(kernel, c, frames=2)


def measure_one(
    kernel: tuple[int, int, int], c: int, stride: int = 1, frames: int = SIZE[0]
) -> dict[str, float]:
    """Algorithm to error, "stock" among them."""
    generator = torch.Generator().manual_seed(c)
    x = torch.randn(1, c, frames, *SIZE[1:], generator=generator).relu()
    weight = (
        torch.randn(c, c, *kernel, generator=generator) * (2 / (c * kernel[0] * kernel[1] * kernel[2])) ** 0.5
    )
    strides = tuple(1 if k == 1 else stride for k in kernel)
    geometry = {"stride": strides, "padding": tuple(k // 2 for k in kernel)}
    want = F.conv3d(x.double(), weight.double(), **geometry)
    errors = {"stock": relative_error(F.conv3d(x, weight, **geometry), want)}
    zeros = torch.zeros(c)
    y = ops.conv3d_direct(x, weight, zeros, activation=None, **geometry)
    errors["direct"] = relative_error(y, want)
    if math.prod(want.shape[2:]) <= FEW_PIXELS:
        kept = ops.conv3d_keep(weight, x.shape, **geometry)
        y = ops.conv3d_direct(x, weight, zeros, activation=None, kept=kept, **geometry)
        errors["direct kept"] = relative_error(y, want)
    plain = stride == 1 and frames == SIZE[0]
    for tile in WINOGRAD[kernel] if plain else TWO_FRAMES if stride == 1 else STRIDED[kernel]:
        y = ops.conv3d_winograd(x, weight, zeros, activation=None, tile=tile, **geometry)
        errors[f"winograd{''.join(map(str, tile))}"] = relative_error(y, want)
    for tile, slices in TILES[kernel] if plain else ():
        name = f"tiles{''.join(map(str, tile))}" + ("" if slices == 3 else f" {slices} slices")
        y = ops.conv3d_tiles(x, weight, zeros, activation=None, slices=slices, tile=tile, **geometry)
        errors[name] = relative_error(y, want)
    return errors


def measure_stem(kernel: tuple[int, int, int], c: int) -> dict[str, float]:
    """As `measure_one`, for a clip of c channels: values 0 to 255, less their mean, as decoders and transforms give."""
    generator = torch.Generator().manual_seed(c)
    x = torch.rand(1, c, 16, 56, 56, generator=generator) * 255 - 114
    weight = torch.randn(64, c, *kernel, generator=generator) / (c * 49 * kernel[0]) ** 0.5
    geometry = {"stride": (1, 2, 2), "padding": tuple(k // 2 for k in kernel)}
    want = F.conv3d(x.double(), weight.double(), **geometry)
    errors = {"stock": relative_error(F.conv3d(x, weight, **geometry), want)}
    zeros = torch.zeros(64)
    y = ops.conv3d_direct(x, weight, zeros, activation=None, **geometry)
    errors["direct"] = relative_error(y, want)
    for tile in STEMS[kernel]:
        y = ops.conv3d_stem(x, weight, zeros, activation=None, tile=tile, **geometry)
        errors[f"stem{tile}"] = relative_error(y, want)
        if tile != 2:
            y = ops.conv3d_stem(x, weight, zeros, activation=None, tile=tile, row_tile=4, **geometry)
            errors[f"stem{tile},4"] = relative_error(y, want)
    return errors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", type=Path, help="write everything there")
    args = parser.parse_args()
    rows = []
    with torch.inference_mode():
        cases = [(k, c, measure_one) for k in WINOGRAD for c in CHANNELS]
        cases += [(k, c, measure_strided) for k in STRIDED for c in CHANNELS]
        cases += [((3, 3, 3), c, measure_two_frames) for c in CHANNELS]
        cases += [(k, c, measure_stem) for k in STEMS for c in (1, 3)]
        for kernel, c, measure in cases:
            errors = measure(kernel, c)
            case = {measure_strided: {"stride": 2}, measure_two_frames: {"frames": 2}}.get(measure, {})
            rows.append({"kernel": list(kernel), "channels": c, **case, "errors": errors})
            text = "  ".join(f"{name} {error:.1e}" for name, error in errors.items())
            which = "".join(f" {name} {value}" for name, value in case.items())
            print(f"{'x'.join(map(str, kernel))}{which} C={c:<4} {text}")
    if args.json:
        write_json(args.json, {"machine": machine(), "float32": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
