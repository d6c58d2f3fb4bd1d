"""The GPU report as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["draw"]


def draw(path: Path, data: dict[str, Any]) -> None:
    """Networks: milliseconds of each engine over the fused network's. Layers: their share of a matrix product's rate.

    The operation: its share of a copy's speed. Where there is none of it, what became of each section.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    known = [s["data"] for s in data["sections"] if isinstance(s.get("data"), dict)]
    panels: list[tuple[str, list[tuple[str, float, str]]]] = [
        ("time over the fused network's", _network_bars(known)),
        ("rate over that of a large matrix product", _layer_bars(known)),
        ("bn_act: bandwidth over that of a copy", _copy_bars(known)),
    ]
    panels = [(label, bars) for label, bars in panels if bars]
    height = max(3.0, 0.3 * max((len(bars) for _, bars in panels), default=len(data["sections"])) + 1.5)
    count = max(len(panels), 1)
    figure, axes = plt.subplots(1, count, figsize=(6.5 * count, height), layout="constrained", squeeze=False)
    for axis, (label, bars) in zip(axes[0], panels, strict=False):
        names, values, shades = zip(*bars, strict=True)
        places = range(len(bars))
        axis.barh(places, values, color=shades)
        axis.set_yticks(places, names, fontsize=7)
        axis.invert_yaxis()
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_xlabel(label)
    if not panels:
        told = [f"{s['name']}: {s['status']} ({s.get('reason', '')})"[:140] for s in data["sections"]]
        axes[0][0].set_axis_off()
        axes[0][0].text(0, 1, "\n".join(told), va="top", fontsize=7, transform=axes[0][0].transAxes)
    gpu = next((d["gpu"] for d in known if "gpu" in d), "")
    version = data.get("machine", {}).get("versions", {}).get("torch", torch.__version__)
    figure.suptitle(f"{gpu}, torch {version}")
    figure.savefig(path, dpi=130)
    plt.close(figure)


_COLOURS = {"fused": "#d1495b", "stock": "#8d99ae", "compile": "#5c677d", "max-autotune": "#33415c"}


def _network_bars(known: Sequence[dict[str, Any]]) -> list[tuple[str, float, str]]:
    """The engines of a network one below the other; one that several sections have timed once, of the first."""
    cases: dict[str, dict[str, float]] = {}
    for d in known:
        if "engines" in d:
            engines = cases.setdefault(f"{d['network']} {d['dtype']} b{d['batch']}", {})
            for engine, value in d["engines"].items():
                if isinstance(value["fused_is_faster"], (int, float)):
                    engines.setdefault(engine, value["fused_is_faster"])
    return [
        (f"{case} {engine}", engines[engine], _COLOURS[engine])
        for case, engines in cases.items()
        for engine in sorted(engines, key=list(_COLOURS).index)
    ]


def _layer_bars(known: Sequence[dict[str, Any]]) -> list[tuple[str, float, str]]:
    return [
        (f"{d['network']} b{d['batch']} {row['layer']}", row["share_of_matmul"], _COLOURS["fused"])
        for d in known
        if "matmul_tflop_per_s" in d and "network" in d
        for row in d.get("layers", [])
        if isinstance(row["share_of_matmul"], (int, float))
    ]


def _copy_bars(known: Sequence[dict[str, Any]]) -> list[tuple[str, float, str]]:
    rows = next((d["rows"] for d in known if "copy_gbyte_per_s" in d and "rows" in d), [])
    return [
        (f"{row['dtype']} {row['shape']}", row["share_of_copy"], _COLOURS["fused"])
        for row in rows
        if isinstance(row["share_of_copy"], (int, float))
    ]
