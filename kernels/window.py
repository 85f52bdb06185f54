"""Sliding window with sink tokens: softmax over the last `size` tokens and the first `sinks` real ones.

The fast version cuts the new tokens into blocks; each block reads one band of keys and the sinks, so the work and the
memory grow with S × size. What is kept between calls is a ring of `size` keys and values and the sinks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .call import Call, Cost, Shape, grouped, logits, sink_column, softmax_attention, softmax_terms
from .spec import Window

BLOCK = 128  # query rows of a block; 64–256 measure alike on CPU
BLOCKS = 64  # blocks computed at once, which bounds the memory of their masks and logits


@dataclass
class WindowState:
    """The last `size` tokens (B, Hk, R ≤ size, D) and the sinks (B, Hk, sinks, D) with positions, −1 = not yet."""

    k: Tensor
    v: Tensor
    sink_k: Tensor
    sink_v: Tensor
    sink_at: Tensor  # (B, sinks)


def parameters(spec: Window, heads: int, kv_heads: int, dim: int) -> nn.Module | None:
    """A window adds nothing to learn."""
    return None


def sink_positions(call: Call, batch: int, length: int, sinks: int, device: torch.device) -> Tensor:
    """(B, sinks): where the first real tokens of each row stand among the `length` seen; −1 = fewer are there."""
    if call.valid is None:
        at = torch.arange(sinks, device=device).expand(batch, -1)
        return torch.where(at < length, at, -1)
    valid = call.valid[:, :length]
    is_slot = valid[:, None] & (valid.long().cumsum(-1)[:, None] == torch.arange(1, sinks + 1, device=device)[:, None])
    return torch.where(is_slot.any(-1), is_slot.long().argmax(-1), -1)


def allowed_pairs(spec: Window, call: Call, batch: int, length: int, device: torch.device) -> Tensor:
    """(1 or B, S, S) dense mask of the definition, for references and profiling."""
    i = torch.arange(length, device=device)
    size = spec.size if call.limit is None else min(spec.size, call.limit)
    distance = i[:, None] - i
    near = ((distance >= 0) & (distance < size))[None]
    sink_at = sink_positions(call, batch if call.valid is not None else 1, length, spec.sinks, device)
    is_sink = (sink_at[:, :, None] == i).any(1)  # (B, S)
    allowed = near | (is_sink[:, None] & (distance >= 0))
    return allowed if call.valid is None else allowed & call.valid[:, None, :length]


def reference(spec: Window, q: Tensor, k: Tensor, v: Tensor, call: Call, learned: nn.Module | None = None) -> Tensor:
    """The definition, dense: q (B, H, S, D), k, v (B, Hk, S, D), no state. → (B, H, S, D)"""
    allowed = allowed_pairs(spec, call, q.shape[0], q.shape[2], q.device)[:, None, None]
    s = logits(grouped(q, k.shape[1]), k[:, :, None], call)
    number, total, _ = softmax_terms(s, allowed, v[:, :, None], sink_column(call, s))
    return (number / total.clamp_min(torch.finfo(total.dtype).tiny)).flatten(1, 2).to(q.dtype)


def update_sinks(
    k: Tensor, v: Tensor, call: Call, state: WindowState | None, sinks: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The sinks after the new tokens: keys and values (B, Hk, sinks, D), positions (B, sinks)."""
    batch, heads, new, dim = k.shape
    at = sink_positions(call, batch, call.seen + new, sinks, k.device)
    if state is not None and bool((state.sink_at >= 0).all()):
        return state.sink_k, state.sink_v, state.sink_at
    fresh = at >= call.seen  # found among the new tokens
    index = (at - call.seen).clamp(min=0)[:, None, :, None].expand(-1, heads, -1, dim)
    picked = []
    for x, old in ((k, state.sink_k if state else None), (v, state.sink_v if state else None)):
        held = torch.zeros_like(x[:, :, :1]).expand(-1, -1, sinks, -1) if old is None else old
        picked.append(torch.where(fresh[:, None, :, None], x.gather(2, index), held))
    return picked[0], picked[1], at


def attend(
    spec: Window, q: Tensor, k: Tensor, v: Tensor, call: Call, state: object = None, learned: nn.Module | None = None
) -> tuple[Tensor, WindowState]:
    """The new tokens attend to their windows and the sinks. → (B, H, Q, D), state"""
    state = state if isinstance(state, WindowState) else None
    size = spec.size if call.limit is None else min(spec.size, call.limit)
    band_k, band_v, sinks = extend(k, v, call, state, spec.sinks)
    held = band_k.shape[2] - k.shape[2]
    parts = []
    for block in blocks(grouped(q, k.shape[1]), band_k, band_v, sinks, held, size, call):
        o = softmax_attention(block.q, block.k, block.v, block.allowed, call)
        parts.append(block.restore(o))
    o = torch.cat(parts, 3)[..., : q.shape[2], :].flatten(1, 2)
    return o, WindowState(keep_last(band_k, spec.size), keep_last(band_v, spec.size), *sinks)


def extend(
    k: Tensor, v: Tensor, call: Call, state: WindowState | None, sinks: int
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The ring followed by the new tokens (B, Hk, R + Q, D), and the sinks after them."""
    kept = update_sinks(k, v, call, state, sinks)
    if state is None:
        return k, v, kept
    return torch.cat([state.k, k], 2), torch.cat([state.v, v], 2), kept


def keep_last(x: Tensor, size: int) -> Tensor:
    """The last `size` tokens, in memory of their own: a view would keep the whole prompt alive."""
    return x if x.shape[2] <= size else x[:, :, -size:].clone()


@dataclass
class Block:
    """Some query blocks folded into the batch: q (B·n, Hk, G, C, D), k, v (B·n, Hk, K, D), allowed (B·n, C, K)."""

    q: Tensor
    k: Tensor
    v: Tensor
    allowed: Tensor
    count: int

    def restore(self, o: Tensor) -> Tensor:
        """(B·n, Hk, G, C, D) → (B, Hk, G, n·C, D)"""
        o = o.unflatten(0, (-1, self.count))
        return o.permute(0, 2, 3, 1, 4, 5).flatten(3, 4)


def blocks(
    q: Tensor, k: Tensor, v: Tensor, sinks: tuple[Tensor, Tensor, Tensor], held: int, size: int, call: Call
) -> list[Block]:
    """Cut q (B, Hk, G, Q, D) into blocks of rows, each with the band of keys and the sinks that its rows may read.

    k, v (B, Hk, held + Q, D) hold the `held` tokens before the new ones. Rows are padded to whole blocks at the end.
    """
    batch, new, device = q.shape[0], q.shape[3], q.device
    rows = min(BLOCK, new)
    count = -(-new // rows)
    left, right = max(0, size - 1 - held), count * rows - new  # band position 0 is absolute position `origin`
    skip = max(0, held - (size - 1))
    origin = call.seen - held + skip - left
    q = F.pad(q, (0, 0, 0, right))
    k, v = (F.pad(x[:, :, skip:], (0, 0, left, right)) for x in (k, v))
    sink_k, sink_v, sink_at = sinks
    sink_at = sink_at if call.valid is not None else sink_at[:1]
    result = []
    for first in range(0, count, BLOCKS):
        n = min(BLOCKS, count - first)
        band = slice(first * rows, (first + n) * rows + size - 1)
        i = origin + size - 1 + first * rows + torch.arange(n * rows, device=device).view(1, n, rows, 1)
        p = i[:, :, :1] - (size - 1) + torch.arange(rows + size - 1, device=device)  # (1, n, 1, L) key positions
        near = (p <= i) & (p > i - size) & (p >= 0)
        if call.valid is not None:
            real = F.pad(call.valid, (max(0, -origin), right))[:, max(0, origin) :][:, band]
            near = near & real.unfold(1, rows + size - 1, rows)[:, :, None]
        far = (sink_at[:, None, None] >= 0) & (sink_at[:, None, None] <= i - size)
        allowed = torch.cat([far.expand(near.shape[0], -1, -1, -1), near], -1)
        fold_q = q[:, :, :, first * rows : (first + n) * rows].unflatten(3, (n, rows)).permute(0, 3, 1, 2, 4, 5)
        fold_k, fold_v = (
            torch.cat([s[:, None].expand(-1, n, -1, -1, -1), _bands(x[:, :, band], rows, size)], 3).flatten(0, 1)
            for x, s in ((k, sink_k), (v, sink_v))
        )
        allowed = allowed.expand(batch, -1, -1, -1).flatten(0, 1)
        result.append(Block(fold_q.flatten(0, 1), fold_k, fold_v, allowed, n))
    return result


def _bands(x: Tensor, rows: int, size: int) -> Tensor:
    """(B, Hk, n·rows + size − 1, D) → (B, n, Hk, rows + size − 1, D): overlapping bands, one per block."""
    return x.unfold(2, rows + size - 1, rows).permute(0, 2, 1, 4, 3)


def prefill_cost(spec: Window, shape: Shape, length: int) -> Cost:
    """Of `length` tokens at once: the pairs of the definition; sinks count once they have left the window."""
    near = min(spec.size, length)
    pairs = near * (near + 1) / 2 + (length - near) * spec.size
    pairs += sum(max(0, length - spec.size - sink) for sink in range(spec.sinks))
    io = (2 * shape.queries + 2) * length * shape.dim * shape.element
    return Cost(flops=4 * pairs * shape.queries * shape.dim, bytes=io, state_bytes=state_size(spec, shape, length))


def decode_cost(spec: Window, shape: Shape, length: int) -> Cost:
    """Of one token after `length - 1`."""
    keys = min(length, spec.size) + min(spec.sinks, max(0, length - spec.size))
    held = state_size(spec, shape, length)
    return Cost(flops=4 * keys * shape.queries * shape.dim, bytes=held, state_bytes=held)


def state_size(spec: Window, shape: Shape, length: int) -> float:
    """Bytes cached after `length` tokens: the ring and the sinks."""
    return 2 * (min(length, spec.size) + spec.sinks) * shape.dim * shape.element
