"""Operators from other files: registered, held to the rules, used by a run, carried by its checkpoint, or refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import yaml
from commands import RECIPE, Command, attnconvert, place  # noqa: F401 – fixtures
from models import tiny

import attnconvert as package
from attnconvert.convert.errors import UsageError
from attnconvert.convert.export import export, verify
from attnconvert.convert.keys import STAGES, stage_key
from attnconvert.convert.recipe import load_recipe
from attnconvert.kernels import operators, outside, spec_registry
from attnconvert.kernels.spec import OPERATORS, Window, spec_from_dict
from attnconvert.kernels.testing import rules

ROOT = Path(__file__).parents[1]
OWN = ROOT / "docs" / "examples" / "taylor.py"


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing from outside is registered, and what a test registers is forgotten after it."""
    kept = dict(OPERATORS), dict(outside._loaded)
    for name in set(OPERATORS) - set(operators.FILES):
        del OPERATORS[name]
    outside._loaded.clear()
    yield
    for held, before in zip((OPERATORS, outside._loaded), kept, strict=True):
        held.clear()
        held.update(before)  # type: ignore[arg-type]


def variant(folder: Path, *changes: tuple[str, str], name: str = "own.py") -> Path:
    """The operator of the docs with some of its text replaced."""
    text = OWN.read_text(encoding="utf-8")
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


BROKEN = [
    ("fk = fk * real[:, None, :, None]", "pass", "padding_changes_nothing"),
    ("w = w.tril() if call.causal else w", "w = w.tril()", "both_ways_equal_reference"),
    ("state=None if state is None else state.s)", "state=None)", "pieces_agree"),
    ("return 4.0 * (8 +", "return 2.0 * (8 +", "costs_are_counted"),
    ("* 2**-0.5], -1)", "* 0.5], -1)", "equals_reference"),
    ("ops.linear_attention(fq, fk, v,", "ops.linear_attention(fq, fk, v.detach(),", "gradients_agree"),
    ("-1).to(x.dtype)", "-1).nan_to_num().to(x.dtype) + 1e30", "low_precision_is_close"),
]


@pytest.mark.parametrize(("old", "new", "rule"), BROKEN, ids=[row[2] for row in BROKEN])
def test_an_operator_that_breaks_a_rule_is_caught_by_it(
    old: str, new: str, rule: str, tmp_path: Path, fresh: None
) -> None:
    (name,) = outside.load(variant(tmp_path, (old, new)))
    spec = OPERATORS[name]()
    with pytest.raises(AssertionError):
        next(each for each in rules(spec) if each.__name__ == rule)(spec)


def test_the_command_tells_every_rule_and_the_broken_ones(
    attnconvert: Command,  # noqa: F811
    tmp_path: Path,
    fresh: None,
) -> None:
    broken = variant(tmp_path, ("return 4.0 * (8 +", "return 2.0 * (8 +"))
    checked = attnconvert("operators", "check", broken, "--json")
    assert checked.code == 4
    assert [row["rule"] for row in checked.document if row["broken"]] == ["costs are counted"]
    assert len(checked.document) == 10
    assert "1 of 10 rules are broken; the first: taylor-16: costs are counted: bytes after 3 tokens" in checked.message
    listed = attnconvert("operators", "ls", "--json").document
    assert set(listed) == {*operators.FILES, "taylor"}
    assert listed["window"]["settings"] == {"size": 128, "sinks": 4}
    assert attnconvert("operators", "check", tmp_path / "none.py").code == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([('@operator("taylor")\n', "")], "registers no operator: decorate its spec"),
        ([('@operator("taylor")', '@operator("window")')], "operator 'window' is registered twice"),
        ([("def state_size(", "def other_size(")], "operator 'taylor' lacks state_size: define them in"),
        ([("def attend(", "def attends(")], "operator 'taylor' lacks attend"),
        ([("size: int = 16", "size: int = 17")], "size must be a multiple of 8, not 17"),
    ],
)
def test_a_file_that_is_no_operator_is_refused_and_leaves_nothing(
    changes: list[tuple[str, str]], message: str, tmp_path: Path, fresh: None
) -> None:
    before = dict(OPERATORS)
    with pytest.raises(UsageError, match=message):
        package.register(variant(tmp_path, *changes))
    assert before == OPERATORS
    assert OPERATORS["window"] is Window
    with pytest.raises(UsageError, match="is no Python file"):
        package.register(tmp_path)
    assert package.register(OWN) == ("taylor",)
    assert package.register(OWN) == ("taylor",)


def test_installed_packages_offer_operators_by_entry_points(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(OWN.parent)
    monkeypatch.delitem(sys.modules, "taylor", raising=False)
    point = EntryPoint("taylor", "taylor", spec_registry.OUTSIDE)
    absent = EntryPoint("absent", "no_such_module_anywhere", spec_registry.OUTSIDE)
    monkeypatch.setattr(spec_registry, "entry_points", lambda group: [point, absent] * (group == spec_registry.OUTSIDE))
    with pytest.raises(ValueError, match="did you mean 'taylor'"):
        spec_from_dict({"operator": "taylo"})
    assert "taylor" not in sys.modules, "nothing is imported before it is asked for"
    assert (
        operators.of(spec_from_dict({"operator": "taylor", "size": 8})).state_size is sys.modules["taylor"].state_size
    )
    with pytest.raises(ValueError, match="'absent' is offered by no_such_module_anywhere: No module named"):
        spec_from_dict({"operator": "absent"})
    monkeypatch.delitem(sys.modules, "taylor")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "import torch\n",
            "import torch\nfrom attnconvert.convert import errors\n",
            "imports attnconvert.convert, which",
        ),
        (
            "import torch\n",
            "import torch\nimport attnconvert\n",
            "imports attnconvert, which a checkpoint does not carry",
        ),
        ("import torch\n", "import torch\nfrom attnconvert.kernels import spec\n", ""),
    ],
)
def test_a_checkpoint_carries_kernels_alone(old: str, new: str, message: str, tmp_path: Path, fresh: None) -> None:
    (name,) = outside.load(variant(tmp_path, (old, new)))
    if not message:
        (source,) = outside.sources([OPERATORS[name](), Window()]).values()
        assert "from . import spec" in source
        assert "from attnconvert" not in source
        return
    with pytest.raises(ValueError, match=message):
        outside.sources([OPERATORS[name]()])


def test_an_operator_of_a_session_is_not_exported(fresh: None) -> None:
    (name,) = outside.load(OWN)
    sys.modules[OPERATORS[name].__module__].__file__ = None
    with pytest.raises(ValueError, match="was defined in a session, so a checkpoint cannot carry it"):
        outside.sources([OPERATORS[name]()])


def test_a_recipe_names_the_files_of_its_operators(place: Path, tmp_path: Path, fresh: None) -> None:  # noqa: F811
    given = yaml.safe_load(RECIPE) | {"operators": ["own.py"], "compare": []}
    given["model"]["folder"] = str(place / "model")
    given["text"] = {side: {"files": [str(place / f"{side}.txt")]} for side in ("calibration", "heldout")}
    given["profile"]["candidates"] = [{"operator": "taylor", "size": 8}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(given))
    with pytest.raises(UsageError, match=r"recipe.yaml:\d+:\d+: operators.0: .* is no Python file"):
        load_recipe(tmp_path / "recipe.yaml")
    file = variant(tmp_path)
    plain = load_recipe(tmp_path / "recipe.yaml").model_dump(mode="json")
    keys = {stage: stage_key(stage, plain, tmp_path / "plan.yaml") for stage in STAGES}
    file.write_text(file.read_text() + "\n# changed\n")
    changed = {stage for stage in STAGES if stage_key(stage, plain, tmp_path / "plan.yaml") != keys[stage]}
    assert changed == set(STAGES) - {"sample"}


def test_a_checkpoint_carries_an_operator_from_outside(
    place: Path,  # noqa: F811
    tmp_path: Path,
    fresh: None,
) -> None:
    """Verified in clean processes: by remote code without attnconvert, and with it, where the file is registered."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package.register(OWN)
    taylor = OPERATORS["taylor"](size=8)
    model = AutoModelForCausalLM.from_pretrained(place / "model").eval()
    sites, mixed = package.find_sites(model), (taylor, Window(size=16))
    package.convert(model, {site.name: mixed for site in sites})
    plan = {site: list(mixed) for site in sites}
    export(model, AutoTokenizer.from_pretrained(place / "model"), plan, tmp_path, "a card", None)
    assert (tmp_path / "attnconvert_operator_taylor.py").is_file()
    assert "from .attnconvert_operator_taylor import" in (tmp_path / "modeling_attnconvert.py").read_text()
    assert verify(model, tmp_path)["remote"]["generation_equal"]
    del OPERATORS["taylor"]
    with pytest.raises(Exception, match="no operator 'taylor'"):
        package.load(tmp_path)


@pytest.mark.slow
def test_a_run_takes_an_operator_from_outside_from_profile_to_checkpoint(
    place: Path,  # noqa: F811
    attnconvert: Command,  # noqa: F811
    tmp_path: Path,
    fresh: None,
) -> None:
    given = yaml.safe_load(RECIPE) | {"operators": [str(OWN)], "compare": []}
    given["model"]["folder"] = str(place / "model")
    given["text"] = {side: {"files": [str(place / f"{side}.txt")]} for side in ("calibration", "heldout")}
    given["profile"] |= {"candidates": [{"operator": "taylor", "size": 8}], "transfer_steps": 2}
    given["evaluate"] |= {"sequences": 1, "speed": None}
    given["gates"] = {}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(given))
    done = attnconvert("run", tmp_path / "recipe.yaml", "--out", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    assert set(done.document["evaluation"]["arms"]["student"]["operators"]) == {"full", "taylor-8"}


def test_a_plan_of_an_operator_from_outside_is_put_to_work(fresh: None) -> None:
    package.register(OWN)
    model = package.convert(tiny("llama"), {"0-1": {"operator": "taylor", "size": 8}})
    assert any("taylor-8" in name for name, _ in model.named_parameters())
