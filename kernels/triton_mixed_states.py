"""What the linear branch of mixed attention sums up before its main kernels: one state per query block and KV head.

A state is Σ φ(k) vᵀ (F × D) and Σ φ(k) (F) over the keys that all rows of a block leave to the branch. The keys, or for
gradients the rows, are summed in pieces in parallel (`sums_kernel`). Where windows decide, the pieces lie between the
places where successive row blocks' windows begin, and a running sum gives the states (`scan_kernel`): the pairs that
are left are exactly a triangle, and nothing is subtracted. Where lists decide, the states are the product of the
0/1 matrix of blocks not listed with the sums of the blocks (`gather_kernel`), which is far cheaper than going over the
listed blocks with the features once more, subtracts nothing either, and gives zero for a list of everything.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .problem import Blocks, Branch, Ranges, Softmax
from .triton_common import architecture
from .triton_mixed_host import branch_type, cumulative, limits, lists_of, sizes_of, strides
from .triton_mixed_tiles import sequence, window_of

WHOLE, LEFT, RIGHT = 0, 1, 2  # pieces: plain blocks, what windows leave on the left, on the right
IS_LEFT, IS_RIGHT = tl.constexpr(LEFT), tl.constexpr(RIGHT)
ROOM = 2**30  # numbers of states from which chunks grow to 256 rows


@triton.jit
def piece(index, chunk, w, rows, keys, tokens, PIECES: tl.constexpr):
    """First token and end of piece `index`, which state `index` is the first (RIGHT: the last) to hold."""
    if PIECES == IS_LEFT:
        s = keys - rows - w + 1  # keys left of the window of row 0
        most = tl.maximum(keys - w, 0)
        begin = tl.where(index == 0, 0, tl.minimum(tl.maximum((index - 1) * chunk + s, 0), most))
        end = tl.minimum(tl.maximum(index * chunk + s, 0), most)
    elif PIECES == IS_RIGHT:
        e = keys - rows + tl.maximum(w, 1)  # the first key right of the window of row 0
        begin = tl.minimum(tl.maximum((index + 1) * chunk + e, 0), keys)
        end = tl.minimum(tl.maximum((index + 2) * chunk + e, 0), keys)
    else:
        begin = index * chunk
        end = tl.minimum(begin + chunk, tokens)
    return begin, end


@triton.jit(do_not_specialize=["chunk", "chunks", "rows", "keys", "branches", "groups", "gain_n"])
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


@triton.jit(do_not_specialize=["chunks", "branches"])
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


@triton.jit(do_not_specialize=["rows", "keys", "blocks", "out_blocks", "branches", "groups", "list_b", "list_g"])
def gather_kernel(
    left, sums, out, group_map, cu_q, cu_k, rows, keys, blocks, out_blocks, branches, groups, list_b, list_g,
    left_to, left_from, WIDTH: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, CAUSAL: tl.constexpr,
    BACK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, TYPE: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out[m] = Σ_n left[m, n] · sums[n], m being query blocks and n key blocks, or where BACK the other way round.

    SPLIT multiplies fp32 sums as two bf16 parts; the 0 and 1 of `left` are exact in any type.
    """
    g = tl.program_id(2) % groups
    n = tl.program_id(2) // groups
    t = tl.load(group_map + g)
    if t >= 0:
        _, rows = sequence(cu_q, n, rows)
        _, keys = sequence(cu_k, n, keys)
        shift = keys - rows
        m0 = tl.program_id(0) * BM
        m = m0 + tl.arange(0, BM)
        e = tl.program_id(1) * BW + tl.arange(0, BW)
        base = (n * branches + t).to(tl.int64)
        row = left + (n * list_b + g * list_g).to(tl.int64)
        begin = m0 * 0
        end = blocks
        if CAUSAL:  # key block x counts for query block y if (x + 1) · BK ≤ y · BQ + shift
            if BACK:
                begin = tl.maximum(((m0 + 1) * BK - shift) // BQ, 0) // BN * BN
            else:
                end = tl.minimum(blocks, tl.maximum((m0 + BM - 1) * BQ + shift, 0) // BK)
        acc = tl.zeros((BM, BW), tl.float32)
        for c in range(begin, end, BN):
            source = c + tl.arange(0, BN)
            live = (m < out_blocks)[:, None] & (source < blocks)[None, :]
            free = tl.load(row + m[:, None] * left_to + source[None, :] * left_from, mask=live, other=0)
            if CAUSAL:
                if BACK:
                    past = ((m + 1) * BK)[:, None] <= (source * BQ + shift)[None, :]
                else:
                    past = ((source + 1) * BK)[None, :] <= (m * BQ + shift)[:, None]
                free = tl.where(past, free, 0)
            place = (base * blocks + source)[:, None] * WIDTH + e[None, :]
            x = tl.load(sums + place, mask=(source < blocks)[:, None] & (e < WIDTH)[None, :], other=0.0)
            high = x.to(TYPE)
            acc = tl.dot(free.to(TYPE), high, acc, input_precision=PRECISION)
            if SPLIT:
                acc = tl.dot(free.to(TYPE), (x - high.to(tl.float32)).to(TYPE), acc, input_precision=PRECISION)
        place = (base * out_blocks + m)[:, None] * WIDTH + e[None, :]
        tl.store(out + place, acc.to(out.dtype.element_ty), mask=(m < out_blocks)[:, None] & (e < WIDTH)[None, :])


# --------------------------------------------------------------------------------------------------------- on the host


@dataclass(frozen=True)
class States:
    """Σ φ vᵀ: kv (sequences · Ht, count, F, D), Σ φ: z (sequences · Ht, count, F) fp32; one per `chunk` tokens."""

    kv: Tensor
    z: Tensor
    chunk: int

    @property
    def count(self) -> int:
        return self.kv.shape[1]


@dataclass(frozen=True)
class SumTiles:
    """Tokens, features and values of a tile, warps and stages."""

    tokens: int
    features: int
    values: int
    warps: int
    stages: int


def sum_tiles(arch: str, half: bool, pad: int) -> SumTiles:
    """For `sums_kernel`; `half` is bf16 multiplication, otherwise fp32."""
    if half:
        if pad <= 64:  # larger ones do not compile for all of the chips
            return SumTiles(64, 64, 64, 4, 1 if arch == "gfx942" else 2)
        return SumTiles(32, 128, 128, 8, 1) if arch == "gfx942" else SumTiles(64, 128, 128, 8, 2)
    return SumTiles(16, 64, 64, 8, 1)


def gather_tiles(arch: str, half: bool, split: bool) -> SumTiles:
    """For `gather_kernel`: `tokens` are source blocks, `features` target blocks, `values` columns."""
    if half:
        stages = 1 if arch == "gfx942" else 2
        return SumTiles(32, 64, 64, 8, stages) if split else SumTiles(64, 64, 128, 4, stages)
    return SumTiles(16, 32, 64, 4, 1)


def chunk_of(p: Softmax, branch: Branch) -> int:
    """Rows between two states: 128, and 256 where the states would take much memory."""
    s = sizes_of(p)
    numbers = s.count * branch.fk.shape[1] * (s.rows // 128) * branch.fk.shape[3] * s.dim
    return 256 if numbers > ROOM else 128


def tile_sums(
    p: Softmax,
    branch: Branch,
    arch: str,
    pieces: int,
    chunk: int,
    count: int,
    dtype: torch.dtype,
    rows: tuple[Tensor, Tensor, Tensor] | None = None,
) -> States:
    """Sums of `count` pieces over the keys, or over `rows`: values (B, H or Ht · G, Q, D), gain and shift of each."""
    s, (branches, width) = sizes_of(p), branch.fk.shape[1::2]
    kind, precision = branch_type(branch.fq, branch.fk, p.v)
    t = sum_tiles(arch, kind == tl.bfloat16, s.dim)
    bf, bd = min(t.features, triton.next_power_of_2(max(width, 16))), min(t.values, triton.next_power_of_2(s.dim))
    bd = max(bd, 16)
    kv = torch.empty(s.count * branches, count, width, s.dim, dtype=dtype, device=p.q.device)
    z = torch.empty(s.count * branches, count, width, dtype=torch.float32, device=p.q.device)
    features, values = (branch.fk, p.v) if rows is None else (branch.fq, rows[0])
    cu_q, cu_k = cumulative(p)
    grid = (count * triton.cdiv(width, bf) * triton.cdiv(s.dim, bd), s.groups, s.count)
    sums_kernel[grid](
        features, values, None if rows is None else rows[1], None if rows is None else rows[2], branch.groups,
        p.where.window if isinstance(p.where, Ranges) else None, cu_q, cu_k, kv, z, *strides(features),
        *strides(values), p.q.shape[2], chunk, count, s.rows, s.keys, branches, s.groups, DIM=s.dim, FEATURES=width,
        GROUP=1 if rows is None else s.per, PIECES=pieces, ROWS=rows is not None,
        BRANCH_VALUES=rows is not None and not branch.shared, BT=t.tokens, BF=bf, BD=bd, TYPE=kind,
        PRECISION=precision, num_warps=t.warps, num_stages=t.stages, **limits(arch),
    )  # fmt: skip
    return States(kv, z, chunk)


BLOCK, STEP = 256, 8  # columns and pieces that a program of `scan_kernel` takes at once


def scanned(
    x: States,
    branches: int,
    dtype: torch.dtype,
    reverse: bool,
    state: Tensor | None = None,
    final: Tensor | None = None,
    keep: bool = False,
) -> States:
    """Inclusive running sums along the pieces, in place where the dtype allows and the sums need not be kept."""
    lanes, count, width, dim = x.kv.shape
    kv = x.kv if dtype == x.kv.dtype and not keep else torch.empty_like(x.kv, dtype=dtype)
    z = torch.empty_like(x.z) if keep else x.z
    grid = (triton.cdiv(width * dim, BLOCK) + triton.cdiv(width, BLOCK), lanes)
    if state is not None and state.stride(-1) != 1:
        state = state.contiguous()
    scan_kernel[grid](
        x.kv, x.z, kv, z, state, final, *strides(state), count, branches, DIM=dim, FEATURES=width, REVERSE=reverse,
        BLOCK=BLOCK, STEP=STEP, num_warps=4, **limits(architecture()),
    )  # fmt: skip
    return States(kv, z, x.chunk)


def unlisted(p: Softmax) -> Tensor:
    """(lists, NQ, NK) uint8: 1 where a list does not name a block; NK is rounded up for aligned loads."""
    assert isinstance(p.where, Blocks)
    s, given = sizes_of(p), lists_of(p.where)
    assert given.starts is not None
    b, h, blocks = given.starts.shape
    width = triton.cdiv(triton.cdiv(s.keys, given.block[1]), 16) * 16
    left = torch.ones(b * h, blocks, max(width, 16), dtype=torch.uint8, device=p.q.device)
    grid = (blocks, b * h)
    if blocks and given.columns is not None and given.columns.numel():
        unlist_kernel[grid](
            given.starts, given.counts, given.columns, left, blocks, left.shape[2], BLOCK=128, num_warps=4,
            **limits(architecture()),
        )  # fmt: skip
    return left


def gathered(p: Softmax, branch: Branch, arch: str, x: States, left: Tensor, dtype: torch.dtype, back: bool) -> States:
    """Sums of key blocks → states of query blocks that do not list them, or where `back` the other way round."""
    assert isinstance(p.where, Blocks)
    s, (bq, bk) = sizes_of(p), p.where.block
    kind, precision = branch_type(branch.fq, branch.fk, p.v)
    width, count = branch.fk.shape[3], triton.cdiv(s.keys, bk) if back else left.shape[1]
    lanes = x.kv.shape[0]
    kv = torch.empty(lanes, count, width, s.dim, dtype=dtype, device=x.kv.device)
    z = torch.empty(lanes, count, width, dtype=torch.float32, device=x.kv.device)
    cu_q, cu_k = cumulative(p)
    lists_b, lists_h = p.where.starts.shape[:2]
    block = left.shape[1] * left.shape[2]
    list_b, list_g = block * lists_h if lists_b > 1 else 0, block if lists_h > 1 else 0
    to, source = (1, left.shape[2]) if back else (left.shape[2], 1)
    for given, out in ((x.kv, kv), (x.z, z)):
        half = kind == tl.bfloat16
        split = half and given.dtype == torch.float32
        t, columns = gather_tiles(arch, half, split), out[0, 0].numel()
        grid = (triton.cdiv(count, t.features), triton.cdiv(columns, t.values), s.count * s.groups)
        gather_kernel[grid](
            left, given, out, branch.groups, cu_q, cu_k, s.rows, s.keys, x.count, count, branch.fk.shape[1], s.groups,
            list_b, list_g, to, source, WIDTH=columns, BQ=bq, BK=bk, CAUSAL=p.causal, BACK=back, BM=t.features,
            BN=t.tokens, BW=t.values, TYPE=kind, SPLIT=split,
            PRECISION=precision if given is x.kv else "ieee", num_warps=t.warps, num_stages=t.stages, **limits(arch),
        )  # fmt: skip
    return States(kv, z, bk if back else bq)


def key_states(
    p: Softmax, branch: Branch, arch: str, dtype: torch.dtype, chunk: int | None = None, left: Tensor | None = None
) -> tuple[list[States], Tensor | None]:
    """What each row block reads: states in `dtype`, one list entry per side, and the state after the last key.

    Windows give one state per `chunk` rows (two sides where not causal), lists one per query block.
    """
    s, (branches, width) = sizes_of(p), branch.fk.shape[1::2]
    if isinstance(p.where, Blocks):
        blocks = max(1, triton.cdiv(s.keys, p.where.block[1]))
        sums = tile_sums(p, branch, arch, WHOLE, p.where.block[1], blocks, dtype)
        return [gathered(p, branch, arch, sums, unlisted(p) if left is None else left, dtype, False)], None
    chunk = chunk_of(p, branch) if chunk is None else chunk
    count = triton.cdiv(s.rows, chunk)
    final = None
    if p.causal and p.varlen is None:
        final = torch.empty(s.count, branches, width, s.dim + 1, dtype=torch.float32, device=p.q.device)
    before = tile_sums(p, branch, arch, LEFT, chunk, count + 1, torch.float32)
    sides = [scanned(before, branches, dtype, False, branch.state, final)]
    if not p.causal:
        sides.append(
            scanned(tile_sums(p, branch, arch, RIGHT, chunk, max(count, 1), torch.float32), branches, dtype, True)
        )
    return sides, final
