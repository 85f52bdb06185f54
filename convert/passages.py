"""What an encoder is measured on: passages, each with a fact hidden in it, that a search by embeddings should find.

An encoder puts out no distribution over tokens, so its damage is told by what embeddings are for: which texts are near.
A passage's similarities to a bank of others are softmaxed with the scale that sentence encoders are trained with, which
gives a KL in nats; the fact, asked for in its own words, must find its passage among the others, which gives a loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UsageError
from .hosts import models
from .seeds import rng
from .text import TEMPLATES, compared, frame, hidden_fact, nll, sequences, tokenize

SCALE = 20.0  # of cosine similarities, as in sentence-transformers' MultipleNegativesRankingLoss
APART = -1e4  # the logit of a passage's similarity to itself
BANK = 64  # passages that a search chooses from


@dataclass(frozen=True)
class Passages:
    """Retrieval cases of one length for an encoder.

    `ids` (n, S) hold a fact each; `bank` (m, C) are the teacher's embeddings of passages without one, `asked` (n, C)
    those of the facts alone, all of length 1.
    """

    ids: Tensor
    bank: Tensor
    asked: Tensor
    losses: ClassVar[tuple[str, ...]] = ("text", "needle")

    def __len__(self) -> int:
        return len(self.ids)

    def first(self, cases: int) -> Passages:
        """The first cases only."""
        return dataclasses.replace(self, ids=self.ids[:cases], asked=self.asked[:cases])

    def target(self, case: int) -> Tensor:
        """(1,): the place of the case's passage among those that a search chooses from."""
        return torch.tensor([len(self.bank)])

    def answers(self, model: Any, case: int) -> Tensor:
        """Of the passages near the case's own, and of those that its fact finds, in fp32. → (2, m + 1)"""
        own = embed(model, self.ids[case][None])[0]
        bank, asked = self.bank.to(own.device), self.asked[case].to(own.device)
        near = torch.cat([SCALE * bank @ own, own.new_full((1,), APART)])
        found = SCALE * torch.cat([bank @ asked, (own @ asked)[None]])
        return torch.stack([near, found]).log_softmax(-1)

    def answer_loss(self, case: int, answers: Tensor) -> float:
        """Nats per token of the answer."""
        return nll(answers, self.target(case))

    def compared(self, case: int, want: Tensor, got: Tensor) -> dict[str, float]:
        """KL of what is measured, and the rise of the answer's loss."""
        return compared(want, got, self.target(case))

    def loss(self, model: Any, case: int, name: str) -> Tensor:
        """ "needle": that the fact finds its passage; "text": that the passage finds the one now nearest to it."""
        near, found = self.answers(model, case)
        found_or_near: Tensor = found[-1] if name == "needle" else near.max()
        return -found_or_near


def embed(model: Any, ids: Tensor) -> Tensor:
    """Sentence embeddings of length 1, fp32, pooled as the model does. ids (B, S) → (B, C)"""
    hidden = models.trunk(model)(ids.to(model.device)).last_hidden_state
    return F.normalize(models.pooled(model, hidden.float()), dim=-1)


@torch.no_grad()
def passages(
    model: Any,
    tokenizer: Any,
    documents: Sequence[Any],
    template: str,
    cases: int,
    length: int,
    seed: int,
    *,
    bank: int = BANK,
) -> Passages:
    """`cases` passages of exactly `length` tokens, the fact at evenly spread depths, and a bank of others.

    The model is the teacher. Facts are those of the needle templates, their numbers at random.

    Raises:
        UsageError: the text is too short, or the passages are too short for the fact.
    """
    generator = rng("passages", seed, template, length)
    start, end = frame(tokenizer)
    texts = sequences(tokenizer, documents, bank + cases, length, seed, (start, end))
    ids, asked = [], []
    for case in range(cases):
        words = hidden_fact(TEMPLATES[template], generator)
        fact = tokenize(tokenizer, words)
        room = length - len(start) - len(end) - len(fact)
        if room < 16:
            least = length + 16 - room
            raise UsageError(f"passages of {length} tokens leave no text around the fact: use at least {least}")
        body = texts[bank + case, len(start) : length - len(end)].tolist()[:room]
        depth = round((case + 0.5) / cases * room)
        ids.append(start + body[:depth] + fact + body[depth:] + end)
        asked.append(embed(model, torch.tensor([start + fact + end]))[0])
    found = torch.cat([embed(model, rows) for rows in texts[:bank].split(8)])
    return Passages(torch.tensor(ids), found.cpu(), torch.stack(asked).cpu())
