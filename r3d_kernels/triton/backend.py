"""The Triton convolution as one of the kernels that `backends` chooses from. Imports Triton at its first use."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from r3d_kernels.triton import config as configs

if TYPE_CHECKING:
    from r3d_kernels._kernel import Layer, Request

__all__ = ["TritonConv3d"]

_LEAST_ARCH = 80


@cache
def why_no_triton() -> str | None:
    """None, or why Triton cannot be used in this process."""
    try:
        import triton

        version = tuple(int(v) for v in triton.__version__.split(".")[:2])
    except (ImportError, AttributeError) as e:
        return f"Triton cannot be imported ({e})"
    if version < (3, 6):
        return f"needs Triton 3.6 or later, found {triton.__version__}"
    return None


def interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, for debugging (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def why_not_here(device: torch.device, dtype: torch.dtype) -> str | None:
    """None, or why our Triton kernels do not run on tensors like these."""
    # Asked first: the import of Triton takes 70 MiB.
    if device.type not in (("cuda", "cpu") if interpreted() else ("cuda",)):
        return f"needs a CUDA tensor, got {device.type}"
    if (why_not := why_no_triton()) is not None:
        return why_not
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return "no CUDA device is available"
        arch = configs.machine(device).arch
        if arch < _LEAST_ARCH:
            return f"needs compute capability 8.0 or later, got {arch // 10}.{arch % 10}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"has float32, bfloat16 and float16 only, got {dtype}"
    return None


class _Pack:
    """Weights as the kernels want them, and the launch of each request that runs with them."""

    def __init__(self, weight: Tensor, scale: Tensor, shift: Tensor) -> None:
        self.weight, self.scale, self.shift = weight, scale, shift
        self._packed: dict[Hashable, Tensor] = {}
        # id of a request -> (the request, so that the id stays its own; precision; launch; the weight as it wants it)
        self.launches: dict[int, tuple[Request, str, Any, Tensor]] = {}

    def weight_for(self, launch: Any) -> tuple[Tensor, bool]:
        """The weight as a launch wants it, made once for all that want the same, and whether it may be kept."""
        from r3d_kernels.backends import settled

        if launch.packing is None:
            return self.weight, True
        weight = self._packed.get(launch.packing)
        if weight is not None:
            return weight, True
        weight = launch.pack(self.weight)
        if not settled(weight.device):
            return weight, False
        self._packed[launch.packing] = weight
        return weight, True


class TritonConv3d:
    """Our Triton implicit-GEMM convolution: channels-last, batch norm, residual and ReLU in its epilogue."""

    name = "triton"
    backend = "triton"
    private = (
        True  # compiled here and now by whatever Triton is installed: tried once before it may be chosen
    )

    def can_run(self, request: Request) -> str | None:
        if (why_not := why_not_here(request.device, request.dtype)) is not None:
            return why_not
        p = request.problem
        if request.device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return "cannot be compiled while a CUDA graph is captured"
        else:
            from r3d_kernels.backends import current_backend

            if current_backend() != "triton":
                return "Triton's interpreter is used only where backend 'triton' is asked for"
        if p.groups > configs.MAX_GROUPS:
            return f"has at most {configs.MAX_GROUPS} groups, got {p.groups}"
        return None

    def prepare(self, requests: Sequence[Request], told: Callable[[int, int], None]) -> None:
        """Compiles what the first calls of these requests, all of one device, will measure: once, several at once."""
        if interpreted():  # nothing is compiled
            return
        from r3d_kernels.triton import ahead, conv3d

        jobs = [job for r in requests for job in conv3d.jobs(r.problem, r.dtype, r.device)]
        device, total = requests[0].device, len({job.key for job in jobs})
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        count = itertools.count(1)
        ahead.compile_all(jobs, device, done=lambda: told(next(count), total))

    def remembers(self, request: Request) -> list[tuple[str, str]]:
        from r3d_kernels.triton import tuner

        precision = configs.precision_of(request.dtype)
        return [tuner.cache_key(tuner.FORWARD, request.problem, request.dtype, precision, request.device)]

    def pack_key(self, request: Request) -> Hashable:
        return request.dtype

    def pack(self, layer: Layer, request: Request) -> _Pack:
        weight = layer.weight.to(request.dtype).contiguous(memory_format=torch.channels_last_3d)
        scale = torch.ones_like(layer.shift) if layer.scale is None else layer.scale
        return _Pack(weight, scale.float(), layer.shift.float())

    def run(self, pack: _Pack, x: Tensor, residual: Tensor | None, request: Request) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last_3d)
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last_3d)
        precision = configs.precision_of(request.dtype)
        known = pack.launches.get(id(request))
        if known is not None and known[1] == precision:
            return known[2].run(x, known[3], pack.scale, pack.shift, residual)
        from r3d_kernels.triton import conv3d

        operands = (x, pack.weight, pack.scale, pack.shift, residual)
        try:
            launch, final = conv3d.chosen(request.problem, *operands)
            weight, kept = pack.weight_for(launch)
            y = launch.run(x, weight, pack.scale, pack.shift, residual)
        except (RuntimeError, MemoryError):
            raise
        except Exception as e:  # Triton's errors share no base that torch's callers know
            raise RuntimeError(f"Triton: {type(e).__name__}: {e}") from e
        if final and kept:
            if len(pack.launches) >= 256:
                pack.launches.clear()
            pack.launches[id(request)] = (request, precision, launch, weight)
        return y
