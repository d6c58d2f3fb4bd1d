"""What a launch costs and hands to the driver, without a GPU: compiled for one that is not here, launched nowhere."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import launch_overhead

from r3d_kernels.problems import ConvProblem
from r3d_kernels.triton import conv3d, launch, norm, pool
from r3d_kernels.triton.config import Config

pytestmark = pytest.mark.skipif(
    bool(os.environ.get("TRITON_INTERPRET")), reason="the interpreter compiles nothing"
)


def channels_last(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last_3d)


def forward(text: str, config: str, dtype: torch.dtype = torch.bfloat16):
    p = ConvProblem.parse(text)
    t = p.tensors(dtype)
    run = conv3d.forward(p, Config.parse(config), "half", True, True)
    operands = (t.x, t.weight, torch.ones(p.k), torch.ones(p.k), t.residual)
    return lambda: run(*operands)


def backward_of_norm():
    x, statistics = channels_last(2, 32, 2, 3, 3), torch.rand(2, 32)
    op = torch.ops.r3d_kernels.triton_batch_norm_act_backward
    return lambda: op(x, x, x, statistics, torch.ones(32), torch.ones(32), True, True, 1e-5)


P = ConvProblem.parse("n1c32d3h6w6k32f3s2p1")
X, DY, WEIGHT = channels_last(*P.in_shape), channels_last(*P.out_shape), channels_last(*P.weight_shape)
CALLS = {
    "tiled": (1, lambda: forward("n1c32d2h4w4k32f3p1+res+relu", "tiled 16x16x16 w4 s2 g8 k1")),
    "parts": (2, lambda: forward("n1c32d2h4w4k32f3p1+relu", "tiled 16x16x16 w4 s2 g8 k4")),
    "packed": (1, lambda: forward("n1c3d2h4w4k32f3p1+relu", "packed 16x16x16 w4 s2 g8 k1")),
    "rows": (3, lambda: forward("n1c3d2h4w4k32f3p1+relu", "rows 16x16x16 w4 s2 g8 k1")),  # two of them pad
    "boxes": (1, lambda: forward("n1c32d2h4w8k32f3p1+res", "boxes 32x32x32 w4 s2 g8 k1")),
    "functional": (1, lambda: lambda: conv3d.conv3d(X, WEIGHT, stride=2, padding=1)),
    "input gradient": (
        8,  # one for each remainder of the stride
        lambda: lambda: conv3d.conv3d_input_grad(DY, WEIGHT, P.in_shape, stride=2, padding=1),
    ),
    "weight gradient": (
        1,
        lambda: lambda: conv3d.conv3d_weight_grad(X, DY, P.weight_shape, stride=2, padding=1),
    ),
    "norm": (3, lambda: lambda: norm.batch_norm_act(X, torch.ones(32), torch.ones(32), X)),
    "norm's gradient": (3, backward_of_norm),
    "max-pool": (1, lambda: lambda: pool.max_pool3d(X, 3, 2, 1)),
    "average": (1, lambda: lambda: pool.global_avg_pool3d(X)),
    "head": (2, lambda: lambda: pool.avg_pool_linear(X, X[0, :, 0, 0, :].t(), None)),
}


def described(argument: object) -> object:
    """What two launches of the same call have in common."""
    if isinstance(argument, torch.Tensor):
        return argument.shape, argument.stride(), argument.dtype
    if hasattr(argument, "block_shape"):
        return {**vars(argument), "base": described(argument.base)}
    return argument


@pytest.mark.parametrize("name", CALLS)
def test_a_second_launch_is_the_first_without_triton(name: str, driver, monkeypatch) -> None:
    count, make = CALLS[name]
    call = make()
    call()
    first = driver.launched[:]
    assert len(first) >= count
    driver.launched.clear()
    driver.stream = 7
    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", lambda *a, **k: pytest.fail("went through Triton's binding again"))
        call()
    assert [x[2] for x in driver.launched] == [7] * len(first), "the stream of now, not of the first call"
    for before, after in zip(first, driver.launched, strict=True):
        assert before[:2] == after[:2]
        assert [described(a) for a in before[3]] == [described(a) for a in after[3]]
        assert len(after[3]) == len(before[3])


def test_the_compiler_sees_the_kernels_of_pools(driver) -> None:
    """`triton_op`: kernels in the graph, which write their output and nothing else, for sizes that may be symbolic."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: object):
        graphs.append(graph)
        return graph.forward

    def f(x, weight, bias):
        y = pool.max_pool3d(x * 2, 3, 2, 1)
        return pool.avg_pool_linear(y, weight, bias), pool.global_avg_pool3d(y)

    for shapes in (((3, 64, 4, 8, 10),), ((3, 64, 4, 8, 10), (2, 64, 5, 7, 9))):
        torch._dynamo.reset()
        graphs.clear()
        dynamic = len(shapes) > 1
        compiled = torch.compile(f, backend=aot_autograd(fw_compiler=keep), fullgraph=True, dynamic=dynamic)
        for shape in shapes:
            driver.launched.clear()
            logits, means = compiled(torch.randn(shape), torch.randn(7, 64), torch.randn(7))
            assert (logits.shape, means.shape) == ((shape[0], 7), shape[:2])
            assert [x[0] for x in driver.launched] == ["_max_pool", "_average", "_linear", "_average"]
        (graph,) = graphs
        seen = [n for n in graph.graph.nodes if n.op == "call_function"]
        shown = [n for n in seen if "triton_kernel_wrapper" in str(n.target)]
        assert len(shown) == 4
        assert all(n.kwargs["tensors_to_clone"] == ["y_ptr"] for n in shown)
        assert not any("r3d_kernels" in str(n.target) for n in seen), "no operation is left around them"


def test_another_address_or_dtype_is_compiled_again(driver) -> None:
    p = ConvProblem.parse("n1c32d2h4w4k32f1")
    run = conv3d.forward(p, Config.parse("tiled 16x16x16 w4 s2 g8 k1"), "half", False, False)
    aligned, weight = channels_last(*p.in_shape), channels_last(*p.weight_shape)
    flat = torch.zeros(aligned.numel() + 1, dtype=aligned.dtype)[1:]
    shifted = flat.as_strided(aligned.shape, aligned.stride())
    for x, w, kinds in (
        (aligned, weight, 1),
        (shifted, weight, 2),
        (aligned.half(), weight.half(), 3),
        (shifted, weight, 3),
        (aligned, weight, 3),
    ):
        run(x, w, None, None, None)
        assert len(run.launch._ready) == kinds


def test_descriptors_keep_no_tensor_alive(driver) -> None:
    import weakref

    p = ConvProblem.parse("n1c32d2h4w8k32f3p1")
    run = conv3d.forward(p, Config.parse("boxes 32x32x32 w4 s2 g8 k1"), "half", False, False)
    x, weight = channels_last(*p.in_shape), channels_last(*p.weight_shape)
    driver.keep = False
    run(x, weight, None, None, None)
    gone = weakref.ref(x)
    del x
    assert gone() is None


def test_the_tensors_device_becomes_the_current_one(monkeypatch) -> None:
    class On:
        def __init__(self, index: int) -> None:
            self.get_device = lambda: index

    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda index: entered.append(index) or launch._HERE)
    for index in (-1, 1, 0, 3):
        with launch.on_device(On(index)):
            pass
    assert entered == [0, 3]


def test_devices_do_not_share_what_was_compiled(driver) -> None:
    """A compiled kernel belongs to the device it was loaded on."""
    run = launch.Launch(pool._average, (1, 1), (32, 12), {"BM": 32, "BC": 32, "num_warps": 4})

    class Elsewhere:
        dtype, is_cuda, is_meta = torch.bfloat16, False, False

        def __init__(self, index: int) -> None:
            self.get_device, self.data_ptr = lambda: index, lambda: 0

    for index in (0, 1, 0):
        driver.device = 90 + index
        run(Elsewhere(index), Elsewhere(index))
    assert sorted(place[0] for place in run._ready) == [0, 1]


# ---- inside the capture of a CUDA graph ----


@pytest.mark.parametrize("name", CALLS)
def test_a_capture_before_the_first_call_is_refused(name: str, driver, monkeypatch) -> None:
    """By name, with what to do, before anything is launched; afterwards the same call is captured."""
    call = CALLS[name][1]()
    driver.device = 100 + list(CALLS).index(name)  # where no other test has loaded anything
    with monkeypatch.context() as patch:
        patch.setattr(launch, "capturing", lambda x: True)
        with pytest.raises(
            RuntimeError, match=r"Triton kernel \w+: expected it loaded before.*call the same function once"
        ):
            call()
    assert not driver.launched
    call()
    count = len(driver.launched)
    with monkeypatch.context() as patch:
        patch.setattr(launch, "capturing", lambda x: True)
        call()
    assert len(driver.launched) == 2 * count


def test_what_another_layer_has_loaded_may_be_captured(driver, monkeypatch) -> None:
    config = "tiled 16x16x16 w4 s2 g8 k1"
    forward("n1c32d2h4w4k32f3p1+relu", config)()
    monkeypatch.setattr(launch, "capturing", lambda x: True)
    driver.launched.clear()
    forward("n1c64d2h5w4k48f3p1+relu", config)()
    assert len(driver.launched) == 1


def test_whether_a_stream_captures_is_asked_of_torch(monkeypatch) -> None:
    class On:
        def __init__(self, cuda: bool) -> None:
            self.is_cuda = cuda

    asked = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: asked.append(1) or True)
    assert launch.capturing(On(True))
    assert not launch.capturing(On(False))
    assert len(asked) == 1


def test_the_benchmark_runs(driver, monkeypatch) -> None:
    driver.keep = False
    monkeypatch.setattr(launch_overhead, "microseconds", lambda call: call() is None)
    names = [name for name, call in launch_overhead.calls() if not launch_overhead.microseconds(call)]
    assert len(names) == 9
