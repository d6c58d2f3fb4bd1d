"""cuDNN's fused convolution among the kernels, without a GPU: what it takes, and what it is called with."""

import pytest
import torch
import torch.nn.functional as F

from r3d_kernels import backends
from r3d_kernels.problems import ConvProblem


def request(text="n1c16d4h8w8k24f3p1+relu", dtype=torch.bfloat16, device="cuda:0"):
    return backends.Request(ConvProblem.parse(text), dtype, torch.device(device), 1)


@pytest.fixture
def kernel():
    (found,) = (k for k in backends.KERNELS if k.name == "cuDNN fused")
    return found


def test_what_it_takes(kernel, monkeypatch):
    assert kernel.can_run(request()) is None
    assert kernel.can_run(request("n1c16d4h8w8k24f3p1+res+relu", torch.float16)) is None
    assert kernel.can_run(request(device="cpu")) == "needs a CUDA tensor, got cpu"
    assert kernel.can_run(request("n1c16d4h8w8k24f3p1")) == "always ends in a ReLU"
    assert "bfloat16 and float16" in kernel.can_run(request(dtype=torch.float32))
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "no fused convolution" in kernel.can_run(request())


@pytest.mark.parametrize("text", ["n2c16d4h8w8k24f3s2p1x0x2+relu", "n1c5d3h6w7k9f3p1+res+relu"])
def test_its_operands(kernel, monkeypatch, text):
    """By torch on the CPU: within the promise of the stock layers' error."""

    def by_torch(x, weight, bias, stride, padding, dilation, groups):
        assert x.is_contiguous(memory_format=torch.channels_last_3d)
        assert weight.is_contiguous(memory_format=torch.channels_last_3d)
        wide = (t.double() for t in (x, weight, bias))
        return F.relu(F.conv3d(*wide, stride, padding, dilation, groups)).to(x.dtype)

    def with_residual(x, weight, z, alpha, bias, stride, padding, dilation, groups):
        assert alpha == 1
        wide = (t.double() for t in (x, weight, bias))
        return F.relu(F.conv3d(*wide, stride, padding, dilation, groups) + z.double()).to(x.dtype)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", by_torch)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", with_residual)
    p = ConvProblem.parse(text)
    t = p.tensors(torch.bfloat16)
    norm = (t.running_mean, t.running_var, t.gamma, t.beta, t.eps)
    layer, r = backends.Layer.of(t.weight, None, norm), request(text)
    y = kernel.run(kernel.pack(layer, r), t.x, t.residual, r)
    stock = next(k for k in backends.KERNELS if k.name == "stock")
    wide = backends.Layer.of(t.weight.double(), None, tuple(v.double() for v in norm[:4]) + norm[4:])
    exact = F.conv3d(t.x.double(), t.weight.double(), None, p.stride, p.padding)
    exact = exact * wide.scale.view(1, -1, 1, 1, 1) + wide.shift.view(1, -1, 1, 1, 1)
    exact = F.relu(exact if t.residual is None else exact + t.residual.double())
    theirs = stock.run(stock.pack(layer, r), t.x, t.residual, r)

    def error(y):
        return float((y.double() - exact).norm() / exact.norm())

    assert error(y) <= 2 * error(theirs) + torch.finfo(torch.bfloat16).eps / 2
