"""What a converted denoiser must survive: adapters, residuals, compilers, copies, being saved; and what it refuses."""

import copy
import inspect
import json

import diffusers
import pytest
import torch
from denoisers import GRIDS, TINY, everything, message, relative, run, tiny
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from peft import LoraConfig
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import attnconvert
from attnconvert.convert.hosts.denoisers import (
    dummy_inputs,
    find_sites,
)
from attnconvert.convert.hosts.grids import denoiser
from attnconvert.convert.hosts.registration_images import converted_class
from attnconvert.convert.hosts.sites import Unsupported, all_full, plan_block
from attnconvert.convert.hosts.surgery import convert, converted
from attnconvert.kernels.spec import (
    Agent,
    Disc,
    Frames,
    Linear,
    Neighbourhood,
    Radial,
    References,
    Sla,
    Sparse,
    Tiles,
    Timed,
)


def test_a_copy_of_the_model_has_operators_of_its_own() -> None:
    model = tiny("FluxTransformer2DModel")
    sites = find_sites(model)
    inputs, larger = (dummy_inputs(model, grid, 5) for grid in ((4, 6), (5, 7)))
    conversion = convert(model, everything(sites, Linear()))
    before = run(model, inputs)
    other = copy.deepcopy(model)
    assert torch.equal(run(other, inputs), before)
    run(other, larger)  # a grid that the first has never seen
    for key, p in other.named_parameters():
        if ".attnconvert." in key:
            p.data.normal_()
    assert torch.equal(run(model, inputs), before)
    assert not torch.allclose(run(other, inputs), before)
    conversion.remove()
    assert type(model.transformer_blocks[0].attn.processor).__name__ == "FluxAttnProcessor"
    assert not torch.allclose(run(other, inputs), run(model, inputs))


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "UNet2DConditionModel"])
def test_processors_show_the_signature_of_the_stock_ones(name) -> None:
    # diffusers drops arguments, such as rotary embeddings, that the signature does not name
    model = tiny(name)
    sites = find_sites(model)
    modules = [model.get_submodule(site.name) for site in sites]
    stock = [inspect.signature(m.processor.__call__) for m in modules]
    with converted(model, everything(sites, Linear())):
        assert [inspect.signature(m.processor.__call__) for m in modules] == stock


def test_a_conversion_that_was_wiped_does_not_run_dense() -> None:
    model = tiny("UNet2DConditionModel")
    sites = find_sites(model)
    inputs = dummy_inputs(model, (6, 8))
    conversion = convert(model, everything(sites, Linear()))
    model.set_attn_processor(AttnProcessor2_0())
    said = message(model, inputs)
    assert sites[0].name in said
    assert "convert again" in said
    conversion.remove()
    run(model, inputs)
    with converted(model, everything(sites, Linear())), pytest.raises(Unsupported, match="load adapters"):
        type(model.get_submodule(sites[0].name).processor)()  # as the loader of IP-Adapters does


def test_fused_projections_that_swap_processors_are_seen() -> None:
    model = tiny("SD3Transformer2DModel")
    with converted(model, everything(find_sites(model), Linear())):
        model.fuse_qkv_projections()
        assert "FusedJointAttnProcessor2_0" in message(model, dummy_inputs(model, (4, 6)))


def test_fused_projections_that_keep_processors_give_the_same() -> None:
    model = tiny("FluxTransformer2DModel")
    inputs = dummy_inputs(model, (4, 6))
    with converted(model, everything(find_sites(model), Linear())):
        before = run(model, inputs)
        model.fuse_qkv_projections()
        torch.testing.assert_close(run(model, inputs), before)


def test_converting_twice_is_refused() -> None:
    model = tiny("WanTransformer3DModel")
    plan = all_full(find_sites(model))
    with converted(model, plan), pytest.raises(ValueError, match="converted already"):
        convert(model, plan)


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel", "UNet2DConditionModel"])
def test_lora_of_the_base_model_works_on_the_converted_one(name) -> None:
    model = tiny(name)
    sites = find_sites(model)
    inputs = dummy_inputs(model, GRIDS[sites[0].axes][0])
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    torch.manual_seed(1)
    plain = copy.deepcopy(model)
    plain.add_adapter(config)
    weights = {key: p for key, p in plain.state_dict().items() if "lora_" in key}
    with converted(model, all_full(sites)):
        without = run(model, inputs)
        model.add_adapter(config)
        missing = model.load_state_dict(weights, strict=False)
        assert not missing.unexpected_keys
        assert relative(run(model, inputs), without) > 1e-3
        assert relative(run(model, inputs), run(plain, inputs)) < 1e-4
        model.disable_adapters()
        torch.testing.assert_close(run(model, inputs), without)


def test_controlnet_residuals_of_a_unet_reach_the_converted_model() -> None:
    model = tiny("UNet2DConditionModel")
    sites = find_sites(model)
    control = diffusers.ControlNetModel.from_unet(model).eval()
    for p in control.parameters():
        p.data.add_(0.02)
    inputs = dummy_inputs(model, (8, 8))
    shared = (inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"])
    with torch.no_grad():
        down, mid = control(*shared, torch.randn(1, 3, 64, 64), return_dict=False)
    guided = {**inputs, "down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    stock = run(model, guided)
    assert relative(stock, run(model, inputs)) > 1e-2
    with converted(model, all_full(sites)):
        assert relative(run(model, guided), stock) < 1e-5


def test_controlnet_residuals_of_flux_reach_the_converted_model() -> None:
    model = tiny("FluxTransformer2DModel")
    sites = find_sites(model)
    control = diffusers.FluxControlNetModel(**{**TINY["FluxTransformer2DModel"], "num_layers": 1}).eval()
    for p in control.parameters():
        p.data.normal_(0, 0.2)
    inputs = dummy_inputs(model, (4, 6))
    with torch.no_grad():
        blocks, singles = control(**inputs, controlnet_cond=torch.randn(1, 24, 4))
    guided = {**inputs, "controlnet_block_samples": blocks, "controlnet_single_block_samples": singles}
    stock = run(model, guided)
    assert relative(stock, run(model, inputs)) > 1e-2
    with converted(model, all_full(sites)):
        assert relative(run(model, guided), stock) < 1e-5


IMAGE = [Disc(radius=2, pool=2), Neighbourhood(window=3), Tiles(window=1, tile=2), Agent(agents=2), Linear(conv=3)]
IMAGE += [Sparse(keep=0.3, block=32), Sla(keep=0.3, block=32), Timed(above=0.5, late=Disc(radius=2))]
VIDEO = [Radial(decay=0.5, floor=2), References(every=2), Frames(before=1), Disc(radius=2)]
COMPILED = [("FluxTransformer2DModel", {"num_layers": 4, "num_single_layers": 4}, IMAGE)]
COMPILED += [("SD3Transformer2DModel", {"num_layers": 4, "dual_attention_layers": ()}, IMAGE[::2])]
COMPILED += [("WanTransformer3DModel", {"num_layers": 4}, VIDEO)]


@pytest.mark.parametrize(("name", "changes", "specs"), COMPILED, ids=[x[0] for x in COMPILED])
def test_a_converted_model_compiles_into_one_graph_whatever_its_operators(name, changes, specs) -> None:
    model = tiny(name, **changes)
    sites = find_sites(model)
    plan = {site: [spec] * site.kv_heads for site, spec in zip(sites, specs, strict=True)}
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    with converted(model, plan):
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        inputs = dummy_inputs(model, GRIDS[sites[0].axes][0], 11, batch=2)
        for times in ((0.9, 0.9), (0.9, 0.2), (0.1, 0.2)):  # `timed` has another operator for each of them
            inputs["timestep"] = torch.tensor(times) * denoiser(model).noise
            expected = run(model, inputs)
            torch.testing.assert_close(run(compiled, inputs), expected)
            if times == (0.9, 0.9):
                graphs = counter.frame_count
    assert counter.frame_count == graphs, "another step is not compiled anew"


def test_blocks_that_are_compiled_one_by_one_share_their_graphs() -> None:
    model = tiny("FluxTransformer2DModel", num_layers=1, num_single_layers=4)
    sites = find_sites(model)
    inputs = dummy_inputs(model, (4, 6))
    torch._dynamo.reset()
    counter = CompileCounter()
    with converted(model, everything(sites, Linear())):
        expected = run(model, inputs)
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
        torch.testing.assert_close(run(model, inputs), expected)
    assert counter.frame_count == 3  # two kinds of block; what the first of the one is given has strides of its own


def test_compiled_flux_says_when_it_cannot_know_the_grid() -> None:
    model = tiny("FluxTransformer2DModel")
    plan = everything(find_sites(model), Linear())
    torch._dynamo.reset()
    with converted(model, plan):
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with pytest.raises(Exception, match="run the model once at this size before it is compiled"):
            run(compiled, dummy_inputs(model, (4, 6)))
        torch._dynamo.reset()
        run(model, dummy_inputs(model, (4, 6)))
        run(compiled, dummy_inputs(model, (4, 6)))
        with pytest.raises(RuntimeError, match="img_ids are not of 4 × 6 tokens"):
            run(compiled, dummy_inputs(model, (3, 8)))


def test_what_is_not_a_grid_is_refused() -> None:
    model = tiny("FluxTransformer2DModel")
    inputs = dummy_inputs(model, (4, 6), 3)
    with converted(model, all_full(find_sites(model))):
        reference = {**inputs, "img_ids": inputs["img_ids"].clone()}
        reference["img_ids"][12:, 0] = 1
        assert "reference images" in message(model, reference)
        columns = {**inputs, "img_ids": inputs["img_ids"][:, [0, 2, 1]]}
        assert "row-major" in message(model, columns)
        ragged = {**inputs, "img_ids": inputs["img_ids"][:-1], "hidden_states": inputs["hidden_states"][:, :-1]}
        assert "row-major" in message(model, ragged)


def test_masks_that_are_no_padding_are_refused() -> None:
    model = tiny("PixArtTransformer2DModel")
    inputs = dummy_inputs(model, (4, 6))
    inputs["attention_mask"] = torch.ones(1, 24)  # diffusers makes a bias of it
    with converted(model, all_full(find_sites(model))):
        assert "boolean padding mask" in message(model, inputs)


def test_attention_that_cannot_be_caught_is_refused() -> None:
    model = tiny("UNet2DConditionModel")
    sites = find_sites(model)
    model.set_attn_processor(AttnProcessor())
    with pytest.raises(Unsupported, match="does not call scaled_dot_product_attention"):
        find_sites(model)
    with pytest.raises(Unsupported, match=r"attn1: AttnProcessor calls neither"):
        convert(model, all_full(sites))
    assert all(type(processor) is AttnProcessor for processor in model.attn_processors.values())


def test_a_plan_of_another_model_is_refused() -> None:
    model, other = tiny("WanTransformer3DModel"), tiny("WanTransformer3DModel", num_attention_heads=4)
    with converted(other, all_full(find_sites(model))):
        assert "the plan is of another model" in message(other, dummy_inputs(other, (2, 4, 4)))


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "UNet2DConditionModel"])
def test_a_saved_conversion_loads_as_it_was_and_as_nothing_else(name, tmp_path) -> None:
    model = tiny(name)
    sites = find_sites(model)
    cls = converted_class(f"Converted{name}")
    config = {**model.config, "attnconvert": plan_block(name, everything(sites, Linear()))}
    first = cls.from_config(config).eval()
    assert all(
        ".processor.attnconvert." in key for key in first.load_state_dict(model.state_dict(), False).missing_keys
    )
    first.save_pretrained(tmp_path / "first")
    again = cls.from_pretrained(tmp_path / "first")
    again.save_pretrained(tmp_path / "again")
    last = cls.from_pretrained(tmp_path / "again")
    inputs = dummy_inputs(model, GRIDS[2][0])
    torch.testing.assert_close(run(last, inputs), run(first, inputs))  # weights are aligned differently
    assert [*last.conversion.sites] == [site.name for site in sites]
    saved, twice = (json.loads((tmp_path / x / "config.json").read_text()) for x in ("first", "again"))
    assert saved["_class_name"] == twice["_class_name"] == f"Converted{name}"
    assert saved["attnconvert"] == twice["attnconvert"]
    with pytest.raises(ValueError, match="the attention of this model was converted"):
        type(model).from_pretrained(tmp_path / "again")
    half = cls.from_pretrained(tmp_path / "again", torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert {p.dtype for p in half.conversion.learned().values()} == {torch.float32}


def test_augmented_inputs_reach_queries_and_keys_of_the_student_only() -> None:
    model = tiny("UNet2DConditionModel")
    sites = find_sites(model)
    inputs = dummy_inputs(model, (6, 8))
    stock = run(model, inputs)
    with converted(model, everything(sites, Linear(augment=True))) as conversion:
        before = run(model, inputs)  # what augments starts as nothing
        attention, (learned,) = model.get_submodule(sites[0].name), conversion.sites[sites[0].name].children()
        for augment in (learned.augment_q, learned.augment_k):
            augment.mlp[-1].weight.data.normal_()
        assert relative(run(model, inputs), before) > 1e-3
        hidden = torch.randn(1, 48, 32)
        torch.testing.assert_close(attention.to_q(hidden), hidden_after(learned.augment_q, hidden, attention.to_q))
        torch.testing.assert_close(attention.to_k(hidden), hidden_after(learned.augment_k, hidden, attention.to_k))
        with conversion.teacher():
            assert relative(run(model, inputs), stock) < 1e-5
    assert torch.equal(run(model, inputs), stock)
    attention.to_q = nn.Linear(16, 32)
    with pytest.raises(Unsupported, match="augment_q needs a to_q of 32 channels, and it takes 16"):
        convert(model, everything(sites, Linear(augment=True)))


def hidden_after(augment, hidden, projection):
    return nn.functional.linear(augment(hidden), projection.weight, projection.bias)


def test_a_pipeline_finds_the_class_of_a_converted_denoiser_in_the_package(tmp_path) -> None:
    name = "FluxTransformer2DModel"
    model = tiny(name)
    cls = getattr(attnconvert, f"Converted{name}")
    config = {**model.config, "attnconvert": plan_block(name, everything(find_sites(model), Linear()))}
    student = cls.from_config(config).eval()
    parts = dict.fromkeys(["vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    diffusers.FluxPipeline(**parts, scheduler=scheduler, transformer=student).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"][1] == f"Converted{name}"
    loaded = diffusers.FluxPipeline.from_pretrained(tmp_path, **parts).transformer
    assert type(loaded) is cls
    inputs = dummy_inputs(model, (4, 6))
    torch.testing.assert_close(run(loaded, inputs), run(student, inputs))
    with pytest.raises(AttributeError, match="ConvertedNothing"):
        attnconvert.ConvertedNothing  # noqa: B018
