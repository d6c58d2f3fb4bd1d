"""What several parts of the GPU report share: what they need, how they time, what this GPU reaches."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpu_sections import Failed, NotHere, progress
from torch import Tensor

from r3d_kernels.ops.conv3d_sm90 import own_counters

__all__ = [
    "FP32_PROMISE",
    "NO_EPS",
    "Seconds",
    "captured",
    "gpu_seconds",
    "largest",
    "on_two_streams",
    "require_op",
    "roofline",
    "timed",
]

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


class Seconds(dict[str, float]):
    """Seconds of one call by its name, and how each was timed: "events" or "graph"."""

    def __init__(self, seconds: dict[str, float], timed: dict[str, str]) -> None:
        super().__init__(seconds)
        self.timed = timed


def timed(seconds: dict[str, float]) -> str | dict[str, str]:
    """How `gpu_seconds` got them, for a row of the report: one word where all have it in common."""
    ways = getattr(seconds, "timed", None) or dict.fromkeys(seconds, "events")
    return ways if len(set(ways.values())) > 1 else next(iter(ways.values()), "events")


_LONGEST_CAPTURED = 2e-3  # seconds of a call, beyond which launches do not matter
_MOST_CAPTURED = 20  # calls in a graph: enough to hide its own launch
_not_captured: list[Any] = []  # graphs whose capture failed; torch may look at them at any later allocation


def captured(call: Callable[[], Any], count: int, pool: Any, stream: Any) -> Any:
    """`count` calls as a CUDA graph; None where they cannot be captured. `call` has been warmed up.

    What each returns is freed within the capture, so that all calls, and all graphs of one pool, share its memory.
    Split sums have counters of the graph's own, as in `GraphedModel`.
    """
    before = torch.cuda.current_stream()
    graph = torch.cuda.CUDAGraph()
    try:
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            call()  # what libraries keep for each stream is not to come from the graph's pool
        before.wait_stream(stream)
        capture = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        with own_counters(torch.cuda.current_device()) as graph.counters, capture:
            for _ in range(count):
                call()
    except Exception as e:
        progress(not_captured=f"{type(e).__name__}: {next(iter(str(e).splitlines()), '')}")
        _clean_up(graph, pool, before)
        return None
    return graph


def _clean_up(graph: Any, pool: Any, stream: Any) -> None:
    """What torch leaves undone where the end of a capture fails: the stream, the pool, a generator that waits."""
    device = torch.cuda.current_device()
    torch.cuda.set_stream(stream)
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
    except RuntimeError:  # the capture has ended well, and only the call in it failed
        return
    except AttributeError:
        pass
    _not_captured.append(graph)
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())  # a clone waits for nothing
    torch.cuda.synchronize()


def gpu_seconds(
    calls: dict[str, Callable[[], Any]], *, rounds: int = 15, sample: float = 5e-3, graphs: bool = False
) -> Seconds:
    """Median seconds of one call, by events, the calls taken in turn.

    Args:
        sample: seconds of calls between two events, so that neither their resolution nor a launch gap matters.
        graphs: whether short calls are replayed as CUDA graphs: the time of the GPU, where the host takes longer to
            launch a call than it runs. A call that cannot be captured is timed as it is.
    """

    def once(run: Callable[[], Any]) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return max(time.perf_counter() - begin, 1e-6)

    runs: dict[str, tuple[Callable[[], Any], int, int]] = {}  # what to run, how often, and calls in it
    ways = dict.fromkeys(calls, "events")
    pool = stream = None
    for name, call in calls.items():
        for _ in range(3):
            call()
        took = once(call)
        runs[name] = call, max(1, min(200, int(sample / took))), 1
        if graphs and took <= _LONGEST_CAPTURED:
            if pool is None:
                pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            inside = max(1, min(_MOST_CAPTURED, int(sample / took)))
            graph = captured(call, inside, pool, stream)
            if graph is None:
                pool = None  # the next one gets another
                continue
            ways[name] = "graph"
            graph.replay()
            runs[name] = graph.replay, max(1, min(200, int(sample / once(graph.replay)))), inside
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for done in range(rounds):
        for name in calls if done % 2 == 0 else reversed(list(calls)):
            run, count, inside = runs[name]
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            run()
            start.record()
            for _ in range(count):
                run()
            end.record()
            end.synchronize()
            seconds[name].append(start.elapsed_time(end) / 1e3 / count / inside)
    return Seconds({name: statistics.median(values) for name, values in seconds.items()}, ways)


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
