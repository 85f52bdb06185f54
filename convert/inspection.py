"""Looking without touching: the state of a run's stages, the attention of a model, the plan of a conversion."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .artefacts import dig, read_artefacts
from .checkpoints import BLOCK, block_of, form_of, is_denoiser, is_exported, model_folder, weights_dtype
from .errors import UsageError
from .files import read_json
from .keys import STAGES, UPSTREAM, sections_of
from .recipe import AnyRecipe, ModelSource
from .report_html import duration
from .runs import DONE, KEY, RECIPE, Run, is_run

if TYPE_CHECKING:
    from ..kernels.spec import Spec
    from .artefacts import Artefacts
    from .hosts.sites import Site
    from .progress import Track

    Plan = Mapping[Site, Sequence[Spec]]

LENGTHS = (8192, 32768)  # tokens at which the cache of a plan is compared with the full one
ENCODED = (512,)  # and the work of an encoder's
GRIDS = {2: (64, 64), 3: (8, 32, 32)}  # and that of a denoiser's where no run says at which size it was profiled


# --- runs -------------------------------------------------------------------------------------------------------------


def stage_states(run: Run, until: str = STAGES[-1], before: AnyRecipe | None = None) -> list[dict[str, str]]:
    """{"stage", "state", "why"} of every stage: what `run_stages` would do. Nothing is written, torch is not needed.

    `before` is the recipe that the run had until now, to tell what has changed in it.
    """
    rows: list[dict[str, str]] = []
    will: set[str] = set()
    wanted = STAGES[: STAGES.index(until) + 1]
    for stage in STAGES:
        if run.is_done(stage):
            took = dig(run.manifest(), "stages", stage, default={})
            when = str(took.get("finished", ""))[:16].replace("T", " ")
            state, why = "done", f"finished {when}, took {duration(took.get('seconds'))}"
        else:
            state, why = _waiting(run, stage, before, will)
            will.add(stage)
        if stage not in wanted and state != "done":
            state = "not asked for"
        rows.append({"stage": stage, "state": state, "why": why})
    return rows


def _waiting(run: Run, stage: str, before: AnyRecipe | None, will: set[str]) -> tuple[str, str]:
    if not run.stale(stage):
        folder = run.folder(stage)
        if (folder / DONE).exists():
            return "will run", "files of it are gone"
        begun = (folder / KEY).exists() and (folder / KEY).read_text(encoding="utf-8").startswith(run.key(stage))
        return "will run", "begun before; continues" if begun else "not run yet"
    changed = list(_changed(before, run.recipe, stage)) if before is not None else []
    earlier = [name for name in UPSTREAM[stage] if name in will]
    if changed:
        more = f" and {len(changed) - 2} more" if len(changed) > 2 else ""
        return "will run", f"out of date: {'; '.join(changed[:2])}{more}"
    if earlier:
        return "will run", f"out of date: {' and '.join(earlier)} will run again"
    return "will run", "out of date: the plan or the recipe has changed since"


def _changed(before: AnyRecipe, now: AnyRecipe, stage: str) -> Iterator[str]:
    old, new = (recipe.model_dump(mode="json") for recipe in (before, now))
    for section in sections_of(new)[stage]:
        path = section.split(".")
        yield from _differences(dig(old, *path), dig(new, *path), section)


def _differences(old: Any, new: Any, where: str) -> Iterator[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{where}.{key}")
    elif old != new:
        yield f"{where} {_brief(old)} → {_brief(new)}"


def _brief(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:23]}…"


# --- models and plans -------------------------------------------------------------------------------------------------


def exported_folder(folder: Path) -> Path:
    """The checkpoint that is meant: the folder itself, or the export of the run that it is.

    Raises:
        UsageError: it is neither, or the export was interrupted.
    """
    if not is_exported(folder) and (folder / RECIPE).is_file() and is_exported(folder / "export"):
        folder = folder / "export"
    if is_exported(folder):
        if (folder / KEY).is_file() and not (folder / DONE).is_file():
            raise UsageError(f"{folder} is half an export: `attnconvert export {folder.parent}` goes on")
        return folder
    if (folder / RECIPE).is_file():
        raise UsageError(f"{folder} has no checkpoint yet: run `attnconvert run {folder / RECIPE} --out {folder}`")
    what = "is neither an exported checkpoint nor a run directory" if folder.exists() else "does not exist"
    raise UsageError(f"{folder} {what}: give the folder that `attnconvert export` or `attnconvert run` wrote")


def sizes_of(folder: Path, given: str | None) -> list[tuple[int, ...]]:
    """The sizes of latents on which a checkpoint is timed; none of a model of text.

    Raises:
        UsageError: they do not fit its kind, or are none.
    """
    if not is_denoiser(folder):
        if given is not None:
            raise UsageError(f"--sizes is for image and video models; {folder} is of text: give --lengths")
        return []
    block = read_json(model_folder(folder) / "config.json")["attnconvert"]
    axes = max(site["axes"] for site in block["sites"].values())
    named = given or ("64x64,128x128" if axes == 2 else "13x60x104")
    parts = [part.strip().split("x") for part in named.split(",")]
    if any(len(part) != axes or not all(n.isdecimal() and int(n) > 0 for n in part) for part in parts):
        form = "64x64,128x128, heights and widths" if axes == 2 else "13x60x104, frames, height and width"
        raise UsageError(f"--sizes {named}: give sizes of the latents, such as {form}")
    return [tuple(int(n) for n in part) for part in parts]


def describe_model(source: ModelSource, track: Track) -> dict[str, Any]:
    """The sites of a model, and which operators each could take.

    Raises:
        Unsupported: nothing in it can be converted; the message names the module and why.
    """
    from ..kernels.spec import OPERATORS
    from .hosts.sites import refusal

    name, model, found = _loaded(source, track)
    sites = []
    for site in found:
        fitting = [name for name, spec in OPERATORS.items() if refusal(site, spec()) is None]
        sites.append(
            {
                "name": site.name,
                "layer": site.layer,
                "heads": site.heads,
                "kv_heads": site.kv_heads,
                "head_dim": site.dim,
                "window": site.limit,
                "grid": {2: "image", 3: "video"}.get(site.axes, ""),
                "down": site.down,
                "text": site.text,
                "operators": fitting,
            }
        )
    return {
        "model": name,
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "groups": sum(site["kv_heads"] for site in sites),
        "sites": sites,
    }


def _loaded(source: ModelSource, track: Track) -> tuple[str, Any, list[Site]]:
    """A model's name, the model, and its sites: of text, or where its folder says so of diffusers."""
    from .sources import fetch_model, load_model

    if of_diffusers(source):
        from .denoiser_sources import fetch_denoiser, load_denoiser
        from .hosts.denoisers import find_sites as of_denoiser

        files = fetch_denoiser(source, track=track)
        denoiser = load_denoiser(files, source)
        return files.name, denoiser, of_denoiser(denoiser)
    from .hosts.models import find_sites

    files = fetch_model(source, track=track)
    model, _ = load_model(files, source)
    return files.name, model, find_sites(model)


def of_diffusers(source: ModelSource) -> bool:
    """Whether a model is an image or video model; of the hub its file list says it."""
    if source.shipped is not None:
        return True
    if source.folder is not None:
        config = source.folder / "config.json"
        named = config.is_file() and "_class_name" in config.read_text(encoding="utf-8", errors="replace")
        return named or (source.folder / "model_index.json").is_file()
    if source.hub is None:
        return False
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    for name in ("model_index.json", "config.json"):
        try:
            found = Path(huggingface_hub.hf_hub_download(source.hub, name, revision=source.revision))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError):
            continue  # fetching the model says what is wrong
        return "_class_name" in found.read_text(encoding="utf-8", errors="replace")
    return False


def describe_plan(folder: Path) -> dict[str, Any]:
    """The plan of an exported checkpoint or of a run, what it saves, and what was measured of it, if it was.

    Raises:
        UsageError: the folder is neither, or the run has not chosen a plan.
    """
    from ..kernels.spec import Full, label

    plan, origin, dtype = _plan_of(folder)
    images = any(site.axes for site in plan)
    run = folder if is_run(folder) else folder.parent
    found = read_artefacts(run) if is_run(run) else None
    full = {site: [Full()] * site.kv_heads for site in plan}
    labels = [label(spec) for specs in plan.values() for spec in specs]
    if images:
        ratios = {"kv": {}, "flops": _work_ratios(plan, full, found)}
    else:
        ratios = _text_ratios(plan, full, 4 if dtype == "float32" else 2)

    return {
        "folder": str(folder),
        "from": str(origin),
        "groups": len(labels),
        "converted": sum(name != "full" for name in labels) / max(1, len(labels)),
        "operators": {name: labels.count(name) for name in dict.fromkeys(labels)},
        **{f"{name}_ratio": found_ratios for name, found_ratios in ratios.items()},
        "images": images,
        "sites": [
            {"name": site.name, "layer": site.layer, "groups": [label(spec) for spec in specs]}
            for site, specs in plan.items()
        ],
        "evaluation": dict(found.evaluation) if found and found.status["evaluate"] == "done" else None,
    }


def _text_ratios(plan: Plan, full: Plan, element: int) -> dict[str, dict[str, float]]:
    """Of what full attention takes, by length; nothing where that is nothing, as an encoder's cache."""
    from .evaluation import costs

    lengths = LENGTHS if all(site.causal for site in plan) else ENCODED
    taken = {n: [costs(which, n, element) for which in (plan, full)] for n in lengths}
    return {
        name: {str(n): mine[field] / dense[field] for n, (mine, dense) in taken.items() if dense[field]}
        for name, field in (("kv", "kv_bytes"), ("flops", "flops"))
    }


def _work_ratios(plan: Plan, full: Plan, run: Artefacts | None) -> dict[str, float]:
    """The same of a denoiser's FLOPs, by image tokens: at the size that was profiled and at twice its sides."""
    from .evaluation_images import attention_flops

    grid = tuple(dig(run.profile, "data", "grid", default=()) if run else ())
    text = dig(run.profile, "data", "text", default=0) if run else 0
    grid = grid or GRIDS[max(site.axes for site in plan)]
    lengths = [math.prod(grid), 4 * math.prod(grid)]
    mine, dense = (attention_flops(which, grid, text, lengths) for which in (plan, full))
    return {str(n): mine[n] / dense[n] for n in lengths}


def _plan_of(folder: Path) -> tuple[Mapping[Any, Any], Path, str]:
    """Operators by site, the file they stand in, and the number type. A run's plan may be newer than its export."""
    from .hosts.sites import read_plan_block
    from .plan import read_plan
    from .profiling import Profile

    if is_exported(folder):
        own, block = model_folder(folder), block_of(folder)
        assert block is not None
        origin = next(path for path in (own / BLOCK, own / "config.json") if path.is_file())
        told = block["model"]["source"] if form_of(folder) == "adapter" else read_json(own / "config.json")
        dtype = weights_dtype(own) if is_denoiser(folder) else str(told.get("dtype"))
        return read_plan_block(block), origin, dtype
    run = Run.open(folder)
    measured = run.folder("profile") / "profile.json"
    if not run.plan.exists() or not measured.exists():
        recipe = folder / RECIPE
        raise UsageError(f"{folder} has no plan yet: run `attnconvert run {recipe} --out {folder} --until select`")
    sites = Profile.from_json(read_json(measured)).sites
    return read_plan(run.plan).for_sites(sites), run.plan, run.recipe.model.dtype
