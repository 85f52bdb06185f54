"""Images and videos from a denoiser: steps from noise to data, with classifier-free guidance (Ho & Salimans, 2022)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .errors import UsageError
from .processes import Process
from .seeds import rng


class Denoise(Protocol):
    """x_t (B, …), t (B,) and entries of the bank of conditions (B,) → the prediction, shaped like x_t."""

    def __call__(self, x: Tensor, t: Tensor, indices: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How samples are drawn. `guidance` g: prediction = none + g·(prompt − none); at 1 the model runs once a step."""

    steps: int
    guidance: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"sampling takes at least 1 step, not {self.steps}")
        if self.guidance < 0:
            raise UsageError(f"guidance must be at least 0, not {self.guidance}")


@dataclass(frozen=True)
class State:
    """One step on the way: x_t (B, …), t, and what the model predicted with and without the prompt, each like x_t."""

    x: Tensor
    t: float
    prompted: Tensor
    unprompted: Tensor | None


@dataclass(frozen=True)
class Drawn:
    """`x` (B, …) the samples; `states`, where asked for, one per step."""

    x: Tensor
    states: tuple[State, ...] = field(default=())


def noise(shape: Sequence[int], seed: int, numbers: Sequence[int]) -> Tensor:
    """(B, …) where each sample depends on the seed and its own number only, not on the batch that it is drawn in."""
    return torch.stack([torch.randn(tuple(shape), generator=rng("noise", seed, number)) for number in numbers])


@torch.no_grad()
def sample(
    denoise: Denoise,
    process: Process,
    sampler: Sampler,
    start: Tensor,
    indices: Tensor,
    nulls: Tensor | None = None,
    trajectory: bool = False,
) -> Drawn:
    """Walk from noise to samples.

    Args:
        start: (B, …) the noise, on the denoiser's device.
        indices: (B,) what is asked for; `nulls` (B,) the entries without a prompt, which guidance other than 1 needs.
        trajectory: whether every state on the way is returned too.
    """
    guided = sampler.guidance != 1
    if guided and nulls is None:
        raise UsageError(f"guidance {sampler.guidance} needs the entry without a prompt")
    times = process.times(sampler.steps, sampler.shift).to(start.device)
    asked = torch.cat([indices, nulls]) if guided and nulls is not None else indices
    x, states = start.float(), []
    for now, then in itertools.pairwise(times):
        t = now.expand(len(x))
        if guided:
            with_prompt, without = denoise(torch.cat([x, x]), now.expand(2 * len(x)), asked).float().chunk(2)
            prediction = without + sampler.guidance * (with_prompt - without)
        else:
            prediction = with_prompt = denoise(x, t, asked).float()
        if trajectory:
            states.append(State(x, float(now), with_prompt, without if guided else None))
        x = process.step(x, prediction, t, then.expand(len(x)))
    return Drawn(x, tuple(states))
