"""Which blocks of a mask are empty, full or partial, without the S × S matrix.

1. From the least and largest numbers of each block, most pairs of blocks are settled; a coarse pass over groups of
   blocks comes first, so a long band costs what it covers.
2. Pairs that are not settled fall into classes with the same numbers up to a shift (the interior of a disc has a few
   hundred tiles, however large the image). One tile of each class is computed, bq × bk at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from .masks import Layout, Mask
from .masks_relations import Column, Relation, Relations, compile_mask
from .masks_rules import Array, Between, every

PAIRS = 2**20  # pairs of blocks judged at once
TILES = 2**19  # pairs of tokens computed at once


@dataclass(frozen=True, eq=False)
class Listing:
    """The blocks of one mask, ordered by query block and key block; `kinds` −1 is full, else a row of `patterns`.

    rows, columns, kinds (N,); patterns (U, bq, bk // 32) int32; `shape` is (NQ, NK).
    """

    shape: tuple[int, int]
    rows: Array
    columns: Array
    kinds: Array
    patterns: Array


class Side:
    """One side of the pairs, in blocks: the columns as (n, size), and least and largest number of each block."""

    def __init__(self, columns: dict[int, Column], tokens: Array, inside: Array, size: int) -> None:
        self.count = -(-len(tokens) // size)
        padded = np.concatenate([tokens, np.full(self.count * size - len(tokens), tokens[-1])])
        self.real = (np.arange(len(padded)) < len(tokens)).reshape(self.count, size)
        self.inside = inside[padded].reshape(self.count, size)
        self.columns = {key: column.values[padded].reshape(self.count, size) for key, column in columns.items()}
        self.frames = {key: column.frame for key, column in columns.items()}
        self.spans = {key: self._span(values, True) for key, values in self.columns.items()}
        self.spans |= {-key: self._span(self.columns[key], False) for key in self.columns}

    def _span(self, values: Array, grid: bool) -> tuple[Array, Array]:
        """Of each block, of its tokens on the grid or of all. 0 to 0 where it has none."""
        if not grid or self.inside.all():
            return values.min(1), values.max(1)
        big = np.iinfo(values.dtype).max
        low, high = np.where(self.inside, values, big).min(1), np.where(self.inside, values, -big).max(1)
        none = ~self.inside.any(1)
        return np.where(none, 0, low), np.where(none, 0, high)

    def grouped(self, size: int) -> dict[int, tuple[Array, Array]]:
        """The spans of groups of `size` blocks."""
        at = np.arange(0, self.count, size)
        # A block without tokens on the grid widens its group's span to 0: looser, never wrong.
        return {key: (np.minimum.reduceat(a, at), np.maximum.reduceat(b, at)) for key, (a, b) in self.spans.items()}

    def classes(self) -> tuple[Array, dict[str, Array]]:
        """Numbers (n,) that are equal for blocks that are equal up to shifts, and the shift of each frame (n,)."""
        bases: dict[str, Array] = {}
        parts = [self.real.astype(np.int32), self.inside.astype(np.int32)]
        for key, values in self.columns.items():
            frame = self.frames[key]
            if frame:
                bases.setdefault(frame, values[np.arange(self.count), self.inside.argmax(1)])
                values = values - bases[frame][:, None]
            parts.append(values)
        rows = np.concatenate([np.ascontiguousarray(p).view(np.uint8) for p in parts], 1)
        seen: dict[bytes, int] = {}
        return np.array([seen.setdefault(row.tobytes(), len(seen)) for row in rows], np.int64), bases


class Pairs:
    """The relations of a mask between blocks of queries and blocks of keys."""

    def __init__(self, found: Relations, tokens: Array, block: tuple[int, int], causal: bool) -> None:
        self.terms = found.terms
        stored = (Column(np.arange(len(found.inside), dtype=np.int32), "stored"),)  # what a causal call masks by
        self.care = Relation(Between(False, True), stored, stored) if causal else None
        self.q_columns: dict[int, Column] = {}
        self.k_columns: dict[int, Column] = {}
        for relation in [r for term in found.terms for r in term] + ([self.care] if self.care else []):
            self.q_columns |= {id(column): column for column in relation.q}
            self.k_columns |= {id(column): column for column in relation.k}
        self.q = Side(self.q_columns, tokens, found.inside, block[0])
        self.k = Side(self.k_columns, np.arange(len(found.inside)), found.inside, block[1])

    def judge(self, q: Array, k: Array, group: int = 1) -> tuple[Array, Array]:
        """Of the pairs (q[n], k[n]) of blocks or of groups: may hold a pair of tokens, holds all that matter."""
        q_spans, k_spans = (s.spans if group == 1 else s.grouped(group) for s in (self.q, self.k))

        def bounds(relation: Relation) -> tuple[Any, Any]:
            sign = 1 if relation.grid else -1
            return relation.rule.bounds(
                [tuple(x[q] for x in q_spans[sign * id(column)]) for column in relation.q],
                [tuple(x[k] for x in k_spans[sign * id(column)]) for column in relation.k],
            )

        possible, certain = np.zeros(len(q), bool), np.zeros(len(q), bool)
        for term in self.terms:
            judged = [bounds(relation) for relation in term]
            never = ~every([~n for n, _ in judged]) if judged else np.False_
            possible |= ~never
            certain |= every([always for _, always in judged]) if judged else np.True_
        if self.care is not None:
            possible &= ~bounds(self.care)[0]
        return possible, certain & possible

    def tiles(self, q: Array, k: Array) -> tuple[Array, Array]:
        """The pairs of tokens of these pairs of blocks (n, bq, bk): allowed, and whether it matters."""
        q_values = {key: values[q][:, :, None] for key, values in self.q.columns.items()}
        k_values = {key: values[k][:, None, :] for key, values in self.k.columns.items()}

        def holds(relation: Relation) -> Any:
            left = tuple(q_values[id(column)] for column in relation.q)
            return relation.rule.holds(left, tuple(k_values[id(column)] for column in relation.k))

        matters = self.q.real[q][:, :, None] & self.k.real[k][:, None, :]
        allowed = np.zeros(matters.shape, bool)
        for term in self.terms:
            allowed |= every([holds(relation) for relation in term]) if term else np.True_
        if self.care is not None:
            matters = matters & holds(self.care)
        return allowed & matters, matters


@lru_cache(maxsize=64)
def list_blocks(mask: Mask, layout: Layout, block: tuple[int, int], queries: int, causal: bool) -> Listing:
    """The blocks of one mask; the queries are the last `queries` stored tokens.

    With `causal`, keys after the query do not matter: the call masks them, so a block that lacks only these is full.
    """
    found = compile_mask(mask, layout)
    pairs = Pairs(found, np.arange(layout.tokens - queries, layout.tokens), block, causal)
    sure_q, sure_k, open_q, open_k = ([np.zeros(0, np.int64)] for _ in range(4))
    for q, k in _candidates(pairs):
        possible, certain = pairs.judge(q, k)
        sure_q.append(q[certain])
        sure_k.append(k[certain])
        left = possible & ~certain
        open_q.append(q[left])
        open_k.append(k[left])
    q, k = np.concatenate(open_q), np.concatenate(open_k)
    kinds, patterns = _classify(pairs, q, k)
    sure = np.concatenate(sure_q)
    rows = np.concatenate([sure, q[kinds >= -1]])
    columns = np.concatenate([*sure_k, k[kinds >= -1]])
    kinds = np.concatenate([np.full(len(sure), -1), kinds[kinds >= -1]])
    order = np.argsort(rows * pairs.k.count + columns, kind="stable")
    return Listing((pairs.q.count, pairs.k.count), rows[order], columns[order], kinds[order], patterns)


def _candidates(pairs: Pairs) -> Iterator[tuple[Array, Array]]:
    """Pairs of blocks that may hold something, some at a time: all of them, or those of the groups that may."""
    nq, nk = pairs.q.count, pairs.k.count
    group = 1
    while -(-nq // group) * -(-nk // group) > PAIRS:
        group *= 2
    q, k = np.divmod(np.arange(-(-nq // group) * -(-nk // group)), -(-nk // group))
    if group == 1:
        yield q, k
        return
    possible, _ = pairs.judge(q, k, group)
    q, k = q[possible], k[possible]
    within_q, within_k = np.divmod(np.arange(group * group), group)
    step = max(1, PAIRS // group**2)
    for start in range(0, len(q), step):
        fine_q = (q[start : start + step, None] * group + within_q).ravel()
        fine_k = (k[start : start + step, None] * group + within_k).ravel()
        real = (fine_q < nq) & (fine_k < nk)
        yield fine_q[real], fine_k[real]


def _classify(pairs: Pairs, q: Array, k: Array) -> tuple[Array, Array]:
    """For each pair of blocks −2 for empty, −1 for full, or its row among the patterns, which come second."""
    bq, bk = pairs.q.real.shape[1], pairs.k.real.shape[1]
    if not len(q):
        return np.zeros(0, np.int64), np.zeros((0, bq, bk // 32), np.int32)
    _, first, member = np.unique(_keys(pairs, q, k), return_index=True, return_inverse=True)
    kinds = np.empty(len(first), np.int64)
    patterns: list[Array] = []
    seen: dict[bytes, int] = {}
    step = max(1, TILES // (bq * bk))
    for start in range(0, len(first), step):
        chosen = first[start : start + step]
        allowed, matters = pairs.tiles(q[chosen], k[chosen])
        some: Array = np.any(allowed, (1, 2))
        full: Array = np.all(allowed == matters, (1, 2))
        packed = np.packbits(allowed, axis=2, bitorder="little").view("<i4")  # (n, bq, bk // 32)
        for n in range(len(chosen)):
            kind = -1 if full[n] else -2
            if some[n] and not full[n]:
                kind = seen.setdefault(packed[n].tobytes(), len(seen))
                if kind == len(patterns):
                    patterns.append(packed[n])
            kinds[start + n] = kind if some[n] else -2
    table = np.stack(patterns).astype(np.int32) if patterns else np.zeros((0, bq, bk // 32), np.int32)
    return kinds[member], table


def _keys(pairs: Pairs, q: Array, k: Array) -> Array:
    """A number per pair of blocks; equal numbers have equal tiles."""
    (q_class, q_bases), (k_class, k_bases) = pairs.q.classes(), pairs.k.classes()
    parts = [q_class[q], k_class[k]]
    # A frame that only one side has cannot differ between the sides: its shift means nothing.
    parts += [q_bases[frame][q].astype(np.int64) - k_bases[frame][k] for frame in q_bases if frame in k_bases]
    key, count = np.zeros(len(q), np.int64), 1
    for part in parts:
        low, span = int(part.min()), int(part.max() - part.min()) + 1
        if count * span >= 2**62:
            key = np.unique(key, return_inverse=True)[1].astype(np.int64)
            count = int(key.max()) + 1
        key = key * span + (part - low)
        count *= span
    return key
