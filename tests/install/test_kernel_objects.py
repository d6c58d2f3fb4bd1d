"""Code for a newer processor must not leak into functions that every processor calls."""

import re
import shutil
import subprocess
from pathlib import Path

import background
import pytest

ISAS = ("avx2", "avx512", "avx512_bf16", "amx")
CPU = Path(__file__).resolve().parents[2] / "csrc" / "cpu"
COMPILER = shutil.which("c++") or shutil.which("g++")
TOOLS = COMPILER and shutil.which("nm") and shutil.which("objdump")
# AVX and later: every mnemonic begins with v
MODERN = re.compile(r"\s(v[a-z0-9]+|k(mov|or|and)[a-z]+)\s|%[yz]mm")


def printed(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def functions(listing: str) -> dict[str, str]:
    """Name to disassembly, from objdump -dC."""
    parts = re.split(r"^[0-9a-f]+ <(.*)>:$", listing, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def compilation(isa: str) -> background.Job:
    # -O0: whatever could be emitted is emitted, and g++ takes a third of the time that -O1 -fno-inline takes
    flags = ["-std=c++17", "-O0", "-w", "-fPIC", "-c"]
    return background.Job([COMPILER, *flags, str(CPU / f"kernels_{isa}.cpp"), "-o", "kernels.o"])


AHEAD = {"compiled": [compilation(isa) for isa in ISAS]} if TOOLS else {}


@pytest.fixture
def compiled(isa: str) -> Path:
    """The object file of an instruction set."""
    job = AHEAD["compiled"][ISAS.index(isa)]
    done = job.result(timeout=600)
    assert done.returncode == 0, done.stderr
    return job.folder / "kernels.o"


@pytest.mark.skipif(not TOOLS, reason="needs a C++ compiler and binutils")
@pytest.mark.parametrize("isa", ISAS)
def test_shared_functions_run_on_every_processor(isa: str, compiled: Path) -> None:
    """The linker keeps one copy of a weak symbol (an inline function, a template). A copy made here must not need more
    than any processor has, unless its name carries the namespace of the instruction set."""
    out = str(compiled)
    symbols = printed("nm", "-C", "--defined-only", out).splitlines()
    weak = [line.split(maxsplit=2)[2] for line in symbols if line.split()[1] in "WVu"]
    code = functions(printed("objdump", "-dC", "--no-show-raw-insn", out))
    assert any(MODERN.search(body) for body in code.values())  # the pattern sees what it looks for
    shared = [name for name in weak if f"r3d::cpu::{isa}::" not in name and name in code]
    assert [name for name in shared if MODERN.search(code[name])] == []
