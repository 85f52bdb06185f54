"""Which back end runs: `triton` on CUDA and ROCm devices, `cpp` on CPUs, `torch` wherever they cannot or should not.

`auto` takes the fastest that can, by device and dtype. There is no break-even to look for on the CPU: the C++ kernels
are faster than the torch ones at every length that was measured (docs/benchmarks.md, from 1024 tokens on). The choice
is logged once for each function and reason. A back end that is asked for by name, by `use`, by `backend=` or by the
environment variable ATTNCONVERT_BACKEND, runs or raises; nothing else takes its place.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from .spec import BACKENDS

log = logging.getLogger("attnconvert.kernels")
AUTO, *NAMES = BACKENDS
_forced: list[str] = []
_said: set[tuple[str, ...]] = set()
_modules: dict[str, ModuleType] = {}


class BackendError(RuntimeError):
    """A back end that was asked for cannot run this; the message says why."""


def backend(name: str) -> ModuleType:
    """The module of a back end."""
    if name not in _modules:
        _modules[name] = importlib.import_module(f"{__name__.rpartition('dispatch')[0]}backend_{name}")
    return _modules[name]


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Every kernel inside runs on this back end (or `auto`), or raises `BackendError`."""
    _forced.append(checked(name))
    try:
        yield
    finally:
        _forced.pop()


def checked(name: str) -> str:
    """The name, if it is a back end's.

    Raises:
        ValueError: it is none.
    """
    if name not in (AUTO, *NAMES):
        raise ValueError(f"backend is {name!r}: expected one of auto, {', '.join(NAMES)}")
    return name


def wanted(asked: str | None) -> str:
    """What was asked for: the argument, then `use`, then ATTNCONVERT_BACKEND, then auto."""
    if asked is not None:
        return checked(asked)
    if _forced:
        return _forced[-1]
    return checked(os.environ.get("ATTNCONVERT_BACKEND", AUTO))


def chosen(function: str, problem: Any, like: torch.Tensor, name: str) -> ModuleType:
    """The back end for one call, where `name` is what `wanted` said.

    The operators ask for it when they run, not when they are traced: a compiled model chooses by its real tensors.

    Args:
        function: name of the back end function; problem: its argument; like: a tensor that says device and dtype.

    Raises:
        BackendError: the one that was asked for cannot run it.
    """
    return backend(_choose(function, problem, like, name))


def _choose(function: str, problem: Any, like: torch.Tensor, name: str) -> str:
    if name != AUTO:
        if reason := _obstacle(name, function, problem, like):
            raise BackendError(f"backend {name!r} was asked for but cannot run {function}: {reason}")
        return name
    first = "triton" if like.is_cuda else "cpp"
    if like.dtype == torch.float64:
        return _say(function, "torch", "float64")
    if like.device.type not in ("cuda", "cpu"):
        return _say(function, "torch", f"device {like.device.type}")
    if reason := _obstacle(first, function, problem, like):
        return _say(function, "torch", f"{first} cannot: {reason}")
    return _say(function, first, f"device {like.device.type}")


def _obstacle(name: str, function: str, problem: Any, like: torch.Tensor) -> str | None:
    if name == "cpp" and like.device.type != "cpu":
        return f"the tensors are on {like.device}, it runs on the CPU"
    module = backend(name)
    reason: str | None = module.unavailable() or module.refuses(function, problem)
    return reason


def _say(function: str, name: str, why: str) -> str:
    if (function, name, why) not in _said:
        _said.add((function, name, why))
        level = logging.WARNING if name == "torch" and "cannot" in why else logging.INFO
        log.log(level, "%s runs on the %s back end (%s)", function, name, why)
    return name
