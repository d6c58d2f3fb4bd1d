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
