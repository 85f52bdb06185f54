"""First-order effects: what replacing a head would change of the loss, from one backward pass through the teacher.

Of each layer the gradient of its attention output arrives on its own, and candidates are compared with it there and
then. What the pass itself keeps is what training on one sequence keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels import operators
from ..kernels.call import Call
from ..kernels.spec import Full, Spec
from .hosts import surgery
from .hosts.sites import Conversion, Site, SiteOperators, all_full, refusal
from .observation import BLOCK, Learned, Means, Rows
from .text import Cases

if TYPE_CHECKING:
    from .progress import Track


def first_order(
    model: Any,
    sites: Sequence[Site],
    needles: Cases,
    names: Mapping[str, Spec],
    rows: int,
    learned: Learned,
    track: Track,
) -> dict[str, Any]:
    """|⟨ô − o, ∂L/∂o⟩| of every head and candidate, for the loss of the text and of the answer, and MoA's influence.

    Returns:
        {"first_order": {candidate: [site][head]} of the text, "first_order_needle": the same of the answer,
        "influence": {"block": tokens, "table": [site][head][distance in blocks]}}; means over the cases.
        `influence` is Σ|A ⊙ (G − rowsum(G ⊙ A)) / (1 − A)| per row with G = ∂L/∂A, of sampled rows (MoA, Fu et al.
        2024): what masking the entries at a distance would change of the text's loss, to first order.
    """
    effects = _Effects(names, rows, learned)
    with surgery.frozen(model), surgery.converted(model, all_full(sites)) as conversion:
        for case in track(range(len(needles)), "first-order effects"):
            for loss in needles.losses:
                _backward(model, conversion, needles, case, loss, effects)
    means = effects.means
    tables = {loss: {name: means.table(f"{loss} {name}", sites) for name in names} for loss in needles.losses}
    influence = {"block": BLOCK, "table": means.table("influence", sites)} if not sites[0].axes else None
    return {
        "first_order": tables["text"],
        "first_order_needle": tables.get("needle", {}),
        "influence": influence,
    }


@dataclass
class _Effects:
    """Gathers what every candidate would change, site by site, as gradients arrive."""

    names: Mapping[str, Spec]
    rows: int
    learned: Learned
    means: Means = field(default_factory=Means)

    @torch.no_grad()
    def add(self, site: Site, held: tuple[Tensor, ...], gradient: Tensor, call: Call, loss: str) -> None:
        """`held` is q, k, v and the attention output o (B, H, S, D) of the site, `gradient` that of the loss by o."""
        q, k, v, o = held
        for name, spec in self.names.items():
            if refusal(site, spec):
                continue
            got, _ = operators.attend(spec, q, k, v, call, None, self.learned.get((site.name, name)))
            effect = ((got - o).float() * gradient.float()).sum((0, 2, 3))  # (H,)
            self.means.add(f"{loss} {name}", site.name, effect.abs())
        if loss == "text" and not site.axes:
            self.means.add("influence", site.name, _influence(q, k, v, gradient, call, self.rows))


def _backward(model: Any, conversion: Conversion, needles: Cases, case: int, loss: str, effects: _Effects) -> None:
    def observe(site: SiteOperators, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        o, _ = operators.attend(Full(), q, k, v, call)
        if not o.requires_grad:  # the first site: nothing before it asks for gradients
            o = o.detach().requires_grad_(True)
        held = (q.detach(), k.detach(), v.detach(), o.detach())
        o.register_hook(lambda gradient: effects.add(site.site, held, gradient, call, loss))
        return o

    with torch.enable_grad(), conversion.observe(observe):
        needles.loss(model, case, loss).backward()


def _influence(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, call: Call, rows: int) -> Tensor:
    """(H, blocks): effect of masking the entries of each distance, of all rows, from the sampled ones."""
    sampled = Rows.sampled(q, k, call, rows)
    p, at = sampled.p, sampled.at
    per = q.shape[1] // k.shape[1]
    g = gradient[:, :, at].float() @ v.float().repeat_interleave(per, 1).transpose(-1, -2)  # (B, H, R, S)
    inner = (g * p).sum(-1, keepdim=True)
    effect = (p * (g - inner) / (1 - p).clamp_min(1e-3)).abs()
    blocks = -(-p.shape[-1] // BLOCK)
    distance = ((at[:, None] - torch.arange(p.shape[-1], device=p.device)).abs() // BLOCK).clamp_max(blocks - 1)
    index = distance.expand_as(effect[0, 0]).reshape(1, -1).expand(p.shape[1], -1)
    table = torch.zeros(p.shape[1], blocks, device=p.device)
    table.scatter_add_(1, index, effect.sum(0).flatten(1))
    return table * (q.shape[2] / len(at))
