"""Encoders with a masked-token head: their vocabularies, texts with masks, and what is measured with them."""

import re
import sys
from pathlib import Path

import pytest
import torch
from models import tiny
from transformers import AutoModel, AutoModelForMaskedLM, PreTrainedTokenizerFast

from attnconvert.convert import evaluation
from attnconvert.convert.errors import AssetMissing, UsageError
from attnconvert.convert.hosts.models import find_sites
from attnconvert.convert.hosts.surgery import convert
from attnconvert.convert.masking import masked
from attnconvert.convert.progress import silent
from attnconvert.convert.recipe import load_recipe
from attnconvert.convert.recipe_inputs import ModelSource
from attnconvert.convert.sources import fetch_model, load_model
from attnconvert.convert.text import frame
from attnconvert.convert.vocabulary import require_words, word_tokenizer
from attnconvert.kernels.spec import Window

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))

import reactions

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "C", "Cl", "O", "(", ")", "=", "[Na+]", ">>", ".", "N"]
SMILES = load_recipe("rxnmapper-window").model.words


@pytest.fixture
def vocabulary(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return tmp_path


def test_texts_are_cut_into_words_of_the_list_and_framed(vocabulary):
    tokenizer = word_tokenizer(vocabulary, SMILES)
    ids = tokenizer("ClC(=O)O.[Na+]\n>>CX")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == (
        ["[CLS]", "Cl", "C", "(", "=", "O", ")", "O", ".", "[Na+]", ">>", "C", "[UNK]", "[SEP]"]
    )
    assert frame(tokenizer) == ([2], [3])
    assert tokenizer.mask_token_id == 4
    tokenizer.save_pretrained(vocabulary / "saved")
    again = PreTrainedTokenizerFast.from_pretrained(vocabulary / "saved")
    assert again("ClC(=O)O.[Na+]\n>>CX")["input_ids"] == ids
    padded = again(["C", "CCl"], padding=True)
    assert padded["input_ids"][0][-1] == 0
    assert padded["attention_mask"][0] == [1, 1, 1, 0]


def test_a_word_list_that_is_absent_or_lacks_its_special_words_is_refused(tmp_path, vocabulary):
    with pytest.raises(AssetMissing, match="no vocab.txt"):
        word_tokenizer(tmp_path / "nowhere", SMILES)
    with pytest.raises(UsageError, match="model.words is no regular expression"):
        word_tokenizer(vocabulary, "(")
    (vocabulary / "vocab.txt").write_text("C\nO\n[CLS]\n")
    with pytest.raises(AssetMissing, match=r"lists no \[UNK\], \[SEP\], \[PAD\], \[MASK\]"):
        word_tokenizer(vocabulary, SMILES)


def test_a_tokenizer_that_was_made_up_for_a_list_of_words_is_refused(tmp_path):
    """transformers builds one of five tokens from nothing for an ALBERT that has a vocab.txt alone."""
    tiny("albert", auto=AutoModelForMaskedLM).save_pretrained(tmp_path)
    names = [*WORDS, *(f"[{n}]" for n in range(99 - len(WORDS)))]
    (tmp_path / "vocab.txt").write_text("\n".join(names) + "\n")
    source = ModelSource(folder=tmp_path, dtype="float32")
    with pytest.raises(AssetMissing, match="knows 5 tokens of the model's 99.*model.words"):
        load_model(fetch_model(source), source)
    source = ModelSource(folder=tmp_path, dtype="float32", words=SMILES)
    model, tokenizer = load_model(fetch_model(source), source)
    assert len(tokenizer) == 99
    require_words(tokenizer, model, tmp_path)


def test_masks_stand_in_every_text_but_not_on_its_frame_and_depend_on_the_seed_alone(vocabulary):
    tokenizer = word_tokenizer(vocabulary, SMILES)
    ids = torch.randint(5, 15, (40, 30), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -1] = 2, 3
    texts = masked(tokenizer, ids, 0)
    assert torch.equal(texts.shown == 4, texts.hidden)
    assert torch.equal(texts.shown[~texts.hidden], ids[~texts.hidden])
    assert texts.hidden.any(1).all()
    assert not texts.hidden[:, [0, -1]].any()
    assert texts.hidden[:, 1:-1].double().mean().item() == pytest.approx(0.15, abs=0.03)
    assert torch.equal(masked(tokenizer, ids, 0).shown, texts.shown)
    assert not torch.equal(masked(tokenizer, ids, 1).shown, texts.shown)
    assert masked(object(), ids, 0) is None, "a tokenizer without a mask"


@torch.no_grad()
def test_what_is_filled_in_is_counted_against_the_texts_and_the_teacher(vocabulary):
    teacher, student = (tiny("bert", auto=AutoModelForMaskedLM) for _ in range(2))
    ids = torch.randint(5, 97, (6, 24), generator=torch.Generator().manual_seed(0))
    texts = masked(word_tokenizer(vocabulary, SMILES), ids, 0)
    convert(student, {s: [Window(size=2, sinks=0)] * s.kv_heads for s in find_sites(student)})
    found = evaluation.filling(teacher, student, texts, 4, silent, "")
    says = {name: m(texts.shown).logits.argmax(-1) for name, m in (("teacher", teacher), ("student", student))}
    right = {name: (x == ids)[texts.hidden].double().mean().item() for name, x in says.items()}
    assert found["masked"] == pytest.approx(right["student"])
    assert found["teacher_masked"] == pytest.approx(right["teacher"])
    same = (says["teacher"] == says["student"])[texts.hidden].double().mean().item()
    assert found["masked_same"] == pytest.approx(same)
    assert same < 1, "the windows change answers"
    itself = evaluation.filling(teacher, teacher, texts, 4, silent, "")
    assert itself["masked_same"] == 1
    assert itself.get("masked_kept", 1) == 1


@torch.no_grad()
def test_the_ranks_of_similarities_are_spearmans_and_one_for_the_teacher_itself():
    teacher, student = (tiny("bert", auto=AutoModel) for _ in range(2))
    ids = torch.randint(5, 97, (8, 24), generator=torch.Generator().manual_seed(0))
    assert evaluation.encoding(teacher, teacher, ids, 4, silent, "")["rank"] == pytest.approx(1)
    convert(student, {s: [Window(size=1, sinks=0)] * s.kv_heads for s in find_sites(student)})
    found = evaluation.encoding(teacher, student, ids, 3, silent, "")
    sides = []
    for model in (teacher, student):
        pooled = torch.nn.functional.normalize(model(ids).last_hidden_state.mean(1), dim=-1)
        similarities = (pooled @ pooled.T)[torch.triu(torch.ones(8, 8), 1).bool()]
        sides.append(similarities.argsort().argsort().double())
    assert found["rank"] == pytest.approx(torch.corrcoef(torch.stack(sides))[0, 1].item(), abs=1e-6)
    assert found["rank"] < 1


def test_the_reactions_that_are_shipped_are_whole_and_join_other_groups_where_they_are_held_out(tmp_path, monkeypatch):
    token, lines = re.compile(SMILES), {}
    for side in ("calibration", "heldout"):
        (file,) = getattr(load_recipe("rxnmapper-window").text, side).files
        lines[side] = Path(file).read_text(encoding="utf-8").splitlines()
        assert {len(token.findall(line)) for line in lines[side]} == {reactions.TOKENS}
        assert all("".join(token.findall(line)) == line and line.count(">>") == 1 for line in lines[side])
        assert len(set(lines[side])) == reactions.SIZES[side]
    train, held = (reactions.Blocks(side) for side in lines)
    for kind in ("aryls", "alkyls", "amines"):
        assert len(getattr(held, kind)) > 5
        assert not set(getattr(train, kind)) & set(getattr(held, kind))
    monkeypatch.setattr("sys.argv", ["reactions.py", "--out", str(tmp_path)])
    reactions.main()
    assert {side: (tmp_path / f"{side}.txt").read_text().splitlines() for side in lines} == lines
