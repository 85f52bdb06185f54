"""Training lowers what it is to lower, continues where it stopped, and says when it fails."""

import json

import pytest
import torch
from models import tiny

from attnconvert.convert.errors import UsageError
from attnconvert.convert.hosts.models import find_sites
from attnconvert.convert.hosts.sites import Conversion
from attnconvert.convert.progress import silent
from attnconvert.convert.recipe import DistillSettings, SampleSettings
from attnconvert.distill import loop
from attnconvert.distill.loop import Diverged, distill, load_student
from attnconvert.distill.objectives import distillation
from attnconvert.distill.samples import read_samples, sample, shard_path
from attnconvert.kernels.spec import Full, Hybrid, Linear, Window


def plan_of(model):
    kinds = [[Full(), Window(size=4, sinks=1)], [Linear(), Linear()], [Hybrid(window=4, sinks=1), Full()]]
    return {s: kinds[s.layer] * (s.kv_heads // 2) for s in find_sites(model)}


def settings_of(steps=4, epochs=2, **lora):
    given = {"rank": 4, "lr": 5e-3, "epochs": epochs, "batch": 2, "checkpoint_every": 2, "logit_chunk": 7, **lora}
    return DistillSettings.model_validate({"transfer": {"steps": steps, "lr": 1e-2}, "lora": given})


def samples_of(count=8):
    return torch.randint(2, 97, (count, 33), generator=torch.Generator().manual_seed(4))


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@torch.no_grad()
def divergence(teacher, student, ids):
    p, q = (m(ids, use_cache=False).logits.log_softmax(-1) for m in (teacher, student))
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_distillation_brings_the_student_closer_and_leaves_the_teacher_alone(tmp_path, name):
    model, teacher, ids = tiny(name), tiny(name), samples_of()
    untrained = tiny(name)
    load_student(untrained, plan_of(untrained), None)
    distill(model, plan_of(teacher), ids, settings_of(steps=24, epochs=8), tmp_path, silent)
    for (key, a), b in zip(teacher.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert torch.equal(model(ids).logits, teacher(ids).logits)
    student = tiny(name)
    load_student(student, plan_of(teacher), tmp_path)
    assert divergence(teacher, student, ids) < 0.8 * divergence(teacher, untrained, ids)
    losses = [line["loss"] for line in log_of(tmp_path) if line["phase"] == "transfer"]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])  # every epoch has four steps


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_an_interrupted_training_ends_with_the_same_weights(tmp_path, stop, monkeypatch):
    def train(folder, interrupt_at=None):
        model = tiny("llama")
        seen = []
        real = loop.Trainer._log

        def log(self, line):
            seen.append(line)
            if interrupt_at is not None and len(seen) == interrupt_at:
                raise KeyboardInterrupt
            real(self, line)

        monkeypatch.setattr(loop.Trainer, "_log", log)
        distill(model, plan_of(model), samples_of(), settings_of(steps=2, epochs=1), folder, silent)
        return model

    train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", stop)
    train(tmp_path / "cut")
    students = []
    for folder in ("whole", "cut"):
        student = tiny("llama")
        load_student(student, plan_of(student), tmp_path / folder)
        students.append(student.state_dict())
        steps = [(line["phase"], line["step"]) for line in log_of(tmp_path / folder)]
        assert steps == [("transfer", 0), ("transfer", 1), *(("lora", n) for n in range(4))]
    for key, value in students[0].items():
        torch.testing.assert_close(students[1][key], value, msg=key)


def test_gradient_checkpointing_and_logit_chunks_change_nothing(tmp_path):
    logs = []
    for n, changes in enumerate(
        ({"gradient_checkpointing": True}, {"gradient_checkpointing": False, "logit_chunk": 100})
    ):
        model = tiny("qwen3")
        distill(
            model, plan_of(model), samples_of(), settings_of(steps=1, epochs=1, **changes), tmp_path / str(n), silent
        )
        logs.append([line["loss"] for line in log_of(tmp_path / str(n))])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


def test_the_chunked_loss_is_the_kl_and_has_its_gradient():
    model = tiny("llama")
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(2, 11, 64, generator=generator) for _ in range(2))
    student.requires_grad_()
    p, q = (model.lm_head(h).log_softmax(-1) for h in (teacher, student))
    want = (p.exp() * (p - q)).sum(-1).mean()
    got = distillation(model, teacher, student, 4)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (got, want)), atol=1e-7, rtol=1e-4)


def test_a_loss_that_is_no_number_stops_with_the_last_good_checkpoint(tmp_path, monkeypatch):
    model, count = tiny("llama"), []
    real = loop.difference

    def broken(*args):
        count.append(0)
        return real(*args) * (float("nan") if len(count) == 4 else 1.0)

    monkeypatch.setattr(loop, "difference", broken)
    with pytest.raises(Diverged, match=r"diverged at step 3: loss nan.*last good checkpoint is .*lora\.safetensors"):
        distill(model, plan_of(model), samples_of(), settings_of(epochs=2), tmp_path, silent)
    assert (tmp_path / "lora.safetensors").exists()
    assert torch.equal(model(samples_of()).logits, tiny("llama")(samples_of()).logits)


def sampled(folder, **changes):
    model = tiny("llama")
    settings = SampleSettings.model_validate(
        {"sequences": 5, "length": 20, "batch": 2, "shard": 3, "prompt_tokens": 4, **changes}
    )
    starts = torch.arange(2, 22).view(5, 4)
    sample(model, find_sites(model), starts, settings, folder, silent)
    return read_samples(folder, settings), settings


def test_samples_do_not_depend_on_batches_shards_or_interruptions(tmp_path):
    one, _ = sampled(tmp_path / "a")
    other, _ = sampled(tmp_path / "b", batch=4, shard=5)
    assert torch.equal(one, other)
    shard_path(tmp_path / "a", 0, 2).unlink()
    again, _ = sampled(tmp_path / "a")
    assert torch.equal(one, again)
    assert one.shape == (5, 20)
    assert torch.equal(one[:, :4], torch.arange(2, 22).view(5, 4))
    assert not torch.equal(one, sampled(tmp_path / "c", seed=1)[0])
    assert len({tuple(row[4:].tolist()) for row in one}) == 5


def test_the_models_own_generation_settings_do_not_change_the_samples(tmp_path):
    want, settings = sampled(tmp_path / "a")
    model = tiny("llama")
    model.generation_config.repetition_penalty = 3.0
    model.generation_config.num_beams = 3
    sample(model, find_sites(model), torch.arange(2, 22).view(5, 4), settings, tmp_path / "b", silent)
    assert torch.equal(read_samples(tmp_path / "b", settings), want)
    assert model.generation_config.num_beams == 3


def test_a_plan_that_converts_nothing_trains_nothing(tmp_path):
    model = tiny("llama")
    distill(model, {s: [Full()] * 2 for s in find_sites(model)}, samples_of(), settings_of(), tmp_path, silent)
    load_student(model, {s: [Full()] * 2 for s in find_sites(model)}, tmp_path)
    with pytest.raises(UsageError, match=r"\['qq'\] matches nothing; there are .*'q_proj'"):
        distill(tiny("llama"), plan_of(tiny("llama")), samples_of(), settings_of(targets=["qq"]), tmp_path, silent)


def test_samples_follow_the_teachers_distribution(tmp_path):
    model = tiny("llama")
    count = 3000
    settings = SampleSettings.model_validate(
        {"sequences": count, "length": 8, "batch": count, "shard": count, "prompt_tokens": 2}
    )
    starts = torch.tensor([[5, 6]]).expand(count, -1)
    sample(model, find_sites(model), starts, settings, tmp_path, silent)
    drawn = read_samples(tmp_path, settings)[:, 2].bincount(minlength=99) / count
    want = model(torch.tensor([[5, 6]])).logits[0, -1].softmax(-1)
    assert (drawn - want).abs().sum() / 2 < 0.12, "total variation of 3000 draws over 99 tokens"


def test_the_plan_leaves_untrained_arms_untouched(tmp_path):
    model = tiny("llama")
    conversion = load_student(model, plan_of(model), None)
    assert isinstance(conversion, Conversion)
    assert not any(p.requires_grad for p in model.parameters())
