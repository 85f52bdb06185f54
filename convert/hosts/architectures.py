"""What single architectures say in words of their own: one row each, where the general rules do not reach.

transformers hands attention over in one place, its AttentionInterface. A class of attention that calls PyTorch's
scaled_dot_product_attention by itself is reached through its own code: it runs as it stands, with that name meaning
ours. Attention that reads another sequence than its own (cross-attention) is left as it was.

An exported checkpoint carries this file; with `sites`; it must import nothing else of attnconvert.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import types
from collections.abc import Callable, Container
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from .sites import Unsupported

# Classes that call scaled_dot_product_attention by themselves → arguments of theirs that no operator honours, and why
BY_ITSELF: dict[str, dict[str, str]] = {
    "FalconAttention": {"alibi": "a bias that grows with the distance is added to its logits"},
}
# Arguments that architectures pass to the interface and that no operator here honours
REFUSED: dict[str, str] = {
    "position_bias": "a learned number for each pair of positions is added to its logits (T5)",
    "head_mask": "heads are switched off from outside",
    "cache": "keys and values are kept in pages (continuous batching)",
    "encoder_hidden_states": "it reads another sequence than its own",
}
# Methods of models that take keys and values out of the cache of what was generated, of which there are none
READ_CACHE = ("_postprocess_outputs",)  # Whisper
OTHER_SEQUENCE = ("key_value_states", "encoder_hidden_states")  # by these names cross-attention gets what it reads
GUARD = "attnconvert_not_pickled"  # on a module that is rebound
MARK = "attnconvert_reads_other_sequence"  # on a module: whether it does in the pass that runs

Answer = Callable[..., tuple[Tensor, Any]]  # an attention function of transformers


# --- attention that reads another sequence ----------------------------------------------------------------------------


def mark_cross_attention(model: nn.Module, but: Container[str] = ()) -> list[Any]:
    """Hooks on the attentions that take another sequence as an argument: each notes whether the pass gives it one.

    Those with the names `but` are left out. A compiler reads the hook, so all that it needs is looked up before.
    """
    hooks = []
    for name, module in model.named_modules():
        named = _parameters(module)
        if name in but or not type(module).__name__.endswith("Attention") or not set(OTHER_SEQUENCE) & set(named):
            continue
        places = tuple((argument, named.index(argument)) for argument in OTHER_SEQUENCE if argument in named)
        hooks.append(module.register_forward_pre_hook(_marking(places), with_kwargs=True))
    return hooks


def _marking(places: tuple[tuple[str, int], ...]) -> Callable[..., None]:
    def mark(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = False
        for name, place in places:
            given = args[place] if place < len(args) else kwargs.get(name)
            found = found or given is not None
        setattr(module, MARK, found)

    return mark


def reads_other_sequence(module: nn.Module) -> bool:
    """Whether the pass that runs gave it another sequence to read."""
    return bool(getattr(module, MARK, False))


def _parameters(module: nn.Module) -> list[str]:
    """The arguments of its forward, in order."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


# --- attention that does not ask transformers -------------------------------------------------------------------------


class Running(threading.local):
    """The attention at work in this thread, and what answers its calls."""

    module: Any = None
    function: Any = None


RUNNING = Running()


class _NotPickled:
    """Says no where a module that holds it is pickled: its forward would be read back as that of its class, dense."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise Unsupported(
            f"{self.name} cannot be pickled while it is converted: save the model by attnconvert export or "
            "save_pretrained"
        )

    def __deepcopy__(self, memo: Any) -> _NotPickled:
        return self


class _Names(types.ModuleType):
    """A module in which some names mean something else."""

    def __init__(self, real: types.ModuleType, **ours: Any) -> None:
        super().__init__(real.__name__)
        self.__dict__.update(ours, _real=real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Stands in for PyTorch's own: query (B, H, Q, D), key, value (B, Hk, K, D) → (B, H, Q, D)"""
    found: Tensor = RUNNING.function(RUNNING.module, query, key, value, attn_mask, scaling=scale)[0]
    return found.transpose(1, 2)


def by_itself(model: nn.Module) -> list[nn.Module]:
    """The attentions of a model that call scaled_dot_product_attention by themselves."""
    return [module for module in model.modules() if type(module).__name__ in BY_ITSELF]


def rebind(module: nn.Module, function: Answer) -> None:
    """From now on `function` answers an attention of `by_itself`, with the arguments of an attention function.

    Raises:
        Unsupported: this version of its class does not call scaled_dot_product_attention.
    """
    name, named = type(module).__name__, _parameters(module)
    stock: Any = type(module)
    run = _rebound(stock)
    places = [(argument, named.index(argument), why) for argument, why in BY_ITSELF[name].items()]

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for argument, place, why in places:
            given = args[place] if place < len(args) else kwargs.get(argument)
            if given is not None:
                raise Unsupported(f"{name} gets {argument}: {why}, which no operator here knows")
        before = RUNNING.module, RUNNING.function
        RUNNING.module, RUNNING.function = self, function
        try:
            return run(self, *args, **kwargs)
        finally:
            RUNNING.module, RUNNING.function = before

    own = copy.copy(module.config)
    own._attn_implementation_internal = "sdpa"  # type: ignore[union-attr] # so it takes the way that makes that call
    module.__dict__["config_of_model"], module.config = module.config, own
    module.forward = types.MethodType(forward, module)
    module.__dict__[GUARD] = _NotPickled(name)


def unbind(module: nn.Module) -> None:
    """The undo of `rebind`."""
    module.config = module.__dict__.pop("config_of_model")
    del module.forward, module.__dict__[GUARD]


@functools.cache
def _rebound(stock: Any) -> Callable[..., Any]:
    """The code of a class of attention, in which scaled_dot_product_attention is ours."""
    original: Any = inspect.unwrap(stock.forward)
    if "scaled_dot_product_attention" not in original.__code__.co_names:
        raise Unsupported(f"{stock.__name__} of this transformers does not call scaled_dot_product_attention")
    functional = _Names(F, scaled_dot_product_attention=scaled_dot_product_attention)
    library = _Names(torch, nn=_Names(nn, functional=functional))
    names = {**original.__globals__, "torch": library, "F": functional}
    del names["__name__"]  # by which torch.compile would take the names of the stock module for ours, and reversely
    run = types.FunctionType(original.__code__, names, original.__name__, original.__defaults__, original.__closure__)
    run.__kwdefaults__ = original.__kwdefaults__
    return run


def keep_cache_out(model: PreTrainedModel) -> list[str]:
    """From now on methods of `READ_CACHE` are given outputs without the cache; `del` of these names undoes it."""
    found = [name for name in READ_CACHE if hasattr(type(model), name)]
    for name in found:
        model.__dict__[name] = functools.partial(_without_cache, model, name)
    return found


def _without_cache(model: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    """The answer of a model's method to outputs without the cache."""
    given = {name: _cut(value) for name, value in kwargs.items()}
    return getattr(type(model), method)(model, *map(_cut, args), **given)


def _cut(x: Any) -> Any:
    if not isinstance(x, ModelOutput):
        return x
    return type(x)(**{key: value for key, value in x.items() if key != "past_key_values"})


def use_attention(model: PreTrainedModel, name: str) -> None:
    """`set_attn_implementation`, which leaves out models with attentions that do not ask the interface."""
    if not by_itself(model):
        model.set_attn_implementation(name)
        return
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._attn_implementation_internal = name
