"""Measures which kernel is the fastest for every layer of the given networks, and remembers it.

Fused layers do the same by themselves at their first call; this does it beforehand, for any number of networks and
shapes, and shows the result. On a GPU it compiles the Triton kernels of all layers together first, on several cores.
Kernels that were close are measured twice more, after 2 s and after 20 s: a busy machine can mislead. What the tuning
cache has already is not measured again, unless --clear forgets it first. Results hold for this processor, this number
of threads and these versions of torch and of this package.

  r3d-kernels tune --arch r3d_18,r3d_50 --batch 1,8 --dtype fp32,bf16 --threads 2
  r3d-kernels tune --arch hara_r3d_18 --in-channels 1 --frames 96 --size 96
  r3d-kernels tune --weights r3d50_K_200ep.pth --clear
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from r3d_kernels.cli import common
from r3d_kernels.cli.common import CliError

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from r3d_kernels.backends import Choice
    from r3d_kernels.problems import ConvProblem

HELP = "measure the layers of networks beforehand: the fastest kernel of each"

DEFAULT_ARCHS = ["r3d_18", "r2plus1d_18", "hara_r3d_18", "hara_r3d_50"]


def _list_of(item: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """The argparse type of a comma-separated list, each once."""

    def parse(text: str) -> list[Any]:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if not parts:
            raise argparse.ArgumentTypeError(f"must name at least one, got {text!r}")
        return list(dict.fromkeys(item(part) for part in parts))

    return parse


def _dtype(text: str) -> str:
    if text not in common.DTYPES:
        known = ", ".join(common.DTYPES)
        raise argparse.ArgumentTypeError(f"must be of {known}, got {text!r}")
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arch",
        type=_list_of(str),
        metavar="NAME,...",
        help=f"networks (default {','.join(DEFAULT_ARCHS)}, or that of the checkpoint)",
    )
    parser.add_argument("--weights", metavar="PATH", help="a checkpoint: its network instead of --arch")
    parser.add_argument(
        "--frames", type=common.positive, default=16, metavar="N", help="frames a clip (default 16)"
    )
    parser.add_argument(
        "--size", type=common.positive, default=112, metavar="N", help="height and width (default 112)"
    )
    parser.add_argument(
        "--batch",
        type=_list_of(common.positive),
        default=[1],
        metavar="N,...",
        help="clips at once (default 1)",
    )
    parser.add_argument(
        "--dtype",
        type=_list_of(_dtype),
        default=["fp32"],
        metavar="DTYPE,...",
        help="fp32, bf16 (default fp32)",
    )
    parser.add_argument(
        "--in-channels", type=common.positive, metavar="N", help="of the clip (default: the network's)"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda", "auto"), default="auto", help="auto: a GPU if there is one"
    )
    parser.add_argument(
        "--threads",
        type=common.whole(common.MOST_THREADS),
        metavar="N",
        help="CPU threads (default: torch's own choice)",
    )
    forget = parser.add_mutually_exclusive_group()
    forget.add_argument(
        "--clear", action="store_true", help="forget these layers first: all are measured anew"
    )
    forget.add_argument(
        "--clear-all",
        action="store_true",
        help="forget the whole cache first, other networks and machines too",
    )
    parser.add_argument(
        "--json", metavar="OUT", help="write JSON to this file ('-': stdout) instead of tables"
    )


@dataclass
class Row:
    """One distinct layer of a network and what was chosen for it."""

    network: str
    layer: str  # the first that has this problem
    count: int  # how many have it
    problem: ConvProblem
    dtype: str
    choice: Choice

    def ranking(self) -> list[tuple[str, float]]:
        """Measured kernels and their seconds, the fastest first."""
        return sorted(self.choice.seconds.items(), key=lambda item: item[1])

    @property
    def seconds(self) -> float | None:
        return self.choice.seconds.get(self.choice.kernel.name)

    @property
    def runner_up(self) -> tuple[str, float] | None:
        """The fastest of the others; a less preferred kernel within the noise may be ahead of the chosen one."""
        return next((item for item in self.ranking() if item[0] != self.choice.kernel.name), None)

    def as_dict(self) -> dict[str, Any]:
        other = self.runner_up
        return {
            "network": self.network,
            "layer": self.layer,
            "count": self.count,
            "problem": str(self.problem),
            "dtype": self.dtype,
            "backend": self.choice.kernel.backend,
            "kernel": self.choice.kernel.name,
            "seconds": self.seconds,
            "runner_up": other and other[0],
            "runner_up_seconds": other and other[1],
            "reason": self.choice.reason,
            "timings": dict(self.choice.seconds),
        }


def run(args: argparse.Namespace) -> int:
    import torch

    from r3d_kernels import tuning

    out, err = common.console(), common.console(stderr=True)
    if not out.is_terminal:
        out.width = max(out.width, 190)  # for files and pipes: one line a layer
    if args.weights is not None and args.arch is not None:
        raise CliError("--weights names the network itself: leave --arch out")
    if args.weights is not None and args.in_channels is not None:
        raise CliError("--weights fixes the channels: leave --in-channels out")
    common.check_model_arguments(None, args.weights)
    archs = args.arch or DEFAULT_ARCHS
    for arch in archs:
        common.check_arch(arch)
    if args.json not in (None, "-"):
        common.check_writable("--json", args.json)
    if not tuning.enabled():
        raise CliError("R3D_KERNELS_TUNE=0 forbids what this command does: unset it")
    for batch in args.batch:
        common.check_clips(batch, args.in_channels or 1, args.frames, args.size)
    device = common.pick_device(args.device)
    clip = (args.frames, args.size, args.size)
    with common.threads(args.threads), torch.inference_mode():
        jobs = [
            (network, layers)
            for batch in args.batch
            for network, layers in _networks(archs, args.weights, args.in_channels, batch, clip)
        ]
        try:
            _forget(args, jobs, device)
            tuning.check_writable()
        except OSError as e:
            raise CliError(f"tuning cache {tuning.cache_path()}: {common.one_line(e)}") from e
        rows = _measure(jobs, args.dtype, device, err)
        where = common.device_name(device)
        if args.json is None:
            _print_tables(out, rows, where)
            out.print(f"remembered in {tuning.cache_path()}", soft_wrap=True, markup=False)
        else:
            report = {
                "device": where,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "cache": str(tuning.cache_path()),
                "layers": [row.as_dict() for row in rows],
            }
            common.write_json(args.json, report)
    return 0


Layers = list[
    tuple[str, int, "ConvProblem"]
]  # name of the first layer, how many have the problem, the problem


def _networks(
    archs: Sequence[str], weights: str | None, channels: int | None, batch: int, clip: tuple[int, int, int]
) -> list[tuple[str, Layers]]:
    """(title, distinct layers) of each network at one batch size."""
    from r3d_kernels.models import create_model
    from r3d_kernels.problems import network_problems, unique

    models = {}
    if weights is not None:
        model = common.build_model(None, weights)
        models[f"{type(model).__name__}-{getattr(model, 'depth', '?')}"] = model
    else:
        for arch in archs:
            # On "meta": only the shapes matter, and no time is spent on initial values.
            models[arch] = create_model(
                arch, device="meta", **({"in_channels": channels} if channels else {})
            )
    found = []
    for name, model in models.items():
        shape = (batch, model.in_channels, *clip)
        try:
            problems = network_problems(model, shape)
        except ValueError as e:
            raise CliError(f"{name} with clips of {'x'.join(map(str, shape))}: {common.one_line(e)}") from e
        first = {}
        for layer, problem in problems:
            first.setdefault(problem, layer)
        layers = [(first[problem], count, problem) for problem, count in unique(problems)]
        found.append((f"{name} {'x'.join(map(str, shape))}", layers))
    return found


def _requests(jobs: list[tuple[str, Layers]], dtypes: list[str], device: torch.device) -> list[Any]:
    import torch

    from r3d_kernels.backends import Request

    return [
        Request(problem, getattr(torch, common.DTYPES[dtype]), device, torch.get_num_threads())
        for _, layers in jobs
        for dtype in dtypes
        for _, _, problem in layers
    ]


def _forget(args: argparse.Namespace, jobs: list[tuple[str, Layers]], device: torch.device) -> None:
    from r3d_kernels import backends, tuning

    if args.clear_all:
        tuning.shared.clear()
    elif args.clear:
        requests = _requests(jobs, args.dtype, device)
        keys = [key for request in requests for key in backends.cache_keys(request)]
        for machine in {machine for machine, _ in keys}:
            tuning.shared.forget(machine, [problem for m, problem in keys if m == machine])


def _measure(
    jobs: list[tuple[str, Layers]], dtypes: list[str], device: torch.device, err: Console
) -> list[Row]:
    import torch

    from r3d_kernels import backends

    with _progress(err) as progress:
        compiling = progress.add_task("compiling", total=None, visible=False)
        backends.prepare(
            _requests(jobs, dtypes, device),
            lambda done, total: progress.update(compiling, completed=done, total=total, visible=done < total),
        )
        places = [
            (network, layer, count, problem, dtype)
            for network, layers in jobs
            for dtype in dtypes
            for layer, count, problem in layers
        ]
        task = progress.add_task("", total=len(places))
        seen: set[int] = set()

        def told(number: int) -> None:
            network, layer, _, _, dtype = places[number]
            again = ", once more" if number in seen else ""
            progress.update(task, completed=len(seen), description=f"{network} {dtype} {layer}{again}")
            seen.add(number)

        choices = backends.choose_all(
            [(problem, getattr(torch, common.DTYPES[dtype])) for *_, problem, dtype in places],
            device,
            told=told,
        )
    return [Row(*place, choice) for place, choice in zip(places, choices, strict=True)]


def _progress(err: Console) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    # A bar that is redrawn is for eyes; a log file gets the errors only.
    return Progress(*columns, console=err, disable=not err.is_terminal, transient=True)


def _print_tables(out: Console, rows: list[Row], where: str) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.network, row.dtype), []).append(row)
    for (network, dtype), group in groups.items():
        total = sum(row.count * row.seconds for row in group if row.seconds is not None)
        table = Table(
            title=f"{network}, {dtype}, {where}",
            caption=f"{total * 1e3:.1f} ms for the convolutions of a forward pass",
            title_justify="left",
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
        )
        table.add_column("layer", overflow="fold")
        table.add_column("problem", overflow="fold")
        for header in ("times", "kernel", "ms", "runner-up", "ms"):
            table.add_column(header, justify="right" if header in ("times", "ms") else "left", no_wrap=True)
        table.add_column("reason", overflow="fold")
        for row in group:
            other = row.runner_up
            table.add_row(
                escape(row.layer),
                str(row.problem),
                str(row.count),
                escape(row.choice.kernel.name),
                "-" if row.seconds is None else f"{row.seconds * 1e3:.3f}",
                escape(other[0]) if other else "-",
                f"{other[1] * 1e3:.3f}" if other else "-",
                escape(row.choice.reason),
            )
        out.print(table)
        out.print()
