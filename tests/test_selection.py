"""The chosen plan is the best one there is, and meets its budget; what cannot be met is said."""

import contextlib
import dataclasses
import itertools

import pytest

from attnconvert.convert.budgets import make_task
from attnconvert.convert.costs import analytic, plan_cost
from attnconvert.convert.errors import UsageError
from attnconvert.convert.explain import explain
from attnconvert.convert.hosts.sites import Site
from attnconvert.convert.profiling import Profile
from attnconvert.convert.recipe import SelectSettings
from attnconvert.convert.seeds import rng
from attnconvert.convert.selection import require_profile, select
from attnconvert.kernels.spec import Full, Hybrid, Linear, Window, label

WIDE, NARROW = Window(size=64, sinks=1), Window(size=16, sinks=1)
BYTES = {"full": 1.0, label(WIDE): 65 / 1000, label(NARROW): 17 / 1000}  # share of full attention's at 1000 tokens


def make_profile(layers=4, kv_heads=2, seed=0, candidates=(WIDE, NARROW), scales=(1.0, 3.0)):
    """Damage and all other losses rise from candidate to candidate; the second group of layer 2 retrieves."""
    import torch

    draw = torch.rand(2, layers, kv_heads, generator=rng("selection", seed))
    heads = draw.repeat_interleave(2, 2) / 2  # two query heads share what is lost by their group

    def per(table, scale):
        return (table * scale).tolist()

    named = list(zip(candidates, scales, strict=True))
    retrieval = [[0.0] * (2 * kv_heads) for _ in range(layers)]
    if layers > 2 and kv_heads > 1:
        retrieval[2][3] = 0.8
    return Profile(
        sites=tuple(Site(f"layers.{n}.attn", n, 2 * kv_heads, kv_heads, 8) for n in range(layers)),
        candidates={label(spec): spec for spec in candidates},
        statistics={"entropy": per(heads[0], 1), "local_mass": per(heads[0], 1), "retrieval": retrieval},
        output_error={label(spec): per(heads[0], scale) for spec, scale in named},
        mass_lost={label(spec): per(heads[0], scale / 3) for spec, scale in named},
        output_change={label(spec): per(heads[0], scale / 2) for spec, scale in named},
        first_order={label(spec): per(heads[0], scale) for spec, scale in named},
        first_order_needle={label(spec): per(heads[1], scale) for spec, scale in named},
        influence={"block": 16, "table": [[[1.0, x, x, x, x, x / 2] for x in row] for row in per(heads[0], 1)]},
        damage={
            label(spec): {"kl": per(draw[0], scale), "needle": per(draw[1], scale)} for spec, scale in named
        },
        curves={},
        similarity=[],
        bands={},
        gates={"duo": per(draw[0], 1), "linvideo": per(draw[1], 1)},
        problems=[],
        teacher={},
        data={"element": 2, "identity": {"model": "tiny", "revision": "r1", "sha256": "abc"}},
        seconds=0.0,
    )  # fmt: skip


def settings_of(**given):
    return SelectSettings.model_validate(given)


def total(profile, plan, weight=1.0):
    """The summed damage of a plan {site name: operators}."""
    value = 0.0
    for n, site in enumerate(profile.sites):
        for g, spec in enumerate(plan[site.name]):
            if spec != Full():
                table = profile.damage[label(spec)]
                value += table["kl"][n][g] + weight * table["needle"][n][g]
    return value


def specs_of(plan):
    return [spec for groups in plan.groups.values() for spec in groups]


def used(plan):
    return sum(BYTES[label(spec)] for spec in specs_of(plan)) / len(specs_of(plan))


def every_plan(profile):
    count = sum(site.kv_heads for site in profile.sites)
    for combo in itertools.product((Full(), WIDE, NARROW), repeat=count):
        given = iter(combo)
        yield {site.name: tuple(itertools.islice(given, site.kv_heads)) for site in profile.sites}


def cheap_enough(plan, share):
    specs = [spec for groups in plan.values() for spec in groups]
    return sum(BYTES[label(spec)] for spec in specs) / len(specs) <= share


# --- the program ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_selection_by_damage_is_optimal(seed):
    profile = make_profile(layers=3, seed=seed)
    found = select(profile, settings_of(groups=0.5, needle_weight=0.3), "m")
    best = min(
        total(profile, plan, 0.3)
        for plan in every_plan(profile)
        if sum(s != Full() for groups in plan.values() for s in groups) >= 3
    )
    assert total(profile, found.plan.groups, 0.3) == pytest.approx(best)
    assert found.loss == pytest.approx(best)
    assert found.bound <= best + 1e-9
    assert found.gap <= 1e-4
    assert found.plan.converted == pytest.approx(0.5)


@pytest.mark.parametrize("share", [0.2, 0.4, 0.7])
def test_several_budgets_hold_at_once_and_the_plan_is_still_the_best(share):
    profile = make_profile(layers=3, seed=1)
    costs = analytic(profile.sites, profile.candidates.values(), (1000, 200), 1, 2)
    budgets = {"kv_bytes": {1000: f"{100 * share:g}%"}, "flops": {200: "80%"}}
    found = select(profile, settings_of(budgets=budgets), "m", costs=costs)

    def within(plan):
        sites = {site: plan[site.name] for site in profile.sites}
        full = {site: (Full(),) * site.kv_heads for site in profile.sites}
        limits = (("kv_bytes", 1000, share), ("flops", 200, 0.8))
        return all(plan_cost(costs, r, sites, n) <= x * plan_cost(costs, r, full, n) * 1.000001 for r, n, x in limits)

    assert within(found.plan.groups)
    best = min(total(profile, plan) for plan in every_plan(profile) if within(plan))
    assert found.loss == pytest.approx(best, rel=1e-4)
    kv = found.costs["kv_bytes at 1,000 tokens"]
    assert kv["used"] <= kv["limit"] == pytest.approx(share * kv["original"])


def test_an_absolute_budget_is_in_bytes():
    profile = make_profile()
    original = 8 * 1000 * 2 * 8 * 2  # groups, tokens, keys and values, dimension, bytes
    found = select(profile, settings_of(budgets={"kv_bytes": {1000: 0.4 * original}}), "m")
    assert found.costs["kv_bytes at 1,000 tokens"]["original"] == original
    assert used(found.plan) <= 0.4
    same = select(profile, settings_of(budgets={"kv_bytes": {1000: "40%"}}), "m")
    assert same.plan == found.plan


def test_milliseconds_need_measured_costs():
    with pytest.raises(UsageError, match="run `attnconvert costs` first"):
        select(make_profile(), settings_of(budgets={"prefill_ms": {1000: "50%"}}), "m")


class Priced:
    """Costs with launches: every kind of operator in a layer takes 10 ms, and the rest of the model 100 ms."""

    def base(self, resource, length):
        return 100.0

    def launch_cost(self, resource, site, kind, length):
        return 10.0

    def group_cost(self, resource, site, spec, length):
        return 20.0 if spec == Full() else 1.0


def test_launches_and_the_rest_of_the_model_are_in_a_budget_of_time():
    profile = make_profile(layers=2, candidates=(Linear(),), scales=(1.0,))
    original = 100 + 2 * 10 + 4 * 20
    for allowed, converted in ((original, 0), (original - 9, 1), (original - 18, 2), (124, 4)):
        found = select(profile, settings_of(budgets={"decode_ms": {1000: allowed}}), "m", costs=Priced())
        assert sum(s != Full() for s in specs_of(found.plan)) == converted
        assert found.costs["decode_ms at 1,000 tokens"]["used"] <= allowed
    with pytest.raises(
        UsageError, match=r"cheapest plan takes 124 ms of 200 ms, allowed are 120 ms \(decode_ms at 1,0"
    ):
        select(profile, settings_of(budgets={"decode_ms": {1000: 120}}), "m", costs=Priced())


def test_a_layer_has_at_most_so_many_kinds_of_operator():
    profile = make_profile(kv_heads=3, candidates=(WIDE, Linear()), scales=(1.0, 0.9))
    for method in ("damage", "greedy", "uniform", "random"):
        operator = {"operator": {"operator": "linear"}} if method in ("uniform", "random") else {}
        given = {"method": method, "groups": 0.5, **operator}
        for groups in select(profile, settings_of(kinds=1, **given), "m").plan.groups.values():
            assert len({isinstance(spec, Linear) for spec in groups}) == 1, method
    free = select(profile, settings_of(groups=0.5), "m").plan
    assert any(len({isinstance(spec, Linear) for spec in groups}) == 2 for groups in free.groups.values())


def test_whole_layers_where_the_unit_is_a_layer():
    plan = select(make_profile(), SelectSettings(unit="layer", layers=2), "m").plan
    assert sorted(len(set(groups)) for groups in plan.groups.values()) == [1] * 4
    assert sum(groups[0] != Full() for groups in plan.groups.values()) == 2


def test_scores_take_the_place_of_the_profile():
    profile, settings = make_profile(), settings_of(groups=0.25)
    before = select(profile, settings, "m").plan
    taken = [(n, g) for n, s in enumerate(profile.sites) for g, x in enumerate(before.groups[s.name]) if x != Full()]
    after = select(profile, settings, "m", scores={group: {label(WIDE): 9.0, label(NARROW): 9.0} for group in taken})
    assert all(after.plan.groups[profile.sites[n].name][g] == Full() for n, g in taken)
    assert after.plan.converted == before.converted


@pytest.mark.parametrize("method", ["first_order", "output_error", "moa"])
def test_other_scores_go_through_the_same_program(method):
    profile = make_profile(layers=3)
    found = select(profile, settings_of(method=method, groups=0.5, needle_weight=0.0), "m")
    best = select(profile, settings_of(method="damage", groups=0.5, needle_weight=0.0), "m")
    assert found.plan == best.plan, "the synthetic scores are in the order of the damage"
    assert "by " + method in found.reasons["layers.0.attn"][0] + found.reasons["layers.0.attn"][1]


def test_moa_counts_the_influence_beyond_the_window():
    profile = make_profile(layers=1, kv_heads=1)
    x = [heads[1] for heads in profile.influence["table"][0]]
    found = select(profile, settings_of(method="moa", groups=1.0), "m")
    assert specs_of(found.plan) == [WIDE]
    assert found.loss == pytest.approx(sum(x) * (1 + 0.5)), "64 tokens are blocks 0 to 3 of six"


# --- what the settings forbid and tie ---------------------------------------------------------------------------------

ALL = [
    "damage",
    "uniform",
    "interleaved",
    "random",
    "greedy",
    "mass",
    "duo",
    "linvideo",
    "moa",
    "first_order",
    "restore",
]


def measured(profile):
    """What a whole plan loses, in this test: a bit more than the sum."""

    def measure(chosen):
        names = {
            site.name: [chosen.get((n, g), Full()) for g in range(site.kv_heads)]
            for n, site in enumerate(profile.sites)
        }
        return {"kl": 1.2 * total(profile, names, 0.0), "needle": 0.0}

    return measure


@pytest.mark.parametrize("method", ALL)
def test_every_method_meets_the_budget_and_protects_and_shares(method):
    profile = make_profile(layers=6)
    given = {"method": method, "protect": [0], "share": [[2, 4]], "budgets": {"kv_bytes": {1000: "50%"}}}
    found = select(profile, settings_of(**given), "m", measure=measured(profile))
    assert 0.25 < used(found.plan) <= 0.5, "and no more is converted than it takes"
    assert found.plan.groups["layers.0.attn"] == (Full(), Full())
    assert found.plan.groups["layers.2.attn"] == found.plan.groups["layers.4.attn"]
    assert found.reasons["layers.0.attn"][0] == "kept full: layer 0 is protected"
    assert all(all(words) for words in found.reasons.values()), "every group has a reason"


@pytest.mark.parametrize("method", ALL)
def test_groups_that_retrieve_are_kept_whatever_their_damage(method):
    profile = make_profile()
    given = settings_of(method=method, groups=0.74, retrieval_keep=0.5)
    found = select(profile, given, "m", measure=measured(profile))
    assert found.plan.groups["layers.2.attn"][1] == Full()
    assert "retrieval score 0.80" in found.reasons["layers.2.attn"][1]


@pytest.mark.parametrize("method", ALL)
def test_a_head_that_is_constant_or_no_number_keeps_its_group_full(method):
    profile = make_profile()
    statistics = {name: [list(row) for row in table] for name, table in profile.statistics.items()}
    statistics["entropy"][1][0] = None
    profile = dataclasses.replace(
        profile, statistics=statistics, problems=["L3H2 gives the same output for every token"]
    )
    found = select(profile, settings_of(method=method, groups=0.5), "m", measure=measured(profile))
    assert found.plan.groups["layers.1.attn"][0] == found.plan.groups["layers.3.attn"][1] == Full()
    assert found.reasons["layers.1.attn"][0] == "kept full: head 0 is constant or not a number"
    assert found.reasons["layers.3.attn"][1] == "kept full: head 2 is constant or not a number"
    assert found.problems == profile.problems


@pytest.mark.parametrize("method", ALL)
def test_layers_whose_own_window_is_as_small_are_left_alone(method):
    profile = make_profile()
    sites = tuple(dataclasses.replace(s, limit=16) if s.layer < 2 else s for s in profile.sites)
    profile = dataclasses.replace(profile, sites=sites)
    plan = select(profile, settings_of(method=method, groups=0.5), "m", measure=measured(profile)).plan
    assert plan.groups["layers.0.attn"] == plan.groups["layers.1.attn"] == (Full(), Full())
    assert plan.converted == 0.5
    with pytest.raises(UsageError):
        select(profile, settings_of(method=method, groups=0.6), "m", measure=measured(profile))


def test_a_cell_that_was_not_measured_forbids_its_candidate():
    profile = make_profile()
    damage = {name: {m: [list(row) for row in t] for m, t in table.items()} for name, table in profile.damage.items()}
    damage[label(WIDE)]["kl"][1][1] = None
    damage[label(NARROW)]["kl"][1][1] = float("nan")
    found = select(dataclasses.replace(profile, damage=damage), settings_of(groups=0.8), "m")
    assert found.plan.groups["layers.1.attn"][1] == Full()
    assert found.reasons["layers.1.attn"][1] == "kept full: nothing was measured that could stand in"


def test_layers_that_do_not_exist_or_cannot_share_are_refused():
    profile = make_profile()
    with pytest.raises(UsageError, match="select.protect names layer 9, but the model has layers 0–3"):
        select(profile, settings_of(groups=0.5, protect=[9]), "m")
    sites = (dataclasses.replace(profile.sites[0], kv_heads=1), *profile.sites[1:])
    with pytest.raises(UsageError, match=r"layers 0, 1 have different numbers of KV groups: \[1, 2\]"):
        select(dataclasses.replace(profile, sites=sites), settings_of(groups=0.2, share=[[0, 1]]), "m")


# --- what others do ---------------------------------------------------------------------------------------------------


def test_random_and_uniform_meet_the_same_share():
    for method in ("random", "uniform"):
        assert select(make_profile(8), SelectSettings(method=method, groups=0.5), "m").plan.converted == 0.5
    plans = [select(make_profile(8), SelectSettings(method="random", groups=0.5, seed=s), "m").plan for s in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]


@pytest.mark.parametrize(("layers", "converted", "full"), [(12, 10, {5, 11}), (12, 9, {3, 7, 11}), (6, 6, set())])
def test_interleaving_leaves_every_nth_layer_full(layers, converted, full):
    given = settings_of(method="interleaved", unit="layer", layers=converted)
    plan = select(make_profile(layers), given, "m").plan
    assert {n for n, groups in enumerate(plan.groups.values()) if groups == (Full(), Full())} == full


def test_greedy_is_no_better_than_the_program_and_better_than_chance():
    losses = {}
    for method in ("damage", "greedy", "random"):
        given = {"method": method, "budgets": {"kv_bytes": {1000: "30%"}}, "seed": 3}
        losses[method] = sum(
            total(p, select(p, settings_of(**given), "m").plan.groups)
            for p in map(make_profile, [8] * 5, [2] * 5, range(5))
        )
    assert losses["damage"] <= losses["greedy"] < losses["random"]


def test_mass_converts_the_groups_that_lose_least_of_their_attention():
    profile = make_profile()
    found = select(
        profile, settings_of(method="mass", groups=0.5, operator={"operator": "window", "size": 64, "sinks": 1}), "m"
    )
    lost = {(n, g): sum(profile.mass_lost[label(WIDE)][n][2 * g : 2 * g + 2]) for n in range(4) for g in range(2)}
    wanted = sorted(lost, key=lost.get)[:4]
    assert {(n, g) for n in range(4) for g in range(2) if found.plan.groups[f"layers.{n}.attn"][g] != Full()} == set(
        wanted
    )


@pytest.mark.parametrize("method", ["duo", "linvideo"])
def test_gates_decide_in_their_order(method):
    profile = make_profile()
    found = select(profile, settings_of(method=method, groups=0.5), "m")
    gates = sorted((profile.gates[method][n][g], n, g) for n in range(4) for g in range(2))
    assert all(found.plan.groups[f"layers.{n}.attn"][g] == WIDE for _, n, g in gates[:4])
    assert found.plan.converted == 0.5


def test_restoration_gives_back_what_lowers_the_measured_loss_most_and_measures_little():
    profile, calls = make_profile(), []
    joint = measured(profile)

    def measure(chosen):
        calls.append(chosen)
        return joint(chosen)

    found = select(profile, settings_of(method="restore", groups=0.5), "m", measure=measure)
    damage = sorted((profile.damage[label(WIDE)]["kl"][n][g], n, g) for n in range(4) for g in range(2))
    assert {(n, g) for _, n, g in damage[4:]} == {
        (n, g) for n in range(4) for g in range(2) if found.plan.groups[f"layers.{n}.attn"][g] == Full()
    }
    assert len(calls) <= 1 + 8 + 4, "all once, and then the leader only"
    with pytest.raises(UsageError, match="method restore measures whole plans"):
        select(profile, settings_of(method="restore", groups=0.5), "m")


def test_restoration_measures_again_what_others_may_have_made_superfluous():
    a, b, c, d = ((n, g) for n in range(2) for g in range(2))

    def measure(chosen):  # a and b stand in for each other
        return {"kl": 2.0 * (a in chosen and b in chosen) + (c in chosen) + 0.1 * (d in chosen), "needle": 0.0}

    found = select(make_profile(layers=2), settings_of(method="restore", groups=0.5), "m", measure=measure)
    full = [(n, g) for n in range(2) for g in range(2) if found.plan.groups[f"layers.{n}.attn"][g] == Full()]
    assert full == [a, c]
    assert found.reasons["layers.1.attn"][0] == "restored as number 2: lowers the measured loss by 1.0000"


@pytest.mark.parametrize(
    ("method", "missing", "setting"),
    [
        ("damage", {"damage": {}}, "profile.damage"),
        ("greedy", {"damage": {}}, "profile.damage"),
        ("first_order", {"first_order": {}}, "profile.gradients"),
        ("moa", {"influence": None}, "profile.gradients"),
        ("mass", {"mass_lost": {}}, "window"),
        ("duo", {"gates": {}}, "add duo to profile.gates"),
        ("linvideo", {"gates": {"duo": []}}, "add linvideo to profile.gates"),
    ],
)
def test_a_method_whose_table_is_missing_says_which_setting_makes_it(method, missing, setting):
    with pytest.raises(UsageError, match=setting):
        select(dataclasses.replace(make_profile(), **missing), settings_of(method=method, groups=0.5), "m")


def test_explicit_layers():
    settings = settings_of(method="explicit", explicit={"1-2": {"operator": "hybrid"}})
    plan = select(make_profile(), settings, "m").plan
    assert [groups[0] for groups in plan.groups.values()] == [Full(), Hybrid(), Hybrid(), Full()]
    settings = settings_of(method="explicit", explicit={"9": {"operator": "hybrid"}})
    with pytest.raises(UsageError, match="names layer 9, but the model has layers 0–3"):
        select(make_profile(), settings, "m")
    profile = make_profile()
    limited = dataclasses.replace(profile, sites=(dataclasses.replace(profile.sites[0], limit=16), *profile.sites[1:]))
    with pytest.raises(UsageError, match=r"layers\.0\.attn has a sliding window of 16 tokens of its own"):
        select(limited, settings_of(method="explicit", explicit={"0": {"operator": "hybrid"}}), "m")


# --- quality first ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.05, 0.5, 2.0, 100.0])
def test_the_cheapest_plan_of_a_quality_is_measured_to_keep_it(keep):
    profile = make_profile(layers=3)
    settings = settings_of(keep_quality=keep, needle_weight=0.0, budgets={"kv_bytes": {1000: "100%"}})
    found = select(profile, settings, "m", measure=measured(profile))
    assert found.measured["kl"] <= keep
    assert found.predicted["kl"] == pytest.approx(found.measured["kl"] / 1.2)
    fitting = [p for p in every_plan(profile) if 1.2 * total(profile, p, 0.0) <= keep]
    best = min(sum(BYTES[label(s)] for groups in p.values() for s in groups) / 6 for p in fitting)
    assert used(found.plan) <= best + 0.05


def test_keep_quality_needs_something_to_measure_with_and_can_be_out_of_reach():
    profile = make_profile()
    with pytest.raises(UsageError, match="keep_quality measures whole plans"):
        select(profile, settings_of(keep_quality=0.1), "m")
    settings = settings_of(keep_quality=0.1, budgets={"kv_bytes": {1000: "10%"}})
    with pytest.raises(UsageError, match=r"no plan keeps select.keep_quality: 0.1: .* measured KL of"):
        select(profile, settings, "m", measure=measured(profile))


# --- what cannot be ---------------------------------------------------------------------------------------------------


def test_a_budget_that_cannot_be_met_is_said():
    with pytest.raises(
        UsageError, match=r"groups: 1\.0: 7 of 8 KV groups may be converted \(retrieval_keep: 0.5 keeps 1\)"
    ):
        select(make_profile(), SelectSettings(groups=1.0, retrieval_keep=0.5), "m")
    small = settings_of(budgets={"kv_bytes": {1000: "1%"}})
    with pytest.raises(
        UsageError, match=r"kv_bytes.1000: 1%.*cheapest plan takes 4.2 KiB of 250 KiB, allowed are 2.5 KiB"
    ):
        select(make_profile(), small, "m")
    for method in ALL:
        with pytest.raises(UsageError, match=r"budgets.kv_bytes.1000: 1%"):
            given = settings_of(method=method, budgets={"kv_bytes": {1000: "1%"}})
            select(make_profile(), given, "m", measure=measured(make_profile()))


def test_a_profile_of_something_else_is_refused():
    profile = make_profile()
    identity = {"model": "tiny", "revision": "r1", "sha256": "abc"}
    require_profile(profile, identity, [NARROW, WIDE])
    require_profile(profile, identity | {"revision": None}, [WIDE, NARROW])
    for changed, message in (
        ({"model": "other"}, "of another model: tiny, not other"),
        ({"revision": "r2"}, "of another revision: r1, not r2"),
        ({"sha256": "x"}, "of another weights"),
    ):
        with pytest.raises(UsageError, match=message):
            require_profile(profile, identity | changed, [WIDE, NARROW])
    with pytest.raises(
        UsageError, match="of other operators: window-64-1, window-16-1, while the recipe has window-64-1"
    ):
        require_profile(profile, identity, [WIDE])
    with pytest.raises(UsageError, match="does not say of which model"):
        require_profile(dataclasses.replace(profile, data={}), identity, [WIDE, NARROW])


# --- in words ---------------------------------------------------------------------------------------------------------


def test_a_head_is_explained_in_words():
    profile = make_profile()
    found = select(profile, settings_of(groups=0.5, retrieval_keep=0.5), "m")
    text = "\n".join(explain(profile, found.to_json(), found.plan, "L2H3"))
    assert "head 3 of layer 2 is in KV group 1 (heads 2–3): full attention" in text
    assert "retrieval score 0.80 is above 0.50" in text
    assert "window-64-1: alone it costs KL" in text
    assert "highest of 8 groups" in text
    whole = explain(profile, found.to_json(), found.plan, "l2")
    assert sum("KV group" in line for line in whole) == 2
    assert explain(profile, found.to_json(), found.plan, "L2G0")[0].startswith("layer 2, KV group 0 (heads 0–1): ")


def test_the_price_of_a_group_is_the_budget_at_which_it_changes():
    profile = make_profile(layers=8)
    given = {"needle_weight": 0.0, "operator": {"operator": "window", "size": 64, "sinks": 1}}
    found = select(profile, settings_of(groups=0.5, **given), "m")
    for site in profile.sites:
        for g, entry in enumerate(found.switches[site.name]):
            assert (entry["to"] == "full") == (found.plan.groups[site.name][g] != Full())
            there = settings_of(groups=1 - entry["amount"] / 16, **given)
            after = select(profile, there, "m").plan.groups[site.name][g]
            assert label(after) == entry["to"]
    text = "\n".join(explain(profile, found.to_json(), found.plan, "L0G0"))
    assert "it would become" in text
    assert "(now 8 groups left full)" in text


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("L9", "no layer 9: the model has layers 0–3"),
        ("L2H4", "layer 2 has no head 4: its heads are 0–3"),
        ("L2G2", "layer 2 has no KV group 2: its KV groups are 0–1"),
        ("seventeen", "write L17H3 for a head"),
    ],
)
def test_a_head_that_does_not_exist_is_told(where, message):
    profile = make_profile()
    found = select(profile, settings_of(groups=0.5), "m")
    with pytest.raises(UsageError, match=message):
        explain(profile, found.to_json(), found.plan, where)


def test_an_edited_or_explicit_plan_can_be_explained_too():
    profile = dataclasses.replace(make_profile(), damage={}, mass_lost={})
    found = select(profile, settings_of(method="explicit", explicit={1: {"operator": "linear"}}), "m")
    text = "\n".join(explain(profile, found.to_json(), found.plan, "L1H0"))
    assert "converted to linear-hedgehog" in text
    assert "its damage was not measured" in text
    assert (
        explain(profile, {}, found.plan, "L0")[0]
        == "layer 0, KV group 0 (heads 0–1): full attention, as in the original"
    )


def test_a_task_keeps_whole_units_together():
    task = make_task(make_profile(), settings_of(unit="layer", groups=0.5, share=[[1, 3]]))
    assert task.units == (((0, 0), (0, 1)), ((1, 0), (1, 1), (3, 0), (3, 1)), ((2, 0), (2, 1)))
    assert task.full.tolist() == [0, 3, 6]


def test_greedy_ends_where_two_operators_save_two_resources():
    """A unit must not go round between what saves one and what saves the other."""
    profile = make_profile(candidates=(WIDE, NARROW))
    for flops, size in itertools.product((0.3, 0.6, 0.9), (0.03, 0.2, 0.6)):
        budgets = {"flops": {1000: f"{flops:.0%}"}, "kv_bytes": {1000: f"{size:.0%}"}}
        with contextlib.suppress(UsageError):
            found = select(profile, settings_of(method="greedy", budgets=budgets), "m")
            assert all(cost["used"] <= cost["limit"] * (1 + 1e-6) for cost in found.costs.values())


def test_more_layers_than_the_model_has_are_refused():
    with pytest.raises(UsageError, match="the model has 4"):
        select(make_profile(), settings_of(layers=6, unit="layer"), "m")
