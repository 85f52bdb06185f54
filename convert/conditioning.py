"""What a denoiser is asked for: a bank of prompts or classes, encoded once, so that no text encoder is needed later.

A bank is a safetensors file. Its tensors have the denoiser's argument names (`encoder_hidden_states`,
`pooled_projections`, `encoder_attention_mask`, …) and one row per entry; its metadata has `conditions`, JSON of
`labels`, the list of prompts or classes, and `null`, the index of the entry without any, which guidance needs, or null.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import AssetMissing, UsageError, one_line
from .files import replacing

Label = str | int | None


@dataclass(frozen=True)
class Conditions:
    """`tensors` by argument name, each (N, …); `labels` has N; `null` is the entry of no prompt or no class."""

    tensors: Mapping[str, Tensor]
    labels: tuple[Label, ...]
    null: int | None = None

    def __post_init__(self) -> None:
        if not self.tensors:
            raise UsageError("a bank of conditions needs a tensor, for example encoder_hidden_states")
        for name, tensor in self.tensors.items():
            if tensor.ndim == 0 or tensor.shape[0] != len(self.labels):
                raise UsageError(f"{name} is {tuple(tensor.shape)}: it must have a row for each of {len(self)} labels")
        if self.null is not None and (not isinstance(self.null, int) or not 0 <= self.null < len(self.labels)):
            raise UsageError(f"null is entry {self.null} of {len(self.labels)}")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def prompts(self) -> tuple[int, ...]:
        """The entries that ask for something."""
        return tuple(n for n in range(len(self)) if n != self.null)

    def take(self, indices: Tensor | Sequence[int], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The denoiser's arguments for these entries (B,), each (B, …)."""
        rows = torch.as_tensor(indices, device="cpu").long()
        if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < len(self):
            raise UsageError(f"entries {rows.tolist()} are asked for of a bank of {len(self)}")
        return {name: tensor[rows].to(device) for name, tensor in self.tensors.items()}

    def nulls(self, count: int) -> Tensor:
        """(count,) indices of the entry without a prompt.

        Raises:
            UsageError: the bank has none.
        """
        if self.null is None:
            raise UsageError("guidance needs the entry without a prompt, and the bank of conditions has none")
        return torch.full((count,), self.null)

    def save(self, path: Path) -> None:
        """Write the file; `load_conditions` is its inverse."""
        from safetensors.torch import save_file

        about = {"conditions": json.dumps({"labels": self.labels, "null": self.null}, ensure_ascii=False)}
        with replacing(path) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, temporary, metadata=about)


def load_conditions(path: Path) -> Conditions:
    """Read a bank.

    Raises:
        AssetMissing: the file is not there or no safetensors file.
        UsageError: its labels do not fit its tensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 – it is no dict
    except FileNotFoundError:
        raise AssetMissing(f"{path} is not there: it should hold the encoded prompts") from None
    except (OSError, SafetensorError) as error:
        raise AssetMissing(f"{path} cannot be read as safetensors: {one_line(error)}") from None
    try:
        given = json.loads(about["conditions"])
        labels, null = tuple(given["labels"]), given["null"]
    except (KeyError, TypeError, ValueError):
        found = one_line(about.get("conditions", "nothing"))
        raise UsageError(f"{path}: its metadata should hold labels and null under 'conditions', not {found}") from None
    return Conditions(tensors, labels, null)
