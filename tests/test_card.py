"""The model card: what a stranger who finds the checkpoint is told."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from attnconvert.convert.card import figures, model_card
from attnconvert.convert.recipe import Recipe, load_recipe, parse_recipe

MANIFEST = {
    "model": {"name": "owner/model", "revision": "abc123", "sha256": {"model.safetensors": "5e" * 32}},
    "versions": {"python": "3.11.7", "attnconvert": "0.1.0", "torch": "2.13.0", "triton": None},
}
QUALITY = {"kl": 0.0412, "perplexity": 13.11, "teacher_perplexity": 12.71, "perplexity_ratio": 1.0315}
ARM = {
    "quality": {"1024": QUALITY},
    "retrieval": {"exact": 0.9375, "digits": 0.98, "cases": 64, "length": 1024},
    "retrieval_drop": 0.03,
    "kv_bytes": {"8192": 73400320.0},
    "kv_ratio": {"8192": 0.389},
    "flops_ratio": {"8192": 0.404},
    "converted": 0.6222,
    "operators": {"window-128-4": 56, "full": 34},
    "trained": True,
}
EVALUATION: dict[str, Any] = {
    "schema": 1,
    "machine": {"cpu": "Some CPU", "cores": 2, "gpu": ["Some GPU"]},
    "data": {
        "text": {"documents": 16, "first": "/home/someone/a.txt", "last": "/home/someone/z.txt", "characters": 99},
        "lengths": [1024],
        "sequences": 16,
        "needles": {"cases": 64, "length": 1024, "template": "locker"},
        "seed": 1,
    },
    "arms": {
        "random": ARM | {"trained": False},
        "student": ARM,
        "teacher": {
            "quality": {"1024": {"perplexity": 12.71}},
            "retrieval": ARM["retrieval"],
            "kv_bytes": {"8192": 188743680.0},
        },
    },
    "speed": {
        "8192": {
            "teacher": {"prefill_s": 10.2, "decode_ms": 41.0, "kv_bytes": 2},
            "student": {"prefill_s": 6.1, "decode_ms": 35.0, "kv_bytes": 1},
            "prefill_speedup": 1.672,
            "decode_speedup": 1.171,
            "kv_ratio": 0.389,
        }
    },
    "gates": [
        {"name": "kl@1024", "limit": 0.05, "value": 0.0412, "passed": True},
        {"name": "prefill_speedup@8192", "limit": 2.0, "value": 1.672, "passed": False},
    ],
}
HUB = """\
name: card
description: A conversion for the tests.
model: {hub: owner/model, revision: main}
text: {calibration: {files: [/home/someone/c.txt]}, heldout: {files: [/home/someone/h.txt]}}
"""


@pytest.fixture
def recipe() -> Recipe:
    return parse_recipe(HUB, "card.yaml")


def front_matter(card: str) -> dict[str, Any]:
    _, head, _ = card.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(head)
    return found


def test_the_front_matter_is_what_the_hub_reads(recipe: Recipe) -> None:
    head = front_matter(model_card(recipe, MANIFEST, "LlamaForCausalLM", EVALUATION))
    assert head["base_model"] == "owner/model"
    assert (head["library_name"], head["pipeline_tag"]) == ("transformers", "text-generation")
    assert head["tags"] == ["attnconvert", "sliding-window"]
    assert "license" not in head
    shipped = front_matter(model_card(load_recipe("smollm2-135m-window"), MANIFEST, "LlamaForCausalLM", EVALUATION))
    assert "base_model" not in shipped  # a file of a package has no id on the hub


def test_every_arm_and_the_circumstances_are_told(recipe: Recipe) -> None:
    card = model_card(recipe, MANIFEST, "LlamaForCausalLM", EVALUATION)
    for line in (
        "| | teacher | student | random |",
        "| KV groups converted | – | 62.2 % | 62.2 % |",
        "| trained | – | yes | no |",
        "| KL @ 1,024 | – | 0.0412 | 0.0412 |",
        "| perplexity @ 1,024 | 12.71 | 13.11 (1.032×) | 13.11 (1.032×) |",
        "| needles @ 1,024 | 93.8 % | 93.8 % | 93.8 % |",
        "| KV cache @ 8,192 | 180 MiB | 70.0 MiB (0.39×) | 70.0 MiB (0.39×) |",
        "| prefill @ 8,192 | 10.2 s | 6.10 s | – |",
        "| prefill speedup @ 8,192 | – | 1.67× | – |",
        "| kl@1024 | 0.05 | 0.0412 | passed |",
        "| prefill_speedup@8192 | 2 | 1.67 | **missed** |",
        "| `window-128-4` | 56 |",
    ):
        assert line in card
    for words in ("16 held-out sequences of 1,024 tokens", "64 needle cases (template locker)", "seed 1", "Some GPU"):
        assert words in card
    assert "62 % of its 90 KV groups" in card
    assert "`LlamaForCausalLM`" in card


def test_both_ways_to_load_and_the_limits_are_told(recipe: Recipe) -> None:
    card = model_card(recipe, MANIFEST, "LlamaForCausalLM", EVALUATION)
    for words in ("trust_remote_code=True", "pip install attnconvert", "import attnconvert", "model.generate("):
        assert words in card
    for words in ("assisted decoding", "static cache", "Packed sequences", "Attention dropout"):
        assert words in card
    assert "5e5e5e" in card
    assert "revision `abc123`" in card
    assert "torch 2.13.0" in card
    assert "triton" not in card


def test_the_recipe_in_the_card_loads_and_names_no_local_folder(recipe: Recipe, tmp_path: Path) -> None:
    card = model_card(recipe, MANIFEST, "LlamaForCausalLM", EVALUATION)
    assert "/home/someone" not in card
    text = card.split("```yaml\n")[1].split("```")[0]
    assert parse_recipe(text, "card").select == recipe.select
    (tmp_path / "model").mkdir()
    local = parse_recipe(HUB.replace("{hub: owner/model, revision: main}", f"{{folder: {tmp_path}/model}}"), "card")
    assert str(tmp_path) not in model_card(local, MANIFEST, "LlamaForCausalLM", EVALUATION)


def test_what_was_not_measured_is_left_out(recipe: Recipe) -> None:
    card = model_card(recipe, MANIFEST, "LlamaForCausalLM", None)
    assert "## Measured" not in card
    assert "## Gates" not in card
    assert "config.json" in card
    partly = deepcopy(EVALUATION)
    partly["speed"], partly["gates"] = {}, []
    del partly["arms"]["random"]
    card = model_card(recipe, {}, "LlamaForCausalLM", partly)
    assert "prefill" not in card.split("## Measured")[1].split("Measured on")[0]
    arms, rows = figures(partly)
    assert arms == ["teacher", "student"]
    assert all(len(row) == 3 for row in rows)


def test_the_card_of_each_format_says_how_it_loads():
    recipe = load_recipe("smollm2-135m-window")
    stock = model_card(recipe, MANIFEST, "LlamaForCausalLM", EVALUATION, "stock", "an engine ignores it")
    assert "trust_remote_code=True" not in stock
    assert "an engine ignores it" in stock
    adapter = model_card(recipe, MANIFEST, "LlamaForCausalLM", EVALUATION, "adapter")
    assert front_matter(adapter)["library_name"] == "peft"
    assert "**not the\nconverted model**" in adapter
    assert "trust_remote_code=True" in model_card(recipe, MANIFEST, "LlamaForCausalLM", EVALUATION)
