"""The emulated kernels: csrc/cuda compiled as plain C++ for the CPU (csrc/cuda/emu/README.md)."""

import os
import shutil
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SCHEDULES = [("lockstep", 0, 1), ("reversed", 1, 1), ("ahead-1", 2, 1), ("ahead-2", 2, 2), ("ahead-3", 2, 3)]


def have_compiler() -> bool:
    return shutil.which(os.environ.get("CXX", "c++")) is not None


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    if not have_compiler():
        pytest.skip("the emulated kernels need a C++ compiler")
    from torch.utils.cpp_extension import load

    # ninja is in the environment's bin folder, which is on the PATH only when the environment is activated
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    return load(
        "r3d_emulated",
        [str(HERE / "emulated.cpp")],
        extra_cflags=["-O1", "-DR3D_EMU", "-Wno-unknown-pragmas"],
        # not torch's shared cache: a killed test run leaves a lock there, and the next would wait for it
        build_directory=str(tmp_path_factory.mktemp("emulated")),
    )


@pytest.fixture(scope="session")
def schedules():
    return SCHEDULES


@pytest.fixture(params=SCHEDULES, ids=[name for name, _, _ in SCHEDULES])
def emu(request, emulated):
    _, schedule, seed = request.param
    emulated.configure(schedule, seed)
    yield emulated
    emulated.configure(0)
