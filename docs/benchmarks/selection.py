"""The study behind docs/selection.md: every statistic and every selector, on SmolLM2 and MiniLM, side by side.

    make study                          everything; continues where it stopped
    python docs/benchmarks/selection.py --seeds 1 --cases 10 --out runs/study-small --results /tmp/selection.json

For each seed the model is profiled afresh (other calibration text, other needles, other gates). Each selector then
makes a plan for each budget, and every distinct plan is judged on held-out text of two domains with needle templates
that no profile has seen. Writes selection.json beside this file and the tables of docs/selection.md.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import selection_tables
import torch
from scipy.stats import spearmanr

from attnconvert import pipeline
from attnconvert.convert.damage import Group, plan_key, replaced
from attnconvert.convert.files import read_json, stored, write_json
from attnconvert.convert.hosts.models import is_encoder
from attnconvert.convert.machine import hardware, versions
from attnconvert.convert.passages import Passages, embed
from attnconvert.convert.profiling import Profile
from attnconvert.convert.progress import Track, rich_track
from attnconvert.convert.recipe import NeedleSettings, SelectSettings, load_recipe
from attnconvert.convert.recipe_inputs import TextSource
from attnconvert.convert.refinement import chosen_groups
from attnconvert.convert.runs import Run
from attnconvert.convert.sources import read_texts
from attnconvert.convert.text import Cases, Needles, kl, measured_positions
from attnconvert.distill.work import Work
from attnconvert.kernels.spec import Spec, label

HERE = Path(__file__).parent
RESULTS = HERE / "selection.json"
RECIPES = {"SmolLM2": "selection-study.yaml", "MiniLM": "selection-study-minilm.yaml"}
SCHEMA = 2
DOMAINS = ("speeches", "code")
TEN = 10  # times as many steps of transfer, to tell what brief ones are worth
BUDGETS = (0.6, 0.75)  # share of the KV groups that is converted
TEMPLATES = ("account", "train", "shelf")  # one per seed; none of them is profiled on
CODE = {"package": {"name": "networkx", "version": "3.6.1", "files": ["networkx/algorithms/**/*.py"]}}
LEARNING = {
    "SmolLM2": "[{operator: linear}, {operator: hybrid, window: 64, sinks: 4}]",
    "MiniLM": "[{operator: linear}, {operator: hybrid, window: 16, sinks: 1}]",
}
METHODS: dict[str, dict[str, Any]] = {
    "damage, refined": {"method": "damage", "rounds": 2, "measure_cases": 4},
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
    parser.add_argument("--models", nargs="*", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cases", type=int, default=17, help="needle cases per seed and domain")
    parser.add_argument("--domains", nargs="*", default=list(DOMAINS), choices=DOMAINS)
    parser.add_argument("--no-learning", action="store_true", help="leave out the candidates that learn")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--out", type=Path, default=HERE.parent.parent / "runs" / "study")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    track = rich_track()
    before = read_json(given.results) if given.results.exists() else {}
    studied = before["models"] if before.get("schema") == SCHEMA else {}
    for model in given.models:
        for found in study(model, given, track):  # what is known after each seed, so that it can be read meanwhile
            studied[model] = found
            write_json(given.results, {"schema": SCHEMA, "command": "make study", "models": studied})
    if given.results == RESULTS:
        selection_tables.write(studied)


def study(model: str, given: argparse.Namespace, track: Track) -> Iterator[dict[str, Any]]:
    """All that is measured of a model: after the candidates that learn, and after each seed more."""
    rows: list[dict[str, Any]] = []
    statistics: list[dict[str, Any]] = []
    first: Work | None = None
    for seed in range(given.seeds):
        work, found, judged = one_seed(model, seed, given, first, track)
        statistics += found
        rows += judged
        if first is None:
            first = work
            if not given.no_learning:
                brief = learning(model, given.out, first, track)
                statistics += correlations(brief, 0) + foretold(model, given.out, first, brief, track)
        profiled = work.recipe.profile.needles
        data = {"cases": given.cases, "length": profiled.length, "templates": TEMPLATES[: seed + 1]}
        yield {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": hardware(),
            "versions": versions(),
            "data": {**data, "seeds": seed + 1},
            "statistics": statistics,
            "selectors": rows,
        }


def one_seed(
    model: str, seed: int, given: argparse.Namespace, other: Work | None, track: Track
) -> tuple[Work, list[dict[str, Any]], list[dict[str, Any]]]:
    """Correlations of a fresh profile, and what every method's plans come to; `other` has the model already."""
    recipe = load_recipe(HERE / RECIPES[model], [f"profile.seed={seed}", f"select.seed={seed}"])
    work = Work(Run.create(recipe, given.out / model / f"seed-{seed}"), track)
    if other is not None:  # one model in memory
        work.__dict__["_loaded"] = other._loaded
    pipeline.run_stages(work, "profile")
    profile = pipeline.measured_profile(work.run)
    plans = {(name, budget): plan_of(work, profile, name, budget, seed) for name in given.methods for budget in BUDGETS}
    rows = []
    for domain in given.domains:
        judge = Judge(work, domain, seed, given.cases, track)
        for (name, budget), (plan, told) in plans.items():
            rows.append({"method": name, "budget": budget, "seed": seed, **told, **judge(plan)})
    return work, correlations(profile, seed), rows


def learning(model: str, out: Path, other: Work, track: Track) -> Profile:
    """The profile of candidates that learn, after their brief attention transfer; one seed, of texts two cases."""
    changes = [f"profile.candidates={LEARNING[model]}", "profile.gates=[]"]
    changes += [] if is_encoder(other.model) else ["profile.needles.cases=2"]
    work = Work(Run.create(load_recipe(HERE / RECIPES[model], changes), out / model / "learning"), track)
    work.__dict__["_loaded"] = other._loaded
    pipeline.run_stages(work, "profile")
    return pipeline.measured_profile(work.run)


def foretold(model: str, out: Path, other: Work, brief: Profile, track: Track) -> list[dict[str, Any]]:
    """Spearman of the damage after brief attention transfer with that after ten times as much, on held-out text."""
    name, steps = "linear-hedgehog", TEN * brief.data["transfer_steps"]
    changes = ["profile.candidates=[{operator: linear}]", "profile.gates=[]", "profile.gradients=false"]
    changes += [f"profile.transfer_steps={steps}", "profile.needles.template=shelf", "profile.seed=1000"]
    changes += [] if is_encoder(other.model) else ["profile.needles.cases=2"]
    recipe = load_recipe(HERE / RECIPES[model], changes)
    texts = recipe.text.model_copy(update={"calibration": recipe.text.heldout})
    work = Work(Run.create(recipe.model_copy(update={"text": texts}), out / model / "longer"), track)
    work.__dict__["_loaded"] = other._loaded
    pipeline.run_stages(work, "profile")
    longer = pipeline.measured_profile(work.run)
    early, *late = (
        [x for row in profile.damage[name][key] for x in row]
        for profile, key in ((brief, "kl"), (longer, "kl"), (longer, "needle"))
    )
    told = {key: rank_correlation(early, values) for key, values in zip(("kl", "needle"), late, strict=True)}
    return [{"statistic": f"damage after {brief.data['transfer_steps']} steps", "candidate": name, "seed": 0, **told}]


def plan_of(
    work: Work, profile: Profile, name: str, budget: float, seed: int
) -> tuple[dict[Group, Spec], dict[str, Any]]:
    """The plan of a method, with what it took and what it predicted; kept in the run."""
    folder = place(work)
    given = dict(METHODS[name])
    if "measure_cases" in given and is_encoder(work.model):
        given["measure_cases"] = len(work.profile_cases)  # a case is one embedding: all, since they are cheap
    settings = SelectSettings(groups=budget, seed=seed, **given)
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
        profiled = work.recipe.profile.needles
        asked = NeedleSettings(cases=cases, length=profiled.length, template=self.template)
        self.task: Cases = work.cases(asked, documents, 1000 + seed)
        self.folder = place(work) / f"{domain}-{self.template}-{cases}x{profiled.length}"
        self.learned = work.learned
        self.teacher: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def __call__(self, chosen: Mapping[Group, Spec]) -> dict[str, Any]:
        found = stored(self.folder / f"{plan_key(chosen)}.json", lambda: self._measure(chosen))
        full = stored(self.folder / f"{plan_key({})}.json", lambda: self._measure({}))
        total = sum(site.kv_heads for site in self.work.sites)
        teacher = {f"teacher_{name}": full[name] for name in full if name not in ("kl", "cases")}
        return {"domain": self.domain, "template": self.template, "converted": len(chosen) / total, **found, **teacher}

    @torch.no_grad()
    def _measure(self, chosen: Mapping[Group, Spec]) -> dict[str, Any]:
        work, count = self.work, len(self.task)
        if not self.teacher:
            self.teacher = [self._answers(n) for n in self.track(range(count), f"{self.domain}: teacher")]
        with replaced(work.model, work.sites, chosen, self.learned):
            cases = self.track(range(count), f"{self.domain}: {len(chosen)} groups converted")
            rows = [self._compared(n, *self.teacher[n], *self._answers(n)) for n in cases]
        mean = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
        if "loss" in mean:
            mean["perplexity"] = math.exp(mean.pop("loss"))
        return {**mean, "cases": count}

    def _answers(self, n: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The model's log-probabilities of a case, and where it is an encoder its embedding."""
        model = self.work.model
        embedding = embed(model, self.task.ids[n][None])[0] if isinstance(self.task, Passages) else None
        return self.task.answers(model, n), embedding

    def _compared(
        self, n: int, want: torch.Tensor, own: torch.Tensor | None, got: torch.Tensor, embedding: torch.Tensor | None
    ) -> dict[str, float]:
        """KL on the text, whether the needle was found, and what else tells of the quality."""
        target = self.task.target(n).to(got.device)
        width = len(target)
        hits = (got[-width:].argmax(-1) == target).float()
        row = {
            "kl": kl(want, got)[:-width].mean().item(),
            "exact": float(hits.min()),
            "digits": float(hits.mean()),
        }
        if own is not None and embedding is not None:
            return row | {"cosine": float(own @ embedding)}
        assert isinstance(self.task, Needles)
        following = self.task.ids[n, measured_positions(self.task.answer[n]) + 1].to(got.device)
        return row | {"loss": torch.nn.functional.nll_loss(got[:-width], following[:-width]).item()}


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
