"""The cache of a converted decoder: one layer for each site, which holds the states of its operators.

transformers makes its own cache with layers of its own; `own_layer` puts ours in their place, dynamic ones or, in a
static cache, ones whose tensors never change shape or place, so that a decoding step compiles once.

An exported checkpoint carries this file, `transformers`, `sites` and `kernels`; it must import nothing else of
attnconvert.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, QuantizedCache, StaticLayer

from ...kernels import operators
from ...kernels.call import Call, map_state, recall, remember, state_bytes
from ...kernels.full import FullState
from ...kernels.spec import label
from .sites import SiteOperators, Unsupported

KEPT = 512  # of a longer call that may be taken back, so many tokens can be: a prompt, with candidates behind it
TO_GO_BACK = (
    "a converted model's windows and states forget: call cache.activate_past_recording() once the cache is in use, "
    "and crop before the tokens are too many"
)


@dataclass
class Past:
    """What it takes to go back to any point since `seen` tokens: the states then, and q, k, v of every token since."""

    seen: int
    states: list[Any]
    log: list[tuple[Tensor, Tensor, Tensor]]
    valid: Tensor | None = None

    def changed(self, change: Callable[[Tensor], Tensor]) -> Past:
        """With `change` applied to every tensor; all have the batch first."""
        states = [None if x is None else map_state(x, change) for x in self.states]
        log = [(change(q), change(k), change(v)) for q, k, v in self.log]
        return Past(self.seen, states, log, None if self.valid is None else change(self.valid))


class OperatorLayer(CacheLayerMixin):
    """The cache of one site: the state of each operator in it instead of all keys and values.

    Where `record_past` is set, tokens can be taken back until the next `crop`: the states before them are kept, and
    what came since is fed again.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_initialized = True
        self.seen = 0
        self.owner: tuple[object, ...] | None = None  # site, operators, and whether the student's
        self.expected = False
        self.states: list[Any] = []
        self.record_past = False
        self.past: Past | None = None
        self.stale = False  # tokens were taken back, and the states are still those after them
        self.siblings: list[Any] = []  # the layers of the cache

    def where(self, new: int) -> tuple[int, Tensor | None]:
        """How many tokens came before the `new` ones, and their position as a tensor where shapes are fixed."""
        return self.seen, None

    def attend(
        self, site: SiteOperators, uses: Sequence[operators.Use], q: Tensor, k: Tensor, v: Tensor, call: Call
    ) -> Tensor:
        """The new tokens q (B, H, Q, D), k, v (B, Hk, Q, D) to what is held, and then to it. → (B, H, Q, D)"""
        self.claim(site, len(uses))
        if self.stale:
            self._feed_again(uses, call)
        self.seen += q.shape[2]
        if not self.record_past or all(_only_grows(use, call) for use in uses):
            self.past = None
            o, self.states = operators.attend_all(uses, q, k, v, call, self.states)
            return o
        return self._recorded(uses, q, k, v, call)

    def claim(self, site: SiteOperators, parts: int) -> None:
        """The first site that comes makes the cache its own."""
        owner = (site.site.name, site.specs, site.active)
        if self.owner is None:
            self.owner, self.states = owner, self.states or [None] * parts
        elif self.owner != owner:
            whose = "the teacher and the student" if self.owner[:2] == owner[:2] else "two models or plans"
            raise Unsupported(f"{site.site.name}: a cache cannot be shared by {whose}: start a new one")

    def _recorded(self, uses: Sequence[operators.Use], q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """As `attend`; of a long call the first tokens, which nobody takes back, are not kept."""
        outputs = []
        early = max(0, q.shape[2] - KEPT)
        if early:
            valid = None if call.valid is None else call.valid[:, : call.seen + early]
            first = dataclasses.replace(call, valid=valid)
            tokens = q[:, :, :early], k[:, :, :early], v[:, :, :early]
            o, self.states = operators.attend_all(uses, *tokens, first, self.states)
            outputs.append(o)
            q, k, v = (x[:, :, early:] for x in (q, k, v))
            call, self.past = dataclasses.replace(call, seen=call.seen + early), None
        if self.past is None:
            self.past = Past(call.seen, [remember(state) for state in self.states], [])
        self.past.log.append((q.detach(), k.detach(), v.detach()))
        self.past.valid = call.valid
        o, self.states = operators.attend_all(uses, q, k, v, call, self.states)
        outputs.append(o)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last −tokens_to_remove tokens, and forgets what was kept for it.

        Raises:
            Unsupported: these are more than some layer of the cache can take back; all layers then stay as they are.
        """
        count = -int(tokens_to_remove)
        if count < 0:
            raise Unsupported(f"crop({-count}): give the number of tokens to take back, as a negative number")
        together = [x for x in self.siblings if isinstance(x, OperatorLayer) and x.seen == self.seen]
        most = min(x.room_to_go_back() for x in (self, *together))
        if count > most and self.seen:
            raise Unsupported(f"{count} tokens are to be taken back from the cache, {most} can be: {TO_GO_BACK}")
        if count == 0:
            self.past = self.past if self.stale else None
        elif self.past is not None:
            self.seen, self.stale = self.seen - count, True
        elif self.seen:
            self.seen -= count
            self.states = [dataclasses.replace(state, length=self.seen) for state in self.states]

    def room_to_go_back(self) -> int:
        """How many tokens can be taken back: those since what is kept, or, of full attention alone, all."""
        if self.past is not None:
            return self.seen - self.past.seen
        return self.seen if all(isinstance(state, FullState) for state in self.states) else 0

    @torch.no_grad()
    def _feed_again(self, uses: Sequence[operators.Use], call: Call) -> None:
        """The states after the tokens that were not taken back."""
        past, self.past, self.stale = self.past, None, False
        assert past is not None
        states = [recall(then, now) for then, now in zip(past.states, self.states, strict=True)]
        length = self.seen - past.seen
        if length:
            q, k, v = (torch.cat(x, 2)[:, :, :length] for x in zip(*past.log, strict=True))
            valid = None if past.valid is None else past.valid[:, : self.seen]
            again = dataclasses.replace(call, seen=past.seen, valid=valid)
            _, states = operators.attend_all(uses, q, k, v, again, states)
        self.states = states

    def activate_past_recording(self) -> None:
        """From the next call on, what is fed can be taken back."""
        self.record_past = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hands back the new keys and values only; the operators keep what they need."""
        if not self.expected:
            raise Unsupported("this cache is a converted model's: the model it was given to has no operators for it")
        self.expected = False
        return key_states, value_states

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate before the first call."""

    def get_seq_length(self) -> Any:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + int(query_length), 0

    def get_max_length(self) -> int:
        return -1

    def state_bytes(self) -> int:
        """Bytes held, measured on the tensors themselves; with what is kept to take tokens back."""
        kept = [] if self.past is None else [x for new in self.past.log for x in new]
        before = 0 if self.past is None else sum(state_bytes(state) for state in self.past.states)
        return sum(map(state_bytes, self.states)) + before + sum(x.numel() * x.element_size() for x in kept)

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        self.states = [None if state is None else map_state(state, change) for state in self.states]
        self.past = None if self.past is None else self.past.changed(change)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda x: x[indices])

    def offload(self) -> None:
        raise Unsupported("a converted model's cache cannot be offloaded: it is small by design; turn offloading off")

    def reset(self) -> None:
        self.seen, self.owner, self.states, self.past, self.stale = 0, None, [], None, False


def _only_grows(use: operators.Use, call: Call) -> bool:
    """Whether its state can be cut anywhere as it is."""
    return use.spec.operator == "full" and call.limit is None


class StaticOperatorLayer(OperatorLayer):
    """The same in a static cache: room for `room` tokens (None: without a bound) is made at the first call.

    A prompt, or a chunk of one, is fed outside of torch.compile. A step of one token writes into tensors that stay
    where they are, at a position that is a tensor itself, so it compiles once for all steps.
    """

    is_compileable = True
    is_croppable = False

    def __init__(self, room: int | None) -> None:
        super().__init__()
        self.room, self.filled = room, False
        self.length = torch.zeros((), dtype=torch.long)

    def where(self, new: int) -> tuple[int, Tensor | None]:
        if new == 1 and self.filled:
            return 0, self.length.view(1)
        if torch.compiler.is_compiling():
            raise Unsupported("a static cache is filled outside of torch.compile: compile the steps of one token only")
        return int(self.length), None

    def attend(
        self, site: SiteOperators, uses: Sequence[operators.Use], q: Tensor, k: Tensor, v: Tensor, call: Call
    ) -> Tensor:
        self.claim(site, len(uses))
        if torch.is_grad_enabled() and q.requires_grad:
            raise Unsupported("a static cache is for generation: run the model under torch.no_grad()")
        if call.at is not None:
            o, self.states = operators.attend_all(uses, q, k, v, call, self.states)
            self.length.add_(1)
            return o
        total = call.seen + q.shape[2]
        if self.room is not None and total > self.room:
            raise Unsupported(f"the static cache has room for {self.room} tokens, not for {total}: make a larger one")
        if call.valid is not None:
            call = dataclasses.replace(call, valid=call.valid[:, :total])
        self.length = self.length.to(q.device)
        before: list[object] = [None] * len(uses)
        if self.filled:
            before = [operators.moving(use, state, call.seen) for use, state in zip(uses, self.states, strict=True)]
        o, after = operators.attend_all(uses, q, k, v, call, before)
        fixed = [operators.fixed(use, state, total, self.room) for use, state in zip(uses, after, strict=True)]
        self._write(fixed)
        self.length.fill_(total)
        return o

    def _write(self, states: list[Any]) -> None:
        """New contents for the tensors that are there already, which keep their places."""
        self.filled = True
        new = _tensors(states)
        if [x.shape for x in new] != [x.shape for x in _tensors(self.states)]:
            self.states = states
            for x in (self.length, *new):
                torch._dynamo.mark_static_address(x)
            return
        for old, x in zip(_tensors(self.states), new, strict=True):
            old.copy_(x)

    def get_seq_length(self) -> Any:
        return self.length if self.filled else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (int(query_length) if self.room is None else self.room), 0

    def get_max_length(self) -> int:
        return -1 if self.room is None else self.room

    def activate_past_recording(self) -> None:
        """Nothing is taken back from a static cache."""

    def crop(self, tokens_to_remove: int) -> None:
        raise Unsupported("tokens cannot be taken back from a static cache (crop): use the default cache")

    def reset(self) -> None:
        """Empty again, in the tensors that are there."""
        self.owner, self.filled = None, False
        self.length.zero_()


def _tensors(states: Sequence[Any]) -> list[Tensor]:
    """Of all states, in order; none of a state that is not there yet."""
    values = [getattr(x, f.name) for x in states if x is not None for f in dataclasses.fields(x)]
    return [x for x in values if isinstance(x, Tensor)]


def own_layer(site: SiteOperators, cache: Cache) -> OperatorLayer:
    """The layer of a site in a cache, put in the place of the stock one where it is still empty.

    Raises:
        Unsupported: it is a kind of cache that cannot be, or it has been filled by another model.
    """
    cache = getattr(cache, "self_attention_cache", cache)
    index = site.site.layer if site.site.slot is None else site.site.slot
    if len(cache.layers) > index and isinstance(layer := cache.layers[index], OperatorLayer):
        return layer
    if getattr(cache, "offloading", False):
        raise Unsupported("a converted model's cache cannot be offloaded: it is small by design; turn offloading off")
    if isinstance(cache, QuantizedCache):
        raise Unsupported("a converted model's cache cannot be quantised: it is small by design; use the default cache")
    while len(cache.layers) <= index:
        cache.layers.append(DynamicLayer())
    old: Any = cache.layers[index]
    if old.is_initialized and old.get_seq_length() > 0:
        raise Unsupported("the cache was filled by another model: start a new one")
    layer = StaticOperatorLayer(_room(site, cache)) if isinstance(old, StaticLayer) else OperatorLayer()
    layer.record_past = bool(getattr(old, "record_past", False))
    cache.layers[index], layer.siblings = layer, cache.layers
    return layer


def _room(site: SiteOperators, cache: Cache) -> int | None:
    """How many tokens a static cache is for; None where all its layers are sliding windows, which do not say."""
    for spec in site.specs:
        if not operators.can_be_fixed(spec):
            raise Unsupported(
                f"{site.site.name} has {label(spec)}, whose state has no fixed shape, so that no static cache can hold "
                "it: use the default cache"
            )
    rooms = [x.room for x in cache.layers if isinstance(x, StaticOperatorLayer)]
    rooms += [x.max_cache_len for x in cache.layers if isinstance(x, StaticLayer) and not x.is_sliding]
    return max([x for x in rooms if x is not None], default=None)
