"""The one place that knows which file implements which spec, and runs the operators of a site in few launches."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from . import (
    agent,
    full,
    grid_masks,
    hybrid,
    launch,
    linear,
    ops,
    retention,
    sla,
    span,
    sparse,
    timed,
    top_blocks,
    window,
)
from .call import Call, Cost, Shape
from .problem import Part
from .spec import OPERATORS, Spec

FILES: dict[str, ModuleType] = {
    "full": full,
    "window": window,
    "span": span,
    "blocks": top_blocks,
    "linear": linear,
    "hybrid": hybrid,
    "retention": retention,
    **dict.fromkeys(("disc", "neighbourhood", "tiles", "radial", "references", "frames"), grid_masks),
    "sparse": sparse,
    "sla": sla,
    "agent": agent,
    "timed": timed,
}


NEEDED = ("reference", "prefill_cost", "decode_cost", "state_size")  # of every operator, beside attend or piece


@dataclass(frozen=True)
class Operator:
    """The functions of one operator, with the spec already bound to none of them: every one takes it first."""

    reference: Callable[..., Tensor]
    parameters: Callable[[Spec, int, int, int], nn.Module | None]
    prefill_cost: Callable[[Spec, Shape, int], Cost]
    decode_cost: Callable[[Spec, Shape, int], Cost]
    state_size: Callable[[Spec, Shape, int], float]


@dataclass(frozen=True)
class Use:
    """An operator at work: its spec, the KV groups it serves, in order, and what it learned for them."""

    spec: Spec
    groups: tuple[int, ...]
    learned: nn.Module | None = None


def file_of(name: str) -> ModuleType:
    """The module with the functions of an operator: one of ours, or the one that registered its spec.

    Raises:
        ValueError: a function that every operator needs is missing there.
    """
    if name in FILES:
        return FILES[name]
    file = sys.modules[OPERATORS[name].__module__]
    missing = [each for each in NEEDED if not hasattr(file, each)]
    if not hasattr(file, "attend") and not hasattr(file, "piece"):
        missing.append("attend")
    if missing:
        where = getattr(file, "__file__", None) or file.__name__
        raise ValueError(f"operator {name!r} lacks {', '.join(missing)}: define them in {where}, beside its spec")
    return file


def _nothing(spec: Spec, heads: int, kv_heads: int, dim: int) -> nn.Module | None:
    """The parameters of an operator that has none."""
    return None


def of(spec: Spec) -> Operator:
    """The implementation of a spec."""
    file = file_of(spec.operator)
    needed = {name: getattr(file, name) for name in NEEDED}
    return Operator(**needed, parameters=getattr(file, "parameters", _nothing))


def attend(
    spec: Spec, q: Tensor, k: Tensor, v: Tensor, call: Call, state: object = None, learned: nn.Module | None = None
) -> tuple[Tensor, object]:
    """Attention of the new tokens q (B, H, Q, D) over k, v (B, Hk, Q, D) and the state. → (B, H, Q, D), new state"""
    o, states = attend_all([Use(spec, tuple(range(k.shape[1])), learned)], q, k, v, call, [state])
    return o, states[0]


def attend_all(
    uses: Sequence[Use], q: Tensor, k: Tensor, v: Tensor, call: Call, states: Sequence[object]
) -> tuple[Tensor, list[object]]:
    """The operators of a site together: each serves its KV groups of q (B, H, Q, D), k, v (B, Hk, Q, D).

    A prefill is one launch of mixed attention for all that read softmax ranges, a decode step one launch for all with
    a cache; linear attention over a prompt, spans, blocks and retention have launches of their own. A call that is not
    causal leaves no states.
    """
    if not call.causal:
        call = dataclasses.replace(call, keep=False)
    one = q.shape[2] == 1 and not _differentiable(uses, q, k, v)  # a step writes into its cache
    after: list[object] = list(states)
    done: list[tuple[list[int], Tensor]] = []  # KV groups and their outputs
    stepping = [n for n, use in enumerate(uses) if one and states[n] is not None and hasattr(_file(use), "step")]
    if stepping:
        done.append(_decode(uses, stepping, q, k, v, call, states, after))
    pieces: dict[int, launch.Piece] = {}
    for n, use in enumerate(uses):
        if n in stepping:
            continue
        heads = _heads(use.groups, q, k, v, call)
        if hasattr(_file(use), "piece"):
            pieces[n] = _file(use).piece(use.spec, *heads, states[n], use.learned)
        else:
            o, after[n] = _file(use).attend(use.spec, *heads, states[n], use.learned)
            done.append((list(use.groups), o))
    fresh = [n for n in pieces if states[n] is None]  # these read the keys of the call itself, so they share a launch
    launches = ([fresh] if fresh else []) + [[n] for n in pieces if n not in fresh]
    done += [_mixed(uses, members, pieces, q, k, v, call, after) for members in launches]
    return _in_order(done, q, k.shape[1]), after


def _differentiable(uses: Sequence[Use], *tensors: Tensor) -> bool:
    learned = [p for use in uses if use.learned is not None for p in use.learned.parameters()]
    return torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors, *learned))


def _file(use: Use) -> ModuleType:
    return file_of(use.spec.operator)


def _heads(groups: Sequence[int], q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor, Call]:
    """q, k, v and the call for some KV groups; views where the groups are neighbours."""
    total, per = k.shape[1], q.shape[1] // k.shape[1]
    if list(groups) == list(range(total)):
        return q, k, v, call
    heads = run([h for g in groups for h in range(g * per, (g + 1) * per)])
    kv = run(list(groups))
    return q[:, heads], k[:, kv], v[:, kv], call.heads(heads)


def run(indices: list[int]) -> slice | list[int]:
    """A slice where the indices are contiguous, so that taking those heads is a view."""
    contiguous = indices == list(range(indices[0], indices[0] + len(indices)))
    return slice(indices[0], indices[-1] + 1) if contiguous else indices


def _mixed(
    uses: Sequence[Use],
    members: list[int],
    pieces: dict[int, launch.Piece],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    after: list[object],
) -> tuple[list[int], Tensor]:
    """One launch for some operators; their states go to `after`."""
    order = sorted(g for n in members for g in uses[n].groups)
    chosen = [pieces[n] for n in members]
    q, k, v, call = _heads(order, q, k, v, call)
    if len(members) == 1:
        k, v = chosen[0].k, chosen[0].v
    o, s = launch.mixed(q, k, v, chosen, [[order.index(g) for g in uses[n].groups] for n in members], call)
    at = 0
    for n, piece in zip(members, chosen, strict=True):
        after[n] = piece.state
        if piece.fq is not None and s is not None and piece.state is not None:
            after[n] = dataclasses.replace(piece.state, s=s[:, at : at + piece.k.shape[1]])  # type: ignore[type-var]
            at += piece.k.shape[1]
    return order, o


def _decode(
    uses: Sequence[Use],
    members: list[int],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    states: Sequence[object],
    after: list[object],
) -> tuple[list[int], Tensor]:
    """One launch for the new token of every operator that has a cache."""
    order = sorted(g for n in members for g in uses[n].groups)
    per = q.shape[1] // k.shape[1]
    parts = []
    for n in members:
        use = uses[n]
        part, after[n] = _file(use).step(use.spec, *_heads(use.groups, q, k, v, call), states[n], use.learned)
        parts += _runs(part, [order.index(g) for g in use.groups], per)
    q, _, _, call = _heads(order, q, k, v, call)
    parts.sort(key=lambda part: part.first)
    o, received = ops.decode_step(q, parts, scale=call.scale, softcap=call.softcap or 0.0, sink_logits=call.sink_logits)
    _receive(uses, [n for n in members if hasattr(_file(uses[n]), "receive")], order, parts, received, after)
    return order, o


def _receive(
    uses: Sequence[Use],
    members: list[int],
    order: list[int],
    parts: Sequence[Part],
    received: Sequence[Tensor],
    after: list[object],
) -> None:
    """What the slots of a step received goes to the operators that asked for it."""
    asked = [part for part in parts if part.late is not None]
    by_group = {part.first + n: x[:, n] for part, x in zip(asked, received, strict=True) for n in range(x.shape[1])}
    for n in members:
        given = torch.stack([by_group[order.index(g)] for g in uses[n].groups], 1)
        _file(uses[n]).receive(uses[n].spec, after[n], given)


def _runs(part: Part, groups: list[int], per: int) -> list[Part]:
    """A part of the KV groups at `groups`, cut where they are no neighbours."""
    cuts = [n for n in range(len(groups)) if n == 0 or groups[n] != groups[n - 1] + 1] + [len(groups)]
    if len(cuts) == 2:
        return [dataclasses.replace(part, first=groups[0])]
    found = []
    for start, stop in itertools.pairwise(cuts):
        heads = slice(start * per, stop * per)
        one = dataclasses.replace(
            part,
            first=groups[start],
            k=part.k[:, start:stop],
            v=part.v[:, start:stop],
            fq=None if part.fq is None else part.fq[:, heads],
            state=None if part.state is None else part.state[:, start:stop],
            weight=None if part.weight is None else part.weight[heads],
        )
        found.append(one)
    return found


def _in_order(done: list[tuple[list[int], Tensor]], like: Tensor, groups: int) -> Tensor:
    """The outputs of all launches in the order of the heads."""
    if len(done) == 1:
        return done[0][1]
    order = [g for members, _ in done for g in members]
    per = like.shape[1] // groups
    heads = [order.index(g) * per + n for g in range(groups) for n in range(per)]
    return torch.cat([o for _, o in done], 1)[:, run(heads)]
