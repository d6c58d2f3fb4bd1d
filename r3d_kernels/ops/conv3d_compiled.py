"""`torch.ops.r3d_kernels.conv3d_bn_act`: a fused layer as one node of a graph of torch.compile.

It is opaque, and does when the graph runs what an eager call does: the kernel is chosen, measured and remembered then,
for the backend that is asked for then. `in_graph` calls it; nothing here is for users.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from r3d_kernels._layer import state_of_weight
from r3d_kernels._sm90_stem import WINDOWS
from r3d_kernels.ops._flops import flop_formula
from r3d_kernels.ops.clip import ClipSource
from r3d_kernels.ops.conv3d import empty_output

_library = torch.library.Library("r3d_kernels", "FRAGMENT")  # `custom_op` would add Python to every call
_library.define(
    # norm: mean, var, gamma, beta, or nothing; the clip's numbers as in ClipSource.of, where x is a raw one;
    # pool_frames: a key of _sm90_stem.WINDOWS, the max-pool behind the layer, or 0
    "conv3d_bn_act(Tensor x, Tensor weight, Tensor? conv_bias, Tensor?[] norm, float eps, Tensor? residual, "
    "int[] stride, int[] padding, int[] dilation, int groups, str? activation, "
    "float[]? clip_mean, float[]? clip_std, ScalarType? clip_dtype, int pool_frames=0) -> Tensor",
    # inductor's own CUDA graphs leave it out: they would hold weights packed before, and nobody would look at a replay
    # whether the parameters have changed since (GraphedModel does).
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe),
)


def _run(
    x: Tensor,
    weight: Tensor,
    conv_bias: Tensor | None,
    norm: Sequence[Tensor | None],
    eps: float,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None,
    clip_mean: Sequence[float] | None,
    clip_std: Sequence[float] | None,
    clip_dtype: torch.dtype | None,
    pool_frames: int = 0,
) -> Tensor:
    source = None
    if clip_dtype is not None:
        means, stds = (None if values is None else tuple(values) for values in (clip_mean, clip_std))
        source = ClipSource.of(x, means, stds, clip_dtype)
    geometry = (tuple(stride), tuple(padding), tuple(dilation), groups)
    batch_norm = (*norm, eps) if norm else None
    y = state_of_weight(weight).run(
        x, residual, weight, conv_bias, batch_norm, *geometry, activation, source, pool_frames
    )
    # As the fake has promised: stock layers keep the input's format, and a kernel may leave gaps between pixels.
    y = y.contiguous(memory_format=torch.channels_last_3d)
    _, k, d, h, w = y.shape
    strides = (d * h * w * k, 1, h * w * k, w * k, k)  # torch has others where a size is 1
    return y if y.stride() == strides else y.as_strided(y.shape, strides)


for _key in ("CPU", "CUDA"):
    _library.impl("conv3d_bn_act", _run, _key)


@torch.library.register_fake("r3d_kernels::conv3d_bn_act", lib=_library)
def _(
    x: Tensor,
    weight: Tensor,
    conv_bias: Tensor | None,
    norm: Sequence[Tensor | None],
    eps: float,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None,
    clip_mean: Sequence[float] | None,
    clip_std: Sequence[float] | None,
    clip_dtype: torch.dtype | None,
    pool_frames: int = 0,
) -> Tensor:
    torch._check(x.dim() == 5, lambda: f"x: expected 5 dimensions [N, C, D, H, W], got shape {x.shape}")
    y = empty_output(x, weight.shape[0], weight.shape[2:], stride, padding, dilation, clip_dtype)
    if not pool_frames:
        return y
    kernel, *steps = WINDOWS[pool_frames]
    return empty_output(y, y.shape[1], kernel, *steps, (1, 1, 1))


@flop_formula(torch.ops.r3d_kernels.conv3d_bn_act)
def _flops(
    x, weight, bias, norm, eps, residual, stride, padding, dilation, *args, out_shape=None, **kwargs
) -> int:
    # The output's shape would be that behind a max-pool.
    sizes = zip(x[2:], weight[2:], stride, padding, dilation, strict=True)
    outputs = [(i + 2 * p - step * (f - 1) - 1) // s + 1 for i, f, s, p, step in sizes]
    return 2 * x[0] * math.prod(weight) * math.prod(outputs)
