"""The report's account of the sampler's steps: what heads do, and what candidates miss, in each part of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .artefacts import Artefacts, dig
from .evaluation_order import in_order
from .report_heat import WIDE, Pictures, heat, named
from .report_html import details, figure

ERROR, DENSITY = "#8a6d00", "#007a5a"
SHOWN = 2  # candidates whose maps are not folded away
THIRDS = 24  # sites up to which three maps stand side by side


def bands_part(run: Artefacts, pictures: Pictures) -> str:
    """Lines over the parts of the steps, and a map of heads by layers for each of them; '' for a model of text."""
    found = dig(run.profile, "bands", default={})
    bands = in_order(found)
    if not bands:
        return ""
    candidates = list(dict.fromkeys(name for band in bands for name in dig(found[band], "output_error", default={})))
    rows = [_maps(run, bands, "statistics", "density_90", pictures)]
    rows += [_maps(run, bands, "output_error", name, pictures) for name in candidates]
    folded = "".join(row for row in rows[1 + SHOWN :] if row)
    boxes = [*rows[: 1 + SHOWN], *([details("The maps of the other candidates", folded)] if folded else [])]
    count = len(bands)
    note = (
        f"The sampler's steps in {count} equal parts: {bands[0]} is mostly noise, {bands[-1]} nearly the image. An "
        "operator that errs in the first part alone can follow full attention there, as <code>timed</code>. The maps "
        "of a row share their scale."
    )
    return (
        f'<h3>Over the sampler\'s steps</h3><p class="note">{note}</p>'
        + _lines(run, bands, candidates, pictures)
        + "".join(boxes)
    )


def _lines(run: Artefacts, bands: Sequence[str], candidates: Sequence[str], pictures: Pictures) -> str:
    from .plots_images import over_bands

    found = dig(run.profile, "bands", default={})
    errors, spreads = {}, {}
    for name in candidates:
        cells = [_cells(dig(found, band, "output_error", name, default=[])) for band in bands]
        errors[name] = [_quantile(values, 0.5) for values in cells]
        if all(cells):
            spreads[name] = ([_part(values, 0.1) for values in cells], [_part(values, 0.9) for values in cells])
    shares: dict[str, list[float | None]] = {}
    for name, words in (("density_90", "blocks for 90 % of it"), ("local_mass", "on near tokens")):
        cells = [_cells(dig(found, band, "statistics", name, default=[])) for band in bands]
        shares[words] = [_quantile(values, 0.5) for values in cells]
        if all(cells):
            spreads[words] = ([_part(values, 0.1) for values in cells], [_part(values, 0.9) for values in cells])
    panels = {"output error of a head": errors, "share of the attention or blocks": shares}
    plot = over_bands(bands, panels, spreads, name="profile-bands")
    if plot is None:
        return ""
    pictures |= {"profile-bands.svg": plot.svg, "profile-bands.png": plot.png}
    caption = (
        "The median head and the band of the middle 80 %. Left: squared error of a head's output with each candidate, "
        "over the variance of the output. Right: how local and how sparse attention is."
    )
    return figure(plot.inline, caption)


def _maps(run: Artefacts, bands: Sequence[str], table: str, name: str, pictures: Pictures) -> str:
    """A map for each part, all on one scale."""
    sites = run.sites
    tables = {band: dig(run.profile, "bands", band, table, name, default=[]) for band in bands}
    log = table == "output_error"
    known = [x for values in tables.values() for x in _cells(values) if not log or x > 0]
    if not known:
        return ""
    high = max(known) if log else 1.0
    low = max(min(known), high / 1000) if log else 0.0
    kind = "wide" if len(sites) > WIDE else "thirds" if len(sites) <= THIRDS else ""
    width = 330.0 if kind == "thirds" else 0.0
    what = f"{name}: output error" if log else "Blocks for 90 %"
    words = "log scale" if log else "1 is every block"
    colour = ERROR if log else DENSITY
    drawn = []
    for band, values in tables.items():
        look: dict[str, Any] = {"per_head": True, "log": log, "least": low, "most": high, "width": width}
        picture = heat(sites, values, colour, words, **look)
        file = f"{'error' if log else 'density-90'}{f'-{name}' if log else ''}-band-{band.split()[0]}.svg"
        drawn.append(named(f"{what}, {band}", picture, "", file, pictures))
    return f'<div class="maps {kind}">{"".join(drawn)}</div>'


def _cells(values: Sequence[Sequence[float | None]]) -> list[float]:
    """All that is known of a [site][head] table."""
    return [float(x) for row in values for x in row if x is not None]


def _quantile(values: Sequence[float], share: float) -> float | None:
    return _part(values, share) if values else None


def _part(values: Sequence[float], share: float) -> float:
    """The value below which this share of them lies, by linear interpolation."""
    ranked = sorted(values)
    place = share * (len(ranked) - 1)
    low = int(place)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (place - low) * (ranked[high] - ranked[low])
