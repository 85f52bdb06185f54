"""The profile of a model, whatever asks for it: what its texts become, candidates fitted, measured, gates learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..convert.files import stored
from ..convert.hosts.models import is_encoder, require_positions
from ..convert.hosts.sites import Site
from ..convert.observation import Learned, Table
from ..convert.passages import passages
from ..convert.profiling import Profile, profile
from ..convert.progress import Track
from ..convert.recipe_schema import TransferSettings
from ..convert.text import Cases, Needles, Samples, Texts, frame, needles, sequences
from ..kernels import operators
from ..kernels.spec import Spec, label
from .gates import learn_gates
from .loop import fit_operators

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..convert.recipe import NeedleSettings, ProfileSettings
    from ..convert.sources import Document


def framed(model: Any, tokenizer: Any, documents: Sequence[Document], count: int, length: int, seed: int) -> Tensor:
    """(n, S) tokens of documents, framed as the model expects them.

    Raises:
        UsageError: the text is too short, or the model has no positions for so many tokens.
    """
    require_positions(model, length)
    around = frame(tokenizer) if is_encoder(model) else None
    return sequences(tokenizer, documents, count, length, seed, around)


def needle_cases(tokenizer: Any, documents: Sequence[Document], settings: NeedleSettings, seed: int) -> Needles:
    """Needle tasks in the text of documents."""
    return needles(tokenizer, documents, settings.template, settings.cases, settings.length, seed)


def damage_cases(
    model: Any, tokenizer: Any, documents: Sequence[Document], settings: NeedleSettings, seed: int
) -> Cases:
    """What damage is measured on: needle tasks, or for an encoder passages that a search should find."""
    if not is_encoder(model):
        return needle_cases(tokenizer, documents, settings, seed)
    require_positions(model, settings.length)
    how = settings.template, settings.cases, settings.length, seed
    return passages(model, tokenizer, documents, *how)


def that_learn(candidates: Sequence[Spec]) -> list[Spec]:
    """The candidates that have something to learn."""
    return [spec for spec in candidates if operators.of(spec).parameters(spec, 1, 1, 1) is not None]


def fit_candidates(
    model: Any, sites: Sequence[Site], settings: Any, samples: Samples, folder: Path, track: Track
) -> dict[tuple[str, str], nn.Module]:
    """What the candidates that learn come to in a brief attention transfer; `settings` are those of a profile."""
    found: dict[tuple[str, str], nn.Module] = {}
    brief = TransferSettings(steps=settings.transfer_steps)
    for spec in that_learn(settings.candidates):
        place = folder / f"fit-{label(spec)}"
        found.update(fit_operators(model, sites, spec, samples, brief, settings.seed, place, track))
    return found


def measure(
    model: Any,
    sites: Sequence[Site],
    samples: Samples,
    cases: Cases,
    settings: Any,
    *,
    retrieval: Sequence[Needles],
    learned: Learned,
    folder: Path,
    track: Track,
    data: Mapping[str, Any],
) -> Profile:
    """The profile that the settings ask for, of text or of images; finished parts stay in `folder`.

    Args:
        samples: what statistics are taken from; cases: what damage is measured on; retrieval: further needle tasks;
        learned: what the candidates have learned; data: what the profile says of its model and texts.
    """
    told = {**data, **settings.model_dump(mode="json", exclude={"candidates"})}
    found = profile(
        model,
        sites,
        samples,
        cases,
        settings.candidates,
        rows=settings.rows,
        damage=settings.damage,
        folder=folder,
        track=track,
        gradients=settings.gradients,
        retrieval=retrieval,
        learned=learned,
        data={"model": type(model).__name__, "element": model.dtype.itemsize, **told},
    )
    return dataclasses.replace(found, gates=_gates(model, sites, cases, settings, learned, folder, track))


def _gates(
    model: Any, sites: Sequence[Site], cases: Cases, settings: Any, learned: Learned, folder: Path, track: Track
) -> Table:
    """What the methods with learned gates say of the first candidate, each kept in a file of its own."""
    found: Table = {}
    for method in settings.gates:

        def learn(method: Any = method) -> Table:
            return learn_gates(
                method,
                model,
                sites,
                cases,
                settings.candidates[0],
                steps=settings.gate_steps,
                full=settings.gate_full,
                seed=settings.seed,
                learned=learned,
                folder=folder,
                track=track,
            )

        found.update(stored(folder / f"gates-{method}.json", learn))
    return found


def measure_text(
    model: Any,
    tokenizer: Any,
    sites: Sequence[Site],
    documents: Sequence[Document],
    settings: ProfileSettings,
    *,
    folder: Path,
    track: Track,
    data: Mapping[str, Any],
) -> Profile:
    """The profile of a model of text, from documents."""
    samples = Texts(framed(model, tokenizer, documents, settings.sequences, settings.length, settings.seed))
    return measure(
        model,
        sites,
        samples,
        damage_cases(model, tokenizer, documents, settings.needles, settings.seed),
        settings,
        retrieval=retrieval_tasks(model, tokenizer, documents, settings),
        learned=fit_candidates(model, sites, settings, samples, folder, track),
        folder=folder,
        track=track,
        data=data,
    )


def retrieval_tasks(
    model: Any, tokenizer: Any, documents: Sequence[Document], settings: ProfileSettings
) -> list[Needles]:
    """Further tasks for the retrieval scores, of language models alone."""
    if is_encoder(model):
        return []
    return [needle_cases(tokenizer, documents, task, settings.seed) for task in settings.retrieval]
