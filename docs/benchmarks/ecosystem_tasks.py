"""Tasks of lm-evaluation-harness that need no hub: two of our own, and standard ones on a few documents of ours.

The standard tasks keep the definitions that the harness ships (prompt, target, metrics); only their data is local.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

FILLER = (
    "The market opened early and the streets were full. A baker carried bread across the square. Two men repaired the "
    "roof of the station. Rain had been forecast, but the sky stayed clear all day. Somebody played the accordion. "
)
FACTS = {
    "the pass key": "71432", "the locker": "58201", "the red gate": "90417", "room nine": "33860",
    "the archive": "62795", "the boat house": "14078", "the safe": "87356", "the north tower": "20649",
}  # fmt: skip
LAMBADA = (
    "She had lost her keys again. She searched her bag, her coat and the drawer, and could not find her keys",
    "He ordered a coffee and sat down by the window. When the waiter came he brought the coffee",
    "The dog ran after the ball, and every time Tom threw it, the dog came back with the ball",
    "Anna wanted to see the sea. They drove for six hours, and when they came over the last hill they saw the sea",
    "The king had one daughter. When the king grew old, he called for his daughter",
    "They built the bridge in two years. On the first day a thousand people walked across the bridge",
    "My brother plays the piano. Every evening after dinner we sit and listen to him play the piano",
    "It began to snow in the night. In the morning the whole garden was covered with snow",
    "The doctor looked at the letter, read it twice, and then slowly folded the letter",
    "We had only one candle left. When the lights went out, Mary lit the candle",
    "The train was late. We stood on the platform for an hour and waited for the train",
    "He opened the old book. The first page was missing, so he began on the second page",
)
ARC = (
    ("Which of these is a source of light?", ("the Sun", "the Moon", "a mirror", "a window"), 0),
    ("What do plants need to make their food?", ("darkness", "sunlight", "sand", "noise"), 1),
    ("Water turns into ice when it is", ("heated", "stirred", "frozen", "poured"), 2),
    ("Which animal can fly?", ("a snake", "a horse", "a fish", "an eagle"), 3),
    ("Which organ pumps blood through the body?", ("the heart", "the lungs", "the skin", "the stomach"), 0),
    ("What force pulls objects towards the Earth?", ("magnetism", "gravity", "friction", "light"), 1),
    ("Which of these is a metal?", ("wood", "glass", "iron", "paper"), 2),
    ("How many legs does an insect have?", ("two", "four", "eight", "six"), 3),
    ("Which planet do we live on?", ("Earth", "Mars", "Venus", "Jupiter"), 0),
    ("What do bees collect from flowers?", ("stones", "nectar", "leaves", "water only"), 1),
    ("Which season is the coldest?", ("summer", "spring", "winter", "autumn"), 2),
    ("What do we breathe in to live?", ("helium", "smoke", "steam", "oxygen"), 3),
)
STANDARD = {"lambada_openai": "lambada/lambada_openai.yaml", "arc_easy": "arc/arc_easy.yaml"}


def write(folder: Path) -> list[str]:
    """The tasks and their data, as files for --include_path; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {
        "local_passkey": (_passkey(), _passkeys()),
        "local_text": (_text(), [{"page": " ".join(LAMBADA[n : n + 4]) + "."} for n in (0, 4, 8)]),
        "local_lambada_openai": (_standard("lambada_openai"), [{"text": text} for text in LAMBADA]),
        "local_arc_easy": (_standard("arc_easy"), _arc()),
    }
    for name, (task, documents) in made.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(one) + "\n" for one in documents))
        splits = {key: "test" for key in ("test_split", "validation_split", "training_split") if task.get(key)}
        where = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {"test": str(data)}}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**task, "task": name, **where, **splits}))
    return list(made)


def _passkey() -> dict[str, Any]:
    """A number in a text of some 200 tokens, generated greedily: batches of this task are padded on the left."""
    return {
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n", "."], "do_sample": False, "max_gen_toks": 10},
        "filter_list": [
            {"name": "digits", "filter": [{"function": "regex", "regex_pattern": r"(\d+)"}, {"function": "take_first"}]}
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


def _passkeys() -> list[dict[str, str]]:
    found = []
    for n, (what, answer) in enumerate(FACTS.items()):
        before, after = FILLER * (1 + n % 3), FILLER * (3 - n % 3)
        fact = f"Remember that the code of {what} is {answer}. "
        found.append({"text": f"{before}{fact}{after}\nThe code of {what} is", "answer": answer})
    return found


def _text() -> dict[str, Any]:
    return {
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    }


def _arc() -> list[dict[str, Any]]:
    letters = ["A", "B", "C", "D"]
    return [
        {"question": asked, "choices": {"text": list(given), "label": letters}, "answerKey": letters[right]}
        for asked, given, right in ARC
    ]


def _standard(name: str) -> dict[str, Any]:
    """The definition that the harness ships, without its tags."""
    spec = find_spec("lm_eval")
    assert spec is not None
    assert spec.origin is not None
    task: dict[str, Any] = yaml.safe_load((Path(spec.origin).parent / "tasks" / STANDARD[name]).read_text())
    return {key: value for key, value in task.items() if key != "tag"}
