"""The tables of docs/images.md, from images.json."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selection_tables import fill, machine_of

PAGE = Path(__file__).parent.parent / "images.md"


def write(document: Mapping[str, Any], page: Path = PAGE) -> None:
    """Puts the tables between their marks; the text around them is written by people."""
    for name, make in (("quality", quality), ("speed", speed), ("layers", layers)):
        if name in document:
            fill(page, name, make(document[name]), "images")


def quality(part: Mapping[str, Any]) -> list[str]:
    """A row for each recipe: means over the seeds, and the seeds' range."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in part["rows"]:
        rows.setdefault(row["recipe"], []).append(row)
    seeds = max(len(found) for found in rows.values())
    trained = len({row["trained"] for row in part["rows"]})
    lines = [
        f"{machine_of(part)}; {seeds} seeds of {part['rows'][0]['samples']} samples each, "
        f"{trained} of training: mean (least to most).",
        "",
        "| recipe | attention FLOPs | sampling and training | right class | Fréchet, teacher's | Fréchet | "
        "velocity error | PSNR | SSIM |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for recipe, found in rows.items():
        took = [sum(row["seconds"].values()) for row in found]
        cells = [
            f"`{recipe}`",
            f"{statistics.fmean(row['flops_ratio'] for row in found):.0%}",
            f"{statistics.fmean(took) / 60:.1f} min",
            _spread(found, "student", "right_class", "{:.3f}"),
            _spread(found, "teacher", "frechet", "{:.1f}"),
            _spread(found, "student", "frechet", "{:.1f}"),
            _spread(found, "student", "velocity_error", "{:.4f}"),
            _spread(found, "student", "psnr", "{:.1f} dB"),
            _spread(found, "student", "ssim", "{:.3f}"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _spread(rows: Sequence[Mapping[str, Any]], who: str, key: str, form: str) -> str:
    values = [row[who][key] for row in rows]
    shown = form.format(statistics.fmean(values))
    return shown if len(values) < 2 else f"{shown} ({form.format(min(values))} to {form.format(max(values))})"


def speed(part: Mapping[str, Any]) -> list[str]:
    """Speed of a step over the original's at each size, and the tensors it holds."""
    sizes = list(part["rows"][0]["sizes"])
    tokens = [part["rows"][0]["sizes"][size]["tokens"] for size in sizes]
    heads = [f"{size} ({count:,} tokens)" for size, count in zip(sizes, tokens, strict=True)]
    lines = [
        f"{machine_of(part)}; a guided step (batch 2), medians in turns; in brackets the peak of tensors over the "
        "original's.",
        "",
        f"| all layers | {' | '.join(heads)} | break-even |",
        f"|---|{'---:|' * len(sizes)}---|",
    ]
    for row in part["rows"]:
        cells = []
        for size in sizes:
            entry = row["sizes"][size]
            memory = entry["student"]["peak_bytes"] / entry["teacher"]["peak_bytes"]
            cells.append(f"{entry['speedup']:.2f}× ({memory:.2f})")
        lines.append(f"| `{row['operator']}` | {' | '.join(cells)} | {row['break_even']['told']} |")
    base = part["rows"][0]["sizes"]
    seconds = ", ".join(f"{base[size]['teacher']['step_s']:.3f} s at {size}" for size in sizes)
    return [*lines, "", f"The original with SDPA takes {seconds}."]


def layers(part: Mapping[str, Any]) -> list[str]:
    """What each way of choosing layers comes to, beside all choices that there are."""
    lines = [
        f"{machine_of(part)}; velocity error on 48 held-out states.",
        "",
        "| linear layers | seed | LinVideo's | uniform | random (mean of all) | best there is | rank of LinVideo's |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in part["rows"]:
        errors = row["errors"]
        order = sorted(errors, key=errors.__getitem__)
        cells = [
            str(row["layers"]),
            str(row["seed"]),
            _choice(errors, row["linvideo"]),
            _choice(errors, row["uniform"]),
            f"{row['random']:.4f}",
            _choice(errors, order[0]),
            f"{order.index(row['linvideo']) + 1} of {len(order)}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _choice(errors: Mapping[str, float], name: str) -> str:
    return f"{errors[name]:.4f} ({name})"
