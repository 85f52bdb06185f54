"""The operators of image and video tokens: against dense fp64 references, at odd grids, on every back end of a CPU."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from attnconvert.kernels import dispatch, grid, grid_masks, operators, sparse
from attnconvert.kernels.call import Call, Shape
from attnconvert.kernels.masks import Layout
from attnconvert.kernels.spec import (
    Agent,
    Disc,
    Frames,
    Full,
    Linear,
    Neighbourhood,
    Radial,
    References,
    Sla,
    Sparse,
    Tiles,
    Timed,
    grid_axes,
    grid_only,
    label,
    spec_to_dict,
)
from attnconvert.kernels.spec_registry import spec_from_text

ANY = [Disc(radius=2), Disc(radius=1.5, pool=2), Disc(radius=3, pool=3), Neighbourhood(window=3)]
ANY += [Neighbourhood(window=5, stride=2), Neighbourhood(window=3, dilation=2), Neighbourhood(window=9)]
ANY += [Tiles(window=1, tile=2), Tiles(window=3, tile=(2,)), Agent(agents=2), Agent(agents=50)]
ANY += [Sparse(keep=0.3, block=32), Sparse(mass=0.6, block=32, tile=4), Sparse(keep=1, block=32, tile=2)]
ANY += [Sla(keep=0.3, block=32), Sla(mass=0.4, block=32, tile=4)]
ANY += [Sla(keep=0.3, block=32, feature_map="hedgehog", conv=3)]
ANY += [Linear(feature_map="elu1"), Linear(feature_map="softmax", conv=3), Linear(conv=5, augment=True)]
ANY += [Timed(above=0.5, late=Disc(radius=2)), Timed(above=0.5, early=Linear(conv=3), late=Sla(keep=0.4, block=32))]
IMAGE = [Neighbourhood(window=(3, 5), stride=(1, 3), dilation=(2, 1)), Tiles(window=(3, 1), tile=(2, 3))]
IMAGE += [Agent(agents=(2, 3)), Sparse(keep=0.2, block=32, tile=(4, 8))]
VIDEO = [Radial(decay=0.5, floor=2, neighbour=0.5), Radial(decay=0.2, floor=1, sink=True), Frames(before=1)]
VIDEO += [Frames(before=2, chunk=2, sinks=1), References(every=2), References(at=(1,)), References(at=[9], every=0)]
VIDEO += [Tiles(window=(1, 3, 3), tile=(2, 2, 2)), Neighbourhood(window=(1, 3, 3))]
SPECS = ANY + IMAGE + VIDEO
GRIDS = [(5, 7), (3, 5, 4), (11, 13), (4, 6, 5)]
TEXTS = [(0, 0), (3, 0), (0, 6)]
BATCH, HEADS, KV, DIM = 2, 2, 1, 8


def fits(spec, axes):
    """Whether it takes a grid of so many axes."""
    own = [spec.early, spec.late] if isinstance(spec, Timed) else [spec]
    return all(grid_axes(x) in (None, axes) for x in own)


CASES = [(spec, g) for g in GRIDS for spec in SPECS if fits(spec, len(g))]
SMALL = [(spec, g) for spec, g in CASES if g in GRIDS[:2]]


def named(case):
    return f"{label(case[0])}-{case[1]}"


def layout_of(size, text):
    return Layout(grid=size, text_first=text[0], text_last=text[1])


def make(layout, dtype=torch.float64, heads=HEADS, kv=KV, dim=DIM):
    generator = torch.Generator().manual_seed(layout.tokens)
    sizes = [(BATCH, h, layout.tokens, dim) for h in (heads, kv, kv)]
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def learned_of(spec, dtype=torch.float64, heads=HEADS, kv=KV, dim=DIM):
    torch.manual_seed(1)
    learned = operators.of(spec).parameters(spec, heads, kv, dim)
    if learned is not None:
        learned = learned.to(dtype)
        for p in learned.parameters():
            p.data += 0.3 * torch.randn_like(p)
    return learned


def call_of(layout, padded=False, dim=DIM, **more):
    """Two samples, noisy and nearly clean; the first may lack some of its text."""
    valid = None
    if padded and layout.text:
        valid = torch.ones(BATCH, layout.tokens, dtype=torch.bool)
        valid[0, layout.tokens - 2 :] &= not layout.text_last
        valid[0, 1 : layout.text_first] = False
    time = torch.tensor([0.9, 0.1])
    return Call(scale=dim**-0.5, causal=False, layout=layout, **{"time": time, "valid": valid, **more})


def run(spec, q, k, v, call, learned):
    o, state = operators.attend(spec, q, k, v, call, None, learned)
    assert state is None
    return o


@pytest.mark.parametrize("case", CASES, ids=named)
@pytest.mark.parametrize("text", TEXTS, ids=str)
def test_an_operator_equals_its_reference_at_odd_grids(case, text):
    spec, size = case
    layout = layout_of(size, text)
    q, k, v = make(layout)
    learned = learned_of(spec)
    for padded in (False, True)[: 1 + bool(layout.text)]:
        call = call_of(layout, padded)
        want = operators.of(spec).reference(spec, q, k, v, call, learned)
        torch.testing.assert_close(run(spec, q, k, v, call, learned), want, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    "spec", [Disc(radius=2, pool=2), Sparse(keep=0.3, block=32), Sla(keep=0.3, block=32)], ids=label
)
def test_a_models_own_soft_cap_and_sink_logits_are_kept(spec):
    layout, learned = layout_of((11, 13), (3, 0)), learned_of(spec)
    q, k, v = make(layout)
    call = call_of(layout, padded=True, softcap=2.0, sink_logits=torch.linspace(-1, 1, HEADS, dtype=torch.float64))
    want = operators.of(spec).reference(spec, q, k, v, call, learned)
    torch.testing.assert_close(run(spec, q, k, v, call, learned), want, atol=1e-10, rtol=1e-10)
    plain = run(spec, q, k, v, dataclasses.replace(call, softcap=None, sink_logits=None), learned)
    assert not torch.allclose(plain, want, atol=1e-2)
    with pytest.raises(ValueError, match="sink logits"):
        run(Agent(agents=2), q, k, v, call, None)


@pytest.mark.parametrize("spec", ANY, ids=label)
def test_bf16_stays_bf16_and_close(spec):
    layout = layout_of((11, 13), (3, 0))
    inputs, learned = make(layout, torch.bfloat16), learned_of(spec, torch.float32)
    exact = learned_of(spec)
    if exact is not None:
        exact.load_state_dict(learned.state_dict())
    call = call_of(layout, padded=True)
    got = run(spec, *inputs, call, learned)
    assert got.dtype == torch.bfloat16
    if getattr(spec, "keep", 1) and not isinstance(spec, Timed):  # rounding may choose another block
        want = operators.of(spec).reference(spec, *[x.double() for x in inputs], call, exact)
        torch.testing.assert_close(got.double(), want, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("spec", [Disc(radius=3), Sparse(keep=0.3, block=32), Sla(keep=0.2, block=32)], ids=label)
def test_tokens_of_the_grid_may_be_padding_too(spec):
    layout, learned = layout_of((11, 13), (3, 0)), learned_of(spec)
    q, k, v = make(layout)
    call = call_of(layout, valid=torch.arange(layout.tokens).expand(BATCH, -1) % 5 != 4)
    want = operators.of(spec).reference(spec, q, k, v, call, learned)
    torch.testing.assert_close(run(spec, q, k, v, call, learned), want, atol=1e-10, rtol=1e-10)


def test_averages_are_those_of_adaptive_pooling():
    image, video = torch.randn(2, 3, 11, 13, 4).double(), torch.randn(2, 3, 5, 7, 6, 4).double()
    for x, cells, pool in ((image, (4, 5), F.adaptive_avg_pool2d), (video, (2, 3, 4), F.adaptive_avg_pool3d)):
        want = pool(x.movedim(-1, 2).flatten(0, 2)[:, None], cells).unflatten(0, (2, 3, 4))[:, :, :, 0].movedim(2, -1)
        torch.testing.assert_close(grid.averaged(x, cells), want)
    frames = torch.stack([grid.averaged(video[:, :, t], (3, 4)) for t in range(5)], 2)
    torch.testing.assert_close(grid.averaged(video, (3, 4)), frames)


@pytest.mark.parametrize("case", SMALL, ids=named)
def test_gradients_equal_those_of_the_reference(case):
    spec, size = case
    layout = layout_of(size, (3, 0))
    call = call_of(layout, padded=True)
    learned = learned_of(spec)
    trained = [] if learned is None else [p for name, p in learned.named_parameters() if "augment" not in name]
    weights = torch.randn(BATCH, HEADS, layout.tokens, DIM, dtype=torch.float64)
    found = []
    for each in (operators.of(spec).reference, run):
        inputs = [x.requires_grad_() for x in make(layout)]
        loss = (each(spec, *inputs, call, learned) * weights).sum()
        found.append(torch.autograd.grad(loss, inputs + trained))
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("case", [case for case in CASES if case[1] in GRIDS[2:]], ids=named)
def test_a_back_end_is_as_close_as_fp32_allows_with_gradients(case, backend):
    spec, size = case
    layout = layout_of(size, (5, 0))
    call = call_of(layout, padded=True)
    exact, single = learned_of(spec), learned_of(spec, torch.float32)
    if exact is not None:
        exact.load_state_dict(single.state_dict())
    weights = torch.randn(BATCH, HEADS, layout.tokens, DIM, dtype=torch.float64)
    found = []
    for each, learned, dtype in ((operators.of(spec).reference, exact, torch.float64), (run, single, torch.float32)):
        inputs = [x.to(dtype).requires_grad_() for x in make(layout, torch.float32)]
        with dispatch.use("auto" if dtype == torch.float64 else backend):
            o = each(spec, *inputs, call, learned)
            found.append([o, *torch.autograd.grad((o * weights.to(dtype)).sum(), inputs)])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), want, atol=2e-4, rtol=2e-4)


TRITON = [Disc(radius=2, pool=2), Tiles(window=1, tile=2), Sparse(keep=0.4, block=32), Sla(keep=0.2, block=32)]
TRITON += [Agent(agents=2), Linear(feature_map="softmax", conv=3), Timed(above=0.5, late=Disc(radius=2))]


@pytest.mark.parametrize("spec", TRITON, ids=label)
def test_triton_is_as_close_as_fp32_allows(spec):
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"  # the latter in Triton's interpreter
    layout = layout_of((7, 15), (3, 0))
    call = call_of(layout, padded=True, dim=16)
    inputs, learned = make(layout, torch.float32, dim=16), learned_of(spec, torch.float32, dim=16)
    exact = None if learned is None else learned_of(spec, dim=16)
    if exact is not None:
        exact.load_state_dict(learned.state_dict())
    want = operators.of(spec).reference(spec, *[x.double() for x in inputs], call, exact)
    moved = dataclasses.replace(call, valid=call.valid.to(device), time=call.time.to(device))
    with dispatch.use("triton"):
        got = run(spec, *[x.to(device) for x in inputs], moved, None if learned is None else learned.to(device))
    torch.testing.assert_close(got.cpu().double(), want, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("text", [(3, 0), (0, 6)], ids=str)
@pytest.mark.parametrize(
    "spec", [s for s in SPECS if not isinstance(s, Linear | Timed | Agent | Sla) and fits(s, 2)], ids=label
)
def test_text_reads_everything_and_is_read_by_everything(spec, text):
    layout = layout_of((11, 13), text)
    q, k, v = make(layout)
    rows = [*range(text[0]), *range(layout.tokens - text[1], layout.tokens)]
    full = operators.of(Full()).reference(Full(), q, k, v, call_of(layout))
    torch.testing.assert_close(run(spec, q, k, v, call_of(layout), None)[:, :, rows], full[:, :, rows])
    before = run(spec, q, k, v, call_of(layout), None)
    v[:, :, rows[0]] += 1e3
    changed = (run(spec, q, k, v, call_of(layout), None) - before).abs().amax(-1)
    assert (changed > 1e-6).all(), "every row reads the first token of the text"


@pytest.mark.parametrize("spec", [Disc(radius=100), Neighbourhood(window=99), Sparse(keep=1.0, block=32)], ids=label)
def test_what_reaches_everywhere_is_full_attention(spec):
    layout = layout_of((5, 7), (3, 0))
    q, k, v = make(layout)
    want = operators.of(Full()).reference(Full(), q, k, v, call_of(layout))
    torch.testing.assert_close(run(spec, q, k, v, call_of(layout), None), want, atol=1e-10, rtol=1e-10)


def test_what_is_added_starts_as_if_it_were_not_there():
    layout = layout_of((5, 7), (3, 0))
    q, k, v = make(layout)
    call = call_of(layout)

    def fresh(spec):
        learned = operators.of(spec).parameters(spec, HEADS, KV, DIM)
        return run(spec, q, k, v, call, None if learned is None else learned.double())

    assert torch.equal(fresh(Sla(keep=0.2, block=32)), fresh(Sparse(keep=0.2, block=32)))
    assert torch.equal(fresh(Linear(conv=3, augment=True)), fresh(Linear()))
    learned = operators.of(Linear(augment=True)).parameters(Linear(augment=True), 4, 2, 8)
    h = torch.randn(2, 5, 32)
    assert torch.equal(learned.augment_q(h), h)
    assert torch.equal(learned.augment_k(h.bfloat16()), h.bfloat16())
    learned.augment_q.mlp[3].weight.data.normal_()
    assert not torch.allclose(learned.augment_q(h), h)


def test_a_convolution_sees_its_own_frame_only_and_no_text():
    layout = layout_of((3, 5, 4), (2, 0))
    q, k, v = make(layout)
    spec = Linear(feature_map="softmax", conv=3)
    learned = operators.of(spec).parameters(spec, HEADS, KV, DIM).double()
    plain = run(spec, q, k, v, call_of(layout), learned)
    learned.conv.data.normal_()
    added = run(spec, q, k, v, call_of(layout), learned) - plain
    assert not added[:, :, :2].any(), "text is untouched"
    v2 = v.clone()
    v2[:, :, 2 + 20 : 2 + 40] = 0  # the frame in the middle
    learned.conv.data.zero_()
    plain2 = run(spec, q, k, v2, call_of(layout), learned)
    learned = learned_of(spec)
    learned.conv.data.normal_()
    first = run(spec, q, k, v2, call_of(layout), learned)[:, :, 2 + 20 : 2 + 40] - plain2[:, :, 2 + 20 : 2 + 40]
    assert not first.any(), "nothing comes from other frames"


def test_the_default_linear_keeps_its_name_its_dict_and_the_keys_of_checkpoints():
    assert label(Linear()) == "linear-hedgehog"
    assert spec_to_dict(Linear()) == {"operator": "linear", "feature_map": "hedgehog"}
    assert set(operators.of(Linear()).parameters(Linear(), 4, 2, 8).state_dict()) == {"query", "key"}


def test_timed_takes_each_sample_by_its_own_time():
    layout = layout_of((5, 7), (3, 0))
    q, k, v = make(layout)
    spec = Timed(above=0.5, early=Full(), late=Disc(radius=2))
    full, disc = (run(s, q, k, v, call_of(layout), None) for s in (spec.early, spec.late))
    for times, want in (
        ([0.9, 0.1], (full[0], disc[1])),
        ([0.1, 0.5], (disc[0], full[1])),
        ([1.0, 0.6], (full[0], full[1])),
        ([0.0, 0.49], (disc[0], disc[1])),
    ):
        got = run(spec, q, k, v, call_of(layout, time=torch.tensor(times)), None)
        torch.testing.assert_close(got, torch.stack(want), atol=1e-12, rtol=1e-12)
    three = [torch.cat([x, x[:1]]) for x in (q, k, v)]  # an order that is not its own inverse
    got = run(spec, *three, call_of(layout, time=torch.tensor([0.1, 0.9, 0.9])), None)
    torch.testing.assert_close(got, torch.stack([disc[0], full[1], full[0]]), atol=1e-12, rtol=1e-12)
    with pytest.raises(ValueError, match="needs the time"):
        run(spec, q, k, v, call_of(layout, time=None), None)
    with pytest.raises(ValueError, match="one for each sample"):
        run(spec, q, k, v, call_of(layout, time=torch.ones(3)), None)


COMPILED = [
    (Disc(radius=2, pool=2), GRIDS[0]),
    (Neighbourhood(window=3), GRIDS[0]),
    (Tiles(window=1, tile=2), GRIDS[0]),
]
COMPILED += [(Sparse(keep=0.3, block=32), GRIDS[0]), (Sla(keep=0.3, block=32, tile=4), GRIDS[0])]
COMPILED += [(Agent(agents=2), GRIDS[0]), (Linear(conv=3), GRIDS[0]), (ANY[-1], GRIDS[0])]
COMPILED += [(spec, GRIDS[1]) for spec in (VIDEO[0], Frames(before=1), References(every=2))]


@pytest.mark.parametrize("case", COMPILED, ids=named)
def test_a_compiled_model_gives_the_same_in_one_graph_at_every_size(case):
    torch._dynamo.reset()
    spec, size = case
    learned = learned_of(spec, torch.float32)
    compiled = torch.compile(run, backend="eager", dynamic=False, fullgraph=True)
    with torch.no_grad():
        for grown in (size, tuple(n + 1 for n in size)):
            layout = layout_of(grown, (3, 0))
            inputs = [spec, *make(layout, torch.float32), call_of(layout, padded=True), learned]
            torch.testing.assert_close(compiled(*inputs), run(*inputs))


@pytest.mark.parametrize("case", COMPILED, ids=named)
def test_a_compiled_model_has_the_same_gradients(case):
    torch._dynamo.reset()
    spec, size = case
    layout, learned = layout_of(size, (3, 0)), learned_of(spec, torch.float32)
    logits = {} if isinstance(spec, Agent) else {"sink_logits": torch.linspace(-1, 1, HEADS).requires_grad_()}
    call = call_of(layout, padded=True, **logits)
    trained = [] if learned is None else [p for name, p in learned.named_parameters() if "augment" not in name]
    found = []
    for each in (run, torch.compile(run, backend="aot_eager", dynamic=False, fullgraph=True)):
        inputs = [x.requires_grad_() for x in make(layout, torch.float32)]
        weights = torch.linspace(-1, 1, DIM)
        loss = (each(spec, *inputs, call, learned) * weights).sum()
        found.append(torch.autograd.grad(loss, [*inputs, *trained, *logits.values()], allow_unused=True))
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, torch.zeros_like(got) if want is None and got is not None else want)


def test_a_compiled_operator_knows_specs_that_are_alike_apart():
    torch._dynamo.reset()
    layout = layout_of((5, 7), (3, 0))
    inputs = [*make(layout, torch.float32), call_of(layout), None]
    compiled = torch.compile(run, backend="eager", dynamic=False, fullgraph=True)
    for spec in (Disc(radius=1.5), Disc(radius=3), Disc(radius=1.5)):
        torch.testing.assert_close(compiled(spec, *inputs), run(spec, *inputs))
    assert spec_from_text(Timed(late=Disc(radius=3)).text) == Timed(late=Disc(radius=3))


def test_a_compiled_call_that_no_grid_operator_takes_is_refused():
    torch._dynamo.reset()
    layout = layout_of((5, 7), (3, 0))
    compiled = torch.compile(run, backend="eager", dynamic=False, fullgraph=True)
    for wrong, said in (({"causal": True}, "read each other"), ({"layout": None}, "needs the grid")):
        with pytest.raises(Exception, match=said):
            call = dataclasses.replace(call_of(layout), **wrong)
            compiled(Disc(radius=2), *make(layout, torch.float32), call, None)


# ------------------------------------------------------------------------------------------------------------- costs

COUNTED = [case for case in CASES if isinstance(case[0], Disc | Neighbourhood | Tiles | Radial | References | Frames)]


@pytest.mark.parametrize("case", COUNTED, ids=named)
def test_flops_are_those_of_the_pairs_that_the_reference_reads(case, monkeypatch):
    spec, size = case
    layout = layout_of(size, (3, 0))
    seen = []
    monkeypatch.setattr(grid_masks, "dense", lambda q, k, v, call, allowed: seen.append(allowed))
    operators.of(spec).reference(spec, *make(layout), call_of(layout))
    cost = operators.of(spec).prefill_cost(spec, Shape(queries=3, dim=16, causal=False, layout=layout), layout.tokens)
    averages = 4 * math.prod(size) * 16 if getattr(spec, "pool", 0) else 0
    assert cost.flops == 4 * int(seen[0].sum()) * 3 * 16 + averages
    assert cost.state_bytes == 0


@pytest.mark.parametrize("size", [(8, 16), (16, 16), (4, 8, 8)], ids=str)
def test_flops_of_chosen_blocks_are_those_of_the_pairs(size):
    """Where no block without text is cut, any choice has as many pairs."""
    layout, spec = layout_of(size, (0, 5)), Sparse(keep=0.5, block=32)
    q, k, _ = make(layout)
    pairs = int(sparse.pairs(spec, q, k, call_of(layout))[0, 0].sum())
    shape = Shape(queries=3, dim=16, causal=False, layout=layout)
    count = -(-layout.tokens // 32)
    cost = operators.of(spec).prefill_cost(spec, shape, layout.tokens).flops
    assert cost == 4 * pairs * 3 * 16 + 2 * count**2 * 3 * 16 + 4 * layout.tokens * 16
    more = operators.of(Sla(keep=0.5, block=32)).prefill_cost(Sla(keep=0.5, block=32), shape, layout.tokens).flops
    assert more - cost == layout.tokens * (2 * 16 * 17 * 4 + 2 * 16 * 16 * 3)
    even = operators.of(spec).prefill_cost(Sparse(mass=1, block=32), shape, layout.tokens).flops
    assert even - cost == 4 * (layout.tokens**2 - pairs) * 3 * 16


def test_other_costs_are_counted_by_hand():
    layout = layout_of((8, 8), (4, 0))
    shape = Shape(queries=2, dim=16, causal=False, layout=layout)

    def flops(spec):
        return operators.of(spec).prefill_cost(spec, shape, 68).flops

    assert flops(Agent(agents=4)) == 4 * 2 * (16 + 4) * 68 * 2 * 16 + 68 * 2 * 16
    assert flops(Linear(conv=3)) - flops(Linear()) == 2 * 9 * 64 * 2 * 16
    assert flops(Linear(feature_map="elu1")) == 68 * 2 * 16 * 17 * 3
    timed = Timed(above=0.75, early=Full(), late=Disc(radius=2))
    assert flops(timed) == 0.25 * flops(Full()) + 0.75 * flops(Disc(radius=2))


@pytest.mark.parametrize("spec", [s for s in SPECS if grid_only(s)], ids=label)
def test_costs_without_a_grid_and_of_decoding_are_refused(spec):
    if not isinstance(spec, Linear) or spec.conv:
        with pytest.raises(ValueError, match="needs the grid"):
            operators.of(spec).prefill_cost(spec, Shape(queries=1, dim=8, causal=False), 64)
    with pytest.raises(ValueError, match="nothing is decoded"):
        operators.of(spec).decode_cost(spec, Shape(queries=1, dim=8, causal=False), 64)
    assert operators.of(spec).state_size(spec, Shape(queries=1, dim=8, causal=False), 64) == 0
