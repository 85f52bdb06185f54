"""The tiles of mixed attention: what a program owns and walks over, for each chip, and which of them a problem takes.

All are static, and the ahead-of-time gate compiles what these tables hold: no registers in memory, no more shared
memory than the chip has. Rows and keys of tiles are powers of two; a tile lies within one block of the lists.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from .problem import Blocks, Ranges, Softmax


@dataclass(frozen=True)
class Tile:
    """Tokens of a program's own tile and of those it walks over, warps, pipeline stages."""

    own: int
    walk: int
    warps: int
    stages: int


def padded(dim: int) -> int:
    """The next power of two, at least what a matrix unit takes."""
    return max(16, 1 << (dim - 1).bit_length())


def divisor(number: int, most: int) -> int:
    """The largest power of two up to `most` that divides `number`."""
    return min(number & -number, most)


LARGE = {  # the tile for many rows, by architecture, half precision and padded head dimension
    ("sm_80", True): {64: Tile(128, 64, 8, 3), 128: Tile(64, 64, 4, 2), 256: Tile(64, 32, 8, 2)},
    ("sm_89", True): {64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(64, 32, 8, 1)},
    ("sm_90", True): {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 32, 8, 2)},
    ("sm_100", True): {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 32, 8, 2)},
    ("gfx942", True): {64: Tile(128, 64, 8, 1), 128: Tile(128, 32, 8, 1), 256: Tile(64, 16, 8, 1)},
    ("sm_80", False): {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 8, 2), 256: Tile(32, 16, 8, 1)},
    ("sm_89", False): {64: Tile(64, 32, 4, 2), 128: Tile(64, 16, 8, 1), 256: Tile(32, 16, 8, 1)},
    ("sm_90", False): {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 8, 2), 256: Tile(32, 16, 8, 1)},
    ("sm_100", False): {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 8, 2), 256: Tile(32, 16, 8, 1)},
    ("gfx942", False): {64: Tile(64, 32, 4, 1), 128: Tile(64, 16, 8, 1), 256: Tile(32, 16, 8, 1)},
}


FULL = {  # where a branch, or single masked keys of a block, take more registers than there are
    ("sm_80", True): {128: Tile(128, 32, 8, 3)},
    ("sm_100", True): {128: Tile(128, 32, 8, 3)},
}


def configurations(arch: str, dim: int, half: bool, full: bool) -> tuple[Tile, ...]:
    """The tiles for many rows down to those for few; `full` problems have a branch or mask single keys of a block."""
    pad = max(64, padded(dim))
    large = LARGE[arch, half][pad]
    if full:
        large = FULL.get((arch, half), {}).get(pad, large)
    middle = Tile(64, large.walk, 4, large.stages) if half and pad <= 128 else Tile(64, large.walk, 8, large.stages)
    small = [Tile(own, min(large.walk, 32), 4 if pad <= 128 else 8, min(large.stages, 2)) for own in (32, 16)]
    return (large, *(x for x in (middle, *small) if x.own < large.own))


def tile_for(p: Softmax, arch: str, full: bool) -> Tile:
    """The largest tile that the rows fill; a tile lies within one query block of the lists."""
    options = configurations(arch, p.q.shape[3], p.q.dtype != torch.float32, full)
    most = options[0].own if p.varlen is not None else p.q.shape[2]  # packed: whatever the other sequences are
    rows = max(16, triton.next_power_of_2(most))
    walk = options[0].walk
    if isinstance(p.where, Blocks):
        rows = min(rows, divisor(p.where.block[0], 1024))
        walk = divisor(p.where.block[1], 1024)
    chosen = next(x for x in options if x.own <= rows or x is options[-1])
    return Tile(chosen.own, min(chosen.walk, walk), chosen.warps, chosen.stages)


QUERY = {  # rows, keys of a step, warps, stages of `query_kernel`
    ("sm_80", True): {64: Tile(128, 32, 8, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 32, 4, 1)},
    ("sm_89", True): {64: Tile(128, 32, 8, 2), 128: Tile(64, 32, 8, 1), 256: Tile(32, 32, 4, 1)},
    ("sm_90", True): {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(128, 32, 8, 2)},
    ("sm_100", True): {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
    ("gfx942", True): {64: Tile(128, 32, 8, 1), 128: Tile(64, 32, 4, 1), 256: Tile(64, 16, 8, 1)},
    ("sm_80", False): {64: Tile(64, 32, 8, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
    ("sm_89", False): {64: Tile(64, 32, 8, 1), 128: Tile(32, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
    ("sm_90", False): {64: Tile(64, 32, 8, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
    ("sm_100", False): {64: Tile(64, 32, 8, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
    ("gfx942", False): {64: Tile(32, 32, 8, 1), 128: Tile(32, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
}
KEY = {  # keys, rows of a step, warps, stages of `key_kernel`
    ("sm_80", True): {64: Tile(128, 32, 8, 2), 128: Tile(64, 32, 8, 2), 256: Tile(32, 32, 8, 1)},
    ("sm_89", True): {64: Tile(64, 32, 8, 2), 128: Tile(64, 32, 8, 1), 256: Tile(32, 16, 8, 1)},
    ("sm_90", True): {64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(32, 32, 8, 2)},
    ("sm_100", True): {64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(32, 32, 8, 2)},
    ("gfx942", True): {64: Tile(64, 32, 8, 1), 128: Tile(64, 16, 8, 1), 256: Tile(32, 16, 8, 1)},
    ("sm_80", False): {64: Tile(32, 32, 8, 1), 128: Tile(32, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
    ("sm_89", False): {64: Tile(32, 32, 8, 1), 128: Tile(32, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
    ("sm_90", False): {64: Tile(32, 32, 8, 1), 128: Tile(32, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
    ("sm_100", False): {64: Tile(32, 32, 8, 1), 128: Tile(32, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
    ("gfx942", False): {64: Tile(32, 32, 8, 1), 128: Tile(32, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
}


def half_of(p: Softmax) -> bool:
    """Whether the matrix units multiply 16-bit numbers."""
    return p.q.dtype != torch.float32


def query_tile(arch: str, half: bool, pad: int) -> Tile:
    """For `query_kernel`."""
    return QUERY[arch, half][max(64, pad)]


def key_tile(arch: str, half: bool, pad: int, full: bool, lists: bool = False) -> Tile:
    """For `key_kernel`; `full` problems, which cap, pack, or mask single keys, need registers of their own."""
    t = KEY[arch, half][max(64, pad)]
    return Tile(min(t.own, 64), t.walk, t.warps, 1 if lists else t.stages) if full else t


def fitted(t: Tile, p: Softmax, own: int) -> Tile:
    """The tile of programs that own rows (0) or keys (1), cut to what the blocks of the lists allow."""
    if isinstance(p.where, Ranges):
        return t
    tokens, steps = (divisor(p.where.block[x], 1024) for x in (own, 1 - own))
    t = t if t.own <= tokens else smaller(t, tokens, padded(p.q.shape[3]))
    return Tile(t.own, min(t.walk, steps), t.warps, t.stages)


def smaller(t: Tile, own: int, pad: int) -> Tile:
    """For blocks of fewer tokens than the tile has: 16, 32 or 64 of its own."""
    own = min(own, 64 if pad <= 128 else 32)
    return Tile(own, min(t.walk, 32), 8, t.stages)
