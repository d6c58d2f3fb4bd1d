"""`r3d-kernels tune`: what it measures is what a forward pass finds."""

from __future__ import annotations

import json
import os

import pytest
import torch

import r3d_kernels as r3d
from r3d_kernels import backends, tuning
from r3d_kernels.cli import main

CLIP = ("--size", "24", "--frames", "4", "--threads", "1")
SMALL = ("tune", "--arch", "hara_r3d_10", *CLIP)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A tuning cache of the test's own, and a measurement that takes no time."""
    monkeypatch.setenv("R3D_KERNELS_TUNE", "1")
    monkeypatch.setenv("R3D_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "shared", tuning.TuningCache())
    return tmp_path / "cache" / "tuning-v1.json"


@pytest.fixture
def instant(monkeypatch):
    """Counts measurements: the first candidate wins, the second comes in second."""
    measured = []

    def measure(kernels, packs, x, residual, request):
        measured.append(str(request))
        return {kernel.name: 1e-3 * (i + 1) for i, kernel in enumerate(kernels)}

    monkeypatch.setattr(backends, "measure", measure)
    return measured


def entries(path) -> dict[str, dict]:
    return {k: v for machine in json.loads(path.read_text())["machines"].values() for k, v in machine.items()}


def report(capsys) -> dict:
    return json.loads(capsys.readouterr().out)


def test_a_forward_pass_measures_nothing_any_more(capsys, monkeypatch, cache) -> None:
    monkeypatch.setattr(backends, "_LATER", (0.0, 0.1))  # close rivals wait for 22 s otherwise
    assert main(SMALL) == 0
    text = capsys.readouterr().out
    assert "conv1" in text
    assert "measured: " in text
    assert str(cache) in text
    chosen = entries(cache)

    monkeypatch.setattr(tuning, "shared", tuning.TuningCache())  # a new process
    monkeypatch.setattr(backends, "measure", lambda *a: pytest.fail("measured again"))
    torch.set_num_threads(1)
    model = r3d.create_model("hara_r3d_10", fused=True).eval()
    with torch.inference_mode():
        model(torch.randn(1, 3, 4, 24, 24))
    records = r3d.explain(model)
    assert all(r.reason.startswith("measured earlier: ") for r in records)
    assert {f"{r.problem} {r.dtype}" for r in records} == set(chosen)


def test_close_rivals_are_measured_twice_more_after_all_others(capsys, monkeypatch, cache) -> None:
    measured: list[str] = []

    def measure(kernels, packs, x, residual, request):
        again = str(request) in measured
        measured.append(str(request))
        seconds = {kernel.name: 2e-3 for kernel in kernels}
        return seconds | {kernels[0].name: 0.8e-3 if again else 1.2e-3, kernels[-1].name: 1e-3}

    monkeypatch.setattr(backends, "measure", measure)
    monkeypatch.setattr(backends, "_LATER", (0.0, 0.1))
    assert main([*SMALL, "--json", "-"]) == 0
    layers = report(capsys)["layers"]
    third = len(measured) // 3
    assert measured[:third] == measured[third : 2 * third] == measured[2 * third :]
    assert len(set(measured)) == third == len(layers)
    assert all(layer["seconds"] == 0.8e-3 for layer in layers)
    assert all(set(entry) == {"kernel", "seconds"} for entry in entries(cache).values())
    assert main([*SMALL, "--json", "-"]) == 0
    assert len(measured) == 3 * third


def test_report(capsys, instant) -> None:
    argv = (
        "tune",
        "--arch",
        "hara_r3d_10,mc3_18",
        *CLIP,
        "--batch",
        "1,2",
        "--dtype",
        "fp32,bf16",
        "--json",
        "-",
    )
    assert main(argv) == 0
    told = report(capsys)
    assert told["threads"] == 1
    layers = told["layers"]
    assert {(row["network"].split()[0], row["dtype"]) for row in layers} == {
        (network, dtype) for network in ("hara_r3d_10", "mc3_18") for dtype in ("fp32", "bf16")
    }
    stem = next(row for row in layers if row["layer"] == "conv1" and row["dtype"] == "fp32")
    assert stem["problem"] == "n1c3d4h24w24k64f7s1x2x2p3+relu"
    assert stem["seconds"] == stem["timings"][stem["kernel"]] == 1e-3
    assert stem["runner_up_seconds"] == stem["timings"][stem["runner_up"]] == 2e-3
    assert stem["reason"] == "measured: fastest"
    repeated = [row for row in layers if row["count"] > 1]
    assert repeated
    # each problem once, whatever the networks share
    assert len(instant) == len(set(instant)) < len(layers) + 1


def test_json_file(capsys, instant, tmp_path) -> None:
    path = tmp_path / "out.json"
    assert main([*SMALL, "--json", str(path)]) == 0
    assert capsys.readouterr().out == ""
    assert {row["layer"] for row in json.loads(path.read_text())["layers"]} >= {"conv1", "layer4.0.conv2"}


def test_what_is_known_is_not_measured_again(capsys, instant) -> None:
    assert main([*SMALL, "--json", "-"]) == 0
    first, count = report(capsys), len(instant)
    assert count == len(first["layers"])
    assert main([*SMALL, "--json", "-"]) == 0
    assert len(instant) == count
    assert {row["reason"] for row in report(capsys)["layers"]} == {"measured earlier: fastest"}


def test_clear_forgets_these_layers_and_no_others(capsys, instant, cache) -> None:
    other = ("tune", "--arch", "hara_r3d_10", *CLIP, "--in-channels", "1")
    assert main(other) == main(SMALL) == 0
    tuning.shared.put("another machine", "p", "stock", {"stock": 1.0})
    before, count = entries(cache), len(instant)
    assert main([*SMALL, "--clear"]) == 0
    layers = set(instant[count:])
    assert layers
    assert len(layers) == count - 1  # the stems of the two differ, all else is shared
    assert set(entries(cache)) == set(before)
    assert "another machine" in cache.read_text()

    assert main([*SMALL, "--clear-all"]) == 0
    assert set(entries(cache)) == layers
    assert "another machine" not in cache.read_text()
    capsys.readouterr()


def test_kernels_prepare_for_all_new_layers_together(capsys, instant, monkeypatch) -> None:
    seen: list[list[str]] = []

    def prepare(self, requests, told) -> None:
        seen.append([str(r) for r in requests])
        told(1, 2)
        told(2, 2)

    monkeypatch.setattr(backends.Stock, "prepare", prepare, raising=False)
    assert main(SMALL) == 0
    assert len(seen) == 1
    assert seen[0] == instant, "before the first of them is measured, in their order"
    assert main([*SMALL, "--batch", "1,2"]) == 0
    assert len(seen) == 2
    assert all(name.startswith("n2c") for name in seen[1]), "what is known needs nothing"
    assert main(SMALL) == 0
    assert len(seen) == 2
    capsys.readouterr()


def test_clear_forgets_what_kernels_remember_of_these_layers(capsys, instant, monkeypatch) -> None:
    monkeypatch.setattr(
        backends.Stock, "remembers", lambda self, r: [("a machine", f"tile {r}")], raising=False
    )
    for name in ("n1c3d4h24w24k64f7s1x2x2p3+relu float32", "n1c64d1h1w1k64f1 float32"):
        tuning.shared.put("a machine", f"tile {name}", "tile", {"tile": 1.0})
    assert main([*SMALL, "--clear"]) == 0
    assert tuning.shared.get("a machine", "tile n1c3d4h24w24k64f7s1x2x2p3+relu float32") is None
    assert tuning.shared.get("a machine", "tile n1c64d1h1w1k64f1 float32") is not None
    capsys.readouterr()


def test_weights_name_the_network(capsys, instant, tmp_path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(r3d.ResNet3D(3, depth=10, stem="hara", in_channels=2, widen_factor=0.25).state_dict(), path)
    assert main(["tune", "--weights", str(path), *CLIP, "--json", "-"]) == 0
    layers = report(capsys)["layers"]
    assert layers[0]["network"] == "ResNet3D-10 1x2x4x24x24"
    assert layers[0]["problem"].startswith("n1c2d4h24w24k16f7")


def test_interrupted_it_keeps_what_it_has(capsys, monkeypatch, instant, cache) -> None:
    choose, calls = backends.choose_for, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return choose(*args)

    monkeypatch.setattr(backends, "choose_for", interrupted)
    assert main(SMALL) == 130
    assert capsys.readouterr().err == "r3d-kernels: interrupted\n"
    assert len(entries(cache)) == 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--arch", "r3d_18,r3d-50"], "unknown network 'r3d-50': did you mean r3d_50 or "),
        (["--arch", ","], "--arch: must name at least one, got ','"),
        (["--batch", "1,0"], "--batch: must be a whole number from 1 to 65536, got '0'"),
        (["--dtype", "fp32,fp8"], "--dtype: must be of fp32, bf16, got 'fp8'"),
        (["--threads", "-1"], "--threads: must be a whole number from 1 to 1024"),
        (["--weights", "none.pth"], "--weights none.pth: no such file"),
        (["--weights", "a.pth", "--arch", "r3d_18"], "--weights names the network itself: leave --arch out"),
        (
            ["--weights", "a.pth", "--in-channels", "1"],
            "--weights fixes the channels: leave --in-channels out",
        ),
        (["--clear", "--clear-all"], "--clear-all: not allowed with argument --clear"),
        (["--json", "no/such/file.json"], "--json no/such/file.json: there is no directory"),
    ],
)
def test_bad_arguments(capsys, cache, argv, message) -> None:
    assert main(["tune", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("r3d-kernels: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not cache.exists()


def test_clip_that_does_not_fit(capsys, tmp_path) -> None:
    path = tmp_path / "weights.pth"
    stem = r3d.Stem((3, 7, 7), 1, 0)
    torch.save(r3d.ResNet3D(3, depth=10, stem=stem, widen_factor=0.25).state_dict(), path)
    assert main(["tune", "--weights", str(path), "--frames", "2", "--size", "24"]) == 2
    error = capsys.readouterr().err
    assert "ResNet3D-10 with clips of 1x3x2x24x24: x: expected D, H, W" in error
    assert error.count("\n") == 1


def test_measuring_forbidden(capsys, monkeypatch) -> None:
    monkeypatch.setenv("R3D_KERNELS_TUNE", "0")
    assert main(SMALL) == 2
    assert "R3D_KERNELS_TUNE=0 forbids" in capsys.readouterr().err


def test_cache_that_cannot_be_written(capsys, monkeypatch, instant) -> None:
    monkeypatch.setenv("R3D_KERNELS_CACHE", os.devnull)
    assert main(SMALL) == 2
    captured = capsys.readouterr()
    assert f"tuning cache {os.devnull}/tuning-v1.json: " in captured.err
    assert captured.err.count("\n") == 1
    assert instant == []
