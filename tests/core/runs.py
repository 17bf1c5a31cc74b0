"""Runs of the training generator that several test files start."""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from olora_core.data.example_files import ExampleWriter
from olora_core.data.examples import Examples
from olora_core.data.tokenising import tokenise
from olora_core.progress import Finished, Note, Progress, Resolved, Step, result_of
from olora_core.specs import TrainSpec, read_spec
from olora_core.training.train import train
from tests.rows import uneven_chat, uneven_preference, write_rows

ROWS = 11
OPTIONS: dict[str, dict[str, Any]] = {
    "melora": {"mini_loras": 2},
    "xgblora": {"layers_per_round": 99},
    "mora": {"alpha": 1},
}
"""What a method needs beside its rank on layers as small, and in runs as short, as the tests'."""


def chat_rows(count: int = ROWS) -> list[dict[str, Any]]:
    return [uneven_chat(i) for i in range(count)]


def preference_rows(count: int = ROWS) -> list[dict[str, Any]]:
    """The questions and answers of `chat_rows`, each with another answer."""
    return [uneven_preference(i) for i in range(count)]


def tokenised(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, context_length: int, end_tokens: frozenset[int]
) -> tuple[Examples, list[Note]]:
    """A training file's examples, in a folder beside it, and what is said of them."""
    with ExampleWriter(Path(tempfile.mkdtemp(dir=path.parent)), len(tokenizer)) as writer:
        how = {"context_length": context_length, "end_tokens": end_tokens, "role": "training", "total": 0}
        return result_of(tokenise(writer, path, tokenizer, **how))


def spec_for(
    method: str = "olora",
    *,
    type: str = "supervised",
    seed: int = 5,
    adapter: Any = None,
    **hyperparameters: Any,
) -> TrainSpec:
    """A spec whose every number is small; answers are generated where a test asks for them."""
    chosen = {
        "n_epochs": 2,
        "batch_size": 4,
        "micro_batch_size": 2,
        "learning_rate": 2e-3,
        "dtype": "float32",
        "samples": 0,
    } | hyperparameters
    return read_spec(
        model="tiny",
        type=type,
        hyperparameters=chosen,
        adapter={"method": method, "rank": 4, "alpha": 4} | OPTIONS.get(method, {}) | (adapter or {}),
        seed=seed,
    )


def losses(progress: Iterable[Progress]) -> list[float]:
    return [p.loss for p in progress if isinstance(p, Step)]


def one(kind: type, progress: Iterable[Progress]) -> Any:
    (found,) = [p for p in progress if isinstance(p, kind)]
    return found


__all__ = [
    "OPTIONS",
    "ROWS",
    "Finished",
    "Resolved",
    "Step",
    "chat_rows",
    "losses",
    "one",
    "preference_rows",
    "spec_for",
    "train",
    "write_rows",
]
