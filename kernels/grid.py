"""What the operators on a grid share: where the tokens of a call stand, in which order they are computed, averages."""

from __future__ import annotations

import dataclasses
import math
from functools import lru_cache

import torch
from torch import Tensor

from . import lowering, ops
from .call import Call, Cost, Shape, refuse_limit
from .masks import Layout
from .problem import Blocks, Branch, Mixed
from .spec import Spec, grid_axes, label

NAMES = {1: "a line", 2: "an image (h, w)", 3: "a video (t, h, w)"}


def layout_of(spec: Spec, k: Tensor, call: Call) -> Layout:
    """Where the tokens of k (B, Hk, S, D) stand.

    Raises:
        ValueError: the call has no layout, or one of other tokens or axes; it is causal, or the model's own window is.
    """
    refuse_limit(call)
    if call.causal:
        raise ValueError(
            f"{label(spec)} reads in both directions, and this call is causal: choose 'window' or 'blocks'"
        )
    return checked(spec, call.layout, k.shape[2])


def mixed(
    q: Tensor, k: Tensor, v: Tensor, where: Blocks, valid: Tensor | None, call: Call, branch: Branch | None = None
) -> Mixed:
    """One launch over lists of blocks, of tokens that stand in their order: q (B, H, S, D), k, v (B, Hk, K, D)."""
    return ops.mixed_attention(
        q,
        k,
        v,
        where,
        causal=False,
        scale=call.scale,
        valid=valid,
        softcap=call.softcap or 0.0,
        sink_logits=call.sink_logits,
        branch=branch,
    )


def checked(spec: Spec, layout: Layout | None, tokens: int) -> Layout:
    """The layout, if it has this many tokens and the axes that the operator takes; as in `layout_of`."""
    if layout is None:
        raise ValueError(
            f"{label(spec)} needs the grid of the tokens: give layout, e.g. Layout(grid=(32, 32), text_first=4)"
        )
    if layout.tokens != tokens:
        raise ValueError(f"layout has {layout.tokens} tokens, {_shown(layout)}, but the call has {tokens}")
    if layout.order != "row":
        raise ValueError(
            f"layout.order is {layout.order!r}: expected 'row', the order in which the model has its tokens"
        )
    axes = grid_axes(spec)
    if axes is not None and axes != len(layout.grid):
        raise ValueError(
            f"{label(spec)} is for {NAMES[axes]}, and the grid is {layout.grid}, {NAMES[len(layout.grid)]}"
        )
    return layout


def _shown(layout: Layout) -> str:
    return f"a grid of {' × '.join(map(str, layout.grid))} and {layout.text} of text"


def spread(values: tuple[int, ...], axes: int) -> tuple[int, ...]:
    """One number for each axis."""
    return values * axes if len(values) == 1 else values


def in_tiles(layout: Layout, tile: tuple[int, ...]) -> Layout:
    """The same tokens, stored tile after tile with the text behind."""
    return dataclasses.replace(layout, order="tile", tile=spread(tile, len(layout.grid)))


def moved(layout: Layout, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors (B, …, S, D) of tokens as the model has them, in the order of the layout."""
    if layout.order == "row":
        return tensors
    order, _ = _order(layout, tensors[0].device)
    return tuple(x.index_select(-2, order) for x in tensors)


def moved_back(layout: Layout, x: Tensor) -> Tensor:
    """The inverse of `moved`."""
    return x if layout.order == "row" else x.index_select(-2, _order(layout, x.device)[1])


def moved_mask(layout: Layout, valid: Tensor | None) -> Tensor | None:
    """The same for valid (B, S)."""
    if valid is None or layout.order == "row":
        return valid
    return valid.index_select(1, _order(layout, valid.device)[0])


@lru_cache(maxsize=32)
def _order(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        return lowering.permutation(layout, device)


def on_grid(layout: Layout, x: Tensor) -> Tensor:
    """(…, S, D) of tokens as the model has them → those on the grid, (…, *grid, D), a view where x is one."""
    count = math.prod(layout.grid)
    y: Tensor = x.narrow(-2, layout.text_first, count).unflatten(-2, layout.grid)
    return y


def beside_grid(layout: Layout, x: Tensor, axis: int = -2) -> Tensor:
    """The text of x (…, S, D), that before the grid and that behind it together."""
    count = math.prod(layout.grid)
    first = x.narrow(axis, 0, layout.text_first)
    return torch.cat([first, x.narrow(axis, layout.text_first + count, layout.text_last)], axis)


def averaged(x: Tensor, cells: tuple[int, ...]) -> Tensor:
    """Means of x (…, *grid, D) over `cells` cells along each of the last axes of the grid → (…, *cells, D).

    Cell c of n along an axis of size s has the positions ⌊c · s / n⌋ … ⌈(c + 1) · s / n⌉ − 1.
    """
    for n, count in enumerate(reversed(cells)):
        axis = x.dim() - 2 - n
        weights = (_cells if torch.compiler.is_compiling() else _kept_cells)(x.shape[axis], count, x.device)
        x = torch.tensordot(x, weights.to(x.dtype), dims=([axis], [1])).movedim(-1, axis)
    return x


def _cells(size: int, count: int, device: torch.device) -> Tensor:
    """(count, size): what each position weighs in each cell."""
    with torch.inference_mode(False):
        weights = torch.zeros(count, size, dtype=torch.float64)
        for c in range(count):
            start, stop = c * size // count, -(-(c + 1) * size // count)
            weights[c, start:stop] = 1 / (stop - start)
        return weights.to(device) if device.type != "mps" else weights.float().to(device)


_kept_cells = lru_cache(maxsize=32)(_cells)


def cost(spec: Spec, shape: Shape, length: int, pairs: float, more: float = 0.0) -> Cost:
    """Of so many pairs of softmax attention of each query head, and `more` FLOPs."""
    io = (2 * shape.queries + 2) * length * shape.dim * shape.element
    return Cost(flops=4.0 * pairs * shape.queries * shape.dim + more, bytes=io, state_bytes=0.0)


def no_decoding(spec: Spec) -> ValueError:
    """What a question for a decode step is answered with."""
    return ValueError(f"{label(spec)} is of tokens on a grid, which come all at once: nothing is decoded")
