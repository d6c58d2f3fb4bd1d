"""The fused operations in functional form."""

from r3d_kernels.ops.conv3d import conv3d_bn_act, conv3d_pack, conv3d_packed
from r3d_kernels.ops.head import avg_pool_linear
from r3d_kernels.ops.norm import bn_act
from r3d_kernels.ops.pool import max_pool3d

__all__ = ["avg_pool_linear", "bn_act", "conv3d_bn_act", "conv3d_pack", "conv3d_packed", "max_pool3d"]
