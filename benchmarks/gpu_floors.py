"""What the GPU report's numbers have to reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gpu_networks import COMPILERS

__all__ = ["EAGER", "FLOORS", "Floor", "floors", "title", "verdict"]


@dataclass(frozen=True)
class Floor:
    """What a measurement has to reach; on another GPU than the one it is meant for it only informs.

    `sections`: where it is measured; the least of them counts, and all must have been measured. `value`: its name in
    their data, with dots between levels.
    """

    what: str
    sections: tuple[str, ...]
    value: str
    at_least: float
    gpu: str = "H200"


def title(name: str, dtype: str, batch: int, engines: Sequence[str]) -> str:
    return f"{name} {dtype} batch {batch}: {', '.join(engines)}"


EAGER = ("stock", "fused")
FLOORS = (
    Floor(
        "r3d_18 bf16 batch 32, times faster than cuDNN eager channels_last_3d",
        (title("r3d_18", "bf16", 32, EAGER),),
        "engines.stock.fused_is_faster",
        1.6,
    ),
    Floor(
        "r3d_18 bf16 batch 32, times faster than the best torch.compile (default, max-autotune)",
        tuple(title("r3d_18", "bf16", 32, (*EAGER, compiler)) for compiler in COMPILERS),
        "faster_than_best_compile",
        1.25,
    ),
    Floor(
        "each 3x3x3 layer of r3d_18 with 128 channels or more, bf16 batch 32, share of the measured matrix rate",
        ("conv3d_sm90 speed, r3d_18 batch 32",),
        "least_share_wide",
        0.60,
    ),
    Floor(
        "each 3x3x3 layer of r3d_18 with 64 channels, bf16 batch 32, share of the measured matrix rate",
        ("conv3d_sm90 speed, r3d_18 batch 32",),
        "least_share_64",
        0.45,
    ),
    Floor(
        "r3d_18 bf16 batch 1 as a CUDA graph, times faster than eager",
        ("r3d_18 bf16 batch 1 as a CUDA graph",),
        "graphed_is_faster",
        3.0,
    ),
    Floor(
        "goal: clips/s of r3d_18 bf16 batch 32",
        (title("r3d_18", "bf16", 32, EAGER),),
        "engines.fused.clips_per_s",
        6000,
    ),
    Floor(
        "goal: clips/s of hara_r3d_18 bf16 batch 32",
        (title("hara_r3d_18", "bf16", 32, EAGER),),
        "engines.fused.clips_per_s",
        20000,
    ),
    Floor(
        "r3d_18 bf16 batch 32 through Triton alone, times faster than cuDNN eager channels_last_3d",
        ("Triton: r3d_18 bf16 batch 32",),
        "triton_is_faster",
        1.25,
    ),
    Floor(
        "training norm bf16, forward and backward, share of the measured copy bandwidth",
        ("Triton: training norm",),
        "share_of_copy",
        0.8,
    ),
)


def _value(section: dict[str, Any], path: str) -> float | None:
    data: Any = section.get("data") if section.get("status") in ("measured", "failed") else None
    for key in path.split("."):
        data = data.get(key) if isinstance(data, dict) else None
    return data if isinstance(data, (int, float)) else None  # not "nan", which stands for one in JSON


def floors(sections: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each floor with its value and whether it holds, both 'not measured' where a section has no such value."""
    by_name = {s["name"]: s for s in sections}
    gpu = (by_name.get("environment", {}).get("data") or {}).get("gpu", "unknown")
    rows = []
    for floor in FLOORS:
        values = [_value(by_name.get(name, {}), floor.value) for name in floor.sections]
        known = [v for v in values if v is not None]
        value = min(known) if len(known) == len(values) else None
        rows.append(
            {
                "what": floor.what,
                "at_least": floor.at_least,
                "value": "not measured" if value is None else value,
                "holds": "not measured" if value is None else value >= floor.at_least,
                "gpu": gpu,
                "meant_for": floor.gpu,
            }
        )
    return rows


def verdict(row: dict[str, Any]) -> str:
    if row["holds"] == "not measured":
        return "not measured"
    verdict = "holds" if row["holds"] else "does not hold"
    here = row["meant_for"] in row["gpu"]
    return (
        verdict if here else f"{verdict}, on {row['gpu']} and not on the {row['meant_for']} it is meant for"
    )
