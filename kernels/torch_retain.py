"""Retention in torch: sinks, recent tokens and the older ones of highest score, in fixed memory.

The score of a token is the attention it received while it was at a distance of half the window or more: what was read
late is likely to be read again. Kin of H2O (Zhang et al., 2023) and TOVA (Oren et al., 2024), which score by all
attention so far or by the last row.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from .problem import Retain
from .torch_softmax import add_sink, logits, terms


@dataclass
class _Walk:
    """Where the walk over the blocks stands. Indices point into the pool: sinks, kept, ring, then the new tokens."""

    ring: Tensor  # (B, window) index of the recent token in each slot
    ring_at: Tensor  # (B, window) position, −1 = empty
    ring_score: Tensor  # (B, Hk, window)
    kept: Tensor  # (B, Hk, keep) index
    kept_at: Tensor  # (B, Hk, keep)
    kept_score: Tensor


def empty_memory(p: Retain) -> tuple[Tensor, ...]:
    """The memory before the first token."""
    batch, heads, _, dim = p.k.shape

    def blank(slots: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        at = torch.full((batch, heads, slots), -1, dtype=torch.int32, device=p.k.device)
        score = torch.zeros(batch, heads, slots, dtype=torch.promote_types(p.k.dtype, torch.float32), device=p.k.device)
        return p.k.new_zeros(batch, heads, slots, dim), p.v.new_zeros(batch, heads, slots, dim), at, score

    return (*blank(p.window), *blank(p.keep), *blank(p.sinks)[:2])


def retention(p: Retain) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The definition in `problem.Retain`, block by block. → (B, H, Q, D), memory"""
    memory = empty_memory(p) if p.memory is None else p.memory
    ring_k, ring_v, ring_at, ring_score, kept_k, kept_v, kept_at, kept_score, sink_k, sink_v = memory
    batch, groups, device = p.k.shape[0], p.k.shape[1], p.k.device
    pool_k, pool_v = torch.cat([sink_k, kept_k, ring_k, p.k], 2), torch.cat([sink_v, kept_v, ring_v, p.v], 2)
    kept_from, ring_from = p.sinks, p.sinks + p.keep
    new_from = ring_from + p.window
    real = p.at >= 0
    column = torch.argsort((~real).int(), dim=1, stable=True)  # (B, Q): the t-th real token of a row stands there
    count = real.sum(1)  # (B,)
    seen = ring_at[:, 0].amax(1).long() + 1  # (B,) real tokens so far
    walk = _Walk(
        ring=(ring_from + torch.arange(p.window, device=device)).expand(batch, -1).clone(),
        ring_at=ring_at[:, 0].long().clone(),
        ring_score=ring_score.detach().clone(),
        kept=(kept_from + torch.arange(p.keep, device=device)).expand(batch, groups, -1).clone(),
        kept_at=kept_at.long().clone(),
        kept_score=kept_score.detach().clone(),
    )
    slot = torch.arange(p.sinks, device=device)
    fresh = (slot - seen[:, None]).clamp(min=0, max=max(0, p.q.shape[2] - 1))
    sink = torch.where(slot < seen[:, None], slot, new_from + column.gather(1, fresh))  # (B, sinks)
    cuts = sorted({0, int(count.max()), *_cuts(seen.tolist(), count.tolist(), p.block)})
    o = p.q.new_zeros(p.q.shape)
    for first, last in itertools.pairwise(cuts):
        step = torch.arange(first, last, device=device)
        alive = step < count[:, None]  # (B, T)
        at = seen[:, None] + step
        where = column.gather(1, step.clamp(max=p.q.shape[2] - 1).expand(batch, -1))
        _advance(p, walk, at, alive, new_from + where)
        part = _attend(p, walk, pool_k, pool_v, sink, where, at, alive)
        index = where[:, None, :, None].expand_as(part)
        o = o.scatter(2, index, torch.where(alive[:, None, :, None], part, o.gather(2, index)))
    return o, _memory(p, walk, pool_k, pool_v, sink, seen + count, memory)


def _cuts(seen: list[int], count: list[int], block: int) -> set[int]:
    """The steps at which some row begins a block."""
    return {t for s, n in zip(seen, count, strict=True) for t in range(-s % block, n, block)}


def _advance(p: Retain, walk: _Walk, at: Tensor, alive: Tensor, index: Tensor) -> None:
    """Before the rows `at` (B, T) of one block: what has become old competes, and the new tokens enter the ring."""
    begins = alive[:, 0] & (at[:, 0] % p.block == 0)
    start = at[:, 0] // p.block * p.block
    oldest = start - p.window + p.block  # the first recent position of this block
    old = begins[:, None] & (walk.ring_at >= 0) & (walk.ring_at < oldest[:, None])  # (B, window)
    if p.keep and bool(old.any()):
        candidate = old & (walk.ring_at >= p.sinks)
        groups = walk.kept.shape[1]
        ring_at = torch.where(candidate, walk.ring_at, -1)[:, None].expand(-1, groups, -1)
        all_at = torch.cat([walk.kept_at, ring_at], 2)
        score = torch.cat([walk.kept_score, walk.ring_score], 2)
        ring = walk.ring[:, None].expand(-1, groups, -1)
        pool = torch.cat([walk.kept, ring], 2)
        by_place = all_at.argsort(dim=-1, stable=True)
        ranked = (
            torch.where(all_at >= 0, score, -torch.inf)
            .gather(-1, by_place)
            .argsort(dim=-1, descending=True, stable=True)
        )
        best = by_place.gather(-1, ranked)[..., : p.keep]
        change = old.any(1)[:, None, None]
        walk.kept_at = torch.where(change, all_at.gather(-1, best), walk.kept_at)
        walk.kept_score = torch.where(change, score.gather(-1, best), walk.kept_score)
        walk.kept = torch.where(change, pool.gather(-1, best), walk.kept)
    walk.ring_at = torch.where(old, -1, walk.ring_at)
    walk.ring_score = walk.ring_score * ~old[:, None]
    slot = torch.where(alive, at % p.window, p.window)  # a slot too many for rows that have ended
    for name, value in (("ring_at", at), ("ring", index)):
        wider = torch.cat([getattr(walk, name), value[:, :1]], 1)
        setattr(walk, name, wider.scatter(1, slot, value)[:, : p.window])


def _attend(
    p: Retain, walk: _Walk, pool_k: Tensor, pool_v: Tensor, sink: Tensor, where: Tensor, at: Tensor, alive: Tensor
) -> Tensor:
    """Rows of one block (B, H, T, D); adds what they gave to the scores of the ring."""
    groups = walk.kept.shape[1]
    spread = [x[:, None].expand(-1, groups, -1) for x in (sink, walk.ring)]
    index = torch.cat([spread[0], walk.kept, spread[1]], 2)[..., None]  # (B, Hk, N, 1)
    k, v = (x.gather(2, index.expand(-1, -1, -1, x.shape[-1])) for x in (pool_k, pool_v))
    q = p.q.gather(2, where[:, None, :, None].expand(-1, p.q.shape[1], -1, p.q.shape[-1])).unflatten(1, (groups, -1))
    row = at[:, None, :, None]  # (B, 1, T, 1)
    recent = (walk.ring_at >= p.sinks)[:, None, None] & (walk.ring_at[:, None, None] <= row)
    sinks = torch.arange(p.sinks, device=at.device) <= row
    kept = (walk.kept_at >= 0)[:, :, None].expand(-1, -1, at.shape[1], -1)
    allowed = torch.cat([sinks.expand(-1, groups, -1, -1), kept, recent.expand(-1, groups, -1, -1)], -1)
    allowed = allowed & alive[:, None, :, None]
    s = logits(q, k[:, :, None], p.scale, p.softcap)
    t = add_sink(terms(s, allowed[:, :, None], v[:, :, None]), p.sink_logits)
    total = torch.where(t.total > 0, t.total, 1.0)
    late = recent & (row - walk.ring_at[:, None, None] >= p.window // 2) & alive[:, None, :, None]
    given = torch.exp(s[..., -p.window :].detach() - t.top) / total.detach()
    given = torch.where(late[:, :, None], given, 0.0)
    walk.ring_score = walk.ring_score + given.sum((2, 3)).detach()
    return (t.number / total).flatten(1, 2).to(p.q.dtype)


def _memory(
    p: Retain, walk: _Walk, pool_k: Tensor, pool_v: Tensor, sink: Tensor, seen: Tensor, before: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The tensors that the next call needs, none of them larger than it was."""
    groups = pool_k.shape[1]
    ring = walk.ring[:, None].expand(-1, groups, -1)

    def taken(x: Tensor, index: Tensor, there: Tensor) -> Tensor:
        return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1])) * there[..., None]

    recent = (walk.ring_at >= 0)[:, None].expand(-1, groups, -1)
    sinks = (torch.arange(p.sinks, device=seen.device) < seen[:, None])[:, None].expand(-1, groups, -1)
    kept = walk.kept_at >= 0
    at = walk.ring_at[:, None].expand(-1, groups, -1)
    spread = sink[:, None].expand(-1, groups, -1)
    return (
        taken(pool_k, ring, recent),
        taken(pool_v, ring, recent),
        at.int().contiguous(),
        walk.ring_score,
        taken(pool_k, walk.kept, kept),
        taken(pool_v, walk.kept, kept),
        walk.kept_at.int(),
        walk.kept_score * kept,
        taken(pool_k, spread, sinks),
        taken(pool_v, spread, sinks),
    )
