"""What attention can run, from masks: a dense matrix, a function for FlexAttention, or lists of blocks.

All of it derives from the layout of the call, never from an earlier one, and is kept by exactly what it depends on:
masks, layout, queries, and for lists also block, device and whether the call is causal. `forget` empties the caches.

    layout = Layout(grid=(64, 64), text_first=512)
    where = blocks(disc(radius=16), layout, block=(128, 64), device="cuda")     # problem.Blocks

A tuple of masks is one for each KV group; equal ones share their lists.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .masks import Layout, Mask
from .masks_blocks import Listing, list_blocks
from .masks_checks import check_count
from .masks_relations import Relation, compile_mask, stored_order
from .masks_rules import Array, Table, every
from .problem import Blocks

Masks = Mask | tuple[Mask, ...]
MaskMod = Callable[[Any, Any, Any, Any], Any]
KEPT = 32  # results of each kind, the last used ones


def dense(masks: Masks, layout: Layout, *, queries: int | None = None, device: str | torch.device = "cpu") -> Tensor:
    """(1 or Hk, Q, S) bool, true where attended; the queries are the last `queries` stored tokens (None: all)."""
    masks, queries = _checked(masks, layout, queries)
    function = flex(masks, layout, queries=queries, device=device)
    h = torch.arange(len(masks), device=device)[:, None, None]
    q = torch.arange(queries, device=device)[:, None]
    pairs: Tensor = function(0, h, q, torch.arange(layout.tokens, device=device))
    return pairs.expand(len(masks), -1, -1).clone()


def flex(
    masks: Masks,
    layout: Layout,
    *,
    group: int = 1,
    queries: int | None = None,
    device: str | torch.device = "cpu",
) -> MaskMod:
    """`mask_mod(b, h, q, kv)` for torch.nn.attention.flex_attention.create_block_mask; `group` query heads share a
    KV head. The same arguments give the same function, so what was compiled for it is found again.
    """
    masks, queries = _checked(masks, layout, queries)
    check_count("group", group, 1)
    return _flex(masks, layout, group, queries, _device(device))


def blocks(
    masks: Masks,
    layout: Layout,
    block: tuple[int, int] = (128, 64),
    device: str | torch.device = "cpu",
    *,
    queries: int | None = None,
    causal: bool = False,
) -> Blocks:
    """Block lists and their transpose; memory grows with the blocks attended to, never with S².

    `queries`: as in `dense`. `causal` says that the call is causal, so the kernels mask the keys after each row
    themselves: blocks that lack only these are listed as full, and blocks that hold only these are not listed.

    Raises:
        ValueError: an argument is out of range, or a mask names an axis that the layout does not have.
    """
    masks, queries = _checked(masks, layout, queries)
    if not isinstance(block, tuple | list) or len(block) != 2:
        raise ValueError(f"block must be (tokens of a query block, tokens of a key block), not {block!r}")
    check_count("block[0]", block[0], 1)
    check_count("block[1]", block[1], 32)
    if block[1] % 32:
        raise ValueError(f"block[1] must be a multiple of 32, not {block[1]}")
    return _blocks(masks, layout, (block[0], block[1]), _device(device), queries, bool(causal))


def permutation(layout: Layout, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """(S,) int64 twice: x[perm] has the tokens in the order of the layout, x[perm][inverse] is x again.

    x has text first, then the grid row-major, then the last text. With order `tile` and tiles as large as a block,
    windows over tiles become full blocks; all else (rotary positions, padding masks) moves along.
    """
    perm = torch.from_numpy(stored_order(layout)).to(_device(device))
    return perm.clone(), torch.argsort(perm)


def forget() -> None:
    """Empty the caches."""
    for cached in (_flex, _blocks, list_blocks, compile_mask, stored_order):
        cached.cache_clear()


def _checked(masks: Masks, layout: Layout, queries: int | None) -> tuple[tuple[Mask, ...], int]:
    found = tuple(masks) if isinstance(masks, tuple | list) else (masks,)
    if not found or not all(isinstance(mask, Mask) for mask in found):
        raise ValueError(f"masks must be a Mask or one for each KV group, not {masks!r}")
    if not isinstance(layout, Layout):
        raise ValueError(f"layout must be a Layout, not {layout!r}")
    check_count("queries", queries, 1, none=True)
    if queries is not None and queries > layout.tokens:
        raise ValueError(f"queries must be at most the {layout.tokens} tokens of the layout, not {queries}")
    return found[:1] if len(set(found)) == 1 else found, layout.tokens if queries is None else queries


def _device(device: str | torch.device) -> torch.device:
    """With its index, so that `cuda` and `cuda:0` are one key."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


# -------------------------------------------------------------------------------------------------- functions of pairs


@lru_cache(maxsize=KEPT)
def _flex(masks: tuple[Mask, ...], layout: Layout, group: int, queries: int, device: torch.device) -> MaskMod:
    distinct = tuple(dict.fromkeys(masks))
    offset = layout.tokens - queries
    with torch.inference_mode(False):
        functions = [_function(mask, layout, device) for mask in distinct]
        which = torch.tensor([distinct.index(mask) for mask in masks], device=device)

    def one(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return functions[0](q + offset, kv)

    def by_head(b: Any, h: Any, q: Any, kv: Any) -> Any:
        chosen = which[h // group]
        result = (chosen == 0) & functions[0](q + offset, kv)
        for n in range(1, len(functions)):
            result = result | ((chosen == n) & functions[n](q + offset, kv))
        return result

    return one if len(distinct) == 1 else by_head


def _function(mask: Mask, layout: Layout, device: torch.device) -> Callable[[Any, Any], Any]:
    """Whether query and key at these stored places (tensors that broadcast) are a pair of the mask."""
    found = compile_mask(mask, layout)
    made: dict[int, Tensor] = {}

    def tensor(values: Array) -> Tensor:
        if id(values) not in made:
            made[id(values)] = torch.from_numpy(values).to(device)
        return made[id(values)]

    def on_device(relation: Relation) -> tuple[Any, list[Tensor], list[Tensor]]:
        rule = relation.rule
        if isinstance(rule, Table):
            rule = dataclasses.replace(rule, table=tensor(rule.table), peaks=[], pits=[])
        return rule, [tensor(c.values) for c in relation.q], [tensor(c.values) for c in relation.k]

    terms = [[on_device(relation) for relation in term] for term in found.terms]

    def function(q: Any, kv: Any) -> Any:
        pairs = (q + kv) < 0  # nothing yet, in the shape of the pairs
        for term in terms:
            flags = [rule.holds([c[q] for c in left], [c[kv] for c in right]) for rule, left, right in term]
            pairs = pairs | (every(flags) if flags else (q + kv) >= 0)
        return pairs

    return function


# --------------------------------------------------------------------------------------------------------------- lists


@lru_cache(maxsize=KEPT)
def _blocks(
    masks: tuple[Mask, ...],
    layout: Layout,
    block: tuple[int, int],
    device: torch.device,
    queries: int,
    causal: bool,
) -> Blocks:
    distinct = tuple(dict.fromkeys(masks))
    listings = [list_blocks(mask, layout, block, queries, causal) for mask in distinct]
    kinds, patterns = _one_table(listings)
    which = [distinct.index(mask) for mask in masks]
    starts, counts, columns, order = _lists(listings, which, transposed=False)
    t_starts, t_counts, t_columns, t_order = _lists(listings, which, transposed=True)
    partial = bool((kinds >= 0).any())
    arrays = {
        "starts": starts,
        "counts": counts,
        "columns": columns,
        "kinds": kinds[order] if partial else None,
        "t_starts": t_starts,
        "t_counts": t_counts,
        "t_columns": t_columns,
        "t_kinds": kinds[t_order] if partial else None,
        "patterns": patterns if partial else None,
    }
    with torch.inference_mode(False):  # they outlive the call; training may save them for its backward pass
        tensors = {
            name: None if array is None else torch.from_numpy(np.ascontiguousarray(array, np.int32)).to(device)
            for name, array in arrays.items()
        }
    return Blocks(block=block, **tensors)  # type: ignore[arg-type]


def _one_table(listings: list[Listing]) -> tuple[Array, Array]:
    """The kinds of all listings one after another, as rows of one table of patterns, each in it once."""
    seen: dict[bytes, int] = {}
    table: list[Array] = []
    kinds = []
    for listing in listings:
        places = np.full(len(listing.patterns) + 1, -1, np.int64)  # the last stands for −1, full
        for n, pattern in enumerate(listing.patterns):
            places[n] = seen.setdefault(pattern.tobytes(), len(seen))
            if places[n] == len(table):
                table.append(pattern)
        kinds.append(places[listing.kinds])
    return np.concatenate(kinds), np.stack(table) if table else np.zeros((0, 0, 0), np.int32)


def _lists(listings: list[Listing], which: list[int], transposed: bool) -> tuple[Array, Array, Array, Array]:
    """starts and counts (1, Hl, N) and columns of all lists; and, for the kinds, where each column came from."""
    starts, counts, columns, order, done = [], [], [], [], 0
    for listing in listings:
        rows, others = (listing.columns, listing.rows) if transposed else (listing.rows, listing.columns)
        by_row = np.argsort(rows, kind="stable")  # the listing is ordered by both, so the others stay ascending
        count = np.bincount(rows, minlength=listing.shape[transposed])
        starts.append(np.cumsum(count) - count + done)
        counts.append(count)
        columns.append(others[by_row])
        order.append(by_row + done)
        done += len(rows)
    return np.stack(starts)[None, which], np.stack(counts)[None, which], np.concatenate(columns), np.concatenate(order)
