"""Sequences and needle tasks: what they hold, and that they are the same for the same seed."""

import pytest
import torch

from attnconvert.convert.documents import Document
from attnconvert.convert.errors import UsageError
from attnconvert.convert.text import TEMPLATES, needles, sequences


class Characters:
    """A tokenizer of one token per character."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [ord(c) for c in text]}


DOCUMENTS = [
    Document(name=n, text="".join(chr(97 + (i * k) % 26) for i in range(4000))) for n, k in (("a", 3), ("b", 7))
]


def test_sequences_do_not_overlap_and_come_from_one_document():
    found = sequences(Characters(), DOCUMENTS, 70, 100, 0)
    assert found.shape == (70, 100)
    texts = ["".join(map(chr, row.tolist())) for row in found]
    assert all(any(t in d.text for d in DOCUMENTS) for t in texts)
    assert torch.equal(found, sequences(Characters(), DOCUMENTS, 70, 100, 0))
    assert not torch.equal(found, sequences(Characters(), DOCUMENTS, 70, 100, 1))
    with pytest.raises(UsageError, match="holds 80 sequences of 100 tokens but 81"):
        sequences(Characters(), DOCUMENTS, 81, 100, 0)


@pytest.mark.parametrize("template", TEMPLATES)
def test_needles_say_what_they_ask(template):
    task = needles(Characters(), DOCUMENTS, template, 6, 500, 0)
    assert task.ids.shape == (6, 500)
    depths = []
    for ids, answer, found in zip(task.ids, task.answer, task.needle, strict=True):
        assert torch.equal(ids[answer], ids[found])
        assert answer.tolist() == list(range(494, 500))
        assert "".join(map(chr, ids[answer].tolist())).strip().isdigit()
        depths.append(int(found[0]))
    assert depths == sorted(depths)
    assert depths[0] < 150 < 250 < depths[-1]
    assert len({tuple(t[a].tolist()) for t, a in zip(task.ids, task.answer, strict=True)}) > 1


def test_texts_begin_as_the_tokenizer_begins_them():
    class WithStart(Characters):
        bos_token_id = 1

        def __call__(self, text, add_special_tokens=True, verbose=True):
            return {"input_ids": [1] * add_special_tokens + [ord(c) for c in text]}

    assert bool((sequences(WithStart(), DOCUMENTS, 10, 100, 0)[:, 0] == 1).all())
    task = needles(WithStart(), DOCUMENTS, "passkey", 4, 500, 0)
    assert bool((task.ids[:, 0] == 1).all())
    assert int((task.ids == 1).sum()) == 4


def test_needles_that_leave_no_text_and_unknown_templates_are_refused():
    with pytest.raises(UsageError, match="leave no text around the needle: use at least"):
        needles(Characters(), DOCUMENTS, "passkey", 2, 100, 0)
    with pytest.raises(UsageError, match="no needle template 'passky'"):
        needles(Characters(), DOCUMENTS, "passky", 2, 500, 0)
