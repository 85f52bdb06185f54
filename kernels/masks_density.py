"""How much of dense attention a mask leaves: in pairs of tokens, and in blocks, which is what the hardware pays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .masks_checks import check_count
from .masks_rules import Array
from .problem import Blocks

TILES = 2**22  # pairs of tokens counted at once


@dataclass(frozen=True)
class Density:
    """Shares of dense attention of the same call (of its causal triangle where it is causal), one for each list.

    `elements[g]`: pairs of tokens that are attended. `blocks[g]`: blocks that are computed. `full[g]`: of these, the
    share without a pattern. One list may serve all KV groups. `element` and `block` are the means.
    """

    elements: tuple[float, ...]
    blocks: tuple[float, ...]
    full: tuple[float, ...]

    @property
    def element(self) -> float:
        """The mean share of pairs."""
        return sum(self.elements) / len(self.elements)

    @property
    def block(self) -> float:
        """The mean share of blocks."""
        return sum(self.blocks) / len(self.blocks)


def density(blocks: Blocks, keys: int, queries: int | None = None, *, causal: bool = False) -> Density:
    """The densities of block lists over `keys` keys and `queries` rows (None: as many), the last of the positions.

    With lists of their own for each sequence of a batch, the shares of a head are means over the batch.

    Raises:
        ValueError: the lengths do not fit the lists.
    """
    queries = keys if queries is None else queries
    check_count("keys", keys, 1)
    check_count("queries", queries, 1)
    bq, bk = blocks.block
    batch, heads, nq = blocks.starts.shape
    if -(-queries // bq) != nq:
        raise ValueError(f"queries must fill {nq} blocks of {bq}, as the lists have, not {queries}")
    shift = keys - queries
    if causal and shift < 0:
        raise ValueError(f"queries must be at most keys = {keys} where the call is causal, not {queries}")
    places, rows, columns = _entries(blocks)
    kinds = None if blocks.kinds is None else blocks.kinds.cpu().numpy()[places]
    patterns = None if blocks.patterns is None else blocks.patterns.cpu().numpy()
    height, width = np.minimum(queries - rows * bq, bq), np.minimum(keys - columns * bk, bk)
    computed = columns * bk < keys
    if causal:
        computed &= columns * bk <= np.minimum((rows + 1) * bq, queries) - 1 + shift
    held = _pairs(rows * bq + shift - columns * bk, height, width, causal)
    if kinds is not None and patterns is not None and (kinds >= 0).any():
        some = kinds >= 0
        held[some] = _in_patterns(patterns, kinds, rows, columns, height, width, shift, (bq, bk), causal)
    held = np.where(computed, held, 0)
    of = np.repeat(np.arange(batch * heads), blocks.counts.cpu().numpy().reshape(batch * heads, nq).sum(1))
    ends = np.minimum((np.arange(nq) + 1) * bq, queries) - 1 + shift  # the last position of each query block
    dense = queries * shift + queries * (queries + 1) // 2 if causal else queries * keys
    dense_blocks = (ends // bk + 1).sum() if causal else nq * -(-keys // bk)

    def share(weights: Array, total: Any) -> tuple[float, ...]:
        sums = np.bincount(of, weights.astype(np.float64), batch * heads)
        return tuple((sums / np.maximum(total, 1)).reshape(batch, heads).mean(0).tolist())

    full = computed if kinds is None else computed & (kinds < 0)
    listed = np.bincount(of, computed, batch * heads)
    return Density(share(held, dense), share(computed, dense_blocks), share(full, listed))


def _entries(blocks: Blocks) -> tuple[Array, Array, Array]:
    """Of every entry of every list, list after list: its place in `columns`, its query block, its key block."""
    starts, counts = (x.cpu().numpy().astype(np.int64).ravel() for x in (blocks.starts, blocks.counts))
    total = counts.sum()
    within = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    places = np.repeat(starts, counts) + within
    rows = np.repeat(np.tile(np.arange(blocks.starts.shape[2]), blocks.starts[..., 0].numel()), counts)
    return places, rows, blocks.columns.cpu().numpy().astype(np.int64)[places]


def _pairs(lead: Array, height: Array, width: Array, causal: bool) -> Array:
    """Pairs of tokens in blocks of height × width; causal: those with column ≤ row + lead."""
    if not causal:
        return np.maximum(height, 0) * np.maximum(width, 0)
    # Row r holds clip(lead + 1 + r, 0, width): a triangle that starts at row `begin` and is full from row `end`.
    begin, end = (np.clip(x, 0, height) for x in (-lead, width - lead - 1))
    first, last = lead + 1 + begin, lead + end
    result: Array = np.maximum((first + last) * (end - begin) // 2, 0) + (height - end) * width
    return result


def _in_patterns(
    patterns: Array,
    kinds: Array,
    rows: Array,
    columns: Array,
    height: Array,
    width: Array,
    shift: int,
    block: tuple[int, int],
    causal: bool,
) -> Array:
    """Attended pairs of the partial blocks. Equal situations are counted once."""
    some = kinds >= 0
    bq, bk = block
    lead = np.clip(rows * bq + shift - columns * bk, -bq, bk) if causal else np.full(len(rows), bk)
    cases = np.stack([kinds, height, width, lead], 1)[some]
    distinct, member = np.unique(cases, axis=0, return_inverse=True)
    counts = np.zeros(len(distinct), np.int64)
    r, c = np.arange(bq)[:, None], np.arange(bk)
    step = max(1, TILES // (bq * bk))
    for at in range(0, len(distinct), step):
        kind, tall, wide, ahead = (x[:, None, None] for x in distinct[at : at + step].T)
        words = np.ascontiguousarray(patterns[kind[:, 0, 0]]).view(np.uint8)
        bits = np.unpackbits(words, axis=2, bitorder="little").view(bool)
        counts[at : at + step] = (bits & (r < tall) & (c < wide) & (c <= r + ahead)).sum((1, 2))
    result: Array = counts[member.ravel()]
    return result
