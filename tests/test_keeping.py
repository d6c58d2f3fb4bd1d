"""How many bytes of turned weights the layers of a process keep."""

from __future__ import annotations

import dataclasses
import gc
import threading

import pytest
import torch
from numerics import assert_keeps_promise

import r3d_kernels as r3d
from r3d_kernels import _keeping, backends, tuning
from r3d_kernels.problems import ConvProblem

P = ConvProblem.parse("n1c128d1h4w4k128f3p1+relu")  # keeps a third of its weights: 576 KiB
SIZE = 128 * 128 * 9 * 4


@pytest.fixture(autouse=True)
def keeping(monkeypatch):
    """A process that keeps nothing yet."""
    mine = _keeping.Keeping()
    monkeypatch.setattr(_keeping, "shared", mine)
    return mine


def layer() -> r3d.ConvBNAct3d:
    return r3d.ConvBNAct3d(P.c, P.k, 3, padding=1).eval()


def kernel_of(module: r3d.ConvBNAct3d, dtype: torch.dtype = torch.float32) -> str:
    with torch.inference_mode():
        module(torch.randn(P.in_shape, dtype=dtype))
    return backends.explain(module)[-1].kernel.split()[1]


def test_a_layer_of_few_pixels_keeps_what_matters_of_its_weights(keeping) -> None:
    module = layer()
    assert kernel_of(module) == "kept"
    assert keeping.held == SIZE
    with torch.no_grad():
        module.conv.weight.mul_(2)
    assert kernel_of(module) == "kept"  # the old ones went
    gc.collect()
    assert keeping.held == SIZE
    del module
    gc.collect()
    assert keeping.held == 0


def test_no_more_than_the_limit_and_the_same_result_beyond_it(keeping, monkeypatch) -> None:
    monkeypatch.setattr(_keeping, "LEAN", 2 * SIZE)
    modules = [layer() for _ in range(4)]
    for module in modules[1:]:
        module.load_state_dict(modules[0].state_dict())
    x = torch.randn(P.in_shape)
    with torch.inference_mode():
        outputs = [module(x) for module in modules]
    assert [backends.explain(m)[-1].kernel.split()[1] for m in modules[:2]] == ["kept", "kept"]
    assert not any("kept" in backends.explain(m)[-1].kernel for m in modules[2:])
    assert keeping.held == 2 * SIZE
    with torch.no_grad():
        want = modules[0].double()(x.double())
    for output in outputs:
        assert_keeps_promise(output, want)
    del modules[0], module
    gc.collect()
    assert keeping.held == SIZE


def test_what_it_says_when_there_is_no_room(keeping, monkeypatch) -> None:
    request = backends.Request(P, torch.float32, torch.device("cpu"), 2)
    monkeypatch.setattr(_keeping, "LEAN", SIZE - 1)
    _, reasons = backends.candidates(request)
    assert "would keep 0 MiB beside 0 MiB" in reasons["direct kept"]
    monkeypatch.setenv("R3D_KERNELS_MEMORY", "fast")
    assert "direct kept" in [k.name for k in backends.candidates(request)[0]]


def test_bfloat16_keeps_weights_only_where_memory_does_not_matter(monkeypatch) -> None:
    request = backends.Request(P, torch.bfloat16, torch.device("cpu"), 2)
    assert "float32 weights only" in backends.candidates(request)[1]["direct kept"]
    monkeypatch.setenv("R3D_KERNELS_MEMORY", "fast")
    assert "direct kept" not in backends.candidates(request)[1]


def test_batches_keep_weights_only_where_memory_does_not_matter(monkeypatch) -> None:
    request = backends.Request(dataclasses.replace(P, n=2), torch.float32, torch.device("cpu"), 2)
    assert "one clip at a time, got 2" in backends.candidates(request)[1]["direct kept"]
    monkeypatch.setenv("R3D_KERNELS_MEMORY", "fast")
    assert "direct kept" not in backends.candidates(request)[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n1c64d3h19w19k64f3p1", "1024 output pixels, got 1083"),
        ("n0c64d1h4w4k64f3p1", "1024 output pixels, got 0"),
        ("n1c3d2h7w7k64f7p3", "at most 32 taps"),
        ("n1c64d1h4w4k64f3p1g2", "groups=1 only"),
    ],
)
def test_what_it_is_not_for(text: str, message: str) -> None:
    request = backends.Request(ConvProblem.parse(text), torch.float32, torch.device("cpu"), 2)
    assert message in backends.candidates(request)[1]["direct kept"]


def test_a_race_for_the_last_bytes_keeps_the_limit(keeping) -> None:
    held = []

    def work() -> None:
        for _ in range(200):
            held.append(keeping.reserve(1, 100))  # noqa: PERF401 - one at a time

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(r is not None for r in held) == 100 == keeping.held
    held.clear()
    gc.collect()
    assert keeping.held == 0


def test_measurements_serve_with_and_without_room(keeping, monkeypatch, tmp_path) -> None:
    """What was measured while there was room chooses among the others where there is none, without measuring again."""
    monkeypatch.setenv("R3D_KERNELS_TUNE", "1")
    monkeypatch.setenv("R3D_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "shared", tuning.TuningCache())
    first = backends.choose_for(P, torch.float32)
    assert first.measured_now
    assert "direct kept" in first.seconds
    monkeypatch.setattr(_keeping, "LEAN", 0)
    second = backends.choose_for(P, torch.float32)
    assert not second.measured_now
    assert "direct kept" not in second.seconds
    assert second.kernel.name != "direct kept"
    # and measured again where a candidate is new
    machine, key = backends.cache_key(
        backends.Request(P, torch.float32, torch.device("cpu"), torch.get_num_threads()), "auto"
    )
    tuning.shared.put(machine, key, second.kernel.name, second.seconds)
    monkeypatch.setattr(_keeping, "LEAN", 1 << 30)
    assert backends.choose_for(P, torch.float32).measured_now


def test_a_second_look_finds_room_for_what_is_kept_already(keeping, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("R3D_KERNELS_TUNE", "1")
    monkeypatch.setenv("R3D_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "shared", tuning.TuningCache())
    monkeypatch.setattr(_keeping, "LEAN", SIZE)  # for one layer, not for the same one twice
    monkeypatch.setattr(backends, "_LATER", (0.0,))
    measured = []

    def measure(kernels, *args) -> dict[str, float]:
        measured.append([k.name for k in kernels])
        return {k.name: {"direct kept": 1.0, "direct": 1.2}.get(k.name, 9.0) for k in kernels}

    monkeypatch.setattr(backends, "measure", measure)
    module = layer()
    for _ in range(3):
        assert kernel_of(module) == "kept"
    assert [set(names) for names in measured[1:]] == [{"direct kept", "direct"}]
    gc.collect()
    assert keeping.held == SIZE
