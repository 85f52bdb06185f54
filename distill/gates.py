"""Learned selection: gates between full attention and a candidate, trained for a few steps with the model frozen."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..convert.hosts import surgery
from ..convert.hosts.sites import Conversion, Site, SiteOperators, all_full, refusal
from ..convert.observation import Learned, Table
from ..convert.passages import Passages
from ..convert.states import States
from ..convert.text import Cases, Needles, Samples, Texts
from ..kernels import operators
from ..kernels.call import Call
from ..kernels.spec import Full, Spec, label
from .loop import Trainer
from .objectives import difference, hidden_error

if TYPE_CHECKING:
    from ..convert.progress import Track

Method = Literal["duo", "linvideo"]
RATE = 0.02  # DuoAttention's
SPARSITY = 0.05  # weight of its mean gate
CONSTRAINT = 0.01  # weight of LinVideo's two terms
SHARPNESS = (20.0, 2.0)  # LinVideo's α, from the first step to the last
CHUNK = 256


def learn_gates(
    method: Method,
    model: Any,
    sites: Sequence[Site],
    needles: Cases,
    spec: Spec,
    *,
    steps: int,
    full: float,
    seed: int,
    learned: Learned,
    folder: Path,
    track: Track,
) -> Table:
    """A gate per KV group, [site][KV group] in 0 … 1: o = g · full + (1 − g) · candidate, the model itself frozen.

    `duo`: the error of the last hidden states where the answer is predicted, plus 0.05 mean |g|, from g = 1
    (DuoAttention, Xiao et al. 2024). `linvideo`: KL to the teacher on the text, plus 0.01 times the constraint
    (Σ⌈r⌋ − target)² / groups, where the share `full` of the groups stays full, and the rounding term
    Σ(1 − |2r − 1|^α) / groups with α from 20 to 2, from r = 1/2 (LinVideo, 2025). There r is per layer and the terms
    are sums; over the many KV groups here sums drown the KL, and all gates would move as one. An encoder without a head
    has no KL: the relative error of its last hidden states takes its place, and `duo` looks at all positions. Of a
    denoiser it is that of its prediction, and LinVideo has a gate per layer, as published.
    """
    start = 1.0 if method == "duo" else 0.5
    able = [s for s in sites if refusal(s, spec) is None]
    if not able:
        return {method: [[None] * s.kv_heads for s in sites]}
    # LinVideo chooses layers, and so it does where it comes from: in a denoiser
    counts = {s.name: 1 if s.axes and method == "linvideo" else s.kv_heads for s in able}
    gates = {name: nn.Parameter(torch.full((count,), start, device=model.device)) for name, count in counts.items()}
    trainer = Trainer(
        f"gates-{method}", gates, torch.optim.AdamW(list(gates.values()), lr=RATE, weight_decay=0.0),
        RATE, steps, 0.05, 1e9, 20, folder,
    )  # fmt: skip
    assert isinstance(needles, States | Needles | Passages)
    samples: Samples = needles if isinstance(needles, States) else Texts(needles.ids)
    target = full * sum(counts.values())

    def observe(site: SiteOperators, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        name = site.site.name
        o, _ = operators.attend(Full(), q, k, v, call)
        if name not in gates:
            return o
        other, _ = operators.attend(spec, q, k, v, call, None, learned.get((name, label(spec))))
        g = bounded(gates[name]).to(o.dtype).repeat_interleave(q.shape[1] // counts[name])[:, None, None]
        return g * o + (1 - g) * other

    def step(conversion: Conversion, rows: Tensor) -> dict[str, float]:
        with torch.no_grad():
            want = samples.run(model, rows)
        with torch.enable_grad(), conversion.observe(observe):
            got = samples.run(model, rows)
            flat = torch.cat(list(gates.values()))
            error = _error(method, model, needles, want, got)
            if method == "duo":
                loss = error + SPARSITY * flat.abs().mean()
            else:
                done = trainer.at / max(1, steps - 1)
                loss = error + CONSTRAINT * (constraint(flat, target) + rounding(flat, done)) / len(flat)
            loss.backward()
        return {"loss": loss.item(), "error": error.item(), "mean_gate": bounded(flat).mean().item()}

    with surgery.frozen(model), surgery.converted(model, all_full(sites)) as conversion:
        trainer.run(partial(step, conversion), torch.arange(len(samples)), 1, seed, track)
    found = {name: bounded(gate) for name, gate in gates.items()}
    none: list[Any] = [None]
    return {method: [_per_group(found[s.name], s) if s.name in found else none * s.kv_heads for s in sites]}


def _per_group(gate: Tensor, site: Site) -> list[float]:
    return list(gate.expand(site.kv_heads).tolist())


def _error(method: Method, model: Any, cases: Cases, want: Tensor, got: Tensor) -> Tensor:
    """What a method's gates weigh their number against."""
    if isinstance(cases, States):
        return hidden_error(want, got)
    if method == "linvideo":
        return difference(model, want, got, CHUNK)
    if isinstance(cases, Needles):
        at = cases.answer[0].to(want.device) - 1
        want, got = want[:, at], got[:, at]
    return (got - want).float().square().mean()


def bounded(gates: Tensor) -> Tensor:
    """Clipped to 0 … 1; the gradient passes, so that a gate may come back."""
    return gates + (gates.clamp(0, 1) - gates).detach()


def constraint(gates: Tensor, target: float) -> Tensor:
    """(Σ⌈r⌋ − target)², the rounding passed straight through."""
    inside = bounded(gates)
    rounded = inside + (inside.round() - inside).detach()
    return (rounded.sum() - target).square()


def rounding(gates: Tensor, done: float) -> Tensor:
    """Σ(1 − |2r − 1|^α), α falling from 20 to 2 while `done` goes from 0 to 1: pushes r to 0 or 1."""
    sharpness = SHARPNESS[0] + (SHARPNESS[1] - SHARPNESS[0]) * done
    return (1 - (2 * bounded(gates) - 1).abs().clamp_min(1e-6).pow(sharpness)).sum()
