"""The very source of csrc/cuda/bn_act.cu, run on the CPU in every schedule, against float64."""

import pytest
import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CHANNELS = [1, 3, 7, 8, 24, 45, 64, 230]


def data(rows, channels, dtype, residual, offset=0, seed=0):
    """x, residual and y start `offset` elements after an aligned address."""
    g = torch.Generator().manual_seed(seed)

    def tensor():
        t = torch.empty(rows * channels + offset, dtype=dtype)[offset:].view(rows, channels)
        return t.copy_(torch.randn(rows, channels, generator=g, dtype=torch.float64) * 3)

    scale = torch.randn(channels, generator=g)
    shift = torch.randn(channels, generator=g)
    return tensor(), scale, shift, tensor() if residual else None, tensor().fill_(float("nan"))


def call(emu, x, scale, shift, residual, y, relu):
    rows, channels = x.shape
    pointers = [0 if t is None else t.data_ptr() for t in (x, scale, shift, residual, y)]
    emu.bn_act(rows, channels, DTYPES[x.dtype], int(relu), *pointers)


def reference(x, scale, shift, residual, relu):
    y = x.double() * scale.double() + shift.double()
    if residual is not None:
        y = y + residual.double()
    return y.relu() if relu else y


def check(x, scale, shift, residual, y, relu):
    want = reference(x, scale, shift, residual, relu)
    # float32 arithmetic on terms of this size, then one rounding to the dtype
    size = x.double().abs() * scale.double().abs() + shift.double().abs()
    size = size if residual is None else size + residual.double().abs()
    info = torch.finfo(y.dtype)
    allowed = 2**-23 * size + info.eps / 2 * want.abs() * 1.001 + info.smallest_normal * info.eps
    error = (y.double() - want).abs()
    assert bool((error <= allowed).all()), f"largest error {error.max()} of {allowed.max()}"


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(emu, dtype, residual, relu):
    for channels in CHANNELS:
        for rows in (0, 1, 33, 401 if channels < 24 else 57):
            args = data(rows, channels, dtype, residual, seed=channels)
            call(emu, *args, relu)
            check(*args, relu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sms", [1, 3, 64])
def test_any_number_of_multiprocessors(emulated, dtype, sms):
    emulated.configure(0, 1, sms)
    for channels, rows in ((8, 5000), (7, 1500), (4096 + 8, 3)):
        args = data(rows, channels, dtype, True)
        call(emulated, *args, True)
        check(*args, True)
    emulated.configure(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 2, 3, 5])
def test_misaligned_pointers(emulated, dtype, offset):
    args = data(41, 64, dtype, True, offset=offset)
    assert args[0].data_ptr() % 16 != 0
    call(emulated, *args, True)
    check(*args, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [7, 64])
def test_only_one_pointer_misaligned(emulated, dtype, channels):
    for which in (0, 3, 4):  # x, residual, y
        args = list(data(19, channels, dtype, True))
        moved = torch.empty(19 * channels + 1, dtype=dtype)[1:].view(19, channels)
        args[which] = moved.copy_(args[which])
        call(emulated, *args, True)
        check(*args, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [5, 16])
def test_nan_and_infinity_pass_as_in_torch(emulated, dtype, channels):
    for relu in (False, True):
        for residual in (False, True):
            x, scale, shift, add, y = data(12, channels, dtype, residual)
            odd = torch.tensor([float("nan"), -float("nan"), float("inf"), -float("inf"), 0.0, -0.0])
            x.view(-1)[: 2 * channels] = odd.repeat(channels)[: 2 * channels].to(dtype)
            if residual:
                add.view(-1)[channels : 3 * channels] = odd.repeat(channels)[: 2 * channels].to(dtype)
            scale[1] = 0.0  # inf * 0
            call(emulated, x, scale, shift, add, y, relu)
            want = x.float() * scale + shift
            want = want + add.float() if residual else want
            want = (want.relu() if relu else want).to(dtype)
            special = ~want.isfinite()
            assert special.sum() > channels
            assert torch.equal(special, ~y.isfinite())
            torch.testing.assert_close(y[special], want[special], equal_nan=True, rtol=0, atol=0)


def test_largest_float16_overflows_to_infinity(emulated):
    x = torch.full((3, 8), 60000.0, dtype=torch.float16)
    y = torch.zeros_like(x)
    call(emulated, x, torch.full((8,), 2.0), torch.zeros(8), None, y, True)
    assert bool((y == float("inf")).all())


@pytest.mark.parametrize("channels", [7, 8])
@pytest.mark.parametrize("target", ["x", "residual"])
def test_in_place(emu, channels, target):
    x, scale, shift, residual, _ = data(29, channels, torch.float32, True)
    want = reference(x, scale, shift, residual, True)
    y = x if target == "x" else residual
    call(emu, x, scale, shift, residual, y, True)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)


def test_every_schedule_gives_the_same_bits(emulated):
    outputs = []
    for schedule, seed in ((0, 1), (1, 1), (2, 5), (2, 6)):
        for sms in (1, 7):
            emulated.configure(schedule, seed, sms)
            args = data(500, 24, torch.bfloat16, True)
            call(emulated, *args, True)
            outputs.append(args[-1].view(torch.int16))
    emulated.configure(0)
    assert all(torch.equal(outputs[0], o) for o in outputs)


def test_unknown_dtype_is_refused(emulated):
    with pytest.raises(RuntimeError, match="unknown dtype"):
        emulated.bn_act(1, 1, 9, 0, 0, 0, 0, 0, 0)
