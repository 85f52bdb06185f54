"""Maps of a model, layer by head, drawn as SVG: every cell says on hover what stands behind it.

Colours are CSS variables with a fallback, `var(--ink, #1f2328)`: within the report they follow its theme, and
`standalone` resolves them for a file of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

# Okabe and Ito's colours, which people who confuse red and green can tell apart, by kind of operator
OPERATOR_COLOURS: Mapping[str, tuple[str, ...]] = {
    "window": ("#0072b2", "#56b4e9", "#00416b", "#7d8fc9", "#4a4e9e"),
    "hybrid": ("#e69f00", "#f5cb6e", "#9a6a00"),
    "linear": ("#d55e00", "#f2a36b", "#8a3d00"),
    "blocks": ("#5b8a00", "#a6d04f", "#365200"),
    "span": ("#c9a800", "#f0e442", "#7a6600"),
    "retention": ("#009e73", "#72d1b5", "#00573f"),
    "disc": ("#0072b2", "#56b4e9", "#00416b", "#7d8fc9"),
    "neighbourhood": ("#4a4e9e", "#9b9edb", "#2b2e66"),
    "tiles": ("#009e73", "#72d1b5", "#00573f"),
    "radial": ("#8a6d00", "#d9b84a", "#574500"),
    "sparse": ("#5b8a00", "#a6d04f", "#365200"),
    "sla": ("#e69f00", "#f5cb6e", "#9a6a00"),
    "agent": ("#c9a800", "#f0e442", "#7a6600"),
    "timed": ("#882255", "#c77ba3", "#551133"),
}
OTHER_COLOURS = ("#cc79a7", "#8f4a72", "#e8bcd4", "#5e3350")
FULL = "var(--full, #d5dbe2)"
INK, MUTED, GRID = "var(--ink, #1f2328)", "var(--muted, #59636e)", "var(--grid, #e4e9ee)"

_LEFT, _LETTER = 44.0, 6.7  # margin for row labels; mean width of a letter at 12 px


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Rows `first` to `first + count - 1` of a column, which share a colour and a hover text."""

    column: int
    first: int
    count: int = 1
    fill: str | None  # any CSS colour; None: nothing is known, which is drawn hatched
    opacity: float = 1.0
    title: str
    dots: tuple[float, ...] = ()  # one per row, 0 to 1: area of a dot


@dataclass(frozen=True, kw_only=True)
class Swatch:
    """An entry of the legend; a `dot` is drawn round, in ink, and what is `hatched` with a line through it."""

    label: str
    fill: str = INK
    opacity: float = 1.0
    dot: bool = False
    hatched: bool = False


def operator_colours(labels: Sequence[str], operators: Mapping[str, str]) -> dict[str, str]:
    """A colour for each label; `operators` maps labels to the operator's name, which decides the hue."""
    used: dict[str, int] = {}
    colours = {}
    for label in labels:
        name = operators.get(label, label)
        kind = name if name in OPERATOR_COLOURS else "other"
        shades = OPERATOR_COLOURS.get(name, OTHER_COLOURS)
        colours[label] = FULL if name == "full" else shades[used.get(kind, 0) % len(shades)]
        used[kind] = used.get(kind, 0) + (name != "full")
    return colours


def head_map(
    columns: Sequence[str],
    rows: int,
    cells: Sequence[Cell],
    *,
    describe: str,
    row_name: str = "head",
    group: int = 1,
    legend: Sequence[Swatch] = (),
    scale: tuple[str, str, str, str] | None = None,
    width: float = 1000.0,
) -> str:
    """SVG of `cells` over `columns` (layers) and `rows`, with a gap between every `group` rows.

    `scale` is (colour, text at its pale end, text at its full end, what it shows).
    """
    step = min((width - _LEFT - 4) / max(1, len(columns)), 34.0)
    tall = 0.95 if rows <= 4 else 0.62
    high = min(max(step * tall, 7.0), 17.0) if rows <= 16 else min(max(240.0 / rows, 4.0), 12.0)
    gap = 4.0 if group > 1 else 0.0
    head, top = _legend(legend, scale, width)

    def y_of(row: int) -> float:
        return top + row * high + (row // group) * gap

    body = [_cell(cell, step, high, y_of) for cell in cells]
    bottom = y_of(max(0, rows - 1)) + high
    body += _axes(columns, rows, group, step, high, bottom, y_of, row_name, top)
    height = bottom + 24
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="map" viewBox="0 0 {width:g} {height:.0f}" role="img" '
        f'aria-label="{escape(describe)}" font-size="12">{"".join(head)}{"".join(body)}</svg>'
    )


def _cell(cell: Cell, step: float, high: float, y_of: Callable[[int], float]) -> str:
    x = _LEFT + cell.column * step
    wide, tall = max(step - 1.6, 1.0), max(high - 1.2, 1.0)
    style = f"fill:{cell.fill}" if cell.fill else f"fill:none;stroke:{MUTED};stroke-width:.5"
    if cell.fill and cell.opacity < 1:
        style += f";fill-opacity:{cell.opacity:.2f};stroke:{GRID};stroke-width:.7"
    parts = [f"<title>{escape(cell.title)}</title>"]
    for row in range(cell.first, cell.first + cell.count):
        y = y_of(row)
        parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{tall:.1f}" rx="1.5" style="{style}"/>')
        if not cell.fill:
            parts.append(_slash(x, y, wide, tall))
        share = cell.dots[row - cell.first] if cell.dots else 0.0
        radius = math.sqrt(max(0.0, min(1.0, share))) * min(wide, tall) * 0.46
        if radius >= 0.8:
            parts.append(
                f'<circle cx="{x + wide / 2:.1f}" cy="{y + tall / 2:.1f}" r="{radius:.1f}" style="fill:{INK}"/>'
            )
    return f"<g>{''.join(parts)}</g>"


def _axes(
    columns: Sequence[str],
    rows: int,
    group: int,
    step: float,
    high: float,
    bottom: float,
    y_of: Callable[[int], float],
    row_name: str,
    top: float,
) -> list[str]:
    parts = []
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100) if n * step >= 25)
    for index, name in enumerate(columns):
        if index % every == 0:
            parts.append(_text(_LEFT + (index + 0.5) * step - 0.8, bottom + 14, name, "middle"))
    parts.append(_text(_LEFT - 8, bottom + 14, "layer", "end"))
    unit = group if group > 1 else 1
    every_row = next(n for n in (1, 2, 4, 8, 16, 32, 64) if n * unit * high >= 15 or n == 64) * unit
    middle = min(high / 2 + 4, 12)
    parts += [_text(_LEFT - 8, y_of(row) + middle, str(row), "end") for row in range(0, rows, every_row)]
    parts.append(_text(_LEFT - 8, top - 7, row_name, "end"))
    return parts


def _slash(x: float, y: float, wide: float, tall: float) -> str:
    path = f"M{x:.1f} {y + tall:.1f}L{x + wide:.1f} {y:.1f}"
    return f'<path d="{path}" style="stroke:{MUTED};stroke-width:.8"/>'


def _legend(legend: Sequence[Swatch], scale: tuple[str, str, str, str] | None, width: float) -> tuple[list[str], float]:
    """Its SVG, the scale before the swatches, and the height at which the map begins."""
    x, y = _LEFT, 14.0
    parts: list[str] = []
    if scale:
        colour, low, top, label = scale
        parts.append(_text(x, y, low, "start"))
        x += len(low) * _LETTER + 8
        for index in range(12):
            style = f"fill:{colour};fill-opacity:{max(0.04, index / 11):.2f};stroke:{GRID};stroke-width:.7"
            parts.append(f'<rect x="{x + index * 9:.1f}" y="{y - 10:.1f}" width="9" height="12" style="{style}"/>')
        words = f"{top}  ({label})"
        parts.append(_text(x + 12 * 9 + 8, y, words, "start"))
        x += 12 * 9 + 8 + len(words) * _LETTER + 18
    for swatch in legend:
        room = 19 + len(swatch.label) * _LETTER + 20
        if x + room > width + 20 and x > _LEFT:
            x, y = _LEFT, y + 21
        parts += [_swatch(swatch, x, y), _text(x + 19, y, swatch.label, "start", INK)]
        x += room
    return parts, y + (24 if parts else 6)


def _swatch(swatch: Swatch, x: float, y: float) -> str:
    if swatch.dot:
        return f'<circle cx="{x + 6:.1f}" cy="{y - 4:.1f}" r="4.5" style="fill:{INK}"/>'
    style = f"fill:none;stroke:{MUTED};stroke-width:.5" if swatch.hatched else f"fill:{swatch.fill}"
    if swatch.opacity < 1:
        style += f";fill-opacity:{swatch.opacity:.2f}"
    box = f'<rect x="{x:.1f}" y="{y - 10:.1f}" width="12" height="12" rx="2.5" style="{style}"/>'
    return box + (_slash(x, y - 10, 12, 12) if swatch.hatched else "")


def _text(x: float, y: float, text: str, anchor: str, fill: str = MUTED) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="fill:{fill}">{escape(text)}</text>'


def shade(value: float | None, low: float, high: float, *, log: bool) -> float:
    """Opacity between 0.04 and 1 for a value between `low` and `high`; what lies outside takes the nearer end."""
    if value is None or value != value:
        return 0.0
    if log:
        value, low, high = (math.log(max(x, low)) for x in (value, low, max(high, low * 1.0001)))
    return 0.04 + 0.96 * max(0.0, min(1.0, (value - low) / max(high - low, 1e-12)))


def standalone(svg: str) -> str:
    """The same picture for a file of its own: on white, with a font and resolved colours."""
    svg = re.sub(r"var\(--[\w-]+, (#\w+)\)", r"\1", svg)
    head, rest = svg.split(">", 1)
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', head)
    size = f' width="{box[1]}" height="{box[2]}"' if box else ""
    family = ' font-family="system-ui, Helvetica, Arial, sans-serif"'
    return f'{head}{size}{family}><rect width="100%" height="100%" fill="#ffffff"/>{rest}\n'


# --- masks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Thumbnail:
    """A mask in `rows` × `count` blocks (rows 0: as many), as runs (row, first column, end) of one kind.

    `strokes` are single tokens that rows go on reading, as (column, first row, end), in blocks and their fractions.
    """

    title: str
    colour: str
    count: int
    full: Sequence[tuple[int, int, int]]
    partial: Sequence[tuple[int, int, int]]
    rest: Sequence[tuple[int, int, int]] = ()  # what a state stands for
    strokes: Sequence[tuple[float, float, float]] = ()
    words: Sequence[str] = ()  # lines beneath
    rows: int = 0


def mask_thumbnails(
    masks: Sequence[Thumbnail], *, describe: str, width: float = 1000.0, rest: str = "in the linear state"
) -> str:
    """SVG of the masks side by side: queries downwards, keys to the right, partial blocks fainter than full ones.

    `rest` says where hatched blocks are read from.
    """
    pitch, side, head = 200.0, 168.0, 24.0
    across = max(1, int(width // pitch))
    tall = head + side + 16.0 * max((len(mask.words) for mask in masks), default=0) + 22
    legend, top = _legend(
        [
            Swatch(label="full block", fill=MUTED),
            Swatch(label="partial block: some of its pairs", fill=MUTED, opacity=PALE),
            *([Swatch(label=rest, hatched=True)] if any(mask.rest for mask in masks) else []),
        ],
        None,
        width,
    )
    body = []
    for n, mask in enumerate(masks):
        x, y = 2 + n % across * pitch, top + n // across * tall
        body.append(_text(x, y + head - 8, mask.title, "start", INK))
        body.append(_mask(mask, x, y + head, side))
        body += [_text(x, y + head + side + 17 + 16 * i, line, "start") for i, line in enumerate(mask.words)]
    height = top + -(-len(masks) // across) * tall
    # The legend stands where the maps have their row labels
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="map" viewBox="0 0 {width:g} {height:.0f}" role="img" '
        f'aria-label="{escape(describe)}" font-size="12"><g transform="translate({2 - _LEFT:g} 0)">{"".join(legend)}'
        f"</g>{''.join(body)}</svg>"
    )


PALE = 0.42  # opacity of a partial block


def _mask(mask: Thumbnail, x: float, y: float, side: float) -> str:
    unit, tall = side / mask.count, side / (mask.rows or mask.count)
    parts = [f"<title>{escape(mask.title)}</title>"]
    outline = f"fill:none;stroke:{GRID}"
    parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{side:g}" height="{side:g}" style="{outline}"/>')
    for runs, style in (
        (mask.full, f"fill:{mask.colour}"),
        (mask.partial, f"fill:{mask.colour};fill-opacity:{PALE}"),
    ):
        boxes = "".join(
            f"M{x + first * unit:.2f} {y + row * tall:.2f}h{(end - first) * unit:.2f}v{tall:.2f}"
            f"h{(first - end) * unit:.2f}z"
            for row, first, end in runs
        )
        parts += [f'<path d="{boxes}" style="{style}"/>'] if boxes else []
    slashes = "".join(
        f"M{x + column * unit:.2f} {y + (row + 1) * tall:.2f}l{unit:.2f} {-tall:.2f}"
        for row, first, end in mask.rest
        for column in range(first, end)
    )
    parts += [f'<path d="{slashes}" style="fill:none;stroke:{MUTED};stroke-width:.8"/>'] if slashes else []
    lines = "".join(
        f"M{x + column * unit:.2f} {y + first * tall:.2f}V{y + end * tall:.2f}" for column, first, end in mask.strokes
    )
    parts += [f'<path d="{lines}" style="fill:none;stroke:{mask.colour};stroke-width:.7"/>'] if lines else []
    return f"<g>{''.join(parts)}</g>"
