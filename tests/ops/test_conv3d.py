"""The fused convolution against float64: every instruction set, dtype and geometry."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_keeps_promise, relative_error
from strategies import problem_strategy

import r3d_kernels as r3d
from r3d_kernels import backends, ops, reference
from r3d_kernels.problems import ConvProblem

ISAS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")
USABLE = ISAS[: ISAS.index(backends.describe()["best_isa"]) + 1]
DTYPES = (torch.float32, torch.bfloat16)


def run(p: ConvProblem, t, **kwargs):
    return ops.conv3d_bn_act(
        t.x,
        t.weight,
        t.running_mean,
        t.running_var,
        t.gamma,
        t.beta,
        t.eps,
        residual=t.residual,
        activation=p.activation,
        stride=p.stride,
        padding=p.padding,
        dilation=p.dilation,
        groups=p.groups,
        **kwargs,
    )


def check(p: ConvProblem, dtype: torch.dtype, **data) -> torch.Tensor:
    t = p.tensors(dtype, **data)
    y = run(p, t)
    assert y.shape == p.out_shape
    assert y.dtype == dtype
    # the stock layers, which a choice may fall on, keep a layout of their own
    assert y.is_contiguous(memory_format=torch.channels_last_3d) or backends.current_backend() != "cpu"
    assert_keeps_promise(y, p.reference(t), p.reference(t, None))
    return y


@pytest.fixture(params=USABLE)
def isa(request, monkeypatch):
    monkeypatch.setenv("R3D_KERNELS_ISA", request.param)
    return request.param


GEOMETRIES = [
    "n1c64d4h7w7k64f3s1p1+res+relu",  # a middle layer
    "n2c3d5h11w9k45f3s1p1+relu",
    "n1c3d8h20w20k64f7s1x2x2p3+relu",  # stems
    "n1c1d8h12w12k16f7s2p3+relu",
    "n1c3d8h20w20k45f1x7x7s1x2x2p0x3x3+relu",  # R(2+1)D: odd channels between the halves
    "n1c45d8h7w7k64f3x1x1p1x0x0+relu",
    "n1c64d4h7w7k230f1x3x3p0x1x1+relu",
    "n1c230d4h5w5k128f3x1x1p1x0x0+res+relu",
    "n1c921d2h3w3k64f3x1x1p1x0x0+relu",
    "n1c7d5h9w9k7f3s2p1",
    "n1c64d4h9w9k128f1s2+res",  # a shortcut
    "n1c256d1h4w4k64f1+relu",
    "n1c512d1h2w2k65f3p1+res+relu",  # most taps fall on padding
    "n2c45d6h9w9k65f3x2x3s1x1x2p2x1x3l2x3x2+res+relu",
    "n1c16d3h5w33k24f3p1x3x5l1x1x4+relu",
    "n1c8d9h3w3k8f3s3p4",  # windows that lie on padding alone
    "n1c200d2h3w3k100f2",  # a row longer than one chunk, no padding
    "n3c17d2h5w5k33f3x3x1p1x1x0",
]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("text", GEOMETRIES)
def test_every_instruction_set(text, dtype, isa) -> None:
    with r3d.backend("cpu"):
        check(ConvProblem.parse(text), dtype)


@given(problem_strategy(groups=False), st.sampled_from(DTYPES), st.integers(0, 3))
def test_any_geometry(problem: ConvProblem, dtype: torch.dtype, seed: int) -> None:
    with r3d.backend("cpu"):
        check(problem, dtype, seed=seed)


@given(problem_strategy(), st.sampled_from([*DTYPES, torch.float16, torch.float64]))
def test_whatever_backend_is_chosen(problem: ConvProblem, dtype: torch.dtype) -> None:
    t = problem.tensors(dtype)
    y = run(problem, t)
    assert y.shape == problem.out_shape
    want = problem.reference(t)
    if dtype == torch.float64:
        assert relative_error(y, want) < 1e-12
    else:
        assert_keeps_promise(y, want, problem.reference(t, None))


@pytest.mark.parametrize(
    "text", ["n1c64d8h14w14k64f3p1+res+relu", "n1c512d1h4w4k512f3p1+relu", "n2c3d8h28w28k64f7s1x2x2p3"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_same_bits_with_any_number_of_threads(text: str, dtype: torch.dtype) -> None:
    p = ConvProblem.parse(text)
    t = p.tensors(dtype)
    packed, results = ops.conv3d_pack(t.weight), []
    geometry = {"out_channels": p.k, "kernel_size": p.kernel, "stride": p.stride, "padding": p.padding}
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results += [ops.conv3d_packed(t.x, packed, t.beta, t.residual, **geometry) for _ in range(2)]
    assert all(torch.equal(results[0], r) for r in results)


@pytest.mark.parametrize("text", ["n1c64d8h14w14k64f3p1+res+relu", "n1c256d4h14w14k256f3p1+relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_unmeasured_choice_and_bits_do_not_depend_on_threads(text: str, dtype: torch.dtype) -> None:
    p = ConvProblem.parse(text)
    t = p.tensors(dtype)
    results = []
    with r3d.backend("cpu"):
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(run(p, t))
    assert all(torch.equal(results[0], r) for r in results)


def _views(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values in other memory layouts."""
    n, c, d, h, w = x.shape
    padded = torch.zeros(n, c + 3, d, h, w + 2, dtype=x.dtype)
    padded[:, 2 : c + 2, :, :, 1 : w + 1] = x
    return {
        "NCDHW": x.contiguous(),
        "slice": padded[:, 2 : c + 2, :, :, 1 : w + 1],
        "transposed": x.transpose(3, 4).contiguous().transpose(3, 4),
        "expanded": x[:1].expand_as(x),
        "strided": x.repeat_interleave(2, 3)[:, :, :, ::2],
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["NCDHW", "slice", "transposed", "expanded", "strided"])
def test_non_contiguous(layout: str, dtype: torch.dtype) -> None:
    p = ConvProblem.parse("n2c7d4h6w5k12f3p1+res+relu")
    t = p.tensors(dtype)
    with r3d.backend("cpu"):
        x = _views(t.x)[layout]
        assert x.shape == t.x.shape
        residual = _views(t.residual)[layout]
        packed = ops.conv3d_pack(t.weight)
        bias = torch.randn(p.k)
        geometry = {"out_channels": p.k, "kernel_size": 3, "padding": 1}
        y = ops.conv3d_packed(x, packed, bias, residual, **geometry)
        plain = ops.conv3d_packed(
            x.contiguous(memory_format=torch.channels_last_3d),
            packed,
            bias,
            residual.contiguous(memory_format=torch.channels_last_3d),
            **geometry,
        )
    assert torch.equal(y, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["auto", "cpu", "torch"])
def test_empty_batch(dtype: torch.dtype, name: str) -> None:
    with r3d.backend(name):
        y = check(ConvProblem.parse("n0c16d4h6w6k32f3p1+res+relu"), dtype)
    assert y.numel() == 0


@pytest.mark.parametrize("isa_name", USABLE)
def test_nan_and_infinity_pass_through(isa_name: str, monkeypatch) -> None:
    monkeypatch.setenv("R3D_KERNELS_ISA", isa_name)
    for dtype in DTYPES:
        x = torch.ones(1, 16, 2, 3, 3, dtype=dtype)
        x[0, 3, 0, 0, 0] = float("nan")
        x[0, 5, 1, 2, 2] = float("inf")
        weight = torch.ones(20, 16, 1, 1, 1, dtype=dtype)
        y = ops.conv3d_packed(x, ops.conv3d_pack(weight), torch.zeros(20), out_channels=20, kernel_size=1)
        assert y[0, :, 0, 0, 0].isnan().all()  # ReLU keeps NaN
        assert (y[0, :, 1, 2, 2] == float("inf")).all()
        assert (y[0, :, 0, 1, 1] == 16).all()


def test_subnormals_survive_bfloat16() -> None:
    tiny = torch.full((1, 1, 1, 1, 1), 2.0**-130, dtype=torch.bfloat16)
    zero = ops.conv3d_pack(torch.zeros(1, 1, 1, 1, 1, dtype=torch.bfloat16))
    y = ops.conv3d_packed(tiny, zero, torch.zeros(1), tiny, out_channels=1, kernel_size=1)
    assert torch.equal(y, tiny)


def test_uses_the_eps_it_is_given() -> None:
    p = ConvProblem.parse("n1c4d2h3w3k4f1")
    for eps in (0.0, 1e-5, 1e-3, 10.0):
        t = p.tensors(eps=eps)
        assert_keeps_promise(run(p, t), p.reference(t))


def test_fold_is_done_in_float64() -> None:
    """A huge mean against a small variance: folding in float32 would lose it."""
    p = ConvProblem.parse("n1c8d2h4w4k8f1")
    t = p.tensors()
    t.running_var.fill_(1e-6)
    t.running_mean.mul_(1e-3)
    with r3d.backend("cpu"):
        y = run(p, t)
    scale = t.gamma.double() / (t.running_var.double() + t.eps).sqrt()
    exact = torch.nn.functional.conv3d(t.x.double(), t.weight.double() * scale.view(-1, 1, 1, 1, 1))
    exact += (t.beta.double() - t.running_mean.double() * scale).view(1, -1, 1, 1, 1)
    assert_keeps_promise(y, exact, float32_limit=1e-6)


def test_without_affine_parameters() -> None:
    p = ConvProblem.parse("n1c4d2h3w3k4f3p1+relu")
    t = p.tensors()
    y = ops.conv3d_bn_act(t.x, t.weight, t.running_mean, t.running_var, None, None, t.eps, padding=1)
    ones = torch.ones(4)
    want = reference.conv3d_bn_act(
        *(v.double() for v in (t.x, t.weight, t.running_mean, t.running_var, ones, 0 * ones)),
        t.eps,
        padding=1,
    )
    assert_keeps_promise(y, want)


# ---- gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["n2c2d3h4w3k3f3s1p1+res+relu", "n1c3d4h4w4k2f2x1x3s2x1x1p0x0x1+relu", "n1c4d2h3w3k4f1g2+res"]
)
def test_gradcheck(text: str) -> None:
    p = ConvProblem.parse(text)
    t = p.tensors(torch.float64, relu_like=False)
    leaves = [v for v in (t.x, t.weight, t.gamma, t.beta, t.residual) if v is not None]
    for leaf in leaves:
        leaf.requires_grad_()

    def f(x, weight, gamma, beta, residual=None):
        return ops.conv3d_bn_act(
            x,
            weight,
            t.running_mean,
            t.running_var,
            gamma,
            beta,
            t.eps,
            residual=residual,
            activation=p.activation,
            stride=p.stride,
            padding=p.padding,
            groups=p.groups,
        )

    assert torch.autograd.gradcheck(f, leaves)


def test_gradient_modes() -> None:
    p = ConvProblem.parse("n1c4d2h3w3k4f3p1+relu")
    t = p.tensors()
    t.weight.requires_grad_()
    assert run(p, t).requires_grad
    with torch.no_grad():
        assert not run(p, t).requires_grad
    with torch.inference_mode():
        assert not run(p, t).requires_grad


# ---- the registered ops ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("residual", [False, True])
def test_opcheck(dtype: torch.dtype, residual: bool) -> None:
    p = ConvProblem.parse("n2c5d4h6w5k9f3x2x3s1x2x1p1x0x1l1x1x2")
    x = torch.randn(p.in_shape, dtype=dtype)
    weight = torch.randn(p.weight_shape, dtype=dtype)
    packed = ops.conv3d_pack(weight)
    bias = torch.randn(p.k)
    r = torch.randn(p.out_shape, dtype=dtype) if residual else None
    ns = torch.ops.r3d_kernels
    torch.library.opcheck(
        ns.conv3d_bias_act, (x, packed, bias, r, p.k, p.kernel, p.stride, p.padding, p.dilation, "relu")
    )
    torch.library.opcheck(ns.conv3d_pack, (weight, torch.rand(p.k, dtype=torch.float64), dtype))


def test_flops_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    p = ConvProblem.parse("n1c4d3h5w5k6f3p1+relu")
    t = p.tensors()
    with FlopCounterMode(display=False) as counter, r3d.backend("cpu"):
        run(p, t)
    assert counter.get_total_flops() == p.flops


# ---- wrong input -----------------------------------------------------------------------------------------


def _valid() -> dict:
    p = ConvProblem.parse("n2c4d3h5w5k6f3p1+relu")
    t = p.tensors()
    return {
        "x": t.x,
        "weight": t.weight,
        "running_mean": t.running_mean,
        "running_var": t.running_var,
        "gamma": t.gamma,
        "beta": t.beta,
        "eps": t.eps,
        "padding": 1,
    }


WRONG = {
    "rank of x": ({"x": torch.zeros(4, 3, 5, 5)}, ValueError, r"x: expected 5 dimensions.*\[4, 3, 5, 5\]"),
    "x is no tensor": ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
    "channels": ({"x": torch.zeros(2, 5, 3, 5, 5)}, ValueError, "x: expected 4 channels.*got 5"),
    "rank of weight": ({"weight": torch.zeros(6, 4, 3, 3)}, ValueError, "weight: expected 5 dimensions"),
    "dtype mix": (
        {"x": torch.zeros(2, 4, 3, 5, 5, dtype=torch.bfloat16)},
        TypeError,
        "weight: expected torch.bfloat16",
    ),
    "device mix": (
        {"running_mean": torch.zeros(6, device="meta")},
        ValueError,
        "running_mean: expected a tensor on cpu",
    ),
    "statistics": (
        {"running_var": torch.zeros(5)},
        ValueError,
        r"running_var: expected shape \[6\], got \[5\]",
    ),
    "statistics dtype": (
        {"gamma": torch.zeros(6, dtype=torch.float64)},
        TypeError,
        "gamma: expected torch.float32",
    ),
    "no statistics": ({"running_mean": None}, TypeError, "running_mean: expected a tensor"),
    "zero stride": ({"stride": 0}, ValueError, r"stride: expected integers >= 1, got \[0, 0, 0\]"),
    "negative stride": (
        {"stride": (1, -2, 1)},
        ValueError,
        r"stride: expected integers >= 1, got \[1, -2, 1\]",
    ),
    "two strides": ({"stride": (1, 2)}, TypeError, r"stride: expected an int or three ints.*\(1, 2\)"),
    "float stride": ({"stride": 1.5}, TypeError, "stride: expected an int or three ints.*1.5"),
    "negative padding": ({"padding": -1}, ValueError, "padding: expected integers >= 0"),
    "zero dilation": ({"dilation": 0}, ValueError, "dilation: expected integers >= 1"),
    "kernel too large": (
        {"x": torch.zeros(2, 4, 3, 1, 5), "padding": 0},
        ValueError,
        "kernel_size: the kernel does not fit",
    ),
    "dilated kernel too large": (
        {"dilation": 4},
        ValueError,
        r"kernel_size: the kernel does not fit.*\[4, 4, 4\]",
    ),
    "groups": (
        {"groups": 3},
        ValueError,
        "groups: expected a divisor of the 4 input and 6 output channels, got 3",
    ),
    "no groups": ({"groups": 0}, ValueError, "groups: expected an integer >= 1, got 0"),
    "residual shape": (
        {"residual": torch.zeros(2, 6, 3, 5, 4)},
        ValueError,
        r"residual: expected the output's shape \[2, 6, 3, 5, 5\]",
    ),
    "residual broadcast": (
        {"residual": torch.zeros(1, 6, 3, 5, 5)},
        ValueError,
        "residual: expected the output's shape",
    ),
    "residual dtype": (
        {"residual": torch.zeros(2, 6, 3, 5, 5).double()},
        TypeError,
        "residual: expected torch.float32",
    ),
    "activation": ({"activation": "gelu"}, ValueError, "activation: expected 'relu' or None, got 'gelu'"),
    "eps": ({"eps": -1.0}, ValueError, "eps: expected a number >= 0, got -1.0"),
    "empty space": ({"x": torch.zeros(2, 4, 0, 5, 5)}, ValueError, "x: only the batch may be empty"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case: str) -> None:
    change, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        ops.conv3d_bn_act(**{**_valid(), **change})


def test_packed_weights_are_checked(monkeypatch) -> None:
    x = torch.randn(1, 4, 3, 5, 5)
    packed = ops.conv3d_pack(torch.randn(6, 4, 3, 3, 3))
    bias = torch.zeros(6)

    def call(x=x, packed=packed, bias=bias, out_channels=6, kernel_size=3):
        return ops.conv3d_packed(
            x, packed, bias, out_channels=out_channels, kernel_size=kernel_size, padding=1
        )

    call()
    for message, arguments in {
        "made for other channels": {"out_channels": 7, "bias": torch.zeros(7)},
        "another kernel size": {"kernel_size": 1},
        "another dtype|other channels": {"x": torch.randn(1, 5, 3, 5, 5)},
        "not made by conv3d_pack": {"packed": torch.zeros_like(packed)},
        "truncated": {"packed": packed[:-4].clone()},
        "too small": {"packed": packed[:8].clone()},
        "expected the contiguous uint8": {"packed": packed.float()},
        r"bias: expected a float32 CPU tensor of shape \[6\]": {"bias": torch.zeros(5)},
        "x: expected float32 or bfloat16, got float64": {"x": x.double()},
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call(**arguments)
    with pytest.raises(RuntimeError, match="scale: expected a float64 CPU tensor"):
        ops.conv3d_pack(torch.randn(6, 4, 3, 3, 3), torch.ones(6))
    monkeypatch.setenv("R3D_KERNELS_ISA", "sse9")
    with pytest.raises(RuntimeError, match="R3D_KERNELS_ISA: expected scalar, avx2"):
        ops.conv3d_pack(torch.randn(6, 4, 3, 3, 3))


def test_packs_of_another_instruction_set_still_run(monkeypatch) -> None:
    """A pack names its instruction set: switching the variable between pack and run is safe."""
    x, weight = torch.randn(1, 20, 3, 5, 5), torch.randn(40, 20, 3, 3, 3) / 23
    want = torch.nn.functional.conv3d(x.double(), weight.double(), padding=1)
    for made, used in itertools.product(USABLE, USABLE):
        monkeypatch.setenv("R3D_KERNELS_ISA", made)
        packed = ops.conv3d_pack(weight)
        monkeypatch.setenv("R3D_KERNELS_ISA", used)
        y = ops.conv3d_packed(
            x, packed, torch.zeros(40), out_channels=40, kernel_size=3, padding=1, activation=None
        )
        assert_keeps_promise(y, want)
