"""The op around the sm80 convolution, as far as a machine without a GPU can see it."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from r3d_kernels import _extension, backends, ops
from r3d_kernels.ops.clip import ClipSource
from r3d_kernels.problems import ConvProblem

P = ConvProblem.parse("n2c3d4h9w11k16f3x7x7s1x2x2p1x3x3+res+relu")
compiled = pytest.mark.skipif(not _extension.has_cuda, reason="built without nvcc")


def request_for(
    text: str = str(P), dtype: torch.dtype = torch.bfloat16, device: str = "cuda"
) -> backends.Request:
    return backends.Request(ConvProblem.parse(text), dtype, torch.device(device), 2)


def kernel():
    return next(k for k in backends.KERNELS if k.name == "sm80")


@pytest.fixture
def gpu(monkeypatch):
    """As if there were a GPU that the kernels are compiled for."""
    monkeypatch.setattr(_extension, "capable", lambda index: True)
    monkeypatch.setattr(_extension, "multiprocessors", lambda index: 108)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fakes(dtype):
    op = torch.ops.r3d_kernels
    geometry = (P.stride, P.padding, P.dilation)
    with FakeTensorMode():
        weight = torch.empty(P.k, P.c, *P.kernel, device="cuda")
        packed = op.conv3d_sm80_pack(weight, dtype, P.stride, P.dilation)
        assert (packed.dtype, packed.device.type, packed.shape[0]) == (dtype, "cuda", P.k)
        x = torch.empty(P.n, P.c, P.d, P.h, P.w, device="cuda", dtype=dtype)
        bias = torch.empty(P.k, device="cuda")
        with FlopCounterMode(display=False) as counter:
            y = op.conv3d_sm80(x, packed, None, bias, None, P.k, P.kernel, *geometry, "relu")
        assert (tuple(y.shape), y.dtype) == ((P.n, P.k, *P.out_size), dtype)
        assert y.is_contiguous(memory_format=torch.channels_last_3d)
        assert counter.get_total_flops() == 2 * P.macs
        raw = torch.empty(1, 3, 2, 4, 4, dtype=torch.uint8, device="cuda")
        assert op.clip_channels_last(raw, None, None, dtype).dtype == dtype
        # 45 channels: a pixel begins at every multiple of 16 bytes
        narrow = op.conv3d_sm80_pack(
            torch.empty(45, P.c, *P.kernel, device="cuda"), dtype, P.stride, P.dilation
        )
        bias = torch.empty(45, device="cuda")
        for y in (
            op.conv3d_sm80(x, narrow, None, bias, None, 45, P.kernel, *geometry, "relu"),
            op.conv3d_sm80_clip(x, None, None, narrow, None, bias, 45, P.kernel, *geometry, "relu"),
        ):
            d, h, w = P.out_size
            assert tuple(y.shape) == (P.n, 45, *P.out_size)
            assert y.stride() == (d * h * w * 48, 1, h * w * 48, w * 48, 48)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_raw_clip_reaches_the_op(dtype):
    """With fake tensors: order and types of the arguments are the schema's."""
    request = request_for("n2c3d4h9w11k16f3x7x7s1x2x2p1x3x3+relu", dtype)
    p = request.problem
    with FakeTensorMode():
        raw = torch.empty(p.n, p.c, p.d, p.h, p.w, dtype=torch.uint8, device="cuda")
        norm = tuple(torch.empty(p.k, device="cuda") for _ in range(4))
        layer = backends.Layer.of(torch.empty(p.k, p.c, *p.kernel, device="cuda"), None, (*norm, 1e-5))
        pack = kernel().pack(layer, request)
        vector = torch.empty(p.c, device="cuda")
        for source in (ClipSource(vector, vector, dtype), ClipSource(None, None, dtype)):
            with FlopCounterMode(display=False) as counter:
                y = kernel().run_clip(pack, raw, source, request)
            assert (tuple(y.shape), y.dtype) == ((p.n, p.k, *p.out_size), dtype)
            assert y.is_contiguous(memory_format=torch.channels_last_3d)
            assert counter.get_total_flops() == 2 * p.macs
            assert source.convert(raw).dtype == dtype


@compiled
def test_packed_rows_are_whole_steps():
    for dtype, step in ((torch.float32, 32), (torch.bfloat16, 64), (torch.float16, 64)):
        for shape in ([64, 3, 3, 7, 7], [5, 45, 3, 1, 1], [8, 64, 1, 1, 1]):
            row = torch.ops.r3d_kernels.conv3d_sm80_row(shape, dtype, [1, 2, 2], [1, 1, 1])
            assert row % step == 0
            assert row >= shape[1] * shape[2] * shape[3] * shape[4]


@pytest.mark.parametrize(
    ("text", "dtype", "device", "message"),
    [
        (str(P), torch.bfloat16, "cpu", "needs a CUDA tensor, got cpu"),
        (str(P), torch.float64, "cuda", "bfloat16 and float16 only, got torch.float64"),
        ("n1c4d3h3w3k4f1g2", torch.bfloat16, "cuda", "groups=1 only, got 2"),
        ("n1c1d40h40w40k8f11p5", torch.bfloat16, "cuda", "larger than T + R + S = 31 or 512 taps"),
    ],
)
@compiled
def test_the_predicate_says_why_not(gpu, text, dtype, device, message):
    assert message in kernel().can_run(request_for(text, dtype, device))


@compiled
def test_what_it_takes(gpu, monkeypatch):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert kernel().can_run(request_for(dtype=dtype)) is None
    assert "sm80" in [k.name for k in backends.candidates(request_for(), "cuda")[0]]
    monkeypatch.setenv("R3D_KERNELS_FP32", "strict")
    assert "R3D_KERNELS_FP32=strict" in kernel().can_run(request_for(dtype=torch.float32))
    assert kernel().can_run(request_for()) is None


@compiled
def test_tiles_worth_measuring(gpu):
    def able(text: str) -> list[str]:
        request = request_for(text)
        return [k.name for k in backends.KERNELS if k.name.startswith("sm80") and k.can_run(request) is None]

    # 256 channels of many pixels: both large tiles are worth a try, one of them is the predicted
    both = able("n8c256d4h14w14k256f3p1+relu")
    assert both[0] == "sm80"
    assert len(both) > 1
    assert able("n8c64d16h56w56k64f3p1+relu") == ["sm80", "sm80 64x64"]  # half of 128 channels would be empty
    reasons = backends.candidates(request_for("n8c64d16h56w56k64f3p1+relu"), "cuda")[1]
    assert reasons["sm80 128x64"] == "is what 'sm80' takes here"
    assert reasons["sm80 128x128"] == "predicted to be far slower"
    many = backends.candidates(request_for("n1c8d12h12w12k128f7p3"), "cuda")[1]
    assert "no room" in many["sm80 128x128"]


@pytest.mark.parametrize("factor", [1.0, 1.2, float("nan")])
def test_a_kernel_far_from_stock_is_not_chosen(monkeypatch, factor):
    class Compared(backends.DirectCpu):
        name = "compared"
        private = compared = True

        def run(self, pack, x, residual, request):
            return super().run(pack, x, residual, request) * factor

    monkeypatch.setattr(backends, "KERNELS", [Compared(), backends.Stock()])
    p = ConvProblem.parse("n2c8d3h5w6k16f3p1+res+relu")
    t, request = p.tensors(), request_for(str(p), torch.float32, "cpu")
    norm = (t.running_mean, t.running_var, t.gamma, t.beta, 1e-5)
    layer = backends.Layer.of(t.weight, None, norm)
    with torch.no_grad():
        choice = backends.choose(request, "auto", lambda k: k.pack(layer, request), t.x, t.residual)
    if factor == 1.0:
        assert choice.kernel.name == "compared"
    else:
        assert choice.kernel.name == "stock"
        assert "from the stock layers'" in choice.reason


@compiled
def test_float32_follows_torchs_switch(gpu):
    before = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = False
        assert "do not allow TF32" in kernel().can_run(request_for(dtype=torch.float32))
        torch.backends.cudnn.allow_tf32 = True
        assert kernel().can_run(request_for(dtype=torch.float32)) is None
    finally:
        torch.backends.cudnn.allow_tf32 = before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_no_candidate():
    assert kernel().can_run(request_for()) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_clips_on_any_device(dtype):
    clip = torch.randint(0, 256, (2, 3, 2, 5, 4), dtype=torch.uint8)
    mean, std = [110.0, 100.0, 90.0], [40.0, 50.0, 60.0]
    y = ops.clip_channels_last(clip, mean, std, dtype)
    shape = (1, 3, 1, 1, 1)
    exact = (clip.double() - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(y, exact.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert torch.equal(ops.clip_channels_last(clip, dtype=dtype), clip.to(dtype))


def test_clips_with_wrong_arguments():
    clip = torch.zeros(1, 3, 1, 2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="mean: expected 3 numbers, one a channel, got 2"):
        ops.clip_channels_last(clip, [1.0, 2.0])
    with pytest.raises(ValueError, match="std: expected finite numbers > 0"):
        ops.clip_channels_last(clip, std=[1.0, 0.0, 2.0])
    with pytest.raises(TypeError, match="mean: expected 3 numbers, one a channel, or None, got 'hara'"):
        ops.clip_channels_last(clip, "hara")
    with pytest.raises(ValueError, match="clip: expected 5 dimensions"):
        ops.clip_channels_last(clip[0])
