"""Costs add up to what was timed, what was not timed is filled in and marked, and a foreign table is refused."""

import dataclasses
import json

import pytest
import torch
from models import tiny

from attnconvert.convert import costs_measure
from attnconvert.convert.costs import (
    Costs,
    analytic,
    check_summary,
    costs_document,
    costs_table,
    kind,
    plan_cost,
    require_costs,
)
from attnconvert.convert.costs_measure import here, measure_costs
from attnconvert.convert.costs_model import Layer, Model, Row, derive, fit, group_work, line
from attnconvert.convert.errors import UsageError
from attnconvert.convert.evaluation import costs as counted_costs
from attnconvert.convert.hosts.models import find_sites
from attnconvert.convert.hosts.sites import Site
from attnconvert.convert.progress import silent
from attnconvert.kernels import operators
from attnconvert.kernels.call import Call, Cost, state_bytes
from attnconvert.kernels.spec import Full, Hybrid, Linear, Retention, Window

SITE = Site("layers.0.attn", 0, 6, 3, 8)
OTHER = Site("layers.1.attn", 1, 6, 3, 8)
OWN = Site("layers.2.attn", 2, 6, 3, 8, limit=24)
WIDE, NARROW = Window(size=32, sinks=2), Window(size=16, sinks=2)
SPECS = [WIDE, NARROW, Linear(), Hybrid(window=16, sinks=2), Retention(window=16, keep=8, sinks=2, block=4)]
LENGTHS = (64, 128, 256)
LAUNCH = {"mixed": 0.002, "linear": 0.003, "retention": 0.005}  # seconds
FLOP, BYTE = 1e-8, 1e-7  # seconds


class Clock:
    """Time passes only while attention runs, and as the roofline says."""

    def __init__(self, monkeypatch, stop_after=None):
        self.now, self.calls, self.stop_after = 0.0, 0, stop_after
        real = operators.attend_all

        def attend_all(uses, q, k, v, call, states):
            self.calls += 1
            if self.stop_after is not None and self.calls > self.stop_after:
                raise KeyboardInterrupt
            layer = Layer(q.shape[1] // k.shape[1], k.shape[1], q.shape[3], call.limit)
            phase, length = ("prefill", q.shape[2]) if call.seen == 0 else ("decode", call.seen // 16 * 16)
            self.now += true_seconds(phase, layer, uses[0].spec, length, k.shape[1])
            return real(uses, q, k, v, call, states)

        monkeypatch.setattr(costs_measure.operators, "attend_all", attend_all)

    def __call__(self):
        return self.now


def true_seconds(phase, layer, spec, length, groups):
    work = group_work(phase, layer, spec, length, 4)
    return LAUNCH[kind(spec)] + groups * max(work.flops * FLOP, work.bytes * BYTE)


def measured(monkeypatch, folder, *, lengths=LENGTHS, specs=SPECS, sites=(SITE, OTHER), clock=None, **more):
    settings = {"batch": 1, "dtype": "float32", "device": "cpu", "repeats": 1, "track": silent}
    clock = clock or Clock(monkeypatch)
    return measure_costs(list(sites), specs, lengths=lengths, folder=folder, clock=clock, **{**settings, **more})


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return measured(patch, tmp_path_factory.mktemp("costs"))


def layer_cost(costs, resource, spec, length, site=SITE):
    return plan_cost(costs, resource, {site: [spec] * site.kv_heads}, length)


@pytest.mark.parametrize("spec", [Full(), *SPECS], ids=str)
@pytest.mark.parametrize(("resource", "phase"), [("prefill_ms", "prefill"), ("decode_ms", "decode")])
def test_a_layer_costs_what_was_timed(table, spec, resource, phase):
    for length in LENGTHS:
        want = 1e3 * true_seconds(phase, Layer.of(SITE), spec, length, 3)
        assert layer_cost(table, resource, spec, length) == pytest.approx(want, rel=1e-6)
        assert table.measured(resource, SITE, spec, length)


def test_a_prefill_has_a_launch_for_each_kind_in_each_layer(table):
    for name, seconds in LAUNCH.items():
        assert table.launch_cost("prefill_ms", SITE, name, 128) == pytest.approx(1e3 * seconds, rel=1e-6)

    def cost(*plan):
        return plan_cost(table, "prefill_ms", dict(zip((SITE, OTHER), plan, strict=False)), 128)

    groups = {spec: table.group_cost("prefill_ms", SITE, spec, 128) for spec in (Full(), WIDE, NARROW, Linear())}
    one_launch = cost([Full(), WIDE, NARROW])  # of one kind
    assert one_launch == pytest.approx(2.0 + groups[Full()] + groups[WIDE] + groups[NARROW])
    assert cost([Full(), WIDE, Linear()]) == pytest.approx(5.0 + groups[Full()] + groups[WIDE] + groups[Linear()])
    assert cost([WIDE] * 3, [WIDE] * 3) == pytest.approx(2 * cost([WIDE] * 3)), "once per layer"


def test_in_decoding_the_operators_of_a_layer_share_a_launch(table):
    extra = {name: table.launch_cost("decode_ms", SITE, name, 128) for name in LAUNCH}
    assert extra == pytest.approx({"mixed": 0.0, "linear": 1.0, "retention": 3.0}, abs=1e-5)
    both = plan_cost(table, "decode_ms", {SITE: [Full(), Full(), Linear()]}, 128)
    apart = sum(n * table.group_cost("decode_ms", SITE, spec, 128) for spec, n in ((Full(), 2), (Linear(), 1)))
    assert both == pytest.approx(apart + 1.0, rel=1e-6)


def test_what_was_not_timed_is_filled_in_and_marked(table):
    for resource, phase in (("prefill_ms", "prefill"), ("decode_ms", "decode")):
        for spec in (Full(), WIDE, Linear()):
            want = 1e3 * true_seconds(phase, Layer.of(SITE), spec, 4096, 3)
            assert layer_cost(table, resource, spec, 4096) == pytest.approx(want, rel=0.02)
            assert not table.measured(resource, SITE, spec, 4096)
        unseen = Window(size=64, sinks=2)
        want = 1e3 * true_seconds(phase, Layer.of(SITE), unseen, 256, 3)
        assert layer_cost(table, resource, unseen, 256) == pytest.approx(want, rel=0.02)
        assert not table.measured(resource, SITE, unseen, 256)
    assert not table.measured("kv_bytes", SITE, WIDE, 256)


def test_the_model_is_held_against_what_it_did_not_see(table):
    rows = table.check()
    assert {row["left_out"] for row in rows} == {"length", "operator"}
    assert {row["resource"] for row in rows} == {"prefill_ms", "decode_ms"}
    assert len(rows) == 2 * len(LENGTHS) * (1 + 2 * len(SPECS)), "full attention is always timed"
    assert check_summary(r for r in rows if r["left_out"] == "length")["prefill_ms, length left out"]["median"] < 1.01
    slower = tuple(dataclasses.replace(row, ms=row.ms * (5 if row.length == 128 else 1)) for row in table.rows)
    rows = dataclasses.replace(table, rows=slower).check()
    ratios = [row["ratio"] for row in rows if row["length"] == 128 and row["left_out"] == "length"]
    assert ratios == pytest.approx([1 / 5] * len(ratios), rel=0.02), "an outlier does not predict itself"
    assert check_summary(rows)["prefill_ms, length left out"]["worst"] > 4.9


def test_the_roofline_is_found_again():
    points = []
    for n in (1, 3, 8):
        for flops, moved in ((1e6, 1e3), (1e7, 1e3), (1e3, 1e6), (1e3, 1e7), (1e8, 1e8), (1e9, 1e5)):
            work = Cost(flops=flops, bytes=moved, state_bytes=0)
            points.append((n, work, 0.25 + n * max(flops / 4e6, moved / 2e6)))
    rates = fit(points)
    assert rates.launch == pytest.approx(0.25, rel=1e-5)
    assert 1 / rates.per_flop == pytest.approx(4e6, rel=1e-5)
    assert 1 / rates.per_byte == pytest.approx(2e6, rel=1e-5)


def test_a_launch_below_zero_is_taken_as_zero_and_said(table):
    layer = Layer(2, 3, 8)
    rows = [Row("prefill", layer, Full(), n, 64, ms, 3) for n, ms in ((1, 1.0), (3, 4.0))]
    found = derive(rows)
    assert found.launch["mixed"] == 0.0
    assert found.clamped == {"mixed"}
    assert 1.0 < found.group[Full()] < 4 / 3
    assert (
        "launch of mixed attention came out below 0 ms at 64 tokens"
        in dataclasses.replace(table, rows=tuple(rows)).notes[0]
    )
    alone = derive([Row("prefill", Layer(6, 1, 8), spec, 1, 64, ms, 3) for spec, ms in ((Full(), 5.0), (WIDE, 2.0))])
    assert (alone.launch["mixed"], alone.group) == (0.0, pytest.approx({Full(): 5.0, WIDE: 2.0}))
    assert not alone.clamped, "with one KV group there is nothing to tell"


def test_a_busy_machine_is_said(table):
    assert not any("busy" in note for note in table.notes)
    rows = tuple(dataclasses.replace(row, spread=0.4, samples=5) for row in table.rows)
    assert any("busy: half the samples of a layer lie 40%" in n for n in dataclasses.replace(table, rows=rows).notes)


def test_an_interrupted_measurement_continues(monkeypatch, tmp_path):
    few = {"specs": [WIDE, Linear()], "lengths": (64, 128)}
    whole = Clock(monkeypatch)
    want = measured(monkeypatch, tmp_path / "whole", clock=whole, **few)
    monkeypatch.undo()
    with pytest.raises(KeyboardInterrupt):
        measured(monkeypatch, tmp_path / "cut", clock=Clock(monkeypatch, stop_after=whole.calls * 2 // 3), **few)
    monkeypatch.undo()
    files = sorted(tmp_path.glob("cut/*/*.json"))
    finished = [path for path in files if json.loads(path.read_text()).get("repeats")]
    assert finished
    before = {path: path.read_text() for path in finished}
    rest = Clock(monkeypatch)
    got = measured(monkeypatch, tmp_path / "cut", clock=rest, **few)
    assert rest.calls < whole.calls * 2 // 3
    assert {path: path.read_text() for path in finished} == before
    assert [(r.phase, r.spec, r.groups, r.length) for r in got.rows] == [
        (r.phase, r.spec, r.groups, r.length) for r in want.rows
    ]
    assert [r.ms for r in got.rows] == pytest.approx([r.ms for r in want.rows])
    again = Clock(monkeypatch)
    assert measured(monkeypatch, tmp_path / "cut", clock=again, **few) == got
    assert again.calls == 0
    measured(monkeypatch, tmp_path / "cut", clock=again, specs=[WIDE, Linear(), NARROW], lengths=(64, 128))
    assert 0 < again.calls < whole.calls / 2, "an operator that is added is timed alone"


def test_cheap_calls_are_sampled_more(table):
    samples = {(r.spec, r.length): r.samples for r in table.rows if r.phase == "prefill" and r.groups == 3}
    assert samples[NARROW, 64] == costs_measure.MOST
    assert all(1 <= n <= costs_measure.MOST for n in samples.values())
    bench = costs_measure.Bench(1, torch.float32, torch.device("cpu"), lambda: 0.0, 5)
    assert [bench._enough(once) for once in (1e-4, 0.05, 3.0, 60.0)] == [20, 10, 5, 2]


def test_bytes_and_flops_are_those_of_the_evaluation():
    plan = {SITE: [Full(), WIDE, Linear()], OTHER: [Hybrid(window=16, sinks=2), SPECS[-1], NARROW], OWN: [Full()] * 3}
    for length in (10, 100, 1000):
        want = counted_costs(plan, length, 2)
        for batch in (1, 4):
            costs = analytic(plan, SPECS, [length], batch, 2)
            for resource in ("kv_bytes", "flops"):
                assert plan_cost(costs, resource, plan, length) == pytest.approx(batch * want[resource])
                assert costs.base(resource, length) == 0.0
    own = costs.group_cost("kv_bytes", OWN, Full(), 1000)
    assert own == costs.group_cost("kv_bytes", SITE, Window(size=24, sinks=0), 1000)


@pytest.mark.parametrize("spec", [Full(), *SPECS], ids=str)
def test_bytes_are_what_the_states_hold(spec):
    length, batch = 96, 2
    q, k = torch.randn(batch, SITE.heads, length, SITE.dim), torch.randn(batch, SITE.kv_heads, length, SITE.dim)
    learned = operators.of(spec).parameters(spec, SITE.heads, SITE.kv_heads, SITE.dim)
    with torch.no_grad():
        _, state = operators.attend(spec, q, k, k, Call(scale=1.0), None, learned)
    held = state_bytes(state) - (state.sink_at.numel() * 8 if hasattr(state, "sink_at") else 0)
    if spec == Full():  # which has room for more tokens
        held = held * length // state.k.shape[2]
    counted = plan_cost(analytic([SITE], [spec], [length], batch, 4), "kv_bytes", {SITE: [spec] * 3}, length)
    assert held == counted


def test_times_need_a_measurement():
    costs = analytic([SITE], SPECS, LENGTHS, 1, 2)
    with pytest.raises(UsageError, match="decode_ms is not known: no time was measured here; run `attnconvert costs`"):
        plan_cost(costs, "decode_ms", {SITE: [WIDE] * 3}, 64)
    with pytest.raises(UsageError, match="holds no times"):
        require_costs(costs, here("cpu"), "float32", 1)
    with pytest.raises(ValueError, match="no resource 'ms'"):
        costs.group_cost("ms", SITE, WIDE, 64)


def test_a_table_of_another_machine_dtype_batch_or_model_is_refused(table):
    require_costs(table, here("cpu"), "float32", 1, [SITE, OTHER])
    for machine, dtype, batch, sites, message in (
        ({**here("cpu"), "cpu": "Z80"}, "float32", 1, None, "another machine: cpu was .* here it is 'Z80'"),
        ({**here("cpu"), "threads": 99}, "float32", 1, None, "another machine: threads was .* here it is 99"),
        ({**here("cpu"), "device": "cuda"}, "float32", 1, None, "device was 'cpu', here it is 'cuda'"),
        (here("cpu"), "bfloat16", 1, None, "with dtype float32, this asks for bfloat16; run `attnconvert costs`"),
        (here("cpu"), "float32", 8, None, "with batch 1, this asks for 8"),
        (here("cpu"), "float32", 1, [SITE, OWN], "for another model"),
    ):
        with pytest.raises(UsageError, match=message):
            require_costs(table, machine, dtype, batch, sites)
    require_costs(table, {**here("cpu"), "gpu": ["a GPU that stands by"]}, "float32", 1)


def test_the_table_goes_through_json(table):
    again = Costs.from_json(json.loads(json.dumps(table.to_json())))
    assert again == table
    with pytest.raises(UsageError, match="no table of costs"):
        Costs.from_json({"schema": 0})


def test_layers_with_a_window_of_their_own_are_timed_with_it(monkeypatch, tmp_path):
    costs = measured(monkeypatch, tmp_path, sites=[SITE, OWN], specs=[NARROW, Linear()], lengths=(64,))
    assert {row.spec for row in costs.rows if row.layer.limit} == {Full(), NARROW}, "no operator that reads beyond it"
    own, full = (layer_cost(costs, "prefill_ms", Full(), 64, site) for site in (OWN, SITE))
    assert own < full


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_the_rest_of_the_model_is_timed_without_attention(monkeypatch, tmp_path, name):
    model = tiny(name)
    sites = find_sites(model)
    ids = torch.arange(7)[None]
    with torch.no_grad():
        before = model(ids).logits
    clock = Clock(monkeypatch)
    lengths = []

    def passing(module, args, kwargs):
        cache = kwargs["past_key_values"]
        seen = 0 if cache is None else cache.get_seq_length()
        lengths.append(seen)
        clock.now += 0.1 * kwargs["input_ids"].shape[1]

    hook = model.model.register_forward_pre_hook(passing, with_kwargs=True)
    costs = measured(
        monkeypatch, tmp_path, sites=sites, specs=[Window(size=4, sinks=1)], lengths=(16, 32), model=model,
        clock=clock,
    )  # fmt: skip
    hook.remove()
    assert costs.base("prefill_ms", 16) == pytest.approx(1600)
    assert costs.base("prefill_ms", 64) == pytest.approx(6400), "filled in"
    assert costs.base("decode_ms", 32) == pytest.approx(100)
    assert set(lengths) == {0, *range(16, 48)}, "the cache counts what it does not hold"
    plan = {site: [Full()] * site.kv_heads for site in sites}
    attention = sum(plan_cost(costs, "prefill_ms", {s: g}, 16) - 1600 for s, g in plan.items())
    assert plan_cost(costs, "prefill_ms", plan, 16) == pytest.approx(1600 + attention)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before), "the model is as it was"


def test_a_line_says_what_the_rest_takes_at_other_lengths():
    assert line({10: 3.0, 20: 5.0}, 10, grows=True) == 3.0
    assert line({10: 3.0, 20: 5.0}, 40, grows=True) == pytest.approx(9.0)
    assert line({10: 3.0}, 40, grows=True) == pytest.approx(12.0)
    assert line({10: 3.0}, 40, grows=False) == pytest.approx(3.0)


def test_a_kind_that_was_never_timed_takes_what_the_others_say(table):
    rows = [row for row in table.rows if kind(row.spec) == "mixed"]
    model = Model("prefill", rows, 1, 4)
    assert model.group(Layer.of(SITE), Linear(), 128) > 0
    assert model.launch(Layer.of(SITE), "linear", 128) > 0


def test_the_costs_are_shown(table):
    from rich.console import Console

    partly = dataclasses.replace(table, lengths=(64, 1000), rest={"prefill": {64: 7.0}, "decode": {64: 2.0}})
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(costs_table(partly))
    text = console.export_text()
    assert "6 heads in 3 KV groups of 8 dimensions: 2 layers from 0 to 1" in text
    assert "window-32-2" in text
    assert "≈" in text
    assert "The rest of the model at 1,000 tokens" in text
    document = costs_document(partly)
    json.dumps(document)
    entry = next(r for r in document["tables"][0]["rows"] if (r["operator"], r["length"]) == ("window-32-2", 64))
    assert entry["prefill_measured"] is True
    assert entry["prefill_ratio"] == pytest.approx(entry["prefill_ms"] / layer_cost(table, "prefill_ms", Full(), 64))
    assert "tables" in costs_document(analytic([SITE], SPECS, LENGTHS, 1, 2))
    console.print(costs_table(analytic([SITE], SPECS, LENGTHS, 1, 2)))
