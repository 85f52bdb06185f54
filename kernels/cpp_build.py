"""Builds the C++ kernels with the user's compiler on first use, keeps the library in the cache folder and loads it.

The source knows nothing of torch: a plain C ABI, called through ctypes. Environment variables:
    CXX                    the compiler (default: the first of g++, clang++, c++ on the path)
    ATTNCONVERT_ISA        the instruction set, avx512bf16 or avx2 (default: the best that the machine has)
    ATTNCONVERT_CXXFLAGS   further flags
    XDG_CACHE_HOME         where the cache folder is (default: ~/.cache)
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

COMPILERS = ("g++", "clang++", "c++")
COMMON = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fno-math-errno", "-fvisibility=hidden")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
# the flags of a compiler that the instruction set takes, and what /proc/cpuinfo calls it; the best first
LEVELS = {
    "avx512bf16": (
        (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"),
        {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"},
    ),
    "avx2": (AVX2, {"avx2", "fma", "f16c"}),
}
EMULATED = "-DATTNCONVERT_EMULATED"  # among the flags: tests bring the intrinsics of AVX-512 as plain C++

_lock = threading.Lock()
_loaded: dict[tuple[str | None, ...], ctypes.CDLL | str] = {}


def library() -> ctypes.CDLL | str:
    """The loaded kernels, or the reason why there are none."""
    names = ("CXX", "ATTNCONVERT_ISA", "ATTNCONVERT_CXXFLAGS", "XDG_CACHE_HOME")
    key = tuple(os.environ.get(name) for name in names)
    found = _loaded.get(key)
    if found is None:
        with _lock:
            found = _loaded.get(key)
            if found is None:
                found = _loaded[key] = _open()
    return found


def sources() -> dict[str, str]:
    """The C++ files by name: from the folder beside this file, or the module that stands for it in a checkpoint."""
    folder = Path(__file__).parent / "cpp"
    if not folder.is_dir():
        files: dict[str, str] = importlib.import_module(__name__.replace("cpp_build", "cpp_sources")).FILES
        return files
    paths = [path for path in sorted(folder.iterdir()) if path.suffix in (".h", ".cpp")]
    return {path.name: path.read_text(encoding="utf-8") for path in paths}


def instruction_set() -> tuple[str | None, str]:
    """The level to build for, or None and why not."""
    wanted, flags = os.environ.get("ATTNCONVERT_ISA"), machine()
    if wanted is not None:
        if wanted not in LEVELS:
            return None, f"ATTNCONVERT_ISA is {wanted!r}: expected one of {', '.join(LEVELS)}"
        missing = LEVELS[wanted][1] - flags
        if missing and EMULATED not in os.environ.get("ATTNCONVERT_CXXFLAGS", ""):
            return None, f"ATTNCONVERT_ISA asks for {wanted}, but this machine lacks {', '.join(sorted(missing))}"
        return wanted, ""
    for name, (_, needed) in LEVELS.items():
        if needed <= flags:
            return name, ""
    missing = LEVELS["avx2"][1] - flags
    return None, f"the C++ kernels need an x86 CPU with AVX2, FMA and F16C; this one lacks {', '.join(sorted(missing))}"


def machine() -> set[str]:
    """What the CPU can do, in the words of /proc/cpuinfo; nothing where that cannot be read."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return set()
    for line in text.splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def compiler() -> tuple[list[str], str]:
    """The command of the compiler, or an empty one and what was looked for."""
    asked = shlex.split(os.environ.get("CXX", ""))
    if asked:
        path = shutil.which(asked[0])
        missing = f"CXX is {asked[0]!r}, and there is no such program; set CXX to a C++17 compiler"
        return ([path, *asked[1:]], "") if path else ([], missing)
    for name in COMPILERS:
        if path := shutil.which(name):
            return [path], ""
    return [], f"no C++ compiler: looked for {', '.join(COMPILERS)} on the path; install one or set CXX to it"


def openmp() -> str | None:
    """The OpenMP runtime that torch has in this process, if it is GNU's.

    A second one would bring threads of its own that fight with those of torch over the cores.
    """
    import torch

    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        maps = ""
    files = [line.split(maxsplit=5)[5] for line in maps.splitlines() if "libgomp" in line]
    beside = sorted(str(path) for path in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return next((path for path in [*files, *beside] if Path(path).exists()), None)


def cache() -> Path:
    """Where built libraries are kept; a folder of this process where that cannot be written."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(base) / "attnconvert" / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="attnconvert-"))


def _open() -> ctypes.CDLL | str:
    level, reason = instruction_set()
    if level is None:
        return reason
    command, reason = compiler()
    if not command:
        return reason
    extra = shlex.split(os.environ.get("ATTNCONVERT_CXXFLAGS", ""))
    flags = [*COMMON, *(LEVELS["avx2" if EMULATED in extra else level][0]), *extra]
    if level == "avx512bf16":
        flags.append("-DATTNCONVERT_AVX512")
    try:
        version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout
        texts, runtime = sources(), openmp()
        included = [Path(x).read_text(encoding="utf-8") for x in extra if x.endswith(".h")]
        what = repr((texts, included, flags, command, version, runtime))
        target = cache() / f"{level}-{hashlib.sha256(what.encode()).hexdigest()[:20]}.so"
        if not target.exists():
            failure = build(texts, command, flags, runtime, target)
            if failure:
                return failure
        return ctypes.CDLL(str(target))
    except OSError as error:
        return f"the C++ kernels could not be built or loaded: {error}"


def build(texts: dict[str, str], command: list[str], flags: list[str], runtime: str | None, target: Path) -> str | None:
    """Compiles into `target`, which appears whole or not at all. The end of the compiler's words where it fails."""
    with tempfile.TemporaryDirectory(prefix="attnconvert-") as name:
        folder = Path(name)
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8")
        units = [file for file in texts if file.endswith(".cpp")]

        def run(*arguments: str) -> str | None:
            result = subprocess.run([*command, *arguments], cwd=folder, capture_output=True, text=True, check=False)
            lines = (result.stderr or result.stdout).strip().splitlines()[-12:]
            said = "\n".join(lines) or f"exit status {result.returncode}"
            return None if result.returncode == 0 else f"{shlex.join(command)} failed to build the C++ kernels:\n{said}"

        with ThreadPoolExecutor(max(1, min(len(units), os.cpu_count() or 1))) as pool:
            failures = [x for x in pool.map(lambda file: run(*flags, "-c", file, "-o", f"{file}.o"), units) if x]
        if failures:
            return failures[0]
        # torch's runtime comes first, and with it nothing is left for the compiler's own to supply
        first = [runtime] if runtime else []
        objects = [f"{file}.o" for file in units]
        failure = run("-shared", *objects, *first, "-Wl,--as-needed", "-fopenmp", "-o", "kernels.so")
        if failure:
            return failure
        # the rename must stay within one file system, and two processes may be here at once
        handle, beside = tempfile.mkstemp(dir=target.parent, suffix=".part")
        os.close(handle)
        shutil.copyfile(folder / "kernels.so", beside)
        os.replace(beside, target)
    return None
