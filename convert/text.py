"""Token sequences and needle tasks from documents: what profiling, sampling and evaluation read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UsageError
from .hosts import models
from .seeds import rng

STRIDE = 4  # every 4th position takes part in the measured KL


@dataclass(frozen=True)
class Template:
    """A needle task: `needle` holds the fact somewhere in the text, `question` asks for it at the end."""

    needle: str
    question: str
    digits: int = 5


TEMPLATES = {
    "passkey": Template(
        needle=" The pass key is {answer}. Remember it. {answer} is the pass key. ",
        question="\n\nWhat is the pass key? The pass key is",
    ),
    "locker": Template(
        needle=" By the way, the number of my locker at the station is {answer}; please do not forget it. ",
        question="\n\nQuestion: Which number does my locker at the station have?"
        "\nAnswer: The number of my locker at the station is",
    ),
    "account": Template(
        needle=" Note for the file: the account of Mrs. Hale was opened under the code {answer}. ",
        question="\n\nFor the file, I repeat the note about Mrs. Hale."
        " The account of Mrs. Hale was opened under the code",
    ),
    "badge": Template(
        needle=" One more thing: the badge of the new engineer carries the number {answer}. ",
        question="\n\nReminder. The badge of the new engineer carries the number",
    ),
    "train": Template(
        needle=" The night train to Lisbon has the reservation code {answer}, as I was told. ",
        question="\n\nWhich reservation code has the night train to Lisbon?"
        " The night train to Lisbon has the reservation code",
    ),
    "shelf": Template(
        needle=" The missing manuscript was found on shelf {answer} of the old library. ",
        question="\n\nQ: On which shelf of the old library was the missing manuscript found?\nA: It was found on shelf",
    ),
}


@dataclass(frozen=True)
class Needles:
    """Needle cases of one length.

    `ids` (n, S); `answer` (n, A) are positions of the answer's tokens in the question's end, `needle` (n, A) those of
    the same tokens inside the text. The token at `answer[i, a]` is predicted at `answer[i, a] − 1`.
    """

    ids: Tensor
    answer: Tensor
    needle: Tensor
    losses: ClassVar[tuple[str, ...]] = ("text", "needle")

    def __len__(self) -> int:
        return len(self.ids)

    def first(self, cases: int) -> Needles:
        """The first cases only."""
        return Needles(self.ids[:cases], self.answer[:cases], self.needle[:cases])

    def target(self, case: int) -> Tensor:
        """(A,): the answer's tokens, which the last rows of `answers` predict."""
        return self.ids[case, self.answer[case]]

    def answers(self, model: Any, case: int) -> Tensor:
        """At the positions that are measured, in fp32. → (P, V)"""
        ids, at = self.ids[case][None].to(model.device), measured_positions(self.answer[case].to(model.device))
        return models.logits_at(model, ids, at)[0].float().log_softmax(-1)

    def answer_loss(self, case: int, answers: Tensor) -> float:
        """Nats per token of the answer."""
        return nll(answers, self.target(case))

    def compared(self, case: int, want: Tensor, got: Tensor) -> dict[str, float]:
        """KL of what is measured, and the rise of the answer's loss."""
        return compared(want, got, self.target(case))

    def loss(self, model: Any, case: int, name: str) -> Tensor:
        """ "needle": of the answer; "text": of all before it. Mean nats per token, with a gradient."""
        ids, answer = self.ids[case][None].to(model.device), self.answer[case].to(model.device)
        at = answer - 1 if name == "needle" else torch.arange(int(answer[0]) - 1, device=ids.device)
        return F.cross_entropy(models.logits_at(model, ids, at)[0].float(), ids[0, at + 1])


class Cases(Protocol):
    """What damage is measured on: `Needles` for a language model, `passages.Passages` for an encoder, `states.States`
    for a denoiser.

    `losses` are the names that `loss` knows; "text" is always one of them.
    """

    losses: ClassVar[tuple[str, ...]]

    def __len__(self) -> int: ...
    def first(self, cases: int) -> Cases: ...
    def answers(self, model: Any, case: int) -> Tensor:
        """What the model says to a case: log-probabilities, or the prediction of a denoiser."""
        ...

    def compared(self, case: int, want: Tensor, got: Tensor) -> dict[str, float]:
        """What `got` loses against the teacher's `want`: "kl" and "needle", the rise of the answer's loss."""
        ...

    def answer_loss(self, case: int, answers: Tensor) -> float:
        """What the answer is off, in nats per token; 0 where there is none."""
        ...

    def loss(self, model: Any, case: int, name: str) -> Tensor: ...


class Samples(Protocol):
    """What a model is run on to see its attention."""

    def __len__(self) -> int: ...
    def run(self, model: Any, rows: Tensor) -> Tensor:
        """The model on these samples: last hidden states, or the prediction of a denoiser. rows (b,) → (b, …)"""
        ...

    def band(self, row: int) -> str | None:
        """The part of the sampler's steps that a denoiser's state is of; None for text."""
        ...


@dataclass(frozen=True)
class Texts:
    """Token sequences `ids` (n, S) as samples."""

    ids: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def run(self, model: Any, rows: Tensor) -> Tensor:
        """The last hidden states (b, S, C)."""
        ids = self.ids[rows.to(self.ids.device)].to(model.device)
        hidden: Tensor = models.trunk(model)(ids, use_cache=False).last_hidden_state
        return hidden

    def band(self, row: int) -> str | None:
        return None


def samples_of(given: Tensor | Samples) -> Samples:
    """Token sequences (n, S) as samples; samples as they are."""
    return Texts(given) if isinstance(given, Tensor) else given


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher ‖ student) of log-probabilities (…, V), in nats. → (…)"""
    return F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)


def nll(log_probabilities: Tensor, target: Tensor) -> float:
    """Mean negative log-likelihood of the answer's tokens (A,), whose predictions come last."""
    return F.nll_loss(log_probabilities[-len(target) :], target.to(log_probabilities.device)).item()


def compared(want: Tensor, got: Tensor, target: Tensor) -> dict[str, float]:
    """KL and rise of the answer's loss of log-probabilities (P, V), the answer's last."""
    return {"kl": kl(want, got).mean().item(), "needle": nll(got, target) - nll(want, target)}


def measured_positions(answer: Tensor) -> Tensor:
    """Every STRIDE-th position before the answer (A,), and those that predict it."""
    return torch.cat([torch.arange(STRIDE, int(answer[0]) - 1, STRIDE, device=answer.device), answer - 1])


def tokenize(tokenizer: Any, text: str) -> list[int]:
    """Ids without special tokens; long documents do not warn about the model's length."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def opening(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text, such as a beginning-of-sequence token; models expect it there."""
    ids: list[int] = tokenizer("a")["input_ids"]
    bos = getattr(tokenizer, "bos_token_id", None)
    return [bos] if bos is not None and ids[:1] == [bos] else []


def frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What an encoder's tokenizer puts before and after every text, such as [CLS] and [SEP]."""
    bare, whole = tokenize(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    at = next((n for n in range(len(whole)) if whole[n : n + len(bare)] == bare), 0)
    return whole[:at], whole[at + len(bare) :]


def hidden_fact(form: Template, generator: torch.Generator) -> str:
    """The words of a needle, its number drawn."""
    return form.needle.format(answer=_number(form, generator)).strip()


def _number(form: Template, generator: torch.Generator) -> str:
    return "".join(str(int(d)) for d in torch.randint(0, 10, (form.digits,), generator=generator))


def sequences(
    tokenizer: Any,
    documents: Sequence[Any],
    count: int,
    length: int,
    seed: int,
    around: tuple[list[int], list[int]] | None = None,
) -> Tensor:
    """`count` sequences of `length` tokens, each from one document, none overlapping, drawn with `seed`. → (n, S)

    Args:
        around: tokens before and after each; by default the tokenizer's beginning of a sequence.

    Raises:
        UsageError: the documents are too short for that many.
    """
    pieces = []
    start, end = around or (opening(tokenizer), [])
    body = length - len(start) - len(end)
    for document in documents:
        ids = tokenize(tokenizer, document.text)
        pieces += [start + ids[i : i + body] + end for i in range(0, len(ids) - body + 1, body)]
    if len(pieces) < count:
        raise UsageError(
            f"the text holds {len(pieces)} sequences of {length} tokens but {count} are asked for: "
            "name more text, or ask for fewer or shorter sequences"
        )
    chosen = torch.randperm(len(pieces), generator=rng("sequences", seed, length))[:count]
    return torch.tensor([pieces[i] for i in chosen.tolist()])


def needles(tokenizer: Any, documents: Sequence[Any], template: str, cases: int, length: int, seed: int) -> Needles:
    """`cases` needle tasks of exactly `length` tokens, the needle at evenly spread depths, answers at random."""
    if template not in TEMPLATES:
        raise UsageError(f"no needle template {template!r}; known are {', '.join(TEMPLATES)}")
    form = TEMPLATES[template]
    generator = rng("needles", seed, template, length)
    hay = sequences(tokenizer, documents, cases, length, seed)
    ids, answers, found = [], [], []
    for case in range(cases):
        number = _number(form, generator)
        before, after = form.needle.split("{answer}", 1)
        parts = [tokenize(tokenizer, x) for x in (before.rstrip(), " " + number, after.format(answer=number))]
        question, answer = tokenize(tokenizer, form.question), tokenize(tokenizer, " " + number)
        room = length - sum(map(len, parts)) - len(question) - len(answer)
        if room < 16:
            raise UsageError(
                f"needle cases of {length} tokens leave no text around the needle: use at least {length + 16 - room}"
            )
        first = len(opening(tokenizer))
        depth = first + round((case + 0.5) / cases * (room - first))
        text = hay[case].tolist()
        needle = [token for part in parts for token in part]
        row = text[:depth] + needle + text[depth:room] + question + answer
        at = depth + len(parts[0])
        ids.append(row)
        found.append(list(range(at, at + len(answer))))
        answers.append(list(range(length - len(answer), length)))
    width = min(map(len, answers))
    return Needles(*(torch.tensor(x) for x in (ids, [a[-width:] for a in answers], [f[-width:] for f in found])))
