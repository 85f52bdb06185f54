"""The CPU back end: C++ kernels for AVX-512-BF16 and AVX2, built on first use by `cpp_build`, called through ctypes."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cpp_build import library
from .problem import (
    Blocks,
    Branch,
    Decode,
    Extra,
    Linear,
    Mixed,
    MixedGradients,
    Pooled,
    Ranges,
    Retain,
    Softmax,
    Varlen,
)
from .torch_retain import empty_memory
from .torch_select import selection

NAME = "cpp"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int32: 3, torch.bool: 4}
INPUTS = (torch.float32, torch.bfloat16, torch.float16)
KINDS = {"hedgehog": 0, "elu1": 1, "relu": 2, "softmax": 3}
WIDEST = 4096  # numbers in a row of features


class _Array(ctypes.Structure):
    """`Array` of problem.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
        ("size", ctypes.c_int64 * 4),
        ("stride", ctypes.c_int64 * 4),
    )


class _Args(ctypes.Structure):
    """`Args` of problem.h."""

    _fields_ = (
        *(
            (name, _Array)
            for name in (
                *("q", "k", "v", "o", "lse", "valid", "extra_k", "extra_v", "extra_at", "sink"),
                *("cu_q", "cu_k", "starts", "counts", "columns", "kinds", "patterns"),
                *("fq", "fk", "weight", "state", "linear", "den", "state_out"),
                *("d_o", "d_linear", "dq", "dk", "dv", "d_extra_k", "d_extra_v", "dfq", "dfk"),
            )
        ),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
        ("window", ctypes.POINTER(ctypes.c_int64)),
        ("index", ctypes.POINTER(ctypes.c_int64)),
        *((n, ctypes.c_int64) for n in ("threads", "causal", "block_q", "block_k", "softmax", "shared", "normalize")),
    )


class _FeatureArgs(ctypes.Structure):
    """`FeatureArgs` of features.cpp."""

    _fields_ = (
        *((name, _Array) for name in ("x", "out", "weight", "d_out", "dx", "d_weight")),
        ("kind", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    )


class _RetainArgs(ctypes.Structure):
    """`RetainArgs` of retain.cpp."""

    _fields_ = (
        *((name, _Array) for name in ("q", "k", "v", "at", "o", "sink")),
        ("before", _Array * 10),
        ("after", _Array * 10),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
        *((n, ctypes.c_int64) for n in ("window", "keep", "sinks", "block", "threads")),
    )


class _Part(ctypes.Structure):
    """`Part` of decode.cpp."""

    _fields_ = (
        *((name, _Array) for name in ("k", "v", "mask", "fq", "state", "weight", "late", "received")),
        ("first", ctypes.c_int64),
        ("used", ctypes.c_int64),
    )


class _DecodeArgs(ctypes.Structure):
    """`DecodeArgs` of decode.cpp."""

    _fields_ = (
        *((name, _Array) for name in ("q", "o", "sink")),
        ("parts", ctypes.POINTER(_Part)),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
        ("threads", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("groups", ctypes.c_int64),
    )


def unavailable() -> str | None:
    """Why the kernels cannot be used here, after the first attempt to build them."""
    found = library()
    return found if isinstance(found, str) else None


def refuses(function: str, problem: object) -> str | None:
    """Why this back end does not take the problem."""
    if function in ("features", "features_backward"):
        assert isinstance(problem, tuple)
        x, kind = problem[:2]
        if kind not in KINDS:
            return f"the feature map {kind!r} has no C++ kernel; those of {', '.join(KINDS)} have"
        if x.shape[-1] % 8:
            return f"x has {x.shape[-1]} numbers in a row: the C++ kernels take multiples of 8"
    if function == "select":
        return None  # runs in torch
    named = _tensors(problem)
    for name, x in named:
        if x.is_floating_point() and x.dtype not in INPUTS:
            return f"{name} is {x.dtype}: the C++ kernels take float32, bfloat16 and float16"
        if name in ("q", "k", "v") and x.shape[-1] % 8:
            return f"{name} has head dimension {x.shape[-1]}: the C++ kernels take multiples of 8"
        if name in ("fq", "fk") and x.shape[-1] > WIDEST:
            return f"{name} has {x.shape[-1]} features: the C++ kernels take up to {WIDEST}"
    found = {str(x.dtype): None for name, x in named if name in ("q", "k", "v", *MEMORY)}
    if function != "decode" and len(found) > 1:
        return f"q, k and v have different dtypes ({', '.join(found)}): the C++ kernels take one"
    return None


MEMORY = tuple(f"memory[{n}]" for n in (0, 1, 4, 5, 8, 9))  # the keys and values among those of `Retain`


def _tensors(problem: object, name: str = "x") -> list[tuple[str, Tensor]]:
    """The tensors of a problem and their names, however deep; not those of lists and ranges, which are int32."""
    if isinstance(problem, Tensor):
        return [(name, problem)]
    if isinstance(problem, tuple):
        return [y for n, x in enumerate(problem) for y in _tensors(x, f"{name}[{n}]")]
    if isinstance(problem, Ranges | Blocks) or not dataclasses.is_dataclass(problem):
        return []
    return [y for f in dataclasses.fields(problem) for y in _tensors(getattr(problem, f.name), f.name)]


def mixed_forward(p: Softmax, branch: Branch | None) -> Mixed:
    """o, lse and, with a branch, its output, denominator and state: `problem.Mixed`."""
    fill = torch.empty if p.varlen is None else torch.zeros  # packed rows may belong to no sequence
    a = _softmax_args(p)
    o = fill(p.q.shape, dtype=p.q.dtype)
    lse = fill(p.q.shape[:3], dtype=torch.float32)
    linear = den = state = None
    if branch is not None:
        _branch_args(a, branch)
        if not branch.shared:
            linear = fill(*branch.fq.shape[:3], p.v.shape[3], dtype=p.q.dtype)
            den = fill(branch.fq.shape[:3], dtype=torch.float32)
        if p.causal and isinstance(p.where, Ranges) and p.varlen is None:
            b, ht, _, f = branch.fk.shape
            state = torch.empty(b, ht, f, p.v.shape[3] + 1)
    a.set(o=o, lse=lse, linear=linear, den=den, state_out=state)
    a.call("attnconvert_forward")
    return Mixed(o=o, lse=lse, linear=linear, den=den, state=state)


def linear_forward(p: Linear) -> tuple[Tensor, Tensor, Tensor | None]:
    """o (B, H, Q, D) in the dtype of v, den (B, H, Q) and the last state, None where not causal."""
    fill = torch.empty if p.varlen is None else torch.zeros
    a = _linear_args(p)
    o = fill(*p.fq.shape[:3], p.v.shape[3], dtype=p.v.dtype)
    den = fill(p.fq.shape[:3], dtype=torch.float32)
    state = None
    if p.causal:
        count = p.fk.shape[0] if p.varlen is None else p.varlen.cu_q.shape[0] - 1
        state = torch.empty(count, p.fk.shape[1], p.fk.shape[3], p.v.shape[3] + 1)
    a.set(linear=o, den=den, state_out=state)
    a.call("attnconvert_forward")
    return o, den, state


def mixed_backward(p: Softmax, branch: Branch | None, out: Mixed, do: Tensor, dlinear: Tensor | None) -> MixedGradients:
    """Gradients of what `mixed_forward` read; the probabilities are computed again from `out.lse`."""
    fill = torch.empty if p.varlen is None else torch.zeros
    a = _softmax_args(p)
    dq, dk, dv = (fill(x.shape, dtype=x.dtype) for x in (p.q, p.k, p.v))
    a.set(o=out.o, lse=out.lse, d_o=do, dq=dq, dk=dk, dv=dv)
    dek = dev = dfq = dfk = None
    if p.extra is not None:  # groups without a window read none of them
        dek, dev = torch.zeros_like(p.extra.k), torch.zeros_like(p.extra.v)
        a.set(d_extra_k=dek, d_extra_v=dev)
    if branch is not None:
        dfq, dfk = (torch.zeros(x.shape, dtype=x.dtype) for x in (branch.fq, branch.fk))
        if branch.shared or dlinear is not None:
            _branch_args(a, branch)
            a.set(linear=out.linear, den=out.den, d_linear=dlinear, dfq=dfq, dfk=dfk)
    a.call("attnconvert_backward")
    return MixedGradients(q=dq, k=dk, v=dv, extra_k=dek, extra_v=dev, fq=dfq, fk=dfk)


def linear_backward(p: Linear, o: Tensor, den: Tensor, do: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of fq, fk and v."""
    fill = torch.empty if p.varlen is None else torch.zeros
    a = _linear_args(p)
    dfq, dfk, dv = (fill(x.shape, dtype=x.dtype) for x in (p.fq, p.fk, p.v))
    a.set(linear=o, den=den, d_linear=do, dfq=dfq, dfk=dfk, dv=dv)
    a.call("attnconvert_backward")
    return dfq, dfk, dv


def decode(p: Decode) -> tuple[Tensor, list[Tensor]]:
    """One new token per sequence: o (B, H, 1, D), and what the late slots of each part that asks received."""
    a = _Call(_DecodeArgs())
    o = torch.empty(p.q.shape, dtype=p.q.dtype)
    parts, received = (_Part * len(p.parts))(), list[Tensor]()
    for to, x in zip(parts, p.parts, strict=True):
        weight = None if x.weight is None else x.weight.float()
        a.set(to, k=x.k, v=x.v, mask=x.mask, fq=x.fq, state=x.state, weight=weight)
        if x.late is not None:
            received.append(torch.zeros(x.k.shape[:3]))
            a.set(to, late=x.late, received=received[-1])
        to.first, to.used = x.first, x.used
    a.set(q=p.q, o=o, sink=None if p.sink_logits is None else p.sink_logits.float())
    a.args.parts, a.args.count, a.args.groups = parts, len(parts), sum(x.k.shape[1] for x in p.parts)
    a.args.scale, a.args.softcap = p.scale, p.softcap
    a.call("attnconvert_decode")
    return o, received


def features(x: Tensor, kind: str, weights: tuple[Tensor, ...]) -> Tensor:
    """φ(x) (B, H, S, F) in the dtype of x."""
    out = torch.empty(*x.shape[:3], x.shape[3] * (2 if kind == "hedgehog" else 1), dtype=x.dtype)
    a = _features_args(x, kind, weights)
    a.set(out=out)
    a.call("attnconvert_features", 0)
    return out


def features_backward(
    x: Tensor, kind: str, weights: tuple[Tensor, ...], dout: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Gradients of x and of the weights."""
    dx, dweights = torch.empty(x.shape, dtype=x.dtype), tuple(torch.empty(w.shape, dtype=w.dtype) for w in weights)
    a = _features_args(x, kind, weights)
    a.set(d_out=dout, dx=dx, d_weight=dweights[0] if weights else None)
    a.call("attnconvert_features", 1)
    return dx, dweights


def _features_args(x: Tensor, kind: str, weights: tuple[Tensor, ...]) -> _Call:
    a = _Call(_FeatureArgs())
    a.set(x=x, weight=weights[0] if weights else None)
    a.args.kind = KINDS[kind]
    return a


def retain(p: Retain) -> tuple[Tensor, tuple[Tensor, ...]]:
    """o (B, H, Q, D) and the memory after it."""
    before = empty_memory(p) if p.memory is None else p.memory
    after = tuple(torch.empty(x.shape, dtype=x.dtype) for x in before)
    a = _Call(_RetainArgs())
    o = torch.zeros(p.q.shape, dtype=p.q.dtype)  # rows of padding stay 0
    a.set(q=p.q, k=p.k, v=p.v, at=p.at, o=o, sink=None if p.sink_logits is None else p.sink_logits.float())
    a.args.before[:] = [a.array(x) for x in before]
    a.args.after[:] = [a.array(x) for x in after]
    a.args.scale, a.args.softcap = p.scale, p.softcap
    a.args.window, a.args.keep, a.args.sinks, a.args.block = p.window, p.keep, p.sinks, p.block
    a.call("attnconvert_retain")
    return o, after


def select(p: Pooled) -> Blocks:
    """Block selection: as in torch, whose pooling, matrix product and sort have nothing to gain here."""
    return selection(p)


class _Call:
    """The arguments of one call and the tensors that they point to."""

    def __init__(self, args: Any = None) -> None:
        self.args = _Args() if args is None else args
        self.args.threads = torch.get_num_threads()
        self.held: list[object] = []

    def set(self, to: Any = None, **tensors: Tensor | None) -> None:
        for name, x in tensors.items():
            if x is not None:
                setattr(self.args if to is None else to, name, self.array(x))

    def array(self, x: Tensor) -> _Array:
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            x = x.contiguous()
        self.held.append(x)
        free = 4 - x.dim()
        size, stride = (*x.shape, 1, 1, 1)[:4], (*x.stride(), 0, 0, 0)[:4]
        assert free >= 0
        return _Array(x.data_ptr(), DTYPES[x.dtype], size, stride)

    def numbers(self, values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
        return (ctypes.c_int64 * len(values))(*values)

    def call(self, name: str, *more: int) -> None:
        found = library()
        if isinstance(found, str):
            raise RuntimeError(found)
        size = ctypes.sizeof(self.args)
        code = getattr(found, name)(ctypes.byref(self.args), *(ctypes.c_int64(x) for x in (size, *more)))
        assert code != 2, f"{name}: {type(self.args).__name__} is not what the C++ side reads"
        if code:
            raise MemoryError(f"{name}: no memory for the packed keys")


def _softmax_args(p: Softmax) -> _Call:
    a = _Call()
    a.set(q=p.q, k=p.k, v=p.v, valid=p.valid, sink=None if p.sink_logits is None else p.sink_logits.float())
    a.args.scale, a.args.softcap, a.args.softmax, a.args.causal = p.scale, p.softcap, 1, p.causal
    _where_args(a, p.where)
    _varlen_args(a, p.varlen)
    _extra_args(a, p.extra)
    return a


def _where_args(a: _Call, where: Ranges | Blocks) -> None:
    if isinstance(where, Ranges):
        a.args.window = a.numbers(where.sizes)
        return
    a.set(starts=where.starts, counts=where.counts, columns=where.columns.contiguous())
    a.set(kinds=where.kinds, patterns=where.patterns)
    a.args.block_q, a.args.block_k = where.block


def _varlen_args(a: _Call, varlen: Varlen | None) -> None:
    if varlen is not None:
        a.set(cu_q=varlen.cu_q, cu_k=varlen.cu_k)


def _extra_args(a: _Call, extra: Extra | None) -> None:
    if extra is not None and extra.at.shape[2]:
        a.set(extra_k=extra.k, extra_v=extra.v, extra_at=extra.at.contiguous())


def _branch_args(a: _Call, branch: Branch) -> None:
    a.set(
        fq=branch.fq, fk=branch.fk, state=branch.state, weight=None if branch.weight is None else branch.weight.float()
    )
    a.args.index, a.args.shared, a.args.normalize = a.numbers(branch.index), branch.shared, 1


def _linear_args(p: Linear) -> _Call:
    a = _Call()
    groups = p.fk.shape[1]
    a.set(fq=p.fq, fk=p.fk, v=p.v, state=p.state)
    a.args.causal, a.args.normalize = p.causal, p.normalize
    a.args.window, a.args.index = a.numbers([0] * groups), a.numbers(range(groups))
    _varlen_args(a, p.varlen)
    return a


def peak_gflops(dtype: torch.dtype = torch.float32, threads: int | None = None, seconds: float = 0.2) -> float:
    """10⁹ operations per second of the kernels' own inner loop on matrices in the first cache, over all threads."""
    found = library()
    if isinstance(found, str):
        raise RuntimeError(found)
    found.attnconvert_peak.restype = ctypes.c_double
    count = ctypes.c_int64(threads or torch.get_num_threads())
    rate = found.attnconvert_peak(ctypes.c_int64(dtype == torch.bfloat16), count, ctypes.c_double(seconds))
    return float(rate) / 1e9
