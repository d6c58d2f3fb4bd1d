"""Options and parameters of the benchmarks: which networks, batches and dtypes, on how many threads."""

from __future__ import annotations

from typing import Any

import measure
import peers
import pytest
import torch

from r3d_kernels.problems import LAYER_NETWORKS, ConvProblem, layers_of, unique


def _list(text: str) -> list[str]:
    return [item for item in (part.strip() for part in text.split(",")) if item]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("r3d_kernels")
    group.addoption("--networks", default="r3d_18", help=f"of {','.join(LAYER_NETWORKS)} (default: r3d_18)")
    group.addoption("--problems", default="", help="layers as descriptors, instead of those of --networks")
    group.addoption("--batches", default="1", help="batch sizes (default: 1)")
    group.addoption("--dtypes", default="fp32,bf16", help="fp32, bf16 (default: both)")
    group.addoption(
        "--threads", type=int, default=None, help="threads of torch (default: torch's own choice)"
    )
    group.addoption(
        "--peers",
        default="compile",
        help=f"engines of whole networks: {','.join(peers.PEERS)} (default: compile)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if threads := config.getoption("--threads"):
        torch.set_num_threads(threads)
    for option, known in (("--dtypes", measure.DTYPES), ("--peers", peers.PEERS)):
        for item in _list(config.getoption(option)):
            if item not in known:
                raise pytest.UsageError(f"{option}: unknown {item!r}; known: {', '.join(known)}")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["r3d_kernels"] = measure.machine()


def _problems(config: pytest.Config) -> list[ConvProblem]:
    """The distinct layers that the options ask for, at every batch size."""
    try:
        if texts := _list(config.getoption("--problems")):
            return [ConvProblem.parse(text) for text in texts]
        layers = [p for name in _list(config.getoption("--networks")) for p in layers_of(name).values()]
        batches = [int(item) for item in _list(config.getoption("--batches"))]
    except ValueError as e:
        raise pytest.UsageError(str(e)) from e
    return [problem.with_batch(n) for n in batches for problem, _ in unique(layers)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Engines vary fastest: those of one problem run one after the other, under the same conditions."""
    config = metafunc.config
    names = metafunc.fixturenames
    if "network" in names:
        metafunc.parametrize("network", _list(config.getoption("--networks")))
    if "batch" in names:
        metafunc.parametrize("batch", [int(item) for item in _list(config.getoption("--batches"))])
    if "problem" in names:
        metafunc.parametrize("problem", _problems(config), ids=str)
    if "dtype_name" in names:
        metafunc.parametrize("dtype_name", _list(config.getoption("--dtypes")))
    if "engine" in names:
        engines = getattr(metafunc.module, "ENGINES", None)
        if engines is None:
            wanted = (*peers.ALWAYS, *_list(config.getoption("--peers")))
            engines = [name for name in peers.ENGINES if name in wanted]
        metafunc.parametrize("engine", list(engines))
