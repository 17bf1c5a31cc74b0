"""The benchmarks' models and data: random Llamas of several shapes, a real one, and two data sets.

    python -m bench.materials FOLDER --model 100m --data mixed

"docstrings" is the shipped data set. "mixed" is made from its text: conversations of 32 to 512 tokens (or
the model's context), drawn log-uniformly, about half of each being the answer. Everything is seeded.
"""

import argparse
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "examples" / "base"
DOCSTRINGS = ROOT / "examples" / "docstrings"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SHORTEST, LONGEST = 32, 512
HELD_OUT = 64


@dataclass(frozen=True)
class Shape:
    """A Llama with the shipped tokenizer, which uses only the first 4,096 rows of a larger vocabulary."""

    vocabulary: int
    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    context: int
    tied: bool = False


SHAPES = {
    "tiny": Shape(4096, 32, 64, 2, 4, 4, 1024),
    "100m": Shape(32_000, 768, 2048, 8, 12, 12, 1024),  # 105.8 M parameters, 49.2 of them embedding and head
    "0.5b": Shape(151_936, 896, 4864, 24, 14, 2, 4096, tied=True),  # Qwen2.5-0.5B's
    "8b": Shape(128_256, 4096, 14_336, 32, 32, 8, 8192),  # Llama-3-8B's
}
MODELS = ("shipped", "smollm2", *SHAPES)
DATA = ("docstrings", "mixed")


def make(folder: Path, *, model: str, data: str, rows: int, device: str = "cpu") -> None:
    """Writes `base/`, `train.jsonl` with `rows` examples and `valid.jsonl` with HELD_OUT."""
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / "base"
    if not base.exists():
        make_base(base, model, device)
    if data == "docstrings":
        write_lines(folder / "train.jsonl", lines_of("train", rows))
        write_lines(folder / "valid.jsonl", lines_of("valid", HELD_OUT))
        return
    tokenizer = AutoTokenizer.from_pretrained(base)
    longest = min(LONGEST, json.loads((base / "config.json").read_text())["max_position_embeddings"])
    for name, count, seed in (("train", rows, 0), ("valid", HELD_OUT, 1)):
        write_lines(folder / f"{name}.jsonl", conversations(tokenizer, name, count, longest, seed))


def make_base(folder: Path, model: str, device: str = "cpu") -> None:
    """The shipped base, SmolLM2 as it is installed, or a random Llama in bf16 with the shipped tokenizer."""
    if model == "shipped":
        shutil.copytree(SHIPPED, folder)
        return
    if model == "smollm2":
        from examples import smollm2
        from store.settings import get_settings

        folder.symlink_to(smollm2.folder(get_settings()))
        return
    shape = SHAPES[model]
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(device):
        LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(SHIPPED / name, folder)


def lines_of(name: str, rows: int) -> Iterator[str]:
    """Lines of a shipped file, repeated from its beginning as needed."""
    return islice(cycle((DOCSTRINGS / f"{name}.jsonl").read_text().splitlines()), rows)


def conversations(
    tokenizer: PreTrainedTokenizerBase, name: str, rows: int, longest: int, seed: int
) -> Iterator[str]:
    """JSON lines with questions and answers cut from the shipped file's text."""
    text = "\n".join(m["content"] for line in lines_of(name, 1500) for m in json.loads(line)["messages"])
    stream = cycle(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    empty = [{"role": role, "content": ""} for role in ("user", "assistant")]
    around = len(tokenizer.apply_chat_template(empty)["input_ids"])
    random = np.random.default_rng(seed)
    # Cut text may be tokenised to one or two tokens more.
    for length in np.exp(random.uniform(math.log(SHORTEST), math.log(longest - 4), rows)):
        answer = max(1, round(length / 2) - around // 2)
        question = max(1, round(length) - around - answer)
        parts = [tokenizer.decode(list(islice(stream, count))) for count in (question, answer)]
        roles = zip(("user", "assistant"), parts, strict=True)
        yield json.dumps({"messages": [{"role": role, "content": part or "-"} for role, part in roles]})


def write_lines(path: Path, lines: Iterator[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=MODELS, default="100m")
    parser.add_argument("--data", choices=DATA, default="mixed")
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args(arguments)
    make(asked.folder, model=asked.model, data=asked.data, rows=asked.rows, device=asked.device)


if __name__ == "__main__":
    main()
