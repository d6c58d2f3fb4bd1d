"""Networks by name, and the transforms that belong to them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from r3d_kernels.models import (
    DEPTHS,
    PRESETS,
    BasicBlock,
    ResNet,
    ResNet3D,
    create_model,
    list_models,
    load_checkpoint,
    preset,
)


def test_every_name_builds():
    names = list_models()
    assert len(names) == len(set(names)) == 4 * len(DEPTHS) + 2
    for name in names:
        model = create_model(name, device="meta")
        assert isinstance(model, ResNet3D)
        assert name.endswith(f"_{model.depth}")
        assert preset(model) is preset(name)


def test_list_models_by_pattern():
    assert list_models("*r3d_18") == ["r3d_18", "hara_r3d_18", "seed_r3d_18", "medicalnet_r3d_18"]
    assert list_models("*_18")[-2:] == ["r2plus1d_18", "mc3_18"]
    assert list_models("hara_*") == [f"hara_r3d_{depth}" for depth in DEPTHS]
    assert list_models("nothing") == []


def test_the_families():
    tv = create_model("r3d_18", device="meta")
    assert sum(p.numel() for p in tv.parameters()) == 33_371_472
    assert "stem.0.weight" in tv.state_dict()
    factored = create_model("r2plus1d_18", device="meta")
    assert sum(p.numel() for p in factored.parameters()) == 31_505_325  # as torchvision documents it
    mixed = create_model("mc3_18", device="meta")
    assert sum(p.numel() for p in mixed.parameters()) == 11_695_440
    hara = create_model("hara_r3d_50", fused=True, num_classes=5, in_channels=4, device="meta")
    assert hara.fused
    assert hara.conv1.in_channels == 4
    assert hara.fc.out_features == 5
    assert create_model("seed_r3d_18", device="meta").conv1.stride == (2, 2, 2)
    medical = create_model("medicalnet_r3d_34", device="meta")
    assert medical.shortcut_type == "A"
    assert create_model("medicalnet_r3d_50", device="meta").shortcut_type == "B"
    assert medical.conv1.weight.shape[1] == 1
    assert isinstance(medical.fc, nn.Identity)
    assert medical.layer4[1].conv1.dilation == (4, 4, 4)


def test_overrides():
    model = create_model("r3d_10", stem="seed18", shortcut_type="A", device="meta")
    assert model.conv1.stride == (2, 2, 2)
    with pytest.raises(TypeError, match="colour"):
        create_model("r3d_10", colour="red")


def test_an_unknown_name_gives_the_close_ones():
    with pytest.raises(ValueError, match=r"unknown model 'r3d_19'; did you mean r3d_1"):
        create_model("r3d_19")
    with pytest.raises(ValueError, match=r"unknown model 'vgg'; list_models\(\) has all names"):
        create_model("vgg")
    with pytest.raises(ValueError, match="unknown model 'r3d_19'"):
        preset("r3d_19")


def test_weights_tell_the_number_of_classes(tmp_path):
    source = create_model("hara_r3d_10", num_classes=6, widen_factor=0.125)
    path = tmp_path / "weights.pth"
    torch.save({"arch": "resnet-10", "state_dict": source.state_dict()}, path)

    model = create_model("hara_r3d_10", weights=path, widen_factor=0.125)
    assert model.fc.out_features == 6
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())

    model = create_model("hara_r3d_10", weights=str(path), num_classes=3, widen_factor=0.125)
    assert model.fc.out_features == 3
    assert model.loaded_from.head == "new"
    assert torch.equal(model.conv1.weight, source.conv1.weight)

    model = create_model("hara_r3d_10", weights=source.state_dict(), num_classes=0, widen_factor=0.125)
    assert isinstance(model.fc, nn.Identity)

    with pytest.raises(ValueError, match=r"conv1.weight: expected shape"):
        create_model("hara_r3d_10", weights=path, in_channels=1, widen_factor=0.125)
    with pytest.raises(ValueError, match="lacks"):
        create_model("r3d_10", weights=path, widen_factor=0.125)
    with pytest.raises(FileNotFoundError, match="no such checkpoint file"):
        create_model("r3d_10", weights=tmp_path / "none.pth")


def test_presets():
    tv = preset("r3d_18")
    assert (tv.mean, tv.std) == ((0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989))
    assert (tv.resize, tv.crop_size, tv.frames, tv.antialias) == ((128, 171), 112, 16, False)
    hara = preset("hara_r3d_18")
    assert hara.mean == (0.4345, 0.4051, 0.3775)
    assert hara.resize == 112
    # 2018: values of 0 to 255 less a mean, and no division.
    old = preset("hara2018")
    x = 200.0
    assert (x / 255 - old.mean[0]) / old.std[0] == pytest.approx(x - 114.7748)
    assert all(len(p.mean) == len(p.std) for p in PRESETS.values())


def test_the_preset_of_a_model():
    assert preset(ResNet3D(2, depth=10, stem="torchvision", device="meta")).name == "torchvision"
    assert preset(ResNet3D(2, depth=10, stem="seed18", device="meta")).name == "hara"
    old = ResNet(BasicBlock, [1, 1, 1, 1], 32, 16, num_classes=2)
    assert preset(old).name == "hara2018"
    assert preset(nn.DataParallel(old)).name == "hara2018"
    # A network built from the state dict remembers it.
    assert preset(load_checkpoint(None, old.state_dict())).name == "hara2018"
    with pytest.raises(TypeError, match="model_or_name: expected a network of r3d_kernels"):
        preset(nn.Linear(2, 2))
