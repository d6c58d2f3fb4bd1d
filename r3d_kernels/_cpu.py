"""What Linux says of the processor, and what it takes back of memory."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from r3d_kernels import _extension

__all__ = ["cpu_flags", "cpu_model", "release_free_memory"]


@cache
def _info() -> dict[str, str]:
    """The first processor's entries in /proc/cpuinfo; empty on other systems."""
    entries: dict[str, str] = {}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return entries
    for line in lines:
        key, _, value = line.partition(":")
        entries.setdefault(key.strip(), " ".join(value.split()))
    return entries


def cpu_model() -> str:
    """Its name, or at least its kind."""
    return _info().get("model name") or platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """Its instruction sets, as Linux names them."""
    return frozenset(_info().get("flags", "").split())


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        trim = ctypes.CDLL(None).malloc_trim  # glibc only
    except (AttributeError, OSError, TypeError):
        return None
    trim.argtypes = [ctypes.c_size_t]
    return trim


def release_free_memory() -> None:
    """Gives memory that nobody uses back to the system: outputs that wait to be used again, and the allocator's."""
    if _extension.error is None:
        torch.ops.r3d_kernels.release_free_outputs()
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
