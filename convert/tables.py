"""What the commands show: tables that fit into 80 to 100 columns, from the documents that a run holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from .artefacts import dig
from .card import circumstances, figures
from .card_images import break_even_told, image_circumstances, image_figures, slower_told
from .evaluation_order import in_order, is_of_images, sizes_of
from .report_html import NONE, duration, number, percent, ratio, size, tokens
from .wording import IMAGES, TEXT, Wording, of_sites

COLOURS = {"window": "cyan", "linear": "yellow", "hybrid": "magenta", "disc": "cyan", "neighbourhood": "blue"}
COLOURS |= {"tiles": "green", "sparse": "green", "sla": "magenta", "agent": "yellow", "timed": "red"}
# gates that are lower bounds
AT_LEAST = ("prefill_speedup", "converted", "cosine", "masked_kept", "psnr", "ssim", "right_class", "step_speedup")
STATES = {"done": "green", "will run": "bold", "begun": "bold", "old": "yellow", "not asked for": "dim"}


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[str | Text]], *, left: int = 1) -> Table:
    """A plain table; the first `left` columns are text, the others numbers."""
    made = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(head):
        made.add_column(name, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def lines(pairs: Iterable[tuple[str, object]]) -> Text:
    """Names and values, one to a line, which no width breaks: paths and code are there to be copied."""
    pairs = list(pairs)
    width = max(len(name) for name, _ in pairs)
    made = Text("\n").join(Text.assemble((f"{name:<{width}}  ", "dim"), str(value)) for name, value in pairs)
    made.no_wrap = True
    return made


# --- stages -----------------------------------------------------------------------------------------------------------


def stages_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """`rows` are {"stage", "state", "why"}."""
    return table("Stages", ["stage", "state", "why"], [_stage_row(row) for row in rows], left=3)


def _stage_row(row: Mapping[str, Any]) -> list[str | Text]:
    return [row["stage"], Text(row["state"], style=STATES.get(row["state"], "")), Text(row["why"])]


def profile_table(profile: Mapping[str, Any]) -> Table:
    """Per layer: the strongest retrieval head (encoders have none), and what each candidate costs over its groups."""
    candidates = list(profile["candidates"])
    damaged = bool(profile["damage"])
    scores = profile["statistics"].get("retrieval")
    head = ["layer", *(["retrieval"] if scores else [])]
    words = of_sites(profile["sites"])
    measures = (("kl", 4), ("needle", 3)) if words.needles else (("kl", 4),)
    for name in candidates:
        heads = [f"{name}\n{'KL' if words.needles else 'error'}", *(["needle\nloss"] if words.needles else [])]
        head += heads if damaged else [f"{name}\nerror"]
    rows: list[list[str | Text]] = []
    for index, site in enumerate(profile["sites"]):
        row: list[str | Text] = [str(site["layer"])]
        if scores:
            best = max((score for score in scores[index] if score is not None), default=0.0)
            row.append(Text(f"{best:.2f}", style="bold" if best >= 0.1 else ""))
        for name in candidates:
            if damaged:
                measured = profile["damage"][name]
                row += [_total(measured[measure][index], places) for measure, places in measures]
            else:
                row.append(_total(profile["output_error"][name][index], 3, mean=True))
        rows.append(row)
    title = f"Damage of each candidate, summed over the {words.group}s of a layer"
    title += " (nats)" if words.needles else ": velocity error"
    return table(title if damaged else "Relative output error of each candidate, mean over heads", head, rows)


def _total(values: Sequence[float | None], places: int, *, mean: bool = False) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return NONE
    value = round(sum(known) / (len(known) if mean else 1), places) + 0.0  # no −0.000
    return f"{value:.{places}f}".replace("-", "\u2212")


def bands_table(profile: Mapping[str, Any]) -> Table:
    """Output error of each candidate in every part of the sampler's steps, of a denoiser."""
    bands = in_order(profile["bands"])
    rows = []
    for name in profile["candidates"]:
        tables = [dig(profile, "bands", band, "output_error", name, default=[]) for band in bands]
        rows.append([name, *(_total([x for row in found for x in row], 3, mean=True) for found in tables)])
    names = [f"{band}{' (noise)' if band.startswith('1 ') else ''}" for band in bands]
    return table("Relative output error by part of the sampler's steps, mean over heads", ["candidate", *names], rows)


def selection_table(select: Mapping[str, Any], words: Wording = TEXT) -> Table:
    """The arms, and what the profile predicts for them."""
    rows = []
    for name, arm in select["arms"].items():
        operators = ", ".join(f"{n} {label}" for label, n in arm.get("operators", {}).items() if label != "full")
        rows.append(
            [
                name,
                arm["method"],
                operators or "none",
                percent(arm["converted"]),
                *(number(dig(arm, "predicted", kind)) for kind in (("kl", "needle") if words.needles else ("kl",))),
            ]
        )
    predicted = [words.loss, *(["needle loss"] if words.needles else [])]
    head = ["arm", "method", f"{words.group}s", "converted", *(f"predicted\n{what}" for what in predicted)]
    return table("Chosen operators", head, rows, left=3)


def training_table(arms: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table | Text:
    """First and last loss of every phase; `arms` are the log lines of each."""
    rows = []
    for arm, log in arms.items():
        for phase in dict.fromkeys(line["phase"] for line in log):
            steps = [line for line in log if line["phase"] == phase]
            taken = sum(line.get("seconds", 0.0) for line in steps)
            ends = [number(steps[0]["loss"]), number(steps[-1]["loss"])]
            rows.append([arm, phase, str(len(steps)), *ends, duration(taken)])
    if not rows:
        return Text("Nothing to train: the recipe distils no arm.")
    return table("Training", ["arm", "phase", "steps", "first loss", "last loss", "time"], rows, left=2)


# --- results ----------------------------------------------------------------------------------------------------------


def evaluation_parts(document: Mapping[str, Any]) -> list[Any]:
    """The comparison of all arms, on what it was measured, and the gates."""
    images = is_of_images(document)
    arms, rows = image_figures(document) if images else figures(document)
    compared = table("What was gained and lost", ["", *arms], rows)
    if "student" in arms:
        compared.columns[1 + arms.index("student")].style = "bold"
    where = image_circumstances(document) if images else circumstances(document)
    shown = [compared, Text(f"Measured on {where}.", style="dim")]
    if images:
        shown += pace(document)
    return [*shown, *([gates_table(document["gates"])] if document["gates"] else [])]


def pace(document: Mapping[str, Any]) -> list[Text]:
    """From which size on a denoiser is faster than the original, and a warning where it is slower."""
    slower, told = slower_told(document), break_even_told(document)
    return [*([Text(slower, style="bold red")] if slower else []), *([Text(told)] if told else [])]


def steps_table(document: Mapping[str, Any]) -> Table:
    """A step of the sampler at every size, teacher against student."""
    rows: list[list[str | Text]] = []
    for name, entry in sizes_of(document):
        took, held = ([dig(entry, arm, key) for arm in ("teacher", "student")] for key in ("step_s", "peak_bytes"))
        faster = Text(f"{ratio(entry['speedup'])} the speed", style="bold red" if entry["speedup"] < 1 else "")
        rows.append([name, tokens(entry["tokens"]), "a step", *map(duration, took), faster])
        if all(held):
            rows.append(["", "", "peak memory", *map(size, held), f"{ratio(held[1] / held[0])} the bytes"])
    made = table("Teacher against student", ["size", "tokens", "", "teacher", "student", "ratio"], rows)
    made.columns[2].justify = "left"
    return made


def gates_table(gates: Sequence[Mapping[str, Any]]) -> Table:
    rows: list[list[str | Text]] = []
    for gate in gates:
        name, _, at = gate["name"].partition("@")
        where = tokens(at) if at.isdecimal() else at
        bound = f"{'≥' if name in AT_LEAST else '≤'} {gate['limit']:g}"
        verdict = Text("pass", style="green") if gate["passed"] else Text("MISS", style="bold red")
        rows.append([f"{name} @ {where}" if at else name, bound, number(gate["value"]), verdict])
    return table("Gates", ["gate", "bound", "reached", ""], rows)


def speed_table(speed: Mapping[str, Any]) -> Table:
    """Teacher against student at every length."""
    rows = []
    for length, entry in sorted(speed.items(), key=lambda item: int(item[0])):
        for name, field, unit, faster in (
            ("prefill", "prefill_s", 1.0, "prefill_speedup"),
            ("decode a token", "decode_ms", 1e-3, "decode_speedup"),
        ):
            if faster in entry:
                both = [duration(entry[arm][field] * unit) for arm in ("teacher", "student")]
                rows.append([tokens(length), name, *both, f"{number(entry[faster])}× as fast"])
        if "kv_ratio" in entry:
            both = [size(entry[arm]["kv_bytes"]) for arm in ("teacher", "student")]
            rows.append([tokens(length), "KV cache", *both, f"{number(entry['kv_ratio'])}× the bytes"])
    return table("Teacher against student", ["tokens", "", "teacher", "student", "ratio"], rows, left=2)


# --- models and plans -------------------------------------------------------------------------------------------------


def sites_table(sites: Sequence[Mapping[str, Any]]) -> Table:
    """The attention of a model; layers in a row that are alike share a line."""
    rows: list[list[str]] = []
    runs: list[list[Mapping[str, Any]]] = []
    grids = any(site.get("grid") for site in sites)
    keys = ("heads", "kv_heads", "head_dim", *(("grid", "down", "text", "operators") if grids else ("window",)))
    for site in sites:
        alike = runs and all(runs[-1][-1][key] == site[key] for key in keys)
        if alike:
            runs[-1].append(site)
        else:
            runs.append([site])
    for run in runs:
        first, last = run[0], run[-1]
        layers = str(first["layer"]) if len(run) == 1 else f"{first['layer']}–{last['layer']}"
        own = [f"{first['window']:,}" if first["window"] else NONE]
        if grids:
            own = [first["grid"], "full" if first["down"] == 1 else f"1/{first['down']}", first["text"] or NONE]
        counts = ("heads", "head_dim") if grids else ("heads", "kv_heads", "head_dim")
        rows.append([layers, *(str(first[key]) for key in counts), *own, ", ".join(first["operators"])])
    head = ["layers", "heads", "KV heads", "head dim", "own window", "operators that fit"]
    if grids:
        head = ["layers", "heads", "head dim", "grid", "resolution", "prompt", "operators that fit"]
    made = table("Attention", head, rows)
    made.columns[-1].justify = "left"
    return made


def plan_map(sites: Sequence[Mapping[str, Any]], width: int, words: Wording = TEXT) -> Text:
    """A letter per KV group or head: layers from left to right, groups from top to bottom; · is full attention.

    `sites` are {"layer", "groups": [labels]}; `width` is that of the terminal.
    """
    group_name = words.group.split()[-1]
    letters = _letters(label for site in sites for label in site["groups"])
    text = Text()
    per_row = max(10, (width - 12) // 10 * 10)
    for start in range(0, len(sites), per_row):
        part = sites[start : start + per_row]
        text.append(f"layer     {_ruler([int(site['layer']) for site in part])}\n", "dim")
        for group in range(max(len(site["groups"]) for site in part)):
            text.append(f"{group_name} {group}".ljust(10), "dim")
            for site in part:
                label = site["groups"][group] if group < len(site["groups"]) else ""
                text.append(letters.get(label, " "), COLOURS.get(label.partition("-")[0], "dim"))
            text.append("\n")
    for label, letter in letters.items():
        count = sum(site["groups"].count(label) for site in sites)
        text.append(f"{letter} ", COLOURS.get(label.partition("-")[0], "dim")).append(f"{label} ({count})   ")
    return text


def _ruler(layers: Sequence[int]) -> str:
    """The number of every tenth layer, standing over it."""
    marks = [" "] * (len(layers) + 4)
    for place, layer in enumerate(layers):
        if layer % 10 == 0 or place == 0:
            marks[place : place + len(str(layer))] = str(layer)
    return "".join(marks).rstrip()


def _letters(labels: Iterable[str]) -> dict[str, str]:
    """A letter for each operator, `·` for full: W for the first window, w for the next, then whatever is free."""
    chosen: dict[str, str] = {}
    for label in dict.fromkeys(labels):
        wanted = "·" if label == "full" else label[0].upper() + label[0] + "ABCDEFGHIJKMNOPQRSTUVXYZ?"
        chosen[label] = next((letter for letter in wanted if letter not in chosen.values()), "?")
    return dict(sorted(chosen.items(), key=lambda item: item[0] == "full"))


def plan_facts(described: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures of a plan: what `inspect` computed."""
    words = IMAGES if described.get("images") else TEXT
    pairs = [("converted", f"{percent(described['converted'])} of {described['groups']} {words.group}s")]
    pairs += [(f"KV cache @ {tokens(n)}", ratio(value)) for n, value in described["kv_ratio"].items()]
    if not described["kv_ratio"]:
        at = " image tokens" if described.get("images") else ""
        pairs += [(f"attention FLOPs @ {tokens(n)}{at}", ratio(x)) for n, x in described["flops_ratio"].items()]
    return pairs
