"""bn_act in the GPU report: batch norm, residual and ReLU in one pass, against float64 and against torch's three."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import measure
import torch
import torch.nn.functional as F
from gpu_common import FP32_PROMISE, NO_EPS, gpu_seconds, largest, on_two_streams, require_op, roofline, timed
from gpu_sections import Failed
from torch import Tensor

__all__ = [
    "CHANNELS",
    "SHAPES",
    "Epilogue",
    "bn_act_speed",
    "check_bn_act",
    "check_graph",
    "check_repetitions",
    "check_streams",
    "epilogue",
]

CHANNELS = (1, 3, 7, 8, 45, 64, 65, 230, 921)
SHAPES = (
    (8, 64, 16, 56, 56),
    (8, 128, 8, 28, 28),
    (8, 256, 4, 14, 14),
    (8, 512, 2, 7, 7),
    (32, 64, 16, 56, 56),
)


@dataclass(frozen=True)
class Epilogue:
    """Inputs of one bn_act call."""

    x: Tensor  # [N, C, D, H, W], channels last
    scale: Tensor  # [C], float32
    shift: Tensor  # [C], float32
    mean: Tensor  # [C], float32: zeros, for the stock batch norm
    var: Tensor  # [C], float32: ones
    residual: Tensor | None
    activation: str

    def ours(self) -> Tensor:
        return torch.ops.r3d_kernels.bn_act(self.x, self.scale, self.shift, self.residual, self.activation)

    def stock(self) -> Tensor:
        """Batch norm, add and ReLU of torch: mean 0, variance 1 and no eps leave scale and shift."""
        y = F.batch_norm(self.x, self.mean, self.var, self.scale, self.shift, eps=NO_EPS)
        if self.residual is not None:
            y = y + self.residual
        return F.relu(y) if self.activation == "relu" else y

    def exact(self) -> Tensor:
        shape = (1, -1, 1, 1, 1)
        y = self.x.double() * self.scale.double().view(shape) + self.shift.double().view(shape)
        if self.residual is not None:
            y = y + self.residual.double()
        return F.relu(y) if self.activation == "relu" else y

    @property
    def bytes(self) -> int:
        """Least traffic: x and the residual in, y out."""
        tensors = 2 if self.residual is None else 3
        return tensors * self.x.numel() * self.x.element_size() + 8 * self.scale.numel()


def epilogue(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    residual: bool = True,
    activation: str = "relu",
    seed: int = 0,
    device: str = "cuda",
) -> Epilogue:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    def place(t: Tensor) -> Tensor:
        return t.to(dtype).contiguous(memory_format=torch.channels_last_3d)

    scale = 0.5 + normal(shape[1]).abs()
    return Epilogue(
        x=place(normal(*shape)),
        scale=scale,
        shift=normal(shape[1]),
        mean=torch.zeros_like(scale),
        var=torch.ones_like(scale),
        residual=place(normal(*shape)) if residual else None,
        activation=activation,
    )


def check_bn_act(device: str = "cuda") -> dict[str, Any]:
    """Every dtype, odd channels, with and without residual and activation, against float64."""
    require_op()
    rows, bad = [], []
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for dtype in dtypes if device == "cuda" else dtypes[:2]:  # half precision is the GPU's
        for channels in CHANNELS:
            for residual in (False, True):
                for activation in ("none", "relu"):
                    e = epilogue(
                        (2, channels, 3, 5, 7), dtype, residual=residual, activation=activation, device=device
                    )
                    y, expected = e.ours(), e.exact()
                    error = measure.relative_error(y, expected)
                    stock = measure.relative_error(e.stock(), expected)
                    allowed = 2 * stock + torch.finfo(dtype).eps / 2
                    if dtype == torch.float32:
                        allowed = FP32_PROMISE
                    row = {
                        "dtype": str(dtype).removeprefix("torch."),
                        "channels": channels,
                        "residual": residual,
                        "activation": activation,
                        "error": error,
                        "stock_error": stock,
                        "allowed": allowed,
                    }
                    rows.append(row)
                    like = y.dtype == dtype and y.shape == e.x.shape
                    like &= y.is_contiguous(memory_format=torch.channels_last_3d)
                    # `not <=`: a NaN is a failure too
                    if not error <= allowed or not like:
                        bad.append(row)
    empty = epilogue((0, 64, 2, 3, 3), torch.float32, device=device)
    if empty.ours().shape != empty.x.shape:
        raise Failed("an empty batch changes its shape", {"rows": rows})
    if bad:
        raise Failed(f"{len(bad)} of {len(rows)} cases are wrong, first {bad[0]}", {"rows": rows})
    return {"cases": len(rows), "largest_error": largest(rows)}


def check_repetitions(count: int = 200, device: str = "cuda") -> dict[str, Any]:
    """The same bits every time: a race shows up as a difference."""
    require_op()
    for dtype, bits in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16)):
        for channels in (64, 65, 921):
            e = epilogue((2, channels, 8, 14, 14), dtype, device=device)
            first = e.ours()
            different = torch.zeros((), dtype=torch.int64, device=device)
            for _ in range(count):
                # NaN-safe: bits are compared, and the answer stays on the device until the end
                different += (e.ours().view(bits) != first.view(bits)).any().long()
            if int(different):
                raise Failed(f"{int(different)} of {count} repetitions differ: {dtype}, {channels} channels")
    return {"repetitions": count}


def check_graph() -> dict[str, Any]:
    """Captured into a CUDA graph and replayed on new data."""
    require_op()
    e = epilogue((2, 64, 8, 28, 28), torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        e.ours()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = e.ours()
    for seed in (1, 2):
        e.x.copy_(epilogue(e.x.shape, torch.bfloat16, seed=seed).x)
        graph.replay()
        if not torch.equal(y, e.ours()):
            raise Failed("a replayed graph gives another result than the call")
    return {"replays": 2}


def check_streams() -> dict[str, Any]:
    """Two streams at once, each with its own data."""
    require_op()
    work = [epilogue((2, 64 + i, 8, 28, 28), torch.float32, seed=i) for i in range(2)]
    return on_two_streams([e.ours for e in work])


def bn_act_speed() -> dict[str, Any]:
    """bn_act against torch's three operations, and its share of the speed of a copy."""
    require_op()
    copy_speed = roofline()["copy_gbyte_per_s"]
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for shape in SHAPES:
            e = epilogue(shape, dtype)
            seconds = gpu_seconds({"ours": e.ours, "stock": e.stock}, graphs=True)
            speed = e.bytes / seconds["ours"] / 1e9
            rows.append(
                {
                    "shape": list(shape),
                    "dtype": str(dtype).removeprefix("torch."),
                    "mbytes": round(e.bytes / 1e6, 2),
                    # Tensors that fit into the L2 cache can be faster than a copy in memory.
                    "l2_mbytes": round(
                        getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) / 1e6
                    ),
                    "ours_us": round(1e6 * seconds["ours"], 2),
                    "stock_us": round(1e6 * seconds["stock"], 2),
                    "timed": timed(seconds),
                    "ours_is_faster": round(seconds["stock"] / seconds["ours"], 3),
                    "gbyte_per_s": round(speed, 1),
                    "share_of_copy": round(speed / copy_speed, 3),
                }
            )
    return {"copy_gbyte_per_s": copy_speed, "rows": rows}
