"""The compiled library where another copy of it is in the process already: torch would end the process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from r3d_kernels import _extension

OURS = Path(_extension.__file__).parent
pytestmark = [
    pytest.mark.skipif(_extension.path is None, reason="the library is not built"),
    pytest.mark.skipif(
        not os.path.exists("/proc/self/maps"), reason="the system does not tell what is loaded"
    ),
]

FORGET = "for name in [n for n in sys.modules if n.split('.')[0] == 'r3d_kernels']: del sys.modules[name]"
IMPORT = """
try:
    import r3d_kernels
    print("imported")
except ImportError as e:
    print(e)
"""
#: How the first copy, in a folder of its own, comes into the process.
FIRST = {
    "load_library": "torch.ops.load_library({library!r})",
    "import": "sys.path.insert(0, {folder!r}); import r3d_kernels; sys.path.pop(0)\n" + FORGET,
}


def python(code: str) -> str:
    """What a process that finds our copy says in its last line."""
    done = subprocess.run(
        [sys.executable, "-c", f"import os, shutil, sys, torch\n{code}"],
        env={**os.environ, "PYTHONPATH": str(OURS.parent)},
        cwd="/",  # not a checkout's, which may have no library
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """That of another installation."""
    folder = tmp_path_factory.mktemp("other") / "r3d_kernels"
    shutil.copytree(OURS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder / _extension.path.name


@pytest.mark.parametrize("first", FIRST)
def test_a_second_copy_is_refused_with_both_paths(library, first) -> None:
    code = FIRST[first].format(library=str(library), folder=str(library.parents[1]))
    said = python(code + IMPORT)
    assert said.startswith("two copies of r3d_kernels in one process: ")
    assert str(library) in said
    assert str(_extension.path) in said


def test_a_copy_that_was_replaced_on_disk(library) -> None:
    """As `pip install -U` in a running notebook."""
    folder = str(library.parents[1])
    code = (
        f"sys.path.insert(0, {folder!r}); import r3d_kernels\n{FORGET}\n"
        f"shutil.copy({str(library)!r}, {str(library)!r} + '.new')\n"
        f"os.replace({str(library)!r} + '.new', {str(library)!r})"
    )
    said = python(code + IMPORT)
    assert said.startswith("two copies of r3d_kernels in one process: ")
    assert said.count(str(library)) == 2
    assert f"{library} (deleted)" in said


def test_the_same_file_once_more_is_no_second_copy() -> None:
    said = python(
        "from r3d_kernels import _extension\n"
        "sys.modules.pop('r3d_kernels._extension'); import importlib\n"
        "again = importlib.import_module('r3d_kernels._extension')\n"
        "print(again is not _extension, again.error, again.path)"
    )
    assert said == f"True None {_extension.path}"


@pytest.mark.parametrize("built", [True, False])
def test_the_package_once_more_is_refused_in_words(built) -> None:
    """Some tools empty sys.modules; also where there is no library, and only Python has registered an operator."""
    hidden = "" if built else "sys.modules['r3d_kernels._C'] = None\n"
    said = python(f"{hidden}import r3d_kernels\n{FORGET}\n{hidden}{IMPORT}")
    assert said.startswith(f"r3d_kernels of {OURS} was imported before and taken out of sys.modules")


def test_a_second_copy_without_a_library(library) -> None:
    folder, hidden = str(library.parents[1]), "sys.modules['r3d_kernels._C'] = None\n"
    said = python(hidden + FIRST["import"].format(folder=folder) + "\n" + hidden + IMPORT)
    assert said.startswith("two copies of r3d_kernels in one process: ")
    assert str(library.parent) in said
    assert str(OURS) in said


def test_where_nobody_tells_what_is_loaded(monkeypatch) -> None:
    monkeypatch.setattr(_extension, "_mapped", set)
    _extension._refuse_a_second_copy()
