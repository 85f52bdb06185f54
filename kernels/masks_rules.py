"""What a query and a key are compared by: five rules over whole numbers of both.

A rule answers two questions with the same operators on numpy arrays and torch tensors: does it hold for a pair of
tokens (`holds`), and, from the least and largest numbers of two blocks alone, does it hold for no pair or for every
pair of them (`bounds`; each number is then a pair (least, largest)).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Bounds = tuple[Any, Any]  # for block pairs: holds for none, holds for all; bool arrays


@dataclass(frozen=True)
class Between:
    """low ≤ at ≤ high, where q has low, high or both, and k has `at`."""

    low: bool
    high: bool

    def holds(self, q: Any, k: Any) -> Any:
        if self.low and self.high:
            return (q[0] <= k[0]) & (k[0] <= q[1])
        return q[0] <= k[0] if self.low else k[0] <= q[0]

    def bounds(self, q: Any, k: Any) -> Bounds:
        (least, most) = k[0]
        never, always = np.False_, np.True_
        if self.low:
            never, always = most < q[0][0], q[0][1] <= least
        if self.high:
            low, high = q[-1]
            never, always = never | (least > high), always & (most <= low)
        return never, always


@dataclass(frozen=True)
class Same:
    """Two remainders are equal."""

    def holds(self, q: Any, k: Any) -> Any:
        return q[0] == k[0]

    def bounds(self, q: Any, k: Any) -> Bounds:
        never = (q[0][1] < k[0][0]) | (k[0][1] < q[0][0])
        single = (q[0][0] == q[0][1]) & (k[0][0] == k[0][1])
        return never, single & ~never


@dataclass(frozen=True)
class Flags:
    """Of a flag of the query and one of the key: both, or `either`. Where only one side has one, that."""

    either: bool = False

    def holds(self, q: Any, k: Any) -> Any:
        flags = [x[0] != 0 for x in (q, k) if x]
        if len(flags) == 1:
            return flags[0]
        return flags[0] | flags[1] if self.either else flags[0] & flags[1]

    def bounds(self, q: Any, k: Any) -> Bounds:
        sides = [x[0] for x in (q, k) if x]
        some, every = [high != 0 for _, high in sides], [low != 0 for low, _ in sides]
        if len(sides) == 1:
            return ~some[0], every[0]
        if self.either:
            return ~(some[0] | some[1]), every[0] | every[1]
        return ~(some[0] & some[1]), every[0] & every[1]


@dataclass(frozen=True)
class Near:
    """Σ |Δ|^p < limit over the columns; p = 0: the largest |Δ|."""

    limit: int
    p: int

    def _measure(self, distances: list[Any]) -> Any:
        total = None
        for d in distances:
            d = d * d if self.p == 2 else d
            total = d if total is None else (np.maximum(total, d) if self.p == 0 else total + d)
        return total

    def holds(self, q: Any, k: Any) -> Any:
        if self.p:
            return self._measure([abs(a - b) for a, b in zip(q, k, strict=True)]) < self.limit
        return every([abs(a - b) < self.limit for a, b in zip(q, k, strict=True)])

    def bounds(self, q: Any, k: Any) -> Bounds:
        spans = [distances(a, b) for a, b in zip(q, k, strict=True)]
        least, most = (self._measure([span[side] for span in spans]) for side in (0, 1))
        return least >= self.limit, most < self.limit


@dataclass(frozen=True, eq=False)
class Table:
    """|Δ of the second column| ≤ table[|Δ of the first|]; without a second column, 0 ≤ table[…]. −1 forbids.

    `peaks[n]` and `pits[n]` are the largest and least of 2^n neighbours from each place, for bounds over spans.
    """

    table: Any
    peaks: list[Array] = field(default_factory=list)
    pits: list[Array] = field(default_factory=list)

    def holds(self, q: Any, k: Any) -> Any:
        reach = self.table[abs(q[0] - k[0])]
        return reach >= (abs(q[1] - k[1]) if len(q) > 1 else 0)

    def bounds(self, q: Any, k: Any) -> Bounds:
        if not self.peaks:
            self.peaks.extend(_windows(self.table, np.maximum))
            self.pits.extend(_windows(self.table, np.minimum))
        near, far = distances(q[0], k[0])
        level = np.frexp((far - near + 1).astype(np.float64))[1] - 1  # ⌊log2 of the span⌋
        second = far + 1 - (1 << level)
        most = np.maximum(_at(self.peaks, level, near), _at(self.peaks, level, second))
        least = np.minimum(_at(self.pits, level, near), _at(self.pits, level, second))
        low, high = distances(q[1], k[1]) if len(q) > 1 else (0, 0)
        return most < low, least >= high


Rule = Between | Same | Flags | Near | Table


def every(flags: list[Any]) -> Any:
    """The flags joined by &."""
    result = flags[0]
    for flag in flags[1:]:
        result = result & flag
    return result


def distances(a: Any, b: Any) -> tuple[Any, Any]:
    """The least and the largest |x − y| of x in the span a = (least, largest) and y in the span b."""
    near = np.maximum(np.maximum(b[0] - a[1], a[0] - b[1]), 0)
    return near, np.maximum(a[1] - b[0], b[1] - a[0])


def _windows(table: Array, best: Any) -> list[Array]:
    levels = [table]
    while 2 ** len(levels) <= len(table):
        half = 2 ** (len(levels) - 1)
        levels.append(best(levels[-1][:-half], levels[-1][half:]))
    return levels


def _at(levels: list[Array], level: Any, place: Any) -> Array:
    result = np.zeros(np.shape(place), np.int32)
    for n, values in enumerate(levels):
        chosen = level == n
        if np.any(chosen):
            result[chosen] = values[place[chosen]]
    return result
