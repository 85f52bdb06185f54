"""Two runs or checkpoints side by side: recipe, plan, figures, weights and versions. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .artefacts import dig
from .checkpoints import block_of, is_exported, model_folder
from .errors import UsageError
from .files import read_json
from .integrity import check_weights
from .runs import DONE, MANIFEST, PLAN, RECIPE, is_run

NO_FIGURES = ("speed", "gates", "export", "export_format")  # metrics of a manifest that are times or verdicts
Values = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Side:
    """What is known of a run or a checkpoint; {} where it does not say.

    `plan` has the operators of each site by label, `weights` a digest per tensor, `figures` what was measured.
    """

    name: str
    recipe: Values
    plan: Mapping[str, tuple[str, ...]]
    figures: Values
    weights: Mapping[str, str]
    versions: Values


def read_side(folder: Path) -> Side:
    """A run, or a checkpoint that was exported.

    Raises:
        UsageError: it is neither.
    """
    if is_run(folder):
        manifest, exported = _json(folder / MANIFEST), folder / "export"
        plan = _plan_file(folder / PLAN)
        weights = tensor_digests(exported) if (exported / DONE).is_file() and is_exported(exported) else {}
    elif is_exported(folder):
        manifest, block = _json(folder / MANIFEST), block_of(folder)
        assert block is not None
        plan = {name: tuple(entry["groups"]) for name, entry in block["sites"].items()}
        weights = tensor_digests(folder)
    else:
        what = "is neither a run nor an exported checkpoint" if folder.exists() else "does not exist"
        raise UsageError(f"{folder} {what}: give folders that `attnconvert run` or `attnconvert export` wrote")
    return Side(
        name=str(folder),
        recipe=dict(flat(_yaml(folder / RECIPE))),
        plan=plan,
        figures=figures_of(manifest),
        weights=weights,
        versions=dig(manifest, "versions", default={}),
    )


def compare(a: Side, b: Side) -> dict[str, Any]:
    """What differs: {"a", "b", "same", "recipe", "plan", "figures", "weights", "versions"}; figures side by side."""
    found: dict[str, Any] = {
        "a": a.name,
        "b": b.name,
        "recipe": {key: pair for key, pair in _changed(a.recipe, b.recipe).items() if not _same_name(*pair)},
        "plan": _plans(a.plan, b.plan),
        "figures": _figures_of_both(a.figures, b.figures),
        "weights": _weights(a.weights, b.weights),
        "versions": _changed(a.versions, b.versions),
    }
    same = not found["recipe"] and not found["plan"]["sites"] and not found["weights"]["different"]
    return {**found, "same": same and not found["weights"]["only_a"] and not found["weights"]["only_b"]}


def _changed(a: Values, b: Values) -> dict[str, list[Any]]:
    """{key: [in a, in b]}; None where a side has no such key."""
    keys = [*a, *(key for key in b if key not in a)]
    return {key: [a.get(key), b.get(key)] for key in keys if a.get(key) != b.get(key)}


def _same_name(a: Any, b: Any) -> bool:
    """Whether one is the other without its folder, as a checkpoint's recipe names what a run's has the path of."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(x == y or _same_name(x, y) for x, y in zip(a, b, strict=True))
    if not isinstance(a, str) or not isinstance(b, str) or Path(a).is_absolute() == Path(b).is_absolute():
        return False
    return Path(a).name == b or Path(b).name == a


def _plans(a: Mapping[str, tuple[str, ...]], b: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """The groups that became something else: how many of what became what, and the sites."""
    sites: dict[str, list[list[str]]] = {}
    moved: Counter[tuple[str, str]] = Counter()
    for name in [*a, *(name for name in b if name not in a)]:
        groups = len(a.get(name) or b[name])
        before, after = (side.get(name, ("full",) * groups) for side in (a, b))
        if before != after:
            sites[name] = [list(before), list(after)]
            moved.update((old, new) for old, new in zip(before, after, strict=False) if old != new)
    total = sum(len(groups) for groups in (a or b).values())
    changes = [{"from": old, "to": new, "groups": count} for (old, new), count in moved.most_common()]
    return {"groups": total, "changed": sum(moved.values()), "changes": changes, "sites": sites}


def _figures_of_both(a: Values, b: Values) -> dict[str, list[Any]]:
    return {key: [a.get(key), b.get(key)] for key in [*a, *(key for key in b if key not in a)]}


def _weights(a: Mapping[str, str], b: Mapping[str, str]) -> dict[str, Any]:
    both = [name for name in a if name in b]
    return {
        "equal": sum(a[name] == b[name] for name in both),
        "different": [name for name in both if a[name] != b[name]],
        "only_a": [name for name in a if name not in b],
        "only_b": [name for name in b if name not in a],
    }


# --- reading ----------------------------------------------------------------------------------------------------------


def tensor_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each tensor's type, shape and bytes, by its name, of all safetensors of a checkpoint's model."""
    found: dict[str, str] = {}
    for file in sorted(model_folder(folder).glob("*.safetensors")):
        check_weights(file)
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                start, end = entry["data_offsets"]
                digest = hashlib.sha256(json.dumps([entry["dtype"], entry["shape"]]).encode())
                stream.seek(8 + size + start)
                left = end - start
                while left:
                    part = stream.read(min(left, 1 << 24))
                    digest.update(part)
                    left -= len(part)
                found[name] = digest.hexdigest()
    return found


def figures_of(manifest: Values) -> dict[str, float]:
    """What was measured of the student, by dotted names, without times, which are of the machine."""
    metrics = {key: value for key, value in dig(manifest, "metrics", default={}).items() if key not in NO_FIGURES}
    return {key: value for key, value in flat(metrics) if isinstance(value, int | float)}


def flat(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves by dotted names; lists are leaves."""
    if not isinstance(value, Mapping):
        yield where, value
        return
    for key, inner in value.items():
        yield from flat(inner, f"{where}.{key}" if where else str(key))


def _plan_file(path: Path) -> dict[str, tuple[str, ...]]:
    sites = dig(_yaml(path), "sites", default={})
    return {name: tuple(groups) for name, groups in sites.items()}


def _yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    return found if isinstance(found, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    found = read_json(path) if path.is_file() else {}
    return found if isinstance(found, dict) else {}
