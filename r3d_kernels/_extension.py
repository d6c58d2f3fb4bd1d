"""Loads the compiled library, which registers torch.ops.r3d_kernels.*"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import sys
from functools import cache
from pathlib import Path

import torch

error: ImportError | None = None  # why the library could not be loaded
path: Path | None = None


def _mapped() -> set[str]:
    """The files in this process's memory, " (deleted)" behind what was replaced since; none where nobody tells."""
    try:
        text = Path("/proc/self/maps").read_text(errors="surrogateescape")
    except OSError:
        return set()
    # address, permissions, offset, device, inode, and the path where there is one
    return {fields[5] for line in text.splitlines() if len(fields := line.split(maxsplit=5)) == 6}


_ORIGIN = "__r3d_kernels_origin__"  # of torch.ops.r3d_kernels: the folder of the copy that was imported


def _refuse_a_second_copy() -> None:
    """Raises ImportError where another copy has registered our operators: torch would end the process, or say nothing
    that tells what to do.
    """
    _refuse_a_second_library()
    namespace, folder = torch.ops.r3d_kernels, os.path.dirname(os.path.abspath(__file__))
    registered = hasattr(namespace, "conv3d_bn_act")  # that one by Python
    if registered and "r3d_kernels.ops.conv3d_compiled" not in sys.modules:
        origin = vars(namespace).get(_ORIGIN, "a copy that is of another version")
        if origin == folder:
            raise ImportError(
                f"r3d_kernels of {folder} was imported before and taken out of sys.modules, and torch cannot register "
                "its operators twice; keep the module that was imported, or start Python anew"
            )
        raise ImportError(
            f"two copies of r3d_kernels in one process: {origin} has registered torch.ops.r3d_kernels, so {folder} "
            "cannot be loaded beside it; keep one of them on sys.path and start Python anew"
        )
    setattr(namespace, _ORIGIN, folder)


def _refuse_a_second_library() -> None:
    try:
        torch.ops.r3d_kernels.conv3d_direct  # noqa: B018 - whether it is there
    except AttributeError:
        return
    spec = importlib.util.find_spec("r3d_kernels._C")
    files = _mapped()
    if spec is None or spec.origin is None or not files or os.path.realpath(spec.origin) in files:
        return  # nothing to load, or the same file once more
    name = os.path.basename(spec.origin)
    names = sorted(file for file in files if os.path.basename(file).removesuffix(" (deleted)") == name)
    others = [file for file in names if "r3d_kernels" in file] or names or ["a file of another name"]
    raise ImportError(
        f"two copies of r3d_kernels in one process: {others[0]} has registered torch.ops.r3d_kernels, so "
        f"{spec.origin} cannot be loaded beside it; keep one of them on sys.path and start Python anew"
    )


_refuse_a_second_copy()

try:
    _module = importlib.import_module("r3d_kernels._C")
    path = Path(_module.__file__) if _module.__file__ else None
except ImportError as e:
    error = e


def _make_outputs_resizable() -> str | None:
    """Has large outputs on a CPU made by csrc/torch, so that they can be resized; else says why not."""
    spec = importlib.util.find_spec("r3d_kernels._resizable")
    if spec is None or spec.origin is None:
        return "r3d_kernels._resizable was not compiled"
    try:
        library, core = ctypes.CDLL(spec.origin), ctypes.CDLL(str(path))
        major, minor = divmod(library.r3d_torch_minor(), 100)
        if torch.__version__.split(".")[:2] != [str(major), str(minor)]:
            return f"was compiled for torch {major}.{minor}, this is torch {torch.__version__}"
        core.r3d_make_tensors_by(ctypes.cast(library.r3d_tensor_over, ctypes.c_void_p))
    except (OSError, AttributeError) as e:  # of another torch: a symbol is missing
        return str(e)
    return None


# Why outputs of more than 1 MiB on a CPU have a fixed size: torch.cat(..., out=y) raises where y is too small.
not_resizable: str | None = str(error) if error is not None else _make_outputs_resizable()

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
