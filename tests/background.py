"""Child processes that are begun before the tests that wait for them.

Most tests keep one core busy. A process that is known once the tests are collected (a compiler, a Python with other
settings) runs on another core meanwhile: one at a time (two while the tests wait for one), in the order in which the
tests ask for them, and with less claim to the processors than the tests have. With a single core each runs when a test
asks for it.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(eq=False)
class Job:
    """A process to be. A test module names those that fixtures of its wait for: AHEAD = {"fixture": [Job(...)]}."""

    command: list[str]
    stdin: str = ""
    env: dict[str, str] | None = None  # None: this process's
    cwd: str | None = None  # None: a folder of its own
    folder: Path | None = None  # that folder, once there is one
    ahead: bool = False  # it has been handed on to the process that runs jobs

    def result(self, timeout: float) -> subprocess.CompletedProcess[str]:
        """What subprocess.run would return with the output as text; raises TimeoutExpired as it does."""
        if not self.ahead:
            self.folder = Path(tempfile.mkdtemp(dir=_root()))
            return subprocess.run(
                self.command,
                input=self.stdin,
                env=self.env,
                cwd=self.cwd or self.folder,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        assert self.folder is not None
        assert _runner is not None
        code, waiting, end = self.folder / ".code", Path(_root(), _WAITING), time.monotonic() + timeout
        waiting.touch()
        try:
            while not code.exists():
                if time.monotonic() > end:
                    raise subprocess.TimeoutExpired(self.command, timeout, *self._printed())
                assert _runner.poll() is None or code.exists(), "the process that runs it has ended"
                time.sleep(0.02)
        finally:
            waiting.unlink()
        return subprocess.CompletedProcess(self.command, int(code.read_text()), *self._printed())

    def _printed(self) -> list[str]:
        files = [Path(f"{self.folder}/.{name}") for name in ("out", "err")]
        return [file.read_text(errors="replace") if file.exists() else "" for file in files]


_WAITING = "waiting"  # a file beside the folders of the jobs, while a test waits for one
_planned: list[tuple[int, Job]] = []
_runner: subprocess.Popen[str] | None = None
_folder: str | None = None


def _root() -> str:
    global _folder
    _folder = _folder or tempfile.mkdtemp(prefix="r3d-jobs-")
    return _folder


def plan(job: Job, position: int) -> None:
    """To be run ahead; `position` is that of the first test that waits for it."""
    _planned.append((position, job))


def start() -> None:
    """Hands what is planned on to a process that runs it."""
    global _runner
    if not _planned or len(os.sched_getaffinity(0)) < 2:
        return
    jobs = [job for _, job in sorted(_planned, key=lambda entry: entry[0])]
    for job in jobs:
        job.folder, job.ahead = Path(tempfile.mkdtemp(dir=_root())), True
    _runner = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, text=True, start_new_session=True
    )
    assert _runner.stdin is not None
    _runner.stdin.write(json.dumps([vars(job) for job in jobs], default=str) + "\n")
    _runner.stdin.flush()


def finish() -> None:
    """Ends what still runs, and removes what all have left."""
    global _runner, _folder
    _planned.clear()
    if _runner is not None:
        _runner.communicate()  # the end of its input is the end of it
    if _folder is not None:
        shutil.rmtree(_folder, ignore_errors=True)
    _runner = _folder = None


def _run(jobs: list[dict]) -> None:
    os.nice(5)
    waiting = Path(jobs[0]["folder"]).with_name(_WAITING)
    running: list[tuple[dict, subprocess.Popen]] = []
    while jobs or running:
        if jobs and len(running) < 1 + waiting.exists():
            running.append((jobs[0], _begun(jobs.pop(0))))
            continue
        _end_with_the_tests(0.1)
        for job, process in list(running):
            if process.poll() is not None:
                running.remove((job, process))
                code = Path(job["folder"], ".code")
                written = code.with_suffix(".new")
                written.write_text(str(process.returncode))
                written.rename(code)
    _end_with_the_tests(None)


def _begun(job: dict) -> subprocess.Popen:
    out, err, stdin = (Path(job["folder"], name) for name in (".out", ".err", ".in"))
    stdin.write_text(job["stdin"])
    with stdin.open() as i, out.open("w") as o, err.open("w") as e:
        return subprocess.Popen(
            job["command"], stdin=i, stdout=o, stderr=e, env=job["env"], cwd=job["cwd"] or job["folder"]
        )


def _end_with_the_tests(seconds: float | None) -> None:
    """Where the process that runs the tests is gone, however it ended, so is all that this one has begun."""
    if select.select([sys.stdin], [], [], seconds)[0]:
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    _run(json.loads(sys.stdin.readline()))
