"""The tuning cache: which kernel was measured to be the fastest for a layer, remembered on disk.

One JSON file, `tuning-v1.json`, in `$R3D_KERNELS_CACHE` (`~` is the home; a relative one is of the current folder),
else `$XDG_CACHE_HOME/r3d_kernels`, else `~/.cache/r3d_kernels`. Entries are grouped by machine (processor, instruction
set, threads, torch, package version), so that a home directory shared by several machines holds them side by side.
Written aside and renamed; a damaged file or entry is ignored with a warning and replaced at the next write: whatever
lies there, a forward pass goes on. Only regular files are opened. `R3D_KERNELS_TUNE=0` neither measures, reads nor
writes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import reprlib
import stat
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch

from r3d_kernels import _cpu, _fork, _version

__all__ = [
    "MOST_CALLS",
    "SAMPLE",
    "Attempt",
    "TuningCache",
    "cache_path",
    "check_writable",
    "enabled",
    "gpu_seconds",
    "machine_key",
    "queued_seconds",
    "read_cache",
    "read_regular",
]

_FORMAT = 1
_MOST_BYTES = 64 << 20  # of a cache: thousands of networks take less
_MOST_LOOKS = 1000  # that an entry can ask for
_LONGEST_WAIT = 10.0  # seconds, for another process to write; it takes milliseconds


def enabled() -> bool:
    """Whether layers may be measured: R3D_KERNELS_TUNE is not 0."""
    value = os.environ.get("R3D_KERNELS_TUNE", "1").strip().lower()
    if value not in ("0", "1", ""):
        raise ValueError(f"R3D_KERNELS_TUNE: expected 0 or 1, got {value!r}")
    return value != "0"


def cache_path() -> Path:
    """Where the tuning cache of this user lies; no absolute path where there is no such place, as without a home."""
    # No shell expands the tilde of `ENV R3D_KERNELS_CACHE=~/x` in a Dockerfile or of os.environ[...] = "~/x".
    folder = os.path.expanduser(os.environ.get("R3D_KERNELS_CACHE", ""))
    if not folder:
        base = os.path.expanduser(os.environ.get("XDG_CACHE_HOME", ""))
        if not os.path.isabs(base):  # is to be ignored then, says its specification
            base = os.path.expanduser(os.path.join("~", ".cache"))
        folder = os.path.join(base, "r3d_kernels")
    path = Path(folder) / "tuning-v1.json"
    if not folder.startswith("~"):  # of a user that there is not: no folder of this name is wanted
        with contextlib.suppress(OSError):  # the current folder may be gone
            path = path.absolute()
    return path


def _make_folder(path: Path) -> None:
    """Makes the folder of a file of the cache; OSError where none can be."""
    if not path.is_absolute():
        raise OSError(errno.ENOENT, "there is no such home or current folder", str(path.parent))
    path.parent.mkdir(parents=True, exist_ok=True)


def _open_regular(path: Path, flags: int) -> int:
    """A descriptor of a regular file; OSError for anything else: a fifo would hang, a device never end."""

    def check(mode: int) -> None:
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))

    with contextlib.suppress(FileNotFoundError):
        check(os.stat(path).st_mode)  # opening a device may already do something
    # Windows knows neither flag, nor what they are for.
    flags |= getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(path, flags, 0o666)
    try:
        check(os.fstat(descriptor).st_mode)  # another one may have come in between
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_regular(path: Path, most: int = _MOST_BYTES) -> bytes:
    """What a regular file holds; OSError where it is none, or larger than `most` bytes."""
    with open(_open_regular(path, os.O_RDONLY), "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"larger than {most} bytes", str(path))
    return data


def check_writable() -> None:
    """Raises OSError where nothing can be remembered; a forward pass goes on there, and measures again next time."""
    path = cache_path()
    _make_folder(path)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def machine_key(device: torch.device, isa: str) -> str:
    """What has to be equal for a measurement to carry over."""
    parts = [f"r3d_kernels {_version.__version__}", f"torch {torch.__version__}"]
    if device.type == "cuda":
        parts += [torch.cuda.get_device_name(device), f"cudnn {torch.backends.cudnn.version()}"]
    else:
        parts += [_cpu.cpu_model(), isa, f"{torch.get_num_threads()} threads"]
    return " | ".join(parts)


SAMPLE = 1e-3  # seconds of calls between two events
MOST_CALLS = 20
_MOST_CYCLES = 2e9  # of any GPU in a second
_LONGEST_SLEEP = 0.02


def queued_seconds(call: Callable[[], object], count: int, launch: float) -> float:
    """Seconds of the current GPU for one of `count` calls behind one another, whatever their launches cost.

    Launches take the host `launch` seconds each, often longer than a small kernel runs; where the GPU waits for them is
    decided by graphs and by batch, and not by the kernel. So it is kept busy until all of them are queued. A graph of
    the calls would tell the same, but a call that cannot be captured leaves torch's allocator in a state that nothing
    public mends, and this runs inside a user's forward pass.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    sleep = getattr(torch.cuda, "_sleep", None)
    if sleep is not None:
        sleep(int(min(2 * count * launch, _LONGEST_SLEEP) * _MOST_CYCLES))
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / count


def gpu_seconds(run: Callable[[], object], rounds: int = 7) -> float:
    """The median seconds of the current GPU for a call, launches not counted; two warm-up calls come first."""
    run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    launch = time.perf_counter() - begin
    torch.cuda.synchronize()
    took = time.perf_counter() - begin
    count = max(1, min(MOST_CALLS, int(SAMPLE / took)))
    return sorted(queued_seconds(run, count, launch) for _ in range(rounds))[rounds // 2]


class Attempt(contextlib.AbstractContextManager["Attempt"]):
    """Something that may take its process along, with a trace beside the cache while it runs.

    `earlier` is None, or the trace of a process that did not survive the same: killed in a hang, crashed, `lost`.
    It stays until somebody removes it. Of processes that try at once one leaves a trace; none does where there are no
    locks, or where nothing may be remembered.

    Args:
        what: is tried, and on what: another version, say, is another attempt.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._file: IO[str] | None = None
        self.path = cache_path().with_name(f"trying-{hashlib.sha256(what.encode()).hexdigest()[:16]}.txt")
        self.earlier: Path | None = None
        self.lost = False

    def __enter__(self) -> Attempt:
        if enabled():
            with contextlib.suppress(ImportError, OSError):
                self._leave()
        return self

    def _leave(self) -> None:
        import fcntl

        _make_folder(self.path)
        descriptor = _open_regular(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        # Its lock is held until the attempt ends.
        file = open(descriptor, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while another process tries
            if os.fstat(descriptor).st_size:  # whatever it says
                self.earlier = self.path
            else:
                file.write(f"{self._what}\nremove this file to have it tried again\n")
                file.flush()
                self._file = file
        finally:
            if self._file is None:
                file.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                if not self.lost:
                    self.path.unlink(missing_ok=True)
                _unlock(self._file)
                self._file.close()
            self._file = None


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{_shortened(name)}: expected an object, got {reprlib.repr(value)}")
    return value


def _shortened(name: str) -> str:
    return name if len(name) <= 200 else name[:197] + "..."


def _entry(entry: Any, problem: str) -> dict[str, Any]:
    """An entry as `TuningCache.put` makes it, less what it does not know; ValueError for anything else."""

    def expect(ok: bool, what: str, expected: str, got: Any) -> None:
        if not ok:
            raise ValueError(f"{_shortened(problem)}: {what}: expected {expected}, got {reprlib.repr(got)}")

    entry = _mapping(entry, problem)
    kernel, seconds, again = entry.get("kernel"), entry.get("seconds"), entry.get("again", 0)
    expect(isinstance(kernel, str), "kernel", "a name", kernel)
    expect(isinstance(seconds, dict), "seconds", "times by kernel", seconds)
    for name, value in seconds.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        try:
            good = isinstance(name, str) and number and 0 < float(value) < math.inf
        except OverflowError:  # an integer of hundreds of digits
            good = False
        expect(good, f"seconds of {reprlib.repr(name)}", "a positive, finite number", value)
    count = isinstance(again, int) and 0 <= again <= _MOST_LOOKS  # True: of 0.1.0 before it counted
    expect(count, "again", f"a whole number from 0 to {_MOST_LOOKS}", again)
    good = {"kernel": kernel, "seconds": {name: float(value) for name, value in seconds.items()}}
    return good | ({"again": int(again)} if again else {})


@contextlib.contextmanager
def _noted(wrong: list[str]) -> Iterator[None]:
    try:
        yield
    except ValueError as e:
        wrong.append("" if wrong else str(e))  # the first is told; there may be millions


def read_cache(path: Path) -> tuple[dict[str, dict[str, dict]], str | None]:
    """The entries by machine and problem, and what is wrong with the file or with the first that is left out.

    Never raises.
    """
    try:
        if not path.is_absolute():
            raise OSError(errno.ENOENT, "there is no such home or current folder", str(path.parent))
        data = json.loads(read_regular(path).decode("utf-8"))
        found = data.get("format") if isinstance(data, dict) else data
        if not isinstance(data, dict) or found != _FORMAT:
            raise ValueError(f"expected format {_FORMAT}, got {reprlib.repr(found)}")
        machines: dict[str, dict[str, dict]] = {}
        wrong: list[str] = []
        for machine, entries in _mapping(data.get("machines"), "machines").items():
            with _noted(wrong):
                for problem, entry in _mapping(entries, machine).items():
                    with _noted(wrong):
                        machines.setdefault(machine, {})[problem] = _entry(entry, problem)
        if not wrong:
            return machines, None
        return machines, wrong[0] + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else "")
    except FileNotFoundError as e:
        return {}, None if path.is_absolute() else str(e)
    # RecursionError: what is nested a thousand times over.
    except (OSError, ValueError, RecursionError, MemoryError) as e:
        return {}, f"{type(e).__name__}: {e}"


def _try_lock(file: IO[bytes]) -> bool | None:
    """Whether the lock is ours now; None while another process has it, False where the system has no locks."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except (ImportError, OSError):
        return False
    return True


def _unlock(file: IO[Any]) -> None:
    """Closing it is not enough: a child that another thread has forked meanwhile has the lock too, for all its life."""
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_UN)


class TuningCache:
    """Choices by (machine, problem); thread-safe; the file is read at first use and merged at every write.

    A write adds what this process has measured to what the file has by then, and nothing else: another process's newer
    measurement stays, and what another process has cleared stays cleared.
    """

    def __init__(self) -> None:
        self._lock = _fork.Lock()
        self._path: Path | None = None
        self._entries: dict[str, dict[str, dict]] = {}
        self._unsaved: set[tuple[str, str]] = set()
        self._patience = _LONGEST_WAIT

    @staticmethod
    def _read(path: Path, quiet: bool = False) -> dict[str, dict[str, dict]]:
        machines, damage = read_cache(path)
        if damage and not quiet:
            part = " in part" if machines else ""
            warnings.warn(f"tuning cache {path} is ignored{part}: {damage}", stacklevel=2)
        return machines

    def _load(self) -> None:
        path = cache_path()
        if path != self._path:
            self._path, self._entries = path, {}  # also where the warning is made an error: once is enough
            self._unsaved.clear()
            self._entries = self._read(path)

    def get(self, machine: str, problem: str) -> dict | None:
        """{"kernel": name, "seconds": {name: seconds}}, with "again": number where `put` was told one; or None."""
        with self._lock:
            self._load()
            return self._entries.get(machine, {}).get(problem)

    def put(self, machine: str, problem: str, kernel: str, seconds: dict[str, float], again: int = 0) -> None:
        """Remembers a measurement, in memory at once and on disk where that is possible.

        Args:
            machine, problem: the key of the entry.
            kernel: the winner.
            seconds: the time of each kernel.
            again: how many more times close rivals should be measured.
        """
        with self._lock:
            self._load()
            entry = {"kernel": kernel, "seconds": seconds} | ({"again": again} if again else {})
            self._entries.setdefault(machine, {})[problem] = entry
            self._unsaved.add((machine, problem))
            # A read-only or full disk must not stop a forward pass.
            with contextlib.suppress(OSError):
                self._update(())

    def forget(self, machine: str, problems: Iterable[str]) -> int:
        """Removes these entries of one machine, on disk too; how many there were.

        Raises:
            OSError: where the file cannot be written.
        """
        with self._lock:
            self._load()
            gone = {(machine, problem) for problem in problems}
            self._unsaved -= gone
            return self._update(gone)

    def clear(self) -> int:
        """Forgets everything, on disk too; how many entries there were.

        Raises:
            OSError: where the file cannot be removed.
        """
        with self._lock:
            self._load()
            self._unsaved.clear()
            if not os.path.lexists(cache_path()):  # a link to nowhere is something to remove
                self._entries = {}
                return 0
            with self._alone(cache_path()):
                count = sum(map(len, self._read(cache_path(), quiet=True).values()))
                cache_path().unlink(missing_ok=True)
            self._entries = {}
            return count

    @contextlib.contextmanager
    def _alone(self, path: Path) -> Iterator[None]:
        """No other process changes the file meanwhile, where the system has locks.

        Raises:
            OSError: where another process keeps the lock for long: it was stopped, say.
        """
        _make_folder(path)
        with open(_open_regular(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT), "rb+") as lock:
            # Without one (some network file systems) a write is still whole, but may lose another process's entry.
            locked = self._locked(lock, path)
            if locked:
                # Whoever holds the lock knows that nobody else writes: these are of processes that were killed.
                with contextlib.suppress(OSError):
                    for aside in path.parent.glob(f"{path.name}*.tmp"):
                        with contextlib.suppress(OSError):
                            aside.unlink()
            try:
                yield
            finally:
                if locked:
                    _unlock(lock)

    def _locked(self, lock: IO[bytes], path: Path) -> bool:
        """Whether this process has the lock now; False where the system has none."""
        end = time.monotonic() + self._patience
        while (locked := _try_lock(lock)) is None:
            if time.monotonic() >= end:
                self._patience = 0.0  # not so long for each layer: until the lock was free once
                raise OSError(errno.ETIMEDOUT, "locked by another process", str(path))
            time.sleep(0.002)
        self._patience = _LONGEST_WAIT
        return locked

    def _update(self, gone: Collection[tuple[str, str]]) -> int:
        """Brings file and memory together, less `gone`; how many of those there were."""
        path = self._path
        assert path is not None
        with self._alone(path):
            merged = self._read(path, quiet=True)
            removed = sum(merged.get(machine, {}).pop(problem, None) is not None for machine, problem in gone)
            unfit = {}  # a clock that stood still, say: it would be warned of when it is read
            for machine, problem in self._unsaved:
                entry = self._entries[machine][problem]
                try:
                    merged.setdefault(machine, {})[problem] = _entry(entry, problem)
                except ValueError:
                    unfit[machine, problem] = entry
            merged = {machine: entries for machine, entries in merged.items() if entries}
            handle, aside = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
            try:
                with os.fdopen(handle, "w", encoding="ascii") as f:
                    json.dump({"format": _FORMAT, "machines": merged}, f, indent=1, allow_nan=False)
                os.replace(aside, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(aside)
                raise
        for (machine, problem), entry in unfit.items():  # this process has it all the same
            merged.setdefault(machine, {})[problem] = entry
        self._entries, self._unsaved = merged, set(unfit)
        return removed


shared = TuningCache()
