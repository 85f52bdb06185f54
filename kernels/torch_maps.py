"""Feature maps in torch: what turns q and k into the non-negative features of linear attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FLOOR = 1e-12  # keeps a Hedgehog feature positive, so that a sum of them is never zero


def feature_map(x: Tensor, kind: str, weights: tuple[Tensor, ...]) -> Tensor:
    """x (B, H, S, D) → φ(x) (B, H, S, F) in the dtype of x, computed in at least fp32.

    hedgehog: [softmax(x W), softmax(−x W)], weights (W (H, D, D),), F = 2D (Zhang et al., 2024).
    elu1: elu(x) + 1 (Katharopoulos et al., 2020). relu. softmax: over D (Shen et al., 2021).
    poly: [ψ₁, ψ₂², …] of two-layer maps ψ_p = softplus(gelu(x W1_p + b1_p) W2_p + b2_p), weights (W1 (P, H, D, M),
    b1 (P, H, M), W2 (P, H, M, N), b2 (P, H, N)), F = P·N (after Attention Surgery, 2025; softplus keeps it positive).
    """
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = [w.to(y.dtype) for w in weights]
    if kind == "hedgehog":
        y = y @ wide[0]
        y = torch.cat([y.softmax(-1), (-y).softmax(-1)], -1).clamp_min(FLOOR)
    elif kind == "elu1":
        y = F.elu(y) + 1
    elif kind == "relu":
        y = F.relu(y)
    elif kind == "softmax":
        y = y.softmax(-1)
    elif kind == "poly":
        y = torch.cat([_poly(y, [w[n] for w in wide]) ** (n + 1) for n in range(wide[0].shape[0])], -1)
    else:
        raise ValueError(f"kind is {kind!r}: no such feature map; known are hedgehog, elu1, relu, softmax, poly")
    return y.to(x.dtype)


def _poly(x: Tensor, weights: list[Tensor]) -> Tensor:
    w1, b1, w2, b2 = weights
    return F.softplus(F.gelu(x @ w1 + b1[:, None]) @ w2 + b2[:, None])
