"""benchmarks/roofline.py: what it counts, what it measures, what it writes."""

from __future__ import annotations

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import measure
import peak
import roofline

from r3d_kernels import _cpu_kernels, backends
from r3d_kernels.problems import ConvProblem

QUICK = ("--rounds", "3", "--seconds", "0", "--peak-seconds", "0", "--threads", "1")
SMALL = ("--networks", "hara_r3d_10@2x4x24x24", *QUICK)


PEAKS = {"fma_fp32": 2e11, "matmul_fp32": 1e11, "amx_bf16": 2e12, "copy_1GiB": 1e10}


@pytest.fixture
def quick(monkeypatch) -> None:
    """Samples that are too short to mean anything, and peaks without measuring."""
    monkeypatch.setattr(roofline, "LEAST_CALL", 1e-5)
    monkeypatch.setattr(peak, "measure_peaks", lambda *_: PEAKS)


def row(ms: float, flops: int, moved: int, **kwargs) -> roofline.Row:
    return roofline.Row(
        "r3d_18",
        kwargs.pop("layer", "conv1"),
        kwargs.pop("count", 1),
        "n1c4d4h4w4k4f1s1p0",
        "fp32",
        "direct",
        "",
        ms,
        flops,
        flops,
        moved,
        **kwargs,
    )


def request(text: str, dtype: torch.dtype = torch.float32) -> backends.Request:
    return backends.Request(ConvProblem.parse(text), dtype, torch.device("cpu"), 1)


def test_work_of_a_direct_kernel_leaves_the_padding_out() -> None:
    r = request("n1c8d1h1w1k16f3p1+relu")
    for name in ("direct", "oneDNN", "stock"):
        kernel = next(k for k in backends.KERNELS if k.name == name)
        # one of 27 taps is inside
        assert backends.work(kernel, r) == (8 * 16, r.problem.bytes(), torch.float32)
        half = request(str(r.problem), torch.bfloat16)
        assert backends.work(kernel, half).arithmetic == torch.bfloat16


@pytest.mark.parametrize(
    ("tile", "text", "saving"),
    [
        ((2, 2, 2), "n2c8d4h6w8k16f3p1", 27 * 8 / 64),
        ((2, 4, 4), "n2c8d4h8w8k16f3p1", 27 * 32 / 144),
        ((1, 4, 4), "n1c8d3h8w4k16f1x3x3p0x1x1", 4.0),
        ((4, 1, 1), "n1c8d8h3w5k16f3x1x1p1x0x0", 2.0),
        ((2, 2, 2), "n2c8d8h12w16k16f3s2p1", 27 * 8 / 125),
        ((4, 2, 2), "n2c8d8h12w15k16f3s2p1", 27 * 16 / 225),
    ],
)
def test_work_of_winograd(tile: tuple[int, int, int], text: str, saving: float) -> None:
    r = request(text)
    kernel = _cpu_kernels.WinogradCpu(tile, r.problem.stride[0])
    macs, moved, _ = backends.work(kernel, r)
    assert r.problem.macs / macs == saving
    assert moved == r.problem.bytes()  # the parameter is read, what becomes of it stays in the caches
    half = request(text, torch.bfloat16)  # products of float32 all the same
    halved = half.problem.bytes(torch.bfloat16)
    assert backends.work(kernel, half) == (macs, halved, torch.float32)


def test_limits() -> None:
    compute, memory = row(2.0, 10**9, 10**3), row(2.0, 10**3, 10**6)
    for r in (compute, memory):
        r.against_roofs(1e12, 1e9)
    assert (compute.limit, compute.limit_ms, compute.share) == ("multiplications", 1.0, 0.5)
    assert (memory.limit, memory.limit_ms, memory.share) == ("memory", 1.0, 0.5)
    memory.count, memory.ms = 3, 1.0
    assert roofline.total_share([compute, memory]) == 4.0 / 5.0
    assert compute.as_dict()["effective_gflop_per_s"] == 500
    assert "ours_over_other" not in compute.as_dict()
    assert row(3.0, 1, 1, other_ms=2.0, ours_over_other=1.5).as_dict()["ours_over_other"] == 1.5


def test_cold(quick, capsys, tmp_path) -> None:
    out = tmp_path / "out.json"
    assert (
        roofline.main([*SMALL, "--against", "stock", "--tolerance", "1e9", "--cold", "1", "--json", str(out)])
        == 0
    )
    assert json.loads(out.read_text())["cold_mib"] == 1
    assert "caches emptied before every call" in capsys.readouterr().out


def test_rounds_are_compared_one_by_one() -> None:
    """A machine that slows down between two rounds changes no ratio."""
    assert roofline.paired_ratio([1.0, 3.0, 3.0], [2.0, 6.0, 6.0]) == 0.5
    assert roofline.paired_ratio([1.0, 3.3, 9.0], [1.0, 3.0, 3.0]) == 1.1


def test_roofs_are_those_of_the_dtype() -> None:
    peaks = {"fma_fp32": 3.0, "matmul_fp32": 2.0, "matmul_bf16": 5.0, "amx_bf16": 7.0, "copy_1GiB": 1.0}
    assert peak.roofs(peaks, torch.float32) == (3.0, 1.0)
    assert peak.roofs({**peaks, "read_32MiB": 4.0}, torch.bfloat16) == (7.0, 4.0)
    assert peak.higher({"a": 1.0, "b": 3.0}, {"a": 2.0, "b": 2.0}) == {"a": 2.0, "b": 3.0}


def test_the_recorded_command_can_be_pasted(monkeypatch) -> None:
    for name in measure.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("R3D_KERNELS_ISA", "avx2")
    monkeypatch.setattr(sys, "argv", ["benchmarks/compare.py", "--peers", "", "--networks", "a b"])
    assert (
        measure.command() == "R3D_KERNELS_ISA=avx2 python benchmarks/compare.py --peers '' --networks 'a b'"
    )


def test_peaks_of_this_machine(monkeypatch) -> None:
    monkeypatch.setattr(peak, "copy_bandwidth", lambda *_: 1e9)
    torch.set_num_threads(1)
    peaks = peak.measure_peaks([torch.float32], 0.02)
    assert peaks["matmul_fp32"] > 1e8
    if (
        "fma_fp32" in peaks
    ):  # there is a compiler: registers are faster than a matrix product, on a busy machine too
        assert peaks["fma_fp32"] > 0.5 * peaks["matmul_fp32"]
        assert peaks["read_32MiB"] > 1e8


def test_peaks_without_a_compiler(monkeypatch) -> None:
    monkeypatch.setattr(peak, "copy_bandwidth", lambda *_: 1e9)
    monkeypatch.setenv("CC", "no-such-compiler")
    peaks = peak.measure_peaks([torch.float32], 0.0)
    assert set(peaks) == {"matmul_fp32", "copy_32MiB", "copy_1GiB"}
    assert peak.roofs(peaks, torch.float32)[0] == peaks["matmul_fp32"]


def test_report(quick, tmp_path, capsys) -> None:
    out, png = tmp_path / "roofline.json", tmp_path / "roofline.png"
    code = roofline.main([*SMALL, "--dtype", "fp32,bf16", "--json", str(out), "--png", str(png)])
    assert code == 0
    text = capsys.readouterr().out
    assert "hara_r3d_10@2x4x24x24, batch 1, fp32" in text
    assert "of the limit" in text
    data = json.loads(out.read_text())
    assert {r["dtype"] for r in data["layers"]} == {"fp32", "bf16"}
    first = data["layers"][0]
    assert first["problem"] == "n1c2d4h24w24k64f7s1x2x2p3+relu"
    problem = ConvProblem.parse(first["problem"])
    assert first["flops"] == problem.flops
    slices = 6 if first["kernel"].startswith("AMX") else 1  # products of one float32 product
    assert first["real_flops"] <= slices * problem.flops
    assert first["limit"] in roofline.SHOWN
    assert first["share_of_limit"] == pytest.approx(first["limit_ms"] / first["ms"], abs=1e-3)
    assert first["kernel"] in {k.name for k in backends.KERNELS}
    assert data["peaks"] == PEAKS
    for told in data["layers"]:
        exact = {"winograd": "fp32", "AMX": "bf16"}.get(told["kernel"].split()[0], told["dtype"])
        assert told["arithmetic"] == exact
    assert data["machine"]["threads"] == 1
    assert png.read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in tmp_path.iterdir()} == {"roofline.json", "roofline.png"}


def test_against(quick, capsys, tmp_path) -> None:
    out = tmp_path / "out.json"
    arguments = [*SMALL, "--against", "stock", "--json", str(out), "--tolerance"]
    assert roofline.main([*arguments, "1e9"]) == 0
    layers = json.loads(out.read_text())["layers"]
    assert all(r["other_ms"] > 0 for r in layers)
    # two rounds, whose ratios lie on both sides of it
    assert all(0.2 < r["ours_over_other"] / (r["ms"] / r["other_ms"]) < 5 for r in layers)
    # nothing takes less than no time
    assert roofline.main([*arguments, "-1", "--again", "0"]) == 1
    assert f"{len(layers)} of {len(layers)} layers slower than stock" in capsys.readouterr().out


def test_what_is_slower_is_measured_again_and_the_median_counts(quick, monkeypatch, tmp_path) -> None:
    layers = roofline.layers_of(measure.Network.parse("hara_r3d_10@2x4x24x24"), 1)
    measured: list[str] = []

    def ratio(network, layer: str, *args, **kwargs) -> roofline.Row:
        measured.append(layer)
        by_time = {layers[0][0]: (1.5, 0.9, 1.0), layers[1][0]: (1.2, 1.3, 1.1)}.get(layer, (1.0,))
        return row(2.0, 4, 4, layer=layer, other_ms=2.0, ours_over_other=by_time[measured.count(layer) - 1])

    new_processes: list[int] = []
    monkeypatch.setattr(roofline, "measure_layer", ratio)
    monkeypatch.setattr(roofline, "elsewhere", lambda n, run: (new_processes.append(n), run())[1])
    out = tmp_path / "out.json"
    assert roofline.main([*SMALL, "--against", "stock", "--json", str(out)]) == 1
    names = [name for name, *_ in layers]
    assert measured == [*names, names[0], names[0], names[1], names[1]]  # after all others
    assert new_processes == [1] * 4  # each with one thread
    told = json.loads(out.read_text())["layers"]
    assert [r["ours_over_other"] for r in told[:3]] == [1.0, 1.2, 1.0]
    assert [r.get("ratios") for r in told[:3]] == [[1.5, 0.9, 1.0], [1.2, 1.3, 1.1], None]
    measured.clear()
    assert roofline.main([*SMALL, "--against", "stock", "--again", "0"]) == 1
    assert measured == names
    with pytest.raises(SystemExit):
        roofline.main([*SMALL, "--again", "1"])


def test_elsewhere() -> None:
    assert roofline.elsewhere(1, os.getpid) != os.getpid()
    assert roofline.elsewhere(3, torch.get_num_threads) == 3
    assert roofline.elsewhere(1, torch.is_inference_mode_enabled)
    with pytest.raises(ZeroDivisionError):
        roofline.elsewhere(1, partial(divmod, 1, 0))


def test_the_other_kernel_may_be_the_chosen_one(quick) -> None:
    torch.set_num_threads(1)
    network = measure.Network.parse("hara_r3d_10@2x4x24x24")
    layer = roofline.layers_of(network, 1)[0]
    settings = {"backend": "auto", "rounds": 3, "seconds": 0.0}
    chosen = roofline.measure_layer(network, *layer, "fp32", against=None, **settings).kernel
    same = roofline.measure_layer(network, *layer, "fp32", against=chosen, **settings)
    assert same.ours_over_other == 1.0
    cannot = roofline.measure_layer(network, *layer, "fp32", against="winograd F(2,2,2)", **settings)
    assert cannot.ours_over_other is None  # a 7x7x7 layer
    ours = roofline.measure_layer(network, *layer, "fp32", against=None, **{**settings, "backend": "cpu"})
    assert ours.kernel == "direct"


def test_numbers_in_the_picture_do_not_cover_one_another() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=110)
    canvas = FigureCanvasAgg(figure)
    axis = figure.subplots()
    points = [(10.0, 100.0)] * 6 + [(10.5, 101.0), (11.0, 190.0), (50.0, 195.0), (3.0, 7.0)]
    axis.set(xscale="log", yscale="log", xlim=(1, 100), ylim=(1, 400))
    canvas.draw()
    roofline._place_labels(axis, points, [200.0, 50.0])
    canvas.draw()
    assert [text.get_text() for text in axis.texts] == [str(i + 1) for i in range(len(points))]
    places = [axis.transData.transform(t.xy) + torch.tensor(t.xyann).numpy() * 110 / 72 for t in axis.texts]
    for i, (x, y) in enumerate(places):
        for u, v in places[:i]:
            assert abs(x - u) > 12 or abs(y - v) > 8


@pytest.mark.parametrize("text", ["r3d_19", "r3d_18@3x16x112", "r3d_18@0x1x1x1", "r3d_18@3x4x5xa"])
def test_wrong_networks(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        measure.Network.parse(text)


def test_networks() -> None:
    network = measure.Network.parse("hara_r3d_10@2x4x24x20")
    assert measure.Network.parse(str(network)) == network
    assert network.clips(3).shape == (3, 2, 4, 24, 20)
    assert torch.equal(network.clips(1), network.clips(1).bfloat16().float())
    assert network.build(fused=True).in_channels == 2
    assert measure.Network.parse("r3d_18").clip == (3, 16, 112, 112)
    assert measure.Network.parse("medicalnet_r3d_10").clip == (1, 16, 112, 112)
    volume = measure.Network.parse(roofline.NETWORKS[-1])
    layer, count, problem = roofline.layers_of(volume, 2)[0]
    assert (layer, count, str(problem)) == ("conv1", 1, "n2c1d96h96w96k64f7s1x2x2p3+relu")


@pytest.mark.parametrize("argv", [["--networks", "r3d_19"], ["--against", "magic"], ["--dtype", "fp8"]])
def test_wrong_arguments(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        roofline.main(argv)
    assert exit_.value.code == 2
