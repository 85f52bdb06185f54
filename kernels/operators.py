"""The one place that knows which file implements which spec."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor, nn

from . import full, hybrid, linear, window
from .call import Call, Cost, Shape
from .spec import Spec

FILES: dict[str, ModuleType] = {"full": full, "window": window, "linear": linear, "hybrid": hybrid}


@dataclass(frozen=True)
class Operator:
    """The functions of one operator, with the spec already bound to none of them: every one takes it first."""

    attend: Callable[..., tuple[Tensor, object]]
    reference: Callable[..., Tensor]
    parameters: Callable[[Spec, int, int, int], nn.Module | None]
    prefill_cost: Callable[[Spec, Shape, int], Cost]
    decode_cost: Callable[[Spec, Shape, int], Cost]
    state_size: Callable[[Spec, Shape, int], float]


def of(spec: Spec) -> Operator:
    """The implementation of a spec."""
    file = FILES[spec.operator]
    return Operator(**{name: getattr(file, name) for name in Operator.__dataclass_fields__})


def attend(
    spec: Spec, q: Tensor, k: Tensor, v: Tensor, call: Call, state: object = None, learned: nn.Module | None = None
) -> tuple[Tensor, object]:
    """Attention of the new tokens q (B, H, Q, D) over k, v (B, Hk, Q, D) and the state. → (B, H, Q, D), new state"""
    return of(spec).attend(spec, q, k, v, call, state, learned)
