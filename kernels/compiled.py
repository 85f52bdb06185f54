"""Operators on a grid as one PyTorch operator each, for torch.compile: what makes lists runs inside, by real tensors.

Lists of blocks come from numpy, from the scores or from the time of a call, so a compiler cannot look into what makes
them. It sees one operator that takes tensors, the layout as numbers and the spec as its text, and knows the shape of
what comes back; so a model stays one graph, whatever its size, and is not compiled anew for another step. Uncompiled
calls do not come by here. Its backward pass runs the operator again, which then finds the same lists.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import dispatch, operators
from .backend_torch import recording
from .call import Call
from .custom_ops import NAMESPACE
from .masks import Layout
from .spec import Spec
from .spec_registry import spec_from_text

SCHEMA = "Tensor q, Tensor k, Tensor v, Tensor[] learned, Tensor? sink_logits, Tensor? valid, Tensor? time, str spec, "
SCHEMA += "SymInt[] layout, float scale, float softcap, str backend"


def takes(spec: Spec) -> bool:
    """Whether the operator is one that a compiler must not look into."""
    return hasattr(spec, "text")


def attend(spec: Spec, q: Tensor, k: Tensor, v: Tensor, call: Call, learned: nn.Module | None = None) -> Tensor:
    """The operator for q (B, H, S, D), k, v (B, Hk, S, D) where a compiler traces. → (B, H, S, D)

    Raises:
        ValueError: the call is causal or has a window of its own, which no operator on a grid takes.
    """
    if call.causal or call.limit is not None:
        raise ValueError(f"{spec.operator} is of tokens on a grid that all read each other, and this call is not")
    own = call.layout
    layout = [] if own is None else [own.text_first, own.text_last, *own.grid]
    parameters = [] if learned is None else list(learned.parameters())
    more = (call.sink_logits, call.valid, call.time, spec.text, layout, call.scale, call.softcap or 0.0)
    o: Tensor = whole(q, k, v, parameters, *more, dispatch.wanted(None))
    return o


class _Operator(nn.Module):
    """A spec and what it learned as a module, so that other tensors can stand in for its parameters."""

    def __init__(self, spec: Spec, learned: nn.Module | None) -> None:
        super().__init__()
        self.spec, self.learned = spec, learned

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        o, _ = operators.attend(self.spec, q, k, v, call, None, self.learned)
        return o


@functools.lru_cache(maxsize=64)
def _empty(text: str, heads: int, kv_heads: int, dim: int, thread: int) -> _Operator:
    """The operator without memory of its own for parameters; one for each thread, since calls put theirs in it."""
    spec = spec_from_text(text)
    with torch.device("meta"):
        return _Operator(spec, operators.of(spec).parameters(spec, heads, kv_heads, dim))


def _run(args: Sequence[Any]) -> Tensor:
    """The operator by the arguments of the schema."""
    q, k, v, learned, sink_logits, valid, time, text, layout, scale, softcap, backend = args
    module = _empty(text, q.shape[1], k.shape[1], q.shape[3], threading.get_ident())
    names = [name for name, _ in module.named_parameters()]
    own = Layout(grid=tuple(layout[2:]), text_first=layout[0], text_last=layout[1]) if layout else None
    call = Call(
        scale=scale,
        valid=valid,
        softcap=softcap or None,
        sink_logits=sink_logits,
        keep=False,
        causal=False,
        layout=own,
        time=time,
    )
    with dispatch.use(backend):
        o: Tensor = torch.func.functional_call(module, dict(zip(names, learned, strict=True)), (q, k, v, call))
    return o


@torch.library.custom_op(f"{NAMESPACE}::whole", mutates_args=(), schema=f"({SCHEMA}) -> Tensor")
def whole(*args: Any) -> Tensor:
    """An operator on a grid, from q, k, v to its output."""
    with torch.no_grad():
        o = _run(args)
    return o.contiguous()


@whole.register_fake
def _(*args: Any) -> Tensor:
    q: Tensor = args[0]
    return q.new_empty(q.shape)


@torch.library.custom_op(
    f"{NAMESPACE}::whole_backward",
    mutates_args=(),
    schema=f"({SCHEMA}, Tensor do) -> (Tensor, Tensor, Tensor, Tensor[], Tensor)",
)
def whole_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:
    """Gradients of q, k, v, what was learned and the sink logits, by running the operator again."""
    with recording():
        q, k, v, *learned = (x.detach().requires_grad_() for x in (*args[:3], *args[3]))
        sink = None if args[4] is None else args[4].detach().requires_grad_()
        wanted = [q, k, v, *learned, *([] if sink is None else [sink])]
        o = _run((q, k, v, learned, sink, *args[5:-1]))
        found = torch.autograd.grad(o, wanted, args[-1], allow_unused=True)
    given = [torch.zeros_like(x) if y is None else y.contiguous() for x, y in zip(wanted, found, strict=True)]
    last = args[0].new_empty(0) if sink is None else given[-1]
    return given[0], given[1], given[2], given[3 : 3 + len(learned)], last


@whole_backward.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:
    q, k, v = (x.new_empty(x.shape) for x in args[:3])
    sink = args[0] if args[4] is None else args[4]
    return q, k, v, [x.new_empty(x.shape) for x in args[3]], sink.new_empty(0 if args[4] is None else sink.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, learned, *more = inputs
    ctx.there = [x is not None for x in more[:3]]
    ctx.count, ctx.rest = len(learned), more[3:]
    ctx.save_for_backward(q, k, v, *learned, *(x for x in more[:3] if x is not None))


def _gradients(ctx: Any, do: Tensor) -> tuple[Any, ...]:
    q, k, v, *others = ctx.saved_tensors
    learned, given = others[: ctx.count], iter(others[ctx.count :])
    more = [next(given) if there else None for there in ctx.there]
    dq, dk, dv, dlearned, dsink = whole_backward(q, k, v, learned, *more, *ctx.rest, do)
    return dq, dk, dv, dlearned, dsink if ctx.there[0] else None, *[None] * 7


whole.register_autograd(_gradients, setup_context=_keep)
