"""The parts a report page is made of: numbers as people read them, tables, and the page with its style.

The page holds everything it shows: no script, no font, no picture from elsewhere, as its content policy enforces.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

NONE = "–"


# --- numbers ----------------------------------------------------------------------------------------------------------


def number(value: Any, digits: int = 3) -> str:
    """About `digits` significant digits, never in powers of ten where people compare: 0.0414, 12.8, 1,234."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return NONE
    if value != value or abs(value) == float("inf"):
        return NONE
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}".replace("-", "\u2212")
    if 0 < abs(value) < 10**-5:
        return f"{value:.1e}".replace("-", "\u2212")
    size = abs(value)
    places = 0 if size == 0 else max(0, digits - 1 - _exponent(size))
    return f"{value:.{places}f}".replace("-", "\u2212")


def _exponent(size: float) -> int:
    return int(f"{size:e}".split("e")[1])


def ratio(value: Any) -> str:
    return NONE if number(value) == NONE else f"{value:.3f}×" if 0.9 < value < 1.1 else f"{value:.2f}×"


def percent(value: Any, places: int = 1) -> str:
    return NONE if number(value) == NONE else f"{100 * value:.{places}f} %".replace("-", "\u2212")


def size(value: Any) -> str:
    """Bytes in binary units: 512 B, 18.0 KiB, 189 MiB."""
    if number(value) == NONE:
        return NONE
    amount, unit = float(value), "B"
    for bigger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, bigger
    return f"{amount:.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:.1f} {unit}"


def duration(seconds: Any) -> str:
    """31.2 ms, 4.20 s, 3 min 07 s, 1 h 02 min."""
    if number(seconds) == NONE:
        return NONE
    if seconds < 1:
        return f"{number(float(seconds * 1000))} ms"
    if seconds < 59.95:
        return f"{number(float(seconds))} s"
    minutes, second = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {second:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def tokens(length: Any) -> str:
    return f"{int(length):,}"


# --- pieces -----------------------------------------------------------------------------------------------------------


def section(title: str, *parts: str, note: str = "") -> str:
    """Nothing if there is nothing to show. `note` and `parts` are HTML, `title` is text."""
    body = "\n".join(part for part in parts if part)
    if not body:
        return ""
    lead = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{lead}\n{body}</section>"


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, text: Sequence[int] = (0,), strong: int | None = None
) -> str:
    """Cells are HTML. Columns are right-aligned numbers but those listed in `text`; `strong` is set off.

    A row of a single cell is a heading over the rows that follow.
    """

    def cell(tag: str, column: int, content: str) -> str:
        names = [name for name, on in (("text", column in text), ("strong", column == strong)) if on]
        attributes = f' class="{" ".join(names)}"' if names else ""
        scope = ' scope="col"' if tag == "th" else ""
        return f"<{tag}{scope}{attributes}>{content}</{tag}>"

    lines = ['<div class="scroll"><table><thead><tr>']
    lines += [cell("th", column, label) for column, label in enumerate(head)]
    lines.append("</tr></thead><tbody>")
    for row in rows:
        if len(row) == 1 and len(head) > 1:
            lines.append(f'<tr class="group"><th colspan="{len(head)}" scope="rowgroup">{row[0]}</th></tr>')
        else:
            lines.append("<tr>" + "".join(cell("td", column, content) for column, content in enumerate(row)) + "</tr>")
    return "".join(lines) + "</tbody></table></div>"


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """A list of names and values; values are HTML."""
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{value}</dd></div>" for name, value in pairs)
    return f'<dl class="facts">{rows}</dl>' if rows else ""


def tile(label: str, value: str, *details: str, bad: bool = False) -> str:
    """A figure with its name and lines of small print; `bad` marks a loss where a gain was hoped for."""
    lines = "".join(f'<span class="detail">{escape(line)}</span>' for line in details if line)
    shown = f'<b class="bad">{escape(value)}</b>' if bad else escape(value)
    return (
        f'<div class="tile"><span class="label">{escape(label)}</span><span class="value">{shown}</span>{lines}</div>'
    )


def figure(picture: str, caption: str = "") -> str:
    """`picture` is SVG, `caption` HTML."""
    words = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure><div class="scroll">{picture}</div>{words}</figure>'


def details(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def page(title: str, body: str) -> str:
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


# Colours are named by use; figures take them through the same names, so both themes reach into the SVG.
_LIGHT = """
  --page: #ffffff; --card: #f6f8fa; --ink: #1f2328; --muted: #59636e; --line: #d1d9e0; --grid: #e4e9ee;
  --full: #d5dbe2; --good: #00754f; --bad: #b34700; --accent: #0072b2; --empty: #f1f3f5;
"""
_DARK = """
  --page: #0d1117; --card: #161b22; --ink: #e6edf3; --muted: #9aa4ae; --line: #30363d; --grid: #262c34;
  --full: #444c56; --good: #3fc795; --bad: #ff9b50; --accent: #58b0e3; --empty: #1c2128;
"""
STYLE = f"""
:root {{ color-scheme: light dark; {_LIGHT} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif; font-variant-numeric: tabular-nums; }}
main {{ max-width: 1080px; margin: 0 auto; padding: 40px 24px 72px; }}
header {{ margin-bottom: 28px; }}
.eyebrow {{ margin: 0 0 4px; color: var(--muted); font-size: 13px; }}
h1 {{ margin: 0; font-size: 30px; line-height: 1.2; font-weight: 650; letter-spacing: -0.015em;
  overflow-wrap: anywhere; }}
h2 {{ margin: 0 0 6px; font-size: 20px; font-weight: 620; letter-spacing: -0.008em; }}
h3 {{ margin: 26px 0 8px; font-size: 15px; font-weight: 620; }}
p {{ margin: 0 0 10px; max-width: 78ch; }}
.lead {{ margin: 6px 0 0; color: var(--muted); font-size: 16px; }}
.note, figcaption {{ color: var(--muted); font-size: 13.5px; max-width: 88ch; }}
section {{ margin-top: 44px; padding-top: 22px; border-top: 1px solid var(--line); }}
code, pre {{ font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
  font-size: 0.88em; }}
code {{ overflow-wrap: anywhere; }}
pre {{ margin: 0; padding: 14px 16px; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; }}
.verdict {{ display: flex; gap: 12px; align-items: baseline; margin: 0 0 22px; padding: 13px 16px; border-radius: 8px;
  background: var(--card); border: 1px solid var(--line); border-left: 4px solid var(--muted); max-width: none; }}
.verdict.good {{ border-left-color: var(--good); }}
.verdict.bad {{ border-left-color: var(--bad); }}
.good b, b.good {{ color: var(--good); }}
.bad b, b.bad {{ color: var(--bad); }}
.stages {{ display: grid; grid-template-columns: repeat(6, 1fr); gap: 8px; margin: 0 0 22px; padding: 0;
  list-style: none; }}
.stages li {{ padding: 8px 11px; border: 1px solid var(--line); border-radius: 8px; font-size: 13px;
  line-height: 1.4; }}
.stages li span {{ display: block; color: var(--muted); font-size: 12.5px; }}
.stages li.absent {{ border-style: dashed; color: var(--muted); }}
.stages li.old span {{ color: var(--bad); }}
.balance {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 28px; margin: 22px 0; }}
.balance h3 {{ margin: 0 0 8px; color: var(--muted); font-weight: 560; font-size: 13.5px; }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 10px; }}
.tile {{ padding: 12px 14px; border: 1px solid var(--line); border-radius: 8px; background: var(--card); }}
.tile span {{ display: block; }}
.tile .label {{ font-size: 12.5px; color: var(--muted); }}
.tile .value {{ font-size: 23px; font-weight: 620; letter-spacing: -0.015em; line-height: 1.35; white-space: nowrap;
  }}
.tile b {{ font-weight: inherit; }}
.tile .detail {{ font-size: 12.5px; color: var(--muted); line-height: 1.45; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: 14px; }}
th, td {{ padding: 6px 12px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap;
  vertical-align: top; }}
th:first-child, td:first-child {{ padding-left: 2px; }}
th:last-child, td:last-child {{ padding-right: 2px; }}
thead th {{ color: var(--muted); font-weight: 560; font-size: 13px; border-bottom-color: var(--muted);
  vertical-align: bottom; }}
th.text, td.text {{ text-align: left; }}
td.wide {{ white-space: normal; }}
.strong {{ font-weight: 620; }}
thead th.strong {{ color: var(--ink); }}
tr.group th {{ text-align: left; padding-top: 15px; color: var(--muted); font-weight: 560; font-size: 13px; }}
td small {{ display: block; color: var(--muted); font-size: 12.5px; font-weight: 400; }}
figure {{ margin: 18px 0; break-inside: avoid; }}
figure svg {{ display: block; max-width: 100%; height: auto; }}
figure svg.map {{ min-width: 620px; width: 100%; }}
figure svg text {{ font-family: inherit !important; }}
figcaption {{ margin-top: 8px; }}
.maps {{ display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 6px 28px; }}
.maps figure svg.map {{ min-width: 0; }}
.maps.wide {{ grid-template-columns: 1fr; }}
.maps.thirds {{ grid-template-columns: repeat(3, minmax(0, 1fr)); }}
figure img {{ display: block; max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: 6px; }}
.maps h3 {{ margin: 16px 0 2px; }}
.maps figure {{ margin: 8px 0 14px; }}
.scroll + .note {{ margin-top: 10px; }}
.conclusions {{ margin: 16px 0 4px; padding-left: 20px; max-width: 92ch; }}
.conclusions li {{ margin-bottom: 6px; }}
.facts {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 6px 24px;
  margin: 10px 0 18px; }}
.facts div {{ display: flex; justify-content: space-between; gap: 12px; border-bottom: 1px solid var(--line);
  padding: 3px 0; }}
.facts.wide {{ grid-template-columns: 1fr; }}
.facts dt {{ color: var(--muted); font-size: 13.5px; }}
.facts dd {{ margin: 0; font-size: 13.5px; text-align: right; overflow-wrap: anywhere; }}
details {{ margin: 14px 0; }}
summary {{ cursor: pointer; color: var(--accent); font-size: 14px; padding: 3px 0; }}
@media screen and (max-width: 720px) {{
  main {{ padding: 24px 16px 48px; }}
  h1 {{ font-size: 25px; }}
  .stages {{ grid-template-columns: repeat(2, 1fr); }}
  .maps, .maps.thirds {{ grid-template-columns: minmax(0, 1fr); }}
  .maps figure svg.map {{ min-width: 440px; }}
  th:first-child, td:first-child {{ position: sticky; left: 0; background: var(--page); white-space: normal;
    min-width: 112px; }}
  th, td {{ padding: 6px 9px; }}
}}
@media print {{
  @page {{ margin: 14mm; }}
  body {{ font-size: 10.5pt; }}
  main {{ max-width: none; padding: 0; }}
  section {{ margin-top: 24px; padding-top: 14px; }}
  .tile, .verdict, tr, .stages {{ break-inside: avoid; }}
  h2, h3 {{ break-after: avoid; }}
  .scroll {{ overflow: visible; }}
  th, td {{ padding: 4px 7px; }}
  svg, i {{ -webkit-print-color-adjust: exact; print-color-adjust: exact; }}
  .maps > div {{ break-inside: avoid; }}
  details:not([open]) {{ display: none; }}
}}
"""
