"""Compares every fused layer of a network with the stock modules and with float64, on a clip, then the whole network.

Without VIDEO it takes the H.264 clip that the 'demo' extra brings, with --random noise, which needs no clip and no
extra but rich. The network has random weights (a fixed seed) whose batch-norm statistics are set by a short calibration
on the same clips, unless --weights names a checkpoint. Each layer is judged by the data that it gets in the fused
network, so that a wrong one shows as itself. R3D_KERNELS_BACKEND, R3D_KERNELS_FP32 and R3D_KERNELS_ISA hold here too.

Exit code 1 if a layer or the network misses the promised accuracy.

  r3d-kernels verify --weights r3d50_K_200ep.pth my_video.mp4
  r3d-kernels verify --arch r2plus1d_18 --random --dtype bf16 --json report.json
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from r3d_kernels.cli import common
from r3d_kernels.cli.common import CliError
from r3d_kernels.cli.inputs import (
    CALIBRATION_CLIPS,
    add_arguments_of_inputs,
    network_name,
    prepare,
    prepare_clips,
    random_clips,
    read_clips,
    video_line,
)

if TYPE_CHECKING:
    from rich.console import Console

    from r3d_kernels.verifying import Report

HELP = "is it right? every layer, ours and stock, against float64"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_arguments_of_inputs(parser)
    parser.add_argument("--random", action="store_true", help="noise in place of a clip")
    parser.add_argument(
        "--json", metavar="OUT", help="write JSON to this file ('-': stdout) instead of a table"
    )
    common.add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    import torch

    from r3d_kernels.verifying import verify

    if args.random and args.video is not None:
        raise CliError("--random makes its own clips: leave VIDEO out")
    out, err = common.console(), common.console(stderr=True)
    if not args.random:
        common.require_extra("av", "numpy")
    if args.json not in (None, "-"):
        common.check_writable("--json", args.json)
    common.check_model_arguments(args.arch, args.weights)
    device = common.pick_device(args.device)
    dtype = getattr(torch, common.DTYPES[args.dtype])
    arch = args.arch or (None if args.weights else "r3d_18")
    count = max(args.batch, CALIBRATION_CLIPS)
    common.check_clips(count, 1 if args.random else 3, args.frames, args.size)
    with common.threads(args.threads), torch.no_grad(), err.status("") as status:
        if args.random:
            path, source = None, "video    none, noise"
            inputs_of, what = random_clips(count, args.frames, args.size), "clips of noise"
        else:
            status.update("decoding")
            path, info, clips, _ = read_clips(args.video, args.frames, count)
            source = video_line(path, info)
            inputs_of, what = prepare_clips(clips, args.size), "clips of the video"
        status.update("building the network")
        model, x, origin = prepare(arch, args.weights, inputs_of, args.batch, what)
        for note in common.notes(model):
            err.print(f"note: {note}", soft_wrap=True, markup=False)
        name = network_name(arch, model)
        model, x = common.set_fused(model, True).to(device, dtype), x.to(device, dtype)
        status.update("every layer against float64")
        report = verify(model, x)
        where = common.device_name(device)
    if args.json is None:
        geometry = "x".join(map(str, x.shape))
        for line in (
            source,
            f"network  {name}, {args.dtype}, {origin}",
            f"input    {geometry} on {where}",
        ):
            out.print(line, soft_wrap=True, markup=False)
        _print_table(out, report)
    else:
        facts = {"model": name, "weights": origin, "video": path, "processor": where}
        common.write_json(args.json, {**facts, **report.to_dict()})
    return 0 if report.ok else 1


def _print_table(out: Console, report: Report) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    if not out.is_terminal:
        out.width = max(out.width, 190)  # for files and pipes: one line a layer
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for number, header in enumerate(report.HEADERS):
        right = header in ("error", "stock", "allowed", "used")
        fold = header in ("layer", "problem", "kernel", "")
        table.add_column(
            header,
            justify="right" if right else "left",
            overflow="fold" if fold else "ellipsis",
            no_wrap=number == 0 or not fold,
        )
    for cells in report.cells():
        style = "bold red" if cells[0] == "FAIL" else "bold" if cells[-1].startswith("worst") else None
        table.add_row(*map(escape, cells), style=style)
    out.print()
    out.print(table)
    out.print()
    style = "bold green" if report.ok else "bold red"
    out.print(report.summary(), style=style, soft_wrap=True, markup=False)
