"""What the stages ask of a transformers model: its sites, a run from the middle, its trunk, head and projections.

Beside transformers.py, which an exported checkpoint carries, this is the only file that reaches into the library.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..errors import UsageError
from .finding import find_sites as find_sites
from .inputs import takes
from .sites import Site, Unsupported
from .surgery import block_of


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


BY_PLAN = "convert it by a plan: attnconvert export MODEL --plan PLAN --out DIR, or attnconvert.convert(model, plan)"


def require_text(model: PreTrainedModel) -> None:
    """Raises UsageError for what the stages have no data for: what takes images or sound, or turns text into text."""
    given = takes(model)
    if given != ["input_ids"]:
        raise UsageError(
            f"{type(model).__name__} takes {' and '.join(given)}: what is lost is measured on texts alone, of language "
            f"models and encoders; {BY_PLAN}"
        )


def require_direction(model: PreTrainedModel, sites: Sequence[Site]) -> None:
    """Raises UsageError for a bare decoder: its damage is told by logits, which it does not put out."""
    if is_encoder(model) and any(site.causal for site in sites):
        raise UsageError(
            f"{type(model).__name__} reads in one direction and cannot generate, so there is no measure of what it "
            f"loses; {BY_PLAN}"
        )


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
