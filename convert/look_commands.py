"""The commands that look: `inspect`, and what `bench` is asked for and shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from .errors import UsageError
from .options import AsJson, Quiet, Verbose, command, parse_lengths
from .terminal import Terminal

LENGTHS, SIZES = "2048,8192", "64x64,128x128"


def bench_wanted(folder: Path, lengths: str | None, sizes: str | None) -> tuple[Path, list[int], list[tuple[int, ...]]]:
    """The checkpoint that is meant, and at which lengths or sizes of latents it is timed.

    Raises:
        UsageError: it is no checkpoint, or the numbers are not of its kind.
    """
    from .checkpoints import is_denoiser
    from .inspection import exported_folder, sizes_of

    given = [parse_lengths(lengths)] if lengths is not None else []
    checkpoint = exported_folder(folder)
    if is_denoiser(checkpoint):
        if given:
            raise UsageError(f"{checkpoint} is an image or video model: give --sizes, such as --sizes {SIZES}")
        return checkpoint, [], sizes_of(checkpoint, sizes)
    return checkpoint, given[0] if given else parse_lengths(LENGTHS), sizes_of(checkpoint, sizes)


def bench_result(found: Mapping[str, Any]) -> list[Any]:
    """What is shown of a bench: the table, of an image model where it is slower, and the circumstances."""
    from .tables import pace, speed_table, steps_table

    machine = found["machine"]
    told = ", ".join([machine["cpu"], f"{machine['cores']} cores", *machine["gpu"], f"{found['dtype']}, batch 1"])
    images = found.get("kind") == "images"
    shown = [steps_table(found), *pace(found)] if images else [speed_table(found["speed"])]
    prompt = f", a prompt of {found['prompt']} tokens, no guidance" if images else ""
    return [*shown, Text(f"{found['checkpoint']} on {told}{prompt}.", style="dim")]


def add_inspect(app: typer.Typer) -> None:
    """Registers the command `inspect`."""
    command(app, "inspect")(inspect)


def inspect(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|DIR",
            help="A model (folder, file.gguf, hub id, package:name==version:file), an exported checkpoint or a run.",
            show_default=False,
        ),
    ],
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Show the attention of a model and what could replace it, or the plan of a converted one.

    A model that cannot be converted is refused with the reason, and exit code 2.

    [dim]Example:[/dim] attnconvert inspect runs/demo/export
    """
    from . import inspection, runs, tables
    from .checkpoints import is_exported
    from .wording import IMAGES, TEXT

    terminal = Terminal(as_json=as_json, verbose=verbose, quiet=quiet)
    folder = Path(target)
    is_run = runs.is_run(folder)
    if not is_run and not is_exported(folder):
        terminal.result(*_model(target, terminal))
        return
    stages = inspection.stage_states(runs.Run.open(folder)) if is_run else []
    shown: list[Any] = [tables.stages_table(stages)] if is_run else []
    if is_run and not (folder / "plan.yaml").exists():
        terminal.result({"folder": target, "stages": stages}, *shown, Text("No plan yet."))
        return
    found = inspection.describe_plan(folder) | ({"stages": stages} if is_run else {})
    words = IMAGES if found["images"] else TEXT
    shown += [tables.lines(tables.plan_facts(found)), tables.plan_map(found["sites"], terminal.out.width, words)]
    if found["evaluation"]:
        shown += tables.evaluation_parts(found["evaluation"])
    terminal.result(found, *shown)


def _model(target: str, terminal: Terminal) -> tuple[Any, ...]:
    """What is shown of a model as it came."""
    from . import inspection, tables
    from .sources import parse_model_argument

    found = inspection.describe_model(parse_model_argument(target), terminal.track)
    size = f"{found['parameters'] / 1e6:,.1f} million parameters"
    names = [site["name"] for site in (found["sites"][0], found["sites"][-1])]
    what = "heads" if found["sites"][0]["grid"] else "KV groups"
    told = f"{found['model']}: {found['class']}, {size}, {found['dtype']}, {found['groups']} {what}"
    return found, Text(told), tables.sites_table(found["sites"]), Text(" … ".join(names), style="dim")
