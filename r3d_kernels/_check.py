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
