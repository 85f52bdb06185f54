"""The C++ kernels of linear attention against dense definitions in fp64, with every instruction set."""

import dataclasses

import kernel_cases as cases
import pytest
import torch
from test_cpp import DIMS, HEADS, level, seeds

from attnconvert.kernels import backend_cpp as backend

__all__ = ["level"]  # the fixture


@pytest.mark.parametrize("causal", [True, False])
def test_linear_attention_and_its_gradients_are_the_definition(seed, level, causal):
    for one in seeds(seed, 8):
        rng = cases.generator(one)
        heads, groups = cases.choose(rng, HEADS)
        rows = cases.choose(rng, (63, 64, 65, 131))
        p = cases.linear_case(
            rng,
            batch=2,
            heads=heads,
            groups=groups,
            rows=rows,
            keys=None if causal else 77,
            features=cases.choose(rng, (16, 30, 64, 256)),
            dim=cases.choose(rng, DIMS),
            dtype=cases.choose(rng, cases.LOW),
            causal=causal,
            normalize=bool(cases.randint(rng, 0, 1)),
            state=bool(cases.randint(rng, 0, 1)),
            varlen=cases.choose(rng, (None, None, [(40, 40), (0, 0), (70, 70)])),
            views=bool(cases.randint(rng, 0, 1)),
        )
        got, exact, plain = (
            backend.linear_forward(p),
            cases.linear_reference(cases.double(p)),
            cases.linear_reference(p),
        )
        for name, x, y, z in zip(("o", "den", "state"), got, exact, plain, strict=True):
            if y is None:
                assert x is None
            else:
                cases.assert_close(x, y, z, name=name, dtype=p.v.dtype)
        do = cases.normal(rng, *got[0].shape, dtype=p.v.dtype)
        exact, plain = cases.linear_gradients(cases.double(p), do.double()), cases.linear_gradients(p, do)
        for name, x in zip(("fq", "fk", "v"), backend.linear_backward(p, *got[:2], do), strict=True):
            # o is saved in bf16; where the normaliser is small one ulp of it is what cancellation leaves in dφ(q)
            factor = 6 if name == "fq" and p.v.dtype == torch.bfloat16 else 2
            cases.assert_close(x, exact[name], plain[name], name=f"d{name}", factor=factor)


def test_a_state_may_be_split_anywhere(seed, level):
    rng = cases.generator(seed)
    p = cases.linear_case(rng, rows=150, dim=40, features=24, causal=True)
    o, den, state = backend.linear_forward(p)
    for cut in (1, 64, 77, 149):
        first, second = (
            dataclasses.replace(p, fq=p.fq[:, :, s], fk=p.fk[:, :, s], v=p.v[:, :, s])
            for s in (slice(0, cut), slice(cut, None))
        )
        a, b, held = backend.linear_forward(first)
        c, d, end = backend.linear_forward(dataclasses.replace(second, state=held))
        torch.testing.assert_close(torch.cat([a, c], 2), o, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.cat([b, d], 2), den, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(end, state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_long_sequences_are_the_definition_whatever_the_number_of_threads(seed, level, causal, dtype):
    """Longer than the segments whose sums different threads take, and no multiple of them."""
    if level == "emulated":
        pytest.skip("the same source as natively, and too slow at this length")
    rng = cases.generator(seed)
    p = cases.linear_case(rng, heads=4, groups=2, rows=2611, dim=40, features=24, dtype=dtype, causal=causal)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(backend.linear_forward(p))
    finally:
        torch.set_num_threads(threads)
    exact, plain = cases.linear_reference(cases.double(p)), cases.linear_reference(p)
    for name, x, y, z in zip(("o", "den", "state"), found[0], exact, plain, strict=True):
        if y is not None:
            cases.assert_close(x, y, z, name=name, dtype=dtype)
    for other in found[1:]:
        assert all(x is None or torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


def test_a_key_whose_value_is_zero_still_counts_in_the_normaliser(seed, level):
    rng = cases.generator(seed)
    p = cases.softmax_case(rng, rows=150, dim=40, where=(20, 33))
    branch = cases.branch_case(rng, p, index=(0, 1), shared=True, features=24)
    p.v[:, :, 10:60] = 0
    out = backend.mixed_forward(p, branch)
    exact = cases.mixed_reference(cases.double(p), cases.double(branch))
    torch.testing.assert_close(out.o, exact.o.float(), rtol=1e-4, atol=1e-5)
    alone = cases.linear_case(rng, rows=150, dim=40, features=24)
    alone.v[:, :, 10:60] = 0
    _, den, _ = backend.linear_forward(alone)
    torch.testing.assert_close(den, cases.linear_reference(cases.double(alone))[1].float(), rtol=1e-4, atol=1e-5)
