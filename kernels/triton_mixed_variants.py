"""Every configuration that the launchers of mixed attention can choose, for the ahead-of-time gate.

One stands for many. A tile that several head dimensions take is compiled for the largest of them; the group size, the
number of features, the blocks of the lists (which only make a walk shorter) and head dimensions between the powers of
two are one of each. fp16 is what bf16 is except in a linear branch, which multiplies in fp32 there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton.language as tl

from .triton_common import Variant, widest
from .triton_mixed import BEFORE, BOTH, LISTS, NONE, SEPARATE, SHARED, forward_kernel
from .triton_mixed_backward import key_kernel, query_kernel
from .triton_mixed_branch import branch_tiles, key_features_kernel, key_values_kernel, query_features_kernel
from .triton_mixed_delta import delta_kernel
from .triton_mixed_extra import extra_kernel
from .triton_mixed_host import dot_precision, limits
from .triton_mixed_shapes import Tile, configurations, key_tile, padded, pieces, query_tile
from .triton_mixed_states import (
    BLOCK,
    LEFT,
    STEP,
    WHOLE,
    gather_kernel,
    gather_tiles,
    scan_kernel,
    sum_tiles,
    sums_kernel,
    unlist_kernel,
)


def variants(arch: str) -> Iterator[Variant]:
    """Of forward, backward, the branch's gradients and the states."""
    yield from forward_variants(arch)
    yield from query_variants(arch)
    yield from key_variants(arch)
    yield from other_variants(arch)
    yield from branch_variants(arch)
    yield from states_variants(arch)


def describe(
    arch: str, name: str, function: Any, kind: str, constants: Mapping[str, Any], warps: int, stages: int, **types: str
) -> Variant:
    """A `Variant`: pointers to inputs are of type `kind`, the rest as POINTERS and `types` say, or i32.

    Constants that the kernel does not have are left out; optional tensors that are not set to None are there.
    """
    constants = {x: y for x, y in constants.items() if x in function.arg_names}
    known = {**dict.fromkeys((*INPUTS, *VALUES), f"*{kind}"), **POINTERS, **types}
    signature = {x: known.get(x, "i32") for x in function.arg_names if x not in constants}
    return Variant(name, function, signature, constants, warps, stages, limits(arch))


INPUTS = ("q", "k", "v", "o", "do", "dq", "dk", "dv", "extra_k", "extra_v", "fq", "fk", "dfq", "dfk", "linear")
VALUES = ("features", "values", "upstream")
SINGLE = ("lse", "delta", "gain", "offset", "weight", "z", "z_after", "den_out", "sink_logits", "out_z", "sums_z")
STATES = ("state_z", "state", "final", "den", "branch_dv", "part_k", "part_v")
INTEGERS = ("window", "starts", "counts", "columns", "kinds", "patterns", "extra_at", "cu_q", "cu_k", "group_map")
POINTERS = {
    **dict.fromkeys((*SINGLE, *STATES), "*fp32"),
    **dict.fromkeys(INTEGERS, "*i32"),
    **dict.fromkeys(("valid", "left"), "*u8"),
    **dict.fromkeys(("scale", "softcap"), "fp32"),
}
DIMS = (64, 128, 256)  # those between take the tiles of the next one
KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LISTED = ("starts", "counts", "columns", "kinds", "patterns")
EXTRA = ("extra_k", "extra_v", "extra_at")


def branch_kind(arch: str, kind: str) -> tuple[Any, str, str]:
    """As `branch_type`, for a type by name on an architecture, and the type of the states that forward reads."""
    if kind == "bf16":
        return tl.bfloat16, "tf32", "*bf16"
    return tl.float32, "ieee" if kind == "fp32" or arch.startswith("gfx") else "tf32", "*fp32"


OPTIONS = ("kinds", "patterns", "valid", *EXTRA, "sink_logits", "cu_q", "cu_k")
CASES: dict[str, tuple[dict[str, Any], int, tuple[str, ...]]] = {
    # constants that differ, branch, optional tensors that are there
    "ranges-plain": ({"CAUSAL": True}, NONE, ()),
    "ranges-capped": ({"CAUSAL": True, "SOFTCAP": True}, NONE, OPTIONS[3:]),
    "lists-capped": ({"RANGES": False, "REST": LISTS, "CAUSAL": True, "SOFTCAP": True}, NONE, OPTIONS[3:]),
    "ranges-full": ({"REST": BOTH, "SOFTCAP": True}, SEPARATE, OPTIONS[2:]),
    "lists-full": ({"RANGES": False, "REST": LISTS, "CAUSAL": True, "SOFTCAP": True}, SHARED, OPTIONS),
}


def forward_variants(arch: str) -> Iterator[Variant]:
    """What `mixed_forward` launches.

    Full problems have all there is, with ranges a branch on both sides of the window: they stand for those with less.
    Tiles that only problems without branch and padding take are compiled with all else, and in bf16 plain windows are,
    too. Ranges stand for lists where a tile has 16 rows, which need least, and in fp16 where they have the same tile.
    """
    for kind, lists in itertools.product(("bf16", "fp16", "fp32"), (False, True)):
        name = "lists" if lists else "ranges"
        plain, full = ({x: configurations(arch, x, KINDS[kind], y, lists) for x in DIMS} for y in (False, True))
        known = widest(full)
        for dim, t in known:
            if not lists or kind == "fp32" or (kind == "bf16" and t.own > 16) or t.own == 64:
                yield _forward(arch, kind, dim, t, f"{name}-full")
        for dim, t in _more(widest(plain), known):
            if kind != "fp16":
                yield _forward(arch, kind, dim, t, f"{name}-capped")
        for dim in (64, 128) if kind == "bf16" and not lists else ():
            yield _forward(arch, kind, dim, plain[dim][0], "ranges-plain")


def _forward(arch: str, kind: str, dim: int, t: Tile, case: str) -> Variant:
    number, precision, states = branch_kind(arch, kind)
    differs, branch, there = CASES[case]
    absent = [x for x in OPTIONS if x not in there]
    absent += ["starts", "counts", "columns"] if differs.get("RANGES", True) else ["window"]
    absent += [] if branch == SEPARATE else ["linear", "den_out"]
    absent += [] if branch == SHARED else ["weight"]
    if branch == NONE:
        absent += ["group_map", "fq", "fk", "kv", "z", "kv_after", "z_after"]
    constants: dict[str, Any] = {
        "GROUP": 4, "DIM": dim, "FEATURES": 2 * dim, "CAUSAL": False, "RANGES": True, "BRANCH": branch, "REST": BEFORE,
        "SOFTCAP": False, "BQ": max(64, t.own), "BK": 64, "BM": t.own, "BN": t.walk, "BF": 32, "BE": 16,
        "PAD": padded(dim), "TYPE": number, "PRECISION": dot_precision(KINDS[kind]), "BRANCH_PRECISION": precision,
    } | differs | dict.fromkeys(absent)  # fmt: skip
    name = f"mixed-forward-{case}-{kind}-{dim}-{t.own}x{t.walk}"
    return describe(arch, name, forward_kernel, kind, constants, t.warps, t.stages, kv=states, kv_after=states)


def _given(kind: str, dim: int, ranges: bool, full: bool) -> dict[str, Any]:
    """Constants of a gradient; `full` problems have all that there is."""
    absent: tuple[str, ...] = (*LISTED,) if ranges else ("window", *EXTRA)
    if not full:
        absent += ("kinds", "patterns", "valid", *EXTRA, "cu_q", "cu_k", "branch_dv", "group_map")
    return {
        "GROUP": 4, "DIM": dim, "PAD": dim, "PRECISION": dot_precision(KINDS[kind]), "BQ": 128, "BK": 128, "BE": 16,
        "CAUSAL": ranges or full, "RANGES": ranges, "SOFTCAP": full,
    } | dict.fromkeys(absent)  # fmt: skip


def query_variants(arch: str) -> Iterator[Variant]:
    """Gradients of q. Full problems stand for those with less; plain windows in bf16 are compiled, too."""

    def one(kind: str, dim: int, t: Tile, ranges: bool, full: bool = True) -> Variant:
        constants = _given(kind, dim, ranges, full) | {"BM": t.own, "BN": t.walk}
        label = f"{'ranges' if ranges else 'lists'}-{'full' if full else 'plain'}-{kind}-{dim}-{t.own}x{t.walk}"
        return describe(arch, f"mixed-query-{label}", query_kernel, kind, constants, t.warps, t.stages)

    for kind in ("bf16", "fp32"):
        half = kind == "bf16"
        for dim, t in widest({dim: [query_tile(arch, half, dim)] for dim in DIMS}):
            yield one(kind, dim, t, True)
        for dim, t in widest({dim: _cut(query_tile(arch, half, dim), dim) for dim in DIMS}):
            yield one(kind, dim, t, False)
    for dim in (64, 128):
        yield one("bf16", dim, query_tile(arch, True, dim), True, False)


def key_variants(arch: str) -> Iterator[Variant]:
    """Gradients of k and v. Full problems have tiles of their own; plain ones are compiled where theirs is another."""

    def one(kind: str, dim: int, t: Tile, ranges: bool, full: bool) -> Variant:
        constants = _given(kind, dim, ranges, full) | {"BN": t.own, "BM": t.walk, "STAGES": t.stages}
        label = f"{'ranges' if ranges else 'lists'}-{'full' if full else 'plain'}-{kind}-{dim}-{t.own}x{t.walk}"
        return describe(arch, f"mixed-key-{label}", key_kernel, kind, constants, t.warps, t.stages)

    for kind, ranges in itertools.product(("bf16", "fp32"), (True, False)):
        plain, full = (
            {x: _cut(key_tile(arch, kind == "bf16", x, y, not ranges), 0 if ranges else x) for x in DIMS}
            for y in (False, True)
        )
        for dim, t in widest(full):
            yield one(kind, dim, t, ranges, True)
        for dim, t in _more(widest(plain), widest(full)):
            yield one(kind, dim, t, ranges, False)


def _more(plain: list[tuple[int, Tile]], known: list[tuple[int, Tile]]) -> list[tuple[int, Tile]]:
    """The tiles of plain problems that no full one takes at as large a head."""
    largest = {t: dim for dim, t in known}
    return [(dim, t) for dim, t in plain if largest.get(t, 0) < dim]


def _cut(t: Tile, dim: int) -> tuple[Tile, ...]:
    """The tile, and unless dim is 0 those for lists of smaller blocks."""
    return (t, *pieces(t, dim)) if dim else (t,)


def other_variants(arch: str) -> Iterator[Variant]:
    """Gradients of the further keys, and δ: with a branch under one normaliser, which is the most of the three."""
    for kind in ("bf16", "fp32"):
        for dim, (walk, stages) in widest({dim: [_extra_tile(arch, kind, dim)] for dim in DIMS}):
            constants = _given(kind, dim, True, True) | {"BM": walk}
            yield describe(arch, f"mixed-extra-{kind}-{dim}", extra_kernel, kind, constants, 4, stages)
        constants = {"GROUP": 4, "DIM": 256, "PAD": 256, "BRANCH": 1, "BM": 64, "den": None}
        yield describe(arch, f"mixed-delta-{kind}-256", delta_kernel, kind, constants, 4, 3)


def _extra_tile(arch: str, kind: str, dim: int) -> tuple[int, int]:
    t = key_tile(arch, kind == "bf16", dim, True)
    return t.walk, t.stages


def branch_variants(arch: str) -> Iterator[Variant]:
    """What `branch_gradients` launches besides the states; two features for each number of a head.

    Rows that the branch serves on both sides of a window stand for those with one side, and for lists, which have no
    pairs between state and window.
    """
    for kind in ("bf16", "fp16", "fp32"):
        number, precision, _ = branch_kind(arch, kind)
        for dim, (t, tv, bf) in widest({dim: [branch_tiles(arch, kind == "bf16", dim)] for dim in DIMS}):
            constants: dict[str, Any] = {
                "GROUP": 4, "DIM": dim, "FEATURES": 2 * dim, "REST": BOTH, "SHARED": True, "AFTER": True, "PAD": dim,
                "TYPE": number, "PRECISION": precision,
            }  # fmt: skip
            for name, function, x, features, single in (
                ("query-features", query_features_kernel, t, bf, ("kv", "kv_after")),
                ("key-features", key_features_kernel, t, bf, ("dfk",)),
                ("key-values", key_values_kernel, tv, min(bf, 32), ()),
            ):
                own, walk = ("BM", "BN") if function is query_features_kernel else ("BN", "BM")
                yield describe(
                    arch, f"mixed-{name}-{kind}-{dim}", function, kind,
                    constants | {own: x.own, walk: x.walk, "BF": features}, x.warps, x.stages,
                    **dict.fromkeys(single, "*fp32"),
                )  # fmt: skip


def states_variants(arch: str) -> Iterator[Variant]:
    """What the states of forward and backward launch; two features for each number of a head.

    Sums of what lies before a window stand for those after it and for whole blocks, and running sums for those that
    begin at the end.
    """
    for kind in ("bf16", "fp16", "fp32"):
        number, precision, narrow = branch_kind(arch, kind)
        for dim, t in widest({dim: [sum_tiles(arch, kind == "bf16", dim)] for dim in DIMS}):
            for rows in (False, True):
                constants: dict[str, Any] = {
                    "DIM": dim, "FEATURES": 2 * dim, "GROUP": 4 if rows else 1, "PIECES": WHOLE if rows else LEFT,
                    "ROWS": rows, "BRANCH_VALUES": False, "BT": t.tokens, "BF": min(t.features, 2 * dim),
                    "BD": min(t.values, dim), "TYPE": number, "PRECISION": precision,
                } | ({"window": None} if rows else {"gain": None, "shift": None})  # fmt: skip
                name = f"mixed-sums{'-rows' if rows else ''}-{kind}-{dim}"
                yield describe(arch, name, sums_kernel, kind, constants, t.warps, t.stages, out="*fp32", shift="*fp32")
        for sums in dict.fromkeys((narrow, "*fp32")):
            half, split = kind == "bf16", kind == "bf16" and sums == "*fp32"
            x = gather_tiles(arch, half, split)
            constants = {
                "WIDTH": 2 * 256 * 256, "BQ": 128, "BK": 64, "CAUSAL": True, "BACK": split, "BM": x.features,
                "BN": x.tokens, "BW": x.values, "TYPE": number, "SPLIT": split, "PRECISION": precision,
            }  # fmt: skip
            name = f"mixed-gather{'-split' if split else ''}-{kind}"
            yield describe(arch, name, gather_kernel, kind, constants, x.warps, x.stages, sums=sums, out=sums)
    constants = {"DIM": 256, "FEATURES": 512, "REVERSE": False, "BLOCK": BLOCK, "STEP": STEP}
    yield describe(arch, "mixed-scan", scan_kernel, "bf16", constants, 4, 3, sums="*fp32", out="*fp32")
    yield describe(arch, "mixed-unlist", unlist_kernel, "bf16", {"BLOCK": 128}, 4, 3)
