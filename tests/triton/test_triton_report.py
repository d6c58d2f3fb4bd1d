"""The GPU report's check of the Triton kernels, on the interpreter: it passes, and it can fail."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu_report

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
