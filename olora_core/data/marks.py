"""Marks: characters around each part of an answer, by which it is found again in the rendered text.

Every mark is a different character of Unicode's private planes. It stands inside the white space at its
part's edges, which templates strip.
"""

import re
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from functools import partial
from typing import Any, Literal

from .conversations import with_texts

PRIVATE = re.compile("[\U000f0000-\U0010fffd]")
THINK = re.compile(r"(</?think(?:ing)?>)")
"""Tags around a thought inside the content, where templates take it apart."""
Kind = Literal["content", "reasoning", "call", "argument"]


@dataclass(frozen=True)
class Part:
    """One text of an answer."""

    message: int
    """Index of the answer in the conversation."""
    kind: Kind
    before: str
    after: str
    """The marks around it."""


class TooManyMarks(Exception):
    """A conversation has more parts than there are marks."""


@dataclass
class Marker:
    """Puts marks into copies of messages: characters that `text` does not contain."""

    text: InitVar[str]
    parts: list[Part] = field(default_factory=list)
    lengths: dict[str, int] = field(default_factory=dict)
    """Of the control tokens, by the mark behind the first character of each."""

    def __post_init__(self, text: str) -> None:
        taken = set(PRIVATE.findall(text))
        self._free = (mark for mark in map(chr, range(0xF0000, 0x10FFFE)) if mark not in taken)
        self._used: set[str] = set()

    def answer(self, i: int, message: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of message `i`, an answer, with marks around its texts, or in its place if it has none."""
        marked = {**message, "content": self._content(i, message["content"])}
        if reasoning := message.get("reasoning_content"):
            marked["reasoning_content"] = marked["thinking"] = self._mark(i, "reasoning", reasoning)
        if "tool_calls" in message:
            marked["tool_calls"] = [self._call(i, call) for call in message["tool_calls"]]
        if marked == message:
            marked["content"] = message["content"] + self._pair(i, "content", "")
        return marked

    def _content(self, i: int, content: str) -> str:
        kind: Kind = "content"
        pieces = []
        for piece in THINK.split(content):
            if THINK.fullmatch(piece):
                kind = "content" if piece.startswith("</") else "reasoning"
                pieces.append(piece)
            else:
                pieces.append(self._mark(i, kind, piece))
        return "".join(pieces)

    def _call(self, i: int, call: Mapping[str, Any]) -> dict[str, Any]:
        function = call["function"]
        name = self._mark(i, "call", function["name"])
        arguments = with_texts(function["arguments"], partial(self._mark, i, "argument"))
        return {**call, "function": {**function, "name": name, "arguments": arguments}}

    def _mark(self, i: int, kind: Kind, text: str) -> str:
        core = text.strip()
        if not core:
            return text
        start = text.index(core)
        return text[:start] + self._pair(i, kind, core) + text[start + len(core) :]

    def inside(self, length: int) -> str:
        """A mark to stand inside a control token of this length."""
        mark = self._next()
        self.lengths[mark] = length
        return mark

    def _pair(self, i: int, kind: Kind, core: str) -> str:
        part = Part(i, kind, self._next(), self._next())
        self.parts.append(part)
        return part.before + core + part.after

    def _next(self) -> str:
        mark = next(self._free, None)
        if mark is None:
            raise TooManyMarks
        self._used.add(mark)
        return mark

    def remove(self, text: str) -> tuple[str, dict[str, list[int]]]:
        """The text without the marks, and where in it each of them stood."""
        pieces: list[str] = []
        places: dict[str, list[int]] = {}
        length = at = 0
        for found in PRIVATE.finditer(text):
            if found[0] in self._used:
                pieces.append(text[at : found.start()])
                length += found.start() - at
                places.setdefault(found[0], []).append(length)
                at = found.end()
        return "".join([*pieces, text[at:]]), places
