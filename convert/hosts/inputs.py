"""What a model of transformers is given to run on without data: tokens, an image, sound, by what its class asks for."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .sites import Unsupported

KNOWN = ("input_ids", "pixel_values", "input_features")
POSITIONS = ("max_position_embeddings", "max_target_positions", "n_positions")


def takes(model: PreTrainedModel) -> list[str]:
    """The inputs that a model needs: its main one, both where it compares texts with images, a decoder's beside it.

    Raises:
        Unsupported: its main input is none that is known here.
    """
    main = model.main_input_name
    if main not in KNOWN:
        raise Unsupported(f"{type(model).__name__} takes {main}: known are {', '.join(KNOWN)}")
    named = inspect.signature(model.forward).parameters
    if model.config.is_encoder_decoder:
        return [main, "decoder_input_ids"]
    towers = [name for name in KNOWN if name in named and not model.can_generate()]
    return towers if main in towers else [main]


def example(model: PreTrainedModel, length: int, decoder: int, rows: int = 1) -> dict[str, Tensor]:
    """Inputs of `rows` rows, always the same: texts of `length` tokens, of a decoder `decoder` tokens."""
    makers = {
        "input_ids": lambda: tokens(model, rows, length),
        "decoder_input_ids": lambda: tokens(model, rows, decoder),
        "pixel_values": lambda: _image(model, rows),
        "input_features": lambda: _sound(model, rows),
    }
    return {name: makers[name]() for name in takes(model)}


def tokens(model: PreTrainedModel, rows: int, length: int) -> Tensor:
    """(rows, length), spread over the vocabulary."""
    ids = torch.arange(1, rows * length + 1, device=model.device).view(rows, length)
    return ids * 7919 % vocabulary(model)


def vocabulary(model: PreTrainedModel) -> int:
    """How many tokens it knows."""
    return int(model.config.get_text_config().vocab_size)


def positions(model: PreTrainedModel) -> int | None:
    """The longest text that its config speaks of; None where it says nothing."""
    config = model.config.get_text_config()
    said = [getattr(config, name, None) for name in POSITIONS]
    return min((int(n) for n in said if n is not None), default=None)


def _wave(model: PreTrainedModel, *shape: int) -> Tensor:
    """Numbers between −1 and 1 without a short period."""
    count = int(torch.Size(shape).numel())
    return torch.sin(torch.arange(count, device=model.device) * 1.7).view(shape).to(model.dtype)


def _image(model: PreTrainedModel, rows: int) -> Tensor:
    """(rows, channels, height, width)"""
    config = getattr(model.config, "vision_config", model.config)
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return _wave(model, rows, getattr(config, "num_channels", 3), height, width)


def _sound(model: PreTrainedModel, rows: int) -> Tensor:
    """(rows, mel bins, frames): an encoder with learned positions takes twice as many frames as it has positions."""
    config = model.config
    return _wave(model, rows, config.num_mel_bins, 2 * config.max_source_positions)
