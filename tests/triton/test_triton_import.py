"""The package without Triton, and how much of it an import loads."""

from __future__ import annotations

import subprocess
import sys
import tempfile


def python(code: str) -> str:
    # somewhere else: a checkout in the current folder would be imported in place of the package under test
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=folder
        )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_no_kernel() -> None:
    """torch itself imports Triton for its counter of operations, which is why Triton itself is not looked for."""
    code = (
        "import sys, r3d_kernels; print(sorted(m for m in sys.modules if m.startswith('r3d_kernels.triton')))"
    )
    assert python(code) == "['r3d_kernels.triton', 'r3d_kernels.triton.backend', 'r3d_kernels.triton.config']"


def test_without_triton_everything_else_works() -> None:
    code = """
import os, sys
sys.modules["triton"] = None  # an import of it fails
os.environ["TRITON_INTERPRET"] = "1"  # or the backend would not even ask for it on a CPU
import torch, r3d_kernels as r3d
layer = r3d.ConvBNAct3d(4, 4, 3, padding=1).eval()
with torch.inference_mode(), r3d.backend("triton"):
    layer(torch.randn(1, 4, 3, 5, 5))
print(r3d.explain(layer)[-1].kernel, "|", r3d.explain(layer)[-1].reason)
"""
    kernel, _, reason = python(code).partition(" | ")
    assert kernel == "stock"
    assert "Triton cannot be imported" in reason


def test_a_network_on_a_cpu_does_not_import_triton() -> None:
    """It takes 70 MiB and a fifth of a second."""
    code = """
import os, sys
os.environ.pop("TRITON_INTERPRET", None)
import torch
before = "triton" in sys.modules
import r3d_kernels as r3d
model = r3d.ResNet3D(3, depth=10, widen_factor=0.25, fused=True).eval()
with torch.inference_mode():
    model(torch.randn(1, 3, 4, 24, 24))
print(before or "triton" not in sys.modules)
from torch.utils.flop_counter import FlopCounterMode
with torch.inference_mode(), FlopCounterMode(display=False) as counter:
    model(torch.randn(1, 3, 4, 24, 24))
print(counter.get_total_flops() > 0)
"""
    assert python(code).split() == ["True", "True"]


def test_an_old_triton_is_refused() -> None:
    code = """
import sys, types
sys.modules["triton"] = types.SimpleNamespace(__version__="3.5.1")
from r3d_kernels.triton.backend import why_no_triton
print(why_no_triton())
"""
    assert python(code) == "needs Triton 3.6 or later, found 3.5.1"


def test_cpu_tensors_are_refused() -> None:
    code = """
import os
os.environ.pop("TRITON_INTERPRET", None)
import torch
from r3d_kernels.triton import conv3d, norm, pool
x, weight = torch.zeros(1, 4, 3, 5, 5), torch.zeros(4, 4, 1, 1, 1)
for call in (
    lambda: conv3d.conv3d(x, weight),
    lambda: conv3d.conv3d_input_grad(x, weight, x.shape),
    lambda: conv3d.conv3d_weight_grad(x, x, weight.shape),
    lambda: norm.batch_norm_act(x),
    lambda: pool.max_pool3d(x, 2),
    lambda: pool.global_avg_pool3d(x),
):
    try:
        call()
    except ValueError as e:
        print(e)
"""
    lines = python(code).splitlines()
    assert len(lines) == 6
    assert all(": expected a CUDA tensor, got one on cpu" in line for line in lines)
