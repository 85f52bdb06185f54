"""Full attention, as the model had it: softmax over everything (before a row where causal), or over its own window."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import window
from .call import Call, Cost, Shape, dense
from .launch import Piece
from .problem import Part
from .spec import Full, Window
from .window import WindowState

SLACK = 64  # a cache grows by 1 / SLACK of its length, and by LEAST tokens at least
LEAST = 16


@dataclass
class FullState:
    """Every key and value so far: k, v (B, Hk, capacity, D), of which the first `length` slots are filled."""

    k: Tensor
    v: Tensor
    length: int


def parameters(spec: Full, heads: int, kv_heads: int, dim: int) -> nn.Module | None:
    """Full attention adds nothing to learn."""
    return None


def reference(spec: Full, q: Tensor, k: Tensor, v: Tensor, call: Call, learned: nn.Module | None = None) -> Tensor:
    """The definition, dense: q (B, H, S, D), k, v (B, Hk, S, D), no state. → (B, H, S, D)"""
    i = torch.arange(q.shape[2], device=q.device)
    distance = i[:, None] - i  # (S, S)
    allowed = call.reach(distance)
    if call.limit is not None:
        allowed = allowed & (distance.abs() < call.limit)
    if call.valid is not None:
        allowed = allowed & call.valid[:, None, None, None, :]
    return dense(q, k, v, call, allowed)


def piece(
    spec: Full, q: Tensor, k: Tensor, v: Tensor, call: Call, state: object = None, learned: nn.Module | None = None
) -> Piece:
    """The new tokens attend to all before them, and where not causal to all."""
    if call.limit is not None:  # the model's own sliding window, which keeps no more than it reads
        return window.piece(Window(size=call.limit, sinks=0), q, k, v, call, state)
    if isinstance(state, FullState):
        k, v = (torch.cat([old[:, :, : state.length], new], 2) for old, new in ((state.k, k), (state.v, v)))
    return Piece(k=k, v=v, size=-1, valid=call.valid, state=_grown(k, v, k.shape[2]) if call.keep else None)


def _grown(k: Tensor, v: Tensor, length: int) -> FullState:
    """A cache of its own with room for more: a view would keep the tensors of other heads alive."""
    more = max(LEAST, length // SLACK)
    k, v = (torch.cat([x[:, :, :length], x.new_empty(*x.shape[:2], more, x.shape[3])], 2) for x in (k, v))
    return FullState(k, v, length)


def extended(old: FullState | None, k: Tensor, v: Tensor) -> FullState:
    """The cache with the new keys and values (B, Hk, Q, D) behind those it has, written into where it has room."""
    if old is None:
        return _grown(k, v, k.shape[2])
    n, total = old.length, old.length + k.shape[2]
    if total <= old.k.shape[2] and not torch.is_grad_enabled():  # autograd may hold the cache as it was
        old.k[:, :, n:total], old.v[:, :, n:total] = k, v
        return FullState(old.k, old.v, total)
    more = max(LEAST, total // SLACK)
    both = ((old.k, k), (old.v, v))
    k, v = (torch.cat([x[:, :, :n], new, new.new_empty(*new.shape[:2], more, new.shape[3])], 2) for x, new in both)
    return FullState(k, v, total)


def step(
    spec: Full, q: Tensor, k: Tensor, v: Tensor, call: Call, state: object, learned: nn.Module | None = None
) -> tuple[Part, object]:
    """One new token: written into the cache, which grows when it is full."""
    if call.limit is not None:
        return window.step(Window(size=call.limit, sinks=0), q, k, v, call, state)
    assert isinstance(state, FullState)
    n = state.length
    if n == state.k.shape[2]:
        state = _grown(state.k, state.v, n)
    state.k[:, :, n], state.v[:, :, n] = k[:, :, 0], v[:, :, 0]
    state = FullState(state.k, state.v, n + 1)
    return Part(first=0, k=state.k, v=state.v, used=n + 1, mask=call.valid), state


def fixed(spec: Full, state: object, length: int, room: int | None) -> object:
    """The state after `length` tokens, with room for `room`."""
    if isinstance(state, WindowState):
        return window.fixed(Window(size=1), state, length, room)
    assert isinstance(state, FullState)
    if room is None:
        raise ValueError("full attention needs a static cache that says for how many tokens it is")
    k, v = (F.pad(x[:, :, :length], (0, 0, 0, room - length)) for x in (state.k, state.v))
    return FullState(k, v, room)


def moving(spec: Full, state: object, length: int) -> object:
    """The inverse."""
    return dataclasses.replace(state, length=length) if isinstance(state, FullState) else state


def fixed_step(
    spec: Full, q: Tensor, k: Tensor, v: Tensor, call: Call, state: object, learned: nn.Module | None = None
) -> tuple[Part, object]:
    """One new token at `call.at`: written into its slot."""
    if call.limit is not None:
        return window.fixed_step(Window(size=call.limit, sinks=0), q, k, v, call, state)
    assert isinstance(state, FullState)
    assert call.at is not None
    state.k.index_copy_(2, call.at, k)
    state.v.index_copy_(2, call.at, v)
    room = state.k.shape[2]
    mask = (torch.arange(room, device=k.device) <= call.at).expand(k.shape[0], -1)
    mask = mask if call.valid is None else mask & call.valid
    return Part(first=0, k=state.k, v=state.v, used=room, mask=mask), state


def prefill_cost(spec: Full, shape: Shape, length: int) -> Cost:
    """Of `length` tokens at once: QKᵀ and PV, over the half before each row where causal."""
    pairs = length * (length + 1) / 2 if shape.causal else length**2
    io = (2 * shape.queries + 2) * length * shape.dim * shape.element
    return Cost(flops=4 * pairs * shape.queries * shape.dim, bytes=io, state_bytes=state_size(spec, shape, length))


def decode_cost(spec: Full, shape: Shape, length: int) -> Cost:
    """Of one token after `length - 1`."""
    held = state_size(spec, shape, length)
    return Cost(flops=4 * length * shape.queries * shape.dim, bytes=held, state_bytes=held)


def state_size(spec: Full, shape: Shape, length: int) -> float:
    """Bytes cached after `length` tokens."""
    return 2 * shape.causal * length * shape.dim * shape.element
