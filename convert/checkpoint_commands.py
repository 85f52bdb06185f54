"""The commands about what comes out: `export`, `push`, `diff` and `reproduce`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from .errors import GateMissed, UsageError
from .options import AsJson, Quiet, Set, Verbose, command
from .terminal import Terminal

if TYPE_CHECKING:
    from .runs import Run

FORMATS = ("auto", "stock", "remote", "adapter")
DTYPES = ("float32", "bfloat16", "float16")
Checkpoint = Annotated[
    Path, typer.Argument(metavar="DIR", help="An exported checkpoint, or a run that has one.", show_default=False)
]


def add_checkpoint_commands(
    app: typer.Typer,
    one_stage: Callable[[Path, str, Terminal], None],
    run_again: Callable[[Path, Sequence[str]], None],
    all_stages: Callable[[Run, Terminal], None],
) -> None:
    """Registers the commands.

    Args:
        one_stage: runs a stage of a run and shows it; run_again: gives a run other settings; all_stages: runs what is
            not done of a run. They are the caller's, who knows the pipeline.
    """

    def export(
        target: Annotated[
            str, typer.Argument(metavar="RUN|MODEL", help="A run; or with --plan a model.", show_default=False)
        ],
        form: Annotated[
            str | None,
            typer.Option(
                "--format", metavar="FORMAT", help=f"One of {', '.join(FORMATS)}; else as the recipe says, or auto."
            ),
        ] = None,
        plan: Annotated[
            Path | None,
            typer.Option(metavar="PLAN", help="Convert a model by this plan, without a run.", show_default=False),
        ] = None,
        out: Annotated[
            Path | None, typer.Option(metavar="DIR", help="With --plan: where the checkpoint goes.", show_default=False)
        ] = None,
        dtype: Annotated[
            str | None,
            typer.Option(
                metavar="DTYPE", help=f"With --plan: one of {', '.join(DTYPES)}; else as stored.", show_default=False
            ),
        ] = None,
        as_json: AsJson = False,
        verbose: Verbose = False,
        quiet: Quiet = False,
    ) -> None:
        """Write the checkpoint that from_pretrained loads, and prove it by loading it in clean processes.

        As [b]stock[/b] it has no custom code, as [b]remote[/b] it brings its own, as [b]adapter[/b] it stands beside
        its base model; [b]auto[/b] takes the most portable that is exact. With --plan any model that has attention
        sites is converted by a plan file, without profile and distillation.

        [dim]Example:[/dim] attnconvert export path/to/model --plan plan.yaml --out converted
        """
        terminal = Terminal(as_json=as_json, verbose=verbose, quiet=quiet)
        _one_of("--format", form, FORMATS)
        _one_of("--dtype", dtype, DTYPES)
        if plan is not None:
            if out is None:
                raise UsageError("--plan needs --out: say where the checkpoint goes")
            terminal.result(*_export_model(target, plan, out, form or "auto", dtype, terminal))
            return
        if out is not None or dtype is not None:
            raise UsageError("--out and --dtype go with --plan: a run has its place, and export.dtype in its recipe")
        if form is not None:
            _refuse_early(Path(target), form)
            run_again(Path(target), [f"export.format={form}"])
        one_stage(Path(target), "export", terminal)

    def reproduce(
        manifest: Annotated[
            Path, typer.Argument(metavar="MANIFEST", help="manifest.json of a run or checkpoint.", show_default=False)
        ],
        out: Annotated[
            Path | None,
            typer.Option(
                "--out", metavar="DIR", help="The new run; else runs/<recipe name>-again.", show_default=False
            ),
        ] = None,
        settings: Set = None,
        as_json: AsJson = False,
        verbose: Verbose = False,
        quiet: Quiet = False,
    ) -> None:
        """Run the recipe of a manifest again, and say whether the same came of it.

        The result is bit-identical (plan, samples, what was learned and exported weights have the same hashes), equal
        to tolerance (the same plan, and figures within rounding), or different, which is exit code 4. What differs in
        the environment is told beside it. A checkpoint's recipe names local models and texts without their folders: say
        with --set where they are.

        [dim]Example:[/dim] attnconvert reproduce runs/demo/manifest.json --out runs/demo-again
        """
        from .reproducing import DIFFERENT, read_before
        from .reproducing import reproduce as again

        terminal = Terminal(as_json=as_json, verbose=verbose, quiet=quiet)
        before = read_before(manifest, settings or ())
        folder = out or Path("runs") / f"{before.recipe.name}-again"
        first = (manifest if manifest.is_dir() else manifest.parent).resolve()
        if folder.resolve() in (first, *first.parents):  # the run itself, or the one that the checkpoint lies in
            raise UsageError(f"{folder} is the run that is to be reproduced: use another --out")

        found = again(before, folder, lambda run: all_stages(run, terminal))
        terminal.result(found, *_reproduced(found))
        if found["result"] == DIFFERENT:
            raise GateMissed(f"{folder} is not what {manifest} tells of: `attnconvert diff` says what differs")

    command(app, "export")(export)
    command(app, "push")(push)
    command(app, "diff")(diff)
    command(app, "reproduce")(reproduce)


def _refuse_early(folder: Path, form: str) -> None:
    """What can be told of a format before the export that is there is given up for it."""
    from .runs import Run

    run = Run.open(folder)
    if run.recipe.kind == "images" and form in ("stock", "adapter"):
        raise UsageError(f"{folder} is of an image or video model, which is exported with its code: take remote")
    measured = run.folder("profile") / "profile.json"
    if form != "stock" or not run.plan.exists() or not measured.exists():
        return
    from .export_stock import require_windows
    from .files import read_json
    from .plan import read_plan
    from .profiling import Profile

    profile = Profile.from_json(read_json(measured))
    require_windows(profile.data["model"], read_plan(run.plan).for_sites(profile.sites))


def _one_of(option: str, given: str | None, known: tuple[str, ...]) -> None:
    if given is not None and given not in known:
        raise UsageError(f"{option} {given}: give one of {', '.join(known)}")


def _export_model(
    target: str, plan: Path, out: Path, form: str, dtype: str | None, terminal: Terminal
) -> tuple[Any, ...]:
    """The document and what is shown of it."""
    from . import tables
    from .export_model import export_model
    from .outcomes import loading, verified
    from .sources import parse_model_argument

    source = parse_model_argument(target)
    written = export_model(source, plan, out, form, dtype, track=terminal.track)
    document = {"checkpoint": str(out), **written.to_json(), "verified": written.verified}
    told = Text(f"Exported as {written.form}: {written.why}.")
    images = (out / "model_index.json").is_file() or written.why.endswith("image and video models")
    return document, told, verified(written.verified), tables.lines(loading(out, images))


def push(
    folder: Checkpoint,
    repository: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the hub.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private if it is new.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be uploaded.")] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="The branch, made if need be; else main.", show_default=False)
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Upload an exported checkpoint to the Hugging Face hub, in one commit.

    Its files are first compared with SHA256SUMS: one that has changed since the export is refused. HF_TOKEN says who
    pushes. A model card that you have rewritten goes as it is.

    [dim]Example:[/dim] attnconvert push runs/demo owner/my-model --dry-run
    """
    from .hub import contents
    from .hub import push as upload
    from .inspection import exported_folder
    from .report_html import size

    terminal = Terminal(as_json=as_json, verbose=verbose, quiet=quiet)
    checkpoint = exported_folder(folder)
    found = (
        contents(checkpoint)
        if dry_run
        else upload(checkpoint, repository, private=private, revision=revision, track=terminal.track)
    )
    document = {"repository": repository, "revision": revision or "main", "dry_run": dry_run, **found}
    table = Table("file", "size", box=None)
    for name, count in found["files"].items():
        table.add_row(name, size(count))
    total = f"{len(found['files'])} files, {size(found['bytes'])}, {found['form']}"
    told = f"Would push {total} to {repository}." if dry_run else f"Pushed {total} to {found['url']}."
    card = ", ".join(f"{key}: {_short(value)}" for key, value in found["card"].items())
    notes = [Text(f"note: {note}", style="dim") for note in found["notes"]]
    terminal.result(document, *([table] if dry_run else []), Text(f"card: {card}"), *notes, Text(told))


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} entries" if any(isinstance(x, dict) for x in value) else " ".join(map(str, value))
    return str(value)


Compared = Annotated[Path, typer.Argument(help="A run or an exported checkpoint.", show_default=False)]


def diff(a: Compared, b: Compared, as_json: AsJson = False, verbose: Verbose = False, quiet: Quiet = False) -> None:
    """Compare two runs or checkpoints: recipe, plan by group, figures, weights by tensor and versions.

    [dim]Example:[/dim] attnconvert diff runs/demo runs/mine
    """
    from .comparing import compare, read_side

    terminal = Terminal(as_json=as_json, verbose=verbose, quiet=quiet)
    found = compare(read_side(a), read_side(b))
    terminal.result(found, *_differences(found))


def _differences(found: Mapping[str, Any]) -> list[Any]:
    """What a person is shown of a comparison."""
    shown: list[Any] = []
    for title, rows in (("recipe", found["recipe"]), ("versions", found["versions"]), ("figures", found["figures"])):
        if rows:
            table = Table(title, "a", "b", box=None)
            for key, (first, second) in rows.items():
                table.add_row(key, *("–" if value is None else _figure(value) for value in (first, second)))
            shown.append(table)
    plan, weights = found["plan"], found["weights"]
    moves = ", ".join(f"{m['groups']} from {m['from']} to {m['to']}" for m in plan["changes"])
    shown.append(Text(f"plan: {plan['changed']} of {plan['groups']} groups differ{': ' + moves if moves else ''}"))
    if any(weights.values()):
        different = weights["different"]
        names = f" ({', '.join(different[:3])}{', …' if len(different) > 3 else ''})" if different else ""
        alone = f"; {len(weights['only_a'])} only in a, {len(weights['only_b'])} only in b"
        shown.append(Text(f"weights: {weights['equal']} tensors equal, {len(different)} different{names}{alone}"))
    same = "the same" if found["same"] else "not the same"
    return [*shown, Text(f"{found['a']} and {found['b']} are {same} conversion.")]


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _reproduced(found: Mapping[str, Any]) -> list[Any]:
    table = Table("stage", "hashes that are equal", box=None)
    for stage, entry in found["stages"].items():
        table.add_row(stage, f"{entry['equal']} of {entry['files']}")
    shown: list[Any] = [table]
    apart = {name: entry for name, entry in found["figures"].items() if not entry["equal"]}
    if apart:
        figures = Table("figure", "then", "now", "", box=None)
        for name, entry in apart.items():
            now = "–" if entry["now"] is None else _figure(entry["now"])
            figures.add_row(name, _figure(entry["then"]), now, "near" if entry["near"] else "apart")
        shown.append(figures)
    rows = found["environment"]
    shown += [Text(f"{row['what']}: {row['then']} then, {row['now']} now ({row['grade']})") for row in rows]
    return [*shown, Text(f"The result is {found['result']}.")]
