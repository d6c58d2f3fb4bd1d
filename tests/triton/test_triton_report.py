"""The GPU report's check of the Triton kernels, on the interpreter: it passes, and it can fail."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu_common
import gpu_networks
import gpu_report
import gpu_sections
import gpu_triton
import gpu_triton_layers
from numerics import relative_error

import r3d_kernels as r3d
from r3d_kernels import backends
from r3d_kernels.problems import ConvProblem
from r3d_kernels.triton import launch, norm

pytestmark = pytest.mark.usefixtures("interpreter")

SMALL = ("n1c16d2h4w5k20f1x3x3p0x1x1+res+relu", "n1c3d3h6w6k8f3s2p1")


def test_the_check_passes() -> None:
    with torch.backends.cudnn.flags(allow_tf32=False):
        data = gpu_triton_layers.check_triton(device="cpu", problems=SMALL)
    assert data["cases"] >= 3 * len(SMALL) * 3
    assert data["largest_error"]["float32"] < gpu_common.FP32_PROMISE


def test_a_wrong_gradient_is_found(monkeypatch) -> None:
    right = launch.InputGrad.__call__
    monkeypatch.setattr(launch.InputGrad, "__call__", lambda self, dy, weight: right(self, dy, weight) * 1.05)
    with pytest.raises(gpu_sections.Failed, match=r"5 of .* cases are wrong, first .*input gradient"):
        gpu_triton_layers.check_triton(device="cpu", problems=SMALL[1:])


def test_every_problem_of_the_report_is_one() -> None:
    for text in gpu_triton_layers.TRITON_PROBLEMS:
        ConvProblem.parse(text).validate()


def test_the_plan_has_the_sections() -> None:
    names = [s.name for s in gpu_report.plan(lambda: 0.0)]
    # what decides whether the numbers mean anything comes before them
    assert names.index("Triton against float64") < names.index("Triton: r3d_18 bf16 batch 32")


def test_norm_and_pools_pass_and_can_fail(monkeypatch) -> None:
    monkeypatch.setattr(gpu_triton, "NORMS", ((2, 5, 2, 3, 5),))
    monkeypatch.setattr(gpu_triton, "CHANNELS", (5,))
    monkeypatch.setattr(gpu_triton, "WINDOWS", gpu_triton.WINDOWS[1:])
    data = gpu_triton.check_norm_and_pools(device="cpu")
    assert data["cases"] == 3 * (7 + 6 + 2 + 2)
    right = norm._input_gradient

    class Wrong:
        arg_names = right.arg_names

        def __getitem__(self, grid):
            def run(*operands, **meta):
                right[grid](*operands, **meta)
                operands[7].mul_(1.05)  # dx

            return run

    monkeypatch.setattr(norm, "_input_gradient", Wrong())
    norm._backward_of.cache_clear()
    with pytest.raises(gpu_sections.Failed, match=r"6 of .* cases are wrong, first .*norm's dx"):
        gpu_triton.check_norm_and_pools(device="cpu")
    norm._backward_of.cache_clear()


def test_gradients_beside_cudnn() -> None:
    def timer(calls, rounds: int) -> dict[str, float]:
        results = {name: call() for name, call in calls.items()}
        assert relative_error(results["triton"], results["stock"].double()) < 1e-5
        return {"triton": 2e-3, "stock": 3e-3}

    problems = [(ConvProblem.parse(SMALL[1]), 2)]
    with torch.backends.cudnn.flags(allow_tf32=False):
        data = gpu_triton.gradient_speed(problems, "fp32", device="cpu", timer=timer)
    (row,) = data["gradients"]
    assert (row["problem"], row["count"]) == (str(problems[0][0]), 2)
    for which in ("input", "weight"):
        assert row[which] == {
            "ms": {"triton": 2.0, "stock": 3.0},
            "timed": "events",
            "triton_is_faster_than_cudnn": 1.5,
        }


def test_pools_through_each_backend() -> None:
    def timer(calls, rounds: int) -> dict[str, float]:
        results = [call() for call in calls.values()]
        assert all(torch.allclose(r.float(), results[0].float(), atol=0.05) for r in results)
        return dict.fromkeys(calls, 1e-6)

    data = gpu_triton.pool_speed("cpu", timer, {"a stem": ((1, 4, 2, 5, 5), (3, 2, 1))}, ((1, 6, 1, 2, 2), 3))
    assert [(r["what"], r["dtype"]) for r in data["pools"]] == [
        (what, dtype) for dtype in ("bfloat16", "float32") for what in ("max-pool of a stem", "head")
    ]
    assert all(set(r["us"]) == {"cuda", "triton", "torch", "auto"} for r in data["pools"])


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
        data = gpu_triton_layers.triton_layers(
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
        raise gpu_sections.NotHere("no choices")

    data, _ = layers(left=100.0, template=none)
    assert data["layers"][0]["reasons"]["inductor"] == "not measured: no choices"


def test_the_layers_of_a_network() -> None:
    found = gpu_networks.network_layers("r3d_18", 8)
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

    monkeypatch.setattr(gpu_triton_layers, "placed", placed)
    monkeypatch.setattr(gpu_triton_layers, "reference", lambda name: exact)
    monkeypatch.setattr(gpu_triton_layers.measure, "clip", lambda batch: x)
    monkeypatch.setattr(gpu_triton_layers, "gpu_seconds", lambda calls, rounds: dict.fromkeys(calls, 1e-3))
    assert gpu_triton_layers.triton_network("r3d_18", "fp32", 1, device="cpu")["triton_is_faster"] == 1.0
    monkeypatch.setattr(backends.TritonConv3d, "can_run", lambda self, request: "not today")
    with pytest.raises(gpu_sections.Failed, match=r"layers did not run through Triton.*not today"):
        gpu_triton_layers.triton_network("r3d_18", "fp32", 1, device="cpu")
