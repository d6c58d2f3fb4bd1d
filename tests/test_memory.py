"""Memory that nobody uses is given back; results are compared on as little of a layer as tells enough."""

from __future__ import annotations

import gc
import sys

import pytest
import torch

import r3d_kernels as r3d
from r3d_kernels import _cpu, _extension, ops
from r3d_kernels._kernel import Request
from r3d_kernels._layer import LayerState
from r3d_kernels._race import corner
from r3d_kernels.problems import ConvProblem

MIB = 1 << 20

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc; glibc's allocator")


def resident_mib() -> float:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096 / MIB


def test_free_memory_is_released() -> None:
    x = torch.ones(1, 64, 40, 64, 64).contiguous(memory_format=torch.channels_last_3d)
    ops.max_pool3d(x, 1, 1, 0)
    _cpu.release_free_memory()
    before = resident_mib()
    outputs = [ops.max_pool3d(x, 1, 1, 0) for _ in range(5)]
    living = outputs.pop()
    del outputs
    assert resident_mib() > before + 150  # it waits to be used again
    _cpu.release_free_memory()
    assert resident_mib() < before + 40 + 20
    assert (living == 1).all()
    _cpu.release_free_memory()  # with nothing to release


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3), (5, 3, 3)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
def test_a_corner_is_that_of_the_whole(kernel, stride, padding, dilation, monkeypatch) -> None:
    monkeypatch.setattr("r3d_kernels._race._MOST_UNFOLDED", 1 << 12)
    p = ConvProblem(
        1,
        4,
        13,
        9,
        8,
        k=5,
        kernel=kernel,
        stride=(stride, 1, 1),
        padding=(padding, 1, 1),
        dilation=(dilation, 1, 1),
        residual=True,
    ).validate()
    # whole numbers: no order of additions changes their sum
    x, weight = torch.randint(-9, 9, p.in_shape).float(), torch.randint(-9, 9, (5, 4, *kernel)).float()
    residual = torch.randn(p.out_shape)

    def conv(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return torch.conv3d(x, weight, None, p.stride, p.padding, p.dilation) + residual

    request = Request(p, torch.float32, torch.device("cpu"), 1)
    part, cut, rest, (d, h) = corner(x, residual, request)
    assert cut.shape == part.problem.in_shape
    assert rest is not None
    assert rest.shape == part.problem.out_shape
    assert 1 <= d <= part.problem.out_size[0]
    assert 1 <= h <= part.problem.out_size[1]
    assert part.problem.macs < p.macs
    torch.testing.assert_close(conv(cut, rest)[:, :, :d, :h], conv(x, residual)[:, :, :d, :h])


def test_nothing_waits_once_the_last_layer_is_gone() -> None:
    layers = [r3d.ConvBNAct3d(16, 64, 3, 1, 1).eval()]
    x = torch.randn(1, 16, 16, 48, 48)
    with torch.inference_mode():
        layers[0](x)
        with_output = resident_mib()
        del layers[0]
        gc.collect()
    others = [o for o in gc.get_objects() if isinstance(o, LayerState)]
    if not others:  # of other tests
        assert resident_mib() < with_output - 64 * 16 * 48 * 48 * 4 / MIB / 2
    assert LayerState._living == len(others)


LARGE = {
    "conv": lambda x: r3d.ConvBNAct3d(8, 64, 3, padding=1).eval()(x),
    "winograd": lambda x: r3d.ConvBNAct3d(64, 64, 3, padding=1).eval()(x.repeat(1, 8, 1, 1, 1)),
    "stem": lambda x: r3d.ConvBNAct3d(3, 64, 7, padding=3).eval()(x[:, :3]),
    "max_pool": lambda x: ops.max_pool3d(x.repeat(1, 8, 1, 1, 1), 1, 1, 0),
    "bn_act": lambda x: ops.bn_act(x.repeat(1, 8, 1, 1, 1), torch.ones(64), torch.zeros(64)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE)
def test_large_outputs_are_like_any_other_tensor(make, dtype, tmp_path) -> None:
    """What is made of recycled memory grows, shrinks, is freed, shared, saved and copied lazily."""
    assert _extension.not_resizable is None
    x = torch.randn(1, 8, 16, 30, 30)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        first = make(x if dtype == torch.float32 else x.bfloat16())
        want, strides = first.clone(), first.stride()
        assert first.dtype == dtype
        assert first.nbytes >= MIB
        assert first.untyped_storage().nbytes() == first.nbytes  # not what a larger block would have
        torch.save(first, tmp_path / "y.pt")
        assert torch.equal(torch.load(tmp_path / "y.pt"), want)
        first.resize_(0)
        assert torch.equal(torch.cat([want, want], out=first), torch.cat([want, want]))
        for change in (
            lambda t: t.resize_(3 * t.numel()),
            lambda t: t.untyped_storage().resize_(0),
            lambda t: t.share_memory_(),
            lambda t: torch._lazy_clone(t),
        ):
            y = make_again(want, strides)
            other = change(y)
            del y
            again = make_again(want, strides)  # perhaps of the same memory
            again.zero_()
            if isinstance(other, torch.Tensor) and other.numel() == want.numel():
                assert torch.equal(other, want)


def make_again(want: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    y = ops.bn_act(want, torch.ones(want.shape[1]), torch.zeros(want.shape[1]), activation=None)
    assert y.stride() == strides
    assert torch.equal(y, want)
    return y


def test_a_library_for_another_torch_is_not_used(monkeypatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.99.1")
    assert "this is torch 2.99.1" in str(_extension._make_outputs_resizable())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "was not compiled" in str(_extension._make_outputs_resizable())
