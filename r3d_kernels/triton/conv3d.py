"""conv3d with scale, bias, residual and activation, and its gradients, as implicit matrix products in Triton.

Importing this module imports Triton and registers `torch.ops.r3d_kernels.triton_conv3d` and its two gradients, which
torch.compile takes as they are: opaque, and no `torch.library.triton_op` (those of `pool.py` are). The configuration is
looked up or measured at run time, which a traced graph of launches would fix at compile time, and inductor fuses
nothing into kernels that are not its own. What follows the convolution is in its epilogue already; the ReLU's mask and
the factors of the backward are torch's own operations, which inductor does fuse.

Chetlur et al., "cuDNN: Efficient Primitives for Deep Learning", 2014, describes implicit matrix products.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from r3d_kernels import _check, tuning
from r3d_kernels.ops.conv3d import needs_gradient
from r3d_kernels.problems import ConvProblem
from r3d_kernels.triton import ahead, tuner
from r3d_kernels.triton import config as configs
from r3d_kernels.triton.config import Config
from r3d_kernels.triton.launch import Forward, InputGrad, WeightGrad, channels_last, check_operand, is_bare

__all__ = ["conv3d", "conv3d_input_grad", "conv3d_weight_grad"]

logger = logging.getLogger("r3d_kernels")

Gradient = Callable[[Tensor, Tensor], Tensor]

_AUTOCAST = (torch.float32, torch.bfloat16, torch.float16)  # what autocast casts


def _triples(stride: object, padding: object, dilation: object) -> tuple[tuple[int, int, int], ...]:
    names = ("stride", "padding", "dilation")
    return tuple(_check.triple(v, n) for v, n in zip((stride, padding, dilation), names, strict=True))


def conv3d(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    activation: str | None = None,
) -> Tensor:
    """``act(conv3d(x, weight) * scale + bias + residual)`` in one kernel; differentiable but for `scale`.

    Args:
        x: [N, C, D, H, W], float32, bfloat16 or float16, on a GPU; made channels_last_3d if it is not.
        weight: [K, C/groups, T, R, S], dtype of x.
        scale, bias: float32 [K], or None.
        residual: [N, K, D', H', W'], dtype of x, or None.
        stride, padding, dilation: an int or three (depth, height, width).
        groups: a divisor of C and K.
        activation: "relu" or None.

    Returns:
        [N, K, D', H', W'] of x's dtype, or of autocast's, to which x, weight and residual are cast as for torch's
        conv3d; channels_last_3d. Sums are float32. float32 products are TF32, to which both factors are rounded, where
        torch's switch for convolutions allows that (`torch.backends.cudnn.allow_tf32`), else exact.

    Raises:
        TypeError: for a wrong type or a mix of dtypes.
        ValueError: for wrong shapes, an impossible geometry, a mix of devices, an unknown activation.
        RuntimeError: for a first call inside the capture of a CUDA graph. The gradients, too, are called once before.
    """
    _check.tensor(x, "x")
    _check.tensor(weight, "weight")
    if scale is not None and _check.tensor(scale, "scale").requires_grad and torch.is_grad_enabled():
        raise ValueError("scale: expected a tensor that needs no gradient, got one that requires it")
    act = _check.activation(activation)
    geometry = _triples(stride, padding, dilation)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, residual = (
            t.to(dtype) if isinstance(t, Tensor) and t.dtype in _AUTOCAST else t
            for t in (x, weight, residual)
        )
    operands = (x, weight, scale, bias, residual)
    if not is_bare(*operands):
        run = torch.ops.r3d_kernels.triton_conv3d
    elif needs_gradient(*operands):
        run = _Conv3d.apply
    else:
        run = _run
    return run(*operands, *geometry, groups, act)


def checked_problem(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
) -> ConvProblem:
    """The problem of a call, once all of its arguments are found to fit."""
    check_operand(x, "x")
    _check.same_dtype(weight, "weight", x.dtype)
    _check.same_device(weight, "weight", x.device)
    if weight.dim() != 5:
        raise ValueError(
            f"weight: expected 5 dimensions [K, C/groups, T, R, S], got shape {list(weight.shape)}"
        )
    for name, t in (("scale", scale), ("bias", bias)):
        if t is not None:
            _check.vector(t, name, weight.shape[0], x.device)
            if t.dtype != torch.float32:
                raise TypeError(f"{name}: expected torch.float32, got {t.dtype}")
    if residual is not None:
        _check.same_dtype(residual, "residual", x.dtype)
        _check.same_device(residual, "residual", x.device)
    shape = None if residual is None else tuple(residual.shape)
    key = (tuple(x.shape), tuple(weight.shape), tuple(stride), tuple(padding), tuple(dilation))
    _check.output_shape(*key, groups, shape, activation)
    return _problem(*key, groups, residual is not None, activation)


@lru_cache(maxsize=4096)
def _problem(
    x: tuple[int, ...],
    weight: tuple[int, ...],
    stride: tuple[int, int, int],
    padding: tuple[int, int, int],
    dilation: tuple[int, int, int],
    groups: int,
    residual: bool,
    activation: str,
) -> ConvProblem:
    if groups > configs.MAX_GROUPS:
        raise ValueError(f"groups: expected at most {configs.MAX_GROUPS}, got {groups}")
    return ConvProblem(
        *x,
        k=weight[0],
        kernel=weight[2:],
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        residual=residual,
        activation=None if activation == "none" else activation,
    )


@lru_cache(maxsize=4096)
def forward(problem: ConvProblem, config: Config, precision: str, has_scale: bool, has_bias: bool) -> Forward:
    return Forward(problem, config, precision, has_scale=has_scale, has_bias=has_bias)


def chosen(
    problem: ConvProblem,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> tuple[Forward, bool]:
    """The launch for a problem, with the configuration measured to be the fastest or the default; whether for good."""
    precision = configs.precision_of(x.dtype)

    def launch(config: Config) -> Forward:
        return forward(problem, config, precision, scale is not None, bias is not None)

    operands = (x, weight, scale, bias, residual)
    config, final = tuner.config_for(tuner.FORWARD, problem, precision, launch, operands)
    return launch(config), final


def jobs(problem: ConvProblem, dtype: torch.dtype, device: torch.device) -> list[ahead.Job]:
    """What is compiled before a layer is measured; nothing where an earlier measurement is remembered."""
    precision = configs.precision_of(dtype)
    able = configs.candidates(problem, dtype, precision, configs.machine(device))
    place = tuner.cache_key(tuner.FORWARD, problem, dtype, precision, device)
    if problem.n == 0 or tuner.remembered(place, able) is not None:
        return []

    def tensor(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last_3d)

    x, weight = tensor(*problem.in_shape), tensor(*problem.weight_shape)
    vector = torch.empty(problem.k, device="meta", dtype=torch.float32)
    residual = tensor(*problem.out_shape) if problem.residual else None
    with ahead.noted() as found:
        for config in able:
            with contextlib.suppress(Exception):  # says so when it is measured
                forward(problem, config, precision, True, True)(x, weight, vector, vector, residual)
    return found


_MOST_CALLS = 4096  # kinds of calls remembered
_known: dict[tuple[object, ...], Any] = {}  # launches checked and chosen, by everything that decides


def _about(t: Tensor | None) -> object:
    return None if t is None else (t.shape, t.dtype, t.device)


def _remembered(key: tuple[object, ...], launch: Any, final: bool) -> Any:
    """`launch`, which later calls like this one take without asking, if the choice is final."""
    if final:
        if len(_known) >= _MOST_CALLS:
            _known.clear()
        _known[key] = launch
    return launch


def _run(x, weight, scale, bias, residual, stride, padding, dilation, groups, activation):
    key = (
        *(_about(x), _about(weight), _about(scale), _about(bias), _about(residual)),
        *(*stride, *padding, *dilation, groups, activation),
        *(configs.precision_of(x.dtype), tuning.enabled()),
    )
    launch = _known.get(key)
    if launch is None:
        problem = checked_problem(
            x, weight, scale, bias, residual, stride, padding, dilation, groups, activation
        )
    x, weight = channels_last(x), channels_last(weight)
    scale = None if scale is None else scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else channels_last(residual)
    if launch is None:
        launch = _remembered(key, *chosen(problem, x, weight, scale, bias, residual))
    return launch(x, weight, scale, bias, residual)


_conv3d = torch.library.custom_op(
    "r3d_kernels::triton_conv3d",
    _run,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor? residual, int[] stride, int[] padding, "
    "int[] dilation, int groups, str activation) -> Tensor",
)


@_conv3d.register_fake
def _(x, weight, scale, bias, residual, stride, padding, dilation, groups, activation):
    size = [
        (i + 2 * p - d * (f - 1) - 1) // s + 1
        for i, f, s, p, d in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    ]
    return torch.empty(
        (x.shape[0], weight.shape[0], *size),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last_3d,
    )


# ---- gradients ----


def _is_alone(*tensors: Tensor) -> bool:
    """`is_bare`, and no gradient of the gradient is asked for, which the operations say they have not."""
    return is_bare(*tensors) and not needs_gradient(*tensors)


def _gradient_problem(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    dy: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> ConvProblem:
    check_operand(dy, "dy")
    key = (tuple(x_shape), tuple(weight_shape), tuple(stride), tuple(padding), tuple(dilation))
    return _checked_gradient(*key, groups, tuple(dy.shape))


@lru_cache(maxsize=4096)
def _checked_gradient(
    x: tuple[int, ...],
    weight: tuple[int, ...],
    stride: tuple[int, int, int],
    padding: tuple[int, int, int],
    dilation: tuple[int, int, int],
    groups: int,
    dy: tuple[int, ...],
) -> ConvProblem:
    geometry = (x, weight, stride, padding, dilation)
    expected = _check.output_shape(*geometry, groups, None, "none")
    if dy != expected:
        raise ValueError(f"dy: expected the output's shape {list(expected)}, got {list(dy)}")
    return _problem(*geometry, groups, False, "none")


@lru_cache(maxsize=4096)
def input_grad(problem: ConvProblem, config: Config, precision: str) -> InputGrad:
    return InputGrad(problem, config, precision)


@lru_cache(maxsize=4096)
def weight_grad(problem: ConvProblem, config: Config, precision: str) -> WeightGrad:
    return WeightGrad(problem, config, precision)


def chosen_input_grad(problem: ConvProblem, dy: Tensor, weight: Tensor) -> tuple[Gradient, bool]:
    """The launch for a problem, as `chosen`. Torch's own where none of ours computes what it does."""
    return _chosen_gradient(tuner.INPUT_GRAD, input_grad, problem, dy, weight)


def chosen_weight_grad(problem: ConvProblem, x: Tensor, dy: Tensor) -> tuple[Gradient, bool]:
    """The launch for a problem, as `chosen_input_grad`."""
    return _chosen_gradient(tuner.WEIGHT_GRAD, weight_grad, problem, x, dy)


def _chosen_gradient(
    task: tuner.Task,
    make: Callable[[ConvProblem, Config, str], Gradient],
    problem: ConvProblem,
    a: Tensor,
    b: Tensor,
) -> tuple[Gradient, bool]:
    precision = configs.precision_of(a.dtype)

    def launch(config: Config) -> Gradient:
        return make(problem, config, precision)

    # What no configuration can run is an error of the caller's and none of the configuration.
    launch(task.candidates(problem, a.dtype, precision, configs.machine(a.device))[0])
    try:
        config, final = tuner.config_for(task, problem, precision, launch, (a, b))
    except tuner.NothingWorks as e:  # a training run goes on
        logger.warning("torch's own %s is used: %s", task.name, e)
        return partial(task.by_torch, problem), True
    return launch(config), final


def conv3d_input_grad(
    dy: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """The gradient of conv3d with respect to its input.

    Args:
        dy: [N, K, D', H', W'], float32, bfloat16 or float16, on a GPU.
        weight: [K, C/groups, T, R, S], dtype of dy; at most 31 taps an axis.
        input_size: (N, C, D, H, W).
        stride, padding, dilation, groups: of the convolution.

    Returns:
        [N, C, D, H, W] of dy's dtype, channels_last_3d, from float32 sums.

    Raises:
        TypeError, ValueError: for arguments that do not fit together, by name.
        RuntimeError: for a first call inside the capture of a CUDA graph.
    """
    _check.tensor(dy, "dy")
    _check.tensor(weight, "weight")
    geometry = _triples(stride, padding, dilation)
    run = _run_input_grad if _is_alone(dy, weight) else torch.ops.r3d_kernels.triton_conv3d_input_grad
    return run(dy, weight, list(input_size), *geometry, groups)


def _run_input_grad(dy, weight, input_size, stride, padding, dilation, groups):
    key = (
        *("input gradient", _about(dy), _about(weight)),
        *(*input_size, *stride, *padding, *dilation, groups),
        *(configs.precision_of(dy.dtype), tuning.enabled()),
    )
    launch = _known.get(key)
    if launch is None:
        _check.same_dtype(weight, "weight", dy.dtype)
        _check.same_device(weight, "weight", dy.device)
        problem = _gradient_problem(input_size, weight.shape, dy, stride, padding, dilation, groups)
    dy, weight = channels_last(dy), channels_last(weight)
    if launch is None:
        launch = _remembered(key, *chosen_input_grad(problem, dy, weight))
    return launch(dy, weight)


_conv3d_input_grad = torch.library.custom_op(
    "r3d_kernels::triton_conv3d_input_grad",
    _run_input_grad,
    mutates_args=(),
    schema="(Tensor dy, Tensor weight, SymInt[] input_size, int[] stride, int[] padding, int[] dilation, int groups)"
    " -> Tensor",
)


@_conv3d_input_grad.register_fake
def _(dy, weight, input_size, stride, padding, dilation, groups):
    return torch.empty(
        tuple(input_size), dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last_3d
    )


def conv3d_weight_grad(
    x: Tensor,
    dy: Tensor,
    weight_size: Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """The gradient of conv3d with respect to its weight.

    Args:
        x: [N, C, D, H, W], float32, bfloat16 or float16, on a GPU.
        dy: [N, K, D', H', W'], dtype of x.
        weight_size: (K, C/groups, T, R, S).
        stride, padding, dilation, groups: of the convolution.

    Returns:
        [K, C/groups, T, R, S] of x's dtype, channels_last_3d, from float32 sums; bitwise the same at every call.

    Raises:
        TypeError, ValueError: for arguments that do not fit together, by name.
        RuntimeError: for a first call inside the capture of a CUDA graph.
    """
    _check.tensor(x, "x")
    _check.tensor(dy, "dy")
    geometry = _triples(stride, padding, dilation)
    run = _run_weight_grad if _is_alone(x, dy) else torch.ops.r3d_kernels.triton_conv3d_weight_grad
    return run(x, dy, list(weight_size), *geometry, groups)


def _run_weight_grad(x, dy, weight_size, stride, padding, dilation, groups):
    key = (
        *("weight gradient", _about(x), _about(dy)),
        *(*weight_size, *stride, *padding, *dilation, groups),
        *(configs.precision_of(x.dtype), tuning.enabled()),
    )
    launch = _known.get(key)
    if launch is None:
        _check.same_dtype(dy, "dy", x.dtype)
        _check.same_device(dy, "dy", x.device)
        problem = _gradient_problem(x.shape, weight_size, dy, stride, padding, dilation, groups)
    x, dy = channels_last(x), channels_last(dy)
    if launch is None:
        launch = _remembered(key, *chosen_weight_grad(problem, x, dy))
    return launch(x, dy)


_conv3d_weight_grad = torch.library.custom_op(
    "r3d_kernels::triton_conv3d_weight_grad",
    _run_weight_grad,
    mutates_args=(),
    schema="(Tensor x, Tensor dy, SymInt[] weight_size, int[] stride, int[] padding, int[] dilation, int groups)"
    " -> Tensor",
)


@_conv3d_weight_grad.register_fake
def _(x, dy, weight_size, stride, padding, dilation, groups):
    return torch.empty(
        tuple(weight_size), dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d
    )


def _setup_context(ctx, inputs, output) -> None:
    x, weight, scale, bias, residual, *geometry, activation = inputs
    ctx.save_for_backward(x, weight, scale, output if activation == "relu" else None)
    ctx.geometry = geometry
    ctx.has = (bias is not None, residual is not None)


def _backward(ctx, dy: Tensor):
    x, weight, scale, y = ctx.saved_tensors
    has_bias, has_residual = ctx.has
    input_grad, weight_grad = _run_input_grad, _run_weight_grad
    if not _is_alone(dy, x, weight):
        ops = torch.ops.r3d_kernels
        input_grad, weight_grad = ops.triton_conv3d_input_grad, ops.triton_conv3d_weight_grad
    if y is not None:
        dy = torch.where(y > 0, dy, 0)
    dz = dy if scale is None else (dy * scale.view(1, -1, 1, 1, 1)).to(dy.dtype)
    need_x, need_weight, _, need_bias, need_residual = ctx.needs_input_grad[:5]
    if need_x and max(weight.shape[2:]) > configs.MAX_TAPS:  # forward there are taps packed into the sum
        *geometry, groups = ctx.geometry
        dx = torch.ops.aten.convolution_backward(
            dz, x, weight, None, *geometry, False, [0, 0, 0], groups, [True, False, False]
        )[0]
    else:
        dx = input_grad(dz, weight, x.shape, *ctx.geometry) if need_x else None
    dw = weight_grad(x, dz, weight.shape, *ctx.geometry) if need_weight else None
    db = dy.sum((0, 2, 3, 4), dtype=torch.float32) if need_bias and has_bias else None
    dr = dy if need_residual and has_residual else None
    return dx, dw, None, db, dr, None, None, None, None, None


_conv3d.register_autograd(_backward, setup_context=_setup_context)


class _Conv3d(torch.autograd.Function):
    """The operation's gradient without the operation."""

    @staticmethod
    def forward(ctx, *inputs):
        y = _run(*inputs)
        _setup_context(ctx, inputs, y)
        return y

    backward = staticmethod(_backward)
