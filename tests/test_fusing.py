"""`fuse`: blocks in everybody's spelling run fused, compute the same, and stay what they were."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import math
import operator
import os
import pickle
import random
import sys
import time
import types
import typing
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numerics import assert_keeps_promise
from torch import Tensor, nn
from torch.autograd import forward_ad

import r3d_kernels as r3d
from r3d_kernels import _extension, backends

pytestmark = pytest.mark.skipif(_extension.error is not None, reason="the compiled library is missing")

X = torch.randn(2, 6, 4, 7, 7, generator=torch.Generator().manual_seed(0))


def conv(c: int = 6, k: int = 6, size: int = 3, stride: int = 1, bias: bool = False) -> nn.Conv3d:
    return nn.Conv3d(c, k, size, stride, size // 2, bias=bias)


class InPlace(nn.Module):
    """torchvision's way: containers, an in-place sum, one ReLU module for all."""

    def __init__(self, k: int = 8, stride: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(conv(6, k, stride=stride), nn.BatchNorm3d(k), nn.ReLU(inplace=True))
        self.conv2 = nn.Sequential(conv(k, k), nn.BatchNorm3d(k))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(conv(6, k, 1, stride), nn.BatchNorm3d(k))

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.conv1(x)
        out = self.conv2(out)
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        return self.relu(out)


class Plain(nn.Module):
    """Hara's way: modules side by side, functions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(), nn.BatchNorm3d(6)
        self.conv2, self.bn2 = conv(bias=True), nn.BatchNorm3d(6)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(x + self.bn2(self.conv2(out)))


class ConvModule(nn.Module):
    """One convolution with what belongs to it, and switches."""

    def __init__(self, k: int = 6, act: bool = True) -> None:
        super().__init__()
        self.conv, self.norm, self.act = conv(6, k), nn.BatchNorm3d(k), nn.ReLU() if act else None

    def forward(self, x: Tensor, activate: bool = True) -> Tensor:
        x = self.norm(self.conv(x))
        return self.act(x) if activate and self.act is not None else x


class Wrapped(nn.Module):
    """MMAction's way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvModule(), ConvModule(act=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return self.conv2(self.conv1(x)) + x

        return self.relu(inner(x))


class Methods(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(), nn.SyncBatchNorm(6)
        self.drop = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.bn1(self.conv1(x))).add_(x).relu_()


class Pools(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn, self.relu = conv(), nn.BatchNorm3d(6), nn.ReLU(inplace=True)
        self.pool1, self.pool2 = nn.MaxPool3d(3, 2, 1), nn.MaxPool3d((1, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.pool1(self.relu(self.bn(self.stem(x)))), self.pool1(x)], 1) + self.pool2(
            F.pad(x, (0, 1, 0, 1))[:, :1, :2]
        )


class PreActivation(nn.Module):
    """Norm and ReLU before the convolution; its output is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm3d(6), conv()
        self.bn2, self.conv2 = nn.BatchNorm3d(6), conv()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(y))) + y


class Broadcast(nn.Module):
    """A sum that is no residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(), nn.BatchNorm3d(6)
        self.offset = nn.Parameter(torch.randn(1, 6, 1, 1, 1))
        self.pool = nn.MaxPool3d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(torch.relu(torch.add(self.bn1(self.conv1(x)), self.offset)))


class Disturbed(nn.Module):
    """What a chain reads is overwritten while it runs: all in the order in which it is written."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(), nn.BatchNorm3d(6)
        self.conv2, self.bn2 = conv(), nn.BatchNorm3d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = self.conv1(x)
        x.mul_(2)
        z = self.bn2(self.conv2(x))
        residual = x.clone()
        z = z + residual
        residual.zero_()
        y = self.bn1(y)
        residual += y  # the shortcut itself, which is read again
        return F.relu(z) + residual


class Named(nn.Conv3d):
    """torchvision's convolutions: a subclass that only has a name for its stride."""

    @staticmethod
    def get_downsample_stride(stride: int) -> int:
        return stride


class Weighted(nn.Conv3d):
    """One that computes something of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Subclasses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(Named(6, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU(inplace=True))
        self.conv2 = nn.Sequential(Weighted(6, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


class Other(nn.Module):
    """No ReLU, no norm, a scaled sum, a grouped and a strided convolution, one that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.act = conv(bias=True), nn.LeakyReLU()
        self.conv2 = nn.Conv3d(6, 6, 3, padding="same", groups=3)
        self.norm = nn.GroupNorm(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.conv1(x))
        y = torch.add(self.conv1(y), x, alpha=2)
        return self.norm(self.conv2(y) + y)


# block -> the layers that run fused, as their problems end
BLOCKS: dict[Callable[[], nn.Module], list[str]] = {
    InPlace: ["f3s2p1+relu", "f3s1p1+res+relu", "f1s2p0"],
    Plain: ["f3s1p1+relu", "f3s1p1+res+relu"],
    Wrapped: ["f3s1p1+relu", "f3s1p1+res+relu"],
    Methods: ["f3s1p1+res+relu"],
    Pools: ["f3s1p1+relu"],
    PreActivation: ["f3s1p1", "f3s1p1+res"],
    Broadcast: ["f3s1p1"],
    Disturbed: ["f3s1p1", "f3s1p1+res"],
    Subclasses: ["f3s1p1+relu"],
    Other: ["f3s1p1"],
}


def made(block: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    model = block().eval()
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm3d, nn.SyncBatchNorm)):
            with torch.no_grad():
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2)
                m.weight.uniform_(0.5, 2)
                m.bias.normal_()
    return model


def exact(model: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return r3d.unfuse(copy.deepcopy(model)).double()(x.double())


def problems(model: nn.Module) -> list[str]:
    records = {(r.layer, r.problem) for r in r3d.explain(model)}
    return sorted("f" + problem.split("f", 1)[1] for _, problem in records)


@pytest.mark.parametrize("block", BLOCKS)
def test_every_spelling(block) -> None:
    model = made(block)
    names = list(model.state_dict())
    with torch.no_grad():
        stock = model(X.clone())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert r3d.fuse(model) is model
        x = X.clone()
        assert_keeps_promise(model(x), exact(model), float32_limit=1e-5)
        assert torch.equal(x, X), "its input is overwritten"
        torch.testing.assert_close(model(X), stock, rtol=1e-4, atol=1e-4)
    assert problems(model) == sorted(BLOCKS[block])
    assert list(model.state_dict()) == names
    assert type(model).__name__ == block.__name__
    assert isinstance(model, block)


class Network(nn.Module):
    """A stem of its own, containers of blocks, a head; a method that others call."""

    def __init__(self, stem: bool = True) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = conv(3, 6), nn.BatchNorm3d(6), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool3d(3, 2, 1) if stem else None
        self.layer1 = nn.Sequential(Plain(), InPlace())
        self.fc = nn.Linear(8, 5)

    def logits(self, x: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool3d(x, 1).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        if self.maxpool is not None:
            x = self.maxpool(x)
        return self.logits(self.layer1(x))


CLIP = torch.randn(2, 3, 8, 16, 16, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def network() -> nn.Module:
    return made(Network)


def test_a_network(network) -> None:
    with torch.no_grad():
        stock = network(CLIP)
        r3d.fuse(network)
        assert_keeps_promise(network(CLIP), exact(network, CLIP), float32_limit=1e-5)
        torch.testing.assert_close(network(CLIP), stock, rtol=1e-4, atol=1e-4)
        assert len({r.layer for r in r3d.explain(network)}) == 6
        for dtype in (torch.bfloat16,):
            half = copy.deepcopy(network).to(dtype)
            y = half(CLIP.to(dtype))
            want = exact(half, CLIP.to(dtype))
            assert_keeps_promise(y, want, r3d.unfuse(copy.deepcopy(half))(CLIP.to(dtype)))


def test_weights_and_modules_are_followed(network) -> None:
    r3d.fuse(network)
    with torch.no_grad():
        network(CLIP)
        network.conv1.weight.mul_(-1)
        network.layer1[0].bn1.running_mean.add_(1)
        assert_keeps_promise(network(CLIP), exact(network, CLIP), float32_limit=1e-5)
        network.layer1[1].downsample[0] = conv(6, 8, 1, 2)
        network.layer1[1].relu = nn.Identity()  # was part of a graph
        network.layer1[1].conv2.append(nn.Tanh())
        network.maxpool = None
        want = exact(network, CLIP)
        assert_keeps_promise(network(CLIP), want, float32_limit=1e-5)
        assert_keeps_promise(network(CLIP), want, float32_limit=1e-5)


def test_copies_and_pickles_are_independent(network) -> None:
    r3d.fuse(network)
    with torch.no_grad():
        y = network(CLIP)
        for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network)), copy.copy(network)):
            assert torch.equal(twin(CLIP), y)
            assert type(twin) is type(network)
        twin = copy.deepcopy(network)
        twin.conv1.weight.zero_()
        assert_keeps_promise(twin(CLIP), exact(twin, CLIP), float32_limit=1e-5)
        assert torch.equal(network(CLIP), y)
        assert {r.layer for r in r3d.explain(twin)} == {r.layer for r in r3d.explain(network)}


def test_the_modules_keep_their_methods_and_hooks(network) -> None:
    r3d.fuse(network)
    seen: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen.append(name)

    block = network.layer1[1]
    watched = {
        "block": block,
        "container": block.conv1,  # part of the block's graph
        "relu": block.relu,
        "conv": network.layer1[0].conv1,
        "bn": network.bn1,
        "pool": network.maxpool,
        "layer1": network.layer1,
    }
    with torch.no_grad():
        y = network(CLIP)
        handles = [m.register_forward_hook(hook(name)) for name, m in watched.items()]
        torch.testing.assert_close(network(CLIP), y, rtol=1e-4, atol=1e-4)
        assert sorted(seen) == sorted(watched)
        for handle in handles:
            handle.remove()
        assert torch.equal(network(CLIP), y)
        assert network.logits(torch.ones(1, 8, 2, 2, 2)).shape == (1, 5)


def test_training_is_as_before(network) -> None:
    twin = r3d.fuse(copy.deepcopy(network))
    grads = []
    for model in (network, twin):
        model.train()
        model(CLIP).sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert torch.equal(network.bn1.running_mean, twin.bn1.running_mean)
    twin.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that gradients are enabled
        (gradient,) = torch.autograd.grad(twin(CLIP).sum(), twin.conv1.weight)
    with torch.no_grad():
        want = network.eval()(CLIP)
    torch.testing.assert_close(twin(CLIP.clone()), want, rtol=1e-4, atol=1e-4)
    assert gradient.abs().sum() > 0


def test_a_graph_is_that_of_evaluation() -> None:
    class Noisy(Plain):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y + 100 if self.training else F.dropout(y, 0.5, self.training)

    model = r3d.fuse(made(Noisy).train())
    assert all(m.training for m in model.modules())
    with torch.no_grad():
        assert (model(X) >= 100).all()
        assert_keeps_promise(model.eval()(X), exact(model))
    assert problems(model) == BLOCKS[Plain]


def test_unfuse(network) -> None:
    before = [type(m) for m in network.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        r3d.fuse(r3d.fuse(network))  # twice is once
    assert len(type(network).__mro__) == len(before[0].__mro__) + 2
    with torch.no_grad():
        network(CLIP)
    r3d.unfuse(network)
    assert [type(m) for m in network.modules()] == before
    assert pickle.loads(pickle.dumps(network)) is not None
    ours = r3d.ResNet3D(3, depth=10, fused=True)
    assert not r3d.unfuse(ours).fused


def test_what_cannot_be_traced_is_named(network) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.block = conv(), Plain()

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv1(x)
            return self.block(y) if y.mean() > 0 else self.block(-y)

    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = conv()

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return self.conv1(x) if mask is None else self.conv1(x) * mask

    for cls in (Branches, Optional):
        model = made(cls)
        total = len([m for m in model.modules() if isinstance(m, nn.Conv3d)])
        with pytest.warns(UserWarning, match=rf"1 of {total} convolutions stay as they are.*conv1"):
            r3d.fuse(model)
        with torch.no_grad():
            assert_keeps_promise(model(X), exact(model), float32_limit=1e-5)
        assert type(model) is cls
    assert problems(made(Branches)) == []
    with torch.no_grad():
        mask = torch.zeros(1)
        assert not model(X, mask).any()
        assert not model(X, mask=mask).any()


class Accumulates(nn.Module):
    """Adds to a view of its input, which is what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0
        half = x[:, :3]
        half += self.conv1(x[:, 3:])
        return x


class Keeps(nn.Module):
    """What a caller may look at afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.seen = conv(), []
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        self.last = self.conv1(x)
        return self.last.relu()


class Counts(Keeps):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv1(x)


class AsksForTypes(nn.Module):
    """torchvision's DenseNet does."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.conv1, self.fails = conv(), fails

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Tensor):
            return F.relu(self.conv1(x))
        return self.conv1(torch.cat(x, 1)) if self.fails else self.conv1(x)


def test_a_sum_into_what_others_read() -> None:
    model = r3d.fuse(made(Accumulates))
    with torch.no_grad():
        for _ in range(2):
            assert_keeps_promise(model(X), exact(model))
    assert problems(model) == ["f3s1p1"]


def test_what_a_forward_keeps_is_kept() -> None:
    model = made(Keeps)
    with pytest.warns(UserWarning, match="1 of 1 convolutions stay"):
        r3d.fuse(model)
    assert model.seen == []
    assert "last" not in vars(model)
    with torch.no_grad():
        y = model(X)
    assert len(model.seen) == 1
    assert torch.equal(model.last.relu(), y)
    counts = made(Counts)
    with pytest.warns(UserWarning, match="1 of 1 convolutions stay"):
        r3d.fuse(counts)
    assert counts.calls == 0
    with torch.no_grad():
        counts(X)
    assert counts.calls == 1


@pytest.mark.parametrize("fails", [True, False])
def test_a_graph_that_is_not_the_forward_is_found_out(fails) -> None:
    model = r3d.fuse(made(lambda: AsksForTypes(fails)))
    with torch.no_grad():
        with pytest.warns(UserWarning, match=r"AsksForTypes keeps its own forward.*(fails|something else)"):
            y = model(X)
        assert_keeps_promise(y, exact(model))
        assert (y >= 0).all()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(model(X), y)


def test_a_wrong_input_tells_nothing_of_the_graph(network) -> None:
    r3d.fuse(network)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="expected input"):
            network(CLIP[:, :2])
        assert_keeps_promise(network(CLIP), exact(network, CLIP), float32_limit=1e-5)
    assert len({r.layer for r in r3d.explain(network)}) == 6


def test_only_first_results_are_compared(monkeypatch) -> None:
    copies: list[Tensor] = []
    real = Tensor.clone
    monkeypatch.setattr(Tensor, "clone", lambda t, *args, **how: copies.append(t) or real(t, *args, **how))
    for dtype, first in ((torch.float32, 1), (torch.bfloat16, 0)):
        model = r3d.fuse(made(Plain)).to(dtype)
        with torch.no_grad():
            for compared in (first, 0, 0):
                copies.clear()
                model(X.to(dtype))
                assert len(copies) == compared, dtype


def test_hooks_under_torch_compile(network) -> None:
    """Of modules that are part of a graph: their calls are seen there too."""
    r3d.fuse(network)
    seen: list[str] = []
    with torch.no_grad():
        y = network(CLIP)
        network.layer1[1].conv1.register_forward_hook(lambda *args: seen.append("container"))
        compiled = torch.compile(network, backend="eager")
        torch.testing.assert_close(compiled(CLIP), y, rtol=1e-4, atol=1e-4)
    assert seen


def test_wrong_arguments() -> None:
    for call in (r3d.fuse, r3d.unfuse):
        with pytest.raises(TypeError, match=r"model: expected an nn.Module, got function"):
            call(conv)
    with pytest.raises(ValueError, match="model: expected Conv3d modules, found none in Linear"):
        r3d.fuse(nn.Linear(2, 2))


def test_our_own_models_have_a_switch() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = r3d.ResNet3D(3, depth=10, in_channels=6)
            self.layer, self.block = r3d.ConvBNAct3d(6, 6, 3, padding=1, fused=False), Plain()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(self.block(self.layer(x)))

    model = made(Both)
    r3d.fuse(model)
    assert model.net.fused
    assert model.layer.fused
    assert type(model.net) is r3d.ResNet3D
    x = torch.randn(1, 6, 8, 16, 16)
    with torch.no_grad():
        assert_keeps_promise(model(x), exact(model, x), float32_limit=1e-5)
    assert "net.conv1" in {r.layer for r in r3d.explain(model)}


def test_lazy_modules() -> None:
    model = r3d.fuse(nn.Sequential(nn.LazyConv3d(6, 3), nn.LazyBatchNorm3d(), nn.ReLU()).eval())
    with torch.no_grad():
        model(X)
        assert_keeps_promise(model(X), exact(model))
        r3d.fuse(model)  # now they are what they were to become
        assert_keeps_promise(model(X), exact(model))
    assert problems(model) == ["f3s1p0+relu"]


def test_a_single_convolution_and_samples_without_a_batch() -> None:
    model = r3d.fuse(nn.Sequential(conv(), nn.BatchNorm3d(6), nn.ReLU()).eval())
    one = r3d.fuse(nn.Sequential(conv(), nn.ReLU(), nn.MaxPool3d(2)).eval())
    with torch.no_grad():
        assert_keeps_promise(model(X), exact(model))
        torch.testing.assert_close(one(X[0]), one(X)[0], rtol=1e-4, atol=1e-5)
        assert model(X[:0]).shape == X[:0].shape
        assert len(model[:2]) == 2  # a slice is a container of the same class
        torch.testing.assert_close(model[:2](X).relu(), model(X), rtol=1e-4, atol=1e-5)
    assert set(problems(model)) == {"f3s1p1+relu"}


def test_graphs_of_torch(network) -> None:
    r3d.fuse(network)
    with torch.no_grad():
        y = network(CLIP)
        compiled = torch.compile(network, fullgraph=True)
        torch.testing.assert_close(compiled(CLIP), y, rtol=1e-5, atol=1e-5)
        traced = torch.jit.trace(network, CLIP)
        torch.testing.assert_close(traced(CLIP), y, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.fx.symbolic_trace(network)(CLIP), y, rtol=1e-4, atol=1e-4)
        program = torch.export.export(network, (CLIP,))
        torch.testing.assert_close(program.module()(CLIP), y, rtol=1e-4, atol=1e-4)
        per_sample = torch.func.vmap(lambda x: network(x[None])[0])(CLIP)
        torch.testing.assert_close(per_sample, y, rtol=1e-4, atol=1e-4)


def test_verify(network) -> None:
    with pytest.raises(ValueError, match=r"found none: .*r3d_kernels.fuse\(model\)"):
        r3d.verify(network, CLIP)
    r3d.fuse(network)
    report = r3d.verify(network, CLIP)
    assert report.ok, report
    assert [row.layer for row in report.layers] == [
        "conv1",
        "layer1.0.conv1",
        "layer1.0.conv2",
        "layer1.1.conv1.0",
        "layer1.1.downsample.0",
        "layer1.1.conv2.0",
    ]
    assert all(row.error is not None for row in report.layers)
    with torch.no_grad():
        network(CLIP)
    assert len({r.layer for r in r3d.explain(network)}) == 6, "it is left fused"


def test_backends_are_asked_for_as_elsewhere(network) -> None:
    r3d.fuse(network)
    with torch.no_grad(), r3d.backend("torch"):
        network(CLIP)
    assert {r.backend for r in r3d.explain(network)} == {"torch"}
    assert backends.current_backend() == "auto"


# ------------------------------------------------------------------------------- what a graph would leave as it was


SETTING, SETTINGS, THEIRS, SEEN = 1.0, {"scale": 1.0}, [1.0, 2.0], []


class Settings:
    default = 1.0

    def __init__(self) -> None:
        self.scale, self.inner = 1.0, types.SimpleNamespace(scale=1.0)


class Pair(typing.NamedTuple):
    scale: float
    sizes: list[int]


CONFIGURATION = Settings()


def scaled(y: Tensor) -> Tensor:
    return y * SETTING


class Single(nn.Module):
    """One convolution: part of the graph of whatever holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(), nn.BatchNorm3d(6)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)))


def way(body: Callable[[nn.Module, Tensor], Tensor], base: type[nn.Module] = Plain) -> type[nn.Module]:
    """A block whose forward does something after its convolutions."""

    class Way(base):
        flag, factor = False, 1.0

        def __init__(self) -> None:
            super().__init__()
            self.scale, self.sizes, self.options = 1.0, [1, 1], {"scale": 1.0}
            self.config, self.dtype, self.function = Settings(), torch.float32, torch.relu
            self.noise, self.inner = nn.Dropout3d(0.5), nn.Sequential(nn.Tanh())
            self.mean = torch.ones(1)
            self.pair = Pair(1.0, [1, 1])
            self.several, self.by_name = nn.ModuleList([nn.Tanh()]), nn.ModuleDict({"one": nn.Tanh()})
            self.gain = nn.Parameter(torch.ones(1))
            self.register_parameter("no_gain", None)
            self.register_buffer("shift", torch.ones(1))
            self.register_buffer("no_shift", None)

        @property
        def doubled(self) -> float:
            return 2 * self.scale

        def helper(self, y: Tensor) -> Tensor:
            return y * self.scale

        def forward(self, x: Tensor) -> Tensor:
            return body(self, super().forward(x))

    return Way


def stacked(m: nn.Module, y: Tensor) -> Tensor:
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        return y + 1


def within(context: Callable[[], Any]) -> Callable[[nn.Module, Tensor], Tensor]:
    def body(m: nn.Module, y: Tensor) -> Tensor:
        with context():
            return F.conv3d(y, m.conv1.weight) if context is casting else y + 1

    return body


def casting() -> Any:
    return torch.autocast("cpu", enabled=False)


@contextlib.contextmanager
def theirs() -> Iterator[None]:
    yield


@torch.no_grad()
def decorated(m: nn.Module, y: Tensor) -> Tensor:
    return y * 2


def entered(m: nn.Module, y: Tensor) -> Tensor:
    torch.set_grad_enabled(torch.is_grad_enabled())
    return y + 1


def by_hand(m: nn.Module, y: Tensor) -> Tensor:
    context = torch.no_grad()
    context.__enter__()
    y = y + 1
    context.__exit__(None, None, None)
    return y


CONTEXTS = [
    *(within(c) for c in (casting, torch.no_grad, torch.enable_grad, torch.inference_mode, theirs)),
    *(stacked, decorated, entered, by_hand),
    within(lambda: torch.random.fork_rng()),
    within(lambda: torch.backends.mkldnn.flags(enabled=False)),
]
RANDOM = [
    lambda m, y: y * random.random(),
    lambda m, y: y if random.randint(0, 1) else y + 1,
    lambda m, y: y * functools.partial(random.random)(),
    lambda m, y: y * sum(map(lambda f: f(), [random.random])),  # noqa: C417
    lambda m, y: y * torch.rand(1),
    lambda m, y: y * torch.rand(1).item(),
    lambda m, y: y * float(torch.rand(())),
    lambda m, y: y if torch.rand(()) > 0.5 else y + 1,
    lambda m, y: y * np.random.rand(),  # noqa: NPY002
    lambda m, y: y * float(np.random.default_rng().random()),
    lambda m, y: y[:, torch.randperm(6)],
]
STATE = [
    lambda m, y: y if torch.is_inference_mode_enabled() else y + 1,
    lambda m, y: y if torch.is_grad_enabled() else y + 1,
    lambda m, y: y if torch.is_autocast_enabled("cpu") else y + 1,
    lambda m, y: y.to(torch.get_default_dtype()),
    lambda m, y: y if torch.backends.mkldnn.enabled else y + 1,
    lambda m, y: y if torch.backends.cudnn.deterministic else y + 1,
    lambda m, y: y if torch.are_deterministic_algorithms_enabled() else y + 1,
    lambda m, y: y * torch.get_num_threads(),
    lambda m, y: y if os.environ.get("R3D_NOBODY") else y + 1,
    lambda m, y: y if "R3D_NOBODY" in os.environ else y + 1,
    lambda m, y: y if os.getenv("R3D_NOBODY") else y + 1,
    lambda m, y: y * (time.time() % 7),
    lambda m, y: y * (time.perf_counter() % 7),
    lambda m, y: y * vars(m)["scale"],
    lambda m, y: y * m.__dict__["scale"],
    lambda m, y: y * float(m.mean),
    lambda m, y: y if m.mean > 0 else y + 1,
    lambda m, y: y * globals()["SETTING"],
    lambda m, y: SEEN.append(1) or y,
    lambda m, y: print(end="") or y,
    lambda m, y: y * gc.get_count()[0],
]


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize(
    ("body", "reason"),
    [(b, "enters a context manager|calls torch") for b in CONTEXTS]
    + [(b, "reads random numbers|computes with tensors|calls") for b in RANDOM]
    + [(b, "reads|calls|changes|computes with tensors") for b in STATE],
)
def test_a_forward_that_no_graph_can_follow_is_refused(body, reason, inner) -> None:
    """Alone, and in a wrapper that would be part of another's graph."""
    model = made(lambda: nn.Sequential(conv(), nn.ReLU(), way(body, Single)()) if inner else way(body)())
    SEEN.clear()
    with pytest.warns(UserWarning, match=rf"convolutions stay.*\(its forward ({reason})"):
        r3d.fuse(model)
    SEEN.clear()
    with torch.no_grad():
        model(X)
    assert len(problems(model)) == inner
    assert len(SEEN) <= 1 + inner, "as often as the forward is called: a first time for the comparison"


def sets(where: Callable[[nn.Module], Any], name: str, value: Any) -> Callable[[nn.Module, Any], None]:
    def change(model: nn.Module, monkeypatch: Any) -> None:
        monkeypatch.setattr(where(model), name, value)

    return change


def puts(where: Callable[[nn.Module], list[Any]]) -> Callable[[nn.Module, Any], Any]:
    def change(model: nn.Module, monkeypatch: Any) -> Callable[[], None]:
        numbers, was = where(model), where(model).copy()
        numbers[:] = [3 for _ in numbers]
        return lambda: numbers.__setitem__(slice(None), was)

    return change


def replaces_a_convolution(model: nn.Module, monkeypatch: Any) -> Callable[[], None]:
    was = model.conv1
    model.conv1 = nn.Conv3d(6, 6, 3, padding=1, groups=2).eval()
    nn.init.constant_(model.conv1.weight, 0.1)
    nn.init.zeros_(model.conv1.bias)
    return lambda: setattr(model, "conv1", was)


def itself(m: nn.Module) -> nn.Module:
    return m


def closure(value: float) -> tuple[Any, Any]:
    settings = {"scale": value}

    def change(model: nn.Module, monkeypatch: Any) -> Callable[[], None]:
        nonlocal value
        value = settings["scale"] = 3.0
        return put_back

    def put_back() -> None:
        nonlocal value
        value = settings["scale"] = 1.0

    return lambda m, y: y * value * settings["scale"], change


HERE = sys.modules[__name__]
# what a forward reads, and what changes it
VALUES: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], Callable[[nn.Module, Any], None]]] = {
    "attribute": (lambda m, y: y * m.scale, sets(itself, "scale", 3.0)),
    "attribute, to an integer": (lambda m, y: y * m.scale, sets(itself, "scale", 3)),
    "attribute that becomes a tensor": (
        lambda m, y: y * m.scale,
        sets(itself, "scale", torch.full((1,), 3.0)),
    ),
    "tensor": (lambda m, y: y * m.mean, sets(itself, "mean", torch.full((1,), 3.0))),
    "by getattr": (lambda m, y: y * getattr(m, "sca" + "le"), sets(itself, "scale", 3.0)),
    "in a method": (lambda m, y: m.helper(y), sets(itself, "scale", 3.0)),
    "in a property": (lambda m, y: y * m.doubled, sets(itself, "scale", 3.0)),
    "of a class": (lambda m, y: y + 1 if m.flag else y, lambda m, p: p.setattr(type(m), "flag", True)),
    "of a class, hidden": (lambda m, y: y * m.factor, sets(itself, "factor", 3.0)),
    "method on an instance": (lambda m, y: m.helper(y), sets(itself, "helper", lambda y: y * 3)),
    "method of a class": (
        lambda m, y: m.helper(y),
        lambda m, p: p.setattr(type(m), "helper", lambda m, y: y * 3),
    ),
    "forward of a class": (
        lambda m, y: y,
        lambda m, p: p.setattr(type(m).__mro__[-3], "forward", lambda m, x: x * 3),
    ),
    "list": (lambda m, y: y * m.sizes[1], puts(lambda m: m.sizes)),
    "dict": (lambda m, y: y * m.options["scale"], lambda m, p: p.setitem(m.options, "scale", 3.0)),
    "dict.get": (
        lambda m, y: y * m.options.get("other", 1.0),
        lambda m, p: p.setitem(m.options, "other", 3.0),
    ),
    "configuration": (lambda m, y: y * m.config.scale, sets(lambda m: m.config, "scale", 3.0)),
    "configuration's default": (lambda m, y: y * m.config.default, sets(lambda m: m.config, "default", 3.0)),
    "configuration's class": (
        lambda m, y: y * m.config.default,
        lambda m, p: p.setattr(Settings, "default", 3.0),
    ),
    "nested": (lambda m, y: y * m.config.inner.scale, sets(lambda m: m.config.inner, "scale", 3.0)),
    "dtype": (lambda m, y: y.to(m.dtype), sets(itself, "dtype", torch.float64)),
    "function": (lambda m, y: m.function(y), sets(itself, "function", torch.sigmoid)),
    "global": (lambda m, y: y * SETTING, lambda m, p: p.setattr(HERE, "SETTING", 3.0)),
    "global in a function": (lambda m, y: scaled(y), lambda m, p: p.setattr(HERE, "SETTING", 3.0)),
    "global function": (lambda m, y: scaled(y), lambda m, p: p.setattr(HERE, "scaled", lambda y: y * 3)),
    "global dict": (lambda m, y: y * SETTINGS["scale"], lambda m, p: p.setitem(SETTINGS, "scale", 3.0)),
    "global list": (lambda m, y: y * THEIRS[0], puts(lambda m: THEIRS)),
    "global object": (
        lambda m, y: y * CONFIGURATION.scale,
        lambda m, p: p.setattr(CONFIGURATION, "scale", 3.0),
    ),
    "variable of a function": closure(1.0),
    "of type(self)": (
        lambda m, y: y * type(m).factor,
        lambda m, p: p.setattr(owner(m, "factor"), "factor", 3.0),
    ),
    "of __class__": (
        lambda m, y: y * m.__class__.factor,
        lambda m, p: p.setattr(owner(m, "factor"), "factor", 3.0),
    ),
    "class": (lambda m, y: y * Scales.scale, lambda m, p: p.setattr(Scales, "scale", 3.0)),
    "of a part": (lambda m, y: y * m.noise.p, sets(lambda m: m.noise, "p", 0.25)),
    "of a convolution": (lambda m, y: y * m.conv1.groups, replaces_a_convolution),
    "training": (
        lambda m, y: y + 1 if m.inner.training else y,
        lambda m, p: p.setattr(m.inner, "training", True),
    ),
}


def looped(m: nn.Module, y: Tensor) -> Tensor:
    for layer in m.several:
        y = layer(y)
    return y


def looked_up(m: nn.Module, y: Tensor) -> Tensor:
    for name, layer in m.by_name.items():
        y = layer(y) if name else y
    return y


def adds(name: str, value: Any, where: Callable[[nn.Module], nn.Module] = itself) -> Any:
    """One that was not there, or was None: no `monkeypatch`, which would not leave it as it was."""

    def change(model: nn.Module, monkeypatch: Any) -> Callable[[], None]:
        module = where(model)
        was = getattr(module, name, MISSING)
        setattr(module, name, value)
        return lambda: delattr(module, name) if was is MISSING else setattr(module, name, was)

    return change


MISSING = object()


def appends(model: nn.Module, monkeypatch: Any) -> Callable[[], Any]:
    model.several.append(nn.Sigmoid())
    return lambda: model.several.pop(1)


def names_another(model: nn.Module, monkeypatch: Any) -> Callable[[], Any]:
    model.by_name["other"] = nn.Sigmoid()
    return lambda: model.by_name.pop("other")


def registers(model: nn.Module, monkeypatch: Any) -> Callable[[], None]:
    model.register_buffer("another", torch.ones(1))
    return lambda: delattr(model, "another")


def three() -> nn.Parameter:
    return nn.Parameter(torch.full((1,), 3.0))


# whether something is there, and how much of it: members of modules, which torch keeps apart from attributes
VALUES |= {
    "getattr's default": (lambda m, y: y * getattr(m, "missing", 1.0), adds("missing", 3.0)),
    "hasattr": (lambda m, y: y * 3 if hasattr(m, "missing") else y, adds("missing", 3.0)),
    "hasattr, a module": (lambda m, y: y * 3 if hasattr(m, "missing") else y, adds("missing", nn.Tanh())),
    "hasattr, a parameter": (lambda m, y: y * 3 if hasattr(m, "missing") else y, adds("missing", three())),
    "list of modules": (looped, appends),
    "list of modules, its length": (lambda m, y: y * len(m.several), appends),
    "list of modules, their types": (
        lambda m, y: y * 3 if isinstance(m.several[0], nn.Sigmoid) else y,
        adds("0", nn.Sigmoid(), lambda m: m.several),
    ),
    "dict of modules": (looked_up, names_another),
    "no parameter": (lambda m, y: y if m.no_gain is None else y * m.no_gain, adds("no_gain", three())),
    "no buffer": (
        lambda m, y: y if m.no_shift is None else y * m.no_shift,
        adds("no_shift", torch.ones(1) * 3),
    ),
    "parameter that goes": (lambda m, y: y * 3 if m.gain is None else y, adds("gain", None)),
    "buffer that goes": (lambda m, y: y * 3 if m.shift is None else y, adds("shift", None)),
    "parameters()": (lambda m, y: y * len(list(m.parameters())), adds("no_gain", three())),
    "named_buffers()": (lambda m, y: y * len(dict(m.named_buffers())), registers),
    "children()": (lambda m, y: y * len(list(m.children())), adds("missing", nn.Tanh())),
    "named tuple": (lambda m, y: y * m.pair.sizes[0], puts(lambda m: m.pair.sizes)),
}


def owner(module: nn.Module, name: str) -> type:
    return next(c for c in type(module).__mro__ if name in vars(c))


class Scales:
    scale = 1.0


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("name", VALUES)
def test_a_value_that_a_forward_reads_may_change(name, inner, monkeypatch) -> None:
    body, change = VALUES[name]
    cls = way(body, Single if inner else Plain)
    stock = made(lambda: nn.Sequential(nn.Identity(), cls()) if inner else cls())
    model = copy.deepcopy(stock)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        r3d.fuse(model)
        before = model(X)
        torch.testing.assert_close(before, stock(X), rtol=1e-4, atol=1e-4)
        torch.manual_seed(0)
        undo = [change(m[1] if inner else m, monkeypatch) for m in (stock, model)]
        want = stock(X)
        assert want.dtype != before.dtype or not torch.equal(want, before), "the change is none"
        for _ in range(3):
            torch.testing.assert_close(model(X), want, rtol=1e-4, atol=1e-4)
        monkeypatch.undo()
        for put_back in filter(None, undo[::-1]):
            put_back()
        torch.testing.assert_close(model(X), before, rtol=1e-4, atol=1e-4)
    assert problems(model)


@pytest.mark.parametrize("name", ["attribute", "method of a class", "global dict", "variable of a function"])
def test_values_under_torch_compile(name, monkeypatch) -> None:
    body, change = VALUES[name]
    stock = made(way(body))
    model = r3d.fuse(copy.deepcopy(stock))
    torch._dynamo.reset()
    with torch.no_grad():
        model(X)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(X), stock(X), rtol=1e-4, atol=1e-4)
        undo = [change(m, monkeypatch) for m in (stock, model)]
        for m in (compiled, model, compiled):
            torch.testing.assert_close(m(X), stock(X), rtol=1e-4, atol=1e-4)
        for put_back in filter(None, undo):
            put_back()


def listens(*args: Any) -> None:
    LISTENED.append(args)


LISTENED: list[Any] = []


def hooked(kind: str, where: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], Callable[[], None]]:
    return lambda m: getattr(where(m), f"register_{kind}")(listens).remove


def everywhere(kind: str) -> Callable[[nn.Module], Callable[[], None]]:
    return lambda m: getattr(nn.modules.module, f"register_module_{kind}")(listens).remove


def replaced(
    where: Callable[[nn.Module], nn.Module], name: str = "forward"
) -> Callable[[nn.Module], Callable[[], None]]:
    def change(model: nn.Module) -> Callable[[], None]:
        module = where(model)
        own = getattr(module, name)
        module.__dict__[name] = lambda *args: LISTENED.append(args) or own(*args) * 3
        return lambda: module.__dict__.pop(name)

    return change


def switched(where: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], Callable[[], None]]:
    def change(model: nn.Module) -> Callable[[], None]:
        LISTENED.append(where(model).train())
        return where(model).eval

    return change


class Parts(nn.Module):
    """Every kind of module that becomes part of a graph, or is called in it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(conv(), nn.BatchNorm3d(6), nn.Identity(), nn.ReLU())
        self.wrapper = Dropping()
        self.drop = nn.Dropout3d(0.5)
        self.conv, self.bn, self.relu, self.pool = conv(), nn.BatchNorm3d(6), nn.ReLU(), nn.MaxPool3d(2)
        self.alone = nn.MaxPool3d((1, 2, 2), ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(self.relu(self.bn(self.conv(self.drop(self.wrapper(self.block(x)))))))
        return self.alone(y)


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), nn.BatchNorm3d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(x)))
        return F.dropout3d(y, 0.5, self.training)


PARTS = {
    "itself": itself,
    **{name: (lambda m, name=name: m.get_submodule(name)) for name, _ in Parts().named_modules() if name},
}
CHANGES = {
    **{f"forward of {name}": replaced(part) for name, part in PARTS.items()},
    **{f"_conv_forward of {name}": replaced(PARTS[name], "_conv_forward") for name in ("conv", "block.0")},
    **{f"training of {name}": switched(part) for name, part in PARTS.items() if name != "itself"},
    **{
        f"{kind} of {name}": hooked(kind, part)
        for name, part in PARTS.items()
        for kind in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
    },
    **{
        f"{kind} of all": everywhere(kind)
        for kind in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
    },
}


@pytest.mark.parametrize("when", ["before fuse", "before the first call", "later"])
@pytest.mark.parametrize("name", CHANGES)
def test_whoever_changes_or_hears_a_part_is_heeded(name, when) -> None:
    """The same numbers, and as many calls, as without `fuse`; all as before when it is over."""
    stock = made(Parts)
    model, reference = copy.deepcopy(stock), copy.deepcopy(stock)
    x = X.clone().requires_grad_("backward" in name)

    def run(m: nn.Module) -> tuple[Tensor, int]:
        torch.manual_seed(0)
        LISTENED.clear()
        y = m(x)
        if y.requires_grad:
            y.sum().backward()
        return y, len(LISTENED)

    with warnings.catch_warnings(), torch.set_grad_enabled("backward" in name):
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*gradient")
        before = stock(x)
        if when != "before fuse":
            r3d.fuse(model)
        if when == "later":
            torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
        states = [copy.deepcopy(m.state_dict()) for m in (stock, model)]
        back = [CHANGES[name](stock)]
        want, calls = run(stock)
        if "of all" in name:
            back.pop()()
        back.append(CHANGES[name](model))
        if when == "before fuse":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # some are left
                r3d.fuse(model)
        got, heard = run(model)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        if "training" not in name and not (when == "before fuse" and "hook" not in name):
            assert heard == calls, "calls that somebody listens to"
        for put_back in back:
            put_back()
        for m, state in zip((stock, model), states, strict=True):
            m.load_state_dict(state)
        for _ in range(2):
            torch.testing.assert_close(model(x.detach()), before, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        r3d.fuse(model)
        assert_keeps_promise(model(X), exact(reference), float32_limit=1e-5)
    assert len({r.layer for r in r3d.explain(model)}) == 3


def test_a_forward_whose_values_keep_changing_keeps_its_own() -> None:
    model = r3d.fuse(made(way(lambda m, y: y * m.scale)))
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for i in range(20):
            model.scale = float(i)
            torch.testing.assert_close(model(X), exact(model).float(), rtol=1e-4, atol=1e-4)
    assert ["reads what keeps changing" in str(w.message) for w in said if "fuse:" in str(w.message)] == [
        True
    ]


def randomly(m: nn.Module, y: Tensor) -> Tensor:
    return y + torch.randn(y.shape)


@pytest.mark.parametrize("body", [randomly, lambda m, y: m.noise(y), lambda m, y: F.dropout3d(y, 0.5, True)])
def test_random_results_are_not_compared(body) -> None:
    """Nor do they end the fused way; the first that is not random is."""
    model = made(way(body))
    model.noise.train()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        r3d.fuse(model)
        results = []
        for m in (model, r3d.unfuse(copy.deepcopy(model))):
            for _ in range(2):
                torch.manual_seed(3)
                results.append(m(X))
        for y in results[1:]:
            torch.testing.assert_close(y, results[0], rtol=1e-4, atol=1e-4)
        model.noise.eval()
        model(X)
    assert problems(model) == BLOCKS[Plain]


def test_what_is_wrong_is_found_out_once_nothing_is_random() -> None:
    class Asks(AsksForTypes):
        def __init__(self) -> None:
            super().__init__(False)
            self.noise = nn.Dropout3d(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.noise(x))

    model = made(Asks)
    model.noise.train()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        r3d.fuse(model)(X)
        model.noise.eval()
        with pytest.warns(UserWarning, match="Asks keeps its own forward: its graph computes something else"):
            assert_keeps_promise(model(X), exact(model))


def test_tangents_arrive() -> None:
    stock = made(Parts)
    model = r3d.fuse(copy.deepcopy(stock))
    with torch.no_grad():
        model(X)
    tangents = []
    for m in (stock, model):
        with forward_ad.dual_level():
            y = m(forward_ad.make_dual(X, torch.ones_like(X)))
            tangents.append(forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(tangents[1], tangents[0], rtol=1e-4, atol=1e-4)
    assert tangents[0].abs().sum() > 0


def shortcut(m: nn.Module, y: Tensor) -> Tensor:
    zeros = m.buffer.expand(1, 2, 1, 1, 1)
    return torch.cat([y, F.pad(y, (0, 0, 0, 0, 0, 0, 0, 2))], dim=1) + zeros.mean()


def listed(m: nn.Module, y: Tensor) -> Tensor:
    outputs = []
    for layer in m.layers:
        outputs.append(layer(outputs[-1] if outputs else y))
    return torch.cat([o * (i + 1) for i, o in enumerate(outputs)], 1)


def named(m: nn.Module, y: Tensor) -> Tensor:
    for name, child in m.layers.named_children():
        if isinstance(child, nn.Conv3d) and name.isdigit():
            y = child(y)
    return y if len(m.layers) else m.other(y)


def excited(m: nn.Module, y: Tensor) -> Tensor:
    b, c = y.shape[:2]
    weight = torch.sigmoid(m.linear(F.adaptive_avg_pool3d(y, 1).view(b, c))).view(b, c, 1, 1, 1)
    return y * weight


def resized(m: nn.Module, y: Tensor) -> Tensor:
    small = F.avg_pool3d(y, (1, 2, 2), ceil_mode=True)
    up = F.interpolate(small, size=y.shape[2:], mode=m.mode, align_corners=False)
    return torch.cat((y, up), dim=1).contiguous(memory_format=torch.channels_last_3d)


def scripted(m: nn.Module, y: Tensor) -> Tensor:
    if torch.jit.is_scripting() or torch.jit.is_tracing():
        return y + 100
    torch._assert(y.dim() == 5, "five axes")
    return {"out": y.permute(0, 2, 3, 4, 1)}["out"]


def typed(m: nn.Module, y: Tensor) -> Tensor:
    from collections import OrderedDict

    parts: dict[str, Tensor] = OrderedDict()
    parts["a"], parts["b"] = y.chunk(2, dim=1)
    return typing.cast(Tensor, functools.reduce(operator.mul, parts.values())) * math.sqrt(
        int(np.prod((1, 2)))
    )


@torch.fx.wrap
def untraceable(y: Tensor) -> Tensor:
    return y + 1 if y.sum() > 0 else y - 1


def wrapped(m: nn.Module, y: Tensor) -> Tensor:
    return untraceable(y)


def chosen(m: nn.Module, y: Tensor) -> Tensor:
    act = {"relu": F.relu, "gelu": F.gelu, "silu": nn.functional.silu}[m.mode2]
    return act(y) * getattr(m, "missing", 1.0) + max(m.sizes) * sum(v for v in m.sizes)


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize(
    "body", [shortcut, listed, named, excited, resized, scripted, typed, wrapped, chosen]
)
def test_common_forwards_are_fused(body, inner) -> None:
    class Common(way(body, Single if inner else Plain)):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.GroupNorm(2, 6), nn.Tanh()])
            self.linear, self.mode, self.mode2 = nn.Linear(6, 6), "trilinear", "gelu"
            self.register_buffer("buffer", torch.ones(1, 1, 1, 1, 1))

    stock = made(lambda: nn.Sequential(nn.ReLU(), Common()) if inner else Common())
    model = copy.deepcopy(stock)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        r3d.fuse(model)
        for _ in range(2):
            torch.testing.assert_close(model(X), stock(X), rtol=1e-4, atol=1e-4)
    assert len({r.layer for r in r3d.explain(model)}) == 2 - inner


def test_a_trace_leaves_nothing_behind() -> None:
    def tracer(*args: Any) -> None:
        return None

    before = sys.gettrace(), sys.getprofile()
    sys.settrace(tracer)
    sys.setprofile(tracer)
    try:
        r3d.fuse(made(Plain))
        after = sys.gettrace(), sys.getprofile()
    finally:
        sys.settrace(before[0])
        sys.setprofile(before[1])
    assert after == (tracer, tracer)
    assert "__getattribute__" not in vars(nn.Module)


def test_threads_that_fuse_at_the_same_time() -> None:
    models = [made(Network) for _ in range(4)]
    with warnings.catch_warnings(), ThreadPoolExecutor(4) as pool:
        warnings.simplefilter("error")
        list(pool.map(r3d.fuse, models))
    with torch.no_grad():
        for model in models:
            model(CLIP)
            assert len({r.layer for r in r3d.explain(model)}) == 6
