"""What a finished stage is shown as, and where everything of a run lies."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from . import tables
from .artefacts import read_artefacts
from .inspection import describe_plan
from .runs import Run


def outcome(run: Run, stage: str, width: int) -> tuple[Any, list[Any]]:
    """What a finished stage left: the JSON document, and what a person is shown."""
    found = read_artefacts(run.path)
    folder = run.folder(stage)
    if stage == "profile":
        return found.profile, [tables.profile_table(found.profile)]
    if stage == "select":
        sites = describe_plan(run.path)["sites"]
        return found.select, [tables.selection_table(found.select), tables.plan_map(sites, width)]
    if stage == "sample":
        settings = run.recipe.sample
        document = {"folder": str(folder), "sequences": settings.sequences, "length": settings.length}
        return document, [Text(f"{settings.sequences} sequences of {settings.length} tokens in {folder}")]
    if stage == "distill":
        return {"arms": found.logs}, [tables.training_table(found.logs)]
    checked = run.manifest()["metrics"].get("export") if run.recipe.export.verify else None
    return {"checkpoint": str(folder), "verified": checked}, [_verified(checked)]


def _verified(checked: Any) -> Text:
    if not checked:
        return Text("Written; export.verify is off, so it was not loaded again.")
    worst = max(way["logits_error"] for way in checked.values())
    return Text(
        f"Loaded again in {len(checked)} clean processes: logits differ by at most {worst:.1e}, tokens are equal."
    )


def places(run: Run) -> Text:
    """Where everything lies, and how to load the checkpoint."""
    pairs: list[tuple[str, object]] = [("report", run.path / "report.html")]
    if run.plan.exists():
        pairs.append(("plan", run.plan))
    if run.is_done("export"):
        folder = run.folder("export")
        load = f'AutoModelForCausalLM.from_pretrained("{folder}"'
        pairs += [
            ("checkpoint", folder),
            ("load it", f"{load}, trust_remote_code=True)"),
            ("or", f"import attnconvert; {load})"),
        ]
    return tables.lines(pairs)
