"""The recipe: its sections, what may be written in them, with which defaults and bounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ..kernels.spec import Spec, Window, label
from .recipe_fields import (
    AtLeastZero,
    AtLength,
    Budgets,
    Conflict,
    Count,
    Explicit,
    Flag,
    Length,
    Name,
    OperatorSpec,
    Positive,
    Section,
    Share,
    Whole,
    exactly_one,
)
from .recipe_inputs import Dtype, ModelSource, TextSources


class NeedleSettings(Section):
    """A retrieval task made of a fact hidden in filler text."""

    cases: Count = Field(default=8, description="number of prompts")
    length: Length = Field(default=512, description="tokens per prompt")
    template: Literal["passkey", "locker", "account", "badge", "train", "shelf"] = Field(
        default="passkey", description="wording of the task; profile and evaluate must use different ones"
    )


class ProfileSettings(Section):
    """What is measured of every KV group."""

    sequences: Count = Field(default=6, description="calibration sequences")
    length: Length = Field(default=768, description="tokens per sequence")
    rows: Count = Field(default=64, description="query rows per sequence that the attention statistics are taken from")
    candidates: tuple[OperatorSpec, ...] = Field(
        default=(Window(size=128, sinks=4),), min_length=1, description="operators whose damage is measured"
    )
    needles: NeedleSettings = Field(
        default=NeedleSettings(), description="retrieval task on which damage is measured, text and answer"
    )
    retrieval: tuple[NeedleSettings, ...] = Field(
        default=(
            NeedleSettings(cases=4, length=384, template="passkey"),
            NeedleSettings(cases=4, length=768, template="badge"),
        ),
        description="further tasks, of other wordings and lengths, for the retrieval scores",
    )
    gradients: Flag = Field(default=True, description="first-order effects and influence, by one backward pass a case")
    damage: Flag = Field(default=True, description="measure KL and needle loss of each candidate in each KV group")
    transfer_steps: Whole = Field(
        default=20, description="steps in which candidates that learn are fitted to the attention outputs first"
    )
    gates: tuple[Literal["duo", "linvideo"], ...] = Field(
        default=(), description="learned gates to train for the selection methods of these names"
    )
    gate_steps: Count = Field(default=60, description="optimiser steps of a learned gate")
    gate_full: Share = Field(default=0.4, description="share of the groups that LinVideo's constraint keeps full")
    seed: Whole = Field(default=0, description="random seed")

    @classmethod
    def conflicts(cls, fields: Mapping[str, Any]) -> Iterator[Conflict]:
        yield from candidate_conflicts(fields)
        if "rows" in fields and "length" in fields and fields["rows"] > fields["length"]:
            yield ("rows",), f"cannot exceed length ({fields['length']}), not {fields['rows']}"


def candidate_conflicts(fields: Mapping[str, Any]) -> Iterator[Conflict]:
    """Candidates that are none, or that are listed twice."""
    labels = [label(spec) for spec in fields.get("candidates", ())]
    for index, name in enumerate(labels):
        if name == "full":
            yield ("candidates", index), "full attention is what the candidates are compared with, not one of them"
        if name in labels[:index]:
            yield ("candidates", index), f"{name} is listed twice"


# Methods that add up the losses of single conversions and solve the integer program
SOLVED = ("damage", "first_order", "output_error", "moa")
METHODS = Literal[
    "damage", "first_order", "output_error", "moa", "uniform", "interleaved", "random", "greedy", "mass", "duo",
    "linvideo", "restore", "explicit",
]  # fmt: skip


class SelectSettings(Section):
    """Which KV groups are converted to what: as many as `groups`, `layers` or `budgets` ask for, or quality bears."""

    method: METHODS = Field(
        default="damage",
        description="damage: least measured damage, by integer program; first_order, output_error, moa: the same from "
        "another score; others: what is commonly done; explicit: as listed",
    )
    unit: Literal["group", "layer"] = Field(default="group", description="convert single KV groups or whole layers")
    operator: OperatorSpec | None = Field(
        default=None, description="the operator to use; null: any candidate of the profile"
    )
    groups: Share | None = Field(default=None, description="budget: share of all KV groups to convert, 0 to 1")
    layers: Count | None = Field(default=None, description="budget: number of layers to convert")
    budgets: Budgets | None = Field(
        default=None,
        description="budget: the most that may be used, {resource: {length: amount}}; resources are prefill_ms, "
        'decode_ms, flops, kv_bytes; an amount is a number or a share of the original\'s such as "40%"',
    )
    keep_quality: Positive | None = Field(
        default=None, description="highest measured KL in nats per token; the cheapest plan that keeps it is searched"
    )
    needle_weight: AtLeastZero = Field(default=1.0, description="weight of the needle loss beside the KL")
    retrieval_keep: Share | None = Field(
        default=None, description="keep groups with a retrieval score above this; null: off"
    )
    kinds: Count | None = Field(
        default=None, description="most kinds of operator (launches) in a layer; full, window and hybrid are one kind"
    )
    protect: tuple[Whole, ...] = Field(default=(), description="layers that stay full")
    share: tuple[tuple[Whole, ...], ...] = Field(
        default=(), description="sets of layers that take the same operators, e.g. [[4, 5], [6, 7]]"
    )
    rounds: Whole = Field(
        default=0, description="rounds of refinement: measure the whole plan, score anew around it, solve again"
    )
    measure_cases: Count = Field(
        default=4, description="calibration cases that a whole plan is measured on; an encoder needs some twenty"
    )
    explicit: Explicit | None = Field(default=None, description='operators by layer or range of layers: {"4-7": {...}}')
    seed: Whole = Field(default=0, description="random seed of method random")

    @classmethod
    def conflicts(cls, fields: Mapping[str, Any]) -> Iterator[Conflict]:
        if "method" not in fields:
            return
        if fields["method"] == "explicit":
            yield from _explicit_alone(fields)
            return
        yield from _one_budget(fields)
        if fields.get("explicit") is not None:
            yield ("explicit",), f"is only for method explicit, not {fields['method']}"
        if fields.get("layers") is not None and fields.get("unit") == "group":
            yield ("layers",), "counts whole layers: set unit to layer, or use groups as the budget"
        if fields["method"] not in SOLVED:
            for name in ("keep_quality", "rounds"):
                if fields.get(name):
                    yield (name,), f"needs a method that predicts losses: {', '.join(SOLVED)}"
        if fields.get("keep_quality") is not None and fields.get("rounds"):
            yield ("rounds",), "has no meaning with keep_quality, which measures every plan it tries"
        yield from _unshared(fields.get("share", ()))


def _one_budget(fields: Mapping[str, Any]) -> Iterator[Conflict]:
    """Exactly one kind of budget; `keep_quality` may have limits of `budgets` beside it."""
    if fields.get("keep_quality") is None:
        names = ("groups", "layers", "budgets", "keep_quality")
        yield from exactly_one(fields, *names)
        return
    for name in ("groups", "layers"):
        if fields.get(name) is not None:
            yield (name,), "has no meaning with keep_quality, which converts as much as the quality bears"


def _unshared(share: tuple[tuple[int, ...], ...]) -> Iterator[Conflict]:
    """Sets that share nothing, and layers in two of them."""
    seen: set[int] = set()
    for index, layers in enumerate(share):
        if len(layers) < 2:
            yield ("share", index), "must name at least two layers, e.g. [4, 5]"
        for place, layer in enumerate(layers):
            if layer in seen:
                yield ("share", index, place), f"layer {layer} is listed twice"
            seen.add(layer)


def _explicit_alone(fields: Mapping[str, Any]) -> Iterator[Conflict]:
    if "explicit" in fields and not fields["explicit"]:
        yield ("explicit",), 'is missing: say which layers, e.g. {"4-7": {operator: window}}'
    for name in ("groups", "layers", "budgets", "keep_quality", "operator", "kinds", "protect", "share", "rounds"):
        if fields.get(name):
            yield (name,), "has no meaning with method explicit, which lists the layers and their operators"


RESERVED = ("student", "teacher", "key", "done.json")  # arms have folders of their names beside these files


class Arm(Section):
    """Another plan to distill and evaluate beside the one that is exported."""

    name: Name = Field(description="name of the arm in the report")
    select: SelectSettings = Field(description="how its plan is chosen")
    distill: Flag = Field(default=False, description="train it as the exported plan is trained")


class SampleSettings(Section):
    """Sequences that the teacher generates for distillation; an encoder, which cannot, takes calibration text."""

    sequences: Count = Field(default=32, description="number of sequences")
    length: Length = Field(default=1024, description="tokens per sequence, prompt included")
    batch: Count = Field(default=16, description="sequences generated together")
    shard: Count = Field(default=16, description="sequences per file; a finished file is never made again")
    prompts: Literal["text", "bos", "chat"] = Field(
        default="text", description="start from calibration text, from nothing, or from a chat turn"
    )
    prompt_tokens: Count = Field(default=32, description="tokens of text a sequence starts from")
    temperature: AtLeastZero = Field(default=1.0, description="sampling temperature; 0 takes the likeliest token")
    top_p: Annotated[float, Field(strict=True, gt=0, le=1)] = Field(default=1.0, description="nucleus to sample from")
    seed: Whole = Field(default=0, description="random seed")

    @classmethod
    def conflicts(cls, fields: Mapping[str, Any]) -> Iterator[Conflict]:
        if "prompt_tokens" in fields and "length" in fields and fields["prompt_tokens"] >= fields["length"]:
            yield ("prompt_tokens",), f"must be below length ({fields['length']}), not {fields['prompt_tokens']}"


class TransferSettings(Section):
    """Attention transfer: feature maps and gates learn the teacher's attention outputs, all else frozen."""

    steps: Whole = Field(default=0, description="optimiser steps; 0 skips the phase")
    lr: Positive = Field(default=1e-2, description="peak learning rate")
    batch: Count = Field(default=1, description="sequences per step")


class LoraSettings(Section):
    """Low-rank adapters on the converted layers, trained with the KL to the teacher."""

    rank: Count = Field(default=8, description="rank of the adapters")
    alpha: Positive = Field(default=16.0, description="scale of the adapters; their output counts alpha / rank")
    lr: Positive = Field(default=1e-3, description="peak learning rate")
    epochs: Count = Field(default=1, description="passes over the samples")
    batch: Count = Field(default=1, description="sequences per step")
    warmup: Share = Field(default=0.05, description="share of the steps in which the learning rate rises")
    weight_decay: AtLeastZero = Field(default=0.0, description="AdamW weight decay")
    targets: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="module names to adapt; null: all linear layers of converted sites"
    )
    checkpoint_every: Count = Field(default=20, description="steps between checkpoints")
    gradient_checkpointing: Flag = Field(default=True, description="recompute activations instead of keeping them")
    logit_chunk: Count = Field(default=256, description="positions whose logits are held at once")
    clip: Positive = Field(default=1.0, description="largest gradient norm")


class DistillSettings(Section):
    """Recovery of the quality that the conversion cost; null for a phase leaves it out."""

    transfer: TransferSettings | None = Field(default=None, description="attention transfer")
    lora: LoraSettings | None = Field(default=LoraSettings(), description="adapters")
    seed: Whole = Field(default=0, description="random seed")


class SpeedSettings(Section):
    """Teacher and student timed side by side."""

    lengths: tuple[Length, ...] = Field(default=(8192,), min_length=1, description="prefill lengths in tokens")
    repeats: Count = Field(default=3, description="timed repeats")
    decode_tokens: Whole = Field(default=16, description="tokens decoded after each prefill")


class EvaluateSettings(Section):
    """How teacher and student are compared."""

    lengths: tuple[Length, ...] = Field(default=(1024,), min_length=1, description="context lengths in tokens")
    sequences: Count = Field(default=16, description="heldout sequences per length")
    needles: NeedleSettings = Field(
        default=NeedleSettings(cases=64, length=1024, template="locker"), description="retrieval task"
    )
    speed: SpeedSettings | None = Field(default=None, description="timing; null leaves it out")
    batch: Count = Field(default=1, description="sequences per forward pass")
    seed: Whole = Field(default=1, description="random seed")


class Gates(Section):
    """Bounds that the result must meet; a missed one ends the run with exit code 4."""

    kl: AtLength = Field(default={}, description="highest KL to the teacher in nats per token, by length")
    perplexity_ratio: AtLength = Field(default={}, description="highest perplexity over the teacher's, by length")
    cosine: AtLength = Field(
        default={}, description="least mean cosine similarity of an encoder's embeddings to the teacher's, by length"
    )
    retrieval_drop: Share | None = Field(
        default=None, description="largest loss of exact needle answers, as a share of cases"
    )
    kv_ratio: AtLength = Field(default={}, description="most KV cache bytes over the teacher's, by length")
    prefill_speedup: AtLength = Field(default={}, description="least prefill speed over the teacher's, by length")
    converted: Share | None = Field(default=None, description="least share of KV groups converted")


class ExportSettings(Section):
    """How the checkpoint is written."""

    format: Literal["auto", "stock", "remote", "adapter"] = Field(
        default="auto",
        description="stock: no custom code; remote: with its code; adapter: beside the base model; auto: stock where "
        "the plan is one of full and sliding-window layers, else remote",
    )
    dtype: Dtype | None = Field(default=None, description="number type of the saved weights; null: as loaded")
    verify: Flag = Field(default=True, description="reload it in clean processes and compare the logits")

    @classmethod
    def conflicts(cls, fields: Mapping[str, Any]) -> Iterator[Conflict]:
        if fields.get("format") == "adapter" and fields.get("dtype") is not None:
            yield ("dtype",), "an adapter leaves the weights of its base model as they are: take it out"


OPERATOR_FILES = "Python files that define operators of your own, from the recipe's folder"


class Recipe(Section):
    """A conversion from pretrained model to checked checkpoint."""

    kind: ClassVar[Literal["text"]] = "text"  # tells the two kinds of recipe apart
    name: Name = Field(description="name of the recipe: small letters, digits, '.' and '-'")
    description: str = Field(default="", pattern=r"^[^\n]*$", description="one line about it")
    operators: tuple[Path, ...] = Field(default=(), description=OPERATOR_FILES)
    model: ModelSource = Field(description="the pretrained model")
    text: TextSources = Field(description="the text it is calibrated and judged on")
    profile: ProfileSettings = Field(default=ProfileSettings(), description="what is measured")
    select: SelectSettings = Field(default=SelectSettings(groups=0.6), description="what is converted to what")
    compare: tuple[Arm, ...] = Field(default=(), description="further plans to report beside it")
    sample: SampleSettings = Field(default=SampleSettings(), description="what the teacher generates")
    distill: DistillSettings = Field(default=DistillSettings(), description="how quality is recovered")
    evaluate: EvaluateSettings = Field(default=EvaluateSettings(), description="how the result is judged")
    gates: Gates = Field(default=Gates(), description="what it must meet")
    export: ExportSettings = Field(default=ExportSettings(), description="how it is written")

    @classmethod
    def conflicts(cls, fields: Mapping[str, Any]) -> Iterator[Conflict]:
        for where, select in selections_of(fields):
            if "profile" in fields:
                yield from unmeasured(where, select, fields["profile"])
        phases = {"transfer": fields["distill"].transfer, "lora": fields["distill"].lora} if "distill" in fields else {}
        yield from arm_conflicts(fields.get("compare", ()), phases)
        if "gates" in fields and "evaluate" in fields:
            yield from _ungated(fields["gates"], fields["evaluate"])
        if "profile" in fields and "evaluate" in fields:
            template = fields["evaluate"].needles.template
            profiled = (fields["profile"].needles, *fields["profile"].retrieval)
            if template in [task.template for task in profiled]:
                message = f"{template!r} is also what was profiled on; judge retrieval with another wording"
                yield ("evaluate", "needles", "template"), message


def selections_of(fields: Mapping[str, Any]) -> Iterator[tuple[tuple[str | int, ...], SelectSettings]]:
    """Where a recipe chooses, and how: its own selection and those of its arms."""
    if fields.get("select"):
        yield ("select",), fields["select"]
    for index, arm in enumerate(fields.get("compare", ())):
        yield ("compare", index, "select"), arm.select


def arm_conflicts(compare: tuple[Arm, ...], phases: Mapping[str, Any]) -> Iterator[Conflict]:
    """Names that are taken, and arms to be trained with nothing: `phases` are those of the distillation, if valid."""
    names = [*RESERVED, *(arm.name for arm in compare)]
    for index, arm in enumerate(compare):
        if arm.name in names[: index + len(RESERVED)]:
            yield ("compare", index, "name"), f"{arm.name!r} is taken; give each arm a name of its own"
        if arm.distill and phases and not any(phases.values()):
            none = " and ".join(f"distill.{name}" for name in phases)
            yield ("compare", index, "distill"), f"nothing to train with: {none} are null"


def unmeasured(where: tuple[str | int, ...], select: SelectSettings, profile: Any) -> Iterator[Conflict]:
    """What a selection needs and the profile is told not to measure."""
    if select.method in ("damage", "greedy") and not profile.damage:
        named = ".".join(map(str, where))
        yield ("profile", "damage"), f"{named}.method is {select.method}, which must then be measured"
    named = ".".join(map(str, where))
    if select.method in ("duo", "linvideo") and select.method not in profile.gates:
        yield ("profile", "gates"), f"{named}.method is {select.method}, whose gates must then be trained: add it"
    if select.method in ("first_order", "moa") and not profile.gradients:
        yield ("profile", "gradients"), f"{named}.method is {select.method}, which needs them"
    wanted: Spec = select.operator
    if select.method in ("duo", "linvideo") and wanted not in (None, profile.candidates[0]):
        message = f"gates are trained for the first candidate, {label(profile.candidates[0])}"
        yield (*where, "operator"), message
    if select.method in (*SOLVED, "greedy", "mass") and wanted is not None and wanted not in profile.candidates:
        known = ", ".join(label(spec) for spec in profile.candidates)
        yield (*where, "operator"), f"{label(wanted)} is not measured; profile.candidates are {known}"


def _ungated(gates: Gates, evaluate: EvaluateSettings) -> Iterator[Conflict]:
    speed = evaluate.speed.lengths if evaluate.speed else ()
    checks = (
        ("kl", gates.kl, evaluate.lengths, "evaluate.lengths"),
        ("perplexity_ratio", gates.perplexity_ratio, evaluate.lengths, "evaluate.lengths"),
        ("cosine", gates.cosine, evaluate.lengths, "evaluate.lengths"),
        ("prefill_speedup", gates.prefill_speedup, speed, "evaluate.speed.lengths"),
    )
    for name, bounds, measured, source in checks:
        for length in bounds:
            if length not in measured:
                yield ("gates", name, length), f"nothing is measured at {length}: add it to {source}"
