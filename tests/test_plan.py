"""Plans: the way through YAML, comments for a person, and every mistake of an edited one with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnconvert.convert.errors import UsageError
from attnconvert.convert.hosts.sites import Site
from attnconvert.convert.plan import Plan, check_plan, read_plan, write_plan
from attnconvert.kernels.spec import Full, Hybrid, Window

WIDE = Window(size=64, sinks=1)
PLAN = Plan("m", {"layers.0.attn": (WIDE, Full()), "layers.1.attn": (Hybrid(), Hybrid())})
SITES = [Site(f"layers.{n}.attn", n, 4, 2, 8) for n in range(2)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_plan(tmp_path / "plan.yaml", PLAN)
    return tmp_path / "plan.yaml"


def test_plans_round_trip_and_bad_ones_are_refused(path: Path) -> None:
    assert read_plan(path) == PLAN
    assert PLAN.for_sites(SITES)[SITES[0]] == [WIDE, Full()]
    with pytest.raises(UsageError, match=r"names 'layers\.1\.attn', which this model does not have"):
        PLAN.for_sites(SITES[:1])
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


def test_reasons_stand_beside_the_groups_that_a_rule_keeps(path: Path) -> None:
    rule, damage = "kept full: retrieval score 0.80 is above 0.50", "kept full: window-64-1 costs KL 0.1"
    write_plan(path, PLAN, {"layers.0.attn": ["converted: x", rule], "layers.1.attn": ["converted", damage]})
    lines = path.read_text().splitlines()
    assert "  layers.0.attn: [window-64-1, full]  # kept full 1: retrieval score 0.80 is above 0.50" in lines
    assert lines[-1].endswith("[hybrid-64-4-hedgehog, hybrid-64-4-hedgehog]"), "damage is for --explain"
    assert read_plan(path) == PLAN


def test_a_plan_that_fits_has_no_problems(path: Path) -> None:
    assert check_plan(path, SITES) == ([], [])
    more = [*SITES, Site("layers.2.attn", 2, 4, 2, 8)]
    assert check_plan(path, more) == ([], ["1 of 3 sites are not named and stay full: layers.2.attn"])


def test_every_mistake_of_an_edited_plan_is_told_at_once_with_its_line(path: Path) -> None:
    path.write_text(
        """\
attnconvert: 2
modle: m
operators:
  near: {operator: windw, size: 64}
  far: {operator: window, size: 64}
  odd: window
sites:
  layers.0.attn: [far, fra]
  layers.1.attn: [far, full, full]
  layers.01.attn: [near, far]
  layers.2.attn: far
  layers.3.attn: [far, full]
"""
    )
    sites = [*SITES, Site("layers.2.attn", 2, 4, 2, 8), Site("layers.3.attn", 3, 4, 2, 8, limit=32)]
    problems, notes = check_plan(path, sites)
    told = [str(problem).removeprefix(str(path)) for problem in problems]
    for line, expected in zip(
        told,
        (
            ":1:1: attnconvert: must be 1, the format of plans, not 2",
            ":2:1: modle: unknown key; did you mean 'model'?",
            ":4:3: operators.near: no operator 'windw': did you mean 'window'?",
            ":6:3: operators.odd: must be an operator such as",
            ":8:24: sites.layers.0.attn.1: 'fra' is not among the plan's operators; did you mean 'far'?",
            ":9:3: sites.layers.1.attn: has 3 operators, but the site has 2 KV groups",
            ":10:3: sites.layers.01.attn: this model has no such site; did you mean 'layers.1.attn'?",
            ":11:3: sites.layers.2.attn: must be a list of labels, one per KV group, not 'far'",
            ":12:19: sites.layers.3.attn.0: does not fit: layers.3.attn has a sliding window of 32 tokens of its own",
        ),
        strict=True,
    ):
        assert line.startswith(expected)
    assert notes == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n", ":1:1: is no plan: it needs the keys"),
        ("attnconvert: 1\nmodel: m\nsites: 3\n", ":3:1: sites: must map sites to lists of labels, not 3"),
        ("attnconvert: 1\nmodel: m\nsites: {}\noperators: 3\n", ":4:1: operators: must map labels to operators, not 3"),
        ("attnconvert: 1\nsites: {}\nsites: {}\n", ":3:1: sites: this key is given twice, first in line 2"),
    ],
)
def test_what_is_no_plan_is_told_in_its_place(path: Path, text: str, expected: str) -> None:
    path.write_text(text)
    problems, _ = check_plan(path, SITES)
    assert str(problems[0]).removeprefix(str(path)).startswith(expected)


def test_a_file_that_cannot_be_read_as_yaml_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no plan here"):
        check_plan(tmp_path / "none.yaml", SITES)
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UsageError, match=r"bad.yaml:1:5: not YAML"):
        check_plan(tmp_path / "bad.yaml", SITES)
