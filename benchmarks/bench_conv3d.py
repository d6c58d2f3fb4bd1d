"""Layer by layer: convolution, batch norm, residual add and ReLU, as stock layers, in oneDNN, and here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import measure
import pytest
import torch
from torch import Tensor

from r3d_kernels.nn import ConvBNAct3d
from r3d_kernels.problems import ConvProblem, ProblemTensors

Run = Callable[[], Tensor]


def _layer(p: ConvProblem, t: ProblemTensors, memory_format: torch.memory_format, fused: bool) -> Run:
    layer = ConvBNAct3d(
        p.c,
        p.k,
        p.kernel,
        p.stride,
        p.padding,
        p.dilation,
        p.groups,
        eps=t.eps,
        activation=p.activation,
        fused=fused,
        dtype=t.x.dtype,
    )
    state = {
        "conv.weight": t.weight,
        "bn.weight": t.gamma,
        "bn.bias": t.beta,
        "bn.running_mean": t.running_mean,
        "bn.running_var": t.running_var,
        "bn.num_batches_tracked": torch.tensor(1),
    }
    layer.load_state_dict(state)
    layer = layer.to(memory_format=memory_format).eval()
    x = t.x.contiguous(memory_format=memory_format)
    residual = None if t.residual is None else t.residual.contiguous(memory_format=memory_format)
    return lambda: layer(x, residual)


def stock(p: ConvProblem, t: ProblemTensors) -> Run:
    """Stock layers, NCDHW in memory."""
    return _layer(p, t, torch.contiguous_format, fused=False)


def stock_cl(p: ConvProblem, t: ProblemTensors) -> Run:
    """Stock layers, NDHWC in memory."""
    return _layer(p, t, torch.channels_last_3d, fused=False)


def onednn(p: ConvProblem, t: ProblemTensors) -> Run:
    """oneDNN's convolution with everything as its post-operations, weights folded and packed beforehand."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        pytest.skip("this torch has no oneDNN convolution with post-operations")
    scale = t.gamma.double() / (t.running_var.double() + t.eps).sqrt()
    weight = (t.weight.double() * scale.view(-1, 1, 1, 1, 1)).to(t.x.dtype)
    bias = (t.beta.double() - t.running_mean.double() * scale).to(t.x.dtype)
    geometry = (list(p.padding), list(p.stride), list(p.dilation), p.groups)
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, list(p.in_shape))
    x, residual = t.x, t.residual
    if residual is not None:
        op = torch.ops.mkldnn._convolution_pointwise.binary
        return lambda: op(x, residual, packed, bias, *geometry, "add", 1.0, p.activation, [], None)
    op = torch.ops.mkldnn._convolution_pointwise
    return lambda: op(x, packed, bias, *geometry, p.activation or "none", [], None)


def fused(p: ConvProblem, t: ProblemTensors) -> Run:
    """This package, as a layer of a network: folded and packed at the first call."""
    return _layer(p, t, torch.channels_last_3d, fused=True)


ENGINES = {f.__name__: f for f in (stock, stock_cl, onednn, fused)}


@functools.lru_cache(maxsize=1)  # the engines of one problem follow each other
def _data(problem: ConvProblem, dtype_name: str) -> tuple[ProblemTensors, Tensor]:
    """The problem's tensors with all parameters in its dtype, and the result in float64."""
    dtype = measure.DTYPES[dtype_name]
    t = problem.tensors(dtype, param_dtype=dtype)
    return t, problem.reference(t)


def test_conv3d(benchmark: Any, problem: ConvProblem, dtype_name: str, engine: str) -> None:
    t, expected = _data(problem, dtype_name)
    with torch.inference_mode():
        run = ENGINES[engine](problem, t)
        error = measure.relative_error(run(), expected) if problem.n else 0.0
        benchmark.name = engine
        benchmark.group = f"{problem} {dtype_name} {problem.flops / 1e9:.2f} GFLOP"
        benchmark.extra_info |= {
            "problem": str(problem),
            "dtype": dtype_name,
            "engine": engine,
            "threads": torch.get_num_threads(),
            "gflop": problem.flops / 1e9,
            "gflop_inside": 2 * problem.macs_inside / 1e9,
            "mbytes": problem.bytes(measure.DTYPES[dtype_name]) / 1e6,
            "error": error,
        }
        benchmark(run)
    if benchmark.stats is not None:  # None when run with --benchmark-disable
        median = benchmark.stats.stats.median
        benchmark.extra_info["gflop_per_s"] = problem.flops / 1e9 / median
    # Loose: the tests hold the promise; a benchmark of wrong results only has to be noticed.
    assert error < {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-3}[t.x.dtype]
