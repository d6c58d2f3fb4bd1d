"""The Hopper convolution of few channels in the GPU report: awkward geometries against float64, then speed."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import gpu_sm80
import torch
import torch.nn.functional as F
from gpu_common import gpu_seconds, on_two_streams, roofline, timed
from gpu_sections import Failed, NotHere, Section, progress
from gpu_sm90 import require_sm90
from torch import Tensor

from r3d_kernels import _pooled, backends
from r3d_kernels._sm90_stem import WINDOWS
from r3d_kernels.problems import ConvProblem

__all__ = ["PROBLEMS", "STEMS", "Stem", "check", "sections"]

# Three different paddings, tails of rows and channels, filters that fill their units of 16 bytes and do not.
PROBLEMS = (
    "n2c3d4h29w31k64f3x7x7s1x2x2p1x3x3+relu",
    "n1c3d8h28w30k64f7s1x2x2p3+relu",
    "n1c3d2h29w33k45f1x7x7s1x2x2p0x3x3",
    "n2c1d9h32w31k70f7s2p3+relu",
    "n1c2d3h27w29k16f3x5x4s1x2x2p0x2x1",
    "n1c3d3h28w19k24f3p1x0x2",
    "n1c8d3h26w17k8f3x2x3p2x1x0+relu",
    "n2c1d3h31w27k8f3x5x3s1x3x1p1x2x1",
    "n1c1d4h29w30k8f2x7x3s2x4x2p1x0x1",
    "n1c2d2h25w37k8f2x3x6s1x1x4p1x1x3",
    "n2c3d5h112w112k64f3x7x7s1x2x2p1x3x3+relu",
)
DTYPES = (torch.bfloat16, torch.float16)
STEMS = {
    "torchvision's": "n{}c3d16h112w112k64f3x7x7s1x2x2p1x3x3+relu",
    "Hara's": "n{}c3d16h112w112k64f7s1x2x2p3+relu",
    "R(2+1)D's": "n{}c3d16h112w112k45f1x7x7s1x2x2p0x3x3+relu",
    "one channel": "n{}c1d32h128w128k64f7s2p3+relu",
}
KERNELS = ("wgmma stem", "sm80", "sm80 64x64")
POOLED = {  # stem -> its problem, frames of the max-pool behind it
    "Hara's": (STEMS["Hara's"], 3),
    "seed18's": ("n{}c3d16h112w112k64f7s2p3+relu", 1),
    "one channel": (STEMS["one channel"], 3),
}


class Stem:
    """One stem with its data; `clip`: x is a decoder's uint8 planes, with a scale and a shift."""

    def __init__(
        self, text: str, dtype: torch.dtype, clip: bool, device: str = "cuda", seed: int = 0
    ) -> None:
        p = self.problem = ConvProblem.parse(text)
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g)

        self.dtype = dtype
        self.clip: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
        if clip:
            self.x = torch.randint(0, 256, p.in_shape, generator=g, dtype=torch.uint8).to(device)
            self.clip = (torch.full((p.c,), 1 / 64, device=device), normal(p.c).to(device))
        else:
            self.x = normal(*p.in_shape).to(device, dtype).contiguous(memory_format=torch.channels_last_3d)
        taps = p.c * math.prod(p.kernel)
        self.weight = (normal(*p.weight_shape) / math.sqrt(taps)).to(device, dtype)
        self.scale, self.bias = normal(p.k).to(device), normal(p.k).to(device)

    def ours(self, kind: int = -1, pool_frames: int = 0) -> Tensor:
        from r3d_kernels.ops.conv3d_sm90_stem import pack

        p = self.problem
        layout = torch.ops.r3d_kernels.conv3d_sm90_stem_layout(p.weight_shape, p.stride)
        operands = (self.x, *self.clip, pack(self.weight, layout), self.scale, self.bias)
        return torch.ops.r3d_kernels.conv3d_sm90_stem(
            *operands, p.k, p.kernel, p.stride, p.padding, p.activation or "none", kind, pool_frames
        )

    def exact(self) -> tuple[Tensor, Tensor]:
        """float64 on the CPU, and the error that one rounding and float32 sums allow each element."""
        p, wide = self.problem, (1, -1, 1, 1, 1)
        x = self.x.cpu()
        if self.clip[0] is not None:
            # in units of 1/64 the products are exact, so that only the sum is rounded, however it is computed
            x = (
                x.double() * self.clip[0].cpu().double().view(wide) + self.clip[1].cpu().double().view(wide)
            ).float()
        x, w = x.to(self.dtype).double(), self.weight.cpu().double()
        scale, bias = (t.cpu().double().view(wide) for t in (self.scale, self.bias))
        y = F.conv3d(x, w, None, p.stride, p.padding) * scale + bias
        size = F.conv3d(x.abs(), w.abs(), None, p.stride, p.padding) * scale.abs() + bias.abs()
        y = y.relu() if p.activation == "relu" else y
        return y, 3e-6 * size + torch.finfo(self.dtype).eps / 2 * 1.001 * y.abs()


def check(device: str = "cuda", run: Callable[[Stem, int, int], Tensor] = Stem.ours) -> list[dict[str, Any]]:
    """A row for each tile; 'worst' is the largest error over what is allowed, so at most 1 where all is well.

    Infinity where the kernel with a max-pool in it gives anything but the maxima of what it gives without.
    """
    rows: list[dict[str, Any]] = []
    for text, dtype, clip in ((t, d, c) for t in PROBLEMS for d in DTYPES for c in (False, True)):
        stem = Stem(text, dtype, clip, device)
        want, allowed = stem.exact()
        for kind in range(-1, 3):
            row = {"problem": text, "dtype": str(dtype).removeprefix("torch."), "clip": clip, "kind": kind}
            rows.append(row)
            progress(rows=rows)
            y = run(stem, kind, 0).cpu().double()
            row["worst"] = ((y - want).abs() / allowed).nan_to_num(float("inf")).max().item()
            for frames, window in WINDOWS.items():
                pooled = run(stem, kind, frames).cpu().double()
                if not torch.equal(pooled, F.max_pool3d(y, *window)):
                    row["worst"] = float("inf")
    return rows


def check_stem() -> dict[str, Any]:
    """Against float64, with and without a max-pool; 200 times the same bits, in a graph, on two streams."""
    require_sm90()
    rows = check()
    bad = [row for row in rows if not row["worst"] <= 1]
    if bad:
        raise Failed(f"{len(bad)} of {len(rows)} runs are wrong, first {bad[0]}", {"rows": rows})
    for frames in (0, *WINDOWS):
        stem = Stem(PROBLEMS[-1], torch.bfloat16, True)
        ours = functools.partial(stem.ours, -1, frames)
        first = ours().view(torch.int16)
        different = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(200):
            different += (ours().view(torch.int16) != first).any().long()
        if int(different):
            raise Failed(f"{int(different)} of 200 repetitions differ, max-pool of {frames} frames")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ours()
        stem.x.copy_(255 - stem.x)
        graph.replay()
        if not torch.equal(y, ours()):
            raise Failed("a replayed graph gives another result than the call")
        stems = [Stem(PROBLEMS[i], torch.bfloat16, True, seed=i) for i in (0, 1)]
        on_two_streams([functools.partial(s.ours, -1, frames) for s in stems])
    runs = len(rows) * (1 + len(WINDOWS))
    return {"runs": runs, "worst": max(row["worst"] for row in rows), "repetitions": 200}


def _rows(batches: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    rate = roofline()["matmul_tflop_per_s"]["bfloat16"]
    for name, text in STEMS.items():
        for batch in batches:
            problem = gpu_sm80.Problem(text.format(batch), torch.bfloat16, "cuda")
            calls = {k: problem.call(k) for k in (*KERNELS, "stock")}
            why_not = {k: c for k, c in calls.items() if isinstance(c, str)}
            able = {k: c for k, c in calls.items() if k not in why_not}
            seconds = gpu_seconds(able, rounds=7, graphs=True)
            row = {
                "stem": name,
                "problem": str(problem.p),
                "us": {k: round(1e6 * s, 2) for k, s in seconds.items()},
                "timed": timed(seconds),
                "reasons": why_not,
            }
            if (ours := seconds.get("wgmma stem")) is not None:
                tflops = 2 * problem.p.macs / ours / 1e12
                row["tflop_per_s"] = round(tflops, 1)
                row["share_of_matmul"] = round(tflops / rate, 3)
            yield row


def stem_speed(batches: tuple[int, ...] = (1, 8, 32)) -> dict[str, Any]:
    """Stems of bfloat16 channels-last clips: ours, the kernel for 8.0, cuDNN's layers."""
    require_sm90()
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for row in _rows(batches):
            rows.append(row)
            progress(stems=rows)
    if not any("wgmma stem" in row["us"] for row in rows):
        raise NotHere(f"wgmma stem: {rows[0]['reasons'].get('wgmma stem')}")
    return {"stems": rows}


def _pool_rows(batches: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    for (name, (text, frames)), batch in itertools.product(POOLED.items(), batches):
        problem = gpu_sm80.Problem(text.format(batch), torch.bfloat16, "cuda")
        kernel = next(k for k in backends.KERNELS if k.name == "wgmma stem")
        if why_not := kernel.can_run(problem.request):
            raise NotHere(f"wgmma stem: {why_not}")
        pack = kernel.pack(problem.layer, problem.request)
        together = kernel.with_pool(problem.request, frames)
        if together is None:
            raise NotHere(f"wgmma stem: takes no max-pool behind {problem.p}")
        stock = problem.call("stock")
        data = (pack, problem.x, None, problem.request)
        calls = {
            "one kernel": functools.partial(together.run, *data),
            "one after the other": functools.partial(_pooled.Apart(kernel, frames).run, *data),
            "convolution alone": functools.partial(kernel.run, *data),
            "stock": lambda stock=stock, frames=frames: F.max_pool3d(stock(), *WINDOWS[frames]),
        }
        seconds = gpu_seconds(calls, rounds=7, graphs=True)
        yield {
            "stem": name,
            "problem": str(problem.p),
            "pool_frames": frames,
            "us": {k: round(1e6 * s, 2) for k, s in seconds.items()},
            "timed": timed(seconds),
        }


def pool_speed(batches: tuple[int, ...] = (1, 8, 32)) -> dict[str, Any]:
    """Stems with their max-pool: in one kernel, one after the other, and cuDNN's layers."""
    require_sm90()
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for row in _pool_rows(batches):
            rows.append(row)
            progress(pooled_stems=rows)
    return {"pooled_stems": rows}


def small_calls() -> None:
    """For compute-sanitizer."""
    for text in PROBLEMS[:-1]:
        for clip, frames in itertools.product((False, True), (0, *WINDOWS)):
            Stem(text, torch.bfloat16, clip).ours(-1, frames)


def sections() -> list[Section]:
    """What gpu_report runs."""
    return [
        Section("wgmma stem against float64", check_stem, 5, 60, "wgmma"),
        Section("wgmma stem: speed", functools.partial(stem_speed), 10, 60, "wgmma"),
        Section("wgmma stem and max-pool: speed", functools.partial(pool_speed), 10, 60, "wgmma"),
    ]
