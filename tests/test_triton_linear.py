"""Linear attention and the feature maps in Triton against their dense definitions, in the interpreter or on a GPU."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

import kernel_cases as cases

from attnconvert.kernels import backend_triton as backend
from attnconvert.kernels import triton_linear

if backend.unavailable():
    pytest.skip(backend.unavailable(), allow_module_level=True)

SHAPES = (  # what differs from one case to the next: lengths, heads, sizes, dtype, views
    {"rows": 1, "dim": 16, "features": 16, "heads": 1, "groups": 1},
    {"rows": 63, "dim": 40, "features": 80, "heads": 3, "groups": 1},
    {"rows": 131, "dim": 64, "features": 64, "heads": 4, "groups": 1, "dtype": torch.bfloat16, "views": True},
    {"rows": 65, "dim": 16, "features": 32, "batch": 2, "dtype": torch.float16, "state": True},
    {"rows": 97, "dim": 40, "features": 40, "normalize": False, "state": True, "views": True},
)


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def check(p):
    """Forward and backward of p against fp64."""
    o, den, state = backend.linear_forward(p)
    here = cases.on(p, "cpu")
    exact, plain = cases.linear_reference(cases.double(here)), cases.linear_reference(here)
    cases.assert_close(o, exact[0], plain[0])
    cases.assert_close(den, exact[1], plain[1], name="den", dtype=p.v.dtype)
    assert (state is None) == (not p.causal)
    if state is not None:
        cases.assert_close(state, exact[2], plain[2], name="state", dtype=p.v.dtype)
    do = torch.randn(o.shape).to(p.v.dtype)
    found = backend.linear_backward(p, o, den, do.to(o.device))
    exact, plain = cases.linear_gradients(cases.double(here), do.double()), cases.linear_gradients(here, do)
    for name, got in zip(("fq", "fk", "v"), found, strict=True):
        assert got.dtype == getattr(p, name).dtype
        # of a single key o is v, and the gradients of the features are what cancellation leaves
        alone = p.normalize and p.fq.shape[2] == 1 and name != "v"
        limit = 2e-5 if alone else None
        # the largest of some ten thousand errors varies: one draw in a hundred is over twice that of plain math
        cases.assert_close(got, exact[name], None if alone else plain[name], name=f"d{name}", limit=limit, factor=3)
    return o, state


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_causal_sums_are_the_definition(seed, device, shape):
    check(cases.linear_case(cases.generator(seed), **shape, device=device))


@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_the_sums_over_all_keys_are_the_definition(seed, device, shape):
    check(cases.linear_case(cases.generator(seed), causal=False, keys=75, **shape, device=device))


@pytest.mark.parametrize("sizes", [(40, 40), (128, 72)], ids=str)
def test_the_state_that_stays_in_registers_gives_the_same(seed, device, sizes, monkeypatch):
    """The kernel of the newer chips, over two segments and the edge of a chunk."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(triton_linear, "architecture", lambda: "sm_90")
    launched = []
    tiles = triton_linear.carry_tiles
    monkeypatch.setattr(triton_linear, "carry_tiles", lambda *a: launched.append(a) or tiles(*a))
    features, dim = sizes
    p = cases.linear_case(
        cases.generator(seed), rows=577, heads=2, groups=1, features=features, dim=dim, state=True, views=True,
        dtype=torch.bfloat16, device=device,
    )  # fmt: skip
    here = cases.on(p, "cpu")
    exact, plain = cases.linear_reference(cases.double(here)), cases.linear_reference(here)
    for got, x, y in zip(backend.linear_forward(p), exact, plain, strict=True):
        cases.assert_close(got, x, y, dtype=torch.bfloat16)
    assert launched


def test_features_of_any_number_are_taken_in_steps(seed, device):
    check(cases.linear_case(cases.generator(seed), rows=9, heads=1, groups=1, features=520, dim=24, device=device))


def test_packed_sequences_are_those_alone(seed, device):
    rng = cases.generator(seed)
    lengths = [(65, 65), (0, 0), (5, 5)]
    p = cases.linear_case(rng, varlen=lengths, heads=2, groups=1, dim=24, features=40, device=device)
    o, _ = check(p)
    at = 0
    for rows, _ in lengths:
        alone = dataclasses.replace(
            p, varlen=None, **{x: getattr(p, x)[:, :, at : at + rows] for x in ("fq", "fk", "v")}
        )
        if rows:
            assert torch.equal(backend.linear_forward(alone)[0], o[:, :, at : at + rows]), "the batch has a say"
        at += rows


def test_packed_sequences_may_read_all_keys_and_have_other_lengths(seed, device):
    check(
        cases.linear_case(cases.generator(seed), causal=False, varlen=[(40, 3), (0, 4), (5, 70), (3, 0)], device=device)
    )


def test_a_sequence_in_pieces_is_the_sequence(seed, device):
    rng = cases.generator(seed)
    p = cases.linear_case(rng, rows=150, dim=16, features=24, state=True, device=device)
    whole, _, after = backend.linear_forward(p)
    pieces, state = [], p.state
    for piece in (slice(0, 1), slice(1, 66), slice(66, 130), slice(130, 150)):
        parts = {x: getattr(p, x)[:, :, piece] for x in ("fq", "fk", "v")}
        o, _, state = backend.linear_forward(dataclasses.replace(p, state=state, **parts))
        pieces.append(o)
    cases.assert_close(torch.cat(pieces, 2), whole.double().cpu(), limit=1e-5)
    cases.assert_close(state, after.double().cpu(), limit=1e-4)


def test_a_long_fp16_sequence_neither_overflows_nor_loses_its_gradients(seed, device):
    """Sums beyond 65504 and 1 / den below the smallest fp16."""
    p = cases.linear_case(cases.generator(seed), rows=160, dim=16, features=16, heads=1, groups=1, device=device)
    # fq·fk is about 1e5, so den is about 1e7; the gradient of v is about 1e-2, far above what fp16 holds of 1 / den
    p = dataclasses.replace(p, fq=(p.fq * 1600).half(), fk=(p.fk * 1600).half(), v=(p.v + 40).half(), state=None)
    check(p)


def test_a_batch_of_one_is_that_of_many(seed, device):
    p = cases.linear_case(cases.generator(seed), batch=3, rows=67, dim=16, features=16, device=device)
    o = backend.linear_forward(p)[0]
    alone = dataclasses.replace(p, fq=p.fq[1:2], fk=p.fk[1:2], v=p.v[1:2])
    assert torch.equal(backend.linear_forward(alone)[0], o[1:2])


@pytest.mark.parametrize("kind", ["hedgehog", "elu1", "relu", "softmax", "poly"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_feature_maps_and_their_gradients_are_the_definition(seed, device, kind, dtype):
    rng = cases.generator(seed)
    dim = cases.choose(rng, (16, 40, 72))
    x = cases.strided(cases.normal(rng, 2, 2, 37, dim, dtype=dtype)).to(device)
    weights = tuple(w.to(device) for w in cases.feature_weights(rng, kind, 2, dim))
    y = backend.features(x, kind, weights)
    assert y.dtype == dtype
    dout = cases.normal(rng, *y.shape, dtype=dtype).to(device)
    found = backend.features_backward(x, kind, weights, dout)
    x, dout, weights = x.cpu(), dout.cpu(), tuple(w.cpu() for w in weights)
    exact = cases.features_reference(x.double(), kind, tuple(w.double() for w in weights))
    cases.assert_close(y, exact, cases.features_reference(x.float(), kind, weights).to(dtype))
    leaves = {n: t.double().requires_grad_() for n, t in enumerate((x, *weights))}
    exact = cases.gradients(
        (cases.features_reference(leaves[0], kind, tuple(leaves.values())[1:]) * dout.double()).sum(), leaves
    )
    for n, got in enumerate((found[0], *found[1])):
        cases.assert_close(got, exact[n], name=f"gradient {n}", dtype=dtype)


def test_sharp_hedgehog_features_are_finite_and_floored(seed, device):
    x = 1e4 * torch.randn(1, 1, 9, 16, device=device)
    y = backend.features(x, "hedgehog", (torch.eye(16, device=device)[None],))
    assert y.isfinite().all()
    assert float(y.min()) >= 1e-12 * 0.999
    assert torch.allclose(y.sum(-1), torch.full_like(y[..., 0], 2.0), atol=1e-5)
