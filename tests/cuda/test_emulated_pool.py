"""The very source of csrc/cuda/pool.cu, run on the CPU: max-pool against torch, head against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_keeps_promise

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
WINDOWS = (
    ((3, 3, 3), (2, 2, 2), (1, 1, 1)),
    ((1, 3, 3), (1, 2, 2), (0, 1, 1)),
    ((2, 1, 4), (1, 3, 2), (1, 0, 2)),
    ((1, 1, 1), (2, 1, 3), (0, 0, 0)),
)


def channels_last(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous(memory_format=torch.channels_last_3d)


def pool(emu, x: torch.Tensor, window) -> torch.Tensor:
    want = F.max_pool3d(x.float(), *window)
    y = channels_last(torch.full_like(want, 7.0, dtype=x.dtype))
    emu.max_pool3d(list(x.shape), *map(list, window), CODES[x.dtype], x.data_ptr(), y.data_ptr())
    return y


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_max_pool_is_torchs(emu80, dtype, window):
    for shape in ((2, 64, 4, 7, 6), (1, 45, 3, 5, 9), (3, 8, 2, 2, 4), (1, 1, 3, 3, 4)):
        x = channels_last(torch.randn(shape).to(dtype))
        y = pool(emu80, x, window)
        assert torch.equal(y, F.max_pool3d(x.float(), *window).to(dtype))


@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("channels", [5, 8])
def test_nan_wins_and_infinities_stay(emulated80, dtype, channels):
    x = torch.randn(2, channels, 4, 6, 6)
    x.view(-1)[::7] = float("nan")
    x.view(-1)[1::5] = -float("inf")
    x.view(-1)[2::11] = float("inf")
    x[1] = -float("inf")
    x = channels_last(x.to(dtype))
    want = F.max_pool3d(x.float(), *WINDOWS[0]).to(dtype)
    assert want.isnan().any()
    assert not want.isnan().all()
    torch.testing.assert_close(pool(emulated80, x, WINDOWS[0]), want, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("window", WINDOWS[:2], ids=str)
def test_max_pool_of_many_rows_and_columns(emulated80, dtype, window):
    """Several strips of output rows, more columns than a block has threads, tails on every side, NaN."""
    for shape in ((1, 8, 3, 33, 5), (1, 136, 1, 4, 37), (2, 16, 5, 30, 29), (1, 264, 2, 29, 3)):
        x = torch.randn(shape)
        x.view(-1)[:: shape[1] * 5] = float("nan")
        x = channels_last(x.to(dtype))
        want = F.max_pool3d(x.float(), *window).to(dtype)
        torch.testing.assert_close(pool(emulated80, x, window), want, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_misaligned_pointers(emulated80, dtype):
    x = channels_last(torch.randn(1, 16, 3, 5, 5).to(dtype))
    moved = torch.empty(x.numel() + 1, dtype=dtype)[1:].as_strided(x.shape, x.stride()).copy_(x)
    assert moved.data_ptr() % 16
    assert torch.equal(pool(emulated80, moved, WINDOWS[0]), pool(emulated80, x, WINDOWS[0]))


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_head_against_float64(emu80, dtype):
    for n, c, size, classes in ((2, 512, (1, 3, 3), 19), (1, 45, (2, 2, 5), 8), (3, 8, (1, 1, 1), 1)):
        x = channels_last(torch.randn(n, c, *size).to(dtype))
        weight, bias = torch.randn(classes, c).to(dtype), torch.randn(classes).to(dtype)
        for b in (bias, None):
            y = torch.full((n, classes), float("nan"), dtype=dtype)
            emu80.avg_pool_linear(
                n, c, x[0, 0].numel(), classes, CODES[dtype], x.data_ptr(), weight.data_ptr(),
                0 if b is None else b.data_ptr(), y.data_ptr(),
            )  # fmt: skip
            mean = x.double().mean((2, 3, 4))
            exact = F.linear(mean, weight.double(), None if b is None else b.double())
            stock = F.linear(mean.to(dtype).float(), weight.float(), None if b is None else b.float()).to(
                dtype
            )
            size_of_terms = float((mean.abs() @ weight.double().abs().T).norm())
            assert_keeps_promise(y, exact, stock, magnitude=size_of_terms)


def test_a_missing_barrier_shows(emulated80, timings):
    """The warps' sums are added behind the kernel's only barrier."""
    x = channels_last(torch.randn(1, 64, 1, 4, 4))
    weight, wrong = torch.randn(3, 64), []
    exact = F.linear(x.mean((2, 3, 4)), weight)
    for timing in timings:
        emulated80.configure(*timing, skip_barrier=0)
        y = torch.empty(1, 3)
        emulated80.avg_pool_linear(1, 64, 16, 3, 0, x.data_ptr(), weight.data_ptr(), 0, y.data_ptr())
        wrong.append(not torch.allclose(y, exact, atol=1e-5))
    emulated80.configure()
    assert any(wrong)
