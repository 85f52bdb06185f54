"""The architectures that are claimed, one row each, and the table of docs/architectures.md that follows from them.

Run as a script it writes the table into the page: PYTHONPATH as the tests have it, `python tests/architectures.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from models import tiny

from attnconvert.convert.hosts.models import find_sites
from attnconvert.convert.hosts.registration import loader
from attnconvert.convert.hosts.sites import Site, Unsupported, refusal
from attnconvert.kernels.spec import (
    Full,
    Hybrid,
    Linear,
    Retention,
    Span,
    Spec,
    TopBlocks,
    Window,
)

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
SHORT = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 12}
TWO = {"num_hidden_layers": 2}
PLANS: dict[str, Spec] = {"window": Window(size=4, sinks=1), "linear": Linear(), "hybrid": Hybrid(window=4, sinks=1)}
OPERATORS: list[Spec] = [*PLANS.values(), Span(size=4, sinks=1), TopBlocks(keep=2), Retention()]


@dataclass(frozen=True)
class Row:
    """A tiny random model of an architecture: its model type, the auto class that makes it, and its config."""

    kind: str
    auto: str = "AutoModelForCausalLM"
    changes: dict[str, Any] = field(default_factory=dict)

    def model(self) -> Any:
        return tiny(self.kind, auto=getattr(transformers, self.auto), **{**TWO, **self.changes})


MASKED, SEQ2SEQ = "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM"
ROWS = {
    "Llama": Row("llama"),
    "Mistral": Row("mistral", changes={"sliding_window": None}),
    "Mistral, a window in all layers": Row("mistral"),
    "Mixtral": Row("mixtral"),
    "Qwen2": Row("qwen2"),
    "Qwen3": Row("qwen3"),
    "Qwen3-MoE": Row("qwen3_moe"),
    "Gemma 2": Row("gemma2", changes=SHORT),
    "Gemma 3": Row("gemma3_text", changes=SHORT),
    "Phi-3": Row("phi3", changes={"sliding_window": None}),
    "OLMo 2": Row("olmo2"),
    "GPT-2": Row("gpt2", changes={"n_layer": 2}),
    "GPT-NeoX": Row("gpt_neox"),
    "Falcon": Row("falcon"),
    "Falcon, new decoder": Row("falcon", changes={"new_decoder_architecture": True, "num_kv_heads": 2}),
    "StarCoder2": Row("starcoder2"),
    "SmolLM3": Row("smollm3"),
    "Granite": Row("granite"),
    "Cohere2": Row("cohere2", changes=SHORT),
    "EXAONE 4": Row("exaone4", changes=SHORT),
    "gpt-oss": Row("gpt_oss", changes=SHORT),
    "BERT": Row("bert", "AutoModel"),
    "RoBERTa": Row("roberta", MASKED),
    "ALBERT": Row("albert", MASKED),
    "ModernBERT": Row("modernbert", MASKED, {"num_hidden_layers": 3}),
    "ViT": Row("vit", "AutoModelForImageClassification"),
    "CLIP": Row("clip", "AutoModel"),
    "CLIP, text tower": Row("clip_text_model", "AutoModel"),
    "CLIP, vision tower": Row("clip_vision_model", "AutoModel", {"image_size": 24, "patch_size": 4}),
    "BART": Row("bart", SEQ2SEQ),
    "Whisper": Row("whisper", "AutoModelForSpeechSeq2Seq"),
}
WINDOWS = {"sliding_window": 12, "num_key_value_heads": 2}
REFUSED = {
    "T5": Row("t5", SEQ2SEQ),
    "Falcon, alibi": Row("falcon", changes={"alibi": True}),
    "BLOOM": Row("bloom"),
    "GPT-J": Row("gptj", changes={"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}),
    "Phi-3.5-MoE, a window in all layers": Row("phimoe"),
    "Qwen2-MoE, a window in some layers": Row("qwen2_moe"),
    "Llama 4": Row(
        "llama4_text", changes={"num_local_experts": 2, "attention_chunk_size": 8, "no_rope_layers": [1, 0]}
    ),
    "DeepSeek-V3": Row("deepseek_v3", changes={"n_routed_experts": 4, "n_group": 1, "topk_group": 1}),
    "BERT, as a decoder that reads both ways": Row("bert"),
}


def plan_of(sites: Iterable[Site], spec: Spec) -> dict[Site, list[Spec]]:
    """The operator wherever a site takes it; the rest stays full."""
    return {site: [spec if refusal(site, spec) is None else Full()] * site.kv_heads for site in sites}


# --- the table --------------------------------------------------------------------------------------------------------


def table() -> str:
    """What docs/architectures.md says between its marks."""
    lines = ["| architecture | class | sites | takes | refuses | cache | loads with |", "|---|---|---|---|---|---|---|"]
    for title, row in ROWS.items():
        model = row.model()
        name, sites = type(model).__name__, find_sites(model)
        cells = [title, f"`{name}`", _sites(sites), *_operators(sites), _cache(model), f"`{loader(name)}`"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| refused whole | class | because |", "|---|---|---|"]
    for title, row in REFUSED.items():
        lines.append(f"| {title} | `{type(row.model()).__name__}` | {reason(row)} |")
    return "\n".join(lines)


def reason(row: Row) -> str:
    """Why a model is refused."""
    try:
        find_sites(row.model())
    except Unsupported as error:
        return str(error)
    raise AssertionError(f"{row.kind} is not refused")


def _sites(sites: list[Site]) -> str:
    """How many of each kind, in words."""
    kinds = [("causal" if s.causal else "both ways") + ", own window" * (s.limit is not None) for s in sites]
    return "; ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))


def _operators(sites: list[Site]) -> tuple[str, str]:
    """The operators that some site takes, with how many where not all do; and why the others do not."""
    taken, reasons = [], dict[str, list[str]]()
    for spec in OPERATORS:
        missed = [(site, why) for site in sites if (why := refusal(site, spec))]
        count = len(sites) - len(missed)
        if count:
            taken.append(f"{spec.operator} ({count})" if missed else spec.operator)
        for why in dict.fromkeys(_short(site, why) for site, why in missed):
            reasons.setdefault(why, []).append(spec.operator)
    return ", ".join(taken), "; ".join(f"{', '.join(names)}: {why}" for why, names in reasons.items()) or "–"


def _short(site: Site, why: str) -> str:
    """What of a refusal is of the site, without its name and numbers."""
    said = why.removeprefix(site.name).strip().partition(",")[0].partition(":")[0]
    return said.replace(f" of {site.limit} tokens", "")


def _cache(model: Any) -> str:
    if not model.can_generate():
        return "none"
    return "of the decoder" if model.config.is_encoder_decoder else "of all"


def main() -> None:
    """Writes the table into the page."""
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(MARKS, lambda m: m[1] + "\n" + table() + "\n" + m[3], text, flags=re.S), encoding="utf-8")


MARKS = r"(<!-- architectures: made by tests/architectures.py -->)(.*)(<!-- end -->)"

if __name__ == "__main__":
    main()
