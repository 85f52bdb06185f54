"""transformers as a host: replace the operators of a model's attention sites, undo it, load it again.

Attention is intercepted where every architecture hands it over: transformers' AttentionInterface, after projection,
norms and rotary embedding. A mask function keeps the 2-D padding mask, and a hook on each site swaps its cache layer
for one that holds the states of our operators. No attention module is rebuilt, so each keeps its own details.

An exported checkpoint carries this file, `architectures`, `caches`, `packing`, `sites` and `kernels`; it must import
nothing else of attnconvert.
"""

from __future__ import annotations

import functools
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers import masking_utils as masks
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ...kernels.call import Call
from ...kernels.spec import Spec
from . import packing
from .architectures import (
    REFUSED,
    by_itself,
    keep_cache_out,
    mark_cross_attention,
    reads_other_sequence,
    rebind,
    unbind,
    use_attention,
)
from .caches import own_layer
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
    seen, at = (0, None) if site.layer is None else site.layer.where(query.shape[2])
    segments = packing.segments(site, query, attention_mask, others)
    if attention_mask is not None and attention_mask.dim() != 3:
        _check_padding(site, attention_mask, (query.shape[0], seen + query.shape[2]))
    if query.dtype != value.dtype:  # autocast leaves rotated queries and keys in fp32
        query, key = query.to(value.dtype), key.to(value.dtype)
    call = Call(
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        seen=seen,
        valid=None if attention_mask is None or attention_mask.dim() == 3 else attention_mask,
        softcap=softcap,
        sink_logits=s_aux,
        limit=sliding_window,
        keep=site.layer is not None,
        causal=site.site.causal,
        segments=segments,
        at=at,
    )
    o: Tensor = site(query, key, value, call)
    return o.transpose(1, 2)


def _check_padding(site: SiteOperators, mask: Tensor, expected: tuple[int, int]) -> None:
    """A padding mask has a column for every token so far; that of a static cache may have more, for those to come."""
    longer = site.layer is not None and site.layer.is_compileable and mask.dim() == 2 and mask.shape[1] > expected[1]
    if mask.shape != expected and not (longer and mask.shape[0] == expected[0]):
        raise Unsupported(
            f"{site.site.name}: the attention mask has shape {tuple(mask.shape)}; this takes "
            f"a padding mask of (batch, tokens so far) = {expected}"
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
    """Keeps the padding mask (B, tokens so far) as it is, or None where every token is real.

    Packed documents come out as (B, 1, S), their numbers by token. A step with a static cache gets a mask as long as
    the cache, whose shape is the same in every step.
    """
    compiling = torch.compiler.is_compiling()
    given = others.get("mask_function")
    plain = given in (masks.causal_mask_function, masks.bidirectional_mask_function)
    both_ways = "allow_is_bidirectional_skip" in others
    skip = others.get("allow_is_bidirectional_skip" if both_ways else "allow_is_causal_skip")
    step = q_length == 1 and kv_length > 1  # of a static cache, where it says so for the sake of the compiler alone
    if skip is False and not plain and not (step and compiling):  # more than order, window and padding, it says
        if compiling:
            advice = "pad the batch instead"
            if attention_mask is None:
                advice = "pass an attention_mask, without one transformers cannot rule them out while it compiles"
            raise Unsupported(f"packed sequences and custom mask functions are not compiled: {advice}")
        documents = packing.documents(given)
        if documents is not None:
            return documents
    if attention_mask is None or (not compiling and bool(attention_mask.all())):  # a compiler sees shapes only
        return None
    if step and skip is False and attention_mask.shape[1] < kv_length:
        return nn.functional.pad(attention_mask, (0, kv_length - attention_mask.shape[1]))
    return attention_mask


def _swap_cache_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a site runs: make its cache layer ours. The argument is named differently from model to model."""
    site: Any = module._modules[NAME]
    cache = next((x for x in (*kwargs.values(), *args) if isinstance(x, Cache)), None)
    layer = None if cache is None else own_layer(site, cache)
    if layer is not None:
        layer.expected = True
    site.called_with(layer)


def _prepare_cache_for_generation(
    model: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> None:
    """As the model's own; the cache then has our layers before generate asks it to record what it may take back."""
    type(model)._prepare_cache_for_generation(model, generation_config, model_kwargs, *args, **kwargs)
    cache = model_kwargs.get("past_key_values")
    if isinstance(cache, Cache):
        for site in model.modules():
            if isinstance(site, SiteOperators) and site.site.causal:
                own_layer(site, cache)
        if generation_config.is_assistant:
            cache.activate_past_recording()


AttentionInterface.register(NAME, attention_function)
masks.AttentionMaskInterface.register(NAME, mask_function)


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
    kept = {"attention": model.config._attn_implementation}
    hooks = []
    for name, mine in sites.items():
        module = submodule(model, name)
        mine.respond = answer
        module.add_module(NAME, mine)
        hooks.append(module.register_forward_pre_hook(_swap_cache_layer, with_kwargs=True))
    if model.can_generate():
        # no method: pickle would find the class's own by its name
        model.__dict__["_prepare_cache_for_generation"] = functools.partial(_prepare_cache_for_generation, model)
    hooks += mark_cross_attention(model, but=sites)
    for module in by_itself(model):
        rebind(module, attention_function)
    use_attention(model, NAME)
    return {**kept, "hooks": hooks, "methods": keep_cache_out(model)}


def _uninstall(model: PreTrainedModel, sites: Mapping[str, SiteOperators], kept: dict[str, Any]) -> None:
    for hook in kept["hooks"]:
        hook.remove()
    for name in sites:
        del submodule(model, name)._modules[NAME]
    model.__dict__.pop("_prepare_cache_for_generation", None)
    for module in by_itself(model):
        unbind(module)
    for name in kept["methods"]:
        delattr(model, name)
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
    if not __name__.startswith(f"{NAME}."):  # a checkpoint's code: what is saved again looks for the class where it is
        Model.__module__ = f"{__package__}.modeling_{NAME}"
    return Model
