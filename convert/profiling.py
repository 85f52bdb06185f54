"""Profile: what each head attends to, and what each group would lose with each candidate operator.

One pass over calibration text gives the cheap statistics of every head. Damage is measured: with one KV group of one
site replaced, the rest of the model runs again from there and its logits are compared with the teacher's.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import operators
from ..kernels.call import Call, grouped, logits
from ..kernels.spec import Full, Spec, Window, label, spec_to_dict
from .files import stored
from .hosts import models
from .hosts.models import Replay
from .hosts.transformers import Conversion, Site, SiteOperators, all_full, refusal
from .text import Needles

if TYPE_CHECKING:
    from .progress import Track

STRIDE = 4  # every 4th position takes part in the measured KL
Table = dict[str, list[list[Any]]]  # numbers, or None where a candidate does not apply


@dataclasses.dataclass(frozen=True)
class Profile:
    """What was measured. Tables are [site][query head]; `damage[candidate][measure]` is [site][KV group].

    entropy is in nats; masses, retrieval and output_error are shares; kl is nats per token; needle is the rise of the
    negative log-likelihood of the answer, in nats per token.
    """

    sites: tuple[Site, ...]
    candidates: Mapping[str, Spec]
    statistics: Table
    output_error: Table
    damage: dict[str, Table]
    teacher: dict[str, float]
    data: dict[str, Any]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it back."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        sites = [dataclasses.asdict(site) | {"head_dim": site.dim} for site in self.sites]
        candidates = {name: spec_to_dict(spec) for name, spec in self.candidates.items()}
        return {"schema": 1, **fields, "sites": sites, "candidates": candidates}

    @staticmethod
    def from_json(given: Mapping[str, Any]) -> Profile:
        """The inverse of `to_json`."""
        from ..kernels.spec import spec_from_dict

        fields = {f.name: given[f.name] for f in dataclasses.fields(Profile)}
        fields["sites"] = tuple(Site(**{k: v for k, v in s.items() if k != "head_dim"}) for s in given["sites"])
        fields["candidates"] = {name: spec_from_dict(spec) for name, spec in given["candidates"].items()}
        return Profile(**fields)


@torch.no_grad()
def profile(
    model: Any,
    sites: Sequence[Site],
    texts: Tensor,
    needles: Needles,
    candidates: Sequence[Spec],
    *,
    rows: int,
    damage: bool,
    folder: Path,
    track: Track,
    data: dict[str, Any] | None = None,
) -> Profile:
    """Measure every group of the model; partial results stay in `folder`, so that an interrupted profile continues.

    Args:
        texts: (n, S) calibration tokens; needles: cases of one template, whose text also serves the measured KL;
        rows: query rows sampled per sequence for the statistics.
    """
    start = time.perf_counter()
    names = {label(spec): spec for spec in candidates}
    installed = Conversion(model, all_full(sites))
    try:
        found = stored(
            folder / "statistics.json", lambda: _statistics(model, installed, sites, texts, names, rows, track)
        )
        retrieval = stored(folder / "retrieval.json", lambda: _retrieval(model, installed, sites, needles, track))
    finally:
        installed.remove()
    measured: dict[str, Any] = {"damage": {}, "teacher": {}}
    if damage:
        measured = _damage(model, sites, needles, names, folder, track)
    statistics = {**found["statistics"], "retrieval": retrieval}
    seconds = time.perf_counter() - start
    return Profile(
        tuple(sites),
        names,
        statistics,
        found["output_error"],
        measured["damage"],
        measured["teacher"],
        data or {},
        seconds,
    )


class _Means:
    """Running means of per-head tensors, by name and site."""

    def __init__(self) -> None:
        self.sums: dict[str, dict[str, Tensor]] = {}
        self.counts: dict[tuple[str, str], int] = {}

    def add(self, name: str, site: str, value: Tensor) -> None:
        row = self.sums.setdefault(name, {})
        row[site] = row.get(site, torch.zeros_like(value, dtype=torch.float64)) + value.double()
        self.counts[name, site] = self.counts.get((name, site), 0) + 1

    def table(self, name: str, sites: Sequence[Site]) -> list[list[Any]]:
        """[site][head]; null where nothing was added, for a candidate that the site cannot take."""
        row = self.sums[name]
        return [
            (row[s.name] / self.counts[name, s.name]).tolist() if s.name in row else [None] * s.heads for s in sites
        ]


def probabilities(q: Tensor, k: Tensor, call: Call, at: Tensor) -> Tensor:
    """Attention of the rows `at` (R,) over all earlier tokens. q (B, H, S, D), k (B, Hk, S, D) → (B, H, R, S)"""
    s = logits(grouped(q, k.shape[1])[..., at, :], k[:, :, None], call).flatten(1, 2)
    i = torch.arange(k.shape[2], device=q.device)
    allowed = i <= at[:, None]
    if call.limit is not None:
        allowed = allowed & (i > at[:, None] - call.limit)
    s = s.masked_fill(~allowed, -torch.inf)
    if call.sink_logits is None:
        return s.softmax(-1)
    sink = call.sink_logits.to(s.dtype).view(1, -1, 1, 1).expand(*s.shape[:3], 1)  # takes part, and has no value
    return torch.cat([s, sink], -1).softmax(-1)[..., :-1]


def _statistics(
    model: Any,
    installed: Conversion,
    sites: Sequence[Site],
    texts: Tensor,
    names: Mapping[str, Spec],
    rows: int,
    track: Track,
) -> dict[str, Any]:
    means = _Means()
    window = next((s.size for s in names.values() if isinstance(s, Window)), 128)
    learned = {
        (name, site.name): _untrained(spec, site, model.device) for name, spec in names.items() for site in sites
    }

    def observe(site: SiteOperators, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        name, length = site.site.name, q.shape[2]
        at = torch.linspace(length // 4, length - 1, min(rows, length), device=q.device).long()
        p = probabilities(q, k, call, at)  # (B, H, R, S)
        distance = at[:, None] - torch.arange(length, device=q.device)
        means.add("entropy", name, -(p * p.clamp_min(1e-20).log()).sum(-1).mean((0, 2)))
        means.add("local_mass", name, (p * (distance < window)).sum(-1).mean((0, 2)))
        means.add("sink_mass", name, p[..., :4].sum(-1).mean((0, 2)))
        o, _ = operators.attend(Full(), q, k, v, call)
        power = o.float().square().sum(-1).mean((0, 2))  # (H,)
        for label_, spec in names.items():
            if refusal(site.site, spec):
                continue
            got, _ = operators.attend(spec, q, k, v, call, None, learned[label_, name])
            means.add(label_, name, (got - o).float().square().sum(-1).mean((0, 2)) / power.clamp_min(1e-20))
        return o

    with installed.observe(observe):
        for ids in track(texts.split(1), "statistics"):
            model(ids.to(model.device), use_cache=False, **models.last_logits(model))
    tables = {name: means.table(name, sites) for name in ("entropy", "local_mass", "sink_mass")}
    return {"statistics": tables, "output_error": {name: means.table(name, sites) for name in names}}


def _untrained(spec: Spec, site: Site, device: Any) -> Any:
    """What an operator learns, as it starts."""
    learned = operators.of(spec).parameters(spec, site.heads, site.kv_heads, site.dim)
    return None if learned is None else learned.to(device)


def _retrieval(
    model: Any, installed: Conversion, sites: Sequence[Site], needles: Needles, track: Track
) -> list[list[Any]]:
    """Share of attention that goes, while an answer token is predicted, to that token in the text."""
    means = _Means()
    here: dict[str, Tensor] = {}

    def observe(site: SiteOperators, q: Tensor, k: Tensor, v: Tensor, call: Call) -> None:
        p = probabilities(q, k, call, here["answer"] - 1)  # (1, H, A, S)
        means.add(
            "retrieval", site.site.name, p[0].gather(-1, here["needle"].expand(p.shape[1], -1)[..., None]).mean((1, 2))
        )

    with installed.observe(observe):
        for n, ids in enumerate(track(needles.ids, "retrieval heads")):
            here.update(answer=needles.answer[n].to(model.device), needle=needles.needle[n].to(model.device))
            model(ids[None].to(model.device), use_cache=False, **models.last_logits(model))
    return means.table("retrieval", sites)


def _damage(
    model: Any, sites: Sequence[Site], needles: Needles, names: Mapping[str, Spec], folder: Path, track: Track
) -> dict[str, Any]:
    """KL and needle loss of every single replacement, a case at a time; a finished case is never measured again."""
    jobs = [(name, n, g) for n, site in enumerate(sites) for name in names for g in range(site.kv_heads)]
    jobs = [(name, n, g) for name, n, g in jobs if refusal(sites[n], names[name]) is None]
    cases = []
    for case, ids in enumerate(needles.ids):
        title = f"damage, case {case + 1} of {len(needles.ids)}"

        def measure(ids: Tensor = ids, answer: Tensor = needles.answer[case], title: str = title) -> dict[str, Any]:
            return _damage_of_case(model, sites, ids[None], answer, names, track(jobs, title))

        cases.append(stored(folder / f"damage-{case:03d}.json", measure))
    mean = torch.tensor([[[m["kl"], m["needle"]] for m in case["jobs"]] for case in cases]).double().mean(0)
    damage = {name: {m: [[None] * s.kv_heads for s in sites] for m in ("kl", "needle")} for name in names}
    for (name, n, g), row in zip(jobs, mean.tolist(), strict=True):
        damage[name]["kl"][n][g], damage[name]["needle"][n][g] = row
    teacher = {"needle_nll": sum(case["teacher"] for case in cases) / len(cases)}
    return {"damage": damage, "teacher": teacher}


def _damage_of_case(
    model: Any, sites: Sequence[Site], ids: Tensor, answer: Tensor, names: Mapping[str, Spec], jobs: Any
) -> dict[str, Any]:
    ids, answer = ids.to(model.device), answer.to(model.device)
    at = torch.cat([torch.arange(STRIDE, int(answer[0]) - 1, STRIDE, device=ids.device), answer - 1])
    replay = Replay(model, sites)
    with replay.record():
        want = models.logits_at(model, ids, at)[0].float().log_softmax(-1)
    target = ids[0, answer]
    base = _answer_loss(want, target)
    rows = []
    for name, n, group in jobs:
        site = sites[n]
        specs = [names[name] if g == group else Full() for g in range(site.kv_heads)]
        conversion = Conversion(model, all_full(sites) | {site: specs})
        try:
            with replay.start(n):
                got = models.logits_at(model, ids, at)[0].float().log_softmax(-1)
        finally:
            conversion.remove()
        rows.append({"kl": kl(want, got).mean().item(), "needle": _answer_loss(got, target) - base})
    return {"teacher": base, "jobs": rows}


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher ‖ student) of log-probabilities (…, V), in nats. → (…)"""
    return F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)


def _answer_loss(log_probabilities: Tensor, target: Tensor) -> float:
    return F.nll_loss(log_probabilities[-len(target) :], target).item()
