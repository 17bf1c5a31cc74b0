"""Tiny seeded base models and their tokenizer, built in code and saved as a user's folder would be."""

from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
VOCABULARY = 3 + 256
CONTEXT = 128
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and ChatML's special tokens; nothing is ever unknown."""
    vocabulary = {token: i for i, token in enumerate([PAD, START, END])}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
    )


def make_llama(
    *, tied: bool = False, dtype: torch.dtype = torch.float32, width: int = 32, key_value_heads: int = 2
) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width + width // 2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.1,
    )
    return _seeded(LlamaForCausalLM, config).to(dtype)


def make_gpt2(*, tied: bool = True, dtype: torch.dtype = torch.float32, width: int = 32) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=width,
        n_layer=2,
        n_head=4,
        n_positions=CONTEXT,
        tie_word_embeddings=tied,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.1,
    )
    return _seeded(GPT2LMHeadModel, config).to(dtype)


def _seeded(kind: type[PreTrainedModel], config: object) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config).eval()


MODELS = {
    "llama": lambda: make_llama(),
    "llama-tied": lambda: make_llama(tied=True),
    "llama-bf16": lambda: make_llama(dtype=torch.bfloat16),
    "gpt2": lambda: make_gpt2(),
    "gpt2-bf16": lambda: make_gpt2(dtype=torch.bfloat16),
    "tiny": lambda: make_llama(key_value_heads=4),
    "wide-llama": lambda: make_llama(width=128),
    "wide-llama-bf16": lambda: make_llama(width=128, dtype=torch.bfloat16),
    "wide-gpt2": lambda: make_gpt2(width=64),
}
"""Every layer of `tiny` can hold rank 32. The wide ones have layers as wide as a block of NF4,
or twice and three times that."""


def save_base(folder: Path, model: PreTrainedModel) -> Path:
    """Writes a base model as users have it: config, safetensors, tokenizer with its template."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


class BaseFolders(dict[str, Path]):
    """A folder for each name in MODELS, written when it is first asked for; tests only read them.

    Processes with the same root share its folders: the first to ask writes, under a lock.
    """

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root = root

    def __missing__(self, name: str) -> Path:
        self[name] = save_once(self._root / name, MODELS[name])
        return self[name]


def save_once(folder: Path, make: Callable[[], PreTrainedModel]) -> Path:
    """Saves the base model unless another process has; returns its folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.exists():
            save_base(folder.with_name(f".{folder.name}.part"), make()).rename(folder)
    return folder
