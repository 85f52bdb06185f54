"""The report's comparison: all arms side by side, and in plain words which is better at equal bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .artefacts import dig
from .report_html import NONE, duration, number, percent, ratio, size, table, tile, tokens

EQUAL_BYTES = 0.03  # relative difference below which two arms count as equally large


def arms_table(evaluation: Mapping[str, Any], select: Mapping[str, Any]) -> str:
    """A column per arm, a row per figure."""
    arms = ordered(evaluation)
    found = {arm: dig(evaluation, "arms", arm, default={}) for arm in arms}
    rows: list[Sequence[str]] = []
    for title, block in (
        ("Choice", choice_rows(found, select, "KV groups")),
        ("Quality", _quality_rows(found)),
        ("Retrieval", _retrieval_rows(found)),
        ("Memory and work, by the cost model", _cost_rows(found)),
        ("Speed and cache, measured", _speed_rows(evaluation, arms)),
    ):
        filled = [row for row in block if any(cell != NONE for cell in row[1:])]
        rows += [[title], *filled] if filled else []
    head = ["", *(escape(arm) for arm in arms)]
    return table(head, rows, strong=1 + arms.index("student") if "student" in arms else None)


def ordered(evaluation: Mapping[str, Any]) -> list[str]:
    arms = list(dig(evaluation, "arms", default={}))
    return sorted(arms, key=lambda arm: ("teacher", "student").index(arm) if arm in ("teacher", "student") else 2)


def converted_tile(student: Mapping[str, Any], groups: str) -> list[str]:
    """How much of the model is converted; nothing where that is not known. `groups` are KV groups or heads."""
    if student.get("converted") is None:
        return []
    operators = dig(student, "operators", default={})
    full, every = operators.get("full", 0), sum(operators.values())
    change = f"{every - full} of {every} {groups}" if every else f"of the {groups}"
    return [tile("Converted", percent(student["converted"], 0), change)]


def choice_rows(found: Mapping[str, Any], select: Mapping[str, Any], groups: str) -> list[list[str]]:
    """How each arm was chosen and what it has; `groups` are KV groups or heads."""

    def operators(arm: str) -> str:
        counts = {name: n for name, n in dig(found[arm], "operators", default={}).items() if name != "full"}
        shown = "<br>".join(f"{n} {escape(name)}" for name, n in counts.items())
        return "full" if arm == "teacher" else shown or NONE

    def trained(arm: str) -> str:
        return {True: "yes", False: "no"}.get(dig(found[arm], "trained"), NONE) if arm != "teacher" else NONE

    return [
        ["method", *(escape(str(dig(select, "arms", arm, "method", default=NONE))) for arm in found)],
        [f"{groups} converted", *(percent(dig(found[arm], "converted"), 0) for arm in found)],
        ["operators", *(operators(arm) for arm in found)],
        ["trained", *(trained(arm) for arm in found)],
    ]


def _quality_rows(found: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    lengths = sorted({length for entry in found.values() for length in dig(entry, "quality", default={})}, key=int)
    for length in lengths:
        cells = {arm: dig(entry, "quality", length, default={}) for arm, entry in found.items()}
        rows.append([f"KL to the teacher, {tokens(length)} tokens", *(number(cells[arm].get("kl")) for arm in found)])
        for field, words in (
            ("cosine", "cosine to the teacher's"),
            ("cosine_least", "the lowest of them"),
            ("rank", "rank correlation of similarities"),
        ):
            rows.append([f"{words}, {tokens(length)} tokens", *(number(cells[arm].get(field), 4) for arm in found)])
        row = [f"masked tokens filled in, {tokens(length)} tokens"]
        for arm in found:
            shown = percent(cells[arm].get("masked"))
            if cells[arm].get("masked_kept") is not None:
                shown += f"<small>{ratio(cells[arm]['masked_kept'])}</small>"
            row.append(shown)
        rows.append(row)
        row = [f"perplexity, {tokens(length)} tokens"]
        for arm in found:
            shown = number(cells[arm].get("perplexity"), 4)
            if cells[arm].get("perplexity_ratio") is not None and arm != "teacher":
                shown += f"<small>{ratio(cells[arm]['perplexity_ratio'])}</small>"
            row.append(shown)
        rows.append(row)
    return rows


def _retrieval_rows(found: Mapping[str, Any]) -> list[list[str]]:
    length = next((dig(entry, "retrieval", "length") for entry in found.values() if "retrieval" in entry), None)
    cases = next((dig(entry, "retrieval", "cases") for entry in found.values() if "retrieval" in entry), None)
    where = f", {tokens(length)} tokens, {number(cases)} cases" if length else ""
    drops = [dig(found[arm], "retrieval_drop") for arm in found]
    name = "facts found first" if encodes(found) else "exact answers"
    return [
        [f"{name}{where}", *(percent(dig(found[arm], "retrieval", "exact")) for arm in found)],
        ["single answer tokens", *(percent(dig(found[arm], "retrieval", "digits")) for arm in found)],
        [
            "lost against the teacher",
            *(NONE if d is None else f"{100 * d:.1f} points".replace("-", "\u2212") for d in drops),
        ],
    ]


def encodes(arms: Mapping[str, Any]) -> bool:
    """Whether the arms are of an encoder."""
    return any("cosine" in found for entry in arms.values() for found in dig(entry, "quality", default={}).values())


def _cost_rows(found: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for field, name in (("kv_bytes", "KV cache and states"), ("flops_ratio", "attention FLOPs of a prefill")):
        lengths = sorted({length for entry in found.values() for length in dig(entry, field, default={})}, key=int)
        for length in lengths:
            row = [f"{name}, {tokens(length)} tokens"]
            for arm, entry in found.items():
                if field == "kv_bytes":
                    shown, share = size(dig(entry, field, length)), dig(entry, "kv_ratio", length)
                    row.append(
                        shown + (f"<small>{ratio(share)}</small>" if share is not None and arm != "teacher" else "")
                    )
                else:
                    row.append(ratio(dig(entry, field, length)))
            rows.append(row)
    return rows


def _speed_rows(evaluation: Mapping[str, Any], arms: Sequence[str]) -> list[list[str]]:
    rows = []
    for length, entry in sorted(dig(evaluation, "speed", default={}).items(), key=lambda item: int(item[0])):
        for name, field, scale in (("prefill", "prefill_s", 1.0), ("decoding, per token", "decode_ms", 1e-3)):
            row = [f"{name}, {tokens(length)} tokens"]
            before = dig(entry, "teacher", field)
            for arm in arms:
                value = dig(entry, arm, field)
                shown = duration(value * scale) if value is not None else NONE
                if value and before and arm != "teacher":
                    shown += f"<small>{ratio(before / value)} the speed</small>"
                row.append(shown)
            rows.append(row)
        held = [dig(entry, arm, "kv_bytes") for arm in arms]
        rows.append([f"cache measured, {tokens(length)} tokens", *(size(value) for value in held)])
    return rows


# --- in words ---------------------------------------------------------------------------------------------------------


def conclusions(evaluation: Mapping[str, Any]) -> str:
    """A plain sentence for every arm that stands beside the student."""
    arms = dig(evaluation, "arms", default={})
    if "student" not in arms:
        return ""
    told = [_conclusion(name, arms) for name in arms if name not in ("teacher", "student")]
    return f'<ul class="conclusions">{"".join(f"<li>{text}</li>" for text in told if text)}</ul>' if any(told) else ""


def _conclusion(name: str, arms: Mapping[str, Any]) -> str:
    student, other = arms["student"], arms[name]
    compared = _compare(student, other)
    return judged(name, student, other, compared, _bytes(escape(name), student, other)) if compared else ""


def judged(
    name: str,
    student: Mapping[str, Any],
    other: Mapping[str, Any],
    compared: Sequence[tuple[str, int, str]],
    head: str,
) -> str:
    """The sentence about an arm: its beginning, `head`, which of the two is better, and the figures that say so.

    Args:
        compared: what was compared, 1 where the student is clearly better and -1 where the other is, and the figures.
    """
    ahead = [what for what, order, _ in compared if order > 0]
    behind = [what for what, order, _ in compared if order < 0]
    shown = escape(name)
    if ahead and not behind:
        verdict = f"the student is better than <code>{shown}</code>"
    elif behind and not ahead:
        verdict = f"<code>{shown}</code> is better than the student"
    elif ahead:
        parts = and_list(ahead), and_list(behind)
        verdict = f"neither is better in everything: the student in {parts[0]}, <code>{shown}</code> in {parts[1]}"
    else:
        verdict = f"there is no clear difference between the student and <code>{shown}</code>"
    figures = "; ".join(figures for _, _, figures in compared)
    trained = (student.get("trained"), other.get("trained"))
    words: dict[tuple[Any, Any], str] = {
        (True, False): f" <code>{shown}</code> was not trained.",
        (False, True): " The student was not trained.",
    }
    return f"<b>{head} {verdict}.</b> Student against {shown}: {figures}.{words.get(trained, '')}"


def _bytes(shown: str, student: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The beginning of the sentence: whether the arms are equally large; of encoders, whether they work as much."""
    work = encodes({"student": student})
    field = "flops_ratio" if work else "kv_bytes"
    shared = set(dig(student, field, default={})) & set(dig(other, field, default={}))
    if not shared:
        return "At bytes that were not compared,"
    length = max(shared, key=int)
    ours, theirs = student[field][length], other[field][length]
    more, at = theirs > ours, f"at {tokens(length)} tokens"
    equal = abs(ours - theirs) <= EQUAL_BYTES * max(ours, theirs)
    if work and equal:
        return f"At equal work ({ratio(ours)} of the attention FLOPs {at})"
    if work:
        told = f"{ratio(theirs)} of the attention FLOPs, the student {ratio(ours)}"
        return f"<code>{shown}</code> computes {'more' if more else 'less'} ({told}), and"
    if equal:
        return f"At equal bytes ({size(ours)} {at})"
    told = f"{size(theirs)}, the student {size(ours)} {at}"
    return f"<code>{shown}</code> keeps {'more' if more else 'fewer'} bytes ({told}), and"


def _compare(student: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    """(what, 1 if the student is clearly better, -1 if clearly worse, 0; the figures) for each common measure."""
    found = []
    shared = set(dig(student, "quality", default={})) & set(dig(other, "quality", default={}))
    if shared:
        length = max(shared, key=int)
        at = f" at {tokens(length)} tokens"
        for field, what, least, show in (
            ("kl", "KL", 0.05, number),
            ("perplexity_ratio", "perplexity", 0.003, ratio),
            ("error", "error of hidden states", 0.05, number),
        ):
            ours, theirs = (dig(arm, "quality", length, field) for arm in (student, other))
            if ours is not None and theirs is not None:
                clear = abs(ours - theirs) > least * max(ours, theirs)
                found.append(
                    (what, (1 if ours < theirs else -1) * clear, f"{what} {show(ours)} against {show(theirs)}{at}")
                )
                at = ""
    ours, theirs = (dig(arm, "retrieval", "exact") for arm in (student, other))
    if ours is not None and theirs is not None:
        cases = dig(student, "retrieval", "cases", default=0)
        order = 0 if abs(ours - theirs) <= noise_of(ours, theirs, cases) else 1 if ours > theirs else -1
        found.append(("retrieval", order, f"retrieval {percent(ours)} against {percent(theirs)}"))
    return found


def noise_of(ours: float, theirs: float, cases: int) -> float:
    """Two standard errors of the difference of two shares of `cases` answers."""
    mean = (ours + theirs) / 2
    return 2 * math.sqrt(2 * mean * (1 - mean) / cases) if cases else 0.0


def and_list(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


# --- for the plots ----------------------------------------------------------------------------------------------------


def loss_points(evaluation: Mapping[str, Any]) -> tuple[dict[str, tuple[float, float]], str, str]:
    """(KV bytes as a share of the teacher's, KL) of every arm, at the longest length of all, and the axes' names.

    Of an encoder (attention FLOPs, error of the hidden states).
    """
    arms = {name: entry for name, entry in dig(evaluation, "arms", default={}).items() if name != "teacher"}
    qualities = [set(dig(entry, "quality", default={})) for entry in arms.values()]
    cost, loss = ("flops_ratio", "error") if encodes(arms) else ("kv_ratio", "kl")
    sizes = [set(dig(entry, cost, default={})) for entry in arms.values()]
    if not arms or not set.intersection(*qualities) or not set.intersection(*sizes):
        return {}, "", ""
    length, held = (max(set.intersection(*sets), key=int) for sets in (qualities, sizes))
    points = {name: (dig(entry, cost, held), dig(entry, "quality", length, loss)) for name, entry in arms.items()}
    known = {name: (float(x), float(y)) for name, (x, y) in points.items() if x is not None and y is not None}
    words = ("attention FLOPs", "error of hidden states", "") if encodes(arms) else ("KV cache", "KL", ", nats")
    x = f"{words[0]} at {tokens(held)} tokens, share of the teacher's"
    return known, x, f"{words[1]} at {tokens(length)} tokens{words[2]}"


def speed_series(evaluation: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    """Prefill seconds by arm and length."""
    series: dict[str, dict[int, float]] = {}
    for length, entry in dig(evaluation, "speed", default={}).items():
        for arm, times in entry.items():
            if isinstance(times, dict) and times.get("prefill_s"):
                series.setdefault(arm, {})[int(length)] = float(times["prefill_s"])
    return series
