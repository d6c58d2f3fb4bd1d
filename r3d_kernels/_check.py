"""Argument checks shared by the functional ops: they run before any kernel and name the argument."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from r3d_kernels import _extension

Triple = tuple[int, int, int]


def triple(value: int | Sequence[int], argument: str) -> Triple:
    """An int or three ints as (depth, height, width)."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value, value, value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        values = tuple(value)
        if len(values) == 3 and all(isinstance(v, int) and not isinstance(v, bool) for v in values):
            return values
    raise TypeError(f"{argument}: expected an int or three ints (depth, height, width), got {value!r}")


def tensor(value: object, argument: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: expected a tensor, got {type(value).__name__}")
    return value


def vector(value: object, argument: str, size: int, device: torch.device) -> Tensor:
    """A tensor of shape [size] on the device."""
    t = tensor(value, argument)
    if tuple(t.shape) != (size,):
        raise ValueError(f"{argument}: expected shape [{size}], got {list(t.shape)}")
    same_device(t, argument, device)
    return t


def same_device(t: Tensor, argument: str, device: torch.device) -> None:
    if t.device != device:
        raise ValueError(f"{argument}: expected a tensor on {device}, the device of x, got {t.device}")


def same_dtype(t: Tensor, argument: str, dtype: torch.dtype) -> None:
    if t.dtype != dtype:
        raise TypeError(f"{argument}: expected {dtype}, the dtype of x, got {t.dtype}")


def activation(value: object) -> str:
    if value not in ("relu", None):
        raise ValueError(f"activation: expected 'relu' or None, got {value!r}")
    return "none" if value is None else "relu"


@lru_cache(maxsize=4096)
def _output_shape(*args: object) -> tuple[int, ...]:
    try:
        return tuple(_extension.ops().conv3d_check(*args))
    except RuntimeError as e:
        raise ValueError(str(e).splitlines()[0]) from None


def output_shape(
    x: Sequence[int],
    weight: Sequence[int],
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    groups: int,
    residual: Sequence[int] | None,
    activation: str,
) -> tuple[int, ...]:
    """Shape of the output [N, K, D', H', W']; ValueError where the geometry is impossible (csrc/ops.cpp judges)."""
    if not isinstance(groups, int):
        raise TypeError(f"groups: expected an int, got {groups!r}")
    return _output_shape(
        tuple(x), tuple(weight), stride, padding, dilation, groups, tuple(residual or ()), activation
    )


def volume(x: object) -> Tensor:
    """A tensor of five dimensions."""
    t = tensor(x, "x")
    if t.dim() != 5:
        raise ValueError(f"x: expected 5 dimensions [N, C, D, H, W], got shape {list(t.shape)}")
    return t


def pool_window(
    x: object,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None,
    padding: int | Sequence[int],
) -> tuple[Triple, Triple, Triple]:
    """Kernel, stride (kernel_size where it is None) and padding of a pool over x [N, C, D, H, W] that fits."""
    t = volume(x)
    kernel = triple(kernel_size, "kernel_size")
    steps = kernel if stride is None else triple(stride, "stride")
    pads = triple(padding, "padding")
    for name, values, least in (("kernel_size", kernel, 1), ("stride", steps, 1), ("padding", pads, 0)):
        if min(values) < least:
            raise ValueError(f"{name}: expected integers >= {least}, got {list(values)}")
    if any(2 * p > k for p, k in zip(pads, kernel, strict=True)):
        raise ValueError(f"padding: expected at most half of kernel_size {list(kernel)}, got {list(pads)}")
    if any(i + 2 * p < k for i, p, k in zip(t.shape[2:], pads, kernel, strict=True)):
        raise ValueError(
            f"kernel_size: the window {list(kernel)} does not fit into input {list(t.shape[2:])} "
            f"with padding {list(pads)}"
        )
    return kernel, steps, pads


def only_batch_empty(x: object) -> Tensor:
    """[N, C, D, H, W] of which something is left to average."""
    t = tensor(x, "x")
    if t.dim() != 5 or min(t.shape[1:]) < 1:
        raise ValueError(f"x: expected [N, C, D, H, W], empty in N only, got shape {list(t.shape)}")
    return t


def head(x: object, weight: object, bias: object) -> None:
    """x [N, C, D, H, W], weight [classes, C] and bias [classes] or None, of one dtype in one place."""
    tensor(x, "x")
    w = tensor(weight, "weight")
    t = only_batch_empty(x)
    if w.dim() != 2 or w.shape[1] != t.shape[1]:
        raise ValueError(f"weight: expected shape [classes, {t.shape[1]}], got {list(w.shape)}")
    same_dtype(w, "weight", t.dtype)
    same_device(w, "weight", t.device)
    if bias is not None:
        same_dtype(vector(bias, "bias", w.shape[0], t.device), "bias", t.dtype)
