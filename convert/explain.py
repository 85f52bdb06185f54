"""Why a group got its operator, in words: for `attnconvert select --explain L17H3`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..kernels.spec import Full, Spec, label
from .budgets import Task, broken_heads, groups_of, heads_of, retrieval_score
from .damage import Group
from .errors import UsageError
from .hosts.sites import Site, refusal
from .plan import Plan
from .profiling import Profile
from .program import Program, Solution
from .relaxation import Ints, Relaxation
from .report_html import number
from .wording import IMAGES, TEXT, Wording

if TYPE_CHECKING:
    from collections.abc import Iterator

PLACE = re.compile(r"[Ll](\d+)(?:([HhGg])(\d+))?")


def switches(task: Task, program: Program, known: Ints, solution: Solution) -> dict[Group, dict[str, Any]]:
    """Which operator a group takes next, and at about which amount of the tightest budget, by its Lagrangian price.

    A converted group turns back where the budget is wide enough, a full one turns where it is tight enough. `known` are
    the options of the task that the program has.
    """
    prices = np.array([solution.prices[name] for name in program.names])
    if not prices.any():
        return {}
    tight = int((prices * program.scale).argmax())
    budget, relaxation = task.budgets[tight], Relaxation(program)
    ends = np.append(program.starts[1:], len(program.unit))
    amounts: dict[tuple[float, bool], float] = {}
    found: dict[Group, dict[str, Any]] = {}
    for u, (first, end, current) in enumerate(zip(program.starts, ends, solution.choice, strict=True)):
        others = np.arange(first, end)
        saved = program.cost[tight, current] - program.cost[tight, others]
        turns = saved > 0 if current == first else saved < 0
        if not turns.any():
            continue
        switch = np.maximum((program.loss[others] - program.loss[current])[turns] / saved[turns], 0.0)
        best = int(switch.argmin() if current == first else switch.argmax())
        price = float(switch[best])
        if (price, current == first) not in amounts:
            beyond = price * (1 + 1e-9) + 1e-30 if current == first else price * (1 - 1e-9)  # where it has changed
            _, choice = relaxation.at(np.where(np.arange(len(prices)) == tight, beyond, prices))
            amounts[price, current == first] = budget.base + float(program.usage(choice)[tight])
        amount = amounts[price, current == first]
        entry = {
            "to": label(task.specs[known[others[turns][best]]]),
            "budget": budget.name,
            "price": price,
            "now": float(prices[tight]),
            "amount": amount,
            "shown": budget.shown(amount),
            "limit": budget.shown(budget.limit),
        }
        found |= dict.fromkeys(task.units[u], entry)
    return found


def explain(profile: Profile, selection: Mapping[str, Any], plan: Plan, where: str) -> list[str]:
    """Lines that say why a head ("L17H3"), a KV group ("L17G1") or a layer ("L17") got what it got.

    Args:
        selection: the entry of the arm in select.json; plan: its plan, which a person may have edited since.

    Raises:
        UsageError: there is no such layer, head or group.
    """
    lines: list[str] = []
    for n, groups, head in _places(profile, where):
        site = profile.sites[n]
        for g in groups:
            lines += _group(profile, selection, plan, site, (n, g), head)
    return lines + list(_whole(selection, _words(profile).loss))


def _places(profile: Profile, where: str) -> list[tuple[int, Sequence[int], int | None]]:
    """(site index, KV groups, query head or None) that a name means; several where sites share a layer's index."""
    match = PLACE.fullmatch(where.strip())
    if match is None:
        raise UsageError(f"{where!r} names no head: write L17H3 for a head, L17G1 for a KV group, L17 for a layer")
    layer, what, index = int(match[1]), (match[2] or "").upper(), int(match[3] or 0)
    sites = [n for n, site in enumerate(profile.sites) if site.layer == layer]
    if not sites:
        layers = [site.layer for site in profile.sites]
        raise UsageError(f"there is no layer {layer}: the model has layers {min(layers)}–{max(layers)}")
    found: list[tuple[int, Sequence[int], int | None]] = []
    for n in sites:
        site = profile.sites[n]
        count = site.heads if what == "H" else site.kv_heads
        if what and index >= count:
            word = "head" if what == "H" else "KV group"
            raise UsageError(f"layer {layer} has no {word} {index}: its {word}s are 0–{count - 1}")
        if what == "H":
            found.append((n, [index // (site.heads // site.kv_heads)], index))
        else:
            found.append((n, [index] if what else range(site.kv_heads), None))
    return found


def _group(
    profile: Profile, selection: Mapping[str, Any], plan: Plan, site: Site, group: Group, head: int | None
) -> Iterator[str]:
    g = group[1]
    heads = heads_of(site, group)
    specs = plan.groups.get(site.name, (Full(),) * site.kv_heads)
    span = f"head {heads[0]}" if len(heads) == 1 else f"heads {heads[0]}–{heads[-1]}"
    of = f"layer {site.layer}, KV group {g} ({span})"
    if site.axes and len(heads) == 1:
        of = f"layer {site.layer}, head {g}"
    elif head is not None:
        of = f"head {head} of layer {site.layer} is in KV group {g} ({span})"
    yield f"{of}: {_named(specs[g])}"
    reason = ((selection.get("reasons") or {}).get(site.name) or [""] * site.kv_heads)[g]
    edited = bool(reason) and reason.startswith("converted") != (specs[g] != Full())
    if edited:
        yield "  the plan was edited: this is not what the selection had chosen"
    elif reason:
        yield f"  chosen by {selection.get('method', 'an edited plan')}: {reason}"
    for name in profile.candidates:
        yield f"  {name}: {_damage(profile, site, group, name)}"
    yield from _figures(profile, group, [head] if head is not None else list(heads))
    if not edited:
        yield from _price(selection, site, group, specs[g])


def _named(spec: Spec) -> str:
    return "full attention, as in the original" if spec == Full() else f"converted to {label(spec)}"


def _damage(profile: Profile, site: Site, group: Group, name: str) -> str:
    """What one candidate costs this group, and how that ranks among all groups."""
    if reason := refusal(site, profile.candidates[name]):
        return f"does not fit: {reason}"
    table = profile.damage.get(name)
    if not table:
        return "its damage was not measured"
    parts = []
    words = _words(profile)
    noun = "groups" if words.needles else "heads"
    for key, word in (("kl", words.loss), ("needle", "needle loss")) if words.needles else (("kl", words.loss),):
        cells = {other: table[key][other[0]][other[1]] for other in groups_of(profile)}
        known = sorted((x for x in cells.values() if x is not None), reverse=True)
        mine = cells[group]
        if mine is None:
            parts.append(f"{word} not measured")
        else:
            parts.append(f"{word} {number(mine)}, the {_ordinal(known.index(mine) + 1)} highest of {len(known)} {noun}")
    return "alone it costs " + "; ".join(parts)


def _words(profile: Profile) -> Wording:
    return IMAGES if any(site.axes for site in profile.sites) else TEXT


def _ordinal(n: int) -> str:
    ending = "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"


def _figures(profile: Profile, group: Group, heads: Sequence[int]) -> Iterator[str]:
    """What the heads look at."""
    n = group[0]
    for head in heads:
        if (n, head) in broken_heads(profile):
            yield f"  head {head} is constant or not a number, so its group is left alone"
            continue
        words = (("entropy", "entropy", " nats"), ("local_mass", "near tokens", ""), ("sink_mass", "first tokens", ""))
        found = []
        table_words = words[:2] if profile.sites[n].axes else words  # the first tokens of an image are its corner
        for name, word, unit in table_words:
            table = profile.statistics.get(name)
            if table and table[n][head] is not None:
                value = f"{number(table[n][head])}{unit}" if unit else f"{table[n][head]:.0%} of its attention"
                found.append(f"{word} {value}" if unit else f"{value} on {word}")
        lost = [f"{name} misses {t[n][head]:.0%}" for name, t in profile.mass_lost.items() if t[n][head] is not None]
        yield f"  head {head}: {', '.join(found + lost) or 'nothing is known of its attention'}"
    score = retrieval_score(profile, group)
    if score is not None:
        yield f"  retrieval score of the group {score:.2f}: share of attention on the answer while it is being given"


def _price(selection: Mapping[str, Any], site: Site, group: Group, spec: Spec) -> Iterator[str]:
    found = ((selection.get("switches") or {}).get(site.name) or [None] * site.kv_heads)[group[1]]
    if not found:
        return
    how = "as little as" if spec == Full() else "as much as"
    shown, limit = (found[key].replace("groups", "heads") if site.axes else found[key] for key in ("shown", "limit"))
    yield (
        f"  it would become {found['to']} if {found['budget']} were {how} about {shown} (now {limit}); "
        f"that costs {found['price']:.3g} of loss per unit saved, the budget's price is {found['now']:.3g}"
    )


def _whole(selection: Mapping[str, Any], loss: str) -> Iterator[str]:
    """What the plan as a whole is predicted and measured to lose."""
    predicted, measured = selection.get("predicted") or {}, selection.get("measured") or {}
    if predicted.get("kl") is not None:
        together = f"; measured together {number(measured['kl'])}" if measured.get("kl") is not None else ""
        yield f"the whole plan: the single damages add up to {loss} {number(predicted['kl'])}{together}"
    if selection.get("gap") is not None and selection.get("bound") is not None:
        yield f"its loss is {number(selection['loss'])}, and no plan has less than {number(selection['bound'])}"
