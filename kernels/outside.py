"""Operators that are not ours: a file with a spec and its functions is loaded, and goes along with a checkpoint.

Such a file is written as those beside it, but imports them by their full names (`from attnconvert.kernels import ops`).
`kernels/operators.py` finds its functions by the module of its spec.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sys
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from types import ModuleType

from . import operators
from .spec import OPERATORS, Spec, nested

PACKAGE = "attnconvert.kernels"
FOUND = re.compile(r"^( *)from attnconvert\.kernels(\.\w+)? import", flags=re.M)  # made relative in a checkpoint
_loaded: dict[Path, tuple[str, ...]] = {}  # by file the operators that it registered


def load(path: Path) -> tuple[str, ...]:
    """Registers the operators of a file. → their names; a file that is loaded already is not read again.

    Raises:
        ValueError: it is no Python file, registers nothing, takes a name that is taken, or lacks a function.
    """
    path = path.resolve()
    if path in _loaded:
        return _loaded[path]
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(f"{path} is no Python file: give the file that defines the operator")
    before = dict(OPERATORS)
    module = _executed(path)
    names = tuple(name for name, cls in OPERATORS.items() if before.get(name) is not cls)
    try:
        if not names:
            raise ValueError(
                f"{path} registers no operator: decorate its spec with `@operator(name)` of {PACKAGE}.spec"
            )
        for name in names:
            operators.file_of(name)
            OPERATORS[name]()  # the defaults stand in the schema of recipes
    except (TypeError, ValueError):
        _forget(module, before)
        raise
    _loaded[path] = names
    return names


def _executed(path: Path) -> ModuleType:
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]  # two files may have one name
    name = f"attnconvert_operator_{path.stem}_{digest}"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses look their module up while they are made
    before = dict(OPERATORS)
    try:
        found.loader.exec_module(module)
    except BaseException as error:
        _forget(module, before)
        if isinstance(error, ValueError | ModuleNotFoundError) or not isinstance(error, Exception):
            raise
        told = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be run: {type(error).__name__}: {told}") from error
    return module


def _forget(module: ModuleType, before: dict[str, type]) -> None:
    OPERATORS.clear()
    OPERATORS.update(before)
    sys.modules.pop(module.__name__, None)


def loaded_files() -> list[Path]:
    """The files whose operators are registered in this process."""
    return list(_loaded)


def sources(specs: Iterable[Spec]) -> dict[str, str]:
    """Operator → the source of its file, for those that are not ours, ready to stand beside `kernels`.

    Raises:
        ValueError: a file cannot go along with a checkpoint; the message says why.
    """
    every = [own for spec in specs for own in (spec, *nested(spec))]
    names = dict.fromkeys(spec.operator for spec in every if spec.operator not in operators.FILES)
    return {name: _portable(name) for name in names}


def _portable(name: str) -> str:
    """The source of an operator's file with relative imports of `kernels`, of which nothing else may be imported."""
    place = getattr(operators.file_of(name), "__file__", None)
    if place is None or not Path(place).is_file():
        raise ValueError(
            f"operator {name!r} was defined in a session, so a checkpoint cannot carry it: write it to a file and "
            "attnconvert.register(file)"
        )
    source, kernels = Path(place).read_text(encoding="utf-8"), files("attnconvert") / "kernels"
    for node in ast.walk(ast.parse(source)):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names if alias.name.partition(".")[0] == "attnconvert"]
        elif isinstance(node, ast.ImportFrom) and node.level:
            modules = ["." * node.level + (node.module or "")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "attnconvert":
            inner = (node.module or "").removeprefix(f"{PACKAGE}.")
            asked = [alias.name for alias in node.names] if node.module == PACKAGE else [inner]
            own = (node.module or "").startswith(PACKAGE)
            if not own or any("." in each or not (kernels / f"{each}.py").is_file() for each in asked):
                modules = [node.module or ""]
        if modules:
            raise ValueError(
                f"operator {name!r} in {place} imports {modules[0]}, which a checkpoint does not carry: import "
                f"`from {PACKAGE} import …` or `from {PACKAGE}.<file> import …` alone"
            )
    return FOUND.sub(lambda match: f"{match[1]}from {match[2] or '.'} import", source)
