"""Sparse-linear attention: softmax over the blocks that matter, linear attention over all the others beside it.

o_i = softmax over the blocks that `sparse` reads + P · (φ(q_i)ᵀ Σ φ(k_j) v_jᵀ / φ(q_i)ᵀ Σ φ(k_j)) over the others, with
φ = softmax over the head dimension and a projection P for each query head, in fp32, that starts at zero.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import grid, ops
from .call import Call, Cost, Shape, dense, grouped
from .linear import only
from .problem import EPS
from .sparse import choosing, chosen_blocks, pairs, read_pairs, stored
from .spec import Sla
from .torch_select import from_map


class Projection(nn.Module):
    """What takes the output of linear attention into that of softmax: `proj` (H, D, D), zeros at first."""

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Parameter(torch.zeros(heads, dim, dim))

    def forward(self, o: Tensor, linear: Tensor) -> Tensor:
        """o + linear · Pᵀ of each head, (B, H, S, D), computed in at least fp32"""
        wide = torch.promote_types(o.dtype, torch.float32)
        return (o.to(wide) + linear.to(wide) @ self.proj.to(wide).transpose(-1, -2)).to(o.dtype)


def parameters(spec: Sla, heads: int, kv_heads: int, dim: int) -> nn.Module | None:
    """The projections of the query heads."""
    return Projection(heads, dim)


def reference(spec: Sla, q: Tensor, k: Tensor, v: Tensor, call: Call, learned: nn.Module | None = None) -> Tensor:
    """The definition, dense: q (B, H, S, D), k, v (B, Hk, S, D). → (B, H, S, D)"""
    assert isinstance(learned, Projection)
    near = pairs(spec, q, k, call)[:, :, None]  # (B, Hk, 1, S, S)
    far = ~near
    if call.valid is not None:
        near, far = (x & call.valid[:, None, None, None, :] for x in (near, far))
    a = grouped(q.softmax(-1), k.shape[1]) @ k.softmax(-1)[:, :, None].transpose(-1, -2) * far
    linear = (a @ v[:, :, None] / (a.sum(-1, keepdim=True) + EPS)).flatten(1, 2)
    o: Tensor = learned(dense(q, k, v, call, near), linear)
    return o


@grid.uncompiled
def attend(
    spec: Sla, q: Tensor, k: Tensor, v: Tensor, call: Call, state: object = None, learned: nn.Module | None = None
) -> tuple[Tensor, None]:
    """The tokens q (B, H, S, D) read k, v (B, Hk, S, D) in one launch. → (B, H, S, D), no state"""
    assert isinstance(learned, Projection)
    order = stored(spec, grid.layout_of(spec, k, call))
    valid = grid.moved_mask(order, call.valid)
    q, k, v = grid.moved(order, q, k, v)
    read = chosen_blocks(spec, order, q, k, valid, call.scale)
    fq, fk = ops.feature_map(q, "softmax"), only(ops.feature_map(k, "softmax"), valid)
    out = ops.mixed_attention(
        q,
        k,
        v,
        from_map(read, (spec.block, spec.block), transposed=torch.is_grad_enabled()),
        causal=False,
        scale=call.scale,
        valid=valid,
        softcap=call.softcap or 0.0,
        sink_logits=call.sink_logits,
        branch=ops.branch(fq, fk, index=range(k.shape[1]), shared=False),
    )
    assert out.linear is not None
    return grid.moved_back(order, learned(out.o, out.linear)), None


def prefill_cost(spec: Sla, shape: Shape, length: int) -> Cost:
    """Of all tokens at once: the pairs that are read, the selection, the sums over keys, what rows read of them, P."""
    layout = grid.checked(spec, shape.layout, length)
    g, d = shape.queries, shape.dim
    sums = 2 * d * (d + 1) * length * (g + 1)
    return grid.cost(
        spec, shape, length, read_pairs(spec, layout), choosing(spec, shape, length) + sums + 2 * d * d * length * g
    )


def decode_cost(spec: Sla, shape: Shape, length: int) -> Cost:
    """There is none: a ValueError says so."""
    raise grid.no_decoding(spec)


def state_size(spec: Sla, shape: Shape, length: int) -> float:
    """Nothing is cached."""
    return 0.0
