"""What the student is trained on: the teacher's attention outputs, and the teacher's distribution."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..convert.hosts import models
from ..convert.hosts.sites import Conversion, SiteOperators
from ..convert.text import Samples
from ..kernels.call import Call


def attention_transfer(model: Any, conversion: Conversion, samples: Samples, rows: Tensor) -> float:
    """One pass in which every site with something to learn fits the teacher's output; gradients are left in place.

    The teacher's hidden states flow through the model, so each site sees what it will see when the others are right,
    and no graph crosses a layer. The loss of a site is ‖ô − o‖² / ‖o‖². Returns its mean over the sites.

    Source: LoLCATs (Zhang et al., 2024), stage 1.
    """
    losses: list[float] = []

    def observe(site: SiteOperators, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        want = site.operate(q, k, v, call, student=False)
        if any(p.requires_grad for p in site.parameters()):
            with torch.enable_grad():
                got = site.operate(q.detach(), k.detach(), v.detach(), call, student=True)
                if not got.requires_grad:  # it learned what stands before its projections, which is not seen here
                    return want
                loss = (got - want).float().square().sum() / want.float().square().sum().clamp_min(1e-12)
                loss.backward()
            losses.append(loss.item())
        return want

    with torch.no_grad(), conversion.teacher(), conversion.observe(observe):
        samples.run(model, rows)
    return sum(losses) / max(1, len(losses))


def distillation(model: Any, teacher: Tensor, student: Tensor, chunk: int) -> Tensor:
    """KL(teacher ‖ student) per token from hidden states (B, S, C), `chunk` positions at a time.

    Logits of a chunk are made, compared and dropped, and made again for the gradient: all of them at 8k tokens would
    be gigabytes.
    """
    total = student.new_zeros((), dtype=torch.float32)
    for start in range(0, student.shape[1], chunk):
        part = slice(start, start + chunk)
        total = total + checkpoint(_kl_of, model, teacher[:, part], student[:, part], use_reentrant=False)
    return total / student.shape[:2].numel()


def hidden_error(teacher: Tensor, student: Tensor) -> Tensor:
    """Squared error of hidden states (B, S, C) over the square of the teacher's: for models without a head."""
    return (student - teacher).float().square().sum() / teacher.float().square().sum().clamp_min(1e-12)


def difference(model: Any, teacher: Tensor, student: Tensor, chunk: int) -> Tensor:
    """What a student is trained to lower: the KL of what the head puts out, or the error of the hidden states."""
    return distillation(model, teacher, student, chunk) if models.has_head(model) else hidden_error(teacher, student)


def matching(x: Tensor, t: Tensor, teacher: Tensor, student: Tensor) -> Tensor:
    """A loss whose gradient by x_t (B, …) is that of the KL from the student's distribution of x_t to the teacher's.

    Of a flow the score difference is ŝ − s = (1 − t) / t · (u − û), with the predictions u of the teacher and û of the
    student at x_t, (B, …), through which no gradient goes; t (B,) above 0. Source: LinVideo (2025).
    """
    t = t.view(-1, *[1] * (x.ndim - 1))
    push = (1 - t) / t * (teacher - student).detach().float()
    return (push * x.float()).flatten(1).sum(1).mean() / teacher[0].numel()


def _kl_of(model: Any, teacher: Tensor, student: Tensor) -> Tensor:
    with torch.no_grad():
        want = models.head(model, teacher).float().log_softmax(-1)
    got = models.head(model, student).float().log_softmax(-1)
    return F.kl_div(got, want, log_target=True, reduction="sum")
