"""Block selection in Triton: pooled scores, then lists of key blocks, all on the device and never larger than NQ × NK.

One kernel averages the blocks. A second holds a row of scores at once and finds the smallest share that is still taken
by halving the range of its bits, so nothing is sorted; ties go to the smaller block. A third writes the lists, once by
query block and once by key block.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .problem import Blocks, Pooled
from .triton_common import Variant, widest
from .triton_linear_host import describe

MOST = 8192  # key blocks of a row


@triton.jit
def _means(
    x, out, x_b, x_h, x_r, heads, rows, blocks, size, D, GROUP: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr
):
    """The mean over a block's tokens and the GROUP heads of each."""
    pid = tl.program_id(0)
    block = pid % blocks
    g = pid // blocks % heads
    b = (pid // (blocks * heads)).to(tl.int64)
    begin = block * size
    count = tl.minimum(size, rows - begin)
    m = tl.arange(0, BM)
    d = tl.arange(0, BD)
    acc = tl.zeros((BD,), tl.float32)
    for j in range(GROUP):
        base = x + b * x_b + (g * GROUP + j).to(tl.int64) * x_h + begin.to(tl.int64) * x_r
        for c in range(0, count, BM):
            live = (c + m < count)[:, None] & (d < D)[None, :]
            acc += tl.sum(tl.load(base + (c + m)[:, None] * x_r + d[None, :], mask=live, other=0.0).to(tl.float32), 0)
    tl.store(out + pid.to(tl.int64) * D + d, acc / (count * GROUP), mask=d < D)


@triton.jit
def _choose(
    scores, chosen, nq, nk, rows, keys, bq, bk, first, keep, mass, causal, BK: tl.constexpr, MASS: tl.constexpr
):  # fmt: skip
    """Which key blocks one row takes: the forced ones, then the best; chosen is int8 (…, NQ, NK)."""
    pid = tl.program_id(0)
    n = pid % nq
    base = pid.to(tl.int64) * nk
    c = tl.arange(0, BK)
    s = tl.load(scores + base + c, mask=c < nk, other=float("-inf"))
    shift = keys - rows
    last = tl.minimum((n + 1) * bq, rows) - 1 + shift
    allowed = c < nk
    forced = allowed & (c < first)
    if causal != 0:
        allowed = allowed & (c * bk <= last)
        forced = (forced & allowed) | (allowed & ((c + 1) * bk > n * bq + shift))
    s = tl.where(allowed, s, float("-inf"))
    top = tl.max(s, 0)
    p = tl.exp(s - tl.where(top == float("-inf"), 0.0, top))
    p = tl.where(allowed, p, 0.0)
    total = tl.sum(p, 0)
    p = p / tl.where(total == 0.0, 1.0, total)
    # as integers: forced ones above every share, what is not allowed below
    bits = tl.where(forced, 0x40000000, p.to(tl.int32, bitcast=True))
    bits = tl.where(allowed, bits, -1)
    held = tl.where(allowed, p if MASS else 1.0, 0.0)
    goal = mass if MASS else tl.cast(keep, tl.float32)
    low = -1  # what lies above `low` holds the goal; what lies above `high` does not
    high = 0x40000001
    for _ in range(31):
        middle = low + (high - low) // 2
        above = tl.sum(tl.where(bits > middle, held, 0.0), 0)
        full = above >= goal
        low = tl.where(full, middle, low)
        high = tl.where(full, high, middle)
    # those above `high` are taken, and of those that equal it the first, until the goal is held
    before = tl.sum(tl.where(bits > high, held, 0.0), 0)
    equal = (bits == high) & allowed
    tied = tl.where(equal, held, 0.0)
    taken = (bits > high) | (equal & (before + tl.cumsum(tied, 0) - tied < goal))
    taken = (taken | forced) & allowed
    tl.store(chosen + base + c, taken.to(tl.int8), mask=c < nk)


@triton.jit
def _list(chosen, starts, columns, lines, entries, c_o, c_l, c_e, BN: tl.constexpr):
    """The chosen entries of one line, ascending, from its start. The map is (outer, lines, entries) by strides."""
    pid = tl.program_id(0)
    base = chosen + (pid // lines).to(tl.int64) * c_o + (pid % lines).to(tl.int64) * c_l
    start = tl.load(starts + pid).to(tl.int64)
    n = tl.arange(0, BN)
    done = 0
    for c in range(0, entries, BN):
        there = tl.load(base + (c + n).to(tl.int64) * c_e, mask=c + n < entries, other=0).to(tl.int32)
        place = done + tl.cumsum(there, 0) - there
        tl.store(columns + start + place, c + n, mask=there != 0)
        done += tl.sum(there, 0)


def select(p: Pooled) -> Blocks:
    """Lists by query block with room for the most that a row can take, and by key block without gaps."""
    (batch, _, rows, _), (groups, keys) = p.q.shape, p.k.shape[1:3]
    bq, bk = p.block
    nq, nk = triton.cdiv(rows, bq), triton.cdiv(keys, bk)
    scores = (_pooled(p.q, bq, groups) * p.scale) @ _pooled(p.k, bk, groups).transpose(-1, -2)  # (B, Hk, NQ, NK)
    chosen = torch.empty(scores.shape, dtype=torch.int8, device=scores.device)
    width = max(16, triton.next_power_of_2(nk))
    if chosen.numel():
        _choose[(batch * groups * nq,)](
            scores, chosen, nq, nk, rows, keys, bq, bk, p.first, 0 if p.keep is None else p.keep,
            0.0 if p.mass is None else p.mass, int(p.causal), BK=width, MASS=p.mass is not None,
            num_warps=_warps(width),
        )  # fmt: skip
    capacity = nk
    if p.mass is None:
        diagonal = bq // bk + 2 if p.causal else 0
        capacity = min(nk, max(p.keep or 0, p.first + diagonal))
    counts = chosen.sum(-1, dtype=torch.int32)  # (B, Hk, NQ)
    starts = (torch.arange(counts.numel(), dtype=torch.int32, device=counts.device) * capacity).reshape(counts.shape)
    columns = torch.zeros(counts.numel() * capacity, dtype=torch.int32, device=counts.device)
    t_counts = chosen.sum(-2, dtype=torch.int32)  # (B, Hk, NK)
    flat = t_counts.flatten()
    t_starts = (flat.cumsum(0) - flat).int().reshape(t_counts.shape)
    t_columns = torch.zeros_like(columns)
    if chosen.numel():
        size = nq * nk
        _list[(counts.numel(),)](chosen, starts, columns, nq, nk, size, nk, 1, BN=128, num_warps=1)
        _list[(t_counts.numel(),)](chosen, t_starts, t_columns, nk, nq, size, 1, nk, BN=128, num_warps=1)
    return Blocks(
        block=p.block,
        starts=starts,
        counts=counts,
        columns=columns,
        t_starts=t_starts,
        t_counts=t_counts,
        t_columns=t_columns,
    )


def _warps(width: int) -> int:
    return 4 if width <= 2048 else 8


def _pooled(x: Tensor, size: int, groups: int) -> Tensor:
    """(B, H, S, D) → means (B, Hk, ⌈S / size⌉, D) fp32."""
    batch, heads, rows, dim = x.shape
    blocks = triton.cdiv(rows, size)
    out = torch.empty(batch, groups, blocks, dim, dtype=torch.float32, device=x.device)
    if out.numel():
        _means[(batch * groups * blocks,)](
            x, out, x.stride(0), x.stride(1), x.stride(2), groups, rows, blocks, size, dim, GROUP=heads // groups,
            BM=32, BD=max(16, triton.next_power_of_2(dim)), num_warps=4,
        )  # fmt: skip
    return out


def refuses(p: Pooled) -> str | None:
    """Why this selection cannot run here."""
    blocks = triton.cdiv(p.k.shape[2], p.block[1])
    return f"{blocks} key blocks in a row, at most {MOST} fit into one program" if blocks > MOST else None


def variants(arch: str) -> Iterator[Variant]:
    """The widest head, and the widest row for each number of warps; shares of the mass need more than counts.

    GROUP is a loop bound: 2 stands for all.
    """
    for name in ("bf16", "fp32"):
        constants: dict[str, Any] = {"GROUP": 2, "BM": 32, "BD": 256}
        yield describe(f"select means {name} 256", _means, {"x": f"*{name}", "out": "*fp32"}, constants, 4, 3)
    kinds = {"scores": "*fp32", "chosen": "*i8", "mass": "fp32", "starts": "*i32", "columns": "*i32"}
    widths = tuple(2**n for n in range(4, MOST.bit_length()))
    for width, warps in widest({width: [_warps(width)] for width in widths}):
        yield describe(f"select choose {width}", _choose, kinds, {"BK": width, "MASS": True}, warps, 3)
    yield describe("select list", _list, kinds, {"BN": 128}, 1, 3)
