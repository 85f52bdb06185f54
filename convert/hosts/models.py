"""What the stages ask of a transformers model: its sites, a run from the middle, its trunk, head and projections.

Beside transformers.py, which an exported checkpoint carries, this is the only file that reaches into the library.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..errors import UsageError
from .sites import NAME, Site, Unsupported, all_full, submodule
from .surgery import block_of, converted


@torch.no_grad()
def find_sites(model: PreTrainedModel, tolerance: float = 1e-5) -> list[Site]:
    """The sites of a model, found by running it: what calls the attention interface is a site.

    Each site then runs once with all its heads full, and must give what the model's own eager attention gives.

    Raises:
        Unsupported: no attention reaches the interface, only some does, or something in it is not known here.
    """
    ids = torch.arange(1, 8, device=model.device)[None] % model.config.get_text_config().vocab_size
    before = model.config._attn_implementation
    seen: dict[nn.Module, tuple[Any, ...]] = {}
    masked: set[int] = set()  # windows that the model builds into its masks

    def record(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        heads, kv_heads, own = query.shape[1], key.shape[1], kwargs.get("sliding_window")
        causal = bool(getattr(module, "is_causal", True)) and kwargs.get("is_causal") is not False
        if module in seen and causal:
            raise Unsupported(f"{type(module).__name__} is called more than once in a pass, with one cache layer")
        if key.shape[2] != query.shape[2]:
            raise Unsupported(f"{type(module).__name__} reads another sequence than its own: that is not converted")
        if not causal and own is not None:
            raise Unsupported(f"{type(module).__name__} reads in both directions in a window of its own: not known yet")
        if query.shape[-1] != value.shape[-1]:
            raise Unsupported(
                f"{type(module).__name__}: keys of {query.shape[-1]} and values of {value.shape[-1]} differ"
            )
        seen[module] = (heads, kv_heads, query.shape[-1], own, causal)
        return query.new_zeros(query.shape).transpose(1, 2), None

    AttentionInterface.register(f"{NAME}_probe", record)

    def note_window(*args: Any, local_size: int | None = None, **kwargs: Any) -> None:
        masked.update([] if local_size is None else [local_size])

    AttentionMaskInterface.register(f"{NAME}_probe", note_window)
    try:
        model.set_attn_implementation(f"{NAME}_probe")
        model(ids, use_cache=False)
    except ValueError as error:
        if isinstance(error, Unsupported):
            raise
        raise Unsupported(f"{type(model).__name__} refuses a registered attention function: {error}") from error
    finally:
        model.set_attn_implementation(before)
    names = {module: name for name, module in model.named_modules()}
    _refuse_missed(model, seen, names)
    sites = []
    for place, (module, (heads, kv_heads, dim, limit, causal)) in enumerate(seen.items()):
        index = getattr(module, "layer_idx", None) if causal else place  # an encoder has no cache to find by it
        if index is None:
            raise Unsupported(f"{names[module]} has no layer index, so its cache cannot be found")
        sites.append(Site(names[module], index, heads, kv_heads, dim, limit, causal))
    unknown = masked - {site.limit for site in sites}
    if unknown:
        raise Unsupported(
            f"{type(model).__name__} has a sliding window of {min(unknown)} tokens in its masks alone, which its "
            "attention does not pass on: it would be lost"
        )
    if len({site.layer for site in sites}) < len(sites):
        raise Unsupported(f"{type(model).__name__} gives one layer index to several attentions, so they share a cache")
    if any(site.causal is is_encoder(model) for site in sites):
        says = "reads in one direction and cannot generate" if is_encoder(model) else "reads in both and generates"
        raise Unsupported(
            f"{type(model).__name__} {says}: converted are causal language models, and encoders loaded as such"
        )
    _check_full(model, sites, ids, tolerance)
    return sorted(sites, key=lambda s: s.layer)


def _refuse_missed(model: nn.Module, seen: Mapping[nn.Module, Any], names: Mapping[nn.Module, str]) -> None:
    """A module that looks like attention and was not called would stay dense without a word."""
    looks = [m for m in names if type(m).__name__.endswith("Attention") and not any(c in seen for c in m.modules())]
    if not seen:
        found = f" ({type(looks[0]).__name__} at {names[looks[0]]})" if looks else ""
        raise Unsupported(
            f"no attention of {type(model).__name__} goes through transformers' AttentionInterface{found}: "
            "nothing can be converted"
        )
    if looks:
        raise Unsupported(
            f"{names[looks[0]]} ({type(looks[0]).__name__}) does not go through transformers' AttentionInterface"
        )


def _check_full(model: PreTrainedModel, sites: list[Site], ids: Tensor, tolerance: float) -> None:
    """Compare each site with the model's own, on the same inputs: a deep bf16 model amplifies rounding beyond measure.

    The model's own is its eager attention, the definition: sdpa leaves out soft caps in transformers before 5.22.
    """
    _refuse_layer_types(model)
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
        model.set_attn_implementation("eager")
        _with_hooks(model, sites, keep, ids)
    finally:
        model.set_attn_implementation(before)
    with converted(model, all_full(sites)):
        _with_hooks(model, sites, compare, ids)
    limit = max(tolerance, 8 * torch.finfo(model.dtype).eps)
    for name, error in errors:
        if not error <= limit:
            raise Unsupported(
                f"{name} ({type(model).__name__}): with every head full it differs from the untouched model by "
                f"{error:.1e} (relative, limit {limit:.1e}); something in its attention is not known here"
            )


def _with_hooks(model: PreTrainedModel, sites: list[Site], make: Any, ids: Tensor) -> None:
    hooks = [submodule(model, site.name).register_forward_hook(make(site.name)) for site in sites]
    try:
        model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()


def _refuse_layer_types(model: PreTrainedModel) -> None:
    """Masks beyond causal and sliding windows do not show in a short probe, so they are refused by name."""
    config = model.config.get_text_config()
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if others:
        raise Unsupported(
            f"{type(model).__name__} has layers of type {', '.join(sorted(others))}, which are not known here"
        )


class Replay:
    """Runs a decoder from the middle: blocks before `start` hand back what they gave when `record` ran.

    Damage of one layer then costs only the layers behind it. A block is the innermost entry of a list of modules that
    holds the site; blocks that hold several sites, or what stands between the blocks, run as ever.
    """

    def __init__(self, model: PreTrainedModel, sites: Sequence[Site]) -> None:
        self.blocks: list[nn.Module] = []
        for site in sites:
            block = block_of(model, site.name)
            if block is None:
                raise Unsupported(f"{site.name} is not in a list of blocks, so the model cannot be run from its middle")
            self.blocks.append(model.get_submodule(block))
        self.outputs: list[Any] = []

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Keep the output of every block for the pass inside."""
        self.outputs = [None] * len(self.blocks)

        def keep(index: int) -> Any:
            return lambda module, args, output: self.outputs.__setitem__(index, output)

        hooks = [block.register_forward_hook(keep(n)) for n, block in enumerate(self.blocks)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def start(self, index: int) -> Iterator[None]:
        """Inside, blocks before `index` do no work."""

        def answer(value: Any) -> Any:
            return lambda *args, **kwargs: value

        with contextlib.ExitStack() as stack:
            for block, value in zip(self.blocks[:index], self.outputs, strict=False):
                if block not in self.blocks[index:]:
                    stack.enter_context(_forward(block, answer(value)))
            yield


@contextlib.contextmanager
def _forward(module: nn.Module, function: Any) -> Iterator[None]:
    """Inside, the module answers with `function`; a forward that something else put on the instance comes back."""
    before = module.__dict__.get("forward")
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def logits_at(model: PreTrainedModel, ids: Tensor, positions: Tensor) -> Tensor:
    """Logits (B, P, V) at the positions (P,) of ids (B, S), without computing those of all others where possible."""
    if "logits_to_keep" in inspect.signature(getattr(model, "get_base_model", lambda: model)().forward).parameters:
        logits: Tensor = model(ids, use_cache=False, logits_to_keep=positions).logits
        return logits
    logits = model(ids, use_cache=False).logits
    return logits[:, positions]


def last_logits(model: PreTrainedModel) -> dict[str, int]:
    """The argument with which a forward computes the logits of the last position only, where the model has one."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def trunk(model: PreTrainedModel) -> nn.Module:
    """The model without its head: ids → hidden states. A model that has no head is its own."""
    inner: nn.Module = getattr(model, model.base_model_prefix, model)
    return inner


def pooled(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Sentence embeddings (B, C) from last hidden states (B, S, C) without padding, pooled as the model's folder says.

    Raises:
        Unsupported: its pooling is neither the mean of the tokens nor the first of them.
    """
    return hidden[:, 0] if _pooling(str(model.config._name_or_path)) == "cls_token" else hidden.mean(1)


@functools.lru_cache
def _pooling(folder: str) -> str:
    """How a sentence-transformers folder pools, by its own word; the mean where it says nothing."""
    file = Path(folder) / "1_Pooling" / "config.json"
    if not file.is_file():
        return "mean_tokens"
    given = json.loads(file.read_text(encoding="utf-8"))
    prefix = "pooling_mode_"
    modes = [name.removeprefix(prefix) for name, on in given.items() if name.startswith(prefix) and on is True]
    if modes not in (["mean_tokens"], ["cls_token"]):
        raise Unsupported(f"{file} pools by {' and '.join(modes) or 'nothing'}: known are the mean and the first token")
    return str(modes[0])


def require_positions(model: PreTrainedModel, length: int) -> None:
    """Raises UsageError where a model that learned its positions has none for so many tokens."""
    most = positions_of(model)
    if most is not None and length > most:
        raise UsageError(f"{type(model).__name__} has positions for {most} tokens, {length} are asked for")


def positions_of(model: PreTrainedModel) -> int | None:
    """How many tokens a model has learned positions for; None where positions are computed."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == most]
    if most is None or not tables:
        return None
    named = [m for name, m in model.named_modules() if m in tables and "position" in name]
    padding = next((m.padding_idx for m in named if m.padding_idx is not None), None)
    return int(most) - (0 if padding is None else padding + 1)  # RoBERTa counts from behind its padding


def has_head(model: PreTrainedModel) -> bool:
    """Whether it puts out logits, and not hidden states only."""
    return trunk(model) is not model


def is_encoder(model: PreTrainedModel) -> bool:
    """Whether it cannot generate: texts go in, embeddings or masked tokens come out. `find_sites` checks the rest."""
    return not model.can_generate()


def head(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits (B, P, V) of hidden states (B, P, C), with the scale or cap that the model has behind its head."""
    with _forward(trunk(model), lambda *args, **kwargs: BaseModelOutputWithPast(last_hidden_state=hidden)):
        logits: Tensor = model(inputs_embeds=hidden, use_cache=False).logits
        return logits
