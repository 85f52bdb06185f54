"""Learned feature maps: what turns q and k into the features of linear attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FLOOR = 1e-12  # keeps every feature positive, so that a sum of them is never zero


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
        """(B, Hk, G, Q, D) → (B, Hk, G, Q, 2D), at least fp32."""
        return self._features(q, self.query.unflatten(0, q.shape[1:3]))

    def keys(self, k: Tensor) -> Tensor:
        """(B, Hk, Q, D) → (B, Hk, Q, 2D), at least fp32."""
        return self._features(k, self.key)

    @staticmethod
    def _features(x: Tensor, weight: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        y = x.to(wide) @ weight.to(wide)
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1).clamp_min(FLOOR)
