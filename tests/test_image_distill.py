"""Samples of a denoiser's teacher, training on them, and what is measured of the result."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from prompted_denoisers import DENOISERS, tiny
from safetensors.torch import load_file

from attnconvert.convert.conditioning import Conditions
from attnconvert.convert.errors import AssetMissing, UsageError
from attnconvert.convert.evaluation_images import (
    attention_flops,
    break_even,
    check_image_gates,
    likeness,
    peak_bytes,
    velocity,
)
from attnconvert.convert.hosts.denoisers import find_sites
from attnconvert.convert.hosts.sites import all_full
from attnconvert.convert.hosts.surgery import converted
from attnconvert.convert.progress import silent
from attnconvert.convert.recipe_images import ImageDistillation, ImageGates, ImageSamples, ImageSettings
from attnconvert.convert.sources import ModelFiles
from attnconvert.convert.states import band_name
from attnconvert.distill.image_samples import Kept, KeptStates, read_images, sample_images
from attnconvert.distill.image_training import distill_images
from attnconvert.distill.images import Images
from attnconvert.distill.loop import load_student
from attnconvert.distill.objectives import matching
from attnconvert.kernels.spec import Disc, Full, Linear

SIZE = (8, 12)


@pytest.fixture
def images(tmp_path: Path) -> Images:
    name, _, rows, _ = DENOISERS["flux"]
    bank = {key: torch.cat([value, torch.zeros_like(value[:1])]) for key, value in rows.items()}
    Conditions(bank, ("one", "two", None), 2).save(tmp_path / "conditions.safetensors")
    settings = ImageSettings(size=SIZE, steps=3, guidance=2.0, conditions=tmp_path / "conditions.safetensors")
    files = ModelFiles(folder=tmp_path, gguf=None, revision=None, sha256={}, name=name)
    return Images(settings, files, tiny("flux").eval(), silent, tmp_path)


def plan_of(images: Images, spec: object) -> dict:
    return {site: [spec] * site.kv_heads for site in find_sites(images.model)}


def kept_in(images: Images, folder: Path, **changes: object) -> Kept:
    settings = ImageSamples(count=4, batch=2, shard=2, precision="float32", **changes)
    sample_images(images, find_sites(images.model), settings, folder)
    return read_images(folder, settings)


def test_kept_trajectories_hold_what_the_teacher_predicts_there(images: Images, tmp_path: Path) -> None:
    kept = kept_in(images, tmp_path)
    assert (len(kept), kept.branches) == (4 * 3 * 2, 2)
    states = KeptStates(kept, images.caller)
    rows = torch.arange(len(kept))
    _, t, entries, want = kept.state(rows, images.conditions.null)
    assert set(entries.tolist()) == {0, 1, 2}
    assert set(t.tolist()) == set(images.process.times(3)[:-1].tolist())
    torch.testing.assert_close(states.run(images.model, rows).detach(), want, atol=1e-4, rtol=1e-3)
    walked = images.process.times(3)
    x = kept.states[:, 0]
    for step in range(3):
        torch.testing.assert_close(x, kept.states[:, step], atol=1e-4, rtol=1e-3)
        guided = kept.unprompted[:, step] + 2.0 * (kept.prompted[:, step] - kept.unprompted[:, step])
        x = images.process.step(x, guided, walked[step].expand(4), walked[step + 1].expand(4))
    torch.testing.assert_close(x, kept.x, atol=1e-4, rtol=1e-3)


def test_a_finished_shard_is_not_made_again_and_one_that_is_missing_is_told(images: Images, tmp_path: Path) -> None:
    first = kept_in(images, tmp_path)
    shards = sorted(tmp_path.glob("shard-*.safetensors"))
    assert len(shards) == 2
    times = [path.stat().st_mtime_ns for path in shards]
    shards[1].unlink()
    with pytest.raises(AssetMissing, match="is missing: run `attnconvert sample` again"):
        read_images(tmp_path, ImageSamples(count=4, batch=2, shard=2))
    again = kept_in(images, tmp_path)
    assert shards[0].stat().st_mtime_ns == times[0]
    torch.testing.assert_close(again.x, first.x)
    shards[1].write_bytes(b"torn")
    with pytest.raises(AssetMissing, match="cannot be read"):
        read_images(tmp_path, ImageSamples(count=4, batch=2, shard=2))


def test_latents_alone_take_less_and_serve_noised_states_only(images: Images, tmp_path: Path) -> None:
    kept = kept_in(images, tmp_path, keep="latents")
    assert kept.states is None
    assert len(kept) == 4
    transfer = ImageDistillation(transfer={"steps": 1}, training=None)
    with pytest.raises(UsageError, match="runs on trajectories"):
        distill_images(images, plan_of(images, Linear()), kept, transfer, tmp_path)


@pytest.mark.parametrize(
    ("spec", "settings"),
    [
        (Disc(radius=1.5), {"weights": "lora", "rank": 4}),
        (Disc(radius=1.5), {"weights": "projections"}),
        (Linear(conv=3), {"weights": "operators"}),
        (Linear(), {"weights": "lora", "rank": 2, "states": "noised", "diffusion": 0.01, "feature": 0.5}),
        (Disc(radius=1.5), {"weights": "projections", "distribution": 0.1}),
    ],
)
def test_training_lowers_the_error_and_leaves_the_teacher_alone(spec, settings, images: Images, tmp_path: Path) -> None:
    before = {name: p.clone() for name, p in images.model.state_dict().items()}
    kept, plan = kept_in(images, tmp_path / "samples"), plan_of(images, spec)
    training = {"steps": 12, "batch": 6, "lr": 1e-2, "precision": "float32", **settings}
    folder = tmp_path / "arm"
    folder.mkdir()
    found = ImageDistillation(training=training)
    distill_images(images, plan, kept, found, folder)
    after = images.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], p) for name, p in before.items())
    assert not hasattr(images.model, "peft_config")
    student, plain = copy.deepcopy(images.model), copy.deepcopy(images.model)
    load_student(student, plan, folder)
    states = images.states(8, 5, 3, "states")
    with converted(plain, plan):
        untrained = velocity(images.model, plain, states, silent, "")["velocity_error"]
    trained = velocity(images.model, student, states, silent, "")["velocity_error"]
    assert trained < untrained
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    parts = {"velocity"} | ({*settings} & {"diffusion", "feature", "distribution"})
    assert parts <= set(lines[0])
    assert len(lines) == 12


def test_an_interrupted_training_goes_on_with_the_same_numbers(images: Images, tmp_path: Path, monkeypatch) -> None:
    kept, plan = kept_in(images, tmp_path / "samples"), plan_of(images, Disc(radius=1.5))
    training = {"steps": 6, "batch": 4, "weights": "projections", "checkpoint_every": 2, "precision": "float32"}
    settings = ImageDistillation(training=training)
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    whole.mkdir()
    torn.mkdir()
    distill_images(images, plan, kept, settings, whole)
    calls = []

    def stop(self, *given):
        calls.append(given)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return kept_state(self, *given)

    kept_state = Kept.state
    monkeypatch.setattr(Kept, "state", stop)
    before = {name: p.clone() for name, p in images.model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        distill_images(images, plan, kept, settings, torn)
    assert all(torch.equal(images.model.state_dict()[name], p) for name, p in before.items())
    distill_images(images, plan, kept, settings, torn)
    one, other = (load_file(folder / "projections.safetensors") for folder in (whole, torn))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_cannot_be_trained_is_refused(images: Images, tmp_path: Path) -> None:
    kept = kept_in(images, tmp_path)
    nothing = ImageDistillation(training={"steps": 1, "weights": "operators"})
    with pytest.raises(UsageError, match="none of the plan's operators learns anything"):
        distill_images(images, plan_of(images, Disc(radius=1.5)), kept, nothing, tmp_path)


def test_distribution_matching_pushes_towards_the_teacher() -> None:
    x, t = torch.zeros(2, 3, requires_grad=True), torch.tensor([0.5, 0.25])
    teacher, student = torch.ones(2, 3), torch.zeros(2, 3)
    matching(x, t, teacher, student).backward()
    expected = torch.stack([torch.full((3,), 1.0), torch.full((3,), 3.0)]) / (2 * 3)  # (1 − t) / t, the mean
    torch.testing.assert_close(x.grad, expected)


def test_states_are_of_every_step_and_know_their_part_of_them(images: Images) -> None:
    states = images.states(6, 0, 3, "states")
    assert len(states) == 6
    assert {states.band(n) for n in range(6)} == {"1 of 3", "2 of 3", "3 of 3"}
    assert [band_name(step, 14, 3) for step in (0, 4, 5, 13)] == ["1 of 3", "1 of 3", "2 of 3", "3 of 3"]
    assert images.conditions.null in states.entries.tolist()
    want = states.answers(images.model, 0)
    assert states.compared(0, want, want) == {"kl": 0.0, "needle": 0.0}
    assert states.compared(0, want, 1.1 * want)["kl"] == pytest.approx(0.01, rel=1e-3)
    assert states.loss(images.model, 0, "text").requires_grad


def test_a_teacher_is_not_off_and_a_student_is(images: Images) -> None:
    states = images.states(4, 0, 2, "states")
    student = copy.deepcopy(images.model)
    assert velocity(images.model, student, states, silent, "")["velocity_error"] == 0.0
    with converted(student, plan_of(images, Disc(radius=1.5))):
        found = velocity(images.model, student, states, silent, "")
    assert found["velocity_error"] > 0
    assert set(found["bands"]) == {"1 of 2", "2 of 2"}
    samples = images.draw(images.model, range(3), 0, 2, "").x
    same = likeness(samples, samples, ["a"] * 3, samples, None)
    assert (same["psnr"], "ssim" in same) == (100.0, False)


def test_a_step_is_faster_from_where_the_curves_cross() -> None:
    def speed(*points: tuple[int, float]) -> dict:
        return {f"{n}x{n}": {"tokens": n * n, "speedup": ratio} for n, ratio in points}

    assert break_even(speed((16, 0.5), (32, 2.0)))["tokens"] == round(math.sqrt(256 * 1024))
    assert break_even(speed((16, 1.5), (32, 2.0)))["told"] == "faster at every size that was timed, from 16x16 on"
    assert break_even(speed((16, 0.5), (32, 0.9)))["tokens"] is None
    assert "slower up to 32x32" in break_even(speed((16, 0.5), (32, 0.9)))["told"]


def test_the_peak_counts_tensors_that_live_at_once() -> None:
    def two() -> None:
        a = torch.zeros(1000)
        b = a + 1
        del a, b
        c = torch.zeros(500)
        c.view(-1)[0] = 1.0

    assert peak_bytes(two, torch.device("cpu")) == 2 * 1000 * 4


def test_flops_of_a_plan_grow_with_the_image_as_its_operators_do(images: Images) -> None:
    sites = find_sites(images.model)
    grid, text = images.layout(sites)
    assert (grid, text) == ((4, 6), 5)
    small, large = 24, 24 * 16
    plans = all_full(sites), plan_of(images, Disc(radius=1.5))
    full, disc = (attention_flops(plan, grid, text, [small, large]) for plan in plans)
    assert full[large] / full[small] == pytest.approx((large + text) ** 2 / (small + text) ** 2)
    assert disc[large] / disc[small] < 0.2 * full[large] / full[small]
    with pytest.raises(UsageError, match="no image of the proportions 4×6 has 100 tokens"):
        attention_flops(plan_of(images, Disc(radius=1.5)), grid, text, [100])


def test_gates_hold_the_student_to_their_bounds() -> None:
    quality = {"velocity_error": 0.01, "psnr": 30.0, "frechet": 5.0, "right_class": 0.98}
    student = {"quality": quality, "converted": 1.0, "flops_ratio": 0.4}
    document = {
        "arms": {"student": student, "teacher": {"quality": {"frechet": 3.0}}},
        "speed": {"64x64": {"speedup": 1.5}},
    }
    gates = ImageGates(velocity_error=0.02, psnr=40.0, ssim=0.5, frechet_rise=3, step_speedup={"64x64": 2.0})
    found = {gate["name"]: gate for gate in check_image_gates(gates, document)}
    assert found["velocity_error"]["passed"]
    assert not found["psnr"]["passed"]
    assert (found["ssim"]["value"], found["ssim"]["passed"]) == (None, False)
    assert (found["frechet_rise"]["value"], found["frechet_rise"]["passed"]) == (2.0, True)
    assert not found["step_speedup@64x64"]["passed"]


def test_full_plans_lose_nothing(images: Images) -> None:
    states = images.states(4, 1, 2, "states")
    student = copy.deepcopy(images.model)
    with converted(student, plan_of(images, Full())):
        assert velocity(images.model, student, states, silent, "")["velocity_error"] < 1e-9
