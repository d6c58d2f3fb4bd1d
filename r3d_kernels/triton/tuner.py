"""Which configuration a convolution or a gradient runs with: measured once and remembered, or the default.

Every configuration's result is compared with torch's own before it may be measured: more warps than a kernel can use
have given wrong results in released versions of Triton (triton#1254, pytorch#173068). A layer is compared on its own
data; a gradient, whose data may be zeros (a norm that starts at zero) or infinities (a loss scale that is too large),
then on random numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.grad import conv3d_input, conv3d_weight

from r3d_kernels import _fork, tuning
from r3d_kernels.problems import ConvProblem
from r3d_kernels.triton import ahead
from r3d_kernels.triton import config as configs
from r3d_kernels.triton.backend import interpreted
from r3d_kernels.triton.config import Config
from r3d_kernels.triton.launch import on_device
from r3d_kernels.tuning import gpu_seconds

__all__ = [
    "FORWARD",
    "INPUT_GRAD",
    "WEIGHT_GRAD",
    "NothingWorks",
    "Task",
    "cache_key",
    "compiled",
    "config_for",
    "disagreement",
    "fastest",
    "remembered",
]

logger = logging.getLogger("r3d_kernels")

BUDGET = 15.0  # seconds, compilation included, after which no configuration is begun; the default is always measured
_COMPILING = 2 / 3  # of the budget; the rest is for measuring
_TRIES = 3  # calls that could not be measured, after which a layer keeps its default
_known: dict[tuple[str, str], Config] = {}  # what this process has decided
_failed: dict[tuple[str, str], int] = {}
_measuring = _fork.Lock()  # two layers measured at once would measure each other

Launch = Callable[[Config], Callable[..., Tensor]]
Tensors = tuple[Tensor | None, ...]
# (index, result): of one sample, or of all where the index is None
Expected = Sequence[tuple[int | None, Tensor]]


class NothingWorks(RuntimeError):
    """No configuration compiles here and computes what torch does."""


@dataclass(frozen=True)
class Task:
    """One of the computations that are tuned."""

    name: str  # in the keys of the cache
    candidates: Callable[[ConvProblem, torch.dtype, str, configs.Machine], list[Config]]  # the default first
    reference: Callable[[ConvProblem, Tensors], Expected]  # by torch in exact float32
    by_torch: Callable[..., Tensor] | None = None  # what runs where nothing of ours works
    random: bool = False  # whether random numbers may stand for data that tell nothing
    budget: float = BUDGET


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


def cache_key(
    task: Task, problem: ConvProblem, dtype: torch.dtype, precision: str, device: torch.device
) -> tuple[str, str]:
    """(machine, problem) under which the tuning cache has the configuration of a problem."""
    words = ("triton", task.name, str(problem), str(dtype).removeprefix("torch."), precision)
    return _machine(device), " ".join(filter(None, words))


def remembered(place: tuple[str, str], able: Sequence[Config]) -> Config | None:
    """What an earlier measurement chose, if it was among these candidates."""
    entry = tuning.shared.get(*place)
    texts = {str(c) for c in able}
    if entry is None or entry["kernel"] not in texts or not set(entry["seconds"]) <= texts:
        return None
    return Config.parse(entry["kernel"])


def config_for(
    task: Task, problem: ConvProblem, precision: str, launch: Launch, tensors: Tensors
) -> tuple[Config, bool]:
    """The configuration for a problem, and whether it is so for good: a later call may be able to measure.

    Args:
        task, problem, precision: what is to be run.
        launch: makes the callable that runs a configuration.
        tensors: what this very call runs on, channels-last: x, weight, scale, bias and residual; dy and weight; or
            x and dy.

    Raises:
        NothingWorks: where no configuration compiles and computes what torch does.
    """
    first = tensors[0]
    assert first is not None
    where = configs.machine(first.device)
    able = task.candidates(problem, first.dtype, precision, where)
    if not _can_measure(first) or problem.n == 0 or not tuning.enabled():
        return able[0], True
    place = cache_key(task, problem, first.dtype, precision, first.device)
    if place in _known:
        return _known[place], True
    if torch.cuda.is_current_stream_capturing():
        return able[0], False
    with _measuring:
        if place not in _known:
            best = _measured(task, problem, precision, launch, tensors, able, place)
            if best is None:
                _failed[place] = _failed.get(place, 0) + 1
                if _failed[place] < _TRIES:
                    return able[0], False
                logger.warning("%s: not measured, %d calls had no finite data or memory", place[1], _TRIES)
            _known[place] = best or able[0]
    return _known[place], True


def _measured(
    task: Task,
    problem: ConvProblem,
    precision: str,
    launch: Launch,
    tensors: Tensors,
    able: Sequence[Config],
    place: tuple[str, str],
) -> Config | None:
    """The fastest configuration, from the cache or from a measurement; None where nothing can be compared now."""
    first = tensors[0]
    assert first is not None
    if (known := remembered(place, able)) is not None:
        return known
    try:
        with torch.no_grad(), on_device(first):
            expected = task.reference(problem, tensors)
            if task.random and not all(_tells(e) for _, e in expected):
                tensors = tuple(None if t is None else _random_like(t) for t in tensors)
                expected = task.reference(problem, tensors)
            if not all(torch.isfinite(e).all() for _, e in expected):
                return None  # the next call may bring better data
            begin = time.monotonic()
            able, failures = compiled(able, launch, tensors, _COMPILING * task.budget)
            left = task.budget - (time.monotonic() - begin)
            seconds = fastest(
                able, launch, tensors, precision, expected, gpu_seconds, left, known_failures=failures
            )
    except torch.cuda.OutOfMemoryError:  # the call itself may still fit
        return None
    best = min(seconds, key=seconds.__getitem__)
    tuning.shared.put(*place, str(best), {str(c): s for c, s in seconds.items()})
    return best


def _tells(expected: Tensor) -> bool:
    """Whether a wrong result would be seen: zeros are right too often."""
    size = expected.square().mean()
    return bool(torch.isfinite(size) & (size > 0))


def _random_like(t: Tensor) -> Tensor:
    """Not from the generator that the user's own random numbers come from."""
    generator = torch.Generator(t.device).manual_seed(0)
    y = torch.empty_like(t)  # channels-last as it is
    return y.normal_(generator=generator)


# ---- what torch computes, in exact float32 ----


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    """The newer switch, of convolutions alone: where it was set, the older one cannot be asked, nor what saves it."""
    cudnn = torch.backends.cudnn
    before = cudnn.conv.fp32_precision, cudnn.benchmark
    cudnn.conv.fp32_precision, cudnn.benchmark = "ieee", False
    try:
        yield
    finally:
        cudnn.conv.fp32_precision, cudnn.benchmark = before


def _ends(n: int) -> list[int]:
    """The first and the last sample: both ends of the tiles."""
    return sorted({0, n - 1})


def reference(problem: ConvProblem, tensors: Tensors) -> Expected:
    """Of the first and the last sample."""
    x, weight, scale, bias, residual = tensors
    assert x is not None
    assert weight is not None
    p, results = problem, []
    with _exact():
        for i in _ends(p.n):
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


def torch_input_grad(p: ConvProblem, dy: Tensor, weight: Tensor) -> Tensor:
    dx = conv3d_input(p.in_shape, weight, dy, p.stride, p.padding, p.dilation, p.groups)
    return dx.contiguous(memory_format=torch.channels_last_3d)


def torch_weight_grad(p: ConvProblem, x: Tensor, dy: Tensor) -> Tensor:
    dw = conv3d_weight(x, p.weight_shape, dy, p.stride, p.padding, p.dilation, p.groups)
    return dw.contiguous(memory_format=torch.channels_last_3d)


def reference_input_grad(problem: ConvProblem, tensors: Tensors) -> Expected:
    """Of the first and the last sample."""
    dy, weight = tensors
    assert dy is not None
    assert weight is not None
    one = dataclasses.replace(problem, n=1)
    with _exact():
        return [(i, torch_input_grad(one, dy[i : i + 1].float(), weight.float())) for i in _ends(problem.n)]


def reference_weight_grad(problem: ConvProblem, tensors: Tensors) -> Expected:
    """Sample by sample, or float32 copies of all of them would be the peak of memory."""
    x, dy = tensors
    assert x is not None
    assert dy is not None
    one = dataclasses.replace(problem, n=1)
    dw = torch.zeros(problem.weight_shape, dtype=torch.float64, device=x.device)
    with _exact():
        for i in range(problem.n):
            dw += torch_weight_grad(one, x[i : i + 1].float(), dy[i : i + 1].float())
    return [(None, dw.float())]


FORWARD = Task("", lambda *problem: configs.candidates(*problem), reference)
INPUT_GRAD = Task(
    "input gradient",
    lambda *problem: configs.input_grads(*problem),
    reference_input_grad,
    torch_input_grad,
    random=True,
)
WEIGHT_GRAD = Task(
    "weight gradient",
    lambda *problem: configs.weight_grads(*problem),
    reference_weight_grad,
    torch_weight_grad,
    random=True,
)


def disagreement(y: Tensor, expected: Expected, precision: str) -> str | None:
    """None where y is what it should be, element by element; else what is wrong."""
    relative, absolute = _TOLERANCE[precision, y.dtype]
    for i, want in expected:
        got = (y if i is None else y[i : i + 1]).float()
        allowed = relative * want.abs() + absolute * want.square().mean().sqrt() + 1e-30
        wrong = ~((got - want).abs() <= allowed)  # a NaN is wrong too
        count = int(wrong.sum())
        if count:
            which = "" if i is None else f" of sample {i}"
            return f"{count} of {wrong.numel()} elements{which} are wrong"
    return None


def compiled(
    able: Sequence[Config],
    launch: Launch,
    tensors: Tensors,
    budget: float,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[list[Config], list[str]]:
    """Compiles configurations, several at once, before any is launched: whoever measures must have the processor.

    Args:
        able, launch, tensors: as for `fastest`.
        budget: seconds after which no compilation is begun.

    Returns:
        The configurations less those that do not compile, what is ready first, and why the others do not.
    """
    first = tensors[0]
    assert first is not None
    if len(able) < 2 or ahead.threads() < 2 or interpreted():
        return list(able), []
    stand_ins = tuple(map(ahead.like, tensors))
    jobs: dict[Config, list[ahead.Job]] = {}
    failures: list[str] = []
    for config in able:
        try:
            with ahead.noted() as jobs[config]:
                launch(config)(*stand_ins)
        except Exception as e:  # noqa: PERF203 - as in `fastest`
            failures.append(_failed_as(config, e))
            del jobs[config]
    every = itertools.chain.from_iterable(jobs.values())
    found = ahead.compile_all(every, first.device, budget, clock=clock)
    ready, left = [], []
    for config, needed in jobs.items():
        error = next(filter(None, (found.get(job.key) for job in needed)), None)
        if error is not None:
            failures.append(_failed_as(config, error))
        else:
            (ready if all(job.key in found for job in needed) else left).append(config)
    return ready + left, failures


def _failed_as(config: Config, e: Exception) -> str:
    return _out(config, f"{type(e).__name__}: {next(iter(str(e).splitlines()), '')}")


def _out(config: Config, why: str) -> str:
    logger.warning("Triton configuration is not used: %s: %s", config, why)
    return f"{config}: {why}"


def fastest(
    able: Sequence[Config],
    launch: Launch,
    tensors: Tensors,
    precision: str,
    expected: Expected,
    measure: Callable[[Callable[[], Any]], float],
    budget: float,
    clock: Callable[[], float] = time.monotonic,
    known_failures: Sequence[str] = (),
) -> dict[Config, float]:
    """Seconds of each configuration that computes the right thing, in the order given, until the budget is spent.

    `known_failures`: why others cannot be among them.

    Raises:
        NothingWorks: where none does, with the reason of each.
    """
    start, seconds, failures = clock(), {}, list(known_failures)
    for config in able:
        if seconds and clock() - start > budget:
            break
        try:
            run = launch(config)
            wrong = disagreement(run(*tensors), expected, precision)
            if wrong is None:
                seconds[config] = measure(lambda run=run: run(*tensors))
            else:
                failures.append(_out(config, wrong))
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as e:  # whatever the compiler or the driver says: this configuration is out
            failures.append(_failed_as(config, e))
    if not seconds:
        raise NothingWorks("no Triton configuration works here: " + "; ".join(failures))
    return seconds
