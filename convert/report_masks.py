"""The report's mask thumbnails: what a row of each operator of the plan reads, in blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .artefacts import Artefacts, dig
from .headmaps import MUTED, Thumbnail, mask_thumbnails, operator_colours
from .report_html import figure, percent, tokens

if TYPE_CHECKING:
    from .report_selection import Pictures

BLOCK = 64


def masks_part(run: Artefacts, pictures: Pictures) -> str:
    """What a row of each operator of the plan reads, in blocks."""
    from ..kernels.spec import Full, spec_from_dict

    counts = Counter(label for groups in dig(run.plan, "sites", default={}).values() for label in groups)
    specs: dict[str, Any] = {"full": Full()}
    for label, given in dig(run.plan, "operators", default={}).items():
        try:
            specs[label] = spec_from_dict(given)
        except (ValueError, TypeError):  # of another version
            continue
    shown = {label: specs[label] for label in sorted(counts, key=lambda x: (x != "full", x)) if label in specs}
    if not any(spec != Full() for spec in shown.values()):
        return ""
    reach = max(_reach(spec) for spec in shown.values())
    length = 1024
    while length < 2 * reach and length < 8192:
        length *= 2
    causal = all(site.get("causal", True) for site in dig(run.profile, "sites", default=[]))
    length = length if causal else 512
    drawn = [thumbnail(label, spec, length, causal=causal) for label, spec in shown.items()]
    masks = [mask for mask in drawn if mask is not None]
    picture = mask_thumbnails(masks, describe="Masks of the operators in blocks")
    pictures["masks.svg"] = picture
    caption = (
        f"{tokens(length)} queries downwards, as many keys to the right, in blocks of {BLOCK}. A kernel computes whole "
        "blocks, so that the share of blocks is what is paid and the share of pairs what is read; 100 % is "
        f"{'the causal triangle' if causal else 'the whole square'}."
    )
    if any(spec.operator == "retention" for spec in shown.values()):
        caption += " Which old tokens retention keeps depends on the text: the vertical lines are an example."
    if any(spec.operator == "blocks" for spec in shown.values()):
        caption += " Which blocks are chosen depends on the text: an example is shown."
    return "<h3>What the operators read</h3>" + figure(picture, caption)


def _reach(spec: Any) -> int:
    """How many tokens a row reads by softmax, at most; 0 for full and linear attention."""
    return sum(getattr(spec, name, 0) for name in ("size", "window", "keep", "sinks"))


def thumbnail(label: str, spec: Any, length: int, causal: bool = True) -> Thumbnail | None:
    """None for an operator that is not known here."""
    if not causal:
        return _both_ways(label, spec, length)
    count = length // BLOCK
    if spec.operator not in ("full", "window", "span", "blocks", "hybrid", "linear", "retention"):
        return None
    window = {"full": length, "window": getattr(spec, "size", 0)}.get(spec.operator, getattr(spec, "window", 0))
    sinks, kept = getattr(spec, "sinks", 0), getattr(spec, "keep", 0)
    widths = [spec.width(i) if spec.operator == "span" else window for i in range(length)]
    kinds = _growing_blocks(widths, sinks) if spec.operator == "span" else _blocks(window, sinks, length)
    if spec.operator == "blocks":
        kinds, kept = _chosen_blocks(spec.keep * spec.block // BLOCK, count), 0
        widths = [spec.keep * spec.block + i % spec.block for i in range(length)]
    every = [(row, 0, row + 1) for row in range(count)]
    rest = (
        []
        if spec.operator not in ("hybrid", "linear")
        else runs_of({(r, c) for r, a, b in every for c in range(a, b)} - set(kinds))
    )
    pairs = sum(min(i + 1, wide + sinks + kept) for i, wide in enumerate(widths)) / (length * (length + 1) / 2)
    blocks = len(kinds) / (count * (count + 1) / 2)
    words = [f"{percent(blocks, 0)} of the blocks,", f"{percent(pairs, 0)} of the pairs"]
    if spec.operator == "linear":
        words = ["no pairs: everything is", "in the state"]
    if kept:
        words = [f"{percent(pairs, 0)} of the pairs;", "kept tokens are gathered"]
    return Thumbnail(
        title=label,
        colour=MUTED if label == "full" else operator_colours([label], {label: spec.operator})[label],
        count=count,
        full=runs_of({at for at, full in kinds.items() if full}),
        partial=runs_of({at for at, full in kinds.items() if not full}),
        rest=rest,
        strokes=_kept(window, sinks, kept, length),
        words=words,
    )


def _blocks(window: int, sinks: int, length: int) -> dict[tuple[int, int], bool]:
    """(query block, key block) of a window with sinks: whether all its pairs are in it."""
    from ..kernels.masks import Layout
    from ..kernels.masks_blocks import list_blocks
    from ..kernels.masks_patterns import a_shape, sliding_window

    if not window:
        return {}
    mask = a_shape(size=window, sinks=sinks) if sinks else sliding_window(size=window)
    found = list_blocks(mask, Layout(grid=(length,)), (BLOCK, BLOCK), length, False)
    places = zip(found.rows.tolist(), found.columns.tolist(), strict=True)
    return {place: kind < 0 for place, kind in zip(places, found.kinds.tolist(), strict=True)}


def _both_ways(label: str, spec: Any, length: int) -> Thumbnail | None:
    """The same of an encoder, whose rows read in both directions."""
    import numpy as np

    if spec.operator not in ("full", "window", "span", "blocks", "hybrid", "linear"):
        return None
    own = spec.width(length) if spec.operator == "span" else getattr(spec, "size", getattr(spec, "window", 0))
    size = length if spec.operator == "full" else own
    i = np.arange(length)
    mask = (np.abs(i[:, None] - i) < size) | (i < getattr(spec, "sinks", 0))
    if spec.operator == "blocks":
        chosen = _chosen_blocks(spec.keep * spec.block // BLOCK, length // BLOCK)
        for row, column in [*chosen, *((b, a) for a, b in chosen)]:
            mask[row * BLOCK : (row + 1) * BLOCK, column * BLOCK : (column + 1) * BLOCK] = True
    count = length // BLOCK
    tiles = mask.reshape(count, BLOCK, count, BLOCK).transpose(0, 2, 1, 3)
    full, some = tiles.all((2, 3)), tiles.any((2, 3))
    words = [f"{percent(float(some.mean()), 0)} of the blocks,", f"{percent(float(mask.mean()), 0)} of the pairs"]

    def places(which: Any) -> list[tuple[int, int, int]]:
        return runs_of({(int(row), int(column)) for row, column in zip(*np.nonzero(which), strict=True)})

    return Thumbnail(
        title=label,
        colour=MUTED if label == "full" else operator_colours([label], {label: spec.operator})[label],
        count=count,
        full=places(full),
        partial=places(some & ~full),
        rest=places(~some) if spec.operator in ("hybrid", "linear") else [],
        words=["no pairs: everything is", "in the state"] if spec.operator == "linear" else words,
    )


def _chosen_blocks(keep: int, count: int) -> dict[tuple[int, int], bool]:
    """An example of what block selection reads: its own block, the one before, the first, and some others."""
    import numpy as np

    draw = np.random.default_rng(0)
    worth = draw.pareto(1.0, count)
    found = {(row, row): False for row in range(count)}
    for row in range(count):
        worth = np.where(draw.random(count) < 0.2, draw.pareto(1.0, count), worth)
        score = worth[:row].copy()
        score[: 1 if row else 0], score[max(0, row - 1) :] = np.inf, np.inf
        found |= {(row, int(column)): True for column in np.argsort(-score)[:keep]}
    return found


def _growing_blocks(widths: Sequence[int], sinks: int) -> dict[tuple[int, int], bool]:
    """The same of a window that is `widths[i]` at row i."""
    found = {}
    for row in range(len(widths) // BLOCK):
        rows = range(row * BLOCK, (row + 1) * BLOCK)
        lows = [i - widths[i] + 1 for i in rows]
        for column in range(row + 1):
            if min(lows) < (column + 1) * BLOCK or (column == 0 and sinks):
                found[row, column] = column < row and max(lows) <= column * BLOCK
    return found


def runs_of(places: set[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Blocks that stand side by side as one."""
    runs: list[tuple[int, int, int]] = []
    for row, column in sorted(places):
        if runs and runs[-1][0] == row and runs[-1][2] == column:
            runs[-1] = (row, runs[-1][1], column + 1)
        else:
            runs.append((row, column, column + 1))
    return runs


def _kept(window: int, sinks: int, keep: int, length: int) -> list[tuple[float, float, float]]:
    """An example of what retention keeps: the most read tokens that left the window, by a heavy-tailed draw."""
    import numpy as np

    worth = np.random.default_rng(0).pareto(1.0, length)
    runs: list[tuple[float, float, float]] = []
    since: dict[int, int] = {}
    for row in range(0, length + BLOCK // 4, BLOCK // 4):
        old = np.arange(sinks, max(sinks, row - window))
        best = set(old[np.argsort(-worth[old])[:keep]].tolist()) if row < length else set()
        left = [token for token in since if token not in best]
        runs += [(token / BLOCK, since.pop(token) / BLOCK, min(row, length) / BLOCK) for token in left]
        for token in sorted(best - set(since)):
            since[token] = row
    return runs
