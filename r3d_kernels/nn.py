"""Fused layers: what a block of a network calls, and the same as a module."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.nn.modules import module as _module

from r3d_kernels import _check, _extension
from r3d_kernels._layer import ATTRIBUTE, plan_key, state_of
from r3d_kernels._pooled import frames_of
from r3d_kernels.backends import Kernel, current_backend
from r3d_kernels.ops.clip import ClipSource, Values, normalized_clip
from r3d_kernels.ops.conv3d import TENSORS, compiles, in_graph, is_plain, needs_gradient
from r3d_kernels.ops.head import avg_pool_linear as _avg_pool_linear
from r3d_kernels.ops.pool import max_pool3d as _max_pool3d
from r3d_kernels.triton.backend import why_not_here

__all__ = ["ConvBNAct3d", "avg_pool_linear", "clip_conv_bn_act", "conv_bn_act", "max_pool3d"]

_NORMS = (nn.BatchNorm3d, nn.SyncBatchNorm)


# What torch's classes do, to see whether somebody has replaced it since.
_Conv3d = nn.Conv3d
_CALL, _CONV, _CONV_INNER = nn.Module.__call__, nn.Conv3d.forward, nn.Conv3d._conv_forward
_NORM_FORWARDS = tuple(norm.forward for norm in _NORMS)
# Hooks on every module there is: the dictionaries themselves, which torch fills in place.
_FORWARD_HOOKS, _FORWARD_PRE_HOOKS = _module._global_forward_hooks, _module._global_forward_pre_hooks
_BACKWARD_HOOKS, _BACKWARD_PRE_HOOKS = _module._global_backward_hooks, _module._global_backward_pre_hooks


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to see the module's calls, or has put a forward of their own into the instance.

    Accelerate, LoRA and calibration tools work that way: the module itself has to be called.
    """
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or "_conv_forward" in own
        or _FORWARD_HOOKS
        or _FORWARD_PRE_HOOKS
        or _BACKWARD_HOOKS
        or _BACKWARD_PRE_HOOKS
    )


def _is_plain_conv(cls: type[nn.Module]) -> bool:
    """Whether it is a convolution as torch runs it: torchvision's are a subclass with a name for their stride."""
    return (
        issubclass(cls, nn.Conv3d)
        and cls.forward is _CONV
        and cls._conv_forward is _CONV_INNER
        and cls.__call__ is _CALL
    )


def _is_plain_norm(cls: type[nn.Module]) -> bool:
    return cls in _NORMS and cls.__call__ is _CALL and cls.forward in _NORM_FORWARDS


def _is_parametrized(module: nn.Module) -> bool:
    return "parametrizations" in module._modules  # hasattr would raise and catch, at every call


# ------------------------------------------------------------------------------------------- who looks on (`verify`)


class LayerCall(NamedTuple):
    """A call of `conv_bn_act`, or of `clip_conv_bn_act` where `clip` is given, before it runs."""

    x: Tensor  # [N, C, D, H, W]
    conv: nn.Conv3d
    bn: nn.BatchNorm3d | None
    activation: str | None
    residual: Tensor | None
    pool: nn.MaxPool3d | None
    fused: bool
    clip: tuple[Values | None, Values | None] | None = None  # x is a raw clip: mean and std

    def run(self) -> Tensor:
        how = {"activation": self.activation, "pool": self.pool, "fused": self.fused}
        if self.clip is not None:
            return clip_conv_bn_act(self.x, *self.clip, self.conv, self.bn, **how)
        return conv_bn_act(self.x, self.conv, self.bn, residual=self.residual, **how)

    def why_stock(self) -> str | None:
        """Why the modules themselves run, or None."""
        if not self.fused:
            return "fused=False"
        return _why_stock(self.x, self.conv, self.bn, self.residual)

    def dtype(self) -> torch.dtype:
        """The dtype that the layer computes in."""
        if self.clip is None:
            return _compute_dtype(self.x)
        kind = self.x.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.conv.weight.dtype

    def kernel(self) -> Kernel | None:
        """The kernel of a fused call that has just run; None where nobody knows."""
        own = self.conv
        geometry = (own.stride, own.padding, own.dilation, own.groups)
        key = plan_key(self.x, self.dtype(), self.residual, *geometry, self.activation)
        pool_frames = 0 if self.pool is None else _joined_frames(self.x, self.pool)
        return state_of(own).planned((*key, pool_frames) if pool_frames else key)


# Runs every call of a layer itself, in this thread or task only.
_observer: ContextVar[Callable[[LayerCall], Tensor] | None] = ContextVar("r3d_kernels_observer", default=None)


@contextlib.contextmanager
def observed_by(observer: Callable[[LayerCall], Tensor] | None) -> Iterator[None]:
    """Hands the layers' calls inside the block to `observer`, which runs them and returns what they return."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def _observed(observer: Callable[[LayerCall], Tensor], call: LayerCall) -> Tensor:
    with observed_by(None):  # what it runs is not to come back to it
        return observer(call)


# ---------------------------------------------------------------------------------------------------------- the layers


_MISSING = object()  # no tensor: taken out of a module's parameters


def _settled(
    x: Tensor,
    conv: nn.Conv3d,
    bn: nn.Module | None,
    activation: str | None,
    residual: Tensor | None,
    pool_frames: int,
) -> Tensor | None:
    """The result where an earlier call has chosen the kernel and all is as it was then; else None.

    Asks no less than the long way does (`_why_stock`, `conv_bn_act` behind it, `LayerState.run`), but only for the
    answers of plain inference: every layer of every pass comes here, and a GPU may need less time for a layer than
    Python. Modules' dicts are read directly, which is several times faster than their attributes.
    """
    own, cls = conv.__dict__, type(conv)
    state = own.get(ATTRIBUTE)
    if (
        state is None
        or state.owner is None  # a copy belongs to nobody yet
        or (cls is not _Conv3d and not issubclass(cls, _Conv3d))  # `_is_plain_conv`
        or cls.forward is not _CONV
        or cls._conv_forward is not _CONV_INNER
        or cls.__call__ is not _CALL
        or own["_modules"]  # parametrized
        or own["_forward_hooks"]  # `has_hooks`, but for backward hooks: no gradient is asked for here
        or own["_forward_pre_hooks"]
        or "forward" in own
        or "_conv_forward" in own
        or _FORWARD_HOOKS
        or _FORWARD_PRE_HOOKS
        or own["padding_mode"] != "zeros"
        or type(x) not in TENSORS
        or x.layout is not torch.strided
        or torch.jit.is_tracing()
        or _functorch.peek_interpreter_stack() is not None  # inside vmap, grad, ...
        or forward_ad._current_level >= 0
    ):
        return None
    parameters = own["_parameters"]
    weight, bias = parameters.get("weight"), parameters.get("bias", _MISSING)
    if type(weight) not in TENSORS or (bias is not None and type(bias) not in TENSORS):
        return None
    norm = None
    if bn is not None:
        own_bn = bn.__dict__
        if (
            type(bn) not in _NORMS
            or type(bn).forward not in _NORM_FORWARDS
            or type(bn).__call__ is not _CALL
            or own_bn["training"]
            or own_bn["_modules"]
            or own_bn["_forward_hooks"]
            or own_bn["_forward_pre_hooks"]
            or "forward" in own_bn
        ):
            return None
        affine, statistics = own_bn["_parameters"], own_bn["_buffers"]
        mean, var = statistics.get("running_mean"), statistics.get("running_var")
        gamma, beta = affine.get("weight", _MISSING), affine.get("bias", _MISSING)
        if type(mean) not in TENSORS or type(var) not in TENSORS:
            return None
        if gamma is not None and (type(gamma) not in TENSORS or type(beta) not in TENSORS):
            return None
        norm = (mean, var, gamma, beta, own_bn["eps"])

    device, dtype = x.device, x.dtype
    if residual is not None and (
        type(residual) not in TENSORS
        or residual.layout is not torch.strided
        or residual.dtype is not dtype
        or residual.device != device
    ):
        return None
    if not x.is_cuda and not x.is_cpu:
        return None
    if torch.is_autocast_enabled("cuda" if x.is_cuda else "cpu"):
        dtype = _compute_dtype(x)
        if dtype is not x.dtype:
            x = x.to(dtype)
            residual = None if residual is None else residual.to(dtype)
    elif weight.dtype is not dtype:
        return None
    if weight.device != device:
        return None

    snapshot = state.current(weight, bias, norm)
    if snapshot is None:
        return None
    key = plan_key(
        x, dtype, residual, own["stride"], own["padding"], own["dilation"], own["groups"], activation
    )
    plan = snapshot.plans.get((*key, pool_frames) if pool_frames else key)
    if plan is None:
        return None
    kernel, pack, request, choice = plan
    if choice.look_again is not None and choice.doubtful():
        return None
    return kernel.run(pack, x, residual, request)


# Modules' dicts are read directly here too, where a graph of torch.compile or a first call comes by.
def _why_stock(x: Tensor, conv: nn.Conv3d, bn: nn.Module | None, residual: Tensor | None) -> str | None:
    """Why this layer has to go through its stock modules, or None: whatever is not as torch makes it is theirs."""
    if not _is_plain_conv(type(conv)) or _is_parametrized(conv):
        return "the convolution is a subclass with a forward of its own, or parametrized"
    if has_hooks(conv) or (bn is not None and has_hooks(bn)):
        return "a hook wants to see the intermediate result, or a forward was replaced"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"padding {conv.padding!r} of mode {conv.padding_mode!r}"
    weight = conv._parameters.get("weight")
    if weight is None or "bias" not in conv._parameters:
        return "weight or bias of the convolution is no parameter"
    parameters = [weight, conv._parameters["bias"]]
    if bn is not None:
        if not _is_plain_norm(type(bn)) or _is_parametrized(bn):
            return f"the norm is a {type(bn).__name__}"
        affine, statistics = bn._parameters, bn._buffers
        if "running_mean" not in statistics or "running_var" not in statistics:
            return "a statistic of the norm is no buffer"
        mean, var = statistics["running_mean"], statistics["running_var"]
        if bn.training or (mean is None and var is None):
            return "batch norm uses the statistics of the batch"
        if mean is None or var is None:
            return "the norm has one statistic only"
        if "weight" not in affine or "bias" not in affine:
            return "weight or bias of the norm is no parameter"
        parameters += (affine["weight"], affine["bias"], mean, var)
    if not is_plain(x, residual, *parameters):
        return "tracing, a forward-mode derivative, or tensors without data of their own"
    if x.dim() == 4 and bn is None and residual is None:
        return "x has no batch axis"
    for t in parameters[1:]:
        if t is None:
            continue
        if t.dim() != 1 or t.shape[0] != weight.shape[0]:
            return "the norm, or the bias, is for another number of channels"
        if t.dtype is not torch.float32 and t.dtype is not weight.dtype:
            return f"a parameter or statistic is {t.dtype}, the weight {weight.dtype}"
    if needs_gradient(x, residual, *parameters):
        if not conv.training and not x.requires_grad and not torch.compiler.is_compiling():
            _warn_once_about_gradients()
        return "a gradient is needed"
    return None


_warned_about_gradients = False


def _warn_once_about_gradients() -> None:
    global _warned_about_gradients
    if not _warned_about_gradients:
        _warned_about_gradients = True
        warnings.warn(
            "fused=True, but gradients are enabled, so the stock layers run: "
            "wrap inference in torch.inference_mode() or torch.no_grad()",
            stacklevel=5,
        )


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast would convolve in; x's own outside autocast."""
    kind = "cuda" if x.is_cuda else x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _trains_through_triton(x: Tensor, conv: nn.Conv3d, bn: nn.Module | None, residual: Tensor | None) -> bool:
    """Whether batch norm takes the statistics of this batch and backend "triton" is asked for and can do it."""
    if type(bn) is not nn.BatchNorm3d or not (bn.training or bn._buffers.get("running_mean", bn) is None):
        return False
    if torch.compiler.is_compiling():  # inductor compiles the stock layers, forward and backward
        return False
    if current_backend() != "triton" or not _is_plain_conv(type(conv)):
        return False
    if _is_parametrized(conv) or _is_parametrized(bn) or has_hooks(conv) or has_hooks(bn):
        return False
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return False
    if not is_plain(x, residual, *conv._parameters.values(), *bn._parameters.values(), *bn._buffers.values()):
        return False
    dtype = _compute_dtype(x)
    if conv.weight.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
        return False  # torch words the error best
    if residual is not None and residual.dtype != dtype:
        return False
    return why_not_here(x.device, dtype) is None


def _train_through_triton(
    x: Tensor, conv: nn.Conv3d, bn: nn.BatchNorm3d, activation: str | None, residual: Tensor | None
) -> Tensor:
    """The same as the modules: one pass for the statistics and one for all that follows, in both directions."""
    from r3d_kernels.triton.conv3d import conv3d
    from r3d_kernels.triton.norm import batch_norm_act

    def wide(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.float()

    dtype = _compute_dtype(x)
    geometry = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
    y = conv3d(
        x.to(dtype), conv.weight.to(dtype), None, wide(conv.bias), None, **geometry, groups=conv.groups
    )
    gamma, beta = wide(bn.weight), wide(bn.bias)
    z, mean, var = batch_norm_act(y, gamma, beta, residual, eps=bn.eps, activation=activation)
    if bn.training and bn.track_running_stats:
        _follow(bn, mean, var, y.numel() // y.shape[1])
    return z


@torch.no_grad()
def _follow(bn: nn.BatchNorm3d, mean: Tensor, var: Tensor, count: int) -> None:
    """Updates the running statistics as nn.BatchNorm3d does, with the unbiased variance."""
    factor = 0.0 if bn.momentum is None else bn.momentum
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            factor = 1.0 / float(bn.num_batches_tracked)
    for running, new in ((bn.running_mean, mean), (bn.running_var, var * (count / (count - 1)))):
        if running is None:
            continue
        if running.dtype == torch.float32:
            running.lerp_(new, factor)  # one launch
        else:
            running.copy_(running.float().lerp_(new, factor))


def _is_fresh(y: Tensor, conv: nn.Module, bn: nn.Module | None, other: Tensor | None = None) -> bool:
    """Whether y may be overwritten, as the original networks do (`out += residual`, `ReLU(inplace=True)`).

    True for what plain convolutions and batch norms return: their backward passes do not need it.
    """
    plain = _is_plain_conv(type(conv)) and (bn is None or type(bn) in _NORMS)
    plain = (
        plain and not has_hooks(conv) and (bn is None or not has_hooks(bn))
    )  # who may have got a view of y
    return (
        plain and type(y) is Tensor and (other is None or (type(other) is Tensor and other.dtype == y.dtype))
    )


def conv_bn_act(
    x: Tensor,
    conv: nn.Conv3d,
    bn: nn.BatchNorm3d | None,
    *,
    activation: str | None = "relu",
    residual: Tensor | None = None,
    pool: nn.MaxPool3d | None = None,
    fused: bool = True,
) -> Tensor:
    """``act(bn(conv(x)) + residual)`` from the modules that own the parameters, and a max-pool behind it.

    Fused in evaluation mode where no gradient is needed; otherwise (training, gradients, hooks on `conv` or `bn`,
    padding modes, `torch.export`, tracing) the modules themselves run. `torch.compile` takes a fused layer as one
    operator, which runs what an eager call does. In training, `backend("triton")` runs the Triton convolution and batch
    norm with their gradients instead, but for `torch.compile`. Packed weights follow every change of the parameters and
    are never saved, copied or pickled.

    Args:
        x: [N, C, D, H, W], dtype of the parameters (autocast may change it).
        conv: the convolution, with or without bias.
        bn: its batch norm, or None.
        activation: "relu" or None.
        residual: [N, K, D', H', W'] or None, added before the activation.
        pool: the max-pool behind it, or None. Where a kernel on this GPU has it built in, the faster way is measured
            once; elsewhere it is `max_pool3d` of the layer's output.
        fused: False always runs the modules.

    Returns:
        [N, K, D', H', W'], pooled; channels_last_3d where fused.

    Raises:
        TypeError: for a mix of dtypes.
        ValueError: for wrong shapes, a mix of devices, an unknown activation.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and (observer := _observer.get()) is not None:
        return _observed(observer, LayerCall(x, conv, bn, activation, residual, pool, fused))
    pool_frames = 0 if pool is None or not fused else _joined_frames(x, pool)
    alone = pool is not None and pool_frames == 0
    if fused and not alone and not compiling and not torch.is_grad_enabled():
        y = _settled(x, conv, bn, activation, residual, pool_frames)
        if y is not None:
            return y
    if alone or (pool_frames and _why_stock(x, conv, bn, residual) is not None):
        y = conv_bn_act(x, conv, bn, activation=activation, residual=residual, fused=fused)
        return max_pool3d(y, pool, fused=fused)
    _check.activation(activation)
    if fused and _trains_through_triton(x, conv, bn, residual):
        return _train_through_triton(x, conv, bn, activation, residual)
    if not fused or _why_stock(x, conv, bn, residual) is not None:
        y = conv(x)
        if bn is not None:
            y = bn(y)
        if residual is not None:
            # torch would broadcast; what is being traced has no shape yet
            if isinstance(y, Tensor) and isinstance(residual, Tensor) and residual.shape != y.shape:
                raise ValueError(
                    f"residual: expected the output's shape {list(y.shape)}, got {list(residual.shape)}"
                )
            y = y.add_(residual) if _is_fresh(y, conv, bn, residual) else y + residual
        return F.relu(y, inplace=_is_fresh(y, conv, bn)) if activation == "relu" else y

    _check.tensor(x, "x")
    weight = conv._parameters["weight"]
    dtype = _compute_dtype(x)
    if dtype != x.dtype:
        x = x.to(dtype)
        if residual is not None:
            residual = residual.to(dtype)
    elif weight.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"x: expected {weight.dtype}, the dtype of the parameters, got {x.dtype}")
    if residual is not None:
        _check.same_dtype(residual, "residual", dtype)
        _check.same_device(residual, "residual", x.device)
    return _run_fused(x, conv, bn, activation, residual, None, pool_frames)


def _run_fused(
    x: Tensor,
    conv: nn.Conv3d,
    bn: nn.BatchNorm3d | None,
    activation: str | None,
    residual: Tensor | None,
    clip: tuple[Values | None, Values | None, torch.dtype] | None,
    pool_frames: int,
) -> Tensor:
    """x is a raw clip where `clip` says how to take it: its mean, std and the dtype to compute in."""
    weight = conv._parameters["weight"]
    _check.same_device(weight, "conv.weight", x.device)
    norm = None
    if bn is not None:
        affine, statistics = bn._parameters, bn._buffers
        norm = (
            statistics["running_mean"],
            statistics["running_var"],
            affine["weight"],
            affine["bias"],
            bn.eps,
        )
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    layer = (x, residual, weight, conv._parameters["bias"], norm, *geometry, activation)
    if compiles():
        return in_graph(*layer, clip, pool_frames)
    return state_of(conv).run(*layer, None if clip is None else ClipSource.of(x, *clip), pool_frames)


def clip_conv_bn_act(
    clip: Tensor,
    mean: Values | None,
    std: Values | None,
    conv: nn.Conv3d,
    bn: nn.BatchNorm3d | None,
    *,
    activation: str | None = "relu",
    pool: nn.MaxPool3d | None = None,
    fused: bool = True,
) -> Tensor:
    """`conv_bn_act` of ``(clip - mean) / std``, a network's first layer. clip: [N, C, D, H, W], a decoder's, uint8.

    Padding is zero behind the normalisation. On a GPU our convolutions normalise while they lay the clip out for
    themselves, so it is read once; elsewhere torch's own operators do it before.

    Args:
        mean, std: one number a channel, for values of 0 to 255, or None.
        conv, bn, activation, pool, fused: as for `conv_bn_act`; also its result and its errors.
    """
    if not torch.compiler.is_compiling() and (observer := _observer.get()) is not None:
        return _observed(observer, LayerCall(clip, conv, bn, activation, None, pool, fused, (mean, std)))
    dtype = conv.weight.dtype
    if fused and _extension.runs_cuda(clip) and _why_stock(clip, conv, bn, None) is None:
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
        if dtype in (torch.float32, torch.bfloat16, torch.float16):
            _check.activation(activation)
            pool_frames = 0 if pool is None else _joined_frames(clip, pool)
            y = _run_fused(clip, conv, bn, activation, None, (mean, std, dtype), pool_frames)
            return y if pool is None or pool_frames else max_pool3d(y, pool, fused=fused)
    x = normalized_clip(clip, mean, std, dtype)
    return conv_bn_act(x, conv, bn, activation=activation, pool=pool, fused=fused)


_POOL, _LINEAR = nn.MaxPool3d.forward, nn.Linear.forward


def is_plain_pool(pool: nn.MaxPool3d) -> bool:
    special = pool.return_indices or pool.ceil_mode or has_hooks(pool) or pool.dilation not in (1, (1, 1, 1))
    return type(pool) is nn.MaxPool3d and nn.MaxPool3d.forward is _POOL and not special


def _joined_frames(x: Tensor, pool: nn.MaxPool3d) -> int:
    """A key of `_pooled.WINDOWS` where the layer in front of the max-pool may take it over, else 0."""
    if not x.is_cuda or not is_plain_pool(pool):
        return 0
    names = ("kernel_size", "stride", "padding")
    return frames_of(*(_check.triple(getattr(pool, name), name) for name in names))


def max_pool3d(x: Tensor, pool: nn.MaxPool3d, *, fused: bool = True) -> Tensor:
    """``pool(x)``, by our channels-last kernel where it can. x: [N, C, D, H, W]."""
    if not fused or not is_plain_pool(pool):
        return pool(x)
    return _max_pool3d(x, pool.kernel_size, pool.stride, pool.padding)


def avg_pool_linear(x: Tensor, fc: nn.Linear, *, fused: bool = True) -> Tensor:
    """``fc(mean of x over D, H, W)``. x: [N, C, D, H, W] -> [N, classes]."""
    stock = (
        not fused
        or type(fc) is not nn.Linear
        or nn.Linear.forward is not _LINEAR
        or has_hooks(fc)
        or fc._parameters.get("weight") is None
        or "bias" not in fc._parameters
        or hasattr(fc, "parametrizations")
        or x.dtype != fc.weight.dtype  # autocast, or an error that torch words best
        or torch.is_autocast_enabled(x.device.type)
        or _extension.error is not None
    )
    if stock:
        return fc(F.adaptive_avg_pool3d(x, 1).flatten(1))
    return _avg_pool_linear(x, fc.weight, fc.bias)


class ConvBNAct3d(nn.Module):
    """Convolution, batch norm, residual and activation as one layer.

    Parameters keep their stock names: `conv.weight`, `bn.weight`, `bn.bias`, `bn.running_mean`, `bn.running_var`,
    `bn.num_batches_tracked`. Fused in evaluation; trains through the stock layers, or ours in Triton where asked for
    (see `conv_bn_act`).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in `nn.Conv3d`.
        eps, momentum: as in `nn.BatchNorm3d`.
        activation: "relu" or None.
        fused: False runs the stock layers; an attribute that may be changed at any time.
        device, dtype: of the parameters.

    Shape:
        x [N, C, D, H, W], residual [N, K, D', H', W'] or None -> [N, K, D', H', W'].

    Raises:
        ValueError: for an unknown activation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        activation: str | None = "relu",
        fused: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check.activation(activation)
        self.conv = nn.Conv3d(
            in_channels,
            out_channels,
            _check.triple(kernel_size, "kernel_size"),
            _check.triple(stride, "stride"),
            _check.triple(padding, "padding"),
            _check.triple(dilation, "dilation"),
            groups,
            bias,
            device=device,
            dtype=dtype,
        )
        self.bn = nn.BatchNorm3d(out_channels, eps=eps, momentum=momentum, device=device, dtype=dtype)
        self.activation = activation
        self.fused = fused

    @classmethod
    def from_modules(
        cls, conv: nn.Conv3d, bn: nn.BatchNorm3d, activation: str | None = "relu", fused: bool = True
    ) -> ConvBNAct3d:
        """The layer around existing modules; parameters are shared, not copied."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        _check.activation(activation)
        if not isinstance(conv, nn.Conv3d):
            raise TypeError(f"conv: expected an nn.Conv3d, got {type(conv).__name__}")
        if not isinstance(bn, nn.BatchNorm3d) or bn.num_features != conv.out_channels:
            raise ValueError(f"bn: expected an nn.BatchNorm3d of {conv.out_channels} features, got {bn}")
        layer.conv, layer.bn, layer.activation, layer.fused = conv, bn, activation, fused
        layer.train(conv.training)
        return layer

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return conv_bn_act(
            x, self.conv, self.bn, activation=self.activation, residual=residual, fused=self.fused
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, fused={self.fused}"
