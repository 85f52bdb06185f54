"""What the launchers of mixed attention share: sizes, strides, lists, and the types in which is multiplied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .problem import Blocks, Ranges, Softmax, Varlen
from .triton_common import Variant


@dataclass(frozen=True)
class Tile:
    """Tokens of a program's own tile and of those it walks over, warps, pipeline stages."""

    own: int
    walk: int
    warps: int
    stages: int


def padded(dim: int) -> int:
    """The next power of two, at least what a matrix unit takes."""
    return max(16, triton.next_power_of_2(dim))


def divisor(number: int, most: int) -> int:
    """The largest power of two up to `most` that divides `number`."""
    return min(number & -number, most)


def dot_precision(dtype: torch.dtype) -> str:
    """fp32 stays fp32: a GPU would take tf32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def branch_type(*tensors: Tensor) -> tuple[Any, str]:
    """In what the linear branch multiplies: bf16 if all is bf16, else fp32, since features may exceed fp16."""
    if all(x.dtype == torch.bfloat16 for x in tensors):
        return tl.bfloat16, "tf32"
    exact = any(x.dtype == torch.float32 for x in tensors) or torch.version.hip is not None
    return tl.float32, "ieee" if exact else "tf32"


def strides(x: Tensor | None, count: int = 3) -> tuple[int, ...]:
    """Of the first axes; an axis of one token may have any, and 16 keeps them multiples of what a load takes."""
    if x is None:
        return (16,) * count
    return tuple(16 if x.shape[n] == 1 else x.stride(n) for n in range(count))


@dataclass(frozen=True)
class Lists:
    """Lists as the kernels take them; None and zeros where ranges say it all."""

    starts: Tensor | None = None
    counts: Tensor | None = None
    columns: Tensor | None = None
    kinds: Tensor | None = None
    patterns: Tensor | None = None
    stride_b: int = 0
    stride_h: int = 0
    block: tuple[int, int] = (1, 32)


def lists_of(where: Ranges | Blocks, transposed: bool = False) -> Lists:
    """By query block, or by key block where transposed."""
    if isinstance(where, Ranges):
        return Lists()
    given = (where.starts, where.counts, where.columns, where.kinds)
    if transposed:
        given = (where.t_starts, where.t_counts, where.t_columns, where.t_kinds)  # type: ignore[assignment]
    starts, counts, columns, kinds = given
    assert starts is not None
    assert counts is not None
    b, h, n = starts.shape
    return Lists(
        starts=starts.contiguous(),
        counts=counts.contiguous(),
        columns=columns.contiguous(),
        kinds=None if kinds is None else kinds.contiguous(),
        patterns=None if kinds is None or where.patterns is None else where.patterns.contiguous(),
        stride_b=h * n if b > 1 else 0,
        stride_h=n if h > 1 else 0,
        block=where.block,
    )


@dataclass(frozen=True)
class Sizes:
    """The numbers of a problem; rows and keys are those of the longest sequence."""

    count: int  # batch rows or packed sequences
    heads: int
    groups: int
    rows: int
    keys: int
    dim: int

    @property
    def per(self) -> int:
        """Query heads of a KV group."""
        return self.heads // self.groups


def sizes_of(p: Softmax) -> Sizes:
    """Read from the tensors, without a look at the device."""
    packed: Varlen | None = p.varlen
    return Sizes(
        count=p.q.shape[0] if packed is None else packed.cu_q.shape[0] - 1,
        heads=p.q.shape[1],
        groups=p.k.shape[1],
        rows=p.q.shape[2] if packed is None else packed.max_q,
        keys=p.k.shape[2] if packed is None else packed.max_k,
        dim=p.q.shape[3],
    )


def cumulative(p: Softmax) -> tuple[Tensor | None, Tensor | None]:
    """First rows and first keys of packed sequences."""
    return (None, None) if p.varlen is None else (p.varlen.cu_q, p.varlen.cu_k)


def bytes_of(mask: Tensor | None) -> Tensor | None:
    """A bool mask (B, K) as bytes, rows one after another."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


def feature_tile(features: Tensor | None) -> int:
    """Features that a kernel takes at once."""
    return 32 if features is None else min(32, max(16, triton.next_power_of_2(features.shape[3])))


def limits(arch: str) -> dict[str, int]:
    """Launch options: all registers that there are, or the assembler spills a few to fit more programs."""
    return {} if arch.startswith("gfx") else {"maxnreg": 255}


def describe(
    arch: str, name: str, function: Any, kind: str, constants: Mapping[str, Any], warps: int, stages: int, **types: str
) -> Variant:
    """A `Variant`: pointers to inputs are of type `kind`, the rest as POINTERS and `types` say, or i32.

    Optional tensors that `constants` does not set to None are there.
    """
    known = {**dict.fromkeys(INPUTS, f"*{kind}"), **POINTERS, **types}
    signature = {x: known.get(x, "i32") for x in function.arg_names if x not in constants}
    return Variant(name, function, signature, dict(constants), warps, stages, limits(arch))


INPUTS = ("q", "k", "v", "o", "do", "dq", "dk", "dv", "extra_k", "extra_v", "fq", "fk", "dfq", "dfk", "linear")
INPUTS += ("features", "values", "upstream")
SINGLE = (
    "lse",
    "delta",
    "gain",
    "offset",
    "weight",
    "z",
    "z_after",
    "den_out",
    "sink_logits",
    "out_z",
    "sums_z",
    "state_z",
    "state",
)
SINGLE += ("final", "den", "branch_dv", "part_k", "part_v")
WHOLE = ("window", "starts", "counts", "columns", "kinds", "patterns", "extra_at", "cu_q", "cu_k", "group_map")
POINTERS = {
    **dict.fromkeys(SINGLE, "*fp32"),
    **dict.fromkeys(WHOLE, "*i32"),
    **dict.fromkeys(("valid", "left"), "*u8"),
    **dict.fromkeys(("scale", "softcap"), "fp32"),
}
KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def branch_kind(arch: str, kind: str) -> tuple[Any, str, str]:
    """As `branch_type`, for a type by name on an architecture, and the type of the states that forward reads."""
    if kind == "bf16":
        return tl.bfloat16, "tf32", "*bf16"
    return tl.float32, "ieee" if kind == "fp32" or arch.startswith("gfx") else "tf32", "*fp32"
