"""Statistics against their definitions on dense attention, and first-order effects against finite differences."""

import pytest
import torch
import torch.nn.functional as F
from models import needle_cases, tiny

from attnconvert.convert import observation
from attnconvert.convert.damage import Joint, marginal_damage, take_groups
from attnconvert.convert.gradients import first_order
from attnconvert.convert.hosts.models import find_sites
from attnconvert.convert.hosts.sites import Site, all_full
from attnconvert.convert.hosts.surgery import convert
from attnconvert.convert.observation import BLOCK, FRACTIONS, Rows, kept_mass, retention_reads, text_statistics
from attnconvert.convert.profiling import untrained
from attnconvert.convert.progress import silent
from attnconvert.convert.recipe import TransferSettings
from attnconvert.distill.loop import fit_operators
from attnconvert.kernels import operators, retention
from attnconvert.kernels.call import Call, grouped, logits
from attnconvert.kernels.spec import Full, Hybrid, Linear, Retention, Window, label


def heads(length=200, queries=4, groups=2, dim=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(1, queries, length, dim, generator=g)
    return q, *(torch.randn(1, groups, length, dim, generator=g) for _ in range(2))


def dense(q, k, scale):
    s = (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2)) * scale
    return s.masked_fill(torch.ones(s.shape[-2:]).triu(1).bool(), -torch.inf).softmax(-1)


def test_mass_kept_by_a_window_is_the_softmax_share_of_what_it_reads():
    q, k, v = heads()
    call = Call(scale=0.25)
    sampled = Rows.sampled(q, k, call, 20)
    p = dense(q, k, 0.25)[:, :, sampled.at]
    i, j = sampled.at[:, None], torch.arange(200)
    reads = ((i - j < 24) & (i >= j)) | (j < 3)
    want = (p * reads).sum(-1).mean((0, 2))
    torch.testing.assert_close(kept_mass(Window(size=24, sinks=3), q, k, v, call, sampled), want)
    torch.testing.assert_close(kept_mass(Hybrid(window=24, sinks=3), q, k, v, call, sampled), want)
    assert kept_mass(Linear(), q, k, v, call, sampled) is None


@pytest.mark.parametrize("block", [1, 4])
def test_what_retention_reads_reproduces_what_it_gives(block):
    """Softmax over exactly the tokens that are said to be read must be the operator's output at those rows."""
    q, k, v = heads(length=90)
    call, spec = Call(scale=0.25), Retention(window=16, keep=8, sinks=2, block=block)
    at = torch.tensor([0, 3, 15, 16, 40, 41, 89])
    reads = retention_reads(spec, q, k, v, call, at)  # (1, Hk, R, S)
    s = logits(grouped(q, 2)[..., at, :], k[:, :, None], call).masked_fill(~reads[:, :, None], -torch.inf)
    want = (s.softmax(-1) @ v[:, :, None]).flatten(1, 2)
    got = retention.reference(spec, q, k, v, call)[:, :, at]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def measured(model, candidates, texts=None, rows=30):
    sites = find_sites(model)
    names = {label(s): s for s in candidates}
    texts = torch.randint(2, 97, (2, 150), generator=torch.Generator().manual_seed(1)) if texts is None else texts
    return sites, text_statistics(model, sites, texts, names, rows, untrained(sites, names, "cpu"), silent)


def test_the_output_error_is_relative_to_the_outputs_variance_and_lost_mass_to_one():
    model, spec = tiny("llama"), Window(size=6, sinks=1)
    texts = torch.randint(2, 97, (1, 40), generator=torch.Generator().manual_seed(1))
    sites, found = measured(model, [spec, Linear()], texts)
    seen = {}

    def keep(site, q, k, v, call):
        seen[site.site.name] = (q, k, v, call)

    conversion = convert(model, all_full(sites))
    with conversion.observe(keep), torch.no_grad():
        model(texts)
    conversion.remove()
    q, k, v, call = seen[sites[1].name]
    o = operators.of(Full()).reference(Full(), q, k, v, call)
    got = operators.of(spec).reference(spec, q, k, v, call)
    error = (got - o).square().sum(-1).mean((0, 2)) / (o - o.mean(2, keepdim=True)).square().sum(-1).mean((0, 2))
    assert found["output_error"]["window-6-1"][1] == pytest.approx(error.tolist(), rel=1e-3)
    assert found["mass_lost"]["linear-hedgehog"][1] == [None] * 4
    assert all(0 < x < 1 for x in found["mass_lost"]["window-6-1"][1])
    assert found["problems"] == []


def test_a_constant_head_is_reported_and_left_out():
    model = tiny("llama", num_attention_heads=4, num_key_value_heads=2)
    attention = model.model.layers[1].self_attn
    attention.v_proj.weight.data[:16] = 0  # KV head 0 gives zeros for query heads 0 and 1
    _, found = measured(model, [Window(size=6, sinks=1)])
    cells = found["output_error"]["window-6-1"][1]
    assert cells[:2] == [None, None]
    assert None not in cells[2:]
    assert found["problems"] == [f"L1H{h} gives the same output for every token" for h in (0, 1)]


def test_densities_and_recalls_count_the_blocks_that_hold_the_mass():
    """A head that reads one far block and itself needs two blocks, whatever the length."""
    length, means = 8 * BLOCK, observation.Means()
    at = torch.tensor([6 * BLOCK + 5, 7 * BLOCK + 9])
    p = torch.zeros(1, 1, 2, length)
    p[..., 70] = 0.7  # block 1
    p[0, 0, 0, at[0]] = p[0, 0, 1, at[1]] = 0.3
    q = torch.randn(1, 1, length, 8)
    observation._block_statistics(means, "x", Rows(at, p), q, q)
    site = [Site("x", 0, 1, 1, 8)]
    assert means.table("density_90", site)[0] == pytest.approx([(2 / 7 + 2 / 8) / 2])
    assert means.table(f"recall {FRACTIONS[0]}", site)[0] == pytest.approx([0.7])
    assert means.table(f"recall {1 / 4}", site)[0] == pytest.approx([1.0])


def test_layers_are_as_similar_to_themselves_as_can_be_and_less_to_others():
    _, found = measured(tiny("llama"), [Window(size=6, sinks=1)])
    table = torch.tensor(found["similarity"])
    torch.testing.assert_close(table.diagonal(), torch.ones(3))
    torch.testing.assert_close(table, table.T)
    assert table.min() > 0
    assert table[0, 1] < 1


def test_first_order_effects_predict_the_loss_of_a_small_change():
    """⟨ô − o, ∂L/∂o⟩ against the loss with o + ε (ô − o) in one head's place."""
    model, spec, cases = tiny("llama"), Window(size=6, sinks=1), needle_cases(cases=1, length=96)
    sites = find_sites(model)
    found = first_order(model, sites, cases, {label(spec): spec}, 16, {}, silent)
    at = {"first_order": torch.arange(0, 92), "first_order_needle": torch.arange(92, 95)}
    for name, positions in at.items():
        for layer, head in ((0, 1), (2, 3)):
            losses = []
            for step in (-1e-2, 1e-2):

                def nudge(site, q, k, v, call, layer=layer, head=head, step=step):
                    o, _ = operators.attend(Full(), q, k, v, call)
                    if site.site.layer == layer:
                        other, _ = operators.attend(spec, q, k, v, call)
                        o = o.clone()
                        o[:, head] += step * (other - o)[:, head]
                    return o

                conversion = convert(model, all_full(sites))
                with conversion.observe(nudge), torch.no_grad():
                    out = model(cases.ids, use_cache=False).logits[0]
                conversion.remove()
                losses.append(F.cross_entropy(out[positions], cases.ids[0, positions + 1]).item())
            slope = abs(losses[1] - losses[0]) / 2e-2
            assert found[name]["window-6-1"][layer][head] == pytest.approx(slope, rel=0.05, abs=2e-4)
    assert all(p.requires_grad for p in model.parameters()), "the model is left as it was"


def test_influence_is_the_first_order_effect_of_masking_entries():
    """Masking one entry and renormalising changes A by −A_j at j and A_i A_j / (1 − A_j) elsewhere."""
    from attnconvert.convert.gradients import _influence

    q, k, v = heads(length=70, queries=2, groups=1)
    gradient = torch.randn(1, 2, 70, 16, generator=torch.Generator().manual_seed(3))
    got = _influence(q, k, v, gradient, Call(scale=0.25), 70)
    p = dense(q, k, 0.25)
    at = torch.arange(17, 70)  # all rows of the last three quarters, for all 70
    want = torch.zeros(2, 2)
    for h in range(2):
        for i in at.tolist():
            a = p[0, h, i, : i + 1]
            g = v[0, 0, : i + 1] @ gradient[0, h, i]
            for j in range(i + 1):
                changed = a / (1 - a[j])
                changed[j] = 0
                want[h, (i - j) // BLOCK] += ((changed - a) @ g).abs()
    torch.testing.assert_close(got, want * 70 / 53, rtol=2e-3, atol=1e-4)


def test_joint_damage_is_that_of_the_whole_plan_and_is_measured_once(tmp_path):
    model, spec, cases = tiny("llama"), Window(size=6, sinks=1), needle_cases(length=96)
    sites = find_sites(model)
    joint = Joint(model, sites, cases, {}, tmp_path, silent)
    chosen = {(0, 1): spec, (2, 0): spec, (1, 0): Full()}
    found = joint(chosen)
    plan = all_full(sites)
    plan[sites[0]][1] = plan[sites[2]][0] = spec
    at = torch.cat([torch.arange(4, 92, 4), torch.arange(92, 95)])
    want = torch.stack([model(x[None]).logits[0, at].log_softmax(-1) for x in cases.ids])
    conversion = convert(model, plan)
    got = torch.stack([model(x[None], use_cache=False).logits[0, at].log_softmax(-1) for x in cases.ids])
    conversion.remove()
    assert found["kl"] == pytest.approx((want.exp() * (want - got)).sum(-1).mean().item(), rel=1e-3)
    again = Joint(None, sites, cases, {}, tmp_path, silent)  # nothing left to run
    assert again(dict(reversed(chosen.items()))) == found


def test_candidates_that_learn_are_fitted_where_a_model_has_windows_of_its_own(tmp_path):
    model = tiny("gemma2")
    sites = find_sites(model)
    texts = torch.randint(2, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    found = fit_operators(model, sites, Linear(), texts, TransferSettings(steps=2), 0, tmp_path, silent)
    able = [s.name for s in sites if s.limit is None]
    assert {name for name, _ in found} == set(able)
    assert 0 < len(able) < len(sites)
    assert not any("attnconvert" in name for name, _ in model.named_modules())


def test_a_group_takes_what_its_heads_learned():
    source = operators.of(Hybrid()).parameters(Hybrid(), 6, 3, 8)
    target = operators.of(Hybrid()).parameters(Hybrid(), 4, 2, 8)
    for p in source.parameters():
        torch.nn.init.normal_(p)
    take_groups(source, target, (0, 2), 3)
    assert torch.equal(target.query, source.query[[0, 1, 4, 5]])
    assert torch.equal(target.key, source.key[[0, 2]])
    assert torch.equal(target.tail, source.tail[[0, 1, 4, 5]])


def test_marginal_damage_is_the_difference_of_two_joint_ones(tmp_path):
    model, spec, cases = tiny("qwen3"), Window(size=6, sinks=1), needle_cases(length=96)
    sites, names = find_sites(model), {label(spec): spec}
    around = {(0, 1): spec, (2, 0): spec}
    found = marginal_damage(model, sites, cases, names, {}, around, tmp_path, silent)[label(spec)]
    joint = Joint(model, sites, cases, {}, tmp_path, silent)
    base, added = joint(around), joint({**around, (1, 0): spec})
    restored = joint({(2, 0): spec})
    for measure in ("kl", "needle"):
        assert found[measure][1][0] == pytest.approx(added[measure] - base[measure], abs=2e-5)
        assert found[measure][0][1] == pytest.approx(base[measure] - restored[measure], abs=2e-5)
