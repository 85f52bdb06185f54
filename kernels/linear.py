"""Causal linear attention with learned feature maps, normalised; its memory does not grow with the length.

o_i = φ(q_i)ᵀ S_i / φ(q_i)ᵀ z_i with S_i = Σ_{j ≤ i} φ(k_j) v_jᵀ and z_i = Σ_{j ≤ i} φ(k_j). S and z are one tensor:
z is the last column, made by a column of ones beside v. The state is at least fp32: a bf16 running sum loses terms.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .call import Call, Cost, Shape, grouped
from .features import Hedgehog
from .spec import Linear

CHUNK = 128
EPS = 1e-6


@dataclass
class LinearState:
    """[S | z]: (B, Hk, 2D, D + 1), fp32 or wider."""

    s: Tensor


def parameters(spec: Linear, heads: int, kv_heads: int, dim: int) -> nn.Module | None:
    """The feature maps of the query heads and of their KV heads."""
    return Hedgehog(heads, kv_heads, dim)


def reference(spec: Linear, q: Tensor, k: Tensor, v: Tensor, call: Call, learned: nn.Module | None = None) -> Tensor:
    """The definition, dense: q (B, H, S, D), k, v (B, Hk, S, D), no state. → (B, H, S, D)"""
    assert isinstance(learned, Hedgehog)
    a = learned.queries(grouped(q, k.shape[1])) @ learned.keys(k)[:, :, None].transpose(-1, -2)
    a = a.tril()
    if call.valid is not None:
        a = a * call.valid[:, None, None, None, :]
    total = a.sum(-1, keepdim=True)
    return ((a @ v[:, :, None].to(a.dtype)) / (total + EPS)).flatten(1, 2).to(q.dtype)


def attend(
    spec: Linear, q: Tensor, k: Tensor, v: Tensor, call: Call, state: object = None, learned: nn.Module | None = None
) -> tuple[Tensor, LinearState]:
    """The new tokens attend to all before them through the state. → (B, H, Q, D), state"""
    assert isinstance(learned, Hedgehog)
    if call.limit is not None:
        raise ValueError(f"this layer has a sliding window of {call.limit} tokens of its own: choose 'window' for it")
    fq, fk = learned.queries(grouped(q, k.shape[1])), learned.keys(k)
    values = with_ones(v, call.real(call.seen, call.seen + q.shape[2]), fk.dtype)
    o, s = scan(fq, fk, values, state.s if isinstance(state, LinearState) else None)
    o = o[..., :-1] / (o[..., -1:] + EPS)
    return o.flatten(1, 2).to(q.dtype), LinearState(s)


def with_ones(v: Tensor, real: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(B, Hk, Q, D + 1): v and a column of ones, zero at padding, so that pads vanish from both sums."""
    values = F.pad(v.to(dtype), (0, 1), value=1.0)
    return values if real is None else values * real[:, None, :, None]


def scan(fq: Tensor, fk: Tensor, v: Tensor, s: Tensor | None) -> tuple[Tensor, Tensor]:
    """Causal Σ_{j ≤ i} (φ(q_i)·φ(k_j)) v_j in chunks, from the state `s`.

    Args:
        fq: (B, Hk, G, Q, F); fk: (B, Hk, Q, F); v: (B, Hk, Q, E); s: (B, Hk, F, E) or None for zeros.

    Returns:
        (B, Hk, G, Q, E) and the state after the last token.
    """
    new = v.shape[2]
    chunk = min(CHUNK, new)
    count = -(-new // chunk)
    pad = count * chunk - new
    fq = F.pad(fq, (0, 0, 0, pad)).unflatten(3, (count, chunk)).transpose(2, 3)  # (B, Hk, n, G, C, F)
    fk, v = (F.pad(x, (0, 0, 0, pad)).unflatten(2, (count, chunk)) for x in (fk, v))  # (B, Hk, n, C, ·)
    sums = (fk.transpose(-1, -2) @ v).cumsum(2)  # (B, Hk, n, F, E), through each chunk
    sums = sums if s is None else sums + s[:, :, None]
    first = torch.zeros_like(sums[:, :, :1]) if s is None else s[:, :, None]
    before = torch.cat([first, sums[:, :, :-1]], 2)
    group = fq.shape[3]
    inside = (fq @ fk[:, :, :, None].transpose(-1, -2)).tril()  # (B, Hk, n, G, C, C)
    o = inside.flatten(3, 4) @ v + fq.flatten(3, 4) @ before
    o = o.unflatten(3, (group, chunk)).transpose(2, 3).flatten(3, 4)
    return o[..., :new, :], sums[:, :, -1]


def prefill_cost(spec: Linear, shape: Shape, length: int) -> Cost:
    """Of `length` tokens at once: feature maps, pairs inside chunks, the state read and written."""
    g, d, f = shape.queries, shape.dim, 2 * shape.dim
    maps = 2 * d * d * (g + 1)
    inside = 2 * min(CHUNK, length) * (f + d + 1) * g
    across = 2 * f * (d + 1) * (g + 1)
    io = (2 * g + 2) * length * d * shape.element
    return Cost(flops=length * (maps + inside + across), bytes=io, state_bytes=state_size(spec, shape, length))


def decode_cost(spec: Linear, shape: Shape, length: int) -> Cost:
    """Of one token, whatever came before."""
    held = state_size(spec, shape, length)
    flops = prefill_cost(spec, shape, 1).flops
    return Cost(flops=flops, bytes=2 * held, state_bytes=held)


def state_size(spec: Linear, shape: Shape, length: int) -> float:
    """Bytes of the fp32 state."""
    return 2 * shape.dim * (shape.dim + 1) * 4
