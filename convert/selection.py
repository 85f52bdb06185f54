"""Select: from what was measured, one operator for each KV group.

The exact choice under a budget is an integer program: minimise the summed damage over one operator per group, subject
to the budget. `uniform` and `random` stand under the same interface so that the choice can be compared with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp

from ..kernels import operators
from ..kernels.call import Shape
from ..kernels.spec import Full, Spec, Window, label
from .errors import UsageError
from .hosts.transformers import refusal
from .plan import Plan
from .profiling import Profile
from .text import rng

if TYPE_CHECKING:
    from .recipe import SelectSettings

Group = tuple[int, int]  # site index, KV group


@dataclass(frozen=True)
class Selection:
    """A plan, why each group got its operator, and the damage that the profile predicts (sums of single damages)."""

    plan: Plan
    method: str
    reasons: Mapping[str, list[str]]
    predicted: Mapping[str, float | None]

    def to_json(self) -> dict[str, Any]:
        """The entry of this arm in select.json."""
        groups = sum(len(g) for g in self.plan.groups.values())
        return {
            "method": self.method,
            "converted": self.plan.converted,
            "groups": groups,
            "operators": self.plan.counts(),
            "predicted": dict(self.predicted),
            "reasons": dict(self.reasons),
        }


def select(profile: Profile, settings: SelectSettings, model: str) -> Selection:
    """The plan that the settings ask for.

    Raises:
        UsageError: no plan meets the budget, or the settings name a layer or candidate that the profile does not have.
    """
    chooser = {"damage": _by_damage, "uniform": _spread, "random": _spread, "explicit": _explicit}[settings.method]
    chosen, reasons = chooser(profile, settings)
    groups: dict[str, tuple[Spec, ...]] = {}
    words: dict[str, list[str]] = {}
    for n, site in enumerate(profile.sites):
        groups[site.name] = tuple(chosen.get((n, g), Full()) for g in range(site.kv_heads))
        words[site.name] = [reasons.get((n, g), "") for g in range(site.kv_heads)]
    return Selection(Plan(model, groups), settings.method, words, _predicted(profile, chosen))


def retrieval_score(profile: Profile, group: Group) -> float:
    """The highest retrieval score among the query heads of a group."""
    site = profile.sites[group[0]]
    per = site.heads // site.kv_heads
    scores: list[float] = profile.statistics["retrieval"][group[0]][group[1] * per : (group[1] + 1) * per]
    return max(scores)


def _groups(profile: Profile) -> list[Group]:
    return [(n, g) for n, site in enumerate(profile.sites) for g in range(site.kv_heads)]


def _damage(profile: Profile, group: Group, spec: Spec, weight: float) -> float | None:
    """KL plus the weighted rise of the needle loss; None if this candidate was not measured here."""
    table = profile.damage[label(spec)]
    kl, needle = (table[m][group[0]][group[1]] for m in ("kl", "needle"))
    return None if kl is None else max(kl, 0.0) + weight * max(needle, 0.0)


def _predicted(profile: Profile, chosen: Mapping[Group, Spec]) -> dict[str, float | None]:
    """Sums of the single damages; None where the profile did not measure one of them."""
    totals: dict[str, float | None] = {}
    for measure in ("kl", "needle"):
        values: list[float | None] = []
        for (n, g), spec in chosen.items():
            if spec != Full():
                table = profile.damage.get(label(spec))
                values.append(None if table is None else table[measure][n][g])
        known = [v for v in values if v is not None]
        totals[measure] = float(sum(known)) if len(known) == len(values) else None
    return totals


def _by_damage(profile: Profile, settings: SelectSettings) -> tuple[dict[Group, Spec], dict[Group, str]]:
    """Least summed damage under the budget, groups that carry retrieval kept full."""
    groups = _groups(profile)
    wanted = [settings.operator] if settings.operator else list(profile.candidates.values())
    options: list[tuple[Group, Spec, float]] = []
    reasons: dict[Group, str] = {}
    for group in groups:
        options.append((group, Full(), 0.0))
        score = retrieval_score(profile, group)
        if settings.retrieval_keep is not None and score > settings.retrieval_keep:
            reasons[group] = f"kept full: retrieval score {score:.2f} is above {settings.retrieval_keep:.2f}"
            continue
        for spec in wanted:
            damage = _damage(profile, group, spec, settings.needle_weight)
            if damage is not None and refusal(profile.sites[group[0]], spec) is None:
                options.append((group, spec, damage))
    taken = _solve(profile, settings, groups, options)
    chosen = {group: spec for (group, spec, _), take in zip(options, taken, strict=True) if take}
    for group, spec in chosen.items():
        reasons.setdefault(group, _reason(profile, settings, group, spec, wanted))
    return chosen, reasons


def _reason(profile: Profile, settings: SelectSettings, group: Group, spec: Spec, wanted: Sequence[Spec]) -> str:
    measured = [(d, w) for w in wanted if (d := _damage(profile, group, w, settings.needle_weight)) is not None]
    if not measured:
        return "kept full: no candidate applies to this layer"
    shown = spec if spec != Full() else min(measured, key=lambda pair: pair[0])[1]
    table = profile.damage[label(shown)]
    kl, needle = (table[m][group[0]][group[1]] for m in ("kl", "needle"))
    score = retrieval_score(profile, group)
    what = f"{label(shown)} costs KL {kl:.4f} and needle loss {needle:+.3f}; retrieval {score:.2f}"
    return f"{'kept full' if spec == Full() else 'converted'}: {what}"


def _solve(
    profile: Profile, settings: SelectSettings, groups: Sequence[Group], options: Sequence[tuple[Group, Spec, float]]
) -> Any:
    """Which options to take: one per group, within the budget, whole layers where the unit is a layer."""
    rows, low, high = [], [], []

    def add(row: Any, least: float, most: float) -> None:
        rows.append(row)
        low.append(least)
        high.append(most)

    converts = np.array([spec != Full() for _, spec, _ in options], dtype=float)
    member = {group: np.array([g == group for g, _, _ in options], dtype=float) for group in groups}
    for group in groups:
        add(member[group], 1, 1)
    if settings.unit == "layer":
        _tie_layers(groups, options, add)
    budget = ""
    if settings.groups is not None:
        budget = f"groups: {settings.groups}"
        add(converts, np.ceil(settings.groups * len(groups) - 1e-9), np.inf)
    if settings.layers is not None:
        budget = f"layers: {settings.layers}"
        share = np.array([converts[i] / profile.sites[g[0]].kv_heads for i, (g, _, _) in enumerate(options)])
        add(share, settings.layers, settings.layers)
    if settings.kv_bytes is not None:
        budget = f"kv_bytes: {settings.kv_bytes} at length {settings.length}"
        sizes = np.array([_state_bytes(profile, g, spec, settings.length) for g, spec, _ in options])
        full = sum(_state_bytes(profile, g, Full(), settings.length) for g in groups)
        add(sizes / full, 0, settings.kv_bytes)
    damage = np.array([d for _, _, d in options])
    result = milp(
        damage,
        constraints=LinearConstraint(np.array(rows), low, high),
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
    )
    if result.x is None:
        free = len({g for g, spec, _ in options if spec != Full()})
        raise UsageError(
            f"no plan meets select.{budget}: {free} of {len(groups)} KV groups may be converted "
            f"(retrieval_keep: {settings.retrieval_keep}); ask for less, keep fewer groups, or add smaller candidates"
        )
    return result.x > 0.5


def _tie_layers(groups: Sequence[Group], options: Sequence[tuple[Group, Spec, float]], add: Any) -> None:
    """All groups of a layer take the same operator as its first group."""
    for group in groups:
        first = (group[0], 0)
        if group == first:
            continue
        for spec in {s for g, s, _ in options if g in (group, first)}:
            row = np.array([float(s == spec) * ((g == group) - float(g == first)) for g, s, _ in options])
            add(row, 0, 0)


def _state_bytes(profile: Profile, group: Group, spec: Spec, length: int) -> float:
    site = profile.sites[group[0]]
    shape = Shape(queries=site.heads // site.kv_heads, dim=site.dim, element=profile.data.get("element", 2))
    if spec == Full() and site.limit is not None:
        spec = Window(size=site.limit, sinks=0)
    return operators.of(spec).state_size(spec, shape, length)


def _spread(profile: Profile, settings: SelectSettings) -> tuple[dict[Group, Spec], dict[Group, str]]:
    """Evenly spaced or random groups or layers, as many as the budget needs."""
    spec = settings.operator or next(iter(profile.candidates.values()))
    units = _groups(profile) if settings.unit == "group" else [(n, -1) for n in range(len(profile.sites))]
    units = [unit for unit in units if refusal(profile.sites[unit[0]], spec) is None]
    if settings.method == "random":
        shuffled = torch.randperm(len(units), generator=rng("select", settings.seed)).tolist()
    else:  # evenly spaced at every prefix: van der Corput order
        shuffled = np.argsort([int(f"{i:032b}"[::-1], 2) for i in range(len(units))], kind="stable").tolist()
    chosen: dict[Group, Spec] = {}
    for count in range(len(units) + 1):
        if _budget_met(profile, settings, chosen, count):
            break
        if count == len(units):
            raise UsageError(f"no {settings.method} plan meets the budget even with every group as {label(spec)}")
        n, g = units[shuffled[count]]
        members = range(profile.sites[n].kv_heads) if g < 0 else [g]
        chosen.update({(n, m): spec for m in members})
    word = "evenly spaced" if settings.method == "uniform" else f"at random, seed {settings.seed}"
    return chosen, dict.fromkeys(chosen, f"converted: {word}")


def _budget_met(profile: Profile, settings: SelectSettings, chosen: Mapping[Group, Spec], units: int) -> bool:
    groups = _groups(profile)
    if settings.groups is not None:
        return len(chosen) >= settings.groups * len(groups) - 1e-9
    if settings.layers is not None:
        return units >= settings.layers
    used = sum(_state_bytes(profile, g, chosen.get(g, Full()), settings.length) for g in groups)
    full = sum(_state_bytes(profile, g, Full(), settings.length) for g in groups)
    return used / full <= (settings.kv_bytes or 1.0)


def _explicit(profile: Profile, settings: SelectSettings) -> tuple[dict[Group, Spec], dict[Group, str]]:
    """Layers as the recipe lists them."""
    chosen: dict[Group, Spec] = {}
    layers = {site.layer: n for n, site in enumerate(profile.sites)}
    for key, spec in (settings.explicit or {}).items():
        first, _, last = str(key).partition("-")
        for layer in range(int(first), int(last or first) + 1):
            if layer not in layers:
                raise UsageError(
                    f"select.explicit names layer {layer}, but the model has layers {min(layers)}–{max(layers)}"
                )
            n = layers[layer]
            if reason := refusal(profile.sites[n], spec):
                raise UsageError(f"select.explicit: {reason}")
            chosen.update({(n, g): spec for g in range(profile.sites[n].kv_heads)})
    return chosen, dict.fromkeys(chosen, "converted: named in the recipe")
