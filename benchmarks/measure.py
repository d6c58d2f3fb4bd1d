"""What the benchmarks share: the machine, models with real statistics, interleaved timing, errors, JSON."""

from __future__ import annotations

import argparse
import ctypes
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from r3d_kernels._cpu import cpu_flags, cpu_model
from r3d_kernels.models import create_model, list_models

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CLIP = (3, 16, 112, 112)  # [C, D, H, W]

ROOT = Path(__file__).resolve().parent.parent


# ---- the machine ----

VARIABLES = (  # of the environment, which decide what is measured
    "R3D_KERNELS_BACKEND",
    "R3D_KERNELS_ISA",
    "R3D_KERNELS_FP32",
    "R3D_KERNELS_MEMORY",
    "R3D_KERNELS_TUNE",
    "ONEDNN_MAX_CPU_ISA",
)


def _first_match(path: str, pattern: str) -> str | None:
    try:
        match = re.search(pattern, Path(path).read_text(), re.MULTILINE)
    except OSError:
        return None
    return match.group(1).strip() if match else None


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The checkout's commit, with '+dirty' where files differ from it; None outside a checkout.

    R3D_KERNELS_COMMIT says it of a copy on another machine.
    """
    if told := os.environ.get("R3D_KERNELS_COMMIT"):
        return told

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def command() -> str:
    """What reproduces this run in a shell: variables that decide what is measured, and the arguments."""
    set_here = [f"{name}={shlex.quote(os.environ[name])}" for name in VARIABLES if os.environ.get(name)]
    arguments = ["python", *(os.path.relpath(a) if os.path.isabs(a) else a for a in sys.argv)]
    return " ".join([*set_here, shlex.join(arguments)])


def machine() -> dict[str, Any]:
    """What a reader needs to know about where the numbers come from."""
    wanted = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16")
    onednn = re.search(r"MKL-DNN (v[\d.]+)", torch.__config__.show())
    packages = ("torch", "openvino", "onnxruntime", "onnx", "triton", "numpy", "r3d-kernels")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command(),
        "commit": commit(),
        "cpu": cpu_model(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "flags": [flag for flag in wanted if flag in cpu_flags()],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "onednn": onednn.group(1) if onednn else None,
        "versions": {name: told for name in packages if (told := version(name))},
    }


def write_json(path: str | os.PathLike[str], data: Any) -> None:
    """All or nothing: a reader, or a run that is killed, never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(finite(data), indent=1, allow_nan=False) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def finite(data: Any) -> Any:
    """NaN and infinities as text: JSON has neither, and a wrong result must not lose the report."""
    if isinstance(data, Mapping):
        return {str(key): finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    return str(data) if isinstance(data, float) and not math.isfinite(data) else data


# ---- models and data ----


@dataclass(frozen=True)
class Network:
    """A network and the clip that it is given."""

    name: str  # as create_model knows it
    clip: tuple[int, int, int, int]  # [C, D, H, W]
    text: str  # what `parse` read

    @classmethod
    def parse(cls, text: str) -> Network:
        """NAME, or NAME@CxDxHxW."""
        name, _, size = text.partition("@")
        if name not in list_models():
            raise argparse.ArgumentTypeError(f"unknown network {name!r}; known: {', '.join(list_models())}")
        if not size:
            channels = create_model(name, device="meta").in_channels
            return cls(name, (channels, *CLIP[1:]), text)
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3}", size):
            raise argparse.ArgumentTypeError(
                f"{text!r}: expected NAME@CxDxHxW, such as hara_r3d_18@1x96x96x96"
            )
        return cls(name, tuple(map(int, size.split("x"))), text)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return self.text

    def build(self, **kwargs: Any) -> nn.Module:
        """The network with random weights; keyword arguments as of create_model."""
        return create_model(self.name, in_channels=self.clip[0], **kwargs)

    def clips(self, batch: int, seed: int = 0) -> Tensor:
        """Normal values that bfloat16 holds exactly, so that every engine sees the same input."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn((batch, *self.clip), generator=generator).bfloat16().float()  # [N, C, D, H, W]


def clip(batch: int, seed: int = 0, channels: int = CLIP[0]) -> Tensor:
    """A normal clip whose values bfloat16 holds exactly, so that every engine sees the same input."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((batch, channels, *CLIP[1:]), generator=generator)  # [N, C, D, H, W]
    return x.bfloat16().float()


@torch.no_grad()
def calibrate(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every batch norm statistics of real activations, then moves them off the identity.

    Fresh statistics (mean 0, variance 1) hide errors in folding, and let activations of a deep random network
    grow or vanish. The model is left in eval mode.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches seen
    model.train()
    first = next(m for m in model.modules() if isinstance(m, nn.Conv3d))
    model(clip(2, seed, first.in_channels))
    generator = torch.Generator().manual_seed(seed)
    for norm, value in zip(norms, momentum, strict=True):
        norm.momentum = value

        def uniform(low: float, high: float, count: int = norm.num_features) -> Tensor:
            return torch.rand(count, generator=generator) * (high - low) + low

        norm.running_mean += norm.running_var.sqrt() * uniform(-0.3, 0.3)
        norm.running_var *= uniform(0.7, 1.4)
        norm.weight.copy_(uniform(0.5, 1.5))
        norm.bias.copy_(uniform(-0.3, 0.3))
    return model.eval()


def relative_error(y: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference over that of the expectation, in float64."""
    expected = expected.double()
    return float((y.double() - expected).norm() / expected.norm())


# ---- time ----


@dataclass
class Times:
    """Seconds of one engine, in the order they were taken."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        return min(self.seconds)

    def summary(self) -> dict[str, Any]:
        """Milliseconds, as reports store them."""
        ms = sorted(1e3 * s for s in self.seconds)
        quarter = len(ms) // 4
        return {
            "median_ms": round(statistics.median(ms), 4),
            "min_ms": round(ms[0], 4),
            "p25_ms": round(ms[quarter], 4),
            "p75_ms": round(ms[-1 - quarter], 4),
            "rounds": len(ms),
        }


def interleave(
    engines: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 15,
    seconds: float = math.inf,
    settle: float = 0.3,
    clock: Callable[[], float] = time.perf_counter,
    between: Callable[[], Any] | None = None,
) -> dict[str, Times]:
    """Times `engines` in turn, so that a change of the machine's speed meets all of them alike.

    Each engine runs untimed first, and again before every timed call that is shorter than `settle` seconds:
    the caches then hold its own data, and another library's threads have stopped spinning. Every second
    round goes backwards, so that nobody always runs after the same neighbour. After three rounds, `seconds`
    ends it. `between` takes the place of those untimed calls: to empty the caches, say.
    """
    times = {name: Times() for name in engines}
    start = clock()
    estimate: dict[str, float] = {}
    for name, run in engines.items():
        run()
        begin = clock()
        run()
        estimate[name] = clock() - begin
    order = list(engines)
    for done in range(rounds):
        if done >= 3 and clock() - start > seconds:
            break
        for name in order if done % 2 == 0 else reversed(order):
            if between is not None:
                between()
            elif estimate[name] < settle:
                engines[name]()
            begin = clock()
            engines[name]()
            times[name].seconds.append(clock() - begin)
    return times


# ---- memory ----


def status_kib(name: str) -> int:
    """A field of /proc/self/status (VmRSS, VmHWM) in KiB."""
    value = _first_match("/proc/self/status", rf"^{name}:\s*(\d+) kB$")
    if value is None:
        raise OSError(f"/proc/self/status has no {name}")
    return int(value)


def forward_memory(run: Callable[[], Any], repetitions: int = 5) -> dict[str, float]:
    """Peak resident memory of one warm `run`, in MiB.

    extra: what a forward adds to the memory that the warm process holds (median of `repetitions`);
    steady: the highest peak of these forwards, packs and weights included;
    lifetime: the peak since the process began.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    run()
    lifetime = status_kib("VmHWM")
    extra, peaks = [], []
    for _ in range(repetitions):
        if trim is not None:
            trim(0)  # freed memory that the allocator keeps would hide what the forward needs
        before = status_kib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # 5: the peak starts again at the present size
        run()
        peak = status_kib("VmHWM")
        extra.append(peak - before)
        peaks.append(peak)
    return {
        "extra_mib": round(statistics.median(extra) / 1024, 2),
        "extra_min_mib": round(min(extra) / 1024, 2),
        "extra_max_mib": round(max(extra) / 1024, 2),
        "steady_mib": round(max(peaks) / 1024, 2),
        "lifetime_mib": round(max(lifetime, *peaks) / 1024, 2),
        "repetitions": repetitions,
    }
