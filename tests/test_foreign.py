"""The benchmark of other people's models, on models of our own that pass for theirs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from test_fusing import Network
from torch import nn

from r3d_kernels import _extension

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import foreign
import measure
import tables

pytestmark = pytest.mark.skipif(_extension.error is not None, reason="the compiled library is missing")


def missing() -> nn.Module:
    raise ImportError("No module named 'theirs'")


@pytest.fixture
def models(monkeypatch):
    monkeypatch.setattr(
        foreign, "MODELS", {"a network": (Network, (3, 8, 16, 16)), "not here": (missing, (3, 8, 16, 16))}
    )
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_rows_and_table(models, tmp_path, capsys, monkeypatch) -> None:
    path = tmp_path / "foreign.json"
    assert foreign.main(["--rounds", "2", "--threads", "1", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    engines = {row["engine"]: row for row in report["foreign"] if row["status"] == "measured"}
    assert list(engines) == ["stock eager", "stock channels-last", "fused"]
    assert engines["fused"]["convolutions"] == engines["fused"]["fused_convolutions"] == 6
    assert engines["fused"]["fused_is_faster_by"] == 1.0
    assert all(row["error"] < 1e-5 for row in engines.values())
    printed = capsys.readouterr().out
    assert "6 of 6 convolutions fused" in printed
    assert "not here: not measured: No module named 'theirs'" in printed
    monkeypatch.setattr(tables, "load", lambda names: [report])
    monkeypatch.setattr(tables, "sources", lambda reports: "")
    assert "| a network, `1x3x8x16x16` |" in tables.foreign(["foreign.json"])
    assert "6 of 6" in tables.foreign(["foreign.json"])


def test_exit_codes(models, monkeypatch) -> None:
    assert foreign.main(["--models", "not here"]) == 1
    with pytest.raises(SystemExit) as caught:
        foreign.main(["--models", "nobody's"])
    assert caught.value.code == 2
    assert foreign._allowed(1e-7) == foreign._allowed(float("nan")) == 1e-5
    assert foreign._allowed(2e-5) == 4e-5
    monkeypatch.setattr(measure, "relative_error", lambda y, exact: float("nan"))
    assert foreign.main(["--models", "a network", "--rounds", "1", "--threads", "1"]) == 1
