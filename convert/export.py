"""Export: a folder that `from_pretrained` loads, with the runtime beside the weights, proven in clean processes.

The folder holds the merged weights under their original names, what the operators learned under `…attnconvert…`, the
plan in config.json, the tokenizer, and the code of `kernels` and the transformers host as files of their own. Its model
type is `attnconvert`, so no tool takes it for the dense model by mistake.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from .. import __version__
from ..kernels.spec import Spec
from .export_runtime import VerificationFailed, finish, load_elsewhere, relative_error, write_runtime
from .files import read_json, write_bytes, write_json
from .hosts.models import is_encoder
from .hosts.registration import loader
from .hosts.sites import NAME, Site, SiteOperators, plan_block

CONFIGURATION = '''"""The configuration of a converted {base}."""

from transformers import {config}


class {converted_config}({config}):
    model_type = "attnconvert"
'''
MODELING = '''"""{base} with the operators that config.attnconvert names."""

from typing import TYPE_CHECKING

from transformers import {base}

from .{runtime}_host import converted_model
from .configuration_attnconvert import {converted_config}

if TYPE_CHECKING:  # never run: transformers fetches the files that a module names, and some load only when needed
{imports}

{converted} = converted_model({base}, {converted_config})
'''


def export(
    student: Any, tokenizer: Any, plan: Mapping[Site, Sequence[Spec]], folder: Path, card: str, dtype: str | None
) -> None:
    """Write the checkpoint of a student whose plan is installed and whose adapters are merged."""
    learned = {name for name, _ in student.named_parameters() if f".{NAME}." in name}
    if dtype is not None:
        for name, p in student.named_parameters():
            p.data = p.data if name in learned else p.data.to(getattr(torch, dtype))
        student.config.dtype = getattr(torch, dtype)
    base = type(student)
    # Renamings between checkpoint and module go by the stock model type, which this folder does not have: want none.
    student.save_pretrained(folder, save_original_format=False)
    tokenizer.save_pretrained(folder)
    converted, converted_config = f"Converted{base.__name__}", f"Converted{base.config_class.__name__}"
    config = read_json(folder / "config.json")
    config["model_type"] = NAME
    config["architectures"] = [converted]
    config[NAME] = {"version": __version__, **plan_block(base.__name__, plan)}
    config["auto_map"] = {
        "AutoConfig": f"configuration_{NAME}.{converted_config}",
        loader(base.__name__): f"modeling_{NAME}.{converted}",
    }
    write_json(folder / "config.json", config)
    keep_pooling(Path(str(student.config._name_or_path)), folder)
    names = {
        "base": base.__name__,
        "config": base.config_class.__name__,
        "converted": converted,
        "converted_config": converted_config,
    }
    templates = {f"configuration_{NAME}.py": CONFIGURATION, f"modeling_{NAME}.py": MODELING}
    write_runtime(folder, "transformers", templates, names)
    finish(folder, card)


def keep_pooling(source: Path, folder: Path) -> None:
    """What makes a folder a sentence-transformers model: without it an encoder would lose how it pools its tokens."""
    own = [source / f"{name}.json" for name in ("modules", "sentence_bert_config", "config_sentence_transformers")]
    for file in [*own, *sorted(source.glob("[0-9]_*/*"))]:
        if file.is_file():
            write_bytes(folder / file.relative_to(source), file.read_bytes())


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
AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
ids = load_file(where + "/expected.safetensors")["ids"].to(device)
{probe}
save_file({key: value.cpu() for key, value in results.items()}, where + "/found.safetensors")
print(json.dumps({"class": type(model).__name__, "attention": model.config._attn_implementation}))
"""
ENCODE = """
with torch.no_grad():
    mask = torch.ones_like(ids).repeat(2, 1)
    mask[0, -5:] = 0  # one row of the batch has padding behind it
    results = {"uncached": model(ids)[0], "continued": model(ids.repeat(2, 1), attention_mask=mask)[0]}
    results["generated"] = results["uncached"].argmax(-1)
"""
PROBE = """
with torch.no_grad():
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


@torch.no_grad()
def verify(student: Any, folder: Path) -> dict[str, Any]:
    """Load the folder in two clean processes, by remote code and by `import attnconvert`, and compare with the student.

    Compared are logits without a cache, logits of a second chunk with one, and greedy tokens of a left-padded batch,
    all longer than the plan's windows where the model allows it. Of an encoder: its output, alone and in a batch whose
    other row is padded.

    Raises:
        VerificationFailed: it does not load, or logits or tokens differ.
    """
    config = student.config.get_text_config()
    windows = [getattr(s, "size", getattr(s, "window", 0)) for _, s in _operators(student)]
    length = min(max(300, 2 * max(windows, default=0) + 100), config.max_position_embeddings - 16)
    ids = (torch.arange(1, length + 1)[None] * 7919 % config.vocab_size).to(student.device)
    names: dict[str, Any] = {"torch": torch, "model": student, "ids": ids, "GenerationConfig": GenerationConfig}
    probe = ENCODE if is_encoder(student) else PROBE
    exec(probe, names)  # the same lines as in the clean process
    here: dict[str, torch.Tensor] = {key: value.cpu() for key, value in names["results"].items()}
    result: dict[str, Any] = {}
    for way in ("remote", "installed"):
        with tempfile.TemporaryDirectory() as where:
            save_file({"ids": ids.cpu()}, f"{where}/expected.safetensors")
            check = CHECK.replace("{probe}", probe).replace("{auto}", loader(_base(student)))
            found = load_elsewhere(check, folder, where, way, str(student.device))
            there = load_file(f"{where}/found.safetensors")
        errors = [relative_error(there[key], here[key]) for key in ("uncached", "continued")]
        same = torch.equal(there["generated"], here["generated"])
        result[way] = {**found, "tokens": length, "logits_error": max(errors), "generation_equal": same}
        if not max(errors) <= 8 * torch.finfo(here["uncached"].dtype).eps or not same:
            raise VerificationFailed(
                f"{folder} loaded in a clean process ({way}) gives other results: relative logit error "
                f"{max(errors):.2e}, generation {'equal' if same else 'different'}"
            )
    return result


def _operators(student: Any) -> list[tuple[str, Spec]]:
    sites = [m for m in student.modules() if isinstance(m, SiteOperators)]
    return [(site.site.name, spec) for site in sites for spec in site.specs]


def _base(student: Any) -> str:
    """The stock class of a student, or of a checkpoint of ours."""
    block = getattr(student.config, NAME, None) or {}
    return str(block.get("base") or type(student).__name__)
