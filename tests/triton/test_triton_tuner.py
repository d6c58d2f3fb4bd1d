"""Choosing a Triton configuration: nothing that computes something else may win, and the cost is bounded."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from r3d_kernels import backends, tuning
from r3d_kernels.problems import ConvProblem
from r3d_kernels.triton import backend, config, conv3d, tuner
from r3d_kernels.triton.config import Config

pytestmark = pytest.mark.usefixtures("interpreter")

P = ConvProblem.parse("n3c16d2h3w4k16f1x1x3p0x0x1+res+relu")
SMALL = [Config.parse(f"tiled {m}x16x16 w4 s2 g8 k1") for m in (16, 32, 64)]


@pytest.fixture(autouse=True)
def all_the_time_in_the_world(monkeypatch) -> None:
    """What is measured must not depend on how busy this machine is."""
    for task in ("FORWARD", "INPUT_GRAD", "WEIGHT_GRAD"):
        monkeypatch.setattr(tuner, task, dataclasses.replace(getattr(tuner, task), budget=1e9))


def operands(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    t = P.tensors(dtype)
    return t.x, t.weight, torch.rand(P.k) + 0.5, torch.randn(P.k), t.residual


def launch(wanted: Config):
    return conv3d.forward(P, wanted, config.precision_of(torch.float32), True, True)


def spoiled(which: Config, how):
    """A launch that computes something else with one configuration."""

    def make(wanted: Config):
        run = launch(wanted)
        return (lambda *tensors: how(run(*tensors))) if wanted == which else run

    return make


def fastest(make, seconds, budget=100.0, clock=lambda: 0.0):
    tensors = operands()
    times = iter(seconds)

    def measure(run) -> float:
        run()
        return next(times)

    expected = tuner.reference(P, tensors)
    return tuner.fastest(SMALL, make, tensors, "ieee", expected, measure, budget, clock)


def test_all_are_measured_in_order() -> None:
    assert fastest(launch, [3.0, 1.0, 2.0]) == dict(zip(SMALL, [3.0, 1.0, 2.0], strict=True))


def one_element(y: torch.Tensor) -> torch.Tensor:
    y[-1, -1, -1, -1, -1] += 1.0
    return y


@pytest.mark.parametrize(
    "how",
    [one_element, lambda y: y * 1.01, lambda y: y * float("nan"), torch.zeros_like],
    ids=["one element of the last sample", "all of them a little", "nan", "zeros"],
)
def test_a_wrong_result_cannot_win(how, caplog) -> None:
    with caplog.at_level("WARNING", logger="r3d_kernels"):
        seconds = fastest(spoiled(SMALL[1], how), [3.0, 2.0])
    assert list(seconds) == [SMALL[0], SMALL[2]]
    assert "elements of sample" in caplog.text


def test_a_configuration_that_does_not_compile_is_passed_over() -> None:
    def make(wanted: Config):
        if wanted == SMALL[0]:
            raise ValueError("out of resource: shared memory")
        return launch(wanted)

    assert list(fastest(make, [3.0, 2.0])) == SMALL[1:]


def test_where_nothing_works_it_says_why() -> None:
    def make(wanted: Config):
        raise ValueError("out of resource\nand a long story")

    with pytest.raises(
        RuntimeError, match=r"no Triton configuration works here: tiled 16x16x16.*out of resource;"
    ):
        fastest(make, [])


def test_the_budget_ends_the_search_but_not_before_one_is_found() -> None:
    now = iter([0.0, 50.0, 200.0])
    assert list(fastest(launch, [1.0, 1.0], budget=100.0, clock=lambda: next(now))) == SMALL[:2]
    now = iter([0.0, 200.0, 300.0])
    assert list(fastest(launch, [1.0], budget=100.0, clock=lambda: next(now))) == SMALL[:1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_right_results_agree_with_the_reference(dtype: torch.dtype) -> None:
    tensors = operands(dtype)
    precision = config.precision_of(dtype)
    y = conv3d.forward(P, SMALL[0], precision, True, True)(*tensors)
    expected = tuner.reference(P, tensors)
    assert [i for i, _ in expected] == [0, P.n - 1]
    assert tuner.disagreement(y, expected, precision) is None


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_the_reference_is_exact_whichever_switch_was_set(precision: str, monkeypatch) -> None:
    """torch refuses to tell its older switch where the newer ones of convolutions and RNNs differ."""
    cudnn, seen, real = torch.backends.cudnn, [], torch.nn.functional.conv3d

    def conv3d_(*args, **kwargs):
        seen.append(config.precision_of(torch.float32))
        return real(*args, **kwargs)

    monkeypatch.setattr(tuner.F, "conv3d", conv3d_)
    with cudnn.flags(allow_tf32=True):
        cudnn.conv.fp32_precision = precision
        try:
            assert len(tuner.reference(P, operands())) == len(seen) == 2
            assert set(seen) == {"ieee"}
            assert cudnn.conv.fp32_precision == config.precision_of(torch.float32) == precision
        finally:
            cudnn.conv.fp32_precision = "tf32"  # as that of RNNs, or the flags could not be put back


def test_untuned_calls_take_the_default(monkeypatch) -> None:
    monkeypatch.setattr(tuner, "fastest", lambda *a: pytest.fail("measured"))
    where = config.machine(torch.device("cpu"))
    chosen, final = tuner.config_for(tuner.FORWARD, P, "ieee", launch, operands())
    assert chosen == config.default(P, torch.float32, "ieee", where)
    assert final


def test_measured_once_and_remembered(monkeypatch, tmp_path) -> None:
    """The cache on disk is the one that all kernels share."""
    monkeypatch.setenv("R3D_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(tuner.tuning, "shared", tuning.TuningCache())
    times = iter([3.0, 1.0, 2.0])

    def measure(run) -> float:
        run()
        return next(times)

    monkeypatch.setattr(tuner, "gpu_seconds", measure)
    arguments = (tuner.FORWARD, P, "ieee", launch, operands(), SMALL, ("a machine", "a layer"))
    assert tuner._measured(*arguments) == SMALL[1]
    monkeypatch.setattr(tuner.tuning, "shared", tuning.TuningCache())  # a new process
    monkeypatch.setattr(tuner, "fastest", lambda *a: pytest.fail("measured again"))
    assert tuner._measured(*arguments) == SMALL[1]
    assert tuning.shared.get("a machine", "a layer")["seconds"] == {
        str(c): s for c, s in zip(SMALL, [3.0, 1.0, 2.0], strict=True)
    }


def test_what_cannot_be_compared_is_not_remembered(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("R3D_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(tuner.tuning, "shared", tuning.TuningCache())
    x, *others = operands()
    x[0, 0, 0, 0, 0] = float("nan")
    assert (
        tuner._measured(tuner.FORWARD, P, "ieee", launch, (x, *others), SMALL, ("a machine", "a layer"))
        is None
    )
    assert tuning.shared.get("a machine", "a layer") is None


def test_torchs_switch_decides_the_precision(monkeypatch) -> None:
    assert config.precision_of(torch.bfloat16) == config.precision_of(torch.float16) == "half"
    with torch.backends.cudnn.flags(allow_tf32=True):
        assert config.precision_of(torch.float32) == "tf32"
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert config.precision_of(torch.float32) == "ieee"


# ---- the kernel among the others ----


def request(**change) -> backends.Request:
    return dataclasses.replace(backends.Request(P, torch.float32, torch.device("cuda"), 1), **change)


def on_gpu(monkeypatch, arch: int = 90) -> backend.TritonConv3d:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(config, "machine", lambda device: config.Machine(arch, 132, 232448))
    return backend.TritonConv3d()


def test_says_why_not(monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert backend.TritonConv3d().can_run(request()) == "no CUDA device is available"
    kernel = on_gpu(monkeypatch)
    assert kernel.can_run(request()) is None
    assert "float32, bfloat16 and float16 only" in kernel.can_run(request(dtype=torch.float64))
    assert "needs a CUDA tensor, got xpu" in kernel.can_run(request(device=torch.device("xpu")))
    assert "8.0 or later, got 7.5" in on_gpu(monkeypatch, 75).can_run(request())
    kernel = on_gpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "CUDA graph" in kernel.can_run(request())
    monkeypatch.setattr(backend, "why_no_triton", lambda: "Triton cannot be imported (gone)")
    assert "cannot be imported (gone)" in kernel.can_run(request())


def test_runs_again_when_the_precision_changes() -> None:
    kernel, tensors = backend.TritonConv3d(), operands()
    pack = backend._Pack(*tensors[1:4])
    r = request(device=torch.device("cpu"))
    for allowed, precision in ((True, "tf32"), (False, "ieee"), (True, "tf32")):
        with torch.backends.cudnn.flags(allow_tf32=allowed):
            kernel.run(pack, tensors[0], tensors[4], r)
            assert pack.launches[id(r)][1] == precision


def test_errors_of_triton_become_runtime_errors(monkeypatch) -> None:
    """What `backends.choose` catches when it tries a kernel before it may be chosen."""

    class CompilationError(Exception):
        pass

    def fails(*args):
        raise CompilationError("at 3:4: no")

    monkeypatch.setattr(conv3d, "chosen", fails)
    tensors = operands()
    pack = backend._Pack(*tensors[1:4])
    with pytest.raises(RuntimeError, match="Triton: CompilationError: at 3:4: no"):
        backend.TritonConv3d().run(pack, tensors[0], tensors[4], request(device=torch.device("cpu")))


# ---- a call on a GPU, as far as the choice of its configuration goes ----


@pytest.fixture
def as_on_gpu(monkeypatch, tmp_path):
    """The tuner measures; `seconds` are what its clock says of each configuration, in order."""
    monkeypatch.setenv("R3D_KERNELS_TUNE", "1")
    monkeypatch.setenv("R3D_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "shared", tuning.TuningCache())
    monkeypatch.setattr(tuner, "_known", {})
    monkeypatch.setattr(tuner, "_failed", {})
    monkeypatch.setattr(tuner, "_can_measure", lambda x: True)
    monkeypatch.setattr(tuner.configs, "candidates", lambda *a: SMALL)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    times: list[float] = []
    measured: list[float] = []

    def measure(run) -> float:
        run()
        measured.append(times.pop(0))
        return measured[-1]

    monkeypatch.setattr(tuner, "gpu_seconds", measure)
    return times, measured


def new_process(monkeypatch) -> None:
    monkeypatch.setattr(tuning, "shared", tuning.TuningCache())
    monkeypatch.setattr(tuner, "_known", {})


def test_the_fastest_right_configuration_is_remembered_on_disk(as_on_gpu, monkeypatch, tmp_path) -> None:
    """The fastest of all computes something else: it is neither chosen nor remembered, in any process."""
    times, measured = as_on_gpu
    times += [3.0, 2.0]
    make = spoiled(SMALL[1], one_element)
    assert tuner.config_for(tuner.FORWARD, P, "ieee", make, operands()) == (SMALL[2], True)
    assert measured == [3.0, 2.0]
    assert tuner.config_for(tuner.FORWARD, P, "ieee", make, operands()) == (SMALL[2], True)
    new_process(monkeypatch)
    assert tuner.config_for(tuner.FORWARD, P, "ieee", make, operands()) == (SMALL[2], True)
    assert measured == [3.0, 2.0], "measured once"
    text = (tmp_path / "tuning-v1.json").read_text()
    assert str(SMALL[2]) in text
    assert str(SMALL[1]) not in text
    assert f"triton {tuner.triton.__version__}" in text, "another Triton measures anew"


def test_what_the_cache_names_must_be_a_candidate(as_on_gpu, monkeypatch) -> None:
    """A file of another version, or one that somebody edited, cannot bring in a configuration of its own."""
    times, measured = as_on_gpu
    times += [3.0, 1.0, 2.0]
    place = tuner._machine(torch.device("cpu")), f"triton {P} float32 ieee"
    tuning.shared.put(*place, "tiled 16x32x16 w8 s2 g8 k1", {"tiled 16x32x16 w8 s2 g8 k1": 0.1})
    assert tuner.config_for(tuner.FORWARD, P, "ieee", launch, operands()) == (SMALL[1], True)
    assert len(measured) == 3


def test_nothing_is_measured_during_capture_and_later_it_is(as_on_gpu, monkeypatch) -> None:
    times, measured = as_on_gpu
    times += [3.0, 1.0, 2.0]
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert tuner.config_for(tuner.FORWARD, P, "ieee", launch, operands()) == (SMALL[0], False)
    assert measured == []
    assert tuner.config_for(tuner.FORWARD, P, "ieee", launch, operands()) == (SMALL[1], True)


def test_data_that_cannot_be_compared_ends_in_the_default(as_on_gpu, caplog) -> None:
    _, measured = as_on_gpu
    x, *others = operands()
    x[0, 0, 0, 0, 0] = float("inf")
    finals = [
        tuner.config_for(tuner.FORWARD, P, "ieee", launch, (x, *others)) for _ in range(tuner._TRIES + 1)
    ]
    assert finals == [(SMALL[0], False)] * (tuner._TRIES - 1) + [(SMALL[0], True)] * 2
    assert measured == []
    assert caplog.text.count("not measured") == 1


def test_a_layer_keeps_only_what_was_decided(as_on_gpu) -> None:
    """A first call with infinities must not leave a layer with the default for ever."""
    times, _ = as_on_gpu
    times += [3.0, 1.0, 2.0]
    kernel, tensors = backend.TritonConv3d(), operands()
    pack, r = backend._Pack(*tensors[1:4]), request(device=torch.device("cpu"))
    kernel.run(pack, torch.full_like(tensors[0], float("nan")), tensors[4], r)
    assert not pack.launches
    kernel.run(pack, tensors[0], tensors[4], r)
    assert pack.launches[id(r)][2].config == SMALL[1]


def test_the_functional_form_keeps_only_what_was_decided(as_on_gpu, monkeypatch) -> None:
    times, _ = as_on_gpu
    times += [3.0, 1.0, 2.0]
    monkeypatch.setattr(conv3d, "_known", {})
    x, weight, scale, bias, residual = operands()
    geometry = {"padding": P.padding, "activation": P.activation}
    conv3d.conv3d(torch.full_like(x, float("nan")), weight, scale, bias, residual, **geometry)
    assert not conv3d._known
    conv3d.conv3d(x, weight, scale, bias, residual, **geometry)
    assert [run.config for run in conv3d._known.values()] == [SMALL[1]]
    monkeypatch.setattr(conv3d, "chosen", lambda *a: pytest.fail("chosen again"))
    monkeypatch.setattr(conv3d, "checked_problem", lambda *a: pytest.fail("checked again"))
    conv3d.conv3d(x, weight, scale, bias, residual, **geometry)


def test_a_known_call_is_known_by_all_of_its_arguments() -> None:
    """What is remembered of a call must not let through another that does not fit."""
    x, weight, scale, bias, residual = operands()
    geometry = {"padding": P.padding, "activation": P.activation}
    conv3d.conv3d(x, weight, scale, bias, residual, **geometry)
    with pytest.raises(TypeError, match=r"weight: expected torch\.float32"):
        conv3d.conv3d(x, weight.half(), scale, bias, residual, **geometry)
    with pytest.raises(ValueError, match="residual: expected the output's shape"):
        conv3d.conv3d(x, weight, scale, bias, residual[:1], **geometry)
    with pytest.raises(TypeError, match=r"bias: expected torch\.float32"):
        conv3d.conv3d(x, weight, scale, bias.double(), residual, **geometry)
    with pytest.raises(ValueError, match=r"scale: expected shape \[16\], got \[15\]"):
        conv3d.conv3d(x, weight, scale[1:], bias, residual, **geometry)


# ---- gradients ----

G = ConvProblem.parse("n2c16d2h3w4k20f1x1x3s1x1x2p0x0x1")
PARTS = [Config.parse(f"pixels {m}x16x16 w4 s2 g8 k{k}") for m, k in ((16, 1), (16, 2), (32, 1))]
GRADIENTS = {"input gradient": (tuner.INPUT_GRAD, SMALL), "weight gradient": (tuner.WEIGHT_GRAD, PARTS)}
gradients = pytest.mark.parametrize("what", GRADIENTS)


@pytest.fixture
def gradients_as_on_gpu(as_on_gpu, monkeypatch):
    monkeypatch.setattr(tuner.configs, "input_grads", lambda *a: SMALL)
    monkeypatch.setattr(tuner.configs, "weight_grads", lambda *a: PARTS)
    monkeypatch.setattr(conv3d, "_known", {})
    return as_on_gpu


def gradient(what: str, dy_scale: float = 1.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """What the operation returns and what it should."""
    t = G.tensors(torch.float32, seed=seed)
    dy = torch.randn(G.out_shape, generator=torch.Generator().manual_seed(seed)) * dy_scale
    geometry = {"stride": G.stride, "padding": G.padding}
    if what == "input gradient":
        ours = conv3d.conv3d_input_grad(dy, t.weight, G.in_shape, **geometry)
        return ours, tuner.torch_input_grad(G, dy.double(), t.weight.double())
    ours = conv3d.conv3d_weight_grad(t.x, dy, G.weight_shape, **geometry)
    return ours, tuner.torch_weight_grad(G, t.x.double(), dy.double())


def spoil(monkeypatch, what: str, which: list[Config], how) -> None:
    name = what.replace("gradient", "grad").replace(" ", "_")
    real = getattr(conv3d, name)

    def make(problem, config, precision):
        run = real(problem, config, precision)
        return (lambda *tensors: how(run(*tensors))) if config in which else run

    monkeypatch.setattr(conv3d, name, make)


@gradients
def test_gradients_are_tuned_and_remembered(what, gradients_as_on_gpu, monkeypatch, tmp_path) -> None:
    """The fastest that is right; the cache on disk is the one of all others; a known call asks nothing."""
    times, measured = gradients_as_on_gpu
    times += [3.0, 1.0]
    _, able = GRADIENTS[what]
    spoil(monkeypatch, what, able[2:], one_element)  # the last is wrong and never timed
    for _ in range(2):  # the second finds it on disk
        ours, exact = gradient(what)
        assert (ours.double() - exact).norm() <= 1e-6 * exact.norm()
        assert measured == [3.0, 1.0], "measured once"
        with monkeypatch.context() as patch:
            patch.setattr(tuner, "config_for", lambda *a: pytest.fail("chosen again"))
            assert torch.equal(gradient(what)[0], ours)
        new_process(monkeypatch)
        conv3d._known.clear()
    text = (tmp_path / "tuning-v1.json").read_text()
    assert f"triton {what} {G}".removesuffix("+relu") in text
    assert str(able[1]) in text
    assert str(able[2]) not in text


@gradients
@pytest.mark.parametrize("dy_scale", [0.0, float("inf")])
def test_gradients_that_tell_nothing_are_measured_on_random_numbers(
    what, dy_scale, gradients_as_on_gpu, monkeypatch
) -> None:
    """A norm that starts at zero, a loss scale that is too large: the wrong configuration is found all the same."""
    times, measured = gradients_as_on_gpu
    times += [3.0, 1.0]
    _, able = GRADIENTS[what]
    spoil(monkeypatch, what, able[:1], torch.zeros_like)
    state = torch.get_rng_state()
    gradient(what, dy_scale)
    assert torch.equal(torch.get_rng_state(), state), "the user's random numbers stay what they are"
    assert measured == [3.0, 1.0]
    assert list(tuner._known.values()) == [able[2]]


@gradients
def test_where_no_gradient_of_ours_is_right_torch_computes_it(
    what, gradients_as_on_gpu, monkeypatch, caplog
) -> None:
    _, able = GRADIENTS[what]
    spoil(monkeypatch, what, able, one_element)
    for _ in range(2):
        ours, exact = gradient(what)
        assert (ours.double() - exact).norm() <= 1e-6 * exact.norm()
        assert ours.is_contiguous(memory_format=torch.channels_last_3d)
    assert caplog.text.count(f"torch's own {what} is used: no Triton configuration works here") == 1


@gradients
def test_no_memory_to_measure_is_no_error(what, gradients_as_on_gpu, monkeypatch) -> None:
    _, able = GRADIENTS[what]
    times, measured = gradients_as_on_gpu
    times += [3.0, 1.0, 2.0]

    def full(run) -> float:
        raise torch.cuda.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(tuner, "gpu_seconds", full)
        ours, exact = gradient(what)
    assert (ours.double() - exact).norm() <= 1e-6 * exact.norm()
    assert not conv3d._known, "nothing is kept of a choice that is none"
    gradient(what)
    assert list(tuner._known.values()) == [able[1]]
    assert len(measured) == 3


def test_an_impossible_gradient_is_still_the_callers_error(gradients_as_on_gpu) -> None:
    with pytest.raises(ValueError, match="kernel_size: expected at most 31 taps"):
        conv3d.conv3d_input_grad(torch.zeros(1, 6, 1, 1, 8), torch.zeros(6, 4, 1, 1, 33), (1, 4, 1, 1, 40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_right_gradients_agree_with_the_reference(dtype: torch.dtype) -> None:
    """On real configurations, with more pixels than a tile."""
    p = ConvProblem.parse("n3c24d1h9w8k20f1x1x3p0x0x1")
    t = p.tensors(dtype)
    dy = torch.randn(p.out_shape).to(dtype).contiguous(memory_format=torch.channels_last_3d)
    where, precision = config.machine(t.x.device), config.precision_of(dtype)
    for task, make, tensors in (
        (tuner.INPUT_GRAD, conv3d.input_grad, (dy, t.weight)),
        (tuner.WEIGHT_GRAD, conv3d.weight_grad, (t.x, dy)),
    ):
        expected = task.reference(p, tensors)
        for wanted in task.candidates(p, dtype, precision, where):
            y = make(p, wanted, precision)(*tensors)
            assert tuner.disagreement(y, expected, precision) is None
            assert "are wrong" in tuner.disagreement(one_element(y), expected, precision)


def test_the_space_of_gradients_is_small_and_fits() -> None:
    texts = (
        "n8c128d8h28w28k256f3p1",
        "n8c64d16h56w56k128f3s2p1",
        "n1c512d2h7w7k512f3p1",
        "n8c3d16h112w112k64f3x7x7s1x2x2p1x3x3",
        "n8c230d8h28w28k45f3x1x1p1x0x0",
        "n0c64d4h7w7k64f3p1",
    )
    for arch in (80, 86, 90, 100, 120):
        where = config.Machine(arch, 132, config._SHARED.get(arch, 101376))
        for text in texts:
            p = ConvProblem.parse(text)
            for dtype, precision in (
                (torch.bfloat16, "half"),
                (torch.float32, "tf32"),
                (torch.float32, "ieee"),
            ):
                for make in (config.input_grads, config.weight_grads):
                    able = make(p, dtype, precision, where)
                    assert 1 <= len(able) <= 8, "the first use of a layer would take too long"
                    assert len(set(able)) == len(able)
                    assert all(c.shared(dtype.itemsize) <= where.shared for c in able)


def test_the_space_is_pruned_by_class() -> None:
    """Few configurations for each class, none of a class that wants other tiles, and all of them within the machine."""
    where = config.Machine(90, 132, config._SHARED[90])
    stem = ConvProblem.parse("n8c3d16h112w112k64f3x7x7s1x2x2p1x3x3+relu")
    wide = ConvProblem.parse("n8c128d8h28w28k256f3p1+relu")
    narrow = ConvProblem.parse("n8c64d16h56w56k64f3p1+relu")
    late = ConvProblem.parse("n1c512d2h7w7k512f3p1+relu")
    found = {p: config.candidates(p, torch.bfloat16, "half", where) for p in (stem, wide, narrow, late)}
    assert [c.kernel for c in found[stem]] == ["rows"] * 3 + ["packed"] * 2
    assert max(c.bn for c in found[narrow]) == 64
    assert min(c.bn for c in found[wide][:2]) == 128
    assert any(c.split > 1 for c in found[late])
    for p, able in found.items():
        assert 2 <= len(able) <= 12
        assert len(set(able)) == len(able)
        assert all(c.shared(2) <= where.shared for c in able)
        assert able[0] == config.default(p, torch.bfloat16, "half", where)
