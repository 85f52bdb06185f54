"""What a conversion of an image or video model will be, told from its architecture alone: no weights, no prompts.

The model is built on the meta device, where tensors have shapes and no values, from the config of its folder, of the
local hub cache, or of those that attnconvert ships.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..kernels import grid_masks, lowering, sparse
from ..kernels.masks import Layout
from ..kernels.masks_density import density
from ..kernels.spec import Full, Sla, Sparse, Spec, label, nested
from .conditioning import load_conditions
from .denoiser_sources import CONDITIONS, PREDICTIONS, architecture, class_of
from .errors import UsageError, one_line
from .evaluation_images import attention_flops
from .foresight_memory import training_memory
from .hosts.denoisers import find_sites
from .hosts.denoising import FORMS, latent_shape, token_grid
from .hosts.sites import Site, all_full, refusal
from .processes import Process
from .progress import Track, silent
from .prompts import ENCODERS, read_prompts
from .recipe_images import ImageRecipe

NUMBER = 4  # bytes of the numbers that samples are kept in
PIPELINES = {  # whose prompts a class reads, where the pipeline is not at hand
    "FluxTransformer2DModel": "FluxPipeline",
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
    "HunyuanVideoTransformer3DModel": "HunyuanVideoPipeline",
    "CogVideoXTransformer3DModel": "CogVideoXPipeline",
    "MochiTransformer3DModel": "MochiPipeline",
}
Plan = Mapping[Site, Sequence[Spec]]


def foresee(recipe: ImageRecipe, track: Track = silent) -> dict[str, Any]:
    """Sites, memory, samples, plan, FLOPs and densities of a recipe, as plain data.

    Raises:
        AssetMissing: the config or a file that the recipe names is not there. Unsupported: the model is not known.
        UsageError: the recipe does not fit the model.
    """
    config, origin = architecture(recipe.model, track=track)
    model = empty_model(config, origin)
    sites, grid = find_sites(model), token_grid(model, recipe.images.size)
    text, known = prompt_tokens(recipe, model, origin)
    times = _times(recipe, model)
    plan = planned(recipe, sites)
    parameters = sum(p.numel() for p in model.parameters())
    dtype = getattr(torch, recipe.model.dtype)
    tokens = math.prod(grid)
    return {
        "model": {
            "name": recipe.model.hub or recipe.model.shipped or str(recipe.model.folder),
            "class": type(model).__name__,
            "config": str(origin),
            "parameters": parameters,
            "dtype": recipe.model.dtype,
            "weights_bytes": parameters * dtype.itemsize,
        },
        "tokens": {
            "size": list(recipe.images.size),
            "grid": list(grid),
            "image": tokens,
            "text": text,
            "text_from": known,
        },
        "sites": _sites(sites, grid, text),
        "plan": _described(recipe, sites, plan, grid, text, times),
        "flops": _flops(recipe, plan, sites, grid, text, times),
        "masks": [*_masks(_specs(recipe, plan), sites, grid, text)],
        "samples": _samples(recipe, model),
        "training": training_memory(recipe, model, sites, plan, grid, text, _share(recipe, sites)),
    }


def empty_model(config: Mapping[str, Any], origin: Path) -> Any:
    """The model that a config describes, on the meta device.

    Raises:
        UsageError: the config is not one of its class.
    """
    cls = class_of(config, origin)
    try:
        with torch.device("meta"):
            return cls.from_config({key: value for key, value in config.items() if key != "_name_or_path"}).eval()
    except (TypeError, ValueError, KeyError) as error:
        raise UsageError(f"{origin} does not describe a {config['_class_name']}: {one_line(error)}") from error


def prompt_tokens(recipe: ImageRecipe, model: Any, origin: Path) -> tuple[int, str]:
    """How many tokens a prompt has where it takes part in attention, and from where that is known."""
    own = origin.parent / CONDITIONS
    bank = recipe.images.conditions or (own if own.is_file() and recipe.images.prompts is None else None)
    if recipe.images.prompts is not None:
        read_prompts(recipe.images.prompts)
    names = [cls.__name__ for cls in type(model).__mro__]
    if bank is not None:
        found = load_conditions(bank).tensors["encoder_hidden_states"]
        return int(found.shape[1]), "conditions"
    pipeline = next((PIPELINES[name] for name in names if name in PIPELINES), None)
    return (ENCODERS[pipeline].tokens, pipeline) if pipeline else (0, "no text in self-attention")


def _times(recipe: ImageRecipe, model: Any) -> list[float]:
    """Of the sampler's steps."""
    name = next((cls.__name__ for cls in type(model).__mro__ if cls.__name__ in PREDICTIONS), None)
    given = recipe.images.prediction
    process = Process(kind=given) if given != "auto" else PREDICTIONS[name] if name else Process()
    return list(process.times(recipe.images.steps, recipe.images.shift)[:-1].tolist())


def planned(recipe: ImageRecipe, sites: Sequence[Site]) -> Plan | None:
    """The plan, where the recipe lists it; None where it is decided by what is measured.

    Raises:
        UsageError: it does not fit the sites.
    """
    select = recipe.select
    if select.method != "explicit" or select.explicit is None:
        return None
    chosen = dict(all_full(sites))
    for layer, spec in select.explicit.items():
        if layer >= len(sites):
            raise UsageError(f"select.explicit names layer {layer}, but the model has layers 0–{len(sites) - 1}")
        if reason := refusal(sites[layer], spec):
            raise UsageError(f"select.explicit: {reason}")
        chosen[sites[layer]] = [spec] * sites[layer].kv_heads
    return chosen


def _specs(recipe: ImageRecipe, plan: Plan | None) -> list[Spec]:
    """The operators that are, or may be, put to work."""
    if plan is None:
        return [recipe.select.operator] if recipe.select.operator else list(recipe.profile.candidates)
    return [spec for spec in dict.fromkeys(spec for specs in plan.values() for spec in specs) if spec != Full()]


def _sites(sites: Sequence[Site], grid: Sequence[int], text: int) -> list[dict[str, Any]]:
    """Sites that are alike, one entry for each kind."""
    kinds: dict[tuple[int, int, int, Layout], list[int]] = {}
    for site in sites:
        kinds.setdefault((site.heads, site.kv_heads, site.dim, site.layout(grid, text)), []).append(site.layer)
    return [
        {
            "layers": layers,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": dim,
            "grid": list(layout.grid),
            "text": layout.text,
            "tokens": layout.tokens,
        }
        for (heads, kv_heads, dim, layout), layers in kinds.items()
    ]


def _everywhere(sites: Sequence[Site], spec: Spec) -> dict[Site, list[Spec]]:
    return {site: [Full() if refusal(site, spec) else spec] * site.kv_heads for site in sites}


def _described(
    recipe: ImageRecipe,
    sites: Sequence[Site],
    plan: Plan | None,
    grid: Sequence[int],
    text: int,
    times: Sequence[float],
) -> dict[str, Any]:
    """What is converted to what, or what is measured to decide it."""
    select, groups = recipe.select, sum(site.kv_heads for site in sites)
    found: dict[str, Any] = {"method": select.method, "layers": len(sites), "groups": groups}
    if plan is not None:
        counts = Counter(spec for specs in plan.values() for spec in specs)
        layers = Counter(spec for specs in plan.values() for spec in dict.fromkeys(specs))
        return {
            **found,
            "decided": True,
            "operators": {label(spec): {"layers": layers[spec], "groups": n} for spec, n in counts.items()},
            "converted": 1 - counts[Full()] / groups,
        }
    tokens = math.prod(grid)
    dense = attention_flops(all_full(sites), grid, text, [tokens])[tokens]
    budget = {name: getattr(select, name) for name in ("groups", "layers", "budgets", "keep_quality")}
    candidates = []
    for spec in _specs(recipe, None):
        whole = _everywhere(sites, spec)
        candidates.append(
            {
                "operator": label(spec),
                "layers": sum(specs[0] != Full() for specs in whole.values()),
                "flops_ratio": attention_flops(whole, grid, text, [tokens], times)[tokens] / dense,
            }
        )
    return {
        **found,
        "decided": False,
        "unit": "layer" if select.unit == "layer" else "group",
        "budget": {name: value for name, value in budget.items() if value is not None},
        "share": _share(recipe, sites),
        "protect": list(select.protect),
        "candidates": candidates,
        "measured": {
            "states": recipe.profile.states,
            "cases": recipe.profile.cases,
            "damage": recipe.profile.damage,
            "gradients": recipe.profile.gradients,
            "gates": list(recipe.profile.gates),
        },
    }


def _share(recipe: ImageRecipe, sites: Sequence[Site]) -> float | None:
    """Of the KV groups that will be converted, where the budget says it."""
    select = recipe.select
    if select.layers is not None:
        return select.layers / len(sites)
    return select.groups


def _flops(
    recipe: ImageRecipe,
    plan: Plan | None,
    sites: Sequence[Site],
    grid: Sequence[int],
    text: int,
    times: Sequence[float],
) -> dict[str, Any]:
    """Attention FLOPs of one step and one sample, the mean over the sampler's steps; both calls where guided.

    Where the plan is still to be decided, the share of the budget is taken to have the mean cost of the candidates.
    """
    tokens, calls = math.prod(grid), 1 + (recipe.images.guidance != 1)
    dense = attention_flops(all_full(sites), grid, text, [tokens])[tokens]
    if plan is not None:
        student: float | None = attention_flops(plan, grid, text, [tokens], times)[tokens]
    else:
        share = _share(recipe, sites)
        whole = [attention_flops(_everywhere(sites, s), grid, text, [tokens], times) for s in _specs(recipe, None)]
        mean = sum(found[tokens] for found in whole) / len(whole)
        student = None if share is None else dense + share * (mean - dense)
    return {
        "calls": calls,
        "steps": recipe.images.steps,
        "teacher": calls * dense,
        "student": None if student is None else calls * student,
        "ratio": None if student is None else student / dense,
        "estimated": plan is None,
    }


def _masks(specs: Sequence[Spec], sites: Sequence[Site], grid: Sequence[int], text: int) -> Iterator[dict[str, Any]]:
    """Shares of dense attention that patterns leave, in pairs of tokens and in blocks of a GPU's kernels."""
    layouts = dict.fromkeys(site.layout(grid, text) for site in sites)
    parts = dict.fromkeys(part for spec in specs for part in (*nested(spec), spec))
    for spec in parts:
        for layout in layouts:
            if isinstance(spec, Sparse | Sla):
                pairs = sparse.read_pairs(spec, layout) / layout.tokens**2
                yield _mask(spec, layout, pairs, pairs, (spec.block, spec.block))
            elif type(spec).__name__ in ("Disc", "Neighbourhood", "Tiles", "Radial", "References", "Frames"):
                stored, block = grid_masks.arranged(spec, layout, "cuda")
                found = density(lowering.blocks(grid_masks.mask(spec, layout), stored, block), layout.tokens)
                yield _mask(spec, layout, found.element, found.block, block)


def _mask(spec: Spec, layout: Layout, pairs: float, blocks: float, block: tuple[int, int]) -> dict[str, Any]:
    return {
        "operator": label(spec),
        "grid": list(layout.grid),
        "text": layout.text,
        "pairs": pairs,
        "blocks": blocks,
        "block": list(block),
    }


def _samples(recipe: ImageRecipe, model: Any) -> dict[str, Any]:
    """What the teacher's samples take on the disk, and how often it is called for them."""
    settings, images = recipe.sample, recipe.images
    branches = 1 + (images.guidance != 1)
    numbers = math.prod(latent_shape(model, images.size))
    kept = 1 + (images.steps * (1 + branches) if settings.keep == "trajectory" else 0)
    return {
        "count": settings.count,
        "keep": settings.keep,
        "latent": list(latent_shape(model, images.size)),
        "calls": settings.count * images.steps * branches,
        "states": settings.count * images.steps * branches if settings.keep == "trajectory" else 0,
        "bytes": settings.count * kept * numbers * NUMBER,
    }


assert set(PIPELINES) <= set(FORMS)
