"""The frame of the command line: help, exit codes, one-line errors."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from r3d_kernels import __version__, cli
from r3d_kernels.cli import common, doctor, main
from r3d_kernels.models import create_model

RANDOM = ("--arch", "r3d_18", "--random-weights")
# The same package from any folder, also where it is not installed.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}


def error_line(capsys) -> str:
    """The one line that a failed command leaves, less its prefix."""
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("r3d-kernels: error: ")
    return lines[0].removeprefix("r3d-kernels: error: ")


def run(*args: str, **kwargs) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "r3d_kernels", *args],
        capture_output=True,
        text=True,
        timeout=120,
        env=ENVIRONMENT,
        **kwargs,
    )


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"r3d-kernels {__version__}\n"


def test_help_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert re.search(rf"^ +{name} +\w", text, re.MULTILINE), name


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_each_command(capsys, name):
    assert main([name, "--help"]) == 0
    assert f"usage: r3d-kernels {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["demo", "--frames", "0"], "--frames: must be a whole number from 1 to 65536, got '0'"),
        (["demo", "--size", "big"], "--size: must be a whole number from 1 to 65536, got 'big'"),
        (["demo", "--dtype", "fp8"], "--dtype: invalid choice: 'fp8'"),
        (["demo", "--shape", "1"], "unrecognized arguments: --shape"),
        (["predict", "a.mp4"], "one of the arguments --weights --random-weights is required"),
        (["predict", "a.mp4", "--random-weights"], "--random-weights needs --arch"),
        (["predict", "--weights", "w.pth"], "required: VIDEO"),
        (["demo", "no/such.mp4"], "no/such.mp4: no such file"),
        (["demo", "--arch", "r3d-18"], "unknown network 'r3d-18': did you mean r3d_18 or "),
        (["demo", "--arch", "transformer"], "unknown network 'transformer': there are: r3d_10, "),
        (["demo", "--weights", "no/such.pth"], "--weights no/such.pth: no such file"),
        (["demo", "--weights", os.curdir], "--weights .: not a file"),
        (["demo", "--out", "no/such/folder/x.png"], "--out no/such/folder/x.png: there is no directory"),
        (["demo", "--out", os.curdir], "--out .: is a directory"),
        (
            ["predict", "a.mp4", *RANDOM, "--labels", "none.txt"],
            "--labels none.txt: no such file",
        ),
    ],
)
def test_bad_arguments(capsys, argv, message):
    assert main(argv) == 2
    assert message in error_line(capsys)


@pytest.mark.skipif(__import__("torch").cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys):
    assert main(["demo", "--device", "cuda"]) == 2
    assert "--device cuda: torch" in error_line(capsys)


@pytest.mark.parametrize("name", ["av", "matplotlib", "rich", "numpy"])
def test_missing_extra(capsys, monkeypatch, name):
    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    assert main(["demo"]) == 2
    message = error_line(capsys)
    assert f"this command needs {name}" in message
    assert message.endswith("pip install 'r3d-kernels[demo]'")


def test_missing_sample_clip(capsys, monkeypatch):
    monkeypatch.setattr("r3d_kernels.video.importlib.util.find_spec", lambda name: None)
    assert main(["demo"]) == 2
    assert error_line(capsys).endswith("pip install 'r3d-kernels[demo]'")


def test_weights_that_are_no_checkpoint(capsys, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_text("nothing\n" * 50)
    assert main(["demo", "--weights", str(path)]) == 2
    assert error_line(capsys).startswith(f"--weights {path}: ")


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("R3D_KERNELS_DEBUG", "1")
    with pytest.raises(common.CliError):
        main(["dance"])


def test_unexpected_error_is_named(capsys, monkeypatch):
    def fail():
        raise KeyError("first line\nsecond line")

    monkeypatch.setattr(doctor, "examine", fail)
    assert main(["doctor"]) == 2
    assert error_line(capsys).startswith("KeyError: ")


def test_interrupt(capsys, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", interrupt)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "r3d-kernels: interrupted\n"


def test_process_says_one_line_for_a_file_that_is_no_video(tmp_path):
    path = tmp_path / "text.mp4"
    path.write_text("These are words, and no video.\n" * 100)
    done = run("demo", str(path), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"r3d-kernels: error: {re.escape(str(path))}: not a video.*\n", done.stderr)
    assert list(tmp_path.iterdir()) == [path]  # no picture of a failed run


def test_process_whose_reader_goes_away():
    with subprocess.Popen(
        [sys.executable, "-m", "r3d_kernels", "doctor"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141


# -- common ------------------------------------------------------------------------------------------------


def test_write_atomically(tmp_path):
    path = tmp_path / "out.json"
    path.write_bytes(b"old")
    with path.open("rb") as reader:  # whoever has it open keeps the whole old file
        common.write_atomically(str(path), b"new")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_write_atomically_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    def fail(source, target):
        raise OSError(28, "No space left on device", str(target))

    path = tmp_path / "out.json"
    path.write_bytes(b"old")
    monkeypatch.setattr(common.os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        common.write_atomically(str(path), b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_write_atomically_through_a_link(tmp_path):
    (tmp_path / "target").write_bytes(b"old")
    link = tmp_path / "link"
    link.symlink_to("target")
    common.write_atomically(str(link), b"new")
    assert link.is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"


def test_write_atomically_does_not_replace_a_device(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        common.write_atomically(str(pipe), b"data")
        assert os.read(reader, 10) == b"data"
    finally:
        os.close(reader)
    assert pipe.is_fifo()


def test_threads_are_put_back():
    import torch

    before = torch.get_num_threads()
    with common.threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_random_weights_are_always_the_same():
    import torch

    state = torch.get_rng_state()
    one, two = (common.build_model("hara_r3d_10", None).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(state, torch.get_rng_state())


# --- checkpoints that cannot be loaded, and reports that JSON cannot hold ---------------------------------


def small_state() -> dict:
    return create_model("hara_r3d_10", num_classes=3, widen_factor=0.125).state_dict()


def itself() -> dict:
    inside: dict = {}
    inside["model"] = inside
    return inside


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (itself, "contains itself"),
        (
            lambda: {**small_state(), "conv1.weight": torch.zeros(0, 3, 7, 7, 7)},
            "conv1.weight: expected 1 to",
        ),
        (
            lambda: {**small_state(), "fc.weight": torch.ones(3, 64).long()},
            "fc.weight: expected floating-point",
        ),
        (lambda: {**small_state(), "fc.bias": torch.ones(3).to_sparse()}, "fc.bias: expected a dense tensor"),
        (lambda: {**small_state(), "fc.bias": torch.ones(3, device="meta")}, "fc.bias: expected values"),
        (lambda: [1], "expected a state dict, got list"),
    ],
)
@pytest.mark.parametrize(
    "argv",
    [
        ["verify", "--random"],
        ["tune"],
        ["predict", "a.mp4"],
        ["predict", "a.mp4", "--arch", "hara_r3d_10"],
        ["demo"],
    ],
    ids=" ".join,
)
def test_checkpoints_that_hold_no_weights(capsys, tmp_path, monkeypatch, content, message, argv):
    monkeypatch.setenv("R3D_KERNELS_TUNE", "1")  # `tune` refuses to be told otherwise
    monkeypatch.setenv("R3D_KERNELS_CACHE", str(tmp_path))
    path = tmp_path / "weights.pth"
    torch.save(content(), path)
    assert main([*argv, "--weights", str(path)]) == 2
    line = error_line(capsys)
    assert str(path) in line
    assert message in line


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no fifos")
def test_weights_that_would_hang(tmp_path):
    fifo = tmp_path / "weights.pth"
    os.mkfifo(fifo)
    for path in (str(fifo), os.devnull, str(tmp_path)):
        done = run("verify", "--random", "--weights", path)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"r3d-kernels: error: --weights {path}: not a file\n"


def strictly(text: str) -> dict:
    """JSON as the standard has it: Python's reader would take NaN."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


REPORTS = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=8,
    ),
    max_size=3,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(report=REPORTS, encoding=st.sampled_from(["utf-8", "ascii", "latin-1", "no such"]))
@example({"a": float("nan"), "b": ["\udcff.mp4", "\U0001f600"]}, "utf-8")
def test_any_report_is_valid_json(report, encoding):
    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    def wild(value):
        if isinstance(value, (dict, list)):
            return any(map(wild, value.values() if isinstance(value, dict) else value))
        return isinstance(value, float) and not math.isfinite(value)

    report.pop("notes", None)
    text = common.json_text(report, encoding)
    text.encode("ascii" if encoding == "no such" else encoding)
    got = strictly(text)
    notes = got.pop("notes", [])
    assert got == plain(report)
    assert bool(notes) == wild(report)


def test_notes_are_added_to_those_that_are_there():
    got = strictly(common.json_text({"a": [1.0, math.inf], "notes": ["one"]}))
    assert got == {"a": [1.0, None], "notes": ["one", "a[1] is inf, written as null"]}


# --- numbers and names from the command line --------------------------------------------------------------

COUNTS = {
    "demo": ["--frames", "--size", "--batch", "--repeats", "--threads"],
    "verify": ["--frames", "--size", "--batch", "--threads"],
    "predict": ["--frames", "--size", "--batch", "--topk", "--clip-stride", "--threads"],
    "tune": ["--frames", "--size", "--batch", "--in-channels", "--threads"],
}
FEWEST = {"demo": [], "verify": ["--random"], "predict": ["a.mp4", *RANDOM], "tune": []}


@pytest.mark.parametrize(("command", "option"), [(c, o) for c, options in COUNTS.items() for o in options])
@pytest.mark.parametrize(
    "value", ["99999999999", "0", "-1", "1.5", "nan", "", "9" * 5000, "1e3"], ids=lambda v: v[:12]
)
def test_numbers_out_of_range(capsys, command, option, value):
    assert main([command, *FEWEST[command], f"{option}={value}"]) == 2
    line = error_line(capsys)
    if value or command != "tune" or option != "--batch":
        assert re.search(rf"{option}: must be a whole number from 1 to \d+, got '", line)
    assert len(line) < 300


@pytest.mark.parametrize("command", ["demo", "verify", "predict", "tune"])
def test_clips_that_no_memory_holds(capsys, monkeypatch, command):
    """Each number is in its range, all of them together are not."""
    monkeypatch.setenv("R3D_KERNELS_TUNE", "1")
    monkeypatch.setattr("r3d_kernels.video.physical_memory", lambda: 2.0**34)
    assert main([command, *FEWEST[command], "--frames", "65536", "--size", "65536"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "--frames 65536 --size 65536: clips of " in line
    assert line.endswith("this machine has 16.0 GiB of memory")


@pytest.mark.parametrize("length", [255, 256, 5000])
@pytest.mark.parametrize(
    "argv", [["predict", "no.mp4", *RANDOM, "--json"], ["demo", "no.mp4", "--out"]], ids=" ".join
)
def test_names_as_long_as_they_get(capsys, tmp_path, argv, length):
    path = tmp_path / ("x" * length)
    assert main([*argv, str(path)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert ("file name too long" in line) == (length > 255)
    if length <= 255:
        common.write_atomically(str(path), b"done")
        assert path.read_bytes() == b"done"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_text_that_stdout_lacks_is_escaped(monkeypatch, encoding):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(doctor, "examine", lambda: {"usable": True, "name": "a\udcff\U0001f600"})
    monkeypatch.setattr(doctor, "to_text", lambda report: report["name"])
    assert main(["doctor"]) == 0
    assert stream.errors == "strict"  # as it was
    assert raw.getvalue().decode(encoding) in ("a\\udcff\U0001f600\n", "a\\udcff\\U0001f600\n")
    raw.seek(0)
    raw.truncate()
    assert main(["doctor", "--json"]) == 0
    assert strictly(raw.getvalue().decode(encoding))["name"] == "a\udcff\U0001f600"


def test_a_report_that_cannot_be_written_is_not_lost(capsys, tmp_path, monkeypatch):
    """The disk is full when the work is done."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(common, "write_atomically", full)
    with pytest.raises(common.CliError, match=r"--json .*: no space left on device; the JSON is on stdout"):
        common.write_json(str(tmp_path / "out.json"), {"a": [1]})
    assert strictly(capsys.readouterr().out) == {"a": [1]}
