"""Mends what Triton's interpreter gets wrong for bfloat16 (3.6 to 3.9, which store it as uint16).

tl.dot multiplies the raw bits, casts from float32 truncate and break NaN, and 3.6 with NumPy 2.4 cannot use a run-time
scalar as the bound of a loop. test_triton_interpreter.py shows each. And half of its time goes into whether integers
overflow, which it computes for every operation and looks at only in debug mode.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

__all__ = ["mend"]

_mended = False


def _widened(handle):
    if handle.dtype.scalar == tl.bfloat16:
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)
    return handle


def _rounded(handle):
    """float32 to bfloat16, to the nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(handle.data, dtype=np.float32).view(np.uint32)
    nearest = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    data = np.where(np.isnan(handle.data), np.uint16(0x7FC0), nearest)
    return interpreter.TensorHandle(data, tl.bfloat16)


def mend() -> None:
    """Patches the interpreter of this process; more than once does no harm."""
    global _mended
    if _mended:
        return
    builder = interpreter.InterpreterBuilder
    dot, cast, patch = builder.create_dot, builder.cast_impl, interpreter._patch_lang_tensor

    def create_dot(self, a, b, d, precision, imprecise):
        return dot(self, _widened(a), _widened(b), d, precision, imprecise)

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.bfloat16 and dst_type.scalar == tl.float32:
            return _widened(src)
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return _rounded(src)
        return cast(self, src, dst_type)

    def patch_lang_tensor(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    interpreter._patch_lang_tensor = patch_lang_tensor
    shared = interpreter.interpreter_builder
    if not shared.options.debug:
        shared.options = dataclasses.replace(shared.options, sanitize_overflow=False)
    _mended = True
