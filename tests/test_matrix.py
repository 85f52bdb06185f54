"""The matrix: every architecture with a window, a linear and a hybrid plan converts, is exact, is exported and loads.

One clean process without attnconvert loads all of the exported folders, so that its start is paid once.
"""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from architectures import MARKS, PAGE, PLANS, REFUSED, ROWS, plan_of, reason, table
from safetensors.torch import load_file, save_file

from attnconvert.convert.export import export
from attnconvert.convert.export_runtime import load_elsewhere, relative_error
from attnconvert.convert.hosts.architectures import use_attention
from attnconvert.convert.hosts.inputs import example
from attnconvert.convert.hosts.models import find_sites, is_encoder
from attnconvert.convert.hosts.registration import loader
from attnconvert.convert.hosts.sites import all_full, refusal
from attnconvert.convert.hosts.surgery import convert, converted
from attnconvert.convert.probing import ask, probe_inputs, probe_script
from attnconvert.kernels.spec import Full

GREEDY = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": None, "pad_token_id": 0}
RESULTS = {"output_logits": True, "return_dict_in_generate": True}
CASES = [f"{title}: {operator}" for title in ROWS for operator in PLANS]


def built(case):
    """A model with its plan at work, whose learned parts are no longer what they begin as; None where none is taken."""
    title, operator = case.rsplit(": ", 1)
    model = ROWS[title].model()
    sites = find_sites(model)
    plan = plan_of(sites, PLANS[operator])
    if all(spec == Full() for groups in plan.values() for spec in groups):
        return model, None
    conversion = convert(model, plan)
    for p in conversion.learned().values():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    if model.can_generate():  # Whisper's begins with a list of tokens to leave out, of its own vocabulary
        model.generation_config.suppress_tokens = model.generation_config.begin_suppress_tokens = None
    return model, plan


@torch.no_grad()
@pytest.mark.parametrize("title", ROWS)
def test_all_heads_full_is_the_untouched_model(title):
    model = ROWS[title].model()
    sites = find_sites(model, tolerance=1e-6)
    inputs = example(model, 40, 23, rows=2)
    masks = {"attention_mask": torch.ones_like(inputs["input_ids"])} if "input_ids" in inputs else {}
    for mask in masks.values():
        mask[0, -9:] = 0
    use_attention(model, "eager")  # the definition, soft caps and sinks included
    want = outputs(model, inputs, masks)
    with converted(model, all_full(sites)):
        got = outputs(model, inputs, masks)
    for one, other in zip(want, got, strict=True):
        assert (one - other).abs().max() <= 3e-6 * max(1.0, one.abs().max().item())


def outputs(model, inputs, masks):
    """Of a batch, and where it reads text of one whose first row is padded behind: what stands at real tokens."""
    found = [model(**inputs)[0]]
    if masks:
        padded = model(**inputs, **masks)[0]
        by_token = padded.ndim == 3 and not model.config.is_encoder_decoder
        found.append(padded[masks["attention_mask"].bool()] if by_token else padded)
    return found


# --- every way to run it ----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_it_is_exact_in_every_way_to_run_it(case):
    model, plan = built(case)
    if plan is None:
        pytest.skip(f"no site of it takes a {case.rsplit(': ')[-1]}")
    inputs = example(model, 24, 9, rows=2)
    if is_encoder(model):
        a_row_sees_neither_its_padding_nor_the_others(model, inputs)
    elif model.config.is_encoder_decoder:
        a_decoder_writes_with_a_cache_what_it_writes_without(model, inputs)
    else:
        a_prompt_is_continued_alike_cached_uncached_and_left_padded(model, inputs["input_ids"])


def close(one, other):
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def same(one, other):
    """The same tokens, by the same logits."""
    assert torch.equal(one.sequences, other.sequences)
    close(torch.stack(one.logits), torch.stack(other.logits))


def a_prompt_is_continued_alike_cached_uncached_and_left_padded(model, ids):
    short, long = ids[:1, :17], ids[1:]
    alone = [model.generate(prompt, **GREEDY, **RESULTS) for prompt in (short, long)]
    for prompt, found in zip((short, long), alone, strict=True):
        same(found, model.generate(prompt, use_cache=False, **GREEDY, **RESULTS))
        whole = model(found.sequences, use_cache=False).logits[:, prompt.shape[1] - 1 : -1]
        close(torch.stack(found.logits, 1), whole)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    batch = torch.cat([torch.cat([torch.zeros_like(short[:, :7]), short], 1), long])
    together = model.generate(batch, attention_mask=mask, **GREEDY, **RESULTS)
    for row, found in enumerate(alone):
        assert torch.equal(together.sequences[row, -10:], found.sequences[0, -10:])
        close(torch.stack(together.logits, 1)[row], torch.stack(found.logits, 1)[0])


def a_decoder_writes_with_a_cache_what_it_writes_without(model, inputs):
    ids = inputs.pop("decoder_input_ids")
    padded, single = {**inputs}, {key: x[:1] for key, x in inputs.items()}
    if "input_ids" in inputs:
        padded["attention_mask"] = torch.ones_like(inputs["input_ids"])
        padded["attention_mask"][0, -6:] = 0
        single["input_ids"] = single["input_ids"][:, :-6]
    together = model.generate(**padded, **GREEDY, **RESULTS)
    same(together, model.generate(**padded, use_cache=False, **GREEDY, **RESULTS))
    alone = model.generate(**single, **GREEDY, **RESULTS)
    assert torch.equal(together.sequences[:1], alone.sequences)
    close(torch.stack(together.logits)[:, :1], torch.stack(alone.logits))
    whole = model(**padded, decoder_input_ids=ids, use_cache=False).logits
    cache, parts = None, []
    for piece in ids.split([4, 1, 1, 3], 1):
        out = model(**padded, decoder_input_ids=piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    close(torch.cat(parts, 1), whole)


def a_row_sees_neither_its_padding_nor_the_others(model, inputs):
    both = model(**inputs)
    names = [name for name in ("logits", "last_hidden_state", "image_embeds", "text_embeds") if name in both]
    for row in (0, 1):
        alone = model(**{key: x[row : row + 1] for key, x in inputs.items()})
        for name in names:
            close(both[name][row], alone[name][0])
    if "input_ids" in inputs:
        mask = torch.ones_like(inputs["input_ids"])
        mask[0, -6:] = 0
        padded = model(**inputs, attention_mask=mask)
        short = {key: x[:1, :-6] if key == "input_ids" else x[:1] for key, x in inputs.items()}
        alone = model(**short)
        for name in set(names) & {"logits", "last_hidden_state"}:
            close(padded[name][:1, :-6], alone[name])
            close(padded[name][1], both[name][1])


# --- export -----------------------------------------------------------------------------------------------------------


RELOAD = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
where = sys.argv[2]
sys.modules["attnconvert"] = None  # as if it were not installed
import transformers
from transformers import GenerationConfig
transformers.logging.set_verbosity_error()
for name, (auto, script) in json.load(open(where + "/asked.json")).items():
    model = getattr(transformers, auto).from_pretrained(f"{where}/{name}", trust_remote_code=True).eval()
    names = {"torch": torch, "GenerationConfig": GenerationConfig, "model": model}
    names["inputs"] = load_file(f"{where}/{name}.inputs.safetensors")
    exec(script, names)
    results = {key: value.contiguous() for key, value in names["results"].items()}
    save_file(results, f"{where}/{name}.found.safetensors")
print("{}")
"""
RELOADS = "test_the_exported_folder_gives_the_same_in_a_clean_process"


@pytest.fixture(scope="module")
def reloaded(request, tmp_path_factory):
    """Case → what the student gave here, what its folder gave in a clean process, the folder; of the cases that run."""
    where = tmp_path_factory.mktemp("matrix")
    asked, expected, names = {}, {}, {}
    for item in request.session.items:
        if getattr(item, "originalname", "") != RELOADS:
            continue
        case = item.callspec.params["case"]
        model, plan = built(case)
        if plan is None:
            continue
        name = names[case] = re.sub(r"[^a-z0-9]+", "_", case.lower())
        export(model, None, plan, where / name, "card", None)
        inputs = probe_inputs(model, 8)
        save_file({key: x.contiguous() for key, x in inputs.items()}, where / f"{name}.inputs.safetensors")
        expected[case] = ask(model, inputs)
        asked[name] = (loader(type(model).__name__), probe_script(model))
    (where / "asked.json").write_text(json.dumps(asked))
    load_elsewhere(RELOAD, where, str(where), "remote", "cpu")
    yield {c: (expected[c], load_file(where / f"{n}.found.safetensors"), where / n) for c, n in names.items()}
    shutil.rmtree(where)


@pytest.mark.parametrize("case", CASES)
def test_the_exported_folder_gives_the_same_in_a_clean_process(reloaded, case):
    if case not in reloaded:
        pytest.skip(f"no site of it takes a {case.rsplit(': ')[-1]}")
    expected, found, folder = reloaded[case]
    assert set(found) == set(expected) == {"uncached", "continued", "generated"}
    assert torch.equal(found["generated"], expected["generated"])
    for key in ("uncached", "continued"):
        assert torch.isfinite(expected[key]).all()
        assert relative_error(found[key], expected[key]) <= 8 * torch.finfo(torch.float32).eps
    assert json.loads((folder / "config.json").read_text())["model_type"] == "attnconvert"


# --- what does not apply ----------------------------------------------------------------------------------------------


def test_what_no_site_of_an_architecture_takes_has_one_reason():
    untaken = []
    for title, row in ROWS.items():
        sites = find_sites(row.model())
        for operator, spec in PLANS.items():
            reasons = [refusal(site, spec) for site in sites]
            if None not in reasons:
                untaken.append((title, operator))
                assert all("sliding window of 12 tokens of its own" in reason for reason in reasons)
    assert untaken == [("Mistral, a window in all layers", "linear"), ("Mistral, a window in all layers", "hybrid")]


def test_the_page_of_architectures_is_what_the_models_say():
    """Those that are refused are in it, each with what it is refused with."""
    found = re.search(MARKS, PAGE.read_text(encoding="utf-8"), flags=re.S)
    assert found, "docs/architectures.md has lost its marks"
    assert found[2].strip() == table(), "out of date: run `python tests/architectures.py`"
    assert all(reason(row) in found[2] for row in REFUSED.values())
