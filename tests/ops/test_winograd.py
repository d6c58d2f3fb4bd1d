"""Winograd tiles against float64: every instruction set, odd sizes, tails and paddings."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_keeps_promise, relative_error

import r3d_kernels as r3d
from r3d_kernels import backends, ops
from r3d_kernels.problems import ConvProblem

ISAS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")
USABLE = ISAS[: ISAS.index(backends.describe()["best_isa"]) + 1]
TILES = {
    222: (3, 3, 3),
    244: (3, 3, 3),
    444: (3, 3, 3),
    122: (1, 3, 3),
    144: (1, 3, 3),
    211: (3, 1, 1),
    411: (3, 1, 1),
    422: (3, 3, 3),
}


STRIDED = (222, 422, 122, 144)  # of stride 2 along the axes with a kernel
CASES = [*((tile, 1) for tile in TILES if tile != 422), *((tile, 2) for tile in STRIDED)]


def digits(tile: int) -> list[int]:
    return [int(d) for d in str(tile)]


def steps(tile: int, stride: int) -> tuple[int, ...]:
    """The stride along every axis."""
    return tuple(1 if k == 1 else stride for k in TILES[tile])


def check(
    tile: int,
    n: int,
    c: int,
    size: tuple,
    k: int,
    padding: tuple,
    residual: bool,
    dtype: torch.dtype,
    layout: str = "contiguous",
    stride: int = 1,
) -> float:
    kernel, stride = TILES[tile], steps(tile, stride)
    x = torch.randn(n, c, *size).relu().to(dtype)
    weight = (torch.randn(k, c, *kernel) / (c * 4) ** 0.5).to(dtype)
    bias = torch.randn(k)
    scale = torch.rand(k) + 0.5
    per_channel = scale.view(-1, 1, 1, 1)
    want = F.conv3d(x.double(), weight.double(), stride=stride, padding=padding) * per_channel + bias.view(
        -1, 1, 1, 1
    )
    stock = F.conv3d(x, weight, stride=stride, padding=padding) * per_channel.to(dtype) + bias.view(
        -1, 1, 1, 1
    ).to(dtype)
    r = None
    if residual:
        r = torch.randn(want.shape).to(dtype)
        want, stock = want + r.double(), stock + r
    y = ops.conv3d_winograd(
        x,
        weight if layout == "contiguous" else weight.to(memory_format=torch.channels_last_3d),
        bias,
        scale,
        r,
        stride=stride,
        padding=padding,
        tile=digits(tile),
    )
    assert y.is_contiguous(memory_format=torch.channels_last_3d) or not y.numel()
    terms = F.conv3d(x.double().abs(), weight.double().abs(), stride=stride, padding=padding) * per_channel
    terms += bias.abs().view(-1, 1, 1, 1)
    assert_keeps_promise(y, want.relu(), stock.relu(), magnitude=terms.norm().item())
    return relative_error(y, want.relu())


@pytest.mark.parametrize("isa", USABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("tile", "stride"), CASES)
def test_every_instruction_set(tile: int, stride: int, dtype: torch.dtype, isa: str, monkeypatch) -> None:
    monkeypatch.setenv("R3D_KERNELS_ISA", isa)
    same = tuple(k // 2 for k in TILES[tile])
    check(tile, 1, 64, (4, 8, 8), 64, same, True, dtype, stride=stride)  # whole tiles, whole panels
    check(tile, 2, 7, (5, 9, 11), 45, same, True, dtype, stride=stride)  # tails everywhere
    check(tile, 1, 33, (3, 5, 3), 130, (0, 0, 0), False, dtype, stride=stride)
    check(tile, 1, 40, (3, 5, 3), 36, same, False, dtype, "channels_last", stride)
    check(tile, 0, 8, (3, 5, 3), 8, same, False, dtype, stride=stride)


@pytest.mark.parametrize("isa", USABLE)
@pytest.mark.parametrize("tile", STRIDED)
def test_many_strided_tiles(tile: int, isa: str, monkeypatch) -> None:
    """In blocks rather than panels, with channels in pieces, the last ones narrow."""
    monkeypatch.setenv("R3D_KERNELS_ISA", isa)
    depth = TILES[tile][0] // 2
    check(tile, 1, 3, (15, 33, 30), 20, (2 * depth, 0, 1), True, torch.float32, stride=2)
    check(tile, 2, 70, (8, 20, 21), 72, (depth, 1, 1), False, torch.bfloat16, stride=2)


@pytest.mark.parametrize("isa", USABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tile", [222, 244])
def test_two_planes_between_padding(tile: int, dtype: torch.dtype, isa: str, monkeypatch) -> None:
    """Three products along depth instead of four; few tiles and many."""
    monkeypatch.setenv("R3D_KERNELS_ISA", isa)
    check(tile, 1, 64, (2, 7, 7), 48, (1, 1, 1), True, dtype)
    check(tile, 3, 19, (2, 5, 9), 21, (1, 0, 2), False, dtype, "channels_last")
    check(tile, 2, 35, (2, 45, 30), 40, (1, 1, 1), True, dtype)
    check(tile, 1, 8, (2, 4, 4), 8, (2, 1, 1), True, dtype)  # four planes of outputs: none of it
    check(tile, 1, 8, (2, 4, 4), 8, (1, 1, 1), False, dtype)


def test_work_of_two_planes_between_padding() -> None:
    kernel = next(k for k in backends.KERNELS if k.name == "winograd F(2,4,4)")

    def macs(text: str) -> int:
        request = backends.Request(ConvProblem.parse(text), torch.float32, torch.device("cpu"), 2)
        return backends.work(kernel, request).macs

    assert macs("n1c8d2h4w4k8f3s1p1") == 3 * 36 * 64
    assert macs("n1c8d3h4w4k8f3s1p1") == 2 * 4 * 36 * 64
    assert macs("n1c8d4h4w4k8f3s1p0x1x1") == 4 * 36 * 64


@pytest.mark.parametrize(("tile", "stride"), CASES)
def test_many_channels_in_groups(tile: int, stride: int) -> None:
    """More transformed weights than are kept at a time, many tiles and few."""
    same = tuple(k // 2 for k in TILES[tile])
    check(tile, 1, 256, (8, 16, 16), 320, same, True, torch.float32, stride=stride)
    check(tile, 1, 512, (2, 7, 7), 200, same, True, torch.float32, stride=stride)
    check(tile, 1, 512, (8, 16, 16), 72, same, False, torch.float32, stride=stride)


@given(
    st.sampled_from(CASES),
    st.integers(1, 2),
    st.sampled_from([1, 3, 16, 17, 45, 64]),
    st.sampled_from([1, 7, 16, 48, 65]),
    st.tuples(*[st.integers(1, 10)] * 3),
    st.tuples(*[st.integers(0, 4)] * 3),
    st.booleans(),
    st.sampled_from(["contiguous", "channels_last"]),
)
def test_any_geometry(
    case: tuple, n: int, c: int, k: int, size: tuple, padding: tuple, residual: bool, layout: str
) -> None:
    tile, stride = case
    kernel = TILES[tile]
    padding = tuple(p if f > 1 else p % 2 for p, f in zip(padding, kernel, strict=True))
    size = tuple(max(s, f - 2 * p) for s, p, f in zip(size, padding, kernel, strict=True))
    check(tile, n, c, size, k, padding, residual, torch.float32, layout, stride)


def test_tiles_of_two_are_as_exact_as_the_stock_layer() -> None:
    """What R3D_KERNELS_FP32=strict rests on: twice the error of the direct stock convolution at most."""
    for tile, stride in ((222, 1), (122, 1), (211, 1), (222, 2), (122, 2)):
        for c in (64, 256):
            x, weight = torch.randn(1, c, 4, 14, 14).relu(), torch.randn(c, c, *TILES[tile]) / (4 * c) ** 0.5
            padding = tuple(k // 2 for k in TILES[tile])
            geometry = {"stride": steps(tile, stride), "padding": padding}
            want = F.conv3d(x.double(), weight.double(), **geometry)
            y = ops.conv3d_winograd(x, weight, torch.zeros(c), activation=None, tile=digits(tile), **geometry)
            stock = F.conv3d(x, weight, **geometry)
            assert relative_error(y, want) <= 2 * relative_error(stock, want)


@pytest.mark.parametrize(
    "text",
    [
        "n1c64d8h14w14k64f3p1+res+relu",
        "n1c512d2h7w7k512f3p1+relu",
        "n2c45d5h9w9k65f3p1",
        # two threads: output channels, and with few of them tiles, are shared out; all weights, or some of them
        "n1c16d8h48w48k256f3p1",
        "n1c128d8h20w20k128f3p1+res",
        "n1c16d8h80w80k16f3p1",
        "n1c24d8h40w40k64f3p1+relu",
    ],
)
def test_same_bits_with_any_number_of_threads(text: str) -> None:
    p = ConvProblem.parse(text)
    t = p.tensors()
    for tile in (222, 244, 444):
        results = []
        for threads in (1, 2, 3, 7, 24):
            torch.set_num_threads(threads)
            results.append(
                ops.conv3d_winograd(t.x, t.weight, t.beta, None, t.residual, padding=1, tile=digits(tile))
            )
        assert all(torch.equal(results[0], r) for r in results)


@pytest.mark.parametrize(("c", "k", "size"), [(64, 64, (8, 28, 28)), (256, 128, (2, 14, 14))])
@pytest.mark.parametrize("tile", STRIDED)
def test_same_strided_bits_with_any_number_of_threads(tile: int, c: int, k: int, size: tuple) -> None:
    x, weight, bias = torch.randn(1, c, *size), torch.randn(k, c, *TILES[tile]), torch.randn(k)
    padding = tuple(f // 2 for f in TILES[tile])
    results = []
    for threads in (1, 2, 3, 7, 24):
        torch.set_num_threads(threads)
        results.append(
            ops.conv3d_winograd(x, weight, bias, stride=steps(tile, 2), padding=padding, tile=digits(tile))
        )
    assert all(torch.equal(results[0], r) for r in results)


def test_wrong_use() -> None:
    x, weight, bias = torch.randn(1, 4, 6, 6, 6), torch.randn(8, 4, 3, 3, 3), torch.zeros(8)
    with pytest.raises(
        RuntimeError, match=r"tile: expected one of \[2, 2, 2\], \[2, 4, 4\], .*got \[3, 3, 3\]"
    ):
        ops.conv3d_winograd(x, weight, bias, tile=(3, 3, 3))
    with pytest.raises(
        RuntimeError,
        match=r"tile: \[1, 2, 2\], kernel \[3, 3, 3\], stride \[1, 1, 1\]: .*for another kernel size",
    ):
        ops.conv3d_winograd(x, weight, bias, tile=(1, 2, 2))
    for stride, tile, why in (
        ((1, 2, 2), (2, 2, 2), "needs a stride of 1 or of 2 along every axis with a kernel"),
        (3, (2, 2, 2), "needs a stride of 1 or of 2 along every axis"),
        (2, (2, 4, 4), "the Winograd tile is for another stride"),
        (1, (4, 2, 2), "the Winograd tile is for another stride"),
    ):
        with pytest.raises(RuntimeError, match=rf"stride \[.*\]: .*{why}"):
            ops.conv3d_winograd(x, weight, bias, stride=stride, tile=tile)
    with pytest.raises(RuntimeError, match=r"tile: expected 3 integers \(depth, height, width\), got 2"):
        ops.conv3d_winograd(x, weight, bias, tile=(2, 2))
    with pytest.raises(RuntimeError, match=r"weight: expected"):
        ops.conv3d_winograd(x, weight.bfloat16(), bias)
    with pytest.raises(RuntimeError, match=r"bias: expected a float32 CPU tensor of shape \[8\]"):
        ops.conv3d_winograd(x, weight, torch.zeros(7))
    with pytest.raises(RuntimeError, match=r"scale: expected a float32 CPU tensor of shape \[8\]"):
        ops.conv3d_winograd(x, weight, bias, torch.ones(8, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"residual: expected"):
        ops.conv3d_winograd(x, weight, bias, None, torch.zeros(1, 8, 4, 4, 5))


@pytest.mark.parametrize(("tile", "stride"), [(222, 1), (444, 1), (411, 1), (422, 2), (144, 2)])
def test_operator(tile: int, stride: int) -> None:
    x = torch.randn(1, 5, 4, 6, 6)
    weight, scale, bias = torch.randn(9, 5, *TILES[tile]), torch.rand(9), torch.randn(9)
    padding = [k // 2 for k in TILES[tile]]
    stride = steps(tile, stride)
    for r in (None, torch.randn(1, 9, *(size // s for size, s in zip((4, 6, 6), stride, strict=True)))):
        torch.library.opcheck(
            torch.ops.r3d_kernels.conv3d_winograd.default,
            (x, weight, scale, bias, r, list(stride), padding, "relu", digits(tile)),
        )


def test_nan_reaches_the_output() -> None:
    x = torch.zeros(1, 16, 4, 8, 8)
    x[0, 3, 1, 4, 4] = float("nan")
    for tile, stride in CASES:
        weight, padding = torch.ones(16, 16, *TILES[tile]), tuple(k // 2 for k in TILES[tile])
        geometry = {"stride": steps(tile, stride), "padding": padding}
        want = F.conv3d(x, weight, **geometry).relu()
        y = ops.conv3d_winograd(x, weight, torch.zeros(16), **geometry, tile=digits(tile))
        assert y.isnan()[want.isnan()].all()


def test_reads_what_is_not_contiguous() -> None:
    x, weight, bias = torch.randn(1, 6, 7, 9, 5), torch.randn(8, 6, 3, 3, 3), torch.randn(8)
    want = ops.conv3d_winograd(x, weight, bias, padding=1)
    strange = torch.empty(5, 9, 7, 6, 1).copy_(x.permute(4, 3, 2, 1, 0)).permute(4, 3, 2, 1, 0)
    flipped = torch.empty(3, 3, 3, 6, 8).copy_(weight.permute(4, 3, 2, 1, 0)).permute(4, 3, 2, 1, 0)
    assert not strange.is_contiguous()
    assert torch.equal(ops.conv3d_winograd(strange, flipped, bias, padding=1), want)


def test_predicates_and_strict_mode(monkeypatch) -> None:
    monkeypatch.setenv("R3D_KERNELS_ISA", "scalar")  # the same kernels on every machine

    def able(text: str, dtype: torch.dtype = torch.float32) -> set[str]:
        request = backends.Request(ConvProblem.parse(text), dtype, torch.device("cpu"), 2)
        return {k.name for k in backends.KERNELS if k.can_run(request) is None and k.backend == "cpu"}

    assert able("n1c64d8h28w28k64f3p1") == {
        "direct",
        "winograd F(2,2,2)",
        "winograd F(2,4,4)",
        "winograd F(4,4,4)",
    }
    assert able("n1c64d8h28w28k64f1x3x3p0x1x1") == {"direct", "winograd F(1,2,2)", "winograd F(1,4,4)"}
    assert able("n1c64d8h28w28k64f3x1x1p1x0x0") == {"direct", "winograd F(2,1,1)", "winograd F(4,1,1)"}
    strided = "n1c64d8h28w28k64f3s2p1"
    assert able(strided) == {"direct", "direct kept", "winograd F(2,2,2) s2", "winograd F(4,2,2) s2"}
    planes = "n1c64d8h28w28k64f1x3x3s1x2x2p0x1x1"
    assert able(planes) == {"direct", "winograd F(1,2,2) s2", "winograd F(1,4,4) s2"}
    for other in (
        "n1c64d8h28w28k64f3s1x2x2p1",
        "n1c64d16h28w28k64f1x3x3s2p0x1x1",
        "n1c64d8h28w28k64f3p1l2",
        "n1c64d8h28w28k64f1",
    ):
        assert able(other) == {"direct"}
    monkeypatch.setenv("R3D_KERNELS_FP32", "strict")
    assert able("n1c64d8h28w28k64f3p1") == {"direct", "winograd F(2,2,2)"}
    assert able(strided) == {"direct", "direct kept", "winograd F(2,2,2) s2"}
    assert able("n1c64d2h28w28k64f3p1") == {"direct"}
    assert "winograd F(2,2,2)" in able("n1c64d2h28w28k64f3p1", torch.bfloat16)
    assert "winograd F(2,4,4)" in able("n1c64d8h28w28k64f3p1", torch.bfloat16)
    monkeypatch.setenv("R3D_KERNELS_FP32", "exact")
    with pytest.raises(ValueError, match="R3D_KERNELS_FP32: expected 'default' or 'strict', got 'exact'"):
        able("n1c64d8h28w28k64f3p1")


def test_strict_mode_is_followed_at_once(monkeypatch) -> None:
    monkeypatch.setenv("R3D_KERNELS_MEMORY", "fast")  # direct convolution copies nothing
    layer = r3d.ConvBNAct3d(64, 64, 3, padding=1).eval()
    x = torch.randn(1, 64, 8, 28, 28)
    seen = []
    for mode in ("default", "strict"):
        monkeypatch.setenv("R3D_KERNELS_FP32", mode)
        with torch.inference_mode(), r3d.backend("cpu"):
            layer(x)
        seen.append(backends.explain(layer)[-1].kernel)
    assert "4" in seen[0].partition("F(")[2].partition(")")[0]
    assert "4" not in seen[1].partition("F(")[2].partition(")")[0]
