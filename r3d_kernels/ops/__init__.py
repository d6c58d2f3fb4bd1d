"""The fused operations in functional form."""

from r3d_kernels.ops import (  # noqa: F401 - they register operators, fakes
    conv3d_compiled,
    conv3d_sm80,
    conv3d_sm90,
    conv3d_sm90_stem,
)
from r3d_kernels.ops.clip import clip_channels_last
from r3d_kernels.ops.conv3d import (
    conv3d_bn_act,
    conv3d_direct,
    conv3d_keep,
    conv3d_pack,
    conv3d_packed,
    conv3d_stem,
    conv3d_tiles,
    conv3d_winograd,
)
from r3d_kernels.ops.head import avg_pool_linear
from r3d_kernels.ops.norm import bn_act
from r3d_kernels.ops.pool import max_pool3d

__all__ = [
    "avg_pool_linear",
    "bn_act",
    "clip_channels_last",
    "conv3d_bn_act",
    "conv3d_direct",
    "conv3d_keep",
    "conv3d_pack",
    "conv3d_packed",
    "conv3d_stem",
    "conv3d_tiles",
    "conv3d_winograd",
    "max_pool3d",
]
