"""A first call, which measures kernels, needs no more memory than the stock layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

_FIRST_CALL = """
import re, sys, torch
from r3d_kernels.nn import ConvBNAct3d
torch.set_num_threads(2)
fused = sys.argv[1] == "fused"
layer = ConvBNAct3d(64, 64, 3, 1, 1, fused=fused).eval()
x = torch.randn(1, 64, 32, 96, 96).contiguous(memory_format=torch.channels_last_3d)
with torch.inference_mode():
    layer(x)
# not getrusage, which tells of the parent's memory at the fork, too
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024)
"""


def peak_of_first_call(kind: str, folder: str) -> float:
    env = dict(os.environ, R3D_KERNELS_CACHE=folder, R3D_KERNELS_TUNE="1")
    run = subprocess.run(
        [sys.executable, "-c", _FIRST_CALL, kind],
        env=env,
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(run.stdout)


def test_measuring_takes_no_more_than_the_stock_layers(tmp_path) -> None:
    stock, fused = (peak_of_first_call(kind, str(tmp_path)) for kind in ("stock", "fused"))
    assert list(tmp_path.iterdir()), "nothing was measured"
    assert fused <= stock + 24  # one output is 72 MiB; packed weights, scratch and the code of kernels
