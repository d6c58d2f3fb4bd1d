"""`r3d-kernels demo`: end to end on the real clip, the verdict, the calibration, the picture."""

from __future__ import annotations

import io
import re

import pytest
import torch
from PIL import Image

from r3d_kernels import backends
from r3d_kernels.cli import demo, main
from r3d_kernels.cli.demo import FUSED, STOCK, Run, Verdict, top_k_agreement
from r3d_kernels.cli.figure import draw
from r3d_kernels.cli.inputs import calibrate
from r3d_kernels.models import create_model
from r3d_kernels.video import sample_clip

SMALL = ["--arch", "hara_r3d_10", "--size", "64", "--repeats", "2"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def numbers(text: str, name: str) -> list[str]:
    """The cells of one row of the table."""
    row = re.search(rf"^ *{name} (.*)$", text, re.MULTILINE)
    assert row, text
    return row[1].split()


def test_end_to_end(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("R3D_KERNELS_TUNE", "1")
    (tmp_path / "r3d_demo.png").write_bytes(b"an older picture")
    assert main(["demo", *SMALL, "--batch", "2", "-v"]) == 0
    text = capsys.readouterr().out
    assert f"video    {sample_clip()} (h264, 640x272, 250 frames, 10.0 s)" in text
    assert "network  hara_r3d_10, fp32, random weights (seed 0, residual branches x 0.1), batch norm " in text
    assert "input    2x3x16x64x64 on " in text
    assert numbers(text, STOCK)[1] == "1.00x"
    for name in (STOCK, demo.STOCK_CL, FUSED):
        milliseconds, speed_up, clips, *errors = numbers(text, name)
        assert float(milliseconds) > 0
        assert float(clips) == pytest.approx(2e3 / float(milliseconds), rel=0.1)
        assert float(speed_up.removesuffix("x")) > 0
        assert float(errors[-1]) < 1e-5
    assert re.search(r"^first call of the fused network: \d+\.\d\d s", text, re.MULTILINE)
    assert "top-5 agreement with stock: 10 of 10" in text
    assert re.search(r"^fused layers: \d+ \(.*\)$", text, re.MULTILINE)
    assert re.search(r"^layer1\.0\.\w+ +n2c64d\d+", text, re.MULTILINE)  # the table of -v
    assert re.search(r"^parity OK: fused vs float64, relative L2 \S+ <= 1\.0e-05", text, re.MULTILINE)
    assert [p.name for p in tmp_path.iterdir()] == ["r3d_demo.png"]
    with Image.open(tmp_path / "r3d_demo.png") as picture:
        picture.load()
        assert (picture.format, picture.width) == ("PNG", 1500)


def test_own_video_weights_and_bf16(capsys, tmp_path):
    torch.manual_seed(1)
    model = create_model("hara_r3d_10", num_classes=3)
    torch.save({"arch": "resnet-10", "state_dict": model.state_dict()}, tmp_path / "w.pth")
    video = str(sample_clip().with_name("carphone_pristine.mp4"))
    argv = ["demo", video, "--weights", "w.pth", "--out", "x.png", "--dtype", "bf16", "--size", "64"]
    assert main([*argv, "--repeats", "1", "--frames", "8", "--threads", "1", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "network  ResNet3D-10, bf16, weights w.pth" in text
    assert "input    1x3x8x64x64 on " in text
    assert "top-3 agreement with stock: 3 of 3" in text
    assert re.search(r"^parity OK.*\(2 x stock error \+ 2\^-8\)$", text, re.MULTILINE)
    assert (tmp_path / "x.png").exists()


def test_failed_parity_is_exit_code_1(capsys, monkeypatch):
    reference = demo._reference
    monkeypatch.setattr(demo, "_reference", lambda *args: reference(*args) * (1 + 1e-4))
    assert main(["demo", *SMALL]) == 1
    assert re.search(r"^parity FAILED: .* 1\.0e-04 > 1\.0e-05", capsys.readouterr().out, re.MULTILINE)


def test_truncated_video(capsys, tmp_path):
    path = tmp_path / "half.mp4"
    data = sample_clip().read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert main(["demo", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(rf"r3d-kernels: error: {re.escape(str(path))}: .*truncated.*\n", captured.err)


def test_medical_network_is_refused(capsys):
    assert main(["demo", "--arch", "medicalnet_r3d_10"]) == 2
    assert "RGB video has 3 channels" in capsys.readouterr().err


# -- the verdict -------------------------------------------------------------------------------------------


def verdict(dtype: str, stock: float, ours: float, device: str = "cpu") -> Verdict:
    """That of results with these relative errors."""
    reference = torch.ones(1, 4, dtype=torch.float64)
    return Verdict.of(
        [Run(STOCK, 1, 1, reference * (1 + stock)), Run(FUSED, 1, 1, reference * (1 + ours))],
        reference,
        {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype],
        torch.device(device),
    )


@pytest.mark.parametrize(
    ("dtype", "stock", "ours", "ok"),
    [
        ("fp32", 1e-6, 0.9e-5, True),
        ("fp32", 1e-6, 1.1e-5, False),
        ("fp32", 1.0, 1e-6, True),  # float64 is the measure, not stock
        ("fp32", 1e-6, float("nan"), False),
        ("bf16", 0.01, 0.0235, True),
        ("bf16", 0.01, 0.0245, False),
        ("bf16", float("nan"), 0.01, True),  # a wrong stock result excuses nothing
        ("bf16", float("nan"), 0.5, False),
        ("bf16", 1.0, 0.5, False),
        ("bf16", 0.01, float("inf"), False),
    ],
)
def test_verdict(dtype, stock, ours, ok):
    result = verdict(dtype, stock, ours)
    assert result.ok is ok
    assert result.text.startswith("parity OK: " if ok else "parity FAILED: ")


def test_coarser_products_that_torch_allows(monkeypatch):
    monkeypatch.setattr(backends, "tf32_allowed", lambda: True)
    assert verdict("fp32", 3e-4, 4e-4, "cuda").ok
    assert "torch's switches allow" in verdict("fp32", 3e-4, 1e-2, "cuda").text
    assert not verdict("fp32", 3e-4, 1e-2, "cuda").ok
    assert not verdict("fp32", 3e-4, 4e-4).ok
    monkeypatch.setattr(backends, "tf32_allowed", lambda: False)
    assert not verdict("fp32", 3e-4, 4e-4, "cuda").ok


def test_top_k_agreement():
    a = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3], [0, 1, 2, 3, 4, 5, 6]])
    b = torch.tensor([[5.0, 6, 7, 8, 9, 0, 1], [6, 5, 4, 3, 2, 1, 0]])
    assert top_k_agreement(a, b) == (8, 10)  # the five of the first clip; 2, 3, 4 of the second
    assert top_k_agreement(a[:, :3], a[:, :3]) == (6, 6)


# -- the calibration ---------------------------------------------------------------------------------------


def test_calibration_sets_the_statistics():
    torch.manual_seed(0)
    model = create_model("hara_r3d_10", num_classes=4).eval()
    inputs = torch.randn(4, 3, 8, 32, 32)
    with torch.no_grad():
        calibrate(model, inputs)
        seen = model.conv1(inputs).mean((0, 2, 3, 4))
    assert not model.training
    assert model.bn1.momentum == 0.1
    spread = model.conv1(inputs).std().item()
    torch.testing.assert_close(model.bn1.running_mean, seen, atol=0.05 * spread, rtol=0)
    assert (model.layer4[0].bn2.running_var != 1).all()
    assert (model.layer4[0].bn2.weight == 0.1).all()
    assert (model.layer4[0].bn1.weight == 1).all()
    # Activations keep their size from the first layer to the last.
    with torch.no_grad():
        assert 0.1 < model.forward_features(inputs).std() < 10


# -- the picture -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 272, 640, 3), (2, 64, 48, 3), (1, 1, 1, 3), (5, 640, 272, 3)])
@pytest.mark.parametrize("seconds", [(0.4, 0.5, 0.2), (1e-5, 1e-5, 1e-6), (100.0, 90.0, 1000.0)])
def test_picture(shape, seconds):
    bars = list(zip((STOCK, demo.STOCK_CL, FUSED), seconds, strict=True))
    frames = [(f"{i}.0 s", frame) for i, frame in enumerate(torch.randint(0, 255, shape, dtype=torch.uint8))]
    data = draw(title="a" * 200, subtitle="b", footer="$c_", frames=frames, bars=bars)
    with Image.open(io.BytesIO(data)) as picture:
        picture.load()
        assert (picture.format, picture.width) == ("PNG", 1500)
