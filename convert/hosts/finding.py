"""The sites of a model of transformers, found by running it: what calls for attention is a site.

Each site then runs once with all its heads full, and must give what the model's own eager attention gives.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from .architectures import (
    REFUSED,
    by_itself,
    mark_cross_attention,
    may_read_others,
    reads_other_sequence,
    rebind,
    unbind,
    use_attention,
)
from .inputs import example
from .sites import NAME, Site, Unsupported, all_full, submodule
from .surgery import converted

PROBE = f"{NAME}_probe"
TOKENS, DECODER_TOKENS = 7, 5  # unlike, so that what reads another sequence shows


@dataclass(frozen=True)
class Found:
    """What one attention was called with: `limit` is a sliding window of its own."""

    heads: int
    kv_heads: int
    dim: int
    limit: int | None
    causal: bool


@dataclass
class Probe:
    """What a pass of the model showed: the attentions that called, those that read another sequence, masks' windows."""

    seen: dict[nn.Module, Found] = field(default_factory=dict)
    others: set[nn.Module] = field(default_factory=set)
    masked: set[int] = field(default_factory=set)

    def attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        """Takes the place of an attention function, and tells what it was called with."""
        nothing = query.new_zeros(query.shape).transpose(1, 2), None
        name = type(module).__name__
        if reads_other_sequence(module):
            self.others.add(module)
            return nothing
        said = kwargs.get("is_causal")  # where it is passed, it holds
        causal = bool(getattr(module, "is_causal", True) if said is None else said)
        if module in self.seen and causal:
            raise Unsupported(f"{name} is called more than once in a pass, with one cache layer")
        if key.shape[2] != query.shape[2]:
            raise Unsupported(f"{name} reads another sequence than its own: that is not converted")
        for argument, why in REFUSED.items():
            if kwargs.get(argument) is not None:
                raise Unsupported(f"{name} gets {argument}: {why}, which no operator here knows")
        if query.shape[-1] != value.shape[-1]:
            raise Unsupported(f"{name}: keys of {query.shape[-1]} and values of {value.shape[-1]} differ")
        limit = kwargs.get("sliding_window")
        self.seen[module] = Found(query.shape[1], key.shape[1], query.shape[-1], limit, causal)
        return nothing

    def mask(self, *args: Any, local_size: int | None = None, **kwargs: Any) -> None:
        """Takes the place of a mask function, and notes windows that the model builds into its masks."""
        self.masked.update([] if local_size is None else [local_size])


@torch.no_grad()
def find_sites(model: PreTrainedModel, tolerance: float = 1e-5) -> list[Site]:
    """The sites of a model: every self-attention of it, in the order of their layers.

    Cross-attention is left as it is. In a model of several towers or of an encoder and a decoder, layers count on from
    one to the next, and a decoder's sites know their place in its cache.

    Raises:
        Unsupported: no attention can be reached, only some can, or something in it is not known here.
    """
    _refuse_layer_types(model)
    inputs = example(model, TOKENS, DECODER_TOKENS)
    probe = _probed(model, inputs)
    names = {module: name for name, module in model.named_modules()}
    _refuse_missed(model, {*probe.seen, *probe.others}, names)
    sites = _numbered(model, {names[module]: found for module, found in probe.seen.items()})
    _refuse_hidden_windows(model, probe, sites)
    causal = {site.causal for site in sites}
    if model.can_generate() and not model.config.is_encoder_decoder and causal != {True}:
        raise Unsupported(
            f"{type(model).__name__} reads in both directions and generates: load an encoder as such (AutoModel, or "
            "AutoModelForMaskedLM)"
        )
    _check_full(model, sites, inputs, tolerance)
    return sites


def _probed(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Probe:
    """One pass, in which every attention gives zeros."""
    probe, before = Probe(), model.config._attn_implementation
    AttentionInterface.register(PROBE, probe.attention)
    AttentionMaskInterface.register(PROBE, probe.mask)
    others = [module for _, module in may_read_others(model)]
    hooks = [m.register_forward_pre_hook(mark_cross_attention, with_kwargs=True) for m in others]
    try:
        for module in by_itself(model):
            rebind(module, probe.attention)
        use_attention(model, PROBE)
        run(model, inputs)
    except ValueError as error:
        if isinstance(error, Unsupported):
            raise
        raise Unsupported(f"{type(model).__name__} refuses a registered attention function: {error}") from error
    finally:
        for module in by_itself(model):
            unbind(module)
        for hook in hooks:
            hook.remove()
        use_attention(model, before)
    return probe


def run(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Any:
    """The model's output, without a cache."""
    known = "use_cache" in inspect.signature(model.forward).parameters
    return model(**inputs, **({"use_cache": False} if known or model.can_generate() else {}))


def _numbered(model: PreTrainedModel, found: Mapping[str, Found]) -> list[Site]:
    """Sites by layer: the model's own numbers where there is one for each, else the order in which they ran."""
    slots: dict[str, Any] = {name: getattr(submodule(model, name), "layer_idx", None) for name in found}
    cached = [slots[name] for name, one in found.items() if one.causal and model.can_generate()]
    if None in cached:
        name = next(n for n, one in found.items() if one.causal and slots[n] is None)
        raise Unsupported(f"{name} has no layer index, so its cache cannot be found")
    if len(set(cached)) < len(cached):
        raise Unsupported(f"{type(model).__name__} gives one layer index to several attentions, so they share a cache")
    own = len(cached) == len(found)
    sites = []
    for place, (name, one) in enumerate(found.items()):
        layer = slots[name] if own else place
        slot = slots[name] if one.causal and slots[name] != layer else None
        sites.append(Site(name, layer, one.heads, one.kv_heads, one.dim, one.limit, one.causal, slot=slot))
    return sorted(sites, key=lambda site: site.layer)


def _refuse_missed(model: nn.Module, reached: set[nn.Module], names: Mapping[nn.Module, str]) -> None:
    """A module that looks like attention and was not called would stay dense without a word."""
    looks = [m for m in names if type(m).__name__.endswith("Attention") and not any(c in reached for c in m.modules())]
    if not reached:
        found = f" ({type(looks[0]).__name__} at {names[looks[0]]})" if looks else ""
        raise Unsupported(
            f"no attention of {type(model).__name__} goes through transformers' AttentionInterface{found}: "
            "nothing can be converted"
        )
    if looks:
        raise Unsupported(
            f"{names[looks[0]]} ({type(looks[0]).__name__}) does not go through transformers' AttentionInterface"
        )


def _refuse_hidden_windows(model: PreTrainedModel, probe: Probe, sites: list[Site]) -> None:
    """A window that the masks alone know would be lost. Masks of both directions do not count the row itself."""
    passed = {site.limit - (not site.causal) for site in sites if site.limit is not None}
    unknown = probe.masked - passed
    if unknown:
        raise Unsupported(
            f"{type(model).__name__} has a sliding window of {min(unknown)} tokens in its masks alone, which its "
            "attention does not pass on: it would be lost"
        )


def _refuse_layer_types(model: PreTrainedModel) -> None:
    """Masks beyond causal and sliding windows do not show in a short probe, so they are refused by name."""
    config = model.config.get_text_config()
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if others:
        raise Unsupported(
            f"{type(model).__name__} has layers of type {', '.join(sorted(others))}, which are not known here"
        )


def _check_full(model: PreTrainedModel, sites: list[Site], inputs: Mapping[str, Tensor], tolerance: float) -> None:
    """Compare each site with the model's own, on the same inputs: a deep bf16 model amplifies rounding beyond measure.

    The model's own is its eager attention, the definition: sdpa leaves out soft caps in transformers before 5.22.
    """
    stock: dict[str, list[Tensor]] = {}
    errors: list[tuple[str, float]] = []

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            stock.setdefault(name, []).append(output[0])

        return hook

    def compare(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            want = stock[name].pop(0)
            errors.append((name, ((output[0] - want).abs().max() / want.abs().max().clamp_min(1e-6)).item()))
            return (want, *output[1:])  # the next site sees what it saw before

        return hook

    before = model.config._attn_implementation
    try:
        use_attention(model, "eager")
        _with_hooks(model, sites, keep, inputs)
    finally:
        use_attention(model, before)
    with converted(model, all_full(sites)):
        _with_hooks(model, sites, compare, inputs)
    limit = max(tolerance, 8 * torch.finfo(model.dtype).eps)
    for name, error in errors:
        if not error <= limit:
            raise Unsupported(
                f"{name} ({type(model).__name__}): with every head full it differs from the untouched model by "
                f"{error:.1e} (relative, limit {limit:.1e}); something in its attention is not known here"
            )


def _with_hooks(model: PreTrainedModel, sites: list[Site], make: Any, inputs: Mapping[str, Tensor]) -> None:
    hooks = [submodule(model, site.name).register_forward_hook(make(site.name)) for site in sites]
    try:
        run(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
