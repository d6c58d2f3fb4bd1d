"""The tuning cache against whatever lies on disk: a forward pass works, and nothing hangs or fills the memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import r3d_kernels as r3d
from r3d_kernels import tuning

FIFOS = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no fifos")
GOOD = {"kernel": "direct", "seconds": {"direct": 1.0}}


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("R3D_KERNELS_TUNE", "1")
    monkeypatch.setenv("R3D_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "shared", tuning.TuningCache())
    return tmp_path / "tuning-v1.json"


def forward() -> torch.Tensor:
    with torch.inference_mode():
        return r3d.ConvBNAct3d(4, 8, 3, 1, 1).eval()(torch.randn(1, 4, 2, 5, 5))


def holds(entry: object) -> str:
    return json.dumps({"format": 1, "machines": {"m": {"p": entry}}})


def used(kind: str = "ignored") -> list[str]:
    """Every method of a new cache; the warnings that came of it."""
    tuning.shared = tuning.TuningCache()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            tuning.shared.get("m", "p")
            tuning.shared.put("m", "q", "direct", {"direct": 1.0})
        assert tuning.shared.get("m", "q") == GOOD
        tuning.shared.forget("m", ["p", "q"])
        tuning.shared.clear()
    return [str(w.message) for w in told if kind in str(w.message)]


WRONG_SECONDS = [
    *(None, "1", [1], 3, True),
    *({"direct": wrong} for wrong in (None, "1", {}, [], True, 0, -1.0, 10**400, float("nan"), float("inf"))),
]


@pytest.mark.parametrize("seconds", WRONG_SECONDS, ids=lambda value: repr(value)[:30])
def test_wrong_seconds(cache, seconds) -> None:
    cache.write_text(holds({"kernel": "direct", "seconds": seconds}))
    (told,) = used()
    assert "p: seconds" in told
    assert len(told) < 400
    cache.write_text(holds({"kernel": "direct", "seconds": seconds}))
    tuning.shared = tuning.TuningCache()
    with pytest.warns(UserWarning, match="is ignored"):
        forward()
    assert tuning.read_cache(cache)[1] is None  # replaced


@pytest.mark.parametrize("again", [None, "1", 1.5, [], {}, -1, 10**9, 10**400], ids=lambda v: repr(v)[:30])
def test_wrong_again(cache, again) -> None:
    cache.write_text(holds({**GOOD, "again": again}))
    assert ["p: again: expected a whole number" in told for told in used()] == [True]


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xfe\x00{",
        b'{"format": 1, "machines": {"m\xff": {}}}',
        b"[" * 100_000,
        b'{"format": 1, "machines": ' + b'{"a":' * 100_000,
        holds({"kernel": [], "seconds": {}}).encode(),
        holds(None).encode(),
        b'{"format": 1, "machines": {"m": []}}',
        b'{"format": 1}',
        b'{"format": "' + b"x" * 10_000 + b'", "machines": {}}',
        b"null",
        b"\x00" * 1000,
    ],
    ids=lambda data: repr(data)[:40],
)
def test_damaged_files(cache, data) -> None:
    cache.write_bytes(data)
    (told,) = used()
    assert len(told) < 500
    cache.write_bytes(data)
    tuning.shared = tuning.TuningCache()
    with pytest.warns(UserWarning, match="is ignored"):
        forward()
    assert tuning.read_cache(cache)[1] is None


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(["direct", "tile", "torch", "x"])
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "kernel": NAMES | ANY_JSON,
        "seconds": st.dictionaries(NAMES, ANY_JSON) | ANY_JSON,
        "again": ANY_JSON,
    },
)
FILES = ANY_JSON | st.fixed_dictionaries(
    {
        "format": st.just(1),
        "machines": ANY_JSON | st.dictionaries(st.just("m"), st.dictionaries(NAMES, ENTRIES)),
    }
)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(FILES)
@example({"format": 1, "machines": {"m": {"p": {**GOOD, "more": [[]]}}}})
def test_any_json(cache, data) -> None:
    cache.write_text(json.dumps(data))
    assert len(used()) <= 1


def real_key(cache: Path) -> tuple[str, str]:
    forward()
    ((machine, entries),) = json.loads(cache.read_text())["machines"].items()
    return machine, next(iter(entries))


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(entry=ENTRIES | ANY_JSON)
def test_a_forward_pass_with_any_entry_in_its_place(cache, entry) -> None:
    """Under the very key that the layer asks for."""
    cache.unlink(missing_ok=True)
    tuning.shared = tuning.TuningCache()
    machine, key = real_key(cache)
    cache.write_text(json.dumps({"format": 1, "machines": {machine: {key: entry}}}))
    tuning.shared = tuning.TuningCache()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert forward().isfinite().all()
    assert tuning.read_cache(cache)[1] is None


def test_good_entries_are_kept(cache) -> None:
    cache.write_text(holds({"kernel": "direct", "seconds": {"direct": 1}, "again": 2, "newer": "field"}))
    entry = tuning.TuningCache().get("m", "p")
    assert entry == {"kernel": "direct", "seconds": {"direct": 1.0}, "again": 2}


def test_what_cannot_be_read_again_is_not_written(cache) -> None:
    """A clock that stood still must not have the whole file ignored."""
    tuning.shared.put("m", "p", "direct", {"direct": 0.0})
    tuning.shared.put("m", "q", "direct", {"direct": 1.0})
    tuning.shared.put("m", "r", "direct", {"direct": float("nan")})
    assert tuning.shared.get("m", "p") == {"kernel": "direct", "seconds": {"direct": 0.0}}
    machines, damage = tuning.read_cache(cache)
    assert (machines, damage) == ({"m": {"q": GOOD}}, None)
    assert tuning.shared.forget("m", ["p", "r"]) == 0
    assert tuning.shared.get("m", "p") is None


def test_a_huge_file(cache) -> None:
    with cache.open("wb") as file:
        file.truncate(1 << 40)  # sparse
    assert ["larger than" in told for told in used()] == [True]


IN_PLACE = {
    "fifo": lambda path: os.mkfifo(path),
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "null device": lambda path: path.symlink_to("/dev/null"),
    "directory": lambda path: path.mkdir(),
    "link to itself": lambda path: path.symlink_to(path),
    "link to nowhere": lambda path: path.symlink_to(path.with_name("none") / "none"),
}
SCRIPT = r"""
import re, warnings, torch, r3d_kernels as r3d
from r3d_kernels import tuning
warnings.simplefilter("ignore")
with torch.inference_mode():
    r3d.ConvBNAct3d(4, 8, 3, 1, 1).eval()(torch.randn(1, 4, 2, 5, 5))
with tuning.Attempt("a kernel") as attempt:
    pass
for tidy in (lambda: tuning.shared.forget("m", ["p"]), tuning.shared.clear):
    try:
        tidy()
    except OSError:
        pass
from r3d_kernels.cli import main
main(["doctor", "--json"])
# KiB; getrusage would tell of the parent's memory at the fork, too
assert int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) < 2 << 20
"""


@FIFOS
@pytest.mark.parametrize("kind", IN_PLACE)
def test_what_is_no_regular_file_is_not_opened(cache, kind) -> None:
    """In place of the cache, its lock, and the trace of an attempt: in a process that may hang or grow."""
    for path in (cache, cache.with_suffix(".lock"), tuning.Attempt("a kernel").path):
        IN_PLACE[kind](path)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd="/", timeout=120, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\n", b"\n", b"x" * 100_000], ids=["no UTF-8", "empty line", "long"]
)
def test_any_trace_of_an_attempt(cache, content) -> None:
    from r3d_kernels.cli import doctor

    path = tuning.Attempt("a kernel").path
    path.write_bytes(content)
    with tuning.Attempt("a kernel") as attempt:
        assert attempt.earlier == path
    assert path.read_bytes() == content
    (told,) = doctor._tuning_cache()["not_survived"]
    assert len(told) < 300 + len(str(path))


def test_a_file_in_place_of_the_folder(monkeypatch, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("R3D_KERNELS_TUNE", "1")
    monkeypatch.setenv("R3D_KERNELS_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(tuning, "shared", tuning.TuningCache())
    with pytest.warns(UserWarning, match="tuning cache"):
        forward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        forward()
    with tuning.Attempt("a kernel") as attempt:
        assert attempt.earlier is None


def test_leftovers_of_killed_processes_are_swept(cache) -> None:
    for name in ("tuning-v1.jsonabc.tmp", "tuning-v1.json_1x.tmp"):
        cache.with_name(name).write_text("half")
    others = [cache.with_name(name) for name in ("tuning-v1.json.bak", "other.tmp")]
    for other in others:
        other.write_text("mine")
    tuning.shared.put("m", "p", "direct", {"direct": 1.0})
    names = {path.name for path in cache.parent.iterdir()}
    assert names == {cache.name, cache.with_suffix(".lock").name, *(other.name for other in others)}


def test_nothing_is_swept_without_a_lock(cache, monkeypatch) -> None:
    import fcntl

    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    aside = cache.with_name("tuning-v1.jsonabc.tmp")
    aside.write_text("of somebody who is writing")
    tuning.shared.put("m", "p", "direct", {"direct": 1.0})
    assert aside.exists()


@pytest.mark.parametrize("variable", ["R3D_KERNELS_CACHE", "XDG_CACHE_HOME"])
def test_the_tilde_is_the_home(monkeypatch, tmp_path, variable) -> None:
    monkeypatch.delenv("R3D_KERNELS_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(variable, "~/x")
    assert tuning.cache_path().is_relative_to(tmp_path / "x")
    monkeypatch.setenv(variable, "/a~/x")
    assert tuning.cache_path().is_relative_to("/a~/x")


def test_bad_entries_do_not_take_the_good_ones_along(cache) -> None:
    entries = {"a": GOOD, "b": {**GOOD, "seconds": None}, "c": 3, "d": GOOD}
    cache.write_text(json.dumps({"format": 1, "machines": {"m": entries, "n": [], "o": {"e": GOOD}}}))
    with pytest.warns(UserWarning, match=r"is ignored in part: b: seconds: .* \(and 2 more\)"):
        assert tuning.shared.get("m", "d") == GOOD
    tuning.shared.put("m", "f", "direct", {"direct": 1.0})
    good = {"m": {"a": GOOD, "d": GOOD, "f": GOOD}, "o": {"e": GOOD}}
    assert tuning.read_cache(cache) == (good, None)


@pytest.mark.parametrize("variable", ["R3D_KERNELS_CACHE", "XDG_CACHE_HOME", "HOME"])
def test_no_such_home(monkeypatch, tmp_path, variable) -> None:
    """Nothing is made whose name begins with a tilde; a forward pass goes on, and a user who asks is told."""
    for name in ("R3D_KERNELS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    if variable == "HOME":
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # a user without a line in /etc/passwd
    else:
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setenv(variable, "~no-such-user/x")
    monkeypatch.setenv("R3D_KERNELS_TUNE", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tuning, "shared", tuning.TuningCache())
    if variable == "XDG_CACHE_HOME":  # is not absolute, and so to be ignored
        assert tuning.cache_path().is_relative_to(tmp_path / "home" / ".cache")
        return
    with pytest.warns(UserWarning, match="is ignored: .*there is no such home"):
        forward()
    with pytest.raises(OSError, match="there is no such home"):
        tuning.check_writable()
    assert tuning.shared.clear() == 0
    with tuning.Attempt("a kernel") as attempt:
        assert attempt.earlier is None
    assert list(tmp_path.iterdir()) == []


def test_a_relative_folder_is_of_the_current_one(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("R3D_KERNELS_CACHE", "x")
    monkeypatch.chdir(tmp_path)
    shared = tuning.TuningCache()
    shared.put("m", "p", "direct", {"direct": 1.0})
    assert (tmp_path / "x" / "tuning-v1.json").exists()
    (tmp_path / "y").mkdir()
    monkeypatch.chdir(tmp_path / "y")
    assert shared.get("m", "p") is None  # another file
    monkeypatch.setenv("R3D_KERNELS_CACHE", "")
    assert tuning.cache_path().parent.name == "r3d_kernels"


def test_a_current_folder_that_is_gone(monkeypatch, tmp_path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setenv("R3D_KERNELS_TUNE", "1")
    monkeypatch.setenv("R3D_KERNELS_CACHE", "x")
    monkeypatch.setattr(tuning, "shared", tuning.TuningCache())
    with pytest.warns(UserWarning, match="is ignored: .*there is no such home or current folder"):
        forward()


def test_a_stopped_process_that_has_the_lock(cache, monkeypatch) -> None:
    """It is waited for once, for so long, and what was measured is written when the lock is free."""
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(tuning, "_LONGEST_WAIT", 0.2)
    tuning.shared = tuning.TuningCache()
    with open(cache.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        begin = time.monotonic()
        for name in "abcdefgh":
            tuning.shared.put("m", name, "direct", {"direct": 1.0})
        assert 0.2 <= time.monotonic() - begin < 1.0
        assert tuning.shared.get("m", "a") == GOOD
        with pytest.raises(OSError, match="locked by another process"):
            tuning.shared.forget("m", ["z"])
    assert not cache.exists()
    tuning.shared.put("m", "i", "direct", {"direct": 1.0})
    assert set(tuning.read_cache(cache)[0]["m"]) == set("abcdefghi")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_forked_during_a_write_does_not_keep_the_lock(cache, monkeypatch) -> None:
    pytest.importorskip("fcntl")
    replace, children = os.replace, []

    def forking(*args) -> None:
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
            os._exit(0)
        children.append(pid)
        replace(*args)

    monkeypatch.setattr(os, "replace", forking)
    tuning.shared.put("m", "p", "direct", {"direct": 1.0})
    try:
        with open(cache.with_suffix(".lock"), "rb+") as lock:
            assert tuning._try_lock(lock)
    finally:
        for pid in children:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
    assert len(children) == 1


KILLED = """
import os, signal, sys
from r3d_kernels import tuning
real = os.fdopen
class Half:  # writes a little, and is killed
    def __init__(self, file): self.file, self.left = file, int(sys.argv[1])
    def __enter__(self): return self
    def __exit__(self, *error): self.file.close()
    def write(self, text):
        self.left -= 1
        if self.left < 0:
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        self.file.write(text)
os.fdopen = lambda *args, **more: Half(real(*args, **more))
tuning.shared.put("m", "q", "direct", {"direct": 1.0})
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no signals")
@pytest.mark.parametrize("writes", [0, 1, 10])
def test_killed_in_the_middle_of_a_write(cache, writes) -> None:
    """The old file is whole, and the next write sweeps what is left."""
    tuning.shared.put("m", "p", "direct", {"direct": 1.0})
    before = cache.read_bytes()
    done = subprocess.run([sys.executable, "-c", KILLED, str(writes)], cwd="/", timeout=120)
    assert done.returncode == -9
    assert cache.read_bytes() == before
    assert len(list(cache.parent.glob("*.tmp"))) == 1
    tuning.shared.put("m", "r", "direct", {"direct": 1.0})
    assert list(cache.parent.glob("*.tmp")) == []
    assert tuning.read_cache(cache) == ({"m": {"p": GOOD, "r": GOOD}}, None)


def test_one_trace_that_cannot_be_read_does_not_hide_the_others(cache) -> None:
    from r3d_kernels.cli import doctor

    cache.with_name("trying-a.txt").mkdir()
    cache.with_name("trying-b.txt").write_text("a kernel\nremove")
    told = doctor._tuning_cache()["not_survived"]
    assert [text.split(" (")[0] for text in told] in (["not a regular file", "a kernel"], ["a kernel"])
