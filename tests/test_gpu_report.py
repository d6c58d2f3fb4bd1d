"""The GPU report without a GPU: sections, budget, files. And the shared measuring code of the benchmarks."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import gpu_bn_act
import gpu_common
import gpu_floors
import gpu_networks
import gpu_picture
import gpu_report
import gpu_sanitizer
import gpu_sections
import gpu_sm80
import gpu_sm90
import gpu_stem
import gpu_triton
import gpu_triton_layers
import measure
from gpu_sections import Failed, NotHere, Report, Section, progress

from r3d_kernels import _pooled, backends
from r3d_kernels._sm90_stem import WINDOWS


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


def report(clock: Clock, budget: float) -> tuple[Report, list[dict[str, Any]]]:
    """A report, and every version of it that was saved."""
    saved: list[dict[str, Any]] = []
    made = Report(
        budget,
        save=lambda data: saved.append(json.loads(json.dumps(data))),
        clock=clock,
        say=lambda _: None,
        head={"machine": "m"},
    )
    return made, saved


def broken(error: Exception) -> Callable[[], Any]:
    def run() -> Any:
        raise error

    return run


def test_sections_run_in_order_until_the_budget_is_out() -> None:
    clock = Clock()
    made, saved = report(clock, budget=30)
    sections = [
        Section("first", clock.work(10), needs=5),
        Section("second", clock.work(15), needs=5),
        Section("long", clock.work(1), needs=10),
        Section("short", clock.work(2), needs=2),
    ]
    assert made.run(sections)
    assert [s["status"] for s in made.sections] == ["measured", "measured", "not measured", "measured"]
    assert made.sections[2]["reason"] == "needs about 10 s, 5 s of the budget are left"
    assert made.sections[0] == {"name": "first", "status": "measured", "data": {"took": 10}, "seconds": 10}
    assert made.left() == 3
    # One file before the first section, one after each; the first already names them all.
    assert len(saved) == 5
    assert [s["status"] for s in saved[0]["sections"]] == ["not measured"] * 4
    assert [s["status"] for s in saved[1]["sections"]] == ["measured"] + ["not measured"] * 3
    assert saved[-1]["machine"] == "m"


def test_a_broken_section_does_not_lose_the_others() -> None:
    clock = Clock()
    made, saved = report(clock, budget=100)
    good = made.run(
        [
            Section("wrong", broken(Failed("3 cases are wrong", {"rows": [1]}))),
            Section("crash", broken(RuntimeError("first line\nsecond line"))),
            Section("absent", broken(NotHere("no tool"))),
            Section("fine", clock.work(1)),
        ]
    )
    assert not good
    wrong, crash, absent, fine = made.sections
    assert wrong["status"] == crash["status"] == "failed"
    assert wrong["reason"] == "3 cases are wrong"
    assert wrong["data"] == {"rows": [1]}
    assert crash["reason"].startswith("RuntimeError: first line (test_gpu_report.py:")
    assert absent["status"] == "not measured"
    assert absent["reason"] == "no tool"
    assert fine["status"] == "measured"
    assert saved[-1]["sections"] == made.sections


def test_what_is_absent_is_no_failure() -> None:
    made, _ = report(Clock(), budget=100)
    assert made.run([Section("absent", broken(NotHere("no tool")))])


def test_the_budget_ends_a_section_that_hangs() -> None:
    def hang() -> dict[str, Any]:
        try:
            time.sleep(30)
        except Exception:  # as a library may do
            time.sleep(30)
        return {}

    made, saved = report(Clock(), budget=1.0)
    made.budget = 0.05
    begin = time.monotonic()
    assert made.run([Section("hang", hang, needs=0)])
    assert time.monotonic() - begin < 5
    assert saved[-1]["sections"][0]["status"] == "not measured"
    assert saved[-1]["sections"][0]["reason"] == "the budget ended inside"


def test_a_section_may_take_so_much_and_no_more() -> None:
    """The rest of the budget is for the others, and what the section knew by then is kept."""

    def slow() -> dict[str, Any]:
        progress(rows=[1])
        progress(rows=[1, 2], more=True)
        time.sleep(30)
        return {}

    made, saved = report(Clock(), budget=100.0)
    assert made.run([Section("slow", slow, most=0.2), Section("next", lambda: {"x": 1})])
    slow_entry, after = saved[-1]["sections"]
    assert slow_entry["status"] == "not measured"
    assert slow_entry["reason"] == "took longer than its 0 s"
    assert slow_entry["data"] == {"rows": [1, 2], "more": True}
    assert slow_entry["data_is"] == "what was known when it ended"
    assert after["status"] == "measured"


def test_what_a_broken_section_knew_is_kept() -> None:
    def broken_later() -> dict[str, Any]:
        progress(rows=[1])
        raise RuntimeError("no more")

    made, _ = report(Clock(), budget=100.0)
    assert not made.run([Section("a", broken_later), Section("b", broken(NotHere("gone")))])
    assert made.sections[0]["data"] == {"rows": [1]}
    assert "data" not in made.sections[1]
    progress(rows=[3])  # outside of sections: nowhere to go


def test_entries_of_an_earlier_run_are_kept() -> None:
    clock = Clock()
    made, saved = report(clock, budget=100)
    old = {"name": "first", "status": "measured", "data": {"x": 1}, "seconds": 2}
    other = {"name": "not asked for now", "status": "measured", "data": {}}
    made.sections = [old, other]
    made.run([Section("first", broken(RuntimeError("again"))), Section("second", clock.work(1))])
    assert [s["name"] for s in saved[-1]["sections"]] == ["first", "second", "not asked for now"]
    assert saved[-1]["sections"][0] == old
    assert saved[-1]["sections"][1]["status"] == "measured"


# ---- sections in a process of their own ----


def hang_for_good() -> dict[str, Any]:
    """As a thread does that waits for a GPU which never answers: no signal reaches Python."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    child = subprocess.Popen(["sleep", "60"])
    progress(child=child.pid)
    time.sleep(60)
    return {}


def fragile(left: Callable[[], float]) -> list[Section]:
    """What the process under test runs."""
    from r3d_kernels import backends

    def section(name: str, run: Callable[[], Any], kernel: str | None = None, most: float = 600.0) -> Section:
        return Section(name, run, most=most, kernel=kernel)

    return [
        section("fine", lambda: {"pid": os.getpid(), "left": left(), "nan": math.nan}),
        section("fails", broken(Failed("3 cases are wrong", {"rows": [1]}))),
        section("hangs", hang_for_good, "wgmma", most=1.0),
        section("dies", lambda: os.kill(os.getpid(), signal.SIGKILL), "sm80"),
        section("of wgmma", lambda: {}, "wgmma"),
        section("kernels", lambda: {"names": [k.name for k in backends.KERNELS], "pid": os.getpid()}),
    ]


def start_is_broken(left: Callable[[], float]) -> list[Section]:
    raise RuntimeError("no sections today")


def alive(pid: int) -> bool:
    """Whether it still is after a while: a killed process takes a moment to end."""
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return False
        except OSError:
            return False
        time.sleep(0.05)
    return True


def test_a_process_that_hangs_or_dies_costs_one_section() -> None:
    worker = gpu_sections.Worker(fragile, grace=1.0, start=600.0)
    made, saved = report(Clock(), budget=1000.0)
    made.execute = worker
    try:
        assert not made.run(fragile(lambda: 0.0))
    finally:
        worker.stop()
    fine, fails, hangs, dies, of_wgmma, kernels = saved[-1]["sections"]
    assert fine["status"] == "measured"
    assert fine["data"]["pid"] != os.getpid()
    assert 0 < fine["data"]["left"] <= 600
    assert fine["data"]["nan"] == "nan"
    assert fails == {**fails, "status": "failed", "reason": "3 cases are wrong", "data": {"rows": [1]}}
    assert hangs["status"] == "failed"
    assert hangs["reason"] == "no answer within 2 s: its process was killed"
    assert not alive(hangs["data"]["child"])  # what it has started ends with it
    assert not alive(fine["data"]["pid"])
    assert dies["status"] == "failed"
    assert dies["reason"] == "its process ended with exit code -9"
    assert of_wgmma["status"] == "not measured"
    assert of_wgmma["reason"] == "wgmma is left out: it broke 'hangs'"
    names = kernels["data"]["names"]
    assert "stock" in names
    assert not any(name == "wgmma" or name.startswith("sm80") for name in names)
    assert not alive(kernels["data"]["pid"])
    assert worker.starts == 3


def test_a_lost_gpu_ends_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the worker does when told that every later call would fail too."""
    worker = gpu_sections.Worker(fragile)

    class Pipe:
        def send(self, message: str) -> None:
            pass

        def poll(self, seconds: float) -> bool:
            return True

        def recv(self) -> str:
            return json.dumps(
                {"entry": {"status": "failed", "reason": "an illegal memory access"}, "broken": True}
            )

        def close(self) -> None:
            pass

    class Process:
        pid = 0

        def is_alive(self) -> bool:
            return False

        def join(self, seconds: float) -> None:
            pass

    worker._process, worker._pipe = Process(), Pipe()
    entry = worker(Section("s", dict, kernel="sm80"), 10.0)
    assert entry["reason"] == "an illegal memory access; the GPU was lost to its process, which was ended"
    assert worker.without == {"sm80": "s"}
    assert worker._process is None

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", broken(RuntimeError("an illegal memory access")))
    assert gpu_sections._broken()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert not gpu_sections._broken()


def test_a_process_that_does_not_start_is_told() -> None:
    worker = gpu_sections.Worker(start_is_broken, start=600.0)
    entry = worker(Section("a", dict), 10.0)
    assert entry["status"] == "failed"
    assert "ended at its start, exit code 1" in entry["reason"]
    assert worker._process is None


def test_plan() -> None:
    sections = gpu_report.plan(lambda: 0.0)
    names = [s.name for s in sections]
    assert len(set(names)) == len(names)
    assert names[0] == "environment"
    # What decides whether the numbers mean anything comes before the numbers, im2col's corners first of all.
    assert names[1] == "conv3d_sm90 against float64"
    assert names.index("bn_act against float64") < names.index("bn_act speed")
    assert names.index("sm80 convolution against float64") < names.index("sm80 layers, batch 8")
    assert sum("compile" in name for name in names) == 6
    assert sum("max-autotune" in name for name in names) == 3
    for network in ("r3d_18", "hara_r3d_18", "hara_r3d_50"):
        for dtype in ("bf16", "fp32"):
            for batch in (1, 8, 32):
                assert f"{network} {dtype} batch {batch}: stock, fused" in names
    # Sections about one kernel name it, so that a kernel which breaks the GPU is left out behind them.
    for section in sections:
        if "sm90" in section.name:
            assert section.kernel == "wgmma"
        assert section.needs <= section.most
    # In ten minutes there is time for all that has a floor, even if every section before takes its most.
    floors = {name for floor in gpu_floors.FLOORS for name in floor.sections}
    ours = [s for s in sections if s.name in floors and "Triton" not in s.name and "autotune" not in s.name]
    checks = [s for s in sections[: max(map(sections.index, ours)) + 1] if s not in ours]
    assert sum(s.needs for s in ours) + sum(s.needs for s in checks) < 300


def test_the_sections_can_be_listed(capsys: pytest.CaptureFixture) -> None:
    assert gpu_report.main(["--list"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert names == [s.name for s in gpu_report.plan(lambda: 0.0)]
    assert gpu_report.main(["--list", "--only", "sm90.*batch 32"]) == 0
    chosen = capsys.readouterr().out.splitlines()
    assert chosen == ["environment", *(n for n in names if "sm90" in n and "batch 32" in n)]
    with pytest.raises(SystemExit) as caught:
        gpu_report.main(["--only", "("])
    assert caught.value.code == 2


def test_no_device(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_report.main(["--out", str(tmp_path / "out")]) == 3
    assert not (tmp_path / "out").exists()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "no CUDA device" in captured.err


class Here:
    """In the place of the worker: sections run in this process."""

    def __init__(self, plan: Any) -> None:
        self.without: dict[str, str] = {}
        self.stopped = False

    def __call__(self, section: Section, seconds: float) -> dict[str, Any]:
        return gpu_sections.run_here(section, seconds)

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(gpu_report, "Worker", Here)
    monkeypatch.setattr(gpu_report, "nvidia_smi", lambda fields: "NVIDIA H200")


def test_main_writes_the_file(in_this_process: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sections = [Section("a", lambda: {"x": math.nan}), Section("b", broken(Failed("no")))]
    monkeypatch.setattr(gpu_report, "plan", lambda left: sections)
    assert gpu_report.main(["--out", str(tmp_path), "--budget", "20"]) == 1
    data = json.loads((tmp_path / "gpu_report.json").read_text())
    assert [s["status"] for s in data["sections"]] == ["measured", "failed"]
    assert data["sections"][0]["data"] == {"x": "nan"}
    assert data["machine"]["versions"]["torch"]
    assert data["kernels_left_out"] == {}
    assert [row["holds"] for row in data["floors"]] == ["not measured"] * len(gpu_floors.FLOORS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpu_report.json", "gpu_report.png"]


def test_a_picture_that_fails_loses_nothing(
    in_this_process: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(gpu_report, "plan", lambda left: [Section("a", lambda: {"x": 1})])
    monkeypatch.setattr(gpu_report, "draw", lambda *_: broken(ValueError("no fonts"))())
    assert gpu_report.main(["--out", str(tmp_path), "--budget", "20"]) == 0
    assert "no picture: ValueError: no fonts" in capsys.readouterr().err
    assert json.loads((tmp_path / "gpu_report.json").read_text())["sections"][0]["status"] == "measured"


def test_who_ends_the_report_gets_what_it_has(
    in_this_process: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sections = [
        Section("a", lambda: {"x": 1}),
        Section("b", lambda: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(60)),
        Section("c", lambda: {"x": 2}),
    ]
    monkeypatch.setattr(gpu_report, "plan", lambda left: sections)
    before = signal.getsignal(signal.SIGTERM)
    assert gpu_report.main(["--out", str(tmp_path), "--budget", "20"]) == 1
    assert signal.getsignal(signal.SIGTERM) == before
    captured = capsys.readouterr()
    assert "ended from outside" in captured.err
    assert "floor: r3d_18 bf16" in captured.out
    data = json.loads((tmp_path / "gpu_report.json").read_text())
    assert [s["status"] for s in data["sections"]] == ["measured", "not measured", "not measured"]
    assert (tmp_path / "gpu_report.png").exists()


def test_the_clocks_are_those_of_torchs_first_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def run(command: list[str], **_: Any) -> Any:
        asked.append(command[-1])
        return subprocess.CompletedProcess(command, 0, stdout="1980 MHz\n")

    monkeypatch.setattr(subprocess, "run", run)
    for visible in (None, "", "3", "GPU-8f2a,GPU-77b1"):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert gpu_report.nvidia_smi("clocks.sm") == "1980 MHz"
    assert asked == ["0", "0", "3", "GPU-8f2a"]


def test_a_run_goes_on_where_another_ended(
    in_this_process: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[str] = []

    def section(name: str, data: dict[str, Any] | None = None) -> Section:
        return Section(name, lambda: calls.append(name) or data or {"x": 1})

    monkeypatch.setattr(measure, "machine", lambda: {"commit": "c0ffee"})
    sections = [section("environment", {"gpu": "NVIDIA H200"}), section("a"), section("b")]
    monkeypatch.setattr(gpu_report, "plan", lambda left: sections)
    arguments = ["--out", str(tmp_path), "--budget", "20"]
    assert gpu_report.main([*arguments, "--only", "a"]) == 0
    assert calls == ["environment", "a"]
    assert gpu_report.main([*arguments, "--resume"]) == 0
    assert calls == ["environment", "a", "b"]
    data = json.loads((tmp_path / "gpu_report.json").read_text())
    assert [s["name"] for s in data["sections"]] == ["environment", "a", "b"]
    monkeypatch.setattr(measure, "machine", lambda: {"commit": "decaf"})  # other code: nothing is kept
    assert gpu_report.main([*arguments, "--resume"]) == 0
    assert calls[3:] == ["environment", "a", "b"]
    monkeypatch.setattr(gpu_report, "nvidia_smi", lambda fields: "NVIDIA A100")  # another GPU: neither
    assert gpu_report.main([*arguments, "--resume"]) == 0
    assert calls[6:] == ["environment", "a", "b"]
    (tmp_path / "gpu_report.json").write_text("{")
    assert gpu_report.earlier(tmp_path / "gpu_report.json", "NVIDIA A100", "decaf") == []


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    engine = {"fused_is_faster": 1.5}
    network = {
        "network": "r3d_18",
        "dtype": "bf16",
        "batch": 8,
        "engines": {"stock": engine, "fused": {"fused_is_faster": 1.0}},
    }
    row = {"dtype": "bfloat16", "shape": [8, 64, 16, 56, 56], "share_of_copy": 0.9}
    sections = [
        {"status": "measured", "data": {"gpu": "a GPU"}},
        {"status": "failed", "reason": "no data"},
        {"status": "measured", "data": {"copy_gbyte_per_s": 1.0, "rows": [row]}},
        {"status": "measured", "data": network},
    ]
    gpu_picture.draw(tmp_path / "a.png", {"sections": sections})
    assert (tmp_path / "a.png").stat().st_size > 1000
    layer = {"layer": "layer1.0.conv1", "share_of_matmul": 0.6}
    layers = {"network": "r3d_18", "batch": 32, "matmul_tflop_per_s": 700.0, "layers": [layer]}
    sections.append({"status": "not measured", "data": layers, "data_is": "what was known when it ended"})
    assert [bar[:2] for bar in gpu_picture._layer_bars([layers, network])] == [
        ("r3d_18 b32 layer1.0.conv1", 0.6)
    ]
    gpu_picture.draw(tmp_path / "b.png", {"sections": sections})
    assert (tmp_path / "b.png").stat().st_size > (tmp_path / "a.png").stat().st_size
    # A number that could not be measured is text in JSON, and no bar.
    row["share_of_copy"] = "nan"
    assert gpu_picture._copy_bars([{"copy_gbyte_per_s": 1.0, "rows": [row]}]) == []
    # Where nothing was measured, the picture tells what became of the sections.
    nothing = [{"name": "environment", "status": "failed", "reason": "no data"}]
    gpu_picture.draw(tmp_path / "c.png", {"sections": nothing})
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_floors() -> None:
    """Evaluated from what was measured; what was not measured neither holds nor fails."""
    nothing = gpu_floors.floors([])
    assert (
        [row["holds"] for row in nothing]
        == [row["value"] for row in nothing]
        == ["not measured"] * len(nothing)
    )
    assert [row["at_least"] for row in nothing] == [1.6, 1.25, 0.60, 0.45, 3.0, 6000, 20000, 1.25, 0.8]

    eager, speed = "r3d_18 bf16 batch 32: stock, fused", "conv3d_sm90 speed, r3d_18 batch 32"
    data: dict[str, dict[str, Any]] = {
        eager: {"engines": {"stock": {"fused_is_faster": 1.7}, "fused": {"clips_per_s": 5500.0}}},
        f"{eager}, compile": {"faster_than_best_compile": 1.4},
        speed: {"least_share_wide": 0.61, "least_share_64": 0.44},
        "Triton: r3d_18 bf16 batch 32": {"triton_is_faster": 1.2},
        "Triton: training norm": {"share_of_copy": None},
    }
    entries = [{"name": n, "status": "measured", "data": v} for n, v in data.items()]
    holds = [row["holds"] for row in gpu_floors.floors(entries)]
    # The best of two compilers is not known before both are measured.
    unknown = "not measured"
    assert holds == [True, unknown, True, False, unknown, False, unknown, False, unknown]
    entries.append(
        {"name": f"{eager}, max-autotune", "status": "measured", "data": {"faster_than_best_compile": 1.2}}
    )
    assert gpu_floors.floors(entries)[1]["value"] == 1.2
    # A number that is none is text in JSON.
    entries[2]["data"] = {"least_share_wide": "nan", "least_share_64": 0.5}
    assert [row["holds"] for row in gpu_floors.floors(entries)[2:4]] == [unknown, True]
    entries[2]["data"] = {"least_share_wide": 0.61, "least_share_64": 0.44}
    # What a section knew before it was ended is no measurement.
    entries[0]["status"] = "not measured"
    assert gpu_floors.floors(entries)[0]["holds"] == "not measured"

    environment = {"name": "environment", "status": "measured", "data": {"gpu": "NVIDIA H100"}}
    row = gpu_floors.floors([environment, *entries])[3]
    assert "does not hold, on NVIDIA H100 and not on the H200" in gpu_floors.verdict(row)
    environment["data"]["gpu"] = "NVIDIA H200"
    row = gpu_floors.floors([environment, *entries])[3]
    assert gpu_floors.verdict(row) == "does not hold"
    assert gpu_floors.verdict(gpu_floors.floors([])[0]) == "not measured"


def test_floors_are_of_sections_that_the_plan_has() -> None:
    names = [s.name for s in gpu_report.plan(lambda: 0.0)]
    assert all(name in names for floor in gpu_floors.FLOORS for name in floor.sections)


def test_floors_stand_in_the_file_and_on_the_screen(
    in_this_process: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    floor = gpu_floors.FLOORS[-2]
    sections = [
        Section("environment", lambda: {"gpu": "NVIDIA H200"}),
        Section(floor.sections[0], lambda: {floor.value: 1.5}),
    ]
    monkeypatch.setattr(gpu_report, "plan", lambda left: sections)
    assert gpu_report.main(["--out", str(tmp_path), "--budget", "20"]) == 0
    data = json.loads((tmp_path / "gpu_report.json").read_text())
    assert [row["holds"] for row in data["floors"]][-2:] == [True, "not measured"]
    said = capsys.readouterr().out
    assert "1.5, at least 1.25: holds" in said
    assert "not measured, at least 0.8: not measured" in said


def test_commands_under_a_sanitizer_are_ended_with_their_children(tmp_path: Path) -> None:
    assert gpu_sanitizer._sanitized([sys.executable, "-c", "pass"], 600.0) == "clean"
    assert gpu_sanitizer._sanitized([sys.executable, "-c", "pass"], 0.5) == "not measured: no time was left"
    pid = tmp_path / "pid"
    said = gpu_sanitizer._sanitized(["sh", "-c", f"sleep 600 & echo $! > {pid}; sleep 600"], 3.0)
    assert said == "not measured: took longer than 3 s"
    assert not alive(int(pid.read_text()))
    lines = ("========= Invalid __global__ read", "noise", "========= ERROR SUMMARY: 1 error")
    bad = "; ".join(f"print('{line}')" for line in lines) + "; exit(9)"
    said = gpu_sanitizer._sanitized([sys.executable, "-c", bad], 600.0)
    assert said == "exit code 9: Invalid __global__ read ERROR SUMMARY: 1 error ERROR SUMMARY: 1 error"
    seen = "import os; exit(os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING'] != '1')"
    assert gpu_sanitizer._sanitized([sys.executable, "-c", seen], 600.0) == "clean"


def test_every_sanitizer_check_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter(["clean", "exit code 9: Race", "not measured: took longer than 9 s"])
    seconds: list[float] = []
    monkeypatch.setattr(gpu_sanitizer, "require_op", lambda: None)
    monkeypatch.setattr(gpu_sanitizer, "sanitizer_path", lambda: "compute-sanitizer")
    commands: list[list[str]] = []

    def sanitized(command: list[str], s: float) -> str:
        seconds.append(s)
        commands.append(command)
        return next(said)

    monkeypatch.setattr(gpu_sanitizer, "_sanitized", sanitized)
    with pytest.raises(Failed, match="racecheck: exit code 9: Race") as caught:
        gpu_sanitizer.sanitize(lambda: 93.0)
    assert caught.value.data["memcheck"] == "clean"
    assert caught.value.data["synccheck"].startswith("not measured")
    assert seconds == [30.0, 45.0, 90.0]  # a third of what is left, a half, all
    assert [c[1] for c in commands] == ["--tool=memcheck", "--tool=racecheck", "--tool=synccheck"]
    for command in commands:  # errors that libraries ask for are none of a kernel's
        assert command[0] == "compute-sanitizer"
        assert {"--error-exitcode=9", "--report-api-errors=no", "--kernel-name=kns=r3d"} <= set(command)
        assert command[command.index(sys.executable) + 2 :] == ["--sanitizer-child"]


def test_the_norms_share_is_that_of_tensors_beyond_the_cache() -> None:
    def row(dtype: torch.dtype, seconds: float, size: int) -> dict[str, Any]:
        return gpu_triton.norm_row((1,), dtype, {"ours": seconds}, size, 1000.0, 50_000_000)

    large = [row(torch.bfloat16, 1.5e-3, 100_000_000), row(torch.bfloat16, 1.6e-3, 100_000_000)]
    assert [r["share_of_copy"] for r in large] == [0.8, 0.75]  # twelve tensors over the time, of 1000 GB/s
    small, wide = row(torch.bfloat16, 1.0, 10_000_000), row(torch.float32, 1.0, 100_000_000)
    assert gpu_triton.norm_share([small, *large, wide]) == 0.75
    assert gpu_triton.norm_share([small, wide]) is None


def test_inductors_template_is_not_taken_for_granted() -> None:
    """On a CPU inductor has none: it says so, and nothing else is measured under its name."""
    x, weight = torch.randn(1, 4, 3, 5, 5), torch.randn(4, 4, 3, 3, 3)
    with pytest.raises(NotHere, match=r"choice|template"), torch.no_grad():
        gpu_triton_layers.inductor_template(lambda x, w: torch.nn.functional.conv3d(x, w).relu(), (x, weight))


def test_inductor_may_choose_among_its_templates_only(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor
    import torch._inductor.utils as utils

    seen: list[tuple[Any, ...]] = []
    sources = ["async_compile.triton('triton_tem_fused_convolution_relu_0', ...)"]

    def compiled(call: Any, *operands: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
        seen.append((inductor.max_autotune, inductor.max_autotune_conv_backends))
        return call(*operands), sources

    monkeypatch.setattr(utils, "run_and_get_code", compiled)
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    before = inductor.max_autotune_conv_backends
    assert gpu_triton_layers.inductor_template(torch.relu, (torch.ones(2),))(torch.ones(1)) == 1
    assert seen == [(True, "TRITON")]
    assert inductor.max_autotune_conv_backends == before
    sources[:] = ["extern_kernels.convolution(...)"]
    with pytest.raises(NotHere, match="another way"):
        gpu_triton_layers.inductor_template(torch.relu, (torch.ones(2),))


def test_checks_on_the_cpu_twin() -> None:
    """The checks themselves, on the operation's CPU kernel."""
    data = gpu_bn_act.check_bn_act(device="cpu")
    assert data["cases"] == 2 * len(gpu_bn_act.CHANNELS) * 4
    assert data["largest_error"]["float32"] < gpu_common.FP32_PROMISE
    assert gpu_bn_act.check_repetitions(3, device="cpu") == {"repetitions": 3}


def test_a_wrong_result_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_bn_act, "require_op", lambda: None)
    monkeypatch.setattr(gpu_bn_act, "CHANNELS", (3,))
    monkeypatch.setattr(gpu_bn_act.Epilogue, "ours", lambda e: e.stock() * (1.0 if e.x.numel() % 2 else 1.01))
    with pytest.raises(Failed, match="cases are wrong") as caught:
        gpu_bn_act.check_bn_act(device="cpu")
    assert len(caught.value.data["rows"]) == 8
    monkeypatch.setattr(gpu_bn_act.Epilogue, "ours", lambda e: e.stock() + math.nan)
    with pytest.raises(Failed, match="8 of 8 cases are wrong"):
        gpu_bn_act.check_bn_act(device="cpu")


# ---- gpu_sm80.py ----


def test_devices_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert gpu_networks.check_second_device(("cpu", "cpu"), graphs=False)["errors"] == [0.0, 0.0]
    answers = iter([1.0, 1.0, 1.3])
    monkeypatch.setattr(measure, "relative_error", lambda *_: next(answers))
    with pytest.raises(Failed, match="the answers of cpu, cpu differ"):
        gpu_networks.check_second_device(("cpu", "cpu"), graphs=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(NotHere, match="needs 2 GPUs, found 1"):
        gpu_networks.check_second_device()


def test_the_sm80_checks_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks themselves, with a CPU kernel in the place of the CUDA one."""
    small = [g for g in gpu_sm80.GEOMETRIES if "c512" not in g]
    monkeypatch.setattr(gpu_sm80, "GEOMETRIES", (*small[:9], small[0]))
    monkeypatch.setattr(gpu_sm80, "DTYPES", (torch.float32, torch.bfloat16))
    assert gpu_sm80.check_conv3d(device="cpu", kernel="direct")["cases"] == 20
    assert gpu_sm80.check_repetitions(2, device="cpu", kernel="direct") == {"repetitions": 2}
    assert gpu_sm80.check_pool_and_head(device="cpu") == {"cases": 24}
    assert gpu_sm80.check_clips(device="cpu")["worst"] < 1e-5
    with pytest.raises(NotHere, match="sm80: needs a CUDA tensor, got cpu"):
        gpu_sm80.check_conv3d(device="cpu")


def test_the_sm80_checks_find_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_sm80, "GEOMETRIES", gpu_sm80.GEOMETRIES[:1])
    real = gpu_sm80.Problem.call

    def swapped(problem: gpu_sm80.Problem, name: str) -> Callable[[], torch.Tensor]:
        y = real(problem, "stock")()
        return lambda: y * 1.05 if name == "direct" else y

    monkeypatch.setattr(gpu_sm80.Problem, "call", swapped)
    with pytest.raises(Failed, match="3 of 3 cases are wrong"):
        gpu_sm80.check_conv3d(device="cpu", kernel="direct")


def test_the_sm80_kernel_on_paper() -> None:
    if not hasattr(torch.ops.r3d_kernels, "conv3d_sm80_choice"):
        pytest.skip("built without nvcc")
    for batch in (1, 32):
        rows = gpu_sm80.on_paper("r3d_18", batch, 108)
        assert len(rows) > 5
        assert all(0 < row["share"] < 1 for row in rows)
        total = sum(row["gflop"] for row in rows)
        assert max(row["gflop"] for row in rows) > total / len(rows)
    assert max(row["share"] for row in rows) > 0.8


# ---- measure.py ----


def test_interleave() -> None:
    clock = Clock()
    calls: list[str] = []

    def engine(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            calls.append(name)
            clock.now += seconds

        return run

    engines = {"quick": engine("q", 0.125), "slow": engine("s", 1.0)}
    times = measure.interleave(engines, rounds=4, clock=clock)
    # Two untimed calls each; then each round has an untimed and a timed quick one, and one slow one.
    assert "".join(calls) == "qqss" + "qqs" + "sqq" + "qqs" + "sqq"
    assert times["quick"].seconds == [0.125] * 4
    assert times["slow"].summary() == {
        "median_ms": 1000.0,
        "min_ms": 1000.0,
        "p25_ms": 1000.0,
        "p75_ms": 1000.0,
        "rounds": 4,
    }
    assert len(measure.interleave(engines, rounds=100, seconds=1.0, clock=clock)["slow"].seconds) == 3
    calls.clear()
    measure.interleave(engines, rounds=2, clock=clock, between=lambda: calls.append("."))
    assert "".join(calls) == "qqss" + ".q.s" + ".s.q"


def test_write_json_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "a.json"
    measure.write_json(path, {"a": [1.5, math.inf, None], 2: (True,)})
    assert json.loads(path.read_text()) == {"a": [1.5, "inf", None], "2": [True]}
    with pytest.raises(TypeError):
        measure.write_json(path, {"a": object()})
    assert json.loads(path.read_text())["2"] == [True]
    assert list(path.parent.iterdir()) == [path]


def test_calibrate() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv3d(1, 8, (3, 15, 15), stride=(4, 16, 16)), torch.nn.BatchNorm3d(8), torch.nn.ReLU()
    )
    norm = measure.calibrate(model)[1]
    assert not model.training
    assert norm.momentum == 0.1
    assert norm.running_mean.abs().max() > 0
    assert norm.weight.std() > 0.1
    assert 0.3 < model[:2](measure.clip(1, seed=5, channels=1)).std() < 3


def test_memory_of_a_forward() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc/self/clear_refs here")
    size = 64 * 2**20
    found = measure.forward_memory(lambda: torch.ones(size, dtype=torch.uint8).max(), repetitions=3)
    assert 60 < found["extra_mib"] < 120
    assert found["steady_mib"] <= found["lifetime_mib"]
    nothing = measure.forward_memory(lambda: None, repetitions=3)
    assert nothing["extra_mib"] < 20


def test_machine() -> None:
    about = measure.machine()
    assert about["threads"] == torch.get_num_threads()
    assert about["versions"]["torch"]
    json.dumps(about)


# ---- the Hopper convolution's sections ----


def sm90_by_stock(wrong: float = 0.0) -> Callable[..., torch.Tensor]:
    """The kernel's answer, computed in float64 and rounded once."""

    def ours(w: gpu_sm90.Work, tiles: int = -1, split: int = 0) -> torch.Tensor:
        return (w.exact[0] * (1 + wrong)).to(w.x.dtype)

    return ours


def test_the_hopper_cases_and_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_sm90.Work, "ours", sm90_by_stock())
    monkeypatch.setattr(gpu_sm90, "CORNERS", gpu_sm90.CORNERS[:6])
    rows = gpu_sm90.check(device="cpu")
    assert all(row["worst"] <= 1 for row in rows)
    tiles = {"x".join(map(str, t)) for t in gpu_sm90.TILES}
    noted: list[int] = []
    monkeypatch.setattr(gpu_sm90, "EVERY_TILE", ())
    gpu_sm90.check(device="cpu", note=lambda rows: noted.append(len(rows)))
    assert noted == list(range(1, 13))
    assert {row["tile"] for row in rows} == {"chosen", "chosen, copied"} | tiles
    # Corners with three different paddings come first.
    assert len(set(gpu_sm90.ConvProblem.parse(rows[0]["problem"]).padding)) == 3
    assert set(gpu_sm90.different_bits(2, device="cpu").values()) == {0}

    monkeypatch.setattr(gpu_sm90, "require_sm90", lambda: None)
    monkeypatch.setattr(gpu_sm90, "check", lambda note: rows)
    assert gpu_sm90.check_sm90()["runs"] == len(rows)
    monkeypatch.setattr(gpu_sm90, "check", lambda note: [*rows, {**rows[0], "worst": math.nan}])
    with pytest.raises(Failed, match="1 of"):
        gpu_sm90.check_sm90()


def test_a_wrong_hopper_result_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_sm90, "EVERY_TILE", ())
    monkeypatch.setattr(gpu_sm90, "CORNERS", gpu_sm90.CORNERS[:6])
    monkeypatch.setattr(gpu_sm90.Work, "ours", sm90_by_stock(wrong=0.02))
    assert all(row["worst"] > 1 for row in gpu_sm90.check(device="cpu"))


def test_the_stock_twin_of_a_hopper_case_is_the_same_layer() -> None:
    p = gpu_sm90.ConvProblem.parse("n2c24d4h5w6k24f1x3x5p0x2x1+res+relu")
    w = gpu_sm90.work(p, torch.float32, device="cpu")
    assert measure.relative_error(w.stock(), w.exact[0]) < 1e-5
    w = gpu_sm90.work(gpu_sm90.ConvProblem.parse("n2c13d4h5w6k11f3p1+res"), torch.float32, device="cpu")
    dense = w.dense()
    assert (w.x.stride(4), dense.x.stride(4), dense.residual.stride(4)) == (16, 13, 11)
    assert torch.equal(w.stock(), dense.stock())


def test_a_hopper_run_that_raises_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    right = sm90_by_stock()

    def ours(w: gpu_sm90.Work, tiles: int = -1, split: int = 0) -> torch.Tensor:
        if w.problem.padding == (0, 1, 2):
            raise RuntimeError("cuTensorMapEncodeIm2col refuses (x [1, 8]\nmore")
        return right(w, tiles, split)

    monkeypatch.setattr(gpu_sm90, "EVERY_TILE", ())
    monkeypatch.setattr(gpu_sm90, "CORNERS", gpu_sm90.CORNERS[:2])
    monkeypatch.setattr(gpu_sm90.Work, "ours", ours)
    rows = gpu_sm90.check(device="cpu")
    assert [row["worst"] <= 1 for row in rows] == [False, False, True, True]
    assert rows[0]["error"] == "cuTensorMapEncodeIm2col refuses (x [1, 8]"


def test_hopper_speed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, noted = [], []

    class Work(gpu_sm90.Work):
        def cudnn_fused(self) -> torch.Tensor:
            if self.problem.residual:
                raise RuntimeError("GET was unable to find an engine\nmore")
            return torch.empty(0)

        def ours(self, tiles: int = -1, split: int = 0) -> torch.Tensor:
            assert tiles == 0b101
            return torch.empty(0)

    def seconds(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
        calls["ours"]()
        return {name: times[name] for name in calls}

    monkeypatch.setattr(gpu_sm90, "work", lambda p, dtype, device: seen.append(p) or Work(p, *[None] * 5))
    times = {"ours": 1e-3, "stock": 2e-3, "cudnn_fused": 1.5e-3}
    rows = gpu_sm90.speed(
        seconds, 500.0, "r3d_18", 2, note=lambda r: noted.append(len(r)), usable=lambda padded: 0b101
    )
    assert len(rows) == len(seen) == 14  # all but the stem
    assert noted == list(range(1, 15))
    row = next(r for r in rows if r["layer"] == "layer1.0.conv1.0")
    assert row["tflop_per_s"] == round(2 * 11.098e9 / 1e-3 / 1e12, 1)
    assert row["share_of_matmul"] == pytest.approx(22.2 / 500, abs=1e-3)
    assert row["ours_is_faster"] == 2.0
    assert row["cudnn_fused_us"] == 1500.0
    assert row["predicted"]["tile"] == "480x64x3"
    assert 0 < row["predicted"]["us"] < 1000
    residual = next(r for r in rows if r["layer"] == "layer1.0.conv2.0")
    assert residual["cudnn_fused_us"] == "not measured"
    assert residual["cudnn_fused_reason"] == "GET was unable to find an engine"

    # What the floors are about: every 3x3x3 layer, the strided and the small ones too.
    assert gpu_sm90.shares(rows)["least_share_64_layer"] == "layer2.0.conv1.0"
    for r in rows:
        r["share_of_matmul"] = 0.9
    next(r for r in rows if r["layer"] == "layer4.1.conv1.0")["share_of_matmul"] = 0.5
    next(r for r in rows if r["layer"] == "layer2.0.downsample.0")["share_of_matmul"] = 0.1  # 1x1x1
    found = gpu_sm90.shares(rows)
    assert (found["least_share_wide"], found["least_share_wide_layer"]) == (0.5, "layer4.1.conv1.0")
    assert found["least_share_64"] == 0.9
    assert gpu_sm90.shares([]) == {}


def test_cudnns_fused_convolution_gets_the_same_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def conv(
        x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int
    ) -> torch.Tensor:
        return torch.nn.functional.conv3d(x, weight, bias, stride, padding, dilation, groups)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", lambda *a: conv(*a).relu())
    monkeypatch.setattr(
        torch, "cudnn_convolution_add_relu", lambda x, w, z, alpha, *a: (conv(x, w, *a) + alpha * z).relu()
    )
    for text in ("n2c24d4h5w6k24f1x3x5p0x2x1+relu", "n1c13d4h5w6k11f3p1x0x2s2x1x2+res+relu"):
        w = gpu_sm90.work(gpu_sm90.ConvProblem.parse(text), torch.float32, device="cpu")
        assert measure.relative_error(w.cudnn_fused(), w.exact[0]) < 1e-5
    with pytest.raises(RuntimeError, match="ReLU only"):
        gpu_sm90.work(
            gpu_sm90.ConvProblem.parse("n1c8d3h5w6k8f3p1"), torch.float32, device="cpu"
        ).cudnn_fused()


def test_hopper_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    class Work(gpu_sm90.Work):
        def ours(self, tiles: int = -1, split: int = 0) -> torch.Tensor:
            asked.append((tiles, split))
            return torch.empty(0)

    monkeypatch.setattr(gpu_sm90, "work", lambda p, dtype, device: Work(p, *[None] * 5))

    def seconds(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
        for call in calls.values():
            call()
        return {name: 1e-3 if name == "128x128x1" else 2e-3 for name in calls}

    rows = gpu_sm90.tiles(seconds, "r3d_18", 8)
    assert len(rows) == 14
    for row in rows:
        assert set(row["us"]) == set(row["split"]) == set(row["predicted_us"])
        assert row["chosen"] in row["us"]
        assert row["best"] == "128x128x1"
        # the rule takes the least prediction
        assert row["predicted_us"][row["chosen"]] == min(row["predicted_us"].values())
    assert all(tiles & (tiles - 1) == 0 and split >= 1 for tiles, split in asked)


def test_fused_networks_do_not_wait_for_triton() -> None:
    from r3d_kernels import backends

    before = list(backends.KERNELS)
    with gpu_networks.quick_choice():
        assert {k.backend for k in before} - {k.backend for k in backends.KERNELS} == {"triton"}
    assert before == backends.KERNELS
    assert gpu_networks.quick(lambda a, b: {"sum": a + b})(1, b=2) == {"sum": 3}


def test_hopper_sections_where_there_is_no_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_sm90, "require_op", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(NotHere, match=r"9\.0"):
        gpu_sm90.check_sm90()
    with pytest.raises(NotHere, match=r"9\.0"):
        gpu_sm90.sm90_tiles("r3d_18", 8)
    names = [s.name for s in gpu_report.plan(lambda: 0.0)]
    assert names.index("conv3d_sm90 against float64") < names.index("conv3d_sm90 speed, r3d_18 batch 32")


# ---- the Hopper stem ----


def stem_by_stock(
    stem: gpu_stem.Stem, kind: int, frames: int, wrong: float = 0.0, pools: float = 0.0
) -> torch.Tensor:
    """The op's answer, by torch in float64."""
    y = (stem.exact()[0] * (1 + wrong)).to(stem.dtype)
    return F.max_pool3d(y.float(), *WINDOWS[frames]).to(y.dtype) + pools if frames else y


def test_the_stems_check(monkeypatch):
    monkeypatch.setattr(gpu_stem, "PROBLEMS", gpu_stem.PROBLEMS[2:5])
    rows = gpu_stem.check("cpu", stem_by_stock)
    assert len(rows) == 3 * 2 * 2 * 4
    assert all(row["worst"] <= 1 for row in rows)
    assert {row["clip"] for row in rows} == {True, False}
    for wrong, pools in ((0.01, 0.0), (0.0, 1.0)):
        rows = gpu_stem.check(
            "cpu",
            lambda s, kind, n, w=wrong, p=pools: stem_by_stock(s, kind, n, w * (kind == 1), p * (kind == 1)),
        )
        assert {row["kind"] for row in rows if not row["worst"] <= 1} == {1}
    monkeypatch.setattr(gpu_stem, "require_sm90", lambda: None)
    monkeypatch.setattr(gpu_stem, "check", lambda: rows)
    with pytest.raises(Failed, match="runs are wrong, first"):
        gpu_stem.check_stem()


def test_the_stems_speed(monkeypatch):
    monkeypatch.setattr(gpu_stem, "require_sm90", lambda: None)
    monkeypatch.setattr(gpu_stem, "roofline", lambda: {"matmul_tflop_per_s": {"bfloat16": 800.0}})
    monkeypatch.setattr(gpu_stem, "STEMS", {"small": "n{}c3d3h9w12k8f3s1x2x2p1+relu"})

    class Problem(gpu_sm80.Problem):
        def __init__(self, text, dtype, device):
            super().__init__(text, dtype, "cpu")

        def call(self, name):
            return (lambda: None) if name in able else f"{name} does not run here"

    monkeypatch.setattr(gpu_sm80, "Problem", Problem)
    monkeypatch.setattr(gpu_stem, "gpu_seconds", lambda calls, **_: {n: 1e-6 * (1 + len(n)) for n in calls})
    able = {"wgmma stem", "stock"}
    rows = gpu_stem.stem_speed((1, 8))["stems"]
    assert [row["problem"] for row in rows] == [f"n{n}c3d3h9w12k8f3s1x2x2p1+relu" for n in (1, 8)]
    assert rows[0]["us"] == {"wgmma stem": 11.0, "stock": 6.0}
    assert set(rows[0]["reasons"]) == {"sm80", "sm80 64x64"}
    assert rows[1]["tflop_per_s"] == pytest.approx(8 * rows[0]["tflop_per_s"], abs=0.5)
    able = {"stock"}
    with pytest.raises(NotHere, match="wgmma stem: wgmma stem does not run here"):
        gpu_stem.stem_speed((1,))


def test_the_speed_of_stems_with_their_pool(monkeypatch):
    class Problem(gpu_sm80.Problem):
        def __init__(self, text, dtype, device):
            super().__init__(text, dtype, "cpu")

    class Kernel(backends.Stock):
        name = "wgmma stem"
        why_not = None

        def can_run(self, request):
            return self.why_not

        def with_pool(self, request, frames):
            return _pooled.Apart(backends.Stock(), frames)

    def seconds(calls, **_):
        shapes.append({name: tuple(call().shape[2:]) for name, call in calls.items()})
        return {name: 1e-6 * len(name) for name in calls}

    shapes: list[dict] = []
    kernel = Kernel()
    monkeypatch.setattr(gpu_stem, "require_sm90", lambda: None)
    monkeypatch.setattr(gpu_sm80, "Problem", Problem)
    monkeypatch.setattr(backends, "KERNELS", [kernel, backends.Stock()])
    monkeypatch.setattr(gpu_stem, "POOLED", {"small": ("n{}c3d3h9w12k8f3s1x2x2p1+relu", 3)})
    monkeypatch.setattr(gpu_stem, "gpu_seconds", seconds)
    rows = gpu_stem.pool_speed((1, 2))["pooled_stems"]
    assert [(row["stem"], row["pool_frames"]) for row in rows] == [("small", 3)] * 2
    assert rows[0]["us"]["one kernel"] == 10.0
    pooled = dict.fromkeys(("one kernel", "one after the other", "stock"), (2, 3, 3))
    assert shapes[0] == pooled | {"convolution alone": (3, 5, 6)}
    kernel.why_not = "does not run here"
    with pytest.raises(NotHere, match="wgmma stem: does not run here"):
        gpu_stem.pool_speed((1,))


class FakeGpu:
    """Events, streams and graphs that tell what their calls would have taken."""

    def __init__(self, monkeypatch, host: float = 3e-5) -> None:
        self.host, self.now, self.wall = host, 0.0, 0.0
        self.capturing: list[float] | None = None
        self.streams = ["default"]
        self.ended: list[object] = []
        self.replays = self.broken = 0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = gpu.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Event) -> float:
                return 1e3 * (end.at - self.at)

        class Stream:
            def wait_stream(self, other: object) -> None:
                pass

        class Graph:
            def __init__(self) -> None:
                self.work: list[float] = []

            def replay(self) -> None:
                gpu.replays += 1
                gpu.spend(1e-5, sum(self.work))

        class Stack:
            """Both `torch.cuda.stream` and `torch.cuda.graph`, which ends in an error where a call broke it."""

            def __init__(self, what: Any, stream: Any = None, **kwargs: Any) -> None:
                self.graph = what if stream is not None else None
                self.stream = stream or what

            def __enter__(self) -> None:
                gpu.streams.append(self.stream)
                if self.graph is not None:
                    gpu.capturing = self.graph.work

            def __exit__(self, *exc: Any) -> None:
                if self.graph is not None:
                    gpu.capturing = None
                    if gpu.broken:
                        raise RuntimeError("operation failed due to a previous error during capture")
                gpu.streams.pop()

        def set_stream(stream: Any) -> None:
            gpu.streams[-1] = stream

        def end(device: int, pool: object) -> None:
            if not gpu.broken:
                raise RuntimeError("not currently recording")
            gpu.broken = 0
            gpu.ended.append(pool)

        generator = SimpleNamespace(clone_state=lambda: None, graphsafe_set_state=self.ended.append)
        fakes = {
            "Event": Event,
            "Stream": Stream,
            "CUDAGraph": Graph,
            "graph": Stack,
            "stream": Stack,
            "set_stream": set_stream,
            "current_stream": lambda: self.streams[-1] if len(self.streams) > 1 else Stream(),
            "current_device": lambda: 0,
            "get_device_capability": lambda device: (8, 0),
            "graph_pool_handle": object,
            "synchronize": lambda: None,
            "default_generators": [generator],
            "_sleep": lambda cycles: None,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *args: None, raising=False)
        monkeypatch.setattr(gpu_common.time, "perf_counter", lambda: self.wall)
        monkeypatch.setattr(gpu_common, "_not_captured", [])

    def spend(self, host: float, gpu: float) -> None:
        self.wall += host + gpu
        self.now += max(host, gpu)

    def call(self, seconds: float, breaks: bool = False) -> Callable[[], None]:
        def run() -> None:
            if self.capturing is None:
                self.spend(self.host, seconds)
            elif breaks:
                self.broken = 1
                raise RuntimeError("operation not permitted when stream is capturing")
            else:
                self.capturing.append(seconds)

        return run


def test_short_calls_are_replayed_as_graphs(monkeypatch) -> None:
    gpu = FakeGpu(monkeypatch)
    calls = {"small": gpu.call(4e-6), "large": gpu.call(5e-3)}
    eager = gpu_common.gpu_seconds(calls)
    assert eager["small"] == pytest.approx(gpu.host)  # what the host takes to launch it
    assert gpu_common.timed(eager) == "events"
    assert not gpu.replays
    found = gpu_common.gpu_seconds(calls, graphs=True)
    assert found == pytest.approx({"small": 4e-6, "large": 5e-3})
    assert found.timed == gpu_common.timed(found) == {"small": "graph", "large": "events"}
    assert gpu_common.timed(gpu_common.gpu_seconds({"small": calls["small"]}, graphs=True)) == "graph"
    assert gpu_common.timed({"a": 1.0}) == "events"


def test_what_cannot_be_captured_is_timed_as_it_is(monkeypatch) -> None:
    gpu = FakeGpu(monkeypatch)
    calls = {"a": gpu.call(4e-6), "waits": gpu.call(5e-6, breaks=True), "b": gpu.call(6e-6)}
    found = gpu_common.gpu_seconds(calls, graphs=True)
    assert found == pytest.approx({"a": 4e-6, "waits": gpu.host, "b": 6e-6})
    assert found.timed == {"a": "graph", "waits": "events", "b": "graph"}
    assert len(gpu_common._not_captured) == 1  # torch may still look at it
    assert len(gpu.ended) == 2  # the pool and the generator
    assert (
        len(gpu.streams) == 2
    )  # set back to the first, which the failed end of the capture left on the stack

    def fails() -> None:
        if gpu.capturing is not None:
            raise ValueError("of its own")
        gpu.call(4e-6)()

    assert gpu_common.gpu_seconds({"fails": fails}, graphs=True).timed == {"fails": "events"}
    assert len(gpu_common._not_captured) == 1  # this capture has ended well
