"""Compiling before the first launch, without a GPU: the very kernels of the call, at once, and within the time."""

from __future__ import annotations

import dataclasses
import gc
import os
import sys
import threading

import pytest
import torch
from triton.runtime.jit import JITFunction

from r3d_kernels import backends, tuning
from r3d_kernels.problems import ConvProblem
from r3d_kernels.triton import ahead, conv3d, kernels, tuner
from r3d_kernels.triton import config as configs
from r3d_kernels.triton.config import Config

pytestmark = pytest.mark.skipif(
    bool(os.environ.get("TRITON_INTERPRET")), reason="the interpreter compiles nothing"
)


def channels_last(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last_3d)


WITHOUT_DATA = {
    "tiled": ("forward", "n1c32d2h4w4k32f3p1+res+relu", "tiled 16x16x16 w4 s2 g8 k1", "half"),
    "parts": ("forward", "n1c32d2h4w4k32f3p1+relu", "tiled 16x16x16 w4 s2 g8 k4", "tf32"),
    "packed": ("forward", "n1c3d2h4w4k32f3p1+relu", "packed 16x16x16 w4 s2 g8 k1", "half"),
    "rows": ("forward", "n1c3d2h4w4k32f3p1+relu", "rows 16x16x16 w4 s2 g8 k1", "tf32"),
    "boxes": ("forward", "n1c32d2h4w8k32f3p1", "boxes 32x32x32 w4 s2 g8 k1", "half"),
    "input gradient": ("input_grad", "n1c32d2h4w4k32f3s2p1", "tiled 16x16x16 w4 s2 g8 k1", "half"),
    "weight gradient": ("weight_grad", "n1c32d2h4w8k32f3p1", "pixels 16x16x16 w4 s2 g8 k4", "half"),
    "strips": ("weight_grad", "n1c3d2h4w4k32f3p1", "strips 16x16x16 w4 s2 g8 k1", "half"),
}


def misaligned(t: torch.Tensor) -> torch.Tensor:
    """The same numbers at an address that is no multiple of 16."""
    flat = torch.empty(t.numel() + 1, dtype=t.dtype)[1:]
    return flat.as_strided(t.shape, t.stride()).copy_(t)


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("name", WITHOUT_DATA)
def test_what_a_call_launches_is_compiled_ahead_of_it(name: str, aligned: bool, driver, monkeypatch) -> None:
    """A call on tensors without data launches nothing, and what it notes is all that the call itself needs."""
    what, text, config, precision = WITHOUT_DATA[name]
    # where no other test has compiled anything
    driver.device = 200 + 2 * list(WITHOUT_DATA).index(name) + aligned
    p = ConvProblem.parse(text)
    t = p.tensors(torch.float32 if precision == "tf32" else torch.bfloat16)
    dy = channels_last(*p.out_shape, dtype=t.x.dtype)
    vector = torch.ones(p.k)
    operands = {
        "forward": (t.x, t.weight, vector, vector, t.residual),
        "input_grad": (dy, t.weight),
        "weight_grad": (t.x, dy),
    }[what]
    if not aligned:
        operands = (misaligned(operands[0]), *operands[1:])
    more = (True, True) if what == "forward" else ()
    run = getattr(conv3d, what)(p, Config.parse(config), precision, *more)
    with ahead.noted() as jobs:
        run(*map(ahead.like, operands))
    assert jobs
    assert not driver.launched
    monkeypatch.setattr(ahead, "threads", lambda: 2)
    assert set(ahead.compile_all(jobs, torch.device("cpu")).values()) == {None}
    assert not driver.launched
    monkeypatch.setattr(
        JITFunction, "_do_compile", lambda *a, **k: pytest.fail("compiled by the call itself")
    )
    run(*operands)
    assert len(driver.launched) == len(jobs)


def test_without_data_nothing_is_launched_unnoted(driver) -> None:
    p = ConvProblem.parse("n1c32d2h4w4k32f1")
    run = conv3d.forward(p, Config.parse("tiled 16x16x16 w4 s2 g8 k1"), "half", False, False)
    x, weight = ahead.like(channels_last(*p.in_shape)), ahead.like(channels_last(*p.weight_shape))
    with pytest.raises(RuntimeError, match="on tensors without data"):
        run(x, weight, None, None, None)


def test_layers_share_what_is_compiled() -> None:
    """Sizes that are not compiled in do not tell two jobs apart; channels of another divisibility do."""

    def keys(text: str) -> set:
        p = ConvProblem.parse(text)
        run = conv3d.forward(p, Config.parse("tiled 64x64x32 w4 s3 g8 k1"), "half", True, True)
        t = p.tensors(torch.bfloat16, device="meta")
        with ahead.noted() as jobs:
            run(t.x, t.weight, t.gamma, t.beta, t.residual)
        return {job.key for job in jobs}

    first = keys("n1c64d8h28w28k64f3p1+relu")
    assert keys("n8c128d4h14w14k256f3s2p1+relu") == first
    for other in ("n1c64d8h28w28k64f3p1", "n1c64d8h28w28k64f1x3x3p0x1x1+relu", "n1c64d8h28w28k65f3p1+relu"):
        assert keys(other) != first


def test_kernels_are_compiled_at_once_in_threads_of_the_right_device(monkeypatch) -> None:
    monkeypatch.setattr(ahead, "threads", lambda: 3)
    places: dict[int, torch.device] = {}
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: places.setdefault(threading.get_ident(), device)
    )
    together = threading.Barrier(3)
    compiled_by = []

    def compile() -> None:
        together.wait(30)  # passes once three are at it
        compiled_by.append(threading.get_ident())

    def fails() -> None:
        raise ValueError("no\nand why")

    jobs = [ahead.Job((i,), compile) for i in range(3)] + [ahead.Job((0,), fails), ahead.Job(("bad",), fails)]
    count = []
    found = ahead.compile_all(jobs, torch.device("cuda", 1), done=lambda: count.append(1))
    assert [found[key] for key in ((0,), (1,), (2,))] == [None] * 3, "equal keys are one job"
    assert isinstance(found["bad",], ValueError)
    assert len(count) == 4
    assert set(compiled_by) <= set(places)
    assert set(places.values()) == {torch.device("cuda", 1)}
    assert threading.get_ident() not in places, "the caller's own device is left alone"
    assert not any(t.name.startswith("r3d_kernels_triton") for t in threading.enumerate())


def test_no_compilation_begins_after_the_time(monkeypatch) -> None:
    monkeypatch.setattr(ahead, "threads", lambda: 1)
    now = [0.0]

    def take(seconds: float) -> None:
        now[0] += seconds

    jobs = [ahead.Job((i,), lambda: take(4.0)) for i in range(5)]
    found = ahead.compile_all(jobs, torch.device("cpu"), seconds=10.0, clock=lambda: now[0])
    assert list(found) == [(0,), (1,), (2,)]


@pytest.mark.parametrize("always", [False, True])
def test_what_pythons_parser_lost_is_compiled_again_alone(always: bool, monkeypatch) -> None:
    """It counts its depth for all threads at once, and refuses where the count does not add up."""
    monkeypatch.setattr(ahead, "threads", lambda: 2)
    tried: list[str] = []

    def parse() -> None:
        tried.append(threading.current_thread().name)
        if always or tried[-1].startswith("r3d_kernels_triton"):
            raise SystemError("AST constructor recursion depth mismatch (before=15, after=10)")

    def compile() -> None:
        try:
            parse()
        except SystemError as e:
            raise ValueError("at 130:21:") from e  # as the compiler says where

    def fails() -> None:
        tried.append("other")
        raise ValueError("another reason")

    jobs = [ahead.Job(("lost",), compile), ahead.Job(("bad",), fails), ahead.Job(("good",), lambda: None)]
    found = ahead.compile_all(jobs, torch.device("cpu"))
    assert isinstance(found["lost",], ValueError if always else type(None))
    assert tried.count("other") == 1, "what is wrong stays wrong"
    assert len(tried) == 3
    assert isinstance(found["bad",], ValueError)
    assert found["good",] is None


def test_what_pythons_parser_lost_has_not_failed_when_the_time_is_over(monkeypatch) -> None:
    """It is as good as not begun: whoever wants it compiles it."""
    monkeypatch.setattr(ahead, "threads", lambda: 1)
    now = [0.0]

    def compile() -> None:
        now[0] += 6.0
        raise SystemError("AST constructor recursion depth mismatch (before=15, after=10)")

    jobs = [ahead.Job(("lost",), compile), ahead.Job(("good",), lambda: None)]
    found = ahead.compile_all(jobs, torch.device("cpu"), seconds=3.0, clock=lambda: now[0])
    assert found == {}


def collects_garbage(phase: str, info: dict) -> None:
    """Python code in the middle of whatever made the garbage, as Hypothesis has it: another thread may go on."""
    for _ in range(100):
        pass


def test_kernels_are_parsed_in_threads_while_garbage_is_collected(monkeypatch) -> None:
    monkeypatch.setattr(ahead, "threads", lambda: 4)
    parsed = [kernels.conv3d_tiled, kernels.conv3d_rows, kernels.conv3d_weight_grad]

    def compile() -> None:
        for _ in range(40):
            for kernel in parsed:
                kernel.parse()

    interval, threshold = sys.getswitchinterval(), gc.get_threshold()
    gc.callbacks.append(collects_garbage)
    try:
        sys.setswitchinterval(1e-6)
        gc.set_threshold(50)
        found = ahead.compile_all([ahead.Job((i,), compile) for i in range(8)], torch.device("cpu"))
    finally:
        gc.callbacks.remove(collects_garbage)
        sys.setswitchinterval(interval)
        gc.set_threshold(*threshold)
    assert set(found.values()) == {None}


# ---- in the tuner ----

P = ConvProblem.parse("n1c32d2h4w4k32f3p1+relu")
TILES = [Config.parse(f"tiled {m}x16x16 w4 s2 g8 k1") for m in (16, 32, 64)]


def operands() -> tuple[torch.Tensor | None, ...]:
    t = P.tensors(torch.bfloat16)
    return t.x, t.weight, torch.ones(P.k), torch.ones(P.k), None


def launch(config: Config):
    return conv3d.forward(P, config, "half", True, True)


@pytest.fixture
def as_on_gpu(driver, monkeypatch, tmp_path):
    """A GPU on which all results are right, and each configuration takes as long as it has columns."""
    monkeypatch.setenv("R3D_KERNELS_TUNE", "1")
    monkeypatch.setenv("R3D_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "shared", tuning.TuningCache())
    monkeypatch.setattr(tuner, "_known", {})
    monkeypatch.setattr(tuner, "_can_measure", lambda x: True)
    monkeypatch.setattr(tuner, "interpreted", lambda: False)
    monkeypatch.setattr(tuner, "disagreement", lambda *a: None)
    monkeypatch.setattr(configs, "candidates", lambda *a: list(TILES))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(ahead, "threads", lambda: 2)
    for task in ("FORWARD", "INPUT_GRAD", "WEIGHT_GRAD"):
        monkeypatch.setattr(tuner, task, dataclasses.replace(getattr(tuner, task), budget=1e9))
    gc.disable()  # nothing is to be compiled again, see test_kernels_are_parsed_in_threads_...
    yield driver
    gc.enable()


def test_all_candidates_are_compiled_before_any_is_measured(as_on_gpu, monkeypatch) -> None:
    """In threads of their own, so that nothing competes with what is measured for the processor."""
    as_on_gpu.device = 301
    events: list[str] = []
    compile = JITFunction._do_compile

    def compiles(*args, **kwargs):
        assert threading.current_thread().name.startswith("r3d_kernels_triton")
        events.append("compiled")
        return compile(*args, **kwargs)

    def measure(run) -> float:
        run()
        events.append("measured")
        return 1.0 + len(events) % 2

    monkeypatch.setattr(JITFunction, "_do_compile", compiles)
    monkeypatch.setattr(tuner, "gpu_seconds", measure)
    best, final = tuner.config_for(tuner.FORWARD, P, "half", launch, operands())
    assert events == ["compiled"] * 3 + ["measured"] * 3
    assert best in TILES
    assert final


@pytest.mark.parametrize("where", ["preparing", "compiling"])
def test_what_does_not_compile_is_left_out(where: str, as_on_gpu, monkeypatch, caplog) -> None:
    as_on_gpu.device = 302
    compile, measured = JITFunction._do_compile, []

    def compiles(self, key, signature, device, constexprs, *rest):
        if 32 in constexprs.values() and where == "compiling":  # the second's tile of pixels
            raise ValueError("PassManager::run failed\nand a long story")
        return compile(self, key, signature, device, constexprs, *rest)

    def make(config: Config):
        if config == TILES[1] and where == "preparing":
            raise ValueError("PassManager::run failed\nand a long story")
        run = launch(config)

        def call(*tensors):
            if not tensors[0].is_meta:
                measured.append(config)
            return run(*tensors)

        return call

    monkeypatch.setattr(JITFunction, "_do_compile", compiles)
    monkeypatch.setattr(tuner, "gpu_seconds", lambda run: 1.0)
    best, _ = tuner.config_for(tuner.FORWARD, P, "half", make, operands())
    assert best == TILES[0]
    assert measured == [TILES[0], TILES[2]], "what failed is not compiled a second time"
    assert caplog.text.count(f"not used: {TILES[1]}: ValueError: PassManager::run failed") == 1


def test_where_nothing_compiles_it_says_why(as_on_gpu, monkeypatch) -> None:
    as_on_gpu.device = 303

    def fails(*args, **kwargs):
        raise ValueError("no such instruction")

    monkeypatch.setattr(JITFunction, "_do_compile", fails)
    with pytest.raises(tuner.NothingWorks, match=r"tiled 16x16x16.*no such instruction; tiled 32x16x16"):
        tuner.config_for(tuner.FORWARD, P, "half", launch, operands())


def test_compiling_leaves_time_to_measure(as_on_gpu, monkeypatch) -> None:
    """What there was no time to compile comes last, and is not begun once the budget is spent."""
    now = [0.0]

    def compile_all(jobs, device, seconds, clock):
        keys = list(dict.fromkeys(job.key for job in jobs))
        assert clock() + seconds == 10.0
        now[0] += 9.0
        return dict.fromkeys(keys[1:])  # the first was not begun: another process was in its way, say

    monkeypatch.setattr(ahead, "compile_all", compile_all)
    able, failures = tuner.compiled(TILES, launch, operands(), 10.0, clock=lambda: now[0])
    assert able == [TILES[1], TILES[2], TILES[0]]
    assert not failures


@pytest.mark.parametrize("why", ["one processor", "one candidate", "interpreter"])
def test_where_it_gains_nothing_nothing_is_compiled_ahead(why: str, as_on_gpu, monkeypatch) -> None:
    monkeypatch.setattr(ahead, "compile_all", lambda *a, **k: pytest.fail("compiled"))
    if why == "one processor":
        monkeypatch.setattr(ahead, "threads", lambda: 1)
    if why == "interpreter":
        monkeypatch.setattr(tuner, "interpreted", lambda: True)
    able = TILES[:1] if why == "one candidate" else TILES
    assert tuner.compiled(able, launch, operands(), 10.0) == (able, [])


# ---- for whole networks ----


def test_layers_are_compiled_together(as_on_gpu, monkeypatch) -> None:
    """Each kernel once, whatever the layers share, and nothing for a layer whose measurement is remembered."""
    as_on_gpu.device = 304
    texts = ("n1c32d2h4w4k32f3p1+relu", "n2c64d3h5w4k32f3p1+relu", "n1c48d2h4w4k32f3p1+relu")
    requests = [
        backends.Request(ConvProblem.parse(text), torch.bfloat16, torch.device("cpu"), 1) for text in texts
    ]
    names = [tuner.cache_key(tuner.FORWARD, r.problem, r.dtype, "half", r.device) for r in requests]
    tuning.shared.put(*names[2], str(TILES[0]), {str(t): 1.0 for t in TILES})
    kernel = backends.TritonConv3d()
    assert [kernel.remembers(r) for r in requests] == [[name] for name in names]
    told = []
    kernel.prepare(requests, lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    monkeypatch.setattr(JITFunction, "_do_compile", lambda *a, **k: pytest.fail("compiled by a call"))
    for r in requests[:2]:
        t = r.problem.tensors(torch.bfloat16)
        vector = torch.ones(r.problem.k)
        for tile in TILES:
            conv3d.forward(r.problem, tile, "half", True, True)(t.x, t.weight, vector, vector, None)
    assert len(as_on_gpu.launched) == 6
