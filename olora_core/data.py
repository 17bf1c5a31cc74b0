"""Records to tokenised, masked examples, and examples to micro-batches in an order fixed by (seed, epoch).

Only answers are trained: an assistant's tokens up to and with its end-of-turn token, or a completion and
its end-of-sequence token. Token j counts as trained when the model is asked to predict it from tokens < j.
"""

import hashlib
import json
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from .errors import DataError, ModelError
from .formats import detect_format, plain_text, read_preference, read_records
from .progress import Note, Phase

IGNORED = -100
"""The label of a token that is not trained."""
ROWS_AT_ONCE = 256
LINES_NAMED = 50
Span = tuple[int, int]


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


# --- chat templates ------------------------------------------------------------------------------------


class ChatTemplate:
    """Renders conversations with the tokenizer's own template and finds the answers in the text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_tokens: frozenset[int]) -> None:
        self.tokenizer = tokenizer
        self.end_texts = [tokenizer.convert_ids_to_tokens(token) for token in end_tokens]

    def draft(
        self, line: int, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
    ) -> tuple[str, list[Span]]:
        """The rendered conversation and the characters of it that are trained."""
        weights = [message.get("weight", 1) != 0 for message in messages]
        plain = normalised(messages)
        try:
            return self._draft(plain, weights, tools)
        except _CannotMask as problem:
            raise DataError(
                f"Line {line}: the base model's chat template cannot be masked, because {problem}. Split the "
                "conversation so that its answer comes last, give earlier answers weight 0, or use a base "
                "model whose template has {% generation %} marks."
            ) from None
        except _TemplateRefused as problem:
            raise DataError(f"Line {line}: the base model's chat template refuses it: {problem}") from None

    def _draft(
        self, messages: list[dict[str, Any]], weights: list[bool], tools: list[dict[str, Any]] | None
    ) -> tuple[str, list[Span]]:
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if any("tool_calls" in message for message in messages):
            messages = self._with_arguments_it_takes(messages, tools)
        text, marks = self.render(messages, tools)
        if len(marks) == len(answers):
            return text, [mark for mark, i in zip(marks, answers, strict=True) if weights[i]]
        if marks and all(weights[i] for i in answers):
            return text, marks
        return text, [self._answer(text, messages, i, tools) for i in answers if weights[i]]

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        generation_prompt: bool = False,
    ) -> tuple[str, list[Span]]:
        """The text, and the spans the template marks as generated (none if it marks nothing)."""
        template = self._template(tools)
        marked = bool(re.search(r"\{%-?\s*generation\s*-?%\}", template))
        try:
            texts, marks = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=generation_prompt,
                **self.tokenizer.special_tokens_map,
            )
        except Exception as error:  # a template is a program of its own and may fail in any way
            raise _TemplateRefused(str(error) or type(error).__name__) from None
        return texts[0], [tuple(mark) for mark in marks[0]] if marked else []

    def _template(self, tools: list[dict[str, Any]] | None) -> str:
        try:
            return self.tokenizer.get_chat_template(None, tools)
        except ValueError:
            raise ModelError(
                "The base model has no chat template, so conversations cannot be trained on. Use a chat "
                "model, add chat_template.jinja to its folder, or give prompt and completion as strings."
            ) from None

    def _with_arguments_it_takes(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
    ) -> list[dict[str, Any]]:
        """Tool arguments as objects, which most templates print as JSON, else as strings of JSON."""
        try:
            self.render(messages, tools)
        except _TemplateRefused:
            return [_with_string_arguments(message) for message in messages]
        return messages

    def _answer(
        self, text: str, messages: list[dict[str, Any]], i: int, tools: list[dict[str, Any]] | None
    ) -> Span:
        """Where answer i stands, found by rendering the conversation up to it, and verified."""
        start = self._start(text, messages, i, tools)
        through, _ = self.render(messages[: i + 1], tools)
        if text.startswith(through):
            return start, len(through)
        # The template writes an answer in another way once more follows (dropping thoughts, say).
        content = messages[i].get("content", "").strip()
        after = text.find(content, start) + len(content)
        ends = [at + len(end) for end in self.end_texts if (at := text.find(end, after)) >= 0]
        if after < start + len(content) or not ends:
            raise _CannotMask(f"it rewrites message {i}, an answer, once later messages follow")
        between = text[after : min(ends)]
        names = [call["function"]["name"] for call in messages[i].get("tool_calls", [])]
        rest = between.strip()
        if names and not all(name in rest for name in names):
            raise _CannotMask(f"the calls of message {i} are not found before its end")
        if not names and rest not in self.end_texts:
            raise _CannotMask(f"text of its own follows the answer in message {i}")
        return start, min(ends)

    def _start(
        self, text: str, messages: list[dict[str, Any]], i: int, tools: list[dict[str, Any]] | None
    ) -> int:
        if i == 0:
            opening = self._opening()
            at = text.find(opening) if opening else -1
            if at < 0:
                raise _CannotMask("the conversation begins with an answer")
            return at + len(opening)
        before, _ = self.render(messages[:i], tools, generation_prompt=True)
        if not text.startswith(before):
            raise _CannotMask(
                f"what it writes before message {i}, an answer, changes once the answer follows"
            )
        return len(before)

    def _opening(self) -> str:
        """What the template writes to begin an answer."""
        question = [{"role": "user", "content": "?"}]
        asked = self.render(question)[0]
        return self.render(question, generation_prompt=True)[0].removeprefix(asked)


class _TemplateRefused(Exception):
    """The template raised; carries what it said."""


class _CannotMask(Exception):
    """The answers cannot be found in the rendered text with certainty; carries why."""


def end_of_turn_tokens(tokenizer: PreTrainedTokenizerBase, generation_eos: Any = None) -> frozenset[int]:
    """Tokens that may end an answer: the end-of-sequence tokens, and the one its template writes.

    `generation_eos` is the generation config's `eos_token_id`: a number, a list, or None.
    """
    known = generation_eos if isinstance(generation_eos, list) else [generation_eos]
    tokens = {token for token in (tokenizer.eos_token_id, *known) if token is not None}
    if tokenizer.chat_template:
        probe = "An answer."
        question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": probe}
        try:
            text, _ = ChatTemplate(tokenizer, frozenset()).render([question, answer])
        except _TemplateRefused:
            return frozenset(tokens)
        behind = tokenizer(text.rpartition(probe)[2], add_special_tokens=False).input_ids
        tokens.update([token for token in behind if token in tokenizer.added_tokens_decoder][:1])
    return frozenset(tokens)


def normalised(messages: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates expect them: content a string, arguments objects, today's role names."""
    return [_normalised(message) for message in messages]


def _normalised(message: dict[str, Any]) -> dict[str, Any]:
    kept = ("role", "content", "name", "tool_calls", "tool_call_id")
    plain = {key: message[key] for key in kept if message.get(key) is not None}
    plain["role"] = {"developer": "system", "function": "tool"}.get(plain["role"], plain["role"])
    plain["content"] = plain_text(plain.get("content"))
    calls = message.get("tool_calls") or []
    if message.get("function_call"):
        calls = [{"id": "call", "type": "function", "function": message["function_call"]}]
    if calls:
        plain["tool_calls"] = [_call(call, _as_object) for call in calls]
    return plain


def _call(call: dict[str, Any], written: Callable[[Any], Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": written(function.get("arguments", {}))}}


def _as_object(arguments: Any) -> Any:
    return json.loads(arguments) if isinstance(arguments, str) else arguments


def _with_string_arguments(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls", [])
    written = [_call(call, lambda a: json.dumps(a, ensure_ascii=False)) for call in calls]
    return {**message, "tool_calls": written} if calls else message


# --- examples to batches -------------------------------------------------------------------------------


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass sees."""

    input_ids: Tensor
    """(rows, length) int64."""
    labels: Tensor
    """(rows, length) int64; IGNORED where nothing is trained, so at every pad too."""
    position_ids: Tensor | None
    """(1, length) of a packed row, from 0 again at each example; None when each example has its own row."""
    positions: Tensor
    """(trained,) int64: which of the rows × length hidden states predict a trained token."""
    targets: Tensor
    """(trained,) int64: those tokens."""
    trained_by_row: tuple[int, ...]
    """How many of those belong to each example's row, in their order."""
    tokens: int
    """Without padding."""

    @property
    def trained_tokens(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> "MicroBatch":
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)


def epoch_order(examples: int, *, seed: int, epoch: int) -> np.ndarray:
    """(examples,) the order of one pass over the data; a function of its arguments alone."""
    digest = hashlib.sha256(f"order/{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(examples, generator=generator).numpy()


def steps_per_epoch(examples: int, batch_size: int) -> int:
    return -(-examples // batch_size)


def micro_batches(
    examples: Examples, rows: np.ndarray, *, size: int, packing: bool, pad_token: int
) -> Iterator[MicroBatch]:
    """Splits one optimizer batch into forward passes of `size` examples of similar length.

    The rows of an example stay together, one after the other.
    """
    by_length = rows[np.argsort(-examples.lengths[rows], kind="stable")]
    for start in range(0, len(by_length), size):
        part = [row for i in by_length[start : start + size] for row in examples.example(int(i))]
        yield _packed(part) if packing else _padded(part, pad_token)


def _padded(rows: list[tuple[np.ndarray, np.ndarray]], pad_token: int) -> MicroBatch:
    """Each row on its own, padded on the right.

    No attention mask is needed: attention is causal, so no token sees the pads behind it.
    """
    longest = max(len(tokens) for tokens, _ in rows)
    input_ids = np.full((len(rows), longest), pad_token, dtype=np.int64)
    labels = np.full((len(rows), longest), IGNORED, dtype=np.int64)
    for i, (tokens, trained) in enumerate(rows):
        input_ids[i, : len(tokens)] = tokens
        labels[i, : len(tokens)] = np.where(trained, tokens.astype(np.int64), IGNORED)
    return _micro_batch(input_ids, labels, None, rows)


def _packed(rows: list[tuple[np.ndarray, np.ndarray]]) -> MicroBatch:
    """All rows end to end. Positions that start again tell transformers where attention must not cross."""
    tokens = np.concatenate([tokens for tokens, _ in rows]).astype(np.int64)
    trained = np.concatenate([trained for _, trained in rows])
    positions = np.concatenate([np.arange(len(tokens), dtype=np.int64) for tokens, _ in rows])
    labels = np.where(trained, tokens, IGNORED)
    return _micro_batch(tokens[None], labels[None], torch.from_numpy(positions[None]), rows)


def _micro_batch(
    input_ids: np.ndarray,
    labels: np.ndarray,
    position_ids: Tensor | None,
    rows: list[tuple[np.ndarray, np.ndarray]],
) -> MicroBatch:
    # Found here and not on the device, which would have to wait for the count.
    trained = np.flatnonzero(labels != IGNORED)
    return MicroBatch(
        torch.from_numpy(input_ids),
        torch.from_numpy(labels),
        position_ids,
        positions=torch.from_numpy(trained - 1),
        targets=torch.from_numpy(labels.reshape(-1)[trained]),
        trained_by_row=tuple(int(trained.sum()) for _, trained in rows),
        tokens=sum(len(tokens) for tokens, _ in rows),
    )
