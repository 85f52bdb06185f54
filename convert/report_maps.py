"""The report's sections of maps: what was chosen for each group, and what the profile measured to choose by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .artefacts import Artefacts, Site, dig
from .headmaps import Cell, Swatch, head_map, operator_colours, shade
from .report_html import details, figure, number, percent, section, table

WIDE = 48  # sites from which on a map takes the whole width
RETRIEVAL, KL, NEEDLE, ERROR = "#0072b2", "#d55e00", "#a5437c", "#8a6d00"


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
    picture = _map(sites, cells, "Operator of each head by layer", legend=legend, grouped=True)
    pictures["choice.svg"] = picture
    method = dig(run.select, "arms", "student", "method", default="")
    how = f"Chosen by method <b>{escape(method)}</b>. " if method else ""
    note = (
        f"{how}One column per layer, one row per query head; heads between two gaps share a KV head and are converted "
        "together. Point at a cell for its measured damage and the reason."
    )
    return section("What was chosen, and why", figure(picture), _predictions(run), _reasons(run, sites), note=note)


def _group_title(run: Artefacts, column: int, site: Site, group: int, label: str) -> str:
    first, last = group * site.per_group, (group + 1) * site.per_group - 1
    heads = f"head {first}" if first == last else f"heads {first}–{last}"
    lines = [f"layer {site.layer}, KV group {group} ({heads}): {label}"]
    for name in dig(run.profile, "damage", default={}):
        if label in (name, "full"):
            kl, needle = (dig(run.profile, "damage", name, kind, column, group) for kind in ("kl", "needle"))
            verb = "costs" if label == name else "would cost"
            lines.append(f"{name} {verb} KL {number(kl)}, needle loss {number(needle)}")
    scores = dig(run.profile, "statistics", "retrieval", column, default=[])[first : last + 1]
    if scores:
        lines.append("retrieval score " + ", ".join(number(score, 2) for score in scores))
    reason = dig(run.select, "arms", "student", "reasons", site.name, group)
    return "\n".join(lines + ([str(reason)] if reason else []))


def _predictions(run: Artefacts) -> str:
    """What the single damages add up to, beside what was measured of the whole."""
    rows = []
    for arm, entry in dig(run.select, "arms", default={}).items():
        found = dig(run.evaluation, "arms", arm, default={})
        quality = dig(found, "quality", default={})
        shortest = min(quality, key=int) if quality else ""
        measured = dig(quality, shortest, "kl")
        drop = found.get("retrieval_drop")
        points = NONE_YET if drop is None else f"{100 * drop:.1f} points".replace("-", "\u2212")
        kl = NONE_YET if measured is None else f"{number(measured)}<small>at {int(shortest):,} tokens</small>"
        predicted = [number(dig(entry, "predicted", kind)) for kind in ("kl", "needle")]
        trained = {True: "yes", False: "no"}.get(found.get("trained"), "")
        cells = [escape(arm), escape(str(entry.get("method", ""))), percent(entry.get("converted"), 0), *predicted]
        rows.append([*cells, kl, points, trained])
    if not rows:
        return ""
    head = [
        "Arm",
        "Method",
        "Converted",
        "KL, predicted",
        "Needle loss, predicted",
        "KL, measured",
        "Retrieval lost",
        "Trained",
    ]
    words = (
        '<p class="note">The prediction is the sum of the damages of the single groups: it knows neither how they act '
        "together nor what training takes back.</p>"
    )
    return "<h3>Predicted and measured</h3>" + table(head, rows, text=(0, 1, 7)) + words


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
    return details("Every group with its reason", table(["Layer", "KV group", "Operator", "Reason"], rows, text=(2, 3)))


# --- what was measured ------------------------------------------------------------------------------------------------


def profile_section(run: Artefacts, pictures: dict[str, str | bytes]) -> str:
    """Maps of the retrieval score and of each candidate's damage; of its output error where no damage was measured."""
    sites = run.sites
    if not run.profile or not sites:
        return ""
    whole: list[str] = []
    scores = dig(run.profile, "statistics", "retrieval")
    if scores:
        picture = _heat(sites, scores, RETRIEVAL, "1 is all", per_head=True, log=False, least=0.0, most=1.0)
        words = "Share of a head's attention that goes to the hidden fact while the answer is read off"
        whole.append(_named("Retrieval score", picture, words, "retrieval.svg", pictures))
    for name, errors in list(dig(run.profile, "output_error", default={}).items())[: 1 if scores else 2]:
        picture = _heat(sites, errors, ERROR, "relative, log scale", per_head=True)
        words = "Squared error of a head's output, relative to the output itself"
        whole.append(_named(f"{name}: output error", picture, words, f"error-{name}.svg", pictures))
    rows = ["".join(whole)]
    for name, damage in dig(run.profile, "damage", default={}).items():
        pair = []
        for kind, colour, title, words in (
            ("kl", KL, "damage to the text", "KL of the logits, nats per token"),
            ("needle", NEEDLE, "damage to retrieval", "rise of the needle loss, nats per token"),
        ):
            picture = _heat(sites, damage.get(kind) or [], colour, "log scale", per_head=False)
            pair.append(_named(f"{name}: {title}", picture, words, f"damage-{name}-{kind}.svg", pictures))
        rows.append("".join(pair))
    kind = "maps wide" if len(sites) > WIDE else "maps"
    note = (
        "Measured on the teacher, before anything was trained. Damage is that of one KV group converted alone, all "
        "else full. Point at a cell for its figure."
    )
    return section("What the profile measured", *(f'<div class="{kind}">{row}</div>' for row in rows if row), note=note)


def _named(title: str, picture: str, words: str, file: str, pictures: dict[str, str | bytes]) -> str:
    if not picture:
        return ""
    pictures[file] = picture
    return f'<div><h3>{escape(title)}</h3><p class="note">{escape(words)}</p>{figure(picture)}</div>'


def _heat(
    sites: Sequence[Site],
    values: Sequence[Sequence[float | None]],
    colour: str,
    unit: str,
    *,
    per_head: bool,
    log: bool = True,
    least: float | None = None,
    most: float | None = None,
) -> str:
    """A map of values per head or per KV group; '' if there are none."""
    finite = [value for row in values for value in row if value is not None and (not log or value > 0)]
    if not finite:
        return ""
    high = max(finite) if most is None else most
    low = max(min(finite), high / 1000) if log else (min(0.0, *finite) if least is None else least)
    cells = []
    for column, (site, row) in enumerate(zip(sites, values, strict=False)):
        for index, value in enumerate(row):
            place = f"head {index}" if per_head else f"KV group {index}"
            title = f"layer {site.layer}, {place}: {number(value)}" + ("" if value is not None else " (does not apply)")
            opacity = shade(value, low, high, log=log)
            cells.append(
                Cell(column=column, first=index, fill=None if value is None else colour, opacity=opacity, title=title)
            )
    ends = (number(low, 2), number(high, 2))
    if log and min(finite) < low:
        ends = (f"≤ {ends[0]}", ends[1])
    scale = (colour, *ends, unit)
    return _map(sites, cells, unit, scale=scale, per_head=per_head, width=1000 if len(sites) > WIDE else 500)


def _map(
    sites: Sequence[Site],
    cells: Sequence[Cell],
    describe: str,
    *,
    legend: Sequence[Swatch] = (),
    scale: tuple[str, str, str, str] | None = None,
    per_head: bool = True,
    grouped: bool = False,
    width: float = 1000.0,
) -> str:
    rows = max(site.heads if per_head else site.kv_heads for site in sites)
    return head_map(
        [str(site.layer) for site in sites],
        rows,
        cells,
        describe=describe,
        row_name="head" if per_head else "group",
        group=max(site.per_group for site in sites) if grouped else 1,
        legend=legend,
        scale=scale,
        width=width,
    )


def _score(scores: Sequence[Any] | Mapping[int, Any], head: int) -> float:
    value = dig(scores, head)
    return float(value) if isinstance(value, int | float) else 0.0
