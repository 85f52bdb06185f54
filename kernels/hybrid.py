"""Window + sinks + a linear tail under one normaliser.

A token leaves the window when it is `window` behind and then joins the linear state, so the tail is causal linear
attention over keys that arrive `window` tokens late. With scores s_ij and features φ,

    o_i = [Σ_near e^{s_ij} v_j + e^{c} Σ_tail φ(q_i)·φ(k_j) v_j] / [Σ_near e^{s_ij} + e^{c} Σ_tail φ(q_i)·φ(k_j)]

with a learned c per query head. Both sums are shifted by the same maximum, so their balance is that of the definition
whatever the size of the logits; LoLCATs shifts only the window, and its balance drifts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import linear, window
from .call import Call, Cost, Shape, grouped, logits, sink_column, softmax_terms
from .features import Hedgehog
from .spec import Hybrid, Linear, Window
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
    past = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    past = past if call.valid is None else past & call.valid[:, None, None, None, :]
    s = logits(grouped(q, k.shape[1]), k[:, :, None], call)
    number, total, top = softmax_terms(s, near, v[:, :, None], sink_column(call, s))
    a = learned.queries(grouped(q, k.shape[1])) @ learned.keys(k)[:, :, None].transpose(-1, -2)
    tail = (a * (past & ~near)) @ linear.with_ones(v, None, a.dtype)[:, :, None]
    return _join(number, total, top, tail, _weight(learned, number)).flatten(1, 2).to(q.dtype)


def attend(
    spec: Hybrid, q: Tensor, k: Tensor, v: Tensor, call: Call, state: object = None, learned: nn.Module | None = None
) -> tuple[Tensor, HybridState]:
    """The new tokens attend to window, sinks and tail. → (B, H, Q, D), state"""
    assert isinstance(learned, HybridParameters)
    if call.limit is not None:
        raise ValueError(f"this layer has a sliding window of {call.limit} tokens of its own: choose 'window' for it")
    state = state if isinstance(state, HybridState) else None
    band_k, band_v, sinks = window.extend(k, v, call, state, spec.sinks)
    held, new = band_k.shape[2] - k.shape[2], k.shape[2]
    qg = grouped(q, k.shape[1])
    parts: list[tuple[Tensor, ...]] = []
    for block in window.blocks(qg, band_k, band_v, sinks, held, spec.window, call):
        s = logits(block.q, block.k[:, :, None], call)
        terms = softmax_terms(s, block.allowed[:, None, None], block.v[:, :, None], sink_column(call, s))
        parts.append(tuple(block.restore(t) for t in terms))
    number, total, top = (torch.cat(x, 3)[..., :new, :] for x in zip(*parts, strict=True))
    late_k, late_v, left = _leaving(band_k, band_v, sinks[2], held, spec.window, call)
    values = linear.with_ones(late_v, left, number.dtype)
    tail, s = linear.scan(learned.queries(qg), learned.keys(late_k), values, state.s if state else None)
    o = _join(number, total, top, tail, _weight(learned, number)).flatten(1, 2).to(q.dtype)
    return o, HybridState(window.keep_last(band_k, spec.window), window.keep_last(band_v, spec.window), *sinks, s)


def _leaving(k: Tensor, v: Tensor, sink_at: Tensor, held: int, size: int, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """For each new token, the one that is `size` before it: k, v (B, Hk, Q, D) and whether it counts (B, Q).

    It does not count before the start, when it is padding, and when it is a sink, which the softmax part still reads.
    """
    new = k.shape[2] - held
    k, v = (F.pad(x, (0, 0, size - held, 0))[:, :, :new] for x in (k, v))
    at = torch.arange(call.seen - size, call.seen - size + new, device=k.device)
    counts = (at >= 0) & ~(sink_at[:, :, None] == at).any(1)  # (B, Q)
    if call.valid is not None:
        counts = counts & call.valid[:, at.clamp(min=0)]
    return k, v, counts


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
