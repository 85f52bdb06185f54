"""Hold the table of costs against whole models: `python docs/benchmarks/costs_check.py --layers 6 --out FILE`.

A random model with the layers of SmolLM2-135M is run with several plans, of one operator and of mixed layers, and what
it takes is compared with the sum that `plan_cost` says: the launches and groups of every layer and the rest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tables import save
from transformers import AutoConfig, AutoModelForCausalLM

from attnconvert.convert.costs import check_summary, plan_cost
from attnconvert.convert.costs_measure import STEPS, Clock, measure_costs
from attnconvert.convert.hosts.models import find_sites, last_logits
from attnconvert.convert.hosts.sites import Site
from attnconvert.convert.hosts.surgery import convert
from attnconvert.convert.progress import rich_track
from attnconvert.kernels.spec import Full, Hybrid, Linear, Retention, Spec, Window

SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "max_position_embeddings": 65536,
    "tie_word_embeddings": True,
}
WINDOW, LINEAR, HYBRID, RETENTION = Window(size=128, sinks=4), Linear(), Hybrid(), Retention()
LAYERS: dict[str, list[Spec]] = {  # the operators of a layer's three KV groups
    "full": [Full()] * 3,
    "window": [WINDOW] * 3,
    "linear": [LINEAR] * 3,
    "hybrid": [HYBRID] * 3,
    "retention": [RETENTION] * 3,
    "full + 2 windows": [Full(), WINDOW, WINDOW],
    "full, window, hybrid": [Full(), WINDOW, HYBRID],
    "full, window, linear": [Full(), WINDOW, LINEAR],
    "window, linear, retention": [WINDOW, LINEAR, RETENTION],
}


@torch.no_grad()
def once(model: Any, length: int, clock: Clock) -> dict[str, float]:
    """ms of a prefill, and of a token after it."""
    ids = (torch.arange(length) * 7919 % SMOLLM2["vocab_size"])[None]
    start = clock()
    cache = model(ids, use_cache=True, **last_logits(model)).past_key_values
    middle = clock()
    for _ in range(STEPS):
        model(ids[:, :1], past_key_values=cache, use_cache=True)
    return {"prefill_ms": 1e3 * (middle - start), "decode_ms": 1e3 * (clock() - middle) / STEPS}


def whole(
    model: Any, plans: dict[str, dict[Site, list[Spec]]], length: int, repeats: int, clock: Clock
) -> dict[str, Any]:
    """Medians of every plan, which take turns: {plan: {resource: ms}}."""
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in plans}
    for turn in range(repeats + 1):
        for name, plan in plans.items():
            conversion = convert(model, plan)
            try:
                found = once(model, length, clock)
            finally:
                conversion.remove()
            if turn:  # the first warms up
                samples[name].append(found)
    return {name: {r: statistics.median(x[r] for x in found) for r in found[0]} for name, found in samples.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--cpu-time", action="store_true", help="on one thread: time of this process, not of the others"
    )
    given = parser.parse_args(arguments)
    if given.cpu_time and torch.get_num_threads() > 1:
        parser.error("--cpu-time adds up the time of all threads: set OMP_NUM_THREADS=1")
    clock = time.process_time if given.cpu_time else time.perf_counter
    config = AutoConfig.for_model("llama", **SMOLLM2, num_hidden_layers=given.layers)
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, given.dtype)).eval()
    sites = find_sites(model, tolerance=1.0)
    with tempfile.TemporaryDirectory() as folder:
        costs = measure_costs(
            sites,
            [WINDOW, LINEAR, HYBRID, RETENTION],
            lengths=given.lengths,
            batch=1,
            dtype=given.dtype,
            device="cpu",
            repeats=given.repeats,
            folder=Path(folder),
            track=rich_track(),
            model=model,
            clock=clock,
        )
    rows = []
    plans = {name: dict.fromkeys(sites, specs) for name, specs in LAYERS.items()}
    for length in given.lengths:
        for name, measured in whole(model, plans, length, given.repeats, clock).items():
            for resource, ms in measured.items():
                said = plan_cost(costs, resource, plans[name], length)
                rest = costs.base(resource, length)
                row = {"plan": name, "length": length, "resource": resource, "measured": ms, "predicted": said}
                rows.append({**row, "rest": rest, "ratio": said / ms})
                print(f"{length:>7,}  {resource:<10}  {name:<26} {ms:9.2f} ms, predicted {said:9.2f}, {said / ms:.2f}×")
    found = {"machine": costs.machine, "dtype": given.dtype, "layers": given.layers, "rows": rows}
    found["model"] = check_summary(costs.check())
    print(json.dumps(found["model"], indent=1), file=sys.stderr)
    if given.out:
        save(found, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
