"""Samples of an image or video model's teacher in shards: latents, and where asked the trajectories that led to them.

A shard is a safetensors file that appears whole. No decoder and no text encoder is needed to make or to read one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..convert.errors import AssetMissing, one_line
from ..convert.files import replacing
from ..convert.hosts.sites import Site, all_full
from ..convert.hosts.surgery import converted
from ..convert.sampling import Drawn
from ..convert.states import Caller
from .images import Images, computing_in
from .samples import shard_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..convert.recipe_images import ImageSamples


@dataclass(frozen=True)
class Kept:
    """What was generated: `x` (n, C, …), `entries` (n,) of the conditions and, of trajectories, `times` (S,), `states`
    (n, S, C, …) and the predictions there, `prompted` and, where the sampler was guided, `unprompted`, alike.
    """

    x: Tensor
    entries: Tensor
    times: Tensor | None = None
    states: Tensor | None = None
    prompted: Tensor | None = None
    unprompted: Tensor | None = None

    @property
    def branches(self) -> int:
        """How many predictions a state has: with the prompt, and without it."""
        return 1 + (self.unprompted is not None)

    def __len__(self) -> int:
        """Samples, or where trajectories are kept their states, counted for each branch."""
        return len(self.x) * (1 if self.times is None else len(self.times) * self.branches)

    def state(self, rows: Tensor, null: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the trajectories: x_t (b, C, …), t (b,), entries (b,) and the teacher's prediction (b, C, …)."""
        assert self.times is not None
        assert self.states is not None
        assert self.prompted is not None
        rows = rows.cpu()
        branch, rest = rows % self.branches, rows // self.branches
        sample, step = rest // len(self.times), rest % len(self.times)
        want = self.prompted[sample, step]
        entries = self.entries[sample]
        if self.unprompted is not None:
            without = (branch == 1).view(-1, *[1] * (want.ndim - 1))
            want = torch.where(without, self.unprompted[sample, step], want)
            entries = torch.where(branch == 1, torch.full_like(entries, -1 if null is None else null), entries)
        return self.states[sample, step], self.times[step], entries, want


@dataclass(frozen=True)
class KeptStates:
    """States of kept trajectories as what a model is run on."""

    kept: Kept
    caller: Caller

    def __len__(self) -> int:
        return len(self.kept)

    def band(self, row: int) -> str | None:
        """Training looks at all steps alike."""
        return None

    def run(self, model: Any, rows: Tensor) -> Tensor:
        """The predictions (b, C, …) for the states at `rows` (b,)."""
        x, t, entries, _ = self.kept.state(rows, self.caller.conditions.null)
        return self.caller(model, x, t, entries)


def sample_images(images: Images, sites: Sequence[Site], settings: ImageSamples, folder: Path) -> None:
    """Write the shards that are missing. The teacher runs on our own full attention, which equals its own."""
    shards = -(-settings.count // settings.shard)
    with converted(images.model, all_full(sites)):
        for shard in range(shards):
            path = _path(folder, shard, shards)
            if path.exists():
                continue
            numbers = range(shard * settings.shard, min((shard + 1) * settings.shard, settings.count))
            title = f"sampling, shard {shard + 1} of {shards}"
            whole = settings.keep == "trajectory"
            with computing_in(settings.precision, images.model):
                drawn = images.draw(images.model, numbers, settings.seed, settings.batch, title, trajectory=whole)
            _write(path, drawn, images.entries(numbers))


def _path(folder: Path, shard: int, shards: int) -> Path:
    return shard_path(folder, shard, shards).with_suffix(".safetensors")


def _write(path: Path, drawn: Drawn, entries: Tensor) -> None:
    tensors = {"x": drawn.x, "entries": entries}
    if drawn.states:
        tensors["times"] = torch.tensor([state.t for state in drawn.states])
        tensors["states"] = torch.stack([state.x for state in drawn.states], 1)
        tensors["prompted"] = torch.stack([state.prompted for state in drawn.states], 1)
        without = [state.unprompted for state in drawn.states if state.unprompted is not None]
        if without:
            tensors["unprompted"] = torch.stack(without, 1)
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


def read_images(folder: Path, settings: ImageSamples) -> Kept:
    """All samples, in their order.

    Raises:
        AssetMissing: a shard is absent or cannot be read.
    """
    shards = -(-settings.count // settings.shard)
    parts: list[dict[str, Tensor]] = []
    for shard in range(shards):
        path = _path(folder, shard, shards)
        try:
            with safe_open(path, framework="pt") as file:
                parts.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 – it is no dict
        except FileNotFoundError:
            raise AssetMissing(f"{path} is missing: run `attnconvert sample` again") from None
        except (OSError, SafetensorError) as error:
            told = f"{path} cannot be read ({one_line(error)}): delete it and run `attnconvert sample` again"
            raise AssetMissing(told) from None
    times = parts[0].get("times")
    names = [name for name in parts[0] if name != "times"]
    return Kept(times=times, **{name: torch.cat([part[name] for part in parts]) for name in names})
