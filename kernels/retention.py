"""Retention: softmax over sinks, the last tokens and the older ones that were read most late in the window.

Its memory is fixed, it needs no training, and on SmolLM2 it keeps more quality per byte than a wider window. The
definition is `problem.Retain`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import ops
from .call import Call, Cost, Shape, grouped, logits, sink_column, softmax_terms
from .linear import refuse_limit
from .spec import Retention


@dataclass
class RetentionState:
    """The memory of `problem.Retain`, batch first."""

    ring_k: Tensor
    ring_v: Tensor
    ring_at: Tensor
    ring_score: Tensor
    kept_k: Tensor
    kept_v: Tensor
    kept_at: Tensor
    kept_score: Tensor
    sink_k: Tensor
    sink_v: Tensor


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
    memory = tuple(vars(state).values()) if isinstance(state, RetentionState) else None
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
    return o, RetentionState(*after)


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
