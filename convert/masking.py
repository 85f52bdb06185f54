"""Texts with some tokens masked: what an encoder with a masked-token head was trained on and is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .seeds import rng
from .text import frame

SHARE = 0.15  # of the tokens, as BERT was trained


@dataclass(frozen=True)
class Masked:
    """Texts `ids` (n, S), `shown` (n, S) the same with masks, and `hidden` (n, S), true where a mask stands."""

    ids: Tensor
    shown: Tensor
    hidden: Tensor


def masked(tokenizer: Any, ids: Tensor, seed: int) -> Masked | None:
    """The texts with every token masked with a chance of SHARE, but those that frame a text; at least one in each.

    None where the tokenizer has no mask.
    """
    mask = getattr(tokenizer, "mask_token_id", None)
    if mask is None:
        return None
    start, end = (len(part) for part in frame(tokenizer))
    body = ids.shape[1] - start - end
    draws = torch.rand(len(ids), body, generator=rng("masked", seed, ids.shape[1]))
    chosen = (draws < SHARE) | (draws == draws.min(1, keepdim=True).values)
    hidden = torch.nn.functional.pad(chosen, (start, end))
    return Masked(ids, ids.masked_fill(hidden, mask), hidden)
