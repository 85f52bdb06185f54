"""A run and what its stages share: the model, its sites, its texts, what candidates learned and what they cost."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..convert.costs import Costs, require_costs
from ..convert.costs_measure import here, measure_costs
from ..convert.denoiser_sources import CONDITIONS, fetch_denoiser, load_denoiser
from ..convert.errors import UsageError
from ..convert.files import read_json, write_json
from ..convert.hosts.models import has_head, is_encoder, positions_of, require_direction, require_text
from ..convert.hosts.sites import Site
from ..convert.hosts.surgery import find_sites
from ..convert.machine import versions
from ..convert.plan import Plan, read_plan
from ..convert.progress import Track, silent
from ..convert.sources import (
    Document,
    ModelFiles,
    fetch_model,
    load_model,
    read_texts,
    refuse_overlap,
)
from ..convert.text import Cases, Needles, Samples, Texts
from . import measuring
from .loop import load_student

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..convert.recipe import AnyRecipe, NeedleSettings, Recipe
    from ..convert.recipe_images import ImageRecipe
    from ..convert.recipe_schema import SelectSettings
    from ..convert.runs import Run
    from .images import Images

log = logging.getLogger("attnconvert")
STUDENT = "student"  # the arm that is exported
COSTS = "costs.json"
CALIBRATION, CASES = 15485863, 32452843  # added to seeds: noise that neither distillation nor evaluation sees


class Work:
    """A run and what its stages share: the model, loaded once when first needed, its sites and its texts."""

    def __init__(self, run: Run, track: Track = silent) -> None:
        self.run, self.track = run, track

    @property
    def recipe(self) -> AnyRecipe:
        return self.run.recipe

    @property
    def of_text(self) -> Recipe:
        """The recipe of a model of text."""
        found = self.recipe
        assert found.kind == "text"
        return found

    @property
    def of_images(self) -> ImageRecipe:
        """The recipe of an image or video model."""
        found = self.recipe
        assert found.kind == "images"
        return found

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        files = self.files
        log.info("loading %s", files.name)
        if self.recipe.kind == "images":
            from .images import encoded

            if prompts := self.recipe.images.prompts:  # the text encoders come and go before the denoiser is there
                encoded(prompts, files, self._bank, getattr(torch, self.recipe.model.dtype), self.track)
            model, tokenizer = load_denoiser(files, self.recipe.model), None
        else:
            model, tokenizer = load_model(files, self.recipe.model)
            require_text(model)
        self.run.record(model={"name": files.name, "revision": files.revision, "sha256": files.sha256})
        return model, tokenizer

    @cached_property
    def files(self) -> ModelFiles:
        """The files of the model, on this machine."""
        if self.recipe.kind == "images":
            prompts = self.recipe.images.prompts is not None
            return fetch_denoiser(self.recipe.model, encoders=prompts, track=self.track)
        return fetch_model(self.recipe.model, track=self.track)

    @cached_property
    def images(self) -> Images:
        """What the model generates."""
        from .images import Images

        return Images(self.of_images.images, self.files, self.model, self.track, self._bank)

    @property
    def _bank(self) -> Path:
        """Where encoded prompts are kept."""
        return self.run.path / "conditions" / CONDITIONS

    @property
    def model(self) -> Any:
        """The teacher, as it came."""
        return self._loaded[0]

    @property
    def tokenizer(self) -> Any:
        return self._loaded[1]

    @cached_property
    def sites(self) -> list[Site]:
        sites = find_sites(self.model)
        if self.recipe.kind != "images":
            require_direction(self.model, sites)
        return sites

    @cached_property
    def calibration(self) -> list[Document]:
        return read_texts(self.of_text.text.calibration, track=self.track)

    @cached_property
    def heldout(self) -> list[Document]:
        return read_texts(self.of_text.text.heldout, track=self.track)

    def cases(self, settings: NeedleSettings, documents: Sequence[Document], seed: int) -> Cases:
        """What damage is measured on: needle tasks, or for an encoder passages that a search should find."""
        return measuring.damage_cases(self.model, self.tokenizer, documents, settings, seed)

    def sequences(self, documents: Sequence[Document], count: int, length: int, seed: int) -> Tensor:
        """(n, S) tokens, framed as the model expects them.

        Raises:
            UsageError: the text is too short, or the model has no positions for so many tokens.
        """
        return measuring.framed(self.model, self.tokenizer, documents, count, length, seed)

    def check_heldout(self) -> None:
        """Whether evaluation will have the text it needs: better said now than after hours of training.

        Raises:
            UsageError: it is too short, or overlaps the calibration text, or a gate is of what is not measured.
        """
        if self.recipe.kind == "images":
            self.images.check(self.of_images)
            return
        settings, gates = self.of_text.evaluate, self.of_text.gates
        encoder = is_encoder(self.model)
        none = {"kv_ratio": encoder, "perplexity_ratio": encoder, "kl": encoder and not has_head(self.model)}
        for name, absent in {**none, "cosine": not encoder}.items():
            if absent and getattr(gates, name):
                what = "an encoder" if encoder else "a language model"
                raise UsageError(f"gates.{name}: nothing of the kind is measured of {what}; take it out of the recipe")
        refuse_overlap(self.calibration, self.heldout)
        for length in settings.lengths:
            self.sequences(self.heldout, settings.sequences, length, settings.seed)
        self.cases(settings.needles, self.heldout, settings.seed)

    @cached_property
    def profile_samples(self) -> Samples:
        """What the statistics of the profile are taken from: calibration texts, or states of the teacher."""
        if self.recipe.kind == "images":
            settings = self.of_images.profile
            return self.images.states(
                settings.states, settings.seed + CALIBRATION, settings.bands, "calibration states"
            )
        texts = self.of_text.profile
        return Texts(self.sequences(self.calibration, texts.sequences, texts.length, texts.seed))

    @cached_property
    def profile_cases(self) -> Cases:
        """The cases on which damage is measured."""
        if self.recipe.kind == "images":
            wanted = self.of_images.profile
            count = max(wanted.cases, *(select.measure_cases for select in self._selections()))
            return self.images.states(count, wanted.seed + CASES, wanted.bands, "states to measure on")
        settings = self.of_text.profile
        return self.cases(settings.needles, self.calibration, settings.seed)

    def _selections(self) -> list[SelectSettings]:
        return [self.recipe.select, *(arm.select for arm in self.recipe.compare)]

    def retrieval_tasks(self) -> list[Needles]:
        """Further tasks for the retrieval scores, of language models alone."""
        if self.recipe.kind == "images":
            return []
        return measuring.retrieval_tasks(self.model, self.tokenizer, self.calibration, self.of_text.profile)

    def profile_data(self) -> dict[str, Any]:
        """What the profile was measured on, as it is told in its file."""
        if self.recipe.kind == "images":
            grid, text = self.images.layout(self.sites)
            return {"size": list(self.of_images.images.size), "grid": list(grid), "text": text}
        return {"text": described(self.calibration)}

    def cost_lengths(self) -> list[int]:
        """The lengths that budgets and timings of the recipe speak of."""
        found = {
            n for settings in self._selections() for by_length in (settings.budgets or {}).values() for n in by_length
        }
        speed = self.of_text.evaluate.speed
        found |= set(speed.lengths if speed else ())
        most = positions_of(self.model)
        return sorted(found) or ([2048, 8192] if most is None else [most // 2, most])

    def costs(
        self, lengths: Sequence[int] = (), batch: int | None = None, repeats: int = 3, again: bool = False
    ) -> Costs:
        """What the kernels take on this machine, at the batch of the table that the run has, or 1.

        It is costs/costs.json of the run if that says all that is asked for and was measured here; else, or with
        `again`, what is missing is measured. Lengths of the table stay in it.
        """
        if self.recipe.kind == "images":
            raise UsageError(
                "operators are not timed one by one in an image or video model: its budgets are in flops; "
                "evaluate.speed.sizes times a step, and `attnconvert bench` one of the exported checkpoint"
            )
        path, wanted = self.run.path / "costs" / COSTS, {*(lengths or self.cost_lengths())}
        dtype, known = str(self.model.dtype).removeprefix("torch."), None
        if path.exists():
            found = read_json(path)
            known = Costs.from_json(found)
            batch = batch or known.batch
            try:
                require_costs(known, here(self.model.device), dtype, batch, self.sites)
            except UsageError as error:
                log.info("measuring the costs again: %s", error)
                known = None
            if known is not None and found.get("versions") != versions():
                log.info("measuring the costs again: other versions of the libraries")
                known = None
        if known is not None:
            enough = wanted <= set(known.lengths) and set(self.recipe.profile.candidates) <= set(known.candidates)
            if enough and not again:
                return known
            wanted |= set(known.lengths)
        costs = measure_costs(
            self.sites,
            self.recipe.profile.candidates,
            lengths=sorted(wanted),
            batch=batch or 1,
            dtype=dtype,
            device=self.model.device,
            repeats=repeats,
            folder=path.parent,
            track=self.track,
            model=self.model,
        )
        write_json(path, {**costs.to_json(), "versions": versions()})
        return costs

    @cached_property
    def learned(self) -> dict[tuple[str, str], nn.Module]:
        """What the candidates that learn come to in a brief attention transfer on the texts of the profile."""
        settings, folder = self.recipe.profile, self.run.folder("profile")
        if not measuring.that_learn(settings.candidates):
            return {}  # the samples are drawn for those that learn
        return measuring.fit_candidates(self.model, self.sites, settings, self.profile_samples, folder, self.track)

    def plans(self) -> dict[str, Plan]:
        """The plan of every arm, the student's first."""
        folder = self.run.folder("select")
        arms = {STUDENT: read_plan(self.run.plan)}
        return arms | {arm.name: read_plan(folder / f"{arm.name}.yaml") for arm in self.recipe.compare}

    def trained(self, arm: str) -> Path | None:
        """The folder of what an arm learned, or None for one that is not trained."""
        if self.recipe.kind == "images":
            pictures = self.of_images.distill
            phases: tuple[object, ...] = (pictures.transfer, pictures.training)
        else:
            settings = self.of_text.distill
            phases = (settings.transfer, settings.lora)
        if not any(phases):
            return None
        if arm != STUDENT and not next(a for a in self.recipe.compare if a.name == arm).distill:
            return None
        return self.run.folder("distill") / arm

    def student(self, arm: str) -> Any:
        """A copy of the model, converted as this arm."""
        model = copy.deepcopy(self.model)
        load_student(model, self.plans()[arm].for_sites(self.sites), self.trained(arm))
        return model


def described(documents: Sequence[Document]) -> dict[str, Any]:
    """Which texts these are, in a few words."""
    names = [d.name for d in documents]
    return {
        "documents": len(names),
        "first": names[0],
        "last": names[-1],
        "characters": sum(len(d.text) for d in documents),
    }


def identity(run: Run) -> dict[str, Any]:
    """Which model a run has, as far as it is known yet: a profile of another one is refused."""
    found = run.manifest().get("model", {})
    return {"model": found.get("name"), "revision": found.get("revision"), "sha256": found.get("sha256")}
