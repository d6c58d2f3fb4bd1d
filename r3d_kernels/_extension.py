"""Loads the compiled library, which registers torch.ops.r3d_kernels.*"""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

error: ImportError | None = None  # why the library could not be loaded
path: Path | None = None

try:
    _module = importlib.import_module("r3d_kernels._C")
    path = Path(_module.__file__) if _module.__file__ else None
except ImportError as e:
    error = e


def require() -> None:
    """Raises ImportError with the way out when the compiled library is missing."""
    if error is not None:
        raise ImportError(
            f"the compiled library of r3d_kernels could not be loaded ({error}); build it with "
            "`pip install .` in the environment that has your torch, and see `r3d-kernels doctor`"
        ) from error


def ops():
    """torch.ops.r3d_kernels, once the library is known to be there."""
    require()
    return torch.ops.r3d_kernels
