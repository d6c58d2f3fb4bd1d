"""How long kernels take for one request, measured side by side on a call's own data."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from r3d_kernels import _cpu, tuning
from r3d_kernels._kernel import Kernel, Request

__all__ = ["Packs", "corner", "measure", "piece", "synchronize"]

_MOST_UNFOLDED = 16 << 20  # bytes that the stock layers may unfold an input to only to be measured
_SURELY_SLOWER = 1.3  # stock layers measured on a piece and this far behind are out
_MOST_MACS = 16 << 30  # multiply-adds of a CPU layer beyond which all kernels are measured on a part
# Bytes of output beyond which a kernel's memory is given back before the next one runs
_MOST_WAITING = 32 << 20
_BUDGET = 0.1  # seconds of repetitions for one layer, after which no round begins
_THREE_ROUNDS = 0.5  # seconds that the first three rounds may take beyond it: short calls are noisy


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Packs(dict[str, Any]):
    """Packed weights by the kernel's name, each made when it is asked for."""

    def __init__(self, kernels: list[Kernel], packed: Any) -> None:
        super().__init__()
        self._make = {k.name: (packed, k) for k in kernels}

    def __missing__(self, name: str) -> Any:
        packed, kernel = self._make[name]
        return self.setdefault(name, packed(kernel))


def piece(
    x: Tensor, residual: Tensor | None, request: Request
) -> tuple[Request, Tensor, Tensor | None] | None:
    """The first planes alone, where the stock layers' unfolded input (im2col) would be the peak of memory."""
    p = request.problem
    unfolded = p.n * p.c * math.prod(p.kernel) * math.prod(p.out_size) * request.dtype.itemsize
    if request.device.type != "cpu" or unfolded <= _MOST_UNFOLDED:
        return None
    depth = p.d
    while depth > 1 and unfolded * depth > _MOST_UNFOLDED * p.d:
        depth = (depth + 1) // 2
    try:
        part = replace(p, d=depth).validate()
    except ValueError:  # fewer planes than the kernel is deep
        return None
    if part.macs == p.macs:
        return None
    cut = None if residual is None else residual[:, :, : part.out_size[0]]
    return replace(request, problem=part), x[:, :, :depth], cut


def _shortened(
    x: Tensor, residual: Tensor | None, request: Request
) -> tuple[Request, Tensor, Tensor | None] | None:
    """The first clips, then the first planes of one, where the whole would take seconds with each kernel."""
    p = request.problem
    if request.device.type != "cpu" or p.macs <= _MOST_MACS:
        return None
    clips, depth = p.n, p.d
    part = p
    while part.macs > _MOST_MACS and (clips > 1 or depth > 1):
        clips, depth = ((clips + 1) // 2, depth) if clips > 1 else (1, (depth + 1) // 2)
        try:
            part = replace(p, n=clips, d=depth).validate()
        except ValueError:  # fewer planes than the kernel is deep
            break
    if part.macs == p.macs:
        return None
    cut = None if residual is None else residual[: part.n, :, : part.out_size[0]]
    return replace(request, problem=part), x[: part.n, :, : part.d], cut


def corner(
    x: Tensor, residual: Tensor | None, request: Request
) -> tuple[Request, Tensor, Tensor | None, tuple[int, int]]:
    """As little of a large layer as the stock layers take little memory for, to compare results by.

    Returns:
        The first planes and rows, and how many of its output planes and rows the whole has too: the cut ends in
        padding where the whole goes on, so the last ones are others.
    """
    p = request.problem
    whole_unfolded = p.n * p.c * math.prod(p.kernel) * math.prod(p.out_size) * request.dtype.itemsize
    if request.device.type != "cpu" or whole_unfolded <= _MOST_UNFOLDED:
        return request, x, residual, p.out_size[:2]
    # How far the first output's window reaches: at least that much is kept.
    least = [max(1, d * (k - 1) - e + 1) for k, e, d in zip(p.kernel, p.padding, p.dilation, strict=True)]
    size, unfolded = [p.d, p.h], whole_unfolded
    for axis, whole in enumerate((p.d, p.h)):
        while size[axis] > least[axis] and unfolded > _MOST_UNFOLDED:
            size[axis] = max(least[axis], (size[axis] + 1) // 2)
            unfolded = whole_unfolded * size[0] // p.d * size[1] // p.h
        size[axis] = min(size[axis], whole)
    part = replace(p, d=size[0], h=size[1]).validate()
    same = tuple(
        whole_out if cut == whole else min(cut_out, (cut - first) // stride + 1)
        for cut, whole, first, stride, cut_out, whole_out in zip(
            size, (p.d, p.h), least[:2], p.stride[:2], part.out_size[:2], p.out_size[:2], strict=True
        )
    )
    rest = None if residual is None else residual[:, :, : part.out_size[0], : part.out_size[1]]
    return replace(request, problem=part), x[:, :, : size[0], : size[1]], rest, same


def measure(
    kernels: list[Kernel], packs: dict[str, Any], x: Tensor, residual: Tensor | None, request: Request
) -> dict[str, float]:
    """Best seconds of each kernel; the stock layers may be timed on a part and scaled."""
    if request.device.type == "cuda":
        return _race_on_gpu(kernels, packs, x, residual, request)
    if (shorter := _shortened(x, residual, request)) is not None:
        part, x, residual = shorter
        longer = request.problem.macs / part.problem.macs
        return {name: s * longer for name, s in measure(kernels, packs, x, residual, part).items()}
    stock = next((k for k in kernels if k.name == "stock"), None)
    others = [k for k in kernels if k is not stock]
    if stock is None or not others:
        return _race(kernels, packs, x, residual, request)
    # Alone, before the others have packed anything, and on as little as tells enough.
    part, *data = piece(x, residual, request) or (request, x, residual)
    guess = _race([stock], packs, *data, part)["stock"] * request.problem.macs / part.problem.macs
    best = _race(others, packs, x, residual, request)
    if guess > _SURELY_SLOWER * min(best.values()):
        return best | {"stock": guess}
    return _race(kernels, packs, x, residual, request)


_GPU_ROUNDS = 5


def _gpu_seconds(call: Any, count: int, launch: float, device: torch.device) -> float:
    """Seconds of the GPU for one of `count` calls behind one another, whatever their launches cost."""
    with torch.cuda.device(device):
        return tuning.queued_seconds(call, count, launch)


def _race_on_gpu(
    kernels: list[Kernel], packs: dict[str, Any], x: Tensor, residual: Tensor | None, request: Request
) -> dict[str, float]:
    """Best seconds of each kernel by the GPU's own clock, interleaved.

    The first call of each is not counted: libraries set themselves up in it, load their code and try algorithms, which
    may take seconds and says nothing of the calls to come. A kernel that does not find the memory is left out.
    """
    best: dict[str, float] = {}
    calls: dict[str, tuple[Any, int, float]] = {}
    too_large: torch.OutOfMemoryError | None = None
    for kernel in kernels:
        try:
            call = partial(kernel.run, packs[kernel.name], x, residual, request)
            call()
            synchronize(request.device)
            begin = time.perf_counter()
            call()
            launch = time.perf_counter() - begin
            synchronize(request.device)
            took = time.perf_counter() - begin
        except torch.OutOfMemoryError as e:  # others may need less
            too_large = e.with_traceback(None)  # whose frames hold tensors
            torch.cuda.empty_cache()
            continue
        best[kernel.name] = took
        calls[kernel.name] = call, max(1, min(tuning.MOST_CALLS, int(tuning.SAMPLE / took))), launch
    if too_large is not None and not best:
        raise too_large
    # By a clock that counts launches too: only what is slow beyond all doubt is left at that.
    limit = max(_BUDGET, 3 * min(best.values()))
    running = [name for name in calls if best[name] <= limit]
    best |= dict.fromkeys(running, math.inf)
    begin = time.perf_counter()
    for done in range(_GPU_ROUNDS):
        if done >= 2 and (len(running) < 2 or time.perf_counter() - begin > _BUDGET):
            break
        for name in running if done % 2 == 0 else reversed(running):
            best[name] = min(best[name], _gpu_seconds(*calls[name], request.device))
        if done:
            limit = 2 * min(best.values())
            running = [name for name in running if best[name] <= limit]
    return best


def _race(
    kernels: list[Kernel], packs: dict[str, Any], x: Tensor, residual: Tensor | None, request: Request
) -> dict[str, float]:
    """Seconds of each kernel, interleaved: the lower quartile; a kernel that is far behind is not repeated.

    Each runs once, or twice if it may win; what is repeated beyond that ends after _BUDGET, or after three rounds where
    they take less than _THREE_ROUNDS. The best of many calls may be one that found in the caches what it seldom finds
    there, and the median one of a busy moment: three calls give the best, twelve the fourth.
    """

    waits = request.device.type == "cpu" and math.prod(request.problem.out_shape) * 4 > _MOST_WAITING

    def once(kernel: Kernel) -> float:
        if waits:  # what the last one used would add to the peak
            _cpu.release_free_memory()
        synchronize(request.device)
        start = time.perf_counter()
        kernel.run(packs[kernel.name], x, residual, request)
        synchronize(request.device)
        return time.perf_counter() - start

    taken = {k.name: [once(k)] for k in kernels}  # warm-up: page faults, lazy initialisation
    best = {name: times[0] for name, times in taken.items()}
    # One call that took longer than the whole budget, and far longer than others, has told enough.
    hopeless = max(_BUDGET, 3 * min(best.values()))
    running, spent, rounds = [k for k in kernels if best[k.name] <= hopeless], 0.0, 0
    # The winner runs once more in any case: its first call is no measure of the others to come.
    while rounds == 0 or (
        len(running) > 1 and rounds < 12 and (spent < _BUDGET or (rounds < 3 and spent < _THREE_ROUNDS))
    ):
        for k in running:
            t = once(k)
            taken[k.name].append(t)
            best[k.name] = min(best[k.name], t)
            spent += t
        rounds += 1
        # The best of two calls that is this far behind is not noise, even on a busy machine.
        limit = 3 * min(best.values())
        running = [k for k in running if best[k.name] <= limit or rounds < 2]
    return {name: sorted(times)[(len(times) - 1) // 4] for name, times in taken.items()}
