"""attnconvert from Python: the examples of its docstrings run, and what it does is what the commands do."""

from __future__ import annotations

import doctest
import inspect
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import WORDS, Command, attnconvert, place, save_tokenizer, whole  # noqa: F401 – fixtures
from models import tiny
from transformers import AutoTokenizer

import attnconvert as package
from attnconvert import api
from attnconvert.convert.errors import AssetMissing, UsageError
from attnconvert.convert.files import read_json
from attnconvert.convert.plan import Plan, write_plan
from attnconvert.convert.profiling import Profile
from attnconvert.kernels.spec import Full, Hybrid, Window, label

ROOT = Path(__file__).parents[1]
SMALL = {"sequences": 1, "length": 64, "rows": 8, "needles": {"cases": 1, "length": 96}, "retrieval": []}
IDS = torch.arange(1, 41)[None]


def text() -> str:
    draw = random.Random(0)
    return " ".join(draw.choice(WORDS) for _ in range(600))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, 99)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def profiled(tokenizer: Any) -> Profile:
    model = tiny("llama", num_hidden_layers=2)
    return package.profile(model, tokenizer, [text()], [Window(size=16, sinks=2)], settings=SMALL)


@pytest.mark.parametrize("name", api.__all__[2:])
def test_the_examples_of_the_docstrings_run(
    name: str, tokenizer: Any, profiled: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    names = {
        "tiny_llama": lambda: tiny("llama", num_hidden_layers=2),
        "words": lambda: tokenizer,
        "TEXT": text(),
        "profile_of_tiny_llama": lambda: profiled,
        "Full": Full,
        "Window": Window,
        "label": label,
    }
    found = doctest.DocTestFinder().find(getattr(api, name), name, globs={**vars(api), **names})
    assert sum(len(test.examples) for test in found), f"{name} has no example"
    told: list[str] = []
    for test in found:
        doctest.DocTestRunner(optionflags=doctest.IGNORE_EXCEPTION_DETAIL).run(test, out=told.append)
    assert told == []


def test_the_package_offers_what_its_page_says_and_loads_nothing_for_it() -> None:
    heavy = ("torch", "transformers", "diffusers", "pydantic", "attnconvert.api")
    code = f"import sys, attnconvert; dir(attnconvert); print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    for name in ("find_sites", "load", "profile", "register", "select"):
        assert getattr(package, name) is getattr(api, name)
        assert name in dir(package)
    assert callable(package.convert)
    assert inspect.ismodule(package.convert)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_convert_takes_every_form_of_a_plan_and_undoes_it(tmp_path: Path) -> None:
    model = tiny("llama")
    before = model(IDS).logits
    sites = package.find_sites(model)
    spec = Window(size=8, sinks=2)
    plan = Plan("x", {sites[0].name: (Full(), spec), sites[2].name: (spec, spec)})
    write_plan(tmp_path / "plan.yaml", plan)
    by_layer = {0: [Full(), spec], "2": {"operator": "window", "size": 8, "sinks": 2}}
    by_site = {sites[0].name: [Full(), spec], sites[2].name: spec}
    seen = []
    for given in (plan, tmp_path / "plan.yaml", str(tmp_path / "plan.yaml"), by_layer, by_site):
        assert package.convert(model, given) is model
        seen.append(model(IDS).logits)
        with pytest.raises(UsageError, match="converted already"):
            package.convert(model, given)
        with model.conversion.teacher():
            torch.testing.assert_close(model(IDS).logits, before, atol=1e-4, rtol=1e-4)
        model.conversion.remove()
        assert torch.equal(model(IDS).logits, before)
    assert all(torch.equal(one, seen[0]) for one in seen)
    assert not torch.allclose(seen[0], before)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (3, "no plan: 3; give a plan, its file"),
        ({"model.layers.0.self_atn": Full()}, "did you mean 'model.layers.0.self_attn'"),
        ({"0-7": Full()}, "names layer 3, but the model has layers 0–2"),
        ({0: "window"}, "give an operator such as"),
        ({0: {"operator": "windw"}}, "did you mean 'window'"),
        ({0: [Full()]}, "gives 1 operators to model.layers.0.self_attn, which has 2 KV groups"),
        ({0: Full(), "0-1": Full()}, "operators to model.layers.0.self_attn twice"),
        ("nowhere.yaml", "there is no plan here"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_in_one_line(plan: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        package.convert(tiny("llama"), plan)
    assert len(str(refused.value).splitlines()) == 1


def test_a_profile_leads_to_a_plan_and_a_converted_model(profiled: Profile) -> None:
    chosen = package.select(profiled, {"groups": 0.5})
    assert chosen.plan.counts() == {"full": 2, "window-16-2": 2}
    model = package.convert(tiny("llama", num_hidden_layers=2), chosen)
    assert sum(s == Full() for site in model.conversion.sites.values() for s in site.specs) == 2


def test_the_commands_measure_the_same_as_the_functions(
    whole: Path,  # noqa: F811
    place: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """The profile of a run, and the plan that is chosen from it."""
    from transformers import AutoModelForCausalLM

    run = Profile.from_json(read_json(whole / "profile" / "profile.json"))
    model = AutoModelForCausalLM.from_pretrained(place / "model").eval()
    keys = ("sequences", "length", "rows", "needles", "retrieval")
    settings = {key: run.data[key] for key in keys}
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    texts = [(place / "calibration.txt").read_text()]
    found = package.profile(model, tokenizer, texts, list(run.candidates.values()), settings=settings, folder=tmp_path)
    assert found.damage == run.damage
    assert found.statistics == run.statistics
    chosen = package.select(found, {"method": "damage", "groups": 0.6})
    told = json.loads((whole / "select" / "select.json").read_text())["arms"]["student"]
    assert chosen.plan.counts() == told["operators"]
    assert chosen.loss == pytest.approx(told["loss"])


def test_a_checkpoint_loads_whole_and_a_changed_one_is_refused(
    whole: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    import shutil

    model = package.load(whole)
    assert torch.equal(package.load(whole / "export")(IDS).logits, model(IDS).logits)
    assert model.conversion.installed
    copy = Path(shutil.copytree(whole / "export", tmp_path / "copy"))
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    with pytest.raises(AssetMissing, match="config.json has changed since it was exported"):
        package.load(copy)
    with pytest.raises(UsageError, match="neither an exported checkpoint nor a run"):
        package.load(tmp_path)


def test_wrong_settings_are_all_told(profiled: Profile, tokenizer: Any) -> None:
    with pytest.raises(UsageError, match=r"select.grups: unknown key; did you mean 'groups'"):
        package.select(profiled, {"grups": 0.5})
    with pytest.raises(UsageError, match="needs? the model|in a run"):
        package.select(profiled, {"groups": 0.5, "rounds": 1})
    with pytest.raises(UsageError, match=r"profile.rows"):
        package.profile(tiny("llama"), None, [], settings={"rows": 0})
    with pytest.raises(UsageError, match="give a list"):
        package.profile(tiny("llama"), None, "a text")
    with pytest.raises(UsageError, match="holds 0 sequences"):
        package.profile(tiny("llama"), tokenizer, ["short"], settings=SMALL)


def test_hybrids_are_converted_untrained() -> None:
    model = package.convert(tiny("llama"), {"0-2": Hybrid(window=8, sinks=2)})
    assert any("hybrid" in name for name, _ in model.named_parameters())
