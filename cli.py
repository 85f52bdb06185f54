"""The command line: parse, call, print. torch and transformers are imported only when a command needs them."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.text import Text

from .convert.checkpoint_commands import add_checkpoint_commands
from .convert.errors import UsageError
from .convert.failures import EXIT_CODES
from .convert.guard import guarded
from .convert.keys import STAGES
from .convert.look_commands import add_inspect
from .convert.operator_commands import operators_app
from .convert.options import (
    Amounts,
    AsJson,
    Out,
    Quiet,
    RunFolder,
    Set,
    Sizes,
    Target,
    Verbose,
    budget_overrides,
    command,
    parse_lengths,
)
from .convert.recipe_commands import recipes_app
from .convert.terminal import Terminal
from .kernels.spec import BACKENDS

if TYPE_CHECKING:
    from .convert.recipe import AnyRecipe
    from .convert.runs import Run

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
app.add_typer(recipes_app, name="recipes")
app.add_typer(operators_app, name="operators")


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


# --- the stages -------------------------------------------------------------------------------------------------------


@command(app, "run")
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


@command(app, "profile")
def profile(
    target: Target,
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
    _one_stage(_run_of(target, out, settings).path, "profile", terminal)


@command(app, "costs")
def costs(
    target: Target,
    lengths: Annotated[
        str | None,
        typer.Option(help="Tokens, with commas; else those that the recipe speaks of.", show_default=False),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences at once; else as measured before, or 1.", show_default=False)
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Samples of each, at least; the median counts.")] = 3,
    out: Out = None,
    settings: Set = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Time every candidate operator on this machine, at your lengths: what budgets in milliseconds are counted by.

    The table stays in the run, with the name of the machine. What was not timed is filled in by a model of FLOPs, bytes
    and launches (marked ≈), and the last lines say how far that model is from the clock.

    [dim]Example:[/dim] attnconvert costs runs/demo --lengths 2048,8192,32768
    """
    from .convert.costs import costs_document, costs_table

    terminal = Terminal(as_json=as_json, verbose=verbose, quiet=quiet)
    run = _run_of(target, out, settings)
    wanted = parse_lengths(lengths) if lengths else []
    found = _pipeline().Work(run, terminal.track).costs(wanted, batch, repeats, again=True)
    terminal.result(costs_document(found), costs_table(found))


@command(app, "select")
def select(
    run: RunFolder,
    prefill_ms: Annotated[Amounts, typer.Option(metavar="AMOUNT@LENGTH", help="Most time of a prefill.")] = None,
    decode_ms: Annotated[Amounts, typer.Option(metavar="AMOUNT@LENGTH", help="Most time of a decoded token.")] = None,
    kv_bytes: Annotated[Amounts, typer.Option(metavar="AMOUNT@LENGTH", help="Most bytes of cache.")] = None,
    flops: Annotated[Amounts, typer.Option(metavar="AMOUNT@LENGTH", help="Most FLOPs of attention.")] = None,
    keep_quality: Annotated[
        float | None,
        typer.Option(metavar="KL", help="The cheapest plan whose measured KL is at most this.", show_default=False),
    ] = None,
    explain: Annotated[
        str | None,
        typer.Option(metavar="L17H3", help="Say why a head, KV group (L17G1) or layer got its operator."),
    ] = None,
    check: Annotated[
        Path | None, typer.Option(metavar="PLAN", help="Say what is wrong with a plan for this model.")
    ] = None,
    settings: Set = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Choose an operator for every KV group, under the budgets of the recipe or those given here.

    An amount is a number (ms, bytes, FLOPs) or a share of the original's, at a length: [b]--kv-bytes 40%@8192[/b].
    Budgets given here take the place of the recipe's. The plan is RUN/plan.yaml, which you may edit before the next
    stage; --check says whether it still fits.

    [dim]Example:[/dim] attnconvert select runs/demo --prefill-ms 50%@8192 --kv-bytes 30%@32768
    """
    terminal = Terminal(as_json=as_json, verbose=verbose, quiet=quiet)
    if check is not None:
        if explain or settings or keep_quality is not None or any((prefill_ms, decode_ms, kv_bytes, flops)):
            raise UsageError("--check looks at a plan alone: leave budgets, --explain and --set away")
        _check_plan(run, check, terminal)
        return
    amounts = {"prefill_ms": prefill_ms, "decode_ms": decode_ms, "kv_bytes": kv_bytes, "flops": flops}
    changed = [*budget_overrides(amounts, keep_quality), *(settings or ())]
    if explain is not None:
        if changed:
            raise UsageError("--explain tells of the plan that is there: leave budgets and --set away")
        _explain(run, explain, terminal)
        return
    if changed:
        _run_again(run, changed)
    _one_stage(run, "select", terminal)


@command(app, "sample")
def sample(run: RunFolder, as_json: AsJson = False, verbose: Verbose = False, quiet: Quiet = False) -> None:
    """Let the teacher write the sequences that the student is trained on.

    They are kept in shards; a finished shard is never made again.

    [dim]Example:[/dim] attnconvert sample runs/demo
    """
    _one_stage(run, "sample", Terminal(as_json=as_json, verbose=verbose, quiet=quiet))


@command(app, "distill")
def distill(run: RunFolder, as_json: AsJson = False, verbose: Verbose = False, quiet: Quiet = False) -> None:
    """Train the converted model to behave as the original one does.

    First the operators' own parameters, then adapters; an interrupted training continues at its last checkpoint.

    [dim]Example:[/dim] attnconvert distill runs/demo
    """
    _one_stage(run, "distill", Terminal(as_json=as_json, verbose=verbose, quiet=quiet))


@command(app, "evaluate")
def evaluate(run: RunFolder, as_json: AsJson = False, verbose: Verbose = False, quiet: Quiet = False) -> None:
    """Compare student and teacher: KL, perplexity, retrieval, memory and speed, and the gates of the recipe.

    Where the run has an exported checkpoint, everything is measured again on that, loaded as any user would. A missed
    gate is exit code 4.

    [dim]Example:[/dim] attnconvert evaluate runs/demo --json
    """
    from .convert.evaluation import require_gates
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
    require_gates(document)


def _run_of(target: str, out: Path | None, settings: list[str] | None) -> Run:
    """The run that a target names, or a new one of the model or recipe that it names."""
    from .convert.defaults import recipe_for
    from .convert.runs import Run, is_run

    if is_run(Path(target)):
        if out is not None or settings:
            raise UsageError(f"{target} is a run, which has its recipe and its place: leave --out and --set away")
        return Run.open(Path(target))
    loaded = recipe_for(target, settings or ())
    return Run.create(loaded, out or Path("runs") / loaded.name)


def _run_again(folder: Path, changed: Sequence[str]) -> None:
    """The run goes on with other settings."""
    from .convert.recipe import load_recipe
    from .convert.runs import Run

    run = _open(folder)
    recipe = load_recipe(str(run.path / "recipe.yaml"), changed)
    _pipeline().check_selection(run, recipe.select)
    Run.create(recipe, folder)


def _check_plan(folder: Path, plan: Path, terminal: Terminal) -> None:
    from .convert.plan import check_plan

    problems, notes = check_plan(plan, _pipeline().measured_profile(_open(folder)).sites)
    if problems:
        raise UsageError("\n".join(str(problem) for problem in problems))
    told = [Text(f"{plan}: fits this model"), *(Text(f"note: {note}", style="dim") for note in notes)]
    terminal.result({"plan": str(plan), "problems": [], "notes": notes}, *told)


def _explain(folder: Path, where: str, terminal: Terminal) -> None:
    from .convert.explain import explain
    from .convert.plan import read_plan

    run, pipeline = _open(folder), _pipeline()
    arm = pipeline.selection_of(run)
    lines = explain(pipeline.measured_profile(run), arm, read_plan(run.plan), where)
    terminal.result({"where": where, "lines": lines}, *map(Text, lines))


def _run(recipe: AnyRecipe, folder: Path, until: str, terminal: Terminal) -> None:
    from .convert.evaluation import require_gates
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
    require_gates(document)


def _one_stage(folder: Path, stage: str, terminal: Terminal) -> None:
    from .convert.outcomes import outcome

    run = _open(folder)
    pipeline = _pipeline()
    pipeline.run_one(pipeline.Work(run, terminal.track), stage)
    terminal.result(*outcome(run, stage, terminal.out.width))


def _all_stages(run: Run, terminal: Terminal) -> None:
    pipeline = _pipeline()
    pipeline.run_stages(pipeline.Work(run, terminal.track))


def _foresee(recipe: AnyRecipe, folder: Path, until: str, terminal: Terminal) -> None:
    from .convert.outcomes import foreseen

    terminal.result(*foreseen(recipe, folder, until, terminal.track))


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


@command(app, "bench")
def bench(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="An exported checkpoint, or a run.", show_default=False)
    ],
    lengths: Annotated[
        str | None, typer.Option(help="Prefill lengths in tokens, with commas; else 2048,8192.", show_default=False)
    ] = None,
    sizes: Sizes = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repeats; the median counts.")] = 3,
    decode_tokens: Annotated[int, typer.Option(min=0, help="Tokens decoded after each prefill.")] = 16,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Time a converted checkpoint against itself with full attention, side by side on this machine.

    Of an image or video model a step is timed at several sizes: [b]--sizes 64x64,128x128[/b].

    [dim]Example:[/dim] attnconvert bench runs/demo --lengths 2048,8192,32768 --repeats 5
    """
    from .convert.look_commands import bench_result, bench_wanted

    terminal = Terminal(as_json=as_json, verbose=verbose, quiet=quiet)
    checkpoint, numbers, shapes = bench_wanted(folder, lengths, sizes)
    from .convert.exported import bench as timed  # and with it torch

    found = timed(checkpoint, numbers, shapes, repeats, decode_tokens, terminal.track)
    terminal.result(found, *bench_result(found))


add_inspect(app)
add_checkpoint_commands(app, _one_stage, _run_again, _all_stages)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The entry point: runs a command, tells errors in one line, and exits with the code of their kind."""
    guarded(app, arguments)
