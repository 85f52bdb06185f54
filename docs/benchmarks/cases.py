"""What is timed: each function here prepares one provider of one case and returns the call."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from shapes import Shape
from torch import Tensor

from attnconvert.kernels import dispatch, ops
from attnconvert.kernels.problem import Blocks, Branch, Extra, Part, Ranges

Run = Callable[[], Any]
Leaves = tuple[Tensor, ...]


class Inputs:
    """q, k, v (1, H or Hk, S, D) as models have them: views of (1, S, H, D). Made when they are first used.

    `grad`: they are leaves, and `gradients` times the backward pass too.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str, grad: bool = False, seed: int = 0) -> None:
        self.shape, self.dtype, self.device, self.grad = shape, dtype, device, grad
        self.generator = torch.Generator(device).manual_seed(seed)  # not the default one: graphs may hold that

    def normal(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*sizes, generator=self.generator, device=self.device).to(dtype or self.dtype)

    def _states(self, heads: int) -> Tensor:
        x = self.normal(1, self.shape.tokens, heads, self.shape.dim).transpose(1, 2)
        return x.requires_grad_() if self.grad else x

    @cached_property
    def q(self) -> Tensor:
        return self._states(self.shape.heads)

    @cached_property
    def k(self) -> Tensor:
        return self._states(self.shape.kv_heads)

    @cached_property
    def v(self) -> Tensor:
        return self._states(self.shape.kv_heads)

    @cached_property
    def do(self) -> Tensor:
        return self.normal(1, self.shape.tokens, self.shape.heads, self.shape.dim).transpose(1, 2)

    @cached_property
    def maps(self) -> tuple[Tensor, Tensor]:
        """Hedgehog weights of q and of k (H or Hk, D, D), fp32 as they are trained."""
        dim = self.shape.dim
        q, k = (self.normal(h, dim, dim, dtype=torch.float32) for h in (self.shape.heads, self.shape.kv_heads))
        return q * dim**-0.5, k * dim**-0.5

    @cached_property
    def features(self) -> tuple[Tensor, Tensor]:
        """φ(q), φ(k) with as many features as D, in the strides of q and k."""
        with torch.no_grad():
            found = [x.transpose(1, 2).softmax(-1).to(self.dtype).transpose(1, 2) for x in (self.q, self.k)]
        return (found[0].requires_grad_(), found[1].requires_grad_()) if self.grad else (found[0], found[1])

    def gradients(self, run: Callable[[], Tensor], leaves: Leaves | None = None) -> Run:
        """The forward pass alone, or both; then the result is (o, gradients of the leaves)."""
        if not self.grad:
            return run
        wanted = leaves or (self.q, self.k, self.v)

        def both() -> tuple[Tensor, ...]:
            o = run()
            return (o, *torch.autograd.grad(o, wanted, self.do))

        return both


def unavailable(name: str) -> str | None:
    """Why a back end cannot be measured here."""
    try:
        reason: str | None = dispatch.backend(name).unavailable()
    except ImportError as error:
        return f"back end {name}: {error}"
    return None if reason is None else f"back end {name}: {reason.splitlines()[0]}"


def warm(backend: str, device: str) -> None:
    """One tiny call each way: the first in a process imports for seconds, which is no case's time."""
    x = Inputs(Shape(model="", tokens=32, heads=2, kv_heads=1, dim=16), torch.float32, device, grad=True)
    with contextlib.suppress(Exception):  # what fails here fails again where it is measured, and is said there
        window(x, 8, True, backend)()


# ----------------------------------------------------------------------------------------------------------------- SDPA


def sdpa(x: Inputs, causal: bool, kernel: str | None = None, repeat: str = "before") -> Run:
    """SDPA, where asked for with one kernel (`CUDNN_ATTENTION`, `FLASH_ATTENTION`).

    repeat: KV heads are repeated `before` (outside of the timing) or `within` the call, or it is told of the groups
    (`grouped`). With gradients they are repeated within, since that is what has to be differentiated.
    """
    per = x.shape.heads // x.shape.kv_heads
    k, v = x.k, x.v
    if per > 1 and repeat == "before" and not x.grad:
        k, v = (y.repeat_interleave(per, 1) for y in (k, v))
    inside = per > 1 and repeat != "grouped" and (repeat == "within" or x.grad)

    def plain() -> Tensor:
        keys, values = (y.repeat_interleave(per, 1) for y in (k, v)) if inside else (k, v)
        return F.scaled_dot_product_attention(x.q, keys, values, is_causal=causal, enable_gqa=repeat == "grouped")

    def chosen() -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, kernel or "")):
            return plain()

    return x.gradients(plain if kernel is None else chosen)


# ----------------------------------------------------------------------------------------------------------------- ours


def attention(
    x: Inputs,
    where: Ranges | Blocks,
    causal: bool,
    backend: str,
    sinks: int = 0,
    select: int | None = None,
) -> Run:
    """Mixed attention without a branch. sinks: the first tokens as further keys. select: blocks to choose each time."""

    at = _positions(x, sinks)

    def run() -> Tensor:
        lists = where
        if select is not None:
            lists = ops.select_blocks(x.q, x.k, keep=select, causal=causal, backend=backend)
        return ops.mixed_attention(x.q, x.k, x.v, lists, causal=causal, extra=first(x, at), backend=backend).o

    return x.gradients(run)


def window(x: Inputs, size: int, causal: bool, backend: str, sinks: int = 0) -> Run:
    """The same size in all groups; −1 is dense."""
    return attention(x, ops.ranges((size,) * x.shape.kv_heads, x.device), causal, backend, sinks)


def _positions(x: Inputs, count: int) -> Tensor | None:
    """Of the first tokens, (1, Hk, count)."""
    at = torch.arange(count, dtype=torch.int32, device=x.device).expand(1, x.shape.kv_heads, count)
    return at.contiguous() if count else None


def first(x: Inputs, at: Tensor | None) -> Extra | None:
    """The first tokens as sinks."""
    return None if at is None else Extra(k=x.k[:, :, : at.shape[2]], v=x.v[:, :, : at.shape[2]], at=at)


def linear(x: Inputs, causal: bool, backend: str, included: bool = True) -> Run:
    """Linear attention; included: with its Hedgehog maps (2D features), else with D features that are given."""

    def whole() -> Tensor:
        fq, fk = (
            ops.feature_map(y, "hedgehog", (w,), backend=backend) for y, w in zip((x.q, x.k), x.maps, strict=True)
        )
        return ops.linear_attention(fq, fk, x.v, causal=causal, backend=backend)[0]

    def given() -> Tensor:
        return ops.linear_attention(*x.features, x.v, causal=causal, backend=backend)[0]

    return x.gradients(whole) if included else x.gradients(given, (*(x.features if x.grad else ()), x.v))


def hybrid(x: Inputs, size: int, sinks: int, backend: str) -> Run:
    """Window, sinks and the linear branch over the rest under one normaliser, Hedgehog maps included."""
    index = tuple(range(x.shape.kv_heads))
    weight = torch.zeros(x.shape.heads, device=x.device)
    where = ops.ranges((size,) * x.shape.kv_heads, x.device)
    at = _positions(x, sinks)
    counts = torch.arange(x.shape.tokens, device=x.device)[:, None] >= sinks  # a sink is not in the branch as well

    def run() -> Tensor:
        fq, fk = (
            ops.feature_map(y, "hedgehog", (w,), backend=backend) for y, w in zip((x.q, x.k), x.maps, strict=True)
        )
        branch = ops.branch(fq, fk * counts, index=index, shared=True, weight=weight)
        return ops.mixed_attention(
            x.q, x.k, x.v, where, causal=True, extra=first(x, at), branch=branch, backend=backend
        ).o

    return x.gradients(run)


def sla(x: Inputs, keep: int, backend: str, where: Blocks | None = None) -> Run:
    """Sparse and linear attention side by side: selection (unless lists are given), softmax maps, the sum of both."""
    index = tuple(range(x.shape.kv_heads))

    def run() -> Tensor:
        lists = ops.select_blocks(x.q, x.k, keep=keep, backend=backend) if where is None else where
        fq, fk = (ops.feature_map(y, "softmax", backend=backend) for y in (x.q, x.k))
        branch: Branch = ops.branch(fq, fk, index=index, shared=False)
        out = ops.mixed_attention(x.q, x.k, x.v, lists, causal=False, branch=branch, backend=backend)
        assert out.linear is not None
        return out.o + out.linear

    return x.gradients(run)


def retention(x: Inputs, size: int, keep: int, sinks: int, block: int, backend: str) -> Run:
    at = torch.arange(x.shape.tokens, dtype=torch.int32, device=x.device)[None]

    def run() -> Tensor:
        return ops.retention(x.q, x.k, x.v, at=at, window=size, keep=keep, sinks=sinks, block=block, backend=backend)[0]

    return x.gradients(run)


def random_blocks(
    shape: Shape,
    density: float,
    device: str,
    block: tuple[int, int] = (128, 64),
    *,
    causal: bool = False,
    seed: int = 0,
) -> Blocks:
    """Lists of full blocks at random places, for each KV group its own.

    causal: of the blocks up to the diagonal, with those of the diagonal in every list.
    """
    nq, nk = -(-shape.tokens // block[0]), -(-shape.tokens // block[1])
    generator = torch.Generator(device).manual_seed(seed)
    order = torch.rand(1, shape.kv_heads, nq, nk, generator=generator, device=device)
    if causal:
        starts, ends = (torch.arange(nq, device=device)[:, None] + n for n in (0, 1))
        at = torch.arange(nk, device=device) * block[1]
        before = at < ends * block[0]
        named = before & ((order < density) | (at + block[1] > starts * block[0]))
    else:
        best = order.topk(kept(nk, density), -1).indices
        named = torch.zeros(order.shape, dtype=torch.bool, device=device).scatter_(-1, best, True)
    starts, counts, columns = _lists(named)
    t_starts, t_counts, t_columns = _lists(named.transpose(-1, -2))
    return Blocks(
        block=block,
        starts=starts,
        counts=counts,
        columns=columns,
        t_starts=t_starts,
        t_counts=t_counts,
        t_columns=t_columns,
    )


def kept(blocks: int, density: float) -> int:
    """How many key blocks of a list are that share."""
    return max(1, round(blocks * density))


def _lists(named: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    counts = named.sum(-1)
    starts = counts.flatten().cumsum(0).reshape(counts.shape) - counts
    return starts.int(), counts.int(), named.nonzero()[:, -1].int()


# --------------------------------------------------------------------------------------------------------------- decode

SETS = 8  # caches that take turns, as layers do; one alone would stay in the processor's cache


class Steps:
    """One new token for each of `SETS` caches of `slots` tokens."""

    def __init__(self, shape: Shape, slots: int, dtype: torch.dtype, device: str) -> None:
        self.shape, self.slots, self.device, self.dtype = shape, slots, device, dtype
        self.inputs = Inputs(shape, dtype, device)

    @cached_property
    def q(self) -> Tensor:
        return self.inputs.normal(1, self.shape.heads, 1, self.shape.dim)

    @cached_property
    def caches(self) -> list[tuple[Tensor, Tensor]]:
        sizes = (1, self.shape.kv_heads, self.slots, self.shape.dim)
        return [(self.inputs.normal(*sizes), self.inputs.normal(*sizes)) for _ in range(SETS)]

    def repeated(self) -> list[tuple[Tensor, ...]]:
        per = self.shape.heads // self.shape.kv_heads
        return [tuple(y.repeat_interleave(per, 1) for y in cache) for cache in self.caches]

    def sdpa(self, repeat: str) -> Run:
        """repeat: `before`, `within`, or `folded`, the heads of a group as rows of one query."""
        groups = self.shape.kv_heads
        per = self.shape.heads // groups
        caches: list[Any] = self.repeated() if repeat == "before" else self.caches
        q = self.q.view(1, groups, per, -1) if repeat == "folded" else self.q

        def run() -> Tensor:
            for k, v in caches:
                if repeat == "within":
                    k, v = k.repeat_interleave(per, 1), v.repeat_interleave(per, 1)
                o = F.scaled_dot_product_attention(q, k, v)
            return o.view(1, self.shape.heads, 1, -1)

        return run

    def ours(self, backend: str, *, short: tuple[int, ...] = (), state: bool = False) -> Run:
        """The kernels over the caches; short: slots of each KV group where not all of them are full.

        state: a linear branch beside each, 2D features as Hedgehog has.
        """
        sizes = short or (self.slots,) * self.shape.kv_heads
        runs = [[len(list(same)), size] for size, same in itertools.groupby(sizes)]
        steps = [self._parts(k, v, runs, state) for k, v in self.caches]

        def run() -> Tensor:
            for parts in steps:
                o = ops.decode_step(self.q, parts, backend=backend)[0]
            return o

        return run

    def _parts(self, k: Tensor, v: Tensor, runs: list[list[int]], state: bool) -> list[Part]:
        parts, at, per, dim = [], 0, self.shape.heads // self.shape.kv_heads, self.shape.dim
        for count, size in runs:
            more: dict[str, Tensor] = {}
            if state:
                more["fq"] = self.inputs.normal(1, count * per, 2 * dim).softmax(-1)
                more["state"] = self.inputs.normal(1, count, 2 * dim, dim + 1, dtype=torch.float32).abs()
                more["weight"] = torch.zeros(count * per, device=self.device)
            part = slice(at, at + count)
            parts.append(Part(first=at, k=k[:, part, :size], v=v[:, part, :size], used=size, **more))
            at += count
        return parts
