"""Surgery on tiny random models of every architecture that is claimed, and the cache that goes with it."""

import copy
import dataclasses

import pytest
import torch
from models import DECODERS, tiny
from transformers import DynamicCache

from attnconvert.convert.evaluation import cache_bytes, costs
from attnconvert.convert.hosts import models as host
from attnconvert.convert.hosts.models import find_sites
from attnconvert.convert.hosts.sites import NAME, Unsupported
from attnconvert.convert.hosts.surgery import convert
from attnconvert.kernels.full import FullState
from attnconvert.kernels.spec import Full, Hybrid, Linear, Span, TopBlocks, Window
from attnconvert.kernels.top_blocks import BlocksState

KINDS = [Full(), Window(size=8, sinks=2), Linear(), Hybrid(window=8, sinks=2), Span(size=6, growth=0.5, sinks=2)]
KINDS += [TopBlocks(keep=2, block=32, rows=16)]
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def mixed(sites):
    """Every operator that a site can take, mixed inside each layer."""
    return {s: [KINDS[(2 * s.layer + i) % (2 if s.limit else len(KINDS))] for i in range(s.kv_heads)] for s in sites}


def ids_of(batch=2, length=40, seed=3):
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=list(DECODERS))
def converted(request):
    model = tiny(request.param)
    conversion = convert(model, mixed(find_sites(model)))
    return model, conversion


@pytest.mark.parametrize("name", DECODERS)
def test_all_heads_full_is_the_untouched_model(name):
    model, ids = tiny(name), ids_of()
    sites = find_sites(model, tolerance=1e-6)
    assert len(sites) == 3
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    model.set_attn_implementation("eager")
    want = [model(ids, use_cache=False).logits, model(ids, attention_mask=mask, use_cache=False).logits]
    conversion = convert(model, {s: [Full()] * s.kv_heads for s in sites})
    got = [model(ids, use_cache=False).logits, model(ids, attention_mask=mask, use_cache=False).logits]
    assert (got[0] - want[0]).abs().max() <= 3e-6
    assert (got[1] - want[1])[mask.bool()].abs().max() <= 3e-6
    conversion.remove()
    assert torch.equal(model(ids, use_cache=False).logits, want[0])
    assert not any(NAME in name for name in model.state_dict())


@torch.no_grad()
def test_every_way_to_feed_tokens_gives_the_uncached_logits(converted):
    model, _ = converted
    ids = ids_of()
    whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(model(ids, use_cache=True).logits, whole, atol=2e-6, rtol=0)
    cache, parts = None, []
    for piece in ids.split([17, 1, 1, 9, 12], 1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-6, rtol=0)


def test_greedy_generation_equals_the_uncached_one(converted):
    model, _ = converted
    start = ids_of()[:1, :20]
    assert torch.equal(model.generate(start, **GREEDY), model.generate(start, use_cache=False, **GREEDY))


def test_left_padded_batches_generate_what_single_prompts_do(converted):
    model, _ = converted
    ids = ids_of()
    alone = model.generate(ids[:1, :20], **GREEDY)
    batch = torch.cat([torch.cat([torch.zeros(1, 7, dtype=torch.long), ids[:1, :20]], 1), ids[1:, :27]])
    mask = torch.ones_like(batch)
    mask[0, :7] = 0
    together = model.generate(batch, attention_mask=mask, **GREEDY)
    assert torch.equal(together[0, 27:], alone[0, 20:])
    assert torch.equal(together[1], model.generate(ids[1:, :27], **GREEDY)[0])


def test_beam_search_and_seeded_sampling_equal_the_uncached_ones(converted):
    model, _ = converted
    start = ids_of()[:1, :20]
    cached, uncached = (model.generate(start, num_beams=3, use_cache=c, **GREEDY) for c in (True, False))
    assert torch.equal(cached, uncached)
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        settings = GREEDY | {"do_sample": True, "top_k": 20}
        drawn.append(model.generate(start, use_cache=use_cache, num_return_sequences=3, **settings))
    assert torch.equal(*drawn)


def test_several_turns_with_a_kept_cache(converted):
    model, _ = converted
    first, more = ids_of()[:1, :18], ids_of()[1:, :9]
    cache = DynamicCache(config=model.config)
    answer = model.generate(first, past_key_values=cache, **GREEDY)
    second = torch.cat([answer, more], 1)
    kept = model.generate(second, past_key_values=cache, **GREEDY)
    assert torch.equal(kept, model.generate(second, use_cache=False, **GREEDY))


def test_right_padding_does_not_reach_real_tokens(converted):
    model, _ = converted
    ids = ids_of()
    mask = torch.ones_like(ids)
    mask[0, 25:] = 0
    padded = model(ids, attention_mask=mask, use_cache=False).logits[0, :25]
    alone = model(ids[:1, :25], use_cache=False).logits[0]
    torch.testing.assert_close(padded, alone, atol=2e-6, rtol=0)


def test_what_cannot_be_done_is_refused_with_its_reason(converted):
    model, _ = converted
    start = ids_of()[:1, :20]
    with pytest.raises(Unsupported, match="padding"):
        model(start, attention_mask=torch.ones(1, 1, 20, 20, dtype=torch.bool))
    cache = model(start, use_cache=True).past_key_values
    with pytest.raises(Unsupported, match=r"10 tokens are to be taken back from the cache, 0 can be"):
        cache.crop(-10)


def test_a_compiled_model_gives_the_same_logits_and_gradients():
    model = tiny("llama")
    convert(model, {site: [Window(size=6, sinks=2), Hybrid(window=5, sinks=2)] for site in find_sites(model)})
    ids, compiled = ids_of(), torch.compile(model, backend="aot_eager", fullgraph=True)
    found = []
    for run in (model, compiled):
        out = run(ids, labels=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        gradient = torch.autograd.grad(out.loss, model.model.layers[0].self_attn.q_proj.weight)[0]
        found.append((out.logits, gradient))
    torch.testing.assert_close(found[1], found[0])
    with pytest.raises(Exception, match="pass an attention_mask"):
        compiled(ids, use_cache=False)


@pytest.mark.parametrize("length", [5, 60])
def test_cache_bytes_are_what_the_cost_model_promises(length):
    for name in ("llama", "gemma3_text"):
        model = tiny(name)
        plan = mixed(find_sites(model))
        want = costs(plan, length, 4)["kv_bytes"]
        convert(model, plan)
        cache = model(ids_of(1, length), use_cache=True).past_key_values
        slots = sum(8 * s.sink_at.numel() for layer in cache.layers for s in layer.states if hasattr(s, "sink_at"))
        states = [s for layer in cache.layers for s in layer.states]
        room = sum(2 * s.k[0, :, s.length :, :].numel() * 4 for s in states if isinstance(s, FullState | BlocksState))
        assert cache_bytes(cache) - slots - room == want
        assert room <= 0.02 * want + 2 * 16 * 8 * 4 * sum(site.kv_heads for site in plan)


def test_the_cache_of_the_teacher_is_not_given_to_the_student():
    model = tiny("llama")
    conversion = convert(model, mixed(find_sites(model)))
    with conversion.teacher():
        cache = model(ids_of(), use_cache=True).past_key_values
    with pytest.raises(Unsupported, match="cannot be shared by the teacher and the student"):
        model(ids_of()[:, :1], past_key_values=cache)


def test_the_cache_of_one_plan_is_not_given_to_another():
    model = tiny("llama")
    sites = find_sites(model)
    conversion = convert(model, {s: [Window(size=4, sinks=1)] * s.kv_heads for s in sites})
    cache = model(ids_of(), use_cache=True).past_key_values
    conversion.remove()
    with pytest.raises((Unsupported, RuntimeError)):
        model(ids_of()[:, :1], past_key_values=cache)
    convert(model, {s: [Full()] * s.kv_heads for s in sites})
    with pytest.raises(Unsupported, match="two models or plans"):
        model(ids_of()[:, :1], past_key_values=cache)


@torch.no_grad()
def test_a_copied_cache_goes_on(converted):
    model, _ = converted
    cache = model(ids_of(), use_cache=True).past_key_values
    again = copy.deepcopy(cache)
    first, second = (model(ids_of()[:, :3], past_key_values=c, use_cache=True).logits for c in (cache, again))
    assert torch.equal(first, second)


def test_offloaded_caches_are_refused():
    model = tiny("llama")
    convert(model, mixed(find_sites(model)))
    cache = DynamicCache(config=model.config)
    cache.offloading = True
    with pytest.raises(Unsupported, match="cannot be offloaded"):
        model(ids_of(), past_key_values=cache)


def test_a_conversion_that_fails_leaves_nothing_behind():
    model = tiny("llama")
    sites = find_sites(model)
    wrong = dataclasses.replace(sites[2], name="model.layers.9.self_attn")
    with pytest.raises(Unsupported, match=r"has no module 'model\.layers\.9\.self_attn'"):
        convert(model, {s: [Full()] * 2 for s in (*sites[:2], wrong)})
    convert(model, {s: [Full()] * 2 for s in sites})


@pytest.mark.parametrize(
    ("spec", "message"),
    [(Hybrid(window=4), "reads beyond"), (Linear(), "reads beyond"), (Window(size=12, sinks=0), "keeps no less")],
)
def test_a_layer_with_a_window_of_its_own_refuses_what_is_no_gain(spec, message):
    model = tiny("mistral")
    with pytest.raises(Unsupported, match=message):
        convert(model, {s: [spec] * s.kv_heads for s in find_sites(model)})


@pytest.mark.parametrize("name", ["phimoe", "qwen2_moe"])
def test_a_window_that_is_in_the_masks_alone_is_refused(name):
    with pytest.raises(Unsupported, match=r"window of 12 tokens in its masks alone"):
        find_sites(tiny(name))


def test_the_teacher_is_the_untouched_model():
    model, ids = tiny("qwen3"), ids_of()
    want = model(ids, use_cache=False).logits
    conversion = convert(model, mixed(find_sites(model)))
    assert (model(ids, use_cache=False).logits - want).abs().max() > 1e-2
    with conversion.teacher():
        assert (model(ids, use_cache=False).logits - want).abs().max() <= 1e-6


def test_models_whose_attention_cannot_be_reached_are_refused():
    with pytest.raises(Unsupported, match="GPTJ"):
        find_sites(tiny("gptj", n_embd=64, n_layer=2, n_head=4, rotary_dim=8))


def test_autocast_keeps_dtypes_together():
    model = tiny("llama")
    convert(model, mixed(find_sites(model)))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(ids_of(), use_cache=False).logits).all()


@torch.no_grad()
def test_a_replay_from_the_middle_gives_the_same_logits():
    model, ids = tiny("gemma2"), ids_of(1)
    model.set_attn_implementation("eager")
    sites = find_sites(model)
    replay, at = host.Replay(model, sites), torch.tensor([3, 20, 39])
    with replay.record():
        want = host.logits_at(model, ids, at)
    for index in range(3):
        with replay.start(index):
            assert torch.equal(host.logits_at(model, ids, at), want)
    plan = {s: [Window(size=4, sinks=1)] * s.kv_heads if s.layer == 2 else [Full()] * s.kv_heads for s in sites}
    convert(model, plan)
    with replay.start(2):
        got = host.logits_at(model, ids, at)
    torch.testing.assert_close(got, model(ids, use_cache=False).logits[:, at], atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_head_gives_the_models_own_logits():
    for name in ("gemma2", "gpt_neox"):
        model, ids = tiny(name), ids_of()
        hidden = host.trunk(model)(ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(host.head(model, hidden), model(ids, use_cache=False).logits)
