"""Push a checkpoint to the Hugging Face hub: what would go there, and the upload itself.

HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean everywhere in Hugging Face's libraries.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .checkpoints import block_of, form_of, require_whole
from .errors import AssetMissing, UsageError, one_line
from .integrity import CARD, SUMS, read_sums
from .packages import offline
from .progress import Track, silent
from .runs import DONE, KEY

LEFT_OUT = (KEY, DONE)  # these say how far a stage of a run is


def contents(folder: Path) -> dict[str, Any]:
    """What a push of a checkpoint would upload: {"form", "files": {name: bytes}, "bytes", "card", "notes"}.

    Raises:
        UsageError: it is no checkpoint. AssetMissing: a file has changed since it was exported, or is gone.
    """
    require_whole(folder)
    if not (folder / SUMS).is_file():
        raise AssetMissing(f"{folder} has no {SUMS}, so nothing says that it is whole: export it again")
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    hidden = {name for name in names if any(part.startswith(".") for part in name.split("/"))}  # such as .git/config
    own = {name: path for name, path in names.items() if name not in LEFT_OUT and name not in hidden}
    sizes = {name: path.stat().st_size for name, path in own.items()}
    return {
        "folder": str(folder),
        "form": form_of(folder),
        "files": sizes,
        "bytes": sum(sizes.values()),
        "card": _metadata(folder),
        "notes": _notes(folder, own),
    }


def _metadata(folder: Path) -> dict[str, Any]:
    """The head of the model card, which the hub reads."""
    card = folder / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    if not text.startswith("---\n"):
        return {}
    try:
        found = yaml.safe_load(text[4:].partition("\n---")[0])
    except yaml.YAMLError as error:
        raise UsageError(f"{card}: its head is not YAML, which the hub would refuse: {one_line(error)}") from None
    return found if isinstance(found, dict) else {}


def _notes(folder: Path, files: dict[str, Path]) -> list[str]:
    """What a person who pushes should know."""
    extra = sorted(set(files) - set(read_sums(folder)) - {SUMS, CARD})
    notes = [f"not written by the export, and pushed all the same: {', '.join(extra)}"] if extra else []
    model = (block_of(folder) or {}).get("model", {})
    local = [key for key in ("folder", "gguf") if model.get("source", {}).get(key)]
    if local:
        notes.append(
            f"the base model of this adapter is a file of this machine ({model['name']}): others must have it to use it"
        )
    if not _metadata(folder).get("base_model"):
        notes.append(f"{CARD} names no base_model: add one, so that the hub shows where the model comes from")
    return notes


def push(
    folder: Path, repository: str, *, private: bool = False, revision: str | None = None, track: Track = silent
) -> dict[str, Any]:
    """Upload a checkpoint, in one commit, into a repository that is made if need be.

    Raises:
        UsageError: the name is none, or the folder no checkpoint. AssetMissing: a file has changed since it was
            exported, or the hub is not to be had or refuses.
    """
    found = contents(folder)
    if offline():
        raise AssetMissing("HF_HUB_OFFLINE forbids the network, so nothing can be pushed: unset it")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    hub = huggingface_hub.HfApi(library_name="attnconvert")
    try:
        for _ in track((repository,), f"pushing to {repository}", total=1):
            place = hub.create_repo(repository, private=private, exist_ok=True)
            if revision is not None:
                hub.create_branch(place.repo_id, branch=revision, exist_ok=True)
            commit = hub.upload_folder(
                repo_id=place.repo_id,
                folder_path=folder,
                revision=revision,
                allow_patterns=list(found["files"]),
                commit_message=f"{folder.resolve().name}, exported by attnconvert as {found['form']}",
            )
    except HFValidationError as error:
        raise UsageError(f"{repository!r} is no name of a repository, such as owner/name: {one_line(error)}") from error
    except huggingface_hub.errors.LocalTokenNotFoundError as error:
        raise AssetMissing(
            f"the hub wants to know who pushes: set HF_TOKEN, or run `hf auth login` ({one_line(error, 80)})"
        ) from error
    except HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise AssetMissing(
                f"the hub refuses to write to {repository} ({status}): set HF_TOKEN to a token that may"
            ) from error
        raise AssetMissing(f"cannot push to {repository}: {one_line(error)}") from error
    except (OSError, RuntimeError) as error:
        raise AssetMissing(f"cannot push to {repository}: {one_line(error)}") from error
    except Exception as error:
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests")):  # by version of huggingface_hub
            raise
        raise AssetMissing(f"the hub is not reachable: {one_line(error)}") from error
    return found | {
        "repository": place.repo_id,
        "revision": revision or "main",
        "commit": commit.oid,
        "url": str(commit.commit_url),
    }
