"""What Linux says of the processor."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

__all__ = ["cpu_flags", "cpu_model"]


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
