"""What Triton makes of the shipped configurations for GPUs that are not here: registers, shared memory, instructions.

The default run compiles what an untuned call runs with; `R3D_TRITON_AOT=full` every configuration for 8.0, 9.0 and 10.0
(about 300 compilations, a second or two each); `R3D_TRITON_AOT=all` also all that is tried on GPUs with less shared
memory (200 more).
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import background
import pytest
import torch

from r3d_kernels.problems import ConvProblem
from r3d_kernels.triton import config as configs
from r3d_kernels.triton.config import Config, Machine

ARCHS = (80, 90, 100)
SMALL = (86, 120)  # with 99 KiB of shared memory a program, as 8.9 has: fewer stages, and no larger tiles
ALL = os.environ.get("R3D_TRITON_AOT") == "all"
FULL = ALL or os.environ.get("R3D_TRITON_AOT") == "full"
SHARED = {arch: configs._SHARED.get(arch, 101376) for arch in (*ARCHS, *SMALL, 89)}

# Problems of each class that every configuration of it takes.
PROBLEMS = {
    "wide": "n1c128d8h28w28k256f3p1+res+relu",
    "narrow": "n1c64d8h56w56k64f3p1+res+relu",
    "pointwise": "n1c256d8h28w28k256f1+res+relu",
    "late": "n1c512d4h14w14k512f3p1+res+relu",
    "packed": "n1c3d8h112w112k64f3x7x7s1x2x2p1x3x3+relu",
    "odd": "n1c45d8h28w28k230f3p1+res+relu",
}
DTYPE = {"half": "bfloat16", "tf32": "float32", "ieee": "float32"}


def forward(problem: str, config: Config, precision: str, arch: int, dtype: str | None = None) -> dict:
    return {
        "op": "forward",
        "problem": problem,
        "config": str(config),
        "precision": precision,
        "dtype": dtype or DTYPE[precision],
        "arch": arch,
    }


def job(op: str, problem: str, precision: str, arch: int, config: str = "") -> dict:
    return {
        "op": op,
        "problem": problem,
        "config": config,
        "precision": precision,
        "dtype": DTYPE[precision],
        "arch": arch,
    }


# Problems of each class of gradients; a stride of two is a launch for each remainder, a 1x1x1 one leaves holes.
INPUT_GRADIENTS = {
    "wide": "n1c256d8h28w28k128f3p1",
    "narrow": "n1c64d8h56w56k128f3x1x1s2x1x1p1x0x0",
    "late": "n1c256d4h14w14k512f1s2",
    "odd": "n1c64d8h28w28k45f3x1x1p1x0x0",
}
NORM, POOL = "n4c64d16h56w56k64f1", "n1c64d8h28w28k64f1"  # the most parts that a sum may have
WEIGHT_GRADIENTS = {False: "n1c128d8h28w28k256f3p1", True: PROBLEMS["packed"]}  # by few channels of x


def input_gradient(name: str, config: Config, precision: str, arch: int) -> dict:
    return job("input_grad", INPUT_GRADIENTS[name], precision, arch, str(config))


def weight_gradient(few: bool, config: Config, precision: str, arch: int) -> dict:
    return job("weight_grad", WEIGHT_GRADIENTS[few], precision, arch, str(config))


def every_job() -> list[dict]:
    """Every shipped configuration, norms and pools, for every architecture."""
    jobs = []
    for arch in ARCHS:
        for table, shipped, make in (
            (configs._TABLE, configs.shipped, lambda name, *rest: forward(PROBLEMS[name], *rest)),
            (configs._INPUT_GRAD, configs.shipped_input_grads, input_gradient),
            (configs._WEIGHT_GRAD, configs.shipped_weight_grads, weight_gradient),
        ):
            for precision, name in table:
                jobs += [make(name, config, precision, arch) for config in shipped(precision, name, arch)]
        for precision in ("half", "ieee"):
            jobs += [job("norm", NORM, precision, arch), job("pool", POOL, precision, arch)]
    return jobs


TABLES = (
    (configs._TABLE, configs.candidates, PROBLEMS, lambda name, *rest: forward(PROBLEMS[name], *rest)),
    (configs._INPUT_GRAD, configs.input_grads, INPUT_GRADIENTS, input_gradient),
    (configs._WEIGHT_GRAD, configs.weight_grads, WEIGHT_GRADIENTS, weight_gradient),
)


def tried(every: Callable[..., list[Config]], problem: str, precision: str, arch: int) -> list[Config]:
    """What a layer or a gradient tries there, with the stages that fit; sums in one part."""
    where = Machine(arch, 84, SHARED[arch])
    able = every(ConvProblem.parse(problem), getattr(torch, DTYPE[precision]), precision, where)
    return list(dict.fromkeys(dataclasses.replace(config, split=1) for config in able))


def small_jobs() -> list[dict]:
    """All that is tried with little shared memory; in the usual run what takes the most of it, and the defaults."""
    jobs = []
    for arch in SMALL:
        for table, every, problems, make in TABLES:
            for precision, name in table:
                able = tried(every, problems[name], precision, arch)
                if not ALL:
                    if (precision, name) not in (("half", "wide"), ("tf32", "wide"), ("half", False)):
                        continue
                    size = getattr(torch, DTYPE[precision]).itemsize
                    able = list(dict.fromkeys([able[0], max(able, key=lambda c: c.shared(size))]))
                jobs += [make(name, config, precision, arch) for config in able]
    return jobs


def usual_jobs() -> list[dict]:
    """What untuned calls run with, and one of each other kernel."""
    jobs = []
    for arch in ARCHS:
        for name in ("wide", "late", "packed", "odd"):
            jobs.append(forward(PROBLEMS[name], configs.shipped("half", name, arch)[0], "half", arch))  # noqa: PERF401
        jobs.append(forward(PROBLEMS["wide"], configs.shipped("tf32", "wide", arch)[0], "tf32", arch))
    for arch in (90, 100):
        boxes = [c for c in configs.shipped("half", "wide", arch) if c.kernel == "boxes"]
        box = max(boxes, key=lambda c: c.bn)
        jobs.append(forward(PROBLEMS["wide"], box, "half", arch))
    jobs += [
        forward(PROBLEMS["narrow"], configs.shipped("ieee", "narrow", 90)[0], "ieee", 90),
        input_gradient("narrow", configs.shipped_input_grads("half", "narrow", 90)[0], "half", 90),
        *(
            weight_gradient(few, configs.shipped_weight_grads("half", few, 90)[0], "half", 90)
            for few in (0, 1)
        ),
        job("norm", NORM, "half", 90),
        job("pool", POOL, "half", 90),
    ]
    return jobs


def odd_jobs() -> list[dict]:
    """Sizes that nothing is known of, a single channel, float16, offsets of 64 bits, a gradient in parts."""
    first = configs.shipped("half", "narrow", 80)[0]
    parts = dataclasses.replace(configs.shipped_input_grads("half", "late", 90)[0], split=4)
    wide = configs.shipped("half", "wide", 80)[0]
    return [
        forward("n1c64d8h28w28k230f1x3x3p0x1x1+res+relu", wide, "half", 80),
        forward("n1c1d8h28w28k1f1", first, "half", 90, "float16"),
        forward("n96c64d32h112w112k64f3p1+relu", first, "half", 90),
        job("input_grad", "n1c128d2h7w7k512f3p1", "half", 90, str(parts)),
    ]


JOBS = (every_job() if FULL else usual_jobs()) + small_jobs() + odd_jobs()


def identity(job: dict) -> str:
    return " ".join(str(job[k]) for k in ("arch", "precision", "op", "problem", "config")).strip()


def compilation(jobs: list[dict]) -> background.Job:
    here = Path(__file__).resolve()
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(here.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    env["TRITON_DEFAULT_FP_FUSION"] = "1"  # what 3.6 to 3.9 do; 3.9 warns that it will change
    return background.Job([sys.executable, str(here.parent / "aot.py")], stdin=json.dumps(jobs), env=env)


SHARES = [JOBS[i::2] for i in range(2)]  # for two processors
AHEAD = {"results": [compilation(share) for share in SHARES]}


@pytest.fixture(scope="module")
def results() -> dict[str, list[dict] | str]:
    found = {}
    for share, process in zip(SHARES, AHEAD["results"], strict=True):
        done = process.result(timeout=3600)
        assert done.returncode == 0, done.stderr[-4000:]
        found |= zip(map(identity, share), json.loads(done.stdout), strict=True)
    return found


def tensor_cores(precision: str, arch: int, rows: int) -> str:
    """The instruction that the sums have to be made of."""
    if precision == "ieee":
        return "FFMA"
    if arch < 90 or arch >= 120 or rows < 64:  # wgmma and tcgen05 take at least 64 rows, and 12.0 has neither
        return "HMMA"
    return "HGMMA" if arch < 100 else "UTCMMA"


@pytest.mark.parametrize("job", JOBS, ids=identity)
def test_machine_code(job: dict, results: dict[str, list[dict] | str]) -> None:
    kernels = results[identity(job)]
    assert isinstance(kernels, list), kernels
    assert kernels
    for kernel in kernels:
        about = json.dumps(kernel)
        assert kernel["registers"] <= 255, about
        assert kernel["spills"] == kernel["stack"] == 0, about
        assert kernel["shared"] <= SHARED[job["arch"]], about
        if not kernel["name"].startswith("conv3d"):
            continue
        config = Config.parse(job["config"])
        rows = config.bk if config.over_pixels else config.bm
        meant = tensor_cores(job["precision"], job["arch"], rows)
        assert kernel[meant] > 0, about
        assert all(kernel[other] == 0 for other in {"HMMA", "HGMMA", "UTCMMA"} - {meant}), about
        if kernel["name"] == "conv3d_boxes":
            assert kernel["UTMALDG"] >= 4, about  # two operands, at least two stages
            assert kernel["LDGSTS"] == 0, about
        if (
            config.kernel == "rows" and job["op"] == "forward"
        ):  # whole words of padded pixels run ahead of the sums
            assert kernel["LDGSTS"] >= 2 * (config.stages - 1), about
        aligned = not any(size in job["problem"] for size in ("c45d", "c1d", "k230", "k45"))
        if kernel["name"] == "conv3d_tiled" and aligned:
            # copies of both operands run ahead of the sums
            assert kernel["LDGSTS"] >= 2 * (config.stages - 1), about
            assert kernel["STG.128"] >= 1, about  # and what is stored is stored 16 bytes at a time


def test_memory_bound_kernels_move_sixteen_bytes_at_a_time(results: dict[str, list[dict] | str]) -> None:
    seen = set()
    for job in JOBS:
        if job["op"] in ("norm", "pool"):
            for kernel in results[identity(job)]:
                seen.add(kernel["name"])
                if not kernel["name"].startswith("_merge"):
                    assert kernel["LDG.128"] >= 2, kernel
                if kernel["name"] in ("_apply", "_input_gradient", "_max_pool"):
                    assert kernel["STG.128"] >= 2, kernel
    assert {
        "_statistics",
        "_apply",
        "_gradient_sums",
        "_input_gradient",
        "_max_pool",
        "_average",
        "_linear",
    } <= seen


# ---- the table itself ----


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_every_class_has_a_default_that_fits(arch: int) -> None:
    where = Machine(arch, 100, configs._SHARED.get(arch, 101376))
    for precision, name in configs._TABLE:
        problem = ConvProblem.parse(PROBLEMS[name])
        dtype = getattr(torch, DTYPE[precision])
        assert configs.shape_class(problem) == name
        able = configs.candidates(problem, dtype, precision, where)
        assert able[0] == configs.default(problem, dtype, precision, where)
        assert all(c.shared(dtype.itemsize) <= where.shared for c in able)
        assert all(c.kernel != "boxes" for c in able[:1]), "a default must take any problem of its class"
        assert len(able) <= 12, "the first use of a layer would take too long"


def test_machines_with_less_shared_memory_try_what_fits() -> None:
    """8.6, 8.9 and 12.0 have 99 KiB: nothing that is tried there asks for more, and something is left."""
    for arch in (86, 89, 120):
        for table, every, problems, _ in TABLES:
            for precision, name in table:
                size = getattr(torch, DTYPE[precision]).itemsize
                able = tried(every, problems[name], precision, arch)
                assert all(config.shared(size) <= 101376 for config in able)
                assert able
                if arch == 89:
                    assert able == tried(every, problems[name], precision, 86)


def test_small_layers_split_their_sums() -> None:
    where = Machine(90, 132, configs._SHARED[90])
    late = ConvProblem.parse("n1c512d2h7w7k512f3p1+relu")
    first = configs.default(late, torch.bfloat16, "half", where)
    assert first.split == 8  # 2 x 8 tiles for 132 multiprocessors
    many = ConvProblem.parse("n32c64d16h56w56k64f3p1+relu")
    assert configs.default(many, torch.bfloat16, "half", where).split == 1


def test_text() -> None:
    for texts in configs._TABLE.values():
        for text in texts:
            text = text.partition(" @")[0]
            assert str(Config.parse(text)) == text
    with pytest.raises(ValueError, match="config: expected a text like 'tiled 128x64x64"):
        Config.parse("tiled 128x64")


def test_boxes() -> None:
    config = Config.parse("boxes 128x64x64 w4 s3 g8 k1")
    box = configs.boxes_of(config, ConvProblem.parse("n1c64d8h56w56k64f3p1"))
    assert box is not None
    assert box[0] * box[1] * box[2] == 128
    assert all(o % b == 0 for o, b in zip((8, 56, 56), box, strict=True))
    # 7 x 7 planes would waste a quarter of a tile and more
    assert configs.boxes_of(config, ConvProblem.parse("n1c64d1h7w7k64f3p1")) is None
    for text, why in {
        "n1c64d8h56w56k64f3p1s2": "stride 1",
        "n1c64d8h56w56k64f3p1g2": "groups",
        "n1c45d8h56w56k64f3p1": "16 bytes",
        "n32768c64d16h64w64k64f1": "32 bits",
    }.items():
        assert why in configs.why_no_boxes(ConvProblem.parse(text), torch.bfloat16)
