"""The kernels as functions: mixed and linear attention, retention, the decode step, block selection, feature maps.

Shapes: q is (B, H, Q, D), k and v are (B, Hk, K, D), any strides with the last axis contiguous, bf16, fp16 or fp32 (or
fp64, which runs on the torch back end); sums and states are fp32. Query head h reads KV group h // (H // Hk), and what
is chosen per head is chosen per KV group. Row r of Q stands at key position r + K − Q. `backend` is `auto`, `triton`,
`cpp` or `torch`; see `dispatch`. Every argument error is a ValueError that names the argument.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import custom_ops
from .checks import check_block, check_branch, check_mixed, check_tensors, check_varlen, same, shape
from .dispatch import chosen, wanted
from .problem import Blocks, Branch, Decode, Extra, Mixed, Part, Pooled, Ranges, Softmax, Varlen

KINDS = ("hedgehog", "elu1", "relu", "softmax", "poly")


@functools.lru_cache(maxsize=1024)
def _kept(values: tuple[int, ...], device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def _numbers(values: Sequence[int], device: torch.device | str) -> Tensor:
    """int32 on the device, made once: an upload in every layer of every call would be felt."""
    if torch.compiler.is_compiling():
        return torch.tensor(values, dtype=torch.int32, device=device)
    return _kept(tuple(values), str(device))


def ranges(sizes: Sequence[int], device: torch.device | str = "cpu") -> Ranges:
    """One window per KV group, in tokens; −1 is no limit and 0 is no key.

    Raises:
        ValueError: a size is below −1.
    """
    for g, size in enumerate(sizes):
        if size < -1:
            raise ValueError(f"sizes[{g}] is {size}: expected −1 (no limit), 0 (no key) or a number of tokens")
    return Ranges(sizes=tuple(sizes), window=_numbers(sizes, device))


def branch(
    fq: Tensor,
    fk: Tensor,
    *,
    index: Sequence[int],
    shared: bool,
    weight: Tensor | None = None,
    state: Tensor | None = None,
) -> Branch:
    """A linear branch of the KV groups with index[g] ≥ 0, see `problem.Branch`."""
    groups = _numbers(index, fq.device)
    return Branch(fq=fq, fk=fk, index=tuple(index), groups=groups, shared=shared, weight=weight, state=state)


def mixed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    where: Ranges | Blocks,
    *,
    causal: bool,
    scale: float | None = None,
    valid: Tensor | None = None,
    varlen: Varlen | None = None,
    extra: Extra | None = None,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    branch: Branch | None = None,
    backend: str | None = None,
) -> Mixed:
    """Softmax over ranges or block lists, with an optional linear branch over what they leave out, in one launch.

    Differentiable in q, k, v, extra.k, extra.v, sink_logits, branch.fq, branch.fk and branch.weight; not in lse, den
    and the states. `problem` defines every argument.

    Raises:
        ValueError: an argument does not fit.
        BackendError: the back end that was asked for cannot run it.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    p = Softmax(
        q=q,
        k=k,
        v=v,
        scale=scale,
        causal=causal,
        where=where,
        valid=valid,
        varlen=varlen,
        extra=extra,
        softcap=float(softcap),
        sink_logits=sink_logits,
    )
    check_mixed(p)
    if branch is not None:
        check_branch(p, branch)
    o, lse, linear, den, state = custom_ops.mixed(*custom_ops.pack(p, branch), wanted(backend))
    separate = branch is not None and not branch.shared
    return Mixed(
        o=o,
        lse=lse,
        linear=linear if separate else None,
        den=den if separate else None,
        state=state.detach() if branch is not None and custom_ops.stateful(p) else None,
    )


def linear_attention(
    fq: Tensor,
    fk: Tensor,
    v: Tensor,
    *,
    causal: bool,
    normalize: bool = True,
    state: Tensor | None = None,
    varlen: Varlen | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention over features, see `problem.Linear`. → o (B, H, Q, D), state (B, Hk, F, D + 1) where causal.

    Differentiable in fq, fk and v. With `varlen` the states are (N, Hk, F, D + 1), one for each sequence.
    """
    check_tensors({"fq": fq, "fk": fk, "v": v}, ("fq", "fk"))
    for name, x in (("fk", fk), ("v", v)):
        same(name, x.shape[2], fk.shape[2], "keys")
    if causal:
        same("fq", fq.shape[2], fk.shape[2], "tokens where causal")
    if state is not None:
        count = fq.shape[0] if varlen is None else varlen.cu_q.shape[0] - 1
        shape("state", state, (count, fk.shape[1], fk.shape[3], v.shape[3] + 1))
    if varlen is not None:
        check_varlen(varlen, fq.shape[0])
    cu = (None, None, []) if varlen is None else (varlen.cu_q, varlen.cu_k, [varlen.max_q, varlen.max_k])
    o, _, after = custom_ops.linear(fq, fk, v, causal, normalize, state, *cu, wanted(backend))
    return o, after.detach() if causal else None


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    at: Tensor,
    window: int,
    keep: int,
    sinks: int,
    block: int,
    scale: float | None = None,
    memory: tuple[Tensor, ...] | None = None,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Sinks, recent tokens and the older ones of highest score, in fixed memory; see `problem.Retain`.

    Differentiable in q, k, v of this call and in sink_logits; what is kept is not.
    """
    check_tensors({"q": q, "k": k, "v": v}, ("q", "k", "v"))
    same("k", k.shape[2], q.shape[2], "tokens, as many as q")
    shape("at", at, (q.shape[0], q.shape[2]))
    for label, value, least in (("window", window, 1), ("keep", keep, 0), ("sinks", sinks, 0), ("block", block, 1)):
        if value < least:
            raise ValueError(f"{label} is {value}: expected at least {least}")
    if block > window:
        raise ValueError(f"block is {block}: expected at most the window, {window}")
    if memory is not None and len(memory) != 10:
        raise ValueError(f"memory has {len(memory)} tensors: expected the 10 that retention returned")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    held = [] if memory is None else list(memory)
    o, after = custom_ops.retain(
        q, k, v, at, scale, window, keep, sinks, block, held, float(softcap), sink_logits, wanted(backend)
    )
    return o, tuple(x.detach() for x in after)


def decode_step(
    q: Tensor,
    parts: Sequence[Part],
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """One new token per sequence over every kind of cache at once. q (B, H, 1, D) → (B, H, 1, D)

    The parts cover the KV groups in order: full caches, rings with sinks, kept tokens, linear states, in any mixture.
    Beside the output come the tensors that parts with `late` ask for.
    """
    if q.dim() != 4 or q.shape[2] != 1:
        raise ValueError(f"q has shape {tuple(q.shape)}: expected one token, (B, H, 1, D)")
    at = 0
    for n, part in enumerate(parts):
        if part.first != at:
            raise ValueError(f"parts[{n}].first is {part.first}: expected {at}, the parts cover the KV groups in order")
        if not 0 <= part.used <= part.k.shape[2]:
            raise ValueError(f"parts[{n}].used is {part.used}: expected 0 to {part.k.shape[2]}, the slots of its k")
        if part.mask is not None and (part.mask.shape[0] != q.shape[0] or part.mask.shape[1] < part.used):
            raise ValueError(f"parts[{n}].mask has shape {tuple(part.mask.shape)}: expected (B, at least {part.used})")
        if (part.fq is None) != (part.state is None):
            raise ValueError(f"parts[{n}] has fq or state alone: expected both or neither")
        if part.late is not None and (part.fq is not None or tuple(part.late.shape) != (q.shape[0], part.k.shape[2])):
            expected = (q.shape[0], part.k.shape[2])
            raise ValueError(f"parts[{n}].late has shape {tuple(part.late.shape)}: expected {expected} and no branch")
        at += part.k.shape[1]
    if at == 0 or q.shape[1] % at:
        raise ValueError(f"parts have {at} KV groups: expected a divisor of the {q.shape[1]} heads of q")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    p = Decode(q=q, parts=tuple(parts), scale=scale, softcap=float(softcap), sink_logits=sink_logits)
    o, received = custom_ops.decode(*custom_ops.pack_decode(p), wanted(backend))
    return o, received


@torch.no_grad()
def select_blocks(
    q: Tensor,
    k: Tensor,
    *,
    block: tuple[int, int] = (128, 64),
    keep: int | None = None,
    mass: float | None = None,
    causal: bool = False,
    first: int = 0,
    scale: float | None = None,
    backend: str | None = None,
) -> Blocks:
    """Lists of the key blocks that matter, from pooled scores; nothing of size Q × K is made. See `problem.Pooled`."""
    check_tensors({"q": q, "k": k}, ("q", "k"))
    if (keep is None) == (mass is None):
        raise ValueError(f"keep is {keep} and mass is {mass}: expected exactly one of them")
    if keep is not None and keep < 1:
        raise ValueError(f"keep is {keep}: expected at least 1 block")
    if mass is not None and not 0 < mass <= 1:
        raise ValueError(f"mass is {mass}: expected a share, above 0 and at most 1")
    check_block(block)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    p = Pooled(q=q, k=k, scale=scale, causal=causal, block=block, keep=keep, mass=mass, first=first)
    found: Blocks = chosen("select", p, q, wanted(backend)).select(p)
    return found


def feature_map(x: Tensor, kind: str, weights: Sequence[Tensor] = (), *, backend: str | None = None) -> Tensor:
    """x (B, H, S, D) → φ(x) (B, H, S, F) ≥ 0 in the dtype of x; the kinds are in `torch_maps`. Differentiable."""
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}: expected one of {', '.join(KINDS)}")
    expected = {"hedgehog": 1, "poly": 4}.get(kind, 0)
    if len(weights) != expected:
        raise ValueError(f"weights has {len(weights)} tensors: expected {expected} for {kind}")
    if kind == "hedgehog":
        shape("weights[0]", weights[0], (x.shape[1], x.shape[3], x.shape[3]))
    y: Tensor = custom_ops.features(x, kind, list(weights), wanted(backend))
    return y


__all__ = [
    "Extra",
    "Part",
    "branch",
    "decode_step",
    "feature_map",
    "linear_attention",
    "mixed_attention",
    "ranges",
    "retention",
    "select_blocks",
]
