"""Refinement: a plan is chosen by sums of single damages, which are not what the groups do together.

So the whole plan is measured, every group is scored anew around it, and the program is solved again with those scores,
until that no longer pays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..kernels.spec import Full, Spec, label
from .costs import Costs
from .damage import Group, Measure, joint_loss
from .observation import Table
from .plan import Plan
from .profiling import Profile
from .selection import Selection, select

if TYPE_CHECKING:
    from .recipe import SelectSettings

Marginal = Callable[[Mapping[Group, Spec]], dict[str, Table]]
PAYS = 1e-3  # a new plan must be better by this share
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
    """The best plan found in `settings.rounds` rounds, and what each of them measured.

    A round scores around the incumbent and solves; where the new plan is no better, it tries half-way between the old
    scores and the new, and else stops.

    Args:
        marginal: what each group adds to the damage of a plan, as `damage.marginal_damage`.
    """
    best = select(profile, settings, model, costs=costs, measure=measure)
    scores = _scores(profile.damage, settings) if settings.method == "damage" else {}
    best, loss = _measured(best, profile, settings, measure)
    history = [_told(0, "single damages", best, loss, True)]
    for number in range(1, settings.rounds + 1):
        around = _scores(marginal(chosen_groups(profile, best.plan)), settings)
        better = False
        for name, tried in (("around the plan", around), ("half-way", _mean(scores, around))):
            found = select(profile, settings, model, costs=costs, measure=measure, scores=tried)
            if found.plan == best.plan:
                history.append(_told(number, name, best, loss, False, "the same plan"))
                continue
            found, now = _measured(found, profile, settings, measure)
            better = now < loss * (1 - PAYS)
            history.append(_told(number, name, found, now, better))
            if better:
                best, loss, scores = found, now, tried
                break
        if not better:
            break
    return best, history


def chosen_groups(profile: Profile, plan: Plan) -> dict[Group, Spec]:
    """The converted groups of a plan."""
    every = {(n, g): s for n, site in enumerate(profile.sites) for g, s in enumerate(plan.groups.get(site.name, ()))}
    return {group: spec for group, spec in every.items() if spec != Full()}


def _measured(
    found: Selection, profile: Profile, settings: SelectSettings, measure: Measure
) -> tuple[Selection, float]:
    joint = measure(chosen_groups(profile, found.plan))
    return dataclasses.replace(found, measured=joint), joint_loss(joint, settings.needle_weight)


def _scores(damage: Mapping[str, Table], settings: SelectSettings) -> Scores:
    scores: Scores = {}
    for name, table in damage.items():
        for n, row in enumerate(table["kl"]):
            for g, kl in enumerate(row):
                needle = table["needle"][n][g]
                if kl is not None and needle is not None:
                    scores.setdefault((n, g), {})[name] = joint_loss(
                        {"kl": kl, "needle": needle}, settings.needle_weight
                    )
    return scores


def _mean(one: Scores, other: Scores) -> Scores:
    return {
        group: {name: (one.get(group, {}).get(name, x) + x) / 2 for name, x in row.items()}
        for group, row in other.items()
    }


def _told(
    number: int, scores: str, found: Selection, loss: float, kept: bool, note: str | None = None
) -> dict[str, Any]:
    measured = dict(found.measured or {})
    line = {"round": number, "scores": scores, "loss": loss, **measured, "predicted": found.loss, "kept": kept}
    return line | ({"note": note} if note else {}) | {"operators": {label(Full()): 0, **found.plan.counts()}}
