"""Which kernel runs a max-pool or a head on a GPU: the choice, on CPU tensors that pass for a GPU's."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

import r3d_kernels as r3d
from r3d_kernels import _extension, _pools, ops, reference, tuning

X = torch.randn(2, 6, 4, 6, 6)
WEIGHT, BIAS = torch.randn(3, 6), torch.randn(3)


class Gpu:
    """Three ways that count their calls, and a clock."""

    def __init__(self, op: _pools._Operation, right) -> None:
        self.op, self.right = op, right
        self.calls: list[str] = []
        self.seconds = {"cuda": 3.0, "triton": 2.0, "torch": 1.0}
        self.spoil = lambda y: y

    def way(self, name: str):
        def run(*operands) -> Tensor:
            self.calls.append(name)
            y = self.right(*operands)
            return self.spoil(y) if name == "triton" else y

        return run

    def measure(self, run) -> float:
        before = len(self.calls)
        run()
        return self.seconds[self.calls[before]]

    def last(self) -> str:
        return self.calls[-1]


OPERATIONS = {
    "max-pool": (_pools._MAX_POOL, reference.max_pool3d, lambda: ops.max_pool3d(X, 3, 2, 1)),
    "head": (_pools._HEAD, reference.avg_pool_linear, lambda: ops.avg_pool_linear(X, WEIGHT, BIAS)),
}


@pytest.fixture(params=OPERATIONS)
def gpu(request, monkeypatch, tmp_path):
    op, right, call = OPERATIONS[request.param]
    fake = Gpu(op, right)
    fake.call = call
    for name in op.ways:
        monkeypatch.setitem(op.ways, name, fake.way(name))
    monkeypatch.setenv("R3D_KERNELS_TUNE", "1")
    monkeypatch.setenv("R3D_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "shared", tuning.TuningCache())
    monkeypatch.setattr(tuning, "gpu_seconds", fake.measure)
    monkeypatch.setattr(_pools, "_plans", {})
    monkeypatch.setattr(_pools, "_on_gpu", lambda x: True)
    monkeypatch.setattr(_pools, "why_not_here", lambda device, dtype: None)
    monkeypatch.setattr(_extension, "takes", lambda x: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return fake


def new_process(monkeypatch) -> None:
    monkeypatch.setattr(tuning, "shared", tuning.TuningCache())
    monkeypatch.setattr(_pools, "_plans", {})


@pytest.mark.parametrize("fastest", ["cuda", "triton", "torch"])
def test_the_fastest_is_measured_once_and_remembered(fastest: str, gpu, monkeypatch, tmp_path) -> None:
    gpu.seconds[fastest] = 0.5
    gpu.call()
    assert gpu.last() == fastest
    assert set(gpu.calls) == {"cuda", "triton", "torch"}
    gpu.calls.clear()
    gpu.call()
    assert gpu.calls == [fastest], "nothing is asked twice"
    new_process(monkeypatch)
    monkeypatch.setattr(tuning, "gpu_seconds", lambda run: pytest.fail("measured again"))
    gpu.calls.clear()
    gpu.call()
    # what is compiled by the Triton of today is compared again, by each process that takes it
    assert gpu.calls == (["triton", "torch", "triton"] if fastest == "triton" else [fastest])
    assert gpu.op.name in (tmp_path / "tuning-v1.json").read_text()


def test_the_preferred_wins_within_the_noise(gpu) -> None:
    gpu.seconds = {"cuda": 1.02, "triton": 1.0, "torch": 1.01}
    gpu.call()
    assert gpu.last() == "cuda"


def test_another_shape_or_dtype_is_another_choice(gpu) -> None:
    gpu.call()
    gpu.seconds["cuda"] = 0.1
    if gpu.op is _pools._MAX_POOL:
        ops.max_pool3d(X, 2)
    else:
        ops.avg_pool_linear(X.bfloat16(), WEIGHT.bfloat16())
    assert gpu.last() == "cuda"
    gpu.call()
    assert gpu.last() == "torch"


def one_element(y: Tensor) -> Tensor:
    y = y.clone()
    y.view(-1)[-1] += 10.0
    return y


def fails(y: Tensor) -> Tensor:
    raise ValueError("at 3:4: no\nand a long story")


@pytest.mark.parametrize(
    ("spoil", "why"), [(one_element, "wrong|from torch's"), (fails, "ValueError: at 3:4: no$")]
)
def test_a_wrong_result_of_triton_cannot_win(spoil, why, gpu, caplog) -> None:
    gpu.spoil = spoil
    gpu.seconds["triton"] = 0.1
    gpu.call()
    assert gpu.last() == "torch"
    (record,) = caplog.records
    assert re.search(why, record.getMessage())
    with r3d.backend("triton"):
        gpu.call()
    assert gpu.last() == "torch", "not even where it is asked for"


def test_not_a_number_is_no_disagreement(gpu, monkeypatch) -> None:
    x = X.clone()
    x[0, 2, 1, 2, 3] = float("nan")
    gpu.seconds["triton"] = 0.1
    monkeypatch.setitem(globals(), "X", x)
    gpu.call()
    assert gpu.last() == "triton"


@pytest.mark.parametrize(
    ("asked", "way"), [("cuda", "cuda"), ("triton", "triton"), ("torch", "torch"), ("cpu", "torch")]
)
def test_the_backend_asked_for_decides(asked: str, way: str, gpu, monkeypatch) -> None:
    monkeypatch.setattr(tuning, "gpu_seconds", lambda run: pytest.fail("there is nothing to choose"))
    with r3d.backend(asked):
        gpu.call()
    assert gpu.last() == way


def test_what_is_missing_is_passed_over(gpu, monkeypatch) -> None:
    monkeypatch.setattr(_pools, "why_not_here", lambda device, dtype: "has no such dtype")
    gpu.seconds["triton"] = 0.1
    gpu.call()
    assert "triton" not in gpu.calls
    monkeypatch.setattr(_extension, "takes", lambda x: False)
    new_process(monkeypatch)
    for asked in ("cuda", "triton", "auto"):
        with r3d.backend(asked):
            gpu.call()
        assert gpu.last() == "torch"


def test_without_tuning_the_preferred_runs(gpu, monkeypatch) -> None:
    monkeypatch.setenv("R3D_KERNELS_TUNE", "0")
    monkeypatch.setattr(tuning, "gpu_seconds", lambda run: pytest.fail("measured"))
    gpu.call()
    assert gpu.last() == "cuda"


def test_nothing_is_decided_during_capture(gpu, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        gpu.call()
        assert gpu.calls == ["cuda"]
        with r3d.backend("triton"):  # nothing can be compiled now
            gpu.call()
        assert gpu.calls == ["cuda", "torch"]
    gpu.seconds["triton"] = 0.1
    gpu.call()
    assert gpu.last() == "triton"
    with monkeypatch.context() as patch:  # what was chosen before runs in a capture too
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        gpu.call()
    assert gpu.last() == "triton"


def test_an_empty_batch_decides_nothing(gpu) -> None:
    if gpu.op is _pools._MAX_POOL:
        assert ops.max_pool3d(X[:0], 3, 2, 1).shape == (0, 6, 2, 3, 3)
    else:
        assert ops.avg_pool_linear(X[:0], WEIGHT, BIAS).shape == (0, 3)
    assert gpu.calls == ["cuda"]
    assert not _pools._plans
