"""Compiles kernels for GPUs that are not here, and reads the machine code: `python aot.py < jobs.json > results.json`.

A job names an operation, a problem, a dtype and a compute capability. The operation is called as ever, on CPU tensors;
what it would launch is recorded, with its constants and its specialised arguments, and compiled instead of run. In a
process of its own, because nothing can be compiled while TRITON_INTERPRET is set.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

_DTYPES = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}
_OPTIONS = ("num_warps", "num_stages")


class Recorder:
    """Stands for a kernel and remembers how it was launched."""

    def __init__(self, fn: Any, launches: list[tuple[Any, tuple, dict]]) -> None:
        self.fn, self.launches = fn, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(0 < g < 2**31 for g in grid), grid
        return lambda *args, **meta: self.launches.append((self.fn, args, meta))


def record(job: dict[str, Any]) -> list[tuple[Any, tuple, dict]]:
    """The launches of a job: (kernel, arguments, constants and options)."""
    import torch
    from triton.runtime.jit import JITFunction

    from r3d_kernels.problems import ConvProblem
    from r3d_kernels.triton import config, conv3d, kernels, launch, norm, pool

    launches: list[tuple[Any, tuple, dict]] = []
    for module in (kernels, norm, pool):
        found = {
            name: fn.fn if isinstance(fn, Recorder) else fn
            for name, fn in vars(module).items()
            if isinstance(fn, (JITFunction, Recorder))
        }
        for name, fn in found.items():
            # what another kernel calls has to stay what it is
            if not any(re.search(rf"\b{name}\(", other.src) for other in found.values() if other is not fn):
                setattr(module, name, Recorder(fn, launches))
    pools = (pool._max_pool_launch, pool._average_launch, pool._linear_launch)
    for cached in (norm._forward, norm._backward_of, *pools):
        cached.cache_clear()  # they hold the recorders of an earlier job
    launch.interpreted = lambda: True  # CPU tensors will do: nothing is launched
    p = ConvProblem.parse(job["problem"])
    dtype = getattr(torch, job["dtype"])
    precision = job.get("precision") or ("half" if dtype != torch.float32 else "ieee")

    def tensor(shape: tuple[int, ...], dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(
            shape, dtype=dtype, memory_format=torch.channels_last_3d if len(shape) == 5 else None
        )

    x, weight, y = tensor(p.in_shape), tensor(p.weight_shape), tensor(p.out_shape)
    vector = tensor((p.k,), torch.float32)
    what = job["op"]
    if what == "forward":
        run = launch.Forward(p, config.Config.parse(job["config"]), precision, has_scale=True, has_bias=True)
        run(x, weight, vector, vector, y if p.residual else None)
    elif what == "input_grad":
        launch.InputGrad(p, config.Config.parse(job["config"]), precision)(y, weight)
    elif what == "weight_grad":
        launch.WeightGrad(p, config.Config.parse(job["config"]), precision)(x, y)
    elif what == "norm":
        norm._batch_norm_act._init_fn(y, vector, vector, x, 1e-5, "relu")
        for y_of_relu, residual in ((y, True), (None, False)):
            norm._batch_norm_act_backward._init_fn(
                y, x, y_of_relu, tensor((2, p.k)), vector, vector, True, residual, 1e-5
            )
    elif what == "pool":
        pool._max_pool3d._init_fn(y, [3, 3, 3], [2, 2, 2], [1, 1, 1])
        pool._global_avg_pool3d._init_fn(y)
        pool._avg_pool_linear._init_fn(y, tensor((400, p.k)), tensor((400,)))
    else:
        raise ValueError(f"op: {what!r}")
    assert conv3d  # imported for its registrations
    return launches


def compiled(fn: Any, args: tuple, meta: dict, arch: int) -> Any:
    """The kernel as Triton would compile it for these arguments on a GPU of this compute capability."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.tools.tensor_descriptor import TensorDescriptor

    constants = {k: v for k, v in meta.items() if k not in _OPTIONS}
    positional = [n for n in fn.arg_names if n not in constants]
    values = dict(zip(positional, args, strict=True))
    fixed = set(fn.do_not_specialize or ())
    signature, attributes, constexprs = {}, {}, {}
    for i, name in enumerate(fn.arg_names):
        if name in constants:
            signature[name], constexprs[(i,)] = "constexpr", constants[name]
            continue
        value = values[name]
        divisible = False
        if isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{_DTYPES[str(value.base.dtype)]}{list(value.block_shape)}>"
        elif hasattr(value, "data_ptr"):
            signature[name] = "*" + _DTYPES[str(value.dtype)]
            divisible = value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and name not in fixed:
            signature[name], constexprs[(i,)] = "constexpr", 1
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0 and name not in fixed
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(fn=fn, signature=signature, constexprs=constexprs, attrs=attributes),
        target=GPUTarget("cuda", arch, 32),
        options={k: meta[k] for k in _OPTIONS if k in meta},
    )


def read(kernel: Any) -> dict[str, Any]:
    """Registers, spills, shared memory, and how many instructions of each kind."""
    return {"name": kernel.metadata.name, "shared": kernel.metadata.shared, **_read(kernel.asm["cubin"])}


@cache  # small kernels come with many configurations, and a disassembler takes a fifth of a second for the least
def _read(cubin: bytes) -> dict[str, Any]:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(tool: str, *flags: str) -> str:
            command = [str(tools / tool), *flags, file.name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            return done.stdout + done.stderr

        usage = run("cuobjdump", "-res-usage")
        code = run("nvdisasm", "-c", "-ndf")  # what cuobjdump -sass prints, in two thirds of its time
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if match is None:
        raise ValueError(f"cuobjdump said {usage!r}")
    instructions = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", code, re.MULTILINE)

    def count(pattern: str) -> int:
        return sum(re.match(pattern, i) is not None for i in instructions)

    return {
        "registers": int(match[1]),
        "stack": int(match[2]) + int(match[4]),
        "instructions": len(instructions),
        "spills": count(r"STL|LDL"),
        "HMMA": count(r"HMMA"),
        "HGMMA": count(r"HGMMA"),
        "UTCMMA": count(r"UTC\w*MMA"),
        "FFMA": count(r"FFMA"),
        "LDGSTS": count(r"LDGSTS"),
        "UTMALDG": count(r"UTMALDG"),
        "LDG.128": count(r"LDG\S*\.128"),
        "STG.128": count(r"STG\S*\.128"),
    }


def main() -> None:
    assert "TRITON_INTERPRET" not in os.environ
    results: list[list[dict[str, Any]] | str] = []
    for job in json.load(sys.stdin):
        try:
            seen: dict[str, dict[str, Any]] = {}
            for fn, args, meta in record(job):
                found = read(compiled(fn, args, meta, job["arch"]))
                seen[f"{found['name']}{len(seen)}"] = found
            results.append(list(seen.values()))
        except Exception as e:  # noqa: PERF203 - the other jobs still count; the test shows this one
            results.append(f"{type(e).__name__}: {e}")
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
