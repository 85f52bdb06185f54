"""Which tiles a program of mixed attention walks over, and which pairs it masks.

A program owns a tile of rows (or of keys) and walks over tiles of the other side. With ranges the walk is a run of
masked tiles, a run of tiles that every row sees whole, and masked tiles again; with lists the entries that reach past
the end or the diagonal are the last ones, since columns ascend. Only these few tiles compute a mask.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from .triton_mixed_tiles import FAR, HOLE


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
def pattern_bits(patterns, kind, row, first, lane, BQ: tl.constexpr, BK: tl.constexpr, ACROSS: tl.constexpr):
    """(rows, keys), or ACROSS (keys, rows): which keys first + lane of a block its rows `row` attend to.

    One word is read per row and 32 keys.
    """
    words: tl.constexpr = BK // 32
    near: tl.constexpr = 0 if ACROSS else 1  # the axis to add to what belongs to rows
    base = patterns + kind.to(tl.int64) * (BQ * words) + (row * words + first // 32)
    key = tl.expand_dims(lane, 1 - near)
    word = tl.expand_dims(tl.load(base), near) + key * 0
    if lane.shape[0] > 32:
        word = tl.where(key < 32, word, tl.expand_dims(tl.load(base + 1), near))
    if lane.shape[0] > 64:
        word = tl.where(key < 64, word, tl.expand_dims(tl.load(base + 2), near))
        word = tl.where(key < 96, word, tl.expand_dims(tl.load(base + 3), near))
    return ((word >> ((first + key) % 32)) & 1) != 0
