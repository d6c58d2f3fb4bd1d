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
from collections.abc import Callable, Iterable
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from r3d_kernels import _cpu, _fork, tuning
from r3d_kernels._cpu_kernels import CPU_KERNELS, AmxCpu, DirectCpu
from r3d_kernels._kernel import (
    Kernel,
    Layer,
    Request,
    describe,
    fp32_mode,
    memory_mode,
    one_pass,
    settings,
    switch,
    work,
)
from r3d_kernels._race import Packs, corner, measure, synchronize
from r3d_kernels._sm80 import TILES, TensorCoreSm80, tf32_allowed
from r3d_kernels._sm90 import TILES as SM90_TILES
from r3d_kernels._sm90 import Sm90Cuda
from r3d_kernels._sm90_stem import Sm90Stem
from r3d_kernels._torch_kernels import CudnnBnAct, CudnnFused, OneDnn, Stock
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


# ---------------------------------------------------------------------------------------------------------- the kernels

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
_SMALL_COPY, _SMALL_OUTPUT = 1 << 18, 8 << 20  # bytes that nobody minds
_MARGIN = 1.03  # a less preferred kernel has to be faster by more than the noise
_CLOSE = 1.3  # rivals within this factor may have lost by the machine's changing speed
# Seconds after which its speed may be another: what a second and a third measurement wait for
_LATER = (2.0, 20.0)
_measuring = _fork.Lock()  # two layers measured at once would measure each other
_looked: dict[tuple[str, str], float] = {}  # when this process measured what it is to measure again


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
    if request.device.type == "cpu":
        _cpu.release_free_memory()  # its output is not made of ours, and would add to those that wait
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
    part, x, residual, (d, h) = corner(x[:1], None if residual is None else residual[:1], request)
    want = stock.run(packed(stock), x, residual, part)[:, :, :d, :h].float()
    distance = float((y[:1, :, :d, :h].float() - want).norm())
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
            seconds = measure(able, Packs(able, packed), x, residual, request)
        else:
            entry = tuning.shared.get(machine, key)
            seconds = dict(entry["seconds"])
            if rivals := _close(able, seconds, request):
                second = measure(rivals, Packs(rivals, packed), x, residual, request)
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
            kernel=full_name(choice.kernel),
            reason=choice.reason,
            timings=dict(choice.seconds),
        )
        for name, module in model.named_modules()
        for request, choice in layer_plans(module)
    ]


def full_name(kernel: Kernel) -> str:
    """With the instruction set where it is ours; vdpbf16ps takes bfloat16 weights that no batch norm is folded into."""
    if kernel.backend != "cpu":
        return kernel.name
    if isinstance(kernel, AmxCpu):
        return kernel.name
    isa = describe()["isa"]
    return f"{kernel.name} {'avx512' if isa in ('avx512_bf16', 'amx') else isa}"
