"""The torch back end against the dense definitions: it is what every other back end may be compared with."""

import dataclasses

import kernel_cases as cases
import pytest
import torch

from attnconvert.kernels import backend_torch
from attnconvert.kernels.problem import Mixed

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def compare(p, branch=None, gradients=True):
    got = backend_torch.mixed_forward(p, branch)
    cases.check_mixed(got, p, branch)
    if gradients:
        do = torch.randn_like(p.q)
        dlinear = None if got.linear is None else torch.randn_like(got.linear)
        found = backend_torch.mixed_backward(p, branch, got, do, dlinear)
        cases.check_gradients(found, p, branch, do, dlinear)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows", [1, 63, 131, 300])
def test_ranges_are_the_definition(seed, dtype, causal, rows):
    rng = cases.generator(seed)
    keys = rows + cases.choose(rng, [0, 17])
    p = cases.softmax_case(rng, rows=rows, keys=keys, causal=causal, dtype=dtype, valid=True, batch=2, extra=3)
    compare(p)


@pytest.mark.parametrize("more", [{"softcap": 2.0}, {"sink_logits": True}, {"spread": 1e4}, {"views": True}], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_soft_caps_sinks_huge_logits_and_views(seed, more, causal):
    dtype = torch.float32 if "spread" in more else torch.float64  # where one logit decides, gradients are all rounding
    compare(
        cases.softmax_case(cases.generator(seed), causal=causal, dtype=dtype, **more), gradients="spread" not in more
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block", [(32, 32), (64, 32), (32, 64)], ids=str)
def test_lists_are_the_definition(seed, causal, block):
    rng = cases.generator(seed)
    where = cases.blocks_case(rng, rows=131, block=block, batch=2)
    compare(cases.softmax_case(rng, where=where, rows=131, batch=2, causal=causal, valid=True, dtype=torch.float64))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("where", [(0, 5), (40, 1), "lists", "far"], ids=str)
def test_the_linear_branch_covers_the_rest(seed, shared, where):
    rng = cases.generator(seed)
    causal = where != "far"
    listed = cases.blocks_case(rng, rows=131) if where == "lists" else (7, 30) if where == "far" else where
    p = cases.softmax_case(rng, where=listed, rows=131, causal=causal, dtype=torch.float64)
    branch = cases.branch_case(rng, p, shared=shared, state=isinstance(where, tuple), dtype=torch.float64)
    compare(p, branch)


def test_a_branch_over_lists_that_are_not_causal(seed):
    rng = cases.generator(seed)
    p = cases.softmax_case(rng, where=cases.blocks_case(rng, rows=100), rows=100, causal=False, dtype=torch.float64)
    compare(p, cases.branch_case(rng, p, shared=False, dtype=torch.float64))


def test_packed_sequences_do_not_see_each_other(seed):
    rng = cases.generator(seed)
    p = cases.softmax_case(rng, varlen=[(5, 9), (0, 0), (70, 70), (1, 1)], dtype=torch.float64)
    compare(p)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_linear_attention_is_the_definition(seed, causal, normalize):
    rng = cases.generator(seed)
    for more in ({"rows": 300, "state": causal}, {"varlen": [(3, 3), (0, 0), (140, 140)]}, {"rows": 1}):
        p = cases.linear_case(rng, causal=causal, normalize=normalize, dtype=torch.float64, **more)
        o, den, state = backend_torch.linear_forward(p)
        want = cases.linear_reference(p)
        for got, exact in zip((o, den, state), want, strict=True):
            assert (got is None) == (exact is None)
            if exact is not None:
                cases.assert_close(got, exact)
        do = torch.randn_like(o)
        want = cases.linear_gradients(p, do)
        for name, got in zip(("fq", "fk", "v"), backend_torch.linear_backward(p, o, den, do), strict=True):
            cases.assert_close(got, want[name], name=name)


@pytest.mark.parametrize("more", [{}, {"softcap": 2.0}, {"sink_logits": True}, {"masked": False}], ids=str)
def test_a_decode_step_is_the_definition(seed, more):
    rng = cases.generator(seed)
    kinds = {"sizes": ((1, 40), (2, 7), (1, 3)), "kinds": ("cache", "hybrid", "linear")}
    p = cases.decode_case(rng, dtype=torch.float64, **kinds, **more)
    cases.assert_close(backend_torch.decode(p)[0], cases.decode_reference(p))


@pytest.mark.parametrize("block", [1, 8, 16])
@pytest.mark.parametrize("padding", ["left", "right", "none"])
@pytest.mark.parametrize("more", [{}, {"keep": 0}, {"sinks": 0}, {"sink_logits": True, "softcap": 3.0}], ids=str)
def test_retention_is_the_definition_at_any_chunking(seed, block, padding, more):
    rng = cases.generator(seed)
    p = cases.retain_case(rng, block=block, padding=padding, dtype=torch.float64, **more)
    whole, memory = backend_torch.retain(p)
    real = (p.at >= 0)[:, None, :, None].expand_as(whole)
    want = cases.retain_reference(p)
    torch.testing.assert_close(whole[real], want[real], atol=1e-10, rtol=1e-10)
    assert (whole[~real] == 0).all()
    held, parts, first = None, [], 0
    while first < p.q.shape[2]:
        last = first + cases.randint(rng, 1, 13)
        new = {name: getattr(p, name)[:, :, first:last] for name in ("q", "k", "v")}
        o, held = backend_torch.retain(dataclasses.replace(p, at=p.at[:, first:last], memory=held, **new))
        parts.append(o)
        first = last
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-10, rtol=1e-10)
    for n, (got, exact) in enumerate(zip(held, memory, strict=True)):
        if n not in (4, 5, 6, 7):  # the kept stand in any order
            torch.testing.assert_close(got, exact, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(held[6].sort(-1).values, memory[6].sort(-1).values)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rule", [{"keep": 3}, {"keep": None, "mass": 0.7}, {"keep": 1, "first": 1}], ids=str)
def test_selection_keeps_the_best_blocks(seed, causal, rule):
    rng = cases.generator(seed)
    for heads, groups in ((4, 2), (3, 3)):
        p = cases.pooled_case(rng, causal=causal, heads=heads, groups=groups, batch=2, **rule)
        got = cases.listed(backend_torch.select(p), 2, groups)
        assert [[[set(x) for x in rows] for rows in heads] for heads in got] == cases.select_reference(p)


@pytest.mark.parametrize("kind", ["hedgehog", "elu1", "relu", "softmax", "poly"])
def test_feature_maps_and_their_gradients(seed, kind):
    rng = cases.generator(seed)
    x = cases.normal(rng, 2, 3, 29, 16, dtype=torch.float64)
    weights = cases.feature_weights(rng, kind, 3, 16, dtype=torch.float64)
    y = backend_torch.features(x, kind, weights)
    torch.testing.assert_close(y, cases.features_reference(x, kind, weights))
    assert (y >= 0).all()
    dx, dweights = backend_torch.features_backward(x, kind, weights, torch.ones_like(y))
    assert dx.shape == x.shape
    assert [w.shape for w in dweights] == [w.shape for w in weights]


def test_a_row_without_keys_gives_zero_and_minus_infinity():
    p = cases.softmax_case(cases.generator(1), where=(0, 0), rows=9)
    got: Mixed = backend_torch.mixed_forward(p, None)
    assert (got.o == 0).all()
    assert (got.lse == -torch.inf).all()
