"""Packed sequences: which document every token of a row belongs to, in the ways in which transformers tells it.

Positions that begin anew tell it through the mask function that is made from them, or themselves among the arguments
of attention; lengths (`cu_seq_lens_q`) are among those too.

An exported checkpoint carries this file; of attnconvert it must import nothing but `sites` and `kernels`.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils as masks

from .sites import SiteOperators, Unsupported

NO_CACHE = "packed sequences have no cache here: pass use_cache=False"
# The code of the functions of which transformers makes its masks; what was made otherwise is not known here
AND = masks.and_masks(masks.causal_mask_function).__code__
WINDOW = masks.sliding_window_overlay(1).__code__
PACKED = masks.packed_sequence_mask_function(torch.empty(0)).__code__


def _remap() -> Any:
    """Of newer versions: positions that are counted in each document."""
    make: Any = getattr(masks, "remap_positions_for_packed_sequence", None)
    return None if make is None else make(masks.causal_mask_function, torch.empty(0)).__code__


REMAPPED = _remap()


def documents(mask: Callable[..., Any] | None) -> Tensor | None:
    """(B, 1, S): the number of each token's document, on the CPU; None where the mask is simply causal.

    Raises:
        Unsupported: the mask is another one.
    """
    found = [function for function in _parts(mask) if function.__code__ is PACKED]
    if not found:
        return None
    packed: Tensor = _inside(found[0])["packed_sequence_mask"]
    return packed[:, None].cpu()


def _parts(mask: Any) -> Iterator[Any]:
    """The mask functions that one is the conjunction of."""
    code = getattr(mask, "__code__", None)
    if mask is masks.causal_mask_function or code in (WINDOW, PACKED):
        yield mask
    elif code is AND:
        for function in _inside(mask)["mask_functions"]:
            yield from _parts(function)
    elif code is not None and code is REMAPPED:
        yield from _parts(_inside(mask)["mask_function"])
    else:
        raise Unsupported(
            f"a mask function of its own, {getattr(mask, '__qualname__', mask)}, is not known here: known are causal "
            "masks, padding and packed sequences"
        )


def _inside(function: Any) -> Mapping[str, Any]:
    return inspect.getclosurevars(function).nonlocals


def segments(site: SiteOperators, query: Tensor, mask: Tensor | None, others: Mapping[str, Any]) -> Tensor | None:
    """(B, Q): the number of each token's document in a call of attention, on the CPU; None where nothing is packed.

    Args:
        query: (B, H, Q, D); mask: what the mask function gave; others: the arguments of attention by name.

    Raises:
        Unsupported: it is packed and has a cache, or its lengths do not fit.
    """
    lengths, positions = others.get("cu_seq_lens_q"), others.get("position_ids")
    packed = lengths is not None or (mask is not None and mask.dim() == 3)
    if site.layer is not None and (packed or _begins_anew(site, query, mask, positions)):
        raise Unsupported(NO_CACHE)
    if lengths is None:
        found = mask[:, 0] if mask is not None and packed else None
        if mask is None and site.layer is None and site.site.causal:
            found = _by_positions(positions, query.shape[2])
        return None if found is None else found.expand(query.shape[0], -1)
    cu, keys = lengths.cpu(), others.get("cu_seq_lens_k")
    batch, tokens = query.shape[0], query.shape[2]
    if batch != 1 or int(cu[0]) != 0 or int(cu[-1]) != tokens or (keys is not None and not torch.equal(cu, keys.cpu())):
        raise Unsupported(
            f"{site.site.name}: cu_seq_lens_q and cu_seq_lens_k must both cut one row of {tokens} tokens into "
            f"documents; given are {batch} rows and {cu.tolist()}"
        )
    return torch.searchsorted(cu, torch.arange(tokens, dtype=cu.dtype), right=True)[None]


_found: list[tuple[Any, int, Tensor | None]] = []  # the last positions that were looked at, and what was found


def _by_positions(positions: Any, tokens: int) -> Tensor | None:
    """From the positions themselves, which some models (gpt-oss) do not tell their masks; once for all layers."""
    if torch.compiler.is_compiling() or not isinstance(positions, Tensor) or positions.dim() != 2:
        return None
    if positions.shape[1] != tokens:
        return None
    version = -1 if positions.is_inference() else positions._version
    for seen, then, known in tuple(_found):  # as they are now: another thread may look at positions of its own
        if seen() is positions and then == version >= 0:
            return known
    packed = masks.find_packed_sequence_indices(positions)
    packed = None if packed is None else packed.cpu()
    _found[:] = [(weakref.ref(positions), version, packed)]
    return packed


def _begins_anew(site: SiteOperators, query: Tensor, mask: Tensor | None, positions: Any) -> bool:
    """Whether a prompt that goes into a cache has positions that go back, which transformers does not look for then."""
    if site.site.layer or query.shape[2] == 1 or mask is not None or torch.compiler.is_compiling():
        return False
    return isinstance(positions, Tensor) and positions.dim() == 2 and bool((positions.diff(dim=1) < 0).any())
