"""Runs continue after anything, and never take one thing for another."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from rich.console import Console

from attnconvert.convert import files, progress, runs
from attnconvert.convert.errors import PreflightError, UsageError
from attnconvert.convert.keys import STAGES
from attnconvert.convert.recipe import Recipe, parse_recipe
from attnconvert.convert.runs import Run

RECIPE = """
name: tiny
model: {folder: /models/tiny}
text:
  calibration: {files: [/text/a.txt]}
  heldout: {files: [/text/b.txt]}
gates: {kl: {1024: 0.5}}
"""


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Power cuts are not tested, so nothing needs to wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def recipe(*overrides: str) -> Recipe:
    return parse_recipe(RECIPE, "recipe.yaml", overrides)


def finish(run: Run, *stages: str) -> None:
    for name in stages or STAGES:
        with run.stage(name) as folder:
            files.write_json(folder / "result.json", {"stage": name})
            if name == "select":
                files.write_text(run.plan, "sites: {a: [full]}\n")


def done(run: Run) -> list[str]:
    return [name for name in STAGES if run.is_done(name)]


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_new_run_holds_its_recipe_and_its_manifest(tmp_path: Path) -> None:
    run = Run.create(recipe("profile.seed=3"), tmp_path / "runs" / "a")
    assert Run.open(run.path).recipe == run.recipe
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert manifest["schema"] == 1
    assert manifest["recipe"]["name"] == "tiny"
    assert manifest["seeds"]["profile.seed"] == 3
    assert set(manifest["seeds"]) == {f"{s}.seed" for s in ("profile", "select", "sample", "distill", "evaluate")}
    assert manifest["versions"]["python"].startswith("3.")
    assert manifest["hardware"]["cores"] >= 1
    assert done(run) == []


def test_a_folder_with_other_things_in_it_is_refused_and_stays_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"is not empty and is no run \(thesis.tex is in it\): use another --out"):
        Run.create(recipe(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("inside", ["", "runs/a"])
def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        Run.create(recipe(), tmp_path / "file" / inside)


def test_what_a_kill_while_starting_leaves_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("123\n")
    (tmp_path / ".partial-00-recipe.yaml").write_text("name: ti")
    assert Run.create(recipe(), tmp_path).recipe.name == "tiny"


def test_opening_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no run directory, it has no recipe.yaml"):
        Run.open(tmp_path)
    with pytest.raises(UsageError, match="is no run directory, it does not exist"):
        Run.open(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("name=other", "is a run of recipe 'tiny', not of 'other': use another --out"),
        ("model.folder=/models/big", "was begun with another model: .*/models/tiny.*, not .*/models/big.*--out"),
    ],
)
def test_a_run_of_another_recipe_or_model_is_refused(tmp_path: Path, override: str, message: str) -> None:
    Run.create(recipe(), tmp_path)
    with pytest.raises(UsageError, match=message):
        Run.create(recipe(override), tmp_path)
    assert Run.open(tmp_path).recipe == recipe()


def test_a_damaged_recipe_in_the_run_is_told_with_its_place(tmp_path: Path) -> None:
    Run.create(recipe(), tmp_path)
    (tmp_path / "recipe.yaml").write_text("name: tiny\nmodle: {}\n")
    with pytest.raises(UsageError, match="cannot be continued, use another --out"):
        Run.create(recipe(), tmp_path)
    with pytest.raises(UsageError, match="recipe.yaml:2:1"):
        Run.open(tmp_path)


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "remaining"),
    [
        ("description=words", "profile select sample distill evaluate export"),
        ("gates.kl={1024: 0.1}", "profile select sample distill evaluate export"),
        ("export.verify=false", "profile select sample distill evaluate"),
        ("evaluate.sequences=4", "profile select sample distill"),
        ("text.heldout.files=[/text/c.txt]", "profile select sample distill"),
        ("distill.seed=1", "profile select sample"),
        ("sample.sequences=4", "profile select"),
        ("select.groups=0.1", "profile sample"),
        ("profile.rows=8", "sample"),
        ("text.calibration.files=[/text/c.txt]", ""),
    ],
)
def test_a_changed_setting_makes_just_the_stages_old_that_depend_on_it(
    tmp_path: Path, override: str, remaining: str
) -> None:
    finish(Run.create(recipe(), tmp_path))
    run = Run.create(recipe(override), tmp_path)
    assert done(run) == remaining.split()
    assert [name for name in STAGES if not run.stale(name)] == remaining.split()
    assert done(Run.create(recipe(), tmp_path)) == list(STAGES)  # and back


def test_another_version_of_a_stage_makes_its_results_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.create(recipe(), tmp_path)
    finish(run)
    monkeypatch.setitem(runs.stage_key.__globals__["SCHEMA"], "sample", 99)
    assert done(run) == ["profile", "select"]


def test_an_edited_plan_makes_what_follows_it_old_and_a_comment_does_not(tmp_path: Path) -> None:
    run = Run.create(recipe(), tmp_path)
    finish(run)
    run.plan.write_text("# mine\nsites:\n  a: [full]\n")
    assert done(run) == list(STAGES)
    run.plan.write_text("sites: {a: [window-128-4]}\n")
    assert done(run) == ["profile", "select", "sample"]
    run.plan.write_text("sites: {a: [")
    assert done(run) == ["profile", "select", "sample"]
    run.plan.unlink()
    assert done(run) == ["profile", "sample"]


def test_select_puts_an_edited_plan_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    finish(Run.create(recipe(), tmp_path))
    run = Run.create(recipe("select.groups=0.3"), tmp_path)
    finish(run, "select")
    assert not list(tmp_path.glob("plan.edited*"))
    run.plan.write_text("sites: {a: [mine]}\n")
    finish(run, "select")
    assert (tmp_path / "plan.edited-1.yaml").read_text() == "sites: {a: [mine]}\n"
    assert "kept as plan.edited-1.yaml" in caplog.text


def test_unfinished_names_what_must_run_first(tmp_path: Path) -> None:
    run = Run.create(recipe(), tmp_path)
    assert run.unfinished("profile") == ()
    assert run.unfinished("evaluate") == ("profile", "select", "sample", "distill")
    finish(run, "profile", "select")
    assert run.unfinished("distill") == ("sample",)


# --- stages -----------------------------------------------------------------------------------------------------------


def test_a_finished_stage_is_told_in_its_marker_and_in_the_manifest(tmp_path: Path) -> None:
    run = Run.create(recipe(), tmp_path)
    finish(run, "sample")
    marker = json.loads((tmp_path / "samples" / "done.json").read_text())
    assert marker["files"] == {"result.json": files.sha256_file(tmp_path / "samples" / "result.json")}
    stage = run.manifest()["stages"]["sample"]
    assert stage["key"] == run.key("sample") == marker["key"]
    assert 0 <= stage["seconds"] < 10
    assert stage["peak_memory_bytes"] > 1e6
    assert stage["finished"].endswith("+00:00")


def test_a_stage_that_lost_a_file_is_not_done(tmp_path: Path) -> None:
    run = Run.create(recipe(), tmp_path)
    finish(run, "profile")
    (tmp_path / "profile" / "result.json").unlink()
    assert not run.is_done("profile")


def test_a_stopped_stage_keeps_what_it_has_and_adds_up_its_time(tmp_path: Path) -> None:
    run = Run.create(recipe(), tmp_path)
    with pytest.raises(KeyboardInterrupt), run.stage("sample") as folder:
        (folder / "shard-0").write_text("made")
        (folder / ".partial-1-shard-1").write_text("half")
        time.sleep(0.05)
        raise KeyboardInterrupt
    assert not run.is_done("sample")
    assert not run.stale("sample")
    with Run.open(tmp_path).stage("sample") as folder:
        assert [path.name for path in folder.iterdir() if path.name != "key"] == ["shard-0"]
    assert run.manifest()["stages"]["sample"]["seconds"] >= 0.05


def test_work_of_other_settings_is_removed_before_the_stage_begins(tmp_path: Path) -> None:
    run = Run.create(recipe(), tmp_path)
    with pytest.raises(ValueError, match="oops"), run.stage("sample") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "shard").write_text("old")
        raise ValueError("oops")
    with Run.create(recipe("sample.seed=1"), tmp_path).stage("sample") as folder:
        assert [path.name for path in folder.iterdir()] == ["key"]


def test_a_folder_whose_key_is_lost_counts_as_unknown(tmp_path: Path) -> None:
    run = Run.create(recipe(), tmp_path)
    finish(run, "sample")
    (tmp_path / "samples" / "done.json").unlink()
    (tmp_path / "samples" / "key").write_text(run.key("sample")[:20])
    with run.stage("sample") as folder:
        assert not (folder / "result.json").exists()


def test_a_plan_changed_while_distilling_leaves_the_result_old(tmp_path: Path) -> None:
    run = Run.create(recipe(), tmp_path)
    finish(run, "profile", "select", "sample")
    with run.stage("distill"):
        run.plan.write_text("sites: {a: [other]}\n")
    assert run.stale("distill")


def test_select_without_a_plan_is_a_fault(tmp_path: Path) -> None:
    run = Run.create(recipe(), tmp_path)
    with pytest.raises(RuntimeError, match="without writing"), run.stage("select"):
        pass


def test_damaged_markers_and_manifests_cost_only_the_work_they_stood_for(tmp_path: Path) -> None:
    run = Run.create(recipe(), tmp_path)
    finish(run, "profile", "sample")
    (tmp_path / "profile" / "done.json").write_text('{"key": ')
    (tmp_path / "manifest.json").write_text("[]")
    assert done(run) == ["sample"]
    finish(run, "profile")
    assert done(run) == ["profile", "sample"]


def test_the_manifest_takes_records_and_refuses_a_changed_model(tmp_path: Path) -> None:
    run = Run.create(recipe(), tmp_path)
    run.record(model={"name": "m", "sha256": {"w": "aa"}}, metrics={"kl": 0.1})
    run.record(model={"name": "m", "sha256": {"w": "bb"}}, metrics={"perplexity": 9.0})
    assert run.manifest()["model"]["sha256"] == {"w": "bb"}  # nothing was made from it yet
    assert run.manifest()["metrics"] == {"kl": 0.1, "perplexity": 9.0}
    finish(run, "profile")
    with pytest.raises(UsageError, match="w has changed since .* was begun"):
        run.record(model={"name": "m", "sha256": {"w": "cc"}})


# --- files and disks --------------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(TypeError, match="JSON"):
        files.write_json(path, {"new": object()})
    with pytest.raises(RuntimeError), files.replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert files.read_json(path) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_figures_that_are_no_numbers_become_null(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"a": [float("nan"), 1.5], "b": (float("inf"), "×")})
    assert files.read_json(tmp_path / "a.json") == {"a": [None, 1.5], "b": [None, "×"]}


def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    run = Run.create(recipe(), tmp_path)
    with (
        pytest.raises(PreflightError, match=r"^disk full: .*samples.* run the same command again$"),
        run.stage("sample"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(PreflightError, match="^disk full"), run.stage("sample"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(PreflightError, match="^disk full"), files.replacing(Path("/dev/full")) as temporary:
        temporary.symlink_to("/dev/full")
        temporary.write_text("x" * 10)


def test_reading_what_is_absent_or_damaged_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist: run the stage"):
        files.read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"a":')
    with pytest.raises(UsageError, match="delete it and run its stage again"):
        files.read_json(tmp_path / "a.json")


# --- other processes --------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from attnconvert.convert.locks import only_process
with only_process(Path(sys.argv[1])):
    print("in", flush=True)
    time.sleep(60)
"""


def test_two_processes_cannot_work_in_one_run_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    run = Run.create(recipe(), tmp_path)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        message = rf"in use by another attnconvert \(process {other.pid}\): wait for it, or use another --out"
        with pytest.raises(UsageError, match=message):
            finish(run, "sample")
        with pytest.raises(UsageError, match="in use"):
            Run.create(recipe("sample.seed=9"), tmp_path)
        assert Run.open(tmp_path).recipe == recipe()
        other.kill()
    finish(run, "sample")
    with run.lock(), run.lock():
        finish(run, "profile")


# Each worker goes on with what the one before it left and is killed one file operation later than that one: before
# every opening, renaming and removing, and in the middle of every write. Two take turns with other settings.
KILL = """
import json, os, signal, sys
from pathlib import Path
from attnconvert.convert.files import write_json
from attnconvert.convert.recipe import parse_recipe
from attnconvert.convert.runs import Run

root = Path(sys.argv[1])
recipes = [parse_recipe(sys.argv[2], "r", [f"sample.seed={seed}"]) for seed in (0, 1)]
left = None  # file operations until this process is killed

def step():
    global left
    if left is not None:
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

def audit(event, arguments):
    if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir") and str(root) in str(arguments[0]):
        step()

def halves(path, content):
    with path.open("wb", buffering=0) as stream:
        stream.write(content[: len(content) // 2])
        step()
        stream.write(content[len(content) // 2 :])

sys.addaudithook(audit)
Path.write_bytes = halves
os.fsync = lambda handle: None

def work(seed):
    run = Run.create(recipes[seed], root / "run")
    with run.stage("sample") as folder:
        for index in range(4):
            file = folder / f"{index}.json"
            if file.exists():
                assert json.loads(file.read_text()) == [seed] * 9, "of other settings, or half"
            write_json(file, [seed] * 9)
    return run

for attempt in range(1, 1000):
    child = os.fork()
    if child == 0:
        left = attempt
        work(attempt % 2)
        os._exit(7)
    status = os.waitpid(child, 0)[1]
    for file in (root / "run").rglob("*.json"):
        if not file.name.startswith(".partial-"):
            json.loads(file.read_text())
    if os.WIFEXITED(status):
        break
assert os.WEXITSTATUS(status) == 7 and attempt > 40, (attempt, status)
run = Run.create(recipes[attempt % 2], root / "run")
assert run.is_done("sample")
names = sorted(path.name for path in run.folder("sample").iterdir())
assert names == ["0.json", "1.json", "2.json", "3.json", "done.json", "key"], names
assert not list(run.path.rglob(".partial-*"))
print("whole")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and kill")
def test_a_run_that_is_killed_at_any_moment_continues(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", KILL, str(tmp_path), RECIPE], capture_output=True, text=True, check=False, timeout=120
    )
    assert result.stdout == "whole\n", result.stderr


# --- progress ---------------------------------------------------------------------------------------------------------


def test_progress_passes_every_item_through_and_says_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter(range(0, 10_000, 3))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    stream = io.StringIO()
    track = progress.rich_track(Console(file=stream))
    assert list(track(range(40), "sampling [a]")) == list(range(40))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "sampling [a]: 4 of 40 (10 %), 0:12 elapsed, 1:48 left"
    assert lines[-1] == "sampling [a]: 40 of 40 (100 %), 2:00 elapsed"
    assert len(lines) == 10


def test_progress_bars_may_be_nested_and_left_early() -> None:
    stream = io.StringIO()
    track = progress.rich_track(Console(file=stream, force_terminal=True, width=100))
    for _ in track(range(3), "outer"):
        assert list(track(iter("ab"), "inner", total=2)) == ["a", "b"]
    for _ in track(range(3), "left"):
        break
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "outer" in text
    assert "inner" in text
    assert "3/3" in text
    assert list(progress.silent("ab", "x")) == ["a", "b"]


def test_times_read_like_a_clock() -> None:
    assert [progress.clock(seconds) for seconds in (7.4, 750, 3725)] == ["0:07", "12:30", "1:02:05"]


def test_the_modules_of_a_run_need_no_torch() -> None:
    code = "import sys, attnconvert.convert.runs; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
