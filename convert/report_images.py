"""The report of an image or video model: what was gained and paid, the arms side by side, images, time and memory."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .artefacts import Artefacts, dig
from .evaluation_order import band_names, sizes_of, slower_sizes
from .report_comparison import EQUAL_BYTES, and_list, choice_rows, converted_tile, judged, noise_of, ordered
from .report_heat import Pictures
from .report_html import NONE, duration, figure, number, percent, ratio, section, size, table, tile, tokens

SHEET = "images.png"
WIDEST = 2000  # pixels of a sheet as it is embedded
BOUNDS = {  # gates that are lower bounds
    "psnr",
    "ssim",
    "right_class",
    "step_speedup",
    "converted",
}
GATES = {
    "velocity_error": "velocity error",
    "psnr": "PSNR to the teacher's images, dB",
    "ssim": "SSIM to the teacher's images",
    "right_class": "share of images of the right class",
    "frechet_rise": "rise of the Fréchet distance",
    "flops_ratio": "attention FLOPs over the teacher's",
    "step_speedup": "speed-up of a step",
    "converted": "share of heads converted",
}


def gate_name(name: str) -> str:
    """step_speedup@128x128 → speed-up of a step at 128×128"""
    what, _, at = name.partition("@")
    words = GATES.get(what, what.replace("_", " "))
    return f"{words} at {times(at)}" if at else words


def times(name: str) -> str:
    """32x32 → 32×32"""
    return name.replace("x", "×")


# --- the top of the page ----------------------------------------------------------------------------------------------


def gains(evaluation: Mapping[str, Any], student: Mapping[str, Any]) -> list[str]:
    """Tiles: time and memory of a step at the largest size, work, and how much was converted."""
    tiles = []
    for name, entry in sizes_of(evaluation)[-1:]:
        where = f"at {times(name)}, {tokens(entry['tokens'])} image tokens"
        took, held = ([dig(entry, arm, key) for arm in ("teacher", "student")] for key in ("step_s", "peak_bytes"))
        change = " → ".join(duration(value) for value in took)
        speedup = entry.get("speedup")
        tiles.append(tile("Speed of a step", ratio(speedup), change, where, bad=bool(speedup and speedup < 1)))
        if all(held):
            share = held[1] / held[0]
            change = " → ".join(size(value) for value in held)
            tiles.append(tile("Peak memory", ratio(share), change, where, bad=share > 1.005))
    if student.get("flops_ratio") is not None:
        value = student["flops_ratio"]
        at = f"at {times('x'.join(map(str, dig(evaluation, 'data', 'size', default=[]))))}"
        tiles.append(tile("Attention FLOPs", ratio(value), at, "by the cost model", bad=value > 1))
    return [*tiles, *converted_tile(student, "heads")]


def losses(evaluation: Mapping[str, Any], student: Mapping[str, Any]) -> list[str]:
    """Tiles: the error of the predictions, and what it does to the images."""
    quality = dig(student, "quality", default={})
    before = dig(evaluation, "arms", "teacher", "quality", default={})
    tiles = []
    if "velocity_error" in quality:
        states = f"{number(quality.get('states'))} held-out states"
        tiles.append(tile("Velocity error", number(quality["velocity_error"]), "squared, relative", states))
    if "psnr" in quality:
        ssim = f"SSIM {number(quality['ssim'])}" if "ssim" in quality else ""
        tiles.append(tile("PSNR", f"{number(quality['psnr'])} dB", ssim, "to the teacher's images"))
    if "right_class" in quality:
        change = f"{percent(before['right_class'])} before" if "right_class" in before else ""
        count = dig(evaluation, "data", "samples")
        tiles.append(tile("Right class", percent(quality["right_class"]), change, f"{number(count)} images"))
    if "frechet" in quality:
        change = f"{number(before.get('frechet'))} → {number(quality['frechet'])}" if "frechet" in before else ""
        rise = quality["frechet"] - before["frechet"] if "frechet" in before else quality["frechet"]
        shown = f"{'+' if rise > 0 else ''}{number(rise)}" if "frechet" in before else number(rise)
        tiles.append(tile("Fréchet distance", shown, change, "to fresh images of the teacher"))
    return tiles


def warning(evaluation: Mapping[str, Any]) -> str:
    """What nobody should miss: sizes at which the conversion is slower than the original. '' where there are none."""
    slower = slower_sizes(evaluation)
    if not slower:
        return ""
    names = and_list([f"{times(name)} ({ratio(value)} the speed)" for name, value in slower])
    told = dig(evaluation, "break_even", "told", default="")
    more = f" It is {escape(times(told))}." if told else ""
    return f'<p class="verdict bad"><span><b>Slower than the original at {escape(names)}.</b>{more}</span></p>'


# --- all arms ---------------------------------------------------------------------------------------------------------


def comparison_section(run: Artefacts, pictures: Pictures) -> str:
    """Every arm beside the teacher: in words, as a table, by part of the steps, and as images of the same noise."""
    evaluation = run.evaluation
    if not dig(evaluation, "arms"):
        return ""
    from .plots import tradeoff
    from .plots_images import over_bands

    arms = {arm: entry for arm, entry in dig(evaluation, "arms", default={}).items() if arm != "teacher"}
    points = {
        arm: (float(entry["flops_ratio"]), float(entry["quality"]["velocity_error"]))
        for arm, entry in arms.items()
        if entry.get("flops_ratio") is not None and dig(entry, "quality", "velocity_error") is not None
    }
    bands = band_names(arms.values())
    lines = {arm: [dig(entry, "quality", "bands", band) for band in bands] for arm, entry in arms.items()}
    size_of = times("x".join(map(str, dig(evaluation, "data", "size", default=[]))))
    drawn = []
    for name, plot, caption in (
        (
            "bands",
            over_bands(bands, {"velocity error": lines}),
            "Velocity error by part of the sampler's steps, from noise to image.",
        ),
        (
            "tradeoff",
            tradeoff(points, f"attention FLOPs at {size_of}, share of the teacher's", "velocity error"),
            "Down and left is better. The teacher costs 1 and loses nothing.",
        ),
    ):
        if plot:
            pictures |= {f"{name}.svg": plot.svg, f"{name}.png": plot.png}
            drawn.append(f"<div>{figure(plot.inline, caption)}</div>")
    plots = f'<h3>By part of the steps, and against work</h3><div class="maps">{"".join(drawn)}</div>' if drawn else ""
    states = number(next((dig(arm, "quality", "states") for arm in arms.values()), None))
    note = (
        f"All arms predict at the same {states} held-out states of the teacher's trajectories and start "
        f"{number(dig(evaluation, 'data', 'samples'))} images each from the same noise. The velocity error is the "
        "squared error of the prediction over the square of the teacher's."
    )
    shown = _sheet(run)
    return section(
        "Before and after", conclusions(evaluation), shown, arms_table(evaluation, run.select), plots, note=note
    )


def _sheet(run: Artefacts) -> str:
    """The sheet of images, within the page; '' where there is none."""
    folder = run.folder / "evaluation"
    if not (folder / SHEET).is_file():
        return ""
    try:
        data, width, height = _embedded(folder / SHEET)
    except OSError:  # no whole picture
        return ""
    words = "Images of the same noise and the same prompt, one column each."
    picture = (
        f'<img alt="{escape(words)}" width="{width}" height="{height}" '
        f'src="data:image/png;base64,{base64.b64encode(data).decode()}">'
    )
    return figure(picture, f"{words} Kept as evaluation/{SHEET}.")


def _embedded(path: Path) -> tuple[bytes, int, int]:
    """A PNG that is at most WIDEST pixels wide, with its width and height."""
    from PIL import Image

    with Image.open(path) as image:
        if image.width <= WIDEST:
            return path.read_bytes(), image.width, image.height
        small = image.convert("RGB").resize(
            (WIDEST, round(image.height * WIDEST / image.width)), Image.Resampling.LANCZOS
        )
    buffer = io.BytesIO()
    small.save(buffer, format="png", optimize=True)
    return buffer.getvalue(), small.width, small.height


def arms_table(evaluation: Mapping[str, Any], select: Mapping[str, Any]) -> str:
    """A column per arm, a row per figure."""
    arms = ordered(evaluation)
    found = {arm: dig(evaluation, "arms", arm, default={}) for arm in arms}
    rows: list[Sequence[str]] = []
    for title, block in (
        ("Choice", choice_rows(found, select, "heads")),
        ("Prediction", _prediction_rows(found)),
        ("Images from the same noise", _image_rows(found)),
        ("Work, by the cost model", [["attention FLOPs of a step", *(_flops(arm, found[arm]) for arm in arms)]]),
        ("Time and memory of a step, measured", _step_rows(evaluation, arms)),
    ):
        filled = [row for row in block if any(cell != NONE for cell in row[1:])]
        rows += [[title], *filled] if filled else []
    head = ["", *(escape(arm) for arm in arms)]
    return table(head, rows, strong=1 + arms.index("student") if "student" in arms else None)


def _prediction_rows(found: Mapping[str, Any]) -> list[list[str]]:
    rows = [["velocity error", *(number(dig(entry, "quality", "velocity_error")) for entry in found.values())]]
    for band in band_names(found.values()):
        words = f"in part {band} of the steps{' (noise)' if band.startswith('1 ') else ''}"
        rows.append([words, *(number(dig(entry, "quality", "bands", band)) for entry in found.values())])
    return rows


def _image_rows(found: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for field, words in (
        ("psnr", "PSNR to the teacher's, dB"),
        ("ssim", "SSIM to the teacher's"),
        ("perceptual", "perceptual distance to the teacher's"),
    ):
        rows.append([words, *(number(dig(entry, "quality", field)) for entry in found.values())])
    rows.append(["right class", *(percent(dig(entry, "quality", "right_class")) for entry in found.values())])
    own = dig(found.get("teacher"), "quality", "frechet")
    row = ["Fréchet distance to fresh images of the teacher"]
    for arm, entry in found.items():
        value = dig(entry, "quality", "frechet")
        rise = ""
        if arm != "teacher" and value is not None and own is not None:
            rise = f"<small>{'+' if value > own else ''}{number(value - own)}</small>"
        row.append(number(value) + rise)
    return [*rows, row]


def _flops(arm: str, entry: Mapping[str, Any]) -> str:
    return ratio(1.0) if arm == "teacher" else ratio(entry.get("flops_ratio"))


def _step_rows(evaluation: Mapping[str, Any], arms: Sequence[str]) -> list[list[str]]:
    rows = []
    for name, entry in sizes_of(evaluation):
        where = f"{times(name)}, {tokens(entry['tokens'])} image tokens"
        for title, field, show in (("time", "step_s", duration), ("peak memory", "peak_bytes", size)):
            row = [f"{title}, {where}"]
            before = dig(entry, "teacher", field)
            for arm in arms:
                value = dig(entry, arm, field)
                shown = show(value)
                if value and before and arm != "teacher":
                    share = before / value if field == "step_s" else value / before
                    shown += f"<small>{ratio(share)}{' the speed' if field == 'step_s' else ''}</small>"
                row.append(shown)
            rows.append(row)
    return rows


# --- in words ---------------------------------------------------------------------------------------------------------


def conclusions(evaluation: Mapping[str, Any]) -> str:
    """A plain sentence for every arm that stands beside the student."""
    arms = dig(evaluation, "arms", default={})
    if "student" not in arms:
        return ""
    samples, told = dig(evaluation, "data", "samples", default=0), []
    for name, other in arms.items():
        if name in ("teacher", "student"):
            continue
        compared = _compare(arms["student"], other, samples)
        if compared:
            told.append(judged(name, arms["student"], other, compared, _work(escape(name), arms["student"], other)))
    return f'<ul class="conclusions">{"".join(f"<li>{text}</li>" for text in told)}</ul>' if told else ""


def _work(shown: str, student: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The beginning of the sentence: whether the arms work as much."""
    ours, theirs = student.get("flops_ratio"), other.get("flops_ratio")
    if ours is None or theirs is None:
        return "At work that was not compared,"
    if abs(ours - theirs) <= EQUAL_BYTES * max(ours, theirs):
        return f"At equal work ({ratio(ours)} of the attention FLOPs)"
    more = "more" if theirs > ours else "less"
    return (
        f"<code>{shown}</code> computes {more} ({ratio(theirs)} of the attention FLOPs, the student {ratio(ours)}), and"
    )


def _compare(student: Mapping[str, Any], other: Mapping[str, Any], samples: int) -> list[tuple[str, int, str]]:
    """As `report_comparison` compares: (what, 1, -1 or 0, the figures)."""
    found = []
    for field, words, least, sign in (
        ("velocity_error", "velocity error", 0.05, -1),
        ("psnr", "PSNR", 0.01, 1),
        ("frechet", "Fréchet distance", 0.1, -1),
    ):
        ours, theirs = (dig(arm, "quality", field) for arm in (student, other))
        if ours is not None and theirs is not None:
            clear = abs(ours - theirs) > least * max(abs(ours), abs(theirs))
            order = sign * ((ours > theirs) - (ours < theirs)) * clear
            found.append((words, order, f"{words} {number(ours)} against {number(theirs)}"))
    ours, theirs = (dig(arm, "quality", "right_class") for arm in (student, other))
    if ours is not None and theirs is not None:
        order = 0 if abs(ours - theirs) <= noise_of(ours, theirs, samples) else 1 if ours > theirs else -1
        found.append(("right class", order, f"right class {percent(ours)} against {percent(theirs)}"))
    return found


# --- time and memory --------------------------------------------------------------------------------------------------


def speed_section(run: Artefacts, pictures: Pictures) -> str:
    """A step of teacher and student at every size that was timed, and from where on the conversion pays."""
    sizes = sizes_of(run.evaluation)
    if not sizes:
        return ""
    from .plots_images import steps

    told = str(dig(run.evaluation, "break_even", "told", default=""))
    crossing = dig(run.evaluation, "break_even", "tokens")
    within = crossing is not None and sizes[0][1]["tokens"] < crossing <= sizes[-1][1]["tokens"]
    plot = steps([entry for _, entry in sizes], crossing if within else None)
    drawn = ""
    if plot:
        pictures |= {"steps.svg": plot.svg, "steps.png": plot.png}
        caption = "A step of the sampler by the number of image tokens, both axes logarithmic."
        drawn = figure(plot.inline, caption + (" Dotted: from there on the student is faster." if within else ""))
    rows = []
    for name, entry in sizes:
        took, held = ([dig(entry, arm, key) for arm in ("teacher", "student")] for key in ("step_s", "peak_bytes"))
        speedup = entry.get("speedup")
        shown = f'<b class="bad">{ratio(speedup)}</b>' if speedup and speedup < 1 else ratio(speedup)
        memory = ratio(held[1] / held[0]) if all(held) else NONE
        cells = [times(name), tokens(entry["tokens"]), *map(duration, took), shown, *map(size, held), memory]
        rows.append(cells)
    head = ["Size", "Image tokens", "Step, teacher", "student", "Speed", "Peak memory, teacher", "student", "Ratio"]
    verdict = warning(run.evaluation)
    if not verdict and told:
        verdict = f'<p class="verdict good"><span><b>{escape(times(told[:1].upper() + told[1:]))}.</b></span></p>'
    repeats = number(sizes[0][1].get("repeats"))
    note = (
        f"One step of the sampler, guidance included, one image: medians of {repeats} runs in turns on the machine "
        "below. Peak memory is what tensors hold at once beside the weights."
    )
    return section("Time and memory", verdict, drawn, table(head, rows), note=note)
