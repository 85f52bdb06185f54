"""The vocabulary of masks: a layout of tokens, predicates over their coordinates, and ORs of ANDs of those.

A mask names no sizes of the call: the layout brings them, so one mask serves every resolution and length. All of it is
frozen, hashable plain data without tensors. `masks_patterns` has the patterns of the papers ready-made, `masks_dicts`
turns masks into plain dictionaries and back, `lowering` turns them into what attention can run.

Axes of coordinates, for tokens of the grid: `n` on a 1-D grid; `h`, `w` on a 2-D one; `t`, `h`, `w` on a 3-D one;
`p`, the row-major position within a frame (h · W + w). For all tokens, text too: `i`, the position in the sequence
before any reordering. A predicate over an axis of the grid holds only between tokens of the grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from .masks_checks import as_counts, check_choice, check_count, check_number

GRID_AXES = {1: ("n",), 2: ("h", "w"), 3: ("t", "h", "w")}
AXES = ("i", "n", "t", "h", "w", "p")
SEGMENTS = ("*", "text", "grid")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which token stands where: text, then the grid (n,), (h, w) or (t, h, w), then text again.

    `order` is how the tokens of the grid are stored when attention runs. `row`: row-major, as models keep them. `tile`:
    tile after tile, row-major within each, tiles that the edge of the grid cuts after the whole ones, and all text
    behind the grid, so that whole tiles start at multiples of their size. A permutation of the axes, such as `hwt`:
    row-major over these axes in this order. `lowering.permutation` gives the order as indices.
    """

    grid: tuple[int, ...]
    text_first: int = 0
    text_last: int = 0
    order: str = "row"
    tile: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", as_counts("Layout.grid", self.grid, 1))
        if len(self.grid) not in GRID_AXES:
            raise ValueError(f"Layout.grid must have 1, 2 or 3 axes, (n,), (h, w) or (t, h, w), not {self.grid!r}")
        check_count("Layout.text_first", self.text_first, 0)
        check_count("Layout.text_last", self.text_last, 0)
        if self.order not in ("row", "tile") and sorted(str(self.order)) != sorted(self.axes):
            orders = f"'row', 'tile' or an order of the axes such as {''.join(reversed(self.axes))!r}"
            raise ValueError(f"Layout.order must be {orders}, not {self.order!r}")
        if (self.order == "tile") != (self.tile is not None):
            raise ValueError(f"Layout.tile goes with order 'tile' and only with it; order is {self.order!r}")
        if self.tile is not None:
            object.__setattr__(self, "tile", as_counts("Layout.tile", self.tile, 1))
            if len(self.tile) != len(self.grid):
                raise ValueError(f"Layout.tile must have one size per axis of the grid {self.grid}, not {self.tile!r}")

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the axes of the grid."""
        return GRID_AXES[len(self.grid)]

    @property
    def text(self) -> int:
        """Tokens of text."""
        return self.text_first + self.text_last

    @property
    def tokens(self) -> int:
        """All tokens: the length of the sequence."""
        return math.prod(self.grid) + self.text

    def size(self, axis: str) -> int:
        """Positions along an axis.

        Raises:
            ValueError: the grid has no such axis.
        """
        if axis == "i":
            return self.tokens
        if axis == "p" and len(self.grid) > 1:
            return self.grid[-2] * self.grid[-1]
        if axis not in self.axes:
            known = ("i", *self.axes, *(("p",) if len(self.grid) > 1 else ()))
            raise ValueError(f"the mask has axis {axis!r}, the grid {self.grid} has {', '.join(known)}")
        return self.grid[self.axes.index(axis)]


@dataclass(frozen=True, kw_only=True)
class Causal:
    """The key stands at the query's position of the sequence or before it."""


@dataclass(frozen=True, kw_only=True)
class Band:
    """Keys near the query along one axis: from `left` before it to `right` after it, None is no limit.

    The coordinates are (c + offset) // unit: with unit > 1 the band is over whole tiles, frames or groups.
    `dilation` d: only every d-th key counts, those with the query's remainder mod d; left and right count these.
    `stride` s: s queries in a row share the window of their leader, the middle one (the last where causal).
    `edge`: `cut` keeps what of the window lies on the grid, and with right = 0 it is causal along the axis, windows
    end at the query; `clamp` shifts the window inward, so that every query has left + right + 1 keys. Both are the
    closed form of Generalized Neighborhood Attention (Hassani et al., 2025).
    """

    axis: str
    left: int | None
    right: int | None
    dilation: int = 1
    stride: int = 1
    edge: str = "cut"
    unit: int = 1
    offset: int = 0

    def __post_init__(self) -> None:
        check_choice("Band.axis", self.axis, AXES)
        check_count("Band.left", self.left, 0, none=True)
        check_count("Band.right", self.right, 0, none=True)
        for name in ("dilation", "stride", "unit"):
            check_count(f"Band.{name}", getattr(self, name), 1)
        check_count("Band.offset", self.offset, 0)
        check_choice("Band.edge", self.edge, ("cut", "clamp"))
        if self.left is None or self.right is None:
            if self.edge == "clamp" or self.stride > 1:
                raise ValueError(
                    f"Band with edge 'clamp' or a stride needs left and right, not {self.left, self.right}"
                )
        elif self.stride > self.left + self.right + 1:
            width = self.left + self.right + 1
            raise ValueError(f"Band.stride must be at most the width of the window, {width}, not {self.stride}")


@dataclass(frozen=True, kw_only=True)
class Ball:
    """Keys closer than `radius`: Σ |Δ|^p < radius^p over the axes, p 1 or 2, or 0 for the largest |Δ| < radius.

    `axes` None is all of the grid. p = 2 on a 2-D grid is the disc of CLEAR (Liu et al., 2024).
    """

    radius: float
    p: int = 2
    axes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_number("Ball.radius", self.radius, 0)
        if self.p not in (0, 1, 2):
            raise ValueError(f"Ball.p must be 1, 2 or 0 (the largest difference), not {self.p!r}")
        if self.axes is not None:
            if not isinstance(self.axes, tuple | list) or not self.axes:
                raise ValueError(f"Ball.axes must be a sequence of axes or None, not {self.axes!r}")
            for axis in self.axes:
                check_choice("Ball.axes", axis, AXES)
            object.__setattr__(self, "axes", tuple(self.axes))

    @property
    def limit(self) -> int:
        """The least whole number that Σ |Δ|^p (or the largest |Δ|) may not reach."""
        return math.ceil(Fraction(self.radius) ** (self.p or 1))


@dataclass(frozen=True, kw_only=True)
class First:
    """The key is among the first `count` positions of the axis: sinks, or whole first frames with axis `t`."""

    count: int
    axis: str = "i"

    def __post_init__(self) -> None:
        check_count("First.count", self.count, 1)
        check_choice("First.axis", self.axis, AXES)


@dataclass(frozen=True, kw_only=True)
class LastRows:
    """The query is among the last `count` positions of the axis."""

    count: int
    axis: str = "i"

    def __post_init__(self) -> None:
        check_count("LastRows.count", self.count, 1)
        check_choice("LastRows.axis", self.axis, AXES)


@dataclass(frozen=True, kw_only=True)
class Mod:
    """Remainders: c // unit mod `m` is `phase`, where c belongs to the key, to the query (of: `q`), or (of:
    `distance`) is what lies between them, (c_q // unit − c_k // unit).
    """

    axis: str
    m: int
    phase: int = 0
    unit: int = 1
    of: str = "k"

    def __post_init__(self) -> None:
        check_choice("Mod.axis", self.axis, AXES)
        check_count("Mod.m", self.m, 1)
        check_count("Mod.phase", self.phase, 0)
        check_count("Mod.unit", self.unit, 1)
        check_choice("Mod.of", self.of, ("k", "q", "distance"))
        if self.phase >= self.m:
            raise ValueError(f"Mod.phase must be less than m = {self.m}, not {self.phase}")


@dataclass(frozen=True, kw_only=True)
class Pow2:
    """The distance |c_q // unit − c_k // unit| is 0 or a power of two. Source: PowerAttention (2503.03588)."""

    axis: str = "i"
    unit: int = 1

    def __post_init__(self) -> None:
        check_choice("Pow2.axis", self.axis, AXES)
        check_count("Pow2.unit", self.unit, 1)


@dataclass(frozen=True, kw_only=True)
class Decay:
    """A band along `within` that halves with each doubling of the distance r along `axis`.

    With T positions along `within`, b = bit length of r and L = width0 (None: 2^(bit length of T)):
    |Δ| ≤ T for r = 0, ≤ ⌊neighbour · T⌋ for r = 1, else ≤ max(decay · L / 2^b, floor). Where L / 2^b < floor, only the
    r that ⌊floor · 2^b / L⌋ divides are kept. Source: Radial Attention (2506.19852).
    """

    axis: str = "t"
    within: str = "p"
    width0: int | None = None
    decay: float = 1.0
    floor: int = 128
    neighbour: float = 1.0

    def __post_init__(self) -> None:
        check_choice("Decay.axis", self.axis, AXES)
        check_choice("Decay.within", self.within, AXES)
        check_count("Decay.width0", self.width0, 1, none=True)
        check_count("Decay.floor", self.floor, 1)
        check_number("Decay.decay", self.decay, 0)
        check_number("Decay.neighbour", self.neighbour, 0)


@dataclass(frozen=True, kw_only=True)
class Refs:
    """Positions of the axis by number (`at`): the key's, the query's (side: `q`), or one of both (side: `either`)."""

    axis: str
    at: tuple[int, ...]
    side: str = "k"

    def __post_init__(self) -> None:
        check_choice("Refs.axis", self.axis, AXES)
        object.__setattr__(self, "at", tuple(sorted(set(as_counts("Refs.at", self.at, 0)))))
        check_choice("Refs.side", self.side, ("k", "q", "either"))


Predicate = Causal | Band | Ball | First | LastRows | Mod | Pow2 | Decay | Refs
PREDICATES: dict[str, type] = {
    "causal": Causal,
    "band": Band,
    "ball": Ball,
    "first": First,
    "last_rows": LastRows,
    "mod": Mod,
    "pow2": Pow2,
    "decay": Decay,
    "refs": Refs,
}


@dataclass(frozen=True, kw_only=True)
class Term:
    """Pairs for which all predicates hold, of queries in segment `q` with keys in segment `k`."""

    q: str = "*"
    k: str = "*"
    where: tuple[Predicate, ...] = ()

    def __post_init__(self) -> None:
        check_choice("Term.q", self.q, SEGMENTS)
        check_choice("Term.k", self.k, SEGMENTS)
        where = self.where if isinstance(self.where, tuple | list) else (self.where,)
        for predicate in where:
            if not isinstance(predicate, Predicate):
                raise ValueError(f"Term.where must hold predicates ({', '.join(PREDICATES)}), not {predicate!r}")
        object.__setattr__(self, "where", tuple(where))


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Pairs for which at least one term holds. `a | b` joins masks, `a.also(Causal())` narrows every term."""

    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.terms, tuple | list) or not self.terms:
            raise ValueError(f"Mask.terms must hold at least one Term, not {self.terms!r}")
        for term in self.terms:
            if not isinstance(term, Term):
                raise ValueError(f"Mask.terms must hold Terms, not {term!r}")
        object.__setattr__(self, "terms", tuple(dict.fromkeys(self.terms)))

    def __or__(self, other: Mask) -> Mask:
        return Mask(terms=self.terms + other.terms)

    def also(self, *predicates: Predicate) -> Mask:
        """The same with further predicates in every term."""
        return Mask(terms=tuple(Term(q=t.q, k=t.k, where=t.where + predicates) for t in self.terms))
