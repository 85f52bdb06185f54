"""`attnconvert operators`: what may stand in for full attention, and the rules that one of your own must keep."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import GateMissed, UsageError, one_line
from .options import AsJson, command
from .terminal import Terminal

operators_app = typer.Typer(
    help="What may stand in for full attention, and checks of your own operators.", no_args_is_help=True
)


@command(operators_app, "ls")
def operators_ls(as_json: AsJson = False) -> None:
    """List the operators, with their settings and defaults.

    Those of installed packages are among them.

    [dim]Example:[/dim] attnconvert operators ls
    """
    from ..kernels.spec import operator_names, plain, spec_class
    from .tables import lines

    found: dict[str, Any] = {}
    for name in operator_names():
        cls = spec_class(name)
        assert cls is not None
        spec = cls()
        settings = {field.name: plain(getattr(spec, field.name)) for field in dataclasses.fields(spec)}
        found[name] = {"does": one_line((cls.__doc__ or "").partition("\n\n")[0]), "settings": settings}
    rows = [
        (name, f"{entry['does']} " + ", ".join(f"{key}: {value}" for key, value in entry["settings"].items()))
        for name, entry in found.items()
    ]
    Terminal(as_json=as_json).result(found, lines(rows))


@command(operators_app, "check")
def operators_check(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Python files that define operators.", show_default=False)
    ],
    as_json: AsJson = False,
) -> None:
    """Hold operators of your own to the rules of all operators: exit code 4 if one is broken.

    Each is tried as the EXAMPLES of its file, else with its defaults, against its own reference.

    [dim]Example:[/dim] attnconvert operators check my_operator.py
    """
    from ..kernels import outside, testing
    from .tables import lines

    terminal = Terminal(as_json=as_json)
    rows: list[dict[str, Any]] = []
    for file in files:
        try:
            cases = testing.cases(*outside.load(file))
        except ValueError as error:
            raise UsageError(str(error)) from error
        for spec, rule in terminal.track(cases, f"checking {file}"):
            try:
                rule(spec)
                broken = ""
            except Exception as error:  # whatever an operator that is being written raises
                why = one_line(error) or "it does not hold"
                broken = why if isinstance(error, AssertionError) else f"{type(error).__name__}: {why}"
            rows.append({"operator": testing.named(spec), "rule": testing.named(rule), "broken": broken})
    told = [(f"{row['operator']}: {row['rule']}", str(row["broken"] or "kept")) for row in rows]
    terminal.result(rows, lines(told))
    if broken_rules := [row for row in rows if row["broken"]]:
        raise GateMissed(f"{len(broken_rules)} of {len(rows)} rules are broken; the first: {told_of(broken_rules[0])}")


def told_of(row: dict[str, Any]) -> str:
    """A broken rule in one line."""
    return f"{row['operator']}: {row['rule']}: {row['broken']}"
