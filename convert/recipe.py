"""Recipes: reading one, with every error at once, and writing it back. Imports neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ..kernels.spec import Spec, spec_to_dict
from .errors import UsageError, one_line
from .recipe_errors import (
    FLOAT,
    Key,
    Located,
    Problem,
    RecipeError,
    did_you_mean,
    dotted,
    findings,
    read_yaml,
    section_at,
)
from .recipe_images import ImageRecipe
from .recipe_inputs import ModelSource, PackageFile, TextDataset, TextPackage, TextSource, TextSources
from .recipe_schema import (
    Arm,
    DistillSettings,
    EvaluateSettings,
    ExportSettings,
    Gates,
    LoraSettings,
    NeedleSettings,
    ProfileSettings,
    Recipe,
    SampleSettings,
    SelectSettings,
    SpeedSettings,
    TransferSettings,
)

__all__ = [
    "AnyRecipe",
    "Arm",
    "DistillSettings",
    "EvaluateSettings",
    "ExportSettings",
    "Gates",
    "ImageRecipe",
    "LoraSettings",
    "ModelSource",
    "NeedleSettings",
    "PackageFile",
    "Problem",
    "ProfileSettings",
    "Recipe",
    "RecipeError",
    "SampleSettings",
    "SelectSettings",
    "SpeedSettings",
    "TextDataset",
    "TextPackage",
    "TextSource",
    "TextSources",
    "TransferSettings",
    "dump_recipe",
    "json_schema",
    "load_recipe",
    "parse_recipe",
    "recipe_text",
    "shipped_recipes",
]


AnyRecipe = Recipe | ImageRecipe  # the section `images` tells them apart


# --- finding ----------------------------------------------------------------------------------------------------------


def shipped_recipes() -> dict[str, str]:
    """The recipes that come with attnconvert: name and description."""
    found = {}
    for entry in (files("attnconvert") / "recipes").iterdir():
        if entry.name.endswith(".yaml"):
            data = read_yaml(entry.read_text(encoding="utf-8")).data
            found[entry.name.removesuffix(".yaml")] = str(data.get("description", ""))
    return dict(sorted(found.items()))


def recipe_text(name: str) -> str:
    """The YAML of a shipped recipe, as it stands in its file.

    Raises:
        UsageError: no recipe of that name is shipped.
    """
    if name not in shipped_recipes():
        known = list(shipped_recipes())
        raise UsageError(f"no recipe {name!r}; shipped are {', '.join(known)}{did_you_mean(name, known)}")
    return (files("attnconvert") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> AnyRecipe:
    """The recipe of a file, or of a shipped name, with `section.key=value` overrides applied.

    Raises:
        RecipeError: it has errors, all of which are told.
        UsageError: there is no such recipe.
    """
    given = str(path_or_name)
    if given in shipped_recipes():
        return parse_recipe(recipe_text(given), given, overrides, folder=Path(str(files("attnconvert") / "recipes")))
    path = Path(given)
    if path.is_dir():
        raise UsageError(f"{given} is a folder; a recipe is a YAML file or one of {', '.join(shipped_recipes())}")
    if not path.exists():
        known = list(shipped_recipes())
        hint = did_you_mean(path.name.removesuffix(".yaml"), known)
        raise UsageError(f"no recipe {given!r}: neither a file nor a shipped name ({', '.join(known)}){hint}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{given} is not text in UTF-8 (byte {error.start}): is it a recipe?") from error
    except OSError as error:
        raise UsageError(f"cannot read {given}: {error.strerror}") from error
    return parse_recipe(text, given, overrides, folder=path.resolve().parent)


# --- parsing ----------------------------------------------------------------------------------------------------------


def parse_recipe(text: str, origin: str, overrides: Sequence[str] = (), *, folder: Path | None = None) -> AnyRecipe:
    """The recipe that `text` describes; `origin` names it in messages.

    Relative paths in it start from `folder` (default: the working directory, as do those in overrides).

    Raises:
        RecipeError: it has errors, all of which are told.
    """
    located = _read(text, origin)
    problems = [
        Problem(origin=origin, line=place[0], column=place[1], key=dotted(path), message=message)
        for place, path, message in located.findings
    ]
    if not isinstance(located.data, dict):
        told = "is empty" if located.data is None else "is not a mapping of keys and values"
        message = f"{told}; see `attnconvert recipes show` for recipes that work"
        raise RecipeError([*problems, Problem(origin=origin, line=1, column=1, key="", message=message)])
    _make_absolute(located.data, folder or Path.cwd())
    changed: dict[tuple[Key, ...], str] = {}
    for override in overrides:
        problem = _override(located.data, override, changed)
        if problem:
            problems.append(Problem(origin=f"--set {override}", line=None, column=None, key="", message=problem))
    _make_absolute(located.data, Path.cwd())
    kind = schema_of(located.data)
    problems += [_problem(path, message, origin, located, changed) for path, message in _register(located.data)]
    recipe: Any = None
    try:
        recipe = kind.model_validate(located.data)
    except ValidationError as error:
        problems += [_problem(path, message, origin, located, changed) for path, message in findings(error, kind)]
    if problems:
        raise RecipeError(sorted(problems, key=lambda found: (found.line or 0, found.column or 0, found.origin)))
    made: AnyRecipe = recipe
    return made


def _register(data: Mapping[Key, Any]) -> Iterator[tuple[tuple[Key, ...], str]]:
    """Makes the operators of a recipe's own files known; what is wrong with a file, at its place."""
    files_of = data.get("operators")
    for index, file in enumerate(files_of if isinstance(files_of, list) else ()):
        if isinstance(file, str) and file:
            from ..kernels import outside  # with it torch, which recipes do not need otherwise

            try:
                outside.load(Path(file))
            except Exception as error:  # whatever a foreign file raises
                yield ("operators", index), one_line(error)


def schema_of(data: Mapping[Key, Any]) -> type[Recipe] | type[ImageRecipe]:
    """Which recipe a mapping is meant to be: one of an image or video model has a section `images`."""
    return ImageRecipe if "images" in data else Recipe


def _read(text: str, origin: str) -> Located:
    try:
        return read_yaml(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        message = "not YAML: " + ", ".join(one_line(part) for part in (error.context, error.problem) if part)
        if "\\t" in message:
            message += "; indent with spaces, not tabs"
    except yaml.YAMLError as error:
        line, column, message = 1, 1, f"not YAML: {one_line(error)}"
    except RecursionError:
        line, column, message = 1, 1, "nested too deeply"
    raise RecipeError([Problem(origin=origin, line=line, column=column, key="", message=message)])


def _problem(
    path: tuple[Key, ...], message: str, origin: str, located: Located, changed: dict[tuple[Key, ...], str]
) -> Problem:
    """The finding at its place: the override that made it, or the nearest key of the file."""
    for other in reversed(changed):
        if path[: len(other)] == other or (other[: len(path)] == path and path not in located.positions):
            return Problem(origin=f"--set {changed[other]}", line=None, column=None, key=dotted(path), message=message)
    nearest = path
    while nearest and nearest not in located.positions:
        nearest = nearest[:-1]
    line, column = located.positions.get(nearest, (1, 1))
    return Problem(origin=origin, line=line, column=column, key=dotted(path), message=message)


def _override(data: dict[Key, Any], override: str, changed: dict[tuple[Key, ...], str]) -> str:
    """Write `a.b=value` into `data`; the text of the problem if that cannot be done, else ''."""
    key, equals, value = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        return "write an override as section.key=value, e.g. sample.sequences=16"
    try:
        new = read_yaml(value)
    except yaml.YAMLError as error:
        return f"the value is not YAML: {one_line(error)}"
    if new.findings:
        return new.findings[0][2]
    place: Any = data
    path: tuple[Key, ...] = ()
    for part in parts:
        if not hasattr(place, "__setitem__"):
            return f"{dotted(path)} is not a section, so it has no {part!r}"
        step = _step(place, part)
        if isinstance(place, list) and step not in range(len(place)):
            return f"{dotted(path)} is a list of {len(place)}, so it has no {part!r}; count from 0"
        path = (*path, step)
        if len(path) == len(parts):
            place[step] = new.data
            break
        if isinstance(place, dict) and place.get(step) is None:
            place[step] = _default_list(path, schema_of(data))
        place = place[step]
    changed[path] = override
    return ""


def _default_list(path: tuple[Key, ...], root: type[BaseModel]) -> Any:
    """What an override reaches into where the recipe says nothing: a default list, else an empty section."""
    section = section_at(root, path[:-1])
    known = section.model_fields.get(str(path[-1])) if section else None
    default = known.get_default(call_default_factory=True, validated_data={}) if known else None
    return _plain(default) if isinstance(default, tuple) else {}


def _step(place: Any, part: str) -> Key:
    """`part` as the key it means there: keys such as 1024 and list indices are numbers."""
    return int(part) if part.isdecimal() and not (isinstance(place, dict) and part in place) else part


def _make_absolute(data: dict[Key, Any], folder: Path) -> None:
    """Resolve the relative paths of a recipe in place; a copy of it then works from anywhere."""

    def absolute(given: Any) -> Any:
        return str(folder / Path(given).expanduser()) if isinstance(given, str) and given else given

    def resolve(section: Any, key: str) -> None:
        if isinstance(section, dict) and key in section:
            given = section[key]
            section[key] = [absolute(one) for one in given] if isinstance(given, list) else absolute(given)

    resolve(data.get("model"), "folder")
    resolve(data.get("model"), "gguf")
    resolve(data, "operators")
    for name in ("conditions", "prompts", "classifier"):
        resolve(data.get("images"), name)
    text = data.get("text")
    for side in text.values() if isinstance(text, dict) else ():
        resolve(side, "files")


# --- writing ----------------------------------------------------------------------------------------------------------


def json_schema() -> dict[str, Any]:
    """JSON Schema of recipes, for editors."""
    kinds = {kind.__name__: kind.model_json_schema() for kind in (Recipe, ImageRecipe)}
    parts: dict[str, Any] = {}
    for name, schema in kinds.items():
        parts |= schema.pop("$defs") | {name: schema}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Recipe",
        "if": {"required": ["images"]},
        "then": {"$ref": "#/$defs/ImageRecipe"},
        "else": {"$ref": "#/$defs/Recipe"},
        "$defs": parts,
    }


class _Flow(dict[Key, Any]):
    """A mapping that is written on one line."""


class _Dumper(yaml.SafeDumper):
    """Quotes what our reader would take for a number (`1e5`), and writes lists of scalars on one line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
_Dumper.add_representer(
    _Flow, lambda dumper, data: dumper.represent_mapping("tag:yaml.org,2002:map", data, flow_style=True)
)
_Dumper.add_representer(
    list,
    lambda dumper, data: dumper.represent_sequence(
        "tag:yaml.org,2002:seq", data, flow_style=not any(isinstance(item, dict) for item in data)
    ),
)


def dump_recipe(recipe: AnyRecipe) -> str:
    """The recipe as YAML with every default filled in; `parse_recipe` reads it back to an equal one."""
    return yaml.dump(_plain(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        fields = {name: getattr(value, name) for name in type(value).model_fields}
        return {
            name: _by_ranges(field) if name == "explicit" and field else _plain(field)
            for name, field in fields.items()
            if field is not None or type(value).model_fields[name].default is not None
        }
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    return _Flow(spec_to_dict(value)) if hasattr(value, "operator") else value


def _by_ranges(explicit: Mapping[int, Spec]) -> dict[Key, Any]:
    """{"11-13,19": spec} from one entry per layer."""
    layers: dict[Spec, list[int]] = {}
    for layer, spec in explicit.items():
        layers.setdefault(spec, []).append(layer)
    return {_ranges(chosen): _plain(spec) for spec, chosen in layers.items()}


def _ranges(layers: Iterable[int]) -> Key:
    def runs() -> Iterator[str]:
        for _, run in groupby(enumerate(sorted(layers)), key=lambda pair: pair[1] - pair[0]):
            first, *_, last = [layer for _, layer in run] * 2
            yield str(first) if first == last else f"{first}-{last}"

    text = ",".join(runs())
    return int(text) if text.isdecimal() else text
