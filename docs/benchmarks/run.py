"""Measure what the documentation claims: `make bench`, or `make bench ARGS="cpu"` for one part.

The parts are `cpu` and, with a CUDA device, `gpu` (the kernels), and the recipes. Writes docs/benchmarks/<part>.json
(for `gpu` named after the device), each with the machine and the date, and docs/benchmarks.md made from all of them.
`make bench ARGS="page"` makes the page alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aot
import encoder_tables
import tables

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RECIPES = ("smollm2-135m-mixed", "smollm2-135m-window", "smollm2-135m-linear", "smollm2-135m-stock")
ENCODERS = ("minilm-window", "minilm-hedgehog", "rxnmapper-window", "rxnmapper-hedgehog")
KERNELS = ("cpu", "gpu")
PAGE = "page"


def kernels(part: str) -> None:
    """The kernels on the CPU or the GPU, in a process of their own that writes the file."""
    done = subprocess.run([sys.executable, str(HERE / f"{part}.py")], check=False)
    if done.returncode:
        raise SystemExit(f"docs/benchmarks/{part}.py ended with {done.returncode}; what it said stands above")


def conversion(recipe: str) -> dict[str, Any]:
    """The whole job of a recipe, as a user runs it; it continues where an earlier call stopped."""
    folder = ROOT / "runs" / "bench" / recipe
    command = [sys.executable, "-m", "attnconvert", "run", recipe, "--out", str(folder)]
    done = subprocess.run(command, check=False)
    if done.returncode not in (0, 4):
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    return figures(recipe, folder)


def figures(recipe: str, folder: Path) -> dict[str, Any]:
    """What a finished run measured, with the time and memory of its stages."""
    measured = json.loads((folder / "evaluation" / "evaluation.json").read_text())
    manifest = json.loads((folder / "manifest.json").read_text())
    stages = {name: {k: s[k] for k in ("seconds", "peak_memory_bytes")} for name, s in manifest["stages"].items()}
    from attnconvert.kernels.dispatch import wanted

    run = {"recipe": recipe, "command": f"attnconvert run {recipe}", "backend": wanted(None)}
    return {**run, "stages": stages, **measured}


def main(names: list[str]) -> None:
    from attnconvert.convert.machine import hardware, versions

    known = (*KERNELS, *RECIPES, *ENCODERS, PAGE)
    unknown = [n for n in names if n not in known]
    if unknown:
        raise SystemExit(f"no benchmark {unknown[0]!r}; known are {', '.join(known)}")
    for name in names or everything():
        print(f"benchmark {name}", file=sys.stderr)
        if name in KERNELS:
            kernels(name)
        elif name in (*RECIPES, *ENCODERS):
            found = conversion(name)
            stamp = {"date": datetime.now(UTC).date().isoformat(), "machine": hardware(), "versions": versions()}
            (HERE / f"{name}.json").write_text(json.dumps({**stamp, **found}, indent=1) + "\n")
    (HERE.parent / "benchmarks.md").write_text(page())


def everything() -> list[str]:
    """All parts that this machine can measure."""
    import torch

    if torch.cuda.is_available():
        return [*KERNELS, *RECIPES, *ENCODERS]
    print("benchmark gpu is left out: torch finds no CUDA device", file=sys.stderr)
    return ["cpu", *RECIPES, *ENCODERS]


def page() -> str:
    """docs/benchmarks.md from the JSON files that are there."""
    from attnconvert.kernels.triton_common import ARCHITECTURES

    lines = ["# Benchmarks", "", "Made by `make bench` from the files in `docs/benchmarks/`; do not edit.", ""]
    ahead = aot.load()
    every = sum(1 for _ in aot.expected(ARCHITECTURES)) if ahead else 0
    lines += tables.goals(HERE, (len(ahead), aot.problems(ahead), every) if ahead else None)
    for found in tables.load(HERE, "cpu"):
        lines += tables.cpu(found)
    on_gpu = tables.load(HERE, "gpu")
    for found in on_gpu:
        lines += tables.gpu(found)
    if not on_gpu:
        lines += tables.no_gpu()
    if ahead:
        lines += _ahead(ahead, every)
    for name in RECIPES:
        path = HERE / f"{name}.json"
        if path.exists():
            lines += _conversion_tables(json.loads(path.read_text()))
    measured = [path for name in ENCODERS if (path := HERE / f"{name}.json").exists()]
    if measured:
        lines += ["## Encoders", "", encoder_tables.EXPLAINED, ""]
    for found in map(json.loads, (path.read_text() for path in measured)):
        lines += encoder_tables.encoder(found, _where(found))
    return "\n".join(lines).rstrip() + "\n"


def _ahead(rows: list[dict[str, Any]], every: int) -> list[str]:
    told = f"{len(rows)} of the {every} configurations that ship, compiled without a GPU by"
    told += " `python docs/benchmarks/aot.py`."
    return ["## Kernels ahead of time", "", told, "", *aot.table(rows), ""]


def _where(found: dict[str, Any]) -> str:
    machine = found["machine"]
    return f"{machine['cpu']}, {machine['cores']} cores, torch {found['versions']['torch']}, {found['date']}"


def _conversion_tables(found: dict[str, Any]) -> list[str]:
    data = found["data"]
    lengths = [str(n) for n in data["lengths"]]
    head = " | ".join(f"KL {n} | ppl × {n}" for n in lengths)
    kv_length = max(found["arms"]["student"]["kv_ratio"], key=int)
    lines = [
        f"## {found['recipe']}",
        "",
        f"`{found['command']}`: {data['sequences']} held-out sequences, seed {data['seed']}; "
        f"{data['needles']['cases']} needle cases of {data['needles']['length']} tokens. {_where(found)}; "
        f"{sum(s['seconds'] for s in found['stages'].values()) / 60:.0f} minutes in all.",
        "",
        f"| arm | groups converted | {head} | needle exact / digits | KV at {kv_length} |",
        "|---|---:|" + "---:|---:|" * len(lengths) + "---:|---:|",
    ]
    for name, arm in found["arms"].items():
        if name == "teacher":
            values = " | ".join(f"0 | 1 ({arm['quality'][n]['perplexity']:.2f})" for n in lengths)
        else:
            values = " | ".join(
                f"{arm['quality'][n]['kl']:.4f} | {arm['quality'][n]['perplexity_ratio']:.3f}" for n in lengths
            )
        share = f"{arm['converted']:.0%}" if "converted" in arm else ""
        needle = f"{arm['retrieval']['exact']:.2f} / {arm['retrieval']['digits']:.3f}"
        kv = f"{arm['kv_ratio'][kv_length]:.2f}×" if "kv_ratio" in arm else "1×"
        lines.append(f"| {name} | {share} | {values} | {needle} | {kv} |")
    for length, entry in found["speed"].items():
        lines += [
            "",
            f"At {length} tokens, batch 1: prefill {entry['teacher']['prefill_s']:.1f} s → "
            f"{entry['student']['prefill_s']:.1f} s ({entry['prefill_speedup']:.2f}×); decode "
            f"{entry['teacher']['decode_ms']:.0f} ms → {entry['student']['decode_ms']:.0f} ms per token "
            f"({entry['decode_speedup']:.2f}×); cache {entry['kv_ratio']:.2f}×, measured.",
        ]
    if "note" in found:
        lines += ["", found["note"]]
    return [*lines, ""]


if __name__ == "__main__":
    main(sys.argv[1:])
