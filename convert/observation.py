"""What every head attends to: statistics of sampled rows, gathered layer by layer in forward passes over text.

Of each layer only the attention of the sampled rows is ever there, (heads, rows, S), and it is gone when the next layer
runs: memory does not grow with the number of layers and never holds S × S.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import operators, span, top_blocks, window
from ..kernels.call import Call, grouped, logits
from ..kernels.spec import Full, Hybrid, Retention, Span, Spec, TopBlocks, Window
from .hosts import models, surgery
from .hosts.sites import Site, SiteOperators, all_full, refusal
from .text import Needles, Samples, samples_of

if TYPE_CHECKING:
    from .progress import Track

BLOCK = 64  # keys of a block, in block statistics
FRACTIONS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # of the blocks that a row may read
MASSES = (0.9, 0.95)
CONSTANT = 1e-12  # variance over mean square below which an output counts as constant
Table = dict[str, list[list[Any]]]  # [site][head or group]: numbers, or None where there is none
Learned = Mapping[tuple[str, str], nn.Module]  # (site name, candidate) → what the candidate learned there


class Means:
    """Running means, and where asked deviations, of per-head tensors by name and site."""

    def __init__(self) -> None:
        self.also: Means | None = None  # further means of what is added now
        self.sums: dict[str, dict[str, Tensor]] = {}
        self.squares: dict[str, dict[str, Tensor]] = {}
        self.counts: dict[tuple[str, str], int] = {}

    def add(self, name: str, site: str, value: Tensor) -> None:
        if self.also is not None:
            self.also.add(name, site, value)
        row, square = self.sums.setdefault(name, {}), self.squares.setdefault(name, {})
        value = value.detach().double().cpu()
        row[site] = row.get(site, torch.zeros_like(value)) + value
        square[site] = square.get(site, torch.zeros_like(value)) + value.square()
        self.counts[name, site] = self.counts.get((name, site), 0) + 1

    def table(self, name: str, sites: Sequence[Site]) -> list[list[Any]]:
        """[site][head]; None where nothing was added or what was added is no number."""
        return [self._cells(name, s) for s in sites]

    def variation(self, name: str, sites: Sequence[Site]) -> list[list[Any]]:
        """Standard deviation over the mean, across what was added. [site][head]"""
        return [self._cells(name, s, spread=True) for s in sites]

    def _cells(self, name: str, site: Site, spread: bool = False) -> list[Any]:
        total = self.sums.get(name, {}).get(site.name)
        if total is None:
            return [None] * site.heads
        count = self.counts[name, site.name]
        mean = total / count
        if spread:
            deviation = (self.squares[name][site.name] / count - mean.square()).clamp_min(0).sqrt()
            mean = deviation / mean.abs().clamp_min(1e-30)
        return numbers(mean)


def numbers(x: Tensor) -> list[Any]:
    """A tensor as nested lists, None where it is not finite."""
    if x.ndim > 1:
        return [numbers(row) for row in x]
    return [value if ok else None for value, ok in zip(x.tolist(), x.isfinite().tolist(), strict=True)]


@dataclasses.dataclass
class Rows:
    """Sampled query rows of one call. `at` (R,) positions, `p` (B, H, R, S) their attention, `causal` as the call."""

    at: Tensor
    p: Tensor
    causal: bool = True

    @staticmethod
    def sampled(q: Tensor, k: Tensor, call: Call, rows: int) -> Rows:
        """`rows` of them, evenly; where causal over the last three quarters, where there is something to attend to."""
        length = q.shape[2]
        first = length // 4 if call.causal else 0
        at = torch.linspace(first, length - 1, min(rows, length), device=q.device).long().unique()
        return Rows(at, probabilities(q, k, call, at), call.causal)

    def visible(self, blocks: int) -> Tensor:
        """How many of the key blocks each row may read. → (R,)"""
        return (self.at // BLOCK + 1).float() if self.causal else torch.full_like(self.at, blocks).float()


def probabilities(q: Tensor, k: Tensor, call: Call, at: Tensor) -> Tensor:
    """Attention of the rows `at` (R,) over all that they read. q (B, H, S, D), k (B, Hk, S, D) → (B, H, R, S)"""
    s = logits(grouped(q, k.shape[1])[..., at, :], k[:, :, None], call).flatten(1, 2)
    i = torch.arange(k.shape[2], device=q.device)
    distance = at[:, None] - i
    allowed = call.reach(distance)
    if call.limit is not None:
        allowed = allowed & (distance.abs() < call.limit)
    if call.valid is not None and call.layout is not None:  # the padding of a prompt
        allowed = allowed & call.valid[:, None, None]
    s = s.masked_fill(~allowed, -torch.inf)
    if call.sink_logits is None:
        return s.softmax(-1)
    sink = call.sink_logits.to(s.dtype).view(1, -1, 1, 1).expand(*s.shape[:3], 1)  # takes part, and has no value
    return torch.cat([s, sink], -1).softmax(-1)[..., :-1]


@torch.no_grad()
def text_statistics(
    model: Any,
    sites: Sequence[Site],
    texts: Tensor | Samples,
    names: Mapping[str, Spec],
    rows: int,
    learned: Learned,
    track: Track,
) -> dict[str, Any]:
    """Tier one: everything that one pass over token sequences (n, S) or other samples tells of heads and candidates.

    "bands" has the same tables for each part of the steps that a denoiser's samples are of.
    """
    samples = samples_of(texts)
    means, bands = Means(), dict[str, Means]()
    maps: dict[str, Tensor] = {}
    similarity = torch.zeros(len(sites), len(sites), dtype=torch.float64)
    problems: dict[str, str] = {}
    local = next((s.size for s in names.values() if isinstance(s, Window)), 128)

    def observe(site: SiteOperators, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        name, sampled = site.site.name, Rows.sampled(q, k, call, rows)
        _attention(means, name, sampled, local)
        maps[name] = _block_statistics(means, name, sampled, q, k)
        o, _ = operators.attend(Full(), q, k, v, call)
        scale = _variance(o, site.site, problems)
        layer = o.float().square().sum((1, 3)).mean()
        for label, spec in names.items():
            if refusal(site.site, spec):
                continue
            got, _ = operators.attend(spec, q, k, v, call, None, learned.get((name, label)))
            error = (got - o).float().square().sum(-1).mean((0, 2))
            means.add(f"error {label}", name, error / scale)
            means.add(f"change {label}", name, error / layer.clamp_min(1e-30))
            kept = kept_mass(spec, q, k, v, call, sampled)
            if kept is not None:
                means.add(f"lost {label}", name, 1 - kept)
        return o

    with surgery.converted(model, all_full(sites)) as conversion, conversion.observe(observe):
        for row in track(range(len(samples)), "statistics"):
            band = samples.band(row)
            means.also = None if band is None else bands.setdefault(band, Means())
            samples.run(model, torch.tensor([row]))
            similarity += _overlap([maps[s.name] for s in sites])
    return {
        **_tables(means, sites, names),
        "bands": {band: _tables(found, sites, names) for band, found in bands.items()},
        "curves": {
            "block": BLOCK,
            "fractions": list(FRACTIONS),
            "recall": _curves(means, sites),
        },
        "similarity": (similarity / len(samples)).tolist(),
        "problems": [problems[key] for key in sorted(problems)],
    }


def _tables(means: Means, sites: Sequence[Site], names: Mapping[str, Spec]) -> dict[str, Any]:
    plain = ("entropy", "local_mass", "sink_mass", "pooled_recall", *(f"density_{round(100 * m)}" for m in MASSES))
    first = next(iter(names))
    return {
        "statistics": {
            **{name: means.table(name, sites) for name in plain},
            "variation": means.variation(f"error {first}", sites),
        },
        "output_error": {name: means.table(f"error {name}", sites) for name in names},
        "output_change": {name: means.table(f"change {name}", sites) for name in names},
        "mass_lost": {name: means.table(f"lost {name}", sites) for name in names},
    }


def _attention(means: Means, name: str, sampled: Rows, local: int) -> None:
    p, at = sampled.p, sampled.at
    distance = (at[:, None] - torch.arange(p.shape[-1], device=p.device)).abs()
    means.add("entropy", name, -(p * p.clamp_min(1e-20).log()).sum(-1).mean((0, 2)))
    means.add("local_mass", name, (p * (distance < local)).sum(-1).mean((0, 2)))
    means.add("sink_mass", name, p[..., :4].sum(-1).mean((0, 2)))


def _variance(o: Tensor, site: Site, problems: dict[str, str]) -> Tensor:
    """Of each head's output around its mean over the tokens, (H,): what the error of a candidate is relative to.

    The denominator of DiTFastAttnV2's relative error. A constant output has none: it is reported, and its cells stay
    empty.
    """
    wide = o.float()
    variance = (wide - wide.mean(2, keepdim=True)).square().sum(-1).mean((0, 2))
    power = wide.square().sum(-1).mean((0, 2))
    for head in range(o.shape[1]):
        if not torch.isfinite(power[head]):
            problems[f"{site.layer:05d}.{head:05d}"] = f"L{site.layer}H{head} gives outputs that are not finite"
        elif variance[head] <= CONSTANT * power[head]:
            problems[f"{site.layer:05d}.{head:05d}"] = f"L{site.layer}H{head} gives the same output for every token"
    return torch.where(variance > CONSTANT * power, variance, torch.nan)


def _block_statistics(means: Means, name: str, sampled: Rows, q: Tensor, k: Tensor) -> Tensor:
    """Densities and recalls in blocks of keys. → the head-averaged block map (R, blocks), for comparing layers."""
    p = sampled.p
    blocks = -(-p.shape[-1] // BLOCK)
    mass = F.pad(p, (0, blocks * BLOCK - p.shape[-1])).unflatten(-1, (blocks, BLOCK)).sum(-1)  # (B, H, R, blocks)
    visible = sampled.visible(blocks)
    reached = mass.sort(-1, descending=True).values.cumsum(-1)
    total = reached[..., -1:].clamp_min(1e-20)
    for share in MASSES:
        needed = (reached < share * total - 1e-6).sum(-1) + 1
        means.add(f"density_{round(100 * share)}", name, (needed / visible).mean((0, 2)))
    for fraction in FRACTIONS:
        best = (visible * fraction).ceil().long() - 1  # (R,)
        index = best.view(1, 1, -1, 1).expand(*reached.shape[:2], -1, 1)
        means.add(f"recall {fraction}", name, (reached.gather(-1, index) / total)[..., 0].mean((0, 2)))
    means.add("pooled_recall", name, _pooled_recall(mass / total, sampled, q, k))
    averaged: Tensor = mass.mean(0).nanmean(0)  # a head without numbers is left out
    return averaged


def _pooled_recall(mass: Tensor, sampled: Rows, q: Tensor, k: Tensor) -> Tensor:
    """Mass that the best eighth of the blocks by mean-pooled scores holds, own and first block included. → (H,)

    What a block selection can find without looking at single keys (MoBA, Lu et al. 2025).
    """
    blocks, at = mass.shape[-1], sampled.at
    pooled = [
        F.pad(x.float(), (0, 0, 0, blocks * BLOCK - x.shape[2])).unflatten(2, (blocks, BLOCK)).mean(3) for x in (q, k)
    ]
    rows = grouped(pooled[0][:, :, at // BLOCK], k.shape[1])
    score = (rows @ pooled[1][:, :, None].transpose(-1, -2)).flatten(1, 2)  # (B, H, R, blocks)
    number = torch.arange(blocks, device=q.device)
    own = (at // BLOCK)[:, None]
    if sampled.causal:
        score = score.masked_fill(number > own, -torch.inf)
    score = score.masked_fill((number == own) | (number == 0), torch.inf)
    order = score.argsort(dim=-1, descending=True, stable=True)
    taken = number < (sampled.visible(blocks) / 8).ceil().clamp_min(1)[:, None]
    return (mass.gather(-1, order) * taken).sum(-1).mean((0, 2))


def _curves(means: Means, sites: Sequence[Site]) -> list[list[Any]]:
    tables = [means.table(f"recall {fraction}", sites) for fraction in FRACTIONS]
    return [[[table[n][h] for table in tables] for h in range(site.heads)] for n, site in enumerate(sites)]


def _overlap(maps: Sequence[Tensor]) -> Tensor:
    """Σ min over blocks of every two layers' maps, averaged over the rows: 1 where both read alike. → (L, L)

    Layers of other resolutions, as in a UNet, have nothing in common: 0.
    """
    shares = [m.double().cpu() / m.double().cpu().sum(-1, keepdim=True).clamp_min(1e-20) for m in maps]  # (R, blocks)
    alike = torch.zeros(len(maps), len(maps), dtype=torch.float64)
    for i, one in enumerate(shares):
        for j, other in enumerate(shares):
            if one.shape == other.shape:
                alike[i, j] = torch.minimum(one, other).sum(-1).mean()
    return alike


# --- what a candidate keeps -------------------------------------------------------------------------------------------


def kept_mass(spec: Spec, q: Tensor, k: Tensor, v: Tensor, call: Call, sampled: Rows) -> Tensor | None:
    """Attention mass of the sampled rows on the tokens that the candidate reads by softmax, (H,); None for linear."""
    p, at = sampled.p, sampled.at
    reads: Tensor | None = None
    if isinstance(spec, Window | Span | Hybrid):
        reads = window_reads(spec, call, at, p.shape[-1])[None, None]
    elif isinstance(spec, TopBlocks):
        reads = block_reads(spec, q, k, call, at).repeat_interleave(q.shape[1] // k.shape[1], 1)
    elif isinstance(spec, Retention):
        reads = retention_reads(spec, q, k, v, call, at).repeat_interleave(q.shape[1] // k.shape[1], 1)
    return None if reads is None else (p * reads).sum(-1).mean((0, 2))


def window_reads(spec: Window | Span | Hybrid, call: Call, at: Tensor, length: int) -> Tensor:
    """(R, S): whether row at[r] reads token s."""
    distance = at[:, None] - torch.arange(length, device=at.device)
    reached = call.reach(distance)
    if isinstance(spec, Span):
        sizes = [span.width(spec, int(i) if call.causal else length, call.limit) for i in at]
    else:
        near_spec = spec if isinstance(spec, Window) else Window(size=spec.window, sinks=spec.sinks)
        sizes = [window.width(near_spec, call)]
    near = distance.abs() < torch.tensor(sizes, device=at.device)[:, None]
    return reached & (near | (torch.arange(length, device=at.device) < spec.sinks))


def block_reads(spec: TopBlocks, q: Tensor, k: Tensor, call: Call, at: Tensor) -> Tensor:
    """(B, Hk, R, S): what each row reads of its own block and of those of its list."""
    length = k.shape[2]
    token = torch.arange(length, device=at.device) // spec.block
    found = top_blocks.lists(spec, q, k, call)
    found = F.pad(found, (0, int(token[-1]) + 1 - found.shape[3]))
    reads = found[:, :, at // spec.rows][..., token] | ((at // spec.rows * spec.rows // spec.block)[:, None] == token)
    return reads & (torch.arange(length, device=at.device) <= at[:, None]) if call.causal else reads


def retention_reads(spec: Retention, q: Tensor, k: Tensor, v: Tensor, call: Call, at: Tensor) -> Tensor:
    """(B, Hk, R, S): what each row finds in the operator's memory, by letting it run up to that row."""
    batch, groups, length = k.shape[0], k.shape[1], k.shape[2]
    reads = torch.zeros(batch, groups, len(at), length, dtype=torch.bool, device=q.device)
    state: Any = None
    for row, (start, stop) in enumerate(_steps(at)):
        part = dataclasses.replace(call, seen=start, keep=True)
        _, state = operators.attend(spec, q[:, :, start:stop], k[:, :, start:stop], v[:, :, start:stop], part, state)
        i = stop - 1
        recent = i // spec.block * spec.block - spec.window + spec.block
        reads[:, :, row, max(0, recent) : stop] = True
        reads[:, :, row, : min(spec.sinks, stop)] = True
        kept = state.at[:, :, spec.window :].long()
        found = torch.zeros(batch, groups, length, dtype=torch.int32, device=q.device)
        found.scatter_reduce_(2, kept.clamp_min(0), (kept >= 0).int(), "amax")  # empty slots point to token 0 as well
        reads[:, :, row] |= found.bool()
    return reads


def _steps(at: Tensor) -> Iterator[tuple[int, int]]:
    start = 0
    for stop in (at + 1).tolist():
        yield start, stop
        start = stop


# --- retrieval --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def retrieval_scores(model: Any, sites: Sequence[Site], tasks: Sequence[Needles], track: Track) -> list[list[Any]]:
    """Share of attention that goes, while an answer token is predicted, to that token in the text. [site][head]

    The mean over all cases of all tasks: several templates, depths and lengths.
    Source: Retrieval head (Wu et al., 2024).
    """
    means = Means()
    here: dict[str, Tensor] = {}

    def observe(site: SiteOperators, q: Tensor, k: Tensor, v: Tensor, call: Call) -> None:
        p = probabilities(q, k, call, here["answer"] - 1)  # (1, H, A, S)
        index = here["needle"].expand(p.shape[1], -1)[..., None]
        means.add("retrieval", site.site.name, p[0].gather(-1, index).mean((1, 2)))

    cases = [(task, n) for task in tasks for n in range(len(task.ids))]
    with surgery.converted(model, all_full(sites)) as conversion, conversion.observe(observe):
        for task, n in track(cases, "retrieval heads"):
            here.update(answer=task.answer[n].to(model.device), needle=task.needle[n].to(model.device))
            model(task.ids[n][None].to(model.device), use_cache=False, **models.last_logits(model))
    return means.table("retrieval", sites)
