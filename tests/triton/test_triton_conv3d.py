"""The Triton convolution against float64, run by Triton's interpreter on CPU tensors: no GPU is needed."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_keeps_promise
from strategies import problem_strategy
from torch._dynamo.testing import CompileCounterWithBackend

import r3d_kernels as r3d
from r3d_kernels import backends, ops
from r3d_kernels.problems import ConvProblem, ProblemTensors
from r3d_kernels.triton import config as configs
from r3d_kernels.triton import conv3d, launch
from r3d_kernels.triton.config import Config

pytestmark = pytest.mark.usefixtures("interpreter")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IDS = ("fp32", "bf16", "fp16")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=IDS)


def channels_last(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous(memory_format=torch.channels_last_3d)


def folded(t: ProblemTensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Batch norm as float32 scale and bias."""
    scale = t.gamma.double() / (t.running_var.double() + t.eps).sqrt()
    return scale.float(), (t.beta.double() - t.running_mean.double() * scale).float()


def stock(p: ConvProblem, t: ProblemTensors) -> torch.Tensor | None:
    """The stock layers in the dtype itself; None where a CPU has none."""
    return p.reference(t, None) if t.x.dtype != torch.float32 else None


def to_tf32(t: torch.Tensor) -> torch.Tensor:
    """float32 to ten bits, to the nearest, ties away from zero: what tensor cores are to multiply."""
    bits = (t.view(torch.int32) + 0x1000) & -0x2000
    return torch.where(t.isfinite(), bits.view(torch.float32), t)


def rounded(t: ProblemTensors) -> ProblemTensors:
    return dataclasses.replace(t, x=to_tf32(t.x), weight=to_tf32(t.weight))


def check(
    p: ConvProblem, dtype: torch.dtype, config: str | None = None, precision: str | None = None, **data
) -> torch.Tensor:
    t = p.tensors(dtype, **data)
    if precision == "tf32":  # numbers that it holds, whose products are exact
        t = rounded(t)
    scale, bias = folded(t)
    if config is None:
        y = conv3d.conv3d(
            t.x,
            t.weight,
            scale,
            bias,
            t.residual,
            stride=p.stride,
            padding=p.padding,
            dilation=p.dilation,
            groups=p.groups,
            activation=p.activation,
        )
    else:
        precision = precision or configs.precision_of(dtype)
        run = conv3d.forward(p, Config.parse(config), precision, True, True)
        y = run(t.x, t.weight, scale, bias, t.residual)
    assert y.shape == p.out_shape
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert_keeps_promise(y, p.reference(t), stock(p, t))
    return y


GEOMETRIES = [
    "n1c64d4h7w7k64f3s1p1+res+relu",  # a middle layer
    "n1c3d4h12w12k45f3x7x7s1x2x2p1x3x3+relu",  # stems: taps packed into the sum
    "n1c1d6h10w10k16f7s2p3+relu",
    "n1c3d4h10w10k45f1x7x7s1x2x2p0x3x3+relu",  # R(2+1)D: odd channels between the halves
    "n1c45d4h5w5k64f3x1x1p1x0x0+relu",
    "n1c64d2h5w5k230f1x3x3p0x1x1+relu",
    "n1c230d4h3w3k33f3x1x1p1x0x0+res+relu",
    "n1c921d2h2w3k32f3x1x1p1x0x0+relu",
    "n1c7d5h9w9k7f3s2p1",
    "n1c64d4h9w9k128f1s2+res",  # a shortcut
    "n2c256d1h4w4k64f1+relu",  # a matrix product
    "n1c256d1h2w2k65f3p1+res+relu",  # most taps fall on padding; the sum is split
    "n2c45d5h7w6k65f3x2x3s1x1x2p2x1x3l2x3x2+res+relu",
    "n1c16d3h5w17k24f3p1x3x5l1x1x4+relu",
    "n1c8d9h3w3k8f3s3p4",  # windows that lie on padding alone
    "n1c100d2h3w3k50f2",  # a row longer than one block, no padding
    "n2c34d3h5w5k70f3p1g2+res+relu",  # groups
    "n1c6d3h5w5k12f3p1g6+relu",  # depthwise
    "n1c2d2h3w40k4f1x1x35p0x0x17+res",  # more taps along an axis than the bits of a word
    "n1c32d2h3w40k16f1x1x35p0x0x17+relu",
]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=IDS[:2])  # float16 goes the way of bfloat16: a few below
@pytest.mark.parametrize("text", GEOMETRIES)
def test_geometries(text: str, dtype: torch.dtype) -> None:
    check(ConvProblem.parse(text), dtype)


@settings(max_examples=25)
@given(problem_strategy(max_out=5, max_macs=300_000), st.sampled_from(DTYPES), st.integers(0, 3))
def test_any_geometry(problem: ConvProblem, dtype: torch.dtype, seed: int) -> None:
    check(problem, dtype, seed=seed)


# Tails of a tile, of a group of tiles and of the sum; every kernel; a split that does not divide the steps.
TILES = [
    ("n2c20d2h5w7k24f3x3x2p1+res+relu", "tiled 32x16x32 w4 s3 g2 k1"),
    ("n1c64d3h5w7k40f3x1x3p1x0x1+res+relu", "tiled 16x32x64 w4 s3 g3 k1"),
    ("n1c40d2h5w5k20f3x3x2p1+res+relu", "tiled 32x32x16 w4 s3 g8 k4"),
    ("n1c40d2h5w5k20f3s2p1g2+res+relu", "tiled 16x16x16 w4 s3 g8 k5"),
    ("n2c40d2h5w5k20f1+relu", "tiled 16x16x16 w4 s3 g2 k2"),
    ("n1c20d3h5w7k24f3p1+res+relu", "packed 32x16x32 w4 s2 g2 k1"),
    ("n1c6d3h5w7k20f2x3x2s2p1l1x2x1g2+res", "packed 16x16x16 w4 s2 g3 k1"),
    ("n1c3d4h9w11k20f3x5x7s1x2x2p1x2x3+res+relu", "rows 32x32x32 w4 s3 g2 k1"),  # channels padded to 4
    ("n2c1d3h7w6k20f3x2x3s2x1x3p2x0x1l1x2x1+relu", "rows 16x16x16 w4 s3 g8 k1"),
    ("n2c24d2h9w8k20f3p1+res+relu", "boxes 32x32x32 w4 s3 g4 k1"),
    ("n1c16d5h8w16k20f3x2x3p1x0x2l1x2x2+relu", "boxes 64x32x16 w4 s3 g2 k1"),
    ("n3c8d2h8w8k16f1+res", "boxes 64x16x16 w4 s3 g2 k1"),
    ("n2c24d1h8w7k20f1+res+relu", "boxes 64x32x16 w4 s3 g8 k1"),  # one row of all pixels
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(("text", "config"), TILES)
def test_tiles(text: str, config: str, dtype: torch.dtype) -> None:
    check(ConvProblem.parse(text), dtype, config)


@pytest.mark.parametrize("precision", ["half", "tf32", "ieee"])
def test_every_shipped_tile(precision: str) -> None:
    """On a problem that fills a tile and has a tail along each axis; larger tiles than this are fitted to it."""
    texts = {
        "packed": "n1c3d3h13w11k64f3p1+res+relu",
        "odd": "n1c33d3h8w7k70f1x1x3p0x0x1+res+relu",
        "late": "n1c64d3h8w7k64f1x3x3p0x1x1+res+relu",
        "pointwise": "n1c64d3h12w10k128f1s1p0+res+relu",
        "wide": "n1c64d4h8w15k256f1x1x3p0x0x1+res+relu",
        "narrow": "n1c64d4h8w15k64f1x1x3p0x0x1+res+relu",
    }
    dtype = torch.bfloat16 if precision == "half" else torch.float32
    for name, text in texts.items():
        for config in configs.shipped(precision, name, 90):
            if precision == "ieee" and name == "wide":
                continue  # the tiles of "narrow", and the most work
            check(ConvProblem.parse(text), dtype, str(config), precision)


@dtypes
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_epilogue_parts(dtype: torch.dtype, scale: bool, bias: bool) -> None:
    p = ConvProblem.parse("n1c8d2h3w5k20f1x3x3p0x1x1+relu")
    t = p.tensors(dtype)
    s, b = folded(t)
    y = conv3d.conv3d(t.x, t.weight, s if scale else None, b if bias else None, padding=p.padding)
    want = torch.nn.functional.conv3d(t.x.double(), t.weight.double(), padding=p.padding)
    if scale:
        want = want * s.double().view(1, -1, 1, 1, 1)
    if bias:
        want = want + b.double().view(1, -1, 1, 1, 1)
    assert_keeps_promise(y, want)


def test_rounding_to_tf32() -> None:
    one = 2.0**-10  # the last bit of a number from 1 to 2
    x = torch.tensor(
        [0.0, -0.0, 1 + one / 2, -1 - one / 2, 1 + 0.49 * one, 1.5 * one, 3.3e38, float("inf"), -float("inf")]
    )
    want = torch.tensor([0.0, -0.0, 1 + one, -1 - one, 1.0, 1.5 * one, 3.3e38, float("inf"), -float("inf")])
    want[6] = to_tf32(x[6:7])[0]
    # with every bit of the mantissa set, which a carry would turn into a zero
    nan = torch.tensor([0x7FC00000, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    y = launch._Round(12)(torch.cat([x, nan]).view(12, 1, 1, 1, 1)).view(-1)
    assert torch.equal(y[:9].view(torch.int32), want.view(torch.int32))
    assert y[9:].isnan().all()
    x = torch.randn(1000)
    y = launch._Round(1000)(x.view(1000, 1, 1, 1, 1)).view(-1)
    assert torch.equal(y, to_tf32(x))
    assert ((y - x).abs() <= x.abs() * 2.0**-11).all()


@pytest.mark.parametrize("text", [TILES[i] for i in (0, 2, 5, 7, 9)], ids=lambda t: t[1])
def test_tf32_is_rounded_to(text: tuple[str, str]) -> None:
    """Tensor cores would drop the bits, which is more than twice as far off, and always towards zero."""
    from triton.runtime import interpreter

    known = not launch._ROUNDING_COPIES or hasattr(interpreter, "_round_f32_to_tf32")
    if text[1].startswith("boxes") and not known:
        pytest.skip(
            "the interpreter of Triton 3.7 and 3.8 does not know of copies that round; their drivers do"
        )
    p = ConvProblem.parse(text[0])
    t = p.tensors(torch.float32)
    scale, bias = folded(t)
    y = conv3d.forward(p, Config.parse(text[1]), "tf32", True, True)(t.x, t.weight, scale, bias, t.residual)
    error = (y - p.reference(rounded(t))).norm() / y.norm()
    assert error < 2e-5  # copies of descriptors round ties to even numbers


@pytest.mark.parametrize(
    ("what", "text", "config"),
    [
        ("input", "n1c20d2h4w5k40f3x1x2p1x0x1", "tiled 32x16x16 w4 s2 g2 k2"),
        ("input", "n1c16d2h5w5k40f3s2p1", "tiled 16x16x16 w4 s2 g2 k1"),
        ("weight", "n1c20d2h4w5k40f3x1x2p1x0x1", "pixels 16x16x32 w4 s2 g8 k2"),
        ("weight", "n1c3d2h7w9k40f1x3x3s1x1x2p0x1x1", "strips 16x16x32 w4 s2 g8 k1"),
        ("weight", "n1c3d2h7w9k40f1x3x3s1x1x2p0x1x1", "pixels 16x16x32 w4 s2 g8 k1"),
    ],
)
def test_gradients_round_to_tf32(what: str, text: str, config: str) -> None:
    p = ConvProblem.parse(text)
    t = p.tensors(torch.float32)
    dy = channels_last(torch.randn(p.out_shape))
    geometry = (p.stride, p.padding, p.dilation, p.groups)
    leaves = [to_tf32(v).double().requires_grad_() for v in (t.x, t.weight)]
    torch.nn.functional.conv3d(*leaves, None, *geometry).backward(to_tf32(dy).double())
    if what == "input":
        ours, exact = conv3d.input_grad(p, Config.parse(config), "tf32")(dy, t.weight), leaves[0].grad
    else:
        ours, exact = conv3d.weight_grad(p, Config.parse(config), "tf32")(t.x, dy), leaves[1].grad
    assert (ours - exact).norm() / exact.norm() < 1e-6


def test_offsets_of_64_bits_change_nothing(monkeypatch) -> None:
    for text, config in (TILES[3], *TILES[6:10:3], TILES[-1]):
        p = ConvProblem.parse(text)
        conv3d.forward.cache_clear()
        narrow = check(p, torch.float32, config)
        with monkeypatch.context() as patch:
            patch.setattr(launch, "_INT32", 1)
            conv3d.forward.cache_clear()
            wide = check(p, torch.float32, config)
        conv3d.forward.cache_clear()
        assert torch.equal(narrow, wide)


def test_offsets_of_outputs_count_too() -> None:
    """A stem has few inputs and many outputs."""
    p = ConvProblem.parse("n700c3d16h112w112k64f3x7x7s1x2x2p1x3x3+relu")
    assert math.prod(p.in_shape) < 2**31 < math.prod(p.out_shape)
    for config in (
        "rows 128x64x32 w8 s3 g8 k1",
        "packed 128x64x32 w8 s2 g8 k1",
        "tiled 64x64x32 w8 s2 g8 k1",
    ):
        assert conv3d.forward(p, Config.parse(config), "half", True, True).meta["WIDE"]
    for config in ("strips 64x32x64 w4 s3 g8 k1", "pixels 32x64x64 w4 s3 g8 k1"):
        assert conv3d.weight_grad(p, Config.parse(config), "half").launch.meta["WIDE"]


def test_rows_that_are_none() -> None:
    for text, why in {
        "n1c4d2h4w4k16f3p1g2": "groups=1",
        "n1c4d2h4w4k16f3p2l2": "dilation 1 along the width",
        "n1c4d40h4w4k16f35x1x1": "at most 31 taps",
        "n1c8d2h4w9k16f1x1x9p0x0x4": "at most 32 values, got 72",
    }.items():
        with pytest.raises(ValueError, match=why):
            conv3d.forward(
                ConvProblem.parse(text), Config.parse("rows 16x16x32 w4 s2 g8 k1"), "half", True, True
            )
    where = configs.machine(torch.device("cpu"))
    stem = ConvProblem.parse("n1c3d4h12w12k45f3x7x7s1x2x2p1x3x3+relu")
    assert configs.default(stem, torch.bfloat16, "half", where).kernel == "rows"
    dilated = dataclasses.replace(stem, dilation=(1, 1, 2))
    assert configs.default(dilated, torch.bfloat16, "half", where).kernel == "packed"


@pytest.mark.parametrize("config", ["tiled 16x16x16 w4 s3 g8 k1", "packed 16x16x16 w4 s2 g8 k1"])
def test_more_than_two_to_the_31_elements(config: str) -> None:
    """Only the pixels that the stride reads are ever touched: the rest of the memory is never there."""
    size, stride = 8500, 4249
    x = torch.empty(1, 16, 2, size, size, dtype=torch.bfloat16, memory_format=torch.channels_last_3d)
    assert x.numel() > 2**31
    p = ConvProblem(*x.shape, k=16, kernel=(1, 1, 1), stride=(1, stride, stride), activation=None)
    small = x[:, :, :, ::stride, ::stride]
    small.copy_(torch.randn(small.shape))
    weight = torch.randn(p.weight_shape).bfloat16()
    run = conv3d.forward(p, Config.parse(config), "half", False, False)
    assert run.meta["WIDE"]  # without, the last pixels' offsets would wrap around
    assert (small[0, 0, 1, 2, 2].data_ptr() - x.data_ptr()) // 2 > 2**31
    want = torch.nn.functional.conv3d(small.double(), weight.double())
    assert_keeps_promise(run(x, weight, None, None, None), want)


@dtypes
def test_empty_batch(dtype: torch.dtype) -> None:
    y = check(ConvProblem.parse("n0c16d4h6w6k32f3p1+res+relu"), dtype)
    assert y.numel() == 0


def test_not_a_number_passes_the_relu() -> None:
    x = torch.ones(1, 16, 2, 3, 3)
    x[0, 3, 0, 0, 0] = float("nan")
    x[0, 5, 1, 2, 2] = float("inf")
    y = conv3d.conv3d(x, torch.ones(20, 16, 1, 1, 1), activation="relu")
    assert y[0, :, 0, 0, 0].isnan().all()
    assert (y[0, :, 1, 2, 2] == float("inf")).all()
    assert (y[0, :, 0, 1, 1] == 16).all()


@pytest.mark.parametrize("config", ["tiled 16x16x16 w4 s3 g8 k4", "boxes 32x16x16 w4 s3 g8 k1"])
def test_same_bits_every_time(config: str) -> None:
    p = ConvProblem.parse("n1c40d2h4w8k16f3x1x3p1x0x1+res+relu")
    assert torch.equal(check(p, torch.float32, config), check(p, torch.float32, config))


def test_non_contiguous() -> None:
    p = ConvProblem.parse("n2c7d4h6w5k12f3p1+res+relu")
    t = p.tensors()

    def run(x, weight, residual):
        return conv3d.conv3d(x, weight, residual=residual, padding=1, activation="relu")

    want = run(t.x, t.weight, t.residual)
    padded = torch.zeros(2, 10, 4, 6, 7)
    padded[:, 2:9, :, :, 1:6] = t.x
    for x in (t.x.contiguous(), padded[:, 2:9, :, :, 1:6]):
        assert torch.equal(run(x, t.weight.contiguous(), t.residual.contiguous()), want)


def test_unaligned_operands_of_descriptors() -> None:
    """A TMA descriptor wants 16-byte addresses."""
    p = ConvProblem.parse("n1c16d4h4w4k16f3p1")
    t = p.tensors(torch.bfloat16)
    scale, bias = folded(t)

    def shifted(a: torch.Tensor) -> torch.Tensor:
        flat = torch.empty(a.numel() + 1, dtype=a.dtype)[1:]
        b = flat.as_strided(a.shape, a.stride())
        return b.copy_(a)

    run = conv3d.forward(p, Config.parse("boxes 64x16x16 w4 s3 g8 k1"), "half", True, True)
    x, weight = shifted(t.x), shifted(t.weight)
    assert x.data_ptr() % 16
    assert torch.equal(run(x, weight, scale, bias, None), run(t.x, t.weight, scale, bias, None))


# ---- through the package's own ops ----


@dtypes
@pytest.mark.parametrize(
    "text", ["n2c16d3h6w5k24f3p1+res+relu", "n1c3d4h12w12k16f7s2p3+relu", "n1c12d3h5w5k12f3p1g4"]
)
def test_as_a_backend(text: str, dtype: torch.dtype) -> None:
    p = ConvProblem.parse(text)
    t = p.tensors(dtype)
    layer = r3d.ConvBNAct3d(
        p.c, p.k, p.kernel, p.stride, p.padding, groups=p.groups, activation=p.activation, dtype=dtype
    ).eval()
    with torch.no_grad():
        layer.conv.weight.copy_(t.weight)
    with torch.inference_mode(), r3d.backend("triton"):
        first = layer(t.x, t.residual)
        y = layer(t.x, t.residual)  # by the launch that the first call kept
    assert torch.equal(first, y)
    record = backends.explain(layer)[-1]
    assert (record.backend, record.kernel) == ("triton", "triton")
    identity = dataclasses.replace(
        t,
        gamma=layer.bn.weight.detach(),
        beta=layer.bn.bias.detach(),
        running_mean=layer.bn.running_mean,
        running_var=layer.bn.running_var,
        eps=layer.bn.eps,
    )
    assert_keeps_promise(y, p.reference(identity), stock(p, identity))


def test_interpreter_is_never_chosen_by_itself() -> None:
    p = ConvProblem.parse("n1c8d3h6w6k16f3p1")
    request = backends.Request(p, torch.float32, torch.device("cpu"), 1)
    kernel = next(k for k in backends.KERNELS if k.backend == "triton")
    assert "only where backend 'triton' is asked for" in kernel.can_run(request)
    with r3d.backend("triton"):
        assert kernel.can_run(request) is None
        wrong = dataclasses.replace(request, dtype=torch.float64)
        assert "float32, bfloat16 and float16 only" in kernel.can_run(wrong)


@settings(max_examples=8)
@given(problem_strategy(max_out=4, max_macs=100_000), st.sampled_from(DTYPES))
def test_functional_form(problem: ConvProblem, dtype: torch.dtype) -> None:
    t = problem.tensors(dtype)
    with r3d.backend("triton"), torch.no_grad():
        y = ops.conv3d_bn_act(
            t.x,
            t.weight,
            t.running_mean,
            t.running_var,
            t.gamma,
            t.beta,
            t.eps,
            residual=t.residual,
            activation=problem.activation,
            stride=problem.stride,
            padding=problem.padding,
            dilation=problem.dilation,
            groups=problem.groups,
        )
    assert_keeps_promise(y, problem.reference(t), stock(problem, t))


# ---- gradients ----

GRADIENTS = [
    "n2c16d4h6w5k24f3p1",
    "n1c17d5h7w6k19f3s2p1",
    "n2c8d6h7w9k6f3x2x4s2x3x1p1x0x3l3x1x2g2",
    "n1c3d4h9w9k16f3x7x7s1x2x2p1x3x3",  # a stem
    "n1c16d3h5w5k8f1s2",  # inputs that no output reads
    "n1c8d7h7w7k8f2s3",
    "n1c32d2h4w4k20f3s2p2l2",
    "n2c45d2h4w4k20f1",
    "n0c8d3h4w4k8f3p1",
]


def check_gradients(p: ConvProblem, dtype: torch.dtype) -> None:
    t = p.tensors(dtype)
    dy = torch.randn(p.out_shape).to(dtype)
    geometry = {
        "stride": p.stride,
        "padding": p.padding,
        "dilation": p.dilation,
        "groups": p.groups,
    }
    dx = conv3d.conv3d_input_grad(dy, t.weight, p.in_shape, **geometry)
    dw = conv3d.conv3d_weight_grad(t.x, dy, p.weight_shape, **geometry)
    x, weight = t.x.double().requires_grad_(), t.weight.double().requires_grad_()
    torch.nn.functional.conv3d(x, weight, None, *geometry.values()).backward(dy.double())
    for ours, exact in ((dx, x.grad), (dw, weight.grad)):
        assert ours.dtype == dtype
        assert ours.is_contiguous(memory_format=torch.channels_last_3d)
        # a sum over outputs may cancel: the terms' size is the scale
        assert_keeps_promise(ours, exact, magnitude=exact.numel() ** 0.5)


@dtypes
@pytest.mark.parametrize("text", GRADIENTS)
def test_gradients(text: str, dtype: torch.dtype) -> None:
    check_gradients(ConvProblem.parse(text), dtype)


@settings(max_examples=15)
@given(
    problem_strategy(max_out=4, max_macs=100_000, residual=False, activation=None), st.sampled_from(DTYPES)
)
def test_gradients_of_any_geometry(problem: ConvProblem, dtype: torch.dtype) -> None:
    check_gradients(problem, dtype)


def test_weight_gradient_in_parts() -> None:
    """Many pixels: parts of the sum, added in order."""
    p = ConvProblem.parse("n2c5d3h12w12k6f1x3x3p0x1x1")
    t = p.tensors()
    dy = torch.randn(p.out_shape).contiguous(memory_format=torch.channels_last_3d)
    where = configs.machine(t.x.device)
    run = conv3d.weight_grad(p, configs.weight_grads(p, t.x.dtype, "ieee", where)[0], "ieee")
    assert run.parts > 2
    dw = run(t.x, dy)
    weight = t.weight.double().requires_grad_()
    torch.nn.functional.conv3d(t.x.double(), weight, padding=p.padding).backward(dy.double())
    assert_keeps_promise(dw, weight.grad)
    assert torch.equal(dw, run(t.x, dy))


def check_gradient_tile(what: str, p: ConvProblem, config: Config, precision: str) -> None:
    t = p.tensors(torch.bfloat16 if precision == "half" else torch.float32)
    dy = channels_last(torch.randn(p.out_shape).to(t.x.dtype))
    if precision == "tf32":
        t, dy = rounded(t), to_tf32(dy)
    leaves = [t.x.double().requires_grad_(), t.weight.double().requires_grad_()]
    geometry = (p.stride, p.padding, p.dilation, p.groups)
    torch.nn.functional.conv3d(*leaves, None, *geometry).backward(dy.double())
    if what == "input":
        ours, exact = conv3d.input_grad(p, config, precision)(dy, t.weight), leaves[0].grad
    else:
        ours, exact = conv3d.weight_grad(p, config, precision)(t.x, dy), leaves[1].grad
    assert_keeps_promise(ours, exact, magnitude=exact.numel() ** 0.5)


@pytest.mark.parametrize("precision", ["half", "tf32", "ieee"])
def test_every_shipped_tile_of_a_gradient(precision: str) -> None:
    inputs = {
        "wide": "n1c136d2h5w7k72f1x1x2p0x0x1",
        "narrow": "n1c24d2h9w9k40f1x1x3s1x1x2p0x0x1",
        "late": "n1c40d2h5w7k72f1x2x1p0x1x0",
        "odd": "n1c40d2h5w7k45f1",
    }
    weights = {True: "n1c3d2h7w9k40f1x3x3s1x1x2p0x1x1", False: "n1c72d2h6w7k72f1x1x2p0x0x1"}
    for what, problems, shipped in (
        ("input", inputs, configs.shipped_input_grads),
        ("weight", weights, configs.shipped_weight_grads),
    ):
        for name, text in problems.items():
            for config in shipped(precision, name, 90):
                check_gradient_tile(what, ConvProblem.parse(text), config, precision)


def test_gradients_in_parts() -> None:
    """Splits that do not divide the steps, groups, tails of every axis."""
    for text, split in (("n1c20d2h4w5k40f3x1x2p1x0x1", 5), ("n2c12d2h3w5k40f1x3x2p0x1x1l1x1x2g2", 2)):
        p = ConvProblem.parse(text)
        check_gradient_tile("input", p, Config.parse(f"tiled 32x16x16 w4 s2 g2 k{split}"), "ieee")
        check_gradient_tile("weight", p, Config.parse(f"pixels 16x16x32 w4 s2 g8 k{split}"), "ieee")
    strided = ConvProblem.parse("n1c16d2h5w5k40f3s2p1")
    with pytest.raises(ValueError, match=r"config: the sum of tiled .* k2 is split"):
        conv3d.input_grad(strided, Config.parse("tiled 16x16x16 w4 s2 g2 k2"), "ieee")


def test_a_late_input_gradient_is_split() -> None:
    where = configs.Machine(90, 132, configs._SHARED[90])
    late = configs.input_grads(ConvProblem.parse("n1c512d2h7w7k512f3p1"), torch.bfloat16, "half", where)
    assert late[0].split == 8
    assert dataclasses.replace(late[0], split=1) in late
    strided = configs.input_grads(
        ConvProblem.parse("n1c256d4h14w14k512f3s2p1"), torch.bfloat16, "half", where
    )
    assert {c.split for c in strided} == {1}


@pytest.mark.parametrize("activation", [None, "relu"])
def test_autograd(activation: str | None) -> None:
    p = ConvProblem.parse("n2c6d3h5w4k8f3s2x1x1p1+res")
    t = p.tensors(relu_like=False)
    scale, bias = folded(t)
    leaves = [t.x, t.weight, bias, t.residual]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    for leaf in leaves:
        leaf.requires_grad_()
    dy = torch.randn(p.out_shape)
    x, weight, b, residual = leaves
    conv3d.conv3d(x, weight, scale, b, residual, stride=p.stride, padding=1, activation=activation).backward(
        dy
    )
    y = torch.nn.functional.conv3d(exact[0], exact[1], None, p.stride, 1)
    y = y * scale.double().view(1, -1, 1, 1, 1) + exact[2].view(1, -1, 1, 1, 1) + exact[3]
    (y.relu() if activation else y).backward(dy.double())
    for ours, want in zip(leaves, exact, strict=True):
        assert_keeps_promise(ours.grad, want.grad)


def test_under_autocast() -> None:
    """As torch's conv3d: float32 parameters, a half-precision result, float32 gradients."""
    p = ConvProblem.parse("n1c6d2h5w4k8f3p1+res")
    t = p.tensors()
    leaves = [t.x.requires_grad_(), t.weight.requires_grad_(), t.residual.bfloat16().requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        y = conv3d.conv3d(leaves[0], leaves[1], residual=leaves[2], padding=1, activation="relu")
    assert y.dtype == torch.bfloat16
    assert torch.equal(
        y,
        conv3d.conv3d(t.x.bfloat16(), t.weight.bfloat16(), residual=leaves[2], padding=1, activation="relu"),
    )
    y.sum().backward()
    assert [leaf.grad.dtype for leaf in leaves] == [torch.float32, torch.float32, torch.bfloat16]
    with (
        torch.autocast("cpu", enabled=False),
        pytest.raises(TypeError, match=r"residual: expected torch\.float32"),
    ):
        conv3d.conv3d(leaves[0], leaves[1], residual=leaves[2], padding=1)


def test_a_gradient_with_more_taps_than_a_word_has_bits() -> None:
    """torch's own input gradient, behind the same function."""
    x = torch.randn(1, 2, 1, 3, 40, requires_grad=True)
    weight = torch.randn(4, 2, 1, 1, 35, requires_grad=True)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    dy = torch.randn(1, 4, 1, 3, 20)
    geometry = {"stride": (1, 1, 2), "padding": (0, 0, 17)}
    conv3d.conv3d(x, weight, **geometry).backward(dy)
    torch.nn.functional.conv3d(*exact, None, *geometry.values()).backward(dy.double())
    for ours, want in zip((x, weight), exact, strict=True):
        assert_keeps_promise(ours.grad, want.grad)


@dtypes
@pytest.mark.parametrize(
    "text",
    [
        "n2c5d5h7w9k7f3s2p1",  # stride 2 at odd sizes: the last input of an axis is read or not
        "n1c7d6h8w5k3f3s2p0",
        "n2c6d5h7w6k9f3x3x3s1x2x2p1l2x1x1g3",
        "n1c1d7h9w9k5f5x7x7s2p2x3x3",
    ],
)
def test_every_gradient_through_autograd(text: str, dtype: torch.dtype) -> None:
    """x, weight, bias and residual at once, odd channels, a residual and a ReLU, against float64."""
    p = dataclasses.replace(ConvProblem.parse(text), residual=True, activation="relu")
    t = p.tensors(dtype, relu_like=False)
    scale, bias = folded(t)
    leaves = [t.x, t.weight, bias, t.residual]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    for leaf in leaves:
        leaf.requires_grad_()
    geometry = (p.stride, p.padding, p.dilation, p.groups)
    names = ("stride", "padding", "dilation", "groups")
    y = conv3d.conv3d(
        *(t.x, t.weight, scale, bias, t.residual),
        **dict(zip(names, geometry, strict=True)),
        activation="relu",
    )
    dy = torch.randn(p.out_shape).to(dtype)
    y.backward(dy)
    z = torch.nn.functional.conv3d(exact[0], exact[1], None, *geometry) * scale.double().view(1, -1, 1, 1, 1)
    z = z + exact[2].view(1, -1, 1, 1, 1) + exact[3]
    torch.where(y > 0, z, 0).backward(dy.double())  # by the mask of our own y: half precision moves the edge
    for ours, want in zip(leaves, exact, strict=True):
        assert ours.grad.dtype == ours.dtype
        # dy * scale is rounded to the dtype before it is summed, as stock layers do between batch norm and convolution
        assert_keeps_promise(ours.grad, want.grad, magnitude=2 * want.grad.norm().item())


def test_weight_gradient_sums_in_float32() -> None:
    """4096 pixels of bfloat16: sums in bfloat16 would stop growing at 256."""
    p = ConvProblem.parse("n1c3d4h32w32k2f1")
    x, dy = (torch.ones(s, dtype=torch.bfloat16) for s in (p.in_shape, p.out_shape))
    dw = conv3d.conv3d_weight_grad(x, dy, p.weight_shape)
    assert (dw == 4096).all()
    dx = conv3d.conv3d_input_grad(
        torch.ones(1, 1024, 1, 2, 2).bfloat16(), torch.ones(1024, 3, 1, 1, 1).bfloat16(), (1, 3, 1, 2, 2)
    )
    assert (dx == 1024).all()


def test_gradients_of_non_contiguous_tensors() -> None:
    p = ConvProblem.parse("n2c7d4h6w5k12f3s2p1")
    t, dy = p.tensors(), torch.randn(p.out_shape)
    dx = conv3d.conv3d_input_grad(dy, t.weight, p.in_shape, stride=2, padding=1)
    dw = conv3d.conv3d_weight_grad(t.x, dy, p.weight_shape, stride=2, padding=1)
    padded = torch.zeros(2, 10, 4, 6, 7)
    padded[:, 2:9, :, :, 1:6] = t.x
    apart = torch.stack([dy, dy], -1)[..., 0]
    assert torch.equal(
        conv3d.conv3d_input_grad(apart, t.weight.contiguous(), p.in_shape, stride=2, padding=1), dx
    )
    x = padded[:, 2:9, :, :, 1:6]
    assert torch.equal(conv3d.conv3d_weight_grad(x, apart, p.weight_shape, stride=2, padding=1), dw)
    # what sum().backward() hands over: one number, expanded
    leaf = t.x.requires_grad_()
    conv3d.conv3d(leaf, t.weight, stride=2, padding=1).sum().backward()
    ones = torch.ones(p.out_shape)
    assert torch.equal(leaf.grad, conv3d.conv3d_input_grad(ones, t.weight, p.in_shape, stride=2, padding=1))


@dtypes
def test_gradients_of_an_empty_batch(dtype: torch.dtype) -> None:
    x = torch.randn(0, 5, 3, 5, 5, dtype=dtype, requires_grad=True)
    weight = torch.randn(7, 5, 3, 3, 3, dtype=dtype, requires_grad=True)
    conv3d.conv3d(x, weight, stride=2, padding=1).sum().backward()
    assert x.grad.shape == x.shape
    assert (weight.grad == 0).all()


def test_no_second_derivative_is_made_up() -> None:
    x = torch.randn(1, 4, 2, 3, 3, requires_grad=True)
    y = conv3d.conv3d(x, torch.randn(4, 4, 1, 1, 1), activation="relu")
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dx.sum().backward()


# ---- the registered ops ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    p = ConvProblem.parse("n2c5d4h6w5k9f3x2x3s1x2x1p1x0x1l1x1x2+res")
    t = p.tensors(dtype)
    geometry = (list(p.stride), list(p.padding), list(p.dilation), 1)
    dy = torch.randn(p.out_shape).to(dtype)
    ns = torch.ops.r3d_kernels
    x, weight = t.x.requires_grad_(), t.weight.requires_grad_()
    torch.library.opcheck(
        ns.triton_conv3d, (x, weight, None, torch.randn(p.k), t.residual, *geometry, "relu")
    )
    x, weight = x.detach(), weight.detach()
    torch.library.opcheck(ns.triton_conv3d_input_grad, (dy, weight, list(p.in_shape), *geometry))
    torch.library.opcheck(ns.triton_conv3d_weight_grad, (x, dy, list(p.weight_shape), *geometry))


def test_under_compile() -> None:
    """Opaque to the compiler: one graph, the same bits, gradients too."""
    p = ConvProblem.parse("n1c8d2h4w4k8f3p1")
    t = p.tensors(relu_like=False)

    def f(x, weight):
        return conv3d.conv3d(x * 2, weight, padding=1, activation="relu").sum(2)

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    x = t.x.requires_grad_()
    want, got = f(x, t.weight), compiled(x, t.weight)
    assert torch.equal(want, got)
    (a,) = torch.autograd.grad(want.square().sum(), x)
    (b,) = torch.autograd.grad(got.square().sum(), x)
    assert torch.equal(a, b)


def test_one_graph_for_every_size() -> None:
    """Forward and backward with symbolic sizes: compiled once."""
    weight = torch.randn(8, 6, 3, 3, 3)

    def f(x, weight):
        return conv3d.conv3d(x * 2, weight, stride=2, padding=1, activation="relu").square().sum()

    # No two sizes of the first call are equal: torch would take them for the same one.
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, backend=counter, fullgraph=True, dynamic=True)
    first = 0  # graphs after the first call
    for shape in ((9, 6, 4, 5, 7), (3, 6, 4, 8, 5), (4, 6, 5, 7, 9)):
        x = torch.randn(shape, requires_grad=True)
        y = compiled(x, weight)
        assert torch.equal(y, f(x, weight))
        assert torch.equal(*(torch.autograd.grad(g(x, weight), x)[0] for g in (f, compiled)))
        first = first or counter.frame_count
    assert counter.frame_count == first


# ---- wrong input ----

WRONG = {
    "rank of x": ({"x": torch.zeros(4, 3, 5, 5)}, ValueError, r"x: expected 5 dimensions.*\[4, 3, 5, 5\]"),
    "x is no tensor": ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
    "dtype": (
        {"x": torch.zeros(2, 4, 3, 5, 5).double(), "weight": torch.zeros(6, 4, 3, 3, 3).double()},
        TypeError,
        "x: expected float32, bfloat16 or float16, got torch.float64",
    ),
    "channels": ({"x": torch.zeros(2, 5, 3, 5, 5)}, ValueError, "x: expected 4 channels.*got 5"),
    "rank of weight": ({"weight": torch.zeros(6, 4, 3, 3)}, ValueError, "weight: expected 5 dimensions"),
    "dtype mix": ({"weight": torch.zeros(6, 4, 3, 3, 3).half()}, TypeError, "weight: expected torch.float32"),
    "scale": ({"scale": torch.zeros(5)}, ValueError, r"scale: expected shape \[6\], got \[5\]"),
    "dtype of bias": (
        {"bias": torch.zeros(6).half()},
        TypeError,
        "bias: expected torch.float32, got torch.float16",
    ),
    "gradient of scale": (
        {"scale": torch.zeros(6, requires_grad=True)},
        ValueError,
        "scale: expected a tensor that needs no gradient",
    ),
    "stride": ({"stride": 0}, ValueError, r"stride: expected integers >= 1, got \[0, 0, 0\]"),
    "two strides": ({"stride": (1, 2)}, TypeError, r"stride: expected an int or three ints.*\(1, 2\)"),
    "groups": ({"groups": 3}, ValueError, "groups: expected a divisor of the 4 input and 6 output channels"),
    "residual": (
        {"residual": torch.zeros(2, 6, 3, 5, 4)},
        ValueError,
        "residual: expected the output's shape",
    ),
    "activation": ({"activation": "gelu"}, ValueError, "activation: expected 'relu' or None, got 'gelu'"),
    "kernel": (
        {"x": torch.zeros(2, 4, 1, 1, 5), "padding": 0},
        ValueError,
        "kernel_size: the kernel does not",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case: str) -> None:
    change, error, message = WRONG[case]
    valid = {"x": torch.zeros(2, 4, 3, 5, 5), "weight": torch.zeros(6, 4, 3, 3, 3), "padding": 1}
    with pytest.raises(error, match=message):
        conv3d.conv3d(**{**valid, **change})


@pytest.mark.parametrize(
    "case", sorted(set(WRONG) - {"dtype", "scale", "dtype of bias", "gradient of scale"})
)
def test_wrong_input_is_refused_in_the_words_of_the_other_kernels(case: str) -> None:
    """All but what only this operation has."""
    change, error, _ = WRONG[case]
    valid = {"x": torch.zeros(2, 4, 3, 5, 5), "weight": torch.zeros(6, 4, 3, 3, 3), "padding": 1} | change
    statistics = (torch.zeros(6), torch.ones(6), None, None, 1e-5)
    with pytest.raises(error) as ours:
        conv3d.conv3d(**valid)
    with pytest.raises(error) as theirs:
        ops.conv3d_bn_act(valid.pop("x"), valid.pop("weight"), *statistics, **valid)
    assert str(ours.value) == str(theirs.value)


def test_more_groups_than_a_grid_takes() -> None:
    x, weight = torch.zeros(1, 65536, 1, 1, 1), torch.zeros(65536, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="groups: expected at most 65535, got 65536"):
        conv3d.conv3d(x, weight, groups=65536)
    with pytest.raises(ValueError, match="groups: expected at most 65535, got 65536"):
        conv3d.conv3d_input_grad(x, weight, x.shape, groups=65536)


def test_wrong_gradients() -> None:
    weight, dy = torch.zeros(6, 4, 3, 3, 3), torch.zeros(2, 6, 3, 5, 5)
    with pytest.raises(ValueError, match=r"dy: expected the output's shape \[2, 6, 3, 5, 5\], got"):
        conv3d.conv3d_input_grad(dy[:, :, 1:], weight, (2, 4, 3, 5, 5), padding=1)
    with pytest.raises(TypeError, match=r"dy: expected torch.float16"):
        conv3d.conv3d_weight_grad(torch.zeros(2, 4, 3, 5, 5).half(), dy, weight.shape, padding=1)
    with pytest.raises(ValueError, match="kernel_size: expected at most 31 taps"):
        conv3d.conv3d_input_grad(torch.zeros(1, 6, 1, 1, 8), torch.zeros(6, 4, 1, 1, 33), (1, 4, 1, 1, 40))
