"""The report's sections of maps: what was chosen for each group, and what the profile measured to choose by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .artefacts import Artefacts, Site, dig
from .headmaps import Cell, Swatch, head_map, operator_colours, shade
from .report_bands import bands_part
from .report_grid_masks import grid_masks_part
from .report_heat import WIDE, heat, layer_map, named
from .report_html import NONE, details, figure, number, percent, section, table
from .report_masks import masks_part
from .report_selection import budgets_part, predictors_part

RETRIEVAL, KL, NEEDLE, ERROR, DENSITY = "#0072b2", "#d55e00", "#a5437c", "#8a6d00", "#007a5a"
SHOWN = 2  # candidates whose maps are not folded away
LIKE = 1 / 8  # share of the blocks at which heads are called extreme


def choice_section(run: Artefacts, pictures: dict[str, str | bytes]) -> str:
    """The map of operators, the totals by operator, and every group with its reason."""
    chosen = dig(run.plan, "sites", default={})
    sites = run.sites
    if not chosen or not sites:
        return ""
    labels = sorted({label for groups in chosen.values() for label in groups}, key=lambda x: (x != "full", x))
    kinds = {label: str(dig(run.plan, "operators", label, "operator", default=label)) for label in labels}
    colours = operator_colours(labels, kinds)
    cells = []
    for column, site in enumerate(sites):
        groups = chosen.get(site.name) or ["full"] * site.kv_heads
        scores = dig(run.profile, "statistics", "retrieval", column, default=[])
        for group, label in enumerate(groups[: site.kv_heads]):
            heads = range(group * site.per_group, (group + 1) * site.per_group)
            cells.append(
                Cell(
                    column=column,
                    first=heads.start,
                    count=len(heads),
                    fill=colours.get(label, colours.get("full", "#d5dbe2")),
                    title=_group_title(run, column, site, group, label),
                    dots=tuple(_score(scores, head) for head in heads),
                )
            )
    counts = Counter(label for site in sites for label in (chosen.get(site.name) or ["full"] * site.kv_heads))
    total = sum(counts.values())
    legend = [Swatch(label=f"{name}: {counts[name]} of {total}", fill=colours[name]) for name in labels]
    if any(any(cell.dots) for cell in cells):
        legend.append(Swatch(label="dot area: retrieval score of the head", dot=True))
    picture = layer_map(sites, cells, "Operator of each head by layer", legend=legend, grouped=True)
    pictures["choice.svg"] = picture
    method = dig(run.select, "arms", "student", "method", default="")
    how = f"Chosen by method <b>{escape(method)}</b>. " if method else ""
    rows = "one row per query head; heads between two gaps share a KV head and are converted together"
    if run.images:
        rows = "one row per head"
    note = f"{how}One column per layer, {rows}. Point at a cell for its measured damage and the reason."
    masks = grid_masks_part(run, pictures) if run.images else masks_part(run, pictures)
    parts = [figure(picture), budgets_part(run), _predictions(run), masks, _reasons(run, sites)]
    return section("What was chosen, and why", *parts, note=note)


def _group_title(run: Artefacts, column: int, site: Site, group: int, label: str) -> str:
    first, last = group * site.per_group, (group + 1) * site.per_group - 1
    heads = f"head {first}" if first == last else f"heads {first}–{last}"
    place = heads if run.images else f"KV group {group} ({heads})"
    lines = [f"layer {site.layer}, {place}: {label}"]
    for name in dig(run.profile, "damage", default={}):
        if label in (name, "full"):
            kl, needle = (dig(run.profile, "damage", name, kind, column, group) for kind in ("kl", "needle"))
            verb = "costs" if label == name else "would cost"
            lost = f", needle loss {number(needle)}" if run.words.needles else ""
            lines.append(f"{name} {verb} {run.words.loss} {number(kl)}{lost}")
    scores = dig(run.profile, "statistics", "retrieval", column, default=[])[first : last + 1]
    if scores:
        lines.append("retrieval score " + ", ".join(number(score, 2) for score in scores))
    reason = dig(run.select, "arms", "student", "reasons", site.name, group)
    return "\n".join(lines + ([str(reason)] if reason else []))


def _predictions(run: Artefacts) -> str:
    """What the single damages add up to, beside what was measured of the whole."""
    rows = []
    kinds = ("kl", "needle") if run.words.needles else ("kl",)
    whole = any(dig(entry, "measured") for entry in dig(run.select, "arms", default={}).values())
    for arm, entry in dig(run.select, "arms", default={}).items():
        found = dig(run.evaluation, "arms", arm, default={})
        quality = dig(found, "quality", default={})
        shortest = min(quality, key=int) if quality and not run.images else ""
        measured = dig(quality, "velocity_error") if run.images else dig(quality, shortest, "kl")
        drop = found.get("retrieval_drop")
        points = NONE_YET if drop is None else f"{100 * drop:.1f} points".replace("-", "\u2212")
        kl = NONE if quality else NONE_YET  # a bare encoder has none
        if measured is not None:
            kl = number(measured) + (f"<small>at {int(shortest):,} tokens</small>" if shortest else "")
        predicted = [number(dig(entry, "predicted", kind)) for kind in kinds]
        if whole:
            predicted += [number(dig(entry, "measured", kind)) for kind in kinds]
        trained = {True: "yes", False: "no"}.get(found.get("trained"), "")
        cells = [escape(arm), escape(str(entry.get("method", ""))), percent(entry.get("converted"), 0), *predicted]
        rows.append([*cells, kl, *([points] if run.words.needles else []), trained])
    if not rows:
        return ""
    loss = run.words.loss[:1].upper() + run.words.loss[1:]
    names = [loss, *(["Needle"] if run.words.needles else [])]
    head = [
        "Arm",
        "Method",
        "Converted",
        *(f"{name}, predicted" for name in names),
        *((f"{name}, together" for name in names) if whole else ()),
        f"{loss}, measured",
        *(["Retrieval lost"] if run.words.needles else []),
        "Trained",
    ]
    words = (
        f'<p class="note">The prediction is the sum of the damages of the single {_groups(run)}: it knows neither how '
        f"they act together{_together(run) if whole else ''} nor what training takes back.</p>"
    )
    return "<h3>Predicted and measured</h3>" + table(head, rows, text=(0, 1, len(head) - 1)) + words


def _groups(run: Artefacts) -> str:
    return "heads" if run.images else "groups"


def _together(run: Artefacts) -> str:
    what = "states of the teacher's trajectories" if run.images else "calibration text"
    return f" (measured on {what} when the plan was chosen)"


NONE_YET = '<span class="note">not yet</span>'


def _reasons(run: Artefacts, sites: Sequence[Site]) -> str:
    reasons = dig(run.select, "arms", "student", "reasons", default={})
    if not any(any(groups) for groups in reasons.values()):
        return ""
    rows = []
    for site in sites:
        for group, label in enumerate(dig(run.plan, "sites", site.name, default=[])):
            reason = dig(reasons, site.name, group, default="")
            rows.append(
                [str(site.layer), str(group), escape(str(label)), f'<span class="reason">{escape(str(reason))}</span>']
            )
    what = run.words.group[:1].upper() + run.words.group[1:]
    title = f"Every {what.removeprefix('KV ').lower()} with its reason"
    return details(title, table(["Layer", what, "Operator", "Reason"], rows, text=(2, 3)))


# --- what was measured ------------------------------------------------------------------------------------------------


def profile_section(run: Artefacts, pictures: dict[str, str | bytes]) -> str:
    """Maps of what heads attend to and of what each candidate would lose; scores against damage; curves; similarity."""
    sites = run.sites
    if not run.profile or not sites:
        return ""
    names = dict.fromkeys(name for key in ("output_error", "damage") for name in dig(run.profile, key, default={}))
    kind = "maps wide" if len(sites) > WIDE else "maps"
    rows = [_attention_maps(run, pictures), *(_candidate_maps(run, name, pictures) for name in names)]
    drawn = [f'<div class="{kind}">{row}</div>' if row else "" for row in rows]
    boxes = drawn[: 1 + SHOWN]
    folded = "".join(drawn[1 + SHOWN :])
    boxes += [details("The maps of the other candidates", folded)] if folded else []
    note = (
        "Measured on the teacher, before anything was trained. One column per layer. Damage is that of one "
        f"{run.words.group} converted alone, all else full. Point at a cell for its figure."
    )
    curves = _recall(run, pictures) + _similarity(run, pictures)
    boxes += [f'<div class="{kind}">{curves}</div>'] if curves else []
    boxes += [bands_part(run, pictures)]
    return section("What the profile measured", _problems(run), *boxes, predictors_part(run, pictures), note=note)


def _problems(run: Artefacts) -> str:
    """The heads that are left out, by name."""
    problems = [escape(str(problem)) for problem in dig(run.profile, "problems", default=[])]
    if not problems:
        return ""
    heads = "1 head was" if len(problems) == 1 else f"{len(problems)} heads were"
    lines = "".join(f"<li>{problem}</li>" for problem in problems[:8])
    more = f"<li>and {len(problems) - 8} more, in profile.json</li>" if len(problems) > 8 else ""
    told = f"<b>{heads} not measured.</b> Their cells are hatched, no mean contains them, and their groups stay full:"
    return f'<div class="verdict bad"><div>{told}<ul class="conclusions">{lines}{more}</ul></div></div>'


def _attention_maps(run: Artefacts, pictures: dict[str, str | bytes]) -> str:
    parts = []
    for name, colour, title, unit, words in (
        (
            "retrieval",
            RETRIEVAL,
            "Retrieval score",
            "1 is all",
            "Share of a head's attention that goes to the hidden fact while the answer is read off",
        ),
        (
            "density_90",
            DENSITY,
            "Blocks for 90 % of the attention",
            "1 is every block",
            "Share of the blocks of 64 tokens that hold 90 % of a head's attention: faint heads are sparse",
        ),
    ):
        table = dig(run.profile, "statistics", name)
        if table:
            picture = heat(run.sites, table, colour, unit, per_head=True, log=False, least=0.0, most=1.0)
            parts.append(named(title, picture, words, f"{name.replace('_', '-')}.svg", pictures))
    return "".join(parts)


def _candidate_maps(run: Artefacts, name: str, pictures: dict[str, str | bytes]) -> str:
    """Error and first-order effect of the heads, damage of the groups."""
    parts = []
    for title, values, colour, words, unit, file in (
        (
            "output error",
            dig(run.profile, "output_error", name),
            ERROR,
            "Squared error of a head's output, relative to the output itself",
            "relative, log scale",
            "error",
        ),
        (
            "first-order effect",
            dig(run.profile, "first_order", name),
            KL,
            run.words.first_order,
            "log scale",
            "first-order",
        ),
    ):
        picture = heat(run.sites, values, colour, unit, per_head=True) if values else ""
        parts.append(named(f"{name}: {title}", picture, words, f"{file}-{name}.svg", pictures))
    damage = dig(run.profile, "damage", name, default={})
    measures = [("kl", KL, "damage" if run.images else "damage to the text", run.words.explained)]
    if run.words.needles:
        measures.append(("needle", NEEDLE, "damage to retrieval", "rise of the needle loss, nats"))
    for kind, colour, title, words in measures:
        picture = heat(run.sites, damage.get(kind) or [], colour, "log scale", per_head=run.images)
        parts.append(named(f"{name}: {title}", picture, words, f"damage-{name}-{kind}.svg", pictures))
    return "".join(parts)


def _recall(run: Artefacts, pictures: dict[str, str | bytes]) -> str:
    """How few blocks hold how much of the attention, by what became of the heads."""
    fractions = dig(run.profile, "curves", "fractions", default=[])
    curves = {
        (site, head): curve
        for site, row in zip(run.sites, dig(run.profile, "curves", "recall", default=[]), strict=False)
        for head, curve in enumerate(row)
        if len(curve) == len(fractions) and None not in curve
    }
    if not curves:
        return ""
    from .plots_selection import recall_curves

    kinds: dict[str, list[Sequence[float]]] = {}
    for (site, head), curve in curves.items():
        label = dig(run.plan, "sites", site.name, head // site.per_group, default="heads")
        kinds.setdefault(str(dig(run.plan, "operators", label, "operator", default=label)), []).append(curve)
    at = min(range(len(fractions)), key=lambda n: abs(fractions[n] - LIKE))
    ends = [choose(curves, key=lambda place: curves[place][at]) for choose in (min, max)]
    extremes = {f"L{site.layer}H{head}": curves[site, head] for site, head in ends}
    ordered = dict(sorted(kinds.items(), key=lambda item: (item[0] != "full", item[0])))
    plot = recall_curves(fractions, ordered, extremes)
    if plot is None:
        return ""
    pictures |= {"recall.svg": plot.svg, "recall.png": plot.png}
    words = (
        "Attention that the best blocks of each row hold: the median head, and the band of the middle 80 % of heads, "
        "by operator that was chosen for them. A curve that rises late cannot be made sparse. Dotted: the two extremes."
    )
    return f'<div><h3>Recall by density</h3><p class="note">{words}</p>{figure(plot.inline)}</div>'


def _similarity(run: Artefacts, pictures: dict[str, str | bytes]) -> str:
    """Which layers read alike."""
    table = dig(run.profile, "similarity", default=[])
    sites = run.sites
    pairs = [(i, j, table[i][j]) for i in range(len(table)) for j in range(i) if table[i][j] is not None]
    if not pairs or len(table) != len(sites):
        return ""
    low, high = (choose(value for _, _, value in pairs) for choose in (min, max))
    cells = [
        Cell(
            column=j,
            first=i,
            fill=DENSITY,
            opacity=shade(value, low, high, log=False),
            title=f"layers {sites[j].layer} and {sites[i].layer}: {number(value)}",
        )
        for i, j, value in pairs
    ]
    picture = head_map(
        [str(site.layer) for site in sites],
        len(sites),
        cells,
        describe="Similarity of the layers",
        row_name="layer",
        scale=(DENSITY, number(low, 2), number(high, 2), "1 is the same"),
        width=1000 if len(sites) > WIDE else 500,
    )
    words = "Attention that two layers spend on the same blocks: strong pairs could share operators or block lists."
    return named("Similarity of the layers", picture, words, "similarity.svg", pictures)


def _score(scores: Sequence[Any] | Mapping[int, Any], head: int) -> float:
    value = dig(scores, head)
    return float(value) if isinstance(value, int | float) else 0.0
