"""diffusers as a host: replace the operators of a denoiser's self-attentions, undo it, load it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...kernels.spec import Spec
from .sites import Conversion, Site


def convert(model: Any, plan: Mapping[Site, Sequence[Spec]]) -> Conversion:
    """Put a plan to work in the model."""
    raise NotImplementedError
