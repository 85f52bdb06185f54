"""The C++ kernels against dense definitions in fp64, with every instruction set: AVX-512 in plain C++ if need be."""

import ctypes
import dataclasses
import mmap
import subprocess
import sys
from pathlib import Path

import kernel_cases as cases
import pytest
import torch

from attnconvert.kernels import backend_cpp as backend
from attnconvert.kernels import cpp_build
from attnconvert.kernels.problem import Decode, Part

HERE = Path(__file__).parent
EMULATED = f"-DATTNCONVERT_EMULATED -DATTNCONVERT_POISON -O1 -include {HERE / 'avx512_emulation.h'}"
LEVELS = (*(name for name, (_, needed) in cpp_build.LEVELS.items() if needed <= cpp_build.machine()), "emulated")
DIMS = (16, 40, 64, 72, 80, 128, 160, 256)
LENGTHS = (1, 63, 64, 65, 131, 257)
HEADS = ((1, 1), (3, 1), (4, 1), (8, 1), (8, 2))

if backend.unavailable():
    pytest.skip(backend.unavailable(), allow_module_level=True)


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    """The kernels of one instruction set; outputs are handed out full of NaN."""
    if request.param == "emulated":
        monkeypatch.setenv("ATTNCONVERT_ISA", "avx512bf16")
        monkeypatch.setenv("ATTNCONVERT_CXXFLAGS", EMULATED)
        monkeypatch.setenv("XDG_CACHE_HOME", str(request.config.cache.mkdir("attnconvert-cpp")))
    else:
        monkeypatch.setenv("ATTNCONVERT_ISA", request.param)
    assert backend.unavailable() is None, backend.unavailable()
    empty = torch.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(float("nan") if x.is_floating_point() else -77)

    monkeypatch.setattr(backend.torch, "empty", poisoned)
    return request.param


def seeds(seed, count):
    return [(seed + 7919 * n) % 2**32 for n in range(count)]


def mixed_case(rng, dim=None, length=None, heads=None, spread=1.0):
    """Any mixed problem, and a branch or None."""
    heads, groups = heads or cases.choose(rng, HEADS)
    rows, batch = length or cases.choose(rng, LENGTHS[:5]), cases.randint(rng, 1, 2)
    keys = rows + cases.choose(rng, (0, 0, 1, 40, 130))
    causal, more = bool(cases.randint(rng, 0, 1)), {}
    lists = cases.randint(rng, 0, 2) == 0
    if lists:
        block = cases.choose(rng, ((32, 32), (64, 64), (128, 64), (64, 128)))
        partial = bool(cases.randint(rng, 0, 1))
        more["where"] = cases.blocks_case(
            rng, batch=batch, groups=groups, rows=rows, keys=keys, block=block, partial=partial
        )
    else:
        more["extra"] = cases.choose(rng, (0, 0, 5, 37))
    p = cases.softmax_case(
        rng,
        batch=batch,
        heads=heads,
        groups=groups,
        rows=rows,
        keys=keys,
        dim=dim or cases.choose(rng, DIMS),
        dtype=cases.choose(rng, cases.LOW),
        causal=causal,
        valid=bool(cases.randint(rng, 0, 1)),
        softcap=cases.choose(rng, (0.0, 0.0, 5.0)),
        sink_logits=bool(cases.randint(rng, 0, 1)),
        views=bool(cases.randint(rng, 0, 1)),
        spread=spread,
        **more,
    )
    if cases.randint(rng, 0, 1) or not (lists or max(p.where.sizes) >= 0):
        return p, None
    branch = cases.branch_case(
        rng,
        p,
        features=cases.choose(rng, (16, 24, 100)),
        shared=bool(cases.randint(rng, 0, 1)),
        state=causal and not lists and bool(cases.randint(rng, 0, 1)),
        dtype=cases.choose(rng, (None, torch.float32)),
    )
    return p, branch


@pytest.mark.parametrize("dim", DIMS)
def test_mixed_attention_is_the_definition(seed, level, dim):
    for one in seeds(seed, 3):
        p, branch = mixed_case(cases.generator(one), dim=dim)
        cases.check_mixed(backend.mixed_forward(p, branch), p, branch)


@pytest.mark.parametrize("length", LENGTHS)
def test_every_length_and_grouping_of_heads_is_the_definition(seed, level, length):
    for heads, one in zip(HEADS, seeds(seed, len(HEADS)), strict=True):
        dim = 64 if length < 200 else 16
        p, branch = mixed_case(cases.generator(one), dim=dim, length=length, heads=heads)
        cases.check_mixed(backend.mixed_forward(p, branch), p, branch)


@pytest.mark.parametrize("dim", DIMS)
def test_gradients_are_those_of_the_definition(seed, level, dim):
    for one in seeds(seed, 2):
        rng = cases.generator(one)
        p, branch = mixed_case(rng, dim=dim, length=cases.choose(rng, (63, 65, 131)))
        do, dlinear = cases.output_gradients(rng, p, branch)
        got = backend.mixed_backward(p, branch, backend.mixed_forward(p, branch), do, dlinear)
        cases.check_gradients(got, p, branch, do, dlinear)


@pytest.mark.parametrize("causal", [True, False])
def test_the_rest_of_many_blocks_is_the_definition(seed, level, causal):
    # few blocks of many are named: the branch takes them away from a sum of all, and must leave no trace of them
    rng = cases.generator(seed)
    where = cases.blocks_case(rng, groups=1, rows=1000, keys=1020, density=0.1)
    p = cases.softmax_case(rng, where=where, heads=2, groups=1, rows=1000, keys=1020, dim=16, causal=causal)
    branch = cases.branch_case(rng, p, index=(0,), features=16)
    do, _ = cases.output_gradients(rng, p, branch)
    out = backend.mixed_forward(p, branch)
    cases.check_mixed(out, p, branch)
    cases.check_gradients(backend.mixed_backward(p, branch, out, do, None), p, branch, do)


def test_packed_sequences_are_as_if_alone(seed, level):
    lengths = [(5, 9), (0, 0), (70, 131), (1, 1), (0, 4), (33, 33)]
    for n, one in enumerate(seeds(seed, 6)):
        rng = cases.generator(one)
        dtype, causal, lists = cases.choose(rng, cases.LOW), bool(n % 2), n % 3 == 0
        where = cases.blocks_case(rng, groups=2, rows=70, keys=131) if lists else None
        p = cases.softmax_case(
            rng, where=where, dim=40, dtype=dtype, causal=causal, varlen=lengths, valid=True, views=True
        )
        has = lists or max(p.where.sizes) >= 0
        branch = cases.branch_case(rng, p, shared=n < 3) if has else None
        out = backend.mixed_forward(p, branch)
        do = cases.normal(rng, *p.q.shape, dtype=dtype)
        dlinear = None if out.linear is None else torch.ones_like(out.linear)
        grads = backend.mixed_backward(p, branch, out, do, dlinear)
        for rows, keys, alone in cases.sequences(p):
            if rows.start == rows.stop:
                assert (grads.k[:, :, keys] == 0).all()
                continue
            own = branch and dataclasses.replace(branch, fq=branch.fq[:, :, rows], fk=branch.fk[:, :, keys])
            single = backend.mixed_forward(alone, own)
            assert torch.equal(single.o, out.o[:, :, rows])
            assert torch.equal(single.lse, out.lse[:, :, rows])
            linear = None if dlinear is None else dlinear[:, :, rows]
            back = backend.mixed_backward(alone, own, single, do[:, :, rows], linear)
            assert torch.equal(back.q, grads.q[:, :, rows])
            assert torch.equal(back.k, grads.k[:, :, keys])
            assert torch.equal(back.v, grads.v[:, :, keys])


def test_huge_logits_leave_the_best_key(seed, level):
    rng = cases.generator(seed)
    for dtype in cases.LOW:
        p = cases.softmax_case(rng, rows=131, dim=64, dtype=dtype, causal=False, where=(-1, 40))
        q, k = (torch.randint(-8, 9, x.shape, generator=rng).to(dtype) for x in (p.q, p.k))  # exact products
        p = dataclasses.replace(p, q=q, k=k, scale=1e4 / 64)
        exact = cases.mixed_reference(cases.double(p))
        got = backend.mixed_forward(p, None)
        cases.assert_close(got.o, exact.o, dtype=dtype)
        torch.testing.assert_close(got.lse.double(), exact.lse, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_a_scale_may_be_zero_or_negative(seed, level, scale):
    rng = cases.generator(seed)
    for dtype in cases.LOW:
        p = dataclasses.replace(cases.softmax_case(rng, dtype=dtype, extra=3, where=(-1, 20)), scale=scale)
        do = cases.normal(rng, *p.q.shape, dtype=dtype)
        out = backend.mixed_forward(p, None)
        cases.check_mixed(out, p)
        cases.check_gradients(backend.mixed_backward(p, None, out, do, None), p, None, do)


def test_what_is_masked_may_hold_nan(seed, level):
    for n, one in enumerate(seeds(seed, 6)):
        rng = cases.generator(one)
        dtype, causal = cases.LOW[n % 3], n % 2 == 0
        p = cases.softmax_case(rng, rows=97, dim=40, dtype=dtype, causal=causal, valid=True, extra=5, where=(20, 33))
        branch = cases.branch_case(rng, p, index=(0, 1), shared=n < 3)
        do, dlinear = cases.output_gradients(rng, p, branch)
        clean = backend.mixed_forward(p, branch)
        grads = backend.mixed_backward(p, branch, clean, do, dlinear)
        bad, empty = ~p.valid[:, None, :, None], (p.extra.at == cases.EMPTY)[..., None]
        nan = float("nan")
        extra = dataclasses.replace(p.extra, k=p.extra.k.masked_fill(empty, nan), v=p.extra.v.masked_fill(empty, nan))
        dirty = dataclasses.replace(p, k=p.k.masked_fill(bad, nan), v=p.v.masked_fill(bad, nan), extra=extra)
        out = backend.mixed_forward(dirty, branch)
        for name in ("o", "lse", "linear", "den", "state"):
            x, y = getattr(out, name), getattr(clean, name)
            assert (x is None and y is None) or torch.equal(x, y), name
        back = backend.mixed_backward(dirty, branch, out, do, dlinear)
        for name in ("q", "k", "v", "extra_k", "extra_v", "fq", "fk"):
            assert torch.equal(getattr(back, name), getattr(grads, name)), name


def test_blocks_that_no_list_names_may_hold_nan(seed, level):
    rng = cases.generator(seed)
    where = cases.blocks_case(rng, groups=1, rows=160, partial=False, density=0.0, empty=False)
    named = torch.zeros(1, 1, 5, 5, dtype=torch.bool)
    named[..., 1], named[..., 4, 3] = True, True
    starts, counts, columns, _ = cases.lists(named, torch.full(named.shape, -1))
    where = dataclasses.replace(where, starts=starts, counts=counts, columns=columns)
    p = cases.softmax_case(rng, where=where, heads=3, groups=1, rows=160, dim=16, causal=False)
    dirty = dataclasses.replace(p, k=p.k.clone(), v=p.v.clone())
    for x in (dirty.k, dirty.v):
        x[:, :, :32], x[:, :, 64:96], x[:, :, 128:] = (float("nan"),) * 3
    assert torch.equal(backend.mixed_forward(dirty, None).o, backend.mixed_forward(p, None).o)


def test_a_window_and_its_branch_may_be_split_anywhere(seed, level):
    rng = cases.generator(seed)
    p = cases.softmax_case(rng, rows=150, dim=40, where=(20, 33))
    branch = cases.branch_case(rng, p, index=(0, 1), shared=True, features=24)
    whole = backend.mixed_forward(p, branch)
    for cut in (50, 64, 101):
        a = backend.mixed_forward(
            dataclasses.replace(p, **{n: getattr(p, n)[:, :, :cut] for n in "qkv"}),
            dataclasses.replace(branch, fq=branch.fq[:, :, :cut], fk=branch.fk[:, :, :cut]),
        )
        torch.testing.assert_close(a.o, whole.o[:, :, :cut], rtol=1e-4, atol=1e-5)
        for g, size in enumerate((20, 33)):  # the next call brings the keys that have not left the window
            s, h = slice(cut - size, None), slice(2 * g, 2 * g + 2)
            where = cases.windows((size,))
            one = dataclasses.replace(p, q=p.q[:, h, cut:], k=p.k[:, g : g + 1, s], v=p.v[:, g : g + 1, s], where=where)
            tail = dataclasses.replace(
                branch,
                fq=branch.fq[:, h, cut:],
                fk=branch.fk[:, g : g + 1, s],
                index=(0,),
                weight=branch.weight[h],
                state=a.state[:, g : g + 1],
            )
            b = backend.mixed_forward(one, tail)
            torch.testing.assert_close(b.o, whole.o[:, h, cut:], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(b.state, whole.state[:, g : g + 1], rtol=1e-4, atol=1e-5)


def test_a_sequence_does_not_see_what_else_is_in_the_batch_or_how_many_threads_run(seed, level):
    rng = cases.generator(seed)
    p = cases.softmax_case(rng, batch=3, rows=140, dim=40, dtype=torch.bfloat16, where=(20, -1), valid=True)
    branch = cases.branch_case(rng, p, index=(0, -1))
    do = cases.normal(rng, *p.q.shape, dtype=torch.bfloat16)
    out = backend.mixed_forward(p, branch)
    grads = backend.mixed_backward(p, branch, out, do, None)
    one = cases.convert(p, lambda x: x[1:2] if x.dim() and x.shape[0] == 3 else x)
    own = cases.convert(branch, lambda x: x[1:2] if x.dim() and x.shape[0] == 3 else x)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            alone = backend.mixed_forward(one, own)
            back = backend.mixed_backward(one, own, alone, do[1:2], None)
            for name in ("o", "lse", "state"):
                assert torch.equal(getattr(alone, name), getattr(out, name)[1:2])
            for name in ("q", "k", "v", "fq", "fk"):
                assert torch.equal(getattr(back, name), getattr(grads, name)[1:2])
    finally:
        torch.set_num_threads(threads)


def test_decode_is_the_definition(seed, level):
    for one in seeds(seed, 12):
        rng = cases.generator(one)
        kinds = (cases.choose(rng, ("cache", "hybrid", "linear")), "hybrid", cases.choose(rng, ("cache", "linear")))
        p = cases.decode_case(
            rng,
            batch=cases.randint(rng, 1, 3),
            per=cases.choose(rng, (1, 3, 4, 8)),
            dim=cases.choose(rng, DIMS),
            features=cases.choose(rng, (16, 30, 64)),
            dtype=cases.choose(rng, cases.LOW),
            sizes=((1, 1100), (2, 7), (1, 33)),
            kinds=kinds,
            masked=bool(cases.randint(rng, 0, 1)),
            softcap=cases.choose(rng, (0.0, 5.0)),
            sink_logits=bool(cases.randint(rng, 0, 1)),
        )
        o, received = backend.decode(p)
        assert received == []
        cases.assert_close(o, cases.decode_reference(cases.double(p)), cases.decode_reference(p))


def test_decode_says_what_late_slots_received(seed, level):
    rng = cases.generator(seed)
    for per in (1, 3, 4):
        k, v = (cases.normal(rng, 2, 2, 700, 40) for _ in range(2))
        mask, late = (torch.rand(2, 700, generator=rng) < 0.7 for _ in range(2))
        part = Part(first=0, k=k, v=v, used=650, mask=mask, late=late)
        sink = cases.normal(rng, 2 * per)
        p = Decode(q=cases.normal(rng, 2, 2 * per, 1, 40), parts=(part,), scale=0.2, sink_logits=sink)
        o, (received,) = backend.decode(p)
        cases.assert_close(o, cases.decode_reference(cases.double(p)), cases.decode_reference(p))
        s = 0.2 * p.q.double() @ k.double().repeat_interleave(per, 1).transpose(-1, -2)  # (B, H, 1, C)
        there = mask & (torch.arange(700) < 650)
        s = s.masked_fill(~there[:, None, None], float("-inf"))
        s = torch.cat([s, sink.double()[:, None, None].expand(2, -1, 1, 1)], -1).softmax(-1)[:, :, 0, :-1]
        exact = s.unflatten(1, (2, per)).sum(2) * late[:, None]
        cases.assert_close(received, exact, dtype=torch.float32)


def test_retention_is_the_definition_and_may_be_cut_anywhere(seed, level):
    for one in seeds(seed, 4):
        rng = cases.generator(one)
        heads, groups = cases.choose(rng, HEADS)
        block = cases.choose(rng, (1, 8, 16))
        p = cases.retain_case(
            rng,
            heads=heads,
            groups=groups,
            dim=cases.choose(rng, DIMS),
            window=block * cases.choose(rng, (1, 2, 3)) + cases.choose(rng, (0, 5)),
            block=block,
            keep=cases.choose(rng, (0, 4, 7)),
            sinks=cases.choose(rng, (0, 2)),
            padding=cases.choose(rng, ("left", "right", "none")),
            softcap=cases.choose(rng, (0.0, 5.0)),
            sink_logits=bool(cases.randint(rng, 0, 1)),
        )
        o, whole = backend.retain(p)
        cases.assert_close(o, cases.retain_reference(cases.double(p)), cases.retain_reference(p))
        cut, memory, parts = cases.randint(rng, 1, 69), None, []
        for s in (slice(0, cut), slice(cut, 70)):
            part = {n: getattr(p, n)[:, :, s] for n in "qkv"}
            piece, memory = backend.retain(dataclasses.replace(p, **part, at=p.at[:, s], memory=memory))
            parts.append(piece)
        torch.testing.assert_close(torch.cat(parts, 2), o, rtol=1e-4, atol=1e-5)
        for n, (x, y) in enumerate(zip(memory, whole, strict=True)):
            if n not in (4, 5, 6, 7):  # kept tokens stand in any order
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def feature_gradients(x, kind, weights, do, change):
    """[φ, dx, dW…] by autograd through the reference, of the tensors as `change` makes them."""
    here = [change(y).detach().requires_grad_() for y in (x, *weights)]
    out = cases.features_reference(here[0], kind, here[1:])
    return [out.detach(), *torch.autograd.grad(out, here, change(do))]


@pytest.mark.parametrize("kind", ["hedgehog", "elu1", "relu", "softmax"])
def test_feature_maps_and_their_gradients_are_the_definition(seed, level, kind):
    for one in seeds(seed, 6):
        rng = cases.generator(one)
        dtype, dim = cases.choose(rng, cases.LOW), cases.choose(rng, DIMS)
        x = cases.normal(
            rng, 2, 3, cases.choose(rng, LENGTHS[:5]), dim, dtype=dtype, spread=cases.choose(rng, (1.0, 5.0))
        )
        x = cases.strided(x) if cases.randint(rng, 0, 1) else x
        weights = cases.feature_weights(rng, kind, 3, dim, dtype=cases.choose(rng, (torch.float32, dtype)))
        got = backend.features(x, kind, weights)
        do = cases.normal(rng, *got.shape, dtype=dtype)
        dx, dweights = backend.features_backward(x, kind, weights, do)
        found = [got, dx, *dweights]

        for name, a, b, c in zip(
            ("φ", "dx", "dW"),
            found,
            feature_gradients(x, kind, weights, do, torch.Tensor.double),
            feature_gradients(x, kind, weights, do, torch.clone),
            strict=False,
        ):
            cases.assert_close(a, b, c, name=f"{kind} {name}")


def guarded(x):
    """The same numbers, ending where memory ends: the next byte belongs to a page that must not be touched."""
    size = x.numel() * x.element_size()
    if size == 0:
        return x
    page = mmap.PAGESIZE
    whole = -(-size // page) * page + page
    region = mmap.mmap(-1, whole)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(start + whole - page), page, 0) == 0
    y = torch.frombuffer(region, dtype=x.dtype, count=x.numel(), offset=whole - page - size).view(x.shape)
    return y.copy_(x)


def walk_the_edge(seed):
    """Every kernel on tensors that end at a forbidden page. A read beyond any of them kills the process."""
    for one in seeds(seed, 10):
        rng = cases.generator(one)
        p, branch = cases.convert(mixed_case(rng), guarded)
        out = backend.mixed_forward(p, branch)
        do, linear = guarded(cases.normal(rng, *p.q.shape, dtype=p.q.dtype)), out.linear
        backend.mixed_backward(p, branch, out, do, None if linear is None else guarded(linear))
        features = cases.choose(rng, (16, 30))
        linear = cases.linear_case(
            rng, rows=65, features=features, dim=40, dtype=cases.choose(rng, cases.LOW), state=True
        )
        linear = cases.convert(linear, guarded)
        o, den, _ = backend.linear_forward(linear)
        backend.linear_backward(linear, guarded(o), guarded(den), guarded(o))
        kinds, dtype = ("cache", "hybrid"), cases.choose(rng, cases.LOW)
        backend.decode(
            cases.convert(cases.decode_case(rng, kinds=kinds, dim=cases.choose(rng, DIMS), dtype=dtype), guarded)
        )
        retained = cases.convert(cases.retain_case(rng, dim=cases.choose(rng, DIMS), dtype=dtype), guarded)
        memory = backend.retain(retained)[1]
        backend.retain(dataclasses.replace(retained, memory=cases.convert(memory, guarded)))
        x = guarded(cases.normal(rng, 1, 2, 65, 40, dtype=dtype))
        weights = cases.convert(cases.feature_weights(rng, "hedgehog", 2, 40), guarded)
        backend.features_backward(x, "hedgehog", weights, guarded(backend.features(x, "hedgehog", weights)))
    print("no read went beyond")  # noqa: T201 - the parent process reads it


def test_no_kernel_reads_beyond_its_tensors(seed, level):
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import test_cpp; test_cpp.walk_the_edge({seed})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "no read went beyond" in result.stdout, f"exit status {result.returncode}: {result.stderr[-2000:]}"
