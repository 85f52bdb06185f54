"""What the profile says must be what happens: statistics against dense attention, damage against real replacements."""

import pytest
import torch
import torch.nn.functional as F
from models import needle_cases, tiny

from attnconvert.convert import damage as damage_module
from attnconvert.convert.files import read_json
from attnconvert.convert.hosts.models import find_sites
from attnconvert.convert.hosts.surgery import convert
from attnconvert.convert.profiling import Profile, profile
from attnconvert.convert.progress import silent
from attnconvert.kernels.spec import Full, Linear, Window

CANDIDATES = [Window(size=6, sinks=1), Linear()]


def measure(model, folder, damage=True, candidates=CANDIDATES):
    texts = torch.randint(2, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    sites = find_sites(model)
    return profile(model, sites, texts, needle_cases(), candidates, rows=30, damage=damage, folder=folder, track=silent)


def test_statistics_equal_those_of_the_models_own_attention(tmp_path):
    model = tiny("llama")
    found = measure(model, tmp_path, damage=False)
    model.set_attn_implementation("eager")
    texts = torch.randint(2, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    at = torch.linspace(10, 39, 30).long()
    for layer in range(3):
        p = torch.stack([model(t[None], output_attentions=True).attentions[layer][0] for t in texts])[:, :, at]
        entropy = -(p * p.clamp_min(1e-20).log()).sum(-1).mean((0, 2))
        assert found.statistics["entropy"][layer] == pytest.approx(entropy.tolist(), rel=1e-4)
        near = at[:, None] - torch.arange(40) < 6
        assert found.statistics["local_mass"][layer] == pytest.approx(
            (p * near).sum(-1).mean((0, 2)).tolist(), rel=1e-4
        )
        assert found.statistics["sink_mass"][layer] == pytest.approx(p[..., :4].sum(-1).mean((0, 2)).tolist(), rel=1e-4)


def test_retrieval_is_the_attention_from_each_answer_token_to_its_place_in_the_text(tmp_path):
    model, cases = tiny("llama"), needle_cases()
    found = measure(model, tmp_path, damage=False)
    model.set_attn_implementation("eager")
    p = torch.stack([model(ids[None], output_attentions=True).attentions[1][0] for ids in cases.ids])  # (n, H, S, S)
    want = torch.stack([p[:, :, 48 - 3 + a - 1, 10 + a] for a in range(3)]).mean((0, 1))
    assert found.statistics["retrieval"][1] == pytest.approx(want.tolist(), rel=1e-4)


def test_damage_is_that_of_replacing_this_group_alone(tmp_path):
    model, cases = tiny("qwen3"), needle_cases()
    found = measure(model, tmp_path)
    sites = find_sites(model)
    plan = {s: [Full(), CANDIDATES[0]] if s.layer == 1 else [Full()] * 2 for s in sites}
    at = torch.cat([torch.arange(4, 44, 4), torch.arange(44, 47)])
    want, losses = [], []
    for ids in cases.ids:
        teacher = model(ids[None]).logits[0, at].log_softmax(-1)
        conversion = convert(model, plan)
        student = model(ids[None], use_cache=False).logits[0, at].log_softmax(-1)
        conversion.remove()
        want.append((teacher.exp() * (teacher - student)).sum(-1).mean().item())
        target = ids[45:]
        losses.append((F.nll_loss(student[-3:], target) - F.nll_loss(teacher[-3:], target)).item())
    damage = found.damage["window-6-1"]
    assert damage["kl"][1][1] == pytest.approx(sum(want) / 2, rel=1e-3)
    assert damage["needle"][1][1] == pytest.approx(sum(losses) / 2, abs=1e-4)
    assert damage["kl"][1][1] > 0


def test_an_interrupted_profile_goes_on_where_it_stopped(tmp_path, monkeypatch):
    model, done = tiny("llama"), []
    real = damage_module._damage_of_case

    def stop_at_second(*args):
        if done:
            raise KeyboardInterrupt
        done.append(args)
        return real(*args)

    monkeypatch.setattr(damage_module, "_damage_of_case", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        measure(model, tmp_path)
    assert [p.name for p in sorted(tmp_path.glob("damage-*"))] == ["damage-000.json"]
    assert not any("attnconvert" in name for name, _ in model.named_modules()), "the model is left as it was"
    calls = []
    monkeypatch.setattr(damage_module, "_damage_of_case", lambda *args: calls.append(args) or real(*args))
    resumed = measure(model, tmp_path)
    assert len(calls) == 1
    monkeypatch.undo()
    fresh = measure(tiny("llama"), tmp_path / "fresh")
    assert resumed.damage == fresh.damage


def test_a_candidate_that_a_layer_cannot_take_is_null_there(tmp_path):
    found = measure(tiny("gemma3_text"), tmp_path)  # layers 0 and 2 have a window of their own
    kl = found.damage["linear-hedgehog"]["kl"]
    assert kl[0] == kl[2] == [None, None]
    assert None not in kl[1]
    assert found.output_error["linear-hedgehog"][0] == [None] * 4


def test_a_profile_reads_back_as_it_was_written(tmp_path):
    from attnconvert.convert.files import write_json

    found = measure(tiny("llama"), tmp_path)
    write_json(tmp_path / "profile.json", found.to_json())
    assert Profile.from_json(read_json(tmp_path / "profile.json")) == found
