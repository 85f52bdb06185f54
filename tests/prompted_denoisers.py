"""Tiny random denoisers of every class whose conversion is claimed, with the prompts and latents they take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TEXT = 5  # tokens of a prompt


def _rows(*names: str, width: int = 16, pooled: int = 12) -> dict[str, Tensor]:
    """Two prompts; the mask hides the end of the second."""
    torch.manual_seed(1)
    known = {
        "encoder_hidden_states": torch.randn(2, TEXT, width),
        "pooled_projections": torch.randn(2, pooled),
        "encoder_attention_mask": torch.tensor([[1] * TEXT, [1] * (TEXT - 2) + [0] * 2]),
    }
    return {name: known[name] for name in names}


PROMPT, POOLED, MASK = "encoder_hidden_states", "pooled_projections", "encoder_attention_mask"
HEADS = {"num_attention_heads": 2, "num_layers": 1}
UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
}
PIXART = {
    **HEADS,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "cross_attention_dim": 16,
    "caption_channels": 16,
}
COG = {
    **HEADS,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 16,
    "sample_width": 8,
    "sample_height": 6,
    "sample_frames": 9,
    "max_text_seq_length": TEXT,
}
# name → class, its settings, its prompts, the size of its latents
DENOISERS: dict[str, tuple[str, dict[str, Any], dict[str, Tensor], tuple[int, ...]]] = {
    "flux": (
        "FluxTransformer2DModel",
        {
            **HEADS,
            "in_channels": 16,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 12,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 6, 6),
        },
        _rows(PROMPT, POOLED),
        (8, 12),
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            **HEADS,
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "attention_head_dim": 8,
            "joint_attention_dim": 16,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 12,
            "pos_embed_max_size": 16,
        },
        _rows(PROMPT, POOLED),
        (8, 12),
    ),
    "pixart": ("PixArtTransformer2DModel", {**PIXART, "sample_size": 8}, _rows(PROMPT, MASK), (8, 8)),
    "pixart-1024": (
        "PixArtTransformer2DModel",
        {**PIXART, "num_attention_heads": 3, "cross_attention_dim": 24, "sample_size": 128},
        _rows(PROMPT, MASK),
        (8, 12),
    ),
    "unet": ("UNet2DConditionModel", UNET, _rows(PROMPT), (8, 12)),
    "unet-xl": (
        "UNet2DConditionModel",
        {
            **UNET,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 12 + 6 * 8,
        },
        _rows(PROMPT, POOLED),
        (8, 12),
    ),
    "wan": (
        "WanTransformer3DModel",
        {
            **HEADS,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 16,
            "ffn_dim": 32,
        },
        _rows(PROMPT),
        (3, 8, 12),
    ),
    "hunyuan-video": (
        "HunyuanVideoTransformer3DModel",
        {
            **HEADS,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 16,
            "pooled_projection_dim": 12,
            "rope_axes_dim": (4, 6, 6),
        },
        _rows(PROMPT, POOLED, MASK),
        (3, 8, 12),
    ),
    "cogvideox": ("CogVideoXTransformer3DModel", COG, _rows(PROMPT), (3, 6, 8)),
    "cogvideox-5b": (
        "CogVideoXTransformer3DModel",
        {**COG, "use_rotary_positional_embeddings": True},
        _rows(PROMPT),
        (3, 8, 6),
    ),
    "cogvideox-1.5": (
        "CogVideoXTransformer3DModel",
        {**COG, "use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False},
        _rows(PROMPT),
        (4, 4, 6),
    ),
    "mochi": (
        "MochiTransformer3DModel",
        {
            **HEADS,
            "attention_head_dim": 8,
            "in_channels": 4,
            "pooled_projection_dim": 16,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "max_sequence_length": TEXT,
        },
        _rows(PROMPT, MASK),
        (3, 8, 12),
    ),
}


def tiny(name: str, seed: int = 0, **changes: Any) -> Any:
    """A random denoiser. Weights of zero, as of gates and last layers before training, become random too."""
    import diffusers

    cls, settings, _, _ = DENOISERS[name]
    torch.manual_seed(seed)
    model = getattr(diffusers, cls)(**{**settings, **changes}).float().eval()
    for p in model.parameters():
        if not p.any():
            p.data.normal_(std=0.1)
    return model
