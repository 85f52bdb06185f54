"""The terminal: results go to stdout, as tables or as one JSON document; everything else goes to stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from typing import Any

from rich.console import Console
from rich.text import Text

from .keys import STAGES
from .progress import Track, rich_track, silent

log = logging.getLogger("attnconvert")


class Terminal:
    """What one command says. NO_COLOR, TERM and the width of the terminal are rich's to read."""

    def __init__(self, *, as_json: bool = False, verbose: bool = False, quiet: bool = False) -> None:
        self.as_json, self.verbose, self.quiet = as_json, verbose, quiet
        self.out = Console(highlight=False)
        self.err = Console(stderr=True, highlight=False)
        handler = _Lines(self.err)
        log.handlers = [one for one in log.handlers if not isinstance(one, _Lines)] + [handler]
        log.setLevel(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)
        if not verbose:
            hush_libraries()

    @property
    def track(self) -> Track:
        """Progress on stderr, unless --quiet."""
        return silent if self.quiet else rich_track(self.err)

    def result(self, document: Any, *shown: Any) -> None:
        """The outcome: the document under --json, else the tables and texts that are shown."""
        if self.as_json:
            sys.stdout.write(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
            return
        before = None
        for part in shown:
            if part is None:
                continue
            if isinstance(before, Text):  # tables end with an empty line of their own
                self.out.print()
            self.out.print(part, soft_wrap=isinstance(part, Text) and bool(part.no_wrap))
            before = part

    def note(self, text: str) -> None:
        """A line about what happens now."""
        log.info(text)


class _Lines(logging.Handler):
    """Log records as plain lines above the progress bars; the name of a stage that begins stands out."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        style = "bold" if message in STAGES else "yellow" if record.levelno >= logging.WARNING else "dim"
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        self.console.print(Text(prefix + message, style=style), soft_wrap=True)


def hush_libraries() -> None:
    """No bars and no advice from the libraries beneath. To be called before they are imported, which reads most of it.

    The processes that export starts take it over with the environment.
    """
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        os.environ.setdefault(name, "1")
    for name, value in (("TRANSFORMERS_VERBOSITY", "error"), ("DATASETS_VERBOSITY", "error")):
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
