"""What a call of a Triton kernel costs in Python, without a GPU: compiled for one that is not here, launched nowhere.

    python benchmarks/launch_overhead.py [--arch 90] [--json FILE]

Triton's driver is replaced by one that compiles as ever and drops the launch, so that everything up to the driver's own
call is measured: microseconds of one processor. What is under "Triton alone" is the same launch through `kernel[grid]`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

__all__ = ["DryDriver", "dry"]

LAYERS = {
    "3x3x3": ("n1c64d4h14w14k64f3p1+res+relu", "tiled 64x64x64 w4 s3 g8 k1"),
    "3x3x3, a sum in 4 parts": ("n1c64d2h7w7k64f3p1+res+relu", "tiled 64x64x64 w4 s3 g8 k4"),
    "3x3x3, descriptors": ("n1c64d4h16w16k64f3p1+res+relu", "boxes 64x64x64 w4 s3 g8 k1"),
    "stem": ("n1c3d4h16w16k64f3x7x7s1x2x2p1x3x3+relu", "rows 64x64x32 w4 s3 g8 k1"),
}


class DryDriver:
    """Triton's view of a GPU that compiles and does not run.

    `launched`: what was launched, as (kernel, grid, stream, arguments), where `keep` is set.
    """

    def __init__(self, arch: int, device: int = 99) -> None:
        from triton.backends.compiler import GPUTarget

        self.target, self.device, self.stream = GPUTarget("cuda", arch, 32), device, 0
        self.keep = False
        self.launched: list[tuple[str, tuple[int, ...], int, tuple[Any, ...]]] = []
        self.utils = SimpleNamespace(
            load_binary=lambda name, *_: (name, name, 0, 0, 1024),
            unload_module=lambda _: None,
            get_device_properties=lambda _: {"max_shared_mem": 232448},
        )

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(x: int, y: int, z: int, stream: int, function: str, *rest: Any) -> None:
            if self.keep:
                # packed metadata, launch metadata and two hooks come before the kernel's own arguments
                self.launched.append((function, (x, y, z), stream, rest[4:]))

        return launch


@contextlib.contextmanager
def dry(arch: int = 90) -> Iterator[DryDriver]:
    """Triton without a GPU inside this block; our operations take CPU tensors there."""
    from triton.runtime import driver

    from r3d_kernels.triton import launch

    if os.environ.get("TRITON_INTERPRET"):
        raise RuntimeError("TRITON_INTERPRET: expected it unset, the interpreter compiles nothing")
    fake, interpreted, before = DryDriver(arch), launch.interpreted, driver._active
    driver.set_active(fake)
    launch.interpreted = lambda: True
    try:
        yield fake
    finally:
        launch.interpreted = interpreted
        driver._active = before


def microseconds(call: Callable[[], Any], seconds: float = 0.3, rounds: int = 7) -> float:
    """Processor time of a call, the best of some rounds of many: what disturbs it only adds to the time."""
    call()
    begin = time.thread_time()
    call()
    count = max(1, int(seconds / rounds / max(time.thread_time() - begin, 1e-7)))
    best = float("inf")
    for _ in range(rounds):
        begin = time.thread_time()
        for _ in range(count):
            call()
        best = min(best, (time.thread_time() - begin) / count)
    return best * 1e6


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    from r3d_kernels.problems import ConvProblem
    from r3d_kernels.triton import conv3d, norm
    from r3d_kernels.triton.config import Config

    def vector(size: int) -> torch.Tensor:
        return torch.rand(size) + 0.5

    for name, (text, config) in LAYERS.items():
        p = ConvProblem.parse(text)
        t = p.tensors(torch.bfloat16)
        run = conv3d.forward(p, Config.parse(config), "half", True, True)
        operands = (t.x, run.pack(t.weight), vector(p.k), vector(p.k), t.residual)  # as a layer keeps them
        yield f"{name}: a prepared launch", lambda run=run, operands=operands: run.run(*operands)
    p = ConvProblem.parse(LAYERS["3x3x3"][0])
    t = p.tensors(torch.bfloat16)
    scale, bias = vector(p.k), vector(p.k)
    geometry = {"stride": p.stride, "padding": p.padding, "activation": "relu"}
    yield (
        "3x3x3: the functional form",
        lambda: conv3d.conv3d(t.x, t.weight, scale, bias, t.residual, **geometry),
    )
    dy = torch.empty(p.out_shape, dtype=t.x.dtype, memory_format=torch.channels_last_3d)
    yield "3x3x3: input gradient", lambda: conv3d.conv3d_input_grad(dy, t.weight, p.in_shape, padding=1)
    yield "3x3x3: weight gradient", lambda: conv3d.conv3d_weight_grad(t.x, dy, p.weight_shape, padding=1)
    gamma, beta = vector(p.k), vector(p.k)
    yield "training norm, forward", lambda: norm.batch_norm_act(dy, gamma, beta, t.residual)
    statistics = torch.stack([gamma, beta])
    backward = torch.ops.r3d_kernels.triton_batch_norm_act_backward
    operands = (dy, dy, dy, statistics, gamma, beta)
    yield "training norm, backward as an operation", lambda: backward(*operands, True, True, 1e-5)
    leaves = [v.detach().clone().requires_grad_() for v in (dy, gamma, beta, t.residual)]

    def step() -> None:
        with torch.enable_grad():
            y, _, _ = norm.batch_norm_act(*leaves)
        torch.autograd.grad(y, leaves, dy)

    yield "training norm, forward and backward", step


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arch", type=int, default=90, help="compute capability, default: %(default)s")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, float] = {}
    with dry(args.arch), torch.no_grad():
        for name, call in calls():
            found[name] = round(microseconds(call), 2)
            print(f"{found[name]:8.2f} us  {name}")
    if args.json:
        import measure
        import triton

        measure.write_json(
            Path(args.json),
            {"machine": measure.machine(), "triton": triton.__version__, "microseconds": found},
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
