"""Mixed attention in Triton, backward: gradients of q, k, v and the further keys, without atomics.

With p = e^{s − lse} and δ = do·o, the gradient of a logit is p (do·v − δ). Rows sum it into dq (`query_kernel`), keys
into dk and dv over all query heads of their group (`key_kernel`). Further keys are in `triton_mixed_extra`, the linear
branch in `triton_mixed_branch`.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .problem import Blocks, Branch, Mixed, MixedGradients, Ranges, Softmax
from .triton_common import architecture
from .triton_mixed_branch import branch_gradients
from .triton_mixed_delta import delta_of
from .triton_mixed_extra import extra_gradients
from .triton_mixed_host import bytes_of, cumulative, dot_precision, like, limits, lists_of, sizes_of, strides
from .triton_mixed_masks import beyond, early_entries, key_runs, near, pattern_bits, row_runs, whole_entries
from .triton_mixed_shapes import Tile, fitted, half_of, key_tile, padded, query_tile
from .triton_mixed_steps import key_step, logit_gradient
from .triton_mixed_tiles import (
    FAR,
    HOLE,
    INF,
    LOG2E,
    alive_tile,
    places,
    products,
    sequence,
    softcapped,
    tile,
    window_of,
)


@triton.jit(do_not_specialize=["rows", "keys", "extras", "list_b", "list_g", "lse_n", "valid_b"])
def query_kernel(
    q, k, v, do, dq, lse, delta, window, starts, counts, columns, kinds, patterns, valid, extra_k, extra_v, extra_at,
    cu_q, cu_k, scale, softcap, rows, keys, extras, list_b, list_g, lse_n, valid_b,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, do_b, do_h, do_n, dq_b, dq_h, dq_n, ek_b, ek_h, ek_n, ev_b, ev_h, ev_n,
    GROUP: tl.constexpr, DIM: tl.constexpr, CAUSAL: tl.constexpr, RANGES: tl.constexpr, SOFTCAP: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    if CAUSAL:
        place = tl.num_programs(0) - 1 - place
    h = tl.program_id(1)
    n = tl.program_id(2)
    g = h // GROUP
    heads = tl.num_programs(1)
    row0, rows = sequence(cu_q, n, rows)
    key0, keys = sequence(cu_k, n, keys)
    b = n if cu_q is None else n * 0
    first = place * BM
    if first >= rows:
        return
    row = tl.arange(0, BM)
    column = tl.arange(0, PAD)
    lane = tl.arange(0, BN)
    shift = keys - rows
    i = first + shift + row
    i0 = first + shift
    i1 = tl.minimum(first + BM, rows) - 1 + shift
    live = first + row < rows
    q_base = q + b * q_b.to(tl.int64) + h * q_h.to(tl.int64) + row0 * q_n
    do_base = do + b * do_b.to(tl.int64) + h * do_h.to(tl.int64) + row0 * do_n
    q_tile = tile(q_base, first, q_n, row, column, rows, DIM, True)
    do_tile = tile(do_base, first, do_n, row, column, rows, DIM, True)
    q_at = places(q_base, first, q_n, row)
    do_at = places(do_base, first, do_n, row)
    k_base = k + b * k_b.to(tl.int64) + g * k_h.to(tl.int64) + key0 * k_n
    v_base = v + b * v_b.to(tl.int64) + g * v_h.to(tl.int64) + key0 * v_n
    at_row = (b * heads + h).to(tl.int64) * lse_n + row0 + first + row
    top = tl.load(lse + at_row, mask=live, other=INF)
    top = tl.where(top == -INF, INF, top * LOG2E)[:, None]  # a row without keys: p = 0
    d = tl.load(delta + at_row, mask=live, other=0.0)[:, None]
    w = g * 0
    if RANGES:
        w = window_of(window, g)
    unit = scale * LOG2E
    if SOFTCAP:
        unit = unit * 0.0 + LOG2E
    acc = tl.zeros((BM, PAD), tl.float32)

    if extra_at is not None:
        slot = tl.arange(0, BE)
        ek_base = extra_k + b * ek_b.to(tl.int64) + g * ek_h.to(tl.int64)
        ev_base = extra_v + b * ev_b.to(tl.int64) + g * ev_h.to(tl.int64)
        for e in range(0, tl.where(w < FAR, extras, 0), BE):
            at = tl.load(extra_at + (n * (heads // GROUP) + g) * extras + e + slot, mask=e + slot < extras, other=HOLE)
            real = at != HOLE
            kt = alive_tile(ek_base, e, ek_n, slot, column, real, DIM)
            k_at = places(ek_base, e, ek_n, slot)
            s = products(q_tile, q_at, live, kt, k_at, real, column, DIM, PRECISION)
            if SOFTCAP:
                s = softcapped(s * scale, softcap)
            s = tl.where(beyond(i[:, None], at[None, :], w, CAUSAL), s, -INF)
            ev = alive_tile(ev_base, e, ev_n, slot, column, real, DIM)
            v_at = places(ev_base, e, ev_n, slot)
            dp = products(do_tile, do_at, live, ev, v_at, real, column, DIM, PRECISION)
            _, ds = logit_gradient(s, dp, top, d, unit, softcap, SOFTCAP)
            acc = tl.dot(ds.to(kt.dtype), kt, acc, input_precision=PRECISION)

    # tiles that need a mask, then those that do not; lists have them the other way round
    parts: tl.constexpr = BK // BN
    if RANGES:
        start, left, whole, last, resume, edge = key_runs(i0, i1, w, keys, CAUSAL, BN)
        clean = (last - whole) // BN
        begin = start * 0
    else:
        line = n * list_b + g * list_g + first // BQ
        begin = tl.load(starts + line)
        count = tl.load(counts + line)
        limit = keys
        if CAUSAL:
            limit = tl.minimum(keys, i0 + 1)
        clean = whole_entries(columns, begin, count, limit, BK) * parts
        edge = count * parts - clean
        start = begin * 0
        left = start
        whole = start
        resume = start
    in_block = first % BQ + row
    for x in range(edge):
        c0 = start * 0
        entry = begin
        if RANGES:
            j0 = tl.where(x < left, start + x * BN, resume + (x - left) * BN)
        else:
            entry = begin + (clean + x) // parts
            c0 = (clean + x) % parts * BN
            j0 = tl.load(columns + entry) * BK + c0
        j = j0 + lane
        inside = j < keys
        if valid is not None:
            inside = inside & (tl.load(valid + b * valid_b + key0 + j, mask=inside, other=0) != 0)
        kt = alive_tile(k_base, j0, k_n, lane, column, inside, DIM)
        s = products(q_tile, q_at, live, kt, places(k_base, j0, k_n, lane), inside, column, DIM, PRECISION)
        if SOFTCAP:
            s = softcapped(s * scale, softcap)
        seen = inside[None, :] & (row >= 0)[:, None]
        if RANGES:
            seen = seen & near(i[:, None], j[None, :], w, CAUSAL)
        elif CAUSAL:
            seen = seen & (j[None, :] <= i[:, None])
        if kinds is not None:
            kind = tl.load(kinds + entry)
            if kind >= 0:
                seen = seen & pattern_bits(patterns, kind, in_block, c0, lane, BQ, BK, False)
        s = tl.where(seen, s, -INF)
        vt = alive_tile(v_base, j0, v_n, lane, column, inside, DIM)
        dp = products(do_tile, do_at, live, vt, places(v_base, j0, v_n, lane), inside, column, DIM, PRECISION)
        _, ds = logit_gradient(s, dp, top, d, unit, softcap, SOFTCAP)
        acc = tl.dot(ds.to(kt.dtype), kt, acc, input_precision=PRECISION)
    ahead = start * 0  # the next column, read one step ahead so that the keys need not wait for it
    if not RANGES:
        ahead = tl.load(columns + begin, mask=clean > 0, other=0)
    for x in range(clean):
        c0 = start * 0
        entry = begin
        if RANGES:
            j0 = whole + x * BN
        else:
            entry = begin + x // parts
            c0 = x % parts * BN
            j0 = ahead * BK + c0
            ahead = tl.load(columns + begin + (x + 1) // parts, mask=x + 1 < clean, other=0)
        alive = lane >= 0
        if valid is not None:
            alive = tl.load(valid + b * valid_b + key0 + j0 + lane) != 0
            kt = alive_tile(k_base, j0, k_n, lane, column, alive, DIM)
            vt = alive_tile(v_base, j0, v_n, lane, column, alive, DIM)
        else:
            kt = tile(k_base, j0, k_n, lane, column, keys, DIM, False)
            vt = tile(v_base, j0, v_n, lane, column, keys, DIM, False)
        s = products(q_tile, q_at, live, kt, places(k_base, j0, k_n, lane), alive, column, DIM, PRECISION)
        if SOFTCAP:
            s = softcapped(s * scale, softcap)
        if kinds is not None:
            kind = tl.load(kinds + entry)
            if kind >= 0:
                bits = pattern_bits(patterns, kind, in_block, c0, lane, BQ, BK, False)
                s = tl.where(bits, s, -INF)
        if valid is not None:
            s = tl.where(alive[None, :], s, -INF)
        dp = products(do_tile, do_at, live, vt, places(v_base, j0, v_n, lane), alive, column, DIM, PRECISION)
        _, ds = logit_gradient(s, dp, top, d, unit, softcap, SOFTCAP)
        acc = tl.dot(ds.to(kt.dtype), kt, acc, input_precision=PRECISION)

    base = dq + b * dq_b.to(tl.int64) + h * dq_h.to(tl.int64) + (row0 + first) * dq_n
    tl.store(
        base + (row[:, None] * dq_n + column[None, :]),
        (acc * scale).to(dq.dtype.element_ty),
        mask=live[:, None] & (column < DIM)[None, :],
    )


@triton.jit(do_not_specialize=["rows", "keys", "list_b", "list_g", "branches", "lse_n", "valid_b"])
def key_kernel(
    q, k, v, do, dk, dv, lse, delta, window, starts, counts, columns, kinds, patterns, valid, cu_q, cu_k, group_map,
    branch_dv, scale, softcap, rows, keys, list_b, list_g, lse_n, valid_b, branches,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, do_b, do_h, do_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    GROUP: tl.constexpr, DIM: tl.constexpr, CAUSAL: tl.constexpr, RANGES: tl.constexpr, SOFTCAP: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, PAD: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of BN keys, over BM rows at a time of all query heads; the lists are by key block."""
    g = tl.program_id(1)
    n = tl.program_id(2)
    row0, rows = sequence(cu_q, n, rows)
    key0, keys = sequence(cu_k, n, keys)
    b = n if cu_q is None else n * 0
    first = tl.program_id(0) * BN
    if first >= keys:
        return
    heads = tl.num_programs(1) * GROUP
    lane = tl.arange(0, BN)
    row = tl.arange(0, BM)
    column = tl.arange(0, PAD)
    shift = keys - rows
    j = first + lane
    j1 = tl.minimum(first + BN, keys) - 1
    inside = j < keys
    if valid is not None:
        inside = inside & (tl.load(valid + b * valid_b + key0 + j, mask=inside, other=0) != 0)
    k_base = k + b * k_b.to(tl.int64) + g * k_h.to(tl.int64) + key0 * k_n
    v_base = v + b * v_b.to(tl.int64) + g * v_h.to(tl.int64) + key0 * v_n
    kt = alive_tile(k_base, first, k_n, lane, column, inside, DIM)
    vt = alive_tile(v_base, first, v_n, lane, column, inside, DIM)
    k_at = places(k_base, first, k_n, lane)
    v_at = places(v_base, first, v_n, lane)
    q_base = q + b * q_b.to(tl.int64) + g * GROUP * q_h.to(tl.int64) + row0 * q_n
    do_base = do + b * do_b.to(tl.int64) + g * GROUP * do_h.to(tl.int64) + row0 * do_n
    at = (b * heads + g * GROUP).to(tl.int64) * lse_n + row0
    unit = scale * LOG2E
    if SOFTCAP:
        unit = unit * 0.0 + LOG2E
    acc_k = tl.zeros((BN, PAD), tl.float32)
    acc_v = tl.zeros((BN, PAD), tl.float32)

    parts: tl.constexpr = BQ // BM
    w = g * 0
    if RANGES:
        w = window_of(window, g)
        start, left, whole, last, resume, edge = row_runs(first, j1, w, rows, shift, CAUSAL, BM)
        clean = (last - whole) // BM
        begin = start * 0
    else:
        line = n * list_b + g * list_g + first // BK
        begin = tl.load(starts + line)
        count = tl.load(counts + line)
        edge = count * 0
        if CAUSAL:
            edge = early_entries(columns, begin, count, j1 - shift, BQ)
        clean = (count - edge) * parts
        edge = edge * parts
        start = begin * 0
        left = start
        whole = start
        resume = start
    ahead = start * 0  # the next column, read one step ahead so that the rows need not wait for it
    if not RANGES:
        ahead = tl.load(columns + begin, mask=edge > 0, other=0)
    # Triton 3.9 does not compile this loop over a list if it is pipelined
    for y in tl.range(0, edge * GROUP, num_stages=STAGES if RANGES else 1):
        x = y % edge
        head = (y // edge).to(tl.int64)
        entry = begin
        if RANGES:
            r0 = tl.where(x < left, start + x * BM, resume + (x - left) * BM)
        else:
            entry = begin + x // parts
            r0 = ahead * BQ + x % parts * BM
            ahead = tl.load(columns + begin + (y + 1) % edge // parts)
        i = r0 + shift + row
        seen = near(i[None, :], j[:, None], w, CAUSAL) if RANGES else j[:, None] <= i[None, :]
        if kinds is not None:
            kind = tl.load(kinds + entry)
            if kind >= 0:
                seen = seen & pattern_bits(patterns, kind, r0 % BQ + row, first % BK, lane, BQ, BK, True)
        acc_k, acc_v = key_step(
            acc_k, acc_v, kt, vt, k_at, v_at, inside, q_base + head * q_h, do_base + head * do_h,
            lse + at + head * lse_n, delta + at + head * lse_n, r0, row, rows, q_n, do_n, column, seen, unit,
            scale, softcap, DIM, True, True, SOFTCAP, PRECISION,
        )  # fmt: skip
    if not RANGES:
        ahead = tl.load(columns + begin + edge // parts, mask=clean > 0, other=0)
    for y in range(clean * GROUP):
        x = y % clean
        head = (y // clean).to(tl.int64)
        entry = begin
        if RANGES:
            r0 = whole + x * BM
        else:
            entry = begin + edge // parts + x // parts
            r0 = ahead * BQ + x % parts * BM
            ahead = tl.load(columns + begin + edge // parts + (y + 1) % clean // parts)
        seen = (lane >= 0)[:, None] & (row >= 0)[None, :]
        if kinds is not None:
            kind = tl.load(kinds + entry)
            if kind >= 0:
                seen = pattern_bits(patterns, kind, r0 % BQ + row, first % BK, lane, BQ, BK, True)
        acc_k, acc_v = key_step(
            acc_k, acc_v, kt, vt, k_at, v_at, inside, q_base + head * q_h, do_base + head * do_h,
            lse + at + head * lse_n, delta + at + head * lse_n, r0, row, rows, q_n, do_n, column, seen, unit,
            scale, softcap, DIM, kinds is not None, not RANGES, SOFTCAP, PRECISION,
        )  # fmt: skip

    acc_k = tl.where(inside[:, None], acc_k * scale, 0.0)
    acc_v = tl.where(inside[:, None], acc_v, 0.0)
    live = (j < keys)[:, None] & (column < DIM)[None, :]
    if branch_dv is not None:
        t = tl.load(group_map + g)
        place = ((b * branches + tl.maximum(t, 0)).to(tl.int64) * valid_b + key0 + first) * DIM
        more = tl.load(branch_dv + place + (lane[:, None] * DIM + column[None, :]), mask=live & (t >= 0), other=0.0)
        acc_v += more
    base = dk + b * dk_b.to(tl.int64) + g * dk_h.to(tl.int64) + (key0 + first) * dk_n
    tl.store(base + (lane[:, None] * dk_n + column[None, :]), acc_k.to(dk.dtype.element_ty), mask=live)
    base = dv + b * dv_b.to(tl.int64) + g * dv_h.to(tl.int64) + (key0 + first) * dv_n
    tl.store(base + (lane[:, None] * dv_n + column[None, :]), acc_v.to(dv.dtype.element_ty), mask=live)


# --------------------------------------------------------------------------------------------------------- on the host


def mixed_backward(
    p: Softmax,
    branch: Branch | None,
    out: Mixed,
    do: Tensor,
    dlinear: Tensor | None,
    *,
    config: Tile | None = None,
    chunk: int | None = None,
) -> MixedGradients:
    """As in `problem`. `config` and `chunk` replace the tiles and the rows per state, for tests."""
    arch, packed = architecture(), p.varlen is not None  # packed rows and keys may belong to no sequence
    do, lse = _rows(do), out.lse.contiguous()
    delta = torch.empty(p.q.shape[:3], dtype=torch.float32, device=p.q.device)
    dq, dk, dv = (like(x, packed) for x in (p.q, p.k, p.v))
    dfq = dfk = more = None
    with torch.cuda.device_of(p.q):
        if branch is None:
            delta_of(p, out.o, do, lse, delta)
        else:
            dfq, dfk, more = _branch(p, branch, arch, out, do, lse, delta, dlinear, chunk)
        _queries(p, arch, do, lse, delta, dq, config)
        _keys(p, branch, arch, do, lse, delta, dk, dv, more, config)
        dek, dev = extra_gradients(p, arch, do, lse, delta)
    return MixedGradients(q=dq, k=dk, v=dv, extra_k=dek, extra_v=dev, fq=dfq, fk=dfk)


def _branch(
    p: Softmax,
    branch: Branch,
    arch: str,
    out: Mixed,
    do: Tensor,
    lse: Tensor,
    delta: Tensor,
    dlinear: Tensor | None,
    chunk: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dφ(q), dφ(k) and the branch's part of dv; fills `delta` too."""
    gain, offset = (torch.empty(branch.fq.shape[:3], dtype=torch.float32, device=p.q.device) for _ in range(2))
    if branch.shared:
        delta_of(p, out.o, do, lse, delta, branch, gain, offset)
        return branch_gradients(p, branch, arch, do, gain, offset, delta, chunk)
    assert out.linear is not None
    assert out.den is not None
    delta_of(p, out.o, do, lse, delta)
    upstream = _rows(dlinear if dlinear is not None else torch.zeros_like(out.linear))
    shift = torch.empty_like(gain)
    delta_of(p, out.linear, upstream, out.den.contiguous(), shift, branch, gain, offset)
    return branch_gradients(p, branch, arch, upstream, gain, offset, shift, chunk)


def _rows(x: Tensor) -> Tensor:
    """Gradients may come expanded or transposed: the last axis has to be contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _queries(p: Softmax, arch: str, do: Tensor, lse: Tensor, delta: Tensor, dq: Tensor, config: Tile | None) -> None:
    s, t, lists, extra = (
        sizes_of(p),
        config or fitted(query_tile(arch, half_of(p), padded(p.q.shape[3])), p, 0),
        lists_of(p.where),
        p.extra,
    )
    if not p.q.numel():
        return
    query_kernel[triton.cdiv(s.rows, t.own), s.heads, s.count](
        p.q, p.k, p.v, do, dq, lse, delta, p.where.window if isinstance(p.where, Ranges) else None, lists.starts,
        lists.counts, lists.columns, lists.kinds, lists.patterns, bytes_of(p.valid), extra and extra.k,
        extra and extra.v, extra and extra.at.contiguous(), *cumulative(p), p.scale, p.softcap or 1.0, s.rows, s.keys,
        extra.at.shape[2] if extra else 0, lists.stride_b, lists.stride_h, p.q.shape[2], p.k.shape[2], *strides(p.q),
        *strides(p.k), *strides(p.v), *strides(do), *strides(dq), *strides(extra.k if extra else None),
        *strides(extra.v if extra else None), GROUP=s.per, DIM=s.dim, CAUSAL=p.causal,
        RANGES=isinstance(p.where, Ranges), SOFTCAP=p.softcap > 0, BQ=lists.block[0],
        BK=max(lists.block[1], t.walk), BM=t.own, BN=t.walk, BE=16, PAD=padded(s.dim),
        PRECISION=dot_precision(p.q.dtype), num_warps=t.warps,
        num_stages=t.stages, **limits(arch),
    )  # fmt: skip


def _keys(
    p: Softmax,
    branch: Branch | None,
    arch: str,
    do: Tensor,
    lse: Tensor,
    delta: Tensor,
    dk: Tensor,
    dv: Tensor,
    dv_branch: Tensor | None,
    config: Tile | None,
) -> None:
    s, lists = sizes_of(p), lists_of(p.where, True)
    full = p.softcap > 0 or p.varlen is not None or p.valid is not None or lists.kinds is not None or branch is not None
    t = config or fitted(key_tile(arch, half_of(p), padded(s.dim), full, isinstance(p.where, Blocks)), p, 1)
    if not p.k.numel():
        return
    key_kernel[triton.cdiv(s.keys, t.own), s.groups, s.count](
        p.q, p.k, p.v, do, dk, dv, lse, delta, p.where.window if isinstance(p.where, Ranges) else None, lists.starts,
        lists.counts, lists.columns, lists.kinds, lists.patterns, bytes_of(p.valid), *cumulative(p),
        branch and branch.groups, dv_branch, p.scale, p.softcap or 1.0, s.rows, s.keys, lists.stride_b, lists.stride_h,
        p.q.shape[2], p.k.shape[2], branch.fk.shape[1] if branch else 1, *strides(p.q), *strides(p.k), *strides(p.v),
        *strides(do), *strides(dk), *strides(dv), GROUP=s.per, DIM=s.dim, CAUSAL=p.causal,
        RANGES=isinstance(p.where, Ranges), SOFTCAP=p.softcap > 0, BQ=max(lists.block[0], t.walk), BK=lists.block[1],
        BN=t.own, BM=t.walk, PAD=padded(s.dim), PRECISION=dot_precision(p.q.dtype), STAGES=t.stages,
        num_warps=t.warps, num_stages=t.stages, **limits(arch),
    )  # fmt: skip
