"""Maps of numbers per head or per KV group, layer by layer, and the frame that a section shows them in."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .artefacts import Site
from .headmaps import Cell, Swatch, head_map, shade
from .report_html import figure, number

WIDE = 48  # sites from which on a map takes the whole width
Pictures = dict[str, str | bytes]


def named(title: str, picture: str, words: str, file: str, pictures: Pictures) -> str:
    """The picture under its title and a note; nothing without one. It is kept as a file, too."""
    if not picture:
        return ""
    pictures[file] = picture
    return f'<div><h3>{escape(title)}</h3><p class="note">{escape(words)}</p>{figure(picture)}</div>'


def heat(
    sites: Sequence[Site],
    values: Sequence[Sequence[float | None]],
    colour: str,
    unit: str,
    *,
    per_head: bool,
    log: bool = True,
    least: float | None = None,
    most: float | None = None,
    width: float = 0,
) -> str:
    """A map of values per head or per KV group; '' if there are none. `least` and `most` fix the ends of the scale."""
    finite = [value for row in values for value in row if value is not None and (not log or value > 0)]
    if not finite:
        return ""
    high = max(finite) if most is None else most
    low = max(min(finite) if least is None else least, high / 1000) if log else _least(finite, least)
    cells = []
    for column, (site, row) in enumerate(zip(sites, values, strict=False)):
        for index, value in enumerate(row):
            place = f"head {index}" if per_head else f"KV group {index}"
            why = " (constant, or does not apply)" if per_head else " (does not apply)"
            title = f"layer {site.layer}, {place}: {number(value)}{why if value is None else ''}"
            opacity = shade(value, low, high, log=log)
            cells.append(
                Cell(column=column, first=index, fill=None if value is None else colour, opacity=opacity, title=title)
            )
    ends = (number(low, 2), number(high, 2))
    if log and min(finite) < low:
        ends = (f"≤ {ends[0]}", ends[1])
    scale = (colour, *ends, unit)
    none = [Swatch(label="no value", hatched=True)] if any(cell.fill is None for cell in cells) else []
    width = width or (1000 if len(sites) > WIDE else 500)
    return layer_map(sites, cells, unit, legend=none, scale=scale, per_head=per_head, width=width)


def _least(values: Sequence[float], given: float | None) -> float:
    return min(0.0, *values) if given is None else given


def layer_map(
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
    """`head_map` with the sites as columns."""
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
