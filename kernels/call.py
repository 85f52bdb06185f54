"""What every operator shares: the call, states, costs and the one masked softmax.

Shapes here and in the operator files: `q` is (B, H, Q, D) with H query heads, `k` and `v` are (B, Hk, Q, D) with Hk
KV heads, all for the Q new tokens; heads are grouped, so query head h reads KV head h // (H // Hk). What came before
is in the operator's state. Positions are absolute: the new tokens stand at `seen … seen + Q - 1`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .masks import Layout

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Call:
    """What one attention call carries besides q, k and v.

    `valid` (B, seen + Q) is true for real tokens and None when all are. `softcap`, `sink_logits` (H,) and `limit` are
    the architecture's own: logit soft cap (Gemma 2), a learned logit per head in the normaliser (gpt-oss) and the
    model's own sliding window, in tokens. `keep` is false where nobody wants the state. `causal` is false where rows
    read in both directions, as in encoders: such a call has no past (`seen` 0), and nobody keeps a state of it.
    `layout` says where image or video tokens stand on their grid, text beside it; `time` (B,) how noisy each sample is,
    from 0 to 1 (noise). Both are None for text.
    `segments` (B, Q) tells apart the documents that are packed into a row: tokens read those of their own run of equal
    numbers only. Such a call has no past and leaves no state. `at` (1,) int64 is the position of the one new token
    where states have fixed shapes: `seen` is not told then, and `valid` may be longer than what has been seen.
    """

    scale: float
    seen: int = 0
    valid: Tensor | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None
    limit: int | None = None
    keep: bool = True
    causal: bool = True
    layout: Layout | None = None
    time: Tensor | None = None
    segments: Tensor | None = None
    at: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.causal and self.seen:
            raise ValueError(f"seen must be 0 where the call is not causal, not {self.seen}: it has no past")
        if self.segments is not None and self.seen:
            raise ValueError(f"seen must be 0 where documents are packed, not {self.seen}: they have no past")

    def heads(self, index: slice | list[int]) -> Call:
        """The same call for the query heads in `index` only."""
        if self.sink_logits is None:
            return self
        return dataclasses.replace(self, sink_logits=self.sink_logits[index])

    def reach(self, distance: Tensor) -> Tensor:
        """Which of these distances i − j a row may read at all: of earlier tokens, or where not causal every one."""
        return distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)

    def real(self, start: int, stop: int) -> Tensor | None:
        """(B, stop - start): which of these positions hold real tokens; None when all do."""
        return None if self.valid is None else self.valid[:, start:stop]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One KV group: `queries` query heads over one KV head of size `dim`; `element` is bytes per cached number.

    Where it is not `causal` rows read in both directions, and nothing is cached. `layout` is that of the call, `groups`
    the KV groups of the site, which share what is done once for all of them.
    """

    queries: int
    dim: int
    element: int = 2
    causal: bool = True
    layout: Layout | None = None
    groups: int = 1


@dataclass(frozen=True, kw_only=True)
class Cost:
    """`flops`: multiply and add count as two. `bytes` read and written. `state_bytes` kept between calls."""

    flops: float
    bytes: float
    state_bytes: float


def refuse_limit(call: Call) -> None:
    """For operators that read beyond a sliding window of the model's own, and so cannot stand in for it."""
    if call.limit is not None:
        raise ValueError(f"this layer has a sliding window of {call.limit} tokens of its own: choose 'window' for it")


def grouped(q: Tensor, kv_heads: int) -> Tensor:
    """(B, H, Q, D) → (B, Hk, G, Q, D), a view."""
    return q.reshape(q.shape[0], kv_heads, q.shape[1] // kv_heads, *q.shape[2:])


def map_state(state: T, change: Callable[[Tensor], Tensor]) -> T:
    """The state with `change` applied to every tensor; all of them have the batch first."""
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}  # type: ignore[arg-type]
    changed = {name: change(value) for name, value in fields.items() if isinstance(value, Tensor)}
    return dataclasses.replace(state, **changed)  # type: ignore[type-var]


def state_bytes(state: object) -> int:
    """Bytes that the tensors of a state hold; 0 of None."""
    if state is None:
        return 0
    values = [getattr(state, f.name) for f in dataclasses.fields(state)]  # type: ignore[arg-type]
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))


def remember(state: T) -> T:
    """What it takes to come back to this state with `recall` after later calls.

    Keys and values that are only ever added to (a state with a `length`) are not copied, all else is.
    """
    if state is None:
        return state
    if not hasattr(state, "length"):
        return map_state(state, Tensor.clone)
    changed = {name: getattr(state, name)[:, :, :0] for name in ("k", "v")}
    return map_state(dataclasses.replace(state, **changed), Tensor.clone)  # type: ignore[type-var]


def recall(then: T, now: T) -> T:
    """The state that was remembered as `then`, where `now` is what later calls made of it."""
    if then is None or not hasattr(then, "length"):
        return then
    return dataclasses.replace(then, k=now.k, v=now.v)  # type: ignore[type-var,attr-defined]


def logits(q: Tensor, k: Tensor, call: Call) -> Tensor:
    """(…, Q, K) attention logits in at least fp32, with the model's soft cap."""
    wide = torch.promote_types(q.dtype, torch.float32)
    s = q.to(wide) @ k.to(wide).transpose(-1, -2) * call.scale
    return s if call.softcap is None else call.softcap * torch.tanh(s / call.softcap)


def sink_column(call: Call, like: Tensor) -> Tensor | None:
    """The learned sink logits (B-broadcastable, Hk, G, 1, 1) that match logits `like` (B, Hk, G, Q, K)."""
    if call.sink_logits is None:
        return None
    return call.sink_logits.to(like.dtype).view(1, like.shape[1], like.shape[2], 1, 1)


def softmax_terms(s: Tensor, allowed: Tensor, v: Tensor, sink: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Numerator, denominator and maximum of a masked softmax, so that other terms can join the normaliser.

    Args:
        s: (…, Q, K) logits; allowed: broadcastable to it; v: (…, K, D); sink: a further logit per row without a value.

    Returns:
        (…, Q, D), (…, Q, 1), (…, Q, 1). A row that may attend to nothing gives 0, 0 and 0.
    """
    s = s.masked_fill(~allowed, -torch.inf)
    top = s.amax(-1, keepdim=True)
    if sink is not None:
        top = torch.maximum(top, sink)
    top = torch.where(torch.isfinite(top), top, torch.zeros_like(top)).detach()
    p = torch.exp(s - top)
    total = p.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - top)
    return p @ v.to(p.dtype), total, top


def dense(q: Tensor, k: Tensor, v: Tensor, call: Call, allowed: Tensor) -> Tensor:
    """Softmax over the allowed pairs, the definition of what reads by softmax alone. A row without any gives 0.

    q (B, H, S, D), k, v (B, Hk, S, D); `allowed` broadcastable to (B, Hk, G, S, S). → (B, H, S, D)
    """
    s = logits(grouped(q, k.shape[1]), k[:, :, None], call)
    number, total, _ = softmax_terms(s, allowed, v[:, :, None], sink_column(call, s))
    return (number / total.clamp_min(torch.finfo(total.dtype).tiny)).flatten(1, 2).to(q.dtype)
