"""How long work still takes: one small protocol that stages call, so that they need not know of terminals."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

T = TypeVar("T")


class Track(Protocol):
    """`for item in track(items, "profiling", total=6):` shows how far the loop is. Loops may be nested."""

    def __call__(self, iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]: ...


def silent(iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """A Track that shows nothing."""
    yield from iterable


def rich_track(console: Console | None = None) -> Track:
    """A Track on stderr: a bar with the time left on a terminal, a line every tenth of the way elsewhere."""
    from rich.console import Console

    console = console or Console(stderr=True)
    return _Bars(console) if console.is_terminal else _Lines(console)


class _Bars:
    """All loops that are under way share one display, which ends with the last of them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._display: Progress | None = None
        self._running = 0

    def __call__(self, iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        if self._display is None:
            self._display = _display(self._console)
            self._display.start()
        display = self._display
        task = display.add_task(description, total=_size(iterable, total))
        self._running += 1
        try:
            for item in iterable:
                yield item
                display.advance(task)
        finally:
            self._running -= 1
            display.stop_task(task)
            if self._running == 0:
                display.stop()
                self._display = None


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        total = _size(iterable, total)
        start = said = time.monotonic()
        shown = 0
        for done, item in enumerate(iterable, 1):
            yield item
            now = time.monotonic()
            # Fast loops get one line at their end, slow ones one for each tenth, endless ones one for half a minute.
            passed = done * 10 // total > shown and now - said >= 2.0 if total else now - said >= 30.0
            if passed or done == total:
                shown, said = done * 10 // total if total else 0, now
                self._say(description, done, total, now - start)

    def _say(self, description: str, done: int, total: int | None, elapsed: float) -> None:
        text = f"{description}: {done}"
        if total:
            text += f" of {total} ({done * 100 // total} %)"
        text += f", {clock(elapsed)} elapsed"
        if total and done < total:
            text += f", {clock(elapsed / done * (total - done))} left"
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def clock(seconds: float) -> str:
    """0:07, 12:30, 1:02:05."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _size(iterable: Iterable[object], total: int | None) -> int | None:
    return len(iterable) if total is None and isinstance(iterable, Sized) else total


def _display(console: Console) -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("elapsed"),
        TimeRemainingColumn(elapsed_when_finished=False),
        TextColumn("left"),
        console=console,
    )
