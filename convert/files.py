"""Files that are either whole or absent: what other processes and later runs read is never half-written."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import UsageError, storage_error

PARTIAL = ".partial-"  # prefix of files being written; the suffix stays, since some writers choose the format by it
_DISK_FULL = ("no space left on device", "os error 28", "disk quota exceeded")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a full or unwritable disk at `path` into a PreflightError of one line; other errors pass unchanged."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise storage_error(error, path) from error
        raise
    except Exception as error:
        # safetensors and torch report a full disk as an exception of their own, known only by its text
        if any(text in str(error).lower() for text in _DISK_FULL):
            raise storage_error(OSError(errno.ENOSPC, "no space left on device"), path) from error
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; on success its file is flushed to the disk and takes `path`'s place.

    On failure, and after a kill at any moment, `path` holds what it held before.
    """
    temporary = path.with_name(f"{PARTIAL}{secrets.token_hex(4)}-{path.name}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
            flush(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """UTF-8, with the line ends of `text`."""
    write_bytes(path, text.encode())


def write_json(path: Path, document: Any) -> None:
    """Indented JSON. NaN and infinity, which are no JSON, become null: one bad figure must not cost the others."""
    try:
        text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(document), indent=1, ensure_ascii=False)
    write_text(path, text + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def stored(path: Path, make: Callable[[], Any]) -> Any:
    """The JSON that `path` holds, or what `make` returns, then kept there: work that is done is not done again."""
    if not path.exists():
        write_json(path, make())
    return read_json(path)


def read_json(path: Path) -> Any:
    """The document at `path`; UsageError if it is absent or no JSON, which our own writing never leaves behind."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist: run the stage that writes it") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}): delete it and run its stage again") from None


def sha256_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Waits until a file or a folder's list of names is on the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except (PermissionError, IsADirectoryError):
        if path.is_dir():  # systems on which a folder cannot be opened
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that know no fsync
            raise
    finally:
        os.close(handle)


def remove_partial(folder: Path, *names: str) -> None:
    """Deletes what a killed process left half-written: everything under `folder`, or only files of these names in it.

    The caller must hold the run's lock, or the files may be another's that are being written now.
    """
    patterns = [f"{PARTIAL}*-{name}" for name in names] or [f"**/{PARTIAL}*"]
    for pattern in patterns:
        for leftover in folder.glob(pattern):
            with suppress(OSError):
                leftover.unlink()
