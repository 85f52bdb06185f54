"""Compiles every configuration of every Triton kernel for four chips, without a GPU, and refuses what spills.

    python docs/benchmarks/aot.py [--arch sm_90] [--only mixed] [--jobs 2] [--loose] [--sample 1]

Each `kernels/triton_*.py` lists in `variants(arch)` all that its launchers can choose. Of each the registers, the
shared memory and the spills are written to aot.json, which is also the cache: what has the hash of an earlier row is
not compiled again. The exit status is 1 and the kernels are named where one spills, needs more shared memory than the
chip has, or does not compile. Pointers and integers count as divisible by 16, as they are in nearly every launch: loads
are then pipelined through shared memory, which is when most of it is needed. `--loose` compiles without that, to see
that nothing spills then either, and writes nothing.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import functools
import hashlib
import importlib
import inspect
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("aot.json")
KERNELS = Path(__file__).parents[2] / "kernels"
CHANGED = "its source changed while the gate ran: run it again"
FOUND = ("registers", "shared", "spills", "scalar_spills", "error", "triton")  # what a row says of its result
SAVE_EVERY = 25  # results: an interrupted run goes on from there

# -------------------------------------------------------------------------------------------------- what there is to do


def modules(kernels: Path = KERNELS) -> list[str]:
    """The files that list variants, by name. Decided by their text, so that nothing is imported for it."""
    return [f.stem for f in sorted(kernels.glob("triton_*.py")) if "\ndef variants(" in f.read_text()]


def variants(module: str, arch: str) -> list[Any]:
    return list(importlib.import_module(f"attnconvert.kernels.{module}").variants(arch))


def expected(archs: tuple[str, ...] | list[str]) -> Iterator[dict[str, Any]]:
    """A row without results for each variant: what aot.json must hold."""
    for module in modules():
        for arch in archs:
            for index, v in enumerate(variants(module, arch)):
                yield {**describe(module, arch, v), "index": index}


def describe(module: str, arch: str, v: Any) -> dict[str, Any]:
    constants = {name: _plain(value) for name, value in v.constants.items()}
    options = {name: _plain(value) for name, value in v.options.items()}
    row = {"module": module, "kernel": v.name, "arch": arch, "constants": constants, "warps": v.warps}
    row |= {"stages": v.stages, **({"options": options} if options else {})}
    return {**row, "hash": digest(v.function, dict(v.signature), row)}


def _plain(value: Any) -> Any:
    value = getattr(value, "value", value)  # tl.constexpr
    return value if isinstance(value, bool | int | float | str) or value is None else str(value)


def digest(function: Any, signature: dict[str, str], row: dict[str, Any]) -> str:
    """Of what is compiled: the kernel with all that it calls, and its constants. Comments and places do not count."""
    text = json.dumps([source(raw(function)), signature, row], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def raw(function: Any) -> Any:
    """The Python function in a kernel, interpreted or not."""
    while not inspect.isfunction(function):
        function = function.fn
    return function


@functools.cache
def source(function: Any) -> str:
    """The code of a kernel and of all that it refers to, without comments and docstrings."""
    texts, seen, todo = [], set(), [function]
    while todo:
        one = todo.pop(0)
        if one in seen:
            continue
        seen.add(one)
        tree = ast.parse(textwrap.dedent(inspect.getsource(one)))
        body = tree.body[0]
        assert isinstance(body, ast.FunctionDef)
        if ast.get_docstring(body) is not None:
            body.body = body.body[1:]
        texts.append(ast.unparse(tree))
        for name in sorted({n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}):
            value = one.__globals__.get(name)
            if type(value).__name__ in ("JITFunction", "InterpretedFunction"):
                todo.append(raw(value))
            elif type(value).__name__ == "constexpr" or isinstance(value, bool | int | float | str):
                texts.append(f"{name} = {_plain(value)!r}")
    return "\n".join(texts)


# ------------------------------------------------------------------------------------------------------ one compilation


def compiled(row: dict[str, Any], loose: bool = False) -> dict[str, Any]:
    """Registers, shared memory in bytes and spills of one variant, or the error that kept it from being compiled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arch = row["arch"]
    v = variants(row["module"], arch)[row["index"]]
    if describe(row["module"], arch, v)["hash"] != row["hash"]:
        return {"error": CHANGED}
    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    fixed = {p.name for p in v.function.params if p.do_not_specialize}
    names = v.function.arg_names
    signature = {n: "constexpr" if n in v.constants else v.signature[n] for n in names}
    attrs = {}
    for place, (name, kind) in enumerate(signature.items()):
        number = kind in ("i32", "i64") and not loose and name not in fixed
        if kind.startswith("*") or number:
            attrs[(place,)] = [["tt.divisibility", 16]]
    constants = {(names.index(n),): getattr(value, "value", value) for n, value in v.constants.items()}
    options = {"num_warps": v.warps, "num_stages": v.stages, "enable_fp_fusion": True, **v.options}
    try:
        k = triton.compile(ASTSource(v.function, signature, constants, attrs), target=target, options=options)
    except Exception as error:  # whatever a compiler raises is this kernel's result
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    found = _amd_usage(k.asm["amdgcn"]) if amd else _nvidia_usage(k.asm["cubin"])
    return {**found, "shared": k.metadata.shared}


def _amd_usage(text: str) -> dict[str, int]:
    def number(pattern: str) -> int:
        found = re.findall(pattern + r":?\s+(\d+)", text)
        return max(map(int, found)) if found else 0

    spills = max(number(r"\.vgpr_spill_count"), number("ScratchSize"))
    # scalar registers are kept in lanes of vector registers, not in memory: told, not refused
    scalar = number(r"\.sgpr_spill_count")
    return {"registers": number(r"\.vgpr_count"), "spills": spills, **({"scalar_spills": scalar} if scalar else {})}


def _nvidia_usage(cubin: bytes) -> dict[str, int]:
    """The stack is what tells of spills: the column LOCAL stays 0 even then."""
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (max(map(int, re.findall(rf"{name}:(\d+)", text))) for name in ("REG", "STACK"))
    return {"registers": registers, "spills": stack}


# ------------------------------------------------------------------------------------------------------------- the gate


def problems(rows: list[dict[str, Any]]) -> list[str]:
    """One line for each kernel that must not ship."""
    from attnconvert.kernels.triton_common import SHARED

    lines = []
    for row in rows:
        name, limit = f"{row['kernel']} on {row['arch']} ({row['module']}.py)", SHARED[row["arch"]]
        if "error" in row:
            lines.append(f"{name} does not compile: {row['error']}")
        elif row["spills"]:
            lines.append(f"{name} spills {row['spills']} bytes at {row['registers']} registers")
        elif row["shared"] > limit:
            lines.append(f"{name} needs {row['shared']} bytes of shared memory, the chip has {limit}")
    return lines


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: of each kernel and chip the range over its configurations."""
    archs = [a for a in ("sm_80", "sm_90", "sm_100", "gfx942") if any(row["arch"] == a for row in rows)]
    families: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        families.setdefault(family(row), []).append(row)
    lines = ["| kernel | configurations | " + " | ".join(f"{a}: registers, shared" for a in archs) + " | spills |"]
    lines.append("|---|---:|" + "---|" * len(archs) + "---:|")
    for name, some in families.items():
        cells = [_cell([row for row in some if row["arch"] == a and "error" not in row]) for a in archs]
        spills = sum(bool(row.get("spills")) or "error" in row for row in some)
        lines.append(f"| {name} | {len(some)} | " + " | ".join(cells) + f" | {spills} |")
    return lines


def family(row: dict[str, Any]) -> str:
    """The name of a variant up to its type, its sizes and its switches."""
    words: list[str] = []
    for word in re.split("[ -]", row["kernel"]):
        if word in ("bf16", "fp16", "fp32") or any(c.isdigit() for c in word):
            break
        words.append(word)
    return " ".join(words) or row["kernel"]


def _cell(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "–"
    registers, shared = ([row[name] for row in rows] for name in ("registers", "shared"))
    low, high = min(registers), max(registers)
    return (f"{low}–{high}" if low != high else f"{high}") + f", {max(shared) / 1024:.0f} KB"


def load(results: Path = RESULTS) -> list[dict[str, Any]]:
    return json.loads(results.read_text()) if results.exists() else []


def save(rows: list[dict[str, Any]], results: Path) -> None:
    """One row per line, so that a change of one kernel is a change of its lines. Rows without a result are left out."""
    finished = [row for row in rows if "triton" in row and row.get("error") != CHANGED]
    done = [{k: v for k, v in row.items() if k != "index"} for row in finished]
    results.write_text("[\n" + ",\n".join(map(json.dumps, done)) + "\n]\n")


def run(todo: list[dict[str, Any]], jobs: int, loose: bool) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each row with its result as it is done, in processes of their own."""
    if jobs == 1 and len(todo) <= 8:  # a few: another process would cost more
        yield from ((row, compiled(row, loose)) for row in todo)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = {pool.submit(compiled, row, loose): row for row in todo}
        for future in concurrent.futures.as_completed(futures):
            yield futures[future], future.result()


def main(arguments: list[str] | None = None) -> int:
    if os.environ.pop("TRITON_INTERPRET", None) == "1":  # kernels made in its spirit cannot be compiled
        assert "triton" not in sys.modules, "TRITON_INTERPRET=1 has taken effect already: start this on its own"
    import triton

    from attnconvert.kernels.triton_common import ARCHITECTURES

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="this chip only (may be repeated)")
    parser.add_argument("--only", default="", help="variants whose name or file has this in it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--loose", action="store_true", help="nothing is divisible by 16; writes nothing")
    parser.add_argument("--fresh", action="store_true", help="compile even what aot.json has")
    parser.add_argument("--sample", type=int, help="this many of each chip, spread over them; writes nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="another file than aot.json")
    given = parser.parse_args(arguments)
    dry = given.loose or given.sample is not None

    rows = list(expected(ARCHITECTURES))
    here = [r for r in rows if r["arch"] in (given.arch or ARCHITECTURES)]
    here = [r for r in here if given.only in r["kernel"] or given.only in r["module"]]
    if given.sample is not None:
        here = [r for a in ARCHITECTURES for r in _spread([r for r in here if r["arch"] == a], given.sample)]
    chosen = {id(r) for r in here}
    known = {(r["arch"], r["hash"]): r for r in load(given.results)}
    for row in rows:
        old = known.get((row["arch"], row["hash"]))
        again = id(row) in chosen and (given.fresh or dry or (old or {}).get("triton") != triton.__version__)
        if old is not None and not again:
            row |= {name: old[name] for name in FOUND if name in old}
    todo = [r for r in here if "triton" not in r]
    print(f"{len(here)} configurations, {len(todo)} to compile with Triton {triton.__version__}", flush=True)
    for n, (row, result) in enumerate(run(todo, given.jobs, given.loose), 1):
        row |= {**result, "triton": triton.__version__}
        if result.get("error") != CHANGED:
            print(*problems([row]), sep="\n", end="\n" if problems([row]) else "", flush=True)
        if n % SAVE_EVERY == 0:
            print(f"{n} of {len(todo)}", flush=True)
            if not dry:
                save(rows, given.results)
    if not dry:
        save(rows, given.results)
    wrong = problems(here)
    print("\n".join([f"{len(here) - len(wrong)} of {len(here)} configurations fit", *wrong]))
    return 1 if wrong else 0


def _spread(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    return [rows[int((n + 0.5) * len(rows) / count)] for n in range(min(count, len(rows)))]


if __name__ == "__main__":
    sys.exit(main())
