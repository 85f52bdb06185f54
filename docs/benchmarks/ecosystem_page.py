"""docs/ecosystem.md from ecosystem.json: which neighbours take a converted checkpoint, and what was seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

HEAD = """# Neighbours

Made by `make ecosystem` from `docs/benchmarks/ecosystem.json`; do not edit.

What other people's libraries do with a converted checkpoint, really run, each in a process of its own that loads the
folder with `trust_remote_code=True`. The decoder is SmolLM2-135M-Instruct with windows in 12 of its 30 layers and
window + linear hybrids in three, hardly trained, so that figures differ from the teacher's; the encoder is
all-MiniLM-L6-v2 with windows in four of its six layers. Both are made anew by the command.

```
make ecosystem                       # installs the neighbours into .venv, makes both checkpoints, runs everything
make ecosystem ARGS="peft trl"       # some of them
```
"""
VLLM = """## vLLM

**Not run.** vLLM {version} asks for {needs} and its wheel holds kernels for CUDA alone; on a machine without a GPU it
would have to be built from source. A checkpoint with its own code (format `remote`) has an architecture that vLLM's
registry does not list, and its attention needs a cache of its own, which vLLM has no place for: **do not serve it by
vLLM's backend for transformers' classes**, nothing here shows what comes out. There is no plug-in, because none could
be run. A `stock` export has no code of its own; what vLLM's source does with the windows of its layers:

| architecture | module of vLLM | windows of single layers |
|---|---|---|
"""
FATES = {
    "per layer": "read from `layer_types`",
    "stops": "an error where layers are of two types and `max_window_layers` is not their number",
    "every second layer": "**every second layer, whatever `layer_types` says**",
    "one window": "one for all layers; **where layers are of two types, all of them see everything**",
}


def page(known: Mapping[str, Any], parts: Mapping[str, tuple[str, Any]]) -> str:
    """The page."""
    lines = [HEAD, *_table(known["parts"], parts), ""]
    if "machine" in known:
        machine = known["machine"]
        versions = ", ".join(f"{name} {known['versions'][name]}" for name in ("torch", "transformers"))
        lines += [f"{machine['cpu']}, {machine['cores']} cores, {versions}.", ""]
    if lm := known["parts"].get("lm_eval"):
        lines += _lm_eval(lm)
    if trl := known["parts"].get("trl"):
        lines += _trl(trl)
    if vllm := known["parts"].get("vllm"):
        lines += _vllm(vllm)
    return "\n".join(lines).rstrip() + "\n"


def _table(found: Mapping[str, Any], parts: Mapping[str, tuple[str, Any]]) -> Iterator[str]:
    yield "| neighbour | version | what was run | what came out | date |"
    yield "|---|---|---|---|---|"
    for name, (distribution, _) in parts.items():
        if name not in found:
            yield f"| {distribution} | | | not run yet | |"
            continue
        part = found[name]
        what = " ".join(part["what"].split()).rstrip(".")
        yield f"| {distribution} | {part['version']} | {what} | {SEEN[name](part)} | {part['date']} |"


def _peft(part: Mapping[str, Any]) -> str:
    return (
        f"loss {part['loss'][0]:.3f} → {part['loss'][1]:.3f} in {part['steps']} steps; logits differ by "
        f"{part['error_adapter']:.0e} with the adapter loaded again, {part['error_merged']:.0e} merged, "
        f"{part['error_merged_loaded']:.0e} merged, saved and loaded; all {part['sites']} sites keep their operators"
    )


def _sft(part: Mapping[str, Any]) -> str:
    def one(name: str) -> str:
        found = part[name]
        if "refused" in found:
            return f"{name}: refused (below)"
        return (
            f"{name}: loss {found['loss'][0]:.3f} → {found['loss'][1]:.3f} in {found['steps']} steps, saved and loaded "
            f"with a difference of {found['error_loaded']:.0e}"
        )

    return "; ".join(map(one, ("padded", "packed")))


def _sentences(part: Mapping[str, Any]) -> str:
    return (
        f"{part['sentences']} sentences of different lengths in a batch differ by {part['error']:.0e} from each alone; "
        f"cosine to the teacher {part['cosine_to_teacher']:.4f} (least {part['cosine_least']:.4f})"
    )


def _exported(part: Mapping[str, Any]) -> str:
    told = ", ".join(f"{size} tokens: {error:.0e}" for size, error in part["errors"].items())
    return f"{part['nodes']} nodes, one program for all lengths; difference at {told}. It is given a padding mask"


def _weights(part: Mapping[str, Any]) -> str:
    return f'`{{"format": "pt"}}`, {part["decoder"]["tensors"]} and {part["encoder"]["tensors"]} tensors'


def _small(part: Mapping[str, Any]) -> str:
    return f"KL {part['kl']:.1e} nats per token to the same checkpoint in fp32; `generate` works; operators stay fp32"


def _tasks(part: Mapping[str, Any]) -> str:
    return f"{len(part['tasks'])} tasks, below"


SEEN: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "lm_eval": _tasks,
    "peft": _peft,
    "trl": _sft,
    "sentence_transformers": _sentences,
    "torch_export": _exported,
    "safetensors": _weights,
    "torchao": _small,
    "bitsandbytes": _small,
}


def _lm_eval(part: Mapping[str, Any]) -> list[str]:
    lines = [
        "## lm-evaluation-harness",
        "",
        "`lm_eval --model hf --model_args pretrained=FOLDER,trust_remote_code=True --batch_size 4`, on a dozen",
        "documents a task. `lambada_openai` and `arc_easy` are the harness's own definitions on documents of ours:",
        "no data set can be fetched here, so their figures compare teacher and student, and nothing else. They are",
        "shorter than every window, so equal figures are what should come out.",
        "",
        "| task | metric | teacher | converted |",
        "|---|---|---:|---:|",
    ]
    for task, by in sorted(part["tasks"].items()):
        for metric in by["teacher"]:
            values = " | ".join(f"{by[who][metric]:.3f}" for who in ("teacher", "converted"))
            lines.append(f"| {task.removeprefix('local_')} | {metric} | {values} |")
    return [*lines, ""]


def _trl(part: Mapping[str, Any]) -> list[str]:
    refused = {name: part[name]["refused"] for name in ("padded", "packed") if "refused" in part[name]}
    if not refused:
        return []
    lines = ["## TRL", ""]
    for name, message in refused.items():
        lines += [f"SFT {name}: refused, with the message", "", f"> {message}", ""]
    return lines


def _vllm(part: Mapping[str, Any]) -> list[str]:
    needs = ", ".join(f"`{one}`" for one in part["needs"])
    rows = [f"| {n} | `{found['module']}` | {FATES[found['windows']]} |" for n, found in part["classes"].items()]
    return [VLLM.format(version=part["version"], needs=needs).rstrip(), *rows, ""]
