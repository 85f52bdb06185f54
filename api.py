"""attnconvert from Python: what the commands do, on a model that is in memory. `import attnconvert` offers all of it.

Nothing is imported twice and nothing is done another way: the stages of a run call the same functions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from .convert.errors import UsageError
from .convert.exported import load_exported
from .convert.hosts import surgery
from .convert.hosts.sites import Site, SiteOperators
from .convert.plan_given import Operators, PlanGiven, plan_given
from .convert.profiling import Profile
from .convert.progress import Track, silent
from .convert.recipe_errors import dotted, findings
from .convert.recipe_schema import ProfileSettings, SelectSettings
from .convert.selection import Selection, needs_model
from .convert.selection import select as choose
from .convert.sources import Document
from .distill.measuring import measure_text
from .kernels import outside
from .kernels.spec import Spec, spec_to_dict

if TYPE_CHECKING:
    from .convert.costs import Costs

M = TypeVar("M")
S = TypeVar("S", bound=BaseModel)

__all__ = ["Operators", "PlanGiven", "convert", "find_sites", "load", "profile", "register", "select"]


def find_sites(model: Any) -> list[Site]:
    """The self-attentions of a model that can be converted, in the order of its layers.

    The model runs on a few tokens to find them, and once more with all heads full, which must give what it gives
    untouched. It is left as it was.

    >>> [site.name for site in find_sites(tiny_llama())]
    ['model.layers.0.self_attn', 'model.layers.1.self_attn']

    Raises:
        ValueError: its attention cannot be reached, or something in it is not known; the message names the module.
    """
    _refuse_converted(model)
    return surgery.find_sites(model)


def convert(model: M, plan: PlanGiven) -> M:
    """Put a plan to work in a model, in place; what the model has as `conversion` then takes it out again.

    Args:
        model: of transformers (a decoder or encoder) or a denoiser of diffusers.
        plan: a `Plan`, the file of one (`plan.yaml`), a selection, or operators by site or layer. What a plan does not
            name stays full. Operators that learn, as `linear` and `hybrid` do, are untrained.

    Returns:
        The model itself. `model.conversion.remove()` leaves it as it was found; inside `model.conversion.teacher()` it
        runs full attention.

    >>> model = convert(tiny_llama(), {"0": {"operator": "window", "size": 64}, 1: [Full(), Window(size=16)]})
    >>> [label(spec) for spec in model.conversion.sites["model.layers.1.self_attn"].specs]
    ['full', 'window-16-4']
    >>> model.conversion.remove()

    Raises:
        UsageError: the plan is none, or names what this model does not have. ValueError: the model cannot be converted.
    """
    sites = find_sites(model)
    made = plan_given(plan, sites, type(model).__name__).for_sites(sites)
    target: Any = model
    target.conversion = surgery.convert(model, made)
    return model


def profile(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    candidates: Sequence[Spec | Mapping[str, Any]] | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    folder: str | PathLike[str] | None = None,
    track: Track = silent,
) -> Profile:
    """Measure what every head of a model of text does, and what each candidate would lose in the place of each group.

    Args:
        texts: documents, long enough for the sequences that the settings ask for.
        candidates: operators; else those of the settings, or a window of 128 with 4 sinks.
        settings: as the section `profile` of a recipe, such as {"sequences": 4, "length": 512}.
        folder: where finished parts are kept, so that an interrupted profile continues; else nowhere.
        track: shows progress, such as `attnconvert.convert.progress.rich_track()`.

    >>> small = {"sequences": 1, "length": 64, "rows": 8, "needles": {"cases": 1, "length": 96}, "retrieval": []}
    >>> found = profile(tiny_llama(), words(), [TEXT], [Window(size=16, sinks=2)], settings=small)
    >>> list(found.candidates), len(found.damage["window-16-2"]["kl"])
    (['window-16-2'], 2)

    Raises:
        UsageError: a setting is wrong, or the texts are too short.
    """
    given = dict(settings or {})
    if candidates is not None:
        given["candidates"] = [dict(c) if isinstance(c, Mapping) else spec_to_dict(c) for c in candidates]
    wanted = _settings(ProfileSettings, given, "profile")
    if isinstance(texts, str):
        raise UsageError("texts is one text: give a list of them")
    documents = [Document(name=f"text {n}", text=text) for n, text in enumerate(texts)]
    sites = find_sites(model)
    named = {"model": getattr(getattr(model, "config", None), "_name_or_path", None) or None}
    with tempfile.TemporaryDirectory() as passing:
        return measure_text(
            model,
            tokenizer,
            sites,
            documents,
            wanted,
            folder=Path(passing if folder is None else folder),
            track=track,
            data={"identity": named, "text": {"documents": len(documents)}},
        )


def select(profile: Profile, settings: Mapping[str, Any], *, costs: Costs | None = None) -> Selection:
    """Choose an operator for every KV group: a selection, whose `plan` says what and whose `reasons` say why.

    Args:
        settings: as the section `select` of a recipe, such as {"groups": 0.5} or {"budgets": {"kv_bytes": {8192:
            "40%"}}}. What measures whole plans (rounds, keep_quality, method restore) is for runs alone.
        costs: of this machine, as `attnconvert costs` measures them; budgets in milliseconds need them.

    >>> chosen = select(profile_of_tiny_llama(), {"groups": 0.5})
    >>> chosen.plan.converted
    0.5

    Raises:
        UsageError: a setting is wrong, or no plan meets the budget.
    """
    wanted = _settings(SelectSettings, settings, "select")
    if needs_model(wanted):
        raise UsageError(
            "rounds, keep_quality and method restore measure whole plans: do it in a run, `attnconvert select RUN`"
        )
    return choose(profile, wanted, str(profile.data["model"]), costs=costs)


def load(folder: str | PathLike[str], *, track: Track = silent) -> Any:
    """The model of a checkpoint that attnconvert exported, or of the run that it is in, whole and as it was exported.

    It needs no trust in code: the operators are those of this package. Files are compared with SHA256SUMS first.

    >>> load("runs/nowhere")
    Traceback (most recent call last):
    attnconvert.convert.errors.UsageError: runs/nowhere does not exist: give the folder that `attnconvert export` or \
`attnconvert run` wrote

    Raises:
        UsageError: it is no checkpoint, or a newer attnconvert wrote it. AssetMissing: a file is gone or has changed.
    """
    from .convert.inspection import exported_folder

    return load_exported(exported_folder(Path(folder)), track)


def register(file: str | PathLike[str]) -> tuple[str, ...]:
    """Make the operators of a file known, for recipes, plans and `convert`. A file that is known is not read again.

    Installed packages need no call: they name the module under the entry points `attnconvert.operators`.

    Returns:
        The names of the operators.

    >>> register("docs/examples/taylor.py")
    ('taylor',)

    Raises:
        UsageError: it is no such file, registers nothing, or takes a name that is taken.
    """
    try:
        return outside.load(Path(file))
    except ValueError as error:
        raise UsageError(str(error)) from error


def _settings(kind: type[S], given: Mapping[str, Any], section: str) -> S:
    """A section of a recipe, with all that is wrong in it told."""
    try:
        return kind.model_validate(dict(given))
    except ValidationError as error:
        told = [f"{section}.{dotted(path)}: {message}" for path, message in findings(error, kind)]
        raise UsageError("\n".join(told)) from None


def _refuse_converted(model: Any) -> None:
    if any(isinstance(module, SiteOperators) for module in model.modules()):
        raise UsageError("this model is converted already: call model.conversion.remove() first")
