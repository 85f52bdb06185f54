"""How specs are registered, named, written down and read: what `spec` and `spec_grid` have in common. No torch."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from .masks_checks import check_count

Spec = Any  # one of the dataclasses in `spec` and `spec_grid`; `OPERATORS` lists them
S = TypeVar("S")
OPERATORS: dict[str, type] = {}
OUTSIDE = "attnconvert.operators"  # entry points of packages: operator's name → the module that registers it
FEATURE_MAPS = ("hedgehog", "elu1", "softmax")  # of linear attention; the hybrid has the first
QUIET = {"quiet": True}  # of a field: its default goes without saying, in labels and in dicts


def operator(name: str) -> Callable[[type[S]], type[S]]:
    """Register a spec class under the name that recipes and plans use.

    The functions of an operator of ours are in the file that `operators.FILES` names, those of any other in the file of
    its spec class. A class that takes the place of its own earlier self, as where a file is run again, is no duplicate.
    """

    def register(cls: type[S]) -> type[S]:
        there = OPERATORS.get(name)
        if there is not None and (there.__module__, there.__qualname__) != (cls.__module__, cls.__qualname__):
            places = " and ".join(f"{one.__module__}.{one.__qualname__}" for one in (there, cls))
            raise ValueError(f"operator {name!r} is registered twice: {places}")
        OPERATORS[name] = cls
        cls.operator = name  # type: ignore[attr-defined]
        return cls

    return register


def spec_class(name: str) -> type | None:
    """The spec class of an operator, None where there is none. A package that offers it is imported for it.

    Raises:
        ValueError: the package cannot be imported, or does not register what it offers.
    """
    if name not in OPERATORS:
        for point in _offered():
            if point.name == name:
                try:
                    point.load()
                except (ImportError, AttributeError) as error:
                    raise ValueError(f"operator {name!r} is offered by {point.value}: {error}") from error
                if name not in OPERATORS:
                    raise ValueError(f"operator {name!r} is offered by {point.value}, which does not register it")
    return OPERATORS.get(name)


def operator_names() -> list[str]:
    """Every operator that there is, those of installed packages too."""
    return sorted({*OPERATORS, *(point.name for point in _offered())})


def _offered() -> list[EntryPoint]:
    return list(entry_points(group=OUTSIDE))


def is_spec(value: object) -> bool:
    """Whether it is an instance of a registered class."""
    return type(value) in OPERATORS.values()


def spec_from_dict(given: Mapping[str, Any]) -> Spec:
    """The spec that `{"operator": "window", "size": 128}` describes.

    Raises:
        ValueError: the operator or one of its settings is unknown or out of range.
    """
    settings = dict(given)
    name = settings.pop("operator", None)
    if name is None:
        raise ValueError(f"operator is missing: name one of {', '.join(operator_names())}")
    cls = spec_class(str(name))
    if cls is None:
        every = operator_names()
        raise ValueError(f"no operator {name!r}{_suggest(str(name), every)}; known are {', '.join(every)}")
    fields = [f.name for f in dataclasses.fields(cls)]
    for key in settings:
        if key not in fields:
            known = f"it takes {', '.join(fields)}" if fields else "it takes no settings"
            raise ValueError(f"operator {name!r} has no setting {key!r}{_suggest(key, fields)}; {known}")
    return cls(**settings)


def spec_to_dict(spec: Spec) -> dict[str, Any]:
    """The inverse of `spec_from_dict`: plain data for YAML and JSON."""
    return {"operator": spec.operator, **{name: plain(value) for name, value, _ in _told(spec)}}


def plain(value: Any) -> Any:
    """The value of a setting as YAML and JSON have it."""
    if is_spec(value):
        return spec_to_dict(value)
    return list(value) if isinstance(value, tuple) else value


def label(spec: Spec) -> str:
    """A short unique name that may be that of a file or a module: `window-128-4`, `span-64-0p0625-4`, `disc-8-pool4`.

    Settings that are rarely changed are named, and left out where they have their defaults.
    """
    parts = [spec.operator]
    for name, value, quiet in _told(spec):
        parts.append(name if quiet and value is True else name * quiet + _short(value))
    return "-".join(parts)


def _short(value: object) -> str:
    if is_spec(value):
        return label(value)
    if isinstance(value, tuple):
        return "x".join(_short(each) for each in value)
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else str(value).replace(".", "p")
    return str(value)


def _told(spec: Spec) -> Iterator[tuple[str, Any, bool]]:
    """Settings to be told: name, value and whether it is a quiet one."""
    for field in dataclasses.fields(spec):
        value, quiet = getattr(spec, field.name), bool(field.metadata.get("quiet"))
        if not (quiet and value == field.default):
            yield field.name, value, quiet


def nested(spec: Spec) -> tuple[Spec, ...]:
    """The specs that it holds."""
    return tuple(value for _, value, _ in _told(spec) if is_spec(value))


def _suggest(given: str, known: Any) -> str:
    close = difflib.get_close_matches(given, list(known), n=1)
    return f": did you mean {close[0]!r}?" if close else ""


def check_feature_map(value: object, known: tuple[str, ...] = FEATURE_MAPS) -> None:
    """Whether it is a feature map that is known here."""
    if value not in known:
        raise ValueError(f"no feature map {value!r}; known are {', '.join(known)}")


def check_conv(size: object) -> None:
    """Whether it is the size of a convolution, or 0."""
    check_count("conv", size, 0)
    if isinstance(size, int) and size and not size % 2:
        raise ValueError(f"conv must be an odd size, or 0 for none, not {size}")
