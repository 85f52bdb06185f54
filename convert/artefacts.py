"""What a run directory holds by now, read for showing: what is absent or damaged is left out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .errors import UsageError
from .keys import STAGES
from .runs import FOLDERS, MANIFEST, PLAN, RECIPE, Run, is_run
from .wording import IMAGES, TEXT, Wording


@dataclass(frozen=True, kw_only=True)
class Site:
    """A column of the maps. Without a profile the heads are not known and each KV group stands for one."""

    name: str
    layer: int
    heads: int
    kv_heads: int

    @property
    def per_group(self) -> int:
        return max(1, self.heads // max(1, self.kv_heads))


@dataclass(frozen=True, kw_only=True)
class Artefacts:
    """Plain data of every stage; {} where a stage has written nothing. `status` is done, old, begun or absent.

    `folder` is that of the run.
    """

    recipe_text: str
    recipe: Mapping[str, Any]
    manifest: Mapping[str, Any]
    profile: Mapping[str, Any]
    plan: Mapping[str, Any]
    select: Mapping[str, Any]
    front: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    logs: Mapping[str, Sequence[Mapping[str, Any]]]
    status: Mapping[str, str]
    folder: Path

    @property
    def images(self) -> bool:
        """Whether it is of an image or video model."""
        return "images" in self.recipe

    @property
    def words(self) -> Wording:
        """What its figures are called."""
        return IMAGES if self.images else TEXT

    @property
    def sites(self) -> list[Site]:
        if self.profile.get("sites"):
            return [Site(**{field: site[field] for field in Site.__annotations__}) for site in self.profile["sites"]]
        return [
            Site(name=name, layer=layer, heads=len(groups), kv_heads=len(groups))
            for layer, (name, groups) in enumerate(dig(self.plan, "sites", default={}).items())
        ]

    @property
    def others(self) -> list[str]:
        """The arms of the evaluation beside teacher and student."""
        return [arm for arm in dig(self.evaluation, "arms", default={}) if arm not in ("teacher", "student")]


def read_artefacts(folder: Path) -> Artefacts:
    """UsageError if `folder` is no run directory."""
    if not is_run(folder):
        raise UsageError(f"{folder} is no run directory: it has no {RECIPE}")
    places = {stage: folder / FOLDERS.get(stage, stage) for stage in STAGES}
    text = (folder / RECIPE).read_text(encoding="utf-8")
    return Artefacts(
        recipe_text=text,
        recipe=_yaml(text),
        manifest=_json(folder / MANIFEST),
        profile=_json(places["profile"] / "profile.json"),
        plan=_yaml((folder / PLAN).read_text(encoding="utf-8")) if (folder / PLAN).is_file() else {},
        select=_json(places["select"] / "select.json"),
        front=_json(places["select"] / "front.json"),
        evaluation=_json(places["evaluate"] / "evaluation.json"),
        logs={path.parent.name: _lines(path) for path in sorted(places["distill"].glob("*/log.jsonl"))},
        status=_status(folder, places),
        folder=folder,
    )


def dig(document: Any, *path: str | int, default: Any = None) -> Any:
    """`document[path[0]][path[1]]…`, or the default where any of it is absent or None."""
    for key in path:
        try:
            document = document[key]
        except (KeyError, IndexError, TypeError):
            return default
    return default if document is None else document


def _status(folder: Path, places: Mapping[str, Path]) -> dict[str, str]:
    try:
        run = Run.open(folder)
    except UsageError:  # a recipe of another version: what is finished can still be shown
        return {stage: "done" if (place / "done.json").exists() else "absent" for stage, place in places.items()}
    found = {}
    for stage, place in places.items():
        if run.is_done(stage):
            found[stage] = "done"
        elif run.stale(stage):
            found[stage] = "old"
        else:
            found[stage] = "begun" if (place / "key").exists() else "absent"
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _yaml(text: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    """The steps of a log, in order; a step that was done twice, before and after a resumption, counts once."""
    steps: dict[tuple[str, int], dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            steps[str(line.get("phase", "")), int(line["step"])] = line
        except (ValueError, TypeError, KeyError, AttributeError):
            continue  # the last line of a killed process
    phases = list(dict.fromkeys(phase for phase, _ in steps))
    return [steps[key] for key in sorted(steps, key=lambda key: (phases.index(key[0]), key[1]))]
