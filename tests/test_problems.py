"""The problem generator: text, geometry, cost, data, and what it reads off a network."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from strategies import problem_strategy
from torch import nn

from r3d_kernels import problems
from r3d_kernels.problems import LAYERS, ConvProblem, network_problems, unique

BASE = ConvProblem(2, 64, 16, 56, 56, 64, kernel=(3, 3, 3), padding=(1, 1, 1), activation=None)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "n2c64d16h56w56k64f3s1p1"),
        ({"activation": "relu"}, "n2c64d16h56w56k64f3s1p1+relu"),
        ({"residual": True}, "n2c64d16h56w56k64f3s1p1+res"),
        ({"residual": True, "activation": "relu"}, "n2c64d16h56w56k64f3s1p1+res+relu"),
        ({"groups": 4, "dilation": (2, 2, 2)}, "n2c64d16h56w56k64f3s1p1l2g4"),
        (
            {"kernel": (3, 7, 7), "stride": (1, 2, 2), "padding": (1, 3, 3), "dilation": (1, 2, 1)},
            "n2c64d16h56w56k64f3x7x7s1x2x2p1x3x3l1x2x1",
        ),
    ],
)
def test_text(changes: dict, text: str) -> None:
    problem = dataclasses.replace(BASE, **changes)
    assert str(problem) == text
    assert ConvProblem.parse(text) == problem


def test_missing_tokens_take_the_defaults() -> None:
    assert ConvProblem.parse("n1c2d3h4w5k6f1") == ConvProblem.parse("n1c2d3h4w5k6f1s1p0l1g1")
    assert ConvProblem.parse(" k6f1n1c2w5h4d3 ") == ConvProblem.parse("n1c2d3h4w5k6f1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n2c64d16h56w56k64s1p1", "missing token 'f'"),
        ("", "missing token 'n'"),
        ("n2c64d16h56w56k64f3s1p1z9", "unknown token 'z9'"),
        ("n2c64d16h56w56k64f3s1p1p2", "token 'p2' repeats 'p'"),
        ("n2c64d16h56w56k64f3x3s1p1", "token 'f3x3' takes one number or three"),
        ("n2x2c64d16h56w56k64f3s1p1", "token 'n2x2' takes one number"),
        ("n2c64d16h56w56k64f3s1p-1", "cannot read 'p-1'"),
        ("n2c64d16h56w56k64f3s1p1 ,", "cannot read ' ,'"),
        ("n2c64d16h56w56k64f3s1p1+gelu", "unknown token '+gelu'"),
        ("n2c64d16h56w56k64f3s1p1+", "unknown token '+'"),
        ("n2c64d16h56w56k64f3s1p1+relu+relu", "token '+relu' is repeated"),
        ("n2c64d16h56w56k64f3s0p1", "stride must be at least 1"),
        ("n2c64d16h56w56k64f0s1p1", "kernel must be at least 1"),
        ("n2c64d16h56w56k64f3s1p1l0", "dilation must be at least 1"),
        ("n2c0d16h56w56k64f3s1p1", "c must be at least 1"),
        ("n2c64d16h56w56k64f3s1p1g0", "groups must be at least 1"),
        ("n2c64d16h56w56k64f3s1p1g3", "groups=3 does not divide c=64"),
        ("n2c64d16h56w56k65f3s1p1g2", "groups=2 does not divide k=65"),
        ("n2c64d4h56w56k64f7s1p1", "the kernel spans 7 along d, the padded input has 6"),
        ("n2c64d4h4w2k64f3s1p0l1x1x2", "the kernel spans 5 along w, the padded input has 2"),
    ],
)
def test_bad_text_names_the_token(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        ConvProblem.parse(text)


def test_bad_fields() -> None:
    with pytest.raises(ValueError, match="kernel: expected one int or three"):
        dataclasses.replace(BASE, kernel=(3, 3))
    with pytest.raises(ValueError, match="n must be at least 0"):
        BASE.with_batch(-1).validate()
    with pytest.raises(ValueError, match="activation must be one of"):
        dataclasses.replace(BASE, activation="gelu").validate()
    assert dataclasses.replace(BASE, kernel=3) == BASE


@given(problem_strategy())
@settings(max_examples=150, deadline=None)
def test_text_round_trip_and_shape(problem: ConvProblem) -> None:
    assert ConvProblem.parse(str(problem)) == problem
    with torch.device("meta"):
        y = F.conv3d(
            torch.empty(problem.in_shape),
            torch.empty(problem.weight_shape),
            None,
            problem.stride,
            problem.padding,
            problem.dilation,
            problem.groups,
        )
    assert tuple(y.shape) == problem.out_shape
    assert problem.n <= 2
    assert problem.macs <= 40_000_000


@given(problem_strategy(max_macs=200_000))
@settings(max_examples=30, deadline=None)
def test_cost_against_counting(problem: ConvProblem) -> None:
    """A convolution of ones by ones counts, at each output, the taps that lie inside."""
    ones = torch.ones((1, 1, *problem.in_shape[2:]), dtype=torch.float64)
    taps = torch.ones((1, 1, *problem.kernel), dtype=torch.float64)
    geometry = (problem.stride, problem.padding, problem.dilation)
    counted = F.conv3d(ones, taps, None, *geometry).sum().item()
    assert problem.macs_inside == counted * problem.n * problem.k * problem.c // problem.groups
    assert problem.macs_inside <= problem.macs == problem.flops // 2
    # The gradient of a sum is non-zero exactly where an input is read.
    x = ones.requires_grad_()
    F.conv3d(x, taps, None, *geometry).sum().backward()
    read = int((x.grad != 0).sum()) * problem.n * problem.c
    outputs = math.prod(problem.out_shape) * (2 if problem.residual else 1)
    expected = 4 * (read + math.prod(problem.weight_shape) + outputs) + 8 * problem.k
    assert problem.bytes(torch.float32) == expected
    assert problem.bytes(torch.bfloat16) == expected // 2 + 4 * problem.k


def test_tensors() -> None:
    problem = ConvProblem.parse("n2c16d5h9w9k24f3s1p1+res+relu")
    t = problem.tensors(seed=3)
    assert t.x.shape == problem.in_shape
    assert t.weight.shape == problem.weight_shape
    assert t.residual is not None
    assert t.residual.shape == problem.out_shape
    for tensor in (t.x, t.weight, t.residual):
        assert tensor.is_contiguous(memory_format=torch.channels_last_3d)
    assert t.x.min() == 0
    assert problem.tensors(relu_like=False).x.min() < 0
    for tensor in (t.gamma, t.beta, t.running_mean, t.running_var):
        assert tensor.shape == (24,)
        assert tensor.std() > 0.1
    assert t.running_var.min() > 0
    assert (t.gamma < 0).any()
    assert torch.equal(problem.tensors(seed=3).x, t.x)
    assert not torch.equal(problem.tensors(seed=4).x, t.x)
    half = problem.tensors(torch.bfloat16, seed=3)
    assert half.x.dtype == half.weight.dtype == torch.bfloat16
    assert half.gamma.dtype == torch.float32
    assert torch.equal(half.x, t.x.bfloat16())
    assert problem.tensors(torch.float64).gamma.dtype == torch.float64
    assert problem.tensors(torch.bfloat16, param_dtype=torch.bfloat16).gamma.dtype == torch.bfloat16
    assert ConvProblem.parse("n0c3d4h4w4k5f1").tensors().x.shape == (0, 3, 4, 4, 4)
    assert problem.reference(t).dtype == torch.float64


@pytest.mark.parametrize("relu_like", [True, False])
@pytest.mark.parametrize(
    "text", ["n1c64d4h14w14k64f3s1p0", "n1c3d9h32w32k64f7s1x2x2p0+relu", "n1c64d4h14w14k32f1g4+res"]
)
def test_outputs_are_of_order_one(text: str, relu_like: bool) -> None:
    problem = ConvProblem.parse(text)
    t = problem.tensors(relu_like=relu_like)
    conv = F.conv3d(t.x, t.weight, None, problem.stride, 0, 1, problem.groups)
    assert 0.5 < conv.std() < 2
    assert 0.3 < problem.reference(t).std() < 4


@pytest.mark.parametrize(
    ("conv", "text"),
    [
        (nn.Conv3d(4, 6, 3, stride=2, padding=1, groups=2), "n2c4d5h6w7k6f3s2p1g2"),
        (nn.Conv3d(4, 6, (1, 3, 5), dilation=2, padding="same"), "n2c4d5h6w7k6f1x3x5s1p0x2x4l2"),
        (nn.Conv3d(4, 6, 3, padding="valid"), "n2c4d5h6w7k6f3s1p0"),
        # torch pads these before the convolution
        (nn.Conv3d(4, 6, 2, padding="same"), "n2c4d6h7w8k6f2s1p0"),
        (nn.Conv3d(4, 6, 3, padding=1, padding_mode="circular"), "n2c4d7h8w9k6f3s1p0"),
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_from_module(conv: nn.Conv3d, text: str) -> None:
    problem = ConvProblem.from_module(conv, (2, 4, 5, 6, 7))
    assert str(problem) == text
    assert tuple(conv(torch.zeros(2, 4, 5, 6, 7)).shape) == problem.out_shape


def test_from_module_rejects() -> None:
    conv = nn.Conv3d(4, 6, 3)
    with pytest.raises(ValueError, match=r"expected \[N, C, D, H, W\]"):
        ConvProblem.from_module(conv, (4, 5, 6, 7))
    with pytest.raises(ValueError, match="expected 4 channels, got 3"):
        ConvProblem.from_module(conv, (1, 3, 5, 6, 7))


class _Block(nn.Module):
    """A residual block in the spelling of torchvision: in-place ReLU and add, convolved shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(4, 8, 3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm3d(8)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv3d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm3d(8)
        self.downsample = nn.Sequential(nn.Conv3d(4, 8, 1, stride=2), nn.BatchNorm3d(8))
        self.fused = True
        self.seen: list[torch.device] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.fused
        self.seen.append(x.device)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.downsample(x)
        return self.relu(y)


def test_network_problems() -> None:
    block = _Block().train()
    block.register_forward_hook(lambda *_: pytest.fail("the model's own hooks must not run"))
    found = network_problems(nn.Sequential(block, nn.Conv3d(8, 3, 1)), (2, 4, 6, 6, 6))
    assert [(name, str(p)) for name, p in found] == [
        ("0.conv1", "n2c4d6h6w6k8f3s2p1+relu"),
        ("0.conv2", "n2c8d3h3w3k8f3s1p1+res+relu"),
        ("0.downsample.0", "n2c4d6h6w6k8f1s2p0"),
        ("1", "n2c8d3h3w3k3f1s1p0"),
    ]
    assert block.fused
    assert block.training
    assert block.seen == []
    assert all(p.device.type == "cpu" for p in block.parameters())


def test_network_problems_of_a_pre_activation_block() -> None:
    """The batch norm after an add belongs to the next layer: nothing of it is this convolution's epilogue."""

    class Pre(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv3d(4, 4, 1), nn.Conv3d(4, 4, 1)
            self.bn = nn.BatchNorm3d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv1(x) + x
            return self.conv2(F.relu(self.bn(y)))

    found = network_problems(Pre(), (1, 4, 2, 2, 2))
    assert [str(p) for _, p in found] == ["n1c4d2h2w2k4f1s1p0+res", "n1c4d2h2w2k4f1s1p0"]


def test_unique() -> None:
    a, b = ConvProblem.parse("n1c4d2h2w2k4f1"), ConvProblem.parse("n1c4d2h2w2k4f1+relu")
    assert unique([b, ("x", a), a, b, b]) == [(b, 3), (a, 2)]


def test_layers_parse_and_print() -> None:
    for text in LAYERS.values():
        assert str(ConvProblem.parse(text)) == text
    assert {name.split("/")[0] for name in LAYERS} == set(problems.LAYER_NETWORKS)
    assert problems.layers_of("r3d_18")["stem.0"].kernel == (3, 7, 7)
    with pytest.raises(ValueError, match="expected one of r3d_18"):
        problems.layers_of("r3d_19")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("network", problems.LAYER_NETWORKS)
def test_layers_are_those_of_the_networks(network: str, fused: bool) -> None:
    from r3d_kernels.models import create_model

    with torch.device("meta"):  # no time is spent on initial values
        model = create_model(network, fused=fused)
    expected: dict[str, str] = {}
    for name, problem in network_problems(model, problems.LAYER_INPUT):
        if str(problem) not in expected.values():
            expected[name] = str(problem)
    assert {name: str(p) for name, p in problems.layers_of(network).items()} == expected
