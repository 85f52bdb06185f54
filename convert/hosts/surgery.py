"""Putting a plan to work in a model of either host."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...kernels.spec import Spec
from .sites import Conversion, Site


def is_diffusion(model: Any) -> bool:
    """Whether it is a denoiser of diffusers, not a language model or encoder of transformers."""
    return not isinstance(model, PreTrainedModel)


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
