"""Several models in several threads, DataLoader workers, forks: right results, no deadlock, no more threads than told.

Everything that forks or counts threads runs in a process of its own, with a time limit: a deadlock is a failure.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

import r3d_kernels as r3d
from r3d_kernels import _fork, backends, tuning

ROOT = str(Path(r3d.__file__).parents[1])
LIMIT = 300  # seconds: these take a few on an idle machine


def networks(count: int = 3) -> list[r3d.ResNet3D]:
    """Different networks whose convolutions have the same shapes here and there."""
    stems = ("hara", "torchvision", "seed18")
    torch.manual_seed(0)
    return [
        r3d.ResNet3D(5, depth=10, stem=stems[i % 3], widen_factor=0.5, fused=True).eval()
        for i in range(count)
    ]


def clips(count: int) -> list[torch.Tensor]:
    return [
        torch.randn(1 + i % 2, 3, 4 + i % 3, 24, 24, generator=torch.Generator().manual_seed(i))
        for i in range(count)
    ]


def together(jobs: list) -> None:
    """Runs callables at once; raises what any of them raised, and where one does not come back."""
    errors, start = [], threading.Barrier(len(jobs))

    def guarded(job) -> None:
        try:
            start.wait(30)
            job()
        except BaseException as e:
            errors.append(e)

    # daemons: a thread that hangs must not keep pytest from ending
    threads = [threading.Thread(target=guarded, args=(job,), daemon=True) for job in jobs]
    for t in threads:
        t.start()
    for t in threads:
        t.join(LIMIT)
    assert not any(t.is_alive() for t in threads), "deadlock"
    if errors:
        raise errors[0]


def script(code: str, **environment: str) -> str:
    """What a fresh Python prints; fails where it fails, crashes or hangs."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        cwd=ROOT,  # not the checkout, which may hold the package without its library
        env={**os.environ, "PYTHONPATH": ROOT, **environment},
    )
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-3000:])
    return done.stdout


# ---- threads of one process ----


@pytest.mark.parametrize("backend", ["cpu", "auto"])
@pytest.mark.parametrize("intraop", [1, 2])
def test_threads_give_the_bits_of_a_single_one(backend: str, intraop: int) -> None:
    """One model for all threads and each its own, packed and planned while others do the same."""
    torch.set_num_threads(intraop)
    inputs = clips(6)
    with torch.inference_mode(), r3d.backend(backend):
        want = [[model(x) for x in inputs] for model in networks()]
    fresh = networks()  # nothing is packed yet

    def job(offset: int) -> None:
        torch.set_num_threads(intraop)
        with torch.inference_mode(), r3d.backend(backend):
            for step in range(2 * len(fresh) * len(inputs)):
                m, i = (step + offset) % len(fresh), (step * 5 + offset) % len(inputs)
                assert torch.equal(fresh[m](inputs[i]), want[m][i])

    together([lambda k=k: job(k) for k in range(4)])


def test_threads_may_ask_for_different_backends() -> None:
    torch.set_num_threads(1)
    model, x = networks(1)[0], clips(1)[0]
    want = {}
    for name in ("cpu", "torch"):
        with torch.inference_mode(), r3d.backend(name):
            want[name] = model(x)

    def job(name: str) -> None:
        torch.set_num_threads(1)
        with torch.inference_mode(), r3d.backend(name):
            for _ in range(20):
                assert torch.equal(model(x), want[name])

    together([lambda n=name: job(n) for name in ("cpu", "torch", "cpu", "torch")])


def test_measuring_in_several_threads_at_once(monkeypatch, tmp_path) -> None:
    """Every layer is measured once, by whoever comes first, and never two at a time."""
    monkeypatch.setenv("R3D_KERNELS_TUNE", "1")
    monkeypatch.setenv("R3D_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "shared", tuning.TuningCache())
    measured, at_once, real = [], threading.Lock(), backends.measure

    def watched(kernels, packs, x, residual, request):
        assert at_once.acquire(blocking=False), "two layers are measured at once"
        try:
            measured.append(str(request))
            return real(kernels, packs, x, residual, request)
        finally:
            at_once.release()

    monkeypatch.setattr(backends, "measure", watched)
    torch.set_num_threads(1)
    models, x = networks(2), clips(1)[0]

    def job(model: r3d.ResNet3D) -> None:
        torch.set_num_threads(1)
        with torch.inference_mode():
            model(x)

    together([lambda m=model: job(m) for model in models + models])
    assert len(measured) == len(set(measured)) > 10
    with torch.inference_mode():
        for model in models:
            model(x)
    assert len(measured) == len(set(measured))


# ---- the number of threads ----


COUNT = """
import os, threading, time, torch
import r3d_kernels as r3d

def tasks():
    return len(os.listdir("/proc/self/task"))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads through /proc")
def test_threads_stay_as_many_as_torch_was_told() -> None:
    """Four callers of two threads each: eight at most at work, and none is left over from callers that ended."""
    out = script(
        COUNT
        + """
torch.set_num_threads(2)
models = [r3d.ResNet3D(5, depth=10, widen_factor=0.25, fused=True).eval() for _ in range(4)]
x = torch.randn(1, 3, 4, 24, 24)
with torch.inference_mode():
    models[0](x)
before, most, after = tasks(), 0, []

def job(model):
    global most
    with torch.inference_mode():
        for _ in range(10):
            model(x)
            most = max(most, tasks())

for wave in range(6):
    threads = [threading.Thread(target=job, args=(m,)) for m in models]
    for t in threads: t.start()
    for t in threads: t.join()
    end = time.monotonic() + 60  # a thread that has ended may take a moment to vanish, on a busy machine
    while tasks() > before and time.monotonic() < end:
        time.sleep(0.01)
    after.append(tasks())
print(before, most, *after)
"""
    )
    before, most, *after = map(int, out.split())
    assert most <= before + 4 * 2
    assert after == [before] * 6


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads through /proc")
def test_one_thread_is_one_thread() -> None:
    out = script(
        COUNT
        + """
torch.set_num_threads(1)
model = r3d.ResNet3D(5, depth=10, widen_factor=0.25, fused=True).eval()
x = torch.randn(2, 3, 4, 32, 32)
before = tasks()
with torch.inference_mode():
    for backend in ("cpu", "auto"):
        with r3d.backend(backend):
            model(x)
print(before, tasks())
"""
    )
    before, now = map(int, out.split())
    assert now == before


# ---- other processes ----


WORKER = """
import os, sys, torch
import r3d_kernels as r3d
from torch.utils.data import DataLoader, Dataset

def tasks():
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0

def build():
    torch.manual_seed(0)
    return r3d.ResNet3D(5, depth=10, stem="hara", widen_factor=0.5, fused=True).eval()

def clip(i):
    return torch.randn(1, 3, 4, 24, 24, generator=torch.Generator().manual_seed(i))

class Features(Dataset):
    def __init__(self, model):
        self.model = model
    def __len__(self):
        return 8
    def __getitem__(self, i):
        before = tasks()
        with torch.inference_mode(), r3d.backend("cpu"):
            y = self.model(clip(i))[0]
        return y.clone(), torch.get_num_threads(), tasks() - before
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("used_before", [False, True])
def test_dataloader_workers(method: str, used_before: bool, tmp_path) -> None:
    """The bits of the main process, from workers of one thread that start no others."""
    file = tmp_path / "worker_test.py"  # spawned workers import it
    file.write_text(
        WORKER
        + f"""
if __name__ == "__main__":
    torch.set_num_threads(2)
    model = build()
    with torch.inference_mode(), r3d.backend("cpu"):
        want = [build()(clip(i))[0] for i in range(8)] if {used_before} else None
        if {used_before}:
            model(clip(0))
    loader = DataLoader(Features(model), batch_size=2, num_workers=2, multiprocessing_context={method!r}, timeout=200)
    got = [batch for _ in range(2) for batch in loader]
    if want is None:
        with torch.inference_mode(), r3d.backend("cpu"):
            want = [build()(clip(i))[0] for i in range(8)]
    for k, (y, threads, added) in enumerate(got):
        i = 2 * k % 8
        assert torch.equal(y, torch.stack(want[i : i + 2])), k
        assert threads.tolist() == [1, 1]
        if k % 4 < 2:  # the first batch of its worker: the thread that sends results back comes after it
            assert added.tolist() == [0, 0], k
    print("right")
"""
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", str(file)],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": ROOT},
    )
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr[-3000:]


def test_fork_after_use() -> None:
    """OpenMP's threads do not survive a fork: the child computes with one instead of waiting for the others."""
    out = script(
        WORKER
        + """
import signal
torch.set_num_threads(2)
model = build()
with torch.inference_mode():
    want = [model(clip(i)) for i in range(3)]
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            signal.alarm(200)
            with torch.inference_mode():
                right = all(torch.equal(model(clip(i)), want[i]) for i in range(3))
                right = right and build()(clip(5)).isfinite().all().item()  # packs and plans of its own
            os._exit(0 if right and torch.get_num_threads() == 1 else 3)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    print(torch.equal(model(clip(0)), want[0]), torch.get_num_threads())
"""
    )
    assert out.split() == ["0", "0", "0", "True", "2"]


def test_fork_before_use_keeps_the_threads() -> None:
    """As in a server that builds the model, forks its workers and computes in these only."""
    out = script(
        WORKER
        + """
import signal
torch.set_num_threads(2)
model = build()
pid = os.fork()
if pid == 0:
    signal.alarm(200)
    with torch.inference_mode():
        model(clip(0))
    os._exit(torch.get_num_threads())
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    )
    assert out.split() == ["2"]


def test_fork_while_another_thread_is_measuring() -> None:
    """The locks that the other thread holds are free in the child."""
    out = script(
        WORKER
        + """
import signal, threading
from r3d_kernels import backends
torch.set_num_threads(1)
inside, go_on = threading.Event(), threading.Event()
real = backends.measure

def slow(*args):
    inside.set()
    go_on.wait(200)
    return real(*args)

backends.measure = slow
model = build()

def use():
    with torch.inference_mode():
        model(clip(0))

other = threading.Thread(target=use)
other.start()
assert inside.wait(200)
pid = os.fork()
if pid == 0:
    signal.alarm(200)
    backends.measure = real
    use()
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
go_on.set()
other.join()
use()
""",
        R3D_KERNELS_TUNE="1",
    )
    assert out.split() == ["0"]


def test_lock() -> None:
    lock, held, let_go = _fork.Lock(), threading.Event(), threading.Event()
    with lock, lock:  # reentrant
        pass

    def hold() -> None:
        with lock:
            held.set()
            let_go.wait(30)

    other = threading.Thread(target=hold)
    other.start()
    assert held.wait(30)
    assert not lock._lock.acquire(blocking=False)
    let_go.set()
    other.join()
    assert lock._lock.acquire(blocking=False)
    lock._lock.release()
