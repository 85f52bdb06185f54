"""The shipped recipes of image and video models: told beforehand, and run end to end on tiny models of their classes."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from commands import Command, attnconvert  # noqa: F401 – a fixture
from denoisers import tiny
from safetensors.torch import load_file

from attnconvert import pipeline
from attnconvert.convert.conditioning import Conditions, load_conditions
from attnconvert.convert.errors import AssetMissing, UsageError
from attnconvert.convert.files import read_json
from attnconvert.convert.foresight import foresee
from attnconvert.convert.prompts import encode_prompts, read_prompts
from attnconvert.convert.keys import STAGES
from attnconvert.convert.recipe import ImageRecipe, load_recipe, shipped_recipes
from attnconvert.convert.runs import Run
from attnconvert.kernels.spec import label

ROOT = Path(__file__).parents[1]
IMAGES = [name for name in shipped_recipes() if load_recipe(name).kind == "images"]
BAR = 1e-9


# --- told beforehand --------------------------------------------------------------------------------------------------

KNOWN = {  # attentions, heads of the first, image tokens, parameters in millions
    "flux-mnist-local": (5, 2, 256, 2.0),
    "flux.1-dev-clear": (57, 24, 4096, 11901.4),
    "sd3.5-medium-clear": (37, 24, 4096, 2243.2),
    "sd1.5-linfusion": (16, 8, 4096, 859.5),
    "sdxl-linfusion": (70, 10, 16384, 2567.5),
    "wan2.1-1.3b-sla": (30, 12, 32760, 1419.0),
    "wan2.1-1.3b-linvideo": (30, 12, 32760, 1419.0),
    "wan2.1-14b-radial": (40, 40, 75600, 14288.5),
    "hunyuanvideo-radial": (60, 24, 118800, 12821.0),
}


@pytest.mark.parametrize("name", IMAGES)
def test_every_shipped_recipe_is_told_beforehand_without_weights(name: str, attnconvert: Command, tmp_path: Path) -> None:
    started = time.process_time()
    outcome = attnconvert("run", name, "--dry-run", "--json", "--out", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    found, recipe = outcome.document, load_recipe(name)
    assert time.process_time() - started < 15
    assert not (tmp_path / "run").exists()
    assert isinstance(recipe, ImageRecipe)
    layers, heads, tokens, millions = KNOWN[name]
    assert (found["plan"]["layers"], found["sites"][0]["heads"], found["tokens"]["image"]) == (layers, heads, tokens)
    assert found["model"]["parameters"] / 1e6 == pytest.approx(millions, abs=0.1)
    limit = recipe.gates.flops_ratio
    assert limit is None or found["flops"]["ratio"] < limit, "the gate is one that the plan itself misses"
    assert sorted(n for site in found["sites"] for n in site["layers"]) == list(range(layers))
    numbers = math.prod(found["samples"]["latent"]) * 4 * recipe.sample.count
    assert found["samples"]["bytes"] >= numbers
    training = found["training"]
    assert training["total_bytes"] == sum(training[key] for key in training if key.endswith("_bytes")) - (
        training["total_bytes"] + training["a_sample_bytes"]
    )


# --- end to end, on tiny models of the same classes -------------------------------------------------------------------

TEXT, POOLED, MASK = "encoder_hidden_states", "pooled_projections", "encoder_attention_mask"
XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
}
SLA = "{operator: sla, keep: 0.25, block: 32}"
RADIAL = "{operator: timed, above: %s, early: {operator: full}, late: {operator: radial, floor: 4, %s}}"
# recipe → class, changes of it, conditions, size of the latents, attentions, the operator in the measure of the model
SMALL: dict[str, tuple[str, dict[str, Any], tuple[str, ...], list[int], int, str]] = {
    "flux.1-dev-clear": (
        "FluxTransformer2DModel",
        {"guidance_embeds": True},
        (TEXT, POOLED),
        [16, 16],
        4,
        "{operator: disc, radius: 2}",
    ),
    "sd3.5-medium-clear": (
        "SD3Transformer2DModel",
        {},
        (TEXT, POOLED),
        [16, 16],
        3,
        "{operator: disc, radius: 2}",
    ),
    "sd1.5-linfusion": (
        "UNet2DConditionModel",
        {},
        (TEXT,),
        [16, 16],
        7,
        "{operator: linear, feature_map: elu1, augment: true}",
    ),
    "sdxl-linfusion": (
        "UNet2DConditionModel",
        XL,
        (TEXT, POOLED),
        [16, 16],
        7,
        "{operator: linear, feature_map: elu1, augment: true}",
    ),
    "wan2.1-1.3b-sla": ("WanTransformer3DModel", {}, (TEXT,), [3, 16, 16], 2, SLA),
    "wan2.1-1.3b-linvideo": (
        "WanTransformer3DModel",
        {"num_layers": 3},
        (TEXT,),
        [3, 12, 12],
        3,
        "{operator: linear, feature_map: hedgehog}",
    ),
    "hunyuanvideo-radial": (
        "HunyuanVideoTransformer3DModel",
        {},
        (TEXT, POOLED, MASK),
        [4, 12, 12],
        2,
        RADIAL % (0.96, "decay: 0.95"),
    ),
    "wan2.1-14b-radial": (
        "WanTransformer3DModel",
        {},
        (TEXT,),
        [4, 12, 12],
        2,
        RADIAL % (0.942, "decay: 0.2, neighbour: 0.5, sink: true"),
    ),
}
COUNTS = (
    "model.dtype=float32",
    "images.steps=6",
    "profile.states=2",
    "profile.cases=1",
    "profile.rows=16",
    "sample.batch=3",
    "sample.shard=4",
    "distill.training.steps=3",
    "distill.training.batch=2",
    "distill.training.checkpoint_every=2",
    "evaluate.samples=4",
    "evaluate.states=4",
    "evaluate.batch=4",
    "gates={converted: 0.5}",
)


def bank(names: tuple[str, ...]) -> Conditions:
    """Four prompts of five tokens, and none."""
    generator = torch.Generator().manual_seed(1)
    known = {
        TEXT: torch.randn(5, 5, 24, generator=generator),
        POOLED: torch.randn(5, 20, generator=generator),
        MASK: torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]),
    }
    return Conditions({name: known[name] for name in names}, ("a", "b", "c", "d", None), 4)


def small(name: str, folder: Path) -> ImageRecipe:
    """A shipped recipe for a tiny model of the class that it is for."""
    cls, changes, conditions, size, layers, operator = SMALL[name]
    tiny(cls, **changes).save_pretrained(folder / "model")
    bank(conditions).save(folder / "bank.safetensors")
    shipped = load_recipe(name)
    assert isinstance(shipped, ImageRecipe)
    settings = [
        f"model={{folder: {folder / 'model'}}}",
        f"images.size={size}",
        "images.prompts=null",
        f"images.conditions={folder / 'bank.safetensors'}",
        f"profile.candidates=[{operator}]",
        f"sample.count={6 if shipped.sample.keep == 'latents' else 3}",
        f"evaluate.speed={{sizes: [{size}], repeats: 1}}",
        *COUNTS,
    ]
    if shipped.select.method == "explicit":
        assert shipped.select.explicit is not None
        first = min(shipped.select.explicit)  # Wan 14B keeps the first layer
        settings.append(f"select.explicit={{{first}-{layers - 1}: {operator}}}")
    else:
        settings += ["select.layers=2", "profile.gate_steps=4", "profile.transfer_steps=2", "distill.transfer.steps=2"]
    found = load_recipe(name, settings)
    assert isinstance(found, ImageRecipe)
    return found


@pytest.mark.parametrize("name", SMALL)
def test_a_shipped_recipe_runs_from_end_to_end_on_a_tiny_model_of_its_class(name: str, tmp_path: Path) -> None:
    recipe, shipped = small(name, tmp_path), load_recipe(name)
    expected = foresee(recipe)
    run = Run.create(recipe, tmp_path / "run")
    work = pipeline.Work(run)
    assert pipeline.run_stages(work) == list(STAGES)
    assert len(work.sites) == SMALL[name][4]
    assert shipped.profile.candidates[0].operator == recipe.profile.candidates[0].operator

    assert sample_bytes(run.folder("sample")) == expected["samples"]["bytes"]
    lines = [json.loads(line) for line in (run.folder("distill") / "student" / "log.jsonl").read_text().splitlines()]
    training = recipe.distill.training
    assert training is not None
    parts = {part for part in ("velocity", "diffusion", "feature", "distribution") if getattr(training, part)}
    assert {frozenset(parts)} == {
        frozenset(line) & {"velocity", "diffusion", "feature", "distribution"}
        for line in lines
        if line["phase"] == "training"
    }
    document = read_json(run.folder("evaluate") / "evaluation.json")
    student = document["arms"]["student"]
    assert 0 < student["quality"]["velocity_error"] < 1
    if expected["plan"]["decided"]:
        assert student["flops_ratio"] == pytest.approx(expected["flops"]["ratio"])
        assert student["converted"] == pytest.approx(expected["plan"]["converted"])
        assert student["operators"] == {k: v["groups"] for k, v in expected["plan"]["operators"].items()}
    else:
        assert student["operators"] == {"full": 2, label(recipe.profile.candidates[0]): 4}
        plan = pipeline.read_plan(run.plan).for_sites(work.sites)
        assert [label(specs[0]) for specs in plan.values()][0] == "full", "the first layer is protected"
    assert all(gate["passed"] for gate in document["gates"])
    assert expected["training"]["parameters"] == trained_numbers(run.folder("distill") / "student", training.weights)


def sample_bytes(folder: Path) -> int:
    """What the tensors of all shards take, beside which prompt was asked for and the times."""
    shards = [load_file(path) for path in folder.glob("*.safetensors")]
    return sum(x.nbytes for shard in shards for name, x in shard.items() if name not in ("entries", "times"))


def trained_numbers(folder: Path, weights: str) -> int:
    """How many numbers the files of a trained arm hold."""
    from safetensors import safe_open

    files = {"lora": ["adapter/adapter_model.safetensors"], "projections": ["projections.safetensors"]}.get(weights, [])
    total = 0
    for name in [*files, "operators.safetensors"]:
        with safe_open(folder / name, "pt") as file:
            total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    return total
