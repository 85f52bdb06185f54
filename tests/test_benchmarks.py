"""The kernel benchmarks: what they count, how they measure, that their control flow holds, what is made of it."""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "docs" / "benchmarks"
sys.path.insert(0, str(FOLDER))  # they are scripts, which import each other by name

import cases  # noqa: E402
import cpu  # noqa: E402
import gpu  # noqa: E402
import measure  # noqa: E402
import shapes  # noqa: E402
import tables  # noqa: E402

H200 = shapes.Peaks(flops=780e12, bandwidth=4.3e12)
CPU_GOALS = {"window", "dense", "sparse", "linear", "decode", "peak", "model"}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield 1
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------- what it counts


@pytest.mark.parametrize(
    ("shape", "causal", "dense", "linear"),
    [
        (shapes.grid("FLUX", 24, (4608,)), False, 0.335, 0.026),
        (shapes.WAN_480, False, 8.45, 0.094),
        (shapes.WAN_720, False, 45.0, 0.216),
        (shapes.llama(8192), True, 0.705, 0.039),
        (shapes.llama(131072), True, 180, 0.624),
    ],
    ids=lambda x: x.model if isinstance(x, shapes.Shape) else "",
)
def test_floors_are_those_worked_out_by_hand(shape, causal, dense, linear):
    flops = shapes.attention_flops(shape, shapes.dense_pairs(shape.tokens, causal))
    assert H200.floor_ms(flops, shapes.attention_bytes(shape)) == pytest.approx(dense, rel=0.02)
    assert H200.floor_ms(0.0, shapes.attention_bytes(shape)) == pytest.approx(linear, rel=0.02)
    assert shapes.Peaks().floor_ms(flops, 1.0) is None


def test_decode_floors_are_the_bytes_of_the_cache():
    times = [H200.floor_ms(0.0, shapes.cache_bytes(shapes.llama(n), n)) for n in (8192, 32768, 131072)]
    assert times == pytest.approx([7.8e-3, 31e-3, 125e-3], rel=0.02)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("tokens", "size"), [(37, 1), (37, 9), (37, 37), (5, 9)])
def test_pairs_of_a_window_are_those_one_counts(tokens, size, causal):
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)
    near = ((i - j < size) & (j <= i)) if causal else (i - j).abs() < size
    assert shapes.window_pairs(tokens, size, causal) == int(near.sum())
    if causal:
        assert shapes.window_pairs(tokens, size, True, 3) == int((near | ((j < 3) & (j <= i))).sum())


def test_a_window_of_ten_percent_is_one():
    for tokens in (4608, 66048, 75600):
        size = shapes.window_of(tokens, 0.1)
        assert shapes.window_pairs(tokens, size, False) / tokens**2 == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize("causal", [False, True])
def test_random_lists_have_their_density_and_their_transpose(causal):
    shape = shapes.Shape(model="x", tokens=1000, heads=4, kv_heads=2, dim=16)
    lists = cases.random_blocks(shape, 0.25, "cpu", (128, 64), causal=causal)

    def named(starts, counts, columns, width):
        out = torch.zeros(*starts.shape, width, dtype=torch.bool)
        for place in torch.cartesian_prod(*(torch.arange(n) for n in starts.shape)):
            at = tuple(place.tolist())
            found = columns[starts[at] : starts[at] + counts[at]].long()
            assert (found.diff() > 0).all()
            out[at][found] = True
        return out

    there = named(lists.starts, lists.counts, lists.columns, 16)  # (1, 2, 8, 16)
    turned = named(lists.t_starts, lists.t_counts, lists.t_columns, 8)
    assert torch.equal(there, turned.transpose(-1, -2))
    assert not torch.equal(there[0, 0], there[0, 1])
    if causal:
        first, last = torch.arange(8)[:, None] * 2, torch.arange(8)[:, None] * 2 + 1
        assert not there[..., torch.arange(16) > last].any()
        assert there[..., (torch.arange(16) >= first) & (torch.arange(16) <= last)].all()
    else:
        assert (there.sum(-1) == 4).all()


# -------------------------------------------------------------------------------------------------- how it measures


def group_of(calls, phase=measure.FORWARD, **entries):
    """Entries that note their names in `calls` and return 1; a function stands for what else is to happen."""
    group = measure.Group(phase=phase, dtype="fp32", shape=shapes.smollm2(64))
    for name, more in entries.items():
        act = more.pop("act", lambda: torch.ones(4))

        def run(name=name, act=act):
            calls.append(name)
            return act()

        group.add("case", name, lambda run=run: run, **more)
    return group


def measured(group, **more):
    more = {"seconds": 0, "rounds": (4, 4), "sample_ms": 0, **more}
    return {row["provider"]: row for row in measure.measure(group, measure.Wall(), **more)}


def test_providers_take_turns_and_another_begins_each_time():
    calls = []
    measured(group_of(calls, a={}, b={}, c={}))
    assert "".join(calls) == "aabbcc" + "abc" + "bca" + "cab" + "abc"  # twice each to warm up


def test_a_row_has_the_median_the_quantiles_and_the_ratio_to_the_faster_baseline():
    nap = lambda seconds: lambda: time.sleep(seconds) or torch.ones(4)  # noqa: E731
    rows = measured(
        group_of(
            [],
            slow={"act": nap(0.06)},
            base={"act": nap(0.03)},
            mine={
                "act": nap(0.01),
                "baseline": ("slow: case", "base: case"),
                "dense": "base: case",
                "density": 0.1,
                "flops": 1e9,
                "moved": 0.0,
                "goal": "window",
            },
        ),
        peaks=shapes.Peaks(flops=1e12, bandwidth=1e12),
        machine="avx512bf16",
    )
    row = rows["mine"]
    assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
    assert row["samples"] == 4
    assert row["baseline"] == "base: case"
    assert row["ratio"] == pytest.approx(rows["base"]["median_ms"] / row["median_ms"], rel=1e-3)
    assert row["ideal"] == pytest.approx(0.1 * rows["base"]["median_ms"] / row["median_ms"], rel=1e-3)
    assert row["peak_share"] == row["roofline"] == pytest.approx(1 / row["median_ms"], rel=1e-3)
    assert (row["goal"], row["target"], row["met"]) == ("window", 25, False)
    assert row["cpu_ms"] < row["median_ms"]  # it slept
    json.dumps(rows)


def test_what_fails_keeps_its_row_and_costs_no_other():
    def broken():
        raise RuntimeError("out of memory\nand more")

    calls = []
    rows = measured(group_of(calls, bad={"act": broken, "goal": "dense"}, left={"skip": "no compiler"}, good={}))
    assert rows["bad"]["median_ms"] is None
    assert rows["bad"]["note"].startswith("RuntimeError: out of memory; no ratio")
    assert rows["bad"]["met"] is None
    assert rows["left"]["note"] == "not measured: no compiler"
    assert "left" not in calls
    assert rows["good"]["samples"] == 4


def test_what_takes_too_long_is_timed_once(monkeypatch):
    monkeypatch.setattr(measure, "ONCE_S", 1.0)
    calls = []
    rows = measured(group_of(calls, slow={"act": lambda: time.sleep(1.1) or torch.ones(4)}, quick={}))
    assert calls.count("slow") == 1
    assert rows["slow"]["samples"] == 1
    assert rows["slow"]["note"] == "timed once"
    assert 1100 <= rows["slow"]["median_ms"] < 5000
    assert rows["quick"]["samples"] == 4


def test_what_only_the_first_call_does_is_not_timed():
    naps = iter([0.3])
    rows = measured(group_of([], lazy={"act": lambda: time.sleep(next(naps, 0)) or torch.ones(4)}))
    assert rows["lazy"]["p80_ms"] < 100
    assert rows["lazy"]["samples"] == 4


def test_what_fails_later_keeps_no_half_of_a_result():
    state = iter([torch.ones(4)] * 3)
    rows = measured(group_of([], bad={"act": lambda: next(state)}, good={}))
    assert rows["bad"]["median_ms"] is None
    assert "StopIteration" in rows["bad"]["note"]


def test_a_result_that_differs_is_called_wrong():
    rows = measured(
        group_of(
            [],
            truth={},
            close={"same": "truth: case", "act": lambda: torch.ones(4) + 1e-5},
            wrong={"same": "truth: case", "act": lambda: torch.full((4,), 1.1)},
            nan={"same": "truth: case", "act": lambda: torch.full((4,), torch.nan)},
        )
    )
    assert "WRONG" not in rows["close"]["note"]
    assert rows["wrong"]["difference"] == pytest.approx(0.1, rel=1e-3)
    assert "WRONG: differs from truth: case by 0.1" in rows["wrong"]["note"]
    assert "WRONG" in rows["nan"]["note"]


def test_a_lost_device_ends_the_group_and_says_who_did_it(monkeypatch):
    monkeypatch.setattr(measure.Wall, "alive", lambda self: "illegal memory access")
    with pytest.raises(measure.Poisoned, match="illegal memory access") as caught:
        measured(group_of([], good={}, bad={"act": lambda: 1 / 0}))
    assert caught.value.entry == "bad: case"


def test_gradients_are_wanted_only_where_they_are_measured():
    x = torch.ones(4, requires_grad=True)
    seen = []
    for phase in (measure.FORWARD, measure.BOTH):
        measured(group_of([], phase, a={"act": lambda: seen.append((x * 2).requires_grad) or x}))
        assert seen.pop() is (phase == measure.BOTH)


@pytest.mark.parametrize(
    ("goal", "value", "machine", "met"),
    [
        ("window", 30, "avx512bf16", True),
        ("window", 20, "avx512bf16", False),
        ("window", 30, "avx2", None),
        ("peak", 0.7, "avx2", True),
        ("h200-window", 8, "NVIDIA H200", True),
        ("h200-window", 8, "NVIDIA H100 80GB HBM3", None),
        ("h200-window", None, "NVIDIA H200", None),
    ],
)
def test_a_target_is_judged_only_on_the_machine_it_was_set_for(goal, value, machine, met):
    row = {"note": "", "ratio": None, "ideal": None, "peak_share": None, shapes.GOALS[goal].field: value}
    shapes.judge(row, goal, machine)
    assert row["met"] is met
    assert (met is None) == bool(row["note"])
    if machine == "avx2" and met is None:
        assert row["note"] == "target set for AVX512-BF16; this machine has AVX2"


# ---------------------------------------------------------------------------------------------------------- the CPU


@pytest.fixture(scope="module")
def quick():
    before = torch.get_num_threads()
    found = cpu.measured(1, 5, True)
    torch.set_num_threads(before)
    return found


def test_a_quick_run_has_every_target_of_the_cpu_and_plain_rows(quick, tmp_path):
    tables.save(quick, tmp_path / "cpu.json")
    again = json.loads((tmp_path / "cpu.json").read_text())
    assert again == quick
    rows = quick["rows"]
    assert {row["goal"] for row in rows if "goal" in row} == CPU_GOALS
    needed = {"case", "provider", "pass", "dtype", "shape", "median_ms", "p20_ms", "p80_ms", "ratio"}
    needed |= {"baseline", "target", "met", "note", "samples"}
    assert all(needed <= row.keys() for row in rows)
    assert all(row["median_ms"] is not None or row["note"] for row in rows)
    assert [row["note"] for row in rows if "WRONG" in row["note"]] == []
    failed = [row for row in rows if row["provider"] in ("SDPA", "torch") and row["median_ms"] is None]
    assert [(row["case"], row["note"]) for row in failed] == []
    assert {row["pass"] for row in rows} == {measure.FORWARD, measure.BOTH, measure.DECODE}
    assert quick["machine"]["threads"] == 1
    assert quick["machine"]["instruction_set"] in shapes.LEVELS
    assert quick["gemm_gflops"]["torch fp32"] > 0


def test_the_full_run_measures_each_target_at_8k_in_bf16():
    found = {entry.goal: group for group in cpu.groups(False) for entry in group.entries if entry.goal}
    assert set(found) == CPU_GOALS - {"peak", "model"}  # which have rows of their own
    assert {(group.shape.tokens, group.dtype) for group in found.values()} == {(8192, "bf16")}
    lengths = {(g.shape.tokens, g.dtype) for g in cpu.groups(False) if g.phase == measure.FORWARD}
    assert lengths == {(n, d) for n in (1024, 4096, 8192, 16384) for d in ("bf16", "fp32")}


def test_when_the_time_is_over_the_rest_is_said_not_to_be_measured(threads):
    found = cpu.measured(threads, 0, True)
    notes = {row["note"].split("; ")[-1] for row in found["rows"] if row["median_ms"] is None and "goal" not in row}
    assert "not measured: the 0 minutes of this run were over" in notes
    assert {row["goal"] for row in found["rows"] if "goal" in row} == CPU_GOALS
    assert not any(row["met"] for row in found["rows"])


def test_a_quick_run_never_takes_the_place_of_the_results(capsys):
    with pytest.raises(SystemExit):
        cpu.main(["--quick"])
    assert "name another file with --out" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- the GPU


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """All sections, dry, in this process; and what the parent makes of them."""
    folder = tmp_path_factory.mktemp("gpu")
    rows = []
    for name in gpu.SECTIONS:
        out = folder / f"{name}.jsonl"
        assert (
            gpu.main(["--work", name, "--dry", "--out", str(out), "--seconds", "60", "--machine", "NVIDIA H200"]) == 0
        )
        rows += [row for line in out.read_text().splitlines() for row in json.loads(line).get("rows", [])]
    machine = {"device": "NVIDIA H200", "flops": 7.8e14, "bandwidth": 4.3e12}
    check = {"how": "built-in check against fp64", "passed": 3, "failed": ["decode: AssertionError: no"]}
    return {
        "kind": "gpu",
        "date": "2026-01-01",
        "machine": machine,
        "versions": {"torch": "2", "triton": "3"},
        "check": check,
        "seconds": 3,
        "rows": rows,
    }


def test_a_dry_run_goes_through_every_section(dry):
    rows = dry["rows"]
    assert {row["goal"] for row in rows if "goal" in row} == {name for name in shapes.GOALS if name.startswith("h200")}
    unmeasured = [row["note"] for row in rows if row["median_ms"] is None]
    assert all("this is a dry run" in note for note in unmeasured)
    assert [row["note"] for row in rows if "WRONG" in row["note"]] == []
    assert {row["provider"] for row in rows} >= {"torch", "SDPA cuDNN", "varlen", "FlexAttention", "NATTEN"}
    models = {row["shape"]["model"] for row in rows}
    assert models == {"FLUX 4096²", "FLUX 1024²", "Wan-1.3B 720p", "Wan-1.3B 480p", "Llama-3-8B", "SmolLM2-135M"}


def test_the_shapes_of_the_gpu_are_those_of_the_models():
    sizes = [shapes.FLUX_1024, shapes.FLUX_4096, shapes.WAN_480, shapes.WAN_720]
    assert [s.tokens for s in sizes] == [4608, 66048, 32760, 75600]
    assert {(s.heads, s.dim) for s in sizes} == {(24, 128), (12, 128)}


def test_the_targets_of_video_and_images_are_measured_at_their_full_size():
    import gpu_cases

    place = gpu_cases.Place(device="cpu")
    made = [group for name in ("flux", "wan") for group in gpu_cases.MAKERS[name](place)]  # nothing runs yet
    found = [(e.goal, g.shape.model, round(e.density or 0, 2)) for g in made for e in g.entries if e.goal]
    sparse = [("h200-sparse", model, share) for model in ("FLUX 4096²", "Wan-1.3B 720p") for share in (0.1, 0.25, 0.5)]
    assert sorted(found) == sorted(
        [*sparse, ("h200-window", "FLUX 4096²", 0.1), ("h200-sla", "Wan-1.3B 720p", 0.0)],
    )
    assert {g.phase for g in made} == {measure.FORWARD, measure.BOTH}


def test_a_gpu_run_from_its_command_writes_a_file_and_a_table(tmp_path):
    command = [sys.executable, FOLDER / "gpu.py", "--dry", "--only", "decode", "--no-check", "--results", tmp_path]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "dry-run.json").read_text())
    assert found["kind"] == "gpu"
    assert {row["pass"] for row in found["rows"]} == {measure.DECODE}
    assert "correctness: left out" in done.stdout
    assert done.stdout.rstrip().endswith(f"{len(found['rows'])} rows in {found['seconds']} s")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the test wants to be missing")
def test_without_a_device_a_gpu_run_says_so_and_writes_nothing(tmp_path):
    command = [sys.executable, str(FOLDER / "gpu.py"), "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no CUDA device that works: exit status 1" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_where_the_package_is_not_installed_it_comes_from_the_clone(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = gpu.environment(tmp_path)
    assert found["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path)
    assert (tmp_path / "attnconvert" / "kernels" / "problem.py").exists()
    assert "TRITON_INTERPRET" not in found


class Script:
    """Takes the place of the processes of a section: exit statuses with what was written."""

    def __init__(self, tmp_path, *runs):
        self.runs, self.commands = list(runs), []
        given = argparse.Namespace(dry=True, minutes=1, no_check=True, only=None)
        self.run = gpu.Run(given, tmp_path)
        self.run.start = self.start

    def start(self, what, seconds, *more):
        self.commands.append(" ".join(more))
        return self.runs.pop(0)


def test_a_kernel_that_loses_the_device_costs_only_its_own_case(tmp_path):
    begun = [{"group": 0, "title": "t0"}, {"rows": [{"case": "a"}]}, {"group": 1, "title": "t1"}, {"at": "triton: x"}]
    lost = [*begun, {"poisoned": "triton: x", "error": "RuntimeError: illegal memory access"}]
    script = Script(tmp_path, (gpu.POISONED, lost), (0, [{"group": 1, "title": "t1"}, {"rows": [{"case": "b"}]}]))
    rows = script.run.section("flux", 60)
    assert [row["case"] for row in rows] == ["a", "x", "b"]
    assert rows[1]["note"] == "RuntimeError: illegal memory access"
    assert "--skip 0" in script.commands[0]
    assert "--skip 1" in script.commands[1]
    assert "--without=triton: x" in script.commands[1]


def test_a_section_that_hangs_or_dies_keeps_what_it_had(tmp_path):
    hung = [{"group": 0, "title": "t0"}, {"rows": [{"case": "a"}]}, {"group": 1, "title": "t1"}, {"at": "triton: x"}]
    rows = Script(tmp_path, (None, hung)).run.section("wan", 60)
    assert [(row["case"], row.get("note")) for row in rows[:2]] == [("a", None), ("x", "took too long")]
    assert rows[2]["note"] == "what was left of the section was not measured"
    script = Script(tmp_path, *[(-11, [])] * gpu.STARTS)
    rows = script.run.section("wan", 60)
    assert "the process ended with -11" in rows[0]["note"]
    assert len(script.commands) == gpu.STARTS


def test_a_process_that_takes_too_long_is_ended():
    start = time.monotonic()
    assert gpu.call([sys.executable, "-c", "import time; time.sleep(60)"], 1) is None
    assert gpu.call([sys.executable, "-c", "raise SystemExit(3)"], 30) == 3
    assert time.monotonic() - start < 30


def test_what_pytest_says_is_read():
    text = "....F\nFAILED tests/test_x.py::test_a - AssertionError: off\n1 failed, 4 passed, 2 skipped in 3.21s\n"
    found = gpu.pytest_result(text, 1, 100)
    assert (found["passed"], found["skipped"], "stopped_after_s" in found) == (4, 2, False)
    assert found["failed"] == ["tests/test_x.py::test_a - AssertionError: off"]
    assert gpu.pytest_result("ImportError: no module\n", 4, 100)["failed"] == ["pytest ended with 4"]
    cut = gpu.pytest_result("..........[ 20%]\n....", None, 100)
    assert (cut["passed"], cut["failed"], cut["stopped_after_s"]) == (14, [], 100)


def test_the_built_in_check_finds_a_kernel_that_is_wrong(monkeypatch):
    import gpu_check

    from attnconvert.kernels import dispatch

    fine = gpu_check.run("torch", "cpu", True)
    assert fine["failed"] == []
    assert fine["passed"] > 8
    module = dispatch.backend("torch")
    true = module.linear_forward
    monkeypatch.setattr(module, "linear_forward", lambda p: (true(p)[0] * 1.05, *true(p)[1:]))
    assert [name.split(",")[0] for name in gpu_check.run("torch", "cpu", True)["failed"]] == ["linear", "linear"]


# --------------------------------------------------------------------------------------------------- what is made of it


def test_the_page_has_every_target_and_says_what_was_not_measured(quick, dry, tmp_path):
    def lines():
        found = tables.goals(tmp_path, (3, ["kernel x on sm_90 spills 8 bytes"], 3))
        return [line for line in found if line.startswith("| ") and not line.startswith("| where")]

    empty = lines()
    assert len(empty) == len(shapes.GOALS) + 1
    assert sum("not measured" in line for line in empty) == len(shapes.GOALS)
    assert "| 2 of 3 | **no** (kernel x on sm_90 spills 8 bytes) |" in "\n".join(empty)
    tables.save(quick, tmp_path / "cpu.json")
    tables.save(dry, tmp_path / "h200.json")
    recipe = {"speed": {"8192": {"prefill_speedup": 3.25}}, "backend": "auto"}
    (tmp_path / f"{tables.RECIPE}.json").write_text(json.dumps(recipe))
    full = "\n".join(lines())
    assert "whole model, bf16 | 3× | 3.25×" in full
    assert re.search(r"window at 10 % density against cuDNN \| 7× \| [\d.]+× \|", full)
    assert "causal linear 32k against flash-linear-attention | 1.2× | not measured" in full
    if quick["machine"]["instruction_set"] == "avx2":
        assert full.count("target set for AVX512-BF16; this machine has AVX2") >= 5  # more where a ratio fell short


def test_of_several_rows_of_a_target_the_worst_counts():
    def found(*values):
        return [{"rows": [{"goal": "h200-sparse", "ideal": v, "met": v and v > 0.85, "note": "x"} for v in values]}]

    assert tables._row_of(found(0.9, 0.8, 0.95), "h200-sparse")["ideal"] == 0.8
    assert tables._row_of(found(0.9, None), "h200-sparse")["ideal"] is None
    assert tables._row_of(found(), "h200-sparse") is None


def test_tables_are_whole_markdown(quick, dry):
    for lines in (tables.cpu(quick), tables.gpu(dry), tables.no_gpu()):
        widths = [line.count("|") - line.count("\\|") for line in lines if line.startswith("|")]
        heads = [n for n, line in enumerate(lines) if line.startswith("|---")]
        assert all(lines[n].count("|") == lines[n - 1].count("|") for n in heads)
        assert all(w > 2 for w in widths)
        assert "None" not in "\n".join(lines)
    text = "\n".join(tables.gpu(dry))
    assert "**1 failed**: decode: AssertionError: no" in text
    assert "[1] not measured: this is a dry run" in text


def test_the_short_table_fits_on_a_screen_and_ends_with_the_targets(dry):
    lines = tables.short(dry)
    assert max(map(len, lines)) <= 130
    assert len("\n".join(lines)) < 12_000
    assert sum("target" in line for line in lines[-4:]) == 4


def test_the_committed_page_can_be_made():
    import run

    assert run.page().startswith("# Benchmarks\n")
