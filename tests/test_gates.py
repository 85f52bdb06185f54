"""Learned gates: what they learn, that they go on after an interruption, and that the model is left as it was."""

import pytest
import torch
from models import needle_cases, tiny

from attnconvert.convert.hosts.models import find_sites
from attnconvert.convert.profiling import untrained
from attnconvert.convert.progress import silent
from attnconvert.distill import gates
from attnconvert.distill.gates import constraint, learn_gates, rounding
from attnconvert.kernels.spec import Linear, Window, label


def learn(model, folder, method, spec, steps=6, full=0.5):
    sites = find_sites(model)
    learned = untrained(sites, {label(spec): spec}, "cpu")
    settings = {"steps": steps, "full": full, "seed": 0, "learned": learned, "folder": folder, "track": silent}
    return learn_gates(method, model, sites, needle_cases(length=96), spec, **settings)[method]


def test_duo_closes_gates_that_nothing_is_lost_by(tmp_path, monkeypatch):
    monkeypatch.setattr(gates, "SPARSITY", 1.0)
    monkeypatch.setattr(gates, "RATE", 0.2)
    found = torch.tensor(learn(tiny("llama"), tmp_path, "duo", Window(size=96, sinks=0), steps=12))
    assert found.max() < 0.2, "a window over everything loses nothing, so only the sparsity term is left"


def test_duo_keeps_gates_open_where_the_answer_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(gates, "SPARSITY", 1e-6)
    found = torch.tensor(learn(tiny("llama"), tmp_path, "duo", Window(size=1, sinks=0), steps=6))
    assert found.min() > 0.5


def test_linvideo_gives_way_first_where_nothing_is_lost(tmp_path):
    model = tiny("llama")
    model.model.layers[1].self_attn.o_proj.weight.data[:, :32] = 0  # nobody reads the first KV group of layer 1
    found = torch.tensor(learn(model, tmp_path, "linvideo", Window(size=2, sinks=0), steps=30, full=1 / 3))
    assert found.argmin() == 2
    assert found[1, 1] > found[1, 0] + 0.05


def test_the_two_terms_of_linvideo_are_those_of_its_formulas():
    r = torch.tensor([0.0, 0.25, 0.5, 1.0])
    assert rounding(r, 1.0).item() == pytest.approx(0.75 + 1.0, abs=1e-4)  # α = 2
    assert rounding(r, 0.0).item() == pytest.approx(1 - 0.5**20 + 1.0, abs=1e-4)  # α = 20
    r = torch.tensor([0.2, 0.7, 0.9], requires_grad=True)
    loss = constraint(r, 1.0)
    assert loss.item() == 1.0
    loss.backward()
    assert torch.equal(r.grad, torch.full((3,), 2.0)), "the rounding is passed straight through"


def test_a_learned_gate_goes_on_where_it_stopped(tmp_path, monkeypatch):
    model, spec = tiny("llama"), Window(size=4, sinks=1)
    whole = learn(model, tmp_path / "whole", "duo", spec, steps=4)
    before = {name: p.clone() for name, p in model.named_parameters()}
    real = gates.Trainer.run

    def stop(self, step, *args):
        def stopping(ids):
            if self.at == 2:
                self._save(2)
                raise KeyboardInterrupt
            return step(ids)

        return real(self, stopping, *args)

    monkeypatch.setattr(gates.Trainer, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        learn(model, tmp_path / "cut", "duo", spec, steps=4)
    monkeypatch.undo()
    assert learn(model, tmp_path / "cut", "duo", spec, steps=4) == whole
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())
    assert not any("attnconvert" in name for name, _ in model.named_modules())


def test_layers_that_cannot_take_the_candidate_have_no_gate(tmp_path):
    found = learn(tiny("gemma3_text"), tmp_path, "duo", Linear(), steps=2)
    assert found[0] == found[2] == [None, None]
    assert None not in found[1]
