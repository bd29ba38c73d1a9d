"""The row kernels ahead of time: built by CMake, found by find_package, called from C++."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from reflux.kernels import _triton

if not _triton.HAS_TRITON:
    pytest.skip("needs triton", allow_module_level=True)
from reflux.kernels import _aot

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
needs_cmake = pytest.mark.skipif(not shutil.which("cmake"), reason="needs cmake")


def run(*command, **environment) -> subprocess.CompletedProcess:
    environment = os.environ | {"TRITON_INTERPRET": "0"} | environment
    return subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)


def build(*command) -> None:
    done = run(*command)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Path:
    """The example's program, built against the installed library; kl_stats alone, to be quick."""
    folder = tmp_path_factory.mktemp("aot")
    options = ["-DREFLUX_AOT=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    options += ["-DREFLUX_AOT_ARCH=80;90", "-DREFLUX_AOT_ONLY=kl_stats_forward_f32"]
    build("cmake", "-S", ROOT, "-B", folder / "library", *options)
    build("cmake", "--build", folder / "library")
    build("cmake", "--install", folder / "library", "--prefix", folder / "prefix")
    user = folder / "user"
    user.mkdir()
    shutil.copy(HERE / "aot_CMakeLists.txt", user / "CMakeLists.txt")
    shutil.copy(HERE / "aot_example.cpp", user / "example.cpp")
    build("cmake", "-S", user, "-B", user / "build", f"-DCMAKE_PREFIX_PATH={folder / 'prefix'}")
    build("cmake", "--build", user / "build")
    flags = "-shared", "-fPIC", "-O1", "-o", folder / "libcuda.so.1"
    build("c++", "-std=c++17", *flags, HERE / "fake_libcuda.cpp")
    return user / "build" / "example"


@needs_cmake
def test_a_program_links_the_library_and_uses_a_gpu_where_there_is_one(example):
    done = run(example)
    assert done.returncode == 0 and done.stdout.startswith("2 spans: 0 0 1 1 and 0 1\n")
    assert "no GPU" in done.stdout or done.stdout.count("kl ") == 2


@needs_cmake
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_every_argument_arrives_at_the_driver(example, capability):
    folder = str(example.parents[2])
    done = run(example, LD_LIBRARY_PATH=folder, FAKE_CAPABILITY=str(capability))
    assert done.returncode == 0, done.stdout
    assert "launch 2 1 1 of 256 threads" in done.stdout and "scratch (nil) (nil)" in done.stdout
    assert done.stdout.count("kl ") == 2


@needs_cmake
def test_another_gpu_than_it_was_built_for_is_an_error(example):
    done = run(example, LD_LIBRARY_PATH=str(example.parents[2]), FAKE_CAPABILITY="120")
    assert "no GPU" in done.stdout  # REFLUX_NO_CODE


def test_every_function_is_declared_with_the_types_of_its_kernel():
    found = {v.name: v for v in _aot.variants()}
    assert len(found) == 31 and len(list(_aot.variants("span_sum"))) == 1
    text = _aot.header(list(found.values()))
    assert all(f"int reflux_{name}(" in text for name in found)
    stats = found["kl_stats_forward_bf16"].arguments
    assert list(stats) == "z u stats stride_z stride_u C V mul_z mul_u".split()
    assert [
        stats[n] for n in ("z", "stride_z", "V", "mul_u")
    ] == "void* int64_t int32_t float".split()
    assert "K" not in found["logprob_gradient_f32"].arguments  # one target a row


def test_nothing_of_that_name_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["_aot", "--out", str(tmp_path), "--only", "nothing"])
    with pytest.raises(SystemExit, match="no such kernel"):
        _aot.main()
