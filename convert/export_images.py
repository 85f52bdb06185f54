"""Export of an image or video model: a folder of diffusers, with the runtime beside the weights, proven to load.

It holds the denoiser alone, or where the model came with its whole pipeline the pipeline: the denoiser in its own
subfolder, the other components as they were. The denoiser's config.json names a class of its own, holds the plan, and
keeps the stock class from reading it. Weights have their original names; what the operators learned is beside them,
under `….processor.attnconvert.…`.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .. import __version__
from ..kernels.spec import Spec, nested, spec_from_dict
from .checkpoints import INDEX, MODELING, components, denoiser_part
from .errors import UsageError
from .export_runtime import VerificationFailed, finish, load_elsewhere, relative_error, write_runtime
from .files import read_json, write_bytes, write_json
from .hosts.denoisers import dummy_inputs, probe_grid
from .hosts.registration_images import PREFIX, converted_class
from .hosts.sites import NAME, Site, SiteOperators, plan_block, setting

log = logging.getLogger("attnconvert")

WEIGHTS = (".safetensors", ".bin")
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
MOST = 4  # times the smallest grid on which a checkpoint is compared
TEMPLATE = '''"""{base} with the operators that config.json names under `attnconvert`."""

from typing import TYPE_CHECKING

{guard}

from diffusers import {base}

from .{runtime}_host import code_beside, converted_model

if TYPE_CHECKING:  # never run: diffusers fetches the files that a module names, and some load only when needed
{imports}
{operators}
{converted} = converted_model({base}, code_beside(__file__))
'''


def write_code(folder: Path, base: str) -> None:
    """The code that loads a converted denoiser of a stock class, whose config.json is in the folder already."""
    names = {"base": base, "converted": f"{PREFIX}{base}"}
    specs = [spec_from_dict(given) for given in read_json(folder / "config.json")[NAME]["operators"].values()]
    write_runtime(folder, "diffusers", specs, {f"{MODELING}.py": TEMPLATE}, names)


# --- writing ----------------------------------------------------------------------------------------------------------


def export_images(
    student: Any,
    plan: Mapping[Site, Sequence[Spec]],
    folder: Path,
    card: str,
    dtype: str | None,
    pipeline: Path | None = None,
    part: str = "transformer",
    attached: Mapping[str, str] | None = None,
) -> None:
    """Write the checkpoint of a student whose plan is installed and whose adapters are merged.

    Args:
        pipeline: folder of the pipeline that the model came from; where `whole_pipeline` says so it comes along, with
            the student as its component `part`.
        attached: further files by name, such as the recipe.

    Raises:
        UsageError: the student has an adapter that is not merged.
    """
    if any(".lora_" in name for name, _ in student.named_parameters()):
        raise UsageError("the model has an adapter that is not merged: merge it into the weights, then export")
    if dtype is not None:
        _cast(student, getattr(torch, dtype))
    whole = whole_pipeline(pipeline, part)
    own = folder / part if whole else folder
    base = _base(student)
    block = {"version": __version__, **plan_block(base, dict(sorted(plan.items(), key=lambda entry: entry[0].layer)))}
    config = type(student.config)({**student.config, NAME: block})
    with (
        setting([student], "__class__", converted_class(f"{PREFIX}{base}")),
        setting([student], "_internal_dict", config),
    ):
        student.save_pretrained(own)
    if whole:
        assert pipeline is not None
        _complete_pipeline(pipeline, part, f"{PREFIX}{base}", folder)
    _keep_licences(pipeline or student.config.get("_name_or_path"), folder)
    finish(folder, card, attached)


def whole_pipeline(pipeline: Path | None, part: str) -> bool:
    """Whether a folder holds all components of a pipeline with the denoiser `part`: of a hub model only what was asked
    for may be on this machine.
    """
    if pipeline is None or not (pipeline / INDEX).is_file():
        return False
    if part not in components(pipeline):
        return False
    absent = [name for name in components(pipeline) if not _is_there(pipeline / name)]
    if absent:
        log.warning(
            "%s lacks %s: the denoiser is exported alone, to be put into its pipeline", pipeline, ", ".join(absent)
        )
    return not absent


def _is_there(folder: Path) -> bool:
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    weights = any(file.suffix in WEIGHTS for file in folder.iterdir())
    return weights or not (folder / "config.json").is_file()  # which only models have


def _complete_pipeline(pipeline: Path, part: str, name: str, folder: Path) -> None:
    """Everything but the denoiser, hard-linked where the file system can, and the index that names its new class."""
    for component in components(pipeline):
        for file in sorted((pipeline / component).rglob("*")) if component != part else ():
            if file.is_file():
                _link(file.resolve(), folder / file.relative_to(pipeline))
    index = read_json(pipeline / INDEX)
    index[part] = [MODELING, name]
    index.pop("_name_or_path", None)
    write_json(folder / INDEX, index)


def _keep_licences(source: Any, folder: Path) -> None:
    """Terms that must come along with what they cover."""
    if source is not None and Path(source).is_dir():
        for file in (file for pattern in LICENCES for file in Path(source).glob(pattern)):
            write_bytes(folder / file.name, file.read_bytes())


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    if source.suffix != ".safetensors":  # a file that somebody may edit in place
        shutil.copyfile(source, target)
        return
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(source, target)


def _cast(student: Any, dtype: torch.dtype) -> None:
    """As diffusers casts what it loads: all that is saved, but for what must stay fp32."""
    kept = {NAME, *(getattr(student, "_keep_in_fp32_modules", None) or ())}
    for name, value in student.state_dict(keep_vars=True).items():
        if value.is_floating_point() and kept.isdisjoint(name.split(".")):
            value.data = value.data.to(dtype)


def _base(student: Any) -> str:
    """The stock class of a student, or of a checkpoint of ours."""
    return type(student).__name__.removeprefix(PREFIX)


# --- proof ------------------------------------------------------------------------------------------------------------

CHECK = """
import json, sys
import torch
from safetensors.torch import save_file
folder, where, trust, device = sys.argv[1], sys.argv[2], sys.argv[3] == "remote", sys.argv[4]
if trust:
    sys.modules["attnconvert"] = None  # as if it were not installed
else:
    import attnconvert
import diffusers
given = torch.load(where + "/inputs.pt", weights_only=True, map_location=device)
# weights that are read in place may lie at odd addresses, where sums are rounded in another order
loading = {"trust_remote_code": trust, "torch_dtype": given["dtype"], "disable_mmap": True}
if given["part"]:
    others = {name: None for name in given["others"]}
    model = getattr(diffusers.DiffusionPipeline.from_pretrained(folder, **loading, **others), given["part"])
else:
    model = diffusers.AutoModel.from_pretrained(folder, **loading)
model = model.eval().to(device)
with torch.no_grad():
    found = {str(n): model(**inputs)[0].cpu().contiguous() for n, inputs in enumerate(given["calls"])}
save_file(found, where + "/found.safetensors")
try:
    getattr(diffusers, given["base"]).from_pretrained(folder + "/" + given["part"])
    stock = ""
except Exception as error:
    stock = str(error)
print(json.dumps({"class": type(model).__name__, "stock": stock}))
"""


@torch.no_grad()
def verify_images(student: Any, folder: Path) -> dict[str, Any]:
    """Load the folder in two clean processes, by remote code and by `import attnconvert`, and compare with the student.

    Compared are predictions at two sizes, where the model allows that, of one sample and of two. A pipeline is loaded
    as such, without the weights of its other components, which are as they were. The stock class must refuse it.

    Raises:
        VerificationFailed: it does not load, or predicts something else, or loads as the stock class.
    """
    grids = _grids(student)
    calls = [dummy_inputs(student, grid, batch=batch) for grid in grids for batch in (1, 2)]
    expected = [student(**inputs)[0].cpu() for inputs in calls]
    part = denoiser_part(folder)
    given = {"base": _base(student), "dtype": student.dtype, "calls": calls, "part": part}
    given["others"] = _others(folder) if part else []
    result: dict[str, Any] = {}
    for way in ("remote", "installed"):
        with tempfile.TemporaryDirectory() as where:
            torch.save(given, f"{where}/inputs.pt")
            found = load_elsewhere(CHECK, folder, where, way, str(student.device))
            there = load_file(f"{where}/found.safetensors")
        error = max(relative_error(there[str(n)], value) for n, value in enumerate(expected))
        if not error <= 8 * torch.finfo(student.dtype).eps:
            raise VerificationFailed(
                f"{folder} loaded in a clean process ({way}) predicts something else: relative error {error:.2e}"
            )
        if NAME not in found["stock"]:
            said = f"fails for another reason: {found['stock']}" if found["stock"] else "takes it for its own"
            raise VerificationFailed(f"{folder} must not load as {given['base']}, which {said} ({way})")
        sizes = ["x".join(map(str, grid)) for grid in grids]
        result[way] = {"class": found["class"], "grids": sizes, "batches": [1, 2], "error": error}
    return result


def _others(folder: Path) -> list[str]:
    """The components of a pipeline beside its denoiser that have weights, and those that are not there."""
    mine, listed = components(folder), read_json(folder / INDEX).items()
    models = [name for name in mine if (folder / name / "config.json").is_file() and name != denoiser_part(folder)]
    return models + [name for name, value in listed if isinstance(value, list) and name not in mine]


def _grids(student: Any) -> list[tuple[int, ...]]:
    """Two grids of tokens to compare on, the second beyond the reach of the plan's operators where that is small."""
    first, config = probe_grid(student), student.config
    if getattr(config, "use_learned_positional_embeddings", False):
        return [first]
    sites = [module for module in student.modules() if isinstance(module, SiteOperators)]
    specs = [own for site in sites for spec in site.specs for own in (spec, *nested(spec))]
    reach = max((getattr(spec, "radius", 0) for spec in specs), default=0)
    times = min(MOST, max(2, math.ceil((2 * reach + 1) / min(first[-2:]))))
    most = getattr(config, "pos_embed_max_size", None) or math.inf
    while times > 1 and times * max(first) > most:
        times -= 1
    return [first, tuple(times * n for n in first)]
