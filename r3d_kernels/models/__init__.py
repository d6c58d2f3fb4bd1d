"""Networks: `ResNet3D`, the 2018 `ResNet`, a registry by name, and the checkpoints of other projects."""

from r3d_kernels.models.checkpoint import (
    PRESETS,
    Checkpoint,
    LoadReport,
    Preset,
    load_checkpoint,
    preset,
    read_checkpoint,
)
from r3d_kernels.models.registry import create_model, list_models
from r3d_kernels.models.resnet import (
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

__all__ = [
    "DEPTHS",
    "PRESETS",
    "STEMS",
    "BasicBlock",
    "Bottleneck",
    "Checkpoint",
    "LoadReport",
    "Pool",
    "Preset",
    "ResNet",
    "ResNet3D",
    "ShortcutA",
    "Stem",
    "conv3x3x3",
    "create_model",
    "list_models",
    "load_checkpoint",
    "preset",
    "read_checkpoint",
]
