"""What the gradient kernels of mixed attention do with one tile of logits."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from .triton_mixed_tiles import INF, LOG2E, places, products, softcapped, tile


@triton.jit
def logit_gradient(s, dp, lse, delta, unit, softcap, SOFTCAP: tl.constexpr):
    """Probabilities and gradients of the logits before the cap; lse and delta broadcast against s.

    `s` is −inf where nothing is attended; the slope of the cap is 1 − (s / cap)².
    """
    p = tl.exp2(s * unit - lse)
    ds = p * (dp - delta)
    if SOFTCAP:
        ratio = tl.where(s == -INF, 0.0, s / softcap)
        ds = ds * (1.0 - ratio * ratio)
    return p, ds


@triton.jit
def key_step(
    dk, dv, kt, vt, k_at, v_at, inside, q_base, do_base, lse_at, delta_at, first, row, stop, q_n, do_n, column, seen,
    unit, scale, softcap,
    DIM: tl.constexpr, MASK: tl.constexpr, TAIL: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of rows first + row < stop joins dk and dv of keys at `k_at`, `v_at`; `seen` (keys, rows) where MASK."""
    live = first + row < stop
    qt = tile(q_base, first, q_n, row, column, stop, DIM, TAIL)
    q_at = places(q_base, first, q_n, row)
    s = products(kt, k_at, inside, qt, q_at, live, column, DIM, PRECISION)
    if SOFTCAP:
        s = softcapped(s * scale, softcap)
    if MASK:
        s = tl.where(seen, s, -INF)
    top = tl.load(lse_at + first + row, mask=live, other=INF)
    top = tl.where(top == -INF, INF, top * LOG2E)[None, :]
    d = tl.load(delta_at + first + row, mask=live, other=0.0)[None, :]
    dot = tile(do_base, first, do_n, row, column, stop, DIM, TAIL)
    do_at = places(do_base, first, do_n, row)
    dp = products(vt, v_at, inside, dot, do_at, live, column, DIM, PRECISION)
    p, ds = logit_gradient(s, dp, top, d, unit, softcap, SOFTCAP)
    dv = tl.dot(p.to(dot.dtype), dot, dv, input_precision=PRECISION)
    dk = tl.dot(ds.to(qt.dtype), qt, dk, input_precision=PRECISION)
    return dk, dv
