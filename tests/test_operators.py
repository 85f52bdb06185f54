"""Every operator against its dense fp64 reference: values, gradients, and the same result however it is fed."""

import itertools
from pathlib import Path

import pytest
import torch
from test_grid_operators import SPECS as ON_GRIDS
from torch.utils.flop_counter import FlopCounterMode

from attnconvert.kernels import custom_ops, operators, outside, top_blocks
from attnconvert.kernels.call import Shape, state_bytes
from attnconvert.kernels.full import FullState
from attnconvert.kernels.retention import RetentionState
from attnconvert.kernels.spec import (
    Full,
    Hybrid,
    Linear,
    Retention,
    Span,
    TopBlocks,
    Window,
    label,
    spec_from_dict,
    spec_to_dict,
)
from attnconvert.kernels.testing import call_of, cases, feed, learned_of, left_padded, make, named, rules
from attnconvert.kernels.top_blocks import BlocksState

SPECS = [Full(), Window(size=5, sinks=2), Window(size=1, sinks=0), Window(size=200, sinks=3), Linear()]
SPECS += [Retention(window=8, keep=5, sinks=2, block=4), Retention(window=6, keep=3, sinks=0, block=1)]
SPECS += [Span(size=5, growth=0.5, sinks=2), Span(size=2, growth=0.9, sinks=0)]
SPECS += [TopBlocks(keep=2, block=32, rows=16), TopBlocks(keep=3, block=32, rows=16)]
SPECS += [Hybrid(window=6, sinks=2), Hybrid(window=3, sinks=0), Hybrid(window=150, sinks=4)]
MORE = [Linear(), Hybrid(window=16, sinks=2), Retention(window=16, keep=5, sinks=2, block=4)]
OWN = Path(__file__).parents[1] / "docs" / "examples" / "taylor.py"  # an operator from outside, as the docs show it


@pytest.mark.parametrize(("spec", "rule"), [(spec, rule) for spec in SPECS for rule in rules(spec)], ids=named)
def test_every_operator_keeps_every_rule(spec, rule):
    rule(spec)


@pytest.mark.parametrize(("spec", "rule"), cases(*outside.load(OWN)), ids=named)
def test_an_operator_from_outside_keeps_every_rule(spec, rule):
    rule(spec)


def contents(state):
    """What a state holds, whatever room it has and in whatever order."""
    held = dict(vars(state))
    if isinstance(state, FullState | BlocksState):
        held |= {name: held[name][:, :, : state.length] for name in ("k", "v")}
    if isinstance(state, RetentionState):
        order = state.at.argsort(dim=-1, stable=True)
        for name in ("at", "score"):
            held[name] = held[name].gather(-1, order)
        held["score"] = held["score"] * (held["at"] >= 0)
        for name in ("k", "v"):
            rest = held[name][:, :, order.shape[2] :]
            moved = held[name].gather(2, order[..., None].expand(-1, -1, -1, held[name].shape[3]))
            held[name] = torch.cat([moved * (held["at"] >= 0)[..., None], rest], 2)
    if getattr(state, "real", None) is not None:
        held["real"] = held["real"].int()
    return held


@torch.no_grad()
@pytest.mark.parametrize("spec", SPECS, ids=label)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sizes", [[1] * 37, [17, 1, 1, 9, 9], [30, 7], [2, 35]], ids=str)
def test_prefill_chunks_and_decode_agree(spec, sizes, padded):
    shape = (2, 4, 2, 37, 8)
    q, k, v = make(shape)
    call = call_of(shape, left_padded(shape) if padded else None)
    learned = learned_of(spec, shape)
    whole, end = operators.attend(spec, q, k, v, call, None, learned)
    pieces, state = feed(spec, q, k, v, call, sizes, learned)
    torch.testing.assert_close(pieces, whole, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(contents(state), contents(end), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("hole", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_blocks_chosen_by_score_agree_however_they_arrive(padded, hole):
    """Long enough that the lists leave blocks out, with a block that holds padding only where there is a hole."""
    shape, spec = (2, 6, 2, 250, 8), TopBlocks(keep=3, block=32, rows=16)
    q, k, v = make(shape)
    valid = left_padded(shape) if padded else torch.ones(2, 250, dtype=torch.bool)
    valid[1, 96:128] &= not hole
    call = call_of(shape, valid if padded or hole else None)
    want = operators.of(spec).reference(spec, q, k, v, call)
    found = top_blocks.lists(spec, q, k, call_of(shape))
    assert (found.sum(-1) < torch.arange(16) // 2).any(), "some blocks are left out"
    whole, end = operators.attend(spec, q, k, v, call)
    real = valid[:, None, :, None].expand_as(want)
    torch.testing.assert_close(whole[real], want[real], atol=1e-10, rtol=1e-10)
    pieces, state = feed(spec, q, k, v, call, [70, 1, 1, 9, 90, 79], None)
    torch.testing.assert_close(pieces[real], whole[real], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(contents(state), contents(end), atol=1e-10, rtol=1e-10)


BOTH_WAYS = [spec for spec in SPECS if not isinstance(spec, Retention)]


@pytest.mark.parametrize("spec", BOTH_WAYS, ids=label)
def test_a_call_that_is_not_causal_has_no_past_and_leaves_no_state(spec):
    shape = (1, 4, 2, 20, 8)
    _, state = operators.attend(spec, *make(shape), call_of(shape, causal=False), None, learned_of(spec, shape))
    assert state is None
    assert operators.of(spec).state_size(spec, Shape(queries=2, dim=8, causal=False), 20) == 0
    with pytest.raises(ValueError, match="no past"):
        call_of(shape, causal=False, seen=3)


def test_retention_needs_an_order():
    shape = (1, 4, 2, 20, 8)
    with pytest.raises(ValueError, match="both ways"):
        operators.attend(Retention(), *make(shape), call_of(shape, causal=False))


def test_a_window_that_covers_everything_is_full_attention():
    shape = (2, 4, 2, 50, 8)
    q, k, v = make(shape)
    full, _ = operators.attend(Full(), q, k, v, call_of(shape))
    wide, _ = operators.attend(Window(size=50, sinks=0), q, k, v, call_of(shape))
    torch.testing.assert_close(wide, full, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("sizes", [[40], [13, 1, 26]], ids=str)
def test_the_models_own_sliding_window_is_kept(sizes):
    shape = (2, 4, 2, 40, 8)
    q, k, v = make(shape)
    want = operators.of(Full()).reference(Full(), q, k, v, call_of(shape, limit=7))
    got, state = feed(Full(), q, k, v, call_of(shape, limit=7), sizes, None)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    assert state.k.shape[2] == 7


def test_a_cache_has_little_room_to_spare():
    shape = (1, 2, 1, 700, 8)
    q, k, v = make(shape)
    _, state = feed(Full(), q, k, v, call_of(shape), [400] + [1] * 300, None)
    assert state.length == 700
    assert state.k.shape[2] <= 716


@pytest.mark.parametrize("spec", SPECS, ids=label)
@pytest.mark.parametrize("length", [3, 64, 300])
def test_state_bytes_are_what_the_cost_model_says(spec, length):
    shape = (1, 3, 1, length, 8)
    q, k, v = make(shape, dtype=torch.float32)
    _, state = operators.attend(spec, q, k, v, call_of(shape), None, learned_of(spec, shape, torch.float32))
    counted = state_bytes(state) - (state.sink_at.numel() * 8 if hasattr(state, "sink_at") else 0)
    slack = 2 * 4 * 8 * (state.k.shape[2] - state.length) if isinstance(spec, Full | TopBlocks) else 0
    assert counted == operators.of(spec).state_size(spec, Shape(queries=3, dim=8, element=4), length) + slack


@pytest.mark.parametrize(
    "spec",
    [
        Full(),
        Window(size=16, sinks=2),
        Span(size=16, growth=0.5, sinks=2),
        TopBlocks(keep=2, block=32, rows=16),
        Linear(),
        Hybrid(window=16, sinks=2),
        Retention(window=16, keep=5, sinks=2, block=4),
    ],
    ids=label,
)
def test_flops_of_the_cost_model_match_a_count(spec, monkeypatch):
    for name in ("mixed", "linear", "features"):  # a counter sees an operator as one call: count what is inside
        monkeypatch.setattr(custom_ops, name, getattr(custom_ops, name)._init_fn)
    monkeypatch.setenv("ATTNCONVERT_BACKEND", "torch")
    shape = (1, 3, 1, 256, 16)
    q, k, v = make(shape, dtype=torch.float32)
    learned = learned_of(spec, shape, torch.float32)
    with FlopCounterMode(display=False) as counter:
        operators.of(spec).reference(spec, q, k, v, call_of(shape), learned)
    dense = counter.get_total_flops()
    cost = operators.of(spec).prefill_cost(spec, Shape(queries=3, dim=16, element=4), 256)
    if isinstance(spec, Full):  # the reference counts the masked half too
        assert cost.flops == pytest.approx(dense / 2, rel=0.01)
    elif isinstance(spec, Window):
        allowed = sum(len({j for j in range(i + 1) if i - j < 16 or j < 2}) for i in range(256))
        assert cost.flops == 4 * allowed * 3 * 16
    elif isinstance(spec, Span):
        near = [16 + i // 2 // 64 * 64 for i in range(256)]
        allowed = sum(len({j for j in range(i + 1) if i - j < near[i] or j < 2}) for i in range(256))
        assert cost.flops == 4 * allowed * 3 * 16
    elif isinstance(spec, TopBlocks):
        pairs = sum(min(2, i // 32) * 32 + i % 32 + 1 for i in range(256))
        scores = sum(row // 32 for row in range(0, 256, 16))
        assert cost.flops == 4 * pairs * 3 * 16 + 2 * scores * 3 * 16 + 256 * 16
    elif isinstance(spec, Retention):
        pairs = sum(min(i + 1, 2) + len(range(max(2, i // 4 * 4 - 12), i + 1)) for i in range(256))
        pairs += sum(min(5, max(0, i // 4 * 4 - 12 - 2)) for i in range(256))
        assert cost.flops == pytest.approx(4 * pairs * 3 * 16, rel=0.05)
    else:
        with FlopCounterMode(display=False) as counter:
            operators.attend(spec, q, k, v, call_of(shape), None, learned)
        assert cost.flops == pytest.approx(counter.get_total_flops(), rel=1.0 if isinstance(spec, Hybrid) else 0.05)


@pytest.mark.parametrize("length", [5, 40, 256])
@pytest.mark.parametrize(
    "spec", [Full(), Window(size=16, sinks=2), Window(size=3, sinks=7), Span(size=3, growth=0.3, sinks=7)], ids=label
)
def test_flops_of_rows_that_read_both_ways_are_counted_pair_by_pair(spec, length):
    cost = operators.of(spec).prefill_cost(spec, Shape(queries=3, dim=16, causal=False), length)
    near = length if isinstance(spec, Full) else spec.size
    near += int(0.3 * length) // 64 * 64 if isinstance(spec, Span) else 0
    sinks = 0 if isinstance(spec, Full) else spec.sinks
    pairs = sum(abs(i - j) < near or j < sinks for i in range(length) for j in range(length))
    assert cost.flops == 4 * pairs * 3 * 16


@pytest.mark.parametrize("spec", [Linear(), Hybrid(window=16, sinks=2)], ids=label)
def test_flops_of_linear_attention_both_ways_match_a_count(spec, monkeypatch):
    for name in ("mixed", "linear", "features"):
        monkeypatch.setattr(custom_ops, name, getattr(custom_ops, name)._init_fn)
    monkeypatch.setenv("ATTNCONVERT_BACKEND", "torch")
    shape = (1, 3, 1, 256, 16)
    learned = learned_of(spec, shape, torch.float32)
    with FlopCounterMode(display=False) as counter:
        operators.attend(spec, *make(shape, dtype=torch.float32), call_of(shape, causal=False), None, learned)
    cost = operators.of(spec).prefill_cost(spec, Shape(queries=3, dim=16, element=4, causal=False), 256)
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=1.0 if isinstance(spec, Hybrid) else 0.05)


@pytest.mark.parametrize("length", [20, 64, 150])
def test_pairs_of_chosen_blocks_both_ways_are_those_of_the_lists(length):
    """Where every block of the lists is whole but the last, which may be listed or not: between the two."""
    spec, shape = TopBlocks(keep=2, block=32, rows=16), (1, 3, 1, length, 16)
    q, k, _ = make(shape)
    found = top_blocks.lists(spec, q, k, call_of(shape, causal=False))
    own = torch.arange(found.shape[2]) // 2
    assert found[0, 0, torch.arange(found.shape[2]), own].all(), "its own block is always listed"
    sizes = torch.tensor([min(32, length - at) for at in range(0, length, 32)])
    rows = torch.tensor([min(16, length - at) for at in range(0, length, 16)])
    pairs = int((found[0, 0] * sizes * rows[:, None]).sum())
    cost = operators.of(spec).prefill_cost(spec, Shape(queries=3, dim=16, causal=False), length)
    scores = found.shape[2] * found.shape[3]
    most = (cost.flops - 2 * scores * 3 * 16 - length * 16) / (4 * 3 * 16)
    assert pairs <= most <= pairs + length * (32 - int(sizes[-1]))


def test_cost_of_bounded_operators_does_not_grow_with_length():
    shape = Shape(queries=3, dim=64)
    for spec in (Window(), Linear(), Hybrid(), Retention()):
        operator = operators.of(spec)
        assert operator.decode_cost(spec, shape, 10_000) == operator.decode_cost(spec, shape, 100_000)
        ratio = operator.prefill_cost(spec, shape, 64_000).flops / operator.prefill_cost(spec, shape, 32_000).flops
        assert ratio == pytest.approx(2, rel=0.02)


def test_specs_round_trip_and_have_distinct_labels():
    assert [spec_from_dict(spec_to_dict(s)) for s in SPECS] == SPECS
    assert len({label(s) for s in SPECS}) == len(SPECS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"operator": "windw"}, "did you mean 'window'"),
        ({"operator": "window", "sise": 3}, "did you mean 'size'"),
        ({"operator": "window", "size": 0}, "at least 1"),
        ({"operator": "hybrid", "feature_map": "hedge"}, "known are hedgehog"),
        ({"size": 3}, "operator is missing"),
    ],
)
def test_bad_specs_say_what_is_wrong(given, message):
    with pytest.raises(ValueError, match=message):
        spec_from_dict(given)


def test_every_operator_is_tested():
    tested = {spec.operator for spec in SPECS + ON_GRIDS}
    assert tested == set(operators.FILES)
    assert all(
        hasattr(operators.FILES[a], b) for a, b in itertools.product(tested, operators.Operator.__dataclass_fields__)
    )
