"""Sections of a report within a budget, in a process of their own: what hangs or crashes loses itself alone.

A kernel that has never run may hang the GPU, or leave it with an error that every later call gets too. No signal and no
exception ends that: `Worker` therefore keeps the sections in another process, which it ends and starts anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import measure
import torch

Entry = dict[str, Any]


class Failed(AssertionError):
    """A check that did not hold; `data` is what was measured on the way."""

    def __init__(self, message: str, data: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.data = data or {}


class OutOfTime(BaseException):
    """The time ended inside a section. No Exception: a library that catches those must not swallow it."""


class NotHere(Exception):
    """The section needs something that this machine does not have."""


@dataclass(frozen=True)
class Section:
    """One part of the report.

    `needs`: seconds that must be left for a start to make sense. `most`: what it may take at all. `kernel`: of
    `backends.KERNELS`, which is left out of everything behind this section if it hangs the GPU or breaks its context.
    """

    name: str
    run: Callable[[], dict[str, Any]]
    needs: float = 1.0
    most: float = 60.0
    kernel: str | None = None


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raises OutOfTime after so many seconds, between two Python instructions; only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise OutOfTime

    previous = signal.signal(signal.SIGALRM, stop)
    # Once more every ten seconds, should a callback from C have dropped the first one.
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 10.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


_listener: Callable[[dict[str, Any]], None] | None = None


def progress(**data: Any) -> None:
    """What a section knows so far; stands in the report where it does not come to its end."""
    if _listener is not None:
        _listener(data)


def run_here(
    section: Section, seconds: float, listener: Callable[[dict[str, Any]], None] | None = None
) -> Entry:
    """Status, data and reason of a section that may take so many seconds, whatever it does in Python."""
    global _listener
    known: dict[str, Any] = {}

    def note(data: dict[str, Any]) -> None:
        known.update(data)
        if listener is not None:
            listener(dict(known))

    before, _listener = _listener, note
    try:
        with deadline(seconds):
            return {"status": "measured", "data": section.run()}
    except OutOfTime:
        return {"status": "not measured", "reason": "out of time", **_so_far(known)}
    except NotHere as e:
        return {"status": "not measured", "reason": str(e)}
    except Failed as e:
        return {"status": "failed", "reason": str(e), "data": e.data}
    except Exception as e:  # one broken section must not lose the others
        last = traceback.extract_tb(e.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        text = next(iter(str(e).splitlines()), "")
        return {"status": "failed", "reason": f"{type(e).__name__}: {text} ({where})", **_so_far(known)}
    finally:
        _listener = before


def _so_far(known: dict[str, Any]) -> Entry:
    return {"data": known, "data_is": "what was known when it ended"} if known else {}


@dataclass
class Report:
    """Runs sections within a budget; `save` is called with the whole report after each.

    `execute` runs one section; `head` and `tail` make the report around the sections, `tail` from them. Entries that
    `sections` holds already are kept, and their sections are not run again.
    """

    budget: float
    save: Callable[[dict[str, Any]], None]
    clock: Callable[[], float] = time.monotonic
    say: Callable[[str], None] = print
    head: dict[str, Any] = field(default_factory=dict)
    tail: Callable[[Sequence[Entry]], dict[str, Any]] = lambda sections: {}
    execute: Callable[[Section, float], Entry] = run_here
    sections: list[Entry] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start = self.clock()

    def left(self) -> float:
        return self.budget - (self.clock() - self.start)

    def data(self) -> dict[str, Any]:
        return {**self.head, "budget_s": self.budget, **self.tail(self.sections), "sections": self.sections}

    def run(self, sections: Sequence[Section]) -> bool:
        """False where a check failed or a section broke."""
        kept = {entry["name"]: entry for entry in self.sections}
        entries = [
            kept.get(s.name, {"name": s.name, "status": "not measured", "reason": "not reached"})
            for s in sections
        ]
        named = {s.name for s in sections}
        self.sections[:] = [*entries, *(entry for name, entry in kept.items() if name not in named)]
        self.save(self.data())  # a run that dies in its first section still says what it meant to do
        for section, entry in zip(sections, entries, strict=True):
            if section.name in kept:
                continue
            begin = self.clock()
            entry |= self._outcome(section)
            if entry["status"] == "measured":
                entry.pop("reason", None)
            entry["seconds"] = round(self.clock() - begin, 2)
            self.say(
                f"{entry['name']}: {entry['status']}" + (f" ({r})" if (r := entry.get("reason")) else "")
            )
            self.save(self.data())
        return all(entry["status"] != "failed" for entry in self.sections)

    def _outcome(self, section: Section) -> Entry:
        left = self.left()
        if left < section.needs:
            reason = f"needs about {section.needs:.0f} s, {max(left, 0):.0f} s of the budget are left"
            return {"status": "not measured", "reason": reason}
        entry = self.execute(section, min(left, section.most))
        if entry.get("reason") == "out of time":
            ended = left <= section.most
            entry["reason"] = (
                "the budget ended inside" if ended else f"took longer than its {section.most:.0f} s"
            )
        return entry


# ---- in a process of its own ----


def _without(names: Sequence[str]) -> None:
    """Takes kernels, and those named after them, from the choice of every layer."""
    from r3d_kernels import backends

    backends.KERNELS[:] = [
        k for k in backends.KERNELS if not any(k.name == n or k.name.startswith(f"{n} ") for n in names)
    ]


def _die_with_parent() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _broken() -> bool:
    """Whether the GPU is lost to this process."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _text(message: Any) -> str:
    return json.dumps(measure.finite(message))


def _serve(
    pipe: Any, sections_of: Callable[[Callable[[], float]], Sequence[Section]], without: Sequence[str]
) -> None:
    """Runs the sections that it is told to, until the pipe ends. Everything goes through the pipe as JSON."""
    os.setsid()  # a group of its own, which ends as a whole
    _die_with_parent()
    if without:
        _without(without)
    ends = [0.0]
    sections = {s.name: s for s in sections_of(lambda: ends[0] - time.monotonic())}
    pipe.send(_text({"ready": True}))
    while True:
        try:
            name, seconds = json.loads(pipe.recv())
        except EOFError:
            return
        ends[0], sent = time.monotonic() + seconds, [-math.inf]

        def listener(data: dict[str, Any], sent: list[float] = sent) -> None:
            if time.monotonic() - sent[0] > 0.5:  # rows are sent anew each time
                sent[0] = time.monotonic()
                pipe.send(_text({"partial": data}))

        entry = run_here(sections[name], seconds, listener)
        pipe.send(_text({"entry": entry, "broken": entry["status"] != "measured" and _broken()}))


class Worker:
    """Executes sections in a process that is started anew where one has hung, crashed or broken the GPU's context.

    Args:
        sections_of: makes the sections from a function that tells the seconds left; a name that another process can
            import.
        grace: seconds beyond its own that a section may take to end by itself.
        start: seconds that the process may take to import everything.
    """

    def __init__(
        self,
        sections_of: Callable[[Callable[[], float]], Sequence[Section]],
        grace: float = 5.0,
        start: float = 120.0,
    ) -> None:
        self._sections_of, self._grace, self._start = sections_of, grace, start
        self._process: Any = None
        self._pipe: Any = None
        self.without: dict[str, str] = {}  # kernel -> the section that it broke
        self.starts = 0

    def __call__(self, section: Section, seconds: float) -> Entry:
        if section.kernel in self.without:
            broke = self.without[section.kernel]
            return {"status": "not measured", "reason": f"{section.kernel} is left out: it broke {broke!r}"}
        if self._process is None and (why_not := self._begin()) is not None:
            return {"status": "failed", "reason": why_not}
        known: dict[str, Any] = {}
        try:
            self._pipe.send(_text([section.name, seconds]))
            end = time.monotonic() + seconds + self._grace
            while self._pipe.poll(max(end - time.monotonic(), 0.0)):
                message = json.loads(self._pipe.recv())
                if "partial" in message:
                    known = message["partial"]
                    continue
                if message["broken"]:
                    self.stop()
                    self._blame(section)
                    message["entry"]["reason"] += "; the GPU was lost to its process, which was ended"
                return message["entry"]
            reason = f"no answer within {seconds + self._grace:.0f} s: its process was killed"
            self.stop()
        except (EOFError, OSError):
            self._process.join(15)
            reason = f"its process ended with exit code {self._process.exitcode}"
            self.stop()
        self._blame(section)
        return {"status": "failed", "reason": reason, **_so_far(known)}

    def _blame(self, section: Section) -> None:
        if section.kernel is not None:
            self.without[section.kernel] = section.name

    def _begin(self) -> str | None:
        """Starts the process; why not, where it does not start."""
        context = multiprocessing.get_context("spawn")  # a fork cannot use CUDA
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, self._sections_of, tuple(self.without)))
        self._process.start()
        other.close()
        self.starts += 1
        try:
            if self._pipe.poll(self._start):
                self._pipe.recv()
                return None
            reason = f"the sections' process did not start within {self._start:.0f} s"
        except EOFError:
            self._process.join(15)
            reason = f"the sections' process ended at its start, exit code {self._process.exitcode}"
        self.stop()
        return reason

    def stop(self) -> None:
        """Ends the process and all that it has started."""
        if self._process is None:
            return
        if self._process.is_alive():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()  # before it had a group of its own
        self._process.join(10)
        self._pipe.close()
        self._process = self._pipe = None
