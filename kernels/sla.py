"""Sparse-linear attention: softmax over the blocks that matter, linear attention over all the others beside it.

o_i = softmax over the blocks that `sparse` reads + P · (φ(q_i)ᵀ Σ φ(k_j) v_jᵀ / φ(q_i)ᵀ Σ φ(k_j)) over the others, with
φ = softmax over the head dimension (or another map that `linear` has) and a projection P for each query head, in fp32,
that starts at zero. A depthwise convolution of v may be added, as in `linear`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import grid, ops
from .call import Call, Cost, Shape, dense, grouped
from .features import Hedgehog
from .linear import features, local, only, plain_local
from .problem import EPS
from .sparse import choosing, chosen_blocks, pairs, read_pairs, stored
from .spec import Sla
from .torch_select import from_map


class Projection(nn.Module):
    """What takes the output of linear attention into that of softmax: `proj` (H, D, D), zeros at first.

    Beside it what linear attention learns: `maps`, and `conv` (H, D, k, k); None where the spec has none.
    """

    def __init__(self, heads: int, dim: int, maps: nn.Module | None = None, conv: int = 0) -> None:
        super().__init__()
        self.proj = nn.Parameter(torch.zeros(heads, dim, dim))
        self.maps = maps
        self.conv = nn.Parameter(torch.zeros(heads, dim, conv, conv)) if conv else None

    def forward(self, o: Tensor, linear: Tensor) -> Tensor:
        """o + linear · Pᵀ of each head, (B, H, S, D), computed in at least fp32"""
        wide = torch.promote_types(o.dtype, torch.float32)
        return (o.to(wide) + linear.to(wide) @ self.proj.to(wide).transpose(-1, -2)).to(o.dtype)


def parameters(spec: Sla, heads: int, kv_heads: int, dim: int) -> nn.Module | None:
    """The projections of the query heads, and what their linear attention learns."""
    maps = Hedgehog(heads, kv_heads, dim) if spec.feature_map == "hedgehog" else None
    return Projection(heads, dim, maps, spec.conv)


def reference(spec: Sla, q: Tensor, k: Tensor, v: Tensor, call: Call, learned: nn.Module | None = None) -> Tensor:
    """The definition, dense: q (B, H, S, D), k, v (B, Hk, S, D). → (B, H, S, D)"""
    assert isinstance(learned, Projection)
    near = pairs(spec, q, k, call)[:, :, None]  # (B, Hk, 1, S, S)
    far = ~near
    if call.valid is not None:
        near, far = (x & call.valid[:, None, None, None, :] for x in (near, far))
    fq, fk = features(spec, q, k, learned.maps)
    a = grouped(fq, k.shape[1]) @ fk[:, :, None].transpose(-1, -2) * far
    linear = (a @ v[:, :, None].to(a.dtype) / (a.sum(-1, keepdim=True) + EPS)).flatten(1, 2)
    o: Tensor = learned(dense(q, k, v, call, near), linear)
    return o if learned.conv is None else o + plain_local(v, learned.conv, grid.layout_of(spec, k, call))


def attend(
    spec: Sla, q: Tensor, k: Tensor, v: Tensor, call: Call, state: object = None, learned: nn.Module | None = None
) -> tuple[Tensor, None]:
    """The tokens q (B, H, S, D) read k, v (B, Hk, S, D) in one launch. → (B, H, S, D), no state"""
    assert isinstance(learned, Projection)
    layout, own = grid.layout_of(spec, k, call), v
    order = stored(spec, layout)
    valid = grid.moved_mask(order, call.valid)
    q, k, v = grid.moved(order, q, k, v)
    read = chosen_blocks(spec, order, q, k, valid, call.scale)
    fq, fk = features(spec, q, k, learned.maps)
    branch = ops.branch(fq, only(fk, valid), index=range(k.shape[1]), shared=False)
    where = from_map(read, (spec.block, spec.block), transposed=torch.is_grad_enabled())
    out = grid.mixed(q, k, v, where, valid, call, branch)
    assert out.linear is not None
    o: Tensor = grid.moved_back(order, learned(out.o, out.linear))
    return o if learned.conv is None else o + local(own, learned.conv, layout), None


def prefill_cost(spec: Sla, shape: Shape, length: int) -> Cost:
    """Of all tokens at once: the pairs that are read, the selection, the sums over keys, what rows read of them, P."""
    layout = grid.checked(spec, shape.layout, length)
    g, d = shape.queries, shape.dim
    hedgehog = spec.feature_map == "hedgehog"
    sums = 2 * d * (1 + hedgehog) * (d + 1) * length * (g + 1)
    maps = 2 * d * d * (g + 1) * length * hedgehog
    more = sums + maps + 2 * d * d * length * g + 2 * spec.conv**2 * d * math.prod(layout.grid) * g
    return grid.cost(spec, shape, length, read_pairs(spec, layout), choosing(spec, shape, length) + more)


def decode_cost(spec: Sla, shape: Shape, length: int) -> Cost:
    """There is none: a ValueError says so."""
    raise grid.no_decoding(spec)


def state_size(spec: Sla, shape: Shape, length: int) -> float:
    """Nothing is cached."""
    return 0.0
