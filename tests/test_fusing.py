"""`fuse`: blocks in everybody's spelling run fused, compute the same, and stay what they were."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_keeps_promise
from torch import Tensor, nn

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
