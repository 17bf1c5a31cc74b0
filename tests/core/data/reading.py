"""A file as a run reads it."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from olora_core.data.example_files import ExampleWriter
from olora_core.data.examples import Examples
from olora_core.data.tokenising import tokenise
from olora_core.data.turns import end_of_turn_tokens
from olora_core.progress import Note, result_of

from ..runs import write_rows


def read(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    end_tokens: frozenset[int] | None = None,
    **options: Any,
) -> tuple[Examples, list[Note]]:
    """The examples of a training file with these rows."""
    path = write_rows(folder / "rows.jsonl", rows)
    (folder / "tokens").mkdir(exist_ok=True)
    with ExampleWriter(folder / "tokens", len(tokenizer)) as writer:
        ends = end_of_turn_tokens(tokenizer) if end_tokens is None else end_tokens
        how = {"context_length": 4096, "end_tokens": ends, "role": "training", "total": len(rows)}
        return result_of(tokenise(writer, path, tokenizer, **how, **options))
