"""Images as people see them: pixels of samples, and sheets that put models side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .errors import UsageError
from .files import replacing
from .plots import INK, MUTED

SMALLEST = 64  # pixels of a sheet that a small image is blown up to, in whole steps


def pixels(x: Tensor) -> Tensor:
    """Samples in [−1, 1] (a VAE's output, or latents that are pixels themselves) → the same shape in [0, 1]."""
    return ((x.float() + 1) / 2).clamp(0, 1)


def scaled(samples: Sequence[Tensor]) -> list[Tensor]:
    """Samples (N, C, …) in [0, 1], all on the scale of the first: pixels, which have 1 or 3 channels, from [−1, 1];
    latents from the least value of each channel of the first to its greatest.
    """
    first = samples[0].float()
    if first.shape[1] in (1, 3):
        return [pixels(x) for x in samples]
    axes = [n for n in range(first.ndim) if n != 1]
    low, high = first.amin(axes, keepdim=True), first.amax(axes, keepdim=True)
    return [((x.float() - low) / (high - low).clamp_min(1e-6)).clamp(0, 1) for x in samples]


def view_of(samples: Tensor) -> Callable[[Tensor], Tensor]:
    """What shows samples of a model, (N, C, …), as images in [−1, 1]: 1 or 3 channels as they are.

    Latents of other channels have no colours without their decoder: their first three principal components over
    `samples` are shown, the mean in the middle and three standard deviations of the first to either side.
    """
    if samples.shape[1] in (1, 3):
        return lambda x: x
    flat = samples.float().transpose(0, 1).flatten(1)  # (C, numbers)
    mean = flat.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh((flat - mean) @ (flat - mean).T / flat.shape[1])
    axes = vectors.flip(1)[:, : min(3, len(values))]
    axes = torch.cat([axes, axes[:, -1:].expand(-1, 3 - axes.shape[1])], 1)  # (C, 3)
    spread = 3 * values[-1].clamp_min(1e-12).sqrt()

    def view(x: Tensor) -> Tensor:
        centred = x.float().movedim(1, -1) - mean[:, 0]
        seen: Tensor = (centred @ axes / spread).movedim(-1, 1)
        return seen

    return view


def sheet(rows: Mapping[str, Tensor], columns: Sequence[str], path: Path, title: str = "") -> None:
    """A PNG with a row of images for each name and a column for each label, such as teacher above student by prompt.

    Args:
        rows: name → (N, C, H, W) in [0, 1], 1 or 3 channels; of a video (N, C, T, H, W) the middle frame is shown.
        columns: N labels.
    """
    stacks = {name: _still(images) for name, images in rows.items()}
    shapes = {tuple(images.shape) for images in stacks.values()}
    if len(shapes) != 1:
        raise UsageError(f"rows of a sheet must have one shape, not {', '.join(map(str, sorted(shapes))) or 'none'}")
    count, height, width, _ = shapes.pop()
    if count != len(columns) or count == 0:
        raise UsageError(f"a sheet of {count} columns has {len(columns)} labels")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dots = 100
    blown = max(1, -(-SMALLEST // min(height, width)))
    high, wide, gap = height * blown / dots, width * blown / dots, 0.04
    left, top = 0.25 + 0.075 * max(map(len, rows)), 0.3 + 0.25 * bool(title)  # inches
    size = left + count * (wide + gap), top + len(rows) * (high + gap)
    figure = Figure(figsize=size, dpi=dots, facecolor="white")
    FigureCanvasAgg(figure)
    for r, (name, images) in enumerate(stacks.items()):
        bottom = size[1] - top - (r + 1) * (high + gap) + gap
        figure.text((left - 0.1) / size[0], (bottom + high / 2) / size[1], name, ha="right", va="center", color=INK)
        for c, image in enumerate(images):
            where = (left + c * (wide + gap)) / size[0], bottom / size[1], wide / size[0], high / size[1]
            axis = figure.add_axes(where)
            axis.imshow(image.numpy(), interpolation="nearest" if blown > 1 else "antialiased", vmin=0, vmax=1)
            axis.set_axis_off()
    for c, label in enumerate(columns):
        centre = (left + c * (wide + gap) + wide / 2) / size[0]
        text = _short(str(label), wide)
        figure.text(centre, 1 - (top - 0.05) / size[1], text, ha="center", va="bottom", color=MUTED, fontsize=8)
    if title:
        figure.text(left / size[0], 1 - 0.08 / size[1], title, ha="left", va="top", color=INK, fontsize=10)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def _still(images: Tensor) -> Tensor:
    """(N, C, H, W) or (N, C, T, H, W) → (N, H, W, 3), of a video the middle frame."""
    if images.ndim == 5:
        images = images[:, :, images.shape[2] // 2]
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UsageError(f"images must be (N, 1 or 3, H, W) or (N, 1 or 3, T, H, W), not {tuple(images.shape)}")
    images = images.detach().float().cpu().clamp(0, 1)
    return torch.movedim(images.expand(-1, 3, -1, -1), 1, -1)


def _short(text: str, inches: float) -> str:
    """As much of a label as stands above one image."""
    most = max(3, int(inches / 0.062))
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"
