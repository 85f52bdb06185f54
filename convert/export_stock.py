"""Export without custom code: a plan of full and sliding-window layers becomes an architecture that transformers has.

Such a checkpoint loads with plain `from_pretrained`, without trust and without attnconvert, and serving engines that
know the architecture serve it. `attnconvert.json` beside the weights tells which plan it came from; nobody needs it to
run the model. What such an architecture cannot say, such as sinks or two operators in one layer, is refused.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import __version__
from ..kernels.call import Call
from ..kernels.spec import Full, Spec, Window, label
from .checkpoints import BLOCK
from .errors import UsageError
from .export_runtime import VerificationFailed, load_elsewhere, relative_error
from .files import write_json
from .hosts.registration import auto_class, loader
from .hosts.sites import Site, SiteOperators, plan_block, setting, submodule

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class Stock:
    """What a class with windows is re-typed as.

    `model`: the class to take. `settings`: further keys of its config. `needs`: what the config of the original must
    say. `layers`: whether each layer may be of either type (`any`), keeps the type that it has because more hangs on
    it, such as rotary embeddings (`kept`), or all share one window (`same`). `serving`: what engines make of it.
    """

    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    needs: Mapping[str, Any] = field(default_factory=dict)
    layers: str = "any"
    serving: str = ""


# vLLM's registry runs CwmForCausalLM by its Llama, which reads layer_types. Its Qwen2Model, and Qwen3's above it, stop
# where layers are of two types and max_window_layers is not their number: better than full attention without a word.
QWEN = (
    "vLLM's Qwen2 and Qwen3 classes do not read layer_types (github.com/vllm-project/vllm/issues/39514): written so "
    "that they stop with an error; SGLang's Qwen3 runs full attention in every layer (sgl-project/sglang/issues/22528)"
)
GPT_OSS = (
    "vLLM takes every second layer of gpt-oss for a sliding one, whatever layer_types says "
    "(github.com/vllm-project/vllm/pull/33594)"
)
WINDOWED = {"use_sliding_window": True}
STOCKS: dict[str, Stock] = {
    "LlamaForCausalLM": Stock(model="CwmForCausalLM", needs={"attention_bias": False}),
    "MistralForCausalLM": Stock(model="CwmForCausalLM", settings={"mlp_bias": False}),
    "MinistralForCausalLM": Stock(model="MinistralForCausalLM"),
    "CwmForCausalLM": Stock(model="CwmForCausalLM"),
    "Qwen2ForCausalLM": Stock(model="Qwen2ForCausalLM", settings={**WINDOWED, "max_window_layers": 0}, serving=QWEN),
    "Qwen3ForCausalLM": Stock(model="Qwen3ForCausalLM", settings={**WINDOWED, "max_window_layers": 0}, serving=QWEN),
    "SmolLM3ForCausalLM": Stock(model="SmolLM3ForCausalLM", settings=WINDOWED),
    "Gemma2ForCausalLM": Stock(model="Gemma2ForCausalLM"),
    "GptOssForCausalLM": Stock(model="GptOssForCausalLM", serving=GPT_OSS),
    "Gemma3ForCausalLM": Stock(model="Gemma3ForCausalLM", layers="kept"),
    "Cohere2ForCausalLM": Stock(model="Cohere2ForCausalLM", layers="kept"),
    "Exaone4ForCausalLM": Stock(model="Exaone4ForCausalLM", layers="kept"),
    "Starcoder2ForCausalLM": Stock(model="Starcoder2ForCausalLM", layers="same"),
    "Phi3ForCausalLM": Stock(model="Phi3ForCausalLM", layers="same"),
    "MixtralForCausalLM": Stock(model="MixtralForCausalLM", layers="same"),
    "Qwen3MoeForCausalLM": Stock(model="Qwen3MoeForCausalLM", settings=WINDOWED, layers="same", serving=QWEN),
}


@dataclass(frozen=True, kw_only=True)
class Retyped:
    """The stock class that has a plan's attention, its config, and what is known of engines that serve it."""

    model: str
    config: Any
    serving: str


def retyped(student: Any, plan: Mapping[Site, Sequence[Spec]]) -> Retyped:
    """The stock architecture of a plan.

    Raises:
        UsageError: there is none; the message says which part of the plan, or of the model, no architecture has.
    """
    import transformers

    base, config = type(student).__name__, student.config
    windows = require_windows(base, plan)
    if all(spec == Full() for specs in plan.values() for spec in specs):
        return Retyped(model=base, config=copy.deepcopy(config), serving="")
    stock = STOCKS[base]
    for key, wanted in stock.needs.items():
        if getattr(config, key, wanted) != wanted:
            raise UsageError(
                f"{base} with {key} {getattr(config, key)!r} has no stock architecture with windows, {stock.model} "
                f"has {wanted!r}: take the format remote"
            )
    if sorted(windows) != list(range(config.num_hidden_layers)):
        count = f"{len(windows)} of {config.num_hidden_layers}"
        raise UsageError(
            f"attention stands in {count} layers, so there is no type for the others: take the format remote"
        )
    sizes = {size for size in windows.values() if size is not None}
    types = [FULL if windows[n] is None else SLIDING for n in range(config.num_hidden_layers)]
    _check_types(stock, types, config)
    return Retyped(
        model=stock.model, config=_config(transformers, stock, config, types, sizes.pop()), serving=stock.serving
    )


def require_windows(base: str, plan: Mapping[Site, Sequence[Spec]]) -> dict[int, int | None]:
    """The window of each layer, None where it sees everything: what can be told without the model.

    Raises:
        UsageError: no stock architecture of this class has such windows.
    """
    if auto_class(base) != "AutoModelForCausalLM" or not all(site.causal for site in plan):
        raise UsageError(f"{base} has no stock architecture with windows, only decoders have: take the format remote")
    if all(spec == Full() for specs in plan.values() for spec in specs):
        return {site.layer: site.limit for site in plan}
    if base not in STOCKS:
        raise UsageError(
            f"there is no stock architecture for {base} with windows: take the format remote (known are "
            f"{', '.join(STOCKS)})"
        )
    found: dict[int, int | None] = {}
    for site, specs in plan.items():
        kinds = set(specs)
        if len(kinds) > 1:
            names = " and ".join(sorted(map(label, kinds)))
            raise UsageError(
                f"{site.name} mixes {names}, and a layer of a stock architecture has one kind: select with "
                "unit: layer, or take the format remote"
            )
        (spec,) = kinds
        if isinstance(spec, Window) and spec.sinks:
            raise UsageError(
                f"{site.name} has {spec.sinks} sinks beside its window, which no stock architecture has: use windows "
                "with sinks: 0, or take the format remote"
            )
        if not isinstance(spec, Full | Window):
            raise UsageError(f"{site.name} has {label(spec)}, which no stock architecture has: take the format remote")
        found[site.layer] = spec.size if isinstance(spec, Window) else site.limit
    sizes = {size for size in found.values() if size is not None}
    if len(sizes) != 1:
        told = ", ".join(map(str, sorted(sizes))) or "none"
        raise UsageError(f"a stock architecture has windows of one size, the plan of {told}: take the format remote")
    return found


def _check_types(stock: Stock, types: Sequence[str], config: Any) -> None:
    """Raises UsageError where a layer's type may not change in this architecture."""
    before = list(getattr(config, "layer_types", None) or ())
    if stock.layers == "kept" and list(types) != before:
        layer = next(n for n, (new, old) in enumerate(zip(types, before, strict=True)) if new != old)
        raise UsageError(
            f"layer {layer} would change from {before[layer]} to {types[layer]}, on which more than the window hangs "
            f"in {stock.model}: take the format remote"
        )
    if stock.layers == "same" and len(set(types)) > 1:
        raise UsageError(
            f"{stock.model} has one window for all layers, and the plan leaves layer {types.index(FULL)} full: take "
            "the format remote"
        )


def _config(transformers: Any, stock: Stock, config: Any, types: list[str], size: int) -> Any:
    """The config of the stock class: what the original says, and the types of its layers."""
    kind = getattr(transformers, stock.model).config_class
    fields = config.to_dict()
    for name in (
        "model_type",
        "architectures",
        "auto_map",
        "transformers_version",
        "_name_or_path",
        "quantization_config",
    ):
        fields.pop(name, None)
    fields |= {"sliding_window": size, **stock.settings}
    if stock.layers != "same":
        fields["layer_types"] = types
    made = kind(**fields)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # some classes fill in their own
        setattr(made, name, getattr(config, name, None))
    return made


def export_stock(student: Any, tokenizer: Any, plan: Mapping[Site, Sequence[Spec]], folder: Path) -> Retyped:
    """Write the weights of a student as a stock architecture; its adapters are merged, and its dtype is as wanted.

    Raises:
        UsageError: no stock architecture has the plan.
    """
    import transformers

    found = retyped(student, plan)
    base = type(student)
    target = getattr(transformers, found.model)
    with torch.device("meta"):
        model = target(found.config)
    model.load_state_dict(student.state_dict(), strict=True, assign=True)
    model.tie_weights()
    model.config.dtype = student.dtype
    model.generation_config = copy.deepcopy(student.generation_config)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    original = {**student.config.to_dict(), "dtype": str(student.dtype).removeprefix("torch.")}
    original.pop("_name_or_path", None)
    block = {"version": __version__, "form": "stock", **plan_block(base.__name__, plan), "config": original}
    write_json(folder / BLOCK, block)
    return found


# --- proof ------------------------------------------------------------------------------------------------------------

CHECK = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
folder, where, way, device = sys.argv[1:5]
if way == "plain":
    sys.modules["attnconvert"] = None  # as if it were not installed
    from transformers import {auto}, GenerationConfig
    model = {auto}.from_pretrained(folder).eval().to(device)
else:
    from pathlib import Path
    from attnconvert.convert.exported import load_exported
    from transformers import GenerationConfig
    model = load_exported(Path(folder)).to(device)
given = {key: value.to(device) for key, value in load_file(where + "/expected.safetensors").items()}
ids, padded, mask = given["ids"], given["padded"], given["mask"]
{probe}
save_file({key: value.cpu().contiguous() for key, value in results.items()}, where + "/found.safetensors")
print(json.dumps({"class": type(model).__name__, "attention": model.config._attn_implementation}))
"""
PROBE = """
with torch.no_grad():
    half = ids.shape[1] // 2
    results = {"uncached": model(ids, use_cache=False).logits,
               "padded": model(padded, attention_mask=mask, use_cache=False).logits}
    if cached:
        cache = model(ids[:, :half], use_cache=True).past_key_values
        results["continued"] = model(ids[:, half:], past_key_values=cache, use_cache=True).logits
        settings = GenerationConfig(max_new_tokens=16, do_sample=False, pad_token_id=0)
        results["generated"] = model.generate(padded, attention_mask=mask, generation_config=settings)
"""


@torch.no_grad()
def verify_stock(student: Any, folder: Path) -> dict[str, Any]:
    """Load the folder in two clean processes and compare with the student, to the last bit.

    `plain`: transformers alone, without attnconvert and without trust. The student then runs with the attention
    function that the stock class runs with, and masks of its plan, so that nothing but the conversion can differ.
    `installed`: by attnconvert, which puts its operators into the original class; compared with the student as it is,
    caches and greedy tokens included. How far our kernels are from the library's is told as `kernels_error`.

    Raises:
        VerificationFailed: it does not load, or a logit or a token differs.
    """
    specs = [spec for site in _sites(student) for spec in site.specs]
    longest = max((spec.size for spec in specs if isinstance(spec, Window)), default=0)
    config = student.config.get_text_config()
    length = min(max(300, 2 * longest + 100), config.max_position_embeddings - 16)
    given = _given(length, config.vocab_size, student.device)
    ours = _probe(student, given, cached=True)
    result: dict[str, Any] = {}
    for way in ("plain", "installed"):
        with tempfile.TemporaryDirectory() as where:
            save_file({key: value.cpu() for key, value in given.items()}, f"{where}/expected.safetensors")
            auto = loader(type(student).__name__)
            check = CHECK.replace("{probe}", f"cached = True\n{PROBE}").replace("{auto}", auto)
            found = load_elsewhere(check, folder, where, way, str(student.device))
            there = load_file(f"{where}/found.safetensors")
        want, keys = ours, tuple(ours)
        if way == "plain":
            with _by_masks(student, found["attention"]):
                want = _probe(student, given, cached=False)
            keys = ("uncached", "padded")
        valid = given["mask"].bool().cpu()
        error = max(_difference(there[key], want[key], valid) for key in keys if key != "generated")
        same = torch.equal(there["generated"], ours["generated"])
        result[way] = {**found, "tokens": length, "logits_error": error, "generation_equal": same}
        if way == "plain":
            result[way]["kernels_error"] = relative_error(there["uncached"], ours["uncached"])
        exact = error == 0.0 and (same or (way == "plain" and student.dtype != torch.float32))
        if not exact:
            raise VerificationFailed(
                f"{folder} loaded in a clean process ({way}) gives other results: largest logit difference "
                f"{error:.2e}, generation {'equal' if same else 'different'}"
            )
    return result


def _sites(student: Any) -> list[SiteOperators]:
    return [module for module in student.modules() if isinstance(module, SiteOperators)]


def _given(length: int, vocabulary: int, device: Any) -> dict[str, Tensor]:
    """A sequence beyond the windows, and a batch of which one row has padding before it."""
    ids = torch.arange(1, length + 1)[None] * 7919 % vocabulary
    padded = ids[:, : length // 2].repeat(2, 1)
    mask = torch.ones_like(padded)
    mask[0, :5] = 0
    return {"ids": ids.to(device), "padded": padded.to(device), "mask": mask.to(device)}


def _probe(model: Any, given: Mapping[str, Tensor], *, cached: bool) -> dict[str, Tensor]:
    """The same lines as in the clean process."""
    names: dict[str, Any] = {"torch": torch, "model": model, "GenerationConfig": GenerationConfig, "cached": cached}
    names |= given
    exec(PROBE, names)
    return {key: value.cpu() for key, value in names["results"].items()}


def _difference(found: Tensor, want: Tensor, valid: Tensor) -> float:
    """The largest difference, of real tokens: what stands behind padding is nobody's."""
    apart = (found.float() - want.float()).abs()
    return (apart[valid] if apart.shape[:2] == valid.shape else apart).max().item()


def _by_masks(student: Any, implementation: str) -> Any:
    """Inside, the student's attention is the library's own, with the mask that the plan means.

    That the windows of the plan are those of the stock class is then shown with one kernel on both sides.
    """

    def answer(site: SiteOperators, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        module = submodule(student, site.site.name)
        spec = site.specs[0]
        size = spec.size if isinstance(spec, Window) else call.limit
        config = copy.copy(student.config.get_text_config())
        config._attn_implementation = implementation
        config.sliding_window = size
        make = create_causal_mask if size is None else create_sliding_window_causal_mask
        mask = make(config=config, inputs_embeds=q[:, 0], attention_mask=call.valid, past_key_values=None)
        eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
        own = {"softcap": call.softcap, "s_aux": call.sink_logits}
        own = {name: value for name, value in own.items() if value is not None}
        o: Tensor = attend(module, q, k, v, mask, dropout=0.0, scaling=call.scale, sliding_window=size, **own)[0]
        return o.transpose(1, 2)

    return setting(_sites(student), "observer", answer)
