"""The sm80 convolution, max-pool and head in the GPU report: awkward geometries, then speed.

python benchmarks/gpu_sm80.py [--multiprocessors N]

needs no GPU: what the kernel's own prediction, which chooses its tiles, says of every layer.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
from typing import Any

import measure
import torch
import torch.nn.functional as F
from gpu_common import gpu_seconds, require_op, roofline, timed
from gpu_networks import quick
from gpu_sections import Failed, NotHere, Section, progress
from torch import Tensor

# Three different paddings first: an exchanged pair of axes shows there.
GEOMETRIES = (
    "n2c64d5h6w7k64f3x3x3p0x1x2+res+relu",
    "n2c16d5h6w7k8f3x2x4s2x3x1p2x0x1l1x2x1+relu",
    "n2c64d4h9w11k64f3p1+res+relu",
    "n3c24d5h9w8k45f3s2p1+relu",
    "n2c45d5h7w9k64f3x1x1p1x0x0+res+relu",
    "n1c45d3h9w9k230f1x3x3p0x1x1+res",
    "n1c230d2h7w7k921f1",
    "n1c128d4h7w7k128f3p2x1x2l2x1x2+res+relu",
    "n2c3d4h29w31k64f3x7x7s1x2x2p1x3x3+relu",
    "n1c3d8h29w31k64f7s1x2x2p3+relu",
    "n1c1d8h21w23k16f7s1x2x2p3+relu",
    "n4c512d2h7w7k512f3p1+res+relu",
    "n1c8d3h5w6k24f3p1",
)
LAYERS = {
    "stem": "n{}c3d16h112w112k64f3x7x7s1x2x2p1x3x3+relu",
    "layer1": "n{}c64d16h56w56k64f3p1+res+relu",
    "layer2.0.conv1": "n{}c64d16h56w56k128f3s2p1+relu",
    "layer2": "n{}c128d8h28w28k128f3p1+res+relu",
    "layer3": "n{}c256d4h14w14k256f3p1+res+relu",
    "layer4": "n{}c512d2h7w7k512f3p1+res+relu",
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KERNELS = ("sm80", "sm80 128x128", "sm80 128x64", "sm80 64x64")
TF32_ERROR = 1e-3  # relative L2, of products with both factors rounded to 11 bits


class Problem:
    """One fused convolution, run by any kernel of `backends`."""

    def __init__(self, text: str, dtype: torch.dtype, device: str, seed: int = 0) -> None:
        from r3d_kernels import backends
        from r3d_kernels.problems import ConvProblem

        p = self.p = ConvProblem.parse(text)
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g)

        def place(t: Tensor) -> Tensor:
            return t.to(device=device, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)

        self.x = place(normal(p.n, p.c, p.d, p.h, p.w))
        self.weight = (normal(p.k, p.c, *p.kernel) / math.sqrt(p.c * math.prod(p.kernel))).to(device, dtype)
        self.residual = place(normal(p.n, p.k, *p.out_size)) if p.residual else None
        self.norm = tuple(
            t.to(device) for t in (normal(p.k), 0.5 + normal(p.k).abs(), 0.5 + normal(p.k).abs(), normal(p.k))
        )
        self.request = backends.Request(p, dtype, self.x.device, torch.get_num_threads())
        self.layer = backends.Layer.of(self.weight, None, (*self.norm, 1e-5))

    def call(self, name: str) -> Any:
        """The kernel as a call without arguments; a sentence where it cannot run."""
        from r3d_kernels import backends

        kernel = next(k for k in backends.KERNELS if k.name == name)
        why_not = kernel.can_run(self.request)
        if why_not is not None:
            return why_not
        pack = kernel.pack(self.layer, self.request)
        return functools.partial(kernel.run, pack, self.x, self.residual, self.request)

    def exact(self) -> Tensor:
        """float64, on the CPU."""
        p = self.p
        y = F.conv3d(self.x.double().cpu(), self.weight.double().cpu(), None, p.stride, p.padding, p.dilation)
        y = F.batch_norm(y, *(t.double().cpu() for t in self.norm), False, 0.0, 1e-5)
        if self.residual is not None:
            y = y + self.residual.double().cpu()
        return F.relu(y) if p.activation == "relu" else y


def _in_rows(y: Tensor) -> bool:
    """Channels innermost, pixels one after the other, at multiples of 16 bytes where channels make none."""
    _, k, d, h, w = y.shape
    pitches = (k, k + -k % (16 // y.element_size()))
    return any(y.stride() == (d * h * w * p, 1, h * w * p, w * p, p) for p in pitches)


def check_conv3d(device: str = "cuda", kernel: str = "sm80") -> dict[str, Any]:
    """Every geometry and dtype against float64; NaN and shape mistakes count as wrong."""
    rows, bad = [], []
    with torch.no_grad():
        for text in GEOMETRIES:
            for dtype in DTYPES:
                problem = Problem(text, dtype, device)
                ours = problem.call(kernel)
                if isinstance(ours, str):
                    raise NotHere(f"{kernel}: {ours}")
                exact, y = problem.exact(), ours()
                error = measure.relative_error(y.cpu(), exact)
                stock = measure.relative_error(problem.call("stock")().cpu(), exact)
                allowed = 2 * stock + torch.finfo(dtype).eps / 2
                allowed = max(allowed, TF32_ERROR) if dtype == torch.float32 else allowed
                name = str(dtype).removeprefix("torch.")
                row = {
                    "problem": text,
                    "dtype": name,
                    "error": error,
                    "stock_error": stock,
                    "allowed": allowed,
                }
                rows.append(row)
                if not error <= allowed or not _in_rows(y):
                    bad.append(row)
                progress(rows=rows)
    if bad:
        raise Failed(f"{len(bad)} of {len(rows)} cases are wrong, first {bad[0]}", {"rows": rows})
    return {"cases": len(rows), "rows_of_errors": rows}


def check_repetitions(count: int = 200, device: str = "cuda", kernel: str = "sm80") -> dict[str, Any]:
    """The same bits every time; the last geometry splits its sum."""
    for text in (GEOMETRIES[0], GEOMETRIES[8], "n1c512d1h4w4k512f3p1+res+relu"):
        ours = Problem(text, torch.bfloat16, device).call(kernel)
        if isinstance(ours, str):
            raise NotHere(f"{kernel}: {ours}")
        first = ours().view(torch.int16)
        different = torch.zeros((), dtype=torch.int64, device=device)
        for _ in range(count):
            different += (ours().view(torch.int16) != first).any().long()
        if int(different):
            raise Failed(f"{int(different)} of {count} repetitions differ: {text}")
    return {"repetitions": count}


def check_pool_and_head(device: str = "cuda") -> dict[str, Any]:
    """Max-pool bit for bit as torch's, NaN included; head against float64."""
    from r3d_kernels import backend, ops

    require_op()
    cases = 0
    pool, head = backend("cuda")(ops.max_pool3d), backend("cuda")(ops.avg_pool_linear)
    for dtype in DTYPES if device == "cuda" else (torch.bfloat16, torch.float32):
        for channels in (64, 45, 8, 3):
            x = torch.randn(2, channels, 5, 9, 8)
            x.view(-1)[:: 3 * channels] = math.nan
            x = x.to(device, dtype).contiguous(memory_format=torch.channels_last_3d)
            for window in ((3, 2, 1), ((1, 3, 3), (1, 2, 2), (0, 1, 1))):
                want = F.max_pool3d(x.float(), *window).to(dtype)
                if not torch.equal(pool(x, *window).nan_to_num(-7.0), want.nan_to_num(-7.0)):
                    raise Failed(f"max_pool3d differs from torch's: {dtype}, {channels}, {window}")
                cases += 1
            x, weight = x.nan_to_num(1.0), torch.randn(19, channels).to(device, dtype)
            exact = F.linear(x.double().mean((2, 3, 4)), weight.double())
            error = measure.relative_error(head(x, weight).cpu(), exact.cpu())
            if not error <= (5e-6 if dtype == torch.float32 else torch.finfo(dtype).eps):
                raise Failed(f"avg_pool_linear: error {error:.1e}: {dtype}, {channels} channels")
            cases += 1
    return {"cases": cases}


CLIP_MEAN, CLIP_STD = (110.2, 100.6, 96.9), (58.4, 57.2, 57.5)


def check_clips(device: str = "cuda") -> dict[str, Any]:
    """A decoder's uint8 clip, normalised by the stem: every layout against float64, and as a CUDA graph."""
    from r3d_kernels import ResNet3D, backends

    errors = {}
    frames = torch.randint(
        0, 256, (2, 8, 56, 60, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    clip = frames.permute(0, 4, 1, 2, 3)
    for stem in ("hara", "seed18", "torchvision"):
        torch.manual_seed(0)
        model = ResNet3D(9, depth=10, stem=stem, widen_factor=0.5, clip_mean=CLIP_MEAN, clip_std=CLIP_STD)
        model.eval()
        with torch.no_grad():
            want = copy.deepcopy(model).double()(clip)
        for dtype in DTYPES if device == "cuda" else (torch.float32,):
            ours = copy.deepcopy(model).to(device=device, dtype=dtype)
            for name, x in (("planes", clip.contiguous()), ("pixels", clip)):
                x = x.to(device)
                found = {}
                for ours.fused in (False, True):
                    with torch.no_grad():
                        y = ours(x)
                    found[ours.fused] = measure.relative_error(y.cpu(), want)
                errors[f"{stem} {str(dtype).removeprefix('torch.')} {name}"] = found[True]
                tf32 = TF32_ERROR if device == "cuda" and backends.tf32_allowed() else 1e-5
                floor = tf32 if dtype == torch.float32 else torch.finfo(dtype).eps
                if not found[True] <= 2 * found[False] + floor:
                    raise Failed(f"{stem} {dtype} {name}: error {found[True]:.1e}, stock {found[False]:.1e}")
            if device == "cuda" and not torch.equal(ours.graphed(x)(x), y):
                raise Failed(f"{stem} {dtype}: the graph of a uint8 clip gives another result than the pass")
    return {"cases": len(errors), "worst": max(errors.values()), "errors": errors}


def layer_speed(batch: int) -> dict[str, Any]:
    """r3d_18's layers in bfloat16: ours, cuDNN with our epilogue, and stock; share of a matrix product's rate."""
    rate = roofline()["matmul_tflop_per_s"]["bfloat16"]
    rows = []
    with torch.no_grad():
        for name, text in LAYERS.items():
            problem = Problem(text.format(batch), torch.bfloat16, "cuda")
            calls = {k: problem.call(k) for k in (*KERNELS, "cuDNN + bn_act", "stock")}
            if isinstance(calls["sm80"], str):
                raise NotHere(f"sm80: {calls['sm80']}")
            able = {k: c for k, c in calls.items() if not isinstance(c, str)}
            seconds = gpu_seconds(able, rounds=9, graphs=True)
            tflops = 2 * problem.p.macs / seconds["sm80"] / 1e12
            rows.append(
                {
                    "layer": name,
                    "problem": str(problem.p),
                    "us": {k: round(1e6 * s, 2) for k, s in seconds.items()},
                    "timed": timed(seconds),
                    "tflop_per_s": round(tflops, 1),
                    "share_of_matmul": round(tflops / rate, 3),
                }
            )
            progress(batch=batch, layers=rows)
    return {"batch": batch, "layers": rows}


def small_calls() -> None:
    """For compute-sanitizer: every tile's tails, split sums, padded rows, pools and head."""
    with torch.no_grad():
        for text in (*GEOMETRIES[:4], *GEOMETRIES[8:11], "n1c256d1h3w3k64f3p1"):
            for dtype in DTYPES:
                ours = Problem(text, dtype, "cuda").call("sm80")
                if not isinstance(ours, str):
                    ours()


def sections() -> list[Section]:
    """What gpu_report runs."""
    return [
        Section("sm80 convolution against float64", check_conv3d, 20, 90, "sm80"),
        Section("sm80 convolution: 200 repetitions, bitwise", check_repetitions, 5, 60, "sm80"),
        Section("max-pool and head", check_pool_and_head, 5),
        Section("uint8 clips against float64", quick(check_clips), 10, 90),
        *(
            Section(f"sm80 layers, batch {n}", functools.partial(layer_speed, batch=n), 10, 60, "sm80")
            for n in (8, 1, 32)
        ),
    ]


def on_paper(network: str, batch: int, multiprocessors: int) -> list[dict[str, Any]]:
    """Each different layer in bfloat16: work, traffic, tiles, waves, predicted share of the tensor cores."""
    from r3d_kernels._sm80 import TILES
    from r3d_kernels.problems import layers_of

    rows = []
    for name, layer in layers_of(network).items():
        p = layer.with_batch(batch)
        geometry = ([p.n, p.c, p.d, p.h, p.w], [p.k, p.c, *p.kernel], torch.bfloat16)
        steps = (p.stride, p.padding, p.dilation)
        tile, splits, cycles = torch.ops.r3d_kernels.conv3d_sm80_choice(*geometry, *steps, multiprocessors)
        rows_of, columns = (int(size) for size in TILES[tile].split("x"))
        tiles = math.ceil(p.n * math.prod(p.out_size) / rows_of) * math.ceil(p.k / columns)
        rows.append(
            {
                "layer": name,
                "gflop": round(p.flops / 1e9, 3),
                "mbyte": round(p.bytes(torch.bfloat16) / 1e6, 2),
                "tile": TILES[tile],
                "splits": splits,
                "tiles": tiles * splits,
                "waves": round(tiles * splits / multiprocessors, 2),
                # 1024 multiplications a cycle and multiprocessor
                "share": round(p.macs / 1024 / multiprocessors / cycles, 3),
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--multiprocessors", type=int, default=108, help="default: %(default)s, an A100's")
    args = parser.parse_args()
    print("predicted, not measured")
    for network in ("r3d_18", "r3d_50", "hara_r3d_50"):
        for batch in (1, 8, 32):
            print(f"\n{network}, batch {batch}, {args.multiprocessors} multiprocessors")
            for row in on_paper(network, batch, args.multiprocessors):
                print("  ".join(f"{name} {value}" for name, value in row.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
