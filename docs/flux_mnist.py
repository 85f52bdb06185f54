"""Trains a folder like recipes/flux-mnist: a tiny FLUX by flow matching on MNIST, its classes, and a digit classifier.

    python docs/flux_mnist.py --out runs/flux-mnist                     MNIST from the Hugging Face hub
    python docs/flux_mnist.py --out runs/flux-mnist --data FOLDER       idx or parquet files that are there already

Started again with the same arguments it continues where it stopped, and ends with the same weights.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnconvert.convert.conditioning import Conditions
from attnconvert.convert.errors import AssetMissing, UsageError
from attnconvert.convert.files import replacing, write_json
from attnconvert.convert.hosts.denoising import predict
from attnconvert.convert.image_metrics import Classifier
from attnconvert.convert.processes import Process
from attnconvert.convert.progress import Track, rich_track
from attnconvert.convert.seeds import rng

HUB, SIDE, CLASSES, TOKENS, WIDTH = "ylecun/mnist", 32, 10, 4, 32
MODEL = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 64,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "pooled_projection_dim": WIDTH,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 24, 24),
}
JUDGE: dict[str, Any] = {"channels": 1, "widths": (24, 48, 64), "size": SIDE, "features": 16, "classes": CLASSES}
AVERAGE = 0.999  # the weights that are kept are a running mean of those that are trained


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`keep`: steps between two points from which training can continue."""

    images: int = 9000
    steps: int = 6000
    batch: int = 32
    rate: float = 1e-3
    unclassed: float = 0.1
    judge_steps: int = 1500
    judge_batch: int = 128
    keep: int = 200
    seed: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--data", type=Path, help="folder with MNIST as idx (also .gz) or parquet files")
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"default {value}")
    given = vars(parser.parse_args())
    out, data = given.pop("out"), given.pop("data")
    train(digits(data), out, Settings(**given), rich_track())


def train(data: tuple[Tensor, Tensor], out: Path, settings: Settings, track: Track) -> None:
    """The classifier, then the model, from images (N, 1, 32, 32) in [−1, 1] and their classes (N,).

    Raises:
        UsageError: the folder was begun with other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    begun = out / "training.json"
    if begun.exists() and json.loads(begun.read_text(encoding="utf-8")) != asdict(settings):
        raise UsageError(f"{out} was begun with other settings: name another folder, or delete this one")
    write_json(begun, asdict(settings))
    order = torch.randperm(len(data[0]), generator=rng("flux-mnist", settings.seed, "images"))[: settings.images]
    images, classes = data[0][order], data[1][order]
    if not (out / "classifier.safetensors").exists():
        train_judge(images, classes, out / "classifier.safetensors", settings, track)
    train_model(images, classes, out, settings, track)


def train_judge(images: Tensor, classes: Tensor, path: Path, settings: Settings, track: Track) -> None:
    """Cross-entropy on images that are shifted by up to two pixels."""
    from safetensors.torch import save_file

    torch.manual_seed(settings.seed)
    judge = Classifier(**JUDGE).train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-2)
    for step in track(range(settings.judge_steps), "classifier"):
        generator = rng("flux-mnist", settings.seed, "judge", step)
        rows = torch.randint(len(images), (settings.judge_batch,), generator=generator)
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        loss = F.cross_entropy(judge(images[rows].roll(shift, (-2, -1)))[0], classes[rows])
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / settings.judge_steps)
        optimizer.step()
    with replacing(path) as temporary:
        save_file(judge.state_dict(), temporary)


class Student(nn.Module):
    """The model and the conditioning of its classes, which are trained together."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers import FluxTransformer2DModel

        self.model = FluxTransformer2DModel(**MODEL)
        self.table = nn.Parameter(torch.randn(CLASSES + 1, TOKENS + 1, WIDTH))

    def conditions(self) -> dict[str, Tensor]:
        """Tensors of the bank, by argument."""
        return {"encoder_hidden_states": self.table[:, :TOKENS], "pooled_projections": self.table[:, TOKENS]}


def train_model(images: Tensor, classes: Tensor, out: Path, settings: Settings, track: Track) -> None:
    """Flow matching, with times from a logit-normal distribution (Esser et al., 2024); what it writes is the folder."""
    torch.manual_seed(settings.seed)
    student = Student()
    optimizer = torch.optim.AdamW(student.parameters(), lr=settings.rate, betas=(0.9, 0.99), weight_decay=1e-2)
    mean = {name: p.detach().clone() for name, p in student.named_parameters()}
    kept, done = out / "training.pt", 0
    if kept.exists():
        before = torch.load(kept, weights_only=True)
        student.load_state_dict(before["student"])
        optimizer.load_state_dict(before["optimizer"])
        mean, done = before["mean"], before["done"]
    for step in track(range(done, settings.steps), "flux"):
        loss = flow_loss(student, images, classes, settings, step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * pace(step, settings.steps)
        optimizer.step()
        follow = min(AVERAGE, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, p in student.named_parameters():
                mean[name].lerp_(p, 1 - follow)
        if (step + 1) % settings.keep == 0 or step + 1 == settings.steps:
            state = {"student": student.state_dict(), "optimizer": optimizer.state_dict(), "mean": mean}
            with replacing(kept) as temporary:
                torch.save({**state, "done": step + 1}, temporary)
            with (out / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps({"step": step + 1, "loss": float(loss.detach())}) + "\n")
    write_folder(student, mean, out)


def flow_loss(student: Student, images: Tensor, classes: Tensor, settings: Settings, step: int) -> Tensor:
    """Of the batch that belongs to this step, whatever came before it."""
    generator = rng("flux-mnist", settings.seed, "batch", step)
    rows = torch.randint(len(images), (settings.batch,), generator=generator)
    t = torch.randn(settings.batch, generator=generator).sigmoid()
    dropped = torch.rand(settings.batch, generator=generator) < settings.unclassed
    asked = torch.where(dropped, CLASSES, classes[rows])
    x, process = images[rows], Process()
    noise = torch.randn(x.shape, generator=generator)
    conditions = {name: tensor[asked] for name, tensor in student.conditions().items()}
    prediction = predict(student.model, process.noised(x, noise, t), t, conditions)
    return F.mse_loss(prediction, process.target(x, noise, t))


def pace(step: int, steps: int) -> float:
    """The learning rate's share of its peak: 2 % of warming up, then a cosine down to a fiftieth."""
    warm = max(1, steps // 50)
    return min((step + 1) / warm, 0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))


def write_folder(student: Student, mean: Mapping[str, Tensor], out: Path) -> None:
    """The running mean in float16, as `from_pretrained` and `load_conditions` read it."""
    student.load_state_dict(mean)
    bank = {name: tensor.detach().contiguous() for name, tensor in student.conditions().items()}
    Conditions(bank, (*range(CLASSES), None), CLASSES).save(out / "conditions.safetensors")
    student.model.half().save_pretrained(out)


def digits(folder: Path | None) -> tuple[Tensor, Tensor]:
    """Training images (N, 1, 32, 32) in [−1, 1] and their classes (N,), from a folder or else from the hub.

    Raises:
        AssetMissing: the folder holds neither idx nor parquet files of them.
    """
    if folder is None:
        from datasets import load_dataset

        rows = load_dataset(HUB, split="train").with_format("numpy")
        return prepared(np.stack(list(rows["image"])), np.asarray(rows["label"]))
    tables = sorted(folder.rglob("*train*.parquet"))
    if tables:
        return from_parquet(tables)
    images, classes = (sorted(folder.rglob(f"train-{what}-idx*-ubyte*")) for what in ("images", "labels"))
    if not images or not classes:
        raise AssetMissing(
            f"{folder} holds neither *train*.parquet nor train-images-idx3-ubyte, train-labels-idx1-ubyte"
        )
    return prepared(idx(images[0]), idx(classes[0]))


def from_parquet(paths: list[Path]) -> tuple[Tensor, Tensor]:
    """Files as on the hub: a column `image` of encoded pictures and a column `label`."""
    import pyarrow.parquet
    from PIL import Image

    rows = [row for path in paths for row in pyarrow.parquet.read_table(path, columns=["image", "label"]).to_pylist()]
    pictures = [np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("L")) for row in rows]
    return prepared(np.stack(pictures), np.asarray([row["label"] for row in rows]))


def idx(path: Path) -> np.ndarray:
    """An array of bytes in MNIST's own format: two zeros, the type, the number of axes, their sizes, the values."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise AssetMissing(f"{path} is no idx file of bytes")
    shape = np.frombuffer(content, ">i4", content[3], 4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * content[3])
    if values.size != shape.prod():
        raise AssetMissing(f"{path} should hold {' × '.join(map(str, shape))} values and has {values.size}")
    return values.reshape(shape)


def prepared(images: np.ndarray, classes: np.ndarray) -> tuple[Tensor, Tensor]:
    """Bytes (N, H, W) of at most 32 × 32, in the middle of 32 × 32 black pixels."""
    high, wide = SIDE - images.shape[1], SIDE - images.shape[2]
    x = torch.from_numpy(images.astype(np.float32))[:, None] / 127.5 - 1
    x = F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2), value=-1.0)
    return x, torch.from_numpy(classes.astype(np.int64))


if __name__ == "__main__":
    main()
