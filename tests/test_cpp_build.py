"""How the C++ kernels are built and loaded, and what they say where they cannot be."""

import ctypes
import dataclasses
import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import kernel_cases as cases
import pytest
import torch

from attnconvert.kernels import backend_cpp as backend
from attnconvert.kernels import cpp_build

if backend.unavailable():
    pytest.skip(backend.unavailable(), allow_module_level=True)


def test_only_the_openmp_runtime_of_torch_is_loaded(seed):
    code = (
        "import torch; from pathlib import Path; from attnconvert.kernels import backend_cpp as b\n"
        "torch.ones(300, 300) @ torch.ones(300, 300); b.features(torch.ones(1, 1, 8, 8), 'relu', ())\n"
        "maps = Path('/proc/self/maps').read_text().splitlines()\n"
        "names = ('libgomp', 'libomp', 'libiomp')\n"
        "print(len({x.split()[-1] for x in maps if any(n in x for n in names)}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "1\n"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("CXX", "/nonexistent/c++", "CXX is '/nonexistent/c++', and there is no such program"),
        ("ATTNCONVERT_ISA", "sse9", "ATTNCONVERT_ISA is 'sse9': expected one of avx512bf16, avx2"),
        ("ATTNCONVERT_CXXFLAGS", "-fno-such-flag", "failed to build the C++ kernels"),
    ],
)
def test_what_keeps_the_kernels_from_running_is_said(monkeypatch, tmp_path, name, value, said):
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert said in backend.unavailable()
    assert list(tmp_path.rglob("*.so")) == []
    with pytest.raises(RuntimeError, match="C\\+\\+|CXX|ISA"):
        backend.features(torch.ones(1, 1, 8, 8), "relu", ())


def test_without_a_compiler_the_reason_names_what_was_looked_for(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cpp_build.compiler() == (
        [],
        "no C++ compiler: looked for g++, clang++, c++ on the path; install one or set CXX to it",
    )


def test_without_avx2_the_reason_names_what_the_machine_lacks(monkeypatch):
    monkeypatch.delenv("ATTNCONVERT_ISA", raising=False)
    monkeypatch.setattr(cpp_build, "machine", lambda: {"sse2", "fma"})
    level, reason = cpp_build.instruction_set()
    assert level is None
    assert reason == "the C++ kernels need an x86 CPU with AVX2, FMA and F16C; this one lacks avx2, f16c"


def test_the_library_for_avx512_compiles(request):
    flags = [*cpp_build.COMMON, *cpp_build.LEVELS["avx512bf16"][0], "-DATTNCONVERT_AVX512", "-O0"]
    (command, _), texts = cpp_build.compiler(), cpp_build.sources()
    name = hashlib.sha256(repr((texts, command, flags)).encode()).hexdigest()[:20]
    target = request.config.cache.mkdir("attnconvert-cpp") / f"{name}.so"  # the same source need not compile again
    if not target.exists():
        assert cpp_build.build(texts, command, flags, cpp_build.openmp(), target) is None
    assert target.stat().st_size > 0


def test_builds_at_the_same_time_leave_one_whole_library(tmp_path):
    command, _ = cpp_build.compiler()
    texts = {"one.cpp": 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }'}
    target = tmp_path / "kernels.so"
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: cpp_build.build(texts, command, [*cpp_build.COMMON], None, target), range(4)))
    assert found == [None] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["kernels.so"]
    assert ctypes.CDLL(str(target)).answer() == 42


def test_what_cannot_run_is_refused_with_a_reason(seed):
    rng = cases.generator(seed)
    p = cases.softmax_case(rng, rows=8)
    assert backend.refuses("mixed_forward", (p, None)) is None
    assert "q is torch.float64" in backend.refuses("mixed_forward", (cases.double(p), None))
    mixed = dataclasses.replace(p, k=p.k.bfloat16())
    assert "different dtypes" in backend.refuses("mixed_forward", (mixed, None))
    weights = cases.feature_weights(rng, "poly", 2, 16)
    assert "poly" in backend.refuses("features", (torch.ones(1, 2, 4, 16), "poly", weights))


def test_the_inner_loop_has_a_measurable_peak():
    assert backend.peak_gflops(threads=1, seconds=0.02) > 1
