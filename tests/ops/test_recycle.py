"""Large outputs on a CPU come from recycled memory: never shared by two living tensors, bounded when idle."""

from __future__ import annotations

import copy
import pickle
import sys
import threading

import pytest
import torch

from r3d_kernels import ops

MIB = 1 << 20


def output(mib: int, value: float = 1.0) -> torch.Tensor:
    """A fresh [1, 64, mib, 64, 64] of `value`, computed: `mib` MiB."""
    x = torch.full((1, 64, mib, 64, 64), value).contiguous(memory_format=torch.channels_last_3d)
    return ops.max_pool3d(x, 1, 1, 0)


def resident_mib() -> float:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096 / MIB


def test_memory_is_handed_on_only_when_it_is_free() -> None:
    a, b = output(3, 1.0), output(3, 2.0)
    assert a.data_ptr() != b.data_ptr()
    view, where = a[:, :8], a.data_ptr()
    del a
    c = output(3, 3.0)  # the view keeps a's memory
    assert c.data_ptr() != where
    assert (view == 1).all()
    assert (b == 2).all()
    assert (c == 3).all()
    del view
    assert output(3).data_ptr() == where  # and now it is free
    assert where % 64 == 0


def test_many_living_outputs() -> None:
    outputs = [output(1, float(i)) for i in range(40)]
    assert len({y.data_ptr() for y in outputs}) == 40
    assert all((y == i).all() for i, y in enumerate(outputs))


def test_small_outputs_do_not_hold_large_memory() -> None:
    large = output(33)
    where = large.data_ptr()
    del large
    assert output(2).data_ptr() != where


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_idle_memory_is_bounded() -> None:
    before = resident_mib()
    outputs = [output(40) for _ in range(12)]
    assert resident_mib() > before + 12 * 40 - 50
    del outputs
    assert resident_mib() < before + 256 + 40


def test_outputs_are_ordinary_tensors() -> None:
    y = output(2, 5.0)
    for other in (copy.deepcopy(y), pickle.loads(pickle.dumps(y)), y.clone(), y.contiguous()):
        assert torch.equal(other, y)
        assert other.data_ptr() != y.data_ptr()
    z = y.detach().requires_grad_()
    (z * 2).sum().backward()
    assert (z.grad == 2).all()
    y.share_memory_()
    assert y.is_shared()
    assert (y == 5).all()
    assert y.numpy().shape == tuple(y.shape)


def test_threads() -> None:
    wrong = []

    def work(value: float) -> None:
        for i in range(30):
            kept = [output(1 + i % 3, value + j) for j in range(3)]
            wrong.extend(1 for j, y in enumerate(kept) if not (y == value + j).all())

    threads = [threading.Thread(target=work, args=(10.0 * i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
