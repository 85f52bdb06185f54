"""Plots of the selection: the front with all selectors, scores against damage, refinement, recall by density."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .plots import INK, MUTED, Plot, draw, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FRONT, HIGHLIGHT = "#0072b2", "#d55e00"
# Colour and marker of each selector: no two share both the marker and the colour
LOOKS: Mapping[str, tuple[str, str]] = {
    "damage": ("#0072b2", "o"),
    "greedy": ("#56b4e9", "D"),
    "first_order": ("#009e73", "^"),
    "output_error": ("#e69f00", "s"),
    "mass": ("#cc79a7", "v"),
    "moa": ("#8f4a72", "P"),
    "duo": ("#d55e00", "X"),
    "linvideo": ("#8a6d00", "d"),
    "uniform": (MUTED, "+"),
    "interleaved": (MUTED, "x"),
    "random": (MUTED, "."),
}
NAMES = {
    "damage": "measured damage",
    "first_order": "first-order effect",
    "output_error": "output error",
    "mass": "attention mass",
    "moa": "MoA's influence",
    "duo": "DuoAttention's gates",
    "linvideo": "LinVideo's gates",
    "random": "random, several seeds",
}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A score of every KV group against what converting it costs; `marked` groups are set off."""

    title: str
    score: Sequence[float]
    damage: Sequence[float]
    marked: Sequence[bool]
    rank: float | None  # Spearman's correlation
    unit: str  # of the damage


def pareto(front: Mapping[str, Any], x_label: str, y_label: str, measured: Mapping[str, float]) -> Plot | None:
    """Loss by cost on a log scale; `measured` by arm is what its groups lose together."""
    line = [(e["cost"], e["loss"]) for e in front.get("front", []) if e.get("loss") is not None]
    if len(line) < 2:
        return None
    others = {
        name: [(e["cost"], e["loss"]) for e in entries if e.get("loss") is not None]
        for name, entries in front.get("others", {}).items()
    }
    arms = {arm: (e["cost"], e["loss"]) for arm, e in front.get("chosen", {}).items() if e.get("loss") is not None}
    values = [y for points in (line, *others.values(), list(arms.values())) for _, y in points]
    floor = min((y for y in (*values, *measured.values()) if y > 0), default=1.0) / 2
    with style() as new:
        figure = new(8.4, 4.3)
        axis = figure.subplots()
        best = front.get("method", "damage")
        x, y = zip(*line, strict=True)
        label = f"{NAMES.get(best, best)}, integer program"
        axis.plot(100 * _array(x), _array(y, floor), color=FRONT, marker="o", markersize=4.5, label=label, zorder=3)
        for name in sorted(others, key=list(LOOKS).index):
            if others[name]:
                _selector(axis, name, others[name], floor)
        _arms(axis, arms, measured, floor)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        least = 100 * min(x for points in (line, *others.values(), list(arms.values())) for x, _ in points)
        axis.set_xlim(0 if least < 50 else least - 0.08 * (100 - least), 102 if least < 50 else 100)
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        figure.legend(loc="outside right upper", borderaxespad=0.6)
        return draw(figure, "front")


def _array(values: Sequence[float], floor: float = 0.0) -> Any:
    import numpy as np

    return np.maximum(np.asarray(values, dtype=float), floor)


def _selector(axis: Axes, name: str, points: Sequence[tuple[float, float]], floor: float) -> None:
    colour, marker = LOOKS[name]
    x, y = zip(*points, strict=True)
    size = {".": 5.5, "+": 7.0, "x": 6.0}.get(marker, 6.0)
    axis.plot(
        100 * _array(x),
        _array(y, floor),
        linestyle="",
        marker=marker,
        markersize=size,
        color=colour,
        markeredgewidth=1.4 if marker in "+x" else 0.6,
        alpha=0.75 if name == "random" else 1.0,
        label=NAMES.get(name, name),
    )


def _arms(axis: Axes, arms: Mapping[str, tuple[float, float]], measured: Mapping[str, float], floor: float) -> None:
    """The plans of the run: a star where the single losses put them, a hollow one where they were measured."""
    said = False
    labels: dict[tuple[str, str], tuple[float, float, list[str]]] = {}  # plans in one place share a label
    for arm, (x, y) in arms.items():
        size = 13 if arm == "student" else 9
        ends = [max(y, floor)]
        axis.plot([100 * x], ends, marker="*", markersize=size, color=INK, linestyle="", zorder=5)
        if arm in measured:
            ends.append(max(measured[arm], floor))
            axis.plot([100 * x] * 2, ends, color=INK, linewidth=0.8, linestyle=":", zorder=4)
            hollow: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": INK, "linestyle": "", "zorder": 5}
            axis.plot([100 * x], ends[1:], marker="*", markersize=size, **hollow)
            said = True
        labels.setdefault((f"{x:.2f}", f"{max(ends):.2g}"), (100 * x, max(ends), []))[2].append(arm)
    for x, y, names in labels.values():
        axis.annotate(", ".join(names), (x, y), (7, 4), textcoords="offset points", color=INK, fontsize=9)
    if arms:
        axis.plot([], [], marker="*", markersize=9, color=INK, linestyle="", label="plans of this run, predicted")
    if said:
        axis.plot([], [], marker="*", markersize=9, mfc="none", mec=INK, linestyle="", label="the same, measured whole")


def predictors(panels: Sequence[Panel], label: str, marked_label: str, name: str) -> Plot | None:
    """A panel for each score, log-log where the values are positive; damage of 0 and less is drawn at the floor."""
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with style() as new:
        figure = new(3.0 * columns + 0.3, 2.55 * rows + 0.35)
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axis, panel in zip(axes, panels, strict=False):
            _scatter(axis, panel)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        for n, axis in enumerate(axes[: len(panels)]):
            if n % columns == 0 or panels[n].unit != panels[n - 1].unit:
                axis.set_ylabel(panels[n].unit)
        handles = [
            axes[0].plot([], [], linestyle="", marker="o", markersize=4.5, color=FRONT, label=label)[0],
        ]
        if marked_label:
            look: dict[str, Any] = {"linestyle": "", "marker": "^", "markersize": 6, "color": HIGHLIGHT}
            handles += axes[0].plot([], [], label=marked_label, **look)
        figure.legend(handles=handles, loc="outside upper left", ncols=2)
        return draw(figure, f"predictors-{name}")


def _scatter(axis: Axes, panel: Panel) -> None:
    positive = [y for y in panel.damage if y > 0]
    floor = max(min(positive), max(positive) / 1e5) * 0.7 if positive else 0.0
    y = _array(panel.damage, floor)
    score = _array(panel.score, float("-inf"))
    for marked, colour, marker, size in ((False, FRONT, "o", 3.6), (True, HIGHLIGHT, "^", 6.0)):
        mine = [i for i, mark in enumerate(panel.marked) if mark == marked]
        axis.plot(
            score[mine], y[mine], linestyle="", marker=marker, markersize=size, color=colour, alpha=0.8, mec="none"
        )
    if positive:
        axis.set_yscale("log")
        _sparse(axis.yaxis)
    if min(panel.score) > 0 and max(panel.score) > 20 * min(panel.score):
        axis.set_xscale("log")
        _sparse(axis.xaxis)
    else:
        axis.locator_params(axis="x", nbins=4)
    rank = "" if panel.rank is None else f", ρ = {panel.rank:.2f}".replace("-", "\u2212")
    axis.set_title(f"{panel.title}{rank}", fontsize=9.5)
    axis.tick_params(labelsize=8)


def _sparse(axis: Any) -> None:
    """Few labels on a log axis, in plain numbers, between the decades too where there are not many."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(LogLocator(subs=(1.0, 3.0) if high < 100 * low else (1.0,), numticks=5))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def refinement(histories: Mapping[str, Sequence[Mapping[str, Any]]], x_label: str) -> Plot | None:
    """Measured loss of every plan that refinement tried, and what was predicted of it; kept ones are filled."""
    shown = {arm: lines for arm, lines in histories.items() if len(lines) > 1}
    if not shown:
        return None
    with style() as new:
        figure = new(4.6 * len(shown) + 0.6, 0.9 + 0.22 * max(len(lines) for lines in shown.values()))
        for axis, (arm, lines) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
            for n, line in enumerate(lines):
                axis.axhline(n, color=FRONT, linewidth=0.4, alpha=0.3)
                face = FRONT if line.get("kept") else "none"
                axis.plot(line["loss"], n, "o", color=FRONT, markerfacecolor=face, label="" if n else "measured whole")
            told = [(line["predicted"], n) for n, line in enumerate(lines) if line.get("predicted") is not None]
            if told:
                axis.plot(*zip(*told, strict=True), "x", color=HIGHLIGHT, label="predicted")
            axis.set_yticks(range(len(lines)), [f"{line['round']}: {line['scores']}" for line in lines], fontsize=8)
            axis.invert_yaxis()
            axis.set_xlim(0, 1.08 * max((*(line["loss"] for line in lines), *(x for x, _ in told), 1e-9)))
            axis.set_xlabel(x_label)
            axis.set_title(arm if len(shown) > 1 else "", fontsize=9.5)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
        return draw(figure, "refinement")


def recall_curves(
    fractions: Sequence[float], kinds: Mapping[str, Sequence[Sequence[float]]], extremes: Mapping[str, Sequence[float]]
) -> Plot | None:
    """Mass in the best share of the blocks: median and 10–90 % band by kind of operator, and some heads by name."""
    import numpy as np

    shown = {kind: np.asarray(curves, dtype=float) for kind, curves in kinds.items() if len(curves)}
    if not shown or len(fractions) < 2:
        return None
    x = 100 * np.asarray([*fractions, 1.0])
    with style() as new:
        figure = new(5.2, 3.4)
        axis = figure.subplots()
        colours = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00")
        for n, (kind, curves) in enumerate(shown.items()):
            low, middle, high = (np.append(np.quantile(curves, q, axis=0), 1.0) for q in (0.1, 0.5, 0.9))
            colour = colours[n % len(colours)]
            axis.fill_between(x, 100 * low, 100 * high, color=colour, alpha=0.18, linewidth=0)
            axis.plot(
                x, 100 * middle, color=colour, linestyle=("-", "--", "-.")[n % 3], label=f"{kind} ({len(curves)})"
            )
        for name, curve in extremes.items():
            y = 100 * np.append(np.asarray(curve, dtype=float), 1.0)
            axis.plot(x, y, color=MUTED, linewidth=0.9, linestyle=":")
            axis.annotate(name, (x[0], y[0]), (-4, 0), textcoords="offset points", ha="right", va="center", fontsize=8)
        axis.set_xscale("log", base=2)
        axis.set_xticks(x, [f"{value:.3g}" for value in x])
        axis.set_xlim(x[0] * 0.62, 104)
        axis.set_ylim(0, 101)
        axis.set_xlabel("blocks of 64 tokens that a row reads, % of those it sees")
        axis.set_ylabel("attention mass in them, %")
        figure.legend(loc="outside upper left", ncols=3)
        return draw(figure, "recall")
