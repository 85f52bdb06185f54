"""An exported folder loads in clean processes with and without attnconvert, and never as the dense model by mistake."""

import json
import os
import subprocess
import sys

import pytest
import torch
from models import DECODERS, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from attnconvert.convert.export import export, verify
from attnconvert.convert.export_runtime import VerificationFailed, flatten_imports, kernels
from attnconvert.convert.files import sha256_file
from attnconvert.convert.hosts.models import find_sites
from attnconvert.convert.hosts.sites import Unsupported, plan_block, read_plan_block
from attnconvert.convert.hosts.surgery import convert
from attnconvert.kernels.operators import FILES
from attnconvert.kernels.spec import Full, Hybrid, Linear, Window

KINDS = [Full(), Window(size=8, sinks=2), Linear(), Hybrid(window=8, sinks=2)]


def exported(name, folder, dtype=None):
    model = tiny(name)
    plan = {s: [KINDS[(s.layer + i) % (2 if s.limit else 4)] for i in range(s.kv_heads)] for s in find_sites(model)}
    convert(model, plan)
    for key, p in model.named_parameters():
        if ".attnconvert." in key:
            p.data += 0.1 * torch.randn_like(p)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(99)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0")
    export(model, tokenizer, plan, folder, "card", dtype)
    return model, plan


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3_text", marks=pytest.mark.slow)])
def test_it_loads_in_clean_processes_by_remote_code_and_by_import(tmp_path, name):
    model, _ = exported(name, tmp_path)
    found = verify(model, tmp_path)
    assert found["remote"]["logits_error"] == found["installed"]["logits_error"] == 0.0
    assert found["remote"]["attention"] == "attnconvert"
    assert found["remote"]["class"].startswith("Converted")


@pytest.mark.parametrize("name", [n for n in DECODERS if n not in ("llama", "gemma3_text")])
def test_every_architecture_loads_again(tmp_path, name):
    model, _ = exported(name, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(2, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert set(again.state_dict()) == set(model.state_dict())
    assert AutoTokenizer.from_pretrained(tmp_path)("5 6")["input_ids"] == [5, 6]


def test_without_trust_and_without_attnconvert_it_refuses_to_load(tmp_path):
    exported("llama", tmp_path)
    code = "import sys; sys.modules['attnconvert'] = None\nfrom transformers import AutoModelForCausalLM\n"
    code += f"AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, trust_remote_code=False)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "trust_remote_code=True" in done.stderr


def test_asking_for_another_attention_does_not_turn_the_plan_off(tmp_path):
    model, _ = exported("llama", tmp_path)
    ids = torch.arange(2, 40)[None]
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with pytest.warns(UserWarning, match="keeps its own attention"):
        again.set_attn_implementation("sdpa")
    assert torch.equal(again(ids).logits, model(ids).logits)
    asked = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    assert torch.equal(asked(ids).logits, model(ids).logits)


def test_weights_keep_their_names_and_learned_parameters_their_precision(tmp_path):
    exported("llama", tmp_path, dtype="bfloat16")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    stock = set(tiny("llama").state_dict())
    added = {k: v for k, v in again.state_dict().items() if k not in stock}
    assert added
    assert all(".self_attn.attnconvert." in k and v.dtype == torch.float32 for k, v in added.items())
    assert all(v.dtype == torch.bfloat16 for k, v in again.state_dict().items() if k in stock)


def test_what_is_saved_again_loads_as_it_did(tmp_path):
    model, _ = exported("llama", tmp_path / "one")
    AutoModelForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "two", trust_remote_code=True).eval()
    ids = torch.arange(2, 40)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_what_remote_code_saves_again_loads_elsewhere(tmp_path):
    """As a script does that tunes a checkpoint where attnconvert is not installed, each time with an empty cache."""
    model, _ = exported("llama", tmp_path / "one")
    for n, (source, target) in enumerate((("one", "two"), ("two", "three"))):
        code = "import sys; sys.modules['attnconvert'] = None\nfrom transformers import AutoModelForCausalLM\n"
        code += f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / source)!r}, trust_remote_code=True)\n"
        code += f"model.save_pretrained({str(tmp_path / target)!r})"
        environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / f"modules-{n}"), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
        )
        assert done.returncode == 0, done.stderr
    maps = [json.loads((tmp_path / name / "config.json").read_text())["auto_map"] for name in ("one", "two", "three")]
    assert maps[0] == maps[1] == maps[2]
    code = {p.name for p in (tmp_path / "one").glob("*.py")}
    assert {p.name for p in (tmp_path / "three").glob("*.py")} == code
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "three", trust_remote_code=True).eval()
    ids = torch.arange(2, 40)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_checksums_cover_every_file(tmp_path):
    exported("llama", tmp_path)
    lines = dict(reversed(line.split("  ")) for line in (tmp_path / "SHA256SUMS").read_text().splitlines())
    assert set(lines) == {p.name for p in tmp_path.iterdir()} - {"SHA256SUMS"}
    assert all(sha256_file(tmp_path / name) == digest for name, digest in lines.items())


def test_a_folder_that_gives_other_logits_is_no_success(tmp_path):
    model, _ = exported("llama", tmp_path)
    model.lm_head.weight.data[5] += 1.0
    with pytest.raises(VerificationFailed, match="gives other results"):
        verify(model, tmp_path)
    (tmp_path / "modeling_attnconvert.py").write_text("raise RuntimeError('broken')")
    with pytest.raises(VerificationFailed, match=r"does not load.*broken"):
        verify(model, tmp_path)


def test_the_runtime_is_complete_and_flat():
    operators = {file.__name__.rpartition(".")[2] for file in FILES.values()}
    assert operators | {"backend_cpp", "torch_mixed", "cpp_build", "triton_decode"} <= set(kernels())
    source = (
        "from ...kernels.spec import A\nfrom . import full, window\nfrom .call import B\nfrom ...kernels import ops\n"
    )
    want = "from .attnconvert_spec import A\nfrom . import attnconvert_full as full, attnconvert_window as window\n"
    want += "from .attnconvert_call import B\nfrom . import attnconvert_ops as ops\n"
    assert flatten_imports(source) == want


def test_plan_blocks_round_trip_and_refuse_other_formats():
    _, plan = tiny("llama"), {s: [KINDS[1], KINDS[3]] for s in find_sites(tiny("llama"))}
    block = json.loads(json.dumps(plan_block("LlamaForCausalLM", plan)))
    assert read_plan_block(block) == plan
    with pytest.raises(Unsupported, match="format is 7"):
        read_plan_block({**block, "format": 7})
