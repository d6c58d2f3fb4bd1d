"""What only a GPU can show: the compiled kernels' results, CUDA graphs, streams, the tuner with a real clock."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu_triton_layers

import r3d_kernels as r3d
from r3d_kernels import backends, tuning
from r3d_kernels.problems import ConvProblem

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

P = ConvProblem.parse("n2c64d4h14w14k64f3p1+res+relu")


def layer_and_data() -> tuple[r3d.ConvBNAct3d, torch.Tensor, torch.Tensor]:
    layer = r3d.ConvBNAct3d(P.c, P.k, P.kernel, P.stride, P.padding).eval().to("cuda", torch.bfloat16)
    t = P.tensors(torch.bfloat16, device="cuda")
    return layer, t.x, t.residual


def test_against_float64() -> None:
    assert gpu_triton_layers.check_triton()["cases"] > 100


def test_graphs_and_streams() -> None:
    layer, x, residual = layer_and_data()
    with torch.inference_mode(), r3d.backend("triton"):
        want = layer(x, residual)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            aside = layer(x, residual)
        torch.cuda.current_stream().wait_stream(side)
        assert torch.equal(aside, want)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x, residual)
        x.copy_(x.roll(1, 4))
        graph.replay()
        assert torch.equal(y, layer(x, residual))
    assert backends.explain(layer)[-1].backend == "triton"


def test_tuner(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("R3D_KERNELS_TUNE", "1")
    monkeypatch.setenv("R3D_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "shared", tuning.TuningCache())
    from r3d_kernels.triton import tuner

    monkeypatch.setattr(tuner, "_known", {})
    layer, x, residual = layer_and_data()
    with torch.inference_mode():
        layer(x, residual)
    assert "triton" in backends.explain(layer)[-1].timings
    assert "tiled" in (tmp_path / "tuning-v1.json").read_text()
