"""Full attention, as the model had it: causal softmax over everything, or over the model's own sliding window."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import window
from .call import ROWS, Call, Cost, Shape, grouped, logits, sink_column, softmax_attention, softmax_terms
from .spec import Full, Window


@dataclass
class FullState:
    """Every key and value so far: (B, Hk, N, D)."""

    k: Tensor
    v: Tensor


def parameters(spec: Full, heads: int, kv_heads: int, dim: int) -> nn.Module | None:
    """Full attention adds nothing to learn."""
    return None


def reference(spec: Full, q: Tensor, k: Tensor, v: Tensor, call: Call, learned: nn.Module | None = None) -> Tensor:
    """The definition, dense: q (B, H, S, D), k, v (B, Hk, S, D), no state. → (B, H, S, D)"""
    i = torch.arange(q.shape[2], device=q.device)
    allowed = i[:, None] >= i  # (S, S)
    if call.limit is not None:
        allowed = allowed & (i[:, None] - i < call.limit)
    if call.valid is not None:
        allowed = allowed & call.valid[:, None, None, None, :]
    s = logits(grouped(q, k.shape[1]), k[:, :, None], call)
    number, total, _ = softmax_terms(s, allowed, v[:, :, None], sink_column(call, s))
    return (number / total.clamp_min(torch.finfo(total.dtype).tiny)).flatten(1, 2).to(q.dtype)


def attend(
    spec: Full, q: Tensor, k: Tensor, v: Tensor, call: Call, state: object = None, learned: nn.Module | None = None
) -> tuple[Tensor, object]:
    """The new tokens attend to all before them. → (B, H, Q, D), state"""
    if call.limit is not None:  # the model's own sliding window, which keeps no more than it reads
        return window.attend(Window(size=call.limit, sinks=0), q, k, v, call, state)
    if isinstance(state, FullState):
        k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
    new, total, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    plain = call.valid is None and call.softcap is None and call.sink_logits is None
    if plain and new == total and new > 1:
        wide_k, wide_v = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
        o = F.scaled_dot_product_attention(q, wide_k, wide_v, is_causal=True, scale=call.scale)
    else:
        o = _by_rows(grouped(q, k.shape[1]), k, v, call).flatten(1, 2)
    return o, FullState(k, v)


def _by_rows(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    new, total = q.shape[3], k.shape[2]
    if new == 1 and call.valid is None:
        return softmax_attention(q, k, v, None, call)
    parts = []
    for start in range(0, new, ROWS):
        stop = min(start + ROWS, new)
        reach = total - new + stop  # keys that the last of these rows may see
        i = torch.arange(total - new + start, reach, device=q.device)
        allowed = (i[:, None] >= torch.arange(reach, device=q.device))[None]
        if call.valid is not None:
            allowed = allowed & call.valid[:, None, :reach]
        parts.append(softmax_attention(q[..., start:stop, :], k[:, :, :reach], v[:, :, :reach], allowed, call))
    return torch.cat(parts, 3)


def prefill_cost(spec: Full, shape: Shape, length: int) -> Cost:
    """Of `length` tokens at once: QKᵀ and PV over the causal half."""
    pairs = length * (length + 1) / 2
    io = (2 * shape.queries + 2) * length * shape.dim * shape.element
    return Cost(flops=4 * pairs * shape.queries * shape.dim, bytes=io, state_bytes=state_size(spec, shape, length))


def decode_cost(spec: Full, shape: Shape, length: int) -> Cost:
    """Of one token after `length - 1`."""
    held = state_size(spec, shape, length)
    return Cost(flops=4 * length * shape.queries * shape.dim, bytes=held, state_bytes=held)


def state_size(spec: Full, shape: Shape, length: int) -> float:
    """Bytes cached after `length` tokens."""
    return 2 * length * shape.dim * shape.element
