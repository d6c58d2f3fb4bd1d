"""The max-pool after the stem, and the average pool with the linear head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import measure
import torch
from torch import Tensor, nn

from r3d_kernels.nn import avg_pool_linear, max_pool3d

ENGINES = ("stock", "stock_cl", "fused")

Forward = Callable[..., Tensor]


def _input(shape: tuple[int, ...], dtype: torch.dtype, engine: str) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))  # [N, C, D, H, W]
    memory_format = torch.contiguous_format if engine == "stock" else torch.channels_last_3d
    return x.to(dtype).contiguous(memory_format=memory_format)


def _measure(benchmark: Any, call: Forward, x: Tensor, module: nn.Module, engine: str, what: str) -> Tensor:
    with torch.inference_mode():
        call(x, module, fused=engine == "fused")
        out = benchmark(call, x, module, fused=engine == "fused")
    moved = (x.numel() + out.numel()) * x.element_size()
    benchmark.name = engine
    benchmark.group = f"{what} {'x'.join(map(str, x.shape))} {x.dtype}".replace("torch.", "")
    benchmark.extra_info |= {
        "input": list(x.shape),
        "engine": engine,
        "threads": torch.get_num_threads(),
        "mbytes": moved / 1e6,
    }
    if benchmark.stats is not None:  # None when run with --benchmark-disable
        benchmark.extra_info["gbyte_per_s"] = moved / 1e9 / benchmark.stats.stats.median
    return out


def test_max_pool3d_hara(benchmark: Any, batch: int, dtype_name: str, engine: str) -> None:
    """3/2/1 after the 7x7x7 stem of the network of 2018."""
    x = _input((batch, 64, 16, 56, 56), measure.DTYPES[dtype_name], engine)
    out = _measure(benchmark, max_pool3d, x, nn.MaxPool3d(3, 2, 1), engine, "max_pool3d f3s2p1")
    assert out.shape == (batch, 64, 8, 28, 28)


def test_max_pool3d_seed(benchmark: Any, batch: int, dtype_name: str, engine: str) -> None:
    """(1, 3, 3), stride (1, 2, 2) after the simplified stem."""
    x = _input((batch, 64, 8, 56, 56), measure.DTYPES[dtype_name], engine)
    pool = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
    out = _measure(benchmark, max_pool3d, x, pool, engine, "max_pool3d f1x3x3s1x2x2p0x1x1")
    assert out.shape == (batch, 64, 8, 28, 28)


def test_avg_pool_linear(benchmark: Any, batch: int, dtype_name: str, engine: str) -> None:
    """The head of depth 18: global average pool, 512 to 400."""
    dtype = measure.DTYPES[dtype_name]
    x = _input((batch, 512, 2, 7, 7), dtype, engine)
    out = _measure(
        benchmark, avg_pool_linear, x, nn.Linear(512, 400).to(dtype), engine, "avg_pool_linear k400"
    )
    assert out.shape == (batch, 400)
