"""What the launchers of mixed attention share: sizes, strides, lists, and the types in which is multiplied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .problem import Blocks, Ranges, Softmax, Varlen


def dot_precision(dtype: torch.dtype) -> str:
    """fp32 stays fp32: a GPU would take tf32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def branch_type(*tensors: Tensor) -> tuple[Any, str]:
    """In what the linear branch multiplies: bf16 if all is bf16, else fp32, since features may exceed fp16."""
    if all(x.dtype == torch.bfloat16 for x in tensors):
        return tl.bfloat16, "tf32"
    exact = any(x.dtype == torch.float32 for x in tensors) or torch.version.hip is not None
    return tl.float32, "ieee" if exact else "tf32"


def like(x: Tensor, zero: bool = False) -> Tensor:
    """An empty (or `zero`) tensor in the layout of x, its last axis contiguous even where x is expanded."""
    y = torch.empty_like(x)
    y = y if y.stride(-1) == 1 else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y.zero_() if zero else y


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
