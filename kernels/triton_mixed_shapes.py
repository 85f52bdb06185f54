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
    ("sm_80", False): {64: Tile(32, 32, 8, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
    ("sm_89", False): {64: Tile(32, 32, 8, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
    ("sm_90", False): {64: Tile(32, 32, 8, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
    ("sm_100", False): {64: Tile(32, 32, 8, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
    ("gfx942", False): {64: Tile(64, 16, 8, 1), 128: Tile(64, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
}


FULL = {  # where a branch, padding, or single masked keys of a block take more registers than there are
    ("sm_80", True): {128: Tile(128, 32, 8, 3)},
    ("sm_100", True): {128: Tile(128, 32, 8, 3), 256: Tile(64, 32, 8, 2)},
    ("gfx942", True): {128: Tile(64, 32, 4, 1)},
}


def configurations(arch: str, dim: int, dtype: torch.dtype, full: bool, lists: bool) -> tuple[Tile, ...]:
    """The tile for many rows, one of 64 for lists of smaller blocks, and one for few rows."""
    pad, half = max(64, padded(dim)), dtype != torch.float32
    large = LARGE[arch, half][pad]
    if full:
        large = FULL.get((arch, half), {}).get(pad, large)
    if full and dtype == torch.float16:  # a branch multiplies in fp32
        large = Tile(large.own, min(large.walk, 32), large.warps, large.stages)
    warps = 4 if pad <= 128 else 8
    few = [Tile(16, min(large.walk, 32), warps, min(large.stages, 2))] if half else [LARGE[arch, half][256]]
    if half and lists:
        few = [Tile(64, large.walk, warps, large.stages), *few]
    return (large, *(x for x in few if x.own < large.own))


def tile_for(p: Softmax, arch: str, full: bool) -> Tile:
    """The tile for many rows where there are more than 32; a tile lies within one query block of the lists."""
    options = configurations(arch, p.q.shape[3], p.q.dtype, full, isinstance(p.where, Blocks))
    rows = options[0].own if p.varlen is not None else p.q.shape[2]  # packed: whatever the other sequences are
    if isinstance(p.where, Ranges):
        return options[0] if rows > 32 else options[-1]
    most = min(max(16, triton.next_power_of_2(rows)), divisor(p.where.block[0], 1024))
    t = next(x for x in options if x.own <= most or x is options[-1])
    return Tile(t.own, min(t.walk, divisor(p.where.block[1], 1024)), t.warps, t.stages)


QUERY = {  # rows, keys of a step, warps, stages of `query_kernel`
    ("sm_80", True): {64: Tile(128, 32, 8, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 32, 4, 1)},
    ("sm_89", True): {64: Tile(128, 32, 8, 2), 128: Tile(64, 32, 8, 1), 256: Tile(32, 32, 4, 1)},
    ("sm_90", True): {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(128, 32, 8, 2)},
    ("sm_100", True): {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
    ("gfx942", True): {64: Tile(128, 32, 8, 1), 128: Tile(64, 32, 4, 1), 256: Tile(64, 16, 8, 1)},
    ("sm_80", False): {64: Tile(32, 16, 8, 1), 128: Tile(32, 16, 8, 1), 256: Tile(32, 16, 8, 1)},
    ("sm_89", False): {64: Tile(32, 16, 8, 1), 128: Tile(32, 16, 8, 1), 256: Tile(32, 16, 8, 1)},
    ("sm_90", False): {64: Tile(32, 16, 8, 1), 128: Tile(32, 16, 8, 1), 256: Tile(32, 16, 8, 1)},
    ("sm_100", False): {64: Tile(32, 16, 8, 1), 128: Tile(32, 16, 8, 1), 256: Tile(32, 16, 8, 1)},
    ("gfx942", False): {64: Tile(32, 16, 8, 1), 128: Tile(32, 16, 8, 1), 256: Tile(32, 16, 8, 1)},
}
KEY = {  # keys, rows of a step, warps, stages of `key_kernel`
    ("sm_80", True): {64: Tile(128, 32, 8, 2), 128: Tile(64, 32, 8, 2), 256: Tile(32, 32, 8, 1)},
    ("sm_89", True): {64: Tile(64, 32, 8, 2), 128: Tile(64, 32, 8, 1), 256: Tile(32, 16, 8, 1)},
    ("sm_90", True): {64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(32, 32, 8, 2)},
    ("sm_100", True): {64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(32, 32, 8, 2)},
    ("gfx942", True): {64: Tile(64, 32, 8, 1), 128: Tile(64, 16, 8, 1), 256: Tile(32, 16, 8, 1)},
    ("sm_80", False): {64: Tile(32, 16, 8, 1), 128: Tile(32, 16, 8, 1), 256: Tile(32, 16, 8, 1)},
    ("sm_89", False): {64: Tile(32, 16, 8, 1), 128: Tile(32, 16, 8, 1), 256: Tile(32, 16, 8, 1)},
    ("sm_90", False): {64: Tile(32, 16, 8, 1), 128: Tile(32, 16, 8, 1), 256: Tile(32, 16, 8, 1)},
    ("sm_100", False): {64: Tile(32, 16, 8, 1), 128: Tile(32, 16, 8, 1), 256: Tile(32, 16, 8, 1)},
    ("gfx942", False): {64: Tile(32, 16, 8, 1), 128: Tile(32, 16, 8, 1), 256: Tile(32, 16, 8, 1)},
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
    return Tile(min(t.own, 64), t.walk, t.warps, 1 if lists or pad > 128 else t.stages) if full else t


def fitted(t: Tile, p: Softmax, own: int) -> Tile:
    """The tile of programs that own rows (0) or keys (1), cut to what the blocks of the lists allow."""
    if isinstance(p.where, Ranges):
        return t
    tokens, steps = (divisor(p.where.block[x], 1024) for x in (own, 1 - own))
    t = t if t.own <= tokens else smaller(t, tokens, padded(p.q.shape[3]))
    return Tile(t.own, min(t.walk, steps), t.warps, t.stages)


def smaller(t: Tile, tokens: int, pad: int) -> Tile:
    """For blocks of fewer tokens than the tile has."""
    return next(x for x in pieces(t, pad) if x.own <= max(tokens, 16))


def pieces(t: Tile, pad: int) -> tuple[Tile, ...]:
    """The tiles that lists of small blocks take instead of t: 64 tokens of their own (32 of many numbers) or 16."""
    sizes = ((64 if pad <= 128 else 32, t.stages), (16, 1))
    walk = min(t.walk, 32)
    return tuple(Tile(own, walk, walk // 4, stages) for own, stages in sizes if own < t.own)
