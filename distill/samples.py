"""Self-generation: token sequences that the teacher writes, in shards that are whole or absent.

Each sequence has a seed of its own, a hash of the run's seed and its number, so that which sequences there are does
not depend on batch size, shards or interruptions; only the rounding of the arithmetic can.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from ..convert.errors import AssetMissing, UsageError
from ..convert.files import replacing
from ..convert.hosts import surgery
from ..convert.hosts.sites import Site, all_full
from ..convert.seeds import rng
from ..convert.text import sequences

if TYPE_CHECKING:
    from ..convert.progress import Track
    from ..convert.recipe import SampleSettings


class GumbelNoise(LogitsProcessor):
    """Greedy search over logits plus Gumbel noise samples from their softmax; each row has a stream of its own."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.generators = generators

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores (B, V) → the same with noise."""
        uniform = torch.stack([torch.rand(scores.shape[-1], generator=g) for g in self.generators]).to(scores.device)
        return scores.float() - (-uniform.clamp_min(1e-30).log()).log()


def prompts(tokenizer: Any, documents: Sequence[Any], settings: SampleSettings) -> Tensor:
    """What each sequence starts from, (n, P): text, the beginning-of-sequence token, or an open chat turn."""
    if settings.prompts == "text":
        return sequences(tokenizer, documents, settings.sequences, settings.prompt_tokens, settings.seed)
    if settings.prompts == "bos":
        if tokenizer.bos_token_id is None:
            raise UsageError("sample.prompts is bos, but this tokenizer has no such token: use text or chat")
        start = [tokenizer.bos_token_id]
    else:
        if not tokenizer.chat_template:
            raise UsageError("sample.prompts is chat, but this tokenizer has no chat template: use text or bos")
        marked = tokenizer.apply_chat_template([{"role": "user", "content": "\x00"}], tokenize=False)
        start = tokenizer(marked.partition("\x00")[0], add_special_tokens=False)["input_ids"]
    return torch.tensor([start]).expand(settings.sequences, -1)


def shard_path(folder: Path, shard: int, shards: int) -> Path:
    """Where a shard lies."""
    return folder / f"shard-{shard:05d}-of-{shards:05d}.parquet"


def shard_count(settings: SampleSettings) -> int:
    """How many shards the settings make."""
    return -(-settings.sequences // settings.shard)


@torch.no_grad()
def sample(
    model: Any, sites: Sequence[Site], starts: Tensor, settings: SampleSettings, folder: Path, track: Track
) -> None:
    """Write the shards that are missing. `starts` (n, P) are the prompts; each sequence gets `settings.length` tokens.

    The teacher runs on our own full attention, which decodes grouped heads without repeating keys: several times faster
    on CPU than the stock path, and equal to it.
    """
    with surgery.converted(model, all_full(sites)):
        _make_shards(model, starts, settings, folder, track)


def _make_shards(model: Any, starts: Tensor, settings: SampleSettings, folder: Path, track: Track) -> None:
    shards = shard_count(settings)
    for shard in range(shards):
        path = shard_path(folder, shard, shards)
        if path.exists():
            continue
        numbers = range(shard * settings.shard, min((shard + 1) * settings.shard, settings.sequences))
        rows: list[list[int]] = []
        batches = [numbers[i : i + settings.batch] for i in range(0, len(numbers), settings.batch)]
        for n, batch in enumerate(batches):
            title = f"sampling, shard {shard + 1} of {shards}" + (f", batch {n + 1}" if len(batches) > 1 else "")
            rows += _generate(model, starts, batch, settings, track, title).tolist()
        _write(path, numbers, starts.shape[1], rows)


def _write(path: Path, numbers: Sequence[int], prompt: int, rows: list[list[int]]) -> None:
    table = pa.table(
        {
            "sequence": list(numbers),
            "prompt_tokens": [prompt] * len(rows),
            "tokens": pa.array(rows, type=pa.list_(pa.int32())),
        }
    )
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


def keep_texts(texts: Tensor, settings: SampleSettings, folder: Path) -> None:
    """What an encoder is distilled on, since it cannot write: texts (n, S), in the same shards.

    Raises:
        UsageError: the settings ask for what only a generating model has.
    """
    if settings.prompts != "text":
        raise UsageError(f"sample.prompts is {settings.prompts}, but this model cannot generate: use text")
    for shard in range(shard_count(settings)):
        numbers = range(shard * settings.shard, min((shard + 1) * settings.shard, settings.sequences))
        path = shard_path(folder, shard, shard_count(settings))
        _write(path, numbers, settings.length, texts[list(numbers)].tolist())


class _Count(LogitsProcessor):
    """Moves the progress bar at every generated token."""

    def __init__(self, ticks: Any) -> None:
        self.ticks = iter(ticks)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        next(self.ticks, None)
        return scores


def _generate(
    model: Any, starts: Tensor, numbers: Sequence[int], settings: SampleSettings, track: Track, title: str
) -> Tensor:
    start = starts[list(numbers)].to(model.device)
    new = settings.length - start.shape[1]
    ticks = track(range(new), title)
    chain: list[LogitsProcessor] = [_Count(ticks)]
    if settings.temperature > 0:
        chain += [TemperatureLogitsWarper(settings.temperature)] if settings.temperature != 1 else []
        chain += [TopPLogitsWarper(settings.top_p)] if settings.top_p < 1 else []
        chain += [GumbelNoise([rng("sample", settings.seed, n) for n in numbers])]
    # Not the model's own generation settings: a repetition penalty there would change what the teacher says. No end of
    # text is given: a sequence goes on after one, as training text does.
    with _plain_generation(model):
        ids: Tensor = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            generation_config=GenerationConfig(do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0),
            logits_processor=LogitsProcessorList(chain),
        )
    for _ in chain[0].ticks:  # type: ignore[attr-defined]  # let the bar finish
        pass
    return ids.cpu()


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Inside, the model has no generation settings of its own, which generate would mix into those it is given."""
    before, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def read_samples(folder: Path, settings: SampleSettings) -> Tensor:
    """All sequences, (n, S), in their order.

    Raises:
        AssetMissing: a shard is absent or cannot be read.
    """
    shards = shard_count(settings)
    rows: list[list[int]] = []
    for shard in range(shards):
        path = shard_path(folder, shard, shards)
        try:
            rows += pq.read_table(path)["tokens"].to_pylist()
        except FileNotFoundError:
            raise AssetMissing(f"{path} is missing: run `attnconvert sample` again") from None
        except pa.ArrowException as error:
            raise AssetMissing(
                f"{path} cannot be read ({error}): delete it and run `attnconvert sample` again"
            ) from None
    return torch.tensor(rows)
