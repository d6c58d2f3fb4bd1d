"""Stems: Toom-Cook along depth against float64, for every tile and instruction set, and in both layouts of the clip."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_keeps_promise, relative_error
from strategies import problem_strategy
from torch import Tensor

import r3d_kernels as r3d
from r3d_kernels import _cpu_kernels, backends, ops
from r3d_kernels.problems import ConvProblem

ISAS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")
USABLE = ISAS[: min(3, ISAS.index(backends.describe()["best_isa"]) + 1)]  # those above run the code of avx512
LAYOUTS = (torch.contiguous_format, torch.channels_last_3d)
TILES = {1: (1,), 3: (2, 4, 8), 4: (2, 4, 8), 5: (2, 4, 6), 6: (2, 4), 7: (2, 4, 6)}  # taps: outputs
ALL = [(taps, 1, m) for taps, tiles in TILES.items() for m in tiles] + [
    (kernel, 2, m) for kernel in (5, 6, 7) for m in TILES[(kernel + 1) // 2]
]
ROWS = (1, 2, 4)  # output rows of a tile, where the kernel is seven rows with a stride of 2
GEOMETRIES = [
    "n1c3d8h20w22k64f7s1x2x2p3+relu",
    "n2c3d6h19w21k45f3x7x7s1x2x2p1x3x3+res+relu",
    "n1c1d9h13w11k7f7s2p3+res",
    "n1c4d5h9w50k65f5x3x1s1x3x1p0x1x0+relu",  # several groups of pixels
    "n1c2d7h6w5k3f7x5x3s1x1x3p5x4x2",  # frames and rows of padding alone
    "n2c3d4h5w40k130f6x1x5s2x2x2p3x0x2+relu",  # two panels
    "n1c2d11h33w9k17f4x33x2s1p1x4x0",
    "n1c1d3h4w3k1f3s1x3x3p1",
    "n1c3d3h3w2k8f5x1x1s2x2x3p2x1x2+relu",  # pixels that lie on padding alone
    "n2c3d5h13w61k80f3x7x7s1x2x2p1x3x3+res+relu",  # broken tiles of rows, two panels, several groups of pixels
    "n1c3d4h29w70k45f1x7x7s1x2x2p0x3x3+relu",  # R(2+1)D
    "n1c4d6h9w70k16f7x7x3s2x2x1p3x6x1",  # rows of padding alone, with a stride of 1 along width
]


@pytest.fixture(params=USABLE)
def isa(request, monkeypatch):
    monkeypatch.setenv("R3D_KERNELS_ISA", request.param)
    return request.param


def run(
    x: Tensor,
    weight: Tensor,
    tile: int,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    row_tile: int = 1,
    **geometry,
) -> tuple[Tensor, Tensor, Tensor]:
    """Ours, float64, and the stock convolution in the dtype of x."""
    bias = torch.zeros(len(weight)) if bias is None else bias
    y = ops.conv3d_stem(x, weight, bias, scale, residual, tile=tile, row_tile=row_tile, **geometry)
    relu = geometry.pop("activation", "relu") == "relu"

    def expected(dtype: torch.dtype) -> Tensor:
        z = F.conv3d(x.to(dtype), weight.to(dtype), None, **geometry).double()
        if scale is not None:
            z = z * scale.double().view(-1, 1, 1, 1)
        z = z + bias.double().view(-1, 1, 1, 1)
        if residual is not None:
            z = z + residual.double()
        return z.relu() if relu else z

    assert y.dtype == x.dtype
    assert y.is_contiguous(memory_format=torch.channels_last_3d) or not y.numel()
    want = expected(torch.float64)
    return y, want, expected(torch.float32) if x.dtype == torch.float32 else want.to(x.dtype)


def tiles_of(p: ConvProblem) -> tuple[int, ...]:
    return TILES.get(-(-p.kernel[0] // p.stride[0]), ())


def coarse(p: ConvProblem, tile: int, row_tile: int) -> bool:
    return tile in _cpu_kernels._COARSE_STEMS.get((-(-p.kernel[0] // p.stride[0]), row_tile), ())


def rows_of(p: ConvProblem) -> tuple[int, ...]:
    return ROWS if (p.kernel[1], p.stride[1]) == (7, 2) else (1,)


def check(
    p: ConvProblem,
    dtype: torch.dtype,
    tile: int,
    layout: torch.memory_format = torch.contiguous_format,
    row_tile: int = 1,
) -> None:
    t = p.tensors(dtype)
    y, want, stock = run(
        t.x.contiguous(memory_format=layout),
        t.weight.contiguous(memory_format=layout),
        tile,
        row_tile=row_tile,
        scale=torch.rand(p.k) + 0.5,
        bias=torch.randn(p.k),
        residual=t.residual,
        stride=p.stride,
        padding=p.padding,
        activation=p.activation,
    )
    terms = F.conv3d(t.x.double().abs(), t.weight.double().abs(), None, p.stride, p.padding).norm().item()
    assert_keeps_promise(y, want, stock, magnitude=terms)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["plain", "cl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("text", GEOMETRIES)
def test_geometries(text: str, dtype: torch.dtype, layout: torch.memory_format, isa: str) -> None:
    p = ConvProblem.parse(text)
    for tile in tiles_of(p):
        for row_tile in rows_of(p):
            if not coarse(p, tile, row_tile):
                check(p, dtype, tile, layout, row_tile)


@pytest.mark.parametrize(("kernel", "stride", "tile"), ALL)
def test_tiles(kernel: int, stride: int, tile: int, isa: str) -> None:
    """Whole and broken tiles, 1 to 4 channels."""
    for c, d in ((1, 16), (2, 17), (3, 2 * tile * stride), (4, 5)):
        text = f"n1c{c}d{d}h9w15k24f{kernel}x3x3s{stride}x2x2p{kernel // 2}x1x1+relu"
        for layout in LAYOUTS:
            check(ConvProblem.parse(text), torch.float32, tile, layout)


@pytest.mark.parametrize("row_tile", ROWS[1:])
@pytest.mark.parametrize(("kernel", "stride", "tile"), ALL)
def test_row_tiles(kernel: int, stride: int, tile: int, row_tile: int, isa: str) -> None:
    """Whole and broken tiles of rows, as many rows of tiles as a task takes and more."""
    for c, h in ((1, 8), (3, 23), (4, 2 * row_tile)):
        p = ConvProblem.parse(f"n1c{c}d5h{h}w15k24f{kernel}x7x5s{stride}x2x2p{kernel // 2}x3x2+relu")
        if not coarse(p, tile, row_tile):
            for layout in LAYOUTS:
                check(p, torch.float32, tile, layout, row_tile)


@st.composite
def stems(draw: st.DrawFn) -> tuple[ConvProblem, int, int]:
    """A problem and tiles for it; height and width are those of any convolution, or the height of a stem."""
    p = draw(problem_strategy(channels=(1, 2, 3, 4), max_dilation=1, groups=False))
    stride = draw(st.integers(1, 2))
    kernel = draw(st.sampled_from((1, 3, 4, 5, 6, 7)) if stride == 1 else st.integers(5, 7))
    padding, out = draw(st.integers(0, 4)), draw(st.integers(1, 9))
    if draw(st.booleans()):
        rows, pad = draw(st.integers(1, 9)), draw(st.integers(0, 7))
        size = max(2 * (rows - 1) + 7 - 2 * pad + draw(st.integers(0, 1)), 1)
        p = dataclasses.replace(
            p, h=size, kernel=(1, 7, p.kernel[2]), stride=(1, 2, p.stride[2]), padding=(0, pad, p.padding[2])
        )
    p = dataclasses.replace(
        p,
        k=draw(st.sampled_from((1, 3, 7, 16, 17, 45, 64, 65))),
        d=max((out - 1) * stride + kernel - 2 * padding + draw(st.integers(0, stride - 1)), 1),
        kernel=(kernel, *p.kernel[1:]),
        stride=(stride, *p.stride[1:]),
        padding=(padding, *p.padding[1:]),
    ).validate()
    tile = draw(st.sampled_from(tiles_of(p)))
    return p, tile, draw(st.sampled_from([rows for rows in rows_of(p) if not coarse(p, tile, rows)] or [1]))


@given(stems(), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from(LAYOUTS))
def test_any_geometry(
    stem: tuple[ConvProblem, int, int], dtype: torch.dtype, layout: torch.memory_format
) -> None:
    check(stem[0], dtype, stem[1], layout, stem[2])


def clip(kind: str, *shape: int) -> Tensor:
    """Kinds of data that a network sees at its stem."""
    if kind == "normal":
        return torch.randn(shape)
    if kind == "positive":
        return torch.randn(shape).relu()
    if kind == "bytes":
        return torch.randint(0, 256, shape).float()
    still = torch.rand(*shape[:2], 1, *shape[3:]) * 200 + torch.randn(shape) * 3  # frames that hardly differ
    still = still.clamp(0, 255).round()
    return still if kind == "video" else (still - 114) / 58


@pytest.mark.parametrize("kind", ["normal", "positive", "bytes", "video", "normalised video"])
@pytest.mark.parametrize(("kernel", "stride", "tile"), ALL)
def test_error(kernel: int, stride: int, tile: int, kind: str) -> None:
    """Within the promise on whole stems, and tiles of R3D_KERNELS_FP32=strict within twice the stock error."""
    for c in (1, 3, 4):
        x, weight = clip(kind, 1, c, 16, 20, 20), torch.randn(32, c, kernel, 7, 7)
        geometry = {"stride": (stride, 2, 2), "padding": (kernel // 2, 3, 3), "activation": None}
        taps = -(-kernel // stride)
        for row_tile in ROWS:
            y, want, stock = run(x, weight, tile, row_tile=row_tile, **geometry)
            error = relative_error(y, want)
            assert error < (9e-6 if tile in _cpu_kernels._COARSE_STEMS.get((taps, row_tile), ()) else 4.5e-6)
            if row_tile == 1 and tile in _cpu_kernels._STRICT_STEMS.get(taps, ()):
                assert error <= 2 * relative_error(stock, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_layout_is_read(dtype: torch.dtype, isa: str) -> None:
    """Slices of planes and of pixels are read where they lie; what is neither is copied."""
    weight, whole = torch.randn(20, 3, 5, 3, 3).to(dtype), torch.randn(2, 5, 9, 12, 14).to(dtype)
    pixels = torch.randn(2, 3, 9, 12, 14).to(dtype).contiguous(memory_format=torch.channels_last_3d)
    views = [
        whole[:, 1:4, ::2, 1:, 2:9],
        whole[:, ::2, 1:8, ::3],
        whole[:, :3, :, :, ::2],
        whole.transpose(3, 4)[:, :3],
        whole[:, 2:3, :, :, :1].expand(2, 3, 9, 12, 1),
        pixels[:1, :, 2:, 3:, 1:7],
        pixels[:, :, ::2, ::2],
        pixels.flip(2),
    ]
    for x in views:
        geometry = {"padding": (2, 1, 1), "activation": None}
        y = run(x, weight, 4, **geometry)[0]
        assert torch.equal(y, run(x.contiguous(), weight, 4, **geometry)[0]) or relative_error(
            y, run(x.contiguous(), weight, 4, **geometry)[0].double()
        ) < (1e-6 if dtype == torch.float32 else 1e-2)
        assert_keeps_promise(*run(x, weight, 4, **geometry))
    odd = torch.randn(5, 20, 3, 3, 3).to(dtype).permute(1, 2, 0, 3, 4)  # a weight of neither layout
    assert_keeps_promise(*run(views[0], odd, 2, padding=(2, 1, 1)))


def test_empty_batch() -> None:
    y = ops.conv3d_stem(torch.zeros(0, 3, 8, 9, 9), torch.zeros(5, 3, 7, 3, 3), torch.zeros(5), padding=3)
    assert y.shape == (0, 5, 8, 13, 13)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["plain", "cl"])
@pytest.mark.parametrize("tile", [2, 4, 6])
def test_same_bits_with_any_number_of_threads(tile: int, layout: torch.memory_format) -> None:
    x = torch.randn(2, 3, 9, 40, 33).contiguous(memory_format=layout)
    weight, residual = torch.randn(70, 3, 7, 5, 5), torch.randn(2, 70, 9, 20, 17)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(
                ops.conv3d_stem(
                    x, weight, torch.ones(70), None, residual, stride=(1, 2, 2), padding=(3, 2, 2), tile=tile
                )
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("row_tile", ROWS[1:])
def test_same_bits_of_row_tiles(row_tile: int) -> None:
    x, weight, before, results = (
        torch.randn(1, 3, 6, 40, 33),
        torch.randn(70, 3, 7, 7, 5),
        torch.get_num_threads(),
        [],
    )
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(
                ops.conv3d_stem(
                    x, weight, torch.ones(70), stride=(1, 2, 2), padding=(3, 3, 2), row_tile=row_tile
                )
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize(("kernel", "stride", "tile"), ALL)
def test_not_a_number_and_infinity_arrive(kernel: int, stride: int, tile: int, isa: str) -> None:
    """They may spread over the frames of a tile, but not vanish, nor leave the pixels that see them."""
    weight = torch.randn(8, 3, kernel, 3, 3)
    high = torch.randn(8, 3, kernel, 7, 3)
    for value in (float("nan"), float("inf"), float("-inf")):
        x = torch.randn(1, 3, 11, 17, 7)
        x[0, 1, 5, 9, 4] = value
        geometry = {"stride": (stride, 2, 1), "padding": (kernel // 2, 3, 1)}
        want = F.conv3d(x, high, None, **geometry)
        for row_tile in ROWS[1:]:
            y = ops.conv3d_stem(
                x, high, torch.zeros(8), activation=None, tile=tile, row_tile=row_tile, **geometry
            )
            assert not torch.isfinite(y)[~torch.isfinite(want)].any()
            columns = (~torch.isfinite(want)).any((2, 3), keepdim=True).expand_as(want)
            assert torch.isfinite(y)[~columns].all()
        for frame in (0, 5, 10):
            x = torch.randn(1, 3, 11, 7, 7)
            x[0, 1, frame, 3, 4] = value
            geometry = {"stride": (stride, 1, 1), "padding": (kernel // 2, 1, 1)}
            y = ops.conv3d_stem(x, weight, torch.zeros(8), activation=None, tile=tile, **geometry)
            want = F.conv3d(x, weight, None, **geometry)
            assert not torch.isfinite(y)[~torch.isfinite(want)].any()
            touched = (~torch.isfinite(want)).any(2, keepdim=True).expand_as(want)
            assert torch.isfinite(y)[~touched].all()
            if value != value:
                relu = ops.conv3d_stem(x, weight, torch.zeros(8), tile=tile, **geometry)
                assert relu[want.isnan()].isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.zeros(1, 5, 9, 5, 5), "weight": torch.zeros(8, 5, 7, 3, 3)},
            "x: stems have at most 4 channels",
        ),
        ({"stride": (3, 1, 1)}, "stride: stems have a stride of 1 or 2 along depth"),
        ({"weight": torch.zeros(8, 3, 8, 3, 3)}, "weight: stems have a kernel of at most 7 along depth"),
        (
            {"weight": torch.zeros(8, 3, 2, 3, 3)},
            "weight: stems have a kernel of 1 or at least 3 along depth",
        ),
        (
            {"weight": torch.zeros(8, 3, 3, 3, 3), "stride": 2},
            "at least 5 with a stride of 2.*stride \\[2, 2, 2\\]",
        ),
        ({"tile": 3}, "tile: expected 2, 4, 6 .*tile 3"),
        ({"tile": 8}, "tile: expected 2, 4, 6"),
        ({"tile": 6, "stride": 2}, "tile: expected 2, 4, 6"),
        ({"tile": 0}, "tile: expected 1, 2, 4, 6 or 8, got 0"),
        ({"tile": 1 << 40}, "tile: expected 1, 2, 4, 6 or 8"),
        ({"tile": 1}, "tile: expected 2, 4, 6 .*1 for one tap"),
        ({"weight": torch.zeros(8, 3, 1, 3, 3), "tile": 2}, "tile: expected 2, 4, 6 .*tile 2"),
        ({"weight": torch.zeros(8, 3, 1, 3, 3), "stride": (2, 1, 1)}, "weight: stems have a kernel of 1"),
        ({"row_tile": 0}, "row_tile: expected 1, 2 or 4, got 0"),
        ({"row_tile": 3}, "row_tile: expected 1, 2 or 4.*row_tile 3"),
        ({"row_tile": 4}, "row_tile: more than 1 is for kernels of 7 with a stride of 2 along height"),
        ({"bias": torch.zeros(7)}, "bias: expected a float32 CPU tensor of shape"),
        ({"scale": torch.zeros(8, dtype=torch.float64)}, "scale: expected a float32 CPU tensor"),
        ({"weight": torch.zeros(8, 3, 7, 3, 3).bfloat16()}, "weight: expected the dtype of x"),
        ({"weight": torch.zeros(8, 4, 7, 3, 3)}, "channels"),
        ({"weight": torch.zeros(8, 3, 7, 3)}, "weight: expected 5 dimensions"),
        ({"x": torch.zeros(3, 9, 5, 5)}, "x: expected 5 dimensions"),
        ({"x": torch.zeros(1, 3, 9, 5, 5, dtype=torch.float64)}, "x: expected float32 or bfloat16"),
        ({"x": torch.zeros(1, 3, 5, 5, 5)}, "kernel_size: the kernel does not fit"),
        ({"residual": torch.zeros(1, 8, 5, 5, 5)}, "residual: expected the output's shape"),
        ({"residual": torch.zeros(1, 8, 3, 3, 3).bfloat16()}, "residual: expected the dtype of x"),
        ({"padding": -1}, "padding"),
        ({"activation": "gelu"}, "activation"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    good = {"x": torch.zeros(1, 3, 9, 5, 5), "weight": torch.zeros(8, 3, 7, 3, 3), "bias": torch.zeros(8)}
    ops.conv3d_stem(**good)
    with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
        ops.conv3d_stem(**(good | change))


def test_opcheck() -> None:
    x, w = torch.randn(1, 3, 6, 9, 9), torch.randn(16, 3, 7, 3, 3)
    residual = torch.randn(1, 16, 6, 5, 5)
    args = (x, w, torch.rand(16), torch.zeros(16), residual, [1, 2, 2], [3, 1, 1], "relu", 4)
    torch.library.opcheck(torch.ops.r3d_kernels.conv3d_stem.default, args)
    args = (x, torch.randn(16, 3, 7, 7, 3), None, torch.zeros(16), None, [1, 2, 2], [3, 3, 1], "relu", 4, 4)
    torch.library.opcheck(torch.ops.r3d_kernels.conv3d_stem.default, args)


def test_flops_are_those_of_the_convolution() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x, w = torch.randn(1, 3, 6, 9, 9), torch.randn(16, 3, 7, 3, 3)
    with FlopCounterMode(display=False) as counter:
        y = ops.conv3d_stem(x, w, torch.zeros(16), padding=(3, 1, 1))
    assert counter.get_total_flops() == 2 * y.numel() * 3 * 7 * 3 * 3


def able(text: str, dtype: torch.dtype = torch.float32) -> set[str]:
    request = backends.Request(ConvProblem.parse(text), dtype, torch.device("cpu"), 2)
    names = {k.name for k in backends.KERNELS if k.can_run(request) is None}
    return {name.removeprefix("stem ") for name in names if name.startswith("stem")}


def test_predicates(monkeypatch) -> None:
    monkeypatch.delenv("R3D_KERNELS_FP32", raising=False)
    assert able("n1c3d16h112w112k64f7s1x2x2p3") == {"F(2)", "F(4)", "F(6)", "F(4,4)"}
    assert able("n1c3d16h112w112k64f3x7x7s1x2x2p1x3x3") == {"F(2)", "F(4)", "F(8)", "F(4,4)"}
    assert able("n1c1d16h112w112k64f7s2p3") == {"F(2)", "F(4)", "F(8)", "F(4,4)"}
    assert able("n1c1d16h112w112k64f7s2x1x2p3") == {"F(2)", "F(4)", "F(8)"}
    assert able("n1c3d16h112w112k45f1x7x7s1x2x2p0x3x3") == {"F(1,4)"}
    for other in (
        "n1c5d16h12w12k64f7s1x2x2p3",
        "n1c3d16h12w12k64f7s3x2x2p3",
        "n1c3d16h12w12k64f1x7x7s2p0x3x3",
        "n1c3d16h12w12k64f1x3x3s1x2x2p0x1x1",
        "n1c3d16h12w12k64f2x7x7s2p1x3x3",
        "n1c3d16h12w12k64f3s2p1",
        "n1c3d16h12w12k64f9s2p4",
        "n1c3d16h12w12k64f3p1l1x2x1",
        "n1c3d16h12w12k63f3p1g3",
    ):
        assert able(other) == set()
    monkeypatch.setenv("R3D_KERNELS_FP32", "strict")
    assert able("n1c3d16h112w112k64f7s1x2x2p3") == set()
    assert able("n1c3d16h112w112k64f3x7x7s1x2x2p1x3x3") == {"F(2)", "F(4)"}
    assert able("n1c3d16h112w112k64f7s2p3") == {"F(2)", "F(4)"}
    assert able("n1c3d16h112w112k64f3p1") == {"F(2)"}
    assert able("n1c3d16h112w112k64f5p2") == able("n1c3d16h112w112k45f1x7x7s1x2x2p0x3x3") == set()
    assert able("n1c3d16h112w112k64f7s1x2x2p3", torch.bfloat16) == {
        "F(2)",
        "F(4)",
        "F(6)",
        "F(4,4)",
        "F(6,4)",
    }


@pytest.mark.parametrize(("tile", "rows"), [(2, 1), (4, 1), (6, 1), (4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_classes(tile: int, rows: int, dtype: torch.dtype) -> None:
    """The kernels as a layer runs them, with batch norm; they keep no copy of the weight."""
    layer = r3d.ConvBNAct3d(3, 32, 7, stride=(1, 2, 2), padding=3, fused=False).eval().to(dtype)
    bn = layer.bn
    torch.nn.init.uniform_(bn.running_mean)
    torch.nn.init.uniform_(bn.running_var, 0.5, 2)
    x = torch.randn(1, 3, 8, 20, 20).to(dtype)
    kernel = next(
        k for k in backends.KERNELS if k.name == f"stem F({tile if rows == 1 else f'{tile},{rows}'})"
    )
    p = ConvProblem(
        1, 3, 8, 20, 20, k=32, kernel=(7, 7, 7), stride=(1, 2, 2), padding=(3, 3, 3), activation="relu"
    )
    request = backends.Request(p, dtype, torch.device("cpu"), 2)
    norm = (bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)
    pack = kernel.pack(backends.Layer.of(layer.conv.weight, None, norm), request)
    assert pack[0].data_ptr() == layer.conv.weight.data_ptr()
    assert kernel.copies_weights is False
    with torch.no_grad():
        want = layer.double()(x.double())
    assert_keeps_promise(kernel.run(pack, x, None, request), want, want.to(dtype))
    work = backends.work(kernel, request)
    assert work.macs == -(-8 // tile) * (tile + 6) * 10 * 32 * 3 * (10 * 49 if rows == 1 else 3 * 13 * 7)
    assert work.arithmetic == torch.float32
    assert kernel.cycles(request) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_class_of_one_frame(dtype: torch.dtype) -> None:
    layer = (
        r3d.ConvBNAct3d(3, 45, (1, 7, 7), stride=(1, 2, 2), padding=(0, 3, 3), fused=False).eval().to(dtype)
    )
    x = torch.randn(1, 3, 5, 21, 20).to(dtype)
    p = ConvProblem.parse("n1c3d5h21w20k45f1x7x7s1x2x2p0x3x3+relu")
    request = backends.Request(p, dtype, torch.device("cpu"), 2)
    kernel = next(k for k in backends.KERNELS if k.name == "stem F(1,4)")
    bn = layer.bn
    norm = (bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)
    pack = kernel.pack(backends.Layer.of(layer.conv.weight, None, norm), request)
    with torch.no_grad():
        want = layer.double()(x.double())
    assert_keeps_promise(kernel.run(pack, x, None, request), want, want.to(dtype))
    # 11 output rows are 3 tiles of 13 products, each of 3 channels and 7 columns
    assert backends.work(kernel, request).macs == 5 * 3 * 13 * 10 * 45 * 3 * 7
    assert kernel.cycles(request) > 0


def test_chosen_without_a_measurement(monkeypatch) -> None:
    monkeypatch.setenv("R3D_KERNELS_TUNE", "0")
    monkeypatch.delenv("R3D_KERNELS_FP32", raising=False)
    monkeypatch.setenv("R3D_KERNELS_ISA", "scalar")
    layer = r3d.ConvBNAct3d(3, 64, 7, stride=(1, 2, 2), padding=3).eval()
    with torch.inference_mode(), r3d.backend("cpu"):
        layer(torch.randn(1, 3, 8, 40, 40))
    assert backends.explain(layer)[-1].kernel.startswith("stem F(")
