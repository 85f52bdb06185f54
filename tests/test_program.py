"""The integer program finds the best choice there is, its bound is one, and what cannot be met is told."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from attnconvert.convert import program as module
from attnconvert.convert.errors import UsageError
from attnconvert.convert.program import Infeasible, Program, cheapest, cheapest_each, solve
from attnconvert.convert.relaxation import Relaxation, relax


def instance(
    layers: int = 2,
    groups: int = 3,
    candidates: int = 3,
    budgets: int = 1,
    most_kinds: int | None = None,
    launch: float = 0.0,
    share: float = 0.5,
    seed: int = 0,
) -> Program:
    """Options from full attention (no loss, dearest) downwards; every candidate is a kind of its own."""
    draw = np.random.default_rng(seed)
    units, total = layers * groups, layers * groups * candidates
    quality = np.sort(draw.random(candidates))[::-1].copy()
    quality[0] = 1.0
    loss = draw.lognormal(-5, 1.5, (units, 1)) * (1 - quality) ** 1.5 * draw.lognormal(0, 0.3, (units, candidates))
    cost = np.stack([quality * draw.lognormal(0, 0.2, candidates) * np.ones((units, 1)) for _ in range(budgets)])
    cost[:, :, 0] = 1.2
    unit = np.repeat(np.arange(units), candidates)
    launches = launch * groups * draw.random((budgets, 1, candidates)) * np.ones((budgets, layers, 1))
    return Program(
        unit=unit,
        block=unit // groups,
        kind=np.tile(np.arange(candidates), units),
        loss=loss.reshape(total),
        cost=cost.reshape(budgets, total),
        limit=share * cost[:, :, 0].sum(1),
        names=tuple(f"budget {r}" for r in range(budgets)),
        launch=launches,
        loss_launch=np.zeros((layers, candidates)),
        most_kinds=most_kinds,
    )


def every_choice(program: Program) -> list[np.ndarray[Any, Any]]:
    ends = np.append(program.starts[1:], len(program.unit))
    ranges = [range(a, b) for a, b in zip(program.starts, ends, strict=True)]
    found = (np.array(choice) for choice in itertools.product(*ranges))
    return [choice for choice in found if program.feasible(choice)]


SETTINGS = [
    {},
    {"budgets": 3, "share": 0.6},
    {"launch": 0.2, "share": 0.7},
    {"most_kinds": 1},
    {"most_kinds": 2, "budgets": 2, "launch": 0.1, "share": 0.7},
    {"layers": 3, "groups": 2, "most_kinds": 2, "launch": 0.3, "share": 0.8},
]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_choice_is_the_best_of_all(settings: dict[str, Any], seed: int) -> None:
    program = instance(**settings, seed=seed)
    best = min((program.value(choice) for choice in every_choice(program)), default=None)
    if best is None:
        with pytest.raises(Infeasible):
            solve(program)
        return
    found = solve(program, gap=1e-9)
    assert program.feasible(found.choice)
    assert found.loss == pytest.approx(best, rel=1e-6)
    assert found.loss == program.value(found.choice)
    assert found.bound <= best * (1 + 1e-6)
    assert found.gap <= 1e-5


@pytest.mark.parametrize("seed", range(4))
def test_the_relaxation_never_claims_more_than_the_best(seed: int) -> None:
    for settings in SETTINGS:
        program = instance(**settings, seed=seed)
        choices = every_choice(program)
        if not choices:
            continue
        best, relaxed = min(program.value(choice) for choice in choices), relax(program)
        assert relaxed.bound <= best + 1e-9
        assert relaxed.choice is None or program.feasible(relaxed.choice)
        penalties = Relaxation(program).penalties(relaxed.prices / program.scale)
        for choice in choices:  # what a plan costs is at least what its dearest option is said to cost
            assert relaxed.bound + penalties[choice].max() <= program.value(choice) + 1e-9


@pytest.mark.parametrize("settings", [{}, {"most_kinds": 2, "launch": 0.2, "share": 0.8}], ids=str)
def test_the_cheapest_choice_of_a_quality(settings: dict[str, Any]) -> None:
    program = instance(**settings, budgets=2)
    most = float(np.median([program.value(choice) for choice in every_choice(program)]))
    wanted = [choice for choice in every_choice(program) if program.value(choice) <= most]
    found = cheapest(program, 1, most, gap=1e-9)
    assert program.value(found.choice) <= most * (1 + 1e-6)
    assert found.loss == pytest.approx(min(program.usage(choice)[1] for choice in wanted), rel=1e-6)


def test_a_forbidden_option_is_not_taken() -> None:
    program = instance()
    taken = solve(program).choice
    dear = next(int(n) for n in taken if n not in program.starts)
    without = program.only(np.array([n for n in range(len(program.unit)) if n != dear]))
    assert solve(without, gap=1e-9).loss > solve(program, gap=1e-9).loss


def test_a_budget_that_one_choice_cannot_meet_is_named_with_what_it_needs() -> None:
    program = instance(budgets=2)
    least = min(program.usage(choice)[1] for choice in every_choice(replace(program, limit=program.limit * 100)))
    assert cheapest_each(program)["budget 1"][0] == pytest.approx(least)
    with pytest.raises(Infeasible, match="budget 1 needs at least") as caught:
        solve(replace(program, limit=np.array([program.limit[0], 0.9 * least])))
    assert caught.value.binding == ["budget 1"]
    assert caught.value.least["budget 1"] == pytest.approx((least, 0.9 * least))
    assert caught.value.exit_code == 2


def test_budgets_that_conflict_only_together_are_told_as_such() -> None:
    program = instance(layers=1, groups=2, candidates=2, budgets=2)
    cost = np.array([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])  # what saves one wastes the other
    program = replace(program, cost=cost, limit=np.array([0.5, 0.5]))
    with pytest.raises(Infeasible, match=r"budget 0, budget 1 can be met alone, but not together.* by 100.00%"):
        solve(program)


def test_the_relaxation_stands_in_where_highs_runs_out_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    program = instance(layers=6, groups=6, candidates=5, budgets=2, launch=0.1, share=0.7)

    def stopped(*arguments: Any, **settings: Any) -> Any:
        from scipy.optimize import OptimizeResult

        return OptimizeResult(x=None, status=1, mip_dual_bound=None)

    exact = solve(program)
    monkeypatch.setattr(module, "milp", stopped)
    found = solve(program, gap=1e-9, seconds=1.0)
    assert "Lagrangian relaxation's plan: HiGHS did not finish within" in found.how
    assert program.feasible(found.choice)
    assert found.bound <= exact.loss <= found.loss <= exact.loss * 1.1
    assert found.gap > 0


def test_nothing_found_in_time_is_no_proof_that_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    program = instance()
    monkeypatch.setattr(module, "relax", lambda p: replace(relax(p), choice=None))
    monkeypatch.setattr(module, "_highs", lambda *a, **k: type("Out", (), {"x": None, "status": 1}))
    with pytest.raises(UsageError, match="no plan was found within 1 s, though there may be one") as caught:
        solve(program, seconds=1.0)
    assert not isinstance(caught.value, Infeasible)


def test_prices_say_what_a_little_more_of_a_budget_saves() -> None:
    program = instance(layers=8, groups=8, candidates=4)
    found = solve(program, gap=1e-9)
    wider = replace(program, limit=program.limit * 1.05)
    saved = found.loss - solve(wider, gap=1e-9).loss
    assert saved == pytest.approx(found.prices["budget 0"] * 0.05 * program.limit[0], rel=0.25)


@pytest.mark.parametrize("loose", [1.0, 5.0])
def test_a_budget_that_costs_nothing_has_no_price(loose: float) -> None:
    found = solve(replace(instance(), limit=instance().limit * 2 * loose))
    assert found.loss == 0.0
    assert found.prices["budget 0"] == pytest.approx(0.0, abs=1e-9)
    assert found.how == "Lagrangian relaxation, whose bound proves it"


def test_the_solver_writes_nothing_to_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    solve(instance(layers=8, groups=8, candidates=6, budgets=3, launch=0.1, share=0.7))
    assert capfd.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.parametrize("most_kinds", [None, 2])
@pytest.mark.parametrize("seed", range(3))
def test_32_layers_of_32_heads_with_10_candidates_and_three_budgets_take_seconds(
    most_kinds: int | None, seed: int
) -> None:
    program = instance(layers=32, groups=32, candidates=10, budgets=3, most_kinds=most_kinds, seed=seed)
    start = time.process_time()
    found = solve(program)
    assert program.feasible(found.choice)
    assert found.gap <= 1e-4
    assert time.process_time() - start <= 3
