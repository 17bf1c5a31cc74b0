"""What `bench.gpu.speed` trains: published models' shapes with random weights, made on the device, and rows
of random tokens."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedConfig, Qwen3Config

from olora_core.bases.loading import Base
from olora_core.data.examples import Examples
from olora_core.layers.adapter import Site

from .report import ROOT

TOKENIZER = ROOT / "examples" / "base"
HEAD_DIM = 128
SEED = 0


@dataclass(frozen=True)
class Shape:
    """A published model's dimensions."""

    name: str
    family: type[PreTrainedConfig]
    vocabulary: int
    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    context: int
    tied: bool
    published: float
    """Tokens per second of LoRA in bf16 on one H100, the best figure that was published."""
    source: str
    head_dim: int = HEAD_DIM

    @property
    def config(self) -> PreTrainedConfig:
        return self.family(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.context,
            tie_word_embeddings=self.tied,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
        )

    @property
    def tiny(self) -> "Shape":
        """The same family in the smallest size, for a smoke test."""
        small = {"vocabulary": 4096, "width": 64, "inner": 128, "layers": 2, "heads": 4, "kv_heads": 2}
        return replace(self, context=1024, head_dim=16, **small)


SUROGATE = "Surogate's published benchmarks"
NEMO = "NeMo AutoModel's performance summary, full rows of 4,096 tokens"
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("Qwen3-0.6B", Qwen3Config, 151_936, 1024, 3072, 28, 16, 8, 40_960, True, 53_900, SUROGATE),
        Shape("Qwen3-1.7B", Qwen3Config, 151_936, 2048, 6144, 28, 16, 8, 40_960, True, 33_000, SUROGATE),
        Shape("Qwen3-4B", Qwen3Config, 151_936, 2560, 9728, 36, 32, 8, 40_960, True, 17_000, SUROGATE),
        Shape("Llama-3-8B", LlamaConfig, 128_256, 4096, 14_336, 32, 32, 8, 8192, False, 12_473, NEMO),
    )
}


def random_base(shape: Shape, device: str) -> Base:
    """A base as `load_base` gives it, but for its weights: random in bf16, made on the device, in no file."""
    torch.manual_seed(SEED)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape.config, dtype=torch.bfloat16)
    model.requires_grad_(False).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(TOKENIZER))
    return Base(model, tokenizer, Path(), shape.name, model.dtype, model.device)


# --- rows ----------------------------------------------------------------------------------------------


def full_rows(shape: Shape, length: int, count: int) -> Examples:
    """`count` examples of the same length, as published figures have them: every token is trained, except
    the first of a row, which nothing predicts."""
    return _examples(shape, np.full(count, length), trained_share=1.0)


def mixed_rows(shape: Shape, longest: int, count: int) -> Examples:
    """`count` examples as chats are: lengths log-uniform from a 64th of the longest, the second half of each
    trained."""
    random = np.random.default_rng(SEED)
    lengths = np.exp(random.uniform(np.log(longest / 64), np.log(longest), count)).astype(np.int64)
    return _examples(shape, np.maximum(2, lengths), trained_share=0.5)


def _examples(shape: Shape, lengths: np.ndarray, trained_share: float) -> Examples:
    random = np.random.default_rng(SEED + 1)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = random.integers(0, shape.vocabulary, offsets[-1], dtype=np.uint32)
    position = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    first_trained = np.maximum(1, lengths - np.round(trained_share * lengths)).astype(np.int64)
    trained = position >= np.repeat(first_trained, lengths)
    return Examples(tokens, trained, offsets, np.arange(len(lengths), dtype=np.int64))


# --- arithmetic ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Floating-point operations of one training pass.

    `4 N_blocks tokens + 4 N_head trained + 6 P tokens + 6 layers heads d Σ L²`, where

    - N are the numbers in frozen linear layers: 2 N a token forward, 2 N for the input's gradient; weights
      get none. The head works on trained tokens alone. The embedding is a look-up and not counted.
    - P are the adapters' trainable parameters, which have a weight gradient as well.
    - a causal segment of L tokens takes 2 products of 2 L² d / 2 per head and layer forward, twice that
      backward. What attention kernels compute anew in the backward is not counted.
    """

    blocks: int
    head: int
    adapters: int
    attention: int
    """`6 layers heads d`."""

    def operations(self, tokens: float, trained: float, squares: float) -> float:
        """FLOP for these tokens and trained tokens; `squares` sums the squared lengths of the segments."""
        linear = 4 * self.blocks * tokens + 4 * self.head * trained + 6 * self.adapters * tokens
        return linear + self.attention * squares


def work_of(shape: Shape, sites: list[Site], adapters: int) -> Work:
    """`adapters` counts the parameters of the adapters of all linear layers."""
    blocks = sum(site.in_features * site.out_features for site in sites)
    attention = 6 * shape.layers * shape.heads * shape.head_dim
    return Work(blocks, shape.vocabulary * shape.width, adapters, attention)
