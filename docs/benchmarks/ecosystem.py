"""Run other people's libraries on converted checkpoints: `make ecosystem`, or ARGS="peft trl" for some of them.

Two checkpoints are made first, in minutes, from SmolLM2-135M-Instruct and all-MiniLM-L6-v2 (runs/ecosystem; what is
there already is taken). Each part is a process of its own. Writes ecosystem.json beside this file, with versions, the
machine and the date, and docs/ecosystem.md made from it; ARGS="page" makes the page alone. `vllm`, which is not among
the parts that run by themselves, reads the rules in a wheel: ARGS="vllm --wheel FILE".
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ecosystem_page
import ecosystem_parts as parts

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RUNS = ROOT / "runs" / "ecosystem"
RESULTS = HERE / "ecosystem.json"
PAGE = HERE.parent / "ecosystem.md"
KINDS = ("decoder", "encoder")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="PART", help=f"{', '.join(parts.PARTS)}, vllm or page")
    parser.add_argument("--wheel", type=Path, help="of vllm, for the part of that name")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # in the process of a part: where its result goes
    given = parser.parse_args()
    unknown = set(given.names) - {*parts.PARTS, "vllm", "page"}
    if unknown:
        raise SystemExit(f"no part {unknown.pop()!r}; there are {', '.join(parts.PARTS)}, vllm and page")
    if given.one:
        Path(given.one).write_text(json.dumps(parts.run(given.names[0], folders(given.names[0]))))
        return
    wanted = given.names or list(parts.PARTS)
    failed = []
    if set(wanted) & set(parts.PARTS):
        make_checkpoints()
    for name in (name for name in wanted if name != "page"):
        print(f"ecosystem: {name}", file=sys.stderr)
        try:
            found = vllm(given.wheel) if name == "vllm" else measured(name)
        except RuntimeError as error:
            print(f"ecosystem: {name} failed: {error}", file=sys.stderr)
            failed.append(name)
            continue
        known = measured_before()
        known["parts"][name] = {"date": datetime.now(UTC).date().isoformat(), **found}
        RESULTS.write_text(json.dumps(known | stamp(), indent=1) + "\n")
    PAGE.write_text(page(measured_before()))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; what was measured before stands in {RESULTS}")


def measured_before() -> dict[str, Any]:
    """ecosystem.json, or what it is before anything was measured."""
    known: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"parts": {}}
    return known


def folders(name: str) -> parts.Folders:
    """The checkpoints, and an empty folder for a part."""
    scratch = RUNS / "scratch" / name
    shutil.rmtree(scratch, ignore_errors=True)
    made = {kind: RUNS / kind / "export" for kind in KINDS}
    teachers = {f"{kind}_teacher": RUNS / f"{kind}-teacher" for kind in KINDS}
    return parts.Folders(**made, **teachers, scratch=scratch)


def make_checkpoints() -> None:
    """The converted checkpoints, by the command line, and the teachers as plain folders."""
    for kind in KINDS:
        recipe, run = HERE / f"ecosystem-{kind}.yaml", RUNS / kind
        command = [sys.executable, "-m", "attnconvert", "run", str(recipe), "--out", str(run)]
        done = subprocess.run(command, check=False, cwd=ROOT)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}; what it said stands above")
        if not (RUNS / f"{kind}-teacher" / "config.json").exists():
            save_teacher(recipe, RUNS / f"{kind}-teacher")


def save_teacher(recipe: Path, folder: Path) -> None:
    """The model of a recipe, as it came, in a folder; of a sentence encoder also how it pools."""
    from attnconvert.convert.export import keep_beside
    from attnconvert.convert.recipe import load_recipe
    from attnconvert.convert.sources import fetch_model, load_model

    source = load_recipe(recipe).model
    files = fetch_model(source)
    model, tokenizer = load_model(files, source)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    keep_beside(files.folder, folder)


def measured(name: str) -> dict[str, Any]:
    """A part, in a process of its own.

    Raises:
        RuntimeError: it failed.
    """
    out = RUNS / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, name, "--one", str(out)], check=False, cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    shutil.rmtree(RUNS / "scratch" / name, ignore_errors=True)
    if done.returncode or not out.exists():
        last = [line for line in (done.stderr or "").strip().splitlines() if line.strip()][-1:]
        raise RuntimeError(last[0] if last else f"exit code {done.returncode}")
    found: dict[str, Any] = json.loads(out.read_text())
    return {**found, "seconds": round(time.perf_counter() - start, 1)}


def stamp() -> dict[str, Any]:
    """The machine and the versions of what attnconvert itself stands on."""
    from attnconvert.convert.machine import hardware, versions

    return {"machine": hardware(), "versions": versions()}


def vllm(wheel: Path | None) -> dict[str, Any]:
    """What vLLM's own source says of the architectures that a stock export may have."""
    import ecosystem_vllm

    if wheel is None:
        raise SystemExit("vllm needs --wheel FILE, made by: pip download --no-deps vllm")
    return ecosystem_vllm.rules(wheel)


def page(known: dict[str, Any]) -> str:
    """docs/ecosystem.md from what was measured."""
    return ecosystem_page.page(known, parts.PARTS)


if __name__ == "__main__":
    main()
