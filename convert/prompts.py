"""Prompts, encoded once by a pipeline's own text encoders into a bank of conditions; nothing else of it is loaded."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .conditioning import Conditions, load_conditions
from .errors import AssetMissing, PreflightError, UsageError, one_line
from .progress import Track, silent

log = logging.getLogger("attnconvert")

BATCH = 8  # prompts that are encoded together
TEXT, POOLED, MASK = "encoder_hidden_states", "pooled_projections", "encoder_attention_mask"


@dataclass(frozen=True)
class Encoder:
    """How a class of pipelines encodes.

    `call` gives the conditions by name of some prompts, and those of no prompt, where one call makes both: None where
    the empty prompt is encoded like any other. `parts` are the components that it needs, `tokens` the length to which
    prompts are padded.
    """

    call: Callable[[Any, list[str], Any], tuple[dict[str, Any], dict[str, Any] | None]]
    parts: tuple[str, ...]
    tokens: int


def _flux(pipeline: Any, prompts: list[str], device: Any) -> tuple[dict[str, Any], None]:
    text, pooled, _ = pipeline.encode_prompt(prompt=prompts, prompt_2=None, device=device)
    return {TEXT: text, POOLED: pooled}, None


def _pooled(pipeline: Any, prompts: list[str], device: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """SD3 and SDXL, whose empty prompt may be zeros."""
    more = {} if "XL" in type(pipeline).__name__ else {"prompt_3": None}
    text, no_text, pooled, no_pooled = pipeline.encode_prompt(prompt=prompts, prompt_2=None, device=device, **more)
    return {TEXT: text, POOLED: pooled}, {TEXT: no_text, POOLED: no_pooled}


def _plain(pipeline: Any, prompts: list[str], device: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Stable Diffusion."""
    text, no_text = pipeline.encode_prompt(
        prompt=prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    return {TEXT: text}, {TEXT: no_text}


def _wan(pipeline: Any, prompts: list[str], device: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Padded to the 512 tokens of training, as the pipeline itself does."""
    text, no_text = pipeline.encode_prompt(prompt=prompts, device=device, max_sequence_length=512)
    return {TEXT: text}, {TEXT: no_text}


def _video(pipeline: Any, prompts: list[str], device: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """CogVideoX."""
    text, no_text = pipeline.encode_prompt(prompt=prompts, device=device)
    return {TEXT: text}, {TEXT: no_text}


def _masked(pipeline: Any, prompts: list[str], device: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """PixArt and Mochi."""
    text, mask, no_text, no_mask = pipeline.encode_prompt(prompt=prompts, device=device)
    return {TEXT: text, MASK: mask}, {TEXT: no_text, MASK: no_mask}


def _hunyuan(pipeline: Any, prompts: list[str], device: Any) -> tuple[dict[str, Any], None]:
    text, pooled, mask = pipeline.encode_prompt(prompt=prompts, device=device)
    return {TEXT: text, POOLED: pooled, MASK: mask}, None


ONE, TWO = ("text_encoder", "tokenizer"), ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
THREE = (*TWO, "text_encoder_3", "tokenizer_3")
ENCODERS = {
    "FluxPipeline": Encoder(_flux, TWO, 512),
    "StableDiffusion3Pipeline": Encoder(_pooled, THREE, 77 + 256),
    "StableDiffusionPipeline": Encoder(_plain, ONE, 77),
    "StableDiffusionXLPipeline": Encoder(_pooled, TWO, 77),
    "PixArtAlphaPipeline": Encoder(_masked, ONE, 120),
    "PixArtSigmaPipeline": Encoder(_masked, ONE, 300),
    "WanPipeline": Encoder(_wan, ONE, 512),
    "HunyuanVideoPipeline": Encoder(_hunyuan, TWO, 256),
    "CogVideoXPipeline": Encoder(_video, ONE, 226),
    "MochiPipeline": Encoder(_masked, ONE, 256),
}


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, one a line; empty lines count for nothing.

    Raises:
        AssetMissing: there is no such file. UsageError: it has no prompt, or one twice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not text in UTF-8 (byte {error.start}): give prompts, one a line") from error
    except OSError as error:
        raise AssetMissing(f"cannot read the prompts {path}: {error.strerror}; set images.prompts") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise UsageError(f"{path} has no prompt: write one a line")
    twice = next((prompt for n, prompt in enumerate(found) if prompt in found[:n]), None)
    if twice is not None:
        raise UsageError(f"{path} has a prompt twice: {one_line(twice)}")
    return found


def encode_prompts(
    pipeline: Path | None, prompts: Sequence[str], device: Any, dtype: Any = None, track: Track = silent
) -> Conditions:
    """The bank of these prompts, and of no prompt as its last entry, on the CPU.

    Args:
        pipeline: the folder with model_index.json; dtype: of the text encoders, as in their files where None.

    Raises:
        UsageError: the model came without its pipeline, or what the pipeline encodes is not known here.
        AssetMissing: a text encoder or tokenizer is absent or damaged. PreflightError: memory is full.
    """
    import torch

    loaded, row = _load(pipeline, dtype)
    try:
        rows: dict[str, list[Any]] = {}
        none: dict[str, Any] | None = None
        with torch.no_grad():
            for components in (getattr(loaded, part) for part in row.parts if part.startswith("text_encoder")):
                if components is not None:
                    components.eval().to(device)
            batches = [list(prompts[n : n + BATCH]) for n in range(0, len(prompts), BATCH)]
            for batch in track(batches, "encoding prompts"):
                found, without = row.call(loaded, batch, device)
                none = none if without is None else {name: x[:1] for name, x in without.items()}
                for name, x in found.items():
                    rows.setdefault(name, []).append(x.cpu())
            none = none or row.call(loaded, [""], device)[0]
        tensors = {name: torch.cat([*parts, none[name].cpu()]) for name, parts in rows.items()}
    finally:
        del loaded
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return Conditions(tensors, (*prompts, None), len(prompts))


def _load(folder: Path | None, dtype: Any) -> tuple[Any, Encoder]:
    """A pipeline of nothing but tokenizers and text encoders, and how it encodes."""
    import diffusers

    if folder is None or not (folder / "model_index.json").is_file():
        raise UsageError(
            "images.prompts needs the text encoders of the model's pipeline, and the model came without one: give the "
            "pipeline's folder or hub id as the model, or encoded prompts as images.conditions"
        )
    try:
        index = dict(json.loads((folder / "model_index.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise AssetMissing(f"{folder}/model_index.json cannot be read: {one_line(error)}") from error
    name = str(index.get("_class_name"))
    row = ENCODERS.get(name)
    if row is None:
        raise UsageError(
            f"how a {name} encodes prompts is not known here; known are {', '.join(ENCODERS)}: encode them yourself "
            "and give the file as images.conditions"
        )
    parts = [part for part, where in index.items() if isinstance(where, list) and len(where) == 2]
    absent = [part for part in row.parts if index.get(part, [None])[0] and not (folder / part).is_dir()]
    if absent:
        raise AssetMissing(f"{folder} lacks {', '.join(absent)}, which encode prompts: fetch the pipeline again")
    others = {part: None for part in parts if part not in row.parts}
    try:
        loaded = getattr(diffusers, name).from_pretrained(folder, torch_dtype=dtype, local_files_only=True, **others)
    except MemoryError as error:
        raise PreflightError(f"not enough memory to load the text encoders of {folder}") from error
    except ImportError as error:
        raise PreflightError(f"a package is missing to load the text encoders of {folder}: {error}") from error
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {one_line(' '.join(str(error).split()))}"
        raise AssetMissing(f"the text encoders in {folder} are damaged or incomplete: {reason}") from error
    return loaded, row


def stored_prompts(
    path: Path, prompts: Path, pipeline: Path | None, device: Any, dtype: Any, track: Track
) -> Conditions:
    """The bank at `path` if it is of these prompts, else they are encoded and it is written."""
    wanted = read_prompts(prompts)
    if path.is_file():
        found = load_conditions(path)
        if found.labels[:-1] == tuple(wanted):
            return found
        log.info("the prompts have changed: encoding them again")
    log.info("encoding %d prompts", len(wanted))
    made = encode_prompts(pipeline, wanted, device, dtype, track)
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save(path)
    return made
