"""torchvision's factored and mixed networks, against their definition written out with torch's functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r3d_kernels.models import BasicBlock, Bottleneck, ResNet3D, ShortcutA, Stem, create_model
from r3d_kernels.models.resnet import Conv2Plus1D

SMALL = {"depth": 10, "widen_factor": 0.125}


def from_weights(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The logits of a torchvision network of basic blocks, from nothing but the names and shapes of its weights."""

    def conv_bn(conv: str, bn: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = state[f"{conv}.weight"]
        kernel = weight.shape[2:]
        strides = [stride if k > 1 else 1 for k in kernel]  # an axis that is not filtered keeps its size
        y = F.conv3d(x, weight, None, strides, [k // 2 for k in kernel])
        stats = (state[f"{bn}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(y, *stats)

    def part(name: str, x: Tensor, stride: int) -> Tensor:
        """name.0 is one convolution or two halves, name.1 its batch norm."""
        if f"{name}.0.weight" in state:
            return conv_bn(f"{name}.0", f"{name}.1", x, stride)
        x = conv_bn(f"{name}.0.0", f"{name}.0.1", x, stride).relu()
        return conv_bn(f"{name}.0.3", f"{name}.1", x, stride)

    weight = state["stem.0.weight"]
    stem = [k // 2 for k in weight.shape[2:]]
    stats = [state[f"stem.1.{n}"] for n in ("running_mean", "running_var", "weight", "bias")]
    x = F.batch_norm(F.conv3d(x, weight, None, (1, 2, 2), stem), *stats).relu()
    if "stem.3.weight" in state:
        x = conv_bn("stem.3", "stem.4", x).relu()
    for layer in range(1, 5):
        block = 0
        while any(name.startswith(f"layer{layer}.{block}.") for name in state):
            prefix = f"layer{layer}.{block}"
            stride = 2 if layer > 1 and block == 0 else 1
            y = part(f"{prefix}.conv2", part(f"{prefix}.conv1", x, stride).relu(), 1)
            if f"{prefix}.downsample.0.weight" in state:
                shortcut = x[:, :, :: x.shape[2] // y.shape[2], ::stride, ::stride]
                x = conv_bn(f"{prefix}.downsample.0", f"{prefix}.downsample.1", shortcut)
            x = (x + y).relu()
            block += 1
    return F.linear(x.mean((2, 3, 4)), state["fc.weight"], state["fc.bias"])


@pytest.mark.parametrize("name", ["r3d_18", "r2plus1d_18", "mc3_18"])
def test_is_the_network_that_its_weights_name(name: str) -> None:
    model = create_model(name, num_classes=7, widen_factor=0.25).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    x = torch.randn(2, 3, 8, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), from_weights(model.state_dict(), x), rtol=1e-9, atol=1e-9)


def test_names_and_shapes_are_those_of_torchvision() -> None:
    state = create_model("r2plus1d_18", device="meta").state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert shapes["stem.0.weight"] == (45, 3, 1, 7, 7)
    assert shapes["stem.3.weight"] == (64, 45, 3, 1, 1)
    assert shapes["stem.4.running_var"] == (64,)
    assert shapes["layer1.0.conv1.0.0.weight"] == (144, 64, 1, 3, 3)
    assert shapes["layer1.0.conv1.0.3.weight"] == (64, 144, 3, 1, 1)
    # both convolutions of a block have the first one's channels between the halves
    assert shapes["layer2.0.conv1.0.0.weight"] == (230, 64, 1, 3, 3)
    assert shapes["layer2.0.conv2.0.0.weight"] == (230, 128, 1, 3, 3)
    assert shapes["layer4.1.conv2.0.1.running_mean"] == (1152,)
    assert shapes["layer4.1.conv2.1.running_mean"] == (512,)
    mixed = create_model("mc3_18", device="meta")
    assert mixed.layer1[0].conv1[0].kernel_size == (3, 3, 3)
    assert mixed.layer2[0].conv1[0].kernel_size == (1, 3, 3)
    assert mixed.layer2[0].downsample[0].stride == (1, 2, 2)
    assert len(list(mixed.state_dict())) == len(list(create_model("r3d_18", device="meta").state_dict()))


@pytest.mark.parametrize("convolution", ["2d", "2+1d"])
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_blocks(block: type, convolution: str) -> None:
    out = 6 * block.expansion
    down = ShortcutA(6, out, (1, 2, 2) if convolution == "2d" else 2)
    x = torch.randn(2, 6, 5, 8, 9)
    module = block(6, 6, 2, down, naming="torchvision", convolution=convolution)
    frames = 5 if convolution == "2d" else 3
    assert module(x).shape == (2, out, frames, 4, 5)
    dilated = block(6, 6, naming="torchvision", convolution=convolution, dilation=2)
    if block is BasicBlock:
        assert dilated(x).shape == x.shape


def test_halves_have_their_part_of_the_geometry() -> None:
    both = Conv2Plus1D(3, 8, 5, (3, 5, 7), (2, 3, 4), (1, 2, 3), (1, 2, 1))
    first, last = both[0], both[3]
    assert (first.kernel_size, first.stride, first.padding, first.dilation) == (
        (1, 5, 7),
        (1, 3, 4),
        (0, 2, 3),
        (1, 2, 1),
    )
    assert (last.kernel_size, last.stride, last.padding, last.dilation) == (
        (3, 1, 1),
        (2, 1, 1),
        (1, 0, 0),
        (1, 1, 1),
    )
    x = torch.randn(1, 3, 9, 20, 30)
    assert both(x).shape == nn.Conv3d(3, 8, (3, 5, 7), (2, 3, 4), (1, 2, 3), (1, 2, 1))(x).shape


def test_a_clip_that_is_too_small_is_told_before_any_layer_runs() -> None:
    model = ResNet3D(2, stem="torchvision", convolutions="2d", **SMALL).eval()
    assert model(torch.zeros(1, 3, 1, 8, 8)).shape == (1, 2)
    with pytest.raises(ValueError, match="expected D, H, W"):
        ResNet3D(2, stem=Stem((3, 7, 7), 1, 0, naming="torchvision"), **SMALL)(torch.zeros(1, 3, 2, 9, 9))


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        (
            {"convolutions": "4d"},
            r"convolutions: expected one of '3d', '2d', '2\+1d', or four of them, got '4d'",
        ),
        ({"convolutions": ("3d", "2d")}, "convolutions: .* or four of them"),
        ({"convolutions": 3}, "convolutions: .* got 3"),
        ({"stem": "hara", "convolutions": "2+1d"}, "needs a stem with torchvision's names"),
        ({"stem": Stem((3, 7, 7), 1, naming="torchvision"), "convolutions": ["3d", "3d", "3d", 2]}, "got"),
    ],
)
def test_wrong_arguments(kwargs: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ResNet3D(2, **{**SMALL, **kwargs})


def test_wrong_stems_and_blocks() -> None:
    with pytest.raises(ValueError, match=r"stem\.midplanes: expected None with naming='hara', got 45"):
        Stem((3, 7, 7), 1, midplanes=45)
    with pytest.raises(ValueError, match=r"stem\.midplanes: expected at least 1, got 0"):
        Stem((3, 7, 7), 1, naming="torchvision", midplanes=0)
    with pytest.raises(ValueError, match=r"convolution: '2\+1d' needs torchvision's names"):
        BasicBlock(4, 4, convolution="2+1d")
    with pytest.raises(ValueError, match="convolution: expected one of"):
        BasicBlock(4, 4, convolution="1d")
