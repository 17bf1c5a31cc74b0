"""Tiny seeded base models and their tokenizer, built in code and saved as a user's folder would be."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from olora_core.bases.loading import Base, load_base

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


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Matrices this small only lose by threads, and a fixed count keeps results bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    *, tied: bool = False, dtype: torch.dtype = torch.float32, width: int = 32
) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width + width // 2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
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
    "wide-llama": lambda: make_llama(width=128),
    "wide-llama-bf16": lambda: make_llama(width=128, dtype=torch.bfloat16),
    "wide-gpt2": lambda: make_gpt2(width=64),
}
"""The wide ones have layers as wide as a block of NF4, or twice and three times that."""


def save_base(folder: Path, model: PreTrainedModel) -> Path:
    """Writes a base model as users have it: config, safetensors, tokenizer with its template."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each name in MODELS; tests only read them."""
    root = tmp_path_factory.mktemp("bases")
    return {name: save_base(root / name, make()) for name, make in MODELS.items()}


@pytest.fixture
def llama(base_folders: dict[str, Path]) -> Base:
    """An untied Llama in fp32, freshly loaded."""
    return load_base(base_folders["llama"], name="tiny-llama")


@pytest.fixture
def tied_llama(base_folders: dict[str, Path]) -> Base:
    return load_base(base_folders["llama-tied"], name="tiny-llama-tied")


@pytest.fixture
def bf16_llama(base_folders: dict[str, Path]) -> Base:
    return load_base(base_folders["llama-bf16"], name="tiny-llama-bf16")


@pytest.fixture
def gpt2(base_folders: dict[str, Path]) -> Base:
    """GPT-2: its linear layers are Conv1D, its lm_head is tied."""
    return load_base(base_folders["gpt2"], name="tiny-gpt2")


@pytest.fixture(scope="session")
def token_rows() -> torch.Tensor:
    """(3, 16) random token ids."""
    return torch.randint(3, VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(1))
