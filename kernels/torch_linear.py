"""Linear attention in torch: causal by chunks with a carried state, and non-causal by one reduction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import EPS, Linear, Varlen

CHUNK = 128


def linear(p: Linear) -> tuple[Tensor, Tensor, Tensor | None]:
    """o (B, H, Q, D) in the dtype of v, den (B, H, Q) and the state after the last token (None where not causal)."""
    if p.varlen is not None:
        return _packed(p, p.varlen)
    fq = wide(p.fq).unflatten(1, (p.fk.shape[1], -1))  # (B, Hk, G, Q, F)
    a, state = sums(fq, wide(p.fk), with_ones(p.v, fq.dtype), p.causal, p.state)
    number, den = a[..., :-1], a[..., -1]
    o = number / (den[..., None] + EPS) if p.normalize else number
    return o.flatten(1, 2).to(p.v.dtype), den.flatten(1, 2), state


def _packed(p: Linear, varlen: Varlen) -> tuple[Tensor, Tensor, Tensor | None]:
    parts, n = [], varlen.cu_q.numel() - 1
    for i in range(n):
        rows, keys = (slice(int(c[i]), int(c[i + 1])) for c in (varlen.cu_q, varlen.cu_k))
        state = None if p.state is None else p.state[i : i + 1]
        one = Linear(
            fq=p.fq[:, :, rows],
            fk=p.fk[:, :, keys],
            v=p.v[:, :, keys],
            causal=p.causal,
            normalize=p.normalize,
            state=state,
        )
        parts.append(linear(one))
    o, den = torch.cat([part[0] for part in parts], 2), torch.cat([part[1] for part in parts], 2)
    states = [state for _, _, state in parts if state is not None]
    return o, den, torch.cat(states, 0) if states else None


def wide(x: Tensor) -> Tensor:
    """In at least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def with_ones(v: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, Hk, K, D + 1): v and a column of ones, which sums the features."""
    return F.pad(v.to(dtype), (0, 1), value=1.0)


def sums(fq: Tensor, fk: Tensor, v: Tensor, causal: bool, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Σ φ(q_i)·φ(k_j) v_j over j ≤ i, or over all j. fq (B, Hk, G, Q, F), fk (B, Hk, K, F), v (B, Hk, K, E).

    → (B, Hk, G, Q, E), the state (B, Hk, F, E) after the last token where causal.
    """
    start = None if state is None else state.to(fq.dtype)
    if causal:
        return scan(fq, fk, v, start)
    total = fk.transpose(-1, -2) @ v
    total = total if start is None else total + start
    return fq @ total[:, :, None], None


def scan(fq: Tensor, fk: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The causal sums, in chunks; shapes as in `sums`, Q = K."""
    new = v.shape[2]
    if new == 0:
        empty = fk.new_zeros(*fk.shape[:2], fk.shape[-1], v.shape[-1]) if state is None else state
        return fq.new_zeros(*fq.shape[:-1], v.shape[-1]), empty
    chunk = min(CHUNK, new)
    count = -(-new // chunk)
    pad = count * chunk - new
    fq = F.pad(fq, (0, 0, 0, pad)).unflatten(3, (count, chunk)).transpose(2, 3)  # (B, Hk, n, G, C, F)
    fk, v = (F.pad(x, (0, 0, 0, pad)).unflatten(2, (count, chunk)) for x in (fk, v))  # (B, Hk, n, C, ·)
    through = (fk.transpose(-1, -2) @ v).cumsum(2)  # (B, Hk, n, F, E), with each chunk
    through = through if state is None else through + state[:, :, None]
    first = torch.zeros_like(through[:, :, :1]) if state is None else state[:, :, None]
    before = torch.cat([first, through[:, :, :-1]], 2)
    group = fq.shape[3]
    inside = (fq @ fk[:, :, :, None].transpose(-1, -2)).tril()  # (B, Hk, n, G, C, C)
    o = inside.flatten(3, 4) @ v + fq.flatten(3, 4) @ before
    o = o.unflatten(3, (group, chunk)).transpose(2, 3).flatten(3, 4)
    return o[..., :new, :], through[:, :, -1]


def delayed(fq: Tensor, fk: Tensor, v: Tensor, delay: int, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Causal sums over keys that count `delay` positions late: j ≤ i − delay. The last Q of the K keys are the rows'.

    fq (B, Hk, G, Q, F), fk (B, Hk, K, F), v (B, Hk, K, E). → (B, Hk, G, Q, E) and the state after the last of them.
    """
    new, keys = fq.shape[3], fk.shape[2]
    first = keys - new - delay  # the key that counts from the first row on
    fk, v = (x[:, :, : max(0, keys - delay)] for x in (fk, v))
    if first > 0:  # these count for every row
        early = fk[:, :, :first].transpose(-1, -2) @ v[:, :, :first]
        state = early if state is None else early + state
        fk, v = fk[:, :, first:], v[:, :, first:]
    missing = new - fk.shape[2]
    fk, v = (F.pad(x, (0, 0, missing, 0)) for x in (fk, v))
    return scan(fq, fk, v, state)
