"""Every Triton function under the sanitiser: nothing out of bounds, no undefined lane, no race, no overflow.

Shapes are odd on purpose (no length is a multiple of a tile) and q, k, v are views with NaN between their rows, so that
a read beside the tensor is either found or shows in the result. Small, since all of it is interpreted.
"""

import dataclasses
import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton's interpreter is not what runs kernels here", allow_module_level=True)

import kernel_cases as cases
from triton_sanitizer import sanitized

from attnconvert.kernels import backend_triton as backend

MIXED = {
    "causal windows with a state and extra keys": {
        "causal": True, "where": (5, 40), "rows": 41, "keys": 70, "extra": 3, "valid": True, "branch": "shared",
        "state": True, "sink_logits": True,
    },
    "windows to both sides": {"causal": False, "where": (0, 9), "rows": 67, "branch": "separate", "extra": 3},
    "no limit and soft caps": {"causal": True, "where": (-1, 1), "rows": 67, "softcap": 3.0},
    "lists": {"causal": True, "where": "lists", "rows": 67, "keys": 99, "branch": "separate", "valid": True},
    "lists to both sides": {"causal": False, "where": "lists", "rows": 67, "branch": "shared"},
    "packed sequences": {"causal": True, "where": (6, 20), "varlen": [(3, 5), (0, 0), (37, 40)], "branch": "shared"},
}  # fmt: skip


def build(rng, name, dim=40):
    case = dict(MIXED[name])
    kind, state = case.pop("branch", None), case.pop("state", False)
    if case["where"] == "lists":
        case["where"] = cases.blocks_case(rng, rows=case["rows"], keys=case.get("keys"))
    p = cases.softmax_case(rng, dim=dim, views=True, **case)
    if kind is None:
        return p, None
    return p, cases.branch_case(rng, p, features=24, shared=kind == "shared", state=state, views=True)


@pytest.mark.parametrize("name", MIXED)
def test_mixed_attention_forward_and_backward(seed, name):
    rng = cases.generator(seed)
    p, branch = build(rng, name)
    do, dlinear = cases.output_gradients(rng, p, branch)
    with sanitized():
        out = backend.mixed_forward(p, branch)
        found = backend.mixed_backward(p, branch, out, do, dlinear)
    cases.check_mixed(out, p, branch)
    cases.check_gradients(found, p, branch, do, dlinear)


@pytest.mark.parametrize("more", [{"state": True}, {"causal": False}, {"varlen": [(3, 3), (0, 0), (99, 99)]}], ids=str)
def test_linear_attention_forward_and_backward(seed, more):
    rng = cases.generator(seed)
    p = cases.linear_case(rng, **{"rows": 141, "features": 24, "dim": 40, "views": True, **more})
    do = cases.normal(rng, *p.fq.shape[:3], 40)
    with sanitized():
        o, den, state = backend.linear_forward(p)
        found = backend.linear_backward(p, o, den, do)
    exact, plain = cases.linear_reference(cases.double(p)), cases.linear_reference(p)
    for name, x, y, z in zip(("o", "den", "state"), (o, den, state), exact, plain, strict=True):
        if y is not None:
            cases.assert_close(x, y, z, name=name)
    exact, plain = (cases.linear_gradients(x, do) for x in (cases.double(p), p))
    for name, x in zip(("fq", "fk", "v"), found, strict=True):
        cases.assert_close(x, exact[name], plain[name], name=f"d{name}")


def test_a_decode_step(seed):
    sizes, kinds = ((1, 40), (2, 7), (1, 3)), ("cache", "hybrid", "linear")
    rng = cases.generator(seed)
    p = cases.decode_case(rng, dim=40, features=24, sizes=sizes, kinds=kinds, sink_logits=True, late=True)
    reached = [getattr(part, f.name) for part in p.parts for f in dataclasses.fields(part)]
    with sanitized(*(x for x in reached if isinstance(x, torch.Tensor))):
        o, received = backend.decode(p)
    exact, plain = (cases.decode_reference(x, received=True) for x in (cases.double(p), p))
    cases.assert_close(o, exact[0], plain[0])
    for got, x, y in zip(received, exact[1], plain[1], strict=True):
        cases.assert_close(got, x, y, name="received")


def test_retention_in_two_calls(seed):
    p = cases.retain_case(cases.generator(seed), rows=45, dim=40)
    cut = 19
    with sanitized():
        first, memory = backend.retain(replace(p, slice(0, cut)))
        second, _ = backend.retain(replace(p, slice(cut, None), memory=memory))
    o = torch.cat([first, second], 2)
    cases.assert_close(o, cases.retain_reference(cases.double(p)), cases.retain_reference(p))


def replace(p, rows, **more):
    parts = {name: getattr(p, name)[:, :, rows] for name in ("q", "k", "v")}
    return type(p)(**{**vars(p), **parts, "at": p.at[:, rows], **more})


@pytest.mark.parametrize("rule", [{"keep": 2}, {"keep": None, "mass": 0.8}, {"causal": False, "keep": 3}], ids=str)
def test_selection(seed, rule):
    p = cases.pooled_case(cases.generator(seed), rows=143, dim=40, **rule)
    with sanitized():
        got = backend.select(p)
    listed = cases.listed(got, 1, 2)
    assert [[[set(n) for n in g] for g in b] for b in listed] == cases.select_reference(p)


@pytest.mark.parametrize("kind", ["hedgehog", "elu1", "relu", "softmax", "poly"])
def test_feature_maps(seed, kind):
    rng = cases.generator(seed)
    x, weights = cases.strided(cases.normal(rng, 1, 2, 37, 40)), cases.feature_weights(rng, kind, 2, 40)
    with sanitized():
        y = backend.features(x, kind, weights)
        dout = cases.normal(rng, *y.shape)
        dx, dweights = backend.features_backward(x, kind, weights, dout)
    exact, plain = (cases.features_reference(t, kind, weights) for t in (x.double(), x))
    cases.assert_close(y, exact, plain)
    exact, plain = (feature_gradients(x, kind, weights, dout, dtype) for dtype in (torch.float64, torch.float32))
    for n, got in enumerate((dx, *dweights)):
        cases.assert_close(got, exact[n], plain[n], name=f"gradient {n}")


def feature_gradients(x, kind, weights, dout, dtype):
    inputs = {n: t.detach().to(dtype).requires_grad_() for n, t in enumerate((x, *weights))}
    y = cases.features_reference(inputs[0], kind, tuple(inputs.values())[1:])
    return cases.gradients((y * dout.to(dtype)).sum(), inputs)


def far_apart(x):
    """The same numbers, the heads further apart than int32 counts. Nearly all of the memory is never touched."""
    b, h, s, d = x.shape
    stride = 2**31 // (h - 1) + 64
    memory = torch.UntypedStorage(((h - 1) * stride + s * d) * x.element_size())
    view = torch.empty(0, dtype=x.dtype).set_(memory, 0, (b, h, s, d), (0, stride, d, 1))
    view.copy_(x)
    return view


def test_heads_may_be_further_apart_than_int32_counts(seed):
    rng = cases.generator(seed)
    p = cases.softmax_case(rng, heads=4, groups=2, rows=33, dim=16, where=(7, -1), dtype=torch.bfloat16)
    p = type(p)(**{**vars(p), "k": far_apart(p.k), "v": far_apart(p.v)})
    try:
        with sanitized():
            out = backend.mixed_forward(p, None)
    except MemoryError:
        pytest.skip("there is not enough address space")
    cases.check_mixed(out, p)
