"""What others have for the same cases: varlen attention, FlexAttention, flash-linear-attention and NATTEN."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from cases import Inputs, Run, kept
from torch import Tensor


def missing(package: str, name: str) -> str | None:
    """Why an optional package is not measured."""
    return None if importlib.util.find_spec(package) else f"{name} is not installed"


def no_varlen() -> str | None:
    return missing("torch.nn.attention.varlen", "this torch has no varlen attention; it")


def varlen(x: Inputs, causal: bool, size: int = -1) -> Run:
    """One packed sequence through torch's varlen attention; where causal, `size` keys up to the row's own."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters  # it has changed between releases
    tokens, per = x.shape.tokens, x.shape.heads // x.shape.kv_heads
    more: dict[str, Any] = {}
    if "window_size" in known:
        more["window_size"] = ((size - 1 if size > 0 else -1), 0) if causal else (-1, -1)
    elif size > 0:
        raise RuntimeError("varlen attention of this torch has no windows")
    else:
        more["is_causal"] = causal
    k, v = x.k, x.v
    if per > 1 and "enable_gqa" in known:
        more["enable_gqa"] = True
    elif per > 1 and not x.grad:
        k, v = (y.repeat_interleave(per, 1) for y in (k, v))
    within = per > 1 and "enable_gqa" not in known and x.grad
    at = torch.tensor([0, tokens], dtype=torch.int32, device=x.device)

    def run() -> Tensor:
        keys, values = (y.repeat_interleave(per, 1) for y in (k, v)) if within else (k, v)
        packed = (y[0].transpose(0, 1) for y in (x.q, keys, values))  # (S, H, D)
        return varlen_attn(*packed, at, at, tokens, tokens, **more).transpose(0, 1)[None]

    return x.gradients(run)


@cache
def _compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(x: Inputs, mask: Any) -> Run:
    grouped = x.shape.heads != x.shape.kv_heads
    return x.gradients(lambda: _compiled()(x.q, x.k, x.v, block_mask=mask, enable_gqa=grouped))


def flex(x: Inputs, mask_mod: Callable[..., Any]) -> Run:
    """Compiled FlexAttention with a mask that is the same for all heads; making the block mask is not timed."""
    from torch.nn.attention.flex_attention import create_block_mask

    tokens = x.shape.tokens
    return _flex(x, create_block_mask(mask_mod, None, None, tokens, tokens, device=x.device, _compile=True))


def flex_window(x: Inputs, size: int, causal: bool) -> Run:
    def near(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return (q - kv < size) & ((q >= kv) if causal else (kv - q < size))

    return flex(x, near)


def flex_blocks(x: Inputs, density: float) -> Run:
    """Random lists of whole blocks of 128 × 128, for each head its own."""
    from torch.nn.attention.flex_attention import BlockMask

    count = -(-x.shape.tokens // 128)
    keep = kept(count, density)
    order = torch.rand(1, x.shape.heads, count, count, generator=x.generator, device=x.device)
    columns = order.topk(keep, -1).indices.sort(-1).values
    full = torch.zeros(order.shape, dtype=torch.int32, device=x.device)
    full[..., :keep] = columns.int()
    counts = torch.full(order.shape[:3], keep, dtype=torch.int32, device=x.device)
    none = torch.zeros_like(counts)
    tokens = x.shape.tokens
    mask = BlockMask.from_kv_blocks(none, full, counts, full, BLOCK_SIZE=128, seq_lengths=(tokens, tokens))
    return _flex(x, mask)


def fla(x: Inputs) -> Run:
    """flash-linear-attention's chunked causal linear attention, with our features; the groups' heads are repeated."""
    from fla.ops.linear_attn import chunk_linear_attn

    per = x.shape.heads // x.shape.kv_heads
    fq, fk = x.features

    def repeated(y: Tensor) -> Tensor:
        return y.repeat_interleave(per, 1) if per > 1 else y

    k, v = (fk, x.v) if x.grad else (repeated(fk).contiguous(), repeated(x.v).contiguous())

    def run() -> Tensor:
        keys, values = (repeated(k), repeated(v)) if x.grad else (k, v)
        turned = (y.transpose(1, 2) for y in (fq, keys, values))  # (1, S, H, D)
        return chunk_linear_attn(*turned, scale=1.0, normalize=True)[0].transpose(1, 2)

    return x.gradients(run, (fq, fk, x.v))


def natten(x: Inputs, window: tuple[int, ...]) -> Run:
    """Neighbourhood attention over the tokens of the grid alone."""
    import natten as library

    function = {2: library.na2d, 3: library.na3d}[len(window)]
    q, k, v = (y[:, :, x.shape.text :].transpose(1, 2).unflatten(1, x.shape.grid) for y in (x.q, x.k, x.v))
    return lambda: function(q, k, v, kernel_size=window)
