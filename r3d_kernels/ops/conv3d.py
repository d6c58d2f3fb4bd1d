"""conv3d + batch norm + residual + activation in one pass over memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from r3d_kernels import _check, _extension, reference
from r3d_kernels._layer import Norm, state_of_weight
from r3d_kernels.ops._flops import flop_formula

__all__ = [
    "conv3d_bn_act",
    "conv3d_direct",
    "conv3d_keep",
    "conv3d_pack",
    "conv3d_packed",
    "conv3d_stem",
    "conv3d_tiles",
    "conv3d_winograd",
]

TENSORS = (Tensor, torch.nn.Parameter)


def needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def compiles() -> bool:
    """Whether Dynamo traces this call for torch.compile, whose graph takes our operators as they are.

    Not for torch.export: a program has to run without this package, and without what a process remembers of layers.
    """
    # The flag itself: in Dynamo's eyes torch 2.11 exports always.
    return torch.compiler.is_dynamo_compiling() and not getattr(torch.compiler, "_is_exporting_flag", False)


def _has_tangent(t: Tensor | None) -> bool:
    return t is not None and forward_ad.unpack_dual(t).tangent is not None


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether our operators can take the tensors: no fake, functional or subclass tensors, no tracing,
    no forward-mode derivatives, which our operators do not have.

    Under torch.compile they can: Dynamo shows tensors as they will be when its graph runs.
    """
    tracing = torch.compiler.is_compiling()
    if (tracing and not compiles()) or torch.jit.is_tracing():
        return False
    if isinstance(_functorch.peek_interpreter_stack(), _functorch.CInterpreter):  # inside vmap, grad, ...
        return False
    if not tracing and forward_ad._current_level >= 0 and any(map(_has_tangent, tensors)):
        return False
    for t in tensors:  # a loop, not all(): half the time, and this runs for every layer
        if t is None:
            continue
        if type(t) not in TENSORS or t.layout is not torch.strided:
            return False
        # The flags are five times as fast; in a graph each would be a node.
        if not (t.device.type in ("cpu", "cuda") if tracing else t.is_cpu or t.is_cuda):
            return False
    return True


def in_graph(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    conv_bias: Tensor | None,
    norm: Norm | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None,
    clip: tuple[tuple[float, ...] | None, tuple[float, ...] | None, torch.dtype] | None = None,
    pool_frames: int = 0,
) -> Tensor:
    """`LayerState.run` as one node of the graph that Dynamo traces; `clip` is mean, std and dtype of a `ClipSource`."""
    *tensors, eps = norm or (0.0,)
    geometry = (stride, padding, dilation, groups)
    source = clip or (None, None, None)
    return torch.ops.r3d_kernels.conv3d_bn_act(
        x, weight, conv_bias, tensors, eps, residual, *geometry, activation, *source, pool_frames
    )


def conv3d_bn_act(
    x: Tensor,
    weight: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    activation: str | None = "relu",
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """``act(batch_norm(conv3d(x, weight)) + residual)`` with the running statistics, fused.

    The packed weights are kept as long as `weight` lives, and follow changes of any of the parameters. `torch.compile`
    takes it as one operator. Where a gradient is needed, and under `torch.export`, tracing or `vmap`, the same value is
    computed by torch's own operators.

    Args:
        x: [N, C, D, H, W], float32, bfloat16, float16 or float64, any strides; channels_last_3d is the fastest.
        weight: [K, C/groups, T, R, S], dtype of x.
        running_mean, running_var: [K], dtype of x or float32.
        gamma, beta: [K] or None, as running_mean.
        eps: added to running_var.
        residual: [N, K, D', H', W'], dtype of x, or None.
        activation: "relu" or None.
        stride, padding, dilation: an int or three (depth, height, width).
        groups: a divisor of C and K.

    Returns:
        [N, K, D', H', W'] of x's dtype, channels_last_3d.

    Raises:
        TypeError: for a wrong type or a mix of dtypes.
        ValueError: for wrong shapes, an impossible geometry, a mix of devices, an unknown activation.
    """
    _check.tensor(x, "x")
    _check.tensor(weight, "weight")
    if weight.dim() != 5:
        raise ValueError(
            f"weight: expected 5 dimensions [K, C/groups, T, R, S], got shape {list(weight.shape)}"
        )
    k = weight.shape[0]
    _check.activation(activation)
    _check.same_dtype(weight, "weight", x.dtype)
    _check.same_device(weight, "weight", x.device)
    named = {"running_mean": running_mean, "running_var": running_var, "gamma": gamma, "beta": beta}
    for name, t in named.items():
        if t is not None or name.startswith("running"):
            _check.vector(t, name, k, x.device)
            if t.dtype not in (x.dtype, torch.float32):
                raise TypeError(f"{name}: expected {x.dtype} or torch.float32, got {t.dtype}")
    if not isinstance(eps, (int, float)) or not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps!r}")
    geometry = (
        _check.triple(stride, "stride"),
        _check.triple(padding, "padding"),
        _check.triple(dilation, "dilation"),
    )
    if residual is not None:
        _check.tensor(residual, "residual")
        _check.same_dtype(residual, "residual", x.dtype)
        _check.same_device(residual, "residual", x.device)
    everything = (x, weight, running_mean, running_var, gamma, beta, residual)
    if not is_plain(*everything) or needs_gradient(*everything):
        return reference.conv3d_bn_act(
            x,
            weight,
            running_mean,
            running_var,
            gamma,
            beta,
            float(eps),
            residual=residual,
            activation=activation,
            stride=geometry[0],
            padding=geometry[1],
            dilation=geometry[2],
            groups=groups,
        )
    norm = (running_mean, running_var, gamma, beta, float(eps))
    run = in_graph if compiles() else state_of_weight(weight).run
    return run(x, residual, weight, None, norm, *geometry, groups, activation)


def conv3d_pack(
    weight: Tensor,
    scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Weights laid out for this processor's direct kernel.

    Args:
        weight: [K, C, T, R, S], any floating dtype, CPU.
        scale: float64 [K], multiplied into the weights in float64 (gamma / sqrt(running_var + eps)), or None.
        dtype: of the activations it will be used with: float32 or bfloat16; weight's own by default.

    Returns:
        An opaque uint8 tensor for `conv3d_packed`; it names the instruction set it was made for.

    Raises:
        RuntimeError: for wrong shapes or dtypes.
    """
    return _extension.ops().conv3d_pack(weight, scale, dtype or weight.dtype)


def conv3d_packed(
    x: Tensor,
    packed: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    out_channels: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    activation: str | None = "relu",
) -> Tensor:
    """``act(conv3d(x, weight) + bias + residual)`` with weights from `conv3d_pack`: the bare kernel, no choice made.

    Args:
        x: [N, C, D, H, W], float32 or bfloat16, CPU; made channels_last_3d if it is not.
        packed: what `conv3d_pack` returned for x's dtype.
        bias: float32 [K].
        residual: [N, K, D', H', W'], dtype of x, or None.
        out_channels, kernel_size: K and (T, R, S) of the weight that was packed.

    Returns:
        [N, K, D', H', W'] of x's dtype, channels_last_3d. No gradient flows.

    Raises:
        TypeError, ValueError, RuntimeError: for arguments that do not fit together.
    """
    return _extension.ops().conv3d_bias_act(
        x,
        packed,
        bias,
        residual,
        out_channels,
        _check.triple(kernel_size, "kernel_size"),
        _check.triple(stride, "stride"),
        _check.triple(padding, "padding"),
        _check.triple(dilation, "dilation"),
        _check.activation(activation),
    )


def conv3d_tiles(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    activation: str | None = "relu",
    slices: int | None = None,
    tile: Sequence[int] = (1, 1, 1),
) -> Tensor:
    """``act(conv3d(x, weight) * scale + bias + residual)`` on matrix tiles of bfloat16 products; nothing is packed.

    float32 operands are split into bfloat16 slices whose products are exact in float32 (Henry, Tang, Heinecke, ARITH
    2019). Runs on AMX; with R3D_KERNELS_ISA below "amx", and on processors without it, in plain loops that are only
    meant for tests.

    Args:
        x: [N, C, D, H, W], float32 or bfloat16, CPU; made channels_last_3d if it is not.
        weight: [K, C, T, R, S], dtype of x, contiguous or channels_last_3d (copied otherwise).
        bias: float32 [K].
        scale: float32 [K], applied to the float32 sums, or None.
        residual: [N, K, D', H', W'], dtype of x, or None.
        slices: of every float32 operand: 3 (six products, error of float32), 2 (three products, about 4e-6) or 1
            (bfloat16 products); 3 by default. 1 for bfloat16.
        tile: outputs of a Winograd tile along depth, height and width: [1, 1, 1], [2, 1, 1], [4, 1, 1], [1, 2, 1],
            [1, 4, 1], [2, 2, 1] or [4, 2, 1]. Axes with more than one need a kernel of 3, stride 1 and dilation 1.

    Returns:
        [N, K, D', H', W'] of x's dtype, channels_last_3d. No gradient flows.

    Raises:
        TypeError, ValueError, RuntimeError: for arguments that do not fit together.
    """
    return _extension.ops().conv3d_tiles(
        x,
        weight,
        scale,
        bias,
        residual,
        _check.triple(stride, "stride"),
        _check.triple(padding, "padding"),
        _check.triple(dilation, "dilation"),
        _check.activation(activation),
        slices if slices is not None else 1 if x.dtype == torch.bfloat16 else 3,
        list(tile),
    )


def conv3d_direct(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    activation: str | None = "relu",
    kept: Tensor | None = None,
) -> Tensor:
    """``act(conv3d(x, weight) * scale + bias + residual)`` on the vector unit, from the parameter itself.

    The weights are turned for the kernel at every call: at most 8 MiB of them exist a second time, and only while the
    call lasts. With `kept` weights they are not: sooner, and rounded otherwise (longer sums).

    Args:
        x: [N, C, D, H, W], float32 or bfloat16, CPU; made channels_last_3d if it is not.
        weight: [K, C, T, R, S], dtype of x, contiguous or channels_last_3d (copied otherwise).
        bias: float32 [K].
        scale: float32 [K], applied to the float32 sums, or None.
        residual: [N, K, D', H', W'], dtype of x, or None.
        stride, padding, dilation: an int or three (depth, height, width).
        activation: "relu" or None.
        kept: what `conv3d_keep` made of the same weight for the same geometry, or None. It follows no change of weight.

    Returns:
        [N, K, D', H', W'] of x's dtype, channels_last_3d. No gradient flows.

    Raises:
        TypeError, ValueError, RuntimeError: for arguments that do not fit together.
    """
    return _extension.ops().conv3d_direct(
        x,
        weight,
        scale,
        bias,
        residual,
        _check.triple(stride, "stride"),
        _check.triple(padding, "padding"),
        _check.triple(dilation, "dilation"),
        _check.activation(activation),
        kept,
    )


def conv3d_keep(
    weight: Tensor,
    in_shape: Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Weights turned once for `conv3d_direct`: worth it where few output pixels share them.

    With at most 512 output pixels, planes of taps (along depth) that only meet padding are left out: a 3x3x3 kernel on
    one frame keeps a third.

    Args:
        weight: [K, C, T, R, S], float32 or bfloat16, CPU, contiguous or channels_last_3d (copied otherwise).
        in_shape: [N, C, D, H, W] of the input that they are for.
        stride, padding, dilation: an int or three (depth, height, width).

    Returns:
        An opaque uint8 tensor [bytes]; empty where the kernel has no use for one: no output pixels, bfloat16 without
            AVX-512 BF16, more than 16 taps along depth with at most 512 pixels.

    Raises:
        TypeError, ValueError, RuntimeError: for arguments that do not fit together.
    """
    return _extension.ops().conv3d_keep(
        weight,
        list(in_shape),
        _check.triple(stride, "stride"),
        _check.triple(padding, "padding"),
        _check.triple(dilation, "dilation"),
    )


def conv3d_stem(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    activation: str | None = "relu",
    tile: int = 4,
    row_tile: int = 1,
) -> Tensor:
    """``act(conv3d(x, weight) * scale + bias + residual)`` for stems: at most four input channels; nothing is packed.

    `tile` output frames are computed together from fewer multiplications along depth: Toom-Cook / Winograd minimal
    filtering (Winograd 1980; Lavin & Gray, CVPR 2016) in float32, of ``taps = ceil(T / stride)`` taps. Seven taps and
    tiles of 4 take 10 products in place of 28. With `row_tile` output rows together, seven rows with a stride of 2 are
    four taps on the even input rows and three on the odd ones: 13 products in place of 28 for tiles of 4. Width is
    direct. A NaN or infinity may spread over the frames and rows of its tile.

    Args:
        x: [N, C, D, H, W], C <= 4, float32 or bfloat16, CPU; contiguous and channels_last_3d are read as they are.
        weight: [K, C, T, R, S], dtype of x, contiguous or channels_last_3d (copied otherwise). T is 1 or 3 to 7,
            or 5 to 7 with a stride of 2 along depth.
        bias: float32 [K].
        scale: float32 [K], applied to the float32 sums, or None.
        residual: [N, K, D', H', W'], dtype of x, or None.
        stride: an int or three (depth, height, width); 1 or 2 along depth.
        padding: an int or three.
        tile: output frames of a tile: 2 or 4, also 8 for 3 or 4 taps, and 6 for 5 or 7; 1 for one tap. The larger, the
            fewer multiplications and the larger the error; csrc/cpu/stem.h has a table.
        row_tile: output rows of a tile: 1, or 2 or 4 for a kernel of 7 with a stride of 2 along height.

    Returns:
        [N, K, D', H', W'] of x's dtype, channels_last_3d. No gradient flows.

    Raises:
        TypeError, ValueError, RuntimeError: for arguments that do not fit together.
    """
    return _extension.ops().conv3d_stem(
        x,
        weight,
        scale,
        bias,
        residual,
        _check.triple(stride, "stride"),
        _check.triple(padding, "padding"),
        _check.activation(activation),
        tile,
        row_tile,
    )


def conv3d_winograd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    activation: str | None = "relu",
    tile: Sequence[int] = (2, 2, 2),
) -> Tensor:
    """``act(conv3d(x, weight) * scale + bias + residual)`` for 3-tap kernels of stride 1 or 2, in fewer products.

    Winograd / Toom-Cook minimal filtering along every axis that has a kernel (Lavin & Gray, CVPR 2016; Jia et al.,
    PPoPP 2018) in float32; the weights are transformed at every call, nothing is packed. A NaN or infinity may spread
    over its tile.

    Args:
        x: [N, C, D, H, W], float32 or bfloat16, CPU; made channels_last_3d if it is not.
        weight: [K, C, T, R, S], dtype of x, contiguous or channels_last_3d (copied otherwise).
        bias: float32 [K].
        scale: float32 [K], applied to the float32 sums, or None.
        residual: [N, K, D', H', W'], dtype of x, or None.
        stride: 1, or 2 along every axis that has a kernel, 3x3x3 or (1,3,3): the even inputs are then a convolution of
            two taps, the odd ones of one.
        padding: an int or three (depth, height, width).
        tile: outputs of a tile along depth, height and width: [2, 2, 2], [2, 4, 4] or [4, 4, 4] for 3x3x3, [1, 2, 2]
            or [1, 4, 4] for (1,3,3), [2, 1, 1] or [4, 1, 1] for (3,1,1). The larger, the fewer multiplications and the
            larger the error (about 3e-7 with twos, 1.3e-6 with fours). With a stride of 2 [2, 2, 2] or [4, 2, 2], and
            [1, 2, 2] or [1, 4, 4] (error about 3e-7).

    Returns:
        [N, K, D', H', W'] of x's dtype, channels_last_3d. No gradient flows.

    Raises:
        TypeError, ValueError, RuntimeError: for arguments that do not fit together.
    """
    return _extension.ops().conv3d_winograd(
        x,
        weight,
        scale,
        bias,
        residual,
        _check.triple(stride, "stride"),
        _check.triple(padding, "padding"),
        _check.activation(activation),
        list(tile),
    )


def empty_output(
    x: Tensor,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dtype: torch.dtype | None = None,
) -> Tensor:
    """What the fakes return; `dtype` is x's by default."""
    size = [
        (i + 2 * p - d * (f - 1) - 1) // s + 1
        for i, f, s, p, d in zip(x.shape[2:], kernel_size, stride, padding, dilation, strict=True)
    ]
    return torch.empty(
        (x.shape[0], out_channels, *size),
        dtype=dtype or x.dtype,
        device=x.device,
        memory_format=torch.channels_last_3d,
    )


if _extension.error is None:

    @torch.library.register_fake("r3d_kernels::conv3d_tiles")
    def _(
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor,
        residual: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        activation: str,
        slices: int,
        tile: Sequence[int],
    ) -> Tensor:
        torch._check(x.dim() == 5, lambda: f"x: expected 5 dimensions [N, C, D, H, W], got shape {x.shape}")
        return empty_output(x, weight.shape[0], weight.shape[2:], stride, padding, dilation)

    @torch.library.register_fake("r3d_kernels::conv3d_direct")
    def _(
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor,
        residual: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        activation: str,
        kept: Tensor | None = None,
    ) -> Tensor:
        torch._check(x.dim() == 5, lambda: f"x: expected 5 dimensions [N, C, D, H, W], got shape {x.shape}")
        return empty_output(x, weight.shape[0], weight.shape[2:], stride, padding, dilation)

    @torch.library.register_fake("r3d_kernels::conv3d_stem")
    def _(
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor,
        residual: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        activation: str,
        tile: int,
        row_tile: int = 1,
    ) -> Tensor:
        torch._check(x.dim() == 5, lambda: f"x: expected 5 dimensions [N, C, D, H, W], got shape {x.shape}")
        return empty_output(x, weight.shape[0], weight.shape[2:], stride, padding, (1, 1, 1))

    @torch.library.register_fake("r3d_kernels::conv3d_winograd")
    def _(
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor,
        residual: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        activation: str,
        tile: Sequence[int],
    ) -> Tensor:
        torch._check(x.dim() == 5, lambda: f"x: expected 5 dimensions [N, C, D, H, W], got shape {x.shape}")
        return empty_output(x, weight.shape[0], weight.shape[2:], stride, padding, (1, 1, 1))

    @torch.library.register_fake("r3d_kernels::conv3d_pack")
    def _(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        # The size depends on the processor: a fake tensor knows it only as an unbacked integer.
        size = torch.library.get_ctx().new_dynamic_size()
        return weight.new_empty(size, dtype=torch.uint8)

    @torch.library.register_fake("r3d_kernels::conv3d_keep")
    def _(
        weight: Tensor,
        in_shape: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> Tensor:
        size = torch.library.get_ctx().new_dynamic_size()
        return weight.new_empty(size, dtype=torch.uint8)

    @torch.library.register_fake("r3d_kernels::conv3d_bias_act")
    def _(
        x: Tensor,
        packed: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        out_channels: int,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        activation: str,
    ) -> Tensor:
        torch._check(x.dim() == 5, lambda: f"x: expected 5 dimensions [N, C, D, H, W], got shape {x.shape}")
        return empty_output(x, out_channels, kernel_size, stride, padding, dilation)

    @flop_formula(
        [
            torch.ops.r3d_kernels.conv3d_direct,
            torch.ops.r3d_kernels.conv3d_stem,
            torch.ops.r3d_kernels.conv3d_tiles,
            torch.ops.r3d_kernels.conv3d_winograd,
        ]
    )
    def _flops_of_parameter(x, weight, *args, out_shape=None, **kwargs) -> int:
        return 2 * math.prod(weight[1:]) * math.prod(out_shape)

    @flop_formula(torch.ops.r3d_kernels.conv3d_bias_act)
    def _flops(x, packed, bias, residual, k, kernel, *args, out_shape=None, **kwargs) -> int:
        macs = x[1] * kernel[0] * kernel[1] * kernel[2]
        for size in out_shape:
            macs *= size
        return 2 * macs
