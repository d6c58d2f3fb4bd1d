"""What the commands share: errors, output, arguments, the network of `--arch` and `--weights`."""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r3d_kernels._cpu import cpu_model

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from torch import nn

PROG = "r3d-kernels"
EXTRA = "pip install 'r3d-kernels[demo]'"
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


class CliError(Exception):
    """Something the user can put right, told in one line. Exit code 2."""


def one_line(error: BaseException | str) -> str:
    """The message without line breaks, so that every error is one line on stderr."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror.lower()}"
    return " ".join(str(error).split()) or type(error).__name__


def console(*, stderr: bool = False) -> Console:
    """A rich console for stdout or stderr, that lets `main` handle a closed pipe."""
    try:
        from rich.console import Console
    except ImportError as e:
        raise CliError(f"this command needs rich ({e}): {EXTRA}") from e

    class PipeAware(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    out = PipeAware(stderr=stderr, highlight=False)
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out.width = 120  # rich's 80 for a file or a pipe breaks the lines of wide tables
    return out


# -- arguments ---------------------------------------------------------------------------------------------


MOST = 1 << 16  # frames, pixels along a side, clips at once
MOST_THREADS = 1024
MOST_COUNTED = 1_000_000  # of what takes no memory


def whole(most: int) -> Callable[[str], int]:
    """The argparse type of a whole number from 1 to `most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = 0
        if not 1 <= value <= most:
            shown = text if len(text) <= 40 else f"{text[:37]}..."
            raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {most}, got {shown!r}")
        return value

    return parse


positive = whole(MOST)


def check_clips(batch: int, channels: int, frames: int, size: int) -> None:
    """Fails before memory is taken, not by taking all of it, where the clips alone are more than there is."""
    from r3d_kernels.video import physical_memory

    needed, there = 4 * batch * channels * frames * size * size, physical_memory()
    if needed > there:
        raise CliError(
            f"--batch {batch} --frames {frames} --size {size}: clips of {needed / 2**30:.1f} GiB in float32, "
            f"this machine has {there / 2**30:.1f} GiB of memory"
        )


def printable(text: str) -> str:
    """A file name for people: bytes that are no UTF-8 as escapes."""
    return text.encode(errors="backslashreplace").decode()


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments on how to compute that `demo` and `predict` have in common."""
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), default="fp32", help="of weights and input (default fp32)"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda", "auto"), default="auto", help="auto: a GPU if there is one"
    )
    parser.add_argument(
        "--threads", type=whole(MOST_THREADS), metavar="N", help="CPU threads (default: torch's own choice)"
    )


def pick_device(name: str) -> torch.device:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        built = "was built without CUDA" if torch.version.cuda is None else "finds no usable GPU"
        raise CliError(f"--device cuda: torch {torch.__version__} {built}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Runs the body with `count` CPU threads (None: as it is) and puts the old number back."""
    import torch

    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- networks ----------------------------------------------------------------------------------------------


def check_arch(name: str) -> str:
    """The name, or a CliError with the names that look like it."""
    from r3d_kernels.models import list_models

    names = list(list_models())
    if name in names:
        return name
    close = difflib.get_close_matches(name.lower().replace("-", "_"), names, n=4, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"there are: {', '.join(names)}"
    raise CliError(f"unknown network {name!r}: {hint}")


def check_model_arguments(arch: str | None, weights: str | None) -> None:
    """What can be said of `--arch` and `--weights` before anything is computed."""
    if arch is not None:
        check_arch(arch)
    if weights is not None and not os.path.isfile(weights):
        raise CliError(f"--weights {weights}: {'not a file' if os.path.exists(weights) else 'no such file'}")


def build_model(arch: str | None, weights: str | None, *, seed: int = 0) -> nn.Module:
    """A stock (not fused) float32 network on the CPU, in eval mode.

    Without weights: random ones from `seed`. With weights and no arch: whatever network the checkpoint is of.
    """
    import torch

    from r3d_kernels.models import create_model, load_checkpoint

    if weights is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return create_model(arch).eval()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* NaN or infinity")  # `notes` has it
            model = load_checkpoint(None, weights) if arch is None else create_model(arch, weights=weights)
    except Exception as e:  # torch.load has no common base for "this is not a checkpoint"
        if os.environ.get("R3D_KERNELS_DEBUG", "0") not in ("", "0"):
            raise
        raise CliError(f"--weights {weights}: {one_line(e)}") from e
    return model.eval()


def notes(model: nn.Module) -> list[str]:
    """What was remarkable about the checkpoint that the model was loaded from, one line each."""
    return [one_line(note) for note in getattr(getattr(model, "loaded_from", None), "notes", ())]


def set_fused(model: nn.Module, fused: bool) -> nn.Module:
    model.fused = fused
    return model


# -- output files ------------------------------------------------------------------------------------------


def check_writable(option: str, path: str) -> None:
    """Fails before the long computation, not after it, where `path` cannot be written."""
    folder = os.path.dirname(os.path.abspath(path))
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as e:  # a name that is too long, say
        raise CliError(f"{option} {path}: {(e.strerror or str(e)).lower()}") from e
    if os.path.isdir(path):
        raise CliError(f"{option} {path}: is a directory")
    if not os.path.isdir(folder):
        raise CliError(f"{option} {path}: there is no directory {folder}")
    if not os.access(folder if not os.path.exists(path) else path, os.W_OK):
        raise CliError(f"{option} {path}: no permission to write there")


def json_text(report: dict[str, Any], encoding: str = "utf-8") -> str:
    """Valid JSON that `encoding` can hold: null for NaN and infinity, which JSON lacks, and a note on where.

    A file name that is no UTF-8 is written with escapes ("\\udcff"), which `json.loads` takes back.
    """
    lost: list[str] = []

    def plain(value: Any, place: str) -> Any:
        if isinstance(value, dict):
            return {str(k): plain(v, f"{place}.{k}" if place else str(k)) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v, f"{place}[{i}]") for i, v in enumerate(value)]
        if isinstance(value, float) and not math.isfinite(value):
            lost.append(f"{place} is {value}, written as null")
            return None
        return value

    data = plain(report, "")
    if lost:
        more = [f"and {len(lost) - 20} more"] if len(lost) > 20 else []
        data["notes"] = [*data.get("notes", []), *lost[:20], *more]
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    text = re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):  # a terminal that knows less
        text = json.dumps(data, indent=2, allow_nan=False) + "\n"
    return text


def write_json(path: str, report: dict[str, Any]) -> None:
    """Writes a report to a file, or to stdout for '-'."""
    if path == "-":
        sys.stdout.write(json_text(report, getattr(sys.stdout, "encoding", None) or "ascii"))
        return
    text = json_text(report)
    try:
        write_atomically(path, text.encode())
    except OSError as e:  # a full disk, a folder that went meanwhile: what was computed is not to be lost
        sys.stdout.write(json_text(report, getattr(sys.stdout, "encoding", None) or "ascii"))
        raise CliError(
            f"--json {path}: {(e.strerror or str(e)).lower()}; the JSON is on stdout instead"
        ) from e


def write_atomically(path: str, data: bytes) -> None:
    """Writes the file aside and moves it into place, so that nobody ever sees half of it."""
    target = Path(path)
    if target.exists() and not target.is_file():  # /dev/null, a pipe: to be written, never to be replaced
        target.write_bytes(data)
        return
    target = Path(os.path.realpath(target))  # through a link, not over it
    # Not the whole name: it may be as long as names can be.
    aside = target.with_name(f".{target.name[:40]}.{os.getpid()}.tmp")
    try:
        aside.write_bytes(data)
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def backend_rows(model: nn.Module) -> list[dict[str, Any]]:
    """What `backends.explain` says of every fused layer that has run, as plain dicts."""
    from r3d_kernels import backends

    fields = ("layer", "problem", "backend", "kernel", "reason")
    return [
        {
            **{name: str(getattr(record, name, "") or "") for name in fields},
            "timings": dict(record.timings or {}),
        }
        for record in backends.explain(model)
    ]


def device_name(device: torch.device) -> str:
    """A GPU's name, or the CPU's with the number of threads in use."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    return f"{cpu_model()}, {count} thread{'s' if count != 1 else ''}"


def require_extra(*modules: str) -> None:
    """Fails at once, not after a minute of computing, where a package of the `demo` extra is missing."""
    try:
        for name in modules:
            importlib.import_module(name)
    except ImportError as e:
        raise CliError(f"this command needs {name}, which cannot be imported ({one_line(e)}): {EXTRA}") from e
