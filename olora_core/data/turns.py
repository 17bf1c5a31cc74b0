"""What a chat template writes before and after an answer, learned from conversations of known texts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import ModelError
from .conversations import Messages, is_garbled, spellings
from .templates import ChatTemplate, TemplateRefused, Tools

ASKED, ASKED_AGAIN, RESULT = "Zq0", "Zq2", "Zq4"
SAID, SAID_AGAIN, THOUGHT = "Zq1", "Zq3", "Zq5"
NAME, KEY, VALUE = "Zq6", "Zq7", "Zq8"
"""Texts that no template treats as anything special."""
_CALL_ID = "call00001"
_USER: dict[str, Any] = {"role": "user", "content": ASKED}
_USER_AGAIN: dict[str, Any] = {"role": "user", "content": ASKED_AGAIN}
_ANSWER: dict[str, Any] = {"role": "assistant", "content": SAID}
_ANSWER_AGAIN: dict[str, Any] = {"role": "assistant", "content": SAID_AGAIN}
_THOUGHTFUL = {**_ANSWER, "reasoning_content": THOUGHT, "thinking": THOUGHT}
_FUNCTION = {"name": NAME, "arguments": {KEY: VALUE}}
_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": _CALL_ID, "type": "function", "function": _FUNCTION}],
}
_RESULT = {"role": "tool", "name": NAME, "tool_call_id": _CALL_ID, "content": RESULT}
_RESULTS = [_USER, _CALL, _RESULT]


@dataclass(frozen=True)
class Opening:
    """What asks the model for an answer."""

    header: str
    """What stands before every answer, such as "<|im_start|>assistant\\n"."""
    prompt: str
    """What stands at the end of a prompt: the header, and perhaps more, such as "<think>\\n"."""


@dataclass(frozen=True)
class Turns:
    """What surrounds the answers of one template."""

    openings: tuple[Opening, ...]
    """After a user's message; and after a tool's result, if that has one of its own."""
    ends: tuple[str, ...]
    """Texts of the tokens that end an answer, the last of a conversation or an earlier one."""
    closing: str
    """The end of an answer, if the template writes it only once another message follows; otherwise empty."""
    closing_call: str
    """The same for a tool call."""


def turns_of(template: ChatTemplate, tools: Tools, end_tokens: frozenset[int]) -> Turns:
    """`end_tokens` are the ids of the tokens at which generation stops."""
    probes = _Probes(template, tools)
    stops = [str(template.tokenizer.convert_ids_to_tokens(token)) for token in sorted(end_tokens)]
    last, inner = probes.last_tail(), probes.inner_tail()
    ends = list(stops)
    openings = probes.openings()
    tokenizer = template.tokenizer
    if end := next(iter(_added(tokenizer, last)), ""):
        ends.append(end)
        # Another token may end an earlier answer, as in gpt-oss, if it does not begin the next message.
        others = _added(tokenizer, inner)
        if len(others) > 1 and not any(opening.header.startswith(others[0]) for opening in openings):
            ends.append(others[0])
    last_call, inner_call = probes.call_tails()
    return Turns(
        openings,
        tuple(dict.fromkeys(ends)),
        closing="" if _earliest(ends, last) else _earliest(stops, inner),
        closing_call="" if _earliest(ends, last_call) else _earliest(stops, inner_call),
    )


def end_of_turn_tokens(tokenizer: PreTrainedTokenizerBase, generation_eos: Any = None) -> frozenset[int]:
    """Ids of the tokens that may end an answer: end of sequence, and what the chat template writes after one.

    `generation_eos` is the generation config's `eos_token_id`: an int, a list or None.
    """
    known = generation_eos if isinstance(generation_eos, list) else [generation_eos]
    tokens = {token for token in (tokenizer.eos_token_id, *known) if token is not None}
    if tokenizer.chat_template:
        tail = _Probes(ChatTemplate(tokenizer, date.min), None).last_tail()
        tokens.update(tokenizer.convert_tokens_to_ids(_added(tokenizer, tail)[:1]))
    return frozenset(tokens)


class _Probes:
    """Conversations of known texts, rendered; every tail is empty where the template refuses one."""

    def __init__(self, template: ChatTemplate, tools: Tools) -> None:
        self.template = template
        self.tools = tools

    @cached_property
    def _answered(self) -> str:
        return self._text([_USER, _ANSWER])

    @cached_property
    def _answered_twice(self) -> str:
        return self._text([_USER, _ANSWER, _USER_AGAIN, _ANSWER_AGAIN])

    @cached_property
    def _after_result(self) -> str:
        return self._text([*_RESULTS, _ANSWER])

    def last_tail(self) -> str:
        """What follows the answer that a conversation ends with."""
        return _between(self._answered, SAID)

    def inner_tail(self) -> str:
        """What follows an earlier answer, up to the user's next text."""
        return _between(self._answered_twice, SAID, ASKED_AGAIN)

    def call_tails(self) -> tuple[str, str]:
        """What follows a tool call: the last one, and one with a result, up to that."""
        last = self._text([_USER, _CALL])
        return _between(last, VALUE), _between(self._after_result, VALUE, RESULT)

    def openings(self) -> tuple[Opening, ...]:
        first = self._opening(
            [_USER],
            ASKED,
            [
                _between(self._answered, ASKED, SAID),
                _between(self._answered_twice, ASKED, SAID),
                _between(self._text([_USER, _THOUGHTFUL]), ASKED, THOUGHT),
            ],
        )
        second = self._opening(_RESULTS, RESULT, [_between(self._after_result, RESULT, SAID)])
        return tuple(dict.fromkeys(opening for opening in (first, second) if opening is not None))

    def _opening(self, messages: Messages, asked: str, gaps: list[str]) -> Opening | None:
        """`gaps` are what stands between the last of these messages, `asked`, and an answer to it."""
        prompt = _between(self._text(messages, generation_prompt=True), asked)
        for own in (_CALL_ID, NAME):  # some families repeat them behind the result
            prompt = prompt.rpartition(own)[2]
        # Without the end of the question, which differs from one kind of message to another.
        ended = len(shared_start(prompt, _between(self._text(messages), asked)))
        if prompt[ended:].strip():
            prompt = prompt[ended:]
        begins = _PIECES.match(prompt)
        if begins is None:
            return None
        header = prompt
        for gap in filter(None, gaps):
            _, begun, rest = gap.partition(begins[0])
            header = shared_start(header, begun + rest)
        return Opening(header, prompt) if header.strip() else None

    def _text(self, messages: Messages, *, generation_prompt: bool = False) -> str:
        for spelling in spellings(messages):
            spelled = spelling(messages)
            try:
                text, _ = self.template.render(spelled, self.tools, generation_prompt=generation_prompt)
            except (TemplateRefused, ModelError):  # which a row that needs the template will report
                continue
            if not is_garbled(text, spelled) and _holds_all(text, messages):
                return text
        return ""


def _holds_all(text: str, messages: Messages) -> bool:
    """Whether the last text of each message is written; thoughts are often left out."""
    return all((VALUE if "tool_calls" in message else message["content"]) in text for message in messages)


def shared_start(one: str, other: str) -> str:
    """What two texts have in common at their start, up to whole tags and words."""
    shared = 0
    for piece in _PIECES.finditer(one):
        if not other.startswith(piece[0], shared):
            break
        shared = piece.end()
    return one[:shared]


_PIECES = re.compile(r"<[^<>\s]+>|\s|<|[^<\s]+")


def _between(text: str, start: str, end: str = "") -> str:
    """What stands after `start`, and before `end` if that is given; empty if one of them is missing."""
    _, found, rest = text.partition(start)
    if not found or not end:
        return rest
    before, found, _ = rest.partition(end)
    return before if found else ""


def _added(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The added tokens in the text, in order."""
    added = tokenizer.added_tokens_decoder
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    return [str(tokenizer.convert_ids_to_tokens(token)) for token in tokens if token in added]


def _earliest(ends: Sequence[str], text: str) -> str:
    """Which of these texts comes first in `text`; empty if none does."""
    found = [(at, end) for end in ends if (at := text.find(end)) >= 0]
    return min(found)[1] if found else ""
