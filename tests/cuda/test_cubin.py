"""What nvcc makes of the kernels, read from the machine code. No GPU is needed."""

import importlib.util
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load_checks():
    spec = importlib.util.spec_from_file_location("check_cuda", ROOT / ".ci" / "check_cuda.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_cuda"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


checks = load_checks()
SOURCES = checks.sources()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(source, arch) -> (cubin, usages); the first use has all of them compiled, as many at once as there are cores."""
    nvcc = checks.Nvcc.find()
    if nvcc is None:
        pytest.skip("no nvcc: CUDA kernels cannot be compiled here")
    folder, pool, jobs = tmp_path_factory.mktemp("cubin"), ThreadPoolExecutor(os.cpu_count()), {}
    for source in SOURCES:
        for arch in filter(nvcc.knows, checks.ARCHS):
            cubin = folder / f"{source.stem}_{arch}.cubin"
            jobs[source, arch] = cubin, pool.submit(nvcc.cubin, source, arch, cubin)

    def get(source, arch):
        if not nvcc.knows(arch):
            pytest.skip(f"nvcc {nvcc.toolkit.version} does not compile for {arch}")
        cubin, job = jobs[source, arch]
        return cubin, job.result()

    yield get
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("arch", checks.ARCHS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_resources(compiled, source, arch):
    _, usages = compiled(source, arch)
    assert usages, "no kernel in this file"
    assert not checks.complaints(usages, arch)


def test_the_table_names_no_kernel_that_is_gone(compiled):
    kernels = {usage.kernel for source in SOURCES for usage in compiled(source, "8.0")[1]}
    assert set(checks.table()) == kernels


@pytest.fixture(scope="module")
def code(compiled):
    """(source, arch) -> {symbol: its instructions}"""
    done = {}

    def get(source, arch):
        if (source, arch) not in done:
            cubin, usages = compiled(source, arch)
            cuobjdump = checks.find_cuobjdump(checks.Nvcc.find())
            if cuobjdump is None:
                pytest.skip("no cuobjdump, neither in the toolkit nor in triton")
            run = subprocess.run(
                [str(cuobjdump), "-sass", str(cubin)], capture_output=True, text=True, check=False
            )
            if run.returncode != 0:
                pytest.skip(f"this cuobjdump does not read code for {arch}: {run.stderr.strip()[:200]}")
            parts = re.split(r"Function : (\S+)", run.stdout)
            done[source, arch] = dict(zip(parts[1::2], parts[2::2], strict=True))
            assert set(done[source, arch]) == {usage.symbol for usage in usages}
        return done[source, arch]

    return get


@pytest.mark.parametrize("arch", checks.ARCHS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_every_kernel_uses_the_instructions_it_is_for(code, source, arch):
    for symbol, text in code(source, arch).items():
        row = checks.table()[checks.base_name(symbol)]
        here = row.get("only", arch) == arch
        for instruction in row.get("instructions", []):
            found = re.search(rf"\b{instruction}\b", text) is not None
            assert found == here, f"{symbol} for {arch}: {instruction} {'missing' if here else 'present'}"


@pytest.mark.parametrize("arch", checks.ARCHS)
def test_a_kernel_of_one_architecture_is_known_by_its_registers_elsewhere(compiled, arch):
    """The launch refuses where the kernel has fewer than 64: there it is compiled as an empty function."""
    for usage in compiled(checks.CUDA / "conv3d_sm90.cu", arch)[1]:
        assert usage.registers >= 128 if arch == "9.0a" else usage.registers <= 32, usage


@pytest.mark.parametrize("arch", checks.ARCHS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_vector_kernels_move_sixteen_bytes_at_a_time(code, source, arch):
    for symbol, text in code(source, arch).items():
        variants = checks.table()[checks.base_name(symbol)].get("vector_variants", [])
        if not variants:
            continue
        loads, stores = re.findall(r"\bLDG\.\S+", text), re.findall(r"\bSTG\.\S+", text)
        assert stores
        if any(variant in symbol for variant in variants):
            assert all(".128" in store for store in stores), f"{symbol}: {stores}"
            assert sum(".128" in load for load in loads) >= 2, f"{symbol}: {loads}"
        elif variants:
            assert not any(".128" in store for store in stores), f"{symbol} is meant for odd shapes: {stores}"


def test_reading_ptxas():
    text = """ptxas info    : Compiling entry function '_ZN3r3d4cuda4thatIfEEvv' for 'sm_80'
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem, 416 bytes cmem[0]"""
    (usage,) = checks.parse_ptxas(text)
    assert (usage.kernel, usage.registers, usage.shared, usage.spill) == ("that", 40, 1024, 28)
    assert "not in csrc/cuda/resources.json" in checks.complaints([usage], "80")[0]
    usage.symbol = "_ZN3r3d4cuda13bn_act_kernelIfLi4ELb1EEEvNS_9BnActArgsE"
    assert "spill 28, allowed 0" in " ".join(checks.complaints([usage], "80"))
    with pytest.raises(ValueError, match="unknown way"):
        checks.parse_ptxas("Compiling entry function 'x' for 'sm_80'")


@pytest.mark.parametrize(
    "symbol", ["_Z13bn_act_kernelv", "_ZN3r3d13bn_act_kernelEv", "_ZN1a1b13bn_act_kernelIfEEvi"]
)
def test_names(symbol):
    assert checks.base_name(symbol) == "bn_act_kernel"
