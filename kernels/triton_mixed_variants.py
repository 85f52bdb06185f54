"""Every configuration that the launchers of mixed attention can choose, for the ahead-of-time gate."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton.language as tl

from .triton_common import Variant
from .triton_mixed import BEFORE, BOTH, LISTS, NONE, SEPARATE, SHARED, forward_kernel
from .triton_mixed_backward import key_kernel, query_kernel
from .triton_mixed_branch import branch_tiles, key_features_kernel, key_values_kernel, query_features_kernel
from .triton_mixed_delta import delta_kernel
from .triton_mixed_extra import extra_kernel
from .triton_mixed_host import dot_precision, limits
from .triton_mixed_shapes import Tile, configurations, key_tile, padded, query_tile, smaller
from .triton_mixed_states import (
    BLOCK,
    LEFT,
    RIGHT,
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
    yield from backward_variants(arch)
    yield from branch_variants(arch)
    yield from states_variants(arch)


def describe(
    arch: str, name: str, function: Any, kind: str, constants: Mapping[str, Any], warps: int, stages: int, **types: str
) -> Variant:
    """A `Variant`: pointers to inputs are of type `kind`, the rest as POINTERS and `types` say, or i32.

    Optional tensors that `constants` does not set to None are there.
    """
    known = {**dict.fromkeys(INPUTS, f"*{kind}"), **POINTERS, **types}
    signature = {x: known.get(x, "i32") for x in function.arg_names if x not in constants}
    return Variant(name, function, signature, dict(constants), warps, stages, limits(arch))


INPUTS: tuple[str, ...] = (
    "q",
    "k",
    "v",
    "o",
    "do",
    "dq",
    "dk",
    "dv",
    "extra_k",
    "extra_v",
    "fq",
    "fk",
    "dfq",
    "dfk",
    "linear",
)
INPUTS += ("features", "values", "upstream")
SINGLE: tuple[str, ...] = (
    "lse",
    "delta",
    "gain",
    "offset",
    "weight",
    "z",
    "z_after",
    "den_out",
    "sink_logits",
    "out_z",
    "sums_z",
    "state_z",
    "state",
)
SINGLE += ("final", "den", "branch_dv", "part_k", "part_v")
INTEGERS = ("window", "starts", "counts", "columns", "kinds", "patterns", "extra_at", "cu_q", "cu_k", "group_map")
POINTERS = {
    **dict.fromkeys(SINGLE, "*fp32"),
    **dict.fromkeys(INTEGERS, "*i32"),
    **dict.fromkeys(("valid", "left"), "*u8"),
    **dict.fromkeys(("scale", "softcap"), "fp32"),
}
KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def branch_kind(arch: str, kind: str) -> tuple[Any, str, str]:
    """As `branch_type`, for a type by name on an architecture, and the type of the states that forward reads."""
    if kind == "bf16":
        return tl.bfloat16, "tf32", "*bf16"
    return tl.float32, "ieee" if kind == "fp32" or arch.startswith("gfx") else "tf32", "*fp32"


OPTIONS = ("kinds", "patterns", "valid", "extra_k", "extra_v", "extra_at", "sink_logits", "cu_q", "cu_k")
CASES: tuple[tuple[str, dict[str, Any], int, tuple[str, ...], bool], ...] = (
    # name, constants that differ, branch, optional tensors that are there, also for the small tiles
    ("causal", {"CAUSAL": True}, NONE, (), False),
    ("causal-shared", {"CAUSAL": True, "SOFTCAP": True}, SHARED, OPTIONS[2:], False),
    ("window-separate", {"REST": BOTH}, SEPARATE, OPTIONS[2:7], False),
    ("blocks", {"RANGES": False, "REST": LISTS}, NONE, (), False),
    ("blocks-separate", {"RANGES": False, "REST": LISTS}, SEPARATE, (), False),
    ("partial-shared", {"RANGES": False, "REST": LISTS, "CAUSAL": True}, SHARED, (*OPTIONS[:3], *OPTIONS[6:]), True),
)


def forward_variants(arch: str) -> Iterator[Variant]:
    """What `mixed_forward` launches; the group size and the sizes of list blocks stand for all."""
    for kind, dim in itertools.product(("bf16", "fp16", "fp32"), (64, 128, 256)):
        for name, differs, branch, there, small in CASES:
            if kind == "fp16" and not (small or differs.get("REST") == BOTH):
                continue  # as bf16, but for what a branch multiplies in fp32
            for number, t in enumerate(configurations(arch, dim, kind != "fp32", branch != NONE or "kinds" in there)):
                if small or not number:
                    yield _forward(arch, kind, dim, t, name, differs, branch, there)


def _forward(
    arch: str, kind: str, dim: int, t: Tile, name: str, differs: dict[str, Any], branch: int, there: tuple[str, ...]
) -> Variant:
    number, precision, states = branch_kind(arch, kind)
    ranges = differs.get("RANGES", True)
    absent = [x for x in OPTIONS if x not in there]
    absent += ["starts", "counts", "columns"] if ranges else ["window"]
    absent += [] if branch == SEPARATE else ["linear", "den_out"]
    if branch == NONE:
        absent += ["group_map", "fq", "fk", "kv", "z", "kv_after", "z_after"]
    constants: dict[str, Any] = {
        "GROUP": 4, "DIM": dim, "FEATURES": 2 * dim, "CAUSAL": False, "RANGES": True, "BRANCH": branch, "REST": BEFORE,
        "SOFTCAP": False, "BQ": max(64, t.own), "BK": 64, "BM": t.own, "BN": t.walk, "BF": 32, "BE": 16,
        "PAD": padded(dim), "TYPE": number, "PRECISION": dot_precision(KINDS[kind]), "BRANCH_PRECISION": precision,
    } | differs | dict.fromkeys(absent if branch == SHARED else [*absent, "weight"])  # fmt: skip
    label = f"mixed-forward-{name}-{kind}-{dim}-{t.own}x{t.walk}"
    return describe(
        arch, label, forward_kernel, kind, constants, t.warps, t.stages, kv=states, kv_after=states, lse_n="i32"
    )  # fmt: skip


FEATURED = ("kinds", "patterns", "valid", "extra_k", "extra_v", "extra_at", "cu_q", "cu_k", "branch_dv", "group_map")
LISTED = ("starts", "counts", "columns")


def backward_variants(arch: str) -> Iterator[Variant]:
    """What `mixed_backward` launches besides the branch: plain, and with all that a problem may have."""
    for kind, dim in itertools.product(("bf16", "fp32"), (64, 128, 256)):
        base: dict[str, Any] = {
            "GROUP": 4, "DIM": dim, "PAD": dim, "PRECISION": "ieee" if kind == "fp32" else "tf32", "BQ": 128, "BK": 128,
        }  # fmt: skip
        own = query_tile(arch, kind != "fp32", dim)
        for ranges, full in itertools.product((True, False), (True, False)):
            key = key_tile(arch, kind != "fp32", dim, full, not ranges)
            absent: tuple[str, ...] = LISTED if ranges else ("window",)
            if not full:
                absent += FEATURED
            absent += FEATURED[:2] if ranges else FEATURED[3:6]
            differs = {"CAUSAL": ranges or full, "RANGES": ranges, "SOFTCAP": full} | dict.fromkeys(absent)
            label = f"{kind}-{dim}-{'ranges' if ranges else 'blocks'}{'-full' if full else ''}"
            for name, function, t, tiles in (
                ("query", query_kernel, own, {"BM": own.own, "BN": own.walk, "BE": 16}),
                ("key", key_kernel, key, {"BN": key.own, "BM": key.walk, "STAGES": key.stages}),
            ):
                constants = {x: y for x, y in (base | differs | tiles).items() if x in function.arg_names}
                yield describe(arch, f"mixed-backward-{name}-{label}", function, kind, constants, t.warps, t.stages)
            if full and not ranges:
                yield from _small(arch, kind, dim, base | differs, label)
        key = key_tile(arch, kind != "fp32", dim, True)
        constants = base | {"CAUSAL": True, "SOFTCAP": True, "BE": 16, "BM": key.walk}
        constants = {x: y for x, y in constants.items() if x in extra_kernel.arg_names}
        yield describe(arch, f"mixed-backward-extra-{kind}-{dim}", extra_kernel, kind, constants, 4, key.stages)
        for mode in (0, 1, 2):
            absent = ("lse", "group_map", "weight") if mode == 2 else ("den",)
            absent = (*absent, "group_map", "weight", "gain", "offset") if mode == 0 else absent
            constants = {"GROUP": 4, "DIM": dim, "PAD": dim, "BRANCH": mode, "BM": 64} | dict.fromkeys(absent)
            yield describe(arch, f"mixed-backward-delta-{kind}-{dim}-{mode}", delta_kernel, kind, constants, 4, 3)


def _small(arch: str, kind: str, dim: int, given: dict[str, Any], label: str) -> Iterator[Variant]:
    """Tiles of lists of small blocks."""
    for own in (16, 32, 64)[: 3 if dim <= 128 else 2]:
        for name, function, t in (
            ("query", query_kernel, query_tile(arch, kind != "fp32", dim)),
            ("key", key_kernel, key_tile(arch, kind != "fp32", dim, True, True)),
        ):
            if own < t.own:
                t, more = smaller(t, own, dim), {"BQ": 64, "BK": 64, "BE": 16}
                tiles = {"BM": t.own, "BN": t.walk}
                more |= tiles if name == "query" else {"BN": t.own, "BM": t.walk, "STAGES": t.stages}
                constants = {x: y for x, y in (given | more).items() if x in function.arg_names}
                yield describe(
                    arch, f"mixed-backward-{name}-{label}-{own}", function, kind, constants, t.warps, t.stages
                )  # fmt: skip


def branch_variants(arch: str) -> Iterator[Variant]:
    """What `branch_gradients` launches besides the states; two features for each number of a head."""
    for kind, dim, rest in itertools.product(("bf16", "fp16", "fp32"), (64, 128, 256), (BEFORE, BOTH, LISTS)):
        number, precision, _ = branch_kind(arch, kind)
        t, tv, bf = branch_tiles(arch, kind == "bf16", dim)
        constants: dict[str, Any] = {
            "GROUP": 4, "DIM": dim, "FEATURES": 2 * dim, "REST": rest, "SHARED": True, "PAD": dim, "TYPE": number,
            "PRECISION": precision, "cu_q": None, "cu_k": None,
        } | ({"window": None} if rest == LISTS else {})  # fmt: skip
        label = f"{kind}-{dim}-{('left', 'both', 'lists')[rest - 1]}"
        rows = constants | {"BM": t.own, "BN": t.walk, "BF": bf}
        single = dict.fromkeys(("kv", "kv_after"), "*fp32")
        yield describe(arch, f"query-features-{label}", query_features_kernel, kind, rows, t.warps, t.stages, **single)
        keys = constants | {"AFTER": rest == BOTH, "BN": t.own, "BM": t.walk}
        single = {"dfk": "*fp32"} if rest == BOTH else {}
        yield describe(
            arch, f"key-features-{label}", key_features_kernel, kind, keys | {"BF": bf}, t.warps, t.stages, **single
        )  # fmt: skip
        keys |= {"BN": tv.own, "BM": tv.walk, "BF": min(bf, 32)}
        yield describe(arch, f"key-values-{label}", key_values_kernel, kind, keys, tv.warps, tv.stages)


def states_variants(arch: str) -> Iterator[Variant]:
    """What the states of forward and backward launch; two features for each number of a head."""
    for kind, dim in itertools.product(("bf16", "fp16", "fp32"), (64, 128, 256)):
        number, precision, narrow = branch_kind(arch, kind)
        t = sum_tiles(arch, kind == "bf16", dim)
        for rows, pieces in ((False, WHOLE), (False, LEFT), (False, RIGHT), (True, WHOLE)):
            constants = {
                "DIM": dim, "FEATURES": 2 * dim, "GROUP": 4 if rows else 1, "PIECES": pieces, "ROWS": rows,
                "BRANCH_VALUES": False, "BT": t.tokens, "BF": min(t.features, 2 * dim), "BD": min(t.values, dim),
                "TYPE": number, "PRECISION": precision,
            } | dict.fromkeys(() if rows else ("gain", "shift")) | ({} if pieces else {"window": None})  # fmt: skip
            out = narrow if (rows, pieces) == (False, WHOLE) else "*fp32"
            name = f"mixed-sums-{kind}-{dim}-{('blocks', 'before', 'after')[pieces]}{'-rows' if rows else ''}"
            yield describe(arch, name, sums_kernel, kind, constants, t.warps, t.stages, out=out, shift="*fp32")
        for sums in dict.fromkeys((narrow, "*fp32")):
            half, split = kind == "bf16", kind == "bf16" and sums == "*fp32"
            x = gather_tiles(arch, half, split)
            constants = {
                "WIDTH": 2 * dim * dim, "BQ": 128, "BK": 64, "CAUSAL": True, "BACK": split, "BM": x.features,
                "BN": x.tokens, "BW": x.values, "TYPE": number, "SPLIT": split, "PRECISION": precision,
            }  # fmt: skip
            name = f"mixed-gather-{kind}-{dim}{'-split' if split else ''}"
            yield describe(arch, name, gather_kernel, kind, constants, x.warps, x.stages, sums=sums, out=sums)
        for reverse in (False, True):
            constants = {"DIM": dim, "FEATURES": 2 * dim, "REVERSE": reverse, "BLOCK": BLOCK, "STEP": STEP}
            absent = {"state": None, "final": None} if reverse else {}
            out = "*fp32" if reverse else narrow
            yield describe(
                arch, f"mixed-scan-{kind}-{dim}{'-back' if reverse else ''}", scan_kernel, kind,
                constants | absent, 4, 3, sums="*fp32", out=out,
            )  # fmt: skip
    yield describe(arch, "mixed-unlist", unlist_kernel, "bf16", {"BLOCK": 128}, 4, 3)
