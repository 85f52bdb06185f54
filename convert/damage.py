"""Damage: what the model's answers lose when groups are replaced, one at a time or a whole plan at once."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..kernels.spec import Full, Spec, label, whole_site
from .files import stored
from .hosts import surgery
from .hosts.models import Replay
from .hosts.sites import Conversion, Site, all_full, refusal
from .observation import Learned, Table
from .text import Cases

if TYPE_CHECKING:
    from .progress import Track

MEASURES = ("kl", "needle")
SURE = 2.0  # standard errors by which a needle loss must stand out
Group = tuple[int, int]  # site index, KV group
WHOLE = -1  # in the place of a KV group: all of the site
Job = tuple[str, int, int]  # candidate, site index, KV group or WHOLE
Measure = Callable[[Mapping[Group, Spec]], dict[str, float]]


def joint_loss(found: Mapping[str, float], weight: float) -> float:
    """KL plus the weighted rise of the answer's loss: what a selection lowers. Below 0 is noise, and counts as 0.

    The rise counts as far as it is above what the cases differ by (`needle_error`, twice): a few answer tokens per case
    make it ten times as noisy as the KL, and where retrieval is lost it is far above.
    """
    rise = found["needle"] - SURE * (found.get("needle_error") or 0.0)
    return max(found["kl"], 0.0) + weight * max(rise, 0.0)


def summed_up(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of cases, and the standard error of the needle loss (0 where one case is all)."""
    found = {m: _mean(row[m] for row in rows) for m in MEASURES}
    needles = [row["needle"] for row in rows]
    error = statistics.stdev(needles) / len(needles) ** 0.5 if len(needles) > 1 else 0.0
    return {**found, "needle_error": error}


@contextmanager
def replaced(model: Any, sites: Sequence[Site], chosen: Mapping[Group, Spec], learned: Learned) -> Iterator[Conversion]:
    """Inside, the groups `chosen` run their operators, with what candidates have learned; all others stay full."""
    plan = all_full(sites)
    for (n, g), spec in chosen.items():
        plan[sites[n]][g] = spec
    with surgery.converted(model, plan) as conversion:
        for site in {sites[n] for n, _ in chosen}:
            mine = conversion.sites[site.name]
            for spec, groups in mine.parts:
                source, target = learned.get((site.name, label(spec))), mine.learned(spec)
                if source is not None and target is not None:
                    take_groups(source, target, groups, site.kv_heads)
        yield conversion


def take_groups(source: nn.Module, target: nn.Module, groups: Sequence[int], kv_heads: int) -> None:
    """Copies what some KV groups learned: parameters have their heads first, in the order of the groups."""
    if len(groups) == kv_heads:
        target.load_state_dict(source.state_dict())
        return
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
    needles: Cases,
    names: Mapping[str, Spec],
    learned: Learned,
    folder: Path,
    track: Track,
) -> dict[str, Any]:
    """KL and needle loss of every single replacement, a case at a time; a finished case is never measured again."""
    jobs = _jobs(sites, names)
    cases = _cases(model, sites, needles, names, learned, jobs, {}, folder / "damage", track)
    damage = _empty(names, sites)
    for n_job, (name, n, g) in enumerate(jobs):
        _spread(damage[name], sites, n, g, summed_up([case["jobs"][n_job] for case in cases]))
    return {"damage": damage, "teacher": {"needle_nll": _mean(case["teacher"] for case in cases)}}


@torch.no_grad()
def marginal_damage(
    model: Any,
    sites: Sequence[Site],
    needles: Cases,
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
    options = _jobs(sites, every)

    def kept(job: Job) -> bool:
        name, n, g = job
        return all(around.get(group, Full()) == every[name] for group in _groups(sites, n, g))

    jobs = [job for job in options if not kept(job)]
    place = folder / f"marginal-{plan_key(around)}"
    cases = _cases(model, sites, needles, every, learned, jobs, around, place, track)
    table = _empty(names, sites)
    found = [
        dict.fromkeys(options, case["joint"])
        | dict(zip(jobs, case["jobs"], strict=True))  # the rest is as the plan has it
        for case in cases
    ]
    for name, n, g in options:
        if name in names:
            rises = [{m: case[name, n, g][m] - case[label(Full()), n, g][m] for m in MEASURES} for case in found]
            _spread(table[name], sites, n, g, summed_up(rises))
    return table


def _jobs(sites: Sequence[Site], names: Mapping[str, Spec]) -> list[Job]:
    """What is measured of each site: its groups with every candidate, or where one needs the whole site, that."""
    found: list[Job] = []
    for n, site in enumerate(sites):
        fitting = [name for name, spec in names.items() if refusal(site, spec) is None]
        whole = any(whole_site(names[name]) for name in fitting)
        found += [(name, n, g) for name in fitting for g in ([WHOLE] if whole else range(site.kv_heads))]
    return found


def _groups(sites: Sequence[Site], n: int, g: int) -> list[Group]:
    return [(n, x) for x in range(sites[n].kv_heads)] if g == WHOLE else [(n, g)]


def _spread(table: Table, sites: Sequence[Site], n: int, g: int, found: Mapping[str, float]) -> None:
    """Puts what was measured in its cell; of a whole site, an equal part in each group's."""
    groups = _groups(sites, n, g)
    for m, value in found.items():
        for _, group in groups:
            table[m][n][group] = value / len(groups)


def _empty(names: Iterable[str], sites: Sequence[Site]) -> dict[str, Table]:
    return {name: {m: [[None] * s.kv_heads for s in sites] for m in (*MEASURES, "needle_error")} for name in names}


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def _cases(
    model: Any,
    sites: Sequence[Site],
    needles: Cases,
    names: Mapping[str, Spec],
    learned: Learned,
    jobs: Sequence[Job],
    around: Mapping[Group, Spec],
    place: Path,
    track: Track,
) -> list[dict[str, Any]]:
    """Every case of the jobs; one that is finished stays in `place`-000.json and so on."""
    title = f"{'re-scoring' if around else 'damage'}, case {{}} of {len(needles)}"
    return [
        stored(
            place.with_name(f"{place.name}-{case:03d}.json"),
            lambda case=case: _damage_of_case(  # type: ignore[misc]
                model, sites, needles, case, names, learned, track(jobs, title.format(case + 1)), around
            ),
        )
        for case in range(len(needles))
    ]


def _damage_of_case(
    model: Any,
    sites: Sequence[Site],
    needles: Cases,
    case: int,
    names: Mapping[str, Spec],
    learned: Learned,
    jobs: Iterable[Job],
    around: Mapping[Group, Spec],
) -> dict[str, Any]:
    """KL to the teacher and rise of the answer's loss for every job, the groups of `around` being replaced as well."""
    replay = Replay(model, sites)
    with replaced(model, sites, {}, learned), replay.record():
        want = needles.answers(model, case)
    whole = want
    if around:
        with replaced(model, sites, around, learned), replay.record():
            whole = needles.answers(model, case)
    rows = []
    for name, n, group in jobs:
        chosen = {**around, **dict.fromkeys(_groups(sites, n, group), names[name])}
        with replaced(model, sites, chosen, learned), replay.start(n):
            rows.append(needles.compared(case, want, needles.answers(model, case)))
    return {"teacher": needles.answer_loss(case, want), "joint": needles.compared(case, want, whole), "jobs": rows}


def plan_key(chosen: Mapping[Group, Spec]) -> str:
    """A short name of what a plan converts to what."""
    converted = sorted((n, g, label(s)) for (n, g), s in chosen.items() if s != Full())
    return hashlib.sha256(json.dumps(converted).encode()).hexdigest()[:16]


class Joint:
    """Measures whole plans on needle cases: a `Measure`. Results stay in `folder`, so that none is measured twice.

    The teacher's log-probabilities are kept in main memory: cases × a quarter of the positions × vocabulary, in fp32.
    """

    def __init__(
        self, model: Any, sites: Sequence[Site], needles: Cases, learned: Learned, folder: Path, track: Track
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
                cases = self.track(range(len(self.needles)), "teacher's answers")
                self.teacher = [self.needles.answers(self.model, n).cpu() for n in cases]
        rows = []
        with replaced(self.model, self.sites, chosen, self.learned):
            for n, want in enumerate(self.track(self.teacher, f"joint damage {self.count}")):
                got = self.needles.answers(self.model, n)
                rows.append(self.needles.compared(n, want.to(got.device), got))
        return summed_up(rows)
