"""What may be chosen and what it may cost: a profile and settings become units, their options and the budgets.

A unit is what is decided at once: a KV group, a whole layer where `unit` is layer, or those of several layers where
`share` ties them. Budgets hold for the whole model: what is not attention is in them where the costs know it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..kernels.spec import Full, Spec
from .costs import Costs, kind, of_profile
from .damage import Group
from .errors import UsageError
from .hosts.sites import Site, refusal
from .profiling import Profile
from .program import Infeasible, Program, cheapest_each
from .recipe_fields import percentage
from .relaxation import Ints
from .report_html import number, size

if TYPE_CHECKING:
    from .recipe import SelectSettings

LENGTH = 8192  # at which bytes are saved where the settings name no budget
Losses = Callable[[Group, Spec], float | None]  # of one conversion; None where it was not measured


@dataclass(frozen=True, kw_only=True)
class Budget:
    """`limit` and `original` are amounts of the whole model; `base` is what no plan changes. As the recipe wrote it."""

    name: str
    resource: str
    length: int
    limit: float
    original: float
    base: float
    written: str

    def shown(self, amount: float) -> str:
        """An amount with its unit."""
        if self.resource == "kv_bytes":
            return size(amount)
        if self.resource in ("groups", "layers"):
            return f"{amount:.6g} {self.resource} left full"
        unit = "FLOPs" if self.resource == "flops" else "ms"
        return f"{amount:.3g} {unit}" if self.resource == "flops" else f"{number(amount)} {unit}"


@dataclass(frozen=True)
class Task:
    """A choice to make: option n of the skeleton is (its unit's groups, `specs[n]`); every unit may stay full.

    `kept` says for each group that must stay full why.
    """

    profile: Profile
    settings: SelectSettings
    units: tuple[tuple[Group, ...], ...]
    specs: tuple[Spec, ...]  # (N,)
    budgets: tuple[Budget, ...]
    kept: Mapping[Group, str]
    skeleton: Program

    @cached_property
    def full(self) -> Ints:
        """(U,) nothing is converted."""
        return self.skeleton.starts

    @cached_property
    def option(self) -> dict[tuple[int, Spec], int]:
        """The option of a unit that has this operator."""
        return {(int(u), spec): n for n, (u, spec) in enumerate(zip(self.skeleton.unit, self.specs, strict=True))}

    @cached_property
    def wanted(self) -> tuple[Spec, ...]:
        """The operators that may stand in for full attention, in the order of the recipe."""
        operator = self.settings.operator
        return (operator,) if operator else tuple(self.profile.candidates.values())

    def program(self, losses: Losses) -> tuple[Program, Ints]:
        """The program with these losses, and which options of the skeleton it has: those whose losses are known."""
        values = np.zeros(len(self.specs))
        known = np.ones(len(self.specs), dtype=bool)
        for n, spec in enumerate(self.specs):
            if spec != Full():
                parts = [losses(group, spec) for group in self.units[self.skeleton.unit[n]]]
                numbers = [x for x in parts if x is not None and np.isfinite(x)]
                known[n], values[n] = len(numbers) == len(parts), sum(numbers)
        kept = np.flatnonzero(known)
        return replace(self.skeleton, loss=values).only(kept), kept

    def chosen(self, choice: Ints) -> dict[Group, Spec]:
        """The converted groups of a choice of options."""
        converted = [(self.units[self.skeleton.unit[n]], self.specs[n]) for n in choice]
        return {group: spec for groups, spec in converted if spec != Full() for group in groups}

    def used(self, choice: Ints) -> dict[str, dict[str, Any]]:
        """By budget what is allowed, what the choice uses and what the original uses."""
        usage = self.skeleton.usage(choice)
        return {
            budget.name: {
                "resource": budget.resource,
                "length": budget.length,
                "limit": budget.limit,
                "used": budget.base + float(amount),
                "original": budget.original,
            }
            for budget, amount in zip(self.budgets, usage, strict=True)
        }

    def shortfall(self) -> str:
        """How many groups may be converted, and what keeps the others."""
        total = sum(len(groups) for groups in self.units)
        free = sum(
            len(self.units[u]) for u in {int(self.skeleton.unit[n]) for n, s in enumerate(self.specs) if s != Full()}
        )
        why: dict[str, int] = {}
        for reason in self.kept.values():
            for word, setting in (
                ("protected", "protect"),
                ("retrieval", f"retrieval_keep: {self.settings.retrieval_keep}"),
            ):
                if word in reason:
                    why[setting] = why.get(setting, 0) + 1
        because = f" ({', '.join(f'{name} keeps {count}' for name, count in why.items())})" if why else ""
        what = "heads" if any(site.axes for site in self.profile.sites) else "KV groups"
        return f"{free} of {total} {what} may be converted{because}"

    def impossible(self, error: Infeasible | None = None, method: str = "") -> UsageError:
        """The error to raise: what the cheapest plan costs, which budget binds, and what can be done."""
        least = error.least if error else cheapest_each(self.skeleton)
        budgets = {budget.name: budget for budget in self.budgets}
        found = []
        for name, (need, limit) in least.items():
            budget = budgets.get(name)
            if budget and need > limit + 1e-6 * max(abs(limit), 1e-9):
                lowest = budget.shown(budget.base + need)
                found.append(
                    f"the cheapest plan takes {lowest} of {budget.shown(budget.original)}, allowed are "
                    f"{budget.shown(budget.limit)} ({budget.name} binds)"
                )
        written = " and ".join(budget.written for budget in self.budgets)
        if not found and error:
            found.append(str(error))
        who = f"no {method} plan" if method else "no plan"
        advice = "ask for less, keep fewer groups, or add smaller candidates"
        raise UsageError(f"{who} meets select.{written}: {'; '.join([self.shortfall(), *found])}; {advice}") from error


def make_task(profile: Profile, settings: SelectSettings, costs: Costs | None = None) -> Task:
    """The units, options and budgets of a selection.

    Args:
        costs: measured ones; without them FLOPs and bytes are known, and times are refused.

    Raises:
        UsageError: a layer that the model does not have, layers that cannot share, a budget without costs.
    """
    costs = costs or of_profile(profile, (LENGTH,))
    operator = settings.operator
    wanted = [operator] if operator else list(profile.candidates.values())
    shared = _shared(profile, settings)
    units = _units(profile, settings, shared)
    kept = _kept(profile, settings, wanted)
    rows: list[tuple[int, Spec]] = []
    for u, groups in enumerate(units):
        rows.append((u, Full()))
        if not any(group in kept for group in groups):
            rows += [(u, s) for s in wanted if all(refusal(profile.sites[n], s) is None for n, _ in groups)]
    for groups in units:
        blocking = [group for group in groups if group in kept]
        for group in groups if blocking else ():
            n, g = blocking[0]
            kept.setdefault(group, f"kept full: tied to group {g} of layer {profile.sites[n].layer}, which is kept")
    budgets = _budgets(profile, settings, costs)
    skeleton = _skeleton(profile, costs, settings.kinds, units, shared, rows, budgets)
    return Task(profile, settings, tuple(units), tuple(spec for _, spec in rows), tuple(budgets), kept, skeleton)


# --- units ------------------------------------------------------------------------------------------------------------


def _with_layer(profile: Profile, layer: int, setting: str) -> list[int]:
    found = [n for n, site in enumerate(profile.sites) if site.layer == layer]
    if not found:
        layers = [site.layer for site in profile.sites]
        raise UsageError(f"{setting} names layer {layer}, but the model has layers {min(layers)}–{max(layers)}")
    return found


def _shared(profile: Profile, settings: SelectSettings) -> list[list[int]]:
    """Sets of sites that take the same operators; most of one site."""
    sets: list[list[int]] = []
    for layers in settings.share:
        members = [n for layer in layers for n in _with_layer(profile, layer, "select.share")]
        heads = {profile.sites[n].kv_heads for n in members}
        if len(heads) > 1:
            names = ", ".join(map(str, layers))
            raise UsageError(f"select.share: layers {names} have different numbers of KV groups: {sorted(heads)}")
        sets.append(members)
    tied = {n for members in sets for n in members}
    return sorted([*sets, *([n] for n in range(len(profile.sites)) if n not in tied)])


def _units(profile: Profile, settings: SelectSettings, shared: Sequence[Sequence[int]]) -> list[tuple[Group, ...]]:
    units: list[tuple[Group, ...]] = []
    for members in shared:
        heads = range(profile.sites[members[0]].kv_heads)
        if settings.unit == "layer":
            units.append(tuple((n, g) for n in members for g in heads))
        else:
            units += [tuple((n, g) for n in members) for g in heads]
    return units


def _kept(profile: Profile, settings: SelectSettings, wanted: Iterable[Spec]) -> dict[Group, str]:
    """The groups that stay full whatever is chosen for the others, with the reason."""
    if settings.retrieval_keep is not None and "retrieval" not in profile.statistics:
        raise UsageError("select.retrieval_keep: an encoder has no retrieval scores; protect layers instead")
    protected = {n for layer in settings.protect for n in _with_layer(profile, layer, "select.protect")}
    broken = broken_heads(profile)
    options = list(wanted)
    kept: dict[Group, str] = {}
    for group in groups_of(profile):
        n, _ = group
        site = profile.sites[n]
        bad = [head for head in heads_of(site, group) if (n, head) in broken]
        score = retrieval_score(profile, group)
        if n in protected:
            kept[group] = f"kept full: layer {site.layer} is protected"
        elif bad:
            kept[group] = f"kept full: head {', '.join(map(str, bad))} is constant or not a number"
        elif all(refusal(site, spec) for spec in options):
            kept[group] = "kept full: no candidate applies to this layer"
        elif settings.retrieval_keep is not None and score is not None and score > settings.retrieval_keep:
            kept[group] = f"kept full: retrieval score {score:.2f} is above {settings.retrieval_keep:.2f}"
    return kept


def groups_of(profile: Profile) -> list[Group]:
    """Every (site index, KV group)."""
    return [(n, g) for n, site in enumerate(profile.sites) for g in range(site.kv_heads)]


def heads_of(site: Site, group: Group) -> range:
    """The query heads of a group."""
    per = site.heads // site.kv_heads
    return range(group[1] * per, (group[1] + 1) * per)


def broken_heads(profile: Profile) -> set[tuple[int, int]]:
    """(site index, query head) of the heads that the profile reports as constant or not finite."""
    named = {(int(m[1]), int(m[2])) for text in profile.problems if (m := re.match(r"L(\d+)H(\d+)\b", text))}
    found = {(n, head) for n, site in enumerate(profile.sites) for layer, head in named if layer == site.layer}
    for name in ("entropy", "retrieval"):
        for n, heads in enumerate(profile.statistics.get(name, [])):
            found |= {(n, head) for head, x in enumerate(heads) if x is None or not np.isfinite(x)}
    return found


def retrieval_score(profile: Profile, group: Group) -> float | None:
    """The highest retrieval score among the query heads of a group; None where none is known."""
    table = profile.statistics.get("retrieval")
    heads = heads_of(profile.sites[group[0]], group)
    known = [score for head in heads if table and (score := table[group[0]][head]) is not None]
    return max(known) if known else None


# --- budgets ----------------------------------------------------------------------------------------------------------


def usual_length(profile: Profile) -> int:
    """At which costs are compared where nobody names a length: 8,192 tokens, or what an encoder was profiled on, or
    the tokens of the profiled image.
    """
    if profile.causal:
        return LENGTH
    if "grid" in profile.data:
        return math.prod(profile.data["grid"])
    return int(profile.data.get("length") or LENGTH)


def refuse_budgets(profile: Profile, settings: SelectSettings) -> None:
    """Raises UsageError where a budget is of what an encoder does not do."""
    wrong = sorted({"decode_ms", "kv_bytes"} & set(settings.budgets or ()))
    if wrong and not profile.causal:
        raise UsageError(
            f"select.budgets.{wrong[0]}: this model reads in both directions, so it decodes nothing and has no cache; "
            "budgets of an encoder are prefill_ms and flops"
        )


def _budgets(profile: Profile, settings: SelectSettings, costs: Costs) -> list[Budget]:
    total = sum(site.kv_heads for site in profile.sites)
    if settings.groups is not None:
        left = total - float(np.ceil(settings.groups * total - 1e-9))
        return [_counted("groups", left, total, settings.groups)]
    if settings.layers is not None:
        count = len(profile.sites)
        if settings.layers > count:
            raise UsageError(f"select.layers asks for {settings.layers} layers, the model has {count}: ask for fewer")
        return [_counted("layers", count - settings.layers, count, settings.layers)]
    saved = "kv_bytes" if profile.causal else "flops"
    given = settings.budgets or ({saved: {usual_length(profile): "100%"}} if settings.keep_quality is not None else {})
    refuse_budgets(profile, settings)
    found = []
    for resource, amounts in given.items():
        for length, amount in amounts.items():
            base = costs.base(resource, length)
            full = sum(_site_cost(costs, resource, site, length) for site in profile.sites)
            share = percentage(amount)
            limit = share * (base + full) if share is not None else float(amount)
            name = f"{resource} at {length:,} tokens"
            found.append(
                Budget(
                    name=name,
                    resource=resource,
                    length=length,
                    limit=limit,
                    original=base + full,
                    base=base,
                    written=f"budgets.{resource}.{length}: {amount}",
                )
            )
    return found


def _counted(name: str, limit: float, total: int, written: object) -> Budget:
    return Budget(
        name=name, resource=name, length=0, limit=limit, original=total, base=0.0, written=f"{name}: {written}"
    )


def _site_cost(costs: Costs, resource: str, site: Site, length: int) -> float:
    """Of a site that is full."""
    launch = costs.launch_cost(resource, site, kind(Full()), length)
    return launch + site.kv_heads * costs.group_cost(resource, site, Full(), length)


def _skeleton(
    profile: Profile,
    costs: Costs,
    most_kinds: int | None,
    units: Sequence[tuple[Group, ...]],
    shared: Sequence[Sequence[int]],
    rows: Sequence[tuple[int, Spec]],
    budgets: Sequence[Budget],
) -> Program:
    """The program without losses."""
    block = {n: b for b, members in enumerate(shared) for n in members}
    names = sorted({kind(spec) for _, spec in rows})
    known: dict[tuple[str, int, int, Spec], float] = {}

    def cost(budget: Budget, n: int, spec: Spec) -> float:
        if budget.resource in ("groups", "layers"):
            return float(spec == Full()) / (profile.sites[n].kv_heads if budget.resource == "layers" else 1)
        key = (budget.resource, budget.length, n, spec)
        if key not in known:
            known[key] = costs.group_cost(budget.resource, profile.sites[n], spec, budget.length)
        return known[key]

    def launch(budget: Budget, members: Sequence[int], name: str) -> float:
        if budget.resource in ("groups", "layers"):
            return 0.0
        return sum(costs.launch_cost(budget.resource, profile.sites[n], name, budget.length) for n in members)

    table = [[sum(cost(b, n, spec) for n, _ in units[u]) for u, spec in rows] for b in budgets]
    launches = [[[launch(b, members, name) for name in names] for members in shared] for b in budgets]
    return Program(
        unit=np.array([u for u, _ in rows]),
        block=np.array([block[units[u][0][0]] for u, _ in rows]),
        kind=np.array([names.index(kind(spec)) for _, spec in rows]),
        loss=np.zeros(len(rows)),
        cost=np.array(table, dtype=float).reshape(len(budgets), len(rows)),
        limit=np.array([b.limit - b.base for b in budgets], dtype=float),
        names=tuple(b.name for b in budgets),
        launch=np.array(launches, dtype=float).reshape(len(budgets), len(shared), len(names)),
        loss_launch=np.zeros((len(shared), len(names))),
        most_kinds=most_kinds,
    )
