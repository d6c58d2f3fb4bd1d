"""Triton's gradients, training norm and pools in the GPU report: awkward geometries, then speed.

The layers of `gpu_report.py` have what an inference needs; this is the rest of `r3d_kernels/triton`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import measure
import torch
import torch.nn.functional as F
from gpu_bn_act import SHAPES, epilogue
from gpu_common import FP32_PROMISE, gpu_seconds, largest, roofline, timed
from gpu_networks import network_layers
from gpu_sections import Failed, Section, progress
from gpu_triton_layers import require_triton
from torch import Tensor

from r3d_kernels.problems import ConvProblem

__all__ = ["sections"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NORMS = ((2, 65, 3, 9, 11), (1, 7, 2, 3, 5), (4, 64, 8, 28, 28), (2, 512, 2, 7, 7))
WINDOWS = ((3, 2, 1), ((1, 3, 3), (1, 2, 2), (0, 1, 1)), ((2, 3, 4), (3, 1, 2), (1, 1, 2)))
CHANNELS = (64, 45, 8, 3)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _allowed(dtype: torch.dtype) -> float:
    return FP32_PROMISE if dtype == torch.float32 else 2 * torch.finfo(dtype).eps


def _check_norm(
    shape: Sequence[int], dtype: torch.dtype, device: str, with_residual: bool
) -> Iterator[tuple[str, float]]:
    """(what, relative L2 error) of y and of every gradient against float64."""
    from r3d_kernels.triton import norm

    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    x, residual, dy = (normal(*shape).to(dtype) for _ in range(3))
    leaves = [3 * x + 20, normal(shape[1]) + 2, normal(shape[1]), residual][: 4 if with_residual else 3]
    leaves = [t.detach().requires_grad_() for t in leaves]
    y, mean, var = norm.batch_norm_act(*leaves)
    grads = torch.autograd.grad(y, leaves, dy)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = F.batch_norm(wide[0], None, None, wide[1], wide[2], True)
    exact = exact + wide[3] if with_residual else exact
    # by the mask of our own y: rounding moves the edge of the ReLU
    exact_grads = torch.autograd.grad(torch.where(y > 0, exact, 0), wide, dy.double())
    pixels = wide[0].transpose(0, 1).flatten(1)
    for what, got, want in (
        ("norm", y, exact.relu()),
        ("mean", mean, pixels.mean(1)),
        ("variance", var, pixels.var(1, unbiased=False)),
        *zip(
            ("norm's dx", "norm's dgamma", "norm's dbeta", "norm's dresidual"),
            grads,
            exact_grads,
            strict=False,
        ),
    ):
        # a gradient may be the small difference of large terms
        got, want = got.detach(), want.detach()
        size = max(float(want.norm()), float(dy.double().norm()) if what.startswith("norm's") else 0.0)
        yield what, float((got.double() - want).norm()) / max(size, 1e-30)


def check_norm_and_pools(device: str = "cuda") -> dict[str, Any]:
    """Training norm and its gradients, max-pool bit for bit as torch's with NaN, average and head, against float64."""
    require_triton()
    from r3d_kernels.triton import pool

    rows: list[dict[str, Any]] = []

    def note(dtype: torch.dtype, what: str, about: object, error: float) -> None:
        row = {"dtype": _name(dtype), "what": what, "about": str(about), "error": error}
        rows.append(row | {"allowed": _allowed(dtype)})

    for dtype in DTYPES:
        for shape in NORMS:
            for residual in (True, False):  # which tell in two ways where the ReLU let something through
                for what, error in _check_norm(shape, dtype, device, residual):
                    note(dtype, what, (shape, residual), error)
        for channels in CHANNELS:
            x = torch.randn(2, channels, 5, 9, 8)
            x.view(-1)[:: 3 * channels] = float("nan")
            x = x.to(device, dtype).contiguous(memory_format=torch.channels_last_3d)
            for window in WINDOWS:
                y, want = pool.max_pool3d(x, *window), F.max_pool3d(x.float(), *window).to(dtype)
                same = torch.equal(y.nan_to_num(-7.0), want.nan_to_num(-7.0))
                note(dtype, "max-pool", (channels, window), 0.0 if same else 1.0)
            x = x.nan_to_num(1.0)
            weight, bias = (torch.randn(*s, device=device).to(dtype) for s in ((19, channels), (19,)))
            mean = x.double().mean((2, 3, 4))
            for what, y, want in (
                ("average", pool.global_avg_pool3d(x), mean),
                (
                    "head",
                    pool.avg_pool_linear(x, weight, bias),
                    F.linear(mean, weight.double(), bias.double()),
                ),
            ):
                note(dtype, what, channels, float((y.double() - want).norm() / want.norm()))
    bad = [row for row in rows if not row["error"] <= row["allowed"]]
    if bad:
        raise Failed(f"{len(bad)} of {len(rows)} cases are wrong, first {bad[0]}", {"rows": rows})
    return {"cases": len(rows), "largest_error": largest(rows)}


def triton_norm_speed() -> dict[str, Any]:
    """Training batch norm + residual + ReLU, forward and backward: its share of the speed of a copy."""
    require_triton()
    from r3d_kernels.triton import norm

    copy_speed, rows = roofline()["copy_gbyte_per_s"], []
    cached = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)
    for dtype in (torch.bfloat16, torch.float32):
        for shape in SHAPES:
            e = epilogue(shape, dtype)
            leaves = [t.requires_grad_() for t in (e.x, e.scale, e.shift, e.residual)]
            dy = torch.randn_like(e.x)

            def ours(leaves=leaves, dy=dy) -> Any:
                x, gamma, beta, residual = leaves
                return torch.autograd.grad(norm.batch_norm_act(x, gamma, beta, residual)[0], leaves, dy)

            def stock(leaves=leaves, dy=dy) -> Any:
                x, gamma, beta, residual = leaves
                y = F.relu(F.batch_norm(x, None, None, gamma, beta, True) + residual)
                return torch.autograd.grad(y, leaves, dy)

            seconds = gpu_seconds({"ours": ours, "stock": stock}, rounds=9, graphs=True)
            row = norm_row(shape, dtype, seconds, e.x.numel() * e.x.element_size(), copy_speed, cached)
            del e, leaves, dy
            row["errors"] = dict(_check_norm(shape, dtype, "cuda", True))  # at the size that is timed
            rows.append(row)
            progress(norm_rows=rows)
    data = {"copy_gbyte_per_s": copy_speed, "norm_rows": rows, "share_of_copy": norm_share(rows)}
    for row in rows:
        if not max(row["errors"].values()) <= _allowed(getattr(torch, row["dtype"])):
            raise Failed(f"the norm is wrong: {row}", data)
    return data


def norm_row(
    shape: Sequence[int],
    dtype: torch.dtype,
    seconds: dict[str, float],
    size: int,
    copy_speed: float,
    cached: int,
) -> dict[str, Any]:
    """`size`: bytes of one tensor; `cached`: bytes of the L2 cache."""
    # forward: x twice, residual, y; backward: x, y, dy twice, dx, dresidual
    moved = 12 * size
    return {
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "ms": {name: round(1e3 * s, 4) for name, s in seconds.items()},
        "timed": timed(seconds),
        "share_of_copy": round(moved / seconds["ours"] / 1e9 / copy_speed, 3),
        # Only there is the speed of a copy the limit; smaller ones are bound by launches, or faster than memory.
        "beyond_l2": size > cached,
    }


def norm_share(rows: Sequence[dict[str, Any]]) -> float | None:
    """What the floor is held against: the least share among bfloat16 tensors that do not fit into the L2 cache."""
    shares = [r["share_of_copy"] for r in rows if r["dtype"] == "bfloat16" and r["beyond_l2"]]
    return min(shares, default=None)


def gradient_speed(
    problems: Sequence[tuple[ConvProblem, int]] | None = None,
    dtype_name: str = "bf16",
    device: str = "cuda",
    timer: Callable[..., dict[str, float]] | None = None,
) -> dict[str, Any]:
    """Each layer's two gradients: ours as the tuner chose them, and cuDNN's. `problems`: with how often they occur."""
    require_triton()
    from r3d_kernels.triton import conv3d

    problems = network_layers("r3d_18", 8) if problems is None else problems
    timer = timer or functools.partial(gpu_seconds, graphs=True)
    dtype, rows = measure.DTYPES[dtype_name], []
    for p, count in problems:
        t = p.tensors(dtype, device=device)
        dy = (
            torch.randn(p.out_shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last_3d)
        )
        geometry = (p.stride, p.padding, p.dilation, p.groups)
        names = dict(zip(("stride", "padding", "dilation", "groups"), geometry, strict=True))

        def stock(which: int, t=t, dy=dy, geometry=geometry) -> Tensor:
            *steps, groups = geometry
            mask = [which == 0, which == 1, False]
            return torch.ops.aten.convolution_backward(
                dy, t.x, t.weight, None, *steps, False, [0, 0, 0], groups, mask
            )[which]

        ours = {
            "input": functools.partial(conv3d.conv3d_input_grad, dy, t.weight, p.in_shape, **names),
            "weight": functools.partial(conv3d.conv3d_weight_grad, t.x, dy, p.weight_shape, **names),
        }
        row: dict[str, Any] = {"problem": str(p), "count": count}
        for which, (name, call) in enumerate(ours.items()):
            call()  # the tuner measures here
            seconds = timer({"triton": call, "stock": functools.partial(stock, which)}, rounds=9)
            row[name] = {
                "ms": {engine: round(1e3 * s, 4) for engine, s in seconds.items()},
                "timed": timed(seconds),
                "triton_is_faster_than_cudnn": round(seconds["stock"] / seconds["triton"], 3),
            }
        rows.append(row)
    return {"dtype": dtype_name, "gradients": rows}


POOLS = {
    "hara's stem": ((8, 64, 16, 56, 56), (3, 2, 1)),
    "seed18's stem": ((8, 64, 8, 56, 56), ((1, 3, 3), (1, 2, 2), (0, 1, 1))),
}
HEAD = ((8, 512, 2, 7, 7), 400)


def pool_speed(
    device: str = "cuda",
    timer: Callable[..., dict[str, float]] | None = None,
    pools: dict[str, Any] = POOLS,
    head: Any = HEAD,
) -> dict[str, Any]:
    """Max-pool and head through each backend that has them, and what "auto" makes of it."""
    require_triton()
    from r3d_kernels import backend, ops

    timer, rows = timer or functools.partial(gpu_seconds, graphs=True), []
    for dtype in (torch.bfloat16, torch.float32):

        def through(name: str, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
            def run() -> Tensor:
                with torch.no_grad(), backend(name):
                    return call()

            return run

        calls: dict[str, Callable[[], Tensor]] = {}
        for what, (shape, window) in pools.items():
            x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last_3d)
            calls[f"max-pool of {what}"] = functools.partial(ops.max_pool3d, x, *window)
        shape, classes = head
        x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last_3d)
        weight = torch.randn(classes, shape[1], device=device).to(dtype)
        calls["head"] = functools.partial(ops.avg_pool_linear, x, weight)
        for what, call in calls.items():
            engines = {name: through(name, call) for name in ("cuda", "triton", "torch", "auto")}
            seconds = timer(engines, rounds=9)
            us = {name: round(1e6 * s, 2) for name, s in seconds.items()}
            rows.append({"what": what, "dtype": _name(dtype), "us": us, "timed": timed(seconds)})
    return {"pools": rows}


def sections() -> list[Section]:
    """What gpu_report runs."""
    return [
        Section("Triton: norm and pools against float64", check_norm_and_pools, 20),
        Section("Triton: gradients of r3d_18 bf16 batch 8", gradient_speed, 60),
        Section("Triton: pools", pool_speed, 10),
    ]
