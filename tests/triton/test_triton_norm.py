"""Training batch norm in Triton, forward and backward, against float64; run by the interpreter on CPU tensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from numerics import ROUNDING, assert_keeps_promise, relative_error
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from r3d_kernels.triton import norm

pytestmark = pytest.mark.usefixtures("interpreter")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(2, 7, 3, 5, 6), (1, 64, 4, 8, 8), (3, 65, 2, 5, 9), (2, 1, 1, 1, 1), (1, 230, 1, 3, 3)]


def exact(x, gamma, beta, residual, eps, activation, dy):
    """y, and the gradients of x, gamma, beta and residual, in float64; the mask is that of the float64 y."""
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in (x, gamma, beta, residual)]
    wide, g, b, r = leaves
    y = F.batch_norm(wide, None, None, g, b, True, 0.0, eps)
    y = y if r is None else y + r
    y = y.relu() if activation else y
    y.backward(dy.double())
    return y.detach(), [None if t is None else t.grad for t in leaves]


def case(shape, dtype, mean=0.0, std=1.0, affine=True, residual=True):
    x = (torch.randn(shape) * std + mean).to(dtype)
    gamma = torch.randn(shape[1]) + 2 if affine else None
    beta = torch.randn(shape[1]) if affine else None
    r = torch.randn(shape).to(dtype) if residual else None
    return x, gamma, beta, r


def run(x, gamma, beta, residual, activation, dy, eps=1e-5):
    leaves = [None if t is None else t.clone().requires_grad_() for t in (x, gamma, beta, residual)]
    y, mean, var = norm.batch_norm_act(*leaves, eps=eps, activation=activation)
    y.backward(dy)
    return y.detach(), mean, var, [None if t is None else t.grad for t in leaves]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("affine", [False, True])
def test_forward_and_backward(shape, dtype, residual, activation, affine) -> None:
    tensors = case(shape, dtype, 0.3, 2.0, affine, residual)
    dy = torch.randn(shape).to(dtype)
    y, mean, var, grads = run(*tensors, activation, dy)
    want, want_grads = exact(*tensors, 1e-5, activation, dy)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert y.dtype == dtype
    assert_keeps_promise(y, want)
    wide = tensors[0].double()
    assert_keeps_promise(mean, wide.mean((0, 2, 3, 4)), magnitude=shape[1] ** 0.5)
    assert_keeps_promise(var, wide.var((0, 2, 3, 4), unbiased=False))
    for name, ours, theirs in zip(("x", "gamma", "beta", "residual"), grads, want_grads, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            # two values a channel: dx is the small difference of large terms
            assert_keeps_promise(ours, theirs, magnitude=dy.double().norm().item()), name


@pytest.mark.parametrize(("mean", "std"), [(1e3, 1.0), (1e4, 1.0), (-3e4, 1.0), (1e4, 1e-1)])
def test_a_mean_far_above_the_deviation(mean: float, std: float) -> None:
    """Where the mean square minus the squared mean has no digits left; rows enough for several parts."""
    x, gamma, beta, _ = case((2, 5, 9, 15, 16), torch.float32, mean, std, residual=False)
    y, got, var, _ = run(x, gamma, beta, None, None, torch.ones_like(x))
    wide = x.double()
    want = wide.var((0, 2, 3, 4), unbiased=False)
    assert relative_error(var, want) < 1e-5
    assert relative_error(got, wide.mean((0, 2, 3, 4))) < 1e-6
    exact_y, _ = exact(x, gamma, beta, None, 1e-5, None, torch.ones_like(x))
    # the mean itself is a float32: half an ulp of it, in deviations
    assert relative_error(y, exact_y) < 5e-6 + abs(mean) / std * 2.0**-23
    stock = F.batch_norm(x, None, None, gamma, beta, True, 0.0, 1e-5)
    assert relative_error(y, exact_y) < 2 * relative_error(stock, exact_y) + 5e-6


def test_without_a_residual_the_output_is_not_kept() -> None:
    """Where the ReLU let something through follows from x, rounded as y was: 1e-9 is zero in float16."""
    x = torch.tensor([[1.0, -1.0], [3.0, -3.0]]).half().view(2, 2, 1, 1, 1).requires_grad_()
    gamma, beta = torch.tensor([0.0, 0.0]), torch.tensor([1e-9, 1.0])
    for residual, kept in ((None, 1), (torch.zeros_like(x), 2)):
        y, _, _ = norm.batch_norm_act(x, gamma.requires_grad_(), beta.requires_grad_(), residual)
        assert sum(t is not None and t.dim() == 5 for t in y.grad_fn.saved_tensors) == kept
        (dbeta,) = torch.autograd.grad(y, beta, torch.ones_like(y))
        assert dbeta.tolist() == [0.0, 2.0]
        beta.grad = None
    with pytest.raises(ValueError, match="y: expected a tensor where there were a residual and a ReLU"):
        torch.ops.r3d_kernels.triton_batch_norm_act_backward(
            x, x, None, torch.ones(2, 2), gamma, beta, True, True, 1e-5
        )


@pytest.mark.parametrize("far", [-30.0, 1e3, 1e5])
def test_a_first_tile_far_from_the_rest(far: float, monkeypatch) -> None:
    """Differences are taken from its mean: what cancels is at most the number of tiles of a part."""
    monkeypatch.setitem(norm._STATISTICS, 4, (64, 2))
    norm._plan.cache_clear()
    try:
        x = torch.randn(1, 64, 1, 1, 7 * 64 + 20)
        x[..., :64] += far
        _, mean, var = norm.batch_norm_act(x, activation=None)
        assert norm._plan(tuple(x.shape), 4).statistics.parts == 2
    finally:
        norm._plan.cache_clear()
    wide = x.double()
    assert relative_error(var, wide.var((0, 2, 3, 4), unbiased=False)) < 2e-6
    assert relative_error(mean, wide.mean((0, 2, 3, 4))) < 1e-6


@pytest.mark.parametrize("size", [2, 4])
def test_many_parts(size: int) -> None:
    """Each has at least one tile, or what is left behind the last whole one."""
    plan = norm._plan((2, 5, 9, 15, 16), size)
    for summing in (plan.statistics, plan.gradients):
        assert summing.parts > 2
        assert summing.parts <= -(-plan.m // summing.tiles["BM"])


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    ("shape", "least"),
    [
        ((8, 64, 16, 56, 56), 528),
        ((8, 128, 8, 28, 28), 528),
        ((8, 256, 4, 14, 14), 190),
        ((8, 512, 2, 7, 7), 40),
    ],
)
def test_a_pass_fills_the_machine(shape: tuple[int, ...], least: int, size: int) -> None:
    """The layers of a network have four programs for each of 132 multiprocessors, as far as they have rows."""
    plan = norm._plan(shape, size)
    for summing in (plan.statistics, plan.gradients):
        parts, blocks = summing.grid
        assert parts * blocks >= least
        assert blocks * plan.bc >= plan.c
        assert parts <= summing.merging["PARTS"] <= 1024  # which one program adds up
    assert plan.elements[0] * plan.tiles["BM"] >= plan.m


def test_same_bits_every_time() -> None:
    tensors = case((2, 20, 5, 16, 16), torch.float32)
    dy = torch.randn_like(tensors[0])
    first, second = (run(*tensors, "relu", dy) for _ in range(2))
    for a, b in zip([*first[:3], *first[3]], [*second[:3], *second[3]], strict=True):
        assert torch.equal(a, b)


def test_agrees_with_torch_in_half_precision() -> None:
    """At most twice the stock layers' error, plus the output's rounding."""
    for dtype in DTYPES[1:]:
        x, gamma, beta, r = case((2, 24, 3, 6, 7), dtype, 1.0, 3.0)
        y, *_ = run(x, gamma, beta, r, "relu", torch.ones_like(x))
        want, _ = exact(x, gamma, beta, r, 1e-5, "relu", torch.ones_like(x))
        stock = (F.batch_norm(x, None, None, gamma, beta, True, 0.0, 1e-5) + r).relu()
        assert relative_error(y, want) <= 2 * relative_error(stock, want) + ROUNDING[dtype]


def test_not_a_number_stays_in_its_channel() -> None:
    x = torch.randn(1, 3, 2, 4, 4)
    x[0, 1, 0, 0, 0] = float("nan")
    y, _, _ = norm.batch_norm_act(x)
    assert y[:, 1].isnan().all()
    assert torch.isfinite(y[:, [0, 2]]).all()


@pytest.mark.parametrize("affine", [False, True])
def test_opcheck(affine: bool) -> None:
    x, gamma, beta, r = case((2, 5, 2, 3, 4), torch.float32, affine=affine)
    for t in (x, gamma, beta, r):
        if t is not None:
            t.requires_grad_()
    torch.library.opcheck(torch.ops.r3d_kernels.triton_batch_norm_act, (x, gamma, beta, r, 1e-5, "relu"))
    x = x.detach()
    statistics = torch.stack([x.mean((0, 2, 3, 4)), x.var((0, 2, 3, 4))])
    torch.library.opcheck(
        torch.ops.r3d_kernels.triton_batch_norm_act_backward,
        (
            *(torch.randn_like(x), x, x.relu(), statistics),
            *(None if t is None else t.detach() for t in (gamma, beta)),
            *(True, True, 1e-5),
        ),
    )


class Watch(TorchDispatchMode):
    """The operations of ours that a mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "r3d_kernels":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("residual", [False, True])
def test_operations_where_somebody_looks(residual: bool, monkeypatch) -> None:
    """An eager call does without them: the same bits."""
    tensors = case((2, 5, 2, 3, 4), torch.float32, residual=residual)
    dy = torch.randn_like(tensors[0])
    with Watch() as watch:
        seen = run(*tensors, "relu", dy)
    assert watch.seen == ["triton_batch_norm_act", "triton_batch_norm_act_backward"]
    monkeypatch.setattr(torch.ops, "r3d_kernels", None)
    bare = run(*tensors, "relu", dy)
    with torch.no_grad():
        y, mean, var = norm.batch_norm_act(*tensors)
    for a, b, c in zip(seen[:3], bare[:3], (y, mean, var), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(seen[3], bare[3], strict=True))


def test_gradients_of_gradients_are_refused() -> None:
    x = torch.randn(1, 3, 2, 3, 4, requires_grad=True)
    y, mean, _ = norm.batch_norm_act(x)
    assert not mean.requires_grad
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dx.sum().backward()


def test_under_compile() -> None:
    x, gamma, beta, r = case((1, 6, 2, 3, 4), torch.float32)

    def f(x):
        return norm.batch_norm_act(x * 2, gamma, beta, r)[0]

    assert torch.equal(f(x), torch.compile(f, backend="aot_eager", fullgraph=True)(x))


def test_one_graph_for_every_size() -> None:
    gamma, beta = torch.rand(6) + 1, torch.randn(6)

    def f(x):
        return norm.batch_norm_act(x * 2, gamma, beta, x)[0].square().sum()

    # No two sizes of the first call are equal: torch would take them for the same one.
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, backend=counter, fullgraph=True, dynamic=True)
    first = 0  # graphs after the first call
    for shape in ((7, 6, 3, 5, 4), (3, 6, 4, 2, 5), (4, 6, 5, 3, 7)):
        x = torch.randn(shape, requires_grad=True)
        assert torch.equal(compiled(x), f(x))
        assert torch.equal(*(torch.autograd.grad(g(x), x)[0] for g in (f, compiled)))
        first = first or counter.frame_count
    assert counter.frame_count == first


X = torch.zeros(2, 6, 3, 5, 5)
WRONG = {
    "rank": ({"x": torch.zeros(6, 3)}, ValueError, r"x: expected 5 dimensions.*\[6, 3\]"),
    "dtype": ({"x": X.double()}, TypeError, "x: expected float32, bfloat16 or float16, got torch.float64"),
    "one value": (
        {"x": X[:1, :, :1, :1, :1]},
        ValueError,
        "x: expected more than one value for each channel",
    ),
    "empty": ({"x": X[:0]}, ValueError, "x: expected more than one value for each channel"),
    "gamma alone": (
        {"beta": None},
        ValueError,
        "gamma: expected both gamma and beta or neither, got only gamma",
    ),
    "gamma": ({"gamma": torch.zeros(5)}, ValueError, r"gamma: expected shape \[6\], got \[5\]"),
    "beta": ({"beta": torch.zeros(6).half()}, TypeError, "beta: expected torch.float32, got torch.float16"),
    "residual": ({"residual": X[:1]}, ValueError, "residual: expected shape"),
    "residual dtype": ({"residual": X.half()}, TypeError, "residual: expected torch.float32, the dtype of x"),
    "eps": ({"eps": -1.0}, ValueError, "eps: expected a number >= 0, got -1.0"),
    "activation": ({"activation": "gelu"}, ValueError, "activation: expected 'relu' or None, got 'gelu'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(name: str) -> None:
    change, error, message = WRONG[name]
    valid = {"x": X, "gamma": torch.zeros(6), "beta": torch.zeros(6)}
    with pytest.raises(error, match=message):
        norm.batch_norm_act(**{**valid, **change})
