"""The GPU report without a GPU: sections, budget, files."""

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
from typing import Any

import pytest
import torch
from clock import Clock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import gpu_bn_act
import gpu_common
import gpu_floors
import gpu_picture
import gpu_report
import gpu_sanitizer
import gpu_sections
import gpu_triton
import gpu_triton_layers
import measure
from gpu_sections import Failed, NotHere, Report, Section, progress

from r3d_kernels import backends


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
