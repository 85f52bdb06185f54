"""`attnconvert costs` and `attnconvert select` as a user meets them, on a tiny model."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from commands import attnconvert, finished, place, whole

from attnconvert.convert.damage import joint_loss
from attnconvert.convert.options import budget_overrides

__all__ = ["attnconvert", "finished", "place", "whole"]  # fixtures


def test_costs_times_the_candidates_and_keeps_the_table_with_the_machine(attnconvert, finished):
    found = attnconvert("costs", finished, "--lengths", "64,128", "--repeats", "1", "--json")
    assert found.code == 0
    kept = json.loads((finished / "costs" / "costs.json").read_text())
    assert kept["machine"]["cpu"] == found.document["machine"]["cpu"]
    assert found.document["lengths"] == [64, 128]
    rows = found.document["tables"][0]["rows"]
    assert {row["operator"] for row in rows} == {"full", "window-16-2", "hybrid-8-2-hedgehog"}
    assert all(row["prefill_ms"] > 0 and row["prefill_measured"] for row in rows)
    samples = {path: path.stat().st_mtime_ns for path in (finished / "costs").glob("*/*.json")}
    shown = attnconvert("costs", finished, "--lengths", "64", "--repeats", "1")
    assert "window-16-2" in shown.out
    assert {path: path.stat().st_mtime_ns for path in samples} == samples, "nothing is timed twice"
    more = attnconvert("costs", finished, "--lengths", "96", "--batch", "2", "--repeats", "1", "--json")
    assert (more.code, more.document["batch"]) == (0, 2)
    budget = attnconvert("select", finished, "--prefill-ms", "100%@96", "--json")
    assert budget.code == 0
    assert json.loads((finished / "costs" / "costs.json").read_text())["batch"] == 2, "budgets are at the table's batch"


def test_budgets_on_the_command_line_take_the_place_of_the_recipes(attnconvert, finished):
    chosen = attnconvert("select", finished, "--kv-bytes", "50%@128", "--flops", "90%@128", "--json")
    assert chosen.code == 0
    arm = chosen.document["arms"]["student"]
    for name, resource in (("kv_bytes", 0.5), ("flops", 0.9)):
        (found,) = [cost for cost in arm["costs"].values() if cost["resource"] == name]
        assert found["used"] <= resource * found["original"] * (1 + 1e-6)
    recipe = yaml.safe_load((finished / "recipe.yaml").read_text())["select"]
    assert recipe.get("groups") is None
    assert recipe["budgets"] == {"kv_bytes": {128: "50%"}, "flops": {128: "90%"}}


def test_a_budget_in_milliseconds_is_measured_on_the_way(attnconvert, finished):
    found = attnconvert("select", finished, "--prefill-ms", "100%@64", "--json")
    assert found.code == 0
    assert (finished / "costs" / "costs.json").exists()
    (cost,) = found.document["arms"]["student"]["costs"].values()
    assert (cost["resource"], cost["length"]) == ("prefill_ms", 64)


def test_a_budget_that_cannot_be_met_says_what_the_cheapest_plan_costs(attnconvert, finished):
    before = (finished / "plan.yaml").read_text()
    refused = attnconvert("select", finished, "--kv-bytes", "1%@128")
    assert refused.code == 2
    assert "kv_bytes" in refused.message
    assert "cheapest" in refused.message
    assert (finished / "plan.yaml").read_text() == before, "nothing is lost"


@pytest.mark.parametrize("given", ["40%", "40%@", "@128", "40%@many"])
def test_an_amount_without_a_length_is_refused_with_an_example(attnconvert, whole, given):
    refused = attnconvert("select", whole, "--kv-bytes", given)
    assert refused.code == 2
    assert "--kv-bytes 40%@8192" in refused.message


def test_refinement_measures_whole_plans_and_never_ends_with_a_worse_one(attnconvert, finished):
    found = attnconvert("select", finished, "--set", "select.rounds=2", "--set", "select.measure_cases=2", "--json")
    assert found.code == 0
    arm = found.document["arms"]["student"]
    losses = [line["loss"] for line in arm["refinement"]]
    assert joint_loss(arm["measured"], 1.0) == pytest.approx(min(losses))
    assert list((finished / "select" / "measured-2").glob("joint-*.json"))


def test_the_cheapest_plan_that_keeps_the_quality_is_measured(attnconvert, finished):
    found = attnconvert("select", finished, "--keep-quality", "0.5", "--kv-bytes", "100%@128", "--json")
    assert found.code == 0
    assert found.document["arms"]["student"]["measured"]["kl"] <= 0.5


@pytest.mark.parametrize("where", ["L1H3", "L1G0", "L1"])
def test_explain_says_in_words_why(attnconvert, whole, where):
    found = attnconvert("select", whole, "--explain", where)
    assert found.code == 0
    assert "layer 1" in found.out
    assert "window-16-2" in found.out


def test_a_cheapest_plan_may_be_asked_of_a_run_that_refines(attnconvert, finished):
    assert attnconvert("select", finished, "--set", "select.rounds=1", "--set", "select.measure_cases=1").code == 0
    assert attnconvert("select", finished, "--keep-quality", "9").code == 0


def test_explain_says_that_a_plan_was_edited(attnconvert, finished):
    plan = finished / "plan.yaml"
    was = yaml.safe_load(plan.read_text())
    site, labels = next((site, labels) for site, labels in was["sites"].items() if labels[0] != "full")
    was["sites"][site] = ["full", *labels[1:]]
    plan.write_text(yaml.safe_dump(was))
    layer = site.split(".")[2]
    assert "the plan was edited" in attnconvert("select", finished, "--explain", f"L{layer}G0").out


def test_a_budget_given_twice_is_refused(attnconvert, whole):
    refused = attnconvert("select", whole, "--kv-bytes", "40%@128", "--kv-bytes", "30%@128")
    assert refused.code == 2
    assert "twice" in refused.message


def test_explain_of_a_head_that_is_not_there_names_the_range(attnconvert, whole):
    refused = attnconvert("select", whole, "--explain", "L9H0")
    assert refused.code == 2
    assert "0–2" in refused.message


def test_check_tells_every_problem_of_an_edited_plan_with_its_line(attnconvert, whole, tmp_path):
    good = attnconvert("select", whole, "--check", whole / "plan.yaml")
    assert good.code == 0
    text = (whole / "plan.yaml").read_text()
    bad = tmp_path / "plan.yaml"
    bad.write_text(text.replace("model.layers.1.self_attn", "model.layers.7.self_attn") + "extra: 1\n")
    refused = attnconvert("select", whole, "--check", bad)
    assert refused.code == 2
    assert f"{bad}:" in refused.err
    assert "layers.7" in refused.err
    assert "extra" in refused.err


def test_a_profile_of_another_model_is_refused(attnconvert, finished, tmp_path):
    path = finished / "profile" / "profile.json"
    profile = json.loads(path.read_text())
    profile["data"]["identity"]["sha256"] = {"model.safetensors": "0" * 64}
    path.write_text(json.dumps(profile))
    refused = attnconvert("select", finished, "--set", "select.groups=0.5")
    assert refused.code == 2
    assert "another weights" in refused.message or "profile again" in refused.message


def test_an_older_profile_is_refused_by_its_format(attnconvert, finished):
    path = finished / "profile" / "profile.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 1}))
    refused = attnconvert("select", finished, "--set", "select.groups=0.5")
    assert refused.code == 2
    assert "attnconvert profile" in refused.message


def test_learned_gates_are_trained_where_the_profile_asks_for_them(attnconvert, place, tmp_path):
    out = Path(shutil.copytree(place, tmp_path / "place")) / "run"
    recipe = out.parent / "recipe.yaml"
    settings = ["--set", "profile.gates=[duo, linvideo]", "--set", "profile.gate_steps=2"]
    assert attnconvert("profile", recipe, "--out", out, *settings).code == 0
    profile = json.loads((out / "profile" / "profile.json").read_text())
    assert set(profile["gates"]) == {"duo", "linvideo"}
    for method in ("duo", "linvideo", "moa", "mass", "first_order", "output_error", "greedy", "interleaved"):
        given = ["--set", f"select.method={method}", "--set", "select.operator={operator: window, size: 16, sinks: 2}"]
        assert attnconvert("select", out, *given).code == 0, method
    restored = ["--set", "select.method=restore", "--set", "select.measure_cases=1", "--set", "select.operator=null"]
    assert attnconvert("select", out, *restored).code == 0


def test_what_is_no_budget_leaves_the_recipe_alone():
    assert budget_overrides({"kv_bytes": None, "flops": []}, None) == []
