"""The report's mask thumbnails of image and video models: what each operator of the plan reads, on the run's grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .artefacts import Artefacts, dig
from .headmaps import MUTED, Thumbnail, mask_thumbnails, operator_colours
from .report_heat import Pictures
from .report_html import figure, number, percent, tokens
from .report_masks import runs_of

if TYPE_CHECKING:
    from ..kernels.masks import Layout

MOST = 128  # blocks along a side, beyond which larger ones are drawn


def grid_masks_part(run: Artefacts, pictures: Pictures) -> str:
    """A thumbnail for each operator of the plan, at the size that was profiled; '' where nothing is converted."""
    from ..kernels.spec import Full, spec_from_dict

    grid, text = dig(run.profile, "data", "grid"), dig(run.profile, "data", "text", default=0)
    first = _first_sites(run)
    if not grid or not isinstance(text, int) or set(first) <= {"full"}:
        return ""
    device = "cuda" if dig(run.manifest, "hardware", "gpu") else "cpu"
    drawn: list[Thumbnail] = []
    notes: set[str] = set()
    for label in sorted(first, key=lambda name: (name != "full", name)):
        try:
            spec = Full() if label == "full" else spec_from_dict(dig(run.plan, "operators", label, default={}))
        except (ValueError, TypeError):  # of another version
            continue
        layout = _layout(first[label], grid, text)
        for title, own, when in _parts(label, spec):
            drawn.append(thumbnail(title, own, layout, device, when))
            notes.add(own.operator)
    picture = mask_thumbnails(drawn, describe="Masks of the operators in blocks", rest="read through a state or agents")
    pictures["masks.svg"] = picture
    return "<h3>What the operators read</h3>" + figure(picture, _caption(grid, text, notes))


def _caption(grid: Sequence[int], text: int, operators: set[str]) -> str:
    where = " × ".join(map(str, grid))
    beside = f" and {text} of the prompt" if text else ""
    caption = (
        f"{tokens(math.prod(grid))} image tokens on a grid of {where}{beside}: queries downwards, keys to the right, "
        "in blocks as the kernels of this machine cut them; patterns of the grid are computed in tiles, so that near "
        "tokens share blocks. Whole blocks are computed: the share of blocks is what is paid, that of pairs what is "
        "read; 100 % is full attention."
    )
    if operators & {"sparse", "sla"}:
        caption += " Which blocks are chosen depends on the image: an example is shown."
    return caption


def _first_sites(run: Artefacts) -> dict[str, dict[str, Any]]:
    """By operator the site that uses it at the highest resolution, as the profile has it."""
    chosen = dig(run.plan, "sites", default={})
    found: dict[str, dict[str, Any]] = {}
    for site in sorted(dig(run.profile, "sites", default=[]), key=lambda site: site.get("down", 1)):
        for label in chosen.get(site["name"]) or ["full"]:
            found.setdefault(label, site)
    return found


def _layout(site: dict[str, Any], grid: Sequence[int], text: int) -> Layout:
    """Of the tokens of a site, as `Site.layout`, which needs torch."""
    from ..kernels.masks import Layout

    own = tuple(-(-n // site.get("down", 1)) for n in grid)
    side = site.get("text", "")
    return Layout(grid=own, text_first=text * (side == "first"), text_last=text * (side == "last"))


def _parts(label: str, spec: Any) -> list[tuple[str, Any, str]]:
    """(title, operator, when it runs): `timed` has two."""
    if spec.operator != "timed":
        return [(label, spec, "")]
    from ..kernels.spec import label as named

    return [
        (f"early: {named(spec.early)}", spec.early, f"of timed, at times from {spec.above:g} on"),
        (f"late: {named(spec.late)}", spec.late, f"of timed, at times below {spec.above:g}"),
    ]


def thumbnail(title: str, spec: Any, layout: Layout, device: str, when: str = "") -> Thumbnail:
    """What the rows of an operator read on this layout, in the blocks of this type of device."""
    colour = MUTED if spec.operator == "full" else operator_colours([title], {title: spec.operator})[title]
    look: dict[str, Any] = {"title": title, "colour": colour}
    end = [when] if when else []
    if spec.operator in ("disc", "neighbourhood", "tiles", "radial", "references", "frames"):
        return _pattern(spec, layout, device, look, end)
    if spec.operator in ("sparse", "sla"):
        return _chosen(spec, layout, look, end)
    count = min(MOST, -(-layout.tokens // 64))
    every = [(row, 0, count) for row in range(count)]
    if spec.operator == "agent":
        agents = math.prod(spec.agents * (len(layout.grid) if len(spec.agents) == 1 else 1)) + layout.text
        return Thumbnail(
            **look,
            count=count,
            full=[],
            partial=[],
            rest=every,
            words=[f"{agents} agents read all,", "and all read them", *end],
        )
    if spec.operator == "linear":
        words = [
            "no pairs: everything is",
            f"in the state{f', {spec.conv} × {spec.conv} near by' if spec.conv else ''}",
        ]
        return Thumbnail(**look, count=count, full=[], partial=[], rest=every, words=[*words, *end])
    words = ["100 % of the blocks,", "100 % of the pairs"] if spec.operator == "full" else ["depends on the image"]
    return Thumbnail(**look, count=count, full=every, partial=[], words=[*words, *end])


def _pattern(spec: Any, layout: Layout, device: str, look: dict[str, Any], end: list[str]) -> Thumbnail:
    """A fixed pattern of the grid, from the same lists that the kernels are given."""
    from ..kernels import grid_masks, lowering
    from ..kernels.masks_density import density

    stored, (rows, keys) = grid_masks.arranged(spec, layout, device)
    while -(-layout.tokens // rows) > MOST or -(-layout.tokens // keys) > MOST:
        rows, keys = 2 * rows, 2 * keys
    lists = lowering.blocks(grid_masks.mask(spec, layout), stored, (rows, keys))
    counts = lists.counts[0, 0].tolist()
    columns, kinds = lists.columns.tolist(), None if lists.kinds is None else lists.kinds.tolist()
    places: dict[tuple[int, int], bool] = {}
    for row, (start, count) in enumerate(zip(lists.starts[0, 0].tolist(), counts, strict=True)):
        for at in range(start, start + count):
            places[row, columns[at]] = kinds is None or kinds[at] < 0
    found = density(lists, layout.tokens)
    words = [
        f"{percent(found.block, 0)} of the blocks of {rows} × {keys},",
        f"{percent(found.element, 1)} of the pairs",
    ]
    pool = getattr(spec, "pool", 0)
    if pool:
        cells = math.prod(layout.grid[:-2]) * math.prod(-(-n // pool) for n in layout.grid[-2:])
        words.append(f"and {number(cells)} averaged keys")
    return Thumbnail(
        **look,
        count=-(-layout.tokens // keys),
        rows=-(-layout.tokens // rows),
        full=runs_of({place for place, full in places.items() if full}),
        partial=runs_of({place for place, full in places.items() if not full}),
        words=[*words, *end],
    )


def _chosen(spec: Any, layout: Layout, look: dict[str, Any], end: list[str]) -> Thumbnail:
    """An example of what block selection reads: text, and of the others as many as the operator keeps."""
    import numpy as np

    from ..kernels import sparse

    order = sparse.stored(spec, layout)
    text = sparse.with_text(spec, order).tolist()
    count = len(text)
    open_ = [m for m, has in enumerate(text) if not has]
    keep = math.ceil(spec.mass * len(open_)) if spec.mass else sparse.kept(spec, len(open_)) if open_ else 0
    worth = np.random.default_rng(0).pareto(1.0, (count, count)) + 3.0 * np.eye(count)
    full: set[tuple[int, int]] = set()
    for row in range(count):
        chosen = sorted(open_, key=lambda m: -worth[row, m])[:keep]
        columns = range(count) if text[row] else [*chosen, *(m for m, has in enumerate(text) if has)]
        full |= {(row, int(column)) for column in columns}
    share = len(full) / count**2
    most = "at most " if spec.mass else ""
    words = [f"{most}{percent(share, 0)} of the blocks of {spec.block},", "and of the pairs"]
    every = {(row, column) for row in range(count) for column in range(count)}
    return Thumbnail(
        **look,
        count=count,
        full=runs_of(full),
        partial=[],
        rest=runs_of(every - full) if spec.operator == "sla" else [],
        words=[*words, *end],
    )
