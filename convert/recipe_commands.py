"""`attnconvert recipes`: the shipped recipes, and checks of others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from .errors import UsageError
from .options import AsJson, command
from .terminal import Terminal

recipes_app = typer.Typer(help="The recipes that are shipped, and checks of your own.", no_args_is_help=True)


@command(recipes_app, "ls")
def recipes_ls(as_json: AsJson = False) -> None:
    """List the shipped recipes.

    [dim]Example:[/dim] attnconvert recipes ls
    """
    from .recipe import shipped_recipes
    from .tables import lines

    found = shipped_recipes()
    Terminal(as_json=as_json).result(found, lines(found.items()))


@command(recipes_app, "show")
def recipes_show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped recipe.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Print a shipped recipe, to be saved and changed.

    [dim]Example:[/dim] attnconvert recipes show smollm2-135m-window > mine.yaml
    """
    from .recipe import load_recipe, recipe_text

    text = recipe_text(name)
    Terminal(as_json=as_json).result(
        load_recipe(name).model_dump(mode="json") if as_json else None, Text(text.rstrip(), no_wrap=True)
    )


@command(recipes_app, "validate")
def recipes_validate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Recipes to check.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Check recipes: every error of every file, as file:line:column; exit code 2 if there is any.

    [dim]Example:[/dim] attnconvert recipes validate mine.yaml
    """
    from .recipe import load_recipe

    errors: dict[str, list[str]] = {}
    for file in files:
        try:
            load_recipe(file)
            errors[str(file)] = []
        except UsageError as error:
            errors[str(file)] = str(error).splitlines()
    told = [problem for problems in errors.values() for problem in problems]
    good = [Text(f"{name}: valid") for name, problems in errors.items() if not problems]
    terminal = Terminal(as_json=as_json)
    terminal.result(errors, Text("\n").join(good) if good else None)
    if told:
        raise UsageError("\n".join(told))


@command(recipes_app, "schema")
def recipes_schema(as_json: AsJson = False) -> None:
    """Print the JSON Schema of recipes, for editors; it is JSON with and without --json.

    [dim]Example:[/dim] attnconvert recipes schema > recipe.schema.json
    """
    from .recipe import json_schema

    Terminal(as_json=True).result(json_schema())
