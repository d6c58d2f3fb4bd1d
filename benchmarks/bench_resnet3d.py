"""Whole networks: stock torch in both memory formats, torch.compile with freezing, its peers, and here."""

from __future__ import annotations

import functools
from typing import Any

import measure
import peers
import pytest
import torch
from torch import nn

from r3d_kernels.models import create_model
from r3d_kernels.problems import network_problems


@functools.lru_cache(maxsize=1)  # the engines of one network follow each other
def _model(network: str) -> nn.Module:
    torch.manual_seed(0)
    return measure.calibrate(create_model(network, fused=False))


def test_resnet3d(benchmark: Any, network: str, batch: int, dtype_name: str, engine: str) -> None:
    model, x = _model(network), measure.clip(batch)
    built = peers.build(engine, model, x, measure.DTYPES[dtype_name], torch.get_num_threads())
    if built.run is None:
        pytest.skip(f"{built.label}: {built.reason}")
    gflop = sum(problem.flops for _, problem in network_problems(model, x.shape)) / 1e9
    benchmark.name = engine
    benchmark.group = f"{network} batch {batch} {dtype_name} {gflop:.1f} GFLOP"
    benchmark.extra_info |= {
        "network": network,
        "input": list(x.shape),
        "dtype": dtype_name,
        "engine": engine,
        "threads": torch.get_num_threads(),
        "gflop": gflop,
    }
    logits = benchmark(built.run)
    if benchmark.stats is not None:  # None when run with --benchmark-disable
        benchmark.extra_info["gflop_per_s"] = gflop / benchmark.stats.stats.median
    assert logits.shape[0] == batch
    assert logits.isfinite().all()
