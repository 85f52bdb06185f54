"""What an exported checkpoint says of itself: which kind it is, where its denoiser is. Reading it needs no torch."""

from __future__ import annotations

import json
import logging
import math
import re
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import AssetMissing, PreflightError, UsageError
from .files import read_json
from .integrity import check_sums

if TYPE_CHECKING:
    from .recipe_inputs import Dtype

log = logging.getLogger("attnconvert")

NAME = "attnconvert"  # the block of a config.json
MODELING = f"modeling_{NAME}"  # the file with a denoiser's class, which a pipeline's index names as its library
INDEX = "model_index.json"
LEAST = {"transformers": (5, 17), "diffusers": (0, 42)}  # as in pyproject.toml: the code was run with these and later
BLOCK = f"{NAME}.json"  # the same block, of a checkpoint whose config.json is a stock one or that has none


def components(pipeline: Path) -> dict[str, list[str]]:
    """{component: [library, class]} of those that a pipeline of diffusers has."""
    index = read_json(pipeline / INDEX)
    entries = {name: value for name, value in index.items() if not name.startswith("_") and isinstance(value, list)}
    return {name: value for name, value in entries.items() if len(value) == 2 and value[0] is not None}


def denoiser_part(folder: Path) -> str:
    """The component of a pipeline that was converted; "" where the folder holds the model itself."""
    if not (folder / INDEX).is_file():
        return ""
    return next((name for name, (library, _) in components(folder).items() if library == MODELING), "")


def model_folder(folder: Path) -> Path:
    """Where the converted model of a checkpoint is: the folder, or a subfolder of a pipeline's."""
    return folder / denoiser_part(folder)


def block_of(folder: Path) -> dict[str, Any] | None:
    """What a checkpoint says of its conversion: base class, operators, sites; None where the folder is none of ours.

    Raises:
        AssetMissing: the block is damaged.
    """
    if (folder / BLOCK).is_file():
        where, found = folder / BLOCK, read_json(folder / BLOCK)
    else:
        where = model_folder(folder) / "config.json"
        config = read_json(where) if where.is_file() else None
        if not isinstance(config, dict) or NAME not in config:
            return None
        found = config[NAME]
    if not isinstance(found, dict) or not isinstance(found.get("format"), int):
        raise AssetMissing(f"{where} is damaged: its block {NAME} has no format; export or fetch it again")
    if not all(isinstance(found.get(key, {}), dict) for key in ("operators", "sites")):
        raise AssetMissing(f"{where} is damaged: its block {NAME} has no operators by name; export or fetch it again")
    return found


def form_of(folder: Path) -> str:
    """How a checkpoint was exported: remote (with its code), stock (no code), adapter (beside its base model)."""
    return str((block_of(folder) or {}).get("form", "remote"))


def is_exported(folder: Path) -> bool:
    """Whether the folder is a checkpoint that `export` wrote."""
    return block_of(folder) is not None


def is_denoiser(folder: Path) -> bool:
    """Whether an exported checkpoint is of an image or video model."""
    config = model_folder(folder) / "config.json"
    return config.is_file() and "_class_name" in read_json(config)


def require_library(name: str) -> None:
    """Refuse a version of transformers or diffusers that is older than what the code was run with.

    Raises:
        PreflightError: it is older, or absent.
    """
    least = ".".join(map(str, LEAST[name]))
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        raise PreflightError(f"the package {name} is not installed: pip install '{name}>={least}'") from None
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < LEAST[name]:
        raise PreflightError(f"{name} {found} is installed, and {least} or later is needed: pip install -U {name}")


def require_whole(folder: Path) -> None:
    """Refuse a checkpoint that a newer attnconvert wrote, or that is not what was exported.

    Raises:
        UsageError: it is none of ours, or newer, or has operators that are not known here. AssetMissing: a file has
            changed or is gone. PreflightError: the library beneath is too old.
    """
    from ..kernels.spec import spec_class
    from .hosts.sites import FORMAT

    block = block_of(folder)
    if block is None:
        raise UsageError(f"{folder} is no checkpoint that attnconvert exported")
    if block["format"] > FORMAT:
        raise UsageError(
            f"{folder} was exported by attnconvert {block.get('version', '?')} in format {block['format']}, this one "
            f"reads {FORMAT}: pip install -U attnconvert, or load it with trust_remote_code=True"
        )
    for spec in block.get("operators", {}).values():
        name = spec.get("operator") if isinstance(spec, dict) else spec
        if spec_class(str(name)) is None:
            raise UsageError(
                f"{folder} has the operator {name!r}, which attnconvert here does not have (it was exported by "
                f"{block.get('version', '?')}): attnconvert.register its file, or pip install -U attnconvert"
            )
    require_library("diffusers" if is_denoiser(folder) else "transformers")
    if not check_sums(folder):
        log.warning("%s has no SHA256SUMS: whether it is what was exported cannot be told", folder)


def weights_dtype(folder: Path) -> Dtype:
    """The number type of most weights of a denoiser's folder, such as bfloat16; what operators learned is fp32."""
    counts: dict[str, int] = {}
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__" and f".{NAME}." not in name:
                counts[entry["dtype"]] = counts.get(entry["dtype"], 0) + math.prod(entry["shape"])
    names: dict[str, Dtype] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    known = [name for name in counts if name in names]
    if not known:
        raise AssetMissing(f"{folder} has no weights of a known number type")
    return names[max(known, key=lambda name: counts[name])]
