"""Encoders: rows read in both directions, nothing is cached, and damage is told by which texts are near."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from commands import RECIPE, WORDS, attnconvert, place, save_tokenizer  # noqa: F401 – fixtures
from models import ENCODERS, tiny
from transformers import AutoModel, AutoModelForMaskedLM

from attnconvert import cli
from attnconvert.convert.damage import replaced, single_damage
from attnconvert.convert.documents import Document
from attnconvert.convert.errors import UsageError
from attnconvert.convert.hosts.models import (
    find_sites,
    has_head,
    is_encoder,
    pooled,
    positions_of,
    require_positions,
)
from attnconvert.convert.hosts.sites import Unsupported, all_full
from attnconvert.convert.hosts.surgery import convert
from attnconvert.convert.passages import Passages, embed, passages
from attnconvert.convert.progress import silent
from attnconvert.convert.text import frame
from attnconvert.kernels.spec import Full, Linear, Retention, Window, label

LENGTH = 48


def ids_of(rows=2, length=LENGTH, seed=0):
    return torch.randint(2, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def cases_of(model, cases=3):
    return Passages(ids_of(cases), embed(model, ids_of(6, seed=1)), embed(model, ids_of(cases, 9, seed=2)))


@torch.no_grad()
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForMaskedLM])
@pytest.mark.parametrize("name", ENCODERS)
def test_all_heads_full_is_the_untouched_encoder(name, auto):
    model, ids = tiny(name, auto=auto), ids_of()
    sites = find_sites(model, tolerance=1e-6)
    assert len(sites) == (1 if name == "albert" else 3)
    assert not any(site.causal for site in sites)
    assert is_encoder(model)
    assert has_head(model) == (auto is AutoModelForMaskedLM)
    mask = torch.ones_like(ids)
    mask[0, -11:] = 0
    model.set_attn_implementation("eager")
    want = [model(ids)[0], model(ids, attention_mask=mask)[0]]
    conversion = convert(model, all_full(sites))
    got = [model(ids)[0], model(ids, attention_mask=mask)[0]]
    assert (got[0] - want[0]).abs().max() <= 3e-6
    assert (got[1] - want[1])[mask.bool()].abs().max() <= 3e-6
    conversion.remove()
    assert torch.equal(model(ids)[0], want[0])


@torch.no_grad()
@pytest.mark.parametrize("name", ENCODERS)
def test_a_window_reads_as_far_forwards_as_backwards(name):
    """The same as a mask of the stock model that allows |i − j| < 5 and the first token."""
    model, ids = tiny(name, auto=AutoModel), ids_of()
    sites = find_sites(model)
    at = torch.arange(LENGTH)
    allowed = ((at[:, None] - at).abs() < 5) | (at == 0)
    model.set_attn_implementation("eager")
    bias = torch.zeros(2, 1, LENGTH, LENGTH).masked_fill(~allowed, -1e9)  # eager attention adds it
    want = model(ids, attention_mask=bias)[0]
    far = model(ids)[0]
    conversion = convert(model, {s: [Window(size=5, sinks=1)] * s.kv_heads for s in sites})
    got = model(ids)[0]
    conversion.remove()
    assert (got - want).abs().max() <= 1e-5
    assert (far - want).abs().max() > 1e-2


def test_an_encoder_takes_no_operator_that_needs_an_order():
    model = tiny("bert", auto=AutoModel)
    sites = find_sites(model)
    with pytest.raises(Unsupported, match="both directions"):
        convert(model, {s: [Retention()] * s.kv_heads for s in sites})
    convert(model, {s: [Linear()] * s.kv_heads for s in sites}).remove()


@torch.no_grad()
def test_passages_of_the_teacher_lose_nothing_and_broken_attention_loses_much():
    model = tiny("bert", auto=AutoModel)
    sites, cases = find_sites(model), cases_of(model)
    want = [cases.answers(model, n) for n in range(3)]
    assert want[0].shape == (2, 7)
    torch.testing.assert_close(want[0].exp().sum(-1), torch.ones(2))
    assert want[0][0, -1] < -1e3, "a passage is not compared with itself"
    narrow = {(n, g): Window(size=1, sinks=0) for n in range(3) for g in range(4)}
    with replaced(model, sites, narrow, {}):
        got = [cases.answers(model, n) for n in range(3)]
    assert max((a - b).abs()[:, :-1].max() for a, b in zip(want, got, strict=True)) > 1e-3
    assert all(torch.equal(a, cases.answers(model, n)) for n, a in enumerate(want))


def test_the_losses_of_a_case_have_gradients_and_name_the_passage():
    model = tiny("bert", auto=AutoModel)
    with torch.no_grad():
        cases = cases_of(model)
    for name in ("text", "needle"):
        loss = cases.loss(model, 0, name)
        assert torch.autograd.grad(loss, next(model.parameters()), retain_graph=True)[0].any()
    with torch.no_grad():
        row = cases.answers(model, 0)[-1]
    assert cases.loss(model, 0, "needle").item() == pytest.approx(-row[cases.target(0)].item(), abs=1e-5)


@torch.no_grad()
def test_damage_of_an_encoder_is_that_of_running_it_whole(tmp_path):
    model = tiny("bert", auto=AutoModel)
    sites, cases, spec = find_sites(model), cases_of(model, 2), Window(size=4, sinks=1)
    found = single_damage(model, sites, cases, {label(spec): spec}, {}, tmp_path, silent)["damage"][label(spec)]
    for n, g in ((0, 0), (2, 3)):
        rises = []
        for case in range(2):
            want = cases.answers(model, case)
            with replaced(model, sites, {(n, g): spec}, {}):
                got = cases.answers(model, case)
            kl = (want.exp() * (want - got)).sum(-1).mean()
            rises.append((kl.item(), (want - got)[-1, -1].item()))
        kl, needle = (sum(x) / 2 for x in zip(*rises, strict=True))
        assert found["kl"][n][g] == pytest.approx(kl, rel=1e-3, abs=1e-7)
        assert found["needle"][n][g] == pytest.approx(needle, rel=1e-3, abs=1e-6)
        apart = abs(rises[0][1] - rises[1][1]) / 2
        assert found["needle_error"][n][g] == pytest.approx(apart, rel=1e-3, abs=1e-6)


def frame_texts(folder):
    """The tokenizer puts <s> before and </s> after every text, as BERT's does with its own."""
    path = folder / "tokenizer.json"
    given = json.loads(path.read_text())
    tokens = {token: given["model"]["vocab"][token] for token in ("<s>", "</s>")}
    pieces = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    given["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [*pieces, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
        "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {t: {"id": t, "ids": [n], "tokens": [t]} for t, n in tokens.items()},
    }
    path.write_text(json.dumps(given))


def test_passages_hold_their_facts_between_the_frames(place):  # noqa: F811
    folder = place / "framed"
    folder.mkdir()
    save_tokenizer(folder, 99)
    frame_texts(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = tiny("bert", auto=AutoModel)
    documents = [Document(name="a", text=(place / "heldout.txt").read_text())]
    cases = passages(model, tokenizer, documents, "passkey", 4, 48, 0, bank=5)
    start, end = frame(tokenizer)
    assert (start, end) == ([tokenizer.bos_token_id], [tokenizer.eos_token_id])
    assert cases.ids.shape == (4, 48)
    assert cases.bank.shape == (5, 64)
    places = []
    for row in cases.ids.tolist():
        assert row[:1] == start
        assert row[-1:] == end
        digits = [n for n, token in enumerate(row) if tokenizer.convert_ids_to_tokens(token).isdigit()]
        assert len(digits) == 10, "the number of the fact, twice; the text has none"
        places.append(digits[0])
    assert places == sorted(places), "the facts stand ever deeper"
    assert len(set(places)) == 4
    with pytest.raises(UsageError, match="use at least"):
        passages(model, tokenizer, documents, "passkey", 1, 20, 0, bank=5)


def test_an_encoder_is_pooled_as_its_folder_says(tmp_path):
    hidden = torch.arange(12.0).view(1, 3, 4)
    model = tiny("bert", auto=AutoModel)
    assert torch.equal(pooled(model, hidden), hidden.mean(1))
    for name, want in (("cls", hidden[:, 0]), ("mean", hidden.mean(1)), ("max", None)):
        folder = tmp_path / name / "1_Pooling"
        folder.mkdir(parents=True)
        mode = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}[name]
        (folder / "config.json").write_text(json.dumps({"word_embedding_dimension": 4, f"pooling_mode_{mode}": True}))
        model.config._name_or_path = str(tmp_path / name)
        if want is None:
            with pytest.raises(Unsupported, match="max_tokens"):
                pooled(model, hidden)
        else:
            assert torch.equal(pooled(model, hidden), want)


def test_a_text_longer_than_the_learned_positions_is_refused():
    assert positions_of(tiny("bert", auto=AutoModel)) == 256
    assert positions_of(tiny("roberta", auto=AutoModel)) == 255, "it counts from behind its padding"
    assert positions_of(tiny("llama")) is None
    with pytest.raises(UsageError, match="positions for 256 tokens, 300"):
        require_positions(tiny("bert", auto=AutoModel), 300)


def test_a_model_that_generates_and_reads_both_ways_is_refused():
    with pytest.raises(Unsupported, match="reads in both directions and generates"):
        find_sites(tiny("bert"))


@pytest.fixture(scope="module", params=["AutoModel", pytest.param("AutoModelForMaskedLM", marks=pytest.mark.slow)])
def encoder(request, place):  # noqa: F811 – the fixture
    """A folder with a tiny random BERT, bare or with its head, and a recipe for it."""
    folder = place / f"bert-{request.param}"
    tiny("bert", auto=getattr(transformers, request.param)).save_pretrained(folder)
    save_tokenizer(folder, 99)
    frame_texts(folder)
    (folder / "modules.json").write_text("[]")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    recipe = RECIPE.replace("folder: model", f"folder: {folder.name}").replace("tiny-window", "tiny-encoder")
    for given, wanted in (
        (", template: passkey}", ", template: passkey}\n  gates: [duo, linvideo]\n  gate_steps: 3"),
        ("length: 96", "length: 48"),
        ("gates: {converted: 0.5, kv_ratio: {128: 0.9}}", "gates: {converted: 0.5, cosine: {64: 0.5}}"),
        (", prompt_tokens: 8", ""),
        ("decode_tokens: 2", "decode_tokens: 0"),
    ):
        assert given in recipe
        recipe = recipe.replace(given, wanted)
    (place / f"{request.param}.yaml").write_text(recipe.replace("length: 40, batch", "length: 44, batch"))
    return place, place / f"{request.param}.yaml"


@pytest.fixture(scope="module")
def converted(encoder):
    """A finished run."""
    place, recipe = encoder  # noqa: F811
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", str(recipe), "--out", str(place / f"run-{recipe.stem}"), "--quiet"])
    assert stopped.value.code == 0
    return place / f"run-{recipe.stem}"


def test_an_encoder_goes_all_the_way_and_loads_in_clean_processes(converted):
    found = json.loads((converted / "evaluation" / "evaluation.json").read_text())
    student = found["arms"]["student"]
    assert 0.5 < student["quality"]["64"]["cosine"] < 1
    assert ("kl" in student["quality"]["64"]) == ("MaskedLM" in converted.name)
    assert "perplexity" not in student["quality"]["64"]
    assert student["kv_bytes"] == {}
    assert student["flops_ratio"]["64"] < 1
    assert set(found["speed"]["128"]["student"]) == {"prefill_s"}
    assert all(gate["passed"] for gate in found["gates"])
    verified = json.loads((converted / "manifest.json").read_text())["metrics"]["export"]
    assert set(verified) == {"remote", "installed"}
    config = json.loads((converted / "export" / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", converted.name.removeprefix("run-")}
    assert (converted / "export" / "1_Pooling" / "config.json").is_file()
    card = (converted / "export" / "README.md").read_text()
    assert "generate(" not in card
    assert "cosine @ 64" in card
    report = (converted / "report.html").read_text()
    assert "Cosine to the teacher" in report
    assert "facts found first" in report


def test_a_converted_encoder_is_evaluated_and_timed_from_its_checkpoint(attnconvert, converted):  # noqa: F811
    done = attnconvert("evaluate", converted, "--json")
    assert done.code == 0, done.err
    first = json.loads((converted / "evaluation" / "evaluation.json").read_text())["arms"]["student"]
    assert done.document["arms"]["student"]["quality"]["64"]["cosine"] == pytest.approx(
        first["quality"]["64"]["cosine"], abs=1e-4
    )
    done = attnconvert("bench", converted, "--lengths", "64", "--json")
    assert done.code == 0, done.err
    assert "kv_ratio" not in done.document["speed"]["64"]
    done = attnconvert("inspect", converted)
    assert done.code == 0
    assert "attention FLOPs" in done.out


def test_budgets_of_an_encoder_are_flops_and_times(attnconvert, converted, tmp_path):  # noqa: F811
    run = shutil.copytree(converted, tmp_path / "run")
    profile = json.loads((run / "profile" / "profile.json").read_text())
    assert not any(site["causal"] for site in profile["sites"])
    assert set(profile["gates"]) == {"duo", "linvideo"}
    assert all(x is not None and x > -1e-6 for row in profile["damage"]["window-16-2"]["kl"] for x in row)
    done = attnconvert("select", run, "--flops", "80%@128", "--set", "select.rounds=1", "--json")
    assert done.code == 0, done.err
    assert "window-16-2" in (run / "plan.yaml").read_text()
    assert "Refinement" in (run / "report.html").read_text()
    done = attnconvert("select", run, "--kv-bytes", "50%@128")
    assert done.code == 2
    assert "no cache" in done.message
    done = attnconvert("select", run, "--prefill-ms", "90%@128")
    assert done.code == 0 or "prefill_ms at 128 tokens binds" in done.message  # windows may not be faster at this size
    timed = json.loads((run / "costs" / "costs.json").read_text())
    assert {row["phase"] for row in timed["rows"]} == {"prefill"}


def test_gates_of_what_is_not_measured_are_refused_before_any_work(attnconvert, encoder):  # noqa: F811
    place, recipe = encoder  # noqa: F811
    done = attnconvert("run", recipe, "--out", place / f"run-gate-{recipe.stem}", "--set", "gates.kv_ratio={128: 0.5}")
    assert done.code == 2
    assert "gates.kv_ratio" in done.message


def test_a_model_that_is_neither_is_refused_by_name(attnconvert, encoder):  # noqa: F811
    place, recipe = encoder  # noqa: F811
    folder = Path(shutil.copytree(place / f"bert-{recipe.stem}", place / f"boxes-{recipe.stem}"))
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["DetrForObjectDetection"]}
    (folder / "config.json").write_text(json.dumps(config))
    done = attnconvert("inspect", folder)
    assert done.code == 2, done.message
    assert "DetrForObjectDetection" in done.message


def test_full_heads_of_an_encoder_stay_as_they_were():
    model, ids = tiny("bert", auto=AutoModel), ids_of()
    sites = find_sites(model)
    with torch.no_grad():
        want = model(ids)[0]
        plan = {s: [Full()] * s.kv_heads for s in sites}
        plan[sites[1]] = [Window(size=LENGTH, sinks=0)] * 4  # which covers everything
        conversion = convert(model, plan)
        assert (model(ids)[0] - want).abs().max() <= 1e-5
        conversion.remove()
