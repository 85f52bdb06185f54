"""Block-sparse attention on a grid: softmax over the blocks of keys that matter most to a block of rows.

For a block of rows n and a block of keys m without text, the scores are softmax_m(q̄_n · k̄_m · scale), averaged over the
query heads of a group; q̄ and k̄ are means over the block. Blocks that hold text are read by all, and rows of such blocks
read everything. The selection has no gradient.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import grid
from .call import Call, Cost, Shape, dense, grouped
from .masks import Layout
from .masks_relations import stored_order
from .spec import Sla, Sparse
from .top_blocks import pooled
from .torch_select import from_map

Spec = Sparse | Sla


def parameters(spec: Sparse, heads: int, kv_heads: int, dim: int) -> nn.Module | None:
    """Nothing to learn."""
    return None


def stored(spec: Spec, layout: Layout) -> Layout:
    """The order in which the tokens are cut into blocks."""
    return grid.in_tiles(layout, spec.tile) if spec.tile else layout


def with_text(spec: Spec, order: Layout) -> Tensor:
    """(M,) bool: which blocks of tokens hold text."""
    place = torch.from_numpy(stored_order(order)) - order.text_first
    text = (place < 0) | (place >= math.prod(order.grid))
    found: Tensor = F.pad(text, (0, -order.tokens % spec.block)).unflatten(0, (-1, spec.block)).any(1)
    return found


def kept(spec: Spec, blocks: int) -> int:
    """How many of so many blocks without text a block of rows reads, where `keep` says so."""
    return min(blocks, max(1, math.ceil(spec.keep * blocks - 1e-9)))


@torch.no_grad()
def chosen_blocks(spec: Spec, order: Layout, q: Tensor, k: Tensor, valid: Tensor | None, scale: float) -> Tensor:
    """(B, Hk, M, M) bool: which blocks each block of rows reads; q, k and valid in the order of the layout."""
    text = with_text(spec, order).to(q.device)
    rows, keys = pooled(q, valid, spec.block), pooled(k, valid, spec.block)
    s = grouped(rows, k.shape[1]) @ keys[:, :, None].transpose(-1, -2) * scale  # (B, Hk, G, M, M)
    share = s.masked_fill(text, -torch.inf).softmax(-1).nan_to_num(0.0).mean(2)
    best, index = share.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(len(text), device=q.device)
    most = kept(spec, int((~text).sum()))
    take = best.cumsum(-1) - best < spec.mass if spec.mass else (rank < most).expand_as(best)
    read = torch.zeros_like(take).scatter(-1, index, take)
    return read | text | text[:, None]


def attend(
    spec: Sparse, q: Tensor, k: Tensor, v: Tensor, call: Call, state: object = None, learned: nn.Module | None = None
) -> tuple[Tensor, None]:
    """The tokens q (B, H, S, D) read k, v (B, Hk, S, D) block by block. → (B, H, S, D), no state"""
    order = stored(spec, grid.layout_of(spec, k, call))
    valid = grid.moved_mask(order, call.valid)
    q, k, v = grid.moved(order, q, k, v)
    read = chosen_blocks(spec, order, q, k, valid, call.scale)
    where = from_map(read, (spec.block, spec.block), transposed=torch.is_grad_enabled())
    out = grid.mixed(q, k, v, where, valid, call)
    return grid.moved_back(order, out.o), None


def reference(spec: Sparse, q: Tensor, k: Tensor, v: Tensor, call: Call, learned: nn.Module | None = None) -> Tensor:
    """The definition, dense, block by block: q (B, H, S, D), k, v (B, Hk, S, D). → (B, H, S, D)"""
    allowed = pairs(spec, q, k, call)
    if call.valid is not None:
        allowed = allowed & call.valid[:, None, None, :]
    return dense(q, k, v, call, allowed[:, :, None])


@torch.no_grad()
def pairs(spec: Spec, q: Tensor, k: Tensor, call: Call) -> Tensor:
    """(B, Hk, S, S) bool: the pairs of tokens that are read, found one block of rows after the other."""
    layout = grid.layout_of(spec, k, call)
    place = torch.from_numpy(stored_order(stored(spec, layout)))
    blocks = [part.tolist() for part in place.split(spec.block)]
    last = layout.text_first + math.prod(layout.grid)
    text = [any(not layout.text_first <= i < last for i in part) for part in blocks]
    open_ = [m for m, has in enumerate(text) if not has]
    read = torch.zeros(*k.shape[:2], layout.tokens, layout.tokens, dtype=torch.bool, device=q.device)
    group = q.shape[1] // k.shape[1]
    for b in range(k.shape[0]):
        real = [[i for i in part if call.valid is None or bool(call.valid[b, i])] for part in blocks]
        for g in range(k.shape[1]):
            keys = {m: k[b, g, real[m]].mean(0) for m in open_}
            for n, part in enumerate(blocks):
                names = set(range(len(blocks)))
                if not text[n]:
                    query = q[b, g * group : (g + 1) * group, real[n]].mean(1)  # (G, D)
                    score = torch.stack([query @ keys[m] * call.scale for m in open_], -1)
                    share = score.softmax(-1).mean(0).tolist()
                    names = set(range(len(blocks))) - set(open_) | {open_[m] for m in _best(spec, share)}
                for m in names:
                    read[b, g, torch.tensor(part)[:, None], torch.tensor(blocks[m])] = True
    return read


def _best(spec: Spec, share: list[float]) -> list[int]:
    """Places of the largest shares: `keep` of them, or as few as hold the mass."""
    order = sorted(range(len(share)), key=lambda m: -share[m])
    if not spec.mass:
        return order[: kept(spec, len(share))]
    found: list[int] = []
    while len(found) < len(order) and sum(share[m] for m in found) < spec.mass:
        found.append(order[len(found)])
    return found


def read_pairs(spec: Spec, layout: Layout) -> float:
    """Pairs of tokens that are read. With `mass` as many as if attention were even, which is the most there can be."""
    text = with_text(spec, stored(spec, layout))
    sizes = torch.full((len(text),), spec.block)
    sizes[-1] -= -layout.tokens % spec.block
    beside, inside = int(sizes[text].sum()), int(sizes[~text].sum())  # tokens of blocks with text, and without
    blocks = int((~text).sum())
    if not blocks:
        return float(layout.tokens**2)
    share = min(1.0, math.ceil(spec.mass * blocks - 1e-9) / blocks) if spec.mass else kept(spec, blocks) / blocks
    return beside * layout.tokens + inside * (beside + share * inside)


def choosing(spec: Spec, shape: Shape, length: int) -> float:
    """FLOPs of the means and the scores."""
    blocks = -(-length // spec.block)
    return float(2 * blocks**2 * shape.queries * shape.dim + (shape.queries + 1) * length * shape.dim)


def prefill_cost(spec: Sparse, shape: Shape, length: int) -> Cost:
    """Of all tokens at once: the pairs that are read, and the selection."""
    layout = grid.checked(spec, shape.layout, length)
    return grid.cost(spec, shape, length, read_pairs(spec, layout), choosing(spec, shape, length))


def decode_cost(spec: Sparse, shape: Shape, length: int) -> Cost:
    """There is none: a ValueError says so."""
    raise grid.no_decoding(spec)


def state_size(spec: Sparse, shape: Shape, length: int) -> float:
    """Nothing is cached."""
    return 0.0
