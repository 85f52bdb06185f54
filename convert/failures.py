"""What a command that fails says, and the exit code that it leaves with."""

from __future__ import annotations

import errno
import signal
import sys

from .errors import AttnConvertError, GateMissed, PreflightError, UsageError, one_line

TERMINATED = 128 + signal.SIGTERM
EXIT_CODES = {
    0: "done, and every gate of the recipe is met",
    1: "a fault of attnconvert itself, or training that diverged",
    2: "a recipe, plan, argument or model that cannot be used as given",
    3: "the environment: memory, a full disk, a missing package",
    4: "a gate of the recipe is missed, and the checkpoint is written all the same; or a run was not reproduced",
    5: "a model or text that is absent, damaged or cannot be reached",
    130: "interrupted with Ctrl-C; the same command continues",
    143: "ended by SIGTERM; the same command continues",
}


def told(error: Exception) -> tuple[int, str]:
    """The exit code of an error, and the line that explains it; recipes have a line for each of their errors."""
    if isinstance(error, GateMissed):
        return error.exit_code, f"gate missed: {error}"
    if isinstance(error, AttnConvertError):
        lines = str(error).splitlines()
        return error.exit_code, "\n".join(lines) if len(lines) > 1 else f"error: {error}"
    if hasattr(error, "format_message"):  # typer's own, whose class has moved between its versions
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "attnconvert"
        message = one_line(error.format_message()).rstrip(".")
        return 2, f"error: {message}; see `{where} --help`" if message else ""  # the help was shown instead
    host = sys.modules.get(f"{__package__}.hosts.transformers")
    if host is not None and isinstance(error, host.Unsupported):
        return UsageError.exit_code, f"error: {error}"
    kernels = sys.modules.get(f"{__package__.rpartition('.')[0]}.kernels.dispatch")
    if kernels is not None and isinstance(error, kernels.BackendError):
        return PreflightError.exit_code, f"error: {one_line(error)}"
    text = one_line(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return (
            PreflightError.exit_code,
            f"error: out of memory: {text}; ask for less at once: shorter lengths, fewer rows",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return PreflightError.exit_code, f"error: disk full: {text}; free some space and run the same command again"
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("attnconvert"):
        return PreflightError.exit_code, f"error: the package {error.name} is not installed: pip install {error.name}"
    return 1, f"error: {type(error).__name__}: {text}; this is a bug: run again with --verbose to see where"
