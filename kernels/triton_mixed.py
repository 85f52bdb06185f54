"""Mixed attention in Triton, forward: softmax over ranges or block lists, further keys and the linear branch.

One program computes a tile of rows of one query head; what its KV group does (no window, a window, nothing, a linear
branch or none) it reads at run time, so all heads are one launch. Logits are in units of log 2. The linear branch
comes first: its state is one matrix product, and under a shared normaliser it is what the online softmax starts from,
as if it were a first tile whose maximum is c + log A[D]. So the two are never shifted apart.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .problem import EPS, Blocks, Branch, Mixed, Ranges, Softmax
from .triton_common import architecture, interpreted
from .triton_mixed_host import (
    Sizes,
    branch_type,
    bytes_of,
    cumulative,
    dot_precision,
    feature_tile,
    like,
    limits,
    lists_of,
    sizes_of,
    strides,
)
from .triton_mixed_masks import beyond, key_runs, near, pattern_bits, whole_entries
from .triton_mixed_shapes import Tile, padded, tile_for
from .triton_mixed_states import States, key_states
from .triton_mixed_tiles import (
    FAR,
    HOLE,
    INF,
    LN2,
    LOG2E,
    alive_tile,
    places,
    products,
    sequence,
    softcapped,
    tile,
    window_of,
)

FLOOR = tl.constexpr(EPS)
NONE, SHARED, SEPARATE = 0, 1, 2  # BRANCH
BEFORE, BOTH, LISTS = 1, 2, 3  # REST: what the branch covers: left of the window, both sides of it, unlisted blocks


@triton.jit
def absorb(m, den, acc, s, v, unit, GUARD: tl.constexpr, PRECISION: tl.constexpr):
    """A tile of logits s · unit and its values joins the online softmax. GUARD: there may be rows without a key."""
    top = tl.maximum(m, tl.max(s, 1) * unit)
    base = top
    if GUARD:
        base = tl.where(top == -INF, 0.0, top)
    p = tl.exp2(s * unit - base[:, None])
    fade = tl.exp2(m - base)
    den = den * fade + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return top, den, acc


@triton.jit
def read_state(
    acc, den, fq_base, f_n, first, row, rows, kv, z, width, column,
    DIM: tl.constexpr, FEATURES: tl.constexpr, BF: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc += φ(q)·KV and den += φ(q)·z, `width` features of them: all or none."""
    lane = tl.arange(0, BF)
    for at in range(0, width, BF):
        f = at + lane
        pointers = fq_base + first * f_n.to(tl.int64) + (row[:, None] * f_n + f[None, :])
        a = tl.load(pointers, mask=(first + row < rows)[:, None] & (f < FEATURES)[None, :], other=0.0)
        state = tl.load(
            kv + f[:, None] * DIM + column[None, :],
            mask=(f < FEATURES)[:, None] & (column < DIM)[None, :],
            other=0.0,
        )
        one = tl.load(z + f, mask=f < FEATURES, other=0.0)
        den += tl.sum(a.to(tl.float32) * one[None, :], 1)
        acc = tl.dot(a.to(TYPE), state.to(TYPE), acc, input_precision=PRECISION)
    return acc, den


@triton.jit
def read_triangle(
    acc, den, fq_base, f_n, first, row, rows, fk_base, fk_n, v_base, v_n, begin, offset, keys, length, column,
    AFTER: tl.constexpr, DIM: tl.constexpr, FEATURES: tl.constexpr, BF: tl.constexpr, BN: tl.constexpr,
    TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The pairs between state and window. Rows stand `offset` behind the place of their state, keys at begin + x,
    x < length; a row reads the keys x < its place, AFTER the others."""
    lane = tl.arange(0, BF)
    x = tl.arange(0, BN)
    place = offset + row
    low = offset // BN * BN if AFTER else offset * 0
    for at in range(low, length, BN):
        j = begin + at + x
        inside = (j >= 0) & (j < keys)
        a = tl.zeros((row.shape[0], BN), tl.float32)
        alive = tl.zeros((BN,), tl.float32)
        for c in range(0, FEATURES, BF):
            f = c + lane
            live_f = f < FEATURES
            pointers = fq_base + first * f_n.to(tl.int64) + (row[:, None] * f_n + f[None, :])
            fq = tl.load(pointers, mask=(first + row < rows)[:, None] & live_f[None, :], other=0.0)
            pointers = fk_base + (begin + at) * fk_n.to(tl.int64) + (x[:, None] * fk_n + f[None, :])
            fk = tl.load(pointers, mask=inside[:, None] & live_f[None, :], other=0.0)
            alive = tl.maximum(alive, tl.max(fk.to(tl.float32), 1))
            a = tl.dot(fq.to(TYPE), tl.trans(fk.to(TYPE)), a, input_precision=PRECISION)
        seen = (at + x)[None, :] < place[:, None]
        if AFTER:
            seen = ((at + x)[None, :] >= place[:, None]) & ((at + x) < length)[None, :]
        a = tl.where(seen & inside[None, :], a, 0.0)
        den += tl.sum(a, 1)
        v = alive_tile(v_base, begin + at, v_n, x, column, inside & (alive > 0), DIM)
        acc = tl.dot(a.to(TYPE), v.to(TYPE), acc, input_precision=PRECISION)
    return acc, den


# What a length decides is no reason to compile again.
@triton.jit(
    do_not_specialize=[
        "rows", "keys", "extras", "chunk", "chunks", "list_b", "list_g", "branches", "lse_n", "valid_b", "linear_n"
    ]
)  # fmt: skip
def forward_kernel(
    q, k, v, o, lse, window, starts, counts, columns, kinds, patterns, valid, extra_k, extra_v, extra_at, sink_logits,
    cu_q, cu_k, group_map, fq, fk, weight, kv, z, kv_after, z_after, linear, den_out,
    scale, softcap, rows, keys, extras, chunk, chunks, branches, list_b, list_g, lse_n, valid_b, linear_n,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n, ek_b, ek_h, ek_n, ev_b, ev_h, ev_n, fq_b, fq_h, fq_n,
    fk_b, fk_h, fk_n,
    GROUP: tl.constexpr, DIM: tl.constexpr, FEATURES: tl.constexpr, CAUSAL: tl.constexpr, RANGES: tl.constexpr,
    BRANCH: tl.constexpr, REST: tl.constexpr, SOFTCAP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, BE: tl.constexpr, PAD: tl.constexpr,
    TYPE: tl.constexpr, PRECISION: tl.constexpr, BRANCH_PRECISION: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    if CAUSAL:  # the longest first
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
    q_base = q + b * q_b.to(tl.int64) + h * q_h.to(tl.int64) + row0 * q_n
    q_tile = tile(q_base, first, q_n, row, column, rows, DIM, True)
    q_at = places(q_base, first, q_n, row)
    q_live = first + row < rows
    k_base = k + b * k_b.to(tl.int64) + g * k_h.to(tl.int64) + key0 * k_n
    v_base = v + b * v_b.to(tl.int64) + g * v_h.to(tl.int64) + key0 * v_n
    w = g * 0
    if RANGES:
        w = window_of(window, g)
    m = tl.full((BM,), -INF, tl.float32)
    den = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, PAD), tl.float32)

    if BRANCH != 0:
        t = tl.load(group_map + g)
        active = t >= 0
        if RANGES:
            active = active & (w < FAR)
        t = tl.maximum(t, 0)
        head = t * GROUP + h % GROUP
        width = tl.where(active, FEATURES, 0)
        fq_base = fq + b * fq_b.to(tl.int64) + head * fq_h.to(tl.int64) + row0 * fq_n
        index = first // chunk
        state = ((n * branches + t).to(tl.int64) * chunks + index) * FEATURES
        if REST != 3:  # one more piece than chunks: the last is the state after all
            state = ((n * branches + t).to(tl.int64) * (chunks + 1) + index) * FEATURES
        acc, den = read_state(
            acc, den, fq_base, fq_n, first, row, rows, kv + state * DIM, z + state, width, column,
            DIM, FEATURES, BF, TYPE, BRANCH_PRECISION,
        )  # fmt: skip
        if REST != 3:
            fk_base = fk + b * fk_b.to(tl.int64) + t * fk_h.to(tl.int64) + key0 * fk_n
            offset = first - index * chunk
            begin = index * chunk + shift - w + 1
            acc, den = read_triangle(
                acc, den, fq_base, fq_n, first, row, rows, fk_base, fk_n, v_base, v_n, begin, offset, keys,
                tl.where(active, offset + BM, 0), column, False, DIM, FEATURES, BF, BN, TYPE, BRANCH_PRECISION,
            )  # fmt: skip
        if REST == 2:
            after = ((n * branches + t).to(tl.int64) * chunks + index) * FEATURES
            acc, den = read_state(
                acc, den, fq_base, fq_n, first, row, rows, kv_after + after * DIM, z_after + after, width, column,
                DIM, FEATURES, BF, TYPE, BRANCH_PRECISION,
            )  # fmt: skip
            begin = index * chunk + shift + tl.maximum(w, 1)
            acc, den = read_triangle(
                acc, den, fq_base, fq_n, first, row, rows, fk_base, fk_n, v_base, v_n, begin, offset, keys,
                tl.where(active, chunk, 0), column, True, DIM, FEATURES, BF, BN, TYPE, BRANCH_PRECISION,
            )  # fmt: skip
        if BRANCH == 1:
            some = den > 0
            total = tl.where(some, den, 1.0)
            c = tl.load(weight + head) * LOG2E
            m = tl.where(some, c + tl.log2(total), -INF)
            acc = tl.where(some[:, None], acc / total[:, None], 0.0)
            den = tl.where(some, 1.0, 0.0)
        else:
            live = (first + row < rows) & (tl.load(group_map + g) >= 0)
            to = (b * branches * GROUP + head).to(tl.int64) * linear_n + row0 + first
            tl.store(den_out + to + row, den, mask=live)
            tl.store(
                linear + to * DIM + (row[:, None] * DIM + column[None, :]),
                (acc / (den + FLOOR)[:, None]).to(linear.dtype.element_ty),
                mask=live[:, None] & (column < DIM)[None, :],
            )
            den = tl.zeros((BM,), tl.float32)
            acc = tl.zeros((BM, PAD), tl.float32)

    unit = scale * LOG2E
    if SOFTCAP:
        unit = unit * 0.0 + LOG2E
    if sink_logits is not None:
        sink = tl.load(sink_logits + h) * LOG2E
        top = tl.maximum(m, sink)
        base = tl.where(top == -INF, 0.0, top)
        fade = tl.exp2(m - base)
        den = den * fade + tl.exp2(sink - base)
        acc = acc * fade[:, None]
        m = top

    if extra_at is not None:
        slot = tl.arange(0, BE)
        ek_base = extra_k + b * ek_b.to(tl.int64) + g * ek_h.to(tl.int64)
        ev_base = extra_v + b * ev_b.to(tl.int64) + g * ev_h.to(tl.int64)
        for e in range(0, tl.where(w < FAR, extras, 0), BE):
            at = tl.load(extra_at + (n * (heads // GROUP) + g) * extras + e + slot, mask=e + slot < extras, other=HOLE)
            real = at != HOLE
            kt = alive_tile(ek_base, e, ek_n, slot, column, real, DIM)
            k_at = places(ek_base, e, ek_n, slot)
            s = products(q_tile, q_at, q_live, kt, k_at, real, column, DIM, PRECISION)
            if SOFTCAP:
                s = softcapped(s * scale, softcap)
            s = tl.where(beyond(i[:, None], at[None, :], w, CAUSAL), s, -INF)
            ev = alive_tile(ev_base, e, ev_n, slot, column, real, DIM)
            m, den, acc = absorb(m, den, acc, s, ev, unit, True, PRECISION)

    if RANGES:
        start, left, whole, last, resume, edge = key_runs(i0, i1, w, keys, CAUSAL, BN)
        for x in range(edge):
            j0 = tl.where(x < left, start + x * BN, resume + (x - left) * BN)
            j = j0 + lane
            inside = j < keys
            if valid is not None:
                inside = inside & (tl.load(valid + b * valid_b + key0 + j, mask=inside, other=0) != 0)
            kt = tile(k_base, j0, k_n, lane, column, keys, DIM, True)
            k_at = places(k_base, j0, k_n, lane)
            s = products(q_tile, q_at, q_live, kt, k_at, j < keys, column, DIM, PRECISION)
            if SOFTCAP:
                s = softcapped(s * scale, softcap)
            s = tl.where(near(i[:, None], j[None, :], w, CAUSAL) & inside[None, :], s, -INF)
            m, den, acc = absorb(
                m, den, acc, s, alive_tile(v_base, j0, v_n, lane, column, inside, DIM), unit, True, PRECISION
            )
        for j0 in range(whole, last, BN):
            kt = tile(k_base, j0, k_n, lane, column, keys, DIM, False)
            k_at = places(k_base, j0, k_n, lane)
            s = products(q_tile, q_at, q_live, kt, k_at, lane >= 0, column, DIM, PRECISION)
            if SOFTCAP:
                s = softcapped(s * scale, softcap)
            if valid is not None:
                alive = tl.load(valid + b * valid_b + key0 + j0 + lane) != 0
                s = tl.where(alive[None, :], s, -INF)
                vt = alive_tile(v_base, j0, v_n, lane, column, alive, DIM)
                m, den, acc = absorb(m, den, acc, s, vt, unit, True, PRECISION)
            else:
                vt = tile(v_base, j0, v_n, lane, column, keys, DIM, False)
                m, den, acc = absorb(m, den, acc, s, vt, unit, False, PRECISION)
    else:
        parts: tl.constexpr = BK // BN
        line = n * list_b + g * list_g + first // BQ
        begin = tl.load(starts + line)
        count = tl.load(counts + line)
        limit = keys
        if CAUSAL:
            limit = tl.minimum(keys, i0 + 1)
        split = whole_entries(columns, begin, count, limit, BK) * parts
        in_block = first % BQ + row
        # the next column is read one step ahead, so that the keys need not wait for it
        ahead = tl.load(columns + begin, mask=split > 0, other=0)
        for x in range(split):
            entry = begin + x // parts
            c0 = x % parts * BN
            j0 = ahead * BK + c0
            ahead = tl.load(columns + begin + (x + 1) // parts, mask=x + 1 < split, other=0)
            kt = tile(k_base, j0, k_n, lane, column, keys, DIM, False)
            k_at = places(k_base, j0, k_n, lane)
            s = products(q_tile, q_at, q_live, kt, k_at, lane >= 0, column, DIM, PRECISION)
            if SOFTCAP:
                s = softcapped(s * scale, softcap)
            if kinds is not None:
                kind = tl.load(kinds + entry)
                if kind >= 0:
                    bits = pattern_bits(patterns, kind, in_block, c0, lane, BQ, BK, False)
                    s = tl.where(bits, s, -INF)
            if valid is not None:
                alive = tl.load(valid + b * valid_b + key0 + j0 + lane) != 0
                s = tl.where(alive[None, :], s, -INF)
                vt = alive_tile(v_base, j0, v_n, lane, column, alive, DIM)
                m, den, acc = absorb(m, den, acc, s, vt, unit, True, PRECISION)
            else:
                vt = tile(v_base, j0, v_n, lane, column, keys, DIM, False)
                m, den, acc = absorb(m, den, acc, s, vt, unit, kinds is not None, PRECISION)
        for x in range(split, count * parts):
            entry = begin + x // parts
            c0 = x % parts * BN
            j0 = tl.load(columns + entry) * BK + c0
            j = j0 + lane
            inside = j < keys
            if valid is not None:
                inside = inside & (tl.load(valid + b * valid_b + key0 + j, mask=inside, other=0) != 0)
            kt = tile(k_base, j0, k_n, lane, column, keys, DIM, True)
            k_at = places(k_base, j0, k_n, lane)
            s = products(q_tile, q_at, q_live, kt, k_at, j < keys, column, DIM, PRECISION)
            if SOFTCAP:
                s = softcapped(s * scale, softcap)
            seen = inside[None, :] & (row >= 0)[:, None]
            if CAUSAL:
                seen = seen & (j[None, :] <= i[:, None])
            if kinds is not None:
                kind = tl.load(kinds + entry)
                if kind >= 0:
                    seen = seen & pattern_bits(patterns, kind, in_block, c0, lane, BQ, BK, False)
            s = tl.where(seen, s, -INF)
            m, den, acc = absorb(
                m, den, acc, s, alive_tile(v_base, j0, v_n, lane, column, inside, DIM), unit, True, PRECISION
            )

    some = den > 0
    total = tl.where(some, den, 1.0)
    live = first + row < rows
    tl.store(
        lse + (b * heads + h).to(tl.int64) * lse_n + row0 + first + row,
        tl.where(some, (m + tl.log2(total)) * LN2, -INF),
        mask=live,
    )
    o_base = o + b * o_b.to(tl.int64) + h * o_h.to(tl.int64) + (row0 + first) * o_n
    tl.store(
        o_base + (row[:, None] * o_n + column[None, :]),
        (acc / total[:, None]).to(o.dtype.element_ty),
        mask=live[:, None] & (column < DIM)[None, :],
    )


# --------------------------------------------------------------------------------------------------------- on the host


def refuses(function: str, problem: object) -> str | None:
    """Why this back end cannot compute it, or None."""
    p = problem[0] if isinstance(problem, tuple) else problem
    if not isinstance(p, Softmax):
        return None
    if p.q.dtype == torch.float64:
        return "Triton kernels accumulate in fp32: fp64 is computed by the torch back end"
    if not p.q.is_cuda and not interpreted():
        return f"Triton kernels run on a GPU, and q is on {p.q.device}"
    if not 8 <= p.q.shape[3] <= 256:
        return f"head dimension {p.q.shape[3]}: Triton kernels take 8 to 256"
    if p.scale <= 0:
        return f"scale is {p.scale}: the online maximum of the Triton kernels needs a positive one"
    if function == "mixed_backward" and isinstance(p.where, Blocks) and p.where.t_starts is None:
        return "lists without their transpose (t_starts, …): gradients of k and v need it"
    return None


def mixed_forward(p: Softmax, branch: Branch | None, *, config: Tile | None = None, chunk: int | None = None) -> Mixed:
    """As in `problem`. `config` and `chunk` replace the tile and the rows per state, for tests."""
    s, arch = sizes_of(p), architecture()
    o = like(p.q)
    lse = torch.empty(p.q.shape[:3], dtype=torch.float32, device=p.q.device)
    linear = den = final = None
    if branch is not None and not branch.shared:
        linear = torch.empty(*branch.fq.shape[:3], s.dim, dtype=p.q.dtype, device=p.q.device)
        den = torch.empty(branch.fq.shape[:3], dtype=torch.float32, device=p.q.device)
    if p.varlen is not None:  # rows may belong to no sequence
        lse.fill_(-torch.inf)
        for x in (o, linear, den):
            if x is not None:
                x.zero_()
    sides: list[States] = []
    with torch.cuda.device_of(p.q):
        if branch is not None:
            kind, _ = branch_type(branch.fq, branch.fk, p.v)
            narrow = torch.bfloat16 if kind == tl.bfloat16 else torch.float32
            sides, final = key_states(p, branch, arch, narrow, chunk)
        if p.q.numel():
            full = branch is not None or p.valid is not None
            full = full or (isinstance(p.where, Blocks) and p.where.kinds is not None)
            _launch(p, branch, s, config or tile_for(p, arch, full), sides, (o, lse, linear, den))
    return Mixed(o=o, lse=lse, linear=linear, den=den, state=final)


def _launch(
    p: Softmax,
    branch: Branch | None,
    s: Sizes,
    t: Tile,
    sides: list[States],
    out: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
) -> None:
    o, lse, linear, den = out
    lists, extra, (cu_q, cu_k) = lists_of(p.where), p.extra, cumulative(p)
    ranges = isinstance(p.where, Ranges)
    kind, precision = (tl.float32, "ieee") if branch is None else branch_type(branch.fq, branch.fk, p.v)
    fq, fk = (None, None) if branch is None else (branch.fq, branch.fk)
    count = sides[0].count if sides else 1
    first, last = (sides[0], sides[-1]) if sides else (None, None)
    grid = (triton.cdiv(s.rows, t.own), s.heads, s.count)
    forward_kernel[grid](
        p.q, p.k, p.v, o, lse, p.where.window if isinstance(p.where, Ranges) else None, lists.starts, lists.counts,
        lists.columns, lists.kinds, lists.patterns, bytes_of(p.valid), extra and extra.k, extra and extra.v,
        extra and extra.at.contiguous(), p.sink_logits, cu_q, cu_k, branch and branch.groups, fq, fk,
        branch and branch.weight, first and first.kv, first and first.z, last and last.kv, last and last.z, linear, den,
        p.scale, p.softcap or 1.0, s.rows, s.keys, extra.at.shape[2] if extra else 0, first.chunk if first else 1,
        count - 1 if ranges else count, fk.shape[1] if fk is not None else 1, lists.stride_b, lists.stride_h,
        p.q.shape[2], p.k.shape[2], p.q.shape[2], *strides(p.q), *strides(p.k), *strides(p.v), *strides(o),
        *strides(extra.k if extra else None), *strides(extra.v if extra else None), *strides(fq), *strides(fk),
        GROUP=s.per, DIM=s.dim, FEATURES=fq.shape[3] if fq is not None else 16, CAUSAL=p.causal, RANGES=ranges,
        BRANCH=NONE if branch is None else SHARED if branch.shared else SEPARATE,
        REST=LISTS if not ranges else BEFORE if p.causal else BOTH, SOFTCAP=p.softcap > 0, BQ=lists.block[0],
        BK=lists.block[1], BM=t.own, BN=t.walk, BF=feature_tile(fq), BE=16, PAD=padded(s.dim), TYPE=kind,
        PRECISION=dot_precision(p.q.dtype), BRANCH_PRECISION=precision, num_warps=t.warps,
        num_stages=t.stages, **limits(architecture()),
    )  # fmt: skip
