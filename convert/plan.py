"""The plan: which operator each KV group of each site gets. A YAML file that a person can read and edit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..kernels.spec import Full, Spec, label, spec_from_dict, spec_to_dict
from .errors import UsageError
from .files import write_text
from .hosts.transformers import Site, refusal

FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """`groups[site name][KV group]` is an operator. Sites that are not named stay full."""

    model: str
    groups: Mapping[str, tuple[Spec, ...]]

    @property
    def converted(self) -> float:
        """Share of the KV groups that are not full."""
        specs = [s for groups in self.groups.values() for s in groups]
        return float(sum(s != Full() for s in specs) / max(1, len(specs)))

    def counts(self) -> dict[str, int]:
        """KV groups per operator label."""
        return dict(Counter(label(s) for groups in self.groups.values() for s in groups))

    def for_sites(self, sites: Sequence[Site]) -> dict[Site, list[Spec]]:
        """Operators of every site of a model.

        Raises:
            UsageError: a site that the model does not have, another number of groups, an operator that does not fit.
        """
        known = {site.name: site for site in sites}
        for name, specs in self.groups.items():
            if name not in known:
                raise UsageError(
                    f"the plan names {name!r}, which this model does not have; its sites are {_abridged(known)}"
                )
            if len(specs) != known[name].kv_heads:
                raise UsageError(
                    f"the plan gives {len(specs)} operators to {name}, which has {known[name].kv_heads} KV groups"
                )
            for spec in specs:
                if reason := refusal(known[name], spec):
                    raise UsageError(f"the plan does not fit: {reason}")
        return {site: list(self.groups.get(site.name, (Full(),) * site.kv_heads)) for site in sites}


def _abridged(names: Any) -> str:
    names = list(names)
    return ", ".join(names) if len(names) < 4 else f"{names[0]} … {names[-1]} ({len(names)})"


def write_plan(path: Path, plan: Plan) -> None:
    """As YAML: operators by label, then a line per site."""
    specs = {label(s): spec_to_dict(s) for groups in plan.groups.values() for s in groups}
    lines = [f"attnconvert: {FORMAT}", f"model: {plan.model}", "operators:"]
    lines += [f"  {name}: {_flow(spec)}" for name, spec in sorted(specs.items())]
    lines += ["sites:  # one operator per KV group, in order"]
    lines += [f"  {name}: [{', '.join(label(s) for s in groups)}]" for name, groups in plan.groups.items()]
    write_text(path, "\n".join(lines) + "\n")


def _flow(value: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{k}: {v}" for k, v in value.items()) + "}"


def read_plan(path: Path) -> Plan:
    """The plan in a YAML file.

    Raises:
        UsageError: it is missing, no YAML, or no plan; the message names the place.
    """
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no plan here; run `attnconvert select` first") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as text: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise UsageError(f"{path}{where}: not YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(given, dict) or given.get("attnconvert") != FORMAT or not isinstance(given.get("sites"), dict):
        raise UsageError(
            f"{path}: this is no plan of format {FORMAT}: it needs the keys attnconvert, model, operators, sites"
        )
    specs = {"full": Full(), **_operators(path, given.get("operators") or {})}
    return Plan(str(given.get("model")), {site: _groups(path, site, x, specs) for site, x in given["sites"].items()})


def _operators(path: Path, given: Any) -> dict[str, Spec]:
    if not isinstance(given, dict):
        raise UsageError(f"{path}: operators: give a mapping from label to operator, not {given!r}")
    specs = {}
    for name, spec in given.items():
        if not isinstance(spec, dict):
            raise UsageError(f"{path}: operators.{name}: give a mapping such as {{operator: window}}, not {spec!r}")
        try:
            specs[name] = spec_from_dict(spec)
        except ValueError as error:
            raise UsageError(f"{path}: operators.{name}: {error}") from None
    return specs


def _groups(path: Path, site: Any, given: Any, specs: Mapping[str, Spec]) -> tuple[Spec, ...]:
    if not isinstance(given, list) or not all(isinstance(x, str) for x in given):
        raise UsageError(f"{path}: sites.{site}: give a list of labels, one per KV group, not {given!r}")
    unknown = [x for x in given if x not in specs]
    if unknown:
        raise UsageError(f"{path}: sites.{site}: {unknown[0]!r} is not among the plan's operators: {', '.join(specs)}")
    return tuple(specs[x] for x in given)
