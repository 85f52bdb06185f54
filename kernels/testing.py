"""The rules that every operator is held to, for pytest: ours are in tests/test_operators.py, yours in a test of yours.

    import attnconvert, pytest
    from attnconvert.kernels.testing import cases, named

    @pytest.mark.parametrize(("spec", "rule"), cases(*attnconvert.register("taylor.py")), ids=named)
    def test_taylor(spec, rule):
        rule(spec)

A rule raises AssertionError where an operator breaks it. All compare with the operator's own dense reference in fp64,
at odd lengths, with grouped heads. `attnconvert operators check FILE` runs them without pytest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import operators
from .call import Call, Shape, map_state, state_bytes
from .masks import Layout
from .spec import (
    Spec,
    causal_only,
    grid_axes,
    grid_only,
    label,
    spec_class,
    spec_from_dict,
    spec_to_dict,
)

Sizes = tuple[int, int, int, int, int]  # B, H, Hk, S, D
SHAPES: tuple[Sizes, ...] = ((1, 4, 2, 1, 8), (2, 3, 1, 37, 16), (1, 2, 2, 131, 8), (1, 4, 2, 300, 8))
FEEDS = ((1,) * 37, (17, 1, 1, 9, 9), (30, 7), (2, 35))  # how 37 tokens may arrive
GRIDS = ((5, 7), (3, 5, 4))  # of an image, of a video
ARCHITECTURES: tuple[dict[str, Any], ...] = ({}, {"softcap": 3.0}, {"sinks": True})


# --- what the rules are tried on --------------------------------------------------------------------------------------


def make(sizes: Sizes, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Random q (B, H, S, D), k and v (B, Hk, S, D)."""
    batch, heads, kv_heads, length, dim = sizes
    generator = torch.Generator().manual_seed(seed)
    counts = (heads, kv_heads, kv_heads)
    return [torch.randn(batch, n, length, dim, generator=generator, dtype=torch.float64).to(dtype) for n in counts]


def learned_of(spec: Spec, sizes: Sizes, dtype: torch.dtype = torch.float64) -> nn.Module | None:
    """What the operator learns, away from where it starts."""
    torch.manual_seed(1)
    learned = operators.of(spec).parameters(spec, sizes[1], sizes[2], sizes[4])
    if learned is not None:
        learned = learned.to(dtype)
        for p in learned.parameters():
            p.data += 0.3 * torch.randn_like(p)
    return learned


def call_of(
    sizes: Sizes, valid: Tensor | None = None, softcap: float | None = None, sinks: bool = False, **more: Any
) -> Call:
    """A call over all of it, with what an architecture may bring."""
    sink_logits = torch.linspace(-1, 1, sizes[1], dtype=torch.float64) if sinks else None
    return Call(scale=sizes[4] ** -0.5, valid=valid, softcap=softcap, sink_logits=sink_logits, **more)


def left_padded(sizes: Sizes) -> Tensor:
    """(B, S): the first third of the first row is padding."""
    valid = torch.ones(sizes[0], sizes[3], dtype=torch.bool)
    valid[0, : sizes[3] // 3] = False
    return valid


@torch.no_grad()
def feed(
    spec: Spec, q: Tensor, k: Tensor, v: Tensor, call: Call, sizes: Sequence[int], learned: nn.Module | None
) -> tuple[Tensor, Any]:
    """The outputs when the tokens arrive in pieces of these sizes, and the last state."""
    state: Any = None
    parts, seen = [], 0
    for size in sizes:
        new = [x[:, :, seen : seen + size] for x in (q, k, v)]
        valid = None if call.valid is None else call.valid[:, : seen + size]
        part = dataclasses.replace(call, seen=seen, valid=valid)
        o, state = operators.attend(spec, new[0], new[1], new[2], part, state, learned)
        parts.append(o)
        seen += size
    return torch.cat(parts, 2), state


def _close(got: Tensor, want: Tensor, where: str, most: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, atol=most, rtol=most, msg=lambda told: f"{where}: {told}")


# --- the rules --------------------------------------------------------------------------------------------------------


def equals_reference(spec: Spec) -> None:
    """What runs gives what the reference says, at every shape, padded or not, with what architectures bring."""
    for sizes in SHAPES:
        for architecture in ARCHITECTURES:
            for valid in (None, left_padded(sizes)):
                q, k, v = make(sizes)
                call, learned = call_of(sizes, valid, **architecture), learned_of(spec, sizes)
                got, _ = operators.attend(spec, q, k, v, call, None, learned)
                want = operators.of(spec).reference(spec, q, k, v, call, learned)
                real = torch.ones_like(want, dtype=torch.bool)
                real = real if valid is None else valid[:, None, :, None].expand_as(want)
                where = f"{sizes}, {architecture or 'plain'}, {'whole' if valid is None else 'padded'}"
                _close(got[real], want[real], where)
                assert torch.isfinite(got).all(), f"{sizes}: not finite"


def pieces_agree(spec: Spec) -> None:
    """A prefill, its chunks and its tokens one by one give the same, padded or not."""
    sizes = (2, 4, 2, 37, 8)
    q, k, v = make(sizes)
    learned = learned_of(spec, sizes)
    for valid in (None, left_padded(sizes)):
        call = call_of(sizes, valid)
        whole, _ = operators.attend(spec, q, k, v, call, None, learned)
        for pieces in FEEDS:
            got, _ = feed(spec, q, k, v, call, pieces, learned)
            _close(got, whole, f"in pieces of {pieces}")


def padding_changes_nothing(spec: Spec) -> None:
    """The real tokens of a row give the same behind padding."""
    sizes = (1, 4, 2, 40, 8)
    q, k, v = make(sizes)
    learned = learned_of(spec, sizes)
    plain, _ = operators.attend(spec, q, k, v, call_of(sizes), None, learned)
    q, k, v = (torch.cat([torch.full_like(x[:, :, :11], 7.0), x], 2) for x in (q, k, v))
    valid = torch.arange(51)[None] >= 11
    padded, _ = operators.attend(spec, q, k, v, call_of(sizes, valid), None, learned)
    _close(padded[:, :, 11:], plain, "behind 11 tokens of padding")


def gradients_agree(spec: Spec) -> None:
    """Gradients of q, k, v and of what is learned are those of the reference."""
    sizes = (2, 4, 2, 23, 8)
    found = []
    call, learned = call_of(sizes, left_padded(sizes)), learned_of(spec, sizes)
    assert call.valid is not None
    weights = torch.randn(2, 4, 23, 8, dtype=torch.float64) * call.valid[:, None, :, None]
    for run in (operators.of(spec).reference, _attended):
        inputs = [x.clone().requires_grad_() for x in make(sizes)]
        trained = list(learned.parameters()) if learned is not None else []
        q, k, v = inputs
        loss = (run(spec, q, k, v, call, learned) * weights).sum()
        wanted: list[Tensor] = [*inputs, *trained]
        given = torch.autograd.grad(loss, wanted, allow_unused=True)
        found.append([torch.zeros_like(x) if g is None else g for x, g in zip(wanted, given, strict=True)])
    for n, (want, got) in enumerate(zip(*found, strict=True)):
        _close(got, want, f"gradient {n} of q, k, v and what is learned", 1e-9)


def _attended(spec: Spec, q: Tensor, k: Tensor, v: Tensor, call: Call, learned: nn.Module | None) -> Tensor:
    return operators.attend(spec, q, k, v, call, None, learned)[0]


def both_ways_equal_reference(spec: Spec) -> None:
    """Where rows read in both directions, as in encoders: the reference's value and gradient, and no state."""
    for sizes in SHAPES:
        for valid in (None, left_padded(sizes).flip(1)):
            _compare(spec, call_of(sizes, valid, causal=False), sizes)


def on_grids_equal_reference(spec: Spec) -> None:
    """Image and video tokens on odd grids, with a prompt beside them: the reference's value and gradient, no state."""
    for grid in GRIDS:
        for first, last in ((0, 0), (3, 0), (0, 6)):
            layout = Layout(grid=grid, text_first=first, text_last=last)
            if grid_axes(spec) in (None, len(grid)):
                call = call_of((2, 2, 1, layout.tokens, 8), causal=False, layout=layout, time=torch.tensor([0.9, 0.1]))
                _compare(spec, call, (2, 2, 1, layout.tokens, 8))


def _compare(spec: Spec, call: Call, sizes: Sizes) -> None:
    """Values and gradients of a call that is not causal, and that it leaves no state."""
    learned = learned_of(spec, sizes)
    real = torch.ones(sizes[0], sizes[3], dtype=torch.bool) if call.valid is None else call.valid
    weights = torch.randn(sizes[0], sizes[1], sizes[3], sizes[4], dtype=torch.float64) * real[:, None, :, None]
    outputs, gradients = [], []
    for run in (operators.of(spec).reference, _attended):
        inputs = [x.clone().requires_grad_() for x in make(sizes)]
        q, k, v = inputs
        outputs.append(run(spec, q, k, v, call, learned) * (weights != 0))
        trained = list(learned.parameters()) if learned is not None else []
        wanted: list[Tensor] = [*inputs, *trained]
        found = torch.autograd.grad((outputs[-1] * weights).sum(), wanted, allow_unused=True)
        gradients.append([torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)])
    _close(outputs[1], outputs[0], f"{sizes}")
    for want, got in zip(*gradients, strict=True):
        _close(got, want, f"gradients at {sizes}", 1e-9)
    q, k, v = make(sizes)
    assert operators.attend(spec, q, k, v, call, None, learned)[1] is None, "a call without a past leaves a state"


def states_follow_the_batch(spec: Spec) -> None:
    """The tensors of a state have the batch first: rows may be reordered and repeated, as beam search does."""
    sizes = (3, 4, 2, 20, 8)
    q, k, v = make(sizes)
    learned, order = learned_of(spec, sizes), torch.tensor([2, 0, 0])
    _, state = operators.attend(spec, q[:, :, :19], k[:, :, :19], v[:, :, :19], call_of(sizes), None, learned)
    state = map_state(state, lambda x: x.index_select(0, order))
    last = [x[order][:, :, 19:] for x in (q, k, v)]
    got, _ = operators.attend(spec, last[0], last[1], last[2], call_of(sizes, seen=19), state, learned)
    whole, _ = operators.attend(spec, q, k, v, call_of(sizes), None, learned)
    _close(got, whole[order][:, :, 19:], "after the rows were reordered")


def low_precision_is_close(spec: Spec) -> None:
    """In bf16 it is off by at most twice what rounding the inputs costs, and a little."""
    sizes = (1, 4, 2, 150, 16)
    q, k, v = make(sizes)
    learned = learned_of(spec, sizes)
    exact = operators.of(spec).reference(spec, q, k, v, call_of(sizes), learned)
    low = [x.bfloat16() for x in (q, k, v)]
    wide = [x.double() for x in low]
    rounded = operators.of(spec).reference(spec, *wide, call_of(sizes), learned)
    got, _ = operators.attend(
        spec, low[0], low[1], low[2], call_of(sizes), None, None if learned is None else learned.float()
    )
    assert got.dtype == torch.bfloat16, f"bf16 gives {got.dtype}"
    off, allowed = (got.double() - exact).abs().max(), 2 * (rounded - exact).abs().max() + 0.01
    assert off <= allowed, f"off by {off:.4f}, allowed are {allowed:.4f}"


def rows_without_keys_give_zero(spec: Spec) -> None:
    """Huge logits stay finite, and rows that read nothing give 0."""
    sizes = (2, 4, 2, 29, 8)
    q, k, v = (x * 1e4 for x in make(sizes))
    learned = learned_of(spec, sizes)
    o, _ = operators.attend(spec, q, k, v, call_of(sizes, torch.zeros(2, 29, dtype=torch.bool)), None, learned)
    assert torch.equal(o, torch.zeros_like(o)), "rows that may read nothing are not 0"


def costs_are_counted(spec: Spec) -> None:
    """The cost model says the bytes that states have, at any length, and FLOPs that do not shrink with it."""
    operator = operators.of(spec)
    before = 0.0
    for length in (3, 64, 300):
        sizes = (1, 3, 1, length, 8)
        q, k, v = make(sizes, dtype=torch.float32)
        _, state = operators.attend(spec, q, k, v, call_of(sizes), None, learned_of(spec, sizes, torch.float32))
        shape = Shape(queries=3, dim=8, element=4)
        assert bytes_of(state) == operator.state_size(spec, shape, length), f"bytes after {length} tokens"
        flops = operator.prefill_cost(spec, shape, length).flops
        assert flops > before, f"FLOPs of {length} tokens are no more than those of fewer"
        before = flops
        assert operator.decode_cost(spec, shape, length).state_bytes == operator.state_size(spec, shape, length)


def bytes_of(state: Any) -> int:
    """Bytes of a state, without the places of sinks and the room to spare that a growing cache has."""
    spare = 0
    if hasattr(state, "length"):
        spare = 2 * (state.k.shape[2] - state.length) * state.k[:, :, :1].numel() * state.k.element_size()
    places = state.sink_at.numel() * state.sink_at.element_size() if hasattr(state, "sink_at") else 0
    return state_bytes(state) - spare - places


def spec_reads_back(spec: Spec) -> None:
    """Its YAML describes it, and its label is short and a file name."""
    assert spec_from_dict(spec_to_dict(spec)) == spec
    assert label(spec).replace("-", "").replace(".", "").isalnum(), f"{label(spec)!r} is no file name"
    assert type(spec).__doc__, "the spec has no docstring, which is what recipes' schema tells of it"


Rule = Callable[[Spec], None]
ONE_WAY: tuple[Rule, ...] = (
    equals_reference,
    pieces_agree,
    padding_changes_nothing,
    gradients_agree,
    states_follow_the_batch,
    low_precision_is_close,
    rows_without_keys_give_zero,
    costs_are_counted,
)


def rules(spec: Spec) -> tuple[Rule, ...]:
    """The rules that an operator must keep: of sequences, in both directions where it can, or of grids."""
    if grid_only(spec):
        return on_grids_equal_reference, spec_reads_back
    return (*ONE_WAY, *(() if causal_only(spec) else (both_ways_equal_reference,)), spec_reads_back)


def examples(name: str) -> list[Spec]:
    """What an operator is tried as: the EXAMPLES of its file, else its defaults."""
    cls = spec_class(name)
    if cls is None:
        raise ValueError(f"no operator {name!r}: attnconvert.register(file) it first")
    return list(getattr(operators.file_of(name), "EXAMPLES", None) or [cls()])


def cases(*names: str) -> list[tuple[Spec, Rule]]:
    """Every example of some operators with every rule that it must keep."""
    return [(spec, rule) for name in names for spec in examples(name) for rule in rules(spec)]


def named(value: Any) -> str:
    """What a spec or a rule is called in a list of tests."""
    return value.__name__.replace("_", " ") if callable(value) else label(value)
