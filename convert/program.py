"""The integer program of the selection: one option per unit, least loss under several budgets.

    min Σ loss[n] x[n]   subject to   Σ x[n of unit u] = 1
                                      Σ cost[r, n] x[n] + Σ launch[r, b, k] y[b, k] ≤ limit[r]
                                      Σ x[n of unit u and kind k] ≤ y[block(u), k]     one row per unit: disaggregated
                                      Σ y[b, k] over k ≤ most_kinds                    x, y ∈ {0, 1}

The Lagrangian relaxation of the budgets (`relaxation.py`) gives a bound, prices, and a plan to fall back on; what it
proves to be in no better plan is left out, and HiGHS solves the rest. Units that are tied are one unit here, which is
why ties need no rows: `budgets.py` merges them.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from .errors import UsageError
from .relaxation import TOLERANCE, Floats, Ints, Relaxation, Relaxed, relax


@dataclass(frozen=True, kw_only=True)
class Program:
    """N options of U units in B blocks, K kinds of operator, R budgets.

    A unit is what is decided at once; its options stand together. A block is what shares launches and the limit on
    kinds: a layer, or layers that take the same operators. All costs are at least 0.
    """

    unit: Ints  # (N,) ascending, 0 … U-1
    block: Ints  # (N,)
    kind: Ints  # (N,)
    loss: Floats  # (N,)
    cost: Floats  # (R, N)
    limit: Floats  # (R,)
    names: tuple[str, ...]  # of the budgets
    launch: Floats  # (R, B, K)
    loss_launch: Floats  # (B, K) what a kind of operator adds to the objective
    most_kinds: int | None = None

    @cached_property
    def starts(self) -> Ints:
        """(U,) the first option of every unit."""
        return np.flatnonzero(np.diff(self.unit, prepend=-1))

    @cached_property
    def scale(self) -> Floats:
        """(R,) what the rows of the budgets are divided by."""
        return np.where(self.limit > 0, self.limit, np.maximum(self.cost.sum(1), 1.0))

    @cached_property
    def coupled(self) -> bool:
        """Whether the units of a block concern each other: launches are paid for, or kinds are limited."""
        kinds = max((len(set(self.kind[self.block == b].tolist())) for b in set(self.block.tolist())), default=0)
        limited = self.most_kinds is not None and self.most_kinds < kinds
        return bool(limited or self.launch.any() or self.loss_launch.any())

    def kinds_used(self, choice: Ints) -> NDArray[np.bool_]:
        """(B, K) the kinds of operator in every block."""
        used = np.zeros(self.loss_launch.shape, dtype=bool)
        used[self.block[choice], self.kind[choice]] = True
        return used

    def usage(self, choice: Ints) -> Floats:
        """(R,) what the options `choice` (U,) use of every budget."""
        return np.asarray(self.cost[:, choice].sum(1) + (self.launch * self.kinds_used(choice)).sum((1, 2)))

    def value(self, choice: Ints) -> float:
        """The objective."""
        return float(self.loss[choice].sum() + (self.loss_launch * self.kinds_used(choice)).sum())

    def feasible(self, choice: Ints) -> bool:
        """Whether the budgets and the limit on kinds are met."""
        kinds = self.kinds_used(choice).sum(1)
        return self.within(self.usage(choice)) and (self.most_kinds is None or bool((kinds <= self.most_kinds).all()))

    def only(self, kept: Ints) -> Program:
        """The same program with some of the options, at least one for every unit."""
        parts = {name: getattr(self, name)[kept] for name in ("unit", "block", "kind", "loss")}
        return replace(self, **parts, cost=self.cost[:, kept])

    def within(self, usage: Floats) -> bool:
        """Whether this much of every budget is allowed."""
        return bool((usage <= self.limit + TOLERANCE * self.scale).all())


@dataclass(frozen=True, kw_only=True)
class Solution:
    """`choice` (U,) is an option of every unit; `bound` is a proven lower bound on `loss`, `gap` what is between.

    `prices` are the multipliers of the budgets: how much loss one more unit of the resource would save.
    """

    choice: Ints
    loss: float
    bound: float
    seconds: float
    how: str
    prices: Mapping[str, float]

    @property
    def gap(self) -> float:
        """Share of the loss that a better plan could still save."""
        return max(0.0, self.loss - self.bound) / max(abs(self.loss), 1e-12)


class Infeasible(UsageError):
    """No choice meets the budgets. `least` has, by budget, what the cheapest choice needs and what is allowed."""

    def __init__(self, least: Mapping[str, tuple[float, float]], excess: float | None) -> None:
        self.least, self.excess = dict(least), excess
        self.binding = [name for name, (need, limit) in least.items() if need > limit + TOLERANCE * max(limit, 1e-9)]
        alone = [
            f"{name} needs at least {least[name][0]:.6g}, the budget is {least[name][1]:.6g}" for name in self.binding
        ]
        conflict = f"each of {', '.join(least)} can be met alone, but not together" + (
            f": the nearest plan exceeds a budget by {excess:.2%}" if excess is not None else ""
        )
        super().__init__("; ".join(alone) or conflict)


def solve(program: Program, *, gap: float = 1e-4, seconds: float = 20.0) -> Solution:
    """The choice of least loss.

    Args:
        gap: relative gap at which HiGHS may stop; seconds: HiGHS's limit, after which the relaxation's plan stands in.

    Raises:
        Infeasible: there is none.
    """
    start = time.perf_counter()
    least = cheapest_each(program)
    if any(
        need > limit + TOLERANCE * scale for (need, limit), scale in zip(least.values(), program.scale, strict=True)
    ):
        raise Infeasible(least, None)
    relaxed = relax(program)
    search = _Search(program, relaxed, gap, start + seconds)
    search.run()
    if search.choice is None:
        if search.complete:
            raise Infeasible(least, _nearest(program, seconds))
        words = f"no plan was found within {seconds:g} s, though there may be one"
        raise UsageError(f"{words}; allow more {', '.join(program.names)}")
    return Solution(
        choice=search.choice,
        loss=search.value,
        bound=min(search.bound, search.value),
        seconds=time.perf_counter() - start,
        how=search.how,
        prices=dict(zip(program.names, (relaxed.prices / program.scale).tolist(), strict=True)),
    )


class _Search:
    """HiGHS on the options that matter: those that cannot raise the relaxation's bound by more than `margin`.

    A plan that is found lies above the bound by less than the margin, or the margin is widened to that: then no option
    that was left out is in a better plan, and the solution of the small program is one of the whole.
    """

    def __init__(self, program: Program, relaxed: Relaxed, gap: float, end: float) -> None:
        self.program, self.relaxed, self.gap, self.end = program, relaxed, gap, end
        self.choice, self.bound = relaxed.choice, relaxed.bound
        self.complete = False  # every plan was considered
        self.how = "Lagrangian relaxation, whose bound proves it"
        self.limit = end - time.perf_counter()

    @property
    def value(self) -> float:
        return np.inf if self.choice is None else self.program.value(self.choice)

    def close(self) -> bool:
        """Whether the plan is as near to the bound as asked."""
        return self.choice is not None and self.value - self.bound <= self.gap * abs(self.value) + 1e-12

    def run(self) -> None:
        """Narrow margins first: they are solved in a fraction of a second and leave little for the next."""
        penalties = Relaxation(self.program).penalties(self.relaxed.prices / self.program.scale)
        margin = 3e-4 * max(abs(self.bound), 1e-9)
        while not self.complete and not self.close():
            wanted = self.value - self.relaxed.bound
            last = margin >= wanted or bool((penalties[np.isfinite(penalties)] <= margin).all())
            if not self._solve(np.flatnonzero(penalties <= min(margin, wanted) + 1e-9 * abs(self.bound)), margin):
                return
            after = self.value - self.relaxed.bound
            self.complete = last or after <= margin
            margin = after if np.isfinite(after) else 8 * margin

    def _solve(self, kept: Ints, margin: float) -> bool:
        """Whether HiGHS finished with the options `kept`."""
        small = self.program.only(kept)
        left = self.end - time.perf_counter()
        found = _highs(small, gap=self.gap, seconds=max(left, 0.01))
        if found.x is not None:
            taken = kept[_options(small, found.x)]
            if self.program.feasible(taken) and self.program.value(taken) < self.value:
                self.choice, self.how = taken, "integer program, solved by HiGHS"
        if found.status not in (0, 2):
            stopped = f"HiGHS did not finish within {self.limit:.3g} s"
            best = "the Lagrangian relaxation's plan" if "HiGHS" not in self.how else "its best plan so far"
            self.how = f"{best}: {stopped}"
            return False
        dual = _dual_bound(found) if found.status == 0 else np.inf
        self.bound = max(self.bound, min(dual, self.relaxed.bound + margin))
        return True


def cheapest(program: Program, budget: int, most_loss: float, *, gap: float = 1e-4, seconds: float = 20.0) -> Solution:
    """The dual question: least cost of one budget with at most this loss; the budgets hold as well.

    `loss` and `bound` of the solution are then amounts of that budget's resource.
    """
    turned = replace(
        program,
        loss=program.cost[budget],
        loss_launch=program.launch[budget],
        cost=np.vstack([program.cost, program.loss]),
        launch=np.concatenate([program.launch, program.loss_launch[None]]),
        limit=np.append(program.limit, most_loss),
        names=(*program.names, "loss"),
    )
    return solve(turned, gap=gap, seconds=seconds)


def cheapest_each(program: Program) -> dict[str, tuple[float, float]]:
    """For every budget what the cheapest choice for it alone needs, and what is allowed."""
    found = {}
    for r, name in enumerate(program.names):
        alone = replace(program, loss=program.cost[r], loss_launch=program.launch[r])
        need, _ = Relaxation(alone).at(np.zeros(len(program.names)))
        found[name] = (need, float(program.limit[r]))
    return found


# --- HiGHS ------------------------------------------------------------------------------------------------------------


def _highs(program: Program, *, gap: float, seconds: float, elastic: bool = False) -> Any:
    """Columns: x (N,), y (B·K,) where units concern each other, and the excess where the budgets are elastic."""
    n, (blocks, kinds) = len(program.unit), program.loss_launch.shape
    pairs = blocks * kinds if program.coupled else 0
    width = n + pairs + int(elastic)
    rows: list[Any] = []
    low: list[Floats] = []
    high: list[Floats] = []

    def add(matrix: Any, least: float, most: Any) -> None:
        matrix = sparse.csr_matrix(matrix)
        matrix.resize(matrix.shape[0], width)
        rows.append(matrix)
        low.append(np.full(matrix.shape[0], least))
        high.append(np.broadcast_to(np.asarray(most, dtype=float), matrix.shape[0]))

    ones = np.ones(n)
    add(sparse.csr_matrix((ones, (program.unit, np.arange(n)))), 1, 1)
    launch = program.launch.reshape(len(program.names), -1)[:, :pairs]
    budgets = np.hstack([program.cost, launch, *([-program.scale[:, None]] if elastic else [])])
    add(budgets / program.scale[:, None], -np.inf, program.limit / program.scale)
    if pairs:
        column = program.block * kinds + program.kind
        both, first, row = np.unique(program.unit * kinds + program.kind, return_index=True, return_inverse=True)
        link = sparse.csr_matrix((ones, (row, np.arange(n))), shape=(len(both), n))
        opens = sparse.csr_matrix((-np.ones(len(both)), (np.arange(len(both)), column[first])), (len(both), pairs))
        add(sparse.hstack([link, opens]), -np.inf, 0)
        if program.most_kinds is not None:
            per_block = sparse.kron(sparse.eye(blocks), np.ones((1, kinds)))
            add(sparse.hstack([sparse.csr_matrix((blocks, n)), per_block]), -np.inf, program.most_kinds)
    objective = np.concatenate([program.loss, program.loss_launch.reshape(-1)[:pairs]])
    if elastic:
        objective = np.append(np.zeros(n + pairs), 1.0)
    constraint = LinearConstraint(sparse.vstack(rows, format="csc"), np.concatenate(low), np.concatenate(high))
    with _silent():
        return milp(
            objective,
            constraints=constraint,
            integrality=np.append(np.ones(n + pairs), np.zeros(int(elastic))),
            bounds=Bounds(0, np.append(np.ones(n + pairs), np.full(int(elastic), np.inf))),
            options={"mip_rel_gap": gap, "time_limit": seconds},
        )


@contextmanager
def _silent() -> Iterator[None]:
    """HiGHS prints a line of its own now and then, whatever it is told: it must not get into `--json`."""
    sys.stdout.flush()
    kept, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)


def _options(program: Program, x: Floats) -> Ints:
    """(U,) the option of every unit that the solver's x takes."""
    taken = np.flatnonzero(x[: len(program.unit)] > 0.5)
    assert len(taken) == len(program.starts), "the solver took another number of options than one per unit"
    return taken


def _dual_bound(found: Any) -> float:
    bound = getattr(found, "mip_dual_bound", None)
    return float(bound) if bound is not None and np.isfinite(bound) else -np.inf


def _nearest(program: Program, seconds: float) -> float | None:
    """The least share by which a budget must be exceeded, where all of them together cannot be met."""
    found = _highs(program, gap=1e-3, seconds=seconds, elastic=True)
    return None if found.x is None else float(found.x[-1])
