"""Checks that a weights file is whole, from its header alone: the loaders' own errors do not say so.

And that an exported checkpoint is what was exported, from its SHA256SUMS.

GGUF layout: github.com/ggml-org/ggml/blob/master/docs/gguf.md. safetensors layout: 8 bytes with the length of a JSON
header, the header with each tensor's place, then the data.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path

from .errors import AssetMissing, PreflightError
from .files import sha256_file

AGAIN = "fetch it again"
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # GGUF value type: bytes
STRING, ARRAY, UINT32 = 8, 9, 4
LFS_POINTER = b"version https://git-lfs"
SUMS, CARD = "SHA256SUMS", "README.md"  # of an exported checkpoint; people rewrite its card


def check_sums(folder: Path) -> bool:
    """Refuse an exported checkpoint whose files are not those that SHA256SUMS lists; False if it has no such list.

    Raises:
        AssetMissing: with the first file that has changed, is gone, or should be listed and is not.
    """
    if not (folder / SUMS).is_file():
        return False
    listed = read_sums(folder)
    for path in sorted(folder.iterdir()):  # a list that was cut short would vouch for weights that it does not name
        if (path.suffix == ".safetensors" or path.name == "config.json") and path.name not in listed:
            raise AssetMissing(f"{folder / SUMS} does not list {path.name}: export or fetch the checkpoint again")
    for name, digest in listed.items():
        if name == CARD:
            continue
        if not (folder / name).is_file():
            raise AssetMissing(f"{folder} lacks {name}, which its {SUMS} lists: export or fetch it again")
        if sha256_file(folder / name) != digest:
            raise AssetMissing(f"{folder / name} has changed since it was exported ({SUMS}): export or fetch it again")
    return True


def read_sums(folder: Path) -> dict[str, str]:
    """File → SHA-256, as SHA256SUMS of an exported checkpoint lists them.

    Raises:
        AssetMissing: it is damaged.
    """
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        lines = [""]
    found = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if not found or "" in found:
        raise AssetMissing(f"{folder / SUMS} is damaged: export or fetch the checkpoint again")
    return found


def check_weights(path: Path) -> None:
    """Refuse a weights file that is truncated or is no weights file.

    Raises:
        AssetMissing: with the file, what is wrong with it and what to do.
        PreflightError: a GGUF cannot be checked without the package gguf.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        start = file.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            raise AssetMissing(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` there")
        if size < 24:
            raise AssetMissing(f"{path} is truncated: it has only {size} bytes; {AGAIN}")
        file.seek(0)
        if path.suffix == ".safetensors":
            _check_safetensors(path, size, file.read(8))
        elif path.suffix == ".gguf":
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                _check_gguf(path, data)


def _check_safetensors(path: Path, size: int, prefix: bytes) -> None:
    (length,) = struct.unpack("<Q", prefix)
    if length > size - 8:
        raise AssetMissing(f"{path} is truncated or no safetensors file: {size} bytes, header of {length}; {AGAIN}")
    with path.open("rb") as file:
        file.seek(8)
        raw = file.read(length)
    try:
        header = json.loads(raw)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        needed = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise AssetMissing(f"{path} is corrupt: its safetensors header is not readable; {AGAIN}") from error
    if needed != size:
        state = "truncated" if needed > size else "corrupt"
        raise AssetMissing(f"{path} is {state}: it has {size} bytes, its tensors need {needed}; {AGAIN}")


class _Ended(Exception):
    """The file ended inside its own description."""


class _Cursor:
    """A position in a GGUF file that never runs over its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> int:
        """The offset of the next `size` bytes, which are passed over."""
        if size > len(self.data) - self.at:
            raise _Ended
        self.at += size
        return self.at - size

    def uint32(self) -> int:
        return int(struct.unpack_from("<I", self.data, self.take(4))[0])

    def uint64(self) -> int:
        return int(struct.unpack_from("<Q", self.data, self.take(8))[0])

    def string(self) -> bytes:
        size = self.uint64()
        start = self.take(size)
        return self.data[start : start + size]

    def skip(self, kind: int, depth: int = 0) -> None:
        if kind in SCALARS:
            self.take(SCALARS[kind])
        elif kind == STRING:
            self.take(self.uint64())
        elif kind == ARRAY and depth < 4:
            inner, count = self.uint32(), self.uint64()
            if inner in SCALARS:
                self.take(SCALARS[inner] * count)
            else:
                for _ in range(count):
                    self.skip(inner, depth + 1)
        else:
            raise ValueError(f"value of the unknown kind {kind}")


def _check_gguf(path: Path, data: mmap.mmap) -> None:
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError as error:
        raise PreflightError(f"{path} needs the package gguf: pip install gguf") from error
    if data[:4] != b"GGUF":
        raise AssetMissing(f"{path} is not a GGUF file: it begins with {data[:4]!r} instead of b'GGUF'")
    version = struct.unpack_from("<I", data, 4)[0]
    if version not in (2, 3):
        raise AssetMissing(f"{path} has GGUF version {version}; 2 and 3, little-endian, can be read")
    try:
        needed = _gguf_size(_Cursor(data), {int(kind): size for kind, size in GGML_QUANT_SIZES.items()})
    except _Ended as error:
        raise AssetMissing(
            f"{path} is truncated: its {len(data)} bytes end inside the description of the model; {AGAIN}"
        ) from error
    except ValueError as error:
        raise AssetMissing(f"{path} is corrupt: {error}; {AGAIN}") from error
    if needed > len(data):
        raise AssetMissing(f"{path} is truncated: it has {len(data)} bytes, its tensors need {needed}; {AGAIN}")


def _gguf_size(cursor: _Cursor, block_sizes: Mapping[int, tuple[int, int]]) -> int:
    """How many bytes the file must have, from its description."""
    cursor.take(8)
    tensors, values, alignment = cursor.uint64(), cursor.uint64(), 32
    for _ in range(values):
        key, kind = cursor.string(), cursor.uint32()
        if key == b"general.alignment" and kind == UINT32:
            alignment = cursor.uint32()
        else:
            cursor.skip(kind)
    if not alignment:
        raise ValueError("its alignment is 0")
    end = 0
    for _ in range(tensors):
        cursor.string()
        dimensions = cursor.uint32()
        if dimensions > 8:
            raise ValueError(f"a tensor of {dimensions} dimensions")
        shape = [cursor.uint64() for _ in range(dimensions)]
        kind, offset = cursor.uint32(), cursor.uint64()
        if kind not in block_sizes:
            raise ValueError(f"a tensor of the unknown type {kind}")
        block, size = block_sizes[kind]
        end = max(end, offset + math.prod(shape) // block * size)
    return (cursor.at + alignment - 1) // alignment * alignment + end
