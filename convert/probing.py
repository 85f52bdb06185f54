"""What a checkpoint is asked in a clean process, and the student here: the same lines on the same inputs.

Language models give logits without a cache, logits of a second chunk with one, and greedy tokens of a left-padded
batch. Encoders give all that they put out, alone and in a batch of which a row is padded. Models of an encoder and a
decoder give logits without and with a cache, and greedy tokens of a batch of which a row of the encoder is padded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from .hosts.inputs import example, positions
from .hosts.models import is_encoder

CHECK = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
folder, where, trust, device = sys.argv[1], sys.argv[2], sys.argv[3] == "remote", sys.argv[4]
if trust:
    sys.modules["attnconvert"] = None  # as if it were not installed
else:
    import attnconvert
from transformers import {auto}, AutoTokenizer, GenerationConfig
model = {auto}.from_pretrained(folder, trust_remote_code=trust).eval().to(device)
{tokenizer}
inputs = {key: value.to(device) for key, value in load_file(where + "/expected.safetensors").items()}
{probe}
save_file({key: value.cpu().contiguous() for key, value in results.items()}, where + "/found.safetensors")
print(json.dumps({"class": type(model).__name__, "attention": model.config._attn_implementation}))
"""
TOKENIZER = "AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)"
ENCODE = """
def flat(output):
    return torch.cat([x.flatten() for x in output.to_tuple() if isinstance(x, torch.Tensor)])

with torch.no_grad():
    twice = {key: value.repeat_interleave(2, 0) for key, value in inputs.items()}
    if "input_ids" in inputs:
        twice["attention_mask"] = torch.ones_like(twice["input_ids"])
        twice["attention_mask"][0, -5:] = 0  # one row of the batch has padding behind it
    results = {"uncached": flat(model(**inputs)), "continued": flat(model(**twice))}
    results["generated"] = model(**inputs)[0].argmax(-1)
"""
PROBE = """
with torch.no_grad():
    ids = inputs["input_ids"]
    half = ids.shape[1] // 2
    settings = GenerationConfig(max_new_tokens=16, do_sample=False, pad_token_id=0)
    mask = torch.ones_like(ids[:, :half]).repeat(2, 1)
    mask[0, :5] = 0  # one row of the batch has padding before it
    cache = model(ids[:, :half], use_cache=True).past_key_values
    results = {
        "uncached": model(ids, use_cache=False).logits,
        "continued": model(ids[:, half:], past_key_values=cache, use_cache=True).logits,
        "generated": model.generate(ids[:, :half].repeat(2, 1), attention_mask=mask, generation_config=settings),
    }
"""
TRANSLATE = """
with torch.no_grad():
    ids = inputs.pop("decoder_input_ids")
    half = ids.shape[1] // 2
    twice = {key: value.repeat_interleave(2, 0) for key, value in inputs.items()}
    if "input_ids" in inputs:
        twice["attention_mask"] = torch.ones_like(twice["input_ids"])
        twice["attention_mask"][0, -5:] = 0  # one row of the batch has padding behind it
    first = model(**inputs, decoder_input_ids=ids[:, :half], use_cache=True)
    rest = {"encoder_outputs": (first.encoder_last_hidden_state,), "past_key_values": first.past_key_values}
    results = {
        "uncached": model(**inputs, decoder_input_ids=ids, use_cache=False).logits,
        "continued": model(**rest, decoder_input_ids=ids[:, half:], use_cache=True).logits,
        "generated": model.generate(**twice, max_new_tokens=16, do_sample=False),
    }
"""


def probe_inputs(model: Any, reach: int) -> dict[str, Tensor]:
    """Inputs longer than `reach` tokens, the windows of a plan, where the model allows it."""
    most = positions(model)
    length = max(300, 2 * reach + 100)
    length = length if most is None else min(length, most - 16)
    return example(model, length, length)


def probe_script(model: Any) -> str:
    """The lines that put `results` in place, from `model` and `inputs`."""
    if is_encoder(model):
        return ENCODE
    return TRANSLATE if model.config.is_encoder_decoder else PROBE


def ask(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The results of a model in this process."""
    names: dict[str, Any] = {"torch": torch, "GenerationConfig": GenerationConfig, "model": model, "inputs": {**inputs}}
    exec(probe_script(model), names)
    return {key: value.cpu() for key, value in names["results"].items()}


def check_script(model: Any, auto: str, tokenizer: bool) -> str:
    """The whole script of a clean process, for a folder that `auto` loads."""
    lines = {"{auto}": auto, "{tokenizer}": TOKENIZER if tokenizer else "", "{probe}": probe_script(model)}
    text = CHECK
    for name, value in lines.items():
        text = text.replace(name, value)
    return text
