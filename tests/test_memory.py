"""Memory that nobody uses is given back; results are compared on as little of a layer as tells enough."""

from __future__ import annotations

import gc
import sys

import pytest
import torch

import r3d_kernels as r3d
from r3d_kernels import _cpu, ops
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
