"""Linear attention with learned feature maps, normalised; its memory does not grow with the length.

o_i = φ(q_i)ᵀ S_i / φ(q_i)ᵀ z_i with S_i = Σ_{j ≤ i} φ(k_j) v_jᵀ and z_i = Σ_{j ≤ i} φ(k_j), or over all j where the
call is not causal. S and z are one tensor: z is the last column, made by a column of ones beside v. The state is at
least fp32: a bf16 running sum loses terms. On a grid a depthwise convolution of v over each frame may be added.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import grid, ops
from .call import Call, Cost, Shape, grouped, refuse_limit
from .features import Hedgehog
from .masks import Layout
from .problem import EPS, Part
from .spec import Linear, Sla
from .torch_linear import with_ones

CHUNK = 128  # tokens of a chunk in the cost model: pairs inside it are computed one by one


@dataclass
class LinearState:
    """[S | z]: (B, Hk, 2D, D + 1), fp32 or wider."""

    s: Tensor


class Additions(nn.Module):
    """What `conv` and `augment` add to the feature maps `maps` (None where they are fixed).

    `conv` (H, D, k, k) weighs the values of each query head. `augment_q` and `augment_k` belong before the projections
    to q and k: the host calls them with what is projected, (…, C) with C = H · D, as all heads of the site have it.
    """

    def __init__(self, spec: Linear, heads: int, maps: Hedgehog | None, dim: int) -> None:
        super().__init__()
        self.maps = maps
        self.conv = nn.Parameter(torch.zeros(heads, dim, spec.conv, spec.conv)) if spec.conv else None
        self.augment_q = Augment(heads * dim) if spec.augment else None
        self.augment_k = Augment(heads * dim) if spec.augment else None


class Augment(nn.Module):
    """h + MLP(h), with Linear–LayerNorm–LeakyReLU–Linear whose last weights start at zero. Source: LinFusion (2024)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        first, last = nn.Linear(size, size // 2), nn.Linear(size // 2, size)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(first, nn.LayerNorm(size // 2), nn.LeakyReLU(), last)

    def forward(self, h: Tensor) -> Tensor:
        """(…, C) → (…, C) in the dtype of h"""
        more: Tensor = self.mlp(h.to(next(self.mlp.parameters()).dtype))
        return h + more.to(h.dtype)


def parameters(spec: Linear, heads: int, kv_heads: int, dim: int) -> nn.Module | None:
    """The feature maps of the query heads and of their KV heads, and what is added to them; None where all is fixed.

    With `augment`, `heads` must be all query heads of the site.
    """
    maps = Hedgehog(heads, kv_heads, dim) if spec.feature_map == "hedgehog" else None
    return Additions(spec, heads, maps, dim) if spec.conv or spec.augment else maps


def features(spec: Linear | Sla, q: Tensor, k: Tensor, learned: nn.Module | None) -> tuple[Tensor, Tensor]:
    """φ(q) (B, H, Q, F) and φ(k) (B, Hk, Q, F)"""
    maps = learned.maps if isinstance(learned, Additions) else learned
    if spec.feature_map == "hedgehog":
        assert isinstance(maps, Hedgehog)
        return maps.queries(q), maps.keys(k)
    return ops.feature_map(q, spec.feature_map), ops.feature_map(k, spec.feature_map)


def reference(spec: Linear, q: Tensor, k: Tensor, v: Tensor, call: Call, learned: nn.Module | None = None) -> Tensor:
    """The definition, dense: q (B, H, S, D), k, v (B, Hk, S, D), no state. → (B, H, S, D)"""
    fq, fk = features(spec, q, k, learned)
    a = grouped(fq, k.shape[1]) @ fk[:, :, None].transpose(-1, -2)
    a = a.tril() if call.causal else a
    if call.valid is not None:
        a = a * call.valid[:, None, None, None, :]
    total = a.sum(-1, keepdim=True)
    o = ((a @ v[:, :, None].to(a.dtype)) / (total + EPS)).flatten(1, 2).to(q.dtype)
    if not spec.conv:
        return o
    assert isinstance(learned, Additions)
    assert learned.conv is not None
    return o + plain_local(v, learned.conv, grid.layout_of(spec, k, call))


def plain_local(v: Tensor, weight: Tensor, layout: Layout) -> Tensor:
    """The definition of `local`."""
    group, size = weight.shape[0] // v.shape[1], weight.shape[-1]
    frames = grid.on_grid(layout, v).reshape(*v.shape[:2], -1, *_frame(layout), v.shape[3])
    wide = F.pad(frames, (0, 0, *[size // 2] * 4))  # (B, Hk, T, h + k − 1, w + k − 1, D)
    near = wide.unfold(3, size, 1).unfold(4, size, 1).repeat_interleave(group, 1)  # (B, H, T, h, w, D, k, k)
    found = (near * weight[:, None, None, None]).sum((-1, -2)).flatten(2, 4)
    return F.pad(found, (0, 0, layout.text_first, layout.text_last))


def attend(
    spec: Linear, q: Tensor, k: Tensor, v: Tensor, call: Call, state: object = None, learned: nn.Module | None = None
) -> tuple[Tensor, LinearState | None]:
    """The new tokens attend to all before them through the state. → (B, H, Q, D), state; None where not causal"""
    refuse_limit(call)
    layout = grid.layout_of(spec, k, call) if spec.conv else None
    fq, fk = features(spec, q, k, learned)
    fk = only(fk, call.real(call.seen, call.seen + k.shape[2]))
    before = state.s if isinstance(state, LinearState) else None
    o, s = ops.linear_attention(fq, fk, v, causal=call.causal, state=before)
    if layout is not None:
        assert isinstance(learned, Additions)
        assert learned.conv is not None
        o = o + local(v, learned.conv, layout)
    return o, None if s is None else LinearState(s)


def _frame(layout: Layout) -> tuple[int, int]:
    """Height and width of a frame; a line of tokens is a frame of height 1."""
    height, width = (1, *layout.grid)[-2:]
    return height, width


def local(v: Tensor, weight: Tensor, layout: Layout) -> Tensor:
    """The depthwise convolution of v (B, Hk, S, D) with (H, D, k, k) over each frame; 0 at text. → (B, H, S, D)"""
    (batch, groups, _, dim), size = v.shape, weight.shape[-1]
    height, width = _frame(layout)
    x = grid.on_grid(layout, v).reshape(batch, groups, -1, height, width, dim)  # (B, Hk, T, h, w, D)
    x = x.permute(0, 2, 1, 5, 3, 4).reshape(-1, groups * dim, height, width)
    kernel = weight.to(v.dtype).unflatten(0, (groups, -1)).transpose(1, 2)  # (Hk, D, G, k, k)
    y = F.conv2d(x, kernel.reshape(-1, 1, size, size), padding=size // 2, groups=groups * dim)
    y = y.reshape(batch, -1, groups, dim, weight.shape[0] // groups, height, width)  # (B, T, Hk, D, G, h, w)
    y = y.permute(0, 2, 4, 1, 5, 6, 3).reshape(batch, weight.shape[0], -1, dim)
    return F.pad(y, (0, 0, layout.text_first, layout.text_last))


def only(fk: Tensor, counts: Tensor | None) -> Tensor:
    """Features (B, Hk, K, F) of the keys that count (B, K); the others vanish from both sums."""
    return fk if counts is None else fk * counts[:, None, :, None]


def step(
    spec: Linear, q: Tensor, k: Tensor, v: Tensor, call: Call, state: object, learned: nn.Module | None = None
) -> tuple[Part, LinearState]:
    """One new token: added to the state."""
    assert isinstance(state, LinearState)
    refuse_limit(call)
    fq, fk = features(spec, q, k, learned)
    add(state.s, fk, v, None if call.valid is None else call.valid[:, -1:])
    return Part(first=0, k=k, v=v, used=0, fq=fq[:, :, 0], state=state.s), state


def fixed(spec: Linear, state: object, length: int, room: int | None) -> LinearState:
    """The state, whose shape is fixed as it is."""
    assert isinstance(state, LinearState)
    return LinearState(state.s.clone())


def fixed_step(
    spec: Linear, q: Tensor, k: Tensor, v: Tensor, call: Call, state: object, learned: nn.Module | None = None
) -> tuple[Part, LinearState]:
    """One new token at `call.at`: added to the state."""
    if call.valid is not None:
        assert call.at is not None
        call = dataclasses.replace(call, valid=call.valid.index_select(1, call.at))
    return step(spec, q, k, v, call, state, learned)


def add(s: Tensor, fk: Tensor, v: Tensor, counts: Tensor | None) -> None:
    """Adds φ(k) [v | 1] of one token, fk (B, Hk, 1, F), v (B, Hk, 1, D), to the state (B, Hk, F, D + 1), in place."""
    s += only(fk, counts).to(s.dtype).transpose(-1, -2) * with_ones(v, s.dtype)


def prefill_cost(spec: Linear, shape: Shape, length: int) -> Cost:
    """Of `length` tokens at once: feature maps, the state written and read, and where causal pairs inside chunks.

    The convolution counts on the grid; the MLPs of `augment` with the group's share of the channels.
    """
    g, d, f = shape.queries, shape.dim, _features(spec, shape)
    maps = 2 * d * d * (g + 1) * (spec.feature_map == "hedgehog")
    inside = 2 * min(CHUNK, length) * (f + d + 1) * g * shape.causal
    across = 2 * f * (d + 1) * (g + 1)
    io = (2 * g + 2) * length * d * shape.element
    flops = float(length * (maps + inside + across))
    if spec.conv:
        layout = grid.checked(spec, shape.layout, length)
        flops += 2 * spec.conv**2 * (length - layout.text) * g * d
    if spec.augment:  # C → C / 2 → C before q and before k, once for the site
        flops += 4 * (shape.groups * g * d) ** 2 * length / shape.groups
    return Cost(flops=flops, bytes=io, state_bytes=state_size(spec, shape, length))


def _features(spec: Linear, shape: Shape) -> int:
    return shape.dim * (2 if spec.feature_map == "hedgehog" else 1)


def decode_cost(spec: Linear, shape: Shape, length: int) -> Cost:
    """Of one token, whatever came before.

    Raises:
        ValueError: it has a convolution over a grid.
    """
    if spec.on_grid:
        raise grid.no_decoding(spec)
    held = state_size(spec, shape, length)
    flops = prefill_cost(spec, shape, 1).flops
    return Cost(flops=flops, bytes=2 * held, state_bytes=held)


def state_size(spec: Linear, shape: Shape, length: int) -> float:
    """Bytes of the fp32 state."""
    return shape.causal * _features(spec, shape) * (shape.dim + 1) * 4
