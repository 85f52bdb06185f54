"""The stage `evaluate` of an image or video model: every arm against the teacher, from the same noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..convert.evaluation_images import (
    attention_flops,
    break_even,
    check_image_gates,
    judged,
    likeness,
    step_speed,
    velocity,
)
from ..convert.files import replacing, stored
from ..convert.hosts.denoising import latent_shape
from ..convert.hosts.sites import all_full
from ..convert.images import pixels, sheet, view_of
from ..convert.machine import hardware
from ..convert.sampling import noise
from ..kernels.spec import nested
from .images import Images

if TYPE_CHECKING:
    from .work import Work

SHOWN = 10  # images of each in the sheet
FRESH = 7919  # added to the seed: samples of the teacher that nothing else has seen


def evaluate_images(
    work: Work, arms: Sequence[str], load: Callable[[str], Any], kept: Path | None, student: str
) -> dict[str, Any]:
    """evaluation.json of some arms; what is measured is kept in the folder `kept`, one file each, images too.

    Args:
        load: an arm's model; student: the arm that is exported.
    """
    settings, images = work.of_images.evaluate, work.images
    numbers = range(settings.samples)

    def once(name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return dict(measure() if kept is None else stored(kept / f"{name}.json", measure))

    def pictures(name: str, model: Callable[[], Any], seed: int) -> Tensor:
        path = None if kept is None else kept / f"{name}.safetensors"
        if path is not None and path.exists():
            return load_file(path)["x"]
        drawn = images.draw(model(), numbers, seed, settings.batch, f"{name}: sampling").x
        if path is not None:
            with replacing(path) as temporary:
                save_file({"x": drawn.contiguous()}, temporary)
        return drawn

    states = images.states(settings.states, settings.seed, settings.bands, "held-out states")
    teachers = pictures("teacher", lambda: work.model, settings.seed)
    fresh, view = teachers, view_of(teachers)
    labels = [images.conditions.labels[n] for n in images.entries(numbers).tolist()]
    quality: dict[str, Any] = {}
    if images.classifier is not None:
        fresh = pictures("fresh", lambda: work.model, settings.seed + FRESH)
        quality = once("teacher", lambda: judged(teachers, labels, fresh, images.classifier))  # type: ignore[arg-type]
    grid, text = images.layout(work.sites)
    tokens = math.prod(grid)
    dense = attention_flops(all_full(work.sites), grid, text, [tokens])[tokens]
    result: dict[str, Any] = {"teacher": {"quality": quality}}
    shown = {"teacher": teachers[:SHOWN]}
    plans = work.plans()
    for arm in arms:

        def measure(arm: str = arm) -> dict[str, Any]:
            model = load(arm)
            found = velocity(work.model, model, states, work.track, f"{arm}: velocity")
            drawn = pictures(f"images-{arm}", lambda: model, settings.seed)
            return {"quality": {**found, **likeness(teachers, drawn, labels, fresh, images.classifier)}}

        plan = plans[arm].for_sites(work.sites)
        result[arm] = once(f"arm-{arm}", measure) | {
            "flops_ratio": attention_flops(plan, grid, text, [tokens], images.times)[tokens] / dense,
            "converted": plans[arm].converted,
            "operators": plans[arm].counts(),
            "trained": work.trained(arm) is not None,
        }
        if kept is not None:
            shown[arm] = pictures(f"images-{arm}", lambda arm=arm: load(arm), settings.seed)[:SHOWN]  # type: ignore[misc]
    if kept is not None:
        title = f"The same noise: {work.recipe.name}"
        seen = {name: pixels(view(x)) for name, x in shown.items()}
        sheet(seen, [str(label) for label in labels[:SHOWN]], kept / "images.png", title)
    document: dict[str, Any] = {
        "schema": 1,
        "kind": "images",
        "machine": hardware(),
        "data": {**settings.model_dump(mode="json"), **work.of_images.images.model_dump(mode="json")},
        "arms": result,
        "speed": {},
    }
    timing = settings.speed
    if timing is not None and student in arms:

        def measure_speed() -> dict[str, Any]:
            pair = {"teacher": work.model, "student": load(student)}
            specs = {spec for specs in plans[student].groups.values() for spec in specs}
            # an operator that depends on the time is timed over the sampler's way, five of its steps
            times = images.times[:: max(1, len(images.times) // 5)] if any(nested(s) for s in specs) else [0.5]
            calls = {name: partial(one_step, images, model, times=times) for name, model in pair.items()}
            base = math.prod(work.of_images.images.size)

            def count(size: Sequence[int]) -> int:
                return round(tokens * math.prod(size) / base)

            return step_speed(calls, timing.sizes, count, timing.repeats, work.model.device, work.track)

        document["speed"] = once("speed", measure_speed)
        document["break_even"] = break_even(document["speed"])
    document["gates"] = check_image_gates(work.of_images.gates, document)
    return document


def one_step(images: Images, model: Any, size: Sequence[int], times: Sequence[float] = (0.5,)) -> Callable[[], None]:
    """What a step of the sampler runs at a size, guidance included, once for each of the times."""
    start = noise(latent_shape(model, size), 0, [0]).to(model.device)
    guided = images.settings.guidance != 1
    asked = torch.cat([images.entries([0]), images.conditions.nulls(1)]) if guided else images.entries([0])
    x = torch.cat([start, start]) if guided else start
    denoise = images.denoise(model)

    def run() -> None:
        for time in times:
            denoise(x, torch.full((len(x),), time, device=model.device), asked)

    return run
