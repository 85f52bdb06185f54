"""Damage: what the model's answers lose when groups are replaced, one at a time or a whole plan at once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.spec import Full, Spec, label
from .files import stored
from .hosts import models
from .hosts.models import Replay
from .hosts.transformers import Conversion, Site, all_full, refusal
from .observation import Learned, Table
from .text import Needles

if TYPE_CHECKING:
    from .progress import Track

MEASURES = ("kl", "needle")
STRIDE = 4  # every 4th position takes part in the measured KL
Group = tuple[int, int]  # site index, KV group
Measure = Callable[[Mapping[Group, Spec]], dict[str, float]]


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher ‖ student) of log-probabilities (…, V), in nats. → (…)"""
    return F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)


def answer_loss(log_probabilities: Tensor, target: Tensor) -> float:
    """Mean negative log-likelihood of the answer's tokens, whose predictions come last."""
    return F.nll_loss(log_probabilities[-len(target) :], target).item()


@contextmanager
def replaced(model: Any, sites: Sequence[Site], chosen: Mapping[Group, Spec], learned: Learned) -> Iterator[Conversion]:
    """Inside, the groups `chosen` run their operators, with what candidates have learned; all others stay full."""
    plan = all_full(sites)
    for (n, g), spec in chosen.items():
        plan[sites[n]][g] = spec
    conversion = Conversion(model, plan)
    try:
        for site in {sites[n] for n, _ in chosen}:
            mine = conversion.sites[site.name]
            for spec, groups in mine.parts:
                source, target = learned.get((site.name, label(spec))), mine.learned(spec)
                if source is not None and target is not None:
                    take_groups(source, target, groups, site.kv_heads)
        yield conversion
    finally:
        conversion.remove()


def take_groups(source: nn.Module, target: nn.Module, groups: Sequence[int], kv_heads: int) -> None:
    """Copies what some KV groups learned: parameters have their heads first, in the order of the groups."""
    with torch.no_grad():
        for name, p in target.named_parameters():
            whole = source.get_parameter(name)
            per = whole.shape[0] // kv_heads
            index = torch.tensor([h for g in groups for h in range(g * per, (g + 1) * per)], device=whole.device)
            p.copy_(whole.index_select(0, index))


@torch.no_grad()
def single_damage(
    model: Any,
    sites: Sequence[Site],
    needles: Needles,
    names: Mapping[str, Spec],
    learned: Learned,
    folder: Path,
    track: Track,
) -> dict[str, Any]:
    """KL and needle loss of every single replacement, a case at a time; a finished case is never measured again."""
    jobs = [(name, n, g) for n, site in enumerate(sites) for name in names for g in range(site.kv_heads)]
    jobs = [(name, n, g) for name, n, g in jobs if refusal(sites[n], names[name]) is None]
    cases = []
    for case, ids in enumerate(needles.ids):
        title = f"damage, case {case + 1} of {len(needles.ids)}"

        def measure(ids: Tensor = ids, answer: Tensor = needles.answer[case], title: str = title) -> dict[str, Any]:
            return _damage_of_case(model, sites, ids[None], answer, names, learned, track(jobs, title))

        cases.append(stored(folder / f"damage-{case:03d}.json", measure))
    rows = torch.tensor([[[m["kl"], m["needle"]] for m in case["jobs"]] for case in cases]).double()
    damage = {name: {m: [[None] * s.kv_heads for s in sites] for m in MEASURES} for name in names}
    for (name, n, g), row in zip(jobs, rows.mean(0).tolist(), strict=True):
        damage[name]["kl"][n][g], damage[name]["needle"][n][g] = row
    teacher = {"needle_nll": sum(case["teacher"] for case in cases) / len(cases)}
    return {"damage": damage, "teacher": teacher}


def _damage_of_case(
    model: Any,
    sites: Sequence[Site],
    ids: Tensor,
    answer: Tensor,
    names: Mapping[str, Spec],
    learned: Learned,
    jobs: Any,
    around: Mapping[Group, Spec] | None = None,
) -> dict[str, Any]:
    """KL to the teacher and rise of the answer's loss for every job, the groups of `around` being replaced as well."""
    ids, answer = ids.to(model.device), answer.to(model.device)
    at = measured_positions(answer)
    chosen = dict(around or {})
    with replaced(model, sites, {}, learned):
        want = models.logits_at(model, ids, at)[0].float().log_softmax(-1)
    target = ids[0, answer]
    base = answer_loss(want, target)
    replay = Replay(model, sites)
    with replaced(model, sites, chosen, learned), replay.record():
        whole = models.logits_at(model, ids, at)[0].float().log_softmax(-1)
    joint = {"kl": kl(want, whole).mean().item(), "needle": answer_loss(whole, target) - base}
    rows = []
    for name, n, group in jobs:
        with replaced(model, sites, {**chosen, (n, group): names[name]}, learned), replay.start(n):
            got = models.logits_at(model, ids, at)[0].float().log_softmax(-1)
        rows.append({"kl": kl(want, got).mean().item(), "needle": answer_loss(got, target) - base})
    return {"teacher": base, "joint": joint, "jobs": rows}


def marginal_damage(
    model: Any,
    sites: Sequence[Site],
    needles: Needles,
    names: Mapping[str, Spec],
    learned: Learned,
    around: Mapping[Group, Spec],
    folder: Path,
    track: Track,
) -> dict[str, Table]:
    """What each group's operator adds to the damage of the plan `around`, against the same plan with that group full.

    As `Profile.damage`; the marginal damages around an incumbent, which single damages are only a guess of: KL adds up
    to less, retrieval loss to more.
    """
    every = {label(Full()): Full(), **names}
    options = [
        (name, n, g)
        for n, site in enumerate(sites)
        for g in range(site.kv_heads)
        for name, spec in every.items()
        if refusal(site, spec) is None
    ]
    jobs = [job for job in options if every[job[0]] != around.get(job[1:], Full())]
    key = plan_key(around)
    cases = []
    for case, ids in enumerate(needles.ids):
        title = f"re-scoring, case {case + 1} of {len(needles.ids)}"

        def measure(ids: Tensor = ids, answer: Tensor = needles.answer[case], title: str = title) -> dict[str, Any]:
            with torch.no_grad():
                return _damage_of_case(
                    model, sites, ids[None], answer, every, learned, track(jobs, title), dict(around)
                )

        cases.append(stored(folder / f"marginal-{key}-{case:03d}.json", measure))
    means = {m: [sum(case["jobs"][i][m] for case in cases) / len(cases) for i in range(len(jobs))] for m in MEASURES}
    joint = {m: sum(case["joint"][m] for case in cases) / len(cases) for m in MEASURES}
    found = {m: dict.fromkeys(options, joint[m]) | dict(zip(jobs, means[m], strict=True)) for m in MEASURES}
    table: dict[str, Table] = {name: {m: [[None] * s.kv_heads for s in sites] for m in MEASURES} for name in names}
    for name, n, g in options:
        for m in MEASURES if name in names else ():
            table[name][m][n][g] = found[m][name, n, g] - found[m][label(Full()), n, g]
    return table


def plan_key(chosen: Mapping[Group, Spec]) -> str:
    """A short name of what a plan converts to what."""
    converted = sorted((n, g, label(s)) for (n, g), s in chosen.items() if s != Full())
    return hashlib.sha256(json.dumps(converted).encode()).hexdigest()[:16]


def measured_positions(answer: Tensor) -> Tensor:
    """Every STRIDE-th position before the answer (A,), and those that predict it."""
    return torch.cat([torch.arange(STRIDE, int(answer[0]) - 1, STRIDE, device=answer.device), answer - 1])


class Joint:
    """Measures whole plans on needle cases: a `Measure`. Results stay in `folder`, so that none is measured twice.

    The teacher's log-probabilities are kept in main memory: cases × a quarter of the positions × vocabulary, in fp32.
    """

    def __init__(
        self, model: Any, sites: Sequence[Site], needles: Needles, learned: Learned, folder: Path, track: Track
    ) -> None:
        self.model, self.sites, self.needles = model, sites, needles
        self.learned, self.folder, self.track = learned, folder, track
        self.teacher: list[Tensor] = []
        self.count = 0

    def __call__(self, chosen: Mapping[Group, Spec]) -> dict[str, float]:
        """{"kl": nats per token, "needle": rise of the answer's loss in nats per token} of the plan."""
        path = self.folder / f"joint-{plan_key(chosen)}.json"
        self.count += not path.exists()
        converted = {group: spec for group, spec in chosen.items() if spec != Full()}
        found: dict[str, float] = stored(path, lambda: self._measure(converted))
        return found

    @torch.no_grad()
    def _measure(self, chosen: Mapping[Group, Spec]) -> dict[str, float]:
        if not self.teacher:
            with replaced(self.model, self.sites, {}, self.learned):
                cases = self.track(range(len(self.needles.ids)), "teacher's answers")
                self.teacher = [self._logits(n).cpu() for n in cases]
        total = {"kl": 0.0, "needle": 0.0}
        with replaced(self.model, self.sites, chosen, self.learned):
            for n, want in enumerate(self.track(self.teacher, f"joint damage {self.count}")):
                got = self._logits(n)
                want = want.to(got.device)
                target = self.needles.ids[n, self.needles.answer[n]].to(got.device)
                total["kl"] += kl(want, got).mean().item()
                total["needle"] += answer_loss(got, target) - answer_loss(want, target)
        return {name: value / len(self.teacher) for name, value in total.items()}

    def _logits(self, case: int) -> Tensor:
        ids = self.needles.ids[case][None].to(self.model.device)
        at = measured_positions(self.needles.answer[case].to(self.model.device))
        return models.logits_at(self.model, ids, at)[0].float().log_softmax(-1)
