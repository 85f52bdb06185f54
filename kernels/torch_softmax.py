"""Softmax attention over ranges in torch, by blocks of rows, and one decode step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import EMPTY, EPS, Decode, Extra, Part, Ranges, Softmax

ROWS = 512  # rows that are masked at once where a row may read everything: never S × S
BLOCK = 128  # rows of a block where a row reads a window
BLOCKS = 64  # blocks that are computed at once


@dataclass
class Terms:
    """A softmax before its division: numerators (B, Hk, G, Q, D), denominators and shifts (B, Hk, G, Q, 1).

    A row that reads nothing has 0, 0 and 0.
    """

    number: Tensor
    total: Tensor
    top: Tensor


def logits(q: Tensor, k: Tensor, scale: float, softcap: float) -> Tensor:
    """(…, Q, K) in at least fp32, with the model's soft cap."""
    wide = torch.promote_types(q.dtype, torch.float32)
    s = (q.to(wide) * scale) @ k.to(wide).transpose(-1, -2)
    return softcap * torch.tanh(s / softcap) if softcap else s


def terms(s: Tensor, allowed: Tensor, v: Tensor) -> Terms:
    """The masked softmax of logits s (…, Q, K) over values v (…, K, D). What is not allowed may even be NaN."""
    if s.shape[-1] == 0:
        zero = s.new_zeros(*s.shape[:-1], v.shape[-1])
        return Terms(zero, zero[..., :1], zero[..., :1])
    s = torch.where(allowed, s, -torch.inf)
    top = s.amax(-1, keepdim=True)
    top = torch.where(torch.isfinite(top), top, torch.zeros_like(top)).detach()
    p = torch.exp(s - top)
    read = allowed.any(-2)  # (…, K) keys that no row reads have no say, whatever is in them
    v = torch.where(read[..., None], v.to(p.dtype), 0.0) if read.shape[:-1] == v.shape[:-2] else v.to(p.dtype)
    return Terms(p @ v, p.sum(-1, keepdim=True), top)


def add_sink(t: Terms, sink: Tensor | None) -> Terms:
    """One more logit per head (H,) in the denominator."""
    if sink is None:
        return t
    s = sink.to(t.total.dtype).reshape(1, *t.total.shape[1:3], 1, 1)
    there = t.total > 0
    shift = torch.where(there, torch.maximum(t.top, s), s.expand_as(t.top)).detach()
    keep = torch.where(there, torch.exp(torch.where(there, t.top - shift, 0.0)), 0.0)
    return Terms(t.number * keep, t.total * keep + torch.exp(s - shift), shift)


def range_terms(p: Softmax, groups: list[int]) -> Terms:
    """Of the KV groups `groups`, which share one window."""
    assert isinstance(p.where, Ranges)
    size = p.where.sizes[groups[0]]
    every = len(groups) == p.k.shape[1]
    q = p.q.unflatten(1, (p.k.shape[1], -1))
    k, v, extra = p.k, p.v, p.extra
    if not every:
        q, k, v = q[:, groups], k[:, groups], v[:, groups]
        extra = None if extra is None else Extra(k=extra.k[:, groups], v=extra.v[:, groups], at=extra.at[:, groups])
    if size == 0 and extra is None:
        zero = q.new_zeros(q.shape, dtype=torch.promote_types(q.dtype, torch.float32))
        return Terms(zero, zero[..., :1], zero[..., :1])
    near = size >= 0 and (size if p.causal else 2 * size) + BLOCK < k.shape[2]
    new = q.shape[3]
    step = BLOCK if near else ROWS
    if new == 0:
        zero = q.new_zeros(q.shape, dtype=torch.promote_types(q.dtype, torch.float32))
        return Terms(zero, zero[..., :1], zero[..., :1])
    found = [_rows(p, q[..., a : a + step, :], a, k, v, extra, size) for a in range(0, new, step)]
    return Terms(*(torch.cat([getattr(x, name) for x in found], 3) for name in ("number", "total", "top")))


def _rows(p: Softmax, q: Tensor, first: int, k: Tensor, v: Tensor, extra: Extra | None, size: int) -> Terms:
    """Rows `first` … of the call; only the keys that one of them reads are touched."""
    keys, shift = k.shape[2], p.k.shape[2] - p.q.shape[2]
    i = torch.arange(first, first + q.shape[3], device=q.device) + shift
    low = 0 if size < 0 else max(0, first + shift - size + 1)
    last = first + q.shape[3] - 1 + shift
    high = last + 1 if p.causal else (keys if size < 0 else last + size)
    low, high = min(low, keys), max(low, min(high, keys))
    j = torch.arange(low, high, device=q.device)
    distance = i[:, None] - j
    allowed = distance >= 0 if p.causal else torch.ones_like(distance, dtype=torch.bool)
    if size >= 0:
        allowed = allowed & (distance.abs() < size)
    allowed = allowed[None, None, None]
    if p.valid is not None:
        allowed = allowed & p.valid[:, None, None, None, low:high]
    k, v = k[:, :, low:high], v[:, :, low:high]
    if extra is not None and size >= 0:
        at = extra.at[:, :, None, None].long()  # (B, Hk, 1, 1, P)
        far = at <= i[:, None] - size
        far = far if p.causal else far | (at >= i[:, None] + size)
        allowed = torch.cat([(far & (at != EMPTY)), allowed.expand(*far.shape[:2], 1, -1, -1)], -1)
        k, v = torch.cat([extra.k, k], 2), torch.cat([extra.v, v], 2)
    s = logits(q, k[:, :, None], p.scale, p.softcap)
    return terms(s, allowed.expand(s.shape[0], s.shape[1], *allowed.shape[2:]), v[:, :, None])


def decode_step(p: Decode) -> tuple[Tensor, list[Tensor]]:
    """q (B, H, 1, D) over every part. → (B, H, 1, D), and what late slots received"""
    group = p.q.shape[1] // sum(part.k.shape[1] for part in p.parts)
    outputs, received = [], []
    for part in p.parts:
        heads = slice(part.first * group, (part.first + part.k.shape[1]) * group)
        q = p.q[:, heads].unflatten(1, (-1, group))  # (B, hp, G, 1, D)
        sink = None if p.sink_logits is None else p.sink_logits[heads]
        o, given = _part(p, part, q, sink)
        outputs.append(o.flatten(1, 2).to(p.q.dtype))
        received += [] if given is None else [given]
    return torch.cat(outputs, 1), received


def _part(p: Decode, part: Part, q: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """o (B, hp, G, 1, D) and, where asked for, what the slots received (B, hp, C)."""
    k, v = part.k[:, :, : part.used], part.v[:, :, : part.used]
    if part.fq is None and part.late is None and sink is None and not p.softcap and part.used:
        return _through_sdpa(q, k, v, None if part.mask is None else part.mask[:, : part.used], p.scale), None
    s = logits(q, k[:, :, None], p.scale, p.softcap)
    allowed = torch.ones_like(s, dtype=torch.bool) if part.mask is None else _spread(part.mask[:, : part.used], s)
    t = add_sink(terms(s, allowed, v[:, :, None]) if part.used else _nothing(q), sink)
    given = None
    if part.late is not None:
        share = torch.where(allowed, torch.exp(s - t.top), 0.0) / torch.where(t.total > 0, t.total, 1.0)
        share = F.pad(share.sum((2, 3)), (0, part.k.shape[2] - part.used))
        given = torch.where(part.late[:, None], share, 0.0)
    if part.fq is None or part.state is None:
        return torch.where(t.total > 0, t.number / t.total, 0.0), given
    fq = part.fq.to(s.dtype).unflatten(1, (part.k.shape[1], -1))  # (B, hp, G, F)
    tail = (fq @ part.state.to(s.dtype))[..., None, :]  # (B, hp, G, 1, D + 1)
    if part.weight is None:
        alone: Tensor = tail[..., :-1] / (tail[..., -1:] + EPS)
        return alone, given
    c = part.weight.to(s.dtype).reshape(1, *tail.shape[1:3], 1, 1)
    shift = torch.where(t.total > 0, torch.maximum(t.top, c), c)
    near, far = torch.exp(torch.where(t.total > 0, t.top - shift, 0.0)), torch.exp(c - shift)
    total = t.total * near + tail[..., -1:] * far
    return torch.where(total > 0, (t.number * near + tail[..., :-1] * far) / total, 0.0), given


def _spread(mask: Tensor, like: Tensor) -> Tensor:
    return mask[:, None, None, None, :].expand_as(like)


def _nothing(q: Tensor) -> Terms:
    zero = q.new_zeros(q.shape, dtype=torch.promote_types(q.dtype, torch.float32))
    return Terms(zero, zero[..., :1], zero[..., :1])


def _through_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The query heads of a group become rows of SDPA, so that keys and values are never repeated."""
    allowed = None if mask is None else mask[:, None, None]
    o = F.scaled_dot_product_attention(q.flatten(2, 3), k, v, attn_mask=allowed, scale=scale)
    o = o if allowed is None else o.masked_fill(~allowed.any(-1, keepdim=True), 0.0)
    return o.reshape(q.shape)
