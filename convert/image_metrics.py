"""How far a student's velocities, images and distributions of images are from the teacher's."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import AssetMissing, UsageError, one_line

WINDOW, SPREAD = 11, 1.5  # SSIM's Gaussian: pixels, and their standard deviation
STABLE = (0.01, 0.03)  # SSIM's K1 and K2


def velocity_error(student: Tensor, teacher: Tensor) -> float:
    """‖v̂ − v‖² / ‖v‖² over all of the predictions: 0 where they agree, 1 where the student says nothing."""
    return velocity_errors(student.flatten()[None], teacher.flatten()[None])[0].item()


def velocity_errors(student: Tensor, teacher: Tensor) -> Tensor:
    """(B,) the same of each sample; predictions (B, …)."""
    _same(student, teacher)
    wide = teacher.double().flatten(1)
    norm = wide.square().sum(1)
    return ((student.double().flatten(1) - wide).square().sum(1) / norm.clamp_min(torch.finfo(norm.dtype).tiny)).float()


def by_band(errors: Tensor, t: Tensor, edges: Sequence[float]) -> dict[tuple[float, float], float | None]:
    """Mean of the errors (N,) whose time (N,) is in each band between neighbouring edges; None where there is none.

    A band holds its upper edge but not its lower one: times run down from 1, and no model is asked at 0.
    """
    if len(edges) < 2 or sorted(set(edges)) != list(edges):
        raise UsageError(f"bands of time need at least two rising edges, not {list(edges)}")
    found: dict[tuple[float, float], float | None] = {}
    for low, high in itertools.pairwise(edges):
        inside = errors[(t > low) & (t <= high)]
        found[low, high] = float(inside.mean()) if len(inside) else None
    return found


def psnr(images: Tensor, others: Tensor, span: float = 1.0) -> Tensor:
    """(B,) peak signal-to-noise ratio in dB, infinite for equal images. (B, …) whose values span `span`."""
    _same(images, others)
    return 10 * torch.log10(span**2 / (images.double() - others.double()).square().flatten(1).mean(1))


def ssim(images: Tensor, others: Tensor, span: float = 1.0) -> Tensor:
    """(B,) structural similarity (Wang et al., 2004), 1 for equal images; mean over channels and frames.

    (B, C, H, W) or (B, C, T, H, W) whose values span `span`, of at least 11 × 11 pixels.
    """
    _same(images, others)
    if min(images.shape[-2:]) < WINDOW:
        raise UsageError(f"SSIM looks at {WINDOW} × {WINDOW} pixels; the images have {tuple(images.shape[-2:])}")
    planes = -1, 1, *images.shape[-2:]
    x, y = images.double().reshape(planes), others.double().reshape(planes)
    bell = torch.exp(-((torch.arange(WINDOW, dtype=torch.float64, device=x.device) - WINDOW // 2) ** 2) / 2 / SPREAD**2)
    bell = bell / bell.sum()

    def blurred(planes: Tensor) -> Tensor:  # (P, 1, H, W) → (P, 1, H − 10, W − 10): whole windows only
        return F.conv2d(F.conv2d(planes, bell.view(1, 1, -1, 1)), bell.view(1, 1, 1, -1))

    c1, c2 = ((k * span) ** 2 for k in STABLE)
    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    both = blurred(x * y) - mean_x * mean_y
    top = (2 * mean_x * mean_y + c1) * (2 * both + c2)
    local = top / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return local.reshape(len(images), -1).mean(1).float()


def frechet(features: Tensor, others: Tensor) -> float:
    """The Fréchet distance (Heusel et al., 2017) of two sets of features (N, F), (M, F), as if each were Gaussian.

    ‖μ − μ'‖² + tr(Σ + Σ' − 2 (Σ Σ')^½) in fp64. A set against another of the same source is not 0: with few samples
    the estimate is biased upward, so distances are only compared at equal N and M.
    """
    if features.ndim != 2 or others.ndim != 2 or features.shape[1] != others.shape[1]:
        raise UsageError(f"features must be (N, F) and (M, F), not {tuple(features.shape)} and {tuple(others.shape)}")
    if min(len(features), len(others)) < 2:
        raise UsageError("a Fréchet distance needs at least two samples on each side")
    x, y = features.double().cpu(), others.double().cpu()
    root = _root(torch.cov(x.T).reshape(x.shape[1], -1))
    inner = root @ torch.cov(y.T).reshape(y.shape[1], -1) @ root  # similar to Σ Σ', and symmetric
    overlap = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp_min(0).sqrt().sum()
    spread = x.var(0).sum() + y.var(0).sum() - 2 * overlap
    return float((x.mean(0) - y.mean(0)).square().sum() + spread)


def _root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root


class Classifier(nn.Module):
    """A small convolutional judge of images (B, channels, size, size) in [−1, 1].

    Three convolutions of stride 2 with batch norm and ReLU, a linear layer to the features, ReLU, a linear layer to the
    logits. `load_classifier` reads one whose sizes its weights tell.
    """

    def __init__(self, channels: int, widths: Sequence[int], size: int, features: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in widths:
            conv = nn.Conv2d(channels, width, 3, stride=2, padding=1)
            layers.append(nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU()))
            channels, size = width, (size + 1) // 2
        self.f = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size * size, features))
        self.h = nn.Linear(features, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Logits (B, classes), features (B, F) before their ReLU, and the activations (B, C, H, W) of each layer."""
        x, activations = images, []
        for layer in self.f:
            x = layer(x)
            if x.ndim == 4:
                activations.append(x)
        return self.h(x.relu()), x, activations

    @torch.no_grad()
    def judge(self, images: Tensor, batch: int = 256) -> tuple[Tensor, Tensor]:
        """Classes (N,) and features (N, F) of images in [−1, 1]."""
        found = [self(part)[:2] for part in images.float().split(batch)]
        return torch.cat([logits.argmax(-1) for logits, _ in found]), torch.cat([features for _, features in found])


def load_classifier(path: Path) -> Classifier:
    """Read a classifier's weights, in evaluation mode.

    Raises:
        AssetMissing: the file is not there, or holds no classifier of this form.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights: dict[str, Any] = load_file(path)
    except FileNotFoundError:
        raise AssetMissing(f"{path} is not there: it should hold a classifier's weights") from None
    except (OSError, SafetensorError) as error:
        raise AssetMissing(f"{path} cannot be read as safetensors: {one_line(error)}") from None
    try:
        convs = [weights[f"f.{n}.0.weight"] for n in range(3)]  # each (out, in, 3, 3)
        linear, head = weights["f.4.weight"], weights["h.weight"]
        side = round((linear.shape[1] / convs[-1].shape[0]) ** 0.5) * 8
        model = Classifier(convs[0].shape[1], [c.shape[0] for c in convs], side, linear.shape[0], head.shape[0])
        model.load_state_dict(weights)
    except (KeyError, RuntimeError) as error:
        raise AssetMissing(f"{path} holds no classifier of the form that is known: {one_line(error)}") from None
    return model.eval().requires_grad_(False)


@torch.no_grad()
def perceptual(classifier: Classifier, images: Tensor, others: Tensor) -> Tensor:
    """(B,) distance of the classifier's activations, each position's channels scaled to length 1; mean over layers.

    After LPIPS (Zhang et al., 2018), with equal weights in place of learned ones. Images in [−1, 1].
    """
    _same(images, others)
    distances = []
    for a, b in zip(classifier(images.float())[2], classifier(others.float())[2], strict=True):
        apart = F.normalize(a, dim=1, eps=1e-8) - F.normalize(b, dim=1, eps=1e-8)
        distances.append(apart.square().sum(1).flatten(1).mean(1))
    return torch.stack(distances).mean(0)


def _same(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise UsageError(f"what is compared must have one shape, not {tuple(a.shape)} and {tuple(b.shape)}")
