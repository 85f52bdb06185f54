"""Measure what the documentation claims: `make bench`, or `make bench ARGS="operators"` for one part.

Writes docs/benchmarks/<part>.json, each with the machine and the date, and docs/benchmarks.md made from all of them.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RECIPES = ("smollm2-135m-window", "smollm2-135m-linear")
HEADS, KV_HEADS, DIM = 9, 3, 64  # of SmolLM2-135M


def operators(lengths: tuple[int, ...] = (1024, 4096, 8192, 16384), repeats: int = 3) -> dict[str, Any]:
    """One layer of SmolLM2's shape, bf16, forward: milliseconds of each operator, taking turns, medians."""
    import torch

    from attnconvert.kernels import operators as ops
    from attnconvert.kernels.call import Call
    from attnconvert.kernels.spec import Full, Hybrid, Linear, Window, label

    specs = [Full(), Window(size=128, sinks=4), Window(size=1024, sinks=4), Linear(), Hybrid(window=64, sinks=4)]
    rows = []
    for length in lengths:
        q, k, v = (torch.randn(1, h, length, DIM).bfloat16() for h in (HEADS, KV_HEADS, KV_HEADS))
        times: dict[str, dict[str, list[float]]] = {label(s): {"prefill": [], "decode": []} for s in specs}
        for repeat in range(repeats + 1):
            for spec in specs:
                learned = ops.of(spec).parameters(spec, HEADS, KV_HEADS, DIM)
                with torch.no_grad():
                    start = time.perf_counter()
                    _, state = ops.attend(spec, q, k, v, Call(scale=DIM**-0.5), None, learned)
                    prefill = time.perf_counter() - start
                    step = [x[:, :, -1:] for x in (q, k, v)]
                    start = time.perf_counter()
                    for n in range(8):
                        _, state = ops.attend(spec, *step, Call(scale=DIM**-0.5, seen=length + n), state, learned)
                    decode = (time.perf_counter() - start) / 8
                if repeat:  # the first round warms up
                    times[label(spec)]["prefill"].append(prefill * 1e3)
                    times[label(spec)]["decode"].append(decode * 1e3)
        middle = {name: {phase: statistics.median(x) for phase, x in both.items()} for name, both in times.items()}
        for name, both in middle.items():
            ratios = {f"{phase}_speedup": middle["full"][phase] / both[phase] for phase in both}
            rows.append({"length": length, "operator": name, **{f"{p}_ms": x for p, x in both.items()}, **ratios})
    return {"shape": {"heads": HEADS, "kv_heads": KV_HEADS, "dim": DIM, "dtype": "bfloat16"}, "rows": rows}


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
    return {"recipe": recipe, "command": f"attnconvert run {recipe}", "stages": stages, **measured}


PARTS = {"operators": operators, **{name: (lambda name=name: conversion(name)) for name in RECIPES}}


def main(names: list[str]) -> None:
    from attnconvert.convert.machine import hardware, versions

    unknown = [n for n in names if n not in PARTS]
    if unknown:
        raise SystemExit(f"no benchmark {unknown[0]!r}; known are {', '.join(PARTS)}")
    for name in names or PARTS:
        print(f"benchmark {name}", file=sys.stderr)
        found = PARTS[name]()
        stamp = {"date": datetime.now(UTC).date().isoformat(), "machine": hardware(), "versions": versions()}
        (HERE / f"{name}.json").write_text(json.dumps({**stamp, **found}, indent=1) + "\n")
    (HERE.parent / "benchmarks.md").write_text(page())


def page() -> str:
    """docs/benchmarks.md from the JSON files that are there."""
    lines = ["# Benchmarks", "", "Made by `make bench` from the files in `docs/benchmarks/`; do not edit.", ""]
    path = HERE / "operators.json"
    if path.exists():
        lines += _operator_table(json.loads(path.read_text()))
    for name in RECIPES:
        path = HERE / f"{name}.json"
        if path.exists():
            lines += _conversion_tables(json.loads(path.read_text()))
    return "\n".join(lines).rstrip() + "\n"


def _where(found: dict[str, Any]) -> str:
    machine = found["machine"]
    return f"{machine['cpu']}, {machine['cores']} cores, torch {found['versions']['torch']}, {found['date']}"


def _operator_table(found: dict[str, Any]) -> list[str]:
    shape = found["shape"]
    lines = [
        "## Operators",
        "",
        f"One layer, {shape['heads']} query heads over {shape['kv_heads']} KV heads of {shape['dim']}, "
        f"{shape['dtype']}, forward, batch 1. Speed-up is against `full` (SDPA) in the same process, taking turns. "
        f"{_where(found)}.",
        "",
        "| tokens | operator | prefill ms | speed-up | decode ms | speed-up |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r['length']} | {r['operator']} | {r['prefill_ms']:.1f} | {r['prefill_speedup']:.1f}× "
        f"| {r['decode_ms']:.2f} | {r['decode_speedup']:.1f}× |"
        for r in found["rows"]
    ]
    return [*lines, ""]


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
    return [*lines, ""]


if __name__ == "__main__":
    main(sys.argv[1:])
