"""Choosing a kernel: predicates, the backend context, measurement and its cache."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

import r3d_kernels as r3d
from r3d_kernels import _layer, _race, backends, tuning
from r3d_kernels.ops import conv3d_sm90
from r3d_kernels.problems import ConvProblem

P = ConvProblem.parse("n1c8d3h6w6k16f3p1+res+relu")


def request_for(
    text: str = str(P), dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> backends.Request:
    return backends.Request(ConvProblem.parse(text), dtype, torch.device(device), 2)


def names(request: backends.Request, asked: str = "auto") -> list[str]:
    return [k.name for k in backends.candidates(request, asked)[0]]


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Tuning switched on, with an empty cache of its own."""
    monkeypatch.setenv("R3D_KERNELS_TUNE", "1")
    monkeypatch.setenv("R3D_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "shared", tuning.TuningCache())
    return tmp_path / "tuning-v1.json"


def layer() -> r3d.ConvBNAct3d:
    return r3d.ConvBNAct3d(P.c, P.k, P.kernel, P.stride, P.padding).eval()


def run(module: r3d.ConvBNAct3d) -> backends.Record:
    t = P.tensors()
    with torch.inference_mode():
        module(t.x, t.residual)
    return backends.explain(module)[-1]


# ---- predicates ----


def test_stock_takes_everything_and_is_always_a_candidate() -> None:
    for text in (str(P), "n0c4d3h3w3k4f1", "n1c4d3h3w3k4f1g4"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for device in ("cpu", "cuda"):
                assert "stock" in names(request_for(text, dtype, device))


@pytest.mark.parametrize(
    ("text", "dtype", "device", "kernel", "message"),
    [
        ("n1c4d3h3w3k4f1g4", torch.float32, "cpu", "direct", "groups=1 only, got 4"),
        (str(P), torch.float16, "cpu", "direct", "float32 and bfloat16 only, got torch.float16"),
        (str(P), torch.float32, "cuda", "direct", "needs a CPU tensor, got cuda"),
        (str(P), torch.float64, "cpu", "oneDNN", "float32 and bfloat16 only, got torch.float64"),
        ("n0c4d3h3w3k4f1", torch.float32, "cpu", "oneDNN", "the batch is empty"),
        ("n1c4d3h3w3k4f1g4+res", torch.float32, "cpu", "oneDNN", "residual into a grouped convolution"),
        (str(P), torch.float32, "cpu", "cuDNN + bn_act", "needs a CUDA tensor, got cpu"),
    ],
)
def test_predicates_say_why_not(
    text: str, dtype: torch.dtype, device: str, kernel: str, message: str
) -> None:
    _, reasons = backends.candidates(request_for(text, dtype, device))
    assert message in reasons[kernel]


def test_a_known_wrong_result_of_onednn_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setenv("R3D_KERNELS_MEMORY", "fast")  # large weights are not copied for oneDNN otherwise
    _, reasons = backends.candidates(request_for("n1c8d3h6w2k16f3s2p1", torch.bfloat16))
    assert "pytorch#169688" in reasons["oneDNN"]
    for unsafe in ("n1c8d9h9w9k16f3p1l2", "n1c8d1h6w7k16f3x1x4s3x2x3p2x0x1"):
        assert "pytorch#169688" in backends.candidates(request_for(unsafe, torch.bfloat16))[1]["oneDNN"]
    for safe in ("n1c8d3h6w8k16f3s2p1", "n1c512d1h4w4k512f3p1+relu"):
        assert "oneDNN" not in backends.candidates(request_for(safe, torch.bfloat16))[1]


def test_stock_computes_what_torch_would_corrupt(monkeypatch) -> None:
    """Such bfloat16 convolutions go through float32: torch's own would write out of bounds."""
    p = ConvProblem.parse("n2c6d9h9w9k4f3p1l2g2+res+relu")
    assert p.torch_bf16_is_unsafe()
    t, real = p.tensors(torch.bfloat16), torch.nn.functional.conv3d

    def watched(x: torch.Tensor, *args) -> torch.Tensor:
        assert x.dtype != torch.bfloat16
        return real(x, *args)

    monkeypatch.setattr(torch.nn.functional, "conv3d", watched)
    module = r3d.ConvBNAct3d(p.c, p.k, 3, padding=1, dilation=2, groups=2, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        y = module(t.x, t.residual)
    assert torch.isfinite(y).all()


# ---- asking for a backend ----


def test_context_nests_and_wins_over_the_variable(monkeypatch) -> None:
    assert backends.current_backend() == "auto"
    monkeypatch.setenv("R3D_KERNELS_BACKEND", "torch")
    assert backends.current_backend() == "torch"
    with r3d.backend("cpu"):
        assert backends.current_backend() == "cpu"
        with r3d.backend("auto"):
            assert backends.current_backend() == "auto"
        assert backends.current_backend() == "cpu"
    assert backends.current_backend() == "torch"
    monkeypatch.setenv("R3D_KERNELS_BACKEND", "gpu")
    with pytest.raises(ValueError, match=r"R3D_KERNELS_BACKEND: expected one of 'auto', 'cpu'.*got 'gpu'"):
        backends.current_backend()
    with pytest.raises(ValueError, match="backend: expected one of"):
        r3d.backend("mkldnn")


def test_context_is_left_by_exceptions_and_is_of_one_thread() -> None:
    with pytest.raises(KeyError), r3d.backend("cpu"):
        raise KeyError
    assert backends.current_backend() == "auto"
    seen: list[str] = []
    with r3d.backend("cpu"):
        t = threading.Thread(target=lambda: seen.append(backends.current_backend()))
        t.start()
        t.join()
    assert seen == ["auto"]

    @r3d.backend("torch")
    def decorated() -> str:
        return backends.current_backend()

    assert decorated() == "torch"


def test_a_decorated_function_runs_in_many_threads() -> None:
    inside, failures = threading.Barrier(4, timeout=30), []

    @r3d.backend("cpu")
    def work() -> None:
        inside.wait()  # all have entered before any leaves
        assert backends.current_backend() == "cpu"

    def run_it() -> None:
        try:
            work()
            assert backends.current_backend() == "auto"
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=run_it) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


@pytest.mark.parametrize(
    ("asked", "expected"), [("cpu", "cpu"), ("torch", "torch"), ("triton", "torch"), ("cuda", "torch")]
)
def test_what_runs_when_asked(asked: str, expected: str) -> None:
    with r3d.backend(asked):
        record = run(layer())
    assert record.backend == expected
    assert f"backend {asked!r}" in record.reason or "R3D_KERNELS_TUNE=0" in record.reason


def test_a_private_kernel_that_fails_is_not_chosen(monkeypatch) -> None:
    def fails(self, *args) -> None:
        raise RuntimeError("changed in torch 9\nlong story")

    monkeypatch.setattr(backends.OneDnn, "run", fails)
    with r3d.backend("torch"):
        record = run(layer())
    assert record.kernel == "stock"
    assert "oneDNN: failed: changed in torch 9" in record.reason


def test_of_private_kernels_only_the_one_that_won_before_is_tried(measured, monkeypatch) -> None:
    request, tried = request_for(), []

    class Private:
        backend, private = "torch", True

        def __init__(self, name: str) -> None:
            self.name = name

    one, other = Private("one"), Private("other")
    stock = next(k for k in backends.KERNELS if k.name == "stock")
    seconds = {"one": 2e-3, "other": 1e-3, "stock": 3e-3}
    monkeypatch.setattr(backends, "candidates", lambda *args: ([one, other, stock], {}))
    monkeypatch.setattr(backends, "measure", lambda able, *_: {k.name: seconds[k.name] for k in able})
    wrong: dict[str, str] = {}
    monkeypatch.setattr(
        backends, "_fails", lambda kernel, *_: tried.append(kernel.name) or wrong.get(kernel.name)
    )

    def choose() -> str:
        tried.clear()
        return backends.choose(request, "auto", lambda kernel: None, None, None).kernel.name

    assert choose() == "other"
    assert tried == ["one", "other"]
    assert choose() == "other"  # as in another process
    assert tried == ["other"]
    wrong["other"] = "its result is far from the stock layers'"
    assert choose() == "one"
    assert tried == ["other", "one"]


# ---- measuring ----


def test_measures_once_and_remembers(measured, monkeypatch) -> None:
    monkeypatch.setattr(backends, "_CLOSE", 0.0)
    first = run(layer())
    assert first.reason.startswith("measured: ")
    assert {"direct", "stock"} <= set(first.timings)
    assert min(first.timings.values()) > 0
    data = json.loads(measured.read_text())
    ((machine, entries),) = data["machines"].items()
    assert torch.__version__ in machine
    assert list(entries) == [f"{P} float32"]

    monkeypatch.setattr(tuning, "shared", tuning.TuningCache())  # a new process
    monkeypatch.setattr(backends, "measure", lambda *a: pytest.fail("measured again"))
    again = run(layer())
    assert again.reason.startswith("measured earlier")
    assert again.kernel == first.kernel


def test_the_fastest_wins(measured, monkeypatch) -> None:
    able = names(request_for())
    for winner in able:
        times = {name: 1.0 if name == winner else 2.0 for name in able}
        monkeypatch.setattr(tuning, "shared", tuning.TuningCache())
        measured.unlink(missing_ok=True)
        monkeypatch.setattr(backends, "measure", lambda *a, times=times: times)
        assert run(layer()).kernel.startswith(winner)
    # within the noise the preferred one is kept
    monkeypatch.setattr(tuning, "shared", tuning.TuningCache())
    measured.unlink()
    monkeypatch.setattr(backends, "measure", lambda *a: {n: 1.0 - 0.002 * i for i, n in enumerate(able)})
    record = run(layer())
    assert record.kernel.startswith(able[0])
    assert record.reason.startswith("measured: preferred, within 3 % of ")


class Watch:
    """What is measured, in how long, and what time it is."""

    def __init__(self, monkeypatch, **seconds: float) -> None:
        self.seconds, self.now, self.measured = seconds, 1e6, []
        monkeypatch.setattr(backends, "measure", self.measure)
        monkeypatch.setattr(backends.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(backends, "_looked", {})

    def measure(self, kernels, *args) -> dict[str, float]:
        self.measured.append([k.name for k in kernels])
        return {k.name: self.seconds.get(k.name, 9.0) for k in kernels}


def test_close_rivals_are_measured_again_when_the_machine_may_have_calmed_down(measured, monkeypatch) -> None:
    able = names(request_for())
    watch = Watch(monkeypatch, direct=1.25, stock=1.0)
    module, same = layer(), layer()
    assert run(module).kernel == "stock"
    assert run(same).kernel == "stock"
    assert run(module).kernel == "stock"
    assert watch.measured == [able]
    assert looks_left(measured) == [2]

    watch.now += backends._LATER[0]
    watch.seconds = {"direct": 0.8, "stock": 1.1}
    record = run(module)
    assert watch.measured[1:] == [[n for n in able if n in ("direct", "stock")]]  # no others
    assert record.kernel.startswith("direct ")
    assert record.reason == "measured: fastest"
    assert record.timings == dict.fromkeys(able, 9.0) | {"direct": 0.8, "stock": 1.0}  # the best of both

    for _ in range(3):  # slow moments may last longer
        assert run(module).kernel.startswith("direct ")
        assert run(same).kernel.startswith("direct ")
        watch.now += 0.3 * backends._LATER[1]
    assert len(watch.measured) == 2
    assert looks_left(measured) == [1]
    watch.now += 0.2 * backends._LATER[1]
    watch.seconds = {"direct": 1.0, "stock": 0.7}
    for _ in range(3):
        assert run(module).kernel == run(same).kernel == "stock"
        watch.now += 100.0
    assert looks_left(measured) == []
    monkeypatch.setattr(tuning, "shared", tuning.TuningCache())  # another process
    assert run(layer()).kernel == "stock"
    assert len(watch.measured) == 3


def looks_left(path) -> list[int]:
    machines = json.loads(path.read_text())["machines"].values()
    return [entry["again"] for entries in machines for entry in entries.values() if "again" in entry]


def test_another_process_measures_close_rivals_again_at_once(measured, monkeypatch) -> None:
    watch = Watch(monkeypatch, direct=1.0, stock=1.1)
    run(layer())
    monkeypatch.setattr(tuning, "shared", tuning.TuningCache())
    monkeypatch.setattr(backends, "_looked", {})
    assert run(layer()).reason == "measured: fastest"
    assert run(layer()).reason == "measured earlier: fastest"
    assert len(watch.measured) == 2
    assert looks_left(measured) == [1]


@pytest.mark.parametrize("again", [True, 1])  # True: of 0.1.0 before it counted
def test_what_is_clear_at_a_second_look_is_settled(again, measured, monkeypatch) -> None:
    watch = Watch(monkeypatch, direct=1.0, stock=1.1)
    run(layer())
    data = json.loads(measured.read_text())
    for entries in data["machines"].values():
        for entry in entries.values():
            entry["again"] = again
    measured.write_text(json.dumps(data))
    monkeypatch.setattr(tuning, "shared", tuning.TuningCache())
    monkeypatch.setattr(backends, "_looked", {})
    assert run(layer()).reason == "measured: fastest"
    assert looks_left(measured) == []
    for entries in data["machines"].values():
        for entry in entries.values():
            entry["again"] = 3
    measured.write_text(json.dumps(data))
    monkeypatch.setattr(tuning, "shared", tuning.TuningCache())
    watch.seconds = {"direct": 0.5, "stock": 1.1}  # no rivals any more
    assert run(layer()).reason == "measured: fastest"
    assert looks_left(measured) == []
    assert len(watch.measured) == 3


def test_the_lower_quartile_decides(monkeypatch) -> None:
    """Not the best call, which found in the caches what it seldom finds there, and not a busy machine's median."""
    clock = [0.0]
    monkeypatch.setattr(_race.time, "perf_counter", lambda: clock[0])

    class Told(Sleeper):
        def run(self, *args) -> None:
            clock[0] += self.told[self.calls % len(self.told)]
            self.calls += 1

    lucky, steady = Told("lucky", 0.0), Told("steady", 0.0)
    lucky.told, steady.told = [3e-3, 1e-3, *[3e-3] * 11], [2e-3, 2e-3, *[9e-3] * 2, *[2e-3] * 9]
    packs = {"lucky": None, "steady": None}
    seconds = _race._race([lucky, steady], packs, None, None, request_for())
    assert lucky.calls == steady.calls == 13
    assert seconds == pytest.approx({"lucky": 3e-3, "steady": 2e-3})


@pytest.mark.parametrize(("seconds", "device"), [((1.0, 1.4), "cpu"), ((1.0, 1.0), "cuda")])
def test_what_is_clear_is_not_measured_again(seconds, device, measured, monkeypatch) -> None:
    kernels = [Sleeper(name, 0.0) for name in ("ours", "stock")]
    monkeypatch.setattr(backends, "candidates", lambda *args: (list(kernels), {}))
    monkeypatch.setattr(backends, "capturing", lambda device: False)
    monkeypatch.setattr(tuning, "machine_key", lambda device, isa: "machine")
    watch = Watch(monkeypatch, **dict(zip(("ours", "stock"), seconds, strict=True)))
    request = backends.Request(P, torch.float32, torch.device(device), 1)
    for _ in range(3):
        choice = backends.choose(request, "auto", lambda kernel: None, None, None)
        assert choice.look_again is None
        watch.now += 10.0
    assert len(watch.measured) == 1


class Sleeper:
    """A kernel that takes as long as it is told, and counts its calls."""

    def __init__(self, name: str, seconds: float) -> None:
        self.name, self.seconds, self.calls = name, seconds, 0

    def run(self, *args) -> None:
        self.calls += 1
        time.sleep(self.seconds)


@pytest.mark.parametrize(
    ("seconds", "least", "most"),
    [
        ((0.001, 0.0011, 0.4), (4, 4, 1), (13, 13, 1)),  # one call of the hopeless
        ((0.3, 0.35, 0.0001), (1, 1, 2), (1, 1, 2)),  # only one is left: nothing to compare it with
        ((0.3, 0.32, 0.34), (2, 2, 2), (2, 2, 2)),  # none is hopeless: twice, and no more
        ((0.004, 0.005, 0.02), (4, 4, 3), (13, 13, 4)),
    ],
)
def test_measuring_is_bounded(seconds: tuple, least: tuple, most: tuple) -> None:
    kernels = [Sleeper(str(i), s) for i, s in enumerate(seconds)]
    best = backends.measure(kernels, {k.name: None for k in kernels}, None, None, request_for())
    for kernel, low, high in zip(kernels, least, most, strict=True):
        assert low <= kernel.calls <= high, (kernel.name, kernel.calls)
        assert best[kernel.name] >= kernel.seconds


class GpuKernel(Sleeper):
    """One whose first call sets a library up, and whose later ones the GPU runs in `device` seconds."""

    def __init__(self, name: str, first: float, launch: float, device: float) -> None:
        super().__init__(name, launch)
        self.first, self.device, self.measured = first, device, 0

    def run(self, *args) -> None:
        time.sleep(0.0 if self.calls else self.first)
        super().run()


@pytest.fixture
def gpu_clock(monkeypatch) -> None:
    """Events that tell what the kernel says, and a host that waits for nothing."""

    def seconds(call, count: int, launch: float, device: torch.device) -> float:
        kernel = call.func.__self__
        kernel.measured += 1
        assert 1 <= count <= 20
        assert launch >= kernel.seconds
        return kernel.device * (1.0 if kernel.measured == 2 else 1.5)  # the best of all is the answer

    monkeypatch.setattr(_race, "_gpu_seconds", seconds)
    monkeypatch.setattr(_race, "synchronize", lambda device: None)


def test_what_a_library_does_in_its_first_call_is_not_held_against_it(gpu_clock) -> None:
    """cuDNN's first convolution in a process takes seconds, and may yet be the fastest."""
    ours, cudnn = GpuKernel("ours", 0.0, 0.0, 2e-5), GpuKernel("stock", 0.25, 0.001, 1e-5)
    request = backends.Request(P, torch.float32, torch.device("cuda"), 1)
    best = backends.measure([ours, cudnn], {"ours": None, "stock": None}, None, None, request)
    assert best == {"ours": 2e-5, "stock": 1e-5}


def test_measuring_on_a_gpu_is_bounded(gpu_clock) -> None:
    kernels = [
        GpuKernel("far behind", 0.0, 0.0, 5e-5),
        GpuKernel("close", 0.0, 0.0, 1.1e-5),
        GpuKernel("fastest", 0.0, 0.0, 1e-5),
        GpuKernel("hopeless", 0.0, 0.12, 1.0),
    ]
    request = backends.Request(P, torch.float32, torch.device("cuda"), 1)
    best = backends.measure(kernels, {k.name: None for k in kernels}, None, None, request)
    assert [k.measured for k in kernels] == [2, 5, 5, 0]
    assert best["hopeless"] >= 0.12
    assert [best[k.name] for k in kernels[:3]] == [5e-5, 1.1e-5, 1e-5]


class Queue:
    """A GPU that works off what is queued: a call is launched in `host` seconds and runs in `device`."""

    def __init__(self, monkeypatch, host: float, device: float) -> None:
        self.host, self.device, self.wall, self.until, self.calls = host, device, 0.0, 0.0, 0
        queue = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = max(queue.wall, queue.until)

            def synchronize(self) -> None:
                queue.wall = max(queue.wall, queue.until)

            def elapsed_time(self, end: Event) -> float:
                return 1e3 * (end.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: Event(True).synchronize())
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.run(cycles / 1.98e9), raising=False)
        monkeypatch.setattr(tuning.time, "perf_counter", lambda: self.wall)

    def run(self, seconds: float) -> None:
        self.until = max(self.wall, self.until) + seconds

    def call(self) -> None:
        self.calls += 1
        self.wall += self.host
        self.run(self.device)


@pytest.mark.parametrize(("device", "most"), [(4e-6, 20), (2e-4, 5), (5e-2, 1)])
def test_a_call_that_takes_longer_to_launch_than_to_run(device: float, most: int, monkeypatch) -> None:
    queue = Queue(monkeypatch, 3e-5, device)
    assert tuning.gpu_seconds(queue.call) == pytest.approx(device)
    assert queue.calls <= 2 + 7 * most


class Large(GpuKernel):
    def run(self, *args) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")


def test_a_kernel_that_finds_no_memory_ends_no_pass(gpu_clock, measured, monkeypatch) -> None:
    """A fused network may fit where the stock layers that it is measured against do not."""
    kernels = [Large("stock", 0.0, 0.0, 1e-6), GpuKernel("ours", 0.0, 0.0, 1e-5)]
    request = backends.Request(P, torch.float32, torch.device("cuda"), 1)
    packs = {k.name: None for k in kernels}
    assert backends.measure(kernels, packs, None, None, request) == {"ours": 1e-5}
    with pytest.raises(torch.OutOfMemoryError, match="20 GiB"):
        backends.measure(kernels[:1], packs, None, None, request)

    monkeypatch.setattr(backends, "candidates", lambda *args: (list(kernels), {}))
    monkeypatch.setattr(backends, "capturing", lambda device: False)
    monkeypatch.setattr(tuning, "machine_key", lambda device, isa: "machine")
    choice = backends.choose(request, "auto", lambda kernel: None, None, None)
    assert choice.kernel is kernels[1]
    assert choice.reason == "measured: fastest"


def test_what_is_made_in_a_capture_is_not_kept(monkeypatch) -> None:
    """It has no contents before a replay; and nothing is tried there."""
    with monkeypatch.context() as m:
        m.setattr(backends, "capturing", lambda device: True)
        m.setattr(backends, "settled", lambda device: False)
        tried = []
        m.setattr(backends, "_fails", lambda *args: tried.append(args))
        module, t = layer(), P.tensors()
        with (
            torch.inference_mode(),
            pytest.warns(UserWarning, match="call the model once before the capture"),
        ):
            y = module(t.x, t.residual)
        assert not tried
        assert backends.explain(module) == []
        assert _layer.layer_packs(module.conv) == []
    assert run(module).kernel
    assert backends.explain(module)
    with torch.inference_mode():
        torch.testing.assert_close(module(t.x, t.residual), y, rtol=1e-4, atol=1e-4)


def test_other_streams_find_packs_complete(monkeypatch) -> None:
    """Whoever makes something waits for it once, before others can see it."""
    waited: list[bool] = []
    state = {}

    def settled(device: torch.device) -> bool:
        waited.append(not backends.explain(state["module"]))
        return True

    monkeypatch.setattr(backends, "settled", settled)
    state["module"] = module = layer()
    run(module)
    assert waited == [True, True]  # for batch norm's scale and shift, and for the pack
    run(module)
    assert len(waited) == 2


def test_waiting_for_a_device(monkeypatch) -> None:
    class Stream:
        waits = 0

        def synchronize(self) -> None:
            Stream.waits += 1

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(backends, "capturing", lambda device: False)
    assert backends.settled(torch.device("cpu"))
    assert Stream.waits == 0
    assert backends.settled(torch.device("cuda", 1))
    assert Stream.waits == 1
    monkeypatch.setattr(backends, "capturing", lambda device: True)
    assert not backends.settled(torch.device("cuda", 1))
    assert Stream.waits == 1


def test_default_device_and_dtype_change_nothing() -> None:
    """torch.set_default_device("cuda") is common, and our own tensors have their places."""
    module, t = layer(), P.tensors()
    with torch.inference_mode():
        want = module(t.x, t.residual)
    other = copy.deepcopy(module)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"), torch.inference_mode():
            assert torch.equal(other(t.x, t.residual), want)
            assert torch.equal(P.tensors().x, t.x)
            assert backends.choose_for(P, torch.float32).kernel
            conv3d_sm90._trial.cache_clear()
            (x, *_), exact, allowed = conv3d_sm90._trial(torch.bfloat16)
            assert {x.device.type, exact.device.type, allowed.device.type} == {"cpu"}
    finally:
        torch.set_default_dtype(before)
        conv3d_sm90._trial.cache_clear()


def test_on_a_gpu_cudnns_own_search_makes_an_entry_of_its_own(monkeypatch) -> None:
    monkeypatch.setattr(tuning, "machine_key", lambda device, isa: "machine")
    request = backends.Request(P, torch.float32, torch.device("cuda"), 1)
    keys = set()
    for benchmark in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
        keys.add(backends.cache_key(request, "auto"))
    assert len(keys) == 2


def test_the_devices_own_work_is_waited_for(monkeypatch) -> None:
    """A tensor may lie on another GPU than the current one."""
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    backends.synchronize(torch.device("cuda", 1))
    backends.synchronize(torch.device("cpu"))
    assert waited == [torch.device("cuda", 1)]


def test_stock_layers_are_measured_on_a_piece() -> None:
    """Where their unfolded input would be the peak of memory; in full where the piece says that they might win."""
    request = request_for("n1c64d8h28w28k64f3s1p1+res+relu")
    t = request.problem.tensors()
    for seconds, whole in ((0.004, 0), (0.0001, 2)):  # of ours: 0.003
        seen: list[int] = []

        class Stock(Sleeper):
            name = "stock"

            def run(self, pack, x, residual, request, seen=seen) -> None:
                assert residual.shape[2] == x.shape[2] == request.problem.d
                seen.append(request.problem.d)
                super().run()

        kernels = [Sleeper("ours", 0.003), Stock("stock", seconds)]
        best = backends.measure(kernels, {"ours": None, "stock": None}, t.x, t.residual, request)
        assert set(best) == {"ours", "stock"}
        assert seen[:2] == [2, 2]
        assert seen[2:].count(8) >= whole
        assert whole or len(seen) == 2
    assert _race.piece(t.x, t.residual, request_for()) is None  # small
    assert _race.piece(t.x, None, request_for("n1c64d1h90w90k8f3p1")) is None  # one plane


def test_losing_packs_are_freed(measured) -> None:
    module = layer()
    run(module)
    from r3d_kernels._layer import state_of

    assert len(state_of(module.conv)._snapshot.packs) == 1


def test_other_threads_count_is_measured_anew(measured) -> None:
    module = layer()
    torch.set_num_threads(2)
    run(module)
    torch.set_num_threads(1)
    run(module)
    assert len(json.loads(measured.read_text())["machines"]) == 2


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        '{"format": 99, "machines": {}}',
        '{"format": 1, "machines": {"m": {"p": {"kernel": 3}}}}',
    ],
)
def test_damaged_cache_is_ignored_with_a_warning_and_replaced(measured, damage: str) -> None:
    measured.write_text(damage)
    with pytest.warns(UserWarning, match=r"tuning cache .*tuning-v1.json is ignored"):
        run(layer())
    assert json.loads(measured.read_text())["format"] == 1


def test_unwritable_cache_does_not_stop_a_forward(monkeypatch) -> None:
    monkeypatch.setenv("R3D_KERNELS_TUNE", "1")
    monkeypatch.setenv("R3D_KERNELS_CACHE", os.devnull + "/nowhere")
    monkeypatch.setattr(tuning, "shared", tuning.TuningCache())
    with pytest.warns(UserWarning, match="tuning cache"):
        assert run(layer()).reason.startswith("measured")


def test_entries_of_others_survive(measured) -> None:
    one, two = tuning.TuningCache(), tuning.TuningCache()
    one.put("a", "p", "direct", {"direct": 1.0})
    two.put("b", "q", "stock", {"stock": 2.0})
    one.put("a", "r", "direct", {"direct": 3.0})
    assert set(json.loads(measured.read_text())["machines"]) == {"a", "b"}
    assert tuning.TuningCache().get("a", "r") == {"kernel": "direct", "seconds": {"direct": 3.0}}
    assert [p.name for p in measured.parent.iterdir() if p.suffix == ".tmp"] == []
    one.clear()
    assert not measured.exists()


def test_a_newer_measurement_of_another_process_stays(measured) -> None:
    one, two = tuning.TuningCache(), tuning.TuningCache()
    one.put("a", "p", "direct", {"direct": 1.0})
    two.put("a", "p", "stock", {"stock": 0.5})
    one.put("a", "q", "direct", {"direct": 1.0})  # writes q, and not its old p
    assert tuning.TuningCache().get("a", "p") == {"kernel": "stock", "seconds": {"stock": 0.5}}
    assert one.get("a", "p")["kernel"] == "stock"
    two.clear()
    one.put("a", "r", "direct", {"direct": 1.0})  # what was cleared does not come back
    assert set(json.loads(measured.read_text())["machines"]["a"]) == {"r"}


def test_forget(measured) -> None:
    cache = tuning.TuningCache()
    for machine, problem in (("a", "p"), ("a", "q"), ("b", "p")):
        cache.put(machine, problem, "direct", {"direct": 1.0})
    assert cache.forget("a", ["p", "none"]) == 1
    assert cache.get("a", "p") is None
    assert cache.get("a", "q") is not None
    assert json.loads(measured.read_text())["machines"].keys() == {"a", "b"}
    assert cache.forget("a", ["q"]) == 1
    assert json.loads(measured.read_text())["machines"].keys() == {"b"}
    assert cache.clear() == 1
    assert cache.clear() == 0


def test_what_could_not_be_written_is_written_later(measured, monkeypatch) -> None:
    cache = tuning.TuningCache()
    with monkeypatch.context() as m:
        m.setattr(
            tuning.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        cache.put("a", "p", "direct", {"direct": 1.0})
    assert not measured.exists()
    assert cache.get("a", "p") is not None
    cache.put("a", "q", "direct", {"direct": 1.0})
    assert set(json.loads(measured.read_text())["machines"]["a"]) == {"p", "q"}
    assert [p.name for p in measured.parent.iterdir() if p.suffix == ".tmp"] == []


def test_what_a_process_did_not_survive_is_known_to_the_next(measured) -> None:
    with tuning.Attempt("a kernel") as attempt:
        assert attempt.earlier is None
        assert attempt.path.exists()
        with tuning.Attempt("a kernel") as other:  # at the same time: no evidence of anything
            assert other.earlier is None
        assert attempt.path.exists()
        with tuning.Attempt("another kernel") as other:
            assert other.path != attempt.path
    assert not attempt.path.exists()
    with pytest.raises(KeyboardInterrupt), tuning.Attempt("a kernel"):
        raise KeyboardInterrupt  # somebody was impatient, and Python still ran
    assert not attempt.path.exists()

    code = (
        "import os, signal; from r3d_kernels import tuning\n"
        "with tuning.Attempt('a kernel'): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == -9
    for _ in range(2):  # until somebody removes it
        with tuning.Attempt("a kernel") as attempt:
            assert attempt.earlier == attempt.path
        assert attempt.path.read_text().startswith("a kernel\nremove this file")
    attempt.path.unlink()
    with tuning.Attempt("a kernel") as attempt:
        assert attempt.earlier is None
        attempt.lost = True
    with tuning.Attempt("a kernel") as attempt:
        assert attempt.earlier is not None


def test_an_attempt_needs_neither_cache_nor_locks(measured, monkeypatch) -> None:
    import fcntl

    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    with monkeypatch.context() as m:
        m.setattr(fcntl, "flock", no_locks)
        with tuning.Attempt("a kernel") as attempt:
            assert attempt.earlier is None
    with monkeypatch.context() as m:
        m.setenv("R3D_KERNELS_TUNE", "0")
        with tuning.Attempt("b kernel") as attempt:
            assert not attempt.path.exists()
    monkeypatch.setenv("R3D_KERNELS_CACHE", "/proc/nowhere")
    with tuning.Attempt("a kernel") as attempt:
        assert attempt.earlier is None


def test_file_systems_without_locks(measured, monkeypatch) -> None:
    import fcntl

    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    tuning.TuningCache().put("a", "p", "direct", {"direct": 1.0})
    assert tuning.TuningCache().get("a", "p") is not None


def test_choose_for_a_problem(measured, monkeypatch) -> None:
    choice = backends.choose_for(P, torch.float32)
    assert choice.reason.startswith("measured: ")
    with monkeypatch.context() as m:
        m.setattr(backends, "measure", lambda *a: pytest.fail("measured again"))
        assert run(layer()).reason.startswith("measured earlier: ")  # the layer finds it
    with r3d.backend("cpu"):
        assert backends.choose_for(P, torch.float32, asked="torch").kernel.backend == "torch"
    with pytest.raises(ValueError, match="asked: expected one of"):
        backends.choose_for(P, torch.float32, asked="gpu")


def test_two_processes_write_at_once(measured) -> None:
    code = (
        "import sys; from r3d_kernels import tuning\n"
        "for i in range(20): tuning.shared.put(sys.argv[1], str(i), 'stock', {'stock': 1.0})"
    )
    jobs = [subprocess.Popen([sys.executable, "-c", code, name]) for name in "ab"]
    assert [job.wait(timeout=120) for job in jobs] == [0, 0]
    machines = json.loads(measured.read_text())["machines"]
    assert {name: len(entries) for name, entries in machines.items()} == {"a": 20, "b": 20}


def test_switches() -> None:
    assert run(layer()).reason.startswith("preferred; R3D_KERNELS_TUNE=0")


def test_wrong_switch(monkeypatch) -> None:
    monkeypatch.setenv("R3D_KERNELS_TUNE", "maybe")
    with pytest.raises(ValueError, match="R3D_KERNELS_TUNE: expected 0 or 1, got 'maybe'"):
        run(layer())


def test_describe() -> None:
    facts = backends.describe()
    assert facts["error"] is None
    assert facts["isa"] in ("scalar", "avx2", "avx512", "avx512_bf16", "amx")
    assert facts["threads"] == torch.get_num_threads()
    assert os.path.exists(facts["extension"])


def test_triton_keeps_no_weight_that_a_capture_made(monkeypatch) -> None:
    from r3d_kernels.triton.backend import _Pack

    class Launch:
        packing = ("rounded",)

        @staticmethod
        def pack(weight: torch.Tensor) -> torch.Tensor:
            return weight + 1

    weight = torch.zeros(2, 2, 1, 1, 1)
    pack = _Pack(weight, torch.ones(2), torch.zeros(2))
    monkeypatch.setattr(backends, "settled", lambda device: False)
    inside, kept = pack.weight_for(Launch)
    assert not kept
    monkeypatch.undo()
    first, kept = pack.weight_for(Launch)
    assert kept
    assert first is not inside
    assert pack.weight_for(Launch)[0] is first
    Launch.packing = None
    assert pack.weight_for(Launch) == (weight, True)


def test_a_gpus_choice_counts_what_a_call_takes_the_host():
    request = backends.Request(
        ConvProblem.parse("n1c64d2h7w7k64f3p1+relu"), torch.bfloat16, torch.device("cuda"), 1
    )
    names = {"ours": "wgmma", "fused": "cuDNN fused", "two": "cuDNN + bn_act", "four": "stock"}
    able = [k for k in backends.KERNELS if k.name in names.values()]

    def winner(**seconds):
        return backends._winner(able, {names[n]: s * 1e-6 for n, s in seconds.items()}, request).name

    assert winner(ours=10, fused=8, two=7, four=5) == "wgmma"
    assert winner(ours=100, fused=98, two=90, four=89) == "cuDNN + bn_act"
    assert winner(ours=100, fused=94, two=96, four=99) == "cuDNN fused"
    assert winner(ours=100, fused=96, two=95, four=80) == "stock"
    why = backends._why("wgmma", {"wgmma": 10e-6, "cuDNN + bn_act": 9e-6})
    assert why == "takes the host less than cuDNN + bn_act, which needs 10% less of the GPU's time"
