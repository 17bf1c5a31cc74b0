"""Runs of the training generator that several test files start."""

import json
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

ROWS = 11
OPTIONS: dict[str, dict[str, Any]] = {
    "melora": {"mini_loras": 2},
    "xgblora": {"layers_per_round": 99},
    "mora": {"alpha": 1},
}
"""What a method needs beside its rank on layers as small, and in runs as short, as the tests'."""


def chat_rows(count: int = ROWS) -> list[dict[str, Any]]:
    """Questions and answers of different lengths, so that padding and cutting matter."""
    return [
        {
            "messages": [
                {"role": "user", "content": "ab"[i % 2] * (1 + 3 * i % 7)},
                {"role": "assistant", "content": "xyz"[i % 3] * (2 + 5 * i % 9)},
            ]
        }
        for i in range(count)
    ]


def preference_rows(count: int = ROWS) -> list[dict[str, Any]]:
    """The same questions, each with the answer above and another one."""
    return [
        {
            "input": {"messages": row["messages"][:1]},
            "preferred_output": row["messages"][1:],
            "non_preferred_output": [{"role": "assistant", "content": "pqr"[i % 3] * (1 + 4 * i % 11)}],
        }
        for i, row in enumerate(chat_rows(count))
    ]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


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
