"""What the stages ask of an image or video model: its conditions, its process, samples and states of the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..convert.conditioning import Conditions, load_conditions
from ..convert.denoiser_sources import CLASSIFIER, CONDITIONS, process_of
from ..convert.errors import UsageError, one_line
from ..convert.hosts.denoising import Calling, latent_shape, token_grid
from ..convert.hosts.sites import Site, SiteOperators, all_full
from ..convert.hosts.surgery import converted
from ..convert.image_metrics import Classifier, load_classifier
from ..convert.machine import number_type
from ..convert.processes import Process
from ..convert.prompts import stored_prompts
from ..convert.sampling import Denoise, Drawn, Sampler, State, noise, sample
from ..convert.seeds import rng
from ..convert.states import Caller, States, states_of
from ..kernels.call import Call
from ..kernels.masks import Layout

if TYPE_CHECKING:
    from ..convert.progress import Track
    from ..convert.recipe_images import ImageRecipe, ImageSettings
    from ..convert.sources import ModelFiles


class Images:
    """The section `images` of a recipe, at work for one model; `bank` is where encoded prompts are kept."""

    def __init__(self, settings: ImageSettings, files: ModelFiles, model: Any, track: Track, bank: Path) -> None:
        self.settings, self.files, self.model, self.track, self.bank = settings, files, model, track, bank

    @cached_property
    def conditions(self) -> Conditions:
        """What may be asked for.

        Raises:
            AssetMissing: the file is not there. UsageError: guidance without an entry of no prompt.
        """
        if self.settings.prompts is not None:
            found = encoded(self.settings.prompts, self.files, self.bank, self.model.dtype, self.track)
        else:
            found = load_conditions(self.settings.conditions or self.files.folder / CONDITIONS)
        if self.settings.guidance != 1 and found.null is None:
            raise UsageError(
                f"images.guidance is {self.settings.guidance:g}, but the conditions have no entry without a prompt "
                "(`null`): add one, or set guidance to 1"
            )
        return found

    @cached_property
    def process(self) -> Process:
        """How data and noise mix, and what the model predicts."""
        return process_of(self.files, self.model, self.settings.prediction)

    @property
    def sampler(self) -> Sampler:
        """Steps, guidance and shift."""
        return Sampler(steps=self.settings.steps, guidance=self.settings.guidance, shift=self.settings.shift)

    @property
    def times(self) -> list[float]:
        """Of the sampler's steps, from 1 (noise) on."""
        return list(self.process.times(self.settings.steps, self.settings.shift)[:-1].tolist())

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample: (C, H, W) or (C, T, H, W)."""
        return latent_shape(self.model, self.settings.size)

    @cached_property
    def classifier(self) -> Classifier | None:
        """The classifier of the pixels, where there is one."""
        given = self.settings.classifier
        own = self.files.folder / CLASSIFIER
        return load_classifier(given or own) if given is not None or own.is_file() else None

    def check(self, recipe: ImageRecipe) -> None:
        """Whether evaluation and training will have what they need: better said now than after hours.

        Raises:
            UsageError: a size does not fit the model, the classifier does not fit the samples, a gate needs one that is
            not there, or an objective is of other models. AssetMissing: the conditions cannot be read.
        """
        self.entries([0])
        for size in (self.settings.size, *(recipe.evaluate.speed.sizes if recipe.evaluate.speed else ())):
            token_grid(self.model, size)
        training = recipe.distill.training
        if training and training.distribution:
            self.require_flow()
        if self.classifier is None:
            for name in ("right_class", "frechet_rise"):
                if getattr(recipe.gates, name) is not None:
                    raise UsageError(
                        f"gates.{name} needs a classifier: name one in images.classifier, or drop the gate"
                    )
            return
        try:
            self.classifier.judge(torch.zeros(1, *self.shape))
        except RuntimeError as error:
            raise UsageError(
                f"the classifier does not take samples of {'×'.join(map(str, self.shape))}: {one_line(error)}"
            ) from error

    def require_flow(self) -> None:
        """Raises UsageError where the model does not predict a flow, which distribution matching is of."""
        if self.process.kind != "flow":
            raise UsageError(
                f"distill.training.distribution is of models that predict a flow, this one predicts {self.process.kind}"
            )

    def entries(self, numbers: Sequence[int]) -> Tensor:
        """(n,): what each sample is asked for; the prompts or classes in turns."""
        prompts = self.conditions.prompts
        if not prompts:
            raise UsageError("the conditions have no entry that asks for something, only the one without a prompt")
        return torch.tensor([prompts[n % len(prompts)] for n in numbers])

    @cached_property
    def caller(self) -> Caller:
        """How a model is asked."""
        return Caller(self.conditions, Calling(guidance=self.settings.embedded, trained=self.settings.positions))

    def denoise(self, model: Any) -> Denoise:
        """A model as the sampler calls it."""
        return partial(self.caller, model)

    def layout(self, sites: Sequence[Site]) -> tuple[tuple[int, ...], int]:
        """The grid of the model's tokens at the recipe's size, and how many tokens a prompt has."""
        seen: dict[str, Layout] = {}

        def note(site: SiteOperators, q: Tensor, k: Tensor, v: Tensor, call: Call) -> None:
            if call.layout is not None:
                seen[site.site.name] = call.layout

        with torch.no_grad(), converted(self.model, all_full(sites)) as conversion, conversion.observe(note):
            start = noise(self.shape, 0, [0]).to(self.model.device)
            self.denoise(self.model)(start, torch.ones(1, device=start.device), self.entries([0]))
        whole = min(sites, key=lambda site: site.down)
        grid = tuple(n * whole.down for n in seen[whole.name].grid)
        return grid, max(layout.text for layout in seen.values())

    def draw(
        self, model: Any, numbers: Sequence[int], seed: int, batch: int, title: str, trajectory: bool = False
    ) -> Drawn:
        """The samples of these numbers, on the CPU; each depends on its number and the seed alone."""
        parts: list[Drawn] = []
        batches = [numbers[at : at + batch] for at in range(0, len(numbers), batch)]
        for rows in self.track(batches, title):
            start, entries = noise(self.shape, seed, rows).to(model.device), self.entries(rows)
            nulls = self.conditions.nulls(len(rows)) if self.settings.guidance != 1 else None
            parts.append(
                _kept(sample(self.denoise(model), self.process, self.sampler, start, entries, nulls, trajectory))
            )
        return joined(parts)

    def states(self, count: int, seed: int, bands: int, title: str, batch: int = 16) -> States:
        """`count` states of the teacher's trajectories, as many of each step as goes, two of a sample."""
        samples = -(-count // 2)
        drawn = self.draw(self.model, range(samples), seed, batch, title, trajectory=True)
        steps = self.settings.steps
        order = torch.randperm(steps, generator=rng("states", seed)).tolist()
        chosen = [[order[(2 * n + m) % steps] for m in range(2) if 2 * n + m < count] for n in range(samples)]
        return states_of(self.caller, self.process, drawn, self.entries(range(samples)), chosen, bands)


def encoded(prompts: Path, files: ModelFiles, bank: Path, dtype: torch.dtype, track: Track) -> Conditions:
    """What the pipeline's text encoders make of a file of prompts, kept in the file `bank`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return stored_prompts(bank, prompts, files.pipeline, device, dtype, track)


def _kept(drawn: Drawn) -> Drawn:
    """The same on the CPU."""
    states = [
        State(s.x.cpu(), s.t, s.prompted.cpu(), None if s.unprompted is None else s.unprompted.cpu())
        for s in drawn.states
    ]
    return Drawn(drawn.x.cpu(), tuple(states))


def joined(parts: Sequence[Drawn]) -> Drawn:
    """Samples of several batches as one."""
    states = []
    for same in zip(*(part.states for part in parts), strict=True):
        without = [s.unprompted for s in same if s.unprompted is not None]
        states.append(
            State(
                torch.cat([s.x for s in same]),
                same[0].t,
                torch.cat([s.prompted for s in same]),
                torch.cat(without) if without else None,
            )
        )
    return Drawn(torch.cat([part.x for part in parts]), tuple(states))


def computing_in(precision: str, model: Any) -> torch.autocast:
    """Inside, matrix products run in this number type: a recipe's `auto`, `float32` or `bfloat16`.

    A model in half precision computes in its own. Nothing is cached: teacher and student are one set of parameters
    whose values change places meanwhile.
    """
    wanted = number_type() if precision == "auto" else precision
    half = model.dtype if model.dtype != torch.float32 else torch.bfloat16
    on = model.dtype != torch.float32 or wanted == "bfloat16"
    return torch.autocast(model.device.type, half, enabled=on, cache_enabled=False)
