"""Masks and layouts as plain data for YAML and JSON, and back.

layout: {grid: [64, 64], text_first: 512}
mask:   {terms: [{q: text}, {k: text}, {where: [{ball: {radius: 16}}]}]}
mask:   {pattern: disc, radius: 16}               # the same by its name in masks_patterns
masks:  [{pattern: causal}, {pattern: sliding_window, size: 256}]     # one per KV group
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from .masks import PREDICATES, Layout, Mask, Predicate, Term
from .masks_checks import suggest
from .masks_patterns import PATTERNS

NAMES = {cls: name for name, cls in PREDICATES.items()}


def mask_to_dict(mask: Mask) -> dict[str, Any]:
    """The inverse of `mask_from_dict`; what has its default is left out."""
    return {"terms": [_term_to_dict(term) for term in mask.terms]}


def layout_to_dict(layout: Layout) -> dict[str, Any]:
    """The inverse of `layout_from_dict`; what has its default is left out."""
    return _fields(layout)


def mask_from_dict(given: Mapping[str, Any]) -> Mask:
    """The mask that {"terms": […]} or {"pattern": name, …} describes.

    Raises:
        ValueError: a key, a name or a value is unknown or out of range; the message says where.
    """
    _check_mapping("mask", given)
    if "pattern" not in given:
        _check_keys("mask", given, ("terms", "pattern"))
        terms = given.get("terms")
        if not isinstance(terms, list | tuple):
            raise ValueError(f"mask must be {{terms: [...]}} or {{pattern: name, ...}}, not {dict(given)!r}")
        return Mask(terms=tuple(_term_from_dict(term, f"terms[{n}]") for n, term in enumerate(terms)))
    name = given["pattern"]
    settings = {key: value for key, value in given.items() if key != "pattern"}
    if not isinstance(name, str) or name not in PATTERNS:
        raise ValueError(f"no pattern {name!r}{suggest(name, PATTERNS)}; known are {', '.join(sorted(PATTERNS))}")
    return _build(PATTERNS[name], settings, f"pattern {name!r}")  # type: ignore[no-any-return]


def masks_from_list(given: Mapping[str, Any] | list[Any]) -> tuple[Mask, ...]:
    """One mask for all heads, or a list with one for each KV group."""
    if not isinstance(given, list | tuple):
        return (mask_from_dict(given),)
    if not given:
        raise ValueError("masks is empty: give one mask, or one for each KV group")
    return tuple(mask_from_dict(mask) for mask in given)


def layout_from_dict(given: Mapping[str, Any]) -> Layout:
    """The layout that {"grid": [h, w], …} describes.

    Raises:
        ValueError: a key is unknown or missing, or a value is out of range.
    """
    _check_mapping("layout", given)
    return _build(Layout, dict(given), "layout")  # type: ignore[no-any-return]


def _term_to_dict(term: Term) -> dict[str, Any]:
    data = _fields(term)
    if term.where:
        data["where"] = [{NAMES[type(predicate)]: _fields(predicate)} for predicate in term.where]
    return data


def _term_from_dict(given: Any, where: str) -> Term:
    _check_mapping(where, given)
    settings = dict(given)
    _check_keys(where, settings, ("q", "k", "where"))
    predicates = settings.pop("where", [])
    if not isinstance(predicates, list | tuple):
        raise ValueError(f"{where}.where must be a list of predicates, not {predicates!r}")
    found = tuple(_predicate(p, f"{where}.where[{n}]") for n, p in enumerate(predicates))
    return Term(where=found, **settings)


def _predicate(given: Any, where: str) -> Predicate:
    """`{band: {axis: h, …}}`, or only the name where nothing is to be said: `causal`."""
    pair = {given: {}} if isinstance(given, str) else given
    _check_mapping(where, pair)
    if len(pair) != 1:
        raise ValueError(f"{where} must be one predicate as {{name: {{...}}}}, not {given!r}")
    name, settings = next(iter(pair.items()))
    if name not in PREDICATES:
        raise ValueError(
            f"{where}: no predicate {name!r}{suggest(name, PREDICATES)}; known are {', '.join(PREDICATES)}"
        )
    _check_mapping(f"{where}.{name}", settings or {})
    return _build(PREDICATES[name], dict(settings or {}), f"{where}: {name}")  # type: ignore[no-any-return]


def _build(make: Any, settings: dict[str, Any], what: str) -> Any:
    """Call it with these settings, after their names were checked; lists of YAML become tuples."""
    parameters = inspect.signature(make).parameters
    _check_keys(what, settings, parameters)
    missing = [name for name, p in parameters.items() if p.default is p.empty and name not in settings]
    if missing:
        raise ValueError(f"{what} lacks {', '.join(missing)}")
    return make(**{name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()})


def _fields(value: Any) -> dict[str, Any]:
    """The fields that differ from their defaults, tuples as lists."""
    data = {}
    for field in dataclasses.fields(value):
        given = getattr(value, field.name)
        if given != field.default:
            data[field.name] = list(given) if isinstance(given, tuple) else given
    return data


def _check_mapping(what: str, given: object) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(f"{what} must be a mapping, not {given!r}")


def _check_keys(what: str, given: Mapping[str, Any], known: Any) -> None:
    for key in given:
        if key not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes nothing"
            raise ValueError(f"{what} has no setting {key!r}{suggest(key, known)}; {takes}")
