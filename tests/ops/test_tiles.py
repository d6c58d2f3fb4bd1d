"""Matrix tiles against float64: on the tile unit where this processor has one, and in plain loops everywhere."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_keeps_promise, relative_error
from strategies import problem_strategy

import r3d_kernels as r3d
from r3d_kernels import backends, ops
from r3d_kernels.problems import ConvProblem

BEST = backends.describe()["best_isa"]
# "scalar" runs the same kernel over plain loops
ISAS = ("scalar", "amx") if BEST == "amx" else ("scalar",)
TILES = ((1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 1), (1, 4, 1), (2, 2, 1), (4, 2, 1))
GEOMETRIES = [
    "n1c64d4h7w7k64f3s1p1+res+relu",
    "n2c45d3h9w9k45f3s2p1+relu",  # phases of two axes, a padded step
    "n1c3d8h20w22k64f7s1x2x2p3+relu",  # stems: kernel rows side by side
    "n2c1d6h12w12k17f5x7x7s2p2x3x3",
    "n1c3d4h20w20k45f1x7x7s1x2x2p0x3x3+relu",
    "n1c1d2h33w35k8f1x31x31p0x15x15",  # more kernel rows than are put side by side
    "n2c45d6h5w5k64f3x1x1p1x0x0+relu",
    "n1c230d3h4w5k40f1x3x3p0x1x1+res+relu",  # chunks of channels, the last one narrower
    "n1c320d2h4w4k33f3p1+relu",
    "n2c64d3h9w10k96f1s2+res",
    "n2c64d3h5w6k130f1+relu",
    "n3c96d1h4w4k64f3p1+relu",  # taps along depth that see padding alone
    "n2c33d1h1w1k8f3p1+res",
    "n1c40d7h9w10k48f3s1x2x3p2x1x0l2x1x2+relu",
    "n1c7d7h9w10k9f3s1x2x1p2x1x1l1x2x1",
    "n1c8d7h3w3k8f3s3p4",  # windows that lie on padding alone
    "n2c64d2h8w8k64f3p1+res+relu",  # several samples in one block
]


def ours(p: ConvProblem, t, scale, shift, *, slices=None, tile=(1, 1, 1), layout=torch.contiguous_format):
    return ops.conv3d_tiles(
        t.x,
        t.weight.contiguous(memory_format=layout),
        shift,
        scale,
        t.residual,
        stride=p.stride,
        padding=p.padding,
        dilation=p.dilation,
        activation=p.activation,
        slices=slices,
        tile=tile,
    )


def run(p: ConvProblem, dtype: torch.dtype, **how):
    t = p.tensors(dtype)
    scale, shift = torch.rand(p.k) + 0.5, torch.randn(p.k)
    y = ours(p, t, scale, shift, **how)

    def expected(dtype: torch.dtype) -> torch.Tensor:
        def cast(v: torch.Tensor) -> torch.Tensor:
            return v.to(dtype)

        z = F.conv3d(cast(t.x), cast(t.weight), None, p.stride, p.padding, p.dilation)
        z = z * cast(scale).view(-1, 1, 1, 1) + cast(shift).view(-1, 1, 1, 1)
        if t.residual is not None:
            z = z + cast(t.residual)
        return z.relu() if p.activation == "relu" else z

    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last_3d) or not y.numel()
    want = expected(torch.float64)
    terms = F.conv3d(t.x.double().abs(), t.weight.double().abs(), None, p.stride, p.padding, p.dilation)
    return y, want, terms.norm().item()


def rounding_of_stock(p: ConvProblem, want: torch.Tensor) -> torch.Tensor:
    """What a layer that rounds its output to bfloat16 once has: ours must not be worse than twice that."""
    return want.bfloat16()


def check(p: ConvProblem, dtype: torch.dtype, **kwargs) -> float:
    y, want, terms = run(p, dtype, **kwargs)
    assert_keeps_promise(y, want, rounding_of_stock(p, want), magnitude=terms)
    return relative_error(y, want)


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("R3D_KERNELS_ISA", request.param)
    return request.param


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=["plain", "cl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("text", GEOMETRIES)
def test_geometries(text: str, dtype: torch.dtype, layout: torch.memory_format, isa: str) -> None:
    check(ConvProblem.parse(text), dtype, layout=layout)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=["plain", "cl"])
@pytest.mark.parametrize("tile", TILES[1:])
def test_winograd(tile: tuple, layout: torch.memory_format, isa: str) -> None:
    kernel = "x".join("3" if m > 1 else "1" for m in tile)
    padding = "x".join("1" if m > 1 else "0" for m in tile)
    for text in (
        "n1c64d5h9w10k64f3p1+res+relu",  # whole and broken tiles
        "n2c24d4h8w7k40f3p0x1x2+relu",
        "n1c200d3h6w5k33f3p1",  # sums of chunks wait
        f"n2c45d6h7w5k64f{kernel}p{padding}+relu",
    ):
        assert check(ConvProblem.parse(text), torch.float32, tile=tile, layout=layout) < 1e-6


@given(
    problem_strategy(groups=False, max_macs=400_000),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
)
def test_any_geometry(p: ConvProblem, dtype: torch.dtype, last: bool) -> None:
    check(p, dtype, layout=torch.channels_last_3d if last else torch.contiguous_format)


@given(
    st.sampled_from(TILES[1:]),
    st.integers(0, 2),
    st.sampled_from([1, 3, 16, 17, 45, 64]),
    st.sampled_from([1, 7, 16, 48, 65]),
    st.tuples(*[st.integers(1, 10)] * 3),
    st.tuples(*[st.integers(0, 4)] * 3),
    st.booleans(),
)
def test_any_winograd(tile, n: int, c: int, k: int, size: tuple, padding: tuple, residual: bool) -> None:
    size = tuple(max(s, 3 - 2 * p) for s, p in zip(size, padding, strict=True))
    check(
        ConvProblem(n, c, *size, k=k, kernel=(3, 3, 3), padding=padding, residual=residual),
        torch.float32,
        tile=tile,
    )


@pytest.mark.parametrize(("slices", "limit"), [(3, 2e-7), (2, 5e-6), (1, 4e-3)])
def test_slices_keep_their_error(slices: int, limit: float, isa: str) -> None:
    p = ConvProblem.parse("n1c64d3h6w6k64f3p1")
    error = check_error(p, slices)
    assert error < limit
    if slices < 3:  # and the limit means something
        assert error > limit / 10


def check_error(p: ConvProblem, slices: int) -> float:
    y, want, _ = run(p, torch.float32, slices=slices)
    return relative_error(y, want)


@pytest.mark.skipif(BEST != "amx", reason="this processor has no AMX tiles")
@pytest.mark.parametrize("tile", TILES)
def test_hardware_and_plain_loops_agree(tile: tuple, monkeypatch) -> None:
    p = ConvProblem.parse("n1c96d4h9w9k65f3p1+res+relu")
    results = []
    for isa in ISAS:
        monkeypatch.setenv("R3D_KERNELS_ISA", isa)
        torch.manual_seed(1)
        results.append(run(p, torch.float32, tile=tile)[0])
    assert relative_error(results[0], results[1].double()) < 2e-7


@pytest.mark.parametrize(
    ("text", "tile"),
    [
        *itertools.product(
            ["n2c64d4h6w7k70f3p1+res+relu", "n1c320d2h5w5k66f3p1+relu"], [(1, 1, 1), (2, 2, 1), (4, 1, 1)]
        ),
        ("n1c3d4h16w16k64f7s1x2x2p3", (1, 1, 1)),
    ],
)
def test_same_bits_with_any_number_of_threads(text: str, tile: tuple) -> None:
    p = ConvProblem.parse(text)
    t, scale, shift = p.tensors(torch.float32), torch.rand(p.k) + 0.5, torch.randn(p.k)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(ours(p, t, scale, shift, tile=tile))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, results[0]) for y in results)


def test_not_a_number_and_infinity_arrive(isa: str) -> None:
    x, w = torch.randn(1, 64, 3, 5, 5), torch.randn(32, 64, 3, 3, 3)
    for value in (float("nan"), float("inf")):
        x[0, 5, 1, 2, 2] = value
        for slices in (1, 2, 3):
            y = ops.conv3d_tiles(x, w, torch.zeros(32), padding=1, activation=None, slices=slices)
            want = F.conv3d(x, w, padding=1)
            assert not torch.isfinite(y)[~torch.isfinite(want)].any()
            assert torch.isfinite(y)[torch.isfinite(want)].all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile": (3, 1, 1)}, "tile"),
        ({"tile": (2, 4, 1)}, "tile"),
        ({"tile": (1, 1, 2)}, "tile"),
        ({"tile": (1, 1)}, "tile: expected 3"),
        ({"tile": (2, 1, 1), "stride": 2}, "stride 1"),
        ({"slices": 4}, "slices: expected 1, 2 or 3, got 4"),
        ({"slices": 0}, "slices: expected 1, 2 or 3, got 0"),
        ({"bias": torch.zeros(7)}, "bias: expected a float32 CPU tensor of shape"),
        ({"scale": torch.zeros(8, dtype=torch.float64)}, "scale: expected a float32 CPU tensor"),
        ({"weight": torch.zeros(8, 4, 3, 3, 3).bfloat16()}, "weight: expected the dtype of x"),
        ({"weight": torch.zeros(8, 5, 3, 3, 3)}, "channels"),
        ({"x": torch.zeros(4, 5, 5, 5)}, "x: expected 5 dimensions"),
        ({"x": torch.zeros(1, 4, 5, 5, 5, dtype=torch.float64)}, "x: expected float32 or bfloat16"),
        ({"residual": torch.zeros(1, 8, 5, 5, 5)}, "residual: expected the output's shape"),
        ({"padding": -1}, "padding"),
        (
            {"weight": torch.zeros(8, 4, 11, 11, 11), "padding": 5},
            "weight: tiles take kernels of at most 1024 taps",
        ),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    good = {"x": torch.zeros(1, 4, 5, 5, 5), "weight": torch.zeros(8, 4, 3, 3, 3), "bias": torch.zeros(8)}
    ops.conv3d_tiles(**good)
    with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
        ops.conv3d_tiles(**(good | change))


def test_opcheck() -> None:
    x, w = torch.randn(1, 8, 3, 5, 5), torch.randn(16, 8, 3, 3, 3)
    geometry = ([1, 1, 1], [1, 1, 1], [1, 1, 1])
    args = (
        x,
        w,
        torch.rand(16),
        torch.zeros(16),
        torch.randn(1, 16, 3, 5, 5),
        *geometry,
        "relu",
        3,
        [2, 1, 1],
    )
    torch.library.opcheck(torch.ops.r3d_kernels.conv3d_tiles.default, args)


@pytest.mark.skipif(BEST != "amx", reason="this processor has no AMX tiles")
def test_chosen_by_torchs_own_switch() -> None:
    """One slice with "medium", two with "high", three otherwise, and for R3D_KERNELS_FP32=strict."""
    layer = r3d.ConvBNAct3d(64, 64, 3, padding=1, fused=False).eval()
    x = torch.randn(1, 64, 4, 9, 9)
    want = layer.double()(x.double()).detach()
    layer.float()
    errors = {}
    before = torch.get_float32_matmul_precision()
    amx = next(k for k in backends.KERNELS if k.name == "AMX")
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            request = backends.Request(
                ConvProblem(1, 64, 4, 9, 9, k=64, kernel=(3, 3, 3), padding=(1, 1, 1), activation="relu"),
                torch.float32,
                x.device,
                2,
            )
            assert amx.can_run(request) is None
            bn = layer.bn
            norm = (bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)
            pack = amx.pack(backends.Layer.of(layer.conv.weight, None, norm), request)
            errors[precision] = relative_error(amx.run(pack, x, None, request), want)
    finally:
        torch.set_float32_matmul_precision(before)
    assert errors["highest"] < 2e-7 < errors["high"] < 5e-6 < errors["medium"] < 1e-2


@pytest.mark.skipif(BEST != "amx", reason="this processor has no AMX tiles")
def test_predicates(monkeypatch) -> None:
    def able(text: str, dtype: torch.dtype = torch.float32) -> set[str]:
        request = backends.Request(ConvProblem.parse(text), dtype, torch.device("cpu"), 2)
        names = {k.name for k in backends.KERNELS if k.can_run(request) is None}
        return {n.removeprefix("AMX").strip() for n in names if n.startswith("AMX")}

    cube = {"", "F(2,1,1)", "F(4,1,1)", "F(1,2,1)", "F(1,4,1)", "F(2,2,1)"}
    assert able("n1c64d8h28w28k64f3p1") == cube
    assert able("n1c64d8h28w28k64f1x3x3p0x1x1") == {"", "F(1,2,1)", "F(1,4,1)"}
    assert able("n1c64d8h28w28k64f3x1x1p1x0x0") == {"", "F(2,1,1)", "F(4,1,1)"}
    for other in ("n1c64d8h28w28k64f3s2p1", "n1c64d8h28w28k64f3p1l2", "n1c64d8h28w28k64f1"):
        assert able(other) == {""}
    assert able("n1c64d8h28w28k64f3p1", torch.bfloat16) == {""}  # transformed values would be rounded
    assert able("n1c64d8h28w28k64f3p1g2") == set()
    assert able("n1c4d12h12w12k8f11p5") == set()
    monkeypatch.setenv("R3D_KERNELS_FP32", "strict")
    assert able("n1c64d8h28w28k64f3p1") == {n for n in cube if "4" not in n}
    monkeypatch.setenv("R3D_KERNELS_ISA", "avx512")
    assert able("n1c64d8h28w28k64f3p1") == set()


def test_copies_of_large_weights_have_to_be_worth_it(monkeypatch) -> None:
    """Judged on times that are given, with kernels that say whether they keep a copy."""

    class Fake:
        def __init__(self, name: str, copies: bool) -> None:
            self.name, self.copies_weights = name, copies

    lean, copying = Fake("lean", False), Fake("copying", True)
    large = backends.Request(ConvProblem.parse("n1c512d2h7w7k512f3p1"), torch.float32, torch.device("cpu"), 2)
    small = backends.Request(ConvProblem.parse("n1c32d2h7w7k32f3p1"), torch.float32, torch.device("cpu"), 2)

    def winner(request: backends.Request, **seconds: float) -> str:
        return backends._winner([copying, lean], seconds, request).name

    monkeypatch.delenv("R3D_KERNELS_MEMORY", raising=False)
    assert winner(large, lean=2.9, copying=1.0) == "lean"
    assert winner(large, lean=3.2, copying=1.0) == "copying"
    assert winner(small, lean=1.3, copying=1.0) == "copying"
    # without a kernel of ours that needs no copy, memory has no price: stock is no way out
    stock = next(k for k in backends.KERNELS if k.name == "stock")
    assert backends._winner([copying, stock], {"copying": 1.0, "stock": 1.1}, large) is copying
    monkeypatch.setenv("R3D_KERNELS_MEMORY", "fast")
    assert winner(large, lean=1.3, copying=1.0) == "copying"
    monkeypatch.setenv("R3D_KERNELS_MEMORY", "slow")
    with pytest.raises(ValueError, match="R3D_KERNELS_MEMORY: expected 'lean' or 'fast', got 'slow'"):
        winner(large, lean=1.3, copying=1.0)


@pytest.mark.skipif(BEST != "amx", reason="this processor has no AMX tiles")
def test_weights_are_read_where_they_are() -> None:
    """No copy is kept: a write that nothing counts is seen at the next call, and `pack` shares the memory."""
    layer = r3d.ConvBNAct3d(64, 64, 3, padding=1).eval()
    request = backends.Request(
        ConvProblem(1, 64, 2, 5, 5, k=64, kernel=(3, 3, 3), padding=(1, 1, 1)),
        torch.float32,
        torch.device("cpu"),
        1,
    )
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        layer.to(memory_format=layout)
        amx = next(k for k in backends.KERNELS if k.name == "AMX")
        weight, *_ = amx.pack(backends.Layer.of(layer.conv.weight, None, None), request)
        assert weight.data_ptr() == layer.conv.weight.data_ptr()
