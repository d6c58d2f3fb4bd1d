"""Which kernel runs a fused convolution: what can run it, which of those is the fastest here, and why.

Kernels are listed in `KERNELS`; each says through `can_run` whether it takes a request, or why not. Where several can,
the first call of a layer measures them side by side on the layer's own data and remembers the fastest (`tuning.py`).
On a CPU a later call measures those once more that were close: a machine may have been busy with something else for
seconds, and not all kernels suffer alike. The stock layers are always among them, so a fused layer is never slower than
they are. `R3D_KERNELS_TUNE=0` takes the first that can instead of measuring.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Hashable, Iterable
from contextvars import ContextVar, Token
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r3d_kernels import _cpu, _fork, tuning
from r3d_kernels._cpu_kernels import CPU_KERNELS, AmxCpu, DirectCpu
from r3d_kernels._kernel import (
    Kernel,
    Layer,
    Request,
    channels_last,
    describe,
    fp32_mode,
    memory_mode,
    one_pass,
    settings,
    switch,
    work,
)
from r3d_kernels._sm80 import TILES, TensorCoreSm80, tf32_allowed
from r3d_kernels._sm90 import TILES as SM90_TILES
from r3d_kernels._sm90 import Sm90Cuda
from r3d_kernels._sm90_stem import Sm90Stem
from r3d_kernels.problems import ConvProblem
from r3d_kernels.triton.backend import TritonConv3d

__all__ = [
    "KERNELS",
    "Kernel",
    "Record",
    "Request",
    "backend",
    "cache_keys",
    "candidates",
    "capturing",
    "choose",
    "choose_for",
    "current_backend",
    "describe",
    "explain",
    "fp32_mode",
    "one_pass",
    "prepare",
    "settings",
    "synchronize",
    "tf32_allowed",
    "work",
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

    `R3D_KERNELS_BACKEND` does the same for a whole process; the block wins over the variable. Graphs of `torch.compile`
    look at both when they run: the block belongs around the call.

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
        name = switch("R3D_KERNELS_BACKEND") or "auto"
        if name not in NAMES:
            _checked(name, "R3D_KERNELS_BACKEND")
    return name


# ------------------------------------------------------------------------------------------------- requests and kernels


class OneDnn:
    """oneDNN's fused convolution as torch ships it, with prepacked weights (a private API of torch: probed first)."""

    name = "oneDNN"
    backend = "torch"
    copies_weights = True
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
        x = channels_last(x)
        if residual is None:
            act = p.activation or "none"
            return torch.ops.mkldnn._convolution_pointwise(x, *pack, *geometry, act, [], None)
        residual = channels_last(residual)
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, residual, *pack, *geometry, "add", 1.0, p.activation, [], None
        )


class CudnnBnAct:
    """cuDNN's convolution, then batch norm, residual and ReLU in one pass of our CUDA kernel (csrc/cuda/bn_act.cu)."""

    name = "cuDNN + bn_act"
    backend = "cuda"
    host = 4e-6

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
        y = F.conv3d(channels_last(x), weight, None, p.stride, p.padding, p.dilation, p.groups)
        return torch.ops.r3d_kernels.bn_act(y, scale, shift, residual, p.activation or "none")


class CudnnFused:
    """cuDNN's own convolution + bias + residual + ReLU, batch norm folded into weights and bias.

    Folded weights are rounded once more than those of our kernels, less often than the stock layers' activations.
    """

    name = "cuDNN fused"
    backend = "cuda"
    host = 3e-6
    private = True  # has been wrong or missing in releases (pytorch#62926, #163539): tried once
    compared = True  # and held against the stock layers then

    def can_run(self, request: Request) -> str | None:
        p = request.problem
        if request.device.type != "cuda":
            return f"needs a CUDA tensor, got {request.device.type}"
        if torch.version.hip is not None or not hasattr(torch, "cudnn_convolution_add_relu"):
            return "this torch has no fused convolution of cuDNN's"
        if request.dtype not in (torch.bfloat16, torch.float16):
            return f"has bfloat16 and float16 only, got {request.dtype}"
        if p.activation != "relu":
            return "always ends in a ReLU"
        return None

    def pack_key(self, request: Request) -> Hashable:
        return request.dtype

    def pack(self, layer: Layer, request: Request) -> Any:
        return channels_last(layer.folded_weight(request.dtype)), layer.shift.to(request.dtype)

    def run(self, pack: Any, x: Tensor, residual: Tensor | None, request: Request) -> Tensor:
        p = request.problem
        geometry = (p.stride, p.padding, p.dilation, p.groups)
        if residual is None:
            return torch.cudnn_convolution_relu(channels_last(x), *pack, *geometry)
        weight, shift = pack
        return torch.cudnn_convolution_add_relu(
            channels_last(x), weight, channels_last(residual), 1.0, shift, *geometry
        )


class Stock:
    """torch's own layers, one after the other; takes everything that torch takes."""

    name = "stock"
    backend = "torch"
    host = 6e-6

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
KERNELS: list[Kernel] = [
    *CPU_KERNELS,
    OneDnn(),
    Sm90Cuda(),
    *map(Sm90Cuda, range(len(SM90_TILES))),
    Sm90Stem(),
    CudnnBnAct(),
    CudnnFused(),
    *map(TensorCoreSm80, (None, *TILES)),
    TritonConv3d(),
    Stock(),
]


@cache
def _bf16_in_hardware() -> bool:
    return bool(_cpu.cpu_flags() & {"amx_bf16", "avx512_bf16"})


def candidates(
    request: Request, asked: str = "auto", using: Kernel | None = None
) -> tuple[list[Kernel], dict[str, str]]:
    """The kernels that can run the request, preferred first, and for the others why not.

    `using` runs it already, and needs no more memory than it has.
    """
    able: list[Kernel] = []
    reasons: dict[str, str] = {}
    for kernel in KERNELS:
        if asked not in ("auto", kernel.backend):
            continue
        why_not = None if kernel is using else kernel.can_run(request)
        if why_not is None:
            able.append(kernel)
        elif not getattr(kernel, "quiet", False):
            reasons[kernel.name] = why_not
    if (
        asked == "auto"
        and memory_mode() == "lean"
        and any(getattr(k, "copies_weights", None) is False for k in able)
    ):
        p = request.problem  # not even to be measured: the copy alone would be the peak of memory
        if p.c // p.groups * p.k * math.prod(p.kernel) * request.dtype.itemsize > _MOST_COPIED:
            for kernel in [k for k in able if getattr(k, "copies_weights", False)]:
                able.remove(kernel)
                reasons[kernel.name] = "keeps a copy of large weights (R3D_KERNELS_MEMORY=fast allows it)"
    if not able:
        able = [k for k in KERNELS if k.name == "stock"]
        if not reasons:
            reasons[asked] = f"no {asked} kernel is part of this version"
    ours = [k for k in able if isinstance(k, DirectCpu)]
    if len(ours) > 1:
        cycles = {k.name: k.cycles(request) * _price_of_memory(k, request) for k in ours}
        ours.sort(key=lambda k: cycles[k.name])
        # Not worth a measurement: a tile that streams more weights than it saves multiplications.
        limit = 1.6 * min(cycles.values())
        for kernel in [k for k in ours if cycles[k.name] > limit and k.name not in ("direct", "AMX")]:
            ours.remove(kernel)
            reasons[kernel.name] = "predicted to be far slower, or not worth a copy of the weights"
        able = ours + [k for k in able if not isinstance(k, DirectCpu)]
    if request.dtype == torch.bfloat16 and request.device.type == "cpu" and _bf16_in_hardware():
        able.sort(key=lambda k: k.name not in ("AMX", "oneDNN"))  # vdpbf16ps is slower than either
    return able, reasons


# ----------------------------------------------------------------------------------------------------------- the choice


@dataclass
class Choice:
    """The kernel that was chosen for a request."""

    kernel: Kernel
    reason: str
    seconds: dict[str, float] = field(default_factory=dict)
    measured_now: bool = False
    look_again: float | None = None  # from when on (time.monotonic) close rivals are to be measured once more

    def doubtful(self) -> bool:
        """Whether to choose again now."""
        return self.look_again is not None and time.monotonic() >= self.look_again


# How much faster a kernel has to be that keeps its own copy of the weights, or whose outputs are not recycled
_WORTH_A_COPY = 3.0
_WORTH_FRESH_OUTPUTS = 1.2
_MOST_COPIED = 2 << 20  # bytes of weights that a copy may be measured for
_MOST_UNFOLDED = 16 << 20  # bytes that the stock layers may unfold an input to only to be measured
_SURELY_SLOWER = 1.3  # stock layers measured on a piece and this far behind are out
_SMALL_COPY, _SMALL_OUTPUT = 1 << 18, 8 << 20  # bytes that nobody minds
_MARGIN = 1.03  # a less preferred kernel has to be faster by more than the noise
_BUDGET = 0.1  # seconds of repetitions for one layer, after which no round begins
_CLOSE = 1.3  # rivals within this factor may have lost by the machine's changing speed
# Seconds after which its speed may be another: what a second and a third measurement wait for
_LATER = (2.0, 20.0)
_THREE_ROUNDS = 0.5  # seconds that the first three rounds may take beyond it: short calls are noisy
_measuring = _fork.Lock()  # two layers measured at once would measure each other
_looked: dict[tuple[str, str], float] = {}  # when this process measured what it is to measure again


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def capturing(device: torch.device) -> bool:
    """Whether what runs on the device now goes into a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def settled(device: torch.device) -> bool:
    """Waits until what was made on the device is there: another stream may read it next, and no event tells it so.

    False inside the capture of a CUDA graph, where nothing can be waited for: what is made there has no contents before
    a replay, and must not be kept.
    """
    if device.type == "cuda":
        if capturing(device):
            return False
        torch.cuda.current_stream(device).synchronize()
    return True


class _Packs(dict[str, Any]):
    """Packed weights by the kernel's name, each made when it is asked for."""

    def __init__(self, kernels: list[Kernel], packed: Any) -> None:
        super().__init__()
        self._make = {k.name: (packed, k) for k in kernels}

    def __missing__(self, name: str) -> Any:
        packed, kernel = self._make[name]
        return self.setdefault(name, packed(kernel))


def _piece(
    x: Tensor, residual: Tensor | None, request: Request
) -> tuple[Request, Tensor, Tensor | None] | None:
    """The first planes alone, where the stock layers' unfolded input (im2col) would be the peak of memory."""
    p = request.problem
    unfolded = p.n * p.c * math.prod(p.kernel) * math.prod(p.out_size) * request.dtype.itemsize
    if request.device.type != "cpu" or unfolded <= _MOST_UNFOLDED:
        return None
    depth = p.d
    while depth > 1 and unfolded * depth > _MOST_UNFOLDED * p.d:
        depth = (depth + 1) // 2
    try:
        part = replace(p, d=depth).validate()
    except ValueError:  # fewer planes than the kernel is deep
        return None
    if part.macs == p.macs:
        return None
    cut = None if residual is None else residual[:, :, : part.out_size[0]]
    return replace(request, problem=part), x[:, :, :depth], cut


def _measure(
    kernels: list[Kernel], packs: dict[str, Any], x: Tensor, residual: Tensor | None, request: Request
) -> dict[str, float]:
    """Best seconds of each kernel; the stock layers may be timed on a part and scaled."""
    if request.device.type == "cuda":
        return _race_on_gpu(kernels, packs, x, residual, request)
    stock = next((k for k in kernels if k.name == "stock"), None)
    others = [k for k in kernels if k is not stock]
    if stock is None or not others:
        return _race(kernels, packs, x, residual, request)
    # Alone, before the others have packed anything, and on as little as tells enough.
    part, *data = _piece(x, residual, request) or (request, x, residual)
    guess = _race([stock], packs, *data, part)["stock"] * request.problem.macs / part.problem.macs
    best = _race(others, packs, x, residual, request)
    if guess > _SURELY_SLOWER * min(best.values()):
        return best | {"stock": guess}
    return _race(kernels, packs, x, residual, request)


_GPU_ROUNDS = 5


def _gpu_seconds(call: Any, count: int, launch: float, device: torch.device) -> float:
    """Seconds of the GPU for one of `count` calls behind one another, whatever their launches cost."""
    with torch.cuda.device(device):
        return tuning.queued_seconds(call, count, launch)


def _race_on_gpu(
    kernels: list[Kernel], packs: dict[str, Any], x: Tensor, residual: Tensor | None, request: Request
) -> dict[str, float]:
    """Best seconds of each kernel by the GPU's own clock, interleaved.

    The first call of each is not counted: libraries set themselves up in it, load their code and try algorithms, which
    may take seconds and says nothing of the calls to come. A kernel that does not find the memory is left out.
    """
    best: dict[str, float] = {}
    calls: dict[str, tuple[Any, int, float]] = {}
    too_large: torch.OutOfMemoryError | None = None
    for kernel in kernels:
        try:
            call = partial(kernel.run, packs[kernel.name], x, residual, request)
            call()
            synchronize(request.device)
            begin = time.perf_counter()
            call()
            launch = time.perf_counter() - begin
            synchronize(request.device)
            took = time.perf_counter() - begin
        except torch.OutOfMemoryError as e:  # others may need less
            too_large = e.with_traceback(None)  # whose frames hold tensors
            torch.cuda.empty_cache()
            continue
        best[kernel.name] = took
        calls[kernel.name] = call, max(1, min(tuning.MOST_CALLS, int(tuning.SAMPLE / took))), launch
    if too_large is not None and not best:
        raise too_large
    # By a clock that counts launches too: only what is slow beyond all doubt is left at that.
    limit = max(_BUDGET, 3 * min(best.values()))
    running = [name for name in calls if best[name] <= limit]
    best |= dict.fromkeys(running, math.inf)
    begin = time.perf_counter()
    for done in range(_GPU_ROUNDS):
        if done >= 2 and (len(running) < 2 or time.perf_counter() - begin > _BUDGET):
            break
        for name in running if done % 2 == 0 else reversed(running):
            best[name] = min(best[name], _gpu_seconds(*calls[name], request.device))
        if done:
            limit = 2 * min(best.values())
            running = [name for name in running if best[name] <= limit]
    return best


def _race(
    kernels: list[Kernel], packs: dict[str, Any], x: Tensor, residual: Tensor | None, request: Request
) -> dict[str, float]:
    """Seconds of each kernel, interleaved: the lower quartile; a kernel that is far behind is not repeated.

    Each runs once, or twice if it may win; what is repeated beyond that ends after _BUDGET, or after three rounds where
    they take less than _THREE_ROUNDS. The best of many calls may be one that found in the caches what it seldom finds
    there, and the median one of a busy moment: three calls give the best, twelve the fourth.
    """

    def once(kernel: Kernel) -> float:
        synchronize(request.device)
        start = time.perf_counter()
        kernel.run(packs[kernel.name], x, residual, request)
        synchronize(request.device)
        return time.perf_counter() - start

    taken = {k.name: [once(k)] for k in kernels}  # warm-up: page faults, lazy initialisation
    best = {name: times[0] for name, times in taken.items()}
    # One call that took longer than the whole budget, and far longer than others, has told enough.
    hopeless = max(_BUDGET, 3 * min(best.values()))
    running, spent, rounds = [k for k in kernels if best[k.name] <= hopeless], 0.0, 0
    # The winner runs once more in any case: its first call is no measure of the others to come.
    while rounds == 0 or (
        len(running) > 1 and rounds < 12 and (spent < _BUDGET or (rounds < 3 and spent < _THREE_ROUNDS))
    ):
        for k in running:
            t = once(k)
            taken[k.name].append(t)
            best[k.name] = min(best[k.name], t)
            spent += t
        rounds += 1
        # The best of two calls that is this far behind is not noise, even on a busy machine.
        limit = 3 * min(best.values())
        running = [k for k in running if best[k.name] <= limit or rounds < 2]
    return {name: sorted(times)[(len(times) - 1) // 4] for name, times in taken.items()}


def _price_of_memory(kernel: Kernel, request: Request) -> float:
    """The factor on a kernel's time for its own copy of large weights, and for large outputs in fresh memory."""
    if memory_mode() == "fast":
        return 1.0
    p, size = request.problem, request.dtype.itemsize
    price = 1.0
    if (
        getattr(kernel, "copies_weights", False)
        and p.c // p.groups * p.k * math.prod(p.kernel) * size > _SMALL_COPY
    ):
        price = _WORTH_A_COPY
    if (
        not isinstance(kernel, DirectCpu)
        and request.device.type == "cpu"
        and math.prod(p.out_shape) * size > _SMALL_OUTPUT
    ):
        price *= _WORTH_FRESH_OUTPUTS
    return price


def _winner(able: list[Kernel], seconds: dict[str, float], request: Request) -> Kernel:
    """The fastest, or a preferred one close to it; memory has to be worth it where a kernel of ours does without."""
    lean = any(getattr(k, "copies_weights", None) is False for k in able)

    def cost(kernel: Kernel) -> float:
        host = getattr(kernel, "host", 0.0) if request.device.type == "cuda" else 0.0
        return seconds[kernel.name] * (_price_of_memory(kernel, request) if lean else 1.0) + host

    least = min(cost(k) for k in able)
    return next(k for k in able if cost(k) <= least * _MARGIN)


def _close(able: list[Kernel], seconds: dict[str, float], request: Request) -> list[Kernel]:
    """The kernels whose order a second measurement may change; none where that is not worth it."""
    if request.device.type != "cpu":
        return []
    limit = _CLOSE * min(seconds[k.name] for k in able)
    close = [k for k in able if seconds[k.name] <= limit]
    return close if len(close) > 1 else []


def _fails(kernel: Kernel, packed: Any, x: Tensor, residual: Tensor | None, request: Request) -> str | None:
    try:
        y = kernel.run(packed(kernel), x, residual, request)
    except RuntimeError as e:
        return str(e).splitlines()[0]
    return _differs(y, packed, x, residual, request) if getattr(kernel, "compared", False) else None


def _differs(y: Tensor, packed: Any, x: Tensor, residual: Tensor | None, request: Request) -> str | None:
    """Whether the first sample is far from what the stock layers make of it: far beyond any rounding."""
    if request.problem.n == 0:
        return None
    stock = next(k for k in KERNELS if k.name == "stock")
    want = stock.run(packed(stock), x[:1], None if residual is None else residual[:1], request).float()
    distance = float((y[:1].float() - want).norm())
    size = float(want.norm())
    if not math.isfinite(size) or distance <= 0.05 * size + 1e-6:
        return None
    return f"its result is {distance / (size or 1.0):.1e} from the stock layers'"


def cache_key(request: Request, asked: str) -> tuple[str, str]:
    """(machine, problem) under which the tuning cache has a request."""
    defaults = ("auto", "default", "highest", "lean")
    parts = [
        setting for setting, usual in zip((asked, *settings()), defaults, strict=True) if setting != usual
    ]
    if request.device.type == "cuda" and torch.backends.cudnn.benchmark:
        parts.append("cudnn.benchmark")  # cuDNN is another competitor then
    return tuning.machine_key(request.device, describe()["isa"]), " ".join([str(request), *parts])


def cache_keys(request: Request) -> list[tuple[str, str]]:
    """All (machine, problem) under which the tuning cache may have something about a request asked for now."""
    keys = [cache_key(request, current_backend())]
    for kernel in KERNELS:
        remembers = getattr(kernel, "remembers", None)
        if remembers is not None and kernel.can_run(request) is None:
            keys += remembers(request)
    return keys


def prepare(requests: Iterable[Request], told: Callable[[int, int], None]) -> None:
    """What kernels can do for all requests together before `choose_for` measures each: compile, several at once.

    Args:
        requests: of one device; what the tuning cache knows is left alone.
        told: is called with how much is done, of how much.
    """
    asked, waiting = current_backend(), {}
    for request in dict.fromkeys(requests):
        able, _ = candidates(request, asked)
        if _known(request, asked, able) is None:
            for kernel in able:
                waiting.setdefault(kernel.name, (kernel, []))[1].append(request)
    for kernel, wanted in waiting.values():
        if (run := getattr(kernel, "prepare", None)) is not None:
            run(wanted, told)


def _known(request: Request, asked: str, able: list[Kernel]) -> Choice | None:
    """What an earlier measurement of the same candidates chose."""
    if not tuning.enabled() or len(able) < 2 or request.problem.n == 0 or asked != "auto":
        return None
    return _remembered(*cache_key(request, asked), able, request)


def _remembered(
    machine: str, key: str, able: list[Kernel], request: Request, note: str = ""
) -> Choice | None:
    """The choice from measurements of all that are able, perhaps among others."""
    known = tuning.shared.get(machine, key)
    names = {k.name for k in able}
    if known is None or not names <= set(known["seconds"]):
        return None
    seconds = {name: known["seconds"][name] for name in known["seconds"] if name in names}
    if len(seconds) == len(known["seconds"]):
        kernel = next((k for k in able if k.name == known["kernel"]), None)
    else:  # one that was measured cannot run now: it would keep more weights than there is room for, say
        kernel = _winner(able, seconds, request)
    if kernel is None:
        return None
    reason = f"measured earlier: {_why(kernel.name, seconds)}{note}"
    return Choice(kernel, reason, seconds, look_again=_next_look(machine, key, _looks_left(known)))


def _looks_left(known: dict) -> int:
    left = known.get("again", 0)
    return min(left, len(_LATER)) if isinstance(left, int) else 0


def _next_look(machine: str, key: str, left: int) -> float | None:
    """When close rivals are measured again, `left` more times: at once in a process that has not measured them."""
    return _looked.get((machine, key), -math.inf) + _LATER[-left] if left > 0 else None


def choose(
    request: Request,
    asked: str,
    packed: Any,
    x: Tensor,
    residual: Tensor | None,
    using: Kernel | None = None,
) -> Choice:
    """The kernel for a request.

    Args:
        request: what is to be run.
        asked: the backend asked for.
        packed: callable, kernel -> its packed weights.
        x, residual: the data of this very call, on which kernels are measured.
        using: the kernel that an earlier choice fell on, whose packed weights exist.
    """
    able, reasons = candidates(request, asked, using)
    captured = capturing(request.device)

    def fails(kernel: Kernel) -> bool:
        """Whether a kernel that has to be tried first must not be chosen here."""
        if not getattr(kernel, "private", False):
            return False
        if captured:
            reasons[kernel.name] = "is not tried for the first time while a CUDA graph is captured"
            return True
        if failure := _fails(kernel, packed, x, residual, request):
            reasons[kernel.name] = f"failed: {failure}"
        return failure is not None

    if (known := _known(request, asked, able)) is not None:
        if not fails(known.kernel):
            if not known.doubtful():
                return known
        else:
            able.remove(known.kernel)
    able = [k for k in able if not fails(k)]
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
    if captured:
        return Choice(able[0], "preferred; cannot be measured while a CUDA graph is captured" + note)

    machine, key = cache_key(request, asked)
    with _measuring:
        known = _remembered(machine, key, able, request, note)
        if known is not None and not known.doubtful():
            return known
        left = len(_LATER) if known is None else 0
        if known is None:
            seconds = _measure(able, _Packs(able, packed), x, residual, request)
        else:
            entry = tuning.shared.get(machine, key)
            seconds = dict(entry["seconds"])
            if rivals := _close(able, seconds, request):
                second = _measure(rivals, _Packs(rivals, packed), x, residual, request)
                seconds |= {name: min(taken, seconds[name]) for name, taken in second.items()}
                left = _looks_left(entry) - 1
        able = [k for k in able if k.name in seconds]
        winner = _winner(able, seconds, request)
        if left > 0 and _close(able, seconds, request):
            _looked[machine, key] = time.monotonic()
        else:
            left = 0
            _looked.pop((machine, key), None)
        again = _next_look(machine, key, left)
        tuning.shared.put(machine, key, winner.name, seconds, again=left)
        seconds = {k.name: seconds[k.name] for k in able}
    reason = f"measured: {_why(winner.name, seconds)}{note}"
    return Choice(winner, reason, seconds, measured_now=True, look_again=again)


def _why(name: str, seconds: dict[str, float]) -> str:
    fastest = min(seconds, key=seconds.__getitem__)
    behind = seconds[name] / seconds[fastest] - 1
    if behind <= 0:
        return "fastest"
    if behind < _MARGIN - 1:
        return f"preferred, within 3 % of {fastest}"
    host = {k.name: getattr(k, "host", 0.0) for k in KERNELS}
    if host.get(fastest, 0.0) > host.get(name, 0.0):
        return f"takes the host less than {fastest}, which needs {1 - 1 / (1 + behind):.0%} less of the GPU's time"
    return f"takes less memory than {fastest}, which needs {1 - 1 / (1 + behind):.0%} less time"


def choose_for(
    problem: ConvProblem, dtype: torch.dtype, device: torch.device | str = "cpu", asked: str | None = None
) -> Choice:
    """The kernel for a problem, measured on random data unless the tuning cache knows it.

    Args:
        problem, dtype, device: what is to be run, with as many threads as torch has now.
        asked: the backend; None is that of the `backend` block or of R3D_KERNELS_BACKEND.

    Raises:
        ValueError: where no such convolution exists.
    """
    device = torch.device(device)
    request = Request(problem.validate(), dtype, device, torch.get_num_threads())
    asked = current_backend() if asked is None else _checked(asked, "asked")
    with torch.no_grad():
        t = problem.tensors(dtype, device=device, param_dtype=torch.float32)
        layer = Layer.of(t.weight, None, (t.running_mean, t.running_var, t.gamma, t.beta, t.eps))
        packs: dict[str, Any] = {}

        def packed(kernel: Kernel) -> Any:
            if kernel.name not in packs:
                packs[kernel.name] = kernel.pack(layer, request)
            return packs[kernel.name]

        return choose(request, asked, packed, t.x, t.residual)


def choose_all(
    problems: Iterable[tuple[ConvProblem, torch.dtype]],
    device: torch.device | str = "cpu",
    asked: str | None = None,
    told: Callable[[int], None] = lambda number: None,
) -> list[Choice]:
    """`choose_for` of each, and again until no close rivals are to be measured once more: 22 s at least where some are.

    Args:
        problems: (problem, dtype) of each.
        device, asked: as of `choose_for`.
        told: is called with the number of each before it is chosen for.
    """
    problems = list(problems)
    choices: list[Choice | None] = [None] * len(problems)
    waiting = list(range(len(problems)))
    while waiting:
        for i in waiting:
            told(i)
            earlier = choices[i]
            if earlier is not None and earlier.look_again is not None:
                time.sleep(max(0.0, earlier.look_again - time.monotonic()))
            choices[i] = choose_for(*problems[i], device, asked)
        waiting = [i for i in waiting if choices[i].look_again is not None]
    return choices


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
    if isinstance(kernel, AmxCpu):
        return kernel.name
    isa = describe()["isa"]
    return f"{kernel.name} {'avx512' if isa in ('avx512_bf16', 'amx') else isa}"
