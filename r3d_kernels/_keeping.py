"""How many bytes of turned weights the layers of a process may keep beside their parameters."""

from __future__ import annotations

import weakref

from r3d_kernels import _fork

__all__ = ["LEAN", "Keeping", "shared"]

# Less than what the stock layers' activations take for one clip more than ours, in any network that was measured
# (benchmarks/results/*/cpu_stock_*.json): what is kept does not lift a process above one with stock layers.
LEAN = 37 << 20


class _Reservation:
    """Bytes that are taken as long as this object lives."""


class Keeping:
    """The bytes that are kept now. Shared by threads."""

    def __init__(self) -> None:
        self._lock = _fork.Lock()
        self._held: dict[
            int, int
        ] = {}  # a dictionary, since finalizers run at any time: one operation, no lock

    @property
    def held(self) -> int:
        """Bytes that are kept now."""
        return sum(list(self._held.values()))

    def fits(self, size: int, limit: int | None) -> bool:
        """Whether `size` more bytes stay within `limit`; None is no limit."""
        return limit is None or self.held + size <= limit

    def reserve(self, size: int, limit: int | None) -> object | None:
        """Takes `size` bytes until the returned object is gone; None where they do not fit."""
        with self._lock:
            if not self.fits(size, limit):
                return None
            reservation = _Reservation()
            key = id(reservation)
            self._held[key] = size
            weakref.finalize(reservation, self._held.pop, key, None).atexit = False
            return reservation


shared = Keeping()
