"""The stages in order: each reads its inputs from the run, calls one function and writes what it returns."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .convert import evaluation
from .convert.budgets import refuse_budgets
from .convert.card import attachments, model_card
from .convert.costs import Costs
from .convert.damage import Group, Joint, marginal_damage
from .convert.errors import UsageError
from .convert.evaluation import headline
from .convert.export_formats import Export, Written, write_checkpoint
from .convert.exported import load_exported
from .convert.files import read_json, stored, write_json
from .convert.fronts import front
from .convert.hosts.models import is_encoder
from .convert.hosts.sites import all_full
from .convert.keys import STAGES
from .convert.machine import hardware
from .convert.observation import Table
from .convert.passages import Passages
from .convert.plan import Plan, read_plan, write_plan
from .convert.profiling import Profile
from .convert.refinement import refine
from .convert.report import write_report
from .convert.selection import Selection, needs_model, require_profile, select
from .convert.sources import refuse_overlap
from .convert.text import Needles
from .distill import measuring
from .distill.loop import ADAPTER, distill
from .distill.samples import keep_texts, prompts, read_samples, sample
from .distill.work import COSTS, STUDENT, Work, described, identity
from .kernels.spec import Spec

if TYPE_CHECKING:
    from .convert.recipe import SelectSettings
    from .convert.runs import Run

log = logging.getLogger("attnconvert")
PROFILE, SELECT, EVALUATION, EXPORTED = "profile.json", "select.json", "evaluation.json", "exported.json"
FRONT = "front.json"


def profile_stage(work: Work) -> None:
    """profile/profile.json"""
    with work.run.stage("profile") as folder:
        found = measuring.measure(
            work.model,
            work.sites,
            work.profile_samples,
            work.profile_cases,
            work.recipe.profile,
            retrieval=work.retrieval_tasks(),
            learned=work.learned,
            folder=folder,
            track=work.track,
            data={"identity": identity(work.run), **work.profile_data()},
        )
        write_json(folder / PROFILE, found.to_json())


def select_stage(work: Work) -> None:
    """plan.yaml for the student, select/<arm>.yaml for the others, select/select.json for all"""
    with work.run.stage("select") as folder:
        measured = measured_profile(work.run)
        require_profile(measured, identity(work.run), work.recipe.profile.candidates)
        arms: dict[str, Any] = {}
        plans: dict[str, Plan] = {}
        wanted = {STUDENT: work.recipe.select} | {arm.name: arm.select for arm in work.recipe.compare}
        costs = work.costs() if any(map(in_time, wanted.values())) else None
        for name, settings in wanted.items():
            chosen, history = choose(work, measured, settings, folder, costs if in_time(settings) else None)
            plans[name] = chosen.plan
            arms[name] = chosen.to_json() | ({"refinement": history} if history else {})
            write_plan(work.run.plan if name == STUDENT else folder / f"{name}.yaml", chosen.plan, chosen.reasons)
        try:
            write_json(
                folder / FRONT,
                front(measured, work.recipe.select, costs if in_time(work.recipe.select) else None, chosen=plans),
            )
        except UsageError as error:
            log.info("no front: %s", error)
        write_json(folder / SELECT, {"schema": 1, "arms": arms})


def in_time(settings: SelectSettings) -> bool:
    """Whether a budget is in milliseconds."""
    return any(resource.endswith("_ms") for resource in settings.budgets or ())


def choose(
    work: Work, measured: Profile, settings: SelectSettings, folder: Path, costs: Costs | None = None
) -> tuple[Selection, list[dict[str, Any]]]:
    """The plan of one arm; the model is loaded only where whole plans must be measured."""
    model = measured.data["model"]
    if not needs_model(settings):
        return select(measured, settings, model, costs=costs), []
    task, learned = work.profile_cases.first(settings.measure_cases), work.learned
    place = folder / f"measured-{len(task)}"
    measure = Joint(work.model, work.sites, task, learned, place, work.track)
    if not settings.rounds:
        return select(measured, settings, model, costs=costs, measure=measure), []

    def marginal(around: Mapping[Group, Spec]) -> dict[str, Table]:
        names = measured.candidates
        return marginal_damage(work.model, work.sites, task, names, learned, around, place, work.track)

    return refine(measured, settings, model, costs=costs, measure=measure, marginal=marginal)


def sample_stage(work: Work) -> None:
    """samples/shard-….parquet"""
    with work.run.stage("sample") as folder:
        if work.recipe.kind == "images":
            from .distill.image_samples import sample_images

            sample_images(work.images, work.sites, work.of_images.sample, folder)
            return
        settings = work.of_text.sample
        if is_encoder(work.model):
            texts = work.sequences(work.calibration, settings.sequences, settings.length, settings.seed)
            keep_texts(texts, settings, folder)
            return
        starts = prompts(work.tokenizer, work.calibration, settings)
        sample(work.model, work.sites, starts, settings, folder, work.track)


def distill_stage(work: Work) -> None:
    """distill/<arm>/ for every arm that is trained"""
    with work.run.stage("distill"):
        plans = work.plans()
        trained = {arm: folder for arm in plans if (folder := work.trained(arm)) is not None}
        if not trained:
            return
        for arm, folder in trained.items():
            log.info("distilling %s", arm)
            plan = plans[arm].for_sites(work.sites)
            if work.recipe.kind == "images":
                from .distill.image_samples import read_images
                from .distill.image_training import distill_images

                kept = read_images(work.run.folder("sample"), work.of_images.sample)
                distill_images(work.images, plan, kept, work.of_images.distill, folder)
            else:
                samples = read_samples(work.run.folder("sample"), work.of_text.sample)
                distill(work.model, plan, samples, work.of_text.distill, folder, work.track)


def evaluate_stage(work: Work) -> None:
    """evaluation/evaluation.json: every arm against the teacher; arms that are measured are kept, one file each"""
    with work.run.stage("evaluate") as folder:
        write_json(folder / EVALUATION, _evaluate(work, list(work.plans()), work.student, folder))
    work.run.record(metrics=headline(read_json(folder / EVALUATION)))


def _evaluate(work: Work, arms: Sequence[str], load: Callable[[str], Any], kept: Path | None) -> dict[str, Any]:
    if work.recipe.kind == "images":
        from .distill.image_stages import evaluate_images

        return evaluate_images(work, arms, load, kept, STUDENT)
    settings, gates = work.of_text.evaluate, work.of_text.gates
    refuse_overlap(work.calibration, work.heldout)
    task = work.cases(settings.needles, work.heldout, settings.seed)
    lengths = sorted({*settings.lengths, *(settings.speed.lengths if settings.speed else ()), *gates.kv_ratio})
    element = work.model.dtype.itemsize

    def once(name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return dict(measure() if kept is None else stored(kept / f"{name}.json", measure))

    def retrieved(model: Any, title: str) -> dict[str, float]:
        if isinstance(task, Passages):
            return evaluation.search(model, task, work.track, title)
        assert isinstance(task, Needles)
        return evaluation.retrieval(model, task, settings.batch, work.track, title)

    def measure_teacher() -> dict[str, Any]:
        return {"retrieval": retrieved(work.model, "teacher: retrieval"), "quality": {}}

    def measure(arm: str) -> dict[str, Any]:
        student = load(arm)
        quality = {}
        for length in settings.lengths:
            ids = work.sequences(work.heldout, settings.sequences, length, settings.seed)
            judge = evaluation.encoding if isinstance(task, Passages) else evaluation.quality
            title = f"{arm}: quality at {length}"
            quality[str(length)] = judge(work.model, student, ids, settings.batch, work.track, title)
        return {"quality": quality, "retrieval": retrieved(student, f"{arm}: retrieval")}

    plans = work.plans()
    teacher = once("teacher", measure_teacher)
    full = all_full(work.sites)
    dense = {n: evaluation.costs(full, n, element) for n in lengths}
    cached = [n for n in lengths if dense[n]["kv_bytes"]]  # an encoder has none
    teacher["kv_bytes"] = {str(n): dense[n]["kv_bytes"] for n in cached}
    result: dict[str, Any] = {}
    for arm in arms:
        plan = plans[arm].for_sites(work.sites)
        costs = {n: evaluation.costs(plan, n, element) for n in lengths}
        entry = once(f"arm-{arm}", lambda arm=arm: measure(arm))  # type: ignore[misc]
        for length, quality in entry["quality"].items():
            if "teacher_perplexity" in quality:
                teacher["quality"][length] = {"perplexity": quality["teacher_perplexity"]}
        result[arm] = entry | {
            "retrieval_drop": teacher["retrieval"]["exact"] - entry["retrieval"]["exact"],
            "kv_bytes": {str(n): costs[n]["kv_bytes"] for n in cached},
            "kv_ratio": {str(n): costs[n]["kv_bytes"] / dense[n]["kv_bytes"] for n in cached},
            "flops_ratio": {str(n): costs[n]["flops"] / dense[n]["flops"] for n in lengths},
            "converted": plans[arm].converted,
            "operators": plans[arm].counts(),
            "trained": work.trained(arm) is not None,
        }
    document: dict[str, Any] = {
        "schema": 1,
        "machine": hardware(),
        "data": {"text": described(work.heldout), **settings.model_dump(mode="json")},
        "arms": {"teacher": teacher, **result},
        "speed": {},
    }
    if settings.speed is not None and STUDENT in arms:
        timing = settings.speed

        def measure_speed() -> dict[str, Any]:
            pair = (work.model, load(STUDENT))
            return evaluation.speed(*pair, timing.lengths, timing.repeats, timing.decode_tokens, work.track)

        document["speed"] = once("speed", measure_speed)
    document["gates"] = evaluation.check_gates(gates, document)
    return document


def export_stage(work: Work) -> None:
    """export/: the checkpoint, loaded again in two clean processes before the stage counts as done"""
    with work.run.stage("export") as folder:
        student = work.student(STUDENT)
        plan = read_plan(work.run.plan).for_sites(work.sites)
        if work.recipe.kind == "images":
            from .convert.card_images import image_card
            from .convert.export_images import export_images, verify_images, whole_pipeline

            where, part = work.files.pipeline, work.files.folder.name
            card = image_card(
                work.recipe,
                work.run.manifest(),
                type(student).__name__,
                evaluation_of(work.run),
                part if whole_pipeline(where, part) else None,
            )
            made = attachments(work.recipe, work.run.manifest(), work.run.plan)
            export_images(student, plan, folder, card, work.recipe.export.dtype, where, part, made)
            if work.recipe.export.verify:
                work.run.record(metrics={"export": verify_images(student, folder)})
            return
        settings, trained = work.of_text.export, work.trained(STUDENT)
        given = Export(
            student=student,
            tokenizer=work.tokenizer,
            plan=plan,
            source=work.recipe.model,
            files=work.files,
            adapter=trained / ADAPTER if trained and (trained / ADAPTER).exists() else None,
            dtype=settings.dtype,
            attached=attachments(work.recipe, work.run.manifest(), work.run.plan),
        )

        def described_as(written: Written) -> str:
            told = work.run.manifest(), type(student).__name__, evaluation_of(work.run)
            return model_card(work.of_text, *told, written.form, written.serving)

        written = write_checkpoint(given, folder, described_as, settings.format, settings.verify)
        work.run.record(metrics={"export": written.verified, "export_format": written.to_json()})


RUNNERS: dict[str, Callable[[Work], None]] = {
    "profile": profile_stage,
    "select": select_stage,
    "sample": sample_stage,
    "distill": distill_stage,
    "evaluate": evaluate_stage,
    "export": export_stage,
}
assert tuple(RUNNERS) == STAGES


def run_stages(work: Work, until: str = "export") -> list[str]:
    """Run what is not done yet, up to and including `until`; returns those that ran. The report is written anew."""
    ran = []
    stages = STAGES[: STAGES.index(until) + 1]
    if "evaluate" in stages and not work.run.is_done("evaluate"):
        work.check_heldout()
    for stage in stages:
        if work.run.is_done(stage):
            log.info("%s is done already", stage)
            continue
        if work.run.stale(stage):
            log.info("%s runs again: what it depends on has changed", stage)
        log.info("%s", stage)
        RUNNERS[stage](work)
        write_report(work.run.path)
        ran.append(stage)
    return ran


def run_one(work: Work, stage: str) -> None:
    """Run one stage whose inputs are there.

    Raises:
        UsageError: an earlier stage is not done.
    """
    missing = work.run.unfinished(stage)
    if missing:
        raise UsageError(
            f"{stage} needs {', '.join(missing)} first: run `attnconvert {missing[0]} {work.run.path}`, "
            f"or `attnconvert run` for everything"
        )
    if not work.run.is_done(stage):
        RUNNERS[stage](work)
        write_report(work.run.path)
    else:
        log.info("%s is done already", stage)


def check_selection(run: Run, settings: SelectSettings) -> None:
    """Raises what `select` would say of these settings, as far as that is known without the model: before anything of
    the run is given up for them."""
    profiled, timed = run.folder("profile") / PROFILE, run.path / "costs" / COSTS
    if profiled.exists():
        refuse_budgets(measured_profile(run), settings)
    if not profiled.exists() or settings.method == "restore" or (in_time(settings) and not timed.exists()):
        return
    measured = measured_profile(run)
    costs = Costs.from_json(read_json(timed)) if in_time(settings) else None
    select(measured, settings.model_copy(update={"keep_quality": None}), measured.data["model"], costs=costs)


def measured_profile(run: Run) -> Profile:
    """The profile of a run."""
    return Profile.from_json(read_json(run.folder("profile") / PROFILE))


def selection_of(run: Run, arm: str = STUDENT) -> dict[str, Any]:
    """What select.json says of an arm."""
    found: dict[str, Any] = read_json(run.folder("select") / SELECT)["arms"][arm]
    return found


def evaluation_of(run: Run) -> dict[str, Any]:
    """evaluation.json of a run, held against the bounds that its recipe has now: they may change."""
    path = run.folder("evaluate") / EVALUATION
    document: dict[str, Any] = read_json(path)
    if run.recipe.kind == "images":
        from .convert.evaluation_images import check_image_gates

        gates = check_image_gates(run.recipe.gates, document)
    else:
        gates = _gates_of_text(run, document)
    if gates != document["gates"]:
        document["gates"] = gates
        write_json(path, document)
        write_report(run.path)
    return document


def _gates_of_text(run: Run, document: Mapping[str, Any]) -> list[dict[str, Any]]:
    assert run.recipe.kind == "text"
    unknown = [n for n in run.recipe.gates.kv_ratio if str(n) not in document["arms"][STUDENT]["kv_ratio"]]
    sites = measured_profile(run).sites if unknown else ()
    if any(site.causal for site in sites):
        plan = read_plan(run.plan).for_sites(sites)
        full = all_full(sites)
        element = 4 if run.recipe.model.dtype == "float32" else 2
        for n in unknown:
            share = evaluation.costs(plan, n, element)["kv_bytes"] / evaluation.costs(full, n, element)["kv_bytes"]
            document["arms"][STUDENT]["kv_ratio"][str(n)] = share
    return evaluation.check_gates(run.recipe.gates, document)


def evaluate_exported(work: Work) -> dict[str, Any]:
    """The figures again, from the exported checkpoint instead of the training artefacts."""
    folder = work.run.folder("export")
    student = load_exported(folder, work.track)
    document = _evaluate(work, [STUDENT], lambda arm: student, None)
    document["from"] = str(folder)
    write_json(work.run.folder("evaluate") / EXPORTED, document)
    return document
