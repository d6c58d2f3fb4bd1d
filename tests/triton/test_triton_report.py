"""The GPU report's check of the Triton kernels, on the interpreter: it passes, and it can fail."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu_report

import r3d_kernels as r3d
from r3d_kernels import backends
from r3d_kernels.problems import ConvProblem
from r3d_kernels.triton import launch

pytestmark = pytest.mark.usefixtures("interpreter")

SMALL = ("n1c16d2h4w5k20f1x3x3p0x1x1+res+relu", "n1c3d3h6w6k8f3s2p1")


def test_the_check_passes() -> None:
    with torch.backends.cudnn.flags(allow_tf32=False):
        data = gpu_report.check_triton(device="cpu", problems=SMALL)
    assert data["cases"] >= 3 * len(SMALL) * 3
    assert data["largest_error"]["float32"] < gpu_report.FP32_PROMISE


def test_a_wrong_gradient_is_found(monkeypatch) -> None:
    right = launch.InputGrad.__call__
    monkeypatch.setattr(launch.InputGrad, "__call__", lambda self, dy, weight: right(self, dy, weight) * 1.05)
    with pytest.raises(gpu_report.Failed, match=r"3 of .* cases are wrong, first .*input gradient"):
        gpu_report.check_triton(device="cpu", problems=SMALL[1:])


def test_every_problem_of_the_report_is_one() -> None:
    for text in gpu_report.TRITON_PROBLEMS:
        ConvProblem.parse(text).validate()


def test_the_plan_has_the_sections() -> None:
    names = [s.name for s in gpu_report.plan(lambda: 0.0)]
    # what decides whether the numbers mean anything comes before them
    assert names.index("Triton against float64") < names.index("Triton: r3d_18 bf16 batch 32")


def layers(left: float, problems=SMALL, template=None) -> tuple[dict, list[set[str]]]:
    """The section, and which engines were timed for each layer."""
    timed: list[set[str]] = []

    def timer(calls, rounds: int) -> dict[str, float]:
        timed.append(set(calls))
        for call in calls.values():
            call()
        return {name: 2e-3 if name == "triton" else 3e-3 for name in calls}

    template = template or (lambda call, operands: call)
    with r3d.backend("triton"), torch.backends.cudnn.flags(allow_tf32=False):
        data = gpu_report.triton_layers(
            [(ConvProblem.parse(text), 2) for text in problems],
            "fp32",
            lambda: left,
            device="cpu",
            timer=timer,
            template=template,
        )
    return data, timed


def test_each_layer_beside_cudnn_and_inductor() -> None:
    data, timed = layers(left=100.0)
    assert all({"stock", "triton", "inductor"} <= engines for engines in timed)
    for row, text in zip(data["layers"], SMALL, strict=True):
        assert (row["problem"], row["count"]) == (str(ConvProblem.parse(text)), 2)
        assert row["triton_is_faster_than"]["cuDNN eager"] == 1.5
        assert row["triton_is_faster_than"]["inductor's template"] == 1.5
        assert row["triton_is_faster_than"]["our CUDA kernels"] == "not measured"
        assert all(row["errors"][name] < 1e-5 for name in ("stock", "triton", "inductor"))
        cuda = {k.name for k in backends.KERNELS if k.backend == "cuda"}
        assert cuda <= set(row["reasons"]), "each of our CUDA kernels says why it did not run"


def test_what_the_budget_or_inductor_leaves_out_is_not_measured() -> None:
    data, timed = layers(left=10.0)
    assert not any("inductor" in engines for engines in timed)
    assert data["layers"][0]["reasons"]["inductor"] == "not measured: 10 s of the budget are left"
    assert data["layers"][0]["triton_is_faster_than"]["inductor's template"] == "not measured"

    def none(call, operands):
        raise gpu_report.NotHere("no choices")

    data, _ = layers(left=100.0, template=none)
    assert data["layers"][0]["reasons"]["inductor"] == "not measured: no choices"


def test_the_layers_of_a_network() -> None:
    found = gpu_report.network_layers("r3d_18", 8)
    assert sum(count for _, count in found) == 20
    assert all(p.n == 8 for p, _ in found)


def test_a_network_that_is_not_triton_alone_is_found(monkeypatch) -> None:
    """The floor is of Triton alone: a layer that another backend ran would make it of something else."""
    model = r3d.ResNet3D(3, depth=10, widen_factor=0.125).eval()
    x = torch.randn(1, 3, 4, 16, 16)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())

    def placed(name: str, dtype: torch.dtype, fused: bool) -> torch.nn.Module:
        other = copy.deepcopy(model)
        other.fused = fused
        return other

    monkeypatch.setattr(gpu_report, "_placed", placed)
    monkeypatch.setattr(gpu_report, "_reference", lambda name: exact)
    monkeypatch.setattr(gpu_report.measure, "clip", lambda batch: x)
    monkeypatch.setattr(gpu_report, "gpu_seconds", lambda calls, rounds: dict.fromkeys(calls, 1e-3))
    assert gpu_report.triton_network("", "fp32", 1, device="cpu")["triton_is_faster"] == 1.0
    monkeypatch.setattr(backends.TritonConv3d, "can_run", lambda self, request: "not today")
    with pytest.raises(gpu_report.Failed, match=r"layers did not run through Triton.*not today"):
        gpu_report.triton_network("", "fp32", 1, device="cpu")
