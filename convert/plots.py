"""The report's plots: training loss, quality against memory, time against length."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2328", "#59636e", "#e4e9ee"
ARM_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class Plot:
    """A drawn figure: SVG whose colours follow the page's theme, and the same as files with a white ground."""

    inline: str
    svg: str
    png: bytes


def loss_curves(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Plot | None:
    """Loss by step, an axis per phase and a line per arm; None without a finite loss."""
    phases: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for arm, lines in logs.items():
        for line in lines:
            if isinstance(line.get("loss"), int | float) and isinstance(line.get("step"), int):
                phases.setdefault(str(line.get("phase", "")), {}).setdefault(arm, []).append(
                    (line["step"], line["loss"])
                )
    if not phases:
        return None
    titles = {
        "transfer": "Attention transfer: error of the attention outputs",
        "lora": "LoRA: distance to the teacher",
        "training": "Training: distance to the teacher",
    }
    with style() as new:
        figure = new(7.6, 3.2)
        axes = figure.subplots(1, len(phases), squeeze=False)[0]
        arms = list(logs)
        for axis, (phase, curves) in zip(axes, phases.items(), strict=True):
            for arm, points in curves.items():
                _curve(axis, arm, points, arms.index(arm))
            values = [y for points in curves.values() for _, y in points if y > 0]
            if values and max(values) > 20 * min(values):
                axis.set_yscale("log")
            else:
                axis.set_ylim(bottom=0)
                axis.locator_params(axis="y", nbins=6)
            axis.set_title(titles.get(phase, phase) if len(phases) == 1 else titles.get(phase, phase).split(":")[0])
            axis.set_xlabel("step")
            axis.locator_params(axis="x", integer=True)
        axes[0].set_ylabel("loss")
        if len(arms) > 1:
            figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside upper left", ncols=6)
        return draw(figure, "loss")


def _curve(axis: Axes, arm: str, points: Sequence[tuple[float, float]], index: int) -> None:
    """The loss of each step, pale, under its running mean where there are enough steps for one."""
    steps, values = [p[0] for p in points], [p[1] for p in points]
    colour, dash = ARM_COLOURS[index % len(ARM_COLOURS)], DASHES[index % len(DASHES)]
    span = len(values) // 12
    if span < 2:
        axis.plot(steps, values, color=colour, linestyle=dash, marker="o", markersize=3, label=arm)
        return
    mean = [sum(values[max(0, i - span + 1) : i + 1]) / min(i + 1, span) for i in range(len(values))]
    axis.plot(steps, values, color=colour, alpha=0.28, linewidth=0.9)
    axis.plot(steps, mean, color=colour, linestyle=dash, label=arm)


def tradeoff(points: Mapping[str, tuple[float, float]], x_label: str, y_label: str) -> Plot | None:
    """Arms by (cost as a share of the teacher's, loss of quality); None for fewer than two arms."""
    if len(points) < 2:
        return None
    with style() as new:
        figure = new(5.4, 3.3)
        axis = figure.subplots()
        axis.plot([1.0], [0.0], marker="*", markersize=10, linestyle="", color=MUTED, label="teacher")
        for index, (arm, (x, y)) in enumerate(points.items()):
            marker, colour = MARKERS[index % len(MARKERS)], ARM_COLOURS[index % len(ARM_COLOURS)]
            axis.plot([x], [y], marker=marker, markersize=7, linestyle="", color=colour, label=arm)
        axis.set_xlim(0, max(1.08, *(x * 1.1 for x, _ in points.values())))
        top = max(y for _, y in points.values())
        axis.set_ylim(-0.04 * top, 1.15 * top if top > 0 else 1)
        axis.locator_params(axis="y", nbins=6)
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        figure.legend(loc="outside upper left", ncols=4)
        return draw(figure, "tradeoff")


def times(series: Mapping[str, Mapping[int, float]], y_label: str) -> Plot | None:
    """Seconds by length, a line per arm; None unless two lengths were measured."""
    if len({length for line in series.values() for length in line}) < 2:
        return None
    with style() as new:
        figure = new(5.4, 3.3)
        axis = figure.subplots()
        arms = [arm for arm in series if arm != "teacher"]
        for arm, line in series.items():
            index = arms.index(arm) if arm in arms else 0
            colour = MUTED if arm == "teacher" else ARM_COLOURS[index % len(ARM_COLOURS)]
            lengths = sorted(line)
            axis.plot(lengths, [line[n] for n in lengths], color=colour, marker=MARKERS[index], markersize=5, label=arm)
        ticks = sorted({length for line in series.values() for length in line})
        if ticks[-1] > 16 * ticks[0]:
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        else:
            axis.set_xlim(left=0)
            axis.set_ylim(bottom=0)
            axis.locator_params(axis="y", nbins=6)
        axis.set_xticks(ticks, [f"{n:,}" for n in ticks])
        axis.minorticks_off()
        axis.set_xlabel("tokens")
        axis.set_ylabel(y_label)
        figure.legend(loc="outside upper left", ncols=4)
        return draw(figure, "times")


@contextmanager
def style() -> Iterator[Any]:
    """Our look for the figures made inside; gives a function from inches to a new figure."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "attnconvert",
        "font.size": 9.5,
        "font.family": "sans-serif",
        "text.color": INK,
        "axes.labelcolor": MUTED,
        "axes.edgecolor": MUTED,
        "axes.titlecolor": INK,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.titlepad": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.7,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "lines.linewidth": 1.7,
        "legend.frameon": False,
        "legend.borderaxespad": 0.2,
        "legend.columnspacing": 1.6,
        "legend.handletextpad": 0.5,
        "figure.constrained_layout.use": True,
    }
    with matplotlib.rc_context(settings):
        yield lambda wide, high: Figure(figsize=(wide, high))


def draw(figure: Figure, name: str) -> Plot:
    """The finished figure; `name` keeps its ids apart from those of other figures in the page."""
    picture, text = io.BytesIO(), io.StringIO()
    figure.savefig(picture, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    figure.set_layout_engine("none")  # the layout stands, and takes longer than the drawing
    figure.patch.set_visible(False)
    for axis in figure.axes:
        axis.patch.set_visible(False)
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    ground = '<rect width="100%" height="100%" fill="#ffffff"/>'
    return Plot(
        _themed(svg, name), re.sub(r"<svg\b[^>]*>", lambda tag: tag[0] + ground, svg, count=1), picture.getvalue()
    )


def _themed(svg: str, name: str) -> str:
    """For use inside the page: its colours, ids that do not clash with other figures', and no XML prologue."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for colour, variable in ((INK, "ink"), (MUTED, "muted"), (GRID, "grid")):
        svg = svg.replace(colour, f"var(--{variable})")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'xlink:href="#', f'xlink:href="#{name}-', svg)
    return svg.strip()
