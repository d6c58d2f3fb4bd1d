"""What a forked child needs: locks that nobody holds, and a number of threads that does not hang it.

Another thread may hold a lock at the moment of the fork; in the child that thread does not exist, and nobody would ever
let go of it. And torch's OpenMP threads do not survive a fork: a child whose parent has computed in parallel waits for
them for ever as soon as it computes in parallel itself (libgomp; DataLoader sets its workers to one thread for the same
reason).
"""

from __future__ import annotations

import os
import threading
import weakref
from types import TracebackType

import torch

__all__ = ["Lock", "computed_in_parallel"]

_locks: weakref.WeakSet[Lock] = weakref.WeakSet()
_parallel = False


class Lock:
    """A reentrant lock that is free in a forked child."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()


def computed_in_parallel() -> None:
    """To be called where torch's threads are about to be used: children forked from now on compute with one thread."""
    global _parallel
    _parallel = _parallel or torch.get_num_threads() > 1


def _after_in_child() -> None:
    for lock in _locks:
        lock._lock = threading.RLock()
    if _parallel:
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_in_child)
