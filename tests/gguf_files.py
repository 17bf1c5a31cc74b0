"""Tiny GGUF files, written with the package gguf from models of transformers, as converters write them."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFEndian, GGUFWriter, TokenType, get_tensor_name_map, quants
from gguf.constants import MODEL_ARCH
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from store.bases import SHIPPED_FOLDER

Type = GGMLQuantizationType
WIDTH, INNER, HEADS, KEY_VALUE_HEADS, LAYERS, VOCABULARY = 64, 96, 4, 2, 2, 4096
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "head_dim": WIDTH // HEADS,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """The shipped model's: byte-level BPE with merges, ChatML and a chat template."""
    return AutoTokenizer.from_pretrained(SHIPPED_FOLDER)


def make(architecture: str, *, tied: bool = False, **config: object) -> PreTrainedModel:
    """A seeded random model of the shape above."""
    kind, kind_config = {
        "llama": (LlamaForCausalLM, LlamaConfig),
        "qwen2": (Qwen2ForCausalLM, Qwen2Config),
        "qwen3": (Qwen3ForCausalLM, Qwen3Config),
    }[architecture]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = kind(kind_config(**(SHAPE | {"tie_word_embeddings": tied} | config))).eval()
        for name, parameter in model.named_parameters():
            if name.endswith((".bias", "norm.weight")):  # transformers begins with zeros and ones
                torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    return model


def write(
    path: Path,
    model: PreTrainedModel,
    kind: GGMLQuantizationType = Type.F32,
    *,
    pre: str = "gpt-2",
    change: Callable[[GGUFWriter], None] = lambda writer: None,
    tensors: Callable[[dict[str, np.ndarray]], None] = lambda tensors: None,
    architecture: str | None = None,
    endian: GGUFEndian = GGUFEndian.LITTLE,
) -> Path:
    """Writes the model; matrices as `kind`, vectors in F32.

    `change` adds metadata, and `tensors` changes the tensors, by their GGUF names.
    """
    name = architecture or model.config.model_type
    writer = GGUFWriter(path, name, endianess=endian)
    _metadata(writer, model)
    _tokenizer(writer, tokenizer(), pre)
    change(writer)
    values = gguf_tensors(model)
    tensors(values)
    for name, value in values.items():
        if value.ndim == 1 or kind == Type.F32:
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(writer: GGUFWriter, model: PreTrainedModel) -> None:
    config = model.config
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim or config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)


def _tokenizer(writer: GGUFWriter, source: PreTrainedTokenizerFast, pre: str) -> None:
    special = set(source.all_special_ids)
    tokens = source.convert_ids_to_tokens(range(VOCABULARY))
    kinds = [TokenType.CONTROL if i in special else TokenType.NORMAL for i in range(VOCABULARY)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in merges(source)])
    writer.add_eos_token_id(source.eos_token_id)
    writer.add_pad_token_id(source.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(source.chat_template)


def merges(source: PreTrainedTokenizerFast) -> list[tuple[str, str]]:
    import json

    return [tuple(pair) for pair in json.loads(source.backend_tokenizer.to_str())["model"]["merges"]]


def gguf_tensors(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """The model's tensors in fp32 under their GGUF names, Llama's query and key rows in GGUF's order."""
    kinds = {"llama": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2, "qwen3": MODEL_ARCH.QWEN3}
    names = get_tensor_name_map(kinds[model.config.model_type], model.config.num_hidden_layers)
    found = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        value = tensor.float().numpy()
        if model.config.model_type == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            value = value[rotary_rows(len(value))]
        found[names.get_name(name, try_suffixes=(".weight", ".bias"))] = value
    return found


def rotary_rows(rows: int, head: int = WIDTH // HEADS) -> np.ndarray:
    """For each row of a Llama's query or key matrix in a GGUF, its row in transformers' matrix.

    GGUF puts the two rows that are rotated together side by side, transformers half a head apart.
    """
    order = [
        h * head + half * head // 2 + i
        for h in range(rows // head)
        for i in range(head // 2)
        for half in (0, 1)
    ]
    return np.array(order)


def rounded(model: PreTrainedModel, kind: GGMLQuantizationType) -> Mapping[str, np.ndarray]:
    """transformers' names and the values that a file of this type holds, by gguf's own dequantisation."""
    expected = {}
    for name, tensor in model.state_dict().items():
        value = tensor.float().numpy()
        llama = model.config.model_type == "llama" and name.endswith(("q_proj.weight", "k_proj.weight"))
        if value.ndim > 1 and kind != Type.F32:
            order = rotary_rows(len(value)) if llama else np.arange(len(value))
            held = quants.dequantize(quants.quantize(value[order], kind), kind)
            value = np.empty_like(held)
            value[order] = held
        expected[name] = value
    return expected
