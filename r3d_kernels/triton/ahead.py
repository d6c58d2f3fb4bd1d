"""Compiles kernels before their first launch, several at once.

Triton compiles a kernel when it is launched for the first time, one at a time, a second or more each. A call on tensors
without data (`like`) launches nothing: what it would have launched is noted, and compiled by threads. Nine tenths of a
compilation are LLVM's and ptxas', which run without Python's lock. Nothing here touches the GPU: what was compiled is
loaded at its first launch, as ever. Processes that compile the same at once are Triton's affair: its cache on disk is
written aside and renamed.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Job", "compile_all", "like", "note", "noted", "threads"]

_MOST_THREADS = 8  # what is left to Python's lock keeps more of them waiting


@dataclass(frozen=True)
class Job:
    """A kernel to be compiled; equal keys are the same machine code."""

    key: tuple[Any, ...]
    compile: Callable[[], object]
    ready: Callable[[], object] = lambda: None  # what must not happen in two threads at once; quick


_jobs: ContextVar[list[Job] | None] = ContextVar("r3d_kernels_triton_jobs", default=None)


@contextmanager
def noted() -> Iterator[list[Job]]:
    """What calls on tensors of `like` would launch inside this block, in this thread."""
    jobs: list[Job] = []
    token = _jobs.set(jobs)
    try:
        yield jobs
    finally:
        _jobs.reset(token)


def note(job: Job) -> None:
    """Adds a job to the block's; outside of one nothing may be launched without data."""
    jobs = _jobs.get()
    if jobs is None:
        raise RuntimeError("a Triton kernel was called on tensors without data")
    jobs.append(job)


def like(t: Tensor | None) -> Tensor | None:
    """A tensor without data for which Triton compiles the same code: the address, too, is a multiple of 16 or not."""
    if t is None:
        return None
    size = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    base = torch.empty(size + 1, dtype=t.dtype, device="meta")
    return base.as_strided(t.shape, t.stride(), int(t.data_ptr() % 16 != 0))


def threads() -> int:
    """How many kernels are compiled at once."""
    try:
        able = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        able = os.cpu_count() or 1
    return min(able, _MOST_THREADS)


def compile_all(
    jobs: Iterable[Job],
    device: torch.device,
    seconds: float = float("inf"),
    done: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[tuple[Any, ...], Exception | None]:
    """Compiles every job once, in order, for as long as there is time; what was begun is finished.

    Args:
        jobs: from `noted`.
        device: what is compiled is for it.
        seconds: after which no job is begun.
        done: is called by the calling thread after each job.

    Returns:
        By the key of a job: None, or why it does not compile. What was not begun is missing.
    """
    end = clock() + seconds
    unique: dict[tuple[Any, ...], Job] = {}
    for job in jobs:
        unique.setdefault(job.key, job)

    alone = threading.Lock()

    def begin() -> None:
        # The current device is each thread's own, and Triton compiles for the current one.
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with alone:
            for job in unique.values():
                job.ready()

    def run(job: Job) -> tuple[bool, Exception | None]:
        if clock() > end:
            return False, None
        try:
            job.compile()
        except Exception as e:  # whatever the compiler says: the other jobs still count
            return True, e.with_traceback(None)
        return True, None

    found: dict[tuple[Any, ...], Exception | None] = {}
    pool = ThreadPoolExecutor(max(1, min(threads(), len(unique))), "r3d_kernels_triton", begin)
    try:
        futures = [(key, pool.submit(run, job)) for key, job in unique.items()]
        for key, future in futures:
            begun, error = future.result()
            if begun:
                found[key] = error
            done()
    finally:
        pool.shutdown(cancel_futures=True)  # no thread is left, which a fork would lose
    lost = [key for key, error in found.items() if _is_parsers(error)]
    if lost:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            for key in lost:
                begun, error = run(unique[key])
                if begun:
                    found[key] = error
                else:
                    del found[key]
    return found


def _is_parsers(error: BaseException | None) -> bool:
    """Whether Python's parser failed, and not the compiler.

    Threads share one count of its depth: a collection of garbage in the middle of `ast.parse` that lets another thread
    parse ends in a SystemError (github.com/python/cpython/issues/106905). Alone it does not happen.
    """
    while error is not None and not isinstance(error, SystemError):
        error = error.__cause__
    return error is not None
