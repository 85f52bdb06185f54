"""Every operator on the device against dense references in fp64, with those of tests/kernel_cases.py."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from attnconvert.kernels import dispatch, ops

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import kernel_cases as cases

Check = Callable[[], None]
BF16 = torch.bfloat16


def checks(backend: str, device: str, small: bool) -> Iterator[tuple[str, Check]]:
    """What is checked, by name. `small`: next to no time."""
    seed = cases.draw_seed()
    print(f"ATTNCONVERT_SEED={seed}", flush=True)
    rng, module = cases.generator(seed), dispatch.backend(backend)
    rows, dim = (65, 32) if small else (517, 128)
    for dtype in (BF16,) if small else (BF16, torch.float16, torch.float32):
        where = (7, -1) if small else (129, -1)
        kinds = {
            "window with sinks": {"where": where, "extra": 4},
            "not causal, soft cap": {"where": where, "causal": False, "softcap": 20.0},
            "packed": {"where": where, "varlen": [(rows // 2, rows // 2), (0, 0), (rows // 3, rows // 3)]},
        }
        for name, more in kinds.items():
            p = cases.softmax_case(rng, rows=rows, dim=dim, dtype=dtype, device=device, views=True, **more)
            yield f"{name}, {dtype}", lambda p=p: _mixed(module, rng, p, None)
        p = cases.softmax_case(rng, rows=rows, dim=dim, dtype=dtype, device=device, where=where)
        branch = cases.branch_case(rng, p, features=2 * dim, index=(0, -1), state=True)
        yield f"hybrid, {dtype}", lambda p=p, branch=branch: _mixed(module, rng, p, branch)
        block = (32, 32) if small else (128, 64)
        for causal in (False, True):
            lists = cases.blocks_case(rng, rows=rows, block=block, device=device)
            p = cases.softmax_case(rng, rows=rows, dim=dim, dtype=dtype, device=device, where=lists, causal=causal)
            branch = cases.branch_case(rng, p, features=dim, shared=False)
            yield f"lists with a branch, causal {causal}, {dtype}", lambda p=p, b=branch: _mixed(module, rng, p, b)
            p = cases.linear_case(rng, rows=rows, dim=dim, dtype=dtype, causal=causal, device=device)
            yield f"linear, causal {causal}, {dtype}", lambda p=p: _linear(module, rng, p)
    p = cases.decode_case(rng, sizes=((1, 9), (1, 4)), dtype=BF16, device=device)
    yield "decode", lambda: _decode(p, backend)
    retain = cases.retain_case(rng, rows=60 if small else 200, dtype=BF16, device=device, padding="none")
    yield "retention", lambda: _retain(module, retain)
    pooled = cases.pooled_case(rng, rows=rows, dim=dim, device=device, keep=2)
    yield "selection", lambda: _select(module, pooled)


def _mixed(module: Any, rng: Any, p: Any, branch: Any) -> None:
    if reason := module.refuses("mixed_forward", (p, branch)):
        raise RuntimeError(reason)
    mine = module.mixed_forward(p, branch)
    host, side = cases.on(p, "cpu"), None if branch is None else cases.on(branch, "cpu")
    exact, plain = _references(host, side)
    names = ("o",) if branch is None or branch.shared else ("o", "linear")
    for name in names:
        cases.assert_close(getattr(mine, name), getattr(exact, name), getattr(plain, name), name=name)
    do, dlinear = cases.output_gradients(rng, host, side)
    moved = (do.to(p.q.device), None if dlinear is None else dlinear.to(p.q.device))
    got = module.mixed_backward(p, branch, mine, *moved)
    want = cases.mixed_gradients(cases.double(host), None if side is None else cases.double(side), do, dlinear)
    rough = cases.mixed_gradients(host, side, do, dlinear)
    for name in ("q", "k", "v", "extra_k", "extra_v", "fq", "fk"):
        if getattr(got, name) is not None and name in want:
            cases.assert_close(getattr(got, name), want[name], rough[name], name=f"d{name}", factor=3)


def _references(p: Any, branch: Any) -> tuple[Any, Any]:
    exact = cases.mixed_reference(cases.double(p), None if branch is None else cases.double(branch))
    return exact, cases.mixed_reference(p, branch)


def _linear(module: Any, rng: Any, p: Any) -> None:
    o, den, _ = module.linear_forward(p)
    host = cases.on(p, "cpu")
    exact, plain = cases.linear_reference(cases.double(host)), cases.linear_reference(host)
    cases.assert_close(o, exact[0], plain[0])
    do = cases.normal(rng, *exact[0].shape, dtype=p.v.dtype)
    want, rough = (cases.linear_gradients(x, do) for x in (cases.double(host), host))
    got = module.linear_backward(p, o, den, do.to(o.device))
    for name, x in zip(("fq", "fk", "v"), got, strict=True):
        cases.assert_close(x, want[name], rough[name], name=f"d{name}", factor=3)


def _decode(p: Any, backend: str) -> None:
    got = ops.decode_step(p.q, p.parts, scale=p.scale, softcap=p.softcap, sink_logits=p.sink_logits, backend=backend)
    host = cases.on(p, "cpu")
    exact, plain = (_first(cases.decode_reference(x)) for x in (cases.double(host), host))
    cases.assert_close(got[0], exact, plain)


def _first(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result


def _retain(module: Any, p: Any) -> None:
    # with equal scores in fp64 and bf16 the kept tokens may differ, so the reference reads what bf16 holds
    host = cases.on(p, "cpu")
    exact = cases.retain_reference(cases.double(host))
    cases.assert_close(module.retain(p)[0], exact, cases.retain_reference(host), factor=4)


def _select(module: Any, p: Any) -> None:
    found = module.select(p)
    host = cases.on(p, "cpu")
    assert cases.listed(cases.on(found, "cpu"), 1, p.k.shape[1]) == [
        [[sorted(row) for row in group] for group in batch] for batch in cases.select_reference(host)
    ], "other blocks than the reference selects"


def run(backend: str, device: str, small: bool) -> dict[str, Any]:
    """{"passed", "failed": [name: why], "how"}; says each failure as it comes."""
    passed, failed = 0, []
    for name, check in checks(backend, device, small):
        try:
            check()
            passed += 1
        except Exception as error:  # a kernel may raise anything; all others are still to be checked
            lines = [line for line in str(error).strip().splitlines() if line.strip()]
            failed.append(f"{name}: {type(error).__name__}: {lines[0] if lines else ''}"[:300])
            print(f"  FAILED {failed[-1]}", flush=True)
    return {"how": "built-in check against fp64", "passed": passed, "failed": failed}
