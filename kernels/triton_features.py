"""Feature maps in Triton: one pass over the rows, forward and backward, all sums in fp32.

`hedgehog` multiplies a tile of rows by the head's W, takes both softmaxes and writes them once; fp32 weights beside
16-bit rows are multiplied as two 16-bit parts. `poly` is fused forward; its backward is a few matrix products.
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

from .triton_common import Variant, architecture, widest
from .triton_linear_host import describe

FLOOR = tl.constexpr(1e-12)  # of a Hedgehog feature
HIDDEN = 128  # units of the hidden layer of a poly map
KINDS = {"elu1": 0, "relu": 1, "softmax": 2}


@triton.jit
def _matrix(base, i, j, rows, columns, stride):
    live = (i < rows)[:, None] & (j < columns)[None, :]
    return tl.load(base + i[:, None] * stride + j[None, :], mask=live, other=0.0)


@triton.jit
def _weigh(x, w, acc, PRECISION: tl.constexpr, SPLIT: tl.constexpr):
    """x · w in fp32 accuracy where x is 16-bit and w fp32."""
    high = w.to(x.dtype)
    acc = tl.dot(x, high, acc, input_precision=PRECISION)
    if SPLIT:
        acc = tl.dot(x, (w.to(tl.float32) - high.to(tl.float32)).to(x.dtype), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _pair(y, d, D):
    """softmax(y) and softmax(−y) over the first D columns."""
    live = (d < D)[None, :]
    p = tl.exp(tl.where(live, y - tl.max(tl.where(live, y, float("-inf")), 1)[:, None], float("-inf")))
    n = tl.exp(tl.where(live, tl.min(tl.where(live, y, float("inf")), 1)[:, None] - y, float("-inf")))
    return p / tl.sum(p, 1)[:, None], n / tl.sum(n, 1)[:, None]


@triton.jit
def _hedgehog(
    x, w, out, x_b, x_h, x_r, heads, rows, blocks, D, BM: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """φ = [softmax(x W), softmax(−x W)] of BM rows of one head."""
    pid = tl.program_id(0)
    start = pid % blocks * BM
    h = (pid // blocks % heads).to(tl.int64)
    b = (pid // (blocks * heads)).to(tl.int64)
    m = tl.arange(0, BM)
    d = tl.arange(0, BD)
    x_base = x + b * x_b + h * x_h + tl.cast(start, tl.int64) * x_r
    y = tl.zeros((BM, BD), tl.float32)
    for c in range(0, D, BK):
        k = c + tl.arange(0, BK)
        y = _weigh(
            _matrix(x_base, m, k, rows - start, D, x_r), _matrix(w + h * D * D, k, d, D, D, D), y, PRECISION, SPLIT
        )
    p, n = _pair(y, d, D)
    base = out + ((b * heads + h) * rows + start) * (2 * D)
    place = base + m[:, None] * (2 * D) + d[None, :]
    live = (m < rows - start)[:, None] & (d < D)[None, :]
    tl.store(place, tl.maximum(p, FLOOR).to(out.dtype.element_ty), mask=live)
    tl.store(place + D, tl.maximum(n, FLOOR).to(out.dtype.element_ty), mask=live)


@triton.jit
def _hedgehog_backward(
    x, w, do, dy, x_b, x_h, x_r, o_b, o_h, o_r, heads, rows, blocks, D, BM: tl.constexpr, BK: tl.constexpr,
    BD: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """d(x W) of BM rows of one head."""
    pid = tl.program_id(0)
    start = pid % blocks * BM
    h = (pid // blocks % heads).to(tl.int64)
    b = (pid // (blocks * heads)).to(tl.int64)
    m = tl.arange(0, BM)
    d = tl.arange(0, BD)
    x_base = x + b * x_b + h * x_h + tl.cast(start, tl.int64) * x_r
    y = tl.zeros((BM, BD), tl.float32)
    for c in range(0, D, BK):
        k = c + tl.arange(0, BK)
        y = _weigh(
            _matrix(x_base, m, k, rows - start, D, x_r), _matrix(w + h * D * D, k, d, D, D, D), y, PRECISION, SPLIT
        )
    p, n = _pair(y, d, D)
    o_base = do + b * o_b + h * o_h + tl.cast(start, tl.int64) * o_r
    gp = _matrix(o_base, m, d, rows - start, D, o_r).to(tl.float32)
    gn = _matrix(o_base + D, m, d, rows - start, D, o_r).to(tl.float32)
    gp = tl.where(p >= FLOOR, gp, 0.0)
    gn = tl.where(n >= FLOOR, gn, 0.0)
    g = p * (gp - tl.sum(gp * p, 1)[:, None]) - n * (gn - tl.sum(gn * n, 1)[:, None])
    place = dy + ((b * heads + h) * rows + start) * D + m[:, None] * D + d[None, :]
    tl.store(place, g.to(dy.dtype.element_ty), mask=(m < rows - start)[:, None] & (d < D)[None, :])


@triton.jit
def _rows(
    x, do, out, x_b, x_h, x_r, o_b, o_h, o_r, heads, rows, blocks, D, BM: tl.constexpr, BD: tl.constexpr,
    KIND: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """elu + 1, ReLU and softmax of BM rows, or their gradients."""
    pid = tl.program_id(0)
    start = pid % blocks * BM
    h = (pid // blocks % heads).to(tl.int64)
    b = (pid // (blocks * heads)).to(tl.int64)
    m = tl.arange(0, BM)
    d = tl.arange(0, BD)
    y = _matrix(x + b * x_b + h * x_h + tl.cast(start, tl.int64) * x_r, m, d, rows - start, D, x_r).to(tl.float32)
    live = (m < rows - start)[:, None] & (d < D)[None, :]
    if BACKWARD:
        g = _matrix(do + b * o_b + h * o_h + tl.cast(start, tl.int64) * o_r, m, d, rows - start, D, o_r).to(tl.float32)
    if KIND == 2:
        p = tl.exp(y - tl.max(tl.where((d < D)[None, :], y, float("-inf")), 1)[:, None])
        p = tl.where((d < D)[None, :], p, 0.0)
        p = p / tl.sum(p, 1)[:, None]
        y = p * (g - tl.sum(g * p, 1)[:, None]) if BACKWARD else p
    elif KIND == 1:
        y = tl.where(y > 0, g, 0.0) if BACKWARD else tl.where(y < 0, 0.0, y)
    else:
        y = g * tl.exp(tl.minimum(y, 0.0)) if BACKWARD else tl.where(y > 0, y + 1, tl.exp(tl.minimum(y, 0.0)))
    place = out + ((b * heads + h) * rows + start) * D + m[:, None] * D + d[None, :]
    tl.store(place, y.to(out.dtype.element_ty), mask=live)


@triton.jit
def _poly(
    x, w1, b1, w2, b2, out, x_b, x_h, x_r, heads, rows, blocks, D, M, N, degrees, BM: tl.constexpr, BK: tl.constexpr,
    HIDDEN: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """softplus(gelu(x W1 + b1) W2 + b2)^p of BM rows of one head and one p."""
    pid = tl.program_id(0)
    start = pid % blocks * BM
    h = (pid // blocks % heads).to(tl.int64)
    b = (pid // (blocks * heads) % (tl.num_programs(0) // (blocks * heads * degrees))).to(tl.int64)
    degree = pid // (tl.num_programs(0) // degrees)
    m = tl.arange(0, BM)
    hidden = tl.arange(0, HIDDEN)
    x_base = x + b * x_b + h * x_h + tl.cast(start, tl.int64) * x_r
    layer = degree * heads + h
    u = tl.zeros((BM, HIDDEN), tl.float32)
    for c in range(0, D, BK):
        k = c + tl.arange(0, BK)
        tile = _matrix(w1 + layer * D * M, k, hidden, D, M, M)
        u = _weigh(_matrix(x_base, m, k, rows - start, D, x_r), tile, u, PRECISION, SPLIT)
    u += tl.load(b1 + layer * M + hidden, mask=hidden < M, other=0.0)[None, :]
    u = 0.5 * u * (1 + tl.math.erf(u * 0.7071067811865476))
    # the hidden layer keeps fp32's accuracy: two 16-bit parts
    high = u.to(x.dtype.element_ty)
    low = (u - high.to(tl.float32)).to(x.dtype.element_ty)
    base = out + ((b * heads + h) * rows + start) * (degrees * N) + degree * N
    for c in range(0, N, BN):
        n = c + tl.arange(0, BN)
        tile = _matrix(w2 + layer * M * N, hidden, n, M, N, N)
        t = _weigh(high, tile, tl.zeros((BM, BN), tl.float32), PRECISION, SPLIT)
        if SPLIT:
            t = tl.dot(low, tile.to(x.dtype.element_ty), t)
        t += tl.load(b2 + layer * N + n, mask=n < N, other=0.0)[None, :]
        t = tl.maximum(t, 0.0) + tl.log(1 + tl.exp(-tl.abs(t)))
        y = t
        for _ in range(degree):
            y = y * t
        live = (m < rows - start)[:, None] & (n < N)[None, :]
        tl.store(base + m[:, None] * (degrees * N) + n[None, :], y.to(out.dtype.element_ty), mask=live)


def tiles(arch: str, dim: int, wide: bool) -> tuple[int, int, int]:
    """Rows, steps through D and warps."""
    if wide:
        return 16 if dim > 64 else 32, 16, 8 if dim > 64 else 4
    return 32 if dim > 128 else 64, 32, 8 if dim > 64 else 4


def poly_tiles(arch: str, hidden: int, wide: bool) -> tuple[int, int, int]:
    """As `tiles`, for a hidden layer of that size, which is held whole."""
    bm, bk, warps = tiles(arch, hidden, wide)
    return min(bm, 16) if hidden > 64 else bm, bk, warps


def features(x: Tensor, kind: str, weights: tuple[Tensor, ...]) -> Tensor:
    """x (B, H, S, D) → φ(x) (B, H, S, F) in the dtype of x."""
    batch, heads, rows, dim = x.shape
    if kind == "poly":
        return _poly_forward(x, weights)
    out = torch.empty(batch, heads, rows, 2 * dim if kind == "hedgehog" else dim, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    if kind != "hedgehog":
        return _elementwise(x, x, out, KINDS[kind], False)
    w = weights[0].contiguous()
    bm, bk, warps = tiles(architecture(), dim, x.dtype == torch.float32)
    blocks = triton.cdiv(rows, bm)
    _hedgehog[(batch * heads * blocks,)](
        x, w, out, x.stride(0), x.stride(1), x.stride(2), heads, rows, blocks, dim, BM=bm, BK=bk,
        BD=max(32, triton.next_power_of_2(dim)), PRECISION="ieee", SPLIT=_split(x, w), num_warps=warps, num_stages=2,
    )  # fmt: skip
    return out


def _split(x: Tensor, w: Tensor) -> bool:
    return x.dtype != torch.float32 and w.dtype != x.dtype


def _elementwise(x: Tensor, dout: Tensor, out: Tensor, kind: int, backward: bool) -> Tensor:
    batch, heads, rows, dim = x.shape
    bm = 16 if dim > 64 else 32
    blocks = triton.cdiv(rows, bm)
    strides = [t.stride(i) for t in (x, dout) for i in range(3)]
    _rows[(batch * heads * blocks,)](
        x, dout, out, *strides, heads, rows, blocks, dim, BM=bm, BD=max(32, triton.next_power_of_2(dim)), KIND=kind,
        BACKWARD=backward, num_warps=4,
    )  # fmt: skip
    return out


def _poly_forward(x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    (batch, heads, rows, dim), (degrees, _, hidden, n) = x.shape, weights[2].shape
    w1, b1, w2, b2 = (w.contiguous() for w in weights)
    out = torch.empty(batch, heads, rows, degrees * n, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    wide = x.dtype == torch.float32
    width = max(32, triton.next_power_of_2(hidden))
    bm, bk, warps = poly_tiles(architecture(), width, wide)
    blocks = triton.cdiv(rows, bm)
    _poly[(batch * heads * blocks * degrees,)](
        x, w1, b1, w2, b2, out, x.stride(0), x.stride(1), x.stride(2), heads, rows, blocks, dim, hidden, n, degrees,
        BM=bm, BK=bk, HIDDEN=width, BN=16, PRECISION="ieee", SPLIT=not wide, num_warps=warps,
        num_stages=1,
    )  # fmt: skip
    return out


def features_backward(
    x: Tensor, kind: str, weights: tuple[Tensor, ...], dout: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """dx in the dtype of x, and the gradients of the weights in theirs."""
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    if kind == "poly":
        return _poly_backward(x, weights, dout)
    batch, heads, rows, dim = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if kind != "hedgehog":
        return (_elementwise(x, dout, dx, KINDS[kind], True) if dx.numel() else dx), ()
    w = weights[0].contiguous()
    if not dx.numel():
        return dx, (torch.zeros_like(w),)
    bm, bk, warps = tiles(architecture(), dim, x.dtype == torch.float32)
    blocks = triton.cdiv(rows, bm)
    # fp32 where x is: the products below are then those of plain math in the dtype of x
    dy = torch.empty(x.shape, dtype=torch.float32 if x.dtype == torch.float16 else x.dtype, device=x.device)
    strides = [t.stride(i) for t in (x, dout) for i in range(3)]
    _hedgehog_backward[(batch * heads * blocks,)](
        x, w, dout, dy, *strides, heads, rows, blocks, dim, BM=bm, BK=bk, BD=max(32, triton.next_power_of_2(dim)),
        PRECISION="ieee", SPLIT=_split(x, w), num_warps=warps, num_stages=1,
    )  # fmt: skip
    dx = (dy @ w.to(dy.dtype).transpose(-1, -2)).to(x.dtype)
    dw = (x.to(dy.dtype).transpose(-1, -2) @ dy).float().sum(0)  # (H, D, D)
    return dx, (dw.to(w.dtype),)


def _poly_backward(x: Tensor, weights: tuple[Tensor, ...], dout: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The two layers once more in fp32, one power at a time."""
    y, given = x.float(), dout.float()
    dx = torch.zeros_like(y)
    found: list[list[Tensor]] = [[], [], [], []]
    for n in range(weights[0].shape[0]):
        w1, b1, w2, b2 = (w[n].float() for w in weights)
        u = y @ w1 + b1[:, None]
        g = functional.gelu(u)
        t = g @ w2 + b2[:, None]
        size = t.shape[-1]
        power = functional.softplus(t) ** n * (n + 1) * torch.sigmoid(t)
        dt = given[..., n * size : (n + 1) * size] * power
        slope = 0.5 * (1 + torch.erf(u * 0.5**0.5)) + u * torch.exp(-0.5 * u * u) * (0.5 / torch.pi) ** 0.5
        du = (dt @ w2.transpose(-1, -2)) * slope
        dx += du @ w1.transpose(-1, -2)
        parts = (y.transpose(-1, -2) @ du, du.sum(2), g.transpose(-1, -2) @ dt, dt.sum(2))
        for kept, part in zip(found, parts, strict=True):
            kept.append(part.sum(0))
    return dx.to(x.dtype), tuple(torch.stack(f).to(w.dtype) for f, w in zip(found, weights, strict=True))


def refuses(kind: str, dim: int, weights: tuple[Tensor, ...]) -> str | None:
    """Why this map cannot run here."""
    if kind == "poly" and weights[2].shape[2] > HIDDEN:
        return f"the hidden layer of the poly map has {weights[2].shape[2]} units, at most {HIDDEN} fit into one tile"
    if kind not in ("poly", "hedgehog", *KINDS):
        return f"no feature map {kind!r}; known are hedgehog, elu1, relu, softmax, poly"
    return None


def variants(arch: str) -> Iterator[Variant]:
    """Every tile, for the widest head that takes it and with weights in fp32, which take the most.

    bf16 stands for fp16, and the gradient of softmax, which needs sums over a row, for all maps without weights.
    """
    for name, wide in (("bf16", False), ("fp32", True)):
        kinds = {
            **dict.fromkeys(("x", "do", "out", "dy"), f"*{name}"),
            **dict.fromkeys(("w", "w1", "b1", "w2", "b2"), "*fp32"),
        }
        for bd, (bm, bk, warps) in widest({dim: [tiles(arch, dim, wide)] for dim in (32, 64, 128, 256)}):
            constants: dict[str, Any] = {"BM": bm, "BK": bk, "BD": bd, "PRECISION": "ieee", "SPLIT": not wide}
            for function, stages in ((_hedgehog, 2), (_hedgehog_backward, 1)):
                label = f"features {function.__name__[1:]} {name} {bd}"
                yield describe(label, function, kinds, constants, warps, stages)
        for hidden, (bm, bk, warps) in widest({dim: [poly_tiles(arch, dim, wide)] for dim in (32, 64, HIDDEN)}):
            constants = {"BM": bm, "BK": bk, "HIDDEN": hidden, "BN": 16, "PRECISION": "ieee", "SPLIT": not wide}
            yield describe(f"features poly {name} {hidden}", _poly, kinds, constants, warps, 1)
        constants = {"BM": 16, "BD": 256, "KIND": KINDS["softmax"], "BACKWARD": True}
        yield describe(f"features softmax {name} 256 backward", _rows, kinds, constants, 4, 3)
