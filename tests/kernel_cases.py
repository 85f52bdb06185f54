"""Random problems for the kernels, and dense references written straight from the definitions in kernels/problem.py.

The references are plain torch: every mask is a comparison of positions, every sum is over all keys. They compute in the
dtype of what they are given, so `double` first gives the truth, and the problem as it is gives what plain attention
math loses in that dtype: matrices rounded to it, sums and normalisers in fp32 at least, as in torch's own math
attention. All but retention and selection are differentiable by autograd.
"""

import dataclasses
import math
import os

import torch
import torch.nn.functional as F

from attnconvert.kernels.problem import (
    EMPTY,
    EPS,
    Blocks,
    Branch,
    Decode,
    Extra,
    Linear,
    Mixed,
    Part,
    Pooled,
    Ranges,
    Retain,
    Softmax,
    Varlen,
)

LENGTHS = (1, 2, 31, 32, 33, 63, 65, 97, 127, 129, 131)
DIMS = (16, 40, 64, 72, 80, 96, 128, 160, 256)
HEADS = ((1, 1), (4, 4), (4, 1), (8, 2), (6, 3), (8, 1))  # query heads, KV groups
LOW = (torch.float32, torch.float16, torch.bfloat16)


# ---------------------------------------------------------------------------------------------------------- seeds


def draw_seed():
    """A fresh seed, or the one of ATTNCONVERT_SEED. The `seed` fixture prints it, and pytest shows that on failure."""
    given = os.environ.get("ATTNCONVERT_SEED")
    return int(given) if given else int.from_bytes(os.urandom(4), "little")


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randint(rng, low, high):
    """An integer from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=rng))


def choose(rng, options):
    return options[randint(rng, 0, len(options) - 1)]


def normal(rng, *shape, dtype=torch.float32, spread=1.0):
    return (spread * torch.randn(*shape, generator=rng, dtype=torch.float64)).to(dtype)


def strided(x):
    """The same numbers as a view of a (B, S, H, D + 8) tensor whose unused columns are NaN."""
    b, h, s, d = x.shape
    wide = torch.full((b, s, h, d + 8), math.nan, dtype=x.dtype, device=x.device)
    view = wide[..., :d].transpose(1, 2)
    view.copy_(x)
    return view


# ---------------------------------------------------------------------------------------------------- description tools


def convert(problem, change):
    """The problem with `change` applied to every tensor in it, however deep."""
    if isinstance(problem, torch.Tensor):
        return change(problem)
    if isinstance(problem, tuple):
        return tuple(convert(x, change) for x in problem)
    if dataclasses.is_dataclass(problem):
        fields = {f.name: convert(getattr(problem, f.name), change) for f in dataclasses.fields(problem)}
        return dataclasses.replace(problem, **fields)
    return problem


def double(problem, grad=False):
    """The problem in fp64; with `grad`, its floating tensors are fresh leaves that require gradients."""

    def change(x):
        return x.detach().double().requires_grad_(grad) if x.is_floating_point() else x

    return convert(problem, change)


def leaves(problem):
    """The problem with its floating tensors as leaves that require gradients, dtypes kept."""
    return convert(problem, lambda x: x.detach().clone().requires_grad_() if x.is_floating_point() else x)


def on(problem, device):
    return convert(problem, lambda x: x.to(device))


# ------------------------------------------------------------------------------------------------------------- masks


def positions(p):
    """Of the rows and of the keys: (Q,), (K,)."""
    rows, keys = p.q.shape[2], p.k.shape[2]
    return torch.arange(rows) + keys - rows, torch.arange(keys)


def sequences(p):
    """The problem cut into one for each packed sequence: (rows, keys, problem) in order."""
    cu_q, cu_k = p.varlen.cu_q.tolist(), p.varlen.cu_k.tolist()
    out = []
    for n in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        if isinstance(p, Linear):
            parts = {"fq": p.fq[:, :, rows], "fk": p.fk[:, :, keys], "v": p.v[:, :, keys]}
            parts["state"] = None if p.state is None else p.state[n : n + 1]
        else:
            parts = {"q": p.q[:, :, rows], "k": p.k[:, :, keys], "v": p.v[:, :, keys]}
            parts["valid"] = None if p.valid is None else p.valid[:, keys]
            if isinstance(p.where, Blocks) and len(p.where.starts) > 1:  # lists of their own
                starts, counts = p.where.starts[n : n + 1], p.where.counts[n : n + 1]
                parts["where"] = dataclasses.replace(p.where, starts=starts, counts=counts)
        out.append((rows, keys, dataclasses.replace(p, varlen=None, **parts)))
    return out


def block_mask(p):
    """What the lists of `Blocks` name: (attended keys, keys of named blocks), both (B, Hk, Q, K) bool."""
    (b, _, rows, _), (groups, keys) = p.q.shape, p.k.shape[1:3]
    where, (bq, bk) = p.where, p.where.block
    nq, nk = -(-rows // bq), -(-keys // bk)
    inside = torch.zeros(b, groups, nq * bq, nk * bk, dtype=torch.bool)
    named = inside.clone()
    starts, counts, columns = where.starts.tolist(), where.counts.tolist(), where.columns.tolist()
    kinds = [-1] * len(columns) if where.kinds is None else where.kinds.tolist()
    for bi in range(b):
        for g in range(groups):
            s_row = starts[bi % len(starts)][g % len(starts[0])]
            c_row = counts[bi % len(starts)][g % len(starts[0])]
            for n in range(nq):
                for at in range(s_row[n], s_row[n] + c_row[n]):
                    c = columns[at]
                    part = (bi, g, slice(n * bq, n * bq + bq), slice(c * bk, c * bk + bk))
                    named[part] = True
                    inside[part] = True if kinds[at] < 0 else unpack(where.patterns[kinds[at]])
    return inside[:, :, :rows, :keys], named[:, :, :rows, :keys]


def unpack(pattern):
    """(bq, bk // 32) int32 words to (bq, bk) bool: bit c % 32 of word c // 32 is key c."""
    bits = (pattern.cpu().long()[..., None] >> torch.arange(32)) & 1
    return bits.flatten(-2).bool()


def pack(inside):
    """The inverse of `unpack`, for (..., bk) bool."""
    words = (inside.unflatten(-1, (-1, 32)).long() << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def softmax_mask(p):
    """Which keys the softmax part reads: (B, Hk, Q, K) bool."""
    p = on(p, "cpu")
    i, j = positions(p)
    distance = i[:, None] - j  # (Q, K)
    mask = torch.ones(*p.k.shape[:2], *distance.shape, dtype=torch.bool)
    if p.causal:
        mask &= distance >= 0
    if isinstance(p.where, Ranges):
        for g, w in enumerate(p.where.sizes):
            if w >= 0:
                mask[:, g] &= (distance < w) if p.causal else (distance.abs() < w)
    else:
        mask &= block_mask(p)[0]
    if p.valid is not None:
        mask &= p.valid[:, None, None, :]
    return mask


def branch_mask(p):
    """Which keys the linear branch would cover: (B, Hk, Q, K) bool."""
    p = on(p, "cpu")
    i, j = positions(p)
    distance = i[:, None] - j
    mask = torch.ones(*p.k.shape[:2], *distance.shape, dtype=torch.bool)
    if isinstance(p.where, Ranges):
        for g, w in enumerate(p.where.sizes):
            mask[:, g] &= False if w < 0 else (distance >= w if p.causal else distance.abs() >= w)
        return mask
    mask &= ~block_mask(p)[1]
    if p.causal:
        bq, bk = p.where.block
        first = torch.arange(p.q.shape[2]) // bq * bq + p.k.shape[2] - p.q.shape[2]
        end = (torch.arange(p.k.shape[2]) // bk + 1) * bk  # one past the last key of the block
        mask &= end <= first[:, None]
    return mask


def extra_mask(p):
    """Which of the further keys each row reads: (B, Hk, Q, P) bool."""
    p = on(p, "cpu")
    i = positions(p)[0][:, None]
    mask = torch.zeros(*p.extra.at.shape[:2], p.q.shape[2], p.extra.at.shape[2], dtype=torch.bool)
    for g, w in enumerate(p.where.sizes):
        at = p.extra.at[:, g, None, :].long()  # (B, 1, P)
        if w >= 0:
            mask[:, g] = (at <= i - w) if p.causal else ((at <= i - w) | (at >= i + w))
            mask[:, g] &= at != EMPTY
    return mask


# -------------------------------------------------------------------------------------------------- mixed attention


def cap(s, softcap):
    return softcap * torch.tanh(s / softcap) if softcap else s


def wide(x):
    """In fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def with_ones(v):
    return torch.cat([v, torch.ones_like(v[..., :1])], -1)


def mixed_reference(p, branch=None):
    """`Mixed` of the problem, in the dtype of its tensors."""
    if p.varlen is not None:
        return packed_reference(p, branch)
    (b, heads, rows, dim), groups = p.q.shape, p.k.shape[1]
    per = heads // groups
    device, dtype = p.q.device, p.q.dtype

    def repeat(x):
        return x.repeat_interleave(per, 1)

    s = cap(p.scale * wide(p.q @ repeat(p.k).transpose(-1, -2)), p.softcap)
    s = s.masked_fill(~repeat(softmax_mask(p)).to(device), -math.inf)
    values = repeat(p.v)
    if p.extra is not None:
        t = cap(p.scale * wide(p.q @ repeat(p.extra.k).transpose(-1, -2)), p.softcap)
        s = torch.cat([s, t.masked_fill(~repeat(extra_mask(p)).to(device), -math.inf)], -1)
        values = torch.cat([values, repeat(p.extra.v)], -2)
    if p.sink_logits is not None:
        s = torch.cat([s, p.sink_logits.to(s.dtype)[:, None, None].expand(b, heads, rows, 1)], -1)
        values = torch.cat([values, torch.zeros_like(values[..., :1, :])], -2)
    a = None if branch is None else residual(p, branch)  # (B, Ht·G, Q, D + 1)
    m = s.detach().amax(-1, keepdim=True) if s.shape[-1] else s.new_full((b, heads, rows, 1), -math.inf)
    if branch is not None and branch.shared:
        for h, t in branch_heads(branch, per):
            m[:, h] = m[:, h].maximum(branch.weight[t].detach().to(m.dtype))
    m = m.masked_fill(m == -math.inf, 0)
    e = (s - m).exp()
    num, den = wide(e.to(dtype) @ values), e.sum(-1)
    if branch is not None and branch.shared:
        more = [torch.zeros_like(with_ones(num[:, h])) for h in range(heads)]
        for h, t in branch_heads(branch, per):
            more[h] = (branch.weight[t].to(m.dtype) - m[:, h]).exp() * a[:, t]
        more = torch.stack(more, 1)
        num, den = num + more[..., :dim], den + more[..., dim]
    o = (num / den.masked_fill(den == 0, 1)[..., None]).masked_fill(den[..., None] == 0, 0)
    lse = (m[..., 0] + den.masked_fill(den == 0, 1).log()).masked_fill(den == 0, -math.inf)
    linear = norm = None
    if branch is not None and not branch.shared:
        linear, norm = (a[..., :dim] / (a[..., dim:] + EPS)).to(dtype), a[..., dim]
    state = None if branch is None else final_state(p, branch)
    return Mixed(o=o.to(dtype), lse=lse, linear=linear, den=norm, state=state)


def packed_reference(p, branch):
    parts = []
    for n, (rows, keys, one) in enumerate(sequences(p)):
        tail = branch
        if branch is not None:
            state = None if branch.state is None else branch.state[n : n + 1]
            tail = dataclasses.replace(branch, fq=branch.fq[:, :, rows], fk=branch.fk[:, :, keys], state=state)
        parts.append(mixed_reference(one, tail))
    joined = {
        name: None if getattr(parts[0], name) is None else torch.cat([getattr(x, name) for x in parts], 2)
        for name in ("o", "lse", "linear", "den")
    }
    return Mixed(**joined)


def branch_heads(branch, per):
    """(query head, row of the branch) of each query head that has a branch."""
    return [(g * per + x, t * per + x) for g, t in enumerate(branch.index) if t >= 0 for x in range(per)]


def residual(p, branch):
    """A_i of the definition: (B, Ht·G, Q, D + 1)."""
    per, dtype = p.q.shape[1] // p.k.shape[1], p.q.dtype
    mask = branch_mask(p).to(p.q.device)
    out = [None] * branch.fq.shape[1]
    for g, t in enumerate(branch.index):
        for x in range(per if t >= 0 else 0):
            fq = branch.fq[:, t * per + x].to(dtype)
            scores = (fq @ branch.fk[:, t].to(dtype).transpose(-1, -2)).masked_fill(~mask[:, g], 0)
            a = wide(scores) @ wide(with_ones(p.v[:, g]))
            if branch.state is not None:
                a = a + wide(fq) @ branch.state[:, t].to(a.dtype)
            out[t * per + x] = a
    return torch.stack(out, 1)


def final_state(p, branch):
    """What the keys before the window of the row after the last have added up to: (B, Ht, F, D + 1)."""
    if not (p.causal and isinstance(p.where, Ranges)):
        return None
    dtype = p.q.dtype
    out = [None] * branch.fk.shape[1]
    for g, t in enumerate(branch.index):
        if t < 0:
            continue
        w, keys = p.where.sizes[g], p.k.shape[2]
        left = max(keys - w, 0) if w >= 0 else 0  # keys j ≤ K − 1 − w
        out[t] = wide(branch.fk[:, t, :left].to(dtype)).transpose(-1, -2) @ wide(with_ones(p.v[:, g, :left]))
        if branch.state is not None:
            out[t] = out[t] + branch.state[:, t].to(out[t].dtype)
    return torch.stack(out, 1)


def output_gradients(rng, p, branch=None):
    """Random (do, dlinear). Rows whose separate branch reads next to nothing get none: 1 / EPS drowns all else."""
    do = normal(rng, *p.q.shape, dtype=p.q.dtype).to(p.q.device)
    if branch is None or branch.shared:
        return do, None
    exact = mixed_reference(double(p), double(branch))
    dlinear = normal(rng, *exact.linear.shape, dtype=p.q.dtype).to(p.q.device)
    return do, dlinear.masked_fill(exact.den[..., None] < 1e-2, 0)


def mixed_gradients(p, branch, do, dlinear=None):
    """By autograd through the reference, in the dtype of p: a dict named as `MixedGradients` and more."""
    p, branch = leaves(p), None if branch is None else leaves(branch)
    out = mixed_reference(p, branch)
    loss = (out.o * do.to(out.o.dtype)).sum()
    if out.linear is not None and dlinear is not None:
        loss = loss + (out.linear * dlinear.to(out.linear.dtype)).sum()
    inputs = {"q": p.q, "k": p.k, "v": p.v}
    if p.extra is not None:
        inputs |= {"extra_k": p.extra.k, "extra_v": p.extra.v}
    if p.sink_logits is not None:
        inputs["sink_logits"] = p.sink_logits
    if branch is not None:
        inputs |= {"fq": branch.fq, "fk": branch.fk}
        inputs |= {n: getattr(branch, n) for n in ("weight", "state") if getattr(branch, n) is not None}
    return gradients(loss, inputs)


def gradients(loss, inputs):
    found = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    return {n: torch.zeros_like(x) if d is None else d for (n, x), d in zip(inputs.items(), found, strict=True)}


# ---------------------------------------------------------------------------------------------------- linear attention


def linear_reference(p):
    """(o, den (B, H, Q), final state or None), in the dtype of v."""
    if p.varlen is not None:
        parts = [linear_reference(one) for _, _, one in sequences(p)]
        o, den = (torch.cat([part[x] for part in parts], 2) for x in (0, 1))
        return o, den, torch.cat([part[2] for part in parts]) if p.causal else None
    per, dtype, dim = p.fq.shape[1] // p.fk.shape[1], p.v.dtype, p.v.shape[3]
    mask = torch.ones(p.fq.shape[2], p.fk.shape[2], dtype=torch.bool)
    if p.causal:
        mask = mask.tril()
    fq, fk = p.fq.to(dtype), p.fk.to(dtype)
    scores = fq @ fk.repeat_interleave(per, 1).transpose(-1, -2)
    values = wide(with_ones(p.v))
    a = wide(scores.masked_fill(~mask.to(scores.device), 0)) @ values.repeat_interleave(per, 1)
    if p.state is not None:
        a = a + wide(fq) @ p.state.to(a.dtype).repeat_interleave(per, 1)
    o = a[..., :dim] / (a[..., dim:] + EPS) if p.normalize else a[..., :dim]
    state = None
    if p.causal:
        state = wide(fk).transpose(-1, -2) @ values
        state = state if p.state is None else state + p.state.to(state.dtype)
    return o.to(dtype), a[..., dim], state


def linear_gradients(p, do):
    """{fq, fk, v, state} by autograd, in the dtype of p."""
    p = leaves(p)
    inputs = {"fq": p.fq, "fk": p.fk, "v": p.v} | ({} if p.state is None else {"state": p.state})
    o = linear_reference(p)[0]
    return gradients((o * do.to(o.dtype)).sum(), inputs)


# --------------------------------------------------------------------------------------------------------------- decode


def decode_reference(p, received=False):
    """One token per sequence: (B, H, 1, D), in the dtype of q; with `received` also what the late slots were given."""
    b, heads, _, dim = p.q.shape
    groups = sum(part.k.shape[1] for part in p.parts)
    per, dtype = heads // groups, p.q.dtype
    out, all_given = torch.zeros_like(p.q), []
    for part in p.parts:
        given = None
        if part.late is not None:
            given = wide(p.q).new_zeros(part.k.shape[:3])
            all_given.append(given)
        for x in range(part.k.shape[1] * per):
            h, g = part.first * per + x, x // per
            q, k, v = p.q[:, h, 0], part.k[:, g, : part.used], part.v[:, g, : part.used]  # (B, D), (B, used, D)
            a = None
            if part.state is not None:
                fq = wide(part.fq[:, x].to(dtype))
                a = (fq[:, None] @ part.state[:, g].to(fq.dtype))[:, 0]  # (B, D + 1)
            if part.weight is None and part.state is not None:
                out[:, h, 0] = a[:, :dim] / (a[:, dim:] + EPS)
                continue
            s = cap(p.scale * wide((k @ q[..., None])[..., 0]), p.softcap)  # (B, used)
            if part.mask is not None:
                s = s.masked_fill(~part.mask[:, : part.used], -math.inf)
            others = [p.sink_logits[h]] if p.sink_logits is not None else []
            others += [part.weight[x]] if a is not None else []
            m = torch.cat([s, *(c.to(s.dtype).expand(b, 1) for c in others), s.new_full((b, 1), -1e30)], -1)
            m = m.amax(-1, keepdim=True)
            e = (s - m).exp()
            num, den = wide((e.to(dtype)[:, None] @ v)[:, 0]), e.sum(-1, keepdim=True)
            if p.sink_logits is not None:
                den = den + (p.sink_logits[h].to(m.dtype) - m).exp()
            if a is not None:
                c = (part.weight[x].to(m.dtype) - m).exp()
                num, den = num + c * a[:, :dim], den + c * a[:, dim:]
            out[:, h, 0] = num / den.masked_fill(den == 0, 1)
            if given is not None:
                share = e / den.masked_fill(den == 0, 1)
                given[:, g, : part.used] += share.masked_fill(~part.late[:, : part.used], 0)
    return (out, all_given) if received else out


# ------------------------------------------------------------------------------------------------------------ retention


def retain_reference(p, held=False):
    """Token by token over a whole sequence without memory. o; with `held` also what each (row, group) holds at the end.

    `held[b][g]` is a dict: `scores` {position: score}, `kept` (positions, of the block of the last token), `last`.
    """
    b, heads, _, _ = p.q.shape
    groups = p.k.shape[1]
    o = torch.zeros_like(p.q)
    all_held = [[{} for _ in range(groups)] for _ in range(b)]
    for bi in range(b):
        for g in range(groups):
            all_held[bi][g] = retain_one(p, o, bi, g, heads // groups)
    return (o, all_held) if held else o


def retain_one(p, o, bi, g, per):
    columns = {int(at): c for c, at in enumerate(p.at[bi].tolist()) if at >= 0}  # position to column
    score, kept, older = {}, [], []
    for i in range(len(columns)):
        a = i // p.block * p.block
        recent = [j for j in range(max(a - p.window + p.block, 0), i + 1) if j >= p.sinks]
        older = [j for j in range(max(a - p.window + p.block, 0)) if j >= p.sinks]
        kept = sorted(older, key=lambda j: (-score.get(j, 0.0), j))[: p.keep]
        sinks = list(range(min(p.sinks, i + 1)))
        read = sinks + kept + recent
        where = [columns[j] for j in read]
        for h in range(g * per, (g + 1) * per):
            s = cap(p.scale * wide(p.k[bi, g, where] @ p.q[bi, h, columns[i]]), p.softcap)
            if p.sink_logits is not None:
                s = torch.cat([s, p.sink_logits[h : h + 1].to(s.dtype)])
            prob = s.softmax(-1)[: len(read)]
            o[bi, h, columns[i]] = prob.to(o.dtype) @ p.v[bi, g, where]
            for j, weight in zip(read, prob.tolist(), strict=True):
                if j in recent and i - j >= p.window // 2:
                    score[j] = score.get(j, 0.0) + weight
    return {"scores": score, "kept": sorted(kept), "last": len(columns) - 1}


# ------------------------------------------------------------------------------------------------------------ selection


def select_scores(p):
    """Shares of the key blocks, (B, Hk, NQ, NK), 0 where causality forbids, and that mask (NQ, NK)."""
    (_, heads, rows, _), (groups, keys) = p.q.shape, p.k.shape[1:3]
    bq, bk = p.block
    q = p.q.unflatten(1, (groups, heads // groups)).mean(2)
    qm = torch.stack([q[:, :, n : n + bq].mean(2) for n in range(0, rows, bq)], 2)
    km = torch.stack([p.k[:, :, n : n + bk].mean(2) for n in range(0, keys, bk)], 2)
    last = torch.tensor([min(n + bq, rows) - 1 + keys - rows for n in range(0, rows, bq)])
    begin = torch.arange(0, keys, bk)
    allowed = (begin <= last[:, None]) if p.causal else torch.ones(len(last), len(begin), dtype=torch.bool)
    s = (p.scale * qm @ km.transpose(-1, -2)).masked_fill(~allowed, -math.inf)
    return s.softmax(-1).nan_to_num(0.0), allowed


def select_reference(p):
    """The chosen key blocks as sets, result[b][g][n]; what must be there comes first and counts towards `keep`."""
    shares, allowed = select_scores(double(p))
    rows, keys = p.q.shape[2], p.k.shape[2]
    bq, bk = p.block
    out = []
    for b in range(shares.shape[0]):
        out.append([[set() for _ in range(shares.shape[2])] for _ in range(shares.shape[1])])
        for g in range(shares.shape[1]):
            for n in range(shares.shape[2]):
                start, stop = (min(x, rows) + keys - rows for x in (n * bq, (n + 1) * bq))  # positions of its rows
                there = [c for c in range(shares.shape[3]) if allowed[n, c]]
                must = [c for c in there if c < p.first or (p.causal and c * bk < stop and (c + 1) * bk > start)]
                others = sorted((c for c in there if c not in must), key=lambda c: -float(shares[b, g, n, c]))
                taken, held = list(must), sum(float(shares[b, g, n, c]) for c in must)
                for c in others:
                    if (len(taken) >= p.keep) if p.mass is None else (held >= p.mass):
                        break
                    taken.append(c)
                    held += float(shares[b, g, n, c])
                out[b][g][n] = set(taken)
    return out


def listed(blocks, b, groups):
    """The lists of a `Blocks` as sets: result[b][g][n]."""
    starts, counts, columns = blocks.starts.tolist(), blocks.counts.tolist(), blocks.columns.tolist()
    return [
        [
            [columns[s : s + c] for s, c in zip(starts[x % len(starts)][g % len(starts[0])], row, strict=True)]
            for g, row in ((g, counts[x % len(starts)][g % len(starts[0])]) for g in range(groups))
        ]
        for x in range(b)
    ]


# ------------------------------------------------------------------------------------------------------------- features


def features_reference(x, kind, weights=()):
    """Feature maps φ(x), (B, H, S, D) → (B, H, S, F), in the dtype of x."""
    if kind == "hedgehog":
        y = x @ weights[0].to(x.dtype)
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1).clamp_min(1e-12)
    if kind == "poly":
        w1, b1, w2, b2 = (w.to(x.dtype) for w in weights)
        terms = []
        for n in range(w1.shape[0]):
            hidden = F.gelu(x @ w1[n] + b1[n][:, None, :])
            terms.append(F.softplus(hidden @ w2[n] + b2[n][:, None, :]) ** (n + 1))
        return torch.cat(terms, -1)
    return {"elu1": lambda: F.elu(x) + 1, "relu": lambda: F.relu(x), "softmax": lambda: x.softmax(-1)}[kind]()


def feature_weights(rng, kind, heads, dim, dtype=torch.float32, degrees=2, hidden=24, width=16):
    if kind == "hedgehog":
        return (normal(rng, heads, dim, dim, dtype=dtype, spread=dim**-0.5),)
    if kind == "poly":
        shapes = ((dim, hidden), (hidden,), (hidden, width), (width,))
        return tuple(normal(rng, degrees, heads, *s, dtype=dtype, spread=s[0] ** -0.5) for s in shapes)
    return ()


# -------------------------------------------------------------------------------------------------------- case builders


def windows(sizes, device="cpu"):
    return Ranges(sizes=tuple(sizes), window=torch.tensor(sizes, dtype=torch.int32, device=device))


def random_windows(rng, groups, keys, zero=True):
    """One window per group: no limit (−1), 0, 1, small, about the length. One group at least has a limit."""
    options = [-1, 1, 2, randint(rng, 1, 40), max(keys - 1, 1), keys, keys + 3] + ([0] if zero else [])
    sizes = [choose(rng, options) for _ in range(groups)]
    sizes[randint(rng, 0, groups - 1)] = randint(rng, 1, max(keys // 2, 1))
    return windows(sizes)


def softmax_case(
    rng,
    *,
    where=None,
    batch=1,
    heads=4,
    groups=2,
    rows=65,
    keys=None,
    dim=32,
    dtype=torch.float32,
    causal=True,
    valid=False,
    extra=0,
    softcap=0.0,
    sink_logits=False,
    varlen=None,
    views=False,
    spread=1.0,
    device="cpu",
):
    """A random `Softmax`. `where` is a tuple of windows, `Blocks` or None (random windows); `extra` a number of slots.

    `varlen` is a list of (rows, keys) per sequence; `rows` and `keys` are then their sums. `views` makes q, k, v views
    of wider tensors with NaN between. `spread` scales q: 1e4 gives logits that only a maximum survives.
    """
    packed = None
    if varlen is not None:
        batch, (lq, lk) = 1, zip(*varlen, strict=True)
        cu_q, cu_k = (torch.tensor([0, *lens]).cumsum(0).int().to(device) for lens in (lq, lk))
        packed = Varlen(cu_q=cu_q, cu_k=cu_k, max_q=max(lq), max_k=max(lk))
        rows, keys = sum(lq), sum(lk)
    keys = rows if keys is None else keys
    q = normal(rng, batch, heads, rows, dim, dtype=dtype, spread=spread)
    k, v = (normal(rng, batch, groups, keys, dim, dtype=dtype) for _ in range(2))
    q, k, v = (strided(x) if views else x for x in (q, k, v))
    if where is None:
        where = random_windows(rng, groups, keys)
    elif isinstance(where, tuple):
        where = windows(where)
    p = Softmax(
        q=q,
        k=k,
        v=v,
        scale=dim**-0.5,
        causal=causal,
        where=where,
        valid=padded(rng, batch, keys) if valid else None,
        varlen=packed,
        extra=extra_case(rng, batch, groups, extra, dim, keys, dtype) if extra else None,
        softcap=softcap,
        sink_logits=normal(rng, heads) if sink_logits else None,
    )
    return on(p, device)


def padded(rng, batch, keys):
    """Left padding of random width, the whole row for one in eight, and a hole somewhere."""
    valid = torch.ones(batch, keys, dtype=torch.bool)
    for b in range(batch):
        valid[b, : keys if randint(rng, 0, 7) == 0 else randint(rng, 0, keys // 2)] = False
        valid[b, randint(rng, 0, keys - 1)] = False
    return valid


def extra_case(rng, batch, groups, slots, dim, keys, dtype):
    """Slots at the first positions, at positions before the first key, in the middle of the keys, and empty."""
    at = torch.randint(-7, keys, (batch, groups, slots), generator=rng, dtype=torch.int32)
    at[..., 0] = 0
    at[torch.rand(at.shape, generator=rng) < 0.2] = EMPTY
    k, v = (normal(rng, batch, groups, slots, dim, dtype=dtype) for _ in range(2))
    return Extra(k=k, v=v, at=at)


def branch_case(rng, p, *, features=32, index=None, shared=True, state=False, dtype=None, views=False):
    """A random `Branch` for p: positive features, zero those of invalid keys.

    By default every group has it that has a window, but for one if that leaves some. `state` only where p allows it.
    """
    (b, heads, rows, dim), (groups, keys) = p.q.shape, p.k.shape[1:3]
    per, dtype = heads // groups, dtype or p.q.dtype
    if index is None:
        sizes = p.where.sizes if isinstance(p.where, Ranges) else [1] * groups
        chosen = [g for g in range(groups) if sizes[g] >= 0]
        if len(chosen) == groups > 1:
            chosen.remove(choose(rng, chosen))
        index = tuple(chosen.index(g) if g in chosen else -1 for g in range(groups))
    ht = max(index) + 1
    fq = normal(rng, b, ht * per, rows, features).softmax(-1).to(dtype)
    fk = normal(rng, b, ht, keys, features).softmax(-1).to(dtype)
    if p.valid is not None:
        fk = fk * p.valid.cpu()[:, None, :, None]
    held = torch.cat([normal(rng, b, ht, features, dim), normal(rng, b, ht, features, 1).abs()], -1) if state else None
    branch = Branch(
        fq=strided(fq) if views else fq,
        fk=strided(fk) if views else fk,
        index=tuple(index),
        groups=torch.tensor(index, dtype=torch.int32),
        shared=shared,
        weight=normal(rng, ht * per) if shared else None,
        state=held,
    )
    return on(branch, p.q.device)


def blocks_case(
    rng, *, batch=1, groups=2, rows=65, keys=None, block=(32, 32), density=0.5, partial=True, empty=True, device="cpu"
):
    """Random lists with their transpose: some rows empty, some blocks partial, one pattern with only its last key."""
    keys = rows if keys is None else keys
    bq, bk = block
    nq, nk = -(-rows // bq), -(-keys // bk)
    named = torch.rand(batch, groups, nq, nk, generator=rng) < density
    if empty:
        named[:, :, randint(rng, 0, nq - 1)] &= torch.rand(batch, groups, nk, generator=rng) < 0.2
    patterns = torch.rand(4, bq, bk, generator=rng) < 0.5
    patterns[0] = False
    patterns[0, :, -1] = True
    patterns[1, bq // 2 :] = False  # rows without a key
    patterns[2] &= torch.rand(bq, bk, generator=rng) < 0.05  # scattered, as of a small disc
    kind = torch.randint(-1, 4, named.shape, generator=rng) if partial else torch.full(named.shape, -1)
    starts, counts, columns, kinds = lists(named, kind)
    t_starts, t_counts, t_columns, t_kinds = lists(named.transpose(-1, -2), kind.transpose(-1, -2))
    blocks = Blocks(
        block=block,
        starts=starts,
        counts=counts,
        columns=columns,
        kinds=kinds if partial else None,
        patterns=pack(patterns) if partial else None,
        t_starts=t_starts,
        t_counts=t_counts,
        t_columns=t_columns,
        t_kinds=t_kinds if partial else None,
    )
    return on(blocks, device)


def lists(named, kind):
    """Lists of a (B, H, N, M) bool: starts, counts, columns, kinds, all int32."""
    counts = named.sum(-1)
    starts = counts.flatten().cumsum(0).reshape(counts.shape) - counts
    columns = torch.arange(named.shape[-1]).expand(named.shape)[named]
    return starts.int(), counts.int(), columns.int(), kind[named].int()


def linear_case(
    rng,
    *,
    batch=1,
    heads=4,
    groups=2,
    rows=65,
    keys=None,
    features=32,
    dim=32,
    dtype=torch.float32,
    causal=True,
    normalize=True,
    state=False,
    varlen=None,
    views=False,
    device="cpu",
):
    """A random `Linear`; `varlen` as in `softmax_case`."""
    packed = None
    if varlen is not None:
        batch, (lq, lk) = 1, zip(*varlen, strict=True)
        cu_q, cu_k = (torch.tensor([0, *lens]).cumsum(0).int() for lens in (lq, lk))
        packed = Varlen(cu_q=cu_q, cu_k=cu_k, max_q=max(lq), max_k=max(lk))
        rows, keys = sum(lq), sum(lk)
    keys = rows if keys is None else keys
    fq = normal(rng, batch, heads, rows, features).softmax(-1).to(dtype)
    fk = normal(rng, batch, groups, keys, features).softmax(-1).to(dtype)
    v = normal(rng, batch, groups, keys, dim, dtype=dtype)
    fq, fk, v = (strided(x) if views else x for x in (fq, fk, v))
    held = None
    if state:
        count = batch if varlen is None else len(varlen)
        held = [normal(rng, count, groups, features, dim), normal(rng, count, groups, features, 1).abs()]
        held = torch.cat(held, -1)
    return on(
        Linear(fq=fq, fk=fk, v=v, causal=causal, normalize=normalize, state=held, varlen=packed),
        device,
    )


def decode_case(
    rng,
    *,
    batch=2,
    per=2,
    dim=32,
    features=32,
    dtype=torch.float32,
    sizes=((1, 40), (2, 7)),
    kinds=("cache", "hybrid"),
    masked=True,
    late=False,
    softcap=0.0,
    sink_logits=False,
    device="cpu",
):
    """A random `Decode`: parts of `sizes` (groups, slots), each cache, hybrid or linear. Unused slots are NaN.

    With `late`, parts of plain caches ask for what random slots received.
    """
    parts, first = [], 0
    for (groups, slots), kind in zip(sizes, kinds, strict=True):
        k, v = (normal(rng, batch, groups, slots, dim, dtype=dtype) for _ in range(2))
        used = 0 if kind == "linear" else randint(rng, 1, slots)
        k[:, :, used:] = math.nan
        v[:, :, used:] = math.nan
        mask = None
        if masked and kind != "linear":
            mask = torch.rand(batch, slots, generator=rng) < 0.7
            mask[:, 0] = True
        more = {}
        if kind == "cache" and late:
            more["late"] = torch.rand(batch, slots, generator=rng) < 0.5
        if kind != "cache":
            state = [normal(rng, batch, groups, features, dim), normal(rng, batch, groups, features, 1).abs()]
            more = {
                "fq": normal(rng, batch, groups * per, features).softmax(-1).to(dtype),
                "state": torch.cat(state, -1),
                "weight": normal(rng, groups * per) if kind == "hybrid" else None,
            }
        parts.append(Part(first=first, k=k, v=v, used=used, mask=mask, **more))
        first += groups
    p = Decode(
        q=normal(rng, batch, first * per, 1, dim, dtype=dtype),
        parts=tuple(parts),
        scale=dim**-0.5,
        softcap=softcap,
        sink_logits=normal(rng, first * per) if sink_logits else None,
    )
    return on(p, device)


def retain_case(
    rng,
    *,
    batch=2,
    heads=4,
    groups=2,
    rows=70,
    dim=32,
    dtype=torch.float32,
    window=16,
    keep=4,
    sinks=2,
    block=8,
    padding="left",
    softcap=0.0,
    sink_logits=False,
    device="cpu",
):
    """A random `Retain` of a whole sequence, without memory; `padding` is left, right or none."""
    at = torch.arange(rows, dtype=torch.int32).repeat(batch, 1)
    for b in range(batch):
        pad = randint(rng, 0, rows // 2) if padding != "none" and b else 0
        if pad and padding == "left":
            at[b] = torch.arange(rows) - pad
        at[b, rows - pad :] = -1 if padding == "right" and pad else at[b, rows - pad :]
    p = Retain(
        q=normal(rng, batch, heads, rows, dim, dtype=dtype, spread=2.0),
        k=normal(rng, batch, groups, rows, dim, dtype=dtype),
        v=normal(rng, batch, groups, rows, dim, dtype=dtype),
        at=at.clamp_min(-1),
        scale=dim**-0.5,
        window=window,
        keep=keep,
        sinks=sinks,
        block=block,
        softcap=softcap,
        sink_logits=normal(rng, heads) if sink_logits else None,
    )
    return on(p, device)


def pooled_case(
    rng,
    *,
    batch=1,
    heads=4,
    groups=2,
    rows=200,
    keys=None,
    dim=32,
    dtype=torch.float32,
    causal=True,
    block=(32, 32),
    keep=2,
    mass=None,
    first=0,
    device="cpu",
):
    """A random `Pooled`, with q and k spread so that the pooled scores differ."""
    q = normal(rng, batch, heads, rows, dim, dtype=dtype, spread=4.0)
    k = normal(rng, batch, groups, rows if keys is None else keys, dim, dtype=dtype, spread=4.0)
    scale = dim**-0.5
    p = Pooled(q=q, k=k, scale=scale, causal=causal, block=block, keep=keep, mass=mass, first=first)
    return on(p, device)


# ----------------------------------------------------------------------------------------------------------- tolerance

ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
CAP = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def assert_close(got, exact, plain=None, *, name="o", dtype=None, limit=None, factor=2):
    """The error of `got` against fp64 `exact`: at most `factor` times that of `plain` math in that dtype, plus one ulp.

    Both the largest and the root mean square error are held to it. Without `plain`, or where that overflowed, an error
    of CAP[dtype] is allowed, times the largest value where that is above one. `limit`, absolute, holds beside either.
    Infinities must stand in the same places; NaN never passes.
    `dtype` is that of the inputs where it is not that of `got` (an fp32 lse of bf16 inputs).
    """
    dtype = dtype or (got.dtype if plain is None else plain.dtype)
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    got, exact = got.detach().cpu().double(), exact.detach().cpu().double()
    nan = got.isnan()
    assert not nan.any(), f"{name}: {int(nan.sum())} of {nan.numel()} are NaN, first at {first(nan)}"
    infinite = exact.isinf()
    wrong = (got.isinf() | infinite) & (got != exact)
    assert not wrong.any(), f"{name}: infinite where it should not be or the other way round, first at {first(wrong)}"
    if not exact.numel() or infinite.all():
        return
    got, exact = got.masked_fill(infinite, 0), exact.masked_fill(infinite, 0)
    scale = max(float(exact.abs().max()), 1e-3)
    error = (got - exact).abs()
    bounds = {"cap": (max(scale, 1.0) * CAP[dtype], math.inf)}
    if plain is not None:
        loss = (plain.detach().cpu().double().masked_fill(infinite, 0) - exact).abs()
        slack = ROUNDING[dtype] * scale
        if loss.isfinite().all():  # else it overflowed in this dtype, which says nothing
            bounds = {"plain": (factor * float(loss.max()) + slack, factor * rms(loss) + slack / 2)}
    if limit is not None:
        bounds["limit"] = (limit, math.inf)
    for reason, (largest, mean) in bounds.items():
        at = first(error == error.max())
        assert float(error.max()) <= largest, (
            f"{name}: error {float(error.max()):.3g} at {at} (got {float(got[at]):.6g}, exact {float(exact[at]):.6g}); "
            f"allowed by {reason}: {largest:.3g}"
        )
        assert rms(error) <= mean, f"{name}: root mean square error {rms(error):.3g}, allowed by {reason}: {mean:.3g}"


def first(mask):
    return tuple(int(x) for x in mask.nonzero()[0])


def rms(x):
    return float(x.square().mean().sqrt())


def check_mixed(got, p, branch=None):
    """A `Mixed` against the reference, field by field."""
    exact, plain = mixed_reference(double(p), double(branch)), mixed_reference(p, branch)
    for name in ("o", "lse", "linear", "den", "state"):
        x, y, z = (getattr(m, name) for m in (got, exact, plain))
        assert (x is None) == (y is None), f"{name} is {'missing' if x is None else 'not expected'}"
        if y is not None and huge(p):  # a logit of 1e4 is only known to 1e-3 in fp32, and a probability no better
            assert x.isfinite().equal(y.isfinite()), f"{name} is not finite where it should be, or the other way round"
            wrong = (x.double() - y).masked_fill(~y.isfinite(), 0).abs().max()
            assert wrong <= 0.05 * y.masked_fill(~y.isfinite(), 0).abs().max().clamp(min=1), (
                f"{name}: error {wrong:.3g}"
            )
        elif y is not None:
            assert_close(x, y, z, name=name, dtype=p.q.dtype)
    assert got.o.dtype == p.q.dtype
    assert got.lse.dtype == (torch.float64 if p.q.dtype == torch.float64 else torch.float32)


def huge(p):
    """Whether one logit decides each row, so that all else is rounding."""
    return bool(p.q.numel()) and float(p.q.detach().abs().max()) > 100


def check_gradients(got, p, branch, do, dlinear=None, names=None):
    """`MixedGradients` (or a dict) against autograd through the fp64 reference."""
    exact = mixed_gradients(double(p), double(branch), do.double(), None if dlinear is None else dlinear.double())
    plain = mixed_gradients(p, branch, do, dlinear)
    for name in names or ("q", "k", "v", "extra_k", "extra_v", "fq", "fk"):
        x = got.get(name) if isinstance(got, dict) else getattr(got, name)
        if name not in exact:
            assert x is None, f"gradient of {name} is not expected"
            continue
        assert x is not None, f"the gradient of {name} is missing"
        y, z = exact[name], plain[name]
        if name == "fk" and p.valid is not None:  # the caller has zeroed these: it drops their gradients, if finite
            assert x.isfinite().all(), "dfk is not finite at keys that are not valid"
            x, y, z = (t.masked_fill(~p.valid[:, None, :, None], 0) for t in (x, y, z))
        assert_close(x, y, z, name=f"d{name}", dtype=p.q.dtype, factor=10 if huge(p) else 2)
