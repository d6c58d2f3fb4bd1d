"""The Hopper op without a GPU: its schema, its fake, its refusals, and its place among the kernels."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import r3d_kernels.ops  # noqa: F401 - registers the operations
from r3d_kernels import _extension, backends
from r3d_kernels._sm90 import Sm90Cuda
from r3d_kernels.ops import conv3d_sm90
from r3d_kernels.problems import ConvProblem

pytestmark = pytest.mark.skipif(_extension.error is not None, reason="the compiled library is missing")


def refuses(text, dtype=torch.bfloat16):
    p = ConvProblem.parse(text)
    return torch.ops.r3d_kernels.conv3d_sm90_refuses(
        p.in_shape, p.weight_shape, p.stride, p.padding, p.dilation, dtype
    )


def test_refusals_reach_python():
    assert refuses("n1c64d4h8w8k64f3p1") == ""
    assert refuses("n1c64d4h8w8k64f3p1", torch.float16) == ""
    assert "bfloat16 and float16" in refuses("n1c64d4h8w8k64f3p1", torch.float32)
    assert refuses("n1c45d4h8w8k230f3p1") == ""
    assert "strides up to 8" in refuses("n1c64d4h8w8k64f3s9p1")
    with pytest.raises(RuntimeError, match="kernel_size: the kernel does not fit"):
        torch.ops.r3d_kernels.conv3d_sm90_refuses(
            [1, 8, 1, 1, 1], [8, 8, 3, 3, 3], [1] * 3, [0] * 3, [1] * 3, torch.half
        )


@pytest.mark.parametrize(
    "text", ["n2c64d4h9w8k24f3s2x1x1p1x0x2+res", "n0c8d4h9w8k8f3p1l2x1x1", "n2c45d4h9w8k230f3p1+res"]
)
def test_fake(text):
    p = ConvProblem.parse(text)
    with FakeTensorMode():
        x = torch.empty(p.in_shape, dtype=torch.bfloat16, device="cuda")
        weight = torch.empty(p.weight_shape, dtype=torch.bfloat16, device="cuda")
        vector = torch.empty(p.k, device="cuda")
        residual = torch.empty(p.out_shape, dtype=torch.bfloat16, device="cuda")
        y = torch.ops.r3d_kernels.conv3d_sm90(
            x, weight, vector, vector, residual, p.stride, p.padding, p.dilation, "relu"
        )
    assert tuple(y.shape) == tuple(p.out_shape)
    assert y.dtype == torch.bfloat16
    assert y.device.type == "cuda"
    k = p.k + -p.k % 8  # a pixel's channels begin at a multiple of 16 bytes
    d, h, w = p.out_size
    assert y.stride() == (d * h * w * k, 1, h * w * k, w * k, k)
    assert y.is_contiguous(memory_format=torch.channels_last_3d) == (p.k % 8 == 0)


def test_flops():
    from torch.utils.flop_counter import FlopCounterMode

    p = ConvProblem.parse("n2c64d4h9w8k24f3p1")
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        x = torch.empty(p.in_shape, dtype=torch.half, device="cuda")
        weight = torch.empty(p.weight_shape, dtype=torch.half, device="cuda")
        vector = torch.empty(p.k, device="cuda")
        torch.ops.r3d_kernels.conv3d_sm90(x, weight, vector, vector, None, [1] * 3, [1] * 3, [1] * 3, "none")
    assert counter.get_total_flops() == 2 * 2 * 4 * 9 * 8 * 24 * 64 * 27


def test_it_is_one_of_the_kernels():
    kernels = [k for k in backends.KERNELS if isinstance(k, Sm90Cuda)]
    assert [k.name for k in kernels] == ["wgmma", *("wgmma {}x{}x{}".format(*t) for t in conv3d_sm90.TILES)]
    names = [k.name for k in backends.KERNELS]
    for kernel in kernels:
        assert names.index(kernel.name) < names.index("cuDNN + bn_act")
        assert kernel.private  # a geometry that the driver refuses costs speed, and no user's pass
        assert kernel.compared


def request(text="n1c64d4h8w8k64f3p1", dtype=torch.bfloat16, device="cuda:0"):
    return backends.Request(ConvProblem.parse(text), dtype, torch.device(device), 1)


def test_what_it_says_before_it_asks_for_a_gpu(monkeypatch):
    kernel = Sm90Cuda()
    assert kernel.can_run(request(device="cpu")) == "needs a CUDA tensor, got cpu"
    monkeypatch.setattr(backends, "describe", lambda: {"cuda_archs": ["8.0", "9.0"]})
    assert kernel.can_run(request()) == "was not compiled for 9.0a"


def test_only_tiles_that_pass_their_trial_are_used(hopper, monkeypatch):
    errors = {1: 3.0, 4: float("inf")}
    asked = []

    def trial(dtype, tile, split, device, padded):
        asked.append((dtype, tile, split, device))
        if padded:
            return 0.5 if tile == 2 else 2.0
        if tile == 7:
            raise RuntimeError("an illegal instruction was encountered")
        return errors.get(tile, 0.5)

    monkeypatch.setattr(conv3d_sm90, "trial_error", trial)
    kernel = Sm90Cuda()
    assert kernel.can_run(request()) is None
    every = (1 << len(conv3d_sm90.TILES)) - 1
    assert conv3d_sm90.proven == {(0, False): every & ~(1 << 1 | 1 << 4 | 1 << 7)}
    assert {tile for _, tile, _, _ in asked} == set(range(len(conv3d_sm90.TILES)))
    asked.clear()
    assert kernel.can_run(request(dtype=torch.float16)) is None
    assert not asked  # once in a process

    layer = backends.Layer.of(torch.randn(64, 64, 3, 3, 3), None, None)
    weight, scale, shift, tiles = kernel.pack(layer, request())
    assert weight.dtype == torch.bfloat16
    assert weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert scale.dtype == shift.dtype == torch.float32
    assert bool((scale == 1).all())
    assert tiles == conv3d_sm90.proven[0, False]

    # Channels that are no multiple of 8 have a trial, a pack and tiles of their own.
    odd = request("n1c45d4h8w8k230f3p1")
    assert kernel.can_run(odd) is None
    assert conv3d_sm90.proven[0, True] == 1 << 2
    assert kernel.pack_key(odd) != kernel.pack_key(request())
    plain = torch.randn(230, 45, 3, 3, 3)
    weight, scale, shift, tiles = kernel.pack(backends.Layer.of(plain, None, None), odd)
    assert torch.equal(weight, plain.bfloat16())
    assert weight.stride() == (48 * 27, 1, 48 * 9, 48 * 3, 48)
    assert not weight.as_strided((230 * 27, 48), (48, 1))[:, 45:].any()
    assert scale.shape == shift.shape == (230,)
    assert tiles == 1 << 2


def test_a_gpu_that_computes_nonsense_is_left_alone(hopper, monkeypatch):
    monkeypatch.setattr(conv3d_sm90, "trial_error", lambda *a, padded: float("inf"))
    assert "wrong results" in Sm90Cuda().can_run(request())


def test_no_trial_inside_a_capture(hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(conv3d_sm90, "trial_error", lambda *a, padded: pytest.fail("a trial synchronizes"))
    assert "captured" in Sm90Cuda().can_run(request())
    conv3d_sm90.proven[0, False] = 1
    assert Sm90Cuda().can_run(request()) is None
    assert "captured" in Sm90Cuda().can_run(request("n1c64d4h8w8k45f3p1"))


@pytest.mark.parametrize(
    ("text", "dtype", "why"),
    [
        ("n1c64d4h8w8k64f3p1", torch.float32, "bfloat16 and float16 only"),
        ("n1c64d4h8w8k64f3p1g2", torch.bfloat16, "groups=1"),
        ("n1c3d4h8w8k64f3p1", torch.bfloat16, "64 channels at a time, more than it is worth for 3"),
    ],
)
def test_what_it_cannot_run(hopper, text, dtype, why):
    assert why in Sm90Cuda().can_run(request(text, dtype))


def test_another_gpu(hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert "compute capability 9.0" in Sm90Cuda().can_run(request())


def choice(text, tiles=-1, multiprocessors=132):
    p = ConvProblem.parse(text)
    return torch.ops.r3d_kernels.conv3d_sm90_choice(
        p.in_shape, p.weight_shape, p.stride, p.padding, p.dilation, multiprocessors, tiles
    )


LAYER1 = "n32c64d16h56w56k64f3s1p1+relu"


def test_the_choice_reaches_python():
    large, largest = conv3d_sm90.TILES.index((352, 64, 3)), conv3d_sm90.TILES.index((480, 64, 3))
    tile, split, clocks = choice(LAYER1)
    assert (tile, split) == (large, 1)
    assert choice(LAYER1, 1 << largest)[:2] == [largest, 1]
    assert choice(LAYER1, 1 << largest)[2] > clocks
    assert choice(LAYER1.replace("n32", "n1"))[0] == largest
    assert choice("n1c64d4h8w8k64f1", 1 << largest) == []  # no taps that could share
    assert choice(LAYER1, 0) == []
    with pytest.raises(RuntimeError, match="multiprocessors: expected an integer > 0, got 0"):
        choice(LAYER1, multiprocessors=0)


def test_tiles_that_may_be_faster_than_predicted_are_measured(hopper, monkeypatch):
    """Estimates are known to a tenth or so: the close ones compete."""
    monkeypatch.setattr(_extension, "multiprocessors", lambda index: 132)
    monkeypatch.setattr(conv3d_sm90, "trial_error", lambda *a, padded: 0.5)
    kernels = [k for k in backends.KERNELS if isinstance(k, Sm90Cuda)]

    def told(text):
        return {k.name: k.can_run(request(text)) for k in kernels}

    answers = told(LAYER1)
    assert [name for name, why_not in answers.items() if why_not is None] == ["wgmma", "wgmma 480x64x3"]
    assert answers["wgmma 352x64x3"] == "is what 'wgmma' takes here"
    assert answers["wgmma 64x64x1"] == "predicted to be far slower"
    assert told("n8c64d8h28w28k64f1s1p0")["wgmma 480x64x3"] == "the tile does not fit"
    # Their reasons would drown those of other kernels.
    monkeypatch.setattr(backends, "KERNELS", [backends.OneDnn(), *kernels, backends.Stock()])
    able, reasons = backends.candidates(request(LAYER1))
    assert [k.name for k in able if isinstance(k, Sm90Cuda)] == ["wgmma", "wgmma 480x64x3"]
    assert list(reasons) == ["oneDNN"]

    layer = backends.Layer.of(torch.randn(64, 64, 3, 3, 3), None, None)
    largest = conv3d_sm90.TILES.index((480, 64, 3))
    assert Sm90Cuda(largest).pack(layer, request(LAYER1))[-1] == 1 << largest
    conv3d_sm90.proven[0, False] &= ~(1 << largest)  # its trial has failed
    assert "wrong results" in told(LAYER1)["wgmma 480x64x3"]
    assert told(LAYER1)["wgmma"] is None


def test_a_trial_that_breaks_the_gpu_is_not_tried_by_the_next_process(hopper, monkeypatch, tmp_path):
    monkeypatch.setenv("R3D_KERNELS_TUNE", "1")
    monkeypatch.setenv("R3D_KERNELS_CACHE", str(tmp_path))

    def broken(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(conv3d_sm90, "trial_error", broken)
    kernel = Sm90Cuda()
    assert "wrong results" in kernel.can_run(request())  # the GPU answers still: nothing is left
    assert list(tmp_path.iterdir()) == []
    conv3d_sm90.proven.clear()
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    kernel.can_run(request())
    (trace,) = tmp_path.iterdir()
    assert "wgmma kernels on r3d_kernels" in trace.read_text()
    assert "NVIDIA H200" in trace.read_text()

    conv3d_sm90.proven.clear()  # another process
    monkeypatch.setattr(conv3d_sm90, "trial_error", lambda *a, padded: pytest.fail("tried again"))
    with pytest.warns(UserWarning, match=f"did not survive their trial; remove {trace}"):
        assert str(trace) in kernel.can_run(request())
    assert "did not survive" in kernel.can_run(request())
    trace.unlink()
    conv3d_sm90.proven.clear()
    conv3d_sm90.refused.clear()
    monkeypatch.setattr(conv3d_sm90, "trial_error", lambda *a, padded: 0.5)
    assert kernel.can_run(request()) is None
    assert list(tmp_path.iterdir()) == []


def test_a_full_gpu_tells_nothing_of_the_kernels(hopper, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(conv3d_sm90, "trial_error", full)
    assert Sm90Cuda().can_run(request()) is not None
    assert conv3d_sm90.proven == {}  # later, perhaps
    monkeypatch.setattr(conv3d_sm90, "trial_error", lambda *a, padded: 0.5)
    assert Sm90Cuda().can_run(request()) is None


@pytest.mark.skipif(not _extension.has_cuda, reason="no CUDA kernels were compiled (no nvcc)")
def test_counters_are_lent_and_taken_back(monkeypatch):
    calls, capability = [], (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(conv3d_sm90, "_COUNTERS", 5)
    monkeypatch.setattr(torch.ops.r3d_kernels, "conv3d_sm90_lend", calls.append)
    with conv3d_sm90.own_counters(torch.device("cpu")) as own:
        assert own.tolist() == [0] * 5
        assert own.dtype == torch.int32
        assert calls == [own]
    assert calls[1:] == [None]
    with pytest.raises(ZeroDivisionError), conv3d_sm90.own_counters(torch.device("cpu")):
        raise ZeroDivisionError
    assert calls[3:] == [None]
    capability = (8, 0)
    with conv3d_sm90.own_counters(torch.device("cpu")) as own:
        assert own is None
    assert len(calls) == 4


@pytest.mark.skipif(not _extension.has_cuda, reason="no CUDA kernels were compiled (no nvcc)")
def test_what_may_be_lent():
    lend = torch.ops.r3d_kernels.conv3d_sm90_lend
    lend(None)
    with pytest.raises(RuntimeError, match="counters: expected a contiguous int32 CUDA tensor"):
        lend(torch.zeros(4, dtype=torch.int32))
