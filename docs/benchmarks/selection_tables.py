"""The tables of docs/selection.md, from selection.json."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "selection.md"
MARKS = "<!-- {}: made by make study -->", "<!-- end -->"


def write(document: Mapping[str, Any], page: Path = PAGE) -> None:
    """Puts the tables between their marks; the text around them is written by people."""
    text = page.read_text(encoding="utf-8")
    for name, lines in (
        ("setting", setting(document)),
        ("statistics", correlations(document)),
        ("selectors", selectors(document)),
    ):
        begin, end = MARKS[0].format(name), MARKS[1]
        before, found, rest = text.partition(begin)
        if not found:
            raise SystemExit(f"{page} has no mark {begin!r}")
        _, _, after = rest.partition(end)
        text = before + begin + "\n" + "\n".join(lines) + "\n" + end + after
    page.write_text(text, encoding="utf-8")


def setting(document: Mapping[str, Any]) -> list[str]:
    data, machine = document["data"], document["machine"]
    cases = data["cases"] * data["seeds"]
    plural = {name: f"{n} {name}{'s' * (n > 1)}" for name, n in (("core", machine["cores"]), ("seed", data["seeds"]))}
    return [
        f"SmolLM2-135M-Instruct, {document['date'][:10]}, {machine['cpu']}, {plural['core']}; {plural['seed']}; "
        f"{cases} needle cases of {data['length']} tokens per domain, templates {', '.join(data['templates'])}."
    ]


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
    lines = []
    for budget in sorted({row["budget"] for row in document["selectors"]}):
        rows = [row for row in document["selectors"] if row["budget"] == budget]
        domains = list(dict.fromkeys(row["domain"] for row in rows))
        methods = {row["method"]: [r for r in rows if r["method"] == row["method"]] for row in rows}
        lines += [
            "",
            f"{budget:.0%} of the KV groups converted:",
            "",
            f"| selector | {' | '.join(f'KL, {domain}' for domain in domains)} | needle, share of the teacher's "
            "| digits | perplexity |",
            "|---|" + "---:|" * (len(domains) + 3),
        ]
        for name, some in sorted(methods.items(), key=lambda item: average(item[1], "kl")):
            kls = [spread([r for r in some if r["domain"] == domain], "kl", 3) for domain in domains]
            needle = share(some, "exact")
            ratio = statistics.mean(r["perplexity"] / r["teacher_perplexity"] for r in some)
            cells = [name, *kls, f"{needle:.0%}", f"{share(some, 'digits'):.0%}", f"{ratio:.3f}×"]
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
    write(json.loads(Path(sys.argv[1] if len(sys.argv) > 1 else HERE / "selection.json").read_text()))
