"""What every kernel demands of its arguments, and the ValueErrors that name what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import Branch, Ranges, Softmax, Varlen

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_tensors(given: dict[str, Tensor], alike: tuple[str, ...]) -> None:
    """Four axes, one dtype that is known, one device, the last axis contiguous, heads that divide."""
    first_name, first = next(iter(given.items()))
    for name, x in given.items():
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: expected four axes, (B, heads, tokens, size)")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} is {x.dtype}: expected bfloat16, float16, float32 or float64")
        if name in alike and x.dtype != first.dtype:
            raise ValueError(f"{name} is {x.dtype}: expected {first.dtype}, as {first_name} is")
        if x.device != first.device:
            raise ValueError(f"{name} is on {x.device}: expected {first.device}, where {first_name} is")
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{name} has stride {x.stride(-1)} along its last axis: expected 1, call .contiguous()")
        if x.shape[0] != first.shape[0]:
            raise ValueError(f"{name} has batch {x.shape[0]}: expected {first.shape[0]}, as {first_name} has")
        if x.shape[1] < 1 or first.shape[1] % x.shape[1]:
            raise ValueError(
                f"{name} has {x.shape[1]} heads: expected a divisor of {first.shape[1]}, as in {first_name}"
            )
        if "q" in given and (x.shape[3] % 8 or not 8 <= x.shape[3] <= 256):
            raise ValueError(f"{name} has head dimension {x.shape[3]}: expected a multiple of 8 from 8 to 256")
        if "q" in given and x.shape[3] != first.shape[3]:
            raise ValueError(f"{name} has head dimension {x.shape[3]}: expected {first.shape[3]}, as {first_name} has")


def same(name: str, got: int, expected: int, what: str) -> None:
    if got != expected:
        raise ValueError(f"{name} has {got} {what}: expected {expected}")


def shape(name: str, x: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(x.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: expected {expected}")


def check_block(block: tuple[int, int]) -> None:
    bq, bk = block
    if bq < 16 or bq % 16 or bk < 32 or bk % 32:
        raise ValueError(f"block is {block}: expected a multiple of 16 query rows and of 32 keys")


def check_varlen(varlen: Varlen, batch: int) -> None:
    if batch != 1:
        raise ValueError(f"varlen with a batch of {batch}: expected 1, the sequences are packed along the tokens")
    for name, cu in (("cu_q", varlen.cu_q), ("cu_k", varlen.cu_k)):
        if cu.dtype != torch.int32 or cu.dim() != 1 or cu.shape[0] < 2:
            raise ValueError(f"varlen.{name} is {cu.dtype} {tuple(cu.shape)}: expected int32 (sequences + 1,)")
    same("varlen.cu_k", varlen.cu_k.shape[0], varlen.cu_q.shape[0], "entries, as many as cu_q")


def check_mixed(p: Softmax) -> None:
    check_tensors({"q": p.q, "k": p.k, "v": p.v}, ("q", "k", "v"))
    groups, keys = p.k.shape[1], p.k.shape[2]
    same("v", p.v.shape[1], groups, "heads, as many as k")
    same("v", p.v.shape[2], keys, "keys, as many as k")
    if p.varlen is None:
        if p.causal and keys < p.q.shape[2]:
            raise ValueError(f"k has {keys} keys: expected at least {p.q.shape[2]}, the rows of q stand at the last")
    else:
        check_varlen(p.varlen, p.q.shape[0])
        if p.extra is not None:
            raise ValueError("extra beside varlen: expected one of them, further keys belong to a batch of caches")
    if isinstance(p.where, Ranges):
        same("where", len(p.where.sizes), groups, "windows, one for each KV group")
    else:
        check_block(p.where.block)
        if p.extra is not None:
            raise ValueError("extra beside Blocks: expected Ranges, lists name every key themselves")
        lists = p.where.starts.shape
        sequences = p.q.shape[0] if p.varlen is None else p.varlen.cu_q.shape[0] - 1
        if lists[0] not in (1, sequences) or lists[1] not in (1, groups):
            raise ValueError(f"where has {tuple(lists[:2])} lists: expected (1 or {sequences}, 1 or {groups})")
        rows = p.q.shape[2] if p.varlen is None else p.varlen.max_q
        if lists[2] * p.where.block[0] < rows:
            raise ValueError(f"where has {lists[2]} lists of {p.where.block[0]} rows: expected all {rows} rows")
    if p.valid is not None:
        shape("valid", p.valid, (p.q.shape[0], keys))
        if p.valid.dtype != torch.bool:
            raise ValueError(f"valid is {p.valid.dtype}: expected bool")
    if p.extra is not None:
        slots = p.extra.at.shape[-1]
        for name, x in (("extra.k", p.extra.k), ("extra.v", p.extra.v)):
            shape(name, x, (p.k.shape[0], groups, slots, p.k.shape[3]))
        shape("extra.at", p.extra.at, (p.k.shape[0], groups, slots))
    if p.softcap < 0:
        raise ValueError(f"softcap is {p.softcap}: expected 0 (none) or a positive number")
    if p.sink_logits is not None:
        shape("sink_logits", p.sink_logits, (p.q.shape[1],))


def check_branch(p: Softmax, branch: Branch) -> None:
    groups, per = p.k.shape[1], p.q.shape[1] // p.k.shape[1]
    same("branch.index", len(branch.index), groups, "entries, one for each KV group")
    named = [t for t in branch.index if t >= 0]
    if sorted(named) != list(range(len(named))) or not named:
        raise ValueError(f"branch.index is {branch.index}: expected each row of fk once and −1 elsewhere")
    if branch.fk.shape[1] != len(named) or branch.fq.shape[1] != len(named) * per:
        raise ValueError(
            f"branch.fq, fk have {branch.fq.shape[1]}, {branch.fk.shape[1]} heads: "
            f"expected {len(named) * per}, {len(named)}"
        )
    same("branch.fq", branch.fq.shape[2], p.q.shape[2], "rows, as many as q")
    same("branch.fk", branch.fk.shape[2], p.k.shape[2], "keys, as many as k")
    same("branch.fk", branch.fk.shape[3], branch.fq.shape[3], "features, as many as fq")
    if branch.shared and branch.weight is None:
        raise ValueError("branch.weight is None: expected (heads of fq,), the weight under a shared normaliser")
    if branch.weight is not None:
        shape("branch.weight", branch.weight, (branch.fq.shape[1],))
    if isinstance(p.where, Ranges) and p.causal:
        for g, t in enumerate(branch.index):
            if t >= 0 and p.where.sizes[g] < 0:
                raise ValueError(f"where.sizes[{g}] is −1, no limit: a branch beside it has nothing to cover")
    elif branch.state is not None:
        raise ValueError("branch.state without causal Ranges: expected None, only they carry a state")
    if branch.state is not None:
        count = p.q.shape[0] if p.varlen is None else p.varlen.cu_q.shape[0] - 1
        shape("branch.state", branch.state, (count, len(named), branch.fk.shape[3], p.v.shape[3] + 1))
