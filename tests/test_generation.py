"""Generation is exact: for each operator and family, whatever way tokens are fed, against the uncached forward."""

import itertools
import json
import pickle
import threading

import pytest
import torch
from models import tiny
from test_export import exported
from transformers import (
    AutoTokenizer,
    DynamicCache,
    QuantizedCache,
    StaticCache,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from attnconvert.convert.evaluation import cache_bytes, costs
from attnconvert.convert.hosts import caches
from attnconvert.convert.hosts.models import find_sites
from attnconvert.convert.hosts.sites import Unsupported
from attnconvert.convert.hosts.surgery import convert, converted
from attnconvert.kernels.full import FullState
from attnconvert.kernels.spec import Full, Hybrid, Linear, Retention, Span, TopBlocks, Window, label
from attnconvert.kernels.top_blocks import BlocksState

FAMILIES = ("llama", "gemma3_text", "gpt2", "gpt_oss", "qwen3_moe")  # gemma3 and gpt-oss have windows of their own
SPECS = [
    Full(),
    Window(size=8, sinks=2),
    Span(size=6, growth=0.5, sinks=2),
    TopBlocks(keep=2, block=32, rows=16),
    Retention(window=8, keep=5, sinks=2, block=4),
    Linear(),
    Hybrid(window=8, sinks=2),
]
FIXED = [spec for spec in SPECS if spec.operator != "blocks"]  # what a static cache can hold
PAIRS = list(itertools.product(FAMILIES, SPECS))
NEW = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
CLOSE = {"atol": 3e-6, "rtol": 0}


def ids_of(batch=2, length=60, seed=3):
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def plan_of(sites, spec):
    """The operator in every group that can take it; layers with a window of their own take windows only."""
    fits = spec.operator == "window"
    return {site: [spec if fits or site.limit is None else Full()] * site.kv_heads for site in sites}


def mixed(sites, specs):
    """All of them mixed inside each layer."""
    return {s: [Full() if s.limit else specs[(2 * s.layer + i) % len(specs)] for i in range(s.kv_heads)] for s in sites}


@pytest.fixture(scope="module")
def stock():
    """family → a model and its sites, made once."""
    made = {}

    def get(family):
        if family not in made:
            model = tiny(family)
            made[family] = model, find_sites(model)
        return made[family]

    return get


@pytest.fixture(params=PAIRS, ids=lambda pair: f"{pair[0]}-{label(pair[1])}")
def model(request, stock):
    family, spec = request.param
    model, sites = stock(family)
    conversion = convert(model, plan_of(sites, spec))
    model.spec, model.family = spec, family
    yield model
    conversion.remove()


@torch.no_grad()
def feed(model, ids, sizes, mask=None, cache=None):
    """Logits of ids that arrive in pieces of these sizes, and the cache."""
    parts, seen = [], 0 if cache is None else int(cache.get_seq_length())
    for piece in ids[:, : sum(sizes)].split(sizes, 1):
        seen += piece.shape[1]
        now = None if mask is None else mask[:, :seen]
        out = model(piece, attention_mask=now, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    return torch.cat(parts, 1), cache


@torch.no_grad()
def uncached(model, ids, mask=None):
    return model(ids, attention_mask=mask, use_cache=False).logits


def left_padded(ids, width):
    """The rows of a batch; the first of them has `width` tokens of padding before it."""
    mask = torch.ones_like(ids)
    mask[0, :width] = 0
    return ids.masked_fill(mask == 0, 0), mask


@pytest.mark.parametrize("sizes", [[1] * 9 + [20, 31], [33, 1, 1, 7, 18], [60]], ids=str)
def test_chunks_of_any_size_give_the_uncached_logits(model, sizes):
    ids = ids_of()
    torch.testing.assert_close(feed(model, ids, sizes)[0], uncached(model, ids), **CLOSE)


def test_left_padded_batches_give_what_their_rows_give_alone(model):
    ids, mask = left_padded(ids_of(), 11)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        alone = model(ids[:1, 11:], use_cache=False).logits
    torch.testing.assert_close(whole[:1, 11:], alone, **CLOSE)
    together = model.generate(ids[:, :30], attention_mask=mask[:, :30], **NEW)
    for row, start in enumerate((11, 0)):
        single = model.generate(ids[row : row + 1, start:30], use_cache=False, **NEW)
        assert torch.equal(together[row, start:], single[0])


def test_greedy_seeded_and_beam_generation_equal_the_uncached_ones(model):
    start = ids_of()[:1, :30]
    for settings in ({}, {"do_sample": True, "top_k": 20, "num_return_sequences": 2}, {"num_beams": 3}):
        found = []
        for use_cache in (True, False):
            torch.manual_seed(5)
            found.append(model.generate(start, use_cache=use_cache, **NEW | settings))
        assert torch.equal(*found)


def test_a_kept_cache_serves_several_turns_and_other_batches(model):
    first, more = ids_of()[:1, :18], ids_of()[1:, :9]
    cache = DynamicCache(config=model.config)
    answer = model.generate(first, past_key_values=cache, **NEW)
    second = torch.cat([answer, more], 1)
    kept = model.generate(second, past_key_values=cache, **NEW)
    assert torch.equal(kept, model.generate(second, use_cache=False, **NEW))
    rows = torch.tensor([1, 0, 1])
    _, cache = feed(model, ids_of(), [33, 1])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2]))
    cache.reorder_cache(rows)
    ids = torch.cat([ids_of()[:, :34][rows], ids_of(3, 12, seed=7)], 1)
    logits, _ = feed(model, ids[:, 34:], [1, 1, 10], cache=cache)
    torch.testing.assert_close(logits, uncached(model, ids)[:, 34:], **CLOSE)


def test_right_padded_training_batches_learn_what_their_rows_teach(model):
    ids = ids_of(2, 40)
    mask = torch.ones_like(ids)
    mask[0, 25:] = 0
    weight = next(p for n, p in model.named_parameters() if n.endswith(("o_proj.weight", "attn.c_proj.weight")))
    padded = model(ids, attention_mask=mask, use_cache=False).logits[0, :25]
    alone = model(ids[:1, :25], use_cache=False).logits[0]
    torch.testing.assert_close(padded, alone, **CLOSE)
    gradients = [torch.autograd.grad(x.square().mean(), weight)[0] for x in (padded, alone)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


CUTS = [[40, 1, 19], [23, 37]]


def documents(ids):
    """The documents of packed rows, and their positions."""
    found = [part for row, cuts in zip(ids, CUTS, strict=True) for part in row.split(cuts)]
    return found, torch.stack([torch.cat([torch.arange(n) for n in cuts]) for cuts in CUTS])


def test_packed_documents_do_not_read_each_other(model):
    ids = ids_of()
    parts, positions = documents(ids)
    weight = next(p for n, p in model.named_parameters() if n.endswith(("o_proj.weight", "attn.c_proj.weight")))
    packed = model(ids, position_ids=positions, use_cache=False).logits.flatten(0, 1)
    alone = torch.cat([model(part[None], use_cache=False).logits[0] for part in parts])
    torch.testing.assert_close(packed, alone, **CLOSE)
    gradients = [torch.autograd.grad(x.square().mean(), weight)[0] for x in (packed, alone)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
    cu = torch.tensor([0, *itertools.accumulate(CUTS[0])], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 40, "max_length_k": 40}
    with torch.no_grad():
        by_length = model(ids[:1], position_ids=positions[:1], use_cache=False, **lengths).logits[0]
    torch.testing.assert_close(by_length, alone[:60], **CLOSE)


@pytest.mark.parametrize("spec", [Window(size=8, sinks=2), Linear()], ids=label)
def test_packing_is_refused_where_it_cannot_be_exact(stock, spec):
    model, sites = stock("llama")
    with converted(model, plan_of(sites, spec)):
        ids = ids_of()
        _, positions = documents(ids)
        with pytest.raises(Unsupported, match="packed sequences have no cache here: pass use_cache=False"):
            model(ids, position_ids=positions, use_cache=True)
        cu = torch.tensor([0, 20, 60], dtype=torch.int32)
        with pytest.raises(Unsupported, match="packed sequences have no cache"):
            model(ids[:1], cu_seq_lens_q=cu, use_cache=True)
        with pytest.raises(Unsupported, match=r"cut one row of 60 tokens.*given are 2 rows and \[0, 20, 60\]"):
            model(ids, cu_seq_lens_q=cu, use_cache=False)
        with pytest.raises(Unsupported, match="must both cut"):
            model(ids[:1], cu_seq_lens_q=cu, cu_seq_lens_k=torch.tensor([0, 21, 60]), use_cache=False)


def test_mask_functions_that_are_not_known_are_refused(stock):
    model, sites = stock("llama")
    with converted(model, plan_of(sites, Window(size=8, sinks=2))):
        from transformers.masking_utils import and_masks, causal_mask_function, create_causal_mask

        def odd(batch_idx, head_idx, q_idx, kv_idx):
            return (q_idx - kv_idx) % 2 == 0

        given = {"inputs_embeds": torch.zeros(1, 5, 8), "attention_mask": None, "past_key_values": None}
        for function in (odd, and_masks(odd, causal_mask_function)):
            with pytest.raises(Unsupported, match=r"mask function of its own, .*odd, is not known"):
                create_causal_mask(model.config, **given, and_mask_function=function)


# --- taking tokens back -----------------------------------------------------------------------------------------------


def test_tokens_taken_back_leave_no_trace(model):
    ids, other = ids_of(), ids_of(seed=9)
    _, cache = feed(model, ids, [30])
    cache.activate_past_recording()
    feed(model, other, [7, 1, 1, 1, 50], cache=cache)
    cache.crop(-60)
    feed(model, torch.cat([ids[:, 30:34], other[:, :9]], 1), [12, 1], cache=cache)
    cache.crop(-4)
    cache.crop(-5)  # within what is recorded, in two steps
    assert cache.get_seq_length() == 34
    logits, _ = feed(model, ids[:, 34:50], [1, 15], cache=cache)
    cache.crop(0)
    last, _ = feed(model, ids[:, 50:], [3, 1, 6], cache=cache)
    torch.testing.assert_close(torch.cat([logits, last], 1), uncached(model, ids)[:, 34:], **CLOSE)


def test_prompt_lookup_and_assisted_generation_give_the_greedy_tokens(model, stock, monkeypatch):
    taken = []
    crop = caches.OperatorLayer.crop
    monkeypatch.setattr(caches.OperatorLayer, "crop", lambda self, n: (taken.append(n), crop(self, n))[1])
    start = torch.cat([ids_of()[:1, :20]] * 2, 1)[:, :36]
    settings = NEW | {"max_new_tokens": 12}
    want = model.generate(start, use_cache=False, **settings)
    assert torch.equal(model.generate(start, prompt_lookup_num_tokens=4, **settings), want)
    assert torch.equal(model.generate(start, assistant_model=tiny(model.family), **settings), want)
    assert min(taken) < 0


def test_a_converted_model_can_be_the_assistant(stock):
    model, sites = stock("llama")
    start = ids_of()[:1, :30]
    helped = tiny("llama", seed=1)
    want = helped.generate(start, **NEW)
    with converted(model, mixed(sites, SPECS)):
        assert torch.equal(helped.generate(start, assistant_model=model, **NEW), want)


def test_what_is_kept_to_go_back_is_bounded_by_the_call_and_counted(stock, monkeypatch):
    monkeypatch.setattr(caches, "KEPT", 8)
    model, sites = stock("llama")
    with converted(model, plan_of(sites, Window(size=8, sinks=2))):
        ids, mask = left_padded(ids_of(), 5)
        _, cache = feed(model, ids[:, :4], [4], mask=mask)
        plain = cache_bytes(feed(model, ids[:, :34], [34], mask=mask)[1])
        cache.activate_past_recording()
        feed(model, ids[:, 4:34], [30], mask=mask, cache=cache)
        logged = 3 * 2 * 8 * (4 + 2 + 2) * 16 * 4  # layers, rows, tokens, heads of q, k and v, numbers, bytes
        assert cache_bytes(cache) == 2 * plain + logged
        with pytest.raises(Unsupported, match=r"9 tokens are to be taken back from the cache, 8 can be.*activate_past"):
            cache.crop(-9)
        cache.crop(-8)
        logits = model(ids[:, 26:], attention_mask=mask, past_key_values=cache).logits
        torch.testing.assert_close(logits, uncached(model, ids, mask)[:, 26:], **CLOSE)
        cache.crop(0)
        with pytest.raises(Unsupported, match="1 tokens are to be taken back from the cache, 0 can be"):
            cache.crop(-1)
        with pytest.raises(Unsupported, match="as a negative number"):
            cache.crop(20)


def test_a_cache_that_cannot_go_back_stays_as_it_was(stock):
    model, sites = stock("llama")
    plan = plan_of(sites, Full()) | {sites[2]: [Window(size=8, sinks=2)] * sites[2].kv_heads}
    with converted(model, plan):
        ids = ids_of()
        _, cache = feed(model, ids, [40])
        with pytest.raises(Unsupported, match="3 tokens are to be taken back from the cache, 0 can be"):
            cache.crop(-3)
        torch.testing.assert_close(
            feed(model, ids[:, 40:], [20], cache=cache)[0], uncached(model, ids)[:, 40:], **CLOSE
        )


def test_full_attention_takes_back_whatever_it_holds(stock):
    model, sites = stock("qwen3_moe")
    with converted(model, plan_of(sites, Full())):
        ids = ids_of()
        _, cache = feed(model, torch.cat([ids[:, :20], ids_of(seed=9)], 1), [70, 1, 9])
        cache.crop(-60)
        torch.testing.assert_close(
            feed(model, ids[:, 20:], [40], cache=cache)[0], uncached(model, ids)[:, 20:], **CLOSE
        )


# --- static caches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", FIXED, ids=label)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_static_cache_gives_the_uncached_logits(stock, family, spec):
    model, sites = stock(family)
    with converted(model, plan_of(sites, spec)):
        ids, mask = left_padded(ids_of(), 11)
        for given in (None, mask):
            cache = StaticCache(config=model.config, max_cache_len=64)
            got, _ = feed(model, ids, [5, 1, 1, 20, *[1] * 12, 16, 5], given, cache)
            torch.testing.assert_close(
                got[given is not None :], uncached(model, ids, given)[given is not None :], **CLOSE
            )
        with pytest.raises(Unsupported, match="room for 64 tokens, not for 68: make a larger one"):
            feed(model, ids[:, :8], [8], cache=cache)
        places = [x.data_ptr() for layer in cache.layers for x in caches._tensors(layer.states)]
        cache.reset()
        got, _ = feed(model, ids[:, 11:], [3, 1, 1, 44], cache=cache)
        torch.testing.assert_close(got, uncached(model, ids[:, 11:]), **CLOSE)
        assert places == [x.data_ptr() for layer in cache.layers for x in caches._tensors(layer.states)] != []
        start = ids_of()[:1, :30]
        want = model.generate(start, use_cache=False, **NEW)
        assert torch.equal(model.generate(start, cache_implementation="static", **NEW), want)


def test_beams_in_a_static_cache(stock):
    model, sites = stock("llama")
    with converted(model, mixed(sites, FIXED)):
        start = ids_of()[:1, :30]
        want = model.generate(start, use_cache=False, num_beams=3, **NEW)
        assert torch.equal(model.generate(start, cache_implementation="static", num_beams=3, **NEW), want)


def compiled_steps(model, backend="aot_eager"):
    """The logits of ids that a compiled model decodes one by one behind a prompt: twice, then with padding."""
    torch._dynamo.reset()
    ids, mask = left_padded(ids_of(2, 50), 11)
    step = torch.compile(model, backend=backend, fullgraph=True)
    for turn, given in enumerate((None, None, mask)):
        cache = StaticCache(config=model.config, max_cache_len=64)
        parts = [feed(model, ids, [30], given, cache)[0]]
        for at in range(30, 50):
            now = None if given is None else torch.nn.functional.pad(given[:, : at + 1], (0, 63 - at))
            with torch.compiler.set_stance("fail_on_recompile" if at > 30 or turn == 1 else "default"):
                parts.append(step(ids[:, at : at + 1], attention_mask=now, past_key_values=cache).logits)
        real = torch.ones_like(ids, dtype=torch.bool) if given is None else given.bool()
        torch.testing.assert_close(torch.cat(parts, 1)[real], uncached(model, ids, given)[real], **CLOSE)


@torch.no_grad()
def test_a_compiled_step_serves_every_token_without_compiling_again(stock):
    heads = {"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 96}
    model = tiny("llama", num_hidden_layers=1, **heads)
    convert(model, dict.fromkeys(find_sites(model), FIXED))
    compiled_steps(model)
    cache = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(Exception, match="filled outside of torch.compile"):
        torch.compile(model, backend="eager", fullgraph=True)(ids_of(), past_key_values=cache)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("spec", FIXED, ids=label)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_operator_and_family_decodes_compiled(family, spec):
    model = tiny(family)
    convert(model, plan_of(find_sites(model), spec))
    compiled_steps(model)


@pytest.mark.slow
@torch.no_grad()
def test_inductor_compiles_generation():
    from transformers import CompileConfig

    model = tiny("llama", num_hidden_layers=1)
    convert(model, mixed(find_sites(model), FIXED))
    start = ids_of()[:1, :30]
    want = model.generate(start, use_cache=False, **NEW)
    settings = CompileConfig(mode="default", fullgraph=True)
    settings._compile_all_devices = True
    got = model.generate(start, cache_implementation="static", compile_config=settings, **NEW)
    assert torch.equal(got, want)
    assert hasattr(model, "_compiled_call")


# --- what is refused --------------------------------------------------------------------------------------------------


def test_caches_that_cannot_be_are_refused_with_their_reason(stock):
    model, sites = stock("llama")
    with converted(model, plan_of(sites, SPECS[3])):
        ids = ids_of()
        static = StaticCache(config=model.config, max_cache_len=64)
        with pytest.raises(Unsupported, match=r"blocks-2-32-16, whose state has no fixed shape.*use the default cache"):
            model(ids, past_key_values=static)
        quantised = QuantizedCache.__new__(QuantizedCache)  # its own __init__ wants a library for it
        quantised.layers, quantised.offloading = DynamicCache(config=model.config).layers, False
        with pytest.raises(Unsupported, match="cannot be quantised: it is small by design"):
            model(ids, past_key_values=quantised)
        with pytest.raises(Unsupported, match="cannot be offloaded"):
            model.generate(ids, cache_implementation="offloaded", **NEW)
    with converted(model, plan_of(sites, Window(size=8, sinks=2))):
        with torch.no_grad():
            cache = model(ids, past_key_values=static).past_key_values
        with pytest.raises(Unsupported, match=r"cannot be taken back from a static cache \(crop\)"):
            cache.crop(-1)
        with pytest.raises(Unsupported, match=r"for generation: run the model under torch\.no_grad"):
            model(ids[:, :1], past_key_values=cache)


# --- memory -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("spec", SPECS, ids=label)
def test_the_cache_at_32k_tokens_is_what_the_plan_promised(spec):
    length, small = 32768, {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 99}
    model = tiny("llama", num_hidden_layers=1, intermediate_size=16, max_position_embeddings=2 * length, **small)
    plan = plan_of(find_sites(model), spec)
    convert(model, plan)
    ids = ids_of(1, length)
    cache = model.model(ids[:, :-2], use_cache=True).past_key_values  # without 32k rows of logits
    for at in (-2, -1):
        cache = model(ids[:, at:][:, :1], past_key_values=cache).past_key_values
    (state,) = cache.layers[0].states
    free = sum(2 * x.k[:, :, x.length :].numel() * 4 for x in (state,) if isinstance(x, FullState | BlocksState))
    places = 8 * state.sink_at.numel() if hasattr(state, "sink_at") else 0  # where the sinks stand is not in the plan
    assert cache_bytes(cache) - free - places == costs(plan, length, 4)["kv_bytes"]
    assert free <= 0.02 * cache_bytes(cache)


# --- on an exported checkpoint ----------------------------------------------------------------------------------------


def test_pipelines_streamers_rollback_and_static_caches_work_on_an_exported_checkpoint(tmp_path, capsys):
    model, _ = exported("llama", tmp_path)
    name = json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"]
    again = get_class_from_dynamic_module(name, str(tmp_path)).from_pretrained(tmp_path).eval()
    assert type(again).__module__.startswith("transformers_modules")  # the code in the folder, not ours
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, pad_token="0", padding_side="left")
    pipe = pipeline("text-generation", model=again, tokenizer=tokenizer)
    words = "5 6 7 8 5 6 7 8 5 6"
    given = tokenizer(words, return_tensors="pt")
    start = given["input_ids"].shape[1]
    ids = model.generate(**given, use_cache=False, **NEW)
    want = tokenizer.decode(ids[0, start:])
    assert pipe(words, return_full_text=False, **NEW)[0]["generated_text"] == want
    batch = pipe([words, "9 10"], batch_size=2, return_full_text=False, **NEW)
    assert batch[0][0]["generated_text"] == want
    for settings in ({"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"}):
        assert torch.equal(pipe.model.generate(**given, **NEW, **settings), ids)
    capsys.readouterr()
    pipe.model.generate(**given, streamer=TextStreamer(tokenizer, skip_prompt=True), **NEW)
    assert capsys.readouterr().out.split() == want.split()
    stream = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=pipe.model.generate, kwargs={**given, "streamer": stream, **NEW})
    thread.start()
    found = "".join(stream)
    thread.join()
    assert found.split() == want.split()


@torch.no_grad()
def test_threads_share_a_model_with_a_cache_each(stock):
    """Both are inside the same site at once: each waits there until the other has come by."""
    model, sites = stock("llama")
    texts = [ids_of(1, length, seed=length) for length in (20, 31)]
    got, together = {}, threading.Barrier(2, timeout=60)

    def wait(module, args):
        together.wait()

    def serve(n):
        with torch.no_grad():
            got[n] = model(texts[n][:, -1:], past_key_values=kept[n]).logits

    with converted(model, mixed(sites, [Full(), Window(size=8, sinks=2)])):
        want = [model(ids, use_cache=False).logits[:, -1:] for ids in texts]
        kept = [model(ids[:, :-1]).past_key_values for ids in texts]
        meet = model.get_submodule(sites[0].name).register_forward_pre_hook(wait)
        threads = [threading.Thread(target=serve, args=(n,)) for n in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        meet.remove()
    for n in (0, 1):
        torch.testing.assert_close(got[n], want[n], **CLOSE)


@torch.no_grad()
def test_a_pickled_model_keeps_its_operators_and_its_cache():
    model = tiny("llama")
    convert(model, plan_of(find_sites(model), Window(size=8, sinks=2)))
    copy = pickle.loads(pickle.dumps(model))
    assert torch.equal(copy(ids_of()).logits, model(ids_of()).logits)
    assert copy.__dict__["_prepare_cache_for_generation"].args == (copy,), "generate prepares the cache for its own"
    assert torch.equal(copy.generate(ids_of(1), **NEW), model.generate(ids_of(1), **NEW))
