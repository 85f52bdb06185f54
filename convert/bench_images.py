"""Times of an exported image or video model against its own weights with full attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.call import Call
from .evaluation_images import break_even, step_speed
from .hosts.denoisers import dummy_inputs, probe_grid
from .hosts.denoising import POOLED, form_of, latent_shape, predict
from .hosts.sites import SiteOperators

if TYPE_CHECKING:
    from .progress import Track


def bench_steps(
    teacher: Any, student: Any, sizes: Sequence[Sequence[int]], repeats: int, track: Track
) -> dict[str, Any]:
    """{"kind", "prompt", "speed", "break_even"}: seconds and memory of one call of the model, batch 1, for noise and a
    prompt of noise of `prompt` tokens, at sizes of the latents as of `step_speed`.
    """
    given = conditions(student)
    models = {"teacher": teacher, "student": student}
    calls = {name: lambda size, model=model: _step(model, size, given) for name, model in models.items()}

    def count(size: Sequence[int]) -> int:
        return tokens_of(student, size, given)

    speed = step_speed(calls, sizes, count, repeats, student.device, track)
    prompt = given["encoder_hidden_states"].shape[1]
    return {"kind": "images", "prompt": prompt, "speed": speed, "break_even": break_even(speed)}


def conditions(model: Any) -> dict[str, Tensor]:
    """What a model must be given beside latents and time, of noise, by the names of `hosts.denoising`."""
    dummy, row = dummy_inputs(model, probe_grid(model)), form_of(model)
    found = {name: dummy[name] for name in row.needs}
    added = dummy.get("added_cond_kwargs") or {}
    return found | ({POOLED: added["text_embeds"]} if "text_embeds" in added else {})


@torch.no_grad()
def tokens_of(model: Any, size: Sequence[int], given: dict[str, Tensor]) -> int:
    """Image tokens of latents of a size, seen in a run."""
    seen: list[int] = []

    def note(site: SiteOperators, q: Tensor, k: Tensor, v: Tensor, call: Call) -> None:
        assert call.layout is not None
        seen.append(math.prod(call.layout.grid) * site.site.down ** len(call.layout.grid))

    with model.conversion.observe(note):
        _step(model, size, given)()
    return max(seen)


def _step(model: Any, size: Sequence[int], given: dict[str, Tensor]) -> Callable[[], Tensor]:
    x = torch.randn(latent_shape(model, size), generator=torch.Generator().manual_seed(0))[None]
    x, t = x.to(model.device, model.dtype), torch.full((1,), 0.5, device=model.device)
    return lambda: predict(model, x, t, given)
