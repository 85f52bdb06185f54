"""What one plan loses with each operator, at lengths beyond those that profiles see: the table of docs/selection.md.

    make lengths                        writes lengths.json beside this file; continues where it stopped

Training-free, on SmolLM2: the same 15 layers (11–17, 19, 22, 24–29: those that do not retrieve) get one operator after
the other, and whole held-out texts of each length are compared with the teacher's answers, at every position.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import selection_tables
import torch

from attnconvert.convert.evaluation import CHUNK, costs
from attnconvert.convert.files import stored, write_json
from attnconvert.convert.hosts import surgery
from attnconvert.convert.hosts.sites import all_full
from attnconvert.convert.machine import hardware, versions
from attnconvert.convert.progress import Track, rich_track
from attnconvert.convert.recipe import load_recipe
from attnconvert.convert.runs import Run
from attnconvert.convert.text import kl
from attnconvert.distill.work import Work
from attnconvert.kernels.spec import Full, Retention, Span, Spec, TopBlocks, Window, label

HERE = Path(__file__).parent
RESULTS = HERE / "lengths.json"
LAYERS = (*range(11, 18), 19, 22, *range(24, 30))
OPERATORS: tuple[Spec, ...] = (
    Window(size=128, sinks=4),
    Retention(window=64, keep=64, sinks=4),
    Retention(window=64, keep=64, sinks=4, block=1),
    Span(size=64, growth=0.0625, sinks=4),
    Window(size=256, sinks=4),
    Span(size=64, growth=0.125, sinks=4),
    Span(size=128, growth=0.0625, sinks=4),
    TopBlocks(keep=3, block=32, rows=16),
    TopBlocks(keep=4, block=64, rows=32),
)
TEXTS = {1024: 8, 2048: 8, 4096: 1}  # sequences by length
SEED = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE.parent.parent / "runs" / "lengths")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    track = rich_track()
    work = Work(Run.create(load_recipe(HERE / "selection-study.yaml"), given.out), track)
    rows = []
    for length, count in TEXTS.items():
        ids = work.sequences(work.heldout, count, length, SEED)
        for n in range(count):
            found = losses(work, ids[n : n + 1], given.out / "lengths" / f"{length}-{n:02d}", track)
            rows += [{"length": length, "text": n, "operator": name, **row} for name, row in found.items()]
    document = {
        "schema": 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "make lengths",
        "machine": hardware(),
        "versions": versions(),
        "data": {"layers": list(LAYERS), "texts": TEXTS, "seed": SEED},
        "costs": held(work),
        "rows": rows,
    }
    write_json(given.results, document)
    if given.results == RESULTS:
        selection_tables.write_lengths(document)


def plan(work: Work, spec: Spec) -> dict[Any, list[Spec]]:
    return {site: [spec if site.layer in LAYERS else Full()] * site.kv_heads for site in work.sites}


@torch.no_grad()
def losses(work: Work, ids: torch.Tensor, place: Path, track: Track) -> dict[str, dict[str, float]]:
    """By operator the KL to the teacher in nats per token, and the rise of the loss, on one text (1, S)."""
    ids, found = ids.to(work.model.device), {}
    want: list[torch.Tensor] = []

    def measure(spec: Spec) -> dict[str, float]:
        if not want:
            want.append(work.model(ids, use_cache=False).logits[0])
        with surgery.converted(work.model, plan(work, spec)):
            got = work.model(ids, use_cache=False).logits[0]
        return compared(want[0], got, ids[0])

    for spec in track(OPERATORS, f"{ids.shape[1]:,} tokens"):
        found[label(spec)] = stored(place / f"{label(spec)}.json", lambda spec=spec: measure(spec))  # type: ignore[misc]
    return found


def compared(want: torch.Tensor, got: torch.Tensor, ids: torch.Tensor) -> dict[str, float]:
    """Logits (S, V) against the teacher's."""
    total = {"kl": 0.0, "rise": 0.0}
    for start in range(0, len(ids) - 1, CHUNK):
        target = ids[start + 1 : start + 1 + CHUNK]
        p, q = (x[start : start + len(target)].float().log_softmax(-1) for x in (want, got))
        total["kl"] += kl(p, q).sum().item()
        total["rise"] += (p - q).gather(-1, target[:, None]).sum().item()
    return {name: value / (len(ids) - 1) for name, value in total.items()}


def held(work: Work) -> dict[str, dict[str, Mapping[str, float]]]:
    """By operator and length what the converted layers keep and compute, over what they did."""
    found: dict[str, dict[str, Mapping[str, float]]] = {}
    sites = [site for site in work.sites if site.layer in LAYERS]
    for spec in OPERATORS:
        for length in TEXTS:
            mine, full = (costs(x, length, 2) for x in ({s: [spec] * s.kv_heads for s in sites}, all_full(sites)))
            shares = {name: mine[name] / full[name] for name in mine}
            found.setdefault(label(spec), {})[str(length)] = shares
    return found


if __name__ == "__main__":
    main()
