"""Engines that run the same network: stock torch, its compiler, ONNX Runtime, OpenVINO, and this package.

An engine takes a calibrated float32 network and a float32 clip, and rounds both itself where it works in
bfloat16. What cannot run here says why.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from r3d_kernels._layer import layer_plans

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Engine:
    """One way to run the network: a callable without arguments, or the reason why there is none."""

    name: str
    label: str
    run: Run | None = None
    reason: str | None = None


class Unavailable(Exception):
    """The engine cannot run here; the message says why."""


def _import(name: str, extra: str = "peers"):  # type: ignore[no-untyped-def]
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise Unavailable(f"{name} is not installed (pip install 'r3d-kernels[{extra}]'): {e}") from e


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Converters warn about what does not concern us; errors still raise."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _set_fused(model: nn.Module, fused: bool) -> nn.Module:
    for module in model.modules():
        if isinstance(getattr(module, "fused", None), bool):
            module.fused = fused
    return model


def _forward(model: nn.Module, x: Tensor) -> Run:
    def run() -> Tensor:
        with torch.inference_mode():
            return model(x)

    return run


def eager(model: nn.Module, x: Tensor, dtype: torch.dtype, threads: int) -> Run:
    """Stock layers, NCDHW in memory: what a user has who does nothing."""
    return _forward(_set_fused(model, False).to(dtype), x.to(dtype))


def eager_cl(model: nn.Module, x: Tensor, dtype: torch.dtype, threads: int) -> Run:
    """Stock layers, NDHWC in memory."""
    model = _set_fused(model, False).to(dtype=dtype, memory_format=torch.channels_last_3d)
    return _forward(model, x.to(dtype=dtype, memory_format=torch.channels_last_3d))


def fused(model: nn.Module, x: Tensor, dtype: torch.dtype, threads: int) -> Run:
    """This package, once its choices are final."""
    model = _set_fused(model, True).to(dtype=dtype, memory_format=torch.channels_last_3d)
    run = _forward(model, x.to(dtype=dtype, memory_format=torch.channels_last_3d))
    while True:
        run()
        choices = [choice for module in model.modules() for _, choice in layer_plans(module)]
        later = [c.look_again for c in choices if c.look_again is not None]
        if not later:
            return run
        time.sleep(max(0.0, max(later) - time.monotonic()))


def compiled(model: nn.Module, x: Tensor, dtype: torch.dtype, threads: int) -> Run:
    """torch.compile with inductor's freezing: constant weights, folded batch norm, layouts of its choice."""
    inductor = _import("torch._inductor.config", "bench")
    model = _set_fused(model, False).to(dtype)
    x = x.to(dtype)
    # Every combination is its own specialisation: older ones must not push this one into the eager fallback.
    torch._dynamo.reset()
    program = torch.compile(model, dynamic=False)

    def run() -> Tensor:
        # Freezing asks for no_grad; under inference_mode it would not be applied.
        with torch.no_grad():
            return program(x)

    with _quiet(), inductor.patch(freezing=True):
        run()
    return run


def onnxruntime(model: nn.Module, x: Tensor, dtype: torch.dtype, threads: int) -> Run:
    """ONNX Runtime's CPU provider, all graph optimisations."""
    if dtype != torch.float32:
        raise Unavailable("its CPU provider has no convolution in bfloat16")
    ort = _import("onnxruntime")
    _import("onnx")
    _import("onnxscript")
    file = io.BytesIO()
    with _quiet():
        program = torch.onnx.export(_set_fused(model, False), (x,), dynamo=True, verbose=False)
        program.save(file)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def openvino(model: nn.Module, x: Tensor, dtype: torch.dtype, threads: int) -> Run:
    """OpenVINO's CPU plugin, latency hint; bfloat16 through its inference precision hint."""
    os.environ.setdefault("OPENVINO_TELEMETRY", "0")
    ov = _import("openvino")
    hints = {torch.float32: "f32", torch.bfloat16: "bf16"}
    if dtype not in hints:
        raise Unavailable(f"no inference precision hint for {dtype}")
    core = ov.Core()
    if dtype == torch.bfloat16 and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise Unavailable("its CPU plugin has no bfloat16 on this processor")
    with _quiet():
        program = ov.convert_model(_set_fused(model, False), example_input=x, input=[tuple(x.shape)])
    compiled_model = core.compile_model(
        program,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": hints[dtype],
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    request = compiled_model.create_infer_request()
    array = x.numpy()

    def run() -> Tensor:
        return torch.from_numpy(request.infer([array], share_inputs=True)[0])

    return run


ENGINES: dict[str, tuple[str, Callable[[nn.Module, Tensor, torch.dtype, int], Run]]] = {
    "eager": ("torch eager", eager),
    "eager_cl": ("torch eager, channels last", eager_cl),
    "compile": ("torch.compile, freezing", compiled),
    "onnxruntime": ("ONNX Runtime", onnxruntime),
    "openvino": ("OpenVINO", openvino),
    "fused": ("r3d_kernels", fused),
}
"""name -> (label in tables, how to build it)"""

ALWAYS = ("eager", "eager_cl", "fused")
PEERS = tuple(name for name in ENGINES if name not in ALWAYS)


def build(name: str, model: nn.Module, x: Tensor, dtype: torch.dtype, threads: int) -> Engine:
    """The engine, warmed up once; any failure becomes its reason, so that one engine never ends a report."""
    label, maker = ENGINES[name]
    try:
        run = maker(copy.deepcopy(model), x, dtype, threads)
        run()
    except Unavailable as e:
        return Engine(name, label, reason=str(e))
    except Exception as e:  # a converter may fail in any way
        text = next((line.strip() for line in str(e).splitlines() if line.strip()), "")
        return Engine(name, label, reason=f"{type(e).__name__}: {text[:200]}")
    return Engine(name, label, run)
