"""What others use to choose, under one interface: from a task to an option of every unit that meets the same budgets.

Most go through the units in an order of their own and convert until the budgets are met, so that none converts more
than it must: what then differs is where, and that is what a comparison should show.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ..kernels.spec import Full, Spec, label
from .budgets import Task, heads_of
from .damage import Measure, joint_loss
from .errors import UsageError
from .losses import damage_losses
from .relaxation import Floats, Ints
from .seeds import rng

Step = tuple[int, str]  # an option to take, and why


@dataclass(frozen=True)
class Chosen:
    """An option of every unit, and words about some of them."""

    choice: Ints
    words: dict[int, str] = field(default_factory=dict)


Selector = Callable[[Task, Measure | None], Chosen]


def until_met(task: Task, steps: Iterable[Step]) -> Chosen:
    """Take the steps until the budgets are met.

    A step that would exceed the kinds of a block takes the whole block along, or is left out where that cannot be.

    Raises:
        UsageError: the budgets are not met when there are no more steps.
    """
    program, choice = task.skeleton, task.full.copy()
    words: dict[int, str] = {}
    walk = iter(steps)
    while not program.within(program.usage(choice)):
        found = next(walk, None)
        if found is None:
            raise task.impossible(method=task.settings.method)
        option, word = found
        taken = {int(program.unit[option]): option}
        if not _kinds_fit(task, choice, taken):
            members = np.flatnonzero(program.block[choice] == program.block[option])
            options = {int(u): task.option.get((int(u), task.specs[option])) for u in members}
            taken = {u: n for u, n in options.items() if n is not None}
            if not _kinds_fit(task, choice, taken):
                continue
        for u, n in taken.items():
            choice[u], words[u] = n, word
    return Chosen(choice, words)


def _kinds_fit(task: Task, choice: Ints, taken: Mapping[int, int]) -> bool:
    program, after = task.skeleton, choice.copy()
    after[list(taken)] = list(taken.values())
    return program.most_kinds is None or int(program.kinds_used(after).sum(1).max()) <= program.most_kinds


def one_spec(task: Task) -> Spec:
    """The operator that a method uses which knows only one: the first that can meet the budgets alone.

    Raises:
        UsageError: none can.
    """
    program = task.skeleton
    for spec in task.wanted:
        choice = np.array([task.option.get((u, spec), start) for u, start in enumerate(task.full)])
        if program.within(program.usage(choice)):
            return spec
    raise UsageError(_no_single(task))


def _no_single(task: Task) -> str:
    written = " and ".join(budget.written for budget in task.budgets)
    names = ", ".join(label(spec) for spec in task.wanted)
    return (
        f"no {task.settings.method} plan meets select.{written} with one operator ({names}): {task.shortfall()}; ask "
        "for less or name a smaller operator"
    )


def _available(task: Task, spec: Spec) -> list[int]:
    return [u for u in range(len(task.units)) if (u, spec) in task.option]


# --- without looking --------------------------------------------------------------------------------------------------


def uniform(task: Task, measure: Measure | None = None) -> Chosen:
    """Evenly spaced units: van der Corput order, which is even at every number of them."""
    spec = one_spec(task)
    units = _available(task, spec)
    order = np.argsort([int(f"{i:032b}"[::-1], 2) for i in range(len(units))], kind="stable").tolist()
    return until_met(task, ((task.option[units[i], spec], "evenly spaced") for i in order))


def random(task: Task, measure: Measure | None = None) -> Chosen:
    """Units at random."""
    spec = one_spec(task)
    units = _available(task, spec)
    order = torch.randperm(len(units), generator=rng("select", task.settings.seed)).tolist()
    word = f"at random, seed {task.settings.seed}"
    return until_met(task, ((task.option[units[i], spec], word) for i in order))


def interleaved(task: Task, measure: Measure | None = None) -> Chosen:
    """Full layers at a regular stride and all others converted, as hybrids are built (Jamba, Gemma 3).

    Of every n layers the last is full; the stride need not be whole, so that the budget is met as closely as by others.
    """
    spec, program = one_spec(task), task.skeleton
    blocks = sorted({int(b) for b in program.block})
    place = program.block[task.full]  # (U,)
    for full in range(len(blocks), -1, -1):
        keep = {blocks[(i + 1) * len(blocks) // full - 1] for i in range(full)}
        converted = [u for u in _available(task, spec) if place[u] not in keep]
        choice = task.full.copy()
        choice[converted] = [task.option[u, spec] for u in converted]
        if program.feasible(choice):
            stride = f"1 layer of {len(blocks) / full:.3g} stays full" if full else "no layer stays full"
            return Chosen(choice, dict.fromkeys(converted, f"interleaved: {stride}"))
    raise task.impossible(method="interleaved")


# --- by a score -------------------------------------------------------------------------------------------------------


def greedy(task: Task, measure: Measure | None = None) -> Chosen:
    """Again and again the conversion that adds least damage for what it saves of the budgets not met yet."""
    program, known = task.program(damage_losses(task.profile, task.settings))
    loss, cost, units = program.loss, program.cost / program.scale[:, None], program.unit

    def steps(current: Ints) -> Iterator[Step]:
        skipped = np.zeros(len(loss), dtype=bool)
        while True:
            over = (program.usage(current) - program.limit) / program.scale  # (R,)
            mine = current[units]
            left = np.maximum(over[:, None] + cost - cost[:, mine], 0).sum(0)
            saved = np.maximum(over, 0).sum() - left  # of all that is exceeded, so that no step is taken back
            added = loss - loss[mine]
            with np.errstate(divide="ignore", invalid="ignore"):
                price = np.where((saved > 1e-12) & ~skipped, added / saved, np.inf)
            best = int(price.argmin())
            if not np.isfinite(price[best]):
                return
            before = current[units[best]]
            current[units[best]] = best
            if program.most_kinds is not None and program.kinds_used(current).sum(1).max() > program.most_kinds:
                current[units[best]], skipped[best] = before, True
                continue
            yield int(known[best]), f"greedy: {added[best]:.4g} more damage for what it saves"

    return until_met(task, steps(program.starts.copy()))


def mass(task: Task, measure: Measure | None = None) -> Chosen:
    """Every unit of whose attention mass a candidate keeps a share θ is converted; θ falls until the budgets are met.

    Of the candidates that keep enough the cheapest is taken (cumulative-mass thresholds as of MInference, FlexPrefill).
    """
    lost = task.profile.mass_lost
    if not any(label(spec) in lost for spec in task.wanted):
        raise UsageError("method mass needs profile.mass_lost of a candidate: profile again with a window or retention")
    program = task.skeleton
    kept: list[tuple[float, int]] = []
    for option, spec in enumerate(task.specs):
        cells = _heads(task, lost.get(label(spec), []), option)
        if spec != Full() and cells and None not in cells:
            kept.append((1 - float(np.mean([x for x in cells if x is not None])), option))

    def steps() -> Iterator[Step]:
        current = task.full.copy()
        for share, option in sorted(kept, reverse=True):
            u = program.unit[option]
            saved = (program.cost[:, current[u]] - program.cost[:, option]) / program.scale
            if saved.sum() > 0:
                current[u] = option
                yield option, f"{label(task.specs[option])} keeps {share:.1%} of its attention mass"

    return until_met(task, steps())


def _heads(task: Task, table: Sequence[Sequence[float | None]], option: int) -> list[float | None]:
    """The cells of a [site][head] table that belong to the unit of an option."""
    groups = task.units[task.skeleton.unit[option]]
    return [table[n][h] for n, g in groups for h in heads_of(task.profile.sites[n], (n, g))] if table else []


def duo(task: Task, measure: Measure | None = None) -> Chosen:
    """DuoAttention (Xiao et al., 2024): the groups whose learned gate is lowest stream; the threshold is a quantile."""
    return _by_gate(task, "duo", "gate {:.3f} of DuoAttention")


def linvideo(task: Task, measure: Measure | None = None) -> Chosen:
    """LinVideo (2025): learned gates, rounded; where that misses the budget, the order of the gates decides."""
    return _by_gate(task, "linvideo", "gate {:.3f} of LinVideo, rounded to {:.0f}")


def _by_gate(task: Task, method: str, word: str) -> Chosen:
    gates = task.profile.gates.get(method)
    if not gates:
        raise UsageError(
            f"method {method} needs learned gates, which this profile does not have: add {method} to profile.gates"
        )
    spec = one_spec(task)
    scores = {}
    for u in _available(task, spec):
        cells = [gates[n][g] for n, g in task.units[u]]
        if all(x is not None and np.isfinite(x) for x in cells):
            scores[u] = float(np.mean(cells))
    order = sorted(scores, key=lambda u: scores[u])
    return until_met(task, ((task.option[u, spec], word.format(scores[u], np.round(scores[u]))) for u in order))


# --- by measuring -----------------------------------------------------------------------------------------------------


def restore(task: Task, measure: Measure | None = None) -> Chosen:
    """Convert everything, then give back the unit whose restoration lowers the measured loss most, while budgets last.

    KL-guided restoration (hybrid distillation's GA-S2). Gains are measured once for all units; afterwards only the one
    that leads is measured again, and taken when it still leads (lazy greedy, Minoux 1978).
    """
    if measure is None:
        raise UsageError(
            "method restore measures whole plans, which needs the model: run it as `attnconvert select RUN`"
        )
    start = _all_converted(task)
    choice, words = start.copy(), {int(u): "converted: not worth restoring" for u in range(len(start))}
    loss = _joint(task, measure, choice)
    waiting: list[tuple[float, int, int]] = []  # −gain, unit, how many were restored when it was measured
    for u in range(len(choice)):
        if choice[u] != task.full[u] and _fits(task, choice, u):
            heapq.heappush(waiting, (_joint(task, measure, _restored(task, choice, u)) - loss, u, 0))
    restored = 0
    while waiting:
        change, u, when = heapq.heappop(waiting)
        if not _fits(task, choice, u):
            continue
        if when < restored:
            change = _joint(task, measure, _restored(task, choice, u)) - loss
            if waiting and change > waiting[0][0]:
                heapq.heappush(waiting, (change, u, restored))
                continue
        if change >= 0:
            break
        choice, loss, restored = _restored(task, choice, u), loss + change, restored + 1
        words[u] = f"restored as number {restored}: lowers the measured loss by {-change:.4f}"
    return Chosen(choice, words)


def _all_converted(task: Task) -> Ints:
    """Every unit as the one operator that meets the budgets, or each as its cheapest where none does alone."""
    program = task.skeleton
    for spec in task.wanted:
        choice = np.array([task.option.get((u, spec), start) for u, start in enumerate(task.full)])
        if program.feasible(choice):
            return choice
    relative: Floats = (program.cost / program.scale[:, None]).sum(0)
    choice = np.array(
        [min(np.flatnonzero(program.unit == u), key=lambda n: relative[n]) for u in range(len(task.units))]
    )
    if not program.feasible(choice):
        raise task.impossible(method="restore")
    return choice


def _restored(task: Task, choice: Ints, u: int) -> Ints:
    after = choice.copy()
    after[u] = task.full[u]
    return after


def _fits(task: Task, choice: Ints, u: int) -> bool:
    return task.skeleton.feasible(_restored(task, choice, u))


def _joint(task: Task, measure: Measure, choice: Ints) -> float:
    return joint_loss(measure(task.chosen(choice)), task.settings.needle_weight)


SELECTORS: dict[str, Selector] = {
    "uniform": uniform,
    "interleaved": interleaved,
    "random": random,
    "greedy": greedy,
    "mass": mass,
    "duo": duo,
    "linvideo": linvideo,
    "restore": restore,
}
