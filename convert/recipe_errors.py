"""Recipe YAML with positions, and pydantic's findings told as `file:line:column: key: what is wrong; what to do`."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from .errors import UsageError, one_line

Key = str | int
Path = tuple[Key, ...]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong with a recipe; `line` and `column` count from 1 and are None for a `--set`."""

    origin: str
    line: int | None
    column: int | None
    key: str
    message: str

    def __str__(self) -> str:
        parts = (self.origin, self.line, self.column, f" {self.key}" if self.key else None, f" {self.message}")
        return ":".join(str(part) for part in parts if part is not None)


class RecipeError(UsageError):
    """A recipe that cannot be used; its text lists every problem, one per line."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def did_you_mean(given: object, known: Sequence[str]) -> str:
    """`; did you mean 'window'?`, or nothing when nothing is close."""
    close = difflib.get_close_matches(str(given), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def dotted(path: Sequence[Key]) -> str:
    return ".".join(str(key) for key in path)


# --- YAML -------------------------------------------------------------------------------------------------------------

FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$")


class _Loader(yaml.SafeLoader):
    """Scalars as YAML 1.2 has them: `1e-4` is a number; `no`, `12:30` and `2024-01-31` are text; `010` is ten."""


_Loader.yaml_implicit_resolvers = {}

for _tag, _pattern, _first in (
    ("null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"[-+]?[0-9]+$"), list("-+0123456789")),
    ("float", FLOAT, list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)


@dataclass
class Located:
    """Plain data read from YAML, where each of its keys stands, and what was wrong with the YAML itself."""

    data: Any = None
    positions: dict[Path, tuple[int, int]] = field(default_factory=dict)  # of keys and list items
    values: dict[Path, tuple[int, int]] = field(default_factory=dict)
    findings: list[tuple[tuple[int, int], Path, str]] = field(default_factory=list)


def read_yaml(text: str) -> Located:
    """Read one YAML document.

    Raises:
        yaml.YAMLError: `text` is not YAML. Duplicate keys and tags become findings instead.
    """
    located = Located()
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
    finally:
        loader.dispose()
    if node is not None:
        located.data = _value(node, (), located, ())
    return located


def _place(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _value(node: yaml.Node, path: Path, located: Located, parents: tuple[int, ...]) -> Any:
    located.values[path] = _place(node)
    if id(node) in parents:
        located.findings.append((_place(node), path, "an alias that contains itself"))
        return None
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, located, (*parents, id(node)))
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            located.positions[(*path, index)] = _place(item)
            items.append(_value(item, (*path, index), located, (*parents, id(node))))
        return items
    return _scalar(node, path, located)


def _mapping(node: yaml.MappingNode, path: Path, located: Located, parents: tuple[int, ...]) -> dict[Key, Any]:
    result: dict[Key, Any] = {}
    for key_node, value_node in node.value:
        key = _scalar(key_node, path, located) if isinstance(key_node, yaml.ScalarNode) else None
        if isinstance(key, bool) or not isinstance(key, str | int):
            located.findings.append((_place(key_node), path, "a key must be plain text or a whole number"))
        elif key in result:
            line = located.positions[(*path, key)][0]
            located.findings.append((_place(key_node), (*path, key), f"this key is given twice, first in line {line}"))
        else:
            located.positions[(*path, key)] = _place(key_node)
            result[key] = _value(value_node, (*path, key), located, parents)
    return result


def _scalar(node: yaml.Node, path: Path, located: Located) -> Any:
    kind, text = node.tag.rpartition(":")[2], str(node.value)
    if not node.tag.startswith("tag:yaml.org,2002:") or kind not in ("null", "bool", "int", "float", "str"):
        located.findings.append((_place(node), path, f"the tag {node.tag!r} has no meaning in a recipe"))
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    try:
        return int(text) if kind == "int" else float(text) if kind == "float" else text
    except ValueError:  # `!!int abc`, or more digits than Python converts
        return text


# --- what pydantic found ----------------------------------------------------------------------------------------------


def findings(error: ValidationError, root: type[BaseModel]) -> Iterator[tuple[Path, str]]:
    """Every finding of `error` as the path of its key and a message."""
    every = error.errors(include_url=False)
    for details in every:
        path: Path = tuple(key for key in details["loc"] if key != "[key]")
        inside = [other for other in every if other is not details and other["loc"][: len(path)] == details["loc"]]
        if details["type"] == "too_short" and inside:
            continue  # its items are wrong and told one by one
        yield path, _tell(details, path, root)


def _tell(details: ErrorDetails, path: Path, root: type[BaseModel]) -> str:
    kind, given, context = details["type"], details["input"], details.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown(path, root)
    if kind == "missing":
        return f"is missing: {_purpose(root, path)}"
    if kind == "literal_error":
        known = re.findall(r"'([^']+)'", str(context["expected"]))
        return f"must be one of {', '.join(known)}, not {show(given)}{did_you_mean(given, known)}"
    if kind == "string_type" and isinstance(given, int | float):
        return f"must be text, not {show(given)}; put it in quotes: '{show(given)}'"
    if kind in _EXPECTED:
        return f"must be {_EXPECTED[kind]}, not {show(given)}"
    if kind in _BOUNDS:
        word, bound = _BOUNDS[kind]
        return f"must be {word} {context[bound]:g}, not {show(given)}"
    if kind == "string_pattern_mismatch":
        return f"must match {context['pattern']}, not {show(given)} ({_purpose(root, path)})"
    return str(context["message"]) if kind == "recipe" else f"{one_line(details['msg'])}, not {show(given)}"


_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "model_type": "a section of keys and values",
    "model_attributes_type": "a section of keys and values",
    "dict_type": "a section of keys and values",
    "tuple_type": "a list in [brackets]",
    "too_short": "a list of at least one",
}
_BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}


def show(given: object) -> str:
    """A value the way the recipe has it, short enough for one line."""
    if given is None or isinstance(given, bool):
        return {None: "null", True: "true", False: "false"}[given]
    if isinstance(given, Mapping):
        return "a section" if given else "an empty section"
    if isinstance(given, list | tuple):
        return "a list" if given else "an empty list"
    return one_line(repr(given), 60)


def _purpose(root: type[BaseModel], path: Path) -> str:
    section = section_at(root, path[:-1])
    known = section.model_fields.get(str(path[-1])) if section else None
    return (known.description if known else None) or "needed here"


def _unknown(path: Path, root: type[BaseModel]) -> str:
    section, name = section_at(root, path[:-1]), path[-1]
    known = list(section.model_fields) if section else []
    below = [dotted((*path[:-1], *other)) for other in _all_keys(section, ()) if other[-1] == name] if section else []
    elsewhere = [dotted(other) for other in _all_keys(root, ()) if other[-1] == name]
    hint = did_you_mean(name, known)
    if below or (elsewhere and not hint):
        hint = f"; did you mean {' or '.join(repr(other) for other in (below or elsewhere)[:3])}?"
    return f"unknown key{hint or '; known are ' + ', '.join(known)}"


def section_at(annotation: Any, path: Path) -> type[BaseModel] | None:
    """The section that `path` leads to from a type, None where it leads to no section."""
    origin = typing.get_origin(annotation)
    if origin in (types.UnionType, typing.Union):
        inner = [arm for arm in typing.get_args(annotation) if arm is not type(None)]
        return section_at(inner[0], path) if len(inner) == 1 else None
    if origin in (tuple, dict) and path:
        return section_at(typing.get_args(annotation)[-1 if origin is dict else 0], path[1:])
    if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return None
    if not path:
        return annotation
    known = annotation.model_fields.get(str(path[0]))
    return section_at(known.annotation, path[1:]) if known else None


def _all_keys(root: type[BaseModel], start: Path) -> Iterator[Path]:
    for name, info in root.model_fields.items():
        yield (*start, name)
        section = section_at(info.annotation, ())
        if section is not None:
            yield from _all_keys(section, (*start, name))
