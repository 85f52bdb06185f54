"""Refinement: a plan is chosen by sums of single damages, which are not what the groups do together.

So whole plans are measured: those of several methods, then those that the program gives when every group is scored anew
around the best of them, until that no longer pays.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..kernels.spec import Full, Spec, label
from .costs import Costs
from .damage import Group, Measure, joint_loss
from .errors import UsageError
from .losses import measured_loss
from .observation import Table
from .plan import Plan
from .profiling import Profile
from .selection import Selection, select

if TYPE_CHECKING:
    from .recipe import SelectSettings

Marginal = Callable[[Mapping[Group, Spec]], dict[str, Table]]
PAYS = 1e-3  # a new plan must be better by this share
BISECTIONS = 12
LEAST = 1e-5  # of the highest score: the smallest price of a change that is tried
STARTS: Mapping[str, Mapping[str, Any]] = {  # whose plans are measured besides the method's own
    "damage, KL alone": {"method": "damage", "needle_weight": 0.0},
    "first_order": {"method": "first_order"},
    "output_error": {"method": "output_error"},
    "duo": {"method": "duo"},
    "linvideo": {"method": "linvideo"},
}
Scores = dict[Group, dict[str, float]]


def refine(
    profile: Profile,
    settings: SelectSettings,
    model: str,
    *,
    costs: Costs | None,
    measure: Measure,
    marginal: Marginal,
) -> tuple[Selection, list[dict[str, Any]]]:
    """The best plan found in `settings.rounds` rounds, and what every plan that was tried measured.

    It starts from the best of the method's own plan and those of `STARTS` that this profile affords. A round scores
    every group around the incumbent and solves; since marginal damages hold near the plan only, plans that change a
    half, a quarter, … as many groups are tried too, as a line search would. It stops where none of them is better.

    Args:
        marginal: what each group adds to the damage of a plan, as `damage.marginal_damage`.
    """

    def chosen(scores: Scores | None = None, **changed: Any) -> Selection:
        asked = settings.model_copy(update=changed)
        return select(profile, asked, model, costs=costs, measure=measure, scores=scores)

    search = _Search(profile, settings, measure)
    search.consider(0, settings.method, chosen())
    for name, changed in STARTS.items():
        try:
            found = chosen(**changed)
        except UsageError:  # the profile lacks what it needs, or it has no plan within the budgets
            continue
        search.consider(0, name, found)
    for number in range(1, settings.rounds + 1):
        before = search.loss
        around = _scores(marginal(chosen_groups(profile, search.best.plan)), settings)
        for name, found in _nearer(profile, search.best.plan, around, chosen):
            search.consider(number, name, found)
        if not search.loss < before:
            break
    return search.best, search.history


class _Search:
    """The best plan so far, by what it measures, and what all that were tried measured."""

    best: Selection

    def __init__(self, profile: Profile, settings: SelectSettings, measure: Measure) -> None:
        self.profile, self.settings, self.measure = profile, settings, measure
        self.loss = math.inf
        self.history: list[dict[str, Any]] = []
        self.seen: list[Plan] = []

    def consider(self, number: int, name: str, found: Selection) -> None:
        """Measure a plan of a round, and keep it where it is better; one that was measured already is passed over."""
        if found.plan in self.seen:
            return
        self.seen.append(found.plan)
        joint = self.measure(chosen_groups(self.profile, found.plan))
        loss = joint_loss(joint, self.settings.needle_weight)
        better = loss < self.loss * (1 - PAYS)
        comparable = number or name == "damage"  # other methods do not predict in these units
        predicted = found.loss if comparable else None
        line = {"round": number, "scores": name, "loss": loss, **joint, "predicted": predicted, "kept": better}
        self.history.append(line | {"operators": {label(Full()): 0, **found.plan.counts()}})
        if better:
            self.best, self.loss = dataclasses.replace(found, measured=joint), loss


def _nearer(
    profile: Profile, incumbent: Plan, around: Scores, chosen: Callable[[Scores], Selection]
) -> Iterator[tuple[str, Selection]]:
    """The plan that is best by the scores, and such as change at most a half, a quarter, … of what it changes.

    A group that takes another operator costs λ more than the scores say; λ is bisected, by its logarithm.
    """
    held = chosen_groups(profile, incumbent)

    def solve(price: float) -> Selection:
        charged = {
            group: {name: x + price * (name != label(held.get(group, Full()))) for name, x in row.items()}
            for group, row in around.items()
        }
        return chosen(charged)

    def changes(found: Selection) -> int:
        now = chosen_groups(profile, found.plan)
        return sum(now.get(group, Full()) != held.get(group, Full()) for group in {*now, *held})

    def charges(found: Selection) -> int:
        now = chosen_groups(profile, found.plan)
        return sum(spec != held.get(group, Full()) for group, spec in now.items())

    found = solve(0.0)
    count = most = changes(found)
    price, top = 0.0, max((x for row in around.values() for x in row.values()), default=0.0)
    while count:
        # what was charged is no loss, and the bound is that of the charged program
        told = found
        if price and found.loss is not None:
            loss = found.loss - price * charges(found)
            told = dataclasses.replace(found, loss=loss, bound=None, gap=None, prices={}, switches={})
        yield f"around the plan, {count} changes", told
        most = min(most, count) // 2
        if not most:
            return
        low, high = max(price, LEAST * top), 2 * top
        for _ in range(BISECTIONS):
            middle = math.sqrt(low * high)
            tried = solve(middle)
            if changes(tried) > most:
                low = middle
            else:
                high, found = middle, tried
        price, count = high, changes(found)


def chosen_groups(profile: Profile, plan: Plan) -> dict[Group, Spec]:
    """The converted groups of a plan."""
    every = {(n, g): s for n, site in enumerate(profile.sites) for g, s in enumerate(plan.groups.get(site.name, ()))}
    return {group: spec for group, spec in every.items() if spec != Full()}


def _scores(damage: Mapping[str, Table], settings: SelectSettings) -> Scores:
    scores: Scores = {}
    for name, table in damage.items():
        for group in ((n, g) for n, row in enumerate(table["kl"]) for g in range(len(row))):
            loss = measured_loss(table, group, settings.needle_weight)
            if loss is not None:
                scores.setdefault(group, {})[name] = loss
    return scores
