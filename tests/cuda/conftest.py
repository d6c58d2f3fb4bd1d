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


@pytest.fixture(scope="session")
def emulated80(tmp_path_factory):
    """The kernels for compute capability 8.0 and later, pool and head."""
    if not have_compiler():
        pytest.skip("the emulated kernels need a C++ compiler")
    from torch.utils.cpp_extension import load

    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    module = load(
        "r3d_emulated_sm80",
        [str(HERE / "emulated_sm80.cpp")],
        extra_cflags=["-O2", "-g0", "-DR3D_EMU", "-Wno-unknown-pragmas"],
        build_directory=str(tmp_path_factory.mktemp("emulated_sm80")),
    )
    module.configure()
    return module


# schedule, seed, cp.async lands late
TIMINGS = [
    (schedule, seed, late) for schedule, seed in ((0, 1), (1, 1), (2, 1), (2, 2)) for late in (False, True)
]


@pytest.fixture(scope="session")
def timings():
    return TIMINGS


@pytest.fixture(
    params=TIMINGS,
    ids=lambda t: f"{['lockstep', 'reversed', 'ahead'][t[0]]}-{t[1]}-{'late' if t[2] else 'early'}",
)
def emu80(request, emulated80):
    emulated80.configure(*request.param)
    yield emulated80
    emulated80.configure()


@pytest.fixture(scope="session")
def emulated_sm90(tmp_path_factory):
    """The Hopper convolution, in an extension of its own: it is a minute of emulation away from the rest."""
    if not have_compiler():
        pytest.skip("the emulated kernels need a C++ compiler")
    from torch.utils.cpp_extension import load

    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    return load(
        "r3d_emulated_sm90",
        [str(HERE / "emulated_sm90.cpp")],
        extra_cflags=["-O2", "-DR3D_EMU", "-Wno-unknown-pragmas"],
        build_directory=str(tmp_path_factory.mktemp("emulated_sm90")),
    )
