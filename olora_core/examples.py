"""Records to tokenised, masked examples.

Only answers are trained: an assistant's tokens up to and with its end-of-turn token, or a completion and
its end-of-sequence token. Token j counts as trained when the model is asked to predict it from tokens < j.
"""

import hashlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from .errors import DataError, ModelError
from .formats import detect_format, plain_text, read_preference, read_records
from .progress import Note, Phase
from .templates import ChatTemplate, Span

ROWS_AT_ONCE = 256
LINES_NAMED = 50


@dataclass(frozen=True)
class Examples:
    """Tokenised examples of one row each, or of two: the better answer's, then the worse one's.

    Rows are laid end to end. Row i is `offsets[i]:offsets[i + 1]`.
    """

    tokens: np.ndarray
    """(total,) uint32."""
    trained: np.ndarray
    """(total,) bool; never true for a row's first token, which nothing predicts."""
    offsets: np.ndarray
    """(rows + 1,) int64."""
    lines: np.ndarray
    """(examples,) int64, the line of the file that each example comes from."""
    sides: int = 1
    """Rows of an example: 2 where one answer is preferred to another."""

    def __len__(self) -> int:
        return len(self.lines)

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(self.offsets[i], self.offsets[i + 1])
        return self.tokens[part], self.trained[part]

    def example(self, i: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Its rows."""
        return [self.row(self.sides * i + side) for side in range(self.sides)]

    @cached_property
    def lengths(self) -> np.ndarray:
        """(examples,) tokens of the longest row."""
        return np.diff(self.offsets).reshape(-1, self.sides).max(axis=1)

    @cached_property
    def row_tokens(self) -> np.ndarray:
        """(examples,) tokens of all of its rows."""
        return np.diff(self.offsets).reshape(-1, self.sides).sum(axis=1)

    @cached_property
    def trained_lengths(self) -> np.ndarray:
        """(examples,) number of trained tokens."""
        rows = np.add.reduceat(self.trained.astype(np.int64), self.offsets[:-1])
        return rows.reshape(-1, self.sides).sum(axis=1)

    @cached_property
    def weights(self) -> np.ndarray:
        """(examples,) what each counts in a mean loss: its trained tokens, or one for a pair."""
        return self.trained_lengths if self.sides == 1 else np.ones(len(self), dtype=np.int64)

    @cached_property
    def digest(self) -> str:
        """sha256 of what is trained on: the tokens, the mask and where rows end."""
        hashed = hashlib.sha256()
        for array in (self.tokens, self.trained, self.offsets):
            hashed.update(np.ascontiguousarray(array).tobytes())
        return hashed.hexdigest()

    def example_digests(self) -> list[bytes]:
        return [
            b"".join(hashlib.sha256(tokens.tobytes()).digest() for tokens, _ in self.example(i))
            for i in range(len(self))
        ]

    def first(self, examples: int) -> "Examples":
        """The first examples alone."""
        rows = self.sides * min(examples, len(self))
        end = self.offsets[rows]
        return Examples(
            self.tokens[:end],
            self.trained[:end],
            self.offsets[: rows + 1],
            self.lines[:examples],
            self.sides,
        )


# --- records to examples -------------------------------------------------------------------------------


def tokenise(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int,
    end_tokens: frozenset[int],
    role: str = "training",
) -> Generator[Phase, None, tuple[Examples, list[Note]]]:
    """Reads a validated file. Yields progress; returns the examples and what its owner should know of them.

    Rows are cut at `context_length` tokens; examples with a row without a trained token are left out.
    Raises DataError, naming the line, for what cannot be trained on.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            "The base model's tokenizer tells no character positions, which masking needs; use a base model "
            "with a tokenizer.json."
        )
    total, rows = _count_lines(path), _Rows(role)
    chat = ChatTemplate(tokenizer, end_tokens)
    drafts = (_drafts(line, record, chat) for line, record in read_records(path))
    while batch := list(islice(drafts, ROWS_AT_ONCE)):
        texts = [draft.text for sides in batch for draft in sides]
        encodings = iter(tokenizer(texts, add_special_tokens=False, verbose=False).encodings)
        for sides in batch:
            encoded = [_encode(draft, next(encodings), tokenizer, end_tokens) for draft in sides]
            rows.add(sides[0].line, encoded, context_length, tokenizer.bos_token_id, end_tokens)
        yield Phase("tokenising", min(batch[-1][0].line, total), total)
    return rows.examples(context_length)


@dataclass(frozen=True)
class _Draft:
    """One row before it is tokenised."""

    line: int
    text: str
    spans: list[Span]
    """Characters of `text` that are trained."""
    raw: bool
    """A plain prompt and completion: begin- and end-of-sequence tokens are still to be put around it."""


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(2**20), b"")) + 1


def _drafts(line: int, record: dict[str, Any], chat: "ChatTemplate") -> list[_Draft]:
    """The rows of an example: one, or those of the better and of the worse answer to one prompt."""
    if detect_format(record) != "preference":
        return [_draft(line, record, chat)]
    pair = read_preference(record)
    around = {"prompt": pair.prompt, "tools": pair.tools, "functions": pair.functions}
    drafts = []
    for answer in (pair.chosen, pair.rejected):
        draft = _draft(line, around | {"completion": answer}, chat)
        drafts.append(draft if _says_something(answer) else _Draft(line, draft.text, [], raw=False))
    return drafts


def _says_something(answer: str | list[dict[str, Any]]) -> bool:
    """Whether there is more to prefer, or not, than the end of a turn."""
    if isinstance(answer, str):
        return bool(answer.strip())
    called = ("tool_calls", "function_call")
    return any(plain_text(m.get("content")).strip() or any(m.get(key) for key in called) for m in answer)


def _draft(line: int, record: dict[str, Any], chat: "ChatTemplate") -> _Draft:
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        text = prompt + completion
        return _Draft(line, text, [(len(prompt), len(text))], raw=True)
    if prompt is not None:
        messages = [*({**message, "weight": 0} for message in prompt), *record["completion"]]
    else:
        messages = record["messages"]
    tools = record.get("tools") or [
        {"type": "function", "function": function} for function in record.get("functions") or []
    ]
    text, spans = chat.draft(line, messages, tools or None)
    return _Draft(line, text, spans, raw=False)


def _encode(
    draft: _Draft, encoding: Any, tokenizer: PreTrainedTokenizerBase, end_tokens: frozenset[int]
) -> tuple[list[int], np.ndarray]:
    """Token ids of a row, and which of them are trained."""
    ids = list(encoding.ids)
    if draft.raw:
        return _encode_raw(draft, encoding, tokenizer)
    starts = np.fromiter((start for start, _ in encoding.offsets), dtype=np.int64, count=len(ids))
    trained = np.zeros(len(ids), dtype=bool)
    for start, end in draft.spans:
        first, last = np.searchsorted(starts, [start, end])
        last = _with_its_end(ids, first, last, end_tokens)
        trained[first:last] = True
    return ids, trained


def _with_its_end(ids: list[int], first: int, last: int, end_tokens: frozenset[int]) -> int:
    """Where a trained turn ends: after its end-of-turn token, without the line breaks behind it."""
    if ids[last - 1] in end_tokens:
        return last
    # A template may leave the token just outside its marks; a model that never learns it never stops.
    if last < len(ids) and ids[last] in end_tokens:
        return last + 1
    inside = (at for at in range(last - 1, first - 1, -1) if ids[at] in end_tokens)
    return next(inside, last - 1) + 1


def _encode_raw(
    draft: _Draft, encoding: Any, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], np.ndarray]:
    ids, boundary = list(encoding.ids), draft.spans[0][0]
    if any(start < boundary < end for start, end in encoding.offsets):
        # A token across the boundary never occurs when the prompt is given alone, as it is in use.
        parts = [draft.text[:boundary], draft.text[boundary:]]
        head, tail = tokenizer(parts, add_special_tokens=False, verbose=False).input_ids
        ids, prompt_tokens = head + tail, len(head)
    else:
        prompt_tokens = sum(end <= boundary for _, end in encoding.offsets)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and tokenizer("", verbose=False).input_ids[:1] == [bos]:
        ids, prompt_tokens = [bos, *ids], prompt_tokens + 1
    if eos is None:
        raise ModelError(
            "The base model's tokenizer has no end-of-sequence token, which a completion needs to end with; "
            "set eos_token in its tokenizer_config.json."
        )
    if ids[-1:] != [eos]:
        ids.append(eos)
    trained = np.zeros(len(ids), dtype=bool)
    trained[prompt_tokens:] = True
    return ids, trained


class _Rows:
    """Collects rows into flat arrays, and what is to be said about them."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.tokens: list[np.ndarray] = []
        self.trained: list[np.ndarray] = []
        self.lines: list[int] = []
        self.sides = 1
        self.cut: list[int] = []
        self.equal: list[int] = []
        self.dropped: list[int] = []
        self.dropped_by_cut = 0

    def add(
        self,
        line: int,
        sides: list[tuple[list[int], np.ndarray]],
        context_length: int,
        bos: int | None,
        end_tokens: frozenset[int],
    ) -> None:
        """One example's rows, token ids and which of them are trained: kept together, or none of them."""
        for ids, trained in sides:
            self._check(line, ids, trained, bos, end_tokens)
            trained[:1] = False
        had_answers = all(trained.any() for _, trained in sides)
        if any(len(ids) > context_length for ids, _ in sides):
            self.cut.append(line)
        kept = [(ids[:context_length], trained[:context_length]) for ids, trained in sides]
        if not all(trained.any() for _, trained in kept):
            self.dropped.append(line)
            self.dropped_by_cut += int(had_answers)
            return
        if len(kept) == 2 and kept[0][0] == kept[1][0]:
            self.equal.append(line)
            return
        self.sides = len(kept)
        self.tokens += [np.asarray(ids, dtype=np.uint32) for ids, _ in kept]
        self.trained += [trained for _, trained in kept]
        self.lines.append(line)

    def _check(
        self, line: int, ids: list[int], trained: np.ndarray, bos: int | None, end_tokens: frozenset[int]
    ) -> None:
        if bos is not None and ids[:2] == [bos, bos]:
            raise self.error(
                line,
                "begins with two begin-of-sequence tokens. Leave that token out of the text, or out of the "
                "chat template.",
            )
        if trained.any() and not any(ids[i] in end_tokens for i in trained.nonzero()[0]):
            raise self.error(
                line,
                "has no end-of-turn token among its trained tokens, so the tuned model would never stop. Use "
                "a chat template that writes the model's end-of-turn token after each answer.",
            )

    def error(self, line: int, what: str) -> DataError:
        return DataError(
            f"Line {line} of the {self.role} file {what}",
            code=f"invalid_{self.role}_file",
            param=f"{self.role}_file",
        )

    def examples(self, context_length: int) -> tuple[Examples, list[Note]]:
        if not self.lines:
            raise DataError(
                f"No row of the {self.role} file has a trained token"
                + (
                    f": {self.dropped_by_cut} answers lie beyond the context of {context_length} tokens. "
                    "Raise hyperparameters.context_length or shorten the prompts."
                    if self.dropped_by_cut
                    else ". Give the rows answers that are not empty."
                ),
                code=f"invalid_{self.role}_file",
                param=f"{self.role}_file",
            )
        lengths = [0, *(len(row) for row in self.tokens)]
        examples = Examples(
            np.concatenate(self.tokens),
            np.concatenate(self.trained),
            np.cumsum(lengths, dtype=np.int64),
            np.asarray(self.lines, dtype=np.int64),
            self.sides,
        )
        return examples, self.notes(examples, context_length)

    def notes(self, examples: Examples, context_length: int) -> list[Note]:
        tokens, trained = len(examples.tokens), int(examples.trained.sum())
        longest = int(examples.lengths.max())
        notes = [
            Note(
                "info",
                f"The {self.role} file has {len(examples)} usable examples, {tokens} tokens, {trained} of "
                f"them trained; the longest example has {longest}.",
                {"examples": len(examples), "tokens": tokens, "trained_tokens": trained, "longest": longest},
            )
        ]
        if self.cut:
            notes.append(
                lines_note(
                    f"{_examples(len(self.cut))} of the {self.role} file cut at {context_length} tokens.",
                    "n_too_long",
                    self.cut,
                )
            )
        if self.dropped:
            reason = f" ({self.dropped_by_cut} of them because of the cut)" if self.dropped_by_cut else ""
            notes.append(
                lines_note(
                    f"{_examples(len(self.dropped))} of the {self.role} file left out, without a trained "
                    f"token{reason}.",
                    "no_trained_token",
                    self.dropped,
                )
            )
        if self.equal:
            notes.append(
                lines_note(
                    f"{_examples(len(self.equal))} of the {self.role} file left out, whose two answers are "
                    "the same tokens.",
                    "equal_preference",
                    self.equal,
                )
            )
        if repeated := _repeated(examples):
            notes.append(
                lines_note(
                    f"{_examples(len(repeated))} of the {self.role} file the same as an earlier one.",
                    "duplicate",
                    repeated,
                )
            )
        return notes


def _examples(count: int) -> str:
    return "1 example" if count == 1 else f"{count} examples"


def lines_note(message: str, code: str, lines: Sequence[int]) -> Note:
    """A warning that names lines: the first few in the sentence, more of them in the data."""
    named = ", ".join(str(line) for line in lines[:5])
    more = f" and {len(lines) - 5} more" if len(lines) > 5 else ""
    where = f"line{'s' if len(lines) > 1 else ''} {named}{more}"
    return Note(
        "warn",
        f"{message.removesuffix('.')} ({where}).",
        {"code": code, "lines": list(lines[:LINES_NAMED]), "count": len(lines)},
    )


def _repeated(examples: Examples) -> list[int]:
    """Lines whose tokens an earlier line has too."""
    seen: set[bytes] = set()
    repeated = []
    for line, digest in zip(examples.lines.tolist(), examples.example_digests(), strict=True):
        if digest in seen:
            repeated.append(line)
        seen.add(digest)
    return repeated


def overlap_note(training: Examples, validation: Examples) -> Note | None:
    """Validation rows that are trained on tell nothing; names their lines."""
    known = set(training.example_digests())
    digests = validation.example_digests()
    lines = [line for line, d in zip(validation.lines.tolist(), digests, strict=True) if d in known]
    if not lines:
        return None
    return lines_note(
        f"{_examples(len(lines))} of the validation file also in the training file.", "overlap", lines
    )
