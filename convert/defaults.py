"""A recipe for whatever `profile` is given: a recipe's name or file, or a model that has none."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from .recipe import AnyRecipe, Recipe, dump_recipe, load_recipe, parse_recipe, shipped_recipes
from .sources import parse_model_argument


def recipe_for(target: str, overrides: Sequence[str] = ()) -> AnyRecipe:
    """The recipe that `target` names, or one with the default settings for the model that it names.

    Such a recipe takes its name from the model and its text from the shipped recipes.

    Raises:
        UsageError: it is neither, or the recipe or an override has errors.
    """
    shipped = list(shipped_recipes())
    bare = not Path(target).exists() and not set(target) & set("/:@")
    mistyped = bare and bool(difflib.get_close_matches(target, shipped))
    if target in shipped or mistyped or Path(target).suffix in (".yaml", ".yml"):
        return load_recipe(target, overrides)
    model = parse_model_argument(target)
    place = Path(model.gguf or model.folder or (model.package.file if model.package else model.hub or ""))
    last = place.stem if place.suffix == ".gguf" else place.name
    name = re.sub(r"[^a-z0-9.]+", "-", last.lower()).strip("-.") or "model"
    text = next(recipe.text for recipe in map(load_recipe, shipped) if recipe.kind == "text")
    made = Recipe(name=name, description=f"Default settings for {target}", model=model, text=text)
    return parse_recipe(dump_recipe(made), target, overrides)
