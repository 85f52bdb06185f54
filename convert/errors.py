"""The errors that reach a person: each carries the exit code of its kind and a message of one clear line.

| code | class | when |
|---|---|---|
| 1 | `AttnConvertError` | our own fault |
| 2 | `UsageError` | a recipe, plan, argument or model that cannot be used as given |
| 3 | `PreflightError` | the environment: memory, disk, a missing dependency, versions |
| 4 | `GateMissed` | the result misses a bound of the recipe |
| 5 | `AssetMissing` | a model or a text is not there, unreachable, corrupt, or not the one expected |
| 130 | `Interrupted` | Ctrl-C |
"""

from __future__ import annotations

import errno
from pathlib import Path


class AttnConvertError(Exception):
    """Anything that attnconvert itself raises; the class decides the exit code."""

    exit_code = 1


class UsageError(AttnConvertError):
    """What was asked for cannot be done as given."""

    exit_code = 2


class PreflightError(AttnConvertError):
    """The machine or its installation cannot carry the work out."""

    exit_code = 3


class GateMissed(AttnConvertError):
    """The converted model misses a quality or speed bound."""

    exit_code = 4


class AssetMissing(AttnConvertError):
    """A model, a package or a text is absent, unreachable, damaged, or another one than expected."""

    exit_code = 5


class Interrupted(AttnConvertError):
    """The user stopped the work; what was finished stays."""

    exit_code = 130


def one_line(text: object, limit: int = 240) -> str:
    """Foreign messages run over many lines; ours are one."""
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def storage_error(error: OSError, path: Path) -> PreflightError:
    """What to tell when writing at `path` failed."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return PreflightError(f"disk full: nothing more fits at {path}; free some space and run the same command again")
    return PreflightError(f"cannot write {path}: {error.strerror or one_line(error)}")
