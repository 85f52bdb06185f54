"""Times attention layers and the rest of a model on this machine, for `costs`.

A layer is timed as the model runs it: a prefill that keeps its state, then single tokens over that state, for one and
for all KV groups of every operator. Operators take turns, so that what disturbs the machine disturbs all alike. The
samples of an operator at a length are kept in a file of their own: what was interrupted continues, and an operator
that is added later is timed alone. The rest of a model is what it takes with attention that answers at once.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels import dispatch, operators
from ..kernels.call import Call, map_state, state_bytes
from ..kernels.spec import Full, Spec, label, spec_to_dict
from .costs import MACHINE, Costs
from .costs_model import PHASES, Layer, Row
from .files import read_json, stored, write_json
from .hosts import models, surgery
from .hosts.sites import Site, SiteOperators, all_full, refusal
from .machine import hardware, versions

if TYPE_CHECKING:
    from .progress import Track

Clock = Callable[[], float]  # seconds, when all that was asked of the device is done
STEPS = 16  # tokens of a decode sample: retention's blocks begin once in so many
SAMPLE_S = 0.002  # shorter calls are repeated until a sample takes as long
ENOUGH_S = 0.5  # cheap calls are sampled more often, until they took this together,
MOST = 4  # but at most so many times `repeats`
SLOW_S = 1.0  # on a CPU the first call counts as a sample if it takes longer: there is nothing to warm up
TWICE_S = 20.0  # what takes longer is sampled at most twice
COLD_BYTES = 64 * 2**20  # decode steps go round the caches of several layers, as a model's do, up to this size
CACHES = 16
WARM_TOKENS = 40


def here(device: str | torch.device) -> dict[str, Any]:
    """The machine and all else that a time depends on: `require_costs` compares it."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.init()  # `hardware` wakes no GPU by itself
    rest = {"device": device.type, "threads": torch.get_num_threads(), "backend": dispatch.wanted(None)}
    return {**hardware(), **rest}


def wall_clock(device: torch.device) -> Clock:
    """Seconds of the clock on the wall; on a GPU when it has finished."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


@torch.no_grad()
def measure_costs(
    sites: Sequence[Site],
    candidates: Sequence[Spec],
    *,
    lengths: Sequence[int],
    batch: int,
    dtype: str,
    device: str | torch.device,
    repeats: int,
    folder: Path,
    track: Track,
    model: Any = None,
    clock: Clock | None = None,
) -> Costs:
    """Times every operator on every shape of layer at every length; with `model`, what it takes beside attention too.

    Args:
        dtype: of q, k, v, such as "bfloat16"; repeats: samples of each, at least (two of what takes over 20 s);
        folder: keeps the samples, by machine, dtype, batch and version; clock: for tests.
    """
    device = torch.device(device)
    machine = here(device)
    told = {key: machine[key] for key in MACHINE}
    setup = {"machine": told, "dtype": dtype, "batch": batch, "versions": versions()}
    place = folder / _digest(setup)
    if not (place / "setup.json").exists():
        write_json(place / "setup.json", setup)
    specs = list(dict.fromkeys((Full(), *candidates)))
    layers: dict[Layer, list[Site]] = {}
    for site in sites:
        layers.setdefault(Layer.of(site), []).append(site)
    if model is not None:
        models.require_positions(model, max(lengths) + (0 if models.is_encoder(model) else STEPS))
    bench = Bench(batch, getattr(torch, dtype), device, clock or wall_clock(device), repeats)
    rows: list[Row] = []
    jobs = [(layer, length) for layer in layers for length in sorted(set(lengths))]
    for layer, length in track(jobs, "costs"):
        fitting = [spec for spec in specs if refusal(layers[layer][0], spec) is None]
        rows += bench.layer(layer, fitting, length, len(layers[layer]), place, track)
    rest = bench.rest(model, sites, sorted(set(lengths)), place, track) if model is not None else {}
    name = None if model is None else str(model.config._name_or_path or type(model).__name__)
    element = getattr(torch, dtype).itemsize
    return Costs(
        machine=machine,
        dtype=dtype,
        batch=batch,
        lengths=tuple(sorted(set(lengths))),
        element=element,
        sites=tuple(sites),
        candidates=tuple(specs[1:]),
        rows=tuple(rows),
        rest=rest,
        model=name,
    )


@dataclass
class Job:
    """An operator on some KV groups at one length.

    q (B, H, S, D), k, v (B, Hk, S, D) are those of its groups. Known after the first calls: the `state` after the
    prefill, the `wanted` samples of each phase, the `calls` that a prefill sample makes and the `caches` that decode
    steps go round.
    """

    use: operators.Use
    q: Tensor
    k: Tensor
    v: Tensor
    layer: Layer
    samples: dict[str, list[float]]
    wanted: dict[str, int] = field(default_factory=dict)
    calls: int = 1
    caches: int = 1
    state: Any = None

    def lacks(self, phase: str) -> bool:
        return phase in self.wanted and len(self.samples[phase]) < self.wanted[phase]

    def attend(self, start: int, stop: int, seen: int, state: object) -> Any:
        """Runs the tokens [start, stop) of its inputs as those after `seen` others. → the state after them"""
        q, k, v = (x[:, :, start:stop] for x in (self.q, self.k, self.v))
        call = Call(scale=q.shape[3] ** -0.5, seen=seen, limit=self.layer.limit, causal=self.layer.causal)
        return operators.attend_all([self.use], q, k, v, call, [state])[1][0]


@dataclass(frozen=True)
class Bench:
    """Where and how it is timed. Samples are seconds of a prefill or of one token."""

    batch: int
    dtype: torch.dtype
    device: torch.device
    clock: Clock
    repeats: int

    def layer(
        self, layer: Layer, specs: Sequence[Spec], length: int, layers: int, folder: Path, track: Track
    ) -> list[Row]:
        """All operators of a layer at one length; `layers` of the model are like it."""
        files = {spec: folder / f"{_name(layer)}-{label(spec)}-{length}.json" for spec in specs}
        kept = {spec: read_json(path) for spec, path in files.items() if path.exists()}
        lacking = [spec for spec in specs if spec not in kept or kept[spec]["repeats"] < self.repeats]
        if lacking:
            self._warm(layer, lacking)
            inputs = self._inputs(layer, length)
            jobs = {
                spec: [
                    self._job(layer, spec, n, inputs, kept.get(spec, {}).get("samples", {}).get(str(n), {}))
                    for n in _counts(layer)
                ]
                for spec in lacking
            }
            self._rounds(jobs, length, layers, files, track)
        return [row for spec in specs for row in _rows(layer, spec, length, read_json(files[spec])["samples"])]

    def _rounds(
        self, jobs: Mapping[Spec, list[Job]], length: int, layers: int, files: Mapping[Spec, Path], track: Track
    ) -> None:
        """Samples in turns, until there are enough of every operator; a file is as new as its last sample."""

        def keep(spec: Spec) -> bool:
            enough = not any(job.lacks(phase) for job in jobs[spec] for phase in job.layer.phases)
            samples = {str(len(job.use.groups)): job.samples for job in jobs[spec]}
            finished = self.repeats if enough else 0
            write_json(files[spec], {"operator": spec_to_dict(spec), "repeats": finished, "samples": samples})
            return not enough

        waiting = []
        for spec in track(list(jobs), f"{length:,} tokens, first calls"):
            for job in jobs[spec]:
                self._first(job, length, layers)
            if keep(spec):
                waiting.append(spec)
        most = max(wanted for found in jobs.values() for job in found for wanted in job.wanted.values())
        for turn in track(range(most), f"{length:,} tokens"):
            start = turn % max(1, len(waiting))
            for spec in waiting[start:] + waiting[:start]:  # another one begins each time
                for job in jobs[spec]:
                    if job.lacks("prefill"):
                        job.samples["prefill"].append(self._prefill(job, length)[0])
                    if job.lacks("decode"):
                        job.samples["decode"].append(self._decode(job, length))
                if not keep(spec):
                    waiting = [other for other in waiting if other != spec]

    def _inputs(self, layer: Layer, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, S, D), k, v (B, Hk, S, D), laid out as projections leave them: the heads of a token together."""
        draw = torch.Generator(self.device).manual_seed(0)
        heads = (layer.queries * layer.kv_heads, layer.kv_heads, layer.kv_heads)
        q, k, v = (
            torch.randn((self.batch, length, n, layer.dim), generator=draw, device=self.device, dtype=self.dtype)
            for n in heads
        )
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _job(
        self, layer: Layer, spec: Spec, groups: int, inputs: tuple[Tensor, Tensor, Tensor], kept: Mapping[str, Any]
    ) -> Job:
        q, k, v = inputs
        heads = groups * layer.queries
        learned = operators.of(spec).parameters(spec, heads, groups, layer.dim)
        use = operators.Use(spec, tuple(range(groups)), None if learned is None else learned.to(self.device))
        samples = {phase: list(kept.get(phase, [])) for phase in layer.phases}
        return Job(use, q[:, :heads], k[:, :groups], v[:, :groups], layer, samples)

    def _warm(self, layer: Layer, specs: Sequence[Spec]) -> None:
        """Builds and loads what the first call of a kernel needs, outside of all timing."""
        inputs = self._inputs(layer, WARM_TOKENS)
        for spec in specs:
            job = self._job(layer, spec, layer.kv_heads, inputs, {})
            state = job.attend(0, WARM_TOKENS, 0, None)
            if layer.causal:
                job.attend(0, 1, WARM_TOKENS, state)

    def _first(self, job: Job, length: int, layers: int) -> None:
        """The first calls: how long they take says how many samples there shall be."""
        once, job.state = self._prefill(job, length)
        slow = once > SLOW_S and self.device.type == "cpu"
        if not slow:  # which may have compiled, and met memory for the first time
            once, job.state = self._prefill(job, length)
        job.wanted["prefill"] = self._enough(once)
        if slow and job.lacks("prefill"):
            job.samples["prefill"].append(once)
        job.calls = max(1, math.ceil(SAMPLE_S / max(once, 1e-6)))
        if not job.layer.causal:
            return
        job.caches = max(1, min(CACHES, layers, math.ceil(COLD_BYTES / max(1, state_bytes(job.state)))))
        job.wanted["decode"] = self._enough(self._decode(job, length) * STEPS * job.caches)

    def _enough(self, once: float) -> int:
        """Samples of a call that takes so long: more of the cheap ones."""
        if once > TWICE_S:
            return min(2, self.repeats)
        return max(self.repeats, min(MOST * self.repeats, math.ceil(ENOUGH_S / max(once, 1e-6))))

    def _prefill(self, job: Job, length: int) -> tuple[float, Any]:
        """Seconds of a prefill, and the state after it."""
        start = self.clock()
        for _ in range(job.calls):
            state = job.attend(0, length, 0, None)
        return (self.clock() - start) / job.calls, state

    def _decode(self, job: Job, length: int) -> float:
        """Seconds of one token after `length`, the mean of STEPS."""
        states = [map_state(job.state, torch.clone) for _ in range(job.caches)]
        start = self.clock()
        for step in range(STEPS):
            at = step % length
            for n in range(job.caches):
                states[n] = job.attend(at, at + 1, length + step, states[n])
        return (self.clock() - start) / (STEPS * job.caches)

    def rest(
        self, model: Any, sites: Sequence[Site], lengths: Sequence[int], folder: Path, track: Track
    ) -> dict[str, dict[int, float]]:
        """ms of the model with attention that answers at once: {phase: {length: ms}}."""
        who = [type(model).__name__, str(model.config._name_or_path), model.num_parameters(), [s.name for s in sites]]
        phases = PHASES[:1] if models.is_encoder(model) else PHASES
        found: dict[str, dict[int, float]] = {phase: {} for phase in phases}
        with surgery.converted(model, all_full(sites)) as conversion, conversion.observe(_answer_at_once):
            for length in track(lengths, "rest of the model"):
                path = folder / f"rest-{_digest(who)}-{self.repeats}-{length}.json"
                samples = stored(path, functools.partial(self._rest_samples, model, length))
                for phase in phases:
                    found[phase][length] = 1e3 * statistics.median(samples[phase])
        return found

    def _rest_samples(self, model: Any, length: int) -> dict[str, list[float]]:
        """Seconds of several passes; the first counts where it is slow."""
        passes = [self._pass(model, length)]
        once = passes[0]["prefill"]
        if once <= SLOW_S or self.device.type != "cpu":
            passes = []
        passes += [self._pass(model, length) for _ in range(self._enough(once) - len(passes))]
        return {phase: [one[phase] for one in passes] for phase in passes[0]}

    def _pass(self, model: Any, length: int) -> dict[str, float]:
        """Seconds of a prefill, and where the model generates of a token after it."""
        vocabulary = model.config.get_text_config().vocab_size
        ids = (torch.arange(length, device=self.device) * 7919 % vocabulary).expand(self.batch, -1)
        start = self.clock()
        if models.is_encoder(model):
            models.trunk(model)(ids)
            return {"prefill": self.clock() - start}
        out = model(ids, use_cache=True, **models.last_logits(model))
        prefill = self.clock() - start
        cache, token = out.past_key_values, ids[:, :1]
        start = self.clock()
        for _ in range(STEPS):
            model(token, past_key_values=cache, use_cache=True)
        return {"prefill": prefill, "decode": (self.clock() - start) / STEPS}


def _answer_at_once(site: SiteOperators, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """An observer: zeros for attention, while the cache counts its tokens and holds none. → (B, H, Q, D)"""
    layer = site.layer
    site.called_with(None)
    if layer is not None:
        layer.claim(site, 0)
        layer.seen += q.shape[2]
    return q.new_zeros(1).expand(q.shape)


def _counts(layer: Layer) -> list[int]:
    return list(dict.fromkeys((1, layer.kv_heads)))


def _name(layer: Layer) -> str:
    own = ("" if layer.limit is None else f"-own{layer.limit}") + ("" if layer.causal else "-both")
    return f"{layer.queries}x{layer.kv_heads}x{layer.dim}{own}"


def _rows(layer: Layer, spec: Spec, length: int, samples: Mapping[str, Any]) -> Iterator[Row]:
    for groups, phases in samples.items():
        for phase in layer.phases:
            times = phases[phase]
            middle = statistics.median(times)
            low, _, high = statistics.quantiles(times) if len(times) > 1 else (middle, middle, middle)
            spread = (high - low) / middle if middle > 0 else 0.0
            yield Row(phase, layer, spec, int(groups), length, 1e3 * middle, len(times), spread)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
