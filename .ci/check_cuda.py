"""Compiles every csrc/cuda/*.cu to machine code and holds its registers, spills and shared memory against the
table in csrc/cuda/resources.json. Needs nvcc and no GPU. tests/cuda/test_cubin.py checks instructions too; with
R3D_CUBIN_CACHE naming a folder, what one has compiled the other takes from there.
"""

import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "csrc" / "cuda"
ARCHS = ("8.0", "8.6", "8.9", "9.0a", "10.0", "12.0")


@dataclass
class Usage:
    """What one compiled kernel takes."""

    symbol: str  # the mangled name
    registers: int
    shared: int
    spill: int  # bytes stored and loaded

    @property
    def kernel(self) -> str:
        return base_name(self.symbol)


def base_name(symbol: str) -> str:
    """The last name in a mangled one: _ZN3r3d4cuda13bn_act_kernelIfLi4ELb1EEEv... is bn_act_kernel."""
    at = 3 if symbol.startswith("_ZN") else 2
    name = symbol
    while match := re.match(r"(\d+)", symbol[at:]):
        start = at + match.end()
        name, at = symbol[start : start + int(match[1])], start + int(match[1])
    return name


def sources() -> list[Path]:
    return sorted(CUDA.glob("*.cu"))


def table() -> dict:
    return json.loads((CUDA / "resources.json").read_text())


class Nvcc:
    """The compiler, as setup.py finds it; None from find() where there is none."""

    def __init__(self, build: dict, home: Path):
        self.path = home / "bin" / "nvcc"
        self.toolkit = build["read_toolkit"](home)
        self._knows = build["knows"]

    @classmethod
    def find(cls) -> "Nvcc | None":
        build = runpy.run_path(str(ROOT / "setup.py"))
        home = build["cuda_home"]()
        return cls(build, home) if home else None

    def knows(self, arch: str) -> bool:
        return self._knows(self.toolkit, arch)

    @cached_property
    def _ingredients(self) -> bytes:
        """Changes when the compiler or any file that it may read does."""
        version = subprocess.run([str(self.path), "--version"], capture_output=True, check=True).stdout
        files = sorted(p for p in CUDA.parent.rglob("*") if p.is_file())
        return version + b"".join(hashlib.sha256(p.read_bytes()).digest() + bytes(p) for p in files)

    def cubin(self, source: Path, arch: str, output: Path) -> list[Usage]:
        """Compiles; raises RuntimeError with the compiler's words where it fails."""
        number = arch.replace(".", "")
        command = [
            *(str(self.path), "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas=-v", "-cubin"),
            *(f"-gencode=arch=compute_{number},code=sm_{number}", str(source)),
        ]
        kept = None
        if folder := os.environ.get("R3D_CUBIN_CACHE"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            kept = Path(folder, hashlib.sha256(self._ingredients + "\0".join(command).encode()).hexdigest())
            if kept.with_suffix(".txt").exists():  # the last thing written
                shutil.copyfile(kept.with_suffix(".cubin"), output)
                return parse_ptxas(kept.with_suffix(".txt").read_text())
        run = subprocess.run(
            [*command, "-o", str(output)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "NVCC_APPEND_FLAGS": "", "NVCC_PREPEND_FLAGS": ""},
        )
        # Accepted by nvcc, and yet the end of all speed.
        lost = re.search(r"wgmma.* serialized|setmaxnreg.* ignored", run.stdout + run.stderr)
        if run.returncode != 0 or lost:
            raise RuntimeError(f"{source.name} does not compile for {arch}:\n{run.stdout}{run.stderr}")
        if kept:
            # Renamed, because the tests and this check may run beside each other.
            mine = kept.with_suffix(f".{os.getpid()}")
            shutil.copyfile(output, mine)
            mine.rename(kept.with_suffix(".cubin"))
            mine.write_text(run.stdout + run.stderr)
            mine.rename(kept.with_suffix(".txt"))
        return parse_ptxas(run.stdout + run.stderr)


def find_cuobjdump(nvcc: Nvcc) -> Path | None:
    """The toolkit's, the one on the PATH, or the one in triton's wheel."""
    places = [nvcc.path.parent / "cuobjdump"]
    if found := shutil.which("cuobjdump"):
        places.append(Path(found))
    spec = find_spec("triton")
    if spec is not None and spec.origin:
        places.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return next((p for p in places if p.exists()), None)


def parse_ptxas(text: str) -> list[Usage]:
    """Reads what `ptxas -v` says about each kernel."""
    found = []
    for part in re.split(r"Compiling entry function '", text)[1:]:
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        if spills is None or registers is None:
            raise ValueError(f"ptxas -v is written in an unknown way: {part[:300]!r}")
        found.append(
            Usage(
                symbol=part[: part.index("'")],
                registers=int(registers[1]),
                shared=int(shared[1]) if shared else 0,
                spill=int(spills[1]) + int(spills[2]),
            )
        )
    return found


def complaints(usages: list[Usage], arch: str) -> list[str]:
    """Where the kernels take more than the table allows; one sentence each."""
    limits = table()
    problems = []
    for usage in usages:
        limit = limits.get(usage.kernel)
        if limit is None:
            problems.append(f"{usage.kernel} is not in csrc/cuda/resources.json ({usage})")
            continue
        taken = {"registers": usage.registers, "shared": usage.shared, "spill": usage.spill}
        problems += [
            f"{usage.symbol} for {arch}: {what} {value}, allowed {limit['max_' + what]}"
            for what, value in taken.items()
            if value > limit["max_" + what]
        ]
    return problems


def main() -> int:
    nvcc = Nvcc.find()
    if nvcc is None:
        print("check_cuda: no nvcc here, nothing checked")
        return 0
    problems, seen = [], set()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {
            (source, arch): pool.submit(nvcc.cubin, source, arch, Path(folder, f"{source.stem}_{arch}.cubin"))
            for source in sources()
            for arch in filter(nvcc.knows, ARCHS)
        }
        for (source, arch), job in jobs.items():
            try:
                usages = job.result()
            except RuntimeError as error:
                problems.append(str(error))
                continue
            seen |= {usage.kernel for usage in usages}
            problems += complaints(usages, arch)
            most = max((usage.registers for usage in usages), default=0)
            print(f"check_cuda: {source.name} for {arch}: {len(usages)} kernels, at most {most} registers")
    problems += [f"{name} is in csrc/cuda/resources.json, but no file has it" for name in set(table()) - seen]
    for problem in problems:
        print(f"check_cuda: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
