"""The kernels as PyTorch operators, so that autograd, torch.compile and torch.export see through to shapes only.

Operators take tensors and numbers; `Softmax` and the other descriptions are packed here into such arguments and built
again on the other side. The namespace is the module's own, so that the copy of this file in an exported checkpoint and
an installed attnconvert can live in one process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import torch_retain
from .backend_torch import recording
from .dispatch import chosen
from .problem import (
    Blocks,
    Branch,
    Decode,
    Extra,
    Linear,
    Mixed,
    Part,
    Ranges,
    Retain,
    Softmax,
    Varlen,
)

_OWN = __name__ == "attnconvert.kernels.custom_ops"
NAMESPACE = "attnconvert" if _OWN else "attnconvert_" + hashlib.sha1(__name__.encode()).hexdigest()[:8]
LISTS = ("starts", "counts", "columns", "kinds", "patterns", "t_starts", "t_counts", "t_columns", "t_kinds")


def _fresh(x: Tensor | None, like: Tensor) -> Tensor:
    """Operators return tensors only, in memory of their own: an empty one stands for None."""
    if x is None:
        return like.new_empty(0)
    return x.clone(memory_format=torch.contiguous_format) if x.storage_offset() or not x.is_contiguous() else x


def pack(p: Softmax, branch: Branch | None) -> tuple[Any, ...]:
    """The arguments of the mixed operators."""
    where, extra, varlen = p.where, p.extra, p.varlen
    lists: list[Tensor | None] = [None] * len(LISTS)
    if isinstance(where, Blocks):
        lists = [getattr(where, name) for name in LISTS]
    return (
        p.q,
        p.k,
        p.v,
        p.scale,
        p.causal,
        list(where.sizes) if isinstance(where, Ranges) else [],
        where.window if isinstance(where, Ranges) else None,
        list(where.block) if isinstance(where, Blocks) else [],
        *lists,
        p.valid,
        None if varlen is None else varlen.cu_q,
        None if varlen is None else varlen.cu_k,
        [] if varlen is None else [varlen.max_q, varlen.max_k],
        None if extra is None else extra.k,
        None if extra is None else extra.v,
        None if extra is None else extra.at,
        p.softcap,
        p.sink_logits,
        None if branch is None else branch.fq,
        None if branch is None else branch.fk,
        [] if branch is None else list(branch.index),
        None if branch is None else branch.groups,
        False if branch is None else branch.shared,
        None if branch is None else branch.weight,
        None if branch is None else branch.state,
    )


def unpack(a: Sequence[Any]) -> tuple[Softmax, Branch | None]:
    """The inverse of `pack`."""
    lists = dict(zip(LISTS, a[8:17], strict=True))
    where: Ranges | Blocks
    where = Ranges(sizes=tuple(a[5]), window=a[6]) if a[6] is not None else Blocks(block=(a[7][0], a[7][1]), **lists)
    valid, cu_q, cu_k, most, extra_k, extra_v, extra_at, softcap, sink = a[17:26]
    fq, fk, index, groups, shared, weight, state = a[26:33]
    problem = Softmax(
        q=a[0],
        k=a[1],
        v=a[2],
        scale=a[3],
        causal=a[4],
        where=where,
        valid=valid,
        varlen=None if cu_q is None else Varlen(cu_q=cu_q, cu_k=cu_k, max_q=most[0], max_k=most[1]),
        extra=None if extra_k is None else Extra(k=extra_k, v=extra_v, at=extra_at),
        softcap=softcap,
        sink_logits=sink,
    )
    if fq is None:
        return problem, None
    branch = Branch(fq=fq, fk=fk, index=tuple(index), groups=groups, shared=shared, weight=weight, state=state)
    return problem, branch


MIXED = (
    "Tensor q, Tensor k, Tensor v, float scale, bool causal, SymInt[] sizes, Tensor? window, SymInt[] block, "
    "Tensor? starts, Tensor? counts, Tensor? columns, Tensor? kinds, Tensor? patterns, Tensor? t_starts, "
    "Tensor? t_counts, Tensor? t_columns, Tensor? t_kinds, Tensor? valid, Tensor? cu_q, Tensor? cu_k, SymInt[] most, "
    "Tensor? extra_k, Tensor? extra_v, Tensor? extra_at, float softcap, Tensor? sink_logits, Tensor? fq, Tensor? fk, "
    "int[] index, Tensor? groups, bool shared, Tensor? weight, Tensor? state, str backend"
)


@torch.library.custom_op(
    f"{NAMESPACE}::mixed", mutates_args=(), schema=f"({MIXED}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def mixed(*args: Any) -> tuple[Tensor, ...]:
    """`mixed_forward` of a back end: o, lse, linear, den, state."""
    p, branch = unpack(args[:-1])
    out: Mixed = chosen("mixed_forward", (p, branch), p.q, args[-1]).mixed_forward(p, branch)
    single = p.q if p.q.dtype == torch.float64 else p.q.new_empty(0, dtype=torch.float32)
    rest = ((out.linear, p.q), (out.den, single), (out.state, single))
    return _fresh(out.o, p.q), _fresh(out.lse, single), *(_fresh(x, like) for x, like in rest)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def stateful(p: Softmax) -> bool:
    """Whether a mixed forward with a branch returns a state."""
    return p.causal and isinstance(p.where, Ranges) and p.varlen is None


@mixed.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    p, branch = unpack(args[:-1])
    wide = _wide(p.q)
    o, lse = p.q.new_empty(p.q.shape), p.q.new_empty(p.q.shape[:3], dtype=wide)
    linear, den, state = p.q.new_empty(0), p.q.new_empty(0, dtype=wide), p.q.new_empty(0, dtype=wide)
    if branch is not None:
        shape = branch.fq.shape
        if not branch.shared:
            linear, den = p.q.new_empty(*shape[:3], p.q.shape[3]), p.q.new_empty(shape[:3], dtype=wide)
        if stateful(p):
            state = p.q.new_empty(shape[0], branch.fk.shape[1], shape[3], p.q.shape[3] + 1, dtype=wide)
    return o, lse, linear, den, state


@torch.library.custom_op(
    f"{NAMESPACE}::mixed_backward",
    mutates_args=(),
    schema=(
        f"({MIXED}, Tensor o, Tensor lse, Tensor linear, Tensor den, Tensor do, Tensor? dlinear) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def mixed_backward(*args: Any) -> tuple[Tensor, ...]:
    """`mixed_backward` of a back end: gradients of q, k, v, extra k, extra v, fq, fk."""
    p, branch = unpack(args[:33])
    o, lse, linear, den, do, dlinear = args[34:]
    separate = branch is not None and not branch.shared
    out = Mixed(o=o, lse=lse, linear=linear if separate else None, den=den if separate else None)
    g = chosen("mixed_backward", (p, branch), p.q, args[33]).mixed_backward(p, branch, out, do, dlinear)
    more = (g.extra_k, g.extra_v, g.fq, g.fk)
    return tuple(_fresh(x, p.q) for x in (g.q, g.k, g.v, *more))


@mixed_backward.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    p, branch = unpack(args[:33])
    extra = (None, None) if p.extra is None else (p.extra.k, p.extra.v)
    maps = (None, None) if branch is None else (branch.fq, branch.fk)
    rest = (p.q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (*extra, *maps))
    return (*(x.new_empty(x.shape) for x in (p.q, p.k, p.v)), *rest)


def _keep_mixed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    ctx.save_for_backward(*tensors, *output[:4])
    ctx.rest = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.is_tensor = [isinstance(x, Tensor) for x in inputs]


def _saved(ctx: Any) -> tuple[list[Any], tuple[Tensor, ...]]:
    saved = iter(ctx.saved_tensors)
    inputs = [next(saved) if tensor else x for x, tensor in zip(ctx.rest, ctx.is_tensor, strict=True)]
    return inputs, tuple(saved)


def _mixed_gradients(ctx: Any, do: Tensor, dlse: Any, dlinear: Tensor, dden: Any, dstate: Any) -> tuple[Any, ...]:
    inputs, (o, lse, linear, den) = _saved(ctx)
    p, branch = unpack(inputs[:33])
    separate = branch is not None and not branch.shared
    found = mixed_backward(*inputs, o, lse, linear, den, do, dlinear if separate else None)
    gradients: list[Any] = [None] * len(inputs)
    gradients[0:3] = found[0:3]
    if p.extra is not None:
        gradients[21:23] = found[3:5]
    if branch is not None:
        gradients[26:28] = found[5:7]
        if branch.weight is not None:
            gradients[31] = (branch.fq.to(lse.dtype) * found[5]).sum((0, 2, 3)).to(branch.weight.dtype)
    if p.sink_logits is not None:
        delta = (do.to(lse.dtype) * o).sum(-1)
        share = torch.exp(p.sink_logits.to(lse.dtype)[:, None] - lse)
        gradients[25] = -(share * delta).sum((0, 2)).to(p.sink_logits.dtype)
    return tuple(gradients)


mixed.register_autograd(_mixed_gradients, setup_context=_keep_mixed)

LINEAR = "Tensor fq, Tensor fk, Tensor v, bool causal, bool normalize, Tensor? state, Tensor? cu_q, Tensor? cu_k, "
LINEAR += "SymInt[] most, str backend"


def _linear_problem(a: Sequence[Any]) -> Linear:
    varlen = None if a[6] is None else Varlen(cu_q=a[6], cu_k=a[7], max_q=a[8][0], max_k=a[8][1])
    return Linear(fq=a[0], fk=a[1], v=a[2], causal=a[3], normalize=a[4], state=a[5], varlen=varlen)


@torch.library.custom_op(f"{NAMESPACE}::linear", mutates_args=(), schema=f"({LINEAR}) -> (Tensor, Tensor, Tensor)")
def linear(*args: Any) -> tuple[Tensor, ...]:
    """`linear_forward` of a back end: o, den, state."""
    p = _linear_problem(args)
    o, den, state = chosen("linear_forward", p, p.fq, args[-1]).linear_forward(p)
    return _fresh(o, den), _fresh(den, den), _fresh(state, den)


@linear.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    p = _linear_problem(args)
    wide = _wide(p.v)
    shape = (*p.fq.shape[:3], p.v.shape[3])
    count = p.fq.shape[0] if p.varlen is None else p.varlen.cu_q.shape[0] - 1
    state = p.v.new_empty(count, p.fk.shape[1], p.fk.shape[3], p.v.shape[3] + 1, dtype=wide)
    return (
        p.v.new_empty(shape),
        p.v.new_empty(shape[:3], dtype=wide),
        state if p.causal else p.v.new_empty(0, dtype=wide),
    )


@torch.library.custom_op(
    f"{NAMESPACE}::linear_backward",
    mutates_args=(),
    schema=f"({LINEAR}, Tensor o, Tensor den, Tensor do) -> (Tensor, Tensor, Tensor)",
)
def linear_backward(*args: Any) -> tuple[Tensor, ...]:
    """`linear_backward` of a back end: gradients of fq, fk, v."""
    p = _linear_problem(args)
    found = chosen("linear_backward", p, p.fq, args[9]).linear_backward(p, *args[10:])
    return tuple(_fresh(x, x) for x in found)


@linear_backward.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in args[:3])


def _keep_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _keep_mixed(ctx, inputs, output[:2])


def _linear_gradients(ctx: Any, do: Tensor, dden: Any, dstate: Any) -> tuple[Any, ...]:
    inputs, (o, den) = _saved(ctx)
    return (*linear_backward(*inputs, o, den, do), *[None] * 7)


linear.register_autograd(_linear_gradients, setup_context=_keep_linear)

FEATURES = "Tensor x, str kind, Tensor[] weights, str backend"


def feature_size(kind: str, dim: int, weights: Sequence[Tensor]) -> int:
    """F of a feature map."""
    if kind == "poly":
        return weights[2].shape[0] * weights[2].shape[-1]
    return 2 * dim if kind == "hedgehog" else dim


@torch.library.custom_op(f"{NAMESPACE}::features", mutates_args=(), schema=f"({FEATURES}) -> Tensor")
def features(x: Tensor, kind: str, weights: Sequence[Tensor], backend: str) -> Tensor:
    """`features` of a back end."""
    given = (x, kind, tuple(weights))
    return _fresh(chosen("features", given, x, backend).features(*given), x)


@features.register_fake
def _(x: Tensor, kind: str, weights: Sequence[Tensor], backend: str) -> Tensor:
    return x.new_empty(*x.shape[:3], feature_size(kind, x.shape[3], weights))


@torch.library.custom_op(
    f"{NAMESPACE}::features_backward", mutates_args=(), schema=f"({FEATURES}, Tensor dout) -> (Tensor, Tensor[])"
)
def features_backward(
    x: Tensor, kind: str, weights: Sequence[Tensor], backend: str, dout: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """`features_backward` of a back end."""
    given = (x, kind, tuple(weights))
    dx, dweights = chosen("features_backward", given, x, backend).features_backward(*given, dout)
    return _fresh(dx, x), [_fresh(w, w) for w in dweights]


@features_backward.register_fake
def _(x: Tensor, kind: str, weights: Sequence[Tensor], backend: str, dout: Tensor) -> tuple[Tensor, list[Tensor]]:
    return x.new_empty(x.shape), [w.new_empty(w.shape) for w in weights]


def _keep_features(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.kind, weights, ctx.backend = inputs
    ctx.save_for_backward(x, *weights)


def _feature_gradients(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    x, *weights = ctx.saved_tensors
    dx, dweights = features_backward(x, ctx.kind, weights, ctx.backend, dout)
    return dx, None, dweights, None


features.register_autograd(_feature_gradients, setup_context=_keep_features)

DECODE = "Tensor q, Tensor[] tensors, SymInt[] layout, float scale, float softcap, Tensor? sink_logits, str backend"
FIELDS = ("mask", "fq", "state", "weight", "late")  # of a part, where they are there


def pack_decode(p: Decode) -> tuple[Any, ...]:
    """Arguments of the decode operator: per part `first`, `used` and which optional tensors follow k and v."""
    tensors: list[Tensor] = []
    layout: list[int] = []
    for part in p.parts:
        given = [getattr(part, name) for name in FIELDS]
        tensors += [part.k, part.v, *(x for x in given if x is not None)]
        layout += [part.first, part.used, *(int(x is not None) for x in given)]
    return p.q, tensors, layout, p.scale, p.softcap, p.sink_logits


def _decode_problem(
    q: Tensor, tensors: Sequence[Tensor], layout: Sequence[int], scale: float, softcap: float, sink: Tensor | None
) -> Decode:
    rest, parts, width = iter(tensors), [], 2 + len(FIELDS)
    for n in range(0, len(layout), width):
        first, used, *there = layout[n : n + width]
        k, v = next(rest), next(rest)
        more = {name: next(rest) if given else None for name, given in zip(FIELDS, there, strict=True)}
        parts.append(Part(first=first, used=used, k=k, v=v, **more))
    return Decode(q=q, parts=tuple(parts), scale=scale, softcap=softcap, sink_logits=sink)


@torch.library.custom_op(f"{NAMESPACE}::decode", mutates_args=(), schema=f"({DECODE}) -> (Tensor, Tensor[])")
def decode(*args: Any) -> tuple[Tensor, list[Tensor]]:
    """`decode` of a back end: o, and what late slots received."""
    p = _decode_problem(*args[:-1])
    o, received = chosen("decode", p, p.q, args[-1]).decode(p)
    return _fresh(o, o), [_fresh(x, x) for x in received]


@decode.register_fake
def _(*args: Any) -> tuple[Tensor, list[Tensor]]:
    p = _decode_problem(*args[:-1])
    asked = [part for part in p.parts if part.late is not None]
    return p.q.new_empty(p.q.shape), [x.k.new_empty(x.k.shape[:3], dtype=_wide(p.q)) for x in asked]


RETAIN = "Tensor q, Tensor k, Tensor v, Tensor at, float scale, int window, int keep, int sinks, int block, "
RETAIN += "Tensor[] memory, float softcap, Tensor? sink_logits, str backend"


def _retain_problem(a: Sequence[Any]) -> Retain:
    return Retain(
        q=a[0],
        k=a[1],
        v=a[2],
        at=a[3],
        scale=a[4],
        window=a[5],
        keep=a[6],
        sinks=a[7],
        block=a[8],
        memory=tuple(a[9]) if a[9] else None,
        softcap=a[10],
        sink_logits=a[11],
    )


@torch.library.custom_op(f"{NAMESPACE}::retain", mutates_args=(), schema=f"({RETAIN}) -> (Tensor, Tensor[])")
def retain(*args: Any) -> tuple[Tensor, list[Tensor]]:
    """`retain` of a back end: o and the memory."""
    p = _retain_problem(args)
    o, memory = chosen("retain", p, p.q, args[-1]).retain(p)
    return _fresh(o, o), [x.clone() if any(x is y for y in args[9]) else _fresh(x, x) for x in memory]


@retain.register_fake
def _(*args: Any) -> tuple[Tensor, list[Tensor]]:
    p = _retain_problem(args)
    return p.q.new_empty(p.q.shape), [x.new_empty(x.shape) for x in torch_retain.empty_memory(p)]


@torch.library.custom_op(
    f"{NAMESPACE}::retain_backward",
    mutates_args=(),
    schema=f"({RETAIN}, Tensor do) -> (Tensor, Tensor, Tensor, Tensor)",
)
def retain_backward(*args: Any) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and the sink logits, by running the torch definition with gradients.

    What is kept is found again; it is the same unless two scores differ by rounding alone.
    """
    with recording():
        changed = list(args)
        places = [0, 1, 2] + ([11] if args[11] is not None else [])
        for n in places:
            changed[n] = args[n].detach().requires_grad_()
        o, _ = torch_retain.retention(_retain_problem(changed))
        found = torch.autograd.grad(o, [changed[n] for n in places], args[-1])
    found = tuple(_fresh(x, x) for x in found)
    return found if args[11] is not None else (*found, args[0].new_empty(0))


@retain_backward.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    sink = args[0].new_empty(0) if args[11] is None else args[11].new_empty(args[11].shape)
    return (*(x.new_empty(x.shape) for x in args[:3]), sink)


def _keep_retain(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    ctx.count = len(inputs[9])
    ctx.sink = inputs[11] is not None
    ctx.save_for_backward(*inputs[:4], *inputs[9], *([inputs[11]] if ctx.sink else []))
    ctx.numbers = (*inputs[4:9], inputs[10], inputs[12])


def _retain_gradients(ctx: Any, do: Tensor, dmemory: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    memory, sink = list(saved[4 : 4 + ctx.count]), saved[-1] if ctx.sink else None
    *numbers, softcap, name = ctx.numbers
    dq, dk, dv, dsink = retain_backward(*saved[:4], *numbers, memory, softcap, sink, name, do)
    return dq, dk, dv, None, *[None] * 5, [None] * ctx.count, None, dsink if ctx.sink else None, None


retain.register_autograd(_retain_gradients, setup_context=_keep_retain)
