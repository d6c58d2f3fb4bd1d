"""Writes the measured tables of README.md from the JSON of compare.py, accuracy.py and gpu_report.py.

    python benchmarks/tables.py            # rewrites the blocks of README.md
    python benchmarks/tables.py --check    # exit code 1 if that would change anything

A block begins with `<!-- table: KIND FILE... -->` and ends with `<!-- end table -->`; files are in benchmarks/results.
gpu_layers takes a second word: what the problems begin with.
Kinds: peers (engines side by side), openvino (networks against OpenVINO), stock (time and memory), accuracy, stems,
foreign (other people's models); of a GPU's report gpu (networks), gpu_layers, gpu_stems, gpu_floors.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- table: ([^>]*?) -->\n)(.*?)(<!-- end table -->)", re.DOTALL)
PEERS = {
    "eager": "stock eager",
    "eager_cl": "stock channels-last",
    "compile": "torch.compile + freezing",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}
MEMORY = ("eager", "eager_cl", "fused")
Row = dict[str, Any]


def load(names: Iterable[str]) -> list[dict[str, Any]]:
    return [json.loads((RESULTS / name).read_text()) | {"file": name} for name in names]


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def source(report: dict[str, Any]) -> str:
    machine = report["machine"]
    return (
        f"`benchmarks/results/{report['file']}`, commit {machine['commit'][:7]}, {machine['date'][:10]}, "
        f"torch {machine['versions']['torch'].split('+')[0]}:\n`{machine['command']}`"
    )


def sources(reports: list[dict[str, Any]]) -> str:
    return "\n\n" + "\n".join(f"- {source(r)}" for r in reports) + "\n\n"


def milliseconds(value: float) -> str:
    return f"{value:.0f} ms" if value >= 99.95 else f"{value:.1f} ms"


def cases(reports: list[dict[str, Any]], part: str = "speed") -> dict[tuple[str, int, str], dict[str, Row]]:
    """(network, batch, dtype) -> engine -> row, in the order in which they were measured."""
    found: dict[tuple[str, int, str], dict[str, Row]] = {}
    for report in reports:
        for row in report[part]:
            key = (row["network"], row["batch"], row["dtype"])
            found.setdefault(key, {})[row["engine"]] = row
    return found


def cell(row: Row | None) -> str:
    if row is None or row["status"] != "measured":
        return "-"
    return f"{milliseconds(row['median_ms'])} ({row['fused_is_faster_by']:.2f}x)"


def peers(names: list[str]) -> str:
    reports = load(names)
    rows = [
        [
            f"`{network}`",
            str(batch),
            dtype,
            *(cell(engines.get(e)) for e in PEERS),
            f"**{milliseconds(engines['fused']['median_ms'])}**",
            f"{engines['fused']['error']:.1e}",
        ]
        for (network, batch, dtype), engines in cases(reports).items()
    ]
    head = ["network", "batch", "dtype", *PEERS.values(), "**r3d_kernels**", "its error"]
    return sources(reports) + table(head, rows)


def openvino(names: list[str]) -> str:
    reports = load(names)
    rows = [
        [
            f"`{network}`",
            str(batch),
            dtype,
            cell(engines.get("openvino")),
            f"**{milliseconds(engines['fused']['median_ms'])}**",
            f"{engines['fused']['error']:.1e}",
        ]
        for (network, batch, dtype), engines in cases(reports).items()
    ]
    return sources(reports) + table(
        ["network", "batch", "dtype", "OpenVINO", "**r3d_kernels**", "its error"], rows
    )


def stock(names: list[str]) -> str:
    reports = load(names)
    memory = cases(reports, "memory")
    rows, gains, added, held = [], [], 0, 0
    for (network, batch, dtype), engines in cases(reports).items():
        measured = memory[network, batch, dtype]
        extra = [measured[e]["extra_mib"] for e in MEMORY]
        steady = [measured[e]["steady_mib"] for e in MEMORY]
        gain = min(engines[e]["fused_is_faster_by"] for e in MEMORY[:2])
        gains.append(gain)
        added += extra[2] < min(extra[:2])
        held += steady[2] < min(steady[:2])
        rows.append(
            [f"`{network}`", str(batch), dtype, *(milliseconds(engines[e]["median_ms"]) for e in MEMORY)]
            + [f"{gain:.2f}x"]
            + [" / ".join(f"{v:.0f}" for v in values) + " MiB" for values in (extra, steady)]
        )
    head = ["network", "batch", "dtype", "stock eager", "stock channels-last", "fused"]
    head += ["faster than the better stock", "a pass adds", "process peak"]
    return (
        f"\nFaster than the better stock layout by {min(gains):.2f}x to {max(gains):.2f}x in {len(gains)} cases; "
        f"a pass adds less memory than with either in {added} of them, and the warm process peaks lower than with "
        f"either in {held}." + sources(reports) + table(head, rows)
    )


def span(values: list[float]) -> str:
    if not values:
        return "-"
    low, high = f"{min(values):.1e}", f"{max(values):.1e}"
    return low if low == high else f"{low} to {high}"


def accuracy(names: list[str], *, stems: bool = False) -> str:
    """One row for a kernel, one column for an algorithm; spans over the numbers of channels."""
    reports = load(names)
    errors: dict[str, dict[str, list[float]]] = {}
    for row in reports[0]["float32"]:
        if stems is any(name.startswith("stem") for name in row["errors"]):
            for name, error in row["errors"].items():
                kernel = "x".join(map(str, row["kernel"])) + (
                    " stride 2"
                    if row.get("stride") == 2
                    else " on two frames"
                    if row.get("frames") == 2
                    else ""
                )
                errors.setdefault(kernel, {}).setdefault(name, []).append(error)
    columns = list(dict.fromkeys(name for by_name in errors.values() for name in by_name))
    rows = [[kernel, *(span(by_name.get(c, [])) for c in columns)] for kernel, by_name in errors.items()]
    return sources(reports) + table(["kernel", *map(_algorithm, columns)], rows)


def _algorithm(name: str) -> str:
    """winograd244 -> Winograd F(2,4,4)"""
    digits = re.fullmatch(r"(winograd|tiles|stem)([\d,]+)(.*)", name)
    if digits is None:
        return name
    kind, numbers, rest = digits.groups()
    kind = {"winograd": "Winograd", "tiles": "AMX tiles", "stem": "stem"}[kind]
    return f"{kind} F({','.join(numbers.replace(',', ''))}){rest.replace(' slices', ' slices of bf16')}"


# ---- gpu_report.py ----

GPU_ENGINES = {
    "stock": "cuDNN eager",
    "compile": "torch.compile",
    "max-autotune": "max-autotune",
}


def sections(report: dict[str, Any], holds: str) -> list[Row]:
    """The data of the sections that have measured something of this name."""
    return [s["data"] for s in report["sections"] if s["status"] == "measured" and holds in s["data"]]


def gpu_source(report: dict[str, Any]) -> str:
    (here,) = sections(report, "gpu")
    cudnn = here["cudnn"]  # 91900: 9.19.0
    cudnn = f"cuDNN {cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}"
    return f"\n\n- {here['gpu']}, CUDA {here['cuda']}, {cudnn}, driver {here['driver']}. {source(report)}\n\n"


def gpu(names: list[str]) -> str:
    """Networks; an engine's ratio is of the run in which it was timed beside the fused network."""
    (report,) = load(names)
    found: dict[tuple[str, int, str], dict[str, Row]] = {}
    for data in sections(report, "engines"):
        engines = found.setdefault((data["network"], data["batch"], data["dtype"]), {})
        for name, row in data["engines"].items():
            engines.setdefault(name, row)
    rows = []
    for (network, batch, dtype), engines in found.items():
        cells = [
            f"{e['median_ms']:.2f} ms ({e['fused_is_faster']:.2f}x)" if (e := engines.get(name)) else "-"
            for name in GPU_ENGINES
        ]
        fused = engines["fused"]
        memory = " / ".join(f"{engines[e]['forward_adds_mib']:.0f}" for e in ("stock", "fused"))
        ours = [f"**{fused['median_ms']:.2f} ms**", f"{fused['clips_per_s']:,.0f}"]
        rows.append(
            [f"`{network}`", str(batch), dtype, *cells, *ours, f"{memory} MiB", f"{fused['error']:.1e}"]
        )
    for data in sections(report, "graphed_ms"):
        ms = data["graphed_ms"]
        cells = [f"{ms['stock']:.2f} ms ({data['graphed_is_faster']:.2f}x)", "-", "-"]
        ours = [f"**{ms['graphed']:.2f} ms**", f"{data['graphed_clips_per_s']:,.0f}"]
        name = f"`{data['network']}`, as a CUDA graph"
        rows.append([name, str(data["batch"]), data["dtype"], *cells, *ours, "-", "-"])
    head = ["network", "batch", "dtype", *GPU_ENGINES.values(), "**r3d_kernels**", "clips/s"]
    return gpu_source(report) + table([*head, "a pass adds, stock / ours", "its error"], rows)


def gpu_layers(names: list[str]) -> str:
    """The layers that the Hopper convolution takes."""
    name, begin = names
    (report,) = load([name])
    rows: dict[str, list[str]] = {}
    for data in sections(report, "matmul_tflop_per_s"):
        for row in data.get("layers", []):
            if not row["problem"].startswith(begin):
                continue
            ours, theirs = row["ours_us"], row["cudnn_fused_us"]
            rows[row["problem"]] = [
                f"`{row['problem']}`",
                f"{row['stock_us']:.0f} us ({row['ours_is_faster']:.2f}x)",
                "-" if isinstance(theirs, str) else f"{theirs:.0f} us ({theirs / ours:.2f}x)",
                f"**{ours:.0f} us**",
                f"{row['tflop_per_s']:.0f}",
                f"{row['share_of_matmul']:.0%}",
            ]
    head = ["layer", "cuDNN + batch norm + add + ReLU", "cuDNN's fused", "**r3d_kernels**", "TFLOP/s"]
    return gpu_source(report) + table([*head, "of a matrix product"], rows.values())


def gpu_stems(names: list[str]) -> str:
    (report,) = load(names)
    rows = []
    for data in sections(report, "stems"):
        for row in data["stems"]:
            us = row["us"]
            ours = us["wgmma stem"]
            others = (us["stock"], min(v for k, v in us.items() if k.startswith("sm80")))
            cells = [f"{other:.0f} us ({other / ours:.2f}x)" for other in others]
            name = f"{row['stem']}: `{row['problem']}`"
            rows.append([name, *cells, f"**{ours:.0f} us**", f"{row['share_of_matmul']:.0%}"])
    head = ["stem", "cuDNN + batch norm + ReLU", "ours for 8.0", "**ours for Hopper**", "of a matrix product"]
    return gpu_source(report) + table(head, rows)


def gpu_floors(names: list[str]) -> str:
    """What several reports of one GPU have measured; the first that has a value counts."""
    reports = load(names)
    rows = []
    for each in zip(*(report["floors"] for report in reports), strict=True):
        row = next((row for row in each if row["holds"] != "not measured"), each[0])
        holds = {True: "yes", False: "no"}.get(row["holds"], "-")
        rows.append([row["what"], f"{row['at_least']:,}", str(row["value"]), holds])
    head = ["what", "at least", "measured", "holds"]
    return "".join(gpu_source(report).rstrip("\n") for report in reports) + "\n\n" + table(head, rows)


def foreign(names: list[str]) -> str:
    """Other people's models: times, gain over the better stock layout, what is fused."""
    reports = load(names)
    engines: dict[str, dict[str, Row]] = {}
    for report in reports:
        for row in report["foreign"]:
            if row["status"] == "measured":
                engines.setdefault(row["network"], {})[row["engine"]] = row
    rows = []
    for network, found in engines.items():
        fused, others = found["fused"], [found["stock eager"], found["stock channels-last"]]
        rows.append(
            [
                f"{network}, `{fused['input']}`",
                *(milliseconds(row["median_ms"]) for row in others),
                f"**{milliseconds(fused['median_ms'])}**",
                f"{min(row['fused_is_faster_by'] for row in others):.2f}x",
                f"{fused['fused_convolutions']} of {fused['convolutions']}",
                f"{fused['error']:.1e}",
            ]
        )
    head = ["model", "stock eager", "stock channels-last", "**fused**", "faster than the better stock"]
    return sources(reports) + table([*head, "convolutions fused", "its error"], rows)


KINDS = {
    "foreign": foreign,
    "gpu": gpu,
    "gpu_layers": gpu_layers,
    "gpu_stems": gpu_stems,
    "gpu_floors": gpu_floors,
    "peers": peers,
    "openvino": openvino,
    "stock": stock,
    "accuracy": accuracy,
    "stems": lambda names: accuracy(names, stems=True),
}


def rewritten(text: str) -> str:
    def block(match: re.Match[str]) -> str:
        kind, *names = match.group(2).split()
        return match.group(1) + KINDS[kind](names) + match.group(4)

    return BLOCK.sub(block, text)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit code 1 if README.md is out of date"
    )
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    new = rewritten(text)
    if args.check:
        if new != text:
            print("README.md is not what benchmarks/tables.py makes of benchmarks/results", file=sys.stderr)
        return int(new != text)
    if new != text:
        aside = readme.with_suffix(".md.new")
        aside.write_text(new)
        os.replace(aside, readme)
    return 0


if __name__ == "__main__":
    sys.exit(main())
