"""The operator specs: what may stand in for full attention, as frozen values that validate themselves.

A spec says which operator and how large; it holds no tensors and imports no torch, so recipes and plans can be
checked without loading either. `label` gives the short name used in plans, plots and tables (`window-128-4`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .masks_checks import check_count
from .spec_grid import Agent, Disc, Frames, Neighbourhood, Radial, References, Sla, Sparse, Tiles, Timed
from .spec_registry import (
    FEATURE_MAPS,
    OPERATORS,
    QUIET,
    Spec,
    check_conv,
    check_feature_map,
    is_spec,
    label,
    nested,
    operator,
    operator_names,
    plain,
    spec_class,
    spec_from_dict,
    spec_to_dict,
)

BACKENDS = ("auto", "triton", "cpp", "torch")  # what may be asked for; `dispatch` chooses

STEP = 64  # tokens by which a span grows at once


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
        check_count("size", self.size, 1)
        check_count("sinks", self.sinks, 0)


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
        check_count("size", self.size, 1)
        check_count("sinks", self.sinks, 0)
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
        check_count("keep", self.keep, 2)
        check_count("block", self.block, 32)
        check_count("rows", self.rows, 16)
        if self.block % 32:
            raise ValueError(f"block must be a multiple of 32, not {self.block}")
        if self.rows % 16 or self.block % self.rows:
            raise ValueError(f"rows must be a multiple of 16 that divides the block of {self.block}, not {self.rows}")


@operator("linear")
@dataclass(frozen=True, kw_only=True)
class Linear:
    """Linear attention; one fp32 state per KV head. The feature maps are learned (`hedgehog`) or fixed.

    For image and video tokens only: `conv`, the size of a depthwise convolution of the values over each frame's grid,
    is added to the output and brings back what is near (0: none); `augment` adds a small MLP of the tokens before the
    projections of q and k, and then the operator serves all heads of its site. Both start as if they were not there.

    Source: Hedgehog (Zhang et al., 2024); convolution as in FLatten (Han et al., 2023); MLP of LinFusion (Liu et al.,
    2024).
    """

    feature_map: str = "hedgehog"
    conv: int = field(default=0, metadata=QUIET)
    augment: bool = field(default=False, metadata=QUIET)

    def __post_init__(self) -> None:
        check_feature_map(self.feature_map, FEATURE_MAPS)
        check_conv(self.conv)
        if not isinstance(self.augment, bool):
            raise ValueError(f"augment must be true or false, not {self.augment!r}")

    @property
    def on_grid(self) -> bool:
        """Whether it asks for more than a sequence."""
        return self.conv > 0 or self.augment


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
        check_count("window", self.window, 1)
        check_count("sinks", self.sinks, 0)
        check_feature_map(self.feature_map, FEATURE_MAPS[:1])


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
        check_count("window", self.window, 1)
        check_count("keep", self.keep, 0)
        check_count("sinks", self.sinks, 0)
        check_count("block", self.block, 1)
        if self.block > self.window:
            raise ValueError(f"block must be at most the window, {self.window}, not {self.block}")


def grid_only(spec: Spec) -> bool:
    """Whether it is for image or video tokens on their grid."""
    return bool(getattr(spec, "on_grid", False))


def grid_axes(spec: Spec) -> int | None:
    """How many axes the grid must have (2: image, 3: video), None where any number will do."""
    axes: int | None = getattr(spec, "axes", None)
    return axes


def whole_site(spec: Spec) -> bool:
    """Whether it must serve all heads of its site, because it changes what is projected to q and k."""
    return bool(getattr(spec, "augment", False))


def causal_only(spec: Spec) -> bool:
    """Whether it only makes sense where rows read what came before them."""
    return isinstance(spec, Retention)


__all__ = [
    "BACKENDS",
    "FEATURE_MAPS",
    "OPERATORS",
    "STEP",
    "Agent",
    "Disc",
    "Frames",
    "Full",
    "Hybrid",
    "Linear",
    "Neighbourhood",
    "Radial",
    "References",
    "Retention",
    "Sla",
    "Span",
    "Sparse",
    "Spec",
    "Tiles",
    "Timed",
    "TopBlocks",
    "Window",
    "causal_only",
    "grid_axes",
    "grid_only",
    "is_spec",
    "label",
    "nested",
    "operator",
    "operator_names",
    "plain",
    "spec_class",
    "spec_from_dict",
    "spec_to_dict",
    "whole_site",
]
