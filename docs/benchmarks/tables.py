"""From the results of the kernel benchmarks to what people read: Markdown tables, and the short one of the terminal.

Needs nothing but the JSON files, and no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shapes import GOALS, LEVELS, Goal, judge

Row = dict[str, Any]
Found = dict[str, Any]
RECIPE = "smollm2-135m-mixed"  # that `make demo` runs
PROVIDERS = {
    "cpp": "ours, C++",
    "torch": "ours, torch",
    "triton": "ours, Triton",
}


def save(found: Found, path: Path) -> None:
    """One row per line, so that a change of one case is a change of its line."""
    rows = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in found["rows"])
    head = json.dumps({k: v for k, v in found.items() if k != "rows"}, indent=1, ensure_ascii=False)
    path.write_text(f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n', encoding="utf-8")


def load(folder: Path, kind: str) -> list[Found]:
    """The results of that kind (cpu, gpu), by the names of their files."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return [one for one in found if isinstance(one, dict) and one.get("kind") == kind]


# -------------------------------------------------------------------------------------------------------------- targets


def goals(folder: Path, ahead: tuple[int, list[str], int] | None = None) -> list[str]:
    """Every target with what was measured, from all files. ahead: of the ahead-of-time gate, how many configurations
    there are and what is wrong with which.
    """
    cpu, gpu = load(folder, "cpu"), load(folder, "gpu")
    lines = ["## Targets", "", "| where | what | at least | measured | met |", "|---|---|---:|---:|---|"]
    for name, goal in GOALS.items():
        if name == "h200-window":
            lines.append(_gate(ahead))
        if name == "model":
            row = model_row(folder, cpu[0]["machine"].get("instruction_set") if cpu else None)
        elif goal.needs == "H200":
            here = [one for one in gpu if "H200" in one["machine"]["device"]]
            row = _row_of(here, name) or _without(f"not measured: no result of an H200; `make gpu` makes it ({name})")
        else:
            row = _row_of(cpu, name) or _without("not measured: cpu.json does not have it; `make bench` makes it")
        lines.append(_goal_line(goal, row))
    return [*lines, ""]


def _without(note: str) -> Row:
    return {"met": None, "note": note.partition(" (")[0]}


def _row_of(found: Iterable[Found], name: str) -> Row | None:
    """Of several rows with the same target the worst; one that was not measured is worse than any."""
    rows = [row for one in found for row in one["rows"] if row.get("goal") == name]
    field = GOALS[name].field
    missing = [row for row in rows if row.get(field) is None]
    return missing[0] if missing else min(rows, key=lambda row: row[field], default=None)


def _goal_line(goal: Goal, row: Row) -> str:
    value = row.get(goal.field)
    shown = "not measured" if value is None else goal.shown(value)
    note = row["note"].removeprefix("not measured: ") if value is None else row["note"]
    met = {True: "yes", False: "**no**", None: "–"}[row["met"]] + (
        f" ({note})" if note and row["met"] is not True else ""
    )
    return f"| {goal.where} | {goal.what} | {goal.shown(goal.least)} | {shown} | {_cell(met)} |"


def _gate(ahead: tuple[int, list[str], int] | None) -> str:
    head = "| Triton, sm_80 / 90 / 100 / gfx942 | every shipped configuration | no spill, within shared memory |"
    if not ahead or not ahead[0]:
        return f"{head} not measured | – (aot.json is not there; `python docs/benchmarks/aot.py` makes it) |"
    count, wrong, every = ahead
    shown = f"{count - len(wrong)} of {every}"
    if wrong:
        return f"{head} {shown} | **no** ({_cell(wrong[0])}) |"
    return f"{head} {shown} | {'yes' if count == every else f'– ({every - count} not compiled yet)'} |"


def model_row(folder: Path, level: str | None) -> Row:
    """The whole model, from what the recipe's evaluation measured."""
    path = folder / f"{RECIPE}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    speed = found.get("speed", {})
    row: Row = {"ratio": None, "note": ""}
    if "8192" in speed and "backend" in found:  # without it the kernels were older than the back ends
        row |= {"ratio": speed["8192"]["prefill_speedup"]}
    else:
        row["note"] = f"not measured: {RECIPE}.json has no prefill at 8192 with these kernels"
    judge(row, "model", level)
    return row


# ------------------------------------------------------------------------------------------------------------------ CPU


def cpu(found: Found) -> list[str]:
    """Every pass and dtype as a table of cases by lengths."""
    machine = found["machine"]
    peaks = ", ".join(f"{name} {value:.0f}" for name, value in found["gemm_gflops"].items())
    model = next((r["shape"] for r in found["rows"] if "heads" in r["shape"]), {})
    lines = [
        "## Kernels on the CPU",
        "",
        f"One layer of {model.get('model')}'s shape ({model.get('heads')} query heads over {model.get('kv_heads')} KV "
        f"heads of {model.get('dim')}), batch 1, {machine['threads']} threads. {machine['cpu']}, {machine['cores']} "
        f"cores, {_level(machine)}; torch {found['versions']['torch']}; {found['date']}. Medians, all providers of a "
        "table's column in one process, taking turns. In brackets how many times faster than SDPA without a mask or, "
        "for causal cases, than causal SDPA, with KV heads repeated beforehand. Matrix products reach (GFLOP/s): "
        f"{peaks}.",
        "",
    ]
    for phase, dtype in dict.fromkeys((r["pass"], r["dtype"]) for r in found["rows"] if not _elsewhere(r)):
        rows = [r for r in found["rows"] if (r["pass"], r["dtype"]) == (phase, dtype) and not _elsewhere(r)]
        lines += [f"### {phase.capitalize()}, {dtype}", "", *_by_length(rows), ""]
    return lines


def _elsewhere(row: Row) -> bool:
    return row.get("goal") in ("peak", "model")


def _level(machine: dict[str, Any]) -> str:
    return LEVELS.get(machine["instruction_set"], machine["instruction_set"])


def _by_length(rows: list[Row]) -> list[str]:
    lengths = sorted({r["shape"]["tokens"] for r in rows})
    cells = {(r["case"], r["provider"], r["shape"]["tokens"]): r for r in rows}
    head = (
        "| case | provider | " + " | ".join(f"{n} tokens" for n in lengths) + " | share of dense × density, longest |"
    )
    lines = [head, "|---|---|" + "---:|" * (len(lengths) + 1)]
    notes: list[str] = []
    for case, provider in dict.fromkeys((r["case"], r["provider"]) for r in rows):
        some = [cells.get((case, provider, n)) for n in lengths]
        ideal = next((r["ideal"] for r in reversed(some) if r and r.get("ideal") is not None), None)
        share = "" if ideal is None else f"{ideal:.0%}"
        shown = " | ".join(_time(row, notes) for row in some)
        lines.append(f"| {case} | {PROVIDERS.get(provider, provider)} | {shown} | {share} |")
    return [*lines, *_footnotes(notes)]


def _time(row: Row | None, notes: list[str]) -> str:
    """`12.3 (4.5×)`, or `–` with the number of a note that says why."""
    if row is None:
        return ""
    if row["median_ms"] is None:
        return f"– {_mark(row['note'], notes)}"
    wrong = f" {_mark(row['note'], notes)}" if "WRONG" in row["note"] else ""
    return _ms(row["median_ms"]) + (f" ({row['ratio']:.2g}×)" if row["ratio"] is not None else "") + wrong


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _mark(note: str, notes: list[str]) -> str:
    if note not in notes:
        notes.append(note)
    return f"[{notes.index(note) + 1}]"


def _footnotes(notes: list[str]) -> list[str]:
    return ["", *(f"[{n}] {_cell(note)}  " for n, note in enumerate(notes, 1))] if notes else []


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


# ------------------------------------------------------------------------------------------------------------------ GPU


def gpu(found: Found) -> list[str]:
    """A table for each shape and pass."""
    machine, check = found["machine"], found["check"]
    failed = f", **{len(check['failed'])} failed**: {_cell(check['failed'][0])}" if check["failed"] else ", none failed"
    stopped = f" (stopped after {check['stopped_after_s']} s)" if "stopped_after_s" in check else ""
    lines = [
        f"## Kernels on {machine['device']}",
        "",
        f"One layer, batch 1, bf16. torch {found['versions']['torch']}, triton {found['versions']['triton']}, "
        f"{found['date']}. Medians, all providers of a table in one process, taking turns; forward passes as CUDA "
        f"graphs. Floors are counted from what the device reached in the same run: {machine['flops'] / 1e12:.0f} "
        f"TFLOP/s and {machine['bandwidth'] / 1e12:.2f} TB/s. Correctness first: {check['how']}, {check['passed']} "
        f"passed{failed}{stopped}.",
        "",
    ]
    for title in dict.fromkeys(_title(r) for r in found["rows"]):
        lines += [f"### {title}", "", *_by_case([r for r in found["rows"] if _title(r) == title]), ""]
    return lines


def _title(row: Row) -> str:
    shape = row["shape"]
    if "tokens" not in shape:
        return "Lost"
    heads = f"{shape['heads']}" if shape["heads"] == shape["kv_heads"] else f"{shape['heads']}/{shape['kv_heads']}"
    what = "tokens in the cache" if row["pass"] == "decode" else "tokens"
    return f"{shape['model']}, {row['pass']}: {shape['tokens']} {what}, {heads} heads × {shape['dim']}"


def _by_case(rows: list[Row]) -> list[str]:
    lines = [
        "| case | provider | ms | against | faster | of dense × density | of the floor |",
        "|---|---|---:|---|---:|---:|---:|",
    ]
    notes: list[str] = []
    for row in rows:
        provider = PROVIDERS.get(row["provider"], row["provider"])
        if row["median_ms"] is None:
            lines.append(f"| {_cell(row['case'])} | {provider} | – {_mark(row['note'], notes)} | | | | |")
            continue
        mark = f" {_mark(row['note'], notes)}" if row["note"] else ""
        ideal, floor = (f"{row[f]:.0%}" if row.get(f) is not None else "" for f in ("ideal", "roofline"))
        ratio = f"{row['ratio']:.2f}×" if row["ratio"] is not None else ""
        against = _cell(row["baseline"] or "")
        lines.append(
            f"| {row['case']} | {provider} | {_ms(row['median_ms'])}{mark} | {against} | {ratio} | {ideal} | {floor} |"
        )
    return [*lines, *_footnotes(notes)]


def no_gpu() -> list[str]:
    """What stands in the place of the GPU's tables."""
    said = "Not measured: `make gpu` on a machine with a CUDA device writes these tables' figures."
    return ["## Kernels on the GPU", "", said, ""]


# ------------------------------------------------------------------------------------------------------------- terminal


def short(found: Found) -> list[str]:
    """What ran, in few lines: of each shape our rows, the correctness and the targets, which come last."""
    lines: list[str] = []
    for title in dict.fromkeys(_title(r) for r in found["rows"]):
        rows = [r for r in found["rows"] if _title(r) == title]
        first = rows[0]
        lines.append(f"{title}; {first['provider']} {_short_time(first)}")
        for row in rows[1:]:
            if row["provider"] in PROVIDERS or (row["median_ms"] is not None and row["ratio"] is not None):
                lines.append(_short_line(row))
            elif row["median_ms"] is None and "not measured" not in row["note"]:
                lines.append(f"  {row['case'][:40]}, {row['provider']}: {row['note'][:100]}")
    check = found["check"]
    lines += ["", f"correctness: {check['how']}, {check['passed']} passed, {len(check['failed'])} failed"]
    lines += [f"  FAILED {failure[:160]}" for failure in check["failed"][:8]]
    for name, goal in GOALS.items():
        row = _row_of([found], name)
        if row is not None:
            value = row.get(goal.field)
            shown = "not measured" if value is None else goal.shown(value)
            met = {True: "met", False: "NOT met", None: "–"}[row["met"]]
            lines.append(f"  {goal.what}: {shown}, target {goal.shown(goal.least)}: {met}")
    return lines


def _short_line(row: Row) -> str:
    name = row["case"] if row["provider"] in PROVIDERS else f"{row['case']}, {row['provider']}"
    if row["median_ms"] is None:
        return f"  {name[:44]:44} – {row['note'][:70]}"
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}×"
    parts = [f"{row[f]:.0%} {name}" for f, name in (("ideal", "ideal"), ("roofline", "floor")) if row.get(f)]
    wrong = " WRONG" if "WRONG" in row["note"] else ""
    return f"  {name[:44]:44} {_short_time(row):>9} {ratio:>7} {', '.join(parts)}{wrong}"


def _short_time(row: Row) -> str:
    return "–" if row["median_ms"] is None else f"{row['median_ms']:.4g} ms"
