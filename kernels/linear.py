"""Linear attention with learned feature maps, normalised; its memory does not grow with the length.

o_i = φ(q_i)ᵀ S_i / φ(q_i)ᵀ z_i with S_i = Σ_{j ≤ i} φ(k_j) v_jᵀ and z_i = Σ_{j ≤ i} φ(k_j), or over all j where the
call is not causal. S and z are one tensor: z is the last column, made by a column of ones beside v. The state is at
least fp32: a bf16 running sum loses terms.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from . import ops
from .call import Call, Cost, Shape, grouped
from .features import Hedgehog
from .problem import EPS, Part
from .spec import Linear
from .torch_linear import with_ones

CHUNK = 128  # tokens of a chunk in the cost model: pairs inside it are computed one by one


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
    a = grouped(learned.queries(q), k.shape[1]) @ learned.keys(k)[:, :, None].transpose(-1, -2)
    a = a.tril() if call.causal else a
    if call.valid is not None:
        a = a * call.valid[:, None, None, None, :]
    total = a.sum(-1, keepdim=True)
    return ((a @ v[:, :, None].to(a.dtype)) / (total + EPS)).flatten(1, 2).to(q.dtype)


def attend(
    spec: Linear, q: Tensor, k: Tensor, v: Tensor, call: Call, state: object = None, learned: nn.Module | None = None
) -> tuple[Tensor, LinearState | None]:
    """The new tokens attend to all before them through the state. → (B, H, Q, D), state; None where not causal"""
    assert isinstance(learned, Hedgehog)
    refuse_limit(call)
    fk = only(learned.keys(k), call.real(call.seen, call.seen + k.shape[2]))
    before = state.s if isinstance(state, LinearState) else None
    o, s = ops.linear_attention(learned.queries(q), fk, v, causal=call.causal, state=before)
    return o, None if s is None else LinearState(s)


def refuse_limit(call: Call) -> None:
    """A linear operator reads everything: it cannot stand in for the model's own window."""
    if call.limit is not None:
        raise ValueError(f"this layer has a sliding window of {call.limit} tokens of its own: choose 'window' for it")


def only(fk: Tensor, counts: Tensor | None) -> Tensor:
    """Features (B, Hk, K, F) of the keys that count (B, K); the others vanish from both sums."""
    return fk if counts is None else fk * counts[:, None, :, None]


def step(
    spec: Linear, q: Tensor, k: Tensor, v: Tensor, call: Call, state: object, learned: nn.Module | None = None
) -> tuple[Part, LinearState]:
    """One new token: added to the state."""
    assert isinstance(learned, Hedgehog)
    assert isinstance(state, LinearState)
    refuse_limit(call)
    add(state.s, learned.keys(k), v, None if call.valid is None else call.valid[:, -1:])
    return Part(first=0, k=k, v=v, used=0, fq=learned.queries(q)[:, :, 0], state=state.s), state


def add(s: Tensor, fk: Tensor, v: Tensor, counts: Tensor | None) -> None:
    """Adds φ(k) [v | 1] of one token, fk (B, Hk, 1, F), v (B, Hk, 1, D), to the state (B, Hk, F, D + 1), in place."""
    s += only(fk, counts).to(s.dtype).transpose(-1, -2) * with_ones(v, s.dtype)


def prefill_cost(spec: Linear, shape: Shape, length: int) -> Cost:
    """Of `length` tokens at once: feature maps, the state written and read, and where causal pairs inside chunks."""
    g, d, f = shape.queries, shape.dim, 2 * shape.dim
    maps = 2 * d * d * (g + 1)
    inside = 2 * min(CHUNK, length) * (f + d + 1) * g * shape.causal
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
    return 2 * shape.causal * shape.dim * (shape.dim + 1) * 4
