"""The specs of operators for image and video tokens on a grid: rows read in both directions, and nothing is cached.

Tuples have one number for each axis of the grid, (h, w) or (t, h, w), or one for all of them. Text beside the grid is
dense: every token reads it and it reads every token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from .masks_checks import as_counts, check_count, check_number
from .spec_registry import QUIET, Spec, check_conv, check_feature_map, is_spec, operator, spec_from_dict, written


def _counts(spec: Spec, least: int, *names: str, empty: bool = False) -> None:
    """Makes tuples of these settings, which may be single numbers or lists, with one number or one for each axis."""
    for name in names:
        value = getattr(spec, name)
        if empty and isinstance(value, tuple | list) and not value:
            object.__setattr__(spec, name, ())
            continue
        given = as_counts(name, (value,) if isinstance(value, int) else value, least)
        if len(given) > 3:
            raise ValueError(f"{name} must have one number, or one for each axis of an image or video, not {value!r}")
        object.__setattr__(spec, name, given)
    _axes(spec, *names)


def _axes(spec: Spec, *names: str) -> int | None:
    """How many axes the settings speak of; None where they hold for any number.

    Raises:
        ValueError: they differ.
    """
    sizes = {name: len(getattr(spec, name)) for name in names if len(getattr(spec, name)) > 1}
    if len(set(sizes.values())) > 1:
        given = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise ValueError(f"{' and '.join(sizes)} must have as many numbers as each other, or one: {given}")
    return next(iter(sizes.values()), None)


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, not {value!r}")


@operator("disc")
@written
@dataclass(frozen=True, kw_only=True)
class Disc:
    """Softmax over the tokens closer than `radius` on the grid (in a video also in frames), and over the text.

    With `pool` image tokens also read the keys and values averaged over squares of `pool` × `pool` tokens of each
    frame, so that what is far is there as a blur.

    Source: CLEAR (Liu et al., 2024).
    """

    on_grid: ClassVar[bool] = True
    radius: float = 8
    pool: int = field(default=0, metadata=QUIET)

    def __post_init__(self) -> None:
        check_number("radius", self.radius, 0)
        check_count("pool", self.pool, 0)
        if self.pool == 1:
            raise ValueError("pool must be at least 2, or 0 for none, not 1: every key would be there twice")


@operator("neighbourhood")
@written
@dataclass(frozen=True, kw_only=True)
class Neighbourhood:
    """Softmax over a window of `window` tokens along each axis, and over the text.

    At the edges of the grid windows are shifted inward, so that every token reads as many. `stride` tokens in a row
    share the window of their middle one; `dilation` is the distance of the tokens that are read.

    Source: NATTEN (Hassani et al., 2023) and Generalized Neighborhood Attention (Hassani et al., 2025).
    """

    on_grid: ClassVar[bool] = True
    window: tuple[int, ...] = (9,)
    stride: tuple[int, ...] = field(default=(1,), metadata=QUIET)
    dilation: tuple[int, ...] = field(default=(1,), metadata=QUIET)

    def __post_init__(self) -> None:
        _counts(self, 1, "window", "stride", "dilation")
        if len(self.window) == 1 or len(self.stride) == 1 or len(self.window) == len(self.stride):
            count = max(len(self.window), len(self.stride))
            windows, strides = (x * count if len(x) == 1 else x for x in (self.window, self.stride))
            if any(s > w for w, s in zip(windows, strides, strict=True)):
                raise ValueError(f"stride must be at most the window, {list(self.window)}, not {list(self.stride)}")

    @property
    def axes(self) -> int | None:
        """Of the grids it is for; None: any."""
        return _axes(self, "window", "stride", "dilation")


@operator("tiles")
@written
@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Softmax over whole tiles near the token's own, `window` of them along each axis, and over the text.

    A tile has `tile` tokens along each axis; an even number of tiles spans one more. At the edges windows are shifted
    inward. Tokens are computed tile by tile, so what is read is dense to the hardware.

    Source: Sliding Tile Attention (Zhang et al., 2025).
    """

    on_grid: ClassVar[bool] = True
    window: tuple[int, ...] = (3,)
    tile: tuple[int, ...] = (8,)

    def __post_init__(self) -> None:
        _counts(self, 1, "window", "tile")

    @property
    def axes(self) -> int | None:
        """Of the grids it is for; None: any."""
        return _axes(self, "window", "tile")


@operator("radial")
@written
@dataclass(frozen=True, kw_only=True)
class Radial:
    """Softmax over a band of each frame that halves with every doubling of the distance in time, and over the text.

    For videos. `decay` scales the band, `floor` is the least it has, in tokens, and `neighbour` the share of the two
    frames beside the token's own that is read; `sink` keeps the first frame in reach. Hunyuan: decay 0.95. Wan: decay
    0.2, neighbour 0.5, sink.

    Source: Radial Attention (Li et al., 2025).
    """

    on_grid: ClassVar[bool] = True
    axes: ClassVar[int] = 3
    decay: float = 1.0
    floor: int = 128
    neighbour: float = field(default=1.0, metadata=QUIET)
    sink: bool = field(default=False, metadata=QUIET)

    def __post_init__(self) -> None:
        check_number("decay", self.decay, 0)
        check_count("floor", self.floor, 1)
        check_number("neighbour", self.neighbour, 0)
        _flag("sink", self.sink)


@operator("references")
@written
@dataclass(frozen=True, kw_only=True)
class References:
    """Softmax over the token's own frame and the reference frames, which read every frame, and over the text.

    For videos. Reference frames are every `every`-th one (0: none by this) and those with the numbers `at`.

    Source: Efficient-vDiT (Ding et al., 2025).
    """

    on_grid: ClassVar[bool] = True
    axes: ClassVar[int] = 3
    every: int = 0
    at: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        check_count("every", self.every, 0)
        given = (self.at,) if isinstance(self.at, int) else self.at
        if not isinstance(given, tuple | list):
            raise ValueError(f"at must be a list of frame numbers, not {given!r}")
        for number in given:
            check_count("each number of at", number, 0)
        object.__setattr__(self, "at", tuple(sorted(set(given))))
        if not self.every and not self.at:
            raise ValueError("every is 0 and at is empty: name reference frames, e.g. every: 4 or at: [0, 7]")


@operator("frames")
@written
@dataclass(frozen=True, kw_only=True)
class Frames:
    """Softmax over the token's own chunk of frames, the `before` frames before it and the first `sinks`, and text.

    For videos that are generated chunk by chunk. `before` is a whole number of chunks of `chunk` frames.

    Source: LongLive (Yang et al., 2025).
    """

    on_grid: ClassVar[bool] = True
    axes: ClassVar[int] = 3
    before: int = 6
    chunk: int = 1
    sinks: int = field(default=0, metadata=QUIET)

    def __post_init__(self) -> None:
        check_count("before", self.before, 0)
        check_count("chunk", self.chunk, 1)
        check_count("sinks", self.sinks, 0)
        if self.before % self.chunk:
            raise ValueError(f"before must be whole chunks of {self.chunk} frames, not {self.before}")


def _selection(spec: Spec) -> None:
    """Checks keep, mass, block and tile; `mass` decides where it is given, and `keep` is then 0."""
    for name in ("keep", "mass"):
        value = getattr(spec, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ValueError(f"{name} must be a share from 0 to 1, not {value!r}")
    if spec.mass:
        object.__setattr__(spec, "keep", 0.0)
    elif not spec.keep:
        raise ValueError("keep is 0 and so is mass: one of them says what is read, e.g. keep: 0.1 or mass: 0.9")
    check_count("block", spec.block, 32)
    if spec.block % 32:
        raise ValueError(f"block must be a multiple of 32, not {spec.block}")
    _counts(spec, 1, "tile", empty=True)


@operator("sparse")
@written
@dataclass(frozen=True, kw_only=True)
class Sparse:
    """Softmax over the blocks of keys that matter most to a block of rows, and over those that hold text.

    Mean queries and keys of blocks of `block` tokens decide, KV group by KV group: the share `keep` of the blocks
    without text, or where `mass` is given as few as hold that share of the softmaxed scores. Blocks that hold text are
    always read, and rows of blocks that hold text read everything. With `tile` the tokens are put in the order of such
    tiles first: one of `block` tokens makes every block a square of the image or a box of the video.

    Source: SLA (Zhang et al., 2025), VSA (Zhang et al., 2025), VMoBA (Wu et al., 2025), DraftAttention (Shen et al.,
    2025).
    """

    on_grid: ClassVar[bool] = True
    keep: float = 0.1
    block: int = 64
    mass: float = field(default=0.0, metadata=QUIET)
    tile: tuple[int, ...] = field(default=(), metadata=QUIET)

    def __post_init__(self) -> None:
        _selection(self)

    @property
    def axes(self) -> int | None:
        """Of the grids it is for; None: any."""
        return _axes(self, "tile")


@operator("sla")
@written
@dataclass(frozen=True, kw_only=True)
class Sla:
    """As `sparse`, and linear attention over all other blocks, through a learned projection that starts at zero.

    The paper leaves out the tenth of the blocks that matters least; here linear attention covers every block that is
    not read. `feature_map` is softmax there, and may be any that `linear` has; with `conv` a depthwise convolution of v
    over the grid, that many tokens wide, is added, as in `linear`.

    Source: SLA (Zhang et al., 2025).
    """

    on_grid: ClassVar[bool] = True
    keep: float = 0.05
    block: int = 64
    mass: float = field(default=0.0, metadata=QUIET)
    tile: tuple[int, ...] = field(default=(), metadata=QUIET)
    feature_map: str = field(default="softmax", metadata=QUIET)
    conv: int = field(default=0, metadata=QUIET)

    def __post_init__(self) -> None:
        _selection(self)
        check_feature_map(self.feature_map)
        check_conv(self.conv)

    @property
    def axes(self) -> int | None:
        """Of the grids it is for; None: any."""
        return _axes(self, "tile")


@operator("agent")
@dataclass(frozen=True, kw_only=True)
class Agent:
    """Tokens read `agents` averaged queries along each axis, which read everything: two small softmaxes.

    The text is among the agents as it is.

    Source: Agent Attention (Han et al., 2023).
    """

    on_grid: ClassVar[bool] = True
    agents: tuple[int, ...] = (7,)

    def __post_init__(self) -> None:
        _counts(self, 1, "agents")

    @property
    def axes(self) -> int | None:
        """Of the grids it is for; None: any."""
        return _axes(self, "agents")


@operator("timed")
@written
@dataclass(frozen=True, kw_only=True)
class Timed:
    """One operator while an image is mostly noise, at a time of `above` or more, and another afterwards.

    Times go from 1 (noise) to 0. Source: SLA, Radial Attention and others keep the first steps dense.
    """

    on_grid: ClassVar[bool] = True
    above: float = 0.8
    early: Spec = field(default_factory=lambda: spec_from_dict({"operator": "full"}))
    late: Spec = Disc()

    def __post_init__(self) -> None:
        check_number("above", self.above, 0)
        if self.above > 1:
            raise ValueError(f"above must be a time, more than 0 and at most 1, not {self.above!r}")
        for name in ("early", "late"):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                object.__setattr__(self, name, spec_from_dict(value))
            elif not is_spec(value):
                raise ValueError(f"{name} must be an operator such as {{operator: disc, radius: 8}}, not {value!r}")
            if getattr(getattr(self, name), "augment", False):
                raise ValueError(f"{name} cannot have augment: the projections of q and k are the same at all times")
