"""From operators to kernels: what each operator of a site asks for, gathered into as few launches as there can be.

A prefill or a chunk asks for a `Piece`; pieces that read the same keys go into one launch of mixed attention, with the
window, the sinks and the linear branch chosen per KV group. A decode step asks for a `problem.Part`; all of them go
into one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .call import Call
from .problem import EMPTY, Extra


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """Mixed attention of some KV groups: keys (B, hp, K, D), the window `size` (−1: no limit) and its sinks.

    `sinks` are k, v (B, hp, P, D) and positions (B, P) in k, EMPTY where there is none. `fq`, `fk`, `weight` and
    `before` are those of a linear branch with a shared normaliser, whose state after the call goes to `keep`.
    """

    k: Tensor
    v: Tensor
    size: int
    valid: Tensor | None
    state: object
    sinks: tuple[Tensor, Tensor, Tensor] | None = None
    fq: Tensor | None = None
    fk: Tensor | None = None
    weight: Tensor | None = None
    before: Tensor | None = None


def mixed(
    q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece], groups: Sequence[Sequence[int]], call: Call
) -> tuple[Tensor, Tensor | None]:
    """One launch: piece n serves the KV groups groups[n] of q (B, H, Q, D), k, v (B, Hk, K, D).

    → (B, H, Q, D), and the state (B, Ht, F, D + 1) of the linear branches, in the order of their pieces.
    """
    owner = {g: n for n, members in enumerate(groups) for g in members}
    sizes = [pieces[owner[g]].size for g in range(k.shape[1])]
    tails = [n for n, p in enumerate(pieces) if p.fq is not None]
    branch = None
    if tails:
        order = [g for n in tails for g in groups[n]]
        index = [order.index(g) if g in order else -1 for g in range(k.shape[1])]
        befores = [pieces[n].before for n in tails]
        branch = ops.branch(
            _cat([pieces[n].fq for n in tails]),
            _cat([pieces[n].fk for n in tails]),
            index=index,
            shared=True,
            weight=torch.cat([w for n in tails if (w := pieces[n].weight) is not None]),
            state=None if befores[0] is None else _cat(befores),
        )
    out = ops.mixed_attention(
        q,
        k,
        v,
        ops.ranges(sizes, q.device),
        causal=call.causal,
        scale=call.scale,
        valid=pieces[0].valid,
        extra=_extras(pieces, groups, k),
        softcap=call.softcap or 0.0,
        sink_logits=call.sink_logits,
        branch=branch,
    )
    return out.o, out.state


def _cat(tensors: Sequence[Tensor | None]) -> Tensor:
    given = [x for x in tensors if x is not None]
    return given[0] if len(given) == 1 else torch.cat(given, 1)


def _extras(pieces: Sequence[Piece], groups: Sequence[Sequence[int]], k: Tensor) -> Extra | None:
    """The sinks of all pieces in one tensor; groups with fewer have empty slots."""
    slots = max([0, *[p.sinks[2].shape[1] for p in pieces if p.sinks is not None]])
    if not slots:
        return None
    if len(pieces) == 1 and pieces[0].sinks is not None:
        sink_k, sink_v, at = pieces[0].sinks
        return Extra(k=sink_k, v=sink_v, at=at[:, None].expand(-1, k.shape[1], -1).int().contiguous())
    shape = (k.shape[0], k.shape[1], slots, k.shape[3])
    keys, values = k.new_zeros(shape), k.new_zeros(shape)
    where = torch.full(shape[:3], EMPTY, dtype=torch.int32, device=k.device)
    for piece, members in zip(pieces, groups, strict=True):
        if piece.sinks is not None:
            sink_k, sink_v, at = piece.sinks
            index, n = torch.tensor(members, device=k.device), at.shape[1]
            keys = keys.index_copy(1, index, _padded(sink_k, slots))
            values = values.index_copy(1, index, _padded(sink_v, slots))
            where[:, members, :n] = at[:, None].expand(-1, len(members), -1).int()
    return Extra(k=keys, v=values, at=where)


def _padded(x: Tensor, slots: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, slots - x.shape[2]))
