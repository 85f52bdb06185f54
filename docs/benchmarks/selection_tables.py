"""The tables of docs/selection.md, from selection.json and lengths.json."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "selection.md"
MARKS = "<!-- {}: made by make {} -->", "<!-- end -->"


def write(models: Mapping[str, Mapping[str, Any]], page: Path = PAGE) -> None:
    """Puts the tables of every model between their marks; the text around them is written by people."""
    for model, document in models.items():
        fill(page, f"setting of {model}", setting(document))
        fill(page, f"statistics of {model}", correlations(document))
        fill(page, f"selectors of {model}", selectors(document))


def write_lengths(document: Mapping[str, Any], page: Path = PAGE) -> None:
    """The table of lengths.json."""
    fill(page, "lengths", lengths(document))


def fill(page: Path, name: str, lines: list[str], target: str = "study") -> None:
    """Puts lines between the marks of a page that name them and the make target that made them."""
    text = page.read_text(encoding="utf-8")
    begin, end = MARKS[0].format(name, target), MARKS[1]
    before, found, rest = text.partition(begin)
    if not found:
        raise SystemExit(f"{page} has no mark {begin!r}")
    _, _, after = rest.partition(end)
    page.write_text(before + begin + "\n" + "\n".join(lines) + "\n" + end + after, encoding="utf-8")


def machine_of(document: Mapping[str, Any]) -> str:
    machine = document["machine"]
    return f"{document['date'][:10]}, {machine['cpu']}, {machine['cores']} core{'s' * (machine['cores'] > 1)}"


def setting(document: Mapping[str, Any]) -> list[str]:
    data = document["data"]
    cases, seeds = data["cases"] * data["seeds"], data["seeds"]
    return [
        f"{machine_of(document)}; {seeds} seed{'s' * (seeds > 1)}; {cases} needle cases of {data['length']} tokens per "
        f"domain, templates {', '.join(data['templates'])}."
    ]


def lengths(document: Mapping[str, Any]) -> list[str]:
    """KL of one plan with each operator, by length, with what it keeps."""
    rows, kept = document["rows"], document["costs"]
    texts = {int(n): count for n, count in document["data"]["texts"].items()}
    told = ", ".join(f"{count} of {n:,}" for n, count in texts.items())
    lines = [
        f"{machine_of(document)}; texts: {told} tokens, seed {document['data']['seed']}.",
        "",
        f"| operator | {' | '.join(f'KL at {n:,}' for n in texts)} | {' | '.join(f'cache at {n:,}' for n in texts)} |",
        "|---|" + "---:|" * (2 * len(texts)),
    ]
    for name in dict.fromkeys(row["operator"] for row in rows):
        some = {n: [row["kl"] for row in rows if row["operator"] == name and row["length"] == n] for n in texts}
        shares = [f"{kept[name][str(n)]['kv_bytes']:.3f}×" for n in texts]
        losses = [f"{statistics.mean(x):.4f}" for x in some.values()]
        lines.append(f"| {' | '.join([name, *losses, *shares])} |")
    return lines


def correlations(document: Mapping[str, Any]) -> list[str]:
    """Spearman of each statistic, mean over the seeds, with their range."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in document["statistics"]:
        found.setdefault((row["candidate"], row["statistic"]), []).append(row)
    lines = ["| candidate | statistic | with measured KL | with needle loss |", "|---|---|---:|---:|"]
    order = sorted(found.items(), key=lambda item: (item[0][0], -abs(average(item[1], "kl"))))
    for (candidate, statistic), rows in order:
        lines.append(f"| {candidate} | {statistic} | {spread(rows, 'kl')} | {spread(rows, 'needle')} |")
    return lines


def selectors(document: Mapping[str, Any]) -> list[str]:
    """Mean over seeds and domains for each selector and budget, best KL first."""
    every = document["selectors"]
    language = "perplexity" in every[0]
    last = ["digits", "perplexity"] if language else ["cosine similarity"]
    what = "needle" if language else "fact found"
    lines = []
    for budget in sorted({row["budget"] for row in every}):
        rows = [row for row in every if row["budget"] == budget]
        domains = list(dict.fromkeys(row["domain"] for row in rows))
        methods = {row["method"]: [r for r in rows if r["method"] == row["method"]] for row in rows}
        head = ["selector", *(f"KL, {domain}" for domain in domains), f"{what}, share of the teacher's", *last]
        lines += ["", f"{budget:.0%} of the KV groups converted:", "", f"| {' | '.join(head)} |"]
        lines.append("|---|" + "---:|" * (len(head) - 1))
        for name, some in sorted(methods.items(), key=lambda item: average(item[1], "kl")):
            kls = [spread([r for r in some if r["domain"] == domain], "kl", 3) for domain in domains]
            cells = [name, *kls, f"{share(some, 'exact'):.0%}"]
            if language:
                ratio = statistics.mean(r["perplexity"] / r["teacher_perplexity"] for r in some)
                cells += [f"{share(some, 'digits'):.0%}", f"{ratio:.3f}×"]
            else:
                cells.append(f"{average(some, 'cosine'):.3f}")
            lines.append(f"| {' | '.join(cells)} |")
    return lines[1:]


def share(rows: Iterable[Mapping[str, Any]], name: str) -> float:
    """Of what the teacher finds."""
    rows = list(rows)
    return sum(r[name] for r in rows) / max(1e-9, sum(r[f"teacher_{name}"] for r in rows))


def average(rows: Iterable[Mapping[str, Any]], name: str) -> float:
    return statistics.mean([row[name] for row in rows if row[name] is not None] or [0.0])


def spread(rows: list[Mapping[str, Any]], name: str, digits: int = 2) -> str:
    values = [row[name] for row in rows if row[name] is not None]
    if not values:
        return "–"
    form: Callable[[float], str] = lambda x: f"{x:.{digits}f}"  # noqa: E731
    low, high = form(min(values)), form(max(values))
    return form(statistics.mean(values)) + (f" ({low} … {high})" if low != high else "")


if __name__ == "__main__":
    for name, table in (("selection.json", lambda found: write(found["models"])), ("lengths.json", write_lengths)):
        if (HERE / name).exists():
            table(json.loads((HERE / name).read_text()))
