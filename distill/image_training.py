"""Distil a denoiser: attention transfer, then the student against the teacher's predictions.

What is trained is what operators learn and, beside it, adapters on the projections or the projections themselves. The
teacher is the same weights with adapters off (or its own projections put back) and full attention on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from ..convert.errors import UsageError
from ..convert.files import replacing
from ..convert.hosts.denoisers import aside
from ..convert.hosts.sites import Conversion, Site, SiteOperators, submodule
from ..convert.hosts.surgery import block_of, converted, frozen, linear_layers
from ..convert.seeds import rng
from ..kernels.call import Call
from ..kernels.spec import Full, Spec
from .image_samples import Kept, KeptStates
from .images import Images, computing_in
from .loop import (
    ADAPTER,
    OPERATORS,
    PROJECTIONS,
    Trainer,
    checkpointing,
    forget_adapters,
    replacing_folder,
    transfer,
    without_dropout,
)
from .objectives import hidden_error, matching

if TYPE_CHECKING:
    from ..convert.recipe_images import ImageDistillation, ImageTraining


def distill_images(
    images: Images, plan: Mapping[Site, Sequence[Spec]], kept: Kept, settings: ImageDistillation, folder: Path
) -> None:
    """Train one arm and leave operators.safetensors, adapter/ or projections.safetensors, and log.jsonl in `folder`.

    The model is left as it was.
    """
    torch.manual_seed(settings.seed)
    model = images.model
    with without_dropout(model), frozen(model), converted(model, plan) as conversion:
        learned = conversion.learned()
        if settings.transfer and settings.transfer.steps and learned:
            if kept.times is None:
                raise UsageError("distill.transfer runs on trajectories: set sample.keep to trajectory")
            states = KeptStates(kept, images.caller)
            transfer(model, conversion, states, settings.transfer, settings.seed, folder, images.track)
        if settings.training and _converted(plan):
            _train(images, conversion, plan, kept, settings.training, settings.seed, folder)
        with replacing(folder / OPERATORS) as temporary:
            save_file({name: p.detach().contiguous() for name, p in learned.items()}, temporary)


def _train(
    images: Images,
    conversion: Conversion,
    plan: Mapping[Site, Sequence[Spec]],
    kept: Kept,
    settings: ImageTraining,
    seed: int,
    folder: Path,
) -> None:
    model = images.model
    with _weights(model, conversion, plan, settings, folder) as (more, teacher):
        learned = {**more, **conversion.learned()}
        if not learned:
            raise UsageError(
                "distill.training.weights is operators, but none of the plan's operators learns anything: train lora "
                "or projections, or set distill.training to null"
            )
        trainer = Trainer.of("training", learned, settings, settings.steps, folder)
        losses = _Losses(images, conversion, kept, settings, teacher, seed)

        def step(rows: Tensor) -> dict[str, float]:
            with contextlib.ExitStack() as until_done:
                with computing_in(settings.precision, model):
                    parts = losses(rows, trainer.at, until_done)
                total = torch.stack([getattr(settings, name) * value for name, value in parts.items()]).sum()
                total.backward()
            return {"loss": total.item(), **{name: value.item() for name, value in parts.items()}}

        with checkpointing(model, settings.gradient_checkpointing):
            count = len(kept) if settings.states == "trajectory" else len(kept.x)
            trainer.run(step, torch.arange(count), settings.batch, seed, images.track)
        for p in learned.values():
            p.requires_grad_(False)


UNPROMPTED = 0.1  # share of noised states without the prompt, where the sampler is guided
Teacher = Any  # a function that gives a context in which the model is the teacher


@contextlib.contextmanager
def _weights(
    model: Any, conversion: Conversion, plan: Mapping[Site, Sequence[Spec]], settings: ImageTraining, folder: Path
) -> Iterator[tuple[dict[str, nn.Parameter], Teacher]]:
    """What is trained beside the operators, by name, and how to be the teacher meanwhile.

    What was trained is saved in `folder` at the end, and the model has its own weights again.
    """
    if settings.weights == "operators":
        yield {}, conversion.teacher
    elif settings.weights == "lora":
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]  # a float will do, whatever the annotation says
            target_modules=list((_blocks if settings.targets == "blocks" else _projections)(model, plan)),
            lora_dropout=0.0,
            bias="none",
        )
        student = get_peft_model(model, config)

        @contextlib.contextmanager
        def teacher() -> Iterator[None]:
            with conversion.teacher(), student.disable_adapter():
                yield

        try:
            yield {name: p for name, p in student.named_parameters() if p.requires_grad}, teacher
            with replacing_folder(folder / ADAPTER) as temporary:
                student.save_pretrained(str(temporary), save_embedding_layers=False)
        finally:
            student.unload()
            forget_adapters(model)
    else:
        with _own_projections(model, conversion, plan, folder) as found:
            yield found


@contextlib.contextmanager
def _own_projections(
    model: Any, conversion: Conversion, plan: Mapping[Site, Sequence[Spec]], folder: Path
) -> Iterator[tuple[dict[str, nn.Parameter], Teacher]]:
    """The projections of converted sites, trained as they are (CLEAR, Liu et al. 2024); a copy makes the teacher."""
    modules = _projections(model, plan)
    trained = {f"{name}.{key}": p for name, module in modules.items() for key, p in module.named_parameters()}
    before = {name: p.detach().clone() for name, p in trained.items()}
    for q in trained.values():  # a step of 1e-5 is lost in the rounding of half precision
        q.data = q.data.float()

    @contextlib.contextmanager
    def teacher() -> Iterator[None]:
        now = {name: p.data for name, p in trained.items()}
        try:
            for name, p in trained.items():
                p.data = before[name]
            with conversion.teacher():
                yield
        finally:
            for name, p in trained.items():
                p.data = now[name]

    try:
        yield trained, teacher
        with replacing(folder / PROJECTIONS) as temporary:
            save_file({name: p.detach().contiguous() for name, p in trained.items()}, temporary)
    finally:
        for name, p in trained.items():
            p.data = before[name]


def _projections(model: Any, plan: Mapping[Site, Sequence[Spec]]) -> dict[str, nn.Module]:
    """The linear layers of the attentions that are converted, by full name."""
    return _inside(model, [site.name for site in _converted(plan)])


def _blocks(model: Any, plan: Mapping[Site, Sequence[Spec]]) -> dict[str, nn.Module]:
    """The linear layers of the blocks that hold converted attentions; of an attention in none, its own."""
    return _inside(model, [block_of(model, site.name) or site.name for site in _converted(plan)])


def _converted(plan: Mapping[Site, Sequence[Spec]]) -> list[Site]:
    return [site for site, specs in plan.items() if any(spec != Full() for spec in specs)]


def _inside(model: Any, names: Sequence[str]) -> dict[str, nn.Module]:
    return {key: layer for name in names for key, layer in linear_layers(submodule(model, name), name).items()}


class _Losses:
    """The parts of the loss that have a weight, of some rows of what was kept."""

    def __init__(
        self, images: Images, conversion: Conversion, kept: Kept, settings: ImageTraining, teacher: Teacher, seed: int
    ) -> None:
        self.images, self.conversion, self.kept, self.settings = images, conversion, kept, settings
        self.teacher, self.seed = teacher, seed
        self.times = images.process.times(images.settings.steps, images.settings.shift)[:-1]

    def __call__(self, rows: Tensor, step: int, until_done: contextlib.ExitStack) -> dict[str, Tensor]:
        """By the names of their weights; `step` makes the noise of every step its own.

        What must last until the gradients are there is entered into `until_done`: blocks that are checkpointed run
        again in the backward pass, and must find everything as it was.
        """
        images, settings, device = self.images, self.settings, self.images.model.device
        if settings.states == "trajectory":
            x, t, entries, want = self.kept.state(rows, images.conditions.null)
            target = None
        else:
            rows = rows.cpu()
            data = self.kept.x[rows]
            generator = rng("noised", self.seed, step)
            noise = torch.randn(data.shape, generator=generator)
            t = images.process.any_times(torch.rand(len(rows), generator=generator), images.settings.shift)
            x, target = images.process.noised(data, noise, t), images.process.target(data, noise, t)
            entries, want = self.kept.entries[rows], None
            if images.settings.guidance != 1:  # the sampler asks without the prompt too (Ho & Salimans, 2022)
                without = torch.rand(len(rows), generator=generator) < UNPROMPTED
                entries = torch.where(without, images.conditions.nulls(len(rows)), entries)
        x, t = x.to(device), t.to(device)
        outputs: dict[str, list[Tensor]] = {}
        if want is None or settings.feature:
            with torch.no_grad(), self.teacher(), self.conversion.observe(_keeping(outputs)):
                want = images.denoise(images.model)(x, t, entries)
        errors: list[Tensor] = []
        if settings.feature:
            until_done.enter_context(self.conversion.observe(_comparing(outputs, errors)))
        got = images.denoise(images.model)(x, t, entries)
        parts: dict[str, Tensor] = {}
        if settings.velocity:
            parts["velocity"] = hidden_error(want.to(device), got)
        if settings.diffusion and target is not None:
            parts["diffusion"] = hidden_error(target.to(device), got)
        if settings.feature:
            parts["feature"] = torch.stack(errors).mean()
        if settings.distribution:
            parts["distribution"] = self._distribution(x, t, entries, got)
        return parts

    def _distribution(self, x: Tensor, t: Tensor, entries: Tensor, got: Tensor) -> Tensor:
        """LinVideo's any-time distribution matching: one step of the student's own, judged where it arrives."""
        images = self.images
        images.require_flow()
        times = self.times.to(x.device)
        number = (times[None] > t[:, None] - 1e-6).sum(1)  # of the sampler's next step
        # a score needs t > 0, so that a step to the data itself stops half way
        later = torch.where(number < len(times), times[number.clamp_max(len(times) - 1)], t / 2)
        arrived = images.process.step(x, got, t, later)
        with torch.no_grad(), aside(self.conversion):
            denoise = images.denoise(images.model)
            mine = denoise(arrived, later, entries)
            with self.teacher():
                teachers = denoise(arrived, later, entries)
        return matching(arrived, later, teachers, mine)


def _keeping(outputs: dict[str, list[Tensor]]) -> Any:
    """An observer that keeps what every site gives, call by call: Mochi calls its attention once for each sample."""

    def observe(site: SiteOperators, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        o = site.operate(q, k, v, call, site.active)
        outputs.setdefault(site.site.name, []).append(o)
        return o

    return observe


def _comparing(outputs: Mapping[str, list[Tensor]], errors: list[Tensor]) -> Any:
    """An observer that adds the error of every converted site's output to `errors`."""
    calls: dict[str, int] = {}

    def observe(site: SiteOperators, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        o = site.operate(q, k, v, call, site.active)
        if any(spec != Full() for spec in site.specs):
            name = site.site.name
            wanted, number = outputs[name], calls.get(name, 0)
            calls[name] = number + 1
            errors.append(hidden_error(wanted[number % len(wanted)], o))  # a checkpointed block runs again
        return o

    return observe
