"""The Hopper convolution's part of gpu_report.py: cases with their exact answers, and what one layer's speed means."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import gpu_paper
import torch
import torch.nn.functional as F
from gpu_common import NO_EPS, gpu_seconds, on_two_streams, require_op, roofline, timed
from gpu_sections import Failed, NotHere, progress
from torch import Tensor

from r3d_kernels.ops.conv3d_sm90 import TILES, in_rows
from r3d_kernels.problems import ConvProblem, layers_of

# im2col's corners first: three different paddings, kernels, strides and dilations, tails in every dimension.
CORNERS = (
    "n1c8d5h6w7k8f3p0x1x2",
    "n1c8d5h6w7k8f3p2x1x0",
    "n2c24d4h5w6k24f1x3x5p0x2x1+relu",
    "n2c8d5h4w6k8f5x1x3p3x0x2s1x2x3",
    "n1c64d4h5w6k64f3p1x0x2s2x1x2+res+relu",
    "n1c8d9h3w4k8f2x3x4s3x1x2p1x2x3l1x2x1",
    "n2c16d7h7w7k8f3s2p4l3x2x1",
    "n1c8d3h3w40k8f1x1x3p0x0x15l1x1x15",
    "n1c45d4h5w6k230f1x3x5p0x2x1+res+relu",  # channels that are no multiple of 8
    "n2c230d5h4w6k45f5x1x3p3x0x2s1x2x3+res",
    "n3c921d2h7w7k70f3x1x1p1x0x0+relu",
    "n3c128d3h7w9k136f3p1+res+relu",
    "n1c64d3h56w56k64f3p1+res+relu",
    "n1c512d2h7w7k512f3p1+res+relu",
)
# Each is run by every tile that takes it, with the sum in one part and in two.
EVERY_TILE = (
    "n2c72d3h7w29k136f3p1x2x1+res+relu",
    "n2c72d3h9w13k136f1x3x2s1x2x1p0x1x1",
    "n2c77d3h7w29k133f3p1x2x1+res+relu",
)
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Work:
    """Tensors of one fused convolution with an unfolded scale."""

    problem: ConvProblem
    x: Tensor
    weight: Tensor
    scale: Tensor
    bias: Tensor
    residual: Tensor | None

    def dense(self) -> Work:
        """The same with channels side by side, as other kernels leave them: the op copies what TMA cannot read."""
        tensors = (self.x, self.weight, self.residual)
        tensors = [t if t is None else t.contiguous(memory_format=torch.channels_last_3d) for t in tensors]
        return replace(self, x=tensors[0], weight=tensors[1], residual=tensors[2])

    def ours(self, tiles: int = -1, split: int = 0) -> Tensor:
        p = self.problem
        tensors = (self.x, self.weight, self.scale, self.bias, self.residual)
        return torch.ops.r3d_kernels.conv3d_sm90(
            *tensors, p.stride, p.padding, p.dilation, p.activation or "none", tiles, split
        )

    def stock(self) -> Tensor:
        """cuDNN, then batch norm of mean 0 and variance 1, add and ReLU: what torch runs without us."""
        p = self.problem
        y = F.conv3d(self.x, self.weight, None, p.stride, p.padding, p.dilation)
        zeros, ones = torch.zeros_like(self.scale), torch.ones_like(self.scale)
        y = F.batch_norm(y, zeros, ones, self.scale, self.bias, eps=NO_EPS)
        if self.residual is not None:
            y = y + self.residual
        return F.relu(y) if p.activation == "relu" else y

    def cudnn_fused(self) -> Tensor:
        """cuDNN's own convolution + bias + residual + ReLU, the scale folded into weights; raises where it has none."""
        p = self.problem
        if p.activation != "relu":
            raise RuntimeError("cuDNN fuses ReLU only")
        x, weight, bias, residual = self._folded
        geometry = (p.stride, p.padding, p.dilation, 1)
        if residual is None:
            return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
        return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)

    @cached_property
    def _folded(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        def place(t: Tensor) -> Tensor:
            return t.to(self.x.dtype).contiguous(memory_format=torch.channels_last_3d)

        weight = place(self.weight.float() * self.scale.view(-1, 1, 1, 1, 1))
        residual = None if self.residual is None else place(self.residual)
        return place(self.x), weight, self.bias.to(self.x.dtype), residual

    @cached_property
    def exact(self) -> tuple[Tensor, Tensor]:
        """float64 on the CPU, and the error that one rounding and float32 sums allow each element."""
        p, wide = self.problem, (1, -1, 1, 1, 1)
        x, weight, scale, bias = (t.cpu().double() for t in (self.x, self.weight, self.scale, self.bias))

        def conv(a: Tensor, b: Tensor) -> Tensor:
            return F.conv3d(a, b, None, p.stride, p.padding, p.dilation)

        y = conv(x, weight) * scale.view(wide) + bias.view(wide)
        size = conv(x.abs(), weight.abs()) * scale.abs().view(wide) + bias.abs().view(wide)
        if self.residual is not None:
            y = y + self.residual.cpu().double()
            size = size + self.residual.cpu().double().abs()
        y = y.relu() if p.activation == "relu" else y
        return y, 3e-6 * size + torch.finfo(self.x.dtype).eps / 2 * 1.001 * y.abs()


def work(p: ConvProblem, dtype: torch.dtype, seed: int = 0, device: str = "cuda") -> Work:
    """Data of order 1, laid out as the kernel leaves it for itself: NaN lies between pixels where there is room."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def place(t: Tensor) -> Tensor:
        return in_rows(t.to(device, dtype), float("nan"))

    return Work(
        p,
        place(normal(*p.in_shape)),
        place(normal(*p.weight_shape) / (p.c * p.kernel[0] * p.kernel[1] * p.kernel[2]) ** 0.5),
        normal(p.k).to(device),
        normal(p.k).to(device),
        place(normal(*p.out_shape)) if p.residual else None,
    )


def _runs(every: bool, p: ConvProblem) -> Iterator[tuple[int, int]]:
    """(tiles, split) of the op: the plan's own choice, or each tile."""
    if not every:
        yield -1, 0
        return
    for tile, (_, _, taps) in enumerate(TILES):
        if taps == 1 or (p.kernel[2] == taps and p.stride[2] == 1):
            yield from ((1 << tile, split) for split in (1, 2))


def check(
    device: str = "cuda", note: Callable[[list[dict[str, Any]]], None] = lambda rows: None
) -> list[dict[str, Any]]:
    """A row for each run; 'worst' is the largest error over what is allowed, so at most 1 where all is well.

    A run that raises is a row too, and the next one follows, unless the GPU is lost.
    """
    rows: list[dict[str, Any]] = []
    for text in (*CORNERS, *EVERY_TILE):
        p = ConvProblem.parse(text)
        for dtype in DTYPES:
            w = work(p, dtype, device=device)
            want, allowed = w.exact
            runs = [(w, *run) for run in _runs(text in EVERY_TILE, p)]
            if p.c % 8 or p.k % 8:
                runs.append((w.dense(), -1, 0))
            for case, tiles, split in runs:
                name = "chosen" if tiles < 0 else "x".join(map(str, TILES[tiles.bit_length() - 1]))
                row = {
                    "problem": text,
                    "dtype": str(dtype).removeprefix("torch."),
                    "tile": name if case is w else f"{name}, copied",
                    "split": split,
                }
                rows.append(row)
                note(rows)  # a kernel that hangs is the last row
                try:
                    y = case.ours(tiles, split).cpu().double()
                    row["worst"] = ((y - want).abs() / allowed).nan_to_num(float("inf")).max().item()
                except RuntimeError as e:
                    row |= {"worst": float("inf"), "error": next(iter(str(e).splitlines()), "")}
                    if device == "cuda":
                        torch.cuda.synchronize()  # raises again where no later run can work
    return rows


def different_bits(count: int, device: str = "cuda") -> dict[str, int]:
    """How many of `count` repetitions differ from the first, for each problem: a race shows up here."""
    found = {}
    for text in (*CORNERS[-2:], "n2c72d3h9w13k136f1x3x2s1x2x1p0x1x1", "n2c77d3h9w13k133f3p1+res"):
        w = work(ConvProblem.parse(text), torch.bfloat16, device=device)
        first = w.ours()
        different = torch.zeros((), dtype=torch.int64, device=device)
        for _ in range(count):
            different += (w.ours().view(torch.int16) != first.view(torch.int16)).any().long()
        found[text] = int(different)
    return found


def _macs(p: ConvProblem) -> int:
    macs = p.n * p.k * p.c
    for size in (*p.out_size, *p.kernel):
        macs *= size
    return macs


def _layers(network: str, batch: int) -> Iterator[tuple[str, ConvProblem]]:
    """Those that the kernel takes."""
    for name, problem in layers_of(network).items():
        if problem.c >= gpu_paper.FEWEST_CHANNELS:
            yield name, problem.with_batch(batch)


def speed(
    seconds: Callable[[dict[str, Callable[[], Any]]], dict[str, float]],
    rate: float,
    network: str,
    batch: int,
    device: str = "cuda",
    note: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
    usable: Callable[[bool], int] = lambda padded: -1,
) -> list[dict[str, Any]]:
    """Each layer of a network that the kernel takes, against cuDNN; `rate`: TFLOP/s of matrix products, same run.

    `usable`: bits of the tiles that a layer may use here, for channels that are no multiple of 8 or for others.
    """
    rows = []
    for name, p in _layers(network, batch):
        w = work(p, torch.bfloat16, device=device)
        bits = usable(bool(p.c % 8 or p.k % 8))
        calls, why_not = {"ours": partial(w.ours, bits), "stock": w.stock}, None
        try:
            w.cudnn_fused()
            calls["cudnn_fused"] = w.cudnn_fused
        except RuntimeError as e:
            why_not = next(iter(str(e).splitlines()), "")
        found = seconds(calls)
        tflops = 2 * _macs(p) / found["ours"] / 1e12
        paper = gpu_paper.plan(p)
        rows.append(
            {
                "layer": name,
                "problem": str(p),
                "ours_us": round(1e6 * found["ours"], 2),
                "stock_us": round(1e6 * found["stock"], 2),
                "ours_is_faster": round(found["stock"] / found["ours"], 3),
                "cudnn_fused_us": round(1e6 * found["cudnn_fused"], 2) if why_not is None else "not measured",
                "cudnn_fused_reason": why_not,
                "timed": timed(found),
                "tflop_per_s": round(tflops, 1),
                "share_of_matmul": round(tflops / rate, 3),
                "predicted": {
                    "tile": "x".join(map(str, TILES[paper.tile])),
                    "split": paper.split,
                    "us": round(gpu_paper.Row(name, p, 1, paper).seconds * 1e6, 2),
                },
            }
        )
        note(rows)
    return rows


def shares(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the floors are held against: the least shares among 3x3x3 layers of 128 channels or more, and of 64.

    Strictly: layers of stride 2 and the small ones at the end are among them, and named.
    """
    found: dict[str, Any] = {}
    for name, wanted in (("wide", lambda c: c >= 128), ("64", lambda c: c == 64)):
        kind = [
            (row["share_of_matmul"], row["layer"])
            for row in rows
            if (p := ConvProblem.parse(row["problem"])).kernel == (3, 3, 3) and wanted(p.c)
        ]
        if kind:
            found[f"least_share_{name}"], found[f"least_share_{name}_layer"] = min(kind)
    return found


def tiles(
    seconds: Callable[[dict[str, Callable[[], Any]]], dict[str, float]],
    network: str,
    batch: int,
    device: str = "cuda",
    note: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Every tile that takes a layer, with the split that the rule gives it, beside what the rule predicts."""
    rows = []
    for name, p in _layers(network, batch):
        w = work(p, torch.bfloat16, device=device)
        plans = {}
        for tile in range(len(TILES)):
            able = [plan for split in gpu_paper.SPLITS if (plan := gpu_paper.plan_for(p, tile, split))]
            if able:
                plans["x".join(map(str, TILES[tile]))] = min(able, key=lambda plan: plan.cycles)
        found = seconds({n: partial(w.ours, 1 << plan.tile, plan.split) for n, plan in plans.items()})
        chosen = "x".join(map(str, TILES[gpu_paper.plan(p).tile]))
        best = min(found, key=found.__getitem__)
        rows.append(
            {
                "layer": name,
                "problem": str(p),
                "us": {n: round(1e6 * s, 2) for n, s in found.items()},
                "timed": timed(found),
                "split": {n: plan.split for n, plan in plans.items()},
                "predicted_us": {
                    n: round(gpu_paper.Row(name, p, 1, plan).seconds * 1e6, 2) for n, plan in plans.items()
                },
                "chosen": chosen,
                "chosen_us": round(1e6 * found[chosen], 2),
                "best": best,
                "best_us": round(1e6 * found[best], 2),
            }
        )
        note(rows)
    return rows


# ---- sections ----


def require_sm90() -> None:
    """The compiled Hopper kernel on a GPU that runs it, or NotHere."""
    require_op()
    from r3d_kernels.backends import describe

    if not any(arch.startswith("9.0a") for arch in describe()["cuda_archs"]):
        raise NotHere("the package was not compiled for 9.0a")
    if torch.cuda.get_device_capability() != (9, 0):
        raise NotHere("this GPU is not of compute capability 9.0")


def check_sm90() -> dict[str, Any]:
    require_sm90()
    rows = check(note=lambda rows: progress(rows=rows))
    bad = [row for row in rows if not row["worst"] <= 1]
    if bad:
        raise Failed(f"{len(bad)} of {len(rows)} runs are wrong, first {bad[0]}", {"rows": rows})
    return {"runs": len(rows), "worst": max(row["worst"] for row in rows)}


def check_sm90_trial() -> dict[str, Any]:
    """What `backends` asks before a layer may use a tile: bits of those that work, for whole and odd channels."""
    require_sm90()
    from r3d_kernels.ops import conv3d_sm90

    index = torch.cuda.current_device()
    found = {
        name: conv3d_sm90.proven_tiles(index, padded) for name, padded in (("whole", False), ("odd", True))
    }
    if index in conv3d_sm90.refused:
        raise Failed(conv3d_sm90.refused[index])
    wrong = {
        name: ["x".join(map(str, tile)) for i, tile in enumerate(conv3d_sm90.TILES) if not bits >> i & 1]
        for name, bits in found.items()
    }
    if any(wrong.values()):
        raise Failed(f"tiles that fail their trial and are not used: {wrong}", {"refused": wrong})
    return {"tiles": len(conv3d_sm90.TILES)}


def check_sm90_repetitions(count: int = 200) -> dict[str, Any]:
    require_sm90()
    found = different_bits(count)
    if any(found.values()):
        raise Failed(f"repetitions of {count} that differ: {found}", found)
    return {"repetitions": count, "problems": len(found)}


def check_sm90_graph() -> dict[str, Any]:
    """A split sum captured, and replayed on new data: one graph clears its counters, the others have their own.

    They and calls outside of graphs run at the same time, which must not disturb any.
    """
    require_sm90()
    from r3d_kernels.ops.conv3d_sm90 import own_counters

    problem = ConvProblem.parse("n1c512d2h7w7k512f3p1+res+relu")
    w = work(problem, torch.bfloat16)
    w.ours()
    torch.cuda.synchronize()
    graphs, outputs, lent = [], [], []
    for lends in (False, True, True):
        graphs.append(torch.cuda.CUDAGraph())
        counters = own_counters(w.x.device) if lends else contextlib.nullcontext()
        with counters as own, torch.cuda.graph(graphs[-1]):
            outputs += [w.ours(), w.ours()]
        lent.append(own)
    streams = [torch.cuda.Stream() for _ in graphs]
    for seed in (1, 2):
        w.x.copy_(work(problem, torch.bfloat16, seed=seed).x)
        want = w.ours()
        for _ in range(50):
            torch.cuda.synchronize()
            for graph, stream in zip(graphs, streams, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
            called = w.ours()
            torch.cuda.synchronize()
            if not all(torch.equal(y, want) for y in (*outputs, called)):
                raise Failed("a replayed graph gives another result than the call")
    if any(bool(own.any()) for own in lent if own is not None):
        raise Failed("a split sum has left its counters behind")
    return {"replays": 300}


def check_sm90_streams() -> dict[str, Any]:
    """Two streams at once: a split sum, of whose workspace each call needs one of its own, and a large one."""
    require_sm90()
    texts = ("n1c512d2h7w7k512f3p1+res+relu", "n2c128d4h28w28k128f3p1+relu")
    calls = [work(ConvProblem.parse(text), torch.bfloat16, seed=i).ours for i, text in enumerate(texts)]
    return on_two_streams(calls)


def sm90_speed(network: str, batch: int) -> dict[str, Any]:
    require_sm90()
    from r3d_kernels.ops.conv3d_sm90 import proven_tiles

    usable = partial(proven_tiles, torch.cuda.current_device())
    rate = roofline()["matmul_tflop_per_s"]["bfloat16"]
    head = {"network": network, "batch": batch, "matmul_tflop_per_s": rate}
    seconds = partial(gpu_seconds, rounds=9, graphs=True)
    rows = speed(
        seconds, rate, network, batch, note=lambda rows: progress(layers=rows, **head), usable=usable
    )
    return {**head, "layers": rows, **shares(rows)}


def sm90_tiles(network: str, batch: int) -> dict[str, Any]:
    """Every tile on every layer: whether the rule that chooses among them is right."""
    require_sm90()
    seconds = partial(gpu_seconds, rounds=3, sample=2e-3, graphs=True)
    rows = tiles(seconds, network, batch, note=lambda rows: progress(layers=rows))
    return {"layers": rows, "least_chosen_over_best": min(row["best_us"] / row["chosen_us"] for row in rows)}
