"""The command line as a user meets it: whole runs on a tiny model, what is printed, and every exit code."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer
from commands import Command, attnconvert, finished, place, save_tokenizer, whole

from attnconvert import cli
from attnconvert.convert.failures import EXIT_CODES
from attnconvert.convert.keys import STAGES

ROOT = Path(__file__).parents[1]
__all__ = ["attnconvert", "finished", "place", "whole"]  # fixtures

# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_second_run_does_nothing_and_shows_the_result_again(attnconvert: Command, place: Path, whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*.json") if path.name != "manifest.json"}
    ran = attnconvert("run", place / "recipe.yaml", "--out", whole, "--json")
    assert (ran.code, ran.document["ran"]) == (0, [])
    assert ran.document["checkpoint"] == str(whole / "export")
    assert set(ran.document["stages"]) == set(STAGES)
    assert "distill is done already" in ran.err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    shown = attnconvert("run", place / "recipe.yaml", "--out", whole)
    for expected in ("KL @ 64", "perplexity @ 64", "needles @ 96", "KV cache @ 128", "prefill speedup @ 128"):
        assert expected in shown.out
    for expected in ("teacher", "student", "random", "kv_ratio @ 128", "pass", "report.html", "trust_remote_code=True"):
        assert expected in shown.out


def test_what_is_printed_fits_into_a_hundred_columns(attnconvert: Command, whole: Path, place: Path) -> None:
    for command in (["run", place / "recipe.yaml", "--out", whole], ["inspect", whole], ["inspect", place / "model"]):
        lines = attnconvert(*command).out.splitlines()
        assert max(len(line) for line in lines if str(whole) not in line) <= 100


def test_the_stages_one_by_one_are_the_run(attnconvert: Command, place: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "steps"
    settings = ["--set", "export.verify=false"]
    shown = attnconvert("profile", place / "recipe.yaml", "--out", out, *settings)
    assert shown.code == 0
    assert "window-16-2" in shown.out
    refused = attnconvert("distill", out)
    assert refused.code == 2
    assert "distill needs select, sample first" in refused.message
    assert "predicted" in attnconvert("select", out).out
    assert "4 sequences of 40 tokens" in attnconvert("sample", out).out
    assert set(attnconvert("distill", out, "--json").document["arms"]) == {"student"}
    measured = attnconvert("evaluate", out, "--json")
    assert measured.code == 0
    assert "from" not in measured.document
    assert attnconvert("export", out, "--json").document["checkpoint"] == str(out / "export")
    expected = json.loads((whole / "evaluation" / "evaluation.json").read_text())["arms"]["student"]["quality"]
    assert measured.document["arms"]["student"]["quality"] == expected


def test_evaluate_measures_the_exported_checkpoint_again(attnconvert: Command, finished: Path) -> None:
    again = attnconvert("evaluate", finished, "--json")
    assert again.code == 0
    assert again.document["from"] == str(finished / "export")
    first = json.loads((finished / "evaluation" / "evaluation.json").read_text())["arms"]["student"]
    found = again.document["arms"]["student"]
    assert found["quality"]["64"]["kl"] == pytest.approx(first["quality"]["64"]["kl"], rel=1e-3)
    assert (found["retrieval"], found["kv_ratio"]) == (first["retrieval"], first["kv_ratio"])


def test_bench_times_the_checkpoint_against_full_attention(attnconvert: Command, whole: Path) -> None:
    options = ["--lengths", "64,256", "--repeats", "1", "--decode-tokens", "2"]
    found = attnconvert("bench", whole, *options, "--json")
    assert found.code == 0
    assert set(found.document["speed"]) == {"64", "256"}
    entry = found.document["speed"]["256"]
    assert entry["kv_ratio"] < 0.6
    assert entry["prefill_speedup"] == pytest.approx(entry["teacher"]["prefill_s"] / entry["student"]["prefill_s"])
    shown = attnconvert("bench", whole / "export", *options).out
    assert "× as fast" in shown
    assert "cores" in shown


def test_inspect_shows_sites_plans_and_runs(attnconvert: Command, place: Path, whole: Path, tmp_path: Path) -> None:
    model = attnconvert("inspect", place / "model", "--json").document
    assert (model["class"], model["groups"], len(model["sites"])) == ("LlamaForCausalLM", 6, 3)
    able = set(model["sites"][0]["operators"])  # those that another test brings from outside among them
    assert able >= {"full", "window", "span", "blocks", "retention", "linear", "hybrid"}
    assert not able & {"disc", "radial", "agent"}
    shutil.copy(whole / "recipe.yaml", tmp_path)
    begun = attnconvert("inspect", tmp_path, "--json").document
    assert {row["why"] for row in begun["stages"]} == {"not run yet"}
    for folder in (whole, whole / "export"):
        plan = attnconvert("inspect", folder, "--json").document
        assert plan["converted"] == pytest.approx(4 / 6)
        assert plan["kv_ratio"]["32768"] < plan["kv_ratio"]["8192"] < 0.5
        assert plan["evaluation"]["arms"]["student"]
    shown = attnconvert("inspect", whole).out
    assert "group 1" in shown
    assert "converted" in shown
    assert "evaluate" in shown


def test_a_plan_that_a_person_edits_is_followed(attnconvert: Command, finished: Path) -> None:
    plan = finished / "plan.yaml"
    swapped = "[full, full]" if "layers.0.self_attn: [full, full]" not in plan.read_text() else "[window-16-2, full]"
    plan.write_text(re.sub(r"(layers\.0\.self_attn: ).*", rf"\1{swapped}", plan.read_text()))
    told = attnconvert("run", finished / "recipe.yaml", "--out", finished, "--dry-run", "--json").document["stages"]
    assert [row["state"] for row in told] == ["done", "done", "done", "will run", "will run", "will run"]
    assert "plan" in told[3]["why"]
    plan.write_text(plan.read_text().replace("layers.0.self_attn", "layers.7.self_attn"))
    refused = attnconvert("run", finished / "recipe.yaml", "--out", finished)
    assert refused.code == 2
    assert "'model.layers.7.self_attn'" in refused.message


def test_profile_of_a_model_begins_a_run_with_default_settings(
    attnconvert: Command, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["profile.sequences=2", "profile.length=64", "profile.rows=8", "profile.needles={cases: 1, length: 96}"]
    small += [f"text.{name}={{files: [{place / name}.txt]}}" for name in ("calibration", "heldout")]
    found = attnconvert("profile", place / "model", "--json", *(part for one in small for part in ("--set", one)))
    assert found.code == 0, found.err
    assert len(found.document["sites"]) == 3
    assert "name: model" in (tmp_path / "runs" / "model" / "recipe.yaml").read_text()
    assert attnconvert("profile", tmp_path / "runs" / "model").code == 0


# --- stopping and going on --------------------------------------------------------------------------------------------


class Stop:
    """Lets `calls` calls of a function through and raises at the next."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException, calls: int = 0) -> None:
        module, _, name = where.rpartition(".")
        outer, _, inner = module.rpartition(".")
        holder: Any = getattr(import_module(outer), inner) if inner[0].isupper() else import_module(module)
        real = getattr(holder, name)

        def limited(*arguments: Any, **settings: Any) -> Any:
            nonlocal calls
            calls -= 1
            if calls < 0:
                raise error
            return real(*arguments, **settings)

        monkeypatch.setattr(holder, name, limited)


INSIDE = {
    "profile": ("attnconvert.convert.damage._damage_of_case", 1),
    "select": ("attnconvert.pipeline.write_plan", 1),
    "sample": ("attnconvert.distill.samples._generate", 1),
    "distill": ("attnconvert.distill.loop.Trainer._save", 2),
    "evaluate": ("attnconvert.convert.evaluation.retrieval", 1),
    "export": ("attnconvert.pipeline.write_checkpoint", 0),
}


def test_ctrl_c_in_any_stage_loses_nothing_and_the_same_command_continues(
    attnconvert: Command, place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["run", place / "recipe.yaml", "--out", tmp_path / "run", "--set", "export.verify=false"]
    assert tuple(INSIDE) == STAGES
    for stage, (where, calls) in INSIDE.items():
        with monkeypatch.context() as patch:
            Stop(patch, where, KeyboardInterrupt(), calls)
            stopped = attnconvert(*command)
        assert (stopped.code, stopped.message) == (130, "interrupted; the same command continues")
        assert "Traceback" not in stopped.err
        done = [name for name in STAGES if attnconvert_done(tmp_path / "run", name)]
        assert done == list(STAGES[: STAGES.index(stage)])
    ended = attnconvert(*command, "--json")
    assert (ended.code, ended.document["ran"]) == (0, ["export"])
    expected = json.loads((whole / "evaluation" / "evaluation.json").read_text())["arms"]["student"]
    assert ended.document["evaluation"]["arms"]["student"]["quality"] == expected["quality"]


def attnconvert_done(run: Path, stage: str) -> bool:
    folder = {"sample": "samples", "evaluate": "evaluation"}.get(stage, stage)
    return (run / folder / "done.json").exists()


def test_sigterm_ends_a_run_in_order(
    attnconvert: Command, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnconvert import pipeline

    monkeypatch.setattr(pipeline, "select", lambda *arguments, **settings: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    stopped = attnconvert("run", place / "recipe.yaml", "--out", tmp_path / "run")
    assert (stopped.code, stopped.message) == (143, "terminated; the same command continues")
    assert signal.getsignal(signal.SIGTERM) is before
    assert attnconvert_done(tmp_path / "run", "profile")


# --- exit codes -------------------------------------------------------------------------------------------------------


def test_a_missed_gate_is_exit_code_4_and_the_checkpoint_is_there(attnconvert: Command, finished: Path) -> None:
    settings = ["--set", "gates.converted=0.9", "--set", "gates.kv_ratio={4096: 0.01}"]
    missed = attnconvert("run", finished / "recipe.yaml", "--out", finished, *settings, "--json")
    assert missed.code == 4
    assert missed.document["ran"] == []  # another bound needs no new figures
    assert missed.message.startswith("gate missed: 2 of 2 gates missed: kv_ratio@4096 is ")
    assert Path(missed.document["checkpoint"], "model.safetensors").exists()
    assert "MISS" in attnconvert("run", finished / "recipe.yaml", "--out", finished, *settings).out
    assert attnconvert("evaluate", finished, "--json").code == 4


def test_a_mistake_in_the_command_is_exit_code_2_and_one_line(attnconvert: Command, place: Path, whole: Path) -> None:
    for arguments, expected in (
        (["run"], "Missing argument 'RECIPE'"),
        (["run", "smollm2-135m-windw"], "did you mean 'smollm2-135m-window'?"),
        (["profile", "smollm2-135m-windw"], "did you mean 'smollm2-135m-window'?"),
        (["run", place / "recipe.yaml", "--until", "distil"], "did you mean 'distill'?"),
        (["run", place / "recipe.yaml", "--set", "sample.sequnces=3"], "did you mean 'sequences'?"),
        (["run", place / "recipe.yaml", "--set", "select.operator={operator: windw}"], "windw"),
        (["run", place / "recipe.yaml", "--nix"], "--nix"),
        (["nix"], "nix"),
        (["select", place / "nothing"], "is no run directory"),
        (["bench", place / "model"], "is neither an exported checkpoint nor a run"),
        (["bench", whole, "--lengths", "some"], "--lengths some"),
        (["bench", whole, "--repeats", "0"], "--repeats"),
        (["recipes", "show", "nix"], "no recipe 'nix'"),
        (["inspect", "package:nix"], "package:name==version:file"),
        (["run", "smollm2-135m-window", "--out", whole], "is a run of recipe 'tiny-window'"),
        (["run", place / "recipe.yaml", "--out", place / "model"], "is not empty and is no run"),
        (["run", place / "recipe.yaml", "--out", place], "holds a recipe.yaml but no run"),
    ):
        ended = attnconvert(*arguments)
        assert (ended.code, ended.out) == (2, ""), arguments
        assert len(ended.err.strip().splitlines()) == 1, ended.err
        assert expected in ended.err


def test_a_model_without_known_attention_is_refused_with_the_reason(attnconvert: Command, tmp_path: Path) -> None:
    from transformers import GPTJConfig, GPTJForCausalLM

    config = GPTJConfig(vocab_size=99, n_embd=32, n_layer=2, n_head=2, rotary_dim=8, n_positions=64)
    GPTJForCausalLM(config).save_pretrained(tmp_path / "gptj")
    save_tokenizer(tmp_path / "gptj", 99)
    refused = attnconvert("inspect", tmp_path / "gptj")
    assert refused.code == 2
    assert "GPTJ" in refused.message
    assert "AttentionInterface" in refused.message


def test_a_full_disk_and_a_full_memory_are_exit_code_3(
    attnconvert: Command, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["run", place / "recipe.yaml", "--out", tmp_path / "run"]
    for error, expected in (
        (OSError(errno.ENOSPC, "No space left on device"), "disk full"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "out of memory"),
        (MemoryError(), "out of memory"),
    ):
        with monkeypatch.context() as patch:
            Stop(patch, "attnconvert.distill.measuring.profile", error)
            ended = attnconvert(*command)
        assert ended.code == 3
        assert expected in ended.message


def test_what_is_absent_or_damaged_is_exit_code_5(attnconvert: Command, finished: Path, place: Path) -> None:
    (finished / "export" / "model.safetensors").write_bytes(b"damaged")
    for arguments, expected in (
        (["inspect", place / "nothing"], f"no folder {place / 'nothing'}"),
        (["inspect", place / "nothing.gguf"], f"no file {place / 'nothing.gguf'}"),
        (["inspect", "nobody/nothing"], "HF_HUB_OFFLINE"),
        (["bench", finished], "model.safetensors"),
        (["evaluate", finished], "model.safetensors"),
        (["run", place / "recipe.yaml", "--out", finished, "--set", "text.heldout={files: [/no.txt]}"], "/no.txt"),
    ):
        ended = attnconvert(*arguments)
        assert ended.code == 5, ended.err
        assert expected in ended.message


def test_our_own_fault_is_exit_code_1_and_shows_its_trace_only_when_asked(
    attnconvert: Command, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["run", place / "recipe.yaml", "--out", tmp_path / "run"]
    Stop(monkeypatch, "attnconvert.distill.measuring.profile", KeyError("layer"))
    ended = attnconvert(*command)
    assert ended.code == 1
    assert "this is a bug: run again with --verbose" in ended.message
    assert "Traceback" not in ended.err
    assert "Traceback" in attnconvert(*command, "--verbose").err
    monkeypatch.setenv("ATTNCONVERT_DEBUG", "1")
    assert "Traceback" in attnconvert(*command).err


# --- without torch ----------------------------------------------------------------------------------------------------


def test_help_recipes_and_dry_runs_import_no_torch(place: Path, whole: Path) -> None:
    commands = [
        ["--help"],
        ["run", "--help"],
        ["recipes", "ls"],
        ["recipes", "validate", str(place / "recipe.yaml")],
        ["run", str(place / "recipe.yaml"), "--out", str(whole), "--dry-run"],
        ["run", "nix"],
    ]
    program = f"""
import sys
from attnconvert.cli import main
for command in {commands!r}:
    try:
        main(command)
    except SystemExit:
        pass
heavy = {{"torch", "transformers", "peft", "datasets", "numpy", "matplotlib", "scipy"}}
print(sorted(heavy & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_dry_run_says_what_would_run_and_why(attnconvert: Command, place: Path, whole: Path, tmp_path: Path) -> None:
    command = ["run", place / "recipe.yaml", "--dry-run", "--json", "--out"]
    assert {row["state"] for row in attnconvert(*command, whole).document["stages"]} == {"done"}
    changed = attnconvert(*command, whole, "--set", "sample.sequences=2").document["stages"]
    assert changed[1] == {"stage": "select", "state": "done", "why": changed[1]["why"]}
    assert changed[2]["why"] == "out of date: sample.sequences 4 → 2"
    assert changed[3]["why"] == "out of date: sample will run again"
    new = attnconvert(*command, tmp_path / "new", "--until", "select").document["stages"]
    assert [row["state"] for row in new] == ["will run"] * 2 + ["not asked for"] * 4
    assert not (tmp_path / "new").exists()


def test_recipes_are_listed_shown_checked_and_described(attnconvert: Command, place: Path, tmp_path: Path) -> None:
    names = attnconvert("recipes", "ls", "--json").document
    assert "smollm2-135m-window" in names
    for name in names:
        (tmp_path / "shown.yaml").write_text(attnconvert("recipes", "show", name).out)
        assert attnconvert("recipes", "validate", tmp_path / "shown.yaml").code == 0
    (tmp_path / "bad.yaml").write_text("name: Bad\nmodl: 1\n")
    (tmp_path / "worse.yaml").write_text("")
    files = [tmp_path / "bad.yaml", place / "recipe.yaml", tmp_path / "worse.yaml"]
    checked = attnconvert("recipes", "validate", *files)
    assert checked.code == 2
    assert f"{tmp_path}/bad.yaml:2:1: modl: unknown key; did you mean 'model'?" in checked.err
    assert f"{tmp_path}/worse.yaml" in checked.err
    assert f"{place}/recipe.yaml: valid" in checked.out
    assert attnconvert("recipes", "schema").document["title"] == "Recipe"


def test_no_color_is_honoured(place: Path, whole: Path) -> None:
    command = [sys.executable, "-m", "attnconvert", "run", str(place / "recipe.yaml"), "--out", str(whole), "--dry-run"]
    for wish, coloured in (({"NO_COLOR": "1"}, False), ({}, True)):
        environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
        environment |= {"FORCE_COLOR": "1", "TERM": "xterm-256color", **wish}
        shown = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
        assert bool(re.search(r"\x1b\[[0-9;]*3\dm", shown)) is coloured


# --- the page that describes it ---------------------------------------------------------------------------------------


def described(group: Any, path: str = "attnconvert") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from described(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def test_the_page_of_the_command_line_names_every_command_option_and_exit_code() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    sections = {part.partition("\n")[0].strip("` "): part for part in re.split(r"^### ", page, flags=re.M)[1:]}
    commands = dict(described(typer.main.get_command(cli.app)))
    assert set(sections) == set(commands)
    common = set(re.findall(r"`(--?[\w-]+)`", page.partition("## Exit codes")[0]))
    for name, command in commands.items():
        options = {option for parameter in command.params for option in parameter.opts if option.startswith("-")}
        shown = set(re.findall(r"`(--[\w-]+)", sections[name]))
        assert shown <= options, f"{name} has no {shown - options}"
        assert options - common <= shown, f"docs/cli.md does not describe {options - common - shown} of {name}"
        first = command.help.partition("\n\n")[0]
        assert first in " ".join(sections[name].split()), f"the first sentence of {name} differs"
    for code, meaning in EXIT_CODES.items():
        assert f"| {code} | {meaning} |" in page
