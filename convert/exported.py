"""Exported checkpoints, loaded as any user would and timed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import evaluation
from .checkpoints import block_of, form_of, is_denoiser, model_folder, require_whole, weights_dtype
from .errors import UsageError
from .files import read_json
from .machine import hardware
from .progress import Track, silent
from .recipe_inputs import ModelSource
from .sources import fetch_model, load_model


def load_exported(folder: Path, track: Track = silent, base: ModelSource | None = None) -> Any:
    """The model of a checkpoint of any form that `export` wrote, its conversion installed (`model.conversion`).

    A stock checkpoint becomes the class that it was converted from, with our operators, which are faster than masks. An
    adapter's base model is fetched from where it came from, or taken from `base`.

    Raises:
        AssetMissing: it is damaged, or a file is not what was exported, or an adapter's base is not to be had or
            another one. UsageError: a newer attnconvert wrote it. PreflightError: transformers is too old.
    """
    require_whole(folder)
    form = form_of(folder)
    if base is not None and form != "adapter":
        raise UsageError(f"{folder} holds its own weights ({form}): leave the base model away")
    if form == "adapter":
        from .export_adapter import load_adapter

        return load_adapter(folder, base, track)
    if form == "stock":
        return _original(folder)
    if is_denoiser(folder):
        from .denoiser_sources import fetch_denoiser, load_denoiser

        own = model_folder(folder).absolute()
        source = ModelSource(folder=own, dtype=weights_dtype(own))
        return load_denoiser(fetch_denoiser(source, track=track), source)
    source = ModelSource(folder=folder.absolute(), dtype=read_json(folder / "config.json")["dtype"])
    return load_model(fetch_model(source, track=track), source)[0]


def _original(folder: Path) -> Any:
    """The class that a stock checkpoint was converted from, with its weights and its plan."""
    import torch
    import transformers

    from .hosts.sites import read_plan_block
    from .hosts.transformers import convert

    block = block_of(folder)
    assert block is not None
    kind = getattr(transformers, block["base"])
    config = kind.config_class.from_dict(block["config"])
    model = kind.from_pretrained(folder, config=config, dtype=getattr(torch, block["config"]["dtype"])).eval()
    model.conversion = convert(model, read_plan_block(block))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.requires_grad_(False).to(device)


def bench(
    folder: Path,
    lengths: Sequence[int],
    sizes: Sequence[Sequence[int]],
    repeats: int,
    decode_tokens: int,
    track: Track,
) -> dict[str, Any]:
    """Times of a checkpoint and of its own weights with full attention, measured in turns.

    Args:
        lengths, decode_tokens: of a model of text; sizes: of the latents of an image or video model.
    """
    student = load_exported(folder, track)
    shared = {id(x): x for x in (*student.parameters(), *student.buffers())}
    teacher = copy.deepcopy(student, shared)
    teacher.conversion.remove()
    dtype = str(student.dtype).removeprefix("torch.")
    found: dict[str, Any] = {"checkpoint": str(folder), "machine": hardware(), "dtype": dtype}
    if is_denoiser(folder):
        from .bench_images import bench_steps

        return found | bench_steps(teacher, student, sizes, repeats, track)
    return found | {"speed": evaluation.speed(teacher, student, lengths, repeats, decode_tokens, track)}
