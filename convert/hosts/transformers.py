"""transformers as a host: replace the operators of a model's attention sites, undo it, load it again.

Attention is intercepted where every architecture hands it over: transformers' AttentionInterface, after projection,
norms and rotary embedding. A mask function keeps the 2-D padding mask, and a hook on each site swaps its cache layer
for one that holds the states of our operators. No attention module is rebuilt, so each keeps its own details.

An exported checkpoint carries this file and `kernels`; it must import nothing else of attnconvert.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function

from ...kernels import operators
from ...kernels.call import Call, map_state, state_bytes
from ...kernels.spec import Full, Retention, Spec, Window, label, spec_from_dict, spec_to_dict

NAME = "attnconvert"  # of the attention implementation, the submodule of a site, the config block and the model type
FORMAT = 1  # of the config block
REFUSED = ("position_bias", "head_mask", "cache", "cu_seq_lens_q", "encoder_hidden_states")

Observer = Callable[["SiteOperators", Tensor, Tensor, Tensor, Call], "Tensor | None"]


class Unsupported(ValueError):
    """The model, or something asked of it, is beyond what can be converted; the message names the module and why."""


@dataclasses.dataclass(frozen=True)
class Site:
    """One self-attention: `name` of its module, layer index, query heads, KV heads, head dimension, own window.

    Where it is not `causal` rows read in both directions, as in an encoder.
    """

    name: str
    layer: int
    heads: int
    kv_heads: int
    dim: int
    limit: int | None = None
    causal: bool = True


def refusal(site: Site, spec: Spec) -> str | None:
    """Why a site cannot take an operator, or None where it can."""
    if not site.causal and isinstance(spec, Retention):
        return f"{site.name} reads in both directions, and {label(spec)} keeps what later rows will read"
    if site.limit is None or isinstance(spec, Full):
        return None
    if not isinstance(spec, Window):
        return f"{site.name} has a sliding window of {site.limit} tokens of its own, which {label(spec)} reads beyond"
    if spec.size + spec.sinks >= site.limit:
        return f"{site.name} has a sliding window of {site.limit} tokens of its own: {label(spec)} keeps no less"
    return None


def all_full(sites: Iterable[Site]) -> dict[Site, list[Spec]]:
    """The plan that converts nothing: the teacher on our own code."""
    return {site: [Full()] * site.kv_heads for site in sites}


class SiteOperators(nn.Module):
    """What attnconvert hangs into an attention module: the operator of each KV group and what it learned.

    `active` False runs full attention everywhere: the teacher. An `observer` sees every call and may answer it.
    """

    def __init__(self, site: Site, specs: Sequence[Spec]) -> None:
        super().__init__()
        if len(specs) != site.kv_heads:
            raise ValueError(f"{site.name} has {site.kv_heads} KV groups but the plan names {len(specs)} operators")
        for spec in specs:
            if reason := refusal(site, spec):
                raise Unsupported(reason)
        self.site, self.specs = site, tuple(specs)
        self.active = True
        self.observer: Observer | None = None
        self.layer: OperatorLayer | None = None
        group = site.heads // site.kv_heads
        self.parts = [(s, tuple(i for i, x in enumerate(specs) if x == s)) for s in dict.fromkeys(specs)]
        for spec, groups in self.parts:
            heads = len(groups)
            learned = operators.of(spec).parameters(spec, heads * group, heads, site.dim)
            if learned is not None:
                self.add_module(label(spec), learned)

    def learned(self, spec: Spec) -> nn.Module | None:
        """The feature maps and gates of one operator, or None."""
        return self._modules.get(label(spec))

    def answer(
        self,
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
        for name in REFUSED:
            if others.get(name) is not None:
                raise Unsupported(f"{self.site.name} passes {name} to its attention, which no operator here knows")
        seen = self.layer.seen if self.layer is not None else 0
        expected = (query.shape[0], seen + query.shape[2])
        if attention_mask is not None and attention_mask.shape != expected:
            raise Unsupported(
                f"{self.site.name}: the attention mask has shape {tuple(attention_mask.shape)}; this takes "
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
            keep=self.layer is not None,
            causal=self.site.causal,
        )
        o: Tensor = self(query, key, value, call)
        return o.transpose(1, 2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """q (B, H, Q, D), k, v (B, Hk, Q, D), all of the new tokens → (B, H, Q, D)"""
        answer = self.observer(self, q, k, v, call) if self.observer is not None else None
        return self.operate(q, k, v, call, self.active) if answer is None else answer

    def operate(self, q: Tensor, k: Tensor, v: Tensor, call: Call, student: bool) -> Tensor:
        """Attention as the student does it, or as the teacher. Shapes as in `forward`."""
        layer, self.layer = self.layer, None
        uses = [operators.Use(Full(), tuple(range(self.site.kv_heads)))]
        if student:
            uses = [operators.Use(spec, groups, self.learned(spec)) for spec, groups in self.parts]
        states = layer.begin(self, len(uses), q.shape[2]) if layer is not None else [None] * len(uses)
        o, states = operators.attend_all(uses, q, k, v, call, states)
        if layer is not None:
            layer.states = states
        return o


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
    """
    site: Any = module._modules.get(NAME)
    if site is None:
        raise Unsupported(f"{type(module).__name__} has no operators: install a plan before running the model")
    return site.answer(query, key, value, attention_mask, **settings), None


def mask_function(
    batch_size: int, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **others: Any
) -> Tensor | None:
    """Keeps the padding mask (B, tokens so far) as it is, or None where every token is real."""
    compiling = torch.compiler.is_compiling()
    both_ways = others.get("mask_function") is bidirectional_mask_function
    skip = "allow_is_bidirectional_skip" if both_ways else "allow_is_causal_skip"
    if others.get(skip) is False:  # so transformers says that it is more than causal, or everything, and padding
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
    index = site.site.layer
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


class Conversion:
    """A plan at work in a model. `teacher()` switches it off for a while, `remove()` takes it out again."""

    def __init__(self, model: PreTrainedModel, plan: Mapping[Site, Sequence[Spec]]) -> None:
        self.model = model
        self.before = model.config._attn_implementation
        self.sites: dict[str, SiteOperators] = {}
        self.hooks = []
        ready = [(submodule(model, site.name), SiteOperators(site, specs)) for site, specs in plan.items()]
        for module, mine in ready:
            if NAME in module._modules:
                raise ValueError(f"{mine.site.name} is converted already: remove the first conversion")
        for module, mine in ready:
            site = mine.site
            where = next(module.parameters(recurse=True), None)
            mine = mine if where is None or where.is_meta else mine.to(where.device)
            module.add_module(NAME, mine)
            self.sites[site.name] = mine
            self.hooks.append(module.register_forward_pre_hook(_swap_cache_layer, with_kwargs=True))
        self.was_stateful = getattr(model, "_is_stateful", False)
        model._is_stateful = True  # generate then refuses to roll back before it starts
        self.installed = True
        model.set_attn_implementation(NAME)

    @contextlib.contextmanager
    def teacher(self) -> Iterator[None]:
        """Full attention everywhere: the original model."""
        with _setting(self.sites.values(), "active", False):
            yield

    @contextlib.contextmanager
    def observe(self, observer: Observer) -> Iterator[None]:
        """`observer` sees q, k, v of every site and may answer in its place."""
        with _setting(self.sites.values(), "observer", observer):
            yield

    def learned(self) -> dict[str, nn.Parameter]:
        """Feature maps and gates by their names in the model's state dict."""
        return {f"{name}.{NAME}.{key}": p for name, site in self.sites.items() for key, p in site.named_parameters()}

    def remove(self) -> None:
        """Leave the model as it was found."""
        for hook in self.hooks:
            hook.remove()
        for name in self.sites:
            del submodule(self.model, name)._modules[NAME]
        self.installed = False
        self.model._is_stateful = self.was_stateful
        self.model.set_attn_implementation(self.before)


def submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise Unsupported(f"{type(model).__name__} has no module {name!r}: the plan is of another model") from None


@contextlib.contextmanager
def _setting(objects: Any, attribute: str, value: Any) -> Iterator[None]:
    objects = list(objects)
    before = [getattr(x, attribute) for x in objects]
    try:
        for x in objects:
            setattr(x, attribute, value)
        yield
    finally:
        for x, old in zip(objects, before, strict=True):
            setattr(x, attribute, old)


def plan_block(base: str, plan: Mapping[Site, Sequence[Spec]]) -> dict[str, Any]:
    """The `attnconvert` block of an exported config.json of class `base`; `read_plan_block` is its inverse."""
    specs = {label(s): spec_to_dict(s) for groups in plan.values() for s in groups}
    sites = {
        site.name: {**dataclasses.asdict(site), "groups": [label(s) for s in groups]} for site, groups in plan.items()
    }
    for entry in sites.values():
        del entry["name"]
    return {"format": FORMAT, "base": base, "operators": specs, "sites": sites}


def read_plan_block(block: Mapping[str, Any]) -> dict[Site, list[Spec]]:
    """Sites and operators from the block of a config.json."""
    if block.get("format") != FORMAT:
        raise Unsupported(f"the checkpoint's attnconvert format is {block.get('format')!r}, this code reads {FORMAT}")
    specs = {name: spec_from_dict(given) for name, given in block["operators"].items()}
    plan = {}
    for name, entry in block["sites"].items():
        settings = {key: value for key, value in entry.items() if key != "groups"}
        plan[Site(name, **settings)] = [specs[x] for x in entry["groups"]]
    return plan


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
            self.conversion = Conversion(self, read_plan_block(config.attnconvert))

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
