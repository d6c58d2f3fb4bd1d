"""The direct convolution that reads the parameter itself, against float64, on every instruction set."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_keeps_promise, relative_error
from strategies import problem_strategy

import r3d_kernels as r3d
from r3d_kernels import backends, ops
from r3d_kernels.problems import ConvProblem

ISAS = ("scalar", "avx2", "avx512", "avx512_bf16")
USABLE = ISAS[: ("scalar", "avx2", "avx512", "avx512_bf16", "amx").index(backends.describe()["best_isa"]) + 1]
LAYOUTS = {"plain": torch.contiguous_format, "cl": torch.channels_last_3d}
GEOMETRIES = [
    "n1c64d4h7w7k64f3s1p1+res+relu",
    "n2c45d3h9w9k45f3s2p1+relu",
    "n1c3d8h20w22k64f7s1x2x2p3+relu",  # stems: several taps a run
    "n2c1d6h12w12k17f5x7x7s2p2x3x3",
    "n1c1d2h33w35k8f1x31x31p0x15x15",
    "n2c45d6h5w5k64f3x1x1p1x0x0+relu",
    "n1c230d3h4w5k40f1x3x3p0x1x1+res+relu",  # chunks of channels, the last one narrower
    "n1c921d1h3w4k7f1+res",
    "n1c320d2h4w4k33f3p1+relu",  # lines of pixels, planes of taps that some tiles do not see
    "n2c64d3h9w10k96f1s2+res",
    "n2c64d3h5w6k130f1+relu",
    "n3c96d1h4w4k64f3p1+relu",  # taps along depth that see padding alone
    "n2c33d1h1w1k8f3p1+res",
    "n1c40d7h9w10k48f3s1x2x3p2x1x0l2x1x2+relu",
    "n1c64d3h8w8k32f3p2l2",
    "n1c7d7h9w10k9f3s1x2x1p2x1x1l1x2x1",
    "n1c8d7h3w3k8f3s3p4",  # windows that lie on padding alone
    "n2c64d2h8w8k64f3p1+res+relu",  # several samples in one block
    "n1c16d4h12w13k80f3p1+relu",  # more pixels than are multiplied with weights turned for them
    "n1c6d4h12w13k80f3p1+res",
    "n0c8d3h4w4k8f3p1",
    # few pixels, several chunks of channels: weights that are turned while others are multiplied
    "n1c100d2h7w7k150f3p1+res+relu",
    "n1c90d1h4w4k96f3p1",
    "n1c600d1h2w3k70f3x1x1p1x0x0+relu",  # one tap in three
    "n2c1152d1h2w2k64f3x1x1p1x0x0",
    "n1c400d1h3w4k80f3x2x1p1x1x0",
    "n1c700d2h3w2k100f3x1x1p1x0x0",
    "n1c1000d1h3w3k64f1+res",
    "n1c520d1h3w3k48f1",
    "n1c130d3h4w4k49f1x3x2p0x1x1",
    # a run that the first pixel of a line sees in part and the last one not at all, and the other way round
    "n1c275d1h2w3k24f1x1x3p0x0x2",
    "n1c256d2h16w17k16f1x1x3p0x0x2",
    "n1c256d2h16w17k16f1x1x4p0x0x3+relu",
    "n1c300d2h17w19k20f1x2x3s1x1x2p0x1x2",
]


def run(
    p: ConvProblem,
    dtype: torch.dtype,
    layout=torch.contiguous_format,
    scaled: bool = True,
    kept: torch.Tensor | None = None,
):
    t = p.tensors(dtype)
    scale, shift = torch.rand(p.k) + 0.5 if scaled else None, torch.randn(p.k)
    y = ops.conv3d_direct(
        t.x,
        t.weight.contiguous(memory_format=layout),
        shift,
        scale,
        t.residual,
        stride=p.stride,
        padding=p.padding,
        dilation=p.dilation,
        activation=p.activation,
        kept=kept,
    )
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last_3d) or not y.numel()
    want = F.conv3d(t.x.double(), t.weight.double(), None, p.stride, p.padding, p.dilation)
    if scale is not None:
        want = want * scale.double().view(-1, 1, 1, 1)
    want = want + shift.double().view(-1, 1, 1, 1)
    if t.residual is not None:
        want = want + t.residual.double()
    terms = F.conv3d(t.x.double().abs(), t.weight.double().abs(), None, p.stride, p.padding, p.dilation)
    return y, want.relu() if p.activation == "relu" else want, terms.norm().item()


def check(p: ConvProblem, dtype: torch.dtype, **kwargs) -> float:
    y, want, terms = run(p, dtype, **kwargs)
    # as a layer that rounds nothing but its output
    assert_keeps_promise(y, want, want.bfloat16(), magnitude=terms)
    return relative_error(y, want)


@pytest.fixture(params=USABLE)
def isa(request, monkeypatch):
    monkeypatch.setenv("R3D_KERNELS_ISA", request.param)
    return request.param


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("text", GEOMETRIES)
def test_geometries(text: str, dtype: torch.dtype, layout: str, isa: str) -> None:
    error = check(ConvProblem.parse(text), dtype, layout=LAYOUTS[layout])
    assert error < (5e-7 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("text", ["n1c512d1h2w2k512f3p1", "n1c300d3h13w15k320f3p1+relu"])
def test_weights_larger_than_the_scratch(
    text: str, dtype: torch.dtype, layout: str, isa: str, monkeypatch
) -> None:
    p = ConvProblem.parse(text)
    if isa == "scalar" and p.macs > 10**9:
        pytest.skip("slow, and the same code")
    check(p, dtype, layout=LAYOUTS[layout])


@given(
    problem_strategy(groups=False, max_macs=400_000),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from(list(LAYOUTS)),
    st.booleans(),
)
def test_any_geometry(p: ConvProblem, dtype: torch.dtype, layout: str, scaled: bool) -> None:
    check(p, dtype, layout=LAYOUTS[layout], scaled=scaled)


@st.composite
def many_channels(draw) -> ConvProblem:
    """Few pixels and several chunks of input channels."""

    def axes(least: int, most: int) -> tuple[int, int, int]:
        return (
            draw(st.integers(least, most)),
            draw(st.integers(least, most)),
            draw(st.integers(least, most)),
        )

    kernel = axes(1, 3)
    padding = tuple(draw(st.integers(0, k - 1)) for k in kernel)
    size = tuple(draw(st.integers(max(1, k - 2 * p), 4)) for k, p in zip(kernel, padding, strict=True))
    return ConvProblem(
        1, draw(st.integers(60, 500)), *size, k=draw(st.integers(1, 100)), kernel=kernel, stride=axes(1, 2),
        padding=padding,
    ).validate()  # fmt: skip


@given(many_channels(), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from(list(LAYOUTS)))
def test_any_geometry_of_many_channels(p: ConvProblem, dtype: torch.dtype, layout: str) -> None:
    check(p, dtype, layout=LAYOUTS[layout])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "text",
    [
        "n2c64d6h9w9k96f3p1+res+relu",
        "n1c320d2h7w7k130f3p1+relu",
        "n1c3d8h20w20k64f7s1x2x2p3",
        "n1c512d2h4w4k256f1",
        "n1c256d1h4w4k256f3p1",
        "n1c128d2h1w1k16f3p1",
        # weights that every thread turns for itself: all, or those of its share of the channels
        "n1c64d6h24w24k200f1+res",
        "n1c33d4h24w24k70f3p1",
        "n1c40d4h12w13k400f3s1x2x2p1+relu",
    ],
)
def test_same_bits_with_any_number_of_threads(text: str, dtype: torch.dtype) -> None:
    p = ConvProblem.parse(text)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7, 32):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            results.append(run(p, dtype)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("text", ["n1c64d2h5w5k64f3p1", "n1c16d5h12w12k32f3p1"])
def test_same_bits_from_either_layout(text: str, isa: str) -> None:
    results = []
    for layout in LAYOUTS.values():
        torch.manual_seed(3)
        results.append(run(ConvProblem.parse(text), torch.float32, layout)[0])
    assert torch.equal(*results)


def test_other_strides_of_the_input_and_the_weight(isa: str) -> None:
    x = torch.randn(2, 5, 9, 6, 40)[..., ::2].transpose(2, 3)
    w = torch.randn(3, 3, 3, 40, 24).permute(4, 3, 0, 1, 2)[:, ::8]
    residual = torch.randn(2, 24, 9, 6, 20).transpose(2, 3)
    y = ops.conv3d_direct(x, w, torch.zeros(24), residual=residual, padding=1, activation=None)
    want = F.conv3d(x.double(), w.double(), padding=1) + residual.double()
    assert relative_error(y, want) < 5e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_not_a_number_and_infinity_arrive(dtype: torch.dtype, isa: str) -> None:
    x, w = torch.randn(1, 64, 3, 5, 5).to(dtype), torch.randn(32, 64, 3, 3, 3).to(dtype)
    for value in (float("nan"), float("inf")):
        x[0, 5, 1, 2, 2] = value
        y = ops.conv3d_direct(x, w, torch.zeros(32), padding=1, activation=None)
        want = torch.isfinite(F.conv3d(x.float(), w.float(), padding=1))
        assert torch.equal(torch.isfinite(y), want)


def test_odd_channels_do_not_read_beyond_a_pixel(isa: str) -> None:
    """A pair of bfloat16 values never reaches into the next pixel, whose values may be anything."""
    x = torch.randn(1, 7, 2, 4, 4).bfloat16().contiguous(memory_format=torch.channels_last_3d)
    x[..., 1] = float("nan")
    w = torch.randn(8, 7, 1, 1, 1).bfloat16()
    y = ops.conv3d_direct(x, w, torch.zeros(8), activation=None)
    assert torch.isfinite(y[..., [0, 2, 3]]).all()
    assert torch.isnan(y[..., 1]).all()


def test_in_several_threads_at_once() -> None:
    """Layers of different size share no scratch while they run."""
    texts = ["n1c64d4h13w13k64f3p1", "n1c256d1h4w4k256f3p1", "n1c300d3h14w14k320f3p1", "n1c16d5h20w20k32f1"]
    jobs = []
    for text in texts:
        p = ConvProblem.parse(text)
        t = p.tensors(torch.float32)
        bias = torch.randn(p.k)
        jobs.append((t.x, t.weight, bias, p, ops.conv3d_direct(t.x, t.weight, bias, padding=p.padding)))
    wrong: list[str] = []

    def work(first: int) -> None:
        for i in range(settings.default.max_examples):  # fewer under sanitizers
            x, w, bias, p, want = jobs[(first + i) % len(jobs)]
            if not torch.equal(ops.conv3d_direct(x, w, bias, padding=p.padding), want):
                wrong.append(str(p))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": torch.zeros(7)}, "bias: expected a float32 CPU tensor of shape"),
        ({"scale": torch.zeros(8, dtype=torch.float64)}, "scale: expected a float32 CPU tensor"),
        ({"weight": torch.zeros(8, 4, 3, 3, 3).bfloat16()}, "weight: expected the dtype of x"),
        ({"weight": torch.zeros(8, 5, 3, 3, 3)}, "channels"),
        ({"weight": torch.zeros(8, 4, 3, 3)}, "weight: expected 5 dimensions"),
        ({"x": torch.zeros(4, 5, 5, 5)}, "x: expected 5 dimensions"),
        ({"x": torch.zeros(1, 4, 5, 5, 5, dtype=torch.float64)}, "x: expected float32 or bfloat16"),
        ({"residual": torch.zeros(1, 8, 5, 5, 5)}, "residual: expected the output's shape"),
        ({"residual": torch.zeros(1, 8, 3, 3, 3).bfloat16()}, "residual: expected the dtype of x"),
        ({"padding": -1}, "padding"),
        ({"stride": 0}, "stride"),
        ({"dilation": 3}, "the kernel does not fit"),
        ({"activation": "gelu"}, "activation"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    good = {"x": torch.zeros(1, 4, 5, 5, 5), "weight": torch.zeros(8, 4, 3, 3, 3), "bias": torch.zeros(8)}
    ops.conv3d_direct(**good)
    with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
        ops.conv3d_direct(**(good | change))


def test_opcheck() -> None:
    x, w = torch.randn(1, 8, 3, 5, 5), torch.randn(16, 8, 3, 3, 3)
    geometry = ([1, 1, 1], [1, 1, 1], [1, 1, 1])
    args = (x, w, torch.rand(16), torch.zeros(16), torch.randn(1, 16, 3, 5, 5), *geometry, "relu")
    torch.library.opcheck(torch.ops.r3d_kernels.conv3d_direct.default, args)


def test_flops_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x, w = torch.randn(1, 8, 3, 5, 5), torch.randn(16, 8, 3, 3, 3)
    with FlopCounterMode(display=False) as flops:
        ops.conv3d_direct(x, w, torch.zeros(16), padding=1)
    assert flops.get_total_flops() == 2 * 16 * 75 * 8 * 27


def test_weights_are_read_where_they_are() -> None:
    """No copy is kept: `pack` shares the memory of the parameter."""
    layer = r3d.ConvBNAct3d(64, 64, 3, padding=1).eval()
    p = ConvProblem(1, 64, 2, 5, 5, k=64, kernel=(3, 3, 3), padding=(1, 1, 1))
    request = backends.Request(p, torch.float32, torch.device("cpu"), 1)
    direct = next(k for k in backends.KERNELS if k.name == "direct")
    assert direct.copies_weights is False
    for layout in LAYOUTS.values():
        layer.to(memory_format=layout)
        weight, *_ = direct.pack(backends.Layer.of(layer.conv.weight, None, None), request)
        assert weight.data_ptr() == layer.conv.weight.data_ptr()
