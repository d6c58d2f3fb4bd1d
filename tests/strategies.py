"""Hypothesis strategies over convolution geometry."""

from __future__ import annotations

import dataclasses

from hypothesis import strategies as st

from r3d_kernels.problems import ConvProblem

__all__ = ["ODD_CHANNELS", "problem_strategy"]

ODD_CHANNELS = (1, 3, 7, 8, 16, 17, 31, 32, 45, 64, 65)
"""Below, at and above the widths of vector registers and channel blocks."""


@st.composite
def problem_strategy(
    draw: st.DrawFn,
    *,
    channels: tuple[int, ...] = ODD_CHANNELS,
    batch: tuple[int, int] = (0, 2),
    max_out: int = 9,
    max_kernel: int = 4,
    max_stride: int = 3,
    max_dilation: int = 3,
    max_beyond: int = 3,
    groups: bool = True,
    residual: bool | None = None,
    activation: str | None = "any",
    max_macs: int = 4_000_000,
) -> ConvProblem:
    """Small valid problems: unequal axes, tails in every dimension, input rows that no output reads.

    The output size is drawn rather than the input size, so that nearly every draw is valid and tails of the
    output (what kernels get wrong) are as likely as full blocks. Padding may exceed the kernel by up to `max_beyond`,
    and an axis of one tap may have padding and dilation. `residual` and `activation` fix those two;
    None and "any" draw them. Where a draw costs more than `max_macs`, channels and then the batch give way.
    """
    kernel, stride, padding, dilation, size = [], [], [], [], []
    equal = draw(st.booleans())  # half of the draws are cubes, as in real networks
    for axis in range(3):
        if axis and equal:
            f, s, p, dil = kernel[0], stride[0], padding[0], dilation[0]
        else:
            f = draw(st.integers(1, max_kernel))
            s = draw(st.integers(1, max_stride))
            dil = draw(st.integers(1, max_dilation))
            # An eighth of the axes has padding beyond the kernel, also where it is one tap: whole windows lie on it.
            beyond = max_beyond > 0 and draw(st.integers(0, 7)) == 0
            p = draw(st.integers(0, f + max_beyond if beyond else min(dil * (f - 1), 4)))
        span = dil * (f - 1) + 1
        unread = draw(st.integers(0, s - 1))  # the last window may stop short of the end
        out = draw(st.integers(1, max_out))
        kernel.append(f)
        stride.append(s)
        padding.append(p)
        dilation.append(dil)
        size.append(max((out - 1) * s + span - 2 * p + unread, 1, span - 2 * p))
    g = draw(st.sampled_from([1, 1, 1, 2, 3])) if groups else 1
    problem = ConvProblem(
        n=draw(st.integers(*batch)),
        c=draw(st.sampled_from(channels)) * g,
        d=size[0],
        h=size[1],
        w=size[2],
        k=draw(st.sampled_from(channels)) * g,
        kernel=tuple(kernel),
        stride=tuple(stride),
        padding=tuple(padding),
        dilation=tuple(dilation),
        groups=g,
        residual=draw(st.booleans()) if residual is None else residual,
        activation=draw(st.sampled_from([None, "relu"])) if activation == "any" else activation,
    )
    for name in ("c", "k"):
        smaller = sorted((c for c in channels if c * g < getattr(problem, name)), reverse=True)
        for c in smaller:
            if problem.macs <= max_macs:
                break
            problem = dataclasses.replace(problem, **{name: c * g})
    if problem.macs > max_macs and problem.n > 1:
        problem = problem.with_batch(1)
    return problem.validate()
