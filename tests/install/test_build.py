"""setup.py's decisions, and what the built extension asks of the machine that it is carried to."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("r3d_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def toolkit(build, version, *archs):
    return build.Toolkit(
        Path("/opt/cuda"), version, frozenset(archs), Path("/opt/cuda/include"), Path("/opt/cuda/lib64")
    )


def sentence(problem) -> str:
    """The text of an error, which has to be one line."""
    text = str(problem.value)
    assert text.startswith("r3d_kernels: ")
    assert "\n" not in text
    return text


# --------------------------------------------------------------------------------------------- architectures

CUDA_13 = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0", "12.1")


@pytest.mark.parametrize(
    ("version", "archs", "expected"),
    [
        ("13.0", CUDA_13, "8.0;8.6;8.9;9.0a;10.0+PTX;12.0"),
        ("12.4", ("7.0", "8.0", "8.6", "8.9", "9.0"), "8.0;8.6;8.9;9.0a;9.0+PTX"),
        ("11.8", ("7.0", "8.0", "8.6", "8.9", "9.0"), "8.0;8.6;8.9+PTX"),  # 9.0a came with CUDA 12
        ("11.0", ("7.0", "8.0"), "8.0+PTX"),
    ],
)
def test_default_architectures_are_those_that_nvcc_knows(build, version, archs, expected):
    assert build.arch_list(toolkit(build, version, *archs), None) == expected
    assert build.arch_list(toolkit(build, version, *archs), "") == expected


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        ("9.0a", "9.0a"),
        ("8.6 9.0+PTX", "8.6;9.0+PTX"),
        ("7.0;7.5;8.0;;8.6", "8.0;8.6"),  # container images list older GPUs too
        ("Ampere;Hopper", "Ampere;Hopper"),  # names are torch's affair
        ("10.0a;12.0f", "10.0a;12.0f"),
    ],
)
def test_requested_architectures_are_honoured(build, requested, expected):
    assert build.arch_list(toolkit(build, "13.0", *CUDA_13), requested) == expected


@pytest.mark.parametrize(
    ("requested", "words"),
    [
        ("13.7", "names 13.7, which nvcc 13.0"),
        ("8.0;8.x", "names '8.x'"),
        ("sm_80;80", "names '80'"),
        ("7.0 7.5", "compute capability 8.0"),
    ],
)
def test_architectures_that_cannot_be(build, requested, words):
    with pytest.raises(SystemExit) as problem:
        build.arch_list(toolkit(build, "13.0", *CUDA_13), requested)
    assert words in sentence(problem)


def test_an_nvcc_that_is_too_old(build):
    with pytest.raises(SystemExit) as problem:
        build.arch_list(toolkit(build, "10.2", "7.0", "7.5"), None)
    assert "nvcc 10.2" in sentence(problem)


# --------------------------------------------------------------------------------------------------- toolkit

NVCC = """#!/bin/sh
case "$1" in
  --dryrun) echo '#$ _SPACE_= ' >&2; echo "#$ TOP={top}" >&2 ;;
  --version) echo 'Cuda compilation tools, release 12.8, V12.8.61' ;;
  --list-gpu-arch) printf 'compute_80\\ncompute_90\\ncompute_100\\n' ;;
esac
"""


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def fake_cuda(tmp_path, monkeypatch):
    """A toolkit in tmp_path/cuda, and an environment that knows of none."""
    home = tmp_path / "cuda"
    executable(home / "bin" / "nvcc", NVCC.replace("{top}", str(home)))
    for name in ("include/cuda_runtime.h", "lib64/libcudart_static.a"):
        (home / name).parent.mkdir()
        (home / name).touch()
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return home


def test_cuda_home_from_the_environment(build, fake_cuda, monkeypatch):
    monkeypatch.setenv("CUDA_PATH", str(fake_cuda))
    assert build.cuda_home() == fake_cuda
    monkeypatch.setenv("CUDA_HOME", "/nowhere")  # a stale one is passed over
    assert build.cuda_home() == fake_cuda


def test_cuda_home_of_an_nvcc_on_the_path(build, fake_cuda, monkeypatch):
    monkeypatch.setenv("PATH", f"{fake_cuda / 'bin'}:/usr/bin:/bin")
    assert build.cuda_home() == fake_cuda


def test_cuda_home_behind_a_wrapper_script(build, fake_cuda, tmp_path, monkeypatch):
    executable(tmp_path / "local" / "bin" / "nvcc", f'#!/bin/sh\nexec {fake_cuda}/bin/nvcc "$@"\n')
    monkeypatch.setenv("PATH", f"{tmp_path / 'local' / 'bin'}:/usr/bin:/bin")
    assert build.cuda_home() == fake_cuda


def test_reading_a_toolkit(build, fake_cuda):
    found = build.read_toolkit(fake_cuda)
    assert (found.version, found.archs) == ("12.8", {"8.0", "9.0", "10.0"})
    assert found.include == fake_cuda / "include"
    assert found.lib == fake_cuda / "lib64"


@pytest.mark.parametrize("missing", ["include/cuda_runtime.h", "lib64/libcudart_static.a"])
def test_a_toolkit_with_something_missing(build, fake_cuda, missing):
    (fake_cuda / missing).unlink()
    with pytest.raises(SystemExit) as problem:
        build.read_toolkit(fake_cuda)
    assert f"no {Path(missing).name}" in sentence(problem)
    assert "R3D_KERNELS_CUDA=0" in sentence(problem)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("#!/bin/sh\necho 'cannot find libdevice' >&2\nexit 3\n", "cannot find libdevice"),
        ("#!/bin/sh\nexit 3\n", "exit status 3"),
        ("#!/bin/sh\necho hello\n", "does not tell its version"),
        ("#!/no/such/shell\n", "cannot be run"),
    ],
)
def test_an_nvcc_that_fails(build, fake_cuda, script, words):
    executable(fake_cuda / "bin" / "nvcc", script)
    with pytest.raises(SystemExit) as problem:
        build.read_toolkit(fake_cuda)
    assert words in sentence(problem)
    assert "R3D_KERNELS_CUDA=0" in sentence(problem)


@pytest.mark.parametrize(("value", "choice"), [(None, None), ("", None), ("0", False), ("1", True)])
def test_the_cuda_switch(build, value, choice):
    assert build.cuda_request(value) is choice


@pytest.mark.parametrize("value", ["yes", "2", "true", " "])
def test_the_cuda_switch_refuses_other_values(build, value):
    with pytest.raises(SystemExit) as problem:
        build.cuda_request(value)
    assert repr(value) in sentence(problem)


def test_cuda_is_taken_where_it_is(build, fake_cuda, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(fake_cuda))
    for request in (None, True):
        assert build.find_toolkit(request).home == fake_cuda
    assert build.find_toolkit(False) is None
    assert build.find_toolkit(None, hip=True) is None


def test_cuda_that_is_not_there(build, monkeypatch):
    monkeypatch.setattr(build, "cuda_home", lambda: None)
    assert build.find_toolkit(None) is None
    with pytest.raises(SystemExit) as problem:
        build.find_toolkit(True)
    assert "no nvcc was found" in sentence(problem)
    with pytest.raises(SystemExit) as problem:
        build.find_toolkit(True, hip=True)
    assert "ROCm" in sentence(problem)


# ------------------------------------------------------------------------------------------- torch, compiler


@pytest.mark.parametrize(
    "version", ["2.11.0", "2.13.0+cpu", "2.15.1+cu132", "2.12.0a0+git1234", "2.15.0.dev20261001"]
)
def test_supported_torch(build, version):
    build.check_torch(version)


@pytest.mark.parametrize("version", ["2.10.2", "1.13.1+cu117", "2.16.0", "3.0", "unknown"])
def test_unsupported_torch(build, version):
    with pytest.raises(SystemExit) as problem:
        build.check_torch(version)
    assert version in sentence(problem)
    assert "torch 2.11 to 2.15" in sentence(problem)
    assert build.TORCH_SPEC in sentence(problem)


def test_the_numbers_that_say_the_same_agree(build):
    first, last = build.TORCH_RANGE
    assert f"torch>={first[0]}.{first[1]},<{last[0]}.{last[1] + 1}" == build.TORCH_SPEC
    assert int(build.TORCH_TARGET_VERSION, 16) >> 48 == (first[0] << 8 | first[1])
    assert first <= tuple(int(n) for n in build.PINNED_TORCH.split(".")[:2]) <= last


def test_the_version_is_read_without_an_import(build, tmp_path):
    (tmp_path / "version.py").write_text(
        "from typing import Optional\n__version__ = '2.12.1+cpu'\ndebug = False\n"
    )
    assert build.torch_version(tmp_path) == "2.12.1+cpu"
    (tmp_path / "version.py").write_text("")
    with pytest.raises(SystemExit) as problem:
        build.torch_version(tmp_path)
    assert str(tmp_path) in sentence(problem)


def test_torch_of_a_temporary_build_environment_is_told_apart(build):
    assert build.fetched_for_the_build(
        Path("/tmp/pip-build-env-x1y2/overlay/lib/python3.11/site-packages/torch")
    )
    assert not build.fetched_for_the_build(Path("/home/me/venv/lib/python3.11/site-packages/torch"))


def test_torch_is_found_without_importing_it(build):
    import torch

    assert build.torch_folder() == Path(torch.__file__).parent
    assert build.torch_version(build.torch_folder()) == torch.__version__


def test_a_missing_compiler(build, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SystemExit) as problem:
        build.check_compiler()
    assert "no C++ compiler" in sentence(problem)
    monkeypatch.setenv("CXX", "ccache my-g++")
    with pytest.raises(SystemExit) as problem:
        build.check_compiler()
    assert "'ccache my-g++'" in sentence(problem)


def test_any_compiler_that_is_there(build, tmp_path, monkeypatch):
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path))
    executable(tmp_path / "g++", "#!/bin/sh\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SystemExit) as problem:
        build.check_compiler()
    assert "no Python.h" in sentence(problem)
    (tmp_path / "Python.h").touch()
    assert build.check_compiler() == "g++"


def test_an_old_setuptools(build, monkeypatch):
    monkeypatch.setattr(build.importlib.metadata, "version", lambda name: "68.2.2")
    with pytest.raises(SystemExit) as problem:
        build.require_setuptools()
    assert "setuptools 68.2.2 is too old" in sentence(problem)


def test_setup_prints_one_sentence(tmp_path):
    """Through the command line, as pip runs it: no traceback."""
    environment = {**os.environ, "R3D_KERNELS_CUDA": "maybe"}
    run = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    lines = [line for line in run.stderr.splitlines() if "warn" not in line.lower()]
    assert len(lines) == 1, run.stderr
    assert "R3D_KERNELS_CUDA is 'maybe'" in lines[0]


# --------------------------------------------------------------------------------------------- the extension


@pytest.fixture(scope="module")
def binary():
    spec = importlib.util.find_spec("r3d_kernels._C")
    if spec is None:
        pytest.skip("the extension is not built")
    return Path(spec.origin)


def output(*command) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} (binutils) is not there")
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout


def test_one_binary_for_every_python(binary):
    assert binary.name == "_C.abi3.so"
    python = set(re.findall(r"\bU (_?Py\w+)", output("nm", "-D", "--undefined-only", binary)))
    assert python <= {"PyModule_Create2"}  # in the limited API since 3.2


def test_one_binary_for_every_torch(binary):
    symbols = [line.split()[-1] for line in output("nm", "-D", "--undefined-only", binary).splitlines()]
    unstable = [
        s for s in symbols if s.startswith("_Z") and re.search(r"(?:^_ZN?K?)?(?:2at|3c10|5torch|5caffe)", s)
    ]
    assert not unstable
    assert any(s.startswith("aoti_torch_") for s in symbols)


def test_no_cuda_library_is_needed(binary):
    needed = re.findall(r"NEEDED.*\[(\S+)\]", output("readelf", "-d", binary))
    assert "libtorch.so" in needed  # brings libtorch_cuda into reach where it exists
    assert not [n for n in needed if "cuda" in n or "cudart" in n or "torch_python" in n]
    assert not re.search(r"R(UN)?PATH", output("readelf", "-d", binary))


def test_the_stream_of_cuda_is_optional(binary):
    found = re.findall(
        r"(\w) (aoti_torch_get_current_cuda_stream|\S*cuda\S*)$", output("nm", "-D", binary), re.MULTILINE
    )
    assert all(kind in "wv" for kind, name in found if name != "aoti_torch_device_type_cuda"), found


def test_only_the_module_is_exported(binary):
    names = [line.split()[-1] for line in output("nm", "-DC", "--defined-only", binary).splitlines()]
    assert "PyInit__C" in names
    assert not [n for n in names if n.startswith(("r3d::", "cuda", "__cuda"))]
