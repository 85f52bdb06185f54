"""What the stages ask of a denoiser of diffusers: its sites, and inputs to run it with.

Beside diffusers.py and grids.py, which an exported checkpoint carries, this is the only file that reaches into it.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .grids import Denoiser, denoiser
from .sites import Conversion, Site, Unsupported, all_full, setting, submodule
from .surgery import converted

log = logging.getLogger("attnconvert")
DOWN = (1, 2, 4, 8, 16, 32)  # at which a UNet attends
TEXT = 11  # tokens of the prompt when sites are looked for: no grid of the probe has as many
Draw = Callable[..., Tensor]


def _coordinates(model: Any, grid: Sequence[int], text: int, columns: int) -> dict[str, Any]:
    """Of Flux and Flux 2: rows (0, y, x) and (0, y, x, 0). Where a model has no values these have, they are read."""
    device = "cpu" if model.device.type == "meta" else model.device
    ids = torch.zeros(*grid, columns, device=device)
    ids[..., 1] = torch.arange(grid[0], device=device)[:, None]
    ids[..., 2] = torch.arange(grid[1], device=device)
    return {"img_ids": ids.flatten(0, 1), "txt_ids": torch.zeros(text, columns, device=device)}


def _guidance(model: Any, batch: int, scale: float) -> dict[str, Any]:
    return {"guidance": torch.full((batch,), scale, device=model.device)} if model.config.guidance_embeds else {}


def _flux(model: Any, grid: Sequence[int], text: int, batch: int, draw: Draw) -> dict[str, Any]:
    return {
        "encoder_hidden_states": draw(batch, text, model.config.joint_attention_dim),
        "pooled_projections": draw(batch, model.config.pooled_projection_dim),
        **_coordinates(model, grid, text, 3),
        **_guidance(model, batch, 3.5),
    }


def _flux2(model: Any, grid: Sequence[int], text: int, batch: int, draw: Draw) -> dict[str, Any]:
    return {
        "encoder_hidden_states": draw(batch, text, model.config.joint_attention_dim),
        **_coordinates(model, grid, text, 4),
        **_guidance(model, batch, 3.5),
    }


def _qwen(model: Any, grid: Sequence[int], text: int, batch: int, draw: Draw) -> dict[str, Any]:
    return {
        "encoder_hidden_states": draw(batch, text, model.config.joint_attention_dim),
        "encoder_hidden_states_mask": torch.ones(batch, text, device=model.device, dtype=torch.bool),
        "img_shapes": [[(1, *grid)]] * batch,
        **_guidance(model, batch, 1.0),
    }


def _ltx(model: Any, grid: Sequence[int], text: int, batch: int, draw: Draw) -> dict[str, Any]:
    return {
        "encoder_hidden_states": draw(batch, text, model.config.caption_channels),
        "encoder_attention_mask": torch.ones(batch, text, device=model.device, dtype=torch.int64),
        **dict(zip(("num_frames", "height", "width"), grid, strict=True)),
    }


def _sd3(model: Any, grid: Sequence[int], text: int, batch: int, draw: Draw) -> dict[str, Any]:
    return {
        "encoder_hidden_states": draw(batch, text, model.config.joint_attention_dim),
        "pooled_projections": draw(batch, model.config.pooled_projection_dim),
    }


def _pixart(model: Any, grid: Sequence[int], text: int, batch: int, draw: Draw) -> dict[str, Any]:
    config = model.config
    size = draw(batch, 2).abs() + 100
    added = {"resolution": size, "aspect_ratio": size[:, :1]} if model.use_additional_conditions else {}
    return {
        "encoder_hidden_states": draw(batch, text, config.caption_channels or config.cross_attention_dim),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None, **added},
    }


def _unet(model: Any, grid: Sequence[int], text: int, batch: int, draw: Draw) -> dict[str, Any]:
    config = model.config
    if config.addition_embed_type not in (None, "text", "text_time") or config.encoder_hid_dim_type not in (
        None,
        "text_proj",
    ):
        raise Unsupported(
            f"{type(model).__name__} is conditioned by {config.addition_embed_type or config.encoder_hid_dim_type}: "
            "known are text, and text with the sizes of SDXL"
        )
    given: dict[str, Any] = {
        "encoder_hidden_states": draw(batch, text, config.encoder_hid_dim or config.cross_attention_dim)
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        given["added_cond_kwargs"] = {"text_embeds": draw(batch, pooled), "time_ids": draw(batch, 6).abs() * 100}
    if config.time_cond_proj_dim is not None:
        given["timestep_cond"] = draw(batch, config.time_cond_proj_dim)
    if config.class_embed_type is not None or config.num_class_embeds is not None:
        raise Unsupported(f"{type(model).__name__} is conditioned by class labels, which are not known here")
    return given


def _wan(model: Any, grid: Sequence[int], text: int, batch: int, draw: Draw) -> dict[str, Any]:
    config = model.config
    given = {"encoder_hidden_states": draw(batch, text, config.text_dim)}
    if config.image_dim is not None:
        given["encoder_hidden_states_image"] = draw(batch, config.pos_embed_seq_len or 257, config.image_dim)
    return given


def _hunyuan(model: Any, grid: Sequence[int], text: int, batch: int, draw: Draw) -> dict[str, Any]:
    config = model.config
    return {
        "encoder_hidden_states": draw(batch, text, config.text_embed_dim),
        "encoder_attention_mask": torch.ones(batch, text, device=model.device, dtype=torch.int64),
        "pooled_projections": draw(batch, config.pooled_projection_dim),
        **_guidance(model, batch, 6000.0),
    }


def _cogvideox(model: Any, grid: Sequence[int], text: int, batch: int, draw: Draw) -> dict[str, Any]:
    config = model.config
    given: dict[str, Any] = {"encoder_hidden_states": draw(batch, text, config.text_embed_dim)}
    if config.use_rotary_positional_embeddings:
        angles = torch.arange(math.prod(grid))[:, None] / 100.0 ** torch.linspace(0, 1, config.attention_head_dim // 2)
        angles = angles.repeat_interleave(2, 1).to(model.device)  # (N, D)
        given["image_rotary_emb"] = (angles.cos(), angles.sin())
    if config.ofs_embed_dim is not None:
        given["ofs"] = torch.full((1,), 2.0, device=model.device)
    return given


def _mochi(model: Any, grid: Sequence[int], text: int, batch: int, draw: Draw) -> dict[str, Any]:
    return {
        "encoder_hidden_states": draw(batch, text, model.config.text_embed_dim),
        "encoder_attention_mask": torch.ones(batch, text, device=model.device, dtype=torch.bool),
    }


CONDITIONS: dict[str, Callable[[Any, Sequence[int], int, int, Draw], dict[str, Any]]] = {
    "FluxTransformer2DModel": _flux,
    "Flux2Transformer2DModel": _flux2,
    "QwenImageTransformer2DModel": _qwen,
    "SD3Transformer2DModel": _sd3,
    "PixArtTransformer2DModel": _pixart,
    "UNet2DConditionModel": _unet,
    "WanTransformer3DModel": _wan,
    "HunyuanVideoTransformer3DModel": _hunyuan,
    "CogVideoXTransformer3DModel": _cogvideox,
    "MochiTransformer3DModel": _mochi,
    "LTXVideoTransformer3DModel": _ltx,
}


def latent_shape(model: Any, grid: Sequence[int], batch: int = 1) -> tuple[int, ...]:
    """Of the latent whose tokens stand on this grid, (h, w) or (t, h, w), as the model takes it."""
    row, config = denoiser(model), model.config
    if len(grid) != row.axes:
        raise ValueError(f"{type(model).__name__} has tokens on a grid of {row.axes} axes, not {tuple(grid)}")
    return row.latent(config, tuple(grid), batch)


def dummy_inputs(
    model: Any, grid: Sequence[int], text: int | None = None, batch: int = 1, seed: int = 0
) -> dict[str, Any]:
    """Arguments of one call: noise on a grid of tokens, noise for a prompt of `text` tokens, times in mid range."""
    row, name = denoiser(model), next(c.__name__ for c in type(model).__mro__ if c.__name__ in CONDITIONS)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(model.device, model.dtype)

    given = CONDITIONS[name](model, grid, prompt_length(model) if text is None else text, batch, draw)
    latent = draw(*latent_shape(model, grid, batch))
    time = row.data + torch.linspace(0.7, 0.4, batch, device=model.device) * (row.noise - row.data)
    whole = max(row.noise, row.data) > 1  # of 1000 steps
    key = "sample" if name == "UNet2DConditionModel" else "hidden_states"
    return {key: latent, "timestep": time.round() if whole else time, **given, "return_dict": False}


def prompt_length(model: Any) -> int:
    """Tokens of a prompt that any length may have: TEXT, or what the model insists on."""
    config = model.config
    if getattr(config, "use_rotary_positional_embeddings", None) is False:
        return int(config.max_text_seq_length)  # CogVideoX adds positions to all tokens, text among them
    return 512 if getattr(config, "added_kv_proj_dim", None) else TEXT  # Wan cuts image from text at 512


def probe_grid(model: Any) -> tuple[int, ...]:
    """A small grid whose sides and sizes all differ."""
    row, config = denoiser(model), model.config
    if getattr(config, "use_learned_positional_embeddings", False):
        frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
        return (
            -(-frames // (config.patch_size_t or 1)),
            config.sample_height // config.patch_size,
            config.sample_width // config.patch_size,
        )
    if row.axes == 3:
        return 3, 4, 5
    levels = len(getattr(config, "down_block_types", ()) or (None,)) - 1
    return (3 * 2**levels, 4 * 2**levels) if levels else (5, 7)


class _Record(TorchFunctionMode):
    """Notes for every call of softmax attention which module makes it, and with what shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[nn.Module] = []
        self.calls: list[tuple[nn.Module | None, torch.Size, torch.Size]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k = (args[n] if len(args) > n else kwargs[name] for n, name in enumerate(("query", "key")))
            self.calls.append((self.running[-1] if self.running else None, q.shape, k.shape))
        return func(*args, **kwargs)


def _attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What has a processor, or a name that says attention and nothing below it that does."""
    for name, module in model.named_modules():
        named = [type(m).__name__.endswith(("Attention", "Attn")) for m in module.modules()]
        if hasattr(module, "processor") or (named[0] and not any(named[1:])):
            yield name, module


@contextlib.contextmanager
def aside(conversion: Conversion) -> Iterator[None]:
    """Inside, a converted model may be called besides, unobserved; afterwards its sites know the call before it again.

    Checkpointed blocks of that call run again in its backward pass, and must find its grid and its times.
    """
    names = list(conversion.sites)
    moment = submodule(conversion.model, names[0]).processor.moment  # type: ignore[union-attr]  # one for all
    before = vars(moment).copy()
    try:
        with setting(conversion.sites.values(), "observer", None):
            yield
    finally:
        vars(moment).update(before)


@torch.no_grad()
def find_sites(model: Any, tolerance: float = 1e-5) -> list[Site]:
    """The sites of a denoiser, found by running it: softmax attention of all tokens of its grid to one another.

    Attention to the prompt or within it is none. Each site then runs once with all its heads full, and must give what
    the untouched model gives. A model on the meta device has no numbers, so that there only sites are found.

    Raises:
        Unsupported: the class of the model is not known, or something that looks like attention is not known here.
    """
    row, grid, text = denoiser(model), probe_grid(model), prompt_length(model)
    record, names = _Record(), {module: name for name, module in _attentions(model)}
    ran: set[nn.Module] = set()

    def enter(module: nn.Module, args: Any) -> None:
        record.running.append(module)
        ran.add(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        record.running.pop()

    hooks = [h for m in names for h in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    try:
        with record, attention_backend("native"), setting(model.modules(), "training", False):
            model(**dummy_inputs(model, grid, text))
    finally:
        for hook in hooks:
            hook.remove()
    sites: dict[nn.Module, Site] = {}
    for module, q, k in record.calls:
        place = _place(row, grid, text, q[2], k[2])
        if place is None:
            continue
        if module is None or not hasattr(module, "processor"):
            where = "outside of any attention module" if module is None else f"in {names[module]}, without a processor"
            raise Unsupported(f"{type(model).__name__} attends to all its tokens {where}: that cannot be converted")
        down, side = place
        if module in sites and sites[module].heads != q[1]:
            raise Unsupported(f"{names[module]} attends twice, with {sites[module].heads} heads and with {q[1]}")
        site = Site(names[module], len(sites), q[1], k[1], q[3], None, False, row.axes, down, side)
        sites.setdefault(module, site)
    silent = [names[m] for m in names if m not in {module for module, _, _ in record.calls}]
    if silent or not sites:
        what = f"{silent[0]} looks like attention but" if silent else "it"
        raise Unsupported(f"{type(model).__name__}: {what} does not call scaled_dot_product_attention")
    found = list(sites.values())
    if model.device.type == "meta":
        log.info("%s is on the meta device: its sites are found, not compared", type(model).__name__)
    else:
        _check_full(model, found, grid, text, tolerance)
    return found


def _place(row: Denoiser, grid: Sequence[int], text: int, queries: int, keys: int) -> tuple[int, str] | None:
    """At which part of the resolution all tokens attend to one another, and on which side text is; None if not."""
    for down in DOWN if queries == keys else ():
        tokens = math.prod(-(-n // down) for n in grid)
        if queries == tokens:
            return down, ""
        if row.text and queries == tokens + text:
            return down, row.text
    return None


def _check_full(model: Any, sites: list[Site], grid: Sequence[int], text: int, tolerance: float) -> None:
    """Compare each site with the untouched model's, on the same inputs: depth amplifies rounding beyond measure."""
    inputs = dummy_inputs(model, grid, text, batch=2)
    stock: dict[str, list[Tensor]] = {}
    errors: dict[str, float] = {}

    def tensors(output: Any) -> list[Tensor]:
        return [x for x in (output if isinstance(output, tuple) else (output,)) if isinstance(x, Tensor)]

    def keep(name: str) -> Any:
        return lambda module, args, output: stock.update({name: tensors(output)})

    def compare(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            want = stock[name]
            pairs = zip(tensors(output), want, strict=True)
            errors[name] = max(((a - b).abs().max() / b.abs().max().clamp_min(1e-6)).item() for a, b in pairs)
            return tuple(want) if isinstance(output, tuple) else want[0]  # the next site sees what it saw before

        return hook

    with setting(model.modules(), "training", False):
        _with_hooks(model, sites, keep, inputs)
        with converted(model, all_full(sites)):
            _with_hooks(model, sites, compare, inputs)
    limit = max(tolerance, 8 * torch.finfo(model.dtype).eps)
    for name, error in errors.items():
        if not error <= limit:
            raise Unsupported(
                f"{name} ({type(model).__name__}): with every head full it differs from the untouched model by "
                f"{error:.1e} (relative, limit {limit:.1e}); something in its attention is not known here"
            )


def _with_hooks(model: Any, sites: Sequence[Site], make: Any, inputs: Mapping[str, Any]) -> None:
    hooks = [submodule(model, site.name).register_forward_hook(make(site.name)) for site in sites]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
