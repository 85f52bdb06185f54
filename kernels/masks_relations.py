"""Masks as relations between numbers of the query and numbers of the key.

Each predicate becomes one or two relations: a rule of `masks_rules`, and whole numbers per token ("columns") that it
compares. Columns of one frame may be shifted by a common number on both sides without changing anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from .masks import Ball, Band, Causal, Decay, First, LastRows, Layout, Mask, Mod, Pow2, Predicate, Refs, Term
from .masks_rules import Array, Between, Flags, Near, Rule, Same, Table


@dataclass(frozen=True, eq=False)
class Column:
    """A number per stored token, int32 (S,). `frame` names what it may be shifted with; empty: nothing."""

    values: Array
    frame: str = ""


@dataclass(frozen=True, eq=False)
class Relation:
    """A rule and its columns. `grid`: only tokens of the grid count, the numbers of the others mean nothing."""

    rule: Rule
    q: tuple[Column, ...]
    k: tuple[Column, ...]
    grid: bool = False


@dataclass(frozen=True, eq=False)
class Relations:
    """A mask on a layout: for each term the relations that must all hold. `inside` (S,) is true on the grid."""

    terms: tuple[tuple[Relation, ...], ...]
    inside: Array


# ------------------------------------------------------------------------------------------------------- coordinates


@lru_cache(maxsize=16)
def stored_order(layout: Layout) -> Array:
    """(S,) int64: for each stored place the token's position in the sequence, counted before any reordering."""
    count = math.prod(layout.grid)
    grid = np.arange(count, dtype=np.int64).reshape(layout.grid)
    before = np.arange(layout.text_first, dtype=np.int64)
    after = np.arange(layout.text_last, dtype=np.int64) + layout.text_first + count
    if layout.order != "tile":
        axes = [layout.axes.index(a) for a in layout.order] if layout.order != "row" else range(grid.ndim)
        return np.concatenate([before, grid.transpose(axes).ravel() + layout.text_first, after])
    assert layout.tile is not None
    at = np.unravel_index(grid.ravel(), layout.grid)
    tiles = [-(-n // size) for n, size in zip(layout.grid, layout.tile, strict=True)]
    tile = np.ravel_multi_index([c // s for c, s in zip(at, layout.tile, strict=True)], tiles)
    cut = np.zeros(count, bool)
    for c, n, s in zip(at, layout.grid, layout.tile, strict=True):
        cut |= c // s * s + s > n
    order = np.lexsort((grid.ravel(), tile, cut))
    return np.concatenate([order + layout.text_first, before, after])


class Coordinates:
    """Columns of a layout, each made once, in the order in which tokens are stored."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.position = stored_order(layout)
        place = self.position - layout.text_first
        count = math.prod(layout.grid)
        self.inside = (place >= 0) & (place < count)
        self._place = np.where(self.inside, place, 0)
        self._made: dict[tuple[Any, ...], Column] = {}

    def of(self, axis: str, unit: int = 1, offset: int = 0) -> Column:
        """(c + offset) // unit; 0 for text, but on axis `i`."""
        key = (axis, unit, offset)
        if key not in self._made:
            self.layout.size(axis)
            frame = f"{axis}/{unit}+{offset}"
            self._made[key] = Column(((self._raw(axis) + offset) // unit).astype(np.int32), frame)
        return self._made[key]

    def count(self, axis: str, unit: int = 1, offset: int = 0) -> int:
        """How many different numbers `of` can have at most: they are below it."""
        return (self.layout.size(axis) - 1 + offset) // unit + 1

    def derived(self, key: tuple[Any, ...], values: Array, frame: str = "") -> Column:
        """The column of these values; the same key gives the same column."""
        if key not in self._made:
            self._made[key] = Column(values.astype(np.int32), frame)
        return self._made[key]

    def segment(self, name: str) -> Column:
        """1 for tokens of the segment."""
        return self.derived(("segment", name), self.inside if name == "grid" else ~self.inside)

    def _raw(self, axis: str) -> Array:
        if axis == "i":
            return self.position
        if axis == "p":
            return self._place % self.layout.size("p")
        return np.unravel_index(self._place, self.layout.grid)[self.layout.axes.index(axis)]


# ------------------------------------------------------------------------------------------------------- compilation


@lru_cache(maxsize=8)
def compile_mask(mask: Mask, layout: Layout) -> Relations:
    """The relations of a mask on a layout. Terms over text are dropped where there is none.

    Raises:
        ValueError: the mask names an axis that the grid does not have.
    """
    at = Coordinates(layout)
    terms = []
    for term in mask.terms:
        relations = [relation for predicate in term.where for relation in _relations(predicate, at)]
        if layout.text or "text" not in (term.q, term.k):
            terms.append((*_segments(term, any(r.grid for r in relations), at), *relations))
    return Relations(tuple(terms), at.inside)


def _segments(term: Term, on_grid: bool, at: Coordinates) -> tuple[Relation, ...]:
    """Which segments the two sides belong to. A predicate over an axis of the grid wants both on the grid."""
    if not at.layout.text:
        return ()
    sides: list[tuple[Column, ...]] = []
    for name in (term.q, term.k):
        wanted = {name, "grid"} - {"*"} if on_grid else {name} - {"*"}
        values = np.ones(len(at.inside), bool)
        for segment in wanted:
            values = values & (at.segment(segment).values != 0)
        sides.append((at.derived(("segments", *sorted(wanted)), values),) if wanted else ())
    return (Relation(Flags(), sides[0], sides[1]),) if any(sides) else ()


def _relations(predicate: Predicate, at: Coordinates) -> list[Relation]:
    match predicate:
        case Causal():
            return [Relation(Between(False, True), (at.of("i"),), (at.of("i"),))]
        case Band():
            return _band(predicate, at)
        case Ball():
            return [_ball(predicate, at)]
        case First(count=count, axis=axis):
            early = at.derived(("first", axis, count), at.of(axis).values < count)
            return [Relation(Flags(), (), (early,), axis != "i")]
        case LastRows(count=count, axis=axis):
            late = at.derived(("last", axis, count), at.of(axis).values >= at.count(axis) - count)
            return [Relation(Flags(), (late,), (), axis != "i")]
        case Refs(axis=axis, at=numbers, side=side):
            named = at.derived(("refs", axis, numbers), np.isin(at.of(axis).values, numbers))
            q, k = ((named,) if side in (own, "either") else () for own in ("q", "k"))
            return [Relation(Flags(side == "either"), q, k, axis != "i")]
        case Mod():
            return [_remainder(predicate, at)]
        case Pow2(axis=axis, unit=unit):
            d = np.arange(at.count(axis, unit))
            table = Table(np.where(d & (d - 1) == 0, 0, -1).astype(np.int32))
            return [Relation(table, (at.of(axis, unit),), (at.of(axis, unit),), axis != "i")]
        case Decay():
            columns = (at.of(predicate.axis), at.of(predicate.within))
            return [Relation(Table(decay_widths(predicate, at)), columns, columns, True)]
    raise AssertionError(predicate)


def _ball(ball: Ball, at: Coordinates) -> Relation:
    axes = ball.axes or at.layout.axes
    columns = tuple(at.of(axis) for axis in axes)
    wide = any(at.count(axis) > 20_000 for axis in axes)  # three such squares still fit an int32
    if wide:
        columns = tuple(Column(c.values.astype(np.int64), c.frame) for c in columns)
    near = Near(min(ball.limit, 2**62 if wide else 2**31 - 1), ball.p)
    return Relation(near, columns, columns, axes != ("i",))


def _band(band: Band, at: Coordinates) -> list[Relation]:
    """Windows as spans of coordinates, and remainders where the band is dilated."""
    axis, unit, offset, d = band.axis, band.unit, band.offset, band.dilation
    column = at.of(axis, unit, offset)
    n, c = at.count(axis, unit, offset), column.values.astype(np.int64)
    first = offset // unit  # the least number that occurs
    low, high = window(band, c - first, n - first)
    q = []
    for side, values in (("low", low), ("high", high)):
        if values is not None:
            q.append(at.derived(("band", side, band), values + first, column.frame))
    found = [Relation(Between(low is not None, high is not None), tuple(q), (column,), axis != "i")] if q else []
    if d > 1:
        rest = at.derived(("rest", axis, unit, offset, d), c % d)
        found.append(Relation(Same(), (rest,), (rest,), axis != "i"))
    return found


def window(band: Band, c: Array, n: int) -> tuple[Array | None, Array | None]:
    """The first and the last coordinate (either None: no limit) of the window of queries at c, on an axis of n.

    With dilation d the axis falls into d classes of c mod d; the window is taken within the query's class, whose
    members are ⌊c / d⌋ = 0 … m − 1.
    """
    d = band.dilation
    left, right = (None if side is None else min(side, n) for side in (band.left, band.right))
    rest, own = c % d, c // d
    m = -(-(n - rest) // d)
    causal = right == 0 and band.edge == "cut"
    stride = band.stride
    leader = np.minimum(own // stride * stride + (stride - 1 if causal else stride // 2), m - 1)
    if band.edge == "clamp":
        assert left is not None
        assert right is not None
        width = left + right + 1
        low = np.clip(leader - left, 0, np.maximum(m - width, 0))
        return low * d + rest, (low + width - 1) * d + rest
    low = None if left is None else (leader - left) * d + rest
    if right is None:
        return low, None
    return low, c if causal else (leader + right) * d + rest


def _remainder(mod: Mod, at: Coordinates) -> Relation:
    c = at.of(mod.axis, mod.unit).values
    rest = at.derived(("mod", mod.axis, mod.unit, mod.m), c % mod.m)
    if mod.of == "distance":
        shifted = at.derived(("shifted", mod), (c - mod.phase) % mod.m)
        return Relation(Same(), (shifted,), (rest,), mod.axis != "i")
    hit = at.derived(("hit", mod.axis, mod.unit, mod.m, mod.phase), rest.values == mod.phase)
    q, k = ((hit,), ()) if mod.of == "q" else ((), (hit,))
    return Relation(Flags(), q, k, mod.axis != "i")


def decay_widths(decay: Decay, at: Coordinates) -> Array:
    """By the distance along `axis`: the largest allowed distance along `within`, −1 where there is none."""
    size = at.count(decay.within)
    width0 = decay.width0 or 2 ** size.bit_length()
    widths = []
    for r in range(at.count(decay.axis)):
        plain = width0 / 2 ** r.bit_length()
        reach = max(decay.decay * plain, decay.floor)
        if r < 2:
            reach = size if r == 0 else decay.neighbour * size
        kept = plain >= decay.floor or r % int(decay.floor / plain) == 0
        widths.append(min(int(reach), size) if kept else -1)
    return np.array(widths, np.int32)
