"""Evaluate a denoiser: predictions on the teacher's trajectories, images from the same noise, the time of a step."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ..kernels.spec import Spec, Timed
from .costs import Costs, analytic
from .hosts.sites import Site
from .image_metrics import Classifier, frechet, perceptual, psnr, ssim
from .images import scaled
from .recipe_images import size_name
from .states import States

if TYPE_CHECKING:
    from .progress import Track
    from .recipe_images import ImageGates

BATCH = 16  # states that are compared at once
LEAST = 11  # pixels along a side that SSIM needs


@torch.no_grad()
def velocity(teacher: Any, student: Any, states: States, track: Track, title: str) -> dict[str, Any]:
    """‖v̂ − v‖² / ‖v‖² over all states, and over those of each part of the steps.

    Returns:
        {"velocity_error": number, "bands": {"1 of 3": number, …}, "states": count}
    """
    totals: dict[str, list[float]] = {}
    for rows in track(torch.arange(len(states)).split(BATCH), title):
        want, got = (states.run(model, rows).float() for model in (teacher, student))
        off, norm = ((x.flatten(1).square().sum(1).tolist()) for x in (got - want, want))
        for row, wrong, whole in zip(rows.tolist(), off, norm, strict=True):
            for name in ("", states.bands[row]):
                total = totals.setdefault(name, [0.0, 0.0])
                total[0], total[1] = total[0] + wrong, total[1] + whole
    errors = {name: wrong / max(whole, 1e-12) for name, (wrong, whole) in sorted(totals.items())}
    return {"velocity_error": errors.pop(""), "bands": errors, "states": len(states)}


def likeness(
    teacher: Tensor, student: Tensor, labels: Sequence[Any], fresh: Tensor, classifier: Classifier | None
) -> dict[str, float]:
    """How near the student's samples are to the teacher's of the same noise, (N, C, …).

    `psnr` in dB and `ssim` are of pixels, or of latents as `images.scaled` makes them comparable; with a classifier
    `perceptual` distance, the share of the `right` class by `labels`, and `frechet`, the distance of its features to
    those of `fresh` samples of the teacher.
    """
    found: dict[str, float] = {}
    want, got = scaled([teacher, student])
    same = got, want
    found["psnr"] = float(psnr(*same).clamp_max(100.0).mean())
    if min(teacher.shape[-2:]) >= LEAST:
        found["ssim"] = float(ssim(*same).mean())
    if classifier is not None:
        found["perceptual"] = float(perceptual(classifier, student, teacher).mean())
        found |= judged(student, labels, fresh, classifier)
    return found


def judged(samples: Tensor, labels: Sequence[Any], fresh: Tensor, classifier: Classifier) -> dict[str, float]:
    """{"right_class": share, "frechet": distance to fresh samples of the teacher} of samples (N, C, H, W)."""
    classes, features = classifier.judge(samples)
    right = [str(a) == str(b) for a, b in zip(classes.tolist(), labels, strict=True)]
    return {"right_class": statistics.fmean(right), "frechet": frechet(features, classifier.judge(fresh)[1])}


def attention_flops(
    plan: Mapping[Site, Sequence[Spec]],
    grid: Sequence[int],
    text: int,
    lengths: Sequence[int],
    times: Sequence[float] = (),
) -> dict[int, float]:
    """FLOPs of the attention of one step and one sample, by the cost model, at each number of image tokens.

    Args:
        times: of the sampler's steps, whose mean counts where an operator changes with the time.
    """
    costs: Costs = analytic(plan, (), lengths, 1, 2, grid, text)

    def of(site: Site, spec: Spec, length: int) -> float:
        if isinstance(spec, Timed) and times:
            early = sum(t >= spec.above for t in times) / len(times)
            return early * of(site, spec.early, length) + (1 - early) * of(site, spec.late, length)
        return costs.group_cost("flops", site, spec, length)

    return {
        n: sum(of(site, spec, n) * count for site, specs in plan.items() for spec, count in Counter(specs).items())
        for n in lengths
    }


# --- time and memory --------------------------------------------------------------------------------------------------


@torch.no_grad()
def step_speed(
    calls: Mapping[str, Callable[[Sequence[int]], Callable[[], Any]]],
    sizes: Sequence[Sequence[int]],
    tokens: Callable[[Sequence[int]], int],
    repeats: int,
    device: torch.device,
    track: Track,
) -> dict[str, Any]:
    """Seconds of a step at each size, medians of runs in turns, and the most bytes of tensors that it holds.

    Args:
        calls: "teacher" and "student": a size → a function that takes one step; tokens: image tokens of a size.

    Returns:
        {"32x32": {"tokens", "teacher": {"step_s", "peak_bytes"}, "student": …, "speedup"}, …}
    """
    result: dict[str, Any] = {}
    for size in sorted(sizes, key=math.prod):
        steps = {name: make(size) for name, make in calls.items()}
        peaks = {name: peak_bytes(step, device) for name, step in steps.items()}  # and the first run, which is slow
        times: dict[str, list[float]] = {name: [] for name in steps}
        for repeat in track(range(repeats), f"speed at {size_name(tuple(size))}"):
            for name in list(steps) if repeat % 2 == 0 else list(steps)[::-1]:
                gc.collect()
                start = _now(device)
                steps[name]()
                times[name].append(_now(device) - start)
        entry: dict[str, Any] = {"tokens": tokens(size), "repeats": repeats}
        for name, seconds in times.items():
            entry[name] = {"step_s": statistics.median(seconds), "peak_bytes": peaks[name]}
        entry["speedup"] = entry["teacher"]["step_s"] / entry["student"]["step_s"]
        result[size_name(tuple(size))] = entry
    return result


def break_even(speed: Mapping[str, Any]) -> dict[str, Any]:
    """From how many image tokens on a step is faster than the teacher's: between the sizes by interpolation.

    Returns:
        {"tokens": number or None, "told": sentence}; None where it is slower at every size that was timed.
    """
    points = sorted((entry["tokens"], entry["speedup"], size) for size, entry in speed.items())
    slower = [n for n, (_, ratio, _) in enumerate(points) if ratio < 1]
    if not slower:
        return {"tokens": points[0][0], "told": f"faster at every size that was timed, from {points[0][2]} on"}
    last = slower[-1]
    if last == len(points) - 1:
        return {"tokens": None, "told": f"slower up to {points[-1][2]}, the largest size that was timed"}
    (n1, r1, _), (n2, r2, _) = points[last], points[last + 1]
    share = -math.log(r1) / (math.log(r2) - math.log(r1))
    tokens = round(math.exp(math.log(n1) + share * (math.log(n2) - math.log(n1))))
    return {"tokens": tokens, "told": f"faster from about {tokens:,} image tokens on"}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes(step: Callable[[], Any], device: torch.device) -> int:
    """The most bytes of tensors that live at once while a step runs, beside those that were there before.

    On a GPU the allocator says it; elsewhere every tensor that an operation makes is counted until it is gone. What a
    kernel holds inside of itself does not show there.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return int(torch.cuda.max_memory_allocated() - before)
    with _Counting() as counting:
        step()
    return int(counting.most)


class _Counting(TorchDispatchMode):
    """Adds up the storages that operations make, and takes them off when they are gone."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in _tensors((args, kwargs or {}))}
        out = func(*args, **(kwargs or {}))
        self.live = {key: (ref, size) for key, (ref, size) in self.live.items() if not ref.expired()}
        for x in _tensors(out):
            storage = x.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self.live:
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, sum(size for _, size in self.live.values()))
        return out


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [x for item in value.values() for x in _tensors(item)]
    return [x for item in value for x in _tensors(item)] if isinstance(value, list | tuple) else []


# --- gates ------------------------------------------------------------------------------------------------------------


def check_image_gates(gates: ImageGates, evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each gate of the recipe with its limit, the student's value and whether it passed."""
    student, teacher = evaluation["arms"]["student"], evaluation["arms"]["teacher"]
    look = {**student["quality"], "converted": student["converted"], "flops_ratio": student["flops_ratio"]}
    if "frechet" in look and "frechet" in teacher["quality"]:
        look["frechet_rise"] = look["frechet"] - teacher["quality"]["frechet"]
    found = []
    for name, least in (
        ("velocity_error", False),
        ("psnr", True),
        ("ssim", True),
        ("right_class", True),
        ("frechet_rise", False),
        ("flops_ratio", False),
        ("converted", True),
    ):
        limit = getattr(gates, name)
        if limit is not None:
            found.append(_gate(name, limit, look.get(name), least))
    for size, limit in gates.step_speedup.items():
        found.append(_gate(f"step_speedup@{size}", limit, evaluation["speed"][size]["speedup"], True))
    return found


def _gate(name: str, limit: float, value: float | None, least: bool) -> dict[str, Any]:
    passed = value is not None and math.isfinite(value) and (value >= limit if least else value <= limit)
    return {"name": name, "limit": limit, "value": value, "passed": passed}
