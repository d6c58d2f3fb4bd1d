"""Max-pool, head and batch-norm application against torch and float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_keeps_promise, relative_error

from r3d_kernels import backends, ops, reference

ISAS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")
USABLE = ISAS[: ISAS.index(backends.describe()["best_isa"]) + 1]
DTYPES = (torch.float32, torch.bfloat16)
CHANNELS = (1, 3, 7, 8, 16, 17, 45, 64, 230)


@pytest.fixture(params=USABLE)
def isa(request, monkeypatch):
    monkeypatch.setenv("R3D_KERNELS_ISA", request.param)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("channels", CHANNELS)
def test_every_instruction_set(channels: int, dtype: torch.dtype, isa: str) -> None:
    x = torch.randn(2, channels, 5, 9, 7).to(dtype)
    assert torch.equal(ops.max_pool3d(x, 3, 2, 1), F.max_pool3d(x, 3, 2, 1))

    weight, bias = torch.randn(11, channels).to(dtype) / channels**0.5, torch.randn(11).to(dtype)
    y = ops.avg_pool_linear(x + 1, weight, bias)
    exact = reference.avg_pool_linear((x + 1).double(), weight.double(), bias.double())
    assert_keeps_promise(y, exact)

    scale, shift, r = torch.randn(channels), torch.randn(channels), torch.randn_like(x)
    for residual, act in ((None, "relu"), (r, "relu"), (r, None)):
        y = ops.bn_act(x, scale, shift, residual, act)
        assert y.is_contiguous(memory_format=torch.channels_last_3d)
        wide = None if residual is None else residual.double()
        assert_keeps_promise(y, reference.bn_act(x.double(), scale.double(), shift.double(), wide, act))


@st.composite
def pools(draw: st.DrawFn) -> tuple:
    kernel = tuple(draw(st.integers(1, 4)) for _ in range(3))
    return (
        draw(st.integers(0, 2)),
        draw(st.sampled_from(CHANNELS[:7])),
        tuple(draw(st.integers(k, 9)) for k in kernel),
        kernel,
        tuple(draw(st.integers(1, 3)) for _ in range(3)),
        tuple(draw(st.integers(0, k // 2)) for k in kernel),
    )


@given(pools(), st.sampled_from([*DTYPES, torch.float16, torch.float64]))
def test_max_pool_of_any_geometry(pool: tuple, dtype: torch.dtype) -> None:
    n, c, size, kernel, stride, padding = pool
    x = torch.randn(n, c, *size).to(dtype)
    y = ops.max_pool3d(x, kernel, stride, padding)
    if n:
        assert torch.equal(y, F.max_pool3d(x, kernel, stride, padding))
    else:
        assert y.shape[0] == 0
        assert y.shape[1:] == F.max_pool3d(x.new_zeros(1, c, *size), kernel, stride, padding).shape[1:]


def test_max_pool_of_nan_and_infinity(isa: str) -> None:
    x = torch.randn(1, 19, 3, 6, 6)
    x[0, 2, 1, 2, 3] = float("nan")
    x[0, 4] = float("-inf")
    x[0, 5, 0, 0, 0] = float("inf")
    for dtype in DTYPES:
        y, want = ops.max_pool3d(x.to(dtype), 3, 2, 1), F.max_pool3d(x.to(dtype), 3, 2, 1)
        assert torch.equal(y.isnan(), want.isnan())
        assert torch.equal(y.nan_to_num(7), want.nan_to_num(7))


@pytest.mark.parametrize("layout", ["NCDHW", "slice"])
def test_non_contiguous(layout: str) -> None:
    x = torch.randn(2, 10, 4, 6, 6)
    x = x if layout == "NCDHW" else x[:, 1:8, :, ::2, 1:]
    c = x.shape[1]
    weight, scale, shift = torch.randn(5, c), torch.rand(c), torch.rand(c)
    dense = x.contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(ops.max_pool3d(x, 2), ops.max_pool3d(dense, 2))
    assert torch.equal(ops.avg_pool_linear(x, weight), ops.avg_pool_linear(dense, weight))
    assert torch.equal(
        ops.avg_pool_linear(x, weight.t().contiguous().t()), ops.avg_pool_linear(dense, weight)
    )
    assert torch.equal(ops.bn_act(x, scale, shift, x), ops.bn_act(dense, scale, shift, dense))


def test_empty_batch() -> None:
    x = torch.zeros(0, 8, 4, 6, 6)
    assert ops.max_pool3d(x, 3, 2, 1).shape == (0, 8, 2, 3, 3)
    assert ops.avg_pool_linear(x, torch.zeros(5, 8)).shape == (0, 5)
    assert ops.bn_act(x, torch.zeros(8), torch.zeros(8)).shape == x.shape


def test_average_of_many_pixels_keeps_its_digits() -> None:
    """A plain float32 sum over a quarter of a million ones-and-a-bit would lose five digits."""
    x = (1 + 1e-3 * torch.randn(1, 4, 64, 64, 64)).to(memory_format=torch.channels_last_3d)
    weight = torch.eye(4)
    y = ops.avg_pool_linear(x, weight)
    assert relative_error(y, x.double().mean((2, 3, 4))) < 1e-6


def test_same_bits_with_any_number_of_threads() -> None:
    x = torch.randn(2, 64, 8, 14, 14).to(memory_format=torch.channels_last_3d)
    weight, scale, shift = torch.randn(400, 64), torch.rand(64), torch.rand(64)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(
            (ops.max_pool3d(x, 3, 2, 1), ops.avg_pool_linear(x, weight), ops.bn_act(x, scale, shift))
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradients_flow_through_torch() -> None:
    x = torch.randn(1, 3, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    scale, shift = (torch.rand(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda v: ops.max_pool3d(v, 2), (x,))
    assert torch.autograd.gradcheck(ops.avg_pool_linear, (x, weight))
    assert torch.autograd.gradcheck(ops.bn_act, (x, scale, shift))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_opcheck(dtype: torch.dtype) -> None:
    x = torch.randn(2, 7, 4, 6, 6, dtype=dtype)
    ns = torch.ops.r3d_kernels
    torch.library.opcheck(ns.max_pool3d, (x, [3, 3, 3], [1, 2, 2], [1, 1, 1]))
    torch.library.opcheck(
        ns.avg_pool_linear, (x, torch.randn(5, 7, dtype=dtype), torch.randn(5, dtype=dtype))
    )
    torch.library.opcheck(ns.bn_act, (x, torch.rand(7), torch.rand(7), x.clone(), "relu"))
    torch.library.opcheck(ns.bn_act, (x, torch.rand(7), torch.rand(7), None, "none"))


X = torch.zeros(1, 4, 3, 5, 5)
WRONG = {
    "pool rank": (lambda: ops.max_pool3d(X[0], 2), ValueError, "x: expected 5 dimensions"),
    "pool type": (lambda: ops.max_pool3d(None, 2), TypeError, "x: expected a tensor, got NoneType"),
    "pool stride": (lambda: ops.max_pool3d(X, 2, 0), ValueError, "stride: expected integers >= 1"),
    "pool padding": (lambda: ops.max_pool3d(X, 2, 2, 2), ValueError, "padding: expected at most half"),
    "pool size": (lambda: ops.max_pool3d(X, 4), ValueError, "kernel_size: the window .* does not fit"),
    "head channels": (
        lambda: ops.avg_pool_linear(X, torch.zeros(3, 5)),
        ValueError,
        r"weight: expected shape \[classes, 4\]",
    ),
    "head bias": (
        lambda: ops.avg_pool_linear(X, torch.zeros(3, 4), torch.zeros(4)),
        ValueError,
        r"bias: expected shape \[3\]",
    ),
    "head dtype": (
        lambda: ops.avg_pool_linear(X, torch.zeros(3, 4).double()),
        TypeError,
        "weight: expected torch.float32",
    ),
    "head space": (
        lambda: ops.avg_pool_linear(X[:, :, :0], torch.zeros(3, 4)),
        ValueError,
        "x: expected .*empty in N only",
    ),
    "bn scale": (
        lambda: ops.bn_act(X, torch.zeros(3), torch.zeros(4)),
        ValueError,
        r"scale: expected shape \[4\], got \[3\]",
    ),
    "bn shift dtype": (
        lambda: ops.bn_act(X, torch.zeros(4), torch.zeros(4).half()),
        TypeError,
        "shift: expected torch.float32",
    ),
    "bn residual": (
        lambda: ops.bn_act(X, torch.zeros(4), torch.zeros(4), X[:, :, :1]),
        ValueError,
        "residual: expected shape",
    ),
    "bn activation": (
        lambda: ops.bn_act(X, torch.zeros(4), torch.zeros(4), None, "silu"),
        ValueError,
        "activation: expected",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case: str) -> None:
    call, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        call()
