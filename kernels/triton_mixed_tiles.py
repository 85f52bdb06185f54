"""Where the tokens of a program lie and how its tiles are read, for the mixed-attention kernels."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from .problem import EMPTY

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FAR = tl.constexpr(2**30)  # a window without a limit: no distance reaches it
HOLE = tl.constexpr(EMPTY)
INF = tl.constexpr(float("inf"))


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
    if padded:
        return tl.load(at, mask=(column < COLUMNS)[None, :], other=0.0)
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
