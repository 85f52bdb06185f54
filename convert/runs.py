"""A run: the folder that holds a conversion, stage by stage, and continues after any interruption.

    <run>/recipe.yaml      the resolved recipe
    <run>/plan.yaml        what `select` decided; a person may edit it
    <run>/manifest.json    versions, hardware, seeds, hashes, time and memory of every stage, metrics
    <run>/<stage>/key      which settings the work in this folder belongs to
    <run>/<stage>/done.json  written last: the stage is finished and its files are on the disk

A stage's key hashes what it depends on: its sections of the recipe, the keys of the stages it reads, the plan, and
the version of its code's output. A stage is done when its marker holds its present key; anything else is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .errors import AttnConvertError, UsageError
from .files import PARTIAL, disk_errors, flush, remove_partial, sha256_file, write_json, write_text
from .integrity import SUMS
from .keys import STAGES, stage_key, upstream
from .locks import LOCK, only_process
from .machine import Meter, hardware, versions
from .recipe import AnyRecipe, dump_recipe, load_recipe

FOLDERS = {"sample": "samples", "evaluate": "evaluation"}
RECIPE, PLAN, MANIFEST, KEY, DONE = "recipe.yaml", "plan.yaml", "manifest.json", "key", "done.json"

log = logging.getLogger("attnconvert")


def is_run(folder: Path) -> bool:
    """Whether a folder is a run, and not a checkpoint, which has the recipe that made it beside its weights."""
    return (folder / RECIPE).is_file() and not (folder / SUMS).is_file()


class Run:
    """One run directory and its recipe; make it with `Run.create` or `Run.open`."""

    def __init__(self, path: Path, recipe: AnyRecipe) -> None:
        self.path = path
        self.recipe = recipe

    @classmethod
    def create(cls, recipe: AnyRecipe, folder: Path) -> Run:
        """Starts a run in `folder`, or takes up the one that is there with the settings of `recipe`.

        Raises:
            UsageError: the folder holds something else: other files, a run of another recipe, another process.
            PreflightError: nothing can be written there.
        """
        cls.foresee(recipe, folder)
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with only_process(folder):
            if (folder / RECIPE).exists():  # another process may have been here since
                _refuse_other(recipe, folder)
            text = dump_recipe(recipe)
            run = cls(folder, recipe)
            run._describe(text)  # before the recipe: one without a manifest is a person's own
            if not (folder / RECIPE).exists() or (folder / RECIPE).read_text(encoding="utf-8") != text:
                write_text(folder / RECIPE, text)
        return run

    @classmethod
    def foresee(cls, recipe: AnyRecipe, folder: Path) -> Run:
        """The run that `create` would begin or take up, refused for the same reasons; nothing is written."""
        _refuse_foreign(folder)
        if (folder / RECIPE).exists():
            _refuse_other(recipe, folder)
        return cls(folder, recipe)

    @classmethod
    def open(cls, folder: Path) -> Run:
        """The run in `folder`; UsageError if there is none."""
        if (folder / SUMS).is_file():
            raise UsageError(f"{folder} is an exported checkpoint, not a run directory: give the run that it came from")
        if not (folder / RECIPE).is_file():
            what = "has no recipe.yaml" if folder.is_dir() else "does not exist"
            raise UsageError(f"{folder} is no run directory, it {what}: start one with `attnconvert run RECIPE --out`")
        return cls(folder, load_recipe(str(folder / RECIPE)))

    def folder(self, stage: str) -> Path:
        return self.path / FOLDERS.get(stage, stage)

    @property
    def plan(self) -> Path:
        return self.path / PLAN

    def key(self, stage: str) -> str:
        """Hash of everything that the stage's result depends on."""
        return stage_key(stage, self.recipe.model_dump(mode="json"), self.plan)

    def is_done(self, stage: str) -> bool:
        """Finished with the present settings, and none of its files was taken away since."""
        marker = self._marker(stage)
        if marker is None or marker.get("key") != self.key(stage):
            return False
        folder = self.folder(stage)
        return all((folder / name).exists() for name in marker.get("files", ())) and (
            stage != "select" or self.plan.exists()
        )

    def stale(self, stage: str) -> bool:
        """Finished, but with settings, a plan or earlier stages that have changed since."""
        marker = self._marker(stage)
        return marker is not None and marker.get("key") != self.key(stage)

    def unfinished(self, stage: str) -> tuple[str, ...]:
        """The stages that must run before `stage` can, in their order."""
        return tuple(name for name in upstream(stage) if not self.is_done(name))

    def lock(self) -> AbstractContextManager[None]:
        """Keeps other processes out of the run; stages and records take it by themselves. UsageError if one is in."""
        return only_process(self.path)

    @contextmanager
    def stage(self, name: str) -> Iterator[Path]:
        """The folder in which the stage does its work; leaving without an exception marks it as done.

        Work of other settings is removed first, unfinished work of these settings is kept: the stage continues it.
        After an exception or a kill the stage is not done and the folder holds what was finished.
        """
        folder = self.folder(name)
        with self.lock(), disk_errors(folder):
            key = self.key(name)  # now: what is done belongs to the settings it started with
            spent = self._prepare(name, key)
            meter = Meter()
            try:
                yield folder
            except BaseException:
                with suppress(OSError, AttnConvertError):  # the first error is the one to tell
                    write_text(folder / KEY, _key_text(key, spent + meter.read()["seconds"]))
                raise
            self._finish(name, key, spent, meter)

    def record(self, *, model: Mapping[str, Any] | None = None, metrics: Mapping[str, Any] | None = None) -> None:
        """Adds to the manifest: the model {"name", "revision", "sha256": {file: hash}}, and figures by name.

        Raises:
            UsageError: the run began with a model of the same name whose files were different.
        """
        with self.lock():
            manifest = self.manifest()
            if model is not None:
                known = manifest.get("model", {}).get("sha256", {})
                changed = [name for name, value in model.get("sha256", {}).items() if known.get(name, value) != value]
                if changed and any(self._marker(name) for name in STAGES):
                    raise UsageError(
                        f"{changed[0]} has changed since {self.path} was begun: put the old file back, or start again "
                        "with another --out"
                    )
                manifest["model"] = {**manifest.get("model", {}), **model}
            manifest.setdefault("metrics", {}).update(metrics or {})
            write_json(self.path / MANIFEST, manifest)

    def manifest(self) -> dict[str, Any]:
        found = _read(self.path / MANIFEST)
        return {"schema": 1, "stages": {}, **(found or {})}

    def _marker(self, stage: str) -> dict[str, Any] | None:
        return _read(self.folder(stage) / DONE)

    def _describe(self, recipe_text: str) -> None:
        manifest = self.manifest()
        manifest.setdefault("created", _now())
        manifest["command"] = _command()
        manifest["recipe"] = {"name": self.recipe.name, "sha256": hashlib.sha256(recipe_text.encode()).hexdigest()}
        manifest["seeds"] = dict(_seeds(self.recipe.model_dump(mode="json")))
        manifest["versions"] = versions()
        manifest["hardware"] = hardware()
        write_json(self.path / MANIFEST, manifest)

    def _prepare(self, name: str, key: str) -> float:
        """Makes the folder ready for work under `key`; returns the seconds that earlier attempts spent on it."""
        folder = self.folder(name)
        folder.mkdir(parents=True, exist_ok=True)
        remove_partial(folder)
        remove_partial(self.path, RECIPE, PLAN, MANIFEST)
        if name == "select":
            self._keep_edited_plan()
        (folder / DONE).unlink(missing_ok=True)
        held, spent = _read_key(folder / KEY)
        if held == key:
            return spent
        # The key goes first and comes back last: killed in between, the rest counts as unknown and is removed.
        (folder / KEY).unlink(missing_ok=True)
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        if name == "select":
            self.plan.unlink(missing_ok=True)
        manifest = self.manifest()
        manifest.get("files", {}).pop(name, None)
        if manifest["stages"].pop(name, None):
            write_json(self.path / MANIFEST, manifest)
        write_text(folder / KEY, _key_text(key, 0.0))
        return 0.0

    def _keep_edited_plan(self) -> None:
        """A plan that a person changed is put aside before `select` writes another one."""
        marker = self._marker("select")
        if marker is None or not self.plan.exists() or marker.get("plan") == sha256_file(self.plan):
            return
        number = 1
        while (kept := self.path / f"plan.edited-{number}.yaml").exists():
            number += 1
        self.plan.rename(kept)
        log.warning("select runs again: the edited %s is kept as %s", PLAN, kept.name)

    def _finish(self, name: str, key: str, spent: float, meter: Meter) -> None:
        folder = self.folder(name)
        if name == "select" and not self.plan.exists():
            raise RuntimeError(f"select ended without writing {self.plan}")
        remove_partial(folder)
        files = {}
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.relative_to(folder).as_posix() not in (KEY, DONE):
                flush(path)  # not everything is written through files.py
                files[path.relative_to(folder).as_posix()] = sha256_file(path)
        measured = meter.read()
        measured["seconds"] = round(spent + measured["seconds"], 3)
        marker: dict[str, Any] = {"key": key, **measured, "finished": _now(), "files": files}
        if name == "select":
            marker["plan"] = sha256_file(self.plan)
        manifest = self.manifest()
        manifest["stages"][name] = {field: value for field, value in marker.items() if field not in ("files", "plan")}
        manifest.setdefault("files", {})[name] = files
        if name == "select":
            manifest["plan"] = marker["plan"]
        manifest["versions"] = versions()
        manifest["hardware"] = hardware()
        write_json(self.path / MANIFEST, manifest)
        write_json(folder / DONE, marker)


def _refuse_foreign(folder: Path) -> None:
    """A folder that is no run stays untouched, down to the lock file."""
    if not folder.exists():
        parent = next(place for place in folder.absolute().parents if place.exists())
        if not parent.is_dir():
            raise UsageError(f"{folder} cannot be made: {parent} is a file; use another --out")
        return
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file, not a folder: use another --out")
    if (folder / SUMS).exists():
        raise UsageError(f"{folder} is an exported checkpoint, not a run: use another --out")
    if (folder / RECIPE).exists():
        if not (folder / MANIFEST).exists():  # a person's own, which would be written over
            raise UsageError(f"{folder} holds a {RECIPE} but no run ({MANIFEST} is missing): use another --out")
        return
    for entry in folder.iterdir():
        if entry.name not in (LOCK, MANIFEST) and not entry.name.startswith(PARTIAL):
            raise UsageError(f"{folder} is not empty and is no run ({entry.name} is in it): use another --out")


def _refuse_other(recipe: AnyRecipe, folder: Path) -> None:
    try:
        present = load_recipe(str(folder / RECIPE))
    except UsageError as error:
        raise UsageError(f"the run in {folder} cannot be continued, use another --out: {error}") from error
    if present.name != recipe.name:
        raise UsageError(f"{folder} is a run of recipe {present.name!r}, not of {recipe.name!r}: use another --out")
    if present.model != recipe.model:
        raise UsageError(
            f"{folder} was begun with another model: {_short(present.model)}, not {_short(recipe.model)}; "
            "use another --out"
        )


def _short(model: Any) -> str:
    return json.dumps(model.model_dump(mode="json", exclude_none=True), ensure_ascii=False)


def _seeds(value: Any, where: str = "") -> Iterator[tuple[str, int]]:
    """("profile.seed", 0) and so on, for every seed of the recipe."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        if name == "seed":
            yield f"{where}seed", inner
        else:
            yield from _seeds(inner, f"{where}{name}.")


def _key_text(key: str, seconds: float) -> str:
    return f"{key}\n{seconds:.3f}\n"


def _read_key(path: Path) -> tuple[str | None, float]:
    try:
        key, seconds = path.read_text(encoding="utf-8").split()
        return key, float(seconds)
    except (OSError, ValueError):
        return None, 0.0


def _read(path: Path) -> dict[str, Any] | None:
    """A marker or manifest; None if absent or damaged from outside, in which case the work is done again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _command() -> str:
    program = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
    return shlex.join(["attnconvert" if program == "__main__.py" else program, *sys.argv[1:]])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
