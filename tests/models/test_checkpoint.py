"""Checkpoints in every layout, made here: names, shapes and wrappers are those of the projects."""

from __future__ import annotations

import copy
import os
import pickle
import random
import socket
from collections import Counter, OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from r3d_kernels.models import (
    BasicBlock,
    Pool,
    ResNet,
    ResNet3D,
    Stem,
    load_checkpoint,
    preset,
    read_checkpoint,
)

SMALL = {"depth": 10, "widen_factor": 0.125}


def bare(state):
    """A state dict as another project saves it, without this package's description."""
    return OrderedDict((k, v.clone()) for k, v in state.items())


def network(num_classes=5, seed=0, **kwargs):
    torch.manual_seed(seed)
    model = ResNet3D(num_classes, **{**SMALL, **kwargs}).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, 0, 0.1)
    return model


def logits(model, channels=3, size=(4, 24, 24)):
    x = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.eval()(x)


def saved(tmp_path, content, name="checkpoint.pth"):
    path = tmp_path / name
    torch.save(content, path)
    return path


# --- layouts that load ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_hara_2020(tmp_path, shortcut):
    source = network(stem="hara", shortcut_type=shortcut)
    path = saved(
        tmp_path,
        {
            "epoch": 200,
            "arch": "resnet-10",
            "state_dict": bare(source.state_dict()),
            "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
            "scheduler": {"milestones": Counter({50: 1}), "gamma": 0.1},
        },
    )
    before = path.read_bytes()
    model = load_checkpoint(None, path)
    assert torch.equal(logits(model), logits(source))
    report = model.loaded_from
    assert (report.layout, report.arch, report.num_classes, report.head) == ("hara", "resnet-10", 5, "loaded")
    assert report.missing == report.unexpected == []
    assert report.preset is preset(model) is preset("hara_r3d_18")
    assert "assumed" in report.notes[0]
    assert path.read_bytes() == before


def test_hara_2018(tmp_path):
    source = ResNet(BasicBlock, [1, 1, 1, 1], 32, 16, "A", 6)
    state = bare({f"module.{k}": v for k, v in source.state_dict().items()})
    # torch 0.3 did not count the batches.
    state = OrderedDict((k, v) for k, v in state.items() if not k.endswith("num_batches_tracked"))
    path = saved(tmp_path, {"epoch": 1, "arch": "resnet-10", "state_dict": state})
    model = load_checkpoint(None, path, fused=True)
    assert model.fused
    assert preset(model).name == model.loaded_from.layout == "hara2018"
    torch.testing.assert_close(logits(model, size=(16, 32, 32)), logits(source, size=(16, 32, 32)))
    again = load_checkpoint(ResNet(BasicBlock, [1, 1, 1, 1], 32, 16, "A", 6), path)
    assert torch.equal(again.fc.weight, source.fc.weight)


@pytest.mark.parametrize("depth", [10, 50])
def test_torchvision(tmp_path, depth):
    source = network(stem="torchvision", depth=depth)
    model = load_checkpoint(None, saved(tmp_path, bare(source.state_dict())))
    assert model.loaded_from.layout == preset(model).name == "torchvision"
    assert model.loaded_from.notes == []
    assert torch.equal(logits(model), logits(source))


def test_torchvision_training_wrapper():
    source = network(stem="torchvision")
    model = load_checkpoint(None, {"model": bare(source.state_dict()), "epoch": 3})
    assert torch.equal(logits(model), logits(source))


def monai_state(source):
    """MONAI's downsample convolutions have a bias."""
    state = bare(source.state_dict())
    for name in list(state):
        if name.endswith("downsample.0.weight"):
            state[name.replace("weight", "bias")] = torch.randn(state[name].shape[0])
    return state


def test_monai_with_downsample_bias():
    source = network(stem=Stem(7, 1, pool=Pool(3, 2, 1)), in_channels=1)
    state = monai_state(source)
    kept = copy.deepcopy(state)
    model = load_checkpoint(None, state)
    assert model.loaded_from.layout == "monai"
    assert model.conv1.stride == (1, 1, 1)
    assert any("folded" in note for note in model.loaded_from.notes)

    # The same network with the biases where MONAI has them.
    for block in (layer[0] for layer in (source.layer2, source.layer3, source.layer4)):
        conv = block.downsample[0]
        conv.bias = nn.Parameter(torch.zeros(conv.out_channels))
    source.load_state_dict(state, strict=True)
    torch.testing.assert_close(logits(model, 1), logits(source, 1), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(state[k], kept[k]) for k in kept)

    # A model that has those biases itself gets them as they are.
    loaded = load_checkpoint(copy.deepcopy(source), state)
    assert torch.equal(loaded.layer2[0].downsample[0].bias, state["layer2.0.downsample.0.bias"])
    assert load_checkpoint(None, state, stem="hara").conv1.stride == (1, 2, 2)


@pytest.mark.parametrize("segmentation", [False, True])
def test_medicalnet(tmp_path, segmentation):
    source = ResNet3D(
        0,
        **SMALL,
        stem=Stem(7, 2, pool=Pool(3, 2, 1)),
        in_channels=1,
        shortcut_type="A",
        layer_strides=(1, 2, 1, 1),
        layer_dilations=(1, 1, 2, 4),
    ).eval()
    state = bare({f"module.{k}": v for k, v in source.state_dict().items()})
    if segmentation:
        state["module.conv_seg.0.weight"] = torch.zeros(64, 32, 2, 2, 2)
    path = saved(tmp_path, {"state_dict": state, "epoch": 1})
    model = load_checkpoint(None, path)
    assert model.loaded_from.layout == preset(model).name == "medicalnet"
    assert len(model.loaded_from.notes) == segmentation
    assert model.geometry == source.geometry
    size = (16, 32, 32)
    assert torch.equal(logits(model, 1, size), logits(source, 1, size))

    # With a new head, as for fine-tuning; into a network without the dilations only with a note.
    assert load_checkpoint(None, path, num_classes=3).fc.out_features == 3
    other = network(4, stem="hara", in_channels=1, shortcut_type="A")
    with pytest.raises(ValueError, match=r"its head has no classes, that of the model 4"):
        load_checkpoint(other, path)
    load_checkpoint(other, path, replace_head=True)
    assert other.loaded_from.head == "new"
    assert any("layer_dilations" in note for note in other.loaded_from.notes)


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    source = network(stem="torchvision")
    path = tmp_path / "r3d.safetensors"
    safetensors.save_file(source.state_dict(), path)
    model = load_checkpoint(None, path)
    assert torch.equal(logits(model), logits(source))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"no checkpoint, or a damaged one"):
        load_checkpoint(None, path)


def test_safetensors_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    path = tmp_path / "r3d.safetensors"
    path.write_bytes(b"")
    with pytest.raises(ImportError, match="pip install safetensors"):
        load_checkpoint(None, path)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"stem": "seed18"},
        {"stem": "torchvision", "widen_factor": 0.3},
        {"stem": "torchvision", "convolutions": ("3d", "2d", "2d", "2d")},
        {"stem": "r2plus1d", "convolutions": "2+1d", "widen_factor": 0.3},
        {
            "stem": "torchvision",
            "convolutions": ("2d", "2d", "2+1d", "3d"),
            "depth": 50,
            "shortcut_type": "A",
        },
        {"stem": Stem((3, 3, 3), (1, 2, 1), (0, 1, 1), Pool(2, 2), channels=40), "widen_factor": 0.3},
        {"stem": "hara", "in_channels": 2, "layer_strides": (1, 2, 1, 1), "layer_dilations": (1, 1, 2, 4)},
    ],
)
def test_own_state_dicts_tell_everything(tmp_path, kwargs, prefix):
    source = network(**kwargs)
    state = source.state_dict()
    if prefix:  # as DataParallel and torch.compile save it
        holder = source
        for part in reversed(prefix.rstrip(".").split(".")):
            outer = nn.Module()
            outer.add_module(part, holder)
            holder = outer
        state = holder.state_dict()
    model = load_checkpoint(None, saved(tmp_path, state))
    assert model.loaded_from.layout == "r3d_kernels"
    assert model.geometry == source.geometry
    channels = kwargs.get("in_channels", 3)
    assert torch.equal(logits(model, channels), logits(source, channels))


def test_own_state_dict_of_a_network_with_a_changed_head():
    source = network(stem="seed18")
    source.fc = nn.Linear(source.num_features, 9)
    assert load_checkpoint(None, source.state_dict()).fc.out_features == 9


def test_own_state_dict_into_another_geometry():
    state = network(stem="seed18").state_dict()
    model = network(stem="hara", seed=1)
    with pytest.raises(ValueError, match=r"the weights fit, but belong to another network \(stem_stride"):
        load_checkpoint(model, state)
    load_checkpoint(model, state, strict=False)
    assert torch.equal(model.conv1.weight, state["conv1.weight"])


# --- what loading does ------------------------------------------------------------------------------------


def test_it_returns_the_model_and_leaves_arguments_alone():
    source, model = network(stem="hara"), network(stem="hara", seed=1)
    state = bare(source.state_dict())
    wrapper = {"state_dict": state, "arch": "resnet-10"}
    assert load_checkpoint(model, wrapper) is model
    assert list(wrapper) == ["state_dict", "arch"]
    assert list(state) == list(source.state_dict())
    model.conv1.weight.data.zero_()
    assert state["conv1.weight"].any()
    parallel = nn.DataParallel(network(stem="hara", seed=2))
    assert load_checkpoint(parallel, state) is parallel
    assert torch.equal(parallel.module.fc.weight, source.fc.weight)


def test_the_report_survives_copies():
    model = load_checkpoint(None, network(stem="hara").state_dict())
    assert copy.deepcopy(model).loaded_from == model.loaded_from
    assert pickle.loads(pickle.dumps(model)).loaded_from == model.loaded_from


def test_read_checkpoint_needs_no_network():
    checkpoint = read_checkpoint(bare(network(stem="torchvision", depth=34).state_dict()))
    assert (checkpoint.layout, checkpoint.config["depth"], checkpoint.num_classes) == ("torchvision", 34, 5)
    assert read_checkpoint(checkpoint) is checkpoint
    assert load_checkpoint(None, checkpoint).depth == 34


def test_the_dtype_is_that_of_the_network():
    state = {
        k: v.half() if v.is_floating_point() else v for k, v in network(stem="hara").state_dict().items()
    }
    assert load_checkpoint(None, state).conv1.weight.dtype == torch.float32
    assert load_checkpoint(None, state, dtype=torch.bfloat16).conv1.weight.dtype == torch.bfloat16


def test_another_number_of_classes():
    source = network(5, stem="hara")
    state = bare(source.state_dict())
    model = network(8, stem="hara", seed=1)
    own_head = model.fc.weight.clone()
    with pytest.raises(ValueError, match=r"its head has 5 classes, that of the model 8: pass num_classes=8"):
        load_checkpoint(model, state)
    with pytest.raises(ValueError, match=r"num_classes: expected 8, the head of the model, got 5"):
        load_checkpoint(model, state, num_classes=5)
    for kwargs in ({"num_classes": 8}, {"replace_head": True}):
        load_checkpoint(model, state, **kwargs)
        assert model.loaded_from.head == "new"
        assert torch.equal(model.fc.weight, own_head)
        assert torch.equal(model.conv1.weight, source.conv1.weight)
    assert load_checkpoint(None, state, num_classes=2).fc.out_features == 2
    assert isinstance(load_checkpoint(None, state, num_classes=0).fc, nn.Identity)
    # A head that fits is loaded, whatever was allowed.
    same = load_checkpoint(network(5, stem="hara", seed=2), state, replace_head=True)
    assert torch.equal(same.fc.weight, source.fc.weight)
    assert same.loaded_from.head == "loaded"


def test_names_that_do_not_fit_leave_the_network_untouched():
    model = network(stem="hara", seed=1)
    before = bare(model.state_dict())
    good = bare(network(stem="hara").state_dict())
    lacking = {k: v for k, v in good.items() if k != "layer2.0.bn2.bias"}
    extra = {**good, "aux.weight": torch.zeros(1)}
    shape = {**good, "layer4.0.bn2.bias": torch.zeros(3)}
    other = bare(network(stem="torchvision").state_dict())
    for state, match in (
        (lacking, r"that lacks layer2.0.bn2.bias"),
        (extra, r"has aux.weight, which the model has not"),
        (shape, r"layer4.0.bn2.bias: expected shape \(64,\), got \(3,\)"),
        (other, r"layout 'torchvision' that lacks conv1.weight.* and \d+ more and has stem.0.weight"),
    ):
        with pytest.raises(ValueError, match=match):
            load_checkpoint(model, state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.loaded_from is None

    load_checkpoint(model, {**lacking, "aux.weight": torch.zeros(1)}, strict=False)
    assert model.loaded_from.missing == ["layer2.0.bn2.bias"]
    assert model.loaded_from.unexpected == ["aux.weight"]
    with pytest.raises(ValueError, match="expected shape"):
        load_checkpoint(model, shape, strict=False)


@pytest.mark.parametrize(
    ("args", "kwargs", "match"),
    [
        (("model", {}), {}, r"model: expected a torch.nn.Module or None, got str"),
        ((None, 7), {}, r"path_or_dict: expected a path or a dict, got int"),
        ((nn.Linear(1, 1), {}), {"stem": "hara"}, r"stem: only for a network that is built here"),
    ],
)
def test_wrong_types(args, kwargs, match):
    with pytest.raises(TypeError, match=match):
        load_checkpoint(*args, **kwargs)


# --- layouts that are recognised and refused --------------------------------------------------------------


def w(*shape):
    return torch.zeros(*shape)


def preact(state):
    """bn1 stands before conv1."""
    out = dict(state)
    out["layer2.0.bn1.weight"] = w(state["layer2.0.conv1.weight"].shape[1])
    return out


def bottleneck_with(**shapes):
    state = bare(network(stem="hara", depth=50).state_dict())
    return {**state, **{k.replace("__", "."): w(*v) for k, v in shapes.items()}}


REFUSED = {
    "PyTorchVideo": lambda: {
        "model_state": {
            "blocks.0.conv.weight": w(64, 3, 1, 7, 7),
            "blocks.1.res_blocks.0.branch2.conv_a.weight": w(64, 64, 1, 1, 1),
        }
    },
    "MMAction2": lambda: {
        "state_dict": {
            "backbone.conv1.conv.weight": w(64, 3, 5, 7, 7),
            "backbone.layer1.0.conv1.conv.weight": w(64, 64, 1, 1, 1),
            "cls_head.fc_cls.weight": w(4, 2048),
        }
    },
    "R(2+1)D of 3D-ResNets-PyTorch": lambda: {"state_dict": {"module.conv1_s.weight": w(110, 3, 1, 7, 7)}},
    "other kernels (layer2.0": lambda: {  # a mix within a block
        **network(stem="torchvision").state_dict(),
        "layer2.0.conv1.0.weight": w(16, 8, 1, 3, 3),
    },
    "other kernels (layer1.0": lambda: {  # Hara's names tell nothing of the strides of such a network
        k: v[:, :, :1] if v.dim() == 5 and ".conv" in k else v
        for k, v in bare(network(stem="hara").state_dict()).items()
    },
    "other kernels (layer3.0)": lambda: {  # the second half is not over the frames alone
        **bare(network(stem="r2plus1d", convolutions="2+1d").state_dict()),
        "layer3.0.conv1.0.3.weight": w(32, 57, 3, 3, 1),
    },
    "another stem": lambda: {
        **bare(network(stem="r2plus1d", convolutions="2+1d").state_dict()),
        "stem.3.weight": w(8, 5),
    },
    "a 2-D ResNet": lambda: {"conv1.weight": w(64, 3, 7, 7), "layer1.0.conv1.weight": w(64, 64, 3, 3)},
    "other kernels (layer3.0": lambda: {
        **network(stem="hara").state_dict(),
        "layer3.0.conv1.weight": w(32, 16, 3, 1, 1),
    },
    "pre-activation ResNet": lambda: preact(network(stem="hara").state_dict()),
    "ResNeXt": lambda: bottleneck_with(layer1__0__conv2__weight=(8, 2, 3, 3, 3)),
    "Wide ResNet": lambda: bottleneck_with(layer1__0__conv3__weight=(16, 8, 1, 1, 1)),
    "DenseNet": lambda: {"arch": "densenet-121", "state_dict": {"features.conv1.weight": w(64, 3, 7, 7, 7)}},
}


@pytest.mark.parametrize("layout", REFUSED)
def test_other_networks_are_refused_by_name(tmp_path, layout):
    for content in (REFUSED[layout](), saved(tmp_path, REFUSED[layout]())):
        with pytest.raises(ValueError) as error:  # noqa: PT011 - the layout has brackets
            load_checkpoint(None, content)
        assert f"checkpoint of {layout}" in str(error.value) or layout in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"layer1.2.conv1.weight": w(8, 8, 3, 3, 3)}, r"blocks of layer1 are missing"),
        ({"layer4.0.conv4.weight": w(8, 8, 3, 3, 3)}, r"layer4.0 has convolutions \[1, 2, 4\]"),
        ({"fc.weight": w(3)}, r"fc.weight: expected 2 dimensions"),
        (
            {
                f"layer1.1.{k}": w(*s)
                for k, s in {
                    "conv1.weight": (8, 8, 3, 3, 3),
                    "bn1.weight": (8,),
                    "conv2.weight": (8, 8, 3, 3, 3),
                }.items()
            },
            r"\(2, 1, 1, 1\) basic blocks, which is none of the depths",
        ),
    ],
)
def test_networks_that_are_none(change, match):
    with pytest.raises(ValueError, match=match):
        load_checkpoint(None, {**bare(network(stem="hara").state_dict()), **change})


def test_a_damaged_description():
    state = network(stem="hara").state_dict()
    for geometry in (None, {}, {**state._metadata[""]["r3d_kernels"]["geometry"], "stem_stride": 0}):
        state._metadata[""]["r3d_kernels"]["geometry"] = geometry
        with pytest.raises(ValueError, match="the description of the network is damaged"):
            load_checkpoint(None, state)


# --- files that are no checkpoints ------------------------------------------------------------------------


def one_line(error):
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        bytes(1000),
        b"PK\x03\x04" + bytes(50),
        b"\x80\x02}q\x00.",
        b"\x89HDF\r\n\x1a\n" + bytes(64),
    ],
)
def test_foreign_files(tmp_path, content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights.pth") as error:
        load_checkpoint(None, path)
    one_line(error)


def complaint(path, read=lambda path: load_checkpoint(None, path)):
    try:
        read(path)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_and_damaged_files(tmp_path, zipped):
    path = tmp_path / "weights.pth"
    torch.save(
        network(stem="hara", widen_factor=0.02).state_dict(), path, _use_new_zipfile_serialization=zipped
    )
    content = path.read_bytes()
    for fraction in (0.1, 0.5, 0.9, 0.999):
        path.write_bytes(content[: int(len(content) * fraction)])
        with pytest.raises(ValueError, match=r"weights.pth") as error:
            load_checkpoint(None, path)
        one_line(error)
    # A flipped byte may go unseen, but nothing else than a ValueError may come of it.
    rng = random.Random(0)
    for _ in range(20):
        damaged = bytearray(content)
        for _ in range(20):
            damaged[rng.randrange(min(len(content), 20000))] = rng.randrange(256)
        path.write_bytes(damaged)
        assert "\n" not in complaint(path)


class Harmful:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was run",))


def test_nothing_in_a_file_is_run(tmp_path):
    for content in (Harmful(), {"state_dict": {}, "args": Harmful()}, network(stem="hara")):
        with pytest.raises(ValueError, match=r"holds Python objects .* save the state_dict alone") as error:
            load_checkpoint(None, saved(tmp_path, content))
        one_line(error)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([1, 2], "expected a state dict, got list"),
        (torch.zeros(2), "expected a state dict, got Tensor"),
        ({}, "it is empty"),
        ({"state_dict": {"a": 1}}, "'a' is int"),
        ({"state_dict": {"encoder.weight": torch.zeros(1)}}, "its names start with encoder.weight"),
    ],
)
def test_files_with_something_else(tmp_path, content, match):
    with pytest.raises(ValueError, match=match) as error:
        load_checkpoint(None, saved(tmp_path, content))
    one_line(error)


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(ValueError, match="this is a directory"):
        load_checkpoint(None, tmp_path)
    with pytest.raises(FileNotFoundError, match="no such checkpoint file"):
        load_checkpoint(None, tmp_path / "none.pth")


# --- tensors that are no weights --------------------------------------------------------------------------


def freed(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


#: What comes in place of a weight, and what is said of it.
NO_WEIGHTS = {
    "zero-size": (lambda t: t[:0], r"expected 1 to \d+ values, got shape \(0"),
    "meta": (lambda t: t.to("meta"), "expected values, got a tensor on the meta device"),
    "sparse": (lambda t: t.to_sparse(), "expected a dense tensor, got a tensor of layout sparse_coo"),
    "integer": (lambda t: t.long(), "floating-point values, got torch.int64"),
    "bool": (lambda t: t > 0, "floating-point values, got torch.bool"),
    "complex": (lambda t: t.to(torch.complex64), "floating-point values, got torch.complex64"),
    "quantized": (
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
        r"floating-point values, got a quantized tensor \(torch.qint8\)",
    ),
    "nested": (lambda t: torch.nested.nested_tensor([t]), "a dense tensor, got a tensor of layout nested"),
    "never initialised": (
        lambda t: nn.parameter.UninitializedParameter(),
        "expected values, got a parameter that was never initialised",
    ),
    "claimed": (
        lambda t: t.new_zeros(1).expand(1 << 40),
        r"expected 1 to \d+ values, got shape \(1099511627776",
    ),
    "freed": (lambda t: freed(t.clone()), "expected values, got a tensor whose storage was freed"),
}
IN_FILES = ["zero-size", "meta", "sparse", "integer", "bool", "complex", "quantized", "claimed"]
NAMES = [
    "conv1.weight",
    "bn1.running_var",
    "layer3.0.conv2.weight",
    "layer2.0.downsample.1.bias",
    "fc.weight",
]


def spoilt(name, kind):
    state = bare(network(stem="hara").state_dict())
    state[name] = NO_WEIGHTS[kind][0](state[name].detach())
    return state


@pytest.mark.filterwarnings("ignore")  # torch's own, of quantized and nested tensors
@pytest.mark.parametrize("kind", NO_WEIGHTS)
@pytest.mark.parametrize("name", NAMES)
def test_tensors_that_are_no_weights(name, kind):
    state = spoilt(name, kind)
    target = network(stem="hara", seed=1)
    before = bare(target.state_dict())
    for model in (None, target):
        with pytest.raises(ValueError, match=rf"^state dict: {name}: .*{NO_WEIGHTS[kind][1]}") as error:
            load_checkpoint(model, state)
        one_line(error)
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", IN_FILES)
def test_files_with_tensors_that_are_no_weights(tmp_path, kind):
    path = saved(tmp_path, {"state_dict": spoilt(NAMES[2], kind), "epoch": 1})
    with pytest.raises(ValueError, match=rf"checkpoint.pth: {NAMES[2]}: .*{NO_WEIGHTS[kind][1]}") as error:
        load_checkpoint(None, path)
    one_line(error)


def test_counters_are_integers_or_cast_with_the_rest():
    for cast in (torch.Tensor.long, torch.Tensor.int, torch.Tensor.half):
        state = bare(network(stem="hara").state_dict())
        for name in state:
            if name.endswith("num_batches_tracked"):
                state[name] = cast(state[name] + 3)
        assert load_checkpoint(None, state).bn1.num_batches_tracked == 3


def test_what_is_left_out_may_be_anything():
    """Only reported, as any other name that the network lacks."""
    state = {**bare(network(stem="hara").state_dict()), "mask": torch.zeros(0), "steps": torch.ones(3).long()}
    assert load_checkpoint(None, state, strict=False).loaded_from.unexpected == ["mask", "steps"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
@pytest.mark.parametrize("name", ["conv1.weight", "bn1.running_mean"])
def test_weights_that_are_not_finite_are_said(tmp_path, name, value):
    state = bare(network(stem="hara").state_dict())
    state[name] = state[name].double()  # 1e300 is infinity in the network's float32
    state[name].view(-1)[-1] = value
    path = saved(tmp_path, state)
    with pytest.warns(UserWarning, match=rf"{name} of .*checkpoint.pth has NaN or infinity") as told:
        model = load_checkpoint(None, path)
    assert told[0].filename == __file__
    assert model.loaded_from.notes[-1] == f"NaN or infinity in 1 of the tensors: {name}"
    assert torch.equal(model.state_dict()[name], state[name].float()) or value != value


@pytest.mark.parametrize("keys", [["model"], ["state_dict", "model"], ["model_state", "model", "state_dict"]])
def test_dicts_that_contain_themselves(tmp_path, keys):
    dicts = [{"epoch": 1} for _ in keys]
    for i, key in enumerate(keys):
        dicts[i][key] = dicts[(i + 1) % len(keys)]
    for source in (dicts[0], {"model": dicts[0]}, saved(tmp_path, dicts[0])):
        with pytest.raises(
            ValueError, match="expected a state dict, got a dict that contains itself"
        ) as error:
            load_checkpoint(None, source)
        one_line(error)


def test_dicts_of_any_depth():
    state = bare(network(stem="hara").state_dict())
    inner = state
    for _ in range(20):
        inner = {"model": inner}
    load_checkpoint(None, inner)
    for _ in range(5000):
        inner = {"model": inner}
    with pytest.raises(ValueError, match="more than 32 dicts deep") as error:
        load_checkpoint(None, inner)
    one_line(error)


@pytest.mark.parametrize(
    "key",
    ["x" * 10_000, 10**400, (1, "a\nb"), "a\nb", "\udcff", b"\n" * 1000, None],
    ids=lambda k: repr(k)[:20],
)
def test_names_that_are_none(key):
    with pytest.raises(ValueError, match=r"^state dict: ") as error:
        load_checkpoint(None, {key: torch.zeros(1)})
    one_line(error)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["stem_stride", "stem_padding", "stem_pool", "layer_strides", "layer_dilations"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(field=st.sampled_from([*FIELDS, "geometry", "clip", "preset", "all"]), junk=JUNK)
def test_any_description(field, junk):
    """What this package wrote beside the weights, and somebody changed."""
    state = network(stem="hara", widen_factor=0.02).state_dict()
    own = dict(state._metadata[""]["r3d_kernels"])
    if field in FIELDS:
        own["geometry"] = {**own["geometry"], field: junk}
    else:
        own[field] = junk
    state._metadata[""] = {"r3d_kernels": own} if field != "all" else junk
    said = complaint(state, read_checkpoint)
    assert "\n" not in said
    assert len(said) < 500


@pytest.mark.parametrize("metadata", [3, [1], {"": 3}, {"": {"r3d_kernels": 3}}])
def test_any_metadata(metadata):
    state = bare(network(stem="hara").state_dict())
    state._metadata = metadata
    assert read_checkpoint(state).layout == "hara"


def test_a_downsample_bias_of_another_shape():
    """A single value would be added to all channels without a word."""
    state = monai_state(network(stem=Stem(7, 1, pool=Pool(3, 2, 1)), in_channels=1))
    state["layer2.0.downsample.0.bias"] = torch.ones(1)
    with pytest.raises(
        ValueError, match=r"layer2.0.downsample.0.bias: expected shape \(16,\), .*, got \(1,\)"
    ):
        load_checkpoint(None, state)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no fifos")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_paths_that_hang_or_never_end(tmp_path, suffix):
    fifo, link, unix = (tmp_path / f"{name}{suffix}" for name in ("fifo", "zero", "socket"))
    os.mkfifo(fifo)
    link.symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(unix))
    for path, kind in ((fifo, "a pipe"), (link, "a device"), (unix, "a socket")):
        with pytest.raises(ValueError, match=rf"{path.name}: expected a checkpoint file, this is {kind}"):
            load_checkpoint(None, path)


def test_tensors_that_only_look_like_ones():
    from torch._subclasses.fake_tensor import FakeTensorMode

    state = bare(network(stem="hara").state_dict())
    state["fc.weight"] = FakeTensorMode().from_tensor(state["fc.weight"].detach())
    with pytest.raises(
        ValueError, match=r"^state dict: fc.weight: expected values, got a FakeTensor"
    ) as error:
        load_checkpoint(None, state)
    one_line(error)


def test_tensors_that_claim_more_than_there_is(monkeypatch):
    """Each within its limit, all together not: the file of expanded tensors is small."""
    state = {
        k: v.reshape(-1)[:1].expand(v.numel()).reshape(v.shape) for k, v in network().state_dict().items()
    }
    load_checkpoint(None, state)
    monkeypatch.setattr("r3d_kernels.models.checkpoint.physical_memory", lambda: 1000.0)
    with pytest.raises(ValueError, match=r"expected weights that fit into 0\.0 GiB of memory") as error:
        load_checkpoint(None, state)
    one_line(error)


def test_tensors_that_share_their_storage():
    state = bare(network(stem="hara").state_dict())
    whole = torch.cat([v.reshape(-1).float() for v in state.values()])
    parts = whole.split([v.numel() for v in state.values()])
    shared = {k: part.view(v.shape) for (k, v), part in zip(state.items(), parts, strict=True)}
    got = load_checkpoint(None, shared).state_dict()
    assert all(torch.equal(got[k], v) for k, v in state.items())
