"""What the GPU report asks of each kernel, without a GPU: stand-ins that are right, and such as are not."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import gpu_networks
import gpu_report
import gpu_sm80
import gpu_sm90
import gpu_stem
import measure
from gpu_sections import Failed, NotHere

from r3d_kernels import _pooled, backends
from r3d_kernels._sm90_stem import WINDOWS

# ---- the kernel for compute capability 8.0 ----


def test_devices_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert gpu_networks.check_second_device(("cpu", "cpu"), graphs=False)["errors"] == [0.0, 0.0]
    answers = iter([1.0, 1.0, 1.3])
    monkeypatch.setattr(measure, "relative_error", lambda *_: next(answers))
    with pytest.raises(Failed, match="the answers of cpu, cpu differ"):
        gpu_networks.check_second_device(("cpu", "cpu"), graphs=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(NotHere, match="needs 2 GPUs, found 1"):
        gpu_networks.check_second_device()


def test_the_sm80_checks_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks themselves, with a CPU kernel in the place of the CUDA one."""
    small = [g for g in gpu_sm80.GEOMETRIES if "c512" not in g]
    monkeypatch.setattr(gpu_sm80, "GEOMETRIES", (*small[:9], small[0]))
    monkeypatch.setattr(gpu_sm80, "DTYPES", (torch.float32, torch.bfloat16))
    assert gpu_sm80.check_conv3d(device="cpu", kernel="direct")["cases"] == 20
    assert gpu_sm80.check_repetitions(2, device="cpu", kernel="direct") == {"repetitions": 2}
    assert gpu_sm80.check_pool_and_head(device="cpu") == {"cases": 24}
    assert gpu_sm80.check_clips(device="cpu")["worst"] < 1e-5
    with pytest.raises(NotHere, match="sm80: needs a CUDA tensor, got cpu"):
        gpu_sm80.check_conv3d(device="cpu")


def test_the_sm80_checks_find_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_sm80, "GEOMETRIES", gpu_sm80.GEOMETRIES[:1])
    real = gpu_sm80.Problem.call

    def swapped(problem: gpu_sm80.Problem, name: str) -> Callable[[], torch.Tensor]:
        y = real(problem, "stock")()
        return lambda: y * 1.05 if name == "direct" else y

    monkeypatch.setattr(gpu_sm80.Problem, "call", swapped)
    with pytest.raises(Failed, match="3 of 3 cases are wrong"):
        gpu_sm80.check_conv3d(device="cpu", kernel="direct")


def test_the_sm80_kernel_on_paper() -> None:
    if not hasattr(torch.ops.r3d_kernels, "conv3d_sm80_choice"):
        pytest.skip("built without nvcc")
    for batch in (1, 32):
        rows = gpu_sm80.on_paper("r3d_18", batch, 108)
        assert len(rows) > 5
        assert all(0 < row["share"] < 1 for row in rows)
        total = sum(row["gflop"] for row in rows)
        assert max(row["gflop"] for row in rows) > total / len(rows)
    assert max(row["share"] for row in rows) > 0.8


# ---- the Hopper convolution's sections ----


def sm90_by_stock(wrong: float = 0.0) -> Callable[..., torch.Tensor]:
    """The kernel's answer, computed in float64 and rounded once."""

    def ours(w: gpu_sm90.Work, tiles: int = -1, split: int = 0) -> torch.Tensor:
        return (w.exact[0] * (1 + wrong)).to(w.x.dtype)

    return ours


def test_the_hopper_cases_and_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_sm90.Work, "ours", sm90_by_stock())
    monkeypatch.setattr(gpu_sm90, "CORNERS", gpu_sm90.CORNERS[:6])
    rows = gpu_sm90.check(device="cpu")
    assert all(row["worst"] <= 1 for row in rows)
    tiles = {"x".join(map(str, t)) for t in gpu_sm90.TILES}
    noted: list[int] = []
    monkeypatch.setattr(gpu_sm90, "EVERY_TILE", ())
    gpu_sm90.check(device="cpu", note=lambda rows: noted.append(len(rows)))
    assert noted == list(range(1, 13))
    assert {row["tile"] for row in rows} == {"chosen", "chosen, copied"} | tiles
    # Corners with three different paddings come first.
    assert len(set(gpu_sm90.ConvProblem.parse(rows[0]["problem"]).padding)) == 3
    assert set(gpu_sm90.different_bits(2, device="cpu").values()) == {0}

    monkeypatch.setattr(gpu_sm90, "require_sm90", lambda: None)
    monkeypatch.setattr(gpu_sm90, "check", lambda note: rows)
    assert gpu_sm90.check_sm90()["runs"] == len(rows)
    monkeypatch.setattr(gpu_sm90, "check", lambda note: [*rows, {**rows[0], "worst": math.nan}])
    with pytest.raises(Failed, match="1 of"):
        gpu_sm90.check_sm90()


def test_a_wrong_hopper_result_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_sm90, "EVERY_TILE", ())
    monkeypatch.setattr(gpu_sm90, "CORNERS", gpu_sm90.CORNERS[:6])
    monkeypatch.setattr(gpu_sm90.Work, "ours", sm90_by_stock(wrong=0.02))
    assert all(row["worst"] > 1 for row in gpu_sm90.check(device="cpu"))


def test_the_stock_twin_of_a_hopper_case_is_the_same_layer() -> None:
    p = gpu_sm90.ConvProblem.parse("n2c24d4h5w6k24f1x3x5p0x2x1+res+relu")
    w = gpu_sm90.work(p, torch.float32, device="cpu")
    assert measure.relative_error(w.stock(), w.exact[0]) < 1e-5
    w = gpu_sm90.work(gpu_sm90.ConvProblem.parse("n2c13d4h5w6k11f3p1+res"), torch.float32, device="cpu")
    dense = w.dense()
    assert (w.x.stride(4), dense.x.stride(4), dense.residual.stride(4)) == (16, 13, 11)
    assert torch.equal(w.stock(), dense.stock())


def test_a_hopper_run_that_raises_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    right = sm90_by_stock()

    def ours(w: gpu_sm90.Work, tiles: int = -1, split: int = 0) -> torch.Tensor:
        if w.problem.padding == (0, 1, 2):
            raise RuntimeError("cuTensorMapEncodeIm2col refuses (x [1, 8]\nmore")
        return right(w, tiles, split)

    monkeypatch.setattr(gpu_sm90, "EVERY_TILE", ())
    monkeypatch.setattr(gpu_sm90, "CORNERS", gpu_sm90.CORNERS[:2])
    monkeypatch.setattr(gpu_sm90.Work, "ours", ours)
    rows = gpu_sm90.check(device="cpu")
    assert [row["worst"] <= 1 for row in rows] == [False, False, True, True]
    assert rows[0]["error"] == "cuTensorMapEncodeIm2col refuses (x [1, 8]"


def test_hopper_speed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, noted = [], []

    class Work(gpu_sm90.Work):
        def cudnn_fused(self) -> torch.Tensor:
            if self.problem.residual:
                raise RuntimeError("GET was unable to find an engine\nmore")
            return torch.empty(0)

        def ours(self, tiles: int = -1, split: int = 0) -> torch.Tensor:
            assert tiles == 0b101
            return torch.empty(0)

    def seconds(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
        calls["ours"]()
        return {name: times[name] for name in calls}

    monkeypatch.setattr(gpu_sm90, "work", lambda p, dtype, device: seen.append(p) or Work(p, *[None] * 5))
    times = {"ours": 1e-3, "stock": 2e-3, "cudnn_fused": 1.5e-3}
    rows = gpu_sm90.speed(
        seconds, 500.0, "r3d_18", 2, note=lambda r: noted.append(len(r)), usable=lambda padded: 0b101
    )
    assert len(rows) == len(seen) == 14  # all but the stem
    assert noted == list(range(1, 15))
    row = next(r for r in rows if r["layer"] == "layer1.0.conv1.0")
    assert row["tflop_per_s"] == round(2 * 11.098e9 / 1e-3 / 1e12, 1)
    assert row["share_of_matmul"] == pytest.approx(22.2 / 500, abs=1e-3)
    assert row["ours_is_faster"] == 2.0
    assert row["cudnn_fused_us"] == 1500.0
    assert row["predicted"]["tile"] == "480x64x3"
    assert 0 < row["predicted"]["us"] < 1000
    residual = next(r for r in rows if r["layer"] == "layer1.0.conv2.0")
    assert residual["cudnn_fused_us"] == "not measured"
    assert residual["cudnn_fused_reason"] == "GET was unable to find an engine"

    # What the floors are about: every 3x3x3 layer, the strided and the small ones too.
    assert gpu_sm90.shares(rows)["least_share_64_layer"] == "layer2.0.conv1.0"
    for r in rows:
        r["share_of_matmul"] = 0.9
    next(r for r in rows if r["layer"] == "layer4.1.conv1.0")["share_of_matmul"] = 0.5
    next(r for r in rows if r["layer"] == "layer2.0.downsample.0")["share_of_matmul"] = 0.1  # 1x1x1
    found = gpu_sm90.shares(rows)
    assert (found["least_share_wide"], found["least_share_wide_layer"]) == (0.5, "layer4.1.conv1.0")
    assert found["least_share_64"] == 0.9
    assert gpu_sm90.shares([]) == {}


def test_cudnns_fused_convolution_gets_the_same_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def conv(
        x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int
    ) -> torch.Tensor:
        return torch.nn.functional.conv3d(x, weight, bias, stride, padding, dilation, groups)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", lambda *a: conv(*a).relu())
    monkeypatch.setattr(
        torch, "cudnn_convolution_add_relu", lambda x, w, z, alpha, *a: (conv(x, w, *a) + alpha * z).relu()
    )
    for text in ("n2c24d4h5w6k24f1x3x5p0x2x1+relu", "n1c13d4h5w6k11f3p1x0x2s2x1x2+res+relu"):
        w = gpu_sm90.work(gpu_sm90.ConvProblem.parse(text), torch.float32, device="cpu")
        assert measure.relative_error(w.cudnn_fused(), w.exact[0]) < 1e-5
    with pytest.raises(RuntimeError, match="ReLU only"):
        gpu_sm90.work(
            gpu_sm90.ConvProblem.parse("n1c8d3h5w6k8f3p1"), torch.float32, device="cpu"
        ).cudnn_fused()


def test_hopper_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    class Work(gpu_sm90.Work):
        def ours(self, tiles: int = -1, split: int = 0) -> torch.Tensor:
            asked.append((tiles, split))
            return torch.empty(0)

    monkeypatch.setattr(gpu_sm90, "work", lambda p, dtype, device: Work(p, *[None] * 5))

    def seconds(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
        for call in calls.values():
            call()
        return {name: 1e-3 if name == "128x128x1" else 2e-3 for name in calls}

    rows = gpu_sm90.tiles(seconds, "r3d_18", 8)
    assert len(rows) == 14
    for row in rows:
        assert set(row["us"]) == set(row["split"]) == set(row["predicted_us"])
        assert row["chosen"] in row["us"]
        assert row["best"] == "128x128x1"
        # the rule takes the least prediction
        assert row["predicted_us"][row["chosen"]] == min(row["predicted_us"].values())
    assert all(tiles & (tiles - 1) == 0 and split >= 1 for tiles, split in asked)


def test_fused_networks_do_not_wait_for_triton() -> None:
    from r3d_kernels import backends

    before = list(backends.KERNELS)
    with gpu_networks.quick_choice():
        assert {k.backend for k in before} - {k.backend for k in backends.KERNELS} == {"triton"}
    assert before == backends.KERNELS
    assert gpu_networks.quick(lambda a, b: {"sum": a + b})(1, b=2) == {"sum": 3}


def test_hopper_sections_where_there_is_no_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_sm90, "require_op", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(NotHere, match=r"9\.0"):
        gpu_sm90.check_sm90()
    with pytest.raises(NotHere, match=r"9\.0"):
        gpu_sm90.sm90_tiles("r3d_18", 8)
    names = [s.name for s in gpu_report.plan(lambda: 0.0)]
    assert names.index("conv3d_sm90 against float64") < names.index("conv3d_sm90 speed, r3d_18 batch 32")


# ---- the Hopper stem ----


def stem_by_stock(
    stem: gpu_stem.Stem, kind: int, frames: int, wrong: float = 0.0, pools: float = 0.0
) -> torch.Tensor:
    """The op's answer, by torch in float64."""
    y = (stem.exact()[0] * (1 + wrong)).to(stem.dtype)
    return F.max_pool3d(y.float(), *WINDOWS[frames]).to(y.dtype) + pools if frames else y


def test_the_stems_check(monkeypatch):
    monkeypatch.setattr(gpu_stem, "PROBLEMS", gpu_stem.PROBLEMS[2:5])
    rows = gpu_stem.check("cpu", stem_by_stock)
    assert len(rows) == 3 * 2 * 2 * 4
    assert all(row["worst"] <= 1 for row in rows)
    assert {row["clip"] for row in rows} == {True, False}
    for wrong, pools in ((0.01, 0.0), (0.0, 1.0)):
        rows = gpu_stem.check(
            "cpu",
            lambda s, kind, n, w=wrong, p=pools: stem_by_stock(s, kind, n, w * (kind == 1), p * (kind == 1)),
        )
        assert {row["kind"] for row in rows if not row["worst"] <= 1} == {1}
    monkeypatch.setattr(gpu_stem, "require_sm90", lambda: None)
    monkeypatch.setattr(gpu_stem, "check", lambda: rows)
    with pytest.raises(Failed, match="runs are wrong, first"):
        gpu_stem.check_stem()


def test_the_stems_speed(monkeypatch):
    monkeypatch.setattr(gpu_stem, "require_sm90", lambda: None)
    monkeypatch.setattr(gpu_stem, "roofline", lambda: {"matmul_tflop_per_s": {"bfloat16": 800.0}})
    monkeypatch.setattr(gpu_stem, "STEMS", {"small": "n{}c3d3h9w12k8f3s1x2x2p1+relu"})

    class Problem(gpu_sm80.Problem):
        def __init__(self, text, dtype, device):
            super().__init__(text, dtype, "cpu")

        def call(self, name):
            return (lambda: None) if name in able else f"{name} does not run here"

    monkeypatch.setattr(gpu_sm80, "Problem", Problem)
    monkeypatch.setattr(gpu_stem, "gpu_seconds", lambda calls, **_: {n: 1e-6 * (1 + len(n)) for n in calls})
    able = {"wgmma stem", "stock"}
    rows = gpu_stem.stem_speed((1, 8))["stems"]
    assert [row["problem"] for row in rows] == [f"n{n}c3d3h9w12k8f3s1x2x2p1+relu" for n in (1, 8)]
    assert rows[0]["us"] == {"wgmma stem": 11.0, "stock": 6.0}
    assert set(rows[0]["reasons"]) == {"sm80", "sm80 64x64"}
    assert rows[1]["tflop_per_s"] == pytest.approx(8 * rows[0]["tflop_per_s"], abs=0.5)
    able = {"stock"}
    with pytest.raises(NotHere, match="wgmma stem: wgmma stem does not run here"):
        gpu_stem.stem_speed((1,))


def test_the_speed_of_stems_with_their_pool(monkeypatch):
    class Problem(gpu_sm80.Problem):
        def __init__(self, text, dtype, device):
            super().__init__(text, dtype, "cpu")

    class Kernel(backends.Stock):
        name = "wgmma stem"
        why_not = None

        def can_run(self, request):
            return self.why_not

        def with_pool(self, request, frames):
            return _pooled.Apart(backends.Stock(), frames)

    def seconds(calls, **_):
        shapes.append({name: tuple(call().shape[2:]) for name, call in calls.items()})
        return {name: 1e-6 * len(name) for name in calls}

    shapes: list[dict] = []
    kernel = Kernel()
    monkeypatch.setattr(gpu_stem, "require_sm90", lambda: None)
    monkeypatch.setattr(gpu_sm80, "Problem", Problem)
    monkeypatch.setattr(backends, "KERNELS", [kernel, backends.Stock()])
    monkeypatch.setattr(gpu_stem, "POOLED", {"small": ("n{}c3d3h9w12k8f3s1x2x2p1+relu", 3)})
    monkeypatch.setattr(gpu_stem, "gpu_seconds", seconds)
    rows = gpu_stem.pool_speed((1, 2))["pooled_stems"]
    assert [(row["stem"], row["pool_frames"]) for row in rows] == [("small", 3)] * 2
    assert rows[0]["us"]["one kernel"] == 10.0
    pooled = dict.fromkeys(("one kernel", "one after the other", "stock"), (2, 3, 3))
    assert shapes[0] == pooled | {"convolution alone": (3, 5, 6)}
    kernel.why_not = "does not run here"
    with pytest.raises(NotHere, match="wgmma stem: does not run here"):
        gpu_stem.pool_speed((1,))
