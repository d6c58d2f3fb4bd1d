"""Fused 3-D convolution networks for PyTorch: Conv3d + BatchNorm3d + ReLU (+ residual) in one pass over memory.

import torch, r3d_kernels as r3d

model = r3d.create_model("r3d_18", fused=True).eval()
with torch.inference_mode():
    logits = model(torch.randn(1, 3, 16, 112, 112))  # [N, classes]
"""

from r3d_kernels import backends, models, ops, reference
from r3d_kernels._version import __version__
from r3d_kernels.backends import backend, explain
from r3d_kernels.fusing import fuse, unfuse
from r3d_kernels.models import (
    BasicBlock,
    Bottleneck,
    ResNet,
    ResNet3D,
    Stem,
    conv3x3x3,
    create_model,
    list_models,
    load_checkpoint,
)
from r3d_kernels.nn import ConvBNAct3d
from r3d_kernels.verifying import verify

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "ConvBNAct3d",
    "ResNet",
    "ResNet3D",
    "Stem",
    "__version__",
    "backend",
    "backends",
    "conv3x3x3",
    "create_model",
    "explain",
    "fuse",
    "list_models",
    "load_checkpoint",
    "models",
    "ops",
    "reference",
    "unfuse",
    "verify",
]
