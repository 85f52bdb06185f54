"""The three formats of an export: what each can say, that it is exact, and that it loads as it says it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from commands import RECIPE, attnconvert, finished, place, save_tokenizer, whole  # noqa: F401 – fixtures
from models import DECODERS, tiny
from transformers import AutoModelForCausalLM

from attnconvert.convert.checkpoints import BLOCK, form_of
from attnconvert.convert.errors import UsageError
from attnconvert.convert.export_formats import choose
from attnconvert.convert.export_runtime import VerificationFailed, finish
from attnconvert.convert.export_stock import STOCKS, _by_masks, _difference, export_stock, retyped, verify_stock
from attnconvert.convert.exported import load_exported
from attnconvert.convert.files import read_json, write_json
from attnconvert.convert.hosts.models import find_sites
from attnconvert.convert.hosts.sites import Site
from attnconvert.convert.hosts.surgery import convert
from attnconvert.convert.plan import Plan, write_plan
from attnconvert.kernels.spec import Full, Hybrid, Linear, Spec, Window

WINDOW = Window(size=8, sinks=0)


def windowed(model: Any) -> dict[Site, list[Spec]]:
    """As many windows as the stock architecture of this model can have."""
    layers = STOCKS[type(model).__name__].layers

    def takes(site: Site) -> bool:
        return layers == "same" or site.limit is not None or (layers == "any" and site.layer == 1)

    return {s: [WINDOW if takes(s) else Full()] * s.kv_heads for s in find_sites(model)}


def student(name: str, plan: Any = windowed, **changes: Any) -> tuple[Any, dict[Site, list[Spec]]]:
    model = tiny(name, **changes)
    found = plan(model) if callable(plan) else plan
    model.conversion = convert(model, found)
    return model, found


def of_layers(specs: list[list[Spec]]) -> Any:
    """A plan by layer."""
    return lambda model: dict(zip(find_sites(model), specs, strict=True))


# --- stock ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in DECODERS if n not in ("gpt_neox", "olmo2", "gpt2", "granite", "falcon")])
def test_a_stock_checkpoint_is_the_plan_to_the_last_bit(tmp_path, name):
    model, plan = student(name)
    export_stock(model, None, plan, tmp_path)
    config = read_json(tmp_path / "config.json")
    assert "auto_map" not in config
    assert "attnconvert" not in config
    assert not list(tmp_path.glob("*.py"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again).__name__ == STOCKS[type(model).__name__].model
    ids = torch.randint(2, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with torch.no_grad(), _by_masks(model, again.config._attn_implementation):
        want = model(ids, attention_mask=mask, use_cache=False).logits
    with torch.no_grad():
        found = again(ids, attention_mask=mask, use_cache=False).logits
        dense = tiny(name)(ids, attention_mask=mask, use_cache=False).logits
    assert _difference(found, want, mask.bool()) == 0.0
    assert _difference(dense, want, mask.bool()) > 1e-3  # the windows are at work


def test_a_stock_checkpoint_needs_no_attnconvert_and_one_with_other_windows_is_no_success(tmp_path):
    model, plan = student("llama")
    export_stock(model, None, plan, tmp_path)
    finish(tmp_path, "card")
    found = verify_stock(model, tmp_path)
    assert found["plain"]["class"] == "CwmForCausalLM"
    assert found["plain"]["attention"] == "sdpa"
    assert found["plain"]["logits_error"] == found["installed"]["logits_error"] == 0.0
    assert found["plain"]["generation_equal"]
    assert found["installed"]["generation_equal"]
    assert found["plain"]["kernels_error"] < 1e-5
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", config | {"sliding_window": 9})
    with pytest.raises(VerificationFailed, match=r"\(plain\) gives other results"):
        verify_stock(model, tmp_path)


def test_a_stock_checkpoint_loads_as_the_original_class_with_our_operators(tmp_path):
    model, plan = student("qwen2")
    export_stock(model, None, plan, tmp_path)
    finish(tmp_path, "card")
    assert form_of(tmp_path) == "stock"
    again = load_exported(tmp_path)
    ids = torch.arange(2, 60)[None]
    assert type(again).__name__ == "Qwen2ForCausalLM"
    assert torch.equal(again(ids).logits, model(ids).logits)
    with again.conversion.teacher(), torch.no_grad():
        assert torch.allclose(again(ids).logits, tiny("qwen2")(ids).logits, atol=1e-5)
    assert read_json(tmp_path / "config.json")["max_window_layers"] == 0  # at which engines stop that would ignore it


@pytest.mark.parametrize(
    ("name", "specs", "changes", "message"),
    [
        ("llama", [[WINDOW, Full()], [Full()] * 2, [Full()] * 2], {}, r"mixes full and window-8-0.*unit: layer"),
        ("llama", [[Window(size=8, sinks=2)] * 2, [Full()] * 2, [Full()] * 2], {}, r"2 sinks beside its window"),
        ("llama", [[Linear()] * 2, [Full()] * 2, [Full()] * 2], {}, r"has linear-hedgehog, which no stock"),
        ("llama", [[WINDOW] * 2, [Window(size=9, sinks=0)] * 2, [Full()] * 2], {}, r"windows of one size.* 8, 9"),
        ("llama", [[WINDOW] * 2, [Full()] * 2, [Full()] * 2], {"attention_bias": True}, r"attention_bias True"),
        ("gpt2", [[WINDOW] * 4, [Full()] * 4, [Full()] * 4], {}, r"no stock architecture for GPT2LMHeadModel"),
        ("gemma3_text", [[WINDOW] * 2] * 3, {}, r"layer 1 would change from full_attention"),
        ("mixtral", [[WINDOW] * 2, [Full()] * 2, [WINDOW] * 2], {}, r"one window for all layers.*layer 1 full"),
    ],
)
def test_what_no_stock_architecture_has_is_refused_with_the_reason(name, specs, changes, message):
    model, plan = student(name, of_layers(specs), **changes)
    with pytest.raises(UsageError, match=message):
        retyped(model, plan)
    chosen = choose("auto", model, plan)
    assert chosen.form == "remote"
    assert chosen.why
    with pytest.raises(UsageError, match=message):
        choose("stock", model, plan)


def test_a_plan_without_windows_stays_the_architecture_that_it_is():
    model, plan = student("gpt2", of_layers([[Full()] * 4] * 3))
    assert retyped(model, plan).model == "GPT2LMHeadModel"


def test_engines_that_are_known_to_ignore_layer_types_are_named():
    for name, warned in (("qwen3", "vLLM"), ("gpt_oss", "vLLM"), ("llama", "")):
        model, plan = student(name)
        assert warned in choose("auto", model, plan).serving
        assert bool(choose("auto", model, plan).serving) is bool(warned)


# --- by a plan, from the command line ---------------------------------------------------------------------------------


@pytest.fixture
def plan_file(place: Path, tmp_path: Path) -> Any:  # noqa: F811
    def write(specs: list[list[Spec]]) -> Path:
        names = [site.name for site in find_sites(tiny("llama"))]
        write_plan(tmp_path / "plan.yaml", Plan("LlamaForCausalLM", dict(zip(names, map(tuple, specs), strict=True))))
        return tmp_path / "plan.yaml"

    return write


def test_a_model_is_converted_by_a_plan_alone(attnconvert, place, plan_file, tmp_path):  # noqa: F811
    plan = plan_file([[WINDOW] * 2, [Full()] * 2, [WINDOW] * 2])
    done = attnconvert("export", place / "model", "--plan", plan, "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    assert done.document["form"] == "stock"
    assert done.document["verified"]["plain"]["logits_error"] == 0.0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"plan.yaml", "manifest.json", "README.md", BLOCK, "SHA256SUMS"} <= names
    assert "Nothing was distilled" in (tmp_path / "out" / "README.md").read_text()
    again = attnconvert("export", place / "model", "--plan", plan, "--out", tmp_path / "out")
    assert again.code == 2
    assert "not empty" in again.message
    shown = attnconvert("inspect", tmp_path / "out", "--json")
    assert shown.document["operators"] == {"window-8-0": 4, "full": 2}


@pytest.mark.slow
def test_operators_that_learn_and_were_not_trained_are_told(attnconvert, place, plan_file, tmp_path):  # noqa: F811
    plan = plan_file([[Hybrid(window=8, sinks=2)] * 2, [Full()] * 2, [WINDOW] * 2])
    done = attnconvert("export", place / "model", "--plan", plan, "--out", tmp_path / "out", "--format", "adapter")
    assert done.code == 0, done.err
    assert "are untrained" in done.err
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "operators.safetensors" in names
    assert not {"adapter_model.safetensors", "model.safetensors", "config.json"} & names
    assert attnconvert("bench", tmp_path / "out", "--lengths", "64", "--repeats", "1", "--decode-tokens", "1").code == 0


def test_an_export_that_fails_leaves_nothing_that_looks_like_one(attnconvert, place, plan_file, tmp_path):  # noqa: F811
    plan = plan_file([[Linear()] * 2, [Full()] * 2, [WINDOW] * 2])
    done = attnconvert("export", place / "model", "--plan", plan, "--out", tmp_path / "out", "--format", "stock")
    assert done.code == 2
    assert "has linear-hedgehog, which no stock architecture has" in done.message
    assert list((tmp_path / "out").iterdir()) == []
    for options, said in (
        (("--plan", plan), "--plan needs --out"),
        (("--out", tmp_path / "x"), "go with --plan"),
        (("--format", "gguf"), "give one of auto, stock, remote, adapter"),
    ):
        done = attnconvert("export", place / "model", *options)
        assert done.code == 2
        assert said in done.message
