"""Looks at this machine and this installation: versions, compilers, processor, GPU, what was compiled, bugs.

Exit code 0 if the package is usable, 1 if its extension cannot be loaded. Needs no optional package.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r3d_kernels._cpu import cpu_flags, cpu_model
from r3d_kernels._version import __version__
from r3d_kernels.cli import common

HELP = "what is installed, compiled and usable here, and which upstream bugs apply"

# Distribution names. torch and Python are told apart, with how they were built.
_PACKAGES = ("numpy", "triton", "av", "rich", "matplotlib", "scikit-video", "ninja")
# What makes a difference for a convolution: vectors, fused multiply-add, bfloat16 products, tiles.
_ISA = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    report = examine()
    if args.json:
        common.write_json("-", report)
    else:
        print(to_text(report))
    return 0 if report["usable"] else 1


def examine() -> dict[str, Any]:
    """The whole report as plain data: dicts, lists, strings, numbers."""
    extension = _extension()
    return {
        "usable": extension["loaded"],
        "extension": extension,
        "versions": _versions(),
        "compilers": _compilers(),
        "cpu": _cpu(),
        "gpus": _gpus(),
        "tuning_cache": _tuning_cache(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("R3D_KERNELS_")},
        "upstream_bugs": [_bf16_narrow_conv(), _cudnn_conv3d()],
    }


# -- the parts ---------------------------------------------------------------------------------------------


def _extension() -> dict[str, Any]:
    """Whether the compiled part loads, and what it says of itself; `error` where it does not."""
    try:
        from r3d_kernels import _extension as binary

        binary.require()
        from r3d_kernels import backends

        facts = {key: _plain(value) for key, value in backends.describe().items()}
    except (
        Exception
    ) as e:  # whatever is wrong with a binary: not there, an undefined symbol, another torch's ABI
        return {"loaded": False, "error": common.one_line(e)}
    facts.pop("error", None)
    facts.pop("tuning_cache", None)  # has its own section
    return {"loaded": True, "path": facts.pop("extension", str(binary.path)), **facts}


def _tuning_cache() -> dict[str, Any]:
    """Where the measured choices lie, and how many there are for all machines together."""
    try:
        from r3d_kernels import tuning

        path, enabled = tuning.cache_path(), tuning.enabled()
    except ValueError as e:  # R3D_KERNELS_TUNE has a strange value
        return {"enabled": None, "error": common.one_line(e)}
    except ImportError as e:
        return {"enabled": False, "error": common.one_line(e)}
    machines, damage = tuning.read_cache(path)
    found = {"enabled": enabled, "path": str(path), "entries": sum(map(len, machines.values()))}
    if damage:
        found["ignored"] = common.one_line(damage)
    with contextlib.suppress(OSError):  # where there are any: what is not tried until they are removed
        if traces := [t for t in sorted(path.parent.glob("trying-*.txt")) if t.stat().st_size]:
            found["not_survived"] = [f"{_first_line(t)} ({t})" for t in traces]
    return found


def _first_line(path: Path) -> str:
    from r3d_kernels import tuning

    try:
        data = tuning.read_regular(path)
    except OSError as e:  # one that cannot be read must not hide the others
        return e.strerror or type(e).__name__
    return common.one_line(data.decode(errors="replace").partition("\n")[0][:200] or "?")


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(v) for v in value]
    return str(value)


def _versions() -> dict[str, str | None]:
    import torch

    versions: dict[str, str | None] = {
        "r3d_kernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch CUDA": torch.version.cuda,
        "cuDNN": _cudnn_text(_cudnn_version()),
    }
    return versions | {name: _version(name) for name in _PACKAGES}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compilers() -> dict[str, str | None]:
    """Name -> "version (path)", None where there is none. Needed to install from source, not to run."""
    cuda_home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    cxx = os.environ.get("CXX", "").split()
    return {
        "c++": _tool(cxx[0] if cxx else "c++"),
        "nvcc": _tool("nvcc", os.path.join(cuda_home, "bin")),
        "ninja": _tool("ninja"),
    }


def _tool(name: str, folder: str | None = None) -> str | None:
    path = shutil.which(name, path=folder) if folder else None
    path = path or shutil.which(name)
    if path is None:
        return None
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError) as e:
        return f"does not run: {common.one_line(e)} ({path})"
    lines = [line.strip() for line in (done.stdout or done.stderr).splitlines() if line.strip()]
    # nvcc prints a copyright before its release.
    line = next((text for text in lines if "release" in text), lines[0] if lines else "unknown version")
    return f"{line} ({path})"


def _cpu() -> dict[str, Any]:
    import torch

    return {
        "model": cpu_model(),
        "isa": {flag: flag in cpu_flags() for flag in _ISA},
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": facts.name,
                "compute_capability": f"{facts.major}.{facts.minor}",
                "memory_gib": round(facts.total_memory / 2**30, 1),
            }
        )
    return gpus


# -- upstream bugs -----------------------------------------------------------------------------------------


def _bf16_narrow_conv() -> dict[str, Any]:
    """oneDNN's AMX kernel: wrong bfloat16 Conv3d where the output is 1 wide and strided."""
    import torch
    import torch.nn.functional as F

    bug = {
        "issue": "pytorch#169688",
        "what": "stock CPU bfloat16 Conv3d is wrong where the output is 1 wide and the stride along it > 1",
        "how": "measured",
    }
    random = torch.Generator().manual_seed(0)
    worst = 0.0
    # Shapes that the bug needs many channels for: the start of an R3D-18's last stage on a small input, and
    # two more.
    for channels, filters, stride, padding, sides in (
        (256, 512, 2, 1, (2, 4, 2)),
        (512, 96, 2, 1, (2, 4, 2)),
        (313, 96, 3, 0, (12, 14, 4)),
    ):
        x = torch.randn(1, channels, *sides, generator=random).bfloat16()
        weight = (
            torch.randn(filters, channels, 3, 3, 3, generator=random) / math.sqrt(channels * 27)
        ).bfloat16()
        try:
            got = F.conv3d(x, weight, stride=stride, padding=padding).double()
        except RuntimeError as e:
            return {
                **bug,
                "applies": False,
                "detail": f"bfloat16 Conv3d does not run here: {common.one_line(e)}",
            }
        want = F.conv3d(x.double(), weight.double(), stride=stride, padding=padding)
        error = ((got - want).norm() / want.norm()).item()
        worst = max(worst, error if math.isfinite(error) else math.inf)
    # Rounding alone gives about 2e-3.
    applies = worst > 0.02
    return {**bug, "applies": applies, "detail": f"relative L2 error against float64: {worst:.1e}"}


def _cudnn_version() -> int | None:
    import torch

    with contextlib.suppress(RuntimeError):  # a cuDNN that does not match the one torch was compiled with
        return torch.backends.cudnn.version()
    return None


def _cudnn_text(version: int | None) -> str | None:
    if version is None:
        return None
    # 91002 is 9.10.2; before version 9 it was 8902 for 8.9.2.
    major, rest = divmod(version, 10000) if version >= 90000 else divmod(version, 1000)
    return f"{major}.{rest // 100}.{rest % 100}"


def _cudnn_conv3d(version: int | None = None) -> dict[str, Any]:
    """cuDNN 9.8 to 9.14: wrong 16-bit Conv3d on large inputs; newer torch avoids it and is slow instead."""
    import torch

    bug = {
        "issue": "pytorch#163539, pytorch#166122",
        "what": "stock 16-bit Conv3d on a GPU, cuDNN 9.8 to 9.14: wrong on large inputs, or slow",
        "how": "by version",
    }
    version = _cudnn_version() if version is None else version
    if version is None:
        return {**bug, "applies": False, "detail": "this torch has no cuDNN"}
    affected = 90800 <= version < 91500
    detail = f"cuDNN {_cudnn_text(version)}"
    if affected:
        detail += "; 'pip install -U nvidia-cudnn-cu12' (9.15 or newer; -cu13 for CUDA 13) mends it"
        if not torch.cuda.is_available():
            detail += "; no usable GPU here, so nothing runs into it"
    return {**bug, "applies": affected and torch.cuda.is_available(), "detail": detail}


# -- text --------------------------------------------------------------------------------------------------


def to_text(report: dict[str, Any]) -> str:
    lines: list[str] = []

    def section(title: str, rows: Mapping[str, Any]) -> None:
        lines.append(title)
        width = max((len(key) for key in rows), default=0)
        lines.extend(f"  {key:<{width}}  {_text(value)}" for key, value in rows.items())
        lines.append("")

    extension = report["extension"]
    section("versions", report["versions"])
    section("compilers (to install from source)", report["compilers"])
    cpu = report["cpu"]
    has = [flag for flag, present in cpu["isa"].items() if present]
    lacks = [flag for flag, present in cpu["isa"].items() if not present]
    section(
        "processor",
        {
            "model": cpu["model"],
            "has": has,
            "lacks": lacks,
            "used by r3d_kernels": extension.get("isa"),
            "used by torch": cpu["torch_capability"],
            "threads": f"{cpu['threads']} of {cpu['cores']} cores",
        },
    )
    gpus = {
        str(i): f"{g['name']}, compute capability {g['compute_capability']}, {g['memory_gib']} GiB"
        for i, g in enumerate(report["gpus"])
    }
    section("GPUs", gpus or {"none": "usable by this torch"})
    section("extension", {key.replace("_", " "): value for key, value in extension.items()})
    section("tuning cache", report["tuning_cache"])
    section("environment", report["environment"] or {"none": "of R3D_KERNELS_*"})
    lines.append("known upstream bugs")
    for bug in report["upstream_bugs"]:
        verdict = "APPLIES" if bug["applies"] else "does not apply"
        lines.append(f"  {verdict}: {bug['what']}")
        lines.append(f"    {bug['issue']} ({bug['how']}): {bug['detail']}")
    lines.append("")
    if report["usable"]:
        lines.append("r3d_kernels is usable here")
    else:
        lines.append(f"r3d_kernels is NOT usable here: {extension['error']}")
    return "\n".join(lines)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "-"
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={_text(v)}" for k, v in value.items()) or "-"
    return re.sub(r"\s+", " ", str(value))
