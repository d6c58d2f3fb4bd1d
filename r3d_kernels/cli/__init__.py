"""The command line: `r3d-kernels COMMAND` and `python -m r3d_kernels COMMAND`.

One module a command, listed in `COMMANDS`. A command module has `HELP` (one line), `add_arguments(parser)`
and `run(args) -> int` (the exit code), and imports nothing heavy before `run`.

Exit codes: 0 done; 1 the command ran and its verdict is no (parity failed, the extension does not load); 2 an
error, told in one line on stderr (`R3D_KERNELS_DEBUG=1` gives the traceback instead); 130 interrupted; 141
the reader of the output went away.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn, TextIO

from r3d_kernels._version import __version__
from r3d_kernels.cli.common import PROG, CliError, one_line

__all__ = ["COMMANDS", "main"]

COMMANDS = ("demo", "predict", "verify", "tune", "doctor")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Instead of argparse's usage text and exit: one line, as for every other error."""
        raise CliError(f"{message} (see '{self.prog} --help')")


def _parser() -> _Parser:
    parser = _Parser(prog=PROG, description="Fused 3-D ResNets for video.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    commands = parser.add_subparsers(
        title="commands", dest="command", metavar="COMMAND", required=True, parser_class=_Parser
    )
    for name in COMMANDS:
        module = importlib.import_module(f"{__name__}.{name}")
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; never raises but with `R3D_KERNELS_DEBUG=1`."""
    with _escaping(sys.stderr):
        return _told(argv)


def _told(argv: Sequence[str] | None) -> int:
    """The exit code; errors are told in one line."""
    try:
        with _escaping(sys.stdout):
            code = _run(argv)
        sys.stdout.flush()  # a closed pipe shows here, not in the interpreter's shutdown
        return code
    except BrokenPipeError:
        # Python flushes stdout once more at exit: give it something that takes the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted", file=sys.stderr)
        return 130
    except Exception as e:
        if os.environ.get("R3D_KERNELS_DEBUG", "0") not in ("", "0"):
            raise
        # What users can cause speaks for itself; anything else is named, and where to see more.
        known = isinstance(e, (CliError, ValueError, OSError, ImportError))
        message = (
            one_line(e) if known else f"{type(e).__name__}: {one_line(e)} (R3D_KERNELS_DEBUG=1 shows where)"
        )
        print(f"{PROG}: error: {message}", file=sys.stderr)
        return 2


@contextmanager
def _escaping(stream: TextIO) -> Iterator[None]:
    """What the stream's encoding lacks is written with escapes meanwhile: a file name must not end the command."""
    before = getattr(stream, "errors", None)
    reconfigure = getattr(stream, "reconfigure", None)
    if before != "strict" or reconfigure is None:
        yield
        return
    reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        reconfigure(errors=before)


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = _parser().parse_args(argv)
    except SystemExit as e:  # --help and --version
        return e.code if isinstance(e.code, int) else 0
    return args.run(args)
