"""The operator specs: what may stand in for full attention, as frozen values that validate themselves.

A spec says which operator and how large; it holds no tensors and imports no torch, so recipes and plans can be
checked without loading either. `label` gives the short name used in plans, plots and tables (`window-128-4`).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

FEATURE_MAPS = ("hedgehog",)
BACKENDS = ("auto", "triton", "cpp", "torch")  # what may be asked for; `dispatch` chooses

STEP = 64  # tokens by which a span grows at once
Spec = Any  # one of the dataclasses below; `OPERATORS` lists them
S = TypeVar("S")
OPERATORS: dict[str, type] = {}


def operator(name: str) -> Callable[[type[S]], type[S]]:
    """Register a spec class under the name that recipes and plans use."""

    def register(cls: type[S]) -> type[S]:
        if name in OPERATORS:
            raise ValueError(f"operator {name!r} is registered twice: {OPERATORS[name].__name__} and {cls.__name__}")
        OPERATORS[name] = cls
        cls.operator = name  # type: ignore[attr-defined]
        return cls

    return register


def _count(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")


def _feature_map(value: object) -> None:
    if value not in FEATURE_MAPS:
        raise ValueError(f"no feature map {value!r}; known are {', '.join(FEATURE_MAPS)}")


@operator("full")
@dataclass(frozen=True, kw_only=True)
class Full:
    """The model's own attention: softmax over every earlier token, and in an encoder over every token."""


@operator("window")
@dataclass(frozen=True, kw_only=True)
class Window:
    """Softmax over the token itself, the `size - 1` before it, and the first `sinks` real tokens of the sequence.

    In an encoder the `size - 1` after it as well.

    Source: StreamingLLM (Xiao et al., 2023).
    """

    size: int = 128
    sinks: int = 4

    def __post_init__(self) -> None:
        _count("size", self.size, 1)
        _count("sinks", self.sinks, 0)


@operator("span")
@dataclass(frozen=True, kw_only=True)
class Span:
    """A window that grows with the position, size + growth · i, and the first `sinks` real tokens.

    It grows in steps of STEP tokens. What lies a share of the way back stays in reach at any length, where a fixed
    window reads ever less of the text. In an encoder the window is that of the text's length, in both directions.

    Source: the elastic rule α + β·N of MoA (Fu et al., 2024), made to hold row by row, so that it does not depend on
    how the tokens arrive.
    """

    size: int = 64
    growth: float = 0.0625
    sinks: int = 4

    def __post_init__(self) -> None:
        _count("size", self.size, 1)
        _count("sinks", self.sinks, 0)
        if isinstance(self.growth, bool) or not isinstance(self.growth, int | float) or not 0 < self.growth < 1:
            raise ValueError(f"growth must be a number between 0 and 1, not {self.growth!r}")

    def width(self, position: int) -> int:
        """The window of the row this far behind its first real token."""
        return self.size + self.steps(position) * STEP

    def steps(self, position: int) -> int:
        """How often the window has grown until then."""
        return int(self.growth * max(position, 0)) // STEP


@operator("blocks")
@dataclass(frozen=True, kw_only=True)
class TopBlocks:
    """Softmax over the row's own block of keys and the `keep` blocks before it that matter most.

    Every `rows` rows their first query decides: the softmaxed scores of the mean keys of all finished blocks, averaged
    over the query heads of the group. The first block and the one just before are always among them. Nothing is
    forgotten, so the cache is that of full attention; what is saved is work. In an encoder the mean query decides, over
    all blocks.

    Source: MoBA (Lu et al., 2025), with a decision per block of rows that does not depend on how the tokens arrive.
    """

    keep: int = 8
    block: int = 64
    rows: int = 32

    def __post_init__(self) -> None:
        _count("keep", self.keep, 2)
        _count("block", self.block, 32)
        _count("rows", self.rows, 16)
        if self.block % 32:
            raise ValueError(f"block must be a multiple of 32, not {self.block}")
        if self.rows % 16 or self.block % self.rows:
            raise ValueError(f"rows must be a multiple of 16 that divides the block of {self.block}, not {self.rows}")


@operator("linear")
@dataclass(frozen=True, kw_only=True)
class Linear:
    """Linear attention with learned feature maps; one fp32 state per KV head.

    Source: Hedgehog (Zhang et al., 2024).
    """

    feature_map: str = "hedgehog"

    def __post_init__(self) -> None:
        _feature_map(self.feature_map)


@operator("hybrid")
@dataclass(frozen=True, kw_only=True)
class Hybrid:
    """Softmax over a window and sinks, linear attention over everything older, one normaliser for both.

    In an encoder the window reaches both ways, and linear attention is over everything outside.

    Source: LoLCATs (Zhang et al., 2024), with sink tokens.
    """

    window: int = 64
    sinks: int = 4
    feature_map: str = "hedgehog"

    def __post_init__(self) -> None:
        _count("window", self.window, 1)
        _count("sinks", self.sinks, 0)
        _feature_map(self.feature_map)


@operator("retention")
@dataclass(frozen=True, kw_only=True)
class Retention:
    """Softmax over the first `sinks` tokens, the last `window` and the `keep` older ones that were read most.

    What an old token is worth is the attention it received from rows at half the window or more. The window moves in
    steps of `block` tokens, so a row reads its last window − block + 1 to window tokens; results do not depend on how
    the tokens arrive. `block` 1 is the strict definition, larger ones are faster.
    """

    window: int = 64
    keep: int = 64
    sinks: int = 4
    block: int = 16

    def __post_init__(self) -> None:
        _count("window", self.window, 1)
        _count("keep", self.keep, 0)
        _count("sinks", self.sinks, 0)
        _count("block", self.block, 1)
        if self.block > self.window:
            raise ValueError(f"block must be at most the window, {self.window}, not {self.block}")


def spec_from_dict(given: Mapping[str, Any]) -> Spec:
    """The spec that `{"operator": "window", "size": 128}` describes.

    Raises:
        ValueError: the operator or one of its settings is unknown or out of range.
    """
    settings = dict(given)
    name = settings.pop("operator", None)
    if name is None:
        raise ValueError(f"operator is missing: name one of {', '.join(sorted(OPERATORS))}")
    if name not in OPERATORS:
        raise ValueError(
            f"no operator {name!r}{_suggest(str(name), OPERATORS)}; known are {', '.join(sorted(OPERATORS))}"
        )
    cls = OPERATORS[name]
    fields = [f.name for f in dataclasses.fields(cls)]
    for key in settings:
        if key not in fields:
            known = f"it takes {', '.join(fields)}" if fields else "it takes no settings"
            raise ValueError(f"operator {name!r} has no setting {key!r}{_suggest(key, fields)}; {known}")
    return cls(**settings)


def spec_to_dict(spec: Spec) -> dict[str, Any]:
    """The inverse of `spec_from_dict`: plain data for YAML and JSON."""
    return {"operator": spec.operator, **dataclasses.asdict(spec)}


def label(spec: Spec) -> str:
    """A short unique name: `full`, `window-128-4`, `linear-hedgehog`, `hybrid-64-4-hedgehog`."""
    return "-".join([spec.operator, *(str(value) for value in dataclasses.asdict(spec).values())])


def grid_only(spec: Spec) -> bool:
    """Whether it reads the places of image or video tokens on their grid."""
    return bool(getattr(type(spec), "on_grid", False))


def causal_only(spec: Spec) -> bool:
    """Whether it only makes sense where rows read what came before them."""
    return isinstance(spec, Retention)


def _suggest(given: str, known: Any) -> str:
    close = difflib.get_close_matches(given, list(known), n=1)
    return f": did you mean {close[0]!r}?" if close else ""
