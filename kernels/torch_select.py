"""Block selection in torch: pooled scores → lists of key blocks, and lists from any map of blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import Blocks, Pooled


def selection(p: Pooled) -> Blocks:
    """The definition in `problem.Pooled`. The largest tensor is (B, Hk, NQ, NK)."""
    groups = p.k.shape[1]
    q = _pooled(p.q, p.block[0]).unflatten(1, (groups, -1)).mean(2)  # (B, Hk, NQ, D)
    k = _pooled(p.k, p.block[1])
    s = (q * p.scale) @ k.transpose(-1, -2)
    rows, columns = (torch.arange(n, device=s.device) for n in s.shape[-2:])
    forced = (columns < p.first).expand(len(rows), -1)
    if p.causal:
        shift = p.k.shape[2] - p.q.shape[2]
        last = torch.clamp((rows + 1) * p.block[0], max=p.q.shape[2]) - 1 + shift
        open_ = columns * p.block[1] <= last[:, None]
        s = s.masked_fill(~open_, -torch.inf)
        first = rows * p.block[0] + shift
        diagonal = ((columns + 1) * p.block[1] > first[:, None]) & open_
        forced = (forced & open_) | diagonal
    probability = s.softmax(-1)
    order = torch.where(forced, 2.0, probability).sort(dim=-1, descending=True, stable=True)  # forced ones come first
    rank = torch.arange(s.shape[-1], device=s.device)
    if p.mass is not None:
        share = probability.gather(-1, order.indices)
        taken = share.cumsum(-1) - share < p.mass
    else:
        assert p.keep is not None
        taken = rank < p.keep
    taken = taken | (order.values == 2.0)
    chosen = torch.zeros_like(s, dtype=torch.bool).scatter(-1, order.indices, taken.expand_as(order.indices))
    chosen = chosen & torch.isfinite(s)
    return from_map(chosen, p.block)


def _pooled(x: Tensor, size: int) -> Tensor:
    """(B, H, S, D) → (B, H, ⌈S / size⌉, D): means of blocks, the last over the tokens it has."""
    pad = -x.shape[2] % size
    y = F.pad(x.float(), (0, 0, 0, pad)).unflatten(2, (-1, size)).sum(3)
    count = torch.full((y.shape[2],), size, device=x.device, dtype=y.dtype)
    count[-1] = size - pad
    means: Tensor = y / count[:, None]
    return means


def from_map(
    chosen: Tensor,
    block: tuple[int, int],
    kinds: Tensor | None = None,
    patterns: Tensor | None = None,
    transposed: bool = True,
) -> Blocks:
    """Lists from chosen (Bl, Hl, NQ, NK) bool and the kind of each block, same shape.

    Those by key block (`transposed`) are for gradients only.
    """
    columns, starts, counts = _lists(chosen)
    t_columns, t_starts, t_counts = _lists(chosen.transpose(-1, -2)) if transposed else (None, None, None)
    return Blocks(
        block=block,
        starts=starts,
        counts=counts,
        columns=columns,
        kinds=None if kinds is None else kinds[chosen].int(),
        patterns=patterns,
        t_starts=t_starts,
        t_counts=t_counts,
        t_columns=t_columns,
        t_kinds=None if kinds is None else kinds.transpose(-1, -2)[chosen.transpose(-1, -2)].int(),
    )


def _lists(chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    counts = chosen.sum(-1)
    flat = counts.flatten()
    starts = (flat.cumsum(0) - flat).reshape(counts.shape)
    return chosen.nonzero()[:, -1].int(), starts.int(), counts.int()
