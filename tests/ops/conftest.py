"""What tests of operations share."""

import pytest
import torch

from r3d_kernels import backends
from r3d_kernels.ops import conv3d_sm90, conv3d_sm90_stem


@pytest.fixture
def hopper(monkeypatch):
    """A machine that looks like one with a Hopper GPU."""
    monkeypatch.setattr(backends, "describe", lambda: {"cuda_archs": ["8.0", "9.0a+PTX"], "isa": "avx2"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(conv3d_sm90, "proven", {})
    monkeypatch.setattr(conv3d_sm90, "refused", {})
    monkeypatch.setattr(conv3d_sm90_stem, "proven", {})
