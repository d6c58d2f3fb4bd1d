"""The networks against plain torch models written here, published counts, and their contract."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from r3d_kernels.models import (
    DEPTHS,
    STEMS,
    BasicBlock,
    Bottleneck,
    Pool,
    ResNet,
    ResNet3D,
    ShortcutA,
    Stem,
    conv3x3x3,
)

COUNTS = {
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
STEM_NAMES = ("hara", "seed18", "torchvision")


# --- an independent network of plain torch modules --------------------------------------------------------


def conv_bn(cin, cout, kernel, stride=1, padding=0, *tail):
    return nn.Sequential(
        nn.Conv3d(cin, cout, kernel, stride, padding, bias=False), nn.BatchNorm3d(cout), *tail
    )


class PlainBlock(nn.Module):
    """Sequential(conv, bn) pairs, whatever the names in the end are."""

    def __init__(self, cin, planes, stride, bottleneck, shortcut):
        super().__init__()
        cout = planes * 4 if bottleneck else planes
        if bottleneck:
            self.conv1 = conv_bn(cin, planes, 1)
            self.conv2 = conv_bn(planes, planes, 3, stride, 1)
            self.conv3 = conv_bn(planes, cout, 1)
        else:
            self.conv1 = conv_bn(cin, planes, 3, stride, 1)
            self.conv2 = conv_bn(planes, planes, 3, 1, 1)
        self.change = stride != 1 or cin != cout
        self.stride, self.added, self.shortcut = stride, cout - cin, shortcut
        if self.change and shortcut == "B":
            self.downsample = conv_bn(cin, cout, 1, stride)

    def forward(self, x):
        convs = [getattr(self, n) for n in ("conv1", "conv2", "conv3") if hasattr(self, n)]
        y = x
        for conv in convs[:-1]:
            y = torch.relu(conv(y))
        y = convs[-1](y)
        if self.change and self.shortcut == "B":
            x = self.downsample(x)
        elif self.change:
            x = F.avg_pool3d(x, 1, self.stride)
            x = torch.cat([x, x.new_zeros(x.shape[0], self.added, *x.shape[2:])], 1)
        return torch.relu(y + x)


class PlainNet(nn.Module):
    def __init__(self, depth, stem, shortcut="B", classes=7, channels=3):
        super().__init__()
        bottleneck = depth >= 50
        if stem == "torchvision":
            self.stem = conv_bn(channels, 64, (3, 7, 7), (1, 2, 2), (1, 3, 3), nn.ReLU())
            self.pool = nn.Identity()
        elif stem == "hara":
            self.stem = conv_bn(channels, 64, 7, (1, 2, 2), 3, nn.ReLU())
            self.pool = nn.MaxPool3d(3, 2, 1)
        else:
            self.stem = conv_bn(channels, 64, 7, 2, 3, nn.ReLU())
            self.pool = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
        cin = 64
        for i, count in enumerate(COUNTS[depth]):
            blocks = []
            for j in range(count):
                stride = 2 if i and not j else 1
                blocks.append(PlainBlock(cin, 64 << i, stride, bottleneck, shortcut))
                cin = (64 << i) * (4 if bottleneck else 1)
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(cin, classes)

    def forward(self, x):
        x = self.pool(self.stem(x))
        for i in range(4):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.fc(x.mean((2, 3, 4)))


def hara_names(state):
    """torchvision's names to Hara's."""
    out = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[0] == "stem":
            parts = ["conv1" if parts[1] == "0" else "bn1", *parts[2:]]
        elif len(parts) > 3 and parts[2].startswith("conv"):
            parts[2:4] = [parts[2] if parts[3] == "0" else parts[2].replace("conv", "bn")]
        out[".".join(parts)] = value
    return out


def randomise(model, seed=0):
    """Batch norms with statistics of their own, so that a wrong pairing shows."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            n = module.num_features
            for tensor, low in ((module.weight, 0.5), (module.running_var, 0.5)):
                tensor.data.copy_(torch.rand(n, generator=generator) + low)
            for tensor in (module.bias, module.running_mean):
                tensor.data.copy_(torch.randn(n, generator=generator) * 0.1)
    return model


def clip(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative_error(value, oracle):
    return ((value.double() - oracle).norm() / oracle.norm()).item()


@pytest.mark.parametrize(
    ("depth", "stem", "shortcut"),
    [
        (10, "hara", "B"),
        (10, "seed18", "A"),
        (18, "torchvision", "B"),
        (18, "hara", "A"),
        (50, "seed18", "B"),
        (50, "torchvision", "A"),
    ],
)
def test_same_names_and_logits_as_a_plain_model(depth, stem, shortcut):
    plain = randomise(PlainNet(depth, stem, shortcut)).eval()
    state = plain.state_dict() if stem == "torchvision" else hara_names(plain.state_dict())
    model = ResNet3D(7, depth=depth, stem=stem, shortcut_type=shortcut).eval()
    assert list(model.state_dict()) == list(state)
    model.load_state_dict(state, strict=True)
    x = clip(1, 3, 5, 24, 30)
    with torch.no_grad():
        oracle = plain.double()(x.double())
        assert relative_error(copy.deepcopy(model).double()(x.double()), oracle) < 1e-12
        for fused in (False, True):
            model.fused = fused
            assert relative_error(model(x), oracle) < 1e-5


def test_the_state_dict_loads_strictly_in_a_plain_model():
    model = ResNet3D(7, depth=18, stem="torchvision", fused=True)
    PlainNet(18, "torchvision").load_state_dict(model.state_dict(), strict=True)


# --- parameter counts -------------------------------------------------------------------------------------


def expected_parameters(depth, stem, shortcut, classes, channels):
    """Counted from the layer table alone."""
    kernel = 3 * 49 if stem == "torchvision" else 343
    total = channels * 64 * kernel + 2 * 64
    cin = 64
    for i, count in enumerate(COUNTS[depth]):
        p = 64 << i
        out = 4 * p if depth >= 50 else p
        for j in range(count):
            if depth >= 50:
                total += cin * p + 27 * p * p + p * out + 2 * (2 * p + out)
            else:
                total += 27 * cin * p + 27 * p * p + 4 * p
            if shortcut == "B" and j == 0 and (i or cin != out):
                total += cin * out + 2 * out
            cin = out
    return total + cin * classes + classes


@pytest.mark.parametrize("depth", COUNTS)
@pytest.mark.parametrize(("stem", "shortcut"), [(s, "B") for s in STEM_NAMES] + [("hara", "A")])
def test_parameter_count_and_shapes_of_every_depth(depth, stem, shortcut):
    model = ResNet3D(11, depth=depth, stem=stem, shortcut_type=shortcut, in_channels=2, device="meta").eval()
    total = sum(p.numel() for p in model.parameters())
    assert total == expected_parameters(depth, stem, shortcut, 11, 2)
    with torch.no_grad():
        assert model(torch.empty(2, 2, 16, 112, 112, device="meta")).shape == (2, 11)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("kwargs", "count"),
    [
        # torchvision publishes this figure for its weights.
        ({"num_classes": 400, "depth": 18, "stem": "torchvision"}, 33_371_472),
        # Hara's stem has 64 * 3 * 7 * 49 weights instead of 64 * 3 * 3 * 49.
        ({"num_classes": 400, "depth": 18, "stem": "hara"}, 33_371_472 + 64 * 3 * 4 * 49),
    ],
)
def test_published_parameter_counts(kwargs, count):
    model = ResNet3D(**kwargs, device="meta")
    assert sum(p.numel() for p in model.parameters()) == count


def test_the_depth_table():
    assert {depth: layers for depth, (_, layers) in DEPTHS.items()} == COUNTS


# --- shortcut A -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("added", [0, 3])
def test_shortcut_a_is_average_pool_and_zeros(stride, added):
    x = clip(2, 3, 4, 5, 7, dtype=torch.float64)
    y = ShortcutA(3, 3 + added, stride)(x)
    oracle = F.avg_pool3d(x, 1, stride)
    assert torch.equal(y[:, :3], oracle)
    assert not y[:, 3:].any()
    assert y.shape[1] == 3 + added


def test_shortcut_a_has_a_gradient():
    x = clip(2, 3, 3, 4, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(ShortcutA(3, 5, 2), (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stride", [1, 2])
def test_shortcut_a_keeps_dtype_and_memory_format(dtype, stride):
    x = clip(2, 4, 4, 6, 6, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
    y = ShortcutA(4, 8, stride)(x)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(y[:, :4], x[:, :, ::stride, ::stride, ::stride])


def test_shortcut_a_trains_the_layers_below_it():
    model = ResNet3D(3, depth=10, shortcut_type="A")
    assert not any("downsample" in name for name in model.state_dict())
    # With the residual branches at zero the only way down is through the shortcuts.
    for layer in (model.layer2, model.layer3, model.layer4):
        for block in layer:
            nn.init.zeros_(block.bn2.weight)
    model(clip(2, 3, 4, 32, 32)).sum().backward()
    assert model.conv1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_other_dtypes(dtype, shortcut):
    model = ResNet3D(5, depth=10, stem="hara", shortcut_type=shortcut, dtype=dtype).eval()
    with torch.no_grad():
        y = model(clip(1, 3, 4, 24, 24, dtype=dtype))
    assert y.dtype == dtype
    assert y.isfinite().all()


def test_shortcut_a_cannot_drop_channels():
    with pytest.raises(ValueError, match=r"shortcut_type: 'A' cannot go from 128 to 64"):
        ResNet3D(stem=Stem(3, 2, channels=128), shortcut_type="A", device="meta")


# --- blocks, initialisation, stems ------------------------------------------------------------------------


def test_conv3x3x3_and_the_blocks_of_2018():
    conv = conv3x3x3(4, 6, 2)
    assert (conv.kernel_size, conv.stride, conv.padding) == ((3,) * 3, (2,) * 3, (1,) * 3)
    assert conv.bias is None
    assert (BasicBlock.expansion, Bottleneck.expansion) == (1, 4)
    x = clip(1, 8, 3, 6, 6)
    for block, out in ((BasicBlock, 8), (Bottleneck, 32)):
        down = nn.Sequential(nn.Conv3d(8, out, 1, 2, bias=False), nn.BatchNorm3d(out))
        y = block(8, 8, 2, down)(x)
        assert y.shape == (1, out, 2, 3, 3)
    # 2018 code passes a function for shortcut A.
    y = BasicBlock(8, 8, stride=2, downsample=lambda t: F.avg_pool3d(t, 1, 2))(x)
    assert y.shape == (1, 8, 2, 3, 3)


def test_the_bottleneck_has_its_stride_in_the_middle():
    for naming in ("hara", "torchvision"):
        block = Bottleneck(8, 4, 2, naming=naming)
        assert [block.pair(i)[0].stride[0] for i in (1, 2, 3)] == [1, 2, 1]


def test_initialisation():
    torch.manual_seed(0)
    model = ResNet3D(10, stem="torchvision", depth=10, zero_init_residual=True)
    weight = model.layer4[0].conv2[0].weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (512 * 27)), rel=0.01)
    assert model.fc.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert not model.fc.bias.any()
    assert not model.layer3[0].conv2[1].weight.any()
    assert (model.stem[1].weight == 1).all()
    assert not model.stem[1].bias.any()


@pytest.mark.parametrize("name", STEM_NAMES)
def test_a_stem_can_be_named_described_or_a_dict(name):
    stem = STEMS[name]
    fields = {"kernel": list(stem.kernel), "stride": list(stem.stride), "naming": stem.naming}
    if stem.pool is not None:
        fields["pool"] = {
            "kernel": stem.pool.kernel,
            "stride": stem.pool.stride,
            "padding": stem.pool.padding,
        }
    models = [ResNet3D(2, depth=10, stem=s, device="meta") for s in (name, stem, fields)]
    assert len({str(m) for m in models}) == 1
    assert len({str(m.geometry) for m in models}) == 1


def test_a_stem_of_the_users_own():
    stem = Stem((5, 3, 3), (1, 2, 1), pool=Pool((1, 2, 2), 2), channels=24)
    model = ResNet3D(3, depth=10, stem=stem, in_channels=7)
    assert model.conv1.weight.shape == (24, 7, 5, 3, 3)
    assert model.conv1.padding == (2, 1, 1)
    assert model(clip(2, 7, 4, 16, 16)).shape == (2, 3)


def test_widen_factor_strides_and_dilations():
    model = ResNet3D(
        0,
        depth=10,
        stem=Stem(7, 2, pool=Pool(3, 2, 1)),
        in_channels=1,
        widen_factor=0.25,
        layer_strides=(1, 2, 1, 1),
        layer_dilations=(1, 1, 2, 4),
    )
    assert model.layer4[0].conv2.dilation == model.layer4[0].conv2.padding == (4, 4, 4)
    assert model.conv1.out_channels == 16
    assert model.forward_features(clip(1, 1, 16, 32, 32)).shape == (1, 128, 2, 4, 4)


# --- forward ----------------------------------------------------------------------------------------------


def test_features_by_stage():
    model = ResNet3D(4, depth=10, stem="hara").eval()
    x = clip(1, 3, 8, 32, 48)
    with torch.no_grad():
        stages = model.features(x)
        assert {k: tuple(v.shape[1:]) for k, v in stages.items()} == {
            "stem": (64, 4, 8, 12),
            "layer1": (64, 4, 8, 12),
            "layer2": (128, 2, 4, 6),
            "layer3": (256, 1, 2, 3),
            "layer4": (512, 1, 1, 2),
        }
        assert list(stages) == ["stem", "layer1", "layer2", "layer3", "layer4"]
        assert torch.equal(stages["layer4"], model.forward_features(x))
        assert torch.equal(model.forward_head(stages["layer4"]), model(x))


@pytest.mark.parametrize("fused", [False, True])
def test_no_classes_gives_pooled_features(fused):
    model = ResNet3D(0, depth=10, fused=fused).eval()
    x = clip(2, 3, 4, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.forward_features(x).mean((2, 3, 4)))


@pytest.mark.parametrize("fused", [False, True])
def test_an_empty_batch(fused):
    model = ResNet3D(4, depth=10, stem="torchvision", shortcut_type="A", fused=fused).eval()
    with torch.no_grad():
        assert model(torch.empty(0, 3, 4, 16, 16)).shape == (0, 4)


def test_a_head_of_the_users_own():
    model = ResNet3D(4, depth=10).eval()
    model.fc = nn.Sequential(nn.Dropout(0.5), nn.Linear(512, 9))
    assert model(clip(1, 3, 4, 32, 32)).shape == (1, 9)


def test_training_step_and_a_non_contiguous_clip():
    model = ResNet3D(4, depth=10, stem="torchvision", fused=True)
    x = clip(2, 4, 16, 16, 3).permute(0, 4, 1, 2, 3)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.stem[1].num_batches_tracked == 1


def test_autocast_takes_any_floating_clip():
    model = ResNet3D(4, depth=10, stem="torchvision").eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(clip(1, 3, 4, 16, 16, dtype=torch.bfloat16)).shape == (1, 4)


@pytest.mark.parametrize("stem", ["hara", "torchvision"])
def test_fused_can_be_flipped_and_survives_copies(stem):
    model = randomise(ResNet3D(4, depth=10, stem=stem)).eval()
    x = clip(1, 3, 4, 24, 24)
    model.fused = True
    assert all(m.fused for m in model.modules() if isinstance(m, BasicBlock))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ]
    with torch.no_grad():
        oracle = copy.deepcopy(model).double()(x.double())
        for other in copies:
            assert other.fused
            assert all(m.fused for m in other.modules() if isinstance(m, BasicBlock))
            assert relative_error(other(x), oracle) < 1e-5
            other.fused = False
            assert not any(m.fused for m in other.modules() if isinstance(m, BasicBlock))
            assert relative_error(other(x), oracle) < 1e-5
            assert "r3d_kernels" in other.state_dict()._metadata[""]
    assert model.fused


@pytest.mark.parametrize(("training", "fused"), [(False, True), (False, False), (True, True)])
def test_the_clip_becomes_channels_last_where_it_runs_fused(training, fused):
    model = ResNet3D(4, depth=10, stem="torchvision", fused=fused).train(training)
    seen = {}
    model.layer1.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    with torch.no_grad():
        model(clip(2, 3, 4, 16, 16))
    expected = fused and not training
    assert seen["x"].is_contiguous(memory_format=torch.channels_last_3d) == expected


def test_export():
    model = ResNet3D(4, depth=10, stem="torchvision", shortcut_type="A").eval()
    x = clip(1, 3, 4, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


# --- the 2018 network -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "duration", "kernel"),
    [
        (112, 16, (1, 4, 4)),
        (32, 16, (1, 1, 1)),
        (33, 17, (2, 2, 2)),
        (64, 40, (3, 2, 2)),
        (224, 64, (4, 7, 7)),
    ],
)
def test_the_pool_of_2018_follows_size_and_duration(size, duration, kernel):
    model = ResNet(BasicBlock, [1, 1, 1, 1], size, duration, num_classes=5).to("meta").eval()
    assert model.avgpool.kernel_size == kernel
    x = torch.empty(1, 3, duration, size, size, device="meta")
    assert model.forward_features(x).shape[2:] == kernel
    assert model(x).shape == (1, 5)


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_the_network_of_2018_is_the_hara_network(shortcut):
    old = ResNet(BasicBlock, [1, 1, 1, 1], 48, 18, shortcut, 6, fused=True).eval()
    new = ResNet3D(6, depth=10, stem="hara", shortcut_type=shortcut).eval()
    new.load_state_dict(randomise(old).state_dict(), strict=True)
    x = clip(1, 3, 18, 48, 48)
    with torch.no_grad():
        assert relative_error(old(x), new.double()(x.double())) < 1e-5


def test_the_defaults_of_2018():
    model = ResNet(Bottleneck, [1, 1, 1, 1], 32, 16)
    assert model.fc.out_features == 8
    assert model.layer2[0].downsample is not None
    assert not model.fused


def test_clips_of_another_size_for_the_network_of_2018():
    model = ResNet(BasicBlock, [1, 1, 1, 1], 32, 16, num_classes=4).eval()
    with pytest.raises(ValueError, match=r"x: expected clips of 16 x 32 x 32 .* got \(16, 64, 64\)"):
        model(torch.zeros(1, 3, 16, 64, 64))
    # The pool leaves several voxels, and a head for them does exist.
    model.fc = nn.Linear(512 * 4, 4)
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 4, 64, 64)).shape == (1, 4)
        assert model.bfloat16()(torch.zeros(1, 3, 4, 64, 64).bfloat16()).dtype == torch.bfloat16
    model = ResNet(BasicBlock, [1, 1, 1, 1], 64, 16, num_classes=4).eval()
    with pytest.raises(ValueError, match="average pool"):
        model(torch.zeros(1, 3, 16, 32, 32))
    model.avgpool = nn.AdaptiveAvgPool3d(1)
    assert model(torch.zeros(1, 3, 4, 32, 32)).shape == (1, 4)


class OwnBlock(nn.Module):
    expansion = 2

    def __init__(self, inplanes, planes, stride=1, downsample=None):
        super().__init__()
        self.conv = nn.Conv3d(inplanes, planes * 2, 1, stride)
        self.downsample = downsample

    def forward(self, x):
        return self.conv(x) + (x if self.downsample is None else self.downsample(x))


def test_the_network_of_2018_takes_a_block_of_the_users_own():
    model = ResNet(OwnBlock, [1, 1, 1, 1], 32, 16, "A", 3, fused=True)
    assert model(clip(2, 3, 4, 32, 32)).shape == (2, 3)


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"depth": 20}, ValueError, r"depth: expected one of 10, 18, .* got 20"),
        (
            {"stem": "resnet"},
            ValueError,
            r"stem: expected one of 'hara', 'seed18', 'torchvision', 'r2plus1d', got 'resnet'",
        ),
        ({"stem": 7}, TypeError, r"stem: expected a name"),
        ({"stem": {"kernel": 3}}, TypeError, r"stem: expected the fields of Stem, got \{'kernel': 3\}"),
        ({"stem": {"kernel": 3, "stride": 0}}, ValueError, r"stem.stride: expected at least 1, got 0"),
        ({"stem": {"kernel": "3", "stride": 1}}, TypeError, r"stem.kernel: expected an integer or 3"),
        ({"stem": {"kernel": (3, 3), "stride": 1}}, ValueError, r"stem.kernel: .* got \(3, 3\)"),
        ({"stem": {"kernel": 3, "stride": 1, "padding": -1}}, ValueError, r"stem.padding: .* got -1"),
        ({"stem": {"kernel": 3, "stride": 1, "naming": "x"}}, ValueError, r"stem.naming: expected one of"),
        ({"stem": {"kernel": 3, "stride": 1, "pool": 3}}, TypeError, r"stem.pool: expected a Pool"),
        ({"stem": {"kernel": 3, "stride": 1, "pool": {"kernel": 2}}}, TypeError, r"stem.pool: expected the"),
        (
            {"stem": {"kernel": 3, "stride": 1, "pool": {"kernel": 2, "stride": 1, "padding": 2}}},
            ValueError,
            r"pool.padding: expected at most half",
        ),
        ({"shortcut_type": "C"}, ValueError, r"shortcut_type: expected one of 'A', 'B', got 'C'"),
        ({"num_classes": -1}, ValueError, r"num_classes: expected at least 0, got -1"),
        ({"num_classes": 2.5}, TypeError, r"num_classes: expected an integer, got 2.5"),
        ({"in_channels": 0}, ValueError, r"in_channels: expected at least 1, got 0"),
        ({"widen_factor": 0.001}, ValueError, r"widen_factor: expected to leave"),
        ({"widen_factor": "2"}, TypeError, r"widen_factor: expected a number"),
        ({"layer_strides": (1, 2)}, ValueError, r"layer_strides: .* got \(1, 2\)"),
        ({"layer_dilations": (1, 1, 0, 1)}, ValueError, r"layer_dilations: expected at least 1, got 0"),
    ],
)
def test_bad_arguments(kwargs, error, match):
    with pytest.raises(error, match=match):
        ResNet3D(**kwargs, device="meta")


@pytest.mark.parametrize(
    ("args", "error", "match"),
    [
        ((nn.Conv3d, [1] * 4, 32, 16), TypeError, r"block: expected BasicBlock"),
        ((BasicBlock, [1] * 3, 32, 16), ValueError, r"layers: "),
        ((BasicBlock, [1] * 4, 0, 16), ValueError, r"sample_size: expected at least 1, got 0"),
        ((BasicBlock, [1] * 4, 32, 1.5), TypeError, r"sample_duration: expected an integer"),
    ],
)
def test_bad_arguments_of_2018(args, error, match):
    with pytest.raises(error, match=match):
        ResNet(*args)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        ([1], TypeError, r"x: expected a torch.Tensor, got list"),
        (torch.zeros(3, 4, 16, 16), ValueError, r"x: expected 5 dimensions .* got shape \(3, 4, 16, 16\)"),
        (torch.zeros(1, 4, 3, 16, 16), ValueError, r"x: expected 3 channels .* got 4"),
        (torch.zeros(1, 3, 0, 16, 16), ValueError, r"stem's kernel \(3, 7, 7\), got \(0, 16, 16\)"),
        (torch.zeros(1, 3, 4, 16, 16, dtype=torch.float64), TypeError, r"x: expected torch.float32.*float64"),
        (
            torch.zeros(1, 3, 4, 16, 16, dtype=torch.int8),
            TypeError,
            r"x: expected torch.float32.*got torch.int8",
        ),
        (torch.zeros(1, 3, 4, 16, 16, device="meta"), ValueError, r"x: expected device cpu"),
    ],
)
def test_bad_clips(x, error, match, fused):
    model = ResNet3D(2, depth=10, stem="torchvision", fused=fused).eval()
    model.stem[0].register_forward_pre_hook(lambda *_: pytest.fail("a layer ran"))
    with pytest.raises(error, match=match):
        model(x)


def test_clips_too_small_for_an_unpadded_stem():
    stem = {"kernel": 3, "stride": 1, "padding": 0, "pool": {"kernel": 4, "stride": 1}}
    model = ResNet3D(2, depth=10, stem=stem, device="meta").eval()
    for size, match in ((2, r"stem's kernel \(3, 3, 3\), got \(2, 8, 8\)"), (5, r"stem's max-pool")):
        with pytest.raises(ValueError, match=match):
            model(torch.zeros(1, 3, size, 8, 8, device="meta"))
    assert model(torch.zeros(1, 3, 6, 8, 8, device="meta")).shape == (1, 2)


def test_autocast_does_not_take_integers():
    model = ResNet3D(2, depth=10, stem="torchvision").eval()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="int32"):
        model(torch.zeros(1, 3, 4, 16, 16, dtype=torch.int32))
