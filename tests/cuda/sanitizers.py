"""Programs that run emulated kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import shutil
import subprocess
from pathlib import Path

import background
import pytest

COMPILER = shutil.which(os.environ.get("CXX", "c++"))
FLAGS = "-std=c++17 -O1 -DR3D_EMU -fsanitize=address,undefined -fno-sanitize-recover=all -Wall -Wno-unknown-pragmas"


def compilation(source: str, *flags: str) -> list[background.Job]:
    """Of a file in this folder; empty without a compiler."""
    if COMPILER is None:
        return []
    file = Path(__file__).resolve().with_name(source)
    return [background.Job([COMPILER, *FLAGS.split(), *flags, str(file), "-o", "sanitized"])]


def program(job: background.Job | None = None):
    """A function that runs what was compiled; skips the test where it cannot be compiled here."""
    if job is None:
        pytest.skip("the sanitized kernels need a C++ compiler")
    build = job.result(timeout=600)
    if build.returncode != 0 and ("asan" in build.stderr or "ubsan" in build.stderr):
        pytest.skip("this compiler has no sanitizer runtime")
    assert build.returncode == 0, build.stderr

    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(job.folder / "sanitized"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)

    return start
