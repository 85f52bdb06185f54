"""States of a denoiser: points of the teacher's own trajectories, on which profiling and evaluation measure it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .conditioning import Conditions
from .hosts.denoising import Calling, predict
from .image_metrics import velocity_error
from .processes import Process
from .sampling import Drawn


@dataclass(frozen=True)
class Caller:
    """A denoiser as it is asked: entries of the conditions, and what its calls have besides."""

    conditions: Conditions
    calling: Calling

    def __call__(self, model: Any, x: Tensor, t: Tensor, entries: Tensor) -> Tensor:
        """The predictions (B, C, …) for x_t (B, C, …) at t (B,), asked for as entries (B,) say."""
        at = x.to(model.device, model.dtype), t.to(model.device)
        return predict(model, *at, self.conditions.take(entries, model.device), self.calling)


@dataclass(frozen=True)
class States:
    """`x` (n, C, …) at `t` (n,), asked for as `entries` (n,) of the conditions say; `target` (n, C, …) is what the
    sampled data and its noise would have the model predict; `bands` names the part of the steps that each is of.

    Damage "kl" is the squared error of the prediction over the square of the teacher's: the KL between the paths of two
    samplers is an integral of it (Girsanov), which is why it takes the place that KL has for text.
    """

    caller: Caller
    x: Tensor
    t: Tensor
    entries: Tensor
    target: Tensor
    bands: tuple[str, ...]
    losses: ClassVar[tuple[str, ...]] = ("text",)

    def __len__(self) -> int:
        return len(self.x)

    def first(self, cases: int) -> States:
        """The first only."""
        return self.take(torch.arange(min(cases, len(self))))

    def take(self, rows: Tensor) -> States:
        """Those at `rows` (m,)."""
        x, t, entries, target = (part[rows] for part in (self.x, self.t, self.entries, self.target))
        return States(self.caller, x, t, entries, target, tuple(self.bands[n] for n in rows.tolist()))

    def band(self, row: int) -> str | None:
        """The part of the sampler's steps that a state is of."""
        return self.bands[row]

    def run(self, model: Any, rows: Tensor) -> Tensor:
        """The predictions (b, C, …) for the states at `rows` (b,)."""
        rows = rows.cpu()
        return self.caller(model, self.x[rows], self.t[rows], self.entries[rows])

    def answers(self, model: Any, case: int) -> Tensor:
        """The prediction (C, …) for one state, in fp32."""
        return self.run(model, torch.tensor([case]))[0].float()

    def compared(self, case: int, want: Tensor, got: Tensor) -> dict[str, float]:
        """The relative squared error; there is no retrieval to lose."""
        return {"kl": velocity_error(got, want), "needle": 0.0}

    def answer_loss(self, case: int, answers: Tensor) -> float:
        """Nothing is asked for."""
        return 0.0

    def loss(self, model: Any, case: int, name: str) -> Tensor:
        """The model's original loss, relative: squared error to the data's own target over the target's square."""
        got, want = self.run(model, torch.tensor([case]))[0].float(), self.target[case].to(model.device).float()
        return (got - want).square().sum() / want.square().sum().clamp_min(1e-12)


def states_of(
    caller: Caller,
    process: Process,
    drawn: Drawn,
    entries: Tensor,
    steps: Sequence[Sequence[int]],
    bands: int,
) -> States:
    """States of drawn trajectories, every fourth without the prompt where the sampler ran both.

    The target of a state is what its own sample asks for: the noise between the two is (x_t − α·x) / σ.

    Args:
        entries: (n,) of the samples; steps: for each sample the numbers of the steps to take.
    """
    found = [(n, step) for n, chosen in enumerate(steps) for step in chosen]
    null = caller.conditions.null
    guided = null is not None and drawn.states[0].unprompted is not None
    asked = [null if guided and at % 4 == 3 else int(entries[n]) for at, (n, _) in enumerate(found)]
    rows = torch.tensor([n for n, _ in found])
    x = torch.stack([drawn.states[step].x[n] for n, step in found]).cpu()
    t = torch.tensor([drawn.states[step].t for _, step in found])
    data = drawn.x.cpu()[rows].float()
    alpha, sigma = (c.view(-1, *[1] * (x.ndim - 1)) for c in process.coefficients(t))
    target = process.target(data, (x - alpha * data) / sigma, t)
    names = tuple(band_name(step, len(drawn.states), bands) for _, step in found)
    return States(caller, x, t, torch.tensor(asked), target, names)


def band_name(step: int, steps: int, bands: int) -> str:
    """Which of `bands` equal parts of the steps a step is of: "1 of 3" is the noisiest."""
    return f"{step * bands // steps + 1} of {bands}"
