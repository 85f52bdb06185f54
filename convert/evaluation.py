"""Evaluate: the student against the teacher, in quality, retrieval, memory and speed.

Quality is KL to the teacher and perplexity on held-out text and exact answers to needle cases of another template
than the profile's, together: each alone is blind to something. Speed is measured side by side, teacher and student in
turns in this process.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import operators
from ..kernels.call import Shape
from ..kernels.spec import Full, Spec, Window
from .errors import GateMissed
from .hosts import models
from .hosts.caches import OperatorLayer
from .hosts.sites import Site
from .passages import Passages
from .text import Needles, kl

if TYPE_CHECKING:
    from .masking import Masked
    from .progress import Track
    from .recipe import Gates

CHUNK = 256  # positions whose logits are compared at once in fp32


@torch.no_grad()
def quality(teacher: Any, student: Any, ids: Tensor, batch: int, track: Track, title: str) -> dict[str, float]:
    """KL(teacher ‖ student) in nats per token and the perplexities of both on ids (n, S)."""
    total = {"kl": 0.0, "student": 0.0, "teacher": 0.0}
    for rows in track(ids.split(batch), title):
        rows = rows.to(teacher.device)
        want, got = (model(rows, use_cache=False).logits for model in (teacher, student))
        for start in range(0, rows.shape[1] - 1, CHUNK):
            target = rows[:, start + 1 : start + 1 + CHUNK]
            stop = start + target.shape[1]
            p, q = (x[:, start:stop].float().log_softmax(-1) for x in (want, got))
            total["kl"] += kl(p, q).sum().item()
            for name, x in (("teacher", p), ("student", q)):
                total[name] += F.nll_loss(x.flatten(0, 1), target.flatten(), reduction="sum").item()
    tokens = ids.shape[0] * (ids.shape[1] - 1)
    ppl = {name: float(torch.tensor(total[name] / tokens).exp()) for name in ("student", "teacher")}
    return {
        "kl": total["kl"] / tokens,
        "perplexity": ppl["student"],
        "teacher_perplexity": ppl["teacher"],
        "perplexity_ratio": ppl["student"] / ppl["teacher"],
    }


@torch.no_grad()
def encoding(teacher: Any, student: Any, ids: Tensor, batch: int, track: Track, title: str) -> dict[str, float]:
    """How near an encoder's answers are to the teacher's on ids (n, S).

    `cosine` is the mean similarity of sentence embeddings, `cosine_least` the lowest, `rank` the rank correlation of
    the similarities between any two of the texts, `error` the squared error of the last hidden states over their
    square; with a head `kl`, of the tokens, in nats per token.
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    total = {"error": 0.0, "square": 0.0, "kl": 0.0}
    for rows in track(ids.split(batch), title):
        rows = rows.to(teacher.device)
        want, got = (models.trunk(model)(rows).last_hidden_state.float() for model in (teacher, student))
        pairs.append((models.pooled(teacher, want), models.pooled(teacher, got)))
        total["error"] += (got - want).square().sum().item()
        total["square"] += want.square().sum().item()
        if models.has_head(teacher):
            p, q = (model(rows).logits.float().log_softmax(-1) for model in (teacher, student))
            total["kl"] += kl(p, q).sum().item()
    known, new = (torch.cat(side) for side in zip(*pairs, strict=True))  # (n, C)
    cosines = F.cosine_similarity(known, new)
    found = {
        "cosine": cosines.mean().item(),
        "cosine_least": cosines.min().item(),
        "error": total["error"] / total["square"],
    }
    if len(ids) > 2:
        found["rank"] = _rank_correlation(known, new)
    return found | ({"kl": total["kl"] / ids.numel()} if models.has_head(teacher) else {})


def _rank_correlation(known: Tensor, new: Tensor) -> float:
    """Spearman's, of the cosine similarities between any two rows (n, C): which texts are near, whatever the scale."""
    from scipy.stats import spearmanr

    first, second = torch.triu_indices(len(known), len(known), 1)
    sides = [F.normalize(x, dim=-1) @ F.normalize(x, dim=-1).T for x in (known, new)]
    return float(spearmanr(*(side.cpu()[first, second].numpy() for side in sides)).statistic)


@torch.no_grad()
def filling(teacher: Any, student: Any, texts: Masked, batch: int, track: Track, title: str) -> dict[str, float]:
    """How well an encoder with a head fills in what is masked, beside the teacher.

    `masked` is the share of masks whose likeliest token is the right one, `teacher_masked` the teacher's, `masked_kept`
    the one over the other, and `masked_same` the share that both fill alike.
    """
    answers: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    for rows, hidden in zip(track(texts.shown.split(batch), title), texts.hidden.split(batch), strict=True):
        for name, model in (("student", student), ("teacher", teacher)):
            answers[name].append(model(rows.to(model.device)).logits.argmax(-1).cpu()[hidden])
    right = texts.ids[texts.hidden]
    student_says, teacher_says = (torch.cat(answers[name]) for name in ("student", "teacher"))
    found, known = ((says == right).double().mean().item() for says in (student_says, teacher_says))
    same = (student_says == teacher_says).double().mean().item()
    kept = {"masked_kept": found / known} if known else {}
    return {"masked": found, "teacher_masked": known, "masked_same": same, **kept}


@torch.no_grad()
def search(model: Any, passages: Passages, track: Track, title: str) -> dict[str, float]:
    """Share of facts that find their passage first, among the bank's."""
    cases = track(range(len(passages)), title)
    hits = [passages.answers(model, n)[-1].argmax().item() == passages.target(n).item() for n in cases]
    return {"exact": statistics.fmean(hits), "cases": len(hits), "length": passages.ids.shape[1]}


@torch.no_grad()
def retrieval(model: Any, needles: Needles, batch: int, track: Track, title: str) -> dict[str, float]:
    """Share of needle cases answered exactly, and of single answer tokens ("digits").

    A greedy answer is exact if and only if each of its tokens is the likeliest after the right ones before it, so one
    forward pass per case decides.
    """
    right = []
    at = needles.answer[0]
    assert bool((needles.answer == at).all()), "every case ends with its answer"
    for rows in track(needles.ids.split(batch), title):
        rows = rows.to(model.device)
        guess = models.logits_at(model, rows, at.to(model.device) - 1).argmax(-1)
        right.append((guess == rows[:, at]).cpu())
    hits = torch.cat(right)
    return {
        "exact": hits.all(1).double().mean().item(),
        "digits": hits.double().mean().item(),
        "cases": len(hits),
        "length": needles.ids.shape[1],
    }


def costs(plan: Mapping[Site, Sequence[Spec]], length: int, element: int) -> dict[str, float]:
    """Of a plan's attention at this length, by the cost model: cache bytes and FLOPs of a prefill, per sequence."""
    kv_bytes = flops = 0.0
    for site, specs in plan.items():
        shape = Shape(queries=site.heads // site.kv_heads, dim=site.dim, element=element, causal=site.causal)
        for spec in specs:
            own = Window(size=site.limit, sinks=0) if spec == Full() and site.limit is not None else spec
            cost = operators.of(own).prefill_cost(own, shape, length)
            kv_bytes, flops = kv_bytes + cost.state_bytes, flops + cost.flops
    return {"kv_bytes": kv_bytes, "flops": flops}


def cache_bytes(cache: Any) -> int:
    """Bytes that a cache holds, measured on its tensors."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, OperatorLayer):
            total += layer.state_bytes()
        else:
            total += sum(x.numel() * x.element_size() for x in (layer.keys, layer.values) if x is not None)
    return total


@torch.no_grad()
def speed(
    teacher: Any, student: Any, lengths: Sequence[int], repeats: int, decode_tokens: int, track: Track
) -> dict[str, Any]:
    """Prefill seconds and milliseconds per decoded token at each length, batch 1: medians of interleaved repeats."""
    both = {"teacher": teacher, "student": student}
    decode_tokens = 0 if models.is_encoder(teacher) else decode_tokens
    jobs = [(length, repeat) for length in sorted(lengths) for repeat in range(repeats)]
    times: dict[tuple[int, str], list[tuple[float, float]]] = {}
    held: dict[tuple[int, str], int] = {}
    models.require_positions(teacher, max(lengths) + decode_tokens)
    for model in both.values():  # first calls allocate and choose kernels
        _time_once(model, min(256, *lengths), min(2, decode_tokens))
    for length, repeat in track(jobs, "speed"):
        order = list(both) if repeat % 2 == 0 else list(both)[::-1]
        for name in order:
            prefill, decode, held[length, name] = _time_once(both[name], length, decode_tokens)
            times.setdefault((length, name), []).append((prefill, decode))
    result: dict[str, Any] = {}
    for length in sorted(lengths):
        entry: dict[str, Any] = {"repeats": repeats}
        for name in both:
            prefills, decodes = zip(*times[length, name], strict=True)
            entry[name] = {"prefill_s": statistics.median(prefills)}
            if not models.is_encoder(teacher):
                entry[name] |= {"decode_ms": statistics.median(decodes) * 1e3, "kv_bytes": held[length, name]}
        entry["prefill_speedup"] = entry["teacher"]["prefill_s"] / entry["student"]["prefill_s"]
        if decode_tokens:
            entry["decode_speedup"] = entry["teacher"]["decode_ms"] / entry["student"]["decode_ms"]
        if not models.is_encoder(teacher):
            entry["kv_ratio"] = entry["student"]["kv_bytes"] / entry["teacher"]["kv_bytes"]
        result[str(length)] = entry
    return result


def _time_once(model: Any, length: int, decode_tokens: int) -> tuple[float, float, int]:
    """Seconds of a prefill, seconds per decoded token, bytes of the cache after it; encoders have the first."""
    gc.collect()
    ids = torch.arange(length, device=model.device)[None] * 7919 % model.config.get_text_config().vocab_size
    start = _now(model)
    if models.is_encoder(model):
        models.trunk(model)(ids)
        return _now(model) - start, 0.0, 0
    out = model(ids, use_cache=True, **models.last_logits(model))
    prefill = _now(model) - start
    held = cache_bytes(out.past_key_values)
    cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    start = _now(model)
    for _ in range(decode_tokens):
        out = model(token, past_key_values=cache, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    return prefill, (_now(model) - start) / max(1, decode_tokens), held


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def check_gates(gates: Gates, evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each gate of the recipe with its limit, the student's value and whether it passed."""
    student = evaluation["arms"]["student"]
    rows: list[tuple[str, float, float | None, bool]] = []

    def most(name: str, limit: float, value: float | None) -> None:  # None: it was no number, and is none in JSON
        rows.append((name, limit, value, value is not None and value <= limit))

    def least(name: str, limit: float, value: float | None) -> None:
        rows.append((name, limit, value, value is not None and value >= limit))

    for length, limit in gates.kl.items():
        most(f"kl@{length}", limit, student["quality"][str(length)].get("kl"))
    for length, limit in gates.perplexity_ratio.items():
        most(f"perplexity_ratio@{length}", limit, student["quality"][str(length)].get("perplexity_ratio"))
    for length, limit in gates.cosine.items():
        least(f"cosine@{length}", limit, student["quality"][str(length)].get("cosine"))
    for length, limit in gates.masked_kept.items():
        least(f"masked_kept@{length}", limit, student["quality"][str(length)].get("masked_kept"))
    if gates.retrieval_drop is not None:
        most("retrieval_drop", gates.retrieval_drop, student["retrieval_drop"])
    for length, limit in gates.kv_ratio.items():
        counted = evaluation["speed"].get(str(length), {}).get("kv_ratio")  # measured where a cache of this length was
        most(f"kv_ratio@{length}", limit, student["kv_ratio"].get(str(length)) if counted is None else counted)
    for length, limit in gates.prefill_speedup.items():
        least(f"prefill_speedup@{length}", limit, evaluation["speed"][str(length)]["prefill_speedup"])
    if gates.converted is not None:
        least("converted", gates.converted, student["converted"])
    return [{"name": n, "limit": limit, "value": value, "passed": ok} for n, limit, value, ok in rows]


def require_gates(document: Mapping[str, Any]) -> None:
    """Raises GateMissed, naming every gate that the student does not meet."""
    missed = [g for g in document["gates"] if not g["passed"]]
    if missed:
        values = ["not a number" if g["value"] is None else f"{g['value']:.4g}" for g in missed]
        told = "; ".join(
            f"{g['name']} is {value}, the bound is {g['limit']:g}" for g, value in zip(missed, values, strict=True)
        )
        raise GateMissed(f"{len(missed)} of {len(document['gates'])} gates missed: {told}")


def headline(document: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest says of an evaluation."""
    student = document["arms"]["student"]
    known = ("quality", "retrieval", "retrieval_drop", "kv_ratio", "flops_ratio", "converted")
    keys = [key for key in known if key in student]
    speedups = {n: {k: v for k, v in e.items() if k.endswith("speedup")} for n, e in document["speed"].items()}
    return {**{k: student[k] for k in keys}, "speed": speedups, "gates": document["gates"]}
