"""The front: what the best plans lose at every cost, and what the plans of other selectors lose at the same cost."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..kernels.spec import Full, Spec, label
from .budgets import Budget, Losses, make_task, usual_length
from .costs import Costs, of_profile, plan_cost
from .damage import Group
from .errors import UsageError
from .losses import cell, losses_of
from .plan import Plan
from .profiling import Profile
from .program import cheapest_each
from .refinement import chosen_groups
from .selection import Selection, select

if TYPE_CHECKING:
    from .recipe import SelectSettings

# All that need no model; each is left out where the profile lacks what it goes by
OTHERS = ("uniform", "interleaved", "random", "greedy", "mass", "first_order", "output_error", "moa", "duo", "linvideo")
SEEDS = 5  # plans of method random at each budget
SCHEMA = 1


def front(
    profile: Profile,
    settings: SelectSettings,
    costs: Costs | None = None,
    *,
    methods: Sequence[str] = OTHERS,
    points: int = 8,
    chosen: Mapping[str, Plan] | None = None,
) -> dict[str, Any]:
    """Plain data for select/front.json; costs are shares of the original's. It takes about a second for 90 groups.

    All plans are judged by what their groups lose one by one: the measured damage, or where none was measured the
    output error. The budget is the first of the settings, or cache bytes at 8,192 tokens, FLOPs of an encoder; the
    kinds, layers and groups that the settings keep are kept.

    Args:
        methods: selectors to compare, each at three budgets; points: budgets of the front, from nearly everything
            converted to little; chosen: plans to place among them, by arm.

    Raises:
        UsageError: nothing can be converted, so that there is no front.
    """
    start = time.perf_counter()
    best = "damage" if profile.damage else "output_error"
    judge = _Judge(profile, settings, costs, best)
    shares = judge.shares(points)
    others, left_out = {}, {}
    for method in methods:
        if method == best:
            continue
        try:
            others[method] = judge.compared(method, shares)
        except UsageError as error:
            left_out[method] = str(error)
    return {
        "schema": SCHEMA,
        "resource": judge.budget.resource,
        "length": judge.budget.length,
        "original": judge.budget.original,
        "method": best,
        "needle_weight": settings.needle_weight,
        "front": judge.front(shares),
        "others": others,
        "left_out": left_out,
        "chosen": {arm: judge.point(plan) for arm, plan in (chosen or {}).items()},
        "seconds": time.perf_counter() - start,
    }


class _Judge:
    """Plans of one model under one resource, all judged alike."""

    def __init__(self, profile: Profile, settings: SelectSettings, costs: Costs | None, best: str) -> None:
        self.profile, self.best = profile, best
        resource, length = _resource(settings, costs, profile)
        free = {"groups": None, "layers": None, "keep_quality": None, "explicit": None, "rounds": 0}
        budgets = {resource: {length: "100%"}}
        self.settings = settings.model_copy(update={**free, "budgets": budgets, "method": best})
        self.costs = costs
        task = make_task(profile, self.settings, costs)
        if not task.units:
            raise UsageError("there is no front: this model has no attention that could be converted")
        self.budget: Budget = task.budgets[0]
        self.least = self.budget.base + cheapest_each(task.skeleton)[self.budget.name][0]
        self.losses: Losses = losses_of(task)
        self.known = costs or of_profile(profile, (length,))

    def shares(self, points: int) -> list[float]:
        """Budgets as shares of the original's, from a little more than the cheapest plan takes upwards."""
        if self.least >= self.budget.original * (1 - 1e-9):
            raise UsageError(f"there is no front: no plan takes less of {self.budget.name} than the original")
        saved = 1 - self.least / self.budget.original
        return [float(1 - saved * share) for share in np.linspace(0.97, 0.08, points)]

    def front(self, shares: Sequence[float]) -> list[dict[str, Any]]:
        """The best plan for each budget that can be met; where a smaller budget's plan is as good, that one."""
        found: list[dict[str, Any]] = []
        refused: UsageError | None = None
        for share in shares:
            try:
                chosen = self.select(self.best, share, self.settings.seed)
            except UsageError as error:
                refused = error
                continue
            entry = {"budget": share, **self.point(chosen.plan), "bound": chosen.bound}
            if found and found[-1]["loss"] <= entry["loss"]:
                entry = {**found[-1], "budget": share, "bound": chosen.bound}
            found.append(entry)
        if not found and refused is not None:
            raise refused
        return found

    def compared(self, method: str, shares: Sequence[float]) -> list[dict[str, Any]]:
        """A method's plans at three of the budgets, as far as it meets them; UsageError where it meets none."""
        entries: list[dict[str, Any]] = []
        refused: UsageError | None = None
        last = len(shares) - 1
        for share in (shares[n] for n in dict.fromkeys((round(0.15 * last), round(0.5 * last), round(0.85 * last)))):
            for seed in range(SEEDS) if method == "random" else (self.settings.seed,):
                try:
                    plan = self.select(method, share, seed).plan
                except UsageError as error:
                    refused = error
                    break
                entries.append({"budget": share, **self.point(plan)} | ({"seed": seed} if method == "random" else {}))
        if not entries and refused is not None:
            raise refused
        return entries

    def select(self, method: str, share: float, seed: int) -> Selection:
        limit = share * self.budget.original
        changed = {"method": method, "seed": seed, "budgets": {self.budget.resource: {self.budget.length: limit}}}
        return select(self.profile, self.settings.model_copy(update=changed), "", costs=self.costs)

    def point(self, plan: Plan) -> dict[str, Any]:
        """Where a plan stands; None for a loss that is not known of one of its groups."""
        groups = chosen_groups(self.profile, plan)
        parts = [self.losses(group, spec) for group, spec in groups.items()]
        sites = {site: plan.groups.get(site.name, (Full(),) * site.kv_heads) for site in self.profile.sites}
        used = plan_cost(self.known, self.budget.resource, sites, self.budget.length)
        damage = {measure: self._damage(groups, measure) for measure in ("kl", "needle")}
        return {
            "cost": used / self.budget.original,
            "converted": len(groups) / sum(site.kv_heads for site in self.profile.sites),
            "loss": None if None in parts else float(sum(x for x in parts if x is not None)),
            **(damage if self.profile.damage else {}),
        }

    def _damage(self, groups: Mapping[Group, Spec], measure: str) -> float | None:
        """The sum of single damages."""
        cells = [cell(self.profile.damage.get(label(spec), {}).get(measure), *group) for group, spec in groups.items()]
        return None if None in cells else float(sum(x for x in cells if x is not None))


def _resource(settings: SelectSettings, costs: Costs | None, profile: Profile) -> tuple[str, int]:
    """The first budget that can be told: times only where some were measured."""
    for resource, amounts in (settings.budgets or {}).items():
        if not resource.endswith("_ms") or (costs is not None and costs.rows):
            return resource, next(iter(amounts))
    return "kv_bytes" if profile.causal else "flops", usual_length(profile)
