"""Fused layers: packed weights follow every change, survive nothing that they should not, and never show."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_keeps_promise, relative_error
from torch import nn

import r3d_kernels as r3d
from r3d_kernels import _keeping, backends
from r3d_kernels._layer import LayerState, state_of
from r3d_kernels.nn import avg_pool_linear, conv_bn_act, max_pool3d


def make_layer(c: int = 5, k: int = 12, **kwargs) -> r3d.ConvBNAct3d:
    layer = r3d.ConvBNAct3d(c, k, 3, padding=1, **kwargs).eval()
    with torch.no_grad():
        for p in (layer.bn.weight, layer.bn.running_var):
            p.uniform_(0.5, 1.5)
        for p in (layer.bn.bias, layer.bn.running_mean):
            p.normal_()
    return layer


def exact(layer: r3d.ConvBNAct3d, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """float64 through plain modules."""
    conv, bn = copy.deepcopy(layer.conv).double(), copy.deepcopy(layer.bn).double().eval()
    with torch.no_grad():
        y = bn(conv(x.double()))
        if residual is not None:
            y = y + residual.double()
        return F.relu(y) if layer.activation else y


X = torch.randn(2, 5, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def assert_follows(layer: r3d.ConvBNAct3d, x: torch.Tensor = X) -> torch.Tensor:
    with torch.inference_mode():
        y = layer(x)
    assert_keeps_promise(y, exact(layer, x))
    return y


# ---- packs follow the parameters -------------------------------------------------------------------------


def _load_other(layer: r3d.ConvBNAct3d) -> None:
    other = make_layer()
    with torch.no_grad():
        other.conv.weight.normal_()
    layer.load_state_dict(other.state_dict())


def _in_place(layer: r3d.ConvBNAct3d) -> None:
    with torch.no_grad():
        layer.conv.weight[3, 1, 2, 0, 1] += 1.0


def _optimizer_step(layer: r3d.ConvBNAct3d) -> None:
    layer.train()
    optimizer = torch.optim.SGD(layer.parameters(), 0.5)
    layer(X).square().mean().backward()
    optimizer.step()
    layer.eval()


def _replaced(layer: r3d.ConvBNAct3d) -> None:
    layer.conv.weight = nn.Parameter(torch.randn_like(layer.conv.weight))


CHANGES = {
    "load_state_dict": _load_other,
    "one element of weight": _in_place,
    "running_mean": lambda m: m.bn.running_mean.add_(1.0),
    "running_var": lambda m: m.bn.running_var.mul_(2.0),
    "gamma": lambda m: m.bn.weight.data.neg_(),  # .data escapes the version counters
    "beta": lambda m: m.bn.bias.data.add_(0.5),
    "weight.data": lambda m: m.conv.weight.data.mul_(0.5),
    "weight.data =": lambda m: setattr(m.conv.weight, "data", torch.randn_like(m.conv.weight)),
    "eps": lambda m: setattr(m.bn, "eps", 0.5),
    "a new parameter": _replaced,
    "a training step": _optimizer_step,
    "train and eval": lambda m: (m.train(), m(X), m.eval()),
    "conv bias": lambda m: setattr(m.conv, "bias", nn.Parameter(torch.randn(12))),
    "reset_parameters": lambda m: (m.conv.reset_parameters(), m.bn.reset_running_stats()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_pack_follows(change: str) -> None:
    layer = make_layer()
    before = assert_follows(layer)
    CHANGES[change](layer)
    after = assert_follows(layer)
    assert not torch.equal(before, after)
    assert torch.equal(after, assert_follows(layer))  # from the pack, same bits


def test_pack_is_made_once() -> None:
    layer = make_layer()
    assert_follows(layer)
    state = state_of(layer.conv)
    snapshot = state._snapshot
    for _ in range(3):
        assert_follows(layer)
    assert state._snapshot is snapshot
    layer.train()
    layer.eval()
    assert_follows(layer)
    assert state._snapshot is snapshot  # nothing was changed


def test_large_weights_are_watched_too() -> None:
    """Above 16 KiB the fingerprint samples: `.data` writes to all of a tensor are seen, counted writes always."""
    layer = r3d.ConvBNAct3d(32, 48, 3, padding=1).eval()
    x = torch.randn(1, 32, 2, 4, 4)
    assert_follows(layer, x)
    layer.conv.weight.data.mul_(-1)
    assert_follows(layer, x)
    with torch.no_grad():
        layer.conv.weight[7, 7, 1, 1, 1] += 1
    assert_follows(layer, x)


def test_dtype_changes() -> None:
    layer = make_layer()
    assert_follows(layer)
    for dtype in (torch.bfloat16, torch.float32, torch.float64, torch.float16, torch.float32):
        layer.to(dtype)
        stock = copy.deepcopy(layer)
        stock.fused = False
        with torch.inference_mode():
            y, other = layer(X.to(dtype)), stock(X.to(dtype))
        assert y.dtype == dtype
        if dtype == torch.float64:
            assert relative_error(y, exact(layer, X)) < 1e-12
        else:
            assert_keeps_promise(y, exact(layer, X.to(dtype)), other)


def test_parameters_made_in_inference_mode() -> None:
    """They have no version counter: every byte is watched instead."""
    with torch.inference_mode():
        layer = r3d.ConvBNAct3d(32, 48, 3, padding=1).eval()
        x = torch.randn(1, 32, 2, 4, 4)
        before = layer(x)
        layer.conv.weight[7, 7, 1, 1, 1] += 1
        after = layer(x)
        assert not torch.equal(before, after)
        conv = F.conv3d(x.double(), layer.conv.weight.double(), padding=1)
        want = F.batch_norm(
            conv, *(t.double() for t in (layer.bn.running_mean, layer.bn.running_var)), eps=1e-5
        )
        assert_keeps_promise(after, want.relu())


# ---- the short way of later calls ------------------------------------------------------------------------


@pytest.fixture
def long_ways(monkeypatch) -> list[str]:
    """What took the long way: every call adds one."""
    ways: list[str] = []
    real_why, real_run = r3d.nn._why_stock, LayerState.run

    def why(*args):
        ways.append("asked")
        return real_why(*args)

    def run(*args):
        ways.append("ran")
        return real_run(*args)

    monkeypatch.setattr(r3d.nn, "_why_stock", why)
    monkeypatch.setattr(LayerState, "run", run)
    return ways


def _hooked(layer: r3d.ConvBNAct3d) -> None:
    layer.bn.register_forward_hook(lambda *args: None)


def _statistics_gone(layer: r3d.ConvBNAct3d) -> None:
    layer.bn.running_mean = layer.bn.running_var = None


LONG = {
    "a hook": _hooked,
    "training": lambda m: m.bn.train(),
    "no statistics": _statistics_gone,
    "parametrized": lambda m: torch.nn.utils.parametrizations.weight_norm(m.conv),
    "padding mode": lambda m: setattr(m.conv, "padding_mode", "circular"),
    "weight": _in_place,
    "eps": lambda m: setattr(m.bn, "eps", 0.5),
    "stride": lambda m: setattr(m.conv, "stride", (1, 2, 1)),
    "dtype": lambda m: m.double(),
}


@pytest.mark.parametrize("change", LONG)
def test_what_has_changed_takes_the_long_way(change: str, long_ways) -> None:
    layer = make_layer()
    x = X
    with torch.inference_mode():
        layer(x)
        assert long_ways == ["asked", "ran"]
        layer(x)
        assert long_ways == ["asked", "ran"]
        LONG[change](layer)
        x = x.to(layer.conv.weight.dtype)
        layer(x)
        assert long_ways[2] == "asked"
    assert torch.equal(torch.no_grad()(layer)(x), torch.inference_mode()(layer)(x))


def test_what_is_asked_for_elsewhere_takes_the_long_way(long_ways, monkeypatch) -> None:
    layer, r = make_layer(), torch.randn(2, 12, 3, 6, 6)
    calls = [
        lambda: layer(X),
        lambda: layer(X, r),
        lambda: layer(X[:1]),
        lambda: r3d.backend("torch")(layer)(X),
        lambda: torch.autocast("cpu", torch.bfloat16)(layer)(X),
        lambda: torch.autocast("cpu", torch.bfloat16)(layer)(X, r),
    ]
    with torch.inference_mode():
        first = [call() for call in calls]
        assert len(long_ways) == 2 * len(calls)
        again = [call() for call in calls]
        assert len(long_ways) == 2 * len(calls)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        for name, value in (
            ("R3D_KERNELS_BACKEND", "cpu"),
            ("R3D_KERNELS_FP32", "strict"),
            ("R3D_KERNELS_MEMORY", "fast"),
        ):
            del long_ways[:]
            with monkeypatch.context() as m:
                m.setenv(name, value)
                layer(X)
                assert long_ways == ["asked", "ran"]
                layer(X)
                m.setenv(name, "nonsense")
                with pytest.raises(ValueError, match=name):
                    layer(X)
        del long_ways[:]
        layer(X)
        assert not long_ways
        assert torch.vmap(lambda v: layer(v[None])[0])(X).shape == first[0].shape
        assert long_ways == ["asked"]
        with pytest.raises(ValueError, match="activation"):
            conv_bn_act(X, layer.conv, layer.bn, activation="gelu")
    x = X.clone().requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None


def test_layers_of_one_pass_share_a_look_at_the_switches(monkeypatch) -> None:
    with backends.one_pass():
        monkeypatch.setenv("R3D_KERNELS_BACKEND", "torch")
        assert backends.current_backend() == "auto"
        with r3d.backend("cpu"):
            assert backends.current_backend() == "cpu"
    assert backends.current_backend() == "torch"
    model = r3d.ResNet3D(3, depth=10, stem="torchvision", fused=True, widen_factor=0.1).eval()
    seen = []
    for value in ("cpu", "torch"):
        monkeypatch.setenv("R3D_KERNELS_BACKEND", value)
        with torch.inference_mode():
            model(torch.randn(1, 3, 4, 16, 16))
        seen.append({choice.kernel.backend for _, choice in state_of(model.layer1[0].conv1[0]).plans()})
    assert seen == [{"cpu"}, {"cpu", "torch"}]


# ---- copies ----------------------------------------------------------------------------------------------


def _saved(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies(clone) -> None:
    layer = make_layer()
    y = assert_follows(layer)
    size = len(pickle.dumps(layer))
    twin = clone(layer)
    assert state_of(twin.conv) is not state_of(layer.conv)
    assert torch.equal(assert_follows(twin), y)
    with torch.no_grad():
        twin.conv.weight.zero_()
    assert_follows(twin)
    assert torch.equal(assert_follows(layer), y)
    assert abs(len(pickle.dumps(layer)) - size) < 200  # packs are not pickled


def test_state_dict_is_stock() -> None:
    layer = make_layer()
    assert_follows(layer)
    stock = nn.Sequential()
    stock.add_module("conv", nn.Conv3d(5, 12, 3, padding=1, bias=False))
    stock.add_module("bn", nn.BatchNorm3d(12))
    stock.load_state_dict(layer.state_dict())
    assert list(layer.state_dict()) == list(stock.state_dict())


def test_from_modules_shares_parameters() -> None:
    conv, bn = nn.Conv3d(5, 12, 3, padding=1), nn.BatchNorm3d(12, eps=1e-3)
    layer = r3d.ConvBNAct3d.from_modules(conv.eval(), bn.eval(), activation=None)
    assert layer.conv is conv
    assert not layer.training
    assert_follows(layer)
    with pytest.raises(ValueError, match=r"bn: expected an nn.BatchNorm3d of 12 features"):
        r3d.ConvBNAct3d.from_modules(conv, nn.BatchNorm3d(11))
    with pytest.raises(TypeError, match=r"conv: expected an nn.Conv3d, got Linear"):
        r3d.ConvBNAct3d.from_modules(nn.Linear(2, 2), bn)


# ---- where it must not be fused --------------------------------------------------------------------------


def test_training_is_stock() -> None:
    layer = make_layer()
    twin = copy.deepcopy(layer)
    twin.fused = False
    for m in (layer, twin):
        m.train()
        m(X).square().sum().backward()
    assert torch.equal(layer.conv.weight.grad, twin.conv.weight.grad)
    assert torch.equal(layer.bn.running_var, twin.bn.running_var)
    assert not state_of(layer.conv).plans()


def test_gradients_in_evaluation_mode() -> None:
    layer, twin = make_layer(), None
    twin = copy.deepcopy(layer)
    twin.fused = False
    grads = []
    for m in (layer, twin):
        x = X.clone().requires_grad_()
        m(x).square().sum().backward()
        grads.append((x.grad, m.conv.weight.grad, m.bn.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_warns_once_when_gradients_cost_the_speed(monkeypatch) -> None:
    monkeypatch.setattr("r3d_kernels.nn._warned_about_gradients", False)
    layer = make_layer()
    with pytest.warns(UserWarning, match=r"wrap inference in torch\.inference_mode"):
        layer(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(X)
        layer.train()(X)


def test_hooks_still_fire() -> None:
    layer = make_layer()
    seen: list[torch.Size] = []
    want = exact(layer, X)
    handle = layer.conv.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    with torch.inference_mode():
        assert_keeps_promise(layer(X), want)
    assert seen == [want.shape]
    handle.remove()
    assert_follows(layer)
    assert len(seen) == 1


@pytest.mark.parametrize("mode", ["replicate", "circular", "reflect"])
def test_padding_modes(mode: str) -> None:
    layer = make_layer()
    layer.conv = nn.Conv3d(5, 12, 3, padding=1, padding_mode=mode)
    assert_follows(layer.eval())


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(padding: str) -> None:
    layer = make_layer()
    layer.conv = nn.Conv3d(5, 12, (3, 3, 2), padding=padding)
    assert_follows(layer.eval())


def test_other_norms_and_subclasses() -> None:
    conv = nn.Conv3d(5, 12, 3)
    with torch.inference_mode():
        for norm in (
            nn.GroupNorm(3, 12),
            nn.InstanceNorm3d(12),
            nn.BatchNorm3d(12, track_running_stats=False),
        ):
            y = conv_bn_act(X, conv.eval(), norm.eval(), activation="relu")
            assert torch.equal(y, norm(conv(X)).relu())
        assert_keeps_promise(
            conv_bn_act(X, conv, None, activation=None), copy.deepcopy(conv).double()(X.double())
        )

        class Scaled(nn.Conv3d):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return 2 * super().forward(x)

        scaled = Scaled(5, 12, 3)
        assert torch.equal(conv_bn_act(X, scaled, None, activation=None), scaled(X))


def test_weight_norm() -> None:
    layer = make_layer()
    torch.nn.utils.parametrizations.weight_norm(layer.conv)
    twin = copy.deepcopy(layer)
    twin.fused = False
    with torch.inference_mode():
        assert torch.equal(layer(X), twin(X))


def test_torch_compile_export_vmap_and_meta() -> None:
    layer = make_layer()
    want = exact(layer, X)
    with torch.no_grad():
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert_keeps_promise(compiled(X), want)
        program = torch.export.export(layer, (X,))
        assert_keeps_promise(program.module()(X), want)
        mapped = torch.vmap(lambda v: layer(v[None])[0])(X)
        assert_keeps_promise(mapped, want)
        traced = torch.fx.symbolic_trace(layer, concrete_args={"residual": None})
        assert_keeps_promise(traced(X), want)
    assert copy.deepcopy(layer).to("meta")(X.to("meta")).shape == want.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    layer = make_layer()
    twin = copy.deepcopy(layer)
    twin.fused = False
    r = torch.randn(2, 12, 3, 6, 6)
    with torch.inference_mode(), torch.autocast("cpu", dtype):
        y, stock = layer(X, r), twin(X, r)
    assert y.dtype == dtype
    assert_keeps_promise(y, exact(layer, X, r), stock.to(dtype))


# ---- threads ---------------------------------------------------------------------------------------------


def test_many_threads_at_once() -> None:
    layer = make_layer(16, 32)
    inputs = [torch.randn(1, 16, 3, 4 + i % 3, 5) for i in range(8)]
    wanted = [exact(layer, x) for x in inputs]
    failures: list[object] = []

    def work(i: int) -> None:
        try:
            with torch.inference_mode(), r3d.backend("cpu" if i % 2 else "auto"):
                for _ in range(20):
                    assert_keeps_promise(layer(inputs[i]), wanted[i])
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def test_inside_a_data_loader_worker() -> None:
    layer = make_layer()
    want = assert_follows(layer)  # the parent has used its thread pool before the fork

    class Clips(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, i: int) -> torch.Tensor:
            with torch.inference_mode():
                return layer(X).clone()

    loader = torch.utils.data.DataLoader(Clips(), batch_size=1, num_workers=1, timeout=60)
    for y in loader:
        assert torch.equal(y[0], want)


# ---- pooling and head ------------------------------------------------------------------------------------


def test_pool_and_head_modules() -> None:
    x = torch.randn(2, 12, 4, 7, 7).to(memory_format=torch.channels_last_3d)
    with torch.inference_mode():
        for pool in (
            nn.MaxPool3d(3, 2, 1),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
            nn.MaxPool3d(2, ceil_mode=True),
            nn.MaxPool3d(2, dilation=2),
        ):
            assert torch.equal(max_pool3d(x, pool), pool(x))
        indices = nn.MaxPool3d(2, return_indices=True)
        assert torch.equal(max_pool3d(x, indices)[1], indices(x)[1])
        fc = nn.Linear(12, 7)
        want = copy.deepcopy(fc).double()(x.double().mean((2, 3, 4)))
        assert_keeps_promise(avg_pool_linear(x, fc), want)
        with torch.autocast("cpu", torch.bfloat16):
            assert avg_pool_linear(x, fc).dtype == torch.bfloat16


# ---- wrong input -----------------------------------------------------------------------------------------


def test_wrong_input() -> None:
    layer = make_layer()
    with torch.inference_mode():
        for x, error, message in (
            (X[0], ValueError, "x: expected 5 dimensions"),
            (X[:, :4], ValueError, "x: expected 5 channels"),
            (
                X.double(),
                TypeError,
                "x: expected torch.float32, the dtype of the parameters, got torch.float64",
            ),
        ):
            with pytest.raises(error, match=message):
                layer(x)
        with pytest.raises(ValueError, match="residual: expected the output's shape"):
            layer(X, X)
        with pytest.raises(TypeError, match=r"residual: expected torch.float32"):
            layer(X, torch.zeros(2, 12, 3, 6, 6).bfloat16())
    layer.fused = False
    with pytest.raises(ValueError, match="residual: expected the output's shape"):
        layer(X, torch.zeros(1, 12, 3, 6, 6))  # torch would broadcast
    with pytest.raises(ValueError, match=r"activation: expected 'relu' or None, got 'swish'"):
        r3d.ConvBNAct3d(3, 4, 3, activation="swish")
    with pytest.raises(TypeError, match=r"kernel_size: expected an int or three ints"):
        r3d.ConvBNAct3d(3, 4, (3, 3))


def test_explain_says_what_ran(monkeypatch) -> None:
    monkeypatch.setenv("R3D_KERNELS_ISA", "scalar")  # one kernel only, on every machine
    monkeypatch.setattr(_keeping, "LEAN", 0)
    model = nn.Sequential(make_layer(), nn.Identity())
    assert backends.explain(model) == []
    with torch.inference_mode(), r3d.backend("cpu"):
        model(X)
    (record,) = backends.explain(model)
    assert record.layer == "0.conv"
    assert record.problem == "n2c5d3h6w6k12f3s1p1+relu"
    assert record.backend == "cpu"
    assert record.kernel.startswith("direct ")
    assert "backend 'cpu' asked for" in record.reason


def test_parameters_can_be_swapped_after_a_run() -> None:
    module = make_layer()
    with torch.inference_mode():
        module(X)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.to(torch.bfloat16)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert module.conv.weight.dtype == torch.bfloat16
