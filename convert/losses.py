"""What a single conversion is said to lose, by method: the coefficients of the integer program."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..kernels.spec import Span, Spec, Window, label
from .budgets import Losses, Task, heads_of
from .damage import Group, joint_loss
from .errors import UsageError
from .observation import Table
from .profiling import Profile

if TYPE_CHECKING:
    from .recipe import SelectSettings

Scores = Mapping[Group, Mapping[str, float]]  # loss by candidate's label, instead of what the profile says


def damage_losses(profile: Profile, settings: SelectSettings) -> Losses:
    """KL plus the weighted rise of the needle loss, as measured group by group.

    Raises:
        UsageError: no damage was measured.
    """
    if not profile.damage:
        raise UsageError(
            f"method {settings.method} needs measured damage, which this profile lacks: set profile.damage"
        )

    def loss(group: Group, spec: Spec) -> float | None:
        return measured_loss(profile.damage.get(label(spec), {}), group, settings.needle_weight)

    return loss


def measured_loss(damage: Table, group: Group, weight: float) -> float | None:
    """The joint loss of a cell of a candidate's damage; None where it was not measured."""
    found = {m: cell(damage.get(m), *group) for m in ("kl", "needle", "needle_error")}
    known = {m: value for m, value in found.items() if value is not None}
    return joint_loss(known, weight) if {"kl", "needle"} <= set(known) else None


def losses_of(task: Task) -> Losses:
    """What a method that solves the program minimises."""
    profile, method, weight = task.profile, task.settings.method, task.settings.needle_weight
    if method == "damage":
        return damage_losses(profile, task.settings)
    if method == "moa":
        if profile.influence is not None and not any(isinstance(spec, Window | Span) for spec in task.wanted):
            raise UsageError("method moa knows windows only: add one to profile.candidates")
        return partial(influence_loss, profile)
    tables = {"output_error": [(1.0, profile.output_error)]}
    tables["first_order"] = [(1.0, profile.first_order)]
    if profile.first_order_needle:
        tables["first_order"].append((weight, profile.first_order_needle))
    if not tables[method][0][1]:
        setting = "profile.gradients" if method == "first_order" else "profile.candidates"
        raise UsageError(f"method {method} needs profile.{method}, which this profile lacks: set {setting}")

    def loss(group: Group, spec: Spec) -> float | None:
        heads = heads_of(profile.sites[group[0]], group)
        cells = [
            None if (x := cell(table.get(label(spec)), group[0], head)) is None else share * x
            for share, table in tables[method]
            for head in heads
        ]
        return None if None in cells else float(sum(x for x in cells if x is not None))

    return loss


def scored(losses: Losses, scores: Scores | None) -> Losses:
    """The losses with those of `scores` in their place; a candidate that was not measured stays forbidden."""
    if scores is None:
        return losses

    def loss(group: Group, spec: Spec) -> float | None:
        own = scores.get(group, {}).get(label(spec))
        return losses(group, spec) if own is None else max(own, 0.0)

    return loss


def cell(table: Any, n: int, column: int) -> float | None:
    """A number of a [site][head or group] table, None where there is none."""
    value = table[n][column] if table else None
    return float(value) if value is not None and np.isfinite(value) else None


def influence_loss(profile: Profile, group: Group, spec: Spec) -> float | None:
    """MoA (Fu et al., 2024): the summed influence of the entries that a window does not read; None for other operators.

    A block that the window cuts counts by the share of it that is left out. Sinks are not known to the table, nor rows:
    a window that grows counts as wide as it is in the middle of the text.
    """
    influence = profile.influence
    if influence is None:
        raise UsageError("method moa needs profile.influence, which this profile does not have: set profile.gradients")
    if not isinstance(spec, Window | Span):
        return None
    block, site = influence["block"], profile.sites[group[0]]
    total = 0.0
    for head in heads_of(site, group):
        rows = influence["table"][group[0]][head]
        if rows is None or None in rows:
            return None
        starts = block * np.arange(len(rows))
        text = block * len(rows)
        size = spec.width(text // 2 if site.causal else text) if isinstance(spec, Span) else spec.size
        outside = np.clip((starts + block - size) / block, 0, 1)
        total += float((np.asarray(rows) * outside).sum())
    return total
