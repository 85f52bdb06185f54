"""Sizes, tiles and dot precision of linear attention in Triton, and how its configurations are described."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .problem import Linear
from .triton_common import Variant, architecture


@dataclass(frozen=True)
class Tiles:
    """How the passes over segments and chunks are cut."""

    segment: int
    chunk: int
    bf: int
    bd: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Mode:
    """What the dots multiply: bf16, or fp32 (fp16 input too: sums of many keys leave its range)."""

    dtype: Any
    precision: str

    @property
    def half(self) -> bool:
        return bool(self.dtype == tl.bfloat16)


def mode(*tensors: Tensor) -> Mode:
    """tf32 holds an fp16 number exactly; AMD multiplies fp32 in its matrix units as it is."""
    dtypes = {x.dtype for x in tensors}
    if dtypes == {torch.bfloat16}:
        return Mode(tl.bfloat16, "ieee")
    exact = torch.float32 in dtypes or architecture().startswith("gfx")
    return Mode(tl.float32, "ieee" if exact else "tf32")


def carry_tiles(arch: str, features: int, dim: int) -> Tiles | None:
    """Of `_carry`, whose state must fit into registers; None where it does not."""
    if arch not in ("sm_90", "sm_100") or features > 128:
        return None
    bf, bd = 64 if features <= 64 else 128, 64 if dim <= 64 else 128
    return Tiles(segment=512, chunk=64, bf=bf, bd=bd, warps=8, stages=2)


def reduce_tiles(arch: str, m: Mode) -> Tiles:
    """Of `_sums` where a segment is long."""
    if m.half:
        return Tiles(segment=512, chunk=64, bf=64, bd=64, warps=4, stages=2)
    return Tiles(segment=512, chunk=32, bf=32, bd=32, warps=8 if m.precision == "ieee" else 4, stages=1)


def chunk_tiles(arch: str, m: Mode) -> Tiles:
    """Of the passes that take one chunk as a segment."""
    if m.half:
        small = arch.startswith("gfx")
        return Tiles(segment=128, chunk=128, bf=32 if small else 64, bd=64, warps=8, stages=1 if small else 2)
    return Tiles(segment=64, chunk=64, bf=32, bd=32, warps=8, stages=1)


@dataclass(frozen=True)
class Plan:
    """Sizes of a call. `count` sequences, each of at most `rows` rows and `keys` keys."""

    count: int
    heads: int
    groups: int
    rows: int
    keys: int
    features: int
    dim: int

    @property
    def group(self) -> int:
        return self.heads // self.groups


def plan(p: Linear) -> Plan:
    packed = p.varlen
    return Plan(
        count=p.fq.shape[0] if packed is None else packed.cu_q.numel() - 1,
        heads=p.fq.shape[1],
        groups=p.fk.shape[1],
        rows=p.fq.shape[2] if packed is None else packed.max_q,
        keys=p.fk.shape[2] if packed is None else packed.max_k,
        features=p.fq.shape[3],
        dim=p.v.shape[3],
    )


def registers(arch: str) -> dict[str, Any]:
    """All that a thread may have: left alone, ptxas saves them in large kernels, and spills."""
    return {} if arch.startswith("gfx") else {"maxnreg": 255}


def describe(
    name: str,
    function: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    warps: int,
    stages: int,
    options: dict[str, Any] | None = None,
) -> Variant:
    """A `Variant` whose arguments are of these types, all others i32 unless they are constants."""
    signature = {x: types.get(x, "i32") for x in function.arg_names if x not in constants}
    return Variant(name, function, signature, constants, warps, stages, options or {})


def modes(arch: str) -> dict[str, Mode]:
    """What `mode` finds on that chip, by the type of the tensors."""
    precision = "ieee" if arch.startswith("gfx") else "tf32"
    return {"bf16": Mode(tl.bfloat16, "ieee"), "fp16": Mode(tl.float32, precision), "fp32": Mode(tl.float32, "ieee")}


def types(name: str, *fp32: str) -> dict[str, str]:
    """Argument types of the kernels for tensors of type `name`."""
    tensors = ("x", "y", "q", "k", "v", "o", "do", "dq", "dk", "dv")
    floats = ("sums", "out", "den", "weight", "delta", "state", "final", *fp32)
    return {
        **dict.fromkeys(tensors, f"*{name}"),
        **dict.fromkeys(floats, "*fp32"),
        **dict.fromkeys(("cu", "cu_q", "cu_k"), "*i32"),
    }
