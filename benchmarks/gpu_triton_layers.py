"""Triton's convolution in the GPU report: every configuration against float64, layers and a network beside cuDNN."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import measure
import torch
import torch.nn.functional as F
from gpu_common import FP32_PROMISE, gpu_seconds, largest, timed
from gpu_networks import network_layers, placed, reference
from gpu_sections import Failed, NotHere, progress
from torch import Tensor

from r3d_kernels.problems import ConvProblem

__all__ = [
    "TRITON_PROBLEMS",
    "check_triton",
    "inductor_template",
    "require_triton",
    "triton_layers",
    "triton_network",
]

TRITON_PROBLEMS = (
    "n2c64d5h9w11k64f3p1+res+relu",
    "n2c3d5h20w22k45f3x7x7s1x2x2p1x3x3+relu",
    "n1c45d5h9w9k64f3x1x1p1x0x0+relu",
    "n1c64d5h9w9k230f1x3x3p0x1x1+res+relu",
    "n1c921d3h5w5k65f3x1x1p1x0x0+relu",
    "n2c64d6h14w14k128f3s2p1+relu",
    "n2c64d6h14w14k128f1s2",
    "n3c256d3h7w7k512f1+res+relu",
    "n1c512d2h7w7k512f3p1+res+relu",
    "n2c32d7h9w8k48f3x2x3s1x2x1p2x1x3l2x3x2g2+res+relu",
    "n8c128d8h28w28k256f3p1+res+relu",
)


def require_triton() -> None:
    """Our Triton kernels, or NotHere."""
    from r3d_kernels.triton.backend import why_no_triton

    if (why_not := why_no_triton()) is not None:
        raise NotHere(why_not)


def _allowed(dtype: torch.dtype, precision: str) -> float:
    if dtype == torch.float32:
        # TF32, which torch allows, has ten bits: rounded to them 3e-4, with the others dropped 7e-4 and more
        return FP32_PROMISE if precision == "ieee" else 5e-4
    return 2 * torch.finfo(dtype).eps


def _apart(y: Tensor, expected: Tensor) -> float:
    """Relative L2 error; measured on the device, because outputs are large here."""
    return float((y.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def check_triton(
    device: str = "cuda",
    problems: Sequence[str] = TRITON_PROBLEMS,
    left: Callable[[], float] = lambda: math.inf,
) -> dict[str, Any]:
    """Every configuration that a layer or one of its gradients may try, against float64; as far as there is time.

    The first configuration of every problem comes before the others of any: each takes seconds to compile.
    """
    require_triton()
    firsts, others = [], []
    for text in problems:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            first, *more = _cases(ConvProblem.parse(text), dtype, device)
            firsts.append(first)
            others += more
    cases = firsts + others
    rows: list[dict[str, Any]] = []
    for at in range(0, len(cases), _AT_ONCE):
        some = cases[at : at + _AT_ONCE]
        if left() < 5:
            break
        _compile(some, left)
        for case in some:
            if left() < 3:
                break
            error, allowed = (
                _apart(case.run(*case.tensors), case.expected),
                _allowed(case.dtype, case.precision),
            )
            dtype_name = str(case.dtype).removeprefix("torch.")
            rows.append(
                {
                    "problem": case.problem,
                    "dtype": dtype_name,
                    "what": case.what,
                    "error": error,
                    "allowed": allowed,
                }
            )
        progress(rows=rows)
    bad = [row for row in rows if not row["error"] <= row["allowed"]]
    if bad:
        raise Failed(f"{len(bad)} of {len(rows)} cases are wrong, first {bad[0]}", {"rows": rows})
    return {"cases": len(rows), "not_reached": len(cases) - len(rows), "largest_error": largest(rows)}


_AT_ONCE = 48  # cases that are compiled together, before any of them runs


@dataclass(frozen=True)
class _Case:
    """One configuration of one problem."""

    problem: str
    dtype: torch.dtype
    precision: str
    what: str
    run: Callable[..., Tensor]
    tensors: tuple[Tensor | None, ...]
    expected: Tensor  # float64


def _cases(p: ConvProblem, dtype: torch.dtype, device: str) -> Iterator[_Case]:
    """A layer's configurations, the default first, and those of its gradients."""
    from r3d_kernels.triton import config as configs
    from r3d_kernels.triton import conv3d

    geometry = (p.stride, p.padding, p.dilation, p.groups)
    t = p.tensors(dtype, device=device)
    precision = configs.precision_of(dtype)
    scale = (t.gamma.double() / (t.running_var.double() + t.eps).sqrt()).float()
    bias = (t.beta.double() - t.running_mean.double() * scale.double()).float()
    x, weight = t.x.double().requires_grad_(), t.weight.double().requires_grad_()
    y = F.conv3d(x, weight, None, *geometry)
    dy = torch.randn_like(y).to(dtype)
    dx, dw = torch.autograd.grad(y, (x, weight), dy.double())
    dy = dy.contiguous(memory_format=torch.channels_last_3d)
    y = y.detach() * scale.double().view(1, -1, 1, 1, 1) + bias.double().view(1, -1, 1, 1, 1)
    y = y if t.residual is None else y + t.residual.double()
    y = y.relu() if p.activation == "relu" else y
    about = (p, dtype, precision, configs.machine(t.x.device))
    for what, all_of, make, tensors, expected in (
        ("", configs.candidates, _forward, (t.x, t.weight, scale, bias, t.residual), y),
        ("input gradient ", configs.input_grads, conv3d.input_grad, (dy, t.weight), dx),
        ("weight gradient ", configs.weight_grads, conv3d.weight_grad, (t.x, dy), dw),
    ):
        for config in all_of(*about):
            run = make(p, config, precision)
            yield _Case(str(p), dtype, precision, f"{what}{config}", run, tensors, expected)


def _forward(p: ConvProblem, config: Any, precision: str) -> Callable[..., Tensor]:
    from r3d_kernels.triton import conv3d

    return conv3d.forward(p, config, precision, True, True)


def _compile(cases: Sequence[_Case], left: Callable[[], float]) -> None:
    """What the cases launch, several at once; what does not compile says so when it runs."""
    from r3d_kernels.triton import ahead
    from r3d_kernels.triton.backend import interpreted

    if interpreted():
        return
    with ahead.noted() as jobs:
        for case in cases:
            with contextlib.suppress(Exception):
                case.run(*map(ahead.like, case.tensors))
    ahead.compile_all(jobs, cases[0].expected.device, max(left() - 5, 0))


def inductor_template(
    call: Callable[..., Tensor], operands: Sequence[Tensor | None]
) -> Callable[..., Tensor]:
    """`call` compiled so that its convolution is inductor's own Triton template, with what follows it fused in.

    Raises:
        NotHere: where inductor has no such template for it.
    """
    import torch._inductor.config as inductor
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()  # other layers go through the same function, and its limit of recompilations
    # Without ATEN among them: the fastest of inductor's templates, and never cuDNN under its name.
    only = {"max_autotune_conv_backends": "TRITON", "max_autotune_gemm_backends": "TRITON"}
    afresh = {"force_disable_caches": True}  # or its source would not be seen
    try:
        with inductor.patch(max_autotune=True, **only, **afresh):
            compiled = torch.compile(call, dynamic=False, fullgraph=True)
            _, sources = run_and_get_code(compiled, *operands)
    except Exception as e:  # a lowering without choices, a template that does not compile
        raise NotHere(f"{type(e).__name__}: {next(iter(str(e).splitlines()), '')}") from e
    if not any("triton_tem_" in source for source in sources):
        raise NotHere("inductor took another way than its template")
    return compiled


def _bn_stock(
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor,
    beta: Tensor,
    residual: Tensor | None,
    p: ConvProblem,
    eps: float,
) -> Tensor:
    y = F.conv3d(x, weight, None, p.stride, p.padding, p.dilation, p.groups)
    y = F.batch_norm(y, mean, var, gamma, beta, False, 0.0, eps)
    y = y if residual is None else y + residual
    return F.relu(y) if p.activation == "relu" else y


_COMPILES_WITHIN = (
    60.0  # seconds that must be left for inductor to compile and measure its choices for a layer
)


_graphed_seconds = functools.partial(gpu_seconds, graphs=True)


def triton_layers(
    problems: Sequence[tuple[ConvProblem, int]],
    dtype_name: str,
    left: Callable[[], float],
    *,
    device: str = "cuda",
    timer: Callable[..., dict[str, float]] = _graphed_seconds,
    template: Callable[..., Callable[..., Tensor]] = inductor_template,
) -> dict[str, Any]:
    """Each layer: cuDNN's stock layers, our CUDA kernels, Triton as its tuner chose it, inductor's own template.

    `problems` come with how often a network has them. An engine that does not run a layer says why.
    """
    require_triton()
    from r3d_kernels import backends
    from r3d_kernels.triton import conv3d

    dtype, rows = measure.DTYPES[dtype_name], []
    for p, count in problems:
        t = p.tensors(dtype, device=device)
        request = backends.Request(p, dtype, t.x.device, torch.get_num_threads())
        norm = (t.running_mean, t.running_var, t.gamma, t.beta, t.eps)
        layer = backends.Layer.of(t.weight, None, norm)
        calls: dict[str, Callable[[], Tensor]] = {}
        reasons: dict[str, str] = {}
        for kernel in backends.KERNELS:
            reason = kernel.can_run(request)
            if reason is None:
                pack = kernel.pack(layer, request)
                calls[kernel.name] = functools.partial(kernel.run, pack, t.x, t.residual, request)
            elif kernel.backend in ("cuda", "triton"):
                reasons[kernel.name] = reason
        operands = (t.x, t.weight, *norm[:4], t.residual)
        with torch.no_grad():
            if left() < _COMPILES_WITHIN:
                reasons["inductor"] = f"not measured: {max(left(), 0):.0f} s of the budget are left"
            else:
                try:
                    stock = functools.partial(_bn_stock, p=p, eps=t.eps)
                    calls["inductor"] = functools.partial(template(stock, operands), *operands)
                except NotHere as e:
                    reasons["inductor"] = f"not measured: {e}"
            wide = [None if o is None else o.double() for o in operands]
            exact = _bn_stock(*wide, p, t.eps)
            errors = {name: _apart(call(), exact) for name, call in calls.items()}
            seconds = timer(calls, rounds=9)
        scale = torch.ones(p.k, device=device)
        operands = (t.x, t.weight, scale, scale, t.residual)
        others = {
            "cuDNN eager": seconds.get("stock"),
            "our CUDA kernels": min(
                (seconds[k.name] for k in backends.KERNELS if k.backend == "cuda" and k.name in seconds),
                default=None,
            ),
            "inductor's template": seconds.get("inductor"),
        }
        rows.append(
            {
                "problem": str(p),
                "count": count,
                "config": str(conv3d.chosen(p, *operands)[0].config) if "triton" in calls else None,
                "ms": {name: round(1e3 * s, 4) for name, s in seconds.items()},
                "timed": timed(seconds),
                "tflop_per_s": {name: round(p.flops / s / 1e12, 1) for name, s in seconds.items()},
                "errors": errors,
                "reasons": reasons,
                "triton_is_faster_than": {
                    name: round(s / seconds["triton"], 3) if s and "triton" in seconds else "not measured"
                    for name, s in others.items()
                },
            }
        )
        progress(dtype=dtype_name, layers=rows)
    return {"dtype": dtype_name, "layers": rows}


def triton_network(name: str, dtype_name: str, batch: int, device: str = "cuda") -> dict[str, Any]:
    """A network with every convolution through Triton, against eager channels-last."""
    require_triton()
    from r3d_kernels import backend
    from r3d_kernels.backends import Request, explain, prepare

    dtype = measure.DTYPES[dtype_name]
    x = measure.clip(batch).to(device=device, dtype=dtype, memory_format=torch.channels_last_3d)
    stock, fused = (placed(name, dtype, fused=f) for f in (False, True))

    def triton() -> Tensor:
        with torch.no_grad(), backend("triton"):
            return fused(x)

    def eager() -> Tensor:
        with torch.no_grad():
            return stock(x)

    # Compiled for all layers together, or the tuner would take most of the time of this section.
    layers = [Request(p, dtype, x.device, torch.get_num_threads()) for p, _ in network_layers(name, batch)]
    with backend("triton"):
        prepare(layers, lambda done, total: progress(compiled=[done, total]))
    expected = reference(name)
    errors = {
        engine: measure.relative_error(call()[:1].cpu(), expected)
        for engine, call in (("triton", triton), ("stock", eager))
    }
    seconds = gpu_seconds({"triton": triton, "stock": eager}, rounds=9)
    data = {
        "ms": {engine: round(1e3 * s, 4) for engine, s in seconds.items()},
        "triton_is_faster": round(seconds["stock"] / seconds["triton"], 3),
        "errors": errors,
    }
    elsewhere = [f"{r.layer}: {r.kernel} ({r.reason})" for r in explain(fused) if r.backend != "triton"]
    if elsewhere:
        raise Failed(f"{len(elsewhere)} layers did not run through Triton, first {elsewhere[0]}", data)
    if not errors["triton"] <= 2 * errors["stock"] + torch.finfo(dtype).eps / 2:
        raise Failed(f"the network's error through Triton is {errors['triton']:.1e}", data)
    return data
