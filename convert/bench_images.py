"""Time an exported denoiser against itself with full attention: one call at several sizes of the latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .errors import UsageError
from .evaluation_images import break_even, step_speed
from .hosts.denoisers import dummy_inputs, prompt_length
from .hosts.denoising import token_grid
from .recipe_images import size_name

if TYPE_CHECKING:
    from .progress import Track


def bench_steps(
    teacher: Any, student: Any, sizes: Sequence[Sequence[int]], repeats: int, track: Track
) -> dict[str, Any]:
    """{"kind", "speed", "break_even", "text"}: the first three as in evaluation.json, and tokens of the prompt.

    A step is one call of the model for one sample, of noise for latents and prompt, without guidance.

    Raises:
        UsageError: a size has the wrong axes, or does not fit the model's patches; no size is timed then.
    """
    grids = {size_name(tuple(size)): token_grid(student, size) for size in sizes}
    repeated = [name for name in grids if [size_name(tuple(size)) for size in sizes].count(name) > 1]
    if repeated:
        raise UsageError(f"--sizes has {repeated[0]} twice: give it once")
    device, text = next(student.parameters()).device, prompt_length(student)

    def calls(model: Any) -> Callable[[Sequence[int]], Callable[[], Any]]:
        def at(size: Sequence[int]) -> Callable[[], Any]:
            inputs = dummy_inputs(model, grids[size_name(tuple(size))], text)
            return lambda: model(**inputs)[0]

        return at

    def tokens(size: Sequence[int]) -> int:
        return math.prod(grids[size_name(tuple(size))])

    with torch.no_grad():
        both = {"teacher": calls(teacher), "student": calls(student)}
        speed = step_speed(both, sizes, tokens, repeats, device, track)
    return {"kind": "images", "speed": speed, "break_even": break_even(speed), "text": text}
