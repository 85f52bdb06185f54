"""What the Triton kernels share: which chip they run on, and how a shipped configuration is described.

Every `triton_*.py` has `variants(arch)`, which yields each configuration that its launchers can choose on that chip.
The ahead-of-time gate compiles them all, so what is launched is what was checked. What takes no more registers and no
more shared memory than another configuration is not listed beside it: each `variants` says what stands for what.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
SHARED = {
    "sm_80": 166912,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "gfx942": 65536,
}  # bytes a program may use


@dataclass(frozen=True)
class Variant:
    """One compiled kernel: the function, its argument types (`*bf16`, `i32`, …), its constants and launch options."""

    name: str
    function: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int
    stages: int
    options: Mapping[str, Any] = field(default_factory=dict)


T = TypeVar("T")


def widest(tiles: Mapping[int, Iterable[T]]) -> list[tuple[int, T]]:
    """Each of the tiles that head dimensions take, beside the largest dimension that takes it: it needs the most."""
    found = {tile: dim for dim in sorted(tiles) for tile in tiles[dim]}
    return [(dim, tile) for tile, dim in found.items()]


def interpreted() -> bool:
    """Whether Triton runs kernels in Python, on CPU tensors: a check of correctness, never of speed."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def architecture(device: int = 0) -> str:
    """The architecture whose configurations a device takes; the interpreter takes those of sm_80."""
    if not torch.cuda.is_available():
        return "sm_80"
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 10:
        return "sm_100"
    if major == 9:
        return "sm_90"
    return "sm_80" if minor == 0 else "sm_89"
