"""What vLLM's own source says of the architectures that a stock export may have, read from a wheel without running it.

`per layer`: its code for the class reads layer_types and gives each layer its window; `stops`: layers of two types end
in an error; `every second layer`: whatever layer_types says; `one window`: it leaves the window to the settings of the
cache, which have one where all layers are sliding and none where they are of two types (engine/arg_utils.py). A class
that the registry does not list goes to the backend for transformers' own classes.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

MODELS = "vllm/model_executor/models/"
BACKEND = "transformers"  # the module of the backend that runs transformers' classes
CLASSES = (
    "CwmForCausalLM", "MinistralForCausalLM", "MistralForCausalLM", "SmolLM3ForCausalLM", "Qwen2ForCausalLM",
    "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Cohere2ForCausalLM",
    "Exaone4ForCausalLM", "Starcoder2ForCausalLM", "Phi3ForCausalLM", "MixtralForCausalLM", "GptOssForCausalLM",
)  # fmt: skip
NEEDS = ("torch", "transformers", "flashinfer-python", "nvidia-cudnn-frontend")


def rules(wheel: Path) -> dict[str, Any]:
    """Class → what becomes of its windows, with the version of the wheel and what it needs.

    Raises:
        RuntimeError: the wheel is not vLLM's, or its registry is not where it was.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        if f"{MODELS}registry.py" not in names:
            raise RuntimeError(f"{wheel} holds no {MODELS}registry.py")
        sources = {
            name.removeprefix(MODELS): archive.read(name).decode()
            for name in names
            if name.startswith(MODELS) and name.endswith(".py")
        }
        metadata = next(archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    entries = dict(re.findall(r'"(\w+)":\s*\(\s*"(\w+)",', sources["registry.py"]))
    if "LlamaForCausalLM" not in entries:
        raise RuntimeError(f"{wheel}: its registry is written otherwise than this script knows")
    needs = re.findall(r"^Requires-Dist: ([^;\n]+)$", metadata, flags=re.M)
    version = re.search(r"^Version: (\S+)", metadata, flags=re.M)
    assert version is not None
    return {
        "version": version[1],
        "what": "The rules of vLLM's model registry, read from its wheel; nothing of it was run.",
        "needs": [one for one in needs if re.split(r"[\[<>=!~ ]", one)[0] in NEEDS],
        "classes": {
            name: {"module": entries.get(name, BACKEND), "windows": fate(sources, entries.get(name, BACKEND))}
            for name in CLASSES
        },
    }


def fate(sources: dict[str, str], module: str, depth: int = 3) -> str:
    """What becomes of the windows of single layers in a module, or in those whose classes it builds on."""
    text = sources.get(f"{module}.py") or sources.get(f"{module}/base.py", "")
    if "Sliding window for some but all layers is not supported" in text:
        return "stops"
    if re.search(r"layer_types\[[^\]]+\] == \"sliding_attention\"|layer_type == \"sliding_attention\"", text):
        return "per layer"
    if re.search(r"sliding_window if [^\n]*layer_idx % 2", text):
        return "every second layer"
    bases = re.findall(r"^from (?:vllm\.model_executor\.models)?\.(\w+) import", text, flags=re.M) if depth else []
    built_on = [base for base in bases if re.search(rf"class \w+\([^)]*(?:{_classes(sources, base)})", text)]
    for base in built_on:
        found = fate(sources, base, depth - 1)
        if found != "one window":
            return found
    return "one window"


def _classes(sources: dict[str, str], module: str) -> str:
    """The names of a module's classes, as alternatives."""
    return "|".join(re.findall(r"^class (\w+)", sources.get(f"{module}.py", ""), flags=re.M)) or "(?!)"
