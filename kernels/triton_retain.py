"""Retention in Triton: softmax over sinks, recent tokens and the older ones of highest score, in fixed memory.

Which tokens are kept decides what later rows read, so the blocks of a sequence come one after another: a program takes
one (sequence, KV group) and walks over them. In each block it ranks what has become old against what it keeps, attends,
and adds the probabilities that late rows gave to the scores. Keys are read where they lie, in one pool of the memory
and the new tokens: [kept | ring | sinks | new]. A second kernel then writes the new memory, all of it in parallel.

A score is a sum over whole blocks of rows in fp32; cutting the same tokens into other calls changes its last bits only.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .problem import Retain
from .triton_common import Variant, architecture, widest
from .triton_linear_host import describe, registers


@triton.jit
def _index(position, seen, rows, slots, ring, sinks_at, fresh, window, SINK: tl.constexpr, here):
    """Where in the pool the token of a position lies: among the new ones, or in the memory's ring or sinks."""
    new = here & (position >= seen)
    row = tl.load(rows + position - seen, mask=new, other=0)
    old = sinks_at + position if SINK else ring + position % window
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
def _rank(list_at, list_index, list_score, source, target, count, held, BR: tl.constexpr):
    """Sorts `count` entries (position −1: none) by score, then position; the first `held` go to the other list."""
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
        stays = mine & (at >= 0) & (rank < held)
        tl.store(list_at + target + rank, at, mask=stays)
        tl.store(list_score + target + rank, score, mask=stays)
        tl.store(list_index + target + rank, tl.load(list_index + source + e, mask=mine, other=0), mask=stays)


@triton.jit
def _walk(
    q, k, v, o, lse, score, rows_of, seen_of, count_of, list_at, list_index, list_score, sink, q_b, q_h, q_r, k_b, k_h,
    k_r, v_b, v_h, v_r, groups, Q, D, pool, ring, sinks_at, fresh, scale, cap, group, window, held,
    sinks, block, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, SINK: tl.constexpr,
    PRECISION: tl.constexpr,
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
    entries = held + block
    line = tl.program_id(0).to(tl.int64) * (2 * entries)
    list_at += line
    list_index += line
    list_score += line
    d = tl.arange(0, BD)
    m = tl.arange(0, BM)
    j = tl.arange(0, BN)
    stop = seen + count
    source = 0
    for n in range(seen // block, tl.cdiv(stop, block)):
        start = n * block
        oldest = start - window + block  # the first recent position
        if (held > 0) & (start >= seen) & (oldest > sinks):
            target = entries - source
            for c in range(0, block, BR):
                e = c + tl.arange(0, BR)
                position = oldest - block + e
                here = (e < block) & (position >= sinks)
                index = _index(position, seen, rows, pool, ring, sinks_at, fresh, window, False, here)
                tl.store(list_at + source + held + e, tl.where(here, position, -1), mask=e < block)
                tl.store(list_index + source + held + e, index, mask=e < block)
                given = tl.load(score + index, mask=here, other=0.0)
                tl.store(list_score + source + held + e, given, mask=e < block)
            for c in range(0, held, BR):
                e = c + tl.arange(0, BR)
                tl.store(list_at + target + e, tl.full((BR,), -1, tl.int32), mask=e < held)
            tl.debug_barrier()
            _rank(list_at, list_index, list_score, source, target, entries, held, BR)
            tl.debug_barrier()
            source = target
        first = tl.maximum(start, seen)
        last = tl.minimum(start + block, stop)
        low = tl.maximum(oldest, sinks)  # the sinks are read as such
        for c in range(0, (last - first) * group, BM):
            row = first + (c + m) // group
            h = g * group + (c + m) % group
            live = row < last
            column = tl.load(rows + row - seen, mask=live, other=0)
            fine = live[:, None] & (d < D)[None, :]
            q_at = q_base + h.to(tl.int64)[:, None] * q_h + column[:, None].to(tl.int64) * q_r + d[None, :]
            qt = tl.load(q_at, mask=fine, other=0.0)
            top = tl.full((BM,), float("-inf"), tl.float32)
            total = tl.zeros((BM,), tl.float32)
            acc = tl.zeros((BM, BD), tl.float32)
            for x in range(0, tl.minimum(sinks, last), BN):
                at = x + j
                here = at < tl.minimum(sinks, last)
                index = _index(at, seen, rows, pool, ring, sinks_at, fresh, window, True, here)
                ok = here[None, :] & (at[None, :] <= row[:, None])
                top, total, acc = _attend(
                    qt, k_base, v_base, k_r, v_r, index, here, ok, d, D, scale, cap, top, total, acc, PRECISION
                )
            for x in range(0, held, BN):
                here = tl.load(list_at + source + x + j, mask=x + j < held, other=-1) >= 0
                index = tl.load(list_index + source + x + j, mask=here, other=0)
                ok = here[None, :] & live[:, None]
                top, total, acc = _attend(
                    qt, k_base, v_base, k_r, v_r, index, here, ok, d, D, scale, cap, top, total, acc, PRECISION
                )
            for x in range(low, last, BN):
                at = x + j
                here = at < last
                index = _index(at, seen, rows, pool, ring, sinks_at, fresh, window, False, here)
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
            total = tl.where(live, total, 1.0)
            acc = acc / total[:, None]
            at_o = (b * groups * group + h).to(tl.int64) * Q + column
            tl.store(o + at_o[:, None] * D + d[None, :], acc.to(o.dtype.element_ty), mask=fine)
            tl.store(lse + at_o, top + tl.log(total), mask=live)
        tl.debug_barrier()
        # what rows at a distance of half the window or more gave to each recent token
        for x in range(low, last - window // 2, BN):
            at = x + j
            here = at < last
            index = _index(at, seen, rows, pool, ring, sinks_at, fresh, window, False, here)
            fine = here[:, None] & (d < D)[None, :]
            kt = tl.load(k_base + index[:, None].to(tl.int64) * k_r + d[None, :], mask=fine, other=0.0)
            given = tl.load(score + index, mask=here, other=0.0)
            for c in range(0, (last - first) * group, BM):
                row = first + (c + m) // group
                h = g * group + (c + m) % group
                live = row < last
                column = tl.load(rows + row - seen, mask=live, other=0)
                q_at = q_base + h.to(tl.int64)[:, None] * q_h + column[:, None].to(tl.int64) * q_r + d[None, :]
                qt = tl.load(q_at, mask=live[:, None] & (d < D)[None, :], other=0.0)
                norm = tl.load(lse + (b * groups * group + h).to(tl.int64) * Q + column, mask=live, other=0.0)
                late = here[None, :] & live[:, None] & (row[:, None] - at[None, :] >= window // 2)
                late = late & (at[None, :] <= row[:, None])
                given += tl.sum(tl.exp(_scores(qt, kt, late, scale, cap, PRECISION) - norm[:, None]), 0)
            tl.store(score + index, given, mask=here)
        tl.debug_barrier()
    if source > 0:
        for c in range(0, held, BR):
            e = c + tl.arange(0, BR)
            tl.store(list_at + e, tl.load(list_at + source + e, mask=e < held), mask=e < held)
            tl.store(list_index + e, tl.load(list_index + source + e, mask=e < held), mask=e < held)
            tl.store(list_score + e, tl.load(list_score + source + e, mask=e < held), mask=e < held)


@triton.jit
def _remember(
    k, v, score, rows_of, seen_of, count_of, list_at, list_index, list_score, ring_k, ring_v, ring_at, ring_score,
    kept_k, kept_v, kept_at, kept_score, sink_k, sink_v, k_b, k_h, k_r, v_b, v_h, v_r, groups, Q, D, pool, ring,
    sinks_at, fresh, tiles, window, held, sinks, block, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The new memory: BN slots of ring, kept tokens or sinks."""
    tile = tl.program_id(0) % tiles
    line = tl.program_id(0) // tiles
    g = line % groups
    b = line // groups
    seen = tl.load(seen_of + b)
    stop = seen + tl.load(count_of + b)
    rows = rows_of + b * Q
    d = tl.arange(0, BD)
    ring_tiles = tl.cdiv(window, BN)
    kept_tiles = tl.cdiv(held, BN)
    k_base = k + b.to(tl.int64) * k_b + g.to(tl.int64) * k_h
    v_base = v + b.to(tl.int64) * v_b + g.to(tl.int64) * v_h
    line = line.to(tl.int64)
    if tile < ring_tiles:
        slot = tile * BN + tl.arange(0, BN)
        oldest = (stop - 1) // block * block - window + block
        position = stop - 1 - (stop - 1 - slot + window) % window
        mine = slot < window
        here = mine & (position >= 0) & (position >= oldest) & (stop > 0)
        index = _index(position, seen, rows, pool, ring, sinks_at, fresh, window, False, here)
        given = tl.load(score + line * pool + index, mask=here, other=0.0)
        tl.store(ring_at + line * window + slot, tl.where(here, position, -1), mask=mine)
        tl.store(ring_score + line * window + slot, given, mask=mine)
        _copy(k_base, v_base, k_r, v_r, index, here, ring_k, ring_v, line * window + slot, mine, d, D)
    elif tile < ring_tiles + kept_tiles:
        slot = (tile - ring_tiles) * BN + tl.arange(0, BN)
        mine = slot < held
        entry = line * (2 * (held + block)) + slot
        position = tl.load(list_at + entry, mask=mine, other=-1)
        here = position >= 0
        index = tl.load(list_index + entry, mask=here, other=0)
        given = tl.load(list_score + entry, mask=here, other=0.0)
        tl.store(kept_at + line * held + slot, position, mask=mine)
        tl.store(kept_score + line * held + slot, given, mask=mine)
        _copy(k_base, v_base, k_r, v_r, index, here, kept_k, kept_v, line * held + slot, mine, d, D)
    else:
        slot = (tile - ring_tiles - kept_tiles) * BN + tl.arange(0, BN)
        mine = slot < sinks
        here = mine & (slot < stop)
        index = _index(slot, seen, rows, pool, ring, sinks_at, fresh, window, True, here)
        _copy(k_base, v_base, k_r, v_r, index, here, sink_k, sink_v, line * sinks + slot, mine, d, D)


@triton.jit
def _copy(k, v, k_r, v_r, index, here, to_k, to_v, slot, mine, d, D):
    fine = here[:, None] & (d < D)[None, :]
    at = index[:, None].to(tl.int64)
    place = slot[:, None] * D + d[None, :]
    mask = mine[:, None] & (d < D)[None, :]
    tl.store(to_k + place, tl.load(k + at * k_r + d[None, :], mask=fine, other=0.0), mask=mask)
    tl.store(to_v + place, tl.load(v + at * v_r + d[None, :], mask=fine, other=0.0), mask=mask)


def tiles(arch: str, dim: int, wide: bool, rows: int) -> tuple[int, int, int]:
    """Rows and keys of a tile, and warps; `rows` are the (row, head) pairs of a block."""
    if arch.startswith("gfx") and dim > 128:
        return 16, 16, 4
    if wide or rows <= 16:
        return 16, 32, 8
    return 32, 32, 8


def retain(p: Retain) -> tuple[Tensor, tuple[Tensor, ...]]:
    """o (B, H, Q, D) and the new memory; a row of padding gives 0."""
    batch, heads, length, dim = p.q.shape
    groups, device = p.k.shape[1], p.q.device
    k, v, score, seen = _pool(p)
    real = p.at >= 0
    rows = torch.argsort((~real).int(), dim=1, stable=True).int() if length > 1 else torch.zeros_like(p.at)
    count = real.sum(1, dtype=torch.int32)
    entries = p.keep + p.block
    lists = torch.full((3, batch, groups, 2, entries), -1, dtype=torch.int32, device=device)
    if p.memory is not None and p.keep:
        lists[0, :, :, 0, : p.keep] = p.memory[6]
        lists[1, :, :, 0, : p.keep] = torch.arange(p.keep, dtype=torch.int32, device=device)
        lists[2].view(torch.float32)[:, :, 0, : p.keep] = p.memory[7]
    at, index, scores = lists[0], lists[1], lists[2].view(torch.float32)
    o = torch.zeros(batch, heads, length, dim, dtype=p.q.dtype, device=device)
    memory = _empty(p)
    if not batch * groups:
        return o, memory
    fresh = 0 if p.memory is None else p.keep + p.window + p.sinks
    where = (groups, length, dim, k.shape[2], p.keep, p.keep + p.window, fresh)
    strides = [x.stride(i) for x in (k, v) for i in range(3)]
    bd = max(32, triton.next_power_of_2(dim))
    if length:
        lse = torch.empty(batch, heads, length, dtype=torch.float32, device=device)
        wide = p.q.dtype == torch.float32
        bm, bn, warps = tiles(architecture(), dim, wide, min(length, p.block) * (heads // groups))
        _walk[(batch * groups,)](
            p.q, k, v, o, lse, score, rows, seen, count, at, index, scores,
            o if p.sink_logits is None else p.sink_logits, p.q.stride(0), p.q.stride(1), p.q.stride(2), *strides,
            *where, p.scale, p.softcap, heads // groups, p.window, p.keep, p.sinks, p.block, BM=bm, BN=bn, BD=bd, BR=32,
            SINK=p.sink_logits is not None, PRECISION="ieee", num_warps=warps, num_stages=1,
            **registers(architecture()),
        )  # fmt: skip
    bn = 32
    count_tiles = sum(triton.cdiv(n, bn) for n in (p.window, p.keep, p.sinks))
    _remember[(batch * groups * count_tiles,)](
        k, v, score, rows, seen, count, at, index, scores, *memory, *strides, *where, count_tiles, p.window, p.keep,
        p.sinks, p.block, BN=bn, BD=bd, num_warps=4,
    )  # fmt: skip
    return o, memory


def _pool(p: Retain) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, values (B, Hk, N, D) and scores (B, Hk, N) of [kept | ring | sinks | new], tokens seen so far (B,)."""
    batch, groups, length, _ = p.k.shape
    new = torch.zeros(batch, groups, length, dtype=torch.float32, device=p.k.device)
    if p.memory is None:
        return p.k, p.v, new, torch.zeros(batch, dtype=torch.int32, device=p.k.device)
    ring_k, ring_v, ring_at, ring_score, kept_k, kept_v, _, kept_score, sink_k, sink_v = p.memory
    blank = torch.zeros(batch, groups, p.sinks, dtype=torch.float32, device=p.k.device)
    return (
        torch.cat([kept_k, ring_k, sink_k, p.k], 2),
        torch.cat([kept_v, ring_v, sink_v, p.v], 2),
        torch.cat([kept_score.float(), ring_score.float(), blank, new], 2),
        ring_at[:, 0].amax(1).int() + 1,
    )


def _empty(p: Retain) -> tuple[Tensor, ...]:
    """The memory that `_remember` fills."""
    batch, groups, _, dim = p.k.shape

    def slots(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        k, v = (torch.empty(batch, groups, count, dim, dtype=x.dtype, device=x.device) for x in (p.k, p.v))
        at = torch.empty(batch, groups, count, dtype=torch.int32, device=p.k.device)
        return k, v, at, torch.empty(batch, groups, count, dtype=torch.float32, device=p.k.device)

    return (*slots(p.window), *slots(p.keep), *slots(p.sinks)[:2])


def variants(arch: str) -> Iterator[Variant]:
    """Every tile, for the widest head that takes it; all sizes of the memory are arguments. bf16 stands for fp16."""
    for name, wide in (("bf16", False), ("fp32", True)):
        kinds = {**dict.fromkeys(("q", "k", "v", "o"), f"*{name}"), "scale": "fp32", "cap": "fp32", "sink": "*fp32"}
        kinds |= dict.fromkeys(("lse", "score", "list_score", "ring_score", "kept_score"), "*fp32")
        kinds |= dict.fromkeys(
            ("rows_of", "seen_of", "count_of", "list_at", "list_index", "ring_at", "kept_at"), "*i32"
        )
        kinds |= dict.fromkeys(("ring_k", "ring_v", "kept_k", "kept_v", "sink_k", "sink_v"), f"*{name}")
        chosen = {dim: [tiles(arch, dim, wide, rows) for rows in (1, 64)] for dim in (32, 64, 128, 256)}
        for bd, (bm, bn, warps) in widest(chosen):
            constants: dict[str, Any] = {"BM": bm, "BN": bn, "BD": bd, "BR": 32, "SINK": True, "PRECISION": "ieee"}
            yield describe(f"retain walk {name} {bd}, tile {bm}", _walk, kinds, constants, warps, 1, registers(arch))
        yield describe(f"retain memory {name} 256", _remember, kinds, {"BN": 32, "BD": 256}, 4, 3)
