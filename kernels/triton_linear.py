"""Linear attention in Triton: φ(q_i)·Σ φ(k_j) [v_j | 1], causal or not, forward and backward.

Keys are cut into segments at fixed places of their own sequence, so that a result never depends on the batch. `_sums`
reduces each segment to Σ φ(k) vᵀ and Σ φ(k), one for each KV head; `_scan` turns the sums into what came before each
segment; the last pass reads that and adds the pairs within the segment, quadratically. With bf16 the last pass is
`_carry`, which walks a long segment in chunks and keeps the state in registers. Otherwise it is `_apply`, which takes
one chunk as its segment and reads the state from memory in tiles.

A sum of a segment is one row of F·D + F numbers: Σ φ(k) vᵀ, then Σ φ(k). The column of ones never exists.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .problem import EPS, Linear
from .triton_common import Variant, architecture
from .triton_linear_host import Tiles, carry_tiles, chunk_tiles, describe, mode, modes, plan, reduce_tiles, types

NORMAL = tl.constexpr(EPS)


@triton.jit
def _place(cu, n, length, VARLEN: tl.constexpr):
    """First row and number of rows of sequence n."""
    if VARLEN:
        first = tl.load(cu + n).to(tl.int64)
        count = (tl.load(cu + n + 1) - first).to(tl.int32)
    else:
        first = tl.zeros((), tl.int64)
        count = length
    return first, count


@triton.jit
def _tile(base, start, within, stride, column, rows, columns):
    """Rows start + within × columns from memory, zero beyond `rows` and `columns`. Offsets of a tile fit into i32."""
    live = (within < rows - start)[:, None] & (column < columns)[None, :]
    base += tl.cast(start, tl.int64) * stride
    return tl.load(base + within[:, None] * stride + column[None, :], mask=live, other=0.0)


@triton.jit
def _dot(a, b, acc, T: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a.to(T), b.to(T), acc, input_precision=PRECISION)


@triton.jit
def _dot_state(a, s, acc, T: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr):
    """a · s with fp32 s, which SPLIT multiplies as two bf16 parts: differences of large sums need its lower bits."""
    high = s.to(T)
    acc = tl.dot(a.to(T), high, acc, input_precision=PRECISION)
    if SPLIT:
        acc = tl.dot(a.to(T), (s - high.to(tl.float32)).to(T), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _sums(
    x, y, weight, delta, out, cu, x_b, x_h, x_r, y_b, y_h, y_r, w_h, heads, length, segments, F, D,
    GROUP: tl.constexpr, SEGMENT: tl.constexpr, CHUNK: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr,
    WEIGHTED: tl.constexpr, VARLEN: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ x_r [y_r | 1] over each segment; WEIGHTED: Σ weight_r x_r [y_r | −delta_r], over the GROUP heads of each."""
    parts_d = tl.cdiv(D, BD)
    parts_f = tl.cdiv(F, BF)
    pid = tl.program_id(0)
    part_d = pid % parts_d
    part_f = pid // parts_d % parts_f
    pid = pid // (parts_d * parts_f)
    segment = pid % segments
    g = pid // segments % heads
    n = pid // (segments * heads)
    first, count = _place(cu, n, length, VARLEN)
    b = 0 if VARLEN else n
    begin = segment * SEGMENT
    end = tl.minimum(begin + SEGMENT, count)
    f = part_f * BF + tl.arange(0, BF)
    d = part_d * BD + tl.arange(0, BD)
    within = tl.arange(0, CHUNK)
    acc = tl.zeros((BF, BD), tl.float32)
    z = tl.zeros((BF,), tl.float32)
    for j in range(GROUP):
        h = (g * GROUP + j).to(tl.int64)
        x_base = x + b * tl.cast(x_b, tl.int64) + h * x_h + first * x_r
        y_base = y + b * tl.cast(y_b, tl.int64) + h * y_h + first * y_r
        w_base = (b * heads * GROUP + h) * w_h + first
        for c in range(begin, end, CHUNK):
            row = c + within
            xt = _tile(x_base, c, within, x_r, f, end, F)
            yt = _tile(y_base, c, within, y_r, d, end, D)
            if WEIGHTED:
                w = tl.load(weight + w_base + row, mask=row < end, other=0.0)
                shift = tl.load(delta + w_base + row, mask=row < end, other=0.0)
                z -= tl.sum(xt.to(tl.float32) * (w * shift)[:, None], 0)
                acc = _dot(tl.trans(xt), yt.to(tl.float32) * w[:, None], acc, T, PRECISION)
            else:
                z += tl.sum(xt.to(tl.float32), 0)
                acc = _dot(tl.trans(xt), yt, acc, T, PRECISION)
    if begin < count:
        base = out + ((n * heads + g).to(tl.int64) * segments + segment) * (F * D + F)
        tl.store(base + f[:, None] * D + d[None, :], acc, mask=(f < F)[:, None] & (d < D)[None, :])
        if part_d == 0:
            tl.store(base + F * D + f, z, mask=f < F)


@triton.jit
def _scan(
    sums, state, final, cu, s_n, s_h, s_f, s_d, heads, length, segments, F, D, SEGMENT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TOTAL: tl.constexpr, REVERSE: tl.constexpr, STATE: tl.constexpr,
    FINAL: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Replaces each sum by that of the segments before it (REVERSE: after it), or the first by the TOTAL."""
    size = F * D + F
    blocks = tl.cdiv(size, BLOCK)
    pid = tl.program_id(0)
    e = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    g = pid // blocks % heads
    n = pid // (blocks * heads)
    _, length_n = _place(cu, n, length, VARLEN)
    used = tl.cdiv(length_n, SEGMENT)
    live = e < size
    f = tl.where(e < F * D, e // D, e - F * D)
    d = tl.where(e < F * D, e % D, D)
    base = sums + (n * heads + g).to(tl.int64) * segments * size
    carry = tl.zeros((BLOCK,), tl.float32)
    if STATE:
        place = n.to(tl.int64) * s_n + g.to(tl.int64) * s_h + f * s_f + d * s_d
        carry += tl.load(state + place, mask=live, other=0.0).to(tl.float32)
    for s in range(0, used, ROWS):
        step = s + tl.arange(0, ROWS)
        at = (used - 1 - step) if REVERSE else step
        ok = (step < used)[:, None] & live[None, :]
        row = base + at[:, None].to(tl.int64) * size + e[None, :]
        t = tl.load(row, mask=ok, other=0.0)
        if not TOTAL:
            tl.store(row, tl.cumsum(t, 0) - t + carry[None, :], mask=ok)
        carry += tl.sum(t, 0)
    if TOTAL:
        tl.store(base + e, carry, mask=live)
    if FINAL:
        tl.store(final + (n * heads + g).to(tl.int64) * size + f * (D + 1) + d, carry, mask=live)


@triton.jit
def _carry(
    q, k, v, sums, o, den, cu, q_b, q_h, q_r, k_b, k_h, k_r, v_b, v_h, v_r, o_b, o_h, o_r, heads, length, segments,
    F, D, normalize, GROUP: tl.constexpr, SEGMENT: tl.constexpr, CHUNK: tl.constexpr, BF: tl.constexpr,
    BD: tl.constexpr, VARLEN: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Causal outputs of a segment, for one query head: the state stays in registers, BF ≥ F."""
    parts = tl.cdiv(D, BD)
    pid = tl.program_id(0)
    part = pid % parts
    inner = pid // parts % GROUP
    pid = pid // (parts * GROUP)
    segment = pid % segments
    g = pid // segments % heads
    n = pid // (segments * heads)
    first, count = _place(cu, n, length, VARLEN)
    b = 0 if VARLEN else n
    begin = segment * SEGMENT
    end = tl.minimum(begin + SEGMENT, count)
    if begin >= end:
        return
    f = tl.arange(0, BF)
    d = part * BD + tl.arange(0, BD)
    base = sums + ((n * heads + g).to(tl.int64) * segments + segment) * (F * D + F)
    s = tl.load(base + f[:, None] * D + d[None, :], mask=(f < F)[:, None] & (d < D)[None, :], other=0.0)
    # z stands in all 16 columns of a tile, for the tensor cores: a row product would hold q and k in registers
    z = tl.load(base + F * D + f, mask=f < F, other=0.0)[:, None] + tl.zeros((BF, 16), tl.float32)
    ones = tl.full((CHUNK, 16), 1.0, T)
    k_base = k + b * tl.cast(k_b, tl.int64) + g * tl.cast(k_h, tl.int64) + first * k_r
    v_base = v + b * tl.cast(v_b, tl.int64) + g * tl.cast(v_h, tl.int64) + first * v_r
    h = (g * GROUP + inner).to(tl.int64)
    q_base = q + b * tl.cast(q_b, tl.int64) + h * q_h + first * q_r
    o_base = o + b * tl.cast(o_b, tl.int64) + h * o_h + first * o_r
    within = tl.arange(0, CHUNK)
    for c in range(begin, end, CHUNK):
        kt = _tile(k_base, c, within, k_r, f, end, F)
        vt = _tile(v_base, c, within, v_r, d, end, D)
        low = s.to(T)
        high = z.to(T)
        rest = (z - high.to(tl.float32)).to(T)  # the denominator keeps 16 bits
        qt = _tile(q_base, c, within, q_r, f, end, F)
        a = tl.dot(qt, tl.trans(kt))
        a = tl.where(within[:, None] >= within[None, :], a, 0.0)
        total = tl.sum(a, 1) + tl.max(tl.dot(qt, rest, tl.dot(qt, high)), 1)
        acc = tl.dot(qt, low)
        acc = tl.dot(a.to(T), vt, acc)
        acc = acc / tl.where(normalize != 0, total + NORMAL, 1.0)[:, None]
        live = within < end - c
        at = o_base + tl.cast(c, tl.int64) * o_r + within[:, None] * o_r + d[None, :]
        tl.store(at, acc.to(o.dtype.element_ty), mask=live[:, None] & (d < D)[None, :])
        if part == 0:
            tl.store(den + (b * heads * GROUP + h) * length + first + c + within, total, mask=live)
        s = tl.dot(tl.trans(kt), vt, s)
        z = tl.dot(tl.trans(kt), ones, z)


@triton.jit
def _apply(
    q, k, v, sums, o, den, cu_q, cu_k, q_b, q_h, q_r, k_b, k_h, k_r, v_b, v_h, v_r, o_b, o_h, o_r, heads, rows, blocks,
    segments, F, D, normalize, GROUP: tl.constexpr, CHUNK: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr,
    CAUSAL: tl.constexpr, VARLEN: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of CHUNK rows from the state before them and, where causal, the pairs among them."""
    parts = tl.cdiv(D, BD)
    pid = tl.program_id(0)
    part = pid % parts
    block = pid // parts % blocks
    h = pid // (parts * blocks) % (heads * GROUP)
    n = pid // (parts * blocks * heads * GROUP)
    g = h // GROUP
    first, count = _place(cu_q, n, rows, VARLEN)
    b = 0 if VARLEN else n
    if block * CHUNK >= count:
        return
    within = tl.arange(0, CHUNK)
    start = block * CHUNK
    d = part * BD + tl.arange(0, BD)
    segment = block if CAUSAL else 0
    base = sums + ((n * heads + g).to(tl.int64) * segments + segment) * (F * D + F)
    q_base = q + b * tl.cast(q_b, tl.int64) + h * tl.cast(q_h, tl.int64) + first * q_r
    k_base = k + b * tl.cast(k_b, tl.int64) + g * tl.cast(k_h, tl.int64) + first * k_r
    acc = tl.zeros((CHUNK, BD), tl.float32)
    a = tl.zeros((CHUNK, CHUNK), tl.float32)
    total = tl.zeros((CHUNK,), tl.float32)
    for at in range(0, F, BF):
        f = at + tl.arange(0, BF)
        qt = _tile(q_base, start, within, q_r, f, count, F)
        if CAUSAL:
            kt = _tile(k_base, start, within, k_r, f, count, F)
            a = _dot(qt, tl.trans(kt), a, T, PRECISION)
        s = tl.load(base + f[:, None] * D + d[None, :], mask=(f < F)[:, None] & (d < D)[None, :], other=0.0)
        z = tl.load(base + F * D + f, mask=f < F, other=0.0)
        acc = _dot(qt, s, acc, T, PRECISION)
        total += tl.sum(qt.to(tl.float32) * z[None, :], 1)
    if CAUSAL:
        a = tl.where(within[:, None] >= within[None, :], a, 0.0)
        total += tl.sum(a, 1)
        vt = _tile(
            v + b * tl.cast(v_b, tl.int64) + g * tl.cast(v_h, tl.int64) + first * v_r, start, within, v_r, d, count, D
        )
        acc = _dot(a, vt, acc, T, PRECISION)
    acc = acc / tl.where(normalize != 0, total + NORMAL, 1.0)[:, None]
    live = within < count - start
    at = (
        o
        + b * tl.cast(o_b, tl.int64)
        + h * tl.cast(o_h, tl.int64)
        + (first + start) * o_r
        + within[:, None] * o_r
        + d[None, :]
    )
    tl.store(at, acc.to(o.dtype.element_ty), mask=live[:, None] & (d < D)[None, :])
    if part == 0:
        tl.store(den + (b * heads * GROUP + h).to(tl.int64) * rows + first + start + within, total, mask=live)


def reduce_segments(
    p: Linear, x: Tensor, y: Tensor, t: Tiles, length: int, weights: Tensor | None = None, rows: bool = False
) -> Tensor:
    """Sums of each segment (sequences, Hk, segments, F·D + F) over keys, or over the `rows` of all query heads."""
    s, m = plan(p), mode(p.fq, p.fk, p.v)
    segments = max(1, triton.cdiv(length, t.segment))
    sums = torch.empty(s.count, s.groups, segments, s.features * (s.dim + 1), dtype=torch.float32, device=x.device)
    cu = None if p.varlen is None else (p.varlen.cu_q if rows else p.varlen.cu_k)
    inner = min(t.chunk, 64 if m.half else 32)
    grid = (s.count * s.groups * segments * triton.cdiv(s.features, t.bf) * triton.cdiv(s.dim, t.bd),)
    if length and grid[0]:
        _sums[grid](
            x, y, x if weights is None else weights[0], x if weights is None else weights[1], sums,
            x if cu is None else cu, x.stride(0), x.stride(1), x.stride(2), y.stride(0), y.stride(1), y.stride(2),
            x.shape[2], s.groups, x.shape[2], segments, s.features, s.dim, GROUP=s.group if rows else 1,
            SEGMENT=t.segment, CHUNK=inner, BF=t.bf, BD=t.bd, WEIGHTED=weights is not None, VARLEN=cu is not None,
            T=m.dtype, PRECISION=m.precision, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    return sums


def scan_segments(
    p: Linear,
    sums: Tensor,
    t: Tiles,
    length: int,
    *,
    state: bool,
    total: bool,
    reverse: bool = False,
    final: bool = False,
) -> Tensor | None:
    """Sums → what came before each segment (or after, or the total), in place; the state after the last if `final`."""
    s = plan(p)
    cu = None if p.varlen is None else (p.varlen.cu_q if reverse else p.varlen.cu_k)
    given = p.state if state else None
    shape = (s.count, s.groups, s.features, s.dim + 1)
    after = torch.empty(shape, dtype=torch.float32, device=sums.device) if final else None
    block = 256
    grid = (s.count * s.groups * triton.cdiv(s.features * (s.dim + 1), block),)
    strides = (0, 0, 0, 0) if given is None else given.stride()
    if grid[0]:
        _scan[grid](
            sums, sums if given is None else given, sums if after is None else after, sums if cu is None else cu,
            *strides, s.groups, length, sums.shape[2], s.features, s.dim, SEGMENT=t.segment, ROWS=8, BLOCK=block,
            TOTAL=total, REVERSE=reverse, STATE=given is not None, FINAL=final, VARLEN=cu is not None, num_warps=4,
        )  # fmt: skip
    return after


def linear_forward(p: Linear) -> tuple[Tensor, Tensor, Tensor | None]:
    """o (B, H, Q, D) in the dtype of v, den (B, H, Q) fp32, and the state after the last key where causal."""
    s, m, arch = plan(p), mode(p.fq, p.fk, p.v), architecture()
    carried = carry_tiles(arch, s.features, s.dim) if p.causal and m.half else None
    chunks = chunk_tiles(arch, m)
    r = reduce_tiles(arch, m)
    if p.causal and carried is None:
        r = Tiles(chunks.segment, chunks.chunk, r.bf, r.bd, r.warps, r.stages)
    sums = reduce_segments(p, p.fk, p.v, r, s.keys)
    state = scan_segments(p, sums, r, s.keys, state=True, total=not p.causal, final=p.causal)
    fresh = torch.empty if p.varlen is None else torch.zeros  # packed rows may belong to no sequence
    o = fresh(*p.fq.shape[:3], s.dim, dtype=p.v.dtype, device=p.v.device)
    den = fresh(p.fq.shape[:3], dtype=torch.float32, device=p.v.device)
    if not s.rows or not o.numel():
        return o, den, state
    strides = [x.stride(i) for x in (p.fq, p.fk, p.v, o) for i in range(3)]
    packed = p.varlen
    if carried is not None:
        grid = (s.count * s.heads * sums.shape[2] * triton.cdiv(s.dim, carried.bd),)
        _carry[grid](
            p.fq, p.fk, p.v, sums, o, den, o if packed is None else packed.cu_k, *strides, s.groups, p.fq.shape[2],
            sums.shape[2], s.features, s.dim, int(p.normalize), GROUP=s.group, SEGMENT=carried.segment,
            CHUNK=carried.chunk, BF=carried.bf, BD=carried.bd, VARLEN=packed is not None, T=m.dtype,
            num_warps=carried.warps, num_stages=carried.stages,
        )  # fmt: skip
        return o, den, state
    blocks = triton.cdiv(s.rows, chunks.chunk)
    grid = (s.count * s.heads * blocks * triton.cdiv(s.dim, chunks.bd),)
    _apply[grid](
        p.fq, p.fk, p.v, sums, o, den, o if packed is None else packed.cu_q, o if packed is None else packed.cu_k,
        *strides, s.groups, p.fq.shape[2], blocks, sums.shape[2], s.features, s.dim, int(p.normalize), GROUP=s.group,
        CHUNK=chunks.chunk, BF=chunks.bf, BD=chunks.bd, CAUSAL=p.causal, VARLEN=packed is not None, T=m.dtype,
        PRECISION=m.precision, num_warps=chunks.warps, num_stages=chunks.stages,
    )  # fmt: skip
    return o, den, state


def variants(arch: str) -> Iterator[Variant]:
    """All that `linear_forward` and the sums of the backward launch.

    What is packed, weighted and causal stands for what is not. GROUP and SEGMENT are loop bounds: one stands for all.
    """
    for name, m in modes(arch).items():
        r, c = reduce_tiles(arch, m), chunk_tiles(arch, m)
        dots: dict[str, Any] = {"GROUP": 2, "VARLEN": True, "T": m.dtype, "PRECISION": m.precision}
        constants = {"SEGMENT": r.segment, "CHUNK": r.chunk, "BF": r.bf, "BD": r.bd, "WEIGHTED": True, **dots}
        yield describe(f"linear sums {name}", _sums, types(name), constants, r.warps, r.stages)
        constants = {"CHUNK": c.chunk, "BF": c.bf, "BD": c.bd, "CAUSAL": True, **dots}
        yield describe(f"linear apply {name}", _apply, types(name), constants, c.warps, c.stages)
    for features, dim in ((f, d) for f in (64, 128) for d in (64, 128)):
        t = carry_tiles(arch, features, dim)
        if t is not None:
            constants = {
                "GROUP": 2, "SEGMENT": t.segment, "CHUNK": t.chunk, "BF": t.bf, "BD": t.bd, "VARLEN": True,
                "T": tl.bfloat16,
            }  # fmt: skip
            yield describe(f"linear carry {t.bf}x{t.bd}", _carry, types("bf16"), constants, t.warps, t.stages)
    constants = {
        "SEGMENT": 128, "ROWS": 8, "BLOCK": 256, "TOTAL": False, "REVERSE": False, "STATE": True, "FINAL": True,
        "VARLEN": True,
    }  # fmt: skip
    yield describe("linear scan", _scan, types("bf16"), constants, 4, 3)
