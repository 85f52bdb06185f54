"""Exported denoisers load with and without attnconvert, alone and in their pipeline, and never as the stock class."""

import json
import shutil

import diffusers
import pytest
import torch
from denoisers import tiny
from diffusers import AutoencoderKL, AutoModel, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.utils import dynamic_modules_utils
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import attnconvert
from attnconvert.convert import export_images as exporting
from attnconvert.convert.checkpoints import is_denoiser, is_exported
from attnconvert.convert.denoiser_sources import fetch_denoiser, load_denoiser
from attnconvert.convert.errors import AssetMissing, UsageError
from attnconvert.convert.export_images import export_images, verify_images
from attnconvert.convert.export_runtime import VerificationFailed
from attnconvert.convert.exported import bench, load_exported
from attnconvert.convert.hosts.denoisers import dummy_inputs, find_sites
from attnconvert.convert.hosts.surgery import convert
from attnconvert.convert.inspection import describe_plan, sizes_of
from attnconvert.convert.progress import silent
from attnconvert.convert.recipe_inputs import ModelSource
from attnconvert.kernels.spec import Disc, Full, Linear

GRIDS = {2: (6, 8), 3: (2, 4, 6)}
FLUX, WAN = "FluxTransformer2DModel", "WanTransformer3DModel"


def converted(model):
    """A plan in which some of it learns, at work in the model."""
    kinds = [Linear(), Disc(radius=1) if find_sites(model)[0].axes == 2 else Full()]
    plan = {site: [kinds[site.layer % 2]] * site.kv_heads for site in find_sites(model)}
    convert(model, plan)
    torch.manual_seed(3)
    for name, p in model.named_parameters():
        if ".attnconvert." in name:
            p.data += 0.1 * torch.randn_like(p)
    return plan


def exported(name, folder, dtype=None, **given):
    model = tiny(name)
    export_images(model, converted(model), folder, "card", dtype, **given)
    return model


@torch.no_grad()
def run(model, seed=0):
    axes = 3 if "3D" in type(model).__name__ else 2
    return model(**dummy_inputs(model, GRIDS[axes], batch=2, seed=seed))[0]


def load(folder, **settings):
    """As users do, without reading weights in place, where sums are rounded in another order."""
    return AutoModel.from_pretrained(str(folder), disable_mmap=True, **settings)


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A place of the test's own for the code of checkpoints."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "modules"


@pytest.mark.slow
def test_the_shipped_model_loads_in_clean_processes_by_remote_code_and_by_import(tmp_path) -> None:
    source = ModelSource(shipped="flux-mnist", dtype="float32")
    model = load_denoiser(fetch_denoiser(source), source).cpu()
    export_images(model, converted(model), tmp_path, "card", None)
    found = verify_images(model, tmp_path)
    for way in ("remote", "installed"):
        assert found[way]["class"] == "ConvertedFluxTransformer2DModel"
        assert len(found[way]["grids"]) == len(found[way]["batches"]) == 2
        assert found[way]["error"] == 0.0
    assert type(model).__name__ == FLUX  # as it was
    again = load_exported(tmp_path).cpu()
    torch.testing.assert_close(run(again), run(model))


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", WAN, "UNet2DConditionModel"])
def test_other_classes_load_by_import_and_not_as_the_stock_class(tmp_path, name) -> None:
    model = exported(name, tmp_path)
    again = load(tmp_path)
    assert type(again) is getattr(attnconvert, f"Converted{name}")
    assert torch.equal(run(again), run(model))
    stock = set(tiny(name).state_dict())
    added = set(again.state_dict()) - stock
    assert added == set(load_file(tmp_path / "diffusion_pytorch_model.safetensors")) - stock
    assert added
    assert all(".processor.attnconvert." in key for key in added)
    with pytest.raises(ValueError, match="the attention of this model was converted"):
        getattr(diffusers, name).from_pretrained(tmp_path)
    assert str(tmp_path) not in (tmp_path / "config.json").read_text()


def test_checkpoints_bring_their_own_code_one_beside_another_and_into_what_is_saved_again(tmp_path, modules) -> None:
    for name in ("SD3Transformer2DModel", WAN):  # names of the same length, in the same second
        model = exported(name, tmp_path / name)
        own = load(tmp_path / name, trust_remote_code=True)
        assert type(own).__module__ == "diffusers_modules.local.modeling_attnconvert"
        own.save_pretrained(tmp_path / f"{name}-again")
        files = {p.name for p in (tmp_path / name).iterdir()} - {"README.md", "SHA256SUMS"}
        assert {p.name for p in (tmp_path / f"{name}-again").iterdir()} == files
        shutil.rmtree(modules)
        again = load(tmp_path / f"{name}-again", trust_remote_code=True)
        assert torch.equal(run(again), run(model))
    by_import = load(tmp_path / WAN)
    by_import.save_pretrained(tmp_path / "third")
    assert {p.name for p in (tmp_path / "third").iterdir()} == files
    with pytest.raises(AttributeError, match="ConvertedOther"):
        attnconvert.ConvertedOther  # noqa: B018


@pytest.mark.parametrize("name", [FLUX, WAN])
def test_half_precision_leaves_what_operators_learned_in_fp32(tmp_path, name) -> None:
    model = exported(name, tmp_path, "bfloat16")
    again = load_exported(tmp_path)
    assert again.dtype == torch.bfloat16
    learned = again.conversion.learned()
    assert learned
    assert {p.dtype for p in learned.values()} == {torch.float32}
    assert {k: v.dtype for k, v in again.state_dict().items()} == {k: v.dtype for k, v in model.state_dict().items()}
    assert (run(again).float() - run(model).float()).abs().max() <= 0.05 * run(model).float().abs().max()


def tiny_pipeline(folder):
    """A pipeline of Flux without text encoders; its prompts are tensors."""
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=1, norm_num_groups=4, shift_factor=0.0)
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler()
    FluxPipeline(scheduler=scheduler, vae=vae, transformer=tiny(FLUX), **nothing).save_pretrained(folder)
    (folder / "LICENSE.md").write_text("terms")
    return nothing


def test_a_whole_pipeline_loads_in_clean_processes_and_draws_the_same(tmp_path) -> None:
    source, folder = tmp_path / "source", tmp_path / "export"
    nothing = tiny_pipeline(source)
    model = exported(FLUX, folder, pipeline=source, part="transformer")
    index = json.loads((folder / "model_index.json").read_text())
    assert index["transformer"] == ["modeling_attnconvert", "ConvertedFluxTransformer2DModel"]
    weights = "vae/diffusion_pytorch_model.safetensors"
    assert (folder / weights).stat().st_ino == (source / weights).stat().st_ino
    assert (folder / "LICENSE.md").read_text() == "terms"
    listed = {line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert listed == files - {"SHA256SUMS"}
    assert is_exported(folder)
    found = verify_images(model, folder)
    assert found["remote"]["error"] == found["installed"]["error"] == 0.0
    pipes = [
        FluxPipeline.from_pretrained(folder, disable_mmap=True, **nothing),
        FluxPipeline.from_pretrained(source, transformer=model, disable_mmap=True, **nothing),
    ]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(1)
    prompt = {"prompt_embeds": torch.randn(1, 5, 24), "pooled_prompt_embeds": torch.randn(1, 20)}
    size = {"height": 8, "width": 12, "num_inference_steps": 2, "output_type": "pt"}
    images = [pipe(**prompt, **size, generator=torch.Generator().manual_seed(0)).images for pipe in pipes]
    assert torch.equal(*images)
    pipes[0].save_pretrained(tmp_path / "again")
    again = DiffusionPipeline.from_pretrained(tmp_path / "again", disable_mmap=True, **nothing)
    assert torch.equal(run(again.transformer), run(model))
    with pytest.raises(UsageError, match="was exported by attnconvert"):
        change_format(folder / "transformer")
        load_exported(folder)


def test_of_a_pipeline_that_is_not_all_here_the_denoiser_is_exported_alone(tmp_path, caplog) -> None:
    tiny_pipeline(tmp_path / "source")
    (tmp_path / "source" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    exported(FLUX, tmp_path / "export", pipeline=tmp_path / "source", part="transformer")
    assert "lacks vae" in caplog.text
    assert not (tmp_path / "export" / "model_index.json").exists()
    assert (tmp_path / "export" / "config.json").exists()


def change_format(folder):
    config = json.loads((folder / "config.json").read_text())
    config["attnconvert"]["format"] = 99
    (folder / "config.json").write_text(json.dumps(config))


def test_what_was_changed_since_is_refused(tmp_path) -> None:
    exported(FLUX, tmp_path)
    (tmp_path / "README.md").write_text("a card of one's own")
    load_exported(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    whole = load_file(weights)
    save_file({**whole, "proj_out.bias": whole["proj_out.bias"] + 1}, weights)
    with pytest.raises(AssetMissing, match=r"diffusion_pytorch_model.safetensors has changed since"):
        load_exported(tmp_path)
    weights.unlink()
    with pytest.raises(AssetMissing, match=r"lacks diffusion_pytorch_model.safetensors"):
        load_exported(tmp_path)
    change_format(tmp_path)
    with pytest.raises(UsageError, match=r"in format 99, this one reads 1: pip install -U attnconvert"):
        load_exported(tmp_path)


def test_lora_of_the_base_model_loads_into_the_checkpoint(tmp_path) -> None:
    model = exported(FLUX, tmp_path / "export")
    again, base = load(tmp_path / "export"), tiny(FLUX)
    before = run(again)
    base.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    base.save_lora_adapter(tmp_path / "lora")
    for wanted in (again, model):
        wanted.load_lora_adapter(tmp_path / "lora", prefix=None, use_safetensors=True)
    assert (run(again) - before).abs().max() > 1e-3
    assert torch.equal(run(again), run(model))
    with pytest.raises(UsageError, match="not merged"):
        export_images(model, {}, tmp_path / "second", "card", None)
    again.unload_lora()
    assert torch.equal(run(again), before)


def test_a_checkpoint_that_predicts_something_else_or_loads_dense_is_no_success(tmp_path, monkeypatch) -> None:
    model = exported(FLUX, tmp_path)
    said = {"class": "", "stock": "attnconvert"}

    @torch.no_grad()
    def here(check, folder, where, way, device):
        calls = torch.load(f"{where}/inputs.pt", weights_only=True)["calls"]
        again = load(folder)
        save_file({str(n): again(**call)[0] for n, call in enumerate(calls)}, f"{where}/found.safetensors")
        return said

    monkeypatch.setattr(exporting, "load_elsewhere", here)
    assert verify_images(model, tmp_path)["remote"]["error"] == 0.0
    said["stock"] = ""
    with pytest.raises(VerificationFailed, match="must not load as FluxTransformer2DModel, which takes it for its own"):
        verify_images(model, tmp_path)
    model.proj_out.bias.data += 1.0
    with pytest.raises(VerificationFailed, match="predicts something else"):
        verify_images(model, tmp_path)


@pytest.mark.parametrize(("name", "size"), [(FLUX, "16x24"), (WAN, "2x8x8")])
def test_a_checkpoint_is_timed_against_itself_with_full_attention(tmp_path, name, size) -> None:
    exported(name, tmp_path)
    assert is_denoiser(tmp_path)
    found = bench(tmp_path, [], sizes_of(tmp_path, size), 1, 0, silent)
    assert found["speed"][size]["tokens"] == {FLUX: 96, WAN: 32}[name]
    assert found["speed"][size]["speedup"] > 0
    with pytest.raises(UsageError, match="give sizes of the latents"):
        sizes_of(tmp_path, "16")


def test_the_plan_of_a_checkpoint_is_shown(tmp_path) -> None:
    exported(FLUX, tmp_path)
    found = describe_plan(tmp_path)
    assert found["operators"] == {"linear-hedgehog": 4, "disc-1": 4}
    assert found["converted"] == 1.0
