"""The study behind docs/selection.md: every statistic and every selector, on SmolLM2, side by side.

    make study                          everything; continues where it stopped
    python docs/benchmarks/selection.py --seeds 1 --cases 10 --out runs/study-small --results /tmp/selection.json

For each seed the model is profiled afresh (other calibration text, other needles, other gates). Each selector then
makes a plan for each budget, and every distinct plan is judged on held-out text of two domains with needle templates
that no profile has seen. Writes selection.json beside this file and the tables of docs/selection.md.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import selection_tables
import torch
from scipy.stats import spearmanr

from attnconvert import pipeline
from attnconvert.convert.damage import Group, kl, log_probabilities, measured_positions, plan_key, replaced
from attnconvert.convert.files import stored, write_json
from attnconvert.convert.machine import hardware, versions
from attnconvert.convert.profiling import Profile
from attnconvert.convert.progress import Track, rich_track
from attnconvert.convert.recipe import SelectSettings, load_recipe
from attnconvert.convert.recipe_inputs import TextSource
from attnconvert.convert.refinement import chosen_groups
from attnconvert.convert.runs import Run
from attnconvert.convert.sources import read_texts
from attnconvert.convert.text import Needles, needles
from attnconvert.distill.work import Work
from attnconvert.kernels.spec import Spec, label

HERE = Path(__file__).parent
RESULTS = HERE / "selection.json"
RECIPE = HERE / "selection-study.yaml"
DOMAINS = ("speeches", "code")
BUDGETS = (0.6, 0.75)  # share of the KV groups that is converted
TEMPLATES = ("account", "train", "shelf")  # one per seed; none of them is profiled on
LENGTH = 640
CODE = {"package": {"name": "networkx", "version": "3.6.1", "files": ["networkx/algorithms/**/*.py"]}}
LEARNING = "[{operator: linear}, {operator: hybrid, window: 64, sinks: 4}]"
METHODS: dict[str, dict[str, Any]] = {
    "damage, refined": {"method": "damage", "rounds": 1, "measure_cases": 2},
    "damage": {"method": "damage"},
    "damage, KL alone": {"method": "damage", "needle_weight": 0.0},
    "greedy": {"method": "greedy"},
    "restore": {"method": "restore", "measure_cases": 1},
    "first_order": {"method": "first_order"},
    "output_error": {"method": "output_error"},
    "mass": {"method": "mass"},
    "moa": {"method": "moa"},
    "duo": {"method": "duo"},
    "linvideo": {"method": "linvideo"},
    "interleaved": {"method": "interleaved"},
    "uniform": {"method": "uniform"},
    "random": {"method": "random"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cases", type=int, default=17, help="needle cases per seed and domain")
    parser.add_argument("--domains", nargs="*", default=list(DOMAINS), choices=DOMAINS)
    parser.add_argument("--no-learning", action="store_true", help="leave out the candidates that learn")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--out", type=Path, default=HERE.parent.parent / "runs" / "study")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    track = rich_track()
    rows: list[dict[str, Any]] = []
    statistics: list[dict[str, Any]] = []
    first: Work | None = None
    for seed in range(given.seeds):
        work, found, judged = one_seed(seed, given.out, given.methods, given.domains, given.cases, first, track)
        first = first or work
        statistics += found
        rows += judged
    assert first is not None
    if not given.no_learning:
        statistics += correlations(learning(given.out, first, track), 0)
    document = {
        "schema": 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "make study",
        "machine": hardware(),
        "versions": versions(),
        "data": {"cases": given.cases, "length": LENGTH, "templates": TEMPLATES[: given.seeds], "seeds": given.seeds},
        "statistics": statistics,
        "selectors": rows,
    }
    write_json(given.results, document)
    if given.results == RESULTS:
        selection_tables.write(document)


def one_seed(
    seed: int,
    out: Path,
    methods: Sequence[str],
    domains: Sequence[str],
    cases: int,
    other: Work | None,
    track: Track,
) -> tuple[Work, list[dict[str, Any]], list[dict[str, Any]]]:
    """Correlations of a fresh profile, and what every method's plans come to; `other` has the model already."""
    recipe = load_recipe(RECIPE, [f"profile.seed={seed}", f"select.seed={seed}"])
    work = Work(Run.create(recipe, out / f"seed-{seed}"), track)
    if other is not None:  # one model in memory
        work.__dict__["_loaded"] = other._loaded
    pipeline.run_stages(work, "profile")
    profile = pipeline.measured_profile(work.run)
    plans = {(name, budget): plan_of(work, profile, name, budget, seed) for name in methods for budget in BUDGETS}
    rows = []
    for domain in domains:
        judge = Judge(work, domain, seed, cases, track)
        for (name, budget), (plan, told) in plans.items():
            rows.append({"method": name, "budget": budget, "seed": seed, **told, **judge(plan)})
    return work, correlations(profile, seed), rows


def learning(out: Path, other: Work, track: Track) -> Profile:
    """The profile of candidates that learn, after their brief attention transfer; one seed, two cases."""
    changes = [f"profile.candidates={LEARNING}", "profile.gates=[]", "profile.needles.cases=2"]
    work = Work(Run.create(load_recipe(RECIPE, changes), out / "learning"), track)
    work.__dict__["_loaded"] = other._loaded
    pipeline.run_stages(work, "profile")
    return pipeline.measured_profile(work.run)


def plan_of(
    work: Work, profile: Profile, name: str, budget: float, seed: int
) -> tuple[dict[Group, Spec], dict[str, Any]]:
    """The plan of a method, with what it took and what it predicted; kept in the run."""
    folder = place(work)
    settings = SelectSettings(groups=budget, seed=seed, **METHODS[name])
    asked = hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:8]
    path = folder / f"plan-{name.replace(', ', '-').replace(' ', '-')}-{round(100 * budget)}-{asked}.json"

    def choose() -> dict[str, Any]:
        found, history = pipeline.choose(work, profile, settings, folder)
        groups = {f"{n}.{g}": label(s) for (n, g), s in chosen_groups(profile, found.plan).items()}
        told = {"predicted": dict(found.predicted), "gap": found.gap, "rounds": len(history)}
        return {"groups": groups, "told": told}

    kept = stored(path, choose)
    groups = {(int(n), int(g)): profile.candidates[s] for key, s in kept["groups"].items() for n, g in [key.split(".")]}
    return groups, kept["told"]


def place(work: Work) -> Path:
    """Where what is made of a profile is kept: another one has another place."""
    return work.run.path / "study" / work.run.key("profile")[:12]


class Judge:
    """Measures plans on held-out text of a domain; what is measured is kept by plan."""

    def __init__(self, work: Work, domain: str, seed: int, cases: int, track: Track) -> None:
        self.work, self.domain, self.track = work, domain, track
        self.template = TEMPLATES[seed % len(TEMPLATES)]
        documents = work.heldout if domain == "speeches" else read_texts(TextSource.model_validate(CODE), track=track)
        self.task: Needles = needles(work.tokenizer, documents, self.template, cases, LENGTH, 1000 + seed)
        self.folder = place(work) / f"{domain}-{self.template}-{cases}x{LENGTH}"
        self.learned = work.learned
        self.teacher: list[torch.Tensor] = []

    def __call__(self, chosen: Mapping[Group, Spec]) -> dict[str, Any]:
        found = stored(self.folder / f"{plan_key(chosen)}.json", lambda: self._measure(chosen))
        full = stored(self.folder / f"{plan_key({})}.json", lambda: self._measure({}))
        total = sum(site.kv_heads for site in self.work.sites)
        teacher = {f"teacher_{name}": full[name] for name in ("exact", "digits", "perplexity")}
        return {"domain": self.domain, "template": self.template, "converted": len(chosen) / total, **found, **teacher}

    @torch.no_grad()
    def _measure(self, chosen: Mapping[Group, Spec]) -> dict[str, Any]:
        work, task = self.work, self.task
        if not self.teacher:
            self.teacher = [
                log_probabilities(work.model, task, n)
                for n in self.track(range(len(task.ids)), f"{self.domain}: teacher")
            ]
        total = {"kl": 0.0, "loss": 0.0, "exact": 0.0, "digits": 0.0}
        with replaced(work.model, work.sites, chosen, self.learned):
            for n, want in enumerate(self.track(self.teacher, f"{self.domain}: {len(chosen)} groups converted")):
                got = log_probabilities(work.model, task, n)
                at = measured_positions(task.answer[n])
                target = task.ids[n, at + 1].to(got.device)
                width = task.answer.shape[1]
                total["kl"] += kl(want, got)[:-width].mean().item()
                loss = torch.nn.functional.nll_loss(got, target, reduction="none")
                total["loss"] += loss[:-width].mean().item()
                hits = (got.argmax(-1) == target)[-width:].float()
                total["exact"] += float(hits.min())
                total["digits"] += float(hits.mean())
        mean = {name: value / len(task.ids) for name, value in total.items()}
        perplexity = float(torch.tensor(mean.pop("loss")).exp())
        return {**mean, "perplexity": perplexity, "cases": len(task.ids)}


# --- what predicts damage ---------------------------------------------------------------------------------------------


def correlations(profile: Profile, seed: int) -> list[dict[str, Any]]:
    """Spearman of every statistic with the measured damage of the candidates, over KV groups."""
    rows = []
    for name in profile.candidates:
        for statistic, values in statistics_of(profile, name).items():
            row: dict[str, Any] = {"statistic": statistic, "candidate": name, "seed": seed}
            for measure in ("kl", "needle"):
                damage = [x for row_ in profile.damage[name][measure] for x in row_]
                row[measure] = rank_correlation(values, damage)
            rows.append(row)
    return rows


def rank_correlation(one: Sequence[float | None], other: Sequence[float | None]) -> float | None:
    pairs = [(x, y) for x, y in zip(one, other, strict=True) if x is not None and y is not None]
    if len({x for x, _ in pairs}) < 2 or len({y for _, y in pairs}) < 2:
        return None
    return float(spearmanr([x for x, _ in pairs], [y for _, y in pairs]).statistic)


def statistics_of(profile: Profile, candidate: str) -> dict[str, list[float | None]]:
    """A number per KV group for every statistic: sums of errors and effects, means of shares, the highest retrieval."""
    tables: dict[str, tuple[Any, Callable[[list[float]], float]]] = {
        name: (table, max if name == "retrieval" else mean) for name, table in profile.statistics.items()
    }
    tables["mass_lost"] = (profile.mass_lost[candidate], mean)
    for name in ("output_error", "output_change", "first_order", "first_order_needle"):
        table = getattr(profile, name, {}).get(candidate)
        if table is not None:
            tables[name] = (table, sum)
    found = {
        name: [
            known(combine, heads(row, site.heads // site.kv_heads, g))
            for site, row in zip(profile.sites, table, strict=True)
            for g in range(site.kv_heads)
        ]
        for name, (table, combine) in tables.items()
    }
    for name, table in profile.gates.items():
        found[f"gate of {name}"] = [x for row in table for x in row]
    return found


def heads(row: Sequence[float], per: int, group: int) -> list[float]:
    return list(row[group * per : (group + 1) * per])


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def known(combine: Callable[[list[float]], float], values: list[float]) -> float | None:
    """None where one of the heads has no number."""
    return None if None in values else combine(values)


if __name__ == "__main__":
    main()
