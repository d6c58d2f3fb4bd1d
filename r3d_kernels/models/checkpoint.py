"""Checkpoints as other projects save them: which layout a file has, the network behind it, and loading it.

Recognised and loaded: 3D-ResNets-PyTorch (2018 and 2020), torchvision's R3D, R(2+1)D and mixed networks, MONAI,
MedicalNet, and the state dicts of this package. Recognised and refused by name: PyTorchVideo, MMAction2, the other
families of 3D-ResNets-PyTorch (its R(2+1)D among them), and 2-D networks.
"""

from __future__ import annotations

import math
import os
import re
import reprlib
import stat
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from r3d_kernels.models.resnet import DEPTHS, STEMS, Bottleneck, Pool, ResNet3D, Stem
from r3d_kernels.ops.clip import channel_values
from r3d_kernels.video import physical_memory

__all__ = [
    "MEDICALNET_CONFIG",
    "PRESETS",
    "Checkpoint",
    "LoadReport",
    "Preset",
    "load_checkpoint",
    "preset",
    "read_checkpoint",
]


# --- presets ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preset:
    """How the clips of a family are prepared: resize, centre crop, ``(x - mean) / std`` on values of 0 to 1.

    Attributes:
        name: the family.
        mean, std: one number a channel, for values of 0 to 1.
        frames: frames in a clip.
        crop_size: height and width of the centre crop.
        resize: length of the short side (an int), or (height, width).
        antialias: whether the resize filters when it shrinks.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    frames: int = 16
    crop_size: int = 112
    resize: int | tuple[int, int] = 112
    antialias: bool = True


#: Family to preset. Hara's networks of 2018 take values of 0 to 255 less a mean, hence a std of 1/255.
PRESETS: dict[str, Preset] = {
    "hara": Preset("hara", (0.4345, 0.4051, 0.3775), (0.2768, 0.2713, 0.2737)),
    "hara2018": Preset(
        "hara2018", (114.7748 / 255, 107.7354 / 255, 99.4750 / 255), (1 / 255, 1 / 255, 1 / 255)
    ),
    "torchvision": Preset(
        "torchvision",
        (0.43216, 0.394666, 0.37645),
        (0.22803, 0.22145, 0.216989),
        resize=(128, 171),
        antialias=False,
    ),
    # Volumes of one channel, which the user brings to zero mean and unit variance volume by volume.
    "medicalnet": Preset("medicalnet", (0.0,), (1.0,)),
}


def _bare(model: nn.Module) -> nn.Module:
    """The network inside DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def preset(model_or_name: nn.Module | str) -> Preset:
    """The transforms that belong to a network.

    Args:
        model_or_name: a network (the preset of the weights that it was given, else that of its family), a
            name of :func:`list_models`, or a key of :data:`PRESETS`.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a network of this package nor a name.
    """
    if isinstance(model_or_name, str):
        from r3d_kernels.models.registry import preset_name  # it imports this module

        return PRESETS[preset_name(model_or_name)]
    model = _bare(model_or_name) if isinstance(model_or_name, nn.Module) else model_or_name
    if not hasattr(model, "preset_name"):
        raise TypeError(
            f"model_or_name: expected a network of r3d_kernels or a name, got {type(model).__name__}"
        )
    if model.preset_name is not None:
        return PRESETS[model.preset_name]
    return PRESETS["torchvision" if isinstance(getattr(model, "stem", None), nn.Sequential) else "hara"]


# --- reading ----------------------------------------------------------------------------------------------


@dataclass
class Checkpoint:
    """A checkpoint that was recognised.

    Attributes:
        layout: ``"hara"``, ``"hara2018"``, ``"torchvision"``, ``"monai"``, ``"medicalnet"`` or
            ``"r3d_kernels"``.
        source: path, or ``"state dict"``.
        state_dict: the weights under the names of the network, without the wrappers' prefixes.
        config: arguments of :class:`ResNet3D` that build the network (without ``num_classes``).
        num_classes: size of the head; 0 where there is none.
        preset_name: key of :data:`PRESETS`.
        arch: what the file says of its architecture, if anything.
        certain: whether the file itself describes strides, padding, dilation and max-pool; otherwise `config`
            has the layout's.
        assumed: what of `config` is only the layout's default, in words.
        notes: what was dropped.
        clip: ``clip_mean`` and ``clip_std`` of the network that was saved, where the file tells.
    """

    layout: str
    source: str
    state_dict: dict[str, Tensor]
    config: dict[str, Any]
    num_classes: int
    preset_name: str
    arch: str | None = None
    certain: bool = False
    assumed: str = ""
    notes: list[str] = field(default_factory=list)
    clip: tuple[tuple[float, ...] | None, tuple[float, ...] | None] | None = None


@dataclass
class LoadReport:
    """What :func:`load_checkpoint` did; it lies in ``model.loaded_from``.

    Attributes:
        layout, source, arch, notes: as in :class:`Checkpoint`.
        preset: the transforms that belong to the weights.
        num_classes: size of the checkpoint's head, 0 where it has none.
        head: ``"loaded"``, ``"new"`` (the network kept its own) or ``"none"``.
        missing: names that the network has and the checkpoint lacks.
        unexpected: names that the checkpoint has and the network lacks.
    """

    layout: str
    source: str
    preset: Preset
    num_classes: int
    head: str
    arch: str | None = None
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


_WRAPPER_KEYS = ("state_dict", "model_state_dict", "model_state", "model")
_PREFIXES = ("module.", "_orig_mod.", "model.")
_DEEPEST = 32  # dicts around a state dict
_MOST_VALUES = 1 << 31  # of a tensor; an expanded one can claim any number
_FLOATS = {
    getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    )
    if hasattr(torch, name)
}
_INTEGERS = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}
_OWN_NAMES = (".weight", ".bias", ".running_mean", ".running_var", ".num_batches_tracked")


def _in_a_line(value: Any, most: int = 80) -> str:
    """A name or an error, in one line of bounded length."""
    text = " ".join(str(value).split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _kind(mode: int) -> str | None:
    """What a path is, where it is no regular file."""
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return None if stat.S_ISREG(mode) else kinds.get(stat.S_IFMT(mode), "something else")


def _read_file(path: str) -> Any:
    """What the file holds; a ValueError of one line where it holds no checkpoint."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    if kind := _kind(os.stat(path).st_mode):  # before it is opened: a pipe would hang, a device never end
        raise ValueError(f"{path}: expected a checkpoint file, this is {kind}")
    if path.endswith(".safetensors"):
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ImportError(
                f"{path}: reading .safetensors needs the package safetensors (pip install safetensors)"
            ) from None
        read = load_file
    else:

        def read(path: str) -> Any:
            return torch.load(path, map_location="cpu", weights_only=True)

    with open(path, "rb"):  # what the system forbids is said as it is
        pass
    try:
        return read(path)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can fail in any line of the reader, and in any way
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign:
            raise ValueError(
                f"{path}: holds Python objects ({foreign[1]}), which are not loaded for safety; "
                "save the state_dict alone"
            ) from None
        raise ValueError(f"{path}: no checkpoint, or a damaged one ({type(error).__name__})") from None


def _unwrap(raw: Any, source: str) -> tuple[dict[str, Tensor], dict[str, Any] | None, str | None, bool]:
    """State dict, this package's metadata, the file's word on its architecture, and whether a prefix went."""
    arch = None
    seen: list[Any] = []
    while isinstance(raw, Mapping):
        if any(raw is outer for outer in seen) or len(seen) > _DEEPEST:
            what = "contains itself" if len(seen) <= _DEEPEST else f"lies more than {_DEEPEST} dicts deep"
            raise ValueError(f"{source}: expected a state dict, got a dict that {what}")
        seen.append(raw)
        if isinstance(raw.get("arch"), str):
            arch = raw["arch"]
        inner = next((raw[k] for k in _WRAPPER_KEYS if isinstance(raw.get(k), Mapping)), None)
        if inner is None:
            break
        raw = inner
    if not isinstance(raw, Mapping):
        raise ValueError(f"{source}: expected a state dict, got {type(raw).__name__}")
    wrong = [
        k for k, v in raw.items() if not (isinstance(k, str) and k.isprintable() and isinstance(v, Tensor))
    ]
    if wrong or not raw:
        what = f"{reprlib.repr(wrong[0])} is {type(raw[wrong[0]]).__name__}" if wrong else "it is empty"
        what = _in_a_line(what, 200)
        raise ValueError(f"{source}: expected a state dict of names and tensors, but {what}")

    metadata = None
    described = getattr(raw, "_metadata", None)
    for entry in described.values() if isinstance(described, Mapping) else ():
        if isinstance(entry, Mapping) and isinstance(entry.get("r3d_kernels"), Mapping):
            metadata = dict(entry["r3d_kernels"])
    state = dict(raw)
    parallel = False
    while prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in state)), None):
        state = {k[len(prefix) :]: v for k, v in state.items()}
        parallel |= prefix == "module."
    return state, metadata, arch, parallel


def _check_tensor(source: str, name: str, tensor: Tensor, integer: bool) -> None:
    """Raises for what holds no weights: empty, without values, of a layout or type that no layer computes with.

    Args:
        source, name: of the tensor.
        tensor: is checked without reading its values.
        integer: whether it may be one of integers, as counters are.
    """
    got = expected = None
    if nn.parameter.is_lazy(tensor):  # has no shape to ask for
        expected, got = "values", "a parameter that was never initialised"
    elif tensor.is_nested or tensor.layout != torch.strided:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        expected, got = "a dense tensor", f"a tensor of layout {layout}"
    elif tensor.is_meta:
        expected, got = "values", "a tensor on the meta device, which has none"
    elif tensor.is_quantized:
        expected, got = "floating-point values", f"a quantized tensor ({tensor.dtype})"
    elif not (tensor.dtype in _FLOATS or (integer and tensor.dtype in _INTEGERS)):
        expected, got = f"{'integer or ' if integer else ''}floating-point values", str(tensor.dtype)
    elif not 0 < tensor.numel() <= _MOST_VALUES:
        expected, got = f"1 to {_MOST_VALUES} values", f"shape {tuple(tensor.shape)}"
    elif type(tensor) in (Tensor, nn.Parameter) and _beyond_storage(tensor):
        expected, got = "values", "a tensor whose storage was freed"
    if got is not None:
        raise ValueError(f"{source}: {_in_a_line(name)}: expected {expected}, got {got}")


def _beyond_storage(tensor: Tensor) -> bool:
    """Whether a tensor's memory is gone, as FSDP leaves it: reading would end the process."""
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
    return tensor.untyped_storage().nbytes() < needed


def _check_own_tensors(source: str, state: Mapping[str, Tensor]) -> None:
    """Checks what a network of this package would take; anything else is only reported, or refused by its name."""
    claimed = 0
    for name, tensor in state.items():
        if name.endswith(_OWN_NAMES) and not name.startswith("conv_seg."):
            _check_tensor(source, name, tensor, integer=name.endswith(".num_batches_tracked"))
            claimed += 4 * tensor.numel()
    there = physical_memory()
    if claimed > there:  # expanded tensors: the file is small, the network would not be
        raise ValueError(
            f"{source}: expected weights that fit into {there / 2**30:.1f} GiB of memory, got tensors of "
            f"{claimed / 2**30:.1f} GiB in float32"
        )


# --- recognising ------------------------------------------------------------------------------------------

# (what a name or the architecture looks like, whose checkpoint that is)
_REFUSED_NAMES = (
    (r"blocks\.\d+\.(res_blocks\.\d+\.branch2|multipathway)", "PyTorchVideo"),
    (r"(backbone\.)?layer\d\.\d+\.conv\d\.conv\.", "MMAction2"),
    (r"conv1_s\.weight", "R(2+1)D of 3D-ResNets-PyTorch"),
)
_REFUSED_ARCHS = (
    ("resnet2p1d", "R(2+1)D of 3D-ResNets-PyTorch"),
    ("preresnet", "pre-activation ResNet of 3D-ResNets-PyTorch"),
    ("preact_resnet", "pre-activation ResNet of 3D-ResNets-PyTorch"),
    ("wideresnet", "Wide ResNet of 3D-ResNets-PyTorch"),
    ("wide_resnet", "Wide ResNet of 3D-ResNets-PyTorch"),
    ("resnext", "ResNeXt of 3D-ResNets-PyTorch"),
    ("densenet", "DenseNet of 3D-ResNets-PyTorch"),
)
# The convolution may be in two halves, 0 and 3 (torchvision's R(2+1)D).
_BLOCK_CONV = re.compile(r"layer([1-4])\.(\d{1,4})\.conv(\d)(?:\.0(?:\.([03]))?)?\.weight")

#: What MedicalNet has and the weights do not tell.
MEDICALNET_CONFIG: dict[str, Any] = {
    "stem": Stem((7, 7, 7), (2, 2, 2), pool=Pool(3, 2, 1)),
    "layer_strides": (1, 2, 1, 1),
    "layer_dilations": (1, 1, 2, 4),
}


def _refuse(source: str, layout: str) -> ValueError:
    return ValueError(f"{source}: this is a checkpoint of {layout}, a network that r3d_kernels does not have")


def _shape(state: Mapping[str, Tensor], name: str, source: str) -> tuple[int, ...]:
    if name not in state:
        raise ValueError(f"{source}: looks like a 3-D ResNet, but {name} is missing")
    return tuple(state[name].shape)


def _block_shapes(
    state: Mapping[str, Tensor], source: str
) -> tuple[list[list[dict[int, tuple[int, ...]]]], list[bool]]:
    """Layer, block, and number of the convolution to the shape of its weight; and which layers have factored ones.

    The shape of two halves is that of the one convolution that they stand for.
    """
    layers: list[dict[int, dict[int, tuple[int, ...]]]] = [{}, {}, {}, {}]
    factored = [False] * 4
    for name, tensor in state.items():
        match = _BLOCK_CONV.fullmatch(name)
        if match is None:
            continue
        layer, block, conv = map(int, match.groups()[:3])
        shape = tuple(tensor.shape)
        if match[4] == "3":
            first = _shape(state, name.removesuffix("3.weight") + "0.weight", source)
            factored[layer - 1] = True
            if len(first) != 5 or len(shape) != 5 or (first[2], *shape[3:]) != (1, 1, 1):
                raise _refuse(source, f"a 3-D ResNet with other kernels (layer{layer}.{block})")
            shape = (shape[0], first[1], shape[2], *first[3:])
        elif match[4] == "0":
            continue  # with its other half
        layers[layer - 1].setdefault(block, {})[conv] = shape
    for i, blocks in enumerate(layers):
        if sorted(blocks) != list(range(len(blocks))) or not blocks:
            raise ValueError(f"{source}: looks like a 3-D ResNet, but blocks of layer{i + 1} are missing")
    return [[blocks[j] for j in range(len(blocks))] for blocks in layers], factored


def _refuse_other_blocks(
    state: Mapping[str, Tensor], layers: list[list[dict[int, tuple[int, ...]]]], naming: str, source: str
) -> None:
    """Raises for blocks that share the names and are something else."""
    for i, blocks in enumerate(layers):
        # torchvision's mixed networks have (1, 3, 3) in whole layers
        flat = naming == "torchvision" and blocks[0].get(2, ())[2:] == (1, 3, 3)
        k = (1, 3, 3) if flat else (3, 3, 3)
        expected = {2: [k, k], 3: [(1, 1, 1), k, (1, 1, 1)]}
        for j, convs in enumerate(blocks):
            block = f"layer{i + 1}.{j}"
            if sorted(convs) not in ([1, 2], [1, 2, 3]) or len(convs) != len(layers[0][0]):
                raise ValueError(
                    f"{source}: looks like a 3-D ResNet, but {block} has convolutions {sorted(convs)}"
                )
            shapes = [convs[k] for k in sorted(convs)]
            if any(len(shape) != 5 for shape in shapes):
                raise _refuse(source, "a 2-D ResNet")
            kernels = [shape[2:] for shape in shapes]
            if kernels != expected[len(convs)]:
                raise _refuse(source, f"a 3-D ResNet with other kernels ({block}: {kernels})")
            if len(convs) == 3 and convs[2][1] != convs[1][0]:
                raise _refuse(source, "ResNeXt of 3D-ResNets-PyTorch")
            if len(convs) == 3 and convs[3][0] != Bottleneck.expansion * convs[3][1]:
                raise _refuse(source, "Wide ResNet of 3D-ResNets-PyTorch")
            if naming == "hara" and _shape(state, f"{block}.bn1.weight", source) != convs[1][:1]:
                raise _refuse(source, "pre-activation ResNet of 3D-ResNets-PyTorch")


def _infer_config(state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """Arguments of ResNet3D from names and shapes, with Hara's or torchvision's defaults for the rest."""
    naming = "torchvision" if "stem.0.weight" in state else "hara"
    stem_shape = _shape(state, "stem.0.weight" if naming == "torchvision" else "conv1.weight", source)
    if len(stem_shape) != 5:
        raise _refuse(source, "a 2-D ResNet")
    layers, factored = _block_shapes(state, source)
    _refuse_other_blocks(state, layers, naming, source)

    counts = tuple(len(blocks) for blocks in layers)
    n_convs = len(layers[0][0])
    depth = next((d for d, (block, n) in DEPTHS.items() if (block.n_convs, n) == (n_convs, counts)), None)
    if depth is None:
        kind = "basic blocks" if n_convs == 2 else "bottlenecks"
        raise ValueError(
            f"{source}: a 3-D ResNet with {counts} {kind}, which is none of the depths {list(DEPTHS)}"
        )

    # layer4 has the finest grain: the others follow from it exactly.
    widen_factor = layers[3][0][1][0] / 512
    midplanes = None
    if naming == "torchvision" and "stem.3.weight" in state:
        last = _shape(state, "stem.3.weight", source)
        if len(last) != 5 or (stem_shape[2], *last[3:]) != (1, 1, 1):
            raise _refuse(source, "a 3-D ResNet with another stem")
        midplanes = math.ceil(stem_shape[0] / widen_factor)
        stem_shape = (last[0], stem_shape[1], last[2], *stem_shape[3:])
    channels = math.ceil(stem_shape[0] / widen_factor)
    stem = replace(STEMS[naming], kernel=stem_shape[2:], padding=None, channels=channels, midplanes=midplanes)
    flat = [blocks[0][2][2] == 1 for blocks in layers]
    return {
        "depth": depth,
        "stem": stem,
        "shortcut_type": "B" if any(".downsample.0.weight" in k for k in state) else "A",
        "in_channels": stem_shape[1],
        "widen_factor": widen_factor,
        "convolutions": tuple(
            "2+1d" if two else "2d" if one else "3d" for two, one in zip(factored, flat, strict=True)
        ),
    }


def _apply_geometry(config: dict[str, Any], geometry: Any, source: str) -> None:
    """Puts the geometry that this package wrote beside the weights into `config`."""
    try:
        config["stem"] = replace(
            config["stem"],
            stride=geometry["stem_stride"],
            padding=geometry["stem_padding"],
            pool=geometry["stem_pool"],
        )
        for name in ("layer_strides", "layer_dilations"):
            config[name] = tuple(int(v) for v in geometry[name])
    except Exception as error:  # whatever lies there can fail in any way
        text = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{source}: the description of the network is damaged ({_in_a_line(text, 200)})"
        ) from None


def _fold_downsample_bias(state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """MONAI's downsample convolutions have a bias. Batch norm subtracts a mean: (x + b) - m = x - (m - b)."""
    out = dict(state)
    for name in state:
        if name.endswith(".downsample.0.bias"):
            bias = out.pop(name)
            mean = name.removesuffix("0.bias") + "1.running_mean"
            if mean in out:
                if bias.shape != out[mean].shape:
                    raise ValueError(
                        f"{source}: {name}: expected shape {tuple(out[mean].shape)}, that of {mean}, "
                        f"got {tuple(bias.shape)}"
                    )
                out[mean] = (out[mean].double() - bias.double()).to(out[mean].dtype)
    return out


def read_checkpoint(path_or_dict: str | os.PathLike[str] | Mapping[str, Any] | Checkpoint) -> Checkpoint:
    """Reads a checkpoint and says what it is, without a network.

    Files are read with ``torch.load(weights_only=True)``, or safetensors for ``.safetensors``: nothing in
    them is run. Nothing is written.

    Args:
        path_or_dict: path, state dict, or dict that holds one (``state_dict``, ``model_state_dict``,
            ``model``). It is left as it is.

    Raises:
        ValueError: a damaged or foreign file, an unknown layout, or one of a network that is not supported
            (the message names it).
        FileNotFoundError: no file there.
        ImportError: a ``.safetensors`` file without the package safetensors.
        TypeError: neither a path nor a dict.
    """
    if isinstance(path_or_dict, Checkpoint):
        return path_or_dict
    if isinstance(path_or_dict, (str, os.PathLike)):
        source = os.fspath(path_or_dict)
        raw = _read_file(source)
    elif isinstance(path_or_dict, Mapping):
        source, raw = "state dict", path_or_dict
    else:
        raise TypeError(f"path_or_dict: expected a path or a dict, got {type(path_or_dict).__name__}")
    state, metadata, arch, parallel = _unwrap(raw, source)

    for pattern, layout in _REFUSED_NAMES:
        if any(re.match(pattern, name) for name in state):
            raise _refuse(source, layout)
    for start, layout in _REFUSED_ARCHS:
        if (arch or "").startswith(start):
            raise _refuse(source, layout)
    if "stem.0.weight" not in state and not ("conv1.weight" in state and "layer1.0.conv1.weight" in state):
        some = ", ".join(map(_in_a_line, list(state)[:3]))
        raise ValueError(f"{source}: no checkpoint of a 3-D ResNet; its names start with {some}")
    _check_own_tensors(source, state)

    config = _infer_config(state, source)
    notes: list[str] = []
    certain, assumed = False, ""
    if metadata is not None:
        layout, certain = "r3d_kernels", True
        _apply_geometry(config, metadata.get("geometry"), source)
        preset_name = str(metadata.get("preset"))
        if preset_name not in PRESETS:
            preset_name = config["stem"].naming
    elif config["stem"].naming == "torchvision":
        layout = preset_name = "torchvision"
    elif any(name.endswith(".downsample.0.bias") for name in state):
        layout, preset_name = "monai", "hara"
        config["stem"] = replace(config["stem"], stride=1)
        assumed = "stem stride (1, 1, 1), MONAI's default: pass stem=... if it was trained with another"
    elif "fc.weight" not in state and (
        config["in_channels"] == 1 or any(name.startswith("conv_seg.") for name in state)
    ):
        layout = preset_name = "medicalnet"
        config.update(
            {**MEDICALNET_CONFIG, "stem": replace(MEDICALNET_CONFIG["stem"], **_sizes(config["stem"]))}
        )
        dropped = [name for name in state if name.startswith("conv_seg.")]
        if dropped:
            state = {k: v for k, v in state.items() if k not in dropped}
            notes.append(f"the segmentation head was left out ({len(dropped)} tensors, conv_seg.*)")
    else:
        # The saves of 2018 came from DataParallel; those of 2020 took the network out of it.
        layout = preset_name = "hara2018" if parallel and arch else "hara"
        assumed = (
            "stem stride (1, 2, 2) and max-pool 3/2/1, the defaults of 3D-ResNets-PyTorch: "
            "pass stem=... if it was trained with others"
        )

    head = _shape(state, "fc.weight", source) if "fc.weight" in state else ()
    if head and len(head) != 2:
        raise ValueError(f"{source}: fc.weight: expected 2 dimensions, got shape {head}")
    return Checkpoint(
        layout=layout,
        source=source,
        state_dict=state,
        config=config,
        num_classes=head[0] if head else 0,
        preset_name=preset_name,
        arch=arch,
        certain=certain,
        assumed=assumed,
        notes=notes,
        clip=None if metadata is None else _saved_clip(metadata.get("clip"), config["in_channels"], source),
    )


def _saved_clip(saved: Any, channels: int, source: str) -> Any:
    """`clip_mean` and `clip_std` that this package wrote beside the weights; None where an older version did."""
    if saved is None:
        return None
    try:
        mean, std = saved
        mean = channel_values(mean, "clip_mean", channels)
        return mean, channel_values(std, "clip_std", channels, positive=True)
    except Exception as error:  # whatever lies there can fail in any way
        text = _in_a_line(error, 200)
        raise ValueError(f"{source}: the normalisation of clips saved with the weights: {text}") from None


def _sizes(stem: Stem) -> dict[str, Any]:
    """The fields of a stem that the weights tell."""
    return {"kernel": stem.kernel, "padding": stem.padding, "channels": stem.channels}


# --- loading ----------------------------------------------------------------------------------------------


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(_in_a_line, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _geometry_differences(model: nn.Module, config: Mapping[str, Any]) -> list[str]:
    """Where a network differs from the checkpoint's although the weights fit."""
    if not hasattr(model, "geometry"):
        return []
    stem = config["stem"]
    theirs = {
        "stem_stride": stem.stride,
        "stem_padding": stem.padding,
        "stem_pool": None if stem.pool is None else vars(stem.pool),
        "layer_strides": config.get("layer_strides", (1, 2, 2, 2)),
        "layer_dilations": config.get("layer_dilations", (1, 1, 1, 1)),
    }
    ours = model.geometry
    return [f"{k}: checkpoint {v}, network {ours[k]}" for k, v in theirs.items() if ours[k] != v]


def load_checkpoint(
    model: nn.Module | None,
    path_or_dict: str | os.PathLike[str] | Mapping[str, Any] | Checkpoint,
    *,
    strict: bool = True,
    num_classes: int | None = None,
    replace_head: bool = False,
    fused: bool | None = None,
    **overrides: Any,
) -> nn.Module:
    """Loads a checkpoint in any layout that :func:`read_checkpoint` recognises.

    Args:
        model: the network to fill, or ``None`` to build a :class:`ResNet3D` from what the checkpoint tells
            (depth, stem, shortcut, channels, classes) and from its layout's defaults for what it does not.
        path_or_dict: path, state dict, or what :func:`read_checkpoint` returned.
        strict: raise where names are missing or left over; otherwise they are only reported. Shapes must
            agree in any case.
        num_classes: size that the head shall have. Where the checkpoint has another, the head starts anew.
        replace_head: let `model` keep its own head where the checkpoint's does not fit it, or is missing.
        fused: sets ``model.fused``; ``None`` leaves it.
        **overrides: further arguments of :class:`ResNet3D` when it is built here (``stem``, ``dtype``, ...).

    Returns:
        The network: `model` itself, or the new one in training mode. ``loaded_from`` is a :class:`LoadReport`
        (layout, preset, missing and unexpected names, notes), ``preset_name`` the key of its :data:`PRESETS`;
        ``clip_mean`` and ``clip_std`` become those that belong to the weights, for values of 0 to 255.

    Raises:
        ValueError: a damaged or foreign file, an unsupported layout, names or shapes that do not fit, a head
            of another size, a tensor without values that a layer can compute with (empty, sparse, on the meta
            device, quantized, of integers). The network is untouched then.
        FileNotFoundError, ImportError: as :func:`read_checkpoint`.
        TypeError: arguments of the wrong type, or overrides together with a network.

    Weights with NaN or infinity are loaded, with a warning and a note in ``loaded_from``.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module or None, got {type(model).__name__}")
    if model is not None and overrides:
        raise TypeError(f"{_some(overrides)}: only for a network that is built here, but model was given")
    checkpoint = read_checkpoint(path_or_dict)
    if model is None:
        wanted = checkpoint.num_classes if num_classes is None else num_classes
        model = ResNet3D(num_classes=wanted, **{**checkpoint.config, **overrides})
        differences: list[str] = []  # the overrides are the caller's word
        notes = [f"assumed: {checkpoint.assumed}"] if checkpoint.assumed and "stem" not in overrides else []
    else:
        notes = differences = _geometry_differences(_bare(model), checkpoint.config)
    conflicts = differences if checkpoint.certain and strict else []
    checkpoint = replace(checkpoint, notes=checkpoint.notes + notes)
    _fill(_bare(model), checkpoint, conflicts, strict, num_classes, replace_head)
    keep_clip_arguments(_bare(model), overrides)
    if fused is not None:
        _bare(model).fused = fused
    return model


def keep_clip_arguments(model: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Sets `clip_mean` and `clip_std` to what the caller asked for, whatever belongs to the weights."""
    for name in {"clip_mean", "clip_std"} & arguments.keys():
        setattr(model, name, arguments[name])


def _set_clip(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Gives the network the normalisation that belongs to its weights; leaves it where none is known."""
    if not hasattr(model, "clip_mean"):  # a network of another kind
        return
    if checkpoint.layout == "r3d_kernels":
        if checkpoint.clip is not None:
            model.clip_mean, model.clip_std = checkpoint.clip
        return
    facts = PRESETS[checkpoint.preset_name]
    if len(facts.mean) == model.in_channels and checkpoint.preset_name != "medicalnet":  # volume by volume
        model.clip_mean = [255 * v for v in facts.mean]
        model.clip_std = [255 * v for v in facts.std]


def _not_finite(source: str, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Names of what the network would hold NaN or infinity of: a float64 may be too large for its type."""
    names = []
    for k, mine in own.items():
        if k in state and state[k].is_floating_point():
            try:
                values = state[k].detach().to(mine.dtype if mine.is_floating_point() else torch.float32)
                values = values.float() if values.dtype.itemsize == 1 else values
                finite = bool(values.isfinite().all())
            except (
                RuntimeError,
                NotImplementedError,
                TypeError,
            ) as error:  # of a type that only looks like a tensor
                what = f"{type(state[k]).__name__} that cannot be read ({type(error).__name__})"
                raise ValueError(f"{source}: {_in_a_line(k)}: expected values, got a {what}") from None
            if not finite:
                names.append(k)
    return names


def _fill(
    model: nn.Module,
    checkpoint: Checkpoint,
    conflicts: list[str],
    strict: bool,
    num_classes: int | None,
    replace_head: bool,
) -> None:
    """Checks everything first, then loads: an error leaves the network as it was."""
    source = checkpoint.source
    own = model.state_dict()
    state = dict(checkpoint.state_dict)
    notes = list(checkpoint.notes)
    if any(name.endswith(".downsample.0.bias") and name not in own for name in state):
        state = _fold_downsample_bias(state, source)
        notes.append("the biases of the downsample convolutions were folded into the batch norms behind them")

    own_head = {k: tuple(v.shape) for k, v in own.items() if k.startswith("fc.")}
    head = {k: tuple(v.shape) for k, v in state.items() if k.startswith("fc.")}
    own_classes = own_head["fc.weight"][0] if "fc.weight" in own_head else 0
    if num_classes is not None and num_classes != own_classes:
        raise ValueError(f"num_classes: expected {own_classes}, the head of the model, got {num_classes}")
    head_done = "loaded" if own_head else "none"
    if head != own_head:
        if not (replace_head or num_classes is not None):
            if strict or (head and own_head):
                raise ValueError(
                    f"{source}: its head has {checkpoint.num_classes or 'no'} classes, that of the model "
                    f"{own_classes or 'none'}: pass num_classes={own_classes} or replace_head=True "
                    "to load the rest"
                )
        elif head:
            notes.append(f"the head of {checkpoint.num_classes} classes was left out")
        head_done = "new" if own_head else "none"
        if replace_head or num_classes is not None:
            state = {k: v for k, v in state.items() if k not in head}
            own = {k: v for k, v in own.items() if k not in own_head}

    # Old saves lack these counters, and inference has no use for them.
    missing = [k for k in own if k not in state and not k.endswith(".num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    shapes = [k for k in state if k in own and state[k].shape != own[k].shape]
    if shapes:
        k = shapes[0]
        raise ValueError(
            f"{source}: {k}: expected shape {tuple(own[k].shape)}, got {tuple(state[k].shape)}"
            + (f" (and {len(shapes) - 1} more differ)" if len(shapes) > 1 else "")
        )
    if strict and (missing or unexpected):
        parts = [f"lacks {_some(missing)}"] if missing else []
        parts += [f"has {_some(unexpected)}, which the model has not"] if unexpected else []
        raise ValueError(f"{source}: a checkpoint of layout {checkpoint.layout!r} that {' and '.join(parts)}")
    if conflicts:
        raise ValueError(
            f"{source}: the weights fit, but belong to another network ({'; '.join(conflicts)}); "
            "strict=False loads them all the same"
        )

    for k in state.keys() & own.keys():  # those of a network of another kind, too
        _check_tensor(source, k, state[k], integer=not own[k].is_floating_point())
    wild = _not_finite(source, state, own)
    if wild:
        some = f"{_some(wild)} of {source} {'has' if len(wild) == 1 else 'have'}"
        warnings.warn(f"{some} NaN or infinity, in the type of the network", stacklevel=3)
        notes.append(f"NaN or infinity in {len(wild)} of the tensors: {_some(wild)}")

    model.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)
    model.preset_name = checkpoint.preset_name
    _set_clip(model, checkpoint)
    model.loaded_from = LoadReport(
        layout=checkpoint.layout,
        source=source,
        preset=PRESETS[checkpoint.preset_name],
        num_classes=checkpoint.num_classes,
        head=head_done,
        arch=checkpoint.arch,
        missing=missing,
        unexpected=unexpected,
        notes=notes,
    )
