"""`r3d-kernels doctor`: what it reports, and that it works where the extension does not."""

from __future__ import annotations

import json
import platform

import pytest
import torch

from r3d_kernels import __version__, tuning
from r3d_kernels.cli import doctor, main


@pytest.fixture(scope="module")
def report() -> dict:
    return doctor.examine()


def test_json(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("R3D_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setenv("R3D_KERNELS_TUNE", "1")
    monkeypatch.setenv("R3D_KERNELS_BACKEND", "torch")
    code = main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert code == (0 if report["usable"] else 1)
    assert report["versions"]["r3d_kernels"] == __version__
    assert report["versions"]["python"] == platform.python_version()
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["scikit-video"].startswith("1.")
    assert report["environment"]["R3D_KERNELS_BACKEND"] == "torch"
    assert report["tuning_cache"] == {"enabled": True, "path": str(tmp_path / "tuning-v1.json"), "entries": 0}
    assert report["cpu"]["threads"] == torch.get_num_threads()
    assert set(report["cpu"]["isa"]) == {"avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16"}
    assert set(report["compilers"]) == {"c++", "nvcc", "ninja"}
    assert len(report["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert [bug["applies"] in (True, False) for bug in report["upstream_bugs"]] == [True, True]


def test_what_is_not_tried_any_more_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("R3D_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setenv("R3D_KERNELS_TUNE", "1")
    with tuning.Attempt("a kernel on a GPU") as attempt:
        attempt.lost = True
    with tuning.Attempt("another"):
        pass
    assert doctor._tuning_cache()["not_survived"] == [f"a kernel on a GPU ({attempt.path})"]
    attempt.path.write_text("")
    assert "not_survived" not in doctor._tuning_cache()


def test_usable_here(report):
    """The tests run where the package is built."""
    assert report["usable"], report["extension"]["error"]
    assert report["extension"]["path"].endswith(".so")
    assert report["extension"]["isa"] not in ("", "none")


def test_text(report):
    text = doctor.to_text(report)
    for title in (
        "versions",
        "compilers",
        "processor",
        "GPUs",
        "extension",
        "environment",
        "known upstream bugs",
    ):
        assert any(line.startswith(title) for line in text.splitlines()), title
    assert f"torch         {torch.__version__}" in text
    assert "pytorch#169688" in text
    assert "pytorch#163539" in text
    assert text.splitlines()[-1] == "r3d_kernels is usable here"


def test_extension_that_does_not_load(capsys, monkeypatch):
    from r3d_kernels import _extension

    monkeypatch.setattr(_extension, "error", ImportError("undefined symbol: aoti_torch_x\nmore"))
    assert main(["doctor"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("r3d_kernels is NOT usable here: ")
    assert "undefined symbol: aoti_torch_x more" in last


def test_no_optional_package_is_needed(capsys, monkeypatch):
    import sys

    for name in ("rich", "av", "matplotlib", "numpy"):
        for module in [m for m in sys.modules if m.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["doctor"]) in (0, 1)
    assert "r3d_kernels is " in capsys.readouterr().out


def test_tools(monkeypatch, tmp_path):
    assert doctor._tool("no-such-compiler") is None
    tool = tmp_path / "nvcc"
    tool.write_text("#!/bin/sh\necho 'a copyright'\necho 'compilation tools, release 13.0, V13.0.88'\n")
    tool.chmod(0o755)
    assert doctor._tool("nvcc", str(tmp_path)) == f"compilation tools, release 13.0, V13.0.88 ({tool})"
    tool.write_text("no program")
    assert doctor._tool("nvcc", str(tmp_path)).startswith("does not run: ")


@pytest.mark.parametrize(
    ("version", "text", "affected"),
    [
        (8902, "8.9.2", False),
        (90701, "9.7.1", False),
        (90800, "9.8.0", True),
        (91002, "9.10.2", True),
        (91400, "9.14.0", True),
        (91501, "9.15.1", False),
    ],
)
def test_cudnn_versions(monkeypatch, version, text, affected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    bug = doctor._cudnn_conv3d(version)
    assert bug["applies"] is affected
    assert bug["detail"].startswith(f"cuDNN {text}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor._cudnn_conv3d(version)["applies"] is False


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # the switch itself warns, torch 2.13
def test_narrow_bf16_convolution_is_measured():
    """The bug is in oneDNN: without it the very same check finds nothing."""
    with torch.backends.mkldnn.flags(enabled=False):
        assert doctor._bf16_narrow_conv()["applies"] is False
