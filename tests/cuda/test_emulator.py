"""The emulator itself: runs correct kernels, finds planted bugs, converts numbers as the hardware does."""

import pytest
import sanitizers
import torch

THREADS = 96


def run(emu, name, blocks=1):
    data = torch.arange(THREADS, dtype=torch.float32)
    emu.planted(name, data.data_ptr(), blocks)
    return data


TOTAL = float(2 * sum(range(THREADS)) + THREADS)


def test_barriers(emu):
    assert run(emu, "block_sum").tolist() == [TOTAL] * THREADS


def test_warp_exchanges(emu):
    sums = [float(sum(range(w * 32, w * 32 + 32))) for w in range(3)]
    assert run(emu, "warp_sum").tolist() == [sums[t // 32] for t in range(THREADS)]


def test_returned_threads_are_not_waited_for(emu):
    assert run(emu, "early_return")[THREADS // 3 :].tolist() == [1.0] * (THREADS * 2 // 3)


@pytest.mark.parametrize("name", ["no_barrier_before_read", "no_barrier_after_read", "neighbour"])
def test_some_schedule_shows_a_missing_barrier(emulated, schedules, name):
    expected = [-1.0, *range(THREADS - 1)] if name == "neighbour" else [TOTAL] * THREADS
    wrong = []
    for schedule_name, schedule, seed in schedules:
        emulated.configure(schedule, seed)
        if run(emulated, name).tolist() != expected:
            wrong.append(schedule_name)
    emulated.configure(0)
    assert wrong, "no schedule showed the race"


def test_shared_memory_of_the_last_block_does_not_leak(emu):
    run(emu, "block_sum")
    assert bool(run(emu, "stale_shared").isnan().all())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("past_the_end", "write outside of a shared array"),
        ("lane_missing", "deadlock, 0 threads at a block barrier, 93 at a warp exchange, 3 returned"),
        ("wrong_mask", "mask that leaves out the calling lane"),
        ("too_much_shared", "262144 bytes of shared memory"),
    ],
)
def test_bugs_are_reported(emu, name, message):
    with pytest.raises(RuntimeError, match=message):
        run(emu, name)
    assert run(emu, "block_sum").tolist() == [TOTAL] * THREADS  # the machine still works


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_conversions_agree_with_torch(emulated, name, dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    wide = torch.empty(every.numel())
    emulated.widen(name, every.data_ptr(), wide.data_ptr(), every.numel())
    assert torch.equal(wide.nan_to_num(7.0), every.view(dtype).float().nan_to_num(7.0))

    finite = wide[wide.isfinite()]
    inputs = torch.cat(
        [
            finite,
            finite.nextafter(torch.tensor(float("inf"))),
            finite.nextafter(torch.tensor(-float("inf"))),
            (finite + finite.roll(1)) / 2,  # ties
            torch.tensor([float("inf"), -float("inf"), float("nan"), 65519.9, 65520.0, 1e-8, 3e38]),
        ]
    )
    narrow = torch.empty(inputs.numel(), dtype=torch.int16)
    emulated.round(name, inputs.data_ptr(), narrow.data_ptr(), inputs.numel())
    got, want = narrow.view(dtype), inputs.to(dtype)
    assert torch.equal(got.isnan(), want.isnan())
    number = ~want.isnan()
    assert torch.equal(got.view(torch.int16)[number], want.view(torch.int16)[number])


AHEAD = {"sanitized": sanitizers.compilation("sanitized.cpp", "-g1")}


@pytest.fixture(scope="module")
def sanitized():
    return sanitizers.program(*AHEAD["sanitized"])


def test_kernels_stay_inside_their_buffers(sanitized):
    result = sanitized()
    assert result.returncode == 0, result.stdout + result.stderr
    for name in ("block_sum", "warp_sum", "early_return"):
        assert sanitized(name).returncode == 0


@pytest.mark.parametrize("name", ["past_global", "past_the_end"])
def test_the_sanitizers_see_the_fibers(sanitized, name):
    result = sanitized(name)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr or "out of bounds" in result.stderr
