"""Which kernel runs a max-pool or a network's head: what `backends` is for convolutions.

On a CPU it is the compiled one, or Triton's interpreter where backend "triton" asks for it. On a GPU there are three
ways: ours in CUDA, ours in Triton, torch's own. The backend asked for decides; "auto" measures them once for each
shape, on the call's own data, and remembers the fastest in the tuning cache. Triton's is compiled here and now, so its
result is compared with torch's before it may be chosen. A graph of torch.compile has the compiled one.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from r3d_kernels import _extension, _fork, backends, reference, tuning
from r3d_kernels.triton.backend import why_not_here

__all__ = ["avg_pool_linear", "max_pool3d"]

logger = logging.getLogger("r3d_kernels")

Triple = tuple[int, int, int]

_MARGIN = 1.03  # a less preferred way has to be faster by more than the noise
_MOST_PLANS = 1024
_plans: dict[Hashable, str] = {}  # call -> way
_choosing = _fork.Lock()  # two calls measured at once would measure each other


@dataclass(frozen=True)
class _Operation:
    name: str  # in the tuning cache
    ways: dict[str, Callable[..., Tensor]]  # backend -> what runs it, preferred first
    exact: bool  # whether nothing is rounded


def _triton_max_pool3d(*operands: object) -> Tensor:
    from r3d_kernels.triton.pool import run_max_pool3d  # not before it is needed: Triton takes 70 MiB

    return run_max_pool3d(*operands)


def _triton_avg_pool_linear(*operands: object) -> Tensor:
    from r3d_kernels.triton.pool import run_avg_pool_linear

    return run_avg_pool_linear(*operands)


_MAX_POOL = _Operation(
    "max-pool",
    {
        "cuda": lambda *operands: torch.ops.r3d_kernels.max_pool3d(*operands),
        "triton": _triton_max_pool3d,
        "torch": reference.max_pool3d,
    },
    exact=True,
)
_HEAD = _Operation(
    "head",
    {
        "cuda": lambda *operands: torch.ops.r3d_kernels.avg_pool_linear(*operands),
        "triton": _triton_avg_pool_linear,
        "torch": reference.avg_pool_linear,
    },
    exact=False,
)


def max_pool3d(x: Tensor, kernel: Triple, stride: Triple, padding: Triple) -> Tensor:
    """`ops.max_pool3d` of a tensor with data, checked; no gradient."""
    window = "x".join(map(str, kernel)), "x".join(map(str, stride)), "x".join(map(str, padding))
    return _run(_MAX_POOL, "f{}s{}p{}".format(*window), x, kernel, stride, padding)


def avg_pool_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`ops.avg_pool_linear` of tensors with data, checked; no gradient."""
    return _run(_HEAD, f"k{weight.shape[0]}" + ("" if bias is None else "+bias"), x, weight, bias)


def _run(op: _Operation, what: str, x: Tensor, *rest: object) -> Tensor:
    compiled = "cuda" if _extension.takes(x) else "torch"  # also where x is in CPU memory
    if torch.compiler.is_compiling():  # nothing can be asked, measured or remembered while Dynamo traces
        return op.ways[compiled](x, *rest)
    asked = backends.current_backend()
    if not _on_gpu(x):
        if asked == "triton" and why_not_here(x.device, x.dtype) is None:
            return op.ways["triton"](x, *rest)
        return op.ways[compiled](x, *rest)
    dense = x.is_contiguous(memory_format=torch.channels_last_3d)
    key = (op.name, what, x.shape, x.dtype, x.device, dense, asked, tuning.enabled())
    way = _plans.get(key)
    if way is None:
        way, final = _chosen(op, what, asked, x, *rest)
        if final:
            if len(_plans) >= _MOST_PLANS:
                _plans.clear()
            _plans[key] = way
    return op.ways[way](x, *rest)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _here(x: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _able(op: _Operation, asked: str, x: Tensor) -> list[str]:
    """The ways that can run on x, preferred first; torch's own where the backend asked for has none."""
    able = []
    for way in op.ways:
        if asked not in ("auto", way) or (way == "cuda" and not _extension.takes(x)):
            continue
        if way == "triton" and (why_not := why_not_here(x.device, x.dtype)) is not None:
            logger.debug("%s: triton %s", op.name, why_not)
            continue
        able.append(way)
    return able or ["torch"]


def _chosen(op: _Operation, what: str, asked: str, x: Tensor, *rest: object) -> tuple[str, bool]:
    """The way for a call, and whether it is so for good."""
    able = _able(op, asked, x)
    if x.shape[0] == 0 or torch.cuda.is_current_stream_capturing():
        # Nothing can be compiled or measured while a graph is captured, and nothing told by an empty batch.
        return next((way for way in able if way != "triton"), "torch"), False
    shape = "x".join(map(str, x.shape))
    layout = "" if x.is_contiguous(memory_format=torch.channels_last_3d) else " strided"
    name = f"{op.name} {shape} {what} {str(x.dtype).removeprefix('torch.')}{layout}"
    machine = tuning.machine_key(x.device, "")
    if "triton" in able:
        from triton import __version__

        machine += f" | triton {__version__}"
    with _choosing, _here(x):
        if tuning.enabled() and len(able) > 1:
            known = tuning.shared.get(machine, name)
            if known is not None and set(known["seconds"]) <= set(able) and known["kernel"] in able:
                way = known["kernel"]
                if way != "triton" or _wrong(op, x, *rest) is None:
                    return way, True
        if "triton" in able and (wrong := _wrong(op, x, *rest)) is not None:
            logger.warning("Triton's %s is not used: %s", name, wrong)
            able = [way for way in able if way != "triton"] or ["torch"]
        if len(able) == 1 or not tuning.enabled():
            return able[0], True
        seconds = {way: tuning.gpu_seconds(lambda way=way: op.ways[way](x, *rest)) for way in able}
        way = next(way for way in able if seconds[way] <= min(seconds.values()) * _MARGIN)
        tuning.shared.put(machine, name, way, seconds)
    logger.debug("%s -> %s %s", name, way, seconds)
    return way, True


def _wrong(op: _Operation, x: Tensor, *rest: object) -> str | None:
    """None where Triton computes what torch does; else what is wrong."""
    try:
        y = op.ways["triton"](x, *rest)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as e:  # whatever the compiler or the driver says
        return f"{type(e).__name__}: {next(iter(str(e).splitlines()), '')}"
    want = op.ways["torch"](x, *rest)
    if op.exact:
        same = (y == want) | (y.isnan() & want.isnan())
        return None if bool(same.all()) else f"{int((~same).sum())} of {same.numel()} elements are wrong"
    y, want = y.float(), want.float()
    distance, size = float((y - want).norm()), float(want.norm())
    # Far beyond any rounding, and TF32's. What is not finite tells nothing.
    wrong = size < float("inf") and not distance <= 0.01 * size + 1e-6
    return f"its result is {distance / (size or 1.0):.1e} from torch's" if wrong else None
