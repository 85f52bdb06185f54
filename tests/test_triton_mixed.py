"""Mixed attention in Triton against its dense definition, forward and backward, in the interpreter or on a GPU."""

import dataclasses
import os

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined

import kernel_cases as cases

from attnconvert.kernels import backend_triton, triton_mixed
from attnconvert.kernels.problem import Ranges
from attnconvert.kernels.triton_mixed import mixed_forward
from attnconvert.kernels.triton_mixed_backward import mixed_backward
from attnconvert.kernels.triton_mixed_shapes import Tile

if backend_triton.unavailable():
    pytest.skip(backend_triton.unavailable(), allow_module_level=True)

SMALL = Tile(32, 32, 4, 1)  # many tiles even of a short sequence


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def check(rng, p, branch=None, *, config=SMALL, chunk=32, backward=True):
    """Values and gradients of p against fp64."""
    out = mixed_forward(p, branch, config=config, chunk=chunk)
    here, tail = cases.on(p, "cpu"), None if branch is None else cases.on(branch, "cpu")
    cases.check_mixed(cases.on(out, "cpu"), here, tail)
    if not backward:
        return out
    do, dlinear = cases.output_gradients(rng, here, tail)
    given = (do.to(p.q.device), None if dlinear is None else dlinear.to(p.q.device))
    found = mixed_backward(p, branch, out, *given, config=config, chunk=chunk)
    cases.check_gradients(cases.on(found, "cpu"), here, tail, do, dlinear)
    return out


def listed(rng, p, **options):
    """p with random lists instead of its windows."""
    (batch, _, rows, _), (groups, keys) = p.q.shape, p.k.shape[1:3]
    where = cases.blocks_case(rng, batch=batch, groups=groups, rows=rows, keys=keys, device=p.q.device, **options)
    return dataclasses.replace(p, where=where)


@pytest.mark.parametrize(
    ("rows", "heads", "groups", "dim", "causal", "where"),
    [
        (1, 3, 1, 16, True, (-1,)),  # two more keys, or all gradients but dv were zero
        (17, 4, 4, 16, True, (-1, 0, 5, 64)),
        (64, 3, 1, 40, False, (-1,)),
        (65, 4, 4, 16, False, (-1, 0, 5, 64)),
        (65, 4, 1, 72, True, (-1,)),
        (131, 2, 2, 64, True, (5, 64)),
    ],
)
def test_windows_differ_by_group_in_one_launch(seed, device, rows, heads, groups, dim, causal, where):
    rng = cases.generator(seed)
    options = {"heads": heads, "groups": groups, "rows": rows, "dim": dim, "causal": causal, "where": where}
    options["keys"] = max(rows, 3)
    check(rng, cases.softmax_case(rng, batch=1, views=True, device=device, **options))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_good_as_plain_math(seed, device, dtype):
    rng = cases.generator(seed)
    options = {"batch": 1, "heads": 2, "groups": 2, "rows": 45, "dim": 40, "causal": True, "dtype": dtype}
    p = cases.softmax_case(rng, where=(-1, 7), device=device, **options)
    check(rng, p, cases.branch_case(rng, p, index=(-1, 0)))


@pytest.mark.parametrize("causal", [True, False])
def test_padding_extra_keys_caps_and_sinks(seed, device, causal):
    rng = cases.generator(seed)
    options = {"batch": 2, "heads": 2, "groups": 2, "rows": 40, "keys": 70, "dim": 16, "causal": causal, "valid": True}
    p = cases.softmax_case(rng, where=(6, -1), extra=19, softcap=2.0, sink_logits=True, device=device, **options)
    check(rng, p)


def test_what_is_not_valid_may_hold_anything(seed, device):
    rng = cases.generator(seed)
    p = cases.softmax_case(rng, batch=1, heads=2, groups=2, rows=65, dim=16, causal=True, where=(9, -1), valid=True)
    branch = cases.branch_case(rng, p, index=(0, -1))
    clean = mixed_forward(cases.on(p, device), cases.on(branch, device), config=SMALL, chunk=32)
    dirty = dataclasses.replace(p, k=p.k.clone(), v=p.v.clone())
    hidden = ~p.valid[:, None, :, None]
    dirty.k.masked_fill_(hidden, torch.nan)
    dirty.v.masked_fill_(hidden, torch.inf)
    dirty, branch, do = (cases.on(x, device) for x in (dirty, branch, cases.output_gradients(rng, p)[0]))
    got = mixed_forward(dirty, branch, config=SMALL, chunk=32)
    assert torch.equal(got.o, clean.o)
    assert torch.equal(got.state, clean.state)
    found = mixed_backward(dirty, branch, got, do, None, config=SMALL, chunk=32)
    assert all(x.isfinite().all() for x in (found.q, found.k, found.v, found.fq, found.fk))
    assert not found.k.masked_select(hidden.to(device)).any()


@pytest.mark.parametrize(
    ("causal", "partial", "block"), [(True, True, (16, 96)), (False, True, (32, 32)), (True, False, (48, 64))]
)
def test_lists_of_blocks(seed, device, causal, partial, block):
    rng = cases.generator(seed)
    options = {"batch": 2, "heads": 2, "groups": 1, "rows": 70, "keys": 99, "dim": 16, "causal": causal}
    p = cases.softmax_case(rng, where=(1,), valid=partial, device=device, **options)
    tile = Tile(16, 16, 4, 1)
    check(rng, listed(rng, p, block=block, partial=partial), config=tile if block != (32, 32) else SMALL)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_a_branch_over_the_blocks_that_are_not_listed(seed, device, causal, shared):
    rng = cases.generator(seed)
    options = {"batch": 1, "heads": 2, "groups": 1, "rows": 50, "keys": 70, "dim": 16, "causal": causal}
    p = listed(rng, cases.softmax_case(rng, where=(1,), device=device, **options), partial=causal)
    check(rng, p, cases.branch_case(rng, p, shared=shared, features=24))


def test_a_list_of_all_blocks_leaves_exactly_nothing_to_the_branch(seed, device):
    rng = cases.generator(seed)
    p = cases.softmax_case(rng, batch=1, heads=2, groups=1, rows=70, dim=16, causal=False, where=(1,), device=device)
    p = listed(rng, p, density=2.0, partial=False, empty=False)
    out = mixed_forward(p, cases.branch_case(rng, p, shared=False), config=SMALL)
    assert not out.linear.any()
    assert not out.den.any()
    assert torch.equal(mixed_forward(p, cases.branch_case(rng, p), config=SMALL).o, out.o)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("rows", "keys", "features"), [(50, 50, 24), (20, 70, 40)])
def test_a_branch_over_what_has_left_the_window(seed, device, rows, keys, features, shared):
    rng = cases.generator(seed)
    options = {"batch": 1, "heads": 4, "groups": 2, "rows": rows, "keys": keys, "dim": 16, "valid": True, "extra": 3}
    p = cases.softmax_case(rng, causal=True, where=(0, 40) if shared else (5, 0), device=device, **options)
    check(rng, p, cases.branch_case(rng, p, shared=shared, state=shared, features=features, index=(1, 0)))


@pytest.mark.parametrize("shared", [True, False])
def test_a_branch_on_both_sides_of_the_window(seed, device, shared):
    rng = cases.generator(seed)
    options = {"batch": 1, "heads": 2, "groups": 2, "rows": 40, "keys": 60, "dim": 16, "causal": False}
    p = cases.softmax_case(rng, where=(0, 5), device=device, **options)
    check(rng, p, cases.branch_case(rng, p, shared=shared, index=(1, 0)))


@pytest.mark.parametrize("shared", [None, True, False])
def test_packed_sequences(seed, device, shared):
    rng = cases.generator(seed)
    lengths = [(33, 33), (0, 0), (5, 40), (1, 1), (0, 3)]
    p = cases.softmax_case(rng, heads=2, groups=2, dim=16, causal=True, where=(-1, 4), varlen=lengths, device=device)
    check(rng, p, None if shared is None else cases.branch_case(rng, p, shared=shared, index=(-1, 0)))


def test_packed_sequences_have_lists_of_their_own(seed, device):
    rng = cases.generator(seed)
    p = cases.softmax_case(rng, heads=2, groups=2, dim=16, causal=True, where=(1, 1), varlen=[(33, 40), (50, 50)])
    where = cases.blocks_case(rng, batch=2, groups=2, rows=50)
    p = cases.on(dataclasses.replace(p, where=where), device)
    check(rng, p, cases.branch_case(rng, p, index=(0, -1)))


def test_a_sequence_in_two_calls_is_the_sequence(seed, device):
    rng = cases.generator(seed)
    p = cases.softmax_case(rng, batch=1, heads=2, groups=2, rows=70, dim=16, causal=True, where=(9, 9), device=device)
    branch = cases.branch_case(rng, p, index=(0, 1))
    whole = mixed_forward(p, branch, config=SMALL, chunk=32)
    part, state = [], None
    for first, begin, stop in ((0, 0, 41), (32, 41, 70)):  # the second call still holds the nine keys of the window
        one = dataclasses.replace(p, q=p.q[:, :, begin:stop], k=p.k[:, :, first:stop], v=p.v[:, :, first:stop])
        fq, fk = branch.fq[:, :, begin:stop], branch.fk[:, :, first:stop]
        out = mixed_forward(one, dataclasses.replace(branch, fq=fq, fk=fk, state=state), config=SMALL, chunk=32)
        part.append(out.o)
        state = out.state
    torch.testing.assert_close(torch.cat(part, 2), whole.o, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, whole.state, rtol=1e-4, atol=1e-5)


def test_logits_of_any_size_stay_finite(seed, device):
    rng = cases.generator(seed)
    options = {"batch": 1, "heads": 2, "groups": 1, "rows": 65, "dim": 16, "causal": True, "spread": 1e4}
    p = cases.softmax_case(rng, where=(9,), device=device, **options)
    check(rng, p, backward=False)
    branch = cases.branch_case(rng, p, index=(0,))
    out = mixed_forward(p, branch, config=SMALL, chunk=32)
    assert out.o.isfinite().all()
    torch.testing.assert_close(out.o[:, :, 0], p.v[:, :, 0].expand(-1, 2, -1))  # its only key, whatever the weight is
    found = mixed_backward(p, branch, out, torch.ones_like(out.o), None, config=SMALL, chunk=32)
    assert all(x.isfinite().all() for x in (found.q, found.k, found.v, found.fq, found.fk))


@pytest.mark.parametrize("rows", [1, 40])
def test_the_shipped_tiles_give_the_same(seed, device, rows):
    rng = cases.generator(seed)
    p = cases.softmax_case(rng, batch=1, heads=2, groups=1, rows=rows, keys=80, dim=40, causal=True, where=(33,))
    p = cases.on(p, device)
    check(rng, p, cases.branch_case(rng, p, index=(0,)), config=None, chunk=None)
    check(rng, listed(rng, p, block=(64, 64)), config=None)


def test_the_neighbours_in_a_batch_change_nothing(seed, device):
    rng = cases.generator(seed)
    p = cases.softmax_case(rng, batch=2, heads=2, groups=1, rows=40, dim=16, causal=True, where=(9,), device=device)
    branch = cases.branch_case(rng, p, index=(0,))
    both = mixed_forward(p, branch, config=SMALL)
    one = dataclasses.replace(p, q=p.q[1:], k=p.k[1:], v=p.v[1:])
    alone = mixed_forward(one, dataclasses.replace(branch, fq=branch.fq[1:], fk=branch.fk[1:]), config=SMALL)
    assert torch.equal(alone.o, both.o[1:])
    assert torch.equal(alone.state, both.state[1:])


def test_what_cannot_run_is_refused_with_the_reason():
    rng = cases.generator(0)
    p = cases.softmax_case(rng, rows=5)
    assert triton_mixed.refuses("mixed_forward", (p, None)) is None
    assert "fp64" in triton_mixed.refuses("mixed_forward", (cases.double(p), None))
    assert "scale" in triton_mixed.refuses("mixed_forward", (dataclasses.replace(p, scale=-1.0), None))
    q = torch.zeros(1, 4, 5, 264)
    assert "264" in triton_mixed.refuses("mixed_forward", (dataclasses.replace(p, q=q), None))
    assert isinstance(p.where, Ranges)
    lists = dataclasses.replace(cases.blocks_case(rng), t_starts=None)
    assert "transpose" in triton_mixed.refuses("mixed_backward", (dataclasses.replace(p, where=lists), None))
