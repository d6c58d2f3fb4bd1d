"""The Hopper stem without a GPU: its schema, its fake, its refusals, and its place among the kernels."""

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import r3d_kernels.ops
from r3d_kernels import _extension, backends
from r3d_kernels._sm90_stem import WINDOWS, Sm90Stem
from r3d_kernels.ops import conv3d_sm90_stem
from r3d_kernels.problems import ConvProblem

pytestmark = pytest.mark.skipif(_extension.error is not None, reason="the compiled library is missing")
HARA = "n2c3d4h19w22k64f7s1x2x2p3+relu"


def refuses(text, dtype=torch.bfloat16, pool_frames=0):
    p = ConvProblem.parse(text)
    geometry = (p.in_shape, p.weight_shape, p.stride, p.padding, p.dilation)
    return torch.ops.r3d_kernels.conv3d_sm90_stem_refuses(*geometry, dtype, pool_frames)


def test_refusals_reach_python():
    assert refuses(HARA) == ""
    assert refuses(HARA, torch.float16) == ""
    assert "bfloat16 and float16" in refuses(HARA, torch.float32)
    assert "eight at most" in refuses("n1c64d4h8w8k64f3p1")
    assert "no room" in refuses("n1c3d4h400w470k64f1x17x7s1x2x2p0x8x3")
    for frames in WINDOWS:
        assert refuses(HARA, pool_frames=frames) == ""
        # rows so long that a consumer has one of them: a pooled row would be in three slices
        assert "no room" in refuses("n1c3d1h9w480k8f1x3x3s1x2x2p0x1x1", pool_frames=frames)
    assert refuses("n1c3d1h9w480k8f1x3x3s1x2x2p0x1x1") == ""
    layout = torch.ops.r3d_kernels.conv3d_sm90_stem_layout
    assert layout([64, 3, 7, 7, 7], [1, 2, 2]) == [4, 1, 7, 4]
    assert layout([64, 1, 7, 7, 7], [2, 2, 2]) == [4, 4, 2, 4]
    with pytest.raises(RuntimeError, match="weight: expected channels"):
        layout([64, 64, 3, 3, 3], [1, 1, 1])
    with pytest.raises(RuntimeError, match="weight: expected 5 dimensions"):
        layout([64, 3, 3, 3], [1, 1, 1])


needs_cuda_code = pytest.mark.skipif(
    not _extension.has_cuda, reason="no CUDA kernels were compiled (no nvcc)"
)


def fake_call(text, dtype=torch.bfloat16, clip=torch.uint8, pool_frames=0):
    p = ConvProblem.parse(text)
    x = torch.empty(p.in_shape, dtype=clip, device="cuda")
    layout = torch.ops.r3d_kernels.conv3d_sm90_stem_layout(p.weight_shape, p.stride)
    packed = conv3d_sm90_stem.pack(torch.empty(p.weight_shape, dtype=dtype, device="cuda"), layout)
    vector = torch.empty(p.k, device="cuda")
    geometry = (p.k, p.kernel, p.stride, p.padding, "relu", -1, pool_frames)
    return p, torch.ops.r3d_kernels.conv3d_sm90_stem(x, None, None, packed, vector, vector, *geometry)


@needs_cuda_code
@pytest.mark.parametrize("text", [HARA, "n1c3d2h9w13k45f1x7x7s1x2x2p0x3x3", "n0c1d4h9w8k8f3s2p1"])
def test_fake(text):
    with FakeTensorMode():
        p, y = fake_call(text)
    assert tuple(y.shape) == tuple(p.out_shape)
    assert y.dtype == torch.bfloat16
    k = p.k + -p.k % 8
    d, h, w = p.out_size
    assert y.stride() == (d * h * w * k, 1, h * w * k, w * k, k)
    for frames, window in WINDOWS.items():
        with FakeTensorMode():
            _, pooled = fake_call(text, pool_frames=frames)
            want = torch.nn.functional.max_pool3d(torch.empty(p.out_shape), *window)
        assert pooled.shape == want.shape
        assert pooled.stride(4) == k


@needs_cuda_code
def test_flops():
    from torch.utils.flop_counter import FlopCounterMode

    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        p, _ = fake_call(HARA, clip=torch.bfloat16)
    assert counter.get_total_flops() == p.flops


def test_it_is_one_of_the_kernels():
    names = [k.name for k in backends.KERNELS]
    assert names.count("wgmma stem") == 1
    assert names.index("wgmma stem") < min(names.index("cuDNN + bn_act"), names.index("sm80"))
    (kernel,) = (k for k in backends.KERNELS if isinstance(k, Sm90Stem))
    assert kernel.private
    assert kernel.compared
    assert callable(kernel.run_clip)


def request(text=HARA, dtype=torch.bfloat16, device="cuda:0"):
    return backends.Request(ConvProblem.parse(text), dtype, torch.device(device), 1)


def test_what_it_takes(hopper, monkeypatch):
    asked = []
    monkeypatch.setattr(conv3d_sm90_stem, "trial_error", lambda *how: asked.append(how) or 0.5)
    kernel = Sm90Stem()
    assert kernel.can_run(request()) is None
    assert kernel.can_run(request()) is None
    assert len(asked) == 2 * conv3d_sm90_stem.KINDS  # once in a process
    assert kernel.can_run(request(device="cpu")) == "needs a CUDA tensor, got cpu"
    assert "bfloat16 and float16" in kernel.can_run(request(dtype=torch.float32))
    assert kernel.can_run(request(HARA + "+res")) == "adds no residual"
    assert "groups=1" in kernel.can_run(request("n1c4d4h8w8k8f3p1g2"))
    assert "eight at most" in kernel.can_run(request("n1c64d4h8w8k64f3p1"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    assert kernel.can_run(request()) == "needs a GPU of compute capability 9.0"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernel.can_run(request()) == "there is no CUDA device here"
    monkeypatch.setattr(backends, "describe", lambda: {"cuda_archs": ["8.0"]})
    assert kernel.can_run(request()) == "was not compiled for 9.0a"


def test_a_wrong_or_impossible_trial(hopper, monkeypatch):
    kernel = Sm90Stem()
    monkeypatch.setattr(
        conv3d_sm90_stem, "trial_error", lambda dtype, kind, device: 2.0 if kind == 1 else 0.5
    )
    assert "wrong results" in kernel.can_run(request())

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    conv3d_sm90_stem.proven.clear()
    monkeypatch.setattr(conv3d_sm90_stem, "trial_error", full)
    assert kernel.can_run(request()) is not None
    assert conv3d_sm90_stem.proven == {}  # later, perhaps
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "captured" in kernel.can_run(request())


def test_the_trial_sees_a_wrong_result():
    """An op that torch computes in float64 passes, and none that is off by a hundredth."""

    def op(wrong, pools, x, clip_scale, clip_shift, packed, scale, bias, k, kernel, stride, padding, *how):
        # the packed weights back: [tile, T, row, unit, 64, pixel, slot]
        w = packed.view(2, 3, 7, packed.shape[3], 64, 2, 4).permute(0, 4, 6, 1, 2, 3, 5)
        w = w.reshape(128, 4, 3, 7, -1)[:k, :3, ..., : kernel[2]].double()
        wide = (1, -1, 1, 1, 1)
        y = torch.nn.functional.conv3d(x.double(), w, None, stride, padding)
        y = (y * (scale.double() + wrong).view(wide) + bias.double().view(wide)).relu().to(x.dtype)
        *_, frames = how
        return torch.nn.functional.max_pool3d(y, *WINDOWS[frames]) + pools if frames else y

    for dtype in (torch.bfloat16, torch.float16):
        for wrong, pools, good in ((0.0, 0.0, True), (0.01, 0.0, False), (0.0, 1.0, False)):
            error = conv3d_sm90_stem.trial_error(dtype, 0, "cpu", partial(op, wrong, pools))
            assert (error <= 1) == good


def test_packs_and_calls(monkeypatch):
    """The operands go to the op as the kernel's layout and the request say."""
    calls = []
    monkeypatch.setattr(torch.ops.r3d_kernels, "conv3d_sm90_stem", lambda *args: calls.append(args))
    p = ConvProblem.parse(HARA)
    t = p.tensors(torch.bfloat16)
    layer = backends.Layer.of(t.weight, None, (t.running_mean, t.running_var, t.gamma, t.beta, t.eps))
    kernel, r = Sm90Stem(), request()
    pack = kernel.pack(layer, r)
    kernel.run(pack, t.x, None, r)
    source = r3d_kernels.ops.clip.ClipSource(torch.ones(3), torch.zeros(3), torch.bfloat16)
    kernel.run_clip(pack, t.x, source, r)
    for args, clip in zip(calls, ((None, None), source[:2]), strict=True):
        assert args[-2:] == (-1, 0)  # any kind, no pool
        args = args[:-2]
        x, clip_scale, clip_shift, packed, scale, bias, *geometry = args
        assert x is t.x
        assert (clip_scale, clip_shift) == clip
        assert packed.shape == (1, 7, 7, 4, 64, 8)
        assert packed.dtype == torch.bfloat16
        assert scale.dtype == bias.dtype == torch.float32
        assert geometry == [64, (7, 7, 7), (1, 2, 2), (3, 3, 3), "relu"]
    assert kernel.pack_key(r) == (torch.bfloat16, (1, 2, 2))


def test_the_kernel_with_a_pool(hopper, monkeypatch):
    calls = []
    monkeypatch.setattr(conv3d_sm90_stem, "trial_error", lambda *how: 0.5)
    monkeypatch.setattr(torch.ops.r3d_kernels, "conv3d_sm90_stem", lambda *args: calls.append(args))
    kernel = Sm90Stem()
    for frames in WINDOWS:
        pooled = kernel.with_pool(request(), frames)
        assert (pooled.name, pooled.packs_of) == ("wgmma stem with max-pool", "wgmma stem")
        assert pooled.pack_key(request()) == kernel.pack_key(request())
        pooled.run((), torch.empty(0), None, request())
        assert calls[-1][-2:] == (-1, frames)
        assert kernel.with_pool(request("n1c3d1h9w480k8f1x3x3s1x2x2p0x1x1"), frames) is None
    assert len({key for _, key in kernel.remembers(request())}) == 2
    assert all("max-pool" in key for _, key in kernel.remembers(request()))
