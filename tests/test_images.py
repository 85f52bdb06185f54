"""What images are judged by, on known values and on the shipped flux-mnist."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnconvert.convert import image_metrics as metrics
from attnconvert.convert.conditioning import load_conditions
from attnconvert.convert.errors import AssetMissing, UsageError
from attnconvert.convert.hosts.denoising import predict
from attnconvert.convert.images import pixels, sheet
from attnconvert.convert.processes import Process
from attnconvert.convert.sampling import Sampler, noise, sample

ROOT = Path(__file__).parents[1]
ASSET = ROOT / "recipes" / "flux-mnist"


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*shape, generator=generator), torch.randn(*shape, generator=generator)


def test_velocity_error_is_the_squared_share_that_is_missed() -> None:
    v = torch.randn(4, 3, 5)
    assert metrics.velocity_error(v, v) == 0
    assert metrics.velocity_error(torch.zeros_like(v), v) == pytest.approx(1)
    assert metrics.velocity_error(1.1 * v, v) == pytest.approx(0.01, rel=1e-4)
    each = metrics.velocity_errors(torch.cat([v[:2], 0.5 * v[2:]]), v)
    torch.testing.assert_close(each, torch.tensor([0, 0, 0.25, 0.25]))
    bands = metrics.by_band(each, torch.tensor([1.0, 0.9, 0.5, 0.2]), [0, 0.25, 0.5, 0.75, 1])
    assert bands == {(0, 0.25): 0.25, (0.25, 0.5): 0.25, (0.5, 0.75): None, (0.75, 1): 0}
    with pytest.raises(UsageError, match="one shape"):
        metrics.velocity_error(v, v[:2])


def test_psnr_of_a_constant_shift_is_known() -> None:
    x = torch.full((2, 1, 16, 16), 0.5)
    torch.testing.assert_close(metrics.psnr(x, x + 0.1), torch.full((2,), 20.0, dtype=torch.float64))
    assert metrics.psnr(x, x).tolist() == [math.inf, math.inf]
    torch.testing.assert_close(metrics.psnr(255 * x, 255 * x + 25.5, span=255), torch.full((2,), 20.0).double())


def test_ssim_is_its_definition() -> None:
    x, y = (v[0, 0].double().sigmoid() for v in pair(1, 1, 13, 15))
    bell = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights = torch.from_numpy(np.outer(bell, bell) / bell.sum() ** 2)
    local = []
    for top in range(3):
        for left in range(5):
            a, b = (v[top : top + 11, left : left + 11] for v in (x, y))
            ma, mb = (weights * a).sum(), (weights * b).sum()
            va, vb, ab = ((weights * p).sum() for p in ((a - ma) ** 2, (b - mb) ** 2, (a - ma) * (b - mb)))
            local.append((2 * ma * mb + 1e-4) * (2 * ab + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    found = metrics.ssim(x[None, None], y[None, None])
    assert float(found) == pytest.approx(float(torch.stack(local).mean()), rel=1e-5)
    assert metrics.ssim(x[None, None], x[None, None]).tolist() == [1.0]
    video = torch.rand(2, 3, 2, 16, 16)
    assert metrics.ssim(video, video).tolist() == [1.0, 1.0]
    flat = torch.full((1, 1, 16, 16), 0.25), torch.full((1, 1, 16, 16), 0.75)  # only the means differ
    assert float(metrics.ssim(*flat)) == pytest.approx((0.375 + 1e-4) / (0.625 + 1e-4), rel=1e-5)
    with pytest.raises(UsageError, match="11 × 11"):
        metrics.ssim(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8))


def test_the_frechet_distance_of_gaussians_is_known() -> None:
    from scipy.linalg import sqrtm

    x, y = pair(60, 4)
    assert metrics.frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet(x, x + torch.tensor([1.0, 2.0, 0.0, 0.0])) == pytest.approx(5, rel=1e-4)
    spread = float(x.double().var(0).sum())
    assert metrics.frechet(x, 3 * x) == pytest.approx(
        4 * spread + 4 * float(x.double().mean(0).square().sum()), rel=1e-5
    )
    y = y @ torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) + 1
    a, b = (np.cov(v.double().numpy().T) for v in (x, y))
    mean = (x.double().mean(0) - y.double().mean(0)).square().sum()
    assert metrics.frechet(x, y) == pytest.approx(float(mean) + np.trace(a + b - 2 * sqrtm(a @ b).real), rel=1e-6)
    assert math.isfinite(metrics.frechet(x[:3], y[:3]))  # covariances without full rank
    with pytest.raises(UsageError, match="at least two samples"):
        metrics.frechet(x[:1], y)


@pytest.fixture(scope="module")
def teacher() -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel.from_pretrained(ASSET, torch_dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def drawn(teacher: Any) -> tuple[Tensor, Tensor]:
    """Samples of the shipped model, with their classes."""
    bank, classes = load_conditions(ASSET / "conditions.safetensors"), torch.arange(20) % 10
    start = noise((1, 32, 32), 0, range(20))

    def denoise(x: Tensor, t: Tensor, indices: Tensor) -> Tensor:
        return predict(teacher, x, t, bank.take(indices))

    sampler = Sampler(steps=5, guidance=2.0, shift=2.0)
    return sample(denoise, Process(), sampler, start, classes, bank.nulls(20)).x, classes


def test_the_shipped_model_draws_the_digits_that_are_asked_for(drawn: tuple[Tensor, Tensor]) -> None:
    judge = metrics.load_classifier(ASSET / "classifier.safetensors")
    found, features = judge.judge(drawn[0])
    assert int((found == drawn[1]).sum()) >= 19
    assert features.shape == (20, 16)
    bank = load_conditions(ASSET / "conditions.safetensors")
    assert (bank.labels, bank.null) == ((*range(10), None), 10)


def test_perceptual_distance_grows_with_the_damage(drawn: tuple[Tensor, Tensor]) -> None:
    judge, x = metrics.load_classifier(ASSET / "classifier.safetensors"), drawn[0]
    noised = [x + strength * pair(*x.shape)[0] for strength in (0.0, 0.05, 0.2, 0.8)]
    distances = [metrics.perceptual(judge, other, x) for other in noised]
    assert distances[0].tolist() == [0.0] * 20
    means = [float(d.mean()) for d in distances]
    assert means == sorted(means)
    assert means[-1] > 2 * means[1] > 0


def test_a_classifier_of_another_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssetMissing, match="holds no classifier"):
        metrics.load_classifier(ASSET / "conditions.safetensors")
    with pytest.raises(AssetMissing, match="is not there"):
        metrics.load_classifier(tmp_path / "none.safetensors")


def test_a_sheet_shows_every_row_and_column(tmp_path: Path, drawn: tuple[Tensor, Tensor]) -> None:
    from PIL import Image

    path, x = tmp_path / "sheet.png", pixels(drawn[0][:4])
    assert 0 <= float(x.min()) < 0.01 < 0.9 < float(x.max()) <= 1
    sheet({"teacher": x, "student": 1 - x}, ["0", "1", "2", "a long prompt that is cut"], path, title="digits")
    image = np.asarray(Image.open(path).convert("L")).astype(int)
    assert image.shape[1] > 4 * 64
    assert int((image < 10).sum()) > 4 * 64 * 64 * 0.8  # black grounds of one row, black figures of the other
    with pytest.raises(UsageError, match="4 columns has 1 labels"):
        sheet({"teacher": x}, ["0"], path)
    with pytest.raises(UsageError, match="one shape"):
        sheet({"teacher": x, "student": x[:2]}, ["0"] * 4, path)
    sheet({"video": torch.rand(1, 3, 4, 70, 80)}, ["a"], path)


def test_latents_are_shown_by_what_they_differ_in_most() -> None:
    from attnconvert.convert.images import view_of

    generator = torch.Generator().manual_seed(0)
    far = torch.randn(4, 1, 8, 8, generator=generator)
    latents = torch.cat([0.01 * torch.randn(4, 5, 8, 8, generator=generator), 3 * far], 1) + 7
    view = view_of(latents)
    seen = view(latents)
    assert seen.shape == (4, 3, 8, 8)
    assert abs(float(torch.corrcoef(torch.stack([seen[:, 0].flatten(), far.flatten()]))[0, 1])) > 0.999
    assert float(seen.mean().abs()) < 1e-3, "the mean is in the middle"
    assert float(seen[:, 0].std()) == pytest.approx(1 / 3, rel=0.05)
    assert torch.equal(view_of(far)(far), far), "what has colours is shown as it is"
    video = view_of(torch.randn(2, 16, 3, 4, 4))(torch.randn(2, 16, 3, 4, 4))
    assert video.shape == (2, 3, 3, 4, 4)
