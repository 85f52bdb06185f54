"""Times functions in turns: each round calls every provider once, so what disturbs the machine disturbs all alike.

A row is what the JSON files hold: case, provider, pass, dtype, shape, median_ms, p20_ms, p80_ms, samples, ratio
(median of the baseline over ours), baseline, target, met, note; and where known goal (which target), cpu_ms (time of
all threads), density and ideal (our dense time × density / time), gflops, peak_share and roofline (floor / time),
timed (`graph`: as a CUDA graph) and eager_ms (without one), difference (to another provider of the same case:
‖a − b‖ / ‖b‖). What failed keeps its row, with the error as its note and without a time.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from shapes import BACKWARD, Peaks, Shape, joined, judge

Run = Callable[[], Any]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FORWARD, BOTH, DECODE = "forward", "forward+backward", "decode"
CLOSE = {"bf16": 2e-2, "fp16": 4e-3, "fp32": 1e-3}  # differences below this are rounding
SLOW_S = 4.0  # a call that takes longer is sampled once,
ONCE_S = 12.0  # and one that takes so long on the CPU is not even made a second time


class Poisoned(RuntimeError):
    """The device fails every call from here on; `entry` is what did it."""

    def __init__(self, entry: str, error: str) -> None:
        super().__init__(error)
        self.entry = entry


@dataclass(kw_only=True)
class Entry:
    """One provider of one case. `make` prepares and returns what is timed; that makes `calls` calls at once.

    baseline: names of entries, the fastest of them counts. dense, density: our dense entry and the share of its pairs.
    same: an entry whose result must be the same. skip: why it is not measured.
    """

    case: str
    provider: str
    make: Callable[[], Run]
    baseline: tuple[str, ...] = ()
    dense: str | None = None
    density: float | None = None
    flops: float | None = None
    moved: float | None = None
    same: str | None = None
    goal: str | None = None
    note: str = ""
    skip: str | None = None
    calls: int = 1

    @property
    def name(self) -> str:
        return f"{self.provider}: {self.case}"


@dataclass(kw_only=True)
class Group:
    """Entries over the same inputs, measured together."""

    phase: str
    dtype: str
    shape: Shape
    entries: list[Entry] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{self.shape.model}, {self.shape.tokens} tokens, {self.phase}, {self.dtype}"

    def add(self, case: str, provider: str, make: Callable[[], Run], **more: Any) -> str:
        """Another entry; its name."""
        entry = Entry(case=case, provider=provider, make=make, **more)
        if any(e.name == entry.name for e in self.entries):
            raise ValueError(f"{entry.name} is twice in {self.title}")
        self.entries.append(entry)
        return entry.name


# --------------------------------------------------------------------------------------------------------------- clocks


class Wall:
    """For the CPU: milliseconds of one call by the clock on the wall, and of all threads together."""

    compiles = False  # in the first call

    def sample(self, run: Run, times: int) -> tuple[float, float | None]:
        cpu, start = time.process_time(), time.perf_counter()
        for _ in range(times):
            run()
        wall = time.perf_counter() - start
        return 1e3 * wall / times, 1e3 * (time.process_time() - cpu) / times

    def captured(self, run: Run) -> Run | None:
        return None

    def alive(self) -> str | None:
        return None


class Cuda:
    """For the GPU: milliseconds between two events."""

    compiles = True

    def sample(self, run: Run, times: int) -> tuple[float, float | None]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(times):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / times, None

    def captured(self, run: Run) -> Run | None:
        """The same as a CUDA graph, whose replay is free of what Python costs."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            held = run()

        def replay(graph: Any = graph, held: Any = held) -> None:  # the outputs live as long as the graph
            graph.replay()

        replay()
        torch.cuda.synchronize()
        return replay

    def alive(self) -> str | None:
        """Why the device is lost, if it is."""
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            return said(error)
        return None


Clock = Wall | Cuda


def said(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


# ------------------------------------------------------------------------------------------------------------ measuring


@dataclass(kw_only=True)
class Timed:
    """What is known of an entry."""

    entry: Entry
    run: Run | None = None
    once: float = 0.0
    error: str | None = None
    notes: list[str] = field(default_factory=list)
    samples: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    eager: float | None = None
    graph: bool = False
    difference: float | None = None

    @property
    def median(self) -> float | None:
        return statistics.median(self.samples) / self.entry.calls if self.samples else None


def measure(
    group: Group,
    clock: Clock,
    *,
    seconds: float,
    rounds: tuple[int, int] = (3, 15),
    sample_ms: float = 2.0,
    peaks: Peaks | None = None,
    machine: str | None = None,
    without: Sequence[str] = (),
    begun: Callable[[str], None] = lambda name: None,
) -> list[dict[str, Any]]:
    """The rows of a group, in about `seconds` of sampling (at least rounds[0] rounds are made).

    sample_ms: short calls are repeated until a sample is as long. without: names of entries to leave out.
    begun: told the name of each entry before it first runs.

    Raises:
        Poisoned: the device is lost.
    """
    timed = {entry.name: Timed(entry=entry) for entry in group.entries if entry.name not in without}
    with torch.set_grad_enabled(group.phase == BOTH):
        _start(timed, group, clock, begun)
        _capture([t for t in timed.values() if t.run], group, clock, begun)
        _sample([t for t in timed.values() if t.run], clock, seconds, rounds, sample_ms)
    rows = [_row(group, t, timed, peaks or Peaks(), machine) for t in timed.values()]
    timed.clear()
    gc.collect()
    if isinstance(clock, Cuda):
        torch.cuda.empty_cache()
    return rows


def _start(timed: dict[str, Timed], group: Group, clock: Clock, begun: Callable[[str], None]) -> None:
    """The first calls, which compile, and the comparison of results."""
    wanted = {t.entry.same for t in timed.values()}
    results: dict[str, list[torch.Tensor]] = {}
    for name, t in timed.items():
        if t.entry.skip is not None:
            t.error = f"not measured: {t.entry.skip}"
            continue
        begun(name)
        try:
            run = t.entry.make()
            start = time.perf_counter()
            found = _tensors(run())
            first = time.perf_counter() - start  # which may have compiled
            if not clock.compiles and first > ONCE_S:
                t.once, run = 1e3 * first, None
                t.samples.append(t.once)
                t.notes.append("timed once")
            else:
                again = clock.compiles or not 1 < first < SLOW_S
                t.once = clock.sample(run, 1)[0] if again else 1e3 * first
            if name in wanted:
                results[name] = found
            if t.entry.same in results:
                t.difference = _difference(found, results[t.entry.same])
                if not t.difference <= CLOSE[group.dtype]:
                    t.notes.append(f"WRONG: differs from {t.entry.same} by {t.difference:.2g}")
            t.run = run
        except Exception as error:  # whatever it is, the others are still to be measured
            _failed(t, error, clock)
        finally:
            found = None


def _failed(t: Timed, error: Exception, clock: Clock) -> None:
    t.run, t.samples, t.error = None, [], said(error)
    print(f"  {t.entry.name}: {t.error}", file=sys.stderr, flush=True)
    if lost := clock.alive():
        raise Poisoned(t.entry.name, joined(t.error, lost)) from error


def _tensors(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result.detach()]
    return [x.detach() for x in result if isinstance(x, torch.Tensor)] if isinstance(result, tuple | list) else []


def _difference(mine: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """The largest ‖a − b‖ / ‖b‖ over the tensors; infinite for shapes that differ."""
    if [x.shape for x in mine] != [x.shape for x in other]:
        return float("inf")
    pairs = zip(mine, other, strict=True)
    return max(float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-30)) for a, b in pairs)


def _capture(timed: list[Timed], group: Group, clock: Clock, begun: Callable[[str], None]) -> None:
    """On the GPU forward passes are timed as graphs; short ones also as they are."""
    if group.phase == BOTH or isinstance(clock, Wall):
        return
    for t in timed:
        begun(t.entry.name)
        try:
            assert t.run is not None
            if t.once / t.entry.calls < 2:
                t.eager = statistics.median(clock.sample(t.run, 3)[0] for _ in range(5)) / t.entry.calls
            captured = clock.captured(t.run)
            if captured is not None:
                t.run, t.once, t.graph = captured, clock.sample(captured, 1)[0], True
        except Exception as error:  # then it is timed with what Python costs
            t.notes.append(f"no CUDA graph, {said(error)}")
            if lost := clock.alive():
                raise Poisoned(t.entry.name, joined(said(error), lost)) from error


def _sample(timed: list[Timed], clock: Clock, seconds: float, rounds: tuple[int, int], sample_ms: float) -> None:
    if not timed:
        return
    times = {id(t): max(1, min(1000, round(sample_ms / max(t.once, 1e-4)))) for t in timed}
    quick = [t for t in timed if t.once < 1e3 * SLOW_S]
    whole = sum(t.once * times[id(t)] for t in quick) / 1e3
    count = max(rounds[0], min(rounds[1], int(seconds / max(whole, 1e-6))))
    for n in range(count):
        turn = n % len(timed)
        for t in timed[turn:] + timed[:turn]:  # another one begins each time
            if t.run is None or (t.samples and t not in quick):
                continue
            try:
                wall, cpu = clock.sample(t.run, times[id(t)])
            except Exception as error:  # as above
                _failed(t, error, clock)
                continue
            t.samples.append(wall)
            if cpu is not None:
                t.cpu.append(cpu)


# ----------------------------------------------------------------------------------------------------------------- rows


def _row(group: Group, t: Timed, timed: dict[str, Timed], peaks: Peaks, machine: str | None) -> dict[str, Any]:
    entry, median = t.entry, t.median
    row = blank(group, entry, joined(entry.note, t.error or "", *t.notes))
    if median is None:
        if entry.goal:
            judge(row, entry.goal, machine)
        return row
    low, high = quantiles([x / entry.calls for x in t.samples])
    row |= {"median_ms": figure(median), "p20_ms": figure(low), "p80_ms": figure(high), "samples": len(t.samples)}
    if t.graph:
        row["timed"] = "graph"
    if t.cpu:
        row["cpu_ms"] = figure(statistics.median(t.cpu) / entry.calls)
    if t.eager is not None:
        row["eager_ms"] = figure(t.eager)
    if t.difference is not None:
        row["difference"] = figure(t.difference)
    others = [timed[n] for n in entry.baseline if n in timed and timed[n].samples]
    if others:
        best = min(others, key=lambda other: other.median or 0.0)
        row |= {"baseline": best.entry.name, "ratio": figure((best.median or 0.0) / median)}
    dense = timed.get(entry.dense or "")
    if entry.density is not None:
        row["density"] = figure(entry.density)
        if dense is not None and dense.median is not None:
            row["ideal"] = figure(dense.median * entry.density / median)
    _against_peaks(row, entry, group, peaks, median)
    if entry.goal:
        judge(row, entry.goal, machine)
    return row


def _against_peaks(row: dict[str, Any], entry: Entry, group: Group, peaks: Peaks, median: float) -> None:
    both = group.phase == BOTH
    flops = None if entry.flops is None else entry.flops * (BACKWARD if both else 1)
    if flops:
        row["gflops"] = figure(flops / median / 1e6)
        if peaks.flops:
            row["peak_share"] = figure(flops / (median / 1e3) / peaks.flops)
    moved = entry.moved if entry.moved is None or not both else 2 * entry.moved  # the gradients of all that was read
    floor = peaks.floor_ms(flops, moved)
    if floor is not None:
        row["roofline"] = figure(floor / median)


def blank(group: Group, entry: Entry, note: str) -> dict[str, Any]:
    """A row without results."""
    return {
        "case": entry.case,
        "provider": entry.provider,
        "pass": group.phase,
        "dtype": group.dtype,
        "shape": group.shape.described(),
        "median_ms": None,
        "p20_ms": None,
        "p80_ms": None,
        "samples": 0,
        "ratio": None,
        "baseline": " or ".join(entry.baseline) or None,
        "target": None,
        "met": None,
        "note": note,
    }


def skipped(group: Group, reason: str, machine: str | None = None) -> list[dict[str, Any]]:
    """The rows of a group that was not begun."""
    rows = []
    for entry in group.entries:
        rows.append(blank(group, entry, joined(entry.note, f"not measured: {reason}")))
        if entry.goal:
            judge(rows[-1], entry.goal, machine)
    return rows


def quantiles(values: list[float]) -> tuple[float, float]:
    """The 20th and the 80th percentile."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return at(0.2), at(0.8)


def figure(value: float) -> float:
    """Four digits; more would be noise."""
    return float(f"{value:.4g}")
