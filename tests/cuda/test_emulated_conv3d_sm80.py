"""The very source of csrc/cuda/conv3d_sm80*.cu, run on the CPU in every schedule and timing, against float64."""

from __future__ import annotations

import math
import mmap
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_keeps_promise, relative_error

from r3d_kernels.ops.conv3d_sm90 import in_rows
from r3d_kernels.problems import ConvProblem

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TILES = (0, 1, 2)  # 128x128, 128x64, 64x64


def geometry(p: ConvProblem):
    sizes = [p.n, p.c, p.d, p.h, p.w, p.k]
    return sizes, list(p.kernel), list(p.stride), list(p.padding), list(p.dilation)


class Case:
    """The tensors of a problem, and what the kernel makes of them.

    `padded`: pixels of x, residual and y begin at multiples of 16 bytes, and NaN lies between them.
    """

    def __init__(
        self, text: str, dtype: torch.dtype, *, scale: bool = True, seed: int = 0, padded: bool = False
    ) -> None:
        p = self.p = ConvProblem.parse(text)
        self.dtype = dtype
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=g)

        def place(t: torch.Tensor) -> torch.Tensor:
            if padded:
                return in_rows(t.to(dtype), float("nan"))
            return t.to(dtype).contiguous(memory_format=torch.channels_last_3d)

        self.pitch = p.k + -p.k % (16 // dtype.itemsize) if padded else 0
        self.x = place(normal(p.n, p.c, p.d, p.h, p.w))
        self.weight = (normal(p.k, p.c, *p.kernel) / (p.c * torch.tensor(p.kernel).prod()) ** 0.5).to(dtype)
        self.scale = 0.5 + normal(p.k).abs() if scale else None
        self.bias = normal(p.k)
        shape = (p.n, p.k, *p.out_size)
        self.residual = place(normal(*shape)) if p.residual else None
        self.y = place(torch.full(shape, float("nan")))

    def packed(self, emu, *, source: torch.dtype | None = None) -> torch.Tensor:
        where = geometry(self.p)
        layout = emu.layout(*where, CODES[self.dtype])
        packed = torch.full((self.p.k, layout["row_elements"]), float("nan"), dtype=self.dtype)
        weight = self.weight.to(source or self.dtype).contiguous()
        emu.pack(*where, CODES[weight.dtype], weight.data_ptr(), CODES[self.dtype], packed.data_ptr())
        return packed

    def run(self, emu, tile: int = -1, splits: int = 1) -> torch.Tensor:
        packed = self.packed(emu)
        pointers = [0 if t is None else t.data_ptr() for t in (self.scale, self.bias, self.residual, self.y)]
        relu = int(self.p.activation == "relu")
        strides = list(self.x.stride())
        self.y.fill_(float("nan"))
        self.scratch = emu.conv3d(
            *geometry(self.p), CODES[self.dtype], relu, self.x.data_ptr(), strides, packed.data_ptr(), *pointers,
            tile, splits, residual_pitch=self.pitch, y_pitch=self.pitch,
        )  # fmt: skip
        return self.y

    def exact(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """With float64, the oracle. With another dtype, stock layers that round between operations."""
        p, shape = self.p, (1, -1, 1, 1, 1)
        if dtype == torch.float64:
            y = F.conv3d(self.x.double(), self.weight.double(), None, p.stride, p.padding, p.dilation)
        else:  # float32 inside and one rounding, as cuDNN; the CPU's own bfloat16 is wrong for some geometries
            y = F.conv3d(self.x.float(), self.weight.float(), None, p.stride, p.padding, p.dilation).to(dtype)
        if self.scale is not None:
            y = y * self.scale.to(dtype if dtype == torch.float64 else torch.float32).view(shape)
        y = (y + self.bias.to(dtype if dtype == torch.float64 else torch.float32).view(shape)).to(dtype)
        if self.residual is not None:
            y = y + self.residual.to(dtype)
        return y.relu() if p.activation == "relu" else y

    def magnitude(self) -> torch.Tensor:
        """The sum of the terms' magnitudes."""
        p = self.p
        y = F.conv3d(self.x.double().abs(), self.weight.double().abs(), None, p.stride, p.padding, p.dilation)
        return y if self.scale is None else y * self.scale.double().view(1, -1, 1, 1, 1)

    def check(self) -> None:
        exact = self.exact()
        if self.dtype == torch.float32:  # TF32: both factors of every term are rounded
            assert bool(((self.y.double() - exact).abs() <= 2.0**-10 * self.magnitude() + 1e-5).all())
        else:
            assert_keeps_promise(
                self.y, exact, self.exact(self.dtype), magnitude=float(self.magnitude().norm())
            )


# Strides, three different paddings, dilations, tails in every dimension, several samples.
GEOMETRIES = (
    "n2c64d2h5w7k64f3p1+res+relu",
    "n1c8d3h5w6k24f3p1",
    "n3c24d2h5w5k45f3s2p1+relu",
    "n2c45d3h4w5k64f3x1x1p1x0x0+res+relu",
    "n1c45d2h3w5k230f1x3x3p0x1x1+res",
    "n2c16d5h6w7k8f3x2x4s2x3x1p2x0x1l1x2x1+relu",
    "n1c128d2h4w5k128f3p2x1x2l2x1x2+res+relu",
    "n5c72d1h3w3k130f1",
    "n1c3d4h13w15k64f3x7x7s1x2x2p1x3x3+relu",
    "n2c3d3h9w10k45f1x7x7s1x2x2p0x3x3+relu",
    "n1c1d5h9w9k17f7s1x2x2p3",
    "n1c3d3h5w7k8f3p1x2x0+res",
    "n2c4d2h5w5k3f2x2x5p1x1x4l1x1x2",
    "n1c1d1h1w1k1f1",
)
IDS = {"ids": str}


@pytest.mark.parametrize("text", GEOMETRIES, **IDS)
@pytest.mark.parametrize("dtype", CODES, **IDS)
def test_against_float64(emu80, text, dtype):
    case = Case(text, dtype)
    # All dtypes share all code but the product itself: the larger tiles once. 343 taps leave the largest no room.
    tiles = TILES if dtype == torch.bfloat16 else TILES[2:]
    for tile in tiles if math.prod(case.p.kernel) < 300 else tiles[1:] or tiles:
        case.run(emu80, tile)
        case.check()


@pytest.mark.parametrize("dtype", CODES, **IDS)
def test_the_tile_that_is_chosen(emulated80, dtype):
    for text in (*GEOMETRIES, "n1c230d1h3w4k921f1+relu", "n1c921d2h2w2k230f3x1x1p1x0x0+res"):
        case = Case(text, dtype, seed=1)
        case.run(emulated80)
        case.check()


@pytest.mark.parametrize("splits", [2, 3, 8])
@pytest.mark.parametrize("text", ["n2c64d2h3w5k64f3p1+res+relu", "n1c24d3h4w5k45f3p1x2x0+relu"], **IDS)
def test_split_sums(emu80, text, splits):
    for dtype in CODES:
        case = Case(text, dtype)
        assert case.run(emu80, 2, splits) is case.y
        case.check()
        assert case.scratch >= splits * case.p.n * case.y[0].numel() * 4


def between(y: torch.Tensor) -> torch.Tensor:
    """What lies behind the channels of each pixel."""
    n, k, d, h, w = y.shape
    pitch = y.stride(4)
    return y.as_strided((n, d, h, w, pitch), (d * h * w * pitch, h * w * pitch, w * pitch, pitch, 1))[..., k:]


def bits(y: torch.Tensor) -> torch.Tensor:
    return y.contiguous().view(torch.int32 if y.dtype == torch.float32 else torch.int16)


@pytest.fixture(scope="module")
def dense_bits(emulated80):
    """What comes of pixels side by side; run once, in whichever timing is the first: it changes no bit."""

    @cache
    def run(text: str, dtype: torch.dtype, tile: int, splits: int) -> torch.Tensor:
        return bits(Case(text, dtype).run(emulated80, tile, splits))

    return run


@pytest.mark.parametrize(
    "text",
    [
        "n2c45d3h4w5k64f3x1x1p1x0x0+res+relu",
        "n1c45d2h3w5k230f1x3x3p0x1x1+res",
        "n2c13d3h5w6k41f3s2p0x1x2+relu",  # three paddings, groups of 8 with 5 and with 1 channel of their own
        "n1c70d2h5w9k45f1x3x3p0x1x1l1x2x1+res+relu",
        "n1c3d4h9w10k45f1x7x7s1x2x2p0x3x3+relu",  # a stem, whose x is copied in any case
        "n1c2d2h3w4k3f2p1+res",
        "n1c64d2h3w5k64f3p1+res+relu",
    ],
    **IDS,
)
def test_pixels_at_whole_chunks(emu80, dense_bits, text):
    """Channels that are no multiple of 8: read and written in place, whatever lies between the pixels."""
    for dtype in CODES:
        case = Case(text, dtype, padded=True)
        for tile, splits in ((0, 1), (1, 1), (2, 1), (2, 3)):
            y = case.run(emu80, tile, splits)
            case.check()
            assert not between(y).any()  # zeros, and so no NaN for whoever reads whole chunks
            assert torch.equal(bits(y), dense_bits(text, dtype, tile, splits))
            partial = splits * case.p.n * math.prod(case.p.out_size) * (case.p.k + -case.p.k % 8) * 4
            if case.p.c > 3:
                assert case.scratch == (partial if splits > 1 else 0)  # no copy of x


def test_behind_the_channels_stay_zeros_under_nan(emulated80):
    case = Case("n1c45d2h3w5k13f3p1+res", torch.bfloat16, padded=True)
    case.x.fill_(float("nan"))
    for splits in (1, 2):
        y = case.run(emulated80, 2, splits)
        assert y.isnan().all()
        assert not between(y).any()


def test_every_timing_gives_the_same_bits(emulated80, timings):
    outputs = []
    for timing in timings:
        for multiprocessors in (1, 5):
            emulated80.configure(*timing, multiprocessors=multiprocessors)
            case = Case("n2c32d2h5w5k72f3p1+res", torch.bfloat16)
            outputs.append([case.run(emulated80, 2, splits).clone().view(torch.int16) for splits in (1, 3)])
    emulated80.configure()
    for split in (0, 1):
        assert all(torch.equal(outputs[0][split], o[split]) for o in outputs)
    assert not torch.equal(outputs[0][0], outputs[0][1])  # another order of the sum: the test can see bits


def laid_out(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same values in another place or layout."""
    if how == "NCDHW":
        return x.contiguous()
    if how == "misaligned":
        return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].as_strided(x.shape, x.stride()).copy_(x)
    n, c, d, h, w = x.shape
    wide = torch.full((n, d, h + 1, w + 2, c + 8), float("nan"), dtype=x.dtype)
    return wide[:, :, 1:, 1:-1, 8:].permute(0, 4, 1, 2, 3).copy_(x)  # "sliced": NaN all around


@pytest.mark.parametrize("how", ["NCDHW", "misaligned", "sliced"])
@pytest.mark.parametrize(
    "text", ["n2c16d2h5w6k24f3p1+res+relu", "n2c3d3h9w10k16f3x7x7s1x2x2p1x3x3", "n1c45d2h3w4k8f1"]
)
def test_any_layout_of_x(emulated80, text, how):
    for dtype in CODES:
        case = Case(text, dtype)
        case.x = laid_out(case.x, how)
        emulated80.configure(2, 3, True)
        case.run(emulated80)
        case.check()
    emulated80.configure()


@pytest.mark.parametrize("axis", [0, 2], ids=["samples", "frames"])
def test_offsets_beyond_32_bits(emulated80, axis):
    """x spread over more than 2^31 elements of memory that is never touched."""
    case = Case("n2c8d2h4w4k8f3p1+relu", torch.bfloat16)
    strides = list(case.x.stride())
    strides[axis] = 2**31 + 64
    no_reserve = 0x4000
    memory = mmap.mmap(-1, 3 * 2**32, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    if axis == 2:  # two frames of two samples, the samples side by side
        strides[0] = 4 * 4 * 8
    case.x = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided(case.x.shape, strides).copy_(case.x)
    case.run(emulated80)
    case.check()


def test_misaligned_residual_and_output(emulated80):
    for which in ("residual", "y"):
        case = Case("n2c8d2h5w6k24f3p1+res+relu", torch.bfloat16)
        setattr(case, which, laid_out(getattr(case, which), "misaligned"))
        for splits in (1, 2):
            case.run(emulated80, 2, splits)
            case.check()


def test_no_scale_is_one(emulated80):
    case = Case("n2c8d2h5w6k24f3p1+res+relu", torch.bfloat16, scale=False)
    for splits in (1, 2):
        case.run(emulated80, 2, splits)
        case.check()


@pytest.mark.parametrize("dtype", CODES, **IDS)
def test_nan_and_infinity_reach_what_they_touch(emulated80, dtype):
    case = Case("n1c8d3h6w6k16f3p1+relu", dtype)
    case.x[0, 2, 1, 1, 1] = float("nan")
    case.x[0, 5, 1, 4, 4] = float("inf")
    y, exact = case.run(emulated80), case.exact()
    assert exact.isnan().any()
    assert exact.isinf().any()
    assert torch.equal(y.isnan(), exact.isnan())
    assert torch.equal(y.isinf(), exact.isinf())


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16], **IDS)
def test_packed_weights(emulated80, source):
    plain, rows = (
        Case("n1c13d3h5w5k5f2x3x3p1", torch.float16),
        Case("n1c3d3h9w9k5f2x7x7s1x2x2p3", torch.float16),
    )
    weight = plain.weight.to(source)
    packed = plain.packed(emulated80, source=source).double()
    want = F.pad(weight.permute(0, 2, 3, 4, 1), (0, 3)).reshape(5, -1).to(torch.float16).double()
    assert torch.equal(packed[:, : want.shape[1]], want)
    assert not packed[:, want.shape[1] :].any()
    packed = rows.packed(
        emulated80
    ).double()  # 7 taps of 4 numbers, the fourth and the last tap of 32 numbers zero
    want = F.pad(F.pad(rows.weight.double().permute(0, 2, 3, 4, 1), (0, 1)).flatten(3), (0, 4)).reshape(5, -1)
    assert torch.equal(packed[:, : want.shape[1]], want)
    assert not packed[:, want.shape[1] :].any()


def test_random_geometries(emulated80):
    from hypothesis import given, settings
    from strategies import problem_strategy

    problems = problem_strategy(
        channels=(1, 3, 8, 17, 24, 45, 64), batch=(1, 3), max_out=6, groups=False, max_macs=1_000_000
    )

    @settings(max_examples=60)
    @given(problems)
    def holds(p: ConvProblem) -> None:
        seed = p.macs % 97
        emulated80.configure(seed % 3, seed, seed % 2 == 1)
        case = Case(str(p), (torch.bfloat16, torch.float16, torch.float32)[seed % 3], seed=seed)
        case.run(emulated80, -1 if seed % 4 == 3 else 2)
        case.check()

    holds()
    emulated80.configure()


# ---- planted faults: a test that cannot see them proves nothing


def wrong_somewhere(emulated, timings, case: Case, tile: int, **fault) -> bool:
    exact = case.exact()
    for timing in timings:
        emulated.configure(*timing, **fault)
        y = case.run(emulated, tile)
        if not bool(torch.isfinite(y).all()) or relative_error(y, exact) > 0.01:
            emulated.configure()
            return True
    emulated.configure()
    return False


@pytest.mark.parametrize("tile", [1, 2])
def test_a_wait_for_too_little_shows(emulated80, timings, tile):
    case = Case("n1c64d1h8w8k64f1x3x3p0x1x1", torch.bfloat16)
    assert not wrong_somewhere(emulated80, timings, case, tile)
    assert wrong_somewhere(emulated80, timings, case, tile, fewer_waited=1)


@pytest.mark.parametrize("tile", [1, 2])
def test_every_missing_barrier_shows(emulated80, timings, tile):
    case = Case("n1c64d1h8w8k64f1x3x3p0x1x1", torch.bfloat16)
    steps = emulated80.layout(*geometry(case.p), CODES[case.dtype])["steps"]
    assert steps == 9
    # The table of taps, the prologue, one a step, two around the output's tile. Behind the last step nothing is
    # copied any more: its barrier and the next one stand in for each other.
    barriers, spare = steps + 4, {steps + 1, steps + 2}
    for barrier in range(barriers):
        shows = wrong_somewhere(emulated80, timings, case, tile, skip_barrier=barrier)
        assert shows == (barrier not in spare), f"barrier {barrier} of {barriers}"


# ---- what is decided before the launch


def test_layouts(emulated80):
    def layout(text: str, dtype: torch.dtype = torch.bfloat16):
        return emulated80.layout(*geometry(ConvProblem.parse(text)), CODES[dtype])

    stem = layout("n1c3d16h112w112k64f3x7x7s1x2x2p1x3x3")
    assert (stem["rows"], stem["pixel"], stem["tap"], stem["steps"]) == (
        True,
        4,
        32,
        11,
    )  # 21 taps of 64 bytes
    wide = layout("n1c64d16h56w56k64f3p1")
    assert (wide["rows"], wide["pixel"], wide["tap"], wide["steps"]) == (False, 64, 64, 27)
    assert layout("n1c45d16h56w56k64f3x1x1p1x0x0")["pixel"] == 48
    assert layout("n1c3d8h8w8k8f3p1l1x1x2")["rows"] is False  # dilated windows are no runs of memory
    assert layout("n1c3d3h9w9k8f3s1p1")["rows"] is False  # stride 1: nothing saved by 8 numbers a pixel
    assert (
        layout("n1c1d40h40w40k8f11p5")["refuses"]
        == "the kernel size is larger than T + R + S = 31 or 512 taps"
    )
    assert layout("n1c8d9h40w40k8f4x10x11p2")["refuses"] is None


def test_choices(emulated80):
    def choice(text: str, multiprocessors: int = 108):
        return emulated80.choose(*geometry(ConvProblem.parse(text)), 1, multiprocessors)

    assert choice("n8c64d16h56w56k64f3p1+relu") == (1, 1)  # 64 channels: no half-empty tile
    assert choice("n32c128d8h28w28k128f3p1")[1] == 1  # enough tiles: nothing is split
    tile, splits = choice("n1c512d1h4w4k512f3p1")
    assert splits >= 8
    assert tile == 2
    for text in ("n1c512d1h4w4k512f3p1", "n1c8d1h1w1k8f1"):  # a part has four steps at least
        steps = emulated80.layout(*geometry(ConvProblem.parse(text)), 1)["steps"]
        assert choice(text)[1] == 1 or steps // choice(text)[1] >= 4


# ---- a decoder's clip


@pytest.mark.parametrize("source", [torch.uint8, torch.float32, torch.float16, torch.bfloat16], **IDS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_clips(emu80, source, channels_last):
    codes = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
    for n, c, d, h, w in ((2, 3, 2, 5, 7), (1, 1, 3, 4, 4)):
        x = torch.randint(0, 256, (n, c, d, h, w)).to(source)
        x = x.contiguous(memory_format=torch.channels_last_3d) if channels_last else x
        scale, shift = torch.rand(c) / 255, torch.randn(c)
        for dtype in CODES:
            for left, width, pixel in ((0, w, c), (3, w + 5, 4)):
                y = torch.full((n, d, h, width, pixel), float("nan"), dtype=dtype)
                for factor, offset in ((scale, shift), (None, None)):
                    pointers = [0 if t is None else t.data_ptr() for t in (factor, offset)]
                    emu80.clip(
                        [n, c, d, h, w], x.data_ptr(), list(x.stride()), codes[source], CODES[dtype], *pointers,
                        left, width, pixel, y.data_ptr(),
                    )  # fmt: skip
                    want = x.float()
                    if factor is not None:
                        want = want * scale.view(-1, 1, 1, 1) + shift.view(-1, 1, 1, 1)
                    want = F.pad(want.permute(0, 2, 3, 4, 1), (0, pixel - c, left, width - left - w))
                    torch.testing.assert_close(
                        y, want.to(dtype), rtol=2e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-6
                    )
                    assert not y[..., :left, :].any()


@pytest.mark.parametrize("how", ["NCDHW", "frames first", "pixels"])
@pytest.mark.parametrize(
    "text",
    [
        "n2c3d3h9w10k16f3x7x7s1x2x2p1x3x3+relu",  # windows side by side in memory
        "n1c1d5h9w9k17f7s1x2x2p3",
        "n2c3d4h5w6k8f3p1x2x0+relu",
        "n1c8d2h4w5k24f3p1",  # whole chunks: a float x would be read in place
    ],
    **IDS,
)
def test_a_raw_clip(emu80, text, how):
    """uint8 read where the decoder left it; the padding is zero behind the normalisation."""
    for dtype in CODES:
        case = Case(text, dtype)
        p = case.p
        g = torch.Generator().manual_seed(1)
        raw = torch.randint(0, 256, (p.n, p.c, p.d, p.h, p.w), generator=g, dtype=torch.uint8)
        order = {"NCDHW": (0, 1, 2, 3, 4), "frames first": (0, 2, 1, 3, 4), "pixels": (0, 2, 3, 4, 1)}[how]
        inverse = [order.index(i) for i in range(5)]
        raw = raw.permute(order).contiguous().permute(inverse)
        # Far from zero, so that padding with anything else than zero shows.
        scale, shift = 0.5 / 64 + torch.rand(p.c, generator=g) / 64, -3 + torch.rand(p.c, generator=g)
        for vectors in ((scale, shift), (scale, None), (None, None)):
            factor, offset = (
                default if v is None else v for v, default in zip(vectors, (1.0, 0.0), strict=True)
            )
            if vectors[0] is None:
                case.weight = (case.weight.float() / 64).to(dtype)  # values of 0 to 255
            wide = [v if isinstance(v, float) else v.view(1, -1, 1, 1, 1) for v in (factor, offset)]
            case.x = (raw.float() * wide[0] + wide[1]).to(dtype)  # rounded once, as the kernel does
            packed = case.packed(emu80)
            pointers = [0 if t is None else t.data_ptr() for t in (case.scale, case.bias, None, case.y)]
            clip = [0 if t is None else t.data_ptr() for t in vectors]
            parts = (1, 2) if offset is shift else (1,)  # of a sum: x is read alike for all
            for splits in parts:
                case.y.fill_(float("nan"))
                emu80.conv3d(
                    *geometry(p), CODES[dtype], int(p.activation == "relu"), raw.data_ptr(), list(raw.stride()),
                    packed.data_ptr(), *pointers, 2, splits, 3, *clip,
                )  # fmt: skip
                case.check()
