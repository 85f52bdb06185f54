"""Diffusion processes, sampling, how denoisers are called, and what images are judged by."""

from __future__ import annotations

import importlib.util
import json
import math
import struct
import sys
from pathlib import Path
from typing import Any

import denoisers
import numpy as np
import pytest
import torch
from torch import Tensor

from attnconvert.convert import image_metrics as metrics
from attnconvert.convert.conditioning import Conditions, load_conditions
from attnconvert.convert.errors import AssetMissing, UsageError
from attnconvert.convert.hosts import denoising
from attnconvert.convert.hosts.denoising import Calling, arguments, latent_shape, pack, positions, predict, unpack
from attnconvert.convert.hosts.sites import Unsupported
from attnconvert.convert.images import pixels, sheet
from attnconvert.convert.processes import Process, of_scheduler
from attnconvert.convert.progress import silent
from attnconvert.convert.sampling import Drawn, Sampler, noise, sample

ROOT = Path(__file__).parents[1]
ASSET = ROOT / "recipes" / "flux-mnist"
COG = Process(kind="v_prediction", snr_shift=3.0, zero_snr=True)
PROCESSES = {
    "flow": Process(),
    "epsilon": Process(kind="epsilon"),
    "pixart": Process(kind="epsilon", schedule="linear", beta_first=0.0001, beta_last=0.02),
    "v": Process(kind="v_prediction"),
    "cogvideox": COG,
}


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*shape, generator=generator), torch.randn(*shape, generator=generator)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_true_prediction_leads_back_to_the_data_in_one_step_or_many(name: str) -> None:
    process, (x, z) = PROCESSES[name], pair(3, 2, 4, 4)
    t = torch.tensor([0.3, 0.7, 0.95])
    noised, target = process.noised(x, z, t), process.target(x, z, t)
    torch.testing.assert_close(process.step(noised, target, t, torch.zeros(3)), x, atol=2e-5, rtol=1e-4)
    half = process.step(noised, target, t, t / 2)
    torch.testing.assert_close(half, process.noised(x, z, t / 2), atol=2e-5, rtol=1e-4)
    data, found = process.split(noised, target, t)
    torch.testing.assert_close(data, x, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found, z, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", PROCESSES)
def test_time_0_is_the_data_and_time_1_the_noise(name: str) -> None:
    process, (x, z) = PROCESSES[name], pair(2, 5)
    assert torch.equal(process.noised(x, z, torch.zeros(2)), x)
    _, sigma = process.coefficients(torch.ones(2))
    last = process.noised(x, z, torch.ones(2))
    assert torch.equal(last, z) if name in ("flow", "cogvideox") else bool((sigma > 0.995).all())


def test_tables_and_steps_are_those_of_diffusers() -> None:
    from diffusers import CogVideoXDDIMScheduler, DDIMScheduler

    given = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}
    plain = {**given, "clip_sample": False, "set_alpha_to_one": True}
    theirs = {
        "epsilon": DDIMScheduler(**plain),
        "v": DDIMScheduler(**plain, prediction_type="v_prediction"),
        "cogvideox": CogVideoXDDIMScheduler(**given, prediction_type="v_prediction", rescale_betas_zero_snr=True),
    }
    for name, scheduler in theirs.items():
        process = PROCESSES[name]
        assert of_scheduler({"_class_name": type(scheduler).__name__, **scheduler.config}) == process
        alpha, _ = process.coefficients(torch.arange(1, 1001) / 1000)
        torch.testing.assert_close(alpha.square(), scheduler.alphas_cumprod.float(), atol=1e-6, rtol=1e-5)
        scheduler.set_timesteps(8)
        times = process.times(8)
        assert denoising.trained_step(times[:-1]).tolist() == scheduler.timesteps.tolist()
        x, prediction = pair(1, 4)
        for n, step in enumerate(scheduler.timesteps):
            t, then = times[n].view(1), times[n + 1].view(1)
            want = scheduler.step(prediction, step, x, return_dict=False)[0]
            torch.testing.assert_close(process.step(x, prediction, t, then), want.float(), atol=1e-4, rtol=1e-4)


def test_flow_steps_and_mochi_s_turned_time_are_those_of_diffusers() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    x, velocity = pair(1, 4)
    ours = Process().times(7, shift=3.0)
    for inverted in (False, True):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, invert_sigmas=inverted)
        scheduler.set_timesteps(sigmas=torch.linspace(1, 0, 8)[:-1].tolist())
        sign = -1.0 if inverted else 1.0  # Mochi's velocity leads from the noise to the data
        for n, step in enumerate(scheduler.timesteps):
            own = 1000 * (1 - ours[n]) if inverted else 1000 * ours[n]
            torch.testing.assert_close(step.float(), own, atol=1e-2, rtol=1e-5)
            want = scheduler.step(sign * velocity, step, x, return_dict=False)[0]
            got = Process().step(x, velocity, ours[n].view(1), ours[n + 1].view(1))
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_times_fall_from_1_to_0_and_a_shift_lingers_near_the_noise() -> None:
    times = Process().times(14, 2.0)
    assert times[0] == 1
    assert times[-1] == 0
    assert bool((times.diff() < 0).all())
    torch.testing.assert_close(times[7], torch.tensor(2 / 3))
    with pytest.raises(UsageError, match="at most 1000"):
        COG.times(1001)
    with pytest.raises(UsageError, match="shift must be 1 for v_prediction, not 3"):
        COG.times(10, 3.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "score"}, "no diffusion process 'score'; known are flow, epsilon, v_prediction"),
        ({"schedule": "cosine"}, "no schedule of noise 'cosine'"),
        ({"kind": "epsilon", "zero_snr": True}, "zero_snr needs v_prediction"),
        ({"beta_first": 0.5, "beta_last": 0.1}, "not 0.5 and 0.1"),
    ],
)
def test_a_process_that_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Process(**settings)


def test_a_scheduler_of_another_process_is_refused() -> None:
    with pytest.raises(UsageError, match="'sample' on a 'linear' schedule of 1000 steps"):
        of_scheduler({"_class_name": "DDPMScheduler", "prediction_type": "sample"})
    assert of_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler"}) == Process()


CENTRES = torch.tensor([1.0, -2.0, 0.5, 0.0])  # what is asked for; the last is the entry without a prompt


def pulled(x: Tensor, t: Tensor, indices: Tensor) -> Tensor:
    """A flow whose data is one value per entry: the velocity is known exactly."""
    wide = (-1, *[1] * (x.ndim - 1))
    return (x - CENTRES[indices].view(wide)) / t.view(wide)


def draw(numbers: list[int], guidance: float = 1.0, trajectory: bool = False) -> Drawn:
    start, indices = noise((1, 4, 4), 5, numbers), torch.tensor(numbers) % 3
    sampler = Sampler(steps=5, guidance=guidance, shift=2.0)
    return sample(pulled, Process(), sampler, start, indices, torch.full((len(numbers),), 3), trajectory)


def test_sampling_finds_the_data_and_guidance_goes_beyond_it() -> None:
    wanted = CENTRES[[0, 1, 2]].view(3, 1, 1, 1).expand(3, 1, 4, 4)
    torch.testing.assert_close(draw([0, 1, 2]).x, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(draw([0, 1, 2], guidance=2.0).x, 2 * wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(draw([0, 1, 2], guidance=0.0).x, torch.zeros(3, 1, 4, 4), atol=1e-5, rtol=1e-5)


def test_a_trajectory_holds_every_state_with_both_predictions() -> None:
    drawn = draw([0, 1], guidance=2.0, trajectory=True)
    assert [round(s.t, 4) for s in drawn.states] == [round(float(t), 4) for t in Process().times(5, 2.0)[:-1]]
    first = drawn.states[0]
    assert torch.equal(first.x, noise((1, 4, 4), 5, [0, 1]))
    assert first.unprompted is not None
    torch.testing.assert_close(first.prompted, pulled(first.x, torch.ones(2), torch.tensor([0, 1])))
    torch.testing.assert_close(first.unprompted, pulled(first.x, torch.ones(2), torch.tensor([3, 3])))
    assert draw([0]).states == ()
    assert draw([0], trajectory=True).states[0].unprompted is None


def test_a_sample_does_not_depend_on_the_batch_it_is_drawn_in() -> None:
    together = draw([4, 5, 6, 7], guidance=1.5).x
    apart = torch.cat([draw([n], guidance=1.5).x for n in (4, 5, 6, 7)])
    assert torch.equal(together, apart)
    assert not torch.equal(noise((3,), 0, [1]), noise((3,), 1, [1]))
    assert not torch.equal(noise((3,), 0, [1]), noise((3,), 0, [2]))


def test_guidance_without_the_entry_for_it_is_refused() -> None:
    with pytest.raises(UsageError, match="guidance 2.0 needs the entry without a prompt"):
        sample(pulled, Process(), Sampler(steps=2, guidance=2.0), torch.zeros(1, 2), torch.tensor([0]))
    with pytest.raises(UsageError, match="has none"):
        Conditions({"a": torch.zeros(1, 2)}, ("x",)).nulls(2)


def test_a_bank_of_conditions_survives_its_file(tmp_path: Path) -> None:
    bank = Conditions({"a": torch.arange(6.0).view(3, 2), "m": torch.tensor([1, 0, 1])}, ("a fox", "ein Fuchs", ""), 2)
    bank.save(tmp_path / "bank.safetensors")
    again = load_conditions(tmp_path / "bank.safetensors")
    assert (again.labels, again.null, again.prompts) == (bank.labels, 2, (0, 1))
    taken = again.take([1, 1, 0])
    assert taken["a"].tolist() == [[2, 3], [2, 3], [0, 1]]
    assert taken["m"].dtype == torch.int64
    with pytest.raises(UsageError, match="entries \\[0, 3\\] are asked for of a bank of 3"):
        again.take([0, 3])


def test_a_file_that_is_no_bank_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(AssetMissing, match="is not there"):
        load_conditions(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(AssetMissing, match="cannot be read as safetensors"):
        load_conditions(tmp_path / "text")
    save_file({"a": torch.zeros(2)}, tmp_path / "bare")
    with pytest.raises(UsageError, match="should hold labels and null under 'conditions', not nothing"):
        load_conditions(tmp_path / "bare")
    save_file({"a": torch.zeros(2)}, tmp_path / "short", metadata={"conditions": '{"labels": ["x"], "null": null}'})
    with pytest.raises(UsageError, match="a row for each of 1 labels"):
        load_conditions(tmp_path / "short")


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
    pytest.importorskip("diffusers")
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


def test_velocity_error_is_the_squared_share_that_is_missed() -> None:
    v = torch.randn(4, 3, 5)
    assert metrics.velocity_error(v, v) == 0
    assert metrics.velocity_error(torch.zeros_like(v), v) == pytest.approx(1)
    assert metrics.velocity_error(1.1 * v, v) == pytest.approx(0.01, rel=1e-4)
    each = metrics.velocity_errors(torch.cat([v[:2], 0.5 * v[2:]]), v)
    torch.testing.assert_close(each, torch.tensor([0, 0, 0.25, 0.25]))
    bands = metrics.by_band(each, torch.tensor([1.0, 0.9, 0.5, 0.2]), [0, 0.25, 0.5, 0.75, 1])
    assert bands == {(0, 0.25): 0.25, (0.25, 0.5): 0.25, (0.5, 0.75): None, (0.75, 1): 0}
    with pytest.raises(UsageError, match="one shape"):
        metrics.velocity_error(v, v[:2])


def test_psnr_of_a_constant_shift_is_known() -> None:
    x = torch.full((2, 1, 16, 16), 0.5)
    torch.testing.assert_close(metrics.psnr(x, x + 0.1), torch.full((2,), 20.0, dtype=torch.float64))
    assert metrics.psnr(x, x).tolist() == [math.inf, math.inf]
    torch.testing.assert_close(metrics.psnr(255 * x, 255 * x + 25.5, span=255), torch.full((2,), 20.0).double())


def test_ssim_is_its_definition() -> None:
    x, y = (v[0, 0].double().sigmoid() for v in pair(1, 1, 13, 15))
    bell = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights = torch.from_numpy(np.outer(bell, bell) / bell.sum() ** 2)
    local = []
    for top in range(3):
        for left in range(5):
            a, b = (v[top : top + 11, left : left + 11] for v in (x, y))
            ma, mb = (weights * a).sum(), (weights * b).sum()
            va, vb, ab = ((weights * p).sum() for p in ((a - ma) ** 2, (b - mb) ** 2, (a - ma) * (b - mb)))
            local.append((2 * ma * mb + 1e-4) * (2 * ab + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    found = metrics.ssim(x[None, None], y[None, None])
    assert float(found) == pytest.approx(float(torch.stack(local).mean()), rel=1e-5)
    assert metrics.ssim(x[None, None], x[None, None]).tolist() == [1.0]
    video = torch.rand(2, 3, 2, 16, 16)
    assert metrics.ssim(video, video).tolist() == [1.0, 1.0]
    flat = torch.full((1, 1, 16, 16), 0.25), torch.full((1, 1, 16, 16), 0.75)  # only the means differ
    assert float(metrics.ssim(*flat)) == pytest.approx((0.375 + 1e-4) / (0.625 + 1e-4), rel=1e-5)
    with pytest.raises(UsageError, match="11 × 11"):
        metrics.ssim(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8))


def test_the_frechet_distance_of_gaussians_is_known() -> None:
    from scipy.linalg import sqrtm

    x, y = pair(60, 4)
    assert metrics.frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet(x, x + torch.tensor([1.0, 2.0, 0.0, 0.0])) == pytest.approx(5, rel=1e-4)
    spread = float(x.double().var(0).sum())
    assert metrics.frechet(x, 3 * x) == pytest.approx(
        4 * spread + 4 * float(x.double().mean(0).square().sum()), rel=1e-5
    )
    y = y @ torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) + 1
    a, b = (np.cov(v.double().numpy().T) for v in (x, y))
    mean = (x.double().mean(0) - y.double().mean(0)).square().sum()
    assert metrics.frechet(x, y) == pytest.approx(float(mean) + np.trace(a + b - 2 * sqrtm(a @ b).real), rel=1e-6)
    assert math.isfinite(metrics.frechet(x[:3], y[:3]))  # covariances without full rank
    with pytest.raises(UsageError, match="at least two samples"):
        metrics.frechet(x[:1], y)


@pytest.fixture(scope="module")
def teacher() -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel.from_pretrained(ASSET, torch_dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def drawn(teacher: Any) -> tuple[Tensor, Tensor]:
    """Samples of the shipped model, with their classes."""
    bank, classes = load_conditions(ASSET / "conditions.safetensors"), torch.arange(20) % 10
    start = noise((1, 32, 32), 0, range(20))

    def denoise(x: Tensor, t: Tensor, indices: Tensor) -> Tensor:
        return predict(teacher, x, t, bank.take(indices))

    sampler = Sampler(steps=5, guidance=2.0, shift=2.0)
    return sample(denoise, Process(), sampler, start, classes, bank.nulls(20)).x, classes


def test_the_shipped_model_draws_the_digits_that_are_asked_for(drawn: tuple[Tensor, Tensor]) -> None:
    judge = metrics.load_classifier(ASSET / "digit_classifier.safetensors")
    found, features = judge.judge(drawn[0])
    assert int((found == drawn[1]).sum()) >= 19
    assert features.shape == (20, 16)
    bank = load_conditions(ASSET / "conditions.safetensors")
    assert (bank.labels, bank.null) == ((*range(10), None), 10)


def test_perceptual_distance_grows_with_the_damage(drawn: tuple[Tensor, Tensor]) -> None:
    judge, x = metrics.load_classifier(ASSET / "digit_classifier.safetensors"), drawn[0]
    noised = [x + strength * pair(*x.shape)[0] for strength in (0.0, 0.05, 0.2, 0.8)]
    distances = [metrics.perceptual(judge, other, x) for other in noised]
    assert distances[0].tolist() == [0.0] * 20
    means = [float(d.mean()) for d in distances]
    assert means == sorted(means)
    assert means[-1] > 2 * means[1] > 0


def test_a_classifier_of_another_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssetMissing, match="holds no classifier"):
        metrics.load_classifier(ASSET / "conditions.safetensors")
    with pytest.raises(AssetMissing, match="is not there"):
        metrics.load_classifier(tmp_path / "none.safetensors")


def test_a_sheet_shows_every_row_and_column(tmp_path: Path, drawn: tuple[Tensor, Tensor]) -> None:
    from PIL import Image

    path, x = tmp_path / "sheet.png", pixels(drawn[0][:4])
    assert 0 <= float(x.min()) < 0.01 < 0.9 < float(x.max()) <= 1
    sheet({"teacher": x, "student": 1 - x}, ["0", "1", "2", "a long prompt that is cut"], path, title="digits")
    image = np.asarray(Image.open(path).convert("L")).astype(int)
    assert image.shape[1] > 4 * 64
    assert int((image < 10).sum()) > 4 * 64 * 64 * 0.8  # black grounds of one row, black figures of the other
    with pytest.raises(UsageError, match="4 columns has 1 labels"):
        sheet({"teacher": x}, ["0"], path)
    with pytest.raises(UsageError, match="one shape"):
        sheet({"teacher": x, "student": x[:2]}, ["0"] * 4, path)
    sheet({"video": torch.rand(1, 3, 4, 70, 80)}, ["a"], path)


def script() -> Any:
    spec = importlib.util.spec_from_file_location("flux_mnist", ROOT / "docs" / "flux_mnist.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["flux_mnist"] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


def printed_digits() -> tuple[np.ndarray, np.ndarray]:
    """(40, 28, 28) bytes and their classes: printed digits, each at four places."""
    from PIL import Image, ImageDraw

    images = []
    for n in range(40):
        image = Image.new("L", (28, 28))
        ImageDraw.Draw(image).text((7 + n // 20, 4 + n // 10 % 2), str(n % 10), fill=255, font_size=18)
        images.append(np.asarray(image))
    return np.stack(images), np.arange(40) % 10


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    images, classes = printed_digits()
    for name, values in (("images-idx3", images), ("labels-idx1", classes.astype(np.uint8))):
        head = b"\x00\x00\x08" + bytes([values.ndim]) + struct.pack(f">{values.ndim}i", *values.shape)
        (tmp_path / f"train-{name}-ubyte").write_bytes(head + values.tobytes())
    return tmp_path


def test_digits_are_read_from_both_kinds_of_files(idx_folder: Path, tmp_path: Path) -> None:
    import io

    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    flux_mnist = script()
    x, classes = flux_mnist.digits(idx_folder)
    assert (x.shape, float(x.min()), float(x.max())) == ((40, 1, 32, 32), -1.0, 1.0)
    assert classes.tolist() == [n % 10 for n in range(40)]
    rows = []
    for image, label in zip(*printed_digits(), strict=True):
        Image.fromarray(image).save(stream := io.BytesIO(), format="png")
        rows.append({"image": {"bytes": stream.getvalue(), "path": None}, "label": int(label)})
    (tmp_path / "parquet").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "parquet" / "train-00000-of-00001.parquet")
    again, labels = flux_mnist.digits(tmp_path / "parquet")
    assert torch.equal(again, x)
    assert torch.equal(labels, classes)
    with pytest.raises(AssetMissing, match="holds neither"):
        flux_mnist.digits(tmp_path / "parquet" / "nothing")


def test_training_continues_where_it_was_killed_and_writes_a_folder_that_loads(
    idx_folder: Path, tmp_path: Path
) -> None:
    from diffusers import FluxTransformer2DModel

    flux_mnist = script()
    data = flux_mnist.digits(idx_folder)
    settings = flux_mnist.Settings(steps=4, batch=2, judge_steps=150, keep=2)

    def killed(iterable: Any, description: str, total: int | None = None) -> Any:
        for n, item in enumerate(iterable):
            if description == "flux" and n == 3:
                raise KeyboardInterrupt
            yield item

    flux_mnist.train(data, tmp_path / "whole", settings, silent)
    with pytest.raises(KeyboardInterrupt):
        flux_mnist.train(data, tmp_path / "parts", settings, killed)
    assert not (tmp_path / "parts" / "conditions.safetensors").exists()
    flux_mnist.train(data, tmp_path / "parts", settings, silent)

    for name in ("conditions", "digit_classifier", "diffusion_pytorch_model"):
        whole, parts = ((tmp_path / x / f"{name}.safetensors").read_bytes() for x in ("whole", "parts"))
        assert whole == parts, name
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert steps == [2, 4]
    model = FluxTransformer2DModel.from_pretrained(tmp_path / "whole")
    shipped = json.loads((ASSET / "config.json").read_text())
    mine = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert {k: v for k, v in mine.items() if k[0] != "_"} == {k: v for k, v in shipped.items() if k[0] != "_"}
    assert sum(p.numel() for p in model.parameters()) > 2e6
    found, _ = metrics.load_classifier(tmp_path / "whole" / "digit_classifier.safetensors").judge(data[0])
    assert float((found == data[1]).float().mean()) > 0.9
    with pytest.raises(UsageError, match="begun with other settings"):
        flux_mnist.train(data, tmp_path / "whole", flux_mnist.Settings(steps=5), silent)
