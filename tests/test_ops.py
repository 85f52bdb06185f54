"""The public functions: argument errors, autograd, torch.compile, the choice of a back end."""

import logging

import kernel_cases as cases
import pytest
import torch
from torch.library import opcheck

from attnconvert.kernels import custom_ops, dispatch, ops
from attnconvert.kernels.problem import Part, Varlen

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")


def trained(p, branch=None):
    """The problem with gradients wanted wherever there are any."""
    leaf = lambda x: None if x is None else x.detach().requires_grad_()  # noqa: E731
    p = cases.dataclasses.replace(p, q=leaf(p.q), k=leaf(p.k), v=leaf(p.v), sink_logits=leaf(p.sink_logits))
    if p.extra is not None:
        p = cases.dataclasses.replace(p, extra=cases.dataclasses.replace(p.extra, k=leaf(p.extra.k), v=leaf(p.extra.v)))
    if branch is not None:
        branch = cases.dataclasses.replace(branch, fq=leaf(branch.fq), fk=leaf(branch.fk), weight=leaf(branch.weight))
    return p, branch


def mixed_problems(rng):
    """Every kind of argument at least once, small."""
    p = cases.softmax_case(rng, where=(5, 0), rows=19, keys=23, valid=True, extra=2, sink_logits=True, softcap=3.0)
    yield p, cases.branch_case(rng, p, index=(-1, 0), state=True)
    p = cases.softmax_case(rng, where=cases.blocks_case(rng, rows=70), rows=70, causal=False)
    yield p, cases.branch_case(rng, p, shared=False)
    yield cases.softmax_case(rng, varlen=[(3, 5), (0, 0), (9, 9)]), None


def test_the_mixed_operators_pass_opcheck(seed):
    for p, branch in mixed_problems(cases.generator(seed)):
        p, branch = trained(p, branch)
        opcheck(custom_ops.mixed, (*custom_ops.pack(p, branch), "torch"), test_utils=CHECKS)
        out = custom_ops.mixed(*custom_ops.pack(p, branch), "torch")
        held = [x.detach() for x in out[:4]]
        more = torch.ones_like(out[2]) if branch is not None and not branch.shared else None
        opcheck(
            custom_ops.mixed_backward,
            (*custom_ops.pack(p, branch), "torch", *held, torch.ones_like(p.q), more),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_the_other_operators_pass_opcheck(seed):
    rng = cases.generator(seed)
    linear = cases.linear_case(rng, rows=20, state=True)
    leaves = [x.requires_grad_() for x in (linear.fq, linear.fk, linear.v)]
    opcheck(custom_ops.linear, (*leaves, True, True, linear.state, None, None, [], "torch"), test_utils=CHECKS)
    x = cases.normal(rng, 1, 2, 9, 16).requires_grad_()
    weights = [w.requires_grad_() for w in cases.feature_weights(rng, "hedgehog", 2, 16)]
    opcheck(custom_ops.features, (x, "hedgehog", weights, "torch"), test_utils=CHECKS)
    step = cases.decode_case(rng, sizes=((1, 9), (1, 4)))
    opcheck(custom_ops.decode, (*custom_ops.pack_decode(step), "torch"), test_utils=("test_schema", "test_faketensor"))
    p = cases.retain_case(rng, rows=20)
    q, k, v = (x.requires_grad_() for x in (p.q, p.k, p.v))
    opcheck(
        custom_ops.retain,
        (q, k, v, p.at, p.scale, p.window, p.keep, p.sinks, p.block, [], 0.0, None, "torch"),
        test_utils=CHECKS,
    )


def test_gradients_reach_every_input_of_mixed_attention(seed):
    rng = cases.generator(seed)
    p = cases.softmax_case(rng, where=(5, 9), rows=40, extra=3, sink_logits=True, dtype=torch.float64)
    p, branch = trained(p, cases.branch_case(rng, p, index=(1, 0), dtype=torch.float64))
    out = ops.mixed_attention(
        p.q, p.k, p.v, p.where, causal=True, scale=p.scale, extra=p.extra, sink_logits=p.sink_logits, branch=branch
    )
    do = torch.randn_like(out.o)
    inputs = [p.q, p.k, p.v, p.extra.k, p.extra.v, p.sink_logits, branch.fq, branch.fk, branch.weight]
    names = ["q", "k", "v", "extra_k", "extra_v", "sink_logits", "fq", "fk", "weight"]
    want = cases.mixed_gradients(p, branch, do)
    for name, got in zip(names, torch.autograd.grad(out.o, inputs, do), strict=True):
        torch.testing.assert_close(got, want[name].to(got.dtype), atol=1e-6, rtol=1e-6, msg=name)


def test_retention_has_gradients(seed):
    rng = cases.generator(seed)
    p = cases.retain_case(rng, rows=30, window=30, keep=0, block=1, padding="none", dtype=torch.float64)
    q, k, v = (x.requires_grad_() for x in (p.q, p.k, p.v))
    o, _ = ops.retention(q, k, v, at=p.at, window=30, keep=0, sinks=2, block=1)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    do = torch.randn_like(o)
    got, want = (torch.autograd.grad(x, (q, k, v), do) for x in (o, dense))
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)


def test_a_compiled_function_with_every_kernel_gives_the_same(seed):
    rng = cases.generator(seed)
    q, k, v = (cases.normal(rng, 1, h, 40, 16) for h in (4, 2, 2))
    weights = cases.feature_weights(rng, "hedgehog", 4, 16)
    key_weights = cases.feature_weights(rng, "hedgehog", 2, 16)
    where = ops.ranges((-1, 8))

    def layer(q, k, v):
        o = ops.mixed_attention(q, k, v, where, causal=True).o
        fq, fk = ops.feature_map(q, "hedgehog", weights), ops.feature_map(k, "hedgehog", key_weights)
        return o + ops.linear_attention(fq, fk, v, causal=True)[0]

    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(q, k, v), layer(q, k, v))
    q.requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(q, k, v)
    got = torch.autograd.grad(compiled.sum(), q)[0]
    torch.testing.assert_close(got, torch.autograd.grad(layer(q, k, v).sum(), q)[0])


def good():
    q, k, v = (torch.randn(2, h, 8, 16) for h in (4, 2, 2))
    return {"q": q, "k": k, "v": v, "where": ops.ranges((4, -1)), "causal": True}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.randn(2, 4, 8, 12)}, "q has head dimension 12: expected a multiple of 8"),
        ({"q": torch.randn(2, 4, 8, 264)}, "q has head dimension 264"),
        ({"k": torch.randn(2, 3, 8, 16)}, "k has 3 heads: expected a divisor of 4"),
        ({"v": torch.randn(2, 2, 9, 16)}, "v has 9 keys"),
        ({"k": torch.randn(2, 2, 8, 16).half()}, "k is torch.float16: expected torch.float32"),
        ({"q": torch.zeros(2, 4, 8, 16, dtype=torch.int64)}, "q is torch.int64: expected bfloat16"),
        ({"q": torch.randn(2, 4, 16, 8).transpose(2, 3)}, "q has stride"),
        ({"q": torch.randn(4, 8, 16)}, r"q has shape \(4, 8, 16\): expected four axes"),
        ({"k": torch.randn(2, 2, 7, 16), "v": torch.randn(2, 2, 7, 16)}, "k has 7 keys: expected at least 8"),
        ({"where": ops.ranges((4,))}, "where has 1 windows"),
        ({"valid": torch.ones(2, 7, dtype=torch.bool)}, "valid has shape"),
        ({"valid": torch.ones(2, 8)}, "valid is torch.float32: expected bool"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"sink_logits": torch.zeros(3)}, r"sink_logits has shape \(3,\): expected \(4,\)"),
        ({"backend": "cuda"}, "backend is 'cuda': expected one of auto, triton, cpp, torch"),
        (
            {"varlen": Varlen(cu_q=torch.tensor([0, 8]), cu_k=torch.tensor([0, 8]), max_q=8, max_k=8)},
            "varlen with a batch of 2",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_an_argument_error_names_the_argument(change, message):
    given = {**good(), **change}
    with pytest.raises(ValueError, match=message):
        ops.mixed_attention(given.pop("q"), given.pop("k"), given.pop("v"), given.pop("where"), **given)


def test_more_argument_errors():
    q, k, v = (torch.randn(1, h, 1, 16) for h in (4, 2, 2))
    with pytest.raises(ValueError, match=r"sizes\[1\] is -2"):
        ops.ranges((3, -2))
    with pytest.raises(ValueError, match=r"parts\[0\].used is 3: expected 0 to 1"):
        ops.decode_step(q, [Part(first=0, k=k, v=v, used=3)])
    with pytest.raises(ValueError, match="kind is 'gelu'"):
        ops.feature_map(q, "gelu")
    with pytest.raises(ValueError, match="keep is None and mass is None"):
        ops.select_blocks(q, k)
    with pytest.raises(ValueError, match="block is 9: expected at most the window, 8"):
        at = torch.zeros(1, 1, dtype=torch.int32)
        ops.retention(q, k, v, at=at, window=8, keep=1, sinks=0, block=9)


def test_a_back_end_that_cannot_run_says_why_and_nothing_else_takes_its_place():
    given = good()
    q, k, v, where = (given.pop(x) for x in ("q", "k", "v", "where"))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="backend is .cudnn."), dispatch.use("cudnn"):
            pass
    with pytest.raises(dispatch.BackendError, match=r"'cpp' was asked for but cannot run mixed_forward: .*float64"):
        ops.mixed_attention(q.double(), k.double(), v.double(), where, **given, backend="cpp")


def test_the_choice_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_said", set())
    monkeypatch.delenv("ATTNCONVERT_BACKEND", raising=False)
    given = good()
    q, k, v, where = (given.pop(x) for x in ("q", "k", "v", "where"))
    with caplog.at_level(logging.INFO, logger="attnconvert.kernels"):
        for _ in range(3):
            ops.mixed_attention(q.double(), k.double(), v.double(), where, **given)
    assert [r.getMessage() for r in caplog.records] == ["mixed_forward runs on the torch back end (float64)"]


def test_the_environment_chooses_and_an_argument_wins(monkeypatch):
    monkeypatch.setenv("ATTNCONVERT_BACKEND", "cpp")
    assert dispatch.wanted(None) == "cpp"
    assert dispatch.wanted("torch") == "torch"
    with dispatch.use("torch"):
        assert dispatch.wanted(None) == "torch"
    monkeypatch.setenv("ATTNCONVERT_BACKEND", "fast")
    with pytest.raises(ValueError, match="backend is 'fast'"):
        dispatch.wanted(None)
