"""What a person sees of an image or video model: the report, the terminal's tables, the card; all from plain data."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_report import Page, read, words_of

from attnconvert.convert import files, tables
from attnconvert.convert.card_images import image_card, image_figures
from attnconvert.convert.errors import UsageError
from attnconvert.convert.evaluation_images import check_image_gates
from attnconvert.convert.explain import explain
from attnconvert.convert.keys import STAGES
from attnconvert.convert.look_commands import bench_wanted
from attnconvert.convert.options import parse_sizes
from attnconvert.convert.outcomes import outcome, places, summary
from attnconvert.convert.plan import read_plan
from attnconvert.convert.plots_images import objectives, over_bands, steps
from attnconvert.convert.profiling import Profile
from attnconvert.convert.recipe import parse_recipe
from attnconvert.convert.recipe_images import ImageGates, ImageRecipe
from attnconvert.convert.report import write_report
from attnconvert.convert.report_bands import _part
from attnconvert.convert.report_grid_masks import thumbnail
from attnconvert.convert.report_images import conclusions, gate_name
from attnconvert.convert.runs import Run
from attnconvert.convert.wording import IMAGES, TEXT, of_sites
from attnconvert.kernels.masks import Layout
from attnconvert.kernels.spec import Agent, Disc, Full, Linear, Sla, Sparse, Tiles, Timed, label, spec_to_dict

RECIPE = """
name: tiny-flux
description: A <small> denoiser
model: {hub: someone/tiny-flux, subfolder: transformer, dtype: bfloat16}
images: {size: [32, 32], steps: 14, guidance: 2.0, conditions: /secret/place/conditions.safetensors}
profile:
  candidates:
    - {operator: disc, radius: 2}
    - {operator: sla, keep: 0.25, block: 32}
    - {operator: linear}
evaluate: {speed: {sizes: [[32, 32], [64, 64], [128, 128]]}}
compare:
  - {name: random, select: {method: random, groups: 1.0}, distill: false}
gates: {velocity_error: 0.02, psnr: 20, right_class: 0.9, frechet_rise: 5, step_speedup: {128x128: 1.5}, converted: 0.5}
"""
SPECS = {label(spec): spec for spec in (Disc(radius=2), Sla(keep=0.25, block=32), Linear(), Timed(late=Disc(radius=2)))}
DISC, SLA, LINEAR, TIMED = SPECS
LAYERS, HEADS = 4, 2
BANDS = ("1 of 3", "2 of 3", "3 of 3")
CHOSEN = {"blocks.0": [DISC, "full"], "blocks.1": [SLA, LINEAR], "blocks.2": [TIMED, DISC], "blocks.3": [DISC, DISC]}


def site(layer: int) -> dict[str, Any]:
    own = {"name": f"blocks.{layer}", "layer": layer, "heads": HEADS, "kv_heads": HEADS, "dim": 16, "limit": None}
    return {**own, "causal": False, "axes": 2, "down": 1, "text": "first", "head_dim": 16}


def per_head(scale: float) -> list[list[float]]:
    return [[scale * (1 + layer) * (1 + head) for head in range(HEADS)] for layer in range(LAYERS)]


def profile() -> dict[str, Any]:
    candidates = [DISC, SLA, LINEAR]
    errors = {name: per_head(0.01 * (1 + n)) for n, name in enumerate(candidates)}
    bands = {  # noisiest last, as they come
        band: {
            "statistics": {"density_90": per_head(0.1 / (n + 1)), "local_mass": per_head(0.12)},
            "output_error": {name: per_head(0.01 * (1 + k) * 10.0**-n) for k, name in enumerate(candidates)},
        }
        for n, band in reversed(list(enumerate(BANDS)))
    }
    zero = [[0.0] * HEADS] * LAYERS
    damage = {
        name: {"kl": per_head(0.001 * (1 + n)), "needle": zero, "needle_error": zero} for n, name in enumerate(errors)
    }
    return {
        "schema": 3,
        "sites": [site(layer) for layer in range(LAYERS)],
        "candidates": {name: spec_to_dict(SPECS[name]) for name in candidates},
        "statistics": {"entropy": per_head(0.5), "local_mass": per_head(0.1), "density_90": per_head(0.1)},
        "output_error": errors,
        "output_change": errors,
        "mass_lost": {DISC: per_head(0.05), LINEAR: [[None] * HEADS] * LAYERS},
        "first_order": errors,
        "first_order_needle": {},
        "influence": None,
        "damage": damage,
        "curves": {"block": 64, "fractions": [0.25, 0.5], "recall": [[[0.4, 0.8]] * HEADS] * LAYERS},
        "similarity": [[1.0 if a == b else 0.5 for b in range(LAYERS)] for a in range(LAYERS)],
        "bands": bands,
        "gates": {},
        "problems": [],
        "teacher": {},
        "data": {"model": "FluxTransformer2DModel", "element": 4, "grid": [16, 16], "text": 4, "size": [32, 32]},
        "seconds": 1.0,
    }


def arm(error: float, right: float, **more: Any) -> dict[str, Any]:
    quality = {
        "velocity_error": error,
        "bands": {band: error * (3 - n) / 2 for n, band in enumerate(BANDS)},
        "states": 64,
        "psnr": 20 - 100 * error,
        "ssim": 0.9,
        "perceptual": 0.1,
        "right_class": right,
        "frechet": 12.4 + 200 * error,
    }
    return {
        "quality": quality,
        "flops_ratio": 0.4,
        "converted": 0.875,
        "operators": {"full": 1, DISC: 4, SLA: 1, LINEAR: 1, TIMED: 1},
        "trained": True,
        **more,
    }


def timed(tokens: int, teacher: float, student: float) -> dict[str, Any]:
    both = {"teacher": (teacher, 4e6), "student": (student, 3e6)}
    entries = {name: {"step_s": t, "peak_bytes": round(b * tokens / 256)} for name, (t, b) in both.items()}
    return {"tokens": tokens, "repeats": 3, **entries, "speedup": teacher / student}


def evaluation(**arms: Any) -> dict[str, Any]:
    document: dict[str, Any] = {
        "schema": 1,
        "kind": "images",
        "machine": {"cpu": "A processor", "cores": 8, "gpu": []},
        "data": {"samples": 200, "states": 64, "seed": 1, "size": [32, 32], "steps": 14, "guidance": 2.0},
        "arms": {
            "teacher": {"quality": {"right_class": 1.0, "frechet": 12.4}},
            "student": arm(0.01, 0.985),
            **arms,
        },
        # as JSON sorts them, not as sizes do
        "speed": {"128x128": timed(4096, 4.0, 1.6), "32x32": timed(256, 0.03, 0.04), "64x64": timed(1024, 0.3, 0.2)},
        "break_even": {"tokens": 431, "told": "faster from about 431 image tokens on"},
    }
    return document | {"gates": check_image_gates(recipe().gates, document)}


def recipe() -> ImageRecipe:
    found = parse_recipe(RECIPE, "recipe.yaml")
    assert found.kind == "images"
    return found


def run_until(folder: Path, last: str) -> Run:
    """A run that has come as far as `last`, with what the stages leave."""
    run = Run.create(recipe(), folder)
    reasons = {name: ["converted: it costs velocity error 0.001", "kept full: <dear>"] for name in CHOSEN}
    chosen = {"method": "damage", "converted": 0.875, "groups": 8, "predicted": {"kl": 0.03, "needle": 0.0}}
    cost = {"resource": "groups", "length": 0, "limit": 0.0, "used": 0.0, "original": 8}
    chosen |= {"reasons": reasons, "costs": {"groups": cost}, "loss": 0.03, "bound": 0.03, "gap": 0.0, "how": "proof"}
    chosen |= {"operators": {DISC: 4, "full": 1}}
    for name in STAGES[: STAGES.index(last) + 1]:
        with run.stage(name) as place:
            if name == "profile":
                files.write_json(place / "profile.json", profile())
            if name == "select":
                arms = {"student": chosen, "random": {**chosen, "method": "random"}}
                files.write_json(place / "select.json", {"schema": 1, "arms": arms})
                operators = {name: spec_to_dict(spec) for name, spec in SPECS.items()}
                files.write_json(
                    run.plan,
                    {"attnconvert": 1, "model": "FluxTransformer2DModel", "operators": operators, "sites": CHOSEN},
                )
                point = {"budget": 0.5, "cost": 0.5, "loss": 0.03, "converted": 0.5}
                front = {"front": [point, {**point, "cost": 0.9, "loss": 0.001}], "others": {"uniform": [point]}}
                known = {"resource": "flops", "length": 256, "method": "damage", "needle_weight": 1.0}
                left = {"moa": "needs profile.influence", "duo": "needs gates"}
                files.write_json(place / "front.json", {**front, **known, "left_out": left, "chosen": {}})
            if name == "distill":
                lines = [
                    {"phase": "training", "step": n, "loss": 0.3, "velocity": 0.2, "feature": 0.1, "seconds": 1.0}
                    for n in range(20)
                ]
                files.write_text(place / "student" / "log.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
            if name == "evaluate":
                from PIL import Image

                random = arm(0.05, 0.7, trained=False)
                files.write_json(place / "evaluation.json", evaluation(random=random))
                Image.new("RGB", (300, 90), "navy").save(place / "images.png")
    run.record(model={"name": "someone/tiny-flux", "sha256": {"model.safetensors": "ab12"}})
    return run


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda handle: None)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a finished run."""
    return write_report(run_until(tmp_path_factory.mktemp("images"), "export").path)


def told(*parts: Any) -> str:
    """What a terminal of 100 columns shows, without line breaks."""
    console = Console(width=100, record=True, force_terminal=False, file=io.StringIO())
    for part in parts:
        console.print(part)
    return re.sub(r"\s+", " ", console.export_text())


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_of_a_denoiser_has_its_own_sections_and_nothing_of_text(shown: Path) -> None:
    page = read(shown)
    assert page.sections == [
        "What was chosen, and why",
        "How good the choice is",
        "Before and after",
        "Time and memory",
        "What the profile measured",
        "Training",
        "How it was made",
        "Recipe",
    ]
    words = page.words.partition("With every default filled in")[0] + " ".join(page.titles)
    for foreign in (r"\bKL\b", "needle", "Needle", "perplexity", "Perplexity", "KV ", "nats", "etrieval", "MoA"):
        assert not re.search(foreign, words), re.findall(f".{{30}}{foreign}.{{30}}", words)[:3]


@pytest.mark.parametrize("last", ["profile", "select", "distill"])
def test_a_run_on_its_way_has_a_report_too(tmp_path: Path, last: str) -> None:
    page = read(write_report(run_until(tmp_path, last).path))
    assert "Not evaluated yet." in page.words
    assert "Before and after" not in page.sections
    assert ("What was chosen, and why" in page.sections) == (last != "profile")


def test_the_top_says_what_was_gained_paid_and_missed(shown: Path) -> None:
    words = words_of(shown)
    assert "✗ 1 of 6 gates missed: PSNR to the teacher's images, dB is 19.00, at least 20." in words
    assert "Speed of a step 2.50× 4.00 s → 1.60 s at 128×128, 4,096 image tokens" in words
    assert "Peak memory 0.75×" in words
    assert "Attention FLOPs 0.40× at 32×32" in words
    assert "Converted 88 % 7 of 8 heads" in words
    assert "Velocity error 0.0100" in words
    assert "Right class 98.5 % 100.0 % before 200 images" in words
    assert "Fréchet distance +2.00 12.4 → 14.4" in words
    assert "speed-up of a step at 128×128 at least 1.5 2.500 ✓ passed" in words


def test_a_size_at_which_it_is_slower_is_a_warning_at_the_top_and_at_the_times(shown: Path) -> None:
    words = words_of(shown)
    warning = "Slower than the original at 32×32 (0.75× the speed). It is faster from about 431 image tokens on."
    assert words.count(warning) == 2
    assert words.index(warning) < words.index("What was chosen, and why")
    assert '<b class="bad">0.75×</b>' in shown.read_text(encoding="utf-8")


def test_one_that_is_faster_everywhere_is_said_to_be(tmp_path: Path) -> None:
    run = run_until(tmp_path, "export")
    document = evaluation()
    del document["speed"]["32x32"]
    document["break_even"] = {"tokens": 1024, "told": "faster at every size that was timed, from 64x64 on"}
    files.write_json(run.folder("evaluate") / "evaluation.json", document)
    words = words_of(write_report(run.path))
    assert "Slower" not in words
    assert "Faster at every size that was timed, from 64×64 on." in words


def test_sizes_stand_in_the_order_of_their_tokens(shown: Path) -> None:
    words = words_of(shown).partition("Time and memory ")[2]
    places = [words.index(f"{size} {count} ") for size, count in (("32×32", "256"), ("64×64", "1,024"))]
    assert places == sorted(places)
    assert places[1] < words.index("128×128 4,096 4.00 s 1.60 s 2.50× 61.0 MiB 45.8 MiB 0.75×")


def test_the_sheet_of_images_is_within_the_page(shown: Path) -> None:
    links = read(shown).links
    assert [link[:22] for link in links] == ["data:image/png;base64,"]
    (shown.parent / "evaluation" / "images.png").write_bytes(b"no picture")
    assert read(write_report(shown.parent)).links == []


def test_a_wide_sheet_is_made_smaller_before_it_is_embedded(tmp_path: Path) -> None:
    from PIL import Image

    from attnconvert.convert.report_images import WIDEST, _embedded

    Image.new("RGB", (WIDEST + 400, 240), "navy").save(tmp_path / "wide.png")
    data, width, height = _embedded(tmp_path / "wide.png")
    assert (width, height) == (WIDEST, 200)
    assert data.startswith(b"\x89PNG")


def test_each_part_of_the_steps_has_its_maps_on_one_scale(shown: Path) -> None:
    words = words_of(shown)
    assert words.index(f"{DISC}: output error, 1 of 3") < words.index(f"{DISC}: output error, 3 of 3")
    plots = {entry.name for entry in (shown.parent / "report").iterdir()}
    assert {f"error-{DISC}-band-{n}.svg" for n in (1, 2, 3)} | {"profile-bands.png", "bands.svg"} <= plots
    ends = [
        re.findall(r">([\d.≤ ]+)</text>", (shown.parent / "report" / f"error-{DISC}-band-{n}.svg").read_text())
        for n in (1, 3)
    ]
    assert ends[0][0].removeprefix("≤ ") == ends[1][0].removeprefix("≤ ")
    assert {"steps.svg", "masks.svg", "tradeoff.png", "objectives.svg", "loss.svg"} <= plots
    assert not {name for name in plots if "needle" in name or "prefill" in name or "retrieval" in name}


def test_hovering_a_head_tells_its_velocity_error(shown: Path) -> None:
    titles = read(shown).titles
    first = next(title for title in titles if title.startswith(f"layer 0, head 0: {DISC}"))
    assert f"{DISC} costs velocity error 0.00100" in first
    kept = next(title for title in titles if title.startswith("layer 0, head 1: full"))
    assert f"{SLA} would cost velocity error 0.00400" in kept


def test_arms_are_compared_in_words(shown: Path) -> None:
    text = conclusions(evaluation(random=arm(0.05, 0.7, trained=False)))
    assert "At equal work (0.40× of the attention FLOPs) the student is better than <code>random</code>" in text
    assert "velocity error 0.0100 against 0.0500" in text
    assert "right class 98.5 % against 70.0 %" in text
    assert "was not trained" in text
    near = conclusions(evaluation(twin=arm(0.01, 0.98, flops_ratio=0.8)))
    assert "<code>twin</code> computes more (0.80× of the attention FLOPs, the student 0.40×), and" in near
    assert "there is no clear difference" in near


def test_gates_have_names_that_people_read() -> None:
    for name in ImageGates.model_fields:
        assert gate_name(name) != name
        assert "_" not in gate_name(name)
    assert gate_name("step_speedup@64x128") == "speed-up of a step at 64×128"


# --- masks ------------------------------------------------------------------------------------------------------------


def area(runs: Any) -> int:
    return sum(end - first for _, first, end in runs)


def test_thumbnails_show_the_blocks_that_the_kernels_are_given() -> None:
    from attnconvert.kernels import grid_masks, lowering

    layout = Layout(grid=(16, 16), text_first=4)
    spec = Disc(radius=2)
    drawn = thumbnail("disc-2", spec, layout, "cpu")
    stored, block = grid_masks.arranged(spec, layout, "cpu")
    dense = lowering.dense(grid_masks.mask(spec, layout), stored)[0]
    assert (drawn.rows, drawn.count) == (-(-260 // block[0]), -(-260 // block[1]))
    some = {
        (r, c)
        for r in range(drawn.rows)
        for c in range(drawn.count)
        if dense[r * block[0] : (r + 1) * block[0], c * block[1] : (c + 1) * block[1]].any()
    }
    assert area(drawn.full) + area(drawn.partial) == len(some)
    assert f"{100 * len(some) / (drawn.rows * drawn.count):.0f} % of the blocks" in drawn.words[0]
    assert f"{100 * float(dense.float().mean()):.1f} % of the pairs" == drawn.words[1]


def test_every_operator_of_a_grid_has_a_thumbnail() -> None:
    layout = Layout(grid=(16, 16), text_last=4)
    assert area(thumbnail("full", Full(), layout, "cpu").full) == 25
    assert area(thumbnail("tiles", Tiles(window=(1,), tile=(8,)), layout, "cuda").full) > 0
    pooled = thumbnail("disc", Disc(radius=2, pool=4), layout, "cpu")
    assert pooled.words[-1] == "and 16 averaged keys"
    sparse = thumbnail("sparse", Sparse(keep=0.25, block=32), layout, "cpu")
    assert sparse.count == 9  # the last holds the text: it reads all and is read by all, the others 2 of 8 besides
    assert area(sparse.full) == 9 + 8 * (1 + 2)
    assert area(sparse.rest) == 0
    sla = thumbnail("sla", Sla(keep=0.25, block=32), layout, "cpu")
    assert area(sla.full) + area(sla.rest) == 81
    assert (
        "10 agents read all,"
        in thumbnail("agent", Agent(agents=(2, 3)), Layout(grid=(8, 8), text_first=4), "cpu").words
    )
    assert area(thumbnail("linear", Linear(), layout, "cpu").rest) == 25


def test_large_grids_are_drawn_in_larger_blocks() -> None:
    drawn = thumbnail("disc", Disc(radius=2), Layout(grid=(96, 96)), "cpu")
    assert drawn.rows <= 128
    assert drawn.count <= 128


def test_an_operator_by_time_shows_both_of_its_own(shown: Path) -> None:
    picture = (shown.parent / "report" / "masks.svg").read_text(encoding="utf-8")
    assert "early: full" in picture
    assert f"late: {DISC}" in picture
    assert "at times below 0.8" in picture


# --- plots ------------------------------------------------------------------------------------------------------------


def test_plots_without_enough_points_are_left_out() -> None:
    assert steps([timed(256, 1.0, 1.0)], None) is None
    assert over_bands(["1 of 1"], {"error": {"student": [0.1]}}) is None
    assert over_bands(BANDS, {"error": {"student": [None, None, None]}}) is None
    assert objectives({"velocity": [(0, 1.0), (1, 0.5)]}) is None
    plot = steps([timed(256, 1.0, 1.0), timed(1024, 4.0, 2.0)], 400)
    assert plot is not None
    assert "peak memory of a step, MiB" in plot.svg


def test_quantiles_are_those_of_numpy() -> None:
    import numpy as np

    values = [3.0, 1.0, 7.0, 2.0]
    assert [_part(values, q) for q in (0.1, 0.5, 0.9)] == pytest.approx(np.quantile(values, [0.1, 0.5, 0.9]).tolist())


# --- the terminal -----------------------------------------------------------------------------------------------------


def test_words_follow_the_sites() -> None:
    assert of_sites(profile()["sites"]) is IMAGES
    assert of_sites([{"name": "layers.0"}]) is TEXT


def test_the_tables_of_the_stages_speak_of_denoisers(tmp_path: Path) -> None:
    run = run_until(tmp_path, "evaluate")
    words = told(*outcome(run, "profile", 100)[1:])
    assert "summed over the heads of a layer: velocity error" in words
    assert "1 of 3 (noise) 2 of 3 3 of 3" in words
    assert "needle" not in words
    assert "nats" not in words
    words = told(*outcome(run, "select", 100)[1:])
    assert "predicted velocity error" in re.sub(r"arm method heads converted ", "", words)
    assert "head 0 " in words
    document, *parts = summary(run, [], evaluation())
    assert document["evaluation"]["kind"] == "images"
    words = told(*parts)
    assert "Slower than the original at 32x32 (0.75× the speed)." in words
    assert "A step is faster from about 431 image tokens on." in words
    assert "step_speedup @ 128x128 ≥ 1.5 2.50 pass" in words
    assert "psnr ≥ 20 19.0 MISS" in words
    assert "KL" not in words


def test_a_head_is_explained_by_its_velocity_error(tmp_path: Path) -> None:
    run = run_until(tmp_path, "select")
    chosen = json.loads((run.folder("select") / "select.json").read_text())["arms"]["student"]
    lines = explain(Profile.from_json(profile()), chosen, read_plan(run.plan), "L1H1")
    assert lines[0] == f"layer 1, head 1: converted to {LINEAR}"
    words = " ".join(lines)
    assert f"{DISC}: alone it costs velocity error 0.00400" in words
    assert "the single damages add up to velocity error 0.0300" in words
    assert not re.search("KL|needle|first tokens", words)


def test_a_bench_is_shown_with_its_slower_sizes_and_where_it_breaks_even() -> None:
    words = told(tables.steps_table(evaluation()), *tables.pace(evaluation()))
    assert words.index("32x32 256 a step 30.0 ms 40.0 ms 0.75× the speed") < words.index("128x128 4,096")
    assert "peak memory 3.8 MiB 2.9 MiB 0.75× the bytes" in words
    assert "Slower than the original at 32x32" in words


def test_sizes_are_read_and_wrong_ones_told() -> None:
    assert parse_sizes("64x64, 13x60x90") == [(64, 64), (13, 60, 90)]
    for wrong in ("64", "64x", "axb", "0x64", "1x2x3x4", ""):
        with pytest.raises(UsageError, match="--sizes"):
            parse_sizes(wrong)


def test_a_bench_takes_lengths_of_text_and_sizes_of_images(tmp_path: Path) -> None:
    for kind, config in (("text", {}), ("images", {"_class_name": "ConvertedFlux"})):
        (tmp_path / kind).mkdir()
        files.write_json(tmp_path / kind / "config.json", {"attnconvert": {"format": 1}, **config})
    assert bench_wanted(tmp_path / "text", None, None)[1:] == ([2048, 8192], [])
    assert bench_wanted(tmp_path / "images", None, "32x48")[1:] == ([], [(32, 48)])
    assert bench_wanted(tmp_path / "images", None, None)[1:] == ([], [(64, 64), (128, 128)])
    with pytest.raises(UsageError, match="give --sizes"):
        bench_wanted(tmp_path / "images", "2048", None)
    with pytest.raises(UsageError, match="give --lengths"):
        bench_wanted(tmp_path / "text", None, "64x64")


@pytest.mark.parametrize(("whole", "cls"), [(False, "AutoModel"), (True, "DiffusionPipeline")])
def test_a_finished_run_says_how_its_checkpoint_is_loaded(tmp_path: Path, whole: bool, cls: str) -> None:
    run = run_until(tmp_path, "export")
    folder = run.folder("export")
    files.write_json(folder / ("model_index.json" if whole else "config.json"), {})
    words = str(places(run))
    assert f'diffusers.{cls}.from_pretrained("{folder}", trust_remote_code=True)' in words
    assert f'import attnconvert, diffusers; diffusers.{cls}.from_pretrained("{folder}")' in words


def test_what_verification_found_is_told(tmp_path: Path) -> None:
    run = run_until(tmp_path, "export")
    way = {"class": "ConvertedFlux", "grids": ["5x7", "10x14"], "batches": [1, 2], "error": 2e-7}
    run.record(metrics={"export": {"remote": way, "installed": way}})
    files.write_json(run.folder("export") / "config.json", {})
    words = told(*outcome(run, "export", 100)[1:])
    assert "Loaded again in 2 clean processes: predictions differ by at most 2.0e-07 on grids of 5x7 and 10x14" in words


# --- the card ---------------------------------------------------------------------------------------------------------


def card(**changes: Any) -> str:
    manifest = {"model": {"name": "someone/tiny-flux", "sha256": {"w": "ab12"}}, "versions": {"attnconvert": "0.1.0"}}
    given = {"evaluation": evaluation(random=arm(0.05, 0.7)), "part": None} | changes
    return image_card(recipe(), manifest, "FluxTransformer2DModel", given["evaluation"], given["part"])


def test_the_card_begins_with_what_the_hub_reads() -> None:
    import yaml

    head = yaml.safe_load(card().split("---")[1])
    assert head["library_name"] == "diffusers"
    assert head["pipeline_tag"] == "text-to-image"
    assert head["base_model"] == "someone/tiny-flux"
    assert {"attnconvert", "disc", "linear-attention", "sparse-linear-attention", "timed"} == set(head["tags"])


def test_the_card_tells_figures_gates_limits_and_the_recipe() -> None:
    text = card()
    assert "88 % of its 8 heads have a cheaper operator" in text
    assert "| velocity error | – | 0.0100 | 0.0500 |" in text
    assert "| speed @ 32x32 | – | 0.75× | – |" in text
    assert "**Slower than the original at 32x32 (0.75× the speed).** A step is faster from about 431" in text
    assert "| psnr | 20 | 19.0 | **missed** |" in text
    assert "judged at latents of 32×32, with 14 steps at guidance 2" in text
    assert "conditions: conditions.safetensors" in text
    assert "/secret" not in text
    for foreign in ("perplexity", "KV group", "KV cache", "needle", "nats"):
        assert foreign not in text.partition("## How it was made")[0]


@pytest.mark.parametrize(("part", "cls"), [(None, "AutoModel"), ("transformer", "DiffusionPipeline")])
def test_the_card_says_how_to_load_what_is_there(part: str | None, cls: str) -> None:
    text = card(part=part)
    assert f"{cls}.from_pretrained(" in text
    assert "trust_remote_code=True" in text
    assert "import attnconvert" in text
    assert ("transformer=model" in text) == (part is None)
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        compile(block, "card", "exec")


def test_a_card_without_an_evaluation_leaves_it_out() -> None:
    text = card(evaluation=None)
    assert "## Measured" not in text
    assert "says which head has which operator" in text


def test_rows_without_a_figure_are_left_out() -> None:
    document = evaluation()
    for name in ("psnr", "right_class"):
        del document["arms"]["student"]["quality"][name]
    del document["arms"]["teacher"]["quality"]["right_class"]
    names = [row[0] for row in image_figures(document)[1]]
    assert "velocity error" in names
    assert not {"PSNR, dB", "right class"} & set(names)


def test_pages_pair_their_tags(shown: Path) -> None:
    assert Page(shown.read_text(encoding="utf-8")).open == []
