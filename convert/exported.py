"""Exported checkpoints, loaded as any user would and timed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import evaluation
from .checkpoints import is_denoiser, model_folder, require_whole, weights_dtype
from .files import read_json
from .machine import hardware
from .progress import Track, silent
from .recipe_inputs import ModelSource
from .sources import fetch_model, load_model


def load_exported(folder: Path, track: Track = silent) -> Any:
    """The model of a checkpoint that `export` wrote, its conversion installed.

    Raises:
        AssetMissing: it is damaged, or a file is not what was exported. UsageError: a newer attnconvert wrote it.
    """
    require_whole(folder)
    if is_denoiser(folder):
        from .denoiser_sources import fetch_denoiser, load_denoiser

        own = model_folder(folder).absolute()
        source = ModelSource(folder=own, dtype=weights_dtype(own))
        return load_denoiser(fetch_denoiser(source, track=track), source)
    source = ModelSource(folder=folder.absolute(), dtype=read_json(folder / "config.json")["dtype"])
    return load_model(fetch_model(source, track=track), source)[0]


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
