"""torch's own ways to run a fused convolution: its layers one after the other, oneDNN's and cuDNN's fused ones."""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from r3d_kernels._kernel import Layer, Request, channels_last, describe, is_alias
from r3d_kernels.problems import ConvProblem

__all__ = ["CudnnBnAct", "CudnnFused", "OneDnn", "Stock"]


class OneDnn:
    """oneDNN's convolution as torch ships it, with prepacked weights and a fused residual (a private API of torch).

    Its own ReLU turns NaN into zero (it is max(x, 0)), so torch's follows in place, which keeps it.
    """

    name = "oneDNN"
    backend = "torch"
    copies_weights = True
    private = True  # a torch that changes it must not break us: tried once before it may be chosen
    compared = True  # and held against the stock layers then

    def can_run(self, request: Request) -> str | None:
        if request.device.type != "cpu":
            return f"needs a CPU tensor, got {request.device.type}"
        if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
            return "oneDNN is missing from this torch or switched off"
        if not _onednn_ops():
            return "this torch has no fused oneDNN convolution"
        if request.dtype == torch.bfloat16:
            if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
                return "oneDNN has no bfloat16 on this processor"
            if request.problem.torch_bf16_is_unsafe():
                return "torch's bfloat16 convolution is wrong or corrupts memory here (pytorch#169688 and its kin)"
        elif request.dtype != torch.float32:
            return f"used for float32 and bfloat16 only, got {request.dtype}"
        if request.problem.n == 0:
            return "the batch is empty"
        if request.problem.groups != 1 and request.problem.residual:
            return "torch does not fuse a residual into a grouped convolution"
        return _outside_known(request.problem)

    def pack_key(self, request: Request) -> Hashable:
        p = request.problem
        return request.dtype, p.in_shape, p.stride, p.padding, p.dilation, request.threads

    def pack(self, layer: Layer, request: Request) -> Any:
        p = request.problem
        weight = torch.ops.mkldnn._reorder_convolution_weight(
            layer.folded_weight(request.dtype).contiguous(),
            p.padding,
            p.stride,
            p.dilation,
            p.groups,
            p.in_shape,
        )
        return weight, layer.shift.to(request.dtype)

    def run(self, pack: Any, x: Tensor, residual: Tensor | None, request: Request) -> Tensor:
        p = request.problem
        geometry = (p.padding, p.stride, p.dilation, p.groups)
        x = channels_last(x)
        if residual is None:
            y = torch.ops.mkldnn._convolution_pointwise(x, *pack, *geometry, "none", [], None)
        else:
            y = torch.ops.mkldnn._convolution_pointwise.binary(
                x, channels_last(residual), *pack, *geometry, "add", 1.0, None, [], None
            )
        return y.relu_() if p.activation == "relu" else y


class CudnnBnAct:
    """cuDNN's convolution, then batch norm, residual and ReLU in one pass of our CUDA kernel (csrc/cuda/bn_act.cu)."""

    name = "cuDNN + bn_act"
    backend = "cuda"
    host = 4e-6

    def can_run(self, request: Request) -> str | None:
        if request.device.type != "cuda":
            return f"needs a CUDA tensor, got {request.device.type}"
        if not describe()["cuda_compiled"]:
            return "the CUDA kernels were not compiled (no nvcc at build time)"
        if request.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"has float32, bfloat16 and float16 only, got {request.dtype}"
        return None

    def pack_key(self, request: Request) -> Hashable:
        return request.dtype

    def pack(self, layer: Layer, request: Request) -> Any:
        weight = layer.weight.to(request.dtype).contiguous(memory_format=torch.channels_last_3d)
        scale = torch.ones_like(layer.shift) if layer.scale is None else layer.scale
        return weight, scale.float(), layer.shift.float()

    def run(self, pack: Any, x: Tensor, residual: Tensor | None, request: Request) -> Tensor:
        p = request.problem
        weight, scale, shift = pack
        y = F.conv3d(channels_last(x), weight, None, p.stride, p.padding, p.dilation, p.groups)
        return torch.ops.r3d_kernels.bn_act(y, scale, shift, residual, p.activation or "none")


class CudnnFused:
    """cuDNN's own convolution + bias + residual + ReLU, batch norm folded into weights and bias.

    Folded weights are rounded once more than those of our kernels, less often than the stock layers' activations.
    """

    name = "cuDNN fused"
    backend = "cuda"
    host = 3e-6
    private = True  # has been wrong or missing in releases (pytorch#62926, #163539): tried once
    compared = True  # and held against the stock layers then

    def can_run(self, request: Request) -> str | None:
        p = request.problem
        if request.device.type != "cuda":
            return f"needs a CUDA tensor, got {request.device.type}"
        if torch.version.hip is not None or not hasattr(torch, "cudnn_convolution_add_relu"):
            return "this torch has no fused convolution of cuDNN's"
        if request.dtype not in (torch.bfloat16, torch.float16):
            return f"has bfloat16 and float16 only, got {request.dtype}"
        if p.activation != "relu":
            return "always ends in a ReLU"
        return _outside_known(p)

    def pack_key(self, request: Request) -> Hashable:
        return request.dtype

    def pack(self, layer: Layer, request: Request) -> Any:
        return channels_last(layer.folded_weight(request.dtype)), layer.shift.to(request.dtype)

    def run(self, pack: Any, x: Tensor, residual: Tensor | None, request: Request) -> Tensor:
        p = request.problem
        geometry = (p.stride, p.padding, p.dilation, p.groups)
        if residual is None:
            return torch.cudnn_convolution_relu(channels_last(x), *pack, *geometry)
        weight, shift = pack
        return torch.cudnn_convolution_add_relu(
            channels_last(x), weight, channels_last(residual), 1.0, shift, *geometry
        )


class Stock:
    """torch's own layers, one after the other; takes everything that torch takes."""

    name = "stock"
    backend = "torch"
    host = 6e-6

    def can_run(self, request: Request) -> str | None:
        return None

    def pack_key(self, request: Request) -> Hashable:
        return request.dtype

    def pack(self, layer: Layer, request: Request) -> Any:
        def cast(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().to(request.dtype)

        # batch norm keeps its own dtype: torch mixes float32 statistics with half-precision activations
        return layer.weight.to(request.dtype), cast(layer.conv_bias), layer.norm

    def reads_weight(self, pack: Any, layer: Layer) -> bool:
        return is_alias(pack[0], layer.weight)

    def run(self, pack: Any, x: Tensor, residual: Tensor | None, request: Request) -> Tensor:
        p = request.problem
        weight, bias, norm = pack
        geometry = (p.stride, p.padding, p.dilation, p.groups)
        if x.is_cpu and x.dtype == torch.bfloat16 and p.torch_bf16_is_unsafe():
            wide = None if bias is None else bias.float()
            y = F.conv3d(x.float(), weight.float(), wide, *geometry).to(x.dtype)
        else:
            y = F.conv3d(x, weight, bias, *geometry)
        if norm is not None:
            mean, var, gamma, beta, eps = norm
            y = F.batch_norm(y, mean, var, gamma, beta, False, 0.0, eps)
        if residual is not None:
            y = y.add_(residual)
        return y.relu_() if p.activation == "relu" else y


def _outside_known(p: ConvProblem) -> str | None:
    """None for the geometries that fused library convolutions are known to be right for, or what is outside of them.

    Known for oneDNN by tests/fuzz, not by its documentation; cuDNN's, whose fuzz waits for a GPU, gets no more. Outside
    of these oneDNN returned garbage, read memory that was not its own or ended the process (torch 2.13): with one
    input channel, an output one wide and a stride along the width; with padding, stride and dilation along an axis of
    one tap; with padding of at least the kernel.
    """
    if max(p.dilation) > 1:
        return f"not known to be right with dilation, got {p.dilation}"
    if p.c == 1 or p.k == 1:
        return "not known to be right with one input or output channel"
    if any(2 * pad > f for pad, f in zip(p.padding, p.kernel, strict=True)):
        return f"not known to be right with padding beyond half the kernel {p.kernel}, got {p.padding}"
    sizes = (p.d, p.h, p.w)
    if any(f > size and f != 2 * pad + 1 for f, size, pad in zip(p.kernel, sizes, p.padding, strict=True)):
        return f"not known to be right with a kernel larger than the input {sizes}, got {p.kernel}"
    if any(s > f for s, f in zip(p.stride, p.kernel, strict=True)) and p.kernel != (1, 1, 1):
        return f"not known to be right with a stride beyond the kernel {p.kernel}, got {p.stride}"
    if p.out_size[2] == 1 and p.stride[2] > 1:
        return "not known to be right with an output one wide and a stride along the width"
    return None


@cache
def _onednn_ops() -> bool:
    ops = torch.ops.mkldnn
    names = ("_convolution_pointwise", "_reorder_convolution_weight", "_is_mkldnn_bf16_supported")
    return all(hasattr(ops, name) for name in names) and "binary" in ops._convolution_pointwise.overloads()
