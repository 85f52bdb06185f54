"""The model card of an exported image or video model, and its figures as text, which the terminal shows too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .artefacts import dig
from .card import beside, filled, first_rows, front_matter, gates, made, what
from .evaluation_order import band_names, sizes_of, slower_sizes
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


def image_card(
    recipe: ImageRecipe,
    manifest: Mapping[str, Any],
    base_class: str,
    evaluation: Mapping[str, Any] | None,
    part: str | None = None,
) -> str:
    """README.md of the exported folder.

    Args:
        manifest: of the run; base_class: the stock class, such as FluxTransformer2DModel; evaluation: evaluation.json,
            or None if the export came first; part: the name of the denoiser in the pipeline whose folder it is, or None
            where it is alone.
    """
    dtype, hub = recipe.export.dtype or recipe.model.dtype, recipe.model.hub
    task = "text-to-video" if len(recipe.images.size) == 3 else "text-to-image"
    name = recipe.model.subfolder or ("unet" if base_class.startswith("UNet") else "transformer")
    put = PUT.format(hub=hub, part=name, dtype=dtype) if hub else ""
    alone = ALONE.format(dtype=dtype, put=put, pipeline=", DiffusionPipeline" if put else "")
    parts = [
        front_matter(recipe, "diffusers", task, evaluation),
        what(recipe, manifest, base_class, evaluation),
        WHOLE.format(dtype=dtype) if part else alone,
        _measured(evaluation),
        gates(evaluation),
        _limits(recipe, base_class, evaluation),
        made(recipe, manifest),
    ]
    return "\n".join(section for section in parts if section)


def image_figures(evaluation: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The measured table as text: the arms, teacher and student first, and a row of name and cells per figure."""
    arms, found, rows = first_rows(evaluation, "heads")
    flops = ["attention FLOPs", *(ratio(dig(found[arm], "flops_ratio")) for arm in arms)]
    return arms, filled([*rows, *_quality(arms, found), flops, *_steps(arms, evaluation)])


def _quality(arms: Sequence[str], found: Mapping[str, Any]) -> Iterator[list[str]]:
    def row(name: str, *path: str) -> list[str]:
        return [name, *(number(dig(found[arm], "quality", *path)) for arm in arms)]

    yield row("velocity error", "velocity_error")
    for band in band_names(found.values()):
        yield row(f"… in steps {band}{', noise' if band.startswith('1 ') else ''}", "bands", band)
    yield row("PSNR, dB", "psnr")
    yield row("SSIM", "ssim")
    yield row("perceptual distance", "perceptual")
    yield ["right class", *(percent(dig(found[arm], "quality", "right_class")) for arm in arms)]
    yield row("Fréchet distance", "frechet")


def _steps(arms: Sequence[str], evaluation: Mapping[str, Any]) -> Iterator[list[str]]:
    for name, entry in sizes_of(evaluation):
        taken = [dig(entry, arm, "step_s") for arm in arms]
        yield [f"a step @ {name}", *(duration(value) for value in taken)]
        yield [f"speed @ {name}", *(ratio(entry.get("speedup")) if arm == "student" else NONE for arm in arms)]
        before = dig(entry, "teacher", "peak_bytes")
        cells = []
        for arm in arms:
            held = dig(entry, arm, "peak_bytes")
            cells.append(beside(size(held), held / before if held and before and arm != "teacher" else None))
        yield [f"peak memory @ {name}", *cells]


def image_circumstances(evaluation: Mapping[str, Any]) -> str:
    """In one sentence: on how many states and images of which size, with which seed, on which machine."""
    data, machine = dig(evaluation, "data", default={}), dig(evaluation, "machine", default={})
    arms = dig(evaluation, "arms", default={}).values()
    states = next((found for arm in arms if (found := dig(arm, "quality", "states"))), data.get("states"))
    guided = f", guidance {data['guidance']:g}" if data.get("guidance", 1) != 1 else ""
    parts = [
        f"{states} held-out states of the teacher's trajectories",
        f"{data.get('samples')} images of {'×'.join(map(str, data.get('size', [])))} latents from the same noise",
        f"{data.get('steps')} steps{guided}",
        f"seed {data.get('seed')}",
        ", ".join([str(machine.get("cpu")), f"{machine.get('cores')} cores", *machine.get("gpu", [])]),
    ]
    return "; ".join(parts)


def slower_told(evaluation: Mapping[str, Any]) -> str:
    """In one sentence where a step is slower than the original's; '' where it is not."""
    slower = [f"{name} ({ratio(value)} the speed)" for name, value in slower_sizes(evaluation)]
    if not slower:
        return ""
    names = slower[0] if len(slower) == 1 else f"{', '.join(slower[:-1])} and {slower[-1]}"
    return f"Slower than the original at {names}."


def break_even_told(evaluation: Mapping[str, Any]) -> str:
    """The sentence of the evaluation on where the conversion pays; '' where nothing was timed."""
    told = str(dig(evaluation, "break_even", "told", default=""))
    return f"A step is {told}." if told else ""


# --- sections ---------------------------------------------------------------------------------------------------------


def _measured(evaluation: Mapping[str, Any] | None) -> str:
    if evaluation is None:
        return ""
    arms, rows = image_figures(evaluation)
    lines = ["## Measured", "", f"| | {' | '.join(arms)} |", f"|---|{'---:|' * len(arms)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    others = [arm for arm in arms if arm not in ("teacher", "student")]
    told = f"; {', '.join(others)}: other plans of the recipe, for comparison" if others else ""
    warning = slower_told(evaluation)
    lines += [
        "",
        f"teacher: the original model; student: this checkpoint{told}. The velocity error is the squared error of the "
        "prediction over the square of the teacher's; PSNR, SSIM and the perceptual distance are to the teacher's "
        "images of the same noise, the Fréchet distance is to fresh images of the teacher. `@` is the size of the "
        "latents; FLOPs are by the cost model, times are medians of interleaved repeats.",
        "",
        *([f"**{warning}** {break_even_told(evaluation)}".rstrip(), ""] if warning else []),
        *([break_even_told(evaluation), ""] if not warning and break_even_told(evaluation) else []),
        f"Measured on {image_circumstances(evaluation)}.",
        "",
    ]
    return "\n".join(lines)


def _limits(recipe: ImageRecipe, base: str, evaluation: Mapping[str, Any] | None) -> str:
    where = "×".join(map(str, recipe.images.size))
    guided = f" at guidance {recipe.images.guidance:g}" if recipe.images.guidance != 1 else ""
    warning = slower_told(evaluation or {})
    lines = [
        "## Limits",
        "",
        *([f"- {warning}"] if warning else []),
        f"- Operators were chosen, trained and judged at latents of {where}, with {recipe.images.steps} steps{guided}. "
        "Other sizes run, as every pattern follows the grid of the call; what they lose, and what other samplers and "
        "prompts lose, was not measured.",
        f"- It does not load as the stock class `{base}`, which would run full attention with these weights.",
        "- What replaces attention processors, such as some adapters for reference images, is refused; LoRA loads as "
        "ever.",
        "- Attention masks that are no padding, and reference images beside the one that is made, raise an error.",
    ]
    return "\n".join([*lines, ""])
