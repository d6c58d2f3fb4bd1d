"""What `verify` found, as data, as a table and as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["LayerRow", "NetworkRow", "Report"]


@dataclass(frozen=True)
class LayerRow:
    """One call of a fused layer. Errors are relative L2 against float64; None where nothing was compared."""

    layer: str  # name of the convolution inside the model
    problem: str  # e.g. n1c64d16h56w56k64f3s1p1+relu
    dtype: str  # computed in
    backend: str  # cpu, cuda, triton, torch
    kernel: str  # e.g. "direct avx512"; "" where the stock modules ran
    error: float | None
    stock_error: float | None
    allowed: float | None
    ok: bool
    note: str = ""  # why stock modules ran, what is not finite, ...


@dataclass(frozen=True)
class NetworkRow:
    """What the whole network returned. Errors as in `LayerRow`."""

    shape: tuple[int, ...]
    dtype: str
    error: float | None
    stock_error: float | None
    allowed: float | None
    ok: bool
    top1: tuple[int, int] | None = None  # in how many clips, of how many, the highest class is float64's
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What `verify` found. ``print(report)`` is a table; `to_dict` is for JSON."""

    layers: tuple[LayerRow, ...]  # in the order in which they ran
    network: NetworkRow
    device: str
    threads: int
    torch_version: str
    input: str  # shape and dtype of the example

    @property
    def ok(self) -> bool:
        """Whether everything that was compared keeps the promise."""
        return self.network.ok and all(row.ok for row in self.layers)

    @property
    def failed(self) -> tuple[LayerRow, ...]:
        """The layers that miss it."""
        return tuple(row for row in self.layers if not row.ok)

    @property
    def worst(self) -> LayerRow | None:
        """The layer that comes closest to what is allowed, or exceeds it most; None where none was compared."""
        compared = [row for row in self.layers if row.allowed is not None]
        return max(compared, key=lambda row: _share(row)) if compared else None

    def to_dict(self) -> dict[str, Any]:
        """The report in dicts, lists, strings, numbers, booleans and None."""
        return {
            "ok": self.ok,
            "device": self.device,
            "threads": self.threads,
            "torch": self.torch_version,
            "input": self.input,
            "layers": [_finite(asdict(row)) for row in self.layers],
            "network": _finite(asdict(self.network)),
        }

    HEADERS = ("", "layer", "problem", "dtype", "kernel", "error", "stock", "allowed", "used", "")

    def cells(self) -> list[tuple[str, ...]]:
        """The table's rows as text under `HEADERS`: the layers, then the network."""
        worst = self.worst
        rows = [
            (
                _sign(row),
                row.layer,
                row.problem,
                row.dtype,
                row.kernel or "stock modules",
                *_numbers(row),
                "; ".join(filter(None, ("worst" if row is worst else "", row.note))),
            )
            for row in self.layers
        ]
        net = self.network
        shape = "x".join(map(str, net.shape))
        rows.append((_sign(net), "network", shape, net.dtype, "", *_numbers(net), net.note))
        return rows

    def summary(self) -> str:
        """One line: whether the promise is kept, and by how many layers."""
        if not self.ok:
            what = list(dict.fromkeys(row.layer for row in self.failed))
            if len(what) > 3:
                what = [*what[:3], f"{len(what) - 3} more layers"]
            if not self.network.ok:
                what.append("the network")
            return f"FAILED: the promise is missed by {', '.join(what)}"
        compared = sum(row.allowed is not None for row in self.layers)
        if not compared:
            return "OK, but no layer was compared: see the notes"
        text = f"OK: {compared} of {len(self.layers)} layers were compared and keep the promise"
        if self.network.allowed is not None:
            text += ", so does the network"
        if self.network.top1 is not None:
            text += "; top-1 as float64 in {} of {}".format(*self.network.top1)
        return text

    def __str__(self) -> str:
        rows = [self.HEADERS, *self.cells()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self.HEADERS))]
        lines = [f"fused against float64: {self.input} on {self.device}, torch {self.torch_version}", ""]
        for row in rows:
            cells = [
                cell.rjust(width) if i in _RIGHT else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join([*lines, "", self.summary()])


_RIGHT = range(5, 9)  # the columns of numbers


def _sign(row: LayerRow | NetworkRow) -> str:
    return "-" if row.allowed is None and row.ok else "ok" if row.ok else "FAIL"


def _share(row: LayerRow | NetworkRow) -> float:
    """How much of what is allowed an error uses; infinite where it is no number."""
    share = row.error / row.allowed if row.allowed else math.inf if row.error else 0.0
    return math.inf if math.isnan(share) else share


def _numbers(row: LayerRow | NetworkRow) -> tuple[str, ...]:
    if row.allowed is None:
        return "-", "-", "-", "-"
    share = _share(row)
    if share < 10:
        used = f"{share:.0%}"
    elif share < 1e4:
        used = f"{share:.0f}x"
    else:
        used = f"{share:.0e}x" if math.isfinite(share) else "-"
    return f"{row.error:.1e}", f"{row.stock_error:.1e}", f"{row.allowed:.1e}", used


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """As JSON has it: no not-a-number, no infinity, no tuples."""
    return {
        key: None
        if isinstance(value, float) and not math.isfinite(value)
        else list(value)
        if isinstance(value, tuple)
        else value
        for key, value in row.items()
    }
