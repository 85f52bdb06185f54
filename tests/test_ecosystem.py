"""Other people's libraries on exported checkpoints: the parts of `make ecosystem`, on tiny random models.

What `make setup` does not install is left out unless it is there; `make ecosystem` installs it, and runs all of them on
real models.
"""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from commands import save_tokenizer
from models import tiny
from transformers import AutoModel, AutoTokenizer

from attnconvert.convert.export import export
from attnconvert.convert.hosts.models import find_sites
from attnconvert.convert.hosts.surgery import convert
from attnconvert.kernels.spec import Full, Hybrid, Linear, Window

FOLDER = Path(__file__).parents[1] / "docs" / "benchmarks"
sys.path.insert(0, str(FOLDER))  # they are scripts, which import each other by name

import ecosystem  # noqa: E402
import ecosystem_parts as parts  # noqa: E402

KINDS = [Full(), Window(size=8, sinks=2), Linear(), Hybrid(window=8, sinks=2)]
LM_EVAL = pytest.param("lm_eval", marks=pytest.mark.slow)  # two processes that import half of the world
FURTHER_MODULES = ("trl", "sentence_transformers", "torchao", "bitsandbytes", "lm_eval", "transformers")
FURTHER = ("trl", "sentence_transformers", "torchao", "bitsandbytes", LM_EVAL)


def saved(model, folder, kinds):
    """A teacher's folder and the converted checkpoint beside it."""
    model.save_pretrained(folder / "teacher")
    save_tokenizer(folder / "teacher", 99)
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    plan = {s: [kinds[(s.layer + i) % len(kinds)] for i in range(s.kv_heads)] for s in find_sites(model)}
    convert(model, plan)
    export(model, tokenizer, plan, folder / "converted", "card", None)
    return folder / "converted", folder / "teacher"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny Llama and a tiny BERT that pools, converted, with what they were made of."""
    place = tmp_path_factory.mktemp("ecosystem")
    decoder = saved(tiny("llama", pad_token_id=0), place / "decoder", KINDS)
    encoder = saved(tiny("bert", auto=AutoModel), place / "encoder", [Window(size=8, sinks=1)])
    for folder in encoder:
        names = [("", "Transformer"), ("1_Pooling", "Pooling")]
        (folder / "1_Pooling").mkdir()
        pooling = {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        modules = [
            {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for n, (path, kind) in enumerate(names)
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
    return {
        "decoder": decoder[0],
        "decoder_teacher": decoder[1],
        "encoder": encoder[0],
        "encoder_teacher": encoder[1],
    }


@pytest.fixture
def folders(exported, tmp_path):
    return parts.Folders(**exported, scratch=tmp_path)


def test_lora_is_trained_saved_merged_and_loaded_again_on_a_converted_model(folders):
    found = parts.run("peft", folders)
    assert found["loss"][1] < found["loss"][0]
    assert found["sites"] == 3


def test_the_prefill_is_exported_with_a_length_that_may_vary(folders):
    found = parts.run("torch_export", folders)
    assert set(found["errors"]) == {"17", "64", "150"}


def test_weights_are_safetensors_with_the_metadata_that_loaders_ask_for(folders):
    found = parts.run("safetensors", folders)
    assert found["decoder"]["metadata"] == {"format": "pt"}
    assert min(found["decoder"]["tensors"], found["encoder"]["tensors"]) > 20


@pytest.mark.parametrize("name", FURTHER)
def test_a_further_neighbour_takes_a_converted_checkpoint(folders, name):
    module = parts.PARTS[name][0].replace("-", "_")
    if find_spec(module) is None:
        pytest.skip(f"{module} is not installed: make ecosystem installs it")
    assert parts.run(name, folders)["version"]


def test_a_checkpoint_that_lost_its_operators_is_noticed(folders):
    """The parts can fail: on the dense teacher in the converted model's place."""
    dense = parts.Folders(**{**vars(folders), "encoder": folders.encoder_teacher, "scratch": folders.scratch / "x"})
    if find_spec("sentence_transformers") is not None:
        with pytest.raises(RuntimeError, match="without operators"):
            parts.run("sentence_transformers", dense)
    broken = Path(shutil.copytree(folders.decoder, folders.scratch / "broken"))
    torch.save({}, broken / "pytorch_model.bin")
    with pytest.raises(RuntimeError, match="pytorch_model.bin"):
        parts.run("safetensors", parts.Folders(**{**vars(folders), "decoder": broken}))


def test_the_page_tells_every_part_of_the_results():
    results = ecosystem.RESULTS
    if not results.exists():
        pytest.skip("nothing was measured yet")
    known = json.loads(results.read_text())
    assert set(parts.PARTS) <= set(known["parts"])
    page = ecosystem.page(known)
    assert page == ecosystem.PAGE.read_text()
    for name, part in known["parts"].items():
        assert part["version"] in page, name


def test_scripts_of_the_ecosystem_import_nothing_that_setup_lacks():
    code = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import ecosystem, ecosystem_tasks, ecosystem_vllm\n"
    code += f"print(sorted({{*sys.modules}} & {set(FURTHER_MODULES)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
