"""Select: from what was measured, one operator for each KV group.

The exact choice under budgets is an integer program (`program.py`): least summed loss over one operator per group. The
selectors that others use (`choosers.py`) stand under the same interface and meet the same budgets (`budgets.py`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..kernels.spec import Full, Spec, label
from .budgets import Losses, Task, make_task, retrieval_score
from .choosers import SELECTORS, Chosen
from .costs import Costs
from .damage import Group, Measure
from .errors import UsageError
from .explain import switches
from .hosts.sites import refusal
from .losses import Scores, cell, losses_of, scored
from .plan import Plan
from .profiling import Profile
from .program import Infeasible, Program, Solution, cheapest, solve
from .relaxation import Ints

if TYPE_CHECKING:
    from .recipe import SelectSettings

TRIES = 10  # plans that are measured for keep_quality
SECONDS = 10.0  # HiGHS's limit; the relaxation's plan stands in

__all__ = ["Group", "Scores", "Selection", "needs_model", "require_profile", "retrieval_score", "select"]


@dataclass(frozen=True)
class Selection:
    """A plan, why each group got its operator, and what is known of it.

    `predicted` are sums of single damages. `loss` is what was minimised, `bound` a proof that no plan has less, `gap`
    their distance; `costs` what every budget allows and what is used; `prices` how much loss one more unit of a budget
    would save; `switches` by site and group which operator comes next, and at which amount of the tightest budget.
    """

    plan: Plan
    method: str
    reasons: Mapping[str, list[str]]
    predicted: Mapping[str, float | None]
    loss: float | None = None
    bound: float | None = None
    gap: float | None = None
    seconds: float = 0.0
    how: str = ""
    costs: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    prices: Mapping[str, float] = field(default_factory=dict)
    switches: Mapping[str, list[dict[str, Any] | None]] = field(default_factory=dict)
    measured: Mapping[str, float] | None = None
    problems: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """The entry of this arm in select.json."""
        known = ("method", "reasons", "predicted", "loss", "bound", "gap", "seconds", "how", "costs", "prices")
        return {
            "converted": self.plan.converted,
            "groups": sum(len(g) for g in self.plan.groups.values()),
            "operators": self.plan.counts(),
            **{name: getattr(self, name) for name in known},
            "switches": dict(self.switches),
            "measured": None if self.measured is None else dict(self.measured),
            "problems": list(self.problems),
        }


def select(
    profile: Profile,
    settings: SelectSettings,
    model: str,
    *,
    costs: Costs | None = None,
    measure: Measure | None = None,
    scores: Scores | None = None,
) -> Selection:
    """The plan that the settings ask for.

    Args:
        costs: what operators cost; without it only budgets of FLOPs and bytes can be met.
        measure: the damage of a whole plan, which method restore and keep_quality need.
        scores: losses that take the place of the method's own, for the groups and candidates that they name.

    Raises:
        UsageError: no plan meets the budget, the settings name a layer or candidate that the profile does not have, or
            the profile lacks what the method needs.
    """
    start = time.perf_counter()
    if settings.method == "explicit":
        return _explicit(profile, settings, model)
    task = make_task(profile, settings, costs)
    if settings.method in SELECTORS:
        chosen = SELECTORS[settings.method](task, measure)
        return _selection(task, chosen, model, time.perf_counter() - start)
    losses = scored(losses_of(task), scores)
    program, known = task.program(losses)
    if not len(task.units):
        raise UsageError("this model has no attention that could be converted")
    measured: dict[str, float] | None = None
    try:
        if settings.keep_quality is not None:
            solution, measured = _keep_quality(task, program, known, measure)
        else:
            solution = solve(program, seconds=SECONDS)
    except Infeasible as error:
        raise task.impossible(error) from error
    chosen = Chosen(known[solution.choice])
    seconds = time.perf_counter() - start
    return _selection(task, chosen, model, seconds, (program, known, solution, losses), measured)


def needs_model(settings: SelectSettings) -> bool:
    """Whether whole plans must be measured, which no profile can stand in for."""
    return bool(settings.rounds) or settings.keep_quality is not None or settings.method == "restore"


def require_profile(profile: Profile, identity: Mapping[str, Any], candidates: Sequence[Spec]) -> None:
    """Refuses a profile of something else.

    Args:
        identity: "model", "revision", "sha256" of the model at hand; what either side does not know is not compared.

    Raises:
        UsageError: it is of another model, another revision, or has other candidates.
    """
    again = "run `attnconvert profile` again"
    theirs = profile.data.get("identity")
    if not isinstance(theirs, Mapping):
        raise UsageError(f"this profile does not say of which model it is: {again}")
    for key, word in (("model", "model"), ("revision", "revision"), ("sha256", "weights (SHA-256)")):
        mine, other = identity.get(key), theirs.get(key)
        if mine is not None and other is not None and mine != other:
            raise UsageError(f"this profile is of another {word}: {other}, not {mine}; {again}")
    wanted, have = [label(spec) for spec in candidates], list(profile.candidates)
    if set(wanted) != set(have):
        raise UsageError(
            f"this profile is of other operators: {', '.join(have)}, while the recipe has {', '.join(wanted)}; {again}"
        )


# --- the cheapest plan of a quality -----------------------------------------------------------------------------------


def _keep_quality(
    task: Task, program: Program, known: Ints, measure: Measure | None
) -> tuple[Solution, dict[str, float]]:
    """The least of the first budget's resource whose measured KL is at most `keep_quality`.

    What single damages add up to is not what they do together, so the sum that is allowed is bisected, and every plan
    on the way is measured.
    """
    keep = task.settings.keep_quality
    assert keep is not None
    if measure is None:
        raise UsageError("keep_quality measures whole plans, which needs the model: run it as `attnconvert select RUN`")

    def measured(found: Solution) -> dict[str, float]:
        converted = task.chosen(known[found.choice])
        return measure(converted) if converted else {"kl": 0.0, "needle": 0.0}

    def attempt(most: float) -> tuple[Solution, dict[str, float]]:
        found = cheapest(program, 0, most * (1 + 1e-9), gap=1e-3, seconds=SECONDS)
        return found, measured(found)

    least = solve(program, seconds=SECONDS)
    result = least, measured(least)
    if result[1]["kl"] > keep:
        raise UsageError(
            f"no plan keeps select.keep_quality: {keep}: the one that loses least within the budgets has a measured KL "
            f"of {result[1]['kl']:.4f}; allow more"
        )
    top = float(sum(program.loss[program.unit == u].max() for u in range(len(program.starts))))
    widest = attempt(top)
    if widest[1]["kl"] <= keep:
        return widest
    low, high = least.loss, program.value(widest[0].choice)
    mid = keep if low < keep < high else float(np.sqrt(max(low, high * 1e-3) * high))
    for _ in range(TRIES):
        if high <= max(low, 1e-9) * 1.02:
            break
        tried = attempt(mid)
        if tried[1]["kl"] <= keep:
            result, low = tried, mid
        else:
            high = min(mid, program.value(tried[0].choice))
        mid = float(np.sqrt(max(low, high * 1e-3) * high))
    return result


# --- the result -------------------------------------------------------------------------------------------------------


def _selection(
    task: Task,
    chosen: Chosen,
    model: str,
    seconds: float,
    solved: tuple[Program, Ints, Solution, Losses] | None = None,
    measured: Mapping[str, float] | None = None,
) -> Selection:
    profile, groups = task.profile, task.chosen(chosen.choice)
    reasons = {}
    for u, members in enumerate(task.units):
        for group in members:
            spec = groups.get(group, Full())
            reasons[group] = task.kept.get(group) or _reason(task, group, spec, chosen.words.get(u), solved)
    found: dict[str, Any] = {}
    if solved is not None:
        program, known, solution, _ = solved
        loss = program.loss[solution.choice].sum()
        quality = task.settings.keep_quality is None
        found = {
            "loss": float(loss),
            "bound": solution.bound if quality else None,
            "gap": solution.gap,
            "how": solution.how,
            "prices": {name: price for name, price in solution.prices.items() if name != "loss"} if quality else {},
            "switches": _by_site(profile, switches(task, program, known, solution) if quality else {}, None),
        }
    return Selection(
        plan=_plan(profile, groups, model),
        method=task.settings.method,
        reasons=_by_site(profile, reasons, ""),
        predicted=_predicted(profile, groups),
        seconds=seconds,
        costs=task.used(chosen.choice),
        measured=measured,
        problems=profile.problems,
        **found,
    )


def _plan(profile: Profile, groups: Mapping[Group, Spec], model: str) -> Plan:
    sites = enumerate(profile.sites)
    return Plan(model, {s.name: tuple(groups.get((n, g), Full()) for g in range(s.kv_heads)) for n, s in sites})


def _by_site(profile: Profile, values: Mapping[Group, Any], default: Any) -> dict[str, list[Any]]:
    sites = enumerate(profile.sites)
    return {s.name: [values.get((n, g), default) for g in range(s.kv_heads)] for n, s in sites}


def _predicted(profile: Profile, chosen: Mapping[Group, Spec]) -> dict[str, float | None]:
    """Sums of the single damages; None where the profile did not measure one of them."""
    totals: dict[str, float | None] = {}
    for measure in ("kl", "needle"):
        cells = [cell(profile.damage.get(label(spec), {}).get(measure), n, g) for (n, g), spec in chosen.items()]
        known = [x for x in cells if x is not None]
        totals[measure] = float(sum(known)) if len(known) == len(cells) else None
    return totals


def _reason(task: Task, group: Group, spec: Spec, word: str | None, solved: Any) -> str:
    """In one line: what the group would lose, and the retrieval score."""
    verb = "kept full" if spec == Full() else "converted"
    if word is not None:
        return word if word.startswith(("converted", "restored")) else f"{verb}: {word}"
    if solved is None:
        return "kept full: not needed for the budget" if spec == Full() else "converted"
    losses: Losses = solved[3]
    known = [(x, s) for s in task.wanted if (x := losses(group, s)) is not None and not _refused(task, group, s)]
    if not known:
        return "kept full: nothing was measured that could stand in"
    loss, shown = next((pair for pair in known if pair[1] == spec), min(known, key=lambda pair: pair[0]))
    table = task.profile.damage.get(label(shown), {})
    kl, needle = (cell(table.get(m), *group) for m in ("kl", "needle"))
    score = retrieval_score(task.profile, group)
    if task.settings.method == "damage" and kl is not None and needle is not None:
        lost = f"KL {kl:.4f} and needle loss {needle:+.3f}"
        if task.profile.sites[group[0]].axes:  # a denoiser, which retrieves nothing
            lost = f"velocity error {kl:.3g}"
        what = f"{label(shown)} costs {lost}"
    else:
        what = f"{label(shown)} has a loss of {loss:.4g} by {task.settings.method}"
    return f"{verb}: {what}" + ("" if score is None else f"; retrieval {score:.2f}")


def _refused(task: Task, group: Group, spec: Spec) -> bool:
    return refusal(task.profile.sites[group[0]], spec) is not None


def _explicit(profile: Profile, settings: SelectSettings, model: str) -> Selection:
    """Layers as the recipe lists them."""
    chosen: dict[Group, Spec] = {}
    layers = [site.layer for site in profile.sites]
    for layer, spec in (settings.explicit or {}).items():
        if layer not in layers:
            raise UsageError(
                f"select.explicit names layer {layer}, but the model has layers {min(layers)}–{max(layers)}"
            )
        for n, site in enumerate(profile.sites):
            if site.layer != layer:
                continue
            if reason := refusal(site, spec):
                raise UsageError(f"select.explicit: {reason}")
            chosen.update({(n, g): spec for g in range(site.kv_heads)})
    reasons = _by_site(profile, dict.fromkeys(chosen, "converted: named in the recipe"), "")
    predicted = _predicted(profile, chosen)
    plan = _plan(profile, chosen, model)
    return Selection(plan, "explicit", reasons, predicted, problems=profile.problems)
