"""Builds r3d_kernels against the torch that the environment already has; without one it fetches PINNED_TORCH.

The project's metadata is in pyproject.toml. Here is what depends on the machine: the torch requirement, the
CUDA toolkit, and the one extension module. Nothing asks for a GPU: where there is nvcc, CUDA is compiled in.
"""

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path
from typing import NamedTuple

import setuptools

PINNED_TORCH = "2.13.0"
TORCH_RANGE = ((2, 11), (2, 15))  # first and last supported minor version
TORCH_SPEC = "torch>=2.11,<2.16"
TORCH_TARGET_VERSION = (
    "0x020B000000000000"  # the oldest supported torch, in the encoding of its stable headers
)
DEFAULT_ARCHS = ("8.0", "8.6", "8.9", "9.0a", "10.0", "12.0")
# the commands that compile; others, which only ask for metadata, need not import torch
COMPILING = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}
BASE_DEPENDENCIES = ["numpy", "rich", "safetensors"]
ROOT = Path(__file__).resolve().parent


class BuildProblem(SystemExit):
    """A sentence for the user. As a SystemExit it ends the build without a traceback, under pip too."""

    def __init__(self, sentence: str):
        super().__init__(f"r3d_kernels: {sentence}")


# ----------------------------------------------------------------------------------------------------- torch


def environment_folders() -> list[str]:
    """The package folders of the environment that pip installs into.

    pip's isolated build keeps sys.prefix and takes these folders off sys.path.
    """
    folders = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    config = Path(sys.prefix, "pyvenv.cfg")
    inherits = sys.prefix == sys.base_prefix or (
        config.exists() and "include-system-site-packages = true" in config.read_text().lower()
    )
    if inherits:
        base = {"base": sys.base_prefix, "platbase": sys.base_prefix}
        folders += [sysconfig.get_path(name, vars=base) for name in ("platlib", "purelib")]
        folders += [*site.getsitepackages(), site.getusersitepackages()]
    return list(dict.fromkeys(folders))


def torch_folder() -> Path | None:
    """Where `import torch` finds it. Puts the environment's own folder back on sys.path if need be."""
    if importlib.util.find_spec("torch") is None:
        for folder in environment_folders():
            if Path(folder, "torch", "version.py").exists():
                sys.path.append(folder)  # last: the build environment's own setuptools and ninja stay first
                importlib.invalidate_caches()
                break
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def torch_version(folder: Path) -> str:
    """The version of the torch in `folder`, without the second that importing it takes."""
    match = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)", (folder / "version.py").read_text(), re.MULTILINE)
    if match is None:
        raise BuildProblem(f"{folder} does not look like an installed torch (version.py names none).")
    return match[1]


def check_torch(version: str) -> None:
    first, last = TORCH_RANGE
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or not first <= (int(numbers[1]), int(numbers[2])) <= last:
        raise BuildProblem(
            f"torch {first[0]}.{first[1]} to {last[0]}.{last[1]} is supported, and this environment has "
            f"torch {version}: pip install '{TORCH_SPEC}' first."
        )


def fetched_for_the_build(folder: Path) -> bool:
    """True for a torch that pip put into its temporary build environment because the real one had none."""
    return any(part.startswith("pip-build-env-") for part in folder.parts)


# ------------------------------------------------------------------------------------------------------ CUDA


class Toolkit(NamedTuple):
    home: Path
    version: str  # "13.0"
    archs: frozenset[str]  # the base architectures that nvcc knows: "8.0", "9.0", ...
    include: Path
    lib: Path  # holds libcudart_static.a


def cuda_request(value: str | None) -> bool | None:
    """R3D_KERNELS_CUDA: None takes CUDA where there is an nvcc, False never, True insists."""
    choice = {None: None, "": None, "0": False, "1": True}
    if value not in choice:
        raise BuildProblem(
            f"R3D_KERNELS_CUDA is {value!r}, which is unknown: use 0 (CPU only), 1 (CUDA, or fail) "
            "or leave it unset (CUDA where there is an nvcc)."
        )
    return choice[value]


def cuda_home() -> Path | None:
    """The root of the CUDA toolkit, or None.

    An nvcc on the PATH may be a wrapper script, in a folder that is no toolkit's: nvcc itself knows its root.
    """
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        value = os.environ.get(variable)
        if value and Path(value, "bin", "nvcc").exists():
            return Path(value)
    nvcc = shutil.which("nvcc")
    if nvcc:
        run = subprocess.run(
            [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull],
            capture_output=True,
            text=True,
            check=False,
        )
        top = re.search(r"^#\$ TOP=(.+)$", run.stdout + run.stderr, re.MULTILINE)
        root = Path(top[1].strip()).resolve() if top else Path(nvcc).resolve().parent.parent
        if (root / "bin" / "nvcc").exists():
            return root
    default = Path("/usr/local/cuda")
    return default if (default / "bin" / "nvcc").exists() else None


def read_toolkit(home: Path) -> Toolkit:
    """Asks nvcc what it is. Raises BuildProblem where it is broken, or its headers or runtime are missing."""
    nvcc = home / "bin" / "nvcc"
    way_out = (
        "Repair the toolkit, point CUDA_HOME at another, or set R3D_KERNELS_CUDA=0 for a CPU-only package."
    )

    def ask(option: str) -> str:
        try:
            run = subprocess.run([str(nvcc), option], capture_output=True, text=True, check=False)
        except OSError as error:
            raise BuildProblem(f"{nvcc} cannot be run ({error.strerror}). {way_out}") from None
        if run.returncode != 0:
            said = (run.stderr.strip() or run.stdout.strip() or f"exit status {run.returncode}").splitlines()[
                0
            ]
            raise BuildProblem(f"{nvcc} {option} fails ({said}). {way_out}")
        return run.stdout

    version = re.search(r"release (\d+\.\d+)", ask("--version"))
    archs = frozenset(f"{a}.{b}" for a, b in re.findall(r"compute_(\d+)(\d)\b", ask("--list-gpu-arch")))
    if version is None or not archs:
        raise BuildProblem(f"{nvcc} does not tell its version and architectures. {way_out}")
    targets = home / "targets" / f"{os.uname().machine}-linux"
    include = next(
        (p for p in (home / "include", targets / "include") if (p / "cuda_runtime.h").exists()), None
    )
    places = (home / "lib64", home / "lib", targets / "lib")
    lib = next((p for p in places if (p / "libcudart_static.a").exists()), None)
    for name, found in (("cuda_runtime.h", include), ("libcudart_static.a", lib)):
        if found is None:
            raise BuildProblem(f"the CUDA toolkit in {home} has nvcc but no {name}. {way_out}")
    return Toolkit(home, version[1], archs, include, lib)


def knows(toolkit: Toolkit, arch: str) -> bool:
    """Whether this nvcc compiles for `arch`. Its list leaves out the variants: 9.0a came with CUDA 12.0."""
    version = tuple(int(n) for n in toolkit.version.split("."))
    return arch.rstrip("af") in toolkit.archs and (arch[-1].isdigit() or version >= (12, 0))


def arch_list(toolkit: Toolkit, requested: str | None) -> str:
    """The TORCH_CUDA_ARCH_LIST to compile with: the user's, or ours cut down to what this nvcc knows."""
    if requested:
        kept = []
        for item in requested.replace(" ", ";").split(";"):
            if item[:1].isdigit():
                arch = item.removesuffix("+PTX")
                if not re.fullmatch(r"\d+\.\d[af]?", arch):
                    raise BuildProblem(f"TORCH_CUDA_ARCH_LIST names {item!r}: write 8.6, 9.0a or 10.0+PTX.")
                if (
                    float(arch.rstrip("af")) < 8.0
                ):  # container images list older GPUs: nothing here runs on those
                    continue
                if not knows(toolkit, arch):
                    raise BuildProblem(
                        f"TORCH_CUDA_ARCH_LIST names {arch}, which nvcc {toolkit.version} in "
                        f"{toolkit.home} does not know, only {', '.join(sorted(toolkit.archs, key=float))}."
                    )
            if item:
                kept.append(item)
        if not kept:
            raise BuildProblem(
                f"TORCH_CUDA_ARCH_LIST={requested!r} names no GPU of compute capability 8.0 or newer, "
                "which the kernels need. R3D_KERNELS_CUDA=0 builds a CPU-only package."
            )
        return ";".join(kept)
    known = [arch for arch in DEFAULT_ARCHS if knows(toolkit, arch)]
    if not known:
        raise BuildProblem(
            f"nvcc {toolkit.version} in {toolkit.home} knows none of {', '.join(DEFAULT_ARCHS)}: "
            "install CUDA 12 or newer, or set R3D_KERNELS_CUDA=0 for a CPU-only package."
        )
    # PTX for later GPUs: that of 10.0 runs on 11.0 too. PTX of a variant such as 9.0a runs on no later one.
    newest = "10.0" if "10.0" in known else known[-1]
    if newest[-1].isdigit():
        return ";".join(arch + "+PTX" if arch == newest else arch for arch in known)
    return ";".join([*known, newest.rstrip("af") + "+PTX"])


def find_toolkit(request: bool | None, hip: bool = False) -> Toolkit | None:
    """The toolkit to compile with, or None for a CPU-only package."""
    if request is False:
        return None
    home = cuda_home()
    if home is not None and not hip:
        return read_toolkit(home)
    if request:
        why = "this torch is built for ROCm" if hip else "no nvcc was found"
        raise BuildProblem(
            f"R3D_KERNELS_CUDA=1 asks for CUDA kernels, but {why}: put nvcc on the PATH or point "
            "CUDA_HOME at a CUDA toolkit, or leave R3D_KERNELS_CUDA unset for a CPU-only package."
        )
    return None


# ------------------------------------------------------------------------------------------------- extension


def check_compiler() -> str:
    """The C++ compiler's command. torch and ninja take $CXX or c++; only g++ may be there."""
    command = os.environ.get("CXX")
    if command and not shutil.which(shlex.split(command)[0]):
        raise BuildProblem(f"CXX is {command!r}, and there is no such compiler.")
    command = command or next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if command is None:
        raise BuildProblem(
            "the package is compiled on installation, and there is no C++ compiler: install g++ (apt-get "
            "install g++, dnf install gcc-c++, conda install gxx_linux-64) or point CXX at one."
        )
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise BuildProblem(
            f"the headers of this Python are missing (no Python.h in {sysconfig.get_path('include')}): "
            "install python3-dev (Debian, Ubuntu) or python3-devel (Fedora)."
        )
    return command


def relative(pattern: str) -> list[str]:
    """setuptools wants paths relative to setup.py; sorted, so that two builds link in the same order."""
    return sorted(os.path.relpath(path, ROOT) for path in glob(str(ROOT / pattern), recursive=True))


def extension(toolkit: Toolkit | None, archs: str, torch_version: str) -> setuptools.Extension:
    from torch.utils.cpp_extension import CppExtension

    sources = relative("csrc/*.cpp") + relative("csrc/cpu/*.cpp")
    macros = [
        ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
        ("R3D_BUILD_TORCH", f'"{torch_version}"'),
        ("R3D_BUILD_CUDA", f'"{toolkit.version if toolkit else ""}"'),
        ("R3D_BUILD_ARCHS", f'"{archs}"'),
    ]
    # No -std: torch sets the one that its headers need. No -march: kernels choose that at run time.
    # -g0 and -fno-wrapv undo what Python's own build adds; GCC warns at length of its own AVX-512 headers.
    cxx = ["-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-wrapv", "-Wno-maybe-uninitialized"]
    nvcc = ["-O3", "-Xcompiler=-fvisibility=hidden", "-Xfatbin=-compress-all"]
    # libtorch.so brings libtorch_cuda, and with it the current stream, into reach where it exists: keep it
    # among the needed libraries, although no symbol is from it. --exclude-libs hides the static CUDA runtime.
    options = {"extra_link_args": ["-Wl,--exclude-libs,ALL", "-Wl,--no-as-needed,-ltorch,--as-needed"]}
    if toolkit is not None:
        sources += relative("csrc/cuda/*.cu")
        macros.append(("R3D_WITH_CUDA", None))
        options["include_dirs"] = [str(toolkit.include)]
        options["library_dirs"] = [str(toolkit.lib)]
        options["libraries"] = ["cudart_static", "dl", "rt", "pthread"]
    headers = [path for kind in ("h", "cuh", "inl") for path in relative(f"csrc/**/*.{kind}")]
    return CppExtension(
        "r3d_kernels._C",
        sources,
        depends=[*headers, "setup.py"],
        define_macros=macros,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        py_limited_api=True,
        **options,
    )


def resizable() -> setuptools.Extension:
    """The little that torch's stable interface has not, for the torch of this build alone; _C does without it."""
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        "r3d_kernels._resizable",
        relative("csrc/torch/*.cpp"),
        depends=["setup.py"],
        extra_compile_args={"cxx": ["-O2", "-g0", "-fvisibility=hidden"]},
        py_limited_api=True,
    )


def build_arguments() -> dict:
    """ext_modules and build_ext for a run of setup.py that compiles."""
    import torch
    from torch.utils import cpp_extension

    os.environ["CXX"] = check_compiler()
    # ninja may be in the environment's bin folder, which is on the PATH only of an activated environment
    os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}{os.pathsep}{Path(sys.executable).parent}"
    request = cuda_request(os.environ.get("R3D_KERNELS_CUDA"))
    toolkit = find_toolkit(request, hip=torch.version.hip is not None)
    archs = ""
    if toolkit is not None:
        archs = arch_list(toolkit, os.environ.get("TORCH_CUDA_ARCH_LIST"))
        os.environ["TORCH_CUDA_ARCH_LIST"] = archs
        # A CPU-only torch looks for no toolkit. Its CUDA version need not be ours: no CUDA library is shared.
        os.environ["CUDA_HOME"] = cpp_extension.CUDA_HOME = str(toolkit.home)
        cpp_extension._check_cuda_version = lambda *args, **kwargs: None
    with_cuda = f"CUDA {toolkit.version} for {archs}" if toolkit else "no CUDA"
    print(f"r3d_kernels: building against torch {torch.__version__}, {with_cuda}", flush=True)

    class BuildExt(cpp_extension.BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            # -e would take a new folder each time, and ninja build everything anew
            self.build_temp = str(ROOT / "build" / "objects")

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:  # ninja's, distutils' or torch's
                cpu = " If it is nvcc's, R3D_KERNELS_CUDA=0 builds without it." if toolkit else ""
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise BuildProblem(
                    f"compilation failed, see the compiler's words above ({first}).{cpu}"
                ) from None

    return {
        "ext_modules": [extension(toolkit, archs, torch.__version__), resizable()],
        "cmdclass": {"build_ext": BuildExt.with_options(use_ninja=shutil.which("ninja") is not None)},
    }


def setup_arguments() -> dict:
    require_setuptools()
    folder = torch_folder()
    if folder is not None:
        check_torch(torch_version(folder))
    pinned = folder is None or fetched_for_the_build(folder)
    arguments = {
        "install_requires": [f"torch=={PINNED_TORCH}" if pinned else TORCH_SPEC, *BASE_DEPENDENCIES],
        # pip installs these into its build environment
        "setup_requires": ["ninja"] if folder is not None else ["ninja", f"torch=={PINNED_TORCH}"],
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }
    if COMPILING & set(sys.argv):
        if folder is None:
            raise BuildProblem(
                f"build isolation is off and there is no torch: pip install torch=={PINNED_TORCH} ninja."
            )
        arguments.update(build_arguments())
    return arguments


def require_setuptools() -> None:
    version = importlib.metadata.version("setuptools")
    if int(version.split(".")[0]) < 77:
        raise BuildProblem(
            f"setuptools {version} is too old to build without isolation: pip install 'setuptools>=77'."
        )


if __name__ == "__main__":
    setuptools.setup(**setup_arguments())
