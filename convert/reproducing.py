"""Runs the recipe of a manifest again and says whether the same came of it, and what differs in the environment.

Two results are *bit-identical* where plan, samples, what was learned and the exported weights have the same hashes,
*equal to tolerance* where the plan is the same and every figure of the evaluation is as near as rounding leaves it, and
*different* otherwise.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .artefacts import dig
from .comparing import figures_of
from .errors import UsageError
from .files import read_json, sha256_file
from .integrity import SUMS, read_sums
from .keys import STAGES
from .machine import hardware, versions
from .recipe import AnyRecipe, load_recipe
from .runs import MANIFEST, PLAN, RECIPE, Run

log = logging.getLogger("attnconvert")
IDENTICAL, EQUAL, DIFFERENT = "bit-identical", "equal to tolerance", "different"
COUNTED = (".safetensors", ".parquet")  # what else a stage writes has times or versions in it
RELATIVE, ABSOLUTE = 0.02, 2e-3  # of a figure: what another number of threads or another processor makes of it


@dataclass(frozen=True, kw_only=True)
class Before:
    """What a manifest tells of the first run: the recipe, hashes by stage and file, figures, and the environment."""

    recipe: AnyRecipe
    files: Mapping[str, Mapping[str, str]]
    plan: str | None
    figures: Mapping[str, float]
    versions: Mapping[str, Any]
    hardware: Mapping[str, Any]
    model: Mapping[str, Any]


def read_before(manifest: Path, overrides: Sequence[str] = ()) -> Before:
    """What a manifest.json of a run or of an exported checkpoint, or the folder that holds it, tells.

    Raises:
        UsageError: there is none, or no recipe beside it, or the run had not come to an export.
    """
    path = manifest / MANIFEST if manifest.is_dir() else manifest
    if not path.is_file():
        raise UsageError(f"{path} does not exist: give the manifest.json of a run or of an exported checkpoint")
    told = read_json(path)
    if not isinstance(told, dict) or "stages" not in told:
        raise UsageError(
            f"{path} is no manifest of a run: a checkpoint that was exported from a model by a plan has no recipe"
        )
    recipe = path.parent / RECIPE
    if not recipe.is_file():
        raise UsageError(f"{recipe} does not exist: a manifest is read with the recipe that lies beside it")
    files = {stage: dict(found) for stage, found in dig(told, "files", default={}).items()}
    if (path.parent / SUMS).is_file():  # of a checkpoint, whose manifest was written before its weights
        files["export"] = read_sums(path.parent)
    if "evaluate" not in told["stages"]:
        raise UsageError(f"the run of {path} has not been evaluated: there is nothing yet to compare with")
    if "evaluate" not in files or "plan" not in told:
        raise UsageError(
            f"{path} has no hashes of what came of the run, as an earlier attnconvert wrote it: run its recipe again, "
            "and compare both runs with `attnconvert diff`"
        )
    return Before(
        recipe=load_recipe(recipe, overrides),
        files=files,
        plan=told.get("plan"),
        figures=figures_of(told),
        versions=dig(told, "versions", default={}),
        hardware=dig(told, "hardware", default={}),
        model=dig(told, "model", default={}),
    )


def reproduce(before: Before, folder: Path, run: Callable[[Run], None]) -> dict[str, Any]:
    """Run the recipe again in a folder, and compare.

    Args:
        run: carries the stages of a run out.

    Raises:
        UsageError: the model's files are not those of the first run.
    """
    _require_model(before)
    again = Run.create(before.recipe, folder)
    run(again)
    manifest = again.manifest()
    stages = _stages(before, again)
    figures = _compare_figures(before.figures, figures_of(manifest))
    return {
        "run": str(folder),
        "environment": environment(before.versions, before.hardware),
        "stages": stages,
        "figures": figures,
        "result": _grade(stages, figures),
    }


def _require_model(before: Before) -> None:
    """What hours of work would find out only at their end."""
    from .denoiser_sources import fetch_denoiser
    from .sources import fetch_model

    fetch = fetch_denoiser if before.recipe.kind == "images" else fetch_model
    known, found = dig(before.model, "sha256", default={}), fetch(before.recipe.model).sha256
    changed = [name for name, digest in known.items() if found.get(name, digest) != digest]
    if changed:
        raise UsageError(
            f"{changed[0]} is not the file that the first run began with: its result cannot be had from it"
        )


def _stages(before: Before, again: Run) -> dict[str, dict[str, Any]]:
    """By stage, which of its samples and weights have the same hashes, and whether the plan has."""
    now = dig(again.manifest(), "files", default={})
    found: dict[str, dict[str, Any]] = {}
    for stage in STAGES:
        then, mine = (
            {name: digest for name, digest in files.get(stage, {}).items() if name.endswith(COUNTED)}
            for files in (before.files, now)
        )
        if stage == "select":
            then, mine = {PLAN: before.plan or ""}, {PLAN: sha256_file(again.plan)}
        names = {**then, **mine}
        different = sorted(name for name in names if then.get(name) != mine.get(name))
        if names:
            found[stage] = {"files": len(names), "equal": len(names) - len(different), "different": different}
    return found


def _compare_figures(then: Mapping[str, float], now: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    found = {}
    for name in then:
        a, b = then[name], now.get(name)
        near = b is not None and math.isclose(a, b, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
        found[name] = {"then": a, "now": b, "equal": a == b, "near": near}
    return found


def _grade(stages: Mapping[str, Mapping[str, Any]], figures: Mapping[str, Mapping[str, Any]]) -> str:
    if stages and all(not stage["different"] for stage in stages.values()):
        return IDENTICAL
    same_plan = not dig(stages, "select", "different", default=[])
    if same_plan and figures and all(entry["near"] for entry in figures.values()):
        return EQUAL
    return DIFFERENT


# --- the environment --------------------------------------------------------------------------------------------------


def environment(then_versions: Mapping[str, Any], then_hardware: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What differs from the first run, each graded: patch, minor or major version, absent, hardware."""
    rows = []
    now_versions, now_hardware = versions(), hardware()
    for name in [*then_versions, *(name for name in now_versions if name not in then_versions)]:
        a, b = then_versions.get(name), now_versions.get(name)
        if a != b:
            rows.append({"what": name, "then": a, "now": b, "grade": version_grade(a, b)})
    for name in ("system", "cpu", "cores", "gpu"):
        a, b = then_hardware.get(name), now_hardware.get(name)
        if a != b:
            rows.append({"what": name, "then": a, "now": b, "grade": "other hardware"})
    return rows


def version_grade(then: str | None, now: str | None) -> str:
    """How far apart two versions are: the first part that differs."""
    if then is None or now is None:
        return "absent before" if then is None else "absent now"
    a, b = (re.findall(r"\d+", version.partition("+")[0]) for version in (then, now))
    for grade, (x, y) in zip(
        ("major version", "minor version", "patch version"), zip(a, b, strict=False), strict=False
    ):
        if x != y:
            return grade
    return "other build"
