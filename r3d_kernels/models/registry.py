"""Networks by name.

* ``r3d_{depth}``: torchvision's network (Tran et al., CVPR 2018), 400 classes; it has depth 18 itself.
* ``r2plus1d_18``, ``mc3_18``: torchvision's other two, factored and mixed convolutions (the same paper).
* ``hara_r3d_{depth}``: the network of 3D-ResNets-PyTorch (Hara et al., CVPR 2018), 400 classes.
* ``seed_r3d_{depth}``: the simplified stem, 1000 classes.
* ``medicalnet_r3d_{depth}``: MedicalNet's encoder (Chen, Ma, Zheng: "Med3D", 2019), one channel, no head.
"""

from __future__ import annotations

import difflib
import fnmatch
import os
from collections.abc import Mapping
from typing import Any

from r3d_kernels.models.checkpoint import (
    MEDICALNET_CONFIG,
    PRESETS,
    Checkpoint,
    keep_clip_arguments,
    load_checkpoint,
    read_checkpoint,
)
from r3d_kernels.models.resnet import DEPTHS, ResNet3D

__all__ = ["create_model", "list_models"]

# Family to (preset, arguments of ResNet3D).
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "r3d": ("torchvision", {"stem": "torchvision", "num_classes": 400}),
    "hara_r3d": ("hara", {"stem": "hara", "num_classes": 400}),
    "seed_r3d": ("hara", {"stem": "seed18", "num_classes": 1000}),
    "medicalnet_r3d": ("medicalnet", {**MEDICALNET_CONFIG, "in_channels": 1, "num_classes": 0}),
}

_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    f"{family}_{depth}": (preset, {**config, "depth": depth})
    for family, (preset, config) in _FAMILIES.items()
    for depth in DEPTHS
}
_MODELS["r2plus1d_18"] = (
    "torchvision",
    {"stem": "r2plus1d", "convolutions": "2+1d", "num_classes": 400, "depth": 18},
)
_MODELS["mc3_18"] = (
    "torchvision",
    {"stem": "torchvision", "convolutions": ("3d", "2d", "2d", "2d"), "num_classes": 400, "depth": 18},
)
for _depth in (18, 34):  # MedicalNet trained these two with shortcut A, the others with B
    _MODELS[f"medicalnet_r3d_{_depth}"][1]["shortcut_type"] = "A"


def list_models(pattern: str | None = None) -> list[str]:
    """The names that :func:`create_model` knows, in order of family and depth.

    Args:
        pattern: shell pattern (``"hara_*"``, ``"*_18"``) to choose by.
    """
    return [name for name in _MODELS if pattern is None or fnmatch.fnmatchcase(name, pattern)]


def preset_name(name: str) -> str:
    """The key in PRESETS for a name of :func:`list_models`, or for a key itself."""
    if name in PRESETS:
        return name
    if name not in _MODELS:
        raise ValueError(_unknown(name))
    return _MODELS[name][0]


def _unknown(name: object) -> str:
    close = difflib.get_close_matches(str(name), _MODELS, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "list_models() has all names"
    return f"name: unknown model {name!r}; {hint}"


def create_model(
    name: str,
    weights: str | os.PathLike[str] | Mapping[str, Any] | Checkpoint | None = None,
    num_classes: int | None = None,
    fused: bool = False,
    **overrides: Any,
) -> ResNet3D:
    """A network by name, with weights when a checkpoint is given.

    Args:
        name: one of :func:`list_models`.
        weights: path of a checkpoint in any layout that :func:`load_checkpoint` reads, or a state dict.
            Nothing is downloaded. ``None`` starts from random weights.
        num_classes: size of the head; ``None`` is that of the weights, or of the named network. Where the
            weights have another number, the rest is loaded and the head starts anew.
        fused: whether the layers may run fused.
        **overrides: further arguments of :class:`ResNet3D` (``in_channels``, ``shortcut_type``, ...).

    Returns:
        The network, in training mode as every new module.

    Raises:
        ValueError: unknown name (with the closest ones), or weights that do not fit.
        FileNotFoundError: no file at `weights`.
        TypeError: an override that :class:`ResNet3D` does not have.
    """
    if name not in _MODELS:
        raise ValueError(_unknown(name))
    preset_key, config = _MODELS[name]
    config = {**config, **overrides}
    checkpoint = None if weights is None else read_checkpoint(weights)
    if num_classes is not None:
        config["num_classes"] = num_classes
    elif checkpoint is not None:
        config["num_classes"] = checkpoint.num_classes
    model = ResNet3D(fused=fused, **config)
    model.preset_name = preset_key
    if checkpoint is not None:
        load_checkpoint(model, checkpoint, num_classes=num_classes)
        keep_clip_arguments(model, overrides)
    return model
