"""What the mixed-attention kernels share: where rows and keys lie, masks, logits, and the tiles of each chip.

A program owns a tile of rows (or of keys) and walks over tiles of the other side. With ranges the walk is a run of
masked tiles, a run of tiles that every row sees whole, and masked tiles again; with lists the entries that reach past
the end or the diagonal are the last ones, since columns ascend. Only these few tiles compute a mask.
"""
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .problem import EMPTY, Blocks, Ranges, Softmax, Varlen

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FAR = tl.constexpr(2**30)  # a window without a limit: no distance reaches it
HOLE = tl.constexpr(EMPTY)
INF = tl.constexpr(float("inf"))


# ---------------------------------------------------------------------------------------------------------- in kernels


@triton.jit
def sequence(cu, n, length):
    """First token and number of tokens of packed sequence n, or 0 and `length` where nothing is packed."""
    first = tl.zeros((), tl.int64)
    count = length
    if cu is not None:
        begin = tl.load(cu + n)
        count = tl.load(cu + n + 1) - begin
        first += begin
    return first, count


@triton.jit
def window_of(window, g):
    """The window of KV group g, FAR where it has no limit."""
    w = tl.load(window + g)
    return tl.where(w < 0, FAR, w)


@triton.jit
def tile(base, first, stride, token, column, stop, COLUMNS: tl.constexpr, MASKED: tl.constexpr):
    """Tokens first + token (those below `stop` where MASKED) × columns; zero elsewhere."""
    at = base + first * stride.to(tl.int64) + (token[:, None] * stride + column[None, :])
    padded: tl.constexpr = column.shape[0] != COLUMNS
    if MASKED:
        live = (first + token < stop)[:, None]
        if padded:
            live = live & (column < COLUMNS)[None, :]
        return tl.load(at, mask=live, other=0.0)
    elif padded:
        return tl.load(at, mask=(column < COLUMNS)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def alive_tile(base, first, stride, token, column, alive, COLUMNS: tl.constexpr):
    """Like `tile`, of the tokens that `alive` names."""
    at = base + first * stride.to(tl.int64) + (token[:, None] * stride + column[None, :])
    return tl.load(at, mask=alive[:, None] & (column < COLUMNS)[None, :], other=0.0)


@triton.jit
def softcapped(s, softcap):
    """softcap · tanh(s / softcap)"""
    return softcap * (1.0 - 2.0 / (tl.exp2(s * (2.0 * LOG2E / softcap)) + 1.0))


@triton.jit
def key_runs(i0, i1, w, keys, CAUSAL: tl.constexpr, BN: tl.constexpr):
    """The keys that rows at positions i0 … i1 see: where tiles start, the run that all see whole, where they stop."""
    start = tl.maximum(i0 - w + 1, 0) // BN * BN
    whole = tl.cdiv(tl.maximum(i1 - w + 1, 0), BN) * BN
    if CAUSAL:
        stop = tl.minimum(keys, i1 + 1)
        last = tl.minimum(keys, i0 + 1)
    else:
        stop = tl.minimum(keys, i1 + w)
        last = tl.minimum(keys, i0 + w)
    stop = tl.where(w == 0, start, stop)
    last = tl.maximum(tl.minimum(last, stop), 0) // BN * BN
    left = tl.cdiv(tl.maximum(tl.minimum(whole, stop) - start, 0), BN)  # masked tiles before the run
    resume = tl.maximum(whole, last)
    right = tl.cdiv(tl.maximum(stop - resume, 0), BN)  # and after it
    return start, left, whole, tl.maximum(last, whole), resume, left + right


@triton.jit
def row_runs(j0, j1, w, rows, shift, CAUSAL: tl.constexpr, BM: tl.constexpr):
    """As `key_runs`, the rows that see keys j0 … j1; row r stands at r + shift."""
    if CAUSAL:
        start = tl.maximum(j0 - shift, 0) // BM * BM
        whole = tl.cdiv(tl.maximum(j1 - shift, 0), BM) * BM
    else:
        start = tl.maximum(j0 - w + 1 - shift, 0) // BM * BM
        whole = tl.cdiv(tl.maximum(j1 - w + 1 - shift, 0), BM) * BM
    stop = tl.minimum(rows, j1 + w - shift)
    last = tl.minimum(rows, j0 + w - shift)
    stop = tl.where(w == 0, start, stop)
    last = tl.maximum(tl.minimum(last, stop), 0) // BM * BM
    left = tl.cdiv(tl.maximum(tl.minimum(whole, stop) - start, 0), BM)
    resume = tl.maximum(whole, last)
    right = tl.cdiv(tl.maximum(stop - resume, 0), BM)
    return start, left, whole, tl.maximum(last, whole), resume, left + right


@triton.jit
def near(i, j, w, CAUSAL: tl.constexpr):
    """Which keys at j are within the window of rows at i."""
    if CAUSAL:
        return (j <= i) & (i - j < w)
    else:
        return (i - j < w) & (j - i < w)


@triton.jit
def beyond(i, at, w, CAUSAL: tl.constexpr):
    """Which further keys standing at `at` are out of the window of rows at i."""
    far = at <= i - w
    if not CAUSAL:
        far = far | (at >= i + w)
    return far & (at != HOLE) & (w < FAR)


@triton.jit
def whole_entries(columns, begin, count, limit, BK: tl.constexpr):
    """How many entries of a list name blocks that end at or before `limit`: all but some of the last."""
    more = count > 0
    while more:
        more = (tl.load(columns + begin + count - 1) + 1) * BK > limit
        count = tl.where(more, count - 1, count)
        more = more & (count > 0)
    return count


@triton.jit
def early_entries(columns, begin, count, limit, BQ: tl.constexpr):
    """How many entries at the beginning of a transposed list name query blocks that start before row `limit`."""
    n = count * 0
    more = count > 0
    while more:
        more = tl.load(columns + begin + n) * BQ < limit
        n = tl.where(more, n + 1, n)
        more = more & (n < count)
    return n


@triton.jit
def pattern_bits(patterns, kind, row, column, BQ: tl.constexpr, BK: tl.constexpr):
    """Which keys `column` of a block its rows `row` attend to; the two broadcast against each other."""
    words: tl.constexpr = BK // 32
    word = tl.load(patterns + kind.to(tl.int64) * (BQ * words) + row * words + column // 32)
    return ((word >> (column % 32)) & 1) != 0


# --------------------------------------------------------------------------------------------------------- on the host


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
