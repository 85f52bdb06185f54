"""The command line: parse, call, print. torch and transformers are imported only when a command needs them."""

from __future__ import annotations

import difflib
import gc
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from .convert.errors import Interrupted, UsageError
from .convert.failures import EXIT_CODES, TERMINATED, told
from .convert.keys import STAGES
from .convert.terminal import Terminal
from .kernels.spec import BACKENDS

if TYPE_CHECKING:
    from .convert.recipe import Recipe
    from .convert.runs import Run

Function = TypeVar("Function", bound=Callable[..., None])
CODES = "[b]Exit codes[/b]\n\n" + "\n\n".join(f"{code}  {meaning}" for code, meaning in EXIT_CODES.items())

app = typer.Typer(
    help="""Convert the attention of pretrained transformers to cheaper operators, and prove what was kept.

    Start with [b]attnconvert run smollm2-135m-window[/b], or look at your own model with
    [b]attnconvert inspect MODEL[/b] and [b]attnconvert profile MODEL[/b].""",
    epilog=CODES,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(help="The recipes that are shipped, and checks of your own.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")


@app.callback()
def _everywhere(
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            envvar="ATTNCONVERT_BACKEND",
            show_envvar=True,
            help="Kernels: auto, triton, cpp or torch. One that is named runs or fails; auto says what it chose.",
            show_default=False,
        ),
    ] = None,
) -> None:
    if backend is None:
        return
    if backend not in BACKENDS:
        raise UsageError(f"no backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    os.environ["ATTNCONVERT_BACKEND"] = backend  # the processes that export starts take it over


def _command(group: typer.Typer, name: str) -> Callable[[Function], Function]:
    """Registers a command; each paragraph of its docstring becomes one line, which the terminal may break anew."""

    def register(function: Function) -> Function:
        paragraphs = cleandoc(function.__doc__ or "").split("\n\n")
        function.__doc__ = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
        return group.command(name)(function)

    return register


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document; everything else goes to stderr.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show the libraries' messages and full tracebacks.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only warnings and the result.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run.", show_default=False)]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="The run directory; else runs/<recipe name>.", show_default=False),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a setting, such as sample.sequences=16. Repeatable.",
        show_default=False,
    ),
]


# --- the stages -------------------------------------------------------------------------------------------------------


@_command(app, "run")
def run_command(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file or a shipped name.", show_default=False)],
    out: Out = None,
    until: Annotated[str, typer.Option(metavar="STAGE", help=f"Stop after one of {', '.join(STAGES)}.")] = STAGES[-1],
    settings: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what is done, what would run, and why.")] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Convert a model from end to end: profile, select, sample, distill, evaluate, export.

    What is finished is not done again, so the same command continues after any interruption. At the end it shows what
    was gained and lost, and ends with exit code 4 if a gate of the recipe is missed.

    [dim]Example:[/dim] attnconvert run smollm2-135m-window --out runs/demo --set sample.sequences=16
    """
    from .convert.recipe import load_recipe

    _known_stage(until)
    terminal = Terminal(as_json=as_json, verbose=verbose, quiet=quiet)
    loaded = load_recipe(recipe, settings or ())
    folder = out or Path("runs") / loaded.name
    if dry_run:
        _foresee(loaded, folder, until, terminal)
    else:
        _run(loaded, folder, until, terminal)


@_command(app, "profile")
def profile(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|RECIPE|RUN",
            help="A model (folder, file.gguf, hub id owner/name, package:name==version:file), a recipe or a run.",
            show_default=False,
        ),
    ],
    out: Out = None,
    settings: Set = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Measure what every attention head does, and what each candidate operator would cost in its place.

    For a model without a recipe, the defaults are used with public-domain speeches as text; the run that it begins can
    be carried on with the other commands.

    [dim]Example:[/dim] attnconvert profile HuggingFaceTB/SmolLM2-135M-Instruct --set model.dtype=float32
    """
    terminal = Terminal(as_json=as_json, verbose=verbose, quiet=quiet)
    if Path(target, "recipe.yaml").is_file():
        if out is not None or settings:
            raise UsageError(f"{target} is a run, which has its recipe and its place: leave --out and --set away")
        _one_stage(Path(target), "profile", terminal)
        return
    from .convert.defaults import recipe_for

    loaded = recipe_for(target, settings or ())
    _run(loaded, out or Path("runs") / loaded.name, "profile", terminal)


@_command(app, "select")
def select(run: RunFolder, as_json: AsJson = False, verbose: Verbose = False, quiet: Quiet = False) -> None:
    """Choose an operator for every KV group, under the budget of the recipe.

    The plan is RUN/plan.yaml, which you may edit before the next stage.

    [dim]Example:[/dim] attnconvert select runs/demo
    """
    _one_stage(run, "select", Terminal(as_json=as_json, verbose=verbose, quiet=quiet))


@_command(app, "sample")
def sample(run: RunFolder, as_json: AsJson = False, verbose: Verbose = False, quiet: Quiet = False) -> None:
    """Let the teacher write the sequences that the student is trained on.

    They are kept in shards; a finished shard is never made again.

    [dim]Example:[/dim] attnconvert sample runs/demo
    """
    _one_stage(run, "sample", Terminal(as_json=as_json, verbose=verbose, quiet=quiet))


@_command(app, "distill")
def distill(run: RunFolder, as_json: AsJson = False, verbose: Verbose = False, quiet: Quiet = False) -> None:
    """Train the converted model to behave as the original one does.

    First the operators' own parameters, then adapters; an interrupted training continues at its last checkpoint.

    [dim]Example:[/dim] attnconvert distill runs/demo
    """
    _one_stage(run, "distill", Terminal(as_json=as_json, verbose=verbose, quiet=quiet))


@_command(app, "evaluate")
def evaluate(run: RunFolder, as_json: AsJson = False, verbose: Verbose = False, quiet: Quiet = False) -> None:
    """Compare student and teacher: KL, perplexity, retrieval, memory and speed, and the gates of the recipe.

    Where the run has an exported checkpoint, everything is measured again on that, loaded as any user would. A missed
    gate is exit code 4.

    [dim]Example:[/dim] attnconvert evaluate runs/demo --json
    """
    from .convert.tables import evaluation_parts

    terminal = Terminal(as_json=as_json, verbose=verbose, quiet=quiet)
    opened = _open(run)
    pipeline = _pipeline()
    work = pipeline.Work(opened, terminal.track)
    if work.run.is_done("export"):
        terminal.note(f"measuring {work.run.folder('export')} again")
        document = pipeline.evaluate_exported(work)
    else:
        pipeline.run_one(work, "evaluate")
        document = pipeline.evaluation_of(work.run)
    terminal.result(document, *evaluation_parts(document))
    pipeline.require_gates(document)


@_command(app, "export")
def export(run: RunFolder, as_json: AsJson = False, verbose: Verbose = False, quiet: Quiet = False) -> None:
    """Write the checkpoint that from_pretrained loads, and prove it by loading it in clean processes.

    [dim]Example:[/dim] attnconvert export runs/demo
    """
    _one_stage(run, "export", Terminal(as_json=as_json, verbose=verbose, quiet=quiet))


def _run(recipe: Recipe, folder: Path, until: str, terminal: Terminal) -> None:
    from .convert.outcomes import outcome, summary
    from .convert.runs import Run

    run = Run.create(recipe, folder)
    pipeline = _pipeline()
    ran = pipeline.run_stages(pipeline.Work(run, terminal.track), until)
    if STAGES.index(until) < STAGES.index("evaluate"):
        terminal.result(*outcome(run, until, terminal.out.width))
        return
    document = pipeline.evaluation_of(run)
    terminal.result(*summary(run, ran, document))
    pipeline.require_gates(document)


def _one_stage(folder: Path, stage: str, terminal: Terminal) -> None:
    from .convert.outcomes import outcome

    run = _open(folder)
    pipeline = _pipeline()
    pipeline.run_one(pipeline.Work(run, terminal.track), stage)
    terminal.result(*outcome(run, stage, terminal.out.width))


def _foresee(recipe: Recipe, folder: Path, until: str, terminal: Terminal) -> None:
    from .convert.inspection import stage_states
    from .convert.runs import Run
    from .convert.tables import stages_table

    run = Run.foresee(recipe, folder)
    before = Run.open(folder).recipe if (folder / "recipe.yaml").is_file() else None
    rows = stage_states(run, until, before)
    where = Text(f"{recipe.name} in {folder}{'' if before else ' (new)'}")
    terminal.result({"run": str(folder), "recipe": recipe.name, "stages": rows}, where, stages_table(rows))


def _known_stage(stage: str) -> None:
    if stage not in STAGES:
        close = difflib.get_close_matches(stage, STAGES, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UsageError(f"--until: no stage {stage!r}; {hint}stages are {', '.join(STAGES)}")


def _open(folder: Path) -> Run:
    from .convert.runs import Run

    return Run.open(folder)


def _pipeline() -> Any:
    """The pipeline, and with it torch and transformers, made quiet."""
    from . import pipeline

    return pipeline


# --- looking ----------------------------------------------------------------------------------------------------------


@_command(app, "bench")
def bench(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="An exported checkpoint, or a run.", show_default=False)
    ],
    lengths: Annotated[str, typer.Option(help="Prefill lengths in tokens, with commas.")] = "2048,8192",
    repeats: Annotated[int, typer.Option(min=1, help="Timed repeats; the median counts.")] = 3,
    decode_tokens: Annotated[int, typer.Option(min=0, help="Tokens decoded after each prefill.")] = 16,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Time a converted checkpoint against itself with full attention, side by side on this machine.

    [dim]Example:[/dim] attnconvert bench runs/demo --lengths 2048,8192,32768 --repeats 5
    """
    from .convert.inspection import exported_folder

    terminal = Terminal(as_json=as_json, verbose=verbose, quiet=quiet)
    numbers = [int(part) if part.strip().isdecimal() else 0 for part in lengths.split(",")]
    if min(numbers) < 8:
        raise UsageError(f"--lengths {lengths}: give whole numbers of at least 8, such as 2048,8192")
    checkpoint = exported_folder(folder)
    found = _pipeline().bench(checkpoint, numbers, repeats, decode_tokens, terminal.track)
    from .convert.tables import speed_table

    machine = found["machine"]
    told = ", ".join([machine["cpu"], f"{machine['cores']} cores", *machine["gpu"], f"{found['dtype']}, batch 1"])
    terminal.result(found, speed_table(found["speed"]), Text(f"{checkpoint} on {told}.", style="dim"))


@_command(app, "inspect")
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
    from .convert import inspection, tables

    terminal = Terminal(as_json=as_json, verbose=verbose, quiet=quiet)
    folder = Path(target)
    is_run = (folder / "recipe.yaml").is_file()
    if not is_run and not inspection.is_exported(folder):
        from .convert.sources import parse_model_argument

        found = inspection.describe_model(parse_model_argument(target), terminal.track)
        size = f"{found['parameters'] / 1e6:,.1f} million parameters"
        names = [site["name"] for site in (found["sites"][0], found["sites"][-1])]
        told = f"{found['model']}: {found['class']}, {size}, {found['dtype']}, {found['groups']} KV groups"
        terminal.result(found, Text(told), tables.sites_table(found["sites"]), Text(" … ".join(names), style="dim"))
        return
    stages = inspection.stage_states(_open(folder)) if is_run else []
    shown: list[Any] = [tables.stages_table(stages)] if is_run else []
    if is_run and not (folder / "plan.yaml").exists():
        terminal.result({"folder": target, "stages": stages}, *shown, Text("No plan yet."))
        return
    found = inspection.describe_plan(folder) | ({"stages": stages} if is_run else {})
    shown += [tables.lines(tables.plan_facts(found)), tables.plan_map(found["sites"], terminal.out.width)]
    if found["evaluation"]:
        shown += tables.evaluation_parts(found["evaluation"])
    terminal.result(found, *shown)


# --- recipes ----------------------------------------------------------------------------------------------------------


@_command(recipes_app, "ls")
def recipes_ls(as_json: AsJson = False) -> None:
    """List the shipped recipes.

    [dim]Example:[/dim] attnconvert recipes ls
    """
    from .convert.recipe import shipped_recipes
    from .convert.tables import lines

    found = shipped_recipes()
    Terminal(as_json=as_json).result(found, lines(found.items()))


@_command(recipes_app, "show")
def recipes_show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped recipe.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Print a shipped recipe, to be saved and changed.

    [dim]Example:[/dim] attnconvert recipes show smollm2-135m-window > mine.yaml
    """
    from .convert.recipe import load_recipe, recipe_text

    text = recipe_text(name)
    Terminal(as_json=as_json).result(
        load_recipe(name).model_dump(mode="json") if as_json else None, Text(text.rstrip(), no_wrap=True)
    )


@_command(recipes_app, "validate")
def recipes_validate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Recipes to check.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Check recipes: every error of every file, as file:line:column; exit code 2 if there is any.

    [dim]Example:[/dim] attnconvert recipes validate mine.yaml
    """
    from .convert.recipe import load_recipe

    errors: dict[str, list[str]] = {}
    for file in files:
        try:
            load_recipe(file)
            errors[str(file)] = []
        except UsageError as error:
            errors[str(file)] = str(error).splitlines()
    told = [problem for problems in errors.values() for problem in problems]
    good = [Text(f"{name}: valid") for name, problems in errors.items() if not problems]
    terminal = Terminal(as_json=as_json)
    terminal.result(errors, Text("\n").join(good) if good else None)
    if told:
        raise UsageError("\n".join(told))


@_command(recipes_app, "schema")
def recipes_schema(as_json: AsJson = False) -> None:
    """Print the JSON Schema of recipes, for editors; it is JSON with and without --json.

    [dim]Example:[/dim] attnconvert recipes schema > recipe.schema.json
    """
    from .convert.recipe import json_schema

    Terminal(as_json=True).result(json_schema())


# --- exit codes -------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The entry point: runs a command, tells errors in one line, and exits with the code of their kind."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        with warnings.catch_warnings():
            code = _guarded(given)
    finally:
        signal.signal(signal.SIGTERM, before)
    sys.exit(code)


def _terminate(number: int, frame: Any) -> NoReturn:
    sys.exit(TERMINATED)


def _guarded(given: list[str]) -> int:
    traced = bool({"--verbose", "-v"} & set(given)) or bool(os.environ.get("ATTNCONVERT_DEBUG"))
    goes_on = "; the same command continues" if {"run", *STAGES} & set(given[:3]) else ""
    try:
        code = app(given, prog_name="attnconvert", standalone_mode=False)
        if code != Interrupted.exit_code:  # what newer typers make of Ctrl-C
            return code if isinstance(code, int) else 0
        message = f"interrupted{goes_on}"
    except (KeyboardInterrupt, typer.Abort):
        code, message = Interrupted.exit_code, f"interrupted{goes_on}"
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
        if code != TERMINATED:
            return code
        message = f"terminated{goes_on}"
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        code, message = told(error)
        if traced and code == 1:
            traceback.print_exc()
    gc.collect()  # a loop that was left in the middle may live on in a cycle, and with it its progress bar
    console = Console(stderr=True, highlight=False)
    console.show_cursor()
    if message:
        console.print(Text(message), soft_wrap=True)
    return int(code)
