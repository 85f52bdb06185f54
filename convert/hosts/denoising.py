"""How each denoiser of diffusers is called: latents, a time and a prompt in the model's own words, and back.

Outside of this file latents are (B, C, H, W) or (B, C, T, H, W), as a pipeline's VAE reads them, times run from 0
(data) to 1 (noise), and a prediction is shaped like the latents and means what `processes.Process` says it does. What
packs tokens, scales timesteps, adds size embeddings and reverses signs is here: one function per class, listed in
`FORMS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..processes import TRAINED
from .sites import Unsupported

PATCH = 2  # of FLUX, whose tokens are packed outside of the model
PIXELS = 8  # per latent along a side, which the size embeddings of SDXL and PixArt count in
Given = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Calling:
    """What a call has besides latents, time and prompt.

    `guidance` goes to models distilled to take it as an input. `trained` is FLUX's token grid (H, W) that positions
    are stretched to at other sizes; None: positions count tokens, as the published FLUX models do.
    """

    guidance: float = 3.5
    trained: tuple[int, int] | None = None


@dataclass(frozen=True)
class Form:
    """How a class of diffusers is called, and what its latents are.

    `arguments` come from (model, x, t, conditions, calling). `needs` and `takes` are the conditions it must and may
    have; `axes` is 2 for images, 3 for videos; `reads` makes the prediction of the model's output, given x.
    """

    arguments: Callable[[Any, Tensor, Tensor, Given, Calling], dict[str, Any]]
    needs: tuple[str, ...]
    takes: tuple[str, ...] = ()
    axes: int = 2
    packed: int = 1  # tokens of the latents that are one in the model's in_channels
    reads: Callable[[Tensor, Tensor], Tensor] = lambda output, x: output


def pack(x: Tensor) -> Tensor:
    """(B, C, H, W) → (B, H/2 · W/2, 4 C): a token for each 2 × 2 patch, row by row; channels, then rows, then columns.

    Raises:
        UsageError: the sides are not even.
    """
    b, c, h, w = x.shape
    if h % PATCH or w % PATCH:
        raise UsageError(f"latents of FLUX have even sides, not {h} × {w}")
    patches = x.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // PATCH) * (w // PATCH), c * PATCH**2)


def unpack(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """The inverse of `pack` for latents of `size` (H, W)."""
    b, _, width = tokens.shape
    h, w = size[0] // PATCH, size[1] // PATCH
    patches = tokens.reshape(b, h, w, width // PATCH**2, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, width // PATCH**2, h * PATCH, w * PATCH)


def positions(grid: tuple[int, int], trained: tuple[int, int] | None, device: torch.device) -> Tensor:
    """(H · W, 3) rows (0, y, x) of FLUX's image tokens; centred and stretched to the grid of training where given."""
    axes = []
    for side, own in zip(grid, trained or grid, strict=True):
        axes.append((torch.arange(side, device=device) + 0.5) * (own / side) - 0.5)
    y, x = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([torch.zeros_like(y), y, x], -1).reshape(-1, 3)


def _flux(model: Any, x: Tensor, t: Tensor, given: Given, calling: Calling) -> dict[str, Any]:
    grid = (x.shape[-2] // PATCH, x.shape[-1] // PATCH)
    arguments = {
        "hidden_states": pack(x),
        "timestep": t,
        "img_ids": positions(grid, calling.trained, x.device),
        "txt_ids": torch.zeros(given["encoder_hidden_states"].shape[1], 3, device=x.device),
        **given,
    }
    if model.config.guidance_embeds:
        arguments["guidance"] = torch.full_like(t, calling.guidance)
    return arguments


def _in_thousandths(model: Any, x: Tensor, t: Tensor, given: Given, calling: Calling) -> dict[str, Any]:
    """SD3 and Wan."""
    return {"hidden_states": x, "timestep": TRAINED * t, **given}


def _hunyuan_video(model: Any, x: Tensor, t: Tensor, given: Given, calling: Calling) -> dict[str, Any]:
    if model.config.image_condition_type is not None:
        raise Unsupported("a HunyuanVideo that continues an image (image_condition_type); text to video is known")
    arguments = _in_thousandths(model, x, t, given, calling)
    if model.config.guidance_embeds:
        arguments["guidance"] = torch.full_like(t, 1000 * calling.guidance)
    return arguments


def _mochi(model: Any, x: Tensor, t: Tensor, given: Given, calling: Calling) -> dict[str, Any]:
    """Mochi's own time runs from the noise to the data, and so does its velocity: `reads` turns it around."""
    mask = given["encoder_attention_mask"].bool()
    return {"hidden_states": x, "timestep": TRAINED * (1 - t), **given, "encoder_attention_mask": mask}


def trained_step(t: Tensor) -> Tensor:
    """The number, from 0, of the trained step that `Process` rounds t to; the data itself counts as the first."""
    return (t * TRAINED).round().clamp_min(1) - 1


def _pixart(model: Any, x: Tensor, t: Tensor, given: Given, calling: Calling) -> dict[str, Any]:
    size: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if model.use_additional_conditions:
        height, width = x.shape[-2:]
        size["resolution"] = x.new_tensor([[PIXELS * height, PIXELS * width]]).expand(len(x), -1)
        size["aspect_ratio"] = x.new_tensor([[height / width]]).expand(len(x), -1)
    return {"hidden_states": x, "timestep": trained_step(t), "added_cond_kwargs": size, **given}


def _unet(model: Any, x: Tensor, t: Tensor, given: Given, calling: Calling) -> dict[str, Any]:
    arguments: dict[str, Any] = {"sample": x, "timestep": trained_step(t)}
    arguments |= {name: given[name] for name in ("encoder_hidden_states", "encoder_attention_mask") if name in given}
    kind = model.config.addition_embed_type
    if kind == "text_time":  # SDXL: original size, crop, target size
        if "pooled_projections" not in given:
            raise UsageError("an SDXL denoiser needs pooled_projections (its text_embeds) in the bank of conditions")
        height, width = (PIXELS * side for side in x.shape[-2:])
        own = x.new_tensor([[height, width, 0, 0, height, width]]).expand(len(x), -1)
        added = {"text_embeds": given["pooled_projections"], "time_ids": given.get("time_ids", own)}
        arguments["added_cond_kwargs"] = added
    elif kind is not None:
        raise Unsupported(f"a UNet2DConditionModel with addition_embed_type {kind!r}; SD and SDXL are known")
    return arguments


def _cogvideox(model: Any, x: Tensor, t: Tensor, given: Given, calling: Calling) -> dict[str, Any]:
    if model.config.ofs_embed_dim is not None:
        raise Unsupported("a CogVideoX that continues an image (ofs_embed_dim); text to video is known")
    frames = x.transpose(1, 2)  # (B, T, C, H, W)
    arguments: dict[str, Any] = {"hidden_states": frames, "timestep": trained_step(t), **given}
    if model.config.use_rotary_positional_embeddings:
        arguments["image_rotary_emb"] = _cogvideox_rotation(model.config, x)
    return arguments


def _cogvideox_rotation(config: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T · H · W, D) of its video tokens."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    p, p_t = config.patch_size, config.patch_size_t
    frames, grid = x.shape[2], (x.shape[3] // p, x.shape[4] // p)
    base = config.sample_height // p, config.sample_width // p
    settings: dict[str, Any]
    if p_t is None:  # 1.0: positions are stretched to fit into the grid of training
        settings = {"crops_coords": _fitted(grid, base), "temporal_size": frames}
    else:  # 1.5: positions count tokens
        settings = {"crops_coords": None, "temporal_size": -(-frames // p_t), "grid_type": "slice", "max_size": base}
    cos, sin = get_3d_rotary_pos_embed(config.attention_head_dim, grid_size=grid, device=x.device, **settings)
    return cos, sin


def _fitted(grid: tuple[int, int], base: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Corners of the largest rectangle of the grid's proportions in the middle of `base`."""
    scale = min(base[0] / grid[0], base[1] / grid[1])
    height, width = round(grid[0] * scale), round(grid[1] * scale)
    top, left = round((base[0] - height) / 2), round((base[1] - width) / 2)
    return (top, left), (top + height, left + width)


TEXT, POOLED, MASK = "encoder_hidden_states", "pooled_projections", "encoder_attention_mask"
FORMS = {
    "FluxTransformer2DModel": Form(
        _flux, (TEXT, POOLED), packed=PATCH**2, reads=lambda output, x: unpack(output, x.shape[-2:])
    ),
    "SD3Transformer2DModel": Form(_in_thousandths, (TEXT, POOLED)),
    # PixArt predicts a variance as well, in the second half of the channels
    "PixArtTransformer2DModel": Form(_pixart, (TEXT,), (MASK,), reads=lambda output, x: output[:, : x.shape[1]]),
    "UNet2DConditionModel": Form(_unet, (TEXT,), (MASK, POOLED, "time_ids")),
    "WanTransformer3DModel": Form(_in_thousandths, (TEXT,), ("encoder_hidden_states_image",), axes=3),
    "HunyuanVideoTransformer3DModel": Form(_hunyuan_video, (TEXT, MASK, POOLED), axes=3),
    "CogVideoXTransformer3DModel": Form(_cogvideox, (TEXT,), axes=3, reads=lambda output, x: output.transpose(1, 2)),
    "MochiTransformer3DModel": Form(_mochi, (TEXT, MASK), axes=3, reads=lambda output, x: -output),
}


def inner(model: Any) -> Any:
    """The denoiser itself, where PEFT or torch.compile has wrapped it."""
    model = getattr(model, "_orig_mod", model)
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def form_of(model: Any) -> Form:
    """How models of its class are called, whose subclasses count as well.

    Raises:
        Unsupported: the class is not in the table.
    """
    names = [cls.__name__ for cls in type(inner(model)).__mro__]
    found = next((FORMS[name] for name in names if name in FORMS), None)
    if found is None:
        raise Unsupported(f"{names[0]} is no denoiser that is known how to call; known are {', '.join(FORMS)}")
    return found


def channels(model: Any) -> int:
    """C of the model's latents."""
    return int(inner(model).config.in_channels) // form_of(model).packed


def latent_shape(model: Any, size: Sequence[int]) -> tuple[int, ...]:
    """(C, H, W) or (C, T, H, W) of latents of `size`, (H, W) or (T, H, W).

    Raises:
        UsageError: the size has the wrong number of axes.
    """
    axes = form_of(model).axes
    if len(size) != axes:
        wanted = "(height, width)" if axes == 2 else "(frames, height, width)"
        raise UsageError(f"latents of a {type(inner(model)).__name__} are {wanted}, not {tuple(size)}")
    return channels(model), *size


def token_grid(model: Any, size: Sequence[int]) -> tuple[int, ...]:
    """The grid of image or video tokens of latents of `size`, (H, W) or (T, H, W): as many as there are patches.

    Raises:
        UsageError: the size has the wrong number of axes, or is not in whole patches.
    """
    shape = latent_shape(model, size)[1:]
    config = inner(model).config
    found = getattr(config, "patch_size", None) or 1
    if form_of(model).packed > 1:
        found = PATCH
    frames = [getattr(config, "patch_size_t", None) or 1] if len(shape) == 3 else []
    patch = tuple(found) if isinstance(found, tuple | list) else (*frames, found, found)
    if any(n % p for n, p in zip(shape, patch, strict=True)):
        sizes, patches = ("×".join(map(str, numbers)) for numbers in (shape, patch))
        raise UsageError(f"latents of {sizes} cannot be cut into the patches of {patches} of {type(model).__name__}")
    return tuple(n // p for n, p in zip(shape, patch, strict=True))


def arguments(model: Any, x: Tensor, t: Tensor, conditions: Given, calling: Calling | None = None) -> dict[str, Any]:
    """What the model's `forward` is given for latents x at times t (B,) and conditions by name, each (B, …).

    Numbers come in the model's own type, times in fp32.

    Raises:
        Unsupported: the model's class is not known, or this model reads something else besides.
        UsageError: latents or conditions do not fit it.
    """
    row, base = form_of(model), inner(model)
    name = type(base).__name__
    if x.ndim != row.axes + 2 or t.shape != x.shape[:1]:
        wanted = "(B, C, H, W)" if row.axes == 2 else "(B, C, T, H, W)"
        raise UsageError(f"{name} takes latents {wanted} and times (B,), not {tuple(x.shape)} and {tuple(t.shape)}")
    if x.shape[1] != channels(model):
        raise UsageError(
            f"{name} reads {channels(model)} channels and the latents have {x.shape[1]}: "
            "models that read an image or a mask beside the latents cannot be converted"
        )
    missing = [key for key in row.needs if key not in conditions]
    strange = [key for key in conditions if key not in (*row.needs, *row.takes)]
    if missing or strange:
        problem = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(strange)}, which it does not take"
        raise UsageError(f"the bank of conditions for {name} {problem}; it holds {', '.join(conditions)}")
    given = {key: value.to(x.device) for key, value in conditions.items()}
    given = {key: value.to(base.dtype) if value.is_floating_point() else value for key, value in given.items()}
    return row.arguments(base, x.to(base.dtype), t.float(), given, calling or Calling())


def predict(model: Any, x: Tensor, t: Tensor, conditions: Given, calling: Calling | None = None) -> Tensor:
    """The model's prediction for x at t (B,), in the shape and type of x. Errors as of `arguments`."""
    output = model(**arguments(model, x, t, conditions, calling), return_dict=False)[0]
    return form_of(model).reads(output, x).to(x.dtype)
