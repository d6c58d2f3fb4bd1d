"""README's tables are what benchmarks/tables.py makes of the committed measurements."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import tables


def test_readme_is_up_to_date() -> None:
    text = (tables.ROOT / "README.md").read_text()
    assert tables.BLOCK.search(text)
    assert tables.rewritten(text) == text


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Writes a report where tables.py looks."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    machine = {
        "commit": "0123456789abcdef",
        "date": "2026-01-02T03:04:05",
        "command": "python benchmarks/compare.py",
        "versions": {"torch": "2.13.0+cpu"},
    }

    def write(**parts) -> str:
        (tmp_path / "x.json").write_text(json.dumps({"machine": machine, "speed": [], "memory": [], **parts}))
        return "x.json"

    return write


def row(engine: str, ms: float, by: float, status: str = "measured") -> dict:
    case = {"network": "net", "batch": 1, "dtype": "fp32", "engine": engine, "status": status}
    return case | {"median_ms": ms, "fused_is_faster_by": by, "error": 1.24e-6}


def test_peers(report) -> None:
    name = report(
        speed=[row("eager", 250.4, 2.5), row("compile", 0, 0, "unavailable"), row("fused", 99.94, 1.0)]
    )
    text = tables.rewritten(f"a\n<!-- table: peers {name} -->\nold\n<!-- end table -->\nb\n")
    assert "| `net` | 1 | fp32 | 250 ms (2.50x) | - | - | - | - | **99.9 ms** | 1.2e-06 |" in text
    assert "commit 0123456, 2026-01-02, torch 2.13.0" in text
    assert "old" not in text
    assert text.startswith("a\n")
    assert text.endswith("<!-- end table -->\nb\n")
    assert tables.rewritten(text) == text


def test_stock(report) -> None:
    sizes = {"eager": (50.0, 600.0), "eager_cl": (70.0, 590.0), "fused": (3.0, 580.0)}
    key = {"network": "net", "batch": 1, "dtype": "fp32"}
    name = report(
        speed=[row("eager", 250.4, 2.5), row("eager_cl", 300.0, 3.0), row("fused", 100.0, 1.0)],
        memory=[key | {"engine": e, "extra_mib": x, "steady_mib": s} for e, (x, s) in sizes.items()],
    )
    text = tables.stock([name])
    assert "by 2.50x to 2.50x in 1 cases; a pass adds less memory than with either in 1" in text
    assert "| 250 ms | 300 ms | 100 ms | 2.50x | 50 / 70 / 3 MiB | 600 / 590 / 580 MiB |" in text


def test_accuracy(report) -> None:
    rows = [
        {"kernel": [3, 3, 3], "channels": 64, "errors": {"stock": 2e-7, "winograd244": 1e-6}},
        {"kernel": [3, 3, 3], "channels": 128, "errors": {"stock": 2e-7, "winograd244": 3e-6}},
        {"kernel": [7, 7, 7], "channels": 3, "errors": {"stock": 4e-7, "stem4,4": 3.2e-6}},
    ]
    name = report(float32=rows)
    assert "| 3x3x3 | 2.0e-07 | 1.0e-06 to 3.0e-06 |" in tables.accuracy([name])
    assert "Winograd F(2,4,4)" in tables.accuracy([name])
    stems = tables.KINDS["stems"]([name])
    assert "| kernel | stock | stem F(4,4) |" in stems
    assert "3x3x3" not in stems


def test_check_says_when_it_is_out_of_date(tmp_path, monkeypatch, report, capsys) -> None:
    name = report(speed=[row("eager", 250.4, 2.5), row("fused", 99.94, 1.0)])
    readme = tmp_path / "README.md"
    readme.write_text(f"<!-- table: peers {name} -->\n<!-- end table -->\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    assert tables.main() == 1
    assert "README.md is not what" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["tables.py"])
    assert tables.main() == 0
    assert "**99.9 ms**" in readme.read_text()
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    assert tables.main() == 0
    assert [p.name for p in tmp_path.iterdir() if "new" in p.name] == []


def gpu_report(report) -> str:
    def section(name: str, **data) -> dict:
        return {"name": name, "status": "measured", "data": data}

    def engine(ms: float, by: float) -> dict:
        return {
            "median_ms": ms,
            "clips_per_s": 1234.5,
            "error": 5e-3,
            "forward_adds_mib": 7.9,
            "fused_is_faster": by,
        }

    layer = {
        "problem": "n1c8d1h1w1k8f1",
        "stock_us": 30.4,
        "ours_us": 10.2,
        "ours_is_faster": 2.98,
        "cudnn_fused_us": 20.4,
        "tflop_per_s": 99.6,
        "share_of_matmul": 0.123,
    }
    case = {"network": "net", "batch": 8, "dtype": "bf16"}
    stem = {
        "stem": "a",
        "problem": "p",
        "us": {"wgmma stem": 10.0, "sm80": 30.0, "sm80 64x64": 25.0, "stock": 99.0},
    }
    return report(
        sections=[
            section("environment", gpu="NVIDIA X", cuda="13.0", cudnn=91902, driver="580.1"),
            section("one", **case, engines={"stock": engine(4, 2), "fused": engine(2, 1)}),
            section("two", **case, engines={"compile": engine(3, 1.25), "fused": engine(2.4, 1)}),
            section(
                "speed",
                matmul_tflop_per_s=800.0,
                layers=[layer, {**layer, "problem": "other", "cudnn_fused_us": "not measured"}],
            ),
            section("stems", stems=[{**stem, "share_of_matmul": 0.4}]),
            section(
                "g",
                network="net",
                batch=1,
                dtype="bf16",
                graphed_ms={"stock": 3.0, "graphed": 0.5},
                graphed_is_faster=6.0,
                graphed_clips_per_s=2000.0,
            ),
            {"name": "broken", "status": "failed", "reason": "x"},
        ],
        floors=[
            {"what": "speed", "at_least": 1.5, "value": 2.0, "holds": True},
            {"what": "more", "at_least": 9, "value": "not measured", "holds": "not measured"},
        ],
    )


def test_gpu(report) -> None:
    name = gpu_report(report)
    kinds = (
        f"gpu {name}",
        f"gpu_layers {name} n1",
        f"gpu_layers {name} oth",
        f"gpu_stems {name}",
        f"gpu_floors {name}",
    )
    text = tables.rewritten("".join(f"<!-- table: {k} -->\n<!-- end table -->\n" for k in kinds))
    assert text.count("NVIDIA X, CUDA 13.0, cuDNN 9.19.2, driver 580.1.") == 5
    assert (
        "| `net` | 8 | bf16 | 4.00 ms (2.00x) | 3.00 ms (1.25x) | - | **2.00 ms** | 1,234 | 8 / 8 MiB | 5.0e-03 |"
        in text
    )
    assert "| `n1c8d1h1w1k8f1` | 30 us (2.98x) | 20 us (2.00x) | **10 us** | 100 | 12% |" in text
    assert text.count("| `other` | 30 us (2.98x) | - |") == 1
    assert "| a: `p` | 99 us (9.90x) | 25 us (2.50x) | **10 us** | 40% |" in text
    assert (
        "| `net`, as a CUDA graph | 1 | bf16 | 3.00 ms (6.00x) | - | - | **0.50 ms** | 2,000 | - | - |"
        in text
    )
    assert "| speed | 1.5 | 2.0 | yes |" in text
    assert "| more | 9 | not measured | - |" in text
