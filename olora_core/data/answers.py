"""Conversations to text, and where in it the answers stand.

A conversation is rendered twice: as it is, and with marks around each part of its answers (marks.py). Without
its marks the second text must equal the first; the marks then tell where each part was written, or that the
template left it out. An answer is trained from the end of its header, the text that asks the model for it, to
its end token. Both renderings and the search take time linear in the length.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import DataError
from .control_tokens import ControlTokens
from .conversations import Messages, Spelling, is_garbled, normalised, spellings
from .marks import Marker, TooManyMarks
from .spans import Answer, CannotMask, LeftOut, PlacedPart, Span, spans_between_turns, spans_in_blocks
from .templates import ChatTemplate, TemplateRefused, Tools
from .turns import Turns, turns_of


@dataclass(frozen=True)
class Conversation:
    """A rendered conversation."""

    text: str
    spans: list[Span]
    """Of the answers whose weight is not 0, in order."""
    untrained: frozenset[str] = frozenset()
    """"reasoning" or "content", if the template left such a part of one of these answers out."""
    literal: list[tuple[int, int]] = field(default_factory=list)
    """Characters that spell control tokens but are ordinary text."""


class Answers:
    """Renders conversations with one template.

    `end_tokens` are the ids of the tokens at which generation stops. Without `reasoning`, the thought before
    an answer is read but not trained. With `literal`, control tokens in a message are ordinary text; without,
    a conversation that contains one is refused.
    """

    def __init__(
        self,
        template: ChatTemplate,
        end_tokens: frozenset[int],
        *,
        reasoning: bool = True,
        literal: bool = False,
    ) -> None:
        self.template = template
        self.end_tokens = end_tokens
        self.reasoning = reasoning
        self.literal = literal
        self._control = ControlTokens(template.tokenizer)
        self._turns: dict[bool, Turns] = {}

    @property
    def ends(self) -> frozenset[int]:
        """Ids of the tokens that end an answer: those at which generation stops, and with a chat template
        those that it writes behind an earlier answer."""
        if not self.template.tokenizer.chat_template:
            return self.end_tokens
        return self.end_tokens.union(
            self.template.tokenizer.convert_tokens_to_ids(list(self.turns(None).ends))
        )

    def render(self, place: str, messages: Sequence[dict[str, Any]], tools: Tools) -> Conversation:
        """Messages that passed the check of their format. Raises DataError, which names `place`."""
        if not self.literal and (found := self._control.first(messages)):
            message, token = found
            raise DataError(
                f"{place}: message {message} contains {token}, a control token of the base model. Remove it, "
                'or train it as ordinary text with hyperparameters.control_tokens = "text".'
            )
        weights = [float(message.get("weight", 1)) for message in messages]
        try:
            return self._render(normalised(messages), weights, tools)
        except CannotMask as problem:
            raise DataError(
                f"{place}: the base model's chat template cannot be masked, because {problem}. Split the "
                "conversation so that its answer comes last, give earlier answers weight 0, or use a base "
                "model whose template has {% generation %} marks."
            ) from None
        except LeftOut as problem:
            raise DataError(
                f"{place}: the base model's chat template does not write {problem}, so it would not be "
                "trained. Remove it from the row, or use a base model whose template writes it."
            ) from None
        except TooManyMarks:
            raise DataError(
                f"{place}: the conversation has too many parts. Split it into several rows."
            ) from None
        except TemplateRefused as problem:
            raise DataError(f"{place}: the base model's chat template refuses it: {problem}") from None

    def turns(self, tools: Tools) -> Turns:
        kind = tools is not None
        if kind not in self._turns:
            self._turns[kind] = turns_of(self.template, tools, self.end_tokens)
        return self._turns[kind]

    def _render(self, messages: Messages, weights: Sequence[float], tools: Tools) -> Conversation:
        """In the first spelling in which the template writes everything."""
        refusals: list[TemplateRefused | LeftOut | CannotMask] = []
        for spelling in spellings(messages):
            try:
                return self._in_spelling(messages, weights, tools, spelling)
            except (TemplateRefused, LeftOut, CannotMask) as problem:
                refusals.append(problem)
        # Of the spelling that came furthest.
        raise max(refusals, key=lambda problem: (TemplateRefused, LeftOut, CannotMask).index(type(problem)))

    def _in_spelling(
        self, messages: Messages, weights: Sequence[float], tools: Tools, spelling: Spelling
    ) -> Conversation:
        spelled = spelling(messages)
        text, blocks = self.template.render(spelled, tools)
        if is_garbled(text, spelled):
            raise TemplateRefused("it writes tool calls as Python does, and not as JSON")
        answers, literal = self._answers(text, messages, weights, tools, spelling)
        for answer in answers:
            if answer.weight:
                answer.check(text)
        if blocks:
            spans = spans_in_blocks(blocks, answers)
        else:
            text, spans = spans_between_turns(text, answers, self.turns(tools))
        untrained = {kind for answer in answers for kind in answer.untrained(spans.get(answer.message, []))}
        if not self.reasoning:
            spans = {answer.message: answer.final(spans.get(answer.message, [])) for answer in answers}
            untrained -= {"reasoning"}
        trained = [span for found in spans.values() for span in found]
        return Conversation(text, trained, frozenset(untrained), literal)

    def _answers(
        self, text: str, messages: Messages, weights: Sequence[float], tools: Tools, spelling: Spelling
    ) -> tuple[list[Answer], list[tuple[int, int]]]:
        """The answers of a conversation whose rendered form is `text`, each with its parts' places; and the
        characters that spell control tokens inside messages."""
        marker = Marker(text)
        marked = [
            marker.answer(i, message) if message["role"] == "assistant" else message
            for i, message in enumerate(messages)
        ]
        if self.literal:
            marked = self._control.split(marked, marker.inside)
        found, places = marker.remove(self.template.render(spelling(marked), tools)[0])
        parts: dict[int, list[PlacedPart]] = {}
        for part in marker.parts:
            placed = PlacedPart(
                part.kind, *(places.get(mark, [None])[0] for mark in (part.before, part.after))
            )
            parts.setdefault(part.message, []).append(placed)
        answers = [
            Answer(i, message, weights[i], parts.get(i, []), is_last=i + 1 == len(messages))
            for i, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        if found != text:
            empty = next((answer for answer in answers if not answer.has_text), None)
            raise CannotMask(
                "what it writes around an answer depends on the answer's text"
                if empty is None
                else f"message {empty.message} is an empty answer"
            )
        literal = [(at - 1, at - 1 + n) for mark, n in marker.lengths.items() for at in places.get(mark, [])]
        return answers, sorted(literal)
