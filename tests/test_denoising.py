"""How each denoiser of diffusers is called."""

from __future__ import annotations

from typing import Any

import prompted_denoisers as denoisers
import pytest
import torch

from attnconvert.convert.errors import UsageError
from attnconvert.convert.hosts import denoising
from attnconvert.convert.hosts.denoising import (
    Calling,
    arguments,
    latent_shape,
    pack,
    positions,
    predict,
    unpack,
)
from attnconvert.convert.hosts.sites import Unsupported


def test_packing_puts_a_patch_into_each_token_and_unpacking_undoes_it() -> None:
    x = torch.randn(2, 3, 6, 8)
    tokens = pack(x)
    assert tokens.shape == (2, 12, 12)
    assert torch.equal(tokens[0, 1 * 4 + 2].view(3, 2, 2), x[0, :, 2:4, 4:6])
    assert torch.equal(unpack(tokens, (6, 8)), x)
    with pytest.raises(UsageError, match="even sides, not 6 × 7"):
        pack(torch.zeros(1, 1, 6, 7))


def test_positions_count_tokens_or_are_stretched_to_the_grid_of_training() -> None:
    plain = positions((2, 3), None, torch.device("cpu"))
    assert plain.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]
    own = positions((16, 16), None, torch.device("cpu"))
    assert torch.equal(positions((16, 16), (16, 16), torch.device("cpu")), own)
    twice = positions((32, 32), (16, 16), torch.device("cpu"))
    assert twice[[0, 1, -1]].tolist() == [[0, -0.25, -0.25], [0, -0.25, 0.25], [0, 15.25, 15.25]]
    torch.testing.assert_close(twice.mean(0), own.mean(0))


@pytest.mark.parametrize("name", denoisers.DENOISERS)
def test_every_denoiser_is_called_in_its_own_words(name: str) -> None:
    _, _, conditions, size = denoisers.DENOISERS[name]
    model = denoisers.tiny(name)
    x = torch.randn(2, *latent_shape(model, size), generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.3, 0.9])
    with torch.no_grad():
        found = predict(model, x, t, conditions)
        assert found.shape == x.shape
        assert bool(found.isfinite().all())
        alone = predict(model, x[1:], t[1:], {key: value[1:] for key, value in conditions.items()})
        torch.testing.assert_close(found[1:], alone, atol=1e-5, rtol=1e-4)
        for other in (  # time, latents and each condition count
            predict(model, x, t.flip(0), conditions),
            predict(model, x + 0.5, t, conditions),
            *(
                predict(model, x, t, {**conditions, key: value.flip(0)})
                for key, value in conditions.items()
                if value.is_floating_point() and not (name == "sd3" and key == "encoder_hidden_states")
            ),
        ):
            assert float((other - found).abs().max()) > 1e-5


def test_what_hangs_on_the_class_reaches_the_model() -> None:
    def given(name: str, size: tuple[int, ...], **changes: Any) -> dict[str, Any]:
        model = denoisers.tiny(name, **changes)
        x = torch.zeros(2, *latent_shape(model, size))
        return arguments(model, x, torch.tensor([1.0, 0.5]), denoisers.DENOISERS[name][2], Calling(guidance=6.0))

    flux = given("flux", (8, 12))
    assert flux["timestep"].tolist() == [1.0, 0.5]
    assert flux["guidance"].tolist() == [6.0, 6.0]
    assert (flux["hidden_states"].shape, flux["img_ids"].shape) == ((2, 24, 16), (24, 3))
    assert "guidance" not in given("flux", (8, 12), guidance_embeds=False)
    assert given("hunyuan-video", (2, 4, 4))["guidance"].tolist() == [6000.0, 6000.0]
    assert given("sd3", (8, 8))["timestep"].tolist() == [1000.0, 500.0]
    assert given("unet", (8, 8))["timestep"].tolist() == [999.0, 499.0]
    assert given("mochi", (2, 4, 4))["timestep"].tolist() == [0.0, 500.0]
    assert given("unet-xl", (8, 12))["added_cond_kwargs"]["time_ids"].tolist() == [[64, 96, 0, 0, 64, 96]] * 2
    large = given("pixart-1024", (8, 12))["added_cond_kwargs"]
    assert (large["resolution"].tolist(), large["aspect_ratio"].shape) == ([[64, 96]] * 2, (2, 1))
    cog = given("cogvideox-5b", (3, 8, 6))
    assert cog["hidden_states"].shape == (2, 3, 4, 8, 6)
    assert cog["image_rotary_emb"][0].shape == (3 * 4 * 3, 16)


def test_cogvideox_fits_other_proportions_into_the_grid_of_training() -> None:
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    for grid in ((30, 45), (45, 30), (20, 60), (15, 15), (48, 85)):
        assert denoising._fitted(grid, (30, 45)) == get_resize_crop_region_for_grid(grid, 45, 30)


def test_half_precision_models_get_half_precision_and_answer_in_the_latents_type() -> None:
    model, conditions = denoisers.tiny("flux").bfloat16(), denoisers.DENOISERS["flux"][2]
    x = torch.randn(2, *latent_shape(model, (8, 8)))
    given = arguments(model, x, torch.ones(2), conditions)
    assert given["encoder_hidden_states"].dtype == given["hidden_states"].dtype == torch.bfloat16
    with torch.no_grad():
        assert predict(model, x, torch.ones(2), conditions).dtype == torch.float32


def test_calls_that_do_not_fit_are_refused() -> None:
    model, conditions = denoisers.tiny("flux"), denoisers.DENOISERS["flux"][2]
    x, t = torch.zeros(2, 4, 8, 8), torch.ones(2)
    with pytest.raises(UsageError, match="lacks pooled_projections; it holds encoder_hidden_states"):
        arguments(model, x, t, {"encoder_hidden_states": conditions["encoder_hidden_states"]})
    with pytest.raises(UsageError, match="has encoder_attention_mask, which it does not take"):
        arguments(model, x, t, {**conditions, "encoder_attention_mask": torch.ones(2, 5)})
    with pytest.raises(UsageError, match="reads 4 channels and the latents have 5"):
        arguments(model, torch.zeros(2, 5, 8, 8), t, conditions)
    with pytest.raises(UsageError, match=r"\(height, width\), not \(3, 8, 8\)"):
        latent_shape(model, (3, 8, 8))
    with pytest.raises(Unsupported, match="Linear is no denoiser that is known how to call; known are FluxTrans"):
        arguments(torch.nn.Linear(1, 1), x, t, conditions)
    xl = denoisers.tiny("unet-xl")
    with pytest.raises(UsageError, match="SDXL denoiser needs pooled_projections"):
        arguments(xl, x, t, denoisers.DENOISERS["unet"][2])
