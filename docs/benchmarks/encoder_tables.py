"""The tables of docs/benchmarks.md on converted encoders: similarities of texts, and masked tokens filled in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EXPLAINED = """\
Cosine is that of a text's embedding to the teacher's, on average and the least; ranks are Spearman's correlation of the
similarities between any two of the texts; masked tokens are those filled in rightly of the 15 % that are masked, kept
the share of what the teacher fills in."""
COLUMNS = (  # field, head, places
    ("cosine", "cosine", 4),
    ("cosine_least", "least", 4),
    ("rank", "ranks", 4),
    ("masked", "masked tokens", 3),
    ("masked_kept", "kept", 3),
)


def encoder(found: Mapping[str, Any], where: str) -> list[str]:
    """A recipe's table: an arm and a length a row.

    Args:
        where: the machine and the date.
    """
    data, arms = found["data"], found["arms"]
    known = [c for c in COLUMNS if any(c[0] in quality for arm in arms.values() for quality in arm["quality"].values())]
    minutes = sum(stage["seconds"] for stage in found["stages"].values()) / 60
    needles = data["needles"]
    lines = [
        f"### {found['recipe']}",
        "",
        f"`{found['command']}`: {data['sequences']} held-out texts, seed {data['seed']}; {needles['cases']} facts to "
        f"find in passages of {needles['length']} tokens. {where}; {minutes:.0f} minutes in all.",
        "",
        f"| arm | heads converted | trained | tokens | {' | '.join(head for _, head, _ in known)} | facts found |",
        "|---|---:|---|---:|" + "---:|" * len(known) + "---:|",
    ]
    for name, arm in arms.items():
        for n, (length, quality) in enumerate(arm["quality"].items() or [("", {})]):
            share = f"{arm['converted']:.0%}" if "converted" in arm else ""
            trained = {True: "yes", False: "no"}.get(arm.get("trained"), "")
            cells = [f"{quality[field]:.{places}f}" if field in quality else "" for field, _, places in known]
            exact = f"{arm['retrieval']['exact']:.2f}" if n == 0 else ""
            lines.append(f"| {name} | {share} | {trained} | {length} | {' | '.join(cells)} | {exact} |")
    lines += ["", found["note"]] if "note" in found else []
    for length, entry in found["speed"].items():
        times = " → ".join(f"{1e3 * entry[who]['prefill_s']:.0f} ms" for who in ("teacher", "student"))
        lines += ["", f"At {length} tokens, batch 1: {times} ({entry['prefill_speedup']:.2f}×)."]
    return [*lines, ""]
