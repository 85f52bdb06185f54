"""The model card of an exported checkpoint: what was converted, how to load it, what was measured, what it lacks."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..kernels.spec import OPERATORS, Spec, label, spec_to_dict
from .artefacts import dig
from .recipe import dump_recipe
from .report_comparison import encodes
from .report_html import NONE, duration, number, percent, ratio, size, tokens

if TYPE_CHECKING:
    from .recipe import AnyRecipe, Recipe

PATHS = re.compile(r"(?<![^\[{,\s'\"])/[^\[\]{},\s'\"]+")  # absolute ones in lists and mappings: --set key=[/a,/b]
LOAD = """\
## Use

With `trust_remote_code=True` nothing but transformers is needed: the operators' code lies beside the weights.

```python
from transformers import {auto}, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = {auto}.from_pretrained(folder, trust_remote_code=True)

{use}
```

Where code from a model folder is not to be run, `pip install attnconvert` and import it first:

```python
import attnconvert
from transformers import {auto}

model = {auto}.from_pretrained("path/to/this/folder")
```
"""
STOCK = """\
## Use

This is an architecture that transformers has: nothing but transformers is needed, and no code is trusted.

```python
from transformers import {auto}, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {auto}.from_pretrained(folder)

{use}
```

The windows are `layer_types` and `sliding_window` of `config.json`, so the model is as fast as what runs it makes of
them. With attnconvert installed, `attnconvert.load(folder)` runs the same weights with its kernels.
"""
ADAPTER = """\
## Use

This folder holds no model: it has what was trained and the plan, and is put on the base model by attnconvert.

```python
import attnconvert

model = attnconvert.load("path/to/this/folder")
```

{peft}"""
PEFT = """\
`PeftModel.from_pretrained(base, folder)` loads the adapter into the base model too, but that alone is **not the
converted model**: its attention stays full, and the adapter was trained for the operators that are then missing.
"""
UNTRAINED = "No adapter was trained: the weights are those of the base model.\n"
GENERATE = """\
inputs = tokenizer("The state of the union is", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0], skip_special_tokens=True))"""
ENCODE = """\
inputs = tokenizer(["The state of the union is strong.", "A second text."], padding=True, return_tensors="pt")
output = model(**inputs)"""
CACHE = """\
- Offloaded and quantised caches raise an error: the states are small. A static cache holds every operator but `blocks`.
- The cache takes tokens back, as assisted decoding and prompt lookup ask for, only while it records what it is fed.
"""
SEES_LESS = """\
- A converted group sees what its operator keeps. What was not measured above, such as longer contexts or other
  languages, may have suffered more.
"""
LIMITS = """\
## Limits

{cache}- Packed sequences are read one by one, without a cache; custom attention masks raise an error.
- Attention dropout is not applied; it matters only where the model is trained on.
"""
LIMITS += SEES_LESS


def model_card(
    recipe: Recipe,
    manifest: Mapping[str, Any],
    base_class: str,
    evaluation: Mapping[str, Any] | None,
    form: str = "remote",
    serving: str = "",
) -> str:
    """README.md of the exported folder.

    Args:
        manifest: of the run; base_class: the stock class, such as LlamaForCausalLM; evaluation: evaluation.json, or
            None if the export came first; form: stock, remote or adapter; serving: what engines make of it.
    """
    from .hosts.registration import loader

    auto = loader(base_class)
    generates = auto == "AutoModelForCausalLM"
    library = "peft" if form == "adapter" and _trained(evaluation) else "transformers"
    parts = [
        front_matter(recipe, library, PIPELINES.get(auto, ""), evaluation),
        what(recipe, manifest, base_class, evaluation),
        how_to_load(form, auto, generates, _trained(evaluation)),
        _measured(evaluation),
        gates(evaluation),
        limits(form, generates, serving),
        made(recipe, manifest),
    ]
    return "\n".join(part for part in parts if part)


def how_to_load(form: str, auto: str, generates: bool, trained: bool) -> str:
    """The section Use of a format."""
    if form == "adapter":
        return ADAPTER.format(peft=PEFT if trained else UNTRAINED)
    template = STOCK if form == "stock" else LOAD
    return template.format(auto=auto, use=GENERATE if generates else ENCODE)


def limits(form: str, generates: bool, serving: str = "") -> str:
    """The section Limits of a format."""
    if form == "stock":
        told = f"- {serving}.\n" if serving else ""
        return f"## Limits\n\n{told}{SEES_LESS}"
    return LIMITS.format(cache=CACHE if generates else "")


def _trained(evaluation: Mapping[str, Any] | None) -> bool:
    return bool(dig(evaluation, "arms", "student", "trained", default=False))


def figures(evaluation: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The measured table as text: the arms, teacher and student first, and a row of name and cells per figure."""
    arms, found, rows = first_rows(evaluation, "KV groups")
    rows += [*_quality(arms, found), *_costs(arms, found), *_speed(arms, dig(evaluation, "speed", default={}))]
    return arms, filled(rows)


def first_rows(evaluation: Mapping[str, Any], groups: str) -> tuple[list[str], Mapping[str, Any], list[list[str]]]:
    """The arms in their order, what was found of them, and the rows that every kind of model has."""
    found = dig(evaluation, "arms", default={})
    arms = sorted(found, key=lambda arm: {"teacher": 0, "student": 1}.get(arm, 2))
    converted = (NONE if arm == "teacher" else percent(dig(found[arm], "converted")) for arm in arms)
    trained = ({True: "yes", False: "no"}.get(dig(found[arm], "trained"), NONE) for arm in arms)
    return arms, found, [[f"{groups} converted", *converted], ["trained", *trained]]


def filled(rows: Iterable[list[str]]) -> list[list[str]]:
    """Those that say something of any arm."""
    return [row for row in rows if any(cell != NONE for cell in row[1:])]


def _lengths(found: Mapping[str, Any], field: str) -> list[str]:
    return sorted({length for entry in found.values() for length in dig(entry, field, default={})}, key=int)


def beside(shown: str, against: Any) -> str:
    """A figure and, in brackets, its ratio to the teacher's."""
    return shown if against is None or shown == NONE else f"{shown} ({ratio(against)})"


def _quality(arms: Sequence[str], found: Mapping[str, Any]) -> Iterator[list[str]]:
    for length in _lengths(found, "quality"):
        cells = [dig(found[arm], "quality", length, default={}) for arm in arms]
        yield [f"KL @ {tokens(length)}", *(number(cell.get("kl")) for cell in cells)]
        yield [f"cosine @ {tokens(length)}", *(number(cell.get("cosine"), 4) for cell in cells)]
        yield [f"similarities' ranks @ {tokens(length)}", *(number(cell.get("rank"), 4) for cell in cells)]
        yield [
            f"masked tokens @ {tokens(length)}",
            *(beside(percent(cell.get("masked")), cell.get("masked_kept")) for cell in cells),
        ]
        yield [
            f"perplexity @ {tokens(length)}",
            *(beside(number(cell.get("perplexity"), 4), cell.get("perplexity_ratio")) for cell in cells),
        ]
    at = next((entry["retrieval"]["length"] for entry in found.values() if dig(entry, "retrieval", "length")), None)
    if at:
        name = "facts found" if encodes(found) else "needles"
        yield [f"{name} @ {tokens(at)}", *(percent(dig(found[arm], "retrieval", "exact")) for arm in arms)]
        yield [f"answer digits @ {tokens(at)}", *(percent(dig(found[arm], "retrieval", "digits")) for arm in arms)]


def _costs(arms: Sequence[str], found: Mapping[str, Any]) -> Iterator[list[str]]:
    for length in _lengths(found, "kv_bytes"):
        yield [
            f"KV cache @ {tokens(length)}",
            *(beside(size(dig(found[arm], "kv_bytes", length)), dig(found[arm], "kv_ratio", length)) for arm in arms),
        ]
    for length in _lengths(found, "flops_ratio"):
        yield [f"attention FLOPs @ {tokens(length)}", *(ratio(dig(found[arm], "flops_ratio", length)) for arm in arms)]


def _speed(arms: Sequence[str], speed: Mapping[str, Any]) -> Iterator[list[str]]:
    for length, entry in sorted(speed.items(), key=lambda item: int(item[0])):
        for title, field, unit, speedup in (
            ("prefill", "prefill_s", 1.0, "prefill_speedup"),
            ("decode a token", "decode_ms", 1e-3, "decode_speedup"),
        ):
            taken = [dig(entry, arm, field) for arm in arms]
            yield [f"{title} @ {tokens(length)}", *(duration(value and value * unit) for value in taken)]
            gained = ratio(entry.get(speedup))
            name = speedup.replace("_", " ")
            yield [f"{name} @ {tokens(length)}", *(gained if arm == "student" else NONE for arm in arms)]


def circumstances(evaluation: Mapping[str, Any]) -> str:
    """In one sentence: on how much of which text, with which seed, on which machine."""
    data, machine = dig(evaluation, "data", default={}), dig(evaluation, "machine", default={})
    lengths = " and ".join(tokens(length) for length in data.get("lengths", []))
    first, last = (_shortened(dig(data, "text", end, default="")) for end in ("first", "last"))
    count = dig(data, "text", "documents", default=0)
    which = f"{count} documents ({first} to {last})" if count != 1 else f"one document ({first})"
    needles = dig(evaluation, "arms", "teacher", "retrieval", "cases")
    parts = [
        f"{data.get('sequences')} held-out sequences of {lengths} tokens each",
        f"from {which}",
        f"{needles} needle cases (template {dig(data, 'needles', 'template')})",
        f"seed {data.get('seed')}",
        ", ".join([str(machine.get("cpu")), f"{machine.get('cores')} cores", *machine.get("gpu", [])]),
    ]
    return "; ".join(parts)


# --- sections ---------------------------------------------------------------------------------------------------------


PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModel": "feature-extraction",
}


def front_matter(recipe: AnyRecipe, library: str, task: str, evaluation: Mapping[str, Any] | None) -> str:
    """What the hub reads."""
    operators = {name.partition("-")[0] for name in dig(evaluation, "arms", "student", "operators", default={})}
    words = {
        "window": "sliding-window",
        "linear": "linear-attention",
        "hybrid": "hybrid-attention",
        "sparse": "sparse-attention",
        "sla": "sparse-linear-attention",
    }
    head: dict[str, Any] = {"base_model": recipe.model.hub} if recipe.model.hub else {}
    head |= {
        "library_name": library,
        **({"pipeline_tag": task} if task else {}),
        "tags": ["attnconvert", *(words.get(name, name) for name in sorted(operators - {"full"}))],
    }
    if results := _results(recipe, task, evaluation):
        head["model-index"] = [{"name": recipe.name, "results": results}]
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n"


def _results(recipe: AnyRecipe, task: str, evaluation: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """What was measured of the student, as the hub's model-index has it: one entry, a metric per figure."""
    student = dig(evaluation, "arms", "student", default={})
    metrics = []
    for length, cell in dig(student, "quality", default={}).items():
        if isinstance(cell, int | float):  # of an image or video model
            metrics.append({"type": length, "name": length.replace("_", " "), "value": cell})
            continue
        metrics += [
            {"type": key, "name": f"{key} @ {length}", "value": cell[key]}
            for key in ("kl", "perplexity", "cosine")
            if dig(cell, key) is not None
        ]
    if dig(student, "retrieval", "exact") is not None:
        found = {"type": "accuracy", "name": f"retrieval @ {dig(student, 'retrieval', 'length')}"}
        metrics.append({**found, "value": student["retrieval"]["exact"]})
    if not metrics:
        return []
    data = {"type": "attnconvert", "name": f"held-out samples of the recipe {recipe.name}"}
    return [{"task": {"type": task or "other"}, "dataset": data, "metrics": metrics}]


def what(recipe: AnyRecipe, manifest: Mapping[str, Any], base: str, evaluation: Mapping[str, Any] | None) -> str:
    """The title, and which operators the model has."""
    group = "head" if recipe.kind == "images" else "KV group"
    model = dig(manifest, "model", "name", default="the model")
    origin = f"[{model}](https://huggingface.co/{model})" if recipe.model.hub else model
    version = dig(manifest, "versions", "attnconvert", default="")
    description = f"{recipe.description.rstrip('.')}.\n\n" if recipe.description else ""
    text = f"# {recipe.name}\n\n{description}{origin} (`{base}`), its attention converted by attnconvert {version}"
    operators = dig(evaluation, "arms", "student", "operators", default={})
    if not operators:
        return text + f". The block `attnconvert` of `config.json` says which {group} has which operator.\n"
    groups = sum(operators.values())
    share = percent(dig(evaluation, "arms", "student", "converted"), 0)
    specs = {label(spec): spec for spec in _specs(recipe)}
    lines = [
        f"{text}: {share} of its {groups} {group}s have a cheaper operator in the place of full attention.\n",
        f"| operator | {group}s | what it does |",
        "|---|---:|---|",
    ]
    lines += [f"| `{name}` | {count} | {_explained(name, specs.get(name))} |" for name, count in operators.items()]
    return "\n".join(lines) + f"\n\nThe block `attnconvert` of `config.json` says which {group} has which.\n"


def _specs(recipe: AnyRecipe) -> Iterator[Spec]:
    yield from recipe.profile.candidates
    for select in (recipe.select, *(arm.select for arm in recipe.compare)):
        yield from (select.explicit or {}).values()


def _explained(name: str, spec: Spec | None) -> str:
    """The operator's own words and, where the recipe has it, its settings."""
    known = OPERATORS.get(name.partition("-")[0])
    words = " ".join((known.__doc__ or "").partition("\n\n")[0].split()) if known else ""
    given = {key: value for key, value in spec_to_dict(spec).items() if key != "operator"} if spec else {}
    settings = ", ".join(f"`{key}` {value}" for key, value in given.items())
    return f"{words} Here {settings}." if settings else words


def _measured(evaluation: Mapping[str, Any] | None) -> str:
    if evaluation is None:
        return ""
    arms, rows = figures(evaluation)
    lines = ["## Measured", "", f"| | {' | '.join(arms)} |", f"|---|{'---:|' * len(arms)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    others = [arm for arm in arms if arm not in ("teacher", "student")]
    told = f"; {', '.join(others)}: other plans of the recipe, for comparison" if others else ""
    lines += [
        "",
        f"teacher: the original model; student: this checkpoint{told}. `@` is the context length in tokens. KL is from "
        "the teacher, in nats per token; needles are facts hidden in text and asked for at its end, counted if exact "
        "(of an encoder: facts whose passage a search puts first); KV cache and FLOPs are by the cost model, times are "
        "medians of interleaved repeats.",
        "",
        f"Measured on {circumstances(evaluation)}.",
        "",
    ]
    return "\n".join(lines)


def gates(evaluation: Mapping[str, Any] | None) -> str:
    """The bounds of the recipe, and what was reached."""
    found = dig(evaluation, "gates", default=[])
    if not found:
        return ""
    lines = ["## Gates", "", "| gate | bound of the recipe | reached | |", "|---|---:|---:|---|"]
    for gate in found:
        verdict = "passed" if gate["passed"] else "**missed**"
        lines.append(f"| {gate['name']} | {gate['limit']:g} | {number(gate['value'])} | {verdict} |")
    return "\n".join(lines) + "\n"


def made(recipe: AnyRecipe, manifest: Mapping[str, Any]) -> str:
    """The recipe, the weights that it began with, and the versions."""
    versions = ", ".join(f"{name} {value}" for name, value in dig(manifest, "versions", default={}).items() if value)
    hashes = dig(manifest, "model", "sha256", default={})
    lines = ["## How it was made", "", "`attnconvert run recipe.yaml`, with every default filled in:", "", "```yaml"]
    lines += [dump_recipe(without_paths(recipe)).rstrip(), "```", ""]
    lines += [f"- weights `{name}`: sha256 `{value}`" for name, value in hashes.items()]
    if dig(manifest, "model", "revision"):
        lines.append(f"- revision `{manifest['model']['revision']}`")
    return "\n".join([*lines, f"- versions: {versions}", ""])


def without_paths(recipe: AnyRecipe) -> AnyRecipe:
    """Local paths cut to their last part: a published card tells nobody how a home directory is laid out."""
    model, operators = recipe.model, tuple(Path(path.name) for path in recipe.operators)
    cut = {name: Path(path.name) for name in ("folder", "gguf") if (path := getattr(model, name)) is not None}
    if recipe.kind == "images":
        given = {name: getattr(recipe.images, name) for name in ("conditions", "prompts", "classifier")}
        named = {name: Path(path.name) for name, path in given.items() if path is not None}
        images = recipe.images.model_copy(update=named)
        changed = {"model": model.model_copy(update=cut), "operators": operators, "images": images}
        return recipe.model_copy(update=changed)
    text = recipe.text
    sides = {
        name: side.model_copy(update={"files": tuple(_shortened(file) for file in side.files)})
        for name in ("calibration", "heldout")
        if (side := getattr(text, name)).files
    }
    changed = {"model": model.model_copy(update=cut), "operators": operators, "text": text.model_copy(update=sides)}
    return recipe.model_copy(update=changed)


def attachments(recipe: AnyRecipe, manifest: Mapping[str, Any], plan: Path) -> dict[str, str]:
    """recipe.yaml, manifest.json and plan.yaml of a checkpoint: how it was made, without the paths of this machine.

    `attnconvert reproduce` reads them.
    """
    told = {**manifest}
    words = shlex.split(str(told.get("command", "")))
    cut = ("=".join(map(_shortened, word.split("="))) for word in words)
    told["command"] = shlex.join(PATHS.sub(lambda found: Path(found[0]).name, word) for word in cut)
    found = {"recipe.yaml": dump_recipe(without_paths(recipe)), "manifest.json": json.dumps(told, indent=1) + "\n"}
    return found | ({"plan.yaml": plan.read_text(encoding="utf-8")} if plan.is_file() else {})


def _shortened(name: str) -> str:
    return Path(name).name if Path(name).is_absolute() else name
