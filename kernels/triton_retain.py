"""Retention in Triton: softmax over sinks, recent tokens and the older ones of highest score, in fixed memory.

Which tokens are kept decides what later rows read, so the blocks of a sequence come one after another: a program takes
one (sequence, KV group) and walks over them. In each block it ranks what has become old against what it keeps, attends,
and adds the probabilities that late rows gave to the scores. Keys are read where they lie, in one pool of the memory
and the new tokens: [kept | ring | sinks | new]. A second kernel then writes the new memory, all of it in parallel.

A score is a sum over whole blocks of rows in fp32; cutting the same tokens into other calls changes its last bits only.
"""
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .problem import Retain
from .triton_common import Variant, architecture
from .triton_linear import describe


@triton.jit
def _index(position, seen, rows, slots, ring, sinks_at, fresh, WINDOW: tl.constexpr, SINK: tl.constexpr, here):
    """Where in the pool the token of a position lies: among the new ones, or in the memory's ring or sinks."""
    new = here & (position >= seen)
    row = tl.load(rows + position - seen, mask=new, other=0)
    old = sinks_at + position if SINK else ring + position % WINDOW
    return tl.where(new, fresh + row, old)


@triton.jit
def _scores(qt, kt, ok, scale, cap, PRECISION: tl.constexpr):
    s = tl.dot(qt, tl.trans(kt), input_precision=PRECISION) * scale
    if cap > 0:
        s = cap * (2 * tl.sigmoid(2 * s / cap) - 1)
    return tl.where(ok, s, float("-inf"))


@triton.jit
def _attend(
    qt, k, v, k_r, v_r, index, here, ok, d, D, scale, cap, top, total, acc, PRECISION: tl.constexpr
):  # fmt: skip
    """One step of the running softmax over the keys `index` of the pool."""
    fine = here[:, None] & (d < D)[None, :]
    at = index[:, None].to(tl.int64)
    kt = tl.load(k + at * k_r + d[None, :], mask=fine, other=0.0)
    vt = tl.load(v + at * v_r + d[None, :], mask=fine, other=0.0)
    s = _scores(qt, kt, ok, scale, cap, PRECISION)
    new = tl.maximum(top, tl.max(s, 1))
    shift = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp(s - shift[:, None])
    keep = tl.exp(top - shift)
    total = total * keep + tl.sum(p, 1)
    acc = tl.dot(p.to(qt.dtype), vt, acc * keep[:, None], input_precision=PRECISION)
    return new, total, acc


@triton.jit
def _rank(list_at, list_index, list_score, source, target, count, KEEP: tl.constexpr, BR: tl.constexpr):
    """Sorts `count` entries (position −1: none) by score, then position; the first KEEP go to the other list."""
    for c in range(0, count, BR):
        e = c + tl.arange(0, BR)
        mine = e < count
        at = tl.load(list_at + source + e, mask=mine, other=-1)
        score = tl.load(list_score + source + e, mask=mine, other=0.0)
        rank = tl.zeros((BR,), tl.int32)
        for o in range(0, count, BR):
            f = o + tl.arange(0, BR)
            other_at = tl.load(list_at + source + f, mask=f < count, other=-1)
            other = tl.load(list_score + source + f, mask=f < count, other=0.0)
            before = other[None, :] > score[:, None]
            before = before | ((other[None, :] == score[:, None]) & (other_at[None, :] < at[:, None]))
            rank += tl.sum((before & (other_at >= 0)[None, :]).to(tl.int32), 1)
        stays = mine & (at >= 0) & (rank < KEEP)
        tl.store(list_at + target + rank, at, mask=stays)
        tl.store(list_score + target + rank, score, mask=stays)
        tl.store(list_index + target + rank, tl.load(list_index + source + e, mask=mine, other=0), mask=stays)


@triton.jit
def _walk(
    q, k, v, o, lse, score, rows_of, seen_of, count_of, list_at, list_index, list_score, sink, q_b, q_h, q_r, k_b, k_h,
    k_r, v_b, v_h, v_r, groups, Q, D, pool, ring, sinks_at, fresh, scale, cap, GROUP: tl.constexpr,
    WINDOW: tl.constexpr, KEEP: tl.constexpr, SINKS: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, SINK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All blocks of one (sequence, KV group). Leaves the kept tokens in the first of the two lists."""
    g = tl.program_id(0) % groups
    b = tl.program_id(0) // groups
    seen = tl.load(seen_of + b)
    count = tl.load(count_of + b)
    rows = rows_of + b * Q
    q_base = q + b.to(tl.int64) * q_b
    k_base = k + b.to(tl.int64) * k_b + g.to(tl.int64) * k_h
    v_base = v + b.to(tl.int64) * v_b + g.to(tl.int64) * v_h
    score += tl.program_id(0).to(tl.int64) * pool
    entries: tl.constexpr = KEEP + BLOCK
    line = tl.program_id(0).to(tl.int64) * (2 * entries)
    list_at += line
    list_index += line
    list_score += line
    d = tl.arange(0, BD)
    m = tl.arange(0, BM)
    j = tl.arange(0, BN)
    stop = seen + count
    source = 0
    for n in range(seen // BLOCK, tl.cdiv(stop, BLOCK)):
        start = n * BLOCK
        if start >= stop:  # no new token at all
            stop = stop
        oldest = start - WINDOW + BLOCK  # the first recent position
        if (KEEP > 0) & (start >= seen) & (oldest > SINKS):
            target = entries - source
            for c in range(0, BLOCK, BR):
                e = c + tl.arange(0, BR)
                position = oldest - BLOCK + e
                here = (e < BLOCK) & (position >= SINKS)
                index = _index(position, seen, rows, pool, ring, sinks_at, fresh, WINDOW, False, here)
                tl.store(list_at + source + KEEP + e, tl.where(here, position, -1), mask=e < BLOCK)
                tl.store(list_index + source + KEEP + e, index, mask=e < BLOCK)
                given = tl.load(score + index, mask=here, other=0.0)
                tl.store(list_score + source + KEEP + e, given, mask=e < BLOCK)
            for c in range(0, KEEP, BR):
                e = c + tl.arange(0, BR)
                tl.store(list_at + target + e, tl.full((BR,), -1, tl.int32), mask=e < KEEP)
            tl.debug_barrier()
            _rank(list_at, list_index, list_score, source, target, entries, KEEP, BR)
            tl.debug_barrier()
            source = target
        first = tl.maximum(start, seen)
        last = tl.minimum(start + BLOCK, stop)
        low = tl.maximum(oldest, SINKS)  # the sinks are read as such
        for c in range(0, (last - first) * GROUP, BM):
            row = first + (c + m) // GROUP
            h = g * GROUP + (c + m) % GROUP
            live = row < last
            column = tl.load(rows + row - seen, mask=live, other=0)
            fine = live[:, None] & (d < D)[None, :]
            q_at = q_base + h.to(tl.int64)[:, None] * q_h + column[:, None].to(tl.int64) * q_r + d[None, :]
            qt = tl.load(q_at, mask=fine, other=0.0)
            top = tl.full((BM,), float("-inf"), tl.float32)
            total = tl.zeros((BM,), tl.float32)
            acc = tl.zeros((BM, BD), tl.float32)
            for x in range(0, tl.minimum(SINKS, last), BN):
                at = x + j
                here = at < tl.minimum(SINKS, last)
                index = _index(at, seen, rows, pool, ring, sinks_at, fresh, WINDOW, True, here)
                ok = here[None, :] & (at[None, :] <= row[:, None])
                top, total, acc = _attend(
                    qt, k_base, v_base, k_r, v_r, index, here, ok, d, D, scale, cap, top, total, acc, PRECISION
                )
            for x in range(0, KEEP, BN):
                here = tl.load(list_at + source + x + j, mask=x + j < KEEP, other=-1) >= 0
                index = tl.load(list_index + source + x + j, mask=here, other=0)
                ok = here[None, :] & live[:, None]
                top, total, acc = _attend(
                    qt, k_base, v_base, k_r, v_r, index, here, ok, d, D, scale, cap, top, total, acc, PRECISION
                )
            for x in range(low, last, BN):
                at = x + j
                here = at < last
                index = _index(at, seen, rows, pool, ring, sinks_at, fresh, WINDOW, False, here)
                ok = here[None, :] & (at[None, :] <= row[:, None])
                top, total, acc = _attend(
                    qt, k_base, v_base, k_r, v_r, index, here, ok, d, D, scale, cap, top, total, acc, PRECISION
                )
            if SINK:
                logit = tl.load(sink + h, mask=live, other=0.0)
                new = tl.maximum(top, logit)
                keep = tl.exp(top - new)
                total = total * keep + tl.exp(logit - new)
                acc = acc * keep[:, None]
                top = new
            at_o = (b * groups * GROUP + h).to(tl.int64) * Q + column
            tl.store(o + at_o[:, None] * D + d[None, :], (acc / total[:, None]).to(o.dtype.element_ty), mask=fine)
            tl.store(lse + at_o, top + tl.log(total), mask=live)
        tl.debug_barrier()
        # what rows at a distance of half the window or more gave to each recent token
        for x in range(low, tl.minimum(last, last - WINDOW // 2), BN):
            at = x + j
            here = at < last
            index = _index(at, seen, rows, pool, ring, sinks_at, fresh, WINDOW, False, here)
            fine = here[:, None] & (d < D)[None, :]
            kt = tl.load(k_base + index[:, None].to(tl.int64) * k_r + d[None, :], mask=fine, other=0.0)
            given = tl.load(score + index, mask=here, other=0.0)
            for c in range(0, (last - first) * GROUP, BM):
                row = first + (c + m) // GROUP
                h = g * GROUP + (c + m) % GROUP
                live = row < last
                column = tl.load(rows + row - seen, mask=live, other=0)
                q_at = q_base + h.to(tl.int64)[:, None] * q_h + column[:, None].to(tl.int64) * q_r + d[None, :]
                qt = tl.load(q_at, mask=live[:, None] & (d < D)[None, :], other=0.0)
                norm = tl.load(lse + (b * groups * GROUP + h).to(tl.int64) * Q + column, mask=live, other=0.0)
                late = here[None, :] & live[:, None] & (row[:, None] - at[None, :] >= WINDOW // 2)
                late = late & (at[None, :] <= row[:, None])
                given += tl.sum(tl.exp(_scores(qt, kt, late, scale, cap, PRECISION) - norm[:, None]), 0)
            tl.store(score + index, given, mask=here)
        tl.debug_barrier()
    if source > 0:
        for c in range(0, KEEP, BR):
            e = c + tl.arange(0, BR)
            tl.store(list_at + e, tl.load(list_at + source + e, mask=e < KEEP), mask=e < KEEP)
            tl.store(list_index + e, tl.load(list_index + source + e, mask=e < KEEP), mask=e < KEEP)
            tl.store(list_score + e, tl.load(list_score + source + e, mask=e < KEEP), mask=e < KEEP)


@triton.jit
def _remember(
    k, v, score, rows_of, seen_of, count_of, list_at, list_index, list_score, ring_k, ring_v, ring_at, ring_score, kept_k,
    kept_v, kept_at, kept_score, sink_k, sink_v, k_b, k_h, k_r, v_b, v_h, v_r, groups, Q, D, pool, ring, sinks_at, fresh,
    tiles, WINDOW: tl.constexpr, KEEP: tl.constexpr, SINKS: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """The new memory: BN slots of ring, kept tokens or sinks."""
    tile = tl.program_id(0) % tiles
    group = tl.program_id(0) // tiles
    g = group % groups
    b = group // groups
    seen = tl.load(seen_of + b)
    stop = seen + tl.load(count_of + b)
    rows = rows_of + b * Q
    d = tl.arange(0, BD)
    ring_tiles: tl.constexpr = (WINDOW + BN - 1) // BN
    kept_tiles: tl.constexpr = (KEEP + BN - 1) // BN
    k_base = k + b.to(tl.int64) * k_b + g.to(tl.int64) * k_h
    v_base = v + b.to(tl.int64) * v_b + g.to(tl.int64) * v_h
    group = group.to(tl.int64)
    if tile < ring_tiles:
        slot = tile * BN + tl.arange(0, BN)
        oldest = (stop - 1) // BLOCK * BLOCK - WINDOW + BLOCK
        position = stop - 1 - (stop - 1 - slot + WINDOW) % WINDOW
        mine = slot < WINDOW
        here = mine & (position >= 0) & (position >= oldest) & (stop > 0)
        index = _index(position, seen, rows, pool, ring, sinks_at, fresh, WINDOW, False, here)
        given = tl.load(score + group * pool + index, mask=here, other=0.0)
        tl.store(ring_at + group * WINDOW + slot, tl.where(here, position, -1), mask=mine)
        tl.store(ring_score + group * WINDOW + slot, given, mask=mine)
        _copy(k_base, v_base, k_r, v_r, index, here, ring_k, ring_v, group * WINDOW + slot, mine, d, D)
    elif tile < ring_tiles + kept_tiles:
        slot = (tile - ring_tiles) * BN + tl.arange(0, BN)
        mine = slot < KEEP
        line = group * (2 * (KEEP + BLOCK)) + slot
        position = tl.load(list_at + line, mask=mine, other=-1)
        here = position >= 0
        index = tl.load(list_index + line, mask=here, other=0)
        given = tl.load(list_score + line, mask=here, other=0.0)
        tl.store(kept_at + group * KEEP + slot, position, mask=mine)
        tl.store(kept_score + group * KEEP + slot, given, mask=mine)
        _copy(k_base, v_base, k_r, v_r, index, here, kept_k, kept_v, group * KEEP + slot, mine, d, D)
    else:
        slot = (tile - ring_tiles - kept_tiles) * BN + tl.arange(0, BN)
        mine = slot < SINKS
        here = mine & (slot < stop)
        index = _index(slot, seen, rows, pool, ring, sinks_at, fresh, WINDOW, True, here)
        _copy(k_base, v_base, k_r, v_r, index, here, sink_k, sink_v, group * SINKS + slot, mine, d, D)


@triton.jit
def _copy(k, v, k_r, v_r, index, here, to_k, to_v, slot, mine, d, D):
    fine = here[:, None] & (d < D)[None, :]
    at = index[:, None].to(tl.int64)
    place = slot[:, None] * D + d[None, :]
    mask = mine[:, None] & (d < D)[None, :]
    tl.store(to_k + place, tl.load(k + at * k_r + d[None, :], mask=fine, other=0.0), mask=mask)
    tl.store(to_v + place, tl.load(v + at * v_r + d[None, :], mask=fine, other=0.0), mask=mask)
