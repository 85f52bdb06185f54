"""Models of images and sound, and of an encoder and a decoder: what is special about them, and what the stages say."""

import copy
import pickle

import pytest
import torch
from architectures import ROWS, plan_of
from commands import RECIPE, attnconvert, place, save_tokenizer  # noqa: F401 – fixtures
from transformers import EncoderDecoderCache

from attnconvert.convert.export import export, verify
from attnconvert.convert.hosts.architectures import BY_ITSELF
from attnconvert.convert.hosts.inputs import example
from attnconvert.convert.hosts.models import find_sites
from attnconvert.convert.hosts.sites import Unsupported
from attnconvert.convert.hosts.surgery import convert, converted
from attnconvert.kernels.spec import Full, Linear, Window

GREEDY = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}


@torch.no_grad()
def test_cross_attention_stays_as_it_was():
    """The decoder's sites converted, its cross-attention gives what it gave on the same inputs, padding included."""
    model = ROWS["BART"].model()
    inputs = example(model, 20, 9, rows=2)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, -7:] = 0
    sites = find_sites(model)
    assert not any("encoder_attn" in site.name for site in sites)
    cross = model.model.decoder.layers[0].encoder_attn
    seen = []
    hook = cross.register_forward_hook(
        lambda m, a, k, o: seen.append(({"hidden_states": a[0], **k}, o[0])), with_kwargs=True
    )
    with converted(model, plan_of(sites, Linear())):
        model(**inputs)
    given, got = seen.pop()
    hook.remove()
    bias = torch.zeros(2, 1, 1, 20).masked_fill(~inputs["attention_mask"].bool()[:, None, None], -1e9)
    want = cross(**{**given, "attention_mask": bias})[0]
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    without = cross(**{**given, "attention_mask": None})[0]
    assert (got - without).abs()[0].max() > 1e-4, "the padding of the encoder is seen"


def test_a_self_attention_that_the_plan_leaves_out_is_not_taken_for_cross_attention():
    model = ROWS["BART"].model()
    sites = find_sites(model)
    convert(model, {site: [Full()] * site.kv_heads for site in sites[:-1]})
    with pytest.raises(ValueError, match="has no operators"):  # Unsupported, ours or that of a checkpoint's own code
        model(**example(model, 12, 5))


@torch.no_grad()
def test_the_cache_of_a_decoder_holds_states_and_that_of_the_encoder_keys():
    model = ROWS["BART"].model()
    sites = find_sites(model)
    assert [(site.layer, site.slot, site.causal) for site in sites] == [
        (0, None, False),
        (1, None, False),
        (2, 0, True),
        (3, 1, True),
    ]
    convert(model, plan_of(sites, Window(size=4, sinks=1)))
    cache = model(**example(model, 12, 9), use_cache=True).past_key_values
    assert isinstance(cache, EncoderDecoderCache)
    assert [layer.state_bytes() > 0 for layer in cache.self_attention_cache.layers] == [True, True]
    assert [tuple(layer.keys.shape) for layer in cache.cross_attention_cache.layers] == [(1, 4, 12, 16)] * 2
    assert cache.get_seq_length() == 9


@torch.no_grad()
@pytest.mark.parametrize("title", ["BART", "Whisper"])
def test_beams_of_a_decoder_are_those_without_a_cache(title):
    model = ROWS[title].model()
    convert(model, plan_of(find_sites(model), Window(size=4, sinks=1)))
    model.generation_config.suppress_tokens = model.generation_config.begin_suppress_tokens = None
    inputs = example(model, 12, 5, rows=2)
    del inputs["decoder_input_ids"]
    cached, uncached = (model.generate(**inputs, num_beams=3, use_cache=use, **GREEDY) for use in (True, False))
    assert torch.equal(cached, uncached)


@torch.no_grad()
@pytest.mark.parametrize("title", ["Falcon", "BART"])
def test_a_compiled_model_gives_the_same(title):
    model = ROWS[title].model()
    convert(model, plan_of(find_sites(model), Window(size=4, sinks=1)))
    inputs = example(model, 20, 9, rows=2)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])  # without one transformers looks for packed rows
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got, want = (run(**inputs, use_cache=False).logits for run in (compiled, model))
    torch.testing.assert_close(got, want)


@torch.no_grad()
def test_attention_that_calls_sdpa_by_itself_is_put_back_and_copied():
    model = ROWS["Falcon"].model()
    ids = example(model, 30, 0)["input_ids"]
    before = model(ids, use_cache=False).logits
    attention = model.transformer.h[0].self_attention
    assert type(attention).__name__ in BY_ITSELF
    config = attention.config
    conversion = convert(model, plan_of(find_sites(model), Window(size=4, sinks=1)))
    after = model(ids, use_cache=False).logits
    assert (after - before).abs().max() > 1e-2
    other = copy.deepcopy(model)
    other.transformer.h[0].self_attention.attnconvert.active = False
    assert torch.equal(model(ids, use_cache=False).logits, after), "a copy has operators of its own"
    assert not torch.equal(other(ids, use_cache=False).logits, after)
    with pytest.raises(Unsupported, match="FalconAttention cannot be pickled while it is converted"):
        pickle.dumps(model)
    conversion.remove()
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids, use_cache=False).logits, before)
    assert torch.equal(model(ids, use_cache=False).logits, before)
    assert attention.config is config
    assert "forward" not in attention.__dict__


def test_a_bias_that_comes_later_is_refused_too():
    model = ROWS["Falcon"].model()
    convert(model, plan_of(find_sites(model), Window(size=4, sinks=1)))
    model.transformer.use_alibi = True
    with pytest.raises(Unsupported, match="alibi: a bias that grows with the distance"):
        model(example(model, 8, 0)["input_ids"])


@torch.no_grad()
def test_a_window_of_an_encoder_reads_as_far_as_its_own_does():
    """ModernBERT's own window of |i − j| ≤ 6 with all heads full, by what a token far away changes."""
    model = ROWS["ModernBERT"].model()
    sites = find_sites(model)
    (own,) = [site for site in sites if site.limit]
    assert (own.limit, own.causal) == (7, False)
    attention = model.get_submodule(own.name)
    cos, sin = model.model.rotary_emb(torch.zeros(1, 40, 64), torch.arange(40)[None], own_type(model, own))
    hidden = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(0))
    with converted(model, {site: [Full()] * site.kv_heads for site in sites}):
        first = attention(hidden, position_embeddings=(cos, sin))[0]
        hidden[0, 20] += 1.0
        changed = (attention(hidden, position_embeddings=(cos, sin))[0] - first).abs().amax(-1)[0] > 1e-7
    assert changed.nonzero().flatten().tolist() == list(range(14, 27))


def own_type(model, site):
    return model.config.layer_types[site.layer]


@pytest.mark.parametrize("title", ["ViT", "BART"])
def test_an_exported_folder_is_verified_by_what_its_model_takes(tmp_path, title):
    model = ROWS[title].model()
    plan = plan_of(find_sites(model), Window(size=4, sinks=1))
    convert(model, plan)
    export(model, None, plan, tmp_path, "card", None)
    found = verify(model, tmp_path)
    assert set(found) == {"remote", "installed"}
    assert max(found[way]["logits_error"] for way in found) <= 1e-6
    assert (found["remote"]["tokens"] > 0) == (title == "BART")


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["ViT", "CLIP", "BART", "Whisper"])
def folder(request, place):  # noqa: F811 – the fixture
    """A folder with a model, and a recipe for it."""
    path = place / request.param.lower()
    ROWS[request.param].model().save_pretrained(path)
    if request.param != "ViT":
        save_tokenizer(path, 99)
    recipe = RECIPE.replace("folder: model", f"folder: {path.name}")
    (place / f"{path.name}.yaml").write_text(recipe)
    return path


def test_its_sites_are_shown(attnconvert, folder):  # noqa: F811
    done = attnconvert("inspect", folder, "--json")
    assert done.code == 0, done.err
    assert len(done.document["sites"]) in (2, 4)
    assert all("window" in site["operators"] for site in done.document["sites"])


def test_a_run_says_what_it_has_no_data_for_and_what_to_do(attnconvert, folder):  # noqa: F811
    for command in ("run", "profile"):
        done = attnconvert(
            command, folder.parent / f"{folder.name}.yaml", "--out", folder.parent / f"run-{folder.name}"
        )
        assert done.code == 2, done.err
        assert "measured on texts alone" in done.message
        assert "export MODEL --plan PLAN" in done.message
