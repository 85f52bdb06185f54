"""Softmax over a fixed pattern of the grid: discs, neighbourhoods, tiles, radial bands, reference frames, chunks.

All are one mechanism: spec → mask of the vocabulary (`masks_patterns`) and an order of the tokens, then lists of blocks
(`lowering`, kept by layout), then one launch of mixed attention. Tokens that are near each other on the grid are put
side by side, in tiles, where that leaves fewer blocks; the order is undone afterwards. Text is dense.
"""

from __future__ import annotations

import dataclasses
import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import grid, lowering, masks_patterns
from .call import Call, Cost, Shape, dense
from .masks import Layout, Mask
from .masks_density import density
from .problem import Blocks
from .spec import Disc, Frames, Neighbourhood, Radial, References, Spec, Tiles
from .torch_select import from_map

BLOCK = {"cpu": (16, 32)}  # tokens of a query and of a key block; small ones leave less that is computed and masked
TILE = {"cpu": {2: (4, 4), 3: (2, 2, 4)}}  # of the order in which a block is compact on the grid
OTHER_BLOCK, OTHER_TILE = (64, 64), {2: (8, 8), 3: (4, 4, 4)}  # on GPUs, whose tiles are larger
NEAR = 64  # keys on the grid up to which the C++ kernels take them one by one, and no order makes that faster
SIZES = (128, 64, 32)  # of blocks that may fill a tile of `tiles`


def parameters(spec: Spec, heads: int, kv_heads: int, dim: int) -> nn.Module | None:
    """Nothing to learn."""
    return None


def mask(spec: Spec, layout: Layout) -> Mask:
    """The pairs of tokens that are read, without what `pool` adds."""
    axes = len(layout.grid)
    match spec:
        case Disc(radius=radius):
            return masks_patterns.disc(radius=radius)
        case Neighbourhood(window=window, stride=stride, dilation=dilation):
            return masks_patterns.neighbourhood(window=grid.spread(window, axes), stride=stride, dilation=dilation)
        case Tiles(window=window, tile=tile):
            return masks_patterns.tiled(window=grid.spread(window, axes), tile=grid.spread(tile, axes))
        case Radial(decay=decay, floor=floor, neighbour=neighbour, sink=sink):
            return masks_patterns.radial(decay=decay, floor=floor, neighbour=neighbour, sink=sink)
        case References(every=every, at=at):
            named = {n for n in range(layout.grid[0]) if n in at or (every and n % every == 0)}
            # one that the video does not have leaves each frame its own
            return masks_patterns.attention_tile(references=tuple(sorted(named)) or (layout.grid[0],))
        case Frames(before=before, chunk=chunk, sinks=sinks):
            return masks_patterns.frames(before=before, chunk=chunk, sinks=sinks)
    raise AssertionError(spec)


def arranged(spec: Spec, layout: Layout, device: str) -> tuple[Layout, tuple[int, int]]:
    """The order of the tokens and the size of the blocks, by the type of the device."""
    block = BLOCK.get(device, OTHER_BLOCK)
    if isinstance(spec, Tiles):
        inside = math.prod(grid.spread(spec.tile, len(layout.grid)))
        size = next((n for n in SIZES if inside % n == 0), 32)
        return grid.in_tiles(layout, spec.tile), (size, min(size, 64))
    tile = TILE.get(device, OTHER_TILE).get(len(layout.grid))
    if tile is None or isinstance(spec, Radial | References | Frames):  # these read along frames, as they are stored
        return layout, block
    if device == "cpu" and _near(spec, layout) <= NEAR and not _cells(spec, layout):  # text behind, where cells follow
        return layout, block
    return grid.in_tiles(layout, tile), block


def _near(spec: Spec, layout: Layout) -> float:
    """About how many keys on the grid a token reads."""
    axes = len(layout.grid)
    if isinstance(spec, Disc):
        return float({1: 2.0, 2: math.pi, 3: 4 / 3 * math.pi}[axes] * spec.radius**axes)
    return math.prod(map(min, grid.spread(spec.window, axes), layout.grid))


def reference(spec: Spec, q: Tensor, k: Tensor, v: Tensor, call: Call, learned: nn.Module | None = None) -> Tensor:
    """The definition, dense: q (B, H, S, D), k, v (B, Hk, S, D). → (B, H, S, D)"""
    layout = grid.layout_of(spec, k, call)
    allowed = lowering.dense(mask(spec, layout), layout, device=q.device)[:, None]  # (1, 1, S, S)
    if call.valid is not None:
        allowed = allowed & call.valid[:, None, None, :]
    if cells := _cells(spec, layout):
        on = torch.zeros(layout.tokens, dtype=torch.bool, device=q.device)
        on[layout.text_first : layout.text_first + math.prod(layout.grid)] = True
        further = on[:, None].expand(*allowed.shape[:-1], _count(layout, cells))
        allowed = torch.cat([allowed, further], -1)
        k, v = (torch.cat([x, pooled(layout, x, cells)], 2) for x in (k, v))
    return dense(q, k, v, call, allowed[:, :, None])


def attend(
    spec: Spec, q: Tensor, k: Tensor, v: Tensor, call: Call, state: object = None, learned: nn.Module | None = None
) -> tuple[Tensor, None]:
    """The tokens q (B, H, S, D) read k, v (B, Hk, S, D) by the pattern. → (B, H, S, D), no state"""
    layout = grid.layout_of(spec, k, call)
    stored, block = arranged(spec, layout, q.device.type)
    cells, valid = _cells(spec, layout), grid.moved_mask(stored, call.valid)
    further = [pooled(layout, x, cells) for x in (k, v)] if cells else []
    q, k, v = grid.moved(stored, q, k, v)
    if cells:
        where = _lists_with_cells(mask(spec, layout), stored, block, _count(layout, cells), q.device)
        pad = -k.shape[2] % block[1]
        k, v = (torch.cat([F.pad(x, (0, 0, 0, pad)), y], 2) for x, y in zip((k, v), further, strict=True))
        if pad or valid is not None:
            valid = _valid_with_cells(valid, q, pad, _count(layout, cells))
    else:
        where = lowering.blocks(mask(spec, layout), stored, block, q.device)
    out = grid.mixed(q, k, v, where, valid, call)
    return grid.moved_back(stored, out.o), None


# --------------------------------------------------------------------------------------------------- averaged keys


def _cells(spec: Spec, layout: Layout) -> tuple[int, ...]:
    """Into how many cells the averaged keys of a disc cut each frame; empty without them."""
    pool = spec.pool if isinstance(spec, Disc) else 0
    return tuple(-(-n // pool) for n in layout.grid[-2:]) if pool else ()


def _count(layout: Layout, cells: tuple[int, ...]) -> int:
    return math.prod(layout.grid[: -len(cells)]) * math.prod(cells)


def pooled(layout: Layout, x: Tensor, cells: tuple[int, ...]) -> Tensor:
    """Means of x (B, Hk, S, D) over the cells of each frame. → (B, Hk, frames · cells, D)"""
    return grid.averaged(grid.on_grid(layout, x), cells).flatten(2, -2)


def _valid_with_cells(valid: Tensor | None, q: Tensor, pad: int, count: int) -> Tensor:
    """valid (B, S) with what fills the last block left out, and the averaged keys let in."""
    valid = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device) if valid is None else valid
    return F.pad(F.pad(valid, (0, pad), value=False), (0, count), value=True)


@lru_cache(maxsize=32)
def _lists_with_cells(pairs: Mask, stored: Layout, block: tuple[int, int], count: int, device: torch.device) -> Blocks:
    """The lists of a mask, and of `count` further keys in blocks behind for every query on the grid."""
    where = lowering.blocks(pairs, stored, block)
    (rows, keys), tokens = block, math.prod(stored.grid)
    nq, nk, more = where.starts.shape[2], -(-stored.tokens // keys), -(-count // keys)
    at = torch.arange(nq).repeat_interleave(where.counts[0, 0].long()), where.columns.long()
    chosen = torch.zeros(nq, nk + more, dtype=torch.bool)
    kinds = torch.full((nq, nk + more), -1)
    chosen[at] = True
    patterns = torch.zeros(0, rows, keys // 32, dtype=torch.int32)
    if where.kinds is not None and where.patterns is not None:
        kinds[at], patterns = where.kinds.long(), where.patterns
    first = torch.arange(nq) * rows
    chosen[first < tokens, nk:] = True
    if split := tokens % rows if stored.text else 0:  # one block has the end of the grid and text
        kinds[tokens // rows, nk:] = len(patterns)
        only = torch.where(torch.arange(rows) < split, -1, 0).int()
        patterns = torch.cat([patterns, only[None, :, None].expand(1, rows, keys // 32)])
    with torch.inference_mode(False):
        found = from_map(chosen[None, None], block, kinds[None, None], patterns if len(patterns) else None)
        changed: dict[str, Any] = {
            f.name: x.to(device) for f in dataclasses.fields(found) if isinstance(x := getattr(found, f.name), Tensor)
        }
        return dataclasses.replace(found, **changed)


# ------------------------------------------------------------------------------------------------------------- costs


def prefill_cost(spec: Spec, shape: Shape, length: int) -> Cost:
    """Of all tokens at once: the pairs that are read, those with averaged keys too."""
    layout = grid.checked(spec, shape.layout, length)
    # the pairs are the same in any order and any blocks; large blocks are listed and counted sooner
    pairs, cells = _pairs(mask(spec, layout), *arranged(spec, layout, "cuda")), _cells(spec, layout)
    more = 0.0
    if cells:
        pairs += math.prod(layout.grid) * _count(layout, cells)
        more = 4.0 * math.prod(layout.grid) * shape.dim
    return grid.cost(spec, shape, length, pairs, more)


@lru_cache(maxsize=256)
def _pairs(pairs: Mask, stored: Layout, block: tuple[int, int]) -> int:
    return round(density(lowering.blocks(pairs, stored, block), stored.tokens).element * stored.tokens**2)


def decode_cost(spec: Spec, shape: Shape, length: int) -> Cost:
    """There is none: a ValueError says so."""
    raise grid.no_decoding(spec)


def state_size(spec: Spec, shape: Shape, length: int) -> float:
    """Nothing is cached."""
    return 0.0
