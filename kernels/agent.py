"""Agent attention: averaged queries read everything, and every token reads them.

o = softmax(Q Aᵀ · scale) · softmax(A Kᵀ · scale) · V, where the agents A are the queries averaged over cells of the
grid (n along each axis, fewer where the grid has fewer tokens), and the queries of the text as they are.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import grid, ops
from .call import Call, Cost, Shape, dense
from .masks import Layout
from .spec import Agent


def parameters(spec: Agent, heads: int, kv_heads: int, dim: int) -> nn.Module | None:
    """Nothing to learn."""
    return None


def cells(spec: Agent, layout: Layout) -> tuple[int, ...]:
    """How many agents there are along each axis."""
    wanted = grid.spread(spec.agents, len(layout.grid))
    return tuple(min(n, size) for n, size in zip(wanted, layout.grid, strict=True))


def agents(spec: Agent, layout: Layout, q: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    """The agents (B, H, A, D) of the queries, those of the text behind, and which are real (B, A), None where all."""
    if call.sink_logits is not None:
        raise ValueError("agent has two softmaxes: the learned sink logits of this model belong to neither")
    found = grid.averaged(grid.on_grid(layout, q), cells(spec, layout)).flatten(2, -2)
    real = None
    if call.valid is not None:
        real = F.pad(grid.beside_grid(layout, call.valid, axis=1), (found.shape[2], 0), value=True)
    return torch.cat([found, grid.beside_grid(layout, q)], 2), real


def reference(spec: Agent, q: Tensor, k: Tensor, v: Tensor, call: Call, learned: nn.Module | None = None) -> Tensor:
    """The definition, dense: q (B, H, S, D), k, v (B, Hk, S, D). → (B, H, S, D)"""
    layout = grid.layout_of(spec, k, call)
    a, _ = agents(spec, layout, q, call)
    real = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device) if call.valid is None else call.valid
    agent = torch.ones(a.shape[0], a.shape[2], dtype=torch.bool, device=q.device)
    for n in range(layout.text):
        place = n if n < layout.text_first else n + math.prod(layout.grid)
        agent[:, a.shape[2] - layout.text + n] = real[:, place]
    read = dense(a, k, v, call, real[:, None, None, None])
    return dense(q, a, read, call, agent[:, None, None, None])


def attend(
    spec: Agent, q: Tensor, k: Tensor, v: Tensor, call: Call, state: object = None, learned: nn.Module | None = None
) -> tuple[Tensor, None]:
    """The tokens q (B, H, S, D) read agents of k, v (B, Hk, S, D). → (B, H, S, D), no state"""
    a, real = agents(spec, grid.layout_of(spec, k, call), q, call)
    read = _all(a, k, v, call, call.valid)
    return _all(q, a, read, call, real), None


def _all(q: Tensor, k: Tensor, v: Tensor, call: Call, valid: Tensor | None) -> Tensor:
    where = ops.ranges([-1] * k.shape[1], q.device)
    more = {"scale": call.scale, "valid": valid, "softcap": call.softcap or 0.0}
    return ops.mixed_attention(q, k, v, where, causal=False, **more).o  # type: ignore[arg-type]


def prefill_cost(spec: Agent, shape: Shape, length: int) -> Cost:
    """Of all tokens at once: both softmaxes, and the averages."""
    layout = grid.checked(spec, shape.layout, length)
    count = math.prod(cells(spec, layout)) + layout.text
    return grid.cost(spec, shape, length, 2 * count * length, float(length * shape.queries * shape.dim))


def decode_cost(spec: Agent, shape: Shape, length: int) -> Cost:
    """There is none: a ValueError says so."""
    raise grid.no_decoding(spec)


def state_size(spec: Agent, shape: Shape, length: int) -> float:
    """Nothing is cached."""
    return 0.0
