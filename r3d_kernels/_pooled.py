"""A convolution and the max-pool behind it: one kernel for both where there is one and it is the faster way.

The convolution's kernel is chosen as it would be alone (`backends.choose`). Where that one can pool its outputs itself,
both ways are measured once, on the call's own data, and the faster one is remembered in the tuning cache. Pooling
rounds nothing, so both give the same bits; whether they do is looked at first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from r3d_kernels import _fork, _pools, backends, tuning
from r3d_kernels._kernel import reads_weight as _reads_weight
from r3d_kernels._sm90_stem import WINDOWS

if TYPE_CHECKING:
    from r3d_kernels.ops.clip import ClipSource

__all__ = ["WINDOWS", "Apart", "cache_key", "choose", "frames_of"]

logger = logging.getLogger("r3d_kernels")

Triple = tuple[int, int, int]

_MARGIN = 1.03  # the noise: one kernel is preferred, it takes less memory and one launch
_choosing = _fork.Lock()


def frames_of(kernel: Triple, stride: Triple, padding: Triple) -> int:
    """The key of a window in `WINDOWS`, or 0."""
    return next((frames for frames, window in WINDOWS.items() if window == (kernel, stride, padding)), 0)


class Apart:
    """A kernel for the convolution, then the fastest max-pool; packs, names and reasons are the convolution's."""

    def __init__(self, kernel: backends.Kernel, frames: int) -> None:
        self.kernel, self.window = kernel, WINDOWS[frames]
        self.name, self.backend = kernel.name, kernel.backend
        if hasattr(kernel, "run_clip"):
            self.run_clip = self._run_clip

    def can_run(self, request: backends.Request) -> str | None:
        return self.kernel.can_run(request)

    def pack_key(self, request: backends.Request) -> Hashable:
        return self.kernel.pack_key(request)

    def pack(self, layer: backends.Layer, request: backends.Request) -> Any:
        return self.kernel.pack(layer, request)

    def reads_weight(self, pack: Any, layer: backends.Layer) -> bool:
        return _reads_weight(self.kernel, pack, layer)

    def run(self, pack: Any, x: Tensor, residual: Tensor | None, request: backends.Request) -> Tensor:
        return _pools.max_pool3d(self.kernel.run(pack, x, residual, request), *self.window)

    def _run_clip(self, pack: Any, clip: Tensor, source: ClipSource, request: backends.Request) -> Tensor:
        return _pools.max_pool3d(self.kernel.run_clip(pack, clip, source, request), *self.window)


def cache_key(request: backends.Request, asked: str, frames: int) -> tuple[str, str]:
    """(machine, problem) under which the tuning cache has what was measured of both ways."""
    machine, problem = backends.cache_key(request, asked)
    return machine, f"{problem} + max-pool of {frames} frames"


def choose(
    choice: backends.Choice,
    request: backends.Request,
    asked: str,
    frames: int,
    packed: Callable[[backends.Kernel], Any],
    x: Tensor,
    residual: Tensor | None,
) -> backends.Choice:
    """How a convolution and the max-pool behind it are run.

    Args:
        choice: for the convolution alone.
        request, asked, packed, x, residual: as of `backends.choose`.
        frames: of the max-pool's windows, see `WINDOWS`.

    Returns:
        The choice, whose kernel does both.
    """
    apart = replace(choice, kernel=Apart(choice.kernel, frames))
    with_pool = getattr(choice.kernel, "with_pool", None)
    together = None if with_pool is None else with_pool(request, frames)
    if together is None or not tuning.enabled() or request.problem.n == 0:
        return apart
    machine, key = cache_key(request, asked, frames)
    names = {choice.kernel.name, together.name}
    with _choosing:
        known = tuning.shared.get(machine, key)
        if known is None or set(known["seconds"]) != names:
            if backends.capturing(request.device):
                return apart  # nothing can be measured now
            pack = packed(choice.kernel)
            calls = {k.name: lambda k=k: k.run(pack, x, residual, request) for k in (apart.kernel, together)}
            if not _same(*(call() for call in calls.values())):
                logger.warning("%s: %s is not used, its result is wrong", key, together.name)
                return apart
            seconds = {name: tuning.gpu_seconds(call) for name, call in calls.items()}
            won = seconds[together.name] <= seconds[choice.kernel.name] * _MARGIN
            tuning.shared.put(machine, key, together.name if won else choice.kernel.name, seconds)
            known = tuning.shared.get(machine, key)
    logger.debug("%s -> %s %s", key, known["kernel"], known["seconds"])
    took = ", ".join(f"{name} {1e6 * s:.0f} us" for name, s in known["seconds"].items())
    kernel = together if known["kernel"] == together.name else apart.kernel
    return replace(choice, kernel=kernel, reason=f"{choice.reason}; with the max-pool: {took}")


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())
