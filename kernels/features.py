"""Learned feature maps: what turns q and k into the features of linear attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import ops


class Hedgehog(nn.Module):
    """φ(x) = [softmax(x W), softmax(−x W)], one W per head: W_q per query head, W_k per KV head.

    Keys of a KV head have one map, so its query heads share one state. Weights start at the identity, scaled so that
    the product of two of them carries the 1/√D of attention.

    Source: Hedgehog (Zhang et al., 2024) and its use after RoPE in LoLCATs (Zhang et al., 2024).
    """

    def __init__(self, heads: int, kv_heads: int, dim: int) -> None:
        super().__init__()
        eye = torch.eye(dim) * dim**-0.25
        self.query = nn.Parameter(eye.repeat(heads, 1, 1))  # (H, D, D)
        self.key = nn.Parameter(eye.repeat(kv_heads, 1, 1))  # (Hk, D, D)

    def queries(self, q: Tensor) -> Tensor:
        """(B, H, Q, D) → (B, H, Q, 2D)"""
        return ops.feature_map(q, "hedgehog", (self.query,))

    def keys(self, k: Tensor) -> Tensor:
        """(B, Hk, Q, D) → (B, Hk, Q, 2D)"""
        return ops.feature_map(k, "hedgehog", (self.key,))
