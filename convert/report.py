"""The report of a run: one HTML file that needs nothing else, and its plots as files."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import report_images
from .artefacts import Artefacts, dig, read_artefacts
from .files import write_bytes, write_text
from .headmaps import standalone
from .keys import STAGES
from .report_comparison import arms_table, conclusions, converted_tile, loss_points, speed_series
from .report_html import duration, facts, figure, number, page, percent, ratio, section, size, table, tile, tokens
from .report_maps import choice_section, profile_section
from .report_selection import front_section

if TYPE_CHECKING:
    from .plots import Plot

REPORT = "report.html"
OBJECTIVES = ("velocity", "diffusion", "feature", "distribution")  # as the training of denoisers logs them


def write_report(run_folder: Path) -> Path:
    """Writes `report.html` and the plots in `report/` from whatever the run has by now; returns the page's path.

    Raises:
        UsageError: `run_folder` is no run directory.
        PreflightError: nothing can be written there.
    """
    run = read_artefacts(run_folder)
    pictures: dict[str, str | bytes] = {}
    parts = [
        _header(run),
        _summary(run),
        choice_section(run, pictures),
        front_section(run, pictures),
        *_results(run, pictures),
        profile_section(run, pictures),
        _training(run, pictures),
        _making(run),
        section("Recipe", f"<pre>{escape(run.recipe_text)}</pre>", note="With every default filled in."),
    ]
    for name, content in pictures.items():
        path = run_folder / "report" / name
        if isinstance(content, bytes):
            write_bytes(path, content)
        else:
            write_text(path, standalone(content) if "var(--" in content else content)
    title = f"attnconvert: {run.recipe.get('name', run_folder.name)}"
    write_text(run_folder / REPORT, page(title, "\n".join(part for part in parts if part)))
    return run_folder / REPORT


def _results(run: Artefacts, pictures: dict[str, str | bytes]) -> list[str]:
    if run.images:
        return [report_images.comparison_section(run, pictures), report_images.speed_section(run, pictures)]
    return [_comparison(run, pictures)]


# --- top of the page --------------------------------------------------------------------------------------------------


def _header(run: Artefacts) -> str:
    model = dig(run.manifest, "model", "name") or dig(run.plan, "model", default="")
    created = str(run.manifest.get("created", ""))[:10]
    version = dig(run.manifest, "versions", "attnconvert")
    eyebrow = " · ".join(escape(part) for part in (f"attnconvert {version or ''}".strip(), model, created) if part)
    description = run.recipe.get("description", "")
    lead = f'<p class="lead">{escape(description)}</p>' if description else ""
    name = escape(str(run.recipe.get("name", "run")))
    return f'<header><p class="eyebrow">{eyebrow}</p><h1>{name}</h1>{lead}</header>'


def _summary(run: Artefacts) -> str:
    """What was gained and lost, and whether that is within the bounds; as far as the run has come."""
    stages = _stages(run)
    student = dig(run.evaluation, "arms", "student")
    if not student:
        return stages + _verdict("", "Not evaluated yet.", "What was gained and lost is known after evaluate.")
    gates = dig(run.evaluation, "gates", default=[])
    missed = [gate for gate in gates if not gate.get("passed")]
    if not gates:
        verdict = _verdict("", "No gates are set.", "The figures below are not held against any bound.")
    elif missed:
        told = "; ".join(
            f"{_gate_name(gate['name'], run.images)} is {_gate_value(gate)}, {_gate_bound(gate)}" for gate in missed
        )
        verdict = _verdict("bad", f"✗ {len(missed)} of {len(gates)} gates missed:", f"{told}.")
    else:
        count = "The gate is" if len(gates) == 1 else f"All {len(gates)} gates are"
        verdict = _verdict("good", f"✓ {count} passed.", "The result is within every bound of the recipe.")
    gains, losses = (report_images.gains, report_images.losses) if run.images else (_gains, _losses)
    gained, paid = "".join(gains(run.evaluation, student)), "".join(losses(run.evaluation, student))
    slower = report_images.warning(run.evaluation) if run.images else ""
    balance = (
        f'<div class="balance"><div><h3>Gained</h3><div class="tiles">{gained}</div></div>'
        f'<div><h3>Paid</h3><div class="tiles">{paid}</div></div></div>'
    )
    return stages + verdict + slower + balance + _gates(gates, run.images)


def _verdict(kind: str, head: str, text: str) -> str:
    return f'<p class="verdict {kind}"><span><b>{escape(head)}</b> {escape(text)}</span></p>'


def _stages(run: Artefacts) -> str:
    """Where the run stands; said only while it is not finished."""
    if all(run.status[stage] == "done" for stage in STAGES):
        return ""
    words = {"old": "out of date", "begun": "begun", "absent": "not yet"}
    items = []
    for stage in STAGES:
        status = run.status[stage]
        seconds = dig(run.manifest, "stages", stage, "seconds")
        told = duration(seconds) if status == "done" else words[status]
        items.append(f'<li class="{status}">{stage}<span>{told}</span></li>')
    old = [stage for stage in STAGES if run.status[stage] == "old"]
    note = ""
    if old:
        names = ", ".join(old)
        told = f"{names} ran with other settings than the recipe has now; the figures stay until it runs again."
        note = _verdict("bad", "Out of date:", told)
    return f'<ol class="stages">{"".join(items)}</ol>{note}'


def _gains(evaluation: Mapping[str, Any], student: Mapping[str, Any]) -> list[str]:
    tiles = []
    for length, value in _longest(student.get("kv_ratio")):
        before, after = (dig(evaluation, "arms", arm, "kv_bytes", length) for arm in ("teacher", "student"))
        change = f"{size(before)} → {size(after)}" if before and after else ""
        tiles.append(tile("KV cache", ratio(value), change, f"at {tokens(length)} tokens", bad=value > 1))
    for length, entry in _longest(evaluation.get("speed")):
        for kind, unit, label in (("prefill", "prefill_s", "Prefill speed"), ("decode", "decode_ms", "Decoding speed")):
            value = entry.get(f"{kind}_speedup")
            if value is None:
                continue
            times = [dig(entry, arm, unit) for arm in ("teacher", "student")]
            scale = 1.0 if unit == "prefill_s" else 1e-3
            change = " → ".join(duration(t * scale) for t in times) if all(times) else ""
            where = f"{'per token ' if unit == 'decode_ms' else ''}at {tokens(length)} tokens"
            tiles.append(tile(label, ratio(value), change, where, bad=value < 0.995))
    for length, value in _longest(student.get("flops_ratio")):
        tiles.append(
            tile("Attention FLOPs", ratio(value), f"at {tokens(length)} tokens", "by the cost model", bad=value > 1)
        )
    return [*tiles, *converted_tile(student, "KV groups")]


def _losses(evaluation: Mapping[str, Any], student: Mapping[str, Any]) -> list[str]:
    tiles = []
    for length, found in _longest(student.get("quality")):
        teacher = found.get("teacher_perplexity") or dig(evaluation, "arms", "teacher", "quality", length, "perplexity")
        change = f"{number(teacher, 4)} → {number(found.get('perplexity'), 4)}" if teacher else ""
        where = f"at {tokens(length)} tokens"
        if "cosine" in found:
            least = f"the lowest {number(found.get('cosine_least'))}"
            tiles.append(tile("Cosine to the teacher", number(found["cosine"], 4), least, where))
        if "masked" in found:
            change = f"{percent(found.get('teacher_masked'))} → {percent(found['masked'])}"
            tiles.append(tile("Masked tokens", ratio(found.get("masked_kept")), change, where))
        if "kl" in found:
            tiles.append(tile("KL to the teacher", number(found["kl"]), "nats per token", where))
        if "perplexity_ratio" in found:
            tiles.append(tile("Perplexity", ratio(found["perplexity_ratio"]), change, where))
    exact = dig(student, "retrieval", "exact")
    if exact is not None:
        before = dig(evaluation, "arms", "teacher", "retrieval", "exact")
        cases, length = (dig(student, "retrieval", field) for field in ("cases", "length"))
        change = f"{percent(before)} before" if before is not None else ""
        tiles.append(
            tile("Retrieval", percent(exact), change, f"{number(cases)} cases of {tokens(length or 0)} tokens")
        )
    return tiles


def _longest(by_length: Any) -> list[tuple[str, Any]]:
    """The entry of the greatest length, as a list of none or one."""
    if not isinstance(by_length, dict) or not by_length:
        return []
    length = max(by_length, key=int)
    return [(length, by_length[length])]


def _gates(gates: list[Mapping[str, Any]], images: bool) -> str:
    rows = []
    for gate in gates:
        mark = '<b class="good">✓ passed</b>' if gate.get("passed") else '<b class="bad">✗ missed</b>'
        rows.append([escape(_gate_name(gate["name"], images)), _gate_bound(gate), _gate_value(gate), mark])
    return table(["Gate", "Bound", "Measured", "Result"], rows, text=(0, 3)) if rows else ""


def _gate_bound(gate: Mapping[str, Any]) -> str:
    what = gate["name"].partition("@")[0]
    least = what in report_images.BOUNDS or any(word in what for word in ("speedup", "cosine", "masked"))
    return f"{'at least' if least else 'at most'} {gate['limit']:g}"


def _gate_value(gate: Mapping[str, Any]) -> str:
    value = gate.get("value")
    return number(value, 4 if isinstance(value, int | float) and value >= 1 else 3)


def _gate_name(name: str, images: bool = False) -> str:
    """kl@1024 → KL at 1,024 tokens"""
    if images:
        return report_images.gate_name(name)
    what, _, length = name.partition("@")
    words = {
        "kl": "KL to the teacher",
        "perplexity_ratio": "perplexity over the teacher's",
        "cosine": "cosine similarity to the teacher's embeddings",
        "masked_kept": "masked tokens filled in, over the teacher's",
        "retrieval_drop": "drop of exact retrieval",
        "kv_ratio": "KV cache over the teacher's",
        "prefill_speedup": "prefill speed-up",
        "converted": "share of KV groups converted",
    }
    text = words.get(what, what.replace("_", " "))
    return f"{text} at {tokens(length)} tokens" if length.isdecimal() else text


# --- below ------------------------------------------------------------------------------------------------------------


def _comparison(run: Artefacts, pictures: dict[str, str | bytes]) -> str:
    evaluation = run.evaluation
    if not dig(evaluation, "arms"):
        return ""
    from .plots import times, tradeoff

    points, x_label, y_label = loss_points(evaluation)
    drawn = []
    for name, plot, caption in (
        (
            "tradeoff",
            tradeoff(points, x_label, y_label),
            "Down and left is better. The teacher costs 1 and loses nothing.",
        ),
        ("prefill", times(speed_series(evaluation), "prefill, seconds"), "Time of a prefill, batch 1."),
    ):
        if plot:
            pictures |= {f"{name}.svg": plot.svg, f"{name}.png": plot.png}
            drawn.append(f"<div>{figure(plot.inline, caption)}</div>")
    plots = f'<div class="maps">{"".join(drawn)}</div>' if drawn else ""
    note = (
        f"All arms measured on the same held-out text{_data(evaluation)} and the same needle cases; times taken side "
        "by side, in turns, on the machine below."
    )
    return section("Before and after", conclusions(evaluation), arms_table(evaluation, run.select), plots, note=note)


def _data(evaluation: Mapping[str, Any]) -> str:
    """What was measured on, as far as it is told: how many sequences of which documents."""
    told = []
    if dig(evaluation, "data", "sequences"):
        told.append(f"{number(dig(evaluation, 'data', 'sequences'))} sequences per length")
    documents = dig(evaluation, "data", "text", "documents")
    if documents:
        names = [str(dig(evaluation, "data", "text", end, default="")).rpartition("/")[2] for end in ("first", "last")]
        which = " … ".join(dict.fromkeys(name for name in names if name))
        told.append(f"{number(documents)} document{'s' if documents != 1 else ''}: {which}")
    return f" ({escape('; '.join(told))})" if told else ""


def _training(run: Artefacts, pictures: dict[str, str | bytes]) -> str:
    logs = {arm: lines for arm, lines in run.logs.items() if lines}
    if not logs:
        return ""
    from .plots import loss_curves

    plot = loss_curves(logs)
    rows = []
    for arm, lines in logs.items():
        for phase in dict.fromkeys(str(line.get("phase", "")) for line in lines):
            steps = [line for line in lines if str(line.get("phase", "")) == phase]
            tenth = max(1, len(steps) // 10)
            ends = [_mean(steps[:tenth]), _mean(steps[-tenth:])]
            cells = [escape(arm), escape(phase), number(len(steps)), *(number(end) for end in ends)]
            rate = max((line.get("lr") or 0.0 for line in steps), default=0.0)
            rows.append([*cells, f"{rate:g}", duration(sum(line.get("seconds") or 0.0 for line in steps))])
    parts = [
        table(["Arm", "Phase", "Steps", "Loss, first tenth", "last tenth", "Highest rate", "Time"], rows, text=(0, 1))
    ]
    if plot:
        pictures |= {"loss.svg": plot.svg, "loss.png": plot.png}
        caption = "The loss of each step, pale, and its running mean; short phases step by step."
        parts.insert(0, figure(plot.inline, caption))
    plot = _objectives(run)
    if plot:
        pictures |= {"objectives.svg": plot.svg, "objectives.png": plot.png}
        parts.append(figure(plot.inline, "The objectives that the student's loss is the weighted sum of."))
    return section("Training", *parts)


def _objectives(run: Artefacts) -> Plot | None:
    """The parts of the student's loss, where there are several."""
    from .plots_images import objectives

    lines = [line for line in run.logs.get("student", ()) if line.get("phase") == "training"]
    terms: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name in OBJECTIVES:
            if isinstance(line.get(name), int | float):
                terms.setdefault(name, []).append((line["step"], float(line[name])))
    return objectives(terms)


def _mean(lines: list[Mapping[str, Any]]) -> float | None:
    values = [line["loss"] for line in lines if isinstance(line.get("loss"), int | float)]
    return sum(values) / len(values) if values else None


def _making(run: Artefacts) -> str:
    """Everything that one needs to make the same again."""
    manifest = run.manifest
    if not manifest:
        return ""
    stages = []
    for stage in STAGES:
        found = dig(manifest, "stages", stage)
        if found:
            memory = size(found.get("peak_memory_bytes"))
            gpu = [size(found["peak_gpu_bytes"])] if "peak_gpu_bytes" in found else [""]
            finished = str(found.get("finished", ""))[:16].replace("T", " ")
            stages.append([stage, duration(found.get("seconds")), memory, *gpu, finished])
    head = ["Stage", "Time", "Peak memory", "Peak on GPU", "Finished (UTC)"]
    if not any(row[3] for row in stages):
        head.pop(3)
        for row in stages:
            row.pop(3)
    versions = [(name, escape(str(value))) for name, value in dig(manifest, "versions", default={}).items() if value]
    seeds = [(name, str(value)) for name, value in dig(manifest, "seeds", default={}).items()]
    hardware = dig(manifest, "hardware", default={})
    machine = [
        ("processor", f"{escape(str(hardware.get('cpu', '')))}, {hardware.get('cores')} cores"),
        ("memory", size(hardware.get("memory_bytes"))),
        ("GPU", escape(", ".join(hardware.get("gpu") or [])) or "none used"),
        ("system", escape(str(hardware.get("system", "")))),
    ]
    model = [
        (name, f"<code>{escape(str(value))}</code>")
        for name, value in dig(manifest, "model", "sha256", default={}).items()
    ]
    revision = dig(manifest, "model", "revision")
    origin = [("command", f"<code>{escape(str(manifest.get('command', '')))}</code>")]
    origin += [("recipe", f"<code>{escape(str(dig(manifest, 'recipe', 'sha256', default='')))}</code>")]
    origin += [("model revision", escape(str(revision)))] if revision else []
    return section(
        "How it was made",
        table(head, stages, text=(0,)) if stages else "",
        "<h3>Machine</h3>" + facts(machine) if hardware else "",
        "<h3>Versions</h3>" + facts(versions) if versions else "",
        "<h3>Seeds</h3>" + facts(seeds) if seeds else "",
        "<h3>Inputs</h3>" + facts(origin + model).replace('class="facts"', 'class="facts wide"'),
    )
