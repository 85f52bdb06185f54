"""Export beside the base model: what was trained and the plan, for those who keep the original weights.

The folder holds a PEFT adapter (where adapters were trained), what the operators learned, and the plan, and names the
base model with its checksums. `attnconvert.load` puts them together again. PEFT alone loads the adapter too, but then
the model still has full attention everywhere: the adapter by itself is not the converted model.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .. import __version__
from ..kernels.spec import Spec
from .checkpoints import BLOCK, block_of
from .errors import AssetMissing, UsageError
from .export_runtime import VerificationFailed, load_elsewhere
from .files import read_json, replacing, write_json
from .hosts.sites import NAME, Site, plan_block, read_plan_block
from .probing import ask, probe_inputs, probe_script
from .progress import Track, silent
from .recipe_inputs import ModelSource
from .sources import ModelFiles, fetch_model, load_model

log = logging.getLogger("attnconvert")
OPERATORS, CONFIG, WEIGHTS = "operators.safetensors", "adapter_config.json", "adapter_model.safetensors"


def export_adapter(
    student: Any,
    plan: Mapping[Site, Sequence[Spec]],
    folder: Path,
    source: ModelSource,
    files: ModelFiles,
    adapter: Path | None,
) -> None:
    """Write what a student has beyond its base model.

    Args:
        source, files: the base model as it was named and as it was found, whose checksums are kept.
        adapter: the folder that PEFT saved while distilling; None where no adapter was trained.
    """
    folder.mkdir(parents=True, exist_ok=True)
    learned = {name: p.detach().cpu().contiguous() for name, p in student.named_parameters() if f".{NAME}." in name}
    if learned:
        with replacing(folder / OPERATORS) as temporary:
            save_file(learned, temporary, metadata={"format": "pt"})
    if adapter is not None:
        shutil.copyfile(adapter / WEIGHTS, folder / WEIGHTS)
        config = read_json(adapter / CONFIG)
        config["base_model_name_or_path"] = source.hub or str(source.folder or files.name)
        config["revision"] = files.revision
        write_json(folder / CONFIG, config)
    named = source.model_dump(mode="json", exclude_none=True)
    dtype = str(student.dtype).removeprefix("torch.")
    model = {"source": named | {"dtype": dtype}, "name": files.name, "sha256": dict(files.sha256)}
    if files.revision:
        model["revision"] = files.revision
    block = {"version": __version__, "form": "adapter", **plan_block(type(student).__name__, plan), "model": model}
    write_json(folder / BLOCK, block)


def load_adapter(folder: Path, base: ModelSource | None = None, track: Track = silent) -> Any:
    """The base model with the conversion and the adapter of a folder, merged.

    Raises:
        AssetMissing: the base model is not to be had, or is not the one that the adapter was trained on.
    """
    from peft import PeftModel

    from .hosts.transformers import convert

    block = block_of(folder)
    assert block is not None
    kept = block["model"]
    source = base or ModelSource.model_validate(kept["source"])
    files = fetch_model(source, track=track)
    if files.sha256 != kept["sha256"]:
        changed = next(
            name for name in {**kept["sha256"], **files.sha256} if files.sha256.get(name) != kept["sha256"].get(name)
        )
        raise AssetMissing(
            f"{files.folder / changed} is not the file that {folder} was trained on (SHA-256): give the base model "
            f"{kept['name']} as it was"
        )
    model, _ = load_model(files, source.model_copy(update={"dtype": kept["source"]["dtype"]}))
    if (folder / WEIGHTS).is_file():
        model = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
        if hasattr(model, "peft_config"):  # a note that the library would take for an adapter that is there
            del model.peft_config
    conversion = convert(model, read_plan_block(block))
    learned, stored = conversion.learned(), {}
    if (folder / OPERATORS).is_file():
        stored = load_file(folder / OPERATORS)
    if set(learned) != set(stored):
        missing = next(iter(set(learned) ^ set(stored)))
        raise AssetMissing(
            f"{folder / OPERATORS} does not fit the plan: {missing} is in one of them alone; export again"
        )
    with torch.no_grad():
        for name, p in learned.items():
            p.copy_(stored[name])
    model.conversion = conversion
    return model.requires_grad_(False)


# --- proof ------------------------------------------------------------------------------------------------------------

CHECK = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig
folder, where, way, device = sys.argv[1:5]
if way == "peft":
    sys.modules["attnconvert"] = None  # as if it were not installed
    import transformers
    from peft import PeftModel
    given = json.loads(Path(where, "base.json").read_text())
    base = getattr(transformers, given["class"]).from_pretrained(given["folder"], dtype=getattr(torch, given["dtype"]))
    model = PeftModel.from_pretrained(base, folder).merge_and_unload()
else:
    from attnconvert.convert.exported import load_exported
    model = load_exported(Path(folder)).to(device)
    inputs = {key: value.to(device) for key, value in load_file(where + "/expected.safetensors").items()}
{probe}
    save_file({key: value.cpu().contiguous() for key, value in results.items()}, where + "/found.safetensors")
{digest}
print(json.dumps({"class": type(model).__name__, "weights": digest(model)}))
"""
DIGEST = '''
def digest(model):
    """Of all weights but those that operators brought, by their names."""
    import hashlib
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if ".attnconvert." not in name:
            total.update(name.encode())
            total.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
'''


@torch.no_grad()
def verify_adapter(student: Any, folder: Path, files: ModelFiles) -> dict[str, Any]:
    """Load the folder in clean processes and compare with the student.

    `installed`: by attnconvert; what `probing` asks, and the weights, must be the student's. `peft`: the adapter alone
    by PEFT without attnconvert, where there is one and the base is a plain folder; merged, the weights must be the
    student's.

    Raises:
        VerificationFailed: it does not load, or gives something else.
    """
    inputs = probe_inputs(student, 0)
    here = ask(student, inputs)
    probe = textwrap.indent(probe_script(student), "    ")
    script = CHECK.replace("{digest}", DIGEST).replace("{probe}", probe)
    tokens = max((x.shape[1] for name, x in inputs.items() if name.endswith("input_ids")), default=0)
    names: dict[str, Any] = {"torch": torch, "hashlib": hashlib}
    exec(DIGEST, names)
    weights = names["digest"](student)
    ways = ["installed"]
    if (folder / WEIGHTS).is_file() and files.gguf is None:
        ways.append("peft")
    result: dict[str, Any] = {}
    for way in ways:
        with tempfile.TemporaryDirectory() as where:
            save_file({key: value.cpu().contiguous() for key, value in inputs.items()}, f"{where}/expected.safetensors")
            dtype = str(student.dtype).removeprefix("torch.")
            base = {"class": type(student).__name__, "folder": str(files.folder.absolute()), "dtype": dtype}
            Path(where, "base.json").write_text(json.dumps(base), encoding="utf-8")
            found = load_elsewhere(script, folder, where, way, str(student.device))
            error = 0.0
            if way == "installed":
                there = load_file(f"{where}/found.safetensors")
                error = max((there[key].double() - here[key].double()).abs().max().item() for key in here)
        if error != 0.0 or found["weights"] != weights:
            raise VerificationFailed(
                f"{folder} loaded in a clean process ({way}) is not the student: outputs differ by {error:.2e}, "
                f"weights {'equal' if found['weights'] == weights else 'different'}"
            )
        result[way] = {"class": found["class"], "tokens": tokens, "logits_error": error, "weights_equal": True}
    return result


def require_no_cast(dtype: str | None) -> None:
    """Raises UsageError where the weights are to be cast: an adapter's base model keeps its own number type."""
    if dtype is not None:
        raise UsageError(
            f"export.dtype is {dtype}, and an adapter leaves its base model as it is: take export.dtype out"
        )
