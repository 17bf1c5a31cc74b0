"""A base model small enough to train in seconds, as an operator's folder has it; made without torch."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")
CONTEXT = 128
TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def make_base(folder: Path, *, width: int = 32, layers: int = 2) -> None:
    """A random Llama with a token for each byte and ChatML's template."""
    folder.mkdir(parents=True)
    tokenizer = _tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    vocabulary = tokenizer.get_vocab_size()
    save_file(_weights(vocabulary, width, layers), folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": SPECIAL[0],
            "eos_token": SPECIAL[2],
            "chat_template": TEMPLATE,
            "model_max_length": CONTEXT,
        },
    )
    _write_json(
        folder / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "float32",
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": CONTEXT,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": 2,
        },
    )


def _tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*SPECIAL, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def _weights(vocabulary: int, width: int, layers: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (0.1 * random.standard_normal((rows, columns))).astype(np.float32)

    weights = {
        "model.embed_tokens.weight": matrix(vocabulary, width),
        "lm_head.weight": matrix(vocabulary, width),
        "model.norm.weight": np.ones(width, np.float32),
    }
    for layer in range(layers):
        block = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weights[f"{block}.self_attn.{name}.weight"] = matrix(width, width)
        for name in ("gate_proj", "up_proj"):
            weights[f"{block}.mlp.{name}.weight"] = matrix(2 * width, width)
        weights[f"{block}.mlp.down_proj.weight"] = matrix(width, 2 * width)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{block}.{name}.weight"] = np.ones(width, np.float32)
    return weights


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def chat_rows(rows: int, first: int = 0) -> bytes:
    """A chat file whose answers can be learned: the number after the one asked about."""
    return b"".join(
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"What follows {n}?"},
                    {"role": "assistant", "content": f"{n + 1} follows {n}."},
                ]
            }
        ).encode()
        + b"\n"
        for n in range(first, first + rows)
    )
