"""The very source of csrc/cuda/conv3d_sm90_stem.cu, run on the CPU in every schedule and timing, against float64."""

import itertools
import random

import pytest
import sanitizers
import torch
import torch.nn.functional as F
from conftest_sm90 import behind_channels, geometry

from r3d_kernels.ops.conv3d_sm90 import in_rows
from r3d_kernels.ops.conv3d_sm90_stem import pack
from r3d_kernels.problems import ConvProblem

DTYPES = {torch.bfloat16: 1, torch.float16: 2}
SOURCES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
TIMINGS = list(itertools.product([False, True], repeat=2))  # late copies, late products
KINDS = range(3)  # of 240, 176 and 128 positions

# Three different paddings, tails of rows and channels, filters whose rows and columns fill their units and not.
PROBLEMS = (
    "n2c3d4h9w12k64f3x7x7s1x2x2p1x3x3+relu",  # torchvision's stem
    "n1c3d8h9w12k64f7s1x2x2p3+relu",  # Hara's
    "n1c3d2h9w13k45f1x7x7s1x2x2p0x3x3",  # R(2+1)D's: channels that are no multiple of 8
    "n2c1d5h12w11k70f7s2p3+relu",  # one channel: four filter rows in a pixel; two tiles of channels
    "n1c2d3h7w9k16f3x5x4s1x2x2p0x2x1",  # two channels, two filter rows
    "n1c3d3h8w9k24f3p1x0x2",  # no stride: two filter rows in a pixel of eight
    "n1c8d3h6w7k8f3x2x3p2x1x0+relu",  # eight channels
    "n2c1d3h11w7k8f3x5x3s1x3x1p1x2x1",  # eight rows of one channel
    "n1c1d4h9w10k8f2x7x3s2x4x2p1x0x1",  # phases that the filter does not fill
    "n1c2d2h5w17k8f2x3x6s1x1x4p1x1x3",  # a unit of four pixels
    "n1c3d1h1w3k64f1x1x1s1x1x2p0",
    "n1c1d2h3w3k8f1x3x3p0x4x5",  # more padding than filter
)


class Case:
    """A problem with its data; outputs of order 1.

    source: the dtype that x comes in. planes: NCDHW. pool: frames of the windows of a max-pool, or 0.
    """

    def __init__(self, text, dtype=torch.bfloat16, source=None, planes=True, seed=0, pool=0):
        self.problem = p = ConvProblem.parse(text).validate()
        g = torch.Generator().manual_seed(seed)
        self.dtype, self.source, self.pool = dtype, source or dtype, pool
        self.clip = [None, None]
        if self.source == torch.uint8:
            x = torch.randint(0, 256, p.in_shape, generator=g, dtype=torch.uint8)
            self.clip = [torch.rand(p.c, generator=g) / 99, torch.randn(p.c, generator=g)]
        else:
            x = torch.randn(p.in_shape, generator=g).to(self.source)
        self.x = x if planes else x.contiguous(memory_format=torch.channels_last_3d)
        taps = p.c * p.kernel[0] * p.kernel[1] * p.kernel[2]
        self.weight = (torch.randn(p.weight_shape, generator=g) / taps**0.5).to(dtype)
        self.scale, self.bias = torch.randn(p.k, generator=g), torch.randn(p.k, generator=g)
        self.want, self.allowed = self.reference()

    def read(self):
        """x as the kernel multiplies it."""
        x = self.x.float()
        if self.clip[0] is not None:
            wide = (1, -1, 1, 1, 1)
            x = x * self.clip[0].view(wide) + self.clip[1].view(wide)
        return x.to(self.dtype)

    def reference(self):
        p, wide = self.problem, (1, -1, 1, 1, 1)
        x, w, scale, bias = (t.double() for t in (self.read(), self.weight, self.scale, self.bias))

        def conv(x, w):
            return F.conv3d(x, w, None, p.stride, p.padding)

        y = conv(x, w) * scale.view(wide) + bias.view(wide)
        size = conv(x.abs(), w.abs()) * scale.abs().view(wide) + bias.abs().view(wide)
        y = y.relu() if p.activation == "relu" else y
        # float32 sums, then one rounding to the dtype; x is rounded after a product and a sum, here or with one fma
        size = size * (1 if self.clip[0] is None else 100)
        return y, 3e-6 * size + torch.finfo(self.dtype).eps / 2 * 1.001 * y.abs()

    def pooled(self, y):
        return F.max_pool3d(y.float(), *pool_window(self.pool)).to(y.dtype) if self.pool else y

    def run(self, emu, kind=-1):
        y = in_rows(torch.full_like(self.pooled(self.want), float("nan"), dtype=self.dtype), float("nan"))
        layout = emu.stem_plan(geometry(self.problem), 2, kind)["layout"]
        self.packed = pack(self.weight, layout[:4])
        tensors = (self.x, self.packed, self.scale, self.bias, y, *self.clip)
        pointers = [0 if t is None else t.data_ptr() for t in tensors]
        relu = self.problem.activation == "relu"
        plan = emu.stem(
            geometry(self.problem),
            DTYPES[self.dtype],
            relu,
            pointers,
            list(self.x.stride()),
            SOURCES[self.source],
            kind,
            self.pool,
        )
        return y, plan

    def check(self, emu, kind=-1):
        y, plan = self.run(emu, kind)
        error = (y.double() - self.want).abs()
        wrong = ~(error <= self.allowed)
        assert not wrong.any(), f"{self.problem} {plan}: {int(wrong.sum())} of {y.numel()}, {error.max()}"
        assert not behind_channels(y).any()  # zeros, and so no NaN for whoever reads whole rows
        return y


def pool_window(frames):
    """kernel, stride, padding"""
    along = (3, 2, 1) if frames == 3 else (1, 1, 0)
    return tuple((depth, *plane) for depth, plane in zip(along, ((3, 3), (2, 2), (1, 1)), strict=True))


@pytest.fixture
def emu(emulated_sm90):
    emulated_sm90.configure()
    yield emulated_sm90
    emulated_sm90.configure()


@pytest.mark.parametrize("text", PROBLEMS)
def test_against_float64(emu, text):
    for dtype, kind in itertools.product(DTYPES, KINDS):
        emu.configure(kind, 1, kind == 1, dtype == torch.float16, 2 + kind)
        Case(text, dtype).check(emu, kind)


@pytest.mark.parametrize("text", [PROBLEMS[0], PROBLEMS[3], PROBLEMS[8]])
def test_every_schedule_and_timing(emu, schedules, text):
    case, first = Case(text), None
    for (_, schedule, seed), timing in itertools.product(schedules, TIMINGS):
        emu.configure(schedule, seed, *timing)
        y = case.check(emu).view(torch.int16)
        first = y if first is None else first
        assert torch.equal(first, y)


@pytest.mark.parametrize("source", SOURCES, ids=str)
@pytest.mark.parametrize("planes", [True, False])
def test_sources(emu, source, planes):
    """The clip as it comes: any dtype, planes or pixels, a slice of another tensor."""
    for text, dtype in zip((PROBLEMS[0], PROBLEMS[3], PROBLEMS[5]), (*DTYPES, torch.bfloat16), strict=True):
        case = Case(text, dtype, source, planes)
        y = case.check(emu)
        larger = torch.zeros([2 * s for s in case.x.shape], dtype=source)
        part = larger[tuple(slice(1, 1 + s) for s in case.x.shape)]
        part.copy_(case.x)
        case.x = part
        assert torch.equal(case.check(emu).view(torch.int16), y.view(torch.int16))


@pytest.mark.parametrize(
    "text",
    [
        "n1c3d2h112w112k64f1x7x7s1x2x2p0x3x3+relu",  # four rows of 58 positions to a consumer
        "n1c3d1h30w224k8f1x7x7s1x2x2p0x3x3",  # two rows of 114
        "n1c1d1h9w480k8f1x3x3s1x2x2p0x1x1",  # the longest row
        "n3c3d1h5w64k8f1x3x3s1x2x2p0x1x1",
    ],
)
def test_long_rows(emu, text):
    for kind in KINDS:
        if emu.stem_plan(geometry(ConvProblem.parse(text)), 2, kind)["stages"]:
            Case(text).check(emu, kind)
    Case(text).check(emu)


@pytest.mark.parametrize("seed", range(24))
def test_random_problems(emu, seed):
    rng = random.Random(seed)
    while True:
        stride = (rng.choice([1, 2, 3]), rng.choice([1, 2, 3, 4]), rng.choice([1, 2, 2, 4]))
        f = tuple(rng.randint(1, 7) for _ in range(3))
        p = ConvProblem(
            n=rng.choice([1, 2]),
            c=rng.randint(1, 8 // stride[2]),
            d=rng.randint(1, 6),
            h=rng.randint(1, 17),
            w=rng.randint(1, 33),
            k=rng.choice([8, 24, 45, 64, 70]),
            kernel=f,
            stride=stride,
            padding=(rng.randint(0, f[0] - 1), rng.randint(0, 4), rng.randint(0, 4)),
            activation=rng.choice([None, "relu"]),
        )
        sizes = zip((p.d, p.h, p.w), p.padding, f, strict=True)
        if all(i + 2 * pad >= size for i, pad, size in sizes) and p.macs < 3e6:
            break
    emu.configure(rng.randrange(3), seed, rng.random() < 0.5, rng.random() < 0.5, rng.choice([1, 3, 7]))
    case = Case(str(p), rng.choice(list(DTYPES)), rng.choice(list(SOURCES)), rng.random() < 0.5, seed)
    case.check(emu, rng.choice([-1, *KINDS]))


def pools_the_same(emu, case, kind, frames):
    """The pooled kernel gives the maxima of what the other one gives, bit for bit."""
    if kind >= 0 and not emu.stem_plan(geometry(case.problem), 2, kind, frames)["stages"]:
        kind = -1
    y, _ = case.run(emu, kind)
    case.pool = frames
    pooled, plan = case.run(emu, kind)
    want = case.pooled(y)
    case.pool = 0
    same = (pooled == want) | (pooled.isnan() & want.isnan())
    assert same.all(), f"{case.problem} {frames} {plan}: {int((~same).sum())} of {same.numel()}"
    assert not behind_channels(pooled).any()


# Several slices of a plane, of 5, 4 and 3 rows, of 3, 2 and 2: pooled rows that two of them have a share in.
SLICED = (
    "n2c3d5h27w80k45f1x3x3s1x2x2p0x1x1",
    "n1c1d4h15w140k70f3x3x3s1x1x2p1x0x1+relu",
)


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("text", PROBLEMS + SLICED)
def test_pooled(emu, text, frames):
    for kind in KINDS:
        emu.configure(kind, 1, kind == 1, frames == 1, 2 + kind)
        pools_the_same(emu, Case(text, list(DTYPES)[kind % 2]), kind, frames)


def test_slices_and_rows_that_share_windows(emu):
    rows = [
        [emu.stem_plan(geometry(ConvProblem.parse(text)), 2, kind, 3)["slice_rows"] for kind in KINDS]
        for text in SLICED
    ]
    assert rows == [[5, 4, 3], [3, 2, 0]]
    # a slice of one row knows too little; without a pool it will do
    assert emu.stem_plan(geometry(ConvProblem.parse(SLICED[1])), 2, 2, 3)["stages"] == 0
    assert emu.stem_plan(geometry(ConvProblem.parse(SLICED[1])), 2, 2)["slice_rows"] == 1


@pytest.mark.parametrize("seed", range(12))
def test_random_pooled(emu, seed):
    rng = random.Random(seed)
    stride = rng.choice([1, 2])
    p = ConvProblem(
        n=rng.choice([1, 2]),
        c=rng.randint(1, 4),
        d=rng.randint(1, 7),
        h=rng.randint(3, 15) * stride,
        w=rng.randint(20, 60) * stride,
        k=rng.choice([8, 24, 45, 70]),
        kernel=(rng.randint(1, 2), 3, 3),
        stride=(1, stride, stride),
        padding=(0, rng.randint(0, 1), rng.randint(0, 1)),
    )
    if p.kernel[0] > p.d:
        p = ConvProblem(**{**vars(p), "d": 2})
    emu.configure(rng.randrange(3), seed, rng.random() < 0.5, rng.random() < 0.5, rng.choice([1, 3, 7]))
    pools_the_same(emu, Case(str(p), seed=seed), rng.choice(KINDS), rng.choice([1, 3]))


@pytest.mark.parametrize(("text", "frames"), [(SLICED[0], 3), (PROBLEMS[3], 1), (PROBLEMS[8], 3)])
def test_pooled_in_every_schedule_and_timing(emu, schedules, text, frames):
    case = Case(text)
    for (_, schedule, seed), timing in itertools.product(schedules, TIMINGS):
        emu.configure(schedule, seed, *timing, 3)
        pools_the_same(emu, case, -1, frames)


@pytest.mark.parametrize("text", [PROBLEMS[0], PROBLEMS[3], PROBLEMS[5]])
def test_nan_reaches_no_further_than_whole_windows(emu, text):
    """All outputs that torch makes NaN, and beside them only those whose windows of whole units hold it."""
    case = Case(text)
    p = case.problem
    case.x[0, -1, 1, 5, 6] = float("nan")
    y, plan = case.run(emu)
    nan = case.x.isnan().any(1, keepdim=True).float()
    slots, group, row_groups, units = plan["layout"][:4]
    exact = F.conv3d(nan, torch.ones(1, 1, *p.kernel), None, p.stride, p.padding)
    wide = (p.kernel[0], group * row_groups, units * 8 // slots)
    more = [w - k for w, k in zip(wide, p.kernel, strict=True)]
    padded = F.pad(nan, (p.padding[2], p.padding[2] + more[2], p.padding[1], p.padding[1] + more[1]))
    reach = F.conv3d(padded, torch.ones(1, 1, *wide), None, p.stride, (p.padding[0], 0, 0))
    found = y.isnan()
    assert bool((found >= (exact > 0)).all())
    assert bool((found <= (reach > 0)).all())
    assert found.any()
    assert not found.all()


def test_what_is_packed():
    """Each weight once, where the window has its element; zeros elsewhere."""
    weight = torch.arange(1.0, 1 + 70 * 2 * 3 * 5 * 3).view(70, 2, 3, 5, 3)
    packed = pack(weight, (4, 2, 3, 2))  # two channels of two rows in a pixel, two pixels in a unit
    assert packed.shape == (2, 3, 3, 2, 64, 8)
    assert packed.count_nonzero() == weight.numel()
    assert torch.equal(packed.flatten().sort().values[-weight.numel() :], weight.flatten())
    for k, c, t, r, s in ((0, 0, 0, 0, 0), (69, 1, 2, 4, 2), (64, 0, 1, 3, 1)):
        element = s % 2 * 4 + r % 2 * 2 + c
        assert packed[k // 64, t, r // 2, s // 2, k % 64, element] == weight[k, c, t, r, s]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (PROBLEMS[0], ""),
        ("n1c4d4h9w12k64f3s1x2x2p1", ""),
        ("n1c5d4h9w12k64f3s1x2x2p1", "eight at most"),
        ("n1c3d4h9w12k64f3s1x2x3p1", "1, 2 or 4"),
        ("n1c3d4h9w12k64f3s1x5x2p1", "at most 4"),
        ("n1c3d4h9w12k64f3p1l2", "no dilation"),
        ("n1c3d4h9w12k64f3p3x1x1", "padding of frames"),
        ("n1c3d4h9w482k64f3s1x2x2p1", "at most 240 outputs"),
        ("n1c8d20h40w40k64f3x25x25p1", "kernel is too large"),
    ],
)
def test_refusals(emu, text, why):
    said = emu.stem_refuses(geometry(ConvProblem.parse(text)), 1)
    assert why in said
    assert bool(said) == bool(why)
    assert "bfloat16 and float16" in emu.stem_refuses(geometry(ConvProblem.parse(text)), 0)


def test_plans(emu):
    for text in ("n32c3d16h112w112k64f7s1x2x2p3", "n1c3d16h112w112k64f3x7x7s1x2x2p1x3x3"):
        plan = emu.stem_plan(geometry(ConvProblem.parse(text)), 132, -1)
        assert (plan["kind"], plan["slice_rows"]) == (0, 4)  # 224 of 240 positions are outputs
        assert plan["stages"] >= 3
        assert plan["shared_bytes"] <= 227 << 10


AHEAD = {"sanitized": sanitizers.compilation("sanitized_stem.cpp")}


@pytest.fixture
def sanitized():
    return sanitizers.program(*AHEAD["sanitized"])


def test_the_kernel_stays_inside_its_buffers(sanitized):
    result = sanitized()
    assert result.returncode == 0, result.stdout + result.stderr
    for short in ("y", "rows", "pieces"):
        result = sanitized(short)
        assert result.returncode != 0
        assert "heap-buffer-overflow" in result.stderr
