"""Where denoisers come from: a folder or hub id of a denoiser, or of the pipeline that it is part of."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

from .errors import AssetMissing, PreflightError, UsageError, one_line
from .files import sha256_file
from .integrity import check_weights
from .processes import Process, of_scheduler
from .progress import Track, silent
from .recipe_inputs import ModelSource
from .sources import ModelFiles, fetch_folder, fetch_hub, shipped_folder

log = logging.getLogger("attnconvert")

CONDITIONS, CLASSIFIER = "conditions.safetensors", "classifier.safetensors"  # in the folder of a model
PARTS = ("transformer", "unet")  # of a pipeline's folder: where its denoiser is
PREDICTIONS = {  # what a class predicts where no scheduler says it
    "FluxTransformer2DModel": Process(kind="flow"),
    "SD3Transformer2DModel": Process(kind="flow"),
    "WanTransformer3DModel": Process(kind="flow"),
    "HunyuanVideoTransformer3DModel": Process(kind="flow"),
    "MochiTransformer3DModel": Process(kind="flow"),
    "PixArtTransformer2DModel": Process(kind="epsilon", schedule="linear", beta_first=0.0001, beta_last=0.02),
    "UNet2DConditionModel": Process(kind="epsilon"),
    "CogVideoXTransformer3DModel": Process(kind="v_prediction", snr_shift=3.0, zero_snr=True),
}


def fetch_denoiser(source: ModelSource, *, encoders: bool = False, track: Track = silent) -> ModelFiles:
    """The files of a denoiser, downloaded if need be; of a pipeline its transformer or UNet, without the rest.

    Args:
        encoders: the pipeline's tokenizers and text encoders are wanted as well.

    Raises:
        AssetMissing: it cannot be had. UsageError: it is a model of text.
    """
    if source.gguf is not None or source.package is not None:
        raise UsageError("an image or video model comes from a hub id, a folder, or attnconvert itself (shipped)")
    if source.hub is not None:
        parts = [source.subfolder] if source.subfolder else list(PARTS)
        names = [f"{part}/{name}" for part in parts for name in ("*.json", "*.safetensors")]
        wanted = ["model_index.json", "config.json", "scheduler/*.json", CONDITIONS, *names]
        if encoders:  # SD 1.5 and others have the same weights in other formats and precisions beside these
            kinds = ("*.json", "*.txt", "*.model", "model.safetensors", "model-*-of-*.safetensors")
            wanted += [f"tokenizer*/{kind}" for kind in kinds[:3]] + [f"text_encoder*/{kind}" for kind in kinds]
        whole = ["*.safetensors"] if source.subfolder is None else []  # of a repository that is the denoiser alone
        root, revision, name = fetch_hub(source.hub, source.revision, wanted, whole, track)
    else:
        root = shipped_folder(source.shipped) if source.shipped else Path(source.folder or "")
        revision, name = None, source.shipped or root.name
    folder = _denoiser_folder(root, source.subfolder)
    files = fetch_folder(folder, name, revision, track)
    own = [folder / name for name in (CONDITIONS, CLASSIFIER)]
    sums = {path.name: sha256_file(path) for path in own if path.is_file()}
    return ModelFiles(**{**vars(files), "sha256": files.sha256 | sums, "pipeline": root if root != folder else None})


def _denoiser_folder(root: Path, subfolder: str | None) -> Path:
    if not root.is_dir():
        raise AssetMissing(f"no folder {root}")
    if subfolder is not None:
        if not (root / subfolder / "config.json").is_file():
            raise AssetMissing(f"{root} has no {subfolder}/config.json: check model.subfolder")
        return root / subfolder
    if (root / "model_index.json").is_file():
        found = [root / part for part in PARTS if (root / part / "config.json").is_file()]
        if not found:
            raise AssetMissing(
                f"the pipeline in {root} has neither a transformer nor a unet folder: set model.subfolder"
            )
        return found[0]
    return root


def denoiser_class(folder: Path) -> Any:
    """The class of diffusers that a folder's config.json names.

    Raises:
        AssetMissing: there is no readable config. UsageError: it is no model of diffusers. PreflightError: diffusers is
        not installed.
    """
    return class_of(_config(folder / "config.json"), folder)


def _config(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise AssetMissing(f"{path} cannot be read: {one_line(error)}") from error


def class_of(config: Mapping[str, Any], where: object) -> Any:
    """The class of diffusers that a config names; `where` says in errors where it stands. Errors as above."""
    name = config.get("_class_name")
    if name is None:
        raise UsageError(
            f"{where} is no model of diffusers (its config names no _class_name): for a model of text leave the "
            "section `images` out of the recipe"
        )
    try:
        import diffusers
    except ImportError as error:
        raise PreflightError(f"image and video models need diffusers: pip install diffusers ({error})") from error
    if "attnconvert" in config:
        from .hosts.registration_images import converted_class

        return converted_class(str(name))
    found = getattr(diffusers, str(name), None)
    if found is None or not hasattr(found, "load_config"):
        raise UsageError(f"{where} holds a {name}, which diffusers {diffusers.__version__} does not have")
    return found


def architecture(source: ModelSource, *, track: Track = silent) -> tuple[dict[str, Any], Path]:
    """The config of a denoiser and the file that it stands in, without its weights.

    Of a hub model that of the local cache, else the one that attnconvert ships for well-known models, else it is
    fetched alone.

    Raises:
        AssetMissing: it cannot be had.
    """
    if source.hub is None:
        root = shipped_folder(source.shipped) if source.shipped else source.folder
        if root is None:
            raise UsageError("an image or video model comes from a hub id, a folder, or attnconvert itself (shipped)")
        path = _denoiser_folder(root, source.subfolder) / "config.json"
        return _config(path), path
    import huggingface_hub

    names = [f"{part}/config.json" for part in ([source.subfolder] if source.subfolder else PARTS)]
    names += [] if source.subfolder else ["config.json"]
    for name in names:
        cached = huggingface_hub.try_to_load_from_cache(source.hub, name, revision=source.revision)
        if isinstance(cached, str):
            return _config(Path(cached)), Path(cached)
    known = resources("attnconvert") / "recipes" / "configs" / f"{source.hub.rpartition('/')[2]}.json"
    shipped = Path(str(known))
    if shipped.is_file() and (found := _config(shipped)).get("_name_or_path") == source.hub:
        return found, shipped
    root, _, _ = fetch_hub(source.hub, source.revision, names, [], track)
    path = next((root / name for name in names if (root / name).is_file()), root / names[0])
    return _config(path), path


def load_denoiser(files: ModelFiles, source: ModelSource) -> Any:
    """The denoiser, in eval mode, its weights in `source.dtype`, on the GPU where there is one.

    Raises:
        AssetMissing: the files are damaged or incomplete. PreflightError: memory is full.
    """
    import torch

    for name in files.sha256:
        check_weights(files.folder / name)
    cls = denoiser_class(files.folder)
    try:
        model, info = cls.from_pretrained(
            files.folder,
            torch_dtype=getattr(torch, source.dtype),
            output_loading_info=True,
            low_cpu_mem_usage=None,  # only where parts of it stay fp32, which diffusers does no other way
        )
    except MemoryError as error:
        raise PreflightError(f"not enough memory to load {files.folder}: {one_line(error)}") from error
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {one_line(' '.join(str(error).split()))}"
        raise AssetMissing(f"the model in {files.folder} is damaged or incomplete: {reason}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise AssetMissing(f"{files.folder} lacks {len(missing)} of the model's tensors, such as {missing[0]}")
    device = "cuda" if torch.cuda.is_available() else "cpu"  # CUDA_VISIBLE_DEVICES= keeps it off the GPU
    log.info("%s is on %s", files.name, device)
    return model.eval().to(device)


def process_of(files: ModelFiles, model: Any, prediction: str) -> Process:
    """How data and noise mix and what the model predicts: as its pipeline's scheduler says, or as its class is known.

    Args:
        prediction: the recipe's word, `auto` or what the model predicts.

    Raises:
        UsageError: neither is known.
    """
    if prediction == "flow":
        return Process(kind="flow")
    roots = (files.pipeline, files.folder.parent, files.folder)
    paths = [root / "scheduler" / "scheduler_config.json" for root in roots if root is not None]
    path = next((path for path in paths if path.is_file()), None)
    names = [cls.__name__ for cls in type(model).__mro__ if cls.__name__ in PREDICTIONS]
    found = PREDICTIONS[names[0]] if names else Process(kind="epsilon")
    if path is not None:
        try:
            found = of_scheduler(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"{path} describes no schedule that is known: {one_line(error)}") from error
    elif prediction == "auto" and found.kind != "flow":
        raise UsageError(
            f"there is no scheduler beside {files.folder}, and models of class {type(model).__name__} differ in what "
            "they predict: set images.prediction to epsilon or v_prediction"
        )
    return found if prediction in ("auto", found.kind) else Process(**{**vars(found), "kind": prediction})
