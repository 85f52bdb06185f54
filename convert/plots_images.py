"""Plots of image and video models: a step's time and memory by tokens, and figures over the sampler's steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .artefacts import dig
from .plots import ARM_COLOURS, DASHES, MARKERS, MUTED, Plot, draw, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KIB = 1024.0
LOOKS: Mapping[str, Mapping[str, Any]] = {
    "teacher": {"color": MUTED, "linewidth": 3.2, "marker": "s", "markersize": 8, "alpha": 0.55},
    "student": {"color": ARM_COLOURS[0], "linewidth": 1.6, "marker": "o", "markersize": 4.5},
}


def steps(entries: Sequence[Mapping[str, Any]], crossing: int | None) -> Plot | None:
    """Seconds and peak bytes of a step by image tokens, log-log; a line at `crossing`. None for fewer than two sizes.

    Args:
        entries: of `speed` in evaluation.json, the fewest tokens first.
    """
    if len(entries) < 2:
        return None
    x = [entry["tokens"] for entry in entries]
    peaks = [dig(entry, arm, "peak_bytes") for entry in entries for arm in ("teacher", "student")]
    panels = [("step_s", "time of a step, seconds", 1.0)]
    if all(peaks):
        unit, name = _unit(max(peaks))
        panels.append(("peak_bytes", f"peak memory of a step, {name}", unit))
    with style() as new:
        figure = new(3.9 * len(panels), 3.3)
        for axis, (field, label, unit) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for arm, look in LOOKS.items():  # the teacher's line shows on both sides of the student's where they agree
                axis.plot(x, [dig(entry, arm, field) / unit for entry in entries], label=arm, **look)
            if crossing is not None and field == "step_s":
                axis.axvline(crossing, color=MUTED, linestyle=":", linewidth=1.2)
            _logarithmic(axis, x)
            axis.set_xlabel("image tokens")
            axis.set_ylabel(label)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
        return draw(figure, "steps")


def _unit(most: float) -> tuple[float, str]:
    """The binary unit in which so many bytes are a small number."""
    unit, name = 1.0, "B"
    for bigger in ("KiB", "MiB", "GiB"):
        if most < KIB * unit:
            break
        unit, name = unit * KIB, bigger
    return unit, name


def _logarithmic(axis: Axes, x: Sequence[int]) -> None:
    """Both axes, with the values of x as ticks and plain numbers at the decades of y and their parts."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(x, [f"{n:,}" for n in x], rotation=30 if len(x) > 5 else 0)
    axis.xaxis.set_minor_locator(NullLocator())
    low, high = axis.get_ylim()
    low, high = low / 1.25, high * 1.25
    axis.set_ylim(low, high)
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 300 * low else (1.0,), numticks=9))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def over_bands(
    bands: Sequence[str],
    panels: Mapping[str, Mapping[str, Sequence[float | None]]],
    spreads: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    name: str = "bands",
) -> Plot | None:
    """A panel for each figure with a line per name over the parts of the steps; None for fewer than two parts.

    Args:
        panels: what is drawn → name → a value per part; spreads: by name the low and high end of a pale band.
    """
    lines = {
        what: {key: list(values) for key, values in found.items() if any(v is not None for v in values)}
        for what, found in panels.items()
    }
    lines = {what: found for what, found in lines.items() if found}
    if len(bands) < 2 or not lines:
        return None
    x = range(len(bands))
    with style() as new:
        figure = new(4.6 * len(lines), 3.2 if len(lines) > 1 else 3.3)
        for axis, (what, found) in zip(figure.subplots(1, len(lines), squeeze=False)[0], lines.items(), strict=True):
            values = [v for line in found.values() for v in line if v is not None]
            for n, (key, line) in enumerate(found.items()):
                colour, look = ARM_COLOURS[n % len(ARM_COLOURS)], DASHES[n % len(DASHES)]
                y = [float("nan") if v is None else v for v in line]
                axis.plot(x, y, color=colour, linestyle=look, marker=MARKERS[n % len(MARKERS)], markersize=5, label=key)
                if spreads and key in spreads:
                    axis.fill_between(x, *spreads[key], color=colour, alpha=0.15, linewidth=0)
                    values += [v for ends in spreads[key] for v in ends]
            _scale(axis, values)
            axis.set_xticks(list(x), list(bands))
            axis.set_xlim(-0.25, len(bands) - 0.75)
            axis.set_xlabel("part of the steps, noise → image")
            axis.set_ylabel(what)
            if len(found) > 1 or len(lines) > 1:
                axis.legend(loc="best", fontsize=8.5)
        return draw(figure, name)


def _scale(axis: Axes, values: Sequence[float]) -> None:
    """Logarithmic where the values span more than twenty times."""
    if min(values) > 0 and max(values) > 20 * min(values):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axis.set_ylim(bottom=min(0.0, *values))
        axis.locator_params(axis="y", nbins=6)


def objectives(terms: Mapping[str, Sequence[tuple[int, float]]]) -> Plot | None:
    """The parts of a training loss by step, a panel each; None for fewer than two."""
    shown = {name: points for name, points in terms.items() if len(points) > 1}
    if len(shown) < 2:
        return None
    with style() as new:
        figure = new(min(3.1 * len(shown), 10.5), 2.7)
        for axis, (name, points) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
            values = [y for _, y in points]
            span = max(1, len(values) // 12)
            mean = [sum(values[max(0, i - span + 1) : i + 1]) / min(i + 1, span) for i in range(len(values))]
            at = [step for step, _ in points]
            axis.plot(at, values, color=ARM_COLOURS[0], alpha=0.28, linewidth=0.9)
            axis.plot(at, mean, color=ARM_COLOURS[0])
            _scale(axis, mean)
            axis.set_title(name)
            axis.set_xlabel("step")
            axis.locator_params(axis="x", integer=True, nbins=5)
        return draw(figure, "objectives")
