"""The kernels on processors that are older than the machine: emulated by qemu-user, which stops at every instruction
that such a processor does not have.

Twice: old_cpu.cpp, which links csrc/cpu alone, in the order of objects that is the worst for older processors; and the
built package with torch around it.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch

import r3d_kernels

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CPU = ROOT / "csrc" / "cpu"
BUILT = ROOT / "build" / "objects" / "csrc" / "cpu"  # what an installation from this checkout leaves
COMPILER = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
QEMU = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")
FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-fno-math-errno", "-w"]  # as setup.py has them

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="these are x86-64 processors"),
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
]
emulated = pytest.mark.skipif(
    QEMU is None, reason="needs qemu-user (apt-get install qemu-user) to emulate older processors"
)

# What each has: AVX2 and FMA; SSE4.2; SSE3, as every x86-64 has.
OLD = {"Haswell": "avx2", "Nehalem": "scalar", "qemu64": "scalar"}


def compiled(source: Path, to: Path, *flags: str) -> Path:
    subprocess.run([COMPILER, *FLAGS, *flags, "-c", str(source), "-o", str(to)], check=True, timeout=600)
    return to


def linked(objects: list[Path], to: Path) -> Path:
    subprocess.run([COMPILER, *map(str, objects), "-o", str(to)], check=True, timeout=600)
    return to


def run(program: Path, cpu: str | None) -> subprocess.CompletedProcess[str]:
    """Natively, or on an emulated processor."""
    command = [str(program)] if cpu is None else [QEMU, "-cpu", cpu, str(program)]
    environment = {k: v for k, v in os.environ.items() if k != "R3D_KERNELS_ISA"}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


@cache
def emulates_avx2() -> bool:
    version = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(map(int, re.search(r"version (\d+)\.(\d+)", version).groups())) >= (7, 2)


def crashed_on_an_instruction(done: subprocess.CompletedProcess[str]) -> bool:
    return done.returncode in (-signal.SIGILL, 128 + signal.SIGILL)


@pytest.fixture(autouse=True)
def no_core_files():
    limits = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_CORE, limits)


def installed(sources: list[Path]) -> list[Path] | None:
    """What the package itself was linked from; None where an object is missing or older than a file it is made of."""
    objects = [BUILT / f"{p.stem}.o" for p in sources]
    ingredients = [ROOT / "setup.py", *(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]
    newest = max(p.stat().st_mtime for p in ingredients)
    current = all(p.exists() and p.stat().st_mtime > newest for p in objects)
    return objects if current else None


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> list[Path]:
    """Those for the newest processors come first: their copy of a shared function is the one that is kept."""
    folder = tmp_path_factory.mktemp("old_cpus")
    sources = sorted(CPU.glob("*.cpp"))
    newest_first = [p for p in sources if "512" in p.stem or "amx" in p.stem]
    order = newest_first + [p for p in sources if p not in newest_first]
    if built := installed(order):  # minutes of compilation
        return built
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda p: compiled(p, folder / f"{p.stem}.o"), order))


@pytest.fixture(scope="module")
def driver(objects: list[Path], tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("old_cpus_driver")
    return linked([*objects, compiled(HERE / "old_cpu.cpp", folder / "main.o")], folder / "driver")


def test_this_processor(driver: Path) -> None:
    done = run(driver, None)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    checks = int(re.search(r"^best=\w+ checks=(\d+)$", done.stdout, re.MULTILINE)[1])
    assert checks >= 28  # of the plain C++ alone


@emulated
@pytest.mark.parametrize("cpu", OLD)
def test_older_processors(driver: Path, cpu: str) -> None:
    done = run(driver, cpu)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    best = re.search(r"^best=(\w+) checks=\d+$", done.stdout, re.MULTILINE)[1]
    if OLD[cpu] == "avx2" and not emulates_avx2():
        pytest.skip(f"{QEMU} is too old to emulate AVX2 (7.2 can): the plain kernels alone were run")
    assert best == OLD[cpu]


@emulated
@pytest.mark.parametrize(("cpu", "flags"), [("Haswell", ["-mavx512f"]), ("Nehalem", ["-mavx2"])])
def test_a_leak_would_be_seen(cpu: str, flags: list[str], tmp_path: Path) -> None:
    """Compiled for a newer processor and seen first by the linker, a shared function kills the older one."""
    source, wide = HERE / "old_cpu_leak.cpp", ["-fno-inline", *flags, "-mprefer-vector-width=512"]
    new = compiled(source, tmp_path / "new.o", "-DNEWER", *(wide if "512" in flags[0] else wide[:-1]))
    old = compiled(source, tmp_path / "old.o", "-fno-inline")
    assert crashed_on_an_instruction(run(linked([new, old], tmp_path / "leak"), cpu))
    assert run(linked([old, new], tmp_path / "sound"), cpu).returncode == 0


@emulated
def test_a_driver_for_a_newer_processor_is_stopped(objects: list[Path], tmp_path: Path) -> None:
    main = compiled(HERE / "old_cpu.cpp", tmp_path / "main.o", "-mavx512f", "-mprefer-vector-width=512")
    assert crashed_on_an_instruction(run(linked([*objects, main], tmp_path / "driver"), "Haswell"))


PACKAGE = """
import sys, torch
print("torch", flush=True)
import r3d_kernels as r3d
torch.set_num_threads(1)
model = r3d.create_model("hara_r3d_10", num_classes=3, widen_factor=0.25).eval()
x = torch.randn(1, 3, 4, 24, 24)
with torch.inference_mode():
    stock = model(x)
    model.fused = True
    for name in ("cpu", "auto"):
        with r3d.backend(name):
            torch.testing.assert_close(model(x), stock, rtol=1e-4, atol=1e-4)
    half, xb = model.bfloat16(), x.bfloat16()
    with r3d.backend("cpu"):
        torch.testing.assert_close(half(xb).float(), stock, rtol=0.1, atol=0.1)
print(r3d.backends.describe()["isa"])
"""


@emulated
@pytest.mark.parametrize("cpu", ["Haswell", "Nehalem"])  # torch needs SSE4 itself
def test_the_package_on_older_processors(cpu: str, tmp_path: Path) -> None:
    """The library as it was built and linked for this Python, with torch around it."""
    if OLD[cpu] == "avx2" and not emulates_avx2():
        pytest.skip(f"{QEMU} is too old to emulate AVX2 (7.2 can)")
    environment = {k: v for k, v in os.environ.items() if k != "R3D_KERNELS_ISA"}
    root = str(Path(r3d_kernels.__file__).parents[1])
    environment |= {"PYTHONPATH": root, "R3D_KERNELS_TUNE": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [QEMU, "-cpu", cpu, sys.executable, "-c", PACKAGE],
        capture_output=True,
        text=True,
        timeout=900,
        env=environment,
        cwd=tmp_path,  # not in a checkout, which would be imported first
    )
    if crashed_on_an_instruction(done) and not done.stdout:
        pytest.skip(f"torch {torch.__version__} itself does not run on a {cpu}")
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-2000:])
    assert done.stdout.split() == ["torch", OLD[cpu]]
