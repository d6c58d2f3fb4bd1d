"""Every layer of a network against this machine's limits: kernel, time, GFLOP/s, which limit, how much of it.

    python benchmarks/roofline.py --threads 2 --json roofline.json --png roofline.png
    python benchmarks/roofline.py --networks r3d_18,hara_r3d_18@1x96x96x96 --against oneDNN --cold 64

Effective GFLOP/s counts the multiplications of a direct convolution, padding included; real GFLOP/s those that the
chosen algorithm does. The limit of a layer is the longer of its real multiplications at the peak of the arithmetic that
they are done in and its bytes (inputs, weights as they are packed, outputs, each once) at the measured bandwidth. The
peaks are measured in the same run, at its beginning and at its end, by C functions compiled for it: multiply-adds in
registers (for bfloat16 in AMX tiles, where there are any), and reading 32 MiB; without a compiler by torch's matrix
product and copy.

A machine that others use changes its speed for seconds, and kernels that live on its caches suffer more than others;
and where the operating system has put a process's memory decides up to a tenth as long as it lives. So a layer that is
slower than --against is measured again after all others, in new processes, and the median of its ratios counts.

Exit code: 0; 1 where a layer is slower than --against by more than --tolerance; 2 for arguments that make no sense.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import measure
import peak
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from r3d_kernels import backends
from r3d_kernels.problems import ConvProblem, network_problems, unique

NETWORKS = ("r3d_18", "hara_r3d_18", "hara_r3d_50", "r2plus1d_18", "mc3_18", "hara_r3d_18@1x96x96x96")
LEAST_CALL = 2e-3  # seconds of one timed sample: calls that are shorter are repeated within it
SHOWN = ("multiplications", "memory")


def layers_of(network: measure.Network, batch: int) -> list[tuple[str, int, ConvProblem]]:
    """(first layer with the problem, how many have it, problem), in order."""
    found = network_problems(network.build(device="meta"), (batch, *network.clip))
    first: dict[ConvProblem, str] = {}
    for layer, problem in found:
        first.setdefault(problem, layer)
    return [(first[problem], count, problem) for problem, count in unique(found)]


@dataclass
class Row:
    """One distinct layer."""

    network: str
    layer: str
    count: int
    problem: str
    dtype: str
    kernel: str
    reason: str
    ms: float  # median
    flops: int  # of a direct convolution, taps on padding included
    real_flops: int  # of the chosen algorithm
    bytes: int
    arithmetic: str = "fp32"  # of the products: fp32 or bf16
    other_ms: float | None = None  # --against
    ours_over_other: float | None = None  # paired_ratio: the machine's speed changes between rounds
    ratios: list[float] | None = None  # of all measurements, where there were several
    limit_ms: float = math.nan
    limit: str = ""  # of SHOWN

    def against_roofs(self, flops: float, bandwidth: float) -> None:
        times = (1e3 * self.real_flops / flops, 1e3 * self.bytes / bandwidth)
        self.limit_ms = max(times)
        self.limit = SHOWN[times.index(self.limit_ms)]

    def slower(self, tolerance: float) -> bool:
        """Than --against, by more than `tolerance`."""
        return self.ours_over_other is not None and self.ours_over_other > 1 + tolerance

    @property
    def share(self) -> float:
        """Of the limit: 1 is as fast as the machine can be with this algorithm."""
        return self.limit_ms / self.ms

    def as_dict(self) -> dict[str, Any]:
        seconds = self.ms / 1e3
        return {
            **{k: v for k, v in asdict(self).items() if v is not None},
            "effective_gflop_per_s": round(self.flops / seconds / 1e9, 1),
            "real_gflop_per_s": round(self.real_flops / seconds / 1e9, 1),
            "gbytes_per_s": round(self.bytes / seconds / 1e9, 1),
            "share_of_limit": round(self.share, 3),
        }


# ---- timing ----


def _runner(
    kernel: backends.Kernel, layer: backends.Layer, request: backends.Request, x: torch.Tensor, residual: Any
) -> Callable[[], Any]:
    pack = kernel.pack(layer, request)
    return lambda: kernel.run(pack, x, residual, request)


def _repeated(run: Callable[[], Any], times: int) -> Callable[[], Any]:
    def several() -> None:
        for _ in range(times):
            run()

    return several


def measure_layer(
    network: measure.Network,
    layer: str,
    count: int,
    problem: ConvProblem,
    dtype_name: str,
    *,
    backend: str,
    against: str | None,
    rounds: int,
    seconds: float,
    cold: int = 0,
) -> Row:
    """Times the kernel that is chosen for a layer, and another one interleaved with it.

    With `cold` MiB, so much other memory is written before every call, as the other layers of a network do.
    """
    dtype = measure.DTYPES[dtype_name]
    (choice,) = backends.choose_all([(problem, dtype)], "cpu", backend)
    request = backends.Request(problem, dtype, torch.device("cpu"), torch.get_num_threads())
    t = problem.tensors(dtype, param_dtype=torch.float32)
    tensors = backends.Layer.of(t.weight, None, (t.running_mean, t.running_var, t.gamma, t.beta, t.eps))
    other = next((k for k in backends.KERNELS if k.name == against), None)
    if other is not None and other.can_run(request) is not None:
        other = None
    kernels = {"ours": choice.kernel}
    if other is not None and other is not choice.kernel:
        kernels["other"] = other
    runs = {name: _runner(k, tensors, request, t.x, t.residual) for name, k in kernels.items()}
    quickest = min(
        measure.interleave({name: run}, rounds=2, settle=0.0)[name].best for name, run in runs.items()
    )
    times = 1 if cold else max(1, math.ceil(LEAST_CALL / quickest))
    others = torch.zeros(cold << 18)
    result = measure.interleave(
        {name: _repeated(run, times) for name, run in runs.items()},
        rounds=rounds,
        seconds=seconds,
        between=partial(others.add_, 1) if cold else None,
    )
    work = backends.work(choice.kernel, request)
    row = Row(
        str(network),
        layer,
        count,
        str(problem),
        dtype_name,
        choice.kernel.name,
        choice.reason,
        1e3 * result["ours"].median / times,
        problem.flops,
        2 * work.macs,
        work.bytes,
        next(name for name, kind in measure.DTYPES.items() if kind == work.arithmetic),
    )
    if other is not None:
        theirs = result.get("other", result["ours"])
        row.other_ms = 1e3 * theirs.median / times
        row.ours_over_other = paired_ratio(result["ours"].seconds, theirs.seconds)
    return row


def elsewhere(threads: int, function: Callable[[], Any]) -> Any:
    """The result of `function`, which can be pickled, from a new process with so many threads."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, torch.set_num_threads, (threads,)) as new:
        return new.submit(_inferring, function).result()


def _inferring(function: Callable[[], Any]) -> Any:
    with torch.inference_mode():
        return function()


def paired_ratio(ours: Sequence[float], other: Sequence[float]) -> float:
    """Median over rounds of the quotient of one round."""
    return round(statistics.median(a / b for a, b in zip(ours, other, strict=True)), 3)


def middle(rows: Sequence[Row]) -> Row:
    """Of several measurements of a layer the one with the median ratio, which tells the others' ratios."""
    ratios = [row.ours_over_other or math.nan for row in rows]
    row = sorted(rows, key=lambda row: row.ours_over_other or math.nan)[len(rows) // 2]
    return replace(row, ratios=ratios)


# ---- what people see ----


def grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of one network and dtype together."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.network, row.dtype), []).append(row)
    return list(groups.values())


def total_share(group: Sequence[Row]) -> float:
    """The limits of all layers over their times, each as often as the network has it."""
    return sum(r.count * r.limit_ms for r in group) / sum(r.count * r.ms for r in group)


def table(group: Sequence[Row], batch: int, against: str | None, tolerance: float) -> Table:
    total = sum(row.count * row.ms for row in group)
    caption = f"all convolutions: {total:.1f} ms, {total_share(group):.0%} of the limit"
    if against is not None and all(row.other_ms is not None for row in group):
        theirs = sum(row.count * (row.other_ms or 0) for row in group)
        caption += f"; {against}: {theirs:.1f} ms, ours takes {total / theirs:.2f} of it"
    result = Table(
        title=f"{group[0].network}, batch {batch}, {group[0].dtype}",
        caption=caption,
        title_justify="left",
        caption_justify="left",
    )
    result.add_column("#", justify="right")
    for column in ("layer", "problem"):
        result.add_column(column, overflow="fold")
    result.add_column("times", justify="right")
    result.add_column("kernel", no_wrap=True)
    for column in ("ms", "effective\nGFLOP/s", "real\nGFLOP/s", "GB/s"):
        result.add_column(column, justify="right", no_wrap=True)
    result.add_column("limit", no_wrap=True)
    result.add_column("share", justify="right", no_wrap=True)
    if against is not None:
        result.add_column(f"{against}\nms", justify="right", no_wrap=True)
        result.add_column("ours /\nits", justify="right", no_wrap=True)
    for number, row in enumerate(group, 1):
        told = row.as_dict()
        cells = [
            str(number),
            escape(row.layer),
            row.problem,
            str(row.count),
            escape(row.kernel),
            f"{row.ms:.3f}",
            f"{told['effective_gflop_per_s']:.0f}",
            f"{told['real_gflop_per_s']:.0f}",
            f"{told['gbytes_per_s']:.1f}",
            row.limit,
            f"{row.share:.0%}",
        ]
        if against is not None:
            slow = row.slower(tolerance)
            ratio = "-" if row.ours_over_other is None else f"{row.ours_over_other:.2f}"
            cells += ["-" if row.other_ms is None else f"{row.other_ms:.3f}"]
            cells += [f"[red]{ratio}[/red]" if slow else ratio]
        result.add_row(*cells)
    return result


_INK, _MUTED, _GRID = "#1f2933", "#616e7c", "#e4e7eb"
_COLOURS = {"multiplications": "#0b7285", "memory": "#d9822b"}


def draw(path: str, rows: Sequence[Row], peaks: dict[str, float], caption: str) -> None:
    """A PNG: for each network its layers under the roofs, numbered, and beside them each layer's share of its limit."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = grouped(rows)
    heights = [max(3.4, 0.21 * len(group) + 1.0) for group in groups]
    figure = Figure(figsize=(14, sum(heights) + 0.6), dpi=110, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(len(groups), 2, squeeze=False, height_ratios=heights, width_ratios=(1.1, 1))
    figure.suptitle(caption, fontsize=10, color=_MUTED)
    placed = []
    for (left, right), group in zip(axes, groups, strict=True):
        placed.append((left, _draw_roofs(left, group, peaks)))
        _draw_shares(right, group)
    canvas.draw()  # settles the layout: labels are placed in pixels
    figure.set_layout_engine("none")
    for axis, (points, roofs) in placed:
        _place_labels(axis, points, roofs)
    partial = f"{path}.{os.getpid()}.png"
    try:
        figure.savefig(partial)
        Path(partial).replace(path)
    finally:
        Path(partial).unlink(missing_ok=True)


def _draw_roofs(
    axis: Any, group: Sequence[Row], peaks: dict[str, float]
) -> tuple[list[tuple[float, float]], list[float]]:
    """The points of the layers, and where the upper roofs are: one for each arithmetic that is used."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    kinds = sorted({row.arithmetic for row in group})
    both = {kind: peak.roofs(peaks, measure.DTYPES[kind]) for kind in kinds}
    roofs, bandwidth = {kind: flops / 1e9 for kind, (flops, _) in both.items()}, both[kinds[0]][1] / 1e9
    points = [(row.real_flops / row.bytes, row.real_flops / row.ms / 1e6) for row in group]
    lowest, highest = min(roofs.values()) / bandwidth, max(roofs.values()) / bandwidth
    low = min(0.5 * min(x for x, _ in points), 0.5 * lowest)
    high = 2 * max(*(x for x, _ in points), highest)
    axis.plot([low, highest], [low * bandwidth, highest * bandwidth], color=_INK, lw=1.5)
    axis.text(
        low, max(roofs.values()) * 1.08, f" slope: {bandwidth:.0f} GB/s", ha="left", fontsize=8, color=_INK
    )
    for kind, roof in roofs.items():
        axis.plot([roof / bandwidth, high], [roof, roof], color=_INK, lw=1.5)
        axis.text(high, roof * 1.08, f"{kind}: {roof:.0f} GFLOP/s ", ha="right", fontsize=8, color=_INK)
    for row, (x, y) in zip(group, points, strict=True):
        axis.plot([x], [y], "o", ms=5, color=_COLOURS[row.limit], zorder=3)
    axis.set(xscale="log", yscale="log", xlim=(low, high), xlabel="real FLOP per byte", ylabel="real GFLOP/s")
    bottom = min(*(y for _, y in points), low * bandwidth) / 1.7
    axis.set_ylim(bottom, max(roofs.values()) * 1.7)
    axis.grid(which="major", color=_GRID)
    axis.set_title(f"{group[0].network}, {group[0].dtype}", fontsize=10, loc="left")
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ticks.set_minor_formatter(NullFormatter())
    axis.tick_params(labelsize=8)
    return points, list(roofs.values())


def _place_labels(axis: Any, points: Sequence[tuple[float, float]], roofs: Sequence[float]) -> None:
    """Numbers beside the points, each at the nearest place where it covers no point, no other number and no roof."""
    lines = [axis.transData.transform((1, roof))[1] for roof in roofs]
    centres = [tuple(axis.transData.transform(point)) for point in points]
    scale = axis.figure.dpi / 72
    half_w, half_h, dot = 6.0 * scale, 4.6 * scale, 3.5 * scale
    box = axis.get_window_extent()
    taken: list[tuple[float, float]] = []
    for number, (x, y) in enumerate(centres, 1):
        for step in range(12, 400):
            radius, angle = scale * (7 + 0.22 * (step - 12)), 2.4 * step  # a spiral
            u, v = x + radius * math.cos(angle), y + radius * math.sin(angle)
            inside = box.x0 + half_w < u < box.x1 - half_w and box.y0 + half_h < v < box.y1 - half_h
            free = all(abs(u - p) > 2 * half_w or abs(v - q) > 2 * half_h for p, q in taken)
            clear = all(abs(u - p) > half_w + dot or abs(v - q) > half_h + dot for p, q in centres)
            if inside and free and clear and all(abs(v - line) > 1.4 * half_h for line in lines):
                break
        taken.append((u, v))
        axis.annotate(
            str(number),
            points[number - 1],
            xytext=((u - x) / scale, (v - y) / scale),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=7.5,
            color=_INK,
            arrowprops={"arrowstyle": "-", "color": _MUTED, "lw": 0.5, "shrinkA": 4, "shrinkB": 2},
        )


def _draw_shares(axis: Any, group: Sequence[Row]) -> None:
    names = [
        f"{number}  {row.layer}" + (f" (x{row.count})" if row.count > 1 else "")
        for number, row in enumerate(group, 1)
    ]
    shares = [100 * row.share for row in group]
    bars = axis.barh(range(len(group)), shares, color=[_COLOURS[row.limit] for row in group], height=0.72)
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # the dashed line stops at the words
    labels = [
        f"{share:.0f} %  {row.ms:.2f} ms  {row.kernel}" for share, row in zip(shares, group, strict=True)
    ]
    axis.bar_label(bars, labels, padding=3, fontsize=7.5, color=_INK, bbox=behind)
    axis.axvline(75, color=_MUTED, lw=0.8, ls="--", zorder=0)
    axis.set_yticks(range(len(group)), names, fontsize=7.5)
    axis.invert_yaxis()
    axis.set_xlim(0, max(100, *shares) * 1.55)
    axis.set_xticks(range(0, 101, 25), [f"{tick} %" for tick in range(0, 101, 25)])
    axis.tick_params(axis="x", labelsize=8)
    axis.set_title(f"share of the limit: {total_share(group):.0%} in all", fontsize=10, loc="left")
    handles = [axis.barh([0], [0], color=colour) for colour in _COLOURS.values()]
    axis.legend(
        handles,
        [f"limit: {name}" for name in _COLOURS],
        fontsize=7.5,
        ncols=2,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        borderpad=0.1,
        frameon=False,
    )
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


# ---- arguments ----


def _each(item: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        return [item(part.strip()) for part in text.split(",") if part.strip()]

    return parse


def _dtype(text: str) -> str:
    if text not in ("fp32", "bf16"):
        raise argparse.ArgumentTypeError(f"unknown {text!r}; known: fp32, bf16")
    return text


def _even(text: str) -> int:
    number = int(text)
    if number < 0 or number % 2:
        raise argparse.ArgumentTypeError(f"expected 0, 2, 4, ..., got {text}")
    return number


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return value


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--networks",
        type=_each(measure.Network.parse),
        default=[measure.Network.parse(name) for name in NETWORKS],
        metavar="NAME[@CxDxHxW],...",
        help=f"default: {','.join(NETWORKS)}; without a size 16 frames of 112x112",
    )
    parser.add_argument("--batch", type=_positive, default=1, metavar="N", help="default: 1")
    parser.add_argument(
        "--dtype", type=_each(_dtype), default=["fp32"], metavar="DTYPE,...", help="fp32, bf16"
    )
    parser.add_argument(
        "--threads", type=_positive, default=torch.get_num_threads(), help="default: %(default)s"
    )
    parser.add_argument(
        "--backend", choices=("auto", "cpu"), default="auto", help="cpu: choose among our own kernels only"
    )
    parser.add_argument(
        "--against",
        choices=[k.name for k in backends.KERNELS if k.backend in ("cpu", "torch")],
        metavar="KERNEL",
        help="time this kernel too, interleaved: oneDNN, stock, direct, ...",
    )
    parser.add_argument("--tolerance", type=float, default=0.03, help="of --against (default: 0.03)")
    parser.add_argument(
        "--again",
        type=_even,
        default=2,
        metavar="N",
        help="measure a layer that is slower so many times more, after all others and in new processes: the median "
        "of its ratios counts (even, default: %(default)s)",
    )
    parser.add_argument(
        "--cold",
        type=_positive,
        default=0,
        metavar="MIB",
        help="write so much other memory before every call, as a network does between two calls of a layer",
    )
    parser.add_argument("--rounds", type=_positive, default=15, help="timed samples a layer (default: 15)")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="at most for one layer, after three rounds"
    )
    parser.add_argument("--peak-seconds", type=float, default=1.0, help="for each of the peaks, twice")
    parser.add_argument("--json", metavar="FILE", help="write everything there")
    parser.add_argument("--png", metavar="FILE", help="draw the roofline there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    torch.set_num_threads(args.threads)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 180)
    dtypes = [torch.float32, torch.bfloat16]  # a float32 layer may be computed in slices of bfloat16
    peaks = peak.measure_peaks(dtypes, args.peak_seconds)
    jobs = [
        (n, dtype, layer) for n in args.networks for dtype in args.dtype for layer in layers_of(n, args.batch)
    ]
    rows: list[Row] = []

    def timing(
        network: measure.Network, dtype: str, layer: tuple[str, int, ConvProblem]
    ) -> Callable[[], Row]:
        return partial(
            measure_layer,
            network,
            *layer,
            dtype,
            backend=args.backend,
            against=args.against,
            rounds=args.rounds,
            seconds=args.seconds,
            cold=args.cold,
        )

    status = Console(stderr=True)
    with torch.inference_mode(), Progress(console=status, disable=not status.is_terminal) as progress:
        task = progress.add_task("", total=2 * len(jobs))

        def told(number: int) -> None:
            network, dtype, layer = jobs[number]
            progress.update(task, description=f"choosing for {network} {dtype} {layer[0]}")

        # Before the first is timed, since kernels that are close are measured again after a while.
        backends.choose_all(
            [(layer[2], measure.DTYPES[dtype]) for _, dtype, layer in jobs], "cpu", args.backend, told
        )
        progress.update(task, completed=len(jobs))
        for job in jobs:
            progress.update(task, description=f"{job[0]} {job[1]} {job[2][0]}")
            rows.append(timing(*job)())
            progress.advance(task)
        for i, job in enumerate(jobs):
            if args.again and rows[i].slower(args.tolerance):
                progress.update(task, description=f"{job[0]} {job[1]} {job[2][0]}, again")
                more = [elsewhere(args.threads, timing(*job)) for _ in range(args.again)]
                rows[i] = middle([rows[i], *more])
    peaks = peak.higher(peaks, peak.measure_peaks(dtypes, args.peak_seconds))
    for row in rows:
        row.against_roofs(*peak.roofs(peaks, measure.DTYPES[row.arithmetic]))

    about = measure.machine()
    caption = (
        f"{about['cpu']}, {args.threads} threads, torch {about['versions'].get('torch')}, batch {args.batch}"
        + (", caches emptied before every call" if args.cold else "")
    )
    console.print(caption)
    for name, value in peaks.items():
        unit = "GB/s" if name.endswith("iB") else "GFLOP/s"
        console.print(f"  {name}: {value / 1e9:.0f} {unit}")
    for group in grouped(rows):
        console.print(table(group, args.batch, args.against, args.tolerance))
    slower = [row for row in rows if row.slower(args.tolerance)]
    if args.against is not None:
        console.print(
            f"{len(slower)} of {len(rows)} layers slower than {args.against} by more than {args.tolerance:.0%}"
        )
    if args.json:
        report = {
            "machine": about,
            "batch": args.batch,
            "backend": args.backend,
            "against": args.against,
            "cold_mib": args.cold,
            "peaks": peaks,
            "layers": [row.as_dict() for row in rows],
            "networks": [
                {
                    "network": group[0].network,
                    "dtype": group[0].dtype,
                    "ms": round(sum(row.count * row.ms for row in group), 3),
                    "share_of_limit": round(total_share(group), 3),
                }
                for group in grouped(rows)
            ],
        }
        measure.write_json(args.json, report)
    if args.png:
        draw(args.png, rows, peaks, caption)
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
