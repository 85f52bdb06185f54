"""Profile: what each head attends to, and what each group would lose with each candidate operator.

In two tiers. One pass over calibration text gives statistics of every head and the error of every candidate. Then, for
text with a needle in it: the first-order effect of every candidate from one backward pass, and its damage, measured:
with one KV group of one site replaced, the rest of the model runs again from there and its logits are compared with the
teacher's.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..kernels import operators
from ..kernels.spec import Spec, label, spec_from_dict, spec_to_dict
from .damage import single_damage
from .errors import UsageError
from .files import stored
from .gradients import first_order
from .hosts.sites import Site
from .observation import Learned, Table, retrieval_scores, text_statistics
from .text import Cases, Needles, Samples

if TYPE_CHECKING:
    from .progress import Track

SCHEMA = 3


@dataclasses.dataclass(frozen=True)
class Profile:
    """What was measured. Tables are [site][query head], or [site][KV group] in `damage` and `gates`; a cell is None
    where a candidate does not apply, or where the head's own output is constant or not finite (see `problems`).

    Attributes:
        statistics: entropy in nats; local_mass, sink_mass, pooled_recall and, of language models, retrieval: shares of
            attention; density_90 and density_95: share of the visible blocks that holds so much of it; variation: of
            the first candidate's output error across inputs, standard deviation over mean.
        output_error: ‖ô − o‖² over the variance of o (the RSE of DiTFastAttnV2), per candidate.
        output_change: ‖ô − o‖² over that of the layer's whole attention output, per candidate.
        mass_lost: attention on tokens that a candidate does not read by softmax; None for linear attention.
        first_order, first_order_needle: |⟨ô − o, ∂L/∂o⟩| of the text's and of the answer's loss, in nats.
        influence: MoA's effect of masking entries, {"block": tokens, "table": [site][head][distance in blocks]}.
        damage: per candidate "kl", nats per token, "needle", the rise of the answer's loss in nats per token, and
            "needle_error", its standard error over the cases.
        curves: mass that the best blocks of a row hold: {"block", "fractions", "recall": [site][head][fraction]}.
        similarity: [site][site], how much of their attention two layers spend on the same blocks, 0 to 1.
        bands: statistics, output_error, output_change and mass_lost by part of the sampler's steps; empty for text.
        gates: learned ones by method, "duo" and "linvideo": 1 = wants full attention.
    """

    sites: tuple[Site, ...]
    candidates: Mapping[str, Spec]
    statistics: Table
    output_error: Table
    output_change: Table
    mass_lost: Table
    first_order: Table
    first_order_needle: Table
    influence: dict[str, Any] | None
    damage: dict[str, Table]
    curves: dict[str, Any]
    similarity: list[list[float]]
    bands: dict[str, Any]
    gates: Table
    problems: list[str]
    teacher: dict[str, float]
    data: dict[str, Any]
    seconds: float

    @property
    def causal(self) -> bool:
        """Whether the model decodes; an encoder's rows read in both directions."""
        return all(site.causal for site in self.sites)

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it back."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        sites = [dataclasses.asdict(site) | {"head_dim": site.dim} for site in self.sites]
        candidates = {name: spec_to_dict(spec) for name, spec in self.candidates.items()}
        return {"schema": SCHEMA, **fields, "sites": sites, "candidates": candidates}

    @staticmethod
    def from_json(given: Mapping[str, Any]) -> Profile:
        """The inverse of `to_json`.

        Raises:
            UsageError: it was written by another version.
        """
        if given.get("schema") != SCHEMA:
            raise UsageError(
                f"this profile has format {given.get('schema')}, this attnconvert reads {SCHEMA}: run "
                "`attnconvert profile` again"
            )
        fields = {f.name: given[f.name] for f in dataclasses.fields(Profile)}
        fields["sites"] = tuple(Site(**{k: v for k, v in s.items() if k != "head_dim"}) for s in given["sites"])
        fields["candidates"] = {name: spec_from_dict(spec) for name, spec in given["candidates"].items()}
        return Profile(**fields)


def profile(
    model: Any,
    sites: Sequence[Site],
    texts: Tensor | Samples,
    needles: Cases,
    candidates: Sequence[Spec],
    *,
    rows: int,
    damage: bool,
    folder: Path,
    track: Track,
    gradients: bool = True,
    retrieval: Sequence[Needles] = (),
    learned: Learned | None = None,
    data: dict[str, Any] | None = None,
) -> Profile:
    """Measure every group of the model; partial results stay in `folder`, so that an interrupted profile continues.

    Args:
        texts: (n, S) calibration tokens; needles: cases of one template, whose text also serves the measured KL, or
            for an encoder passages;
        rows: query rows sampled per sequence for the statistics; retrieval: further needle tasks for the retrieval
            scores; learned: what candidates with parameters have learned, untrained where missing.
    """
    start = time.perf_counter()
    names = {label(spec): spec for spec in candidates}
    known = untrained(sites, names, model.device) | dict(learned or {})
    found = stored(folder / "statistics.json", lambda: text_statistics(model, sites, texts, names, rows, known, track))
    tasks: list[Needles] = [needles, *retrieval] if isinstance(needles, Needles) else []
    asked = {}
    if tasks:
        scores = stored(folder / "retrieval.json", lambda: retrieval_scores(model, sites, tasks, track))
        asked = {"retrieval": scores}
    effects: dict[str, Any] = {"first_order": {}, "first_order_needle": {}, "influence": None}
    if gradients:
        effects = stored(
            folder / "gradients.json", lambda: first_order(model, sites, needles, names, rows, known, track)
        )
    measured: dict[str, Any] = {"damage": {}, "teacher": {}}
    if damage:
        measured = single_damage(model, sites, needles, names, known, folder, track)
    return Profile(
        sites=tuple(sites),
        candidates=names,
        statistics={**found["statistics"], **asked},
        **{
            name: found[name]
            for name in ("output_error", "output_change", "mass_lost", "curves", "similarity", "bands", "problems")
        },
        **effects,
        damage=measured["damage"],
        teacher=measured["teacher"],
        gates={},
        data=data or {},
        seconds=time.perf_counter() - start,
    )


def untrained(sites: Sequence[Site], names: Mapping[str, Spec], device: Any) -> dict[tuple[str, str], nn.Module]:
    """What candidates learn, as it starts."""
    made: dict[tuple[str, str], nn.Module] = {}
    for site in sites:
        for name, spec in names.items():
            module = operators.of(spec).parameters(spec, site.heads, site.kv_heads, site.dim)
            if module is not None:
                made[site.name, name] = module.to(device).requires_grad_(False)
    return made
