"""Commands run in this process on a tiny model, and a finished run of it: fixtures of what tests the command line."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attnconvert import cli

TEXT = "the a of and key is what remember it to my number at station by please do not which have question answer"
WORDS = TEXT.split()
RECIPE = """\
name: tiny-window
description: A tiny random Llama
model: {folder: model, dtype: float32}
text:
  calibration: {files: [calibration.txt]}
  heldout: {files: [heldout.txt]}
profile:
  sequences: 2
  length: 64
  rows: 8
  candidates: [{operator: window, size: 16, sinks: 2}, {operator: hybrid, window: 8, sinks: 2}]
  needles: {cases: 2, length: 96, template: passkey}
select: {method: damage, groups: 0.6}
compare:
  - {name: random, select: {method: random, groups: 0.6}}
sample: {sequences: 4, length: 40, batch: 2, shard: 2, prompt_tokens: 8}
distill:
  transfer: {steps: 2}
  lora: {rank: 2, checkpoint_every: 2}
evaluate:
  lengths: [64]
  sequences: 4
  needles: {cases: 4, length: 96, template: locker}
  speed: {lengths: [128], repeats: 1, decode_tokens: 2}
gates: {converted: 0.5, kv_ratio: {128: 0.9}}
"""


class Outcome:
    """Exit code, stdout and stderr of a command."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def document(self) -> Any:
        """stdout, which must be one JSON document."""
        return json.loads(self.out)

    @property
    def message(self) -> str:
        """The last line of stderr."""
        return self.err.strip().splitlines()[-1]


Command = Callable[..., Outcome]


@pytest.fixture
def attnconvert(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command in this process, which has torch imported already."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(argument) for argument in arguments])
        found = capfd.readouterr()
        return Outcome(stopped.value.code if isinstance(stopped.value.code, int) else 1, found.out, found.err)

    return run


def save_tokenizer(folder: Path, size: int) -> None:
    """A tokenizer of words in which every digit is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", *map(str, range(10)), *WORDS]
    names += [f"word{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(size - len(names) - 2)] + ["<unk>", "</s>"]
    plain = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama, two texts and a recipe for them."""
    from models import tiny

    folder = tmp_path_factory.mktemp("cli")
    tiny("llama").save_pretrained(folder / "model")
    save_tokenizer(folder / "model", 99)
    draw = random.Random(0)
    for name in ("calibration", "heldout"):
        (folder / f"{name}.txt").write_text(" ".join(draw.choice(WORDS) for _ in range(4000)))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def exported(place: Path) -> Path:
    """A checkpoint of the tiny Llama with a window in half of its groups: much sooner there than `whole`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from attnconvert.convert.export import export
    from attnconvert.convert.hosts.models import find_sites
    from attnconvert.convert.hosts.surgery import convert
    from attnconvert.kernels.spec import Full, Window

    model = AutoModelForCausalLM.from_pretrained(place / "model").eval()
    plan = {site: [Full(), Window(size=16, sinks=2)] for site in find_sites(model)}
    convert(model, plan)
    export(model, AutoTokenizer.from_pretrained(place / "model"), plan, place / "exported", "a card", None)
    return place / "exported"


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """A finished run; tests that change it take `finished`, a copy."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", str(place / "recipe.yaml"), "--out", str(place / "whole"), "--quiet"])
    assert stopped.value.code == 0
    return place / "whole"


@pytest.fixture
def finished(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))
