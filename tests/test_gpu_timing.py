"""How the benchmarks time what they compare, on a CPU and on a GPU that is none."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from clock import Clock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import gpu_common
import measure

# ---- measure.py ----


def test_interleave() -> None:
    clock = Clock()
    calls: list[str] = []

    def engine(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            calls.append(name)
            clock.now += seconds

        return run

    engines = {"quick": engine("q", 0.125), "slow": engine("s", 1.0)}
    times = measure.interleave(engines, rounds=4, clock=clock)
    # Two untimed calls each; then each round has an untimed and a timed quick one, and one slow one.
    assert "".join(calls) == "qqss" + "qqs" + "sqq" + "qqs" + "sqq"
    assert times["quick"].seconds == [0.125] * 4
    assert times["slow"].summary() == {
        "median_ms": 1000.0,
        "min_ms": 1000.0,
        "p25_ms": 1000.0,
        "p75_ms": 1000.0,
        "rounds": 4,
    }
    assert len(measure.interleave(engines, rounds=100, seconds=1.0, clock=clock)["slow"].seconds) == 3
    calls.clear()
    measure.interleave(engines, rounds=2, clock=clock, between=lambda: calls.append("."))
    assert "".join(calls) == "qqss" + ".q.s" + ".s.q"


def test_write_json_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "a.json"
    measure.write_json(path, {"a": [1.5, math.inf, None], 2: (True,)})
    assert json.loads(path.read_text()) == {"a": [1.5, "inf", None], "2": [True]}
    with pytest.raises(TypeError):
        measure.write_json(path, {"a": object()})
    assert json.loads(path.read_text())["2"] == [True]
    assert list(path.parent.iterdir()) == [path]


def test_calibrate() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv3d(1, 8, (3, 15, 15), stride=(4, 16, 16)), torch.nn.BatchNorm3d(8), torch.nn.ReLU()
    )
    norm = measure.calibrate(model)[1]
    assert not model.training
    assert norm.momentum == 0.1
    assert norm.running_mean.abs().max() > 0
    assert norm.weight.std() > 0.1
    assert 0.3 < model[:2](measure.clip(1, seed=5, channels=1)).std() < 3


def test_memory_of_a_forward() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc/self/clear_refs here")
    size = 64 * 2**20
    found = measure.forward_memory(lambda: torch.ones(size, dtype=torch.uint8).max(), repetitions=3)
    assert 60 < found["extra_mib"] < 120
    assert found["steady_mib"] <= found["lifetime_mib"]
    nothing = measure.forward_memory(lambda: None, repetitions=3)
    assert nothing["extra_mib"] < 20


def test_machine() -> None:
    about = measure.machine()
    assert about["threads"] == torch.get_num_threads()
    assert about["versions"]["torch"]
    json.dumps(about)


class FakeGpu:
    """Events, streams and graphs that tell what their calls would have taken."""

    def __init__(self, monkeypatch, host: float = 3e-5) -> None:
        self.host, self.now, self.wall = host, 0.0, 0.0
        self.capturing: list[float] | None = None
        self.streams = ["default"]
        self.ended: list[object] = []
        self.replays = self.broken = 0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = gpu.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Event) -> float:
                return 1e3 * (end.at - self.at)

        class Stream:
            def wait_stream(self, other: object) -> None:
                pass

        class Graph:
            def __init__(self) -> None:
                self.work: list[float] = []

            def replay(self) -> None:
                gpu.replays += 1
                gpu.spend(1e-5, sum(self.work))

        class Stack:
            """Both `torch.cuda.stream` and `torch.cuda.graph`, which ends in an error where a call broke it."""

            def __init__(self, what: Any, stream: Any = None, **kwargs: Any) -> None:
                self.graph = what if stream is not None else None
                self.stream = stream or what

            def __enter__(self) -> None:
                gpu.streams.append(self.stream)
                if self.graph is not None:
                    gpu.capturing = self.graph.work

            def __exit__(self, *exc: Any) -> None:
                if self.graph is not None:
                    gpu.capturing = None
                    if gpu.broken:
                        raise RuntimeError("operation failed due to a previous error during capture")
                gpu.streams.pop()

        def set_stream(stream: Any) -> None:
            gpu.streams[-1] = stream

        def end(device: int, pool: object) -> None:
            if not gpu.broken:
                raise RuntimeError("not currently recording")
            gpu.broken = 0
            gpu.ended.append(pool)

        generator = SimpleNamespace(clone_state=lambda: None, graphsafe_set_state=self.ended.append)
        fakes = {
            "Event": Event,
            "Stream": Stream,
            "CUDAGraph": Graph,
            "graph": Stack,
            "stream": Stack,
            "set_stream": set_stream,
            "current_stream": lambda: self.streams[-1] if len(self.streams) > 1 else Stream(),
            "current_device": lambda: 0,
            "get_device_capability": lambda device: (8, 0),
            "graph_pool_handle": object,
            "synchronize": lambda: None,
            "default_generators": [generator],
            "_sleep": lambda cycles: None,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *args: None, raising=False)
        monkeypatch.setattr(gpu_common.time, "perf_counter", lambda: self.wall)
        monkeypatch.setattr(gpu_common, "_not_captured", [])

    def spend(self, host: float, gpu: float) -> None:
        self.wall += host + gpu
        self.now += max(host, gpu)

    def call(self, seconds: float, breaks: bool = False) -> Callable[[], None]:
        def run() -> None:
            if self.capturing is None:
                self.spend(self.host, seconds)
            elif breaks:
                self.broken = 1
                raise RuntimeError("operation not permitted when stream is capturing")
            else:
                self.capturing.append(seconds)

        return run


def test_short_calls_are_replayed_as_graphs(monkeypatch) -> None:
    gpu = FakeGpu(monkeypatch)
    calls = {"small": gpu.call(4e-6), "large": gpu.call(5e-3)}
    eager = gpu_common.gpu_seconds(calls)
    assert eager["small"] == pytest.approx(gpu.host)  # what the host takes to launch it
    assert gpu_common.timed(eager) == "events"
    assert not gpu.replays
    found = gpu_common.gpu_seconds(calls, graphs=True)
    assert found == pytest.approx({"small": 4e-6, "large": 5e-3})
    assert found.timed == gpu_common.timed(found) == {"small": "graph", "large": "events"}
    assert gpu_common.timed(gpu_common.gpu_seconds({"small": calls["small"]}, graphs=True)) == "graph"
    assert gpu_common.timed({"a": 1.0}) == "events"


def test_what_cannot_be_captured_is_timed_as_it_is(monkeypatch) -> None:
    gpu = FakeGpu(monkeypatch)
    calls = {"a": gpu.call(4e-6), "waits": gpu.call(5e-6, breaks=True), "b": gpu.call(6e-6)}
    found = gpu_common.gpu_seconds(calls, graphs=True)
    assert found == pytest.approx({"a": 4e-6, "waits": gpu.host, "b": 6e-6})
    assert found.timed == {"a": "graph", "waits": "events", "b": "graph"}
    assert len(gpu_common._not_captured) == 1  # torch may still look at it
    assert len(gpu.ended) == 2  # the pool and the generator
    assert (
        len(gpu.streams) == 2
    )  # set back to the first, which the failed end of the capture left on the stack

    def fails() -> None:
        if gpu.capturing is not None:
            raise ValueError("of its own")
        gpu.call(4e-6)()

    assert gpu_common.gpu_seconds({"fails": fails}, graphs=True).timed == {"fails": "events"}
    assert len(gpu_common._not_captured) == 1  # this capture has ended well
