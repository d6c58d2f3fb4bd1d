"""The emulator's Hopper half: a correct pipeline passes in every timing and schedule, and each planted bug fails."""

import itertools

import pytest
import torch

TIMINGS = list(itertools.product([False, True], repeat=2))  # late copies, late products
BUGS = (
    "none",
    "no full wait",
    "no empty wait",
    "released too early",
    "read before products",
    "no product fence",
    "residual too early",
    "no fence before store",
    "store too early",
    "staging reused too early",
    "too few bytes",
    "too many bytes",
    "too many arrivals",
    "no named barrier",
    "barrier overwritten",
    "ticket too early",
    "warp ticket too early",
    "no wait for earlier kernels",
)
MESSAGES = {
    "no wait for earlier kernels": "global memory is used before wait_for_earlier",
    "no product fence": "wgmma without wgmma_fence",
    "too many bytes": "deadlock, .* waiting for an event",
    "too many arrivals": "more arrivals",
    "ticket too early": "a ticket is taken before all threads that it speaks for have met",
    "warp ticket too early": "a ticket is taken before all threads that it speaks for have met",
    "barrier overwritten": "an mbarrier was overwritten|writes past the block's shared memory",
}


@pytest.fixture(scope="module")
def data():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(64, 320, generator=g).half()
    b = torch.randn(192, 320, generator=g).half()
    residual = torch.randn(192, 64, generator=g).half()
    want = b.double() @ a.double().T + residual.double()
    return a, b, residual, want


def run(emu, data, bug):
    """Whether the result is right."""
    a, b, residual, want = data
    y = torch.full_like(residual, float("nan"))
    flags = torch.full((3, 128), -1.0)
    emu.planted(BUGS.index(bug), [t.data_ptr() for t in (a, b, residual, y)], flags.data_ptr())
    good = bool(((y.double() - want).abs() <= 2**-10 * want.abs() + 1e-3).all())
    return good and bool((flags == torch.arange(3.0)[:, None]).all())


def modes(schedules):
    return itertools.product(schedules, TIMINGS)


def test_every_bug_has_its_name(emulated_sm90):
    assert emulated_sm90.bugs() == len(BUGS)


def test_the_correct_pipeline_passes_in_every_mode(emulated_sm90, schedules, data):
    for (_, schedule, seed), timing in modes(schedules):
        emulated_sm90.configure(schedule, seed, *timing)
        assert run(emulated_sm90, data, "none"), (schedule, seed, timing)


@pytest.mark.parametrize("bug", BUGS[1:])
def test_some_mode_shows_the_bug(emulated_sm90, schedules, data, bug):
    wrong, said = [], set()
    for (name, schedule, seed), timing in modes(schedules):
        emulated_sm90.configure(schedule, seed, *timing)
        try:
            if not run(emulated_sm90, data, bug):
                wrong.append((name, timing))
        except RuntimeError as error:
            wrong.append((name, timing))
            said.add(str(error))
    emulated_sm90.configure()
    assert wrong, "no mode showed the bug"
    if bug in MESSAGES:
        assert len(wrong) == len(schedules) * len(TIMINGS)
        with pytest.raises(RuntimeError, match=MESSAGES[bug]):
            raise RuntimeError(" | ".join(said))
