"""How each denoiser of diffusers lays out its tokens: one row for each class.

An exported checkpoint carries this file beside `diffusers`; it must import nothing else of attnconvert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .sites import Unsupported


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """How a class of diffusers lays out its tokens.

    `grid` reads the grid of image or video tokens, in row-major order, out of the model's config and the arguments of a
    call; `latent` has the shape of the latent of a grid and a batch. The prompt's tokens stand `first` or `last` where
    they take part in self-attention. `data` and `noise` are the timesteps of pure data and of pure noise.
    """

    axes: int
    grid: Callable[[Any, Mapping[str, Any], Moment], tuple[int, ...]]
    latent: Callable[[Any, tuple[int, ...], int], tuple[int, ...]]
    text: str = ""
    data: float = 0.0
    noise: float = 1000.0


@dataclass
class Moment:
    """What the sites of a model share of the call that runs: grid, tokens of the prompt, batch, time (B,).

    `grids` has what was seen, by number of image tokens: where a compiler runs, coordinates cannot be read. `mask` is
    the last padding mask with what it came to.
    """

    grid: tuple[int, ...] = ()
    text: int = 0
    batch: int = 0
    time: Tensor | None = None
    grids: dict[int, tuple[int, ...]] = field(default_factory=dict)
    mask: tuple[Tensor, Tensor | None] | None = None


def _patch(config: Any) -> tuple[int, int, int]:
    """Size of a patch: frames, height, width."""
    if isinstance(config.patch_size, int):
        return getattr(config, "patch_size_t", None) or 1, config.patch_size, config.patch_size
    frames, height, width = config.patch_size
    return frames, height, width


def _pixels(config: Any, given: Mapping[str, Any], moment: Moment) -> tuple[int, ...]:
    """Of images (B, C, H, W) in patches."""
    height, width = given["hidden_states"].shape[-2:]
    return height // _patch(config)[1], width // _patch(config)[2]


def _of_pixels(config: Any, grid: tuple[int, ...], batch: int) -> tuple[int, ...]:
    return batch, config.in_channels, grid[0] * _patch(config)[1], grid[1] * _patch(config)[2]


def _latent(config: Any, given: Mapping[str, Any], moment: Moment) -> tuple[int, ...]:
    """Of a UNet, which has a token for each place of its latent (B, C, H, W)."""
    height, width = given["sample"].shape[-2:]
    return height, width


def _of_latent(config: Any, grid: tuple[int, ...], batch: int) -> tuple[int, ...]:
    return batch, config.in_channels, *grid


def _frames(config: Any, given: Mapping[str, Any], moment: Moment) -> tuple[int, ...]:
    """Of videos (B, C, T, H, W)."""
    return tuple(n // p for n, p in zip(given["hidden_states"].shape[2:], _patch(config), strict=True))


def _of_frames(config: Any, grid: tuple[int, ...], batch: int) -> tuple[int, ...]:
    return batch, config.in_channels, *(n * p for n, p in zip(grid, _patch(config), strict=True))


def _channels_late(config: Any, given: Mapping[str, Any], moment: Moment) -> tuple[int, ...]:
    """Of CogVideoX's videos (B, T, C, H, W)."""
    _, frames, _, height, width = given["hidden_states"].shape
    return tuple(n // p for n, p in zip((frames, height, width), _patch(config), strict=True))


def _of_channels_late(config: Any, grid: tuple[int, ...], batch: int) -> tuple[int, ...]:
    frames, height, width = (n * p for n, p in zip(grid, _patch(config), strict=True))
    return batch, frames, config.in_channels, height, width


def _of_sequence(config: Any, grid: tuple[int, ...], batch: int) -> tuple[int, ...]:
    """Of tokens (B, N, C) that were cut into patches before."""
    return batch, math.prod(grid), config.in_channels


def _coordinates(config: Any, given: Mapping[str, Any], moment: Moment) -> tuple[int, ...]:
    """Of Flux, whose tokens come with coordinates `img_ids` (N, 3): rows (·, y, x), of any scale, y before x.

    Flux 2 has rows (·, y, x, ·).
    """
    ids = given["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids  # (N, 3)
    tokens = int(ids.shape[0])
    if torch.compiler.is_compiling():
        if tokens not in moment.grids:
            raise Unsupported(
                f"the grid of {tokens} image tokens is not known while compiling, img_ids cannot be read there: "
                "run the model once at this size before it is compiled"
            )
        height, width = moment.grids[tokens]
        rows = ids.reshape(height, width, -1)
        same = (rows[:, :, 1] == rows[:, :1, 1]).all() & (rows[:, :, 2] == rows[:1, :, 2]).all()
        torch._assert_async(same, f"img_ids are not of {height} × {width} tokens, the size that ran before compiling")
        return height, width
    ids = ids.float().cpu()
    if bool((ids[:, 0] != ids[0, 0]).any()):
        raise Unsupported(
            "img_ids differ in their first column: reference images beside the one that is made, as Kontext has "
            "them, are not on one grid and cannot be converted"
        )
    y, x = ids[:, 1], ids[:, 2]
    drops = (x[1:] < x[:-1]).nonzero()  # where a row ends; coordinates in half precision may coincide
    width = int(drops[0]) + 1 if len(drops) else (1 if bool((y != y[0]).any()) else tokens)
    height = tokens // width
    if height * width == tokens:
        y, x = y.view(height, width), x.view(height, width)
    if height * width != tokens or bool((x != x[:1]).any()) or bool((y != y[:, :1]).any()):
        raise Unsupported(f"img_ids of {tokens} tokens are no grid in row-major order: rows (·, y, x) with y before x")
    moment.grids[tokens] = (height, width)
    return height, width


def _shapes(config: Any, given: Mapping[str, Any], moment: Moment) -> tuple[int, ...]:
    """Of Qwen-Image, which is told the sizes (1, h, w) of the images of each sample."""
    shapes = given.get("img_shapes") or ()
    images = {tuple(map(tuple, x if isinstance(x[0], tuple | list) else (x,))) for x in shapes}
    one = images.pop() if len(images) == 1 else ()
    if len(one) != 1 or one[0][0] != 1:
        raise Unsupported(f"img_shapes must name one image (1, h, w) for each sample, the same for all, not {shapes}")
    return int(one[0][1]), int(one[0][2])


def _told(config: Any, given: Mapping[str, Any], moment: Moment) -> tuple[int, ...]:
    """Of LTX-Video, which is told the size of its video."""
    grid = tuple(given.get(name) for name in ("num_frames", "height", "width"))
    if None in grid:
        raise Unsupported(
            "num_frames, height and width must be given beside video_coords: they say how the tokens of the video stand"
        )
    return tuple(int(n) for n in grid if n is not None)


_IMAGE: dict[str, Any] = {"axes": 2, "grid": _pixels, "latent": _of_pixels}
_VIDEO: dict[str, Any] = {"axes": 3, "grid": _frames, "latent": _of_frames}
_STEPS: dict[str, Any] = {"data": -1.0, "noise": 999.0}  # of a thousand trained steps, counted from 0
DENOISERS: dict[str, Denoiser] = {
    "FluxTransformer2DModel": Denoiser(axes=2, grid=_coordinates, latent=_of_sequence, text="first", noise=1.0),
    "Flux2Transformer2DModel": Denoiser(axes=2, grid=_coordinates, latent=_of_sequence, text="first", noise=1.0),
    "QwenImageTransformer2DModel": Denoiser(axes=2, grid=_shapes, latent=_of_sequence, text="first", noise=1.0),
    "SD3Transformer2DModel": Denoiser(**_IMAGE, text="last"),
    "PixArtTransformer2DModel": Denoiser(**_IMAGE, **_STEPS),
    "UNet2DConditionModel": Denoiser(axes=2, grid=_latent, latent=_of_latent, **_STEPS),
    "WanTransformer3DModel": Denoiser(**_VIDEO),
    "HunyuanVideoTransformer3DModel": Denoiser(**_VIDEO, text="last"),
    "CogVideoXTransformer3DModel": Denoiser(
        axes=3, grid=_channels_late, latent=_of_channels_late, text="first", **_STEPS
    ),
    "MochiTransformer3DModel": Denoiser(**_VIDEO, text="last", data=1000.0, noise=0.0),  # its time runs the other way
    "LTXVideoTransformer3DModel": Denoiser(axes=3, grid=_told, latent=_of_sequence),
}
REFUSED = {
    "SanaTransformer2DModel": "its self-attention is linear already, there is nothing to convert",
}


def denoiser(model: Any) -> Denoiser:
    """The row of DENOISERS for a model.

    Raises:
        Unsupported: its class is not known here.
    """
    names = [cls.__name__ for cls in type(model).__mro__]
    for name in names:
        if name in REFUSED:
            raise Unsupported(f"{name} cannot be converted: {REFUSED[name]}")
        if name in DENOISERS:
            return DENOISERS[name]
    raise Unsupported(f"{names[0]} is no denoiser that is known here; known are {', '.join(sorted(DENOISERS))}")
