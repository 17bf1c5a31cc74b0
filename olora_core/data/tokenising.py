"""Records to tokenised, masked examples.

Only answers are trained: an assistant's tokens including its end-of-turn token, or a completion with its
end-of-sequence token. In a plain text, every token is trained.
"""

import sys
from array import array
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import DataError, ModelError
from ..formats import (
    NOUNS,
    Container,
    canonical,
    container_of,
    detect_format,
    plain_text,
    read_preference,
    read_records,
)
from ..progress import Note, Phase
from .example_files import ExampleWriter
from .examples import Examples, Rows
from .templates import ChatTemplate, Span

ROWS_AT_ONCE, CHARACTERS_AT_ONCE = 256, 2**20
LINES_NAMED = 50


def tokenise(
    writer: ExampleWriter,
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int,
    end_tokens: frozenset[int],
    role: str,
    total: int,
    embedded_tokens: int = sys.maxsize,
) -> Generator[Phase, None, tuple[Examples, list[Note]]]:
    """Tokenises a validated file of `total` rows. Yields progress; returns the examples and notes on them.

    Rows are cut at `context_length` tokens, plain texts are split there. An example with a row without
    trained tokens is dropped. Raises DataError with the line for a row that cannot be trained on, also one
    with a token that is not among the first `embedded_tokens`, which the model has embeddings for.
    """
    encoder = Encoder(tokenizer, end_tokens)
    rows = _Rows(writer, role, container_of(path), context_length, encoder)
    rows.embedded_tokens = embedded_tokens
    chat = ChatTemplate(tokenizer, end_tokens)
    noun = NOUNS[rows.container].capitalize()
    drafts = (_drafts(line, f"{noun} {line}", record, chat) for line, record in read_records(path))
    done = 0
    # The tokenizer's threads encode one batch while the template renders the next.
    with ThreadPoolExecutor(1) as tokenizing:
        ahead: deque[tuple[list[list[_Draft]], Future[list[Any]]]] = deque()
        for batch in _batches(drafts):
            texts = [draft.text for sides in batch for draft in sides]
            ahead.append((batch, tokenizing.submit(encoder.encode, texts)))
            if len(ahead) > 1:
                done += rows.take(*ahead.popleft())
                yield Phase("tokenising", done, max(done, total))
        for batch, encodings in ahead:
            done += rows.take(batch, encodings)
            yield Phase("tokenising", done, max(done, total))
    return rows.examples()


@dataclass(frozen=True)
class _Draft:
    """One row before it is tokenised."""

    line: int
    text: str
    spans: list[Span]
    """(start, end) characters of `text` that are trained."""
    kind: str
    """"chat", rendered by its template; or "completion" or "text", which still need begin and end tokens."""


def _batches(drafts: Iterable[list[_Draft]]) -> Iterator[list[list[_Draft]]]:
    """Batches of ROWS_AT_ONCE records, or fewer with long texts."""
    batch: list[list[_Draft]] = []
    characters = 0
    for sides in drafts:
        batch.append(sides)
        characters += sum(len(draft.text) for draft in sides)
        if len(batch) == ROWS_AT_ONCE or characters > CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


# --- records to text -----------------------------------------------------------------------------------


def _drafts(line: int, place: str, record: dict[str, Any], chat: ChatTemplate) -> list[_Draft]:
    """The rows of an example: one, or for a preference pair the prompt with each of its answers."""
    record = canonical(record)
    format = detect_format(record)
    if format == "text":
        return [_Draft(line, record["text"], [], "text")]
    if format != "preference":
        return [_draft(line, place, record, chat)]
    pair = read_preference(record)
    around = {"prompt": pair.prompt, "tools": pair.tools, "functions": pair.functions}
    drafts = []
    for answer in (pair.chosen, pair.rejected):
        draft = _draft(line, place, around | {"completion": answer}, chat)
        drafts.append(draft if _says_something(answer) else _Draft(line, draft.text, [], "chat"))
    return drafts


def _says_something(answer: str | list[dict[str, Any]]) -> bool:
    """Whether an answer has any text or tool call besides its end of turn."""
    if isinstance(answer, str):
        return bool(answer.strip())
    called = ("tool_calls", "function_call")
    return any(plain_text(m.get("content")).strip() or any(m.get(key) for key in called) for m in answer)


def _draft(line: int, place: str, record: dict[str, Any], chat: ChatTemplate) -> _Draft:
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        text = prompt + completion
        return _Draft(line, text, [(len(prompt), len(text))], "completion")
    if prompt is not None:
        messages = [*({**message, "weight": 0} for message in prompt), *record["completion"]]
    else:
        messages = record["messages"]
    tools = record.get("tools") or [
        {"type": "function", "function": function} for function in record.get("functions") or []
    ]
    text, spans = chat.draft(place, messages, tools or None)
    return _Draft(line, text, spans, "chat")


# --- text to tokens ------------------------------------------------------------------------------------


class Encoder:
    """Texts to token ids and masks, on all of the tokenizer's threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_tokens: frozenset[int]) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                "The base model's tokenizer gives no character offsets, which masking needs; use a base "
                "model with a tokenizer.json."
            )
        self.end_tokens = end_tokens
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        # This call also turns off truncation and padding that tokenizer.json may ask for.
        alone = tokenizer("", verbose=False).input_ids
        self.adds_bos = self.bos is not None and alone[:1] == [self.bos]
        self._core = tokenizer.backend_tokenizer

    def encode(self, texts: list[str]) -> list[Any]:
        """One `tokenizers.Encoding` for each text, without special tokens."""
        return self._core.encode_batch(texts, add_special_tokens=False)

    def text_of(self, token: int) -> str:
        """How the vocabulary writes a token."""
        return str(self._core.id_to_token(token))

    def row(self, draft: _Draft, encoding: Any) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of a row, (tokens,) int64, and which are trained, (tokens,) bool."""
        ids = np.array(encoding.ids, dtype=np.int64)
        if draft.kind == "chat":
            return ids, self._mask(draft, encoding, ids)
        prompt_tokens = 0
        if draft.kind == "completion":
            ids, prompt_tokens = self._split(draft, encoding, ids)
        if self.adds_bos:
            ids, prompt_tokens = np.concatenate([[self.bos], ids]), prompt_tokens + 1
        if self.eos is None:
            raise ModelError(
                "The base model's tokenizer has no end-of-sequence token, which a completion or a text needs "
                "to end with; set eos_token in its tokenizer_config.json."
            )
        if not len(ids) or ids[-1] != self.eos:
            ids = np.append(ids, self.eos)
        return ids, np.arange(len(ids)) >= prompt_tokens

    def _mask(self, draft: _Draft, encoding: Any, ids: np.ndarray) -> np.ndarray:
        trained = np.zeros(len(ids), dtype=bool)
        for start, end in draft.spans:
            first, last = (token_from(encoding, position, len(draft.text)) for position in (start, end))
            trained[first : self._with_its_end(ids, first, last)] = True
        return trained

    def _with_its_end(self, ids: np.ndarray, first: int, last: int) -> int:
        """End of a trained turn: after its end-of-turn token, without the line breaks that follow."""
        if ids[last - 1] in self.end_tokens:
            return last
        # A template may put the token just outside its marks; a model that never learns it never stops.
        if last < len(ids) and ids[last] in self.end_tokens:
            return last + 1
        inside = (at for at in range(last - 1, first - 1, -1) if ids[at] in self.end_tokens)
        return next(inside, last - 1) + 1

    def _split(self, draft: _Draft, encoding: Any, ids: np.ndarray) -> tuple[np.ndarray, int]:
        """Ids of prompt and completion, and the number of prompt tokens."""
        boundary = draft.spans[0][0]
        at = token_from(encoding, boundary, len(draft.text))
        if at and encoding.token_to_chars(at - 1)[1] > boundary:
            # A token across the boundary cannot occur at inference, where the prompt is encoded alone.
            head, tail = self.encode([draft.text[:boundary], draft.text[boundary:]])
            return np.array(head.ids + tail.ids, dtype=np.int64), len(head.ids)
        return ids, at


def token_from(encoding: Any, position: int, length: int) -> int:
    """Index of the first token that begins at character `position` or later, in a text of `length`."""
    if position == 0:
        return 0
    if position >= length:
        return len(encoding)
    token = encoding.char_to_token(position)
    if token is None:  # the tokenizer drops this character
        starts = np.fromiter((start for start, _ in encoding.offsets), dtype=np.int64, count=len(encoding))
        return int(np.searchsorted(starts, position))
    while token < len(encoding) and encoding.token_to_chars(token)[0] < position:
        token += 1
    return int(token)


# --- rows to a file ------------------------------------------------------------------------------------


class _Rows:
    """Writes rows, and collects what the notes say about them."""

    def __init__(
        self, writer: ExampleWriter, role: str, container: Container, context_length: int, encoder: Encoder
    ) -> None:
        self.writer = writer
        self.role = role
        self.container = container
        self.context_length = context_length
        self.encoder = encoder
        self.embedded_tokens = sys.maxsize
        self.cut, self.split, self.equal, self.dropped = (array("q") for _ in range(4))
        self.dropped_by_cut = 0
        self.parts = 0

    def take(self, batch: list[list[_Draft]], encodings: Future[list[Any]]) -> int:
        """Adds a batch of examples. Returns the number of records."""
        encoded = iter(encodings.result())
        for sides in batch:
            rows = [self.encoder.row(draft, next(encoded)) for draft in sides]
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
        if trained.any() and not ends.intersection(ids[trained].tolist()):
            raise self.error(
                line,
                "has no end-of-turn token among its trained tokens, so the tuned model would never stop. Use "
                "a chat template that writes the model's end-of-turn token after each answer.",
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
            self._note("duplicate", _repeated(examples), "the same as an earlier one"),
        ]
        return [note for note in notes if note is not None]

    def _note(self, code: str, lines: Sequence[int], what: str) -> Note | None:
        return lines_note(code, lines, f"of the {self.role} file {what}", NOUNS[self.container])


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
