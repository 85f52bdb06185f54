"""Diffusion processes, banks of conditions, and sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attnconvert.convert.conditioning import Conditions, load_conditions
from attnconvert.convert.errors import AssetMissing, UsageError
from attnconvert.convert.hosts import denoising
from attnconvert.convert.processes import Process, of_scheduler
from attnconvert.convert.sampling import Drawn, Sampler, noise, sample

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
