"""The frame of the command line: help, exit codes, one-line errors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from r3d_kernels import __version__, cli
from r3d_kernels.cli import common, doctor, main

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
        (["demo", "--frames", "0"], "--frames: must be a positive whole number, got '0'"),
        (["demo", "--size", "big"], "--size: must be a positive whole number, got 'big'"),
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
