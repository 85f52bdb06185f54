"""One decode step in Triton: a query per sequence over any mixture of caches and linear states, in one launch.

A program takes a (sequence, KV group, slice of the cache); the query heads of the group share each key that it reads. A
table with one line of pointers and strides per KV group says where the cache of that group lies, so parts of any kind
stand in the same launch. The table is kept on the device as long as caches stay where they are; only the numbers of
used slots are passed anew. Where caches are long the slices are merged by a second, tiny launch.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as functional
import triton
import triton.language as tl
from torch import Tensor

from .problem import EPS, Decode, Part
from .triton_common import Variant, architecture, widest
from .triton_linear_host import describe

NORMAL = tl.constexpr(EPS)
FIELDS = tl.constexpr(20)
PARTS = 8  # kinds of caches in one launch
TABLES = 256  # tables that are kept


@triton.jit
def _used(part, u0, u1, u2, u3, u4, u5, u6, u7):
    low = tl.where(part == 0, u0, tl.where(part == 1, u1, tl.where(part == 2, u2, u3)))
    high = tl.where(part == 4, u4, tl.where(part == 5, u5, tl.where(part == 6, u6, u7)))
    return tl.where(part < 4, low, high)


@triton.jit(do_not_specialize=["u0", "u1", "u2", "u3", "u4", "u5", "u6", "u7"])
def _step(
    q, fq, table, sink, out, sums, lse, q_b, q_h, fq_b, fq_h, scale, cap, heads, D, slice_size, u0, u1, u2, u3, u4,
    u5, u6, u7, GROUP: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr,
    SINK: tl.constexpr, SPLIT: tl.constexpr, LINEAR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The outputs, or with SPLIT those of a slice beside their sums and shifts, which `_merge` puts together."""
    g = tl.program_id(0) % heads
    b = (tl.program_id(0) // heads).to(tl.int64)
    piece = tl.program_id(1)
    line = table + g * FIELDS
    T: tl.constexpr = q.dtype.element_ty
    used = _used(tl.load(line + 16).to(tl.int32), u0, u1, u2, u3, u4, u5, u6, u7)
    begin = piece * slice_size
    end = tl.minimum(begin + slice_size, used)
    k = tl.load(line).to(tl.pointer_type(T)) + b * tl.load(line + 1)
    k_r = tl.load(line + 2)
    v = tl.load(line + 3).to(tl.pointer_type(T)) + b * tl.load(line + 4)
    v_r = tl.load(line + 5)
    mask_at = tl.load(line + 6)
    mask = mask_at.to(tl.pointer_type(tl.int8)) + b * tl.load(line + 7)
    mask_r = tl.load(line + 8)
    masked = mask_at != 0
    row = tl.arange(0, ROWS)
    d = tl.arange(0, BD)
    live = (row < GROUP)[:, None] & (d < D)[None, :]
    h = g * GROUP + row
    qt = tl.load(q + b * q_b + h[:, None].to(tl.int64) * q_h + d[None, :], mask=live, other=0.0)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BD), tl.float32)
    for c in range(begin, end, BN):
        slot = c + tl.arange(0, BN)
        there = slot < end
        there = there & (tl.load(mask + slot.to(tl.int64) * mask_r, mask=there & masked, other=1) != 0)
        at = slot[:, None].to(tl.int64)
        fine = there[:, None] & (d < D)[None, :]
        kt = tl.load(k + at * k_r + d[None, :], mask=fine, other=0.0)
        vt = tl.load(v + at * v_r + d[None, :], mask=fine, other=0.0)
        s = tl.dot(qt, tl.trans(kt), input_precision=PRECISION) * scale
        if cap > 0:
            s = cap * (2 * tl.sigmoid(2 * s / cap) - 1)
        s = tl.where(there[None, :], s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp(s - shift[:, None])
        keep = tl.exp(top - shift)
        total = total * keep + tl.sum(p, 1)
        acc = tl.dot(p.to(T), vt, acc * keep[:, None], input_precision=PRECISION)
        top = new
    plain = False
    if LINEAR:
        state_at = tl.load(line + 12)
        if (state_at != 0) & (piece == 0):
            F = tl.load(line + 11).to(tl.int32)
            fq_base = fq + b * fq_b + tl.load(line + 9) * fq_h
            state = state_at.to(tl.pointer_type(tl.float32)) + b * tl.load(line + 13)
            s_f = tl.load(line + 14)
            s_d = tl.load(line + 15)
            tail = tl.zeros((ROWS, BD), tl.float32)
            z = tl.zeros((ROWS,), tl.float32)
            for c in range(0, F, BF):
                f = c + tl.arange(0, BF)
                fine = (row < GROUP)[:, None] & (f < F)[None, :]
                ft = tl.load(fq_base + row[:, None] * fq_h + f[None, :], mask=fine, other=0.0).to(tl.float32)
                place = state + f[:, None] * s_f
                st = tl.load(place + d[None, :] * s_d, mask=(f < F)[:, None] & (d < D)[None, :], other=0.0)
                zt = tl.load(state + f * s_f + D * s_d, mask=f < F, other=0.0)
                tail = tl.dot(ft, st, tail, input_precision="ieee")
                z += tl.sum(ft * zt[None, :], 1)
            weight_at = tl.load(line + 17)
            plain = weight_at == 0
            weight = weight_at.to(tl.pointer_type(tl.float32))
            # linear attention alone is o = tail / (z + EPS): the weight is 1 and nothing else is in the sums
            w = tl.load(weight + row, mask=(row < GROUP) & (weight_at != 0), other=0.0)
            new = tl.where(plain, 0.0, tl.maximum(top, w))
            keep = tl.exp(tl.where(plain, float("-inf"), top) - new)
            grow = tl.exp(w - new)
            total = total * keep + grow * z + tl.where(plain, NORMAL, 0.0)
            acc = acc * keep[:, None] + grow[:, None] * tail
            top = new
    if SINK:  # noqa: SIM102 – known when it is compiled
        if (piece == 0) & (not plain):
            w = tl.load(sink + h, mask=row < GROUP, other=float("-inf"))
            new = tl.maximum(top, w)
            shift = tl.where(new == float("-inf"), 0.0, new)
            keep = tl.exp(top - shift)
            total = total * keep + tl.exp(w - shift)
            acc = acc * keep[:, None]
            top = new
    place = (b * heads * GROUP + h) * tl.num_programs(1) + piece
    if SPLIT:
        tl.store(out + place[:, None] * D + d[None, :], acc, mask=live)
        tl.store(sums + 2 * place, top, mask=row < GROUP)
        tl.store(sums + 2 * place + 1, total, mask=row < GROUP)
    else:
        tl.store(lse + place, top + tl.log(tl.where(total == 0.0, 1.0, total)), mask=row < GROUP)
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out + place[:, None] * D + d[None, :], acc.to(T), mask=live)


@triton.jit
def _merge(partial, sums, out, lse, pieces, D, BD: tl.constexpr, BP: tl.constexpr):
    """The outputs of a row from those of its slices."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    top = float("-inf")
    total = 0.0
    acc = tl.zeros((BD,), tl.float32)
    for c in range(0, pieces, BP):
        piece = c + tl.arange(0, BP)
        here = piece < pieces
        at = row * pieces + piece
        m = tl.load(sums + 2 * at, mask=here, other=float("-inf"))
        n = tl.load(sums + 2 * at + 1, mask=here, other=0.0)
        x = tl.load(partial + at[:, None] * D + d[None, :], mask=here[:, None] & (d < D)[None, :], other=0.0)
        new = tl.maximum(top, tl.max(m, 0))
        shift = tl.where(new == float("-inf"), 0.0, new)
        keep = tl.exp(top - shift)
        w = tl.exp(m - shift)
        total = total * keep + tl.sum(w * n, 0)
        acc = acc * keep + tl.sum(x * w[:, None], 0)
        top = new
    tl.store(lse + row, top + tl.log(tl.where(total == 0.0, 1.0, total)))
    acc = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * D + d, acc.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def _receive(
    q, k, mask, late, lse, out, q_b, q_h, k_b, k_h, k_c, m_b, m_c, l_b, l_c, scale, cap, first, heads, all_heads, slots,
    used, D, tiles, GROUP: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What BN slots of one group received from its query heads, given the sums of `_step`."""
    slot = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    g = tl.program_id(0) // tiles % heads
    b = (tl.program_id(0) // (tiles * heads)).to(tl.int64)
    row = tl.arange(0, ROWS)
    d = tl.arange(0, BD)
    h = (first + g) * GROUP + row
    there = slot < used
    there = there & (tl.load(late + b * l_b + slot * l_c, mask=there, other=0) != 0)
    if MASK:
        there = there & (tl.load(mask + b * m_b + slot * m_c, mask=there, other=0) != 0)
    live = (row < GROUP)[:, None] & (d < D)[None, :]
    qt = tl.load(q + b * q_b + h[:, None].to(tl.int64) * q_h + d[None, :], mask=live, other=0.0)
    at = k + b * k_b + g.to(tl.int64) * k_h + slot[:, None].to(tl.int64) * k_c + d[None, :]
    kt = tl.load(at, mask=there[:, None] & (d < D)[None, :], other=0.0)
    s = tl.dot(qt, tl.trans(kt), input_precision=PRECISION) * scale
    if cap > 0:
        s = cap * (2 * tl.sigmoid(2 * s / cap) - 1)
    total = tl.load(lse + b * all_heads + h, mask=row < GROUP, other=0.0)
    p = tl.where((row < GROUP)[:, None] & there[None, :], tl.exp(s - total[:, None]), 0.0)
    tl.store(out + (b * heads + g) * slots + slot, tl.sum(p, 0), mask=slot < slots)


_tables: dict[tuple[Any, ...], Tensor] = {}


def _table(lines: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """The table on the device; the same content is uploaded once."""
    key = (device, lines)
    if key not in _tables:
        if len(_tables) >= TABLES:
            _tables.pop(next(iter(_tables)))
        _tables[key] = torch.tensor(lines, dtype=torch.int64).to(device)
    return _tables[key]


def _lines(part: Part, number: int, group: int, head: int) -> Iterator[tuple[int, ...]]:
    """One line per KV group of a part, as `_step` reads it; `head` is where its features begin among all."""
    size = part.k.element_size()
    for x in range(part.k.shape[1]):
        line = [part.k.data_ptr() + x * part.k.stride(1) * size, part.k.stride(0), part.k.stride(2)]
        line += [part.v.data_ptr() + x * part.v.stride(1) * size, part.v.stride(0), part.v.stride(2)]
        line += [0, 0, 0] if part.mask is None else [part.mask.data_ptr(), part.mask.stride(0), part.mask.stride(1)]
        if part.fq is None or part.state is None:
            line += [0] * 7
        else:
            state = part.state
            line += [head + x * group, 0, part.fq.shape[2], state.data_ptr() + 4 * x * state.stride(1)]
            line += [state.stride(0), state.stride(2), state.stride(3)]
        line += [number, 0 if part.weight is None else part.weight.data_ptr() + 4 * x * group, 0, 0]
        yield tuple(line)


def _features(parts: list[Tensor]) -> Tensor | None:
    """(B, heads with a linear branch, F): they change with every step, so they are an argument and not in the table."""
    if len(parts) <= 1:
        return parts[0] if parts else None
    most = max(x.shape[2] for x in parts)
    return torch.cat([functional.pad(x, (0, most - x.shape[2])) for x in parts], 1)


def tiles(arch: str, dim: int, wide: bool) -> tuple[int, int, int]:
    """Keys of a tile, features of a tile and warps."""
    warps = 8 if dim > 64 else 4
    if wide:
        return 16, 16, warps
    return 32 if dim > 64 or arch.startswith("gfx") else 64, 16, warps


def slice_size(longest: int) -> int:
    """Keys of one program: a matter of the cache alone, so that a result never depends on the batch."""
    return int(min(4096, max(512, triton.next_power_of_2(longest) // 64)))


def decode(p: Decode) -> tuple[Tensor, list[Tensor]]:
    """o (B, H, 1, D), and (B, hp, C) for each part with `late`."""
    batch, heads, _, dim = p.q.shape
    groups = sum(part.k.shape[1] for part in p.parts)
    group = heads // groups
    lines: list[tuple[int, ...]] = []
    branches: list[Tensor] = []
    for number, part in enumerate(p.parts):
        lines += _lines(part, number, group, sum(x.shape[1] for x in branches))
        branches += [] if part.fq is None else [part.fq]
    fq = _features(branches)
    given = p.q if fq is None else fq
    used = [part.used for part in p.parts] + [0] * (PARTS - len(p.parts))
    size = slice_size(max(used))
    pieces = max(1, triton.cdiv(max(used), size))
    out = torch.empty(batch, heads, 1, dim, dtype=p.q.dtype, device=p.q.device)
    if not out.numel():
        return out, [_received(p, part, group, out) for part in p.parts if part.late is not None]
    lse = torch.empty(batch, heads, dtype=torch.float32, device=p.q.device)
    wide = p.q.dtype == torch.float32
    bn, bf, warps = tiles(architecture(), dim, wide)
    partial, sums = out, out
    if pieces > 1:
        partial = torch.empty(batch, heads, pieces, dim, dtype=torch.float32, device=p.q.device)
        sums = torch.empty(batch, heads, pieces, 2, dtype=torch.float32, device=p.q.device)
    bd = max(32, triton.next_power_of_2(dim))
    _step[(batch * groups, pieces)](
        p.q, given, _table(tuple(lines), p.q.device), out if p.sink_logits is None else p.sink_logits, partial, sums,
        lse, p.q.stride(0), p.q.stride(1), given.stride(0), given.stride(1), p.scale, p.softcap, groups, dim, size,
        *used, GROUP=group, ROWS=max(16, triton.next_power_of_2(group)), BN=bn, BD=bd, BF=bf,
        SINK=p.sink_logits is not None, SPLIT=pieces > 1, LINEAR=fq is not None, PRECISION="ieee",
        num_warps=warps, num_stages=2,
    )  # fmt: skip
    if pieces > 1:
        _merge[(batch * heads,)](partial, sums, out, lse, pieces, dim, BD=bd, BP=16, num_warps=4)
    return out, [_received(p, part, group, lse) for part in p.parts if part.late is not None]


def _received(p: Decode, part: Part, group: int, lse: Tensor) -> Tensor:
    """A launch of its own: only now is it known what the probabilities sum to."""
    (batch, heads, slots, dim), late = part.k.shape, part.late
    assert late is not None
    out = torch.empty(batch, heads, slots, dtype=torch.float32, device=p.q.device)
    if not out.numel():
        return out
    late = late.view(torch.uint8)
    mask = late if part.mask is None else part.mask.view(torch.uint8)
    bn, _, warps = tiles(architecture(), dim, p.q.dtype == torch.float32)
    count = triton.cdiv(slots, bn)
    _receive[(batch * heads * count,)](
        p.q, part.k, mask, late, lse, out, p.q.stride(0), p.q.stride(1), *part.k.stride()[:3], *mask.stride(),
        *late.stride(), p.scale, p.softcap, part.first, heads, p.q.shape[1], slots, part.used, dim, count, GROUP=group,
        ROWS=max(16, triton.next_power_of_2(group)), BN=bn, BD=max(32, triton.next_power_of_2(dim)),
        MASK=part.mask is not None, PRECISION="ieee", num_warps=warps,
    )  # fmt: skip
    return out


def refuses(p: Decode) -> str | None:
    """Why this step cannot run here."""
    if len(p.parts) > PARTS:
        return f"the decode step has {len(p.parts)} parts, at most {PARTS} fit into one launch"
    for n, part in enumerate(p.parts):
        if part.k.dtype != p.q.dtype or part.v.dtype != p.q.dtype:
            return f"parts[{n}] has k of {part.k.dtype} and v of {part.v.dtype}, q is {p.q.dtype}"
        for name in ("state", "weight"):
            x = getattr(part, name)
            if x is not None and x.dtype != torch.float32:
                return f"parts[{n}].{name} is {x.dtype}, expected float32"
        if part.weight is not None and part.weight.stride(0) != 1:
            return f"parts[{n}].weight has stride {part.weight.stride(0)}, expected 1"
        if part.fq is not None and part.weight is None and part.used:
            return f"parts[{n}] has a linear branch without a weight beside {part.used} used slots"
    return None


def variants(arch: str) -> Iterator[Variant]:
    """Every tile, for the widest head that takes it, with sinks, linear states and masks, which only add.

    Groups of up to 16 query heads pad to the same tile; bf16 stands for fp16, slices for whole caches but for one.
    """
    for name, wide in (("bf16", False), ("fp32", True)):
        types = {**dict.fromkeys(("q", "k", "fq"), f"*{name}"), "table": "*i64", "sink": "*fp32"}
        types |= {**dict.fromkeys(("sums", "lse"), "*fp32"), "scale": "fp32", "cap": "fp32"}
        types |= dict.fromkeys(("mask", "late"), "*u8")
        for bd, (bn, bf, warps) in widest({dim: [tiles(arch, dim, wide)] for dim in (32, 64, 128, 256)}):
            tile: dict[str, Any] = {"GROUP": 4, "ROWS": 16, "BN": bn, "BD": bd, "PRECISION": "ieee"}
            for split in (True, False) if bd == 256 and not wide else (True,):
                constants = {**tile, "BF": bf, "SINK": True, "SPLIT": split, "LINEAR": True}
                kinds = {**types, "out": "*fp32" if split else f"*{name}"}
                yield describe(f"decode {name} {bd}{' split' * split}", _step, kinds, constants, warps, 2)
            kinds = {**types, "out": "*fp32"}
            yield describe(f"decode received {name} {bd}", _receive, kinds, {**tile, "MASK": True}, warps, 3)
    types = {"partial": "*fp32", "sums": "*fp32", "out": "*bf16", "lse": "*fp32"}
    yield describe("decode merge 256", _merge, types, {"BD": 256, "BP": 16}, 4, 3)
