"""Taylor attention: linear attention whose weights are the second-order Taylor expansion of exp, in few dimensions.

o_i = Σ_{j ≤ i} w_ij v_j / Σ_{j ≤ i} w_ij with w_ij = 1 + s_ij + s_ij² / 2 and s_ij = (W_q q_i) · (W_k k_j); W_q and W_k
(D → size) are learned, one for each head. Source: Based (Arora et al., 2024).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnconvert.kernels import ops
from attnconvert.kernels.call import Call, Cost, Shape, grouped, refuse_limit
from attnconvert.kernels.linear import LinearState
from attnconvert.kernels.problem import EPS
from attnconvert.kernels.spec import operator


@operator("taylor")
@dataclass(frozen=True, kw_only=True)
class Taylor:
    """Linear attention with weights 1 + s + s² / 2, where s is a product in `size` learned dimensions."""

    size: int = 16

    def __post_init__(self) -> None:
        if self.size < 8 or self.size % 8:
            raise ValueError(f"size must be a multiple of 8, not {self.size!r}")


def parameters(spec: Taylor, heads: int, kv_heads: int, dim: int) -> nn.Module:
    """W_q (H, D, size) and W_k (Hk, D, size); their product starts with the 1/√D of attention."""
    start = torch.eye(dim, spec.size) * dim**-0.25
    return nn.ParameterDict({"query": start.repeat(heads, 1, 1), "key": start.repeat(kv_heads, 1, 1)})


def features(x: Tensor, weight: Tensor) -> Tensor:
    """φ with φ(q) · φ(k) = 1 + s + s² / 2. (B, H, S, D) → (B, H, S, 8 + size + size²)"""
    y = x.to(weight.dtype) @ weight
    one = y.new_full((*y.shape[:-1], 8), 8**-0.5)  # eight that make 1: kernels take multiples of 8
    return torch.cat([one, y, (y[..., :, None] * y[..., None, :]).flatten(-2) * 2**-0.5], -1).to(x.dtype)


def reference(spec: Taylor, q: Tensor, k: Tensor, v: Tensor, call: Call, learned: nn.ParameterDict) -> Tensor:
    """The definition, dense: q (B, H, S, D), k, v (B, Hk, S, D) → (B, H, S, D)"""
    a, b = q.to(v.dtype) @ learned["query"], k @ learned["key"]
    s = grouped(a, k.shape[1]) @ b[:, :, None].transpose(-1, -2)  # (B, Hk, G, S, S)
    w = 1 + s + s.square() / 2
    w = w.tril() if call.causal else w
    w = w if call.valid is None else w * call.valid[:, None, None, None]
    return ((w @ v[:, :, None]) / (w.sum(-1, keepdim=True) + EPS)).flatten(1, 2)


def attend(
    spec: Taylor, q: Tensor, k: Tensor, v: Tensor, call: Call, state: LinearState | None, learned: nn.ParameterDict
) -> tuple[Tensor, LinearState | None]:
    """The new tokens, after those in the state (B, Hk, F, D + 1). → (B, H, Q, D), the new state"""
    refuse_limit(call)  # it reads beyond a sliding window of the model's own
    fq, fk = features(q, learned["query"]), features(k, learned["key"])
    if (real := call.real(call.seen, call.seen + k.shape[2])) is not None:
        fk = fk * real[:, None, :, None]  # padding vanishes from both sums
    o, s = ops.linear_attention(fq, fk, v, causal=call.causal, state=None if state is None else state.s)
    return o, None if s is None else LinearState(s)


def prefill_cost(spec: Taylor, shape: Shape, length: int) -> Cost:
    """Of one KV group: projections and features, the state written and read, and pairs inside the kernel's chunks."""
    g, d, f = shape.queries, shape.dim, 8 + spec.size + spec.size**2
    inside = 2 * min(128, length) * (f + d + 1) * g * shape.causal
    flops = length * ((g + 1) * (2 * d * spec.size + 2 * f * (d + 1)) + inside)
    moved = (2 * g + 2) * length * d * shape.element
    return Cost(flops=float(flops), bytes=moved, state_bytes=state_size(spec, shape, length))


def decode_cost(spec: Taylor, shape: Shape, length: int) -> Cost:
    """Of one token, whatever came before."""
    held = state_size(spec, shape, length)
    return Cost(flops=prefill_cost(spec, shape, 1).flops, bytes=2 * held, state_bytes=held)


def state_size(spec: Taylor, shape: Shape, length: int) -> float:
    """Bytes between calls, whatever the length: the fp32 state. Rows that read both ways leave none."""
    return 4.0 * (8 + spec.size + spec.size**2) * (shape.dim + 1) * shape.causal
