"""Error of every CPU algorithm against float64, per kernel shape and number of channels.

    python benchmarks/accuracy.py --json accuracy.json

Inputs are rectified normals, weights are scaled so that outputs are of order one. A figure is the relative L2 error of
the bare convolution, beside that of the stock layer on the same data.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import machine, relative_error, write_json

from r3d_kernels import backends, ops

ALGORITHMS = {
    (3, 3, 3): ("direct", "winograd222", "winograd244"),
    (1, 3, 3): ("direct", "winograd122", "winograd144"),
    (3, 1, 1): ("direct", "winograd211", "winograd411"),
    (1, 1, 1): ("direct",),
}
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
CHANNELS = (64, 128, 256, 512)
SIZE = (4, 14, 14)


def measure_one(kernel: tuple[int, int, int], c: int) -> dict[str, float]:
    """Algorithm to error, "stock" among them."""
    generator = torch.Generator().manual_seed(c)
    x = torch.randn(1, c, *SIZE, generator=generator).relu()
    weight = (
        torch.randn(c, c, *kernel, generator=generator) * (2 / (c * kernel[0] * kernel[1] * kernel[2])) ** 0.5
    )
    padding = tuple(k // 2 for k in kernel)
    want = F.conv3d(x.double(), weight.double(), padding=padding)
    errors = {"stock": relative_error(F.conv3d(x, weight, padding=padding), want)}
    geometry = {"out_channels": c, "kernel_size": kernel, "padding": padding, "activation": None}
    for algorithm in ALGORITHMS[kernel]:
        packed = ops.conv3d_pack(weight, algorithm=algorithm)
        errors[algorithm] = relative_error(ops.conv3d_packed(x, packed, torch.zeros(c), **geometry), want)
    if backends.describe()["isa"] == "amx":
        for tile, slices in TILES[kernel]:
            name = f"tiles{''.join(map(str, tile))}" + ("" if slices == 3 else f" {slices} slices")
            y = ops.conv3d_tiles(
                x, weight, torch.zeros(c), padding=padding, activation=None, slices=slices, tile=tile
            )
            errors[name] = relative_error(y, want)
    return errors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", type=Path, help="write everything there")
    args = parser.parse_args()
    rows = []
    with torch.inference_mode():
        for kernel in ALGORITHMS:
            for c in CHANNELS:
                errors = measure_one(kernel, c)
                rows.append({"kernel": list(kernel), "channels": c, "size": list(SIZE), "errors": errors})
                text = "  ".join(f"{name} {error:.1e}" for name, error in errors.items())
                print(f"{'x'.join(map(str, kernel))} C={c:<4} {text}")
    if args.json:
        write_json(args.json, {"machine": machine(), "float32": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
