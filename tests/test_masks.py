"""Masks: the vocabulary against loops over pairs, and its lowerings against the dense matrix."""

import importlib.util
import itertools
import math
import random
import time
from pathlib import Path

import kernel_cases as cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from attnconvert.kernels import backend_torch, masks_dicts, masks_patterns
from attnconvert.kernels.lowering import blocks, dense, flex, forget, permutation
from attnconvert.kernels.masks import Ball, Band, Causal, Decay, First, LastRows, Layout, Mask, Mod, Pow2, Refs, Term
from attnconvert.kernels.masks_density import density
from attnconvert.kernels.problem import Softmax


@pytest.fixture
def rng(seed):
    return random.Random(seed)


# -------------------------------------------------------------------- the definitions, once more, as loops over pairs


def tokens(layout):
    """Of each token, before any reordering: ("text", position) or ("grid", position, coordinates by axis)."""
    names = {1: "n", 2: "hw", 3: "thw"}[len(layout.grid)]
    found = [{"i": i, "text": True} for i in range(layout.text_first)]
    for place in itertools.product(*(range(n) for n in layout.grid)):
        at = dict(zip(names, place, strict=True))
        if len(place) > 1:
            at["p"] = at["h"] * layout.grid[-1] + at["w"]
        found.append({"i": len(found), "text": False, **at})
    return found + [{"i": len(found) + i, "text": True} for i in range(layout.text_last)]


def length_of(layout, axis):
    return 1 + max(t[axis] for t in tokens(layout) if axis in t)


def both_have(q, k, axis):
    return axis in q and axis in k


def brute(layout, rule):
    found = tokens(layout)
    return torch.tensor([[bool(rule(q, k)) for k in found] for q in found])


def with_text(rule):
    return lambda q, k: q["text"] or k["text"] or rule(q, k)


def natten(i, j, n, w, s, d, causal):
    """The window of Generalized Neighborhood Attention on one axis, by listing the members of the class of i."""
    if i % d != j % d:
        return False
    members = [x for x in range(n) if x % d == i % d]
    own = members.index(i)
    group = [x for x in range(len(members)) if x // s == own // s]
    first = own // s * s
    if causal:
        leader = min(first + s - 1, group[-1])
        return members[max(leader - w + 1, 0)] <= j <= i
    leader = min(first + s // 2, len(members) - 1)
    start = leader - w // 2
    while start + w > len(members):
        start -= 1
    start = max(start, 0)
    return j in members[start : start + w]


def radial_rule(layout, decay, floor, neighbour, sink):
    per = layout.grid[1] * layout.grid[2]
    whole = 2 ** len(bin(per)[2:])

    def rule(q, k):
        r = abs(q["t"] - k["t"])
        if sink and k["t"] == 0:
            return True
        part = whole / 2 ** len(bin(r)[2:]) if r else whole
        if r == 0:
            wide = per
        elif r == 1:
            wide = neighbour * per
        else:
            wide = max(decay * part, floor)
        if part < floor and r % int(floor / part) != 0:
            return False
        return abs(q["p"] - k["p"]) <= wide

    return rule


ONE = [Layout(grid=(23,)), Layout(grid=(16,), text_first=3), Layout(grid=(13,), text_last=5)]
TWO = [Layout(grid=(5, 7)), Layout(grid=(4, 6), text_first=5), Layout(grid=(7, 3), text_first=1, text_last=4)]
THREE = [Layout(grid=(3, 4, 5)), Layout(grid=(5, 3, 3), text_last=4), Layout(grid=(6, 2, 5), text_first=7)]
P = masks_patterns


def after(q, k):
    return k["i"] <= q["i"]


def power_rule(q, k):
    d = q["i"] // 4 - k["i"] // 4
    return after(q, k) and (d < 2 or d in (1, 2, 4, 8, 16, 32) or k["i"] < 4)


CONSTRUCTED = [
    ("full", P.full(), ONE + TWO, lambda q, k: True),
    ("causal", P.causal(), ONE + THREE, after),
    ("sliding_window", P.sliding_window(size=4), ONE + TWO, lambda q, k: 0 <= q["i"] - k["i"] < 4),
    ("sliding_window", P.sliding_window(size=4, causal=False), ONE, lambda q, k: abs(q["i"] - k["i"]) < 4),
    (
        "a_shape",
        P.a_shape(size=3, sinks=2),
        ONE,
        lambda q, k: after(q, k) and (q["i"] - k["i"] < 3 or k["i"] < 2),
    ),
    (
        "tri_shape",
        P.tri_shape(size=3, sinks=2, rows=4),
        ONE[:1],
        lambda q, k: after(q, k) and (q["i"] - k["i"] < 3 or k["i"] < 2 or q["i"] >= 19),
    ),
    (
        "dilated",
        P.dilated(size=3, dilation=4),
        ONE,
        lambda q, k: q["i"] - k["i"] in (0, 4, 8),
    ),
    (
        "dilated",
        P.dilated(size=3, dilation=2, causal=False),
        ONE,
        lambda q, k: abs(q["i"] - k["i"]) in (0, 2, 4),
    ),
    (
        "strided",
        P.strided(local=2, every=3, unit=2, phase=1),
        ONE,
        lambda q, k: after(q, k) and (q["i"] // 2 - k["i"] // 2 < 2 or k["i"] // 2 % 3 == 1),
    ),
    ("power", P.power(unit=4, local=2), [*ONE, Layout(grid=(41,))], power_rule),
    ("grouped", P.grouped(size=6), ONE, lambda q, k: after(q, k) and q["i"] // 6 == k["i"] // 6),
    (
        "grouped",
        P.grouped(size=6, shift=3),
        ONE,
        lambda q, k: after(q, k) and (q["i"] + 3) // 6 == (k["i"] + 3) // 6,
    ),
    ("text_rows", P.text_rows(), TWO, lambda q, k: q["text"] and after(q, k)),
    (
        "neighbourhood",
        P.neighbourhood(window=(4,)),
        ONE,
        lambda layout: with_text(lambda q, k: natten(q["n"], k["n"], layout.grid[0], 4, 1, 1, False)),
    ),
    (
        "neighbourhood",
        P.neighbourhood(window=(3, 2), stride=(2, 1), dilation=(1, 2)),
        TWO,
        lambda layout: with_text(
            lambda q, k: (
                natten(q["h"], k["h"], layout.grid[0], 3, 2, 1, False)
                and natten(q["w"], k["w"], layout.grid[1], 2, 1, 2, False)
            )
        ),
    ),
    (
        "neighbourhood",
        P.neighbourhood(window=(3, 3, 2), stride=(2,), causal=(True, False, False)),
        THREE,
        lambda layout: with_text(
            lambda q, k: (
                natten(q["t"], k["t"], layout.grid[0], 3, 2, 1, True)
                and natten(q["h"], k["h"], layout.grid[1], 3, 2, 1, False)
                and natten(q["w"], k["w"], layout.grid[2], 2, 2, 1, False)
            )
        ),
    ),
    (
        "windows",
        P.windows(size=(3, 4), shift=(1, 2)),
        TWO,
        with_text(
            lambda q, k: (q["h"] + 2) // 3 == (k["h"] + 2) // 3 and (q["w"] + 2) // 4 == (k["w"] + 2) // 4,
        ),
    ),
    (
        "disc",
        P.disc(radius=2.5),
        TWO,
        with_text(lambda q, k: (q["h"] - k["h"]) ** 2 + (q["w"] - k["w"]) ** 2 < 6.25),
    ),
    (
        "disc",
        P.disc(radius=2),
        THREE,
        with_text(lambda q, k: sum((q[a] - k[a]) ** 2 for a in "thw") < 4),
    ),
    (
        "radial",
        P.radial(decay=0.2, floor=4, neighbour=0.5, sink=True),
        [*THREE, Layout(grid=(13, 2, 3), text_last=2)],
        lambda layout: with_text(radial_rule(layout, 0.2, 4, 0.5, True)),
    ),
    (
        "radial",
        P.radial(floor=2),
        THREE,
        lambda layout: with_text(radial_rule(layout, 1.0, 2, 1.0, False)),
    ),
    (
        "attention_tile",
        P.attention_tile(references=(0, 2)),
        THREE,
        with_text(lambda q, k: q["t"] == k["t"] or q["t"] in (0, 2) or k["t"] in (0, 2)),
    ),
    (
        "frames",
        P.frames(before=2, sinks=1, chunk=2),
        THREE,
        with_text(
            lambda q, k: 0 <= q["t"] // 2 - k["t"] // 2 <= 1 or (k["t"] < 1 and k["t"] // 2 <= q["t"] // 2),
        ),
    ),
    ("spatial", P.spatial(frames=2), THREE, with_text(lambda q, k: abs(q["t"] - k["t"]) < 2)),
    ("temporal", P.temporal(width=2), THREE, with_text(lambda q, k: abs(q["p"] - k["p"]) < 2)),
]


@pytest.mark.parametrize(("name", "mask", "layouts", "rule"), CONSTRUCTED, ids=[c[0] for c in CONSTRUCTED])
def test_a_pattern_is_what_a_loop_over_pairs_says(name, mask, layouts, rule):
    for layout in layouts:
        of_layout = rule(layout) if rule.__code__.co_varnames[:1] == ("layout",) else rule
        expected = brute(layout, of_layout)
        assert torch.equal(dense(mask, layout)[0], expected), layout


def test_every_pattern_is_tried():
    assert {name for name, *_ in CONSTRUCTED} | {"tiled"} == set(P.PATTERNS)


@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (2, 3, 4), (3, 5, 4)])
def test_sliding_tiles_are_windows_of_tiles_clamped_at_the_edge(grid):
    tile = (2, 3)[: len(grid)] if len(grid) == 2 else (1, 2, 2)
    for window in ((3,) * len(grid), (1, 2, 5)[: len(grid)]):
        layout = Layout(grid=grid, text_last=2)

        def rule(q, k, window=window):
            for axis, n, w, unit in zip("thw"[-len(grid) :], grid, window, tile, strict=True):
                count = math.ceil(n / unit)
                centre = min(max(q[axis] // unit, w // 2), count - 1 - w // 2)  # FastVideo's own order of clamps
                if abs(centre - k[axis] // unit) > w // 2:
                    return False
            return True

        expected = brute(layout, with_text(rule))
        assert torch.equal(dense(P.tiled(window=window, tile=tile), layout)[0], expected), (grid, window)


def test_the_closed_form_of_neighbourhoods_holds_for_all_small_sizes():
    for n in range(1, 12):
        for d in range(1, 4):
            for w in range(1, n // d + 1):
                for s, causal in itertools.product(range(1, w + 1), (False, True)):
                    mask = P.neighbourhood(window=(w,), stride=(s,), dilation=(d,), causal=(causal,))
                    expected = [[natten(i, j, n, w, s, d, causal) for j in range(n)] for i in range(n)]
                    got = dense(mask, Layout(grid=(n,)))[0]
                    assert got.tolist() == expected, (n, w, s, d, causal)


def test_predicates_that_no_pattern_uses_hold_what_they_say():
    layout = Layout(grid=(5, 6), text_first=2)
    tried = {
        Mod(axis="h", m=2, phase=1): lambda q, k: k["h"] % 2 == 1,
        Mod(axis="w", m=3, phase=2, of="q"): lambda q, k: q["w"] % 3 == 2,
        Mod(axis="w", m=4, phase=3, of="distance"): lambda q, k: (q["w"] - k["w"]) % 4 == 3,
        Mod(axis="p", m=3, unit=2, phase=0): lambda q, k: k["p"] // 2 % 3 == 0,
        Ball(radius=3, p=1): lambda q, k: abs(q["h"] - k["h"]) + abs(q["w"] - k["w"]) < 3,
        Ball(radius=2, p=0): lambda q, k: abs(q["h"] - k["h"]) < 2 and abs(q["w"] - k["w"]) < 2,
        Ball(radius=1.5, axes=("w",)): lambda q, k: abs(q["w"] - k["w"]) < 1.5,
        Band(axis="w", left=2, right=1): lambda q, k: -2 <= k["w"] - q["w"] <= 1,
        Band(axis="w", left=None, right=1): lambda q, k: k["w"] - q["w"] <= 1,
        Band(axis="w", left=10**15, right=None): lambda q, k: True,
        Band(axis="w", left=2, right=1, stride=3): lambda q, k: q["w"] // 3 * 3 - 1 <= k["w"] <= q["w"] // 3 * 3 + 2,
        LastRows(count=2, axis="h"): lambda q, k: q["h"] >= 3,
        Refs(axis="h", at=(1, 3), side="q"): lambda q, k: q["h"] in (1, 3),
        Refs(axis="h", at=[3, 1]): lambda q, k: k["h"] in (1, 3),
        Pow2(axis="w"): lambda q, k: abs(q["w"] - k["w"]) in (0, 1, 2, 4, 8),
        Decay(axis="h", within="w", width0=8, floor=2, decay=0.5): lambda q, k: (
            abs(q["w"] - k["w"]) <= {0: 6, 1: 6, 2: 2, 3: 2, 4: 2}[abs(q["h"] - k["h"])]
            and abs(q["h"] - k["h"]) % (2 if abs(q["h"] - k["h"]) > 3 else 1) == 0
        ),
    }
    for predicate, rule in tried.items():
        expected = brute(layout, lambda q, k, rule=rule: not q["text"] and not k["text"] and rule(q, k))
        assert torch.equal(dense(Mask(terms=(Term(where=(predicate,)),)), layout)[0], expected), predicate


def test_text_to_text_and_grid_to_text_are_terms_of_their_own():
    layout = Layout(grid=(2, 3), text_first=2, text_last=1)
    mask = Mask(terms=(Term(q="text", k="text"), Term(q="grid", k="text", where=(Causal(),))))
    expected = brute(layout, lambda q, k: k["text"] and (q["text"] or k["i"] <= q["i"]))
    assert torch.equal(dense(mask, layout)[0], expected)


# -------------------------------------------------------------------------------------------------------- block lists


def expand(where, queries, keys):
    """(Hl, Q, K) bool that the lists describe, and (Hl, NQ, NK) int: 0 not listed, 1 partial, 2 full."""
    bq, bk = where.block
    _, heads, nq = where.starts.shape
    nk = -(-keys // bk)
    inside, named = torch.zeros(heads, nq * bq, nk * bk, dtype=torch.bool), torch.zeros(heads, nq, nk, dtype=torch.int)
    for h, n in itertools.product(range(heads), range(nq)):
        start, count = int(where.starts[0, h, n]), int(where.counts[0, h, n])
        listed = where.columns[start : start + count].tolist()
        assert listed == sorted(set(listed))
        for at, column in enumerate(listed, start):
            kind = -1 if where.kinds is None else int(where.kinds[at])
            tile = True if kind < 0 else cases.unpack(where.patterns[kind])
            inside[h, n * bq : n * bq + bq, column * bk : column * bk + bk] = tile
            named[h, n, column] = 2 if kind < 0 else 1
    return inside[:, :queries, :keys], named


def check_lists(where, expected, causal):
    """The lists against the dense mask (Hl, Q, K): what they hold, that nothing is listed in vain, the transpose."""
    queries, keys = expected.shape[1:]
    bq, bk = where.block
    inside, named = expand(where, queries, keys)
    i = torch.arange(queries)[:, None] + keys - queries
    matters = (torch.arange(keys) <= i) if causal else torch.ones(queries, keys, dtype=torch.bool)
    expected = expected & matters
    assert torch.equal(inside & matters, expected)
    pad = (0, -keys % bk, 0, -queries % bq)
    tiles = F.pad(expected, pad).unflatten(2, (-1, bk)).unflatten(1, (-1, bq))  # (Hl, NQ, bq, NK, bk)
    wanted = tiles.any(4).any(2).int()
    lacking = F.pad(matters & ~expected, pad).unflatten(2, (-1, bk)).unflatten(1, (-1, bq)).any(4).any(2)
    assert torch.equal(named, torch.where((wanted == 1) & ~lacking, 2, wanted))
    if where.patterns is not None:
        assert len({p.numpy().tobytes() for p in where.patterns}) == len(where.patterns)
    check_transpose(where, named)
    return named


def check_transpose(where, named):
    for h in range(named.shape[0]):
        rows, columns = {}, {}
        for n in range(named.shape[1]):
            for at in range(int(where.starts[0, h, n]), int(where.starts[0, h, n] + where.counts[0, h, n])):
                rows[n, int(where.columns[at])] = None if where.kinds is None else int(where.kinds[at])
        for m in range(named.shape[2]):
            start, count = int(where.t_starts[0, h, m]), int(where.t_counts[0, h, m])
            listed = where.t_columns[start : start + count].tolist()
            assert listed == sorted(set(listed))
            for at, n in enumerate(listed, start):
                columns[n, m] = None if where.t_kinds is None else int(where.t_kinds[at])
        assert rows == columns


def random_layout(rng):
    grid = rng.choice([(rng.randint(1, 300),), (rng.randint(1, 19), rng.randint(1, 19)), (4, 5, rng.randint(1, 13))])
    first, last = rng.choice([(0, 0), (rng.randint(1, 70), 0), (0, rng.randint(1, 70)), (9, 33)])
    order = rng.choice(["row", "tile", "".join(reversed({1: "n", 2: "hw", 3: "thw"}[len(grid)]))])
    tile = tuple(rng.randint(1, 6) for _ in grid) if order == "tile" else None
    return Layout(grid=grid, text_first=first, text_last=last, order=order, tile=tile)


def random_predicate(rng, layout):
    axis = rng.choice([*layout.axes, "i", *(["p"] if len(layout.grid) > 1 else [])])
    left, right = rng.choice([None, 0, 1, 3, 20]), rng.choice([None, 0, 2, 30])
    finite = None not in (left, right)
    unit = rng.choice([1, 1, 3, 32])
    options = [
        lambda: Causal(),
        lambda: Band(
            axis=axis,
            left=left,
            right=right,
            dilation=rng.choice([1, 1, 2, 3]),
            unit=unit,
            offset=rng.choice([0, 0, 5]),
            stride=rng.randint(1, min(4, left + right + 1)) if finite else 1,
            edge=rng.choice(["cut", "clamp"]) if finite else "cut",
        ),
        lambda: Ball(radius=rng.choice([1, 2.5, 4, 30]), p=rng.choice([0, 1, 2]), axes=rng.choice([None, (axis,)])),
        lambda: First(count=rng.choice([1, 4, 40]), axis=axis),
        lambda: LastRows(count=rng.choice([1, 4, 40]), axis=axis),
        lambda: Mod(axis=axis, m=3, phase=rng.randint(0, 2), unit=unit, of=rng.choice(["k", "q", "distance"])),
        lambda: Pow2(axis=axis, unit=unit),
        lambda: Refs(axis=axis, at=(0, rng.randint(1, 5)), side=rng.choice(["k", "q", "either"])),
        lambda: Decay(
            axis=layout.axes[0],
            within="p" if len(layout.grid) > 1 else "n",
            floor=rng.choice([1, 4, 128]),
            decay=rng.choice([0.2, 1.0]),
            neighbour=rng.choice([0.5, 1]),
        ),
    ]
    return rng.choice(options)()


def random_mask(rng, layout):
    terms = []
    for _ in range(rng.randint(1, 3)):
        where = tuple(random_predicate(rng, layout) for _ in range(rng.choice([0, 1, 1, 2, 3])))
        terms.append(Term(q=rng.choice(["*", "grid", "text"]), k=rng.choice(["*", "grid", "text"]), where=where))
    return Mask(terms=tuple(terms))


@pytest.mark.parametrize("chance", range(60))
def test_block_lists_hold_what_the_dense_mask_holds(rng, monkeypatch, chance):
    if chance % 2:  # through the coarse pass, which short sequences do not need
        monkeypatch.setattr("attnconvert.kernels.masks_blocks.PAIRS", 8)
        forget()
    layout = random_layout(rng)
    masks = tuple(random_mask(rng, layout) for _ in range(rng.choice([1, 1, 3])))
    block = (rng.choice([1, 16, 32, 48, 64, 128]), rng.choice([32, 64, 96]))
    queries = rng.choice([None, None, rng.randint(1, layout.tokens)])
    causal = rng.random() < 0.4
    where = blocks(masks, layout, block, queries=queries, causal=causal)
    expected = dense(masks, layout, queries=queries)
    named = check_lists(where, expected, causal)
    keys, rows = layout.tokens, expected.shape[1]
    i = torch.arange(rows)[:, None] + keys - rows
    matters = (torch.arange(keys) <= i) if causal else torch.ones(rows, keys, dtype=torch.bool)
    reach = F.pad(matters, (0, -keys % block[1], 0, -rows % block[0])).unflatten(1, (-1, block[1]))
    total = reach.unflatten(0, (-1, block[0])).any(3).any(1).sum()
    found = density(where, keys, rows, causal=causal)
    assert found.elements == pytest.approx(((expected & matters).sum((1, 2)) / matters.sum()).tolist())
    assert found.blocks == pytest.approx(((named > 0).sum((1, 2)) / total).tolist())
    assert found.full == pytest.approx(((named == 2).sum((1, 2)) / (named > 0).sum((1, 2)).clamp(min=1)).tolist())


@pytest.mark.parametrize(("name", "mask", "layouts", "rule"), CONSTRUCTED, ids=[c[0] for c in CONSTRUCTED])
def test_patterns_lower_to_their_dense_form_at_any_block_size(name, mask, layouts, rule):
    for layout, block in itertools.product(layouts, [(16, 32), (7, 32), (32, 64)]):
        check_lists(blocks(mask, layout, block), dense(mask, layout), causal=False)


def test_causal_calls_list_whole_blocks_on_the_diagonal():
    layout = Layout(grid=(256,))
    where = blocks(P.sliding_window(size=64), layout, (32, 32), causal=True)
    named = check_lists(where, dense(P.sliding_window(size=64), layout), causal=True)
    assert (named[0].diagonal() == 2).all()
    assert blocks(P.causal(), layout, (32, 32), causal=True).patterns is None
    assert blocks(P.causal(), layout, (32, 32)).patterns.shape == (1, 32, 1)  # one triangle serves all diagonals


def test_groups_with_equal_masks_share_their_lists():
    layout = Layout(grid=(300,))
    a, b = P.sliding_window(size=40), P.causal()
    where = blocks((a, b, a), layout, (32, 32))
    assert where.starts.shape == (1, 3, 10)
    assert torch.equal(where.starts[0, 0], where.starts[0, 2])
    alone = sum(blocks(m, layout, (32, 32)).columns.numel() for m in (a, b))
    assert where.columns.numel() == alone
    check_lists(where, dense((a, b, a), layout), causal=False)
    assert blocks((a, a, a), layout, (32, 32)).starts.shape == (1, 1, 10)
    heads = P.strided_heads(4, local=1, every=8, unit=32, dense=1)
    check_lists(blocks(heads, layout, (32, 32)), dense(heads, layout), causal=False)
    assert dense(heads, layout)[:, -1, ::32].sum(1).tolist() == [3, 2, 2, 10]  # its own block and every eighth


def test_softmax_over_the_lists_is_masked_attention(seed):
    layout = Layout(grid=(9, 11), text_first=14)
    masks = (P.disc(radius=3), P.neighbourhood(window=(3, 5)))
    q = torch.randn(2, 4, layout.tokens, 32)
    k, v = torch.randn(2, 2, 2, layout.tokens, 32)
    mask = dense(masks, layout).repeat_interleave(2, 0)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    where = blocks(masks, layout, (32, 32))
    inside = expand(where, layout.tokens, layout.tokens)[0].repeat_interleave(2, 0)
    s = (q @ k.repeat_interleave(2, 1).mT) * 32**-0.5
    o = s.masked_fill(~inside, -math.inf).softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(o, expected, rtol=1e-4, atol=1e-5)
    problem = Softmax(q=q, k=k, v=v, scale=32**-0.5, causal=False, where=where)
    torch.testing.assert_close(backend_torch.mixed_forward(problem, None).o, expected, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------- FlexAttention and order


def test_flex_masks_are_the_dense_ones_and_attend_alike(seed):
    layout = Layout(grid=(3, 6, 7), text_last=10)
    masks = (P.radial(floor=8), P.tiled(window=(1, 3, 3), tile=(1, 2, 2)))
    expected = dense(masks, layout).repeat_interleave(2, 0)
    mod = flex(masks, layout, group=2)
    n = layout.tokens
    h, q, kv = torch.arange(4)[:, None, None], torch.arange(n)[:, None], torch.arange(n)
    assert torch.equal(mod(0, h, q, kv), expected)
    block_mask = create_block_mask(mod, None, 4, n, n, device="cpu", BLOCK_SIZE=32)
    tiles = F.pad(expected, (0, -n % 32, 0, -n % 32)).unflatten(2, (-1, 32)).unflatten(1, (-1, 32)).any(4).any(2)
    assert torch.equal(block_mask.to_dense()[0].bool(), tiles)
    q, k, v = torch.randn(3, 1, 4, n, 16)
    got = flex_attention(q, k, v, block_mask=block_mask)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, attn_mask=expected), rtol=1e-4, atol=1e-5)
    single = flex(masks[0], layout, queries=5)
    rows, every = torch.arange(5)[:, None], torch.arange(n)
    assert torch.equal(single(0, 0, rows, every), dense(masks[0], layout)[0, -5:])


@pytest.mark.parametrize("order", ["row", "tile", "wth"])
def test_the_order_of_a_layout_permutes_the_mask(order):
    plain = Layout(grid=(3, 5, 6), text_first=4, text_last=3)
    tile = (2, 2, 3) if order == "tile" else None
    layout = Layout(grid=(3, 5, 6), text_first=4, text_last=3, order=order, tile=tile)
    perm, inverse = permutation(layout)
    x = torch.arange(plain.tokens)
    assert torch.equal(x[perm][inverse], x)
    for mask in (P.neighbourhood(window=(3, 3, 3)), P.causal(), P.radial(floor=4)):
        assert torch.equal(dense(mask, layout)[0], dense(mask, plain)[0][perm][:, perm])


def test_tiles_are_stored_one_after_another_and_make_whole_blocks():
    layout = Layout(grid=(4, 16, 16), text_first=20, order="tile", tile=(2, 4, 4))
    perm, _ = permutation(layout)
    place = perm[:32] - 20
    assert sorted({(int(p) // 256, int(p) // 16 % 16, int(p) % 16) for p in place}) == [
        (t, h, w) for t in range(2) for h in range(4) for w in range(4)
    ]
    assert perm[-20:].tolist() == list(range(20))  # text stands behind the grid
    mask = P.tiled(window=(1, 3, 3), tile=(2, 4, 4))
    where = blocks(mask, layout, (32, 32))
    assert where.kinds is None  # the text's block is cut only by the end of the sequence
    assert density(where, layout.tokens).block < 0.4
    rows = Layout(grid=(4, 16, 16), text_first=20)
    assert density(blocks(mask, rows, (32, 32)), rows.tokens).block > 1.5 * density(where, layout.tokens).block
    whole = Layout(grid=(4, 4), order="tile", tile=(2, 2))
    assert [int(p) for p in permutation(whole)[0]][::4] == [0, 2, 8, 10]
    cut = Layout(grid=(5, 5), order="tile", tile=(2, 2))
    assert [int(p) for p in permutation(cut)[0]][:8] == [0, 1, 5, 6, 2, 3, 7, 8]
    assert [int(p) for p in permutation(cut)[0]][16:] == [4, 9, 14, 19, 20, 21, 22, 23, 24]  # cut tiles come last


# --------------------------------------------------------------------------------------------------- caches and limits


def test_lowerings_are_kept_by_what_they_depend_on():
    forget()
    layout = Layout(grid=(8, 9))
    mask = P.disc(radius=3)
    assert blocks(mask, layout, (32, 32)) is blocks(
        P.disc(radius=3), Layout(grid=[8, 9]), [32, 32], torch.device("cpu")
    )
    assert blocks((mask, mask), layout, (32, 32)) is blocks(mask, layout, (32, 32), queries=72)
    assert flex(mask, layout) is flex(mask, layout)
    kept = blocks(mask, layout, (32, 32))
    others = [
        blocks(P.disc(radius=4), layout, (32, 32)),
        blocks(mask, Layout(grid=(9, 8)), (32, 32)),
        blocks(mask, layout, (32, 64)),
        blocks(mask, layout, (32, 32), causal=True),
        blocks(mask, layout, (32, 32), queries=40),
    ]
    assert all(other is not kept for other in others)
    before = dense(mask, layout)
    before[:] = False  # the caller's own
    assert dense(mask, layout).any()
    perm, _ = permutation(layout)
    perm[:] = 0
    assert permutation(layout)[0].tolist() != perm.tolist()


def test_a_mask_derives_from_the_grid_of_the_call():
    mask = P.neighbourhood(window=(3, 5))
    small, large = Layout(grid=(8, 16)), Layout(grid=(16, 8))
    assert not torch.equal(dense(mask, small), dense(mask, large))
    a, b = blocks(mask, small, (32, 32)), blocks(mask, large, (32, 32))
    check_lists(a, dense(mask, small), causal=False)
    check_lists(b, dense(mask, large), causal=False)
    assert not torch.equal(expand(a, 128, 128)[0], expand(b, 128, 128)[0])
    first, last = Layout(grid=(8, 16), text_first=9), Layout(grid=(8, 16), text_last=9)
    shifted = dense(mask, last).roll((9, 9), (1, 2))
    assert torch.equal(dense(mask, first), shifted)
    assert not torch.equal(dense(mask, first), dense(mask, last))


def test_lists_made_in_inference_mode_serve_training():
    forget()
    with torch.inference_mode():
        where = blocks(P.sliding_window(size=7), Layout(grid=(50,)), (32, 32))
        flex(P.causal(), Layout(grid=(9,)))(0, 0, torch.arange(9)[:, None], torch.arange(9))
    assert not where.columns.is_inference()
    assert not where.patterns.is_inference()


def test_long_sequences_lower_in_seconds_without_the_square():
    forget()
    image = Layout(grid=(256, 256), text_first=512)
    video = Layout(grid=(21, 45, 80))
    text = Layout(grid=(2**20,))
    start = time.process_time()
    for mask, layout, causal in [
        (P.disc(radius=32), image, False),
        (P.radial(decay=0.2, neighbour=0.5, sink=True), video, False),
        (P.a_shape(size=1024, sinks=4), text, True),
    ]:
        where = blocks(mask, layout, (128, 64), causal=causal)
        assert 0 < density(where, layout.tokens, causal=causal).block < 0.3
    assert time.process_time() - start < 20
    rng = np.random.default_rng(0)
    where = blocks(P.disc(radius=32), image, (128, 64))
    for n in rng.integers(0, 516, 5).tolist():  # some query blocks, pair by pair
        got = torch.zeros(128, image.tokens, dtype=torch.bool)
        for at in range(int(where.starts[0, 0, n]), int(where.starts[0, 0, n] + where.counts[0, 0, n])):
            c, kind = int(where.columns[at]), int(where.kinds[at])
            got[:, c * 64 : c * 64 + 64] = True if kind < 0 else cases.unpack(where.patterns[kind])
        i, j = torch.arange(n * 128, n * 128 + 128)[:, None] - 512, torch.arange(image.tokens) - 512
        near = (i // 256 - j // 256) ** 2 + (i % 256 - j % 256) ** 2 < 32**2
        assert torch.equal(got, near | (i < 0) | (j < 0))


def test_the_table_of_the_page_is_what_the_code_gives(rng):
    folder = Path(__file__).parents[1] / "docs"
    spec = importlib.util.spec_from_file_location("masks_page", folder / "masks.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    text = (folder / "masks.md").read_text(encoding="utf-8")
    lines = text.split("<!-- table -->\n")[1].split("\n<!-- end -->")[0].splitlines()[2:]
    assert len(lines) == len(page.ROWS)
    for n in rng.sample(range(len(lines)), 4):  # four of them each time, for the time they take
        assert page.row(*page.ROWS[n]) == lines[n]


# ------------------------------------------------------------------------------------------------ plain data and errors


def test_masks_and_layouts_survive_yaml(rng):
    for _, mask, _, _ in CONSTRUCTED:
        assert masks_dicts.mask_from_dict(yaml.safe_load(yaml.safe_dump(masks_dicts.mask_to_dict(mask)))) == mask
    for _ in range(50):
        layout = random_layout(rng)
        mask = random_mask(rng, layout)
        assert masks_dicts.mask_from_dict(yaml.safe_load(yaml.safe_dump(masks_dicts.mask_to_dict(mask)))) == mask
        assert (
            masks_dicts.layout_from_dict(yaml.safe_load(yaml.safe_dump(masks_dicts.layout_to_dict(layout)))) == layout
        )


def test_a_pattern_has_a_name_in_yaml():
    given = yaml.safe_load("[{pattern: causal}, {pattern: disc, radius: 16}, {terms: [{where: [causal]}]}]")
    assert masks_dicts.masks_from_list(given) == (P.causal(), P.disc(radius=16), P.causal())
    assert masks_dicts.masks_from_list({"pattern": "full"}) == (P.full(),)
    tile = {"pattern": "tiled", "window": [3, 3], "tile": [8, 8]}
    assert masks_dicts.mask_from_dict(tile) == P.tiled(window=(3, 3), tile=(8, 8))


WRONG = [
    (lambda: Layout(grid=()), "Layout.grid must be a sequence of whole numbers, not ()"),
    (lambda: Layout(grid=(1, 2, 3, 4)), "1, 2 or 3 axes"),
    (lambda: Layout(grid=(4, 0)), "each number of Layout.grid must be a whole number of at least 1, not 0"),
    (lambda: Layout(grid=(4,), text_first=-1), "Layout.text_first must be a whole number of at least 0, not -1"),
    (lambda: Layout(grid=(4, 4), order="hh"), "Layout.order must be 'row', 'tile' or an order of the axes"),
    (lambda: Layout(grid=(4, 4), order="tile"), "Layout.tile goes with order 'tile'"),
    (lambda: Layout(grid=(4, 4), order="tile", tile=(2,)), "one size per axis of the grid (4, 4), not (2,)"),
    (
        lambda: Band(axis="hh", left=1, right=1),
        "must be one of i, n, t, h, w, p, not 'hh': did you mean 'h'?",
    ),
    (lambda: Band(axis="h", left=-1, right=1), "Band.left must be a whole number of at least 0 or None, not -1"),
    (lambda: Band(axis="h", left=1, right=1, edge="clmp"), "did you mean 'clamp'?"),
    (lambda: Band(axis="h", left=None, right=1, edge="clamp"), "needs left and right, not (None, 1)"),
    (lambda: Band(axis="h", left=1, right=1, stride=4), "at most the width of the window, 3, not 4"),
    (lambda: Ball(radius=0), "Ball.radius must be a number greater than 0, not 0"),
    (lambda: Ball(radius=2, p=3), "Ball.p must be 1, 2 or 0"),
    (lambda: First(count=True), "First.count must be a whole number of at least 1, not True"),
    (lambda: Mod(axis="i", m=3, phase=3), "Mod.phase must be less than m = 3, not 3"),
    (lambda: Refs(axis="t", at=()), "Refs.at must be a sequence of whole numbers"),
    (lambda: Decay(floor=0), "Decay.floor"),
    (lambda: Term(q="txt"), "Term.q must be one of *, text, grid, not 'txt': did you mean 'text'?"),
    (lambda: Term(where=("causal",)), "Term.where must hold predicates"),
    (lambda: Mask(terms=()), "Mask.terms must hold at least one Term"),
    (lambda: P.neighbourhood(window=(3, 3), stride=(1, 1, 1)), "stride must have 1 or 2 values"),
    (lambda: P.frames(before=4, chunk=3), "whole chunks of 3 frames, not 4"),
    (lambda: P.tiled(window=(3,), tile=(8, 8)), "window and tile must each have"),
    (lambda: dense(P.disc(radius=3), "layout"), "layout must be a Layout, not 'layout'"),
    (lambda: dense((), Layout(grid=(4,))), "masks must be a Mask or one for each KV group"),
    (lambda: dense(P.radial(), Layout(grid=(4, 4))), "the mask has axis 't', the grid (4, 4) has i, h, w, p"),
    (
        lambda: dense(P.full(), Layout(grid=(4,)), queries=5),
        "queries must be at most the 4 tokens of",
    ),
    (lambda: flex(P.full(), Layout(grid=(4,)), group=0), "group must be a whole number of at least 1, not 0"),
    (lambda: blocks(P.full(), Layout(grid=(4,)), (32, 40)), "block[1] must be a multiple of 32, not 40"),
    (lambda: blocks(P.full(), Layout(grid=(4,)), 64), "block must be (tokens of a query block"),
    (lambda: density(blocks(P.full(), Layout(grid=(99,)), (32, 32)), 64), "queries must fill 4 blocks of 32"),
    (lambda: masks_dicts.mask_from_dict({"pattern": "disk"}), "no pattern 'disk': did you mean 'disc'?"),
    (
        lambda: masks_dicts.mask_from_dict({"pattern": "disc", "radus": 3}),
        "no setting 'radus': did you mean 'radius'?",
    ),
    (lambda: masks_dicts.mask_from_dict({"pattern": "disc"}), "pattern 'disc' lacks radius"),
    (lambda: masks_dicts.mask_from_dict({"term": []}), "mask has no setting 'term': did you mean 'terms'?"),
    (
        lambda: masks_dicts.mask_from_dict({"terms": [{"where": [{"bnd": {}}]}]}),
        "where[0]: no predicate 'bnd'",
    ),
    (lambda: masks_dicts.mask_from_dict({"terms": [{"where": [{"mod": {"axis": "i"}}]}]}), "mod lacks m"),
    (lambda: masks_dicts.layout_from_dict({"grd": [4]}), "layout has no setting 'grd': did you mean 'grid'?"),
    (lambda: masks_dicts.layout_from_dict([4]), "layout must be a mapping, not [4]"),
    (lambda: masks_dicts.masks_from_list([]), "masks is empty"),
]


@pytest.mark.parametrize(("make", "message"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_said_with_what_was_given(make, message):
    with pytest.raises(ValueError) as caught:
        make()
    assert message in str(caught.value)
