"""Settings that every test shares."""

import os
import tempfile

# Before the package is imported: tests neither read nor write the user's tuning cache, and measure nothing unless they
# ask for it.
os.environ["R3D_KERNELS_CACHE"] = tempfile.mkdtemp(prefix="r3d-tests-")
os.environ.setdefault("R3D_KERNELS_TUNE", "0")
# Before OpenMP is loaded: thousands of tiny operations, between which waiting threads would spin and take the cores
# from compilers and child processes. Most of the processor time of a test run was that.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import background
import pytest
import torch
from hypothesis import HealthCheck, settings

from r3d_kernels import _keeping

settings.register_profile(
    "default",
    deadline=None,  # shared machines
    derandomize=bool(os.environ.get("CI")),
    max_examples=int(os.environ.get("R3D_TEST_EXAMPLES", "40")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("default")


def pytest_collection_finish(session: pytest.Session) -> None:
    seen = set()
    for position, item in enumerate(session.items):
        for name, jobs in getattr(getattr(item, "module", None), "AHEAD", {}).items():
            for job in jobs if name in item.fixturenames else ():
                if job not in seen:
                    seen.add(job)
                    background.plan(job, position)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Behind the end of the collection, whichever conftest.py may plan there."""
    if not session.config.option.collectonly:
        background.start()


def pytest_unconfigure() -> None:
    background.finish()


@pytest.fixture(autouse=True)
def _same_start(monkeypatch):
    """Every test starts from the same random state and with no weights kept, and leaves the number of threads alone."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    # What models of other tests keep would decide which kernels may keep weights in this one.
    monkeypatch.setattr(_keeping, "shared", _keeping.Keeping())
    yield
    torch.set_num_threads(threads)
