"""The recipes of image and video models: told beforehand, and run end to end on tiny models of their classes."""

from __future__ import annotations

import json
import math
import shutil
import time
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
from attnconvert.convert.keys import STAGES
from attnconvert.convert.prompts import encode_prompts, read_prompts
from attnconvert.convert.recipe import ImageRecipe, load_recipe, shipped_recipes
from attnconvert.convert.runs import Run
from attnconvert.kernels.spec import label

IMAGES = [name for name in shipped_recipes() if load_recipe(name).kind == "images"]


# --- told beforehand --------------------------------------------------------------------------------------------------

KNOWN = {  # attentions, heads of the first, image tokens, parameters in millions
    "flux-mnist-linear": (5, 2, 256, 2.0),
    "flux-mnist-local": (5, 2, 256, 2.0),
    "flux-mnist-sla": (5, 2, 256, 2.0),
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
def test_every_shipped_recipe_is_told_beforehand_without_weights(
    name: str,
    attnconvert: Command,  # noqa: F811
    tmp_path: Path,
) -> None:
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
    parts = ("weights", "trained", "gradients", "optimizer", "activations", "targets")
    assert training["total_bytes"] == sum(training[f"{part}_bytes"] for part in parts)
    assert training["weights_bytes"] == found["model"]["parameters"] * (4 if name.startswith("flux-mnist") else 2)


def test_a_dry_run_is_told_in_tables_too(attnconvert: Command, tmp_path: Path) -> None:  # noqa: F811
    told = attnconvert("run", "wan2.1-1.3b-linvideo", "--dry-run", "--out", tmp_path / "run").out
    for part in ("linvideo chooses from 30 layers", "layers 0 stay full", "32,760 (21×30×52)", "linear-hedgehog"):
        assert part in told, told
    told = attnconvert("run", "flux.1-dev-clear", "--dry-run", "--out", tmp_path / "run").out
    for part in ("11,901.4 million parameters", "64×64 + 512", "disc-16", "GPU blocks", "AdamW's moments"):
        assert part in told, told


def test_densities_and_flops_of_a_radius_are_those_of_its_mask() -> None:
    recipe = load_recipe("flux-mnist-local")
    assert isinstance(recipe, ImageRecipe)
    found = foresee(recipe)
    near = sum(
        (y - v) ** 2 + (x - u) ** 2 < 4 for y in range(16) for x in range(16) for v in range(16) for u in range(16)
    )
    pairs = (near + 2 * 4 * 256 + 16) / 260**2
    assert found["masks"][0]["pairs"] == pytest.approx(pairs)
    assert found["flops"]["ratio"] == pytest.approx(pairs)


def test_a_recipe_that_does_not_fit_its_model_is_refused_before_anything_runs(attnconvert: Command) -> None:  # noqa: F811
    disc = "{operator: disc, radius: 2}"
    for name, setting, expected in (
        ("wan2.1-1.3b-sla", f"select.explicit={{0-30: {disc}}}", "names layer 30, but the model has layers 0–29"),
        ("wan2.1-1.3b-sla", "select.explicit={0-3: {operator: window}}", "take disc or neighbourhood instead"),
        ("sd1.5-linfusion", "select.explicit={0-3: {operator: radial}}", "is of images, and radial"),
        ("wan2.1-1.3b-sla", "images.size=[64, 64]", "are (frames, height, width), not (64, 64)"),
        ("sd3.5-medium-clear", "images.size=[65, 64]", "cannot be cut into the patches of 2×2"),
        ("sd3.5-medium-clear", "images.prompts=none.txt", "cannot read the prompts"),
        ("sd3.5-medium-clear", "model.hub=nobody/nothing", "is not in the local hub cache"),
    ):
        outcome = attnconvert("run", name, "--dry-run", "--set", setting)
        assert outcome.code in (2, 5), outcome.out
        assert expected in outcome.err, outcome.err


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
    "export.verify=false",  # in clean processes, which tests of the export begin
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
        *(["images.prediction=epsilon"] if "linfusion" in name else []),  # a folder without its pipeline's scheduler
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
        settings += ["select.layers=2", "profile.gate_steps=4", "profile.transfer_steps=2"]
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
        assert label(plan[work.sites[0]][0]) == "full", "the first layer is protected"
    written = read_json(run.folder("export") / "config.json")["attnconvert"]
    assert len(written["sites"]) == SMALL[name][4]
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


# --- prompts ----------------------------------------------------------------------------------------------------------

WORDS = ("a", "red", "blue", "fox", "boat", "in", "the", "snow")


def tokenizer(folder: Path) -> None:
    """A CLIP tokenizer whose only words are WORDS and single letters."""
    from transformers import CLIPTokenizer

    letters = [chr(n) for n in range(97, 123)]
    merges, vocabulary = [], {token: n for n, token in enumerate([*letters, *(f"{x}</w>" for x in letters)])}
    for word in WORDS:
        done = word[0] if len(word) > 1 else f"{word}</w>"
        for n, letter in enumerate(word[1:], 2):
            end = f"{letter}</w>" if n == len(word) else letter
            if (pair := f"{done} {end}") not in merges:
                merges.append(pair)
            done += end
            vocabulary.setdefault(done, len(vocabulary))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12).save_pretrained(folder)


def tiny_pipeline(folder: Path) -> Path:
    """Stable Diffusion with a random text encoder and UNet, and no VAE: only what is asked for may be read."""
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer(folder / "tokenizer")
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=200, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, eos_token_id=1, bos_token_id=0,
    )  # fmt: skip
    CLIPTextModel(config).eval().save_pretrained(folder / "text_encoder")
    tiny("UNet2DConditionModel").save_pretrained(folder / "unet")
    diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).save_pretrained(
        folder / "scheduler"
    )
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "requires_safety_checker": False,
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_prompts_are_encoded_by_the_text_encoders_of_the_pipeline(tmp_path: Path) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = tiny_pipeline(tmp_path / "pipeline")
    prompts = ["a red fox in the snow", "the blue boat", *(f"a {x} boat" for x in "bcdefghi")]
    found = encode_prompts(folder, prompts, torch.device("cpu"))
    assert found.labels == (*prompts, None)
    assert found.null == len(prompts)
    words, model = (
        CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        CLIPTextModel.from_pretrained(folder / "text_encoder"),
    )
    ids = words([*prompts, ""], padding="max_length", max_length=12, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(found.tensors[TEXT], model(ids)[0])


def test_a_run_encodes_its_prompts_once_and_again_when_they_change(tmp_path: Path) -> None:
    folder, prompts = tiny_pipeline(tmp_path / "pipeline"), tmp_path / "prompts.txt"
    prompts.write_text("a red fox\n\nthe blue boat\n")
    settings = [f"model={{folder: {folder}}}", "images.size=[8, 8]", f"images.prompts={prompts}", *COUNTS[:2]]
    recipe = load_recipe("sd1.5-linfusion", settings)
    run = Run.create(recipe, tmp_path / "run")
    images = pipeline.Work(run).images
    assert images.entries(range(3)).tolist() == [0, 1, 0]
    bank = run.path / "conditions" / "conditions.safetensors"
    assert load_conditions(bank).labels == ("a red fox", "the blue boat", None)
    drawn = images.draw(images.model, range(2), 0, 2, "")
    assert bool(drawn.x.isfinite().all())
    assert float((drawn.x[0] - drawn.x[1]).abs().max()) > 1e-3

    shutil.rmtree(folder / "text_encoder")
    assert len(pipeline.Work(run).images.conditions) == 3, "what is there is not encoded again"
    prompts.write_text("a red fox\n")
    with pytest.raises(AssetMissing, match="lacks text_encoder, which encode prompts"):
        _ = pipeline.Work(run).images


def test_prompts_that_cannot_be_encoded_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="came without one"):
        encode_prompts(None, ["a"], torch.device("cpu"))
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    with pytest.raises(UsageError, match="how a KandinskyPipeline encodes prompts is not known here; known are Flux"):
        encode_prompts(tmp_path, ["a"], torch.device("cpu"))
    (tmp_path / "prompts.txt").write_text("a\nb\na\n")
    with pytest.raises(UsageError, match="has a prompt twice: a"):
        read_prompts(tmp_path / "prompts.txt")
    (tmp_path / "prompts.txt").write_text("\n \n")
    with pytest.raises(UsageError, match="has no prompt"):
        read_prompts(tmp_path / "prompts.txt")
