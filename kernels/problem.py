"""What the kernels are asked to compute: frozen descriptions that every back end reads the same way.

Every back end (`backend_torch`, `backend_cpp`, `backend_triton`) has the functions that `ops` lists, takes these
descriptions and returns the same tensors. Shapes: q is (B, H, Q, D); k and v are (B, Hk, K, D); query head h reads KV
group g = h // G with G = H // Hk. The last axis is contiguous, the others may have any stride.

Row r of Q stands at key position i = r + K − Q: the new tokens are the last Q of the K keys.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

EPS = 1e-6  # beside the denominator of a linear branch that has a normaliser of its own


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranges:
    """Keys by distance, one window per KV group: i − w < j ≤ i where causal, else |i − j| < w.

    `sizes[g]` is w; −1 is no limit, 0 is no key at all. `window` (Hk,) int32 holds the same on the device.
    """

    sizes: tuple[int, ...]
    window: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Blocks:
    """Keys by lists of key blocks, one list per query block: row (b, g, n) lists columns[start : start + count].

    `starts`, `counts` are (Bl, Hl, NQ) int32 with Bl in {1, B} and Hl in {1, Hk}; `columns` (N,) int32 are key-block
    indices, ascending and without repeats within a list. `kinds` (N,) int32 is −1 for a full block and otherwise the
    row of `patterns` (U, bq, bk // 32) int32, whose bit c % 32 of word c // 32 says whether key c of the block is
    attended; None when all are full. `block` is (bq, bk): tokens of a query and of a key block; bk is a multiple of 32.
    Keys beyond K, keys after the row where the call is causal, and invalid keys are masked by the kernels.
    `t_*` are the same lists by key block, (Bl, Hl, NK), for the gradients of k and v; columns are then query blocks.
    """

    block: tuple[int, int]
    starts: Tensor
    counts: Tensor
    columns: Tensor
    kinds: Tensor | None = None
    patterns: Tensor | None = None
    t_starts: Tensor | None = None
    t_counts: Tensor | None = None
    t_columns: Tensor | None = None
    t_kinds: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Extra:
    """Further keys that every row may read, sinks for one: k, v (B, Hk, P, D), `at` (B, Hk, P) int32.

    `at` is the key position they stand for, counted as j is: a key that was dropped before the first of `k` has a
    negative one. EMPTY marks a slot without a key. Row i reads one where its window does not reach: at ≤ i − w, and
    where the call is not causal at ≥ i + w too, so a key that is in both is counted once. With w = −1 none is read.
    Only beside Ranges.
    """

    k: Tensor
    v: Tensor
    at: Tensor


EMPTY = 2**30  # as `Extra.at`: no key in this slot


@dataclass(frozen=True, kw_only=True, eq=False)
class Varlen:
    """Packed sequences: B is 1 and sequence n has rows cu_q[n] : cu_q[n + 1] and keys cu_k[n] : cu_k[n + 1].

    (N + 1,) int32 on the device; positions start anew in each; `max_q`, `max_k` bound their lengths.
    """

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Softmax:
    """The softmax part: o_i = Σ p_ij v_j over the attended keys, with logits cap(scale · q_i·k_j).

    `valid` (B, K) bool is false for keys that nothing attends to. `softcap` 0 is none; otherwise c·tanh(s / c).
    `sink_logits` (H,) fp32 is one more logit per row without a value. A row without keys gives o = 0, lse = −inf
    (with sink_logits: o = 0 and lse = its logit).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    causal: bool
    where: Ranges | Blocks
    valid: Tensor | None = None
    varlen: Varlen | None = None
    extra: Extra | None = None
    softcap: float = 0.0
    sink_logits: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Branch:
    """The linear branch beside the softmax part, for some of the KV groups.

    `fq` (B, Ht·G, Q, F) and `fk` (B, Ht, K, F) are features ≥ 0 in the dtype of q or fp32. `index[g]` is the row of
    KV group g among the Ht, −1 without a branch; `groups` (Hk,) int32 the same on the device. The caller has zeroed
    `fk` of keys that must not count (padding, sinks); `Softmax.valid` does not touch the branch.

    Which keys R(i) it covers:
        causal Ranges:      j ≤ i − w, and what the state holds (w = −1: nothing; w = 0: j ≤ i).
        otherwise ("rest"): with Blocks, the keys of the blocks that row's list does not name, whole blocks
                            (causal: of blocks that end at or before the first position of the query block);
                            with Ranges that are not causal, |i − j| ≥ w.
    With A_i = Σ_R φ(q_i)·φ(k_j) [v_j | 1] + φ(q_i)·state  (D + 1 numbers):
        shared:   one normaliser: o_i = (Σ_softmax e^{s_ij} v_j + e^{c} A_i[:D]) / (Σ_softmax e^{s_ij} + e^{c} A_i[D]),
                  c = weight[h] (Ht·G,) fp32, and lse is the logarithm of this denominator.
        separate: its own output A_i[:D] / (A_i[D] + EPS) and its own denominator A_i[D].
    `state` (B, Ht, F, D + 1) fp32 is [Σ φ(k) vᵀ | Σ φ(k)] of what came before; only where causal with Ranges.
    """

    fq: Tensor
    fk: Tensor
    index: tuple[int, ...]
    groups: Tensor
    shared: bool
    weight: Tensor | None = None
    state: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixed:
    """What a mixed forward returns. Without a branch the last three are None.

    o (B, H, Q, D) in the dtype of q; lse (B, H, Q) fp32; linear (B, Ht·G, Q, D) in the dtype of q and den
    (B, Ht·G, Q) fp32 where the branch is separate; state (B, Ht, F, D + 1) fp32 after the last key that has left the
    window (only where causal with Ranges and no Varlen).
    """

    o: Tensor
    lse: Tensor
    linear: Tensor | None = None
    den: Tensor | None = None
    state: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Linear:
    """Linear attention alone: fq (B, H, Q, F), fk (B, Hk, K, F), v (B, Hk, K, D), Q = K where causal.

    A_i = Σ_j φ(q_i)·φ(k_j) [v_j | 1] + φ(q_i)·state over j ≤ i where causal, over all j otherwise.
    normalize: o = A[:D] / (A[D] + EPS), else o = A[:D]. `fk` of padding is zero already. The state is as in `Branch`.
    """

    fq: Tensor
    fk: Tensor
    v: Tensor
    causal: bool
    normalize: bool
    state: Tensor | None = None
    varlen: Varlen | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Some neighbouring KV groups of a decode step that share a kind of cache: groups first … first + hp − 1.

    k, v (B, hp, C, D): cached keys in any order, of which the first `used` slots count and, where `mask` (B, C) bool
    is given, only those it names. `fq` (B, hp·G, F) and `state` (B, hp, F, D + 1) fp32 add a linear branch under the
    same normaliser with log-weight `weight` (hp·G,) fp32, as in `Branch`; used = 0 and weight = None make it linear
    attention (o = A[:D] / (A[D] + EPS)). `late` (B, C) bool asks for what the slots it names received: (B, hp, C)
    fp32, the probabilities summed over the G query heads of each group, 0 at the other slots; not beside a branch.
    """

    first: int
    k: Tensor
    v: Tensor
    used: int
    mask: Tensor | None = None
    fq: Tensor | None = None
    state: Tensor | None = None
    weight: Tensor | None = None
    late: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Decode:
    """One new token per sequence: q (B, H, 1, D) over the parts, which cover all KV groups in order, in one launch.

    A back end gives o (B, H, 1, D) and what was received, one tensor for each part that asks, in their order.
    """

    q: Tensor
    parts: tuple[Part, ...]
    scale: float
    softcap: float = 0.0
    sink_logits: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Retain:
    """Retention over new tokens and the memory that came before. Positions count real tokens, from 0 in each row.

    q (B, H, Q, D), k, v (B, Hk, Q, D) of the new tokens; `at` (B, Q) int32 their positions, −1 at padding, whose
    output is 0. Positions are cut into blocks of `block`. In block n, which starts at a = n · block, row i attends to
    the sinks (positions below `sinks`), the recent positions j > a − (window − block) − 1, that is
    j ≥ a − window + block, up to i, and the `keep` positions of highest score among the older ones that are no sinks
    (ties: the smaller position wins; fewer where fewer are there). So at most `window` recent keys are held.
    The score of j is final when j becomes older: the sum of the probabilities that the query heads of its KV group
    gave it from rows at a distance of window // 2 or more, while it was recent.

    Memory, all (B, Hk, ·): ring_k, ring_v (window, D) with ring_at (window) int32 and ring_score (window) fp32;
    kept_k, kept_v (keep, D), kept_at, kept_score; sink_k, sink_v (sinks, D). Empty slots have at = −1. The recent
    token of position p is in ring slot p % window, the sink of position p in slot p; kept tokens stand in any order.
    The tokens of the memory are those of the block that is under way when the call ends.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    at: Tensor
    scale: float
    window: int
    keep: int
    sinks: int
    block: int
    memory: tuple[Tensor, ...] | None = None
    softcap: float = 0.0
    sink_logits: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Pooled:
    """Block selection: q (B, H, Q, D), k (B, Hk, K, D) → `Blocks` of (B, Hk, NQ) lists.

    Blocks of q and k are averaged over their (real) tokens, q over the query heads of its group as well; the scores
    scale · q̄·k̄ are softmaxed over the key blocks (where causal: those that begin at or before the last position of
    the query block). Kept are the `keep` best, or, where `mass` is given instead, as few of the best as hold that
    share; always the block of the diagonal where causal, and always the first `first` blocks.
    """

    q: Tensor
    k: Tensor
    scale: float
    causal: bool
    block: tuple[int, int]
    keep: int | None = None
    mass: float | None = None
    first: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class MixedGradients:
    """Gradients of what a mixed forward read, in the dtypes and shapes of the inputs; None where there was none."""

    q: Tensor
    k: Tensor
    v: Tensor
    extra_k: Tensor | None = None
    extra_v: Tensor | None = None
    fq: Tensor | None = None
    fk: Tensor | None = None
