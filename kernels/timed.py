"""One operator while a sample is mostly noise, another afterwards; the samples of a batch may differ in that."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from . import operators
from .call import Call, Cost, Shape
from .spec import Spec, Timed, label


class Both(nn.Module):
    """What the two operators learned; one that learns nothing has None."""

    def __init__(self, early: nn.Module | None, late: nn.Module | None) -> None:
        super().__init__()
        self.early, self.late = early, late


def parameters(spec: Timed, heads: int, kv_heads: int, dim: int) -> nn.Module | None:
    """Those of both operators, `early` and `late`; None where neither has any."""
    early, late = (operators.of(own).parameters(own, heads, kv_heads, dim) for own in (spec.early, spec.late))
    return None if early is None and late is None else Both(early, late)


def reference(spec: Timed, q: Tensor, k: Tensor, v: Tensor, call: Call, learned: nn.Module | None = None) -> Tensor:
    """The definition, sample by sample: q (B, H, S, D), k, v (B, Hk, S, D). → (B, H, S, D)"""
    early = _early(spec, q, call)
    found = []
    for b in range(q.shape[0]):
        own, mine = _of(spec, learned, bool(early[b]))
        part = _samples(call, slice(b, b + 1))
        found.append(operators.of(own).reference(own, q[b : b + 1], k[b : b + 1], v[b : b + 1], part, mine))
    return torch.cat(found)


def attend(
    spec: Timed, q: Tensor, k: Tensor, v: Tensor, call: Call, state: object = None, learned: nn.Module | None = None
) -> tuple[Tensor, None]:
    """Each operator for the samples of its time, q (B, H, S, D), k, v (B, Hk, S, D). → (B, H, S, D), no state"""
    early = _early(spec, q, call).tolist()
    if len(set(early)) == 1:
        own, mine = _of(spec, learned, early[0])
        return operators.attend(own, q, k, v, call, None, mine)[0], None
    parts, order = [], []
    for noisy in (True, False):
        rows = [b for b, x in enumerate(early) if x == noisy]
        index = torch.tensor(rows, device=q.device)
        own, mine = _of(spec, learned, noisy)
        parts.append(operators.attend(own, q[index], k[index], v[index], _samples(call, index), None, mine)[0])
        order += rows
    back = torch.tensor(order, device=q.device).argsort()
    return torch.cat(parts).index_select(0, back), None


def _early(spec: Timed, q: Tensor, call: Call) -> Tensor:
    """(B,) bool: which samples are mostly noise.

    Raises:
        ValueError: the call does not say its time, or not for each sample.
    """
    if call.causal:
        raise ValueError(f"{label(spec)} is for diffusion models, whose attention reads in both directions")
    if call.time is None:
        raise ValueError(f"{label(spec)} needs the time of each sample, from 1 (noise) to 0: the call has none")
    if call.time.shape != q.shape[:1]:
        raise ValueError(f"time has shape {tuple(call.time.shape)}: expected ({q.shape[0]},), one for each sample")
    return call.time >= spec.above


def _of(spec: Timed, learned: nn.Module | None, noisy: bool) -> tuple[Spec, nn.Module | None]:
    """The operator of noisy samples or of the others, and what it learned."""
    own = spec.early if noisy else spec.late
    return own, (learned.early if noisy else learned.late) if isinstance(learned, Both) else None


def _samples(call: Call, rows: Tensor | slice) -> Call:
    """The call of some samples of the batch."""
    valid, time = (None if x is None else x[rows] for x in (call.valid, call.time))
    return dataclasses.replace(call, valid=valid, time=time)


def prefill_cost(spec: Timed, shape: Shape, length: int) -> Cost:
    """The mean over steps whose times are spread evenly: a share of `above` has the late operator."""
    early, late = (operators.of(own).prefill_cost(own, shape, length) for own in (spec.early, spec.late))
    means = {
        f.name: spec.above * getattr(late, f.name) + (1 - spec.above) * getattr(early, f.name)
        for f in dataclasses.fields(Cost)
    }
    return Cost(**means)


def decode_cost(spec: Timed, shape: Shape, length: int) -> Cost:
    """There is none: a ValueError says so."""
    raise ValueError(f"{label(spec)} is for diffusion models: nothing is decoded token by token")


def state_size(spec: Timed, shape: Shape, length: int) -> float:
    """Nothing is cached."""
    return 0.0
