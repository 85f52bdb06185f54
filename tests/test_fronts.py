"""The front is the least loss at every cost: no selector of the comparison lies below it."""

from __future__ import annotations

import dataclasses
import itertools
import time
from typing import Any

import pytest
import torch

from attnconvert.convert import fronts
from attnconvert.convert.costs import analytic, plan_cost
from attnconvert.convert.errors import UsageError
from attnconvert.convert.fronts import OTHERS, front
from attnconvert.convert.hosts.sites import Site
from attnconvert.convert.profiling import Profile
from attnconvert.convert.recipe import SelectSettings
from attnconvert.convert.seeds import rng
from attnconvert.convert.selection import select
from attnconvert.kernels.spec import Full, Retention, Spec, Window, label

CANDIDATES = (Window(size=256, sinks=4), Window(size=64, sinks=4), Retention(window=32, keep=32, sinks=4, block=8))


def profile(layers: int = 6, groups: int = 3, seed: int = 0, candidates: tuple[Spec, ...] = CANDIDATES) -> Profile:
    """Groups that differ a thousandfold; scores that know something of it."""
    generator = rng("fronts", seed)

    def table(spread: float, heads: int, like: torch.Tensor | None = None) -> Any:
        drawn = (spread * torch.randn(layers, heads, generator=generator)).exp()
        return (drawn * (1 if like is None else like.repeat_interleave(heads // groups, 1))).tolist()

    damage = {label(s): torch.tensor(table(1.7, groups)) * 0.01 * (n + 1) for n, s in enumerate(candidates)}
    scores = {name: table(0.5, 2 * groups, like) for name, like in damage.items()}
    fields: dict[str, Any] = {f.name: {} for f in dataclasses.fields(Profile)}
    return Profile(**fields | {
        "sites": tuple(Site(f"layers.{n}.attn", n, 2 * groups, groups, 16) for n in range(layers)),
        "candidates": {label(spec): spec for spec in candidates},
        "statistics": {"entropy": table(0.3, 2 * groups), "retrieval": [[0.0] * 2 * groups] * layers},
        "output_error": scores,
        "first_order": scores,
        "mass_lost": {name: [[min(1.0, x) for x in row] for row in rows] for name, rows in scores.items()},
        "influence": {"block": 64, "table": [[[1.0, 0.5, 0.2, 0.1]] * 2 * groups] * layers},
        "damage": {name: {"kl": x.tolist(), "needle": (x / 4).tolist()} for name, x in damage.items()},
        "gates": {"duo": table(0.3, groups)},
        "similarity": [],
        "problems": [],
        "data": {"element": 2},
        "seconds": 0.0,
    })  # fmt: skip


def settings(**given: Any) -> SelectSettings:
    return SelectSettings.model_validate(given)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return front(profile(), settings(groups=0.5))


def test_the_front_falls_with_the_budget_and_stays_below_it(found: dict[str, Any]) -> None:
    line = found["front"]
    assert len(line) == 8
    assert [e["budget"] for e in line] == sorted({e["budget"] for e in line})
    assert all(a["loss"] >= b["loss"] for a, b in itertools.pairwise(line))
    assert all(e["cost"] <= e["budget"] + 1e-9 and e["bound"] <= e["loss"] + 1e-9 for e in line)
    assert line[0]["converted"] > 0.9
    assert line[-1]["converted"] < 0.2


def test_no_selector_loses_less_at_the_same_budget(found: dict[str, Any]) -> None:
    best = {e["budget"]: e["loss"] for e in found["front"]}
    assert set(found["others"]) == {*OTHERS} - {"linvideo"}
    points = [(name, e) for name, entries in found["others"].items() for e in entries]
    for name, entry in points:
        assert entry["cost"] <= entry["budget"] + 1e-9, name
        assert entry["loss"] >= best[entry["budget"]] * (1 - 1e-3), name
    assert any(entry["loss"] > 2 * best[entry["budget"]] for _, entry in points)
    assert len({e["seed"] for e in found["others"]["random"]}) == fronts.SEEDS


def test_the_loss_of_a_point_is_kl_and_weighted_needle() -> None:
    entry = front(profile(), settings(groups=0.5, needle_weight=3.0), methods=("mass",))["others"]["mass"][0]
    assert entry["loss"] == pytest.approx(entry["kl"] + 3 * entry["needle"])


def test_what_the_profile_lacks_is_left_out_with_the_reason(found: dict[str, Any]) -> None:
    assert list(found["left_out"]) == ["linvideo"]
    assert "add linvideo to profile.gates" in found["left_out"]["linvideo"]


def test_without_measured_damage_the_output_error_judges() -> None:
    found = front(dataclasses.replace(profile(), damage={}), settings(groups=0.5), points=4)
    assert found["method"] == "output_error"
    assert "output_error" not in found["others"]
    assert "greedy" in found["left_out"]
    assert "kl" not in found["front"][0]


def test_a_chosen_plan_stands_where_it_costs_and_loses() -> None:
    given = profile()
    wanted = settings(method="damage", budgets={"flops": {4096: "50%"}})
    chosen = select(given, wanted, "tiny")
    found = front(given, wanted, chosen={"student": chosen.plan}, methods=(), points=3)
    entry = found["chosen"]["student"]
    assert (found["resource"], found["length"]) == ("flops", 4096)
    costs = analytic(given.sites, CANDIDATES, (4096,), 1, 2)
    cost, original = (
        plan_cost(costs, "flops", plan, 4096)
        for plan in (chosen.plan.for_sites(given.sites), {site: [Full()] * 3 for site in given.sites})
    )
    assert entry["cost"] == pytest.approx(cost / original)
    assert entry["loss"] == pytest.approx(chosen.loss)
    assert entry["kl"] == pytest.approx(chosen.predicted["kl"])


def test_a_plan_whose_damage_was_not_measured_has_no_loss() -> None:
    given = profile()
    damage = {name: {m: [list(row) for row in t] for m, t in d.items()} for name, d in given.damage.items()}
    damage[label(CANDIDATES[1])]["kl"][0][0] = None
    explicit = {"0": {"operator": "window", "size": 64, "sinks": 4}}
    plan = select(given, settings(method="explicit", explicit=explicit), "tiny").plan
    kept = dataclasses.replace(given, damage=damage)
    assert front(kept, settings(groups=0.5), chosen={"a": plan}, methods=(), points=2)["chosen"]["a"]["loss"] is None


def test_a_budget_of_times_needs_measured_ones_and_falls_back_to_the_next() -> None:
    both = settings(budgets={"prefill_ms": {1024: "50%"}, "flops": {2048: "50%"}})
    assert front(profile(), both, methods=(), points=2)["resource"] == "flops"
    times = settings(budgets={"prefill_ms": {1024: "50%"}})
    assert front(profile(), times, methods=(), points=2)["resource"] == "kv_bytes"


def test_kept_groups_stay_full_on_the_front() -> None:
    found = front(profile(), settings(groups=0.5, protect=[0, 1, 2]), methods=("uniform",), points=4)
    assert all(e["converted"] <= 0.5 for e in found["front"] + found["others"]["uniform"])
    assert found["front"][0]["cost"] > 0.5


def test_without_anything_to_convert_there_is_no_front() -> None:
    with pytest.raises(UsageError, match="no plan takes less"):
        front(profile(), settings(groups=0.5, protect=list(range(6))))
    with pytest.raises(UsageError, match="no attention that could be converted"):
        front(dataclasses.replace(profile(), sites=()), settings(groups=0.5))


def test_it_takes_seconds_for_a_model_of_thirty_layers() -> None:
    start = time.process_time()
    front(profile(layers=30), settings(groups=0.6))
    assert time.process_time() - start < 10
