"""From timed layers to the cost of a launch and of a KV group, and an analytic model for what was not timed.

A layer whose n KV groups all have one operator takes t(n) = launch + n × group. Both are solved from layers of one and
of all groups; operators that share a launch share its cost. The model behind them is a roofline,

    t = launches · t0 + n · max(FLOPs / F, bytes / Bw),

fitted per kind of operator to the timed layers and corrected per operator by what was timed at other lengths.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.optimize import least_squares, nnls

from ..kernels import operators
from ..kernels.call import Cost, Shape
from ..kernels.masks import Layout
from ..kernels.spec import Full, Spec, Window, spec_from_dict, spec_to_dict
from .hosts.sites import Site

PHASES = ("prefill", "decode")
KINDS = {"full": "mixed", "window": "mixed", "hybrid": "mixed"}  # who shares a launch; others have their own
CORRECTION = 16.0  # the most that a timed operator may differ from the roofline of its kind, either way
STARTS = ((0.0, 1.0, 1.0), (0.5, 1.0, 1.0), (0.5, 3.0, 1.0), (0.5, 1.0, 3.0))  # of the least time, the best rates


@dataclass(frozen=True)
class Layer:
    """What decides the time of a site: query heads per KV group, KV groups, head dimension, the model's own window.

    One that is not `causal` reads in both directions; nothing is decoded then.
    """

    queries: int
    kv_heads: int
    dim: int
    limit: int | None = None
    causal: bool = True

    @staticmethod
    def of(site: Site) -> Layer:
        return Layer(site.heads // site.kv_heads, site.kv_heads, site.dim, site.limit, site.causal)

    @property
    def phases(self) -> tuple[str, ...]:
        return PHASES if self.causal else PHASES[:1]


@dataclass(frozen=True)
class Row:
    """A timed layer: `groups` KV groups with one operator, ms of a prefill or of one token, of the batch.

    `ms` is the median of the samples, `spread` their interquartile range over it.
    """

    phase: str
    layer: Layer
    spec: Spec
    groups: int
    length: int
    ms: float
    samples: int
    spread: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it back."""
        return {**asdict(self), "spec": spec_to_dict(self.spec)}

    @staticmethod
    def from_json(given: Mapping[str, Any]) -> Row:
        """The inverse of `to_json`."""
        return Row(**{**given, "layer": Layer(**given["layer"]), "spec": spec_from_dict(given["spec"])})


def kind(spec: Spec) -> str:
    """The launch that an operator shares: "mixed" (full, window, hybrid), or its own name (linear, retention)."""
    name: str = spec.operator
    return KINDS.get(name, name)


def counted(spec: Spec, limit: int | None) -> Spec:
    """What full attention reads where the model has a sliding window of its own."""
    return Window(size=limit, sinks=0) if spec == Full() and limit is not None else spec


def group_work(phase: str, layer: Layer, spec: Spec, length: int, element: int, layout: Layout | None = None) -> Cost:
    """FLOPs and bytes of one KV group and one sequence: of a prefill, or of one token at this length.

    Args:
        layout: of the tokens of an image or a video, `length` in all.
    """
    spec = counted(spec, layer.limit)
    shape = Shape(
        queries=layer.queries,
        dim=layer.dim,
        element=element,
        causal=layer.causal,
        layout=layout,
        groups=layer.kv_heads,
    )
    implementation = operators.of(spec)
    count = implementation.prefill_cost if phase == "prefill" else implementation.decode_cost
    return count(spec, shape, length)


@dataclass(frozen=True)
class Derived:
    """Of one layer at one length, in ms: each kind's launch, each operator's KV group; kinds with a launch cut to 0."""

    launch: dict[str, float]
    group: dict[Spec, float]
    clamped: frozenset[str]


def derive(rows: Iterable[Row]) -> Derived:
    """Solves t(n) = launch + n × group, both at least 0, with the least relative error over the operators of a kind.

    `rows` are of one phase, layer and length. A layer with one KV group has no n to tell them apart: launch is then 0.
    """
    by_kind: dict[str, list[Row]] = {}
    for row in rows:
        by_kind.setdefault(kind(row.spec), []).append(row)
    launch: dict[str, float] = {}
    group: dict[Spec, float] = {}
    clamped = set()
    for name, members in by_kind.items():
        specs = list(dict.fromkeys(row.spec for row in members))
        told = any(len({row.groups for row in members if row.spec == spec}) > 1 for spec in specs)
        table = np.zeros((len(members), 1 + len(specs)))
        for n, row in enumerate(members):
            table[n, 0] = 1 / row.ms if told else 0.0
            table[n, 1 + specs.index(row.spec)] = row.groups / row.ms
        solved, _ = nnls(table, np.ones(len(members)))
        launch[name] = float(solved[0])
        group.update({spec: float(value) for spec, value in zip(specs, solved[1:], strict=True)})
        if told and solved[0] <= 0:
            clamped.add(name)
    return Derived(launch, group, frozenset(clamped))


@dataclass(frozen=True)
class Rates:
    """The roofline: ms of a launch, per FLOP, per byte."""

    launch: float
    per_flop: float
    per_byte: float

    def group(self, work: Cost) -> float:
        """ms of one KV group (or of a batch of them) with this work."""
        return max(work.flops * self.per_flop, work.bytes * self.per_byte)


Point = tuple[int, Cost, float]  # KV groups, the work of one of them over the batch, ms of all


def fit(points: Sequence[Point]) -> Rates:
    """The roofline closest to the timed layers in the logarithm, where an outlier counts less than its square.

    It begins at the fastest rates that were seen, below which no time can lie, so what never binds stays out of it.
    """
    groups = np.array([float(n) for n, _, _ in points])
    flops, moved = (np.array([float(getattr(work, name)) for _, work, _ in points]) for name in ("flops", "bytes"))
    times = np.array([ms for _, _, ms in points])
    least = float(times.min())
    unit = np.array([least, _fastest(times, groups * flops), _fastest(times, groups * moved)])

    def predicted(x: Any) -> Any:
        launch, per_flop, per_byte = x * unit
        return launch + groups * np.maximum(flops * per_flop, moved * per_byte)

    def error(x: Any) -> Any:
        return np.log(np.maximum(predicted(x), 1e-9 * least) / times)

    best = None
    for start in STARTS:
        found = least_squares(
            error, start, bounds=(0, np.inf), loss="soft_l1", f_scale=0.1, xtol=1e-10, ftol=1e-10, gtol=1e-10
        )
        if best is None or found.cost < best.cost:
            best = found
    assert best is not None
    launch, per_flop, per_byte = best.x * unit
    return Rates(float(launch), float(per_flop), float(per_byte))


def _fastest(times: Any, amounts: Any) -> float:
    """The least ms per unit over the rows that have any."""
    known = amounts > 0
    return float((times[known] / amounts[known]).min()) if known.any() else 0.0


class Model:
    """What the timed layers say of one phase: the roofline of every kind, and how each operator differs from it."""

    def __init__(self, phase: str, rows: Sequence[Row], batch: int, element: int) -> None:
        self.phase, self.rows, self.batch, self.element = phase, [r for r in rows if r.phase == phase], batch, element
        self.derived: dict[tuple[Layer, int], Derived] = {}
        places: dict[tuple[Layer, int], list[Row]] = {}
        for row in self.rows:
            places.setdefault((row.layer, row.length), []).append(row)
        for place, members in places.items():
            self.derived[place] = derive(members)
        self.kinds = list(dict.fromkeys(kind(row.spec) for row in self.rows))
        self._rates: dict[str, Rates] = {}
        self._filled: dict[tuple[Layer, Spec, int], float] = {}

    def work(self, layer: Layer, spec: Spec, length: int) -> Cost:
        """Of one KV group and the whole batch."""
        one = group_work(self.phase, layer, spec, length, self.element)
        flops, moved, held = (self.batch * x for x in (one.flops, one.bytes, one.state_bytes))
        return Cost(flops=flops, bytes=moved, state_bytes=held)

    def rates(self, name: str) -> Rates:
        """The roofline of a kind; where none of it was timed, that of all together."""
        if name not in self._rates:
            mine = [row for row in self.rows if kind(row.spec) == name] or self.rows
            self._rates[name] = fit([(r.groups, self.work(r.layer, r.spec, r.length), r.ms) for r in mine])
        return self._rates[name]

    def launch(self, layer: Layer, name: str, length: int) -> float:
        """ms of a launch of this kind, solved from what was timed here or else the roofline's."""
        known = self.derived.get((layer, length))
        return known.launch[name] if known and name in known.launch else self.rates(name).launch

    def timed(self, layer: Layer, spec: Spec, length: int) -> bool:
        known = self.derived.get((layer, length))
        return known is not None and spec in known.group

    def group(self, layer: Layer, spec: Spec, length: int) -> float:
        """ms of a KV group, solved from what was timed here or else filled in."""
        if self.timed(layer, spec, length):
            return self.derived[layer, length].group[spec]
        place = (layer, spec, length)
        if place not in self._filled:
            self._filled[place] = self._roofline(*place) * self._correction(*place)
        return self._filled[place]

    def _roofline(self, layer: Layer, spec: Spec, length: int) -> float:
        return self.rates(kind(spec)).group(self.work(layer, spec, length))

    def _correction(self, layer: Layer, spec: Spec, length: int) -> float:
        """Timed ÷ roofline of this operator at the lengths around this one; of its like where it was never timed."""
        mine = self._ratios((place, n, s) for (place, n), s in self._timed() if place == layer and s == spec)
        if not mine:
            mine = self._ratios((place, n, s) for (place, n), s in self._timed() if s == spec)
        if mine:
            lengths = sorted({n for n, _ in mine})
            means = [float(np.median([r for n, r in mine if n == at])) for at in lengths]
            return float(np.interp(math.log(length), np.log(lengths), means))
        like = self._ratios((place, n, s) for (place, n), s in self._timed() if s.operator == spec.operator)
        return float(np.median([r for _, r in like])) if like else 1.0

    def _timed(self) -> list[tuple[tuple[Layer, int], Spec]]:
        return [(place, spec) for place, known in self.derived.items() for spec in known.group]

    def _ratios(self, places: Iterable[tuple[Layer, int, Spec]]) -> list[tuple[int, float]]:
        found = []
        for layer, length, spec in places:
            roofline = self._roofline(layer, spec, length)
            if roofline > 0:
                timed = self.derived[layer, length].group[spec]
                found.append((length, min(CORRECTION, max(1 / CORRECTION, timed / roofline))))
        return found

    def clamped(self) -> list[str]:
        """Where launches came out below zero and were set to zero, a line for each kind."""
        found: dict[str, list[int]] = {}
        for (_, length), known in self.derived.items():
            for name in sorted(known.clamped):
                found.setdefault(name, []).append(length)
        return [
            f"{self.phase}: the launch of {name} attention came out below 0 ms at "
            f"{', '.join(f'{n:,}' for n in lengths)} tokens and is taken as 0"
            for name, lengths in found.items()
        ]


def line(points: Mapping[int, float], length: int, *, grows: bool) -> float:
    """a + b × length through what was timed, both at least 0, with the least relative error; what was timed, as it is.

    A single length does not tell a from b: all of it `grows` with the length, or none.
    """
    if length in points:
        return points[length]
    table = np.array([[1 / ms, n / ms] for n, ms in points.items()])
    if len(points) == 1:
        table[:, 0 if grows else 1] = 0.0
    solved, _ = nnls(table, np.ones(len(points)))
    return float(solved[0] + solved[1] * length)


def layer_title(layer: Layer, layers: Sequence[int]) -> str:
    """9 heads in 3 KV groups of 64 dimensions, layers 0–29."""
    own = f", own window {layer.limit:,}" if layer.limit else ""
    where = f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers from {min(layers)} to {max(layers)}"
    heads = layer.queries * layer.kv_heads
    return f"{heads} heads in {layer.kv_heads} KV groups of {layer.dim} dimensions{own}: {where}"
