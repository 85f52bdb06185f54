"""The harness of the Triton tests bites: bf16 is right in the interpreter, and each class of planted bug is found."""

import os

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton's interpreter is not what runs kernels here", allow_module_level=True)

import kernel_cases as cases  # noqa: E402
import triton.language as tl  # noqa: E402
from triton_sanitizer import SanitizerError, sanitized  # noqa: E402

# ----------------------------------------------------------------------------------------------------------------- bf16


@triton.jit
def _multiply(a, b, out, N: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    acc = tl.zeros((N, N), dtype=tl.float32)
    acc = tl.dot(tl.load(a + at), tl.load(b + at), acc, input_precision=PRECISION)
    tl.store(out + at, acc)


@triton.jit
def _elementwise(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(a + i)
    y = tl.load(b + i, mask=i < N - 1, other=2.0)
    tl.store(out + i, x * y)
    tl.store(out + N + i, x + y)
    tl.store(out + 2 * N + i, tl.maximum(x, y))
    tl.store(out + 3 * N + i, tl.where(x > y, x, -y))
    tl.store(out + 4 * N + i, tl.exp(x.to(tl.float32)).to(tl.bfloat16))
    tl.store(out + 5 * N + i, tl.abs(x) + tl.sum(y, 0))
    tl.store(out + 6 * N + i, (x.to(tl.int16, bitcast=True) & 0x7FFF).to(tl.bfloat16, bitcast=True))
    tl.store(out + 7 * N + i, tl.full((N,), 3.14159, tl.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dots_are_right(seed, dtype):
    a, b = (cases.normal(cases.generator(seed + n), 32, 32, dtype=dtype) for n in (0, 1))
    out = torch.empty(32, 32)
    _multiply[(1,)](a, b, out, N=32, PRECISION="ieee")
    torch.testing.assert_close(out, a.float() @ b.float(), atol=1e-4, rtol=1e-5)


def test_elementwise_operations_round_to_bf16_where_a_gpu_does(seed):
    rng, bf16 = cases.generator(seed), torch.bfloat16
    x, y = (cases.normal(rng, 64, dtype=bf16) for _ in range(2))
    out = torch.empty(8, 64, dtype=bf16)
    _elementwise[(1,)](x, y, out, N=64)
    y = y.clone()
    y[-1] = 2.0
    total = (x.abs().float() + y.float().sum()).to(bf16)
    rows = [x * y, x + y, torch.maximum(x, y), torch.where(x > y, x, -y), x.float().exp().to(bf16), total, x.abs()]
    for n, row in enumerate([*rows, torch.full((64,), 3.14159, dtype=bf16)]):
        torch.testing.assert_close(out[n], row, atol=0.02 if n == 5 else 0, rtol=0.01 if n in (4, 5) else 0)


@triton.jit
def _cast(a, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(a + i))
    tl.store(out + N + i, tl.load(a + i).to(tl.bfloat16).to(tl.float32).to(tl.bfloat16))


def test_casts_to_bf16_round_to_nearest_even_and_keep_what_is_not_a_number():
    values = [1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -0.0, 3.4e38, float("inf"), -float("inf")]
    values += [float("nan"), 1e-40, -1e-45, 65504.0, 0.1, -2.7, 1e30, 2.0**-126]
    a = torch.tensor(values)
    out = torch.empty(2, 16, dtype=torch.bfloat16)
    _cast[(1,)](a, out, N=16)
    for row in out:
        torch.testing.assert_close(row, a.bfloat16(), atol=0, rtol=0, equal_nan=True)


def test_a_dot_in_tf32_loses_what_a_gpu_loses(seed):
    rng = cases.generator(seed)
    a, b = (cases.normal(rng, 32, 32) for _ in range(2))
    exact, errors = a.double() @ b.double(), {}
    for precision in ("tf32", "ieee"):
        out = torch.empty(32, 32)
        _multiply[(1,)](a, b, out, N=32, PRECISION=precision)
        errors[precision] = float((out - exact).abs().max())
    assert errors["ieee"] < 1e-5
    assert 1e-4 < errors["tf32"] < 2e-2


# ---------------------------------------------------------------------------------------------- one kernel for each bug


@triton.jit
def _copy(x, out, n, stride, SHIFT: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < n if MASKED else i < n + BLOCK
    tl.store(out + i, tl.load(x + (i + SHIFT) * stride, mask=live, other=0.0), mask=i < n)


@pytest.mark.parametrize("shift", [0, 1, -1])
def test_reads_beyond_a_tensor_are_found_at_both_ends(shift):
    x, out = torch.randn(100), torch.empty(100)
    with sanitized():
        if shift == 0:
            _copy[(4,)](x, out, 100, 1, SHIFT=0, MASKED=True, BLOCK=32)
            assert torch.equal(x, out)
        else:
            with pytest.raises(SanitizerError, match=r"reads `x` \(100,\) out of bounds: element (-1|100)"):
                _copy[(4,)](x, out, 100, 1, SHIFT=shift, MASKED=True, BLOCK=32)


def test_a_missing_mask_is_found():
    with sanitized(), pytest.raises(SanitizerError, match="reads `x`"):
        _copy[(4,)](torch.randn(100), torch.empty(100), 100, 1, SHIFT=0, MASKED=False, BLOCK=32)


def test_memory_between_the_rows_of_a_view_is_out_of_bounds():
    x = torch.randn(50, 3)[:, 0]
    with sanitized():
        _copy[(2,)](x, torch.empty(50), 50, 3, SHIFT=0, MASKED=True, BLOCK=32)
        with pytest.raises(SanitizerError, match="in a gap of the view"):
            _copy[(2,)](x, torch.empty(50), 50, 2, SHIFT=0, MASKED=True, BLOCK=32)


def test_writes_beyond_a_tensor_are_found_and_not_done():
    memory = torch.zeros(100)
    with sanitized(), pytest.raises(SanitizerError, match="writes `out`"):
        _copy[(4,)](torch.ones(100), memory[:90], 100, 1, SHIFT=0, MASKED=True, BLOCK=32)
    assert not memory[90:].any()


@triton.jit
def _total(x, out, n, FILL: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n, other=0.0) if FILL else tl.load(x + i, mask=i < n)
    tl.store(out, tl.sum(v, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lanes_without_a_value_show_in_the_result(dtype):
    x, out = torch.ones(20, dtype=dtype), torch.empty(1)
    with sanitized():
        _total[(1,)](x, out, 20, FILL=True, BLOCK=32)
        assert out.item() == 20
        _total[(1,)](x, out, 20, FILL=False, BLOCK=32)
        assert out.isnan().all()


@triton.jit
def _scalar(x, out, take, FILL: tl.constexpr):
    v = tl.load(x, mask=take > 0, other=0) if FILL else tl.load(x, mask=take > 0)
    tl.store(out, v)


def test_a_scalar_zero_is_a_value():
    x, out = torch.full((1,), 5, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    with sanitized():
        _scalar[(1,)](x, out, 0, FILL=True)
        assert out.item() == 0
        _scalar[(1,)](x, out, 0, FILL=False)
        assert out.item() == 10007


@triton.jit
def _reduce(x, out, n, ATOMIC: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(x + i, mask=i < n, other=0.0), 0)
    if ATOMIC:
        tl.atomic_add(out, total)
    else:
        tl.store(out, tl.load(out) + total)


def test_programs_that_add_without_an_atomic_are_a_race():
    x = torch.arange(100.0)
    with sanitized():
        out = torch.zeros(1)
        _reduce[(4,)](x, out, 100, ATOMIC=True, BLOCK=32)
        assert out.item() == 4950
        with pytest.raises(SanitizerError, match="race: reads element 0 of `out`"):
            _reduce[(4,)](x, torch.zeros(1), 100, ATOMIC=False, BLOCK=32)


@triton.jit
def _shift(x, n, BY: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i + BY, mask=i + BY < n, other=0.0)
    tl.store(x + i, v, mask=i < n)


@triton.jit
def _everyone(out):
    tl.store(out, 1.0)


def test_a_program_that_writes_what_another_reads_or_writes_is_a_race():
    with sanitized():
        _shift[(4,)](torch.randn(128), 128, BY=0, BLOCK=32)
        with pytest.raises(SanitizerError, match="race: writes element 32 of `x`.*, which program number 0 read"):
            _shift[(4,)](torch.randn(128), 128, BY=1, BLOCK=32)
        _everyone[(1,)](torch.empty(1))
        with pytest.raises(SanitizerError, match="race: writes element 0 of `out`"):
            _everyone[(2,)](torch.empty(1))


@triton.jit
def _lanes(out, values, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i // 2, tl.load(values + i))


def test_two_lanes_of_a_store_must_agree():
    with sanitized():
        _lanes[(1,)](torch.empty(4), torch.ones(8), BLOCK=8)
        with pytest.raises(SanitizerError, match="two lanes"):
            _lanes[(1,)](torch.empty(4), torch.arange(8.0), BLOCK=8)


@triton.jit
def _last_one_sums(x, parts, count, out, n, ORDERED: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    i = pid * BLOCK + tl.arange(0, BLOCK)
    tl.store(parts + pid, tl.sum(tl.load(x + i, mask=i < n, other=0.0), 0))
    before = tl.atomic_add(count, 1) if ORDERED else pid
    if before == PROGRAMS - 1:
        tl.store(out, tl.sum(tl.load(parts + tl.arange(0, PROGRAMS)), 0))


def test_an_atomic_counter_orders_what_programs_hand_over():
    x, out = torch.arange(100.0), torch.empty(1)
    more = {"PROGRAMS": 4, "BLOCK": 32}
    with sanitized():
        count = torch.zeros(1, dtype=torch.int32)
        _last_one_sums[(4,)](x, torch.empty(4), count, out, 100, ORDERED=True, **more)
        assert out.item() == 4950
        with pytest.raises(SanitizerError, match="race: reads element 0 of `parts`"):
            _last_one_sums[(4,)](x, torch.empty(4), count, out, 100, ORDERED=False, **more)


@triton.jit
def _row(x, out, row, stride, WIDE: tl.constexpr):
    at = row.to(tl.int64) * stride if WIDE else row * stride
    tl.store(out, tl.load(x + at))


def test_offsets_that_do_not_fit_into_int32_are_found():
    x = torch.ones(1).expand(3, 1).as_strided((3, 1), (0, 1))  # the overflow comes before any access
    with sanitized():
        with pytest.raises(SanitizerError, match=r"int32 overflow: 3 \* 1000000000"):
            _row[(1,)](x, torch.empty(1), 3, 10**9, WIDE=False)
        with pytest.raises(SanitizerError, match="out of bounds: element 3000000000"):
            _row[(1,)](x, torch.empty(1), 3, 10**9, WIDE=True)


@triton.jit
def _hinted(x, out, stride, N: tl.constexpr):
    stride = tl.multiple_of(stride, 8)
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i * stride))


def test_a_false_hint_is_found():
    with sanitized():
        _hinted[(1,)](torch.randn(128), torch.empty(16), 8, N=16)
        with pytest.raises(SanitizerError, match="multiple_of says 8, the value is 4"):
            _hinted[(1,)](torch.randn(128), torch.empty(16), 4, N=16)


@triton.jit
def _attend(q, k, v, out, n, scale, ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr):
    """A small flash attention, right in every respect."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D)
    qt = tl.load(q + i[:, None] * D + d, mask=(i < n)[:, None], other=0.0)
    acc, total = tl.zeros((ROWS, D), tl.float32), tl.zeros((ROWS,), tl.float32)
    top = tl.full((ROWS,), -1e30, tl.float32)
    for start in range(0, n, KEYS):
        j = start + tl.arange(0, KEYS)
        kt = tl.load(k + j[:, None] * D + d, mask=(j < n)[:, None], other=0.0)
        vt = tl.load(v + j[:, None] * D + d, mask=(j < n)[:, None], other=0.0)
        s = tl.where((j < n)[None, :], tl.dot(qt, tl.trans(kt), input_precision="ieee") * scale, -1e30)
        new = tl.maximum(top, tl.max(s, 1))
        p = tl.exp(s - new[:, None])
        acc = acc * tl.exp(top - new)[:, None]
        total = total * tl.exp(top - new) + tl.sum(p, 1)
        acc = tl.dot(p.to(vt.dtype), vt, acc, input_precision="ieee")
        top = new
    tl.store(out + i[:, None] * D + d, (acc / total[:, None]).to(out.dtype.element_ty), mask=(i < n)[:, None])


@pytest.mark.parametrize("dtype", cases.LOW, ids=str)
def test_a_right_kernel_passes_in_every_dtype(seed, dtype):
    p = cases.softmax_case(cases.generator(seed), heads=1, groups=1, rows=70, where=(-1,), causal=False, dtype=dtype)
    out = torch.empty_like(p.q)
    with sanitized():
        _attend[(3,)](p.q, p.k, p.v, out, 70, p.scale, ROWS=32, KEYS=16, D=32)
    cases.assert_close(out, cases.mixed_reference(cases.double(p)).o, cases.mixed_reference(p).o)


@triton.jit
def _follow(table, out, n, BLOCK: tl.constexpr):
    at = tl.load(table + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    i = tl.arange(0, BLOCK)
    tl.store(out + tl.program_id(0) * BLOCK + i, tl.load(at + i, mask=i < n, other=0.0))


def test_tensors_in_a_table_of_addresses_have_bounds_too():
    x, y = torch.randn(10), torch.randn(10)
    table, out = torch.tensor([x.data_ptr(), y.data_ptr()]), torch.empty(2, 16)
    with sanitized(x, y):
        _follow[(2,)](table, out, 10, BLOCK=16)
        assert torch.equal(out[:, :10], torch.stack([x, y]))
        with pytest.raises(SanitizerError, match="in no tensor"):
            _follow[(2,)](table, out, 11, BLOCK=16)


def test_nothing_stays_patched():
    before = torch.ones(1)
    with sanitized():
        pass
    _everyone[(2,)](before)  # a race, which nobody watches for


# ------------------------------------------------------------------------------------------------------------- memory


def test_memory_without_a_value_is_not_a_number():
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.zeros(2, dtype=torch.bfloat16)).isnan().all()
    assert torch.zeros(2).new_empty(2).isnan().all()
    assert torch.empty(2, dtype=torch.int32).eq(2**31 - 1).all()


def test_the_tolerance_lets_a_rounding_pass_and_nothing_more(seed):
    p = cases.softmax_case(cases.generator(seed), dtype=torch.bfloat16, rows=64)
    exact, plain = cases.mixed_reference(cases.double(p)).o, cases.mixed_reference(p).o
    cases.assert_close(exact.bfloat16(), exact, plain)
    row = int(exact.abs().amax((0, 1, 3)).argmax())
    wrong = exact.clone()
    wrong[:, :, row] *= 1.1
    for got in (wrong, exact.masked_fill(exact == exact.max(), float("nan")), exact * 1.03):
        with pytest.raises(AssertionError):
            cases.assert_close(got.bfloat16(), exact, plain)
