"""Runs the stock and the fused network on a real clip and shows the difference in time and in numbers.

Without VIDEO it takes the H.264 clip that the 'demo' extra brings. The network has random weights (a fixed
seed) whose batch-norm statistics are set by a short calibration on the video, unless --weights names a
checkpoint. Stock and fused have the same weights and run interleaved; both are compared with one forward pass
in float64.

Exit code 1 if the fused network misses the promised accuracy.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from r3d_kernels.cli import common
from r3d_kernels.cli.inputs import (
    CALIBRATION_CLIPS,
    add_arguments_of_inputs,
    network_name,
    prepare,
    prepare_clips,
    read_clips,
    video_line,
)

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from torch import Tensor, nn

HELP = "stock against fused on a real clip: time, numbers, a picture"

STOCK, STOCK_CL, FUSED = "stock eager", "stock channels-last", "fused"


@dataclass
class Run:
    """One of the compared ways to compute the same logits."""

    name: str
    seconds: float  # median over the repeats
    batch: int
    logits: Tensor  # float64 [N, classes], on the CPU

    @property
    def clips_per_second(self) -> float:
        return self.batch / self.seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_arguments_of_inputs(parser)
    parser.add_argument(
        "--repeats",
        type=common.whole(common.MOST_COUNTED),
        default=7,
        metavar="N",
        help="timed runs of each (default 7)",
    )
    parser.add_argument(
        "--out", default="r3d_demo.png", metavar="PNG", help="the picture (default ./r3d_demo.png)"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="also the backend of every layer")
    common.add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    import torch

    common.require_extra("av", "matplotlib", "numpy")
    out, err = common.console(), common.console(stderr=True)
    common.check_writable("--out", args.out)
    common.check_model_arguments(args.arch, args.weights)
    common.check_clips(max(args.batch, CALIBRATION_CLIPS), 3, args.frames, args.size)
    device = common.pick_device(args.device)
    dtype = getattr(torch, common.DTYPES[args.dtype])
    with common.threads(args.threads), torch.inference_mode(), err.status("") as status:
        status.update("decoding")
        path, info, clips, shown = read_clips(args.video, args.frames, max(args.batch, CALIBRATION_CLIPS))
        status.update("building the network")
        arch = args.arch or (None if args.weights else "r3d_18")
        model, x, origin = prepare(arch, args.weights, prepare_clips(clips, args.size), args.batch)
        name = network_name(arch, model)
        for note in common.notes(model):
            err.print(f"note: {note}", soft_wrap=True, markup=False)
        _say(out, video_line(path, info))
        _say(out, f"network  {name}, {args.dtype}, {origin}")
        geometry = "x".join(str(n) for n in x.shape)
        _say(out, f"input    {geometry} on {common.device_name(device)}")

        model, x = model.to(device, dtype), x.to(device, dtype)
        status.update("float64 reference")
        reference = _reference(model, x)
        status.update("stock and fused, interleaved")
        runs, first_call, fused = _compare(model, x, args.repeats)
        rows = common.backend_rows(fused)

        status.update("drawing")
        verdict = Verdict.of(runs, reference, dtype, device)
        _report(out, runs, reference, first_call, rows, args.repeats)
        if args.verbose:
            _report_layers(out, rows)
        from r3d_kernels.cli.figure import draw

        where = f"{geometry} {args.dtype} on {common.device_name(device)}"
        picture = draw(
            title=f"{name} on {common.printable(os.path.basename(path))}",
            subtitle=f"{where}, median of {args.repeats} interleaved runs",
            footer=verdict.text,
            frames=shown,
            bars=[(r.name, r.seconds) for r in runs],
        )
        common.write_atomically(args.out, picture)
    _say(out, f"picture  {args.out}")
    out.print(verdict.text, style="bold green" if verdict.ok else "bold red", soft_wrap=True, markup=False)
    return 0 if verdict.ok else 1


def _say(out: Console, text: str) -> None:
    out.print(text, soft_wrap=True, markup=False)


def _reference(model: nn.Module, x: Tensor) -> Tensor:
    """float64 [N, classes] on the CPU: the stock network with the same weights and input, in float64."""
    import torch

    double = copy.deepcopy(model).double()
    # Clip by clip: a CPU's float64 convolution unfolds its whole input in memory.
    return torch.cat([double(clip.double()) for clip in x.split(1)]).cpu()


def _compare(model: nn.Module, x: Tensor, repeats: int) -> tuple[list[Run], float, nn.Module]:
    """Runs stock, stock in channels-last and fused in turn; also the seconds of the first fused call."""
    import torch

    def timed(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
        if x.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = call()
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start, result

    with torch.inference_mode(False):
        channels_last = copy.deepcopy(model).to(memory_format=torch.channels_last_3d)
        fused = common.set_fused(copy.deepcopy(model), True)
    x_last = x.contiguous(memory_format=torch.channels_last_3d)
    calls: dict[str, Callable[[], Tensor]] = {
        STOCK: lambda: model(x),
        STOCK_CL: lambda: channels_last(x_last),
        FUSED: lambda: fused(x),
    }
    first_call, _ = timed(calls[FUSED])  # packs the weights, chooses the kernels
    for call in calls.values():  # warm-up of each
        timed(call)
    times: dict[str, list[float]] = {name: [] for name in calls}
    logits: dict[str, Tensor] = {}
    for _ in range(repeats):
        for name, call in calls.items():
            seconds, result = timed(call)
            times[name].append(seconds)
            logits[name] = result
    runs = [
        Run(name, statistics.median(times[name]), x.shape[0], logits[name].detach().double().cpu())
        for name in calls
    ]
    return runs, first_call, fused


def relative_l2(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).norm() / reference.norm().clamp_min(1e-300)).item()


def top_k_agreement(a: Tensor, b: Tensor, k: int = 5) -> tuple[int, int]:
    """How many of the k highest classes two results [N, classes] share, of how many, in all clips."""
    k = min(k, a.shape[1])
    pairs = zip(a.topk(k).indices.tolist(), b.topk(k).indices.tolist(), strict=True)
    return sum(len(set(one) & set(other)) for one, other in pairs), k * a.shape[0]


@dataclass(frozen=True)
class Verdict:
    """Whether the fused logits are as close to float64 as promised."""

    ok: bool
    text: str

    @classmethod
    def of(cls, runs: list[Run], reference: Tensor, dtype: torch.dtype, device: torch.device) -> Verdict:
        from r3d_kernels._promise import FLOAT32_NETWORK, STOCK_BROKEN, allowed

        by_name = {r.name: r for r in runs}
        ours = relative_l2(by_name[FUSED].logits, reference)
        stock = relative_l2(by_name[STOCK].logits, reference)
        limit = allowed(dtype, stock, device, network=True)
        if dtype.itemsize == 4:
            asked = "torch's switches allow" if limit > FLOAT32_NETWORK else "the promise for"
            rule = f"{asked} float32 logits; stock has {stock:.1e}"
        elif stock < STOCK_BROKEN:
            rule = "2 x stock error + 2^-8"
        else:
            rule = f"stock bfloat16 itself is wrong here, error {stock:.1e}: see 'r3d-kernels doctor'"
        ok = math.isfinite(ours) and ours <= limit
        sign, word = ("<=", "OK") if ok else (">", "FAILED")
        return cls(ok, f"parity {word}: fused vs float64, relative L2 {ours:.1e} {sign} {limit:.1e} ({rule})")


def _report(
    out: Console,
    runs: list[Run],
    reference: Tensor,
    first_call: float,
    rows: list[dict[str, Any]],
    repeats: int,
) -> None:
    from rich import box
    from rich.table import Table

    stock = runs[0]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column(f"median of {repeats}", no_wrap=True)
    for header in (
        "time\nms",
        "speed-up",
        "clips/s",
        "max |Δ|\nvs stock",
        "rel. L2\nvs stock",
        "rel. L2\nvs fp64",
    ):
        table.add_column(header, justify="right", no_wrap=True)
    for r in runs:
        same = r is stock
        table.add_row(
            r.name,
            f"{r.seconds * 1e3:.1f}",
            f"{stock.seconds / r.seconds:.2f}x",
            f"{r.clips_per_second:.2f}",
            "-" if same else f"{(r.logits - stock.logits).abs().max().item():.1e}",
            "-" if same else f"{relative_l2(r.logits, stock.logits):.1e}",
            f"{relative_l2(r.logits, reference):.1e}",
            style="bold" if r.name == FUSED else None,
        )
    out.print()
    out.print(table)
    out.print()
    fused = runs[-1]
    shared, total = top_k_agreement(fused.logits, stock.logits)
    _say(out, f"first call of the fused network: {first_call:.2f} s (packing + tuning, once)")
    k = min(5, stock.logits.shape[1])
    _say(out, f"top-{k} agreement with stock: {shared} of {total}")
    chosen = Counter(" ".join(filter(None, (r["backend"], r["kernel"]))) for r in rows)
    if chosen:
        kinds = ", ".join(f"{count} {kind}" for kind, count in chosen.most_common())
        _say(out, f"fused layers: {len(rows)} ({kinds})")


def _report_layers(out: Console, rows: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for header in ("layer", "problem", "backend", "kernel", "why (ms)"):
        table.add_column(header, overflow="fold")
    for row in rows:
        times = ", ".join(f"{name} {seconds * 1e3:.2f}" for name, seconds in row["timings"].items())
        why = " ".join(filter(None, (row["reason"], times and f"({times})")))
        table.add_row(*(escape(row[key]) for key in ("layer", "problem", "backend", "kernel")), escape(why))
    out.print()
    out.print(table)
    out.print()
