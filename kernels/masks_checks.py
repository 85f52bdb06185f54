"""What the mask vocabulary asks of its arguments. Every function raises a ValueError that names the argument."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


def suggest(given: object, known: Iterable[str]) -> str:
    """`: did you mean 'band'?`, or nothing when nothing is close."""
    close = difflib.get_close_matches(str(given), list(known), n=1)
    return f": did you mean {close[0]!r}?" if close else ""


def check_choice(name: str, value: object, known: Iterable[str]) -> None:
    """Raises a ValueError that suggests what was meant."""
    known = tuple(known)
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}{suggest(value, known)}")


def check_count(name: str, value: object, least: int, none: bool = False) -> None:
    """Raises a ValueError unless `value` is a whole number of at least `least` (or None, where that is allowed)."""
    if none and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        or_none = " or None" if none else ""
        raise ValueError(f"{name} must be a whole number of at least {least}{or_none}, not {value!r}")


def check_number(name: str, value: object, above: float) -> None:
    """Raises a ValueError unless `value` is a finite number greater than `above`."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not above < value < math.inf:
        raise ValueError(f"{name} must be a number greater than {above:g}, not {value!r}")


def as_counts(name: str, value: object, least: int) -> tuple[int, ...]:
    """The sequence of whole numbers as a tuple, checked."""
    if not isinstance(value, tuple | list) or not value:
        raise ValueError(f"{name} must be a sequence of whole numbers, not {value!r}")
    for number in value:
        check_count(f"each number of {name}", number, least)
    return tuple(value)
