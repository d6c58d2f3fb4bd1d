"""Other people's models on the CPU, as they are and behind `r3d_kernels.fuse`.

    pip install torchvision monai
    python benchmarks/foreign.py --threads 2 --json out.json

Stock eager, stock channels-last and fused run interleaved in one process, and all are checked against float64. Weights
are random, batch-norm statistics those of real activations. Models whose package is missing are left out.
Exit code: 0; 1 where nothing could be measured, or where the fused model misses the promised error and stock
channels-last does not (torch's group norm loses digits in that layout).
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import importlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import measure
import torch
from torch import nn

import r3d_kernels as r3d

PROMISE = 1e-5  # relative L2 error of float32 outputs against float64
CLIP, VOLUME = (3, 16, 112, 112), (1, 64, 64, 64)


def _torchvision(name: str) -> nn.Module:
    return getattr(importlib.import_module("torchvision.models.video"), name)(weights=None)


def _monai(name: str, **options: Any) -> nn.Module:
    return getattr(importlib.import_module("monai.networks.nets"), name)(spatial_dims=3, **options)


_ONE = {"n_input_channels": 1, "num_classes": 2}
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "torchvision r3d_18": (functools.partial(_torchvision, "r3d_18"), CLIP),
    "torchvision mc3_18": (functools.partial(_torchvision, "mc3_18"), CLIP),
    "torchvision r2plus1d_18": (functools.partial(_torchvision, "r2plus1d_18"), CLIP),
    "torchvision s3d": (functools.partial(_torchvision, "s3d"), (3, 16, 224, 224)),
    "MONAI resnet18": (functools.partial(_monai, "resnet18", **_ONE), VOLUME),
    "MONAI resnet50": (functools.partial(_monai, "resnet50", **_ONE), VOLUME),
    "MONAI SegResNet": (functools.partial(_monai, "SegResNet", init_filters=8), VOLUME),
    "MONAI DenseNet121": (functools.partial(_monai, "DenseNet121", in_channels=1, out_channels=2), VOLUME),
}


def _calibrated(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Statistics of real activations, then moved off the identity, so that folding them wrongly shows."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm3d)]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        model.train()(torch.cat([x, x.flip(2)]))
        for norm in norms:
            norm.weight.uniform_(0.8, 1.2)
            norm.bias.normal_(0, 0.1)
    return model.eval()


def rows(name: str, *, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """One for each way to run the model, or one that says why there is none."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    try:
        model = make()
    except ImportError as e:
        return [{"network": name, "engine": "fused", "status": f"not measured: {e}"}]
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    stock = _calibrated(model, x)
    fused = r3d.fuse(copy.deepcopy(stock))
    last = x.contiguous(memory_format=torch.channels_last_3d)
    wide = copy.deepcopy(stock).to(memory_format=torch.channels_last_3d)
    calls = {
        "stock eager": lambda: stock(x),
        "stock channels-last": lambda: wide(last),
        "fused": lambda: fused(x),
    }
    with torch.inference_mode():
        exact = copy.deepcopy(stock).double()(x.double())
        errors = {engine: measure.relative_error(call(), exact) for engine, call in calls.items()}
        times = measure.interleave(calls, rounds=rounds, seconds=seconds)
    ours = times["fused"].median
    convolutions = sum(isinstance(m, nn.Conv3d) for m in fused.modules())
    return [
        {
            "network": name,
            "input": "x".join(map(str, x.shape)),
            "engine": engine,
            "status": "measured",
            "median_ms": round(1e3 * t.median, 2),
            "fused_is_faster_by": round(t.median / ours, 3),
            "error": errors[engine],
            "convolutions": convolutions,
            "fused_convolutions": len({r.layer for r in r3d.explain(fused)}),
        }
        for engine, t in times.items()
    ]


def _allowed(stock: float) -> float:
    return max(PROMISE, 2 * stock) if math.isfinite(stock) else PROMISE


def _lines(found: list[dict[str, Any]]) -> Iterator[str]:
    for row in found:
        if row["status"] != "measured":
            yield f"{row['network']}: {row['status']}"
        elif row["engine"] == "fused":
            others = " and ".join(
                f"{r['median_ms']:.1f} ms ({r['fused_is_faster_by']:.2f}x)" for r in found if r is not row
            )
            yield (
                f"{row['network']} {row['input']}: {row['median_ms']:.1f} ms against {others}, error "
                f"{row['error']:.1e}, {row['fused_convolutions']} of {row['convolutions']} convolutions fused"
            )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS), help="names, separated by commas")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each at most (default: 9)")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each model (default: 10)")
    parser.add_argument("--json", metavar="FILE", help="where to write the rows")
    args = parser.parse_args(argv)
    names = [name.strip() for name in args.models.split(",")]
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f"--models: unknown {unknown[0]!r}; known: {', '.join(MODELS)}")
    torch.set_num_threads(args.threads)
    report: dict[str, Any] = {"machine": measure.machine(), "foreign": []}
    for package in ("torchvision", "monai"):
        report["machine"]["versions"][package] = measure.version(package)
    for name in names:
        found = rows(name, rounds=args.rounds, seconds=args.seconds)
        report["foreign"] += found
        print(*_lines(found), sep="\n", flush=True)
        if args.json:
            measure.write_json(args.json, report)
        gc.collect()
    measured = [row for row in report["foreign"] if row["engine"] == "fused" and row["status"] == "measured"]
    stock = {
        row["network"]: row["error"] for row in report["foreign"] if row["engine"] == "stock channels-last"
    }
    return int(not measured or any(not row["error"] <= _allowed(stock[row["network"]]) for row in measured))


if __name__ == "__main__":
    sys.exit(main())
