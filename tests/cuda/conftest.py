"""The emulated kernels: csrc/cuda compiled as plain C++ for the CPU (csrc/cuda/emu/README.md)."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import background
import pytest

HERE = Path(__file__).resolve().parent
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
SCHEDULES = [("lockstep", 0, 1), ("reversed", 1, 1), ("ahead-1", 2, 1), ("ahead-2", 2, 2), ("ahead-3", 2, 3)]


# In a process of its own, which compiles while other tests run. Not into torch's shared cache: a killed test run leaves
# a lock there, and the next would wait for it.
LOAD = """
import sys
from torch.utils.cpp_extension import load
name, source, *flags = sys.argv[1:]
load(name, [source], extra_cflags=flags, build_directory=".")
"""


def extension(source: str, optimization: str) -> background.Job | None:
    """Compiles a file of this folder to a Python module r3d_SOURCE; None without a compiler."""
    if COMPILER is None:
        return None
    flags = [optimization, "-g0", "-DR3D_EMU", "-Wno-unknown-pragmas"]
    # ninja is in the environment's bin folder, which is on the PATH only when the environment is activated
    path = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    return background.Job(
        [sys.executable, "-c", LOAD, f"r3d_{source}", str(HERE / f"{source}.cpp"), *flags],
        env={**os.environ, "PATH": path},
    )


# The fixtures that wait for a compiler. The Hopper convolution is an extension of its own: it is a minute of
# emulation away from the rest.
EXTENSIONS = {
    "emulated": extension("emulated", "-O1"),
    "emulated80": extension("emulated_sm80", "-O2"),
    "emulated_sm90": extension("emulated_sm90", "-O2"),
}


def pytest_collection_finish(session: pytest.Session) -> None:
    for fixture, job in EXTENSIONS.items():
        places = [i for i, item in enumerate(session.items) if fixture in getattr(item, "fixturenames", ())]
        if places and job is not None:
            background.plan(job, places[0])


def loaded(fixture: str) -> ModuleType:
    job = EXTENSIONS[fixture]
    if job is None:
        pytest.skip("the emulated kernels need a C++ compiler")
    done = job.result(timeout=600)
    assert done.returncode == 0, done.stderr
    name = job.command[3]
    spec = importlib.util.spec_from_file_location(name, job.folder / f"{name}.so")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def emulated():
    return loaded("emulated")


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
def emulated80():
    """The kernels for compute capability 8.0 and later, pool and head."""
    module = loaded("emulated80")
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
def emulated_sm90():
    return loaded("emulated_sm90")
