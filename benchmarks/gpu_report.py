"""Everything about this package on one GPU, in one JSON and one picture.

    python benchmarks/gpu_report.py --out DIR --budget SECONDS
    python benchmarks/gpu_report.py --out DIR --budget SECONDS --only sm90 --resume

Checks of the CUDA operations, their speed against torch and against what the GPU reaches, whole networks with their
peak memory, compute-sanitizer. The most important sections come first; what the budget does not reach is marked 'not
measured'. The JSON is complete on disk after every section. Sections run in a process of their own: one that hangs the
GPU, or breaks its context, is ended and costs only itself (gpu_sections.py), and the kernel that it was about is left
out of everything behind it. Exit code: 0; 1 where a check failed; 2 for wrong arguments; 3 without a CUDA device.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_sm80
import gpu_sm90
import gpu_triton
import measure
import torch
import torch.nn.functional as F
from gpu_sections import Failed, NotHere, Report, Section, Worker, deadline, progress
from torch import Tensor, nn

from r3d_kernels.problems import ConvProblem

__all__ = ["Failed", "NotHere", "Report", "Section", "deadline", "main", "plan", "progress"]

CHANNELS = (1, 3, 7, 8, 45, 64, 65, 230, 921)
FP32_PROMISE = 5e-6  # relative L2 error of one operation against float64


# ---- the operation ----


@dataclass(frozen=True)
class Epilogue:
    """Inputs of one bn_act call."""

    x: Tensor  # [N, C, D, H, W], channels last
    scale: Tensor  # [C], float32
    shift: Tensor  # [C], float32
    mean: Tensor  # [C], float32: zeros, for the stock batch norm
    var: Tensor  # [C], float32: ones
    residual: Tensor | None
    activation: str

    def ours(self) -> Tensor:
        return torch.ops.r3d_kernels.bn_act(self.x, self.scale, self.shift, self.residual, self.activation)

    def stock(self) -> Tensor:
        """Batch norm, add and ReLU of torch: mean 0, variance 1 and no eps leave scale and shift."""
        y = F.batch_norm(self.x, self.mean, self.var, self.scale, self.shift, eps=0.0)
        if self.residual is not None:
            y = y + self.residual
        return F.relu(y) if self.activation == "relu" else y

    def exact(self) -> Tensor:
        shape = (1, -1, 1, 1, 1)
        y = self.x.double() * self.scale.double().view(shape) + self.shift.double().view(shape)
        if self.residual is not None:
            y = y + self.residual.double()
        return F.relu(y) if self.activation == "relu" else y

    @property
    def bytes(self) -> int:
        """Least traffic: x and the residual in, y out."""
        tensors = 2 if self.residual is None else 3
        return tensors * self.x.numel() * self.x.element_size() + 8 * self.scale.numel()


def epilogue(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    residual: bool = True,
    activation: str = "relu",
    seed: int = 0,
    device: str = "cuda",
) -> Epilogue:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    def place(t: Tensor) -> Tensor:
        return t.to(dtype).contiguous(memory_format=torch.channels_last_3d)

    scale = 0.5 + normal(shape[1]).abs()
    return Epilogue(
        x=place(normal(*shape)),
        scale=scale,
        shift=normal(shape[1]),
        mean=torch.zeros_like(scale),
        var=torch.ones_like(scale),
        residual=place(normal(*shape)) if residual else None,
        activation=activation,
    )


def require_op() -> None:
    """The compiled package with its CUDA kernel, or NotHere."""
    try:
        import r3d_kernels.ops  # noqa: F401 - registers the operations

        torch.ops.r3d_kernels.bn_act  # noqa: B018 - raises where it is not registered
    except (ImportError, AttributeError) as e:
        raise NotHere(f"r3d_kernels::bn_act is not compiled in: {e}") from e


def check_bn_act(device: str = "cuda") -> dict[str, Any]:
    """Every dtype, odd channels, with and without residual and activation, against float64."""
    require_op()
    rows, bad = [], []
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for dtype in dtypes if device == "cuda" else dtypes[:2]:  # half precision is the GPU's
        for channels in CHANNELS:
            for residual in (False, True):
                for activation in ("none", "relu"):
                    e = epilogue(
                        (2, channels, 3, 5, 7), dtype, residual=residual, activation=activation, device=device
                    )
                    y, expected = e.ours(), e.exact()
                    error = measure.relative_error(y, expected)
                    stock = measure.relative_error(e.stock(), expected)
                    allowed = 2 * stock + torch.finfo(dtype).eps / 2
                    if dtype == torch.float32:
                        allowed = FP32_PROMISE
                    row = {
                        "dtype": str(dtype).removeprefix("torch."),
                        "channels": channels,
                        "residual": residual,
                        "activation": activation,
                        "error": error,
                        "stock_error": stock,
                        "allowed": allowed,
                    }
                    rows.append(row)
                    like = y.dtype == dtype and y.shape == e.x.shape
                    like &= y.is_contiguous(memory_format=torch.channels_last_3d)
                    # `not <=`: a NaN is a failure too
                    if not error <= allowed or not like:
                        bad.append(row)
    empty = epilogue((0, 64, 2, 3, 3), torch.float32, device=device)
    if empty.ours().shape != empty.x.shape:
        raise Failed("an empty batch changes its shape", {"rows": rows})
    if bad:
        raise Failed(f"{len(bad)} of {len(rows)} cases are wrong, first {bad[0]}", {"rows": rows})
    return {"cases": len(rows), "largest_error": _largest(rows)}


def _largest(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The largest error of each dtype."""
    largest: dict[str, float] = {}
    for row in rows:
        largest[row["dtype"]] = max(largest.get(row["dtype"], 0.0), row["error"])
    return largest


def check_repetitions(count: int = 200, device: str = "cuda") -> dict[str, Any]:
    """The same bits every time: a race shows up as a difference."""
    require_op()
    for dtype, bits in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16)):
        for channels in (64, 65, 921):
            e = epilogue((2, channels, 8, 14, 14), dtype, device=device)
            first = e.ours()
            different = torch.zeros((), dtype=torch.int64, device=device)
            for _ in range(count):
                # NaN-safe: bits are compared, and the answer stays on the device until the end
                different += (e.ours().view(bits) != first.view(bits)).any().long()
            if int(different):
                raise Failed(f"{int(different)} of {count} repetitions differ: {dtype}, {channels} channels")
    return {"repetitions": count}


def check_graph() -> dict[str, Any]:
    """Captured into a CUDA graph and replayed on new data."""
    require_op()
    e = epilogue((2, 64, 8, 28, 28), torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        e.ours()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = e.ours()
    for seed in (1, 2):
        e.x.copy_(epilogue(e.x.shape, torch.bfloat16, seed=seed).x)
        graph.replay()
        if not torch.equal(y, e.ours()):
            raise Failed("a replayed graph gives another result than the call")
    return {"replays": 2}


def check_streams() -> dict[str, Any]:
    """Two streams at once, each with its own data."""
    require_op()
    work = [epilogue((2, 64 + i, 8, 28, 28), torch.float32, seed=i) for i in range(2)]
    return _on_two_streams([e.ours for e in work])


def _on_two_streams(calls: Sequence[Callable[[], Tensor]], count: int = 50) -> dict[str, Any]:
    expected = [call() for call in calls]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    results: list[list[Tensor]] = [[] for _ in calls]
    for _ in range(count):
        for call, stream, outputs in zip(calls, streams, results, strict=True):
            with torch.cuda.stream(stream):
                outputs.append(call())
    torch.cuda.synchronize()
    for i, outputs in enumerate(results):
        if not all(torch.equal(y, expected[i]) for y in outputs):
            raise Failed(f"stream {i} gives another result than the default stream")
    return {"calls": len(calls) * count}


# ---- the Hopper convolution ----


def require_sm90() -> None:
    """The compiled Hopper kernel on a GPU that runs it, or NotHere."""
    require_op()
    from r3d_kernels.backends import describe

    if not any(arch.startswith("9.0a") for arch in describe()["cuda_archs"]):
        raise NotHere("the package was not compiled for 9.0a")
    if torch.cuda.get_device_capability() != (9, 0):
        raise NotHere("this GPU is not of compute capability 9.0")


def check_sm90() -> dict[str, Any]:
    require_sm90()
    rows = gpu_sm90.check(note=lambda rows: progress(rows=rows))
    bad = [row for row in rows if not row["worst"] <= 1]
    if bad:
        raise Failed(f"{len(bad)} of {len(rows)} runs are wrong, first {bad[0]}", {"rows": rows})
    return {"runs": len(rows), "worst": max(row["worst"] for row in rows)}


def check_sm90_trial() -> dict[str, Any]:
    """What `backends` asks before a layer may use a tile: bits of those that work, for whole and odd channels."""
    require_sm90()
    from r3d_kernels.ops import conv3d_sm90

    index = torch.cuda.current_device()
    found = {
        name: conv3d_sm90.proven_tiles(index, padded) for name, padded in (("whole", False), ("odd", True))
    }
    if index in conv3d_sm90.refused:
        raise Failed(conv3d_sm90.refused[index])
    wrong = {
        name: ["x".join(map(str, tile)) for i, tile in enumerate(conv3d_sm90.TILES) if not bits >> i & 1]
        for name, bits in found.items()
    }
    if any(wrong.values()):
        raise Failed(f"tiles that fail their trial and are not used: {wrong}", {"refused": wrong})
    return {"tiles": len(conv3d_sm90.TILES)}


def check_sm90_repetitions(count: int = 200) -> dict[str, Any]:
    require_sm90()
    found = gpu_sm90.different_bits(count)
    if any(found.values()):
        raise Failed(f"repetitions of {count} that differ: {found}", found)
    return {"repetitions": count, "problems": len(found)}


def check_sm90_graph() -> dict[str, Any]:
    """Captured with its split sum and the counters that this clears, and replayed on new data."""
    require_sm90()
    problem = ConvProblem.parse("n1c512d2h7w7k512f3p1+res+relu")
    w = gpu_sm90.work(problem, torch.bfloat16)
    w.ours()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = w.ours()
    for seed in (1, 2):
        w.x.copy_(gpu_sm90.work(problem, torch.bfloat16, seed=seed).x)
        graph.replay()
        if not torch.equal(y, w.ours()):
            raise Failed("a replayed graph gives another result than the call")
    return {"replays": 2}


def check_sm90_streams() -> dict[str, Any]:
    """Two streams at once: a split sum, of whose workspace each call needs one of its own, and a large one."""
    require_sm90()
    texts = ("n1c512d2h7w7k512f3p1+res+relu", "n2c128d4h28w28k128f3p1+relu")
    work = [gpu_sm90.work(ConvProblem.parse(text), torch.bfloat16, seed=i) for i, text in enumerate(texts)]
    return _on_two_streams([w.ours for w in work])


def sm90_speed(network: str, batch: int) -> dict[str, Any]:
    require_sm90()
    from r3d_kernels.ops.conv3d_sm90 import proven_tiles

    usable = functools.partial(proven_tiles, torch.cuda.current_device())
    rate = roofline()["matmul_tflop_per_s"]["bfloat16"]
    head = {"network": network, "batch": batch, "matmul_tflop_per_s": rate}
    seconds = functools.partial(gpu_seconds, rounds=9)
    rows = gpu_sm90.speed(
        seconds, rate, network, batch, note=lambda rows: progress(layers=rows, **head), usable=usable
    )
    return {**head, "layers": rows, **gpu_sm90.shares(rows)}


def sm90_tiles(network: str, batch: int) -> dict[str, Any]:
    """Every tile on every layer: whether the rule that chooses among them is right."""
    require_sm90()
    seconds = functools.partial(gpu_seconds, rounds=3, sample=2e-3)
    rows = gpu_sm90.tiles(seconds, network, batch, note=lambda rows: progress(layers=rows))
    return {"layers": rows, "least_chosen_over_best": min(row["best_us"] / row["chosen_us"] for row in rows)}


# ---- speed ----


def gpu_seconds(
    calls: dict[str, Callable[[], Any]], *, rounds: int = 15, sample: float = 5e-3
) -> dict[str, float]:
    """Median seconds of one call, by events, the calls taken in turn.

    `sample`: seconds of calls between two events, so that neither their resolution nor a launch gap matters.
    """
    counts = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        counts[name] = max(1, min(200, int(sample / max(time.perf_counter() - begin, 1e-6))))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for done in range(rounds):
        for name in calls if done % 2 == 0 else reversed(list(calls)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            calls[name]()
            start.record()
            for _ in range(counts[name]):
                calls[name]()
            end.record()
            end.synchronize()
            seconds[name].append(start.elapsed_time(end) / 1e3 / counts[name])
    return {name: statistics.median(values) for name, values in seconds.items()}


@functools.cache
def roofline() -> dict[str, Any]:
    """What this GPU reaches now: the copy of a large tensor, and large matrix products."""
    source = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source)}
    size = 8192
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        a = torch.randn(size, size, device="cuda", dtype=dtype)
        calls[name] = functools.partial(torch.mm, a, a)
    single = torch.randn(4096, 4096, device="cuda")

    def float32(tf32: bool) -> None:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            torch.mm(single, single)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    calls["float32"] = functools.partial(float32, False)
    calls["tf32"] = functools.partial(float32, True)
    seconds = gpu_seconds(calls, rounds=9)
    tflops = {
        name: 2 * (4096 if name in ("float32", "tf32") else size) ** 3 / seconds[name] / 1e12
        for name in calls
        if name != "copy"
    }
    copied = 2 * source.numel()  # read and written
    return {
        "copy_gbyte_per_s": round(copied / seconds["copy"] / 1e9, 1),
        "matmul_tflop_per_s": {name: round(value, 1) for name, value in tflops.items()},
    }


SHAPES = (
    (8, 64, 16, 56, 56),
    (8, 128, 8, 28, 28),
    (8, 256, 4, 14, 14),
    (8, 512, 2, 7, 7),
    (32, 64, 16, 56, 56),
)


def bn_act_speed() -> dict[str, Any]:
    """bn_act against torch's three operations, and its share of the speed of a copy."""
    require_op()
    copy_speed = roofline()["copy_gbyte_per_s"]
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for shape in SHAPES:
            e = epilogue(shape, dtype)
            seconds = gpu_seconds({"ours": e.ours, "stock": e.stock})
            speed = e.bytes / seconds["ours"] / 1e9
            rows.append(
                {
                    "shape": list(shape),
                    "dtype": str(dtype).removeprefix("torch."),
                    "mbytes": round(e.bytes / 1e6, 2),
                    # Tensors that fit into the L2 cache can be faster than a copy in memory.
                    "l2_mbytes": round(
                        getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) / 1e6
                    ),
                    "ours_us": round(1e6 * seconds["ours"], 2),
                    "stock_us": round(1e6 * seconds["stock"], 2),
                    "ours_is_faster": round(seconds["stock"] / seconds["ours"], 3),
                    "gbyte_per_s": round(speed, 1),
                    "share_of_copy": round(speed / copy_speed, 3),
                }
            )
    return {"copy_gbyte_per_s": copy_speed, "rows": rows}


@functools.lru_cache(maxsize=4)
def _network(name: str) -> nn.Module:
    from r3d_kernels.models import create_model

    torch.manual_seed(0)
    return measure.calibrate(create_model(name, fused=False))


def _placed(name: str, dtype: torch.dtype, fused: bool) -> nn.Module:
    model = copy.deepcopy(_network(name))
    for module in model.modules():
        if isinstance(getattr(module, "fused", None), bool):
            module.fused = fused
    return model.to(device="cuda", dtype=dtype, memory_format=torch.channels_last_3d)


@contextlib.contextmanager
def quick_choice() -> Iterator[None]:
    """Layers choose among all kernels but Triton's: its tuner takes up to 15 s for each, and minutes for a network."""
    from r3d_kernels import backends

    before = list(backends.KERNELS)
    backends.KERNELS[:] = [k for k in before if k.backend != "triton"]
    try:
        yield
    finally:
        backends.KERNELS[:] = before


def quick(run: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """`run` under `quick_choice`."""

    @functools.wraps(run)
    def wrapped(*args: Any, **kwargs: Any) -> dict[str, Any]:
        with quick_choice():
            return run(*args, **kwargs)

    return wrapped


@quick
def check_second_device(devices: Sequence[str] = ("cuda:0", "cuda:1"), graphs: bool = True) -> dict[str, Any]:
    """A network on a GPU that is not the current one: as on the first, eager and as a graph."""
    require_op()
    if len(devices) > 1 and torch.cuda.device_count() < len(devices):
        raise NotHere(f"needs {len(devices)} GPUs, found {torch.cuda.device_count()}")
    from r3d_kernels import ResNet3D

    torch.manual_seed(0)
    model, clip = ResNet3D(9, depth=10, stem="torchvision").eval(), torch.randn(2, 3, 8, 56, 56)
    answers = []
    for device in devices:
        ours = copy.deepcopy(model).to(device, torch.bfloat16)
        ours.fused = True
        x = clip.to(device, torch.bfloat16)
        with torch.no_grad():
            answers.append(ours(x).cpu())
        if graphs:
            answers.append(ours.graphed(x)(x).cpu())
    errors = [measure.relative_error(y, answers[0]) for y in answers]
    # another kernel may have been measured to be the fastest
    if not max(errors) <= 4 * torch.finfo(torch.bfloat16).eps:
        raise Failed(f"the answers of {', '.join(devices)} differ by {errors}")
    return {"devices": len(devices), "errors": errors}


COMPILERS = {"compile": "default", "max-autotune": "max-autotune"}  # engine -> torch.compile's mode


@quick
def network_speed(name: str, dtype_name: str, batch: int, engines: Sequence[str]) -> dict[str, Any]:
    """Stock channels-last, fused and compiled: time, peak memory, error against float64 on the CPU.

    Triton is not among the kernels that the fused network chooses from; it has sections of its own.
    """
    from r3d_kernels.backends import explain

    dtype = measure.DTYPES[dtype_name]
    clip = measure.clip(batch)
    x = clip.to(device="cuda", dtype=dtype, memory_format=torch.channels_last_3d)
    # A batch is checked on its first clip: a float64 network on the CPU is slow.
    expected = _reference(name)
    calls: dict[str, Callable[[], Tensor]] = {}
    errors, peaks = {}, {}

    def forward(model: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                return model(x)

        return run

    kernels: dict[str, int] = {}
    for engine in engines:
        model = _placed(name, dtype, fused=engine == "fused")
        if engine in COMPILERS:
            torch._dynamo.reset()
            calls[engine] = forward(torch.compile(model, dynamic=False, mode=COMPILERS[engine]))
        else:
            calls[engine] = forward(model)
        y = calls[engine]()  # packs and compiles
        errors[engine] = measure.relative_error(y[:1].cpu(), expected)
        del y
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        calls[engine]()
        torch.cuda.synchronize()
        peaks[engine] = torch.cuda.max_memory_allocated() - before
        if engine == "fused":
            for record in explain(model):
                kernels[record.kernel] = kernels.get(record.kernel, 0) + 1
        progress(errors=errors, forward_adds_bytes=peaks, kernels=kernels)
    seconds = gpu_seconds(calls, rounds=9)
    data: dict[str, Any] = {
        "network": name,
        "dtype": dtype_name,
        "batch": batch,
        "kernels": kernels,
        "engines": {
            engine: {
                "median_ms": round(1e3 * seconds[engine], 4),
                "clips_per_s": round(batch / seconds[engine], 1),
                "error": errors[engine],
                "forward_adds_mib": round(peaks[engine] / 2**20, 2),
                "fused_is_faster": round(seconds[engine] / seconds["fused"], 3),
            }
            for engine in engines
        },
    }
    if compiled := [seconds[engine] for engine in engines if engine in COMPILERS]:
        data["faster_than_best_compile"] = round(min(compiled) / seconds["fused"], 3)
    # With TF32, which torch allows for convolutions, stock float32 is coarse too: ours may be twice as far.
    allowed = 2 * errors["stock"] + torch.finfo(dtype).eps / 2
    if not errors["fused"] <= allowed:
        raise Failed(f"the fused network's error is {errors['fused']:.1e}, allowed {allowed:.1e}", data)
    return data


@functools.lru_cache(maxsize=4)
def _reference(name: str) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(_network(name)).double()(measure.clip(1).double())


# ---- the Triton kernels ----

TRITON_PROBLEMS = (
    "n2c64d5h9w11k64f3p1+res+relu",
    "n2c3d5h20w22k45f3x7x7s1x2x2p1x3x3+relu",
    "n1c45d5h9w9k64f3x1x1p1x0x0+relu",
    "n1c64d5h9w9k230f1x3x3p0x1x1+res+relu",
    "n1c921d3h5w5k65f3x1x1p1x0x0+relu",
    "n2c64d6h14w14k128f3s2p1+relu",
    "n2c64d6h14w14k128f1s2",
    "n3c256d3h7w7k512f1+res+relu",
    "n1c512d2h7w7k512f3p1+res+relu",
    "n2c32d7h9w8k48f3x2x3s1x2x1p2x1x3l2x3x2g2+res+relu",
    "n8c128d8h28w28k256f3p1+res+relu",
)


def require_triton() -> None:
    """Our Triton kernels, or NotHere."""
    from r3d_kernels.triton.backend import why_no_triton

    if (why_not := why_no_triton()) is not None:
        raise NotHere(why_not)


def _allowed(dtype: torch.dtype, precision: str) -> float:
    if dtype == torch.float32:
        # TF32, which torch allows, has ten bits: rounded to them 3e-4, with the others dropped 7e-4 and more
        return FP32_PROMISE if precision == "ieee" else 5e-4
    return 2 * torch.finfo(dtype).eps


def _apart(y: Tensor, expected: Tensor) -> float:
    """Relative L2 error; measured on the device, because outputs are large here."""
    return float((y.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def check_triton(
    device: str = "cuda",
    problems: Sequence[str] = TRITON_PROBLEMS,
    left: Callable[[], float] = lambda: math.inf,
) -> dict[str, Any]:
    """Every configuration that a layer or one of its gradients may try, against float64; as far as there is time.

    The first configuration of every problem comes before the others of any: each takes seconds to compile.
    """
    require_triton()
    from r3d_kernels.problems import ConvProblem
    from r3d_kernels.triton import config as configs
    from r3d_kernels.triton import conv3d

    rows, bad = [], []

    def note(text: str, dtype: torch.dtype, what: str, y: Tensor, expected: Tensor, precision: str) -> None:
        error, allowed = _apart(y, expected), _allowed(dtype, precision)
        dtype_name = str(dtype).removeprefix("torch.")
        rows.append({"problem": text, "dtype": dtype_name, "what": what, "error": error, "allowed": allowed})
        if not error <= allowed:
            bad.append(rows[-1])
        progress(rows=rows)

    later: list[Callable[[], None]] = []
    for text in problems:
        p = ConvProblem.parse(text)
        geometry = (p.stride, p.padding, p.dilation, p.groups)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            t = p.tensors(dtype, device=device)
            precision = configs.precision_of(dtype)
            scale = (t.gamma.double() / (t.running_var.double() + t.eps).sqrt()).float()
            bias = (t.beta.double() - t.running_mean.double() * scale.double()).float()
            x, weight = t.x.double().requires_grad_(), t.weight.double().requires_grad_()
            y = F.conv3d(x, weight, None, *geometry)
            dy = torch.randn_like(y).to(dtype)
            dx, dw = torch.autograd.grad(y, (x, weight), dy.double())
            y = y.detach() * scale.double().view(1, -1, 1, 1, 1) + bias.double().view(1, -1, 1, 1, 1)
            y = y if t.residual is None else y + t.residual.double()
            y = y.relu() if p.activation == "relu" else y

            def forward(
                config: Any,
                text=text,
                p=p,
                dtype=dtype,
                precision=precision,
                t=t,
                scale=scale,
                bias=bias,
                y=y,
            ) -> None:
                run = conv3d.forward(p, config, precision, True, True)
                note(text, dtype, str(config), run(t.x, t.weight, scale, bias, t.residual), y, precision)

            first, *others = configs.candidates(p, dtype, precision, configs.machine(t.x.device))
            forward(first)
            later += [functools.partial(forward, config) for config in others]

            def gradient(
                which: str,
                config: Any,
                text=text,
                p=p,
                dtype=dtype,
                precision=precision,
                t=t,
                dy=dy,
                dx=dx,
                dw=dw,
            ) -> None:
                if which == "input":
                    ours, want = conv3d.input_grad(p, config, precision)(dy, t.weight), dx
                else:
                    ours, want = conv3d.weight_grad(p, config, precision)(t.x, dy), dw
                note(text, dtype, f"{which} gradient {config}", ours, want, precision)

            dy = dy.contiguous(memory_format=torch.channels_last_3d)
            where = configs.machine(t.x.device)
            later += [
                functools.partial(gradient, which, config, dy=dy)
                for which, all_of in (("input", configs.input_grads), ("weight", configs.weight_grads))
                for config in all_of(p, dtype, precision, where)
            ]
    reached = 0
    for call in later:
        if left() < 5:
            break
        call()
        reached += 1
    if bad:
        raise Failed(f"{len(bad)} of {len(rows)} cases are wrong, first {bad[0]}", {"rows": rows})
    return {"cases": len(rows), "not_reached": len(later) - reached, "largest_error": _largest(rows)}


def inductor_template(
    call: Callable[..., Tensor], operands: Sequence[Tensor | None]
) -> Callable[..., Tensor]:
    """`call` compiled so that its convolution is inductor's own Triton template, with what follows it fused in.

    Raises:
        NotHere: where inductor has no such template for it.
    """
    import torch._inductor.config as inductor
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()  # other layers go through the same function, and its limit of recompilations
    # Without ATEN among them: the fastest of inductor's templates, and never cuDNN under its name.
    only = {"max_autotune_conv_backends": "TRITON", "max_autotune_gemm_backends": "TRITON"}
    afresh = {"force_disable_caches": True}  # or its source would not be seen
    try:
        with inductor.patch(max_autotune=True, **only, **afresh):
            compiled = torch.compile(call, dynamic=False, fullgraph=True)
            _, sources = run_and_get_code(compiled, *operands)
    except Exception as e:  # a lowering without choices, a template that does not compile
        raise NotHere(f"{type(e).__name__}: {next(iter(str(e).splitlines()), '')}") from e
    if not any("triton_tem_" in source for source in sources):
        raise NotHere("inductor took another way than its template")
    return compiled


def _bn_stock(
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor,
    beta: Tensor,
    residual: Tensor | None,
    p: ConvProblem,
    eps: float,
) -> Tensor:
    y = F.conv3d(x, weight, None, p.stride, p.padding, p.dilation, p.groups)
    y = F.batch_norm(y, mean, var, gamma, beta, False, 0.0, eps)
    y = y if residual is None else y + residual
    return F.relu(y) if p.activation == "relu" else y


_COMPILES_WITHIN = (
    60.0  # seconds that must be left for inductor to compile and measure its choices for a layer
)


def triton_layers(
    problems: Sequence[tuple[ConvProblem, int]],
    dtype_name: str,
    left: Callable[[], float],
    *,
    device: str = "cuda",
    timer: Callable[..., dict[str, float]] = gpu_seconds,
    template: Callable[..., Callable[..., Tensor]] = inductor_template,
) -> dict[str, Any]:
    """Each layer: cuDNN's stock layers, our CUDA kernels, Triton as its tuner chose it, inductor's own template.

    `problems` come with how often a network has them. An engine that does not run a layer says why.
    """
    require_triton()
    from r3d_kernels import backends
    from r3d_kernels.triton import conv3d

    dtype, rows = measure.DTYPES[dtype_name], []
    for p, count in problems:
        t = p.tensors(dtype, device=device)
        request = backends.Request(p, dtype, t.x.device, torch.get_num_threads())
        norm = (t.running_mean, t.running_var, t.gamma, t.beta, t.eps)
        layer = backends.Layer.of(t.weight, None, norm)
        calls: dict[str, Callable[[], Tensor]] = {}
        reasons: dict[str, str] = {}
        for kernel in backends.KERNELS:
            reason = kernel.can_run(request)
            if reason is None:
                pack = kernel.pack(layer, request)
                calls[kernel.name] = functools.partial(kernel.run, pack, t.x, t.residual, request)
            elif kernel.backend in ("cuda", "triton"):
                reasons[kernel.name] = reason
        operands = (t.x, t.weight, *norm[:4], t.residual)
        with torch.no_grad():
            if left() < _COMPILES_WITHIN:
                reasons["inductor"] = f"not measured: {max(left(), 0):.0f} s of the budget are left"
            else:
                try:
                    stock = functools.partial(_bn_stock, p=p, eps=t.eps)
                    calls["inductor"] = functools.partial(template(stock, operands), *operands)
                except NotHere as e:
                    reasons["inductor"] = f"not measured: {e}"
            wide = [None if o is None else o.double() for o in operands]
            exact = _bn_stock(*wide, p, t.eps)
            errors = {name: _apart(call(), exact) for name, call in calls.items()}
            seconds = timer(calls, rounds=9)
        scale = torch.ones(p.k, device=device)
        operands = (t.x, t.weight, scale, scale, t.residual)
        others = {
            "cuDNN eager": seconds.get("stock"),
            "our CUDA kernels": min(
                (seconds[k.name] for k in backends.KERNELS if k.backend == "cuda" and k.name in seconds),
                default=None,
            ),
            "inductor's template": seconds.get("inductor"),
        }
        rows.append(
            {
                "problem": str(p),
                "count": count,
                "config": str(conv3d.chosen(p, *operands)[0].config) if "triton" in calls else None,
                "ms": {name: round(1e3 * s, 4) for name, s in seconds.items()},
                "tflop_per_s": {name: round(p.flops / s / 1e12, 1) for name, s in seconds.items()},
                "errors": errors,
                "reasons": reasons,
                "triton_is_faster_than": {
                    name: round(s / seconds["triton"], 3) if s and "triton" in seconds else "not measured"
                    for name, s in others.items()
                },
            }
        )
        progress(dtype=dtype_name, layers=rows)
    return {"dtype": dtype_name, "layers": rows}


def network_layers(network: str, batch: int) -> list[tuple[ConvProblem, int]]:
    """The distinct convolutions of a network, and how often it has each."""
    from r3d_kernels.models import create_model
    from r3d_kernels.problems import LAYER_INPUT, network_problems, unique

    with torch.device("meta"):
        model = create_model(network)
    return unique(network_problems(model, (batch, *LAYER_INPUT[1:])))


def triton_norm_speed() -> dict[str, Any]:
    """Training batch norm + residual + ReLU, forward and backward: its share of the speed of a copy."""
    require_triton()
    from r3d_kernels.triton import norm

    copy_speed, rows = roofline()["copy_gbyte_per_s"], []
    cached = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)
    for dtype in (torch.bfloat16, torch.float32):
        for shape in SHAPES:
            e = epilogue(shape, dtype)
            leaves = [t.requires_grad_() for t in (e.x, e.scale, e.shift, e.residual)]
            dy = torch.randn_like(e.x)

            def ours(leaves=leaves, dy=dy) -> Any:
                x, gamma, beta, residual = leaves
                return torch.autograd.grad(norm.batch_norm_act(x, gamma, beta, residual)[0], leaves, dy)

            def stock(leaves=leaves, dy=dy) -> Any:
                x, gamma, beta, residual = leaves
                y = F.relu(F.batch_norm(x, None, None, gamma, beta, True) + residual)
                return torch.autograd.grad(y, leaves, dy)

            seconds = gpu_seconds({"ours": ours, "stock": stock}, rounds=9)
            rows.append(norm_row(shape, dtype, seconds, e.x.numel() * e.x.element_size(), copy_speed, cached))
    return {"copy_gbyte_per_s": copy_speed, "norm_rows": rows, "share_of_copy": norm_share(rows)}


def norm_row(
    shape: Sequence[int],
    dtype: torch.dtype,
    seconds: dict[str, float],
    size: int,
    copy_speed: float,
    cached: int,
) -> dict[str, Any]:
    """`size`: bytes of one tensor; `cached`: bytes of the L2 cache."""
    # forward: x twice, residual, y; backward: x, y, dy twice, dx, dresidual
    moved = 12 * size
    return {
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "ms": {name: round(1e3 * s, 4) for name, s in seconds.items()},
        "share_of_copy": round(moved / seconds["ours"] / 1e9 / copy_speed, 3),
        # Only there is the speed of a copy the limit; smaller ones are bound by launches, or faster than memory.
        "beyond_l2": size > cached,
    }


def norm_share(rows: Sequence[dict[str, Any]]) -> float | None:
    """What the floor is held against: the least share among bfloat16 tensors that do not fit into the L2 cache."""
    shares = [r["share_of_copy"] for r in rows if r["dtype"] == "bfloat16" and r["beyond_l2"]]
    return min(shares, default=None)


def triton_network(name: str, dtype_name: str, batch: int, device: str = "cuda") -> dict[str, Any]:
    """A network with every convolution through Triton, against eager channels-last."""
    require_triton()
    from r3d_kernels import backend
    from r3d_kernels.backends import explain

    dtype = measure.DTYPES[dtype_name]
    x = measure.clip(batch).to(device=device, dtype=dtype, memory_format=torch.channels_last_3d)
    stock, fused = (_placed(name, dtype, fused=f) for f in (False, True))

    def triton() -> Tensor:
        with torch.no_grad(), backend("triton"):
            return fused(x)

    def eager() -> Tensor:
        with torch.no_grad():
            return stock(x)

    expected = _reference(name)
    errors = {
        engine: measure.relative_error(call()[:1].cpu(), expected)
        for engine, call in (("triton", triton), ("stock", eager))
    }
    seconds = gpu_seconds({"triton": triton, "stock": eager}, rounds=9)
    data = {
        "ms": {engine: round(1e3 * s, 4) for engine, s in seconds.items()},
        "triton_is_faster": round(seconds["stock"] / seconds["triton"], 3),
        "errors": errors,
    }
    elsewhere = [f"{r.layer}: {r.kernel} ({r.reason})" for r in explain(fused) if r.backend != "triton"]
    if elsewhere:
        raise Failed(f"{len(elsewhere)} layers did not run through Triton, first {elsewhere[0]}", data)
    if not errors["triton"] <= 2 * errors["stock"] + torch.finfo(dtype).eps / 2:
        raise Failed(f"the network's error through Triton is {errors['triton']:.1e}", data)
    return data


# ---- floors ----


@dataclass(frozen=True)
class Floor:
    """What a measurement has to reach; on another GPU than the one it is meant for it only informs.

    `sections`: where it is measured; the least of them counts, and all must have been measured. `value`: its name in
    their data, with dots between levels.
    """

    what: str
    sections: tuple[str, ...]
    value: str
    at_least: float
    gpu: str = "H200"


def _title(name: str, dtype: str, batch: int, engines: Sequence[str]) -> str:
    return f"{name} {dtype} batch {batch}: {', '.join(engines)}"


EAGER = ("stock", "fused")
FLOORS = (
    Floor(
        "r3d_18 bf16 batch 32, times faster than cuDNN eager channels_last_3d",
        (_title("r3d_18", "bf16", 32, EAGER),),
        "engines.stock.fused_is_faster",
        1.6,
    ),
    Floor(
        "r3d_18 bf16 batch 32, times faster than the best torch.compile (default, max-autotune)",
        tuple(_title("r3d_18", "bf16", 32, (*EAGER, compiler)) for compiler in COMPILERS),
        "faster_than_best_compile",
        1.25,
    ),
    Floor(
        "each 3x3x3 layer of r3d_18 with 128 channels or more, bf16 batch 32, share of the measured matrix rate",
        ("conv3d_sm90 speed, r3d_18 batch 32",),
        "least_share_wide",
        0.60,
    ),
    Floor(
        "each 3x3x3 layer of r3d_18 with 64 channels, bf16 batch 32, share of the measured matrix rate",
        ("conv3d_sm90 speed, r3d_18 batch 32",),
        "least_share_64",
        0.45,
    ),
    Floor(
        "r3d_18 bf16 batch 1 as a CUDA graph, times faster than eager",
        ("r3d_18 bf16 batch 1 as a CUDA graph",),
        "graphed_is_faster",
        3.0,
    ),
    Floor(
        "goal: clips/s of r3d_18 bf16 batch 32",
        (_title("r3d_18", "bf16", 32, EAGER),),
        "engines.fused.clips_per_s",
        6000,
    ),
    Floor(
        "goal: clips/s of hara_r3d_18 bf16 batch 32",
        (_title("hara_r3d_18", "bf16", 32, EAGER),),
        "engines.fused.clips_per_s",
        20000,
    ),
    Floor(
        "r3d_18 bf16 batch 32 through Triton alone, times faster than cuDNN eager channels_last_3d",
        ("Triton: r3d_18 bf16 batch 32",),
        "triton_is_faster",
        1.25,
    ),
    Floor(
        "training norm bf16, forward and backward, share of the measured copy bandwidth",
        ("Triton: training norm",),
        "share_of_copy",
        0.8,
    ),
)


def _value(section: dict[str, Any], path: str) -> float | None:
    data: Any = section.get("data") if section.get("status") in ("measured", "failed") else None
    for key in path.split("."):
        data = data.get(key) if isinstance(data, dict) else None
    return data if isinstance(data, (int, float)) else None  # not "nan", which stands for one in JSON


def floors(sections: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each floor with its value and whether it holds, both 'not measured' where a section has no such value."""
    by_name = {s["name"]: s for s in sections}
    gpu = (by_name.get("environment", {}).get("data") or {}).get("gpu", "unknown")
    rows = []
    for floor in FLOORS:
        values = [_value(by_name.get(name, {}), floor.value) for name in floor.sections]
        known = [v for v in values if v is not None]
        value = min(known) if len(known) == len(values) else None
        rows.append(
            {
                "what": floor.what,
                "at_least": floor.at_least,
                "value": "not measured" if value is None else value,
                "holds": "not measured" if value is None else value >= floor.at_least,
                "gpu": gpu,
                "meant_for": floor.gpu,
            }
        )
    return rows


# ---- compute-sanitizer ----


def sanitizer_path() -> str | None:
    from torch.utils.cpp_extension import CUDA_HOME

    candidates = [shutil.which("compute-sanitizer")]
    if CUDA_HOME:
        candidates.append(shutil.which("compute-sanitizer", path=os.path.join(CUDA_HOME, "bin")))
    return next((path for path in candidates if path), None)


def sanitize(left: Callable[[], float]) -> dict[str, Any]:
    """memcheck, racecheck and synccheck over small calls, each in a process of its own and a share of the time."""
    require_op()
    from r3d_kernels import backends

    tool = sanitizer_path()
    if tool is None:
        raise NotHere("compute-sanitizer is not installed")
    here = {k.name for k in backends.KERNELS}  # less what has broken the GPU before
    without = [f"--without={name}" for name in ("wgmma", "sm80") if name not in here]
    checks = ("memcheck", "racecheck", "synccheck")
    results: dict[str, str] = {}
    for i, check in enumerate(checks):
        # Libraries ask the driver for functions that it may not have: no error of a kernel of ours, and only those
        # are watched, or there would not be time for them.
        options = ["--error-exitcode=9", "--report-api-errors=no", "--kernel-name=kns=r3d"]
        child = [sys.executable, str(Path(__file__).resolve()), "--sanitizer-child", *without]
        results[check] = _sanitized(
            [tool, f"--tool={check}", *options, *child], (left() - 3) / (len(checks) - i)
        )
        progress(**results)
    bad = {check: said for check, said in results.items() if said.startswith("exit code")}
    if bad:
        raise Failed("; ".join(f"{check}: {said}" for check, said in bad.items()), results)
    return results


def _sanitized(command: Sequence[str], seconds: float) -> str:
    """What came of a command that may take so long; it is ended with all that it has started."""
    if seconds <= 1:
        return "not measured: no time was left"
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # an allocation for each tensor: in torch's blocks, its neighbour is no end of memory
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    try:
        said, _ = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not measured: took longer than {seconds:.0f} s"
    finally:
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if child.returncode == 0:
        return "clean"
    told = [line.strip("= ") for line in said.splitlines() if "=========" in line]
    return f"exit code {child.returncode}: " + " ".join(told[:4] + told[-1:])


def sanitizer_child(without: Sequence[str] = ()) -> int:
    """What compute-sanitizer watches: sizes with tails in every dimension."""
    require_op()
    with contextlib.suppress(NotHere):
        if "wgmma" in without:
            raise NotHere
        require_sm90()
        for text in gpu_sm90.CORNERS[:-2]:
            w = gpu_sm90.work(ConvProblem.parse(text), torch.bfloat16)
            w.ours()
            w.dense().ours()  # copied first where channels are no multiple of 8
        for tile in range(len(gpu_sm90.TILES)):
            gpu_sm90.work(ConvProblem.parse(gpu_sm90.EVERY_TILE[0]), torch.float16).ours(1 << tile, 2)
    if "sm80" not in without:
        gpu_sm80.small_calls()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for channels in CHANNELS:
            for residual in (False, True):
                epilogue((1, channels, 2, 3, 5), dtype, residual=residual).ours()
    torch.cuda.synchronize()
    return 0


# ---- the machine ----


def nvidia_smi(fields: str) -> str | None:
    """What it says of torch's first device; None where it says nothing."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"
    try:
        return subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", first],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu"


def environment() -> dict[str, Any]:
    """The GPU, its clocks, versions, and the switches that decide what stock torch computes."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": nvidia_smi("driver_version"),
        "clocks": {"fields": CLOCKS, "values": nvidia_smi(CLOCKS)},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
    }


# ---- the report ----


def plan(left: Callable[[], float]) -> list[Section]:
    """All sections, the most important first: what decides whether numbers mean anything, then what has a floor.

    `left` tells the seconds that the section which asks may still take.
    """
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = (
            True  # the strong stock baseline: cuDNN picks its algorithms by measuring them
        )

    def hopper(title: str, run: Callable[[], dict[str, Any]], needs: float, most: float = 60.0) -> Section:
        return Section(f"conv3d_sm90{title}", run, needs, most, "wgmma")

    def speed(name: str, batch: int) -> Section:
        return hopper(f" speed, {name} batch {batch}", functools.partial(sm90_speed, name, batch), 10)

    def network(
        name: str,
        dtype: str,
        batch: int,
        engines: tuple[str, ...] = EAGER,
        needs: float = 10.0,
        most: float = 60.0,
    ) -> Section:
        run = functools.partial(network_speed, name, dtype, batch, engines)
        return Section(_title(name, dtype, batch, engines), run, needs, most)

    def compiled(name: str, dtype: str, batch: int, compiler: str = "compile") -> Section:
        tuned = compiler == "max-autotune"
        return network(name, dtype, batch, (*EAGER, compiler), 90 if tuned else 40, 240 if tuned else 120)

    sm80 = {s.name: s for s in gpu_sm80.sections(sys.modules[__name__])}
    sizes = [(batch, dtype) for batch in (8, 1, 32) for dtype in ("bf16", "fp32")]
    sections = [
        Section("environment", environment),
        hopper(" against float64", check_sm90, 10, 90),
        sm80.pop("sm80 convolution against float64"),
        Section("bn_act against float64", check_bn_act, needs=5),
        hopper(": the trial of every tile", check_sm90_trial, 5),
        sm80.pop("max-pool and head"),
        hopper(": 200 repetitions, bitwise", check_sm90_repetitions, 5),
        hopper(": CUDA graph", check_sm90_graph, 3),
        hopper(": two streams", check_sm90_streams, 3),
        Section("roofline", roofline, needs=5),
        speed("r3d_18", 32),
        network("r3d_18", "bf16", 32),
        sm80.pop("r3d_18 bf16 batch 1 as a CUDA graph"),
        network("r3d_18", "bf16", 1),
        network("r3d_18", "bf16", 8),
        compiled("r3d_18", "bf16", 32),
        network("hara_r3d_18", "bf16", 32),
        sm80.pop("uint8 clips against float64"),
        Section("compute-sanitizer", lambda: sanitize(left), needs=45, most=150),
        Section("200 repetitions, bitwise", check_repetitions, needs=5),
        sm80.pop("sm80 convolution: 200 repetitions, bitwise"),
        Section("CUDA graph", check_graph, needs=3),
        Section("two streams", check_streams, needs=3),
        Section("bn_act speed", bn_act_speed, needs=5),
        Section("a second device", check_second_device, needs=10),
        compiled("r3d_18", "bf16", 32, "max-autotune"),
        Section("Triton against float64", lambda: check_triton(left=left), 45, 90, "triton"),
        # its tuner may take 15 s for each of 15 layers
        Section(
            "Triton: r3d_18 bf16 batch 32", lambda: triton_network("r3d_18", "bf16", 32), 60, 260, "triton"
        ),
        Section("Triton: training norm", triton_norm_speed, 10, 60, "triton"),
        *(speed(*which) for which in (("r3d_18", 8), ("r3d_18", 1), ("hara_r3d_50", 8), ("r2plus1d_18", 8))),
        hopper(": every tile, r3d_18 batch 32", functools.partial(sm90_tiles, "r3d_18", 32), 15),
        network("r2plus1d_18", "bf16", 8),
        *(network("r3d_18", "fp32", batch) for batch in (8, 1, 32)),
        *sm80.values(),
        Section(
            "Triton: layers of r3d_18 bf16 batch 8",
            lambda: triton_layers(network_layers("r3d_18", 8), "bf16", left),
            needs=30,
            most=180,
            kernel="triton",
        ),
        *gpu_triton.sections(sys.modules[__name__]),
    ]
    names = {s.name for s in sections}
    for name in ("hara_r3d_50", "hara_r3d_18"):
        more = [network(name, dtype, batch) for batch, dtype in sizes]
        sections += [s for s in more if s.name not in names]
    for name, dtype, batch in (
        ("r3d_18", "bf16", 8),
        ("r3d_18", "bf16", 1),
        ("r3d_18", "fp32", 8),
        ("hara_r3d_50", "bf16", 8),
        ("hara_r3d_18", "bf16", 8),
    ):
        sections.append(compiled(name, dtype, batch))
    sections += [compiled("r3d_18", "bf16", batch, "max-autotune") for batch in (1, 8)]
    sections.append(Section("clocks at the end", lambda: {"fields": CLOCKS, "values": nvidia_smi(CLOCKS)}))
    return sections


def draw(path: Path, data: dict[str, Any]) -> None:
    """Networks: milliseconds of each engine over the fused network's. Layers: their share of a matrix product's rate.

    The operation: its share of a copy's speed. Where there is none of it, what became of each section.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    known = [s["data"] for s in data["sections"] if isinstance(s.get("data"), dict)]
    panels: list[tuple[str, list[tuple[str, float, str]]]] = [
        ("time over the fused network's", _network_bars(known)),
        ("rate over that of a large matrix product", _layer_bars(known)),
        ("bn_act: bandwidth over that of a copy", _copy_bars(known)),
    ]
    panels = [(label, bars) for label, bars in panels if bars]
    height = max(3.0, 0.3 * max((len(bars) for _, bars in panels), default=len(data["sections"])) + 1.5)
    count = max(len(panels), 1)
    figure, axes = plt.subplots(1, count, figsize=(6.5 * count, height), layout="constrained", squeeze=False)
    for axis, (label, bars) in zip(axes[0], panels, strict=False):
        names, values, shades = zip(*bars, strict=True)
        places = range(len(bars))
        axis.barh(places, values, color=shades)
        axis.set_yticks(places, names, fontsize=7)
        axis.invert_yaxis()
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_xlabel(label)
    if not panels:
        told = [f"{s['name']}: {s['status']} ({s.get('reason', '')})"[:140] for s in data["sections"]]
        axes[0][0].set_axis_off()
        axes[0][0].text(0, 1, "\n".join(told), va="top", fontsize=7, transform=axes[0][0].transAxes)
    gpu = next((d["gpu"] for d in known if "gpu" in d), "")
    figure.suptitle(f"{gpu}, torch {torch.__version__}")
    figure.savefig(path, dpi=130)
    plt.close(figure)


_COLOURS = {"fused": "#d1495b", "stock": "#8d99ae", "compile": "#5c677d", "max-autotune": "#33415c"}


def _network_bars(known: Sequence[dict[str, Any]]) -> list[tuple[str, float, str]]:
    return [
        (f"{d['network']} {d['dtype']} b{d['batch']} {engine}", value["fused_is_faster"], _COLOURS[engine])
        for d in known
        if "engines" in d
        for engine, value in d["engines"].items()
        if isinstance(value["fused_is_faster"], (int, float))
    ]


def _layer_bars(known: Sequence[dict[str, Any]]) -> list[tuple[str, float, str]]:
    return [
        (f"{d['network']} b{d['batch']} {row['layer']}", row["share_of_matmul"], _COLOURS["fused"])
        for d in known
        if "matmul_tflop_per_s" in d and "network" in d
        for row in d.get("layers", [])
        if isinstance(row["share_of_matmul"], (int, float))
    ]


def _copy_bars(known: Sequence[dict[str, Any]]) -> list[tuple[str, float, str]]:
    rows = next((d["rows"] for d in known if "copy_gbyte_per_s" in d and "rows" in d), [])
    return [
        (f"{row['dtype']} {row['shape']}", row["share_of_copy"], _COLOURS["fused"])
        for row in rows
        if isinstance(row["share_of_copy"], (int, float))
    ]


def _verdict(row: dict[str, Any]) -> str:
    if row["holds"] == "not measured":
        return "not measured"
    verdict = "holds" if row["holds"] else "does not hold"
    here = row["meant_for"] in row["gpu"]
    return (
        verdict if here else f"{verdict}, on {row['gpu']} and not on the {row['meant_for']} it is meant for"
    )


def earlier(path: Path, gpu: str | None, commit: str | None) -> list[dict[str, Any]]:
    """The entries of a report on disk that need not be measured again; none where it is of another GPU or commit."""
    try:
        data = json.loads(path.read_text())
        if data["machine"]["commit"] != commit:
            return []
        entries = [s for s in data["sections"] if s["status"] == "measured"]
        of = next((s["data"]["gpu"] for s in entries if s["name"] == "environment"), None)
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return entries if of is not None and of == gpu else []


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", metavar="DIR", default="gpu_report", help="default: %(default)s")
    parser.add_argument("--budget", type=float, default=570.0, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument(
        "--only",
        metavar="REGEX",
        default="",
        help="the sections in whose names it is found, and the environment",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep what the report in DIR has measured on the same GPU, and go on",
    )
    parser.add_argument("--list", action="store_true", help="print the names of the sections and end")
    parser.add_argument("--sanitizer-child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--without", action="append", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        wanted = re.compile(args.only)
    except re.error as e:
        parser.error(f"--only: {e}")
    sections = [s for s in plan(lambda: 0.0) if wanted.search(s.name) or s.name == "environment"]
    if args.list:
        print("\n".join(s.name for s in sections))
        return 0
    if not torch.cuda.is_available():
        print("gpu_report: no CUDA device here (torch.cuda.is_available() is False)", file=sys.stderr)
        return 3
    if args.sanitizer_child:
        return sanitizer_child(args.without)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "gpu_report.json"
    worker = Worker(plan)
    machine = measure.machine()
    report = Report(
        budget=args.budget,
        save=functools.partial(measure.write_json, file),
        say=functools.partial(print, flush=True),
        head={"machine": machine},
        tail=lambda entries: {"floors": floors(entries), "kernels_left_out": dict(worker.without)},
        execute=worker,
        sections=earlier(file, nvidia_smi("name"), machine["commit"]) if args.resume else [],
    )
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # who ends it gets what it has
    try:
        good = report.run(sections)
    except KeyboardInterrupt:
        print("gpu_report: ended from outside", file=sys.stderr)
        good = False
    finally:
        signal.signal(signal.SIGTERM, before)
        worker.stop()
    for row in floors(report.sections):
        print(f"floor: {row['what']}: {row['value']}, at least {row['at_least']}: {_verdict(row)}")
    try:
        draw(out / "gpu_report.png", report.data())
    except Exception as e:  # the JSON is what counts
        print(f"gpu_report: no picture: {type(e).__name__}: {e}", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
