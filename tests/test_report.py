"""The report shows what a run has, as far as it has come, and says plainly what that means."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy.stats import spearmanr

from attnconvert.convert import files
from attnconvert.convert.errors import UsageError
from attnconvert.convert.headmaps import Thumbnail, operator_colours
from attnconvert.convert.keys import STAGES
from attnconvert.convert.plots import loss_curves
from attnconvert.convert.recipe import parse_recipe
from attnconvert.convert.report import write_report
from attnconvert.convert.report_comparison import conclusions
from attnconvert.convert.report_html import duration, number, percent, ratio, size
from attnconvert.convert.report_masks import thumbnail
from attnconvert.convert.report_selection import spearman
from attnconvert.convert.runs import Run
from attnconvert.kernels.spec import Full, Hybrid, Linear, Retention, Span, Window

RECIPE = """
name: tiny
description: A <small> one
model: {folder: /models/tiny}
text:
  calibration: {files: [/text/a.txt]}
  heldout: {files: [/text/b.txt]}
"""
LAYERS, HEADS, GROUPS = 4, 4, 2
WINDOW = {"operator": "window", "size": 128, "sinks": 4}
SITES = [f"model.layers.{layer}.self_attn" for layer in range(LAYERS)]


def profile() -> dict[str, Any]:
    sites = [
        {"name": name, "layer": layer, "heads": HEADS, "kv_heads": GROUPS, "head_dim": 16}
        for layer, name in enumerate(SITES)
    ]
    heads = [[0.1 * head for head in range(HEADS)] for _ in SITES]
    damage = {"kl": [[0.001, None], [0.02, 0.0], [-1e-5, 0.3], [0.1, 0.1]], "needle": [[0.0, None]] * LAYERS}
    return {
        "schema": 1,
        "sites": sites,
        "candidates": {"window-128-4": WINDOW},
        "statistics": {"retrieval": heads, "entropy": heads},
        "output_error": {"window-128-4": heads},
        "damage": {"window-128-4": damage},
    }


def arm(kl: float, exact: float, kv_bytes: int, **more: Any) -> dict[str, Any]:
    return {
        "quality": {
            "1024": {"kl": kl, "perplexity": 10 * (1 + kl), "perplexity_ratio": 1 + kl, "teacher_perplexity": 10.0}
        },
        "retrieval": {"exact": exact, "digits": 0.99, "cases": 64, "length": 1024},
        "retrieval_drop": 0.95 - exact,
        "kv_bytes": {"8192": kv_bytes},
        "kv_ratio": {"8192": kv_bytes / 1000},
        "flops_ratio": {"8192": 0.5},
        "converted": 0.75,
        "operators": {"full": 2, "window-128-4": 6},
        "trained": True,
        **more,
    }


def evaluation(**more: Any) -> dict[str, Any]:
    teacher = {"quality": {"1024": {"perplexity": 10.0}}, "retrieval": {"exact": 0.95, "cases": 64, "length": 1024}}
    times = {"teacher": {"prefill_s": 20.0, "decode_ms": 30.0}, "student": {"prefill_s": 10.0, "decode_ms": 33.0}}
    return {
        "schema": 1,
        "data": {"text": {"documents": 2, "first": "/a/1.txt", "last": "/a/2.txt"}, "sequences": 16},
        "arms": {"teacher": teacher | {"kv_bytes": {"8192": 1000}}, "student": arm(0.04, 0.94, 430), **more},
        "speed": {n: {**times, "prefill_speedup": 2.0, "decode_speedup": 30 / 33} for n in ("1024", "8192")},
        "gates": [
            {"name": "kl@1024", "limit": 0.05, "value": 0.04, "passed": True},
            {"name": "prefill_speedup@8192", "limit": 2.5, "value": 2.0, "passed": False},
        ],
    }


def run_until(folder: Path, last: str) -> Run:
    """A run that has come as far as `last`, with the artefacts that the stages leave."""
    run = Run.create(parse_recipe(RECIPE, "recipe.yaml"), folder)
    reasons = {site: ["converted: <cheap>", "kept full: retrieval score 0.90"] for site in SITES}
    chosen = {"method": "damage", "converted": 0.5, "predicted": {"kl": 0.03, "needle": None}, "reasons": reasons}
    plan = {"attnconvert": 1, "model": "LlamaForCausalLM", "operators": {"window-128-4": WINDOW}}
    random = arm(0.2, 0.1, 430, trained=False)
    for name in STAGES[: STAGES.index(last) + 1]:
        with run.stage(name) as place:
            if name == "profile":
                files.write_json(place / "profile.json", profile())
            if name == "select":
                files.write_json(
                    place / "select.json", {"arms": {"student": chosen, "random": {**chosen, "method": "random"}}}
                )
                files.write_json(run.plan, plan | {"sites": {site: ["window-128-4", "full"] for site in SITES}})
            if name == "distill":
                lines = [
                    {"phase": "lora", "step": n, "loss": 0.1 / (n + 1), "lr": 1e-3, "seconds": 2.0} for n in range(40)
                ]
                text = "".join(json.dumps(line) + "\n" for line in [*lines, lines[-1]])
                files.write_text(place / "student" / "log.jsonl", text + '{"phase": "lora", "ste')
            if name == "evaluate":
                files.write_json(place / "evaluation.json", evaluation(random=random))
    run.record(model={"name": "tiny/llama", "sha256": {"model.safetensors": "ab12"}})
    return run


class Page(HTMLParser):
    """Refuses tags that do not pair up; keeps what would be loaded, the sections and the hover titles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.titles: list[str] = []
        self.sections: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br", "img", "hr"):
            self.open.append(tag)
        self.links += [
            value for name, value in attrs if value and name in ("src", "href", "xlink:href") and value[0] != "#"
        ]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "title":
            self.titles.append(data)
        elif self.open and self.open[-1] == "h2":
            self.sections.append(data)
        if self.open and self.open[-1] != "style":
            self.words += data + " "


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda handle: None)


# --- the page ---------------------------------------------------------------------------------------------------------

SECTIONS = {
    "profile": ["What the profile measured", "How it was made", "Recipe"],
    "select": ["What was chosen, and why", "What the profile measured", "How it was made", "Recipe"],
    "distill": ["What was chosen, and why", "What the profile measured", "Training", "How it was made", "Recipe"],
    "export": [
        "What was chosen, and why",
        "Before and after",
        "What the profile measured",
        "Training",
        "How it was made",
        "Recipe",
    ],
}


@pytest.mark.parametrize("last", SECTIONS)
def test_the_report_shows_what_there_is_by_then(tmp_path: Path, last: str) -> None:
    page = read(write_report(run_until(tmp_path, last).path))
    assert page.sections == SECTIONS[last]
    assert ("Not evaluated yet." in page.words) == (last != "export")
    assert "A <small> one" in page.words


def test_a_run_without_any_finished_stage_has_a_report_too(tmp_path: Path) -> None:
    run = Run.create(parse_recipe(RECIPE, "recipe.yaml"), tmp_path)
    assert read(write_report(run.path)).sections == ["How it was made", "Recipe"]


def test_the_report_loads_nothing_and_keeps_its_plots_as_files(tmp_path: Path) -> None:
    path = write_report(run_until(tmp_path, "export").path)
    text = path.read_text(encoding="utf-8")
    assert read(path).links == []
    assert "<script" not in text
    assert not re.search(r"url\((?!#)|@import", text)
    plots = {entry.name: entry for entry in (tmp_path / "report").iterdir()}
    assert {"choice.svg", "retrieval.svg", "loss.svg", "loss.png", "tradeoff.svg", "prefill.png"} <= set(plots)
    assert {"damage-window-128-4-kl.svg"} <= set(plots)
    for name, entry in plots.items():
        if name.endswith(".svg"):
            ElementTree.parse(entry)
            assert "var(--" not in entry.read_text(encoding="utf-8")
        else:
            assert entry.read_bytes().startswith(b"\x89PNG")
    identifiers = re.findall(r'\bid="([^"]+)"', text)
    drawn = {"loss", "tradeoff", "times", "predictors-window-128-4"}
    assert {f"{name}-figure_1" for name in drawn} == {name for name in identifiers if "figure" in name}
    assert len(identifiers) == len(set(identifiers))  # each plot's ids are its own


def test_hovering_a_group_tells_its_damage_and_the_reason(tmp_path: Path) -> None:
    titles = read(write_report(run_until(tmp_path, "select").path)).titles
    first = next(title for title in titles if title.startswith("layer 0, KV group 0 (heads 0–1): window-128-4"))
    assert "window-128-4 costs KL 0.00100, needle loss 0" in first
    assert "retrieval score 0, 0.10" in first
    assert "converted: <cheap>" in first
    kept = next(title for title in titles if title.startswith("layer 3, KV group 1 (heads 2–3): full"))
    assert "window-128-4 would cost KL 0.100" in kept
    assert "layer 0, KV group 1: – (does not apply)" in titles


def test_the_top_says_which_gate_was_missed_and_what_was_gained(tmp_path: Path) -> None:
    words = read(write_report(run_until(tmp_path, "export").path)).words
    assert "✗ 1 of 2 gates missed: prefill speed-up at 8,192 tokens is 2.000, at least 2.5." in re.sub(
        r"\s+", " ", words
    )
    assert "20.0 s → 10.0 s" in words
    assert "10.00 → 10.40" in words
    assert "(16 sequences per length; 2 documents: 1.txt … 2.txt)" in words
    assert '<b class="bad">0.909×</b>' in (tmp_path / "report.html").read_text(encoding="utf-8")  # slower decoding


def test_figures_of_other_settings_are_called_out_of_date(tmp_path: Path) -> None:
    run_until(tmp_path, "export")
    run = Run.create(parse_recipe(RECIPE, "recipe.yaml", ["evaluate.sequences=3"]), tmp_path)
    assert "evaluate, export ran with other settings than the recipe has now" in read(write_report(run.path)).words


def test_damaged_artefacts_are_left_out(tmp_path: Path) -> None:
    run = run_until(tmp_path, "export")
    (tmp_path / "profile" / "profile.json").write_text('{"sites": [')
    (tmp_path / "evaluation" / "evaluation.json").write_text("[]")
    (tmp_path / "manifest.json").write_text("")
    page = read(write_report(run.path))
    assert page.sections == ["What was chosen, and why", "Training", "Recipe"]


def test_a_folder_that_is_no_run_has_no_report(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no run directory"):
        write_report(tmp_path)


def test_the_steps_of_a_resumed_phase_count_once(tmp_path: Path) -> None:
    text = write_report(run_until(tmp_path, "distill").path).read_text(encoding="utf-8")
    assert '<td class="text">student</td><td class="text">lora</td><td>40</td>' in text
    assert "<td>0.001</td><td>1 min 20 s</td>" in text


def test_a_log_without_a_loss_has_no_plot() -> None:
    assert loss_curves({"student": [{"phase": "lora", "step": 1}]}) is None


# --- the selection ----------------------------------------------------------------------------------------------------


def rich_profile() -> dict[str, Any]:
    """Everything that a profile of format 2 has; head 1 of layer 2 is constant."""
    heads = [[0.01 * 2.0 ** (layer + head) for head in range(HEADS)] for layer in range(LAYERS)]
    holed: list[list[float | None]] = [list(row) for row in heads]
    holed[2][1] = None
    kl = [[sum(row[:2]), sum(row[2:])] for row in heads]
    return profile() | {
        "schema": 2,
        "statistics": {"retrieval": holed, "entropy": holed, "sink_mass": heads, "density_90": holed},
        "output_error": {"window-128-4": holed},
        "mass_lost": {"window-128-4": [[1 - x for x in row] for row in heads]},
        "first_order": {"window-128-4": heads},
        "damage": {"window-128-4": {"kl": kl, "needle": [[-0.001, 0.3]] * LAYERS}},
        "curves": {
            "block": 64,
            "fractions": [0.125, 0.25, 0.5],
            "recall": [[[0.1 + 0.2 * head, 0.5, 0.95] for head in range(HEADS)] for _ in range(LAYERS)],
        },
        "similarity": [[1.0 if a == b else 0.9 - 0.1 * abs(a - b) for b in range(LAYERS)] for a in range(LAYERS)],
        "problems": ["L2H1 gives the same output for every token"],
    }


def front_document() -> dict[str, Any]:
    def at(cost: float, loss: float) -> dict[str, float]:
        return {"budget": cost, "cost": cost, "loss": loss, "converted": 1 - cost}

    return {
        "resource": "kv_bytes",
        "length": 8192,
        "method": "damage",
        "needle_weight": 2.0,
        "front": [at(0.2, 0.5), at(0.6, 0.1), at(0.9, 0.0)],
        "others": {"uniform": [at(0.2, 4.0)], "random": [at(0.2, 3.0), at(0.2, 5.0)]},
        "left_out": {"duo": "method duo needs <gates>"},
        "chosen": {"student": at(0.4, 0.2), "twin": at(0.4, 0.2), "random": at(0.4, 3.0)},
    }


def rich_run(folder: Path, **student: Any) -> Run:
    """A run that has selected with budgets, refinement and a front."""
    run = run_until(folder, "select")
    round0 = {"round": 0, "scores": "damage", "loss": 0.3, "kl": 0.2, "needle": 0.05, "predicted": 0.2}
    round1 = round0 | {"round": 1, "scores": "around the plan, 2 changes", "loss": 0.35, "predicted": 0.24}
    budget = {"resource": "kv_bytes", "length": 8192, "limit": 430.0, "used": 420.0, "original": 1000.0}
    chosen = {
        "method": "damage",
        "predicted": {"kl": 0.1, "needle": 0.05},
        "measured": {"kl": 0.15, "needle": -0.01},
        "costs": {"kv_bytes at 8,192 tokens": budget},
        "loss": 0.2,
        "bound": 0.1994,
        "gap": 0.003,
        "how": "integer program, solved by HiGHS",
        "seconds": 0.5,
        "refinement": [round0 | {"kept": True}, round1 | {"kept": False, "note": "the same plan"}],
    } | student
    files.write_json(folder / "profile" / "profile.json", rich_profile())
    files.write_json(folder / "select" / "select.json", {"arms": {"student": chosen}})
    files.write_json(folder / "select" / "front.json", front_document())
    return run


def words_of(path: Path) -> str:
    return re.sub(r"\s+", " ", read(path).words)


def test_the_budgets_and_the_bound_are_told_in_words(tmp_path: Path) -> None:
    words = words_of(write_report(rich_run(tmp_path).path))
    assert "KV cache at 8,192 tokens 430 B 43.0 % 420 B 42.0 % 1000 B" in words
    assert "its groups lose 0.200 one by one, and no plan has less than 0.199: this one is within 0.30 % of" in words
    assert "0.100 0.0500 0.150 \u22120.0100 not yet" in words  # predicted, then measured together


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        ({"gap": 0.0}, "one by one, and no plan has less ("),
        ({"gap": 5e-5}, "this one is within less than 0.01 % of that"),
        ({"bound": None, "gap": 0.02}, "the cheapest plan of its predicted loss, 0.200: no plan takes 2.0 % less"),
    ],
)
def test_a_proof_is_told_as_what_it_is(tmp_path: Path, student: dict[str, Any], expected: str) -> None:
    assert expected in words_of(write_report(rich_run(tmp_path, **student).path))


def test_the_front_shows_every_selector_and_the_plan(tmp_path: Path) -> None:
    path = write_report(rich_run(tmp_path).path)
    picture = (tmp_path / "report" / "front.svg").read_text(encoding="utf-8")
    for name in ("measured damage, integer program", "uniform", "random, several seeds", "random"):
        assert f">{name}<" in picture
    assert ">student, twin<" in picture  # plans in one place share a label
    assert ">KV cache at 8,192 tokens, % of the original's<" in picture
    assert "sum over groups: KL + 2 × needle loss" in picture
    assert ">the same, measured whole<" in picture
    words = words_of(path)
    assert "DuoAttention's gates (method duo needs <gates>)" in words
    assert "random, several seeds 4.00" in words  # the mean of its plans


def test_a_damaged_front_is_left_out(tmp_path: Path) -> None:
    run = rich_run(tmp_path)
    (tmp_path / "select" / "front.json").write_text('{"front": [')
    page = read(write_report(run.path))
    assert "How good the choice is" in page.sections  # by its refinement
    assert not (tmp_path / "report" / "front.svg").exists()


def test_refinement_is_told_round_by_round(tmp_path: Path) -> None:
    words = words_of(write_report(rich_run(tmp_path).path))
    assert "0: damage 0.200 0.300 0.200 0.0500 better" in words
    assert "1: around the plan, 2 changes 0.240 0.350 0.200 0.0500" in words
    assert (tmp_path / "report" / "refinement.png").exists()


def test_heads_without_values_are_named_and_hatched(tmp_path: Path) -> None:
    path = write_report(rich_run(tmp_path).path)
    assert "1 head was not measured." in words_of(path)
    assert "L2H1 gives the same output for every token" in words_of(path)
    hatched = "layer 2, head 1: – (constant, or does not apply)"
    assert sum(title == hatched for title in read(path).titles) == 3  # retrieval, density, error
    picture = (tmp_path / "report" / "density-90.svg").read_text(encoding="utf-8")
    assert ">no value<" in picture
    assert ">no value<" not in (tmp_path / "report" / "first-order-window-128-4.svg").read_text(encoding="utf-8")


def test_scores_are_held_against_damage_with_their_rank_correlation(tmp_path: Path) -> None:
    path = write_report(rich_run(tmp_path).path)
    picture = (tmp_path / "report" / "predictors-window-128-4.svg").read_text(encoding="utf-8")
    assert "first-order effect, ρ = 1.00" in picture
    assert "mass lost, ρ = \u22121.00" in picture
    assert "first-order effect → KL 1.00" in words_of(path)
    assert "retrieval score ≥ 0.1" in picture


@pytest.mark.parametrize("values", [[3.0, 1.0, 2.0, 2.0, 7.0], [0.0, 0.0, 1.0, 5.0, 5.0]])
def test_rank_correlation_is_that_of_scipy(values: list[float]) -> None:
    other = [1.0, 1.0, 4.0, 3.0, 9.0]
    assert spearman(values, other) == pytest.approx(spearmanr(values, other).statistic)
    assert spearman(values, [2.0] * 5) is None


def test_recall_curves_name_the_extreme_heads(tmp_path: Path) -> None:
    write_report(rich_run(tmp_path).path)
    picture = (tmp_path / "report" / "recall.svg").read_text(encoding="utf-8")
    assert ">full (8)<" in picture
    assert ">window (8)<" in picture
    assert ">L0H0<" in picture
    assert ">L0H3<" in picture


def test_layers_are_compared_once_for_every_pair(tmp_path: Path) -> None:
    titles = read(write_report(rich_run(tmp_path).path)).titles
    assert [title for title in titles if title.startswith("layers ")] == [
        *("layers 0 and 1: 0.800", "layers 0 and 2: 0.700", "layers 1 and 2: 0.800"),
        *("layers 0 and 3: 0.600", "layers 1 and 3: 0.700", "layers 2 and 3: 0.800"),
    ]


def places(runs: Any) -> set[tuple[int, int]]:
    return {(row, column) for row, first, end in runs for column in range(first, end)}


@pytest.mark.parametrize(
    "spec",
    [
        Full(),
        Window(size=128, sinks=4),
        Window(size=40, sinks=0),
        Span(size=40, growth=0.4, sinks=4),
        Hybrid(window=64, sinks=4),
    ],
)
def test_a_thumbnail_has_the_blocks_of_the_mask(spec: Any) -> None:
    length, block = 512, 64
    found = thumbnail("x", spec, length)
    assert isinstance(found, Thumbnail)
    i = np.arange(length)
    distance = i[:, None] - i
    near = getattr(spec, "size", getattr(spec, "window", length))
    if isinstance(spec, Span):
        near = 40 + (0.4 * i).astype(int)[:, None] // 64 * 64
    mask = (distance >= 0) & ((distance < near) | (i < getattr(spec, "sinks", 0)))
    tiles = mask.reshape(length // block, block, length // block, block).transpose(0, 2, 1, 3)
    full, some = tiles.all((2, 3)), tiles.any((2, 3))
    assert places(found.full) == set(zip(*np.nonzero(full), strict=True))
    assert places(found.partial) == set(zip(*np.nonzero(some & ~full), strict=True))
    causal = {(row, column) for row in range(length // block) for column in range(row + 1)}
    rest = causal - places(found.full) - places(found.partial) if isinstance(spec, Hybrid) else set()
    assert places(found.rest) == rest
    pairs = mask.sum() / (length * (length + 1) / 2)
    assert f"{pairs:.0%}".replace("%", " %") in " ".join(found.words)


def test_what_retention_and_linear_attention_keep_is_drawn_as_such() -> None:
    kept = thumbnail("x", Retention(window=64, keep=16, sinks=4), 1024)
    linear = thumbnail("x", Linear(), 1024)
    assert kept is not None
    assert linear is not None
    for row in (3.0, 8.0, 15.5):
        alive = [column for column, first, end in kept.strokes if first <= row < end]
        assert len(alive) == 16
        assert all(column * 64 + 64 <= row * 64 for column in alive)  # they have left the window
    assert len(places(linear.rest)) == 16 * 17 // 2
    assert not linear.full
    assert not linear.partial


def test_the_masks_of_the_plan_stand_in_the_page(tmp_path: Path) -> None:
    words = words_of(write_report(rich_run(tmp_path).path))
    assert "What the operators read" in words
    assert "43 % of the blocks, 24 % of the pairs" in words
    assert (tmp_path / "report" / "masks.svg").exists()


# --- in words ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (arm(0.20, 0.10, 430), "At equal bytes (430 B at 8,192 tokens) the student is better than window."),
        (arm(0.02, 0.94, 425), "At equal bytes (430 B at 8,192 tokens) window is better than the student."),
        (arm(0.04, 0.92, 430), "there is no clear difference between the student and window."),
        (
            arm(0.02, 0.10, 430),
            "neither is better in everything: the student in retrieval, window in KL and perplexity.",
        ),
        (
            arm(0.08, 0.94, 300),
            "window keeps fewer bytes (300 B, the student 430 B at 8,192 tokens), and the student is",
        ),
        (arm(0.20, 0.10, 430, trained=False), "window was not trained."),
    ],
)
def test_which_arm_is_better_is_said_plainly(other: dict[str, Any], expected: str) -> None:
    text = re.sub(r"<[^>]+>", "", conclusions(evaluation(window=other)))
    assert expected in text
    assert "Student against window: KL 0.0400 against" in text


def test_an_arm_without_common_figures_gets_no_sentence() -> None:
    assert conclusions(evaluation(window={"kv_bytes": {"8192": 3}})) == ""
    assert conclusions({"arms": {"teacher": {}}}) == ""


def test_numbers_are_written_as_people_read_them() -> None:
    assert [number(value) for value in (0.041389, 12.75, 1234.5, 0, -0.5, 2e-7, None, float("nan"), True)] == [
        *("0.0414", "12.8", "1,234", "0", "\u22120.500", "2.0e\u221207", "–", "–", "–"),
    ]
    assert [ratio(1.0439), ratio(0.431), ratio(None)] == ["1.044×", "0.43×", "–"]
    assert [percent(0.9375), size(512), size(18432), size(198180864)] == ["93.8 %", "512 B", "18.0 KiB", "189 MiB"]
    assert [duration(s) for s in (0.85, 4.2, 187, 3720)] == ["850 ms", "4.20 s", "3 min 07 s", "1 h 02 min"]


def test_operators_of_one_kind_have_shades_of_one_colour() -> None:
    labels = ["full", "window-64-4", "window-128-4", "new"]
    colours = operator_colours(labels, {label: label.split("-")[0] for label in labels})
    assert len(set(colours.values())) == 4
    assert colours["window-64-4"] == "#0072b2"
    many = [f"window-{size}-4" for size in (32, 64, 128, 256, 512)]
    assert len(set(operator_colours(many, dict.fromkeys(many, "window")).values())) == 5
