"""Tiny random denoisers of every class that is claimed."""

import diffusers
import pytest
import torch

from attnconvert.convert.hosts.sites import Unsupported

GRIDS = {2: ((6, 4), (8, 10)), 3: ((3, 4, 6), (2, 6, 4))}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
UNET = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
}
TINY = {
    "FluxTransformer2DModel": {
        **HEADS,
        "in_channels": 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 20,
        "axes_dims_rope": (4, 6, 6),
    },
    "Flux2Transformer2DModel": {
        **HEADS,
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 2,
        "joint_attention_dim": 24,
        "timestep_guidance_channels": 32,
        "axes_dims_rope": (4, 4, 4, 4),
    },
    "QwenImageTransformer2DModel": {
        **HEADS,
        "in_channels": 4,
        "out_channels": 4,
        "patch_size": 1,
        "num_layers": 2,
        "joint_attention_dim": 24,
        "axes_dims_rope": (4, 6, 6),
    },
    "SD3Transformer2DModel": {
        **HEADS,
        "sample_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "joint_attention_dim": 24,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 20,
        "pos_embed_max_size": 24,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    },
    "PixArtTransformer2DModel": {
        **HEADS,
        "in_channels": 4,
        "num_layers": 2,
        "norm_num_groups": 8,
        "cross_attention_dim": 32,
        "sample_size": 16,
        "caption_channels": 24,
    },
    "UNet2DConditionModel": {
        **UNET,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
    "WanTransformer3DModel": {
        **HEADS,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 24,
        "freq_dim": 32,
        "ffn_dim": 48,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    },
    "HunyuanVideoTransformer3DModel": {
        **HEADS,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "text_embed_dim": 24,
        "pooled_projection_dim": 20,
        "rope_axes_dim": (4, 6, 6),
    },
    "CogVideoXTransformer3DModel": {
        **HEADS,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 16,
        "text_embed_dim": 24,
        "num_layers": 2,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 9,
        "max_text_seq_length": 11,
        "use_rotary_positional_embeddings": True,
    },
    "MochiTransformer3DModel": {
        **HEADS,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "pooled_projection_dim": 32,
        "text_embed_dim": 24,
        "time_embed_dim": 16,
    },
    "LTXVideoTransformer3DModel": {
        **HEADS,
        "in_channels": 4,
        "out_channels": 4,
        "cross_attention_dim": 32,
        "num_layers": 2,
        "caption_channels": 24,
    },
}


def tiny(name, seed=0, **changes):
    """A random model of the class; weights are made larger so that attention is far from uniform."""
    torch.manual_seed(seed)
    model = getattr(diffusers, name)(**{**TINY[name], **changes}).eval()
    for name, p in model.named_parameters():
        if p.ndim > 1:
            p.data.mul_(2.0)
        if "proj_out" in name:  # some start as zeros
            p.data.normal_(0, 0.1)
    return model


def everything(sites, spec):
    return {site: [spec] * site.kv_heads for site in sites}


@torch.no_grad()
def run(model, inputs):
    return model(**inputs)[0]


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def message(model, inputs):
    """How the model refuses to run."""
    with pytest.raises(Unsupported) as caught:
        run(model, inputs)
    return str(caught.value)
