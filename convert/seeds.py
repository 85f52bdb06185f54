"""Random streams that are named after what they are for, so that none depends on another."""

from __future__ import annotations

import hashlib

import torch


def rng(*parts: object) -> torch.Generator:
    """A generator whose seed is a hash of what it is for, so that streams never depend on each other."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
