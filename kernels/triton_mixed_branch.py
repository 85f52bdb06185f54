"""Gradients of the linear branch of mixed attention in Triton.

A row's output gradient reaches the branch as a·[do | −δ], with its gain a and δ = do·o: under the normaliser of the
softmax a = e^{c − lse}, with one of its own a = 1 / (A[D] + EPS). So everything is linear attention without a
normaliser, once forward over the states of the keys (dφ(q)) and once backward over Σ a φ(q) [do | −δ] (dφ(k), dv). The
states are fp32 and multiplied as two bf16 parts: do·v − δ is a difference of near numbers.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .problem import Blocks, Branch, Softmax
from .triton_mixed_host import branch_type, cumulative, like, limits, sizes_of, strides
from .triton_mixed_shapes import Tile, divisor, padded
from .triton_mixed_states import WHOLE, States, gathered, key_states, scanned, tile_sums, unlisted
from .triton_mixed_tiles import FAR, alive_tile, sequence, window_of

BEFORE, BOTH, LISTS = 1, 2, 3  # REST, as in `triton_mixed`


@triton.jit
def dot_state(a, s, acc, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a · s with fp32 s, as two bf16 parts where bf16 multiplies."""
    high = s.to(TYPE)
    acc = tl.dot(a.to(TYPE), high, acc, input_precision=PRECISION)
    if TYPE == tl.bfloat16:  # noqa: SIM300
        acc = tl.dot(a.to(TYPE), (s - high.to(tl.float32)).to(TYPE), acc, input_precision=PRECISION)
    return acc


@triton.jit
def times_state(
    acc, base, stride, live, token, state, f, some, DIM: tl.constexpr, PAD: tl.constexpr, FEATURES: tl.constexpr,
    FINITE: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + x · stateᵀ for tokens x (…, D) at `base` and the features f, 64 columns of x at once.

    FINITE takes what is not for zero: the values of padding keys, whose gradient is dropped.
    """
    part: tl.constexpr = PAD if PAD < 64 else 64
    lane = tl.arange(0, part)
    for at in range(0, tl.where(some, DIM, 0), part):
        column = at + lane
        inside = column < DIM
        x = tl.load(base + (token[:, None] * stride + column[None, :]), mask=live[:, None] & inside[None, :], other=0.0)
        if FINITE:
            x = tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0.0)
        live_f = (f < FEATURES)[None, :]
        s = tl.load(state + column[:, None] + f[None, :] * DIM, mask=live_f & inside[:, None], other=0.0)
        acc = dot_state(x, s, acc, TYPE, PRECISION)
    return acc


@triton.jit
def query_triangle(
    acc, dot, d, place, fk_base, fk_n, v_base, v_n, begin, low, length, keys, f, column,
    AFTER: tl.constexpr, DIM: tl.constexpr, FEATURES: tl.constexpr, BN: tl.constexpr, TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The pairs between state and window, as `read_triangle` of the forward."""
    x = tl.arange(0, BN)
    for at in range(low, length, BN):
        j = begin + at + x
        inside = (j >= 0) & (j < keys)
        pointers = fk_base + (begin + at) * fk_n.to(tl.int64) + (x[:, None] * fk_n + f[None, :])
        fk = tl.load(pointers, mask=inside[:, None] & (f < FEATURES)[None, :], other=0.0)
        v = alive_tile(v_base, begin + at, v_n, x, column, inside, DIM)
        c = tl.dot(dot.to(TYPE), tl.trans(v.to(TYPE)), input_precision=PRECISION) - d[:, None]
        seen = (at + x)[None, :] < place[:, None]
        if AFTER:
            seen = ((at + x)[None, :] >= place[:, None]) & ((at + x) < length)[None, :]
        alive = inside & (tl.max(fk.to(tl.float32), 1) > 0)
        c = tl.where(seen & alive[None, :], c, 0.0)
        acc = tl.dot(c.to(TYPE), fk.to(TYPE), acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["rows", "keys", "chunk", "chunks", "branches", "delta_n"])
def query_features_kernel(
    fk, v, upstream, gain, delta, kv, z, kv_after, z_after, dfq, window, group_map, cu_q, cu_k,
    rows, keys, chunk, chunks, branches, delta_n, fk_b, fk_h, fk_n, v_b, v_h, v_n, u_b, u_h, u_n, d_b, d_h, d_n,
    GROUP: tl.constexpr, DIM: tl.constexpr, FEATURES: tl.constexpr, REST: tl.constexpr, SHARED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, PAD: tl.constexpr, TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dφ(q) of BM rows and BF features."""
    parts: tl.constexpr = (FEATURES + BF - 1) // BF
    first = tl.program_id(0) // parts * BM
    f = tl.program_id(0) % parts * BF + tl.arange(0, BF)
    h = tl.program_id(1)
    n = tl.program_id(2)
    heads = tl.num_programs(1)
    g = h // GROUP
    t = tl.load(group_map + g)
    row0, rows = sequence(cu_q, n, rows)
    key0, keys = sequence(cu_k, n, keys)
    b = n if cu_q is None else n * 0
    if (t >= 0) & (first < rows):
        row = tl.arange(0, BM)
        column = tl.arange(0, PAD)
        live = first + row < rows
        shift = keys - rows
        head = t * GROUP + h % GROUP
        source = h if SHARED else head
        count = heads if SHARED else branches * GROUP
        u_base = upstream + b * u_b.to(tl.int64) + source * u_h.to(tl.int64) + (row0 + first) * u_n
        d = tl.load(delta + (b * count + source).to(tl.int64) * delta_n + row0 + first + row, mask=live, other=0.0)
        a = tl.load(
            gain + (b * branches * GROUP + head).to(tl.int64) * delta_n + row0 + first + row, mask=live, other=0.0
        )  # fmt: skip
        some = t >= 0
        w = g * 0
        if REST != 3:
            w = window_of(window, g)
            some = w < FAR
        index = first // chunk
        lane = (n * branches + t).to(tl.int64)
        state = (lane * chunks + index) * FEATURES
        if REST != 3:
            state = (lane * (chunks + 1) + index) * FEATURES
        live_f = (f < FEATURES) & some
        acc = -d[:, None] * tl.load(z + state + f, mask=live_f, other=0.0)[None, :]
        acc = times_state(
            acc, u_base, u_n, live, row, kv + state * DIM, f, some, DIM, PAD, FEATURES, False, TYPE, PRECISION
        )  # fmt: skip
        if REST != 3:
            fk_base = fk + b * fk_b.to(tl.int64) + t * fk_h.to(tl.int64) + key0 * fk_n
            v_base = v + b * v_b.to(tl.int64) + g * v_h.to(tl.int64) + key0 * v_n
            dot = alive_tile(u_base, 0, u_n, row, column, live, DIM)
            offset = first - index * chunk
            begin = index * chunk + shift - w + 1
            acc = query_triangle(
                acc, dot, d, offset + row, fk_base, fk_n, v_base, v_n, begin, 0, tl.where(some, offset + BM, 0), keys,
                f, column, False, DIM, FEATURES, BN, TYPE, PRECISION,
            )  # fmt: skip
        if REST == 2:
            state = (lane * chunks + index) * FEATURES
            acc -= d[:, None] * tl.load(z_after + state + f, mask=live_f, other=0.0)[None, :]
            acc = times_state(
                acc, u_base, u_n, live, row, kv_after + state * DIM, f, some, DIM, PAD, FEATURES, False, TYPE, PRECISION
            )  # fmt: skip
            begin = index * chunk + shift + tl.maximum(w, 1)
            acc = query_triangle(
                acc, dot, d, offset + row, fk_base, fk_n, v_base, v_n, begin, offset // BN * BN,
                tl.where(some, chunk, 0), keys, f, column, True, DIM, FEATURES, BN, TYPE, PRECISION,
            )  # fmt: skip
        base = dfq + b * d_b.to(tl.int64) + head * d_h.to(tl.int64) + (row0 + first) * d_n
        tl.store(
            base + (row[:, None] * d_n + f[None, :]),
            (acc * a[:, None]).to(dfq.dtype.element_ty),
            mask=live[:, None] & (f < FEATURES)[None, :],
        )


@triton.jit
def key_place(index, chunk, w, rows, keys, BN: tl.constexpr, REST: tl.constexpr, AFTER: tl.constexpr):
    """Of tile `index` of the keys: its first key, its chunk, the place in it and whether rows of it stand near."""
    chunk_index = index * BN // chunk
    x0 = index * BN - chunk_index * chunk
    first = index * BN
    near = w < 0
    if REST != 3:
        # chunk c has the keys that leave the windows (AFTER: enter what is right of them) with the rows of chunk c
        s = keys - rows - w + 1
        if AFTER:
            s = keys - rows + tl.maximum(w, 1)
        c0 = tl.where(s > 0, -((s + chunk - 1) // chunk), -s // chunk)
        chunk_index += c0
        first = chunk_index * chunk + s + x0
        near = (chunk_index >= 0) & (chunk_index * chunk < rows) & (w < FAR)
    return first, chunk_index, x0, near


@triton.jit
def state_place(c, chunks, rows, chunk, REST: tl.constexpr, AFTER: tl.constexpr):
    """The running sum over the row chunks whose rows all read these keys, and whether there is one."""
    if REST == 3:
        return c, c >= 0
    used = tl.cdiv(rows, chunk)
    if AFTER:
        return tl.maximum(tl.minimum(c, used) - 1, 0), (c > 0) & (used > 0)
    return tl.minimum(tl.maximum(c + 1, 0), chunks - 1), c + 1 < used


@triton.jit(do_not_specialize=["rows", "keys", "chunk", "chunks", "branches", "groups", "delta_n"])
def key_features_kernel(
    v, fq, fk, upstream, gain, delta, state, state_z, dfk, window, group_map, cu_q, cu_k,
    rows, keys, chunk, chunks, branches, groups, delta_n, v_b, v_h, v_n, fq_b, fq_h, fq_n, fk_b, fk_h, fk_n,
    u_b, u_h, u_n, d_b, d_h, d_n,
    GROUP: tl.constexpr, DIM: tl.constexpr, FEATURES: tl.constexpr, REST: tl.constexpr, AFTER: tl.constexpr,
    SHARED: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr, PAD: tl.constexpr, TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dφ(k) of BN keys and BF features; AFTER adds to what is there."""
    parts: tl.constexpr = (FEATURES + BF - 1) // BF
    f = tl.program_id(0) % parts * BF + tl.arange(0, BF)
    g = tl.program_id(1)
    n = tl.program_id(2)
    t = tl.load(group_map + g)
    row0, rows = sequence(cu_q, n, rows)
    key0, keys = sequence(cu_k, n, keys)
    b = n if cu_q is None else n * 0
    w = g * 0
    if REST != 3:
        w = window_of(window, g)
    first, c, x0, near = key_place(tl.program_id(0) // parts, chunk, w, rows, keys, BN, REST, AFTER)
    if (t >= 0) & (first < keys):
        lane = tl.arange(0, BN)
        row = tl.arange(0, BM)
        column = tl.arange(0, PAD)
        j = first + lane
        inside = (j >= 0) & (j < keys)
        live_f = f < FEATURES
        v_base = v + b * v_b.to(tl.int64) + g * v_h.to(tl.int64) + (key0 + first) * v_n
        at, some = state_place(c, chunks, rows, chunk, REST, AFTER)
        place = ((n * branches + t).to(tl.int64) * chunks + at) * FEATURES
        acc = tl.zeros((BN, BF), tl.float32) + tl.load(state_z + place + f, mask=live_f & some, other=0.0)[None, :]
        acc = times_state(
            acc, v_base, v_n, inside, lane, state + place * DIM, f, some, DIM, PAD, FEATURES, True, TYPE, PRECISION
        )  # fmt: skip
        if REST != 3:
            vt = alive_tile(v_base, 0, v_n, lane, column, inside, DIM)
            vt = tl.where(tl.abs(vt.to(tl.float32)) < float("inf"), vt, 0.0)
            low = x0 * 0 if AFTER else x0 // BM * BM
            high = tl.minimum(x0 + BN, chunk) if AFTER else chunk
            tiles = tl.where(near, tl.cdiv(high - low, BM), 0)
            for y in range(tiles * GROUP):
                head = y // tiles
                r0 = low + y % tiles * BM
                r = c * chunk + r0 + row
                real = (r < rows) & (r0 + row < chunk)
                source = (g if SHARED else t) * GROUP + head
                count = (groups if SHARED else branches) * GROUP
                u_base = upstream + b * u_b.to(tl.int64) + source * u_h.to(tl.int64) + row0 * u_n
                dot = alive_tile(u_base, c * chunk + r0, u_n, row, column, real, DIM)
                d = tl.load(delta + (b * count + source).to(tl.int64) * delta_n + row0 + r, mask=real, other=0.0)
                to = (b * branches * GROUP + t * GROUP + head).to(tl.int64) * delta_n + row0
                a = tl.load(gain + to + r, mask=real, other=0.0)
                seen = (r0 + row)[None, :] > (x0 + lane)[:, None]
                if AFTER:
                    seen = (r0 + row)[None, :] <= (x0 + lane)[:, None]
                e = tl.dot(vt.to(TYPE), tl.trans(dot.to(TYPE)), input_precision=PRECISION)
                e = tl.where(seen & real[None, :], (e - d[None, :]) * a[None, :], 0.0)
                fq_base = fq + b * fq_b.to(tl.int64) + (t * GROUP + head) * fq_h.to(tl.int64) + row0 * fq_n
                pointers = fq_base + (c * chunk + r0) * fq_n.to(tl.int64) + (row[:, None] * fq_n + f[None, :])
                feature = tl.load(pointers, mask=real[:, None] & live_f[None, :], other=0.0)
                acc = tl.dot(e.to(TYPE), feature.to(TYPE), acc, input_precision=PRECISION)
        base = dfk + b * d_b.to(tl.int64) + t * d_h.to(tl.int64) + (key0 + first) * d_n
        base = base + (lane[:, None] * d_n + f[None, :])
        live = inside[:, None] & live_f[None, :]
        if AFTER:
            acc += tl.load(base, mask=live, other=0.0).to(tl.float32)
        tl.store(base, acc.to(dfk.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["rows", "keys", "chunk", "chunks", "branches", "groups", "delta_n"])
def key_values_kernel(
    fq, fk, upstream, gain, state, branch_dv, window, group_map, cu_q, cu_k,
    rows, keys, chunk, chunks, branches, groups, delta_n, dv_n, fq_b, fq_h, fq_n, fk_b, fk_h, fk_n, u_b, u_h, u_n,
    GROUP: tl.constexpr, DIM: tl.constexpr, FEATURES: tl.constexpr, REST: tl.constexpr, AFTER: tl.constexpr,
    SHARED: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr, PAD: tl.constexpr, TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What the branch adds to dv, for BN keys: (B, Ht, K, D) fp32; AFTER adds to what is there."""
    g = tl.program_id(1)
    n = tl.program_id(2)
    t = tl.load(group_map + g)
    row0, rows = sequence(cu_q, n, rows)
    key0, keys = sequence(cu_k, n, keys)
    b = n if cu_q is None else n * 0
    w = g * 0
    if REST != 3:
        w = window_of(window, g)
    first, c, x0, near = key_place(tl.program_id(0), chunk, w, rows, keys, BN, REST, AFTER)
    if (t >= 0) & (first < keys):
        lane = tl.arange(0, BN)
        row = tl.arange(0, BM)
        column = tl.arange(0, PAD)
        feature = tl.arange(0, BF)
        j = first + lane
        inside = (j >= 0) & (j < keys)
        live_d = column < DIM
        at, some = state_place(c, chunks, rows, chunk, REST, AFTER)
        place = ((n * branches + t).to(tl.int64) * chunks + at) * FEATURES * DIM
        fk_base = fk + b * fk_b.to(tl.int64) + t * fk_h.to(tl.int64) + key0 * fk_n
        acc = tl.zeros((BN, PAD), tl.float32)
        for f0 in range(0, tl.where(some, FEATURES, 0), BF):
            f = f0 + feature
            key = fk_base + first * fk_n.to(tl.int64) + (lane[:, None] * fk_n + f[None, :])
            x = tl.load(key, mask=inside[:, None] & (f < FEATURES)[None, :], other=0.0)
            u = state + place + (f[:, None] * DIM + column[None, :])
            u = tl.load(u, mask=(f < FEATURES)[:, None] & live_d[None, :], other=0.0)
            acc = dot_state(x, u, acc, TYPE, PRECISION)
        if REST != 3:
            low = x0 * 0 if AFTER else x0 // BM * BM
            high = tl.minimum(x0 + BN, chunk) if AFTER else chunk
            tiles = tl.where(near, tl.cdiv(high - low, BM), 0)
            for y in range(tiles * GROUP):
                head = t * GROUP + y // tiles
                source = (g if SHARED else t) * GROUP + y // tiles
                r0 = low + y % tiles * BM
                real = (c * chunk + r0 + row < rows) & (r0 + row < chunk)
                fq_base = fq + b * fq_b.to(tl.int64) + head * fq_h.to(tl.int64) + row0 * fq_n
                fq_base += (c * chunk + r0) * fq_n.to(tl.int64)
                e = tl.zeros((BN, BM), tl.float32)
                for f0 in range(0, FEATURES, BF):
                    f = f0 + feature
                    live_f = (f < FEATURES)[None, :]
                    key = fk_base + first * fk_n.to(tl.int64) + (lane[:, None] * fk_n + f[None, :])
                    x = tl.load(key, mask=inside[:, None] & live_f, other=0.0)
                    q = tl.load(fq_base + (row[:, None] * fq_n + f[None, :]), mask=real[:, None] & live_f, other=0.0)
                    e = tl.dot(x.to(TYPE), tl.trans(q.to(TYPE)), e, input_precision=PRECISION)
                to = (b * branches * GROUP + head).to(tl.int64) * delta_n + row0 + c * chunk + r0
                a = tl.load(gain + to + row, mask=real, other=0.0)
                seen = (r0 + row)[None, :] > (x0 + lane)[:, None]
                if AFTER:
                    seen = (r0 + row)[None, :] <= (x0 + lane)[:, None]
                e = tl.where(seen & real[None, :], e * a[None, :], 0.0)
                u_base = upstream + b * u_b.to(tl.int64) + source * u_h.to(tl.int64) + row0 * u_n
                dot = alive_tile(u_base, c * chunk + r0, u_n, row, column, real, DIM)
                acc = tl.dot(e.to(TYPE), dot.to(TYPE), acc, input_precision=PRECISION)
        to = ((b * branches + t).to(tl.int64) * dv_n + key0 + first) * DIM
        base = branch_dv + to + (lane[:, None] * DIM + column[None, :])
        live = inside[:, None] & live_d[None, :]
        if AFTER:
            acc += tl.load(base, mask=live, other=0.0)
        tl.store(base, acc, mask=live)


# --------------------------------------------------------------------------------------------------------- on the host


def branch_tiles(arch: str, half: bool, pad: int) -> tuple[Tile, Tile, int]:
    """Of the two kernels for features and of that for values, and the features at once."""
    if half and pad <= 128:
        t = Tile(64, 32, 8 if arch == "gfx942" else 4, 1)
        return t, t, 64
    if half:
        return Tile(32, 32, 4, 1), Tile(32, 32, 8, 1), 32
    t = Tile(32, 16, 8, 1)
    return t, t, 32 if pad <= 128 else 16


def branch_gradients(
    p: Softmax,
    branch: Branch,
    arch: str,
    upstream: Tensor,
    gain: Tensor,
    offset: Tensor,
    delta: Tensor,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dφ(q), dφ(k) and the branch's part of dv (B, Ht, K, D) fp32.

    `upstream` (B, H or Ht · G, Q, D) and `delta` of the same heads belong to what the branch adds to; `gain` and
    `offset` are (B, Ht · G, Q).
    """
    s, (branches, width) = sizes_of(p), branch.fk.shape[1::2]
    lists = isinstance(p.where, Blocks)
    rest = LISTS if lists else BEFORE if p.causal else BOTH
    kind, precision = branch_type(branch.fq, branch.fk, p.v, upstream)
    t, tv, bf = branch_tiles(arch, kind == tl.bfloat16, padded(s.dim))
    fresh = torch.empty if p.varlen is None else torch.zeros
    dfq = like(branch.fq, p.varlen is not None)
    dfk = fresh(branch.fk.shape, dtype=torch.float32 if rest == BOTH else branch.fk.dtype, device=p.q.device)
    dv = fresh(p.k.shape[0], branches, p.k.shape[2], s.dim, dtype=torch.float32, device=p.q.device)
    left = unlisted(p) if lists else None
    sides, _ = key_states(p, branch, arch, torch.float32, chunk, left)
    chunk, cu = sides[0].chunk, cumulative(p)
    window = None if isinstance(p.where, Blocks) else p.where.window
    common = {
        "GROUP": s.per, "DIM": s.dim, "FEATURES": width, "REST": rest, "SHARED": branch.shared,
        "PAD": padded(s.dim), "TYPE": kind, "PRECISION": precision,
    } | limits(arch)  # fmt: skip
    own = min(t.own, divisor(chunk, 1024))
    numbers = (s.rows, s.keys, chunk)
    if branch.fq.numel():
        query_features_kernel[triton.cdiv(s.rows, own) * triton.cdiv(width, bf), s.heads, s.count](
            branch.fk, p.v, upstream, gain, delta, sides[0].kv, sides[0].z, sides[-1].kv, sides[-1].z, dfq, window,
            branch.groups, *cu, *numbers, sides[0].count - (not lists), branches, p.q.shape[2], *strides(branch.fk),
            *strides(p.v), *strides(upstream), *strides(dfq), BM=own, BN=t.walk, BF=bf,
            num_warps=t.warps, num_stages=t.stages, **common,
        )  # fmt: skip
    del sides
    row_chunk = p.where.block[0] if isinstance(p.where, Blocks) else chunk
    count = left.shape[1] if left is not None else max(1, triton.cdiv(s.rows, chunk))
    sums = tile_sums(p, branch, arch, WHOLE, row_chunk, count, torch.float32, (upstream, gain, offset))
    if left is not None:
        passes = [(gathered(p, branch, arch, sums, left, torch.float32, True), False)]
    else:
        passes = [(scanned(sums, branches, torch.float32, True, keep=rest == BOTH), False)]
        if rest == BOTH:
            passes.append((scanned(sums, branches, torch.float32, False), True))
    for states, after in passes:
        _key_side(p, branch, states, after, upstream, gain, delta, dfk, dv, window, (t, tv, bf), common)
    return dfq, dfk.to(branch.fk.dtype), dv


def _key_side(
    p: Softmax,
    branch: Branch,
    states: States,
    after: bool,
    upstream: Tensor,
    gain: Tensor,
    delta: Tensor,
    dfk: Tensor,
    dv: Tensor,
    window: Tensor | None,
    chosen: tuple[Tile, Tile, int],
    common: dict[str, object],
) -> None:
    """dφ(k) and dv from what the rows after the keys (or `after` them in the other direction) have summed up."""
    s, (branches, width), chunk = sizes_of(p), branch.fk.shape[1::2], states.chunk
    t, tv, bf = chosen

    def tiles(own: int) -> int:
        """Of the keys; those of windows begin where windows end, not at 0."""
        if window is None:
            return int(triton.cdiv(s.keys, own))
        return int(triton.cdiv(s.keys, chunk) + 1) * (chunk // own)

    shared = (window, branch.groups, *cumulative(p), s.rows, s.keys, chunk, states.count, branches, s.groups)
    if not p.k.numel():
        return
    own = min(t.own, divisor(chunk, 1024))
    key_features_kernel[tiles(own) * triton.cdiv(width, bf), s.groups, s.count](
        p.v, branch.fq, branch.fk, upstream, gain, delta, states.kv, states.z, dfk, *shared, p.q.shape[2],
        *strides(p.v), *strides(branch.fq), *strides(branch.fk), *strides(upstream), *strides(dfk), AFTER=after, BN=own,
        BM=t.walk, BF=bf, num_warps=t.warps, num_stages=t.stages, **common,
    )  # fmt: skip
    own = min(tv.own, divisor(chunk, 1024))
    key_values_kernel[tiles(own), s.groups, s.count](
        branch.fq, branch.fk, upstream, gain, states.kv, dv, *shared, p.q.shape[2], p.k.shape[2],
        *strides(branch.fq), *strides(branch.fk), *strides(upstream), AFTER=after, BN=own, BM=tv.walk,
        BF=min(bf, 32), num_warps=tv.warps, num_stages=tv.stages, **common,
    )  # fmt: skip
