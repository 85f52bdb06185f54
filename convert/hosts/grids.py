"""How each denoiser of diffusers lays out its tokens: one row for each class.

An exported checkpoint carries this file beside `diffusers`; it must import nothing else of attnconvert.
"""

from __future__ import annotations

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
    call. The prompt's tokens stand `first` or `last` where they take part in self-attention. `noise` is the timestep of
    pure noise.
    """

    axes: int
    grid: Callable[[Any, Mapping[str, Any], Moment], tuple[int, ...]]
    text: str = ""
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


def _pixels(config: Any, given: Mapping[str, Any], moment: Moment) -> tuple[int, ...]:
    """Of images (B, C, H, W) in square patches."""
    height, width = given["hidden_states"].shape[-2:]
    return height // config.patch_size, width // config.patch_size


def _latent(config: Any, given: Mapping[str, Any], moment: Moment) -> tuple[int, ...]:
    """Of a UNet, which has a token for each place of its latent (B, C, H, W)."""
    height, width = given["sample"].shape[-2:]
    return height, width


def _frames(config: Any, given: Mapping[str, Any], moment: Moment) -> tuple[int, ...]:
    """Of videos (B, C, T, H, W); CogVideoX has (B, T, C, H, W)."""
    shape = given["hidden_states"].shape
    frames = shape[1] if hasattr(config, "temporal_compression_ratio") else shape[2]
    if isinstance(config.patch_size, int):
        patch = (getattr(config, "patch_size_t", None) or 1, config.patch_size, config.patch_size)
    else:
        patch = tuple(config.patch_size)
    return frames // patch[0], shape[-2] // patch[1], shape[-1] // patch[2]


def _coordinates(config: Any, given: Mapping[str, Any], moment: Moment) -> tuple[int, ...]:
    """Of Flux, whose tokens come with coordinates `img_ids` (N, 3): rows (·, y, x), of any scale, y before x."""
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


DENOISERS: dict[str, Denoiser] = {
    "FluxTransformer2DModel": Denoiser(axes=2, grid=_coordinates, text="first", noise=1.0),
    "SD3Transformer2DModel": Denoiser(axes=2, grid=_pixels, text="last"),
    "PixArtTransformer2DModel": Denoiser(axes=2, grid=_pixels),
    "UNet2DConditionModel": Denoiser(axes=2, grid=_latent),
    "WanTransformer3DModel": Denoiser(axes=3, grid=_frames),
    "HunyuanVideoTransformer3DModel": Denoiser(axes=3, grid=_frames, text="last"),
    "CogVideoXTransformer3DModel": Denoiser(axes=3, grid=_frames, text="first"),
    "MochiTransformer3DModel": Denoiser(axes=3, grid=_frames, text="last"),
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
