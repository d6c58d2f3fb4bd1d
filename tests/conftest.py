"""Settings that every test shares."""

import os
import tempfile

# Before the package is imported: tests neither read nor write the user's tuning cache, and measure nothing unless they
# ask for it.
os.environ["R3D_KERNELS_CACHE"] = tempfile.mkdtemp(prefix="r3d-tests-")
os.environ.setdefault("R3D_KERNELS_TUNE", "0")

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "default",
    deadline=None,  # shared machines
    derandomize=bool(os.environ.get("CI")),
    max_examples=int(os.environ.get("R3D_TEST_EXAMPLES", "40")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _same_start():
    """Every test starts from the same random state and leaves the number of threads as it was."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
