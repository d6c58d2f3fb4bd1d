"""`r3d-kernels verify`: the table, the JSON, the exit code."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch

from r3d_kernels import backends
from r3d_kernels.cli import main
from r3d_kernels.models import create_model
from r3d_kernels.video import sample_clip

SMALL = ("--arch", "hara_r3d_10", "--size", "32", "--frames", "8", "--threads", "1")
NOISE = ("verify", *SMALL, "--random")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def wrong(monkeypatch):
    """A kernel that is off by one percent in the downsampling layers."""

    class Wrong(backends.Stock):
        name = "wrong"

        def can_run(self, request):
            return None if request.problem.kernel == (1, 1, 1) else "another layer"

        def run(self, *args):
            return super().run(*args) * 1.01

    monkeypatch.setattr(backends, "KERNELS", [Wrong(), backends.Stock()])


def test_on_the_bundled_clip(capsys, tmp_path):
    assert main(["verify", *SMALL, "--batch", "2"]) == 0
    text = capsys.readouterr().out
    assert f"video    {sample_clip()} (h264, 640x272, 250 frames, 10.0 s)" in text
    assert re.search(
        r"^network  hara_r3d_10, fp32, random weights \(seed 0, .* on 4 clips of the video$", text, re.M
    )
    assert "input    2x3x8x32x32 on " in text
    rows = re.findall(r"^ok +(\S+) .* +\d+%", text, re.M)
    assert rows[0] == "conv1"
    assert rows[-1] == "network"
    assert len(rows) == 13
    assert len(re.findall(r"% +worst *$", text, re.M)) == 1
    assert re.search(
        r"^OK: 12 of 12 layers were compared and keep the promise, so does the network; top-1 .* 2 of 2$",
        text,
        re.M,
    )
    assert list(tmp_path.iterdir()) == []


def test_weights_in_bfloat16(capsys, tmp_path):
    torch.save(create_model("hara_r3d_10", num_classes=3).state_dict(), tmp_path / "w.pth")
    argv = ["verify", "--weights", "w.pth", "--dtype", "bf16", "--size", "32", "--frames", "8", "--json", "-"]
    assert main(argv) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["model"], told["weights"]) == ("ResNet3D-10", "weights w.pth")
    assert told["video"] == str(sample_clip())
    assert told["input"] == "1x3x8x32x32 bfloat16"
    assert {row["dtype"] for row in told["layers"]} == {"bfloat16"}
    assert told["network"]["shape"] == [1, 3]


def test_a_missed_promise_is_exit_code_1(capsys, wrong):
    assert main(list(NOISE)) == 1
    text = capsys.readouterr().out
    assert re.findall(r"^FAIL +(\S+)", text, re.M) == [
        "layer2.0.downsample.0",
        "layer3.0.downsample.0",
        "layer4.0.downsample.0",
        "network",
    ]
    assert re.search(
        r"^FAILED: the promise is missed by layer2\.0\.downsample\.0, .*, the network$", text, re.M
    )


def test_json_file(capsys, tmp_path, wrong):
    path = tmp_path / "out.json"
    path.write_text("older")
    assert main([*NOISE, "--json", str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    told = json.loads(path.read_text())
    assert told["ok"] is False
    assert told["video"] is None
    assert told["weights"].endswith("on 4 clips of noise")
    assert [row["layer"] for row in told["layers"] if not row["ok"]] == [
        f"layer{i}.0.downsample.0" for i in (2, 3, 4)
    ]
    assert list(tmp_path.iterdir()) == [path]


def test_noise_needs_no_video_packages_and_any_channels(capsys, monkeypatch):
    for name in ("av", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    argv = ("verify", "--arch", "medicalnet_r3d_10", "--random", "--size", "24", "--frames", "8")
    assert main(list(argv)) == 0
    assert "input    1x1x8x24x24 on " in capsys.readouterr().out
    assert main(["verify", *SMALL]) == 2
    assert "this command needs av" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["clip.mp4", "--random"], "--random makes its own clips: leave VIDEO out"),
        (["no/such.mp4"], "no/such.mp4: no such file"),
        (["--arch", "r3d-18"], "unknown network 'r3d-18': did you mean r3d_18 or "),
        (["--weights", "no/such.pth"], "--weights no/such.pth: no such file"),
        (["--batch", "0"], "--batch: must be a whole number from 1 to 65536, got '0'"),
        (["--dtype", "fp16"], "--dtype: invalid choice: 'fp16'"),
        (["--json", "no/such/file.json"], "--json no/such/file.json: there is no directory"),
        (["--json", "."], "--json .: is a directory"),
        (["--arch", "medicalnet_r3d_10"], "RGB video has 3 channels"),
    ],
)
def test_bad_arguments(capsys, argv, message):
    assert main(["verify", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("r3d-kernels: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
