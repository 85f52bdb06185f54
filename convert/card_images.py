"""The model card of an exported image or video checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .artefacts import dig
from .card import front_matter, gates, made, what
from .report_html import NONE, duration, number, percent, ratio, size

if TYPE_CHECKING:
    from .recipe_images import ImageRecipe

ALONE = """\
## Use

With `trust_remote_code=True` nothing but diffusers is needed: the operators' code lies beside the weights.

```python
import torch
from diffusers import AutoModel{pipeline}

model = AutoModel.from_pretrained("path/to/this/folder", trust_remote_code=True, torch_dtype=torch.{dtype}){put}
```

Where code from a model folder is not to be run, `pip install attnconvert` and import it first:

```python
import attnconvert
from diffusers import AutoModel

model = AutoModel.from_pretrained("path/to/this/folder", torch_dtype=torch.{dtype})
```
"""
PUT = """
pipe = DiffusionPipeline.from_pretrained("{hub}", {part}=model, torch_dtype=torch.{dtype})"""
WHOLE = """\
## Use

With `trust_remote_code=True` nothing but diffusers is needed: the operators' code lies beside the weights. Of a
pipeline on the hub diffusers fetches one file of code only, so that the folder is fetched first.

```python
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download

folder = "path/to/this/folder"  # or snapshot_download("owner/name")
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.{dtype})
```

Where code from a model folder is not to be run, `pip install attnconvert` and import it first:

```python
import attnconvert
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder", torch_dtype=torch.{dtype})
```
"""
LIMITS = """\
## Limits

- It does not load as the stock class `{base}`, which would run full attention with these weights.
- What replaces attention processors, such as some adapters for reference images, is refused; LoRA loads as ever.
- Attention masks that are no padding, and reference images beside the one that is made, raise an error.
- A converted head sees what its operator keeps. What was not measured above, such as larger sizes, may have suffered
  more.
"""


def image_card(
    recipe: ImageRecipe,
    manifest: Mapping[str, Any],
    base_class: str,
    evaluation: Mapping[str, Any] | None,
    part: str | None,
) -> str:
    """README.md of the exported folder.

    Args:
        manifest: of the run; base_class: the stock class, such as FluxTransformer2DModel; part: its name in the
            pipeline whose folder it is, or None where the denoiser is alone.
    """
    dtype, hub = recipe.export.dtype or recipe.model.dtype, recipe.model.hub
    task = "text-to-video" if len(recipe.images.size) == 3 else "text-to-image"
    name = "unet" if base_class.startswith("UNet") else "transformer"
    put = PUT.format(hub=hub, part=recipe.model.subfolder or name, dtype=dtype) if hub else ""
    alone = ALONE.format(dtype=dtype, put=put, pipeline=", DiffusionPipeline" if put else "")
    parts = [
        front_matter(recipe, "diffusers", task, evaluation),
        what(recipe, manifest, base_class, evaluation),
        WHOLE.format(dtype=dtype) if part else alone,
        _measured(evaluation),
        gates(evaluation),
        LIMITS.format(base=base_class),
        made(recipe, manifest),
    ]
    return "\n".join(section for section in parts if section)


def image_figures(evaluation: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The measured table as text: the arms, teacher and student first, and a row of name and cells per figure."""
    found = dig(evaluation, "arms", default={})
    arms = sorted(found, key=lambda arm: {"teacher": 0, "student": 1}.get(arm, 2))
    rows = [
        ["KV groups converted", *(NONE if arm == "teacher" else percent(dig(found[arm], "converted")) for arm in arms)],
        ["trained", *({True: "yes", False: "no"}.get(dig(found[arm], "trained"), NONE) for arm in arms)],
        *_quality(arms, found),
        ["attention FLOPs", *(ratio(dig(found[arm], "flops_ratio")) for arm in arms)],
        *_speed(arms, dig(evaluation, "speed", default={})),
    ]
    return arms, [row for row in rows if any(cell != NONE for cell in row[1:])]


def _quality(arms: Sequence[str], found: Mapping[str, Any]) -> Iterator[list[str]]:
    names = {
        "velocity_error": "velocity error",
        "psnr": "PSNR, dB",
        "ssim": "SSIM",
        "perceptual": "perceptual distance",
        "frechet": "Fréchet distance",
    }
    for key, name in names.items():
        yield [name, *(number(dig(found[arm], "quality", key)) for arm in arms)]
    yield ["right class", *(percent(dig(found[arm], "quality", "right_class")) for arm in arms)]


def _speed(arms: Sequence[str], speed: Mapping[str, Any]) -> Iterator[list[str]]:
    for name, entry in sorted(speed.items(), key=lambda item: int(item[1]["tokens"])):
        yield [f"a step @ {name}", *(duration(dig(entry, arm, "step_s")) for arm in arms)]
        yield [f"its memory @ {name}", *(size(dig(entry, arm, "peak_bytes")) for arm in arms)]
        gained = ratio(entry.get("speedup"))
        yield [f"speedup @ {name}", *(gained if arm == "student" else NONE for arm in arms)]


def _measured(evaluation: Mapping[str, Any] | None) -> str:
    if evaluation is None:
        return ""
    arms, rows = image_figures(evaluation)
    data, machine = dig(evaluation, "data", default={}), dig(evaluation, "machine", default={})
    lines = ["## Measured", "", f"| | {' | '.join(arms)} |", f"|---|{'---:|' * len(arms)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    others = [arm for arm in arms if arm not in ("teacher", "student")]
    told = f"; {', '.join(others)}: other plans of the recipe, for comparison" if others else ""
    sampler = f"{data.get('steps')} steps, guidance {data.get('guidance')}"
    latents = "×".join(map(str, data.get("size", ())))
    where = ", ".join([str(machine.get("cpu")), f"{machine.get('cores')} cores", *machine.get("gpu", [])])
    even = dig(evaluation, "break_even", "told")
    lines += [
        "",
        f"teacher: the original model; student: this checkpoint{told}. Velocity error is ‖v̂ − v‖² / ‖v‖² on states of "
        "the teacher's own trajectories, PSNR and SSIM are of samples from the same noise. `@` is the size of the "
        "latents; FLOPs are by the cost model, times are medians of interleaved repeats.",
        "",
        f"Measured on {data.get('samples')} samples of {latents} latents ({sampler}) and {data.get('states')} states; "
        f"seed {data.get('seed')}; {where}." + (f" A step is {even}." if even else ""),
        "",
    ]
    return "\n".join(lines)
