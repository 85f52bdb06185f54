"""Plans as Python gives them: a plan, the file of one, a selection, or operators by site or by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from ..kernels.spec import Full, Spec, is_spec, spec_from_dict
from .errors import UsageError
from .hosts.sites import Site
from .plan import Plan, read_plan
from .recipe_errors import did_you_mean, show
from .recipe_fields import layers_of
from .selection import Selection

Operators = Spec | Mapping[str, Any] | Sequence[Spec | Mapping[str, Any]]  # for all KV groups of a site, or for each
PlanGiven = Plan | Selection | str | PathLike[str] | Mapping[str | int, Operators]


def plan_given(given: PlanGiven, sites: Sequence[Site], model: str) -> Plan:
    """The plan that is meant. In a mapping a key is the name of a site, a layer (12) or several ("4-7,9").

    Raises:
        UsageError: it is none, or names what the model does not have.
    """
    if isinstance(given, Plan):
        return given
    if isinstance(given, Selection):
        return given.plan
    if isinstance(given, str | PathLike):
        return read_plan(Path(given))
    if not isinstance(given, Mapping):
        raise UsageError(
            f"no plan: {show(given)}; give a plan, its file, a selection, or operators by layer such as "
            '{"4-7": {"operator": "window", "size": 128}}'
        )
    groups: dict[str, tuple[Spec, ...]] = {}
    for key, value in given.items():
        for site in _meant(key, sites):
            if site.name in groups:
                raise UsageError(f"the plan gives operators to {site.name} twice, the second time as {show(key)}")
            groups[site.name] = _specs(key, value, site)
    return Plan(model, {site.name: groups.get(site.name, (Full(),) * site.kv_heads) for site in sites})


def _meant(key: object, sites: Sequence[Site]) -> list[Site]:
    """The sites that a key names."""
    by_name = {site.name: site for site in sites}
    if key in by_name:
        return [by_name[str(key)]]
    layers: set[int] = set()
    for part in str(key).split(","):
        found = layers_of(part.strip())
        if found is None:
            hint = did_you_mean(key, list(by_name))
            raise UsageError(f"the plan names {show(key)}, which is neither a site of this model nor a layer{hint}")
        layers |= set(found)
    have = {site.layer for site in sites}
    if unknown := sorted(layers - have):
        raise UsageError(f"the plan names layer {unknown[0]}, but the model has layers {min(have)}–{max(have)}")
    return [site for site in sites if site.layer in layers]


def _specs(key: object, value: Any, site: Site) -> tuple[Spec, ...]:
    """One operator for each KV group of a site."""
    if isinstance(value, list | tuple):
        if len(value) != site.kv_heads:
            raise UsageError(
                f"the plan gives {len(value)} operators to {site.name}, which has {site.kv_heads} KV groups"
            )
        return tuple(_spec(key, one) for one in value)
    return (_spec(key, value),) * site.kv_heads


def _spec(key: object, value: Any) -> Spec:
    if is_spec(value):
        return value
    if not isinstance(value, Mapping):
        raise UsageError(f"the plan gives {show(value)} to {show(key)}: give an operator such as {{operator: window}}")
    try:
        return spec_from_dict(value)
    except ValueError as error:
        raise UsageError(f"the plan, {show(key)}: {error}") from None
