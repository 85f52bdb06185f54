"""Gradients of the further keys of mixed attention in Triton.

There are few of them, so rows are split over programs, and a second pass adds the parts in a fixed order.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .problem import Ranges, Softmax
from .triton_mixed_host import dot_precision, limits, sizes_of, strides
from .triton_mixed_masks import beyond
from .triton_mixed_shapes import half_of, key_tile, padded
from .triton_mixed_steps import key_step
from .triton_mixed_tiles import FAR, HOLE, LOG2E, alive_tile, places, window_of

SPAN = 512  # rows of one program of `extra_kernel`


@triton.jit(do_not_specialize=["rows", "keys", "extras", "span", "groups", "lse_n"])
def extra_kernel(
    q, do, lse, delta, window, extra_k, extra_v, extra_at, part_k, part_v, scale, softcap, rows, keys, extras, span,
    groups, lse_n, q_b, q_h, q_n, do_b, do_h, do_n, ek_b, ek_h, ek_n, ev_b, ev_h, ev_n,
    GROUP: tl.constexpr, DIM: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, BE: tl.constexpr,
    BM: tl.constexpr, PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What `span` rows add to the gradients of BE further keys: parts (splits, B, Hk, P, D) fp32."""
    split = tl.program_id(0)
    e = tl.program_id(1) * BE
    g = tl.program_id(2) % groups
    b = tl.program_id(2) // groups
    slot = tl.arange(0, BE)
    row = tl.arange(0, BM)
    column = tl.arange(0, PAD)
    shift = keys - rows
    place = b * groups + g
    w = window_of(window, g)
    at = tl.load(extra_at + place * extras + e + slot, mask=e + slot < extras, other=HOLE)
    real = at != HOLE
    ek_base = extra_k + b * ek_b.to(tl.int64) + g * ek_h.to(tl.int64)
    ev_base = extra_v + b * ev_b.to(tl.int64) + g * ev_h.to(tl.int64)
    kt = alive_tile(ek_base, e, ek_n, slot, column, real, DIM)
    vt = alive_tile(ev_base, e, ev_n, slot, column, real, DIM)
    k_at = places(ek_base, e, ek_n, slot)
    v_at = places(ev_base, e, ev_n, slot)
    unit = scale * LOG2E
    if SOFTCAP:
        unit = unit * 0.0 + LOG2E
    acc_k = tl.zeros((BE, PAD), tl.float32)
    acc_v = tl.zeros((BE, PAD), tl.float32)
    begin = split * span
    tiles = tl.cdiv(tl.maximum(tl.minimum(rows - begin, span), 0), BM)
    tiles = tl.where(w < FAR, tiles, 0)
    for y in range(tiles * GROUP):
        h = g * GROUP + (y // tiles).to(tl.int64)
        r0 = begin + y % tiles * BM
        i = r0 + shift + row
        seen = beyond(i[None, :], at[:, None], w, CAUSAL)
        q_base = q + b * q_b.to(tl.int64) + h * q_h
        do_base = do + b * do_b.to(tl.int64) + h * do_h
        line = (b * groups * GROUP + h) * lse_n
        acc_k, acc_v = key_step(
            acc_k, acc_v, kt, vt, k_at, v_at, real, q_base, do_base, lse + line, delta + line, r0, row, rows, q_n, do_n,
            column, seen, unit, scale, softcap, DIM, True, True, SOFTCAP, PRECISION,
        )  # fmt: skip
    to = (split * tl.num_programs(2) + place).to(tl.int64) * extras + e
    to = to * DIM + (slot[:, None] * DIM + column[None, :])
    live = (e + slot < extras)[:, None] & (column < DIM)[None, :]
    tl.store(part_k + to, acc_k * scale, mask=live)
    tl.store(part_v + to, acc_v, mask=live)


# --------------------------------------------------------------------------------------------------------- on the host


def extra_gradients(
    p: Softmax, arch: str, do: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    if p.extra is None:
        return None, None
    assert isinstance(p.where, Ranges)
    s, x = sizes_of(p), p.extra
    splits = max(1, triton.cdiv(s.rows, SPAN))
    parts = [torch.empty(splits, *x.k.shape, dtype=torch.float32, device=p.q.device) for _ in range(2)]
    t = key_tile(arch, half_of(p), padded(s.dim), True)
    if x.k.numel():
        extra_kernel[splits, triton.cdiv(x.at.shape[2], 16), s.groups * s.count](
            p.q, do, lse, delta, p.where.window, x.k, x.v, x.at.contiguous(), *parts, p.scale, p.softcap or 1.0, s.rows,
            s.keys, x.at.shape[2], SPAN, s.groups, p.q.shape[2], *strides(p.q), *strides(do), *strides(x.k),
            *strides(x.v), GROUP=s.per, DIM=s.dim, CAUSAL=p.causal, SOFTCAP=p.softcap > 0, BE=16, BM=t.walk,
            PAD=padded(s.dim), PRECISION=dot_precision(p.q.dtype), num_warps=4, num_stages=t.stages, **limits(arch),
        )  # fmt: skip
    return parts[0].sum(0).to(x.k.dtype), parts[1].sum(0).to(x.v.dtype)
