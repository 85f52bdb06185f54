"""What converted image models keep, and what they gain: the tables of docs/images.md.

    make images                          everything; over an hour on two cores, continues where it stopped
    make images ARGS="quality"           flux-mnist by each recipe, several seeds
    make images ARGS="speed"             one step at several sizes, beside the original with SDPA
    make images ARGS="layers"            LinVideo's learned choice of layers against others
    make images ARGS="page"              the tables alone

Writes images.json beside this file. Quality: the recipe up to `distill`, then teacher and student from the same noise
with each seed; the teacher's samples are made once for each. With --retrain every seed trains a student of its own.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import images_tables

from attnconvert import pipeline
from attnconvert.convert.damage import replaced
from attnconvert.convert.evaluation_images import break_even, step_speed, velocity
from attnconvert.convert.files import read_json, stored, write_json
from attnconvert.convert.hosts.surgery import converted
from attnconvert.convert.machine import hardware, versions
from attnconvert.convert.progress import Track, rich_track
from attnconvert.convert.recipe import load_recipe
from attnconvert.convert.runs import Run
from attnconvert.distill.image_stages import evaluate_images, one_step
from attnconvert.distill.work import STUDENT, Work
from attnconvert.kernels.spec import Spec, label, spec_from_dict

HERE = Path(__file__).parent
RESULTS = HERE / "images.json"
RECIPES = ("flux-mnist-local", "flux-mnist-linear", "flux-mnist-sla")
SIZES = ((32, 32), (64, 64), (128, 128))
TIMED: tuple[Mapping[str, Any], ...] = (
    {"operator": "disc", "radius": 2},
    {"operator": "disc", "radius": 4},
    {"operator": "disc", "radius": 8},
    {"operator": "neighbourhood", "window": 9},
    {"operator": "linear", "conv": 3},
    {"operator": "sla", "keep": 0.1, "block": 32, "tile": 4},
    {"operator": "agent"},
)
LAYERS = (2, 3)
PARTS = ("quality", "speed", "layers", "page")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--retrain", action="store_true", help="a student of its own for every seed")
    parser.add_argument("--out", type=Path, default=HERE.parent.parent / "runs" / "bench" / "images")
    given = parser.parse_args()
    track = rich_track()
    found: dict[str, Any] = read_json(RESULTS) if RESULTS.exists() else {"schema": 1}

    def keep(part: str, rows: Any) -> None:
        when = datetime.now(UTC).isoformat(timespec="seconds")
        about = {"date": when, "machine": hardware(), "versions": versions(), "command": f'make images ARGS="{part}"'}
        found[part] = {**about, "rows": rows}
        write_json(RESULTS, found)

    for part in given.parts:
        if part == "quality":
            rows = [r for r in found.get(part, {}).get("rows", []) if r["recipe"] not in given.recipes]
            for recipe, seed in itertools.product(given.recipes, range(given.seeds)):
                rows.append(quality(recipe, seed, given.retrain, given.out, track))
                keep(part, rows)
        elif part == "speed":
            keep(part, speed(given.out, track))
        elif part == "layers":
            keep(part, layers(given.seeds, given.out, track))
    images_tables.write(found)


def quality(recipe: str, seed: int, retrain: bool, out: Path, track: Track) -> dict[str, Any]:
    """What a recipe's student keeps of what is drawn with a seed, and what the conversion took."""
    trained = seed if retrain else 0
    seeds = ("profile.seed", "select.seed", "sample.seed", "distill.seed")
    moved = [*(f"{name}={2 * trained}" for name in seeds), f"evaluate.seed={2 * seed + 1}", "evaluate.speed=null"]
    moved.append("gates.step_speedup={}")
    work = Work(Run.create(load_recipe(recipe, moved), out / recipe / f"seed-{trained}"), track)
    pipeline.run_stages(work, "distill")
    drawn = f"{work.of_images.images}{work.of_images.evaluate}"
    folder = out / "evaluation" / f"seed-{seed}-{hashlib.sha256(drawn.encode()).hexdigest()[:12]}"
    mine = folder / f"{recipe}-{work.run.key('distill')[:12]}"
    mine.mkdir(parents=True, exist_ok=True)
    shared = ("teacher.safetensors", "fresh.safetensors", "teacher.json")
    for name in shared:
        if (folder / name).exists() and not (mine / name).exists():
            os.link(folder / name, mine / name)
    document = evaluate_images(work, [STUDENT], work.student, mine, STUDENT)
    for name in shared:
        if not (folder / name).exists():
            os.link(mine / name, folder / name)
    stages = work.run.manifest()["stages"]
    teacher, student = document["arms"]["teacher"]["quality"], document["arms"][STUDENT]["quality"]
    return {
        "recipe": recipe,
        "seed": seed,
        "trained": trained,
        "samples": work.of_images.evaluate.samples,
        "seconds": {name: stages[name]["seconds"] for name in ("profile", "select", "sample", "distill")},
        "operators": document["arms"][STUDENT]["operators"],
        "flops_ratio": document["arms"][STUDENT]["flops_ratio"],
        "teacher": teacher,
        "student": student,
    }


def speed(out: Path, track: Track) -> list[dict[str, Any]]:
    """One guided step of flux-mnist with each operator in all layers, against the original with SDPA, in turns."""
    work = Work(Run.create(load_recipe("flux-mnist-local"), out / "speed"), track)
    images, rows = work.images, []
    tokens = math.prod(images.layout(work.sites)[0])
    base = math.prod(work.of_images.images.size)
    for given in TIMED:
        spec = spec_from_dict(dict(given))
        student = copy.deepcopy(work.model)
        with converted(student, {site: [spec] * site.kv_heads for site in work.sites}):
            pair = {"teacher": work.model, "student": student}
            calls = {name: partial(one_step, images, model) for name, model in pair.items()}
            timed = step_speed(
                calls, SIZES, lambda size: round(tokens * math.prod(size) / base), 5, work.model.device, track
            )
        rows.append({"operator": label(spec), "sizes": timed, "break_even": break_even(timed)})
    return rows


def layers(seeds: int, out: Path, track: Track) -> list[dict[str, Any]]:
    """Velocity error of every choice of 2 and 3 of the 5 layers, linear and fitted, and which one each method takes."""
    recipe = load_recipe(HERE / "linvideo-study.yaml")
    rows = []
    for seed in range(seeds):
        work = Work(Run.create(_seeded(recipe, seed), out / "layers" / f"seed-{seed}"), track)
        pipeline.run_stages(work, "profile")
        profile = pipeline.measured_profile(work.run)
        spec = profile.candidates[next(iter(profile.candidates))]
        states = work.images.states(48, 1000 + seed, 3, "held-out states")
        gates = [statistics.fmean(row) for row in profile.gates["linvideo"]]
        count = len(work.sites)
        for number in LAYERS:
            errors: dict[str, float] = {}
            for chosen in itertools.combinations(range(count), number):
                name = "-".join(map(str, chosen))
                path = work.run.path / "choices" / f"{name}.json"
                errors[name] = stored(path, partial(_error, work, chosen, spec, states, track))["velocity_error"]
            learned = sorted(sorted(range(count), key=gates.__getitem__)[:number])
            even = [round((n + 0.5) * count / number - 0.5) for n in range(number)]
            rows.append(
                {
                    "seed": seed,
                    "layers": number,
                    "gates": gates,
                    "errors": errors,
                    "linvideo": "-".join(map(str, learned)),
                    "uniform": "-".join(map(str, even)),
                    "random": statistics.fmean(errors.values()),
                }
            )
    return rows


def _seeded(recipe: Any, seed: int) -> Any:
    settings = recipe.profile.model_copy(update={"seed": seed})
    return recipe.model_copy(update={"profile": settings})


def _error(work: Work, chosen: Sequence[int], spec: Spec, states: Any, track: Track) -> dict[str, float]:
    """What a choice of layers loses after the operators were fitted to the attention outputs."""
    groups = {(n, g): spec for n in chosen for g in range(work.sites[n].kv_heads)}
    student = copy.deepcopy(work.model)
    with replaced(student, work.sites, groups, work.learned):
        return {"velocity_error": velocity(work.model, student, states, track, "choices")["velocity_error"]}


if __name__ == "__main__":
    main()
