"""The trained characters of a rendered conversation: from where each answer begins to its end token."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .marks import Kind
from .templates import Block
from .turns import Opening, Turns, shared_start


class Span(NamedTuple):
    """Trained characters of a text, and their weight in the loss."""

    start: int
    end: int
    weight: float = 1.0


class PlacedPart(NamedTuple):
    """Where a part of an answer stands in the text; None for an edge that the template left out."""

    kind: Kind
    start: int | None
    end: int | None


@dataclass(frozen=True)
class Answer:
    """An assistant's message, and the places of its parts."""

    message: int
    """Its index in the conversation."""
    content: dict[str, Any]
    weight: float
    parts: list[PlacedPart]
    is_last: bool
    """Whether the conversation ends with it."""

    @property
    def places(self) -> list[int]:
        return [place for part in self.parts for place in (part.start, part.end) if place is not None]

    @property
    def calls(self) -> list[dict[str, Any]]:
        return [call["function"] for call in self.content.get("tool_calls", [])]

    @property
    def has_text(self) -> bool:
        return bool(self.content["content"].strip() or self.content.get("reasoning_content") or self.calls)

    def check(self, text: str) -> None:
        """Raises LeftOut if a call, or all content of an answer without calls, is missing from the text."""
        lacking = {part.kind for part in self.parts if part.start is None or part.end is None}
        written = {part.kind for part in self.parts if part.start is not None and part.end is not None}
        place = f"message {self.message}"
        if "call" in lacking:
            raise LeftOut(f"the tool calls of {place}")
        if "argument" in lacking or not self._has_keys(text):
            raise LeftOut(f"all arguments of the tool calls of {place}")
        if not self.calls and "content" in lacking - written:
            raise LeftOut(f"the content of {place}, an answer")
        if not self.places:
            raise CannotMask(f"nothing of {place}, an answer, is found in its text")

    def _has_keys(self, text: str) -> bool:
        """Whether the names of all arguments are written: values that are no strings have no marks."""
        start = min(self.places, default=0)
        keys = [key for call in self.calls for key in call["arguments"]]
        return all(any(text.find(form, start) >= 0 for form in (key, json.dumps(key)[1:-1])) for key in keys)

    def untrained(self, spans: Sequence[Span]) -> set[str]:
        """Kinds of its parts that lie, whole or in part, in none of these spans."""
        if not self.weight:
            return set()
        return {
            part.kind
            for part in self.parts
            if part.start is None
            or part.end is None
            or not any(span.start <= part.start and part.end <= span.end for span in spans)
        }

    def final(self, spans: Sequence[Span]) -> list[Span]:
        """What of these spans follows its thought."""
        thoughts = [part.end for part in self.parts if part.kind == "reasoning" and part.end is not None]
        if not thoughts:
            return list(spans)
        contents = [part.start for part in self.parts if part.kind == "content" and part.start is not None]
        start = min((place for place in contents if place >= max(thoughts)), default=max(thoughts))
        return [span._replace(start=max(start, span.start)) for span in spans if span.end > start]


def spans_in_blocks(blocks: Sequence[Block], answers: Sequence[Answer]) -> dict[int, list[Span]]:
    """Spans of the trained answers by message, from the blocks that the template marks itself."""
    spans: dict[int, list[Span]] = {}
    firsts = [min(answer.places, default=None) for answer in answers]
    n = 0
    for at, (start, end) in enumerate(blocks):
        # The block of the last answer that has begun by its end, unless each answer has one.
        while n + 1 < len(answers) and (first := firsts[n + 1]) is not None and first <= end:
            n += 1
        owner = answers[at] if len(blocks) == len(answers) else answers[n]
        if owner.weight:
            spans.setdefault(owner.message, []).append(Span(start, end, owner.weight))
    return spans


def spans_between_turns(
    text: str, answers: Sequence[Answer], turns: Turns
) -> tuple[str, dict[int, list[Span]]]:
    """The text, with an end added that the template lacks, and the span of each trained answer by message.

    Raises CannotMask.
    """
    spans: dict[int, list[Span]] = {}
    floor = 0  # where the answer before this one ended
    limits = [min(answer.places, default=len(text)) for answer in answers[1:]] + [len(text)]
    for n, (answer, limit) in enumerate(zip(answers, limits, strict=True)):
        if not answer.places:
            continue
        last = max(answer.places)
        end = _end(text, last, limit, turns.ends)
        if answer.weight:
            start = _start(text, floor, answer, turns.openings)
            if start is None and n and answers[n - 1].message + 1 == answer.message:
                start = floor  # one turn with the answer before it
            if start is None:
                raise CannotMask(f"what asks for message {answer.message}, an answer, is not found before it")
            if end is None and answer.is_last:
                text += turns.closing_call if answer.calls else turns.closing
                end = len(text)
            spans[answer.message] = [Span(start, end or last, answer.weight)]
        floor = end or last
    return text, spans


def _start(text: str, floor: int, answer: Answer, openings: Sequence[Opening]) -> int | None:
    """Where the answer begins: behind as much of a prompt's end as stands before its first part."""
    first = min(answer.places)
    for opening in openings:
        at = text.rfind(opening.header, floor, first)
        if at >= 0:
            return at + len(shared_start(opening.prompt, text[at:first]))
    return None


def _end(text: str, last: int, limit: int, ends: Sequence[str]) -> int | None:
    """Behind the first end token after an answer's last part; None if there is none."""
    found = [at + len(end) for end in ends if (at := text.find(end, last, limit)) >= 0]
    return min(found, default=None)


class CannotMask(Exception):
    """The answers cannot be found in the text with certainty; the argument says why."""


class LeftOut(Exception):
    """The template does not write a part of a trained answer; the argument names it."""
