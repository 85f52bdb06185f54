"""Softmax attention over block lists in torch: the listed keys of each query block are gathered."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import Blocks, Branch, Softmax
from .torch_linear import wide, with_ones
from .torch_softmax import Terms, logits, terms


def listed_terms(p: Softmax, where: Blocks, branch: Branch | None) -> tuple[Terms, Tensor | None]:
    """The softmax over the lists, and the sums A (B, Ht, G, Q, D + 1) of the branch over the blocks not listed."""
    bq, _ = where.block
    q = p.q.unflatten(1, (p.k.shape[1], -1))  # (B, Hk, G, Q, D)
    found, far = [], []
    rest = None if branch is None else _Rest(p, where, branch)
    for n in range(where.counts.shape[-1]):
        rows = slice(n * bq, min((n + 1) * bq, q.shape[3]))
        columns, kinds, there = _list(where, n)
        if columns.shape[-1] == 0:
            zero = q.new_zeros(q[..., rows, :].shape, dtype=torch.promote_types(q.dtype, torch.float32))
            found.append(Terms(zero, zero[..., :1], zero[..., :1]))
        else:
            found.append(_block(p, where, q[..., rows, :], rows, columns, kinds, there))
        if rest is not None:
            far.append(rest.of(rows, columns, there))
    if not found:
        zero = q.new_zeros(q.shape, dtype=torch.promote_types(q.dtype, torch.float32))
        return Terms(zero, zero[..., :1], zero[..., :1]), None if rest is None else zero.new_zeros(rest.shape)
    whole = Terms(*(torch.cat([getattr(x, name) for x in found], 3) for name in ("number", "total", "top")))
    return whole, torch.cat(far, 3) if far else None


def _list(where: Blocks, n: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Key blocks of query block n, their kinds and which of them are there: (Bl, Hl, M), M the longest list."""
    starts, counts = where.starts[..., n].long(), where.counts[..., n].long()
    slot = torch.arange(int(counts.max()) if counts.numel() else 0, device=starts.device)
    there = slot < counts[..., None]
    at = (starts[..., None] + slot).clamp(max=max(0, where.columns.numel() - 1))
    columns = torch.where(there, where.columns[at].long(), 0) if where.columns.numel() else at
    kinds = None if where.kinds is None or not where.columns.numel() else torch.where(there, where.kinds[at].long(), -1)
    return columns, kinds, there


def _block(
    p: Softmax, where: Blocks, q: Tensor, rows: slice, columns: Tensor, kinds: Tensor | None, there: Tensor
) -> Terms:
    """One query block q (B, Hk, G, C, D) over its listed blocks (Bl, Hl, M)."""
    bk, keys, (batch, heads) = where.block[1], p.k.shape[2], p.k.shape[:2]
    index = columns[..., None] * bk + torch.arange(bk, device=columns.device)  # (Bl, Hl, M, bk)
    allowed = (there[..., None] & (index < keys))[:, :, :, None]  # (Bl, Hl, M, 1, bk)
    index = index.clamp(max=keys - 1)
    i = torch.arange(rows.start, rows.stop, device=columns.device) + keys - p.q.shape[2]
    if p.causal:
        allowed = allowed & (index[:, :, :, None] <= i[:, None])
    if kinds is not None and where.patterns is not None:
        bits = _bits(where.patterns, bk)[kinds.clamp(min=0)][..., : rows.stop - rows.start, :]
        allowed = allowed & (bits | (kinds < 0)[..., None, None])
    allowed = allowed.expand(-1, -1, -1, rows.stop - rows.start, -1).transpose(2, 3).flatten(3)  # (Bl, Hl, C, M·bk)
    flat = index.flatten(2).expand(batch, heads, -1)
    allowed = allowed.expand(batch, heads, -1, -1)
    if p.valid is not None:
        allowed = allowed & p.valid[:, None].expand(-1, heads, -1).gather(2, flat)[:, :, None]
    k, v = (x.gather(2, flat[..., None].expand(-1, -1, -1, x.shape[-1])) for x in (p.k, p.v))
    return terms(logits(q, k[:, :, None], p.scale, p.softcap), allowed[:, :, None], v[:, :, None])


def _bits(patterns: Tensor, bk: int) -> Tensor:
    """(U, bq, bk // 32) int32 → (U, bq, bk) bool"""
    word = torch.arange(bk, device=patterns.device)
    return ((patterns[..., word // 32] >> (word % 32)) & 1).bool()


class _Rest:
    """The linear branch over the key blocks that a list does not name, from the sums of every key block."""

    def __init__(self, p: Softmax, where: Blocks, branch: Branch) -> None:
        groups = [g for g, t in sorted(enumerate(branch.index), key=lambda x: x[1]) if t >= 0]
        self.p, self.groups, self.bk = p, groups, where.block[1]
        self.fq = wide(branch.fq).unflatten(1, (len(groups), -1))  # (B, Ht, G, Q, F)
        fk, v = wide(branch.fk), with_ones(p.v[:, groups], self.fq.dtype)
        pad = -fk.shape[2] % self.bk
        fk, v = (F.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, self.bk)) for x in (fk, v))
        self.sums = fk.transpose(-1, -2) @ v  # (B, Ht, NK, F, D + 1)
        self.shape = (*self.fq.shape[:-1], v.shape[-1])

    def of(self, rows: slice, columns: Tensor, there: Tensor) -> Tensor:
        """A (B, Ht, G, C, D + 1) of these rows."""
        blocks = torch.arange(self.sums.shape[2], device=columns.device)
        left = torch.ones(*columns.shape[:2], len(blocks), dtype=torch.bool, device=columns.device)
        left = left & ~((columns[..., None] == blocks) & there[..., None]).any(2)  # (Bl, Hl, NK)
        if self.p.causal:
            first = rows.start + self.p.k.shape[2] - self.p.q.shape[2]
            left = left & ((blocks + 1) * self.bk <= first)
        left = left.expand(self.p.k.shape[0], self.p.k.shape[1], -1)[:, self.groups].to(self.sums.dtype)
        state = torch.einsum("bhn,bhnfe->bhfe", left, self.sums)
        a: Tensor = self.fq[..., rows, :] @ state[:, :, None]
        return a
