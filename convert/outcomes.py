"""What a finished stage is shown as, and where everything of a run lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from . import tables
from .artefacts import read_artefacts
from .checkpoints import form_of
from .files import read_json
from .inspection import describe_plan, stage_states
from .report import REPORT
from .runs import Run

if TYPE_CHECKING:
    from .progress import Track
    from .recipe import AnyRecipe


def outcome(run: Run, stage: str, width: int) -> tuple[Any, ...]:
    """What a finished stage left: the JSON document, then what a person is shown in a terminal of this width."""
    found = read_artefacts(run.path)
    folder = run.folder(stage)
    if stage == "profile":
        bands = [tables.bands_table(found.profile)] if found.profile.get("bands") else []
        return found.profile, tables.profile_table(found.profile), *bands, places(run)
    if stage == "select":
        sites = describe_plan(run.path)["sites"]
        shown = tables.selection_table(found.select, found.words), tables.plan_map(sites, width, found.words)
        return found.select, *shown, places(run)
    if stage == "sample":
        if run.recipe.kind == "images":
            pictures = run.recipe.sample
            document = {"folder": str(folder), "samples": pictures.count, "keep": pictures.keep}
            what = "samples" if pictures.keep == "latents" else "samples with their trajectories"
            return document, Text(f"{pictures.count} {what} in {folder}"), places(run)
        settings = run.recipe.sample
        document = {"folder": str(folder), "sequences": settings.sequences, "length": settings.length}
        return document, Text(f"{settings.sequences} sequences of {settings.length} tokens in {folder}"), places(run)
    if stage == "distill":
        return {"arms": found.logs}, tables.training_table(found.logs), places(run)
    metrics = run.manifest()["metrics"]
    checked = metrics.get("export") if run.recipe.export.verify else None
    written = metrics.get("export_format", {"form": "remote", "why": "the only format of image and video models"})
    told = Text(f"Exported as {written['form']}: {written['why']}.")
    return {"checkpoint": str(folder), **written, "verified": checked}, told, verified(checked), places(run)


def foreseen(recipe: AnyRecipe, folder: Path, until: str, track: Track) -> tuple[Any, ...]:
    """What would be done in a run of this folder, in the same form; of an image or video model what it will take too.

    Nothing is written.
    """
    run = Run.foresee(recipe, folder)
    before = Run.open(folder).recipe if (folder / "recipe.yaml").is_file() else None
    rows = stage_states(run, until, before)
    where = Text(f"{recipe.name} in {folder}{'' if before else ' (new)'}")
    document = {"run": str(folder), "recipe": recipe.name, "stages": rows}
    if recipe.kind == "text":
        return document, where, tables.stages_table(rows)
    from .foresight import foresee  # torch and diffusers, which the others do without
    from .foresight_tables import foresight_parts

    found = foresee(recipe, track)
    return {**document, **found}, where, tables.stages_table(rows), *foresight_parts(found)


def summary(run: Run, ran: Sequence[str], evaluation: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a whole run comes to, in the same form."""
    document = {
        "run": str(run.path),
        "ran": list(ran),
        "stages": run.manifest()["stages"],
        "evaluation": evaluation,
        "checkpoint": str(run.folder("export")) if run.is_done("export") else None,
        "report": str(run.path / REPORT),
    }
    return document, *tables.evaluation_parts(evaluation), places(run)


def verified(checked: Any) -> Text:
    if not checked:
        return Text("Written; export.verify is off, so it was not loaded again.")
    count = len(checked)
    if any("error" in way for way in checked.values()):  # of a denoiser
        worst = max(way["error"] for way in checked.values())
        sizes = " and ".join(dict.fromkeys(size for way in checked.values() for size in way["grids"]))
        where = f" on grids of {sizes} tokens" if sizes else ""
        return Text(f"Loaded again in {count} clean processes: predictions differ by at most {worst:.1e}{where}.")
    worst = max(way["logits_error"] for way in checked.values())
    if any("weights_equal" in way for way in checked.values()):  # of an adapter
        return Text(
            f"Loaded again in {count} clean processes: weights are equal, logits differ by at most {worst:.1e}."
        )
    tokens = "tokens are equal"
    if not all(way["generation_equal"] for way in checked.values()):  # of a stock architecture in half precision
        tokens = "tokens are equal with our kernels, and with the library's own attention differ by its rounding"
    return Text(f"Loaded again in {count} clean processes: logits differ by at most {worst:.1e}, {tokens}.")


def places(run: Run) -> Text:
    """Where everything lies, and how to load the checkpoint."""
    pairs: list[tuple[str, object]] = [("report", run.path / REPORT)]
    if run.plan.exists():
        pairs.append(("plan", run.plan))
    if run.is_done("export"):
        folder = run.folder("export")
        pairs += loading(folder, run.recipe.kind == "images")
    return tables.lines(pairs)


def loading(folder: Path, images: bool = False) -> list[tuple[str, object]]:
    """Where a checkpoint is and how it is loaded, as lines of a name and a text."""
    form, anyhow = form_of(folder), f'attnconvert.load("{folder}")'
    if form == "adapter":
        return [("checkpoint", folder), ("load it", anyhow)]
    if form == "stock":
        load = f'AutoModelForCausalLM.from_pretrained("{folder}")'
        return [("checkpoint", folder), ("load it", load), ("or", anyhow)]
    if images:
        auto = "DiffusionPipeline" if (folder / "model_index.json").is_file() else "AutoModel"
        auto = f"diffusers.{auto}"
    else:
        auto = next(name for name in read_json(folder / "config.json")["auto_map"] if name != "AutoConfig")
    load = f'{auto}.from_pretrained("{folder}"'
    return [
        ("checkpoint", folder),
        ("load it", f"{load}, trust_remote_code=True)"),
        ("or", f"import attnconvert{', diffusers' * images}; {load})"),
    ]
