"""Measure the kernels on the CPU: `make bench ARGS=cpu`, or `python docs/benchmarks/cpu.py --quick --out FILE`.

Heads of SmolLM2-135M, one layer, batch 1. What the columns of a row mean is in `measure`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from cases import (
    SETS,
    Inputs,
    Steps,
    attention,
    hybrid,
    kept,
    linear,
    random_blocks,
    retention,
    sdpa,
    unavailable,
    warm,
    window,
)
from measure import BOTH, DECODE, DTYPES, FORWARD, Group, Wall, figure, measure, skipped
from shapes import (
    Peaks,
    attention_flops,
    cache_bytes,
    dense_pairs,
    judge,
    linear_flops,
    smollm2,
    window_pairs,
)
from tables import save

from attnconvert.kernels import dispatch

HERE = Path(__file__).parent
MINUTES = 5.5
SINKS = 4
TORCH_TOKENS = {True: 1024, False: 8192}  # where a case is slow on the torch back end, and where not
GOAL = (8192, "bf16")  # tokens and dtype of the targets


def groups(quick: bool) -> Iterator[Group]:
    """What is measured, the targets first."""
    if quick:
        yield forward(256, "bf16", quick)
        yield forward(256, "fp32", quick)
        yield decode(256, "bf16", quick)
        yield both(128, "fp32", quick)
        return
    yield forward(8192, "bf16")
    yield decode(8192, "bf16")
    yield both(4096, "bf16")
    yield both(1024, "bf16")
    for tokens in (4096, 1024):
        yield forward(tokens, "bf16")
        yield forward(tokens, "fp32")
    yield forward(8192, "fp32")
    yield both(4096, "fp32")
    yield both(1024, "fp32")
    yield decode(8192, "fp32")
    yield decode(32768, "bf16")
    yield forward(16384, "bf16")
    yield forward(16384, "fp32")
    yield both(8192, "fp32")


def forward(tokens: int, dtype: str, quick: bool = False) -> Group:
    """Prefill: dense, windows, lists of blocks, linear, hybrid, retention."""
    shape = smollm2(tokens)
    group = Group(phase=FORWARD, dtype=dtype, shape=shape)
    x = Inputs(shape, DTYPES[dtype], "cpu")
    aim = (tokens, dtype) == GOAL or (quick and dtype == "bf16")
    full, half = (attention_flops(shape, dense_pairs(tokens, causal)) for causal in (False, True))
    dense = group.add("dense", "SDPA", lambda: sdpa(x, False), flops=full)
    causal = group.add("causal", "SDPA", lambda: sdpa(x, True), flops=half)
    group.add("causal", "SDPA grouped", lambda: sdpa(x, True, repeat="grouped"), flops=half, baseline=(causal,))
    _ours(group, x, "cpp", aim, dense, causal)
    if tokens <= TORCH_TOKENS[False]:
        _ours(group, x, "torch", False, dense, causal)
    return group


def _ours(group: Group, x: Inputs, backend: str, aim: bool, dense: str, causal: str) -> None:
    shape, tokens, skip = x.shape, x.shape.tokens, unavailable(backend)
    pairs, half = dense_pairs(tokens, False), dense_pairs(tokens, True)
    features, told = 2 * shape.dim, "feature maps included"

    def add(case: str, make: Any, against: str, slow: bool = False, **more: Any) -> str:
        if backend == "torch" and tokens > TORCH_TOKENS[slow]:
            return ""
        goal = more.pop("goal", None) if aim else more.pop("goal", None) and None
        return group.add(case, backend, make, baseline=(against,), skip=skip, goal=goal, **more)

    mine = add(
        "dense",
        lambda: window(x, -1, False, backend),
        dense,
        slow=True,
        goal="dense",
        flops=attention_flops(shape, pairs),
        same=dense,
    )
    mine_causal = add(
        "causal",
        lambda: window(x, -1, True, backend),
        causal,
        slow=True,
        flops=attention_flops(shape, half),
        same=causal,
    )
    equal = ""
    for size in (128, 256, 1024):
        share = window_pairs(tokens, size, True, SINKS) / half
        name = add(
            f"window {size} + {SINKS} sinks",
            lambda size=size: window(x, size, True, backend, SINKS),
            causal,
            slow=size == 1024,
            goal="window" if size == 256 else None,
            dense=mine_causal,
            density=share,
            flops=attention_flops(shape, share * half),
        )
        equal = equal or name
    lists = random_blocks(shape, 0.125, "cpu")
    blocks = -(-tokens // lists.block[1])
    share = kept(blocks, 0.125) / blocks
    sparse = {"slow": True, "dense": mine, "density": share, "flops": attention_flops(shape, share * pairs)}
    add(
        "block-sparse 12.5 %, lists given",
        lambda: attention(x, lists, False, backend),
        dense,
        goal="sparse",
        note="random lists of 128×64 blocks",
        **sparse,
    )
    add(
        "block-sparse 12.5 %, selection included",
        lambda: attention(x, lists, False, backend, select=kept(blocks, 0.125)),
        dense,
        **sparse,
    )
    flops = linear_flops(shape, features)
    add("linear causal, Hedgehog", lambda: linear(x, True, backend), causal, goal="linear", flops=flops, note=told)
    add("linear, Hedgehog", lambda: linear(x, False, backend), dense, flops=flops, note=told)
    given, plain = f"{shape.dim} features, given", linear_flops(shape, shape.dim)
    add("linear causal, features given", lambda: linear(x, True, backend, False), causal, flops=plain, note=given)
    add("hybrid 64 + 4 sinks, Hedgehog", lambda: hybrid(x, 64, SINKS, backend), causal, note=told)
    add(
        "retention 64 + 64 + 4",
        lambda: retention(x, 64, 64, SINKS, 16, backend),
        equal,
        slow=True,
        note="against a window of the same bytes",
    )


def decode(slots: int, dtype: str, quick: bool = False) -> Group:
    """One query over a cache; SDPA with repeated, with grouped and with folded heads."""
    shape = smollm2(slots)
    group = Group(phase=DECODE, dtype=dtype, shape=shape)
    steps = Steps(shape, slots, DTYPES[dtype], "cpu")
    aim = (slots, dtype) == GOAL or quick
    moved = cache_bytes(shape, slots, DTYPES[dtype].itemsize)
    note = f"{SETS} caches in turn"
    repeated = group.add(
        "full cache, KV repeated beforehand", "SDPA", lambda: steps.sdpa("before"), calls=SETS, note=note
    )
    common = {"baseline": (repeated,), "calls": SETS}
    group.add("full cache, KV repeated in the call", "SDPA", lambda: steps.sdpa("within"), same=repeated, **common)
    group.add("full cache, heads folded", "SDPA", lambda: steps.sdpa("folded"), same=repeated, moved=moved, **common)
    short, dim = min(256, slots // 4) + SINKS, shape.kv_heads
    for backend in ("cpp", "torch"):
        more = {"skip": unavailable(backend), **common}
        goal = "decode" if backend == "cpp" and aim else None
        mine = lambda backend=backend, **kinds: steps.ours(backend, **kinds)  # noqa: E731
        group.add("full cache", backend, mine, same=repeated, goal=goal, moved=moved, **more)
        group.add(f"window {short - SINKS} + {SINKS} sinks", backend, lambda m=mine: m(short=(short,) * dim), **more)
        mixed = (slots, *(short,) * (dim - 1))
        group.add("one group full, two windows", backend, lambda m=mine, s=mixed: m(short=s), **more)
        group.add(
            f"window {short - SINKS} + {SINKS} sinks + state",
            backend,
            lambda m=mine: m(short=(short,) * dim, state=True),
            **more,
        )
    return group


def both(tokens: int, dtype: str, quick: bool = False) -> Group:
    """Forward and backward."""
    shape = smollm2(tokens)
    group = Group(phase=BOTH, dtype=dtype, shape=shape)
    x = Inputs(shape, DTYPES[dtype], "cpu", grad=True)
    half = dense_pairs(tokens, True)
    flops = attention_flops(shape, half)
    causal = group.add("causal", "SDPA", lambda: sdpa(x, True), flops=flops)
    for backend in ("cpp", "torch"):
        more = {"baseline": (causal,), "skip": unavailable(backend)}
        if backend == "torch" and tokens > TORCH_TOKENS[True]:
            continue
        mine = group.add("causal", backend, lambda b=backend: window(x, -1, True, b), flops=flops, same=causal, **more)
        share = window_pairs(tokens, 256, True, SINKS) / half
        group.add(
            f"window 256 + {SINKS} sinks",
            backend,
            lambda b=backend: window(x, 256, True, b, SINKS),
            dense=mine,
            density=share,
            flops=flops * share,
            **more,
        )
        group.add("linear causal, Hedgehog", backend, lambda b=backend: linear(x, True, b), **more)
        group.add("hybrid 64 + 4 sinks, Hedgehog", backend, lambda b=backend: hybrid(x, 64, SINKS, b), **more)
    return group


# ---------------------------------------------------------------------------------------------------------- the machine


def gemm_peaks(quick: bool) -> dict[str, float]:
    """GFLOP/s of the fastest matrix products: torch's in each dtype, and the C++ kernels' own probe."""
    found = {f"torch {name}": _torch_gemm(DTYPES[name], quick) for name in ("fp32", "bf16")}
    if unavailable("cpp") is None:
        probe = getattr(dispatch.backend("cpp"), "peak_gflops", None)
        if probe is not None:
            found |= {f"cpp {name}": figure(float(probe(DTYPES[name]))) for name in ("fp32", "bf16")}
    return found


def _torch_gemm(dtype: torch.dtype, quick: bool) -> float:
    """Of the largest square product that takes less than a third of a second."""
    best = 0.0
    for size in (128, 256) if quick else (256, 512, 1024, 2048):
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        a @ b
        times = []
        for _ in range(5):
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
        middle = statistics.median(times)
        best = max(best, 2e-9 * size**3 / middle)
        if 8 * middle > 0.33:
            break
    return figure(best)


def machine(threads: int) -> dict[str, Any]:
    """Where it was measured: `instruction_set` is the machine's (of `shapes.LEVELS`), `kernels` that of the kernels."""
    from attnconvert.convert.machine import hardware
    from attnconvert.kernels import cpp_build

    flags = cpp_build.machine()
    levels = [name for name, (_, needed) in cpp_build.LEVELS.items() if needed <= flags]
    return {
        **hardware(),
        "instruction_set": levels[0] if levels else "other",
        "kernels": cpp_build.instruction_set()[0],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
    }


def measured(threads: int, minutes: float, quick: bool) -> dict[str, Any]:
    """Everything that goes into cpu.json."""
    from attnconvert.convert.machine import versions

    torch.set_num_threads(threads)
    begin = time.monotonic()
    for backend in ("cpp", "torch"):
        if reason := unavailable(backend):  # builds the C++ kernels, outside of all timing
            print(f"not measured: {reason}", file=sys.stderr)
        warm(backend, "cpu")
    before = gemm_peaks(quick)
    here = machine(threads)
    peaks = Peaks(flops=1e9 * max(before.values()))
    rows = []
    for group in groups(quick):
        left = minutes - (time.monotonic() - begin) / 60
        print(f"{(time.monotonic() - begin):4.0f} s  {group.title}", file=sys.stderr, flush=True)
        if left <= 0:
            rows += skipped(group, f"the {minutes:g} minutes of this run were over", here["instruction_set"])
            continue
        speed: dict[str, Any] = {"seconds": 0, "rounds": (2, 2), "sample_ms": 0} if quick else {"seconds": 6}
        rows += measure(group, Wall(), peaks=peaks, machine=here["instruction_set"], **speed)
    rows += [*_peak_rows(rows, here["instruction_set"], quick), _model_row(here["instruction_set"])]
    return {
        "kind": "cpu",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": here,
        "versions": versions(),
        "gemm_gflops": before,
        "seconds": round(time.monotonic() - begin),
        "rows": rows,
    }


def _peak_rows(rows: list[dict[str, Any]], level: str | None, quick: bool) -> Iterator[dict[str, Any]]:
    """Our dense forward pass again, held against the measured peak of matrix products: once, in its fastest dtype."""
    tokens = 256 if quick else GOAL[0]
    mine = [r for r in rows if (r["case"], r["provider"], r["shape"]["tokens"]) == ("dense", "cpp", tokens)]
    timed = [r for r in mine if r.get("peak_share") is not None] or mine[:1]
    for row in sorted(timed, key=lambda r: -(r.get("peak_share") or 0))[:1]:
        note = f"the fastest matrix product of this process is the peak; {row['note']}".rstrip("; ")
        again = {**row, "case": "dense, share of GEMM peak", "note": note}
        again.pop("goal", None)
        judge(again, "peak", level)
        yield again


def _model_row(level: str | None) -> dict[str, Any]:
    """The place of the whole model, which a recipe measures: `tables.goals` takes it from there."""
    row = {
        "case": "whole model, prefill",
        "provider": "attnconvert",
        "pass": FORWARD,
        "dtype": "bf16",
        "shape": smollm2(8192).described(),
        "median_ms": None,
        "p20_ms": None,
        "p80_ms": None,
        "samples": 0,
        "ratio": None,
        "baseline": "SDPA",
        "note": "measured by the recipe benchmark smollm2-135m-mixed",
    }
    judge(row, "model", level)
    return row


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "cpu.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="no group is begun after these")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it works")
    given = parser.parse_args(arguments)
    if given.quick and given.out == HERE / "cpu.json":
        parser.error("--quick measures nothing worth keeping: name another file with --out")
    found = measured(given.threads, given.minutes, given.quick)
    save(found, given.out)
    wrong = [r for r in found["rows"] if "WRONG" in r["note"]]
    for row in wrong:
        print(f"{row['provider']}: {row['case']}, {row['shape']['tokens']} tokens: {row['note']}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
