"""What a dry run of an image or video recipe shows, from the document that `foresight` makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.text import Text

from .report_html import NONE, number, percent, ratio, size, tokens
from .tables import lines, table

UNITS = ((1e15, "PFLOPs"), (1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs"))


def foresight_parts(found: Mapping[str, Any]) -> list[Any]:
    """Tables and lines for the terminal."""
    parts = [_facts(found), _sites(found), _plan(found)]
    if found["masks"]:
        parts.append(_masks(found))
    return [*parts, _training(found)]


def _grid(entry: Mapping[str, Any]) -> str:
    image = "×".join(map(str, entry["grid"]))
    return f"{image} + {entry['text']}" if entry["text"] else image


def _facts(found: Mapping[str, Any]) -> Text:
    model, where, samples = found["model"], found["tokens"], found["samples"]
    text = f" and {tokens(where['text'])} of text" if where["text"] else ""
    kept = "trajectories" if samples["keep"] == "trajectory" else "latents"
    return lines(
        [
            ("model", f"{model['name']}: {model['class']}, {model['parameters'] / 1e6:,.1f} million parameters"),
            ("config", model["config"]),
            ("weights", f"{size(model['weights_bytes'])} in {model['dtype']}; evaluation holds them twice"),
            (
                "tokens",
                f"{tokens(where['image'])} ({_grid({**where, 'text': 0})}){text}, for latents of "
                f"{'×'.join(map(str, where['size']))}",
            ),
            (
                "samples",
                f"{samples['count']:,} {kept}, {size(samples['bytes'])} on the disk, {samples['calls']:,} calls",
            ),
            ("attention", _flops(found["flops"])),
        ]
    )


def _flops(flops: Mapping[str, Any]) -> str:
    teacher = f"{_amount(flops['teacher'])} a step"
    if flops["calls"] > 1:
        teacher += f" ({flops['calls']} calls)"
    if flops["student"] is None:
        return f"{teacher}; the student's are decided by what is measured"
    about = "about " if flops["estimated"] else ""
    return f"{teacher}, the student's {about}{_amount(flops['student'])}: {ratio(flops['ratio'])}"


def _amount(flops: float) -> str:
    unit, name = next(((size, name) for size, name in UNITS if flops >= size), UNITS[-1])
    return f"{flops / unit:,.3g} {name}"


def _layers(layers: list[int]) -> str:
    whole = layers == list(range(layers[0], layers[-1] + 1))
    named = str(layers[0]) if len(layers) == 1 else f"{layers[0]}–{layers[-1]}"
    return named if whole else f"{len(layers)} of {named}"


def _sites(found: Mapping[str, Any]) -> Any:
    rows = [
        [
            _layers(list(entry["layers"])),
            str(len(entry["layers"])),
            f"{entry['heads']} × {entry['head_dim']}",
            _grid(entry),
            tokens(entry["tokens"]),
        ]
        for entry in found["sites"]
    ]
    return table("Self-attentions", ["layers", "count", "heads", "grid + text", "tokens"], rows)


def _plan(found: Mapping[str, Any]) -> Any:
    plan = found["plan"]
    if plan["decided"]:
        rows = [
            [name, str(count["layers"]), str(count["groups"]), percent(count["groups"] / plan["groups"])]
            for name, count in plan["operators"].items()
        ]
        return table("Plan", ["operator", "layers", "heads", "of all"], rows)
    budget = ", ".join(f"{name} {value}" for name, value in plan["budget"].items())
    protected = f"; layers {', '.join(map(str, plan['protect']))} stay full" if plan["protect"] else ""
    count = plan["layers"] if plan["unit"] == "layer" else plan["groups"]
    what = "layers" if plan["unit"] == "layer" else "heads"
    title = f"Plan: {plan['method']} chooses from {count} {what} ({budget}{protected})"
    rows = [
        [entry["operator"], f"{entry['layers']} of {plan['layers']}", ratio(entry["flops_ratio"])]
        for entry in plan["candidates"]
    ]
    return table(title, ["candidate", "layers that\ncan take it", "FLOPs\neverywhere"], rows)


def _masks(found: Mapping[str, Any]) -> Any:
    rows = [
        [entry["operator"], _grid(entry), percent(entry["pairs"]), percent(entry["blocks"])] for entry in found["masks"]
    ]
    return table("What patterns leave of attention", ["operator", "grid + text", "pairs", "GPU blocks"], rows, left=2)


def _training(found: Mapping[str, Any]) -> Any:
    training = found["training"]
    if training is None:
        return Text("Nothing is trained.")
    again = ", computed again block by block" if training["gradient_checkpointing"] else ""
    titles = {
        "weights_bytes": "weights of the model",
        "trained_bytes": "adapters, learned maps, the teacher's projections",
        "gradients_bytes": "gradients",
        "optimizer_bytes": "AdamW's moments",
        "activations_bytes": f"activations of {training['batch']} states{again} (rough)",
        "targets_bytes": "the teacher's attention outputs",
        "total_bytes": "all",
    }
    rows = [[title, size(training[name]) if training[name] else NONE] for name, title in titles.items()]
    count = number(training["parameters"] / 1e6)
    title = f"Training of {count} million numbers ({training['weights']}), {training['steps']:,} steps"
    return table(title, ["memory", ""], rows)
