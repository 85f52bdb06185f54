"""The Lagrangian relaxation of the selection: budgets become prices, and then every block decides for itself.

For any prices its least priced objective is a bound on what a plan within the budgets can reach (Geoffrion 1974). The
best prices are found by cutting planes (Kelley 1960); with few budgets a handful is enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from .errors import UsageError

if TYPE_CHECKING:
    from .program import Program

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
TOLERANCE = 1e-6  # of a budget: what HiGHS takes for met
MOST_SUBSETS = 5000  # combinations of kinds that are gone through in every block
CUTS = 80  # cutting planes at most


@dataclass(frozen=True)
class Relaxed:
    """The best bound, the (scaled) prices that give it, and the best choice met on the way that is feasible."""

    bound: float
    prices: Floats  # (R,) loss per whole budget
    choice: Ints | None


class Relaxation:
    """The program without its budgets, whose rows are priced: units of a block then agree on kinds, and that is all."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.kinds = program.loss_launch.shape[1]
        keys = program.unit * self.kinds + program.kind
        self.order = np.argsort(keys, kind="stable")
        self.found, self.cuts = np.unique(keys[self.order], return_index=True)
        first = program.block[program.starts]  # (U,)
        self.by_block = np.argsort(first, kind="stable")
        self.blocks, self.block_cuts = np.unique(first[self.by_block], return_index=True)
        self.subsets = self._subsets()

    def _subsets(self) -> NDArray[np.bool_]:
        """(S, K) which kinds a block may have together."""
        program = self.program
        if not program.coupled:
            return np.ones((1, self.kinds), dtype=bool)
        present = sorted(set(program.kind.tolist()))
        most = min(program.most_kinds or len(present), len(present))
        sets = [c for size in range(1, most + 1) for c in combinations(present, size)]
        if len(sets) > MOST_SUBSETS:
            raise UsageError(f"{len(present)} kinds of operator in one program: limit select.kinds, or use fewer")
        table = np.zeros((len(sets), self.kinds), dtype=bool)
        for row, members in enumerate(sets):
            table[row, list(members)] = True
        return table

    def _table(self, prices: Floats) -> tuple[Floats, Floats, Floats]:
        """Priced losses (N,), the least of every unit under every subset (S, U), and of every block (S, blocks)."""
        program = self.program
        reduced = program.loss + prices @ program.cost
        opening = program.loss_launch + np.tensordot(prices, program.launch, 1)  # (B, K)
        best = np.full((len(program.starts), self.kinds), np.inf)
        best.reshape(-1)[self.found] = np.minimum.reduceat(reduced[self.order], self.cuts)
        values = np.empty((len(self.subsets), len(best)))
        for row, members in enumerate(self.subsets):
            values[row] = best[:, members].min(1)
        sums = np.add.reduceat(values[:, self.by_block], self.block_cuts, axis=1)
        if program.coupled:
            sums = sums + self.subsets.astype(float) @ opening[self.blocks].T
        return reduced, values, sums

    def at(self, prices: Floats) -> tuple[float, Ints]:
        """The least priced objective without its constant, and the choice that has it. prices (R,), unscaled"""
        program = self.program
        reduced, _, sums = self._table(prices)
        allowed = np.ones(program.loss_launch.shape, dtype=bool)
        allowed[self.blocks] = self.subsets[sums.argmin(0)]
        masked = np.where(allowed[program.block, program.kind], reduced, np.inf)
        least = np.minimum.reduceat(masked, program.starts)
        hits = np.flatnonzero(masked == least[program.unit])
        _, firsts = np.unique(program.unit[hits], return_index=True)
        return float(sums.min(0).sum()), hits[firsts]

    def penalties(self, prices: Floats) -> Floats:
        """(N,) by how much the bound rises where an option is forced: what rises above a known plan can be left out."""
        program = self.program
        reduced, values, sums = self._table(prices)
        place = np.searchsorted(self.blocks, program.block[program.starts])  # (U,)
        with np.errstate(invalid="ignore"):
            others = np.where(np.isfinite(values), sums[:, place] - values, np.inf)  # (S, U) the block without the unit
        rest = np.full((self.kinds, len(program.starts)), np.inf)
        for kind in range(self.kinds):
            having = self.subsets[:, kind]
            if having.any():
                rest[kind] = others[having].min(0)
        return np.asarray(rest[program.kind, program.unit] + reduced - sums.min(0)[place][program.unit])


def relax(program: Program) -> Relaxed:
    """Maximise the Lagrangian over the prices by cutting planes, then mend the best choice and improve it."""
    relaxation, count = Relaxation(program), len(program.names)
    prices = np.zeros(count)
    top = 10.0 * float(np.ptp(program.loss) * len(program.starts) + program.loss_launch.sum() + 1e-9)
    bound, best_prices, choice = -np.inf, prices, None
    cuts: list[Floats] = []
    heights: list[float] = []
    for _ in range(CUTS):
        value, picked = relaxation.at(prices / program.scale)
        usage = program.usage(picked)
        value -= float(prices @ (program.limit / program.scale))
        slope = (usage - program.limit) / program.scale  # a supergradient
        if value > bound:
            bound, best_prices = value, prices
        if program.within(usage) and (choice is None or program.value(picked) < program.value(choice)):
            choice = picked
        cuts.append(np.append(-slope, 1.0))
        heights.append(value - float(slope @ prices))
        plane = linprog(
            np.append(np.zeros(count), -1.0),
            A_ub=np.array(cuts),
            b_ub=np.array(heights),
            bounds=[(0, top)] * count + [(None, None)],
        )
        if plane.x is None or -plane.fun - bound <= 1e-6 * max(1e-9, abs(bound)):
            break
        prices = plane.x[:-1]
    choice = _mend(program, relaxation, best_prices) if choice is None else choice
    return Relaxed(bound, best_prices, None if choice is None else _improve(program, choice))


def _mend(program: Program, relaxation: Relaxation, prices: Floats) -> Ints | None:
    """Raise the prices of the budgets that are exceeded until none is."""
    prices = prices + 1e-6 * (1 + prices)
    for _ in range(80):
        _, choice = relaxation.at(prices / program.scale)
        over = program.usage(choice) > program.limit + TOLERANCE * program.scale
        if not over.any():
            return choice
        prices = np.where(over, prices * 1.25, prices)
    return None


def _improve(program: Program, choice: Ints) -> Ints:
    """Single changes that lower the loss within the budgets, the largest first, among the kinds a block already has."""
    choice = choice.copy()
    open_ = program.kinds_used(choice)[program.block, program.kind]  # (N,)
    usage = program.usage(choice)
    for _ in range(2 * len(choice)):
        current = choice[program.unit]  # (N,)
        gain = program.loss[current] - program.loss
        after = usage[:, None] - program.cost[:, current] + program.cost
        fits = (after <= (program.limit + 1e-9 * program.scale)[:, None]).all(0)
        gain = np.where(fits & open_, gain, 0.0)
        best = int(gain.argmax())
        if gain[best] <= 1e-12:
            break
        usage = after[:, best]
        choice[program.unit[best]] = best
    return choice
