"""Whole networks in the GPU report: fused against stock and torch.compile, time, peak memory and error."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import measure
import torch
from gpu_common import gpu_seconds, require_op
from gpu_sections import Failed, NotHere, progress
from torch import Tensor, nn

from r3d_kernels.problems import ConvProblem

__all__ = [
    "COMPILERS",
    "check_second_device",
    "graphed_speed",
    "network_layers",
    "network_speed",
    "placed",
    "quick",
    "quick_choice",
    "reference",
]

COMPILERS = {"compile": "default", "max-autotune": "max-autotune"}  # engine -> torch.compile's mode


@functools.lru_cache(maxsize=4)
def _network(name: str) -> nn.Module:
    from r3d_kernels.models import create_model

    torch.manual_seed(0)
    return measure.calibrate(create_model(name, fused=False))


def placed(name: str, dtype: torch.dtype, fused: bool) -> nn.Module:
    model = copy.deepcopy(_network(name))
    for module in model.modules():
        if isinstance(getattr(module, "fused", None), bool):
            module.fused = fused
    return model.to(device="cuda", dtype=dtype, memory_format=torch.channels_last_3d)


@functools.lru_cache(maxsize=4)
def reference(name: str) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(_network(name)).double()(measure.clip(1).double())


def network_layers(network: str, batch: int) -> list[tuple[ConvProblem, int]]:
    """The distinct convolutions of a network, and how often it has each."""
    from r3d_kernels.models import create_model
    from r3d_kernels.problems import LAYER_INPUT, network_problems, unique

    with torch.device("meta"):
        model = create_model(network)
    return unique(network_problems(model, (batch, *LAYER_INPUT[1:])))


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


def _quiet_inductor() -> None:
    """max-autotune prints every choice of every layer, hundreds of lines."""
    import torch._inductor.config as inductor

    for name, value in (("autotune_num_choices_displayed", 0), ("max_autotune_report_choices_stats", False)):
        if hasattr(inductor, name):
            setattr(inductor, name, value)


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
    expected = reference(name)
    calls: dict[str, Callable[[], Tensor]] = {}
    errors, peaks = {}, {}

    def forward(model: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                return model(x)

        return run

    kernels: dict[str, int] = {}
    for engine in engines:
        model = placed(name, dtype, fused=engine == "fused")
        if engine in COMPILERS:
            torch._dynamo.reset()
            _quiet_inductor()
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


@quick
def graphed_speed(name: str, batch: int) -> dict[str, Any]:
    """A small batch as one CUDA graph: the eager pass's bits, also for new data and a second shape, and its time."""
    models = {engine: placed(name, torch.bfloat16, engine == "fused") for engine in ("stock", "fused")}
    clips = [
        measure.clip(n, seed=n).to("cuda", torch.bfloat16, memory_format=torch.channels_last_3d)
        for n in (batch, batch + 1)
    ]
    call = models["fused"].graphed(clips[0])
    with torch.no_grad():
        for x in (clips[0], clips[0] * 0.5, clips[1]):
            if not torch.equal(call(x), models["fused"](x)):
                raise Failed(f"the graph gives another result than the pass, shape {list(x.shape)}")
        x = clips[0]
        calls = {engine: functools.partial(model, x) for engine, model in models.items()}
        seconds = gpu_seconds({**calls, "graphed": functools.partial(call, x)}, rounds=9)
    return {
        "network": name,
        "dtype": "bf16",
        "batch": batch,
        "graphed_ms": {engine: round(1e3 * s, 4) for engine, s in seconds.items()},
        "graphed_clips_per_s": round(batch / seconds["graphed"], 1),
        "graphed_is_faster": round(seconds["stock"] / seconds["graphed"], 3),
    }
