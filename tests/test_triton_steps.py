"""The decode step, retention and block selection in Triton against their definitions, interpreted or on a GPU."""

import dataclasses
import itertools
import math
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

import kernel_cases as cases

from attnconvert.kernels import backend_torch, triton_decode
from attnconvert.kernels import backend_triton as backend

if backend.unavailable():
    pytest.skip(backend.unavailable(), allow_module_level=True)


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


# --------------------------------------------------------------------------------------------------------------- decode


def check_step(p):
    here = cases.on(p, "cpu")
    o, received = backend.decode(p)
    exact, plain = (cases.decode_reference(x, received=True) for x in (cases.double(here), here))
    cases.assert_close(o, exact[0], plain[0])
    assert len(received) == sum(part.late is not None for part in p.parts) == len(exact[1])
    for got, x, y in zip(received, exact[1], plain[1], strict=True):
        assert got.dtype == torch.float32
        cases.assert_close(got, x, y, name="received", dtype=p.q.dtype)
    return o


@pytest.mark.parametrize(
    "more",
    [
        {"dim": 16},
        {
            "dim": 40,
            "features": 80,
            "per": 3,
            "sizes": ((1, 40), (2, 7), (1, 3)),
            "kinds": ("cache", "hybrid", "linear"),
        },
        {
            "dim": 64,
            "late": True,
            "softcap": 3.0,
            "sink_logits": True,
            "sizes": ((2, 70), (1, 1)),
            "kinds": ("hybrid", "linear"),
        },
        {"dim": 72, "per": 8, "late": True, "dtype": torch.bfloat16},
        {"dim": 24, "per": 17, "dtype": torch.float16, "masked": False, "sizes": ((1, 65),), "kinds": ("cache",)},
    ],
    ids=str,
)
def test_a_step_over_mixed_parts_is_the_definition(seed, device, more):
    check_step(cases.decode_case(cases.generator(seed), device=device, **more))


def test_long_caches_are_cut_and_merged(seed, device):
    sizes, kinds = ((1, 1500), (1, 30), (1, 700)), ("cache", "hybrid", "cache")
    p = cases.decode_case(
        cases.generator(seed), batch=1, dim=16, sizes=sizes, kinds=kinds, sink_logits=True, device=device
    )
    parts = list(p.parts)
    for n in (0, 2):  # all of the cache, and a slice of which nothing counts
        part = parts[n]
        mask = torch.ones_like(part.mask)
        mask[:, : triton_decode.slice_size(1500)] = n == 0
        k, v = (torch.randn(x.shape, device=device) for x in (part.k, part.v))
        parts[n] = dataclasses.replace(part, used=part.k.shape[2], k=k, v=v, mask=mask)
    check_step(dataclasses.replace(p, parts=tuple(parts)))


def test_a_step_without_any_key_gives_zero(seed, device):
    p = cases.decode_case(cases.generator(seed), sizes=((2, 9),), kinds=("cache",), device=device)
    part = dataclasses.replace(p.parts[0], mask=torch.zeros_like(p.parts[0].mask))
    assert (backend.decode(dataclasses.replace(p, parts=(part,)))[0] == 0).all()
    part = dataclasses.replace(p.parts[0], used=0)
    assert (backend.decode(dataclasses.replace(p, parts=(part,)))[0] == 0).all()


def test_large_logits_stay_finite(seed, device):
    p = cases.decode_case(cases.generator(seed), device=device)
    check_step(dataclasses.replace(p, q=p.q * 1e4))


def test_views_of_a_cache_and_a_growing_number_of_slots(seed, device):
    p = cases.decode_case(cases.generator(seed), sizes=((2, 20),), kinds=("cache",), masked=False, device=device)
    part = p.parts[0]
    k, v = (cases.strided(torch.randn(x.shape, device=device)) for x in (part.k, part.v))
    triton_decode._tables.clear()
    for used in (1, 19, 20):
        check_step(dataclasses.replace(p, parts=(dataclasses.replace(part, k=k, v=v, used=used),)))
    assert len(triton_decode._tables) == 1, "the table was uploaded again though nothing moved"


def test_the_result_of_a_sequence_is_its_own(seed, device):
    p = cases.decode_case(cases.generator(seed), batch=3, device=device)
    o, _ = backend.decode(p)
    names = ("k", "v", "mask", "fq", "state")
    parts = tuple(
        dataclasses.replace(x, **{n: getattr(x, n)[1:2] for n in names if getattr(x, n) is not None}) for x in p.parts
    )
    assert torch.equal(backend.decode(dataclasses.replace(p, q=p.q[1:2], parts=parts))[0], o[1:2])


# ------------------------------------------------------------------------------------------------------------ retention


def part_of(p, rows, memory):
    parts = {name: getattr(p, name)[:, :, rows] for name in ("q", "k", "v")}
    return dataclasses.replace(p, **parts, at=p.at[:, rows], memory=memory)


def in_pieces(p, cuts):
    outputs, memory = [], None
    for first, last in itertools.pairwise(cuts):
        o, memory = backend.retain(part_of(p, slice(first, last), memory))
        outputs.append(o)
    return torch.cat(outputs, 2), memory


def same_memory(got, wanted):
    """Ring slot by slot; kept tokens in any order."""
    got, wanted = (sorted_memory([x.cpu() for x in m]) for m in (got, wanted))
    for n, (x, y) in enumerate(zip(got, wanted, strict=True)):
        assert x.shape == y.shape
        assert x.dtype == y.dtype, n
        if y.dtype == torch.int32:
            assert torch.equal(x, y), f"memory[{n}]: other positions"
        else:
            assert torch.allclose(x.double(), y.double(), atol=1e-5), f"memory[{n}] differs"


def sorted_memory(m):
    order = torch.argsort(m[6], dim=-1, stable=True)
    wide = order[..., None].expand_as(m[4])
    return [*m[:4], m[4].gather(2, wide), m[5].gather(2, wide), m[6].gather(2, order), m[7].gather(2, order), *m[8:]]


@pytest.mark.parametrize(
    "more",
    [
        {"rows": 45, "dim": 16},
        {"rows": 41, "dim": 40, "heads": 6, "padding": "right", "sink_logits": True, "softcap": 5.0},
        {"rows": 37, "window": 13, "block": 5, "keep": 0, "sinks": 0, "batch": 1},
        {"rows": 40, "window": 8, "block": 8, "keep": 6, "sinks": 11, "batch": 1, "dim": 64},
    ],
    ids=str,
)
def test_retention_is_its_definition(seed, device, more):
    p = cases.retain_case(cases.generator(seed), device=device, **more)
    o, memory = backend.retain(p)
    here = cases.on(p, "cpu")
    exact, held = cases.retain_reference(cases.double(here), held=True)
    cases.assert_close(o, exact, cases.retain_reference(here))
    for b, groups in enumerate(held):
        for g, true in enumerate(groups):
            kept = [x for x in memory[6][b, g].tolist() if x >= 0]
            assert sorted(kept) == true["kept"]
            for at, score in zip(memory[2][b, g].tolist(), memory[3][b, g].tolist(), strict=True):
                assert at < 0 or math.isclose(score, true["scores"].get(at, 0.0), abs_tol=1e-4)
    same_memory(memory, backend_torch.retain(here)[1])


@pytest.mark.parametrize("padding", ["left", "right"])
def test_retention_does_not_depend_on_the_chunks(seed, device, padding):
    rng = cases.generator(seed)
    p = cases.retain_case(rng, rows=43, dim=16, heads=2, groups=1, padding=padding, device=device)
    o, memory = backend.retain(p)
    inner = sorted({cases.randint(rng, 1, 42) for _ in range(4)})
    for cuts in ([0, *inner, 43], [0, *range(8, 43, 8), 43], [0, 36, *range(37, 44)]):
        pieces, after = in_pieces(p, cuts)
        assert torch.allclose(pieces, o, atol=1e-5), f"cut at {cuts}"
        same_memory(after, memory)


def test_retention_in_16_bits_is_that_of_plain_math(seed, device):
    p = cases.retain_case(
        cases.generator(seed), rows=30, dim=40, batch=1, dtype=torch.bfloat16, keep=40, device=device
    )  # all that is old is kept: which ones rank higher does not matter
    here = cases.on(p, "cpu")
    cases.assert_close(backend.retain(p)[0], cases.retain_reference(cases.double(here)), cases.retain_reference(here))


def test_of_equal_scores_the_smaller_position_stays(device):
    rows = 40
    q = torch.zeros(1, 1, rows, 16, device=device)
    p = cases.retain_case(cases.generator(0), rows=rows, batch=1, heads=1, groups=1, dim=16, sinks=0, device=device)
    p = dataclasses.replace(
        p, q=q, k=torch.zeros_like(q), window=8, block=8, keep=3
    )  # no row is as far as window // 2?
    scored = cases.retain_reference(cases.double(cases.on(p, "cpu")), held=True)[1][0][0]
    assert sorted(backend.retain(p)[1][6].flatten().tolist()) == scored["kept"]


# ------------------------------------------------------------------------------------------------------------ selection


@pytest.mark.parametrize(
    "more",
    [
        {"keep": 2},
        {"keep": 3, "first": 2, "rows": 100, "keys": 333, "batch": 2, "heads": 6, "groups": 3},
        {"keep": 1, "block": (128, 32), "dim": 40},
        {"keep": 50, "block": (32, 64), "causal": False, "dtype": torch.float16, "rows": 97},
        {"keep": None, "mass": 0.8},
        {"keep": None, "mass": 0.95, "causal": False, "first": 1, "block": (64, 32)},
        {"keep": None, "mass": 1.0, "rows": 65},
    ],
    ids=str,
)
def test_selection_is_its_definition(seed, device, more):
    p = cases.pooled_case(cases.generator(seed), device=device, **more)
    here = cases.on(p, "cpu")
    got = cases.on(backend.select(p), "cpu")
    batch, groups = p.k.shape[0], p.k.shape[1]
    wanted = backend_torch.select(here)
    if p.mass is None or p.mass < 1:
        assert [[[set(n) for n in g] for g in b] for b in cases.listed(got, batch, groups)] == cases.select_reference(
            here
        )
        assert lists(got, "") == lists(wanted, "")
    by_query, by_key = lists(got, ""), lists(got, "t_")
    for b in range(batch):
        for g in range(groups):
            pairs = {(n, c) for n, row in enumerate(by_query[b][g]) for c in row}
            assert pairs == {(n, c) for c, row in enumerate(by_key[b][g]) for n in row}
            assert all(row == sorted(set(row)) for row in (*by_query[b][g], *by_key[b][g])), "not ascending"


def lists(blocks, of):
    starts, counts, columns = (getattr(blocks, of + x).tolist() for x in ("starts", "counts", "columns"))
    return [
        [[columns[s : s + c] for s, c in zip(*row, strict=True)] for row in zip(*group, strict=True)]
        for group in zip(starts, counts, strict=True)
    ]


def test_equal_scores_take_the_first_blocks(device):
    p = cases.pooled_case(cases.generator(0), rows=160, causal=False, keep=2, device=device)
    p = dataclasses.replace(p, q=torch.zeros_like(p.q))
    got = cases.on(backend.select(p), "cpu")
    assert all(row == [0, 1] for group in lists(got, "")[0] for row in group)


# -------------------------------------------------------------------------------------------------------- the back end


def test_what_cannot_run_is_refused_with_a_reason(seed, device):
    p = cases.decode_case(cases.generator(seed), device=device)
    assert backend.refuses("decode", p) is None
    assert "at most 8" in backend.refuses("decode", dataclasses.replace(p, parts=p.parts * 5))
    other = dataclasses.replace(p.parts[0], k=p.parts[0].k.double())
    assert "float64" in backend.refuses("decode", dataclasses.replace(p, parts=(other,)))
    assert "float64" in backend.refuses("linear_forward", cases.double(cases.linear_case(cases.generator(seed))))
    x = torch.zeros(1, 1, 3, 16, device=device)
    assert "units" in backend.refuses(
        "features", (x, "poly", cases.feature_weights(cases.generator(0), "poly", 1, 16, hidden=300))
    )
    assert backend.refuses("features", (x, "relu", ())) is None


def test_the_back_end_imports_without_triton_and_says_what_is_missing():
    code = "import sys; sys.modules['triton'] = None; from attnconvert.kernels import backend_triton as b; "
    code += "import importlib.util as u; u.find_spec = lambda *a: None; print(b.unavailable())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "triton is not installed" in done.stdout, done.stderr
