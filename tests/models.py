"""Tiny random models of every architecture that is claimed, without a file for each."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from attnconvert.convert.text import Needles

BASE = {
    "vocab_size": 99,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 98,
}
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
DECODERS = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 12},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 24},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 12, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 12, "layer_types": LAYERS},
    "phi3": {"num_key_value_heads": 2, "sliding_window": 12},
    "gpt_neox": {},
    "olmo2": {"num_key_value_heads": 2},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256},
    "starcoder2": {"num_key_value_heads": 2},
    "smollm3": {"num_key_value_heads": 2},
    "granite": {"num_key_value_heads": 2},
    "mixtral": {"num_key_value_heads": 2, **EXPERTS},
    "qwen3_moe": {"num_key_value_heads": 2, "num_experts": 2, "moe_intermediate_size": 32, **EXPERTS},
    "falcon": {},
    "cohere2": {"num_key_value_heads": 2, "sliding_window": 12, "layer_types": LAYERS},
    "exaone4": {"num_key_value_heads": 2, "sliding_window": 12, "layer_types": LAYERS},
    "gpt_oss": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 12, **EXPERTS},
}  # fmt: skip
# Refused, each for its own reason
OTHERS = {
    "phimoe": {"num_key_value_heads": 2, "sliding_window": 12, "num_local_experts": 2, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_key_value_heads": 2,
        "sliding_window": 12,
        "use_sliding_window": True,
        "max_window_layers": 0,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
}


ENCODERS = ("bert", "roberta", "electra", "camembert", "xlm-roberta", "albert", "modernbert")  # ALBERT: 1 layer for all
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = {"image_size": 24, "patch_size": 4}
BOTH = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "decoder_start_token_id": 2,
}
# Beside texts alone: images, sound, and text from either
MANY = {
    "modernbert": {"local_attention": 12, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
    "vit": IMAGE,
    "clip": {
        "text_config": {**SMALL, "vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 98},
        "vision_config": {**SMALL, **IMAGE},
    },
    "bart": {**BOTH, "forced_eos_token_id": None},
    "whisper": {**BOTH, "num_mel_bins": 8, "max_source_positions": 40, "max_target_positions": 128},
    "t5": {"d_model": 64, "d_kv": 16, "num_layers": 2, "num_heads": 4, "d_ff": 96, "decoder_start_token_id": 0},
}


def tiny(name, seed=0, auto=AutoModelForCausalLM, **changes):
    """A random model of the architecture; weights are made larger so that attention is far from uniform."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **{**BASE, **{**DECODERS, **OTHERS, **MANY}.get(name, {}), **changes})
    model = auto.from_config(config).float().eval()
    for name, p in model.named_parameters():
        if p.ndim > 1:
            p.data.mul_(2.0)
        if "sinks" in name:
            p.data.normal_()
    return model


def needle_cases(cases=2, length=48, vocabulary=97):
    """Random tokens in which the three at position 10 come again at the end."""
    ids = torch.randint(2, vocabulary, (cases, length), generator=torch.Generator().manual_seed(0))
    found = torch.arange(10, 13).expand(cases, -1)
    answer = torch.arange(length - 3, length).expand(cases, -1)
    return Needles(ids.scatter(1, answer, ids.gather(1, found)), answer, found)
