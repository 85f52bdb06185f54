"""Around every command: what a failure says, the exit code it leaves with, and a terminal left in order."""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from .errors import Interrupted
from .failures import TERMINATED, told
from .keys import STAGES


def guarded(app: typer.Typer, arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs a command of `app`, tells errors in one line, and exits with the code of their kind."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        with warnings.catch_warnings():
            code = _run(app, given)
    finally:
        signal.signal(signal.SIGTERM, before)
    sys.exit(code)


def _terminate(number: int, frame: Any) -> NoReturn:
    sys.exit(TERMINATED)


def _run(app: typer.Typer, given: list[str]) -> int:
    traced = bool({"--verbose", "-v"} & set(given)) or bool(os.environ.get("ATTNCONVERT_DEBUG"))
    goes_on = "; the same command continues" if {"run", "costs", *STAGES} & set(given[:3]) else ""
    try:
        code = app(given, prog_name="attnconvert", standalone_mode=False)
        if code != Interrupted.exit_code:  # what newer typers make of Ctrl-C
            return code if isinstance(code, int) else 0
        message = f"interrupted{goes_on}"
    except (KeyboardInterrupt, typer.Abort):
        code, message = Interrupted.exit_code, f"interrupted{goes_on}"
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
        if code != TERMINATED:
            return code
        message = f"terminated{goes_on}"
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        code, message = told(error)
        if traced and code == 1:
            traceback.print_exc()
    gc.collect()  # a loop that was left in the middle may live on in a cycle, and with it its progress bar
    console = Console(stderr=True, highlight=False)
    console.show_cursor()
    if message:
        console.print(Text(message), soft_wrap=True)
    return int(code)
