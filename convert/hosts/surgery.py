"""Putting a plan to work in a model of either host."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...kernels.spec import Spec
from .sites import Conversion, Site, SiteOperators, submodule


def is_diffusion(model: Any) -> bool:
    """Whether it is a denoiser of diffusers, not a language model or encoder of transformers."""
    return not isinstance(model, PreTrainedModel)


def find_sites(model: Any) -> list[Site]:
    """The sites of a model of either host, found by running it.

    Raises:
        Unsupported: nothing in it can be converted, or something in it is not known here.
    """
    if is_diffusion(model):
        from .denoisers import find_sites as of_denoiser

        return of_denoiser(model)
    from .models import find_sites as of_transformer

    return of_transformer(model)


def convert(model: Any, plan: Mapping[Site, Sequence[Spec]]) -> Conversion:
    """Put a plan to work in the model.

    Raises:
        Unsupported: an operator does not fit its site. ValueError: the model is converted already.
    """
    if is_diffusion(model):
        from .diffusers import convert as of_diffusers

        return of_diffusers(model, plan)
    from .transformers import convert as of_transformers

    return of_transformers(model, plan)


@contextlib.contextmanager
def converted(model: Any, plan: Mapping[Site, Sequence[Spec]]) -> Iterator[Conversion]:
    """Inside, a plan is at work in the model."""
    conversion = convert(model, plan)
    try:
        yield conversion
    finally:
        conversion.remove()


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter that the model has now asks for gradients."""
    trained = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


def linear_layers(module: nn.Module, name: str) -> dict[str, nn.Module]:
    """The projections inside a module called `name`, by full name: nn.Linear, and GPT-2's Conv1D, which is one
    transposed; not those that operators brought.
    """
    ours = {inner for child in module.modules() if isinstance(child, SiteOperators) for inner in child.modules()}
    layers = {f"{name}.{key}": child for key, child in module.named_modules() if isinstance(child, nn.Linear | Conv1D)}
    return {key: child for key, child in layers.items() if child not in ours}


def block_of(model: nn.Module, name: str) -> str | None:
    """The name of the block that holds a module: the innermost entry of a list of modules; None where there is none."""
    path = name.split(".")
    lists = [n for n in range(1, len(path)) if isinstance(submodule(model, ".".join(path[:n])), nn.ModuleList)]
    return ".".join(path[: lists[-1] + 1]) if lists else None
