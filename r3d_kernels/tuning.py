"""The tuning cache: which kernel was measured to be the fastest for a layer, remembered on disk.

One JSON file, `tuning-v1.json`, in `$R3D_KERNELS_CACHE`, else `$XDG_CACHE_HOME/r3d_kernels`, else
`~/.cache/r3d_kernels`. Entries are grouped by machine (processor, instruction set, threads, torch, package version),
so that a home directory shared by several machines holds them side by side. Written aside and renamed; a damaged file
is ignored with a warning and replaced at the next write. `R3D_KERNELS_TUNE=0` neither measures, reads nor writes.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
import warnings
from pathlib import Path

import torch

from r3d_kernels import _cpu, _version

__all__ = ["TuningCache", "cache_path", "enabled", "machine_key"]

_FORMAT = 1


def enabled() -> bool:
    """Whether layers may be measured: R3D_KERNELS_TUNE is not 0."""
    value = os.environ.get("R3D_KERNELS_TUNE", "1").strip().lower()
    if value not in ("0", "1", ""):
        raise ValueError(f"R3D_KERNELS_TUNE: expected 0 or 1, got {value!r}")
    return value != "0"


def cache_path() -> Path:
    """Where the tuning cache of this user lies."""
    if folder := os.environ.get("R3D_KERNELS_CACHE"):
        return Path(folder) / "tuning-v1.json"
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "r3d_kernels" / "tuning-v1.json"


def machine_key(device: torch.device, isa: str) -> str:
    """What has to be equal for a measurement to carry over."""
    parts = [f"r3d_kernels {_version.__version__}", f"torch {torch.__version__}"]
    if device.type == "cuda":
        parts += [torch.cuda.get_device_name(device), f"cudnn {torch.backends.cudnn.version()}"]
    else:
        parts += [_cpu.cpu_model(), isa, f"{torch.get_num_threads()} threads"]
    return " | ".join(parts)


class TuningCache:
    """Choices by (machine, problem); thread-safe; the file is read at first use and merged at every write."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._path: Path | None = None
        self._entries: dict[str, dict[str, dict]] = {}

    def _read(self, path: Path) -> dict[str, dict[str, dict]]:
        try:
            data = json.loads(path.read_text())
            if data["format"] != _FORMAT or not isinstance(data["machines"], dict):
                raise ValueError(f"format {data['format']!r}")
            for entries in data["machines"].values():
                for entry in entries.values():
                    if not isinstance(entry["kernel"], str) or not isinstance(entry["seconds"], dict):
                        raise ValueError("an entry is not what this version writes")
            return data["machines"]
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            warnings.warn(f"tuning cache {path} is ignored: {type(e).__name__}: {e}", stacklevel=2)
            return {}

    def _load(self) -> None:
        path = cache_path()
        if path != self._path:
            self._path, self._entries = path, self._read(path)

    def get(self, machine: str, problem: str) -> dict | None:
        """{"kernel": name, "seconds": {name: median}} or None."""
        with self._lock:
            self._load()
            return self._entries.get(machine, {}).get(problem)

    def put(self, machine: str, problem: str, kernel: str, seconds: dict[str, float]) -> None:
        """Remembers a measurement, in memory at once and on disk where that is possible."""
        with self._lock:
            self._load()
            self._entries.setdefault(machine, {})[problem] = {"kernel": kernel, "seconds": seconds}
            # A read-only or full disk must not stop a forward pass.
            with contextlib.suppress(OSError):
                self._write()

    def _write(self) -> None:
        path = self._path
        assert path is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            with contextlib.suppress(ImportError):
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be adding its own entries
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                merged = self._read(path)
            for machine, entries in self._entries.items():
                merged.setdefault(machine, {}).update(entries)
            self._entries = merged
            handle, aside = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
            try:
                with os.fdopen(handle, "w") as f:
                    json.dump({"format": _FORMAT, "machines": merged}, f, indent=1)
                os.replace(aside, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(aside)
                raise

    def clear(self) -> None:
        """Forgets everything, on disk too."""
        with self._lock:
            self._load()
            self._entries = {}
            with contextlib.suppress(FileNotFoundError):
                cache_path().unlink()


shared = TuningCache()
