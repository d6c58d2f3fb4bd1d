"""A short run of the fuzzer, and that it finds what it is there for: a wrong kernel, a crash, a hang, a stale pack."""

from __future__ import annotations

import pytest
from fuzz.geometry import draw
from fuzz.run import Tally, run

SEED = 20261201


def assert_clean(tally: Tally, cases: int) -> None:
    assert not tally.findings, "\n".join(map(str, tally.findings))
    assert tally.cases == cases
    assert tally.runs >= cases


@pytest.mark.parametrize("isa", [None, "scalar", "avx2"])
def test_every_kernel_at_random_geometries(isa: str | None) -> None:
    if isa is None or isa in _here():
        assert_clean(run(SEED, 500, isa=isa), 500)


def _here() -> tuple[str, ...]:
    from fuzz import run as module

    return module._here()


def test_strict_mode() -> None:
    assert_clean(run(SEED + 1, 300, strict=True), 300)


def test_parameters_that_change() -> None:
    tally = run(SEED, 100, mode="state")
    assert not tally.findings, "\n".join(map(str, tally.findings))


def test_pools_and_head() -> None:
    tally = run(SEED, 500, mode="pools")
    assert not tally.findings, "\n".join(map(str, tally.findings))


@pytest.mark.parametrize(
    ("fault", "finding"),
    [("wrong", "wrong"), ("crash", "crash"), ("hang", "hang"), ("overread", "crash"), ("overwrite", "wrong")],
)
def test_a_planted_kernel_is_found(fault: str, finding: str) -> None:
    tally = run(
        4, 60, plant=fault, only="planted", patience=10.0, most=1 if fault == "hang" else 2, first=200
    )
    assert tally.findings
    for found in tally.findings:
        assert found["finding"] == finding
        assert found["kernel"] == f"planted {fault}"
    # and what it names is the case: drawn again, it has what the fault is about
    seed, index = map(int, tally.findings[0]["case"].split()[0].split(":"))
    case = draw(seed, index)
    if fault == "wrong":
        assert case.problem.out_size[2] % 4 == 3
    elif fault == "overread":
        assert case.guard == "behind"
        assert case.layout == "contiguous"
    elif fault != "overwrite":
        assert case.problem.kernel == (3, 3, 3)


def test_a_planted_stale_pack_is_found() -> None:
    tally = run(4, 40, plant="stale", mode="state", most=3)
    assert {found["finding"] for found in tally.findings} == {"wrong"}
    assert not run(4, 15, mode="state", most=3).findings


def test_cases_reach_the_edges() -> None:
    """What the strategies of other tests never draw."""
    problems = [draw(SEED, i).problem for i in range(2000)]
    assert any(p > f for q in problems for p, f in zip(q.padding, q.kernel, strict=True))
    one_tap = [(p, s, d) for q in problems for f, p, s, d in zip(*_axes(q), strict=True) if f == 1]
    assert any(p and s > 1 and d > 1 for p, s, d in one_tap)
    assert any(q.c == 1 and q.out_size[2] == 1 and q.stride[2] > 1 for q in problems)
    assert any(q.groups == q.c > 1 for q in problems)
    assert any(q.n == 0 for q in problems)


def _axes(problem):
    return problem.kernel, problem.padding, problem.stride, problem.dilation
