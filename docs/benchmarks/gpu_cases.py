"""What is measured on the GPU, in sections that each run in a process of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from cases import (
    SETS,
    Inputs,
    Run,
    Steps,
    attention,
    hybrid,
    kept,
    linear,
    random_blocks,
    retention,
    sdpa,
    sla,
    unavailable,
    window,
)
from gpu_others import fla, flex, flex_blocks, flex_window, missing, natten, no_varlen, varlen
from measure import BOTH, DECODE, FORWARD, Group
from shapes import (
    FLUX_1024,
    FLUX_4096,
    WAN_480,
    WAN_720,
    Shape,
    attention_bytes,
    attention_flops,
    cache_bytes,
    dense_pairs,
    linear_bytes,
    linear_flops,
    llama,
    smollm2,
    window_of,
    window_pairs,
)

from attnconvert.kernels.lowering import blocks
from attnconvert.kernels.lowering import flex as mask_mod
from attnconvert.kernels.masks import Layout, Mask
from attnconvert.kernels.masks_density import density
from attnconvert.kernels.masks_patterns import disc, radial, tiled
from attnconvert.kernels.problem import Blocks

DTYPE = "bf16"
BLOCK = (128, 64)
SPARSE = (0.1, 0.25, 0.5)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where it runs. dry: on the CPU with the torch back end and tiny shapes, to try the control flow."""

    device: str = "cuda"
    backend: str = "triton"
    dry: bool = False

    def shape(self, shape: Shape) -> Shape:
        return shape.small() if self.dry else shape

    @property
    def no_gpu(self) -> str | None:
        return "this is a dry run" if self.dry else None


def dense_entries(group: Group, x: Inputs, place: Place, causal: bool) -> tuple[tuple[str, ...], str]:
    """What everything else is held against: (SDPA entries, our dense entry)."""
    case = "causal" if causal else "dense"
    more = {"flops": attention_flops(x.shape, dense_pairs(x.shape.tokens, causal)), "moved": attention_bytes(x.shape)}
    grouped = x.shape.heads != x.shape.kv_heads
    cudnn = group.add(case, "SDPA cuDNN", lambda: sdpa(x, causal, None if place.dry else "CUDNN_ATTENTION"), **more)
    flash = group.add(case, "SDPA flash", lambda: sdpa(x, causal, "FLASH_ATTENTION"), skip=place.no_gpu, **more)
    common = {"baseline": (cudnn,), **more}
    if grouped and group.phase == FORWARD:
        group.add(
            f"{case}, groups", "SDPA flash", lambda: sdpa(x, causal, "FLASH_ATTENTION", "grouped"), skip=place.no_gpu,
            **common,
        )  # fmt: skip
    group.add(case, "varlen", lambda: varlen(x, causal), skip=place.no_gpu or no_varlen(), **common)
    common |= {"same": cudnn, "skip": unavailable(place.backend)}
    mine = group.add(case, place.backend, lambda: window(x, -1, causal, place.backend), **common)
    return (cudnn, flash), mine


class Add:
    """Adds our entries: with the baseline, the share of the dense work, and its floor."""

    def __init__(self, group: Group, x: Inputs, place: Place, causal: bool) -> None:
        self.group, self.x, self.place, self.causal = group, x, place, causal
        self.sdpa, self.mine = dense_entries(group, x, place, causal)
        self.skip = unavailable(place.backend)

    def __call__(
        self, case: str, make: Callable[[], Run], share: float | None, provider: str | None = None, **more: Any
    ) -> str:
        pairs = dense_pairs(self.x.shape.tokens, self.causal)
        if share is not None:
            more = {"density": share, "flops": attention_flops(self.x.shape, share * pairs), **more}
            more = {"dense": self.mine, "moved": attention_bytes(self.x.shape), **more}
        more = {"baseline": self.sdpa[:1], "skip": self.skip if provider is None else None, **more}
        return self.group.add(case, provider or self.place.backend, make, **more)

    def flex(self, case: str, make: Callable[[], Run], share: float, same: str | None = None) -> None:
        self(case, make, share, provider="FlexAttention", skip=self.place.no_gpu, same=same)


def started(shape: Shape, phase: str, place: Place, causal: bool) -> tuple[Group, Inputs, Add]:
    shape = place.shape(shape)
    group = Group(phase=phase, dtype=DTYPE, shape=shape)
    x = Inputs(shape, torch.bfloat16, place.device, grad=phase == BOTH)
    return group, x, Add(group, x, place, causal)


# ----------------------------------------------------------------------------------------------------- images and video


def diffusion(shape: Shape, phase: str, place: Place) -> Group:
    """Not causal: a window, random lists, masks over the grid, SLA."""
    group, x, add = started(shape, phase, place, False)
    shape, backend = x.shape, place.backend
    size = window_of(shape.tokens, 0.1)
    share = window_pairs(shape.tokens, size, False) / dense_pairs(shape.tokens, False)
    add("window 10 %", lambda: window(x, size, False, backend), share, note=f"|i − j| < {size}")
    _over_the_grid(add, x, phase)
    total = -(-shape.tokens // BLOCK[1])
    large = shape.model in (FLUX_4096.model, WAN_720.model)
    for target in SPARSE if phase == FORWARD else SPARSE[:1]:
        lists = cache(partial(random_blocks, shape, target, place.device, BLOCK))
        add(
            f"block-sparse {target:.0%}",
            lambda lists=lists: attention(x, lists(), False, backend),
            kept(total, target) / total,
            goal="h200-sparse" if phase == FORWARD and large else None,
            note="random lists of 128×64 blocks",
        )
    if phase == FORWARD and shape.model in (FLUX_4096.model, WAN_480.model):
        count = -(-shape.tokens // 128)
        add.flex("block-sparse 25%", lambda: flex_blocks(x, 0.25), kept(count, 0.25) / count)
    if not shape.text:
        _sla(add, x, total, phase)
    return group


def _sla(add: Add, x: Inputs, total: int, phase: str) -> None:
    """95 % of the blocks go to the linear branch."""
    keep, backend = kept(total, 0.05), add.place.backend
    aim = phase == FORWARD and x.shape.model == WAN_720.model
    add(
        "SLA 95 % sparse, selection and branch included",
        lambda: sla(x, keep, backend),
        None,
        goal="h200-sla" if aim else None,
        note="softmax feature maps included; the two outputs are added",
        baseline=add.sdpa,
        moved=attention_bytes(x.shape),
        flops=attention_flops(x.shape, keep / total * dense_pairs(x.shape.tokens, False)),
    )
    lists = cache(partial(random_blocks, x.shape, 0.05, add.place.device, BLOCK))
    add("SLA 95 % sparse, lists given", lambda: sla(x, keep, backend, lists()), None, baseline=add.sdpa)
    add("block-sparse 5 %", lambda: attention(x, lists(), False, backend), keep / total)
    add(
        "linear, Hedgehog",
        lambda: linear(x, False, backend),
        None,
        flops=linear_flops(x.shape, 2 * x.shape.dim),
        moved=attention_bytes(x.shape),
        note="feature maps included",
    )


TILE = (8, 16)  # of an image: as many tokens as a query block has


def _over_the_grid(add: Add, x: Inputs, phase: str) -> None:
    shape = x.shape
    if shape.model == FLUX_4096.model:
        layout = Layout(grid=shape.grid, text_first=shape.text, order="tile", tile=TILE)
        tiles = tiled(window=(9, 5), tile=TILE)  # 45 of the 512 tiles, and the text
        name = _masked(add, x, "window of 72×80 tokens in tiles, 10 %", tiles, layout, goal=phase == FORWARD)
        if phase == FORWARD:
            share = _density(tiles, layout, x.device)
            add.flex(name.partition(": ")[2], lambda: flex(x, mask_mod(tiles, layout, device=x.device)), share, name)
            _masked(add, x, "disc of radius 46, 10 %", disc(radius=46), layout)
            window = (81, 81)
            skip = add.place.no_gpu or missing("natten", "NATTEN")
            share = 81 * 81 / (256 * 256)
            add("window of 81×81 tokens, no text", lambda: natten(x, window), share, provider="NATTEN", skip=skip)
    elif shape.model == WAN_480.model and phase == FORWARD:
        layout = Layout(grid=shape.grid)
        _masked(add, x, "radial, as for Wan", radial(decay=0.2, neighbour=0.5, sink=True), layout)


@cache
def _lists(mask: Mask, layout: Layout, device: str) -> Blocks:
    return blocks(mask, layout, BLOCK, device)


@cache
def _density(mask: Mask, layout: Layout, device: str) -> float:
    return density(_lists(mask, layout, device), layout.tokens).element


def _masked(add: Add, x: Inputs, case: str, mask: Mask, layout: Layout, goal: bool = False) -> str:
    return add(
        case,
        lambda: attention(x, _lists(mask, layout, x.device), False, add.place.backend),
        _density(mask, layout, x.device),
        goal="h200-window" if goal else None,
    )


# ------------------------------------------------------------------------------------------------------ language models


def language(shape: Shape, phase: str, place: Place) -> Group:
    """Causal: windows, lists, linear, hybrid, retention."""
    long = shape.tokens == 32768
    group, x, add = started(shape, phase, place, True)
    shape, backend, half = x.shape, place.backend, dense_pairs(x.shape.tokens, True)
    size = min(1024, shape.tokens // 4)
    share = window_pairs(shape.tokens, size, True) / half
    case = f"window {size}"
    mine = add(case, lambda: window(x, size, True, backend), share)
    if phase == FORWARD or long:
        skip = place.no_gpu or no_varlen()
        add(case, lambda: varlen(x, True, size), share, provider="varlen", skip=skip, same=mine)
    if long:
        add.flex(case, lambda: flex_window(x, size, True), share, mine)
    sinks = 4
    add(f"window {size} + {sinks} sinks", lambda: window(x, size, True, backend, sinks), share)
    if phase == FORWARD:
        for target in SPARSE[:2]:
            lists = cache(partial(random_blocks, shape, target, place.device, BLOCK, causal=True))
            add(
                f"block-sparse {target:.0%}",
                lambda lists=lists: attention(x, lists(), True, backend),
                density(lists(), shape.tokens, causal=True).element,
                note="random lists of 128×64 blocks and those of the diagonal",
            )
    _linear(add, x, long)
    add("hybrid 64 + 4 sinks, Hedgehog", lambda: hybrid(x, 64, sinks, backend), None, note="feature maps included")
    if phase == FORWARD and shape.model.startswith("SmolLM2"):
        against = add("window 128", lambda: window(x, 128, True, backend), window_pairs(shape.tokens, 128, True) / half)
        note = "against a window of the same bytes"
        make = partial(retention, x, 64, 64, sinks, 16, backend)
        add("retention 64 + 64 + 4", make, None, baseline=(against,), note=note)
    return group


def _linear(add: Add, x: Inputs, long: bool) -> None:
    shape, backend, dim = x.shape, add.place.backend, x.shape.dim
    aim = long and add.group.phase == FORWARD and shape.model.startswith("Llama")
    skip = add.place.no_gpu or missing("fla", "flash-linear-attention")
    given = {"flops": linear_flops(shape, dim), "moved": linear_bytes(shape, dim)}
    case, note = "linear causal, features given", f"{dim} features"
    other = add(case, lambda: fla(x), None, provider="flash-linear-attention", skip=skip, **given)
    against = (other,) if aim else add.sdpa[:1]
    goal = "h200-linear" if aim else None
    add(case, lambda: linear(x, True, backend, False), None, baseline=against, goal=goal, note=note, **given)
    told = "feature maps included"
    whole = {"flops": linear_flops(shape, 2 * dim), "moved": attention_bytes(shape), "note": told}
    add("linear causal, Hedgehog", lambda: linear(x, True, backend), None, **whole)


def decode(shape: Shape, place: Place) -> Group:
    """One query over caches that take turns."""
    shape = place.shape(shape)
    slots, groups = shape.tokens, shape.kv_heads
    group = Group(phase=DECODE, dtype=DTYPE, shape=shape)
    steps = Steps(shape, slots, torch.bfloat16, place.device)
    common = {"calls": SETS, "flops": 0.0}
    moved = cache_bytes(shape, slots)
    repeated = group.add("full cache, KV repeated beforehand", "SDPA", lambda: steps.sdpa("before"), **common)
    common["baseline"] = (repeated,)
    group.add("full cache, KV repeated in the call", "SDPA", lambda: steps.sdpa("within"), same=repeated, **common)
    group.add("full cache, heads folded", "SDPA", lambda: steps.sdpa("folded"), same=repeated, moved=moved, **common)
    short = min(1024, slots // 4) + 4
    common["skip"] = unavailable(place.backend)
    ours = partial(steps.ours, place.backend)
    group.add("full cache", place.backend, ours, same=repeated, moved=moved, **common)
    cases = {
        f"window {short - 4} + 4 sinks": ((short,) * groups, False),
        f"window {short - 4} + 4 sinks + state": ((short,) * groups, True),
        "half of the groups full, half windows": ((slots,) * (groups // 2) + (short,) * (groups - groups // 2), False),
    }
    for case, (sizes, state) in cases.items():
        read = sum(cache_bytes(shape, size) / groups for size in sizes)
        if state:
            read += 4 * groups * 2 * shape.dim * (shape.dim + 1)
        group.add(case, place.backend, partial(ours, short=sizes, state=state), moved=read, **common)
    return group


# ------------------------------------------------------------------------------------------------------------- sections


def _flux(place: Place) -> Iterator[Group]:
    yield diffusion(FLUX_4096, FORWARD, place)
    yield diffusion(FLUX_1024, FORWARD, place)
    yield diffusion(FLUX_4096, BOTH, place)
    yield diffusion(FLUX_1024, BOTH, place)


def _wan(place: Place) -> Iterator[Group]:
    yield diffusion(WAN_720, FORWARD, place)
    yield diffusion(WAN_480, FORWARD, place)
    yield diffusion(WAN_720, BOTH, place)
    yield diffusion(WAN_480, BOTH, place)


def _llama(place: Place) -> Iterator[Group]:
    yield language(llama(32768), FORWARD, place)
    yield language(llama(8192), FORWARD, place)
    yield language(llama(131072), FORWARD, place)
    yield language(llama(32768), BOTH, place)
    yield language(llama(8192), BOTH, place)


def _smollm2(place: Place) -> Iterator[Group]:
    yield language(smollm2(8192), FORWARD, place)
    yield language(smollm2(32768), FORWARD, place)
    yield language(smollm2(8192), BOTH, place)


def _decode(place: Place) -> Iterator[Group]:
    for tokens in (8192, 32768, 131072):
        yield decode(llama(tokens), place)
    yield decode(smollm2(8192), place)


MAKERS: dict[str, Callable[[Place], Iterator[Group]]] = {
    "flux": _flux,
    "wan": _wan,
    "llama": _llama,
    "decode": _decode,
    "smollm2": _smollm2,
}
