"""What every kernel has in common: requests, layers, the work of a kernel, the user's settings, what was compiled."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Hashable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from r3d_kernels import _cpu, _extension, _fold, tuning
from r3d_kernels.problems import ConvProblem


@dataclass(frozen=True)
class Request:
    """A fused convolution to be run: geometry and epilogue, the dtype it runs in, where, and with how many threads."""

    problem: ConvProblem
    dtype: torch.dtype
    device: torch.device
    threads: int

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.problem} {dtype}"


@dataclass(frozen=True)
class Layer:
    """The tensors of one layer as they are in the module, and batch norm as float64 scale and shift."""

    weight: Tensor  # [K, C/groups, T, R, S]
    conv_bias: Tensor | None  # [K]
    norm: tuple[Tensor, Tensor, Tensor | None, Tensor | None, float] | None  # mean, var, gamma, beta, eps
    scale: Tensor | None  # float64 [K]
    shift: Tensor  # float64 [K]

    @classmethod
    def of(
        cls,
        weight: Tensor,
        conv_bias: Tensor | None,
        norm: tuple[Tensor, Tensor, Tensor | None, Tensor | None, float] | None,
    ) -> Layer:
        # Aliases of all of them: memory that they lie in is not another tensor's as long as the layer lives.
        weight = weight.detach()
        conv_bias = None if conv_bias is None else conv_bias.detach()
        if norm is None:
            scale, shift = _fold.identity(weight.shape[0], conv_bias, weight.device)
        else:
            mean, var, gamma, beta, eps = norm
            gamma, beta = (None if t is None else t.detach() for t in (gamma, beta))
            norm = (mean.detach(), var.detach(), gamma, beta, eps)
            scale, shift = _fold.scale_and_shift(*norm, conv_bias)
        return cls(weight, conv_bias, norm, scale, shift)

    def folded_weight(self, dtype: torch.dtype) -> Tensor:
        """weight * scale, multiplied in float64. [K, C/groups, T, R, S]"""
        if self.scale is None:
            return self.weight.to(dtype)
        folded = torch.empty(self.weight.shape, dtype=dtype, device=self.weight.device)
        scale = self.scale.view(-1, 1, 1, 1, 1)
        for i in range(0, len(folded), 32):  # a float64 copy of all weights would be the peak of memory
            folded[i : i + 32] = self.weight[i : i + 32].double() * scale[i : i + 32]
        return folded


class Kernel(Protocol):
    """One way to run a fused convolution."""

    name: str
    backend: str

    def can_run(self, request: Request) -> str | None:
        """None, or why not."""

    def pack_key(self, request: Request) -> Hashable:
        """Requests with equal keys share their packed weights."""

    def pack(self, layer: Layer, request: Request) -> Any:
        """The weights as this kernel wants them."""

    def run(self, pack: Any, x: Tensor, residual: Tensor | None, request: Request) -> Tensor:
        """act(conv(x) * scale + shift + residual), channels-last."""

    # A kernel may also have
    #   with_pool(request, frames)  the kernel that pools its outputs too, or None (`_pooled`)
    #   packs_of                  the name of the kernel whose packed weights it takes
    #   run_clip(pack, clip, source, request)  it takes a raw clip as a ClipSource says
    #   reads_weight(pack, layer)  whether it reads the weight itself at every call, and `pack` has no copy of it
    #   private   tried before it may be chosen
    #   compared  and held against the stock layers then
    #   prepare(requests, told)   does together, beforehand, what each would do at its first call (`prepare`)
    #   remembers(request)        tells of more keys in the tuning cache
    #   host      seconds of the GPU's time that its calls have to win to make up for what they take the host: that
    #             does not show in the GPU's time, and is all that counts where small layers wait for launches
    #   quiet     one more tile of another kernel: why it cannot run is not told


class Work(NamedTuple):
    """What a kernel has to do for a request, after what its algorithm saves."""

    macs: int  # multiply-adds
    bytes: int  # to and from memory
    arithmetic: torch.dtype  # of the products: which of the processor's peaks is the limit


def work(kernel: Kernel, request: Request) -> Work:
    """The work of a kernel, for rooflines.

    A kernel may tell through a method of this name. Else: a direct convolution without the taps that fall on padding,
    and each input, weight and output once. The additions of Winograd's transforms are not counted.
    """
    tell = getattr(kernel, "work", None)
    if tell is not None:
        return tell(request)
    return Work(request.problem.macs_inside, request.problem.bytes(request.dtype), request.dtype)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


def reads_weight(kernel: Kernel, pack: Any, layer: Layer) -> bool:
    """Whether a kernel reads the weight itself at every call; else its pack holds a copy, which may become stale."""
    tell = getattr(kernel, "reads_weight", None)
    return tell is not None and tell(pack, layer)


def is_alias(a: Tensor, b: Tensor) -> bool:
    """Whether both are the same elements in the same memory."""
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.stride() == b.stride()


_SWITCHES = ("R3D_KERNELS_BACKEND", "R3D_KERNELS_FP32", "R3D_KERNELS_MEMORY")
_seen: ContextVar[dict[str, str | None] | None] = ContextVar("r3d_kernels_switches", default=None)


@contextlib.contextmanager
def one_pass() -> Iterator[None]:
    """The switches in the environment are read here, once for all layers inside, which each ask for them.

    A variable that is not set takes a microsecond to find missing. For this thread or task only; not while Dynamo
    traces.
    """
    token = _seen.set({name: os.environ.get(name) for name in _SWITCHES})
    try:
        yield
    finally:
        _seen.reset(token)


def switch(name: str) -> str | None:
    """One of `_SWITCHES` as it is now, or was when the pass began that is under way here."""
    seen = _seen.get()
    return os.environ.get(name) if seen is None else seen[name]


def fp32_mode() -> str:
    """ "default", or "strict" (R3D_KERNELS_FP32): only kernels within twice the stock layer's own error."""
    mode = switch("R3D_KERNELS_FP32") or "default"
    if mode not in ("default", "strict"):
        raise ValueError(f"R3D_KERNELS_FP32: expected 'default' or 'strict', got {mode!r}")
    return mode


def memory_mode() -> str:
    """ "lean", or "fast" (R3D_KERNELS_MEMORY): a copy of large weights for every gain, however small."""
    mode = switch("R3D_KERNELS_MEMORY") or "lean"
    if mode not in ("lean", "fast"):
        raise ValueError(f"R3D_KERNELS_MEMORY: expected 'lean' or 'fast', got {mode!r}")
    return mode


def settings() -> tuple[str, str, str]:
    """What a layer's choice of kernel depends on beside the request: `fp32_mode`, torch's own switch, `memory_mode`."""
    return fp32_mode(), torch.get_float32_matmul_precision(), memory_mode()


_CPU_FEATURES = (
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512dq",
    "avx512_bf16",
    "amx_tile",
    "amx_bf16",
)


def _compiled() -> Iterator[tuple[str, str]]:
    if _extension.error is None:
        for line in torch.ops.r3d_kernels.describe().splitlines():
            key, _, value = line.partition("=")
            yield key, value


def describe() -> dict[str, Any]:
    """What was compiled and what is used here.

    Keys: extension (path or None), error (why it could not be loaded, or None), fixed_outputs (why outputs of more than
    1 MiB on a CPU cannot be resized, or None), isa, best_isa, isa_features, compiler, torch_built_with, cuda_compiled,
    cuda_toolkit, cuda_archs, threads, machine, tuning_cache.
    """
    facts = dict(_compiled())
    return {
        "extension": str(_extension.path) if _extension.path else None,
        "error": str(_extension.error) if _extension.error else None,
        "fixed_outputs": _extension.not_resizable,
        "isa": facts.get("isa", "none"),
        "best_isa": facts.get("best_isa", "none"),
        "isa_features": [f for f in _CPU_FEATURES if f in _cpu.cpu_flags()],
        "compiler": facts.get("compiler"),
        "torch_built_with": facts.get("torch"),
        "cuda_compiled": facts.get("cuda_compiled") == "1",
        "cuda_toolkit": facts.get("cuda") or None,
        "cuda_archs": [a for a in facts.get("archs", "").replace(",", ";").split(";") if a],
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "tuning_cache": str(tuning.cache_path()),
    }
