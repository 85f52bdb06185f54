"""Export: a folder that `from_pretrained` loads, with the runtime beside the weights, proven in clean processes.

The folder holds the merged weights under their original names, what the operators learned under `…attnconvert…`, the
plan in config.json, the tokenizer, and the code of `kernels` and the transformers host as files of their own. Its model
type is `attnconvert`, so no tool takes it for the dense model by mistake.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .. import __version__
from ..kernels.spec import Spec
from .errors import AttnConvertError
from .files import read_json, sha256_file, write_json, write_text
from .hosts.transformers import NAME, Site, plan_block
from .runs import DONE, KEY

KERNELS = ("spec", "call", "features", "full", "window", "linear", "hybrid", "operators")
HEADER = """# attnconvert {version}, https://github.com/attnconvert/attnconvert, Apache-2.0
# Part of an exported checkpoint: it loads with trust_remote_code=True where attnconvert is not installed.
"""
CONFIGURATION = '''"""The configuration of a converted {base}."""

from transformers import {config}


class {converted_config}({config}):
    model_type = "attnconvert"
'''
MODELING = '''"""{base} with the operators that config.attnconvert names."""

from transformers import {base}

{imports}
from .attnconvert_host import converted_model
from .configuration_attnconvert import {converted_config}

{converted} = converted_model({base}, {converted_config})
'''


class VerificationFailed(AttnConvertError):
    """The exported folder, loaded in a clean process, does not give the logits that the student gave here."""


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
        "AutoModelForCausalLM": f"modeling_{NAME}.{converted}",
    }
    write_json(folder / "config.json", config)
    _write_runtime(folder, base)
    write_text(folder / "README.md", card)
    own = ("SHA256SUMS", KEY, DONE)  # not of the checkpoint: these say how far the stage is
    sums = [f"{sha256_file(p)}  {p.name}" for p in sorted(folder.iterdir()) if p.is_file() and p.name not in own]
    write_text(folder / "SHA256SUMS", "\n".join(sums) + "\n")


def _write_runtime(folder: Path, base: type) -> None:
    """The code of `kernels` and of the host, flat, with imports that name the files beside them."""
    package = files("attnconvert")
    header = HEADER.format(version=__version__)
    sources = {name: package / "kernels" / f"{name}.py" for name in KERNELS}
    sources["host"] = package / "convert" / "hosts" / "transformers.py"
    for name, source in sources.items():
        write_text(folder / f"{NAME}_{name}.py", header + flatten_imports(source.read_text(encoding="utf-8")))
    names = {
        "base": base.__name__,
        "config": base.config_class.__name__,  # type: ignore[attr-defined]
        "converted": f"Converted{base.__name__}",
        "converted_config": f"Converted{base.config_class.__name__}",  # type: ignore[attr-defined]
        "imports": "\n".join(f"from .{NAME}_{name} import __name__ as _{name}  # noqa" for name in KERNELS),
    }
    write_text(folder / f"configuration_{NAME}.py", header + CONFIGURATION.format(**names))
    write_text(folder / f"modeling_{NAME}.py", header + MODELING.format(**names))


def flatten_imports(source: str) -> str:
    """Relative imports of the package, rewritten for a folder in which every file is named attnconvert_<name>.py."""

    def several(match: re.Match[str]) -> str:
        names = [name.strip() for name in match[1].split(",")]
        return "from . import " + ", ".join(f"{NAME}_{name} as {name}" for name in names)

    source = re.sub(r"^from \.+(?:kernels)? import ([\w, ]+)$", several, source, flags=re.M)
    return re.sub(r"^from \.+(?:kernels\.)?(\w+) import", rf"from .{NAME}_\1 import", source, flags=re.M)


CHECK = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
folder, where, trust, device = sys.argv[1], sys.argv[2], sys.argv[3] == "remote", sys.argv[4]
if trust:
    sys.modules["attnconvert"] = None  # as if it were not installed
else:
    import attnconvert
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust).eval().to(device)
AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
ids = load_file(where + "/expected.safetensors")["ids"].to(device)
with torch.no_grad():
    logits = model(ids, use_cache=False).logits
    generated = model.generate(ids[:, :16], attention_mask=torch.ones_like(ids[:, :16]), max_new_tokens=16,
                               do_sample=False, eos_token_id=None, pad_token_id=0)
save_file({"logits": logits.cpu(), "generated": generated.cpu()}, where + "/found.safetensors")
print(json.dumps({"class": type(model).__name__, "attention": model.config._attn_implementation}))
"""


@torch.no_grad()
def verify(student: Any, folder: Path) -> dict[str, Any]:
    """Load the folder in two clean processes, by remote code and by `import attnconvert`, and compare with the student.

    Raises:
        VerificationFailed: it does not load, or logits or greedy tokens differ.
    """
    vocabulary = student.config.get_text_config().vocab_size
    ids = (torch.arange(1, 301)[None] * 7919 % vocabulary).to(student.device)
    logits = student(ids, use_cache=False).logits.cpu()
    start = ids[:, :16]
    settings = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    generated = student.generate(start, attention_mask=torch.ones_like(start), **settings).cpu()
    result: dict[str, Any] = {}
    for way in ("remote", "installed"):
        with tempfile.TemporaryDirectory() as where:
            save_file({"ids": ids.cpu()}, f"{where}/expected.safetensors")
            found = _load_elsewhere(folder, where, way, str(student.device))
            tensors = load_file(f"{where}/found.safetensors")
        error = (tensors["logits"].float() - logits.float()).abs().max().item() / logits.float().abs().max().item()
        same = torch.equal(tensors["generated"], generated)
        result[way] = {**found, "logits_error": error, "generation_equal": same}
        if not error <= 8 * torch.finfo(logits.dtype).eps or not same:
            raise VerificationFailed(
                f"{folder} loaded in a clean process ({way}) gives other results: relative logit error {error:.2e}, "
                f"generation {'equal' if same else 'different'}"
            )
    return result


def _load_elsewhere(folder: Path, where: str, way: str, device: str) -> dict[str, Any]:
    environment = os.environ | {"HF_MODULES_CACHE": f"{where}/modules", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHECK, str(folder.resolve()), where, way, device],
        capture_output=True,
        text=True,
        env=environment,
        cwd=where,
        check=False,
    )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise VerificationFailed(f"{folder} does not load in a clean process ({way}): {last[0]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


__all__ = ["VerificationFailed", "export", "flatten_imports", "verify"]
