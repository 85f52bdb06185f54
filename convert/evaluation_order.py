"""What an evaluation of a denoiser holds, in the order in which it is shown: sizes by tokens, parts of the steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .artefacts import dig


def sizes_of(evaluation: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(size, what was timed at it), the fewest image tokens first."""
    found = dig(evaluation, "speed", default={})
    known = [(name, entry) for name, entry in found.items() if isinstance(dig(entry, "tokens"), int)]
    return sorted(known, key=lambda item: item[1]["tokens"])


def slower_sizes(evaluation: Mapping[str, Any]) -> list[tuple[str, float]]:
    """(size, speed over the teacher's) where the student is slower."""
    return [(name, entry["speedup"]) for name, entry in sizes_of(evaluation) if entry.get("speedup", 1.0) < 1]


def band_names(arms: Iterable[Mapping[str, Any]]) -> list[str]:
    """The parts of the steps that any of the arms has figures of, the noisiest first."""
    return in_order({band for arm in arms for band in dig(arm, "quality", "bands", default={})})


def in_order(bands: Iterable[str]) -> list[str]:
    """ "1 of 3", "2 of 3", …, "10 of 12" """
    return sorted(bands, key=lambda band: (int(band.split()[0]) if band.split()[0].isdecimal() else 0, band))


def is_of_images(evaluation: Mapping[str, Any]) -> bool:
    """Whether an evaluation.json is of an image or video model."""
    return evaluation.get("kind") == "images"
