"""What each stage depends on, and the key that says whether a result still belongs to its settings."""

from __future__ import annotations

import functools
import glob
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .files import sha256_file

STAGES = ("profile", "select", "sample", "distill", "evaluate", "export")

# Raise a stage's number when its code comes to write something else for the same settings.
SCHEMA: dict[str, int] = dict.fromkeys(STAGES, 1) | {"profile": 3, "select": 2}

UPSTREAM: dict[str, tuple[str, ...]] = {
    "profile": (),
    "select": ("profile",),
    "sample": (),
    "distill": ("select", "sample"),
    "evaluate": ("distill",),
    "export": ("evaluate",),  # the card tells what was measured
}
# Gates are in none: a bound judges a result, it does not change it.
SECTIONS: dict[str, tuple[str, ...]] = {
    "profile": ("model", "text.calibration", "profile"),
    "select": ("select", "compare"),
    "sample": ("model", "text.calibration", "sample"),
    "distill": ("distill", "compare"),
    "evaluate": ("evaluate", "text.heldout"),
    "export": ("export",),
}
IMAGE_SECTIONS: dict[str, tuple[str, ...]] = {  # of recipes of image and video models
    **SECTIONS,
    "profile": ("model", "images", "profile"),
    "sample": ("model", "images", "sample"),
    "evaluate": ("evaluate",),
}
READS_PLAN = ("distill", "evaluate", "export")


def stage_key(stage: str, recipe: Mapping[str, Any], plan: Path) -> str:
    """Hash of everything that the stage's result depends on; `recipe` is plain data with all defaults filled in."""
    parts = {
        "stage": stage,
        "schema": SCHEMA[stage],
        "recipe": {name: _section(recipe, name) for name in sections_of(recipe)[stage]},
        "upstream": {name: stage_key(name, recipe, plan) for name in UPSTREAM[stage]},
        "plan": _plan_hash(plan) if stage in READS_PLAN else None,
    }
    return _hash(parts)


def sections_of(recipe: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """By stage the sections of the recipe that it reads; `recipe` is plain data."""
    known = IMAGE_SECTIONS if "images" in recipe else SECTIONS
    if recipe.get("operators"):  # those of its own: what is measured of them is measured again where they change
        known = {**known, "profile": (*known["profile"], "operators")}
    return known


def upstream(stage: str) -> tuple[str, ...]:
    """Every stage whose result the stage reads, directly or through others, in their order."""
    needed: set[str] = set()
    waiting = list(UPSTREAM[stage])
    while waiting:
        name = waiting.pop()
        needed.add(name)
        waiting.extend(UPSTREAM[name])
    return tuple(name for name in STAGES if name in needed)


@functools.lru_cache(maxsize=4096)
def _file_hash(path: str, size: int, modified: int) -> str:
    """Of a file's content; size and time of change are there so that a changed file is read again."""
    return sha256_file(Path(path))


def _contents(value: Any) -> Any:
    """A text section with the hashes of its files beside their names: editing a text makes old what was made of it."""
    patterns = value.get("files") if isinstance(value, Mapping) else None
    if not patterns:
        return value
    found = sorted({name for pattern in patterns for name in glob.glob(pattern, recursive=True)})  # noqa: PTH207
    files = [(name, Path(name).stat()) for name in found if Path(name).is_file()]
    return {**value, "contents": {name: _file_hash(name, s.st_size, s.st_mtime_ns) for name, s in files}}


def _section(recipe: Mapping[str, Any], dotted: str) -> Any:
    value: Any = recipe
    for name in dotted.split("."):
        value = value[name]
    if dotted == "operators":
        return {name: sha256_file(Path(name)) for name in value if Path(name).is_file()}
    if dotted == "images":
        files = [Path(value[name]) for name in ("conditions", "prompts", "classifier") if value[name]]
        return {**value, "contents": {path.name: sha256_file(path) for path in files if path.is_file()}}
    return _contents(value) if dotted.startswith("text.") else value


def _plan_hash(path: Path) -> str | None:
    """Hash of what the plan says: comments, order and spacing may change without making a result old."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        return _hash(yaml.safe_load(text))
    except (yaml.YAMLError, TypeError, ValueError):
        return hashlib.sha256(text.encode()).hexdigest()  # whoever reads it says what is wrong


def _hash(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
