"""What the commands share: how one is registered, and the options that many take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from inspect import cleandoc
from pathlib import Path
from typing import Annotated, TypeVar

import typer
import yaml

from .errors import UsageError

Function = TypeVar("Function", bound=Callable[..., None])


def command(group: typer.Typer, name: str) -> Callable[[Function], Function]:
    """Registers a command; each paragraph of its docstring becomes one line, which the terminal may break anew."""

    def register(function: Function) -> Function:
        paragraphs = cleandoc(function.__doc__ or "").split("\n\n")
        function.__doc__ = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
        return group.command(name)(function)

    return register


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document; everything else goes to stderr.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show the libraries' messages and full tracebacks.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only warnings and the result.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run.", show_default=False)]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="The run directory; else runs/<recipe name>.", show_default=False),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a setting, such as sample.sequences=16. Repeatable.",
        show_default=False,
    ),
]
Sizes = Annotated[
    str | None,
    typer.Option(help="Sizes of an image or video model's latents, such as 64x64,128x128.", show_default=False),
]
Target = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|RECIPE|RUN",
        help="A model (folder, file.gguf, hub id owner/name, package:name==version:file), a recipe or a run.",
        show_default=False,
    ),
]
Amounts = list[str] | None  # "40%@8192", "900@2048"; an option that may be repeated


def budget_overrides(amounts: Mapping[str, Sequence[str] | None], keep_quality: float | None) -> list[str]:
    """Overrides of a recipe for the budgets of `attnconvert select`; those that the recipe had go.

    Raises:
        UsageError: an amount is not written as AMOUNT@LENGTH.
    """
    budgets: dict[str, dict[int, float | str]] = {}
    for name, given in amounts.items():
        for text in given or ():
            amount, _, length = text.partition("@")
            if not length.isdecimal() or not amount:
                option = name.replace("_", "-")
                raise UsageError(f"--{option} {text}: write AMOUNT@LENGTH, such as --{option} 40%@8192")
            value: float | str = amount
            with suppress(ValueError):
                value = float(amount)
            if int(length) in budgets.setdefault(name, {}):
                raise UsageError(f"--{name.replace('_', '-')} is given twice at {length} tokens: give it once")
            budgets[name][int(length)] = value
    if not budgets and keep_quality is None:
        return []
    none = [f"select.{name}=null" for name in ("groups", "layers")]
    written = yaml.safe_dump(budgets, default_flow_style=True, width=10**6).strip() if budgets else "null"
    quality = "null" if keep_quality is None else f"{keep_quality:g}"
    rounds = ["select.rounds=0"] if keep_quality is not None else []  # it measures every plan it tries
    return [*none, *rounds, f"select.budgets={written}", f"select.keep_quality={quality}"]


def parse_lengths(given: str) -> list[int]:
    """The numbers of `--lengths 2048,8192`; UsageError where one is none, or below 8."""
    numbers = [int(part) if part.strip().isdecimal() else 0 for part in given.split(",")]
    if min(numbers) < 8:
        raise UsageError(f"--lengths {given}: give whole numbers of at least 8, such as 2048,8192")
    return numbers
