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


@triton.jit
def places(base, first, stride, token):
    """Where tokens first + token begin, (tokens, 1)."""
    return base + first * stride.to(tl.int64) + token[:, None] * stride


@triton.jit
def products(x, x_at, x_live, y, y_at, y_live, column, COLUMNS: tl.constexpr, PRECISION: tl.constexpr):
    """x · yᵀ of two tiles. Without matrix units, that is in fp32, a thread needs whole rows of both, more than it has
    registers: 64 columns at a time are read from where the live tokens lie, and x and y are not used at all."""
    if PRECISION == "ieee":
        part: tl.constexpr = 64 if column.shape[0] > 64 else column.shape[0]
        lane = tl.arange(0, part)
        s = tl.zeros((x_at.shape[0], y_at.shape[0]), tl.float32)
        for c in range(0, COLUMNS, part):
            live = (c + lane < COLUMNS)[None, :]
            x_part = tl.load(x_at + (c + lane)[None, :], mask=x_live[:, None] & live, other=0.0)
            y_part = tl.load(y_at + (c + lane)[None, :], mask=y_live[:, None] & live, other=0.0)
            s = tl.dot(x_part, tl.trans(y_part), s, input_precision=PRECISION)
    else:
        s = tl.dot(x, tl.trans(y), input_precision=PRECISION)
    return s
