"""δ = do·o of mixed attention in Triton, and with what gain a row's gradient reaches the linear branch."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .problem import EPS, Branch, Softmax
from .triton_common import architecture
from .triton_mixed_host import limits, sizes_of, strides
from .triton_mixed_shapes import padded
from .triton_mixed_tiles import INF, LOG2E, tile

FLOOR = tl.constexpr(EPS)
MOST = tl.constexpr(100.0)  # log 2 of the largest gain: where the branch has any part, it is below 1 / A[D]


@triton.jit(do_not_specialize=["rows", "branch_heads"])
def delta_kernel(
    o, do, lse, group_map, weight, den, delta, gain, offset, rows, o_b, o_h, o_n, do_b, do_h, do_n, branch_heads,
    GROUP: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, BRANCH: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """δ = do·o of each row; where a branch is, `gain` a and `offset` −aδ as well.

    BRANCH 1: under the normaliser of the softmax, a = e^{c − lse}; 2: o is the branch's own, a = 1 / (den + EPS).
    """
    first = tl.program_id(0) * BM
    h = tl.program_id(1)
    b = tl.program_id(2)
    heads = tl.num_programs(1)
    row = tl.arange(0, BM)
    column = tl.arange(0, PAD)
    live = first + row < rows
    x = tile(o + b * o_b.to(tl.int64) + h * o_h.to(tl.int64), first, o_n, row, column, rows, DIM, True)
    y = tile(do + b * do_b.to(tl.int64) + h * do_h.to(tl.int64), first, do_n, row, column, rows, DIM, True)
    d = tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)
    at = (b * heads + h).to(tl.int64) * rows + first + row
    tl.store(delta + at, d, mask=live)
    if BRANCH == 1:
        t = tl.load(group_map + h // GROUP)
        if t >= 0:
            head = t * GROUP + h % GROUP
            top = tl.load(lse + at, mask=live, other=-INF)
            a = tl.exp2(tl.minimum((tl.load(weight + head) - top) * LOG2E, MOST))
            a = tl.where(top == -INF, 0.0, a)
            to = (b * branch_heads + head).to(tl.int64) * rows + first + row
            tl.store(gain + to, a, mask=live)
            tl.store(offset + to, -a * d, mask=live)
    if BRANCH == 2:
        a = 1.0 / (tl.load(den + at, mask=live, other=1.0) + FLOOR)
        tl.store(gain + at, a, mask=live)
        tl.store(offset + at, -a * d, mask=live)


# --------------------------------------------------------------------------------------------------------- on the host


def delta_of(
    p: Softmax,
    o: Tensor,
    do: Tensor,
    lse: Tensor,
    delta: Tensor,
    branch: Branch | None = None,
    gain: Tensor | None = None,
    offset: Tensor | None = None,
) -> None:
    """`lse` is the denominator where o is the output of a branch of its own."""
    b, heads, rows, dim = o.shape
    mode = 0 if branch is None else 1 if branch.shared else 2
    if not o.numel():
        return
    delta_kernel[triton.cdiv(rows, 64), heads, b](
        o, do, lse, branch and branch.groups, branch and branch.weight, lse if mode == 2 else None, delta,
        gain if mode else None, offset if mode else None, rows, *strides(o), *strides(do),
        branch.fq.shape[1] if branch else 1, GROUP=sizes_of(p).per, DIM=dim, PAD=padded(dim), BRANCH=mode, BM=64,
        num_warps=4, **limits(architecture()),
    )  # fmt: skip
