"""Denoisers of diffusers: their sites, and a plan at work in them."""

import math

import diffusers
import pytest
import torch
from denoisers import GRIDS, TINY, everything, relative, run, tiny
from torch import nn

from attnconvert.convert.hosts.denoisers import (
    CONDITIONS,
    dummy_inputs,
    find_sites,
    latent_shape,
    probe_grid,
    prompt_length,
)
from attnconvert.convert.hosts.grids import DENOISERS
from attnconvert.convert.hosts.sites import Unsupported, all_full
from attnconvert.convert.hosts.surgery import converted
from attnconvert.kernels.masks import Layout
from attnconvert.kernels.spec import Linear, TopBlocks
from attnconvert.kernels.spec_grid import Disc

SEQUENCES = (  # given as tokens that were cut into patches before
    "FluxTransformer2DModel",
    "Flux2Transformer2DModel",
    "QwenImageTransformer2DModel",
    "LTXVideoTransformer3DModel",
)
TEXT = {
    "FluxTransformer2DModel": "first",
    "Flux2Transformer2DModel": "first",
    "QwenImageTransformer2DModel": "first",
    "SD3Transformer2DModel": "last",
    "HunyuanVideoTransformer3DModel": "last",
    "CogVideoXTransformer3DModel": "first",
    "MochiTransformer3DModel": "last",
}
everywhere = pytest.mark.parametrize("name", sorted(TINY))


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
    """What changes in the queries of the first layer is one token where one place of the latent changes."""
    model = tiny(name)
    if name == "MochiTransformer3DModel":
        for p in model.time_embed.pooler.parameters():  # otherwise the prompt changes what modulates every token
            p.data.zero_()
    sites = find_sites(model)
    grid, text = probe_grid(model), prompt_length(model)
    seen = []
    inputs = dummy_inputs(model, grid, text)

    def keep(site, q, k, v, call):
        if site.site == sites[0]:
            seen.append((q, call.layout))

    def moved(**changes):
        run(model, {**inputs, **changes})
        return ((seen[-1][0] - seen[0][0]).abs().amax((0, 1, 3)) > 1e-5).nonzero().flatten().tolist()

    with converted(model, all_full(sites)) as conversion, conversion.observe(keep):
        run(model, inputs)
        layout = seen[0][1]
        assert layout == sites[0].layout(grid, text)
        if sites[0].text:
            prompt = inputs["encoder_hidden_states"]
            start = 0 if sites[0].text == "first" else layout.tokens - text
            assert moved(encoder_hidden_states=prompt + torch.randn(prompt.shape[-1])) == [*range(start, start + text)]
        if name != "UNet2DConditionModel":  # whose convolutions spread what changes
            place = tuple(n - 2 for n in grid)
            token = layout.text_first + int(torch.arange(math.prod(grid)).view(*grid)[place])
            assert moved(hidden_states=_changed(name, inputs["hidden_states"], grid, place)) == [token]


def _changed(name, latent, grid, place):
    """The latent, changed in the patch at one place of the grid."""
    latent = latent.clone()
    if name in SEQUENCES:
        latent.unflatten(1, grid)[(slice(None), *place)] += 3
        return latent
    late = name == "CogVideoXTransformer3DModel"  # (B, T, C, H, W)
    patches = latent.transpose(1, 2) if late else latent  # a view
    sizes = [side // n for side, n in zip(patches.shape[2:], grid, strict=True)]
    patches[(..., *(slice(n * size, (n + 1) * size) for n, size in zip(place, sizes, strict=True)))] += 3
    return latent


@everywhere
def test_a_plan_runs_at_any_size_and_length_of_text_and_is_undone(name) -> None:
    model = tiny(name)
    sites = find_sites(model)
    processors = {n: m.processor for n, m in model.named_modules() if hasattr(m, "processor")}
    keys = list(model.state_dict())
    cases = [dummy_inputs(model, GRIDS[sites[0].axes][n], text, batch=2) for n, text in ((0, 11), (1, 7))]
    stock = [run(model, inputs) for inputs in cases]
    for spec in (Linear(), Disc(radius=2), TopBlocks(keep=2, block=32, rows=16)):
        with converted(model, everything(sites, spec)) as conversion:
            for inputs, before in zip(cases, stock, strict=True):
                found = run(model, inputs)
                assert found.isfinite().all()
                if not isinstance(spec, TopBlocks):  # which keeps everything of so few tokens
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
        torch.testing.assert_close(call.time, expected if batch == 2 else expected[number % 2][None], atol=2e-3, rtol=0)


@pytest.mark.parametrize("spec", [Linear(), Disc(radius=2)])
@pytest.mark.parametrize("name", ["HunyuanVideoTransformer3DModel", "MochiTransformer3DModel"])
def test_padded_text_gives_what_the_shorter_text_gives(name, spec) -> None:
    model = tiny(name)
    short = dummy_inputs(model, (2, 4, 5), 6, batch=2)
    padded = dict(short)
    padding = torch.randn(2, 4, short["encoder_hidden_states"].shape[-1])
    padded["encoder_hidden_states"] = torch.cat([short["encoder_hidden_states"], padding], 1)
    mask = short["encoder_attention_mask"]
    padded["encoder_attention_mask"] = torch.cat([mask, torch.zeros(2, 4, dtype=mask.dtype)], 1)
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


def test_latents_have_the_shape_of_their_grid() -> None:
    assert latent_shape(tiny("SD3Transformer2DModel"), (3, 5), 2) == (2, 4, 6, 10)
    assert latent_shape(tiny("CogVideoXTransformer3DModel"), (3, 2, 5)) == (1, 3, 4, 4, 10)
    assert latent_shape(tiny("FluxTransformer2DModel"), (3, 5)) == (1, 15, 4)
    with pytest.raises(ValueError, match="a grid of 3 axes"):
        latent_shape(tiny("WanTransformer3DModel"), (3, 5))
