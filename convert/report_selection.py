"""The report's account of the choice: its budgets, the front it stands on, the masks, and what predicts damage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from .artefacts import Artefacts, Site, dig
from .report_html import NONE, details, duration, figure, number, percent, section, size, table, tokens

if TYPE_CHECKING:
    from .plots_selection import Panel

RETRIEVES = 0.1  # retrieval score from which on a group is set off
SCATTERS = 2  # candidates whose scores are drawn; the table has all
RESOURCES = {
    "kv_bytes": "KV cache",
    "flops": "attention FLOPs",
    "prefill_ms": "prefill time",
    "decode_ms": "decode time",
}
Pictures = dict[str, str | bytes]


# --- budgets ----------------------------------------------------------------------------------------------------------


def budgets_part(run: Artefacts) -> str:
    """What every plan was allowed and uses, and how near to the best possible it is."""
    rows, words = [], []
    for arm, entry in dig(run.select, "arms", default={}).items():
        for name, cost in dig(entry, "costs", default={}).items():
            limit, used, original = (cost.get(key) for key in ("limit", "used", "original"))
            shares = [percent(x / original) if original and x is not None else number(None) for x in (limit, used)]
            amounts = [_amount(cost.get("resource"), x) for x in (limit, used, original)]
            cells = [f"{amounts[0]}<small>{shares[0]}</small>", f"{amounts[1]}<small>{shares[1]}</small>", amounts[2]]
            where = f" at {tokens(cost['length'])} {run.words.tokens}" if cost.get("length") else ""
            what = "heads" if run.images and name == "groups" else RESOURCES.get(cost.get("resource"), name)
            rows.append([escape(arm), escape(what + where), *cells])
        words += [f"<li><b>{escape(arm)}</b>: {told}</li>" for told in [_bound(entry, run.images)] if told]
    if not rows and not words:
        return ""
    shown = table(["Arm", "Budget", "Allowed", "Used", "Original"], rows, text=(0, 1)) if rows else ""
    proof = f'<ul class="conclusions">{"".join(words)}</ul>' if words else ""
    return "<h3>Budgets</h3>" + shown + proof


def _amount(resource: object, value: object) -> str:
    if resource == "kv_bytes":
        return size(value)
    if resource == "flops" and isinstance(value, int | float):
        return f"{value:.3g}"
    if resource in ("groups", "layers") and isinstance(value, int | float):
        return f"{value:.6g} left full"
    return f"{number(value)} ms" if resource in ("prefill_ms", "decode_ms") else number(value)


def _bound(entry: Mapping[str, Any], heads: bool) -> str:
    """How good the plan is, in words: what the integer program proved."""
    loss, bound, gap = (entry.get(key) for key in ("loss", "bound", "gap"))
    if loss is None or gap is None:
        return ""
    how = f"{escape(str(entry.get('how', '')))}, {duration(entry.get('seconds'))}"
    proven = gap < 1e-9
    if bound is None:
        near = "no plan takes less" if proven else f"no plan takes {_share(gap)} less"
        return f"the cheapest plan of its predicted loss, {number(loss)}: {near} ({how})"
    near = "and no plan has less"
    if not proven:
        near = f"and no plan has less than {number(bound)}: this one is within {_share(gap)} of that"
    return f"its {'heads' if heads else 'groups'} lose {number(loss)} one by one, {near} ({how})"


def _share(gap: float) -> str:
    return "less than 0.01 %" if gap < 1e-4 else f"{number(100 * gap, 2)} %"


# --- the front --------------------------------------------------------------------------------------------------------


def front_section(run: Artefacts, pictures: Pictures) -> str:
    """Every selector at several costs, and what refinement gained."""
    parts = [_front(run, pictures), _refinement(run, pictures)]
    note = "Whether another choice would have been better: of the same budget, of another, or by another method."
    return section("How good the choice is", *parts, note=note)


def _front(run: Artefacts, pictures: Pictures) -> str:
    found = run.front
    if not found.get("front"):
        return ""
    from .plots_selection import NAMES, pareto

    resource = RESOURCES.get(str(found.get("resource")), str(found.get("resource")))
    x_label = f"{resource} at {tokens(found.get('length', 0))} {run.words.tokens}, % of the original's"
    weight = found.get("needle_weight", 1)
    measured = found.get("method") == "damage"
    times = "" if weight == 1 else f"{weight:g} × "
    judged_by = f"KL + {times}needle loss" if run.words.needles else run.words.loss
    what = judged_by if measured else "output error"
    heads = "heads" if run.images else "groups"
    joint = _joint(run, weight) if measured else {}
    plot = pareto(found, x_label, f"sum over {heads}: {what}", joint)
    if plot is None:
        return ""
    pictures |= {"front.svg": plot.svg, "front.png": plot.png}
    judged = "measured damages" if measured else "output errors, as no damage was measured"
    caption = (
        f"Down and left is better. Every plan is judged by the same sum of its {heads}' {judged}; at each cost the "
        f"line is the least that any plan can have. {heads.capitalize()} act together, so that a whole plan may lose "
        "more or less than the sum: a hollow star is that, measured."
    )
    left = {name: why for name, why in found.get("left_out", {}).items() if name not in run.words.foreign}
    out = [f"{NAMES.get(name, name)} ({why})" for name, why in left.items()]
    missing = f'<p class="note">Not shown: {escape("; ".join(out))}.</p>' if out else ""
    return figure(plot.inline, caption) + _front_table(found, what, NAMES) + missing


def _joint(run: Artefacts, weight: float) -> dict[str, float]:
    """By arm what its plan loses as a whole, where that was measured when it was chosen."""
    found = {}
    for arm, entry in dig(run.select, "arms", default={}).items():
        kl, needle = (dig(entry, "measured", key) for key in ("kl", "needle"))
        error = dig(entry, "measured", "needle_error", default=0.0)
        if kl is not None and needle is not None:  # as damage.joint_loss, which needs torch
            found[arm] = max(kl, 0.0) + weight * max(needle - 2 * error, 0.0)
    return found


def _front_table(found: Mapping[str, Any], what: str, names: Mapping[str, str]) -> str:
    """Loss at the compared budgets, by method; several plans of one method as their mean."""
    entries = {str(found.get("method")): found["front"], **found.get("others", {})}
    budgets = sorted({e["budget"] for method in found.get("others", {}).values() for e in method})
    rows = []
    for name, points in entries.items():
        cells = []
        for budget in budgets:
            losses = [e["loss"] for e in points if abs(e["budget"] - budget) < 1e-9 and e.get("loss") is not None]
            cells.append(number(sum(losses) / len(losses) if losses else None))
        rows.append([escape(names.get(name, name)), *cells])
    if not budgets:
        return ""
    head = ["Method", *(f"at most {percent(budget, 0)}" for budget in budgets)]
    return details(f"The same in figures: {what}", table(head, rows))


def _refinement(run: Artefacts, pictures: Pictures) -> str:
    arms = dig(run.select, "arms", default={})
    histories = {arm: entry["refinement"] for arm, entry in arms.items() if entry.get("refinement")}
    if not histories:
        return ""
    from .plots_selection import refinement

    columns = ("predicted", "loss", "kl", "needle") if run.words.needles else ("predicted", "loss")
    judged = "KL + weighted needle" if run.words.needles else run.words.loss
    plot = refinement(histories, f"loss: {judged}")
    rows = []
    for arm, lines in histories.items():
        rows += [[escape(arm)]] if len(histories) > 1 else []
        for line in lines:
            cells = [number(line.get(key)) for key in columns]
            verdict = "better" if line.get("kept") else ""
            plan = str(line.get("scores")).replace("KL", run.words.loss)
            rows.append([f"{line.get('round')}: {escape(plan)}", *cells, verdict])
    further = ["KL", "Needle loss"] if run.words.needles else []
    head = ["Round: plan", "Loss, predicted", "Loss, measured", *further, ""]
    caption = (
        "Whole plans, measured: first those of several methods, then, round by round, those that the program gives "
        f"when every {'head' if run.images else 'group'} is scored anew around the best so far. A filled dot was "
        "better than all before it; where a cross lies far from its dot, they act together."
    )
    drawn = ""
    if plot:
        pictures |= {"refinement.svg": plot.svg, "refinement.png": plot.png}
        drawn = figure(plot.inline, caption)
    return "<h3>Refinement</h3>" + drawn + table(head, rows, text=(0, len(head) - 1))


# --- what predicts damage ---------------------------------------------------------------------------------------------


def predictors_part(run: Artefacts, pictures: Pictures) -> str:
    """Cheap scores against measured damage, KV group by KV group, with their rank correlation."""
    names = [name for name, table in dig(run.profile, "damage", default={}).items() if dig(table, "kl")]
    panels = {name: found for name in names if (found := _panels(run, name))}
    if not panels:
        return ""
    from .plots_selection import predictors

    drawn: list[tuple[str, str]] = []
    for name in list(panels)[:SCATTERS]:
        marked = f"retrieval score ≥ {RETRIEVES:g}" if run.words.needles else ""
        plot = predictors(panels[name], f"a {run.words.group}", marked, name)
        if plot:
            pictures |= {f"predictors-{name}.svg": plot.svg, f"predictors-{name}.png": plot.png}
            drawn.append((name, plot.inline))
    caption = (
        f"Each dot is a {run.words.group}: what a cheap score says of it, and what converting it alone was measured "
        "to cost. ρ is Spearman's rank correlation, ±1 where the score puts them in the same order; damage of 0 and "
        "less lies on the lower edge."
    )
    first = figure(drawn[0][1], f"<b>{escape(drawn[0][0])}.</b> {caption}") if drawn else ""
    more = "".join(details(f"The same for {name}", figure(picture)) for name, picture in drawn[1:])
    return "<h3>What predicts the damage</h3>" + first + more + _rank_table(panels)


def _panels(run: Artefacts, name: str) -> list[Panel]:
    """Every score of a candidate that is known of at least three groups."""
    from .plots_selection import Panel

    retrieval = _by_group(run.sites, dig(run.profile, "statistics", "retrieval", default=[]))
    marks = [max(_known(scores), default=0.0) >= RETRIEVES for scores in retrieval]
    panels = []
    for title, measure, scores in _scores(run, name):
        harm = [cell for row in dig(run.profile, "damage", name, measure, default=[]) for cell in row]
        flags = marks or [False] * len(harm)
        rows = [(x, y, m) for x, y, m in zip(scores, harm, flags, strict=False) if x is not None and y is not None]
        if len(rows) >= 3:
            x, y, on = [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]
            unit = run.words.loss + run.words.unit if measure == "kl" else "needle loss, nats"
            panels.append(Panel(title=title, score=x, damage=y, marked=on, rank=spearman(x, y), unit=unit))
    return panels


def _rank_table(panels: Mapping[str, Sequence[Panel]]) -> str:
    """Rank correlations of all scores, a column per candidate."""
    ranks: dict[str, dict[str, str]] = {}
    for name, found in panels.items():
        for panel in found:
            told = NONE if panel.rank is None else f"{panel.rank:.2f}".replace("-", "\u2212")
            ranks.setdefault(f"{panel.title} → {panel.unit.partition(',')[0]}", {})[name] = told
    rows = [[escape(title), *(row.get(name, NONE) for name in panels)] for title, row in ranks.items()]
    return table(["Spearman's ρ of", *(escape(name) for name in panels)], rows)


def _scores(run: Artefacts, name: str) -> list[tuple[str, str, list[float | None]]]:
    """(what it is, the damage it is held against, a number per KV group) of every score that the profile has."""
    statistics = dig(run.profile, "statistics", default={})
    found = []
    for title, measure, heads, how in (
        ("output error", "kl", dig(run.profile, "output_error", name), sum),
        ("output change", "kl", dig(run.profile, "output_change", name), sum),
        ("mass lost", "kl", dig(run.profile, "mass_lost", name), sum),
        ("first-order effect", "kl", dig(run.profile, "first_order", name), sum),
        ("entropy", "kl", statistics.get("entropy"), _mean),
        ("sink mass", "kl", statistics.get("sink_mass"), _mean),
        ("retrieval score", "needle", statistics.get("retrieval"), max),
        ("first-order, needle", "needle", dig(run.profile, "first_order_needle", name), sum),
    ):
        groups = _by_group(run.sites, heads or [])
        values = [None if None in cells or not cells else float(how(_known(cells))) for cells in groups]
        found.append((title, measure, values))
    gates = dig(run.profile, "gates", "duo", default=[])
    return [*found, ("gate of DuoAttention", "kl", [cell for row in gates for cell in row])]


def _by_group(sites: Sequence[Site], heads: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """The cells of a [site][query head] table, by KV group of all sites."""
    return [
        list(row[g * site.per_group : (g + 1) * site.per_group])
        for site, row in zip(sites, heads, strict=False)
        for g in range(site.kv_heads)
    ]


def _known(cells: Sequence[Any]) -> list[float]:
    return [float(cell) for cell in cells if cell is not None]


def _mean(cells: Sequence[float]) -> float:
    return sum(cells) / len(cells)


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Rank correlation, equal values sharing their mean rank; None where one of them does not vary."""
    import numpy as np

    def ranked(values: Sequence[float]) -> Any:
        _, place, count = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
        return (np.cumsum(count) - (count - 1) / 2)[place]

    a, b = ranked(one), ranked(other)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else None
