"""Everything about this package on one GPU, in one JSON and one picture.

    python benchmarks/gpu_report.py --out DIR --budget SECONDS
    python benchmarks/gpu_report.py --out DIR --budget SECONDS --only sm90 --resume

Checks of the CUDA operations, their speed against torch and against what the GPU reaches, whole networks with their
peak memory, compute-sanitizer. The most important sections come first; what the budget does not reach is marked 'not
measured'. The JSON is complete on disk after every section. Sections run in a process of their own: one that hangs the
GPU, or breaks its context, is ended and costs only itself (gpu_sections.py), and the kernel that it was about is left
out of everything behind it. Exit code: 0; 1 where a check failed; 2 for wrong arguments; 3 without a CUDA device.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpu_sm80
import gpu_stem
import gpu_triton
import measure
import torch
from gpu_bn_act import bn_act_speed, check_bn_act, check_graph, check_repetitions, check_streams
from gpu_common import roofline
from gpu_floors import EAGER, floors, title, verdict
from gpu_networks import check_second_device, graphed_speed, network_layers, network_speed
from gpu_picture import draw
from gpu_sanitizer import sanitize, sanitizer_child
from gpu_sections import Report, Section, Worker
from gpu_sm90 import (
    check_sm90,
    check_sm90_graph,
    check_sm90_repetitions,
    check_sm90_streams,
    check_sm90_trial,
    sm90_speed,
    sm90_tiles,
)
from gpu_triton_layers import check_triton, triton_layers, triton_network

__all__ = ["main", "plan"]


def nvidia_smi(fields: str) -> str | None:
    """What it says of torch's first device; None where it says nothing."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"
    try:
        return subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", first],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu"


def environment() -> dict[str, Any]:
    """The GPU, its clocks, versions, and the switches that decide what stock torch computes."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": nvidia_smi("driver_version"),
        "clocks": {"fields": CLOCKS, "values": nvidia_smi(CLOCKS)},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
    }


def plan(left: Callable[[], float]) -> list[Section]:
    """All sections, the most important first: what decides whether numbers mean anything, then what has a floor.

    `left` tells the seconds that the section which asks may still take.
    """
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = (
            True  # the strong stock baseline: cuDNN picks its algorithms by measuring them
        )

    def hopper(title: str, run: Callable[[], dict[str, Any]], needs: float, most: float = 60.0) -> Section:
        return Section(f"conv3d_sm90{title}", run, needs, most, "wgmma")

    def speed(name: str, batch: int) -> Section:
        return hopper(f" speed, {name} batch {batch}", functools.partial(sm90_speed, name, batch), 10)

    def network(
        name: str,
        dtype: str,
        batch: int,
        engines: tuple[str, ...] = EAGER,
        needs: float = 10.0,
        most: float = 60.0,
    ) -> Section:
        run = functools.partial(network_speed, name, dtype, batch, engines)
        return Section(title(name, dtype, batch, engines), run, needs, most)

    def graphed(name: str, batch: int) -> Section:
        run = functools.partial(graphed_speed, name, batch)
        return Section(f"{name} bf16 batch {batch} as a CUDA graph", run, needs=10)

    def compiled(name: str, dtype: str, batch: int, compiler: str = "compile") -> Section:
        tuned = compiler == "max-autotune"
        return network(name, dtype, batch, (*EAGER, compiler), 80 if tuned else 40, 240 if tuned else 120)

    sm80 = {s.name: s for s in gpu_sm80.sections()}
    check_stem, stem_speed, pool_speed = gpu_stem.sections()
    sizes = [(batch, dtype) for batch in (8, 1, 32) for dtype in ("bf16", "fp32")]
    sections = [
        Section("environment", environment),
        hopper(" against float64", check_sm90, 10, 90),
        check_stem,
        sm80.pop("sm80 convolution against float64"),
        Section("bn_act against float64", check_bn_act, needs=5),
        hopper(": the trial of every tile", check_sm90_trial, 5),
        sm80.pop("max-pool and head"),
        hopper(": 200 repetitions, bitwise", check_sm90_repetitions, 5),
        hopper(": CUDA graph", check_sm90_graph, 3),
        hopper(": two streams", check_sm90_streams, 3),
        Section("roofline", roofline, needs=5),
        speed("r3d_18", 32),
        stem_speed,
        pool_speed,
        network("r3d_18", "bf16", 32),
        graphed("r3d_18", 1),
        network("r3d_18", "bf16", 1),
        network("r3d_18", "bf16", 8),
        network("hara_r3d_18", "bf16", 32),
        Section("Triton: training norm", gpu_triton.triton_norm_speed, 10, 60, "triton"),
        compiled("r3d_18", "bf16", 32),
        Section("Triton against float64", lambda: check_triton(left=left), 45, 90, "triton"),
        # its tuner may take 15 s for each of 15 layers where few processors compile
        Section(
            "Triton: r3d_18 bf16 batch 32", lambda: triton_network("r3d_18", "bf16", 32), 20, 260, "triton"
        ),
        compiled("r3d_18", "bf16", 32, "max-autotune"),
        sm80.pop("uint8 clips against float64"),
        Section("compute-sanitizer", lambda: sanitize(left), needs=45, most=150),
        Section("200 repetitions, bitwise", check_repetitions, needs=5),
        sm80.pop("sm80 convolution: 200 repetitions, bitwise"),
        Section("CUDA graph", check_graph, needs=3),
        Section("two streams", check_streams, needs=3),
        Section("bn_act speed", bn_act_speed, needs=5),
        Section("a second device", check_second_device, needs=10),
        *(speed(*which) for which in (("r3d_18", 8), ("r3d_18", 1), ("hara_r3d_50", 8), ("r2plus1d_18", 8))),
        *(
            hopper(f": every tile, r3d_18 batch {n}", functools.partial(sm90_tiles, "r3d_18", n), 15)
            for n in (32, 8, 1)
        ),
        network("r2plus1d_18", "bf16", 8),
        *(
            graphed(*which)
            for which in (("r3d_18", 8), ("hara_r3d_18", 1), ("hara_r3d_18", 8), ("hara_r3d_50", 1))
        ),
        *(network("r3d_18", "fp32", batch) for batch in (8, 1, 32)),
        *sm80.values(),
        Section(
            "Triton: layers of r3d_18 bf16 batch 8",
            lambda: triton_layers(network_layers("r3d_18", 8), "bf16", left),
            needs=30,
            most=180,
            kernel="triton",
        ),
        *gpu_triton.sections(),
    ]
    names = {s.name for s in sections}
    for name in ("hara_r3d_50", "hara_r3d_18"):
        more = [network(name, dtype, batch) for batch, dtype in sizes]
        sections += [s for s in more if s.name not in names]
    for name, dtype, batch in (
        ("r3d_18", "bf16", 8),
        ("r3d_18", "bf16", 1),
        ("r3d_18", "fp32", 8),
        ("hara_r3d_50", "bf16", 8),
        ("hara_r3d_18", "bf16", 8),
    ):
        sections.append(compiled(name, dtype, batch))
    sections += [compiled("r3d_18", "bf16", batch, "max-autotune") for batch in (1, 8)]
    sections.append(Section("clocks at the end", lambda: {"fields": CLOCKS, "values": nvidia_smi(CLOCKS)}))
    return sections


def earlier(path: Path, gpu: str | None, commit: str | None) -> list[dict[str, Any]]:
    """The entries of a report on disk that need not be measured again; none where it is of another GPU or commit."""
    try:
        data = json.loads(path.read_text())
        if data["machine"]["commit"] != commit:
            return []
        entries = [s for s in data["sections"] if s["status"] == "measured"]
        of = next((s["data"]["gpu"] for s in entries if s["name"] == "environment"), None)
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return entries if of is not None and of == gpu else []


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", metavar="DIR", default="gpu_report", help="default: %(default)s")
    parser.add_argument("--budget", type=float, default=570.0, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument(
        "--only",
        metavar="REGEX",
        default="",
        help="the sections in whose names it is found, and the environment",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep what the report in DIR has measured on the same GPU, and go on",
    )
    parser.add_argument("--list", action="store_true", help="print the names of the sections and end")
    parser.add_argument("--sanitizer-child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--without", action="append", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        wanted = re.compile(args.only)
    except re.error as e:
        parser.error(f"--only: {e}")
    sections = [s for s in plan(lambda: 0.0) if wanted.search(s.name) or s.name == "environment"]
    if args.list:
        print("\n".join(s.name for s in sections))
        return 0
    if not torch.cuda.is_available():
        print("gpu_report: no CUDA device here (torch.cuda.is_available() is False)", file=sys.stderr)
        return 3
    if args.sanitizer_child:
        return sanitizer_child(args.without)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "gpu_report.json"
    worker = Worker(plan)
    machine = measure.machine()
    report = Report(
        budget=args.budget,
        save=functools.partial(measure.write_json, file),
        say=functools.partial(print, flush=True),
        head={"machine": machine},
        tail=lambda entries: {"floors": floors(entries), "kernels_left_out": dict(worker.without)},
        execute=worker,
        sections=earlier(file, nvidia_smi("name"), machine["commit"]) if args.resume else [],
    )
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # who ends it gets what it has
    try:
        good = report.run(sections)
    except KeyboardInterrupt:
        print("gpu_report: ended from outside", file=sys.stderr)
        good = False
    finally:
        signal.signal(signal.SIGTERM, before)
        worker.stop()
    for row in floors(report.sections):
        print(f"floor: {row['what']}: {row['value']}, at least {row['at_least']}: {verdict(row)}")
    try:
        draw(out / "gpu_report.png", report.data())
    except Exception as e:  # the JSON is what counts
        print(f"gpu_report: no picture: {type(e).__name__}: {e}", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
