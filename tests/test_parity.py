"""Whole networks: fused against float64 and against the stock network, with one state dict for all."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from numerics import FLOAT32_NETWORK, assert_keeps_promise
from torch import nn

import r3d_kernels as r3d

DEPTHS = (10, 18, 34, 50, 101, 152, 200)
STEMS = ("hara", "seed18", "torchvision")


def randomise_norms(model: nn.Module) -> nn.Module:
    """Statistics far from the identity, which keep the activations of order one."""
    generator = torch.Generator().manual_seed(3)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm3d):
            for t, low, high in (
                (m.weight, 0.6, 1.2),
                (m.bias, -0.3, 0.3),
                (m.running_mean, -0.3, 0.3),
                (m.running_var, 0.6, 1.6),
            ):
                with torch.no_grad():
                    t.copy_(torch.rand(t.shape, generator=generator) * (high - low) + low)
    return model.eval()


def check(model: r3d.ResNet3D, x: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    stock = randomise_norms(model)
    assert not stock.fused
    fused = copy.deepcopy(stock)
    fused.fused = True
    stock, fused, x = stock.to(dtype), fused.to(dtype), x.to(dtype)
    with torch.inference_mode():
        want = copy.deepcopy(stock).double()(x.double())
        y, other = fused(x), stock(x)
    assert {r.layer for r in r3d.explain(fused)} == {
        name for name, m in fused.named_modules() if isinstance(m, nn.Conv3d)
    }
    assert r3d.explain(stock) == []
    assert_keeps_promise(y, want, other, FLOAT32_NETWORK)


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_float32(depth: int, stem: str) -> None:
    size = (2, 3, 8, 32, 40) if depth <= 18 else (1, 3, 5, 20, 24)
    check(r3d.ResNet3D(11, depth=depth, stem=stem), torch.randn(size))


@torch.no_grad()
def with_real_statistics(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Running statistics of the network's own activations, then moved; gamma and beta off the identity."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm3d)]
    for m in norms:
        m.momentum = None  # a plain average
    model.train()(x)
    generator = torch.Generator().manual_seed(4)
    for m in norms:
        low, high = (torch.rand((2, 2, m.num_features), generator=generator) - 0.5).unbind()
        m.running_mean += m.running_var.sqrt() * 0.6 * low[0]
        m.running_var *= 1 + 0.6 * low[1]
        m.weight.copy_(1 + high[0])
        m.bias.copy_(0.6 * high[1])
    return model.eval()


@pytest.mark.parametrize(("depth", "stem"), [(18, "hara"), (50, "seed18"), (101, "torchvision")])
def test_float32_with_real_statistics(depth: int, stem: str) -> None:
    model = with_real_statistics(r3d.ResNet3D(11, depth=depth, stem=stem), torch.randn(2, 3, 8, 48, 48))
    fused = copy.deepcopy(model)
    fused.fused = True
    x = torch.randn(1, 3, 8, 48, 48)
    with torch.inference_mode():
        assert_keeps_promise(fused(x), model.double()(x.double()), float32_limit=FLOAT32_NETWORK)


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_bfloat16(depth: int, stem: str, backend: str) -> None:
    with r3d.backend(backend):
        check(r3d.ResNet3D(11, depth=depth, stem=stem), torch.randn(2, 3, 6, 32, 32), torch.bfloat16)


@pytest.mark.parametrize(("backend", "shortcut"), list(itertools.product(["cpu", "torch", "auto"], "AB")))
def test_backends_and_shortcuts(backend: str, shortcut: str) -> None:
    model = r3d.ResNet3D(7, depth=18, stem="hara", shortcut_type=shortcut, in_channels=1)
    with r3d.backend(backend):
        check(model, torch.randn(1, 1, 9, 37, 33))


@pytest.mark.parametrize("backend", ["cpu", "torch", "auto"])
@pytest.mark.parametrize("name", ["r2plus1d_18", "mc3_18"])
def test_factored_and_mixed(name: str, backend: str) -> None:
    with r3d.backend(backend):
        check(r3d.create_model(name, num_classes=9), torch.randn(2, 3, 9, 32, 40))


@pytest.mark.parametrize("name", ["r2plus1d_18", "mc3_18"])
def test_factored_and_mixed_in_bfloat16(name: str) -> None:
    with r3d.backend("cpu"):
        check(r3d.create_model(name, num_classes=9), torch.randn(2, 3, 8, 32, 32), torch.bfloat16)


def test_real_size() -> None:
    check(r3d.create_model("r3d_18"), torch.randn(1, 3, 16, 112, 112))


@pytest.mark.parametrize("block", [r3d.BasicBlock, r3d.Bottleneck])
@pytest.mark.parametrize("shortcut", "AB")
def test_2018_network(block: type, shortcut: str) -> None:
    model = r3d.ResNet(block, [1, 1, 1, 1], 64, 16, shortcut_type=shortcut, num_classes=5)
    check(model, torch.randn(2, 3, 16, 64, 64))


def test_odd_widths_and_described_stem() -> None:
    stem = r3d.Stem(kernel=(5, 3, 3), stride=(1, 2, 1), channels=45)
    check(r3d.ResNet3D(3, depth=10, stem=stem, widen_factor=0.3, in_channels=7), torch.randn(1, 7, 4, 20, 22))


def test_one_state_dict_for_all() -> None:
    stock = randomise_norms(r3d.ResNet3D(6, depth=10))
    fused = r3d.ResNet3D(6, depth=10, fused=True).eval()
    x = torch.randn(1, 3, 8, 32, 32)
    with torch.inference_mode():
        fused(x)
        fused.load_state_dict(stock.state_dict())
        want = copy.deepcopy(stock).double()(x.double())
        assert_keeps_promise(fused(x), want, None, FLOAT32_NETWORK)
    assert list(fused.state_dict()) == list(stock.state_dict())


def test_empty_and_changing_batches() -> None:
    model = randomise_norms(r3d.ResNet3D(6, depth=10))
    model.fused = True
    with torch.inference_mode():
        for n, size in ((0, 32), (3, 32), (1, 40), (3, 32), (0, 40)):
            assert model(torch.randn(n, 3, 8, size, size)).shape == (n, 6)


def test_trains_with_fused_switched_on() -> None:
    torch.manual_seed(0)
    fused = r3d.ResNet3D(4, depth=10, fused=True, widen_factor=0.25)
    stock = copy.deepcopy(fused)
    stock.fused = False
    x, target = torch.randn(4, 3, 4, 24, 24), torch.tensor([0, 1, 2, 3])
    losses = []
    for model in (fused, stock):
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        run = []
        for _ in range(3):
            loss = nn.functional.cross_entropy(model.train()(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.append(loss.item())
        losses.append(run)
    assert losses[0] == losses[1]
    with torch.inference_mode():
        want = copy.deepcopy(stock).double().eval()(x.double())
        assert_keeps_promise(fused.eval()(x), want, None, FLOAT32_NETWORK)
