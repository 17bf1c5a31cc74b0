"""The files of one run, checked and tokenised with the base's own tokenizer and template."""

import hashlib
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .examples import Examples, overlap_note, tokenise
from .formats import check_for_training, validate
from .model import Base
from .progress import Note, Phase
from .specs import MAX_CONTEXT, TrainSpec
from .templates import end_of_turn_tokens

UNKNOWN_CONTEXT = 2048
"""Tokens kept of an example when neither model nor tokenizer names a limit."""


@dataclass(frozen=True)
class Data:
    """The files of a run, tokenised."""

    training: Examples
    validation: Examples | None
    hashes: dict[str, str]
    """SHA-256 of each file by its role."""
    notes: list[Note]


def read_data(
    spec: TrainSpec, base: Base, training: Path, validation: Path | None
) -> Generator[Phase, None, Data]:
    """Validates and tokenises the files."""
    kept = spec.hyperparameters.context_length
    arguments = {
        "context_length": context_length(base) if kept == "auto" else kept,
        "end_tokens": end_of_turn_tokens(base.tokenizer, base.model.generation_config.eos_token_id),
    }
    training_format = checked_format(training, "training", spec.type)
    examples, said = yield from tokenise(training, base.tokenizer, role="training", **arguments)
    hashes = {"training": file_hash(training)}
    held_out = None
    if validation is not None:
        checked_format(validation, "validation", spec.type, training_format)
        held_out, more = yield from tokenise(validation, base.tokenizer, role="validation", **arguments)
        hashes["validation"] = file_hash(validation)
        overlap = overlap_note(examples, held_out)
        said = [*said, *more, *([overlap] if overlap else [])]
    return Data(examples, held_out, hashes, said)


def checked_format(path: Path, role: Any, type: str, training_format: str | None = None) -> str | None:
    """The file's format, after its structural check."""
    with path.open("rb") as file:
        report = validate(file)
    error = check_for_training(report, role=role, minimum_rows=1, training_format=training_format, type=type)
    if error is not None:
        raise error
    return report.format


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def context_length(base: Base) -> int:
    """The longest example that the model can read."""
    limit = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    if limit:
        return min(limit, MAX_CONTEXT)
    named = base.tokenizer.model_max_length  # a huge number when nobody named one
    return named if named <= 2**20 else UNKNOWN_CONTEXT
