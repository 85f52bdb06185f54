"""The plan: which operator each KV group of each site gets. A YAML file that a person can read and edit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..kernels.spec import Full, Spec, label, spec_from_dict, spec_to_dict
from .errors import UsageError, one_line
from .files import write_text
from .hosts.sites import Site, refusal
from .recipe_errors import Key, Located, Problem, did_you_mean, dotted, read_yaml, show

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


def write_plan(path: Path, plan: Plan, reasons: Mapping[str, Sequence[str]] | None = None) -> None:
    """As YAML: operators by label, then a line per site; `reasons` by site and group become short comments."""
    specs = {label(s): spec_to_dict(s) for groups in plan.groups.values() for s in groups}
    lines = [f"attnconvert: {FORMAT}", f"model: {plan.model}", "operators:"]
    lines += [f"  {name}: {_flow(spec)}" for name, spec in sorted(specs.items())]
    lines += ["sites:  # one operator per KV group, in order"]
    for name, groups in plan.groups.items():
        line = f"  {name}: [{', '.join(label(s) for s in groups)}]"
        lines.append(line + _comment(groups, (reasons or {}).get(name, ())))
    write_text(path, "\n".join(lines) + "\n")


def _comment(groups: Sequence[Spec], reasons: Sequence[str]) -> str:
    """What keeps groups full in spite of their damage, and what tells of a whole layer."""
    rules: dict[str, list[int]] = {}
    for g, (spec, reason) in enumerate(zip(groups, reasons, strict=False)):
        verb, _, why = one_line(reason).partition(": ")
        if spec == Full() and verb == "kept full" and " costs " not in why and "not needed" not in why:
            rules.setdefault(why, []).append(g)
    words = [f"{', '.join(map(str, members))}: {why}" for why, members in rules.items()]
    return f"  # kept full {'; '.join(words)}" if words else ""


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


# --- a plan that a person edited --------------------------------------------------------------------------------------


def check_plan(path: Path, sites: Sequence[Site]) -> tuple[list[Problem], list[str]]:
    """Everything that is wrong with a plan for this model, each with its line, and notes of what is easily missed.

    Raises:
        UsageError: the file is missing or no YAML at all.
    """
    try:
        text = path.read_text(encoding="utf-8")
        located = read_yaml(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        read_plan(path)  # which says what is wrong with the file
        raise
    check = _Check(str(path), located, {site.name: site for site in sites})
    return check.run(), check.notes


class _Check:
    """One look through a plan; `problems` and `notes` collect what is found."""

    def __init__(self, origin: str, located: Located, sites: Mapping[str, Site]) -> None:
        self.origin, self.located, self.sites = origin, located, sites
        self.problems: list[Problem] = []
        self.notes: list[str] = []

    def tell(self, where: tuple[Key, ...], message: str) -> None:
        place = where
        while place and place not in self.located.positions:
            place = place[:-1]
        line, column = self.located.positions.get(place, (1, 1))
        self.problems.append(Problem(origin=self.origin, line=line, column=column, key=dotted(where), message=message))

    def run(self) -> list[Problem]:
        for (line, column), where, message in self.located.findings:
            found = Problem(origin=self.origin, line=line, column=column, key=dotted(where), message=message)
            self.problems.append(found)
        given = self.located.data
        if not isinstance(given, dict):
            self.tell((), "is no plan: it needs the keys attnconvert, model, operators, sites")
            return self.problems
        known = ("attnconvert", "model", "operators", "sites")
        for key in given:
            if key not in known:
                self.tell((key,), f"unknown key{did_you_mean(key, known)}; known are {', '.join(known)}")
        if given.get("attnconvert") != FORMAT:
            self.tell(("attnconvert",), f"must be {FORMAT}, the format of plans, not {show(given.get('attnconvert'))}")
        specs = self.operators(given.get("operators"))
        sites = given.get("sites")
        if not isinstance(sites, dict):
            self.tell(("sites",), f"must map sites to lists of labels, not {show(sites)}")
            sites = {}
        for name, labels in sites.items():
            self.site(str(name), labels, specs)
        missing = [name for name in self.sites if name not in sites]
        if missing:
            self.notes.append(
                f"{len(missing)} of {len(self.sites)} sites are not named and stay full: {_abridged(missing)}"
            )
        return sorted(self.problems, key=lambda problem: (problem.line or 0, problem.column or 0))

    def operators(self, given: Any) -> dict[str, Spec | None]:
        """By label; None for one that is wrong, so that its uses are not told as well."""
        specs: dict[str, Spec | None] = {"full": Full()}
        if given is None:
            return specs
        if not isinstance(given, dict):
            self.tell(("operators",), f"must map labels to operators, not {show(given)}")
            return specs
        for name, spec in given.items():
            specs[str(name)] = None
            if not isinstance(spec, dict):
                message = f"must be an operator such as {{operator: window, size: 128}}, not {show(spec)}"
                self.tell(("operators", name), message)
                continue
            try:
                specs[str(name)] = spec_from_dict(spec)
            except ValueError as error:
                self.tell(("operators", name), str(error))
        return specs

    def site(self, name: str, given: Any, specs: Mapping[str, Spec | None]) -> None:
        where: tuple[Key, ...] = ("sites", name)
        site = self.sites.get(name)
        if site is None:
            hint = did_you_mean(name, list(self.sites))
            self.tell(where, f"this model has no such site{hint}; its sites are {_abridged(self.sites)}")
        if not isinstance(given, list):
            self.tell(where, f"must be a list of labels, one per KV group, not {show(given)}")
            return
        if site is not None and len(given) != site.kv_heads:
            self.tell(where, f"has {len(given)} operators, but the site has {site.kv_heads} KV groups")
        for index, name_ in enumerate(given):
            if not isinstance(name_, str) or name_ not in specs:
                hint = did_you_mean(name_, list(specs))
                message = f"{show(name_)} is not among the plan's operators{hint}; they are {', '.join(specs)}"
                self.tell((*where, index), message)
            elif site is not None and specs[name_] is not None and (reason := refusal(site, specs[name_])):
                self.tell((*where, index), f"does not fit: {reason}")
