"""compute-sanitizer over small calls of every CUDA kernel, in the GPU report."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpu_sm80
import gpu_sm90
import gpu_stem
import torch
from gpu_bn_act import CHANNELS, epilogue
from gpu_common import require_op
from gpu_sections import Failed, NotHere, progress

from r3d_kernels.problems import ConvProblem

__all__ = ["sanitize", "sanitizer_child", "sanitizer_path"]


def sanitizer_path() -> str | None:
    from torch.utils.cpp_extension import CUDA_HOME

    candidates = [shutil.which("compute-sanitizer")]
    if CUDA_HOME:
        candidates.append(shutil.which("compute-sanitizer", path=os.path.join(CUDA_HOME, "bin")))
    return next((path for path in candidates if path), None)


def sanitize(left: Callable[[], float]) -> dict[str, Any]:
    """memcheck, racecheck and synccheck over small calls, each in a process of its own and a share of the time."""
    require_op()
    from r3d_kernels import backends

    tool = sanitizer_path()
    if tool is None:
        raise NotHere("compute-sanitizer is not installed")
    here = {k.name for k in backends.KERNELS}  # less what has broken the GPU before
    without = [f"--without={name}" for name in ("wgmma", "sm80") if name not in here]
    checks = ("memcheck", "racecheck", "synccheck")
    results: dict[str, str] = {}
    for i, check in enumerate(checks):
        # Libraries ask the driver for functions that it may not have: no error of a kernel of ours, and only those
        # are watched, or there would not be time for them.
        options = ["--error-exitcode=9", "--report-api-errors=no", "--kernel-name=kns=r3d"]
        child = [
            sys.executable,
            str(Path(__file__).resolve().with_name("gpu_report.py")),
            "--sanitizer-child",
            *without,
        ]
        results[check] = _sanitized(
            [tool, f"--tool={check}", *options, *child], (left() - 3) / (len(checks) - i)
        )
        progress(**results)
    bad = {check: said for check, said in results.items() if said.startswith("exit code")}
    if bad:
        raise Failed("; ".join(f"{check}: {said}" for check, said in bad.items()), results)
    return results


def _sanitized(command: Sequence[str], seconds: float) -> str:
    """What came of a command that may take so long; it is ended with all that it has started."""
    if seconds <= 1:
        return "not measured: no time was left"
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # an allocation for each tensor: in torch's blocks, its neighbour is no end of memory
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    try:
        said, _ = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not measured: took longer than {seconds:.0f} s"
    finally:
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if child.returncode == 0:
        return "clean"
    told = [line.strip("= ") for line in said.splitlines() if "=========" in line]
    return f"exit code {child.returncode}: " + " ".join(told[:4] + told[-1:])


def sanitizer_child(without: Sequence[str] = ()) -> int:
    """What compute-sanitizer watches: sizes with tails in every dimension."""
    require_op()
    with contextlib.suppress(NotHere):
        if "wgmma" in without:
            raise NotHere
        gpu_sm90.require_sm90()
        for text in gpu_sm90.CORNERS[:-2]:
            w = gpu_sm90.work(ConvProblem.parse(text), torch.bfloat16)
            w.ours()
            w.dense().ours()  # copied first where channels are no multiple of 8
        for tile in range(len(gpu_sm90.TILES)):
            gpu_sm90.work(ConvProblem.parse(gpu_sm90.EVERY_TILE[0]), torch.float16).ours(1 << tile, 2)
        gpu_stem.small_calls()
    if "sm80" not in without:
        gpu_sm80.small_calls()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for channels in CHANNELS:
            for residual in (False, True):
                epilogue((1, channels, 2, 3, 5), dtype, residual=residual).ours()
    torch.cuda.synchronize()
    return 0
