"""A tokenizer for models that come with a list of words alone, such as those of chemistry.

Their vocab.txt lists a token a line, and a regular expression says what a token is. Where a folder holds nothing else,
transformers puts together a tokenizer of some other kind, for which every text is one unknown token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import AssetMissing, UsageError, one_line

VOCABULARY = "vocab.txt"
SPECIAL = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}


def word_tokenizer(folder: Path, pattern: str) -> Any:
    """Texts are cut into what `pattern` matches, the rest is left out, and looked up in the folder's vocab.txt.

    [CLS] and [SEP] stand around every text, as BERT has it.

    Raises:
        AssetMissing: there is no such file, or it lacks one of the special tokens. UsageError: the pattern is none.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    path = folder / VOCABULARY
    if not path.is_file():
        raise AssetMissing(f"{folder} has no {VOCABULARY}, whose words model.words is to find: take model.words out")
    known = {word: n for n, word in enumerate(path.read_text(encoding="utf-8").splitlines())}
    missing = [word for word in SPECIAL.values() if word not in known]
    if missing:
        raise AssetMissing(f"{path} lists no {', '.join(missing)}, which a tokenizer of words needs")
    try:
        expression = Regex(pattern)
    except Exception as error:  # what tokenizers raises has no class of its own
        raise UsageError(f"model.words is no regular expression: {one_line(error)}") from error
    plain = Tokenizer(models.WordLevel(known, unk_token=SPECIAL["unk_token"]))
    plain.pre_tokenizer = pre_tokenizers.Split(expression, behavior="removed", invert=True)
    start, end = ((SPECIAL[name], known[SPECIAL[name]]) for name in ("cls_token", "sep_token"))
    plain.post_processor = processors.TemplateProcessing(
        single=f"{start[0]} $A {end[0]}", pair=f"{start[0]} $A {end[0]} $B:1 {end[0]}:1", special_tokens=[start, end]
    )
    return PreTrainedTokenizerFast(tokenizer_object=plain, **SPECIAL)


def require_words(tokenizer: Any, model: Any, where: Path) -> None:
    """Refuses a tokenizer that knows next to none of the model's tokens: it was made up, not read.

    Raises:
        AssetMissing: it knows less than a tenth of them.
    """
    size = getattr(model.config.get_text_config(), "vocab_size", 0)
    if len(tokenizer) * 10 < size:
        hint = f"; cut texts into the words of its {VOCABULARY}: model.words" if (where / VOCABULARY).is_file() else ""
        told = f"the tokenizer in {where} knows {len(tokenizer)} tokens of the model's {size}, so it is of another"
        raise AssetMissing(told + hint)
