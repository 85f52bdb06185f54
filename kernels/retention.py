"""Retention: softmax over sinks, the last tokens and the older ones that were read most late in the window.

Its memory is fixed, it needs no training, and on SmolLM2 it keeps more quality per byte than a wider window. The
definition is `problem.Retain`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import ops
from .call import Call, Cost, Shape, grouped, logits, map_state, refuse_limit, sink_column, softmax_terms
from .problem import EMPTY, Part
from .spec import Retention


@dataclass
class RetentionState:
    """k, v (B, Hk, window + keep + sinks, D) in that order, with `at` (B, Hk, window + keep), −1 = empty, and `score`.

    A recent token of position p is in slot p % window, a sink of position p in slot p of the sinks; what was kept
    fills its slots from the first.
    """

    k: Tensor
    v: Tensor
    at: Tensor
    score: Tensor


def _memory(spec: Retention, state: RetentionState) -> tuple[Tensor, ...]:
    """The state as `problem.Retain` names it, in views."""
    ring, kept = slice(0, spec.window), slice(spec.window, spec.window + spec.keep)
    sinks = slice(spec.window + spec.keep, None)
    k, v, at, score = state.k, state.v, state.at, state.score
    recent = (k[:, :, ring], v[:, :, ring], at[:, :, ring], score[:, :, ring])
    return (*recent, k[:, :, kept], v[:, :, kept], at[:, :, kept], score[:, :, kept], k[:, :, sinks], v[:, :, sinks])


def _state(memory: tuple[Tensor, ...]) -> RetentionState:
    """The inverse: one buffer, with what was kept moved to the front of its slots."""
    ring_k, ring_v, ring_at, ring_score, kept_k, kept_v, kept_at, kept_score, sink_k, sink_v = memory
    order = (kept_at < 0).int().argsort(dim=-1, stable=True)
    rows = order[..., None].expand_as(kept_k)
    return RetentionState(
        torch.cat([ring_k, kept_k.gather(2, rows), sink_k], 2),
        torch.cat([ring_v, kept_v.gather(2, rows), sink_v], 2),
        torch.cat([ring_at, kept_at.gather(2, order)], 2),
        torch.cat([ring_score, kept_score.gather(2, order)], 2),
    )


def parameters(spec: Retention, heads: int, kv_heads: int, dim: int) -> nn.Module | None:
    """Retention adds nothing to learn."""
    return None


def positions(call: Call, batch: int, new: int, device: torch.device) -> Tensor:
    """(B, Q) int32: which real token of its row each new one is; −1 at padding."""
    if call.valid is None:
        return torch.arange(call.seen, call.seen + new, device=device, dtype=torch.int32).expand(batch, -1).contiguous()
    at = call.valid.int().cumsum(1, dtype=torch.int32) - 1
    return torch.where(call.valid, at, -1)[:, call.seen :].contiguous()


def reference(spec: Retention, q: Tensor, k: Tensor, v: Tensor, call: Call, learned: nn.Module | None = None) -> Tensor:
    """The definition row by row, dense, with the scores found along the way. q (B, H, S, D) → (B, H, S, D)"""
    s = logits(grouped(q, k.shape[1]), k[:, :, None], call)  # (B, Hk, G, S, S)
    at = positions(call, q.shape[0], q.shape[2], q.device).long()  # (B, S)
    score = s.new_zeros(*k.shape[:2], q.shape[2])  # (B, Hk, S)
    outputs = []
    for row in range(q.shape[2]):
        i = at[:, row, None]  # (B, 1)
        recent = i // spec.block * spec.block - spec.window + spec.block
        there = (at >= 0) & (at <= i) & (i >= 0)
        near, sink = there & (at >= recent), there & (at < spec.sinks)
        older = (there & (at < recent) & ~sink)[:, None].expand_as(score)
        best = torch.where(older, score.detach(), -torch.inf)
        place = at.argsort(dim=1, stable=True)[:, None].expand_as(best)
        order = place.gather(2, best.gather(2, place).argsort(dim=2, descending=True, stable=True))[..., : spec.keep]
        kept = torch.zeros_like(older).scatter(2, order, True) & older
        allowed = (kept | (near | sink)[:, None])[:, :, None, None]
        number, total, top = softmax_terms(s[..., row : row + 1, :], allowed, v[:, :, None], sink_column(call, s))
        total = total.clamp_min(torch.finfo(total.dtype).tiny)
        outputs.append((number / total).flatten(1, 2))
        given = torch.where(allowed, torch.exp(s[..., row : row + 1, :] - top) / total, 0.0).sum((2, 3))
        score = score + given * (near & ~sink & (i - at >= spec.window // 2))[:, None]
    return torch.cat(outputs, 2).to(q.dtype)


def attend(
    spec: Retention, q: Tensor, k: Tensor, v: Tensor, call: Call, state: object = None, learned: nn.Module | None = None
) -> tuple[Tensor, RetentionState]:
    """The new tokens attend to what is recent and what was kept. → (B, H, Q, D), state"""
    refuse_limit(call)
    if not call.causal:
        raise ValueError("retention keeps what later rows will read: where rows read both ways choose window or linear")
    memory = _memory(spec, state) if isinstance(state, RetentionState) else None
    o, after = ops.retention(
        q,
        k,
        v,
        at=positions(call, q.shape[0], q.shape[2], q.device),
        window=spec.window,
        keep=spec.keep,
        sinks=spec.sinks,
        block=spec.block,
        scale=call.scale,
        memory=memory,
        softcap=call.softcap or 0.0,
        sink_logits=call.sink_logits,
    )
    return o, _state(after)


def step(
    spec: Retention, q: Tensor, k: Tensor, v: Tensor, call: Call, state: object, learned: nn.Module | None = None
) -> tuple[Part, RetentionState]:
    """One new token: at the start of a block what has become old competes for the slots of the kept."""
    assert isinstance(state, RetentionState)
    refuse_limit(call)
    row = positions(call, q.shape[0], 1, q.device).long()  # (B, 1)
    if call.valid is not None or call.seen % spec.block == 0:
        state = _compete(spec, state, row)
    return _joined(spec, k, v, state, row, call.valid is not None or call.seen < spec.sinks), state


def fixed(spec: Retention, state: object, length: int, room: int | None) -> RetentionState:
    """The state, whose shape is fixed as it is."""
    assert isinstance(state, RetentionState)
    return map_state(state, Tensor.clone)


def fixed_step(
    spec: Retention, q: Tensor, k: Tensor, v: Tensor, call: Call, state: object, learned: nn.Module | None = None
) -> tuple[Part, RetentionState]:
    """One new token at `call.at`."""
    assert isinstance(state, RetentionState)
    assert call.at is not None
    refuse_limit(call)
    row = call.at.expand(q.shape[0], 1)
    if call.valid is not None:
        real = call.valid.index_select(1, call.at)
        row = torch.where(real, (call.valid.long().cumsum(1) - 1).index_select(1, call.at), -1)
    begun = _compete(spec, state, row)
    state.at.copy_(begun.at)
    state.score.copy_(begun.score)
    return _joined(spec, k, v, state, row, True), state


def _joined(spec: Retention, k: Tensor, v: Tensor, state: RetentionState, row: Tensor, sinks: bool) -> Part:
    """The new tokens k, v (B, Hk, 1, D), real tokens `row` (B, 1) of their rows, written into the state and then read.

    `sinks` is false where none of them can be one.
    """
    real = row >= 0
    ring, last = row.clamp(min=0) % spec.window, spec.window + spec.keep
    _write(state.k, k, ring, real)
    _write(state.v, v, ring, real)
    place = ring[:, None].expand(-1, k.shape[1], -1)
    for x, value in ((state.at, row), (state.score, torch.zeros_like(row))):
        new = value[:, None].expand_as(place).to(x.dtype)
        x.scatter_(2, place, torch.where(real[:, None], new, x.gather(2, place)))
    if spec.sinks and sinks:
        first = real & (row < spec.sinks)
        for x, new in ((state.k, k), (state.v, v)):
            _write(x, new, last + row.clamp(0, spec.sinks - 1), first)
    at = state.at[:, 0].long()
    recent, kept = at[:, : spec.window], at[:, spec.window :]
    there = torch.arange(spec.sinks, device=k.device) <= row
    mask = torch.cat([recent >= spec.sinks, kept >= 0, there], 1) & real
    late = torch.zeros_like(mask)
    late[:, : spec.window] = mask[:, : spec.window] & (row - recent >= spec.window // 2)
    return Part(first=0, k=state.k, v=state.v, used=state.k.shape[2], mask=mask, late=late)


def receive(spec: Retention, state: object, given: Tensor) -> None:
    """Adds what a step gave to the scores. given (B, Hk, window + keep + sinks)"""
    assert isinstance(state, RetentionState)
    state.score += given[:, :, : spec.window + spec.keep]


def _write(x: Tensor, new: Tensor, slot: Tensor, where: Tensor) -> None:
    """x[:, :, slot] = new (B, Hk, 1, D) in the rows `where` (B, 1), in place; slot (B, 1)."""
    index = slot[:, None, :, None].expand_as(new)
    x.scatter_(2, index, torch.where(where[:, None, :, None], new.to(x.dtype), x.gather(2, index)))


def _compete(spec: Retention, state: RetentionState, row: Tensor) -> RetentionState:
    """Rows that begin a block: tokens of the ring that are no longer recent go, the best of them among the kept."""
    oldest = row // spec.block * spec.block - spec.window + spec.block
    begins = ((row >= 0) & (row % spec.block == 0))[:, None]  # (B, 1, 1)
    ring_at, kept_at = state.at[:, :, : spec.window].long(), state.at[:, :, spec.window :].long()
    old = begins & (ring_at >= 0) & (ring_at < oldest[:, None])
    k, v = state.k, state.v
    at, score = state.at, state.score
    if spec.keep:
        all_at = torch.cat([torch.where(old & (ring_at >= spec.sinks), ring_at, -1), kept_at], 2)
        place = torch.where(all_at >= 0, all_at, EMPTY).argsort(dim=-1, stable=True)  # ties: the smaller position wins
        value = torch.where(all_at >= 0, score, -torch.inf).gather(2, place)
        best = place.gather(2, value.argsort(dim=-1, descending=True, stable=True))[..., : spec.keep]
        stays = torch.arange(spec.window, spec.window + spec.keep, device=row.device).expand_as(best)
        best = torch.where(begins, best, stays)
        rows = best[..., None].expand(-1, -1, -1, k.shape[3])
        k[:, :, spec.window : spec.window + spec.keep] = k.gather(2, rows)
        v[:, :, spec.window : spec.window + spec.keep] = v.gather(2, rows)
        chosen_at = torch.where(begins, all_at.gather(2, best), kept_at).to(at.dtype)
        at = torch.cat([at[:, :, : spec.window], chosen_at], 2)
        score = torch.cat([score[:, :, : spec.window], score.gather(2, best)], 2)
    at = torch.cat([torch.where(old, -1, at[:, :, : spec.window]), at[:, :, spec.window :]], 2)
    return RetentionState(k, v, at, score)


def _held(spec: Retention) -> int:
    return spec.window + spec.keep + spec.sinks


def prefill_cost(spec: Retention, shape: Shape, length: int) -> Cost:
    """Of `length` tokens at once: every row reads sinks, kept and, on average, the window less half a block."""
    near = min(spec.window - (spec.block - 1) / 2, (length + 1) / 2)
    older = max(0, length - spec.window)
    pairs = length * near + older * (spec.keep + spec.sinks)
    io = (2 * shape.queries + 2) * length * shape.dim * shape.element
    return Cost(flops=4 * pairs * shape.queries * shape.dim, bytes=io, state_bytes=state_size(spec, shape, length))


def decode_cost(spec: Retention, shape: Shape, length: int) -> Cost:
    """Of one token after `length - 1`."""
    keys = min(length, _held(spec))
    kept = state_size(spec, shape, length)
    return Cost(flops=4 * keys * shape.queries * shape.dim, bytes=kept, state_bytes=kept)


def state_size(spec: Retention, shape: Shape, length: int) -> float:
    """Bytes kept, whatever the length: keys and values, and for all but the sinks a score and a position."""
    return 2 * _held(spec) * shape.dim * shape.element + 8 * (spec.window + spec.keep)
