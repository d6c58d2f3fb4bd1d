"""Weights that are turned once and kept, against float64 and without them, and what refuses them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import problem_strategy
from test_direct import LAYOUTS, check, isa, run  # noqa: F401 - a fixture

from r3d_kernels import ops
from r3d_kernels.problems import ConvProblem

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


FEW_PIXELS = 512  # with more, sums do not depend on whether weights are kept


def keep(p: ConvProblem, dtype: torch.dtype, layout: str) -> torch.Tensor:
    """The kept weights of `p.tensors`."""
    weight = p.tensors(dtype).weight.contiguous(memory_format=LAYOUTS[layout])
    return ops.conv3d_keep(weight, p.in_shape, stride=p.stride, padding=p.padding, dilation=p.dilation)


def check_kept(p: ConvProblem, dtype: torch.dtype, layout: str, kept: torch.Tensor) -> float:
    """The error with kept weights, within the promise; the bits of a call without them where sums are the same."""
    state = torch.get_rng_state()
    error = check(p, dtype, layout=LAYOUTS[layout], kept=kept)
    if p.n * math.prod(p.out_size) > FEW_PIXELS:
        outputs = []
        for weights in (None, kept):
            torch.set_rng_state(state)
            outputs.append(run(p, dtype, LAYOUTS[layout], kept=weights)[0])
        assert torch.equal(*outputs)
    return error


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("text", "planes"),
    [
        ("n1c64d2h7w7k64f3p1+res+relu", 3),
        ("n1c64d1h4w4k70f3p1+relu", 1),  # one frame: taps along depth that meet padding alone
        ("n2c48d2h7w7k40f3s2p1", 2),
        ("n1c96d2h5w5k33f1+res", 1),
        ("n1c1152d2h4w4k32f3x1x1p1x0x0+relu", 3),
        ("n1c64d1h7w7k128f3x1x1p1x0x0", 1),
        ("n1c40d3h9w9k100f1x3x3s1x2x2p0x1x1", 1),
        ("n1c34d3h6w6k17f5x3x1p2x1x0l1x1x1", 5),
        ("n1c64d3h5w5k16f3p3l3", 1),
        # more than 512 pixels: all weights, as they are turned for the call
        ("n1c64d4h14w14k70f1x3x3p0x1x1+relu", 1),
        ("n3c24d1h14w14k40f3p1+res", 3),
        ("n1c128d4h13w13k70f1s1p0+relu", 1),
        ("n1c300d3h14w14k520f3x3x1p1x1x0", 3),  # weights that are turned in pieces
        ("n1c13d9h9w9k21f3p1+relu", 3),
        ("n1c3d6h14w14k24f7p3", 7),  # no chunk of all taps
        # what is kept is multiplied in longer chunks: several of them, the last one shorter
        ("n1c150d2h7w7k80f3p1+res+relu", 3),
        ("n1c640d1h4w5k48f1p0", 1),
        ("n1c700d2h3w7k64f1+relu", 1),
        ("n1c80d2h7w7k64f3s2p1", 2),
    ],
)
def test_error_and_size(text: str, planes: int, dtype: str, layout: str, isa: str) -> None:  # noqa: F811
    p = ConvProblem.parse(text)
    kept = keep(p, DTYPES[dtype], layout)
    if dtype == "bf16" and isa != "avx512_bf16":
        assert not kept.numel()  # float32 arithmetic on bfloat16 weights
        return
    weights = planes * p.kernel[1] * p.kernel[2] * p.c * p.k * DTYPES[dtype].itemsize
    padded = -(-p.k // 16) * 16 / p.k
    assert weights < kept.numel() < 1.25 * padded * weights + 65536  # the planes that count, and no other
    assert check_kept(p, DTYPES[dtype], layout, kept) < (5e-7 if dtype == "fp32" else 4e-3)


@given(
    problem_strategy(groups=False, max_macs=400_000),
    st.sampled_from(list(DTYPES)),
    st.sampled_from(list(LAYOUTS)),
)
def test_any_geometry(p: ConvProblem, dtype: str, layout: str) -> None:
    kept = keep(p, DTYPES[dtype], layout)
    if kept.numel():
        check_kept(p, DTYPES[dtype], layout, kept)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_with_other_threads_than_it_is_used_with(dtype: str) -> None:
    p = ConvProblem.parse("n1c64d2h5w5k200f3p1")
    outputs = []
    for making, using in ((1, 7), (7, 1), (32, 2)):
        t = p.tensors(DTYPES[dtype], seed=1)
        torch.set_num_threads(making)
        kept = ops.conv3d_keep(t.weight, t.x.shape, padding=1)
        torch.set_num_threads(using)
        outputs.append(
            ops.conv3d_direct(t.x, t.weight, torch.zeros(p.k), padding=1, kept=kept if kept.numel() else None)
        )
    assert all(torch.equal(y, outputs[0]) for y in outputs)


def test_nothing_is_kept_where_there_is_nothing_to_do() -> None:
    weight = torch.randn(16, 16, 3, 3, 3)
    assert ops.conv3d_keep(weight, [1, 16, 8, 8, 8], padding=1).numel()
    assert not ops.conv3d_keep(weight, [0, 16, 8, 8, 8], padding=1).numel()


def test_what_was_made_for_something_else_is_refused(monkeypatch) -> None:
    x, weight, bias = torch.randn(1, 32, 3, 5, 5), torch.randn(48, 32, 3, 3, 3), torch.zeros(48)
    kept = ops.conv3d_keep(weight, x.shape, padding=1)
    ops.conv3d_direct(x, weight, bias, padding=1, kept=kept)
    wrong = [
        (kept[:-1].clone(), "kept: truncated or extended"),
        (kept[:8].clone(), "kept: too small"),
        (torch.zeros_like(kept), "kept: not made by conv3d_keep"),
        (kept.float(), "kept: expected a 1-dimensional uint8 CPU tensor, got float32"),
        (kept.view(1, -1), "kept: expected a 1-dimensional uint8"),
        (ops.conv3d_keep(weight, x.shape), "kept: made for another convolution"),
    ]
    for bad, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            ops.conv3d_direct(x, weight, bias, padding=1, kept=bad)
    monkeypatch.setenv("R3D_KERNELS_ISA", "scalar")
    with pytest.raises(RuntimeError, match="kept: made for another instruction set"):
        ops.conv3d_direct(x, weight, bias, padding=1, kept=kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(8, 4, 3, 3)}, "weight: expected 5 dimensions"),
        ({"weight": torch.zeros(8, 4, 3, 3, 3, dtype=torch.float64)}, "weight: expected float32 or bfloat16"),
        ({"in_shape": [4, 5, 5, 5]}, "x: expected 5 dimensions"),
        ({"in_shape": [1, 5, 5, 5, 5]}, "x: expected 4 channels"),
        ({"stride": 0}, "stride"),
        ({"dilation": 3}, "the kernel does not fit"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    good = {"weight": torch.zeros(8, 4, 3, 3, 3), "in_shape": [1, 4, 5, 5, 5]}
    ops.conv3d_keep(**good)
    with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
        ops.conv3d_keep(**(good | change))


def test_opcheck() -> None:
    x, weight = torch.randn(1, 8, 3, 5, 5), torch.randn(16, 8, 3, 3, 3)
    geometry = ([1, 1, 1], [1, 1, 1], [1, 1, 1])
    kept = ops.conv3d_keep(weight, x.shape, padding=1)
    torch.library.opcheck(torch.ops.r3d_kernels.conv3d_keep.default, (weight, list(x.shape), *geometry))
    args = (x, weight, None, torch.zeros(16), None, *geometry, "relu", kept)
    torch.library.opcheck(torch.ops.r3d_kernels.conv3d_direct.default, args)
