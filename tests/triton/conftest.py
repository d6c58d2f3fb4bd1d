"""Tests that use the `interpreter` fixture run in a process of their own, under TRITON_INTERPRET=1.

The variable has to be set before triton is imported, and would be in the way of everything else that uses triton. The
child runs all that were selected, in the background (tests/background.py), and its reports become this session's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import background
import pytest
import torch

_CHILD = "R3D_TRITON_TEST_REPORTS"  # the file that the child writes its reports to
_TIMEOUT = 1800
# `-m pytest` would put the current folder first on the path, and with it a checkout in place of the package under test.
_PYTEST = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
)


def have_triton() -> bool:
    try:
        import triton

        return bool(triton.__version__)
    except (ImportError, AttributeError):  # AttributeError: this very folder, found as a namespace
        return False


collect_ignore_glob = [] if have_triton() else ["test_*.py"]


@pytest.fixture(scope="session")
def interpreter():
    """The interpreter with its bfloat16 faults mended (interpreter.py)."""
    import interpreter

    interpreter.mend()


@pytest.fixture(autouse=True, scope="module")
def exact_float32():
    """float32 is exact where a test does not ask for TF32, which torch's switch allows by default."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


@pytest.fixture
def driver():
    """A GPU that compiles and launches nothing (launch_overhead.py), with no launch prepared for another one."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
    import launch_overhead

    from r3d_kernels.triton import conv3d, norm, pool

    caches = (
        *(conv3d.forward, conv3d.input_grad, conv3d.weight_grad),
        *(norm._forward, norm._backward_of, pool._max_pool_launch, pool._average_launch, pool._linear_launch),
    )

    def forget() -> None:
        for cache in caches:
            cache.cache_clear()
        conv3d._known.clear()

    forget()
    with launch_overhead.dry(90) as fake:
        fake.keep = True
        yield fake
    forget()


def _interpreted(item: pytest.Item) -> bool:
    return "interpreter" in getattr(item, "fixturenames", ())


if os.environ.get(_CHILD):

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(report: pytest.TestReport) -> None:
        with open(os.environ[_CHILD], "a") as file:
            file.write(json.dumps(report._to_json(), default=str) + "\n")

else:

    def pytest_collection_finish(session: pytest.Session) -> None:
        places = [i for i, item in enumerate(session.items) if _interpreted(item)]
        if places:
            ids = [session.items[i].nodeid for i in places]
            session.stash[_process] = child = _Child(session.config.rootpath, ids)
            background.plan(child.job, places[0])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        if not _interpreted(item):
            return None
        reports = item.session.stash.get(_reports, None)
        if reports is None:
            reports = item.session.stash[_reports] = item.session.stash[_process].reports()
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in reports.get(item.nodeid) or [_missing(item, reports.get("", ""))]:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        item.session._setupstate.teardown_exact(
            nextitem
        )  # what earlier tests of this process have left for this one
        return True


class _Child:
    """The process, and what it is asked to report."""

    def __init__(self, root: Path, ids: list[str]) -> None:
        handle, self.path = tempfile.mkstemp(prefix="r3d-reports-")
        os.close(handle)
        env = {**os.environ, "TRITON_INTERPRET": "1", _CHILD: self.path, "PYTEST_ADDOPTS": ""}
        command = [sys.executable, "-c", _PYTEST, "-q", "-p", "no:cacheprovider", f"--rootdir={root}", *ids]
        self.job = background.Job(command, env=env, cwd=str(root))

    def reports(self) -> dict:
        """nodeid -> the reports of its phases; "" -> what the child printed."""
        try:
            done = self.job.result(_TIMEOUT)
            output = done.stdout + done.stderr
        except subprocess.TimeoutExpired as e:
            output = f"the interpreter took more than {_TIMEOUT} s\n{e.stdout!r}"
        reports: dict = {"": output}
        for line in Path(self.path).read_text().splitlines():
            report = pytest.TestReport._from_json(json.loads(line))
            reports.setdefault(report.nodeid, []).append(report)
        os.unlink(self.path)
        return reports


_process = pytest.StashKey[_Child]()
_reports = pytest.StashKey[dict]()


def _missing(item: pytest.Item, output: str) -> pytest.TestReport:
    return pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords={},
        outcome="failed",
        longrepr="the interpreter's process did not reach this test:\n" + output[-4000:],
        when="call",
    )
