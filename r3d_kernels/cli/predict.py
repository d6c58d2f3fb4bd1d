"""Says what is in each video: a sliding window of clips, softmax averaged over them, the top classes.

The result has the shape that 3D-ResNets-PyTorch writes:
{"results": {VIDEO: [{"label": ..., "score": ...}, ...]}}.
A video that cannot be read is reported and does not stop the others; the exit code is then 2.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from r3d_kernels.cli import common
from r3d_kernels.cli.common import CliError

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from torch import Tensor, nn

_MOST_LABELS = 1 << 24  # characters

HELP = "labels for whole videos, as a table or as JSON"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help="video files")
    parser.add_argument("--arch", metavar="NAME", help="network (default: that of the checkpoint)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--weights", metavar="PATH", help="a checkpoint")
    source.add_argument(
        "--random-weights", action="store_true", help="no checkpoint: only to try the plumbing"
    )
    parser.add_argument(
        "--labels", metavar="FILE", help="class names: .txt, one a line, or .json, list or dict"
    )
    parser.add_argument(
        "--topk",
        type=common.whole(common.MOST_COUNTED),
        default=5,
        metavar="K",
        help="classes a video (default 5)",
    )
    parser.add_argument(
        "--json", metavar="OUT", help="write JSON to this file ('-': stdout) instead of a table"
    )
    parser.add_argument(
        "--batch", type=common.positive, default=4, metavar="N", help="clips at once (default 4)"
    )
    parser.add_argument(
        "--clip-stride",
        type=common.whole(common.MOST_COUNTED),
        default=16,
        metavar="N",
        help="frames between two clips (default 16)",
    )
    parser.add_argument(
        "--frames", type=common.positive, metavar="N", help="frames a clip (default: the network's)"
    )
    parser.add_argument(
        "--size", type=common.positive, metavar="N", help="height and width (default: the network's)"
    )
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="how to prepare frames: hara, hara2018, torchvision (default: as the weights)",
    )
    parser.add_argument("--no-fused", action="store_true", help="compute with the stock layers")
    common.add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    import torch

    common.require_extra("av", "numpy")
    if args.random_weights and args.arch is None:
        raise CliError("--random-weights needs --arch")
    common.check_model_arguments(args.arch, args.weights)
    out, err = common.console(), common.console(stderr=True)
    if args.json not in (None, "-"):
        common.check_writable("--json", args.json)
    labels = None if args.labels is None else read_labels(args.labels)
    device = common.pick_device(args.device)

    from r3d_kernels.models import preset
    from r3d_kernels.video import Transform

    results: dict[str, list[dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    with common.threads(args.threads), torch.no_grad(), _progress(err) as progress:
        model = common.build_model(args.arch, args.weights)
        if isinstance(getattr(model, "fc", None), torch.nn.Identity):
            raise CliError(f"--weights {args.weights}: has features only, no classifier")
        for note in common.notes(model):
            err.print(f"note: {note}", soft_wrap=True, markup=False)
        classes = getattr(getattr(model, "fc", None), "out_features", None)
        if labels is not None and classes is not None:
            check_labels(labels, classes)
        common.set_fused(model, not args.no_fused)
        facts = preset(args.preset or model)
        err.print(f"note: {describe_preset(facts)}", soft_wrap=True, markup=False)
        transform = Transform(facts, size=args.size)
        frames = args.frames or facts.frames
        common.check_clips(1, 3, frames, args.size or facts.crop_size)  # a batch has no more than there are
        dtype = getattr(torch, common.DTYPES[args.dtype])
        model = model.to(device, dtype)
        for video in dict.fromkeys(args.videos):  # each once
            task = progress.add_task(common.printable(os.path.basename(video)), total=None)
            try:
                scores = score(
                    model,
                    clips_of(video, frames, args.clip_stride, transform, progress, task),
                    args.batch,
                    device,
                    dtype,
                )
                results[video] = top(scores, labels, args.topk)
            except CliError:
                raise
            except (ValueError, OSError, RuntimeError, MemoryError) as e:
                reason = common.one_line(e)
                failed[video] = reason if video in reason else common.one_line(f"{video}: {reason}")
                progress.remove_task(task)
                # In full, whatever the width of the terminal: one line is what scripts look for.
                progress.console.print(f"{common.PROG}: error: {failed[video]}", soft_wrap=True, markup=False)
    if args.json is None:
        _print_tables(out, results)
    elif results:
        common.write_json(args.json, {"results": results})
    if failed and len(args.videos) > 1:
        err.print(f"{len(failed)} of {len(results) + len(failed)} videos failed", soft_wrap=True)
    return 2 if failed else 0


def describe_preset(facts: Any) -> str:
    """Which mean and std go with which weights is what everybody asks: said each time, in one line."""
    mean, std = (" ".join(f"{value:.4f}" for value in values) for values in (facts.mean, facts.std))
    name = getattr(facts, "name", "?")
    sides = f"resize {facts.resize}, crop {facts.crop_size}"
    return f"frames are prepared as for {name} ({sides}, mean {mean}, std {std})"


def clips_of(
    video: str, frames: int, stride: int, transform: Any, progress: Any = None, task: Any = None
) -> Iterator[Tensor]:
    """The network's inputs of one video, each float32 [3, frames, H, W], moving the progress bar along."""
    from r3d_kernels.video import iter_clips, probe

    info = probe(video)
    if progress is not None and info.frames:
        # What the header says is an estimate; the last window is the first that does not fit.
        progress.update(task, total=max(1, math.ceil((info.frames - frames) / stride) + 1))
    done = 0
    for clip in iter_clips(video, frames, stride):
        yield transform(clip)
        done += 1  # when the consumer asks for the next one
        if progress is not None:
            progress.update(task, completed=done)
    if progress is not None:
        progress.update(task, total=done, completed=done)


def score(
    model: nn.Module, clips: Iterator[Tensor], batch: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """float64 [classes]: the softmax averaged over clips (each [3, T, H, W]), computed `batch` at once."""
    import torch

    total, count = None, 0
    pending: list[Tensor] = []

    def flush() -> None:
        nonlocal total, count
        x = torch.stack(pending).to(device, dtype)  # [N, 3, T, H, W]
        part = model(x).double().softmax(1).sum(0).cpu()  # [classes]
        total = part if total is None else total + part
        count += len(pending)
        pending.clear()

    for clip in clips:
        pending.append(clip)
        if len(pending) == batch:
            flush()
    if pending:
        flush()
    if total is None:
        raise CliError("a video gave no clips")
    return total / count


def check_labels(labels: list[str], classes: int) -> None:
    if len(labels) != classes:
        raise CliError(f"--labels has {len(labels)} names, the network has {classes} classes")


def top(scores: Tensor, labels: list[str] | None, k: int) -> list[dict[str, Any]]:
    """The k best classes, best first; without labels a class is called by its index."""
    if labels is not None:
        check_labels(labels, len(scores))
    values, indices = scores.topk(min(k, len(scores)))
    return [
        {"label": labels[i] if labels else str(i), "score": value}
        for value, i in zip(values.tolist(), indices.tolist(), strict=True)
    ]


def read_labels(path: str) -> list[str]:
    """Class names by index from a text file (one a line) or JSON.

    JSON may be a list, {index: name}, {name: index} (PyTorchVideo), or {"labels": [...], ...}
    (3D-ResNets-PyTorch).
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(_MOST_LABELS + 1)
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror.lower() if isinstance(e, OSError) and e.strerror else "not UTF-8 text"
        raise CliError(f"--labels {path}: {reason}") from e
    if len(text) > _MOST_LABELS:  # an endless device, say
        raise CliError(f"--labels {path}: larger than {_MOST_LABELS} characters")
    if not path.lower().endswith(".json"):
        names = [line.strip() for line in text.rstrip().splitlines()]
    else:
        try:
            names = _labels_from_json(json.loads(text))
        except (ValueError, RecursionError) as e:
            raise CliError(f"--labels {path}: {common.one_line(e)}") from e
    if not names:
        raise CliError(f"--labels {path}: has no names")
    for index, name in enumerate(names):
        if not name:
            raise CliError(f"--labels {path}: the name of class {index} is empty")
    return names


def _labels_from_json(data: Any) -> list[str]:
    if isinstance(data, dict) and isinstance(data.get("labels"), list):
        data = data["labels"]
    if isinstance(data, dict):
        values = list(data.values())
        by_name = bool(values) and all(isinstance(v, int) and not isinstance(v, bool) for v in values)
        pairs = [(v, k) for k, v in data.items()] if by_name else list(data.items())
        try:
            by_index = {int(index): name for index, name in pairs}
        except (TypeError, ValueError):
            raise ValueError(
                "the keys of the dict must be class indices (or its values, with names as keys)"
            ) from None
        if sorted(by_index) != list(range(len(pairs))):
            raise ValueError(f"the {len(pairs)} class indices must be 0 to {len(pairs) - 1}, each once")
        data = [by_index[i] for i in range(len(pairs))]
    if not isinstance(data, list) or not all(isinstance(name, str) for name in data):
        raise ValueError("expected a list of names, or a dict of index and name")
    return [name.strip().strip('"') for name in data]  # PyTorchVideo's file has quotes within the strings


def _progress(err: Console) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("clips"),
        TimeRemainingColumn(),
    )
    # A bar that is redrawn is for eyes; a log file gets the errors only.
    return Progress(*columns, console=err, disable=not err.is_terminal)


def _print_tables(out: Console, results: dict[str, list[dict[str, Any]]]) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    for video, classes in results.items():
        out.print(video, style="bold", soft_wrap=True, markup=False)  # a path is to be copied: never broken
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column("score", justify="right")
        table.add_column("label", overflow="fold")
        for row in classes:
            table.add_row(f"{row['score']:.4f}", escape(row["label"]))
        out.print(table)
