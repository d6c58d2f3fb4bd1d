"""Which configuration a convolution runs with: measured once on the layer's own data and remembered, or the default.

Every configuration's result is compared with torch's own before it may be measured: more warps than a kernel can use
have given wrong results in released versions of Triton (triton#1254, pytorch#173068).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from r3d_kernels import _fork, tuning
from r3d_kernels.problems import ConvProblem
from r3d_kernels.triton import config as configs
from r3d_kernels.triton.config import Config
from r3d_kernels.triton.launch import on_device

__all__ = ["config_for", "disagreement", "fastest", "gpu_seconds"]

logger = logging.getLogger("r3d_kernels")

BUDGET = 15.0  # seconds for one layer, compilation included; the default is always measured
_TRIES = 3  # calls whose data could not be compared, after which a layer keeps its default
_known: dict[tuple[str, str], Config] = {}  # what this process has decided
_failed: dict[tuple[str, str], int] = {}
_measuring = _fork.Lock()  # two layers measured at once would measure each other

Launch = Callable[[Config], Callable[..., Tensor]]

# |error| <= relative * |reference| + absolute * root mean square of the reference, element by element
_TOLERANCE = {
    ("half", torch.bfloat16): (2.0**-7, 1e-2),
    ("half", torch.float16): (2.0**-10, 1e-2),
    ("tf32", torch.float32): (1e-2, 1e-2),
    ("ieee", torch.float32): (1e-4, 1e-4),
}


@cache
def _machine(device: torch.device) -> str:
    return tuning.machine_key(device, "") + f" | triton {triton.__version__}"


def _can_measure(x: Tensor) -> bool:
    return x.is_cuda


def config_for(
    problem: ConvProblem, precision: str, launch: Launch, tensors: tuple[Tensor | None, ...]
) -> tuple[Config, bool]:
    """The configuration for a problem, and whether it is so for good: a later call may be able to measure.

    Args:
        problem, precision: what is to be run.
        launch: makes the callable that runs a configuration.
        tensors: x, weight, scale, bias and residual of this very call, channels-last.

    Raises:
        RuntimeError: where no configuration compiles and computes what torch does.
    """
    x = tensors[0]
    assert x is not None
    where = configs.machine(x.device)
    able = configs.candidates(problem, x.dtype, precision, where)
    if not _can_measure(x) or problem.n == 0 or not tuning.enabled():
        return able[0], True
    place = _machine(x.device), f"triton {problem} {x.dtype} {precision}".replace("torch.", "")
    if place in _known:
        return _known[place], True
    if torch.cuda.is_current_stream_capturing():
        return able[0], False
    with _measuring:
        if place not in _known:
            best = _measured(problem, precision, launch, tensors, able, *place)
            if best is None:
                _failed[place] = _failed.get(place, 0) + 1
                if _failed[place] < _TRIES:
                    return able[0], False
                logger.warning("%s: nothing finite to compare results by, not measured", place[1])
            _known[place] = best or able[0]
    return _known[place], True


def _measured(
    problem: ConvProblem,
    precision: str,
    launch: Launch,
    tensors: tuple[Tensor | None, ...],
    able: Sequence[Config],
    machine: str,
    key: str,
) -> Config | None:
    """The fastest configuration, from the cache or from a measurement; None where nothing can be compared."""
    x = tensors[0]
    assert x is not None
    remembered = tuning.shared.get(machine, key)
    texts = {str(c) for c in able}
    if remembered is not None and remembered["kernel"] in texts and set(remembered["seconds"]) <= texts:
        return Config.parse(remembered["kernel"])
    expected = reference(problem, tensors)
    if not all(torch.isfinite(e).all() for _, e in expected):
        return None  # the next call may bring better data
    with on_device(x):
        seconds = fastest(able, launch, tensors, precision, expected, gpu_seconds, BUDGET)
    best = min(seconds, key=seconds.__getitem__)
    tuning.shared.put(machine, key, str(best), {str(c): s for c, s in seconds.items()})
    return best


def reference(problem: ConvProblem, tensors: tuple[Tensor | None, ...]) -> list[tuple[int, Tensor]]:
    """(index, result) of the first and the last sample, by torch in exact float32: both ends of the tiles."""
    x, weight, scale, bias, residual = tensors
    assert x is not None
    assert weight is not None
    p, results = problem, []
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for i in sorted({0, p.n - 1}):
            y = F.conv3d(
                x[i : i + 1].float(), weight.float(), None, p.stride, p.padding, p.dilation, p.groups
            )
            if scale is not None:
                y = y * scale.view(1, -1, 1, 1, 1)
            if bias is not None:
                y = y + bias.view(1, -1, 1, 1, 1)
            if residual is not None:
                y = y + residual[i : i + 1].float()
            results.append((i, y.relu() if p.activation == "relu" else y))
    return results


def disagreement(y: Tensor, expected: Sequence[tuple[int, Tensor]], precision: str) -> str | None:
    """None where y is what it should be, element by element; else what is wrong."""
    relative, absolute = _TOLERANCE[precision, y.dtype]
    for i, want in expected:
        got = y[i : i + 1].float()
        allowed = relative * want.abs() + absolute * want.square().mean().sqrt() + 1e-30
        wrong = ~((got - want).abs() <= allowed)  # a NaN is wrong too
        count = int(wrong.sum())
        if count:
            return f"{count} of {wrong.numel()} elements of sample {i} are wrong"
    return None


def fastest(
    able: Sequence[Config],
    launch: Launch,
    tensors: tuple[Tensor | None, ...],
    precision: str,
    expected: Sequence[tuple[int, Tensor]],
    measure: Callable[[Callable[[], Any]], float],
    budget: float,
    clock: Callable[[], float] = time.monotonic,
) -> dict[Config, float]:
    """Seconds of each configuration that computes the right thing, in the order given, until the budget is spent.

    Raises:
        RuntimeError: where none does, with the reason of each.
    """
    start, seconds, failures = clock(), {}, []
    for config in able:
        if seconds and clock() - start > budget:
            break
        try:
            run = launch(config)
            failure = disagreement(run(*tensors), expected, precision)
            if failure is None:
                seconds[config] = measure(lambda run=run: run(*tensors))
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as e:  # whatever the compiler or the driver says: this configuration is out
            failure = f"{type(e).__name__}: {next(iter(str(e).splitlines()), '')}"
        if failure is not None:
            failures.append(f"{config}: {failure}")
            logger.warning("Triton configuration is not used: %s", failures[-1])
    if not seconds:
        raise RuntimeError("no Triton configuration works here: " + "; ".join(failures))
    return seconds


def gpu_seconds(run: Callable[[], Any], rounds: int = 7) -> float:
    """The median time of a call on the GPU, from events; a warm-up call comes first."""
    run()
    pairs = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)
    ]
    for begin, end in pairs:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return sorted(b.elapsed_time(e) for b, e in pairs)[rounds // 2] / 1e3
