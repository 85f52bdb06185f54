"""A model converted by a plan alone and exported: no profile, no distillation, any architecture that has sites.

What a plan's operators would learn is not trained here, so a plan with such operators is a start, not a result.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .card import how_to_load, limits
from .checkpoints import weights_dtype
from .errors import UsageError
from .export_formats import Export, Written, clear, write_checkpoint
from .files import disk_errors, read_json
from .hosts.sites import NAME
from .hosts.surgery import convert
from .machine import hardware, versions
from .plan import Plan, read_plan
from .progress import Track, silent

if TYPE_CHECKING:
    from .recipe_inputs import ModelSource
    from .sources import ModelFiles

log = logging.getLogger("attnconvert")
CARD = """\
---
{base}library_name: transformers
tags:
- attnconvert
---

# {name}, converted

`{cls}` with its attention converted by attnconvert {version}, by the plan in `plan.yaml`: {share:.0%} of its KV groups
have a cheaper operator. Nothing was distilled and nothing was measured: evaluate it before you use it.

{use}
{limits}"""


def export_model(
    source: ModelSource,
    plan_file: Path,
    folder: Path,
    wanted: str = "auto",
    dtype: str | None = None,
    check: bool = True,
    track: Track = silent,
) -> Written:
    """Convert a model by a plan and write the checkpoint.

    Args:
        source: of transformers, or of diffusers; folder: absent, or empty.

    Raises:
        UsageError: the folder holds something, or the plan does not fit the model or the format.
    """
    from .inspection import of_diffusers

    plan = read_plan(plan_file)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already and not empty: give another --out")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    images = of_diffusers(source)
    if images and wanted not in ("auto", "remote"):
        raise UsageError(f"an image or video model is exported with its code: take --format remote, not {wanted}")
    try:
        return (_denoiser if images else _transformer)(source, plan, plan_file, folder, wanted, dtype, check, track)
    except BaseException:
        clear(folder)  # a folder with half a checkpoint looks like a whole one
        raise


def _transformer(
    source: ModelSource,
    plan: Plan,
    plan_file: Path,
    folder: Path,
    wanted: str,
    dtype: str | None,
    check: bool,
    track: Track,
) -> Written:
    from .hosts.models import find_sites, is_encoder
    from .hosts.registration import loader
    from .sources import fetch_model, load_model

    files = fetch_model(source, track=track)
    source = source.model_copy(update={"dtype": dtype or _stored(files, source)})
    model, tokenizer = load_model(files, source)
    operators = plan.for_sites(find_sites(model))
    model.conversion = convert(model, operators)
    model.requires_grad_(False)
    _tell_untrained(model)
    given = Export(
        student=model,
        tokenizer=tokenizer,
        plan=operators,
        source=source,
        files=files,
        attached=_attached(files, plan_file),
    )

    def card(written: Written) -> str:
        auto, generates = loader(type(model).__name__), not is_encoder(model)
        use = how_to_load(written.form, auto, generates, trained=False)
        return _card(files, source, model, plan, use, limits(written.form, generates, written.serving))

    return write_checkpoint(given, folder, card, wanted, check)


def _denoiser(
    source: ModelSource,
    plan: Plan,
    plan_file: Path,
    folder: Path,
    wanted: str,
    dtype: str | None,
    check: bool,
    track: Track,
) -> Written:
    from .denoiser_sources import fetch_denoiser, load_denoiser
    from .export_images import export_images, verify_images
    from .hosts.denoisers import find_sites

    files = fetch_denoiser(source, track=track)
    source = source.model_copy(update={"dtype": dtype or weights_dtype(files.folder)})
    model = load_denoiser(files, source)
    operators = plan.for_sites(find_sites(model))
    model.conversion = convert(model, operators)
    _tell_untrained(model)
    use = "## Use\n\n`attnconvert.load(folder)`, or diffusers with `trust_remote_code=True`.\n"
    text = _card(files, source, model, plan, use, "").replace("library_name: transformers", "library_name: diffusers")
    part = files.folder.name
    export_images(model, operators, folder, text, None, files.pipeline, part, _attached(files, plan_file))
    found = verify_images(model, folder) if check else None
    return Written(form="remote", why="the only format of image and video models", verified=found)


def _stored(files: ModelFiles, source: ModelSource) -> str:
    """The number type of the weights by their config; of a GGUF, which has many, what this machine computes with."""
    if files.gguf is not None:
        return source.dtype
    config = read_json(files.folder / "config.json")
    kept = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return kept if kept in ("float32", "bfloat16", "float16") else source.dtype


def _tell_untrained(model: Any) -> None:
    """Operators that learn begin as they were made."""
    learned = [name for name, _ in model.named_parameters() if f".{NAME}." in name]
    if learned:
        log.warning(
            "%d parameters that operators learn, such as %s, are untrained: distil such a plan with `attnconvert run`",
            len(learned),
            learned[0],
        )


def _attached(files: ModelFiles, plan_file: Path) -> dict[str, str]:
    text = plan_file.read_text(encoding="utf-8")
    manifest = {
        "schema": 1,
        "model": {"name": files.name, "revision": files.revision, "sha256": files.sha256},
        "plan": hashlib.sha256(text.encode()).hexdigest(),
        "versions": versions(),
        "hardware": hardware(),
    }
    return {"plan.yaml": text, "manifest.json": json.dumps(manifest, indent=1) + "\n"}


def _card(files: ModelFiles, source: ModelSource, model: Any, plan: Plan, use: str, limits_: str) -> str:
    base = f"base_model: {source.hub}\n" if source.hub else ""
    told = {
        "name": files.name,
        "cls": type(model).__name__,
        "version": versions()["attnconvert"],
        "share": plan.converted,
    }
    return CARD.format(base=base, use=use, limits=limits_, **told)
