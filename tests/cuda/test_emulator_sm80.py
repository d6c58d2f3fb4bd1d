"""The sm_80 part of the emulator: copies, matrix loads and products are the hardware's, and planted races show."""

from __future__ import annotations

import pytest
import sanitizers
import torch


def gemm(emu, k: int = 104):
    a, b = torch.randn(64, k).to(torch.bfloat16), torch.randn(k, 64).to(torch.bfloat16)
    c = torch.full((64, 64), float("nan"))
    emu.gemm(a.data_ptr(), b.data_ptr(), c.data_ptr(), k)
    return c, (a.double() @ b.double())


def is_wrong(c: torch.Tensor, exact: torch.Tensor) -> bool:
    return not torch.allclose(c.double(), exact, rtol=1e-4, atol=1e-3)


def test_a_pipelined_product_in_every_timing(emu80):
    for k in (8, 64, 104):  # 8 and 104: the last copies write zeros without reading
        assert not is_wrong(*gemm(emu80, k))


def faults(emulated, timings, **fault) -> list[str]:
    """The timings in which the fault shows."""
    wrong = []
    for schedule, seed, late in timings:
        emulated.configure(schedule, seed, late, **fault)
        if is_wrong(*gemm(emulated)):
            wrong.append(f"{schedule}-{seed}-{'late' if late else 'early'}")
    emulated.configure()
    return wrong


def test_a_missing_wait_shows_in_late_copies_only(emulated80, timings):
    wrong = faults(emulated80, timings, fewer_waited=1)
    assert wrong
    assert all(name.endswith("late") for name in wrong)


def test_every_missing_barrier_shows(emulated80, timings):
    """Four steps: even barriers stand before a stage is read, odd ones before it is filled again, twice."""
    shows = [bool(faults(emulated80, timings, skip_barrier=barrier)) for barrier in range(8)]
    assert shows == [True, True, True, True, True, False, True, False]


def test_matrix_loads(emulated80):
    numbers = torch.arange(32 * 8, dtype=torch.int16)  # row r: 8r .. 8r + 7
    words = torch.empty(352, dtype=torch.int32)
    emulated80.load_matrices(numbers.data_ptr(), words.data_ptr(), "load_matrices")
    matrices = numbers.view(4, 8, 8)
    plain = matrices.contiguous().view(torch.int32).view(4, 32)  # lane l: word l % 4 of row l / 4
    turned = matrices.transpose(1, 2).contiguous().view(torch.int32).view(4, 32)
    expected = [plain[:1], plain[:2], plain, turned]
    assert torch.equal(words, torch.cat([e.flatten() for e in expected]))


def test_copies_of_less_than_sixteen_bytes_end_in_zeros(emulated80):
    numbers = torch.arange(1, 32 * 8 + 1, dtype=torch.int16)
    words = torch.empty(352, dtype=torch.int32)
    emulated80.load_matrices(numbers.data_ptr(), words.data_ptr(), "partial_copies")
    want = numbers.view(torch.uint8).view(32, 16).clone()
    for lane in range(32):
        want[lane, 0 if lane == 31 else lane % 17 :] = 0
    assert torch.equal(words[:128].view(torch.uint8).view(32, 16), want)


@pytest.mark.parametrize(
    ("kernel", "message"), [("misaligned_copy", "cp.async"), ("misaligned_matrix", "ldmatrix")]
)
def test_misaligned_addresses_are_reported(emulated80, kernel, message):
    numbers, words = torch.zeros(300, dtype=torch.int16), torch.empty(352, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=f"{message}.*multiple of 16"):
        emulated80.load_matrices(numbers.data_ptr(), words.data_ptr(), kernel)


@pytest.mark.parametrize(
    ("kind", "dtype", "k"), [(0, torch.bfloat16, 16), (1, torch.float16, 16), (2, torch.float32, 8)]
)
def test_products(emulated80, kind, dtype, k):
    a, b = torch.randn(16, k).to(dtype), torch.randn(8, k).to(dtype)
    if kind == 2:  # the hardware ignores the low bits: with whole TF32 numbers the product is exact
        exact = (a.view(torch.int32) & ~0x1FFF).view(torch.float32).double()
        exact = exact @ (b.view(torch.int32) & ~0x1FFF).view(torch.float32).double().T
    else:
        exact = a.double() @ b.double().T
    c = torch.empty(16, 8)
    emulated80.product(kind, a.data_ptr(), b.data_ptr(), c.data_ptr())
    torch.testing.assert_close(c.double(), exact, rtol=1e-6, atol=1e-6)


def test_rounding_to_tf32(emulated80):
    one = torch.tensor(1.0).view(torch.int32)
    bits = torch.cat([one + torch.arange(0, 3 * 8192, 512, dtype=torch.int32), torch.tensor([0, 0x7F800000])])
    values = torch.cat([bits.to(torch.int32).view(torch.float32), -bits.to(torch.int32).view(torch.float32)])
    out = torch.empty_like(values)
    emulated80.round_tf32(values.data_ptr(), out.data_ptr(), values.numel())
    # ten bits behind the point, ties away from zero
    finite = values.isfinite()
    steps = values[finite].double() * 1024
    want = torch.sign(steps) * torch.floor(steps.abs() + 0.5) / 1024
    assert torch.equal(out[finite].double(), want)
    assert torch.equal(out[~finite], values[~finite])
    nan = torch.tensor([float("nan")])
    emulated80.round_tf32(nan.data_ptr(), nan.data_ptr(), 1)
    assert nan.isnan().all()


AHEAD = {"sanitized": sanitizers.compilation("sanitized_sm80.cpp", "-g1")}


@pytest.fixture(scope="module")
def sanitized():
    return sanitizers.program(*AHEAD["sanitized"])


def test_kernels_stay_inside_their_buffers(sanitized):
    result = sanitized()
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_read_one_chunk_too_far_is_seen(sanitized):
    result = sanitized("short")
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
