"""What the linear branch of mixed attention sums up before its main kernels: one state per query block and KV head.

A state is Σ φ(k) vᵀ (F × D) and Σ φ(k) (F) over the keys that all rows of a block leave to the branch. The keys, or for
gradients the rows, are summed in pieces in parallel (`sums_kernel`). Where windows decide, the pieces lie between the
places where successive row blocks' windows begin, and a running sum gives the states (`scan_kernel`): the pairs that
are left are exactly a triangle, and nothing is subtracted. Where lists decide, the states are the product of the
0/1 matrix of blocks not listed with the sums of the blocks (`gather_kernel`), which is far cheaper than going over the
listed blocks with the features once more, subtracts nothing either, and gives zero for a list of everything.
"""
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .problem import Blocks, Branch, Ranges, Softmax
from .triton_mixed_parts import branch_type, cumulative, lists_of, sequence, sizes_of, strides, tile, window_of

BLOCKS, BEFORE, AFTER = 0, 1, 2  # pieces: plain blocks, what windows leave on the left, on the right
IS_BEFORE, IS_AFTER = tl.constexpr(BEFORE), tl.constexpr(AFTER)
ROOM = 2**30  # numbers of states from which chunks grow to 256 rows


@triton.jit
def piece(index, chunk, w, rows, keys, tokens, PIECES: tl.constexpr):
    """First token and end of piece `index`, which state `index` is the first (AFTER: the last) to hold."""
    if PIECES == IS_BEFORE:
        s = keys - rows - w + 1  # keys left of the window of row 0
        most = tl.maximum(keys - w, 0)
        begin = tl.where(index == 0, 0, tl.minimum(tl.maximum((index - 1) * chunk + s, 0), most))
        end = tl.minimum(tl.maximum(index * chunk + s, 0), most)
    elif PIECES == IS_AFTER:
        e = keys - rows + tl.maximum(w, 1)  # the first key right of the window of row 0
        begin = tl.minimum(tl.maximum((index + 1) * chunk + e, 0), keys)
        end = tl.minimum(tl.maximum((index + 2) * chunk + e, 0), keys)
    else:
        begin = index * chunk
        end = tl.minimum(begin + chunk, tokens)
    return begin, end


@triton.jit(do_not_specialize=["chunk", "chunks", "rows", "keys", "branches", "groups"])
def sums_kernel(
    features, values, gain, shift, group_map, window, cu_q, cu_k, out, out_z,
    f_b, f_h, f_n, v_b, v_h, v_n, gain_n, chunk, chunks, rows, keys, branches, groups,
    DIM: tl.constexpr, FEATURES: tl.constexpr, GROUP: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr,
    BRANCH_VALUES: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr, TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over one piece of the keys; ROWS: of the rows of a group's heads, values times `gain`, ones are `shift`."""
    parts_d: tl.constexpr = (DIM + BD - 1) // BD
    parts_f: tl.constexpr = (FEATURES + BF - 1) // BF
    part = tl.program_id(0) % (parts_d * parts_f)
    index = tl.program_id(0) // (parts_d * parts_f)
    g = tl.program_id(1)
    n = tl.program_id(2)
    t = tl.load(group_map + g)
    if t >= 0:
        first_q, rows = sequence(cu_q, n, rows)
        first_k, keys = sequence(cu_k, n, keys)
        b = n if cu_q is None else n * 0
        w = g * 0
        if PIECES != 0:
            w = window_of(window, g)
        begin, end = piece(index, chunk, w, rows, keys, rows if ROWS else keys, PIECES)
        first = first_q if ROWS else first_k
        f = part // parts_d * BF + tl.arange(0, BF)
        d = part % parts_d * BD + tl.arange(0, BD)
        token = tl.arange(0, BT)
        acc = tl.zeros((BF, BD), tl.float32)
        z = tl.zeros((BF,), tl.float32)
        for x in range(GROUP):
            head = t * GROUP + x
            f_base = features + b * f_b.to(tl.int64) + head * f_h.to(tl.int64) + first * f_n
            v_head = head if BRANCH_VALUES else g * GROUP + x
            v_base = values + b * v_b.to(tl.int64) + v_head * v_h.to(tl.int64) + first * v_n
            for at in range(begin, end, BT):
                live = at + token < end
                fp = f_base + at * f_n.to(tl.int64) + (token[:, None] * f_n + f[None, :])
                feature = tl.load(fp, mask=live[:, None] & (f < FEATURES)[None, :], other=0.0)
                vp = v_base + at * v_n.to(tl.int64) + (token[:, None] * v_n + d[None, :])
                value = tl.load(vp, mask=live[:, None] & (d < DIM)[None, :], other=0.0)
                if ROWS:
                    place = (b * branches * GROUP + head).to(tl.int64) * gain_n + first + at
                    scale = tl.load(gain + place + token, mask=live, other=0.0)
                    one = tl.load(shift + place + token, mask=live, other=0.0)
                    z += tl.sum(feature.to(tl.float32) * one[:, None], 0)
                    value = value.to(tl.float32) * scale[:, None]
                else:
                    z += tl.sum(feature.to(tl.float32), 0)
                    alive = tl.max(feature.to(tl.float32), 1) > 0  # a padding key may hold anything
                    value = tl.where(alive[:, None], value, 0.0)
                acc = tl.dot(tl.trans(feature.to(TYPE)), value.to(TYPE), acc, input_precision=PRECISION)
        base = (n * branches + t).to(tl.int64) * chunks + index
        live_f = f < FEATURES
        place = base * (FEATURES * DIM) + (f[:, None] * DIM + d[None, :])
        tl.store(out + place, acc.to(out.dtype.element_ty), mask=live_f[:, None] & (d < DIM)[None, :])
        if part % parts_d == 0:
            tl.store(out_z + base * FEATURES + f, z, mask=live_f)


@triton.jit
def running(
    sums, out, carry, final, base, chunks, e, to, WIDTH: tl.constexpr, REVERSE: tl.constexpr, STEP: tl.constexpr
):
    """Inclusive running sums of the columns `e` of (chunks, WIDTH), STEP chunks at once."""
    live = e < WIDTH
    for c in range(0, chunks, STEP):
        step = c + tl.arange(0, STEP)
        at = (chunks - 1 - step) if REVERSE else step
        ok = (step < chunks)[:, None] & live[None, :]
        place = (base * chunks + at)[:, None] * WIDTH + e[None, :]
        x = tl.load(sums + place, mask=ok, other=0.0)
        total = carry[None, :] + tl.cumsum(x, 0)
        tl.store(out + place, total.to(out.dtype.element_ty), mask=ok)
        carry += tl.sum(x, 0)
    if final is not None:
        tl.store(final + to, carry, mask=live)


@triton.jit(do_not_specialize=["chunks"])
def scan_kernel(
    sums, sums_z, out, out_z, state, final, s_b, s_h, s_f, chunks, branches,
    DIM: tl.constexpr, FEATURES: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Sums of pieces → states. `state` comes before the first; `final` (…, F, D + 1) is what the last one is."""
    wide: tl.constexpr = FEATURES * DIM
    parts: tl.constexpr = (wide + BLOCK - 1) // BLOCK
    part = tl.program_id(0)
    base = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    carry = tl.zeros((BLOCK,), tl.float32)
    given = base * 0
    if state is not None:
        given = base // branches * s_b + base % branches * s_h
    if part < parts:
        e = part * BLOCK + column
        f = e // DIM
        d = e % DIM
        if state is not None:
            carry = tl.load(state + given + f * s_f + d, mask=e < wide, other=0.0).to(tl.float32)
        to = base * (FEATURES * (DIM + 1)) + f * (DIM + 1) + d
        running(sums, out, carry, final, base, chunks, e, to, wide, REVERSE, STEP)
    else:
        e = (part - parts) * BLOCK + column
        if state is not None:
            carry = tl.load(state + given + e * s_f + DIM, mask=e < FEATURES, other=0.0).to(tl.float32)
        to = base * (FEATURES * (DIM + 1)) + e * (DIM + 1) + DIM
        running(sums_z, out_z, carry, final, base, chunks, e, to, FEATURES, REVERSE, STEP)


@triton.jit(do_not_specialize=["blocks", "width"])
def unlist_kernel(starts, counts, columns, left, blocks, width, BLOCK: tl.constexpr):
    """Strikes the listed blocks out of `left` (lists, blocks, width), which is 1 everywhere."""
    row = tl.program_id(1) * blocks + tl.program_id(0)
    begin = tl.load(starts + row)
    count = tl.load(counts + row)
    for c in range(0, count, BLOCK):
        entry = c + tl.arange(0, BLOCK)
        live = entry < count
        column = tl.load(columns + begin + entry, mask=live, other=0)
        live = live & (column < width)
        tl.store(left + row.to(tl.int64) * width + column, tl.zeros((BLOCK,), tl.uint8), mask=live)


@triton.jit(do_not_specialize=["blocks", "length", "out_blocks", "shift", "list_b", "list_g", "left_to", "left_from"])
def gather_kernel(
    left, sums, out, group_map, cu_q, cu_k, rows, keys, blocks, out_blocks, branches, list_b, list_g, left_to, left_from,
    WIDTH: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, CAUSAL: tl.constexpr, BACK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, TYPE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """out[m] = Σ_n left[m, n] · sums[n], m being query blocks and n key blocks, or where BACK the other way round.

    SPLIT multiplies fp32 sums as two bf16 parts; 0 and 1 are exact in any type.
    """
    m0 = tl.program_id(0) * BM
    e = tl.program_id(1) * BW + tl.arange(0, BW)
    lane = tl.program_id(2)
    groups = tl.num_programs(2) // 1
    g = lane
    n = lane
    tl.static_assert(WIDTH > 0)
    _ = groups
    g = lane % branches
    n = lane // branches
    t = g
    group = tl.load(group_map + t)
    _, rows = sequence(cu_q, n, rows)
    _, keys = sequence(cu_k, n, keys)
    shift = keys - rows
    m = m0 + tl.arange(0, BM)
    base = (n * branches + t).to(tl.int64)
    row = left + (n * list_b + group * list_g).to(tl.int64)
    acc = tl.zeros((BM, BW), tl.float32)
    for c in range(0, blocks, BN):
        source = c + tl.arange(0, BN)
        live = (m < out_blocks)[:, None] & (source < blocks)[None, :]
        free = tl.load(row + m[:, None] * left_to + source[None, :] * left_from, mask=live, other=0)
        if CAUSAL:
            if BACK:
                free = tl.where((m + 1)[:, None] * BK <= source[None, :] * BQ + shift, free, 0)
            else:
                free = tl.where((source + 1)[None, :] * BK <= m[:, None] * BQ + shift, free, 0)
        place = (base * blocks + source)[:, None] * WIDTH + e[None, :]
        x = tl.load(sums + place, mask=(source < blocks)[:, None] & (e < WIDTH)[None, :], other=0.0)
        high = x.to(TYPE)
        acc = tl.dot(free.to(TYPE), high, acc, input_precision="ieee")
        if SPLIT:
            acc = tl.dot(free.to(TYPE), (x - high.to(tl.float32)).to(TYPE), acc, input_precision="ieee")
    place = (base * out_blocks + m)[:, None] * WIDTH + e[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=(m < out_blocks)[:, None] & (e < WIDTH)[None, :])
