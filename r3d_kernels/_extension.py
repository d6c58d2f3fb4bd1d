"""Loads the compiled library, which registers torch.ops.r3d_kernels.*"""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path

import torch

error: ImportError | None = None  # why the library could not be loaded
path: Path | None = None

try:
    _module = importlib.import_module("r3d_kernels._C")
    path = Path(_module.__file__) if _module.__file__ else None
except ImportError as e:
    error = e

has_cuda = error is None and hasattr(torch.ops.r3d_kernels, "conv3d_sm80")  # compiled with nvcc


def _is_capable(index: int | None) -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_properties(index).major >= 8


_remembered = cache(_is_capable)


def capable(index: int | None) -> bool:
    """Whether CUDA device `index` is there and has compute capability 8.0, for which the kernels are compiled."""
    # Dynamo would warn that it traces through a cache.
    return (_is_capable if torch.compiler.is_compiling() else _remembered)(index)


@cache
def multiprocessors(index: int | None) -> int:
    """Of CUDA device `index`."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def runs_cuda(x: torch.Tensor) -> bool:
    """Whether our CUDA kernels can read x."""
    return has_cuda and x.device.type == "cuda" and capable(x.device.index)


def takes(x: torch.Tensor) -> bool:
    """Whether our pooling and head kernels take x: float32 and bfloat16, on a GPU float16 too."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        return x.dtype == torch.float16 and runs_cuda(x)
    return error is None and (x.device.type == "cpu" or runs_cuda(x))


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
