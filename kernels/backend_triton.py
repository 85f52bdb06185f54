"""The back end for NVIDIA and AMD GPUs. Triton is imported when something runs, so this imports without it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .problem import Blocks, Branch, Decode, Linear, Mixed, MixedGradients, Pooled, Retain, Softmax
from .triton_common import interpreted

NAME = "triton"
OLDEST = (3, 6)  # of Triton
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def _module(name: str) -> ModuleType:
    """One of the kernel files, which import Triton."""
    return importlib.import_module(f"{__name__.rpartition('backend_triton')[0]}triton_{name}")


@functools.cache
def _installed() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'attnconvert[gpu]'"
    version = importlib.import_module("triton").__version__
    if tuple(int(x) for x in version.split(".")[:2]) < OLDEST:
        return f"triton is {version}: at least {OLDEST[0]}.{OLDEST[1]} is needed"
    return None


def unavailable() -> str | None:
    """Why no Triton kernel can run in this process."""
    if reason := _installed():
        return reason
    if not torch.cuda.is_available() and not interpreted():
        return "torch sees no CUDA or ROCm device (TRITON_INTERPRET=1 runs the kernels on the CPU, to check them)"
    return None


def refuses(function: str, problem: Any) -> str | None:
    """Why this function cannot run this problem: a dataclass of `problem`, or (x, kind, weights) of the features.

    `mixed_forward` and `mixed_backward` take (Softmax, Branch | None) as a tuple too.
    """
    if reason := _tensors(_first(problem)):
        return reason
    given = problem if isinstance(problem, tuple) else (problem,)
    if function in ("mixed_forward", "mixed_backward"):
        return _said(_module("mixed").refuses(function, problem))
    if function == "decode":
        return _said(_module("decode").refuses(problem))
    if function == "select":
        return _said(_module("select").refuses(problem))
    if function in ("features", "features_backward") and len(given) >= 3:
        return _said(_module("features").refuses(given[1], given[0].shape[3], given[2]))
    return None


def _said(reason: Any) -> str | None:
    return None if reason is None else str(reason)


def _first(problem: Any) -> Tensor | None:
    """A tensor that says dtype and device."""
    problem = problem[0] if isinstance(problem, tuple) else problem
    if isinstance(problem, Tensor):
        return problem
    found = getattr(problem, "fq", None) if isinstance(problem, Linear) else getattr(problem, "q", None)
    return found if isinstance(found, Tensor) else None


def _tensors(x: Tensor | None) -> str | None:
    if x is None:
        return None
    if x.dtype not in DTYPES:
        return f"the tensors are {x.dtype}, expected bfloat16, float16 or float32"
    if not x.is_cuda and not interpreted():
        return f"the tensors are on {x.device}, Triton runs on CUDA and ROCm devices"
    return None


def mixed_forward(p: Softmax, branch: Branch | None) -> Mixed:
    out: Mixed = _module("mixed").mixed_forward(p, branch)
    return out


def mixed_backward(p: Softmax, branch: Branch | None, out: Mixed, do: Tensor, dlinear: Tensor | None) -> MixedGradients:
    found: MixedGradients = _module("mixed_backward").mixed_backward(p, branch, out, do, dlinear)
    return found


def linear_forward(p: Linear) -> tuple[Tensor, Tensor, Tensor | None]:
    found: tuple[Tensor, Tensor, Tensor | None] = _module("linear").linear_forward(p)
    return found


def linear_backward(p: Linear, o: Tensor, den: Tensor, do: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = _module("linear_backward").linear_backward(p, o, den, do)
    return found


def decode(p: Decode) -> tuple[Tensor, list[Tensor]]:
    found: tuple[Tensor, list[Tensor]] = _module("decode").decode(p)
    return found


def retain(p: Retain) -> tuple[Tensor, tuple[Tensor, ...]]:
    found: tuple[Tensor, tuple[Tensor, ...]] = _module("retain").retain(p)
    return found


def select(p: Pooled) -> Blocks:
    blocks: Blocks = _module("select").select(p)
    return blocks


def features(x: Tensor, kind: str, weights: tuple[Tensor, ...]) -> Tensor:
    y: Tensor = _module("features").features(x, kind, weights)
    return y


def features_backward(
    x: Tensor, kind: str, weights: tuple[Tensor, ...], dout: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    found: tuple[Tensor, tuple[Tensor, ...]] = _module("features").features_backward(x, kind, weights, dout)
    return found
