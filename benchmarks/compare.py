"""Whole networks on the CPU: this package beside stock torch, torch.compile, ONNX Runtime and OpenVINO.

    python benchmarks/compare.py --networks r3d_18,hara_r3d_50 --batch 1,4 --dtype fp32,bf16 --json out.json

All engines of a combination run interleaved in one process; every result is checked against float64.
Exit code: 0; 1 where this package is outside its promised error; 2 for arguments that make no sense.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import measure
import peers
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from r3d_kernels.problems import network_problems

FP32_PROMISE = 1e-5  # relative L2 error of the logits against float64
CHECKED_CLIPS = 2  # float64 convolutions are slow: a batch is checked on its first clips


def promise(dtype: torch.dtype, stock_error: float) -> float:
    """The largest error that this package allows itself on the logits."""
    if dtype == torch.float32:
        return FP32_PROMISE
    return 2 * stock_error + torch.finfo(dtype).eps / 2  # half an eps: the rounding of the output


# ---- one combination ----


def measure_combination(
    network: measure.Network,
    batch: int,
    dtype_name: str,
    *,
    engines: Sequence[str],
    threads: int,
    rounds: int,
    seconds: float,
    note: Callable[[str], None],
) -> list[dict[str, Any]]:
    """One row for each engine: time, rate, error, or the reason why there are none."""
    dtype = measure.DTYPES[dtype_name]
    torch.manual_seed(0)
    model = measure.calibrate(network.build(fused=False))
    x = network.clips(batch)
    gflop = sum(p.flops for _, p in network_problems(model, x.shape)) / 1e9
    note(f"{network} batch {batch} {dtype_name}: float64 reference")
    with torch.inference_mode():
        expected = copy.deepcopy(model).double()(x[:CHECKED_CLIPS].double())
    built: list[peers.Engine] = []
    for name in engines:
        note(f"{network} batch {batch} {dtype_name}: building {name}")
        built.append(peers.build(name, model, x, dtype, threads))
    errors = {
        engine.name: measure.relative_error(engine.run()[:CHECKED_CLIPS], expected)
        for engine in built
        if engine.run is not None
    }
    note(f"{network} batch {batch} {dtype_name}: timing {', '.join(errors)}")
    runs = {engine.name: engine.run for engine in built if engine.run is not None}
    times = measure.interleave(runs, rounds=rounds, seconds=seconds)
    rows = []
    for engine in built:
        row: dict[str, Any] = {
            "network": str(network),
            "batch": batch,
            "dtype": dtype_name,
            "engine": engine.name,
            "label": engine.label,
            "status": "measured" if engine.run is not None else "unavailable",
            "gflop": round(gflop, 3),
        }
        if engine.run is None:
            row["reason"] = engine.reason
        else:
            median = times[engine.name].median
            row |= times[engine.name].summary()
            row["gflop_per_s"] = round(gflop / median, 1)
            row["error"] = errors[engine.name]
            if "fused" in times:
                row["fused_is_faster_by"] = round(median / times["fused"].median, 3)
            if engine.name == "fused" and "eager_cl" in errors:
                row["promise"] = promise(dtype, errors["eager_cl"])
                row["kept"] = row["error"] <= row["promise"]
        rows.append(row)
    return rows


def skipped(
    network: str, batch: int, dtype: str, engines: Iterable[str], reason: str
) -> list[dict[str, Any]]:
    """Rows that say that nothing was measured, and why."""
    return [
        {
            "network": network,
            "batch": batch,
            "dtype": dtype,
            "engine": name,
            "label": peers.ENGINES[name][0],
            "status": "not measured",
            "reason": reason,
        }
        for name in engines
    ]


# ---- memory, in processes of their own ----


def memory_child(task: dict[str, Any]) -> dict[str, Any]:
    """Runs in a fresh process: the memory of one engine's forward."""
    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    # No calibration: its training pass would count towards the peak, and values do not change sizes.
    network = measure.Network.parse(task["network"])
    model = network.build(fused=task["engine"] == "fused").eval()
    x = network.clips(task["batch"])
    label, maker = peers.ENGINES[task["engine"]]
    try:
        run = maker(model, x, measure.DTYPES[task["dtype"]], task["threads"])
        del model, x
        gc.collect()
        return {"status": "measured", "label": label, **measure.forward_memory(run, task["repetitions"])}
    except peers.Unavailable as e:
        return {"status": "unavailable", "label": label, "reason": str(e)}
    except OSError as e:
        return {"status": "unavailable", "label": label, "reason": f"no memory counters here: {e}"}


def measure_memory(task: dict[str, Any], timeout: float | None) -> dict[str, Any]:
    """The answer of `memory_child` in a fresh process."""
    key = {name: task[name] for name in ("network", "batch", "dtype", "engine")}
    failed = {**key, "label": peers.ENGINES[task["engine"]][0], "status": "failed"}
    command = [sys.executable, str(Path(__file__).resolve()), "--memory-child", json.dumps(task)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {**failed, "status": "not measured", "reason": "the time is up"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {**failed, "reason": lines[-1]}
    return {**key, **json.loads(done.stdout.splitlines()[-1])}


# ---- what people see ----


def speed_table(rows: Sequence[dict[str, Any]]) -> Table:
    head = rows[0]
    table = Table(
        title=f"{head['network']}, batch {head['batch']}, {head['dtype']}, {head.get('gflop', '?')} GFLOP",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("engine", no_wrap=True)
    for column in ("median ms", "min ms", "GFLOP/s", "ours is faster", "error to float64"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        if row["status"] != "measured":
            table.add_row(row["label"], "-", "-", "-", "-", "-", style="dim")
            continue
        error = f"{row['error']:.1e}"
        if not row.get("kept", True):
            error += f" [red](promised {row['promise']:.1e})[/red]"
        ratio = f"{row['fused_is_faster_by']:.2f} x" if "fused_is_faster_by" in row else ""
        table.add_row(
            row["label"],
            f"{row['median_ms']:.1f}",
            f"{row['min_ms']:.1f}",
            f"{row['gflop_per_s']:.0f}",
            ratio,
            error,
            style="bold" if row["engine"] == "fused" else None,
        )
    table.caption = _reasons(rows)
    return table


def _reasons(rows: Sequence[dict[str, Any]]) -> str | None:
    """Why engines have no numbers, for the line below a table."""
    missing = [f"{r['label']}: {r['status']}, {r['reason']}" for r in rows if r["status"] != "measured"]
    return escape("\n".join(missing)) or None


def memory_table(rows: Sequence[dict[str, Any]]) -> Table:
    head = rows[0]
    table = Table(
        title=f"{head['network']}, batch {head['batch']}, {head['dtype']}: peak memory, MiB",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("engine", no_wrap=True)
    for column in ("a forward adds", "least - most", "process, warm", "process, ever"):
        table.add_column(column, justify="right")
    for row in rows:
        if row["status"] != "measured":
            table.add_row(row["label"], "-", "-", "-", "-", style="dim")
            continue
        table.add_row(
            row["label"],
            f"{row['extra_mib']:.1f}",
            f"{row['extra_min_mib']:.1f} - {row['extra_max_mib']:.1f}",
            f"{row['steady_mib']:.0f}",
            f"{row['lifetime_mib']:.0f}",
            style="bold" if row["engine"] == "fused" else None,
        )
    table.caption = _reasons(rows)
    return table


def draw(path: str, rows: Sequence[dict[str, Any]], caption: str) -> None:
    """Bars of median times, one panel a combination."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["status"] == "measured":
            panels.setdefault((row["network"], row["batch"], row["dtype"]), []).append(row)
    if not panels:
        return
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.2 * columns, 2.6 * lines + 0.5), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, ((network, batch, dtype), group) in zip(axes.flat, panels.items(), strict=False):
        colours = ["#d1495b" if row["engine"] == "fused" else "#8d99ae" for row in group]
        bars = axis.barh([row["label"] for row in group], [row["median_ms"] for row in group], color=colours)
        axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
        axis.set_title(f"{network}, batch {batch}, {dtype}", fontsize=10)
        axis.invert_yaxis()
        axis.margins(x=0.25)
        axis.set_xlabel("ms, median", fontsize=8)
        axis.tick_params(labelsize=8)
    figure.suptitle(caption, fontsize=9)
    partial = f"{path}.{os.getpid()}.png"
    figure.savefig(partial, dpi=130)
    plt.close(figure)
    Path(partial).replace(path)


# ---- arguments ----


def _list(text: str) -> list[str]:
    return [item for item in (part.strip() for part in text.split(",")) if item]


def _choices(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        items = _list(text)
        for item in items:
            if item not in known:
                raise argparse.ArgumentTypeError(f"unknown {item!r}; known: {', '.join(known)}")
        return items

    return parse


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return value


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--networks",
        type=lambda text: [measure.Network.parse(item) for item in _list(text)],
        default=[measure.Network.parse(name) for name in ("r3d_18", "hara_r3d_18", "hara_r3d_50")],
        metavar="NAME[@CxDxHxW],...",
        help="names that create_model knows (default: r3d_18,hara_r3d_18,hara_r3d_50), each with 16 frames of 112x112 "
        "or another clip, such as hara_r3d_18@1x96x96x96",
    )
    parser.add_argument(
        "--batch",
        type=lambda text: [_positive(item) for item in _list(text)],
        default=[1, 4],
        metavar="N,...",
        help="batch sizes (default: 1,4)",
    )
    parser.add_argument(
        "--dtype",
        type=_choices(("fp32", "bf16")),
        default=["fp32", "bf16"],
        metavar="DTYPE,...",
        help="fp32, bf16 (default: both)",
    )
    parser.add_argument(
        "--peers",
        type=_choices(peers.PEERS),
        default=list(peers.PEERS),
        metavar="NAME,...",
        help=f"beside stock torch, any of {','.join(peers.PEERS)} (default: all; '' for none)",
    )
    parser.add_argument(
        "--threads", type=_positive, default=torch.get_num_threads(), help="default: %(default)s"
    )
    parser.add_argument("--rounds", type=_positive, default=15, help="timed calls an engine (default: 15)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        help="timing of one combination ends after this many seconds and three rounds (default: 60)",
    )
    parser.add_argument("--budget", type=float, help="start no combination after this many seconds in all")
    parser.add_argument("--memory", action="store_true", help="measure peak memory too, in fresh processes")
    parser.add_argument("--repetitions", type=_positive, default=5, help="forwards of a memory measurement")
    parser.add_argument("--json", metavar="FILE", help="write everything there, after each combination")
    parser.add_argument("--png", metavar="FILE", help="draw the times there")
    parser.add_argument("--memory-child", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    if args.memory_child:
        print(json.dumps(memory_child(json.loads(args.memory_child))))
        return 0
    start = time.monotonic()
    torch.set_num_threads(args.threads)
    # A pipe has no width of its own: tables in log files keep theirs.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    status = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 110)
    # In a fixed order, with ours last, as the tables show them.
    engines = [name for name in peers.ENGINES if name in (*peers.ALWAYS, *args.peers)]
    report: dict[str, Any] = {"machine": measure.machine(), "speed": [], "memory": []}
    about = report["machine"]
    caption = (
        f"{about['cpu']}, {about['isa']}, {args.threads} threads, torch {about['versions'].get('torch')}"
    )
    console.print(caption)

    def left() -> float | None:
        return None if args.budget is None else args.budget - (time.monotonic() - start)

    def save() -> None:
        if args.json:
            measure.write_json(args.json, report)

    combinations = [(n, b, d) for n in args.networks for b in args.batch for d in args.dtype]
    for network, batch, dtype in combinations:
        remaining = left()
        if remaining is not None and remaining <= 0:
            rows = skipped(str(network), batch, dtype, engines, "the time is up")
        else:
            seconds = args.seconds if remaining is None else min(args.seconds, remaining)
            rows = measure_combination(
                network,
                batch,
                dtype,
                engines=engines,
                threads=args.threads,
                rounds=args.rounds,
                seconds=seconds,
                note=lambda text: status.print(f"[dim]{text}[/dim]"),
            )
        report["speed"] += rows
        console.print(speed_table(rows))
        save()
        gc.collect()
    for network, batch, dtype in combinations if args.memory else ():
        rows = []
        for name in peers.ALWAYS:
            remaining = left()
            if remaining is not None and remaining <= 0:
                rows += skipped(str(network), batch, dtype, [name], "the time is up")
                continue
            status.print(f"[dim]{network} batch {batch} {dtype}: memory of {name}[/dim]")
            task = {
                "network": str(network),
                "batch": batch,
                "dtype": dtype,
                "engine": name,
                "threads": args.threads,
                "repetitions": args.repetitions,
            }
            rows.append(measure_memory(task, remaining))
        report["memory"] += rows
        console.print(memory_table(rows))
        save()
    if args.png:
        draw(args.png, report["speed"], caption)
    broken = [row for row in report["speed"] if row.get("kept") is False]
    for row in broken:
        status.print(
            f"[red]{row['network']} batch {row['batch']} {row['dtype']}: error {row['error']:.1e}, "
            f"promised {row['promise']:.1e}[/red]"
        )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
