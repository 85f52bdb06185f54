"""What every operator costs at every site: timed on this machine, the rest filled in by an analytic model.

All costs are of the whole batch. FLOPs (of a prefill) and cache bytes come from the operators themselves; milliseconds
come from `costs_measure`, and where nothing was timed from the roofline of `costs_model`, which `Costs.check` holds
against the timed layers. Costs add up: what a plan takes is the rest of the model, the launches of every layer and its
KV groups. In a prefill each kind of operator in a layer has a launch. In decoding all operators of a layer share one:
its cost is spread over the groups, which every layer has all of, and a kind's launch is what it takes beyond.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..kernels.spec import Full, Spec, label, spec_from_dict, spec_to_dict
from .costs_model import PHASES, Layer, Model, Row, group_work, kind, layer_title, line
from .errors import UsageError
from .hosts.sites import Site, refusal

if TYPE_CHECKING:
    from rich.console import Group as Shown

    from .profiling import Profile

__all__ = ["RESOURCES", "Costs", "analytic", "kind", "plan_cost", "require_costs"]

SCHEMA = 1
RESOURCES = ("prefill_ms", "decode_ms", "flops", "kv_bytes")
ENCODING = ("prefill_ms", "flops")  # what there is of a model that reads in both directions
TIMES = {"prefill_ms": "prefill", "decode_ms": "decode"}
MACHINE = ("system", "cpu", "cores", "gpu", "device", "threads", "backend")  # what a time depends on
BUSY = 0.2  # spread of the samples beyond which a machine was busy
FILLED = "≈"  # marks in tables what was not timed


@dataclass(frozen=True)
class Costs:
    """What every (site, operator) costs per KV group, what a kind of operator costs per layer, and the rest.

    `rows` are the timed layers, `rest[phase][length]` ms of the model without attention; both may be empty, and then
    only FLOPs and bytes are known. `element` is bytes per cached number; `model` says whose rest it is. `grid` and
    `text` are of an image or video model: its tokens at the size that was profiled, and how many the prompt has.
    """

    machine: dict[str, Any]
    dtype: str
    batch: int
    lengths: tuple[int, ...]
    element: int
    sites: tuple[Site, ...]
    candidates: tuple[Spec, ...]
    rows: tuple[Row, ...] = ()
    rest: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    model: str | None = None
    grid: tuple[int, ...] = ()
    text: int = 0

    def group_cost(self, resource: str, site: Site, spec: Spec, length: int) -> float:
        """Of one KV group of the site: ms, FLOPs or bytes of the whole batch.

        Raises:
            UsageError: a time is asked for and nothing was timed.
        """
        layer = Layer.of(site)
        if resource in TIMES:
            shared = self._shared(resource, layer, length) / layer.kv_heads
            return self._model(resource).group(layer, spec, length) + shared
        layout = site.layout(scaled(self.grid, length), self.text) if site.axes else None
        tokens = length if layout is None else layout.tokens
        work = group_work("prefill", layer, spec, tokens, self.element, layout)
        return self.batch * (work.flops if _known(resource) == "flops" else work.state_bytes)

    def launch_cost(self, resource: str, site: Site, kind: str, length: int) -> float:
        """Of a layer in which any KV group has an operator of this kind; FLOPs and bytes have no launch."""
        if _known(resource) not in TIMES:
            return 0.0
        layer = Layer.of(site)
        own = self._model(resource).launch(layer, kind, length)
        return max(0.0, own - self._shared(resource, layer, length))

    def base(self, resource: str, length: int) -> float:
        """Everything that is not attention, in ms; 0 for FLOPs and bytes, and where no model was timed."""
        timed = self.rest.get(TIMES.get(_known(resource), ""), {})
        return line(timed, length, grows=resource == "prefill_ms") if timed else 0.0

    def measured(self, resource: str, site: Site, spec: Spec, length: int) -> bool:
        """Whether this was timed; otherwise the analytic model says it."""
        return resource in TIMES and bool(self.rows) and self._model(resource).timed(Layer.of(site), spec, length)

    def _shared(self, resource: str, layer: Layer, length: int) -> float:
        """ms of the launch that all operators of a layer share: in decoding, that of the cheapest kind."""
        model = self._model(resource)
        return min(model.launch(layer, name, length) for name in model.kinds) if resource == "decode_ms" else 0.0

    def _model(self, resource: str) -> Model:
        model = self._models[TIMES[resource]]
        if not model.rows:
            raise UsageError(f"{resource} is not known: no time was measured here; run `attnconvert costs` first")
        return model

    @functools.cached_property
    def _models(self) -> dict[str, Model]:
        return {phase: Model(phase, self.rows, self.batch, self.element) for phase in PHASES}

    @property
    def notes(self) -> list[str]:
        """What a reader of the table should know."""
        found = [note for model in self._models.values() for note in model.clamped()]
        spread = statistics.median([row.spread for row in self.rows if row.samples > 2] or [0.0])
        if spread > BUSY:
            found.append(
                f"the machine was busy: half the samples of a layer lie {spread:.0%} of its time apart; where that "
                "is too much, measure again into a new folder"
            )
        if self.rows and not self.rest:
            found.append("the rest of the model was not timed: times are those of attention alone")
        return found

    def check(self) -> list[dict[str, Any]]:
        """Every timed layer against what the model says without it: {"resource", "operator", "length", "left_out",
        "measured", "predicted", "ratio" (predicted ÷ measured)}, in ms of a layer whose groups all have the operator.

        Left out is once everything at its length ("length": what filling another length risks) and once everything of
        its operator ("operator": what filling another operator risks; never full attention, which is always timed).
        """
        found = []
        for resource, phase in TIMES.items():
            mine = [row for row in self.rows if row.phase == phase and row.groups == row.layer.kv_heads]
            for what, key in (("length", _length), ("operator", _operator)):
                for value in dict.fromkeys(key(row) for row in mine if key(row) != Full()):
                    rest = tuple(row for row in self.rows if row.phase == phase and key(row) != value)
                    if rest:
                        without = Model(phase, rest, self.batch, self.element)
                        tested = [row for row in mine if key(row) == value]
                        found += [_checked(resource, what, row, without) for row in tested]
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain data for costs.json; `from_json` reads it back."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            "schema": SCHEMA,
            **plain,
            "lengths": list(self.lengths),
            "sites": [dataclasses.asdict(site) for site in self.sites],
            "candidates": [spec_to_dict(spec) for spec in self.candidates],
            "rows": [row.to_json() for row in self.rows],
            "rest": {phase: {str(n): ms for n, ms in timed.items()} for phase, timed in self.rest.items()},
        }

    @staticmethod
    def from_json(given: Mapping[str, Any]) -> Costs:
        """The inverse of `to_json`.

        Raises:
            UsageError: it is no such table.
        """
        if not isinstance(given, Mapping) or given.get("schema") != SCHEMA or "rows" not in given:
            raise UsageError(f"this is no table of costs of schema {SCHEMA}: run `attnconvert costs` again")
        fields = {f.name: given[f.name] for f in dataclasses.fields(Costs)}
        fields["lengths"], fields["grid"] = tuple(given["lengths"]), tuple(given["grid"])
        fields["sites"] = tuple(Site(**site) for site in given["sites"])
        fields["candidates"] = tuple(spec_from_dict(spec) for spec in given["candidates"])
        fields["rows"] = tuple(Row.from_json(row) for row in given["rows"])
        fields["rest"] = {phase: {int(n): ms for n, ms in timed.items()} for phase, timed in given["rest"].items()}
        return Costs(**fields)


def _known(resource: str) -> str:
    if resource not in RESOURCES:
        raise ValueError(f"no resource {resource!r}; known are {', '.join(RESOURCES)}")
    return resource


def _length(row: Row) -> object:
    return row.length


def _operator(row: Row) -> object:
    return row.spec


def _checked(resource: str, what: str, row: Row, without: Model) -> dict[str, Any]:
    launch = without.launch(row.layer, kind(row.spec), row.length)
    predicted = launch + row.groups * without.group(row.layer, row.spec, row.length)
    return {
        "resource": resource,
        "operator": label(row.spec),
        "length": row.length,
        "left_out": what,
        "measured": row.ms,
        "predicted": predicted,
        "ratio": predicted / row.ms,
    }


def check_summary(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By "resource, left out": median and worst factor (at least 1) between predicted and measured, and of how many."""
    factors: dict[str, list[tuple[float, str]]] = {}
    for row in rows:
        factor = max(row["ratio"], 1 / row["ratio"]) if row["ratio"] > 0 else float("inf")
        where = f"{row['operator']} at {row['length']:,} tokens"
        factors.setdefault(f"{row['resource']}, {row['left_out']} left out", []).append((factor, where))
    return {
        name: {
            "median": statistics.median(factor for factor, _ in found),
            "worst": max(found)[0],
            "where": max(found)[1],
            "rows": len(found),
        }
        for name, found in factors.items()
    }


def scaled(grid: Sequence[int], tokens: int) -> tuple[int, ...]:
    """The grid of that many tokens with the proportions of this one; the frames of a video stay.

    Raises:
        UsageError: there is none in whole numbers.
    """
    frames = math.prod(grid[:-2])
    height, width = grid[-2:]
    found = round(height * math.sqrt(tokens / (frames * height * width)))
    wide = round(found * width / height)
    if found < 1 or frames * found * wide != tokens:
        least = height // math.gcd(height, width), width // math.gcd(height, width)
        sizes = [frames * least[0] * least[1] * n * n for n in (8, 16, 32, 64)]
        raise UsageError(
            f"no image of the proportions {height}×{width} has {tokens:,} tokens: give a number such as "
            f"{', '.join(f'{n:,}' for n in sizes)}"
        )
    return (*grid[:-2], found, wide)


def analytic(
    sites: Iterable[Site],
    candidates: Iterable[Spec],
    lengths: Sequence[int],
    batch: int,
    element: int,
    grid: Sequence[int] = (),
    text: int = 0,
) -> Costs:
    """FLOPs and bytes without a clock; `element` is bytes per cached number. Times then raise UsageError."""
    known = tuple(sites), tuple(candidates)
    return Costs({}, "", batch, tuple(lengths), element, *known, grid=tuple(grid), text=text)


def of_profile(profile: Profile, lengths: Sequence[int]) -> Costs:
    """FLOPs and bytes of what was profiled."""
    data = profile.data
    where = data.get("grid", ()), data.get("text", 0) if "grid" in data else 0
    return analytic(profile.sites, profile.candidates.values(), lengths, 1, data.get("element", 2), *where)


def plan_cost(costs: Costs, resource: str, plan: Mapping[Site, Sequence[Spec]], length: int) -> float:
    """Of a whole plan: the rest of the model, one launch for each kind in each layer, and every KV group."""
    total = costs.base(resource, length)
    for site, specs in plan.items():
        kinds = dict.fromkeys(kind(spec) for spec in specs)
        total += sum(costs.launch_cost(resource, site, name, length) for name in kinds)
        total += sum(costs.group_cost(resource, site, spec, length) for spec in specs)
    return total


def require_costs(
    costs: Costs, machine: Mapping[str, Any], dtype: str, batch: int, sites: Sequence[Site] | None = None
) -> None:
    """Refuses a table that says nothing about this work; `machine` is `costs_measure.here(device)`.

    Raises:
        UsageError: nothing was timed, or on another machine, in another dtype, at another batch, for another model.
    """
    again = "run `attnconvert costs` here"
    if not costs.rows:
        raise UsageError(f"the table of costs holds no times; {again}")
    # Without a GPU at work nobody knows its name, and on the CPU it does not matter
    both = [key for key in MACHINE if key in costs.machine and key in machine]
    both = [key for key in both if key != "gpu" or "cuda" in (costs.machine.get("device"), machine.get("device"))]
    for key in both:
        if costs.machine[key] != machine[key]:
            raise UsageError(
                f"the costs were measured on another machine: {key} was {costs.machine[key]!r}, here it is "
                f"{machine[key]!r}; {again}"
            )
    for name, measured, wanted in (("dtype", costs.dtype, dtype), ("batch", costs.batch, batch)):
        if measured != wanted:
            raise UsageError(f"the costs were measured with {name} {measured}, this asks for {wanted}; {again}")
    if sites is not None and [Layer.of(s) for s in sites] != [Layer.of(s) for s in costs.sites]:
        raise UsageError(f"the costs were measured for another model ({costs.model or 'unnamed'}); {again}")


def costs_document(costs: Costs) -> dict[str, Any]:
    """What `attnconvert costs` says, as plain data: a table for each shape of layer, the rest, and the check."""
    tables = []
    for layer, sites in _layers(costs).items():
        fitting = [spec for spec in dict.fromkeys((Full(), *costs.candidates)) if not refusal(sites[0], spec)]
        rows = [_entry(costs, sites[0], spec, length) for length in costs.lengths for spec in fitting]
        tables.append({**dataclasses.asdict(layer), "layers": [site.layer for site in sites], "rows": rows})
    checked = costs.check()
    return {
        "machine": costs.machine,
        "dtype": costs.dtype,
        "batch": costs.batch,
        "model": costs.model,
        "lengths": list(costs.lengths),
        "tables": tables,
        "rest": {
            name: {str(n): costs.base(name, n) for n in costs.lengths}
            for name, phase in TIMES.items()
            if phase in costs.rest
        },
        "check": {"summary": check_summary(checked), "rows": checked},
        "notes": costs.notes,
    }


def _layers(costs: Costs) -> dict[Layer, list[Site]]:
    found: dict[Layer, list[Site]] = {}
    for site in costs.sites:
        found.setdefault(Layer.of(site), []).append(site)
    return found


def _entry(costs: Costs, site: Site, spec: Spec, length: int) -> dict[str, Any]:
    """Every resource of a layer whose KV groups all have this operator, its share of full attention's, its origin."""
    entry: dict[str, Any] = {"operator": label(spec), "length": length}
    for name in RESOURCES if site.causal else ENCODING:
        if name in TIMES and not costs.rows:
            continue
        mine, full = (
            costs.launch_cost(name, site, kind(s), length) + site.kv_heads * costs.group_cost(name, site, s, length)
            for s in (spec, Full())
        )
        entry[name] = mine
        entry[f"{name.partition('_')[0]}_ratio"] = mine / full if full > 0 else None
        if name in TIMES:
            entry[f"{TIMES[name]}_measured"] = costs.measured(name, site, spec, length)
    return entry


def costs_table(costs: Costs) -> Shown:
    """For the terminal: what a layer takes with each operator, beside full attention; ≈ is filled in, not timed."""
    from rich.console import Group as Shown
    from rich.text import Text

    from .report_html import number, tokens
    from .tables import table

    document = costs_document(costs)
    parts: list[Any] = []
    for found, (layer, sites) in zip(document["tables"], _layers(costs).items(), strict=True):
        title = layer_title(layer, [site.layer for site in sites])
        rows = [_shown(entry) for entry in found["rows"]]
        last = ["decode ms\n(of full)", "cache\n(of full)"] if layer.causal else ["FLOPs\n(of full)"]
        head = ["tokens", "operator", "prefill ms\n(of full)", *last]
        parts.append(table(title, head, rows, left=2))
    for length in costs.lengths if costs.rest else ():
        both = [
            f"{name} {number(costs.base(resource, length))} ms"
            for resource, name in TIMES.items()
            if name in costs.rest
        ]
        parts.append(Text(f"The rest of the model at {tokens(length)} tokens: {', '.join(both)}"))
    for name, found in document["check"]["summary"].items():
        said = f"Model against clock ({name}): median {found['median']:.2f}×, worst {found['worst']:.2f}×"
        parts.append(Text(f"{said} ({found['where']}), {found['rows']} layers", style="dim"))
    parts += [Text(f"Note: {note}", style="dim") for note in document["notes"]]
    return Shown(*parts)


def _shown(entry: Mapping[str, Any]) -> list[str]:
    from .report_html import NONE, number, ratio, size, tokens

    cells = [tokens(entry["length"]), entry["operator"]]
    for name, phase in TIMES.items():
        if name != "prefill_ms" and "kv_bytes" not in entry:
            return [*cells, f"{number(entry['flops'])} ({ratio(entry['flops_ratio'])})"]
        mark = "" if entry.get(f"{phase}_measured") else FILLED
        share = ratio(entry.get(f"{phase}_ratio"))
        cells.append(f"{mark}{number(entry[name])} ({share})" if name in entry else NONE)
    return [*cells, f"{size(entry['kv_bytes'])} ({ratio(entry['kv_ratio'])})"]
