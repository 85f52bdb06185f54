"""The recipe of an image or video model: what it generates, what is measured of it, how it is distilled and judged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ..kernels.spec import whole_site
from .recipe_fields import (
    AtLeastZero,
    Conflict,
    Count,
    Flag,
    Name,
    OperatorSpec,
    Positive,
    Section,
    Share,
    Whole,
)
from .recipe_inputs import ModelSource
from .recipe_schema import (
    OPERATOR_FILES,
    Arm,
    ExportSettings,
    SelectSettings,
    arm_conflicts,
    candidate_conflicts,
    selections_of,
    unmeasured,
)

Side = Annotated[int, Field(strict=True, ge=2)]
Sizes = tuple[Side, ...]
Precision = Literal["auto", "float32", "bfloat16"]
AUTO = "auto: bfloat16 where this machine has instructions for it"


class ImageSettings(Section):
    """What the model generates, from what, and how it is sampled."""

    size: Sizes = Field(
        min_length=2, max_length=3, description="of the latents: height and width, for video frames before them"
    )
    conditions: Path | None = Field(
        default=None,
        description="safetensors of conditioning tensors by the model's argument names, one row a prompt or class; "
        "null: conditions.safetensors of the model's folder",
    )
    prompts: Path | None = Field(
        default=None, description="text file, a prompt a line, encoded by the pipeline's own text encoders"
    )
    prediction: Literal["auto", "flow", "epsilon", "v_prediction"] = Field(
        default="auto", description="what the model puts out; auto: as its class and scheduler say"
    )
    steps: Count = Field(default=28, description="steps of the sampler: Euler for flow, DDIM for the others")
    guidance: AtLeastZero = Field(default=1.0, description="classifier-free guidance; 1 is none")
    shift: Positive = Field(default=1.0, description="of the timesteps towards noise: t' = s·t / (1 + (s − 1)·t)")
    embedded: AtLeastZero = Field(
        default=3.5, description="the guidance that models distilled to take it as an input are given"
    )
    positions: tuple[Side, Side] | None = Field(
        default=None,
        description="grid of training, height and width, that FLUX's positions are stretched to at other sizes; null: "
        "they count tokens",
    )
    classifier: Path | None = Field(
        default=None,
        description="safetensors of a classifier of the pixels; null: classifier.safetensors of the model's folder, "
        "where there is one",
    )

    @classmethod
    def conflicts(cls, fields: Mapping[str, Any]) -> Iterator[Conflict]:
        if fields.get("conditions") is not None and fields.get("prompts") is not None:
            yield ("prompts",), "conditions are given already; give one of the two"


class ImageProfile(Section):
    """What is measured of every head."""

    states: Count = Field(default=12, description="noised states of the teacher's trajectories for the statistics")
    cases: Count = Field(default=4, description="states that single conversions are measured on")
    bands: Count = Field(default=3, description="equal parts of the sampler's steps that statistics are told by")
    rows: Count = Field(default=64, description="query rows per state that the attention statistics are taken from")
    candidates: tuple[OperatorSpec, ...] = Field(min_length=1, description="operators whose damage is measured")
    gradients: Flag = Field(default=True, description="first-order effects, by one backward pass a case")
    damage: Flag = Field(default=True, description="measure the velocity error of each candidate in each head")
    transfer_steps: Whole = Field(
        default=20, description="steps in which candidates that learn are fitted to the attention outputs first"
    )
    gates: tuple[Literal["duo", "linvideo"], ...] = Field(
        default=(), description="learned gates to train for the selection methods of these names"
    )
    gate_steps: Count = Field(default=60, description="optimiser steps of a learned gate")
    gate_full: Share = Field(default=0.4, description="share of the layers that LinVideo's constraint keeps full")
    seed: Whole = Field(default=0, description="random seed")

    @classmethod
    def conflicts(cls, fields: Mapping[str, Any]) -> Iterator[Conflict]:
        yield from candidate_conflicts(fields)


class ImageSamples(Section):
    """What the teacher generates for distillation: latents, or its whole trajectories with what it said at each."""

    count: Count = Field(default=256, description="number of samples")
    keep: Literal["latents", "trajectory"] = Field(
        default="trajectory", description="final latents alone, or every state on the way as well"
    )
    batch: Count = Field(default=16, description="samples generated together")
    shard: Count = Field(default=64, description="samples per file; a finished file is never made again")
    precision: Precision = Field(default="auto", description=f"number type of the computation; {AUTO}")
    seed: Whole = Field(default=0, description="random seed")


class ImageTransfer(Section):
    """Attention transfer: what operators learn fits the teacher's attention outputs, site by site, all else frozen."""

    steps: Whole = Field(default=0, description="optimiser steps; 0 skips the phase")
    lr: Positive = Field(default=1e-2, description="peak learning rate")
    batch: Count = Field(default=8, description="states per step")


class ImageTraining(Section):
    """The student against the teacher: a weighted sum of objectives, on states of the samples."""

    steps: Count = Field(default=500, description="optimiser steps")
    batch: Count = Field(default=16, description="states per step")
    lr: Positive = Field(default=1e-3, description="peak learning rate")
    warmup: Share = Field(default=0.05, description="share of the steps in which the learning rate rises")
    weight_decay: AtLeastZero = Field(default=0.0, description="AdamW weight decay")
    clip: Positive = Field(default=1.0, description="largest gradient norm")
    weights: Literal["lora", "projections", "operators"] = Field(
        default="lora",
        description="beside what operators learn: adapters on the attention projections, the projections themselves "
        "(CLEAR), or nothing",
    )
    targets: Literal["attention", "blocks"] = Field(
        default="attention",
        description="what adapters are on: the projections of converted attentions, or all linear layers of the blocks "
        "that hold them",
    )
    rank: Count = Field(default=16, description="rank of the adapters")
    alpha: Positive = Field(default=32.0, description="scale of the adapters; their output counts alpha / rank")
    states: Literal["trajectory", "noised"] = Field(
        default="trajectory", description="states of the sampler's own way, or kept latents with fresh noise"
    )
    velocity: AtLeastZero = Field(default=1.0, description="weight of the squared error to the teacher's prediction")
    diffusion: AtLeastZero = Field(default=0.0, description="weight of the original loss, on noised latents")
    feature: AtLeastZero = Field(default=0.0, description="weight of the error of every converted attention output")
    distribution: AtLeastZero = Field(
        default=0.0, description="weight of LinVideo's any-time distribution matching, on the student's own states"
    )
    precision: Precision = Field(
        default="auto", description=f"number type of the computation, weights stay as they are; {AUTO}"
    )
    checkpoint_every: Count = Field(default=50, description="steps between checkpoints")
    gradient_checkpointing: Flag = Field(default=False, description="recompute activations instead of keeping them")

    @classmethod
    def conflicts(cls, fields: Mapping[str, Any]) -> Iterator[Conflict]:
        names = ("velocity", "diffusion", "feature", "distribution")
        if set(names) <= set(fields) and not any(fields[name] for name in names):
            yield (), f"nothing to train for: give one of {', '.join(names)} a weight"
        if fields.get("targets") == "blocks" and fields.get("weights") != "lora":
            yield ("targets",), f"says where adapters are, and weights is {fields.get('weights')}: set it to lora"
        if fields.get("diffusion") and fields.get("states") == "trajectory":
            yield ("diffusion",), "the original loss needs fresh noise: set states to noised"


class ImageDistillation(Section):
    """Recovery of the quality that the conversion cost; null for a phase leaves it out."""

    transfer: ImageTransfer | None = Field(default=None, description="attention transfer")
    training: ImageTraining | None = Field(default=ImageTraining(), description="the student against the teacher")
    seed: Whole = Field(default=0, description="random seed")


class StepSettings(Section):
    """One step of the sampler timed at several sizes, teacher and student side by side."""

    sizes: tuple[Sizes, ...] = Field(min_length=1, description="sizes of the latents, e.g. [[32, 32], [64, 64]]")
    repeats: Count = Field(default=5, description="timed repeats")


class ImageEvaluation(Section):
    """How teacher and student are compared."""

    samples: Count = Field(default=200, description="images of each, from the same noise")
    states: Count = Field(default=64, description="held-out states of the teacher's trajectories")
    bands: Count = Field(default=3, description="equal parts of the sampler's steps that errors are told by")
    batch: Count = Field(default=50, description="samples generated together")
    speed: StepSettings | None = Field(default=None, description="timing; null leaves it out")
    seed: Whole = Field(default=1, description="random seed; the samples of distillation must have another")


class ImageGates(Section):
    """Bounds that the result must meet; a missed one ends the run with exit code 4."""

    velocity_error: Positive | None = Field(
        default=None, description="highest squared error of the prediction over the square of the teacher's"
    )
    psnr: Positive | None = Field(default=None, description="least mean PSNR to the teacher's images, in dB")
    ssim: Share | None = Field(default=None, description="least mean SSIM to the teacher's images")
    right_class: Share | None = Field(default=None, description="least share of images that the classifier gets right")
    frechet_rise: AtLeastZero | None = Field(
        default=None, description="most Fréchet distance to fresh samples of the teacher above the teacher's own"
    )
    flops_ratio: Positive | None = Field(default=None, description="most attention FLOPs over the teacher's")
    step_speedup: dict[str, Positive] = Field(
        default={}, description="least speed of a step over the teacher's, by size, e.g. {128x128: 2.0}"
    )
    converted: Share | None = Field(default=None, description="least share of heads converted")


class ImageRecipe(Section):
    """A conversion of an image or video model, from pretrained denoiser to checked checkpoint."""

    kind: ClassVar[Literal["images"]] = "images"  # tells the two kinds of recipe apart
    name: Name = Field(description="name of the recipe: small letters, digits, '.' and '-'")
    description: str = Field(default="", pattern=r"^[^\n]*$", description="one line about it")
    operators: tuple[Path, ...] = Field(default=(), description=OPERATOR_FILES)
    model: ModelSource = Field(description="the pretrained denoiser, or the pipeline that it is part of")
    images: ImageSettings = Field(description="what it generates")
    profile: ImageProfile = Field(description="what is measured")
    select: SelectSettings = Field(default=SelectSettings(groups=1.0), description="what is converted to what")
    compare: tuple[Arm, ...] = Field(default=(), description="further plans to report beside it")
    sample: ImageSamples = Field(default=ImageSamples(), description="what the teacher generates")
    distill: ImageDistillation = Field(default=ImageDistillation(), description="how quality is recovered")
    evaluate: ImageEvaluation = Field(default=ImageEvaluation(), description="how the result is judged")
    gates: ImageGates = Field(default=ImageGates(), description="what it must meet")
    export: ExportSettings = Field(default=ExportSettings(), description="how it is written")

    @classmethod
    def conflicts(cls, fields: Mapping[str, Any]) -> Iterator[Conflict]:
        found = fields.get("distill")
        training = found.training if found else None
        phases = {"transfer": found.transfer, "training": training} if found else {}
        yield from arm_conflicts(fields.get("compare", ()), phases)
        for where, select in selections_of(fields):
            if "profile" in fields:
                yield from unmeasured(where, select, fields["profile"])
            yield from _of_text(where, select)
            wanted = (select.operator,) if select.operator else getattr(fields.get("profile"), "candidates", ())
            if select.unit == "group" and select.method != "explicit" and any(map(whole_site, wanted)):
                yield (*where, "unit"), "an operator with augment serves all heads of a layer: set unit to layer"
            if training and training.weights == "lora" and any(map(whole_site, wanted)):
                message = "adapters and an operator with augment change the same projections: train operators alone"
                yield ("distill", "training", "weights"), message
        kept = fields["sample"].keep if "sample" in fields else "trajectory"
        if training and training.states == "trajectory" != kept:
            yield ("sample", "keep"), "keeps latents alone, and distill.training.states asks for trajectories"
        if found and found.transfer and found.transfer.steps and kept != "trajectory":
            yield ("sample", "keep"), "keeps latents alone, and distill.transfer runs on trajectories"
        if "sample" in fields and "evaluate" in fields and fields["sample"].seed == fields["evaluate"].seed:
            yield ("evaluate", "seed"), "is that of the samples too: judge the result on other noise"
        if "export" in fields and fields["export"].format in ("stock", "adapter"):
            message = (
                f"an image or video model is exported with its code: take remote or auto, not {fields['export'].format}"
            )
            yield ("export", "format"), message
        if "gates" in fields and "evaluate" in fields:
            yield from _untimed(fields["gates"], fields["evaluate"])


def _of_text(where: tuple[str | int, ...], select: SelectSettings) -> Iterator[Conflict]:
    """What a denoiser has not: tokens that are retrieved, a cache, decoding."""
    if select.retrieval_keep is not None:
        yield (*where, "retrieval_keep"), "a denoiser has no retrieval scores; protect layers instead"
    if select.method == "moa":
        yield (*where, "method"), "moa counts distances in a text; use first_order"
    for resource in select.budgets or ():
        if resource != "flops":
            yield (*where, "budgets", resource), "budgets of a denoiser are in flops, by number of image tokens"


def _untimed(gates: ImageGates, evaluate: ImageEvaluation) -> Iterator[Conflict]:
    timed = {size_name(size) for size in evaluate.speed.sizes} if evaluate.speed else set()
    for size in gates.step_speedup:
        if size not in timed:
            yield ("gates", "step_speedup", size), f"nothing is timed at {size}: add it to evaluate.speed.sizes"


def size_name(size: tuple[int, ...]) -> str:
    """(32, 48) → 32x48"""
    return "x".join(map(str, size))
