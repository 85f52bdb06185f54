"""Gradients of linear attention in Triton.

With a_i = 1 / (den_i + EPS) and δ_i = do_i·o_i (1 and 0 where not normalised), S_i the state through i and R_j the sum
over the rows that read j,

    dφ(q_i) = a_i (S_i do_i − δ_i z_i)
    dφ(k_j) = R_j v_j + r_j,  R_j = Σ a_i φ(q_i) do_iᵀ,  r_j = −Σ a_i δ_i φ(q_i)
    dv_j    = R_jᵀ φ(k_j).

S and R come from `_sums` and `_scan` of the forward, R from the end to the start; the pairs within a chunk are added.
`a_i` multiplies dφ(q_i) last, and all is bf16 or fp32: 1 / den of a long sequence is too small for fp16.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .problem import EPS, Linear
from .triton_common import Variant, architecture
from .triton_linear import _dot, _dot_state, _place, _tile, reduce_segments, scan_segments
from .triton_linear_host import Mode, Tiles, chunk_tiles, describe, mode, modes, plan, reduce_tiles, registers, types

NORMAL = tl.constexpr(EPS)


@triton.jit
def _rows(do, o, den, weight, delta, do_b, do_h, do_r, o_b, o_h, o_r, heads, rows, D, ROWS: tl.constexpr,
          BD: tl.constexpr):  # fmt: skip
    """a and δ of each row, (B, H, Q)."""
    blocks = tl.cdiv(rows, ROWS)
    pid = tl.program_id(0)
    start = pid % blocks * ROWS
    within = tl.arange(0, ROWS)
    row = start + within
    h = (pid // blocks % heads).to(tl.int64)
    b = (pid // (blocks * heads)).to(tl.int64)
    d = tl.arange(0, BD)
    x = _tile(do + b * do_b + h * do_h, start, within, do_r, d, rows, D).to(tl.float32)
    y = _tile(o + b * o_b + h * o_h, start, within, o_r, d, rows, D).to(tl.float32)
    at = (b * heads + h) * rows + row
    total = tl.load(den + at, mask=row < rows, other=1.0)
    tl.store(weight + at, 1.0 / (total + NORMAL), mask=row < rows)
    tl.store(delta + at, tl.sum(x * y, 1), mask=row < rows)


@triton.jit
def _queries(
    do, k, v, sums, weight, delta, dq, cu_q, cu_k, do_b, do_h, do_r, k_b, k_h, k_r, v_b, v_h, v_r, heads, rows, blocks,
    segments, F, D, GROUP: tl.constexpr, CHUNK: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr, CAUSAL: tl.constexpr,
    WEIGHTED: tl.constexpr, VARLEN: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """dφ(q) of CHUNK rows and BF features."""
    parts = tl.cdiv(F, BF)
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
    row = start + within
    live = row < count
    f = part * BF + tl.arange(0, BF)
    segment = block if CAUSAL else 0
    base = sums + ((n * heads + g).to(tl.int64) * segments + segment) * (F * D + F)
    do_base = do + b * tl.cast(do_b, tl.int64) + h * tl.cast(do_h, tl.int64) + first * do_r
    v_base = v + b * tl.cast(v_b, tl.int64) + g * tl.cast(v_h, tl.int64) + first * v_r
    at = (b * heads * GROUP + h).to(tl.int64) * rows + first
    acc = tl.zeros((CHUNK, BF), tl.float32)
    p = tl.zeros((CHUNK, CHUNK), tl.float32)
    for c in range(0, D, BD):
        d = c + tl.arange(0, BD)
        dot = _tile(do_base, start, within, do_r, d, count, D)
        if CAUSAL:
            p = _dot(dot, tl.trans(_tile(v_base, start, within, v_r, d, count, D)), p, T, PRECISION)
        s = tl.load(base + f[None, :] * D + d[:, None], mask=(f < F)[None, :] & (d < D)[:, None], other=0.0)
        acc = _dot_state(dot, s, acc, T, PRECISION, SPLIT)
    if WEIGHTED:
        shift = tl.load(delta + at + row, mask=live, other=0.0)
        z = tl.load(base + F * D + f, mask=f < F, other=0.0)
        acc -= shift[:, None] * z[None, :]
        p -= shift[:, None]
    if CAUSAL:
        p = tl.where(within[:, None] >= within[None, :], p, 0.0)
        kt = _tile(
            k + b * tl.cast(k_b, tl.int64) + g * tl.cast(k_h, tl.int64) + first * k_r, start, within, k_r, f, count, F
        )
        acc = _dot(p, kt, acc, T, PRECISION)
    if WEIGHTED:
        acc = acc * tl.load(weight + at + row, mask=live, other=0.0)[:, None]
    place = dq + (at + row)[:, None] * F + f[None, :]
    tl.store(place, acc.to(dq.dtype.element_ty), mask=live[:, None] & (f < F)[None, :])


@triton.jit
def _keys(
    q, do, v, sums, weight, delta, dk, cu_q, cu_k, q_b, q_h, q_r, do_b, do_h, do_r, v_b, v_h, v_r, heads, rows, keys,
    blocks, segments, F, D, GROUP: tl.constexpr, CHUNK: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr,
    CAUSAL: tl.constexpr, WEIGHTED: tl.constexpr, VARLEN: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """dφ(k) of CHUNK keys and BF features, over all query heads of the group."""
    parts = tl.cdiv(F, BF)
    pid = tl.program_id(0)
    part = pid % parts
    block = pid // parts % blocks
    g = pid // (parts * blocks) % heads
    n = pid // (parts * blocks * heads)
    first, count = _place(cu_k, n, keys, VARLEN)
    b = 0 if VARLEN else n
    if block * CHUNK >= count:
        return
    within = tl.arange(0, CHUNK)
    start = block * CHUNK
    row = start + within
    live = row < count
    f = part * BF + tl.arange(0, BF)
    segment = block if CAUSAL else 0
    base = sums + ((n * heads + g).to(tl.int64) * segments + segment) * (F * D + F)
    v_base = v + b * tl.cast(v_b, tl.int64) + g * tl.cast(v_h, tl.int64) + first * v_r
    acc = tl.zeros((CHUNK, BF), tl.float32)
    for c in range(0, D, BD):
        d = c + tl.arange(0, BD)
        s = tl.load(base + f[None, :] * D + d[:, None], mask=(f < F)[None, :] & (d < D)[:, None], other=0.0)
        acc = _dot_state(_tile(v_base, start, within, v_r, d, count, D), s, acc, T, PRECISION, SPLIT)
    if WEIGHTED:
        acc += tl.load(base + F * D + f, mask=f < F, other=0.0)[None, :]
    if CAUSAL:
        for j in range(GROUP):
            h = (g * GROUP + j).to(tl.int64)
            do_base = do + b * tl.cast(do_b, tl.int64) + h * do_h + first * do_r
            p = tl.zeros((CHUNK, CHUNK), tl.float32)
            for c in range(0, D, BD):
                d = c + tl.arange(0, BD)
                dot = _tile(do_base, start, within, do_r, d, count, D)
                p = _dot(_tile(v_base, start, within, v_r, d, count, D), tl.trans(dot), p, T, PRECISION)
            if WEIGHTED:
                at = (b * heads * GROUP + h) * rows + first + row
                p -= tl.load(delta + at, mask=live, other=0.0)[None, :]
                p *= tl.load(weight + at, mask=live, other=0.0)[None, :]
            p = tl.where(within[:, None] <= within[None, :], p, 0.0)
            qt = _tile(q + b * tl.cast(q_b, tl.int64) + h * q_h + first * q_r, start, within, q_r, f, count, F)
            acc = _dot(p, qt, acc, T, PRECISION)
    place = dk + ((b * heads + g).to(tl.int64) * keys + first + row)[:, None] * F + f[None, :]
    tl.store(place, acc.to(dk.dtype.element_ty), mask=live[:, None] & (f < F)[None, :])


@triton.jit
def _values(
    q, k, do, sums, weight, dv, cu_q, cu_k, q_b, q_h, q_r, k_b, k_h, k_r, do_b, do_h, do_r, heads, rows, keys, blocks,
    segments, F, D, GROUP: tl.constexpr, CHUNK: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr, CAUSAL: tl.constexpr,
    WEIGHTED: tl.constexpr, VARLEN: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """dv of CHUNK keys and BD of their numbers, over all query heads of the group."""
    parts = tl.cdiv(D, BD)
    pid = tl.program_id(0)
    part = pid % parts
    block = pid // parts % blocks
    g = pid // (parts * blocks) % heads
    n = pid // (parts * blocks * heads)
    first, count = _place(cu_k, n, keys, VARLEN)
    b = 0 if VARLEN else n
    if block * CHUNK >= count:
        return
    within = tl.arange(0, CHUNK)
    start = block * CHUNK
    row = start + within
    live = row < count
    d = part * BD + tl.arange(0, BD)
    segment = block if CAUSAL else 0
    base = sums + ((n * heads + g).to(tl.int64) * segments + segment) * (F * D + F)
    k_base = k + b * tl.cast(k_b, tl.int64) + g * tl.cast(k_h, tl.int64) + first * k_r
    acc = tl.zeros((CHUNK, BD), tl.float32)
    for c in range(0, F, BF):
        f = c + tl.arange(0, BF)
        s = tl.load(base + f[:, None] * D + d[None, :], mask=(f < F)[:, None] & (d < D)[None, :], other=0.0)
        acc = _dot_state(_tile(k_base, start, within, k_r, f, count, F), s, acc, T, PRECISION, SPLIT)
    if CAUSAL:
        for j in range(GROUP):
            h = (g * GROUP + j).to(tl.int64)
            q_base = q + b * tl.cast(q_b, tl.int64) + h * q_h + first * q_r
            p = tl.zeros((CHUNK, CHUNK), tl.float32)
            for c in range(0, F, BF):
                f = c + tl.arange(0, BF)
                qt = _tile(q_base, start, within, q_r, f, count, F)
                p = _dot(_tile(k_base, start, within, k_r, f, count, F), tl.trans(qt), p, T, PRECISION)
            p = tl.where(within[:, None] <= within[None, :], p, 0.0)
            if WEIGHTED:
                at = (b * heads * GROUP + h) * rows + first + row
                p *= tl.load(weight + at, mask=live, other=0.0)[None, :]
            dot = _tile(do + b * tl.cast(do_b, tl.int64) + h * do_h + first * do_r, start, within, do_r, d, count, D)
            acc = _dot(p, dot, acc, T, PRECISION)
    place = dv + ((b * heads + g).to(tl.int64) * keys + first + row)[:, None] * D + d[None, :]
    tl.store(place, acc.to(dv.dtype.element_ty), mask=live[:, None] & (d < D)[None, :])


def linear_backward(p: Linear, o: Tensor, den: Tensor, do: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dφ(q), dφ(k), dv, in the dtypes of the inputs. Nothing flows into the initial state."""
    s, m, arch = plan(p), mode(p.fq, p.fk, p.v), architecture()
    do = do if do.stride(-1) == 1 else do.contiguous()
    chunks, r = backward_tiles(arch, m), reduce_tiles(arch, m)
    if p.causal:
        r = dataclasses.replace(r, segment=chunks.segment)
    weights = _row_terms(p, o, den, do) if p.normalize else None
    fresh = torch.empty if p.varlen is None else torch.zeros  # packed rows may belong to no sequence
    dq, dk, dv = (fresh(x.shape, dtype=x.dtype, device=x.device) for x in (p.fq, p.fk, p.v))
    sums = reduce_segments(p, p.fk, p.v, r, s.keys)
    scan_segments(p, sums, r, s.keys, state=True, total=not p.causal)
    blocks = triton.cdiv(s.rows, chunks.chunk)
    if blocks and dq.numel():
        _queries[(s.count * s.heads * blocks * triton.cdiv(s.features, chunks.bf),)](
            do, p.fk, p.v, *_common(p, sums, weights, dq), *_strides(do, p.fk, p.v), s.groups, p.fq.shape[2], blocks,
            sums.shape[2], s.features, s.dim, **_constants(p, chunks, m),
        )  # fmt: skip
    sums = reduce_segments(p, p.fq, do, r, s.rows, weights, rows=True)
    scan_segments(p, sums, r, s.rows, state=False, total=not p.causal, reverse=True)
    blocks = triton.cdiv(s.keys, chunks.chunk)
    if blocks and dv.numel():
        sizes = (s.groups, p.fq.shape[2], p.fk.shape[2], blocks, sums.shape[2], s.features, s.dim)
        _keys[(s.count * s.groups * blocks * triton.cdiv(s.features, chunks.bf),)](
            p.fq, do, p.v, *_common(p, sums, weights, dk), *_strides(p.fq, do, p.v), *sizes,
            **_constants(p, chunks, m),
        )  # fmt: skip
        few = _common(p, sums, weights, dv)
        _values[(s.count * s.groups * blocks * triton.cdiv(s.dim, chunks.bd),)](
            p.fq, p.fk, do, *few[:2], *few[3:], *_strides(p.fq, p.fk, do), *sizes, **_constants(p, chunks, m)
        )
    return dq, dk, dv


def backward_tiles(arch: str, m: Mode) -> Tiles:
    """Smaller than in the forward: more is held at once."""
    t = chunk_tiles(arch, m)
    if not m.half:
        return dataclasses.replace(t, bd=16)
    return t if arch.startswith("gfx") else dataclasses.replace(t, segment=64, chunk=64)


def _row_terms(p: Linear, o: Tensor, den: Tensor, do: Tensor) -> Tensor:
    """a and δ, (2, B, H, Q) fp32."""
    batch, heads, rows, dim = do.shape
    out = torch.empty(2, batch, heads, rows, dtype=torch.float32, device=do.device)
    o = o if o.stride(-1) == 1 else o.contiguous()
    if rows and out.numel():
        _rows[(batch * heads * triton.cdiv(rows, 32),)](
            do, o, den.contiguous(), out[0], out[1], *_strides(do, o), heads, rows, dim, ROWS=32,
            BD=max(64, triton.next_power_of_2(dim)), num_warps=4,
        )  # fmt: skip
    return out


def _common(p: Linear, sums: Tensor, weights: Tensor | None, out: Tensor) -> tuple[Tensor, ...]:
    packed = p.varlen
    cu = (out, out) if packed is None else (packed.cu_q, packed.cu_k)
    return (sums, sums, sums, out, *cu) if weights is None else (sums, weights[0], weights[1], out, *cu)


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(x.stride(i) for x in tensors for i in range(3))


def _constants(p: Linear, t: Tiles, m: Mode) -> dict[str, Any]:
    return {
        "GROUP": plan(p).group,
        "CHUNK": t.chunk,
        "BF": t.bf,
        "BD": t.bd,
        "CAUSAL": p.causal,
        "WEIGHTED": p.normalize,
        "VARLEN": p.varlen is not None,
        "T": m.dtype,
        "PRECISION": m.precision,
        "SPLIT": m.half,
        "num_warps": t.warps,
        "num_stages": t.stages,
        **registers(architecture()),
    }


def variants(arch: str) -> Iterator[Variant]:
    """What `linear_backward` launches beside the kernels of the forward.

    What is packed, weighted and causal stands for what is not. GROUP is a loop bound: 2 stands for all.
    """
    for name, m in modes(arch).items():
        t = backward_tiles(arch, m)
        for function in (_queries, _keys, _values):
            constants: dict[str, Any] = {
                "GROUP": 2, "CHUNK": t.chunk, "BF": t.bf, "BD": t.bd, "CAUSAL": True, "WEIGHTED": True, "VARLEN": True,
                "T": m.dtype, "PRECISION": m.precision, "SPLIT": m.half,
            }  # fmt: skip
            label = f"linear backward{function.__name__} {name}"
            yield describe(label, function, types(name), constants, t.warps, t.stages, registers(arch))
    yield describe("linear backward rows fp32 256", _rows, types("fp32"), {"ROWS": 32, "BD": 256}, 4, 3)
