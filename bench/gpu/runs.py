"""Small models, rows and specs of the sections that train whole runs, and how their parts are run."""

import json
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from bench.materials import SHIPPED, TOKENIZER_FILES, lines_of, write_lines
from olora_core.bases.loading import Base
from olora_core.specs import TrainSpec, read_spec

from .report import Report

SHORT_LINE = 360
"""Characters of a line of the shipped data that is short enough for every model here."""
RANK, SEED = 8, 11
OPTIONS: dict[str, dict[str, Any]] = {
    "melora": {"mini_loras": 2},
    "mora": {"alpha": 1},
    "prilora": {"prune_every": 2},
    "sora": {"threshold": 1e-3},
    "xgblora": {"layers_per_round": 99, "steps_per_round": 2},
}
"""What a method needs beside its rank where runs are this short."""
RATE, RATES = 5e-3, {"adalora": 0.1, "sora": 0.02}
Parts = Iterator[tuple[Any, ...]]
"""Of a section: the name of a part, the function that does it, and what that takes after report and name."""


def make_base(folder: Path, family: str, dtype: torch.dtype, device: str, **sizes: int) -> Path:
    """Writes a random Llama or GPT-2 without dropout and with the shipped tokenizer, as users have a base."""
    width, layers, heads = sizes["width"], sizes["layers"], sizes.get("heads", 4)
    context = sizes.get("context", 256)
    common = {"vocab_size": sizes.get("vocabulary", 4096), "initializer_range": width**-0.5}
    common |= {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    if family == "gpt2":
        none = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
        config = GPT2Config(n_embd=width, n_layer=layers, n_head=heads, n_positions=context, **none, **common)
    else:
        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=11 * width // 4,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            max_position_embeddings=context,
            **common,
        )
    disable_progress_bar()
    torch.manual_seed(0)
    with torch.device(device):
        kind = GPT2LMHeadModel if family == "gpt2" else LlamaForCausalLM
        kind._from_config(config, dtype=dtype).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(SHIPPED / name, folder)
    return folder


def chat_rows(count: int) -> list[dict[str, Any]]:
    """Short examples of the shipped data."""
    return [json.loads(line) for line in lines_of("train", 1500) if len(line) < SHORT_LINE][:count]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    write_lines(path, map(json.dumps, rows))
    return path


def spec_for(method: str, base: Base, *, type: str = "supervised", **hyperparameters: Any) -> TrainSpec:
    """One epoch in the base's own dtype, unless the hyperparameters say otherwise."""
    dtype = str(base.dtype).removeprefix("torch.")
    chosen = {"n_epochs": 1, "learning_rate": RATES.get(method, RATE), "samples": 0, "dtype": dtype}
    adapter = {"method": method, "rank": RANK, "alpha": RANK} | OPTIONS.get(method, {})
    return read_spec(
        model="bench", type=type, hyperparameters=chosen | hyperparameters, adapter=adapter, seed=SEED
    )


def each(report: Report, parts: Parts) -> None:
    """Does one part after the other; what raises is a failed check, what no longer fits is left out."""
    took = 0.0
    for name, part, *given in parts:
        if report.seconds_left < 2 * took:
            report.skip(
                name, f"{report.seconds_left:.0f} s were left, and the part before took {took:.0f} s."
            )
            continue
        began = time.monotonic()
        with report.attempt(name):
            part(report, name, *given)
        took = time.monotonic() - began
