"""The script that trains flux-mnist."""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attnconvert.convert import image_metrics as metrics
from attnconvert.convert.errors import AssetMissing, UsageError
from attnconvert.convert.progress import silent

ROOT = Path(__file__).parents[1]
ASSET = ROOT / "recipes" / "flux-mnist"


def script() -> Any:
    spec = importlib.util.spec_from_file_location("flux_mnist", ROOT / "docs" / "flux_mnist.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["flux_mnist"] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


def printed_digits() -> tuple[np.ndarray, np.ndarray]:
    """(40, 28, 28) bytes and their classes: printed digits, each at four places."""
    from PIL import Image, ImageDraw

    images = []
    for n in range(40):
        image = Image.new("L", (28, 28))
        ImageDraw.Draw(image).text((7 + n // 20, 4 + n // 10 % 2), str(n % 10), fill=255, font_size=18)
        images.append(np.asarray(image))
    return np.stack(images), np.arange(40) % 10


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    images, classes = printed_digits()
    for name, values in (("images-idx3", images), ("labels-idx1", classes.astype(np.uint8))):
        head = b"\x00\x00\x08" + bytes([values.ndim]) + struct.pack(f">{values.ndim}i", *values.shape)
        (tmp_path / f"train-{name}-ubyte").write_bytes(head + values.tobytes())
    return tmp_path


def test_digits_are_read_from_both_kinds_of_files(idx_folder: Path, tmp_path: Path) -> None:
    import io

    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    flux_mnist = script()
    x, classes = flux_mnist.digits(idx_folder)
    assert (x.shape, float(x.min()), float(x.max())) == ((40, 1, 32, 32), -1.0, 1.0)
    assert classes.tolist() == [n % 10 for n in range(40)]
    rows = []
    for image, label in zip(*printed_digits(), strict=True):
        Image.fromarray(image).save(stream := io.BytesIO(), format="png")
        rows.append({"image": {"bytes": stream.getvalue(), "path": None}, "label": int(label)})
    (tmp_path / "parquet").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "parquet" / "train-00000-of-00001.parquet")
    again, labels = flux_mnist.digits(tmp_path / "parquet")
    assert torch.equal(again, x)
    assert torch.equal(labels, classes)
    with pytest.raises(AssetMissing, match="holds neither"):
        flux_mnist.digits(tmp_path / "parquet" / "nothing")


def test_training_continues_where_it_was_killed_and_writes_a_folder_that_loads(
    idx_folder: Path, tmp_path: Path
) -> None:
    from diffusers import FluxTransformer2DModel

    flux_mnist = script()
    data = flux_mnist.digits(idx_folder)
    settings = flux_mnist.Settings(steps=4, batch=2, judge_steps=240, judge_batch=32, keep=2)

    def killed(iterable: Any, description: str, total: int | None = None) -> Any:
        for n, item in enumerate(iterable):
            if description == "flux" and n == 3:
                raise KeyboardInterrupt
            yield item

    flux_mnist.train(data, tmp_path / "whole", settings, silent)
    with pytest.raises(KeyboardInterrupt):
        flux_mnist.train(data, tmp_path / "parts", settings, killed)
    assert not (tmp_path / "parts" / "conditions.safetensors").exists()
    flux_mnist.train(data, tmp_path / "parts", settings, silent)

    for name in ("conditions", "classifier", "diffusion_pytorch_model"):
        whole, parts = ((tmp_path / x / f"{name}.safetensors").read_bytes() for x in ("whole", "parts"))
        assert whole == parts, name
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert steps == [2, 4]
    model = FluxTransformer2DModel.from_pretrained(tmp_path / "whole")
    shipped = json.loads((ASSET / "config.json").read_text())
    mine = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert {k: v for k, v in mine.items() if k[0] != "_"} == {k: v for k, v in shipped.items() if k[0] != "_"}
    assert sum(p.numel() for p in model.parameters()) > 2e6
    found, _ = metrics.load_classifier(tmp_path / "whole" / "classifier.safetensors").judge(data[0])
    assert float((found == data[1]).float().mean()) > 0.9
    with pytest.raises(UsageError, match="begun with other settings"):
        flux_mnist.train(data, tmp_path / "whole", flux_mnist.Settings(steps=5), silent)
