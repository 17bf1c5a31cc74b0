"""A tiny configuration of every causal family that transformers maps.

Sizes are known by the names of their fields, in configs and in the configs inside them; what does not follow
from names is said in OVERRIDES.
"""

import dataclasses
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

KINDS = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""`model_type` of every causal family."""
VOCABULARY, CONTEXT = 272, 128
"""The tokenizer has 259 tokens; those of other modalities follow."""
WIDTH, INNER, HEADS, GROUPS, HEAD, LAYERS, EXPERTS, STD = 32, 48, 4, 2, 16, 2, 4, 0.1

SIZES: dict[str, Any] = {
    # every family
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": HEAD,
    "max_position_embeddings": CONTEXT,
    "original_max_position_embeddings": CONTEXT,
    "is_decoder": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": STD,
    "init_std": STD,
    "use_cache": False,
    # windows, shorter than the examples
    "sliding_window": 16,
    "sliding_window_size": 16,
    "attention_chunk_size": 16,
    "attention_window_size": 16,
    # encoders and decoders
    "d_model": WIDTH,
    "ffn_dim": INNER,
    "encoder_layers": 1,
    "decoder_layers": LAYERS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "embedding_size": WIDTH,
    # experts
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_experts_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": CONTEXT,  # of fewer, many score exactly 0, and which are taken depends on the row's length
    # states
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_dt_rank": 4,
    "time_step_rank": 4,
    "chunk_size": 8,
    "mamba_chunk_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    # images
    "image_size": 28,
    "patch_size": 14,
    "num_channels": 3,
    # hidden copies of other sizes
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "query_pre_attn_scalar": HEAD,
    "max_window_layers": 1,
}
"""Values by the names of fields, canonical ones or a family's own."""


def tiny_config(kind: str) -> PreTrainedConfig:
    """The tiny configuration of a family, without dropout and noise."""
    return _tiny(CONFIG_MAPPING[kind], OVERRIDES.get(kind, {}))


def _tiny(config: type[PreTrainedConfig], own: dict[str, Any]) -> PreTrainedConfig:
    canonical = {name: common for common, name in config.attribute_map.items()}
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        name = field.name
        common = canonical.get(name, name)
        if name in SIZES or common in SIZES:
            values[name] = SIZES.get(name, SIZES.get(common))
        elif isinstance(field.default, int | float) and any(word in name for word in ("drop", "jitter")):
            values[name] = type(field.default)(0)
    if "qk_rope_head_dim" in values:  # latent attention has a key for each query
        values["num_key_value_heads"] = HEADS
        if "head_dim" in values:
            values["head_dim"] = values["qk_rope_head_dim"]  # their rotary embedding's width
    for name, inner in config.sub_configs.items():
        kind = type(getattr(config(), name)) if inner is AutoConfig else inner
        if issubclass(kind, PreTrainedConfig):
            values[name] = _tiny(kind, own.get(name, {})).to_dict()
    return config(**values | {name: value for name, value in own.items() if name not in config.sub_configs})


BOTH_LAYERS = {"layer_types": ["linear_attention", "full_attention"]}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blt": {
        "encoder_hash_byte_group_vocab": 50,
        "encoder_config": {"hidden_size_global": WIDTH},
        "decoder_config": {"hidden_size_global": WIDTH},
    },
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
        "layer_types": ["full_attention"] * 2,
    },
    "codegen": {"n_ctx": CONTEXT, "rotary_dim": 4},
    "cpmant": {"dim_head": 8, "dim_ff": INNER, "prompt_length": 4},
    "ctrl": {"dff": INNER},
    "dbrx": {
        "attn_config": {"kv_n_heads": GROUPS, "clip_qkv": 0.5, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": WIDTH, "ffn_hidden_size": INNER, "moe_num_experts": EXPERTS},
    },
    "deepseek_v4": {"o_groups": 2, "o_lora_rank": 8},
    "dots3_note": {
        "vision_config": {
            "mlp_layer_types": ["dense"] * LAYERS,
            "adapter_in_dim": WIDTH,
            "adapter_out_dim": WIDTH,
        },
        "audio_config": {"adapter_input_size": WIDTH, "adapter_out_dim": WIDTH, "downsample_hidden_size": 8},
    },
    "doge": {"keep_window_size": CONTEXT},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "gemma3n_text": {"num_kv_shared_layers": 0, "laurel_rank": 4},
    "gpt_neo": {
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 16,
    },
    "gptj": {"rotary_dim": 4},
    "helium": {"head_dim": WIDTH // HEADS},
    "inkling2_text": {
        "unpadded_vocab_size": VOCABULARY,
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": GROUPS,
        "swa_head_dim": HEAD,
        "rel_extent": 16,
    },
    "inkling_text": {
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": GROUPS,
        "swa_head_dim": HEAD,
        "rel_extent": 16,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "jetmoe": {"kv_channels": 8},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": HEADS},
    "lfm2": {"block_multiple_of": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"intermediate_size_mlp": INNER, "no_rope_layer_interval": 2},
    "longcat_flash": {
        "num_layers": 1,
        "ffn_hidden_size": INNER,
        "moe_topk": 2,
        "zero_expert_num": 2,
        "expert_ffn_hidden_size": 24,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "minimax": {"block_size": 8},
    "minimax_m3_vl_text": {
        "dense_intermediate_size": INNER,
        "rotary_dim": 8,
        "index_block_size": 8,
        "index_topk_blocks": 2,
    },
    "mvp": {"prompt_length": 4, "prompt_mid_dim": 8},
    "nemotron_h": {
        "ssm_state_size": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 1,
        "moe_shared_expert_intermediate_size": 24,
    },
    "prophetnet": {
        "num_encoder_layers": 1,
        "num_decoder_layers": LAYERS,
        "num_encoder_attention_heads": HEADS,
        "num_decoder_attention_heads": HEADS,
    },
    "qwen3_5_moe_text": BOTH_LAYERS,
    "qwen3_5_text": BOTH_LAYERS,
    "qwen3_next": BOTH_LAYERS,
    "olmo_hybrid": BOTH_LAYERS,
    "qwen4_exp_text": {
        "hc_lowrank": 8,
        "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 4,
        "split_ngram_parts": 4,
    },
    "reformer": {
        "attention_head_size": 8,
        "feed_forward_size": INNER,
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh"],
        "num_buckets": 4,
        "num_hashes": 1,
    },
    "rembert": {"input_embedding_size": WIDTH, "output_embedding_size": WIDTH},
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": 8,
        "shape_embed_dim": 8,
        "shape_vocab_size": 8,
    },
    "rwkv": {"context_length": CONTEXT, "attention_hidden_size": WIDTH},
    "smollm3": {"no_rope_layer_interval": 2},
    "whisper": {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": CONTEXT},
    "xglm": {"num_layers": LAYERS, "attention_heads": HEADS},
    "xlm": {"causal": True},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "xlnet": {"d_inner": INNER, "attn_type": "uni"},
    "xlstm": {"num_heads": HEADS},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "n_mamba_heads": 8, "adapter_rank": 4},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 8},
}
"""By family: what its config needs beside SIZES, or another value."""
