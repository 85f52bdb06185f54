"""The shapes that are measured, what attention over them costs at least, and the targets.

The floor of a case is the larger of its operations over the machine's rate and its bytes over the bandwidth, where
every input is read once and every output written once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

BACKWARD = 3.5  # forward and backward over forward: two products against two and five


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One layer, batch 1. On a grid (h, w) or (t, h, w), `text` tokens stand before it."""

    model: str
    tokens: int
    heads: int
    kv_heads: int
    dim: int
    grid: tuple[int, ...] = ()
    text: int = 0

    def described(self) -> dict[str, Any]:
        """What a row says of it."""
        names = ("model", "tokens", "heads", "kv_heads", "dim")
        return {"batch": 1, **{name: getattr(self, name) for name in names}}

    def small(self) -> Shape:
        """For trying the control flow: the same kind of shape in next to no time."""
        grid = {0: (), 2: (16, 16), 3: (4, 8, 8)}[len(self.grid)]
        text = 32 if self.text else 0
        per, groups = self.heads // self.kv_heads, min(self.kv_heads, 2)
        tokens = math.prod(grid) + text if grid else 256 + 8 * (self.tokens > 10_000)
        return replace(self, tokens=tokens, heads=per * groups, kv_heads=groups, dim=16, grid=grid, text=text)


def smollm2(tokens: int) -> Shape:
    return Shape(model="SmolLM2-135M", tokens=tokens, heads=9, kv_heads=3, dim=64)


def llama(tokens: int) -> Shape:
    return Shape(model="Llama-3-8B", tokens=tokens, heads=32, kv_heads=8, dim=128)


def grid(model: str, heads: int, sizes: tuple[int, ...], text: int = 0) -> Shape:
    tokens = math.prod(sizes) + text
    return Shape(model=model, tokens=tokens, heads=heads, kv_heads=heads, dim=128, grid=sizes, text=text)


FLUX_1024 = grid("FLUX 1024²", 24, (64, 64), 512)
FLUX_4096 = grid("FLUX 4096²", 24, (256, 256), 512)
WAN_480 = grid("Wan-1.3B 480p", 12, (21, 30, 52))
WAN_720 = grid("Wan-1.3B 720p", 12, (21, 45, 80))

# ----------------------------------------------------------------------------------------------------------- operations


def dense_pairs(tokens: int, causal: bool) -> int:
    """Pairs of a query and a key of one head."""
    return tokens * (tokens + 1) // 2 if causal else tokens * tokens


def window_pairs(tokens: int, size: int, causal: bool, sinks: int = 0) -> int:
    """Of i − size < j ≤ i, or of |i − j| < size, and of the first `sinks` keys where the window does not reach."""
    size = min(size, tokens)
    near = size * tokens - size * (size - 1) // 2
    far = sum(max(tokens - size - p, 0) for p in range(sinks))
    return near + far if causal else 2 * near - tokens


def window_of(tokens: int, density: float) -> int:
    """The size that |i − j| < size needs to be that share of all pairs."""
    return max(1, round(tokens * (1 - math.sqrt(1 - density))))


def attention_flops(shape: Shape, pairs: float) -> float:
    """Of the two products, forward."""
    return 4 * shape.heads * shape.dim * pairs


def attention_bytes(shape: Shape, size: int = 2) -> float:
    """q, k, v and o, `size` bytes a number."""
    return size * shape.tokens * shape.dim * 2 * (shape.heads + shape.kv_heads)


def linear_flops(shape: Shape, features: int) -> float:
    """At least: each key joins a state, each query reads one."""
    return 2 * shape.tokens * features * shape.dim * (shape.heads + shape.kv_heads)


def linear_bytes(shape: Shape, features: int, size: int = 2) -> float:
    """φ(q), φ(k), v and o."""
    heads, groups = shape.heads, shape.kv_heads
    return size * shape.tokens * (features * (heads + groups) + shape.dim * (heads + groups))


def cache_bytes(shape: Shape, slots: int, size: int = 2) -> float:
    """Keys and values that one decode step reads."""
    return 2 * size * shape.kv_heads * slots * shape.dim


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """Measured in the same run: operations a second and bytes a second, None where not measured."""

    flops: float | None = None
    bandwidth: float | None = None

    def floor_ms(self, flops: float | None, moved: float | None) -> float | None:
        """The time below which no version can go; None without a measured bandwidth."""
        if not self.flops or not self.bandwidth or flops is None or moved is None:
            return None
        return 1e3 * max(flops / self.flops, moved / self.bandwidth)


# -------------------------------------------------------------------------------------------------------------- targets


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One line of what the kernels must reach. `field` of a row is held against `least`; `needs` is the machine."""

    where: str
    what: str
    least: float
    field: str  # ratio, peak_share, ideal
    needs: str | None = None

    def shown(self, value: float) -> str:
        return f"{value:.3g}×" if self.field == "ratio" else f"{value:.0%}"


AVX512, H200 = "avx512bf16", "H200"
LEVELS = {"avx512bf16": "AVX512-BF16", "avx2": "AVX2", "other": "neither AVX512-BF16 nor AVX2"}
_CPU = "CPU, 2 cores, bf16, 9/3 heads × 64, 8k"
GOALS = {
    "window": Goal(
        where=_CPU, what="causal: window 256 + sinks against SDPA causal", least=25, field="ratio", needs=AVX512
    ),
    "dense": Goal(where=_CPU, what="our dense against SDPA dense", least=3, field="ratio", needs=AVX512),
    "sparse": Goal(where=_CPU, what="12.5 % block-sparse against SDPA dense", least=15, field="ratio", needs=AVX512),
    "linear": Goal(where=_CPU, what="causal linear against SDPA causal", least=30, field="ratio", needs=AVX512),
    "decode": Goal(
        where=f"{_CPU} cache, one query",
        what="decode, dense groups against SDPA with repeated KV",
        least=5,
        field="ratio",
        needs=AVX512,
    ),
    "peak": Goal(where="CPU kernels", what="share of measured GEMM peak, dense 8k", least=0.6, field="peak_share"),
    "model": Goal(
        where="SmolLM2 converted as in `make demo`",
        what="prefill at 8k against the original with SDPA, whole model, bf16",
        least=3,
        field="ratio",
        needs=AVX512,
    ),
    "h200-window": Goal(
        where="H200", what="FLUX-4096² window at 10 % density against cuDNN", least=7, field="ratio", needs=H200
    ),
    "h200-sla": Goal(
        where="H200",
        what="SLA at 95 % sparsity, Wan 720p, forward, linear branch included, against dense",
        least=10,
        field="ratio",
        needs=H200,
    ),
    "h200-linear": Goal(
        where="H200", what="causal linear 32k against flash-linear-attention", least=1.2, field="ratio", needs=H200
    ),
    "h200-sparse": Goal(
        where="H200",
        what="block-sparse at 10–50 % density, share of (our dense time × density)",
        least=0.85,
        field="ideal",
        needs=H200,
    ),
}


def judge(row: dict[str, Any], goal: str, machine: str | None) -> None:
    """Hold a row against a target: `goal`, `target` and `met`, which is None where it cannot be said, and why.

    machine: the instruction set or the GPU.
    """
    aim = GOALS[goal]
    row |= {"goal": goal, "target": aim.least, "met": None}
    value = row.get(aim.field)
    if value is None:
        row["note"] = joined(row["note"], f"no {aim.field.replace('_', ' ')}: what it is held against was not measured")
    elif aim.needs is None or aim.needs.lower() in (machine or "").lower():
        row["met"] = value >= aim.least
    else:
        mine = f"this machine has {LEVELS.get(machine, machine)}" if machine else "its machine is not recorded"
        row["note"] = joined(row["note"], f"target set for {LEVELS.get(aim.needs, aim.needs)}; {mine}")


def joined(*notes: str) -> str:
    return "; ".join(note for note in notes if note)
