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

from .. import __version__
from ..kernels.spec import Spec
from .export_runtime import VerificationFailed, finish, load_elsewhere, relative_error, write_runtime
from .files import read_json, write_bytes, write_json
from .hosts.registration import loader
from .hosts.sites import NAME, Site, SiteOperators, plan_block
from .probing import ask, check_script, probe_inputs

CONFIGURATION = '''"""The configuration of a converted {base}."""

{guard}

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
{operators}
{converted} = converted_model({base}, {converted_config})
'''


def export(
    student: Any,
    tokenizer: Any,
    plan: Mapping[Site, Sequence[Spec]],
    folder: Path,
    card: str,
    dtype: str | None,
    attached: Mapping[str, str] | None = None,
) -> None:
    """Write the checkpoint of a student whose plan is installed and whose adapters are merged, with its code.

    Args:
        tokenizer: None for a model that has none; attached: further files by name, such as the recipe.
    """
    learned = {name for name, _ in student.named_parameters() if f".{NAME}." in name}
    if dtype is not None:
        for name, p in student.named_parameters():
            p.data = p.data if name in learned else p.data.to(getattr(torch, dtype))
        student.config.dtype = getattr(torch, dtype)
    base = type(student)
    # Renamings between checkpoint and module go by the stock model type, which this folder does not have: want none.
    student.save_pretrained(folder, save_original_format=False)
    if tokenizer is not None:
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
    keep_beside(Path(str(student.config._name_or_path)), folder)
    names = {
        "base": base.__name__,
        "config": base.config_class.__name__,
        "converted": converted,
        "converted_config": converted_config,
    }
    templates = {f"configuration_{NAME}.py": CONFIGURATION, f"modeling_{NAME}.py": MODELING}
    write_runtime(folder, "transformers", [spec for groups in plan.values() for spec in groups], templates, names)
    finish(folder, card, attached)


BESIDE = ("modules", "sentence_bert_config", "config_sentence_transformers")  # of sentence-transformers
PROCESSING = ("preprocessor_config", "processor_config", "video_preprocessor_config")  # of images and sound


def keep_beside(source: Path, folder: Path) -> None:
    """What says how tokens are pooled, and how images and sound become inputs."""
    own = [source / f"{name}.json" for name in (*BESIDE, *PROCESSING)]
    for file in [*own, *sorted(source.glob("[0-9]_*/*"))]:
        if file.is_file():
            write_bytes(folder / file.relative_to(source), file.read_bytes())


@torch.no_grad()
def verify(student: Any, folder: Path) -> dict[str, Any]:
    """Load the folder in two clean processes, by remote code and by `import attnconvert`, and compare with the student.

    Compared is what `probing` asks of a model of its kind, of texts longer than the plan's windows where it allows it.

    Raises:
        VerificationFailed: it does not load, or logits or tokens differ.
    """
    windows = [getattr(s, "size", getattr(s, "window", 0)) for _, s in _operators(student)]
    inputs = probe_inputs(student, max(windows, default=0))
    here = ask(student, inputs)
    check = check_script(student, loader(_base(student)), (folder / "tokenizer_config.json").is_file())
    tokens = max((x.shape[1] for name, x in inputs.items() if name.endswith("input_ids")), default=0)
    result: dict[str, Any] = {}
    for way in ("remote", "installed"):
        with tempfile.TemporaryDirectory() as where:
            save_file({key: value.cpu().contiguous() for key, value in inputs.items()}, f"{where}/expected.safetensors")
            found = load_elsewhere(check, folder, where, way, str(student.device))
            there = load_file(f"{where}/found.safetensors")
        errors = [relative_error(there[key], here[key]) for key in ("uncached", "continued")]
        same = torch.equal(there["generated"], here["generated"])
        result[way] = {**found, "tokens": tokens, "logits_error": max(errors), "generation_equal": same}
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
