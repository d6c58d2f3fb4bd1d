"""The very source of csrc/cuda/conv3d_sm90.cu, run on the CPU in every schedule and timing, against float64."""

import itertools
import random

import pytest
import sanitizers
import torch
import torch.nn.functional as F
from conftest_sm90 import behind_channels, geometry

from r3d_kernels.ops.conv3d_sm90 import TILES, in_rows, trial_error
from r3d_kernels.problems import LAYERS, ConvProblem

DTYPES = {torch.bfloat16: 1, torch.float16: 2}
TIMINGS = list(itertools.product([False, True], repeat=2))  # late copies, late products
SMALL, SHARED = TILES.index((64, 64, 1)), TILES.index((352, 64, 3))
SHARED_WIDE, SHARED_LARGE = TILES.index((240, 128, 3)), TILES.index((480, 64, 3))


def pitches(*tensors):
    """Elements from a pixel to the next, as `in_rows` lays them out."""
    return [0 if t is None else t.shape[1] + -t.shape[1] % 8 for t in tensors]


class Case:
    """A problem with its data; outputs of order 1. NaN lies between pixels whose channels are no multiple of 8."""

    def __init__(self, text, dtype=torch.bfloat16, seed=0, between=float("nan")):
        self.problem = p = ConvProblem.parse(text).validate()
        g = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=g)

        def place(t):
            return in_rows(t.to(dtype), between)

        self.dtype = dtype
        self.x = place(normal(*p.in_shape))
        self.weight = place(normal(*p.weight_shape) / (p.c * p.kernel[0] * p.kernel[1] * p.kernel[2]) ** 0.5)
        self.scale = normal(p.k)
        self.bias = normal(p.k)
        self.residual = place(normal(*p.out_shape)) if p.residual else None
        self.want, self.allowed = self.reference()

    def reference(self):
        p = self.problem
        shape = (1, -1, 1, 1, 1)

        def conv(x, weight):
            return F.conv3d(x, weight, None, p.stride, p.padding, p.dilation)

        x, w, scale, bias = self.x.double(), self.weight.double(), self.scale.double(), self.bias.double()
        y = conv(x, w) * scale.view(shape) + bias.view(shape)
        size = conv(x.abs(), w.abs()) * scale.abs().view(shape) + bias.abs().view(shape)
        if self.residual is not None:
            y, size = y + self.residual.double(), size + self.residual.double().abs()
        y = y.relu() if p.activation == "relu" else y
        # float32 sums, then one rounding to the dtype
        return y, 3e-6 * size + torch.finfo(self.dtype).eps / 2 * 1.001 * y.abs()

    def run(self, emu, tile=-1, split=1, tickets=None):
        y = in_rows(torch.full(self.want.shape, float("nan"), dtype=self.dtype), float("nan"))
        tensors = (self.x, self.weight, self.scale, self.bias, self.residual, y)
        pointers = [0 if t is None else t.data_ptr() for t in tensors]
        args = (geometry(self.problem), DTYPES[self.dtype], self.problem.activation == "relu", pointers)
        counters = 0 if tickets is None else tickets.data_ptr()
        plan = emu.conv3d(*args, tile, split, pitches(self.x, self.weight, self.residual, y), counters)
        return y, plan

    def check(self, emu, tile=-1, split=1, tickets=None):
        y, plan = self.run(emu, tile, split, tickets)
        error = (y.double() - self.want).abs()
        assert bool((error <= self.allowed).all()), (
            f"{self.problem} tile {plan['tile']} split {plan['split']}: {int((~(error <= self.allowed)).sum())} of "
            f"{y.numel()} wrong, largest error {error.max()}"
        )
        assert not behind_channels(y).any()  # zeros, and so no NaN for whoever reads whole rows
        return y


@pytest.fixture
def emu(emulated_sm90):
    emulated_sm90.configure()
    yield emulated_sm90
    emulated_sm90.configure()


def every_mode(emu, schedules):
    for (_, schedule, seed), timing in itertools.product(schedules, TIMINGS):
        emu.configure(schedule, seed, *timing)
        yield schedule, seed, timing


def test_the_tiles_are_those_of_the_kernel(emu):
    assert tuple((t["pixels"], t["channels"], t["taps"]) for t in emu.tiles()) == TILES
    for tile in emu.tiles():
        assert tile["shared_bytes"] <= 227 << 10
        assert tile["stages"] >= 2


# ---- im2col's corners: three different paddings, kernels and strides first ----


@pytest.mark.parametrize(
    "text",
    [
        "n1c8d5h6w7k8f3p0x1x2",
        "n1c8d5h6w7k8f3p2x1x0",
        "n1c8d5h6w7k8f3p1x2x0",
        "n2c24d4h5w6k24f1x3x5p0x2x1+relu",
        "n2c8d5h4w6k8f5x1x3p3x0x2s1x2x3",
        "n1c64d4h5w6k64f3p1x0x2s2x1x2+res+relu",
        "n1c8d9h3w4k8f2x3x4s3x1x2p1x2x3l1x2x1",
        "n1c8d3h3w3k8f1p0x1x3",
    ],
)
def test_three_different_paddings(emu, text):
    for dtype in DTYPES:
        case = Case(text, dtype)
        case.check(emu, SMALL)
        case.check(emu)


@pytest.mark.parametrize(
    "text",
    [
        "n1c8d4h4w4k8f3s1p1l2",
        "n2c16d7h7w7k8f3s2p4l3x2x1",
        "n1c8d20h3w3k8f3x1x1p15x0x0l15x1x1",
        "n1c8d3h3w40k8f1x1x3p0x0x15l1x1x15",
        "n1c8d3h3w40k8f1x1x2s1x1x8p0x0x14l1x1x30",
    ],
)
def test_dilation(emu, text):
    Case(text).check(emu, SMALL)


# ---- every mode ----

MODES = [
    ("n2c8d3h4w5k8f3p0x1x2+res+relu", SMALL, 1),
    ("n1c136d2h5w9k72f3s2x1x2p1x2x0+res", SMALL, 1),  # several blocks of tiles, three steps a tap
    ("n1c64d2h6w6k64f3p1+res+relu", SMALL, 4),
    ("n1c64d3h9w14k64f3x1x3p1x0x1+res+relu", SHARED, 1),
    ("n1c16d3h9w14k72f3x1x3p1x0x1+res+relu", SHARED_WIDE, 1),
    ("n1c72d3h9w14k72f3x1x3p1x0x1+res+relu", SHARED_LARGE, 1),  # two stages of pixels
    ("n1c72d2h5w9k136f1x3x2p0x2x1+res", TILES.index((64, 256, 1)), 2),  # two wgmmas a step
    ("n1c45d3h5w6k70f3p0x1x2+res+relu", SMALL, 2),  # channels that are no multiple of 8
    ("n1c70d2h5w9k45f3x1x3p1x0x1+res+relu", SHARED, 1),
]


@pytest.mark.parametrize(("text", "tile", "split"), MODES)
def test_every_schedule_and_timing(emu, schedules, text, tile, split):
    case = Case(text)
    first = None
    for _ in every_mode(emu, schedules):
        y = case.check(emu, tile, split).view(torch.int16)
        first = y if first is None else first
        assert torch.equal(first, y)


# ---- tiles and tails ----


@pytest.mark.parametrize("tile", range(len(TILES)), ids=lambda i: "x".join(map(str, TILES[i])))
def test_every_tile(emu, tile):
    """Two samples, tails of pixels and channels, several tiles in both, both dtypes, different modes."""
    pixels, channels, taps = TILES[tile]
    k = channels + 8
    for i, (dtype, residual) in enumerate(itertools.product(DTYPES, ("", "+res+relu"))):
        emu.configure(*[(0, 1), (1, 1), (2, 4), (2, 5)][i], *TIMINGS[i], 3)
        f, p = ("1x1x3", "0x0x1") if taps == 3 else ("1", "0")
        for less in (0, 3) if i < 2 else (0,):
            text = f"n2c{72 - less}d3h7w{(pixels // 36) | 1}k{k - less}f{f}p{p}{residual}"
            Case(text, dtype).check(emu, tile)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("tile", range(len(TILES)), ids=lambda i: "x".join(map(str, TILES[i])))
def test_the_trial_that_guards_a_gpu(emu, tile, split, padded):
    """What `proven_tiles` runs on a GPU before any layer may use a tile."""
    y = None

    def op(x, weight, scale, bias, residual, stride, padding, dilation, activation, tiles, split):
        nonlocal y
        sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
        out = [(i + 2 * p - d * (f - 1) - 1) // s + 1 for i, f, s, p, d in sizes]
        y = in_rows(torch.full((x.shape[0], len(scale), *out), float("nan"), dtype=x.dtype))
        g = [
            x.shape[0],
            x.shape[1],
            *x.shape[2:],
            len(scale),
            *weight.shape[2:],
            *stride,
            *padding,
            *dilation,
        ]
        pointers = [t.data_ptr() for t in (x, weight, scale, bias, residual, y)]
        which = pitches(x, weight, residual, y)
        emu.conv3d(g, DTYPES[x.dtype], True, pointers, tiles.bit_length() - 1, split, which)
        return y

    for dtype in DTYPES:
        assert trial_error(dtype, tile, split, "cpu", op, padded) <= 1
        y[tuple((y == y.max()).nonzero()[0])] *= 1.02  # a single output that is wrong is enough
        assert trial_error(dtype, tile, split, "cpu", lambda *args: y, padded) > 1


@pytest.mark.parametrize("split", [2, 3, 4])
@pytest.mark.parametrize("tile", [SMALL, TILES.index((64, 256, 1)), SHARED])
def test_split_sums(emu, tile, split):
    text = "n1c72d2h4w10k136f3s1p1+res+relu" if tile != SHARED else "n1c128d2h4w10k72f3s1p1+res+relu"
    case = Case(text)
    outputs = []
    for schedule, seed, late, sms in ((0, 1, False, 2), (1, 1, True, 5), (2, 3, True, 1)):
        emu.configure(schedule, seed, late, late, sms)
        outputs.append(case.check(emu, tile, split).view(torch.int16))
    assert all(torch.equal(outputs[0], y) for y in outputs)  # whichever block came last


@pytest.mark.parametrize("split", [2, 4])
def test_counters_of_split_sums_are_left_as_they_were_found(emu, split):
    case = Case("n1c72d2h4w10k136f3s1p1+res+relu")
    count = emu.plan_for(geometry(case.problem), SMALL, split, 2)["tickets"]
    tickets = torch.zeros(count + 1, dtype=torch.int32)
    tickets[-1] = 7  # not theirs
    first = case.check(emu, SMALL, split).view(torch.int16)
    for schedule in range(3):
        emu.configure(schedule, 1, False, False, 3)
        assert torch.equal(case.check(emu, SMALL, split, tickets).view(torch.int16), first)
        assert tickets.tolist() == [0] * count + [7]
    tickets[0] = 1  # what somebody else has left: the sum ends without its last part
    y, _ = case.run(emu, SMALL, split, tickets)
    assert not torch.equal(y.view(torch.int16), first)


@pytest.mark.parametrize("channels", [8, 24, 64, 128])
def test_channels(emu, channels):
    for k in (8, 24, 64, 128):
        case = Case(f"n2c{channels}d3h5w4k{k}f3s1x2x1p1+res+relu")
        emu.configure(2, channels + k, True, k % 16 == 0)
        case.check(emu, SMALL)


@pytest.mark.parametrize("channels", [3, 8, 24, 45, 64, 230])
def test_channels_that_are_no_multiple_of_8(emu, channels):
    """Both sides odd, three different paddings, stride 2 and not, residual, tails, whole and split sums."""
    for i, k in enumerate((3, 8, 24, 45, 64, 230)):
        dtype = list(DTYPES)[i % 2]
        emu.configure(i % 3, channels + k, i % 2 == 0, i % 4 < 2, 1 + i)
        Case(f"n2c{channels}d3h4w5k{k}f3s2p0x1x2+res+relu", dtype).check(emu, SMALL)
        split = 2 if i % 2 else 3
        Case(f"n1c{channels}d2h3w7k{k}f3x2x3p2x0x1+res", dtype, seed=i).check(emu, SMALL, split)
        Case(f"n1c{channels}d1h5w13k{k}f1x3x3p0x1x1+relu", dtype).check(emu, SHARED)


def test_what_lies_between_the_pixels_does_not_matter(emu):
    text = "n1c45d2h4w6k70f3p1x0x2+res+relu"
    outputs = [Case(text, between=between).check(emu, SMALL) for between in (0.0, 7.0, float("nan"))]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_pitches_wider_than_needed(emu):
    """x and residual as slices of wider tensors."""
    case = Case("n2c45d2h4w5k24f3p1+res+relu")
    x, residual = (torch.full((2, 64, *t.shape[2:]), 9.0, dtype=t.dtype) for t in (case.x, case.residual))
    x, residual = (t.contiguous(memory_format=torch.channels_last_3d) for t in (x, residual))
    x[:, 8:53] = case.x
    residual[:, 16:40] = case.residual
    y = in_rows(torch.full(case.want.shape, float("nan"), dtype=case.dtype))
    tensors = (x[:, 8:53], case.weight, case.scale, case.bias, residual[:, 16:40], y)
    pointers = [t.data_ptr() for t in tensors]
    emu.conv3d(geometry(case.problem), 1, True, pointers, SMALL, 1, [64, 48, 64, 24])
    assert bool(((y.double() - case.want).abs() <= case.allowed).all())
    with pytest.raises(RuntimeError, match="shorter than its channels"):
        emu.conv3d(geometry(case.problem), 1, True, pointers, SMALL, 1, [40, 48, 64, 24])
    with pytest.raises(RuntimeError, match="strides of a multiple of 16 bytes"):
        emu.conv3d(geometry(case.problem), 1, True, pointers, SMALL, 1, [45, 48, 64, 24])


@pytest.mark.parametrize("size", ["d1h1w1", "d1h8w8", "d1h1w64", "d5h13w1", "d1h5w13", "d2h11w12"])
def test_tails_of_pixels(emu, size):
    Case(f"n1c8{size}k8f1+res").check(emu, SMALL)
    Case(f"n3c8{size}k16f3p1+relu").check(emu, SMALL)


@pytest.mark.parametrize(
    "text",
    [
        "n2c8d3h4w56k64f3p1+res+relu",  # layer1's width: three rows of 58 positions
        "n1c64d2h3w174k8f1x1x3p0x0x1",  # one row
        "n1c8d2h20w3k8f1x3x3p0x1x1",  # 35 rows
        "n1c8d2h6w9k8f3x1x3p2x0x15l1x1x15",  # rows whose outputs lie in the padding for the most part
        "n1c8d3h4w6k8f1x2x3s2x1x1p0",
    ],
)
def test_taps_that_share_their_load(emu, text):
    for late in (False, True):
        emu.configure(2, 7, late, late)
        Case(text).check(emu, SHARED)
        Case(text).check(emu, SHARED_WIDE)
        Case(text).check(emu, SHARED_LARGE)


def test_rows_of_positions_by_multiplication():
    """The epilogue has no division: exact for every position and width of a slice."""
    for width in range(1, 257):
        per_width = (65535 + width) // width
        assert all(i * per_width >> 16 == i // width for i in range(256))


def random_problem(rng):
    """Small, with everything else free."""
    while True:
        f = tuple(rng.choice([1, 2, 3, 3]) for _ in range(3))
        p = ConvProblem(
            n=rng.choice([1, 2, 3]),
            c=rng.choice([8 * rng.randint(1, 17), rng.randint(1, 136)]),
            d=rng.randint(1, 5),
            h=rng.randint(1, 9),
            w=rng.randint(1, 20),
            k=rng.choice([8 * rng.randint(1, 20), rng.randint(1, 160)]),
            kernel=f,
            stride=tuple(rng.choice([1, 1, 2, 3]) for _ in f),
            padding=tuple(rng.randint(0, 4) for _ in f),
            dilation=tuple(rng.choice([1, 1, 2, 3]) for _ in f),
            residual=rng.random() < 0.5,
            activation=rng.choice([None, "relu"]),
        )
        spans = [(i - 1) * dil for i, dil in zip(f, p.dilation, strict=True)]
        fits = all(i + 2 * pad > span for i, pad, span in zip((p.d, p.h, p.w), p.padding, spans, strict=True))
        if fits and p.n * p.out_size[0] * p.out_size[1] * p.out_size[2] <= 600:
            return p


@pytest.mark.parametrize("seed", range(40))
def test_random_problems_tiles_and_modes(emu, seed):
    rng = random.Random(seed)
    p = random_problem(rng)
    case = Case(str(p), rng.choice(list(DTYPES)), seed)
    for _ in range(2):
        split = rng.choice([1, 1, 2, 3])
        fits = [i for i in range(len(TILES)) if emu.plan_for(geometry(p), i, split, 3)["tile"] >= 0]
        emu.configure(rng.randrange(3), seed, rng.random() < 0.5, rng.random() < 0.5, rng.choice([1, 3, 7]))
        if fits:
            case.check(emu, rng.choice(fits), split)


def test_nan_stays_where_it_is(emu):
    case = Case("n1c8d3h4w5k8f3p1+relu")
    case.x[0, :, 1, 1, 1] = float("nan")
    y, _ = case.run(emu, SMALL)
    want = F.conv3d(case.x.float(), case.weight.float(), None, 1, 1) * case.scale.view(1, -1, 1, 1, 1)
    assert torch.equal(y.isnan(), want.isnan())
    assert y.isnan().any()
    assert not y.isnan().all()


def test_an_empty_batch_and_errors(emu):
    case = Case("n1c8d3h4w5k8f3p1")
    case.problem = ConvProblem.parse("n0c8d3h4w5k8f3p1")
    y, _ = case.run(emu, SMALL)
    assert y.isnan().all()  # nothing ran
    case.problem = ConvProblem.parse("n1c8d3h4w5k8f3s1x1x9p1")
    with pytest.raises(
        RuntimeError, match=r"strides up to 8 \(x \[1, 8, 3, 4, 5\], 8 channels, kernel 3x3x3"
    ):
        case.run(emu, SMALL)
    case = Case("n1c8d3h4w5k8f3p1")
    case.x = torch.zeros(8 * 60 + 1, dtype=torch.bfloat16)[1:].view(1, 8, 3, 4, 5)
    with pytest.raises(RuntimeError, match="address of a multiple of 16 bytes"):
        case.run(emu, SMALL)


# ---- the rules ----


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("n1c64d4h8w8k64f3p1", ""),
        ("n1c8d4h8w8k8f3s8p15", ""),
        ("n1c3d4h8w8k64f3p1", ""),
        ("n1c64d4h8w8k45f3p1", ""),
        ("n1c64d4h8w80k64f3s9p1", "strides up to 8"),
        ("n1c64d4h8w8k64f1p16", "im2col range"),
        ("n1c64d40h80w80k64f3p14x15x15l15", ""),
        ("n1c64d40h80w80k64f3p15l16", "im2col range"),
        ("n1c64d40h80w80k64f3p0l9", "im2col range"),
        ("n33000c64d16h64w64k64f1", "2^31 output pixels"),
    ],
)
def test_refusals(emu, text, why):
    said = emu.refuses(geometry(ConvProblem.parse(text)), 1)
    assert why in said
    assert bool(said) == bool(why)
    assert "bfloat16 and float16" in emu.refuses(geometry(ConvProblem.parse(text)), 0)


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 1), (7, 8, 2), (3, 9, 4), (6, 17, 3), (40, 33, 1)])
def test_the_order_of_the_tiles_visits_each_once(emu, shape):
    pixels, channels, split = shape
    seen = [emu.place(i, *shape) for i in range(pixels * channels * split)]
    assert sorted(seen) == sorted(itertools.product(range(pixels), range(channels), range(split)))
    # Eight neighbours at most before the next pixels: what runs at once needs the weights of eight tiles.
    for i in range(0, len(seen) - 132):
        assert len({channel for _, channel, _ in seen[i : i + 132]}) <= 16


def test_plans(emu):
    for name, text in LAYERS.items():
        for batch in (1, 8, 32):
            p = ConvProblem.parse(text)
            g = geometry(p)
            g[0] = batch
            plan = emu.plan(g, 132)
            assert emu.refuses(g, 1) == "", name
            assert 0 <= plan["tile"] < len(TILES)
            assert plan["grid"] <= 132
            assert (plan["workspace_bytes"] > 0) == (plan["split"] > 1)
            assert plan["steps"] >= 4 * plan["split"] or plan["split"] == 1
            assert plan["workspace_bytes"] <= 256 << 20
    # The most expensive stage of r3d_18 shares its loads, one clip in one wave of the largest tile; small late layers
    # are split.
    assert emu.plan(geometry(ConvProblem.parse("n32c64d16h56w56k64f3s1p1")), 132)["tile"] == SHARED
    alone = emu.plan(geometry(ConvProblem.parse("n1c64d16h56w56k64f3s1p1")), 132)
    assert (alone["tile"], alone["grid"]) == (SHARED_LARGE, 112)
    assert emu.plan(geometry(ConvProblem.parse("n8c128d8h28w28k128f3s1p1")), 132)["tile"] == SHARED_WIDE
    assert emu.plan(geometry(ConvProblem.parse("n1c512d2h7w7k512f3s1p1")), 132)["split"] > 1


# ---- out of bounds ----


AHEAD = {"sanitized": sanitizers.compilation("sanitized_sm90.cpp")}


@pytest.fixture
def sanitized():
    return sanitizers.program(*AHEAD["sanitized"])


def test_the_kernel_stays_inside_its_buffers(sanitized):
    result = sanitized()
    assert result.returncode == 0, result.stdout + result.stderr
    result = sanitized("short")
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
