"""The patterns of the papers, ready-made in the vocabulary of `masks`.

Those for language models are over the position in the sequence (axis `i`). Those for images and video are over the
grid, and text is dense: it reads every token and every token reads it; where the layout has no text, nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable

from .masks import GRID_AXES, Ball, Band, Causal, Decay, First, LastRows, Mask, Mod, Pow2, Predicate, Refs, Term
from .masks_checks import as_counts, check_count

TEXT = Mask(terms=(Term(q="text"), Term(k="text")))
PATTERNS: dict[str, Callable[..., Mask]] = {}


def pattern(make: Callable[..., Mask]) -> Callable[..., Mask]:
    """Recipes may name it."""
    if make.__name__ in PATTERNS:
        raise ValueError(f"pattern {make.__name__!r} is registered twice")
    PATTERNS[make.__name__] = make
    return make


def _term(*predicates: Predicate, q: str = "*", k: str = "*") -> Mask:
    return Mask(terms=(Term(q=q, k=k, where=predicates),))


def _on_grid(*predicates: Predicate) -> Mask:
    return _term(*predicates, q="grid", k="grid")


@pattern
def full() -> Mask:
    """Every key."""
    return _term()


@pattern
def causal() -> Mask:
    """Every key up to the query."""
    return _term(Causal())


@pattern
def sliding_window(*, size: int, causal: bool = True) -> Mask:
    """i − size < j ≤ i; not causal: |i − j| < size."""
    check_count("size", size, 1)
    return _term(Band(axis="i", left=size - 1, right=0 if causal else size - 1))


@pattern
def a_shape(*, size: int, sinks: int) -> Mask:
    """A causal window and the first tokens: StreamingLLM (Xiao et al., 2023), A-shape of MInference."""
    check_count("sinks", sinks, 1)
    return sliding_window(size=size) | _term(Causal(), First(count=sinks))


@pattern
def tri_shape(*, size: int, sinks: int, rows: int) -> Mask:
    """A-shape, and the last `rows` queries read everything before them (MMInference, SCBench)."""
    check_count("rows", rows, 1)
    return a_shape(size=size, sinks=sinks) | _term(Causal(), LastRows(count=rows))


@pattern
def dilated(*, size: int, dilation: int, causal: bool = True) -> Mask:
    """`size` keys (not causal: up to 2 · size − 1) that are `dilation` apart, the query's own position among them."""
    check_count("size", size, 1)
    return _term(Band(axis="i", left=size - 1, right=0 if causal else size - 1, dilation=dilation))


@pattern
def strided(*, local: int, every: int, unit: int = 64, phase: int = 0) -> Mask:
    """The last `local` blocks of `unit` tokens, and each block before whose number mod `every` is `phase`.

    Source: S2-Attention (2407.17678), whose KV groups differ in the phase: `strided_heads`.
    """
    check_count("local", local, 1)
    near = _term(Causal(), Band(axis="i", left=local - 1, right=0, unit=unit))
    return near | _term(Causal(), Mod(axis="i", m=every, phase=phase, unit=unit))


def strided_heads(groups: int, *, local: int, every: int, unit: int = 64, dense: int = 0) -> tuple[Mask, ...]:
    """`strided` for each KV group g with columns where (j + g · max(1, every // groups)) mod every = 0; the last
    `dense` groups are causal without a pattern.
    """
    check_count("groups", groups, 1)
    check_count("dense", dense, 0)
    step = max(1, every // groups)
    sparse = (strided(local=local, every=every, unit=unit, phase=-g * step % every) for g in range(groups - dense))
    return (*sparse, *(causal() for _ in range(min(dense, groups))))


@pattern
def power(*, unit: int = 256, local: int = 5) -> Mask:
    """Blocks at a distance below `local` or of a power of two, and the first block: PowerAttention (2503.03588)."""
    check_count("local", local, 1)
    near = _term(Causal(), Band(axis="i", left=local - 1, right=0, unit=unit))
    return near | _term(Causal(), Pow2(axis="i", unit=unit)) | _term(Causal(), First(count=unit))


@pattern
def grouped(*, size: int, shift: int = 0) -> Mask:
    """Causal within groups of `size` tokens whose borders are moved `shift` to the left: S²-Attn of LongLoRA."""
    check_count("shift", shift, 0)
    return _term(Causal(), Band(axis="i", left=0, right=0, unit=size, offset=shift))


@pattern
def text_rows() -> Mask:
    """Only text attends, causally, to text and grid: no attention among visual tokens (SAISA, 2502.02458)."""
    return _term(Causal(), q="text")


@pattern
def neighbourhood(
    *,
    window: tuple[int, ...],
    stride: tuple[int, ...] = (1,),
    dilation: tuple[int, ...] = (1,),
    causal: tuple[bool, ...] = (False,),
) -> Mask:
    """A window of that many keys on each axis, shifted inward at the edges: NATTEN / GNA, text dense.

    One number in stride, dilation or causal holds for all axes. A window of 2d + 1 and stride 1 is FreeSwim's; a
    stride as large as the window cuts the grid into blocks.
    """
    window = as_counts("window", window, 1)
    if len(window) not in GRID_AXES:
        raise ValueError(f"window must have one size for each of 1, 2 or 3 axes, not {window!r}")
    count = len(window)
    bands = []
    for axis, w, s, d, c in zip(
        GRID_AXES[count],
        window,
        _spread("stride", stride, count),
        _spread("dilation", dilation, count),
        _spread("causal", causal, count),
        strict=True,
    ):
        left, right = (w - 1, 0) if c else (w // 2, w - 1 - w // 2)
        edge = "cut" if c else "clamp"
        bands.append(Band(axis=axis, left=left, right=right, dilation=d, stride=s, edge=edge))
    return _on_grid(*bands) | TEXT


def _spread(name: str, values: tuple[int, ...], count: int) -> tuple[int, ...]:
    values = tuple(values) if isinstance(values, tuple | list) else (values,)
    if len(values) not in (1, count):
        raise ValueError(f"{name} must have 1 or {count} values, as window has, not {values!r}")
    return values * count if len(values) == 1 else values


@pattern
def tiled(*, window: tuple[int, ...], tile: tuple[int, ...]) -> Mask:
    """Whole tiles near the tile of the query, `window` of them on each axis (an even number spans one more), shifted
    inward at the edges: Sliding Tile Attention (2502.04507), text dense. Lay out in the order of the same tiles.
    """
    window, tile = as_counts("window", window, 1), as_counts("tile", tile, 1)
    if len(window) != len(tile) or len(tile) not in GRID_AXES:
        raise ValueError(f"window and tile must each have 1, 2 or 3 sizes, one per axis, not {window!r} and {tile!r}")
    axes = zip(GRID_AXES[len(tile)], window, tile, strict=True)
    bands = (Band(axis=axis, left=w // 2, right=w // 2, unit=unit, edge="clamp") for axis, w, unit in axes)
    return _on_grid(*bands) | TEXT


@pattern
def windows(*, size: tuple[int, ...], shift: tuple[int, ...] = (0,)) -> Mask:
    """Windows side by side; the borders are moved `shift` towards the origin, what that cuts off stands alone: Swin."""
    size = as_counts("size", size, 1)
    if len(size) not in GRID_AXES:
        raise ValueError(f"size must have one number for each of 1, 2 or 3 axes, not {size!r}")
    axes = zip(GRID_AXES[len(size)], size, _spread("shift", shift, len(size)), strict=True)
    return _on_grid(*(Band(axis=a, left=0, right=0, unit=w, offset=(w - s) % w) for a, w, s in axes)) | TEXT


@pattern
def disc(*, radius: float) -> Mask:
    """Δy² + Δx² < radius² on an image (on video also Δt²), text dense: CLEAR (2412.16112)."""
    return _on_grid(Ball(radius=radius)) | TEXT


@pattern
def radial(*, decay: float = 1.0, floor: int = 128, neighbour: float = 1.0, sink: bool = False) -> Mask:
    """A band of positions that halves as frames move apart: Radial Attention (2506.19852), text dense.

    Hunyuan: decay 0.95; Wan: decay 0.2, neighbour 0.5 and the first frame as `sink`. The authors round this to blocks
    of 128 by a vote; here every block that holds a pair is computed, and only the pair.
    """
    near = _on_grid(Decay(decay=decay, floor=floor, neighbour=neighbour))
    return (near | _on_grid(First(count=1, axis="t")) if sink else near) | TEXT


@pattern
def attention_tile(*, references: tuple[int, ...]) -> Mask:
    """The query's own frame, and the reference frames in both directions: Efficient-vDiT (2502.06155), text dense."""
    own = _on_grid(Band(axis="t", left=0, right=0))
    return own | _on_grid(Refs(axis="t", at=references, side="either")) | TEXT


@pattern
def frames(*, before: int, sinks: int = 0, chunk: int = 1) -> Mask:
    """Causal over chunks of frames: the query's chunk, `before` frames before it, the first `sinks` frames; text
    dense. LongLive: chunk 3, before 6, sinks 3.
    """
    check_count("before", before, 0)
    check_count("chunk", chunk, 1)
    if before % chunk:
        raise ValueError(f"before must be whole chunks of {chunk} frames, not {before}")
    mask = _on_grid(Band(axis="t", left=before // chunk, right=0, unit=chunk))
    if sinks:
        check_count("sinks", sinks, 1)
        mask |= _on_grid(Band(axis="t", left=None, right=0, unit=chunk), First(count=sinks, axis="t"))
    return mask | TEXT


@pattern
def spatial(*, frames: int = 1) -> Mask:
    """Keys fewer than `frames` frames away, all positions: the spatial heads of Sparse VideoGen; text dense."""
    check_count("frames", frames, 1)
    return _on_grid(Band(axis="t", left=frames - 1, right=frames - 1)) | TEXT


@pattern
def temporal(*, width: int) -> Mask:
    """Keys of all frames fewer than `width` positions away within the frame: Sparse VideoGen; text dense."""
    check_count("width", width, 1)
    return _on_grid(Band(axis="p", left=width - 1, right=width - 1)) | TEXT
