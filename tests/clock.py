"""A clock for tests of what happens when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Clock:
    """A clock that only moves when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float, result: Any = None) -> Callable[[], Any]:
        def run() -> Any:
            self.now += seconds
            return result if result is not None else {"took": seconds}

        return run
