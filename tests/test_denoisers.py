"""Denoisers of diffusers: sites, conversion, what it must survive, and what it must refuse."""

import copy
import inspect
import json

import diffusers
import pytest
import torch
from denoisers import TINY, tiny
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from peft import LoraConfig
from torch import nn

from attnconvert.convert.hosts import diffusers as host
from attnconvert.convert.hosts.denoisers import (
    CONDITIONS,
    dummy_inputs,
    find_sites,
    latent_shape,
    probe_grid,
    prompt_length,
)
from attnconvert.convert.hosts.grids import DENOISERS
from attnconvert.convert.hosts.registration_images import converted_class
from attnconvert.convert.hosts.sites import Unsupported, all_full, plan_block
from attnconvert.convert.hosts.surgery import convert, converted
from attnconvert.kernels.masks import Layout
from attnconvert.kernels.spec import Linear, TopBlocks, Window

GRIDS = {2: ((6, 4), (8, 10)), 3: ((3, 4, 6), (2, 6, 4))}
TEXT = {
    "FluxTransformer2DModel": "first",
    "SD3Transformer2DModel": "last",
    "HunyuanVideoTransformer3DModel": "last",
    "CogVideoXTransformer3DModel": "first",
    "MochiTransformer3DModel": "last",
}
everywhere = pytest.mark.parametrize("name", sorted(TINY))


def everything(sites, spec):
    return {site: [spec] * site.kv_heads for site in sites}


@torch.no_grad()
def run(model, inputs):
    return model(**inputs)[0]


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def error(sites, plan_model, inputs):
    """What a message says when the model runs."""
    with pytest.raises(Unsupported) as caught:
        run(plan_model, inputs)
    return str(caught.value)


def test_the_tables_name_the_same_classes() -> None:
    assert sorted(TINY) == sorted(DENOISERS) == sorted(CONDITIONS)


@everywhere
def test_sites_are_the_self_attentions_in_running_order(name) -> None:
    model = tiny(name)
    sites = find_sites(model)
    assert [site.layer for site in sites] == list(range(len(sites)))
    assert {site.axes for site in sites} == {DENOISERS[name].axes}
    assert not any(site.causal for site in sites)
    assert {site.text for site in sites} - {""} == ({TEXT[name]} if name in TEXT else set())
    names = [site.name for site in sites]
    processors = [n for n, m in model.named_modules() if hasattr(m, "processor")]
    others = [n for n in processors if n not in names]
    assert all("attn2" in n or "token_refiner" in n for n in others)
    downs = {site.name: site.down for site in sites}
    assert set(downs.values()) == ({1, 2} if name == "UNet2DConditionModel" else {1})
    if name == "SD3Transformer2DModel":
        assert [(site.name[-5:], site.text) for site in sites[:2]] == [
            ("attn", "last")[:0] or (".attn", "last"),
            ("attn2", ""),
        ]


@everywhere
def test_tokens_stand_where_the_layout_says(name) -> None:
    """One place of the latent changed in the first layer's queries is one token; so it is with one token of text."""
    model = tiny(name)
    sites = find_sites(model)
    grid, text = probe_grid(model), prompt_length(model)
    seen = []

    def observe(site, q, k, v, call):
        if site.site == sites[0]:
            seen.append((q, call.layout))

    def queries(inputs):
        seen.clear()
        run(model, inputs)
        return seen[0]

    inputs = dummy_inputs(model, grid, text)
    with converted(model, all_full(sites)) as conversion, conversion.observe(observe):
        before, layout = queries(inputs)
        assert layout == sites[0].layout(grid, text)
        if sites[0].text:
            prompt = inputs["encoder_hidden_states"]
            inputs["encoder_hidden_states"] = prompt + torch.randn(prompt.shape[-1])
            moved = ((queries(inputs)[0] - before).abs().amax((0, 1, 3)) > 1e-5).nonzero().flatten().tolist()
            image = layout.tokens - text
            start = 0 if sites[0].text == "first" else image
            assert moved == list(range(start, start + text))
            inputs["encoder_hidden_states"] = prompt
        if name == "UNet2DConditionModel":
            return  # convolutions and norms of groups spread what changes
        key = "hidden_states"
        place = [n - 2 for n in grid]
        latent = inputs[key].clone()
        if name == "FluxTransformer2DModel":
            latent[:, place[0] * grid[1] + place[1]] += 3
        else:
            patch = [side // n for side, n in zip(_sides(latent, len(grid), name), grid, strict=True)]
            spot = tuple(slice(n * p, (n + 1) * p) for n, p in zip(place, patch, strict=True))
            if name == "CogVideoXTransformer3DModel":
                latent[:, spot[0], :, spot[1], spot[2]] += 3
            else:
                latent[(..., *spot)] += 3
        inputs[key] = latent
        moved = ((queries(inputs)[0] - before).abs().amax((0, 1, 3)) > 1e-5).nonzero().flatten().tolist()
        index = 0
        for n, size in zip(place, grid, strict=True):
            index = index * size + n
        assert moved == [layout.text_first + index]


def _sides(latent, axes, name):
    if name == "CogVideoXTransformer3DModel":
        return latent.shape[1], *latent.shape[3:]
    return latent.shape[-axes:]


@everywhere
def test_a_plan_runs_at_any_size_and_length_of_text_and_is_undone(name) -> None:
    model = tiny(name)
    sites = find_sites(model)
    processors = {n: m.processor for n, m in model.named_modules() if hasattr(m, "processor")}
    keys = list(model.state_dict())
    cases = [dummy_inputs(model, GRIDS[sites[0].axes][n], text, batch=2) for n, text in ((0, 11), (1, 7))]
    stock = [run(model, inputs) for inputs in cases]
    for spec in (Linear(), TopBlocks(keep=2, block=32, rows=16)):
        with converted(model, everything(sites, spec)) as conversion:
            for inputs, before in zip(cases, stock, strict=True):
                found = run(model, inputs)
                assert found.isfinite().all()
                if isinstance(spec, Linear):
                    assert relative(found, before) > 1e-3  # it is not the dense model
                with conversion.teacher():
                    assert relative(run(model, inputs), before) < 1e-4
            own = [key for key in model.state_dict() if key not in keys]
            assert sorted(own) == sorted(conversion.learned())
            assert all(".processor.attnconvert." in key for key in own)
            assert bool(own) is isinstance(spec, Linear)
        assert list(model.state_dict()) == keys
    assert {n: m.processor for n, m in model.named_modules() if hasattr(m, "processor")} == processors
    assert all(torch.equal(run(model, inputs), before) for inputs, before in zip(cases, stock, strict=True))


@everywhere
def test_the_call_says_where_tokens_stand_and_how_noisy_they_are(name) -> None:
    model = tiny(name)
    sites = find_sites(model)
    grid = GRIDS[sites[0].axes][1]
    inputs = dummy_inputs(model, grid, 9, batch=2)
    calls = []
    with (
        converted(model, everything(sites, Linear())) as conversion,
        conversion.observe(lambda site, q, k, v, call: calls.append((site.site, q.shape[0], call))),
    ):
        run(model, inputs)
    samples = 2 if name == "MochiTransformer3DModel" else 1  # it attends for one sample after the other
    assert [site for site, _, _ in calls] == [site for site in sites for _ in range(samples)]
    for number, (site, batch, call) in enumerate(calls):
        first, last = (9 if site.text == side else 0 for side in ("first", "last"))
        own = tuple(-(-n // site.down) for n in grid)
        assert call.layout == Layout(grid=own, text_first=first, text_last=last)
        assert not call.causal
        expected = torch.tensor([0.7, 0.4])
        torch.testing.assert_close(call.time, expected if batch == 2 else expected[number % 2][None], atol=1e-3, rtol=0)


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
    message = error(sites, model, inputs)
    assert sites[0].name in message
    assert "convert again" in message
    conversion.remove()
    run(model, inputs)
    with converted(model, everything(sites, Linear())), pytest.raises(Unsupported, match="load adapters"):
        type(model.get_submodule(sites[0].name).processor)()  # as the loader of IP-Adapters does


def test_fused_projections_that_swap_processors_are_seen() -> None:
    model = tiny("SD3Transformer2DModel")
    with converted(model, everything(find_sites(model), Linear())):
        model.fuse_qkv_projections()
        assert "FusedJointAttnProcessor2_0" in error(None, model, dummy_inputs(model, (4, 6)))


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
    with converted(model, all_full(sites)) as conversion:
        without = run(model, inputs)
        model.add_adapter(config)
        missing = model.load_state_dict(weights, strict=False)
        assert not missing.unexpected_keys
        assert relative(run(model, inputs), without) > 1e-3
        assert relative(run(model, inputs), run(plain, inputs)) < 1e-4
        conversion.sites  # noqa: B018
        model.disable_adapters()
        torch.testing.assert_close(run(model, inputs), without)


def test_controlnet_residuals_of_a_unet_reach_the_converted_model() -> None:
    model = tiny("UNet2DConditionModel")
    sites = find_sites(model)
    control = diffusers.ControlNetModel.from_unet(model).eval()
    for p in control.parameters():
        p.data += 0.02
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
    control = diffusers.FluxControlNetModel.from_transformer(
        model, num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=16
    ).eval()
    for p in control.parameters():
        p.data += 0.02
    inputs = dummy_inputs(model, (4, 6))
    with torch.no_grad():
        blocks, singles = control(**inputs, controlnet_cond=torch.randn(1, 24, 4))
    guided = {**inputs, "controlnet_block_samples": blocks, "controlnet_single_block_samples": singles}
    stock = run(model, guided)
    assert relative(stock, run(model, inputs)) > 1e-2
    with converted(model, all_full(sites)):
        assert relative(run(model, guided), stock) < 1e-5


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel"])
def test_a_converted_model_compiles_into_one_graph(name) -> None:
    model = tiny(name)
    sites = find_sites(model)
    grids = GRIDS[sites[0].axes]
    cases = [dummy_inputs(model, grid, text, batch=2) for grid, text in ((grids[0], 11), (grids[1], 7))]
    torch._dynamo.reset()
    with converted(model, everything(sites, Linear())):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for inputs in cases:
            expected = run(model, inputs)
            torch.testing.assert_close(run(compiled, inputs), expected)


def test_blocks_that_are_compiled_one_by_one_share_their_graphs() -> None:
    model = tiny("FluxTransformer2DModel", num_layers=4, num_single_layers=4)
    sites = find_sites(model)
    inputs = dummy_inputs(model, (4, 6))
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    with converted(model, everything(sites, Linear())):
        expected = run(model, inputs)
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
        torch.testing.assert_close(run(model, inputs), expected)
    assert counter.frame_count < 8  # as many as there are blocks would be one for each


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


@pytest.mark.parametrize("spec", [Linear(), Window(size=8, sinks=0)])
@pytest.mark.parametrize("name", ["HunyuanVideoTransformer3DModel", "MochiTransformer3DModel"])
def test_padded_text_gives_what_the_shorter_text_gives(name, spec) -> None:
    model = tiny(name)
    short = dummy_inputs(model, (2, 4, 5), 6, batch=2)
    padded = dict(short)
    padding = torch.randn(2, 4, short["encoder_hidden_states"].shape[-1])
    padded["encoder_hidden_states"] = torch.cat([short["encoder_hidden_states"], padding], 1)
    mask = short["encoder_attention_mask"]
    padded["encoder_attention_mask"] = torch.cat([mask, torch.zeros(2, 4, dtype=mask.dtype)], 1)
    if name == "MochiTransformer3DModel":
        pass_over = model.time_embed  # pools the prompt by its mask as well
        assert pass_over is not None
    with converted(model, everything(find_sites(model), spec)):
        torch.testing.assert_close(run(model, padded), run(model, short), atol=1e-4, rtol=1e-4)


def test_samples_of_a_batch_may_be_padded_each_in_its_way() -> None:
    model = tiny("HunyuanVideoTransformer3DModel")
    inputs = dummy_inputs(model, (2, 4, 5), 6, batch=2)
    inputs["encoder_attention_mask"][0, 3:] = 0
    alone = {key: x[:1] if isinstance(x, torch.Tensor) else x for key, x in inputs.items()}
    with converted(model, everything(find_sites(model), Linear())):
        torch.testing.assert_close(run(model, inputs)[:1], run(model, alone), atol=1e-5, rtol=1e-4)


def test_sites_of_a_large_model_are_found_without_its_weights(caplog) -> None:
    caplog.set_level("INFO")
    with torch.device("meta"):
        flux = diffusers.FluxTransformer2DModel(guidance_embeds=True)
        video = diffusers.WanTransformer3DModel()
    sites = find_sites(flux)
    assert len(sites) == 57
    assert {(s.heads, s.kv_heads, s.dim, s.text) for s in sites} == {(24, 24, 128, "first")}
    sites = find_sites(video)
    assert [s.name for s in sites] == [f"blocks.{n}.attn1" for n in range(40)]
    assert "not compared" in caplog.text


def test_flux_reads_its_grid_from_coordinates_of_any_scale() -> None:
    model = tiny("FluxTransformer2DModel")
    layouts = []
    with (
        converted(model, all_full(find_sites(model))) as conversion,
        conversion.observe(lambda site, q, k, v, call: layouts.append(call.layout)),
    ):
        for scale, shift, grid in ((0.25, 0.125, (8, 6)), (3.0, -2.0, (5, 9)), (1.0, 0.0, (1, 7)), (1.0, 0.0, (7, 1))):
            inputs = dummy_inputs(model, grid, 3)
            inputs["img_ids"] = inputs["img_ids"] * scale + shift
            run(model, inputs)
            assert layouts[-1] == Layout(grid=grid, text_first=3)
        inputs = dummy_inputs(model, (2, 300), 3)
        inputs["img_ids"] = inputs["img_ids"].bfloat16()  # 257 is 256 there
        run(model, inputs)
        assert layouts[-1] == Layout(grid=(2, 300), text_first=3)


def test_what_is_not_a_grid_is_refused() -> None:
    model = tiny("FluxTransformer2DModel")
    inputs = dummy_inputs(model, (4, 6), 3)
    with converted(model, all_full(find_sites(model))):
        reference = {**inputs, "img_ids": inputs["img_ids"].clone()}
        reference["img_ids"][12:, 0] = 1
        assert "reference images" in error(None, model, reference)
        columns = {**inputs, "img_ids": inputs["img_ids"][:, [0, 2, 1]]}
        assert "row-major" in error(None, model, columns)
        ragged = {**inputs, "img_ids": inputs["img_ids"][:-1], "hidden_states": inputs["hidden_states"][:, :-1]}
        assert "row-major" in error(None, model, ragged)


def test_masks_that_are_no_padding_are_refused() -> None:
    model = tiny("PixArtTransformer2DModel")
    inputs = dummy_inputs(model, (4, 6))
    inputs["attention_mask"] = torch.ones(1, 24)  # diffusers makes a bias of it
    with converted(model, all_full(find_sites(model))):
        assert "boolean padding mask" in error(None, model, inputs)


def test_models_that_are_not_known_say_which_are() -> None:
    with pytest.raises(Unsupported, match="linear already"):
        find_sites(
            diffusers.SanaTransformer2DModel(
                in_channels=4,
                out_channels=4,
                num_attention_heads=2,
                attention_head_dim=8,
                num_layers=1,
                num_cross_attention_heads=2,
                cross_attention_head_dim=8,
                cross_attention_dim=16,
                caption_channels=8,
                sample_size=8,
            )
        )
    with pytest.raises(Unsupported, match="Linear is no denoiser that is known here; known are CogVideoX"):
        find_sites(nn.Linear(2, 2))


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
        assert "the plan is of another model" in error(None, other, dummy_inputs(other, (2, 4, 4)))


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
    assert torch.equal(run(last, inputs), run(first, inputs))
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
    class Augmented(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.augment_q, self.augment_k = (nn.Linear(width, width) for _ in range(2))

    model = tiny("UNet2DConditionModel")
    sites = find_sites(model)
    inputs = dummy_inputs(model, (6, 8))
    stock = run(model, inputs)
    with converted(model, all_full(sites)) as conversion:
        assert relative(run(model, inputs), stock) < 1e-5
    assert conversion.installed is False
    for width in (32, 16):
        conversion = host.Conversion(model, all_full(sites[:1]), _with(Augmented(width)), host._uninstall)
        try:
            if width == 16:
                with pytest.raises(RuntimeError):
                    run(model, inputs)
                continue
            changed = run(model, inputs)
            assert relative(changed, stock) > 1e-3
            with conversion.teacher():
                assert relative(run(model, inputs), stock) < 1e-5
            attention, learned = model.get_submodule(sites[0].name), conversion.sites[sites[0].name].extra
            hidden = torch.randn(1, 48, 32)
            direct = nn.functional.linear(hidden + learned.augment_q(hidden), attention.to_q.weight)
            torch.testing.assert_close(attention.to_q(hidden), direct)
        finally:
            conversion.remove()
    assert torch.equal(run(model, inputs), stock)


def _with(learned):
    """Installs operators that have learned this as well."""

    def install(model, sites):
        for mine in sites.values():
            mine.add_module("extra", learned)
        return host._install(model, sites)

    return install


def test_latents_have_the_shape_of_their_grid() -> None:
    assert latent_shape(tiny("SD3Transformer2DModel"), (3, 5), 2) == (2, 4, 6, 10)
    assert latent_shape(tiny("CogVideoXTransformer3DModel"), (3, 2, 5)) == (1, 3, 4, 4, 10)
    assert latent_shape(tiny("FluxTransformer2DModel"), (3, 5)) == (1, 15, 4)
    with pytest.raises(ValueError, match="a grid of 3 axes"):
        latent_shape(tiny("WanTransformer3DModel"), (3, 5))
