"""Refinement against a joint damage that is not the sum of the single ones."""

import dataclasses
import itertools

import pytest
from test_selection import NARROW, make_profile, settings_of

from attnconvert.convert.damage import joint_loss
from attnconvert.convert.refinement import _nearer, _scores, chosen_groups, refine
from attnconvert.convert.selection import select
from attnconvert.kernels.spec import label

PROFILE = make_profile(layers=4, kv_heads=2, candidates=(NARROW,), scales=(1.0,))


def pairs(chosen):
    """Groups of one layer cost much more together than apart: what single damages cannot know."""
    layers = [n for n, _ in chosen]
    return sum(layers.count(n) == 2 for n in set(layers))


def measure(chosen):
    table = PROFILE.damage[label(NARROW)]["kl"]
    return {"kl": sum(table[n][g] for n, g in chosen) + 2.0 * pairs(chosen), "needle": 0.0}


def marginal(around):
    """Exact marginal damages of `measure` around a plan."""
    rows = [[None, None] for _ in range(4)]
    for n in range(4):
        for g in range(2):
            without = {group: spec for group, spec in around.items() if group != (n, g)}
            rows[n][g] = measure({**without, (n, g): NARROW})["kl"] - measure(without)["kl"]
    return {label(NARROW): {"kl": rows, "needle": [[0.0, 0.0] for _ in range(4)]}}


def refined(rounds, **given):
    settings = settings_of(groups=0.5, needle_weight=1.0, rounds=rounds, **given)
    return refine(PROFILE, settings, "tiny", costs=None, measure=measure, marginal=marginal)


def test_refinement_finds_a_plan_that_single_damages_do_not():
    first = select(PROFILE, settings_of(groups=0.5), "tiny")
    best, history = refined(4)
    before = joint_loss(measure(chosen_groups(PROFILE, first.plan)), 1.0)
    after = joint_loss(measure(chosen_groups(PROFILE, best.plan)), 1.0)
    assert pairs(chosen_groups(PROFILE, first.plan)) > 0, "the first plan must have something to mend"
    assert after < before - 1.0
    assert best.measured == measure(chosen_groups(PROFILE, best.plan))
    assert history[0]["loss"] == pytest.approx(before)
    assert min(line["loss"] for line in history) == pytest.approx(after)


def test_refinement_never_returns_a_plan_that_was_measured_worse_than_another():
    best, history = refined(3)
    assert joint_loss(best.measured, 1.0) == pytest.approx(min(line["loss"] for line in history))
    kept = [line["loss"] for line in history if line["kept"]]
    assert kept == sorted(kept, reverse=True)


def test_refinement_stops_where_the_plan_is_settled(monkeypatch):
    """With additive damage the first plan is the best: one round shows it, and no more are spent."""
    table = PROFILE.damage[label(NARROW)]
    calls = []

    def additive(chosen):
        return {"kl": sum(table["kl"][n][g] for n, g in chosen), "needle": 0.0}

    def same(around):
        calls.append(around)
        return {label(NARROW): {"kl": table["kl"], "needle": [[0.0, 0.0] for _ in range(4)]}}

    profile = dataclasses.replace(
        PROFILE, damage={label(NARROW): {"kl": table["kl"], "needle": [[0.0, 0.0] for _ in range(4)]}}
    )
    settings = settings_of(groups=0.5, rounds=5)
    best, history = refine(profile, settings, "tiny", costs=None, measure=additive, marginal=same)
    assert len(calls) == 1
    assert [line["scores"] for line in history if line["kept"]] == ["damage"]
    assert {line["round"] for line in history} == {0}, "no other plan came up"
    assert best.plan == select(profile, settings_of(groups=0.5), "tiny").plan


def test_the_budget_holds_in_every_round():
    best, _ = refined(4)
    assert best.plan.converted == pytest.approx(0.5)


def test_plans_that_change_less_are_tried_and_told_in_their_own_losses():
    """Around the first plan the scores ask for several changes at once; some fewer are tried as well."""
    settings = settings_of(groups=0.5, needle_weight=1.0)
    first = select(PROFILE, settings, "tiny").plan
    around = _scores(marginal(chosen_groups(PROFILE, first)), settings)
    tried = list(_nearer(PROFILE, first, around, lambda scores: select(PROFILE, settings, "tiny", scores=scores)))
    counts = [int(name.split(", ")[1].split()[0]) for name, _ in tried]
    assert len(counts) >= 2
    assert all(0 < after <= before // 2 for before, after in itertools.pairwise(counts))
    for name, found in tried:  # what a change was charged is no loss
        groups = chosen_groups(PROFILE, found.plan)
        assert found.loss == pytest.approx(sum(around[group][label(NARROW)] for group in groups)), name
