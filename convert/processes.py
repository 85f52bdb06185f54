"""How a diffusion model mixes data and noise, what it predicts, and how one step of sampling follows from that.

Time t runs from 0, the data, to 1, the noise, whatever a model's own timesteps are. Everywhere x_t = α·x + σ·noise:

| kind | α, σ at t | the model predicts | models |
|---|---|---|---|
| `flow` | 1 − t, t | noise − x | FLUX, SD3, Wan, HunyuanVideo, Mochi |
| `epsilon` | √ᾱ, √(1 − ᾱ) | noise | SD 1.5, SDXL, PixArt |
| `v_prediction` | √ᾱ, √(1 − ᾱ) | α·noise − σ·x | SD 2.1, CogVideoX |

ᾱ of the last two is a table of 1000 trained steps: t is rounded to the nearest, and the model's step k is
t = (k + 1) / 1000. Sources: flow matching (Lipman et al., 2022), DDPM (Ho et al., 2020), DDIM (Song et al., 2020),
v-prediction (Salimans & Ho, 2022), zero terminal SNR (Lin et al., 2023), shifted times (Esser et al., 2024).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import UsageError

KINDS = ("flow", "epsilon", "v_prediction")
SCHEDULES = ("scaled_linear", "linear")
TRAINED = 1000  # steps of a table of ᾱ


@dataclass(frozen=True, kw_only=True)
class Process:
    """One of the kinds above; the other fields shape the table of ᾱ and mean nothing to `flow`.

    `snr_shift` divides the signal-to-noise ratio, and `zero_snr` makes the last step pure noise (both CogVideoX's).
    """

    kind: str = "flow"
    schedule: str = "scaled_linear"
    beta_first: float = 0.00085
    beta_last: float = 0.012
    snr_shift: float = 1.0
    zero_snr: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"no diffusion process {self.kind!r}; known are {', '.join(KINDS)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"no schedule of noise {self.schedule!r}; known are {', '.join(SCHEDULES)}")
        if not 0 < self.beta_first <= self.beta_last < 1:
            raise ValueError(f"0 < beta_first ≤ beta_last < 1 must hold, not {self.beta_first} and {self.beta_last}")
        if self.snr_shift <= 0:
            raise ValueError(f"snr_shift must be above 0, not {self.snr_shift}")
        if self.zero_snr and self.kind == "epsilon":
            raise ValueError("epsilon says nothing of the data where all is noise: zero_snr needs v_prediction")

    @property
    def stepped(self) -> bool:
        """Whether only the trained steps exist, or every t."""
        return self.kind != "flow"

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ at each of t (…), in fp32."""
        t = t.float()
        if not self.stepped:
            return 1 - t, t
        kept = _kept(self).to(t.device)[(t * TRAINED).round().long().clamp(0, TRAINED)]
        return kept.sqrt().float(), (1 - kept).sqrt().float()

    def noised(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of data and noise (B, …) at t (B,)."""
        alpha, sigma = self._like(x, t)
        return alpha * x + sigma * noise

    def target(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What a perfect model predicts of x_t, where x and noise are known."""
        if self.kind == "epsilon":
            return noise
        if self.kind == "flow":
            return noise - x
        alpha, sigma = self._like(x, t)
        return alpha * noise - sigma * x

    def split(self, x: Tensor, prediction: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The data and the noise that x_t (B, …) consists of according to a prediction."""
        alpha, sigma = self._like(x, t)
        if self.kind == "epsilon":
            return (x - sigma * prediction) / alpha, prediction
        if self.kind == "flow":
            return x - t.view_as(alpha) * prediction, x + alpha * prediction
        return alpha * x - sigma * prediction, sigma * x + alpha * prediction

    def step(self, x: Tensor, prediction: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """From x_t to t_next (B,): Euler for flow, DDIM without noise for the others, which are one formula."""
        if not self.stepped:
            change = (t_next - t).view(-1, *[1] * (x.ndim - 1))
            return x + change * prediction
        data, noise = self.split(x, prediction, t)
        return self.noised(data, noise, t_next)

    def times(self, steps: int, shift: float = 1.0) -> Tensor:
        """(steps + 1,) from 1 to 0. A shift s spends more of the steps near the noise: t' = s·t / (1 + (s − 1)·t)."""
        if steps < 1 or (self.stepped and steps > TRAINED):
            most = f" and at most {TRAINED}, which is what {self.kind} models know" if self.stepped else ""
            raise UsageError(f"sampling takes at least 1 step{most}, not {steps}")
        if shift <= 0 or (self.stepped and shift != 1):
            raise UsageError(f"shift must be {'1 for ' + self.kind if self.stepped else 'above 0'}, not {shift}")
        t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        t = shift * t / (1 + (shift - 1) * t)
        return ((t * TRAINED).round() / TRAINED if self.stepped else t).float()

    def any_times(self, u: Tensor, shift: float = 1.0) -> Tensor:
        """Times of numbers u (n,), uniform in 0 … 1: all that the model knows, not only those of one sampler."""
        if self.stepped:
            return ((u * TRAINED).floor() + 1).clamp_max(TRAINED) / TRAINED
        u = u.clamp_min(1e-3)
        return shift * u / (1 + (shift - 1) * u)

    def _like(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ of t (B,), broadcastable to x (B, …)."""
        if t.shape != x.shape[:1]:
            raise ValueError(f"t must be one time per sample, ({x.shape[0]},), not {tuple(t.shape)}")
        alpha, sigma = self.coefficients(t)
        wide = (-1, *[1] * (x.ndim - 1))
        return alpha.view(wide), sigma.view(wide)


def of_scheduler(config: Mapping[str, Any]) -> Process:
    """The process that a pipeline's scheduler_config.json describes.

    Raises:
        UsageError: it is of a process that is none of the three.
    """
    name = str(config.get("_class_name", ""))
    if "Flow" in name or config.get("prediction_type") == "flow_prediction":
        return Process(kind="flow")
    kind, schedule = config.get("prediction_type", "epsilon"), config.get("beta_schedule", "linear")
    steps = config.get("num_train_timesteps", TRAINED)
    if kind not in KINDS or schedule not in SCHEDULES or steps != TRAINED or config.get("trained_betas") is not None:
        raise UsageError(
            f"the scheduler {name} predicts {kind!r} on a {schedule!r} schedule of {steps} steps; known are "
            f"{', '.join(KINDS)} on {' or '.join(SCHEDULES)} of {TRAINED}: name the process in the recipe"
        )
    return Process(
        kind=kind,
        schedule=schedule,
        beta_first=config.get("beta_start", 0.0001),
        beta_last=config.get("beta_end", 0.02),
        snr_shift=config.get("snr_shift_scale", 3.0 if "CogVideoX" in name else 1.0),
        zero_snr=bool(config.get("rescale_betas_zero_snr", False)),
    )


@functools.lru_cache(maxsize=16)
def _kept(process: Process) -> Tensor:
    """(TRAINED + 1,) ᾱ in fp64; entry 0 is the data itself."""
    root = 0.5 if process.schedule == "scaled_linear" else 1.0
    betas = torch.linspace(process.beta_first**root, process.beta_last**root, TRAINED, dtype=torch.float64)
    kept = (1 - betas ** (1 / root)).cumprod(0)
    kept = kept / (process.snr_shift + (1 - process.snr_shift) * kept)
    if process.zero_snr:
        root_kept = kept.sqrt()
        kept = ((root_kept - root_kept[-1]) * root_kept[0] / (root_kept[0] - root_kept[-1])).square()
    return torch.cat([torch.ones(1, dtype=torch.float64), kept])
