"""The back end that is always right: plain torch, any device, any dtype, fp64 included, memory that grows with S.

Every function is written so that autograd can follow it; the backward functions run it once more with gradients.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from .problem import Blocks, Branch, Decode, Linear, Mixed, MixedGradients, Pooled, Retain, Softmax
from .torch_linear import linear
from .torch_maps import feature_map
from .torch_mixed import mixed
from .torch_retain import retention
from .torch_select import selection
from .torch_softmax import decode_step

NAME = "torch"


AUTOGRAD = ("AutogradFunctionality", "AutogradCPU", "AutogradCUDA", "AutogradOther")


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Autograd inside an operator: PyTorch calls the body of one with the dispatch keys of autograd taken away."""
    left_out = torch._C._dispatch_tls_local_exclude_set()
    for key in AUTOGRAD:
        left_out = left_out.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), left_out), torch.enable_grad():
        yield


def unavailable() -> str | None:
    """Nothing keeps torch from running."""
    return None


def refuses(function: str, problem: object) -> str | None:
    """It takes every valid problem."""
    return None


@torch.no_grad()
def mixed_forward(p: Softmax, branch: Branch | None) -> Mixed:
    return mixed(p, branch)


def mixed_backward(p: Softmax, branch: Branch | None, out: Mixed, do: Tensor, dlinear: Tensor | None) -> MixedGradients:
    """Runs the forward again with gradients; `out` is not needed."""
    with recording():
        q, k, v = (x.detach().requires_grad_() for x in (p.q, p.k, p.v))
        wanted = [q, k, v]
        extra = p.extra
        if extra is not None:
            extra = dataclasses.replace(extra, k=_leaf(extra.k, wanted), v=_leaf(extra.v, wanted))
        if branch is not None:
            branch = dataclasses.replace(branch, fq=_leaf(branch.fq, wanted), fk=_leaf(branch.fk, wanted))
        again = mixed(dataclasses.replace(p, q=q, k=k, v=v, extra=extra), branch)
        results, gradients = [again.o], [do]
        if again.linear is not None and dlinear is not None:
            results.append(again.linear)
            gradients.append(dlinear)
        found = torch.autograd.grad(results, wanted, gradients, allow_unused=True)
    found = tuple(torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True))
    rest = iter(found[3:])
    more = (next(rest), next(rest)) if extra is not None else (None, None)
    maps = (next(rest), next(rest)) if branch is not None else (None, None)
    return MixedGradients(q=found[0], k=found[1], v=found[2], extra_k=more[0], extra_v=more[1], fq=maps[0], fk=maps[1])


def _leaf(x: Tensor, wanted: list[Tensor]) -> Tensor:
    wanted.append(x.detach().requires_grad_())
    return wanted[-1]


@torch.no_grad()
def linear_forward(p: Linear) -> tuple[Tensor, Tensor, Tensor | None]:
    return linear(p)


def linear_backward(p: Linear, o: Tensor, den: Tensor, do: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the forward again with gradients; `o` and `den` are not needed."""
    with recording():
        wanted: list[Tensor] = []
        p = dataclasses.replace(p, fq=_leaf(p.fq, wanted), fk=_leaf(p.fk, wanted), v=_leaf(p.v, wanted))
        dfq, dfk, dv = torch.autograd.grad(linear(p)[0], wanted, do)
    return dfq, dfk, dv


@torch.no_grad()
def decode(p: Decode) -> tuple[Tensor, list[Tensor]]:
    return decode_step(p)


def retain(p: Retain) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Differentiable where gradients are on; the choice of what is kept is not."""
    return retention(p)


@torch.no_grad()
def select(p: Pooled) -> Blocks:
    return selection(p)


@torch.no_grad()
def features(x: Tensor, kind: str, weights: tuple[Tensor, ...]) -> Tensor:
    return feature_map(x, kind, weights)


def features_backward(
    x: Tensor, kind: str, weights: tuple[Tensor, ...], dout: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    with recording():
        wanted: list[Tensor] = []
        x = _leaf(x, wanted)
        weights = tuple(_leaf(w, wanted) for w in weights)
        found = torch.autograd.grad(feature_map(x, kind, weights), wanted, dout)
    return found[0], tuple(found[1:])
