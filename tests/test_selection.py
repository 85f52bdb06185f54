"""The chosen plan is the best one there is, and meets its budget; what cannot be met is said."""

import dataclasses
import itertools

import pytest

from attnconvert.convert.errors import UsageError
from attnconvert.convert.hosts.transformers import Site
from attnconvert.convert.plan import Plan, read_plan, write_plan
from attnconvert.convert.profiling import Profile
from attnconvert.convert.recipe import SelectSettings
from attnconvert.convert.selection import select
from attnconvert.convert.text import rng
from attnconvert.kernels.spec import Full, Hybrid, Window, label

WIDE, NARROW = Window(size=64, sinks=1), Window(size=16, sinks=1)


def make_profile(layers=4, kv_heads=2, seed=0):
    import torch

    draw = torch.rand(2, 2, layers, kv_heads, generator=rng("selection", seed)).tolist()
    sites = tuple(Site(f"layers.{n}.attn", n, 2 * kv_heads, kv_heads, 8) for n in range(layers))
    damage = {
        label(spec): {m: [[x * scale for x in row] for row in draw[0 if m == "kl" else 1][0]] for m in ("kl", "needle")}
        for spec, scale in ((WIDE, 1.0), (NARROW, 3.0))
    }
    retrieval = [[0.0] * (2 * kv_heads) for _ in range(layers)]
    retrieval[2][3] = 0.8
    return Profile(sites, {label(WIDE): WIDE, label(NARROW): NARROW}, {"retrieval": retrieval}, {}, damage, {}, {}, 0.0)


def total(profile, plan, weight):
    value = 0.0
    for n, site in enumerate(profile.sites):
        for g, spec in enumerate(plan[site.name]):
            if spec != Full():
                table = profile.damage[label(spec)]
                value += table["kl"][n][g] + weight * table["needle"][n][g]
    return value


@pytest.mark.parametrize("seed", range(5))
def test_selection_by_damage_is_optimal(seed):
    profile = make_profile(layers=3, seed=seed)
    settings = SelectSettings(groups=0.5, needle_weight=0.3)
    chosen = select(profile, settings, "m").plan
    best = min(
        total(profile, dict(zip([s.name for s in profile.sites], itertools.batched(combo, 2), strict=True)), 0.3)
        for combo in itertools.product([Full(), WIDE, NARROW], repeat=6)
        if sum(s != Full() for s in combo) >= 3
    ) if hasattr(itertools, "batched") else min(
        total(profile, {s.name: combo[2 * n : 2 * n + 2] for n, s in enumerate(profile.sites)}, 0.3)
        for combo in itertools.product([Full(), WIDE, NARROW], repeat=6)
        if sum(s != Full() for s in combo) >= 3
    )  # fmt: skip
    assert total(profile, chosen.groups, 0.3) == pytest.approx(best)
    assert chosen.converted == pytest.approx(0.5)


def test_retrieval_groups_are_kept_whatever_their_damage():
    chosen = select(make_profile(), SelectSettings(groups=0.8, retrieval_keep=0.5), "m")
    assert chosen.plan.groups["layers.2.attn"][1] == Full()
    assert "retrieval score 0.80" in chosen.reasons["layers.2.attn"][1]


@pytest.mark.parametrize("method", ["damage", "uniform", "random"])
def test_a_budget_in_bytes_is_met(method):
    profile = make_profile()
    plan = select(profile, SelectSettings(method=method, kv_bytes=0.4, length=1000), "m").plan
    kept = {"full": 1.0, "window-64-1": 65 / 1000, "window-16-1": 17 / 1000}
    used = sum(kept[label(s)] for groups in plan.groups.values() for s in groups) / 8
    assert used <= 0.4
    assert used > 0.25, "and no more is converted than it takes"


def test_whole_layers_where_the_unit_is_a_layer():
    plan = select(make_profile(), SelectSettings(unit="layer", layers=2), "m").plan
    assert sorted(len(set(groups)) for groups in plan.groups.values()) == [1] * 4
    assert sum(groups[0] != Full() for groups in plan.groups.values()) == 2


def test_random_and_uniform_meet_the_same_share():
    for method in ("random", "uniform"):
        assert select(make_profile(8), SelectSettings(method=method, groups=0.5), "m").plan.converted == 0.5
    plans = [select(make_profile(8), SelectSettings(method="random", groups=0.5, seed=s), "m").plan for s in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]


def test_explicit_layers():
    settings = SelectSettings.model_validate({"method": "explicit", "explicit": {"1-2": {"operator": "hybrid"}}})
    plan = select(make_profile(), settings, "m").plan
    assert [groups[0] for groups in plan.groups.values()] == [Full(), Hybrid(), Hybrid(), Full()]
    settings = SelectSettings.model_validate({"method": "explicit", "explicit": {"9": {"operator": "hybrid"}}})
    with pytest.raises(UsageError, match="names layer 9, but the model has layers 0–3"):
        select(make_profile(), settings, "m")


@pytest.mark.parametrize("method", ["damage", "uniform", "random"])
def test_layers_whose_own_window_is_as_small_are_left_alone(method):
    profile = make_profile()
    sites = tuple(dataclasses.replace(s, limit=16) if s.layer < 2 else s for s in profile.sites)
    profile = dataclasses.replace(profile, sites=sites)
    plan = select(profile, SelectSettings(method=method, groups=0.5), "m").plan
    assert plan.groups["layers.0.attn"] == plan.groups["layers.1.attn"] == (Full(), Full())
    assert plan.converted == 0.5
    with pytest.raises(UsageError):
        select(profile, SelectSettings(method=method, groups=0.6), "m")
    settings = SelectSettings.model_validate({"method": "explicit", "explicit": {"0": {"operator": "hybrid"}}})
    with pytest.raises(UsageError, match=r"layers\.0\.attn has a sliding window of 16 tokens of its own"):
        select(profile, settings, "m")


def test_a_budget_that_cannot_be_met_is_said():
    with pytest.raises(UsageError, match=r"groups: 1\.0: 7 of 8 KV groups may be converted"):
        select(make_profile(), SelectSettings(groups=1.0, retrieval_keep=0.5), "m")
    with pytest.raises(UsageError, match="kv_bytes"):
        select(make_profile(), SelectSettings(kv_bytes=0.001, length=100), "m")


def test_plans_round_trip_and_bad_ones_are_refused(tmp_path):
    plan = Plan("m", {"layers.0.attn": (WIDE, Full()), "layers.1.attn": (Hybrid(), Hybrid())})
    path = tmp_path / "plan.yaml"
    write_plan(path, plan)
    assert read_plan(path) == plan
    sites = [Site(f"layers.{n}.attn", n, 4, 2, 8) for n in range(2)]
    assert plan.for_sites(sites)[sites[0]] == [WIDE, Full()]
    with pytest.raises(UsageError, match=r"names 'layers\.1\.attn', which this model does not have"):
        plan.for_sites(sites[:1])
    text = path.read_text()
    for broken, message in (
        (text.replace("size: 64", "sise: 64"), "did you mean 'size'"),
        (text.replace("[window-64-1,", "[window-65-1,"), "not among the plan's operators"),
        (text.replace("sites:", "sits:"), "no plan of format"),
        (text + ": [", "not YAML"),
        (text.replace("[window-64-1, full]", "full"), r"sites.layers.0.attn: give a list of labels"),
        (text.replace("[window-64-1, full]", "[[full], full]"), r"sites.layers.0.attn: give a list of labels"),
        (text.replace("window-64-1: {operator: window, size: 64, sinks: 1}", "window-64-1: window"), "give a mapping"),
        (text.replace("operators:", "operators: [a]\nrest:"), "operators: give a mapping"),
    ):
        path.write_text(broken)
        with pytest.raises(UsageError, match=message):
            read_plan(path)
