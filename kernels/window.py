"""Sliding window with sink tokens: softmax over the last `size` tokens and the first `sinks` real ones.

Where the call is not causal the window reaches as far in both directions: |i − j| < size, as in Longformer (Beltagy et
al., 2020), whose global first token is a sink here.

The work and the memory grow with S × size. What is kept between calls is a ring of `size` keys and values, and the
sinks after it: token p is in slot p % size, sink n in slot size + n.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .call import Call, Cost, Shape, dense
from .launch import Piece
from .problem import EMPTY, Part
from .spec import Window

if TYPE_CHECKING:
    from .span import SpanState


@dataclass
class WindowState:
    """k, v (B, Hk, size + sinks, D); `sink_at` (B, sinks) positions, −1 = not yet.

    `real` (B, size) says which ring slots hold real tokens; None when all tokens so far are real.
    """

    k: Tensor
    v: Tensor
    sink_at: Tensor
    real: Tensor | None


def parameters(spec: Window, heads: int, kv_heads: int, dim: int) -> nn.Module | None:
    """A window adds nothing to learn."""
    return None


def sink_positions(call: Call, batch: int, length: int, sinks: int, device: torch.device) -> Tensor:
    """(B, sinks): where the first real tokens of each row stand among the `length` seen; −1 = fewer are there."""
    if call.valid is None:
        at = torch.arange(sinks, device=device).expand(batch, -1)
        return torch.where(at < length, at, -1)
    valid = call.valid[:, :length]
    is_slot = valid[:, None] & (valid.long().cumsum(-1)[:, None] == torch.arange(1, sinks + 1, device=device)[:, None])
    return torch.where(is_slot.any(-1), is_slot.long().argmax(-1), -1)


def allowed_pairs(spec: Window, call: Call, batch: int, length: int, device: torch.device) -> Tensor:
    """(1 or B, S, S) dense mask of the definition, for references and profiling."""
    i = torch.arange(length, device=device)
    size = width(spec, call)
    distance = i[:, None] - i
    reached = call.reach(distance)
    near = (reached & (distance.abs() < size))[None]
    sink_at = sink_positions(call, batch if call.valid is not None else 1, length, spec.sinks, device)
    is_sink = (sink_at[:, :, None] == i).any(1)  # (B, S)
    allowed = near | (is_sink[:, None] & reached)
    return allowed if call.valid is None else allowed & call.valid[:, None, :length]


def width(spec: Window, call: Call) -> int:
    """The window, or the model's own where that is smaller."""
    return spec.size if call.limit is None else min(spec.size, call.limit)


def reference(spec: Window, q: Tensor, k: Tensor, v: Tensor, call: Call, learned: nn.Module | None = None) -> Tensor:
    """The definition, dense: q (B, H, S, D), k, v (B, Hk, S, D), no state. → (B, H, S, D)"""
    allowed = allowed_pairs(spec, call, q.shape[0], q.shape[2], q.device)[:, None, None]
    return dense(q, k, v, call, allowed)


def piece(
    spec: Window, q: Tensor, k: Tensor, v: Tensor, call: Call, state: object = None, learned: nn.Module | None = None
) -> Piece:
    """The new tokens attend to their windows and the sinks."""
    size = width(spec, call)
    band_k, band_v, first, sinks = band(k, v, call, state, size, spec.sinks)
    valid = None if call.valid is None else call.valid[:, first:]
    sink_k, sink_v, at = sinks
    shifted = torch.where(at >= 0, at - first, EMPTY)
    return Piece(
        k=band_k,
        v=band_v,
        size=size,
        valid=valid,
        sinks=(sink_k, sink_v, shifted) if spec.sinks else None,
        state=held(band_k, band_v, call, first, sinks, size) if call.keep else None,
    )


def band(
    k: Tensor, v: Tensor, call: Call, state: object, size: int, sinks: int
) -> tuple[Tensor, Tensor, int, tuple[Tensor, Tensor, Tensor]]:
    """The ring in order, then the new tokens (B, Hk, R + Q, D); the position of its first; the sinks after them."""
    old = state if isinstance(state, WindowState) else None
    held = None if old is None else (old.k[:, :, size:], old.v[:, :, size:])
    found = find_sinks(k, v, call, held, sinks)
    if old is None:
        return k, v, call.seen, found
    count = min(call.seen, size)
    order = torch.arange(call.seen - count, call.seen, device=k.device) % size
    k, v = (torch.cat([x.index_select(2, order), new], 2) for x, new in ((old.k, k), (old.v, v)))
    return k, v, call.seen - count, found


def find_sinks(
    k: Tensor, v: Tensor, call: Call, held: tuple[Tensor, Tensor] | None, sinks: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values (B, Hk, sinks, D) of the sinks, from those `held` and the new tokens, and where they stand."""
    at = sink_positions(call, k.shape[0], call.seen + k.shape[2], sinks, k.device)
    fresh = at >= call.seen  # found among the new tokens
    index = (at - call.seen).clamp(min=0)[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
    picked = []
    for n, x in enumerate((k, v)):
        kept = torch.zeros_like(x[:, :, :1]).expand(-1, -1, sinks, -1) if held is None else held[n]
        picked.append(torch.where(fresh[:, None, :, None], x.gather(2, index), kept) if sinks else kept)
    return picked[0], picked[1], at


def held(k: Tensor, v: Tensor, call: Call, first: int, sinks: tuple[Tensor, Tensor, Tensor], size: int) -> WindowState:
    """The state after the new tokens: the last of k, v (B, Hk, K, D) in their ring slots, and the sinks.

    `first` is the position of the first of them.
    """
    count, total = min(size, k.shape[2]), first + k.shape[2]
    slot = torch.arange(total - count, total, device=k.device) % size
    rings = []
    for x, sink in ((k, sinks[0]), (v, sinks[1])):
        ring = torch.cat([x.new_zeros(*x.shape[:2], size, x.shape[3]), sink.to(x.dtype)], 2)
        rings.append(ring.index_copy(2, slot, x[:, :, x.shape[2] - count :]))
    real = None
    if call.valid is not None:
        real = torch.zeros(k.shape[0], size, dtype=torch.bool, device=k.device)
        real[:, slot] = call.valid[:, total - count : total]
    return WindowState(rings[0], rings[1], sinks[2], real)


def step(
    spec: Window, q: Tensor, k: Tensor, v: Tensor, call: Call, state: object, learned: nn.Module | None = None
) -> tuple[Part, WindowState]:
    """One new token: written into the ring, and among the sinks while some are missing."""
    assert isinstance(state, WindowState)
    size, at = width(spec, call), call.seen
    slot = at % size
    real, sink_at = state.real, state.sink_at
    if call.valid is None:
        state.k[:, :, slot], state.v[:, :, slot] = k[:, :, 0], v[:, :, 0]
        if at < spec.sinks:
            state.k[:, :, size + at], state.v[:, :, size + at] = k[:, :, 0], v[:, :, 0]
            sink_at = sink_at.clone()
            sink_at[:, at] = at
        used = min(at + 1, size) + min(max(0, at + 1 - size), spec.sinks)
        state = WindowState(state.k, state.v, sink_at, None)
        return Part(first=0, k=state.k, v=state.v, used=used), state
    state = fixed(spec, state, at, None) if real is None else state  # all were real until now
    return fixed_step(spec, q, k, v, dataclasses.replace(call, at=torch.full((1,), at, device=k.device)), state)


def fixed(spec: Window, state: object, length: int, room: int | None) -> WindowState:
    """The state after `length` tokens with `real` in any case; its shape is fixed as it is."""
    assert isinstance(state, WindowState)
    size = state.k.shape[2] - state.sink_at.shape[1]
    real = state.real
    if real is None:
        real = (torch.arange(size, device=state.k.device) < length).expand(state.k.shape[0], -1)
    return dataclasses.replace(state, sink_at=state.sink_at.clone(), real=real.clone())


def fixed_step(
    spec: Window, q: Tensor, k: Tensor, v: Tensor, call: Call, state: object, learned: nn.Module | None = None
) -> tuple[Part, WindowState]:
    """One new token at `call.at`: written into the ring, and among the sinks of the rows that lack one."""
    assert isinstance(state, WindowState)
    assert state.real is not None
    assert call.at is not None
    size, at = width(spec, call), call.at
    slot = at % size
    now = torch.ones_like(state.real[:, :1]) if call.valid is None else call.valid.index_select(1, at)
    state.k.index_copy_(2, slot, k)
    state.v.index_copy_(2, slot, v)
    state.real.index_copy_(1, slot, now)
    add_sink(state, k, v, at, now)
    mask = torch.cat([state.real, (state.sink_at >= 0) & (state.sink_at <= at - size)], 1)
    return Part(first=0, k=state.k, v=state.v, used=state.k.shape[2], mask=mask), state


def add_sink(state: WindowState | SpanState, k: Tensor, v: Tensor, at: Tensor, now: Tensor) -> None:
    """The new token k, v (B, Hk, 1, D) becomes the next sink of the rows that lack one and have it `now` (B, 1)."""
    sinks = state.sink_at.shape[1]
    if sinks:
        missing = state.sink_at < 0
        first = missing & (missing.long().cumsum(1) == 1) & now
        state.sink_at.copy_(torch.where(first, at, state.sink_at))
        for x, new in ((state.k, k), (state.v, v)):
            x[:, :, -sinks:] = torch.where(first[:, None, :, None], new, x[:, :, -sinks:])


def prefill_cost(spec: Window, shape: Shape, length: int) -> Cost:
    """Of `length` tokens at once: the pairs of the definition; sinks count once they have left the window."""
    near = min(spec.size, length)
    pairs = near * (near + 1) / 2 + (length - near) * spec.size
    pairs += sum(max(0, length - spec.size - sink) for sink in range(spec.sinks))
    if not shape.causal:  # as many again on the other side, the diagonal once
        pairs += near * (near - 1) / 2 + (length - near) * (spec.size - 1)
        pairs += sum(max(0, sink - spec.size + 1) for sink in range(min(spec.sinks, length)))
    io = (2 * shape.queries + 2) * length * shape.dim * shape.element
    return Cost(flops=4 * pairs * shape.queries * shape.dim, bytes=io, state_bytes=state_size(spec, shape, length))


def decode_cost(spec: Window, shape: Shape, length: int) -> Cost:
    """Of one token after `length - 1`."""
    keys = min(length, spec.size) + min(spec.sinks, max(0, length - spec.size))
    kept = state_size(spec, shape, length)
    return Cost(flops=4 * keys * shape.queries * shape.dim, bytes=kept, state_bytes=kept)


def state_size(spec: Window, shape: Shape, length: int) -> float:
    """Bytes cached, whatever the length: the ring and the sinks."""
    return 2 * shape.causal * (spec.size + spec.sinks) * shape.dim * shape.element
