"""Window + sinks + a linear tail under one normaliser.

A token leaves the window when it is `window` behind and then joins the linear state, so the tail is causal linear
attention over keys that arrive `window` tokens late; where the call is not causal, the tail is everything outside the
window. With scores s_ij and features φ,

    o_i = [Σ_near e^{s_ij} v_j + e^{c} Σ_tail φ(q_i)·φ(k_j) v_j] / [Σ_near e^{s_ij} + e^{c} Σ_tail φ(q_i)·φ(k_j)]

with a learned c per query head. Both sums are shifted by the same maximum, so their balance is that of the definition
whatever the size of the logits; LoLCATs shifts only the window, and its balance drifts.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import linear, window
from .call import Call, Cost, Shape, grouped, logits, refuse_limit, sink_column, softmax_terms
from .features import Hedgehog
from .launch import Piece
from .problem import EMPTY, Part
from .spec import Hybrid, Linear, Window
from .torch_linear import with_ones
from .window import WindowState


@dataclass
class HybridState(WindowState):
    """The window's state and, for what left it, [S | z] (B, Hk, 2D, D + 1)."""

    s: Tensor


TAIL = 0.5  # where c starts: on SmolLM2 the tail then helps from the first step


class HybridParameters(Hedgehog):
    """Feature maps and c, the log-weight of the tail, per query head."""

    def __init__(self, heads: int, kv_heads: int, dim: int) -> None:
        super().__init__(heads, kv_heads, dim)
        self.tail = nn.Parameter(torch.full((heads,), TAIL))  # (H,)


def parameters(spec: Hybrid, heads: int, kv_heads: int, dim: int) -> nn.Module | None:
    """Feature maps and tail weights."""
    return HybridParameters(heads, kv_heads, dim)


def _window(spec: Hybrid) -> Window:
    return Window(size=spec.window, sinks=spec.sinks)


def _join(number: Tensor, total: Tensor, top: Tensor, tail: Tensor, weight: Tensor) -> Tensor:
    """Window terms (…, D), (…, 1), (…, 1) and the tail (…, D + 1) under one normaliser; `weight` is c."""
    shift = torch.maximum(top, weight.detach())
    near, far = torch.exp(top - shift), torch.exp(weight - shift)
    total = total * near + tail[..., -1:] * far
    return (number * near + tail[..., :-1] * far) / total.clamp_min(torch.finfo(total.dtype).tiny)


def _weight(learned: HybridParameters, like: Tensor) -> Tensor:
    return learned.tail.to(like.dtype).reshape(*like.shape[1:3], 1, 1)


def reference(spec: Hybrid, q: Tensor, k: Tensor, v: Tensor, call: Call, learned: nn.Module | None = None) -> Tensor:
    """The definition, dense: q (B, H, S, D), k, v (B, Hk, S, D), no state. → (B, H, S, D)"""
    assert isinstance(learned, HybridParameters)
    length = q.shape[2]
    near = window.allowed_pairs(_window(spec), call, q.shape[0], length, q.device)[:, None, None]
    past = torch.ones(length, length, dtype=torch.bool, device=q.device)
    past = past.tril() if call.causal else past
    past = past if call.valid is None else past & call.valid[:, None, None, None, :]
    s = logits(grouped(q, k.shape[1]), k[:, :, None], call)
    number, total, top = softmax_terms(s, near, v[:, :, None], sink_column(call, s))
    a = grouped(learned.queries(q), k.shape[1]) @ learned.keys(k)[:, :, None].transpose(-1, -2)
    tail = (a * (past & ~near)) @ with_ones(v, number.dtype)[:, :, None].to(a.dtype)
    return _join(number, total, top, tail, _weight(learned, number)).flatten(1, 2).to(q.dtype)


def piece(
    spec: Hybrid, q: Tensor, k: Tensor, v: Tensor, call: Call, state: object = None, learned: nn.Module | None = None
) -> Piece:
    """The new tokens attend to window, sinks and tail."""
    assert isinstance(learned, HybridParameters)
    refuse_limit(call)
    band_k, band_v, first, sinks = window.band(k, v, call, state, spec.window, spec.sinks)
    sink_k, sink_v, at = sinks
    # a sink is read by the softmax part for ever, padding by nothing: neither joins the tail
    positions = torch.arange(first, first + band_k.shape[2], device=k.device)
    counts = ~(at[:, :, None] == positions).any(1)  # (B, K)
    valid = None if call.valid is None else call.valid[:, first:]
    near = window.held(band_k, band_v, call, first, sinks, spec.window) if call.keep else None
    before = state.s if isinstance(state, HybridState) else None
    return Piece(
        k=band_k,
        v=band_v,
        size=spec.window,
        valid=valid,
        sinks=(sink_k, sink_v, torch.where(at >= 0, at - first, EMPTY)) if spec.sinks else None,
        state=HybridState(**vars(near), s=k.new_empty(0)) if near is not None else None,
        fq=learned.queries(q),
        fk=linear.only(learned.keys(band_k), counts if valid is None else counts & valid),
        weight=learned.tail,
        before=before,
    )


def step(
    spec: Hybrid, q: Tensor, k: Tensor, v: Tensor, call: Call, state: object, learned: nn.Module | None = None
) -> tuple[Part, HybridState]:
    """One new token: the one that leaves the window for it joins the tail."""
    assert isinstance(learned, HybridParameters)
    assert isinstance(state, HybridState)
    refuse_limit(call)
    if call.valid is not None:
        state = state if state.real is not None else fixed(spec, state, call.seen, None)
        at = torch.full((1,), call.seen, device=k.device)
        return fixed_step(spec, q, k, v, dataclasses.replace(call, at=at), state, learned)
    leaving = call.seen - spec.window
    if leaving >= spec.sinks:
        slot = slice(leaving % spec.window, leaving % spec.window + 1)
        linear.add(state.s, learned.keys(state.k[:, :, slot]), state.v[:, :, slot], None)
    part, near = window.step(_window(spec), q, k, v, call, state)
    return _with_tail(part, q, state.s, learned), HybridState(**vars(near), s=state.s)


def _with_tail(part: Part, q: Tensor, s: Tensor, learned: HybridParameters) -> Part:
    """The window's part with the linear branch beside it."""
    return dataclasses.replace(part, fq=learned.queries(q)[:, :, 0], state=s, weight=learned.tail)


def fixed(spec: Hybrid, state: object, length: int, room: int | None) -> HybridState:
    """The state after `length` tokens with `real` in any case; its shape is fixed as it is."""
    assert isinstance(state, HybridState)
    return HybridState(**vars(window.fixed(_window(spec), state, length, room)) | {"s": state.s.clone()})


def fixed_step(
    spec: Hybrid, q: Tensor, k: Tensor, v: Tensor, call: Call, state: object, learned: nn.Module | None = None
) -> tuple[Part, HybridState]:
    """One new token at `call.at`: what is in its slot leaves the window and joins the tail, if it is real, no sink."""
    assert isinstance(learned, HybridParameters)
    assert isinstance(state, HybridState)
    assert state.real is not None
    assert call.at is not None
    refuse_limit(call)
    slot = call.at % spec.window
    sink = (state.sink_at == call.at - spec.window).any(1, keepdim=True)
    leaves = state.real.index_select(1, slot) & ~sink  # (B, 1)
    old_k, old_v = state.k.index_select(2, slot), state.v.index_select(2, slot)
    linear.add(state.s, learned.keys(old_k), old_v, leaves)
    part, _ = window.fixed_step(_window(spec), q, k, v, call, state)
    return _with_tail(part, q, state.s, learned), state


def prefill_cost(spec: Hybrid, shape: Shape, length: int) -> Cost:
    """Of `length` tokens at once: the window's and the tail's."""
    near = window.prefill_cost(_window(spec), shape, length)
    tail = linear.prefill_cost(Linear(feature_map=spec.feature_map), shape, length)
    return Cost(flops=near.flops + tail.flops, bytes=near.bytes, state_bytes=state_size(spec, shape, length))


def decode_cost(spec: Hybrid, shape: Shape, length: int) -> Cost:
    """Of one token after `length - 1`."""
    near = window.decode_cost(_window(spec), shape, length)
    tail = linear.decode_cost(Linear(feature_map=spec.feature_map), shape, length)
    return Cost(
        flops=near.flops + tail.flops, bytes=near.bytes + tail.bytes, state_bytes=near.state_bytes + tail.state_bytes
    )


def state_size(spec: Hybrid, shape: Shape, length: int) -> float:
    """Bytes kept: ring, sinks and the fp32 state."""
    near = window.state_size(_window(spec), shape, length)
    return near + linear.state_size(Linear(feature_map=spec.feature_map), shape, length)
