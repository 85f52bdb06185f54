"""Mixed attention in torch: softmax over ranges or block lists, and the linear branch over what they leave out."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .problem import EPS, Blocks, Branch, Mixed, Ranges, Softmax, Varlen
from .torch_linear import delayed, sums, wide, with_ones
from .torch_lists import listed_terms
from .torch_softmax import Terms, add_sink, range_terms


def mixed(p: Softmax, branch: Branch | None) -> Mixed:
    """The definition in `problem`, differentiable."""
    if p.varlen is not None:
        return _packed(p, branch, p.varlen)
    if isinstance(p.where, Ranges):
        parts = [range_terms(p, groups) for groups in _alike(p.where.sizes)]
        order = [g for groups in _alike(p.where.sizes) for g in groups]
        terms = _reorder(parts, order)
        covered = None
    else:
        terms, covered = listed_terms(p, p.where, branch)
    terms = add_sink(terms, p.sink_logits)
    if branch is None:
        return _finish(p, terms)
    tail, state = _tail(p, branch, covered)
    if branch.shared:
        return dataclasses.replace(_finish(p, _join(terms, tail, branch)), state=state)
    number, den = tail[..., :-1], tail[..., -1]
    linear = (number / (den[..., None] + EPS)).flatten(1, 2).to(p.q.dtype)
    return dataclasses.replace(_finish(p, terms), linear=linear, den=den.flatten(1, 2), state=state)


def _alike(sizes: tuple[int, ...]) -> list[list[int]]:
    """KV groups with the same window, together."""
    return [[g for g, s in enumerate(sizes) if s == size] for size in dict.fromkeys(sizes)]


def _reorder(parts: list[Terms], order: list[int]) -> Terms:
    if len(parts) == 1:
        return parts[0]
    back = torch.tensor([order.index(g) for g in range(len(order))], device=parts[0].number.device)
    together = (torch.cat([getattr(x, name) for x in parts], 1)[:, back] for name in ("number", "total", "top"))
    return Terms(*together)


def _finish(p: Softmax, terms: Terms) -> Mixed:
    """Numerators (B, Hk, G, Q, D), denominators and maxima (B, Hk, G, Q, 1) → outputs."""
    some = terms.total > 0
    o = torch.where(some, terms.number / torch.where(some, terms.total, 1.0), 0.0)
    lse = torch.where(some, terms.top + torch.log(torch.where(some, terms.total, 1.0)), -torch.inf)
    return Mixed(o=o.flatten(1, 2).to(p.q.dtype), lse=lse.squeeze(-1).flatten(1, 2))


def _tail(p: Softmax, branch: Branch, covered: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A of the branch's groups (B, Ht, G, Q, D + 1) and the state after it."""
    groups = [g for g, t in sorted(enumerate(branch.index), key=lambda x: x[1]) if t >= 0]
    fq = wide(branch.fq).unflatten(1, (len(groups), -1))  # (B, Ht, G, Q, F)
    fk, v = wide(branch.fk), with_ones(p.v[:, groups], fq.dtype)
    if isinstance(p.where, Blocks):
        assert covered is not None
        return covered, None
    if not p.causal:
        return _far(p, p.where, groups, fq, fk, v), None
    parts, states = [], []
    start = None if branch.state is None else branch.state.to(fq.dtype)
    for t, g in enumerate(groups):
        size = p.where.sizes[g]
        if size < 0:
            raise ValueError(f"window of KV group {g} is −1, no limit: a linear branch beside it has nothing to cover")
        one = slice(t, t + 1)
        a, s = delayed(fq[:, one], fk[:, one], v[:, one], size, None if start is None else start[:, one])
        parts.append(a)
        states.append(s)
    return torch.cat(parts, 1), torch.cat(states, 1)


def _far(p: Softmax, where: Ranges, groups: list[int], fq: Tensor, fk: Tensor, v: Tensor) -> Tensor:
    """All keys at a distance of the window or more, to both sides."""
    i = torch.arange(p.q.shape[2], device=p.q.device) + p.k.shape[2] - p.q.shape[2]
    distance = (i[:, None] - torch.arange(p.k.shape[2], device=p.q.device)).abs()
    far = torch.stack([distance >= where.sizes[g] if where.sizes[g] >= 0 else distance < 0 for g in groups])
    a = (fq @ fk[:, :, None].transpose(-1, -2)) * far[None, :, None]
    return a @ v[:, :, None]


def _join(terms: Terms, tail: Tensor, branch: Branch) -> Terms:
    """The tail under the normaliser of the softmax part, both shifted by the same number."""
    assert branch.weight is not None
    where = [g for g, t in sorted(enumerate(branch.index), key=lambda x: x[1]) if t >= 0]
    c = branch.weight.to(tail.dtype).reshape(1, *tail.shape[1:3], 1, 1)
    there = torch.where(tail[..., -1:] > 0, c, torch.full_like(c, -torch.inf))  # a tail of 0 shifts nothing
    # the maximum is only a shift: its gradient is none
    top = terms.top[:, where]
    shift = torch.maximum(torch.where(terms.total[:, where] > 0, top, torch.full_like(top, -torch.inf)), there).detach()
    shift = torch.where(torch.isfinite(shift), shift, torch.zeros_like(shift))
    near, far = (
        torch.exp(torch.where(terms.total[:, where] > 0, top - shift, 0.0)),
        torch.exp((c - shift).clamp(max=60)),
    )
    number = terms.number[:, where] * near + tail[..., :-1] * far
    total = terms.total[:, where] * near + tail[..., -1:] * far
    if where == list(range(len(branch.index))):
        return Terms(number, total, shift)
    index = torch.tensor(where, device=tail.device)
    changed = zip((terms.number, terms.total, terms.top), (number, total, shift), strict=True)
    return Terms(*(old.index_copy(1, index, new) for old, new in changed))


def _packed(p: Softmax, branch: Branch | None, varlen: Varlen) -> Mixed:
    """One sequence at a time."""
    parts = []
    for n in range(varlen.cu_q.numel() - 1):
        rows, keys = (slice(int(c[n]), int(c[n + 1])) for c in (varlen.cu_q, varlen.cu_k))
        where = p.where
        if isinstance(where, Blocks) and where.starts.shape[0] > 1:
            where = dataclasses.replace(where, starts=where.starts[n : n + 1], counts=where.counts[n : n + 1])
        one = dataclasses.replace(
            p,
            q=p.q[:, :, rows],
            k=p.k[:, :, keys],
            v=p.v[:, :, keys],
            valid=None if p.valid is None else p.valid[:, keys],
            where=where,
            varlen=None,
        )
        tail = branch
        if branch is not None:
            state = None if branch.state is None else branch.state[n : n + 1]
            tail = dataclasses.replace(branch, fq=branch.fq[:, :, rows], fk=branch.fk[:, :, keys], state=state)
        parts.append(mixed(one, tail))

    def joined(name: str) -> Tensor | None:
        found = [getattr(x, name) for x in parts]
        return None if found[0] is None else torch.cat(found, 2)

    o, lse = joined("o"), joined("lse")
    assert o is not None
    assert lse is not None
    return Mixed(o=o, lse=lse, linear=joined("linear"), den=joined("den"))


__all__ = ["mixed", "sums"]
