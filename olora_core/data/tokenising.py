"""Records to tokenised, masked examples.

Only answers are trained: an assistant's tokens including its end-of-turn token, or a completion with its
end-of-sequence token. In a plain text, every token is trained.
"""

import sys
from array import array
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from ..formats import NOUNS, Container, container_of, read_records
from ..progress import Note, Phase
from .answers import Answers
from .drafts import Draft, drafts_of
from .encoding import Encoder
from .example_files import ExampleWriter
from .examples import Examples, Rows
from .templates import ChatTemplate

ROWS_AT_ONCE, CHARACTERS_AT_ONCE = 256, 2**20
LINES_NAMED = 50
UNTRAINED = {
    "reasoning": "with reasoning that the base model's chat template does not write, so it is not trained",
    "content": "with content that the base model's chat template does not write, so it is not trained",
}


def tokenise(
    writer: ExampleWriter,
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int,
    end_tokens: frozenset[int],
    role: str,
    total: int,
    day: date | None = None,
    reasoning: bool = True,
    literal: bool = False,
    columns: Mapping[str, str] | None = None,
    embedded_tokens: int = sys.maxsize,
) -> Generator[Phase, None, tuple[Examples, list[Note]]]:
    """Tokenises a validated file of `total` rows. Yields progress; returns the examples and notes on them.

    Rows are cut at `context_length` tokens, plain texts are split there. An example with a row without
    trained tokens is dropped. A chat template that writes today's date writes `day`, today if that is not
    given; `reasoning` and `literal` are options of `Answers`; `columns` has the file's column of each key
    that has another name there. Raises DataError with the line for a row that cannot be trained on, also one
    with a token that is not among the first `embedded_tokens`, which the model has embeddings for.
    """
    template = ChatTemplate(tokenizer, day or date.today())
    answers = Answers(template, end_tokens, reasoning=reasoning, literal=literal)
    encoder = Encoder(tokenizer, answers.ends)
    rows = _Rows(writer, role, container_of(path), context_length, encoder, embedded_tokens)
    noun = NOUNS[rows.container].capitalize()
    records = read_records(path, columns)
    drafts = (drafts_of(line, f"{noun} {line}", record, answers) for line, record in records)
    done = 0
    # The tokenizer's threads encode one batch while the template renders the next.
    with ThreadPoolExecutor(1) as tokenizing:
        ahead: deque[tuple[list[list[Draft]], Future[list[Any]]]] = deque()
        for batch in _batches(drafts):
            drafted = [draft for sides in batch for draft in sides]
            ahead.append((batch, tokenizing.submit(encoder.encode, drafted)))
            if len(ahead) > 1:
                done += rows.take(*ahead.popleft())
                yield Phase("tokenising", done, max(done, total))
        for batch, encodings in ahead:
            done += rows.take(batch, encodings)
            yield Phase("tokenising", done, max(done, total))
    return rows.examples()


def _batches(drafts: Iterable[list[Draft]]) -> Iterator[list[list[Draft]]]:
    """Batches of ROWS_AT_ONCE records, or fewer with long texts."""
    batch: list[list[Draft]] = []
    characters = 0
    for sides in drafts:
        batch.append(sides)
        characters += sum(len(draft.text) for draft in sides)
        if len(batch) == ROWS_AT_ONCE or characters > CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


# --- rows to a file ------------------------------------------------------------------------------------


class _Rows:
    """Writes rows, and collects what the notes say about them."""

    def __init__(
        self,
        writer: ExampleWriter,
        role: str,
        container: Container,
        context_length: int,
        encoder: Encoder,
        embedded_tokens: int,
    ) -> None:
        self.writer = writer
        self.role = role
        self.container = container
        self.context_length = context_length
        self.encoder = encoder
        self.embedded_tokens = embedded_tokens
        self.cut, self.split, self.equal, self.dropped = (array("q") for _ in range(4))
        self.untrained = {kind: array("q") for kind in UNTRAINED}
        self.dropped_by_cut = 0
        self.parts = 0

    def take(self, batch: list[list[Draft]], encodings: Future[list[Any]]) -> int:
        """Adds a batch of examples. Returns the number of records."""
        encoded = iter(encodings.result())
        for sides in batch:
            rows = [self.encoder.row(draft, next(encoded)) for draft in sides]
            for kind in frozenset().union(*(draft.untrained for draft in sides)):
                self.untrained[kind].append(sides[0].line)
            if sides[0].kind == "text":
                self._add_text(sides[0].line, *rows[0])
            else:
                self._add(sides[0].line, rows)
        return len(batch)

    def _add_text(self, line: int, ids: np.ndarray, trained: np.ndarray) -> None:
        """Adds a plain text, split if it is longer than the context.

        Each part begins with the last token of the part before it, so that every token is predicted once.
        """
        self._check(line, ids, trained)
        trained[:1] = False
        step = self.context_length - 1
        if len(ids) <= self.context_length or not step:
            self._keep(line, [(ids, trained)])
            return
        self.split.append(line)
        for start in range(0, len(ids) - 1, step):
            part = slice(start, start + self.context_length)
            predicted = trained[part].copy()
            predicted[0] = False
            self.writer.add(line, [(ids[part], predicted)])
            self.parts += 1

    def _add(self, line: int, rows: Rows) -> None:
        """Adds one example; if one of its rows cannot be used, the whole example is dropped."""
        for ids, trained in rows:
            self._check(line, ids, trained)
            trained[:1] = False
        self._keep(line, rows)

    def _keep(self, line: int, rows: Rows) -> None:
        had_answers = all(trained.any() for _, trained in rows)
        if any(len(ids) > self.context_length for ids, _ in rows):
            self.cut.append(line)
        kept = [(ids[: self.context_length], trained[: self.context_length]) for ids, trained in rows]
        if not all(trained.any() for _, trained in kept):
            self.dropped.append(line)
            self.dropped_by_cut += int(had_answers)
        elif len(kept) == 2 and np.array_equal(kept[0][0], kept[1][0]):
            self.equal.append(line)
        else:
            self.writer.add(line, kept)

    def _check(self, line: int, ids: np.ndarray, trained: np.ndarray) -> None:
        if (highest := int(ids.max(initial=0))) >= self.embedded_tokens:
            raise self.error(
                line,
                f"contains token {highest} ('{self.encoder.text_of(highest)}'), and the base model embeds "
                f"only {self.embedded_tokens} tokens. Leave it out, or use a base model that embeds it.",
            )
        bos, ends = self.encoder.bos, self.encoder.end_tokens
        if bos is not None and ids[:2].tolist() == [bos, bos]:
            raise self.error(
                line,
                "begins with two begin-of-sequence tokens. Leave that token out of the text, or out of the "
                "chat template.",
            )
        if _unended(ids, trained, ends):
            raise self.error(
                line,
                "has an answer with no end-of-turn token among its trained tokens, so the tuned model would "
                "never stop. Use a chat template that writes the model's end-of-turn token after each "
                "answer.",
            )

    def error(self, line: int, what: str) -> DataError:
        return DataError(
            f"{NOUNS[self.container].capitalize()} {line} of the {self.role} file {what}",
            code=f"invalid_{self.role}_file",
            param=f"{self.role}_file",
        )

    def examples(self) -> tuple[Examples, list[Note]]:
        if not len(self.writer):
            raise DataError(
                f"No row of the {self.role} file has a trained token"
                + (
                    f": {self.dropped_by_cut} answers lie beyond the context of {self.context_length} "
                    "tokens. Raise hyperparameters.context_length or shorten the prompts."
                    if self.dropped_by_cut
                    else ". Give the rows answers that are not empty."
                ),
                code=f"invalid_{self.role}_file",
                param=f"{self.role}_file",
            )
        examples = self.writer.examples()
        return examples, self.notes(examples)

    def notes(self, examples: Examples) -> list[Note]:
        tokens, trained = len(examples.tokens), int(examples.trained_lengths.sum())
        longest = int(examples.lengths.max())
        reason = f" ({self.dropped_by_cut} of them because of the cut)" if self.dropped_by_cut else ""
        notes = [
            Note(
                "info",
                f"The {self.role} file has {len(examples)} usable examples, {tokens} tokens, {trained} of "
                f"them trained; the longest example has {longest}.",
                {"examples": len(examples), "tokens": tokens, "trained_tokens": trained, "longest": longest},
            ),
            self._note("n_too_long", self.cut, f"cut at {self.context_length} tokens"),
            self._note(
                "split",
                self.split,
                f"split into {self.parts} parts of at most {self.context_length} tokens, the context length",
            ),
            self._note("no_trained_token", self.dropped, f"dropped, without a trained token{reason}"),
            self._note("equal_preference", self.equal, "dropped, with two answers of the same tokens"),
            *(
                self._note(f"{kind}_not_written", self.untrained[kind], what)
                for kind, what in UNTRAINED.items()
            ),
            self._note("duplicate", _repeated(examples), "the same as an earlier one"),
        ]
        return [note for note in notes if note is not None]

    def _note(self, code: str, lines: Sequence[int], what: str) -> Note | None:
        return lines_note(code, lines, f"of the {self.role} file {what}", NOUNS[self.container])


def _unended(ids: np.ndarray, trained: np.ndarray, ends: frozenset[int]) -> bool:
    """Whether one of the runs of trained tokens has none of the tokens that end an answer.

    `ids` (tokens,) int64; `trained` (tokens,) bool, or float32 weights.
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[False], trained != 0, [False]]).astype(np.int8)))
    ended = np.concatenate([[0], np.cumsum(np.isin(ids, list(ends)))])
    return bool((ended[edges[1::2]] == ended[edges[::2]]).any())


def lines_note(code: str, lines: Sequence[int], what: str, noun: str = "line") -> Note | None:
    """A warning that names lines: five in the sentence, LINES_NAMED in the data. None without lines."""
    if not len(lines):
        return None
    examples = "1 example" if len(lines) == 1 else f"{len(lines)} examples"
    named = ", ".join(str(line) for line in lines[:5])
    more = f" and {len(lines) - 5} more" if len(lines) > 5 else ""
    where = f"{noun}{'s' if len(lines) > 1 else ''} {named}{more}"
    data = {"code": code, "lines": list(lines[:LINES_NAMED]), "count": len(lines)}
    return Note("warn", f"{examples} {what} ({where}).", data)


def _repeated(examples: Examples) -> list[int]:
    """Lines whose tokens are those of an earlier line."""
    _, firsts = np.unique(examples.fingerprints, return_index=True)
    is_first = np.zeros(len(examples), dtype=bool)
    is_first[firsts] = True
    return list(dict.fromkeys(examples.lines[~is_first].tolist()))


def overlap_note(training: Examples, validation: Examples, noun: str = "line") -> Note | None:
    """A warning that names validation lines also trained on: their loss says nothing about new data."""
    lines = validation.lines[np.isin(validation.fingerprints, training.fingerprints)].tolist()
    return lines_note(
        "overlap", list(dict.fromkeys(lines)), "of the validation file also in the training file", noun
    )
