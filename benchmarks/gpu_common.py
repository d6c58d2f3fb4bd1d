"""What several parts of the GPU report share: what they need, how they time, what this GPU reaches."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpu_sections import Failed, NotHere
from torch import Tensor

__all__ = ["FP32_PROMISE", "NO_EPS", "gpu_seconds", "largest", "on_two_streams", "require_op", "roofline"]

FP32_PROMISE = 5e-6  # relative L2 error of one operation against float64
NO_EPS = 1e-12  # of a batch norm of variance 1: lost in float32; some versions of torch refuse 0


def require_op() -> None:
    """The compiled package with its CUDA kernel, or NotHere."""
    try:
        import r3d_kernels.ops  # noqa: F401 - registers the operations

        torch.ops.r3d_kernels.bn_act  # noqa: B018 - raises where it is not registered
    except (ImportError, AttributeError) as e:
        raise NotHere(f"r3d_kernels::bn_act is not compiled in: {e}") from e


def largest(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The largest error of each dtype."""
    largest: dict[str, float] = {}
    for row in rows:
        largest[row["dtype"]] = max(largest.get(row["dtype"], 0.0), row["error"])
    return largest


def on_two_streams(calls: Sequence[Callable[[], Tensor]], count: int = 50) -> dict[str, Any]:
    expected = [call() for call in calls]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    results: list[list[Tensor]] = [[] for _ in calls]
    for _ in range(count):
        for call, stream, outputs in zip(calls, streams, results, strict=True):
            with torch.cuda.stream(stream):
                outputs.append(call())
    torch.cuda.synchronize()
    for i, outputs in enumerate(results):
        if not all(torch.equal(y, expected[i]) for y in outputs):
            raise Failed(f"stream {i} gives another result than the default stream")
    return {"calls": len(calls) * count}


def gpu_seconds(
    calls: dict[str, Callable[[], Any]], *, rounds: int = 15, sample: float = 5e-3
) -> dict[str, float]:
    """Median seconds of one call, by events, the calls taken in turn.

    `sample`: seconds of calls between two events, so that neither their resolution nor a launch gap matters.
    """
    counts = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        counts[name] = max(1, min(200, int(sample / max(time.perf_counter() - begin, 1e-6))))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for done in range(rounds):
        for name in calls if done % 2 == 0 else reversed(list(calls)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            calls[name]()
            start.record()
            for _ in range(counts[name]):
                calls[name]()
            end.record()
            end.synchronize()
            seconds[name].append(start.elapsed_time(end) / 1e3 / counts[name])
    return {name: statistics.median(values) for name, values in seconds.items()}


@functools.cache
def roofline() -> dict[str, Any]:
    """What this GPU reaches now: the copy of a large tensor, and large matrix products."""
    source = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source)}
    size = 8192
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        a = torch.randn(size, size, device="cuda", dtype=dtype)
        calls[name] = functools.partial(torch.mm, a, a)
    single = torch.randn(4096, 4096, device="cuda")

    def float32(tf32: bool) -> None:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            torch.mm(single, single)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    calls["float32"] = functools.partial(float32, False)
    calls["tf32"] = functools.partial(float32, True)
    seconds = gpu_seconds(calls, rounds=9)
    tflops = {
        name: 2 * (4096 if name in ("float32", "tf32") else size) ** 3 / seconds[name] / 1e12
        for name in calls
        if name != "copy"
    }
    copied = 2 * source.numel()  # read and written
    return {
        "copy_gbyte_per_s": round(copied / seconds["copy"] / 1e9, 1),
        "matmul_tflop_per_s": {name: round(value, 1) for name, value in tflops.items()},
    }
