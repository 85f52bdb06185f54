"""What a run was made with and on: package versions, hardware, time and peak memory."""

from __future__ import annotations

import functools
import os
import platform
import sys
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "attnconvert",
    "torch",
    "transformers",
    "peft",
    "datasets",
    "tokenizers",
    "safetensors",
    "triton",
    "diffusers",
)


@functools.cache
def versions() -> dict[str, str | None]:
    """Installed versions by name, None where absent. Imports none of the packages."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def hardware() -> dict[str, Any]:
    """{"system", "cpu", "cores", "memory_bytes", "gpu": [names]}; GPUs only if this process already uses torch."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": _usable_cores(),
        "memory_bytes": _memory_bytes(),
        "gpu": _gpu_names(),
    }


@functools.cache
def number_type() -> str:
    """The number type to compute with here: bfloat16 on a GPU and on CPUs with instructions for it, else float32.

    Without such instructions a bf16 matrix product on a CPU takes about a hundred times as long as one in fp32
    (measured: 0.9 against 95 GFLOP/s on one AVX2 core). Imports nothing and wakes no GPU.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if not hidden and any(Path(name).exists() for name in ("/dev/nvidiactl", "/dev/kfd")):
        return "bfloat16"
    flags = next((line for line in _lines("/proc/cpuinfo") if line.lower().startswith(("flags", "features"))), "")
    return "bfloat16" if {"avx512_bf16", "amx_bf16", "bf16"} & set(flags.split()) else "float32"


class Meter:
    """Wall seconds and peak resident bytes from its creation on; on CUDA the peak of the GPU allocator too."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        # Linux forgets the old peak when asked; elsewhere the peak is that of the whole process so far.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        cuda = _cuda()
        if cuda is not None:
            for index in range(cuda.device_count()):
                cuda.reset_peak_memory_stats(index)

    def read(self) -> dict[str, float | int]:
        """{"seconds", "peak_memory_bytes"} and, where CUDA is in use, "peak_gpu_bytes" (the fullest GPU)."""
        found: dict[str, float | int] = {
            "seconds": round(time.monotonic() - self._start, 3),
            "peak_memory_bytes": _peak_bytes(),
        }
        cuda = _cuda()
        if cuda is not None:
            found["peak_gpu_bytes"] = max(cuda.max_memory_allocated(index) for index in range(cuda.device_count()))
        return found


def _peak_bytes() -> int:
    for line in _lines("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cpu_name() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.lower().startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    """Cores this process may run on, which in a container or a batch job are fewer than the machine has."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _gpu_names() -> list[str]:
    cuda = _cuda()
    return [] if cuda is None else [cuda.get_device_name(index) for index in range(cuda.device_count())]


def _cuda() -> Any:
    """torch.cuda if this process has it in use; looking must neither import torch nor wake a GPU."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    return cuda if cuda is not None and cuda.is_available() and cuda.is_initialized() else None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
