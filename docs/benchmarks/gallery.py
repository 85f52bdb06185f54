"""The gallery of recipes (docs/gallery.md): every shipped recipe with what was measured of it.

    python docs/benchmarks/gallery.py            # what `make docs` does first

A recipe of text has its figures in docs/benchmarks/<recipe>.json, one of images in images.json. It needs no torch.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))
from selection_tables import HERE, fill, machine_of

PAGE, RECIPES = HERE.parent / "gallery.md", HERE.parents[1] / "recipes"
NAMES = {"kl": "KL", "perplexity_ratio": "perplexity", "cosine": "cosine similarity"}
NAMES |= {"rank": "ranks of similarities", "masked_kept": "masked tokens kept"}  # of encoders


def main(page: Path = PAGE) -> None:
    """Writes the gallery anew."""
    fill(page, "recipes", lines(), "docs")


def lines() -> list[str]:
    """A section for each recipe, by name: those of text that were measured first."""
    found = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(RECIPES.glob("*.yaml"))}
    told: list[str] = []
    for title, images in (("Language models and encoders", False), ("Image and video models", True)):
        told += ["", f"## {title}"]
        for name, recipe in found.items():
            if ("images" in recipe) is images:
                told += ["", f"### {name}", "", *section(name, recipe)]
    return [*told, ""]


def section(name: str, recipe: Mapping[str, Any]) -> list[str]:
    """What a recipe does, and what came of it."""
    select = recipe.get("select", {})
    source = recipe["model"]
    model = source.get("hub") or source.get("shipped") or source.get("package", {}).get("file", "").rpartition("/")[2]
    operators = [_operator(spec) for spec in recipe.get("profile", {}).get("candidates", [])]
    facts = [
        f"- model: `{model or source}`",
        f"- operators: {', '.join(operators) or 'the default, a window'}",
        f"- chosen by: {select.get('method', 'damage')}{_budget(select)}",
        f"- must meet: {_gates(recipe.get('gates', {})) or 'no bound'}",
    ]
    command = ["", "```bash", f"attnconvert run {name} --out runs/{name}", "```", ""]
    return [f"{recipe.get('description', '')}.", "", *facts, *command, *measured(name)]


def _operator(spec: Mapping[str, Any]) -> str:
    settings = {key: value for key, value in spec.items() if key != "operator"}
    told = ", ".join(f"{key} {_short(value)}" for key, value in settings.items())
    return f"[{spec['operator']}](operators/{spec['operator']}.md)" + (f" ({told})" if told else "")


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['operator']} " + " ".join(f"{k} {_short(v)}" for k, v in value.items() if k != "operator")
    return " × ".join(map(str, value)) if isinstance(value, list) else str(value)


def _budget(select: Mapping[str, Any]) -> str:
    if "groups" in select:
        return f", {select['groups']:.0%} of the KV groups"
    if "layers" in select:
        return f", {select['layers']} layers"
    budgets = select.get("budgets") or {}
    told = [f"{amount} of {resource} at {length}" for resource, by in budgets.items() for length, amount in by.items()]
    told += [f"KL of at most {select['keep_quality']}"] if select.get("keep_quality") else []
    return f", {', '.join(told)}" if told else ""


def _gates(gates: Mapping[str, Any]) -> str:
    told = []
    for name, bound in gates.items():
        each = bound.items() if isinstance(bound, dict) else [("", bound)]
        told += [f"{name} {value}" + (f" at {length}" if length else "") for length, value in each]
    return ", ".join(told)


def measured(name: str) -> list[str]:
    """The table of a recipe, or that there is none."""
    file = HERE / f"{name}.json"
    if file.is_file():
        document = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(document, dict) and "arms" in document:
            return arms(document)
    rows = [row for row in json.loads((HERE / "images.json").read_text())["quality"]["rows"] if row["recipe"] == name]
    if rows:
        return images(rows)
    return ["No figures of it are kept here: `--dry-run` says what it takes."]


def arms(document: Mapping[str, Any]) -> list[str]:
    """A row for each arm of an evaluation."""
    found = {name: arm for name, arm in document["arms"].items() if name != "teacher"}
    student = found["student"]
    columns = [
        (length, key) for length, quality in student["quality"].items() for key in NAMES if quality.get(key) is not None
    ]
    heads = [f"{NAMES[key]} at {length}" for length, key in columns]
    cached = max(student["kv_ratio"], key=int) if student.get("kv_ratio") else None
    heads += ["found" if "exact" in student["retrieval"] else ""] + ([f"KV cache at {cached}"] if cached else [])
    total = sum(stage["seconds"] for stage in document["stages"].values()) / 60
    lines = [
        f"{machine_of(document)}, {total:.0f} min in all; the teacher finds "
        f"{document['arms']['teacher']['retrieval']['exact']:.0%}.",
        "",
        f"| arm | converted | {' | '.join(heads)} |",
        f"|---|---:|{'---:|' * len(heads)}",
    ]
    for name, arm in found.items():
        cells = [f"{arm['quality'][n][key]:.3f}" + "×" * (key == "perplexity_ratio") for n, key in columns]
        cells += [f"{arm['retrieval']['exact']:.0%}", *([f"{arm['kv_ratio'][cached]:.2f}×"] if cached else [])]
        lines.append(f"| {name} | {arm['converted']:.0%} | {' | '.join(cells)} |")
    for length, speed in document.get("speed", {}).items():
        lines += ["", f"At {length} tokens a prefill is {speed['prefill_speedup']:.2f}× as fast"]
        if speed.get("decode_speedup"):
            lines[-1] += f" and a decoded token {speed['decode_speedup']:.2f}×"
        lines[-1] += "."
    return lines


def images(rows: list[Mapping[str, Any]]) -> list[str]:
    """Means over the seeds of an image recipe."""
    minutes = statistics.fmean(sum(row["seconds"].values()) for row in rows) / 60
    right = statistics.fmean(row["student"]["right_class"] for row in rows)
    teacher = statistics.fmean(row["teacher"]["right_class"] for row in rows)
    error = statistics.fmean(row["student"]["velocity_error"] for row in rows)
    flops = statistics.fmean(row["flops_ratio"] for row in rows)
    return [
        f"| attention FLOPs | sampling and training | right class ({len(rows)} seeds) | teacher's | velocity error |",
        "|---:|---:|---:|---:|---:|",
        f"| {flops:.0%} | {minutes:.1f} min | {right:.1%} | {teacher:.1%} | {error:.4f} |",
    ]


if __name__ == "__main__":
    main()
