"""A window that grows with the position: softmax over the last size + growth · i tokens and the first real ones.

Row i counts from the first real token of its sequence, so padding changes nothing. The window grows in steps of STEP
tokens; between two steps it is one launch over the keys that its rows can reach. What is kept between calls is what a
later row may still read: its first key, i − size − growth · i, never moves back by more than a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import ops, window
from .call import Call, Cost, Shape, dense
from .problem import EMPTY, Extra, Part
from .spec import STEP, Span, Window
from .window import find_sinks, sink_positions


@dataclass
class SpanState:
    """The last tokens k, v (B, Hk, n + sinks, D), the sinks after them; `sink_at` (B, sinks), −1 = not yet there."""

    k: Tensor
    v: Tensor
    sink_at: Tensor


def parameters(spec: Span, heads: int, kv_heads: int, dim: int) -> nn.Module | None:
    """A span adds nothing to learn."""
    return None


def width(spec: Span, position: int, limit: int | None = None) -> int:
    """The window of the row this far behind its first real token, or the model's own where that is smaller."""
    return spec.width(position) if limit is None else min(spec.width(position), limit)


def held(spec: Span, length: int) -> int:
    """How many of `length` tokens later rows may read."""
    return min(length, spec.size + math.ceil(spec.growth * length) + 1)


def starts(call: Call, batch: int, length: int) -> list[int]:
    """By batch row the position of the first real token, `length` where there is none."""
    if call.valid is None:
        return [0] * batch
    valid = call.valid[:, :length]
    if torch.compiler.is_compiling():
        raise ValueError("spans and blocks read where padding ends, which a compiled graph cannot: pass no mask")
    found: list[int] = torch.where(valid.any(1), valid.long().argmax(1), length).tolist()
    return found


def reference(spec: Span, q: Tensor, k: Tensor, v: Tensor, call: Call, learned: nn.Module | None = None) -> Tensor:
    """The definition, dense: q (B, H, S, D), k, v (B, Hk, S, D), no state. → (B, H, S, D)"""
    batch, length = q.shape[0], q.shape[2]
    i = torch.arange(length, device=q.device)
    both = zip(starts(call, batch, length), _counts(call, batch, length), strict=True)
    sizes = torch.tensor([_row_widths(spec, call, start, tokens, length) for start, tokens in both])
    distance = i[:, None] - i
    reached = call.reach(distance)
    is_sink = (sink_positions(call, batch, length, spec.sinks, q.device)[:, :, None] == i).any(1)  # (B, S)
    near = distance.abs() < sizes.to(q.device)[:, :, None]  # (B, S, S)
    allowed = reached & (near | is_sink[:, None])
    if call.valid is not None:
        allowed = allowed & call.valid[:, None, :length]
    return dense(q, k, v, call, allowed[:, None, None])


def _row_widths(spec: Span, call: Call, start: int, tokens: int, length: int) -> list[int]:
    """The window of every row of a sequence with so many real tokens."""
    return [width(spec, i - start if call.causal else tokens, call.limit) for i in range(length)]


def _counts(call: Call, batch: int, length: int) -> list[int]:
    """Real tokens by batch row, which only a call that is not causal asks for."""
    if call.valid is None or call.causal:
        return [length] * batch
    counts: list[int] = call.valid[:, :length].sum(1).tolist()
    return counts


def attend(
    spec: Span, q: Tensor, k: Tensor, v: Tensor, call: Call, state: object = None, learned: nn.Module | None = None
) -> tuple[Tensor, SpanState | None]:
    """The new tokens attend to their windows and the sinks. → (B, H, Q, D), state; None where not causal"""
    old = state if isinstance(state, SpanState) else None
    count = 0 if old is None else old.k.shape[2] - spec.sinks
    before = None if old is None else (old.k[:, :, count:], old.v[:, :, count:])
    sinks = find_sinks(k, v, call, before, spec.sinks)
    if old is not None:
        k, v = (torch.cat([past[:, :, :count], new], 2) for past, new in ((old.k, k), (old.v, v)))
    first, total = call.seen - count, call.seen + q.shape[2]
    counts = _counts(call, q.shape[0], total)
    alike: dict[tuple[tuple[int, int, int], ...], list[int]] = {}  # sequences with the same windows share launches
    for row, start in enumerate(starts(call, q.shape[0], total)):
        alike.setdefault(tuple(_segments(spec, call, start, counts[row], total)), []).append(row)
    parts = []
    for segments, rows in alike.items():
        at = slice(None) if len(rows) == q.shape[0] else torch.tensor(rows, device=q.device)
        pieces = [_piece(q, k, v, call, sinks, at, begin, end, size, first) for begin, end, size in segments]
        parts.append(torch.cat(pieces, 2))
    order = torch.tensor([row for rows in alike.values() for row in rows], device=q.device).argsort()
    o = parts[0] if len(parts) == 1 else torch.cat(parts).index_select(0, order)
    if not call.keep or not call.causal:
        return o, None
    keep = held(spec, total)
    kept = [
        torch.cat([x[:, :, x.shape[2] - keep :], sink.to(x.dtype)], 2) for x, sink in ((k, sinks[0]), (v, sinks[1]))
    ]
    return o, SpanState(kept[0], kept[1], sinks[2])


def _segments(spec: Span, call: Call, start: int, tokens: int, total: int) -> Iterator[tuple[int, int, int]]:
    """(first row, its end, window) of the new rows whose window is the same."""
    if not call.causal:
        yield call.seen, total, width(spec, tokens, call.limit)
        return
    row = call.seen
    while row < total:
        size = width(spec, row - start, call.limit)
        end = start + math.ceil((spec.steps(row - start) + 1) * STEP / spec.growth)
        while width(spec, end - 1 - start, call.limit) > size:  # rounding, one token either way
            end -= 1
        end = total if call.limit is not None and size >= call.limit else min(max(end, row + 1), total)
        yield row, end, size
        row = end


def _piece(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    sinks: tuple[Tensor, Tensor, Tensor],
    at: slice | Tensor,
    begin: int,
    end: int,
    size: int,
    first: int,
) -> Tensor:
    """Rows [begin, end) of the sequences `at`, whose window is `size`; `first` is the position of the first key."""
    low = max(first, begin - size + 1) if call.causal else first
    new, old = slice(begin - call.seen, end - call.seen), slice(low - first, end - first)
    sink_k, sink_v, where = (x[at] for x in sinks)
    shifted = torch.where(where >= 0, where - low, EMPTY)[:, None].expand(-1, k.shape[1], -1).int().contiguous()
    return ops.mixed_attention(
        q[at, :, new],
        k[at, :, old],
        v[at, :, old],
        ops.ranges([size] * k.shape[1], q.device),
        causal=call.causal,
        scale=call.scale,
        valid=None if call.valid is None else call.valid[at, low:end],
        extra=Extra(k=sink_k, v=sink_v, at=shifted) if where.shape[1] else None,
        softcap=call.softcap or 0.0,
        sink_logits=call.sink_logits,
    ).o


def fixed(spec: Span, state: object, length: int, room: int | None) -> SpanState:
    """The state after `length` tokens as a ring of what rows below `room` may read: token p is in slot p % its size."""
    assert isinstance(state, SpanState)
    if room is None:
        raise ValueError("a span needs a static cache that says for how many tokens it is")
    size, count = held(spec, room), state.k.shape[2] - spec.sinks
    slot = torch.arange(length - count, length, device=state.k.device) % size
    rings = []
    for x in (state.k, state.v):
        empty = x.new_zeros(*x.shape[:2], size, x.shape[3])
        rings.append(torch.cat([empty.index_copy(2, slot, x[:, :, :count]), x[:, :, count:]], 2))
    return SpanState(rings[0], rings[1], state.sink_at.clone())


def moving(spec: Span, state: object, length: int) -> SpanState:
    """The inverse."""
    assert isinstance(state, SpanState)
    size = state.k.shape[2] - spec.sinks
    order = torch.arange(length - held(spec, length), length, device=state.k.device) % size
    k, v = (torch.cat([x.index_select(2, order), x[:, :, size:]], 2) for x in (state.k, state.v))
    return SpanState(k, v, state.sink_at)


def fixed_step(
    spec: Span, q: Tensor, k: Tensor, v: Tensor, call: Call, state: object, learned: nn.Module | None = None
) -> tuple[Part, SpanState]:
    """One new token at `call.at`: written into the ring, of which it reads what its window reaches."""
    assert isinstance(state, SpanState)
    assert call.at is not None
    size, at = state.k.shape[2] - spec.sinks, call.at
    state.k.index_copy_(2, at % size, k)
    state.v.index_copy_(2, at % size, v)
    there = at - (at - torch.arange(size, device=k.device)) % size  # (R,): the position that each slot holds
    start, real = torch.zeros_like(at)[:, None], (there >= 0)[None]  # (1 or B, 1), (1 or B, R)
    now = torch.ones_like(state.k[:, 0, :1, 0], dtype=torch.bool)
    if call.valid is not None:
        start = call.valid.long().argmax(1, keepdim=True)
        real = real & call.valid.index_select(1, there.clamp(min=0))
        now = call.valid.index_select(1, at)
    window.add_sink(state, k, v, at, now)
    behind = (at - start).clamp(min=0)
    reach = spec.size + (behind.double() * spec.growth).long() // STEP * STEP  # as `Span.width` counts
    reach = reach if call.limit is None else reach.clamp(max=call.limit)
    near = (real & (at - there < reach)).expand(k.shape[0], -1)
    mask = torch.cat([near, (state.sink_at >= 0) & (state.sink_at <= at - reach)], 1)
    return Part(first=0, k=state.k, v=state.v, used=state.k.shape[2], mask=mask), state


def prefill_cost(spec: Span, shape: Shape, length: int) -> Cost:
    """Of `length` tokens at once: the pairs of the definition; sinks count once they have left the window."""
    if not shape.causal:  # one window for all rows
        return window.prefill_cost(Window(size=width(spec, length), sinks=spec.sinks), shape, length)
    pairs = sum(_pairs(spec, *segment) for segment in _segments(spec, Call(scale=1.0), 0, length, length))
    io = (2 * shape.queries + 2) * length * shape.dim * shape.element
    return Cost(flops=4.0 * pairs * shape.queries * shape.dim, bytes=io, state_bytes=state_size(spec, shape, length))


def _pairs(spec: Span, begin: int, end: int, size: int) -> int:
    """Of the rows [begin, end) with their keys."""
    short = min(max(size - begin, 0), end - begin)  # rows that reach the beginning
    near = short * begin + short * (short + 1) // 2 + (end - begin - short) * size
    return near + sum(max(0, end - max(begin, size + sink)) for sink in range(spec.sinks))


def decode_cost(spec: Span, shape: Shape, length: int) -> Cost:
    """Of one token after `length - 1`."""
    size = width(spec, length - 1)
    keys = min(length, size) + min(spec.sinks, max(0, length - size))
    kept = state_size(spec, shape, length)
    return Cost(flops=4 * keys * shape.queries * shape.dim, bytes=kept, state_bytes=kept)


def state_size(spec: Span, shape: Shape, length: int) -> float:
    """Bytes cached after `length` tokens: what later rows may read, and the sinks."""
    return 2 * shape.causal * (held(spec, length) + spec.sinks) * shape.dim * shape.element
