"""Which kernel runs a fused convolution: what can run it, which of those is the fastest here, and why.

Kernels are listed in `KERNELS`; each says through `can_run` whether it takes a request, or why not. Where several can,
the first call of a layer measures them side by side on the layer's own data and remembers the fastest (`tuning.py`);
the stock layers are always among them, so a fused layer is never slower than they are. `R3D_KERNELS_TUNE=0` takes the
first that can instead of measuring.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import threading
import time
from collections.abc import Hashable, Iterator
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r3d_kernels import _cpu, _extension, _fold, tuning
from r3d_kernels.problems import ConvProblem

__all__ = [
    "KERNELS",
    "Kernel",
    "Record",
    "Request",
    "backend",
    "candidates",
    "choose",
    "current_backend",
    "describe",
    "explain",
]

NAMES = ("auto", "cpu", "cuda", "triton", "torch")

# ------------------------------------------------------------------------------------------ which backend is asked for

_forced: ContextVar[str | None] = ContextVar("r3d_kernels_backend", default=None)


def _checked(name: object, argument: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{argument}: expected one of {', '.join(map(repr, NAMES))}, got {name!r}")
    return str(name)


class backend(contextlib.ContextDecorator):
    """Asks for a backend inside a `with` block, in this thread or task only.

    Args:
        name: "cpu", "cuda" or "triton" for our kernels of that kind, "torch" for torch's own (stock layers and oneDNN),
            "auto" for the fastest. A layer that the backend cannot run takes the stock layers; `explain` says why.

    `R3D_KERNELS_BACKEND` does the same for a whole process; the block wins over the variable.

    Raises:
        ValueError: for any other name.
    """

    def __init__(self, name: str) -> None:
        self.name = _checked(name, "backend")
        self._tokens: list[Token] = []

    def _recreate_cm(self) -> backend:
        return backend(self.name)  # a decorated function may run in several threads at once

    def __enter__(self) -> backend:
        self._tokens.append(_forced.set(self.name))
        return self

    def __exit__(self, *exc: object) -> None:
        _forced.reset(self._tokens.pop())


def current_backend() -> str:
    """The backend asked for here and now: "auto" unless a `backend` block or R3D_KERNELS_BACKEND says otherwise."""
    name = _forced.get()
    if name is None:
        name = os.environ.get("R3D_KERNELS_BACKEND") or "auto"
        if name not in NAMES:
            _checked(name, "R3D_KERNELS_BACKEND")
    return name


# ------------------------------------------------------------------------------------------------- requests and kernels


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
        weight = weight.detach()
        if norm is None:
            scale, shift = _fold.identity(weight.shape[0], conv_bias, weight.device)
        else:
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


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


_BYTES_A_CYCLE = 6.0  # weights from beyond L2, per core
_MOST_PACKED = 48 << 20  # bytes; tiles of four outputs blow 3x3x3 weights up more than five times


class DirectCpu:
    """Our C++ direct convolution: channels-last, register-tiled, float32 accumulation (csrc/cpu/conv3d_*)."""

    name = "direct"
    backend = "cpu"
    algorithm = "direct"

    def can_run(self, request: Request) -> str | None:
        if request.device.type != "cpu":
            return f"needs a CPU tensor, got {request.device.type}"
        if _extension.error is not None:
            return f"the compiled library is missing ({_extension.error})"
        if request.dtype not in (torch.float32, torch.bfloat16):
            return f"has float32 and bfloat16 only, got {request.dtype}"
        if request.problem.groups != 1:
            return f"has groups=1 only, got {request.problem.groups}"
        return None

    def pack_key(self, request: Request) -> Hashable:
        return request.dtype

    def pack(self, layer: Layer, request: Request) -> Any:
        packed = torch.ops.r3d_kernels.conv3d_pack(layer.weight, layer.scale, request.dtype, self.algorithm)
        return packed, layer.shift.float()

    def run(self, pack: Any, x: Tensor, residual: Tensor | None, request: Request) -> Tensor:
        p = request.problem
        return torch.ops.r3d_kernels.conv3d_bias_act(
            x, *pack, residual, p.k, p.kernel, p.stride, p.padding, p.dilation, p.activation or "none"
        )

    def cycles(self, request: Request) -> float:
        """A rough prediction for one thread, for comparing our CPU kernels with one another.

        Not for `request.threads`: an unmeasured choice, and so the bits, must not depend on them.
        """
        p = request.problem
        work = p.macs_inside / (2 * _vector_lanes() * 0.9)
        return work + p.c * p.k * math.prod(p.kernel) * 4 / _BYTES_A_CYCLE


def _vector_lanes() -> int:
    """float32 lanes of the vectors that our CPU kernels use."""
    return {"scalar": 4, "avx2": 8}.get(describe()["isa"], 16)


def _tile_inputs(m: int) -> int:
    """Inputs that a Winograd tile with m outputs along an axis reads there."""
    return 1 if m == 1 else m + 2


class WinogradCpu(DirectCpu):
    """Our C++ Winograd convolution for 3-tap kernels of stride 1 (csrc/cpu/winograd*): fewer multiplications.

    Args:
        tile: outputs of a tile along depth, height and width; 1 where the kernel is 1.
    """

    def __init__(self, tile: tuple[int, int, int]) -> None:
        self.tile = tile
        self.algorithm = "winograd" + "".join(map(str, tile))
        self.name = f"winograd F({','.join(map(str, tile))})"

    def can_run(self, request: Request) -> str | None:
        why_not = super().can_run(request)
        if why_not is not None:
            return why_not
        p = request.problem
        if p.kernel != tuple(1 if m == 1 else 3 for m in self.tile):
            return f"the tile is not for kernel {p.kernel}"
        if p.stride != (1, 1, 1) or p.dilation != (1, 1, 1):
            return "needs stride 1 and dilation 1"
        packed = math.prod(map(_tile_inputs, self.tile)) * p.c * p.k * 4
        if 4 in self.tile and packed > _MOST_PACKED:
            return f"its weights would take {packed >> 20} MiB"
        if 4 in self.tile and fp32_mode() == "strict" and request.dtype == torch.float32:
            return "tiles of 4 outputs are outside R3D_KERNELS_FP32=strict"
        return None

    def cycles(self, request: Request) -> float:
        p, lanes = request.problem, _vector_lanes()
        tiles = p.n * math.prod(-(-size // m) for size, m in zip(p.out_size, self.tile, strict=True))
        points = math.prod(map(_tile_inputs, self.tile))
        work = tiles * points * (p.c * p.k / (2 * lanes) + 12 * (p.c + p.k) / lanes)
        passes = -(-tiles // 48)  # each streams all the weights
        return work + passes * points * p.c * p.k * 4 / _BYTES_A_CYCLE


class OneDnn:
    """oneDNN's fused convolution as torch ships it, with prepacked weights (a private API of torch: probed first)."""

    name = "oneDNN"
    backend = "torch"
    private = True  # a torch that changes it must not break us: tried once before it may be chosen

    def can_run(self, request: Request) -> str | None:
        if request.device.type != "cpu":
            return f"needs a CPU tensor, got {request.device.type}"
        if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
            return "oneDNN is missing from this torch or switched off"
        if not _onednn_ops():
            return "this torch has no fused oneDNN convolution"
        if request.dtype == torch.bfloat16:
            if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
                return "oneDNN has no bfloat16 on this processor"
            if request.problem.torch_bf16_is_unsafe():
                return "torch's bfloat16 convolution is wrong or corrupts memory here (pytorch#169688 and its kin)"
        elif request.dtype != torch.float32:
            return f"used for float32 and bfloat16 only, got {request.dtype}"
        if request.problem.n == 0:
            return "the batch is empty"
        if request.problem.groups != 1 and request.problem.residual:
            return "torch does not fuse a residual into a grouped convolution"
        return None

    def pack_key(self, request: Request) -> Hashable:
        p = request.problem
        return request.dtype, p.in_shape, p.stride, p.padding, p.dilation, request.threads

    def pack(self, layer: Layer, request: Request) -> Any:
        p = request.problem
        weight = torch.ops.mkldnn._reorder_convolution_weight(
            layer.folded_weight(request.dtype).contiguous(),
            p.padding,
            p.stride,
            p.dilation,
            p.groups,
            p.in_shape,
        )
        return weight, layer.shift.to(request.dtype)

    def run(self, pack: Any, x: Tensor, residual: Tensor | None, request: Request) -> Tensor:
        p = request.problem
        geometry = (p.padding, p.stride, p.dilation, p.groups)
        x = _channels_last(x)
        if residual is None:
            act = p.activation or "none"
            return torch.ops.mkldnn._convolution_pointwise(x, *pack, *geometry, act, [], None)
        residual = _channels_last(residual)
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, residual, *pack, *geometry, "add", 1.0, p.activation, [], None
        )


class CudnnBnAct:
    """cuDNN's convolution, then batch norm, residual and ReLU in one pass of our CUDA kernel (csrc/cuda/bn_act.cu)."""

    name = "cuDNN + bn_act"
    backend = "cuda"

    def can_run(self, request: Request) -> str | None:
        if request.device.type != "cuda":
            return f"needs a CUDA tensor, got {request.device.type}"
        if not describe()["cuda_compiled"]:
            return "the CUDA kernels were not compiled (no nvcc at build time)"
        if request.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"has float32, bfloat16 and float16 only, got {request.dtype}"
        return None

    def pack_key(self, request: Request) -> Hashable:
        return request.dtype

    def pack(self, layer: Layer, request: Request) -> Any:
        weight = layer.weight.to(request.dtype).contiguous(memory_format=torch.channels_last_3d)
        scale = torch.ones_like(layer.shift) if layer.scale is None else layer.scale
        return weight, scale.float(), layer.shift.float()

    def run(self, pack: Any, x: Tensor, residual: Tensor | None, request: Request) -> Tensor:
        p = request.problem
        weight, scale, shift = pack
        y = F.conv3d(_channels_last(x), weight, None, p.stride, p.padding, p.dilation, p.groups)
        return torch.ops.r3d_kernels.bn_act(y, scale, shift, residual, p.activation or "none")


class Stock:
    """torch's own layers, one after the other; takes everything that torch takes."""

    name = "stock"
    backend = "torch"

    def can_run(self, request: Request) -> str | None:
        return None

    def pack_key(self, request: Request) -> Hashable:
        return request.dtype

    def pack(self, layer: Layer, request: Request) -> Any:
        def cast(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().to(request.dtype)

        # batch norm keeps its own dtype: torch mixes float32 statistics with half-precision activations
        return layer.weight.to(request.dtype), cast(layer.conv_bias), layer.norm

    def run(self, pack: Any, x: Tensor, residual: Tensor | None, request: Request) -> Tensor:
        p = request.problem
        weight, bias, norm = pack
        geometry = (p.stride, p.padding, p.dilation, p.groups)
        if x.is_cpu and x.dtype == torch.bfloat16 and p.torch_bf16_is_unsafe():
            wide = None if bias is None else bias.float()
            y = F.conv3d(x.float(), weight.float(), wide, *geometry).to(x.dtype)
        else:
            y = F.conv3d(x, weight, bias, *geometry)
        if norm is not None:
            mean, var, gamma, beta, eps = norm
            y = F.batch_norm(y, mean, var, gamma, beta, False, 0.0, eps)
        if residual is not None:
            y = y.add_(residual)
        return y.relu_() if p.activation == "relu" else y


@cache
def _onednn_ops() -> bool:
    ops = torch.ops.mkldnn
    names = ("_convolution_pointwise", "_reorder_convolution_weight", "_is_mkldnn_bf16_supported")
    return all(hasattr(ops, name) for name in names) and "binary" in ops._convolution_pointwise.overloads()


# In the order of preference where nothing may be measured; our CPU kernels among themselves by `cycles`.
_TILES = ((2, 2, 2), (2, 4, 4), (1, 2, 2), (1, 4, 4), (2, 1, 1), (4, 1, 1))
KERNELS: list[Kernel] = [DirectCpu(), *map(WinogradCpu, _TILES), OneDnn(), CudnnBnAct(), Stock()]


def fp32_mode() -> str:
    """ "default", or "strict" (R3D_KERNELS_FP32): only kernels within twice the stock layer's own error."""
    mode = os.environ.get("R3D_KERNELS_FP32") or "default"
    if mode not in ("default", "strict"):
        raise ValueError(f"R3D_KERNELS_FP32: expected 'default' or 'strict', got {mode!r}")
    return mode


@cache
def _bf16_in_hardware() -> bool:
    return bool(_cpu.cpu_flags() & {"amx_bf16", "avx512_bf16"})


def candidates(request: Request, asked: str = "auto") -> tuple[list[Kernel], dict[str, str]]:
    """The kernels that can run the request, preferred first, and for the others why not."""
    able: list[Kernel] = []
    reasons: dict[str, str] = {}
    for kernel in KERNELS:
        if asked not in ("auto", kernel.backend):
            continue
        why_not = kernel.can_run(request)
        if why_not is None:
            able.append(kernel)
        else:
            reasons[kernel.name] = why_not
    if not able:
        able = [k for k in KERNELS if k.name == "stock"]
        if not reasons:
            reasons[asked] = f"no {asked} kernel is part of this version"
    ours = [k for k in able if isinstance(k, DirectCpu)]
    if len(ours) > 1:
        cycles = {k.name: k.cycles(request) for k in ours}
        ours.sort(key=lambda k: cycles[k.name])
        # Not worth a measurement: a tile that streams more weights than it saves multiplications.
        limit = 1.6 * min(cycles.values())
        for kernel in [k for k in ours if cycles[k.name] > limit and k.name != "direct"]:
            ours.remove(kernel)
            reasons[kernel.name] = "predicted to be far slower"
        able = ours + [k for k in able if not isinstance(k, DirectCpu)]
    if request.dtype == torch.bfloat16 and request.device.type == "cpu" and _bf16_in_hardware():
        able.sort(key=lambda k: k.name != "oneDNN")  # it has AMX tiles; our direct kernel has vdpbf16ps
    return able, reasons


# ----------------------------------------------------------------------------------------------------------- the choice


@dataclass
class Choice:
    """The kernel that was chosen for a request."""

    kernel: Kernel
    reason: str
    seconds: dict[str, float] = field(default_factory=dict)


_MARGIN = 1.03  # a less preferred kernel has to be faster by more than the noise
_BUDGET = 0.1  # seconds of repetitions for one layer; three rounds are made in any case
_measuring = threading.Lock()  # two layers measured at once would measure each other


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _measure(
    kernels: list[Kernel], packs: dict[str, Any], x: Tensor, residual: Tensor | None, request: Request
) -> dict[str, float]:
    """Best seconds of each kernel, interleaved; a kernel that is far behind is not repeated."""

    def once(kernel: Kernel) -> float:
        _synchronize(request.device)
        start = time.perf_counter()
        kernel.run(packs[kernel.name], x, residual, request)
        _synchronize(request.device)
        return time.perf_counter() - start

    best = {k.name: once(k) for k in kernels}  # warm-up: page faults, lazy initialisation
    running, spent, rounds = list(kernels), 0.0, 0
    while rounds < 3 or (rounds < 12 and spent < _BUDGET):
        for k in running:
            t = once(k)
            best[k.name] = min(best[k.name], t)
            spent += t
        rounds += 1
        # The best of two calls that is this far behind is not noise, even on a busy machine.
        limit = 3 * min(best.values())
        running = [k for k in running if best[k.name] <= limit or rounds < 2]
        if len(running) < 2:
            break
    return best


def _fails(kernel: Kernel, packed: Any, x: Tensor, residual: Tensor | None, request: Request) -> str | None:
    try:
        kernel.run(packed(kernel), x, residual, request)
    except RuntimeError as e:
        return str(e).splitlines()[0]
    return None


def choose(
    request: Request,
    asked: str,
    packed: Any,
    x: Tensor,
    residual: Tensor | None,
) -> Choice:
    """The kernel for a request.

    Args:
        request: what is to be run.
        asked: the backend asked for.
        packed: callable, kernel -> its packed weights.
        x, residual: the data of this very call, on which kernels are measured.
    """
    able, reasons = candidates(request, asked)
    for kernel in [k for k in able if getattr(k, "private", False)]:
        if failure := _fails(kernel, packed, x, residual, request):
            reasons[kernel.name] = f"failed: {failure}"
            able.remove(kernel)
    able = able or [k for k in KERNELS if k.name == "stock"]
    note = (
        "".join(f"; {name}: {why}" for name, why in reasons.items() if name != "stock")
        if asked != "auto"
        else ""
    )
    if len(able) == 1:
        only = "the only kernel that can run it" if asked == "auto" else f"backend {asked!r} asked for"
        return Choice(able[0], only + (note or "".join(f"; {n}: {w}" for n, w in reasons.items())))
    if not tuning.enabled():
        return Choice(able[0], "preferred; R3D_KERNELS_TUNE=0, not measured" + note)
    if request.problem.n == 0:
        return Choice(able[0], "preferred; nothing to measure, the batch is empty" + note)
    if request.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return Choice(able[0], "preferred; cannot be measured while a CUDA graph is captured" + note)

    mode = fp32_mode()
    machine = tuning.machine_key(request.device, describe()["isa"])
    key = " ".join(
        [str(request), *([asked] if asked != "auto" else []), *([mode] if mode != "default" else [])]
    )
    by_name = {k.name: k for k in able}
    with _measuring:
        known = tuning.shared.get(machine, key)
        if known is not None and known["kernel"] in by_name and set(known["seconds"]) == set(by_name):
            return Choice(
                by_name[known["kernel"]], "measured earlier: fastest" + note, dict(known["seconds"])
            )
        seconds = _measure(able, {k.name: packed(k) for k in able}, x, residual, request)
        fastest = min(seconds.values())
        winner = next(k for k in able if seconds[k.name] <= fastest * _MARGIN)
        tuning.shared.put(machine, key, winner.name, seconds)
    return Choice(winner, "measured: fastest" + note, seconds)


# ----------------------------------------------------------------------------------------- what it says of itself


@dataclass(frozen=True)
class Record:
    """How a layer was run: one record for each input shape and dtype that it has seen."""

    layer: str  # name of the convolution inside the model
    problem: str  # e.g. n1c64d16h56w56k64f3s1p1+relu
    dtype: str
    backend: str  # cpu, cuda, triton, torch
    kernel: str  # e.g. "direct avx512"
    reason: str
    timings: dict[str, float]  # kernel -> seconds; empty when nothing was measured


def explain(model: nn.Module) -> list[Record]:
    """One record for every fused convolution of `model` that has run since its weights last changed."""
    from r3d_kernels._layer import layer_plans  # it imports this module

    return [
        Record(
            layer=name,
            problem=str(request.problem),
            dtype=str(request.dtype).removeprefix("torch."),
            backend=choice.kernel.backend,
            kernel=_full_name(choice.kernel),
            reason=choice.reason,
            timings=dict(choice.seconds),
        )
        for name, module in model.named_modules()
        for request, choice in layer_plans(module)
    ]


def _full_name(kernel: Kernel) -> str:
    """With the instruction set where it is ours; vdpbf16ps takes bfloat16 weights that no batch norm is folded into."""
    if kernel.backend != "cpu":
        return kernel.name
    return f"{kernel.name} {describe()['isa'].removesuffix('_bf16')}"


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

    Keys: extension (path or None), error (why it could not be loaded, or None), isa, best_isa, isa_features, compiler,
    torch_built_with, cuda_compiled, cuda_toolkit, cuda_archs, threads, machine, tuning_cache.
    """
    facts = dict(_compiled())
    return {
        "extension": str(_extension.path) if _extension.path else None,
        "error": str(_extension.error) if _extension.error else None,
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
