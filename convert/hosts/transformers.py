"""transformers as a host: replace the operators of a model's attention sites, undo it, load it again.

Attention is intercepted where every architecture hands it over: transformers' AttentionInterface, after projection,
norms and rotary embedding. A mask function keeps the 2-D padding mask, and a hook on each site swaps its cache layer
for one that holds the states of our operators. No attention module is rebuilt, so each keeps its own details.

An exported checkpoint carries this file, `architectures`, `sites` and `kernels`; it must import nothing else of
attnconvert.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, EncoderDecoderCache, StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, causal_mask_function

from ...kernels.call import Call, map_state, state_bytes
from ...kernels.spec import Spec
from .architectures import (
    REFUSED,
    by_itself,
    keep_cache_out,
    mark_cross_attention,
    may_read_others,
    reads_other_sequence,
    rebind,
    unbind,
    use_attention,
)
from .sites import NAME, Conversion, Site, SiteOperators, Unsupported, read_plan_block, submodule


def answer(
    site: SiteOperators,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """One call of the attention interface. Shapes as in `attention_function`. → (B, Q, H, D)"""
    for name, why in REFUSED.items():
        if others.get(name) is not None:
            raise Unsupported(f"{site.site.name} gets {name}: {why}, which no operator here knows")
    seen = site.layer.seen if site.layer is not None else 0
    expected = (query.shape[0], seen + query.shape[2])
    if attention_mask is not None and attention_mask.shape != expected:
        raise Unsupported(
            f"{site.site.name}: the attention mask has shape {tuple(attention_mask.shape)}; this takes "
            f"a padding mask of (batch, tokens so far) = {expected}"
        )
    if query.dtype != value.dtype:  # autocast leaves rotated queries and keys in fp32
        query, key = query.to(value.dtype), key.to(value.dtype)
    call = Call(
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        seen=seen,
        valid=attention_mask,
        softcap=softcap,
        sink_logits=s_aux,
        limit=sliding_window,
        keep=site.layer is not None,
        causal=site.site.causal,
    )
    o: Tensor = site(query, key, value, call)
    return o.transpose(1, 2)


class OperatorLayer(CacheLayerMixin):
    """The cache of one site: the state of each operator in it instead of all keys and values."""

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_initialized = True
        self.seen = 0
        self.owner: tuple[object, ...] | None = None  # site, operators, and whether the student's
        self.expected = False
        self.states: list[Any] = []

    def begin(self, site: SiteOperators, parts: int, new: int) -> list[Any]:
        """The states before `new` tokens; counts them."""
        owner = (site.site.name, site.specs, site.active)
        if self.owner is None:
            self.owner, self.states = owner, [None] * parts
        elif self.owner != owner:
            whose = "the teacher and the student" if self.owner[:2] == owner[:2] else "two models or plans"
            raise Unsupported(f"{site.site.name}: a cache cannot be shared by {whose}: start a new one")
        self.seen += new
        return self.states

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hands back the new keys and values only; the operators keep what they need."""
        if not self.expected:
            raise Unsupported("this cache is a converted model's: the model it was given to has no operators for it")
        self.expected = False
        return key_states, value_states

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate before the first call."""

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + int(query_length), 0

    def get_max_length(self) -> int:
        return -1

    def state_bytes(self) -> int:
        """Bytes held, measured on the tensors themselves."""
        return sum(state_bytes(state) for state in self.states if state is not None)

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        self.states = [None if state is None else map_state(state, change) for state in self.states]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda x: x[indices])

    def offload(self) -> None:
        raise Unsupported("a converted model's cache cannot be offloaded: it is small by design; turn offloading off")

    def reset(self) -> None:
        self.seen, self.owner, self.states = 0, None, []

    def crop(self, *args: Any) -> None:
        raise Unsupported(
            "a converted model cannot take tokens back from its cache (crop): windows and states have forgotten what "
            "was before. Assisted decoding and prompt lookup need that; generate without them"
        )


def attention_function(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """What transformers calls for every site. query (B, H, Q, D), key, value (B, Hk, Q, D) → (B, Q, H, D), None

    The site itself answers: a checkpoint's own copy of this file may live in the same process and register last.
    Attention to another sequence has no operators; it is answered as ever.
    """
    site: Any = module._modules.get(NAME)
    if site is None and reads_other_sequence(module):
        mask = None if attention_mask is None else attention_mask[:, None, None].bool()
        o, _ = sdpa_attention_forward(module, query, key, value, mask, **{**settings, "is_causal": False})
        return o, None
    if site is None:
        raise Unsupported(f"{type(module).__name__} has no operators: install a plan before running the model")
    return site.answer(query, key, value, attention_mask, **settings), None


def mask_function(
    batch_size: int, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **others: Any
) -> Tensor | None:
    """Keeps the padding mask (B, tokens so far) as it is, or None where every token is real."""
    compiling = torch.compiler.is_compiling()
    plain = others.get("mask_function") in (causal_mask_function, bidirectional_mask_function)
    both_ways = "allow_is_bidirectional_skip" in others
    skip = "allow_is_bidirectional_skip" if both_ways else "allow_is_causal_skip"
    if others.get(skip) is False and not plain:  # so transformers says that it is more than order, window and padding
        advice = "pad the batch instead"
        if compiling and attention_mask is None:
            advice = "pass an attention_mask, without one transformers cannot rule them out while it compiles"
        raise Unsupported(f"packed sequences and custom mask functions are not supported: {advice}")
    if attention_mask is None or compiling:  # a compiler sees shapes, not whether all are real
        return attention_mask
    return None if bool(attention_mask.all()) else attention_mask


def _swap_cache_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a site runs: make its cache layer ours. The argument is named differently from model to model."""
    site: Any = module._modules[NAME]
    cache = next((x for x in (*kwargs.values(), *args) if isinstance(x, Cache)), None)
    site.layer = None
    if cache is None:
        return
    if getattr(cache, "offloading", False):
        raise Unsupported("a converted model's cache cannot be offloaded: it is small by design; turn offloading off")
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    index = site.site.layer if site.site.slot is None else site.site.slot
    while len(cache.layers) <= index:
        cache.layers.append(DynamicLayer())
    layer = cache.layers[index]
    if not isinstance(layer, OperatorLayer):
        if isinstance(layer, StaticLayer):
            raise Unsupported(
                "a converted model has no static cache: its states are small and fixed; use the default cache"
            )
        if layer.get_seq_length() > 0:
            raise Unsupported("the cache was filled by another model: start a new one")
        layer = cache.layers[index] = OperatorLayer()
    layer.expected = True
    site.layer = layer


AttentionInterface.register(NAME, attention_function)
AttentionMaskInterface.register(NAME, mask_function)


def convert(model: PreTrainedModel, plan: Mapping[Site, Sequence[Spec]]) -> Conversion:
    """Put a plan to work in the model.

    Raises:
        Unsupported: an operator does not fit its site. ValueError: the model is converted already.
    """
    return Conversion(model, plan, _install, _uninstall)


def _install(model: PreTrainedModel, sites: Mapping[str, SiteOperators]) -> dict[str, Any]:
    for name in sites:
        if NAME in submodule(model, name)._modules:
            raise ValueError(f"{name} is converted already: remove the first conversion")
    kept = {"attention": model.config._attn_implementation, "stateful": getattr(model, "_is_stateful", False)}
    hooks = []
    for name, mine in sites.items():
        module = submodule(model, name)
        mine.respond = answer
        module.add_module(NAME, mine)
        hooks.append(module.register_forward_pre_hook(_swap_cache_layer, with_kwargs=True))
    for name, module in may_read_others(model):
        if name not in sites:
            hooks.append(module.register_forward_pre_hook(mark_cross_attention, with_kwargs=True))
    for module in by_itself(model):
        rebind(module, attention_function)
    model._is_stateful = True  # generate then refuses to roll back before it starts
    use_attention(model, NAME)
    return {**kept, "hooks": hooks, "methods": keep_cache_out(model)}


def _uninstall(model: PreTrainedModel, sites: Mapping[str, SiteOperators], kept: dict[str, Any]) -> None:
    for hook in kept["hooks"]:
        hook.remove()
    for name in sites:
        del submodule(model, name)._modules[NAME]
    for module in by_itself(model):
        unbind(module)
    for name in kept["methods"]:
        delattr(model, name)
    model._is_stateful = kept["stateful"]
    use_attention(model, kept["attention"])


def converted_config(base: type[PreTrainedModel]) -> type[PreTrainedConfig]:
    """The config class of a converted checkpoint of a stock class such as LlamaForCausalLM.

    The model type is `attnconvert`, so that nothing takes the checkpoint for the dense model.
    """
    stock: Any = base.config_class
    config: type[PreTrainedConfig] = type(f"Converted{stock.__name__}", (stock,), {"model_type": NAME})
    return config


def converted_model(base: type[PreTrainedModel], config: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """The model class of a converted checkpoint: the stock class, with the plan of its config installed."""

    class Model(base):  # type: ignore[misc,valid-type]
        config_class = config
        _keep_in_fp32_modules_strict = (*(getattr(base, "_keep_in_fp32_modules_strict", None) or ()), NAME)

        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            self.conversion = convert(self, read_plan_block(config.attnconvert))

        def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
            conversion = getattr(self, "conversion", None)
            if attn_implementation != NAME and (conversion is None or conversion.installed):
                warnings.warn(
                    f"{type(self).__name__} keeps its own attention; {attn_implementation!r} is not used", stacklevel=2
                )
                attn_implementation = NAME
            super().set_attn_implementation(attn_implementation, *args, **kwargs)

        def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
            """As ever, with the runtime beside the weights, so that what is saved again loads as this did."""
            super().save_pretrained(save_directory, *args, **{"save_original_format": False, **kwargs})
            source, target = Path(self.config._name_or_path), Path(save_directory)
            for file in (*source.glob(f"{NAME}_*.py"), *source.glob(f"*_{NAME}.py")):
                if not (target / file.name).exists():
                    shutil.copy(file, target)

    Model.__name__ = Model.__qualname__ = f"Converted{base.__name__}"
    return Model
