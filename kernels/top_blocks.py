"""Block-sparse attention by pooled scores: softmax over the row's own block and the blocks before it that matter most.

Positions count from the first real token of a sequence, so padding before it changes nothing. `rows` rows share a list,
which the first query among them decides when it arrives: the mean keys of the blocks that are finished by then are all
it needs, so prefill, chunks and decoding agree. The selection has no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .call import Call, Cost, Shape, dense, grouped, refuse_limit
from .full import FullState, extended
from .span import starts
from .spec import TopBlocks
from .torch_select import from_map

FORCED = 2.0  # above every share
SCORES = 2**24  # of row blocks and key blocks that are held at once


@dataclass
class BlocksState:
    """All keys and values k, v (B, Hk, capacity, D), `length` of them filled; `means` (B, Hk, M, D) fp32 of the keys of
    finished blocks, counted from each row's first real token; `chosen` (B, Hk, M), the list of the last rows."""

    k: Tensor
    v: Tensor
    means: Tensor
    chosen: Tensor
    length: int


def parameters(spec: TopBlocks, heads: int, kv_heads: int, dim: int) -> nn.Module | None:
    """Nothing to learn."""
    return None


def reference(spec: TopBlocks, q: Tensor, k: Tensor, v: Tensor, call: Call, learned: nn.Module | None = None) -> Tensor:
    """The definition, dense, row block by row block: q (B, H, S, D), k, v (B, Hk, S, D), no state. → (B, H, S, D)"""
    refuse_limit(call)
    batch, groups, length = k.shape[:3]
    allowed = torch.zeros(batch, groups, length, length, dtype=torch.bool, device=q.device)
    real = (
        torch.ones(batch, length, dtype=torch.bool, device=q.device) if call.valid is None else call.valid[:, :length]
    )
    for b, start in enumerate(starts(call, batch, length)):
        blocks = [range(at, min(at + spec.block, length)) for at in range(start, length, spec.block)]
        for g in range(groups):
            means = torch.stack([_mean(k[b, g, list(x)], real[b, list(x)]) for x in blocks]) if blocks else k[b, g, :0]
            heads = slice(g * q.shape[1] // groups, (g + 1) * q.shape[1] // groups)
            for at in range(start, length, spec.rows):
                rows = list(range(at, min(at + spec.rows, length)))
                own = (at - start) // spec.block
                if call.causal:
                    query, open_ = q[b, heads, at], own
                else:
                    query, open_ = torch.stack([_mean(x[rows], real[b, rows]) for x in q[b, heads]]), len(blocks)
                there = torch.tensor([bool(real[b, list(x)].any()) for x in blocks[:open_]], dtype=torch.bool)
                scores = (query.to(means.dtype) @ means[:open_].T * call.scale).detach()
                share = scores.masked_fill(~there.to(q.device), -torch.inf).softmax(-1).nan_to_num(0.0).mean(0)
                for m in range(open_):
                    share[m] = -1.0 if not there[m] else FORCED if m in (0, own, own - 1) else share[m]
                best = share.argsort(descending=True, stable=True)[: spec.keep + (not call.causal)].tolist()
                for m in {*best, own}:
                    if m == own or share[m] >= 0:
                        allowed[b, g, rows[0] : rows[-1] + 1, list(blocks[m])] = True
    if call.causal:
        allowed = allowed.tril()
    allowed = allowed & real[:, None, None]
    return dense(q, k, v, call, allowed[:, :, None])


def _mean(x: Tensor, real: Tensor) -> Tensor:
    """Of the real ones among x (n, D), at least fp32; 0 where there is none."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * real[:, None]).sum(0) / real.sum().clamp_min(1)


def attend(
    spec: TopBlocks, q: Tensor, k: Tensor, v: Tensor, call: Call, state: object = None, learned: nn.Module | None = None
) -> tuple[Tensor, BlocksState | None]:
    """The new tokens attend to the blocks of their lists. → (B, H, Q, D), state; None where not causal"""
    refuse_limit(call)
    old = state if isinstance(state, BlocksState) else None
    total, batch = call.seen + q.shape[2], q.shape[0]
    if old is None and not call.keep:
        held = FullState(k, v, total)
    else:
        held = extended(None if old is None else FullState(old.k, old.v, old.length), k, v)
    k, v = held.k[:, :, :total], held.v[:, :, :total]
    firsts = starts(call, batch, total)
    # an encoder's last block may be unfinished, and counts all the same
    count = total // spec.block if call.causal else -(-total // spec.block)
    means = k.new_zeros(batch, k.shape[1], count, k.shape[3], dtype=torch.promote_types(k.dtype, torch.float32))
    chosen = torch.zeros(batch, k.shape[1], count, dtype=torch.bool, device=q.device)
    if old is not None:
        means[:, :, : old.means.shape[2]], chosen[:, :, : old.means.shape[2]] = old.means, old.chosen
    parts = []
    for start in dict.fromkeys(firsts):
        rows = [b for b, first in enumerate(firsts) if first == start]
        at = slice(None) if len(rows) == batch else torch.tensor(rows, device=q.device)
        real = None if call.valid is None else call.valid[at, start:total]
        with torch.no_grad():
            done = 0 if old is None else max(0, call.seen - start) // spec.block
            later = slice(done * spec.block, None)
            known = None if real is None else real[:, later]
            fresh = _means(spec, k[at, :, start:][:, :, later], known, whole=call.causal)
            means[at, :, done : done + fresh.shape[2]] = fresh
        new = (q[at, :, max(0, start - call.seen) :], k[at, :, start:], v[at, :, start:])
        o, last = _sequence(spec, *new, real, means[at], chosen[at], call)
        chosen[at] = last
        parts.append(F.pad(o, (0, 0, q.shape[2] - o.shape[2], 0)))
    order = torch.tensor([b for start in dict.fromkeys(firsts) for b, x in enumerate(firsts) if x == start])
    o = parts[0] if len(parts) == 1 else torch.cat(parts).index_select(0, order.argsort().to(q.device))
    if not call.keep or not call.causal:
        return o, None
    return o, BlocksState(held.k, held.v, means, chosen, total)


def lists(spec: TopBlocks, q: Tensor, k: Tensor, call: Call) -> Tensor:
    """(B, Hk, N, M): which of M key blocks each of N row blocks reads beside its own, of a text without padding."""
    with torch.no_grad():
        return _choose(spec, q, 0, _means(spec, k, None, whole=call.causal), None, call)


def _means(spec: TopBlocks, k: Tensor, real: Tensor | None, whole: bool) -> Tensor:
    """Mean keys (B, Hk, M, D) of the blocks of k (B, Hk, n, D), of `whole` ones only where asked."""
    end = k.shape[2] // spec.block * spec.block if whole else k.shape[2]
    return pooled(k[:, :, :end], None if real is None else real[:, :end], spec.block)


def pooled(x: Tensor, real: Tensor | None, size: int) -> Tensor:
    """Means (B, H, ⌈S / size⌉, D) of the real ones (B, S) among x (B, H, S, D), in at least fp32; 0 without any."""
    pad = -x.shape[2] % size
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    counts = torch.ones_like(x[:, 0, :, 0]) if real is None else real.to(x.dtype)
    sums = F.pad(x * counts[:, None, :, None], (0, 0, 0, pad)).unflatten(2, (-1, size)).sum(3)
    means: Tensor = sums / F.pad(counts, (0, pad)).unflatten(1, (-1, size)).sum(2)[:, None, :, None].clamp_min(1)
    return means


def _sequence(
    spec: TopBlocks,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    real: Tensor | None,
    means: Tensor,
    chosen: Tensor,
    call: Call,
) -> tuple[Tensor, Tensor]:
    """Sequences without padding before them: the last rows q of the tokens k, v. → (B, H, Q, D), the last list"""
    total = k.shape[2]
    first = total - q.shape[2]
    pieces = []
    row = first
    while row < total:
        aligned = row % spec.rows == 0
        end = total if aligned else min(total, row - row % spec.rows + spec.rows)
        query = q[:, :, row - first : end - first]
        if aligned:
            lists = _choose(spec, query, row, means, real, call)
            chosen = lists[:, :, -1]
        else:
            lists = chosen[:, :, None]
        blocks = -(-end // spec.block)
        own = torch.arange(row, end, spec.rows, device=q.device) // spec.block
        here = F.pad(lists, (0, max(0, blocks - lists.shape[3])))[..., :blocks]
        here = here | (own[:, None] == torch.arange(blocks, device=q.device))
        pieces.append(
            ops.mixed_attention(
                query,
                k[:, :, :end],
                v[:, :, :end],
                from_map(here, (spec.rows, spec.block), transposed=torch.is_grad_enabled()),
                causal=call.causal,
                scale=call.scale,
                valid=None if real is None else real[:, :end],
                softcap=call.softcap or 0.0,
                sink_logits=call.sink_logits,
            ).o
        )
        row = end
    return torch.cat(pieces, 2) if pieces else q, chosen


@torch.no_grad()
def _choose(spec: TopBlocks, q: Tensor, row: int, means: Tensor, real: Tensor | None, call: Call) -> Tensor:
    """(B, Hk, N, M): the lists of the row blocks of q (B, H, Q, D), whose first stands at `row`; some at a time."""
    query = q[:, :, :: spec.rows] if call.causal else pooled(q, real, spec.rows)
    step = max(1, SCORES // max(1, means.shape[2] * q.shape[0] * q.shape[1]))
    starts = range(0, query.shape[2], step)
    parts = [_best(spec, query[:, :, n : n + step], row + n * spec.rows, means, real, call) for n in starts]
    return torch.cat(parts, 2)


def _best(spec: TopBlocks, query: Tensor, row: int, means: Tensor, real: Tensor | None, call: Call) -> Tensor:
    """The same for the deciding queries (B, H, N, D)."""
    groups, blocks, count = *means.shape[1:3], query.shape[2]
    own = (row + torch.arange(count, device=query.device) * spec.rows) // spec.block  # (N,)
    m = torch.arange(blocks, device=query.device)
    open_ = m < own[:, None] if call.causal else torch.ones(count, blocks, dtype=torch.bool, device=query.device)
    open_ = open_[None, None]  # (B, 1, N, M)
    if real is not None:
        full = F.pad(real, (0, max(0, blocks * spec.block - real.shape[1])))[:, : blocks * spec.block]
        open_ = open_ & full.unflatten(1, (blocks, spec.block)).any(2)[:, None, None]
    s = grouped(query.to(means.dtype), groups) @ means[:, :, None].transpose(-1, -2) * call.scale  # (B, Hk, G, N, M)
    s = s.masked_fill(~open_[:, :, None], -torch.inf)
    share = s.softmax(-1).nan_to_num(0.0).mean(2)
    distance = own[:, None] - m
    share = torch.where((m == 0) | (distance == 1) | (distance == 0), FORCED, share)
    share = torch.where(open_, share, -1.0)
    keep = spec.keep + (not call.causal)  # an encoder's own block is among those it chooses from
    order = share.argsort(dim=-1, descending=True, stable=True)[..., :keep]
    return torch.zeros_like(share, dtype=torch.bool).scatter(-1, order, True) & (share >= 0)


def prefill_cost(spec: TopBlocks, shape: Shape, length: int) -> Cost:
    """Of `length` tokens at once: the pairs of the lists, and the scores of the selection."""
    pairs = scores = 0
    blocks = -(-length // spec.block)
    for row in range(0, length, spec.rows):
        own, rows = row // spec.block, min(spec.rows, length - row)
        if shape.causal:
            before = row - own * spec.block
            pairs += rows * (min(spec.keep, own) * spec.block + before) + rows * (rows + 1) // 2
            scores += own
        else:
            last = length - (blocks - 1) * spec.block
            listed = min(spec.keep + 1, blocks)
            pairs += rows * ((listed - (listed == blocks)) * spec.block + (last if listed == blocks else 0))
            scores += blocks
    flops = 4 * pairs * shape.queries * shape.dim + 2 * scores * shape.queries * shape.dim + length * shape.dim
    io = (2 * shape.queries + 2) * length * shape.dim * shape.element
    return Cost(flops=float(flops), bytes=io, state_bytes=state_size(spec, shape, length))


def decode_cost(spec: TopBlocks, shape: Shape, length: int) -> Cost:
    """Of one token after `length - 1`; the selection of a row block is shared by its rows."""
    blocks = (length - 1) // spec.block
    keys = min(spec.keep, blocks) * spec.block + (length - 1) % spec.block + 1
    flops = 4 * keys * shape.queries * shape.dim + 2 * blocks * shape.queries * shape.dim / spec.rows
    read = 2 * keys * shape.dim * shape.element + 4 * blocks * shape.dim / spec.rows
    return Cost(flops=flops, bytes=read, state_bytes=state_size(spec, shape, length))


def state_size(spec: TopBlocks, shape: Shape, length: int) -> float:
    """Bytes cached: every key and value, and for every finished block a mean in fp32 and its place in the list."""
    blocks = length // spec.block
    return shape.causal * (2 * length * shape.dim * shape.element + blocks * (4 * shape.dim + 1))
